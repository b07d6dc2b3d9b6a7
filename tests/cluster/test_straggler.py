"""Stragglers: the detector on given numbers, and a real job with a slow rank."""

from __future__ import annotations

from typing import Any

import pytest
from test_join import run_processes

from dpdist.cluster.straggler import Detector, share_waited

HOSTS = ["n01", "n02", "n03", "n04"]


def reported(*samples: list[float | None], hosts: list[str] = HOSTS) -> list[list[int]]:
    """Return the stragglers reported for each sample: the own seconds of each rank, None if it sent none."""
    detector = Detector(hosts)
    return [
        [
            report["straggler"]
            for report in detector.add(step, {rank: (own, 2.0) for rank, own in enumerate(sample) if own is not None})
        ]
        for step, sample in enumerate(samples)
    ]


EVEN = [1.0, 1.1, 0.9, 1.0]
LAST_SLOW = [1.0, 1.1, 0.9, 1.7]


def test_a_rank_that_stays_slow_is_named_from_its_third_sample_on() -> None:
    assert reported(*[LAST_SLOW] * 5) == [[], [], [3], [3], [3]]


def test_a_report_says_where_how_slow_and_how_much_of_the_step() -> None:
    detector = Detector(HOSTS)
    sample = {0: (1.0, 2.0), 1: (1.1, 2.0), 2: (0.9, 2.0), 3: (1.7, 2.0)}
    reports = [detector.add(step, sample) for step in (10, 30, 50)]
    assert reports == [
        [],
        [],
        [
            {
                "step": 50,
                "straggler": 3,
                "host": "n04",
                "own_seconds": 1.7,
                "median_seconds": 1.0,
                "share_of_step": 0.85,
            }
        ],
    ]


@pytest.mark.parametrize(
    ("own", "whole", "share"),
    [
        ([1.0, 1.1, 0.9, 1.7], 2.0, 0.35),  # the slowest takes 0.7 s longer than the lower median, 1.0
        ([1.0, 3.0], 4.0, 0.5),
        ([1.0, 1.0], 2.0, 0.0),
        ([1.0, 9.0], 4.0, 1.0),  # where a share of the work was small, own seconds are more than the step's
        ([0.0, 0.0], 0.0, 0.0),
    ],
)
def test_the_share_waited_is_what_the_slowest_takes_longer(own: list[float], whole: float, share: float) -> None:
    assert share_waited({rank: (mine, whole) for rank, mine in enumerate(own)}) == pytest.approx(share)


def test_single_slow_samples_make_no_straggler() -> None:
    assert reported(*[LAST_SLOW, EVEN, EVEN, LAST_SLOW, EVEN] * 4) == [[]] * 20


def test_three_of_the_last_five_are_enough_and_a_fast_sample_is_not_reported() -> None:
    assert reported(LAST_SLOW, EVEN, LAST_SLOW, EVEN, LAST_SLOW, EVEN) == [[], [], [], [], [3], []]


def test_a_rank_that_recovers_is_forgotten() -> None:
    assert reported(*[LAST_SLOW] * 5, *[EVEN] * 3, LAST_SLOW)[5:] == [[]] * 4


def test_equal_ranks_are_never_named_however_slow() -> None:
    assert reported(*[[s] * 4 for s in (0.1, 10.0, 1.0, 3.0, 7.0)]) == [[]] * 5


def test_milliseconds_are_jitter() -> None:
    assert reported(*[[0.004, 0.004, 0.004, 0.012]] * 5) == [[]] * 5


def test_of_two_ranks_the_slower_is_compared_with_the_faster() -> None:
    assert reported(*[[1.0, 1.6]] * 3, hosts=HOSTS[:2]) == [[], [], [1]]


def test_several_stragglers_are_all_named() -> None:
    hosts = [f"n{rank}" for rank in range(8)]
    assert reported(*[[1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0]] * 3, hosts=hosts)[-1] == [1, 4]


def test_missing_answers_are_skipped() -> None:
    assert reported(*[[1.0, None, 1.0, 2.0]] * 3)[-1] == [3]
    assert reported(*[[1.0, 1.0, 1.0, None], LAST_SLOW] * 3)[-1] == [3]


@pytest.mark.parametrize("sample", [[], [None, None, None, 9.0], [None, None, 1.0, 9.0]])
def test_a_sample_of_half_of_the_ranks_is_ignored(sample: list[float | None]) -> None:
    assert reported(*[sample] * 5) == [[]] * 5


#: 60 steps as in the training loop, each with a collective; rank sys.argv[1], if it exists, is slow. The others have a
#: share of sys.argv[2] of its microbatches.
LOOP = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dpdist.cluster.straggler import Stragglers
world = join(cluster(devices_per_process=1))
rank = world.process_id
world = dataclasses.replace(world, nodes=tuple(f"n{n:02}" for n in range(world.num_processes)))
sharding = NamedSharding(world.mesh, PartitionSpec("data"))
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(world.mesh, PartitionSpec()))
stragglers = Stragglers(world, every=10)
state = total(jax.make_array_from_callback((world.num_processes,), sharding, lambda _: np.ones(1)))
found, taken = [], 0
for step in range(60):
    stragglers.began(step, state)
    time.sleep(0.1 if str(rank) == sys.argv[1] else 0.02)
    sums = jax.make_array_from_callback((world.num_processes,), sharding, lambda _: np.ones(1))
    stragglers.ready(step, sums, float(sys.argv[2]) if str(rank) != sys.argv[1] else 1.0)
    state = total(sums)
    stragglers.ended(step, state)
    found += stragglers.reports()
report(found=found, due=[step for step in range(60) if stragglers.due(step)])
agreement.barrier("end", world)
if world.is_main and world.num_processes > 1:
    left = agreement.client().key_value_dir_get("dpdist/straggler/")
    report(left=sorted(key for key, _ in left))
leave()
"""


def test_a_slow_rank_is_reported_by_rank_and_host_and_only_on_process_0() -> None:
    first, *others = run_processes(LOOP, 3, "1", "1")
    assert first["due"] == [5, 15, 25, 35, 45, 55]
    found: list[dict[str, Any]] = first["found"]
    # A sample is evaluated at the next one, so that of step 55 is still pending.
    assert [(r["step"], r["straggler"], r["host"]) for r in found] == [(25, 1, "n01"), (35, 1, "n01"), (45, 1, "n01")]
    for report in found:
        assert report["own_seconds"] >= 0.1
        assert report["own_seconds"] > 1.5 * report["median_seconds"]
        assert 0.5 < report["share_of_step"] <= 1.0
    assert [facts["found"] for facts in others] == [[], []]
    assert first["left"] == [f"dpdist/straggler/0/55/{rank}" for rank in range(3)]


@pytest.mark.parametrize(("slow", "share"), [("none", "1"), ("1", "0.2")], ids=["equal", "five times the work"])
def test_equally_fast_ranks_are_not_reported(slow: str, share: str) -> None:
    assert [facts["found"] for facts in run_processes(LOOP, 3, slow, share)] == [[], [], []]


def test_a_rank_with_nothing_to_do_is_not_compared() -> None:
    assert [facts["found"] for facts in run_processes(LOOP, 3, "1", "0")] == [[], [], []]


def test_one_process_is_never_timed() -> None:
    (facts,) = run_processes(LOOP, 1, "0", "1")
    assert (facts["due"], facts["found"]) == ([], [])


def test_a_lost_coordination_service_is_no_error() -> None:
    first, second = run_processes(
        """
from dpdist.cluster.straggler import Stragglers
import jax
world = join(cluster(devices_per_process=1))
stragglers = Stragglers(world, every=2)
class Lost:
    def __getattr__(self, name):
        def fail(*_, **__):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")
        return fail
client, agreement.client = agreement.client, lambda: Lost()
for step in range(8):
    stragglers.began(step, None)
    stragglers.ready(step, None, 1.0)
    stragglers.ended(step, None)
report(found=stragglers.reports())
agreement.client = client
agreement.barrier("end", world)
leave()
""",
        2,
    )
    assert (first["found"], second["found"]) == ([], [])
    assert first["stderr"].count("were not compared: UNAVAILABLE") == 4
