"""Where the output of a run's ranks is, whoever started them, and whose line is whose.

* `sbatch slurm/train_80gpu.sh`: one file for all, in front of each line the rank, as of `srun --label`; the batch
  script names the file to its tasks, and process 0 writes the name into `private/ranks.json`.
* `dpdist submit`: two files a rank, `private/slurm/JOB_RANK_log.err` and `.out`.
* `dpdist train --processes`: `private/logs/output.log`, `[rank]` in front of each line.
* One process by hand: its output is on its terminal; `private/logs/rank-0.log` has what was logged.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dpdist.run import ranks
from dpdist.run.layout import RunPaths
from dpdist_launch.observe.queue import PATIENCE
from dpdist_launch.observe.snapshot import job_of

#: `12: text` of `srun --label`, `[12] text` of `dpdist train --processes`.
_LABEL = re.compile(r"(?: *(\d+): |\[(\d+)\] )")


@dataclass(frozen=True)
class Source:
    """A file with the output of one rank, or of all ranks with labels."""

    path: Path
    #: None where its lines have labels.
    rank: int | None


def find(run: RunPaths) -> list[Source]:
    """The files of the newest job of a run; empty where there is none, or none yet."""
    job, here = job_of(run), ranks.read(run.ranks)
    if job is not None:
        own = [Source(path, int(found[1])) for path in run.jobs.glob(f"{job}_*_log.*") if (found := _number(path))]
        if own:
            return sorted(own, key=lambda source: (source.rank, source.path))
    named = here.log if here is not None else None
    if named is None and job is not None:
        named = _asked(job)
    if named is not None and Path(named).is_file():
        return [Source(Path(named), None)]
    if job is None and run.output.is_file():
        return [Source(run.output, None)]
    private = {int(path.stem.removeprefix("rank-")): path for path in run.logs.glob("rank-*.log")}
    return [Source(private[rank], rank) for rank in sorted(private)]


def split(line: str) -> tuple[int | None, str]:
    """The rank that a line of a shared log names, and the rest; None where a launcher or the batch script speaks."""
    found = _LABEL.match(line)
    if found is None:
        return None, line
    return int(found[1] or found[2]), line[found.end() :]


def _number(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"\d+_(\d+)_log\.(?:err|out)", path.name)


def _asked(job: str) -> str | None:
    """SLURM's name of a job's log, while it knows the job."""
    try:
        command = ["scontrol", "show", "job", "--oneliner", job]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bStdErr=(\S+)", shown)
    return found[1] if found else None
