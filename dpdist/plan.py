"""From a config and the number of training examples to the mechanism's constants, fixed before step 0."""

from __future__ import annotations

import dataclasses

from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism import accounting
from dpdist.mechanism.ledger import Plan


def plan_run(config: Config, *, dataset_size: int, nonce: bytes, environment: str) -> Plan:
    """Work out q, T, sigma and what they cost; seconds of CPU time, so process 0 does it for all.

    Raises:
        InputError: q > 1, delta >= 1/N, or a budget that no noise (or not even one step) can meet.
    """
    batch = config.sampling.expected_batch_size
    if batch > dataset_size:
        raise InputError(
            "sampling.expected_batch_size",
            batch,
            f"the sampling probability q would be "
            f"{batch / dataset_size:.3g} > 1; give at most the {dataset_size} training examples.",
        )
    q = batch / dataset_size
    steps = config.training.steps or round((config.training.epochs or 0) / q)
    if steps < 1:
        raise InputError("training.epochs", config.training.epochs, f"makes no whole step at q = {q:.3g}; give more.")
    plan = Plan(
        incarnation=0,
        nonce=nonce.hex(),
        environment=environment,
        adjacency=accounting.ADJACENCY,
        dataset_size=dataset_size,
        sampling_probability=q,
        expected_batch_size=batch,
        steps=steps,
        steps_asked=steps,
    )
    return _with_privacy(plan, config) if config.privacy.enabled else plan


def _with_privacy(plan: Plan, config: Config) -> Plan:
    privacy, q, steps = config.privacy, plan.sampling_probability, plan.steps
    delta, target, sigma = privacy.delta, privacy.target_epsilon, privacy.noise_multiplier
    assert delta is not None  # Config has checked
    if delta >= 1 / plan.dataset_size and not privacy.allow_large_delta:
        raise InputError(
            "privacy.delta",
            delta,
            f"must be below 1/N = {1 / plan.dataset_size:.2g}, or publishing a "
            "random record outright would count as private; privacy.allow_large_delta=true accepts it.",
        )
    if sigma is None:
        assert target is not None
        try:
            sigma = accounting.calibrate(target_epsilon=target, sampling_probability=q, steps=steps, delta=delta)
        except accounting.UnreachableBudgetError as error:
            raise InputError(
                "privacy.target_epsilon",
                target,
                f"cannot be reached: {error}; change the target, the "
                "steps or the batch, or give privacy.noise_multiplier.",
            ) from None
    elif target is not None:
        steps = accounting.affordable_steps(
            target_epsilon=target, sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta
        )
        if steps == 0:
            raise InputError(
                "privacy.target_epsilon",
                target,
                f"cannot be reached: not even one step with noise_multiplier = {sigma} fits; raise either.",
            )
    spent = accounting.epsilon(sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta)
    return dataclasses.replace(
        plan,
        steps=steps,
        clip_norm=privacy.clip_norm,
        noise_multiplier=sigma,
        delta=delta,
        target_epsilon=target,
        epsilon=spent.epsilon,
        epsilon_rdp=spent.epsilon_rdp,
        accountant=spent.accountant,
    )
