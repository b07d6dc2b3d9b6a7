"""`run.on_event`: tell a command or a webhook that a run has ended, failed, or was started again for the third time.

Only process 0 calls it, after the event is in `events.jsonl`. It gets at most `BOUND` seconds, and what goes wrong with
it is a warning in the private log: a run never waits longer, nor fails, for a message about it. A preemption is no
occasion: the time until SLURM kills belongs to the save.

What is told is the event, which is public (`dpdist.run.events`), the name of the run directory, and a sentence in
`text`, which is what chat programs show of a webhook.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

#: Seconds that a command or a webhook may take.
BOUND = 10.0
#: The restart that is worth a message: the first two may be preemptions, from then on somebody should look.
RESTART = 3


def is_occasion(event: Mapping[str, Any]) -> bool:
    """Whether `run.on_event` is called for this event."""
    return event["event"] in ("finished", "failed") or event.get("restarts") == RESTART


def notify(on_event: str | Sequence[str], event: Mapping[str, Any], root: Path, log: Path) -> None:
    """Tell a webhook (a URL) or a command (its words) about `event`; returns within `BOUND` seconds and raises nothing.

    Args:
        log: where the command's own output goes: under `private/`, as it may say anything.
    """
    message = json.dumps({**event, "run": root.name, "text": sentence(event, root.name)})
    try:
        if isinstance(on_event, str):
            _post(on_event, message)
        else:
            _call(on_event, message, root, log)
    except Exception as error:
        # Not what the error says: a URL may hold a password.
        logger.warning("run.on_event failed on %s with %s", event["event"], type(error).__name__)


def sentence(event: Mapping[str, Any], name: str) -> str:
    """The event for people: `digits failed at step 30: OSError (No space left on device)`."""
    if event["event"] == "failed":
        return f"{name} failed at step {event['step']}: {event['cause']}"
    if event["event"] == "resume":
        return (
            f"{name} was started again for the {event['restarts']}rd time, at step {event['step']} of {event['steps']}"
        )
    return f"{name} ended at step {event['step']}: {event['status']}"


def _call(words: Sequence[str], message: str, root: Path, log: Path) -> None:
    """Run a command without a shell, with the message as its standard input and as DPDIST_EVENT.

    It gets a session of its own: a signal to our process group does not reach it, and we can end it with all that it
    started. Its output goes to a file, not to a pipe, which a grandchild could hold open for ever.
    """
    environ = {**os.environ, "DPDIST_EVENT": message, "DPDIST_RUN_DIR": str(root)}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            list(words),
            env=environ,
            stdin=subprocess.PIPE,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    try:
        # The message fits into the pipe's buffer, so this does not wait for a command that does not read.
        process.communicate(message.encode(), timeout=BOUND)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # Not waited for: in a file system that hangs, a process outlives SIGKILL.
        raise
    if process.returncode:
        logger.warning("run.on_event: %s returned %d; %s has its output", words[0], process.returncode, log)


def _post(url: str, message: str) -> None:
    """Post the message in a thread of its own: the look-up of a name has no time limit that could be set."""
    failed: list[Exception] = []

    def post() -> None:
        request = urllib.request.Request(url, message.encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=BOUND):
                pass
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=post, name="on_event", daemon=True)
    thread.start()
    thread.join(BOUND)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise TimeoutError
