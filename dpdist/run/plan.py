"""From a config and the size of the data to the mechanism's constants, fixed before an incarnation's first step.

The config alone gives those of the first incarnation (`plan_run`). A later one (`plan_incarnation`) pays for what was
charged before it, keeps the noise multiplier unless something it depends on has changed, and never passes a target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism import accounting, composition
from dpdist.mechanism.composition import ADAPTIVE, Phase, charged_phases, phase_of, total_cost
from dpdist.mechanism.grid import choose_grid
from dpdist.mechanism.ledger import Ledger, Plan, PrivacyTerms
from dpdist.run import calibration
from dpdist.run.summary import TRIAL, is_trial


def plan_run(config: Config, *, dataset_size: int, coordinates: int, nonce: bytes, environment: str) -> Plan:
    """Work out q, T, sigma and what they cost; seconds of CPU time, so process 0 does it for all.

    Args:
        coordinates: d, the number of single parameters that train.

    Raises:
        InputError: q > 1, delta >= 1/N, or a budget that no noise (or not even one step) can meet.
    """
    plan = _plain_plan(config, dataset_size=dataset_size, coordinates=coordinates, nonce=nonce, environment=environment)
    plan = dataclasses.replace(plan, reasons=[TRIAL] * config.run.trial)
    return _with_privacy(plan, config) if config.privacy.enabled else plan


def plan_incarnation(
    config: Config,
    ledger: Ledger,
    *,
    start: int,
    reasons: Sequence[str],
    dataset_size: int,
    coordinates: int,
    nonce: bytes,
    environment: str,
) -> Plan:
    """Work out the incarnation that follows those in the ledger, from step `start` on.

    Raises:
        InputError: nothing is left to do or to spend, or what `plan_run` raises.
    """
    plan = dataclasses.replace(
        _plain_plan(config, dataset_size=dataset_size, coordinates=coordinates, nonce=nonce, environment=environment),
        incarnation=len(ledger.plans),
        start=start,
        reasons=[TRIAL] * is_trial(ledger.plans) + list(reasons),
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
    plan, first = ledger.plans[-1], ledger.plans[0]
    if plan.privacy is None:
        return None
    delta, total = plan.privacy.delta, plan.privacy.epsilon
    before, first_terms = charged_phases(ledger, plan.incarnation), first.private_terms()
    if plan.privacy.accountant == ADAPTIVE:
        return lambda steps: min(
            total,
            composition.adaptive_epsilon([*before, phase_of(plan, steps)], order=first_terms.renyi_order, delta=delta),
        )
    curve = calibration.EpsilonCurve(
        sampling_probability=first.sampling_probability,
        noise_multiplier=first_terms.noise_multiplier,
        steps=first.steps,
        delta=delta,
        total=total,
    )
    return lambda steps: curve.at(sum(phase.steps for phase in before) + steps)


def rate_and_steps(config: Config, dataset_size: int) -> tuple[float, int]:
    """The sampling probability q and the number of steps T that a config asks for.

    Raises:
        InputError: q > 1, no whole step, or delta >= 1/N.
    """
    batch = config.sampling.expected_batch_size
    if batch > dataset_size:
        raise InputError(
            "sampling.expected_batch_size",
            batch,
            f"the sampling probability q would be "
            f"{batch / dataset_size:.3g} > 1; give at most the {dataset_size} training examples.",
        )
    if dataset_size >= 2**31:
        raise InputError("data.source", dataset_size, "training examples: devices number them in 31 bits; give fewer.")
    q = batch / dataset_size
    steps = config.training.steps or round((config.training.epochs or 0) / q)
    if steps < 1:
        raise InputError("training.epochs", config.training.epochs, f"makes no whole step at q = {q:.3g}; give more.")
    if steps > accounting.MOST_STEPS:
        raise InputError("training.steps", steps, f"give at most {accounting.MOST_STEPS:.0e}.")
    privacy = config.privacy
    delta = privacy.delta if privacy.enabled and not privacy.allow_large_delta else None
    if delta is not None and delta >= 1 / dataset_size:
        raise InputError(
            "privacy.delta",
            delta,
            f"must be below 1/N = {1 / dataset_size:.2g}, or publishing a "
            "random record outright would count as private; privacy.allow_large_delta=true accepts it.",
        )
    return q, steps


def _plain_plan(config: Config, *, dataset_size: int, coordinates: int, nonce: bytes, environment: str) -> Plan:
    q, steps = rate_and_steps(config, dataset_size)
    return Plan(
        incarnation=0,
        nonce=nonce.hex(),
        environment=environment,
        adjacency=accounting.ADJACENCY,
        dataset_size=dataset_size,
        coordinates=coordinates,
        sampling_probability=q,
        expected_batch_size=config.sampling.expected_batch_size,
        steps=steps,
        steps_asked=steps,
        insecure=config.privacy.insecure_seed is not None,
    )


def _with_privacy(plan: Plan, config: Config) -> Plan:
    """The first plan with its noise, as many steps as the target allows, and what they cost."""
    privacy, q, steps = config.privacy, plan.sampling_probability, plan.steps
    delta, target, sigma = _required("delta", privacy.delta), privacy.target_epsilon, privacy.noise_multiplier
    if sigma is None:
        target = _required("target_epsilon", target)
        try:
            sigma = calibration.calibrate(target_epsilon=target, sampling_probability=q, steps=steps, delta=delta)
        except calibration.UnreachableBudgetError as error:
            raise _unreachable(target, error) from None
    elif target is not None:
        steps = calibration.affordable_steps(
            target_epsilon=target, sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta
        )
        if steps == 0:
            raise InputError(
                "privacy.target_epsilon",
                target,
                f"cannot be reached: not even one step with noise_multiplier = {sigma} fits; raise either.",
            )
    spent = accounting.epsilon(sampling_probability=q, noise_multiplier=sigma, steps=steps, delta=delta)
    order = calibration.best_order(Phase(q, sigma, steps), delta)
    return dataclasses.replace(plan, steps=steps, privacy=_terms(plan, config, sigma, spent, order))


def _paying_for_the_past(plan: Plan, config: Config, ledger: Ledger) -> Plan:
    """A later plan with its noise, as many steps as the target allows, and what they cost with all before them."""
    first, before = ledger.plans[0], charged_phases(ledger, plan.incarnation)
    terms, target = first.private_terms(), config.privacy.target_epsilon
    sigma = _further_noise(plan, config, ledger, before)
    wanted = plan.steps_asked - plan.start
    further = Phase(plan.sampling_probability, sigma, wanted)
    if target is not None:
        affordable = calibration.affordable_further_steps(
            before, further, target_epsilon=target, order=terms.renyi_order, delta=terms.delta
        )
        planned = phase_of(first, first.steps)
        if further.alike(planned) and total_cost(first, [], planned).epsilon <= target:
            # The steps that the first plan still holds are paid for.
            affordable = max(affordable, first.steps - sum(phase.steps for phase in before))
        if affordable == 0:
            raise InputError(
                "privacy.target_epsilon",
                target,
                f"is spent: {ledger.charged_steps()} steps are charged to this run, and not one more fits; raise it, "
                "or name a new run.dir.",
            )
        wanted = min(wanted, affordable)
    spent = total_cost(first, before, dataclasses.replace(further, steps=wanted))
    return dataclasses.replace(
        plan, steps=plan.start + wanted, privacy=_terms(plan, config, sigma, spent, terms.renyi_order)
    )


def _further_noise(plan: Plan, config: Config, ledger: Ledger, before: Sequence[Phase]) -> float:
    """The config's noise multiplier; else the last one, unless what it was calibrated for has changed."""
    last, terms = ledger.plans[-1], ledger.plans[0].private_terms()
    if config.privacy.noise_multiplier is not None:
        return config.privacy.noise_multiplier
    target = _required("target_epsilon", config.privacy.target_epsilon)
    last_terms = last.private_terms()
    if (plan.sampling_probability, plan.steps_asked, target) == (
        last.sampling_probability,
        last.steps_asked,
        last_terms.target_epsilon,
    ):
        return last_terms.noise_multiplier
    try:
        return calibration.calibrate_further_steps(
            before,
            sampling_probability=plan.sampling_probability,
            steps=plan.steps_asked - plan.start,
            target_epsilon=target,
            order=terms.renyi_order,
            delta=terms.delta,
        )
    except calibration.UnreachableBudgetError as error:
        raise _unreachable(target, error) from None


def _terms(
    plan: Plan, config: Config, noise_multiplier: float, spent: accounting.Spent, renyi_order: int
) -> PrivacyTerms:
    try:
        grid = choose_grid(
            clip_norm=config.privacy.clip_norm,
            noise_multiplier=noise_multiplier,
            coordinates=plan.coordinates,
            dataset_size=plan.dataset_size,
        )
    except ValueError as error:
        raise InputError("privacy.noise_multiplier", noise_multiplier, f"{error}; train fewer parameters.") from None
    return PrivacyTerms(
        clip_norm=config.privacy.clip_norm,
        noise_multiplier=noise_multiplier,
        delta=spent.delta,
        target_epsilon=config.privacy.target_epsilon,
        epsilon=spent.epsilon,
        epsilon_rdp=spent.epsilon_rdp,
        accountant=spent.accountant,
        renyi_order=renyi_order,
        grid=grid.spacing,
        grid_slack=grid.slack,
    )


def _required(name: str, value: float | None) -> float:
    """A privacy setting that a private run cannot be planned without."""
    if value is None:
        raise InputError(f"privacy.{name}", value, "a private run needs it; give a number.")
    return value


def _unreachable(target: float, error: calibration.UnreachableBudgetError) -> InputError:
    return InputError(
        "privacy.target_epsilon",
        target,
        f"cannot be reached: {error}; change the target, the steps or the batch, or give privacy.noise_multiplier.",
    )
