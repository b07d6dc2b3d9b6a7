"""Models of a user's own, in which one example sees the others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def remembering(*, example: dict[str, jax.ShapeDtypeStruct], classes: int) -> Model:
    """The same by a callback that is run one example at a time, and keeps the mean of those before."""
    plain, seen = userland.small(example=example, classes=classes), []

    def centred(x: Any) -> Any:
        seen.append(np.asarray(x))
        return np.asarray(x) - np.mean(seen, axis=0)

    def apply(params: Any, example: Any) -> Any:
        x = example["image"]
        return plain.apply(params, {"image": jax.pure_callback(centred, x, x, vmap_method="sequential")})

    return Model(init=plain.init, apply=apply)


def on_the_host(outputs: Any, example: Any) -> Any:
    """A test metric, which may call back: no guarantee covers test records."""
    one = jax.ShapeDtypeStruct((), np.float32)
    return jax.pure_callback(lambda x: np.max(x).astype(np.float32), one, outputs, vmap_method="sequential")
