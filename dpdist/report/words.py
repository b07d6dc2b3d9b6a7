"""What a guarantee means, in sentences for somebody who makes decisions and not proofs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpdist.joint.compose import rounded_up
from dpdist.joint.views import Curve, curve
from dpdist.mechanism.composition import Phase

#: A share of absent records that an attacker wrongly accuses, for which the share of present ones he finds is told.
WRONGLY_ACCUSED = 0.01
#: Epsilons beyond which the guarantee is called what it is.
_STRONG, _USUAL = 1.0, 10.0


def true_positive_rate(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """The largest share of present records that any test finds, if it accuses so many absent ones.

    By (epsilon, delta) alone.
    """
    stated = Curve(np.array([epsilon]), np.array([delta]))
    return stated.true_positive_rate(false_positive_rate)


def _found(facts: dict[str, Any]) -> float:
    """The share of present ones that any test finds: by the curve of delta over epsilon where there is one plan."""
    stated = true_positive_rate(facts["epsilon"], facts["delta"], WRONGLY_ACCUSED)
    if len(facts["incarnations"]) != 1:
        return stated
    plan = Phase(facts["sampling_probability"], facts["noise_multiplier"], facts["steps"])
    return min(stated, curve(plan).true_positive_rate(WRONGLY_ACCUSED))


def meaning(facts: dict[str, Any]) -> list[str]:
    """Sentences on the statement of a run whose guarantee holds.

    Args:
        facts: as `dpdist.release.statement.statement` gives them, with an epsilon.
    """
    epsilon, delta = facts["epsilon"], facts["delta"]
    unit = "record" if facts["unit"].startswith("one training record") else "unit (named below)"
    found = _found(facts)
    said = [
        f"Whatever anybody concludes from what was released is at most {rounded_up(math.exp(min(epsilon, 700.0)))} "
        f"times as likely as it would have been without any single {unit}, but for a probability of {delta:g}.",
        f"Somebody who knows all other training data, wants to know whether a given {unit} is in it, and wrongly "
        f"accuses {WRONGLY_ACCUSED:.0%} of those that are not, finds at most {rounded_up(100 * found)}% of those "
        "that are.",
    ]
    if epsilon <= _STRONG:
        said.append("That is a strong guarantee: little can be learned of a single one even in the worst case.")
    elif epsilon <= _USUAL:
        said.append(
            "That is in the range that is usual for deep learning. It bounds the worst case; attacks that are known "
            "reach less."
        )
    else:
        said.append(
            "THIS IS A WEAK GUARANTEE: in the worst case it allows nearly everything of a single one to be found out. "
            "That known attacks do not reach it is no promise."
        )
    return said
