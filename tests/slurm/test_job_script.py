"""How slurm/job.sh ends a job, without SLURM: a run directory, a log, and the exit code of `srun`."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "slurm" / "job.sh"
FINISHED, SPENT = {"status": "finished", "step": 9}, {"status": "budget_exhausted", "step": 9}
NOTHING_TO_DO = "0: dpdist: runs/a is finished at step 9 of 9: nothing to do"


def write(path: Path, summary: dict[str, object]) -> str:
    """The shell command that replaces the summary as training does: as another file."""
    text = shlex.quote(json.dumps(summary, indent=2))
    return f"echo {text} > {path}.new && touch -d '1 hour ago' {path}.new && mv {path}.new {path}"


def end(
    root: Path, *lines: str, code: int = 0, run_dir: str = "run", container: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Exit code and last line of a job of which `lines` are what happens between its begin and its end."""
    (root / "run").mkdir(exist_ok=True)
    log = root / "job.log"
    script = [
        "set -euo pipefail",
        f". {JOB}",
        f"dpdist_container=({shlex.join(container)})",
        f"begin_job {run_dir}",
        *lines,
        f"end_job {code}",
    ]
    with log.open("a") as stderr:
        done = subprocess.run(["bash", "-c", "\n".join(script)], cwd=root, stderr=stderr, timeout=30, check=False)
    return done.returncode, log.read_text().splitlines()[-1]


@pytest.mark.parametrize("summary", [FINISHED, SPENT])
def test_a_run_that_this_start_has_ended(tmp_path: Path, summary: dict[str, object]) -> None:
    assert end(tmp_path, write(Path("run/summary.json"), summary)) == (0, "dpdist job: done")


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("echo nothing to do >&2",),
        (write(Path("run/summary.json"), {"status": "preempted"}),),
        (write(Path("run/summary.json"), {"status": "failed"}),),
    ],
    ids=["no summary", "only words", "preempted", "failed"],
)
def test_code_0_without_an_ended_run_is_a_failure(tmp_path: Path, lines: tuple[str, ...]) -> None:
    code, said = end(tmp_path, *lines)
    assert code == 1
    assert said.startswith("dpdist job: failed: all processes returned 0, but run/summary.json does not say")


def test_a_summary_from_before_counts_only_where_a_rank_of_this_start_says_so(tmp_path: Path) -> None:
    subprocess.run(["bash", "-c", f"mkdir run; {write(Path('run/summary.json'), FINISHED)}"], cwd=tmp_path, check=True)
    assert end(tmp_path)[0] == 1
    assert end(tmp_path, f"echo {NOTHING_TO_DO!r} >&2") == (0, "dpdist job: done")
    assert end(tmp_path)[0] == 1  # the words in the log are those of another start
    assert end(tmp_path, write(Path("run/summary.json"), FINISHED)) == (0, "dpdist job: done")


def test_a_job_without_a_run_directory_is_judged_by_its_code(tmp_path: Path) -> None:
    assert end(tmp_path, run_dir="") == (0, "dpdist job: done")
    assert end(tmp_path, run_dir="", code=3)[0] == 3


def test_the_summary_is_looked_for_where_the_tasks_write_it(tmp_path: Path) -> None:
    """A container may have other paths; here it is another working directory."""
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/bash\ncd "$1" && shift && exec "$@"\n')
    engine.chmod(0o755)
    inside = tmp_path / "inside"
    (inside / "run").mkdir(parents=True)
    container = (str(engine), str(inside))
    assert end(tmp_path, write(inside / "run" / "summary.json", FINISHED), container=container)[0] == 0
    assert end(tmp_path, write(Path("run/summary.json"), SPENT), container=container)[0] == 1
