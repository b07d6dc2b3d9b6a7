"""The checks of an audit: what is run and how often, what each found, and what they say together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdist.audit import bounds, mechanism, one_run
from dpdist.audit.mechanism import Setting
from dpdist.audit.training import TrainingPlan
from dpdist.cluster.world import World

#: Settings of the mechanism, and how often each is run with and without the canary: in the full form, in the short one.
#: Each has its purpose: `loud step` comes closest to its claim; `one step` has the other records pull against the
#: canary, at the usual delta too; `sampled step` the same with a random sample; `four steps` are composed; in `lowest
#: bits` the canary is far too short to be seen but by a bit pattern.
SETTINGS: tuple[tuple[Setting, int, int], ...] = (
    (
        Setting(
            name="loud step",
            noise_multiplier=0.5,
            sampling_probability=1.0,
            steps=1,
            deltas=(0.1,),
            placement="fused",
        ),
        5000,
        1000,
    ),
    (
        Setting(
            name="one step",
            noise_multiplier=1.0,
            sampling_probability=1.0,
            steps=1,
            deltas=(0.05, 1e-5),
            others="opposed",
            width=4096,
        ),
        6000,
        600,
    ),
    (
        Setting(
            name="sampled step",
            noise_multiplier=1.0,
            sampling_probability=0.5,
            steps=1,
            deltas=(0.05,),
            others="opposed",
            assignment="balanced",
        ),
        4000,
        500,
    ),
    (
        Setting(name="four steps", noise_multiplier=1.0, sampling_probability=0.5, steps=4, deltas=(0.05,)),
        3000,
        100,
    ),
    (
        Setting(
            name="lowest bits",
            noise_multiplier=1.0,
            sampling_probability=1.0,
            steps=1,
            deltas=(0.05,),
            shows="integers",
            length=1.1e-3,
        ),
        2000,
        100,
    ),
)
TRAININGS = (
    TrainingPlan(name="one run", canaries=2048, noise_multiplier=1.0, sampling_probability=0.25, steps=16, delta=1e-5),
    TrainingPlan(
        name="went back",
        canaries=1024,
        noise_multiplier=4.0,
        sampling_probability=1.0,
        steps=1,
        delta=1e-5,
        goes_back=True,
    ),
)
#: Bounds of a whole audit, among which the probability of an error is shared out.
BOUNDS = sum(len(setting.deltas) for setting, _, _ in SETTINGS) + len(TRAININGS)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One bound and the claim beside it."""

    name: str
    epsilon_lower: float
    #: What the accountant states for the same.
    epsilon_claimed: float
    delta: float
    #: Of this bound alone.
    confidence: float
    #: What the bound was found on.
    evidence: dict[str, Any]

    @property
    def holds(self) -> bool:
        """False where the claim is refuted."""
        return self.epsilon_lower <= self.epsilon_claimed


def confidence_each(confidence: float) -> float:
    """The confidence of every bound that makes all of them hold together with `confidence` (Bonferroni)."""
    return 1 - (1 - confidence) / BOUNDS


def runs_of_settings(*, short: bool) -> dict[str, int]:
    """How often each setting is run with the canary, and as often without, by its name."""
    return {setting.name: few if short else full for setting, full, few in SETTINGS}


def mechanism_checks(world: World, runs: Mapping[str, int], *, confidence: float) -> Iterator[Check]:
    """Run the settings that `runs` names. Collective.

    Args:
        confidence: of each bound.
    """
    for setting, _, _ in SETTINGS:
        elsewhere = setting.shows == "integers" and world.num_processes > 1  # other processes hold parts of the sum
        if setting.name in runs and not elsewhere:
            yield from check_setting(setting, world, runs=runs[setting.name], confidence=confidence)


def check_setting(setting: Setting, world: World, *, runs: int, confidence: float) -> Iterator[Check]:
    """Run one setting so many times with the canary, and as often without; a check for each delta. Collective."""
    bench = mechanism.build(setting, world)
    present, absent = (mechanism.scores(bench, runs, present=there) for there in (True, False))
    for delta in setting.deltas:
        found = bounds.epsilon_lower(present, absent, delta=delta, confidence=confidence)
        evidence = dataclasses.asdict(found)
        yield Check(
            name=setting.name,
            epsilon_lower=evidence.pop("epsilon_lower"),
            epsilon_claimed=bench.epsilon_claimed(delta),
            delta=delta,
            confidence=evidence.pop("confidence"),
            evidence=evidence,
        )


def check_training(
    plan: TrainingPlan, folder: Path, released: list[Any], *, epsilon_claimed: float, confidence: float
) -> Check:
    """Guess the coins of a training that has ended.

    Args:
        folder: where its coins lie.
        released: the parameters that each part of the run released.
        epsilon_claimed: what the run states in the end.
    """
    found = one_run.epsilon_lower(plan.scores(released), plan.coins(folder), delta=plan.delta, confidence=confidence)
    evidence = dataclasses.asdict(found)
    return Check(
        name=plan.name,
        epsilon_lower=evidence.pop("epsilon_lower"),
        epsilon_claimed=epsilon_claimed,
        delta=plan.delta,
        confidence=evidence.pop("confidence"),
        evidence=evidence,
    )


def report(checks: Sequence[Check], *, confidence: float) -> dict[str, Any]:
    """What all checks say together: the bound that comes closest to its claim, or goes furthest beyond it.

    Args:
        confidence: of all bounds together.
    """
    closest = max(checks, key=lambda check: check.epsilon_lower / check.epsilon_claimed)
    return {
        "epsilon_lower": closest.epsilon_lower,
        "epsilon_claimed": closest.epsilon_claimed,
        "delta": closest.delta,
        "confidence": confidence,
        "refuted": not all(check.holds for check in checks),
        "closest": closest.name,
        "checks": [dataclasses.asdict(check) | {"holds": check.holds} for check in checks],
    }
