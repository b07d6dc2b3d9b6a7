"""Processes that read examples: the same rows as threads give, errors as private as theirs, and none left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from jobs import children, wait_for

from dpdist.config import Data, from_dict
from dpdist.data import Dataset, open_dataset, read_rows
from dpdist.data.checks import fingerprints
from dpdist.data.readers import FIELD, ReadingError, read_in_processes
from dpdist.data.sources import BadRecordError
from dpdist.errors import InputError

MODULE = """
import os, subprocess, sys, time
import numpy as np

class Items:
    def __init__(self, size, odd):
        self.size, self.odd = size, odd
    def __len__(self):
        return self.size
    def __getitem__(self, index):
        if self.odd == "other":
            return {"image": np.full(5, os.getpid(), np.float64), "label": np.int64(0)}
        if index == 700 and self.odd == "shape":
            return {"image": np.zeros(4), "label": np.int64(0)}
        if index == 700 and self.odd == "raise":
            raise ValueError("record of Alice Example")
        if index == 700 and self.odd == "exit":
            os._exit(9)
        if index == 700 and self.odd == "sleep":
            time.sleep(600)
        if index == 700 and self.odd == "fork" and os.fork() == 0:
            time.sleep(15)
            os._exit(0)
        if index == 700 and self.odd == "fork":
            os._exit(9)
        if index == 700 and self.odd == "program":
            program = subprocess.Popen(["sleep", "600"])
            program.terminate()
            program.wait(20)
        if index == 700 and self.odd == "print":
            print("Alice Example", flush=True)
            sys.stderr.write("born 1980\\n")
        return {"image": np.full(5, index, np.float64), "label": np.int64(index % 3)}

def data(odd=None):
    return Items(1000, odd), Items(203, None)
"""
Opened = Callable[..., Dataset]


def section(source: str = "items:data", **options: str) -> Data:
    return from_dict(
        {
            "data": {"source": source, "options": options, "worker_processes": 2},
            "training": {"steps": 1},
            "privacy": {"enabled": False},
        }
    ).data


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Data as two processes read it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "items", raising=False)
    (tmp_path / "items.py").write_text(MODULE)
    with ExitStack() as cleanup:

        def enter(**options: str) -> Dataset:
            data = section(**options)
            dataset = open_dataset(data)
            digests = fingerprints(dataset.train, dataset.test)
            return cleanup.enter_context(read_in_processes(dataset, data, digests, tmp_path / "reader-0"))

        yield enter
        readers = started()
    assert readers
    assert not any(Path(f"/proc/{pid}").exists() for pid in readers)


def started() -> list[int]:
    """The reading processes of this one, which has other children too."""
    return [pid for pid in children(os.getpid()) if _runs(pid)]


def test_they_give_the_rows_of_the_source_in_the_order_asked_for(opened: Opened) -> None:
    read, plain = opened(), open_dataset(section())
    draw = np.random.default_rng(1)
    for count in (0, 1, 3, 64, 999):
        rows = draw.permutation(1000)[:count]
        expected = read_rows(plain.train, rows)
        for found in (read_rows(read.train, rows), read_rows(read.train, rows, ThreadPoolExecutor(2))):
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                assert found[name].dtype == values.dtype
                np.testing.assert_array_equal(found[name], values)
    assert read.test is not None
    assert (len(read.train), len(read.test)) == (1000, 203)
    np.testing.assert_array_equal(read_rows(read.test, np.array([202, 7]))["image"][:, 0], [202, 7])
    assert read.train[41]["image"].tolist() == [41] * 5


def test_two_threads_may_read_at_once(opened: Opened) -> None:
    read = opened()
    with ThreadPoolExecutor(4) as pool:
        for rows, found in pool.map(
            lambda rows: (rows, read_rows(read.train, rows)), [np.arange(n, n + 50) for n in range(40)]
        ):
            np.testing.assert_array_equal(found["image"][:, 0], rows)


@pytest.mark.parametrize("rows", [range(698, 713), range(699, 702)], ids=["of one process", "of several"])
def test_an_error_that_names_a_remedy_comes_back_with_its_private_cause(opened: Opened, rows: range) -> None:
    read = opened(odd="shape")
    with pytest.raises(InputError, match="return the same columns") as caught:
        read_rows(read.train, np.array(rows))
    assert isinstance(caught.value.__cause__, BadRecordError)
    assert re.search(r"example 700 is {'image': 'float\d\d\[4\]'", str(caught.value.__cause__))


def test_any_other_error_is_one_of_reading_that_says_where(opened: Opened) -> None:
    read = opened(odd="raise")
    with pytest.raises(ReadingError, match=r"items.py(.|\n)*ValueError: record of Alice Example"):
        read_rows(read.train, np.arange(690, 710))
    np.testing.assert_array_equal(read_rows(read.train, np.arange(50))["image"][:, 0], np.arange(50))


def test_a_program_that_the_source_starts_hears_signals(opened: Opened) -> None:
    assert len(read_rows(opened(odd="program").train, np.arange(690, 710))["label"]) == 20


@pytest.mark.parametrize("odd", ["exit", "fork"])  # in the second, a child of its holds the pipe open
def test_a_process_that_ends_is_an_error_and_nobody_waits(opened: Opened, odd: str) -> None:
    read, began = opened(odd=odd), time.monotonic()
    with pytest.raises(ReadingError, match="has ended with exit code 9"):
        read_rows(read.train, np.arange(690, 710))
    with pytest.raises(ReadingError, match="has ended before"):  # or it could be given rows that were asked for above
        read_rows(read.train, np.arange(10))
    assert time.monotonic() - began < 14


def test_what_they_print_goes_to_a_private_file(opened: Opened, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    read_rows(opened(odd="print").train, np.arange(690, 710))
    logs = sorted(tmp_path.glob("reader-0.*.log"))
    assert [path.name for path in logs] == ["reader-0.0.log", "reader-0.1.log"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in logs)
    assert "".join(path.read_text() for path in logs) == "Alice Example\nborn 1980\n"
    assert capfd.readouterr() == ("", "")


def test_data_that_is_another_in_each_process_is_refused(opened: Opened) -> None:
    opened()  # so that there is one to see the end of
    with pytest.raises(InputError, match="gives other examples in another process"):
        opened(odd="other")


def test_they_do_not_hear_the_signals_that_ask_a_job_to_leave(opened: Opened) -> None:
    read = opened()
    for pid in started():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    assert read_rows(read.train, np.array([5]))["image"][0, 0] == 5


def test_they_end_with_the_process_that_reads_though_one_be_stuck(tmp_path: Path) -> None:
    """It is a script that trains at once: no `if __name__ == "__main__"`, as other libraries' processes need it."""
    (tmp_path / "items.py").write_text(MODULE)
    (tmp_path / "script.py").write_text(
        "import os, signal, threading, numpy as np, pathlib\n"
        "from dpdist.config import Data\n"
        "from dpdist.data import open_dataset\n"
        "from dpdist.data.checks import fingerprints\n"
        "from dpdist.data.readers import read_in_processes\n"
        "data = Data(source='items:data', options={'odd': 'sleep'}, worker_processes=2)\n"
        "dataset = open_dataset(data)\n"
        "digests = fingerprints(dataset.train, dataset.test)\n"
        "with read_in_processes(dataset, data, digests, pathlib.Path('reader')) as read:\n"
        "    assert read.train[3]['image'][0] == 3\n"
        "    print(pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text())\n"
        "    threading.Timer(2, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "    read.train[700]\n"
    )
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pids = ended.stdout.split()
    assert len(pids) == 2
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").is_symlink() and _runs(pid) for pid in pids), 20)


def _runs(pid: int | str) -> bool:
    try:
        return "dpdist.data.serve" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(("source", "given", "says"), [("digits", None, "arrays"), ("python", ([], None), "object")])
def test_where_they_are_of_no_use_they_are_refused(
    tmp_path: Path, source: str, given: tuple[list[dict[str, int]], None] | None, says: str
) -> None:
    data = section(source)
    items = None if given is None else ([{"label": 1}, {"label": 2}], None)
    dataset = open_dataset(data, items)
    with pytest.raises(InputError, match=re.escape(f"{FIELD} = 2: ") + f".*{says}") as caught:  # noqa: SIM117
        with read_in_processes(dataset, data, {}, tmp_path / "reader"):
            pytest.fail("it was taken")
    assert caught.value.field == FIELD
    assert list(tmp_path.iterdir()) == []
