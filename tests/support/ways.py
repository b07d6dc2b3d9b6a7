"""How each command and block of the pages is executed: by which test, or why by none.

A page's entries are tried in order; each is a pattern for the beginning of `Shown.name` and one of

- a name: the test under tests/docs or tests/slurm that takes it from the page (fixture `given`) and executes it;
- `By`: another test does the same, and its source, or what of tests/ it calls, has the words that matter;
- `Cannot`: no test can, with the reason, and the test that executes the shortened form, where there is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class By:
    """`test` is FILE::FUNCTION below tests/; each of `words` is on the page and in the test."""

    test: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Cannot:
    reason: str
    shortened: str | None = None


DIGITS, PLANS, PYTHON = "test_digits_from_a_clone_to_who_gets_the_model", "test_what_plans_cost", "test_python"
TASKS, MODELS, DATA = "test_tasks", "test_a_language_model_that_is_adapted_in_private", "test_data"
BIT = "test_a_bit_with_adapters_beside_its_convolutions"
COMPOSING, SEEN, PLOT = "test_composing", "test_what_people_see", "test_what_is_drawn_of_kept_numbers"
SLURM = "test_the_pages_on_a_virtual_cluster"

SITE = By("docs/test_docs.py::test_the_site_builds_without_a_warning", ("api.html",))
CLUSTER = By("slurm/test_virtual_cluster.py::test_up_is_idempotent_and_down_removes_every_trace", ("up", "down"))
EIGHTY = By(
    "slurm/test_train_script.py::test_eighty_processes_on_twenty_nodes",
    ("train_80gpu.sh", "configs/digits.yaml", "cluster.devices_per_process=1"),
)
SWEEP = "slurm/test_scaling_under_slurm.py::test_a_sweep_submits_each_point_once_although_it_is_requeued"
BENCH = "launch/test_measure_clipping.py::test_files_and_table_hold_what_was_measured"
GPU = "launch/test_gpu_script.py::test_the_command_measures_on_a_processor_what_it_measures_on_a_gpu"

Way = str | By | Cannot
NO_GPU = Cannot("needs a GPU", GPU)
WAYS: dict[str, list[tuple[str, Way]]] = {
    "README.md": [
        (
            r"bash tests/run\.sh",
            Cannot(
                "is all tests, this one among them", "test_lanes.py::test_all_lanes_pass_and_the_last_line_has_the_sum"
            ),
        ),
        (r"bash launch/quickstart|\[text\] (\+ dpdist train|config\.yaml)|cp slurm|source slurm", DIGITS),
        (r"dpdist (train|export|predict|verify)|\[text\] dpdist: error|\[python\] # mytask|\[yaml\] data", DIGITS),
        (r"srun|sbatch --nodes=2|dpdist submit|\[python\] from launch", SLURM),
        (
            r"sbatch slurm/train_80gpu.sh --run-dir",
            By(
                "slurm/test_default_config.py::"
                "test_a_tiny_vit_is_fine_tuned_from_an_archive_of_the_official_format_also_with_a_gpu_per_task",
                ("train_80gpu.sh", "--run-dir"),
            ),
        ),
        (r"dpdist scaling", By(SWEEP, ("scaling", "--nodes", "--arms"))),
        (r"eval |bash slurm/virtual_cluster.sh down", CLUSTER),
        (r"sbatch slurm/train_80gpu.sh configs/digits", EIGHTY),
        (r"dpdist (settings|privacy|plan|bench roofline)|\[yaml\] optimizer", PLANS),
        (r"\[python\] (from dpdist.mechanism|import)", PYTHON),
    ],
    "api.md": [(r"\[{eval-rst}\]", SITE)],
    "index.md": [(r"\[{toctree}\]", SITE)],
    "audit.md": [
        (
            r"dpdist audit",
            Cannot(
                "takes 3 to 7 minutes",
                "audit/test_audit_command.py::test_the_short_form_prints_one_object_and_refutes_nothing",
            ),
        ),
        (
            r"pytest -s tests/audit/test_planted_bugs",
            By(
                "audit/test_planted_bugs.py::test_a_bug_of_the_mechanism_is_caught",
                ("tests/audit/test_planted_bugs.py",),
            ),
        ),
    ],
    "benchmarks.md": [
        (r"dpdist bench clipping --models vit-b --format", Cannot("needs a GPU and the extra `peers`", GPU)),
        (r"pip install|dpdist bench clipping --peers", Cannot("downloads the extra `peers`, gigabytes of it", BENCH)),
        (r"dpdist bench clipping", Cannot("takes minutes to hours on full models", BENCH)),
        (r"dpdist bench roofline", PLANS),
        (
            r"dpdist bench memory",
            Cannot(
                "needs JAX's CUDA plugin",
                "launch/test_measure_memory.py::test_bytes_are_those_of_the_program_that_the_bench_runs",
            ),
        ),
        (r"bash launch/gpu.sh --tiny", By(GPU, ("gpu.sh", "--tiny"))),
        (r"bash launch/gpu.sh", NO_GPU),
    ],
    "choosing.md": [
        (
            r"python .*/measure.py",
            Cannot("78 trainings, many minutes", "docs/test_pages_run.py::test_what_is_drawn_of_kept_numbers"),
        ),
        (r"python .*/plot.py", PLOT),
    ],
    "composing.md": [
        (
            r"dpdist export",
            By("release/test_signature.py::test_a_run_is_exported_signed_or_not_at_all", ("export", "--to")),
        ),
        (r"dpdist|\[yaml\]", COMPOSING),
    ],
    "data.md": [
        (r"\[python\] # (mydata)|\[python\] import dpdist|\[yaml\] # frame", PYTHON),
        (r"\[yaml\]|\[python\] # cells|\[text\]|dpdist data describe", DATA),
    ],
    "faults.md": [
        (
            r"python -m tests.faults.matrix",
            Cannot(
                "184 disturbed runs, hours",
                "faults/test_faults.py::"
                "test_a_disturbed_run_ends_or_goes_on_in_time_and_ends_bit_for_bit_as_if_left_alone",
            ),
        ),
        (
            r"python -m tests.faults.soak",
            Cannot(
                "200 kills, fifty minutes",
                "faults/test_soak.py::"
                "test_a_run_that_is_killed_at_random_again_and_again_ends_bit_for_bit_as_if_left_alone",
            ),
        ),
    ],
    "first-day.md": [(r"cp slurm|source slurm", DIGITS), (r"sbatch|dpdist", SLURM)],
    "giving.md": [(r"dpdist|ls|head|python", DIGITS)],
    "models.md": [
        (r"\[yaml\] # bit|dpdist .*\bbit\b", BIT),
        (r"\[python\] # prepare|\[yaml\]|python prepare|dpdist", MODELS),
        (
            r"\[python\] model = ",
            By(
                "models/test_foreign.py::test_transformers_loads_it_and_gives_the_same_outputs",
                ("from_pretrained",),
            ),
        ),
    ],
    "observing.md": [
        (r"dpdist report|\[json\]|\[yaml\]|\[text\]", SEEN),
        (
            r"dpdist status$",
            By(
                "slurm/test_train_script.py::test_a_job_that_waits_is_seen_before_it_has_a_directory",
                ("status", "sbatch", "JobHeldUser", "--run-dir", "train_80gpu.sh", "training.steps=6"),
            ),
        ),
        (r"dpdist status", SLURM),
        (
            r"dpdist logs",
            By(
                "launch/test_logs.py::test_of_a_submitted_job_each_rank_has_a_file_and_the_newest_job_counts",
                ("logs", "--rank"),
            ),
        ),
    ],
    "planning.md": [(r"dpdist plan", PLANS)],
    "quickstart.md": [(r"\[python\]", PYTHON), (r"dpdist plan", PLANS), (r"bash|dpdist|\[text\]", DIGITS)],
    "roofline.md": [(r"dpdist bench roofline", PLANS)],
    "scaling.md": [
        (
            r"dpdist scaling configs/digits",
            By(
                "launch/test_scaling_here.py::test_a_real_sweep_interrupted_and_taken_up_again",
                ("scaling", "--nodes", "1,2", "--cluster", "local"),
            ),
        ),
        (r"(dpdist scaling configs/fashion|sbatch slurm/scaling.sh)", By(SWEEP, ("--nodes", "--gpus-per-node"))),
        (r"dpdist scaling --collect", PLOT),
    ],
    "slurm.md": [
        (r"cp slurm|source slurm", DIGITS),
        (r"sbatch slurm/train_80gpu.sh configs/digits", EIGHTY),
        (
            r"dpdist submit .*--sweep",
            By(
                "slurm/test_sweep_under_slurm.py::"
                "test_one_job_of_an_array_is_requeued_alone_and_the_same_line_follows_all_to_the_end",
                ("submit", "--nodes", "--run-dir", "--sweep", "optimizer.learning_rate=0.1,0.3,1", "--at-most"),
            ),
        ),
        (r"\[text\] point", COMPOSING),
        (r"eval |bash slurm/virtual_cluster.sh down", CLUSTER),
        (r"sbatch|dpdist submit|\[python\]", SLURM),
    ],
    "tasks.md": [(r"\[python\]", PYTHON), (r"dpdist diagnose", DIGITS), (r"dpdist train|\[yaml\]", TASKS)],
    "tuning.md": [
        (
            r"dpdist tune .*--nodes",
            By(
                "slurm/test_tune_under_slurm.py::test_a_search_whose_launcher_is_killed_twice_takes_up_its_jobs_and_releases_one_model",
                ("tune", "--space", "--trials", "--run-dir", "--nodes", "--at-most"),
            ),
        ),
        (
            r"dpdist tune",
            By(
                "launch/test_tune_here.py::test_a_search_that_is_killed_twice_releases_one_model_and_what_the_whole_costs",
                ("tune", "--space", "--trials", "--run-dir"),
            ),
        ),
        (r"cat space|dpdist plan", PLANS),
    ],
    "verify.md": [(r"dpdist|echo|sed", DIGITS)],
}


def way(page: str, name: str) -> Way | None:
    """The first entry that fits; None where there is none."""
    return next((way for pattern, way in WAYS.get(page, []) if re.match(pattern, name)), None)
