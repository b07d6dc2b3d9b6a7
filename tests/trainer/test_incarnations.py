"""A run that goes on otherwise than it began draws anew, stays charged for all it took, and says what that costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import userland
from jobs import EVERY, STEPS, Ended, Jobs, Run, config_with

from dpdist.mechanism.accounting import epsilon
from dpdist.mechanism.composition import Phase, adaptive_epsilon
from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.sampling import poisson_sample
from dpdist.run import metrics
from dpdist.run.calibration import best_order
from dpdist.run.directory import RunDirectory

SIGMA, DELTA = 4.0, 1e-4
OWN_SECRET = "privacy.insecure_seed=null"


def planned(steps: int = STEPS) -> float:
    return epsilon(sampling_probability=0.064, noise_multiplier=SIGMA, steps=steps, delta=DELTA).epsilon


def by_filter(*phases: Phase) -> float:
    order = best_order(Phase(0.064, SIGMA, STEPS), DELTA)
    return adaptive_epsilon(phases, order=order, delta=DELTA)


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.learning_rate=0.4",
        "privacy.clip_norm=0.9",
        "privacy.noise_placement=fused",
        "training.clipping=per_example",
    ],
)
def test_a_changed_setting_begins_an_incarnation_with_noise_of_its_own(jobs: Jobs, single: Run, change: str) -> None:
    run = single.copy(jobs.new("changed").root).crash(EVERY)
    ended = jobs.train(run, change).wait()
    assert ended.code == 0, ended.err
    assert f"incarnation 1 begins at step {EVERY}" in ended.err
    assert change.partition("=")[0] in ended.err
    assert run.summary["incarnation"] == 1
    before, after = single.digests, run.digests_by_incarnation
    assert [step for incarnation, step in after if incarnation == 1] == list(range(EVERY, STEPS))
    for step in range(EVERY, STEPS):
        assert all(after[1, step][part] != before[step][part] for part in (0, 1)), step


def test_abandoned_steps_stay_charged_and_without_a_target_the_filter_states_what_all_cost(
    jobs: Jobs, single: Run
) -> None:
    run = single.copy(jobs.new("abandoned").root).crash(EVERY)  # the ledger charges the block up to 2 * EVERY
    assert jobs.train(run, "optimizer.learning_rate=0.4").wait().code == 0
    assert sorted(run.charged_by_incarnation) == [(0, step) for step in range(2 * EVERY)] + [
        (1, step) for step in range(EVERY, STEPS)
    ]
    summary = run.summary
    assert summary["charged_steps"] == STEPS + EVERY
    assert summary["status"] == "finished"
    assert summary["accountant"] == "renyi filter"
    assert summary["epsilon"] == pytest.approx(by_filter(Phase(0.064, SIGMA, STEPS + EVERY)), rel=1e-12)
    assert summary["epsilon_spent"] == pytest.approx(summary["epsilon"], rel=1e-12)
    assert summary["epsilon"] > planned(STEPS + EVERY)
    shown = metrics.read(run.root / "metrics.jsonl")
    costs = [record["epsilon"] for record in shown if record["step"] > EVERY and "accuracy" not in record]
    assert costs == sorted(costs)
    assert costs[-1] == summary["epsilon"]


def test_with_a_target_the_abandoned_steps_are_missing_at_the_end(jobs: Jobs) -> None:
    target = f"privacy.target_epsilon={planned() + 1e-6}"
    first = jobs.new("target")
    assert jobs.train(first, target).wait().code == 0
    run = first.copy(jobs.new("cut").root).crash(EVERY)
    assert jobs.train(run, target, "optimizer.learning_rate=0.4").wait().code == 0
    summary = run.summary
    assert summary["charged_steps"] == STEPS
    assert (summary["status"], summary["step"]) == ("budget_exhausted", STEPS - EVERY)
    assert summary["epsilon"] == planned() <= summary["target_epsilon"]
    assert summary["accountant"] == "pld"
    assert summary["noise_multiplier"] == SIGMA


def test_nothing_is_lost_where_nothing_was_abandoned(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("clean").root).crash(2 * EVERY)
    run.write_ledger([record for record in run.ledger if record.get("start", 0) < 2 * EVERY])
    assert jobs.train(run, "optimizer.learning_rate=0.4").wait().code == 0
    assert run.summary["charged_steps"] == STEPS
    assert run.summary["epsilon"] == planned()
    assert run.summary["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "after"),
    [
        ("privacy.noise_multiplier=8", Phase(0.064, 8.0, STEPS - EVERY)),
        ("sampling.expected_batch_size=32", Phase(0.032, SIGMA, STEPS - EVERY)),
        ("training.steps=32", Phase(0.064, SIGMA, 32 - EVERY)),
    ],
)
def test_a_changed_plan_is_composed_by_the_filter(jobs: Jobs, single: Run, change: str, after: Phase) -> None:
    run = single.copy(jobs.new("replanned").root).crash(EVERY)
    ended = jobs.train(run, change).wait()
    assert ended.code == 0, ended.err
    assert run.summary["accountant"] == "renyi filter"
    expected = by_filter(Phase(0.064, SIGMA, 2 * EVERY), after)
    assert run.summary["epsilon"] == pytest.approx(expected, rel=1e-12)


def test_a_raised_target_buys_more_steps_and_the_finished_run_goes_on(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("extended").root)
    assert run.summary["status"] == "finished"
    target = 1.3 * by_filter(Phase(0.064, SIGMA, STEPS))
    ended = jobs.train(run, f"privacy.target_epsilon={target}", "training.steps=400").wait()
    assert ended.code == 0, ended.err
    summary = run.summary
    assert summary["status"] == "budget_exhausted"
    assert STEPS < summary["step"] < 400
    assert summary["epsilon"] <= target < by_filter(Phase(0.064, SIGMA, summary["step"] + 1))


def test_without_a_noise_multiplier_the_rest_is_calibrated_to_what_is_left(jobs: Jobs) -> None:
    run = jobs.new("calibrated")
    given = ("privacy.noise_multiplier=null", "privacy.target_epsilon=1")
    assert jobs.train(run, *given).wait().code == 0
    sigma = run.summary["noise_multiplier"]
    ended = jobs.train(run, *given, "privacy.target_epsilon=2", "training.steps=32").wait()
    assert ended.code == 0, ended.err
    summary = run.summary
    assert (summary["status"], summary["step"]) == ("finished", 32)
    assert 1.99 < summary["epsilon"] <= 2
    assert summary["noise_multiplier"] != sigma


def test_an_older_checkpoint_that_is_asked_for_is_gone_back_to_once(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("older").root).crash(3 * EVERY)
    back = f"checkpoint.resume_step={EVERY}"
    ended = jobs.train(run, back).wait()
    assert ended.code == 0, ended.err
    assert f"incarnation 1 begins at step {EVERY}" in ended.err
    assert run.summary["charged_steps"] == 2 * STEPS - EVERY
    assert {path.name for path in (run.root / "abandoned").iterdir()} == {str(2 * EVERY), str(3 * EVERY)}
    assert {run.digests[step] for step in range(EVERY, STEPS)}.isdisjoint(single.digests.values())
    shown = [record["step"] for record in metrics.read(run.root / "metrics.jsonl") if "accuracy" in record]
    assert shown == list(range(EVERY, STEPS + 1, EVERY))
    before = run.ledger
    ended = jobs.train(run, back).wait()  # as a requeued job would say again
    assert "nothing to do" in ended.err
    assert run.ledger == before


def test_a_crash_within_an_incarnation_resumes_that_incarnation_bit_for_bit(jobs: Jobs, single: Run) -> None:
    change = "optimizer.learning_rate=0.4"
    undisturbed = single.copy(jobs.new("whole").root).crash(EVERY)
    assert jobs.train(undisturbed, change).wait().code == 0
    for newest in (EVERY, 2 * EVERY):
        run = undisturbed.copy(jobs.new("again").root).crash(newest)
        ended = jobs.train(run, change).wait()
        assert ended.code == 0, ended.err
        assert "begins at step" not in ended.err
        assert run.summary["params_sha256"] == undisturbed.summary["params_sha256"]
        assert run.summary["epsilon"] == undisturbed.summary["epsilon"]


@dataclass(frozen=True)
class Lost:
    run: Run
    before: Run
    ended: Ended


@pytest.fixture(scope="module")
def secretive(jobs: Jobs) -> Run:
    run = jobs.new("secretive")
    assert jobs.train(run, OWN_SECRET).wait().code == 0
    return run


def test_a_lost_secret_is_replaced_and_the_ledger_goes_on(jobs: Jobs, secretive: Run) -> None:
    run = secretive.copy(jobs.new("lost").root).crash(EVERY)
    (run.root / "private/secret.key").unlink()
    ended = jobs.train(run, OWN_SECRET).wait()
    assert ended.code == 0, ended.err
    assert "secret.key was lost" in ended.err
    secrets = [(r.root / "private/secret.key").read_bytes() for r in (run, secretive)]
    assert secrets[0] != secrets[1]
    assert run.summary["charged_steps"] == STEPS + EVERY
    assert run.plans[0] == secretive.plan
    assert run.summary["guarantee"] == "holds"


def test_a_start_that_is_killed_does_not_make_a_new_secret_pass_for_the_lost_one(jobs: Jobs, secretive: Run) -> None:
    run = secretive.copy(jobs.new("lost-and-killed").root).crash(EVERY)
    (run.root / "private/secret.key").unlink()
    assert RunDirectory(run.root).create_secret()
    ended = jobs.train(run, OWN_SECRET).wait()
    assert ended.code == 0, ended.err
    assert "secret.key was lost" in ended.err
    assert not (run.root / "private/secret.lost").exists()


def test_without_its_secret_a_run_goes_on_over_the_same_test_records_alone(jobs: Jobs, secretive: Run) -> None:
    """Or records that were trained on could become test records, whose accuracy is published exactly."""
    for name, gone in (("other", ()), ("unknown", ("test_data.sha256",))):
        run = secretive.copy(jobs.new(f"lost-{name}").root).crash(EVERY)
        for file in ("secret.key", *gone):
            (run.root / "private" / file).unlink()
        other = () if gone else ("data.source=userland:items",)
        ended = jobs.train(run, OWN_SECRET, *other).wait()
        assert ended.code == 2, ended.err
        assert "no record that was trained on is a test record" in ended.err


def test_a_copied_directory_draws_noise_of_its_own(jobs: Jobs, secretive: Run) -> None:
    copies = [secretive.copy(jobs.new("copy").root, moved=False).crash(EVERY) for _ in range(2)]
    for run in copies:
        ended = jobs.train(run, OWN_SECRET).wait()
        assert ended.code == 0, ended.err
        assert "the run directory is a copy" in ended.err
    drawn = [{run.digests[step] for step in range(EVERY, STEPS)} for run in (*copies, secretive)]
    assert drawn[0].isdisjoint(drawn[1])
    assert drawn[0].isdisjoint(drawn[2])


def test_other_data_or_code_is_a_new_incarnation(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("tampered").root).crash(EVERY)
    for name, part in (("data", "training data"), ("code", "module:function"), ("environment", "elsewhere ->")):
        plans = [i for i, record in enumerate(run.ledger) if record["record"] == "plan"]
        records = run.ledger
        records[plans[-1]][name] = "elsewhere"
        run.write_ledger(records)
        for meta in run.root.glob("checkpoints/*/meta/metadata"):
            content = json.loads(meta.read_text())
            if content["plan"]["incarnation"] == len(plans) - 1:
                content["plan"][name] = "elsewhere"
                jobs.call("reseal", path=str(meta), content=content)
        (run.root / "summary.json").unlink(missing_ok=True)
        ended = jobs.train(run, f"training.steps={STEPS + EVERY * len(plans)}").wait()
        assert ended.code == 0, ended.err
        assert part in ended.err


def damage_the_newest(run: Run) -> None:
    for path in (run.root / "checkpoints" / str(run.checkpoints[-1])).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_newest(run: Run) -> None:
    shutil.rmtree(run.root / "checkpoints" / str(run.checkpoints[-1]))


@pytest.mark.parametrize("harm", [damage_the_newest, lose_the_newest])
def test_without_its_newest_checkpoint_a_run_goes_on_from_the_one_before_and_draws_anew(
    jobs: Jobs, single: Run, harm: Callable[[Run], None]
) -> None:
    run = single.copy(jobs.new("harmed").root)
    (run.root / "summary.json").unlink()
    harm(run)
    ended = jobs.train(run).wait()
    assert ended.code == 0, ended.err
    assert (f"checkpoint {STEPS} is damaged" in ended.err) == (harm is damage_the_newest)
    assert f"checkpoint {STEPS} is gone, and {STEPS - EVERY} is older" in ended.err
    assert run.summary["incarnation"] == 1
    assert run.summary["charged_steps"] == STEPS + EVERY
    assert run.summary["epsilon"] > single.summary["epsilon"]
    again = {found for (incarnation, _), found in run.digests_by_incarnation.items() if incarnation == 1}
    assert again.isdisjoint(single.digests.values())
    aside = [path.name for path in (run.root / "abandoned").glob("*")]
    assert aside == ([str(STEPS)] if harm is damage_the_newest else [])


def test_what_the_ledger_does_not_know_to_be_saved_may_have_been_seen_all_the_same(jobs: Jobs, single: Run) -> None:
    """The job was killed between the commit of a checkpoint and the ledger's line, and then that was damaged."""
    run = single.copy(jobs.new("harmed").root).crash(2 * EVERY)
    saved = {"record": "saved", "incarnation": 0, "step": 2 * EVERY}
    run.write_ledger([record for record in run.ledger if not saved.items() <= record.items()])
    damage_the_newest(run)
    ended = jobs.train(run).wait()
    assert ended.code == 0, ended.err
    assert f"checkpoint {2 * EVERY} is gone" in ended.err
    assert run.summary["incarnation"] == 1


def test_without_any_checkpoint_it_begins_anew_and_stays_charged(jobs: Jobs, single: Run) -> None:
    run = single.copy(jobs.new("harmed").root).crash(EVERY)
    shutil.rmtree(run.root / "checkpoints")
    ended = jobs.train(run).wait()
    assert ended.code == 0, ended.err
    assert "no whole checkpoint is left" in ended.err
    assert run.summary["charged_steps"] == STEPS + 2 * EVERY


# The attack that incarnations prevent.

RATES, B, FORK = (0.5, 0.25), 64, 4
#: Plain SGD: what an observer of two successive parameters sees is the noisy sum itself.
PLAIN = {"optimizer": {"momentum": 0.0, "average_decay": 0.0}, "checkpoint": {"every_steps": 1}}


def noisy_sum(jobs: Jobs, run: Run, step: int, rate: float, to: Path) -> dict[str, np.ndarray]:
    """What anyone computes of the parameters before and after a step."""
    to.mkdir()
    jobs.call("parameters", run=str(run.root), steps=[step, step + 1], to=str(to))
    before, after = (np.load(to / f"{number}.npz") for number in (step, step + 1))
    return {name: (before[name].astype(float) - after[name]) * B / rate for name in "abcd"}


def clipped_sum(params: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The sum of the clipped gradients of `userland.small`, by hand, in float64: what must stay private."""
    data = userland.train_columns()
    x, label = data["image"][rows].astype(float), data["label"][rows]
    weights = {name: np.asarray(value, float) for name, value in params.items()}
    hidden = np.tanh(x @ weights["a"] + weights["b"])
    logits = hidden @ weights["c"] + weights["d"]
    error = np.exp(logits - logits.max(1, keepdims=True))
    error = error / error.sum(1, keepdims=True) - np.eye(4)[label]
    back = (error @ weights["c"].T) * (1 - hidden**2)
    each = {
        "a": x[:, :, None] * back[:, None],
        "b": back,
        "c": hidden[:, :, None] * error[:, None],
        "d": error,
    }
    norm = np.sqrt(sum((g.reshape(len(rows), -1) ** 2).sum(1) for g in each.values()))
    return {name: np.tensordot(np.minimum(1, 1 / norm), g, 1) for name, g in each.items()}


@pytest.fixture(scope="module")
def forked(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Two runs that fork at step FORK into two learning rates: how far the difference of their noisy sums at the next
    step is from the difference of the true sums, with and without protection; and how large that is itself."""
    to = tmp_path_factory.mktemp("forked")
    original = jobs.new("original")
    jobs.call("train_all", configs=[config_with(original.root, **PLAIN)])
    step = FORK + 1
    seen = {"original": noisy_sum(jobs, original, step, RATES[0], to / "original")}
    runs = {"original": original}
    changed = PLAIN | {"optimizer": PLAIN["optimizer"] | {"learning_rate": RATES[1]}}
    for name, function in (("protected", "train_all"), ("unprotected", "train_unprotected")):
        run = runs[name] = original.copy(jobs.new(name).root).crash(FORK)
        config = config_with(run.root, **changed)
        jobs.call(function, **({"configs": [config]} if function == "train_all" else {"config": config}))
        seen[name] = noisy_sum(jobs, run, step, RATES[1], to / name)
    keys = Keys(Secret.from_insecure_seed(1), bytes.fromhex(original.plan["nonce"]))
    rows = poisson_sample(keys.sampling(step), B / 1000, 0, 1000)
    truth = {}
    for name in ("original", "unprotected"):
        truth[name] = clipped_sum(dict(np.load(to / name / f"{step}.npz")), rows)
    secret = np.concatenate([(truth["original"][name] - truth["unprotected"][name]).ravel() for name in "abcd"])
    told = {"secret": float(np.abs(secret).max())}
    for name in ("protected", "unprotected"):
        found = np.concatenate([(seen["original"][leaf] - seen[name][leaf]).ravel() for leaf in "abcd"])
        told[name] = float(np.sqrt(np.mean((found - secret) ** 2)))
    return told


def test_without_incarnations_two_noisy_sums_reveal_the_difference_of_two_gradient_sums(
    forked: dict[str, float],
) -> None:
    assert forked["secret"] > 0.1
    assert forked["unprotected"] < 1e-3 * forked["secret"]  # noise of standard deviation 4 is gone


def test_a_new_incarnation_leaves_the_noise_of_both_in_the_difference(forked: dict[str, float]) -> None:
    assert forked["protected"] == pytest.approx(SIGMA * np.sqrt(2), rel=0.2)
