"""Agreement between the processes of a job: all get the same value, or all get an error. Every wait is bounded.

Values travel through the coordination service's key-value store, not through device collectives. A read there has a
timeout (a collective has none), takes 2 ms (a collective of a new shape takes 50 to 120 ms to compile), and works while
the processes still disagree about their devices. The service is unencrypted gRPC: never send the secret, only its keyed
tag.

Every function here except `client` is collective: all processes must call the same ones in the same order. They are
meant for start-up and rare decisions, not for every step.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # The client has no public name; Orbax imports it from here too.

from dpdist.cluster.world import World
from dpdist.errors import InputError

#: Every key is used once: the store keeps its keys, and a late reader must not find another call's value.
_serial = itertools.count()
#: Extra seconds that the others wait for process 0, so that its report of missing ranks still reaches them.
_MARGIN = 10.0
#: Longest value, in characters, that an error message shows in full.
_SHOWN = 200


def broadcast(value: Any, world: World) -> Any:
    """Return process 0's `value` on every process, through JSON: tuples become lists, keys become strings.

    Args:
        value: JSON-serialisable; ignored on all processes but 0.

    Raises:
        TimeoutError: process 0 did not send it within `world.timeout` seconds.
    """
    return _broadcast(value, world, world.timeout)


def decide(world: World, function: Callable[[], Any], *, timeout: float | None = None) -> Any:
    """Call `function()` on process 0 and return its result on every process; for decisions based on files or clocks.

    Args:
        function: called on process 0 alone; must return something JSON-serialisable.
        timeout: seconds that the others wait for it; None means `world.timeout`.

    Raises:
        InputError: on all processes, if `function` raised it.
        TimeoutError: process 0 did not answer in time.
    """
    answer: dict[str, Any] = {}
    cause = None  # for the private log of process 0
    if world.is_main:
        try:
            answer["value"] = function()
        except InputError as error:
            cause = error.__cause__
            value = error.value if isinstance(error.value, str | int | float | None) else str(error.value)
            answer["error"] = [error.field, value, error.remedy]
    answer = _broadcast(answer, world, world.timeout if timeout is None else timeout)
    if "error" in answer:
        raise InputError(*answer["error"]) from cause
    return answer["value"]


def all_gather(value: Any, world: World, *, timeout: float | None = None) -> list[Any]:
    """Return every process's `value`, ordered by rank, on every process, through JSON.

    Args:
        timeout: seconds to wait for all of them; None means `world.timeout`.

    Raises:
        TimeoutError: on every process that called; the message names the ranks that did not.
    """
    seconds = world.timeout if timeout is None else timeout
    if world.num_processes == 1:
        return [json.loads(json.dumps(value))]
    key = f"dpdist/gather/{next(_serial)}"
    client().key_value_set(f"{key}/{world.process_id}", json.dumps(value))
    answer: dict[str, list[Any]] = {"values": [], "missing": []}
    if world.is_main:
        deadline = time.monotonic() + seconds
        for rank in range(world.num_processes):
            try:
                text = _get(f"{key}/{rank}", rank, max(0.01, deadline - time.monotonic()))
                answer["values"].append(json.loads(text))
            except TimeoutError:
                answer["missing"].append(rank)
    answer = _broadcast(answer, world, seconds + _MARGIN)
    if answer["missing"]:
        raise TimeoutError(
            f"{_ranks(answer['missing'])} of {world.num_processes} did not answer within {seconds:g} s; "
            "what they logged last says where they are."
        )
    return answer["values"]


def require_same(fields: Mapping[str, Any], world: World, hidden: Collection[str] = ()) -> None:
    """Raise an error on all processes unless each has the same `fields` as process 0.

    Args:
        fields: JSON-serialisable values by the name that an error message uses. A field that a process lacks counts
            as different.
        hidden: names of fields whose values no message may show, such as a tag keyed by the secret.

    Raises:
        InputError: the same on all processes; it names each field that differs, its values and their ranks.
        TimeoutError: a process did not call.
    """
    own = {name: json.dumps(value, sort_keys=True) for name, value in fields.items()}
    expected: dict[str, str] = broadcast(own, world)
    differing = [name for name in sorted({*expected, *own}) if expected.get(name) != own.get(name)]
    found = all_gather({name: _shown(own.get(name), name in hidden) for name in differing}, world)
    names = sorted({name for report in found for name in report})
    if not names:
        return
    raise InputError(
        ", ".join(names),
        "; ".join(_difference(name, expected, found, hidden) for name in names),
        "all processes must run the same job; start them from the same code, config and files.",
    )


def barrier(name: str, world: World, timeout: float | None = None) -> None:
    """Wait until every process has reached the barrier called `name`.

    It is not a device collective, as `multihost_utils.sync_global_devices` is, which would wait without limit.

    Args:
        timeout: seconds to wait; None means `world.timeout`.

    Raises:
        TimeoutError: a process did not arrive in time; the message names the barrier and the missing ranks.
    """
    if world.num_processes == 1:
        return
    seconds = world.timeout if timeout is None else timeout
    try:
        client().wait_at_barrier(f"dpdist/{name}", round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f"barrier {name!r} was not passed within {seconds:g} s on {world.membership.label}: {error}"
        ) from error


@contextlib.contextmanager
def process_0_first(world: World, *, timeout: float | None = None) -> Iterator[None]:
    """Let process 0 go through the block, and the others once it has left it, well or with an error.

    Args:
        timeout: seconds that the others wait for it; None means `world.timeout`.

    Raises:
        TimeoutError: process 0 did not leave it in time.
    """
    key = f"dpdist/turn/{next(_serial)}"
    if not world.is_main:
        _get(key, 0, world.timeout if timeout is None else timeout)
    try:
        yield
    finally:
        if world.is_main and world.num_processes > 1:
            client().key_value_set(key, "left")


def _broadcast(value: Any, world: World, timeout: float) -> Any:
    if world.num_processes == 1:
        return json.loads(json.dumps(value))
    key = f"dpdist/broadcast/{next(_serial)}"
    if not world.is_main:
        return json.loads(_get(key, 0, timeout))
    text = json.dumps(value)
    client().key_value_set(key, text)
    return json.loads(text)


def client() -> Any:
    """Return the coordination service's client, for direct use of its key-value store."""
    return distributed.global_state.client


def _get(key: str, sender: int, timeout: float) -> str:
    try:
        return str(client().blocking_key_value_get(key, round(timeout * 1000)))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"rank {sender} did not answer within {timeout:g} s: {error}") from error


def _difference(name: str, expected: Mapping[str, str], found: list[dict[str, str]], hidden: Collection[str]) -> str:
    """Describe one difference: `privacy.delta is 1e-05 on rank 0, 2 but 1e-06 on rank 1`."""
    if name in hidden:
        return f"{name} (not shown) differs on {_ranks(r for r, report in enumerate(found) if name in report)}"
    holders: dict[str, list[int]] = {}
    for rank, report in enumerate(found):
        holders.setdefault(report.get(name, _shown(expected.get(name))), []).append(rank)
    return f"{name} is " + " but ".join(f"{text} on {_ranks(ranks)}" for text, ranks in holders.items())


def _shown(text: str | None, hide: bool = False) -> str:
    """Format a value for an error message: its JSON, cut if long; `absent`; or nothing if hidden."""
    if hide:
        return ""
    if text is None:
        return "absent"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _ranks(ranks: Iterable[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
