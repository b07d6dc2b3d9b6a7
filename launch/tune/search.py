"""A search in its directory: what is fixed before the first trial, what is private, and what a kill leaves.

    search.json        what was asked for and what it costs; public, written before the first trial
    summary.json       the end: the epsilon of the search and the best trial; public
    best/              the export of the best trial; public
    private/           0700. Whoever reads it, or is told of it, is not covered by the bound of the search
        secret.key     the number of trials and all candidates follow from it, so that no resume draws them again
        trials.jsonl   the number of trials, keyed tags of the data; which trials have begun, with what secret, and how
                       each attempt has ended
        configs/, trials/, output/

A trial's name says nothing of its place. What a trial has begun with is written down before it runs, and its ledger as
soon as a launcher sees it: where its secret or that ledger is gone afterwards, it counts as failed and is never run
anew, or a result could be thrown away and drawn again until it pleases. One thing is not noticed: a ledger that a job
of SLURM made while no launcher lived, and that somebody deleted, with the checkpoints and not with the secret, before
the next one came. Whoever does that has read or changed what is private, and has no bound from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.mechanism.composition import Phase
from dpdist.mechanism.keys import SECRET_BYTES, Secret
from dpdist.mechanism.ledger import Ledger, LedgerError, file_identity
from dpdist.run.directory import RunDirectory, write_atomically
from dpdist.run.fingerprints import data_tags
from dpdist.run.metrics import Stream
from dpdist_launch.tune.space import uniform
from dpdist_launch.tune.terms import Question, Terms, candidate, require_space, settle

FORMAT = 1
#: So often a trial is started again after it has failed, from where it was; then it counts as failed.
ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: a candidate, and the run directory of its own."""

    name: str
    settings: dict[str, Any]
    #: None where the candidate's settings do not fit together: it counts as failed.
    config: Config | None
    #: What the first incarnation of its run must be.
    plan: Phase | None
    run: RunDirectory

    def ended(self) -> dict[str, Any] | None:
        """The summary of its run, where that has nothing left to do."""
        return None if self.config is None else self.run.ended(self.config)


def open_directory(root: Path) -> Path:
    """Make the directory of a search, or find it; returns its private part.

    Raises:
        InputError: it holds something else, or cannot be written.
    """
    if root.is_dir() and not (root / "search.json").exists() and {path.name for path in root.iterdir()} - {"private"}:
        raise InputError("--run-dir", str(root), "holds something else; name a new or empty directory.")
    directory = RunDirectory(root)
    directory.open_private()
    return directory.private


class Search:
    """A search that has begun, in the hands of its one launcher.

    Args:
        root: of `open_directory`.
        question: what is asked for; the same whenever the search goes on.

    Raises:
        InputError: the directory holds another search, or not all of this one.
    """

    def __init__(self, root: Path, question: Question) -> None:
        self.root, self.question = root, question
        self._directory = RunDirectory(root)
        self.private = self._directory.private
        self.description, self.summary, self.best = root / "search.json", root / "summary.json", root / "best"
        self._log = self.private / "trials.jsonl"
        if self.description.exists():
            self.terms = self._go_on()
        else:
            self.terms = self._begin()
        self.number = self._secret_number()
        self._records = _read_log(self._log)
        self._require_original()

    def _begin(self) -> Terms:
        """Fix everything; `search.json` is written last, and says that the rest is there."""
        terms = settle(self.question)
        require_space(self.question, lambda settings: candidate(self.question, terms, settings))
        self._directory.create_secret()
        record = {"record": "number", "number": self._secret_number()} | file_identity(self._directory.secret)
        record["data"] = data_tags(self._secret, self.question.fingerprints)
        write_atomically(self._log, json.dumps(record) + "\n", mode=0o600)
        whole = {"format": FORMAT} | self.question.to_record() | {"terms": terms.to_record()}
        write_atomically(self.description, json.dumps(whole, indent=2) + "\n")
        return terms

    def _go_on(self) -> Terms:
        try:
            told = json.loads(self.description.read_text())
            terms, form = Terms.from_record(told.pop("terms")), told.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise InputError("search.json", str(self.description), "is not whole; name a new --run-dir.") from None
        asked = json.loads(json.dumps(self.question.to_record()))
        for name in sorted(told.keys() | asked.keys()):
            if form != FORMAT or told.get(name) != asked.get(name):
                what = _difference(told.get(name), asked.get(name))
                raise InputError(
                    "--run-dir",
                    str(self.root),
                    f"holds a search of which {name} is another ({what}): what it costs and how it chooses were fixed "
                    "before its first trial. Give the same again, or name a new --run-dir: both searches compose then.",
                )
        for path in (self._directory.secret, self._log):
            if not path.exists():
                remedy = (
                    "is gone, and with it the number of trials, which must not be drawn again; bring it back, or name "
                    "a new --run-dir: what was begun here stays spent."
                )
                raise InputError("--run-dir", str(path), remedy)
        return terms

    def _require_original(self) -> None:
        """A copy would release a second result of the same draw, and the two together have no bound of one search.

        Nor has one search over several datasets.
        """
        told, now = self._records[0], file_identity(self._directory.secret)
        if any(None not in (told[name], now[name]) and told[name] != now[name] for name in now):
            remedy = "is a copy of a search, or was restored: go on with the original, or name a new --run-dir."
            raise InputError("--run-dir", str(self.root), remedy)
        tags = data_tags(self._secret, self.question.fingerprints)
        if changed := [part for part in tags if told.get("data", {}).get(part) != tags[part]]:
            remedy = (
                f"the {changed[0]} are not those that the search began with, and the trials of one search are all of "
                "one dataset: bring them back, or name a new --run-dir; what was begun here stays spent."
            )
            raise InputError("data.source", self.question.config.data.source, remedy)

    def _secret_number(self) -> int:
        return self.question.law.number(uniform(self._secret, "number of trials"))

    @cached_property
    def _secret(self) -> Secret:
        return self._directory.read_secret()

    @cached_property
    def trials(self) -> list[Trial]:
        """All trials of the search, whatever has become of them."""
        return [self._trial(number) for number in range(self.number)]

    def _trial(self, number: int) -> Trial:
        settings = self.question.space.draw(self._secret, number)
        name = "trial-" + self._secret.derive("trial", step=number, size=6).hex()
        run = RunDirectory(self.private.absolute() / "trials" / name)
        try:
            config, plan = candidate(self.question, self.terms, settings)
        except InputError:
            return Trial(name=name, settings=settings, config=None, plan=None, run=run)
        tree = config_module.to_dict(config)
        tree["run"]["dir"] = str(run.root)
        return Trial(name=name, settings=settings, config=config_module.from_dict(tree), plan=plan, run=run)

    def left(self) -> list[Trial]:
        """The trials that have something left to do."""
        return [trial for trial in self.trials if not self.over(trial)]

    def over(self, trial: Trial) -> bool:
        """Whether the trial has ended, or has failed for good."""
        return trial.config is None or self._lost(trial) or self._failures(trial) >= ATTEMPTS or _ended(trial)

    def failed(self, trial: Trial) -> bool:
        """Whether the trial counts as the worst, whatever its files say."""
        return trial.config is None or self._lost(trial) or not _ended(trial)

    def begin(self, trial: Trial) -> Path:
        """Note that the trial begins, unless that is noted; returns its config file."""
        if trial.config is None:
            raise ValueError(f"{trial.name} cannot be run")
        if not self._noted("begun", trial):
            trial.run.open_private()
            trial.run.create_secret()
            self._note("begun", trial, settings=trial.settings, secret=self._commitment(trial))
        file = self.private / "configs" / f"{trial.name}.yaml"
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomically(file, configfile.dump(trial.config), mode=0o600)
        return file

    def watch(self, trial: Trial) -> None:
        """Note the trial's ledger once there is one: from then on the trial is lost with it."""
        if not self._noted("ledger", trial) and (nonce := _first_nonce(trial)) is not None:
            self._note("ledger", trial, nonce=nonce)

    def note_failure(self, trial: Trial, how: str) -> None:
        """An attempt at the trial has failed."""
        self._note("failed", trial, how=how)

    def _lost(self, trial: Trial) -> bool:
        """Whether what the trial began with is not what is there."""
        begun, ledger = self._noted("begun", trial), self._noted("ledger", trial)
        if not begun:
            return False
        if self._commitment(trial) != begun[0]["secret"]:
            return True
        return bool(ledger) and _first_nonce(trial) != ledger[0]["nonce"]

    def _commitment(self, trial: Trial) -> str:
        """A tag of the trial's secret; empty where that is gone."""
        try:
            key = trial.run.secret.read_bytes()
        except OSError:
            return ""
        return self._secret.tag(key) if len(key) == SECRET_BYTES else ""

    def _failures(self, trial: Trial) -> int:
        return len(self._noted("failed", trial))

    def _noted(self, kind: str, trial: Trial) -> list[dict[str, Any]]:
        return [record for record in self._records if record["record"] == kind and record.get("trial") == trial.name]

    def _note(self, kind: str, trial: Trial, **more: Any) -> None:
        record = {"record": kind, "trial": trial.name, **more}
        stream = Stream(self._log, mode=0o600)
        try:
            stream.write(record)
            stream.synchronise()
        finally:
            stream.close()
        self._records.append(record)


def _ended(trial: Trial) -> bool:
    return trial.ended() is not None


def _first_nonce(trial: Trial) -> str | None:
    """Of the run's first incarnation; None where there is no ledger, or none that can be read."""
    try:
        ledger = Ledger(trial.run.ledger)
    except (LedgerError, OSError):
        return None
    return ledger.plans[0].nonce if ledger.plans else None


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines; one that a kill has torn was of nothing that has happened yet."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _difference(told: Any, asked: Any) -> str:
    """In words, what differs between two records."""
    if isinstance(told, dict) and isinstance(asked, dict):
        names = sorted(name for name in told.keys() | asked.keys() if told.get(name) != asked.get(name))
        return ", ".join(f"{name}: {told.get(name)} -> {asked.get(name)}" for name in names[:3])
    return f"{told} -> {asked}"
