"""May this call begin or continue the run in the directory? Secret, ledger, plan and checkpoint must fit together."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dpdist.checkpoint import Checkpoints
from dpdist.cluster.agreement import decide
from dpdist.cluster.job import Job
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.identity import environment
from dpdist.mechanism.keys import Secret, fresh_nonce
from dpdist.mechanism.ledger import Ledger, LedgerError, Plan
from dpdist.rundir import RunDirectory


def open_secret(config: Config, run: RunDirectory, job: Job) -> Secret:
    """The run's secret, made by process 0 where the run is new.

    Raises:
        InputError: it is gone from a run that has begun, malformed, or readable by others.
    """
    if config.privacy.insecure_seed is not None:
        return Secret.from_insecure_seed(config.privacy.insecure_seed)
    decide(job, run.create_secret)
    return run.read_secret()


def open_ledger(run: RunDirectory, job: Job) -> Ledger | None:
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

    decide(job, read)
    return opened[0] if opened else None


def plan_of(ledger: Ledger | None, config: Config, dataset_size: int, secret: Secret, job: Job) -> Plan:
    """The plan in the ledger, or a new one, worked out by process 0 and not yet written.

    Raises:
        InputError: the plan is impossible, or the run began with other data or on another platform.
    """

    def read_or_make() -> dict[str, Any]:
        assert ledger is not None
        here = environment(job.platform)
        plan = ledger.plan
        if plan is None:
            from dpdist.plan import plan_run  # the accountant takes a second to import, and one process needs it

            plan = plan_run(config, dataset_size=dataset_size, nonce=fresh_nonce(secret), environment=here)
        if plan.environment != here:
            raise InputError(
                "run.dir",
                config.run.dir,
                f"was begun with {plan.environment}, but this is {here}, which may draw other noise from the same "
                "keys; use the former, or start a new run.",
            )
        if plan.dataset_size != dataset_size:
            raise InputError(
                "data.path",
                config.data.path,
                f"holds {dataset_size} training examples, but the run in {config.run.dir} began with "
                f"{plan.dataset_size}; bring those back, or start a new run.",
            )
        return asdict(plan)

    # Calibration takes seconds, minutes in extreme cases: it is part of starting up.
    return Plan(**decide(job, read_or_make, timeout=config.cluster.initialization_timeout))


def newest_step(checkpoints: Checkpoints, ledger: Ledger | None, run: RunDirectory, job: Job) -> int | None:
    """The step to resume from, checked against the ledger; None for a new run.

    Raises:
        InputError: the newest checkpoint is gone or belongs to another ledger. Going on from an older one would
            draw the noise of later steps again, perhaps for other gradients.
    """

    def check() -> int | None:
        assert ledger is not None
        newest, charged, saved = checkpoints.latest(), ledger.charged_steps(), ledger.saved_step
        if (newest is None and charged) or (newest is not None and newest < saved):
            raise InputError(
                "run.dir",
                str(run.root),
                f"has taken {charged} steps and saved step {saved}, but its newest checkpoint is "
                f"{'gone' if newest is None else newest}; bring that back, or start a new run.",
            )
        if newest is not None and newest > charged:
            raise InputError(
                "run.dir",
                str(run.root),
                f"has a checkpoint of step {newest}, but its ledger charges only {charged}; restore the ledger that "
                "belongs to it.",
            )
        return newest

    return decide(job, check)


def require_same_run(config: Config, run: RunDirectory, meta: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Check this call against what the newest checkpoint holds, which, unlike the text files, no editor has touched.

    Raises:
        InputError: a setting, the plan, the training data or the user's own code is another.
    """
    run.require_unchanged(config, earlier["config"])
    for name, remedy in (
        ("plan", "the plan in ledger.jsonl is not the one this checkpoint was made under; restore the ledger"),
        ("data", "the training data is not what this run began with; bring that back"),
        ("user_code", "the module:function code named in the config has changed; bring the old one back"),
    ):
        if earlier[name] != meta[name]:
            raise InputError("run.dir", str(run.root), f"{remedy}, or start a new run.")
