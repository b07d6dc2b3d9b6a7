"""A2: rounding while microbatches are added up in float32 lets one record move the sum by more than C.

The records are built so that each microbatch's sum lies next to half a unit of the accumulator's last place, and that
one record less, which shifts all others by one place, brings each sum to the other side of it: every addition is then
rounded the other way. The exact sums differ by less than C, those in float32 by 1.5 C.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.step import Microbatch, StepPrograms, StepSpec, accumulate_sample
from dpdist.program.update import initial_state, placed, update_of

PHYSICAL, MICROBATCHES = 64, 1021
GRID = 2.0**-36


def records() -> np.ndarray:
    """Values below C = 1: each microbatch sums to k + 1/2 units less a quarter of what the boundary gains each time."""
    values, total = [], 0.0
    first, gain = 0.5, 0.45 / MICROBATCHES
    for number in range(MICROBATCHES):
        unit = 2.0 ** (np.floor(np.log2(max(total, 1.0))) - 23)
        wanted = (np.floor(0.99 * PHYSICAL / unit) + 0.5) * unit - gain / 2
        boundary = first + number * gain
        values += [boundary] + [(wanted - boundary) / (PHYSICAL - 1)] * (PHYSICAL - 1)
        total += wanted + gain / 2 - unit / 2
    return np.asarray([*values, first + MICROBATCHES * gain], np.float64).astype(np.float32)


def summed(values: np.ndarray, grid: float | None) -> float:
    """The clipped sum of one-dimensional gradients, in the order given, as `accumulate_sample` adds them up."""
    params = {"w": jnp.zeros(1)}
    state = initial_state(params, optax.sgd(1.0), False)
    programs = StepPrograms(
        StepSpec(
            grad_sum=clipped_grad_sum(lambda p, example: p["w"][0] * example["x"], clip_norm=1.0, method="per_example"),
            state=state,
            example={"x": jax.ShapeDtypeStruct((), jnp.float32)},
            update=update_of(optax.sgd(1.0), average_decay=0.0),
            mesh=Mesh(np.array(jax.devices("cpu")[:1]), ("devices",)),
            batch_sizes=(PHYSICAL,),
            normaliser=1.0,
            clip_norm=1.0,
            noise_scale=None,
            grid=grid,
            placement="designated",
            randomised=False,
        )
    )

    def rounds() -> Iterator[dict[int, Microbatch]]:
        for start in range(0, len(values), PHYSICAL):
            own = values[start : start + PHYSICAL]
            x, mask = np.zeros(PHYSICAL, np.float32), np.zeros(PHYSICAL, np.float32)
            x[: len(own)], mask[: len(own)] = own, 1
            batch = Microbatch({"x": x}, mask, np.zeros(PHYSICAL, np.int32))
            yield {0: jax.device_put(batch, programs.local[0])}

    key = programs.loss_key(Keys(Secret.from_insecure_seed(1), b""), 0)
    sums = accumulate_sample(programs, placed(state, programs.replicated).params, programs.zero_sums(), rounds(), key)
    return float(np.asarray(sums)[0]) * (grid or 1.0)


@pytest.fixture(scope="module")
def neighbours() -> tuple[np.ndarray, np.ndarray]:
    values = records()
    assert np.abs(values).max() < 1  # nothing is clipped
    return values[:-1], values[1:]  # one record of each is not in the other, and both are small


def test_float32_accumulation_moves_neighbours_apart(neighbours: tuple[np.ndarray, np.ndarray]) -> None:
    exact, moved = (sum(values.astype(np.float64)) for values in neighbours)
    assert abs(exact - moved) < 0.5
    one, other = (summed(values, None) for values in neighbours)
    assert abs(one - other) > 1.0


def test_integer_accumulation_does_not(neighbours: tuple[np.ndarray, np.ndarray]) -> None:
    """Even in sorted order, where every product changes; what is left is float32 rounding within the products."""
    exact, moved = (float(sum(values.astype(np.float64))) for values in neighbours)
    one, other = (summed(values, GRID) for values in neighbours)
    assert abs((one - other) - (exact - moved)) < 0.02
