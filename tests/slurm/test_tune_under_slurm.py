"""A search as real jobs on two nodes: its launcher is killed twice, and the jobs go on meanwhile."""

from __future__ import annotations

import json
import os
import signal

from jobs import Jobs, lines, wait_for
from searches import begun, keep_secret, tune

from dpdist.joint.selection import Law
from dpdist_launch.slurm.job import attach
from dpdist_launch.tune.search import open_directory

STEPS = 6


def test_a_search_whose_launcher_is_killed_twice_takes_up_its_jobs_and_releases_one_model(cluster: Jobs) -> None:
    root, pace = cluster.new("tune").root, cluster.root / "tune.pace"
    keep_secret(open_directory(root), law=Law(2.0, 1.0), number=2)
    pace.write_text("0.3")
    environ = {"SLURM_CONF": os.environ["SLURM_CONF"], "PACE": str(pace), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    options = ("--nodes", "2", "--cpus-per-task", "1", f"training.steps={STEPS}")

    def killed_once(trials: int) -> list[str]:
        """The jobs of the trials that have begun once there are so many, of which the launcher was killed."""
        launcher = tune(cluster, root, *options, "--at-most", str(trials), **environ)
        wait_for(lambda: len([run for run in begun(root) if attach(run.root) is not None]) == trials, every=0.1)
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        return [job.id for run in begun(root) if (job := attach(run.root)) is not None]

    first = killed_once(1)
    both = killed_once(2)
    assert both[0] == first[0], "a job that goes on was submitted again"
    pace.unlink()
    ended = tune(cluster, root, *options, **environ).wait()
    assert ended.code == 0, ended.err
    assert [job.id for run in begun(root) if (job := attach(run.root)) is not None] == both
    kinds = [record["record"] for record in lines(root / "private/trials.jsonl")]
    assert sorted(kinds) == ["begun", "begun", "ledger", "ledger", "number"]
    summaries = [run.summary for run in begun(root)]
    for run in begun(root):
        assert (run.summary["status"], run.summary["processes"]) == ("finished", 2)
        assert run.charged == list(range(STEPS))
    summary = json.loads(ended.out)
    assert summary["best"]["metrics"]["accuracy"] == max(each["accuracy"] for each in summaries)
    assert max(each["epsilon"] for each in summaries) < summary["epsilon"] <= 2.0
    assert json.loads((root / "best/privacy.json").read_text())["epsilon"] == summary["epsilon"]
