"""The grid: fine enough that rounding costs nothing, coarse enough that no integer sum leaves its 64 bits."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdist.mechanism.grid import Grid, choose_grid, to_grid

property_test = settings(derandomize=True, deadline=None, max_examples=300)
runs = st.fixed_dictionaries(
    {
        "clip_norm": st.floats(1e-6, 1e6),
        "noise_multiplier": st.floats(0.05, 1e5),
        "coordinates": st.integers(1, 10**10),
        "dataset_size": st.integers(1, 10**10),
    }
)


@given(runs)
@property_test
def test_the_grid_is_a_power_of_two_with_the_slack_of_two_products(run: dict[str, Any]) -> None:
    grid = choose_grid(**run)
    assert math.frexp(grid.spacing)[0] == 0.5
    clip, sigma = run["clip_norm"], run["noise_multiplier"]
    # Two products, each rounded before and after: four roundings of half a unit in every coordinate.
    assert grid.slack * clip >= 4 * 0.5 * grid.spacing * math.sqrt(run["coordinates"])
    # All records at once fit, with 16 standard deviations on either side; within that the noise is wide on the grid.
    largest = (run["dataset_size"] + 2 * 16 * sigma) * clip / grid.spacing
    assert largest <= 2**62
    if largest <= 2**61:
        assert sigma * clip / grid.spacing >= 2**36
        assert grid.slack <= 2**-12 * (1 + 1e-9)
    assert grid.slack <= 1e-3


@pytest.mark.parametrize(("coordinates", "size"), [(86_000_000, 1_280_000), (1_000_000_000, 10**7), (650, 1437)])
def test_in_ordinary_runs_the_slack_is_next_to_nothing(coordinates: int, size: int) -> None:
    grid = choose_grid(clip_norm=1.0, noise_multiplier=1.0, coordinates=coordinates, dataset_size=size)
    assert grid.slack < 1e-5


def test_what_no_64_bits_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        choose_grid(clip_norm=1.0, noise_multiplier=1.0, coordinates=10**14, dataset_size=10**14)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), st.integers(-40, -3))
@property_test
def test_rounding_is_to_the_nearest_multiple_exactly(values: list[float], exponent: int) -> None:
    spacing = 2.0**exponent
    with jax.enable_x64(True):
        units = np.asarray(to_grid(jnp.asarray(values, jnp.float32), spacing))
    assert units.dtype == np.int64
    # In integers: float32 numbers are multiples of 2^-149.
    for value, unit in zip(values, units.tolist(), strict=True):
        exact = int(value * 2**60) * 2**89 if abs(value) >= 2**-30 else None
        if exact is not None:
            assert abs(exact - unit * 2 ** (149 + exponent)) * 2 <= 2 ** (149 + exponent)


def test_a_grid_is_what_a_plan_keeps() -> None:
    assert choose_grid(clip_norm=1.0, noise_multiplier=1.0, coordinates=1, dataset_size=1) == Grid(
        spacing=2.0**-36, slack=2 * 2.0**-36 * (1 + 2.0**-50)
    )
