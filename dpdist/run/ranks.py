"""Which rank of a job runs on which node, and where the job's log is: `private/ranks.json`, for `dpdist logs`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where the ranks of a part of a run are. Nodes' names are private: an export must not tell them."""

    #: When it was written, in seconds since 1970.
    time: float
    #: Node of each rank.
    nodes: Sequence[str]
    slurm_job: str | None
    slurm_cluster: str | None
    slurm_restart: int
    #: The one file in which all ranks' output is, each line with its rank in front; None where there is none.
    log: str | None

    @classmethod
    def of_this_job(cls, nodes: Sequence[str], environ: Mapping[str, str]) -> Ranks:
        """What process 0 knows; the batch script or the local launcher names the log as DPDIST_LOG."""
        return cls(
            time=time.time(),
            nodes=nodes,
            slurm_job=environ.get("SLURM_JOB_ID"),
            slurm_cluster=environ.get("SLURM_CLUSTER_NAME"),
            slurm_restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
            log=environ.get("DPDIST_LOG") or None,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    def local(self, rank: int) -> int:
        """The rank among those of its node."""
        return sum(node == self.nodes[rank] for node in self.nodes[:rank])

    def by_node(self) -> dict[str, list[int]]:
        """The ranks of each node."""
        found: dict[str, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            found.setdefault(node, []).append(rank)
        return found


def read(path: Path) -> Ranks | None:
    """What the file says; None where there is none, or none that is whole."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        found = Ranks(**record)
        whole = (
            all(isinstance(node, str) for node in found.nodes)
            and all(isinstance(text, str | None) for text in (found.slurm_job, found.slurm_cluster, found.log))
            and isinstance(found.time, float | int)
        )
        return found if whole else None
    except (OSError, ValueError, TypeError):
        return None
