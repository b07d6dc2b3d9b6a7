"""Check an export without the run it came from: its files, its numbers, and what has to be taken on trust.

Nothing of the export is run, and no number of it is believed that follows from others. What cannot be checked by
anybody who has the export alone is named: a liar who changes everything consistently is found only by the digest of
`privacy.json`, which the sender has to say by another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config.file import parse
from dpdist.errors import InputError
from dpdist.joint.compose import rounded_up
from dpdist.joint.members import BROKEN, HOLDS, STATED_ABOVE, VERSIONS_DIFFER, charges_of, parse_statement, unit_name
from dpdist.joint.selection import SELECTION, Law, best_of_fixed, stated_cost
from dpdist.joint.views import curve
from dpdist.mechanism.accounting import ADJACENCY, Spent
from dpdist.mechanism.composition import Phase
from dpdist.models.foreign import PREPROCESSOR
from dpdist.release.exported import CONFIG, MODEL, PARAMS, PRIVACY, STATEMENT, sha256_of
from dpdist.release.foreign import WEIGHTS
from dpdist.release.names import digests_by_name, names_tell
from dpdist.release.signature import SIGNATURE, public_key, refused
from dpdist.release.statement import as_text as statement_text
from dpdist.release.statement import unit_of, words
from dpdist.run.calibration import UnreachableBudgetError, calibrate, calibrate_further_steps

#: The largest rho of `dpdist.mechanism.grid`.
_LARGEST_RHO = 1e-3
#: Relative room for numbers that are products of others.
_CLOSE = 1e-9
#: How the reason of an incarnation begins for which somebody set sigma, or left it to be calibrated.
_NOISE_SETTING = "privacy.noise_multiplier"
#: The files of an export, beside the statement: as dpdist reads them, or as another library does.
_OWN, _FOREIGN = frozenset((CONFIG, STATEMENT, MODEL, PARAMS)), frozenset((CONFIG, STATEMENT, WEIGHTS))
#: What an export for another library may have too.
_OF_LIBRARIES = frozenset(("config.json", PREPROCESSOR))
ON_TRUST = (
    "that the training was as the statement says: its noise, sampling, number of steps and of records are the sender's "
    "word, and no file of an export can prove them",
    "that the sender kept the run's secret (private/secret.key) to themselves: whoever has it can remove the noise",
    "that no other model of the same records was given away: each has a cost of its own, and costs add up "
    "(dpdist privacy compose)",
    "what the statement lists as not covered and as assumed (PRIVACY.md): read it",
)
DIGEST = (
    "that the weights are the parameters whose digest the statement has: only whoever knows how the model holds them, "
    "which is code or another library's, can work it out again"
)
SENDER = (
    "that the files come from who you think: ask the sender, by another way than the one by which the files came, for "
    "the statement_sha256 that `dpdist export` printed, and give it as --expect; or for their public key, as --signer"
)
SIGNER = "that the key of --signer is the sender's, and that they keep its private part to themselves"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    #: What is wrong; empty where it holds.
    wrong: tuple[str, ...]
    #: What holds, in words.
    says: str


class _WrongError(Exception):
    """What a check has found."""

    def __init__(self, *reasons: str) -> None:
        self.reasons = reasons


def verify(export: Path, *, expect: str | None = None, signer: Path | None = None) -> dict[str, Any]:
    """What holds of an export, as JSON; `holds` is true where every check does.

    Args:
        export: the directory.
        expect: the SHA-256 of `privacy.json` that the sender told.
        signer: a file with the sender's public SSH key, which must have signed it.

    Raises:
        InputError: it is no export, or `signer` no public key.
    """
    file = export / PRIVACY
    if not file.is_file():
        raise InputError("EXPORT", str(export), f"has no {PRIVACY}: name a directory that `dpdist export` has made.")
    digest = sha256_of(file)
    unread: tuple[str, ...] = ()
    try:
        facts = parse_statement(file.read_text())
    except (*BROKEN, OSError) as error:
        facts, unread = {}, (f"{PRIVACY} cannot be read ({type(error).__name__}: {error})",)
    checks = [Check("statement", unread, f"{PRIVACY} can be read")]
    if expect is not None:
        other = [] if digest == expect.strip().lower() else [f"{PRIVACY} has SHA-256 {digest}, not the expected one"]
        checks.append(Check("sender", tuple(other), f"{PRIVACY} is the one that the sender speaks of"))
    trusted = [*ON_TRUST, SENDER] if expect is None and signer is None else list(ON_TRUST)
    if signer is not None:
        said = refused(export, public_key(signer))
        checks.append(Check("signature", () if said is None else (said,), f"the key in {signer} has signed {PRIVACY}"))
        trusted.append(SIGNER)
    cost: list[Spent] = []
    if not unread:
        checks += [
            _check("files", "all files are those that the statement was written for", lambda: _files(export, facts)),
            _check("guarantee", "the statement says that its guarantee holds", lambda: _guarantee(facts)),
            _check("weights", "all parameters are finite numbers", lambda: _weights(export, facts)),
            _check("words", "the statement's words are those of dpdist", lambda: _words(facts)),
            _check("epsilon", "epsilon is what these constants cost", lambda: cost.append(_epsilon(facts))),
            _check("constants", "the constants agree with each other", lambda: _constants(facts)),
            _check("config", f"the constants agree with {CONFIG}", lambda: _config(export, facts)),
            _check("text", f"{STATEMENT} says what {PRIVACY} says", lambda: _text(export, facts)),
        ]
        if names_tell(export):
            says = f"{PARAMS} holds the parameters whose digest the statement has"
            checks.append(_check("parameters", says, lambda: _parameters(export, facts)))
        else:
            trusted.append(DIGEST)
    holds = not any(check.wrong for check in checks)
    return {
        "holds": holds,
        "epsilon": facts.get("epsilon"),
        "delta": facts.get("delta"),
        "unit": facts.get("unit_name"),
        "recomputed": _recomputed(cost[0]) if cost else None,
        "checks": [{"check": check.name, "holds": not check.wrong, "wrong": list(check.wrong)} for check in checks],
        "says": [check.says for check in checks if not check.wrong],
        "on_trust": trusted,
        "statement_sha256": digest,
        "right_guesses_at_most": _right_guesses(facts) if holds else None,
    }


def _check(name: str, says: str, look: Callable[[], object]) -> Check:
    try:
        look()
    except _WrongError as found:
        return Check(name, found.reasons, says)
    except (*BROKEN, OSError, yaml.YAMLError, InputError, SafetensorError) as error:
        return Check(name, (f"it cannot be checked: {type(error).__name__}: {error}",), says)
    return Check(name, (), says)


def _files(export: Path, facts: Mapping[str, Any]) -> None:
    told = facts.get("files")
    if not isinstance(told, dict) or not {CONFIG, STATEMENT} <= told.keys():
        raise _WrongError(
            "it has no digests of its files: they were removed, or an older version of dpdist exported it"
        )
    here = {path.name for path in export.iterdir()} - {PRIVACY, SIGNATURE}
    wrong = [f"{name} is missing" for name in sorted(told.keys() - here)]
    wrong += [f"{name} does not belong to the export: take it out" for name in sorted(here - told.keys())]
    for name in sorted(here & told.keys()):
        path = export / name
        if path.is_symlink() or not path.is_file() or sha256_of(path) != told[name]:
            wrong.append(f"{name} is not the file that the statement was written for: it was changed or damaged")
    if not {PARAMS, WEIGHTS} & told.keys():
        wrong.append("no weights are among the files")
    elif told.keys() != _OWN and not _FOREIGN <= told.keys() <= _FOREIGN | _OF_LIBRARIES:
        other = told.keys() ^ (_OWN if PARAMS in told else _FOREIGN)
        wrong.append(f"`dpdist export` does not write these files alone: {', '.join(sorted(other))}")
    if wrong:
        raise _WrongError(*wrong)


def _guarantee(facts: Mapping[str, Any]) -> None:
    if facts["guarantee"] not in HOLDS:
        raise _WrongError(f"the statement itself says that there is none: {facts['guarantee']}")


def _weights(export: Path, facts: Mapping[str, Any]) -> None:
    for path in sorted(export.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as opened:
            told = opened.metadata() or {}
        if told.get("params_sha256") != facts["params_sha256"] or told.get("guarantee") != facts["guarantee"]:
            raise _WrongError(f"{path.name} and {PRIVACY} speak of different parameters")
        for name, array in load_file(path).items():
            if array.dtype.kind not in "biu" and not np.isfinite(array.astype(np.float32)).all():
                raise _WrongError(f"{name} in {path.name} is not finite: a single record may have made it so")


def _parameters(export: Path, facts: Mapping[str, Any]) -> None:
    if facts["params_sha256"] not in digests_by_name(export / PARAMS):
        raise _WrongError(f"{PARAMS} does not hold the parameters whose digest {PRIVACY} has")


def _words(facts: Mapping[str, Any]) -> None:
    searched, old = "search" in facts, any(each["grid"] is None for each in facts["incarnations"])
    right = words(searched=searched, without_grid=old)
    wrong = [name for name, said in right.items() if facts[name] != said]
    if searched:
        told, trial, cost = facts["search"], Phase(**facts["search"]["trial"]), float(facts["epsilon"])
        once = best_of_fixed(trial, 1, float(facts["delta"])).epsilon
        one = float(told["epsilon_of_one_trial"])
        checks = {
            "distribution": told["distribution"] == Law.from_record(told).name,
            "epsilon_of_one_trial": math.isclose(one, once, rel_tol=STATED_ABOVE),
            "epsilon": told.get("epsilon", cost) == cost,
            "delta": told.get("delta", facts["delta"]) == facts["delta"],
            "accountant": told.get("accountant", SELECTION) == SELECTION,
            "metric": told["metric"]["best"] in ("highest", "lowest"),
        }
        wrong += [f"search.{name}" for name, holds in checks.items() if not holds]
    if wrong:
        said = "says something else than dpdist does of such a run, or another version of dpdist wrote it"
        raise _WrongError(*(f"{name} {said}" for name in wrong))


def _epsilon(facts: Mapping[str, Any]) -> Spent:
    stated, rdp, charges = float(facts["epsilon"]), float(facts["epsilon_rdp"]), charges_of(facts)
    cost, wrong = charges.alone(), []
    if "search" in facts:
        cost = stated_cost(facts["search"], released=charges.first, delta=charges.delta)
        if not charges.kept_to_plan:
            raise _WrongError("the best trial of a search has left its plan, and no bound of the search covers that")
    for name, value, again in (("epsilon", stated, cost.epsilon), ("epsilon_rdp", rdp, cost.epsilon_rdp)):
        if not value >= again * (1 - VERSIONS_DIFFER):
            wrong.append(f"{name} is stated as {value:.6g}, but what is stated of the training costs {again:.6g}")
        elif value > again * (1 + STATED_ABOVE):
            wrong.append(f"{name} is {value:.6g}, and the other numbers say {again:.6g}: one of them was changed")
    pld = facts["epsilon_pld"]
    if pld is not None and float(pld) != stated:
        wrong.append(f"epsilon_pld is {pld}, and epsilon {stated}: one of them was changed")
    if facts["accountant"] != cost.accountant:
        wrong.append(f"it is said to be by {facts['accountant']}, and is by {cost.accountant}")
    if wrong:
        raise _WrongError(*wrong)
    return cost


def _constants(facts: Mapping[str, Any]) -> None:
    told, size, batch = facts["incarnations"], int(facts["dataset_size"]), float(facts["expected_batch_size"])
    last, target = told[-1], facts["target_epsilon"]
    starts = [int(each["start"]) for each in told]
    beyond = [n for n, each in enumerate(told) if int(each["charged_steps"]) > int(each["steps"]) - starts[n]]
    names = ("sampling_probability", "noise_multiplier", "clip_norm", "grid", "dataset_size", "steps")
    delta, large = float(facts["delta"]), "allow_large_delta" in facts["guarantee"]
    checks = {
        "the newest incarnation has other constants than the statement": all(last[n] == facts[n] for n in names),
        "q is not B / N": math.isclose(float(facts["sampling_probability"]) * size, batch, rel_tol=_CLOSE),
        "steps are charged that no plan holds": not beyond and starts[0] == 0,
        "the charged steps do not add up": sum(int(each["charged_steps"]) for each in told) == facts["charged_steps"],
        "the parameters are from a step that was not planned": 0 <= int(facts["released_after_step"]) <= facts["steps"],
        "parameters are from a step that was not charged": int(facts["released_after_step"])
        <= starts[-1] + int(last["charged_steps"]),
        "epsilon is above its own target": target is None or float(facts["epsilon"]) <= float(target),
        f"delta is not below 1/N = {1 / size:.2g}": delta < 1 / size or large,
        "neighbouring datasets are not those that this accounting is for": facts["adjacency"] == ADJACENCY,
        "rho is larger than dpdist allows": 0 <= float(facts["rho"]) <= _LARGEST_RHO,
        "the grid is none of this C and rho": _fits_grid(facts["grid"], float(facts["clip_norm"]), float(facts["rho"])),
        "C is not positive": 0 < float(facts["clip_norm"]) < math.inf,
    }
    if wrong := [name for name, holds in checks.items() if not holds]:
        raise _WrongError(*wrong)


def _fits_grid(spacing: float | None, clip_norm: float, rho: float) -> bool:
    """Whether rho is at least that of a single coordinate: how many of an export's parameters trained is not known."""
    if spacing is None:
        return True
    return spacing > 0 and math.frexp(spacing)[0] == 0.5 and rho >= 2 * spacing / clip_norm


def _config(export: Path, facts: Mapping[str, Any]) -> None:
    config = config_module.from_dict(parse((export / CONFIG).read_text()))
    privacy, steps = config.privacy, config.training.steps
    sigma, target = privacy.noise_multiplier, privacy.target_epsilon
    checks = {
        "it trains without privacy": privacy.enabled,
        "it has a seed instead of a secret": privacy.insecure_seed is None,
        "another C": privacy.clip_norm == facts["clip_norm"],
        "another delta": privacy.delta == facts["delta"],
        "another target for epsilon": target == facts["target_epsilon"],
        "another batch size B": config.sampling.expected_batch_size == facts["expected_batch_size"],
        "fewer steps than the statement": steps is None or facts["steps"] <= steps,
        "other noise": sigma is None or sigma == facts["noise_multiplier"],
        "another unit": unit_name(config) == facts["unit_name"] and unit_of(config) == facts["unit"],
    }
    if sigma is None and target is not None:
        checks["other noise than its target asks for"] = _is_calibrated(config, facts)
    if wrong := [name for name, holds in checks.items() if not holds]:
        raise _WrongError(*(f"{CONFIG} says otherwise: {name}" for name in wrong))


def _is_calibrated(config: Config, facts: Mapping[str, Any]) -> bool:
    """Whether sigma is what the config's target asks for, and not more.

    It was worked out by the newest incarnation, or by the one since which neither it nor q has changed.
    """
    told, target = facts["incarnations"], float(config.privacy.target_epsilon or 0)
    phases = [
        Phase(float(each["sampling_probability"]), float(each["noise_multiplier"]), int(each["charged_steps"]))
        for each in told
    ]
    number = max((n for n in range(1, len(told)) if not phases[n].alike(phases[n - 1])), default=0)
    if any(reason.startswith(_NOISE_SETTING) for each in told[number + 1 :] for reason in each["reasons"]):
        return True  # what it was calibrated for, if it was, is said by an earlier config
    q, delta, planned = phases[number].sampling_probability, float(facts["delta"]), told[number]
    steps = int(planned.get("steps", facts["steps"])) - int(planned["start"])
    try:
        if number == 0:
            sigma = calibrate(target_epsilon=target, sampling_probability=q, steps=steps, delta=delta)
        else:
            sigma = calibrate_further_steps(
                phases[:number],
                sampling_probability=q,
                steps=steps,
                target_epsilon=target,
                order=int(facts["renyi_order"]),
                delta=delta,
            )
    except UnreachableBudgetError:
        return False
    return math.isclose(phases[number].noise_multiplier, sigma, rel_tol=STATED_ABOVE)


def _text(export: Path, facts: Mapping[str, Any]) -> None:
    if (export / STATEMENT).read_text() != statement_text(dict(facts)):
        raise _WrongError(f"{STATEMENT} says something else than {PRIVACY}, or another version of dpdist wrote it")


def _recomputed(cost: Spent) -> dict[str, Any]:
    return {
        "epsilon": cost.epsilon,
        "epsilon_pld": cost.epsilon if cost.accountant == "pld" else None,
        "epsilon_rdp": cost.epsilon_rdp,
        "delta": cost.delta,
        "accountant": cost.accountant,
    }


def _right_guesses(facts: Mapping[str, Any]) -> float:
    """The largest share of right answers to "was this record in, or not?", asked with a coin; 0.5 is guessing.

    Half of one plus the advantage. That is at most (e^eps - 1 + 2 delta) / (e^eps + 1) (Kairouz, Oh and Viswanath 2015,
    arXiv 1311.0776), and, of a run that kept to its plan, delta at epsilon 0.
    """
    epsilon, delta, charges = float(facts["epsilon"]), float(facts["delta"]), charges_of(facts)
    advantage = math.tanh(epsilon / 2) + 2 * delta / (math.exp(min(epsilon, 700.0)) + 1)
    if charges.kept_to_plan and charges.first.steps and "search" not in facts:
        advantage = min(advantage, curve(charges.first).advantage())
    return min(1.0, 0.5 + advantage / 2)


def as_text(found: Mapping[str, Any]) -> str:
    """What was found, for people."""
    lines = []
    if found["holds"]:
        share, epsilon, delta = found["right_guesses_at_most"], rounded_up(found["epsilon"]), found["delta"]
        lines.append(f"HOLDS: ({epsilon}, {delta:g})-differential privacy for {found['unit']}, if what is taken on ")
        lines[0] += "trust is true."
        lines.append(
            f"  In words: somebody who knows all else and guesses whether {found['unit']} was used or not is right "
            f"at most {math.ceil(1e4 * share) / 100:g} times in a hundred (50 is guessing)."
        )
    else:
        lines.append("DOES NOT HOLD: do not rely on the privacy statement of this export.")
        lines += [f"  wrong: {reason}" for check in found["checks"] for reason in check["wrong"]]
        lines.append(
            "  What to do: ask the sender for the export again, and for its statement_sha256. If you changed a "
        )
        lines[-1] += "file yourself, bring back the one you received."
    lines += ["", "Checked here:", *(f"  yes  {said}" for said in found["says"])]
    if (cost := found["recomputed"]) is not None:
        by = "privacy loss distributions" if cost["epsilon_pld"] is not None else cost["accountant"]
        told = f"{cost['epsilon']:.6g} by {by}"
        if cost["accountant"] in ("pld", "rdp"):
            told += f", {cost['epsilon_rdp']:.6g} by Renyi differential privacy"
        lines.append(f"       {told}")
    lines += ["", "Taken on trust:", *(f"  - {item}" for item in found["on_trust"])]
    return "\n".join([*lines, "", f"SHA-256 of {PRIVACY}: {found['statement_sha256']}"])
