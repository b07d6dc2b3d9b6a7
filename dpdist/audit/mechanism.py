"""The audit of the mechanism: the compiled step of training, run many times on two neighbouring datasets.

The datasets differ in one record, the canary, which is the last one: with it there are N records, without it N - 1, and
q, B, T and everything compiled stay as they are. That is the relation of `mechanism.accounting`: a record is removed,
or replaced by one that adds nothing, which for every result here is the same.

Each run has a secret of its own and goes through what `dpdist.trainer` goes through: `plan_run`, `build_setup`,
`make_assigner`, `Feed`, `accumulate_sample`, `noisy_update`. Nothing of the mechanism is written here again. The
auditor sees what is released, the parameters after every step, and knows all the other records.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float64

from dpdist import config as config_module
from dpdist.audit import canary
from dpdist.cluster.agreement import decide
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.data import open_dataset
from dpdist.data.feed import Feed
from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.ledger import Plan
from dpdist.mechanism.sampling import Assignment
from dpdist.mechanism.step import accumulate_sample, noisy_update
from dpdist.program.assignments import make_assigner
from dpdist.program.build import TrainingSetup, build_setup, open_model
from dpdist.program.update import placed
from dpdist.run.plan import plan_run

#: The canary's place.
PLACE = 7


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run, on which data, and what the auditor looks at."""

    name: str
    noise_multiplier: float
    sampling_probability: float
    steps: int
    #: The deltas at which epsilon is bounded.
    deltas: tuple[float, ...]
    #: What the other records are: `silent` ones have no gradient; `opposed` ones are as long as the canary, and point
    #: the other way.
    others: Literal["silent", "opposed"] = "silent"
    #: `released`: the parameters after each step. `integers`: the noisy sum of the only step, in units of the grid.
    shows: Literal["released", "integers"] = "released"
    #: The norm of the canary's gradient before it is clipped; C is 1.
    length: float = 16.0
    #: Parameters of each of the two leaves: fewer are faster, 4096 fill a block of noise, so that the second leaf has
    #: keys of its own.
    width: int = 64
    placement: Literal["designated", "fused"] = "designated"
    assignment: Literal["chunks", "balanced"] = "chunks"
    #: N, the canary included.
    records: int = 8
    physical_batch_size: int = 4

    def config(self, delta: float) -> Config:
        """The settings of a training run that takes these steps."""
        return config_module.from_dict(
            {
                "data": {"source": "python"},
                "model": {"name": canary.MODEL, "options": {"width": self.width}, "task": "none"},
                "optimizer": {"name": "sgd", "learning_rate": 1.0},
                "privacy": {
                    "noise_multiplier": self.noise_multiplier,
                    "delta": delta,
                    "allow_large_delta": True,
                    "noise_placement": self.placement,
                },
                "sampling": {
                    "expected_batch_size": self.sampling_probability * self.records,
                    "assignment": self.assignment,
                },
                "training": {"steps": self.steps, "physical_batch_size": self.physical_batch_size},
            }
        )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A setting, planned and compiled as training would."""

    setting: Setting
    config: Config
    world: World
    plan: Plan
    setup: TrainingSetup
    dataset: Any

    def epsilon_claimed(self, delta: float) -> float:
        """What a run would state for all of its steps."""
        return _plan(self.setting, self.plan.coordinates, delta).private_terms().epsilon


def build(setting: Setting, world: World) -> Bench:
    """Plan and compile a setting. Collective."""
    config = setting.config(setting.deltas[0])
    other = {"silent": 0.0, "opposed": -1.0}[setting.others]
    values = setting.length * np.append(np.full(setting.records - 1, other), 1.0)
    dataset = open_dataset(config, (canary.records(values, np.full(setting.records, PLACE)), None))
    opened = open_model(config, dataset)
    plan = _plan(setting, opened.coordinates, setting.deltas[0])
    setup = build_setup(config, plan, opened, dataset, world, None)
    return Bench(setting=setting, config=config, world=world, plan=plan, setup=setup, dataset=dataset)


def _plan(setting: Setting, coordinates: int, delta: float) -> Plan:
    nothing: dict[str, Any] = {"nonce": bytes(32), "environment": "audit"}  # every run has a nonce of its own
    return plan_run(setting.config(delta), dataset_size=setting.records, coordinates=coordinates, **nothing)


def scores(bench: Bench, runs: int, *, present: bool) -> Float64[np.ndarray, " runs"]:
    """Run the setting so many times, with or without the canary, and score what each run shows. Collective.

    Returns:
        By run: for `released`, the log-likelihood ratio of the canary being in the data; for `integers`, how many low
        bits of the canary's two coordinates are zero.
    """
    setting, plan = bench.setting, bench.plan
    if not present:
        plan = replace(plan, dataset_size=plan.dataset_size - 1)
    # One secret for the audit, from which every run's own derives, so that all processes have the same.
    root = Secret(bytes.fromhex(decide(bench.world, lambda: secrets.token_hex(32))))
    keys = [_keys_of_run(root, run) for run in range(runs)]

    def assigner(number: int) -> Assignment:
        run, step = divmod(number, setting.steps)
        return make_assigner(bench.config, plan, bench.setup, keys[run], bench.world)(step)

    feed = Feed(
        bench.dataset.train, assigner, bench.world.mesh, data=bench.config.data, start=0, stop=runs * setting.steps
    )
    with contextlib.closing(feed):
        one = _low_bits if setting.shows == "integers" else _likelihood_ratio
        return np.array([one(bench, feed, keys[run]) for run in range(runs)])


def _keys_of_run(root: Secret, run: int) -> Keys:
    secret = Secret(root.derive("audit", step=run, size=32))
    return Keys(secret, secret.derive("audit nonce", size=32))


def _likelihood_ratio(bench: Bench, feed: Feed, keys: Keys) -> float:
    """Take all steps of a run; what the released parameters say for the canary, as the auditor's best test has it.

    With x the noisy sum in the canary's direction (C is 1), less what the others are expected to add, a step says
    log(1 - q + q exp((2 x - 1) / (2 sigma^2))).
    """
    setting, programs = bench.setting, bench.setup.step_programs
    q, variance = setting.sampling_probability, setting.noise_multiplier**2
    others = -q * (setting.records - 1) if setting.others == "opposed" else 0.0
    state, sums = placed(bench.setup.initial, programs.replicated), programs.zero_sums()
    before, said = 0.0, 0.0
    for step in range(setting.steps):
        sums = _clipped_sums(bench, feed, keys, state.params, sums, step)
        state, sums, _, _ = noisy_update(programs, state, sums, keys, step)
        after = canary.projection(state.params, PLACE)
        x = (before - after) * bench.plan.expected_batch_size - others
        weight = math.log(1 - q) if q < 1 else -math.inf
        said += float(np.logaddexp(weight, math.log(q) + (2 * x - 1) / (2 * variance)))
        before = after
    return said


def _low_bits(bench: Bench, feed: Feed, keys: Keys) -> float:
    """Take one step; how many of the lowest 30 bits of the canary's two coordinates are zero, from the bottom up.

    The coordinates are those of the integer vector that the guarantee is for: all else is computed from it.
    """
    programs = bench.setup.step_programs
    state, sums = placed(bench.setup.initial, programs.replicated), programs.zero_sums()
    sums = _clipped_sums(bench, feed, keys, state.params, sums, 0)
    clipped = np.array(sums).reshape(programs.devices, -1).sum(axis=0)
    draw = noisy_update(programs, state, sums, keys, 0)[3]
    pair = [PLACE, bench.setting.width + PLACE]
    noisy = clipped[pair] + np.asarray(draw)[pair]
    return float(sum(_trailing_zeros(int(value)) for value in noisy))


def _trailing_zeros(value: int) -> int:
    return min(30, (value & -value).bit_length() - 1) if value else 30


def _clipped_sums(bench: Bench, feed: Feed, keys: Keys, params: Any, sums: Array, step: int) -> Array:
    """The first half of a step, as `Trainer.take_step` has it."""
    programs = bench.setup.step_programs
    rounds = feed.rounds(feed.next_assignment())
    return accumulate_sample(programs, params, sums, rounds, programs.loss_key(keys, step))
