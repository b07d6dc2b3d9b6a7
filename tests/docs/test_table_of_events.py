"""Each line of docs/slurm.md's table of events is shown by a test: which one, and that it is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT, DEATHS, JOB = "slurm/test_train_script.py", "slurm/test_deaths.py", "slurm/test_job_script.py"
DEAD, REFUSED, PREFLIGHT = "slurm/test_dead_node.py", "slurm/test_script_refusals.py", "cluster/test_preflight.py"
FAULTS = "faults/test_faults.py::test_a_disturbed_run_ends_or_goes_on_in_time_and_ends_bit_for_bit_as_if_left_alone"
CAUSE = f"{DEATHS}::test_the_last_line_names_the_cause_and_not_a_victim"

#: The first cell of each line -> the tests below tests/, as `file::function`, with `[parameter]` where one is meant.
SHOWN_BY = {
    "preemption, `scancel --signal=TERM JOB`": (
        f"{SCRIPT}::test_told_to_leave_in_three_ways_it_ends_as_if_undisturbed",
        f"{CAUSE}[preemption]",
    ),
    "the time limit approaches": (f"{SCRIPT}::test_told_to_leave_in_three_ways_it_ends_as_if_undisturbed",),
    "`scontrol requeue JOB`": (
        f"{SCRIPT}::test_told_to_leave_in_three_ways_it_ends_as_if_undisturbed",
        f"{CAUSE}[requeue]",
    ),
    "TERM during start-up, evaluation or a save": (f"{SCRIPT}::test_told_to_leave_in_the_midst_of",),
    "`--signal=USR1@...`, USR2, or a notice to the batch shell alone (`--signal=B:TERM@...`)": (
        f"{SCRIPT}::test_a_notice_to_the_batch_shell_or_by_another_signal_saves_too",
    ),
    "a rank dies by a signal, or the watchdog ends it": (
        f"{SCRIPT}::test_after_the_death_of_a_rank_the_job_starts_again_by_itself",
        f"{DEATHS}::test_a_death_that_comes_back_with_all_nodes_in_order_is_given_up",
    ),
    "a node dies": (
        f"{DEAD}::test_nodes_die_at_start_up_and_in_a_step_and_in_a_save_and_the_run_goes_on_without_them",
        f"{DEATHS}::test_the_dead_node_is_left_out_and_the_others_keep_their_ranks",
    ),
    "two starts in a row die on the same node, which answers": (
        f"{DEATHS}::test_a_node_that_answers_but_has_ended_two_starts_is_left_out",
    ),
    "the first node of the job dies": (
        f"{DEAD}::test_the_first_node_dies_with_the_batch_script_and_slurm_requeues_the_job",
    ),
    "SLURM gives a node up before JAX does": (f"{CAUSE}[node-failure]",),
    "a rank does not come at all": (f"{REFUSED}::test_a_rank_that_never_comes_is_named_with_its_node",),
    "the run directory is not shared, a node cannot write there, or several processes get one name there": (
        f"{PREFLIGHT}::test_a_directory_that_is_not_fit_is_named_with_the_node_on_all_processes",
    ),
    "a node's all-reduce is wrong, or slower than `cluster.least_bandwidth`": (
        f"{PREFLIGHT}::test_a_rank_that_gets_a_wrong_sum_is_named_and_so_is_a_fault_of_all",
        f"{PREFLIGHT}::test_a_slow_connection_is_named",
        f"{DEATHS}::test_a_node_that_the_preflight_blames_is_left_out_and_three_such_in_a_row_end_it",
    ),
    "a rank fails by an exception": (f"{CAUSE}[exception-rank-0]",),
    "a rank is alive but stuck": (
        f"{CAUSE}[watchdog]",
        "cluster/test_watchdog.py::test_a_stuck_process_exits_124_and_says_where",
    ),
    "out of memory (killed by SLURM)": (f"{CAUSE}[memory]",),
    "`scancel JOB`": (f"{SCRIPT}::test_a_cancelled_job_says_so_last", f"{CAUSE}[scancel]"),
    "the time limit, where a rank cannot leave": (f"{CAUSE}[time-limit]",),
    "a rank is slow": (
        "cluster/test_straggler.py::test_a_slow_rank_is_reported_by_rank_and_host_and_only_on_process_0",
    ),
    "a job resumes a run whose node died": (
        "cluster/test_lease.py::test_a_silent_owner_elsewhere_is_replaced_after_the_timeout_and_not_before",
        "cluster/test_lease.py::test_a_killed_owner_of_this_host_is_replaced_at_once",
    ),
    "the start before of the same job is still dying": (
        "cluster/test_lease.py::test_a_former_start_of_the_same_slurm_job_is_waited_for",
        f"{DEAD}::test_the_first_node_dies_with_the_batch_script_and_slurm_requeues_the_job",
    ),
    "the disk is full": (
        f"{FAULTS}[disk full]",
        "run/test_failed_saves.py::test_a_disk_that_fills_at_any_moment_costs_no_checkpoint",
    ),
    "20 starts in a row (`DPDIST_MAX_RESTARTS`) saved nothing new": (
        f"{DEATHS}::test_the_budget_counts_only_starts_that_saved_nothing_new",
    ),
    "`--time` at or below the notice of 300 s": (f"{REFUSED}::test_a_time_limit_that_the_notice_fills",),
    "`--time` too short for start-up and one step": (
        f"{DEATHS}::test_a_time_limit_that_leaves_no_time_for_a_step_ends_the_loop",
    ),
    "the site file fails": (
        f"{JOB}::test_a_site_file_is_read_as_a_login_shell_reads_it",
        f"{JOB}::test_a_site_file_that_fails_is_named_with_its_line",
    ),
    "bad input": (f"{REFUSED}::test_an_unknown_config", f"{CAUSE}[bad-input]"),
    "all processes return 0, but `summary.json` does not say that the run has ended": (
        f"{JOB}::test_code_0_without_an_ended_run_is_a_failure",
        f"{REFUSED}::test_a_command_that_is_not_dpdist_and_returns_0",
    ),
}


def test_every_line_has_a_test_and_no_other_line_has() -> None:
    text = (REPOSITORY / "docs" / "slurm.md").read_text()
    _, _, table = text.partition("| event | what happens |\n")
    lines = [line.split(" | ")[0].removeprefix("| ") for line in table.partition("\n\n")[0].splitlines()[1:]]
    assert lines == list(SHOWN_BY)


@pytest.mark.parametrize("shown", sorted({test for tests in SHOWN_BY.values() for test in tests}))
def test_the_test_is_there(shown: str) -> None:
    path, _, name = shown.partition("::")
    function, _, parameter = name.rstrip("]").partition("[")
    text = (REPOSITORY / "tests" / path).read_text()
    assert re.search(rf"^def {function}\(", text, re.MULTILINE)
    assert parameter in text
