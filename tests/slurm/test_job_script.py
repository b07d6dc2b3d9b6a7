"""How slurm/job.sh ends a job, without SLURM: a run directory, a log, and the exit code of `srun`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import wait_for

from dpdist.errors import InputError
from dpdist_launch.slurm.script import submission_environment

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
        "job_repository=" + str(JOB.parents[1]),
        f". {JOB}",
        f"dpdist_container=({shlex.join(container)})",
        f"begin_job {run_dir}",
        *lines,
        f"end_job {code}",
    ]
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(JOB.parents[1])}
    with log.open("a") as stderr:
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)], cwd=root, env=environ, stderr=stderr, timeout=60, check=False
        )
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


def test_it_says_why_it_ends_before_slurm_kills_the_shell_too(tmp_path: Path) -> None:
    """Ranks that cannot leave are killed after KillWait, and the shell with them: then it would be too late."""
    said = "*** JOB 7 ON n1 CANCELLED AT 2026-11-27T19:26:03 DUE TO TIME LIMIT ***"
    programs = {
        "srun": f"trap '' TERM; echo 'slurmstepd-n1: error: {said}' >&2; touch started; sleep 60 & wait",
        "scontrol": "case $* in *config) echo KillWait = 3 sec;; *) echo JobState=COMPLETING;; esac",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = (
        f"job_repository={JOB.parents[1]}; . {JOB}; dpdist_container=(); begin_job run; supervise train; end_job $?"
    )
    environ = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    log = tmp_path / "job.log"
    with log.open("a") as stderr:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env=environ, stderr=stderr, start_new_session=True
        )
    try:
        wait_for((tmp_path / "started").exists, 30, every=0.1)
        shell.send_signal(signal.SIGTERM)
        wait_for(lambda: "ranks of it are still running" in log.read_text(), 30, every=0.1)
        assert shell.poll() is None
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    assert "dpdist job: ended by SLURM at the time limit; submit it again" in log.read_text().splitlines()[-1]


def read_site(root: Path, text: str, then: str = "") -> tuple[int, str]:
    """Exit code and last line of a batch script, strict as ours are, that reads a site file and goes on."""
    site = root / "site.sh"
    site.write_text(text)
    script = f"set -euo pipefail\n. {JOB}\nread_site {root}\n{then}\nfalse\necho STRICT NO MORE"
    environ = {"PATH": os.environ["PATH"], "DPDIST_SITE": str(site), "DPDIST": "/bin/true"}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert "STRICT NO MORE" not in done.stdout, "the options of the batch script are not what they were"
    return done.returncode, (done.stderr + done.stdout).splitlines()[-1]


@pytest.mark.parametrize(
    "text",
    [
        "export LD_LIBRARY_PATH=/opt/lib:$LD_LIBRARY_PATH\n",
        '[ -z "$PS1" ] || echo interactive\ntrue\n',
        "module_of_nobody load cuda\nexport A=1\n",
        "grep -q nothing /dev/null\nfalse | true\n: $(false)\nexport A=1\n",
        "set -e\nexport A=1\n",
    ],
    ids=["unset variable", "PS1", "module", "grep -q", "set -e"],
)
def test_a_site_file_is_read_as_a_login_shell_reads_it(tmp_path: Path, text: str) -> None:
    assert read_site(tmp_path, text + "SITE=read\n", 'echo "$SITE"')[1] == "read"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A=1\nif true; then\n", "line 3: syntax error: unexpected end of file"),
        ("A=1\nreturn 3\n", "line 2: return 3: status 3"),
        ("A=1\n\ngrep -q nothing /dev/null\n", "line 3: grep -q nothing /dev/null: status 1"),
        ("A=1\nexit 0\n", "line 2: exit 0: ended the shell"),
    ],
    ids=["syntax", "return", "last command", "exit"],
)
def test_a_site_file_that_fails_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    code, line = read_site(tmp_path, text)
    assert (code, said in line) == (2, True), line
    assert str(tmp_path / "site.sh") in line


def test_submission_reads_a_site_file_in_the_same_way(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("export SBATCH_ACCOUNT=ours:$UNSET\nmodule_of_nobody load\nDPDIST_EXTRAS=x\n")
    environ = submission_environment(site)
    assert (environ["SBATCH_ACCOUNT"], environ["DPDIST_EXTRAS"]) == ("ours:", "x")
    site.write_text("A=1\nreturn 3\n")
    with pytest.raises(InputError, match="line 2: return 3: status 3"):
        submission_environment(site)
