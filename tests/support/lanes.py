"""Which lane each test runs in: the one place that decides it.

`fast`     pure tests: no process is started and little is compiled. `bash tests/run.sh fast` runs them alone.
`compute`  numerical tests in this process: they compile, and keep a core busy.
`models`   the same, of models and of programs made of them: a lane of its own, or `compute` would be the last to end.
`wait`     tests that start processes here and wait for them: jobs, leases, watchdogs, random kills.
`hosts`    tests of jobs on hosts made for them, which wait still more: a virtual SLURM, networks and disks that fail.

The longest entry of `LANES` that a test lies under gives its lane; a marker of a lane's name on a test overrides it. A
test without a lane is an error of collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

FAST, COMPUTE, MODELS, WAIT, HOSTS = NAMES = ("fast", "compute", "models", "wait", "hosts")
#: The processes of a full run, side by side, and the tests of each.
SIDES = {COMPUTE: (FAST, COMPUTE), MODELS: (MODELS,), WAIT: (WAIT,), HOSTS: (HOSTS,)}
#: Which of them yield the cores to the others, whose tests have bounds in seconds.
YIELDING = (COMPUTE, MODELS)

LANES = {
    "tests/attacks": WAIT,
    "tests/attacks/test_accumulation.py": COMPUTE,
    "tests/attacks/test_odd_uses.py": COMPUTE,
    "tests/attacks/test_joint_claims.py": COMPUTE,
    "tests/attacks/test_leaving_the_plan.py": FAST,
    "tests/attacks/test_leaving_the_registry.py": FAST,
    "tests/attacks/test_names_from_data.py": FAST,
    "tests/attacks/test_threat_model.py": FAST,
    "tests/attacks/test_mixing_primitives.py": COMPUTE,
    "tests/audit": COMPUTE,
    "tests/audit/test_audit_command.py": WAIT,
    "tests/audit/test_bounds.py": FAST,
    "tests/audit/test_one_run.py": FAST,
    "tests/cluster": WAIT,
    "tests/cluster/test_environment.py": FAST,
    "tests/cluster/test_straggler.py": FAST,
    "tests/cluster/test_straggler.py::test_a_slow_rank_is_reported_by_rank_and_host_and_only_on_process_0": WAIT,
    "tests/cluster/test_straggler.py::test_equally_fast_ranks_are_not_reported": WAIT,
    "tests/cluster/test_straggler.py::test_a_rank_with_nothing_to_do_is_not_compared": WAIT,
    "tests/cluster/test_straggler.py::test_one_process_is_never_timed": WAIT,
    "tests/cluster/test_straggler.py::test_a_lost_coordination_service_is_no_error": WAIT,
    "tests/config": FAST,
    "tests/data": FAST,
    "tests/data/test_readers.py": WAIT,
    "tests/data/test_datasets.py::test_digits_are_those_of_scikit_learn_read_without_importing_it": WAIT,
    "tests/docker": WAIT,
    "tests/docs": FAST,
    "tests/faults": HOSTS,
    "tests/faults/test_soak.py": WAIT,
    "tests/joint": FAST,
    "tests/joint/test_views.py": COMPUTE,
    "tests/joint/test_registry.py": WAIT,
    "tests/launch": WAIT,
    "tests/launch/test_coming_jobs.py": FAST,
    "tests/launch/test_data_describe.py": FAST,
    "tests/launch/test_logs.py": FAST,
    "tests/launch/test_logs.py::test_it_follows_until_the_run_has_ended": WAIT,
    "tests/launch/test_measure_clipping.py": COMPUTE,
    "tests/launch/test_measure_gpu.py": COMPUTE,
    "tests/launch/test_measure_in_time.py": COMPUTE,
    "tests/launch/test_measure_memory.py": COMPUTE,
    "tests/launch/test_roofline.py": COMPUTE,
    "tests/launch/test_scaling_arms.py": COMPUTE,
    "tests/launch/test_scaling_model.py": FAST,
    "tests/launch/test_scaling_report.py": FAST,
    "tests/launch/test_status.py": FAST,
    "tests/launch/test_status.py::test_it_answers_at_once_without_jax_or_numpy": WAIT,
    "tests/launch/test_tune.py": FAST,
    "tests/launch/test_tune_asked.py": FAST,
    "tests/mechanism": COMPUTE,
    "tests/mechanism/test_accounting.py": FAST,
    "tests/mechanism/test_composition.py": FAST,
    "tests/mechanism/test_grid.py": FAST,
    "tests/mechanism/test_incarnation.py": FAST,
    "tests/mechanism/test_keys.py": FAST,
    "tests/mechanism/test_ledger.py": FAST,
    "tests/mechanism/test_noise.py": FAST,
    "tests/mechanism/test_sampling.py": FAST,
    "tests/mechanism/test_assignment.py": FAST,
    "tests/models": MODELS,
    "tests/program": MODELS,
    "tests/program/test_device_rates.py": FAST,
    "tests/release": WAIT,
    "tests/report": FAST,
    "tests/run": COMPUTE,
    "tests/run/test_calibration.py": FAST,
    "tests/run/test_events.py": FAST,
    "tests/run/test_failed_saves.py": WAIT,
    "tests/run/test_targets.py": FAST,
    "tests/run/test_fingerprints.py": FAST,
    "tests/run/test_goodput.py": FAST,
    "tests/run/test_metrics.py": FAST,
    "tests/run/test_notices.py": WAIT,
    "tests/run/test_private_log.py": FAST,
    "tests/slurm": HOSTS,
    "tests/slurm/test_deaths.py": FAST,
    "tests/test_cli.py": FAST,
    "tests/test_cli.py::test_dpdist_train_is_the_function_whatever_was_imported_before": WAIT,
    "tests/test_cli.py::test_questions_are_answered_without_starting_jax": WAIT,
    "tests/test_lanes.py": WAIT,
    "tests/test_rooms.py": FAST,
    "tests/test_rooms.py::test_the_mechanism_loads_no_other_room": WAIT,
    "tests/trainer": WAIT,
}


def lane_of(test: str) -> str | None:
    """The lane of a test, or of a file, by its pytest id; None where no entry covers it."""
    covering = [place for place in LANES if re.match(rf"{re.escape(place)}($|/|::|\[)", test)]
    return LANES[max(covering, key=len)] if covering else None


def files(root: Path, lane: str) -> list[str]:
    """The test files below the repository `root` whose lane this is."""
    found = (path.relative_to(root).as_posix() for path in sorted((root / "tests").rglob("test_*.py")))
    return [path for path in found if lane_of(path) == lane]


def mark(items: Iterable[pytest.Item]) -> None:
    """Give every test the marker of its lane.

    Raises:
        pytest.UsageError: a test belongs to no lane, or to two.
    """
    wrong = []
    for item in items:
        chosen = {name for name in NAMES if item.get_closest_marker(name)}
        if not chosen and (lane := lane_of(item.nodeid)) is not None:
            item.add_marker(lane)
        elif len(chosen) != 1:
            wrong.append(f"{item.nodeid}: {' and '.join(sorted(chosen)) or 'no lane'}")
    if wrong:
        raise pytest.UsageError("give each test one lane, in tests/support/lanes.py:\n  " + "\n  ".join(wrong))
