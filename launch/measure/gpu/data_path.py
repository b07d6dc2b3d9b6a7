"""`dpdist bench step` on images that are read from files: ViT-B/16 in bfloat16 on 32x32 images, resized on the device.

usage: python -m dpdist_launch.measure.gpu.data_path --to FILE [--tiny]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dpdist import config
from dpdist.run.directory import write_atomically
from dpdist_launch.measure.bench.step import bench_step
from dpdist_launch.measure.gpu import platform

CLASSES = 100


def settings(data: Path, *, tiny: bool) -> dict[str, Any]:
    """Return the config as a dict."""
    model: dict[str, Any] = {"name": "vit", "options": {"variant": "B/16", "dtype": "bfloat16"}}
    if tiny:
        model["options"] |= {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "patch": 8, "image_size": 32}
    return {
        "data": {"source": "npy", "path": str(data)},
        "model": model | {"classes": CLASSES},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "privacy": {"noise_multiplier": 1.0, "delta": 1e-5, "clip_norm": 1.0},
        "sampling": {"expected_batch_size": 32 if tiny else 512},
        "training": {"steps": 20, "physical_batch_size": 8 if tiny else 64},
        "cluster": {"platform": platform(), "devices_per_process": 1},
    }


def main() -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        count = 256 if options.tiny else 20_000
        np.save(Path(directory) / "train_image.npy", rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
        np.save(Path(directory) / "train_label.npy", rng.integers(0, CLASSES, count).astype(np.int32))
        given = config.from_dict(settings(Path(directory), tiny=options.tiny))
        report = bench_step(given, steps=3 if options.tiny else 8)
    write_atomically(options.to, json.dumps(report, indent=2) + "\n")
    print(f"{report['examples_per_second']:.1f} examples/s, {report['fractions']['accumulate']:.0%} in accumulate")
    return 0


if __name__ == "__main__":
    sys.exit(main())
