"""Starting runs as users do, and reading what they leave."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compiled
import yaml

import dpdist.config
from dpdist.cluster.environment import LOCAL_VARIABLES, free_port
from dpdist.mechanism.ledger import file_identity

#: Seconds any process may take: many times what the slowest needs on two idle cores.
LIMIT = 300.0
STEPS, EVERY = 16, 4
#: In the environment of a run: nothing comes from the compilation cache.
COMPILED_ANEW = {"JAX_ENABLE_COMPILATION_CACHE": "false"}

CONFIG: dict[str, dict[str, Any]] = {
    "data": {"source": "userland:arrays", "workers": 2},
    "model": {"name": "userland:small", "classes": 4},
    "optimizer": {"learning_rate": 0.5, "momentum": 0.9, "average_decay": 0.5},
    "privacy": {"noise_multiplier": 4.0, "delta": 1e-4, "insecure_seed": 1},
    "sampling": {"expected_batch_size": 64},
    # The physical batch is given, or it would be chosen for the devices of each job, and decide bits.
    "training": {"steps": STEPS, "physical_batch_size": 8, "evaluation_batch_size": 16, "record_digests": True},
    "checkpoint": {"every_steps": EVERY, "keep": 100},
    "cluster": {
        "platform": "cpu",
        "devices_per_process": 1,
        "initialization_timeout": 200,
        "shutdown_timeout": 100,
        "watchdog_timeout": 200,
    },
    # Drawing takes a fifth of such a run; `single` has plots.
    "run": {"log_every": 2, "plots": False},
}


def config_with(run: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`CONFIG` for `dpdist.from_dict`, with sections updated, to be run in the directory `run`."""
    config = {section: dict(values) for section, values in CONFIG.items()}
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    config["run"]["dir"] = str(run)
    return config


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects, which may still be written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass(frozen=True)
class Run:
    """A run directory, and what can be read from it."""

    root: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.root / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return lines(self.root / "metrics.jsonl")

    @property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy by step, as far as it was shown."""
        return {record["step"]: record["accuracy"] for record in self.metrics if "accuracy" in record}

    @property
    def diagnostics(self) -> list[dict[str, Any]]:
        return lines(self.root / "private/diagnostics.jsonl")

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return lines(self.root / "ledger.jsonl")

    @property
    def plan(self) -> dict[str, Any]:
        """What the ledger says the mechanism is, for the whole run: there is one incarnation."""
        (plan,) = self.plans
        return plan

    @property
    def plans(self) -> list[dict[str, Any]]:
        """The plan of every incarnation, without which file it is in."""
        return [
            {name: value for name, value in record.items() if name not in ("file", "born")}
            for record in self.ledger
            if record["record"] == "plan"
        ]

    @property
    def charged(self) -> list[int]:
        """Every step the ledger charges, as often as it does."""
        return [step for _, step in self.charged_by_incarnation]

    @property
    def charged_by_incarnation(self) -> list[tuple[int, int]]:
        """Every (incarnation, step) the ledger charges, as often as it does."""
        blocks = [record for record in self.ledger if record["record"] == "steps"]
        return [(block["incarnation"], step) for block in blocks for step in range(block["start"], block["stop"])]

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the committed checkpoints."""
        return sorted(int(path.name) for path in (self.root / "checkpoints").iterdir() if path.name.isdecimal())

    @property
    def digests(self) -> dict[int, tuple[str, str]]:
        """Sample and noise digest of every step; a step that was replayed must have drawn the same again."""
        return {step: found for (_, step), found in self.digests_by_incarnation.items()}

    @property
    def digests_by_incarnation(self) -> dict[tuple[int, int], tuple[str, str]]:
        """The same by (incarnation, step)."""
        digests: dict[tuple[int, int], tuple[str, str]] = {}
        for record in self.diagnostics:
            found, key = (record["sample_sha256"], record["noise_sha256"]), (record["incarnation"], record["step"])
            assert digests.setdefault(key, found) == found, f"step {key} was replayed differently"
        return digests

    @property
    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted((self.root / "private/logs").iterdir()))

    def content(self, *parts: str) -> dict[str, tuple[int, bytes]]:
        """Time of change and bytes of every file below `parts`."""
        files = [path for part in parts for path in [*sorted((self.root / part).rglob("*")), self.root / part]]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.is_file()}

    def copy(self, to: Path, *, moved: bool = True) -> Run:
        """A copy, which passes for the run itself having been moved there, unless told otherwise."""
        shutil.copytree(self.root, to)
        copied = Run(to)
        if moved and (ledger := to / "ledger.jsonl").exists():
            here = file_identity(ledger)
            copied.write_ledger([record | (here if "file" in record else {}) for record in copied.ledger])
        return copied

    def write_ledger(self, records: list[dict[str, Any]]) -> None:
        """Replace what the ledger says; the file stays the same."""
        (self.root / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def crash(self, newest: int) -> Run:
        """Make of this ended run what a crash would have left: no summary, and a ledger one block ahead."""
        (self.root / "summary.json").unlink()
        for step in self.checkpoints:
            if step > newest:
                shutil.rmtree(self.root / "checkpoints" / str(step))
        for name in ("ledger.jsonl", "private/diagnostics.jsonl", "metrics.jsonl"):
            kept = [r for r in lines(self.root / name) if max(r.get("start", 0), r.get("step", 0)) <= newest]
            (self.root / name).write_text("".join(json.dumps(record) + "\n" for record in kept))
        return self


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Running:
    """A process that was started; `wait` for it, always."""

    pid: int
    stdout: Path
    stderr: Path
    exit_code: Callable[[float], int | None]

    def wait(self, seconds: float = LIMIT) -> Ended:
        """Its end; where that does not come in time, the process is killed and the test fails."""
        code = self.exit_code(seconds)
        assert code is not None, f"still running after {seconds} s:\n{self.stderr.read_text()}"
        return Ended(code, self.stdout.read_text(), self.stderr.read_text())

    def wait_for_step(self, run: Run, step: int) -> None:
        """Until this process has recorded `step` of the run or a later one."""
        before = len(run.diagnostics)

        def reached() -> bool:
            assert "finished at step" not in self.stderr.read_text(), f"ended before step {step} was seen; give PACE"
            return any(record["step"] >= step for record in run.diagnostics[before:])

        wait_for(reached)

    def ranks(self) -> dict[int, int]:
        """Process ids, by rank, of the ranks that this launcher has started and that still run."""
        found = {}
        for pid in children(self.pid):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((item.split(b"=")[1] for item in variables if item.startswith(b"DPDIST_PROCESS_ID=")), None)
                if rank is not None:
                    found[int(rank)] = pid
        return found


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def wait_all(started: Iterable[Running]) -> None:
    """Until all have ended well."""
    for ended in [running.wait() for running in started]:
        assert ended.code == 0, ended.err


def wait_for(condition: Callable[[], Any], seconds: float = LIMIT, *, every: float = 0.005) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not come about in {seconds} s"
        time.sleep(every)
    return value


class Jobs:
    """Starts runs from one working directory, which holds `base.yaml` and the user's module.

    Several processes run under the real launcher. A fresh process spends seconds on importing JAX, so what needs
    only one runs in a fork of `warm.py`: `dpdist_launch.cli.main` with real arguments, output and exit code.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "base.yaml"
        self.config.write_text(yaml.safe_dump(CONFIG))
        for name in ("userland.py", "warm.py", "forks.py"):
            shutil.copy(Path(__file__).with_name(name), root)
        self._numbers = itertools.count()
        self._warm: subprocess.Popen[str] | None = None
        ours = ("JAX_", "XLA_", "DPDIST_", "SLURM_", "CUDA_", "PACE", "NPROC", "OMP_")
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        # Most of what a run costs here is compiling; every run of these jobs is one of few programs. The cache is of
        # these jobs alone, so that each program is compiled at least once whenever the tests run.
        self.environ |= {name.upper(): str(value) for name, value in compiled.settings(root / "cache").items()}
        self.environ["WARM_IMPORTS"] = "dpdist.mechanism.accounting dpdist.run.plots"
        source = str(Path(dpdist.__file__).parents[1])
        self.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))

    def new(self, name: str = "run") -> Run:
        """A run directory that does not exist yet."""
        return Run(self.root / f"{next(self._numbers):03}-{name}")

    def launch(self, run: Run, processes: int, devices: int, *overrides: str, **environ: str) -> Running:
        """`dpdist train --processes`, with so many devices each."""
        argv = self._train(run, f"cluster.devices_per_process={devices}", *overrides)
        return self.program([sys.executable, "-m", "launch", *argv, "--processes", str(processes)], **environ)

    def program(self, command: list[str], **environ: str) -> Running:
        """A program of its own, whose children die with it."""
        out, err = self._outputs()
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environ | environ,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )

        def exit_code(seconds: float) -> int | None:
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return None

        return Running(process.pid, out, err, exit_code)

    def train(self, run: Run, *overrides: str, **environ: str) -> Running:
        """`dpdist train` as a single process."""
        return self.command(*self._train(run, *overrides), **environ)

    def ranks(self, run: Run, processes: int, devices: int, *overrides: str, **environ: str) -> list[Running]:
        """The ranks of one job, as forks; nothing ends the others where one fails."""
        each = f"cluster.devices_per_process={devices}"
        return [self.train(run, each, *overrides, **environ, **identity) for identity in self.identities(processes)]

    def identities(self, processes: int) -> list[dict[str, str]]:
        """What the launcher tells each rank of a job about itself."""
        coordinator = f"127.0.0.1:{free_port()}"
        known = [(str(rank), str(processes), coordinator) for rank in range(processes)]
        return [dict(zip(LOCAL_VARIABLES, values, strict=True)) for values in known]

    def command(self, *argv: str, cwd: Path | None = None, **environ: str) -> Running:
        """Any `dpdist` command, in `cwd` or else in `root`."""
        return self._start({"argv": argv, "environ": environ, "cwd": str(cwd or self.root)})

    def call(self, function: str, **keywords: Any) -> Any:
        """What a function of `warm.py` returns."""
        result = self.root / f"{next(self._numbers):03}.json"
        ended = self._start({"call": function, "keywords": keywords, "environ": {}, "result": str(result)}).wait()
        assert ended.code == 0, ended.err
        return json.loads(result.read_text())

    def close(self) -> None:
        """End the warm process and what it has forked."""
        if self._warm is not None:
            assert self._warm.stdin is not None
            self._warm.stdin.close()
            self._warm.wait(30)

    def _train(self, run: Run, *overrides: str) -> list[str]:
        return ["train", str(self.config), *overrides, "--run-dir", str(run.root)]

    def _start(self, command: dict[str, Any]) -> Running:
        out, err = self._outputs()
        pid = self._ask({"do": "start", "stdout": str(out), "stderr": str(err)} | command)
        return Running(pid, out, err, lambda seconds: self._ask({"do": "wait", "pid": pid, "seconds": seconds}))

    def _outputs(self) -> tuple[Path, Path]:
        number = next(self._numbers)
        out, err = self.root / f"{number:03}.out", self.root / f"{number:03}.err"
        out.touch()
        err.touch()
        return out, err

    def _ask(self, command: dict[str, Any]) -> Any:
        if self._warm is None:
            self._warm = subprocess.Popen(
                [sys.executable, "warm.py"],
                cwd=self.root,
                env=self.environ,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        self._warm.stdin.write(json.dumps(command) + "\n")
        self._warm.stdin.flush()
        return json.loads(self._warm.stdout.readline())
