"""Processes that hold a lease, told what to do line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Seconds of silence that mean death in these tests.
TIMEOUT = 1.2

#: What a job's process 0 does, one command a line on its standard input, one answer each. As `remote` it calls itself
#: a process of another boot, so that no one can look it up.
OWNER = """
import json, os, sys
from dpdist.cluster import holder
from dpdist.cluster.lease import Lease, LeaseLostError
from dpdist.errors import InputError
directory, timeout, where = sys.argv[1:]
if where == "remote":
    holder._boot = lambda: f"a boot of its own: {os.getpid()}"
lease = None
for command in sys.stdin:
    try:
        if command == "acquire\\n":
            lease = Lease.acquire(directory, float(timeout))
            answer = {"generation": lease.generation, "taken_from": lease.taken_from}
        else:
            answer = {"done": getattr(lease, command.strip())()}
    except (InputError, LeaseLostError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Owner:
    """A process that holds a lease, or tries to."""

    def __init__(self, directory: Path, where: str, timeout: float, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(directory), str(timeout), where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.pid = self.process.pid

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, command: str) -> dict[str, Any]:
        self.say(command)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


class Owners:
    """Starts owners on one directory, and ends what is left of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._running: list[Owner] = []

    def start(self, where: str = "here", timeout: float = TIMEOUT, **environment: str) -> Owner:
        self._running.append(Owner(self.directory, where, timeout, environment))
        return self._running[-1]

    def holding(self, where: str = "here", timeout: float = TIMEOUT, **environment: str) -> Owner:
        owner = self.start(where, timeout, **environment)
        assert "generation" in owner.do("acquire")
        return owner

    def end(self) -> None:
        for owner in self._running:
            owner.process.kill()
            owner.process.communicate()
