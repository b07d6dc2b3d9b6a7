"""What the grid does not cover, float32 rounding within a product, stays below its bound where it is attacked."""

from __future__ import annotations

import pytest
from within_products import bound, reached


@pytest.mark.parametrize(("physical", "rows"), [(16, 1), (64, 1), (512, 1), (16, 197), (64, 197)])
def test_no_attack_moves_the_others_further_than_the_bound(physical: int, rows: int) -> None:
    found = reached(physical, rows, attempts=30)
    assert found > 1e-8  # it is there
    assert found < bound(physical, rows)
    assert found < 1e-3  # the second number of the privacy statement, with room for other machines
