"""The secret in no log, whoever tries to write it there."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpdist.mechanism.keys import Secret
from dpdist.run.private_log import current, keep_out_of_logs, log_to, record_exception

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


def test_tracebacks_are_in_the_private_log_alone(tmp_path: Path) -> None:
    """Elsewhere, as on stderr, which schedulers collect, an error is shown by its kind."""
    elsewhere = io.StringIO()
    handler = logging.StreamHandler(elsewhere)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        for number in (1, 2):  # a second run in one Python has its own log
            log_to(tmp_path / f"{number}.log")
            keep_out_of_logs(Secret(bytes(32)))
            try:
                raise ValueError("record of Alice Example")
            except ValueError:
                logging.getLogger("a.library").exception("it failed", stack_info=True)
    finally:
        logging.getLogger().removeHandler(handler)
        close()
    assert elsewhere.getvalue() == "ERROR: it failed (ValueError; private/logs has the rest)\n" * 2
    for number in (1, 2):
        assert (tmp_path / f"{number}.log").read_text().count("ValueError: record of Alice Example") == 1


def test_a_secret_cannot_be_logged_as_an_object(log: Path) -> None:
    logging.getLogger().warning("%s %r", Secret(KEY), [Secret(KEY)])
    assert "hidden" in log.read_text()
