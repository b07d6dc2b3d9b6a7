"""What `dpdist diagnose` makes of the private files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpdist import config
from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.run.diagnose import NOT_COVERED, advice, as_text, diagnose


def private(**changes: Any) -> config.Config:
    privacy = {"noise_multiplier": 1.0, "delta": 1e-5, "clip_norm": 1.0} | changes
    return config.from_dict({"privacy": privacy, "training": {"steps": 8}})


def look(step: int, median: float | None, lost: int = 0, **more: int) -> dict[str, Any]:
    norms = None if median is None else {"p10": median / 2, "p50": median, "p90": median * 2, "max": median * 3}
    return {"step": step, "examples": 16, "not_finite": lost, "loss": 0.5, "norms": norms, "incarnation": 0} | more


def steps(clipped: float, count: int = 8) -> list[dict[str, Any]]:
    return [{"step": n + 1, "examples": 50.0, "clipped": clipped, "not_finite": 0.0} for n in range(count)]


@pytest.mark.parametrize(
    ("clipped", "words"),
    [(0.99, "cut to one length"), (0.1, "the noise is scaled for longer gradients"), (0.5, None)],
)
def test_a_clip_norm_is_suggested_where_it_is_far_off_and_never_without_what_that_costs(
    clipped: float, words: str | None
) -> None:
    said = advice(private(), [look(0, 9.0), look(4, 0.32), look(8, 0.2)], steps(clipped))
    if words is None:
        assert said == []
        return
    assert words in said[0]
    assert "near the median (0.3)" in said[0]
    assert said[0].endswith("Choosing it by these numbers is not covered by the guarantee.")


def test_the_newest_steps_count() -> None:
    early = [step | {"clipped": 1.0} for step in steps(1.0, 30)]
    assert advice(private(), [look(0, 1.0)], early + steps(0.5, 10)) == []


def test_lost_gradients_and_records_are_told_and_the_plain_arm_gets_no_clip_norm() -> None:
    said = advice(private(), [look(0, 1.0, lost=3), look(4, None, lost=16)], steps(0.5))
    assert said == ["19 of 32 gradients that were tried are not finite."]
    assert "7 training records are left out" in advice(private(), [look(0, 1.0, records_left_out=7)], steps(0.5))[0]
    assert advice(private(enabled=False), [look(0, 1.0)], steps(0.0)) == []


def made_up(root: Path) -> Path:
    (root / "private").mkdir(parents=True)
    (root / "config.yaml").write_text(configfile.dump(private()))
    records = [
        {"step": n, "incarnation": 0, "examples": 10.0, "clipped": 9.0, "not_finite": 1.0, "norm_sum": 4.0}
        for n in (0, 1, 1, 2)
    ]
    lines = [json.dumps(record) for record in records]
    (root / "private/diagnostics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "exam')
    looks = [look(0, 2.0), look(2, None, lost=16)]
    (root / "private/probe.jsonl").write_text("".join(json.dumps(each) + "\n" for each in looks))
    return root


def test_a_step_that_was_taken_again_counts_once_and_a_torn_line_not_at_all(tmp_path: Path) -> None:
    found = diagnose(made_up(tmp_path / "run"))
    assert [(each["step"], each["clipped"], each["not_finite"]) for each in found["steps"]] == [
        (1, 0.9, 0.1),
        (2, 0.9, 0.1),
        (3, 0.9, 0.1),
    ]
    assert found["clip_norm"] == 1.0
    pictures = [Path(path) for path in found["plots"]]
    assert [path.name for path in pictures] == ["loss.png", "norms.png", "clipped.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and "private" in path.parts for path in pictures)
    text = as_text(found)
    assert text.startswith(NOT_COVERED)
    assert "16 of 16" in text
    assert json.loads(json.dumps(found)) == found


def test_steps_that_a_newer_incarnation_went_back_behind_are_left_out(tmp_path: Path) -> None:
    root = made_up(tmp_path / "run")
    with (root / "private/diagnostics.jsonl").open("a") as file:
        again = {"step": 1, "incarnation": 1, "examples": 10.0, "clipped": 0.0, "not_finite": 0.0}
        file.write("\n" + json.dumps(again) + "\n")
    assert [(each["step"], each["clipped"]) for each in diagnose(root)["steps"]] == [(1, 0.9), (2, 0.0)]


def test_what_is_no_run_or_has_not_begun_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        diagnose(tmp_path)
    root = made_up(tmp_path / "run")
    (root / "private/diagnostics.jsonl").unlink()
    with pytest.raises(InputError, match="has taken no step yet"):
        diagnose(root)
    (root / "privacy.json").write_text("{}")
    with pytest.raises(InputError, match="is an export, which holds nothing private"):
        diagnose(root)
