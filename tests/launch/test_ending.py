"""The end of a command without Python's own: nothing that was begun is left out."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

ENDS = """
from dpdist_launch.ending import end_at_once
import atexit, gc, gzip, sys, threading, time

class AtTeardown:
    def __del__(self):
        print("taken apart")

kept = AtTeardown()
left_open = open(sys.argv[1], "w")
left_open.write("written")
compressed = gzip.open(sys.argv[1] + ".gz", "wt")
compressed.write("to its end")
if sys.argv[2] != "none":
    gc.freeze()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
if sys.argv[2] != "none":
    end_at_once(int(sys.argv[2]))
sys.exit(3)
"""


def ended(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", ENDS, str(path), code], capture_output=True, text=True, check=False)


def test_threads_handlers_and_open_files_come_first(tmp_path: Path) -> None:
    done = ended(tmp_path / "file", "75")
    assert (done.returncode, done.stdout.split(), done.stderr) == (75, ["thread", "registered"], "")
    assert (tmp_path / "file").read_text() == "written"
    assert gzip.decompress((tmp_path / "file.gz").read_bytes()) == b"to its end"


def test_a_program_that_does_not_ask_ends_as_ever(tmp_path: Path) -> None:
    done = ended(tmp_path / "file", "none")
    assert (done.returncode, done.stdout.split()) == (3, ["thread", "registered", "taken", "apart"])
