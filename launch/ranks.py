"""What every rank of a job has in common, whoever starts it: how its Python is started, and when a run has ended."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpdist.config import Config
from dpdist.run.directory import RunDirectory
from dpdist.run.layout import DONE

#: This Python, which takes nothing from the working directory: a `launch.py` or `json.py` of the user's is not ours.
#: A config's own modules are found there all the same, after all others (`dpdist.config.plugins`).
PYTHON = (sys.executable, "-P")


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, with what a rank and the processes it starts need to find this package and not a file beside the user.

    PYTHONPATH gets the folder of this package where only this process has it, such as an uninstalled clone that is the
    working directory.
    """
    environ = {**environ, "PYTHONSAFEPATH": "1"}
    source = str(Path(__file__).parents[1])
    known = [*site.getsitepackages(), site.getusersitepackages(), *environ.get("PYTHONPATH", "").split(os.pathsep)]
    here = {str(Path(entry).absolute()) for entry in sys.path}
    if source in here and source not in known:
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (environ.get("PYTHONPATH"), source)))
    return environ


def outdated_summary(config: Config) -> dict[str, Any] | None:
    """The summary that lies in the run directory and that training `config` must replace.

    None where there is no summary, or where the run has already ended as `config` asks and will be left as it is.
    """
    run = RunDirectory(Path(config.run.dir))
    try:
        return run.read_summary() if run.ended(config) is None else None
    except (OSError, ValueError):
        return None  # The ranks say what is wrong with the directory or with the file.


def final_summary(run_dir: Path, outdated: dict[str, Any] | None) -> dict[str, Any] | None:
    """The summary of a run that has ended; None where there is no other than `outdated`.

    That all processes returned 0 is no proof that they trained: what ran may have been another program.
    """
    summary = RunDirectory(run_dir).read_summary()
    ended = summary is not None and summary["status"] in DONE and summary != outdated
    return summary if ended else None
