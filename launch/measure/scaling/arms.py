"""The arms of a sweep: what is trained, and when its sums are reduced over the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32

from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism.step import Microbatch, StepPrograms, accumulate_sample

DP, SGD, SGD_SYNC = "dp", "sgd", "sgd-sync-every-batch"
#: Every arm, and what it is.
ARMS = {
    DP: "DP-SGD as the config says",
    SGD: "no privacy, the same programs: sums locally, one all-reduce a step",
    SGD_SYNC: "no privacy, an all-reduce after every physical batch, as common data-parallel wrappers do",
}


def config_of(arm: str, config: Config) -> Config:
    """The config that `arm` trains.

    Raises:
        InputError: the private arm of a config without privacy.
    """
    if arm == DP:
        if not config.privacy.enabled:
            raise InputError("privacy.enabled", False, "the arm dp needs it true; leave dp out of --arms otherwise.")
        return config
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, enabled=False))


class Share:
    """All-reduces the sums of all devices between two microbatches: what `sgd-sync-every-batch` adds.

    The total stays on the first device's slice alone, with zeros on the others. The next microbatches then add to
    it, and the next reduction counts everything once: the step is equal to the one that reduces at its end.
    """

    def __init__(self, sums: Array, mesh: Mesh) -> None:
        axis = mesh.axis_names[0]

        def share(own: Float32[Array, " w"]) -> Array:
            total = lax.psum(own, axis)
            return jnp.where(lax.axis_index(axis) == 0, total, jnp.zeros_like(total))

        mapped = jax.shard_map(
            share, mesh=mesh, check_vma=False, in_specs=PartitionSpec(axis), out_specs=PartitionSpec(axis)
        )
        self._program = jax.jit(mapped, donate_argnums=0).lower(sums).compile()

    def __call__(self, sums: Array) -> Array:
        """All-reduce; consumes `sums`."""
        return self._program(sums)

    def program_text(self) -> str:
        """The compiled HLO, for tests that count collectives."""
        return str(self._program.as_text())


def accumulate_and_share(
    programs: StepPrograms,
    share: Share,
    params: Any,
    sums: Array,
    rounds: Iterable[Mapping[int, Microbatch]],
    loss_key: Mapping[int, Array],
) -> Array:
    """`accumulate_sample` with an all-reduce between every two rounds; `noisy_update` reduces the last itself."""
    for number, batches in enumerate(rounds):
        if number > 0:
            sums = share(sums)
        sums = accumulate_sample(programs, params, sums, [batches], loss_key)
    return sums


def all_reduces(arm: str, config: Config, microbatches: int) -> int:
    """Number of parameter-sized all-reduces in a step of `microbatches` microbatches; an empty step has one too.

    The private step shares its draw by a second one, unless the noise is `fused`.
    """
    if arm == DP:
        return 2 if config.privacy.noise_placement == "designated" else 1
    return max(1, microbatches) if arm == SGD_SYNC else 1
