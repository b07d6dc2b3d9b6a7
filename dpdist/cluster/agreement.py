"""Agreement between the processes of a job: one value for all, or an error on all. Every wait is bounded.

Values travel through the coordination service's key-value store, not through device collectives: a get has
a timeout (a collective has none), takes 2 ms where a collective of a new shape takes 50 to 120 ms to compile,
and works while the processes still disagree about their devices. The service is plain gRPC: never send the
secret, only its keyed tag.

Every function here is collective: all processes call the same ones in the same order. They are made for
start-up and rare decisions, not for every step.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
from jax._src import distributed  # The client has no public name; Orbax takes it from here too.

from dpdist.cluster.world import World
from dpdist.errors import InputError

#: Keys are never used twice: the store keeps them, and a late reader must not find another value.
_serial = itertools.count()
#: The others wait longer than process 0, so that its diagnosis of who is missing still reaches them.
_MARGIN = 10.0
#: Characters of a differing value that an error shows.
_SHOWN = 200


def broadcast(value: Any, world: World) -> Any:
    """Process 0's `value` on every process, through JSON: tuples become lists, keys become strings.

    Args:
        value: what JSON can hold; only process 0's is looked at.

    Raises:
        TimeoutError: process 0 did not send it within `job.timeout` seconds.
    """
    return _broadcast(value, world, world.timeout)


def decide(world: World, function: Callable[[], Any], *, timeout: float | None = None) -> Any:
    """What process 0 gets from `function()`, on every process; for whatever depends on files or clocks.

    Args:
        function: called on process 0 alone; it returns what JSON can hold.
        timeout: seconds the others wait for it; None takes `job.timeout`.

    Raises:
        InputError: on all processes, where `function` raised it.
        TimeoutError: process 0 did not answer in time.
    """
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            answer["value"] = function()
        except InputError as error:
            value = error.value if isinstance(error.value, str | int | float | None) else str(error.value)
            answer["error"] = [error.field, value, error.remedy]
    answer = _broadcast(answer, world, world.timeout if timeout is None else timeout)
    if "error" in answer:
        raise InputError(*answer["error"])
    return answer["value"]


def all_gather(value: Any, world: World, *, timeout: float | None = None) -> list[Any]:
    """Every process's `value`, in the order of ranks, on every process, through JSON.

    Args:
        timeout: seconds to wait for all; None takes `job.timeout`.

    Raises:
        TimeoutError: on all processes that are there; it names the ranks that did not answer.
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
    """Stop all processes unless each has the same `fields` as process 0.

    Args:
        fields: values that JSON can hold, by the name by which an error shall call them. Processes may have
            different sets of names; a field that one lacks differs.
        hidden: names of fields whose values no message may show, such as a tag keyed by the secret.

    Raises:
        InputError: on all processes alike; it names each field that differs, the values and their ranks.
        TimeoutError: a process did not take part.
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
    """Wait until every process has come to the barrier called `name`.

    `multihost_utils.sync_global_devices` is a device collective and would wait for ever; this is not one.

    Args:
        timeout: seconds to wait; None takes `job.timeout`.

    Raises:
        TimeoutError: someone did not come in time; it names the barrier and the ranks that are missing.
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
    """The coordination service, for what is no agreement."""
    return distributed.global_state.client


def _get(key: str, sender: int, timeout: float) -> str:
    try:
        return str(client().blocking_key_value_get(key, round(timeout * 1000)))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"rank {sender} did not answer within {timeout:g} s: {error}") from error


def _difference(name: str, expected: Mapping[str, str], found: list[dict[str, str]], hidden: Collection[str]) -> str:
    """`privacy.delta is 1e-05 on rank 0, 2 but 1e-06 on rank 1`."""
    if name in hidden:
        return f"{name} (not shown) differs on {_ranks(r for r, report in enumerate(found) if name in report)}"
    holders: dict[str, list[int]] = {}
    for rank, report in enumerate(found):
        holders.setdefault(report.get(name, _shown(expected.get(name))), []).append(rank)
    return f"{name} is " + " but ".join(f"{text} on {_ranks(ranks)}" for text, ranks in holders.items())


def _shown(text: str | None, hide: bool = False) -> str:
    """A value as an error shows it: absent, hidden, or its JSON, cut where it is long."""
    if hide:
        return ""
    if text is None:
        return "absent"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _ranks(ranks: Iterable[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
