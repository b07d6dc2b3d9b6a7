"""The check of the machines before the first step, with real processes: each fault is named by its node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import run_processes

START = """
rank = int(os.environ["DPDIST_PROCESS_ID"])
os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
from pathlib import Path
from dpdist.cluster import preflight
world = join(cluster())
folder = Path(sys.argv[1])
"""
PROGRAMS = """
import jax, jax.numpy as jnp, numpy as np, optax
from dpdist.mechanism.step import StepPrograms, StepSpec
from dpdist.program.update import initial_state, update_of
sgd = optax.sgd(1.0)
programs = StepPrograms(StepSpec(
    grad_sum=lambda params, batch, mask: ({"w": jnp.zeros(5)}, jnp.zeros(mask.shape)),
    state=initial_state({"w": np.zeros(5, np.float32)}, sgd, False),
    example={"x": jax.ShapeDtypeStruct((2,), jnp.float32)}, update=update_of(sgd, average_decay=0.0),
    mesh=world.mesh, batch_sizes=(1,), normaliser=1.0, clip_norm=1.0,
    noise_scale=1.0 if noisy else None, grid=2.0**-20 if noisy else None, placement="designated", randomised=False,
))
"""


def preflight(source: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    return run_processes(START + source, processes, str(folder))


def test_a_shared_directory_passes_and_nothing_stays_in_it(tmp_path: Path) -> None:
    found = preflight("report(warnings=preflight.require_shared(folder, world))", 3, tmp_path)
    assert [each["warnings"] for each in found] == [[], [], []]
    assert list(tmp_path.iterdir()) == []


FAULTS = {
    "not shared": (
        "folder = folder / str(rank)\nfolder.mkdir()",
        ["rank 1 (n2) does not see what rank 0 (n1) writes there", "shared|share"],
    ),
    "not there at all": (
        "folder = folder / str(rank)\nif rank == 0: folder.mkdir()",
        ["rank 1 (n2) does not see what rank 0 (n1) writes there"],
    ),
    "cannot be written": (
        "def full(path): raise OSError(28, 'No space left on device')\nif rank == 1: preflight._write = full",
        ["rank 1 (n2) cannot write there (No space left on device)"],
    ),
    "what it writes is not seen": (
        "if rank == 1:\n    preflight._write = lambda path: None\n    preflight._claims = lambda own, name: False",
        ["what rank 1 (n2) writes there is not seen by rank 0 (n1)"],
    ),
    "one name for two": (
        "preflight._claims = lambda own, name: True",
        ["rank 0 (n1) and rank 1 (n2) got one name that all asked for"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_directory_that_is_not_fit_is_named_with_the_node_on_all_processes(fault: str, tmp_path: Path) -> None:
    source, expected = FAULTS[fault]
    source += "\nreport(error=error_of(preflight.require_shared, folder, world, patience=1.0))"
    for each in preflight(source, 2, tmp_path):
        assert "run.dir" in each["error"]
        assert any(part in each["error"] for part in expected), each["error"]


def test_a_clock_that_is_wrong_is_a_warning_with_the_node(tmp_path: Path) -> None:
    source = """
real = time.time
preflight.time.time = lambda: real() + (500 if rank == 1 else 0)
report(warnings=preflight.require_shared(folder, world))
"""
    for each in preflight(source, 2, tmp_path):
        assert each["warnings"] == ["the clock of rank 1 (n2) differs from that of rank 0 (n1) by +500 s"]


@pytest.mark.parametrize("noisy", [True, False])
def test_the_all_reduce_of_the_step_is_timed_on_its_own_program(noisy: bool, tmp_path: Path) -> None:
    source = (
        f"noisy = {noisy}\n{PROGRAMS}"
        + """
found = preflight.require_network(programs, world, noisy=noisy, least_bandwidth=None)
report(bytes=found.bytes, seconds=found.seconds, bandwidth=found.bandwidth, devices=found.devices)
"""
    )
    first, second = preflight(source, 2, tmp_path)
    assert first == second
    assert first["bytes"] == (5 + 4) * (8 if noisy else 4)
    assert first["devices"] == 4
    assert first["bandwidth"] == pytest.approx(1.5 * first["bytes"] / first["seconds"])


def test_a_rank_that_gets_a_wrong_sum_is_named_and_so_is_a_fault_of_all(tmp_path: Path) -> None:
    source = (
        f"noisy = True\n{PROGRAMS}"
        + """
def found():
    try:
        preflight.require_network(programs, world, noisy=True, least_bandwidth=None)
    except (preflight.BadNodeError, InputError) as error:
        return f"{type(error).__name__}: {error}"
right = preflight.np.all
preflight.np.all = lambda x: right(x) and rank != 1
one = found()
preflight.np.all = right
spread = preflight._spread
preflight._spread = lambda programs, numbers, *rest: spread(programs, [n + (rank == 1) for n in numbers], *rest)
report(one=one, all=found())
"""
    )
    for each in preflight(source, 2, tmp_path):
        assert each["one"].startswith("BadNodeError: bad node n2: rank 1 (n2) got a wrong sum")
        assert each["all"].startswith("InputError: ")
        assert "which node cannot be told" in each["all"]


BLAMED = """
def found():
    try:
        preflight.require_network(programs, world, noisy=True, least_bandwidth=1e15)
    except (preflight.BadNodeError, InputError) as error:
        return f"{type(error).__name__}: {error}"
"""


def test_a_slow_network_is_not_blamed_on_a_node_where_that_cannot_be_told(tmp_path: Path) -> None:
    for each in preflight(f"noisy = True\n{PROGRAMS}{BLAMED}report(error=found())", 2, tmp_path):
        assert each["error"].startswith("InputError: cluster.least_bandwidth")
        assert "no single node is the cause" in each["error"]


def test_a_slow_connection_is_named(tmp_path: Path) -> None:
    late = """
ready = jax.block_until_ready
def late(x):
    time.sleep(0.7)
    return ready(x)
pair = preflight._pair
def slow_pair(*args):
    preflight.jax.block_until_ready = late if rank == 2 else ready
    try:
        return pair(*args)
    finally:
        preflight.jax.block_until_ready = ready
preflight._pair = slow_pair
report(error=found())
"""
    for each in preflight(f"noisy = True\n{PROGRAMS}{BLAMED}{late}", 4, tmp_path):
        assert each["error"].startswith("BadNodeError: bad node n3: the all-reduce reaches")
