"""A trained run, loaded in one process: parameters, predictions and the privacy statement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from dpdist import config as config_module
from dpdist import models
from dpdist.config import Config
from dpdist.config.constraints import expand_home
from dpdist.data.sources import for_devices
from dpdist.errors import InputError
from dpdist.mechanism.ledger import Ledger, LedgerError
from dpdist.program import optimizer as optimizers
from dpdist.program.gradients import frozen_paths
from dpdist.program.update import initial_state
from dpdist.release.statement import statement
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.directory import RunDirectory
from dpdist.run.fingerprints import all_finite


@dataclass(frozen=True)
class TrainedRun:
    """A run at its newest checkpoint.

    Attributes:
        config: of the run.
        params: the released parameters (their average where one was kept).
        step: steps taken.
        privacy: the privacy statement of `params`, from `release.statement`: `guarantee`, epsilon, delta, ...
    """

    config: Config
    params: Any
    step: int
    privacy: dict[str, Any]
    _model: models.Model

    def predict(self, examples: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits [n, classes] of examples given by column, e.g. `{"image": uint8[n, 8, 8, 1]}`.

        Raises:
            InputError: a value does not fit into 32 bits.
        """
        columns = {name: for_devices(repr(name), values) for name, values in examples.items()}
        return np.asarray(self._logits(self.params, columns))

    @cached_property
    def _logits(self) -> Callable[[Any, dict[str, np.ndarray]], Any]:
        return jax.jit(jax.vmap(self._model.apply, in_axes=(None, 0)))


def load(run_dir: str | Path) -> TrainedRun:
    """Load the newest checkpoint of a run onto one device, whatever it was trained on.

    Raises:
        InputError: there is no run, no checkpoint of one, or the newest is damaged.
    """
    run_dir = expand_home(run_dir, "run_dir")
    run = RunDirectory(Path(run_dir))
    if not run.config.exists():
        raise InputError("run_dir", str(run_dir), "holds no run (no config.yaml).")
    ledger = _ledger(run)
    checkpoints = Checkpoints(run.checkpoints, read_only=True)
    step = checkpoints.latest()
    if step is None:
        raise InputError("run_dir", str(run_dir), "has no checkpoint yet.")
    if (reason := checkpoints.verify(step)) is not None:
        raise InputError("run_dir", str(run_dir), f"its newest checkpoint, step {step}, is damaged: {reason}.")
    meta = checkpoints.read_meta(step)
    _require_charged(ledger, run, meta)
    config = config_module.from_dict(meta["config"])  # unlike config.yaml, no editor has touched it
    example = {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, (shape, dtype) in meta["example"].items()}
    model = models.build(config.model, example=example, classes=meta["classes"])
    optimizer = optimizers.build(config.optimizer, meta["plan"]["steps_asked"])
    averaged = config.optimizer.average_decay > 0
    here = SingleDeviceSharding(jax.devices()[0])
    params = jax.eval_shape(model.init, jax.random.key(0))
    frozen = frozen_paths(config.model, params)
    abstract = jax.eval_shape(lambda params: initial_state(params, optimizer, averaged=averaged, frozen=frozen), params)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    state = checkpoints.restore(step, abstract)
    checkpoints.close()
    try:
        privacy = statement(config, ledger, step=step, finite=all_finite(state.released))
    except ValueError as error:
        raise InputError("ledger.jsonl", str(run.ledger), f"{error}: the file was changed.") from None
    return TrainedRun(config=config, params=state.released, step=step, privacy=privacy, _model=model)


def _ledger(run: RunDirectory) -> Ledger:
    try:
        ledger = Ledger(run.ledger)
    except (LedgerError, OSError) as error:
        raise InputError("ledger.jsonl", str(run.ledger), f"{error}.") from None
    if ledger.plan is None:
        raise InputError("ledger.jsonl", str(run.ledger), "is gone: without it, what this run has spent is unknown.")
    return ledger


def _require_charged(ledger: Ledger, run: RunDirectory, meta: dict[str, Any]) -> None:
    """Check that the checkpoint is one of this ledger's."""
    incarnation, step = meta["plan"]["incarnation"], meta["step"]
    try:
        ledger.is_ancestor(incarnation, step)
        known = ledger.plans[incarnation].nonce == meta["plan"]["nonce"]
    except LedgerError as error:
        raise InputError("ledger.jsonl", str(run.ledger), f"{error}, of which there is a checkpoint.") from None
    if not known:
        raise InputError("ledger.jsonl", str(run.ledger), "is not that of the checkpoints beside it.")
