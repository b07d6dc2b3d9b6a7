"""The local launcher with each rank on a host of its own: `nodes.py PID0 PID1 -- train CONFIG ...`.

The launcher starts this file again for every rank, and that enters the host of the process PID and becomes the rank.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from dpdist_launch.local import run_local


def main() -> int:
    """Start the ranks, or become one."""
    split = sys.argv.index("--")
    hosts, argv = sys.argv[1:split], sys.argv[split + 1 :]
    if "DPDIST_PROCESS_ID" in os.environ:
        become_rank(hosts, argv)
    return run_local(argv, len(hosts), 1, program=[sys.executable, *sys.argv[: split + 1]])


def become_rank(hosts: list[str], argv: list[str]) -> NoReturn:
    """The same process goes on as `dpdist` on its host, where it looks for rank 0 on the first."""
    port = os.environ["DPDIST_COORDINATOR"].rpartition(":")[2]
    os.environ["DPDIST_COORDINATOR"] = f"10.99.0.1:{port}"
    pid = hosts[int(os.environ["DPDIST_PROCESS_ID"])]
    enter = ["nsenter", f"--net=/proc/{pid}/ns/net", f"--uts=/proc/{pid}/ns/uts"]
    os.execvp(enter[0], [*enter, sys.executable, "-m", "launch", *argv])


if __name__ == "__main__":
    sys.exit(main())
