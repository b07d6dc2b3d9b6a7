"""The setting `model.lora`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpdist.config.nearest import did_you_mean
from dpdist.errors import InputError

FIELD = "model.lora"
#: The projections of the attention in the built-in transformers.
ATTENTION = ("*attention/*/kernel",)
_KEYS = ("rank", "alpha", "targets")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation: a layer's kernel W stays, and x W + (alpha / rank) (x A) B takes the place of x W.

    Of a convolution, x W and x A are convolutions, and B takes the place of a kernel of one pixel.
    """

    #: Columns of A and rows of B.
    rank: int
    alpha: float
    #: Patterns of the kernels' paths.
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.rank


def read(given: Mapping[str, Any], targets: Sequence[str] = ATTENTION) -> Lora:
    """Read the setting; alpha is the rank where it is left out, and `targets` are the targets.

    Raises:
        InputError: a key is unknown, the rank is missing, or a value cannot be used.
    """
    for key in given:
        if key not in _KEYS:
            raise InputError(
                f"{FIELD}.{key}", given[key], f"{did_you_mean(str(key), _KEYS)}there are {', '.join(_KEYS)}."
            )
    rank = given.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{FIELD}.rank", rank, "give a whole number of at least 1, such as 8.")
    alpha = given.get("alpha", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"{FIELD}.alpha", alpha, "give a positive, finite number, such as twice the rank.")
    named = given.get("targets", list(targets))
    if not isinstance(named, list) or not named or not all(isinstance(each, str) for each in named):
        raise InputError(f"{FIELD}.targets", named, f"give a list of patterns, such as {list(targets)}.")
    return Lora(rank=rank, alpha=float(alpha), targets=tuple(named))
