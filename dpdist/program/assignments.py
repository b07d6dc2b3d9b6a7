"""Which device processes which examples in each step of a run, and how evenly that fills the devices."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.mechanism.keys import Keys
from dpdist.mechanism.ledger import Plan
from dpdist.mechanism.sampling import Assignment, assign, in_random_order, poisson_sample
from dpdist.program.build import TrainingSetup


def make_assigner(
    config: Config, plan: Plan, setup: TrainingSetup, keys: Keys, world: World
) -> Callable[[int], Assignment]:
    """A pure function from a step to its `Assignment`, equal on every process; the feed calls it on its thread."""

    def assign_one(step: int) -> Assignment:
        sample = poisson_sample(keys.sampling(step), plan.sampling_probability, 0, plan.dataset_size)
        return assign(
            step,
            in_random_order(sample, keys.order(step)),
            assignment=config.sampling.assignment,
            dataset_size=plan.dataset_size,
            host_of_device=world.host_of_device,
            physical=setup.physical,
            tail=setup.tail,
        )

    return assign_one


def share_of_work(assignment: Assignment, devices: Iterable[int]) -> float:
    """The most microbatches on one of `devices`, over the most on any device; 1 where there are none at all."""
    own = max(len(assignment.sizes(device)) for device in devices)
    return own / assignment.rounds if assignment.rounds else 1.0


def shape_of_work(assignments: Sequence[Assignment]) -> dict[str, float]:
    """How evenly the sampled examples filled the devices, over all of `assignments`.

    `padding`: the fraction of slots that held no example, of those that all devices had time for while the busiest
    one computed. `imbalance`: mean over steps of the most examples on a device over the mean of all devices; 1 is
    even. `microbatches_per_step`: mean, of the device that has most.
    """
    slots = sum(
        len(each.by_device) * max(sum(each.sizes(device)) for device in range(len(each.by_device)))
        for each in assignments
    )
    sampled = sum(len(each.sample) for each in assignments)
    uneven = [
        max(map(len, each.by_device)) * len(each.by_device) / len(each.sample)
        for each in assignments
        if len(each.sample)
    ]
    return {
        "padding": 1 - sampled / slots if slots else 0.0,
        "imbalance": statistics.mean(uneven) if uneven else 1.0,
        "microbatches_per_step": statistics.mean(each.rounds for each in assignments),
    }
