"""The assignment: every sampled example once, on any layout, in shapes compiled beforehand, in products that stay."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.sampling import Assignment, assign, in_random_order, microbatch_sizes, shard_bounds

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
        "drawn": np.array(draw(st.permutations(sorted(draw(st.sets(st.integers(0, size - 1)))))), np.int64),
        "dataset_size": size,
        "host_of_device": draw(layouts()),
        "physical": physical,
        "tail": draw(st.integers(1, physical)),
    }


HOW = ("chunks", "balanced", "shard")
How = Literal["chunks", "balanced", "shard"]


def processed(plan: Assignment, device: int) -> tuple[list[int], int]:
    """(the examples of one device in order, its rows of padding)."""
    rows = [plan.rows(device, number) for number in range(plan.rounds)]
    assert tuple(len(r) for r in rows if len(r)) == plan.sizes(device)
    assert not any(len(later) and not len(r) for r, later in pairwise(rows))
    for each in rows:
        real = each >= 0
        assert set(each[~real]) <= {-1}
        assert real[: real.sum()].all()  # padding comes after all examples
    flat = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return flat[flat >= 0].tolist(), int((flat < 0).sum())


def assigned(situation: dict[str, Any], how: How) -> Assignment:
    return assign(0, situation["drawn"], assignment=how, **{k: v for k, v in situation.items() if k != "drawn"})


@given(situations(), st.sampled_from(HOW))
@property_test
def test_every_sampled_example_is_processed_once(situation: dict[str, Any], how: How) -> None:
    plan = assigned(situation, how)
    devices = range(len(situation["host_of_device"]))
    everything = [example for device in devices for example in processed(plan, device)[0]]
    assert sorted(everything) == sorted(situation["drawn"]) == plan.sample.tolist()


@given(situations())
@property_test
def test_balanced_gives_every_device_the_same_number_but_one(situation: dict[str, Any]) -> None:
    counts = [len(own) for own in assigned(situation, "balanced").by_device]
    assert max(counts) - min(counts) <= 1


@given(situations())
@property_test
def test_chunks_are_the_same_whatever_the_devices_and_evenly_spread(situation: dict[str, Any]) -> None:
    plan = assigned(situation, "chunks")
    one = assigned(situation | {"host_of_device": [0]}, "chunks")
    devices = range(len(situation["host_of_device"]))
    products = [plan.rows(device, n).tolist() for device in devices for n in range(len(plan.sizes(device)))]
    assert sorted(products) == sorted(one.rows(0, n).tolist() for n in range(one.rounds))
    counts = [len(plan.sizes(device)) for device in devices]
    assert max(counts) - min(counts) <= 1


def test_the_devices_take_turns_in_having_most_to_do() -> None:
    first = Counter()
    for step in range(400):
        plan = assign(
            step,
            np.arange(4),
            assignment="chunks",
            dataset_size=4,
            host_of_device=[0] * 4,
            physical=4,
            tail=1,
        )
        first[[len(own) for own in plan.by_device].index(4)] += 1
    assert stats.chisquare([first[device] for device in range(4)]).pvalue > 1e-5


@given(situations())
@property_test
def test_shard_gives_a_host_only_its_own_shard(situation: dict[str, Any]) -> None:
    plan = assigned(situation, "shard")
    hosts = situation["host_of_device"]
    bounds = shard_bounds(situation["dataset_size"], max(hosts) + 1)
    for device, host in enumerate(hosts):
        mine = plan.by_device[device]
        assert all(bounds[host] <= example < bounds[host + 1] for example in mine)
        siblings = [len(plan.by_device[d]) for d, h in enumerate(hosts) if h == host]
        assert max(siblings) - min(siblings) <= 1


@given(situations(), st.sampled_from(HOW))
@property_test
def test_only_the_two_compiled_shapes_occur(situation: dict[str, Any], how: How) -> None:
    plan = assigned(situation, how)
    sizes = {size for device in range(len(plan.by_device)) for size in plan.sizes(device)}
    assert sizes <= {situation["physical"], situation["tail"]}


@given(situations(), st.sampled_from(HOW), st.data())
@property_test
def test_without_an_example_at_most_two_products_differ(situation: dict[str, Any], how: How, data: Any) -> None:
    """Its own, which the last example of the order (under `shard`, of its host) fills, and the last one's own."""
    drawn = situation["drawn"]
    if not len(drawn):
        return
    hosts = situation["host_of_device"]
    bounds = shard_bounds(situation["dataset_size"], max(hosts) + 1) if how == "shard" else [0, 10**9]
    at = data.draw(st.integers(0, len(drawn) - 1))
    host = int(np.searchsorted(bounds, drawn[at], side="right")) - 1
    last = np.flatnonzero((drawn >= bounds[host]) & (drawn < bounds[host + 1]))[-1]
    without = drawn.copy()
    without[at] = drawn[last]
    without = np.delete(without, last)
    plans = [assigned(situation | {"drawn": order}, how) for order in (drawn, without)]
    products = [
        {(d, n): plan.rows(d, n).tolist() for d in range(len(hosts)) for n in range(len(plan.sizes(d)))}
        for plan in plans
    ]
    changed = [key for key in products[0] | products[1] if products[0].get(key) != products[1].get(key)]
    assert 1 <= len(changed) <= 2


def test_in_sorted_order_one_example_less_moves_nearly_all_others() -> None:
    """What shows that the test above has power, and why the sample is put into an order of its own."""
    plans = [
        assign(0, order, assignment="chunks", dataset_size=100, host_of_device=[0], physical=4, tail=1)
        for order in (np.arange(100), np.arange(1, 100))
    ]
    assert sum(plans[0].rows(0, n).tolist() != plans[1].rows(0, n).tolist() for n in range(25)) == 25


@given(st.integers(0, 5000), st.integers(1, 600), st.data())
@property_test
def test_microbatches_cover_the_batch_with_one_that_is_not_full(examples: int, physical: int, data: Any) -> None:
    tail = data.draw(st.integers(1, physical))
    sizes = microbatch_sizes(examples, physical, tail)
    assert set(sizes) <= {physical, tail}
    assert len(sizes) == -(-examples // physical)
    assert set(sizes[:-1]) <= {physical}
    assert examples <= sum(sizes) < examples + physical


@pytest.mark.parametrize("how", HOW)
def test_an_empty_sample_needs_no_microbatch(how: How) -> None:
    plan = assign(
        0,
        np.empty(0, np.int64),
        assignment=how,
        dataset_size=100,
        host_of_device=[0, 0, 1, 1],
        physical=8,
        tail=2,
    )
    assert plan.rounds == 0


# The order


def test_every_order_of_a_sample_is_equally_likely() -> None:
    sample, keys = np.array([3, 14, 15, 92]), Keys(Secret.from_insecure_seed(5), b"order")
    seen = Counter(tuple(in_random_order(sample, keys.order(step))) for step in range(24 * 400))
    assert len(seen) == 24
    assert stats.chisquare(list(seen.values())).pvalue > 1e-5


def test_the_order_has_a_key_of_its_own() -> None:
    keys = Keys(Secret.from_insecure_seed(5), b"order")
    assert len({tuple(keys.order(step)) for step in range(9)} | {tuple(keys.sampling(step)) for step in range(9)}) == 18
