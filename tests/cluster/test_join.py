"""Joining, agreement and leaving, with real processes that form real JAX jobs on this machine."""

from __future__ import annotations

import json
import signal
import socket
from typing import Any

import pytest
from processes import run_processes

from dpdist.cluster.environment import free_port


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two processes with two devices each; their job runs from joining to leaving."""
    cache = tmp_path_factory.mktemp("cache")
    return run_processes(
        """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from types import SimpleNamespace
from dpdist.run.compiled import open_cache
world = join(cluster())
compiling = open_cache(SimpleNamespace(cluster=cluster(compilation_cache=sys.argv[1])), None, world)
rank = world.process_id
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event.rpartition("/")[2]))
with compiling():  # one program for each of the process's own devices
    cubes = [int(jax.jit(lambda x: x**3)(jax.device_put(np.int32(5), device))) for device in jax.local_devices()]
report(cubes=cubes, found=[found.count("compile_requests_use_cache"), found.count("cache_hits")])
sharding = NamedSharding(world.mesh, PartitionSpec("data"))
ones = jax.make_array_from_callback((4, 3), sharding, lambda index: np.full((1, 3), 1.0 + index[0].start))
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(world.mesh, PartitionSpec()))(ones)
report(
    rank=rank, size=world.num_processes, main=world.is_main, devices=world.device_count, platform=world.platform,
    label=world.membership.label, hosts=world.host_of_device, distributed=world.distributed,
    mesh=[[d.process_index, d.id] for d in world.mesh.devices], axes=world.mesh.axis_names, total=float(total),
    local=[d.id for d in world.mesh.local_devices],
)
report(again=join(cluster()).host_of_device)
report(broadcast=agreement.broadcast({"from": rank, "pair": (1, 2)}, world), gather=agreement.all_gather([rank], world))

def decision():
    assert rank == 0
    return "resume"
def refusal():
    raise InputError("run.dir", "runs/x", f"cannot be written by rank {rank}.")
report(decided=agreement.decide(world, decision), refused=error_of(agreement.decide, world, refusal))

report(same=error_of(agreement.require_same, {"seed": 1, "nan": float("nan"), "map": {"a": 1, "b": 2}}, world))
other = {"map": {"b": 2, "a": 1}} if rank else {"map": {"a": 1, "b": 2}}
report(order_of_keys=error_of(agreement.require_same, other, world))
fields = {"privacy.delta": [1e-5, 1e-6][rank], "seed": 1, "tag": ["ab12", "cd34"][rank], "long": "x" * 5000}
fields |= {"only_on_1": True, "long": "y" * 5000} if rank else {"only_on_0": True}
report(different=error_of(agreement.require_same, fields, world, hidden={"tag"}))

report(passed=error_of(agreement.barrier, "save", world), twice=error_of(agreement.barrier, "save", world))
start = time.monotonic()
report(late=error_of(agreement.barrier, "last save", world, timeout=0.5) if rank == 0 else None)
agreement.barrier("after", world)
leave()
report(left=True, cached=len(os.listdir(sys.argv[1])))
""",
        2,
        str(cache),
    )


def test_all_devices_are_in_the_mesh_in_the_same_order_everywhere(two: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(two):
        assert (facts["rank"], facts["size"], facts["main"]) == (rank, 2, rank == 0)
        assert (facts["devices"], facts["platform"], facts["label"]) == (4, "cpu", f"rank {rank}/2")
        assert facts["axes"] == ["data"]
        assert facts["mesh"] == sorted(facts["mesh"])
        assert [process for process, _ in facts["mesh"]] == [0, 0, 1, 1]
        assert facts["local"] == [device for process, device in facts["mesh"] if process == rank]
        assert facts["distributed"]


def test_the_job_reduces_across_processes(two: list[dict[str, Any]]) -> None:
    assert [facts["total"] for facts in two] == [30.0, 30.0]


def test_every_process_knows_which_devices_share_a_host(two: list[dict[str, Any]]) -> None:
    assert [facts["hosts"] for facts in two] == [[0, 0, 1, 1]] * 2


def test_joining_twice_in_one_python_reuses_the_job(two: list[dict[str, Any]]) -> None:
    assert [facts["again"] for facts in two] == [[0, 0, 1, 1]] * 2


def test_leaving_ends_all_processes_with_0(two: list[dict[str, Any]]) -> None:
    assert all(facts["left"] for facts in two)


def test_the_compilation_cache_is_used(two: list[dict[str, Any]]) -> None:
    assert two[0]["cached"] > 0


def test_a_process_reads_what_process_0_compiled_for_its_own_devices(two: list[dict[str, Any]]) -> None:
    assert [facts["cubes"] for facts in two] == [[125, 125]] * 2
    assert [facts["found"] for facts in two] == [[2, 0], [2, 2]]


def test_broadcast_gives_everyone_process_0s_value(two: list[dict[str, Any]]) -> None:
    assert [facts["broadcast"] for facts in two] == [{"from": 0, "pair": [1, 2]}] * 2


def test_all_gather_is_in_the_order_of_ranks(two: list[dict[str, Any]]) -> None:
    assert [facts["gather"] for facts in two] == [[[0], [1]]] * 2


def test_a_decision_is_process_0s_alone_and_so_is_its_error(two: list[dict[str, Any]]) -> None:
    assert [facts["decided"] for facts in two] == ["resume"] * 2
    assert [facts["refused"] for facts in two] == ["InputError: run.dir = 'runs/x': cannot be written by rank 0."] * 2


def test_equal_fields_pass_whatever_the_order_of_keys(two: list[dict[str, Any]]) -> None:
    assert [(facts["same"], facts["order_of_keys"]) for facts in two] == [(None, None)] * 2


def test_a_difference_is_named_with_values_and_ranks_on_every_process(two: list[dict[str, Any]]) -> None:
    assert two[0]["different"] == two[1]["different"]
    message = two[0]["different"]
    assert message.startswith("InputError: long, only_on_0, only_on_1, privacy.delta, tag = ")
    assert "privacy.delta is 1e-05 on rank 0 but 1e-06 on rank 1" in message
    assert "only_on_0 is true on rank 0 but absent on rank 1" in message
    assert "only_on_1 is absent on rank 0 but true on rank 1" in message
    assert "seed" not in message
    assert len(message) < 1500


def test_a_hidden_difference_is_named_without_its_value(two: list[dict[str, Any]]) -> None:
    assert "tag (not shown) differs on rank 1" in two[0]["different"]
    for facts in two:
        assert "ab12" not in json.dumps(facts)
        assert "cd34" not in json.dumps(facts)


def test_a_barrier_can_be_passed_twice(two: list[dict[str, Any]]) -> None:
    assert [(facts["passed"], facts["twice"]) for facts in two] == [(None, None)] * 2


def test_a_barrier_that_someone_misses_names_itself_and_the_rank(two: list[dict[str, Any]]) -> None:
    message = two[0]["late"]
    assert message.startswith("TimeoutError: barrier 'last save'")
    assert "timed out task names:\n1" in message


def test_a_rank_that_does_not_answer_is_named_on_all_others() -> None:
    first, lost, third = run_processes(
        """
world = join(cluster(shutdown_timeout=1, devices_per_process=1))
if world.process_id != 1:
    start = time.monotonic()
    report(error=error_of(agreement.require_same, {"seed": 1}, world), seconds=time.monotonic() - start)
agreement.barrier("end", world, timeout=30)
""",
        3,
    )
    assert "rank 1 of 3 did not answer within 1 s" in first["error"]
    assert first["error"] == third["error"]
    assert "error" not in lost
    assert max(first["seconds"], third["seconds"]) < 10


def test_a_wrong_number_of_devices_on_one_rank_stops_all_and_names_it() -> None:
    reports = run_processes(
        """
mine = 1 + int(os.environ["DPDIST_PROCESS_ID"])
report(error=error_of(join, cluster(devices_per_process=mine)))
""",
        2,
    )
    assert "cluster.devices_per_process = 1: rank 1 of 2 has 2 cpu device(s), not 1" in reports[0]["error"]
    assert "cluster.devices_per_process = 2: rank 0 of 2 has 1 cpu device(s), not 2" in reports[1]["error"]


def test_gpus_that_are_not_there_are_an_input_error() -> None:
    (facts,) = run_processes(
        "os.environ['JAX_PLATFORMS'] = 'cpu'; report(error=error_of(join, cluster(platform='gpu')))", 1
    )
    assert facts["error"].startswith("InputError: cluster.platform = 'gpu': rank 0 of 1 has cpu")
    assert "JAX_PLATFORMS=cpu" in facts["error"]


def test_one_process_gets_the_preemption_notice() -> None:
    """That needs jax.distributed even with one process, and no other SIGTERM handler."""
    (facts,) = run_processes(
        f"""
from jax.experimental import multihost_utils
world = join(cluster())
os.kill(os.getpid(), {int(signal.SIGTERM)})
for step in range(500):
    if multihost_utils.reached_preemption_sync_point(step):
        break
    time.sleep(0.02)
report(distributed=world.distributed, hosts=world.host_of_device, step=step)
report(broadcast=agreement.broadcast((1, 2), world), gather=agreement.all_gather((1,), world))
report(same=error_of(agreement.require_same, {{"a": 1}}, world), barrier=error_of(agreement.barrier, "b", world))
leave()
""",
        1,
    )
    assert facts["distributed"]
    assert facts["hosts"] == [0, 0]
    assert facts["step"] < 499
    # The same JSON round trip as between processes; otherwise code could work on one process only.
    assert (facts["broadcast"], facts["gather"]) == ([1, 2], [[1]])
    assert (facts["same"], facts["barrier"]) == (None, None)


USED_BEFORE = """
import jax, logging
logging.basicConfig()
jax.config.update("jax_platforms", "cpu")
jax.devices()
"""


def test_a_notebook_that_has_used_jax_goes_on_alone_and_is_warned() -> None:
    (facts,) = run_processes(
        USED_BEFORE
        + """
world = join(cluster(devices_per_process=None))
report(distributed=world.distributed, devices=world.device_count, gather=agreement.all_gather(7, world))
report(count=error_of(join, cluster(devices_per_process=64)))
leave()
""",
        1,
    )
    assert (facts["distributed"], facts["gather"]) == (False, [7])
    assert "preemption polling is off" in facts["stderr"]
    assert "cluster.devices_per_process = 64" in facts["count"]


def test_a_process_of_several_that_has_used_jax_is_refused_at_once() -> None:
    reports = run_processes(USED_BEFORE + "report(error=error_of(join, cluster()))", 2)
    for rank, facts in enumerate(reports):
        assert facts["error"].startswith("InputError: jax.distributed")
        assert f"rank {rank}/2" in facts["error"]


def test_abort_keeps_its_code_and_the_last_words() -> None:
    """Without `abort`, the exit of one of two processes waits in JAX's shutdown barrier and ends in SIGABRT."""
    aborted, other = run_processes(
        """
world = join(cluster(shutdown_timeout=5))
if world.process_id == 1:
    print("REPORT", json.dumps({"words": "last"}), end="")
    abort(3)
time.sleep(1)
abort(0)
""",
        2,
        codes=(0, 3),
    )[::-1]
    assert (aborted["code"], aborted["words"], other["code"]) == (3, "last", 0)


JOIN_AND_SAY_WHY_NOT = """
from dpdist.cluster.environment import Membership
host, port, rank = sys.argv[1:]
who = Membership(process_id=int(rank), num_processes=2, coordinator_address=f"{host}:{port}", local_device_ids=None,
                 host_index=0, num_hosts=1, launcher="slurm")
began = time.monotonic()
report(error=error_of(join, cluster(), who), seconds=time.monotonic() - began)
os._exit(0)
"""


def test_a_coordinator_that_no_name_service_knows_is_named_at_once() -> None:
    (found,) = run_processes(JOIN_AND_SAY_WHY_NOT, 1, "node99.invalid", str(free_port()), "1")
    assert found["error"].startswith("InputError: coordinator = 'node99.invalid:")
    assert "cannot find node99.invalid, rank 0's host" in found["error"]
    assert "/etc/hosts" in found["error"]
    assert found["seconds"] < 20  # not initialization_timeout


def test_a_port_that_another_program_has_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        (found,) = run_processes(JOIN_AND_SAY_WHY_NOT, 1, "localhost", port, "0")
    assert found["error"].startswith(f"InputError: coordinator = 'localhost:{port}'")
    assert "another program has the port" in found["error"]
    assert found["seconds"] < 20
