"""The secret in no log, whoever tries to write it there."""

from __future__ import annotations

import base64
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpdist.mechanism.keys import Secret
from dpdist.run.private_log import GuardedStderr, current, keep_out_of_logs, log_to, public_stderr, record_exception

KEY = bytes(range(200, 232))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    log_to(tmp_path / "rank-0.log")
    yield tmp_path / "rank-0.log"
    close()


def close() -> None:
    for handler in current():
        logging.getLogger().removeHandler(handler)
        handler.stream.close()


def spellings(key: bytes) -> list[str]:
    return [
        repr(key),
        str(list(key)),
        key.hex(),
        key.hex().upper(),
        base64.b64encode(key).decode(),
        base64.urlsafe_b64encode(key).decode(),
        key.decode("latin-1"),
    ]


@pytest.mark.parametrize("number", range(7))
def test_no_spelling_of_the_secret_reaches_the_log(log: Path, number: int) -> None:
    text = spellings(KEY)[number]
    logging.getLogger("a.library").warning("before: %s", text)
    assert text in log.read_text()  # the test sees what it looks for
    log.write_text("")
    for key in (bytes(32), KEY):  # a second run in one Python has another
        keep_out_of_logs(Secret(key))
    logging.getLogger("a.library").warning("variables: %s, the end", text)
    try:
        raise ValueError(f"state was {text}")
    except ValueError:
        logging.getLogger("a.library").exception("it failed")
        record_exception(f"Traceback of {text}")
    written = log.read_text()
    assert not any(form in written for form in spellings(KEY))
    assert written.count("(secret)") == 3
    assert "the end" in written
    assert "Traceback of" in written


def test_tracebacks_and_what_others_say_are_in_the_private_log_alone(tmp_path: Path) -> None:
    """Elsewhere, as on stderr, which schedulers collect, our own lines are, and an error is shown by its kind."""
    elsewhere = io.StringIO()
    handlers = {logging.getLogger(): logging.StreamHandler(elsewhere)}
    handlers[logging.getLogger("a.library")] = logging.StreamHandler(elsewhere)
    for logger, handler in handlers.items():
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
    try:
        for number in (1, 2):  # a second run in one Python has its own log
            log_to(tmp_path / f"{number}.log")
            keep_out_of_logs(Secret(bytes(32)))
            for name in ("a.library", "dpdistant", "dpdist", "dpdist_launch.local", "__main__", None):
                try:
                    raise ValueError("record of Alice Example")
                except ValueError:
                    logging.getLogger(name).exception("%s failed", name, stack_info=True)
    finally:
        for logger, handler in handlers.items():
            logger.removeHandler(handler)
        close()
    shown = ("dpdist", "dpdist_launch.local", "__main__")
    lines = "".join(f"ERROR: {name} failed (ValueError; private/logs has the rest)\n" for name in shown)
    assert elsewhere.getvalue() == lines * 2
    for number in (1, 2):
        assert (tmp_path / f"{number}.log").read_text().count("ValueError: record of Alice Example") == 6


def test_a_guarded_stderr_holds_the_secret_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = io.StringIO()
    monkeypatch.setattr("sys.stderr", GuardedStderr(public))
    print("before", file=sys.stderr)
    log_to(tmp_path / "0.log")
    try:
        keep_out_of_logs(Secret(KEY))
        print("part", end=" ", file=sys.stderr)
        print(f"and\n{KEY.hex()} after", file=sys.stderr)
        print("for everyone", file=public_stderr())
    finally:
        close()
    assert public.getvalue() == "before\nfor everyone\n"
    written = (tmp_path / "0.log").read_text()
    assert "stderr: part and\n" in written
    assert "stderr: (secret) after\n" in written


def test_a_log_that_cannot_be_written_is_not_shown_instead(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(current()[0].stream, "write", full)
    monkeypatch.setattr("sys.stderr", GuardedStderr(sys.stderr))
    logging.getLogger("a.library").warning("record of Alice Example")
    print("record of Alice Example", file=sys.stderr)
    monkeypatch.undo()
    assert "Alice" not in capsys.readouterr().err


def test_a_secret_cannot_be_logged_as_an_object(log: Path) -> None:
    logging.getLogger().warning("%s %r", Secret(KEY), [Secret(KEY)])
    assert "hidden" in log.read_text()
