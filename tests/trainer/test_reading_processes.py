"""Runs whose examples are read by processes: the same bits as with threads, the same manners at the end."""

from __future__ import annotations

import os
import signal

from jobs import Jobs, Run, children, wait_all

BY_PROCESSES = ("data.source=userland:items", "data.worker_processes=2")


def test_the_run_is_that_of_threads_through_a_preemption_that_signals_them_too(jobs: Jobs) -> None:
    threads, run = jobs.new("by-threads"), jobs.new("by-processes")
    wait_all(jobs.ranks(threads, 2, 1, "data.source=userland:items"))
    running = jobs.ranks(run, 2, 1, *BY_PROCESSES, "data.prefetch=1", PACE="0.6")
    running[0].wait_for_step(run, 4)
    for rank in running:
        readers = children(rank.pid)
        assert len(readers) == 2
        for pid in (*readers, rank.pid):  # as SLURM does it: every process of the step
            os.kill(pid, signal.SIGTERM)
    for ended in [rank.wait() for rank in running]:
        assert ended.code == 75, ended.err
    assert run.summary["status"] == "preempted"
    wait_all(jobs.ranks(run, 2, 1, "data.source=userland:items"))  # by threads: no new incarnation
    assert run.plan
    assert run.summary["params_sha256"] == threads.summary["params_sha256"]
    assert run.accuracies == threads.accuracies


def test_what_a_record_makes_them_say_is_private(jobs: Jobs) -> None:
    run: Run = jobs.new("failing")
    ended = jobs.train(
        run, "data.source=userland:failing", "data.options={index: 501}", "data.worker_processes=1"
    ).wait()
    assert ended.code not in (0, 75)
    assert "Alice" not in ended.out + ended.err
    assert "ReadingError" in run.logs
    assert "record of Alice Example" in run.logs
