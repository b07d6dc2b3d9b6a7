"""All processes of a job meet at the coordinator's port before JAX does, so that a missing one can be named.

JAX's service tells nobody who has come: where a rank is missing, the others are silent until the time is up, and then
end in C++ with a stack, naming whoever spoke first. Here every rank sends its number to rank 0 and keeps the connection
open until rank 0 answers: `come`, and all go on to `jax.distributed` at once; or the names of the missing, which all
raise alike. JAX's service then takes the same port, so no firewall needs another hole.

Both sides say of which job they are. What comes in from others is dropped. A number that is sent twice is taken once.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable

from dpdist.cluster.environment import Membership

logger = logging.getLogger(__name__)

#: Seconds of waiting after which it is said who is missing; each time it is said, the next takes twice as long.
PATIENCE = 30.0
#: Seconds between two attempts to reach rank 0, which may be minutes late.
_AGAIN = 0.2
_COME, _MISSING = b"come", b"missing "
#: Longest line, in bytes, that is read from anybody.
_LONGEST = 4096


class MissingRanksError(TimeoutError):
    """Not all processes of the job have come in time; the text names those that have not."""


def meet(membership: Membership, node_of: Callable[[int], str | None], timeout: float, job: str = "") -> None:
    """Return on all processes once all have called it.

    Args:
        job: what tells this start of this job from every other, the same on all processes, one word.
        node_of: the name of a rank's node, for messages; None where it is not known.
        timeout: seconds to wait.

    Raises:
        MissingRanksError: on all that have come, if others have not.
        OSError: rank 0 cannot listen on the coordinator's port.
    """
    if membership.num_processes == 1:
        return
    host, _, port = membership.coordinator_address.rpartition(":")
    greeting = f"dpdist {job or '-'} {membership.num_processes} ".encode()
    if membership.process_id == 0:
        _receive(greeting, membership.num_processes, host, int(port), node_of, timeout)
    else:
        _announce(greeting, membership.process_id, host, int(port), node_of, timeout)


def _receive(
    greeting: bytes, size: int, host: str, port: int, node_of: Callable[[int], str | None], timeout: float
) -> None:
    """Rank 0: wait for all others, and tell them how it went."""
    began = time.monotonic()
    say_at = began + PATIENCE
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        listener = stack.enter_context(_listen(host, port))
        selector.register(listener, selectors.EVENT_READ)
        while len(present) < size - 1:
            now = time.monotonic()
            missing = [rank for rank in range(1, size) if rank not in present]
            if now >= began + timeout:
                text = f"{_named(missing, node_of)} did not come within {timeout:g} s; look into what they logged last"
                _answer(present.values(), greeting + _MISSING + text.encode()[: _LONGEST // 2] + b"\n")
                raise MissingRanksError(text)
            if now >= say_at:
                logger.warning("waiting for %s", _named(missing, node_of))
                say_at = now + (now - began)
            for key, _ in selector.select(min(began + timeout, say_at) - now):
                if key.fileobj is listener:
                    caller, _ = listener.accept()
                    stack.enter_context(caller)
                    selector.register(caller, selectors.EVENT_READ)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                rank = _rank_of(key.fileobj, greeting, size)
                selector.unregister(key.fileobj)
                if rank is None:
                    key.fileobj.close()
                    present = {known: caller for known, caller in present.items() if caller is not key.fileobj}
                else:
                    present[rank] = key.fileobj
                    with contextlib.suppress(KeyError):  # it says no more, unless it ends
                        selector.register(key.fileobj, selectors.EVENT_READ)
        # Closed before they are answered: whoever is told to come must not find this listener in place of JAX's.
        selector.unregister(listener)
        listener.close()
        _answer(present.values(), greeting + _COME + b"\n")


def _announce(
    greeting: bytes, rank: int, host: str, port: int, node_of: Callable[[int], str | None], timeout: float
) -> None:
    """Any other rank: reach rank 0, and wait for its answer."""
    began = time.monotonic()
    say_at = began + PATIENCE
    while True:
        now = time.monotonic()
        left = began + timeout - now
        # Rank 0 has the same bound, but began at another time: it may still tell who else is missing.
        if left <= 0:
            raise MissingRanksError(
                f"{_named([0], node_of)} did not come within {timeout:g} s; look into what it logged"
            )
        if now >= say_at:
            logger.warning("waiting for %s", _named([0], node_of))
            say_at = now + (now - began)
        answer = b""
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=min(left, 10.0)) as rank_0:
            rank_0.sendall(greeting + b"%d\n" % rank)
            answer = _line(rank_0, left + PATIENCE)
        if answer == greeting + _COME + b"\n":
            return
        if answer.startswith(greeting + _MISSING) and answer.endswith(b"\n"):
            raise MissingRanksError(answer.removeprefix(greeting + _MISSING).decode(errors="replace").strip())
        time.sleep(_AGAIN)


def _listen(host: str, port: int) -> socket.socket:
    """Where JAX's service will listen: on all interfaces, or on this machine alone."""
    if host == "127.0.0.1":
        return socket.create_server((host, port), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _rank_of(caller: socket.socket, greeting: bytes, size: int) -> int | None:
    """The rank that calls; None if it is no rank of this job, or hangs up."""
    try:
        line = _line(caller, 1.0)
    except OSError:
        return None
    number = line.removeprefix(greeting).strip()
    if not line.startswith(greeting) or not number.isdigit():
        return None
    return int(number) if 0 < int(number) < size else None


def _line(connection: socket.socket, seconds: float) -> bytes:
    """What comes within some seconds up to a line end, the end of the stream, or `_LONGEST` bytes.

    Raises:
        TimeoutError: the line is not whole by then.
    """
    line, deadline = b"", time.monotonic() + seconds
    while not line.endswith(b"\n") and len(line) <= _LONGEST:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        read = connection.recv(256)
        if not read:
            break
        line += read
        if time.monotonic() > deadline:
            raise TimeoutError
    return line


def _answer(callers: Iterable[socket.socket], answer: bytes) -> None:
    for caller in callers:
        with contextlib.suppress(OSError):
            caller.sendall(answer)


def _named(ranks: list[int], node_of: Callable[[int], str | None]) -> str:
    """`ranks [1, 5] (n2, n3)`."""
    nodes = list(dict.fromkeys(node for rank in ranks if (node := node_of(rank)) is not None))
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} [{shown}]" + (f" ({', '.join(nodes[:16])})" if nodes else "")
