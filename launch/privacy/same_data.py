"""Whether runs were trained on the same records, by opening the data and comparing each run's keyed tag of it.

A tag is keyed by the run's own secret, so two tags cannot be compared with each other: only with the data, by whoever
has both the data and the secrets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config import file as configfile
from dpdist.data import fingerprint, open_dataset
from dpdist.errors import InputError
from dpdist.mechanism.keys import Secret
from dpdist.mechanism.ledger import Ledger
from dpdist.run.directory import RunDirectory


def compared(paths: Sequence[Path]) -> str:
    """What the tags say, in a sentence.

    Raises:
        InputError: no run directory is among `paths`, or its data cannot be opened.
    """
    runs = [run for path in paths for run in _runs(path)]
    if not runs:
        raise InputError("--check-data", None, "needs a run directory: exports have no tag and name no path.")
    print_of_data = fingerprint(open_dataset(_config(runs[0])).train)
    same, other, unknown = [], [], [str(path) for path in paths if not _runs(path)]
    for run in runs:
        plan = Ledger(run.ledger).plan
        try:
            secret = _secret(run)
        except InputError:
            secret = None
        if secret is None or plan is None:
            unknown.append(str(run.root))
        elif secret.tag(b"data" + print_of_data) == plan.data:
            same.append(str(run.root))
        else:
            other.append(str(run.root))
    told = [f"the training data that {runs[0].root} names now is, by keyed tag, that of {', '.join(same) or 'no run'}"]
    told += [f"it is NOT that of {', '.join(other)}"] if other else []
    told += [f"of {', '.join(unknown)} it is taken on your word"] if unknown else []
    return "; ".join(told)


def _runs(path: Path) -> list[RunDirectory]:
    if (path / "ledger.jsonl").exists():
        return [RunDirectory(path)]
    below = sorted(path.iterdir()) if (path / "sweep.json").exists() else []
    return [RunDirectory(point) for point in below if (point / "ledger.jsonl").exists()]


def _config(run: RunDirectory) -> Config:
    return config_module.from_dict(configfile.read(run.config))


def _secret(run: RunDirectory) -> Secret:
    seed = _config(run).privacy.insecure_seed
    return run.read_secret() if seed is None else Secret.from_insecure_seed(seed)
