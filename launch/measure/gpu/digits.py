"""Train configs/digits.yaml undisturbed, and again with a SIGKILL in its midst and a resume; compare what came out.

usage: python -m dpdist_launch.measure.gpu.digits --to DIR [--tiny]

With `privacy.insecure_seed` both runs have the same secret, and the resumed one goes on from its last checkpoint. So
their parameters agree bit for bit where the device computes alike every time; whether they do is said, and no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dpdist.run.directory import write_atomically
from dpdist_launch.measure.gpu import platform

ROOT = Path(__file__).parents[3]
KEPT = ("status", "step", "steps", "accuracy", "epsilon", "guarantee", "incarnation", "params_sha256")


def command(run: Path, *, steps: int, every: int) -> list[str]:
    """Return the command that trains digits into `run`."""
    return [
        *(sys.executable, "-m", "dpdist_launch", "train", str(ROOT / "configs" / "digits.yaml")),
        *("--run-dir", str(run), "privacy.insecure_seed=1", "run.progress=lines", "run.log_every=1"),
        # The config is for a laptop: two CPU devices.
        *(f"cluster.platform={platform()}", "cluster.devices_per_process=1"),
        *(f"training.steps={steps}", f"checkpoint.every_steps={every}"),
    ]


def train(run: Path, *, steps: int, every: int, kill_after: int | None = None) -> dict[str, Any]:
    """Train, and kill the process once `kill_after` steps are in the metrics; returns how it ended."""
    began = time.monotonic()
    with (run.parent / f"{run.name}.log").open("ab") as log:
        process = subprocess.Popen(
            command(run, steps=steps, every=every), stdout=log, stderr=log, cwd=ROOT, env=_environment(run.parent)
        )
        while kill_after is not None and process.poll() is None:
            if reached(run) >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        code = process.wait()
    found: dict[str, Any] = {"exit": code, "seconds": time.monotonic() - began, "reached": reached(run)}
    try:
        summary = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return found
    return found | {name: summary.get(name) for name in KEPT}


def _environment(work: Path) -> dict[str, str]:
    """Return variables with a compilation cache: the second and third run compile nothing again."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(work / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**cache, **os.environ}


def reached(run: Path) -> int:
    """Return the last step in the run's metrics; 0 before there is one."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line).get("step", 0))
        except ValueError:  # half a line: the process is writing it
            continue
    return 0


def main() -> int:
    """Run the program; it fails unless both runs finish and the killed one was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sizes = {"steps": 40, "every": 10} if options.tiny else {"steps": 400, "every": 50}
    work = options.to.with_suffix(".runs")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    content: dict[str, Any] = {"what": "configs/digits.yaml, undisturbed, then killed and resumed", **sizes}

    def note(**found: Any) -> None:
        content.update(found)
        write_atomically(options.to, json.dumps(content, indent=2) + "\n")

    note(undisturbed=train(work / "undisturbed", **sizes))
    note(killed=train(work / "killed", **sizes, kill_after=(sizes["steps"] + sizes["every"]) // 2))
    note(resumed=train(work / "killed", **sizes))
    whole, again = content["undisturbed"], content["resumed"]
    note(
        killed_in_its_midst=content["killed"]["exit"] == -signal.SIGKILL,
        same_parameters=whole.get("params_sha256") is not None and whole["params_sha256"] == again.get("params_sha256"),
    )
    finished = all(run["exit"] == 0 and run.get("step") == sizes["steps"] for run in (whole, again))
    print(
        f"{'both finished' if finished else 'NOT both finished'}, killed at step {content['killed']['reached']}, "
        f"parameters {'the same' if content['same_parameters'] else 'differ'} after the resume"
    )
    shutil.rmtree(work, ignore_errors=finished)
    return 0 if finished and content["killed_in_its_midst"] else 1


if __name__ == "__main__":
    sys.exit(main())
