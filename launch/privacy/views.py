"""`dpdist privacy curve`, `gdp`, `zcdp` and `attack`: the guarantee of a plan or of a run, seen in other ways."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdist.errors import InputError
from dpdist_launch.paths import path_argument

if TYPE_CHECKING:
    from dpdist.joint.members import Member
    from dpdist.joint.views import Curve
    from dpdist.mechanism.composition import Phase

_NUMBERS = ("sampling_probability", "noise_multiplier", "steps", "delta")
_RATES = (0.001, 0.01, 0.1)
#: For whom a guarantee also is, where it is for units.
_PART = "one record of a unit"
#: Points of a curve in what is printed.
_PRINTED = 101


def add_to(questions: Any) -> None:
    """Add the questions to the parser of `dpdist privacy`."""
    for name, text in (
        ("curve", "delta over epsilon of a plan or a run, as JSON and as a picture"),
        ("gdp", "Gaussian differential privacy (mu): what holds, and the usual approximation apart"),
        ("zcdp", "zero-concentrated and Renyi differential privacy"),
        ("attack", "what any test for membership can reach: true positives at false positives, advantage"),
    ):
        question = questions.add_parser(
            name, help=text, description=f"{text.capitalize()}. Prints one JSON object, and a sentence to stderr."
        )
        question.add_argument(
            "run_or_export", nargs="?", type=path_argument, metavar="RUN", help="or the plan's numbers:"
        )
        question.add_argument("--sampling-probability", type=float, help="q, in (0, 1]")
        question.add_argument("--noise-multiplier", type=float, help="sigma")
        question.add_argument("--steps", type=int, help="T")
        question.add_argument("--delta", type=float)
        question.add_argument(
            "--records",
            type=int,
            default=1,
            metavar="K",
            help="for somebody who has so many of the records (or other units) that the guarantee is for (1)",
        )
        if name == "curve":
            question.add_argument("--plot", type=path_argument, metavar="FILE.png")
        if name == "attack":
            question.add_argument(
                "--false-positive-rate",
                type=float,
                action="append",
                metavar="F",
                help="again for more (0.1%%, 1%%, 10%%)",
            )
        question.set_defaults(run=_answer, question=name)


def _answer(options: argparse.Namespace) -> int:
    from dpdist.joint.views import attack, curve, gdp, zcdp
    from dpdist.mechanism.accounting import epsilon

    plan, delta, unit, member = _plan(options)
    told: dict[str, Any] = {
        "sampling_probability": plan.sampling_probability,
        "noise_multiplier": plan.noise_multiplier,
        "steps": plan.steps,
        "delta": delta,
        "for": _for_whom(unit, options.records),
    }
    for_records = options.records == 1 and member is not None and unit.startswith("all records")
    if options.question == "zcdp":
        told |= zcdp(plan, delta, records=options.records)
        if for_records:
            told["rho_for_one_record_of_a_unit"] = 4 * told["rho"]
        return _show(options.question, told)
    found = curve(plan, records=options.records)
    seen: dict[str, Curve] = {told["for"]: found} | ({_PART: found.apart(2)} if for_records else {})
    stated = epsilon(
        sampling_probability=plan.sampling_probability,
        noise_multiplier=plan.noise_multiplier,
        steps=plan.steps,
        delta=delta,
    )
    told["epsilon"] = stated.epsilon if options.records == 1 else found.epsilon(delta)
    if options.question == "curve":
        told["curves"] = {name: _points(each) for name, each in seen.items()}
        if options.plot is not None:
            from dpdist_launch.privacy.plot import plot_curves

            told["plot"] = str(plot_curves(options.plot, seen, told["epsilon"], delta))
    elif options.question == "gdp":
        told |= gdp(plan, found, delta, records=options.records)
        if for_records:
            told["mu_for_one_record_of_a_unit"] = 2 * told["mu"]
    else:
        rates = options.false_positive_rate or _RATES
        told["attacks"] = {name: attack(each, rates) for name, each in seen.items()}
    return _show(options.question, told)


def _show(question: str, told: dict[str, Any]) -> int:
    """Print the exact numbers as JSON, and for people a sentence to stderr, rounded so that it claims no less."""
    print(json.dumps(told), flush=True)
    print(sentence(question, told), file=sys.stderr)
    return 0


def sentence(question: str, told: Mapping[str, Any]) -> str:
    """An answer in words, its numbers to four digits and never below the exact ones."""
    from dpdist.joint.compose import rounded_up

    delta = f"{told['delta']:g}"
    if question == "zcdp":
        return f"for {told['for']}: rho {rounded_up(told['rho'])}"
    if question == "gdp":
        up_to = rounded_up(told["mu_up_to_delta"])
        return f"for {told['for']}: mu {rounded_up(told['mu'])}, or {up_to} up to delta {delta}"
    whole = f"for {told['for']}: epsilon {rounded_up(told['epsilon'])} at delta {delta}"
    if question == "curve":
        return whole
    rates = told["attacks"][told["for"]]["rates"]
    found = [
        f"{rounded_up(100 * rate['true_positive'])}% at {100 * rate['false_positive']:.4g}% false alarms"
        for rate in rates
    ]
    return f"{whole}; no attack finds more of the members than {', '.join(found)}"


def _for_whom(unit: str, records: int) -> str:
    if records == 1:
        return unit
    return f"somebody with {records} records" if unit == "a record" else f"{records} units, each {unit}"


def _plan(options: argparse.Namespace) -> tuple[Phase, float, str, Member | None]:
    """The plan, its delta, for whom it is, and the run it is of."""
    from dpdist.mechanism.composition import Phase

    given = {name: getattr(options, name) for name in _NUMBERS}
    path: Path | None = options.run_or_export
    if path is None:
        if missing := [name for name, value in given.items() if value is None]:
            raise InputError(f"--{missing[0].replace('_', '-')}", None, "give it, or the directory of a run.")
        _require_in_range(**given)
        plan = Phase(given["sampling_probability"], given["noise_multiplier"], given["steps"])
        return plan, given["delta"], "a record", None
    for name in _NUMBERS[:-1]:
        if given[name] is not None:
            raise InputError(f"--{name.replace('_', '-')}", given[name], "leave it out: it is that of the run.")
    from dpdist.joint.members import read

    members, _, _ = read([path])
    member = members[0]
    if member.kind == "search":
        remedy = "is the best model of a search, whose bound is at one delta; these views are of one trial alone."
        raise InputError("RUN", str(path), remedy)
    if len(members) > 1 or not member.charges.kept_to_plan:
        remedy = "is no single plan: its epsilon holds at its own delta alone (dpdist privacy compose), not as a curve."
        raise InputError("RUN", str(path), remedy)
    plan, delta = member.charges.first, member.stated.delta if given["delta"] is None else given["delta"]
    _require_in_range(plan.sampling_probability, plan.noise_multiplier, plan.steps, delta)
    return plan, delta, member.unit, member


def _require_in_range(sampling_probability: float, noise_multiplier: float, steps: int, delta: float) -> None:
    from dpdist.mechanism.accounting import epsilon

    if steps < 1:
        raise InputError("--steps", steps, "give at least 1.")
    try:
        epsilon(
            sampling_probability=sampling_probability,
            noise_multiplier=noise_multiplier,
            steps=1,
            delta=delta,
            intervals=2**10,
        )
    except ValueError as error:
        raise InputError("dpdist privacy", "the numbers given", f"{error}.") from None


def _points(found: Curve) -> list[list[float]]:
    """Some of the points of a curve, the first and the last among them."""
    last = len(found.epsilons) - 1
    places = sorted({round(n * last / (_PRINTED - 1)) for n in range(_PRINTED)})
    return [[float(found.epsilons[n]), float(found.deltas[n])] for n in places]
