"""A1: values of a released parameter that noise alone cannot give tell that a record was there.

The attacker knows the initial parameters (zeros), the learning rate and the noise's scale, and all of the data but one
record. Once noise was a float32 draw times the scale in float32. That product takes at most 86 of 100 float32
values where the scale's mantissa is 1.5: a value it cannot take is proof that something was added. In a run of epsilon
0.1 exported as "holds", 94 to 112 of 1,000 coordinates were such proofs with the record, and none without.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from scipy import stats

ROOT = Path(__file__).parents[2]
SIZE, COORDINATES = 64, 20_000
#: A power of two, so that nothing is rounded when the mean is multiplied by it again.
BATCH = 64
#: Mantissa 1.5, the worst: times 1 + slack it is still next to that.
SIGMA = 96.0
MODULE = """
import jax.numpy as jnp
import numpy as np
from dpdist.data import ArraySource
from dpdist.models import Model

def data(present):
    x = np.zeros(({size}, {coordinates}), np.float32)
    if present:
        x[17] = np.random.default_rng(3).normal(size={coordinates}).astype(np.float32)
    return ArraySource({{"x": x}}), None

def model():
    init = lambda key: {{"w": jnp.zeros({coordinates})}}
    return Model(init=init, apply=lambda params, example: jnp.sum(params["w"] * example["x"]))

def loss(value, example):
    return value
"""


def released(directory: Path, present: bool) -> np.ndarray:
    """The noisy sum of the first step, as anybody can read it off what a real run gives away."""
    directory.mkdir()
    (directory / "mine.py").write_text(MODULE.format(size=SIZE, coordinates=COORDINATES))
    run, given = directory / "run", directory / "given"
    tree = {
        "data": {"source": "mine:data", "options": {"present": present}},
        "model": {"name": "mine:model", "loss": "mine:loss"},
        "privacy": {"noise_multiplier": SIGMA, "delta": 1e-3, "clip_norm": 1.0},
        "sampling": {"expected_batch_size": BATCH},
        "optimizer": {"learning_rate": 1.0},
        "training": {"steps": 1},
        "run": {"dir": str(run), "plots": False},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))
    for arguments in (["train", "run.yaml"], ["export", str(run), "--to", str(given)]):
        command = [sys.executable, "-m", "dpdist_launch", *arguments]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert json.loads((given / "privacy.json").read_text())["guarantee"] == "holds"
    return -load_file(given / "params.safetensors")["w"] * np.float32(BATCH)


def impossible(values: np.ndarray, scale: float) -> int:
    """How many of the values are no float32 number times `scale`, rounded to float32."""
    scaled, found = np.float32(scale), np.zeros(values.shape, bool)
    nearest = (values.astype(np.float64) / float(scaled)).astype(np.float32)
    for candidate in (np.nextafter(nearest, -np.inf), nearest, np.nextafter(nearest, np.inf)):
        found |= candidate * scaled == values
    return int((~found).sum())


def test_the_attack_works_where_noise_is_a_float32_draw_times_its_scale() -> None:
    random = np.random.default_rng(0)
    noise = random.standard_normal(COORDINATES).astype(np.float32) * np.float32(SIGMA)
    record = random.normal(size=COORDINATES) / np.sqrt(COORDINATES)
    assert impossible(noise, SIGMA) == 0
    assert impossible(noise + record.astype(np.float32), SIGMA) > 0.02 * COORDINATES


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    root = tmp_path_factory.mktemp("impossible")
    return [released(root / str(present), present) for present in (False, True)]


def test_no_value_is_proof_of_a_record(runs: list[np.ndarray]) -> None:
    without, present = (impossible(values, SIGMA) for values in runs)
    # As many values are strange to a float32 draw with the record as without it.
    table = [[without, COORDINATES - without], [present, COORDINATES - present]]
    assert without > 0
    assert stats.fisher_exact(table).pvalue > 1e-5


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_low_bits_of_what_is_released_are_those_of_noise(runs: list[np.ndarray], bits: int) -> None:
    """Of the float32 numbers themselves, whose last bits a scale that is not onto leaves uneven."""
    for values in runs:
        counts = np.bincount(values.view(np.uint32) & (2**bits - 1), minlength=2**bits)
        assert stats.chisquare(counts).pvalue > 1e-5
