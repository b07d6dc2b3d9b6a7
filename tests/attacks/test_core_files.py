"""A crash of a process that knows the secret leaves no core file, whatever the shell allows."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from jobs import EVERY, Jobs, config_with

OWN_SECRET = "privacy.insecure_seed=null"


def limit(pid: int) -> tuple[str, str]:
    """Soft and hard limit of a process on the size of its core file, in bytes."""
    found = re.search(r"^Max core file size +(\S+) +(\S+)", Path(f"/proc/{pid}/limits").read_text(), re.M)
    assert found is not None
    return found[1], found[2]


def test_no_process_of_a_job_leaves_a_core_file(jobs: Jobs) -> None:
    run = jobs.new("crashing")
    argv = [sys.executable, "-m", "launch", "train", str(jobs.config), OWN_SECRET, "--run-dir", str(run.root)]
    allowed = ["bash", "-c", 'ulimit -c unlimited && exec "$@"', "bash", *argv, "--processes", "2"]
    running = jobs.program(allowed, PACE="0.3")
    running.wait_for_step(run, EVERY)
    processes = {"launcher": running.pid, **running.ranks()}
    assert len(processes) == 3
    limits = {name: limit(pid) for name, pid in processes.items()}
    for rank in running.ranks().values():
        os.kill(rank, signal.SIGABRT)
    assert running.wait().code == 128 + signal.SIGABRT
    # Files of that name are where the test can see them only if the kernel writes them to the working directory.
    assert list(jobs.root.rglob("core*")) == []
    # One byte is too little for a file, and the value at which nothing is piped to a handler either.
    assert limits == dict.fromkeys(processes, ("1", "1"))


def test_nor_does_a_python_that_trains_by_a_call(jobs: Jobs) -> None:
    run = jobs.new("notebook")
    told = jobs.call("limit_of_core_files", config=config_with(run.root, training={"steps": 1}))
    assert told == {"before": [-1, -1], "after": [1, 1]}


def test_a_shell_that_allows_none_is_left_as_it_is(jobs: Jobs) -> None:
    """What is not root cannot raise the hard limit from 0."""
    code = "import resource; from dpdist.cluster.core_files import forbid_core_files; forbid_core_files(); "
    code += "print(resource.getrlimit(resource.RLIMIT_CORE))"
    ended = jobs.program(["bash", "-c", f'ulimit -c 0 && exec {sys.executable} -c "{code}"']).wait()
    assert ended.out == "(0, 0)\n", ended.err
