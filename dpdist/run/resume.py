"""How a run goes on from what its directory holds: which checkpoint to resume from, and as which incarnation.

Process 0 gathers the facts here; `dpdist.mechanism.incarnation` decides what they mean for the incarnation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpdist.config import Config, flatten
from dpdist.errors import InputError
from dpdist.mechanism.incarnation import ResumePoint, StepInputs, reasons_for_new_incarnation
from dpdist.mechanism.keys import Secret, fresh_nonce
from dpdist.mechanism.ledger import Ledger, LedgerError, Plan
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.directory import RunDirectory
from dpdist.run.progress import say
from dpdist.run.step_settings import step_settings

#: Settings that say which records are tested on, and those that may.
SPLIT = ("data.split_seed", "data.test_fraction")
_MAY_SPLIT = (*SPLIT, "data.source", "data.columns", "data.options")
_BRING_BACK = (
    "bring the ledger back as it was last, or name a new run.dir. An older copy, such as a backup, lacks what was "
    "spent since it was made."
)


@dataclass(frozen=True, kw_only=True)
class ResumeRequest:
    """What `find_start` decides on, beside the ledger."""

    config: Config
    run: RunDirectory
    checkpoints: Checkpoints
    secret: Secret
    #: True where the run had an earlier secret, which is gone.
    secret_lost: bool
    #: What the steps of this job depend on.
    inputs: StepInputs
    #: N, the number of training examples.
    dataset_size: int
    #: The keyed tag of the test data.
    test_data: str
    #: Its digest, which is not keyed, as `RunDirectory.begun` keeps it; and whether there is any.
    test_digest: str
    tested: bool
    #: d, the number of single parameters that train.
    coordinates: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """The plan and the checkpoint that this job starts from."""

    plan: Plan
    #: True where the plan is not in the ledger yet: a new run, or a new incarnation of one.
    fresh: bool
    #: The step of the checkpoint; None for the initial parameters of a new run.
    step: int | None
    #: The JSON part of that checkpoint.
    meta: dict[str, Any] | None

    @property
    def decisions(self) -> dict[str, Any] | None:
        """What an earlier part of the same incarnation decided; a new incarnation may decide otherwise."""
        return self.meta if self.meta is not None and self.meta["plan"]["nonce"] == self.plan.nonce else None

    def to_record(self) -> dict[str, Any]:
        """As JSON, for the other processes."""
        return asdict(self) | {"plan": self.plan.to_record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Start:
        """The inverse of `to_record`."""
        return cls(**{**record, "plan": Plan.from_record(record["plan"])})


def find_start(request: ResumeRequest, ledger: Ledger) -> Start:
    """Choose the checkpoint and incarnation to resume from. For process 0; writes nothing to the ledger.

    Raises:
        InputError: the ledger is gone or is another run's, a setting differs that a run cannot change, the checkpoint
            asked for is not there, or the plan is impossible.
    """
    # The accountant takes a second to import, and only process 0 needs it.
    from dpdist.run.plan import plan_incarnation, plan_run

    config, inputs = request.config, request.inputs
    common: dict[str, Any] = {"dataset_size": request.dataset_size, "coordinates": request.coordinates}
    common |= {"environment": inputs.environment}
    identity: dict[str, Any] = {"settings": inputs.settings, "code": inputs.code, "data": inputs.data}
    identity["test_data"] = request.test_data
    current = ledger.plan
    if current is None:
        if request.checkpoints.steps():
            raise InputError(
                "ledger.jsonl",
                None,
                f"is gone from the run in {request.run.root}, which has checkpoints: without it, what this run has "
                "spent is unknown. Name a new run.dir, or bring the ledger back as it was last: in an older copy, what "
                "was spent since is missing.",
            )
        plan = plan_run(config, nonce=fresh_nonce(request.secret, 0), **common)
        return Start(plan=replace(plan, **identity), fresh=True, step=None, meta=None)
    _require_one_statement(config, current)
    _require_one_unit(request)
    _require_one_split(request, current)
    asked = config.checkpoint.resume_step
    if asked == current.resume_step:
        asked = None  # this incarnation has gone back to it already, when it began
    step, meta, damaged = _newest_whole(request, ledger, asked)
    resume = ResumePoint(step=step, damaged=damaged, secret_lost=request.secret_lost, asked=asked is not None)
    reasons = reasons_for_new_incarnation(ledger, inputs, resume, _changed_settings(config, request.run))
    if not reasons:
        return Start(plan=current, fresh=False, step=step, meta=meta)
    plan = plan_incarnation(
        config,
        ledger,
        start=step or 0,
        reasons=reasons,
        nonce=fresh_nonce(request.secret, len(ledger.plans)),
        **common,
    )
    plan = replace(plan, **identity, resume_step=config.checkpoint.resume_step)
    return Start(plan=plan, fresh=True, step=step, meta=meta)


def _require_one_statement(config: Config, plan: Plan) -> None:
    """Raises where no single statement could cover what was released and what would be."""
    privacy, delta = config.privacy, None if plan.privacy is None else plan.privacy.delta
    for name, value, before, why in (
        ("enabled", privacy.enabled, plan.privacy is not None, "steps without noise cannot be covered"),
        ("insecure_seed", privacy.insecure_seed, plan.insecure, "the guarantee of the other part would be void"),
        ("delta", privacy.delta, delta, "one run has one delta"),
    ):
        asked = value is not None if name == "insecure_seed" else value
        if asked != before and (name != "delta" or privacy.enabled):
            was = before if name != "insecure_seed" else ("set" if before else "not set")
            raise InputError(
                f"privacy.{name}",
                value,
                f"the run began with {was}: {why}; resume it with that, or name a new run.dir.",
            )


def _require_one_split(request: ResumeRequest, plan: Plan) -> None:
    """Raises where records that were trained on may have become test records, whose accuracy is published exactly."""
    before, now = request.run.settings(), flatten(request.config)
    if request.secret_lost and request.tested:
        try:
            same = request.run.test_data.read_text().strip() == request.test_digest
        except OSError:
            same = False
        if not same:
            raise InputError(
                "data.source",
                now["data.source"],
                "the run's secret is lost, and with it what shows that no record that was trained on is a test record "
                f"now, unless these are the former ones, which {request.run.test_data} does not say; bring the files "
                "of private/ back, or name a new run.dir.",
            )
    # A former ledger has no tag of the test data, and a tag is keyed by the secret: then every change of data counts.
    known = bool(plan.test_data) and not request.secret_lost
    names = SPLIT if known else _MAY_SPLIT
    was = {name: f"the run began with {before[name]!r}" for name in names if before.get(name, now[name]) != now[name]}
    if not was and known and plan.test_data != request.test_data:
        what = "its test records" if request.config.data.unit is None else "its test records, or who has which record,"
        was = {"data.source": f"{what} are not those that the run began with"}
    for name, what in was.items():
        raise InputError(
            name,
            now[name],
            f"{what}: records that were trained on could become test records, and the accuracy on these is published "
            "exactly; resume the run with the former ones.",
        )


def _require_one_unit(request: ResumeRequest) -> None:
    """Raises where the run would go on to promise to a unit what it began to promise to a record, or to another one."""
    before, unit = request.run.settings().get("data.unit"), request.config.data.unit
    if unit is not None and unit != before:
        raise InputError(
            "data.unit",
            unit,
            f"the run began with {before!r} as its unit, and no statement covers both; name a new run.dir.",
        )
    if unit is not None and request.secret_lost:
        remedy = "the run's secret is lost, and with it what shows that units are still the same; name a new run.dir."
        raise InputError("data.unit", unit, remedy)
    if before is not None and unit is None:
        raise InputError(
            "data.unit", unit, f"the run began with {before!r}; resume it with that, or name a new run.dir."
        )


def _newest_whole(
    request: ResumeRequest, ledger: Ledger, asked: int | None
) -> tuple[int | None, dict[str, Any] | None, int]:
    """The newest readable checkpoint that is an ancestor of the current incarnation, or the one asked for.

    Moves nothing: a damaged checkpoint is evidence until the ledger holds the incarnation that it has led to.

    Returns:
        Its step and JSON part, or None twice; and the newest step with a damaged checkpoint, or 0.
    """
    run, checkpoints = request.run, request.checkpoints
    damaged = 0
    committed = checkpoints.steps()
    if asked is not None and asked not in committed:
        raise InputError(
            "checkpoint.resume_step",
            asked,
            f"{run.root} has no such checkpoint; it has {committed}; see checkpoint.keep.",
        )
    for step in reversed(committed):
        if asked is not None and step != asked:
            continue
        problem = checkpoints.verify(step)
        if problem is not None:
            if asked is not None:
                raise InputError(
                    "checkpoint.resume_step", asked, f"is damaged ({problem}); name another of {committed}."
                )
            damaged = max(damaged, step)
            say(f"dpdist: checkpoint {step} is damaged ({problem}); trying the one before it")
            continue
        meta = checkpoints.read_meta(step)
        try:
            ancestor = ledger.is_ancestor(meta["plan"]["incarnation"], step)
            known = ledger.plans[meta["plan"]["incarnation"]]
        except LedgerError as error:
            raise InputError(
                "ledger.jsonl", str(run.ledger), f"{error}, of which there is a checkpoint; {_BRING_BACK}"
            ) from None
        if not _is_record_of(known, meta["plan"], ledger.plans[0]):
            raise InputError(
                "ledger.jsonl",
                str(run.ledger),
                f"its plan is not the one that checkpoint {step} was made under; {_BRING_BACK}",
            )
        if ancestor:
            return step, meta, damaged
        if asked is not None:
            raise InputError("checkpoint.resume_step", asked, "was left behind by a later incarnation; name another.")
    return None, None, damaged


def _is_record_of(plan: Plan, record: Mapping[str, Any], first: Plan) -> bool:
    """Whether a checkpoint was made under `plan`, which the ledger holds."""
    try:
        return Plan.from_record(record, first) == plan
    except TypeError:  # a field is missing or unknown
        return False


def _changed_settings(config: Config, run: RunDirectory) -> list[str]:
    """The settings that a step depends on and that differ from `config.yaml`, in words."""
    before, after = run.settings(), step_settings(flatten(config))
    changed = [name for name in after if before and before.get(name) != after[name]]
    return [f"{name}: {before.get(name)!r} -> {after[name]!r}" for name in changed]


def require_fits(start: Start, leaves: dict[str, str]) -> None:
    """Check that the checkpoint's state has the shapes that this config's model and optimizer ask for.

    Args:
        leaves: dtype and shape by path, as in `TrainingSetup.decisions`.

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
