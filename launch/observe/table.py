"""The table of `dpdist status`, in as many columns as fit, and its details of one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpdist_launch.observe.queue import ComingJob
from dpdist_launch.observe.snapshot import Snapshot

#: Title, whether it is a number, and when there is no room for all: the highest goes first.
_COLUMNS = (
    ("RUN", False, 0), ("STATE", False, 0), ("STEP", True, 1), ("EPSILON", True, 3), ("ETA", True, 2),
    ("RESTARTS", True, 5), ("GOODPUT", True, 4), ("NODES", False, 6),
)  # fmt: skip
_GAP = "  "
#: The longest name of a run that is shown in full, and the shortest to which it is cut.
_NAME, _SHORTEST = 28, 8
#: Of the jobs that have no directory yet, so many are shown.
_MOST = 10
_PHASES = {
    "start_up": "start-up (imports, joining, opening)",
    "compile": "compiling",
    "training": "training steps",
    "evaluation": "evaluation",
    "saving": "saving and closing",
    "lost": "lost (steps taken again, time before a crash)",
}


def text(runs: Sequence[Snapshot], *, width: int) -> str:
    """All runs, a row each, and below a row what else is to be said; no line is longer than `width`."""
    names = _names(runs)
    rows = [_row(name, run) for name, run in zip(names, runs, strict=True)]
    shown = list(range(len(_COLUMNS)))
    while sum(_widths(rows, shown)) + len(_GAP) * (len(shown) - 1) > width and len(shown) > 2:
        shown.remove(max(shown, key=lambda column: _COLUMNS[column][2]))
    widths = _widths(rows, shown)
    over = sum(widths) + len(_GAP) * (len(shown) - 1) - width
    widths[0] = max(_SHORTEST, widths[0] - max(0, over))
    lines = [_line([_COLUMNS[column][0] for column in shown], widths, shown)]
    for row, run in zip(rows, runs, strict=True):
        lines.append(_line([row[column] for column in shown], widths, shown))
        lines += [cut(f"    {note}", width) for note in _notes(run)]
    return "\n".join(cut(line.rstrip(), width) for line in lines)


def coming(jobs: Sequence[ComingJob], *, width: int) -> str:
    """Jobs that have no directory yet: why each waits, and its command; no line is longer than `width`."""
    lines = ["no directory yet (a job that sbatch sent makes it as it begins):"]
    for job in jobs[:_MOST]:
        why = _why(job.reason, job.start) if job.state == "PENDING" else f": {job.state}"
        lines += [f"    job {job.number}{why}", f"        {job.command}"]
    if len(jobs) > _MOST:
        lines.append(f"    and {len(jobs) - _MOST} more; `squeue --me` has all")
    return "\n".join(cut(line, width) for line in lines)


def detail(
    run: Snapshot, record: dict[str, Any] | None, summary: dict[str, Any], told: Sequence[dict[str, Any]]
) -> str:
    """What a run's node-hours went into, its speed, and what happened to it.

    Args:
        record: `dpdist.run.goodput.read` of the run; None where it is not there, or not ours to read.
        summary: of a run that has ended, or empty.
        told: its events.
    """
    lines = [run.path]
    if record is None:
        lines.append("  what its time went into is not known here: private/goodput.json cannot be read")
    else:
        whole = sum(record["node_seconds"].values()) or 1.0
        rows = [(_PHASES[name], seconds) for name, seconds in record["node_seconds"].items()]
        rows.insert(3, ("  of it waiting for stragglers (private)", record["waiting"]))
        lines.append(f"  {'':46}  {'node-time':>10}  {'share':>6}")
        lines += [f"  {name:46}  {clock(seconds):>10}  {seconds / whole:6.1%}" for name, seconds in rows]
        lines.append(f"  {'all':46}  {clock(whole):>10}  {1:6.1%}")
        queued = record["queue_seconds"]
        lines.append(f"  {'in the queue (holds no node)':46}  {'unknown' if queued is None else clock(queued):>10}")
    speed = [
        ("seconds to the first step", summary.get("seconds_to_first_step"), "{:.1f}"),
        ("examples a second", summary.get("examples_per_second"), "{:,.0f}"),
        ("TFLOP/s a device", summary.get("tflops_per_device"), "{:.3g}"),
        ("MFU (of the bfloat16 rate)", summary.get("mfu"), "{:.1%}"),
    ]
    lines += [f"  {name:46}  {form.format(value):>10}" for name, value, form in speed if value is not None]
    for event in told:
        more = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "event"))
        lines.append(f"  {event['time']}  {event['event']:9}  {more}")
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """`1:02:03` from an hour on, `2:03`, or `3.2 s`; days as `3d 04:05`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _names(runs: Sequence[Snapshot]) -> list[str]:
    """Each run's path from the folder that all are in."""
    paths = [Path(run.path).absolute() for run in runs]
    common = Path(*_common([path.parent.parts for path in paths])) if paths else Path()
    return [str(path.relative_to(common)) for path in paths]


def _common(parts: list[tuple[str, ...]]) -> tuple[str, ...]:
    shared = []
    for each in zip(*parts, strict=False):
        if len(set(each)) > 1:
            break
        shared.append(each[0])
    return tuple(shared)


def _row(name: str, run: Snapshot) -> list[str]:
    share = None if run.goodput is None else run.goodput["shares"]["training"]
    spent = "-" if run.epsilon is None else f"{run.epsilon:.2f}"
    return [
        cut(name, _NAME),
        run.state,
        "-" if run.step is None else f"{run.step:,}/{'?' if run.steps is None else f'{run.steps:,}'}",
        spent if run.target_epsilon is None else f"{spent}/{run.target_epsilon:.2f}",
        "-" if run.eta is None else clock(run.eta),
        "-" if run.steps is None else str(run.restarts),
        "-" if share is None else f"{share:.0%}",
        _nodes(run.nodes),
    ]


def _nodes(nodes: list[str]) -> str:
    short = [node.partition(".")[0] for node in nodes]
    return ",".join(short) if len(short) < 3 else f"{short[0]} +{len(short) - 1}"


def _notes(run: Snapshot) -> list[str]:
    notes = []
    if run.job is not None and run.state.isupper():
        why = _why(run.reason, run.start if run.state == "PENDING" else None)
        if why:
            notes.append(f"job {run.job}{why}")
    elif run.reason is not None:
        notes.append(run.reason)
    if run.error is not None:
        notes.append(f"last error: {run.error}")
    return notes


def _why(reason: str | None, start: str | None) -> str:
    waits = "" if reason is None else f" waits: {reason}"
    return waits + ("" if start is None else f"; expected to start {start.replace('T', ' ')}")


def _widths(rows: list[list[str]], shown: list[int]) -> list[int]:
    return [max(len(_COLUMNS[column][0]), *(len(row[column]) for row in rows), 0) for column in shown]


def _line(cells: list[str], widths: list[int], shown: list[int]) -> str:
    return _GAP.join(
        cut(cell, width).rjust(width) if _COLUMNS[column][1] else cut(cell, width).ljust(width)
        for cell, width, column in zip(cells, widths, shown, strict=True)
    )


def cut(cell: str, width: int) -> str:
    """At most `width` signs of a text, none of which moves the cursor."""
    cell = "".join(sign if sign.isprintable() else "?" for sign in cell)
    return cell if len(cell) <= width else cell[: max(0, width - 3)] + "..."


def now() -> str:
    """The time, for a table that is drawn again and again."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
