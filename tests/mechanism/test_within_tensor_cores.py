"""What a record does to its neighbours' rounding on tensor cores: built attacks reach it, within its bound."""

from __future__ import annotations

import numpy as np
import pytest
from tensor_cores import CORES, Core
from within_tensor_cores import at_random, bound, built, crossing


@pytest.mark.parametrize("core", CORES[1:], ids=lambda core: core.name)
@pytest.mark.parametrize(("physical", "rows"), [(8, 1), (32, 1), (8, 197), (32, 197)])
def test_no_attack_moves_the_others_further_than_the_bound(physical: int, rows: int, core: Core) -> None:
    found = built(physical, rows, core)
    assert found > 2.0**-24  # it is there
    assert found > at_random(np.random.default_rng(0), physical, rows, core)
    assert found < bound(physical, rows)
    assert found < 1e-2  # a second number for the privacy statement


def test_the_effect_grows_with_what_an_example_adds_up_to() -> None:
    few, many = (crossing(32, 197, CORES[1], ratio) for ratio in (16, 64))
    assert many > 2 * few
