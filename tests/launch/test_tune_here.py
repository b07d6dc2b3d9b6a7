"""A search on this machine, killed twice, to its one released model."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from jobs import STEPS, Jobs, children, lines, wait_for
from searches import begin, begun, keep_secret, question, tune

from dpdist.errors import InputError
from dpdist.joint.selection import Law
from dpdist.mechanism.accounting import ORDERS
from dpdist.run.summary import OF_TRIAL
from dpdist_launch.tune import here
from dpdist_launch.tune.best import release
from dpdist_launch.tune.here import run_here
from dpdist_launch.tune.search import ATTEMPTS, open_directory


def by_dp_accounting(search: dict[str, Any], delta: float) -> float:
    """Epsilon of the whole, of what a statement says it was computed from."""
    trial, shape = search["trial"], float("inf") if search["shape"] is None else search["shape"]
    step = PoissonSampledDpEvent(trial["sampling_probability"], GaussianDpEvent(trial["noise_multiplier"]))
    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_SPECIAL)
    repeated = SelfComposedDpEvent(step, trial["steps"])
    accountant.compose(RepeatAndSelectDpEvent(repeated, search["expected_trials"], shape))
    return float(accountant.get_epsilon(delta))


def test_a_search_that_is_killed_twice_releases_one_model_and_what_the_whole_costs(jobs: Jobs) -> None:
    root, pace = jobs.new("tune").root, jobs.root / "tune.pace"
    keep_secret(open_directory(root), law=Law(2.0, 1.0), number=2)
    for trial in (0, 1):
        pace.write_text("0.15")
        search = tune(jobs, root, PACE=str(pace))
        wait_for(lambda trial=trial: len(begun(root)) > trial)
        killed = begun(root)[trial]
        wait_for(lambda killed=killed: any(record["step"] >= 5 for record in killed.diagnostics), every=0.05)
        (process,) = children(search.pid)
        os.kill(search.pid, signal.SIGKILL)
        search.wait()
        wait_for(lambda process=process: not Path(f"/proc/{process}/stat").exists() or is_zombie(process))
        assert not (killed.root / "summary.json").exists()
        pace.unlink()
    ended = tune(jobs, root).wait()
    assert ended.code == 0, ended.err

    noted = lines(root / "private/trials.jsonl")
    assert [record["record"] for record in noted] == ["number", "begun", "ledger", "begun", "ledger"]
    for run in begun(root):
        assert run.charged == list(range(STEPS)), "a trial was run anew, or a step was charged twice"
        assert len(run.plans) == 1
        assert run.digests.keys() == set(range(STEPS))

    summary = json.loads(ended.out)
    assert summary == json.loads((root / "summary.json").read_text())
    (page,) = re.findall(r"^\{\"status\".*", (Path(__file__).parents[2] / "docs/tuning.md").read_text(), re.M)
    told = json.loads(page)
    assert (told.keys(), told["best"].keys()) == (summary.keys(), summary["best"].keys())
    scores = [run.summary["accuracy"] for run in begun(root)]
    assert summary["best"]["metrics"]["accuracy"] == max(scores)
    best = begun(root)[scores.index(max(scores))].summary
    assert summary["best"]["params_sha256"] == best["params_sha256"]
    told = json.loads((root / "best/privacy.json").read_text())
    assert (told["epsilon"], told["accountant"]) == (summary["epsilon"], "renyi selection")
    theirs = by_dp_accounting(told["search"], told["delta"])
    assert theirs <= summary["epsilon"] <= min(2.0, theirs * (1 + 1e-6))
    assert told["guarantee"] == summary["guarantee"] == "holds"
    assert best["guarantee"] == OF_TRIAL
    assert "trial" not in (root / "best/config.yaml").read_text()
    assert best["epsilon"] < 1.3, "one trial costs less than the search"
    assert f"{told['epsilon']:.6g} for the whole search" in (root / "best/PRIVACY.md").read_text()
    released = "".join(path.read_text(errors="replace") for path in root.iterdir() if path.is_file()) + "".join(
        path.read_text(errors="replace") for path in (root / "best").iterdir()
    )
    for run in begun(root):
        assert run.root.name not in ended.out + ended.err + released
    assert not [score for score in scores if score < max(scores) and str(score) in released + ended.err]

    again = tune(jobs, root).wait()
    assert (again.code, json.loads(again.out)) == (0, summary), "what has ended is left alone"


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_search_that_is_asked_to_stop_saves_and_says_so(jobs: Jobs) -> None:
    root, pace = jobs.new("tune").root, jobs.root / "stop.pace"
    keep_secret(open_directory(root), law=Law(2.0, 1.0), number=1)
    pace.write_text("0.15")
    search = tune(jobs, root, PACE=str(pace))
    wait_for(lambda: begun(root) and any(record["step"] >= 2 for record in begun(root)[0].diagnostics), every=0.05)
    os.kill(search.pid, signal.SIGTERM)
    ended = search.wait()
    assert ended.code == 75, ended.err
    assert "the same command goes on" in ended.err
    assert begun(root)[0].summary["status"] == "preempted"
    assert lines(root / "private/trials.jsonl")[-1]["record"] == "ledger", "a stop is no failure"


def test_trials_that_fail_are_tried_again_and_those_that_are_refused_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trials_end_with(code: int) -> None:
        monkeypatch.setattr(here, "DPDIST", (sys.executable, "-c", f"print('why'); raise SystemExit({code})"))

    keep_secret(open_directory(tmp_path / "s"), law=question().law, number=2)
    search = begin(tmp_path / "s")
    trials_end_with(2)
    with pytest.raises(InputError, match="a trial was refused"):
        run_here(search, at_once=1, processes=None, searching=lambda: None)
    assert len(search.left()) == 2, "what was refused is no result"
    trials_end_with(1)
    assert run_here(search, at_once=2, processes=None, searching=lambda: None)
    assert search.left() == []
    assert [record["record"] for record in lines(search.private / "trials.jsonl")].count("failed") == 2 * ATTEMPTS
    outputs = [file.read_text() for file in (search.private / "output").iterdir()]
    assert sorted(outputs) == ["why\n" * ATTEMPTS, "why\n" * (ATTEMPTS + 1)]
    assert release(search)["best"] is None
