"""The runs that are composed: read from run directories, exports and sweeps, each counted once, or refused.

Everything is decided on the safe side. Two of them are the same run where they share the nonce of an incarnation, which
is random and public. A run that is named twice, or beside an export of it, is counted once; copies of a run that went
on apart are charged in full each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.joint.selection import stated_cost
from dpdist.joint.together import Charges
from dpdist.mechanism.accounting import Spent
from dpdist.mechanism.composition import Phase
from dpdist.mechanism.ledger import Ledger, LedgerError
from dpdist.run.layout import RunPaths
from dpdist.run.summary import exposed_secret, guarantee, is_trial

PRIVACY, SWEEP, SEARCH, CONFIG = "privacy.json", "sweep.json", "search.json", "config.yaml"
#: Relative difference that two versions of the accountant may have.
VERSIONS_DIFFER = 1e-6
#: How much more than it costs an epsilon may be stated as, relatively: more shows that another number was changed.
STATED_ABOVE = 1e-3
#: What reading a file that says something else than it should may raise.
BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError)
#: How exports from before there was `unit_name` say that the unit is a record.
_ONE_RECORD = "one training record"
#: What `guarantee` says of a run that has one, by `dpdist.run.summary.guarantee`.
HOLDS = (
    "holds",
    "holds, but privacy.allow_large_delta lets delta reach 1/N: a random record may be published outright",
)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One private run whose guarantee holds."""

    #: The path that it was read from.
    path: Path
    #: `run`, `export`, or `search`: the export of the best trial of one, which states what the whole search costs.
    kind: str
    charges: Charges
    #: What it states of itself, at its own delta; no less than its constants cost.
    stated: Spent
    #: For whom the guarantee is, by `unit_name`.
    unit: str
    #: The most records that a unit brings; None where the unit is a record, or where that is not known.
    records_per_unit: int | None
    dataset_size: int
    #: When its ledger was made, in seconds; None where that is not known.
    born: float | None
    #: What each incarnation is charged, by its nonce; empty in exports from before these were noted.
    nonces: Mapping[str, int]
    #: What says which records are tested on, by setting; empty where it is not known.
    split: Mapping[str, Any]
    #: What has to be believed of it.
    on_trust: Sequence[str] = field(default_factory=tuple)


def unit_name(config: Config) -> str:
    """For whom a run's guarantee is, in a form that two runs can be compared by."""
    data = config.data
    if data.unit is not None:
        return f"all records with one value of {data.unit!r}"
    if data.source == "text" and data.options.get("pack"):
        return f"a block of {data.options.get('length')} tokens"
    return "a record"


def split_of(config: Config) -> dict[str, Any]:
    """What says which records a run is tested on, by setting."""
    return {"data.split_seed": config.data.split_seed, "data.test_fraction": config.data.test_fraction}


def read(paths: Sequence[Path]) -> tuple[list[Member], list[str], bool]:
    """The runs below these paths: run directories, exports and sweeps.

    Returns:
        The runs, each once; what was counted otherwise than it was named, in words; and whether the records say that
        all were asked for before a result of one was seen: they are the points of one sweep, and all have begun.

    Raises:
        InputError: one is none of these, or no guarantee holds for it.
    """
    found: list[Member] = []
    notes: list[str] = []
    at_once = len(paths) == 1
    for path in paths:
        if (path / SWEEP).exists():
            points, said, fixed = _sweep(path)
            found, notes, at_once = [*found, *points], [*notes, *said], at_once and fixed
        elif (path / SEARCH).exists():
            found.append(_search(path))
        elif path.name == PRIVACY or (path / PRIVACY).exists():
            found.append(_export(path if path.name == PRIVACY else path / PRIVACY))
        else:
            found.append(_run(path))
    if not found:
        raise InputError("RUN", str(paths[0]), "no run of it has begun: there is nothing to compose.")
    once, said = _each_once(found)
    return once, [*notes, *said], at_once


def _sweep(root: Path) -> tuple[list[Member], list[str], bool]:
    try:
        asked = json.loads((root / SWEEP).read_text())["asked"]
        digests = {str(point["name"]): point.get("digest") for points in asked for point in points}
    except (*BROKEN, OSError):
        remedy = "is not whole: which points there were is unknown; bring it back, or name the runs themselves."
        raise InputError(SWEEP, str(root / SWEEP), remedy) from None
    if gone := [name for name in digests if not (root / name).is_dir()]:
        raise InputError("RUN", str(root), f"the points {', '.join(gone)} are gone, and with them what they cost.")
    waiting = [name for name in digests if not RunPaths(root / name).ledger.exists()]
    notes = [f"{root / name} has not begun: it has cost nothing yet" for name in waiting]
    begun = [name for name in digests if name not in waiting]
    points = [_run(root / name) for name in begun]
    other = [name for name in begun if Ledger(RunPaths(root / name).ledger).plans[0].settings != digests[name]]
    notes += [f"{root / name} began with other settings than the sweep asked for: not as planned" for name in other]
    return points, notes, len(asked) == 1 and not waiting and not other


def _search(root: Path) -> Member:
    """A search's directory stands for the model that it has released, with the epsilon of the whole."""
    if not (root / "best" / PRIVACY).exists():
        remedy = "is a search that has released no model (yet); what it costs all the same is in its search.json."
        raise InputError("RUN", str(root), remedy)
    return _export(root / "best" / PRIVACY)


def _run(root: Path) -> Member:
    paths = RunPaths(root)
    if not paths.ledger.exists():
        raise InputError("RUN", str(root), f"is no run (ledger.jsonl), export ({PRIVACY}) or sweep ({SWEEP}).")
    try:
        config = config_module.from_dict(configfile.read(paths.config))
        ledger = Ledger(paths.ledger)
        born = json.loads(paths.ledger.read_bytes().partition(b"\n")[0] or b"{}").get("born")
    except (LedgerError, OSError) as error:
        raise InputError("RUN", str(root), f"cannot be read: {error}.") from None
    if not ledger.plans:
        raise InputError("RUN", str(root), "has not begun: it has no plan, and has cost nothing yet; leave it out.")
    _require_guarantee(root, _broken(paths, config, ledger))
    charges, terms = Charges.of_ledger(ledger), ledger.plans[-1].private_terms()
    return Member(
        path=root,
        kind="run",
        charges=charges,
        stated=_checked(root, charges, terms.epsilon, terms.epsilon_rdp, terms.accountant),
        unit=unit_name(config),
        records_per_unit=config.data.records_per_unit,
        dataset_size=ledger.plans[-1].dataset_size,
        born=None if born is None else float(born),
        nonces={plan.nonce: ledger.charged_to(plan.incarnation) for plan in ledger.plans},
        split=split_of(config),
        on_trust=[f"{root} is a copy: what the original has released since is not in it"] if ledger.copied else [],
    )


def _broken(paths: RunPaths, config: Config, ledger: Ledger) -> str | None:
    """Why no guarantee holds for a run; None where it holds."""
    if any(plan.privacy is None for plan in ledger.plans):
        return "none: it adds no noise (privacy.enabled is false)"
    if any(plan.insecure for plan in ledger.plans):
        return "void: privacy.insecure_seed makes sampling and noise known to everyone"
    if (why := exposed_secret(paths)) is not None:
        return why
    told = guarantee(config, ledger.plans, finite=True)
    if config.run.trial or is_trial(ledger.plans):
        return told
    try:
        summary = json.loads(paths.summary.read_text())
        told = summary["guarantee"]
        if (summary.get("epsilon") or 0.0) > ledger.plans[-1].private_terms().epsilon * (1 + VERSIONS_DIFFER):
            return "unknown: summary.json says that it has cost more than its ledger does, which was cut"
    except FileNotFoundError:
        pass  # it goes on
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown: summary.json is not whole; run the training command again, which writes it anew"
    return None if str(told).startswith("holds") else str(told)


def _export(file: Path) -> Member:
    try:
        facts = parse_statement(file.read_text())
        _require_guarantee(file.parent, None if facts["guarantee"] in HOLDS else facts["guarantee"])
        searched, charges = facts.get("search"), charges_of(facts)
        stated = _checked(file.parent, charges, facts["epsilon"], facts["epsilon_rdp"], facts["accountant"], searched)
        # A joint bound is computed from the constants: a sigma that somebody has raised would lower it.
        if searched is None and stated.epsilon > charges.alone().epsilon * (1 + STATED_ABOVE):
            cost = charges.alone().epsilon
            remedy = f"states epsilon {stated.epsilon:.6g}, but its constants cost {cost:.6g} only: these were changed."
            raise InputError("RUN", str(file.parent), remedy)
        data, split = _data_of(file.parent / CONFIG)
        return Member(
            path=file.parent,
            kind="search" if "search" in facts else "export",
            charges=charges,
            stated=stated,
            unit=facts.get("unit_name") or _old_unit(file, facts),
            records_per_unit=data.get("records_per_unit"),
            dataset_size=facts["dataset_size"],
            born=None,
            nonces={each["nonce"]: each["charged_steps"] for each in facts["incarnations"] if "nonce" in each},
            split=split,
            on_trust=[f"{file} is what its sender wrote: see `dpdist verify`"],
        )
    except InputError:
        raise
    except (*BROKEN, OSError) as error:
        raise InputError(
            PRIVACY, str(file), f"is damaged ({type(error).__name__}: {error}); get the export again."
        ) from None


def _data_of(config: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `data` section of an export's config and its split; empty where the statement came alone, or from before."""
    data = dict(configfile.read(config)["data"]) if config.exists() else {}
    split = {f"data.{name}": data[name] for name in ("split_seed", "test_fraction") if name in data}
    return data, split if len(split) == 2 else {}


def parse_statement(text: str) -> dict[str, Any]:
    """A statement as written: no name stands twice in it, of which readers would take one or the other.

    Raises:
        ValueError, RecursionError: it is no JSON object, one with NaN or infinity, or a name stands twice.
    """
    facts = json.loads(text, object_pairs_hook=_each_name_once, parse_constant=_no_number)
    if not isinstance(facts, dict):
        raise ValueError("no object")
    return facts


def _each_name_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def charges_of(facts: Mapping[str, Any]) -> Charges:
    """What an export's statement says was charged and planned.

    Raises:
        KeyError, TypeError, IndexError: it is no such statement.
        ValueError: it is one from before several incarnations could be read from it, or its numbers make no sense.
    """
    from dpdist.run.calibration import best_order

    told = facts["incarnations"]
    if len(told) > 1 and ("steps" not in told[0] or "renyi_order" not in facts):
        raise ValueError("it was written before exports said how an earlier plan was; export the run again")
    kinds = [(float(each["sampling_probability"]), float(each["noise_multiplier"])) for each in told]
    first = Phase(*kinds[0], int(told[0].get("steps", facts["steps"])))
    delta, last = float(facts["delta"]), int(facts["steps"]) - int(told[-1]["start"])
    counts = [each[name] for each in told for name in ("start", "charged_steps")]
    counts += [first.steps, last, facts["released_after_step"]]
    sound = all(type(count) is int and count >= 0 for count in counts) and last > 0
    if not sound or not 0 < delta < 1 or not all(0 < q <= 1 and 0 < sigma < math.inf for q, sigma in kinds):
        raise ValueError("its constants make no sense")
    _require_charged(told, facts["released_after_step"], last)
    charged = [Phase(*kind, int(each["charged_steps"])) for kind, each in zip(kinds[:-1], told, strict=False)]
    order = int(facts["renyi_order"]) if "renyi_order" in facts else best_order(first, delta)
    return Charges(first=first, phases=(*charged, Phase(*kinds[-1], last)), delta=delta, order=order)


def _require_charged(told: Sequence[Mapping[str, Any]], released: int, last: int) -> None:
    """Check that every step that led to the released parameters is charged.

    Args:
        told: the incarnations; each but the first went on from a step that an earlier one was charged for.
        released: the step after which the parameters are.
        last: steps that the newest plan holds.

    Raises:
        ValueError: it is not.
    """
    if told[0]["start"] != 0:
        raise ValueError("its first incarnation does not begin at step 0")
    ends = [each["start"] + each["charged_steps"] for each in told]
    for number, each in enumerate(told[1:], 1):
        if each["start"] > max(ends[:number]):
            raise ValueError(
                f"its incarnation {number} begins after step {each['start']}, which nobody was charged for"
            )
    if released > ends[-1]:
        raise ValueError(f"its parameters are from step {released}, and {ends[-1]} are charged")
    if told[-1]["charged_steps"] > last:
        raise ValueError("more steps are charged than its newest plan holds")


def _old_unit(file: Path, facts: Mapping[str, Any]) -> str:
    if facts["unit"].startswith(_ONE_RECORD):
        return "a record"
    raise InputError(PRIVACY, str(file), "does not name its unit in a form to compare; export the run again.")


def _require_guarantee(path: Path, why: str | None) -> None:
    if why is not None:
        remedy = f"its guarantee is {why}; no epsilon covers it, nor it together with others."
        raise InputError("RUN", str(path), remedy)


def _checked(
    path: Path,
    charges: Charges,
    epsilon: float,
    epsilon_rdp: float,
    accountant: str,
    searched: Mapping[str, Any] | None = None,
) -> Spent:
    """What a run states of itself, or of the search that it is the best trial of.

    Raises:
        InputError: that is less than what it charges costs.
    """
    alone = charges.alone()
    if searched is not None:
        if not charges.kept_to_plan:
            remedy = "is the best trial of a search, and has left its plan: no bound of the search covers that."
            raise InputError("RUN", str(path), remedy)
        alone = stated_cost(searched, released=charges.first, delta=charges.delta)
    cost = alone.epsilon
    if not epsilon >= cost * (1 - VERSIONS_DIFFER):
        remedy = f"states epsilon {epsilon:.6g}, but what it charges costs {cost:.6g}: it was changed."
        raise InputError("RUN", str(path), remedy)
    return Spent(max(epsilon, cost), charges.delta, epsilon_rdp, accountant)


def _each_once(found: Sequence[Member]) -> tuple[list[Member], list[str]]:
    """The members without those that another one covers, and what is to be said of that."""
    kept: list[Member] = []
    notes: list[str] = []
    # The one that is charged most comes first, a run before its export.
    for member in sorted(found, key=lambda m: (-sum(m.nonces.values()), m.kind != "run")):
        covering = next((other for other in kept if _covers(other, member)), None)
        if covering is not None:
            if not _alike(member, covering):
                remedy = f"is the same run as {covering.path}, but says other constants of it: one of both was changed."
                raise InputError("RUN", str(member.path), remedy)
            same = member.path.resolve() == covering.path.resolve()
            what = "is named twice" if same else f"is the same run as {covering.path}"
            notes.append(f"{member.path} {what}: counted once")
            continue
        for other in kept:
            if not (member.nonces and other.nonces) and _alike(member, other):
                old = member if not member.nonces else other
                remedy = (
                    f"may be the same run as {(other if old is member else member).path}, and it was exported before "
                    "exports could tell; export it again, or name one of both."
                )
                raise InputError("RUN", str(old.path), remedy)
            if member.nonces.keys() & other.nonces.keys():
                notes.append(f"{member.path} and {other.path} are copies that went on apart: both are charged in full")
        kept.append(member)
    places = {id(member): place for place, member in enumerate(found)}
    return sorted(kept, key=lambda member: places[id(member)]), notes


def _covers(other: Member, member: Member) -> bool:
    """Whether everything that `member` charges is charged to `other` too."""
    # The best trial of a search is one of its runs, and costs more where the search was released as such.
    alike = (member.kind == "search") == (other.kind == "search")
    return (
        alike
        and bool(member.nonces)
        and all(charged <= other.nonces.get(nonce, -1) for nonce, charged in member.nonces.items())
    )


def apart(members: Sequence[Member]) -> bool:
    """Whether no two members share an incarnation."""
    nonces = [nonce for member in members for nonce in member.nonces]
    return len(set(nonces)) == len(nonces)


def _alike(member: Member, other: Member) -> bool:
    first, second = member.charges.first, other.charges.first
    return first.alike(second) and member.dataset_size == other.dataset_size
