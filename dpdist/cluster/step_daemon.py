"""Which SLURM step this process is part of, as the processes above it show, whatever the environment says.

Variables outlive what they tell of: a job that is submitted from within a step has those of the step. The daemon of a
step, slurmstepd, is an ancestor of its tasks, and its title names the step: `slurmstepd: [12.0]`, `[12.batch]`,
`[12.interactive]`. Where there is none above, as in a container, for a fork of a server, or in a shell that a step has
left behind, nothing can be told.
"""

from __future__ import annotations

import re
from pathlib import Path

_TITLE = re.compile(r"slurmstepd: \[(\d+\.\w+)\]")


def step_of_process(proc: Path = Path("/proc")) -> str | None:
    """The step, as `12.0`, `12.batch`; None where that cannot be told."""
    pid = "self"
    while True:
        try:
            parent = re.search(r"^PPid:\s*(\d+)", (proc / pid / "status").read_text(), re.M)
            title = _TITLE.match((proc / pid / "cmdline").read_text(errors="replace"))
        except OSError:  # hidden
            return None
        if title is not None:
            return title[1]
        if parent is None or parent[1] == "0":
            return None
        pid = parent[1]
