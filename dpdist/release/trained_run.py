"""Load what training left, in one process: from a run directory or from an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from dpdist import config as config_module
from dpdist import models
from dpdist.config.constraints import expand_home
from dpdist.errors import InputError
from dpdist.mechanism.ledger import Ledger, LedgerError
from dpdist.models.frozen import frozen_paths
from dpdist.program import optimizer as optimizers
from dpdist.program.update import initial_state
from dpdist.release.exported import MODEL, PARAMS, PRIVACY, load_export
from dpdist.release.statement import statement
from dpdist.release.trained import Signature, TrainedRun
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.directory import RunDirectory
from dpdist.run.fingerprints import all_finite


def load(directory: str | Path, *, allow_code: bool = False) -> TrainedRun:
    """Load the newest checkpoint of a run, or an export, onto one device, whatever it was trained on.

    Args:
        allow_code: run the `module:function` that an export names as its model: code of whoever made the export.

    Raises:
        InputError: there is no run or export, no checkpoint of the run, or what there is is damaged.
    """
    root = Path(expand_home(directory, "directory"))
    return load_export(root, allow_code=allow_code) if _is_export(root) else load_run(root)


def _is_export(root: Path) -> bool:
    """Whether a directory is to be read as an export; a run never has these files."""
    return any((root / name).exists() for name in (PARAMS, MODEL, PRIVACY))


def load_run(root: Path) -> TrainedRun:
    """Load the newest checkpoint of a run.

    Raises:
        InputError: there is no run, no checkpoint of one, or the newest is damaged.
    """
    run_dir, run = str(root), RunDirectory(root)
    if (root / "sweep.json").exists():
        raise InputError("run_dir", run_dir, "is a sweep; name one of its points, a folder in it.")
    if not run.config.exists():
        raise InputError("run_dir", run_dir, f"holds no run (no config.yaml) and no export (no {MODEL}).")
    ledger = _ledger(run)
    checkpoints = Checkpoints(run.checkpoints, read_only=True)
    step = checkpoints.latest()
    if step is None:
        raise InputError("run_dir", run_dir, "has no checkpoint yet.")
    if (reason := checkpoints.verify(step)) is not None:
        raise InputError("run_dir", run_dir, f"its newest checkpoint, step {step}, is damaged: {reason}.")
    meta = checkpoints.read_meta(step)
    _require_charged(ledger, run, meta)
    config = config_module.from_dict(meta["config"])  # unlike config.yaml, no editor has touched it
    signature = Signature.from_record(meta)
    # What lies at the path of the first weights now may be others; its sizes are in the config.
    options = {name: value for name, value in config.model.options.items() if name != "pretrained"}
    section = dataclasses.replace(config.model, options=options) if ":" not in config.model.name else config.model
    model = models.build(section, example=signature.example, classes=signature.classes)
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
    return TrainedRun(
        config=config, params=state.released, step=step, privacy=privacy, signature=signature, _model=model
    )


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
