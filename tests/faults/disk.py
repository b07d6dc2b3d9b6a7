"""A file system of its own for a run, that can be filled, frozen or broken.

It lives by a pipe to this process: whatever ends it, the file system is thawed and unmounted.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .network import held

#: Ext4 for freezing; what is written, is written to a file. Mounted until the pipe ends. `fsfreeze` fails if thawed.
_HOLD = """
trap '' INT TERM HUP
mount -o loop "$0" "$1" || exit 1
echo ready
cat >/dev/null
fsfreeze --unfreeze "$1" 2>/dev/null
umount --lazy "$1"
"""
_MEGABYTES = 48


class Disk:
    """A mounted file system."""

    def __init__(self, image: Path, root: Path) -> None:
        self._image, self.root = image, root
        self._filler = root / "filler"
        self._thawing: list[threading.Thread] = []

    def fill(self) -> None:
        """Use up every block."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            for size in (2**20, 4096, 512, 1):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(descriptor, b"\0" * size)
            os.fsync(descriptor)
        os.close(descriptor)

    def free(self) -> None:
        """Give the space back."""
        self._filler.unlink(missing_ok=True)

    def freeze(self, *, seconds: float, times: int = 1, pause: float = 0.3) -> None:
        """Let every write wait for so long, from now on; returns at once.

        Nothing can end a process that waits for a frozen file system, so thawing must not depend on any.
        """

        def turn() -> None:
            for _ in range(times):
                subprocess.run(["fsfreeze", "--unfreeze", self.root], capture_output=True)
                time.sleep(pause)
                subprocess.run(["fsfreeze", "--freeze", self.root], capture_output=True)
                time.sleep(seconds)
            subprocess.run(["fsfreeze", "--unfreeze", self.root], capture_output=True)

        subprocess.run(["fsfreeze", "--freeze", self.root], check=True)
        thread = threading.Thread(target=turn)
        thread.start()
        self._thawing.append(thread)

    def fail(self) -> None:
        """From now on every write is refused and what was not synchronised is lost, as where a disk dies."""
        subprocess.run(["mount", "-o", "remount,abort", self.root], check=True, capture_output=True)

    def repair(self) -> None:
        """What an administrator would do: unmount, check, mount."""
        subprocess.run(["umount", self.root], check=True)
        checked = subprocess.run(["fsck.ext4", "-f", "-y", self._image], capture_output=True, text=True)
        assert checked.returncode in (0, 1), checked.stdout
        subprocess.run(["mount", "-o", "loop", self._image, self.root], check=True)

    def settle(self) -> None:
        """Until nothing is frozen any more."""
        for thread in self._thawing:
            thread.join()


@contextlib.contextmanager
def own_disk() -> Iterator[Disk]:
    """A small, empty file system."""
    with tempfile.TemporaryDirectory(prefix="dpdist-disk-") as name:
        image, root = Path(name, "image"), Path(name, "root")
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(_MEGABYTES * 2**20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        with held(["sh", "-c", _HOLD, str(image), str(root)]):
            disk = Disk(image, root)
            try:
                yield disk
            finally:
                disk.settle()


def can_be_made() -> str | None:
    """Why no file system can be mounted here, or None."""
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    try:
        with own_disk():
            return None
    except (AssertionError, OSError, subprocess.CalledProcessError):
        return "this kernel or container lets nobody mount a file"
