"""How much long products lose on this device, over what the bound on rounding assumes: `program.self_test` by format.

usage: python -m dpdist_launch.measure.gpu.gamma --to FILE

Training asks the same before its first step, of the format that it clips in. Exits with 1 where a format loses more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from dpdist.mechanism.clipping.tensor_products import Format
from dpdist.program.self_test import largest_loss
from dpdist.run.directory import write_atomically

#: Those of tensor cores.
FORMATS: tuple[Format, ...] = ("bfloat16", "tf32")


def measure(to: Path) -> dict[str, Any]:
    """Measure all formats; returns the content, written to `to` after each of them."""
    content: dict[str, Any] = {
        "what": "largest error of products of long rows over gamma(d) sum |a||b|, which the bound on rounding assumes",
        "device": jax.devices()[0].device_kind,
        "formats": {},
    }
    for fmt in FORMATS:
        content["formats"][fmt] = largest_loss(fmt)
        write_atomically(to, json.dumps(content, indent=2) + "\n")
    return content


def main() -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    formats = measure(parser.parse_args().to)["formats"]
    print(f"of what is assumed: {', '.join(f'{fmt} {loss:.3f}' for fmt, loss in formats.items())}; at most 1 may be")
    beyond = [fmt for fmt, loss in formats.items() if not loss <= 1]
    for fmt in beyond:
        print(f"{fmt} loses {formats[fmt]:.3g} times what the bound assumes", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
