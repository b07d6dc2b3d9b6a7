"""`dpdist data describe`: what a run would see of its data. It shows records, for the eyes of the data's owner."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdist.errors import InputError
from dpdist_launch.paths import path_argument

if TYPE_CHECKING:
    import numpy as np

    from dpdist.config import Config
    from dpdist.data import Dataset, Source

PRIVATE = "PRIVATE: what follows quotes the data, for its owner's eyes; no guarantee covers it."
#: Examples read to measure how fast that is, and to draw.
_TIMED, _DRAWN = 256, 32
#: Values of a row that are printed.
_SHOWN = 8


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    data = commands.add_parser("data", help="what a run would see of its data")
    questions = data.add_subparsers(required=True, metavar="QUESTION")
    describe = questions.add_parser(
        "describe",
        help="columns, shapes, counts, classes, the first rows, and how fast they are read",
        description="Show the train and test examples of SPEC as a run would see them. It quotes them: for the eyes of "
        "the data's owner alone.",
    )
    describe.add_argument(
        "spec", metavar="SPEC", help="CONFIG, or source:path such as image_folder:data/cats, or digits"
    )
    describe.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config overrides, e.g. data.options.size=32"
    )
    describe.add_argument(
        "--to", type=path_argument, metavar="DIR", help="draw images into DIR, as train.png and test.png"
    )
    describe.add_argument("--rows", type=int, default=3, metavar="N", help="rows to print of each part (3)")
    describe.add_argument("--all", action="store_true", help="read every example, and name those that cannot be read")
    describe.add_argument("--json", action="store_true", help="print one JSON object")
    describe.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the description; returns 1 where an example cannot be read, else 0."""
    if options.rows < 0:
        raise InputError("--rows", options.rows, "give 0 or more.")
    report = describe(_config(options.spec, options.overrides), rows=options.rows, read_all=options.all, to=options.to)
    print(json.dumps(report) if options.json else text(report))
    return int(any(part and part["damaged"] for part in (report["train"], report["test"])))


def _config(spec: str, overrides: list[str]) -> Config:
    """The config that SPEC names; of `source:path`, one that says nothing else."""
    from dpdist.config import file, from_dict
    from dpdist.config.nearest import nearest
    from dpdist.data.datasets import BUILT_IN

    source, colon, path = spec.partition(":")
    if Path(spec).is_file() or (source not in BUILT_IN and not colon):
        return file.load(spec, overrides)
    if source not in BUILT_IN and (near := nearest(source, BUILT_IN)) is not None:
        raise InputError("SPEC", spec, f"did you mean {near}:{path}? Give CONFIG, source:path, or module:function.")
    given = {"source": source, "path": path or None} if source in BUILT_IN else {"source": spec}
    tree: dict[str, Any] = {"data": given, "privacy": {"enabled": False}, "training": {"steps": 1}}
    return from_dict(file.apply_overrides(tree, overrides))


def describe(config: Config, *, rows: int, read_all: bool = False, to: Path | None = None) -> dict[str, Any]:
    """What a run of `config` would see, as JSON.

    Args:
        rows: how many of each part to show.
        read_all: whether to read every example and list those that cannot be read.
        to: the directory for drawings of images; None draws none.

    Raises:
        InputError: the data cannot be used; what it says of a record is added, since this is for the owner.
    """
    from dpdist.data.checks import fingerprints
    from dpdist.data.datasets import open_unread, require_alike
    from dpdist.data.readers import read_in_processes

    try:
        dataset = open_unread(config)
        report: dict[str, Any] = {
            "private": PRIVATE,
            "name": dataset.name,
            "classes": dataset.classes,
            "label_names": dataset.label_names,
            "vocabulary": dataset.vocabulary,
            "unit": config.data.unit,
            "expected_batch_size": config.sampling.expected_batch_size,
            "train": None,
            "test": None,
        }
        parts = {name: part for name in ("train", "test") if (part := getattr(dataset, name)) is not None}
        damaged = {name: _damaged(part, config) if read_all else [] for name, part in parts.items()}
        data = config.data  # with damaged examples no process of a run could begin
        data = replace(data, worker_processes=0) if any(damaged.values()) else data
        digests = fingerprints(dataset.train, dataset.test) if data.worker_processes else {}
        with read_in_processes(dataset, data, digests, None) as timed:
            for name in parts:
                drawing = None if to is None else to / f"{name}.png"
                report[name] = _part(replace(config, data=data), dataset, timed, name, rows, damaged[name], drawing)
        if not any(damaged.values()):
            require_alike(dataset)
    except InputError as error:
        raise _with_cause(error) from error
    return report


def _with_cause(error: InputError) -> InputError:
    """The error with what its private cause says."""
    from dpdist.data.sources import BadRecordError

    private = isinstance(error.__cause__, BadRecordError)
    return InputError(error.field, error.value, f"{error.remedy} ({error.__cause__})") if private else error


def _cause(error: Exception) -> str:
    return str(error.__cause__ or error)


def _part(
    config: Config,
    dataset: Dataset,
    timed: Dataset,
    name: str,
    rows: int,
    damaged: list[tuple[int, str]],
    drawing: Path | None,
) -> dict[str, Any]:
    """The description of the part of that name; `timed` is the dataset as a run reads it."""
    import numpy as np

    from dpdist.data.sources import read_rows, schema

    source = getattr(dataset, name)
    with ThreadPoolExecutor(config.data.workers) as pool:
        wrong = {index for index, _ in damaged}
        whole = np.array([index for index in range(len(source)) if index not in wrong], np.int64)
        spread = whole[_evenly(len(whole), _TIMED)]
        began = time.perf_counter()
        found = read_rows(getattr(timed, name), spread, pool)
        rate = len(spread) / max(time.perf_counter() - began, 1e-9)
        first = read_rows(source, whole[:rows], pool)
    if drawing is not None and (column := _image_column(found)) is not None:
        chosen = _evenly(len(spread), _DRAWN)
        _draw({name: values[chosen] for name, values in found.items()}, column, dataset, drawing)
    return {
        "examples": len(source),
        "columns": schema({name: np.asarray(values[0]) for name, values in found.items()}),
        "ranges": {name: [values.min().item(), values.max().item()] for name, values in found.items() if values.size},
        "labels": _label_counts(source, dataset),
        "rows": [
            _row({name: values[index] for name, values in first.items()}, config, dataset)
            for index in range(len(whole[:rows]))
        ],
        "examples_per_second": rate,
        "threads": config.data.workers,
        "processes": config.data.worker_processes,
        "seconds_per_step": config.sampling.expected_batch_size / rate,
        "damaged": [what for _, what in damaged],
        "drawing": None if drawing is None or not drawing.exists() else str(drawing),
    }


def _evenly(length: int, count: int) -> np.ndarray:
    """At most `count` of `length` indices, evenly spaced from the first to the last."""
    import numpy as np

    count = min(length, count)
    return np.arange(count) * (length - 1) // max(count - 1, 1)


def _damaged(source: Source, config: Config) -> list[tuple[int, str]]:
    """Every example that cannot be read, by its index, and why."""

    def why(index: int) -> str | None:
        try:
            source[index]
        except Exception as error:  # of the user's own source, too
            return _cause(error)
        return None

    with ThreadPoolExecutor(config.data.workers) as pool:
        return [(index, said) for index, said in enumerate(pool.map(why, range(len(source)))) if said is not None]


def _label_counts(source: Source, dataset: Dataset) -> dict[str, int] | None:
    """How many examples each class has, where all labels are in memory."""
    import numpy as np

    from dpdist.data import ArraySource, Subset
    from dpdist.data.encoded import EncodedSource

    base, indices = (source.source, source.indices) if isinstance(source, Subset) else (source, slice(None))
    if not isinstance(base, ArraySource | EncodedSource) or "label" not in base.arrays:
        return None
    labels = base.arrays["label"][indices]
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        return None
    return {
        _named(label, dataset): count
        for label, count in zip(*map(np.ndarray.tolist, np.unique(labels, return_counts=True)), strict=True)
    }


def _named(label: int, dataset: Dataset) -> str:
    names = dataset.label_names
    known = names is not None and 0 <= label < len(names) and names[label] != str(label)
    return f"{label} {names[label]}" if known and names is not None else str(label)


def _row(row: Mapping[str, np.ndarray], config: Config, dataset: Dataset) -> dict[str, Any]:
    """One example, each column short enough to read."""
    import numpy as np

    shown: dict[str, Any] = {}
    for name, value in row.items():
        flat = np.asarray(value).reshape(-1).tolist()
        if name == "label" and len(flat) == 1 and isinstance(flat[0], int):
            shown[name] = _named(flat[0], dataset)
        elif name == "input_ids" and config.data.source == "text" and np.ndim(value) == 1:
            kept = row["attention_mask"].astype(bool)
            shown[name] = _tokenizer(config).decode(np.asarray(value)[kept].tolist())
        else:
            rest = f" ... of {len(flat)}" if len(flat) > _SHOWN else ""
            numbers = ", ".join(
                f"{number:.4g}" if isinstance(number, float) else str(number) for number in flat[:_SHOWN]
            )
            shown[name] = numbers + rest
    return shown


def _tokenizer(config: Config) -> Any:
    from dpdist.data.tokens import Tokenizer

    return Tokenizer(config.data.options["tokenizer"], config.data.options["length"])


def _image_column(found: Mapping[str, np.ndarray]) -> str | None:
    """The first column of images: [height, width] or [height, width, 1 or 3] an example."""
    for name, values in found.items():
        shape = values.shape[1:]
        if len(shape) == 3 and shape[2] in (1, 3) and min(shape[:2]) > 1:
            return name
    return None


def _draw(examples: Mapping[str, np.ndarray], column: str, dataset: Dataset, path: Path) -> None:
    """Write images as a grid, each with its class, all on one scale of brightness."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images, labels = examples[column], examples.get("label")
    if labels is not None and (labels.ndim > 1 or labels.dtype.kind not in "iu"):
        labels = None
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.4 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    low, high = float(images.min()), float(images.max())
    if images.dtype == np.uint8 and high > 127:
        low, high = 0.0, 255.0
    for place, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, place + 1)
        scaled = (image.astype(np.float32) - low) / max(high - low, 1e-9)
        axes.imshow(scaled[..., 0] if image.shape[-1] == 1 else scaled, cmap="gray", vmin=0, vmax=1)
        axes.set_title("" if labels is None else _named(int(labels[place]), dataset), fontsize=8)
        axes.axis("off")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    figure.savefig(path)
    path.chmod(0o600)


def text(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = [report["private"], f"data        {report['name']}"]
    if report["classes"] is not None:
        names = ", ".join((report["label_names"] or [])[:20])
        lines.append(f"classes     {report['classes']}{': ' * bool(names)}{names}")
    if report["vocabulary"] is not None:
        lines.append(f"vocabulary  {report['vocabulary']} token ids")
    for name in ("train", "test"):
        if (part := report[name]) is None:
            lines += ["", f"{name}: none, so nothing is evaluated"]
            continue
        lines += ["", f"{name}: {part['examples']:,} {'units' if report['unit'] and name == 'train' else 'examples'}"]
        for column, kind in part["columns"].items():
            found = part["ranges"].get(column)
            values = "no values" if found is None else f"from {found[0]:.6g} to {found[1]:.6g}"
            lines.append(f"  {column:16} {kind:20} {values} in {min(part['examples'], _TIMED)} examples")
        if part["labels"] is not None:
            counts = [f"{label}: {count:,}" for label, count in part["labels"].items()]
            lines.append(f"  labels           {', '.join(counts[:20])}{' ...' * (len(counts) > 20)}")
        for index, row in enumerate(part["rows"]):
            lines += [f"  {index:<3} {column}: {value}" for column, value in row.items()]
        readers = f"{part['processes']} processes" if part["processes"] else f"{part['threads']} threads"
        line = f"  read at {part['examples_per_second']:,.0f} examples/s by {readers}"
        if name == "train":
            size = report["expected_batch_size"]
            line += f"; a step of {size:g} expected examples takes {part['seconds_per_step']:.3g} s on one process"
        lines.append(line)
        lines += [f"  CANNOT BE READ: {what}" for what in part["damaged"]]
        lines += [f"  drawn: {part['drawing']}"] * (part["drawing"] is not None)
    return "\n".join(lines)
