"""What the page tells of a run, read from its directory: public files alone, unless the private part is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config import SECTIONS, Config
from dpdist.config import file as configfile
from dpdist.config.section import fields_of
from dpdist.errors import InputError
from dpdist.mechanism.ledger import Ledger, LedgerError
from dpdist.release.export import shareable
from dpdist.release.statement import statement
from dpdist.run import diagnose, events, goodput
from dpdist.run.curves import Curves, curves_of
from dpdist.run.layout import RunPaths
from dpdist.run.summary import exposed_secret, guarantee

#: Of a summary, what the page shows as numbers.
_NUMBERS = ("step", "examples_per_second", "devices", "seconds_to_first_step", "tflops_per_device", "mfu")


@dataclass(frozen=True, kw_only=True)
class Told:
    """A run, as far as its files tell."""

    name: str
    #: The summary's status, or how the newest part ended; `not ended` where it did not say.
    state: str
    #: Steps taken, as far as it was told.
    step: int
    #: `holds`, or why it does not.
    guarantee: str
    #: As `dpdist.release.statement.statement`; None where the ledger does not tell.
    statement: dict[str, Any] | None
    summary: dict[str, Any]
    curves: Curves
    events: list[dict[str, Any]]
    #: `dpdist.run.goodput.public_of`; None where no time was noted.
    time: dict[str, Any] | None
    #: Settings without those of the site, by dotted name.
    settings: dict[str, Any]
    #: Those of them that are not the default.
    chosen: dict[str, Any]
    #: What is wrong with the files, in sentences.
    problems: list[str]
    #: As `dpdist.run.diagnose.read`; None unless it was asked for.
    private: dict[str, Any] | None


def read_run(root: Path, *, private: bool = False) -> Told:
    """Read a run, whatever state it is in.

    Raises:
        InputError: there is no run that has begun, or, with `private`, none that has taken a step.
    """
    paths = RunPaths(root)
    if not paths.config.exists() or not paths.ledger.exists():
        raise InputError("RUN", str(root), "holds no run that has begun (config.yaml and ledger.jsonl).")
    config = config_module.from_dict(configfile.read(paths.config))
    problems: list[str] = []
    summary, told = _summary(paths, problems), events.read(paths.events)
    curves = curves_of(root)
    steps = [step for points in (curves.epsilon, curves.throughput, *curves.tested.values()) for step, _ in points]
    step = int(summary.get("step") or max(steps, default=0))
    facts = _statement(paths, config, step=step, problems=problems)
    own = guarantee(config, finite=True) if facts is None else str(facts["guarantee"])
    holds = exposed_secret(paths) or str((own.startswith("holds") and summary.get("guarantee")) or own)
    if facts is None and holds.startswith("holds"):
        holds = "unknown: what the run is charged cannot be read"
    clock = goodput.read(paths.goodput)
    shared = shareable(config)
    settings = {f"{section}.{name}": value for section, values in shared.items() for name, value in values.items()}
    defaults = {
        f"{section}.{name}": field.default
        for section, kind in SECTIONS.items()
        for name, field in fields_of(kind).items()
    }
    return Told(
        name=root.resolve().name,
        state=str(summary.get("status") or _ending(told)),
        step=step,
        guarantee=holds,
        statement=facts,
        summary=summary,
        curves=curves,
        events=told,
        time=summary.get("goodput") if clock is None else goodput.public_of(clock),
        settings=settings,
        chosen={name: value for name, value in settings.items() if not _alike(value, defaults[name])},
        problems=problems,
        private=diagnose.read(root) if private else None,
    )


def _ending(told: list[dict[str, Any]]) -> str:
    ended = events.how_it_ended(told)
    return "not ended" if ended == "interrupted" else ended  # from the files alone it may be under way


def _alike(value: Any, default: Any) -> bool:
    return json.dumps(value, default=str) == json.dumps(default, default=str)  # a list is as good as a tuple


def _summary(paths: RunPaths, problems: list[str]) -> dict[str, Any]:
    try:
        summary = json.loads(paths.summary.read_text())
        if _is_whole(summary):
            return dict(summary)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        pass
    problems.append("summary.json is not whole, and was left aside.")
    return {}


def _is_whole(summary: Any) -> bool:
    """Whether what the page shows of a summary has the types that it is written with."""
    if not isinstance(summary, dict):
        return False
    metrics, time = summary.get("metrics", {}), summary.get("goodput")
    if not isinstance(metrics, dict) or not isinstance(summary.get("guarantee", ""), str):
        return False
    numbers = [*metrics.values(), *(summary.get(name) for name in _NUMBERS)]
    if time is not None:
        if not isinstance(time, dict) or not isinstance(time.get("shares"), dict) or "queue_hours" not in time:
            return False
        numbers += [*time["shares"].values(), time.get("node_hours"), time["queue_hours"]]
        if not set(goodput.PHASES) <= time["shares"].keys():
            return False
    return all(value is None or isinstance(value, int | float) for value in numbers)


def _statement(paths: RunPaths, config: Config, *, step: int, problems: list[str]) -> dict[str, Any] | None:
    try:
        ledger = Ledger(paths.ledger)
        if ledger.plan is None:
            problems.append("the ledger holds no plan: nothing has been charged yet.")
            return None
        if ledger.copied:
            problems.append(
                "this directory is a copy of a run, and tells what it was charged up to then; what the original has "
                "released since is not in it."
            )
        return statement(config, ledger, step=step, finite=True)
    except (LedgerError, OSError, ValueError) as error:
        problems.append(f"the ledger cannot be relied on: {error}.")
        return None
