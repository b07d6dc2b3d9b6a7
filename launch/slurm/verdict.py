"""What a SLURM job does after `srun` has ended, and the one line that says why. slurm/job.sh asks, and does it.

`python -m dpdist_launch.slurm.verdict` runs in the Python of the tasks, in their container where there is one. It needs
the standard library alone, so it answers at once. All but `main` and what reads the run directory is pure: from the log
of one start, and what SLURM knows, to a `Verdict`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpdist_launch.slurm.deaths import SIGNALS, Cause, Layout, cause_of, deaths_of, failed_nodes, listed

#: Starts in a row without anything new in a checkpoint after which a cause that comes from the job itself is given up:
#: a time limit too short for one step, and a death with all nodes in order.
IDLE_BY_TIME, IDLE_BY_DEATH = 2, 3
#: SLURM looks at time limits once a minute: seconds by which its notice may come early, or this question late.
_SLACK = 90.0
#: Ends of a rank that was told to leave: saved, or before it listened.
_TOLD = ("exit code 75", "Terminated", "User defined signal 1", "User defined signal 2")
#: Causes that another start may not meet; the others would be met again.
_PASSING = ("lost", "bad", "killed", "crashed", "stuck", "cut off", "unknown")
_CANCELLED = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))?(?:, SEE.*)? \*\*\*")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is known of one start of a job, after its `srun` has ended."""

    #: Exit code of srun; None where it had to be killed because a node no longer answered.
    code: int | None
    #: What it wrote, each rank's lines as `RANK: text`.
    log: Sequence[str]
    #: The run directory; None for a job that trains nothing.
    run_dir: str | None = None
    #: `status` of the run's summary, and whether this start has written it.
    status: str | None = None
    fresh: bool = False
    #: Nodes of the allocation in order, and the number of tasks of each.
    nodes: tuple[str, ...] = ()
    tasks: tuple[int, ...] = ()
    #: Nodes that still start a task; None if nobody has asked.
    alive: frozenset[str] | None = None
    #: Nodes that earlier starts in this allocation were lost on, and that it was left without.
    left_out: tuple[str, ...] = ()
    #: Go on within the allocation with at least so many nodes; None means all of them.
    min_nodes: int | None = None
    #: Starts in a row that have saved nothing new, this one included; 0 if this one has.
    idle: int = 0
    #: False where ranks do not fill one node after the other: then a rank's node is not known from its number.
    in_blocks: bool = True
    #: DPDIST_MAX_RESTARTS.
    most: int = 20
    #: The node that the start before this one was lost on, if it saved nothing either.
    suspect: str | None = None
    #: Seconds to the job's time limit (None: there is none, or SLURM does not say), and between notice and kill.
    left: float | None = None
    grace: float = 300.0
    #: SLURM's word for the job's state, and how often it has restarted the job since this start began.
    state: str = "RUNNING"
    requeued: bool = False

    @property
    def layout(self) -> Layout:
        return list(zip(self.nodes, self.tasks, strict=False))

    @property
    def layout_of_ranks(self) -> Layout:
        """`layout`, or empty where it does not tell which ranks a node has."""
        return self.layout if self.in_blocks else []


@dataclass(frozen=True)
class Verdict:
    """What to do: `done`, `again`, `requeue`, `fail`, `over` (SLURM has decided), or `probe` the nodes and ask anew."""

    action: str
    code: int
    text: str
    #: Of `again`: the nodes to go on with, and the tasks of each. Of `requeue`: empty.
    nodes: tuple[str, ...] = ()
    tasks: tuple[int, ...] = ()
    #: Nodes that the job must not get, or be left with, any more.
    without: tuple[str, ...] = ()
    #: What to remember for the next start: the node on which this one was lost.
    suspect: str | None = None


def judge(start: Start) -> Verdict:
    """What comes after this start."""
    if start.code == 0:
        return _returned_0(start)
    code = _exit_code(start)
    deaths = deaths_of(start.log)
    if over := _ended_by_slurm(start):
        return Verdict("over", code, over)
    told = deaths and any(deaths[0].how.startswith(word) for word in _TOLD)
    if (start.fresh and start.status == "preempted") or told:
        return _preempted(start)
    cause = cause_of(start.log, start.layout_of_ranks, start.code)
    failed = f"failed (exit code {code}): {cause.text}"
    if cause.kind not in _PASSING or start.most == 0:
        return Verdict("fail", code, failed)
    if start.idle >= start.most:
        return Verdict("fail", code, f"{failed}; {_nothing_new(start)} (DPDIST_MAX_RESTARTS)")
    if start.alive is None:
        return Verdict("probe", code, cause.text)
    return _restarted(start, cause, failed, code)


def _restarted(start: Start, cause: Cause, failed: str, code: int) -> Verdict:
    """After a death that another start may not meet, once the nodes were asked."""
    assert start.alive is not None
    if not start.nodes:
        return Verdict("fail", code, f"{failed}; SLURM does not say on which nodes it ran")
    trusted = start.nodes[0] in start.alive  # this very node asks: else the question has failed
    dead = tuple(node for node in start.nodes if node not in start.alive) if trusted else ()
    if not dead and cause.node is not None and cause.node == start.suspect:
        dead = (cause.node,)  # it answers, but has ended two starts
    if cause.kind == "bad":
        dead = tuple(node for node in start.nodes if node in dead or node == cause.node)
    if (not dead or cause.kind == "bad") and start.idle >= min(IDLE_BY_DEATH, start.most):
        return Verdict("fail", code, f"{failed}; {_nothing_new(start)}")
    if not dead:
        nodes = start.nodes
        answer = "all nodes answer" if trusted else "the nodes could not be asked"
        text = f"{cause.text}; {answer}, so it starts again on them ({_counted(start)})"
        return Verdict("again", code, text, nodes, start.tasks, (), cause.node)
    left = [(node, tasks) for node, tasks in start.layout if node not in dead]
    silent = tuple(node for node in dead if node not in start.alive)
    named = cause.text + (f"; {listed(silent)} {'does' if len(silent) == 1 else 'do'} not answer" if silent else "")
    if start.suspect in dead and start.suspect in start.alive:
        named = f"{cause.text}, as at the start before"
    if len(left) >= (start.min_nodes or len(start.nodes)) and start.nodes[0] not in dead:
        others = f"{len(left)} nodes" if len(left) > 1 else "node"
        text = f"{named}; it starts again on the other {others} of the job ({_counted(start)})"
        nodes, tasks = zip(*left, strict=True)
        return Verdict("again", code, text, nodes, tasks, dead)
    without = start.left_out + dead  # SLURM, which may believe that they live, asks for as many nodes as at first
    text = f"{named}; requeued without {listed(without)} ({_counted(start)})"
    return Verdict("requeue", code, text, without=without)


def _returned_0(start: Start) -> Verdict:
    ended = start.status in ("finished", "budget_exhausted")
    if start.run_dir is None or (ended and (start.fresh or any("nothing to do" in line for line in start.log))):
        return Verdict("done", 0, "done")
    return Verdict(
        "fail",
        1,
        f"failed: all processes returned 0, but {start.run_dir}/summary.json does not say that this run has ended; "
        "what was started seems to be something other than dpdist",
    )


def _preempted(start: Start) -> Verdict:
    if start.idle >= start.most:
        return Verdict("fail", 75, f"preempted, and {_nothing_new(start)} (DPDIST_MAX_RESTARTS): submit it again")
    by_time = start.run_dir is not None and start.left is not None and start.left <= start.grace + _SLACK
    if by_time and start.idle >= IDLE_BY_TIME:
        return Verdict(
            "fail",
            75,
            f"preempted by its time limit, and {_nothing_new(start)}: start-up and the {start.grace:g} s of grace "
            "leave no time for a step; submit it again with a longer --time",
        )
    return Verdict("requeue", 75, f"preempted; requeued ({_counted(start)}), and held for two minutes by SLURM")


def _ended_by_slurm(start: Start) -> str | None:
    """What SLURM has done to the job itself, which leaves nothing to decide; None if nothing."""
    cancelled = [found for line in start.log if (found := _CANCELLED.search(line))]
    saved = "saved; " if start.fresh and start.status == "preempted" else ""
    word = (cancelled[-1][1] or "") if cancelled else ""
    why = {"JOB REQUEUE": "scontrol requeue", "PREEMPTION": "preempted"}.get(word, word.lower())
    if word == "NODE FAILURE" and (failed := failed_nodes(start.log)):
        why = f"{listed(failed)} failed"
    if start.requeued or word == "JOB REQUEUE":
        why = why or "scontrol requeue, a preemption, or a failed node"
        return f"{saved}SLURM has put the job back into the queue ({why})"
    if word == "TIME LIMIT" or start.state == "TIMEOUT":
        return f"{saved}ended by SLURM at the time limit; submit it again, with --signal=TERM@300 to save before it"
    if why:
        return f"{saved}ended by SLURM ({why}); submit it again to go on"
    if start.state in ("CANCELLED", "COMPLETING", "PREEMPTED"):
        return f"{saved}cancelled (scancel, or by an administrator); submit it again to go on"
    return None


def _exit_code(start: Start) -> int:
    if start.code is not None:
        return start.code
    for death in deaths_of(start.log):
        if found := re.fullmatch(r"exit code (\d+)", death.how):
            return int(found[1])
        return SIGNALS.get(death.how, 1)
    return 137


def _counted(start: Start) -> str:
    return f"start {start.idle + 1} of at most {start.most} more without anything new saved"


def _nothing_new(start: Start) -> str:
    return f"{start.idle} starts in a row have saved nothing new" if start.idle > 1 else "it has saved nothing new"


def seconds_of(time: str) -> float | None:
    """A time as SLURM writes and takes it, `days-hours:minutes:seconds` or minutes; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        return None
    days, *rest = found.groups()
    first, second, third = (None if part is None else int(part) for part in rest)
    assert first is not None
    if days is not None:  # days-hours[:minutes[:seconds]]
        return int(days) * 86400.0 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600.0 + (second or 0) * 60 + third
    return first * 60.0 + (second or 0)


def refusal_of_time(limit: str, grace: float) -> str | None:
    """Why a job of this time limit could never take a step; None if it could."""
    seconds = seconds_of(limit.strip())
    if seconds is None or seconds > grace:
        return None
    return (
        f"--time = {limit}: SLURM tells the job to leave {grace:g} s before its limit, so at once; give more time, or "
        "a shorter notice: --signal=TERM@SECONDS and the same SECONDS as DPDIST_GRACE"
    )


def saved_in(run_dir: Path) -> int:
    """How many checkpoints the ledger has announced: it grows with each new one, and never shrinks."""
    try:
        return (run_dir / "ledger.jsonl").read_text(errors="replace").count('"record": "saved"')
    except OSError:
        return 0


def stamp(run_dir: Path) -> str:
    """What changes whenever the summary is written, or a checkpoint is saved."""
    try:
        found = (run_dir / "summary.json").stat()
        summary = f"{found.st_ino}.{found.st_mtime_ns}"
    except OSError:
        summary = "-"
    return f"{summary}/{saved_in(run_dir)}"


def _status(run_dir: Path) -> str | None:
    try:
        return str(json.loads((run_dir / "summary.json").read_text())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main(arguments: Sequence[str], log: Sequence[str]) -> list[str]:
    """Answer job.sh: `begin RUN_DIR`, `time LIMIT GRACE`, or `judge NAME=VALUE...` with the log as standard input."""
    if arguments[0] == "begin":
        return [stamp(Path(arguments[1]))]
    if arguments[0] == "time":
        return [refusal_of_time(arguments[1], float(arguments[2])) or ""]
    known = dict(item.partition("=")[::2] for item in arguments[1:])
    start, memory = _read(known, log)
    verdict = judge(start)
    if verdict.action in ("again", "requeue") and memory is not None:
        _remember(memory, {"job": known["job"], "idle": start.idle, "suspect": verdict.suspect})
    nodes, without = ",".join(verdict.nodes), ",".join(verdict.without)
    return [verdict.action, str(verdict.code), nodes, ",".join(map(str, verdict.tasks)), without, verdict.text]


def _read(known: Mapping[str, str], log: Sequence[str]) -> tuple[Start, Path | None]:
    """The start that job.sh describes, and the file in which its history is."""
    run_dir = Path(known["run_dir"]) if known.get("run_dir") else None
    memory, past, new, status, fresh = None, {}, False, None, False
    if run_dir is not None:
        memory = run_dir / "private" / "slurm" / "restarts.json"
        summary_then, _, saved_then = known["begin"].partition("/")
        summary_now, _, saved_now = stamp(run_dir).partition("/")
        new, fresh, status = saved_now != saved_then, summary_now != summary_then, _status(run_dir)
        try:
            past = json.loads(memory.read_text())
        except (OSError, ValueError):
            past = {}
        if past.get("job") != known["job"]:
            past = {}
    # What trains nothing saves nothing: each of its starts counts, those in place too.
    before = past.get("idle", 0) if run_dir is not None else int(known.get("restarts") or 0) + int(known["again"] or 0)
    counts = tuple(int(c) for n, r in _spread(known.get("tasks", "")) for c in [n] * r)
    start = Start(
        code=int(known["code"]) if known["code"] else None,
        log=log,
        run_dir=known.get("run_dir") or None,
        status=status,
        fresh=fresh,
        nodes=tuple(known.get("nodes", "").split()),
        tasks=counts,
        alive=frozenset(known["alive"].split()) if "alive" in known else None,
        left_out=tuple(known.get("left_out", "").split()),
        min_nodes=int(known["min_nodes"]) if known.get("min_nodes") else None,
        idle=0 if new else before + 1,
        in_blocks=(known.get("distribution") or "block").startswith("block"),
        most=int(known.get("most") or 20),
        suspect=None if new else past.get("suspect"),
        left=seconds_of(known.get("left", "").strip()),
        grace=float(known.get("grace") or 300),
        state=known.get("state") or "RUNNING",
        requeued=int(known.get("restarts_now") or 0) > int(known.get("restarts") or 0),
    )
    return start, memory


def _spread(tasks_per_node: str) -> list[tuple[int, int]]:
    """SLURM's `4(x2),3` -> (4, 2), (3, 1)."""
    return [(int(n), int(r or 1)) for n, r in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node)]


def _remember(file: Path, history: Mapping[str, object]) -> None:
    try:
        file.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        file.write_text(json.dumps(history) + "\n")
    except OSError as error:  # a restart too many is better than none
        print(f"dpdist job: cannot count restarts in {file}: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    lines = sys.stdin.buffer.read().decode(errors="replace").splitlines() if sys.argv[1] == "judge" else []
    print("\n".join(main(sys.argv[1:], lines)))
