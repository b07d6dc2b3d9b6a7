"""All ranks meet before JAX does: who is missing is said after a while, and raised by name on all that have come."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

import pytest

from dpdist.cluster import rendezvous
from dpdist.cluster.environment import Membership, free_port
from dpdist.cluster.node_list import expand, node_of_rank
from dpdist.cluster.rendezvous import MissingRanksError, meet

NODES = {0: "n1", 1: "n2", 2: "n2", 3: "n3"}


def member(rank: int, size: int, port: int) -> Membership:
    return Membership(
        process_id=rank,
        num_processes=size,
        coordinator_address=f"127.0.0.1:{port}",
        local_device_ids=None,
        host_index=rank,
        num_hosts=size,
        launcher="slurm",
    )


def met(ranks: list[int], size: int, timeout: float, meanwhile: Callable[[int], None] = lambda port: None) -> list[str]:
    """What each of these ranks of a job is told; empty where it may go on."""
    port = free_port()
    found = [""] * len(ranks)

    def run(index: int) -> None:
        try:
            meet(member(ranks[index], size, port), NODES.get, timeout)
        except MissingRanksError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(ranks))]
    for thread in threads:
        thread.start()
    meanwhile(port)
    for thread in threads:
        thread.join(60)
    return found


def test_all_go_on_once_all_have_come_and_the_port_is_free_for_jax() -> None:
    ports: list[int] = []
    assert met([2, 0, 1], 3, 30, ports.append) == [""] * 3
    with socket.create_server(("127.0.0.1", ports[0])):
        pass


def test_the_missing_are_named_with_their_nodes_on_all_that_have_come() -> None:
    said = met([0, 2], 4, 1.0)
    assert said == ["ranks [1, 3] (n2, n3) did not come within 1 s; look into what they logged last"] * 2


def test_rank_0_is_named_where_it_is_missing() -> None:
    assert met([1], 2, 1.0) == ["rank [0] (n1) did not come within 1 s; look into what it logged"]


def test_who_is_waited_for_is_said_after_a_while_and_rarely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.2)
    with caplog.at_level(logging.WARNING, "dpdist.cluster.rendezvous"):
        met([0], 2, 1.5)
    assert set(caplog.messages) == {"waiting for rank [1] (n2)"}
    assert 2 <= len(caplog.messages) <= 4  # after 0.2, 0.4, 0.8 s


def test_strangers_and_those_who_leave_again_do_not_count() -> None:
    def strangers(port: int) -> None:
        time.sleep(0.2)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"dpdist - 3 9\n", b"dpdist 12.0.0 3 1\n", b"dpdist - 3 1\n"):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(words)

    assert met([0], 3, 1.5, strangers) == [
        "ranks [1, 2] (n2) did not come within 1.5 s; look into what they logged last"
    ]


def test_a_rank_of_another_job_is_nobody() -> None:
    """Ports of jobs may be the same, once in thousands; the second waits in vain and says so."""
    port, found = free_port(), dict.fromkeys(("12.0.0", "13.0.0"), "")

    def run(rank: int, job: str) -> None:
        try:
            meet(member(rank, 2, port), NODES.get, 1.0, job)
        except MissingRanksError as error:
            found[job] = str(error)

    threads = [threading.Thread(target=run, args=each) for each in ((0, "12.0.0"), (1, "13.0.0"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found["12.0.0"].startswith("rank [1] (n2) did not come")
    assert found["13.0.0"].startswith("rank [0] (n1) did not come")


def test_an_answer_that_is_not_of_rank_0_is_none() -> None:
    port, said = free_port(), []

    def run() -> None:
        try:
            meet(member(1, 2, port), NODES.get, 1.0)
        except MissingRanksError as error:
            said.append(str(error))

    with socket.create_server(("127.0.0.1", port)) as server:
        thread = threading.Thread(target=run)
        thread.start()
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9\n")
        connection.close()
    thread.join(60)
    assert said == ["rank [0] (n1) did not come within 1 s; look into what it logged"]


def test_who_sends_a_byte_now_and_then_does_not_hold_rank_0() -> None:
    def slow(port: int) -> None:
        time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            for _ in range(8):
                with contextlib.suppress(OSError):
                    stranger.sendall(b"d")
                time.sleep(0.4)

    began = time.monotonic()
    assert met([0], 2, 1.5, slow)[0].startswith("rank [1]")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("node_list", "nodes"),
    [
        ("n1", ["n1"]),
        ("n[08-10],a1", ["n08", "n09", "n10", "a1"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
    ],
)
def test_node_lists(node_list: str, nodes: list[str]) -> None:
    assert expand(node_list) == nodes


def test_ranks_fill_one_node_after_the_other_unless_slurm_says_otherwise() -> None:
    step = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert [node_of_rank(step)(rank) for rank in range(6)] == ["n1", "n1", "n2", "n2", "n3", None]
    assert node_of_rank(step | {"SLURM_DISTRIBUTION": "cyclic"})(0) is None
    assert node_of_rank({})(0) is None
