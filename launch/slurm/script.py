"""What of a batch script is dpdist's own: the lines around `srun`, the Python of its tasks, and the site's settings."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def setup(site: Path | None, run_dir: Path | None) -> list[str]:
    """The lines before `srun`; `run_dir` is that of a job that trains.

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
        shlex.join(["begin_job", *([str(run_dir)] if run_dir else [])]),
        # submitit writes the call of srun itself.
        'srun() { supervise "$@"; }',
    ]


@contextmanager
def submission_environment(site: Path | None, options: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """While the block runs, `os.environ` is what sbatch shall see: the site's settings, none of a job we may be in.

    Args:
        options: the options of sbatch that are given by name, which win over the site's SBATCH_* variables.

    Raises:
        InputError: the site file fails.
    """
    outside = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "SUBMITIT_"))}
    environ = rank_environment(outside)
    if site is not None:
        read = subprocess.run(
            ["bash", "-c", 'set -a; . "$1"; source_site "$2" >&2; env -0', "bash", str(_shared()), str(site)],
            capture_output=True,
            text=True,
            check=False,
        )
        if read.returncode != 0:
            raise InputError("--site", str(site), f"cannot be read: {read.stderr.strip()[-300:]}")
        found = dict(item.partition("=")[::2] for item in read.stdout.split("\0") if item)
        environ |= {k: v for k, v in found.items() if k.startswith(("SBATCH_", "DPDIST_")) or k == "DPDIST"}
    for option in options:  # sbatch lets a variable override what the script says
        environ.pop("SBATCH_" + option.upper().replace("-", "_"), None)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield environ
    finally:
        os.environ.clear()
        os.environ.update(before)
