"""What a run notes of a few training examples, for their owner's eyes: nothing of it may end or change the run."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from dpdist.errors import InputError
from dpdist.mechanism.ledger import PrivacyTerms
from dpdist.mechanism.step import TrainState
from dpdist.program.build import TrainingSetup
from dpdist.program.guards import summing
from dpdist.program.probe import described

logger = logging.getLogger(__name__)


def look(setup: TrainingSetup, state: TrainState, terms: PrivacyTerms | None = None) -> dict[str, Any]:
    """What the probe finds, on process 0, as JSON; nothing where it fails, as for want of memory.

    Args:
        terms: to find also what clipping on tensor cores takes off C, `below_clip_norm`; costs a few physical batches.

    Raises:
        InputError: an example cannot be read.
    """
    if setup.probe is None:
        raise RuntimeError("only process 0 looks at examples")
    found = described(np.zeros(0, np.float32), np.zeros(0, np.float32))
    try:
        params = next(iter(setup.step_programs.slices(state.params).values()))
        losses, norms = setup.probe.measure(params)
        found = described(losses, norms)
        if terms is not None and terms.grid is not None and setup.precision == "tensor":
            accumulate, size = summing(setup.step_programs, terms.grid), setup.physical
            below = setup.probe.below_clip_norm(accumulate, params, norms, size=size, clip_norm=terms.clip_norm)
            found |= {"below_clip_norm": below}
    except InputError:
        raise
    except Exception:
        logger.exception("the training examples could not be looked at")
    return found
