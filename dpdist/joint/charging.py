"""How a run is charged to the registry of its dataset, before its first step.

Order of writing: the ledger's plan, the charge, then the first step. Killed after the first, a run is charged when it
is started again; after the second, it finds its charge. The run notes the digest of its line under `private/`, and goes
on with no registry that lacks it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism.ledger import Ledger, Plan
from dpdist.run.directory import write_atomically
from dpdist.run.layout import RunPaths

if TYPE_CHECKING:
    from dpdist.joint.members import Member
    from dpdist.joint.registry import Registry

#: Seconds to wait for others who write to the same registry.
PATIENCE = 60.0


def charge_of(config: Config, run_dir: Path, ledger: Ledger | None, plan: Plan) -> dict[str, Any]:
    """The charge of a run whose current incarnation is, or is to be, `plan`.

    Args:
        ledger: None of a run that has not begun.

    Raises:
        InputError: it adds no noise, or its secret is a known seed: no budget covers that.
    """
    before = [] if ledger is None else [each for each in ledger.plans if each.nonce != plan.nonce]
    plans = [*before, plan]
    for each in plans:
        if each.privacy is None or each.insecure:
            what = "adds no noise" if each.privacy is None else "has a known seed for a secret"
            remedy = f"this run {what}, and no budget covers it; train it on public data, with run.registry=null."
            raise InputError("run.registry", config.run.registry, remedy)
    from dpdist.joint.members import (
        split_of,
        unit_name,
    )  # the accountant takes a second to import, and one process needs it

    first, terms = plans[0], plans[0].private_terms()
    kinds = [(each.nonce, each.sampling_probability, each.private_terms().noise_multiplier) for each in plans]
    steps = [ledger.charged_to(each.incarnation) for each in before if ledger is not None] + [plan.steps - plan.start]
    return {
        "record": "charge",
        "run": first.nonce,
        "run_dir": str(run_dir.absolute()),
        "delta": terms.delta,
        "order": terms.renyi_order,
        "unit": unit_name(config),
        "records_per_unit": config.data.records_per_unit,
        "split": split_of(config),
        "dataset_size": plan.dataset_size,
        "first": [first.sampling_probability, terms.noise_multiplier, first.steps - first.start],
        "incarnations": [[*kind, count] for kind, count in zip(kinds, steps, strict=True)],
    }


def room_for(config: Config, plan: Plan) -> dict[str, Any] | None:
    """What the registry that the config names has left, and whether a new run of `plan` fits, as JSON; writes nothing.

    Returns:
        None where the config names none.

    Raises:
        InputError: the registry is not there or damaged, or would refuse the run for another reason than its budget.
    """
    if config.run.registry is None or config.run.registry_dataset is None:
        return None
    from dpdist.joint.registry import Registry
    from dpdist.joint.standing import standing

    registry = Registry(Path(config.run.registry), config.run.registry_dataset)
    registry.require_made()
    record = charge_of(config, Path(config.run.dir), None, plan)
    registry.require_alike(record)
    found, cost = standing(registry.folder, registry.dataset), registry.cost_with(record)
    told = {name: found[name] for name in ("dataset", "epsilon", "delta", "budget", "left")}
    fits = registry.budget is None or cost <= registry.budget
    return told | {"runs": len(registry.runs), "epsilon_with_this_run": cost, "fits": fits}


def require_room(config: Config, run: RunPaths, ledger: Ledger, plan: Plan) -> None:
    """Check, before anything is compiled, that the registry has room for `plan`. For process 0; writes nothing.

    Raises:
        InputError: it has not, is damaged, lacks what this run was charged, or is not the one that it is charged to.
    """
    where = _named(config, run)
    if where is not None:
        from dpdist.joint.registry import Registry

        registry = Registry(*where)
        _require_own_line(run, registry)
        registry.require_room(charge_of(config, run.root, ledger, plan))


def charge(config: Config, run: RunPaths, ledger: Ledger) -> None:
    """Charge the run to its registry, if it has one, after its ledger holds the plan and before the first step.

    For process 0. Nothing to do where it is charged already.

    Raises:
        InputError: as `require_room`: another run may have come first.
    """
    where = _named(config, run)
    if where is None:
        return
    from dpdist.joint.registry import locked

    with locked(*where, PATIENCE) as registry:
        _require_own_line(run, registry)
        record = charge_of(config, run.root, ledger, ledger.plans[-1])
        registry.require_room(record)
        # Where it is charged already, the newest line there is: that must not be missed later either.
        digest = registry.digests[-1] if registry.holds(record) else registry.append(record)
    note = {"registry": str(where[0].absolute()), "dataset": where[1], "line": digest}
    write_atomically(_note(run), json.dumps(note) + "\n", mode=0o600)


def charge_spent(folder: Path, dataset: str, paths: Sequence[Path]) -> None:
    """Charge runs, exports and sweeps that were trained without the registry, also beyond its budget: they are spent.

    Raises:
        InputError: one has no guarantee, no nonces, or another unit than the registry's runs; nothing is charged then.
    """
    from dpdist.joint.members import read
    from dpdist.joint.registry import locked, split_differs

    members, _, _ = read(paths)
    for member in members:
        if member.kind == "search" or not member.nonces:
            what = "the best of a search" if member.kind == "search" else "an export from before there were nonces"
            raise InputError("--charge", str(member.path), f"is {what}, which a registry cannot count.")
    with locked(folder, dataset, PATIENCE) as registry:
        records = [_record_of(member) for member in members]
        for record in records:
            registry.require_alike(record)
            if record["unit"] != records[0]["unit"]:
                raise InputError("--charge", record["run_dir"], "is for another unit than the first; charge one unit.")
            if (other := split_differs([each["split"] for each in records], record["split"])) is not None:
                raise InputError("--charge", record["run_dir"], f"has another {other} than another of them.")
        for record in records:
            if not registry.holds(record):
                registry.append(record)


def _record_of(member: Member) -> dict[str, Any]:
    charges = member.charges
    first = charges.first
    return {
        "record": "charge",
        "run": next(iter(member.nonces)),
        "run_dir": str(member.path.absolute()),
        "delta": charges.delta,
        "order": charges.order,
        "unit": member.unit,
        "records_per_unit": member.records_per_unit,
        "split": dict(member.split),
        "dataset_size": member.dataset_size,
        "first": [first.sampling_probability, first.noise_multiplier, first.steps],
        "incarnations": [
            [nonce, phase.sampling_probability, phase.noise_multiplier, phase.steps]
            for nonce, phase in zip(member.nonces, charges.phases, strict=True)
        ],
    }


def _note(run: RunPaths) -> Path:
    return run.private / "registry.json"


def _named(config: Config, run: RunPaths) -> tuple[Path, str] | None:
    """The registry that the config names.

    Raises:
        InputError: the run is charged to another one.
    """
    folder, dataset = config.run.registry, config.run.registry_dataset
    if (before := _read_note(run)) is not None and dataset != before["dataset"]:
        remedy = f"the run is charged to {before['dataset']} in {before['registry']}; resume it with these."
        raise InputError("run.registry_dataset", dataset, remedy)
    return None if folder is None or dataset is None else (Path(folder), dataset)


def _read_note(run: RunPaths) -> dict[str, str] | None:
    try:
        return dict(json.loads(_note(run).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        remedy = "is not whole, so where this run is charged is unknown; remove it if the registry has the run."
        raise InputError("run.registry", str(_note(run)), remedy) from None


def _require_own_line(run: RunPaths, registry: Registry) -> None:
    note = _read_note(run)
    if note is not None and note["line"] not in registry.digests:
        remedy = (
            "has not the line that this run was charged with: it was cut, or is another file. Bring it back as it was "
            "last; until then, what was spent is unknown, and no step is taken."
        )
        raise InputError("run.registry", str(registry.path), remedy)
