"""Run the tests in lanes: `fast` alone, or all lanes side by side, each a pytest of its own.

    python tests/support/run_lanes.py            every lane
    python tests/support/run_lanes.py fast       the pure tests
    python tests/support/run_lanes.py nightly    every lane with a long soak, then every fault at every phase

Exit code 0 only where every lane ended by itself and each test it had collected came to a good end. The last line has
pytest's own form, for the sum of all lanes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import lanes

ROOT = Path(__file__).parents[2]
#: Seconds between two lines of progress. DPDIST_LANE_INTERVAL overrides it.
INTERVAL = 20.0
#: Minutes after which a lane is ended: several times what it takes. DPDIST_LANE_MINUTES overrides it.
LIMIT = 60.0
#: Minutes of random kills in a nightly run, unless DPDIST_SOAK_MINUTES says otherwise.
SOAK = 30.0
SLOWEST = 10


@dataclass
class Counts:
    """How tests ended, in pytest's words."""

    failed: int = 0
    passed: int = 0
    skipped: int = 0
    errors: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(self.numbers, other.numbers, strict=True)))

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.failed, self.passed, self.skipped, self.errors

    @property
    def text(self) -> str:
        words = zip(
            ("failed", "passed", "skipped", "error" if self.errors == 1 else "errors"), self.numbers, strict=True
        )
        return ", ".join(f"{number} {name}" for name, number in words if number) or "no tests ran"


@dataclass
class Lane:
    """A pytest of its own: where it writes, and what came of it."""

    name: str
    directory: Path
    process: subprocess.Popen[bytes]
    began: float
    wall: float = 0.0
    cpu: float = 0.0
    code: int | None = None
    counts: Counts = field(default_factory=Counts)
    #: Seconds with set-up and tear-down, and the test.
    times: list[tuple[float, str]] = field(default_factory=list)
    #: Why the lane does not count as passed; empty where it does.
    wrong: str = ""

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def wait(self) -> None:
        """Until the process has ended, and read what it left."""
        _, status, used = os.wait4(self.process.pid, 0)
        self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
        self.wall, self.cpu = time.monotonic() - self.began, used.ru_utime + used.ru_stime
        self.wrong = self.read()

    def read(self) -> str:
        """The lane's results; why they are not a pass, or an empty text."""
        collected = progress_of(self.directory).get("collected")
        try:
            cases = list(ElementTree.parse(self.directory / "results.xml").getroot().iter("testcase"))
        except (OSError, ElementTree.ParseError) as error:
            return f"it ended with code {self.code} and left no results ({type(error).__name__})"
        for case in cases:
            self.times.append((float(case.get("time", "0")), f"{case.get('classname')}::{case.get('name')}"))
        kinds = [{child.tag for child in case} & {"failure", "error", "skipped"} for case in cases]
        self.counts = Counts(
            failed=sum("failure" in kind for kind in kinds),
            passed=sum(not kind for kind in kinds),
            skipped=sum("skipped" in kind for kind in kinds),
            errors=sum("error" in kind for kind in kinds),
        )
        if self.code != 0:
            return f"pytest ended with code {self.code}"
        if not cases or len(cases) != collected:
            return f"{len(cases)} of {collected} collected tests have a result"
        return ""


def progress_of(directory: Path) -> dict[str, object]:
    """What the lane's conftest says of its progress: `collected`, `done`, `failed`, `now`."""
    try:
        return json.loads((directory / "progress.json").read_text())
    except (OSError, ValueError):
        return {}


def busy() -> float:
    """Seconds that all cores of the machine have worked since it started; 0 where it does not say."""
    try:
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def start(name: str, expression: str, paths: list[str], directory: Path, environ: dict[str, str]) -> Lane:
    """pytest on the tests of `paths` that the expression of markers selects."""
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "pytest", "-m", expression, f"--basetemp={directory / 'tmp'}"]
    command += [f"--junitxml={directory / 'results.xml'}", "-o", f"cache_dir=.pytest_cache/{name}", *paths]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ | {"DPDIST_TEST_PROGRESS": str(directory / "progress.json")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if name in lanes.YIELDING:
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)  # and all that it starts
    return Lane(name, directory, process, time.monotonic())


def report_progress(running: list[Lane], over: threading.Event, interval: float, limit: float) -> None:
    """A line every `interval` seconds until `over`; ends what runs longer than `limit` seconds."""
    began = time.monotonic()
    while not over.wait(interval):
        parts = []
        for lane in running:
            now = progress_of(lane.directory)
            state = "ended" if lane.code is not None else now.get("now", "collecting")
            failed = f", {now['failed']} failed" if now.get("failed") else ""
            parts.append(f"{lane.name} {now.get('done', 0)}/{now.get('collected', '?')}{failed} ({state})")
        print(f"[{time.monotonic() - began:4.0f} s] {'; '.join(parts)}", flush=True)
        if time.monotonic() - began > limit:
            for lane in running:
                if lane.code is None:
                    print(f"lane {lane.name} is ended after {limit / 60:g} minutes", flush=True)
                    lane.process.send_signal(signal.SIGKILL)


def run(parts: dict[str, tuple[str, list[str]]], environ: dict[str, str]) -> int:
    """All parts side by side: name -> (expression of markers, paths). Returns the exit code."""
    root = Path(tempfile.mkdtemp(prefix="dpdist-tests-"))
    limit = 60 * float(environ.get("DPDIST_LANE_MINUTES", LIMIT))
    interval = float(environ.get("DPDIST_LANE_INTERVAL", INTERVAL))
    began, busy_before, over = time.monotonic(), busy(), threading.Event()
    running = [start(name, *what, root / name, environ) for name, what in parts.items()]

    def forward(number: int, _: FrameType | None) -> None:
        for lane in running:
            if lane.code is None:
                lane.process.send_signal(signal.SIGINT)  # pytest tears its fixtures down, then ends with code 2

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    progress = threading.Thread(target=report_progress, args=(running, over, interval, limit))
    progress.start()
    waiting = [threading.Thread(target=lane.wait) for lane in running]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    over.set()
    progress.join()
    return conclude(running, time.monotonic() - began, busy() - busy_before, root)


def conclude(ended: list[Lane], wall: float, worked: float, root: Path) -> int:
    """Show every lane's output, the budget of time, and the sum; 0 where all passed, 1 otherwise.

    Args:
        worked: seconds of work of all cores meanwhile, whoever had them do it.
    """
    for lane in ended:
        print(f"\n{f' lane {lane.name} ':-^120}\n{lane.log}", flush=True)
    print(f"\n{' time ':-^120}")
    print(f"{'lane':8} {'tests':>6} {'wall':>9} {'CPU':>9}")
    for lane in ended:
        print(f"{lane.name:8} {len(lane.times):6} {lane.wall:7.0f} s {lane.cpu:7.0f} s")
    cores = os.cpu_count() or 1
    print(f"{'machine':8} {'':6} {wall:7.0f} s {worked:7.0f} s of {wall * cores:.0f} s; this holds SLURM's tasks too")
    for lane in ended:
        print(f"slowest of {lane.name}:")
        for seconds, name in sorted(lane.times, reverse=True)[:SLOWEST]:
            print(f"  {seconds:7.1f} s  {name}")
    wrong = [lane for lane in ended if lane.wrong]
    for lane in wrong:
        print(f"lane {lane.name} FAILED: {lane.wrong}; its files are in {lane.directory}")
    if not wrong:
        shutil.rmtree(root, ignore_errors=True)
    total = sum((lane.counts for lane in ended), Counts())
    minutes, seconds = divmod(round(wall), 60)
    clock = f" ({minutes // 60}:{minutes % 60:02}:{seconds:02})" if wall >= 60 else ""
    lost = f", {len(wrong)} of {len(ended)} lanes FAILED" if wrong else ""
    print(f"\n===== {total.text}{lost} in {wall:.2f}s{clock} =====", flush=True)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash tests/run.sh", description="Run the tests in lanes.")
    parser.add_argument("what", nargs="?", choices=["all", "fast", "nightly"], default="all")
    what = parser.parse_args().what
    environ = dict(os.environ)
    everything: dict[str, tuple[str, list[str]]] = {
        side: (" or ".join(names), ["tests"]) for side, names in lanes.SIDES.items()
    }
    if what == "fast":
        # Naming the files spares the collection of all the others.
        return run({"fast": ("fast", lanes.files(ROOT, lanes.FAST))}, environ)
    if what == "all":
        return run(everything, environ)
    environ.setdefault("DPDIST_SOAK_MINUTES", str(SOAK))
    environ.setdefault("DPDIST_LANE_MINUTES", str(LIMIT + 2 * float(environ["DPDIST_SOAK_MINUTES"])))
    code = run(everything, environ)
    matrix = [sys.executable, "-m", "tests.faults.matrix", "--fresh"]
    return subprocess.run(matrix, cwd=ROOT, check=False).returncode or code


if __name__ == "__main__":
    sys.exit(main())
