"""What XLA compiles while tests run, kept for the next run of the tests: most of what they cost is compiling.

An entry's key holds the program, the compiler's version and its options; the directory's name holds the machine, since
what is compiled for one processor may not run on another. Two processes may write at once: a torn entry does not
decompress, and JAX then compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

#: Below the repository, and ignored by git. DPDIST_TEST_CACHE names another place; empty, nothing is kept.
PLACE = Path(__file__).parents[2] / ".cache/xla"
#: A directory that has grown beyond this holds mostly what no test compiles any more, and is begun anew.
LIMIT_BYTES = 400 * 2**20


def directory() -> Path | None:
    """Where it is kept; None where nothing is."""
    place = os.environ.get("DPDIST_TEST_CACHE", str(PLACE))
    if not place:
        return None
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    machine = hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]
    return Path(place) / f"jax-{jax.__version__}-{platform.machine()}-{machine}"


def keep_between_runs() -> None:
    """Use the kept cache in this process, for everything that is compiled, however small."""
    if (kept := directory()) is None:
        return
    if kept.is_dir() and sum(path.stat().st_size for path in kept.iterdir()) > LIMIT_BYTES:
        shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    for name, value in settings(kept).items():
        jax.config.update(name, value)


def settings(place: Path) -> dict[str, str | int | float]:
    """JAX's settings for a cache at `place`."""
    return {
        "jax_compilation_cache_dir": str(place),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """While the block runs, everything is compiled."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether it is enabled
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
