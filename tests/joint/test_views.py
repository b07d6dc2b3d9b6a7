"""A guarantee in other words: against closed forms at q = 1, against sampled attacks, and for groups."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from private_runs import more, private_run
from scipy.stats import norm

from dpdist.errors import InputError
from dpdist.joint.views import Curve, attack, curve, gaussian_delta, gdp, zcdp
from dpdist.mechanism.accounting import epsilon
from dpdist.mechanism.composition import Phase
from dpdist_launch.cli import main
from dpdist_launch.privacy.views import sentence

WHOLE, SAMPLED = Phase(1.0, 20.0, 100), Phase(0.05, 1.0, 60)
MU = 0.5


@pytest.fixture(scope="module")
def whole() -> Curve:
    return curve(WHOLE)


@pytest.fixture(scope="module")
def sampled() -> Curve:
    return curve(SAMPLED)


def test_the_curve_is_a_close_upper_bound_of_the_closed_form(whole: Curve) -> None:
    there = whole.deltas > 1e-9
    exact = gaussian_delta(MU, whole.epsilons[there])
    assert (whole.deltas[there] >= exact).all()
    assert (whole.deltas[there] <= 1.02 * exact + 1e-9).all()


@pytest.mark.parametrize("plan", [WHOLE, SAMPLED])
def test_the_curve_goes_through_what_is_stated(plan: Phase) -> None:
    q, sigma = plan.sampling_probability, plan.noise_multiplier
    stated = epsilon(sampling_probability=q, noise_multiplier=sigma, steps=plan.steps, delta=1e-5).epsilon
    found = curve(plan)
    assert stated <= found.epsilon(1e-5) <= stated * 1.003
    assert found.epsilon(1e-300) == np.inf


def test_between_two_points_the_left_one_holds(whole: Curve) -> None:
    middle = (whole.epsilons[10] + whole.epsilons[11]) / 2
    assert whole.at(np.array([middle]))[0] == whole.deltas[10] > whole.deltas[11]


def test_no_attack_on_a_gaussian_beats_the_bound_and_the_best_nearly_reaches_it(whole: Curve) -> None:
    for rate in (0.0, 1e-4, 1e-2, 0.1, 0.5, 0.99, 1.0):
        best = norm.cdf(norm.ppf(rate) + MU)
        assert best <= whole.true_positive_rate(rate) <= best * 1.02 + 1e-9
    assert 2 * norm.cdf(MU / 2) - 1 <= whole.advantage() <= (2 * norm.cdf(MU / 2) - 1) * 1.02


def test_the_best_attack_on_sampled_steps_stays_below_the_bound_and_comes_close(sampled: Curve) -> None:
    """The likelihood ratio of the pair that dominates every step, on 200,000 drawn transcripts of each kind."""
    rng, count, q = np.random.default_rng(0), 200_000, SAMPLED.sampling_probability
    scores = []
    for member in (0.0, 1.0):
        total = np.zeros(count)
        for _ in range(SAMPLED.steps):
            seen = rng.standard_normal(count) + member * (rng.random(count) < q)
            total += np.log1p(q * np.expm1(seen - 0.5))
        scores.append(np.sort(total))
    for rate in (0.01, 0.1, 0.3):
        reached = float((scores[1] > scores[0][int((1 - rate) * count)]).mean())
        bound = sampled.true_positive_rate(rate)
        assert 0.9 * bound < reached < bound + 3 * np.sqrt(bound / count), rate


def test_many_records_cost_more_than_one_and_no_more_than_the_group_bound(sampled: Curve) -> None:
    three = curve(SAMPLED, records=3)
    assert sampled.epsilon(1e-5) < three.epsilon(1e-5) <= sampled.apart(3).epsilon(1e-5) * 1.002
    exact = gaussian_delta(3 * MU, np.array([2.0]))[0]
    for found in (curve(WHOLE, records=3), curve(WHOLE).apart(3)):
        assert found.at(np.array([2.0]))[0] >= exact
    assert curve(WHOLE, records=3).at(np.array([2.0]))[0] <= 1.02 * exact
    for records in (0, 65):
        with pytest.raises(InputError, match="give 1 to"):
            curve(WHOLE, records=records)


@pytest.mark.parametrize("plan", [WHOLE, SAMPLED, Phase(0.001, 0.7, 3000)])
def test_mu_gdp_covers_the_curve_and_the_approximation_is_kept_apart(plan: Phase) -> None:
    found, delta = curve(plan), 1e-5
    told = gdp(plan, found, delta)
    slack = 2e-3 * found.deltas + 1e-9  # of the accountant's rounding, and of the share kept
    assert (found.deltas * 0.99 <= gaussian_delta(told["mu"], found.epsilons) + slack).all()
    mu = told["mu_up_to_delta"]
    if mu < told["mu"]:
        assert (found.deltas <= gaussian_delta(mu, found.epsilons) + delta).all()
        assert not (found.deltas <= gaussian_delta(0.99 * mu, found.epsilons) + delta).all()
        assert mu > told["approximation_only"]["mu_clt"]
    assert "mu_clt" not in told


def test_mu_is_exact_without_sampling(whole: Curve) -> None:
    assert gdp(WHOLE, whole, 1e-5)["mu"] == pytest.approx(MU)
    assert gdp(WHOLE, whole, 1e-5, records=4)["mu"] == pytest.approx(4 * MU)


def divergence(q: float, sigma: float, order: float) -> float:
    """Of one sampled step against none, by quadrature, at any order; the other direction is smaller."""
    x = np.linspace(-30, 60, 400_001)
    ratio = np.logaddexp(np.log1p(-q), np.log(q) + (x - 0.5) / sigma**2)
    return float(np.log(np.trapezoid(np.exp(order * ratio) * norm.pdf(x, 0, sigma), x)) / (order - 1))


def test_rho_bounds_the_divergence_at_whole_and_broken_orders() -> None:
    told = zcdp(SAMPLED, 1e-5)
    assert told["tcdp"]["rho"] < told["rho"] == pytest.approx(30.0)
    for order in (1.05, 1.5, 2.0, 2.3, 3.7, float(told["tcdp"]["omega"])):
        found = SAMPLED.steps * divergence(0.05, 1.0, order)
        assert found <= told["tcdp"]["rho"] * order
        assert found <= told["rho"] * order
    assert zcdp(WHOLE, 1e-5)["rho"] == pytest.approx(MU**2 / 2)
    assert zcdp(WHOLE, 1e-5, records=3)["rho"] == pytest.approx(9 * MU**2 / 2)


def test_a_rate_is_a_share(whole: Curve) -> None:
    with pytest.raises(InputError, match="from 0 to 1"):
        attack(whole, [1.5])


NUMBERS = ("--sampling-probability", "0.05", "--noise-multiplier", "1", "--steps", "60", "--delta", "1e-5")


def asked(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert main(["privacy", *argv]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_commands_print_one_object_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = asked(capsys, "curve", *NUMBERS, "--plot", str(tmp_path / "curve.png"))
    points = told["curves"]["a record"]  # type: ignore[index]
    assert points[0][0] == 0
    assert points == sorted(points, key=lambda point: (point[0], -point[1]))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    told = asked(capsys, "gdp", *NUMBERS)
    assert told["mu_up_to_delta"] < told["mu"]  # type: ignore[operator]
    assert asked(capsys, "zcdp", *NUMBERS)["rho"] == pytest.approx(30.0)
    rates = asked(capsys, "attack", *NUMBERS, "--false-positive-rate", "0.02")["attacks"]["a record"]["rates"]  # type: ignore[index]
    assert [rate["false_positive"] for rate in rates] == [0.02]
    plain = ("--sampling-probability", "1", "--noise-multiplier", "20", "--steps", "100", "--delta", "1e-5")
    assert "somebody with 2 records" in asked(capsys, "attack", *plain, "--records", "2")["attacks"]  # type: ignore[operator]


def test_a_run_with_a_unit_is_seen_for_the_unit_and_for_a_record_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = private_run(tmp_path / "a", data={"unit": "user", "records_per_unit": 4})
    told = asked(capsys, "attack", str(run))["attacks"]
    unit, record = told["all records with one value of 'user'"], told["one record of a unit"]  # type: ignore[index]
    assert unit["advantage"] < record["advantage"] <= 2 * unit["advantage"] * 1.001
    more(run, steps=300, sigma=1.0)
    assert main(["privacy", "curve", str(run)]) == 2
    assert "is no single plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["curve"], "--sampling-probability"),
        (["curve", *NUMBERS[:-1], "2"], "delta must be in"),
        (["gdp", *NUMBERS, "--steps", "0"], "at least 1"),
        (["curve", *NUMBERS, "--plot", "/nowhere/at/all.png"], "cannot be written"),
        (["zcdp", "/nowhere", "--steps", "3"], "leave it out"),
    ],
)
def test_bad_input_is_named(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert main(["privacy", *argv]) == 2
    assert words in capsys.readouterr().err


def test_what_people_read_is_rounded_and_never_below_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--sampling-probability", "0.01", "--noise-multiplier", "1", "--steps", "1000", "--delta", "1e-5")
    assert main(["privacy", "attack", *given, "--records", "3", "--false-positive-rate", "0.01"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["epsilon"] == pytest.approx(7.7)
    assert err == (
        "for somebody with 3 records: epsilon 7.7 at delta 1e-05; no attack finds more of the members than 17.16% at "
        "1% false alarms\n"
    )
    found = told | {"mu": 1.00001, "mu_up_to_delta": 0.50005, "rho": 2.30001}
    assert sentence("gdp", found) == "for somebody with 3 records: mu 1.001, or 0.5001 up to delta 1e-05"
    assert sentence("zcdp", found) == "for somebody with 3 records: rho 2.301"
    assert sentence("curve", found) == "for somebody with 3 records: epsilon 7.7 at delta 1e-05"
