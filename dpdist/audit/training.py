"""The audit of whole trainings: `dpdist train` on canaries that are each in the data by a coin, in one run.

Two plans. `one run`: some steps of subsampled training, from whose released parameters the coins are guessed. `went
back`: a run that has ended goes back to its beginning with half the clipping norm and the same noise, and both results
are seen. If any draw came twice, it would cancel in their difference, and the coins would lie open.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from dpdist.audit import canary


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A training on m canaries, with a clipping norm of 1."""

    name: str
    canaries: int
    noise_multiplier: float
    sampling_probability: float
    steps: int
    delta: float
    #: Whether it goes back to its beginning once it has ended.
    goes_back: bool = False

    def configs(self, folder: Path) -> list[dict[str, Any]]:
        """The settings of each part of the run, whose directory is `folder / "run"`; the coins are tossed here."""
        coins = folder / "coins.npy"
        tossed = np.frombuffer(secrets.token_bytes(self.canaries), np.uint8) & 1
        np.save(coins, tossed.astype(bool))
        first: dict[str, Any] = {
            "data": {"source": canary.COINS, "path": str(coins)},
            "model": {"name": canary.MODEL, "options": {"width": self.canaries}, "task": "none"},
            "optimizer": {"name": "sgd", "learning_rate": 1.0},
            "privacy": {"noise_multiplier": self.noise_multiplier, "clip_norm": 1.0, "delta": self.delta},
            "sampling": {"expected_batch_size": self.sampling_probability * self.canaries},
            "training": {"steps": self.steps, "physical_batch_size": 32},
            "checkpoint": {"every_steps": self.steps},
            "run": {"dir": str(folder / "run"), "plots": False, "progress": "off"},
        }
        if not self.goes_back:
            return [first]
        halved = {"noise_multiplier": 2 * self.noise_multiplier, "clip_norm": 0.5, "delta": self.delta}
        return [first, first | {"privacy": halved, "checkpoint": first["checkpoint"] | {"resume_step": 0}}]

    def coins(self, folder: Path) -> Bool[np.ndarray, " m"]:
        """Which canaries were in."""
        return np.asarray(np.load(folder / "coins.npy"), bool)

    def scores(self, released: list[Any]) -> list[Float64[np.ndarray, " m"]]:
        """Ways to score the canaries by what each part of the run has released: over 0 for those that seem to be in.

        With S the sum of the noisy sums of all steps, a canary that is in adds q T C to it in the mean, so that
        S - q T C / 2 tells in from out.
        """
        batch, mean = self.sampling_probability * self.canaries, self.sampling_probability * self.steps
        sums = [-canary.projections(params) * batch for params in released]
        norms = [0.5**part for part in range(len(sums))]  # C
        centred = [noisy - mean * norm / 2 for noisy, norm in zip(sums, norms, strict=True)]
        if not self.goes_back:
            return centred
        # Their weights are those of the likelihood ratio: as far as C, over the same variance.
        return [centred[0] * norms[0] + centred[1] * norms[1], centred[0] - centred[1]]
