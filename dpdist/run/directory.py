"""The run directory: its files, who may read them, and whether they belong to this run."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.mechanism.keys import SECRET_BYTES, Secret
from dpdist.run.layout import DONE, RunPaths
from dpdist.run.progress import say
from dpdist.run.step_settings import step_settings


class RunDirectory(RunPaths):
    """A run's files, and what may be done with them."""

    def prepare(self) -> None:
        """Create the directory, or check that it holds a run. For process 0.

        Raises:
            InputError: it cannot be written, or holds something else.
        """
        self.require_ours()
        self.open_private()
        with self._writing():
            self.logs.mkdir(mode=0o700, exist_ok=True)

    def require_ours(self) -> None:
        """Check that the directory holds a run, or nothing yet; creates nothing.

        Raises:
            InputError: it holds something else, or cannot be read.
        """
        known = {"private", "checkpoints", "ledger.jsonl", "events.jsonl"}  # what a start that failed early leaves
        with self._writing():
            if self.root.is_dir() and not self.config.exists() and {p.name for p in self.root.iterdir()} - known:
                raise InputError("run.dir", str(self.root), "holds files but no run; name a new or empty directory.")
            if (self.root / "privacy.json").exists():
                raise InputError("run.dir", str(self.root), "holds an export; name a new or empty directory.")

    def open_private(self) -> None:
        """Create the directory and its private part, for its owner alone.

        Raises:
            InputError: it cannot be written.
        """
        with self._writing():
            self.private.mkdir(parents=True, exist_ok=True)
            self.private.chmod(0o700)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"writable")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                "run.dir", str(self.root), f"cannot be written ({error.strerror}); name another directory."
            ) from None

    def begin(self, config: Config) -> None:
        """Delete the last summary of a run that begins or resumes, which no longer holds, and write its config.

        In this order: a summary beside a config that it does not belong to would pass for the end of that.
        """
        self.summary.unlink(missing_ok=True)
        write_atomically(self.config, configfile.dump(config))

    def create_secret(self) -> bool:
        """Create the secret if there is none. For process 0.

        Returns:
            Whether the run had an earlier secret, which is lost, and no incarnation has begun since.
        """
        if self.secret.exists():
            return self.secret_lost.exists()
        lost = self.ledger.exists()
        if lost:  # first: a start that is killed now must not make the new secret pass for the old one
            write_atomically(self.secret_lost, "", mode=0o600)
        write_atomically(self.secret, Secret.fresh().reveal(), mode=0o600)
        return lost

    def begun(self, test_data: str) -> None:
        """Note what no later part of the run may change, and that what its steps draw from is its own. For process 0.

        Args:
            test_data: SHA-256 of what `dpdist.data.checks.fingerprint_of_what_stays` covers. Whoever reads it here can
                read the secret too, and with that the keyed tag of the same in the ledger.
        """
        write_atomically(self.test_data, test_data + "\n", mode=0o600)
        self.secret_lost.unlink(missing_ok=True)

    def settings(self) -> dict[str, Any]:
        """The settings in `config.yaml` that a step depends on; empty where it cannot be read. For process 0."""
        try:
            return step_settings(config_module.flatten(config_module.from_dict(configfile.read(self.config))))
        except InputError:
            return {}

    def read_secret(self) -> Secret:
        """The secret of the run, on any process.

        Raises:
            InputError: missing, malformed, or readable by others.
        """
        try:
            mode = stat.S_IMODE(self.secret.stat().st_mode)
            key = self.secret.read_bytes()
        except OSError as error:
            raise InputError(
                "run.dir",
                str(self.root),
                f"private/secret.key cannot be read ({error.strerror}); the run directory "
                "must be on a file system that all nodes share.",
            ) from None
        if mode & 0o077:
            raise InputError(
                "private/secret.key",
                oct(mode),
                "others may read it; run `chmod 600` on it, or start a new run "
                "if someone may have: who has it can subtract the noise.",
            )
        if len(key) != SECRET_BYTES:
            raise InputError(
                "private/secret.key", f"{len(key)} bytes", f"must hold {SECRET_BYTES}; bring back this file alone."
            )
        return Secret(key)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace `summary.json` atomically."""
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def ended(self, config: Config) -> dict[str, Any] | None:
        """The summary of a run that has nothing left to do under `config`; None for any other. For process 0."""
        summary = self.read_summary()
        if summary is None or summary["status"] not in DONE:
            return None
        try:
            before = config_module.from_dict(configfile.read(self.config))
        except InputError:
            return summary  # a broken file asks for nothing new
        same = step_settings(config_module.flatten(before)) == step_settings(config_module.flatten(config))
        return summary if same and before.checkpoint.resume_step == config.checkpoint.resume_step else None

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or None where the run has not ended yet, or where the file is not whole."""
        try:
            summary = json.loads(self.summary.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            summary = None
        if not isinstance(summary, dict) or "status" not in summary:
            say(f"dpdist: {self.summary} is not whole: going on as if there were none")
            return None
        return summary


def write_atomically(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file so that a crash leaves either the old content or the new, whole."""
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
