"""`detect` on environments recorded from SLURM 22.05 (slurm/virtual_cluster.sh), and on broken ones."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from dpdist.cluster.environment import (
    FIRST_PORT,
    PORT_COUNT,
    coordinator_port,
    detect,
    first_host,
    free_port,
)
from dpdist.cluster.step_daemon import step_of_process
from dpdist.errors import InputError


def recorded(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.split())


# The batch shell of `sbatch -N4 --ntasks-per-node=2 --gpus-per-node=2`: it has rank variables, but no step.
BATCH_SHELL = recorded("""
    CUDA_VISIBLE_DEVICES=0,1 SLURMD_NODENAME=n1 SLURM_CPUS_ON_NODE=2 SLURM_GPUS_ON_NODE=2
    SLURM_GPUS_PER_NODE=2 SLURM_JOB_CPUS_PER_NODE=2(x4) SLURM_JOB_GPUS=0,1 SLURM_JOB_ID=2
    SLURM_JOB_NODELIST=n[1-4] SLURM_JOB_NUM_NODES=4 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=8
    SLURM_NTASKS_PER_NODE=2 SLURM_PROCID=0 SLURM_TASKS_PER_NODE=2(x4)""")
# Task 3 of `srun` in that job.
STEP = recorded("""
    CUDA_VISIBLE_DEVICES=0,1 SLURMD_NODENAME=n2 SLURM_CPUS_ON_NODE=2 SLURM_DISTRIBUTION=block
    SLURM_GPUS_ON_NODE=2 SLURM_GPUS_PER_NODE=2 SLURM_JOB_CPUS_PER_NODE=2(x4) SLURM_JOB_GPUS=0,1
    SLURM_JOB_ID=2 SLURM_JOB_NODELIST=n[1-4] SLURM_JOB_NUM_NODES=4 SLURM_LOCALID=1 SLURM_NODEID=1
    SLURM_NTASKS=8 SLURM_NTASKS_PER_NODE=2 SLURM_PROCID=3 SLURM_STEP_GPUS=0,1 SLURM_STEP_ID=0
    SLURM_STEP_NODELIST=n[1-4] SLURM_STEP_NUM_NODES=4 SLURM_STEP_NUM_TASKS=8
    SLURM_STEP_TASKS_PER_NODE=2(x4) SLURM_TASKS_PER_NODE=2(x4)""")
# Task 3 of `srun -N2 --ntasks-per-node=2 --gpus-per-task=1`.
GPU_PER_TASK = recorded("""
    CUDA_VISIBLE_DEVICES=1 SLURMD_NODENAME=n2 SLURMD_TRES_BIND=gpu:per_task:1 SLURM_CPUS_ON_NODE=2
    SLURM_GPUS_ON_NODE=2 SLURM_JOB_ID=4 SLURM_JOB_NODELIST=n[1-2] SLURM_JOB_NUM_NODES=2 SLURM_LOCALID=1
    SLURM_NODEID=1 SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 SLURM_PROCID=3 SLURM_STEP_GPUS=1
    SLURM_STEP_ID=0 SLURM_STEP_NODELIST=n[1-2] SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=4
    SLURM_STEP_TASKS_PER_NODE=2(x2) SLURM_TASKS_PER_NODE=2(x2)""")
# Task 1 of a job on one node, after `scontrol requeue`.
REQUEUED = recorded("""
    SLURMD_NODENAME=n1 SLURM_CPUS_ON_NODE=2 SLURM_JOB_ID=10 SLURM_JOB_NODELIST=n1 SLURM_JOB_NUM_NODES=1
    SLURM_LOCALID=1 SLURM_NODEID=0 SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_RESTART_COUNT=1 SLURM_STEP_ID=0
    SLURM_STEP_NODELIST=n1 SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2
    SLURM_TASKS_PER_NODE=2""")
# The shell of `salloc -N2 --ntasks-per-node=2`, on the login node.
SALLOC_SHELL = recorded("""
    SLURM_JOB_CPUS_PER_NODE=2(x2) SLURM_JOB_ID=3 SLURM_JOB_NODELIST=n[1-2] SLURM_JOB_NUM_NODES=2
    SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 SLURM_TASKS_PER_NODE=2(x2)""")
# The same with LaunchParameters=use_interactive_step: a "step" of one task that is only a shell.
INTERACTIVE_SHELL = recorded("""
    CUDA_VISIBLE_DEVICES=0 SLURMD_NODENAME=n1 SLURM_GPUS_ON_NODE=1 SLURM_JOB_ID=1
    SLURM_JOB_NODELIST=n[1-2] SLURM_JOB_NUM_NODES=2 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=4
    SLURM_NTASKS_PER_NODE=2 SLURM_PROCID=0 SLURM_STEP_ID=4294967290 SLURM_STEP_NODELIST=n1
    SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1
    SLURM_TASKS_PER_NODE=2(x2)""")
LOCAL = {
    "DPDIST_PROCESS_ID": "1",
    "DPDIST_NUM_PROCESSES": "3",
    "DPDIST_COORDINATOR": "127.0.0.1:20000",
}


def test_a_step_of_srun_gives_rank_host_and_coordinator() -> None:
    me = detect(STEP)
    assert (me.process_id, me.num_processes, me.host_index, me.num_hosts) == (3, 8, 1, 4)
    assert me.coordinator_address == f"n1:{coordinator_port(job=2, step=0, restart=0)}"
    assert (me.launcher, me.label) == ("slurm", "rank 3/8")


def test_a_requeued_job_meets_on_another_port() -> None:
    me = detect(REQUEUED)
    first = detect({k: v for k, v in REQUEUED.items() if k != "SLURM_RESTART_COUNT"})
    assert me.coordinator_address == f"n1:{coordinator_port(job=10, step=0, restart=1)}"
    assert me.coordinator_address != first.coordinator_address


@pytest.mark.parametrize("shell", [BATCH_SHELL, SALLOC_SHELL, INTERACTIVE_SHELL])
def test_a_shell_of_a_job_is_one_process_and_warned_to_use_srun(
    shell: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        me = detect(shell)
    assert (me.launcher, me.num_processes, me.process_id) == ("single", 1, 0)
    assert me.coordinator_address.startswith("127.0.0.1:")
    assert "srun" in caplog.text
    assert shell["SLURM_JOB_ID"] in caplog.text


def test_the_warning_names_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    detect({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"})
    assert "SLURM_STEP_NUM_TASKS not set" in caplog.text
    assert "SLURM_PROCID" not in caplog.text


# The batch shell of a job of one node that task 3 of `STEP` submitted: what sbatch does not set anew is left over.
NESTED = STEP | recorded("""
    SLURM_JOB_ID=9 SLURM_JOB_NODELIST=n1 SLURM_JOB_NUM_NODES=1 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_PROCID=0
    SLURM_TASKS_PER_NODE=1 SLURMD_NODENAME=n1""")


@pytest.mark.parametrize(
    ("environ", "step", "words"),
    [
        (NESTED, "9.batch", "left over from step 9.0, and this process is in 9.batch"),
        (STEP, "2.1", "this process is in 2.1"),
    ],
)
def test_variables_that_are_left_over_are_not_believed(
    environ: dict[str, str], step: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        me = detect(environ, use_gpus=False, step=step)
    assert (me.launcher, me.num_processes) == ("single", 1)
    assert words in caplog.text


@pytest.mark.parametrize("step", ["2.0", None])
def test_a_task_of_the_step_that_the_variables_name_is_believed(step: str | None) -> None:
    assert detect(STEP, step=step).num_processes == 8
    assert detect(STEP | {"SLURM_HET_SIZE": "2"}, step="7.0").num_processes == 8


def test_one_task_meets_nobody_so_that_a_shell_may_hold_several() -> None:
    alone = STEP | recorded("""SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=1
        SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=n1 SLURM_STEP_TASKS_PER_NODE=1""")
    found = [detect(alone) for _ in range(8)]
    assert {(me.launcher, me.coordinator_address.partition(":")[0]) for me in found} == {("slurm", "127.0.0.1")}
    assert len({me.coordinator_address for me in found}) > 1


def test_a_layout_that_may_put_rank_0_anywhere_is_refused() -> None:
    for distribution in ("block", "cyclic", "plane", "block:cyclic"):
        detect(STEP | {"SLURM_DISTRIBUTION": distribution})
    with pytest.raises(InputError, match="block, cyclic or plane") as caught:
        detect(STEP | {"SLURM_DISTRIBUTION": "arbitrary"})
    assert caught.value.field == "SLURM_DISTRIBUTION"


def made_up_proc(root: Path, *titles: str) -> Path:
    """A /proc of processes, each the child of the next, the first of which is `self`."""
    for pid, title in enumerate(titles):
        folder = root / ("self" if pid == 0 else str(pid))
        folder.mkdir(parents=True)
        (folder / "cmdline").write_text(title)
        parent = pid + 1 if pid + 1 < len(titles) else 0
        (folder / "status").write_text(f"Name:\tx\nPPid:\t{parent}\n")
    return root


@pytest.mark.parametrize(
    ("titles", "found"),
    [
        (("python\0train", "bash", "slurmstepd: [12.0]\0", "slurmd"), "12.0"),
        (("python", "slurmstepd: [12.batch]"), "12.batch"),
        (("python", "slurmstepd: [12+1.0]", "init"), None),
        (("python", "sshd", "init"), None),
    ],
)
def test_the_step_that_the_ancestors_show(tmp_path: Path, titles: tuple[str, ...], found: str | None) -> None:
    assert step_of_process(made_up_proc(tmp_path, *titles)) == found


def test_hidden_ancestors_tell_nothing(tmp_path: Path) -> None:
    proc = made_up_proc(tmp_path, "python", "bash", "init")
    (proc / "1/status").unlink()
    assert step_of_process(proc) is None
    assert step_of_process(tmp_path / "nowhere") is None


def test_no_launcher_is_one_process_on_a_free_port_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    me = detect({"PATH": "/bin"})
    assert (me.launcher, me.process_id, me.num_processes, me.host_index, me.num_hosts) == ("single", 0, 1, 0, 1)
    host, port = me.coordinator_address.split(":")
    with socket.socket() as server:
        server.bind((host, int(port)))
    assert not caplog.records


def test_local_processes_count_as_hosts_of_their_own() -> None:
    me = detect(LOCAL)
    assert (me.launcher, me.process_id, me.num_processes) == ("local", 1, 3)
    assert (me.host_index, me.num_hosts, me.coordinator_address) == (1, 3, "127.0.0.1:20000")


def test_the_local_launcher_wins_over_slurm() -> None:
    assert detect({**STEP, **LOCAL}, use_gpus=False).launcher == "local"


@pytest.mark.parametrize("name", LOCAL)
def test_a_half_set_local_group_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        detect({k: v for k, v in LOCAL.items() if k != name})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        (STEP, "SLURM_PROCID", "three"),
        (STEP, "SLURM_JOB_ID", "2_1"),
        (STEP, "SLURM_STEP_ID", "batch"),
        (STEP, "SLURM_RESTART_COUNT", "once"),
        (STEP, "SLURM_PROCID", "8"),
        (STEP, "SLURM_NODEID", "-1"),
        (STEP, "SLURM_STEP_NODELIST", "n[1-4"),
        (LOCAL, "DPDIST_NUM_PROCESSES", "many"),
        (LOCAL, "DPDIST_PROCESS_ID", "3"),
        (LOCAL, "DPDIST_COORDINATOR", "localhost"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(InputError) as caught:
        detect({**environ, name: value})
    assert caught.value.field == name
    assert str(caught.value.value) == value


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n1", "n1"),
        ("n[01-20]", "n01"),
        ("a1,b2", "a1"),
        ("gpu-[003,007-9]", "gpu-003"),
        ("r1c[1-2]n[3-4]", "r1c1n3"),
        ("login,n[01-20]", "login"),
        ("n[01-20],login", "n01"),
        ("rack[2-3]-node[10,12],a1", "rack2-node10"),
        ("node[5]-ib0.example.org", "node5-ib0.example.org"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", ",n1", "n[1-4", "n]1[", "[]", "n[[1]]"])
def test_a_node_list_that_cannot_be_read_is_refused(node_list: str) -> None:
    with pytest.raises(InputError, match="SLURM_STEP_NODELIST"):
        first_host(node_list)


def test_ports_of_steps_and_restarts_differ_and_lie_below_the_ephemeral_range() -> None:
    ports = {
        coordinator_port(job=job, step=step, restart=restart)
        for job in (5_000_000,)
        for step in range(64)
        for restart in range(100)
    }
    assert len(ports) == 64 * 100
    assert min(ports) >= FIRST_PORT
    assert max(ports) < FIRST_PORT + PORT_COUNT <= 32768
    # Jobs that run beside each other on a shared node: 50 consecutive ids, the first steps of each.
    beside = [coordinator_port(job=j, step=s, restart=0) for j in range(7_000_000, 7_000_050) for s in range(8)]
    assert len(set(beside)) == len(beside)


def test_a_free_port_is_not_one_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        taken = server.getsockname()[1]
        free = free_port()
        monkeypatch.setattr("random.SystemRandom.sample", lambda *_: [taken, free])
        assert free_port() == free


@pytest.mark.parametrize(
    ("environ", "visible", "ids"),
    [
        (STEP, "0,1", (1,)),  # as many as tasks on the node
        (STEP, "0,1,2,3", (1,)),  # more
        (STEP, "GPU-3f2a,GPU-77b0", (1,)),  # by name
        (STEP, "3", (0,)),  # only its own
        (STEP, "", None),
        (STEP, "NoDevFiles", None),
        (STEP, "-1", None),
        (GPU_PER_TASK, "1", (0,)),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)", "SLURM_STEP_NUM_NODES": "3"}, "0,1", None),  # alone
        (LOCAL, "0,1,2", (1,)),
    ],
)
def test_the_gpu_of_a_task(environ: dict[str, str], visible: str, ids: tuple[int, ...] | None) -> None:
    environ = {**environ, "CUDA_VISIBLE_DEVICES": visible}
    assert detect(environ).local_device_ids == ids
    assert detect(environ, use_gpus=False).local_device_ids is None


def test_recorded_gpus_per_task_are_number_zero_on_every_task() -> None:
    assert detect(GPU_PER_TASK).local_device_ids == (0,)


def test_tasks_that_nothing_hides_gpus_from_do_not_share_one() -> None:
    assert detect({k: v for k, v in STEP.items() if k != "CUDA_VISIBLE_DEVICES"}).local_device_ids == (1,)


@pytest.mark.parametrize(
    ("environ", "remedy"),
    [({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, "--gpus-per-node=4"), (LOCAL, "cluster.platform=cpu")],
)
def test_fewer_gpus_than_tasks_says_what_to_change(environ: dict[str, str], remedy: str) -> None:
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES") as caught:
        detect({**environ, "CUDA_VISIBLE_DEVICES": "0,1"})
    assert remedy in caught.value.remedy
    assert detect({**environ, "CUDA_VISIBLE_DEVICES": "0,1"}, use_gpus=False).local_device_ids is None
