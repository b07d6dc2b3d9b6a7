"""Searches that train nothing, and searches whose number of trials a test knows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from jobs import CONFIG, Jobs, Run, Running, lines

from dpdist import config as config_module
from dpdist.joint.selection import Law
from dpdist.mechanism.keys import Secret
from dpdist.run.directory import write_atomically
from dpdist_launch.tune.metric import Metric
from dpdist_launch.tune.search import Search, open_directory
from dpdist_launch.tune.space import Space, uniform
from dpdist_launch.tune.terms import Question

AXES: dict[str, Any] = {"optimizer.learning_rate": {"log_uniform": [0.01, 1.0]}, "privacy.clip_norm": [1.0, 2.0]}

#: Of no data at all.
DATA = {"training data": b"a", "test data": b"b"}


def question(axes: dict[str, Any] | None = None, **changes: Any) -> Question:
    tree = {section: dict(values) for section, values in CONFIG.items()} | {"data": {}, "model": {}}
    tree["privacy"] = {"target_epsilon": 2.0, "delta": 1e-4} | changes.pop("privacy", {})
    asked = {"law": Law(4.0, 1.0), "metric": Metric("accuracy", highest=True), "dataset_size": 1000}
    asked |= {"fingerprints": DATA} | changes
    return Question(config=config_module.from_dict(tree), space=Space(AXES if axes is None else axes), **asked)


def begin(root: Path, asked: Question | None = None) -> Search:
    open_directory(root)
    return Search(root, question() if asked is None else asked)


def keep_secret(private: Path, *, law: Law, number: int) -> None:
    """Leave a secret of which follow `number` trials, as a search leaves that was killed before it had begun."""
    for seed in itertools.count():
        secret = Secret.from_insecure_seed(seed)
        if law.number(uniform(secret, "number of trials")) == number:
            write_atomically(private / "secret.key", secret.reveal(), mode=0o600)
            return


#: Public: what any search of these tests draws from.
SPACE = "optimizer.learning_rate: {log_uniform: [0.05, 1.0]}\nprivacy.clip_norm: [0.5, 1.0]\n"
#: `small`, in a search that meets epsilon 2.
SETTINGS = ("privacy.insecure_seed=null", "privacy.noise_multiplier=null", "data.prefetch=1")


def tune(jobs: Jobs, root: Path, *options: str, **environ: str) -> Running:
    space = jobs.root / "space.yaml"
    space.write_text(SPACE)
    asked = ("--space", str(space), "--trials", "2", "--target-epsilon", "2", "--run-dir", str(root))
    return jobs.command("tune", str(jobs.config), *SETTINGS, *asked, *options, **environ)


def begun(root: Path) -> list[Run]:
    """The trials that have begun, in this order."""
    noted = [record for record in lines(root / "private/trials.jsonl") if record["record"] == "begun"]
    return [Run(root / "private/trials" / record["trial"]) for record in noted]
