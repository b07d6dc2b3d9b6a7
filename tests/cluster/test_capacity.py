"""Disk and memory that cannot do are named by directory or node before the first step; what can do passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes

from dpdist.cluster.capacity import Memory, memory_left

GIB = 2**30
START = """
rank = int(os.environ["DPDIST_PROCESS_ID"])
os.environ["SLURMD_NODENAME"] = ["n1", "n1", "n2"][rank]
from pathlib import Path
from dpdist.cluster.capacity import Memory, require_disk, require_memory
from dpdist.cluster.preflight import BadNodeError
world = join(cluster(devices_per_process=1))
def told(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except (BadNodeError, InputError) as error:
        return f"{type(error).__name__}: {error}"
def memory(*gib):
    return told(require_memory, world, each=2**30, found=Memory(left=gib[rank] * 2**30, whose="the job"))
huge, folder = 2**60, Path(sys.argv[1])
report(
    enough=memory(2.5, 2.1, 1.5),
    one=memory(2.5, 1.9, 1.5),
    all=memory(1.5, 1.9, 0.5),
    here=told(require_memory, world, each=1),
    no_disk=told(require_disk, folder, world, checkpoint=huge, more=1),
    little=told(require_disk, folder, world, checkpoint=1000, more=huge),
    disk=told(require_disk, folder, world, checkpoint=1000, more=2),
)
"""


def test_every_rank_names_the_node_or_directory_that_cannot_do(tmp_path: Path) -> None:
    for found in run_processes(START, 3, str(tmp_path)):
        assert (found["enough"], found["here"], found["disk"]) == (None, None, [])
        # Two processes of one node share what it has.
        assert found["one"] == (
            "BadNodeError: bad node n1: the job has 1.9 GiB of memory left, and 2 process(es) there need at least 2 GiB"
        )
        assert found["all"].startswith("InputError: cluster = 'n1': the job has 1.5 GiB of memory left")
        assert "sbatch --mem" in found["all"]
        assert found["no_disk"].startswith(f"InputError: run.dir = '{tmp_path}': has ")
        assert "make room" in found["no_disk"]
        (warning,) = found["little"]
        assert "more checkpoints" in warning


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_the_groups_above_counts_and_old_cache_is_free(version: int, tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 99 kB\nMemAvailable:   8388608 kB\n")
    assert memory_left(tmp_path) == Memory(left=8 * GIB, whose="the node")
    if version == 2:
        write(tmp_path / "proc/self/cgroup", "0::/slurm/job_7/step_0\n")
        top, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
    else:
        write(tmp_path / "proc/self/cgroup", "5:cpu:/\n4:hugetlb,memory:/slurm/job_7/step_0\n0::/\n")
        top, limit, usage, cache = (
            "sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    step = tmp_path / top / "slurm/job_7/step_0"
    for group, most in ((step, "max"), (step.parent, str(4 * GIB)), (step.parents[1], str(64 * GIB))):
        write(group / limit, f"{most}\n")
        write(group / usage, f"{3 * GIB}\n")
        write(group / "memory.stat", f"anon 5\n{cache} {GIB}\n")
    assert memory_left(tmp_path) == Memory(left=2 * GIB, whose="the job")
    write(tmp_path / "proc/meminfo", "MemAvailable: 1048576 kB\n")
    assert memory_left(tmp_path) == Memory(left=GIB, whose="the node")


def test_a_system_that_does_not_tell_stops_no_run(tmp_path: Path) -> None:
    assert memory_left(tmp_path).left == float("inf")
    write(tmp_path / "proc/self/cgroup", "0::/group\n")
    assert memory_left(tmp_path).left == float("inf")
    assert 0 < memory_left().left < 2**50
