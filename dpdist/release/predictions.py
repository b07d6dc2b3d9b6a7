"""Predictions for many examples, written batch by batch: as CSV, as JSON lines, or the bare outputs as `.npy`."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dpdist.data import Source, read_rows
from dpdist.errors import InputError
from dpdist.release.trained import TrainedRun

FORMATS = (".csv", ".jsonl", ".npy")


def write_predictions(trained: TrainedRun, source: Source, to: Path | None, *, batch_size: int) -> int:
    """Predict every example of `source`, in its order; returns how many.

    Args:
        to: a new file, whose suffix is one of `FORMATS`; None prints JSON lines.

    Raises:
        InputError: an example does not fit the model, the file exists or has another suffix, or outputs of several axes
            are to go into a table.
    """
    if to is not None and to.suffix not in FORMATS:
        raise InputError("--to", str(to), f"has no known format; end it in {', '.join(FORMATS)}.")
    if to is not None and to.exists():
        raise InputError("--to", str(to), "is there already; name a new file.")
    if to is not None and not to.parent.is_dir():
        raise InputError("--to", str(to), "its folder is not there; make it first.")
    if to is not None and to.suffix == ".npy":
        with _whole(to) as partial:
            return _write_array(trained, source, partial, batch_size)
    if len(trained.outputs.shape) > 1:
        shape = list(trained.outputs.shape)
        raise InputError("--to", str(to or "(stdout)"), f"the outputs have shape {shape} an example; give a .npy file.")
    if to is None:
        return _write_rows(trained, source, sys.stdout, batch_size, table=False)
    with _whole(to) as partial, partial.open("w", newline="") as file:
        return _write_rows(trained, source, file, batch_size, table=to.suffix == ".csv")


@contextlib.contextmanager
def _whole(to: Path) -> Iterator[Path]:
    """A path to write to, which becomes `to` once all is written: half of the predictions must not pass for all."""
    partial = to.with_name(f".{to.name}.part")
    try:
        yield partial
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)


def _write_rows(trained: TrainedRun, source: Source, file: TextIO, batch_size: int, *, table: bool) -> int:
    """Lines of JSON with the outputs beside what they say, or a CSV of the latter alone."""
    writer = csv.writer(file)
    for start, outputs in _batches(trained, source, batch_size):
        for offset, said in enumerate(meaning(outputs, trained.task, trained.signature.class_names)):
            row = {"index": start + offset} | said
            if not table:
                file.write(json.dumps(row | {"outputs": outputs[offset].tolist()}) + "\n")
                continue
            if row["index"] == 0:
                writer.writerow(row)
            writer.writerow(row.values())
    return len(source)


def _batches(trained: TrainedRun, source: Source, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first index and the outputs of every batch."""
    for start in range(0, len(source), batch_size):
        indices = np.arange(start, min(start + batch_size, len(source)))
        yield start, trained.predict(read_rows(source, indices), batch_size=batch_size)


def _write_array(trained: TrainedRun, source: Source, to: Path, batch_size: int) -> int:
    """The outputs, float[n, ...], through a memory map: they need not fit into memory."""
    shape, dtype = (len(source), *trained.outputs.shape), trained.outputs.dtype
    held = dtype if dtype.kind in "biufc" else np.dtype(np.float32)  # .npy has no bfloat16
    array = np.lib.format.open_memmap(to, mode="w+", dtype=held, shape=shape)
    for start, outputs in _batches(trained, source, batch_size):
        array[start : start + len(outputs)] = outputs
    array.flush()
    return len(source)


def meaning(outputs: np.ndarray, task: str, class_names: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """What outputs [n] or [n, k] of a built-in task say, a row an example; of any other task, the outputs themselves.

    `classification`: `prediction`, its `name` and `probability`. `binary`: `probability` of 1 and `prediction`.
    `multilabel`: the `prediction`s, those with a probability of at least a half. `regression`: the values.
    """
    values = outputs.astype(np.float64)
    if task == "classification" and values.ndim == 2:
        shifted = np.exp(values - values.max(-1, keepdims=True))
        best, top = values.argmax(-1), shifted.max(-1) / shifted.sum(-1)
        return [
            {"prediction": int(k), **({} if class_names is None else {"name": class_names[k]}), "probability": float(p)}
            for k, p in zip(best, top, strict=True)
        ]
    if task == "binary" and values[0].size == 1:
        likely = 0.5 * (1 + np.tanh(values.reshape(-1) / 2))  # the logistic function, without overflow
        return [{"prediction": int(p >= 0.5), "probability": float(p)} for p in likely]
    if task == "multilabel" and values.ndim == 2:
        labels = [np.flatnonzero(row >= 0).tolist() for row in values]
        if class_names is None:
            return [{"prediction": " ".join(map(str, row))} for row in labels]
        return [
            {"prediction": " ".join(map(str, row)), "name": "; ".join(class_names[k] for k in row)} for row in labels
        ]
    flat = values.reshape(len(values), -1)
    names = ["prediction"] if flat.shape[1] == 1 else [f"output_{k}" for k in range(flat.shape[1])]
    return [dict(zip(names, row, strict=True)) for row in flat.tolist()]
