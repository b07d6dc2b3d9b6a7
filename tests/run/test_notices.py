"""`run.on_event`: what a command or a webhook is told, and that neither can hold up or end a run."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpdist.run import notices
from dpdist.run.events import event_of

FAILED = event_of("failed", step=3, cause="OSError (No space left on device)")


@pytest.fixture(autouse=True)
def _less_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "BOUND", 1.0)


class Hook(BaseHTTPRequestHandler):
    """Notes what is posted; under /slow it never answers."""

    def do_POST(self) -> None:
        if self.path == "/slow":
            time.sleep(30)
        self.server.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        self.send_response(404 if self.path == "/gone" else 200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    server = HTTPServer(("127.0.0.1", 0), Hook)
    server.posted = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    threading.Thread(target=server.shutdown, daemon=True).start()


def call(tmp_path: Path, on_event: str | list[str]) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    notices.notify(on_event, FAILED, tmp_path / "digits", tmp_path / "on_event.log")
    return time.monotonic() - began


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (event_of("finished", step=8, status="finished"), True),
        (FAILED, True),
        (event_of("preempted", step=4, saved=True), False),
        (event_of("start", step=0, steps=8, nodes=1, processes=1), False),
        *(
            (event_of("resume", step=0, steps=8, nodes=1, processes=1, restarts=number, after="failed"), number == 3)
            for number in range(1, 6)
        ),
    ],
)
def test_occasions_are_the_end_a_failure_and_the_third_restart(event: dict[str, Any], expected: bool) -> None:
    assert notices.is_occasion(event) is expected


def test_a_command_reads_the_event_and_runs_without_a_shell(tmp_path: Path) -> None:
    code = "import os, sys; a = sys.stdin.read(); print(a); print(os.environ['DPDIST_EVENT'] == a, sys.argv[1:])"
    call(tmp_path, [*python(code), "$(touch shell)", "*"])
    told, rest = (tmp_path / "on_event.log").read_text().splitlines()
    assert json.loads(told) == FAILED | {
        "run": "digits",
        "text": "digits failed at step 3: OSError (No space left on device)",
    }
    assert rest == "True ['$(touch shell)', '*']"
    assert (tmp_path / "on_event.log").stat().st_mode & 0o077 == 0


def test_a_command_that_hangs_is_ended_with_what_it_has_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import os, subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    assert call(tmp_path, python(code)) < 10
    child = int((tmp_path / "on_event.log").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":  # nobody collects it here
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{child}").exists()
    assert "run.on_event failed on failed with TimeoutExpired" in caplog.text


def test_a_grandchild_that_keeps_the_output_open_holds_nothing_up(tmp_path: Path) -> None:
    assert call(tmp_path, python("import subprocess; subprocess.Popen(['sleep', '30'], start_new_session=True)")) < 1


@pytest.mark.parametrize("on_event", [["/does/not/exist"], python("raise SystemExit(3)"), "http://127.0.0.1:9/s3cret"])
def test_a_failure_is_a_warning_without_the_address(
    tmp_path: Path, on_event: str | list[str], caplog: pytest.LogCaptureFixture
) -> None:
    call(tmp_path, on_event)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "run.on_event" in record.message
    assert "s3cret" not in caplog.text


def test_a_webhook_is_posted_the_event(tmp_path: Path, server: Any, caplog: pytest.LogCaptureFixture) -> None:
    base = f"http://127.0.0.1:{server.server_port}"
    call(tmp_path, base + "/hook")
    (told,) = server.posted
    assert told["text"] == "digits failed at step 3: OSError (No space left on device)"
    assert caplog.text == ""
    call(tmp_path, base + "/gone")
    assert "HTTPError" in caplog.text


def test_a_webhook_that_does_not_answer_is_left(tmp_path: Path, server: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert call(tmp_path, f"http://127.0.0.1:{server.server_port}/slow") < 10
    assert "TimeoutError" in caplog.text


def test_no_file_of_the_command_is_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    call(tmp_path, python("pass"))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before  # a finalizer may have closed one of another test
