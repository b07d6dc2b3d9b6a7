"""Whether a run that goes on may draw the noise it drew before, or must begin a new incarnation.

An incarnation, and with it the nonce in every key, is kept where its steps would be replayed as they were: from the
newest checkpoint, with nothing changed that a step depends on. Replaying a step with the same noise but other
parameters would give away the difference of two gradient sums without noise, so everything else begins a new one. When
in doubt, one begins: that costs epsilon, never the guarantee.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpdist.mechanism.ledger import Ledger, Plan

#: Settings, or sections that end in a dot, that may change within an incarnation: nothing here alters a sample, a draw
#: or an update beyond the order of summation.
MAY_CHANGE = (
    "run.",
    "checkpoint.",
    "cluster.",
    "data.workers",
    "data.prefetch",
    "data.path",
    "sampling.assignment",
    "training.physical_batch_size",
    "training.evaluate_every",
    "training.evaluation_batch_size",
    "training.record_digests",
)


def step_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings by dotted name, those that a step depends on: all that `MAY_CHANGE` does not name."""
    return {
        name: value
        for name, value in settings.items()
        if not any(name.startswith(free) if free.endswith(".") else name == free for free in MAY_CHANGE)
    }


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 over `step_settings`."""
    return hashlib.sha256(json.dumps(step_settings(settings), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What this call's steps would depend on; the first four stand in the plan of the incarnation they belong to."""

    environment: str
    settings: str
    code: str
    data: str
    #: What the order of summation depends on.
    topology: str
    #: True where the same programs on the same topology give the same bits, as on CPU.
    repeatable: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is left of the run, from which this call would go on."""

    #: The step of the checkpoint to go on from; None where there is none.
    step: int | None
    #: The newest step of which there is a checkpoint that cannot be read; 0 where there is none.
    damaged: int
    secret_lost: bool
    #: True where the user has asked for this checkpoint, and so to go back behind newer ones.
    asked: bool


def reasons_for_new_incarnation(
    ledger: Ledger, now: StepInputs, found: Found, changed_settings: list[str]
) -> list[str]:
    """Why the current incarnation cannot be kept, for people to read; empty where it is kept.

    Args:
        ledger: of a run that has begun.
        changed_settings: the settings that differ, in words, as far as they can be told.
    """
    plan = ledger.plan
    assert plan is not None
    reasons = _changes(plan, now, changed_settings, secret_lost=found.secret_lost)
    if ledger.copied:
        reasons.append("the run directory is a copy")
    if found.asked:
        return [*reasons, f"checkpoint.resume_step = {found.step}"]
    return reasons + _losses(ledger, now, found)


def _changes(plan: Plan, now: StepInputs, changed_settings: list[str], *, secret_lost: bool) -> list[str]:
    """What a step depends on and is not as it was when the current incarnation began."""
    reasons = []
    if plan.settings != now.settings:
        reasons += changed_settings or ["a setting changed"]
    if plan.environment != now.environment:
        reasons.append(f"{plan.environment} -> {now.environment}")
    if plan.code != now.code:
        reasons.append(
            "the code of the model, the optimizer or the config's module:function changed (or flax or optax)"
        )
    if secret_lost:
        reasons.append("private/secret.key was lost")
    elif plan.data != now.data:
        reasons.append("the training data (or the secret) changed")
    return reasons


def _losses(ledger: Ledger, now: StepInputs, found: Found) -> list[str]:
    """Why going on from there would not replay what came after it, where that was saved and may have been seen."""
    if found.step is None:
        return ["no whole checkpoint is left"] if ledger.charged_steps() else []
    newest = max(ledger.saved_step, found.damaged)
    if found.step >= newest:
        return []
    # The same bits again release nothing new.
    known = newest == ledger.saved_step and ledger.topologies_since(found.step) == {now.topology}
    return [] if known and now.repeatable else [f"checkpoint {newest} is gone, and {found.step} is older"]
