"""Why a job ended and what comes next, from logs that real jobs wrote on the virtual cluster (tests/slurm/deaths/).

Only lines that say nothing (stacks, progress, Gloo's greetings) were removed, and paths shortened. `bad-node` alone was
written by hand: no node here is that slow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpdist_launch import failures
from dpdist_launch.slurm import deaths
from dpdist_launch.slurm.verdict import Start, judge, main, refusal_of_time, seconds_of

LOGS = Path(__file__).with_name("deaths")
TWO, THREE = ("n1", "n2"), ("n1", "n2", "n3")


def start(log: str | None, **known: Any) -> Start:
    lines = (LOGS / f"{log}.log").read_text().splitlines() if log else []
    nodes = known.pop("nodes", TWO)
    known = {"code": 1, "run_dir": "/shared/runs/a", "idle": 1, "nodes": nodes, "tasks": (1,) * len(nodes)} | known
    return Start(log=lines, **known)


@pytest.mark.parametrize(
    ("log", "known", "action", "said"),
    [
        ("killed-rank-0", {"code": 137, "alive": TWO}, "again", "task 0 on n1: Killed; all nodes answer"),
        ("killed-rank-1", {"code": 137, "alive": TWO}, "again", "task 1 on n2: Killed; all nodes answer"),
        ("segfault-rank-0", {"code": 139, "alive": TWO}, "again", "task 0 on n1: Segmentation fault"),
        ("segfault-rank-1", {"code": 139, "alive": TWO}, "again", "task 1 on n2: Segmentation fault"),
        ("bus-error-rank-2", {"code": 135, "nodes": THREE, "alive": THREE}, "again", "task 2 on n3: Bus error"),
        (
            "node",
            {"code": None, "alive": ("n1",)},
            "requeue",
            "task 1 on n2 stopped answering (no heartbeat); n2 does not",
        ),
        ("node", {"code": None}, "probe", "task 1 on n2 stopped answering"),
        (
            "node-in-a-save",
            {"code": 134, "alive": ("n1",), "min_nodes": 1},
            "again",
            "task 1 on n2 stopped answering (no heartbeat); n2 does not answer; it starts again on the other node",
        ),
        ("node-of-three", {"code": None, "nodes": THREE, "alive": ("n1", "n3")}, "requeue", "requeued without n2"),
        (
            "node-of-three",
            {"code": None, "nodes": THREE, "alive": ("n1", "n3"), "min_nodes": 2},
            "again",
            "n2 does not answer; it starts again on the other 2 nodes",
        ),
        ("exception-rank-0", {}, "fail", "failed (exit code 1): dpdist: failed with RuntimeError; what it says is in"),
        ("bad-input", {"code": 2}, "fail", "failed (exit code 2): dpdist: error: data.path = '/nowhere'"),
        ("preempted", {"code": 75, "status": "preempted", "fresh": True}, "requeue", "preempted; requeued (start 2 of"),
        ("usr1", {"code": 138}, "requeue", "preempted; requeued"),
        ("requeue", {"code": 75, "requeued": True, "state": "COMPLETING"}, "over", "into the queue (scontrol requeue)"),
        ("scancel", {"code": 75, "state": "COMPLETING"}, "over", "cancelled (scancel, or by an administrator)"),
        ("term-to-the-batch-shell", {"code": 75}, "requeue", "preempted; requeued"),
        (
            "watchdog",
            {"code": 124, "alive": TWO},
            "again",
            "watchdog: rank 0/2 made no progress for 10 s after step 6; ",
        ),
        (
            "memory",
            {"code": 137},
            "fail",
            "out of memory (0: slurmstepd-n1: error: StepId=10024.0 exceeded memory limit",
        ),
        (
            "preemption",
            {"code": 75, "requeued": True, "status": "preempted", "fresh": True},
            "over",
            "saved; SLURM has put the job back into the queue (preempted)",
        ),
        (
            "node-failure",
            {"code": 75, "requeued": True},
            "over",
            "SLURM has put the job back into the queue (n2 failed)",
        ),
        (
            "time-limit",
            {"code": None, "state": "COMPLETING"},
            "over",
            "ended by SLURM at the time limit; submit it again",
        ),
        ("node-failure", {"code": 75, "state": "COMPLETING"}, "over", "ended by SLURM (n2 failed); submit it again"),
        (None, {"code": 1}, "fail", "the log does not say why"),
        (None, {"code": 0, "status": "finished", "fresh": True}, "done", "done"),
        (None, {"code": 0, "status": "failed", "fresh": True}, "fail", "all processes returned 0, but /shared/runs/a"),
    ],
)
def test_the_last_line_names_the_cause_and_not_a_victim(
    log: str | None, known: dict[str, Any], action: str, said: str
) -> None:
    if "alive" in known:
        known = known | {"alive": frozenset(known["alive"])}
    verdict = judge(start(log, **known))
    assert (verdict.action, said in verdict.text) == (action, True), verdict


def test_the_dead_node_is_left_out_and_the_others_keep_their_ranks() -> None:
    known: dict[str, Any] = {"code": None, "nodes": THREE, "alive": frozenset(("n1", "n3"))}
    again = judge(start("node-of-three", min_nodes=2, **known))
    assert (again.nodes, again.tasks, again.without) == (("n1", "n3"), (1, 1), ("n2",))
    assert judge(start("node-of-three", min_nodes=3, **known)).without == ("n2",)
    assert judge(start("node-of-three", min_nodes=3, **known, left_out=("n4",))).without == ("n4", "n2")
    assert judge(start("node-of-three", min_nodes=3, **known)).action == "requeue"


def test_a_node_that_answers_but_has_ended_two_starts_is_left_out() -> None:
    known: dict[str, Any] = {"code": 137, "alive": frozenset(TWO)}
    first = judge(start("killed-rank-1", **known))
    assert (first.action, first.suspect, first.without) == ("again", "n2", ())
    second = judge(start("killed-rank-1", **known, idle=2, suspect=first.suspect))
    assert (second.action, second.without) == ("requeue", ("n2",))
    assert "as at the start before" in second.text


def test_a_node_that_the_preflight_blames_is_left_out_and_three_such_in_a_row_end_it() -> None:
    known: dict[str, Any] = {"nodes": THREE, "alive": frozenset(THREE)}
    first = judge(start("bad-node", **known))
    assert (first.action, first.without) == ("requeue", ("n3",))
    assert first.text.startswith("bad node n3: the all-reduce reaches 0.2 GB/s a device, less than 1; ")
    assert "requeued without n3" in first.text
    again = judge(start("bad-node", **known, min_nodes=2))
    assert (again.action, again.nodes) == ("again", ("n1", "n2"))
    assert judge(start("bad-node", **known, idle=3)).action == "fail"


def of_lines(*log: str, **known: Any) -> Start:
    return Start(log=log, **{"code": 137, "run_dir": "/r", "idle": 1, "nodes": THREE, "tasks": (2, 2, 2)} | known)


def test_memory_that_xla_finds_elsewhere_is_no_cause() -> None:
    warning = "1: W allocator.cc] Allocator (GPU_0_bfc) ran out of memory trying to allocate 2GiB ... not a failure"
    lost = "srun: error: Node failure on n2"
    assert judge(of_lines(warning, lost, alive=frozenset(("n1", "n3")))).action == "requeue"
    for line in (
        "slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=12.0",
        "srun: error: n1: task 0: Out Of Memory",
    ):
        assert "out of memory" in judge(of_lines(line, lost)).text


def test_a_port_that_another_program_has_is_worth_another_start() -> None:
    said = (
        "0: dpdist: error: coordinator = n1:20001: rank 0/2 cannot listen there; start the job again: it gets another."
    )
    assert judge(of_lines(said, code=2)).action == "probe"
    assert judge(of_lines(said.replace("start the job again", "no"), code=2)).action == "fail"


def test_many_missing_ranks_are_lost_too() -> None:
    ranks = ", ".join(map(str, range(1, 17)))
    said = f"0: dpdist: failed: ranks [{ranks}, ...] (n2) did not come within 60 s"
    verdict = judge(of_lines(said, code=1, alive=frozenset(("n1", "n3"))))
    assert (verdict.action, verdict.without) == ("requeue", ("n2",))


def test_no_node_is_blamed_by_the_number_of_a_rank_where_ranks_are_not_in_blocks() -> None:
    lost = ("0: unhealthy (stopped sending heartbeats):", "0: 2")
    known: dict[str, Any] = {"alive": frozenset(THREE)}
    assert judge(of_lines(*lost, **known)).suspect == "n2"
    scattered = judge(of_lines(*lost, **known, in_blocks=False))
    assert (scattered.suspect, "on n" in scattered.text) == (None, False)


def test_where_the_nodes_could_not_be_asked_it_does_not_say_that_they_answer() -> None:
    assert "the nodes could not be asked" in judge(of_lines("srun: error: n2: task 2: Killed", alive=frozenset())).text
    assert judge(of_lines("srun: error: n2: task 2: Killed", alive=frozenset(), nodes=(), tasks=())).action == "fail"


def test_every_start_of_a_job_that_trains_nothing_counts() -> None:
    """Also those in the same allocation, which SLURM does not count."""
    known = {
        "code": "139", "job": "9", "run_dir": "", "begin": "", "restarts": "0", "most": "20",
        "nodes": "n1 n2", "tasks": "1(x2)", "alive": "n1 n2",
    }  # fmt: skip
    log = ["srun: error: n2: task 1: Segmentation fault"]
    said = [main(["judge", *(f"{n}={v}" for n, v in (known | {"again": str(k)}).items())], log)[0] for k in range(4)]
    assert said == ["again", "again", "fail", "fail"]
    by_time = of_lines("srun: error: n1: task 0: Exited with exit code 75", run_dir=None, code=75, left=10.0, idle=2)
    assert judge(by_time).action == "requeue"  # it may well have done a point in each


def test_nobody_answers_says_nothing_about_any_node() -> None:
    verdict = judge(start("killed-rank-1", code=137, alive=frozenset()))
    assert (verdict.action, verdict.without) == ("again", ())


def test_the_budget_counts_only_starts_that_saved_nothing_new() -> None:
    told: dict[str, Any] = {"code": 75, "status": "preempted", "fresh": True}
    assert judge(start("preempted", **told, idle=0)).action == "requeue"  # however many there were
    assert judge(start("preempted", **told, idle=19)).action == "requeue"
    spent = judge(start("preempted", **told, idle=20))
    assert (spent.action, spent.code) == ("fail", 75)
    assert "20 starts in a row have saved nothing new (DPDIST_MAX_RESTARTS)" in spent.text


def test_a_death_that_comes_back_with_all_nodes_in_order_is_given_up() -> None:
    verdict = judge(start("segfault-rank-1", code=139, alive=frozenset(TWO), idle=3))
    assert verdict.action == "fail"
    assert "task 1 on n2: Segmentation fault; 3 starts in a row have saved nothing new" in verdict.text


def test_a_time_limit_that_leaves_no_time_for_a_step_ends_the_loop() -> None:
    told: dict[str, Any] = {"code": 75, "status": "preempted", "fresh": True, "left": 290.0}
    assert judge(start("preempted", **told, idle=1)).action == "requeue"
    verdict = judge(start("preempted", **told, idle=2))
    assert verdict.action == "fail"
    assert "longer --time" in verdict.text
    assert judge(start("preempted", **told | {"left": 4000.0}, idle=2)).action == "requeue"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:00:00", 3600),
        ("1-00:00:00", 86400),
        ("2-3", 183600),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_times_as_slurm_writes_them(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


def test_a_limit_at_or_below_the_grace_is_refused() -> None:
    assert refusal_of_time("5:01", 300) is None
    assert refusal_of_time("UNLIMITED", 300) is None
    assert "--time = 5:00" in (refusal_of_time("5:00", 300) or "")


def test_the_echo_of_a_death_is_one_phrase() -> None:
    assert failures.ECHO == deaths.ECHO
