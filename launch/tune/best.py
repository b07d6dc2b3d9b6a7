"""The end of a search: the best trial is chosen and exported, with the epsilon of the whole search; no other is shown.

Chosen is among what the trials have left, by the metric that was fixed before. The worst, whatever they show, are
trials that failed, that diverged, that left their plan, whose guarantee does not hold, or whose metric is not finite.
Of trials as good as each other the first is taken: that is as good as drawing lots, since none knows its place.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

from dpdist.mechanism.composition import charged_phases, phase_of, within
from dpdist.mechanism.ledger import Ledger, LedgerError
from dpdist.release.export import export
from dpdist.release.statement import SearchedFor
from dpdist.run.directory import write_atomically
from dpdist.run.fingerprints import data_tags
from dpdist.run.summary import OF_TRIAL, guarantee, is_trial
from dpdist_launch.tune.search import Search, Trial
from dpdist_launch.tune.terms import Question


@dataclass(frozen=True)
class Result:
    """A trial that may be released."""

    trial: Trial
    score: float
    summary: dict[str, Any]


def release(search: Search) -> dict[str, Any]:
    """Export the best trial, and write and return `summary.json`; to be called once no trial has anything left to do.

    A search that was killed while it released does it again, with the same result.
    """
    if (left := search.left()) != []:
        raise ValueError(f"{len(left)} trials have not ended")
    question, terms = search.question, search.terms
    law, metric = question.law, question.metric
    summary = {
        "status": "finished",
        "epsilon": terms.epsilon,
        "delta": terms.delta,
        "accountant": terms.to_record()["accountant"],
        "guarantee": guarantee(question.config, finite=True),
        **law.to_record(),
        "metric": metric.to_record(),
        "epsilon_of_one_trial": terms.epsilon_of_one_trial,
        "best": None,
    }
    results = [result for trial in search.trials if (result := result_of(search, trial)) is not None]
    for made in (search.best, *search.root.glob(f".{search.best.name}.*")):  # by one that was killed
        shutil.rmtree(made, ignore_errors=True)
    if results:
        best = max(results, key=lambda result: result.score)  # the first of those as good
        searched = SearchedFor(
            epsilon=terms.epsilon,
            delta=terms.delta,
            record=law.to_record() | {"metric": metric.to_record()} | terms.to_record(),
            guarantee=summary["guarantee"],
        )
        told = export(best.trial.run.root, search.best, searched=searched)
        summary["best"] = {
            "directory": search.best.name,
            "settings": best.trial.settings,
            "noise_multiplier": best.summary["noise_multiplier"],
            "steps": best.summary["steps"],
            "metrics": best.summary["metrics"],
            "params_sha256": told["params_sha256"],
        }
    else:
        summary["status"] = "nothing to release"
    write_atomically(search.summary, json.dumps(summary, indent=2) + "\n")
    return summary


def result_of(search: Search, trial: Trial) -> Result | None:
    """The result of a trial; None where it counts as the worst."""
    summary = None if search.failed(trial) else trial.ended()
    if summary is None or summary["guarantee"] != OF_TRIAL or not _within_plan(trial, search.question):
        return None
    score = search.question.metric.score(summary["metrics"])
    return None if score is None else Result(trial, score, summary)


def _within_plan(trial: Trial, question: Question) -> bool:
    """Whether all that the run is charged for is what every trial may cost, over the data of the search."""
    tags = data_tags(trial.run.read_secret(), question.fingerprints)
    try:
        ledger = Ledger(trial.run.ledger)
    except (LedgerError, OSError):
        return False
    if (
        not is_trial(ledger.plans)
        or ledger.copied
        or any(plan.privacy is None or plan.insecure for plan in ledger.plans)
    ):
        return False
    if any((plan.data, plan.test_data) != (tags["training data"], tags["test data"]) for plan in ledger.plans):
        return False
    first = ledger.plans[0]
    planned = phase_of(first, first.steps)
    return planned == trial.plan and within(planned, charged_phases(ledger, len(ledger.plans)))
