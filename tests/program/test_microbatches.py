"""`physical_batch_size: auto` against simulated steps: real Poisson samples, assigned to devices as in training."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Literal

import numpy as np
import pytest

from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.sampling import Assignment, assign, in_random_order, microbatch_sizes, poisson_sample
from dpdist.program import microbatches
from dpdist.program.microbatches import choose_physical_batch, expected_rows, largest_that_fits, tail_of

How = Literal["chunks", "balanced", "shard"]
KEYS = Keys(Secret.from_insecure_seed(0), b"batching")
STEPS = 60


@cache
def sample(step: int, dataset_size: int, q: float) -> np.ndarray:
    return poisson_sample(KEYS.sampling(step), q, 0, dataset_size)


def assignments(
    dataset_size: int, q: float, hosts: int, per_host: int, assignment: How, physical: int, tail: int
) -> list[Assignment]:
    host_of_device = [host for host in range(hosts) for _ in range(per_host)]
    return [
        assign(
            step,
            in_random_order(sample(step, dataset_size, q), KEYS.order(step)),
            assignment=assignment,
            dataset_size=dataset_size,
            host_of_device=host_of_device,
            physical=physical,
            tail=tail,
        )
        for step in range(STEPS)
    ]


def busiest(plan: Assignment) -> tuple[int, ...]:
    """The sizes of the microbatches of the device that has most to do."""
    return max(
        (plan.sizes(device) for device in range(len(plan.by_device))), key=lambda sizes: (sum(sizes), len(sizes))
    )


def most_chunked(drawn: int, physical: int, devices: int) -> int:
    plan = assign(
        0,
        np.arange(drawn),
        assignment="chunks",
        dataset_size=max(drawn, 1),
        host_of_device=[0] * devices,
        physical=physical,
        tail=tail_of(physical),
    )
    return max(map(len, plan.by_device))


def simulated_rows(largest: list[int], physical: int) -> float:
    """Mean rows a device processes, launches included, where these are the largest local batches of the steps."""
    total = 0
    for n, times in Counter(largest).items():
        sizes = microbatch_sizes(n, physical, tail_of(physical))
        total += times * (sum(sizes) + microbatches._LAUNCH_EXAMPLES * len(sizes))
    return total / len(largest)


SITUATIONS = [  # (N, q, hosts, devices a host)
    (50_000, 0.5, 4, 4),
    (50_000, 0.02, 1, 1),
    (50_000, 0.02, 2, 4),
    (20_000, 0.1, 20, 4),
    (5_000, 0.004, 1, 2),
    (1_000, 1.0, 2, 3),
]


@pytest.mark.parametrize("assignment", ["chunks", "balanced", "shard"])
@pytest.mark.parametrize(("size", "q", "hosts", "per_host"), SITUATIONS)
def test_expected_rows_are_those_of_simulated_steps(
    size: int, q: float, hosts: int, per_host: int, assignment: How
) -> None:
    for physical in (8, 32):
        steps = assignments(size, q, hosts, per_host, assignment, physical, tail_of(physical))
        rows = [sum(busiest(p)) + microbatches._LAUNCH_EXAMPLES * len(busiest(p)) for p in steps]
        expected = expected_rows(
            physical,
            dataset_size=size,
            sampling_probability=q,
            hosts=hosts,
            devices=hosts * per_host,
            assignment=assignment,
        )
        assert abs(expected - np.mean(rows)) < 0.02 * np.mean(rows) + 4.5 * np.std(rows) / np.sqrt(STEPS)


@pytest.mark.parametrize("assignment", ["chunks", "balanced", "shard"])
@pytest.mark.parametrize(
    ("size", "q", "hosts", "per_host", "platform"),
    [*((*situation, "cpu") for situation in SITUATIONS), (*SITUATIONS[0], "gpu"), (*SITUATIONS[3], "gpu")],
)
def test_the_chosen_batch_costs_least_in_simulated_steps(
    size: int, q: float, hosts: int, per_host: int, assignment: How, platform: str
) -> None:
    steps = assignments(size, q, hosts, per_host, assignment, 1, 1)
    drawn = [len(p.sample) for p in steps]
    largest = [max(map(len, p.by_device)) for p in steps]

    def simulated(physical: int) -> float:
        if assignment == "chunks":  # which device takes what depends on the size of the chunks
            return simulated_rows([most_chunked(n, physical, hosts * per_host) for n in drawn], physical)
        return simulated_rows(largest, physical)

    chosen = choose_physical_batch(
        dataset_size=size,
        sampling_probability=q,
        largest=microbatches.LARGEST[platform],
        assignment=assignment,
        host_of_device=[host for host in range(hosts) for _ in range(per_host)],
    )
    limit = microbatches.LARGEST[platform]
    assert 1 <= chosen <= limit
    best = min(simulated(physical) for physical in {chosen, *range(1, min(limit, 40)), *range(40, limit + 1, 4)})
    assert simulated(chosen) <= 1.02 * best + 1


def test_a_fixed_batch_fits_one_microbatch_exactly() -> None:
    """With q = 1 every device has exactly 50 examples, so nothing is padded."""
    chosen = choose_physical_batch(
        dataset_size=400, sampling_probability=1.0, host_of_device=[0] * 8, assignment="balanced", largest=64
    )
    assert chosen == 50


@pytest.mark.parametrize(
    ("hosts", "assignment", "useful"),
    [
        (4, "shard", 0.980),
        (10, "shard", 0.960),
        (20, "shard", 0.895),
        (4, "balanced", 0.992),
        (10, "balanced", 0.977),
        (20, "balanced", 0.977),
        (4, "chunks", 0.992),
        (10, "chunks", 0.977),
        (20, "chunks", 0.977),
    ],
)
def test_the_useful_fraction_of_device_time_is_as_designed(hosts: int, assignment: How, useful: float) -> None:
    """N = 50,000, B = 25,000, 4 devices a host, microbatches of 32 and no smaller ones."""
    steps = assignments(50_000, 0.5, hosts, 4, assignment, 32, 32)
    examples = sum(len(p.sample) for p in steps)
    rows = 4 * hosts * sum(sum(busiest(p)) for p in steps)
    assert abs(examples / rows - useful) < 0.006


def test_the_small_microbatch_saves_padding() -> None:
    padding = []
    for tail in (tail_of(32), 32):
        steps = [
            p for q in (0.018, 0.019, 0.02, 0.021, 0.022) for p in assignments(50_000, q, 2, 4, "balanced", 32, tail)
        ]
        padding.append(np.mean([sum(busiest(p)) - len(p.sample) / 8 for p in steps]))
    assert padding[0] < 0.7 * padding[1]


@pytest.mark.parametrize(("physical", "tail"), [(1, 1), (3, 1), (4, 2), (8, 4), (64, 32)])
def test_the_tail_is_half(physical: int, tail: int) -> None:
    assert tail_of(physical) == tail


@pytest.mark.parametrize(
    ("fixed", "each", "limit", "answer", "compiles"),
    [
        (0, 10, 10_000, 512, 1),  # everything fits
        (0, 10, 1_000, 100, 2),
        (600, 10, 1_000, 40, 3),  # the first line through the origin misses what every size needs
        (995, 10, 1_000, 1, 4),  # nothing fits, and that is the caller's to say
        (0, 3_000, 1_000, 1, 2),
    ],
)
def test_the_largest_batch_is_read_from_few_compiled_programs(
    fixed: int, each: int, limit: int, answer: int, compiles: int
) -> None:
    asked: list[int] = []

    def needed(physical: int) -> int:
        asked.append(physical)
        return fixed + each * physical

    assert largest_that_fits(lambda largest: largest, 512, needed, limit) == answer
    assert len(asked) <= compiles
    assert asked == sorted(asked, reverse=True)


def test_a_batch_that_fits_is_the_one_that_pads_least_below_the_limit() -> None:
    def prefer_multiples_of_ten(largest: int) -> int:
        return max(1, largest - largest % 10)

    assert largest_that_fits(prefer_multiples_of_ten, 64, lambda p: p * 7, limit=300) == 40
