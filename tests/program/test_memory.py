"""What a device is said to hold while it trains, by hand, and that the physical batch size is chosen by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worlds import alone

import dpdist
from dpdist.data import open_dataset
from dpdist.program.build import build_setup, open_model
from dpdist.program.memory import Memory
from dpdist.run.fingerprints import environment
from dpdist.run.plan import plan_run


def memory_and_batch(run_dir: Path, gib: float, prefetch: int) -> tuple[Memory, int]:
    """What `auto` chooses on a device of so many GiB for digits and an MLP of 64 x 8 + 8 + 8 x 10 + 10 parameters."""
    tree: dict[str, Any] = {
        "data": {"prefetch": prefetch},
        "model": {"name": "mlp", "options": {"hidden": [8]}},
        "privacy": {"noise_multiplier": 4.0, "delta": 1e-4},
        "optimizer": {"learning_rate": 0.5, "momentum": 0.9},
        "sampling": {"expected_batch_size": 256},
        "training": {"steps": 10},
        "cluster": {"memory_per_device": gib},
        "run": {"dir": str(run_dir)},
    }
    config, world = dpdist.from_dict(tree), alone(1)
    dataset = open_dataset(config.data)
    opened = open_model(config, dataset)
    plan = plan_run(
        config,
        dataset_size=len(dataset.train),
        coordinates=opened.coordinates,
        nonce=bytes(32),
        environment=environment("cpu"),
    )
    setup = build_setup(config, plan, opened, dataset, world, earlier=None)
    return setup.memory, setup.physical


def test_it_counts_state_sums_examples_read_ahead_and_temporary_memory(tmp_path: Path) -> None:
    memory, physical = memory_and_batch(tmp_path, 1.0, prefetch=3)
    parameters = 64 * 8 + 8 + 8 * 10 + 10
    # Parameters and momentum; an image of 64 bytes and a label, with mask and index, in five microbatches.
    assert 0 <= memory.state - 2 * 4 * parameters <= 8
    assert memory.sums == 8 * parameters
    assert memory.prefetched == 5 * physical * (64 + 4 + 8)
    assert memory.temporary > 0
    accumulating = memory.state + memory.sums + memory.prefetched + memory.temporary
    updating = 2 * memory.state + 3 * memory.sums + memory.prefetched
    assert memory.needed == max(accumulating, updating)


def test_reading_further_ahead_leaves_room_for_fewer_examples_at_once(tmp_path: Path) -> None:
    gib = 200e3 / 2**30
    (few, smaller), (many, larger) = (memory_and_batch(tmp_path, gib, prefetch) for prefetch in (40, 1))
    assert few.needed <= 200e3
    assert many.needed <= 200e3
    assert smaller < larger
