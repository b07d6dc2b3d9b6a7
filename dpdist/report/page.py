"""The page: one HTML file with everything in it, which loads nothing, prints, and is light or dark as its reader."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

import dpdist
from dpdist.joint.compose import rounded_up
from dpdist.report import charts
from dpdist.report.read import Told
from dpdist.report.words import meaning
from dpdist.run.curves import EPSILON, Points, label_of
from dpdist.run.diagnose import NOT_COVERED as PRIVATE

#: Phase of `dpdist.run.goodput` -> what it is called, in the order of the bar.
_PHASES = {
    "training": "training",
    "evaluation": "evaluation",
    "saving": "saving",
    "compile": "compiling",
    "start_up": "start-up",
    "lost": "lost and taken again",
}
_AFTER = {
    "interrupted": "the part before was cut short without a word: killed, or its node died",
    "preempted": "the part before was told to leave, and saved",
    "failed": "the part before failed",
    "finished": "it was asked for more steps",
}


def page(
    runs: Sequence[Told],
    *,
    title: str,
    together: Mapping[str, Any] | str | None = None,
    audit: Mapping[str, Any] | None = None,
) -> str:
    """The whole file.

    Args:
        runs: one, or several to compare.
        title: of the page.
        together: of several, what they cost together, as `dpdist.joint.compose.compose` says, or why that is not known.
        audit: what `dpdist audit --json` printed.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dpdist.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "setting": _setting, "up": rounded_up}
    first = runs[0]
    facts = first.statement if len(runs) == 1 and first.guarantee.startswith("holds") else None
    return environment.get_template("page.html").render(
        title=title,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=dpdist.__version__,
        runs=runs,
        alone=first if len(runs) == 1 else None,
        meaning=[] if facts is None else meaning(facts),
        metrics=_metrics(runs),
        charts=_charts(runs),
        differing=_differing(runs),
        together=together,
        audit=audit,
        phases=_PHASES,
        colours=charts.COLOURS,
        incident=_incident,
        private=any(run.private is not None for run in runs),
        private_words=PRIVATE,
        private_charts=_private_charts(runs),
        advice=_advice(runs),
    )


def number(value: Any, digits: int = 4) -> str:
    """A number for a table: few digits, thousands apart; a dash where there is none."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.{digits}g}"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _metrics(runs: Sequence[Told]) -> list[str]:
    """Names of all test metrics, those of the first run first."""
    return list(dict.fromkeys(name for run in runs for name in (*run.curves.tested, *run.summary.get("metrics", {}))))


def _charts(runs: Sequence[Told]) -> list[Markup]:
    names = _names(runs)

    def lines(points: Sequence[Points]) -> dict[str, Points]:
        return {name: each for name, each in zip(names, points, strict=True) if each}

    drawn = []
    for metric in _metrics(runs):
        drawn.append((label_of(metric), lines([run.curves.tested.get(metric, []) for run in runs]), False))
    drawn.append((EPSILON, lines([run.curves.epsilon for run in runs]), True))
    drawn.append(("throughput (examples/s)", lines([run.curves.throughput for run in runs]), True))
    target = {"planned": runs[0].curves.target} if len(runs) == 1 and runs[0].curves.target is not None else {}
    return [
        Markup(charts.over_steps(label, found, from_zero=zero, levels=target if label == EPSILON else {}))
        for label, found, zero in drawn
        if found
    ]


def _names(runs: Sequence[Told]) -> list[str]:
    """Of the runs, each once: two directories may be called alike."""
    names = [run.name for run in runs]
    return [f"{name} ({place + 1})" if names.count(name) > 1 else name for place, name in enumerate(names)]


def _differing(runs: Sequence[Told]) -> list[tuple[str, list[Any]]]:
    """Settings in which the runs are not alike, and the value that each run has."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [run.settings.get(name) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _incident(event: Mapping[str, Any]) -> str:
    """What an event says, in words."""
    kind = event["event"]
    if kind == "start":
        return (
            f"began: {event.get('steps')} steps on {event.get('nodes')} node(s), {event.get('processes')} process(es)"
        )
    if kind == "resume":
        why = _AFTER.get(str(event.get("after")), "")
        return f"went on from step {event.get('step')} on {event.get('nodes')} node(s): {why}"
    if kind == "preempted":
        saved = "saved" if event.get("saved") else "NOT saved"
        return f"told to leave at step {event.get('step')}; its state was {saved}"
    if kind == "failed":
        return f"failed at step {event.get('step')}: {event.get('cause')}"
    return f"{event.get('status', kind)} at step {event.get('step')}"


def _private_charts(runs: Sequence[Told]) -> list[Markup]:
    told = [(name, run.private) for name, run in zip(_names(runs), runs, strict=True) if run.private is not None]
    if not told:
        return []
    loss: dict[str, Points] = {}
    norms: dict[str, Points] = {}
    clipped: dict[str, Points] = {}
    for name, found in told:
        looks = [look for look in found["looks"] if look["norms"] is not None]
        loss[name] = [(look["step"], look["loss"]) for look in looks]
        norms[name] = [(look["step"], look["norms"]["p50"]) for look in looks]
        clipped[name] = [(step["step"], step["clipped"]) for step in found["steps"]]
    drawn = (
        ("PRIVATE: training loss", loss, False),
        ("PRIVATE: median gradient norm", norms, True),
        ("PRIVATE: share of examples clipped", clipped, False),
    )
    made = []
    for label, lines, logarithmic in drawn:
        kept = {name: [point for point in points if _drawable(point[1], logarithmic)] for name, points in lines.items()}
        if kept := {name: points for name, points in kept.items() if points}:
            made.append(Markup(charts.over_steps(label, kept, logarithmic=logarithmic, from_zero=not logarithmic)))
    return made


def _advice(runs: Sequence[Told]) -> list[str]:
    told = [(run.name, sentence) for run in runs if run.private is not None for sentence in run.private["advice"]]
    return [sentence if len(runs) == 1 else f"{name}: {sentence}" for name, sentence in told]


def _drawable(value: float | None, logarithmic: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not logarithmic)
