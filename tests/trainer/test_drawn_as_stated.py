"""What a run samples, groups and draws by its own secret is what its ledger states: recomputed from outside the run."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jobs import CONFIG, STEPS, Jobs, Run, lines, wait_all

from dpdist.mechanism.grid import choose_grid
from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.noise import block_size, integer_noise
from dpdist.mechanism.sampling import in_random_order, poisson_sample

PHYSICAL = CONFIG["training"]["physical_batch_size"]


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reads") / "rows.jsonl"


@pytest.fixture(scope="module")
def run(jobs: Jobs, reads: Path) -> Run:
    run = jobs.new("noted")
    wait_all([jobs.train(run, "data.source=userland:noting", f"data.options={{file: {reads}}}")])
    return run


@pytest.fixture(scope="module")
def keys(run: Run) -> Keys:
    return Keys(Secret.from_insecure_seed(CONFIG["privacy"]["insecure_seed"]), bytes.fromhex(run.plan["nonce"]))


def test_examples_share_a_product_by_an_order_of_its_own_key(run: Run, keys: Keys, reads: Path) -> None:
    """Not sorted, nor by the sampling key, by which the order would depend on who is in the sample."""
    plan, read = run.plan, [tuple(rows) for rows in lines(reads)]
    position = 0
    for step in range(STEPS):
        sample = poisson_sample(keys.sampling(step), plan["sampling_probability"], 0, plan["dataset_size"])
        order = in_random_order(sample, keys.order(step))
        for start in range(0, len(order), PHYSICAL):
            chunk = tuple(np.sort(order[start : start + PHYSICAL]).tolist())
            position = read.index(chunk, position) + 1  # in this order: read ahead, and once


def test_the_noise_has_the_standard_deviation_of_sigma_times_the_sensitivity(run: Run, keys: Keys) -> None:
    """To the last bit: sigma C (1 + rho), rho being that of two products, on the grid that the ledger names."""
    plan: dict[str, Any] = run.plan
    clip, sigma, size = plan["clip_norm"], plan["noise_multiplier"], plan["coordinates"]
    grid = choose_grid(clip_norm=clip, noise_multiplier=sigma, coordinates=size, dataset_size=plan["dataset_size"])
    assert (plan["grid"], plan["grid_slack"]) == (grid.spacing, grid.slack)
    assert grid.slack >= 2 * grid.spacing * math.sqrt(size) / clip > 0
    units = sigma * clip * (1 + grid.slack) * (1 + 2.0**-50) / grid.spacing
    assert units > sigma * clip / grid.spacing + 100  # rho is seen in the bits below
    blocks = -(-size // block_size(size))
    with jax.enable_x64(True):
        draw = jax.jit(partial(integer_noise, coordinates=size, units=units))
        drawn = [np.asarray(draw(keys.noise(step, blocks))).astype("<i8") for step in range(STEPS)]
    found = {step: noise for step, (_, noise) in run.digests.items()}
    assert found == {step: hashlib.sha256(noise.tobytes()).hexdigest() for step, noise in enumerate(drawn)}
