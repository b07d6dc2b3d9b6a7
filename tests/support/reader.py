"""Somebody who types what a page shows, in a folder of their own."""

from __future__ import annotations

import gzip
import os
import re
import shlex
import struct
import subprocess
from pathlib import Path

import numpy as np
from jobs import Jobs
from pages import ROOT, Shown, require_printed

#: Compiling is most of what a run of seconds costs.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def write_fashion(folder: Path, train: int) -> None:
    """Files like those of Fashion-MNIST, with so many training images and a sixth as many others; all are black."""
    folder.mkdir()
    for part, count in (("train", train), ("t10k", train // 6)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", np.zeros((count, 28, 28), np.uint8)), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            packed = gzip.compress(header + array.tobytes(), compresslevel=1)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(packed)


class Reader:
    """`dpdist` runs in forks of one process; all else in bash."""

    def __init__(self, jobs: Jobs, root: Path) -> None:
        self.jobs, self.root, self.code = jobs, root, 0
        (root / "configs").symlink_to(ROOT / "configs")

    def follow(self, shown: Shown, *more: str, numbers: bool = True, ok: bool = True, **environ: str) -> str:
        """Type a command of a page, with words of our own behind it; what the page shows below it is printed."""
        printed = self.type(shown.text, *more, **environ)
        assert not ok or self.code == 0, f"{shown.text}: {printed}"
        require_printed(shown.output, printed.replace(str(self.root), "/shared"), numbers=numbers)
        return printed

    def type(self, line: str, *more: str, **environ: str) -> str:
        """What a line prints; its exit code is in `code` then, as `$?` of the next one."""
        command, pipe, rest = line.partition(" | ")
        words = shlex.split(command, comments=True)
        if words[0] != "dpdist":
            # Of a terminal, `ls` writes columns.
            script = f"(exit {self.code}); {re.sub('^ls ', 'ls -C ', line)}"
            self.code, printed = self._bash(script, "", environ)
            return printed
        self.code, printed = self._dpdist([*words[1:], *more], environ)
        if pipe:
            self.code, printed = self._bash(rest, printed, environ)
        return printed

    def python(self, *code: str) -> str:
        """What a program prints, in a fork."""
        script = self.root / "script.py"
        script.write_text("\n".join(code))
        return self.jobs.call("script", path=str(script))

    def _dpdist(self, words: list[str], environ: dict[str, str]) -> tuple[int, str]:
        """Of `--processes`, two ranks are enough to see it run."""
        identities: list[dict[str, str]] = [{}]
        if "--processes" in words and words[0] == "train":
            at = words.index("--processes")
            words, identities = words[:at] + words[at + 2 :], self.jobs.identities(2)
        all_of_them = [QUICK | environ | identity for identity in identities]
        started = [self.jobs.command(*words, cwd=self.root, **each) for each in all_of_them]
        ended = [each.wait() for each in started]
        labels = [f"[{rank}] " if len(ended) > 1 else "" for rank in range(len(ended))]
        lines = [
            label + line
            for label, each in zip(labels, ended, strict=True)
            for line in (each.out + each.err).splitlines()
        ]
        return max(each.code for each in ended), "\n".join(lines) + "\n"

    def _bash(self, script: str, given: str, environ: dict[str, str]) -> tuple[int, str]:
        home = {"HOME": str(self.root / "home"), "LC_ALL": "C"}
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.root,
            env=os.environ | home | environ,
            input=given,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr
