"""Whether a resumed run may draw the same noise again, or must begin a new incarnation.

Every key is a function of (secret, nonce, step). What must never happen is that two results of one (nonce, step) are
seen: noise cancels in their difference. So:

1. Going back behind a saved step always begins a new incarnation, which has a nonce of its own. No step is replayed
   that may have been seen, so nobody has to know whether the replay would give the same bits. What decides these, such
   as processor, compiler, order of summation or a record that no fingerprint reads, is no input of this rule.
2. From the newest saved step on, what a crash has lost is taken again under the same nonce. None of it was seen: only
   checkpoints carry parameters out of a job, and what is measured on them is shown after the ledger has noted them. So
   these steps may come out otherwise, on other devices for one.
3. Whatever somebody has changed begins one too: settings, data, code, libraries, the flags that decide bits. Of these
   only the mechanism's constants must, to be charged as what they are. The others are a second wall, which holds where
   rule 2 does not: somebody read a checkpoint in the moment between its commit and the ledger's note, the job was
   killed in that moment, and the checkpoint was deleted before the run was started again. (One that is damaged counts
   as saved, noted or not.) No record tells such a checkpoint from a save that was cut short.

When in doubt, one begins: that costs epsilon, never the guarantee.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpdist.mechanism.ledger import Ledger, Plan


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What the steps of this job depend on, as an incarnation's plan records it."""

    environment: str
    settings: str
    code: str
    data: str


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The checkpoint that this job resumes from, and what is missing beside it."""

    #: Its step; None where there is no whole checkpoint.
    step: int | None
    #: The newest step whose checkpoint cannot be read; 0 where all can.
    damaged: int
    secret_lost: bool
    #: True where the user asked for this checkpoint, and so to go back behind newer ones.
    asked: bool


def reasons_for_new_incarnation(
    ledger: Ledger, inputs: StepInputs, resume: ResumePoint, changed_settings: list[str]
) -> list[str]:
    """Why the current incarnation cannot be kept, for people to read; empty where it is kept.

    Args:
        ledger: of a run that has begun.
        changed_settings: the settings that differ, in words, as far as they are known.
    """
    reasons = _changes(ledger.plans[-1], inputs, changed_settings, secret_lost=resume.secret_lost)
    if ledger.copied:
        reasons.append("the run directory is a copy")
    if resume.asked:
        return [*reasons, f"checkpoint.resume_step = {resume.step}"]
    return reasons + _losses(ledger, resume)


def _changes(plan: Plan, inputs: StepInputs, changed_settings: list[str], *, secret_lost: bool) -> list[str]:
    """What has changed since the current incarnation began, of all that a step depends on."""
    reasons = []
    if plan.settings != inputs.settings:
        reasons += changed_settings or ["a setting changed"]
    if plan.environment != inputs.environment:
        reasons.append(f"{plan.environment} -> {inputs.environment}")
    if plan.code != inputs.code:
        reasons.append(
            "the code of the model, the optimizer or the config's module:function changed (or flax or optax)"
        )
    if secret_lost:
        reasons.append("private/secret.key was lost")
    elif plan.data != inputs.data:
        reasons.append("the training data (or the secret) changed")
    return reasons


def _losses(ledger: Ledger, resume: ResumePoint) -> list[str]:
    """The later steps that were saved and so may have been seen, as a reason."""
    if resume.step is None:
        return ["no whole checkpoint is left"] if ledger.charged_steps() else []
    newest = max(ledger.saved_step, resume.damaged)
    return [] if resume.step >= newest else [f"checkpoint {newest} is gone, and {resume.step} is older"]
