"""The run directory: what lies where, who may read it, and whether it belongs to this run."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdist import config as config_module
from dpdist import configfile
from dpdist.config import Config
from dpdist.errors import InputError
from dpdist.mechanism.keys import SECRET_BYTES, Secret

#: What may change between the parts of one run: nothing here alters a sample, a draw or an update beyond the
#: order of summation.
MAY_CHANGE = (
    "run.",
    "checkpoint.",
    "cluster.",
    "data.workers",
    "data.prefetch",
    "data.path",
    "sampling.assignment",
    "training.physical_batch_size",
    "training.evaluate_every",
    "training.evaluation_batch_size",
    "training.record_digests",
)

#: What the summary of a run that has nothing left to do says as its status.
DONE = ("finished", "budget_exhausted")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run; all but `private` may be shown."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def private(self) -> Path:
        return self.root / "private"

    @property
    def secret(self) -> Path:
        return self.private / "secret.key"

    @property
    def diagnostics(self) -> Path:
        return self.private / "diagnostics.jsonl"

    @property
    def logs(self) -> Path:
        return self.private / "logs"

    def prepare(self, config: Config) -> None:
        """Make the directory for a new run, or check that the run in it is this one. For process 0.

        Raises:
            InputError: it cannot be written, holds something else, or holds a run with other settings.
        """
        if self.root.is_dir() and not self.config.exists() and {p.name for p in self.root.iterdir()} - {"private"}:
            raise InputError("run.dir", str(self.root), "holds files but no run; name a new or empty directory.")
        try:
            self.private.mkdir(parents=True, exist_ok=True)
            self.private.chmod(0o700)
            self.logs.mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"writable")
        except OSError as error:
            raise InputError(
                "run.dir", str(self.root), f"cannot be written ({error.strerror}); name another directory."
            ) from None
        if self.ledger.exists() and self.config.exists():  # until its plan is written, no run has begun
            self.require_unchanged(config, configfile.read(self.config))

    def begin(self, config: Config) -> None:
        """Write the config of a run that is about to begin or to go on; its last summary is no longer true."""
        write_atomically(self.config, configfile.dump(config))
        self.summary.unlink(missing_ok=True)

    def require_unchanged(self, config: Config, begun_with: dict[str, Any]) -> None:
        """Check that `config` is what this run began with, but for `MAY_CHANGE`.

        Raises:
            InputError: it names the first field that differs.
        """
        saved = config_module.flatten(config_module.from_dict(begun_with))
        for name, value in config_module.flatten(config).items():
            if saved[name] != value and not name.startswith(MAY_CHANGE):
                raise InputError(
                    name,
                    value,
                    f"the run in {self.root} has {saved[name]!r}; resume it with that, or name "
                    "a new run.dir: a changed run must not reuse its noise.",
                )

    def create_secret(self) -> None:
        """Make the secret of a new run. For process 0.

        Raises:
            InputError: the run has begun, but its secret is gone.
        """
        if self.secret.exists():
            return
        if self.ledger.exists():
            raise InputError(
                "private/secret.key",
                None,
                f"is gone from the run in {self.root}; restore the file, or start "
                "a new run: another secret would sample and draw differently.",
            )
        write_atomically(self.secret, Secret.fresh().reveal(), mode=0o600)

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
                "private/secret.key", f"{len(key)} bytes", f"must hold {SECRET_BYTES}; restore it from a backup."
            )
        return Secret(key)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace `summary.json` as a whole."""
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or None where the run has not ended yet."""
        return json.loads(self.summary.read_text()) if self.summary.exists() else None


def write_atomically(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file so that a crash leaves either the old one or the new one, whole."""
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
