"""What a failed run tells: nothing of a checkpoint that was never committed."""

from __future__ import annotations

from jobs import EVERY, Jobs, config_with


def test_the_summary_of_a_failed_run_has_no_accuracy_of_a_checkpoint_that_was_never_committed(jobs: Jobs) -> None:
    """Such a step is taken again, with its outcome known to whoever has read the summary."""
    run = jobs.new("uncommitted")
    told = jobs.call("fail_once_evaluated", config=config_with(run.root), step=2 * EVERY)
    assert told["failed"] == 2 * EVERY
    (first, committed), (second, uncommitted) = told["measured"]
    assert (first, second) == (EVERY, 2 * EVERY)
    assert uncommitted != committed  # or it could not be told which one is shown
    assert run.accuracies in (
        {EVERY: committed["accuracy"]},
        {},
    )  # a slow disk commits the first one as the second is begun
    assert run.summary["status"] == "failed"
    assert run.summary["accuracy"] == run.accuracies.get(EVERY)
    shown = "".join(
        path.read_text(errors="replace")
        for path in run.root.rglob("*")
        if path.is_file() and "private" not in path.relative_to(run.root).parts
    )
    assert not [name for name, value in uncommitted.items() if str(value) in shown]


def test_a_run_that_fails_before_its_first_commit_has_no_accuracy(jobs: Jobs) -> None:
    run = jobs.new("first")
    told = jobs.call("fail_once_evaluated", config=config_with(run.root), step=EVERY)
    assert [step for step, _ in told["measured"]] == [EVERY]
    assert run.summary["status"] == "failed"
    assert run.summary["accuracy"] is None
    assert run.accuracies == {}
