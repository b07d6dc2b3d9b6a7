"""Write `clipping.md`: one row per arm, one column per model, and the conditions of the measurement."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: Sums with a larger relative distance from the reference are reported as wrong. Numbers of 8 bits differ by more.
TOLERANCE, SHORT_TOLERANCE = 1e-3, 1e-2
_MIB = 2**20


def text(content: dict[str, Any]) -> str:
    """Return the page for the content of `clipping.json`."""
    models: dict[str, Any] = content["models"]
    arms = list(content["about"])
    parts = [
        "# What clipping costs",
        _conditions(content),
        _notes(content),
        "## Time over plain SGD",
        "Median over rounds of the ratio to the fastest plain SGD of the same framework in the same round, and the "
        f"median milliseconds of one physical batch. {_baselines(models, 'baselines')} **Bold**: the lowest ratio of a "
        "private arm.",
        _by_arm(models, arms, _ratio_and_time, best=_lowest("ratio")),
        *_processor(content, arms),
        "## Examples per second",
        "And, across frameworks, the time over the fastest plain SGD of any. **Bold**: the fastest private arm.",
        _by_arm(models, arms, _rate, best=_highest("examples_per_second")),
        *_largest(models, arms, content["settings"]["memory_limit"]),
        "## What is behind it",
        "Quartiles of the ratio over rounds. Temporary memory and FLOPs are XLA's own analysis of the compiled "
        "program, beside those of plain SGD. Difference: of the clipped sum from that of `per_example` (or the first "
        "private arm), of plain SGD's from JAX's, relative, in L2. Peak: the most memory that the process has used on "
        "the device, where this arm set it; `-` where an earlier arm or compiling had used more, or nothing counts it.",
        _details(models, arms),
        "## The arms",
        "\n".join(f"- `{name}`: {about}" for name, about in content["about"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _conditions(content: dict[str, Any]) -> str:
    machine, settings = content["machine"], content["settings"]
    loads = [f"{model['load_before']:.1f}" for model in content["models"].values()]
    lines = {
        "command": f"`{shlex.join(content['command'])}`",
        "measured": f"{content['started']} to {content['written']}, {settings['rounds']} rounds, turns of "
        f"{settings['seconds_a_turn']:g} s, products in {settings['format']}",
        "hardware": f"{machine['device_kind']} ({machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB), load before each model {', '.join(loads)}",
        "versions": ", ".join(f"{name} {found}" for name, found in content["versions"].items()),
        "models": "; ".join(
            f"{name}: batch {model['batch']}, {model['parameters']:,} parameters"
            for name, model in content["models"].items()
        ),
    }
    return "\n".join(f"- **{name}**: {value}" for name, value in lines.items())


def _notes(content: dict[str, Any]) -> str:
    notes = []
    if content["machine"]["platform"] == "cpu":
        notes.append("These are times on a CPU; a GPU has other ratios.")
    short = content["settings"]["format"] == "bf16"
    for name, model in content["models"].items():
        for arm, found in model["arms"].items():
            if "failed" in found:
                notes.append(f"{arm} failed on {name}: {found['failed']}")
            elif found.get("difference", 0.0) > (SHORT_TOLERANCE if short or arm == "tensor" else TOLERANCE):
                notes.append(f"{arm} computes ANOTHER SUM on {name}: off by {found['difference']:.1e}.")
            if "compilations" in found:
                notes.append(
                    f"{arm} on {name}: mean over {found['steps']} steps of sizes {found['sizes']}, with "
                    f"{found['compilations']} compilations in it."
                )
    notes += [f"{name} was not measured: {why}." for name, why in content["absent"].items()]
    return "\n".join(f"> **Note.** {note}\n>" for note in notes).removesuffix("\n>")


Found = dict[str, Any]
#: All arms of a model -> the name of the best one, if there is one.
Best = Callable[[dict[str, Found]], str | None]


def _lowest(quantity: str, sign: int = 1) -> Best:
    def best(arms: dict[str, Found]) -> str | None:
        private = [name for name, found in arms.items() if found["private"] and found.get(quantity) is not None]
        return min(private, key=lambda name: sign * arms[name][quantity], default=None)

    return best


def _highest(quantity: str) -> Best:
    return _lowest(quantity, -1)


def _baselines(models: dict[str, Any], which: str) -> str:
    told = (f"{name} {' and '.join(f'`{arm}`' for arm in model[which].values())}" for name, model in models.items())
    return f"The fastest were: {'; '.join(told)}."


#: (an arm, all arms of the model) -> the text of its cell.
Cell = Callable[[Found, dict[str, Found]], str]


def _by_arm(models: dict[str, Any], arms: list[str], cell: Cell, *, best: Best) -> str:
    winners = {model: best(found["arms"]) for model, found in models.items()}
    rows = []
    for name in arms:
        row = [name]
        for model, found in models.items():
            arm = found["arms"].get(name)
            shown = "" if arm is None else "failed" if "failed" in arm else cell(arm, found["arms"])
            row.append(f"**{shown}**" if winners[model] == name else shown)
        rows.append(row)
    return markdown(["arm", *(f"{name} b{model['batch']}" for name, model in models.items())], rows)


def _ratio_and_time(arm: Found, others: dict[str, Found]) -> str:
    return f"{_or_dash(arm.get('ratio'), '.2f')} · {_three_digits(1000 * arm['seconds'])} ms"


def _processor(content: dict[str, Any], arms: list[str]) -> list[str]:
    """The same in processor time, on a processor: other processes that take its cores change it less."""
    if content["machine"]["platform"] != "cpu":
        return []
    return [
        "## Processor time over plain SGD",
        "The same of processor time, all of the process's threads together: what other processes take of the cores is "
        f"not in it, but for what they do to the caches. {_baselines(content['models'], 'processor_baselines')}",
        _by_arm(content["models"], arms, _processor_ratio_and_time, best=_lowest("processor_ratio")),
    ]


def _processor_ratio_and_time(arm: Found, others: dict[str, Found]) -> str:
    if "processor_ratio" not in arm:
        return "-"
    return f"{arm['processor_ratio']:.2f} · {_three_digits(1000 * arm['processor_seconds'])} ms"


def _rate(arm: Found, others: dict[str, Found]) -> str:
    plain = max(
        other["examples_per_second"] for other in others.values() if not other["private"] and "seconds" in other
    )
    rate: float = arm["examples_per_second"]
    return f"{_three_digits(rate)} · {plain / rate:.2f}"


def _three_digits(value: float) -> str:
    """Format with three significant digits, or all digits before the point: 4.57, 45.7, 457, 4,567."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _largest(models: dict[str, Any], arms: list[str], limit: float | None) -> list[str]:
    if limit is None:
        return []
    return [
        "## Largest physical batch",
        f"The largest power of two whose compiled program fits {limit / 2**30:g} GiB with its arguments and results, "
        "read from XLA's memory analysis and not tried. **Bold**: the largest of a private arm.",
        _by_arm(
            models, arms, lambda arm, others: _or_dash(arm.get("largest_batch"), "d"), best=_highest("largest_batch")
        ),
    ]


def _or_dash(value: float | None, style: str) -> str:
    return "-" if value is None else f"{value:{style}}"


def _details(models: dict[str, Any], arms: list[str]) -> str:
    rows = []
    for model, found in models.items():
        plain = found["arms"]["sgd"]
        for name in arms:
            arm = found["arms"].get(name)
            if arm is None or "failed" in arm:
                continue
            peak = arm.get("peak_bytes")
            memory, flops = arm.get("temp_bytes"), arm.get("flops")
            spread = f"{arm['ratio_p25']:.2f} to {arm['ratio_p75']:.2f}" if "ratio_p25" in arm else "-"
            rows.append(
                [
                    model,
                    name,
                    spread,
                    _or_dash(arm.get("compile_seconds"), ".1f"),
                    _or_dash(memory / _MIB if memory is not None else None, ",.0f"),
                    _or_dash(memory / plain["temp_bytes"] if memory is not None else None, ".2f"),
                    _or_dash(peak / _MIB if peak is not None else None, ",.0f"),
                    _or_dash(flops / 1e9 if flops else None, ",.4g"),
                    _or_dash(flops / plain["flops"] if flops and plain["flops"] else None, ".2f"),
                    _or_dash(arm.get("difference"), ".0e"),
                ]
            )
    head = "model,arm,ratio quartiles,compile s,temporary MiB,of SGD's,peak MiB,GFLOP,of SGD's,difference"
    return markdown(head.split(","), rows)
