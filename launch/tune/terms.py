"""What a search asks for and what it costs, fixed before its first trial: the content of `search.json`, all public."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.joint import selection
from dpdist.joint.selection import Law
from dpdist.mechanism.accounting import ORDERS
from dpdist.mechanism.composition import Phase
from dpdist.run.calibration import UnreachableBudgetError
from dpdist.run.fingerprints import CODE_SETTINGS, environment, modules_digest, step_code_digest
from dpdist.run.plan import rate_and_steps
from dpdist.run.step_settings import step_settings
from dpdist_launch.tune.metric import Metric
from dpdist_launch.tune.space import Space


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the user asks for."""

    #: Of the whole search: `privacy.target_epsilon` is its own, and `run.dir` its directory.
    config: Config
    space: Space
    law: Law
    metric: Metric
    #: N.
    dataset_size: int
    #: `dpdist.data.checks.fingerprints` of the data, for `private/` alone, and keyed there.
    fingerprints: Mapping[str, bytes]

    def to_record(self) -> dict[str, Any]:
        """What must be the same whenever the search goes on."""
        return {
            "settings": step_settings(config_module.flatten(self.config)),
            "space": dict(self.space.axes),
            "law": self.law.to_record(),
            "metric": self.metric.to_record(),
            "dataset_size": self.dataset_size,
            # All trials must be of one kind: the bound is not one of the best of several.
            "code": step_code_digest(self.config),
            "code_of_values": self._code_of_values(),
            "environment": environment(self.config.cluster.platform),
        }

    def _code_of_values(self) -> dict[str, str]:
        """Digests of the user's code that the values of the space name as `module:function`, by value."""
        lists = [axis for name, axis in self.space.axes.items() if name in CODE_SETTINGS and isinstance(axis, list)]
        named = {value for axis in lists for value in axis if isinstance(value, str) and ":" in value}
        return {value: modules_digest({value.partition(":")[0]}) for value in sorted(named)}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the search costs, and the trial that bounds all others."""

    #: q, sigma and T of the config itself. No candidate has a larger Renyi divergence, at the orders that count.
    trial: Phase
    #: These orders.
    orders: tuple[int, ...]
    epsilon: float
    delta: float
    #: Of one trial that is released whatever it gives.
    epsilon_of_one_trial: float

    def to_record(self) -> dict[str, Any]:
        """For `search.json` and the statement."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "accountant": selection.SELECTION,
            "epsilon_of_one_trial": self.epsilon_of_one_trial,
            "trial": {
                "sampling_probability": self.trial.sampling_probability,
                "noise_multiplier": self.trial.noise_multiplier,
                "steps": self.trial.steps,
            },
            "orders": list(self.orders),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Terms:
        """The inverse of `to_record`."""
        rest = {name: record[name] for name in ("epsilon", "delta", "epsilon_of_one_trial")}
        return cls(trial=Phase(**record["trial"]), orders=tuple(record["orders"]), **rest)


def settle(question: Question) -> Terms:
    """Calibrate the trials, or compute what they cost.

    Raises:
        InputError: no guarantee can hold for the search, or its target cannot be met.
    """
    privacy = question.config.privacy
    if not privacy.enabled:
        raise InputError("privacy.enabled", False, "a search without privacy costs nothing: dpdist submit --sweep.")
    if privacy.insecure_seed is not None:
        raise InputError("privacy.insecure_seed", privacy.insecure_seed, "it would void the guarantee; leave it out.")
    if (registry := config_module.flatten(question.config).get("run.registry")) is not None:
        remedy = (
            "it charges runs, and a search costs more than each of its trials; leave it out, and charge it yourself."
        )
        raise InputError("run.registry", registry, remedy)
    if question.config.run.trial:
        raise InputError("run.trial", True, "the search is no trial of another one; leave it out.")
    if question.config.checkpoint.resume_step is not None:
        raise InputError("checkpoint.resume_step", question.config.checkpoint.resume_step, "no trial has begun yet.")
    q, steps = rate_and_steps(question.config, question.dataset_size)
    delta, target, sigma = privacy.delta, privacy.target_epsilon, privacy.noise_multiplier
    if delta is None:
        raise InputError("privacy.delta", delta, "a private search needs it; give a number.")
    if sigma is None:
        if target is None:
            raise InputError("privacy.target_epsilon", target, "give it, or privacy.noise_multiplier.")
        try:
            sigma = selection.calibrate_search(
                target_epsilon=target, sampling_probability=q, steps=steps, law=question.law, delta=delta
            )
        except UnreachableBudgetError as error:
            remedy = f"cannot be reached: {error}; change the target, the steps, the batch or --trials."
            raise InputError("privacy.target_epsilon", target, remedy) from None
    trial = Phase(q, sigma, steps)
    losses = selection.trial_divergences(trial)
    spent = selection.search_cost(losses, question.law, delta)
    if target is not None and spent.epsilon > target:
        raise InputError(
            "privacy.noise_multiplier",
            sigma,
            f"the search costs epsilon {spent.epsilon:.4g}, above privacy.target_epsilon = {target:g}; leave one out.",
        )
    return Terms(
        trial=trial,
        orders=selection.binding_orders(losses, question.law, delta),
        epsilon=spent.epsilon,
        delta=delta,
        epsilon_of_one_trial=selection.best_of_fixed(trial, 1, delta).epsilon,
    )


def candidate(question: Question, terms: Terms, settings: Mapping[str, Any]) -> tuple[Config, Phase]:
    """The config of a trial, with noise that keeps it within the common bound, and what the run must then be.

    Its run directory is left to be set, and nothing of it is told to anybody while it runs.

    Raises:
        InputError: these settings make no config, or no noise is enough for them.
    """
    tree = config_module.to_dict(question.config)
    for name, value in settings.items():
        node = tree
        *path, last = name.split(".")
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise InputError("--space", name, f"{key} is {node!r} in the config, which has no keys; leave it out.")
        node[last] = value
    tree["run"] |= {"progress": "off", "plots": False, "on_event": None, "trial": True}
    config = config_module.from_dict(tree)
    q, steps = rate_and_steps(config, question.dataset_size)
    plan = replace(terms.trial, sampling_probability=q, steps=steps)
    if plan != terms.trial:
        losses = dict(zip(ORDERS, selection.trial_divergences(terms.trial), strict=True))
        most = {order: float(losses[order]) for order in terms.orders}
        try:
            sigma = selection.noise_within(most, sampling_probability=q, steps=steps)
        except UnreachableBudgetError as error:
            raise InputError("--space", dict(settings), f"{error}; narrow the space.") from None
        plan = replace(plan, noise_multiplier=sigma)
    tree["privacy"] |= {"target_epsilon": None, "noise_multiplier": plan.noise_multiplier}
    return config_module.from_dict(tree), plan


def require_space(question: Question, make: Callable[[Mapping[str, Any]], object]) -> None:
    """Check each value of the space before anything is drawn.

    Args:
        make: makes a candidate of settings.

    Raises:
        InputError: a value cannot be used.
    """
    for settings in question.space.samples():
        make(settings)
