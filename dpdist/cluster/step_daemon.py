"""Which SLURM step this process is part of, as the processes above it show, whatever the environment says.

Variables outlive what they tell of: a job that is submitted from within a step has those of the step, and so has a
shell in tmux that the step has left behind. The daemon of a step, slurmstepd, is an ancestor of its tasks alone, and
its title names the step: `slurmstepd: [12.0]`, `[12.batch]`, `[12.interactive]`.
"""

from __future__ import annotations

import re
from pathlib import Path

#: Inode of the process namespace of the host itself (PROC_PID_INIT_INO of Linux).
_HOST_NAMESPACE = 0xEFFFFFFC
_TITLE = re.compile(r"slurmstepd: \[(\d+\.\w+)\]")


def step_of_process(proc: Path = Path("/proc")) -> str | None:
    """The step, as `12.0`, `12.batch`; empty for a process of no step; None where that cannot be told.

    It cannot in a container with processes of its own, where /proc hides those of others, and where there is none.
    """
    pid = "self"
    while True:
        try:
            parent = re.search(r"^PPid:\s*(\d+)", (proc / pid / "status").read_text(), re.M)
            title = _TITLE.match((proc / pid / "cmdline").read_text(errors="replace"))
        except OSError:  # hidden
            return None
        if title is not None:
            return title[1]
        if parent is None:
            return None
        if parent[1] == "0":
            return "" if _on_the_host(proc) else None
        pid = parent[1]


def _on_the_host(proc: Path) -> bool:
    try:
        return (proc / "self/ns/pid").stat().st_ino == _HOST_NAMESPACE
    except OSError:
        return False
