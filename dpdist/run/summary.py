"""How a run ended, in `summary.json` and in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.mechanism.ledger import Ledger, Plan
from dpdist.run.recorder import Recorder


def summarise(
    plan: Plan,
    world: World,
    config: Config,
    recorder: Recorder,
    ledger: Ledger | None,
    *,
    step: int,
    ended: bool,
    digest: str | None,
) -> dict[str, Any]:
    """The summary after `step` steps, for process 0; without a digest of the parameters it says `failed`.

    `ended` says whether nothing is left to do, the last evaluation included; a run that was told to leave says
    `preempted`.

    `epsilon` is that of the whole plan, also for a run that has stopped early: a stop that someone decides on
    after seeing results must not lower it. `epsilon_spent` is what the ledger charges.
    """
    assert ledger is not None
    if digest is None:
        status = "failed"
    elif not ended:
        status = "preempted"
    else:
        status = "finished" if plan.steps == plan.steps_asked else "budget_exhausted"
    return {
        "status": status,
        "step": step,
        "steps": plan.steps_asked,
        "epsilon": plan.epsilon,
        "epsilon_spent": recorder.epsilon(plan.start + ledger.charged_to(plan.incarnation)),
        "epsilon_rdp": plan.epsilon_rdp,
        "accountant": plan.accountant,
        "target_epsilon": plan.target_epsilon,
        "delta": plan.delta,
        "adjacency": plan.adjacency,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_probability": plan.sampling_probability,
        "expected_batch_size": plan.expected_batch_size,
        "dataset_size": plan.dataset_size,
        "clip_norm": plan.clip_norm,
        "accuracy": recorder.accuracy,
        "examples_per_second": recorder.examples_per_second(),
        "processes": world.num_processes,
        "devices": world.device_count,
        "environment": plan.environment,
        "incarnation": plan.incarnation,
        "incarnation_reasons": list(plan.reasons),
        "charged_steps": ledger.charged_steps(),
        "guarantee": guarantee(config),
        "params_sha256": digest,
    }


def guarantee(config: Config) -> str:
    """`holds`, or why it does not."""
    if not config.privacy.enabled:
        return "none: privacy.enabled is false, this is the plain arm"
    if config.privacy.insecure_seed is not None:
        return "void: privacy.insecure_seed makes sampling and noise known to everyone"
    if config.privacy.allow_large_delta:
        return "holds, but privacy.allow_large_delta lets delta reach 1/N: a random record may be published outright"
    return "holds"


def opening_line(plan: Plan, world: World, *, insecure: bool) -> str:
    """What is about to run."""
    where = f"{world.num_processes} process(es), {world.device_count} {world.platform} device(s)"
    text = (
        f"dpdist: {plan.steps} steps at q = {plan.sampling_probability:.4g} of {plan.dataset_size} examples on {where}"
    )
    if plan.noise_multiplier is None:
        return text + "; WITHOUT PRIVACY (privacy.enabled=false)"
    text += (
        f"; noise multiplier {plan.noise_multiplier:.4g}, clip norm {plan.clip_norm:g}: "
        f"epsilon {plan.epsilon:.4g} at delta {plan.delta:g}"
    )
    if plan.steps < plan.steps_asked:
        text += f"; the budget ends before the {plan.steps_asked} steps asked for"
    if insecure:
        text += "\nWARNING: privacy.insecure_seed is set. THE GUARANTEE IS VOID: anyone can recompute the noise."
    return text


def closing_line(summary: dict[str, Any], root: Path) -> str:
    """How it ended."""
    accuracy = "" if summary["accuracy"] is None else f", test accuracy {summary['accuracy']:.4f}"
    spent = "" if summary["epsilon"] is None else f", epsilon {summary['epsilon']:.4g} at delta {summary['delta']:g}"
    return (
        f"dpdist: {summary['status']} at step {summary['step']} of {summary['steps']}{accuracy}{spent} "
        f"(guarantee: {summary['guarantee']}); see {root / 'summary.json'}"
    )
