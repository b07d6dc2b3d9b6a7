"""What can be seen of one run from its directory, whatever state that is in; reads little, writes nothing.

Shown by default is what is public, and whether the lease is held. The directory may be half-written, damaged, or no run
at all: that is then what is said of it.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpdist.cluster.holder import Holder
from dpdist.run import events, goodput, ranks
from dpdist.run.layout import DONE, RunPaths
from dpdist.run.metrics import is_evaluation, metrics_of
from dpdist_launch.observe.queue import Answer, QueuedJob

#: Bytes that are read of the end of a file that grows.
_TAIL = 2**16
#: Lines in which dpdist and its launchers, or else SLURM, say why something ended.
_ERRORS = (re.compile(r"(dpdist|dpdist job): (error|failed)|watchdog: |launcher: rank"), re.compile(r"\w+: error: "))
#: SLURM's states of a job that is not over.
GOING_ON = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED"}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment. What is not known is None."""

    path: str
    #: SLURM's word where the run has a job that is not over; else `running`, the summary's status, `interrupted`,
    #: `cancelled` where its job was before it began, or what is wrong with the directory: `not a run`, `not begun`,
    #: `broken`.
    state: str
    #: More about the state: SLURM's reason, or what is broken.
    reason: str | None = None
    #: When SLURM expects a waiting job to begin, or a running one began.
    start: str | None = None
    job: str | None = None
    nodes: list[str] = field(default_factory=list)
    step: int | None = None
    steps: int | None = None
    epsilon: float | None = None
    target_epsilon: float | None = None
    #: Newest test metrics by name, the one of first interest first.
    metrics: dict[str, float | None] = field(default_factory=dict)
    accuracy: float | None = None
    #: Seconds until the last step, of a run that is being trained.
    eta: float | None = None
    restarts: int = 0
    #: `dpdist.run.goodput.public_of` the run so far.
    goodput: dict[str, Any] | None = None
    #: Why the last part of the run failed.
    error: str | None = None


def job_of(run: RunPaths) -> str | None:
    """The number of the newest SLURM job of a run: the one that was submitted last, or that last began."""
    here = ranks.read(run.ranks)
    began: tuple[float, str | None] = (here.time, here.slurm_job) if here is not None else (0.0, None)
    try:
        record = run.jobs / "job.json"
        submitted: tuple[float, str | None] = (record.stat().st_mtime, str(json.loads(record.read_text())["job"]))
    except (OSError, ValueError, KeyError, TypeError):
        submitted = (0.0, None)
    return max(began, submitted, key=lambda known: known[0])[1]


def look(root: Path, slurm: Answer) -> Snapshot:
    """Look at a directory; whatever is wrong with it is said in the result."""
    try:
        return _look(RunPaths(root), slurm)
    except OSError as error:
        return Snapshot(path=str(root), state="broken", reason=f"cannot be read ({error.strerror})")
    except Exception as error:  # one directory must not take the others' table away
        return Snapshot(path=str(root), state="broken", reason=f"cannot be understood ({type(error).__name__})")


def is_of_many(root: Path) -> bool:
    """Whether a directory holds the runs of a sweep or of a search."""
    return (root / "sweep.json").exists() or (root / "search.json").exists()


def is_run(root: Path) -> bool:
    """Whether a directory holds a run, or one that never began."""
    if is_of_many(root):  # it has a private part, too
        return False
    run = RunPaths(root)
    return run.ledger.exists() or run.private.is_dir() or (run.config.exists() and run.checkpoints.is_dir())


def _look(run: RunPaths, slurm: Answer) -> Snapshot:
    if not is_run(run.root):
        what = "" if run.root.is_dir() else "there is no such directory"
        return Snapshot(path=str(run.root), state="not a run", reason=what or None)
    job = job_of(run)
    queued = None if job is None else slurm.jobs.get(job)
    placed, told = ranks.read(run.ranks), events.read(run.events)
    summary, broken = _summary(run)
    try:
        plan = _plan(run)
    except (ValueError, KeyError, TypeError):
        plan, broken = None, broken or "ledger.jsonl is damaged"
    metrics = _json_lines(run.metrics)
    held = _is_held(run)
    state = state_of(held=held, queued=queued, summary=summary, told=told, begun=plan is not None)
    if broken is not None and state in ("interrupted", "not begun"):
        state = "broken"
    shown = [_numbers(m) for m in metrics if isinstance(m.get("step"), int)]
    ended, terms = _numbers(summary or {}), _numbers(plan or {})
    step = ended.get("step") if summary else (shown[-1]["step"] if shown else None)
    spent = [m["epsilon"] for m in shown if m.get("epsilon") is not None]
    tested = next((metrics_of(m) for m in reversed(shown) if is_evaluation(m)), {})
    running = state in ("running", "RUNNING")
    well = running or state in (*DONE, "not begun", "cancelled") or events.how_it_ended(told) == "preempted"
    return Snapshot(
        path=str(run.root),
        state=state,
        reason=broken if state == "broken" else _reason(queued, state),
        start=queued.start if queued is not None and queued.state in GOING_ON else None,
        job=job,
        nodes=list(dict.fromkeys(placed.nodes)) if placed is not None else [],
        step=step if step is not None else (0 if plan else None),
        steps=terms.get("steps_asked"),
        epsilon=ended.get("epsilon_spent") or (spent[-1] if spent else None),
        target_epsilon=terms.get("target_epsilon") or terms.get("epsilon"),
        metrics=tested,
        accuracy=tested.get("accuracy"),
        eta=_eta(shown, terms, _age(run.metrics)) if running else None,
        restarts=events.restarts(told),
        goodput=_goodput(run, summary),
        error=None if well else _last_error(run, told, job),
    )


def state_of(
    *,
    held: bool | None,
    queued: QueuedJob | None,
    summary: dict[str, Any] | None,
    told: list[dict[str, Any]],
    begun: bool,
) -> str:
    """The state of a run.

    Args:
        held: whether a living process has the lease; None where there never was one.
        queued: its job, where SLURM knows it.
        summary: of the last part that ended.
        told: its events.
        begun: whether the ledger has a plan.
    """
    if queued is not None and queued.state in GOING_ON:
        return queued.state
    if held:
        return "running"
    if summary is not None:
        return str(summary["status"])
    if told and (end := events.how_it_ended(told)) in ("failed", "preempted"):
        return end
    if begun or told:
        return "interrupted"
    return "cancelled" if queued is not None and queued.state == "CANCELLED" else "not begun"


def _reason(queued: QueuedJob | None, state: str) -> str | None:
    """SLURM's reason while a job waits; its last word where the run did not end, or did not say how."""
    if queued is None:
        return None
    if queued.state in GOING_ON:
        return queued.reason if queued.state != "RUNNING" else None
    if state == "cancelled":
        return "its job was cancelled before the run began"
    unsaid = state == "interrupted" or (state in ("preempted", "not begun") and queued.state != "COMPLETED")
    return f"SLURM says {queued.state}" if unsaid else None


def _summary(run: RunPaths) -> tuple[dict[str, Any] | None, str | None]:
    """The summary, and what is wrong with it."""
    try:
        summary = json.loads(run.summary.read_text())
        return (summary, None) if isinstance(summary["status"], str) else (None, "summary.json is not whole")
    except FileNotFoundError:
        return None, None
    except (ValueError, TypeError, KeyError):
        return None, "summary.json is not whole"


def _plan(run: RunPaths) -> dict[str, Any] | None:
    """The plan of the newest incarnation; None where none has begun."""
    found = None
    try:
        with run.ledger.open() as file:
            for line in file:
                if '"record": "plan"' in line and line.endswith("\n"):
                    found = json.loads(line)
                elif line.strip() and not line.startswith("{"):
                    raise ValueError("no ledger")
    except FileNotFoundError:
        return None
    return found


def _is_held(run: RunPaths) -> bool | None:
    """Whether a living process has the lease; one of another host is believed as long as its heartbeat is fresh."""
    leases = [(int(path.suffix[1:]), path) for path in run.private.glob("lease.*") if path.suffix[1:].isdecimal()]
    if not leases:
        return None
    newest = max(leases)[1]
    holder = Holder.decode(newest.read_bytes())
    if holder is None or holder.released:
        return False
    alive = holder.is_alive(Holder.of_this_process(run.private, holder.timeout))
    return _age(newest) < holder.timeout if alive is None else alive


def _age(path: Path) -> float:
    """Seconds since a file was written, if the clocks of this host and of the file system agree."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def tail(path: Path, size: int = _TAIL) -> list[str]:
    """The last whole lines of a file; empty where there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[1 if end > size else 0 :]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in tail(path):
        try:
            record = json.loads(line)
        except ValueError:  # torn, or still being written
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _eta(shown: list[dict[str, Any]], plan: dict[str, Any], age: float) -> float | None:
    """Seconds to the last step, at the rate of the steps of this part of the run, as far as they are at hand."""
    timed = [record for record in shown if record.get("seconds") is not None]
    if not timed or "steps" not in plan:
        return None
    last = timed[-1]
    part = [timed[-1]]
    for record in reversed(timed[:-1]):
        if record["seconds"] >= part[-1]["seconds"]:  # of an earlier part, whose clock was another
            break
        part.append(record)
    steps, seconds = last["step"] - part[-1]["step"], last["seconds"] - part[-1]["seconds"]
    each = seconds / steps if steps > 0 else plan["expected_batch_size"] / max(last["examples_per_second"], 1e-9)
    return max(0.0, (plan["steps"] - last["step"]) * each - age)


def _goodput(run: RunPaths, summary: dict[str, Any] | None) -> dict[str, Any] | None:
    record = goodput.read(run.goodput)  # newer than the summary, which was written before the last seconds
    if record is not None:
        return goodput.public_of(record)
    told = (summary or {}).get("goodput")
    whole = isinstance(told, dict) and isinstance(told.get("shares"), dict) and "training" in _numbers(told["shares"])
    return told if whole else None


def _last_error(run: RunPaths, told: list[dict[str, Any]], job: str | None) -> str | None:
    """Why the last part ended: what the batch script found out, what process 0 said, or the last such line of the log.

    Where another rank died first, process 0 knows no more than that it could not go on.
    """
    own = str(told[-1].get("cause")) if told and told[-1]["event"] == "failed" else None
    placed = ranks.read(run.ranks)
    logs = [run.jobs / f"{job}_0_log.err", *([Path(placed.log)] if placed and placed.log else []), run.output]
    for log in logs:
        lines = tail(log)
        for pattern in _ERRORS:
            said = [line.strip() for line in lines if pattern.search(line)]
            if said and (own is None or said[-1].startswith("dpdist job: failed")):
                return said[-1]
    return own


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record is a number: a file that somebody has edited may have anything in their places."""
    return {name: value for name, value in record.items() if isinstance(value, int | float)}
