"""The step plan: every sampled example is processed once, on any layout, in shapes compiled beforehand."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdist.mechanism.sampling import Assignment, assign, microbatch_sizes, shard_bounds

property_test = settings(derandomize=True, deadline=None, max_examples=120)


@st.composite
def layouts(draw: st.DrawFn) -> list[int]:
    """Hosts of the mesh's devices: up to 9 hosts with 1 to 4 devices each, in any order."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=9))
    devices = [host for host, count in enumerate(counts) for _ in range(count)]
    return draw(st.permutations(devices))


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 300))
    physical = draw(st.integers(1, 24))
    return {
        "sample": np.array(sorted(draw(st.sets(st.integers(0, size - 1)))), np.int64),
        "dataset_size": size,
        "host_of_device": draw(layouts()),
        "physical": physical,
        "tail": draw(st.integers(1, physical)),
    }


def processed(plan: Assignment, device: int) -> tuple[list[int], int]:
    """(the examples of one device in order, its rows of padding)."""
    rows = [plan.rows(device, m) for m in range(len(plan.microbatches))]
    assert [len(r) for r in rows] == list(plan.microbatches)
    flat = np.concatenate(rows) if rows else np.empty(0, np.int64)
    real = flat >= 0
    assert set(flat[~real]) <= {-1}
    assert not np.any(np.diff(real.astype(int)) > 0)  # padding comes after all examples
    return flat[real].tolist(), int((~real).sum())


@given(situations(), st.sampled_from(["balanced", "shard"]))
@property_test
def test_every_sampled_example_is_processed_once(
    situation: dict[str, Any], assignment: Literal["balanced", "shard"]
) -> None:
    plan = assign(0, assignment=assignment, **situation)
    devices = range(len(situation["host_of_device"]))
    everything = [example for device in devices for example in processed(plan, device)[0]]
    assert sorted(everything) == situation["sample"].tolist()


@given(situations())
@property_test
def test_balanced_gives_every_device_the_same_number_but_one(situation: dict[str, Any]) -> None:
    plan = assign(0, assignment="balanced", **situation)
    counts = [len(processed(plan, device)[0]) for device in range(len(situation["host_of_device"]))]
    assert max(counts) - min(counts) <= 1


@given(situations())
@property_test
def test_shard_gives_a_host_only_its_own_shard(situation: dict[str, Any]) -> None:
    plan = assign(0, assignment="shard", **situation)
    hosts = situation["host_of_device"]
    bounds = shard_bounds(situation["dataset_size"], max(hosts) + 1)
    for device, host in enumerate(hosts):
        mine = processed(plan, device)[0]
        assert all(bounds[host] <= example < bounds[host + 1] for example in mine)
        siblings = [len(processed(plan, d)[0]) for d, h in enumerate(hosts) if h == host]
        assert max(siblings) - min(siblings) <= 1


@given(situations(), st.sampled_from(["balanced", "shard"]))
@property_test
def test_only_the_two_compiled_shapes_occur(
    situation: dict[str, Any], assignment: Literal["balanced", "shard"]
) -> None:
    plan = assign(0, assignment=assignment, **situation)
    assert set(plan.microbatches) <= {situation["physical"], situation["tail"]}


@given(st.integers(0, 5000), st.integers(1, 600), st.data())
@property_test
def test_microbatches_cover_the_batch_and_waste_less_than_a_tail(largest: int, physical: int, data: Any) -> None:
    tail = data.draw(st.integers(1, physical))
    sizes = microbatch_sizes(largest, physical, tail)
    assert set(sizes) <= {physical, tail}
    assert list(sizes) == sorted(sizes, reverse=True)
    assert largest <= sum(sizes) < largest + tail
    assert len(sizes) <= largest // physical + -(-physical // tail)


@pytest.mark.parametrize("assignment", ["balanced", "shard"])
def test_an_empty_sample_needs_no_microbatch(assignment: Literal["balanced", "shard"]) -> None:
    plan = assign(
        0,
        np.empty(0, np.int64),
        assignment=assignment,
        dataset_size=100,
        host_of_device=[0, 0, 1, 1],
        physical=8,
        tail=2,
    )
    assert plan.microbatches == ()


@pytest.mark.parametrize("assignment", ["balanced", "shard"])
def test_a_larger_sample_takes_more_microbatches_of_the_same_shapes(assignment: Literal["balanced", "shard"]) -> None:
    plans = [
        assign(
            0,
            np.arange(0, 10_000, stride),
            assignment=assignment,
            dataset_size=10_000,
            host_of_device=[0, 0, 1, 1],
            physical=64,
            tail=16,
        )
        for stride in (100, 10, 1)
    ]
    assert [set(plan.microbatches) <= {64, 16} for plan in plans] == [True] * 3
    assert len(plans[0].microbatches) < len(plans[1].microbatches) < len(plans[2].microbatches)
    assert sum(plans[2].microbatches) >= 2500


def test_the_plan_depends_on_nothing_but_its_arguments() -> None:
    sample = np.arange(3, 90, 4)
    plans = [
        assign(5, sample.copy(), assignment="balanced", dataset_size=100, host_of_device=(0, 1), physical=8, tail=2)
        for _ in range(2)
    ]
    assert (plans[0].slices, plans[0].microbatches) == (plans[1].slices, plans[1].microbatches)
