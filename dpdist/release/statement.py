"""The privacy statement of a run: what was released, what it cost by which accountant, and under which assumptions.

It comes from the ledger, which alone knows what every incarnation is charged. Its epsilon is computed again from the
ledger's constants, so that an edited number is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpdist.config import Config
from dpdist.joint.members import unit_name
from dpdist.joint.selection import SELECTION, stated_cost
from dpdist.mechanism.composition import ADAPTIVE, Phase, charged_phases, phase_of, total_cost
from dpdist.mechanism.ledger import Ledger, Plan
from dpdist.run.summary import OF_TRIAL, guarantee


def within_products(physical: int) -> float:
    """kappa / C: how far one record can move the rounding of the others, in products of `physical` examples of one row.

    Four products of so many terms, each with an error of at most gamma times their sum; see docs/rounding.md.
    """
    gamma = (physical + 2) * 2.0**-24
    return 4 * physical * gamma / (1 - gamma)


#: Relative difference that two versions of the accountant may have.
_VERSIONS_DIFFER = 1e-6

MECHANISM = (
    "DP-SGD (Abadi et al. 2016, arXiv 1607.00133): Poisson subsampling of single units, gradients clipped to an L2 "
    "norm of C each, their sum rounded to integers on a public grid, with integer Gaussian noise of standard deviation "
    "sigma * C * (1 + rho) drawn once a step, divided by the constant B; rho is what rounding adds to the sensitivity"
)
COVERED = (
    "the parameters at every checkpoint of the run, its public metrics as far as they depend on the parameters only, "
    "and whatever is computed from these without the training data"
)
UNIT = "one training record, not one person: somebody with k records has about k times the epsilon"
#: Where `data.unit` names the column that says whose a record is.
UNIT_OF_RECORDS = (
    "all training records with one value of the column {unit!r}, such as all of one user, of which the first {records} "
    "at most are used: N, q and B count these units, a unit is sampled and clipped as a whole, and the guarantee holds "
    "for somebody whose records all have one such value. Which values there are is public, as N is: their order "
    "decides which units are tested on. How many records are left out depends on the data and is private"
)
#: Where `data.options.pack` cuts documents into blocks of tokens.
UNIT_BLOCK = (
    "what stands in one BLOCK of {length} tokens, not one document and not one person: documents are written one after "
    "the other and cut into blocks, so what a document holds in k blocks has about k times the epsilon; whether it is "
    "there at all is not covered, since without it all later blocks would be others, and N tells the number of tokens"
)
PUBLIC = (
    "N", "q", "B", "T", "sigma", "C", "delta", "the split into training and test records by index",
    "the names, types and shapes of the records' columns", "the number and the names of the classes", "the config",
)  # fmt: skip
NOT_COVERED = (
    "whatever is under private/ of the run directory, and choices that rest on it, such as a stop or a setting that "
    "somebody changed after reading it",
    "how long steps take, and which records are read from storage, for those who can watch either",
    "that a run ends because of a record that cannot be read, has other columns or values out of range, and at which "
    "step; what the record holds, and which it is, is written under private/ alone",
    "that a run ends, and when, because no gradient of the examples it tried, or of several steps in a row, is finite",
    "what a user's own code prints or writes",
    "test records, and so the test accuracy with respect to them; a record that is trained on in one run and tested on "
    "in another is one of these",
    "what was released from a state of the run that is lost: where its directory was restored from a backup, whatever "
    "was released after that backup was made",
    "hyper-parameters that were chosen on runs over the same records: every run, copies included, has an epsilon of "
    "its own, and all of them compose",
    "statistics of private data that somebody has put into the config, such as means or a vocabulary",
)
ASSUMPTIONS = (
    "the secret of the run stays secret",
    "BLAKE2b, Philox and Threefry are good pseudorandom functions",
    "the float32 rounding of the other examples in its product, which one record moves too, is not charged: by at most "
    f"{within_products(64):.0e} C for 64 examples a product and one row an example (more for sequences, and on tensor "
    "cores), by 5e-05 C in the attacks built for it in float32 and 2e-03 C on tensor cores (32 sequences of 197 rows); "
    "docs/rounding.md",
    "where gradients were clipped on tensor cores (training.precision), these lose no more of a sum of d products than "
    "4 (d + 16) 2^-24 of its magnitudes, as was measured before the first step; docs/tensor-cores.md",
    "nobody listens to the traffic between the devices of a job",
)
#: Of incarnations that began before there was a grid.
WITHOUT_GRID = "for the incarnations without a grid, float32 stands for real numbers in noise and sums"


#: What is released of a search, in place of `COVERED`.
COVERED_BY_SEARCH = (
    "the parameters of the best trial of a search, which hyper-parameters it had, its test metrics, and whatever is "
    "computed from these without the training data"
)
#: What stands in `NOT_COVERED` of the hyper-parameters of a model that no search has chosen.
_CHOSEN = next(item for item in NOT_COVERED if item.startswith("hyper-parameters"))
NOT_COVERED_BY_SEARCH = (
    "how many trials the search had, for whoever knows it, and whatever else of the other trials somebody has seen, "
    "such as a metric, a failure or how many jobs there were; how long the search took tells something of their number",
    "hyper-parameters that were chosen otherwise on results over the same records: every run and every search has an "
    "epsilon of its own, and all of them compose",
)


def words(*, searched: bool, without_grid: bool) -> dict[str, Any]:
    """What every statement says, whatever was trained.

    Args:
        searched: it is that of a search.
        without_grid: of a run with an incarnation from before there was a grid.
    """
    others = [item for item in NOT_COVERED if item != _CHOSEN]
    return {
        "mechanism": MECHANISM,
        "dataset_size_is_public": True,
        "public": list(PUBLIC),
        "covered": COVERED_BY_SEARCH if searched else COVERED,
        "not_covered": [*NOT_COVERED_BY_SEARCH, *others] if searched else list(NOT_COVERED),
        "assumptions": list(ASSUMPTIONS) + [WITHOUT_GRID] * without_grid,
    }


@dataclass(frozen=True, kw_only=True)
class SearchedFor:
    """The search that a model is the best result of."""

    #: Of the whole search.
    epsilon: float
    delta: float
    #: What epsilon was computed from: `distribution`, `expected_trials` and `shape` of the number of trials; q, sigma
    #: and T of a `trial` whose Renyi divergence no trial exceeds at `orders`; `epsilon_of_one_trial`; `metric`.
    record: Mapping[str, Any]
    #: `holds`, or what else is to be said; a trial that has one of its own to tell of, such as void, keeps that.
    guarantee: str


def of_search(facts: dict[str, Any], searched: SearchedFor) -> dict[str, Any]:
    """The statement of a trial as that of the search which has chosen it.

    Raises:
        ValueError: the search states less than its constants cost.
    """
    released = Phase(facts["sampling_probability"], facts["noise_multiplier"], facts["steps"])
    cost = stated_cost(searched.record, released=released, delta=searched.delta)
    if searched.epsilon < cost.epsilon * (1 - _VERSIONS_DIFFER):
        raise ValueError(f"the search states epsilon {searched.epsilon:.6g}, but it costs {cost.epsilon:.6g}")
    of_all = words(searched=True, without_grid=WITHOUT_GRID in facts["assumptions"])
    return facts | {
        "guarantee": searched.guarantee if facts["guarantee"] == OF_TRIAL else facts["guarantee"],
        "epsilon": searched.epsilon,
        "delta": searched.delta,
        "accountant": SELECTION,
        "epsilon_pld": None,
        "epsilon_rdp": searched.epsilon,
        "target_epsilon": None,
        "covered": of_all["covered"],
        "not_covered": of_all["not_covered"],
        "search": dict(searched.record),
    }


def unit_of(config: Config) -> str:
    """What the guarantee is for, in words."""
    data = config.data
    if data.source == "text" and data.options.get("pack"):
        return UNIT_BLOCK.format(length=data.options.get("length"))
    return UNIT if data.unit is None else UNIT_OF_RECORDS.format(unit=data.unit, records=data.records_per_unit)


def _without_grid(plan: Plan) -> bool:
    return plan.privacy is not None and plan.privacy.grid is None


def statement(config: Config, ledger: Ledger, *, step: int, finite: bool) -> dict[str, Any]:
    """The privacy statement for the parameters after `step` steps, as JSON; `finite` is whether all of these are.

    `epsilon` is that of all that is charged and of all that is planned, also where the run has stopped early: a stop
    may have been decided on results.

    Raises:
        ValueError: the ledger states less than its constants cost.
    """
    plan, first = ledger.plans[-1], ledger.plans[0]
    record = plan.to_record()
    facts = {
        "guarantee": guarantee(config, ledger.plans, finite=finite),
        "epsilon": record["epsilon"],
        "delta": record["delta"],
        "accountant": record["accountant"],
        "epsilon_pld": None,
        "epsilon_rdp": record["epsilon_rdp"],
        "target_epsilon": record["target_epsilon"],
        "adjacency": plan.adjacency,
        "unit": unit_of(config),
        "unit_name": unit_name(config),
        "noise_multiplier": record["noise_multiplier"],
        "clip_norm": record["clip_norm"],
        "grid": record["grid"],
        "rho": record["grid_slack"],
        "sampling_probability": plan.sampling_probability,
        "expected_batch_size": plan.expected_batch_size,
        "steps": plan.steps,
        "dataset_size": plan.dataset_size,
        "released_after_step": step,
        "charged_steps": ledger.charged_steps(),
        "incarnations": [_incarnation(each, ledger) for each in ledger.plans],
        "environment": plan.environment,
        **words(searched=False, without_grid=any(_without_grid(each) for each in ledger.plans)),
    }
    terms = plan.privacy
    if terms is None:
        return facts
    cost = total_cost(first, charged_phases(ledger, plan.incarnation), phase_of(plan, plan.steps - plan.start))
    if terms.epsilon < cost.epsilon * (1 - _VERSIONS_DIFFER):
        raise ValueError(f"the ledger states epsilon {terms.epsilon:.6g}, but what it charges costs {cost.epsilon:.6g}")
    pld = terms.epsilon if terms.accountant == "pld" else None
    return facts | {"epsilon_pld": pld, "renyi_order": first.private_terms().renyi_order}


def _incarnation(plan: Plan, ledger: Ledger) -> dict[str, Any]:
    names = (
        "incarnation", "nonce", "start", "steps", "reasons", "sampling_probability", "noise_multiplier", "clip_norm",
        "grid", "dataset_size", "environment",
    )  # fmt: skip
    record = plan.to_record()
    return {name: record[name] for name in names} | {"charged_steps": ledger.charged_to(plan.incarnation)}


def as_text(facts: dict[str, Any]) -> str:
    """The statement as Markdown."""
    holds = facts["guarantee"].startswith("holds")
    lines = ["# Privacy statement", ""]
    if not holds:
        lines += [f"**THIS MODEL COMES WITHOUT A PRIVACY GUARANTEE.** {facts['guarantee'].capitalize()}.", ""]
    if facts["noise_multiplier"] is None:
        return "\n".join(lines)
    verb = "is" if holds else "would be, if that were not so,"
    lines += [
        f"Released were {facts['covered']}. All of it together {verb} "
        f"**({facts['epsilon']:.4g}, {facts['delta']:g})-differentially private**.",
        "",
        f"- Guarantee: {facts['guarantee']}.",
        f"- Neighbouring datasets: {facts['adjacency']}, which contributes nothing; epsilon is that of add/remove.",
        f"- Unit: {facts['unit']}.",
        f"- Mechanism: {facts['mechanism']}.",
        f"- Constants: q = {facts['sampling_probability']:.6g}, sigma = {facts['noise_multiplier']:.6g}, "
        f"C = {facts['clip_norm']:g}, rho = {facts['rho']:.2g}, B = {facts['expected_batch_size']:g}, "
        f"N = {facts['dataset_size']}, T = {facts['steps']}; {facts['charged_steps']} steps are charged, and "
        f"the parameters are those after step {facts['released_after_step']}.",
        f"- Epsilon: {_by_accountants(facts)}",
        f"- Public, and taken as known to everyone: {', '.join(facts['public'])}.",
        "",
        "## Incarnations",
        "",
        "Where something a step depends on was changed, the run drew anew and stayed charged for all it had taken.",
        "",
        "| incarnation | from step | steps charged | q | sigma | C | N | begun because |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in facts["incarnations"]:
        why = "; ".join(each["reasons"]).replace("|", "\\|") or "the run began"
        lines.append(
            f"| {each['incarnation']} | {each['start']} | {each['charged_steps']} "
            f"| {each['sampling_probability']:.6g} | {each['noise_multiplier']:.6g} | {each['clip_norm']:g} "
            f"| {each['dataset_size']} | {why} |"
        )
    lines += ["", "## Not covered", "", *(f"- {item}" for item in facts["not_covered"])]
    lines += ["", "## Assumed", "", *(f"- {item}" for item in facts["assumptions"]), ""]
    return "\n".join(lines)


def _by_accountants(facts: dict[str, Any]) -> str:
    if facts["accountant"] == SELECTION:
        search = facts["search"]
        trial, metric = search["trial"], search["metric"]["name"]
        return (
            f"{facts['epsilon']:.6g} for the whole search, of which this is the best trial by {metric}: the number of "
            f"trials was drawn at random ({search['distribution']}, mean {search['expected_trials']:g}), and no other "
            "trial is released (Papernot and Steinke 2022, arXiv 2110.03620, on the Renyi divergences of "
            f"q = {trial['sampling_probability']:.6g}, sigma = {trial['noise_multiplier']:.6g}, T = {trial['steps']}, "
            f"which no trial exceeds at the orders {', '.join(map(str, search['orders']))}); one trial alone would "
            f"cost {search['epsilon_of_one_trial']:.6g}."
        )
    if facts["accountant"] == ADAPTIVE:
        return (
            f"{facts['epsilon']:.6g} by a Renyi filter of fixed order, as the plan was changed while the run went on: "
            "one delta covers both the plan and its changes, whenever one stops and whatever released result the "
            "changes rested on (mechanism/composition.py has the proof)."
        )
    rdp = f"{facts['epsilon_rdp']:.6g} by Renyi differential privacy"
    if facts["epsilon_pld"] is None:
        return f"{rdp}, an upper bound for the whole plan."
    return (
        f"{facts['epsilon_pld']:.6g} by privacy loss distributions, {rdp}; both are upper bounds, for the whole plan."
    )
