"""What a run refuses to go on with, what it may spend, and what it shows to whom."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jobs import EVERY, STEPS, Jobs, Run, config_with, lines, wait_all, wait_for

from dpdist.mechanism.accounting import epsilon
from dpdist.mechanism.keys import Keys, Secret

OWN_SECRET = "privacy.insecure_seed=null"


@pytest.fixture(scope="module")
def secretive(jobs: Jobs) -> Run:
    """A run with a real secret, killed after its last checkpoint: it can be resumed."""
    run = jobs.new("secretive")
    wait_all([jobs.train(run, OWN_SECRET)])
    return run


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["privacy.insecure_seed=null"], "privacy.insecure_seed"),
        (["privacy.delta=1e-5"], "privacy.delta"),
        (["privacy.enabled=false"], "privacy.enabled"),
        (["model.options.width=3"], "model.options"),
        (["optimizer.average_decay=0"], "optimizer.average_decay"),
        (["checkpoint.resume_step=5"], "checkpoint.resume_step"),
        (["training.steps=4"], "training.steps"),
        (["data.split_seed=1"], "data.split_seed"),
        (["data.test_fraction=0.3"], "data.test_fraction"),
    ],
)
def test_what_no_incarnation_could_go_on_with_is_refused_and_costs_nothing(
    jobs: Jobs, single: Run, change: list[str], field: str
) -> None:
    run = single.copy(jobs.new("changed").root).crash(EVERY)
    before = run.content("ledger.jsonl", "checkpoints")
    ended = jobs.train(run, *change).wait()
    assert ended.code == 2, ended.err
    assert field in ended.err
    assert run.content("ledger.jsonl", "checkpoints") == before


def test_settings_that_change_no_draw_may_change(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("allowed").root).crash(EVERY)
    wait_all(
        [
            jobs.train(
                run,
                "run.log_every=3",
                "data.prefetch=2",
                "checkpoint.keep=5",
                "data.workers=1",
                "cluster.watchdog_timeout=150",
            )
        ]
    )
    assert run.summary["params_sha256"] == single.summary["params_sha256"]


def show_the_secret(run: Run) -> None:
    (run.root / "private/secret.key").chmod(0o644)


def lose_the_ledger(run: Run) -> None:
    (run.root / "ledger.jsonl").unlink()


def lower_epsilon_in_the_ledger(run: Run) -> None:
    edited = [record | ({"epsilon": 0.01} if record["record"] == "plan" else {}) for record in run.ledger]
    run.write_ledger(edited)


def damage_the_ledger(run: Run) -> None:
    text = (run.root / "ledger.jsonl").read_text()
    (run.root / "ledger.jsonl").write_text(text.replace('"steps"', '"stops"', 1))


def edit_the_config(run: Run) -> None:
    path = run.root / "config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.5", "learning_rate: 0.4"))


@pytest.mark.parametrize(
    ("harm", "arguments", "part"),
    [
        (show_the_secret, [], "chmod 600"),
        (lose_the_ledger, [], "ledger"),
        (lower_epsilon_in_the_ledger, [], "ledger"),
        (damage_the_ledger, [], "line"),
        (edit_the_config, ["optimizer.learning_rate=0.4"], "a setting changed"),
    ],
)
def test_a_run_that_no_longer_fits_together_is_refused(
    jobs: Jobs, secretive: Run, harm: Callable[[Run], None], arguments: list[str], part: str
) -> None:
    run = secretive.copy(jobs.new("harmed").root)
    (run.root / "summary.json").unlink()
    harm(run)
    ended = jobs.train(run, OWN_SECRET, *arguments).wait()
    assert ended.code == 2, ended.err
    assert part in ended.err
    assert not (run.root / "summary.json").exists()


def test_no_step_is_taken_that_would_pass_the_budget(jobs: Jobs) -> None:
    run = jobs.new("budget")

    def cost(steps: int) -> float:
        return epsilon(sampling_probability=0.064, noise_multiplier=4.0, steps=steps, delta=1e-4).epsilon

    target = (cost(9) + cost(10)) / 2
    ended = jobs.train(run, f"privacy.target_epsilon={target}").wait()
    assert ended.code == 0
    summary = run.summary
    assert summary["status"] == "budget_exhausted"
    assert (summary["step"], summary["steps"]) == (9, STEPS)
    assert run.charged == list(range(9))
    assert summary["epsilon"] == cost(9) <= target


def spellings(key: bytes) -> list[bytes]:
    text = key.hex()
    numbers = str(list(key))[1:-1]
    encoded = base64.b64encode(key).rstrip(b"="), base64.urlsafe_b64encode(key).rstrip(b"=")
    return [key, text.encode(), text.upper().encode(), *encoded, repr(key)[2:-1].encode(), numbers.encode()]


@pytest.fixture(scope="module")
def secret_bearing(jobs: Jobs) -> tuple[Run, list[bytes]]:
    """A run of two processes with a real secret, killed and resumed, and what none of its traces may hold: the secret
    and the keys of every step, in every spelling. What the processes' arguments and environments held is in two files.
    """
    run = jobs.new("bearing")
    running = jobs.launch(run, 2, 1, OWN_SECRET, "data.prefetch=1", PACE="0.1")
    running.wait_for_step(run, 6)
    for pid in (running.pid, *running.ranks().values()):
        for name in ("cmdline", "environ"):
            (jobs.root / f"{pid}.{name}").write_bytes(Path(f"/proc/{pid}/{name}").read_bytes())
    os.kill(running.ranks()[1], signal.SIGKILL)
    running.wait()
    assert running.exit_code(1) == 128 + signal.SIGKILL
    wait_all([jobs.launch(run, 2, 1, OWN_SECRET, "optimizer.learning_rate=0.4")])
    assert jobs.command("export", str(run.root), "--to", str(run.root / "given")).wait().code == 0
    key = (run.root / "private/secret.key").read_bytes()
    assert len(key) == 32
    held = spellings(key)
    for plan in run.plans:
        keys = Keys(Secret(key), bytes.fromhex(plan["nonce"]))
        for step in range(STEPS):
            for derived in (keys.sampling(step), keys.noise(step, 1)):
                held += spellings(derived.tobytes())[:3]
    return run, held


def test_the_secret_and_its_keys_are_in_no_file_output_argument_or_environment(
    secret_bearing: tuple[Run, list[bytes]], jobs: Jobs
) -> None:
    run, held = secret_bearing
    traces = [
        *run.root.rglob("*"),
        *(path for kind in ("err", "out", "cmdline", "environ") for path in jobs.root.glob(f"*.{kind}")),
    ]
    files = [path for path in traces if path.is_file() and path.name != "secret.key"]
    kinds = {path.suffix or path.parent.name for path in files}
    assert {".jsonl", ".log", ".cmdline", ".environ", ".safetensors", ".md", ".err"} <= kinds
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in held), path


def test_private_files_are_the_owners_alone(secretive: Run) -> None:
    private = secretive.root / "private"
    for path in [private, *private.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.parent != private, path
    for name in ("secret.key", "diagnostics.jsonl", "logs/rank-0.log"):
        assert stat.S_IMODE((private / name).stat().st_mode) == 0o600


def test_what_depends_on_the_sample_is_under_private_alone(secretive: Run) -> None:
    """A column of public numbers, and none of those that tell of the sample or the gradients."""
    assert [("seconds_to_first_step" in record) for record in secretive.metrics].count(True) == 1
    assert {key for record in secretive.metrics for key in record} == {
        "step",
        "epsilon",
        "examples_per_second",
        "seconds",
        "seconds_to_first_step",
        "accuracy",
        "loss",
    }
    first: dict[float | None, int] = {}
    for record in secretive.metrics:
        if "seconds" in record:
            first.setdefault(record["seconds"], record["step"])
    # With a record every second step, the clock is read after ten or more: not at the end, after sixteen.
    assert list(first.values()) == [2, 10]
    assert next(iter(first)) is None
    realised = [record["examples"] for record in secretive.diagnostics]
    assert len(set(realised)) > 5  # a Poisson sample has no fixed size
    assert {"clipped", "not_finite", "norm_sum", "microbatches"} <= secretive.diagnostics[0].keys()


def test_the_summary_holds_what_scripts_rely_on(secretive: Run, single: Run) -> None:
    assert secretive.summary.keys() >= {
        "status",
        "step",
        "steps",
        "epsilon",
        "target_epsilon",
        "delta",
        "noise_multiplier",
        "sampling_probability",
        "clip_norm",
        "accuracy",
        "examples_per_second",
        "processes",
        "devices",
        "incarnation",
        "guarantee",
        "params_sha256",
    }
    assert secretive.summary["guarantee"] == "holds"
    assert "insecure_seed" in single.summary["guarantee"]
    assert secretive.summary["params_sha256"] != single.summary["params_sha256"]


def test_plots_are_pictures(single: Run) -> None:
    for name in ("accuracy", "epsilon", "throughput"):
        content = (single.root / f"plots/{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_the_plain_arm_trains_through_the_same_loop_to_a_better_model(jobs: Jobs, single: Run) -> None:
    run = jobs.new("plain")
    wait_all([jobs.train(run, "privacy.enabled=false")])
    summary = run.summary
    assert summary["status"] == "finished"
    assert summary["epsilon"] is None
    assert summary["guarantee"].startswith("none")
    assert summary["accuracy"] > single.summary["accuracy"]


def test_accuracy_is_never_shown_before_its_checkpoint_is_there(jobs: Jobs) -> None:
    run = jobs.new("watched")
    running = jobs.train(run, "training.evaluate_every=1", PACE="0.05")
    seen: set[int] = set()

    def ended() -> bool:
        for step in run.accuracies:
            assert (run.root / "checkpoints" / str(step)).is_dir()
            seen.add(step)
        return (run.root / "summary.json").exists()

    wait_for(ended)
    assert running.wait().code == 0
    assert len(seen) > 3


def test_a_record_that_cannot_be_read_ends_the_run_and_is_quoted_in_private_alone(jobs: Jobs) -> None:
    run = jobs.new("mishap")
    ended = jobs.train(run, "data.source=userland:failing", "data.options.index=500").wait()
    assert ended.code == 1
    assert "Alice" not in ended.err + ended.out
    assert "private/logs/rank-0.log" in ended.err
    assert "Alice Example" in run.logs
    assert run.summary["status"] == "failed"
    public = [path for path in run.root.rglob("*") if path.is_file() and "private" not in path.parts]
    assert not any(b"Alice" in path.read_bytes() for path in public)


def test_the_rank_that_the_others_wait_for_is_named_in_private_alone(jobs: Jobs) -> None:
    run = jobs.new("slow")
    given = ("cluster.devices_per_process=1", "training.steps=120", "checkpoint.every_steps=100", "data.prefetch=1")
    wait_all(
        [jobs.train(run, *given, **identity, PACE=f"0.0{rank * 5}") for rank, identity in enumerate(jobs.identities(2))]
    )
    reports = lines(run.root / "private/stragglers.jsonl")
    assert reports
    for report in reports:
        assert (report["straggler"], report["host"]) == (1, socket.gethostname())
        assert 0.5 < report["share_of_step"] <= 1
    public = [path for path in run.root.rglob("*") if path.is_file() and "private" not in path.parts]
    assert not any(b"straggler" in path.read_bytes() for path in public)


def test_a_second_job_on_a_live_run_is_refused_and_the_first_goes_on(jobs: Jobs, single: Run) -> None:
    run = jobs.new("twice")
    running = jobs.train(run, "data.prefetch=1", PACE="0.3")
    running.wait_for_step(run, 2)
    ended = [rank.wait() for rank in jobs.ranks(run, 2, 1)]
    for each in ended:
        assert each.code == 2
        assert "is in use by process" in each.err
    assert running.wait().code == 0
    assert run.summary["params_sha256"] == single.summary["params_sha256"]
    assert run.charged == list(range(STEPS))


def test_a_job_that_has_lost_the_run_stops_before_it_charges_saves_or_says_anything(jobs: Jobs) -> None:
    """As one that was frozen for long: another has taken over, and this one wakes."""
    run = jobs.new("usurped")
    running = jobs.train(run, "data.prefetch=1", PACE="0.3")
    running.wait_for_step(run, 1)
    held = json.loads((run.root / "private/lease.1").read_text())
    (run.root / "private/lease.2").write_text(json.dumps(held | {"owner": "0" * 32}))
    ended = running.wait()
    assert ended.code == 1
    assert "another job has taken" in ended.err
    assert run.charged == list(range(EVERY))
    assert run.checkpoints == [0]
    assert not (run.root / "summary.json").exists()


def test_not_even_the_private_log_holds_the_secret(jobs: Jobs) -> None:
    run = jobs.new("leaking")
    given = ("data.source=userland:leaking", f"data.options.run={run.root}")
    ended = jobs.train(run, OWN_SECRET, *given).wait()
    assert ended.code == 1
    assert re.search(r"variables: key=b['\"]\(secret\)['\"]", run.logs)  # as Python quotes these bytes
    forms = spellings((run.root / "private/secret.key").read_bytes())
    assert not any(form in text.encode("latin-1", "replace") for form in forms for text in (run.logs, ended.err))


def test_examples_with_nan_add_nothing_and_the_parameters_stay_finite(jobs: Jobs, tmp_path: Path) -> None:
    run = jobs.new("nan")
    wait_all([jobs.train(run, "data.source=userland:with_nans", f"data.options.rows={list(range(0, 1000, 7))}")])
    assert sum(record["not_finite"] for record in run.diagnostics) > 10
    assert run.summary["accuracy"] > 0.4


def test_parameters_that_do_not_train_stay_and_the_others_move(jobs: Jobs, single: Run, tmp_path: Path) -> None:
    runs = {name: jobs.new(name) for name in ("frozen", "initial")}
    only_some = ("model.trainable=[a, d]", "optimizer.average_decay=0")
    wait_all([jobs.train(runs["frozen"], *only_some), jobs.train(runs["initial"], *only_some, "training.steps=1")])
    roots = {name: str(run.root) for name, run in runs.items()}
    told = jobs.call("load", runs=roots, to=str(tmp_path))
    assert told["frozen"]["accuracy"] == pytest.approx(runs["frozen"].summary["accuracy"])
    frozen, initial = (np.load(tmp_path / f"{name}.npz") for name in ("frozen", "initial"))
    for name in "abcd":
        assert np.array_equal(frozen[name], initial[name]) == (name in "bc"), name
    # There is nothing left to do with the others.
    shown = ("events.jsonl", "config.yaml", "summary.json", "ledger.jsonl", "private/ranks.json")
    before, logged = [(runs["frozen"].root / name).read_bytes() for name in shown], runs["frozen"].logs
    ended = jobs.train(runs["frozen"], "optimizer.average_decay=0").wait()
    assert ended.code == 2
    assert "model.trainable" in ended.err
    assert [(runs["frozen"].root / name).read_bytes() for name in shown] == before
    (line,) = runs["frozen"].logs.removeprefix(logged).splitlines()
    assert "model.trainable" in line


@pytest.mark.parametrize("method", ["ghost", "bookkeeping", "per_example"])
def test_a_clipping_method_changes_the_parameters_by_rounding_alone(
    jobs: Jobs, single: Run, tmp_path: Path, method: str
) -> None:
    run = jobs.new(method)
    wait_all([jobs.train(run, f"training.clipping={method}")])
    assert run.digests == single.digests
    jobs.call("load", runs={"other": str(run.root), "auto": str(single.root)}, to=str(tmp_path))
    other, auto = (np.load(tmp_path / f"{name}.npz") for name in ("other", "auto"))
    for name in "abcd":
        assert np.abs(other[name] - auto[name]).max() < 1e-4 * np.abs(auto[name]).max()


def test_a_step_whose_sample_is_empty_is_taken_all_the_same(jobs: Jobs) -> None:
    run = jobs.new("empty")
    wait_all([jobs.train(run, "sampling.expected_batch_size=0.5")])
    assert run.summary["status"] == "finished"
    assert 0 in [record["examples"] for record in run.diagnostics]
    assert len(run.digests) == STEPS


def test_nothing_is_compiled_after_the_first_step(jobs: Jobs) -> None:
    changes = {"training": {"steps": 50}, "checkpoint": {"every_steps": 10}, "sampling": {"expected_batch_size": 90}}
    told = jobs.call("count_compilations", config=config_with(jobs.new("counted").root, **changes))
    counts = told["counts"]
    assert len(counts) > 50
    assert counts[0] > 0
    assert set(counts) == {counts[0]}
