"""Models of a user's own, in which one example sees the others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import userland

from dpdist.cluster.world import AXIS
from dpdist.models import Model


@jax.custom_batching.custom_vmap
def against_the_batch(x: Any) -> Any:
    return x


@against_the_batch.def_vmap
def _(size: int, batched: Any, x: Any) -> Any:
    return x * jnp.sign(jnp.sum(x)), True


def batched(*, example: dict[str, jax.ShapeDtypeStruct], classes: int) -> Model:
    """`small`, of images whose sign the whole microbatch decides: of 64 records, one moved the sum by over 60 C."""
    plain = userland.small(example=example, classes=classes)
    return Model(init=plain.init, apply=lambda p, e: plain.apply(p, {"image": against_the_batch(e["image"])}))


def collective(*, example: dict[str, jax.ShapeDtypeStruct], classes: int) -> Model:
    """The same over the examples that other devices hold, by the name of the mesh's axis."""
    plain = userland.small(example=example, classes=classes)
    return Model(init=plain.init, apply=lambda p, e: plain.apply(p, {"image": jax.lax.psum(e["image"], AXIS)}))
