"""Putting functions into the queue: the script and the pickles in submitit's form, and sbatch called by ourselves.

submitit's executor runs sbatch in the environment of this process, so that a job of its own settings needs `os.environ`
changed, which other threads see. Here the environment is an argument. Nothing of this process is changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import _make_sbatch_string

from dpdist.errors import InputError


class RefusedError(InputError):
    """SLURM did not take a job; another request may be taken."""


#: Options that are in every submission, and that no cluster refuses.
_NOT_ASKED = ("--output", "--error", "--job-name", "--open-mode", "--signal", "--wckey", "--requeue", "--array")

#: A call that every task of a job makes: an importable function and its arguments.
Call = tuple[Callable[..., None], tuple[Any, ...]]


def submit(
    calls: Sequence[Call],
    folder: Path,
    options: Mapping[str, Any],
    *,
    python: str,
    environ: Mapping[str, str],
    at_once: int | None = None,
) -> list[str]:
    """Submit one job of one call, or one array of several, and return SLURM's numbers of them, such as 12 or 12_0.

    Args:
        folder: for the script, the calls and the logs of the ranks.
        options: what submitit's `_make_sbatch_string` takes; `additional_parameters` are options of sbatch.
        python: the command, for a shell, that the tasks run as their Python.
        environ: what sbatch sees.
        at_once: of an array, how many jobs run side by side; None is no array.

    Raises:
        InputError: there is no SLURM here.
        RefusedError: it refused the request; the error quotes it.
    """
    if shutil.which("sbatch", path=environ.get("PATH")) is None:
        raise InputError("sbatch", None, "there is no SLURM on this machine; see slurm/virtual_cluster.sh.")
    array: dict[str, Any] = {} if at_once is None else {"map_count": len(calls), "array_parallelism": at_once}
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text = _make_sbatch_string(command=command, folder=folder, **options, **array)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{uuid.uuid4().hex}.sh"
    pickles = [script.with_suffix(f".{number}.pkl") for number in range(len(calls))]
    script.write_bytes(os.fsencode(text))  # which also takes a path that is not UTF-8
    for (function, arguments), pickle in zip(calls, pickles, strict=True):
        delayed = DelayedSubmission(function, *arguments)
        delayed.set_timeout(0, 0)
        delayed.dump(pickle)
    # A variable such as SBATCH_PARTITION wins over what a script says, and an option over both.
    said = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    done = subprocess.run(
        ["sbatch", *said, str(script)], env=environ, capture_output=True, text=True, errors="replace", check=False
    )
    accepted = re.search(r"Submitted batch job (\d+)", done.stdout)
    if done.returncode != 0 or accepted is None:
        for file in (script, *pickles):
            file.unlink()
        for each in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                each.rmdir()
        asked = shlex.join(option for option in said if not option.startswith(_NOT_ASKED))
        raise RefusedError("sbatch", asked, f"SLURM refused: {' '.join((done.stderr or done.stdout).split())}")
    script.rename(folder / f"{accepted[1]}_submission.sh")
    ids = [accepted[1]] if at_once is None else [f"{accepted[1]}_{number}" for number in range(len(calls))]
    for job, pickle in zip(ids, pickles, strict=True):  # the tasks wait for it
        pickle.rename(folder / f"{job}_submitted.pkl")
    return ids
