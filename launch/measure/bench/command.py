"""`dpdist bench`: the benchmarks' command line. JAX is imported only by the subcommand that runs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dpdist.errors import InputError
from dpdist_launch.measure.bench.progress import to_stderr
from dpdist_launch.paths import path_argument

_CLIPPING = """\
Time every way to compute the clipped gradient sum of ONE physical batch, side by side: the arms take turns in rounds,
and each is compared with the fastest plain SGD of its own framework in the same round. Prints a table; progress goes to
stderr. docs/benchmarks.md says how to read it.
"""
_EPILOG = """\
models:
  mnist-cnn, vit-ti, vit-s, vit-b, vit-l (patches of 16, images of 224), r50x1 (BiT), bert-mini, bert-base (128 tokens),
  gpt2-small (1,024 tokens), gpt2-tiny (32 tokens, 2 layers: to try a command)

methods:
  sgd          no privacy, as training computes it; measured in any case
  sgd batch, sgd loop   no privacy: always the whole batch at once; one example after the other
  auto, bookkeeping, ghost, per_example   as training.clipping in a config, with training.precision=highest
  tensor       as auto, with training.precision=tensor
  jax-masked   the paper's method: every example's gradient scaled by clip factor and mask, then summed
  naive        batches of varying size, which compile again: the mean of a short series, compilation included

examples:
  dpdist bench clipping --models mnist-cnn,vit-ti --methods auto,per_example --rounds 5
  dpdist bench clipping --peers --to docs/results/clipping-cpu
  dpdist bench clipping --models vit-b --batch 8 --largest-batch --memory 16
"""


def add_to(commands: Any) -> None:
    """Add `bench` and its subcommands to the `dpdist` command."""
    bench = commands.add_parser("bench", help="measure this machine")
    subjects = bench.add_subparsers(required=True, metavar="SUBJECT")

    step = subjects.add_parser("step", help="where the time of a training step goes, as fractions")
    step.add_argument("config", metavar="CONFIG")
    step.add_argument("overrides", nargs="*", metavar="key=value")
    step.add_argument("--steps", type=int, default=20, help="steps measured, after the first two")
    step.add_argument("--to", type=path_argument, help="write the JSON here as well")
    step.set_defaults(run=_step)

    clipping = subjects.add_parser(
        "clipping",
        help="what clipping costs over plain SGD, by every method; peers side by side",
        description=_CLIPPING,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = clipping.add_argument
    add("--models", default="mnist-cnn,vit-ti,vit-s,bert-mini", help="separated by commas (%(default)s)")
    add("--methods", help="separated by commas (all)")
    add(
        "--batch", metavar="N", help="physical batch size, or sizes by model: vit-ti=8,vit-s=4 (each model's usual one)"
    )
    add(
        "--format",
        default="tf32",
        help="of the models' products: bf16, float32, or tf32, which is JAX's default for "
        "float32: TF32 on GPUs that have it, float32 elsewhere (%(default)s)",
    )
    add(
        "--peers",
        nargs="?",
        const="all",
        choices=["all", "installed"],
        help="also jax_privacy and Opacus, from the extra `peers`; all of them, or those that are installed",
    )
    add("--rounds", type=int, default=15, help="turns of every arm (15)")
    add("--seconds", type=float, default=0.3, help="length of a turn, after one call that is not timed (0.3)")
    add("--largest-batch", action="store_true", help="also the largest batch that fits; compiles several more programs")
    add("--memory", type=float, default=8.0, metavar="GIB", help="memory that the largest batch must fit into (8)")
    add(
        "--time-limit", type=float, metavar="S", help="begin no arm and no round of a model after so many seconds of it"
    )
    add("--profile", action="store_true", help="also the kernels of each JAX arm; with --to, its compiled program")
    add("--to", type=path_argument, metavar="DIR", help="write clipping.json and clipping.md there as well")
    clipping.set_defaults(run=_clipping)

    memory = subjects.add_parser(
        "memory",
        help="the largest physical batch of every method, by XLA's analysis; nothing is run",
        description="Compile the gradient sum of shapes at two physical batch sizes, for the device here or for a GPU "
        "that is not (--target), and print the memory an example and the largest batches; see docs/benchmarks.md.",
    )
    memory.add_argument(
        "--models",
        default="vit-b,bert-base,bert-base:512,gpt2-small:256,gpt2-small",
        help="separated by commas, NAME or NAME:TOKENS (%(default)s)",
    )
    memory.add_argument("--methods", default="auto,tensor", help="separated by commas, beside sgd (%(default)s)")
    memory.add_argument("--format", default="bf16", help="of the models' products: bf16, tf32 or float32 (%(default)s)")
    memory.add_argument("--sizes", default="8,16", help="the two physical batch sizes (%(default)s)")
    memory.add_argument("--memory", default="40,80", help="of devices, in GiB (%(default)s)")
    memory.add_argument("--target", help="a GPU to compile for: H100; needs JAX's CUDA plugin but no GPU")
    memory.add_argument("--to", type=path_argument, metavar="FILE", help="write the JSON here as well")
    memory.set_defaults(run=_memory)

    roofline = subjects.add_parser(
        "roofline",
        help="what clipping would cost on a GPU, predicted from its published rates; needs no GPU",
        description="Predict the time of plain SGD and of DP-SGD from operations, bytes and assumed efficiencies; "
        "docs/roofline.md explains the columns. Traces shapes only.",
    )
    roofline.add_argument(
        "--device", default="A100,H100", help="separated by commas (%(default)s); all: every known one"
    )
    roofline.add_argument("--models", help="separated by commas (vit-b, vit-l, bert-base, gpt2-small, r50x1)")
    roofline.add_argument("--json", action="store_true", help="print one JSON object")
    roofline.set_defaults(run=_roofline)


def _step(options: argparse.Namespace) -> int:
    from dpdist.config import file as configfile
    from dpdist_launch.measure.bench.step import bench_step

    report = bench_step(configfile.load(options.config, options.overrides), steps=options.steps)
    text = json.dumps(report, indent=2)
    print(text)
    if options.to is not None:
        options.to.write_text(text + "\n")
    return 0


def _clipping(options: argparse.Namespace) -> int:
    from dpdist_launch.measure.bench import table
    from dpdist_launch.measure.bench.arms import ARMS
    from dpdist_launch.measure.bench.clipping import Request, bench_clipping

    models = _names(options.models)
    content = bench_clipping(
        Request(
            models=models,
            methods=tuple(ARMS) if options.methods is None else _names(options.methods),
            batches=_batches(options.batch, models),
            format=options.format,
            peers=options.peers,
            time_limit=options.time_limit,
            rounds=options.rounds,
            seconds=options.seconds,
            memory_limit=options.memory * 2**30 if options.largest_batch else None,
            profile=options.profile,
            to=options.to,
            command=["dpdist", *sys.argv[1:]],
        )
    )
    print(table.text(content), end="")
    return 0


def _memory(options: argparse.Namespace) -> int:
    from dpdist_launch.measure.bench import memory

    try:
        sizes, limits = tuple(map(int, _names(options.sizes))), [2**30 * float(x) for x in _names(options.memory)]
    except ValueError:
        raise InputError("--sizes, --memory", f"{options.sizes}, {options.memory}", "give numbers.") from None
    if len(sizes) != 2:
        raise InputError("--sizes", options.sizes, "give two numbers of examples.")
    content = memory.bench_memory(
        _names(options.models),
        _names(options.methods),
        form=options.format,
        sizes=sizes,
        limits=limits,
        target=options.target,
        progress=to_stderr,
    )
    print(memory.text(content), end="")
    if options.to is not None:
        options.to.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def _roofline(options: argparse.Namespace) -> int:
    from dpdist.program.device_rates import PEAK_RATES
    from dpdist_launch.measure.bench import roofline

    devices = tuple(PEAK_RATES) if options.device == "all" else _names(options.device)
    models = roofline.MODELS if options.models is None else _names(options.models)
    content = roofline.roofline(devices=devices, models=models)
    print(json.dumps(content) if options.json else roofline.text(content), end="\n" if options.json else "")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _batches(text: str | None, models: tuple[str, ...]) -> dict[str, int]:
    """Parse `8` (for all models) or `vit-ti=8,vit-s=4` into sizes by model."""
    sizes: dict[str, int] = {}
    for part in _names(text or ""):
        model, _, size = part.rpartition("=")
        try:
            sizes |= dict.fromkeys([model] if model else models, int(size))
        except ValueError:
            raise InputError("--batch", text, "give a whole number, or vit-ti=8,vit-s=4 by model.") from None
    return sizes
