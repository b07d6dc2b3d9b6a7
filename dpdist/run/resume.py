"""From what lies in a run directory to how the run goes on: secret, ledger, checkpoint, and which incarnation.

The facts are gathered here; what they mean for the incarnation is `dpdist.mechanism.incarnation`'s to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpdist.cluster.agreement import decide
from dpdist.cluster.lease import Lease
from dpdist.cluster.world import World
from dpdist.config import Config, flatten
from dpdist.errors import InputError
from dpdist.mechanism.incarnation import Found, StepInputs, reasons_for_new_incarnation, settings_digest, step_settings
from dpdist.mechanism.keys import Secret, fresh_nonce
from dpdist.mechanism.ledger import Ledger, LedgerError, Plan
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.directory import RunDirectory
from dpdist.run.fingerprints import environment, step_code_digest
from dpdist.run.progress import say


@dataclass(frozen=True, kw_only=True)
class Start:
    """How this call goes on with the run."""

    plan: Plan
    #: True where the plan is not in the ledger yet: a new run, or a new incarnation of one.
    fresh: bool
    #: The checkpoint to begin from, or None for the initial parameters.
    step: int | None
    #: What that checkpoint holds beside the state.
    meta: dict[str, Any] | None

    @property
    def decisions(self) -> dict[str, Any] | None:
        """What an earlier part of the same incarnation decided; a new one may decide otherwise."""
        return self.meta if self.meta is not None and self.meta["plan"]["nonce"] == self.plan.nonce else None


def present(config: Config, world: World, *, data: str) -> StepInputs:
    """What the steps of this job would depend on; `data` is the keyed tag of the training data."""
    shape = [world.platform, world.num_processes, world.device_count, list(world.host_of_device)]
    rounding = [config.sampling.assignment, config.training.physical_batch_size]
    return StepInputs(
        environment=environment(world.platform),
        settings=settings_digest(flatten(config)),
        code=step_code_digest(config),
        data=data,
        topology=json.dumps(shape + rounding),
        repeatable=world.platform == "cpu",
    )


def take_lease(config: Config, run: RunDirectory, world: World) -> Lease | None:
    """The hold on the run directory, on process 0, whose word counts for all; None elsewhere.

    Raises:
        InputError: another job is on this run; on all processes.
    """
    taken: list[Lease] = []

    def take() -> None:
        taken.append(Lease.acquire(run.private, config.cluster.lease_timeout))
        if taken[0].taken_from is not None:
            say(f"dpdist: {run.root} was held by {taken[0].taken_from}; going on in its place")

    # Whoever may live on another host is given its time to show it.
    decide(world, take, timeout=3 * config.cluster.lease_timeout + world.timeout)
    return taken[0] if taken else None


def open_secret(config: Config, run: RunDirectory, world: World) -> tuple[Secret, bool]:
    """The run's secret, made by process 0 where there is none; and whether an earlier one is lost.

    Raises:
        InputError: it is malformed, or readable by others.
    """
    if config.privacy.insecure_seed is not None:
        return Secret.from_insecure_seed(config.privacy.insecure_seed), False
    lost = decide(world, run.create_secret)
    return run.read_secret(), lost


def open_ledger(run: RunDirectory, world: World) -> Ledger | None:
    """The ledger on process 0, its only writer; None elsewhere.

    Raises:
        InputError: it is damaged; on all processes.
    """
    opened: list[Ledger] = []

    def read() -> None:
        try:
            opened.append(Ledger(run.ledger))
        except LedgerError as error:
            raise InputError("ledger.jsonl", str(run.ledger), f"{error}.") from None

    decide(world, read)
    return opened[0] if opened else None


def find_start(
    config: Config,
    run: RunDirectory,
    ledger: Ledger | None,
    checkpoints: Checkpoints,
    secret: Secret,
    now: StepInputs,
    world: World,
    *,
    secret_lost: bool,
    dataset_size: int,
) -> Start:
    """Where and as which incarnation the run goes on, decided by process 0; nothing is written to the ledger yet.

    Raises:
        InputError: the ledger is gone or is another run's, a setting differs that a run cannot change, the checkpoint
            asked for is not there, or the plan is impossible.
    """

    def look() -> dict[str, Any]:
        assert ledger is not None
        found = _look(config, run, ledger, checkpoints, secret, now, secret_lost=secret_lost, dataset_size=dataset_size)
        return asdict(found)

    # Calibration takes seconds, minutes in extreme cases: it is part of starting up.
    found = decide(world, look, timeout=config.cluster.initialization_timeout)
    return Start(**found | {"plan": Plan(**found["plan"])})


def _look(
    config: Config,
    run: RunDirectory,
    ledger: Ledger,
    checkpoints: Checkpoints,
    secret: Secret,
    now: StepInputs,
    *,
    secret_lost: bool,
    dataset_size: int,
) -> Start:
    from dpdist.run.plan import plan_on, plan_run  # the accountant takes a second to import, and one process needs it

    common: dict[str, Any] = {"dataset_size": dataset_size, "environment": now.environment}
    identity: dict[str, Any] = {"settings": now.settings, "code": now.code, "data": now.data}
    plan = ledger.plan
    if plan is None:
        if checkpoints.steps():
            raise InputError(
                "ledger.jsonl",
                None,
                f"is gone from the run in {run.root}, which has checkpoints; restore the ledger that belongs to them, "
                "or name a new run.dir: without it, what this run has spent is unknown.",
            )
        plan = plan_run(config, nonce=fresh_nonce(secret, 0), **common)
        return Start(plan=replace(plan, **identity), fresh=True, step=None, meta=None)
    _require_one_statement(config, plan)
    asked = config.checkpoint.resume_step
    if asked == plan.resume_step:
        asked = None  # gone back to already, when this incarnation began
    step, meta, damaged = _newest_whole(run, ledger, checkpoints, asked)
    found = Found(step=step, damaged=damaged, secret_lost=secret_lost, asked=asked is not None)
    reasons = reasons_for_new_incarnation(ledger, now, found, _changed_settings(config, run))
    if not reasons:
        return Start(plan=plan, fresh=False, step=step, meta=meta)
    plan = plan_on(
        config,
        ledger,
        start=step or 0,
        reasons=reasons,
        nonce=fresh_nonce(secret, len(ledger.plans)),
        **common,
    )
    plan = replace(plan, **identity, resume_step=config.checkpoint.resume_step)
    return Start(plan=plan, fresh=True, step=step, meta=meta)


def _require_one_statement(config: Config, plan: Plan) -> None:
    """Raises where no single statement could cover what was and what would be released."""
    privacy = config.privacy
    for name, value, before, why in (
        ("enabled", privacy.enabled, plan.noise_multiplier is not None, "steps without noise cannot be covered"),
        ("insecure_seed", privacy.insecure_seed, plan.insecure, "the guarantee of the other part would be void"),
        ("delta", privacy.delta, plan.delta, "one run has one delta"),
    ):
        now = value is not None if name == "insecure_seed" else value
        if now != before and (name != "delta" or privacy.enabled):
            was = before if name != "insecure_seed" else ("set" if before else "not set")
            raise InputError(
                f"privacy.{name}",
                value,
                f"the run began with {was}: {why}; resume it with that, or name a new run.dir.",
            )


def _newest_whole(
    run: RunDirectory, ledger: Ledger, checkpoints: Checkpoints, asked: int | None
) -> tuple[int | None, dict[str, Any] | None, int]:
    """The newest checkpoint that can be read and that led to the current incarnation, or the one asked for.

    What is damaged, or was left behind, is moved out of the way: it would count among those that are kept.

    Returns:
        its step and JSON part, or None; and the newest step of which there is a damaged one, or 0.
    """
    damaged = 0
    there = checkpoints.steps()
    if asked is not None and asked not in there:
        raise InputError(
            "checkpoint.resume_step", asked, f"{run.root} has no such checkpoint; it has {there}; see checkpoint.keep."
        )
    for step in reversed(there):
        if asked is not None and step != asked:
            continue
        problem = checkpoints.verify(step)
        if problem is not None:
            if asked is not None:
                raise InputError("checkpoint.resume_step", asked, f"is damaged ({problem}); name another of {there}.")
            damaged = max(damaged, step)
            to = checkpoints.set_aside(step, run.abandoned)
            say(f"dpdist: checkpoint {step} is damaged ({problem}); moved to {to}, trying the one before it")
            continue
        meta = checkpoints.read_meta(step)
        try:
            led_here = ledger.led_here(meta["plan"]["incarnation"], step)
            known = ledger.plans[meta["plan"]["incarnation"]]
        except LedgerError as error:
            raise InputError(
                "ledger.jsonl", str(run.ledger), f"{error}, of which there is a checkpoint; restore the ledger."
            ) from None
        if meta["plan"] != json.loads(json.dumps(asdict(known))):
            raise InputError(
                "ledger.jsonl",
                str(run.ledger),
                f"its plan is not the one that checkpoint {step} was made under; restore the ledger.",
            )
        if led_here:
            return step, meta, damaged
        if asked is not None:
            raise InputError("checkpoint.resume_step", asked, "was left behind by a later incarnation; name another.")
        checkpoints.set_aside(step, run.abandoned)
    return None, None, damaged


def _changed_settings(config: Config, run: RunDirectory) -> list[str]:
    """The settings that a step depends on and that `config.yaml` has otherwise, in words."""
    before, after = run.settings(), step_settings(flatten(config))
    changed = [name for name in after if before and before.get(name) != after[name]]
    return [f"{name}: {before.get(name)!r} -> {after[name]!r}" for name in changed]


def spending_of(ledger: Ledger | None) -> Callable[[int], float] | None:
    """`dpdist.run.plan.spending`, on process 0; None elsewhere, and without privacy."""
    if ledger is None:
        return None
    from dpdist.run.plan import spending  # the accountant takes a second to import, and one process needs it

    return spending(ledger)


def begin(
    start: Start,
    config: Config,
    run: RunDirectory,
    lease: Lease | None,
    ledger: Ledger | None,
    checkpoints: Checkpoints,
) -> None:
    """Write down that this part of the run begins, before its first step. For process 0."""
    assert lease is not None
    assert ledger is not None
    lease.check()
    ledger.begin(start.plan)  # first: a config without its incarnation would hide what changed
    if start.fresh and start.plan.reasons:
        say(
            f"dpdist: incarnation {start.plan.incarnation} begins at step {start.plan.start}, with fresh samples and "
            f"noise, since {'; '.join(start.plan.reasons)}. What was taken before stays charged."
        )
    if start.step is not None and start.meta is not None:
        checkpoints.synchronise(start.step)
        ledger.record_saved(start.step, start.meta["topology"])  # a crash may have come in between
    run.begin(config)
    for step in checkpoints.steps():
        if step > (start.step or 0) or start.step is None:
            checkpoints.set_aside(step, run.abandoned)


def require_fits(start: Start, leaves: dict[str, str]) -> None:
    """Check that the state of the checkpoint has the shape that this config's model and optimizer ask for.

    Args:
        leaves: dtype and shape by path, as `TrainingSetup.decisions` has them.

    Raises:
        InputError: it names a value that differs.
    """
    if start.meta is None:
        return
    before = start.meta["leaves"]
    for path in sorted({*before, *leaves}):
        if before.get(path) != leaves.get(path):
            raise InputError(
                "model, optimizer",
                "; ".join(start.plan.reasons),
                f"the checkpoint of step {start.step} has {path} as {before.get(path, 'nothing')}, which would now be "
                f"{leaves.get(path, 'nothing')}; go on with the former model and optimizer, or name a new run.dir.",
            )
