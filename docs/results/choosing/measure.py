"""Test accuracy on scikit-learn's digits at one epsilon, over learning rate, C, B and T: what docs/choosing.md shows.

    python docs/results/choosing/measure.py docs/results/choosing/results.json

Digits are public, so that nothing is spent by looking. Every point is trained anew with a secret of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import dpdist

EPSILON, DELTA, REPEATS = 3.0, 1e-4, 3
BASE = {"rate": 1.0, "clip": 1.0, "batch": 512, "steps": 60}
SWEEPS = {
    "rate": [0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0],
    # The learning rate goes with 1 / C: where nearly all gradients are clipped, only their product matters.
    "clip": [0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
    "batch": [32, 64, 128, 256, 512, 1024],
    "steps": [8, 15, 30, 60, 120, 240],
}


def accuracy(point, root):
    rate = point["rate"] / point["clip"]
    summary = dpdist.train(
        dpdist.from_dict(
            {
                "data": {"source": "digits"},
                "model": {"name": "mlp", "options": {"hidden": [64], "activation": "tanh", "scale": 16}},
                "optimizer": {"learning_rate": rate, "schedule": "linear", "momentum": 0.9},
                "privacy": {"target_epsilon": EPSILON, "delta": DELTA, "clip_norm": point["clip"]},
                "sampling": {"expected_batch_size": point["batch"]},
                "training": {"steps": point["steps"], "physical_batch_size": 64},
                "checkpoint": {"every_steps": point["steps"]},
                "cluster": {"platform": "cpu", "devices_per_process": 1, "preflight": False},
                "run": {"dir": str(root), "plots": False, "log_every": 1000},
            }
        )
    )
    return {"accuracy": summary["accuracy"], "sigma": summary["noise_multiplier"]}


found = []
with tempfile.TemporaryDirectory() as folder:
    for name, values in SWEEPS.items():
        for value in values:
            for repeat in range(REPEATS):
                point = BASE | {name: value}
                root = Path(folder) / f"{name}-{value}-{repeat}"
                found.append({"sweep": name, "value": value, "repeat": repeat} | accuracy(point, root))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
