"""The steps of `launch/gpu.sh`, the most telling first, and the command of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dpdist_launch.measure.gpu.runner import Context, Skip, Step

#: (model, format, physical batch size, seconds of ten minutes).
Row = tuple[str, str, int, float]
#: What `bench clipping` measures first, and what if time is left.
FIRST: list[Row] = [
    ("vit-b", "bf16", 32, 95),
    ("bert-base", "bf16", 64, 85),
    ("gpt2-small", "bf16", 8, 85),
    ("r50x1", "tf32", 32, 75),
]
LATER: list[Row] = [
    ("vit-b", "tf32", 32, 75),
    ("vit-l", "bf16", 64, 110),  # 16 left half of an H200's multiprocessors without a tile
    ("bert-base", "tf32", 64, 80),
    ("gpt2-small", "tf32", 8, 85),
    ("r50x1", "bf16", 32, 80),
    ("vit-l", "tf32", 16, 100),
    ("vit-b", "float32", 32, 80),
    ("bert-base", "float32", 64, 80),
    ("gpt2-small", "float32", 8, 85),
    ("r50x1", "float32", 32, 80),
    ("vit-l", "float32", 8, 100),
]
TINY: list[Row] = [("mnist-cnn", "tf32", 8, 40), ("bert-mini", "bf16", 2, 60), ("gpt2-tiny", "bf16", 2, 60)]
#: In this order, as far as the time goes.
METHODS, TINY_METHODS = "tensor,jax-masked,per_example,auto,bookkeeping", "tensor,auto,per_example"
#: GPUs with less memory get half the batch.
ENOUGH_MEMORY = 40e9


def steps(*, tiny: bool) -> list[Step]:
    """Return all steps in their order."""
    first, later = (TINY, []) if tiny else (FIRST, LATER)
    facts = _program("facts", 40, "facts")
    return [facts, *(replace(step, command=partial(_on_a_gpu, step.command)) for step in _others(first, later))]


def _on_a_gpu(command: Callable[[Context], Sequence[str]], context: Context) -> Sequence[str]:
    """Return the command; raises Skip where JAX has only the processor, which would take hours."""
    found = (context.results.get("facts") or {}).get("machine", {}).get("platform")
    if found == "cpu" and not context.tiny:
        raise Skip("JAX sees no GPU")
    return command(context)


def _others(first: Sequence[Row], later: Sequence[Row]) -> list[Step]:
    return [
        _program("gamma", 40, "gamma"),
        _program("zoo", 60, "zoo"),
        _program("digits", 75, "digits"),
        Step(
            name="roofline",
            limit=40,
            command=_roofline,
            result="roofline.json",
            environment={"JAX_PLATFORMS": "cpu"},  # it traces shapes alone
        ),
        *(_clipping(*row) for row in first),
        _program("step", 150, "data_path"),
        *(_clipping(*row) for row in later),
        Step(
            name="largest-batch",
            limit=120,
            command=partial(_largest, *first[0][:3]),
            result="largest-batch/clipping.json",
            summary=_largest_batches,
        ),
    ]


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _program(name: str, limit: float, module: str) -> Step:
    def command(context: Context) -> Sequence[str]:
        line = _python(f"dpdist_launch.measure.gpu.{module}", "--to", str(context.out / f"{name}.json"))
        if name not in ("facts", "gamma") and context.tiny:
            line.append("--tiny")
        return [*line, "--limit", f"{0.8 * context.seconds:.0f}"] if name == "zoo" else line

    return Step(name=name, limit=limit, command=command, result=f"{name}.json")


def _roofline(context: Context) -> Sequence[str]:
    known = (context.results.get("facts") or {}).get("table_name")
    device = "A100" if context.tiny else known
    if device is None:
        raise Skip("no published rates of this device in dpdist/program/device_rates.py")
    models = dict.fromkeys(row[0] for row in (TINY if context.tiny else FIRST + LATER))
    wrap = (
        f"import sys; from dpdist_launch.measure.gpu.steps import roofline_to; roofline_to({device!r}, *sys.argv[1:])"
    )
    return [sys.executable, "-c", wrap, ",".join(models), str(context.out / "roofline.json")]


def roofline_to(device: str, models: str, path: str) -> None:
    """Write the predictions for the models, separated by commas, to a file."""
    import json
    from pathlib import Path

    from dpdist_launch.measure.bench import roofline

    content = roofline.roofline(devices=[device], models=models.split(","))
    Path(path).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{len(content['rows'])} predictions for {device}")


def _bench(context: Context, name: str, model: str, form: str, batch: int, *options: str) -> list[str]:
    return _python(
        "dpdist_launch",
        *("bench", "clipping", "--models", model, "--format", form, "--batch", str(batch), "--seconds", "0.2"),
        *("--to", str(context.out / name), *options),
    )


def _fitting(batch: int, context: Context) -> int:
    memory = (context.results.get("facts") or {}).get("memory_bytes") or ENOUGH_MEMORY
    return batch if memory >= ENOUGH_MEMORY else max(1, batch // 2)


def _clipping(model: str, form: str, batch: int, limit: float) -> Step:
    name = f"clipping-{model}-{form}"

    def command(context: Context) -> Sequence[str]:
        # A second or more is left to time what was compiled, and to write.
        limits = "--time-limit", f"{max(1.0, 0.85 * context.seconds - 5):.0f}"
        rounds = "--rounds", "2" if context.tiny else "5"
        size = _fitting(batch, context)
        methods = "--methods", TINY_METHODS if context.tiny else METHODS
        how = "--peers", "installed", "--profile"
        return _bench(context, name, model, form, size, *methods, *how, *rounds, *limits)

    return Step(name=name, limit=limit, command=command, result=f"{name}/clipping.json", summary=ratios)


def ratios(found: dict[str, Any]) -> str:
    """Return every arm's ratio in a line."""
    arms = [(name, arm) for numbers in found["models"].values() for name, arm in numbers["arms"].items()]
    return ", ".join(f"{name} {arm['ratio']:.2f}" if "ratio" in arm else f"{name} -" for name, arm in arms)


def _largest(model: str, form: str, batch: int, context: Context) -> Sequence[str]:
    memory = (context.results.get("facts") or {}).get("memory_bytes")
    if memory is None and not context.tiny:
        raise Skip("the device does not say how much memory it has")
    gib = 0.004 if memory is None else memory / 2**30
    size = _fitting(batch, context)
    search = ("--methods", "auto", "--rounds", "1", "--largest-batch", "--memory", f"{gib:.4g}")
    return _bench(context, "largest-batch", model, form, size, *search)


def _largest_batches(found: dict[str, Any]) -> str:
    arms = [(name, arm) for numbers in found["models"].values() for name, arm in numbers["arms"].items()]
    return ", ".join(f"{name} {arm.get('largest_batch')}" for name, arm in arms)
