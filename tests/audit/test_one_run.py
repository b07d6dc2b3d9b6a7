"""The bound from one run with many canaries: against the paper, and against mechanisms whose epsilon is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dpdist.audit.one_run import epsilon_lower, p_value, refuted
from dpdist.audit.training import TrainingPlan


def test_the_bound_is_that_of_the_papers_appendix() -> None:
    """0.673, for 1000 canaries and 75 right of 100 guesses, at delta 1e-4 and 95% (appendix D, page 46)."""
    assert refuted(1000, 100, 75, delta=1e-4, confidence=0.95) == pytest.approx(0.673, abs=5e-4)


@pytest.mark.parametrize("right", [0, 1, 30, 55, 60])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_p_value_is_the_formula_of_corollary_5_4(right: int, delta: float) -> None:
    m, r, epsilon = 100, 60, 0.7
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = [math.comb(r, k) * chance**k * (1 - chance) ** (r - k) for k in range(r + 1)]
    most = max([sum(pmf[right - i : right]) / i for i in range(1, right + 1)], default=0.0)
    expected = min(1.0, sum(pmf[right:]) + 2 * m * delta * most)
    assert p_value(m, r, right, epsilon=epsilon, delta=delta) == pytest.approx(expected)


def test_jax_privacy_finds_the_same_bound() -> None:
    """Where the extra `peers` is installed. It guesses on one side alone: "in", for every score above a threshold."""
    auditing = pytest.importorskip("jax_privacy.auditing")
    draw = np.random.default_rng(2)
    inside, outside = draw.normal(2, 1, 500), draw.normal(0, 1, 500)
    right, guesses = int(np.sum(inside > 1.7)), int(np.sum(inside > 1.7) + np.sum(outside > 1.7))
    theirs = auditing.CanaryScoreAuditor(inside, outside).epsilon_one_run(
        significance=0.05, delta=1e-5, threshold_strategy=auditing.Explicit(1.7)
    )
    assert refuted(1000, guesses, right, delta=1e-5, confidence=0.95) == pytest.approx(theirs, abs=1e-3)


def test_more_right_guesses_refute_more_and_half_of_them_nothing() -> None:
    bounds = [refuted(400, 200, right, delta=1e-6, confidence=0.95) for right in (100, 120, 150, 180, 200)]
    assert bounds[0] == 0
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert refuted(400, 200, 150, delta=1e-3, confidence=0.95) < bounds[2]


@pytest.mark.parametrize("epsilon", [0.3, 1.5])
def test_randomised_response_is_refuted_no_more_often_than_stated(epsilon: float) -> None:
    """Each coin is shown as it is with probability e^eps / (1 + e^eps): the bound is tight for it."""
    draw, chance, wrong = np.random.default_rng(3), 1 / (1 + math.exp(-epsilon)), 0
    for _ in range(200):
        coins = draw.random(300) < 0.5
        shown = np.where(draw.random(300) < chance, coins, ~coins)
        wrong += refuted(300, 300, int(np.sum(shown == coins)), delta=0.0, confidence=0.8) > epsilon
    assert stats.binom(200, 0.2).ppf(0.001) <= wrong <= stats.binom(200, 0.2).ppf(0.999)


def test_of_several_scores_the_best_counts_and_the_choice_is_paid_for() -> None:
    draw, coins = np.random.default_rng(4), np.arange(512) % 2 == 0
    good, noise = np.where(coins, 1.0, -1.0), draw.normal(0, 1, 512)
    one = epsilon_lower([good], coins, delta=0.0, confidence=0.95)
    two = epsilon_lower([noise, good], coins, delta=0.0, confidence=0.95)
    assert two.right == two.guesses == one.right == 512
    assert one.epsilon_lower == pytest.approx(refuted(512, 512, 512, delta=0.0, confidence=1 - 0.05 / 4))
    assert two.epsilon_lower == pytest.approx(refuted(512, 512, 512, delta=0.0, confidence=1 - 0.05 / 8))


def test_only_the_surest_canaries_are_guessed() -> None:
    draw, coins = np.random.default_rng(5), np.arange(640) % 2 == 0
    score = draw.normal(0, 1e-3, 640)
    score[:40] = np.where(coins[:40], 1, -1)
    found = epsilon_lower([score], coins, delta=0.0, confidence=0.95)
    assert (found.guesses, found.right) == (40, 40)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="12 right of 11 guesses on 20 canaries"):
        p_value(20, 11, 12, epsilon=1.0, delta=0.0)


def test_a_training_is_scored_by_what_a_canary_that_is_in_adds() -> None:
    plan = TrainingPlan(
        name="", canaries=4, noise_multiplier=1.0, sampling_probability=0.5, steps=8, delta=0.1, goes_back=True
    )
    sums = np.array([4.0, 0.0, 4.0, 0.0])  # q T C, as if there were no noise

    def released(sums: np.ndarray) -> dict[str, np.ndarray]:
        along = -sums / (0.5 * 4) / math.sqrt(2)
        return {"a": along, "b": -along}

    together, apart = plan.scores([released(sums), released(sums / 2)])
    assert together == pytest.approx([2.5, -2.5, 2.5, -2.5])
    assert apart == pytest.approx([1, -1, 1, -1])
