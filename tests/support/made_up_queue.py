"""A SLURM that only takes jobs, and says of them what a test tells it to: sbatch, scontrol, scancel on PATH."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

# Here, and not first within a test: as it is imported it closes absl's stream, which may be pytest's.
import submitit  # noqa: F401

from dpdist_launch.slurm.job import Job

REPOSITORY = Path(__file__).parents[2]
#: Writes its options and environment down, one file a submission.
SBATCH = """#!{python} -IS
import json, os, sys, time
number = len(os.listdir({root!r}))
while True:
    try:
        file = os.open(f"{root}/{{number}}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        break
    except FileExistsError:
        number += 1
time.sleep(0.02)
os.write(file, json.dumps({{"argv": sys.argv[1:], "environ": dict(os.environ)}}).encode())
print("Submitted batch job", 1000 + number)
"""
#: Knows the jobs that a file says.
SCONTROL = """#!/bin/sh
case "$*" in
    *config) echo "ClusterName             = $(cat {root}/cluster)" ;;
    *) grep -s "^JobId=$4 " {root}/jobs || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }} ;;
esac
"""


class Queue:
    """A SLURM that only takes jobs, and says of them what it is told to say."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.submitted_to, commands = root, root / "submitted", root / "bin"
        for folder in (root, self.submitted_to, commands):
            folder.mkdir()
        scripts = {
            "sbatch": SBATCH.format(python=sys.executable, root=str(self.submitted_to)),
            "scontrol": SCONTROL.format(root=root),
            "scancel": f"#!/bin/sh\necho $* >>{root}/cancelled\n",
            "sacct": "#!/bin/sh\nexit 1\n",
        }
        for name, text in scripts.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        (root / "cluster").write_text("here")
        monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
        monkeypatch.setenv("DPDIST_HOME", str(REPOSITORY))
        monkeypatch.delenv("DPDIST_SITE", raising=False)

    def submitted(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in self.submitted_to.iterdir()]

    def knows(self, job: Job, state: str, reason: str = "None", name: str | None = None) -> None:
        """From now on, SLURM knows this job alone."""
        assert job.identity is not None
        name, command = name or job.identity.name, f"{job.folder}/x.sh"
        line = f"JobId={job.id} JobName={name} UserId=me(0) JobState={state} Reason={reason} Command={command} Power=\n"
        (self.root / "jobs").write_text(line)

    def cancelled(self) -> str:
        file = self.root / "cancelled"
        return file.read_text() if file.exists() else ""
