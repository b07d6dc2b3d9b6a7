"""What of a batch script is dpdist's own: the lines around `srun`, the Python of its tasks, and the site's settings."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpdist.errors import InputError
from dpdist_launch.ranks import PYTHON, rank_environment


def repository() -> Path:
    """Where slurm/ is: DPDIST_HOME, or the clone that this was installed from with `pip install -e`."""
    return Path(os.environ.get("DPDIST_HOME") or Path(__file__).parents[2])


def site_file(site: str | Path | None) -> Path | None:
    """The site file: `site`, DPDIST_SITE, or slurm/site.sh; None where neither is named and there is no slurm/site.sh.

    Raises:
        InputError: the one that is named does not exist.
    """
    if site is None and "DPDIST_SITE" not in os.environ:
        default = repository() / "slurm" / "site.sh"
        return default if default.exists() else None
    named = Path(site or os.environ["DPDIST_SITE"]).absolute()
    if not named.is_file():
        raise InputError("--site", str(named), "no such file; copy slurm/site.example.sh there and edit it.")
    return named


def python(environ: Mapping[str, str]) -> str:
    """The Python of the tasks, for the shell of the batch script; `environ` says whether they run in a container."""
    if environ.get("DPDIST_CONTAINER"):
        return '"${dpdist_container[@]}" python -P'
    return shlex.join(PYTHON)


def _shared() -> Path:
    """What all batch scripts share."""
    shared = repository() / "slurm" / "job.sh"
    if not shared.exists():
        raise InputError("DPDIST_HOME", str(repository()), "has no slurm/job.sh; set it to a clone of the repository.")
    return shared


def setup(site: Path | None, run_dirs: Sequence[Path]) -> list[str]:
    """The lines before `srun`.

    Args:
        site: the site file.
        run_dirs: that of a job that trains, those of the tasks of an array, or none of a job that trains nothing.

    Raises:
        InputError: there is no slurm/job.sh to take them from.
    """
    exports = [f"export DPDIST_SITE={shlex.quote(str(site))}"] if site else []
    # The task is started by Python itself: there need not be a `dpdist` command.
    command = f"export DPDIST=${{DPDIST:-{shlex.quote(sys.executable)}}}"
    return [
        *_shared().read_text().splitlines(),
        *exports,
        command,
        f"read_site {shlex.quote(str(repository()))}",
        f"dpdist_runs=({shlex.join(map(str, run_dirs))})",
        'begin_job ${dpdist_runs[@]:+"${dpdist_runs[${SLURM_ARRAY_TASK_ID:-0}]}"}',
        # By it the next start knows of one that ended without a last line.
        'echo "+ job $job_id, start ${SLURM_RESTART_COUNT:-0}, $SLURM_NTASKS processes on $SLURM_JOB_NODELIST" >&2',
        # submitit logs to both streams, and to Python's root logger once that has a stream: lines came twice, and its
        # first ones, in the other file, behind ours. Without a configuration of its own it says what fails, once.
        "export SUBMITIT_LOG_LEVEL=NOCONFIG",
        # submitit writes the call of srun itself.
        'srun() { supervise "$@"; }',
    ]


def submission_environment(site: Path | None) -> dict[str, str]:
    """What sbatch shall see: this process's environment with the site's settings, and nothing of a job we may be in.

    What is asked for goes to sbatch as options, which win over the site's SBATCH_* variables.

    Raises:
        InputError: the site file fails.
    """
    environ = rank_environment({name: value for name, value in os.environ.items() if not _of_a_job(name)})
    if site is not None:
        read = subprocess.run(
            ["bash", "-c", 'set -a; . "$1"; source_site "$2" >&2; env -0', "bash", str(_shared()), str(site)],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
        )
        if read.returncode != 0:
            raise InputError("--site", str(site), f"cannot be read: {read.stderr.strip()[-300:]}")
        found = dict(item.partition("=")[::2] for item in read.stdout.split("\0") if item)
        environ |= {k: v for k, v in found.items() if k.startswith(("SBATCH_", "DPDIST_")) or k == "DPDIST"}
    # The one makes many jobs of ours, the other has sbatch wait for its end.
    return {name: value for name, value in environ.items() if name not in ("SBATCH_ARRAY_INX", "SBATCH_WAIT")}


def _of_a_job(name: str) -> bool:
    return name != "SLURM_CONF" and name.startswith(("SLURM_", "SLURMD_", "SUBMITIT_"))
