"""`dpdist audit`: run what trains, try to tell from its results who was in it, and compare that with what is claimed.

The ranks of the mechanism's part run this module; the trainings are `dpdist train` itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdist.errors import InputError
from dpdist_launch.paths import path_argument

if TYPE_CHECKING:
    from dpdist.audit.checks import Check
    from dpdist.audit.training import TrainingPlan

EXIT_DONE, EXIT_REFUTED = 0, 1


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    audit = commands.add_parser(
        "audit",
        help="test the guarantee: run what trains many times, and bound epsilon from below",
        description="Run the real training step, on made-up records, thousands of times with and without one record, "
        "and whole trainings with many such records, and try to tell them apart. That bounds epsilon from below. Exit "
        "codes: 0 no claim is refuted, 1 one is (a bug, or one audit in 20), 2 bad input. See docs/audit.md.",
    )
    audit.add_argument("--short", action="store_true", help="fewer runs: a minute or two instead of about ten")
    audit.add_argument("--processes", type=int, default=1, metavar="P", help="processes of the job on this machine (1)")
    audit.add_argument("--devices", type=int, default=1, metavar="D", help="CPU devices of each process (1)")
    audit.add_argument("--confidence", type=float, default=0.95, help="of all bounds together (0.95)")
    audit.add_argument("--json", action="store_true", help="print one JSON object")
    audit.add_argument("--to", type=path_argument, metavar="FILE", help="write the JSON object to FILE too")
    audit.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audit, print what was found, and return 1 where a claim is refuted."""
    if not 0.5 <= options.confidence < 1:
        raise InputError("--confidence", options.confidence, "give a number from 0.5 to below 1, such as 0.95.")
    for name in ("processes", "devices"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}", getattr(options, name), "give at least 1.")
    began = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):  # what ranks print is no part of the answer
        report = audit(
            short=options.short, processes=options.processes, devices=options.devices, confidence=options.confidence
        )
    report["seconds"] = round(time.monotonic() - began, 1)
    if options.to is not None:
        options.to.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report) if options.json else text(report))
    return EXIT_REFUTED if report["refuted"] else EXIT_DONE


def audit(*, short: bool, processes: int, devices: int, confidence: float) -> dict[str, Any]:
    """Run all checks in jobs of this shape.

    Raises:
        RuntimeError: a job failed; its output says why.
    """
    import dpdist
    from dpdist.audit.checks import TRAININGS, Check, check_training, confidence_each, report, runs_of_settings

    each = confidence_each(confidence)
    with tempfile.TemporaryDirectory(prefix="dpdist-audit-") as name:
        folder = Path(name)
        given = {
            "runs": runs_of_settings(short=short),
            "devices": devices,
            "confidence": each,
            "to": str(folder / "mechanism.json"),
        }
        run_ranks("dpdist_launch.audit", [json.dumps(given)], processes, devices)
        checks = [Check(**record) for record in json.loads((folder / "mechanism.json").read_text())]
        trained = [_train(plan, folder / plan.name, processes, devices) for plan in TRAININGS]
        for plan, (parts, epsilon) in zip(TRAININGS, trained, strict=True):  # JAX starts here: no fork may follow
            released = [dpdist.load(part).params for part in parts]
            checks.append(check_training(plan, folder / plan.name, released, epsilon_claimed=epsilon, confidence=each))
            _say(checks[-1])
    return report(checks, confidence=confidence) | {"processes": processes, "devices_per_process": devices}


def run_ranks(module: str, argv: list[str], processes: int, devices: int) -> None:
    from dpdist_launch.local import run_part
    from dpdist_launch.ranks import PYTHON

    if (code := run_part(argv, processes, devices, program=(*PYTHON, "-m", module))) != 0:
        raise RuntimeError(f"the audit's job ended with code {code}")


def _train(plan: TrainingPlan, folder: Path, processes: int, devices: int) -> tuple[list[Path], float]:
    """Train as the plan says with `dpdist train`; returns a copy of the run after each part, and the epsilon stated."""
    import yaml

    from dpdist.run.directory import RunDirectory

    folder.mkdir()
    run_dir, parts, epsilon = folder / "run", [], 0.0
    for part, settings in enumerate(plan.configs(folder)):
        file = folder / f"part-{part}.yaml"
        cluster = {"cluster": {"platform": "cpu", "devices_per_process": devices}}
        file.write_text(yaml.safe_dump(settings | cluster))
        run_ranks("dpdist_launch", ["train", str(file)], processes, devices)
        summary = RunDirectory(run_dir).read_summary()
        if summary is None or summary["status"] != "finished":
            raise RuntimeError(f"the training {plan.name!r} did not finish")
        parts.append(Path(shutil.copytree(run_dir, folder / f"released-{part}")))
        epsilon = summary["epsilon"]
    return parts, epsilon


def _say(check: Check) -> None:
    print(_line(dataclasses.asdict(check)), file=sys.stderr, flush=True)


def _line(check: dict[str, Any]) -> str:
    return (
        f"{check['name']:<13} delta {check['delta']:<6g} epsilon is at least {check['epsilon_lower']:5.2f}, "
        f"claimed {check['epsilon_claimed']:5.2f}: "
        + ("REFUTED" if check["epsilon_lower"] > check["epsilon_claimed"] else "not refuted")
    )


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    said = (
        "A CLAIM IS REFUTED: the guarantee does not hold as stated."
        if report["refuted"]
        else "No claim is refuted. That is no proof: an audit finds bugs, and never shows that there are none."
    )
    where = f"{report['processes']} process(es) with {report['devices_per_process']} CPU device(s) each"
    lines = [_line(check) for check in report["checks"]]
    return "\n".join([*lines, f"All bounds together: confidence {report['confidence']:g}; {where}.", said])


def _rank(given: dict[str, Any]) -> None:
    """The mechanism's part of an audit, as one process of the job."""
    from dpdist.audit.checks import mechanism_checks
    from dpdist.cluster.join import join, leave
    from dpdist.config import Cluster

    world = join(Cluster(platform="cpu", devices_per_process=given["devices"]))
    checks = []
    for check in mechanism_checks(world, given["runs"], confidence=given["confidence"]):
        checks.append(check)
        if world.is_main:
            _say(check)
    if world.is_main:
        Path(given["to"]).write_text(json.dumps([dataclasses.asdict(check) for check in checks]))
    leave()


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
