"""How a job opens a run: one code, config, directory, secret and dataset on all processes, and one writer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from dpdist.cluster.agreement import decide, require_same
from dpdist.cluster.lease import Lease
from dpdist.cluster.preflight import require_shared
from dpdist.cluster.world import World
from dpdist.config import Config, flatten
from dpdist.errors import InputError
from dpdist.mechanism.keys import Secret
from dpdist.mechanism.ledger import Ledger, LedgerError
from dpdist.run.checkpoint import Checkpoints
from dpdist.run.directory import RunDirectory
from dpdist.run.fingerprints import (
    code_digest,
    data_tags,
    environment,
    numeric_settings,
    user_code_digest,
    user_libraries,
)
from dpdist.run.private_log import keep_out_of_logs, log_to
from dpdist.run.progress import say
from dpdist.run.resume import ResumeRequest, Start, find_start
from dpdist.run.summary import opening_line
from dpdist.run.writer import RunWriter, SilentWriter


def agree(config: Config, run: RunDirectory, world: World) -> None:
    """Make sure that all processes have the same code and config, and open the directory and its logs. Collective.

    From here on, texts that may quote data go to the logs alone.

    Raises:
        InputError: something differs, or the directory cannot be used; on all processes.
    """
    mine: dict[str, Any] = {
        "code": code_digest(),
        "user_code": user_code_digest(config),
        "user_libraries": user_libraries(config),
    }
    mine |= {"environment": environment(world.platform)} | numeric_settings()
    require_same(mine | flatten(config), world)
    decide(world, run.prepare)
    for warning in require_shared(run.private, world) if config.cluster.preflight else ():
        if world.is_main:
            say(f"dpdist: warning: {warning}")
    log_to(run.logs / f"rank-{world.process_id}.log")


def open_writer(
    config: Config, run: RunDirectory, world: World, *, began: float | None = None
) -> RunWriter | SilentWriter:
    """Take the lease on the run directory and read its ledger, on process 0; the others get a null object. Collective.

    Args:
        began: when this part of the run began, by `time.monotonic`; None is now.

    Raises:
        InputError: another job is on this run, or the ledger is damaged; on all processes.
    """
    opened: list[RunWriter] = []
    began = time.monotonic() if began is None else began

    def take() -> None:
        lease = Lease.acquire(run.private, config.cluster.lease_timeout)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(lease.release)
            if lease.taken_from is not None:
                say(f"dpdist: {run.root} was held by {lease.taken_from}; going on in its place")
            opened.append(RunWriter(config, run, world, lease, _read_ledger(run), began=began))
            on_failure.pop_all()

    # A holder that may live on another host is given its time to show it.
    decide(world, take, timeout=3 * config.cluster.lease_timeout + world.timeout)
    return opened[0] if opened else SilentWriter()


def _read_ledger(run: RunDirectory) -> Ledger:
    try:
        return Ledger(run.ledger)
    except LedgerError as error:
        raise InputError("ledger.jsonl", str(run.ledger), f"{error}.") from None


def open_secret(config: Config, run: RunDirectory, world: World) -> tuple[Secret, bool]:
    """The run's secret, made by process 0 where there is none; and whether an earlier one is lost. Collective.

    From here on, no log can hold it.

    Raises:
        InputError: it is malformed, or readable by others.
    """
    if config.privacy.insecure_seed is not None:
        secret, lost = Secret.from_insecure_seed(config.privacy.insecure_seed), False
    else:
        lost = decide(world, run.create_secret)
        secret = run.read_secret()
    keep_out_of_logs(secret)
    return secret, lost


def agree_on_data(secret: Secret, fingerprints: Mapping[str, bytes], world: World) -> dict[str, str]:
    """Make sure that all processes have the same secret and data, by keyed tags. Collective.

    Args:
        fingerprints: of each part of the data, by the name that an error message uses.

    Returns:
        The tag of each part.

    Raises:
        InputError: one of them differs; on all processes.
    """
    tags = data_tags(secret, fingerprints)
    compared = tags | {"secret": secret.tag(b"agreement")}
    require_same(compared, world, hidden=compared)
    return tags


def agree_on_start(request: ResumeRequest, writer: RunWriter | SilentWriter, world: World) -> Start:
    """Let process 0 choose the checkpoint and incarnation to resume from, and announce them. Collective.

    Raises:
        InputError: as `find_start`; on all processes.
    """
    # Calibration takes seconds, minutes in extreme cases: it is part of starting up.
    patience = request.config.cluster.initialization_timeout
    record = decide(world, lambda: find_start(request, writer.ledger).to_record(), timeout=patience)
    start = Start.from_record(record)
    if world.is_main:
        say(opening_line(start.plan, world, insecure=request.secret.insecure))
    return start


def begin(
    run: RunDirectory,
    writer: RunWriter | SilentWriter,
    start: Start,
    checkpoints: Checkpoints,
    world: World,
    *,
    test_data: bytes,
) -> None:
    """Write down how this part of the run begins, before its first step. Collective.

    Args:
        test_data: the fingerprint of what a run may not change, not keyed.
    """

    def write_down() -> None:
        writer.begin(start, checkpoints)  # first: until its incarnation is in the ledger, a lost secret counts as lost
        run.begun(test_data.hex())

    decide(world, write_down)
