"""Plots draw what was published, under its name, without the kinks of a coarse curve."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import matplotlib.figure
import pytest

from dpdist.run.calibration import EpsilonCurve
from dpdist.run.plots import plot_run

STEPS, DELTA = 60, 1e-4


@pytest.fixture(scope="module")
def spent() -> list[float]:
    """Epsilon after each step, as a run records it."""
    curve = EpsilonCurve(sampling_probability=0.36, noise_multiplier=3.5, steps=STEPS, delta=DELTA, total=3.0)
    return [curve.at(step) for step in range(STEPS + 1)]


def write(root: Path, spent: list[float], *, upto: int = STEPS, plans: int = 1) -> Path:
    plan = {"record": "plan", "steps": STEPS, "accountant": "pld", "target_epsilon": 3.25, "epsilon": 3.0}
    (root / "ledger.jsonl").write_text("".join(json.dumps(plan) + "\n" for _ in range(plans)))
    records: list[dict[str, float]] = []
    for step in range(5, upto + 1, 5):
        records.append({"step": step, "epsilon": spent[step], "examples_per_second": 1e4 + step, "seconds": 1.0})
        if step % 20 == 0:
            records.append(
                {"step": step, "perplexity": 90.0 / step, "my/own": math.nan, "loss": 1.0, "epsilon": spent[step]}
            )
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def drawn(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, matplotlib.figure.Figure]:
    """The figures by file name."""
    figures: dict[str, matplotlib.figure.Figure] = {}
    save = matplotlib.figure.Figure.savefig

    def keep(self: matplotlib.figure.Figure, path: Path) -> None:
        figures[path.name] = self
        save(self, path)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    made = plot_run(root)
    assert {path.name for path in made} == figures.keys()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    return figures


def test_every_metric_has_a_title_with_the_run_and_a_unit(
    tmp_path: Path, spent: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "myrun"
    root.mkdir()
    figures = drawn(write(root, spent), monkeypatch)
    # What was never a finite number is not drawn.
    assert figures.keys() == {"perplexity.png", "loss.png", "epsilon.png", "throughput.png"}
    (axes,) = figures["perplexity.png"].axes
    assert (axes.get_title(), axes.get_xlabel()) == ("myrun: test perplexity", "step")
    assert axes.get_ylabel() == "test perplexity (per token)"
    assert axes.lines[0].get_xydata().tolist() == [[20, 4.5], [40, 2.25], [60, 1.5]]


def test_epsilon_is_drawn_without_kinks_and_with_its_target(
    tmp_path: Path, spent: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (axes,) = drawn(write(tmp_path, spent), monkeypatch)["epsilon.png"].axes
    curve, target = axes.lines
    assert set(target.get_ydata()) == {3.25}
    assert "target 3.25" in [text.get_text() for text in axes.texts]
    points = curve.get_xydata().tolist()
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert all(later <= 1.01 * earlier for earlier, later in pairwise(slopes))
    assert all(value == spent[int(step)] for step, value in points)
    assert points[-1] == [STEPS, 3.0]


def test_a_run_that_left_its_plan_or_has_no_ledger_is_drawn_as_recorded(
    tmp_path: Path, spent: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (axes,) = drawn(write(tmp_path, spent, plans=2), monkeypatch)["epsilon.png"].axes
    assert [x for x, _ in axes.lines[0].get_xydata()] == list(range(5, 61, 5))
    (tmp_path / "ledger.jsonl").unlink()
    (axes,) = drawn(tmp_path, monkeypatch)["epsilon.png"].axes
    assert len(axes.lines) == 1
