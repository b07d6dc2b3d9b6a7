"""How a run ended, in `summary.json` and in a line or two."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.mechanism.ledger import Plan
from dpdist.run import goodput
from dpdist.run.layout import RunPaths

#: Among the reasons of every incarnation of a trial, so that its ledger says what it is, whatever becomes of its config
#: and of the directory that it is in.
TRIAL = "it is a trial of a search"
#: What holds for a trial: the search has chosen among many, and what was chosen shows something of the others.
OF_TRIAL = "none by itself: a trial of a search, of which only what `dpdist tune` has released is covered"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where a run stands when its summary is written."""

    #: Steps taken.
    step: int
    #: True where nothing is left to do, the last evaluation included.
    ended: bool
    #: Of the released parameters; None where the run failed.
    params_sha256: str | None
    #: Whether these hold neither NaN nor infinity; True where the run failed.
    finite: bool
    #: Test metrics by name, the one of first interest first; empty where nothing was evaluated.
    metrics: dict[str, float | None]
    #: What the ledger charges; None without privacy.
    epsilon_spent: float | None
    charged_steps: int
    #: Of the steps whose time is public; None before there are any.
    examples_per_second: float | None
    #: `tflops_per_device` and `mfu` at this rate.
    speed: dict[str, float | None]
    processes: int
    devices: int
    #: From the start of this part of the run until its first step could begin.
    seconds_to_first_step: float
    #: `dpdist.run.goodput.public_of` the whole run.
    goodput: dict[str, Any]


def summarise(config: Config, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The content of `summary.json`.

    `status` is `finished` or `budget_exhausted` where nothing is left to do, `preempted` where something is, and
    `failed` without parameters.

    `epsilon` is that of the whole plan, also for a run that has stopped early: a stop that someone decides on
    after seeing results must not lower it. `epsilon_spent` is what the ledger charges.
    """
    if outcome.params_sha256 is None:
        status = "failed"
    elif not outcome.ended:
        status = "preempted"
    else:
        status = "finished" if plan.steps == plan.steps_asked else "budget_exhausted"
    record = plan.to_record()
    return {
        "status": status,
        "step": outcome.step,
        "steps": plan.steps_asked,
        "epsilon": record["epsilon"],
        "epsilon_spent": outcome.epsilon_spent,
        "epsilon_rdp": record["epsilon_rdp"],
        "accountant": record["accountant"],
        "target_epsilon": record["target_epsilon"],
        "delta": record["delta"],
        "adjacency": plan.adjacency,
        "noise_multiplier": record["noise_multiplier"],
        "sampling_probability": plan.sampling_probability,
        "expected_batch_size": plan.expected_batch_size,
        "dataset_size": plan.dataset_size,
        "clip_norm": record["clip_norm"],
        "accuracy": outcome.metrics.get("accuracy"),
        "metrics": outcome.metrics,
        "examples_per_second": outcome.examples_per_second,
        **outcome.speed,
        "processes": outcome.processes,
        "devices": outcome.devices,
        "seconds_to_first_step": outcome.seconds_to_first_step,
        "goodput": outcome.goodput,
        "environment": plan.environment,
        "incarnation": plan.incarnation,
        "incarnation_reasons": list(plan.reasons),
        "charged_steps": outcome.charged_steps,
        "guarantee": guarantee(config, [plan], finite=outcome.finite),
        "params_sha256": outcome.params_sha256,
    }


def guarantee(config: Config, plans: Sequence[Plan] = (), *, finite: bool) -> str:
    """`holds`, or why it does not.

    Args:
        plans: what the run's ledger holds, or the newest of it.
        finite: whether the released parameters hold neither NaN nor infinity. Training that diverges may end in such
            ones under a guarantee that holds, as post-processing of noisy sums; but so does a record whose gradient
            got past the bound C, which finite noise cannot hide, and from the parameters nobody can tell which it was.
    """
    if not config.privacy.enabled:
        return "none: privacy.enabled is false, this is the plain arm"
    if config.privacy.insecure_seed is not None:
        return "void: privacy.insecure_seed makes sampling and noise known to everyone"
    if not finite:
        return "void: parameters are not finite, and whether a single record made them so cannot be told"
    if config.run.trial or is_trial(plans):
        return OF_TRIAL
    if config.privacy.allow_large_delta:
        return "holds, but privacy.allow_large_delta lets delta reach 1/N: a random record may be published outright"
    return "holds"


def is_trial(plans: Sequence[Plan]) -> bool:
    """Whether a ledger with these plans is that of a trial of a search."""
    return any(TRIAL in plan.reasons for plan in plans)


def exposed_secret(run: RunPaths) -> str | None:
    """Why the guarantee is void where others than the owner can read the run's secret; None where they cannot."""
    if not run.secret.exists() or not (mode := stat.S_IMODE(run.secret.stat().st_mode)) & 0o077:
        return None
    return f"void: private/secret.key can be read by others (mode {mode:o}), who could subtract the noise"


def opening_line(plan: Plan, world: World, *, insecure: bool) -> str:
    """One line about the run that is about to start."""
    where = f"{world.num_processes} process(es), {world.device_count} {world.platform} device(s)"
    text = (
        f"dpdist: {plan.steps} steps at q = {plan.sampling_probability:.4g} of {plan.dataset_size} examples on {where}"
    )
    if plan.privacy is None:
        return text + "; WITHOUT PRIVACY (privacy.enabled=false)"
    text += (
        f"; noise multiplier {plan.privacy.noise_multiplier:.4g}, clip norm {plan.privacy.clip_norm:g}: "
        f"epsilon {plan.privacy.epsilon:.4g} at delta {plan.privacy.delta:g}"
    )
    if is_trial([plan]):
        text += ", by itself; it is a trial of a search, and what that costs is in its search.json"
    if plan.steps < plan.steps_asked:
        text += f"; the budget ends before the {plan.steps_asked} steps asked for"
    if insecure:
        text += "\nWARNING: privacy.insecure_seed is set. THE GUARANTEE IS VOID: anyone can recompute the noise."
    return text


def going_on(step: int, steps: int, ended: str, *, taken: bool) -> str:
    """From which step a run goes on, and why.

    Args:
        taken: whether there is a checkpoint to go on from.
        ended: how the part before ended, by `events.how_it_ended`.
    """
    if not taken:
        return f"dpdist: begins at step {step} of {steps}: the start before ended without a checkpoint"
    why = {
        "preempted": "the part before was told to leave there",
        "failed": "the part before failed, and this is its newest checkpoint",
        "finished": "it has more to do than it had",
    }.get(ended, "the part before was cut short, and this is its newest checkpoint")
    return f"dpdist: going on from step {step} of {steps}: {why}"


def closing_line(summary: dict[str, Any], root: Path) -> str:
    """How the run ended, and what its time went into: two lines."""
    told = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in summary["metrics"].items()]
    metrics = f", test {', '.join(told)}" if told else ""
    spent = "" if summary["epsilon"] is None else f", epsilon {summary['epsilon']:.4g} at delta {summary['delta']:g}"
    if spent and summary["status"] == "preempted":
        spent += f" for all {summary['steps']} steps"
    return (
        f"dpdist: {summary['status']} at step {summary['step']} of {summary['steps']}{metrics}{spent} "
        f"(guarantee: {summary['guarantee']}); see {root / 'summary.json'}\n"
        f"dpdist: {goodput.sentence(summary['goodput'])}"
    )


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
