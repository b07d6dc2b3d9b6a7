"""What several runs cost together, against closed forms and against one run of all their steps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from dpdist.joint.together import fixed_cost
from dpdist.mechanism.accounting import epsilon
from dpdist.mechanism.composition import Phase


def exact_delta(mu: float, epsilon: float) -> float:
    """Of Gaussian mechanisms whose sensitivities over standard deviations have the norm mu (Balle and Wang 2018)."""
    return float(norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


def test_phases_alike_cost_what_one_run_of_all_their_steps_costs() -> None:
    whole = epsilon(sampling_probability=0.01, noise_multiplier=1.5, steps=300, delta=1e-5)
    assert fixed_cost([Phase(0.01, 1.5, 100), Phase(0.01, 1.5, 200)], 1e-5) == whole


@pytest.mark.parametrize(("first", "second"), [(5.0, 20.0), (30.0, 31.0)])
def test_phases_of_every_record_cost_what_the_closed_form_says(first: float, second: float) -> None:
    """At q = 1 all steps together are one Gaussian mechanism."""
    mu = float(np.sqrt(10 / first**2 + 40 / second**2))
    spent = fixed_cost([Phase(1.0, first, 10), Phase(1.0, second, 40)], 1e-5)
    assert exact_delta(mu, spent.epsilon) <= 1e-5 * 0.99
    assert exact_delta(mu, spent.epsilon * 0.99) > 1e-5 * 0.99, "more than a part in a hundred above the least"


def test_unlike_phases_cost_more_than_each_and_less_than_their_sum() -> None:
    phases = [Phase(0.02, 1.0, 200), Phase(0.01, 2.0, 400)]
    alone = [fixed_cost([phase], 1e-5).epsilon for phase in phases]
    together = fixed_cost(phases, 1e-5)
    assert max(alone) < together.epsilon < sum(alone)
    assert together.accountant == "pld"
    assert together.epsilon < together.epsilon_rdp
    assert fixed_cost(phases[::-1], 1e-5).epsilon == pytest.approx(together.epsilon, rel=1e-6)
