"""One process uses no Gloo: no host name is needed, and stdout has only its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from jobs import Ended, Jobs
from processes import run_processes

NAMELESS = "hostname nowhere.invalid && exec"


@pytest.fixture(scope="module")
def nameless(jobs: Jobs) -> Jobs:
    """`jobs`, where a host can be given another name for a child alone."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-u", "true"], capture_output=True).returncode != 0:
        pytest.skip("giving a child another host name takes root and unshare")
    return jobs


def on_a_nameless_host(jobs: Jobs, *argv: str) -> Ended:
    command = ["unshare", "-u", "sh", "-c", f'{NAMELESS} "$0" "$@"', sys.executable, *argv]
    return jobs.program(command).wait()


def test_a_host_without_a_name_of_its_own_trains(nameless: Jobs) -> None:
    """From Python; `dpdist train` does the same in one process."""
    run = nameless.new("nameless")
    overrides = ["training.steps=2", f"run.dir={run.root}"]
    program = f"import dpdist; dpdist.train(dpdist.load_config({str(nameless.config)!r}, {overrides!r}))"
    ended = on_a_nameless_host(nameless, "-c", program)
    assert ended.code == 0, ended.err
    assert run.summary["status"] == "finished"
    assert ended.out == ""


def test_it_plans_and_prints_one_json_object(nameless: Jobs) -> None:
    ended = on_a_nameless_host(nameless, "-m", "launch", "plan", str(nameless.config), "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["steps"] == 16
    assert ended.out.count("\n") == 1


@pytest.mark.parametrize(("processes", "devices", "implementation"), [(1, 2, None), (1, 4, None), (2, 1, "gloo")])
def test_gloo_is_used_by_several_processes_alone(processes: int, devices: int, implementation: str | None) -> None:
    program = (
        f"import jax; join(cluster(devices_per_process={devices}));"
        "report(used=jax.config.jax_cpu_collectives_implementation); leave()"
    )
    assert [facts["used"] for facts in run_processes(program, processes)] == [implementation] * processes
