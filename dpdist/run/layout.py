"""The files of a run directory, by name; imports nothing but the standard library, so that `dpdist status` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: The statuses of a run that has nothing left to do.
DONE = ("finished", "budget_exhausted")


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run. All but `private` may be published."""

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
    def abandoned(self) -> Path:
        """Checkpoints that are damaged, or that a later incarnation has abandoned."""
        return self.root / "abandoned"

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
    def secret_lost(self) -> Path:
        """Empty; there from the loss of the secret until an incarnation with a new one has begun."""
        return self.private / "secret.lost"

    @property
    def test_data(self) -> Path:
        """The digest of the test records, and of whose the training records are: outlives the secret."""
        return self.private / "test_data.sha256"

    @property
    def diagnostics(self) -> Path:
        return self.private / "diagnostics.jsonl"

    @property
    def probe(self) -> Path:
        """Training loss and gradient norms of a few examples, step by step."""
        return self.private / "probe.jsonl"

    @property
    def stragglers(self) -> Path:
        return self.private / "stragglers.jsonl"

    @property
    def logs(self) -> Path:
        return self.private / "logs"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def goodput(self) -> Path:
        """How its node-hours were spent, by process 0's clock."""
        return self.private / "goodput.json"

    @property
    def ranks(self) -> Path:
        """Which rank ran on which node, and where the log is, of the newest start."""
        return self.private / "ranks.json"

    @property
    def compiled(self) -> Path:
        """Compiled programs, for the next start."""
        return self.private / "compiled"

    @property
    def profile(self) -> Path:
        return self.private / "profile"

    @property
    def jobs(self) -> Path:
        """Batch scripts and logs of the jobs that `dpdist submit` made."""
        return self.private / "slurm"

    @property
    def output(self) -> Path:
        """What the ranks of `--processes` have printed."""
        return self.logs / "output.log"
