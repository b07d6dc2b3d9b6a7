"""Amdahl's law against data made from it."""

from __future__ import annotations

import numpy as np
import pytest

from dpdist_launch.measure.scaling.model import fraction_of_ideal, misfit, parallel_fraction, speed_up


def throughput(fraction: float, nodes: tuple[int, ...]) -> dict[int, list[float]]:
    return {n: [500.0 * speed_up(n, min(nodes), fraction)] for n in nodes}


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("nodes", [(1, 2), (1, 2, 4, 8, 20), (4, 8, 20)])
def test_exact_data_give_their_fraction_back(fraction: float, nodes: tuple[int, ...]) -> None:
    assert parallel_fraction(throughput(fraction, nodes)) == pytest.approx(fraction, abs=1e-12)


def test_the_law_by_hand() -> None:
    assert speed_up(4, 1, 0.5) == pytest.approx(1.6)  # 1 / (0.5 + 0.5 / 4)
    assert speed_up(20, 1, 1.0) == pytest.approx(20)
    assert speed_up(8, 4, 0.9) == pytest.approx(1 / 0.55)
    assert speed_up(4, 4, 0.7) == 1


def test_noise_moves_the_fraction_little() -> None:
    random = np.random.default_rng(0)
    found = []
    for _ in range(200):
        noisy = {n: list(x[0] * random.normal(1, 0.02, 3)) for n, x in throughput(0.95, (1, 2, 4, 8, 20)).items()}
        found.append(parallel_fraction(noisy))
    assert np.mean(found) == pytest.approx(0.95, abs=0.003)
    assert np.std(found) < 0.01


def test_the_fraction_stays_a_fraction() -> None:
    assert parallel_fraction({1: [100.0], 2: [230.0]}) == 1.0  # more than linear
    assert parallel_fraction({1: [100.0], 2: [90.0]}) == 0.0  # slower than one


def test_one_node_count_says_nothing() -> None:
    assert parallel_fraction({4: [100.0, 101.0]}) is None
    assert parallel_fraction({}) is None


def test_the_misfit_by_hand() -> None:
    assert misfit(throughput(0.9, (1, 2, 4, 8)), 0.9) == pytest.approx(0, abs=1e-12)
    # With f = 1, 2 and 4 nodes should give 200 and 400.
    assert misfit({1: [100.0], 2: [220.0], 4: [360.0]}, 1.0) == pytest.approx(0.1)
    assert misfit({1: [100.0], 2: [90.0]}, 0.0) == pytest.approx(0.1)


def test_fraction_of_ideal_by_hand() -> None:
    assert fraction_of_ideal(8, 300.0, 2, 100.0) == pytest.approx(0.75)
