"""What `launch/gpu.sh` runs: all steps, or those of --only, within the budget."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dpdist_launch.measure.gpu.page import page
from dpdist_launch.measure.gpu.runner import FAILED, OK, SKIPPED, run
from dpdist_launch.measure.gpu.steps import steps

_ABOUT = """\
Measure everything worth measuring on one GPU, within a time limit: device facts, the accumulation of long products, a
clipping zoo against float64, training with a kill and a resume, what clipping costs, a step with its data, a profile.
DIR/README.md and DIR/gpu.json are written after every step, so that a run that is cut off still tells.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if every step that began went well, 1 if one failed, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="bash launch/gpu.sh", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (%(default)g)")
    parser.add_argument("--to", type=Path, default=Path("runs/gpu"), metavar="DIR", help="results (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="try the command itself: small shapes, on the processor")
    parser.add_argument("--only", metavar="STEPS", help="separated by commas; beginnings of names do (all)")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: give a number above 0")
    chosen = steps(tiny=options.tiny)
    if options.only is not None:
        asked = tuple(name.strip() for name in options.only.split(",") if name.strip())
        unknown = [name for name in asked if not any(step.name.startswith(name) for step in chosen)]
        if unknown or not asked:
            parser.error(f"--only {', '.join(unknown)}: there are {', '.join(step.name for step in chosen)}")
        chosen = [step for step in chosen if step.name.startswith(asked)]
    out = options.to.absolute()
    out.mkdir(parents=True, exist_ok=True)
    # JAX would take three quarters of the memory for itself, PyTorch would get none, and no peak could be seen.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["PYTHONUNBUFFERED"] = "1"
    if options.tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGTERM, _interrupt)  # the step that runs must end with us
    content = run(
        chosen,
        out=out,
        seconds=60 * options.minutes,
        tiny=options.tiny,
        about={
            "what": "everything worth measuring on one GPU",
            "command": ["bash", "launch/gpu.sh", *(sys.argv[1:] if argv is None else argv)],
            "tiny": options.tiny,
        },
        write_page=page,
    )
    ended = [step["status"] for step in content["steps"].values()]
    print(f"{ended.count(OK)} of {len(ended)} steps went well: {out / 'README.md'}")
    return 1 if FAILED in ended or not {OK, SKIPPED} & set(ended) else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; what was measured is written", file=sys.stderr)
        sys.exit(130)
