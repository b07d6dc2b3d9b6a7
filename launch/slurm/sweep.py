"""A sweep: the same config under several settings, each point a run of its own, all of them one array of jobs.

`sweep.json` in the directory of the sweep says which points were ever asked for, since whoever chooses among them has
seen them all. Each has its run directory, secret and ledger below it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.run.directory import RunDirectory, write_atomically
from dpdist.run.step_settings import settings_digest
from dpdist_launch.slurm.check import require_runnable
from dpdist_launch.slurm.job import TrainingJob, attach, job_folder
from dpdist_launch.slurm.request import Request
from dpdist_launch.slurm.submit import in_absolute_directory, submit_calls, train_task

#: Bytes of a point's name beyond which, or with odd characters, it is shortened to a digest.
_LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a sweep."""

    #: What its run directory is called.
    name: str
    #: The settings that are its own, by dotted name.
    settings: dict[str, Any]
    #: With its run directory, an absolute path.
    config: Config

    @property
    def digest(self) -> str:
        """Of all settings that a step depends on, to see whether the same name means the same point."""
        return settings_digest(config_module.flatten(self.config))

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return Path(self.config.run.dir)

    def job(self) -> TrainingJob | None:
        """The job that was last submitted for it."""
        return attach(self.run_dir)

    def ended(self) -> dict[str, Any] | None:
        """The summary of its run, where that has nothing left to do."""
        return RunDirectory(self.run_dir).ended(self.config)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The points that are asked for, and where they are."""

    root: Path
    points: tuple[Point, ...]

    @property
    def description(self) -> Path:
        """`sweep.json`: `asked`, lists of points, each a name and its settings."""
        return self.root / "sweep.json"

    def asked(self) -> list[list[dict[str, Any]]]:
        """The points ever asked for: first those from before any had begun, then what each submission added."""
        if not self.description.exists():
            return []
        try:
            return list(json.loads(self.description.read_text())["asked"])
        except (ValueError, KeyError, TypeError):
            remedy = "is not whole: which points there were is unknown; name a new run.dir."
            raise InputError("sweep.json", str(self.description), remedy) from None

    def submit(self, request: Request, *, at_once: int, paths_on_nodes: bool) -> str | None:
        """Submit the points that have not ended and have no job, as one array; its number, or None without any.

        Args:
            at_once: how many jobs of it run side by side at most.
            paths_on_nodes: data and weights are on the compute nodes alone; do not look for them here.

        Raises:
            InputError: a point or the request cannot be used; nothing was submitted.
        """
        if at_once < 1:
            raise InputError("--at-most", at_once, "give at least 1.")
        self._require_ours()
        for point in self.points:
            require_runnable(point.config, request, paths_on_nodes=paths_on_nodes)
        left = [point for point in self.points if not _at_work(point) and point.ended() is None]
        if not left:
            return None
        RunDirectory(self.root).open_private()
        for point in left:
            RunDirectory(point.run_dir).open_private()
        self._note()
        folder = job_folder(self.root)
        ids, identity = submit_calls(
            [(train_task, (config_module.to_dict(point.config),)) for point in left],
            folder=folder,
            name=self.root.name,
            request=request,
            run_dirs=[point.run_dir for point in left],
            at_once=at_once,
        )
        for point, job_id in zip(left, ids, strict=True):
            TrainingJob(job_id, point.run_dir, point.config, folder=folder, identity=identity).record()
        return ids[0].partition("_")[0]

    def _require_ours(self) -> None:
        if (self.root / "config.yaml").exists():
            raise InputError("run.dir", str(self.root), "holds a run; name another directory for a sweep.")
        if not self.description.exists():
            RunDirectory(self.root).require_ours()
        told = {point["name"]: point for points in self.asked() for point in points}
        for point in self.points:
            before = told.get(point.name)
            if before is not None and before["digest"] != point.digest:
                raise InputError(
                    "--sweep",
                    point.name,
                    f"{self.description} has a point of that name with other settings; its cost was fixed when it was "
                    "asked for. Name a new run.dir.",
                )
        if any(before["data"] != _data_of(point.config) for before in told.values() for point in self.points):
            raise InputError(
                "data",
                str(self.root),
                "is not what earlier points of this sweep were asked for with: one would be tested on records that "
                "another trains on; name a new run.dir.",
            )

    def _note(self) -> None:
        """Write down which points are new, before any of them can have a result."""
        asked = self.asked()
        known = {point["name"] for points in asked for point in points}
        new = [
            {"name": p.name, "settings": p.settings, "digest": p.digest, "data": _data_of(p.config)}
            for p in self.points
            if p.name not in known
        ]
        if not new:
            return
        # A directory that is gone may have held results.
        if any(RunDirectory(self.root / name).ledger.exists() or not (self.root / name).is_dir() for name in known):
            asked = [*asked, new]
        else:  # nothing was seen yet: all were asked for at once
            asked = [[*itertools.chain(*asked), *new]]
        write_atomically(self.description, json.dumps({"asked": asked}, indent=2) + "\n")


def plan_sweep(make: Callable[[Mapping[str, Any]], Config], axes: Mapping[str, Sequence[Any]]) -> Sweep:
    """The sweep over every combination of the values of `axes`.

    Args:
        make: the config with further settings by dotted name; its run directory is that of the sweep.
        axes: the values of each setting that is swept, by dotted name.

    Raises:
        InputError: a point's config cannot be used, or points are the same.
    """
    for axis, values in axes.items():
        if axis.startswith("run."):
            raise InputError("--sweep", axis, "the settings of run say where a run is; sweep over others.")
        if axis.startswith("data."):
            raise InputError(
                "--sweep",
                axis,
                "all points must train on the same records and be tested on the same, or one publishes its accuracy on "
                "records that another trains on; sweep over others.",
            )
        if axis == "privacy.delta":
            raise InputError("--sweep", axis, "the composed epsilon is at one delta for all points; sweep over others.")
        if not values:
            raise InputError("--sweep", axis, "give at least one value, as in optimizer.learning_rate=0.1,0.3,1.")
    short = {axis: axis.rpartition(".")[2] for axis in axes}
    if len(set(short.values())) < len(short):
        short = {axis: axis for axis in axes}
    points: list[Point] = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        root = Path(make(settings).run.dir).absolute()
        name = _name({short[axis]: value for axis, value in settings.items()})
        config = in_absolute_directory(make(settings | {"run.dir": str(root / name)}))
        points.append(Point(name=name, settings=settings, config=config))
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise InputError("--sweep", name, "is given twice; name each value once.")
    return Sweep(root=root, points=tuple(points))


def _name(settings: Mapping[str, Any]) -> str:
    """`learning_rate=0.1,steps=30`, and where that is no plain file name, what of it is, and a digest."""
    text = ",".join(f"{name}={_shown(value)}" for name, value in settings.items())
    plain = re.sub(r"[^A-Za-z0-9.,=+_-]+", "-", text)
    if plain == text and len(text) <= _LONGEST_NAME:
        return text
    return f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


def _data_of(config: Config) -> str:
    """Digest of what decides which records are trained on and tested on, and of delta."""
    told = {name: value for name, value in config_module.flatten(config).items() if name.startswith("data.")}
    told = {name: value for name, value in told.items() if name not in ("data.workers", "data.prefetch")} | {
        "delta": config.privacy.delta
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _at_work(point: Point) -> bool:
    job = point.job()
    return job is not None and not job.ended()
