"""Where compiled programs are kept, and who compiles: process 0 alone where the others can read what it made.

Compiling is most of what the start of a rank costs. 80 ranks on one machine of 2 cores took 5 minutes to start, of
which they compiled the same dozen programs for 3.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
from jax._src import cache_key  # There is no public way to say what a key holds.
from jax.experimental.compilation_cache import compilation_cache

from dpdist.cluster.agreement import decide, process_0_first
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.run.directory import RunDirectory

#: Seconds that compiling must take for a program to be kept for a restart. JAX's default of one second leaves half of
#: a start. Where ranks read what process 0 compiled, all are kept.
_WORTH_KEEPING = 0.2

#: Enter one around what compiles: the same number of times on all processes.
Compiling = Callable[[], AbstractContextManager[None]]


def open_cache(config: Config, run: RunDirectory, world: World) -> Compiling:
    """Keep what is compiled from here on as `cluster.compilation_cache` says: process 0 writes, all read. Collective.

    That is JAX's own rule; where the directory can't be written it warns and compiles. XLA's programs for CPUs are for
    the processor that compiled them, so `auto` keeps none for the next start of one process; several keep them for each
    other. Nor does `auto` take the place of a directory that the environment names.

    Returns:
        What to enter around whatever compiles. On CPUs process 0 goes first, and the others find its programs; those on
        another kind of processor find none, and compile. On GPUs all go at once, as XLA may measure there together.

    Raises:
        InputError: others than its owner can write the directory: what lies there is run as it is.
    """
    asked, found = config.cluster.compilation_cache, _found_cache()
    together = world.platform == "cpu" and world.num_processes > 1
    if asked == "auto":
        asked = str(run.compiled) if (world.platform == "gpu" or together) and found is None else found
    decide(world, lambda: None if asked is None else _require_trusted(Path(asked)))
    compilation_cache.reset_cache()  # JAX asks once in a process whether there is one
    compilation_cache.set_cache_dir(asked)
    if asked is not None and (together or asked != found):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if together else _WORTH_KEEPING)
    if asked is None or not together or not _key_by_processor():
        return nullcontext
    return functools.partial(process_0_first, world, timeout=config.cluster.initialization_timeout)


@functools.cache
def _found_cache() -> str | None:
    """The directory that JAX has of its environment; asked once, before a run names its own."""
    found: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    return found


def _require_trusted(directory: Path) -> None:
    """Many systems give a user a group of their own, and let it write: that is nobody else."""
    if not directory.is_dir():
        return
    found = directory.stat()
    if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != os.getgid()):
        raise InputError(
            "cluster.compilation_cache",
            str(directory),
            "can be written by others, who could have the job run what they like; take that away (chmod go-w), or name "
            "another directory.",
        )


#: Functions of JAX that hash two parts of a key.
_PARTS = ("_hash_accelerator_config", "_hash_serialized_compile_options")


@functools.cache
def _key_by_processor() -> bool:
    """Let the key of a program for CPUs say for which processor it is, and not for which process.

    JAX's key holds the device's number in the job and the process's view of all devices, so that no rank would find
    what another compiled, although programs of CPUs hold neither. For GPUs it leaves both out by itself.

    Returns:
        Whether this JAX (0.10 to 0.12 do) makes its key of parts that we know; if not, it is left as it is.
    """
    whole_view, options = (getattr(cache_key, name, None) for name in _PARTS)
    if whole_view is None or options is None:
        return False

    def hash_devices(hash_obj: Any, accelerators: Any) -> None:
        if accelerators.flat[0].platform != "cpu":
            whole_view(hash_obj, accelerators)
            return
        # Two devices of a process compile at once; with one key, one would find what the other is still writing.
        place = accelerators.flat[0].local_hardware_id if accelerators.size == 1 else accelerators.size
        hash_obj.update(f"{processor()} {place}".encode())

    def hash_options(hash_obj: Any, compile_options: Any, strip_device_assignment: bool = False) -> None:
        options(hash_obj, compile_options, strip_device_assignment=True)

    cache_key._hash_accelerator_config = hash_devices
    cache_key._hash_serialized_compile_options = hash_options
    return True


@functools.cache
def processor() -> str:
    """A digest of what kind of processor this is, with all that it can do: XLA compiles for exactly that."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else [platform.processor()]
    # Not the clock and the core's number, which differ from read to read and from core to core.
    known = {line for line in lines if line.startswith(("vendor", "cpu family", "model", "stepping", "flags"))}
    known |= {line for line in lines if line.startswith(("Features", "CPU "))}  # on Arm
    return hashlib.sha256("\n".join([platform.machine(), *sorted(known or lines)]).encode()).hexdigest()
