"""The Markdown page of `gpu.json`: conditions, how each step ended, and what was found."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any

from dpdist_launch.measure.bench.table import markdown

Found = dict[str, Any]


def page(content: Found) -> str:
    """Return the page; a step that left nothing is missing from it, but for its line in the table of steps."""
    parts = [f"# One GPU: {_device(content)}", _conditions(content), "## Steps", _steps(content["steps"])]
    results = content["results"]
    rows = {name: found for name, found in results.items() if name.startswith("clipping-")}
    for name, write in SECTIONS.items():
        found = rows if name in ("clipping", "profile") else results.get(name)
        if found:
            parts += _guarded(name, write, found, results)
    return "\n\n".join(parts) + "\n"


def _guarded(name: str, write: Callable[..., Iterator[str]], found: Found, results: Found) -> list[str]:
    """Return the paragraphs; a result that is not as expected, half written say, must not cost us the page."""
    try:
        return list(write(found, results.get("roofline")) if name == "clipping" else write(found))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        return [f"## {name}", f"Its result cannot be shown ({type(error).__name__}: {error}); see gpu.json."]


def _device(content: Found) -> str:
    facts = content["results"].get("facts", {})
    return str(facts.get("machine", {}).get("device_kind") or facts.get("nvidia", {}).get("name", "unknown device"))


def _conditions(content: Found) -> str:
    facts = content["results"].get("facts", {})
    machine, nvidia = facts.get("machine", {}), facts.get("nvidia", {})
    memory = facts.get("memory_bytes")
    lines = {
        "command": f"`{shlex.join(content.get('command', []))}`",
        "measured": f"{content['started']} to {content['written']}, of {content['budget_seconds'] / 60:g} minutes",
        "device": f"{_device(content)}, {f'{memory / 2**30:.1f} GiB for JAX' if memory else 'memory unknown'}",
        "nvidia-smi": ", ".join(f"{name} {value}" for name, value in nvidia.items()),
        "machine": f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores",
        "versions": ", ".join(f"{name} {value}" for name, value in facts.get("versions", {}).items()),
    }
    told = "\n".join(f"- **{name}**: {value}" for name, value in lines.items())
    return told + (
        "\n\n> **A trial** (`--tiny`) of the command on small shapes: no figure here means anything."
        if content.get("tiny")
        else ""
    )


def _steps(steps: Found) -> str:
    rows = []
    for name, step in steps.items():
        line = step.get("last_line", "").replace("|", "\\|")[:140]
        rows.append(
            [
                name,
                step["status"],
                _number(step.get("seconds"), ",.0f"),
                _number(step.get("limit_seconds"), ",.0f"),
                line,
            ]
        )
    return markdown(["step", "how it ended", "seconds", "of at most", "last line"], rows)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else f"{value:{style}}"


def gamma(found: Found) -> Iterator[str]:
    """How exactly products are accumulated."""
    yield "## Accumulation"
    yield (
        "Largest error of products of long rows, all positive or swamped by one large term, against float64, over what "
        "the bound on rounding assumes of tensor cores: at most 1 is allowed."
    )
    rows = [[fmt, f"{loss:.3f}", "within" if loss <= 1 else "**BEYOND**"] for fmt, loss in found["formats"].items()]
    yield markdown(["format", "of what is assumed", ""], rows)


def zoo(found: Found) -> Iterator[str]:
    """Single examples' contributions."""
    yield "## Clipping against float64"
    checks = found["checks"]
    bad = [row for row in checks if not row["ok"]]
    yield (
        f"{len(checks)} checks, {len(bad)} bad{'' if found['complete'] else ', no time for the rest'}. Norm of what "
        "one example adds, in float64, over C: at most 1 is allowed. Difference: of the sum from the float64 one."
    )
    groups: dict[tuple[str, str], list[Found]] = {}
    for row in checks:
        groups.setdefault((row["precision"], row["format"]), []).append(row)
    rows = []
    for (precision, form), all_of_it in groups.items():
        ran = [row for row in all_of_it if "largest" in row]
        if ran:
            worst = max(ran, key=lambda row: row["largest"])
            least = min(ran, key=lambda row: row["smallest_clipped"] or 1.0)
            rows.append(
                [
                    precision,
                    form,
                    str(len(all_of_it)),
                    f"{worst['largest']:.7f} ({worst['case']})",
                    f"{least['smallest_clipped'] or 1.0:.4f} ({least['case']})",
                    f"{max(row['difference'] for row in ran):.1e}",
                ]
            )
    yield markdown(
        ["precision", "format", "checks", "largest", "smallest that was clipped", "largest difference"], rows
    )
    if bad:
        yield "\n".join(f"- **bad**: {row}" for row in bad)


def digits(found: Found) -> Iterator[str]:
    """Training from end to end."""
    yield "## Training digits"
    rows = []
    for name in ("undisturbed", "killed", "resumed"):
        run = found.get(name)
        if run:
            rows.append(
                [
                    name,
                    str(run["exit"]),
                    f"{run['seconds']:.0f}",
                    str(run["reached"]),
                    _number(run.get("accuracy"), ".4f"),
                    str(run.get("params_sha256") or "-")[:12],
                ]
            )
    yield markdown(["run", "exit", "seconds", "step", "accuracy", "params_sha256"], rows)
    if "same_parameters" in found:
        same = "the same parameters bit for bit as" if found["same_parameters"] else "parameters that **differ** from"
        yield f"Killed (SIGKILL) and resumed, the run has {same} the undisturbed one."


#: Arms whose time the roofline predicts, and as which of its ways: the arm `auto` is at `precision: highest`.
PREDICTED = {"sgd": "sgd", "auto": "highest", "tensor": "tensor"}


def clipping(rows: Found, predicted: Found | None) -> Iterator[str]:
    """All arms of all models, with predictions."""
    yield "## Clipping"
    of = {}
    if predicted:
        of = {(row["model"], row["format"]): row for row in predicted["rows"] if row["rates"] == "assumed"}
    device = f" of {predicted['rows'][0]['device']}" if predicted and predicted["rows"] else ""
    yield (
        "Medians over interleaved rounds, and the ratio to plain SGD of the same framework. `*`: the step was cut off, "
        "only the second call was timed. Predicted: milliseconds and ratio by `dpdist bench roofline`"
        f"{device}, for plain SGD, `auto` with float64 norms, and `tensor`. Peak: "
        "device memory really used, where this arm set it."
    )
    lines = []
    for found in rows.values():
        form = found["settings"]["format"]
        for model, numbers in found["models"].items():
            guess = of.get((model, form), {})
            for arm, result in numbers["arms"].items():
                lines.append(_arm(model, form, numbers, arm, result, guess))
    head = "model,p,format,arm,ms,examples/s,ratio,predicted ms,predicted ratio,temporary GiB,peak GiB"
    yield markdown([*head.split(","), "compile s"], lines)


def _arm(model: str, form: str, numbers: Found, arm: str, result: Found, guess: Found) -> list[str]:
    size = numbers["batch"]
    start = [model, str(size), form, arm]
    way = guess.get(PREDICTED.get(arm, ""), {})
    predicted = [
        _number(way["seconds"] * size * 1e3 if way else None, ",.1f"),
        _number(way.get("ratio"), ".2f"),
    ]
    seconds = result.get("seconds", result.get("second_call_seconds"))
    if seconds is None:
        return [*start, result.get("failed", "not reached")[:80], "-", "-", *predicted, "-", "-", "-"]
    plain = numbers["arms"].get("sgd", {}).get("second_call_seconds")
    ratio, mark = result.get("ratio"), "" if "seconds" in result else "*"
    if ratio is None and plain and result["framework"] == "jax":
        ratio = seconds / plain
    return [
        *start,
        f"{seconds * 1e3:,.1f}{mark}",
        f"{size / seconds:,.0f}",
        _number(ratio, ".2f") + mark,
        *predicted,
        *(_number(result[name] / 2**30 if name in result else None, ",.2f") for name in ("temp_bytes", "peak_bytes")),
        _number(result.get("compile_seconds"), ",.0f"),
    ]


def step(found: Found) -> Iterator[str]:
    """A training step, stage by stage."""
    yield "## A step with its data"
    yield (
        "`dpdist bench step` on images read from files, ViT in bfloat16: "
        f"{found['examples_per_second']:,.0f} examples/s, {found['step_seconds'] * 1e3:,.0f} ms a step, physical batch "
        f"{found['physical_batch_size']}."
    )
    stages = found["seconds"]
    rows = [[name, f"{stages[name] * 1e3:,.2f}", f"{part:.4f}"] for name, part in found["fractions"].items()]
    yield markdown(["stage", "ms", "of the step"], rows)


def profile(rows: Found) -> Iterator[str]:
    """The kernels of what training takes on tensor cores, where that costs most."""
    seen = []
    for found in rows.values():
        for model, numbers in found["models"].items():
            arm = numbers["arms"].get("tensor", {})
            if "ratio" in arm and "kernels" in arm.get("profile", {}):
                seen.append((arm["ratio"], model, found["settings"]["format"], numbers))
    if not seen:
        return
    _, model, form, numbers = max(seen, key=lambda row: row[0])
    private, plain = (numbers["arms"][name].get("profile", {}) for name in ("tensor", "sgd"))
    yield "## Profile of the worst row"
    yield (
        f"`tensor` of {model} in {form}, p = {numbers['batch']}: {private['microseconds']:,.0f} us of kernels in a "
        f"call, {private['launches']:,.0f} launches; plain SGD {_number(plain.get('microseconds'), ',.0f')} us, "
        f"{_number(plain.get('launches'), ',.0f')} launches."
    )
    lines = [
        [f"`{kernel['name']}`", f"{kernel['microseconds']:,.0f}", f"{kernel['launches']:g}"]
        for kernel in private["kernels"][:15]
    ]
    yield markdown(["kernel", "us a call", "launches"], lines)


def largest(found: Found) -> Iterator[str]:
    """The largest batch that fits."""
    yield "## Largest physical batch"
    yield f"Powers of two, by XLA's memory analysis, in {found['settings']['memory_limit'] / 2**30:.1f} GiB."
    rows = []
    for model, numbers in found["models"].items():
        for arm, result in numbers["arms"].items():
            rows.append([model, found["settings"]["format"], arm, _number(result.get("largest_batch"), "d")])
    yield markdown(["model", "format", "arm", "largest"], rows)


#: Result -> its part of the page. `clipping` and `profile` have all rows of `bench clipping`.
SECTIONS: dict[str, Callable[..., Iterator[str]]] = {
    "gamma": gamma,
    "zoo": zoo,
    "digits": digits,
    "clipping": clipping,
    "step": step,
    "profile": profile,
    "largest-batch": largest,
}
