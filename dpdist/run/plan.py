"""From a config and the size of the data to the mechanism's constants, fixed before an incarnation's first step.

The first incarnation's are worked out from the config alone (`plan_run`). A later one (`plan_on`) pays for what was
charged before it, keeps the noise multiplier while nothing that it depends on was changed, and never passes a target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism import accounting, composition
from dpdist.mechanism.composition import ADAPTIVE, Phase, charged_phases, phase_of, total_cost
from dpdist.mechanism.ledger import Ledger, Plan


def plan_run(config: Config, *, dataset_size: int, nonce: bytes, environment: str) -> Plan:
    """Work out q, T, sigma and what they cost; seconds of CPU time, so process 0 does it for all.

    Raises:
        InputError: q > 1, delta >= 1/N, or a budget that no noise (or not even one step) can meet.
    """
    plan = _without_privacy(config, dataset_size=dataset_size, nonce=nonce, environment=environment)
    return _with_privacy(plan, config) if config.privacy.enabled else plan


def plan_on(
    config: Config,
    ledger: Ledger,
    *,
    start: int,
    reasons: Sequence[str],
    dataset_size: int,
    nonce: bytes,
    environment: str,
) -> Plan:
    """Work out the incarnation that follows those in the ledger, from step `start` on.

    Raises:
        InputError: nothing is left to do or to spend, or what `plan_run` raises.
    """
    plan = dataclasses.replace(
        _without_privacy(config, dataset_size=dataset_size, nonce=nonce, environment=environment),
        incarnation=len(ledger.plans),
        start=start,
        reasons=list(reasons),
    )
    if plan.steps_asked <= start:
        raise InputError(
            "training.steps",
            plan.steps_asked,
            f"the run has taken {start} steps already; ask for more, or go back with checkpoint.resume_step, to go on "
            f"with what has changed ({'; '.join(reasons)}), or name a new run.dir.",
        )
    return _paying_for_the_past(plan, config, ledger) if config.privacy.enabled else plan


def spending(ledger: Ledger) -> Callable[[int], float] | None:
    """Epsilon after n steps of the current incarnation, with all that was charged before it; None without privacy."""
    plan = ledger.plan
    assert plan is not None
    if plan.noise_multiplier is None:
        return None
    first, before = ledger.plans[0], charged_phases(ledger, plan.incarnation)
    assert plan.epsilon is not None
    assert plan.delta is not None
    delta, total = plan.delta, plan.epsilon
    if plan.accountant == ADAPTIVE:
        assert first.renyi_order is not None
        order = first.renyi_order
        return lambda steps: min(
            total, composition.adaptive_epsilon([*before, phase_of(plan, steps)], order=order, delta=delta)
        )
    assert first.noise_multiplier is not None
    curve = accounting.EpsilonCurve(
        sampling_probability=first.sampling_probability,
        noise_multiplier=first.noise_multiplier,
        steps=first.steps,
        delta=delta,
        total=total,
    )
    return lambda steps: curve.at(sum(phase.steps for phase in before) + steps)


def _without_privacy(config: Config, *, dataset_size: int, nonce: bytes, environment: str) -> Plan:
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
    privacy = config.privacy
    delta = privacy.delta if privacy.enabled and not privacy.allow_large_delta else None
    if delta is not None and delta >= 1 / dataset_size:
        raise InputError(
            "privacy.delta",
            delta,
            f"must be below 1/N = {1 / dataset_size:.2g}, or publishing a "
            "random record outright would count as private; privacy.allow_large_delta=true accepts it.",
        )
    return Plan(
        incarnation=0,
        nonce=nonce.hex(),
        environment=environment,
        adjacency=accounting.ADJACENCY,
        dataset_size=dataset_size,
        sampling_probability=q,
        expected_batch_size=batch,
        steps=steps,
        steps_asked=steps,
        insecure=privacy.insecure_seed is not None,
    )


def _with_privacy(plan: Plan, config: Config) -> Plan:
    privacy, q, steps = config.privacy, plan.sampling_probability, plan.steps
    delta, target, sigma = privacy.delta, privacy.target_epsilon, privacy.noise_multiplier
    assert delta is not None  # Config has checked
    if sigma is None:
        assert target is not None
        try:
            sigma = accounting.calibrate(target_epsilon=target, sampling_probability=q, steps=steps, delta=delta)
        except accounting.UnreachableBudgetError as error:
            raise _unreachable(target, error) from None
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
        renyi_order=composition.best_order(Phase(q, sigma, steps), delta),
    )


def _paying_for_the_past(plan: Plan, config: Config, ledger: Ledger) -> Plan:
    """The plan with its noise, as many steps as the target allows, and what it costs with all before it."""
    first, before = ledger.plans[0], charged_phases(ledger, plan.incarnation)
    delta, order, planned = first.delta, first.renyi_order, phase_of(first, first.steps)
    assert delta is not None
    assert order is not None
    target = config.privacy.target_epsilon
    plan = dataclasses.replace(
        plan,
        clip_norm=config.privacy.clip_norm,
        delta=delta,
        target_epsilon=target,
        noise_multiplier=_further_noise(plan, config, ledger, before),
    )
    wanted = plan.steps_asked - plan.start
    if target is not None:
        affordable = composition.affordable_further_steps(
            before, phase_of(plan, wanted), target_epsilon=target, order=order, delta=delta
        )
        if first.epsilon is not None and first.epsilon <= target and phase_of(plan, 1).alike(planned):
            # What the first plan still holds is paid for.
            affordable = max(affordable, first.steps - sum(phase.steps for phase in before))
        if affordable == 0:
            raise InputError(
                "privacy.target_epsilon",
                target,
                f"is spent: {ledger.charged_steps()} steps are charged to this run, and not one more fits; raise it, "
                "or name a new run.dir.",
            )
        wanted = min(wanted, affordable)
    spent = total_cost(first, before, phase_of(plan, wanted))
    return dataclasses.replace(
        plan,
        steps=plan.start + wanted,
        epsilon=spent.epsilon,
        epsilon_rdp=spent.epsilon_rdp,
        accountant=spent.accountant,
    )


def _further_noise(plan: Plan, config: Config, ledger: Ledger, before: Sequence[Phase]) -> float:
    """The config's noise multiplier; else the last one, unless what it was calibrated for has changed."""
    target, last, first = config.privacy.target_epsilon, ledger.plans[-1], ledger.plans[0]
    if config.privacy.noise_multiplier is not None:
        return config.privacy.noise_multiplier
    assert target is not None  # Config has checked
    needs = (plan.sampling_probability, plan.steps_asked, target)
    if last.noise_multiplier is not None and needs == (
        last.sampling_probability,
        last.steps_asked,
        last.target_epsilon,
    ):
        return last.noise_multiplier
    assert first.renyi_order is not None
    assert first.delta is not None
    try:
        return composition.calibrate_further_steps(
            before,
            sampling_probability=plan.sampling_probability,
            steps=plan.steps_asked - plan.start,
            target_epsilon=target,
            order=first.renyi_order,
            delta=first.delta,
        )
    except accounting.UnreachableBudgetError as error:
        raise _unreachable(target, error) from None


def _unreachable(target: float, error: accounting.UnreachableBudgetError) -> InputError:
    return InputError(
        "privacy.target_epsilon",
        target,
        f"cannot be reached: {error}; change the target, the steps or the batch, or give privacy.noise_multiplier.",
    )
