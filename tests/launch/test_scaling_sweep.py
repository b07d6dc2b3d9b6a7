"""Sweeps: what is started when, what is not started again, and real ones of local processes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_scaling_report import measured

import dpdist
from dpdist.errors import InputError
from dpdist_launch.cli import main
from dpdist_launch.measure.scaling.arms import ARMS, DP, SGD, SGD_SYNC
from dpdist_launch.measure.scaling.directory import Point, SweepDirectory, grid
from dpdist_launch.measure.scaling.sweep import Request, collect, sweep
from dpdist_launch.slurm.sbatch import RefusedError
from dpdist_launch.slurm.scontrol import Status

TREE: dict[str, dict[str, Any]] = {
    "model": {"name": "mlp", "options": {"hidden": [8], "scale": 16}},
    "privacy": {"noise_multiplier": 4.0, "delta": 1e-4},
    "sampling": {"expected_batch_size": 64},
    "training": {"steps": 10, "physical_batch_size": 16},
    "cluster": {"initialization_timeout": 100, "shutdown_timeout": 60, "watchdog_timeout": 100},
}


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every measured point."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.glob("points/*.json")}


# What is asked for


def request(to: Path, **changes: Any) -> Request:
    settings: dict[str, Any] = {"nodes": (1, 2), "arms": (DP, SGD), "cluster": "slurm", "source": ("x.yaml",)}
    return Request(config=dpdist.from_dict(TREE), to=to, **(settings | changes))


def test_the_order_spreads_drift_over_the_arms() -> None:
    points = grid((1, 4), (DP, SGD, SGD_SYNC), 2)
    assert len(set(points)) == len(points) == 12
    assert [(p.repeat, p.nodes) for p in points[::3]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert [p.arm for p in points[:3]] == [DP, SGD, SGD_SYNC]
    assert [p.arm for p in points[6:9]] == [SGD, SGD_SYNC, DP]


@pytest.mark.parametrize("arm", ARMS)
def test_names_of_points_can_be_read_back(arm: str) -> None:
    point = Point(arm=arm, nodes=20, repeat=3)
    assert Point.of_name(point.name) == point


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", ""], "--nodes = '': give at least one"),
        (["--nodes", "0,1"], "--nodes = '0,1': give counts of at least 1"),
        (["--nodes", "2,2"], "name each only once"),
        (["--nodes", "two"], "--nodes = 'two': give whole numbers"),
        ([], "--nodes = None: give node counts"),
        (["--nodes", "1", "--arms", "dp,adam"], "no such arm; the arms are dp, sgd, sgd-sync-every-batch"),
        (["--nodes", "1", "--arms", ","], "--arms = '': give at least one"),
        (["--nodes", "1", "--repeats", "0"], "--repeats = 0: give at least 1"),
        (["--nodes", "1", "--gpus-per-node", "0"], "--gpus-per-node = 0"),
        (["--nodes", "1", "--steps", "0"], "--steps = 0"),
        (["--nodes", "1", "--jobs", "0"], "--jobs = 0"),
        (["--nodes", "1", "privacy.enabled=false"], "leave dp out of --arms"),
        (["--nodes", "1", "--sbatch", "account"], "write option=value"),
        (["--collect", "here"], "leave it out: --collect takes all from its directory"),
    ],
)
def test_what_cannot_be_asked_for(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(yaml.safe_dump(TREE))
    assert main(["scaling", str(config), *arguments, "--to", str(tmp_path / "sweep")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_config_or_a_directory_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--nodes", "1"]) == 2
    assert "name a YAML file, or give --collect DIR" in capsys.readouterr().err
    assert main(["scaling", "--nodes", "1", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["scaling", "--collect", str(tmp_path)]) == 2
    assert "there is no sweep.json" in capsys.readouterr().err


# What is started when, on a cluster that is made up


@dataclass
class MadeUpJob:
    id: str
    point: Point
    looks: int = 8
    #: The state in which it waits, for ever.
    waits: Status | None = None
    cancelled: bool = False

    def status(self) -> Status:
        if self.waits is not None:
            return self.waits
        self.looks -= 1
        return Status("RUNNING" if self.looks > 0 else "FAILED")

    def last_lines(self) -> str:
        return "a reason\nin two lines"

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class MadeUp:
    """A cluster whose jobs take some looks; those of `failing` leave no result."""

    directory: SweepDirectory
    failing: set[Point] = field(default_factory=set)
    #: Points whose jobs stay in the queue, and node counts that are not taken at all.
    waiting: dict[Point, Status] = field(default_factory=dict)
    refused: tuple[int, ...] = ()
    stop_after: int = 1000
    poll_seconds: float = 0.0
    started: list[Point] = field(default_factory=list)
    jobs: dict[str, MadeUpJob] = field(default_factory=dict)
    most: int = 0

    def start(self, point: Point, arguments: dict[str, Any], directory: SweepDirectory) -> MadeUpJob:
        if len(self.started) == self.stop_after:
            raise KeyboardInterrupt
        if point.nodes in self.refused:
            raise RefusedError("sbatch", "--nodes", "SLURM refused: Requested node configuration is not available")
        self.started.append(point)
        number = str(len(self.started))
        self.jobs[number] = job = MadeUpJob(number, point, waits=self.waiting.get(point))
        self.most = max(self.most, sum(job.looks > 0 for job in self.jobs.values()))
        if point not in self.failing | self.waiting.keys():
            directory.result(point).write_text(json.dumps(measured(point)))
        return job

    def adopt(self, record: dict[str, Any]) -> MadeUpJob | None:
        job = self.jobs.get(record.get("id", ""))
        return job if job is not None and job.looks > 0 else None


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    cluster = MadeUp(SweepDirectory(tmp_path))
    monkeypatch.setattr(Request, "at", lambda request: cluster)
    return cluster


def test_no_more_jobs_at_once_than_allowed(made_up: MadeUp, tmp_path: Path) -> None:
    assert sweep(request(tmp_path, arms=tuple(ARMS), repeats=2, jobs=3)) == 0
    assert made_up.most == 3
    assert made_up.started == grid((1, 2), tuple(ARMS), 2)


def test_a_failed_point_is_named_and_the_others_go_on(
    made_up: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = Point(arm=SGD, nodes=1, repeat=1)
    made_up.failing.add(failing)
    assert sweep(request(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "sgd n=1 r=1: failed (job 2: FAILED); its last lines:\n    a reason\n    in two lines\n" in said
    assert "/4] dp n=2 r=1: 776 ex/s (compile 12 s)" in said
    assert len(made_up.started) == 4
    assert "Not measured (yet): sgd-n1-r1 (FAILED)." in (tmp_path / "scaling.md").read_text()
    assert collect(tmp_path) == 0
    assert "sgd n=1 r=1: failed (FAILED)" in capsys.readouterr().err
    made_up.failing.clear()
    before = files(tmp_path)
    assert sweep(request(tmp_path)) == 0  # tried again, alone
    assert made_up.started[4:] == [failing]
    assert files(tmp_path).items() > before.items()


def test_points_that_cannot_be_had_are_named_and_the_others_reported(
    made_up: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cluster has no 4 nodes, refuses 8, and never gets round to one other job."""
    late = Point(arm=SGD, nodes=2, repeat=1)
    made_up.waiting = {
        Point(arm=DP, nodes=4, repeat=1): Status("PENDING", "PartitionNodeLimit"),
        late: Status("PENDING", "Priority"),
    }
    made_up.refused = (8,)
    began = time.monotonic()
    assert sweep(request(tmp_path, nodes=(1, 2, 4, 8), longest_wait=0.3)) == 1
    assert 0.3 < time.monotonic() - began < 30
    said = capsys.readouterr().err
    assert "dp n=4 r=1: cannot be had: job 5 was PENDING (PartitionNodeLimit), and is cancelled" in said
    assert "sgd n=2 r=1: cannot be had: job 4 was PENDING (Priority) for longer than 0.3 s, and is cancelled" in said
    assert "dp n=8 r=1: cannot be had: SLURM refused: Requested node configuration" in said
    assert [job.point for job in made_up.jobs.values() if job.cancelled] == [late, Point(arm=DP, nodes=4, repeat=1)]
    page = (tmp_path / "scaling.md").read_text()
    assert "dp-n4-r1 (PENDING (PartitionNodeLimit))" in page
    assert "sgd-n8-r1 (sbatch = '--nodes': SLURM refused" in page
    assert "| 1 | 4 | 396 |" in page


def test_a_sweep_of_which_slurm_takes_nothing_is_an_input_error(made_up: MadeUp, tmp_path: Path) -> None:
    made_up.refused = (1, 2)
    with pytest.raises(InputError, match="SLURM refused"):
        sweep(request(tmp_path))
    assert sweep(request(tmp_path, nodes=(4,), steps=7)) == 0  # nothing was begun


def test_an_interrupted_sweep_reports_what_there_is(made_up: MadeUp, tmp_path: Path) -> None:
    made_up.stop_after = 3
    assert sweep(request(tmp_path, jobs=1)) == 75
    assert "Not measured (yet): " in (tmp_path / "scaling.md").read_text()


def test_running_jobs_of_an_interrupted_sweep_are_waited_for_and_not_started_again(
    made_up: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = Point(arm=DP, nodes=1, repeat=1)
    made_up.stop_after = 1
    made_up.failing.add(running)  # no result yet
    assert sweep(request(tmp_path)) == 75
    assert "the same command goes on" in capsys.readouterr().err
    (job,) = made_up.jobs.values()
    job.looks = 3
    SweepDirectory(tmp_path).result(running).unlink(missing_ok=True)
    made_up.stop_after, status = 1000, job.status

    def ends_well() -> Status:
        now = status()
        if now.ended:
            SweepDirectory(tmp_path).result(running).write_text(json.dumps(measured(running)))
        return now

    job.status = ends_well  # type: ignore[method-assign]
    assert sweep(request(tmp_path)) == 0
    assert "dp n=1 r=1: job 1 of an earlier call is RUNNING" in capsys.readouterr().err
    assert made_up.started == grid((1, 2), (DP, SGD), 1)  # each once


def test_a_sweep_grows_and_keeps_what_it_has(made_up: MadeUp, tmp_path: Path) -> None:
    assert sweep(request(tmp_path, nodes=(1,), arms=(DP,))) == 0
    before = files(tmp_path)
    assert sweep(request(tmp_path, nodes=(1, 2), arms=(DP, SGD), repeats=2)) == 0
    assert len(made_up.started) == 8
    assert files(tmp_path).items() > before.items()
    assert sweep(request(tmp_path, nodes=(4,), arms=(DP,))) == 0
    assert len(SweepDirectory(tmp_path).points()) == 9
    assert "Note" not in (tmp_path / "scaling.md").read_text()  # nobody asked for the other arm on 4 nodes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"config": dpdist.from_dict(TREE | {"sampling": {"expected_batch_size": 9}})},
            "sampling.expected_batch_size",
        ),
        ({"steps": 21}, "--steps"),
        ({"gpus_per_node": 2}, "--gpus-per-node"),
    ],
)
def test_another_measurement_is_refused_in_the_directory(
    changes: dict[str, Any], field: str, made_up: MadeUp, tmp_path: Path
) -> None:
    asked = request(tmp_path)
    assert sweep(asked) == 0
    other = {name: getattr(asked, name) for name in asked.__dataclass_fields__} | changes
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(InputError, match="name a new directory with --to") as caught:
        sweep(Request(**other))
    assert caught.value.field == field
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_a_directory_where_nothing_was_started_may_be_used_for_another_sweep(
    made_up: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as after `dpdist scaling` where there is no SLURM, and `--cluster local` would have been right."""

    def refused(*_: Any) -> Any:
        raise InputError("srun", None, "there is no SLURM on this machine.")

    with monkeypatch.context() as none_here:
        none_here.setattr(made_up, "start", refused)
        with pytest.raises(InputError, match="no SLURM"):
            sweep(request(tmp_path, nodes=(1, 2)))
    assert sweep(request(tmp_path, nodes=(1,), steps=7)) == 0
    assert len(SweepDirectory(tmp_path).points()) == 2


def test_other_code_is_refused_in_the_directory(
    made_up: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(request(tmp_path)) == 0
    monkeypatch.setattr("dpdist_launch.measure.scaling.sweep.measuring_code", lambda: "changed")
    with pytest.raises(InputError, match="code = 'changed'"):
        sweep(request(tmp_path))


def test_where_a_run_lives_does_not_matter(made_up: MadeUp, tmp_path: Path) -> None:
    assert sweep(request(tmp_path)) == 0
    moved = dpdist.from_dict(TREE | {"run": {"dir": "elsewhere"}})
    asked = request(tmp_path)
    other = {name: getattr(asked, name) for name in asked.__dataclass_fields__} | {"config": moved}
    assert sweep(Request(**other)) == 0
    assert len(made_up.started) == 4


def test_two_sweeps_do_not_work_in_one_directory(made_up: MadeUp, tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path)
    directory.begin(request(tmp_path).description(), [])
    with directory.locked(), pytest.raises(InputError, match="another dpdist scaling is at work"):
        sweep(request(tmp_path))
    assert made_up.started == []
    assert sweep(request(tmp_path)) == 0


def test_a_directory_of_jobs_that_others_can_read_is_closed_to_them(made_up: MadeUp, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir(mode=0o755)
    assert sweep(request(tmp_path)) == 0
    assert (tmp_path / "jobs").stat().st_mode & 0o077 == 0
