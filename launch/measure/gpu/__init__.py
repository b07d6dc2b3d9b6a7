"""Everything worth measuring on one GPU, in one command: `bash launch/gpu.sh`.

Reading order: `runner` (steps within a time budget), `steps` (which, in what order), `page` (what they found), and the
programs that the steps run.
"""

from __future__ import annotations

import os


def platform() -> str:
    """Return `cpu` where JAX was told to use the processor, as `--tiny` does; else `gpu`."""
    return "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "gpu"
