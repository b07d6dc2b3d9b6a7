"""`dpdist plan`: what a config would do, without doing it. Programs are compiled, but no step is taken."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from dpdist.cluster.join import join
from dpdist.config import Config
from dpdist.data import open_dataset
from dpdist.errors import InputError
from dpdist.joint.charging import room_for
from dpdist.joint.compose import rounded_up
from dpdist.mechanism.clipping import LeafStrategy
from dpdist.mechanism.keys import Keys, Secret, fresh_nonce
from dpdist.mechanism.ledger import Plan
from dpdist.program.assignments import make_assigner, shape_of_work
from dpdist.program.build import TrainingSetup, build_setup, open_model
from dpdist.program.gradients import strategies_for
from dpdist.program.memory import memory_limit
from dpdist.run.fingerprints import environment
from dpdist.run.plan import plan_run

#: Steps to sample, with a throw-away secret, for the statistics of how the work is assigned.
STEPS_LOOKED_AT = 50


def plan_report(config: Config, *, nodes: int | None = None, gpus_per_node: int = 1) -> dict[str, Any]:
    """What training `config` would cost, as JSON.

    Args:
        nodes: how many nodes share the work; None takes the devices of this process. Memory is that of a program
            compiled for a device of this machine all the same.

    Raises:
        InputError: whatever training would refuse.
    """
    for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if value is not None and value < 1:
            raise InputError(name, value, "give at least 1.")
    world = join(config.cluster)
    if world.num_processes > 1:
        raise InputError("dpdist plan", f"{world.num_processes} processes", "run it in one process.")
    if nodes is not None:
        world = dataclasses.replace(
            world, host_of_device=tuple(i // gpus_per_node for i in range(nodes * gpus_per_node))
        )
    dataset = open_dataset(config.data)
    secret = Secret.fresh()
    opened = open_model(config, dataset)
    plan = plan_run(
        config,
        dataset_size=len(dataset.train),
        coordinates=opened.coordinates,
        nonce=fresh_nonce(secret),
        environment=environment(world.platform),
    )
    registry = room_for(config, plan)
    setup = build_setup(config, plan, opened, dataset, world, earlier=None)
    assigner = make_assigner(config, plan, setup, Keys(secret, bytes.fromhex(plan.nonce)), world)
    work = shape_of_work(tuple(assigner(step) for step in range(min(STEPS_LOOKED_AT, plan.steps))))
    leaves: list[LeafStrategy] = []
    if plan.privacy is not None and config.training.clipping != "per_example":
        leaves = strategies_for(config, setup.loss, world)
    return {
        **facts_of_plan(plan),
        "registry": registry,
        "devices": len(world.host_of_device),
        "nodes": max(world.host_of_device) + 1,
        "physical_batch_size": setup.physical,
        "tail_batch_size": setup.tail,
        **work,
        "memory": _memory(setup, memory_limit(config, world)),
        "clipping": {
            "method": "none" if plan.privacy is None else config.training.clipping,
            "precision": None if plan.privacy is None else setup.precision,
            "parameters": [dataclasses.asdict(leaf) | {"seconds": dict(leaf.seconds)} for leaf in leaves],
        },
    }


def facts_of_plan(plan: Plan) -> dict[str, Any]:
    """What does not depend on the devices."""
    record = plan.to_record()
    names = ("epsilon", "delta", "epsilon_rdp", "accountant", "noise_multiplier", "clip_norm")
    return {
        "privacy": {name: record[name] for name in names},
        "sampling_probability": plan.sampling_probability,
        "dataset_size": plan.dataset_size,
        "expected_batch_size": plan.expected_batch_size,
        "steps": plan.steps,
    }


def _memory(setup: TrainingSetup, limit: float) -> dict[str, float]:
    """Parameters by number, and bytes on one device."""
    memory = setup.memory
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.initial.params)),
        "trainable_parameters": setup.step_programs.parameters,
        "state_bytes": memory.state,
        "sums_and_noise_bytes": memory.sums * (2 if memory.noisy else 1),
        "prefetched_bytes": memory.prefetched,
        "temporary_bytes": memory.temporary,
        "needed_bytes": memory.needed,
        "limit_bytes": limit,
    }


def text(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    privacy, memory, clipping = report["privacy"], report["memory"], report["clipping"]
    lines = [
        f"sampling    q = {report['sampling_probability']:.4g}: {report['expected_batch_size']:g} expected of "
        f"{report['dataset_size']:,} examples, {report['steps']:,} steps"
    ]
    if privacy["epsilon"] is None:
        lines.append("privacy     NONE (privacy.enabled=false)")
    else:
        lines.append(
            f"privacy     epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:g} ({privacy['accountant']}; "
            f"{privacy['epsilon_rdp']:.4g} by Renyi DP), noise multiplier {privacy['noise_multiplier']:.4g}, "
            f"clip norm {privacy['clip_norm']:g}"
        )
    if (search := report.get("search")) is not None:
        lines += _of_search(search)
    if (registry := report["registry"]) is not None:
        lines += _of_registry(registry, searched=search is not None)
    lines += [
        f"devices     {report['devices']} on {report['nodes']} node(s), each {report['microbatches_per_step']:.1f} "
        f"microbatches a step of {report['physical_batch_size']} and {report['tail_batch_size']} examples; "
        f"padding {report['padding']:.1%}, fullest over mean {report['imbalance']:.3f}",
        f"parameters  {memory['parameters']:,}, of which {memory['trainable_parameters']:,} train",
        f"memory      a device: {_size(memory['state_bytes'])} state, {_size(memory['sums_and_noise_bytes'])} sums and "
        f"noise, {_size(memory['prefetched_bytes'])} read ahead, {_size(memory['temporary_bytes'])} temporary; at most "
        f"{_size(memory['needed_bytes'])} at once (limit {_size(memory['limit_bytes'])})",
        "clipping    " + ", precision ".join(filter(None, [clipping["method"], clipping["precision"]])),
    ]
    if (estimate := report.get("estimate")) is not None:
        hours, node_hours = _time(estimate["hours"]), _time(estimate["node_hours"], "node-")
        rates = f"{estimate['rates']} rates of the {estimate['device']} in {estimate['format']}"
        lines.append(
            f"time        about {hours}, {node_hours}: an ESTIMATE of the gradients alone, by {rates} (`dpdist bench "
            f"roofline`); not counted are {estimate['not_counted']}"
        )
    rows = grouped(
        [
            (leaf["path"], "x".join(map(str, leaf["shape"])) or "scalar", leaf["strategy"], _why(leaf))
            for leaf in clipping["parameters"]
        ]
    )
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines += ["  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _of_search(search: dict[str, Any]) -> list[str]:
    """What it costs to choose among several such runs, in two ways."""
    trials, one, sigma = search["expected_trials"], search["epsilon_of_one_run"], search["noise_multiplier_of_search"]
    same = "no noise multiplier" if sigma is None else f"noise multiplier {sigma:.4g}"
    return [
        f"search      {trials:g} expected trials ({search['distribution']}), the best alone released: epsilon "
        f"{search['epsilon_of_search']:.4g}; {search['runs_released']} runs, all released: "
        f"{search['epsilon_of_all_released']:.4g}; one run: {one:.4g}",
        f"            {same} would make the whole search cost {one:.4g} (`dpdist tune`)",
    ]


def _of_registry(registry: dict[str, Any], *, searched: bool) -> list[str]:
    """What the registry of the dataset has left, and whether the run fits."""
    if registry["fits"] is None:
        return [f"registry    {registry['dataset']}: not here, so whether the run fits is not known"]
    spent, cost, budget = registry["epsilon"], rounded_up(registry["epsilon_with_this_run"]), registry["budget"]
    left = "no budget" if budget is None else f"{registry['left']:.4g} of {budget:g} left"
    verdict = "it fits" if registry["fits"] else "IT DOES NOT FIT, and would be refused"
    lines = [
        f"registry    {registry['dataset']}: epsilon {rounded_up(spent)} at delta {registry['delta']:g} spent by "
        f"{registry['runs']} run(s), {left}; with this run {cost}: {verdict}"
    ]
    if searched:
        lines.append("            a search cannot be charged to it: `dpdist tune` refuses a registry")
    return lines


def grouped(rows: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    """Rows of (path, shape, strategy, why), where those of like blocks are one: `layers/*/mlp/kernel (12)`.

    Alike are rows whose paths differ in numbers alone and that agree in all else; they stand where the first stood.
    """
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for path, shape, strategy, why in rows:
        pattern = re.sub(r"(?<![^/.])\d+(?![^/.])", "*", path)
        found.setdefault((pattern, shape, strategy, why), []).append(path)
    return [
        (paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)})", shape, strategy, why)
        for (pattern, shape, strategy, why), paths in found.items()
    ]


def _time(hours: float, kind: str = "") -> str:
    for unit, length in (("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= length:
            return f"{hours / length:,.3g} {kind}{unit}"
    return f"{3600 * hours:.2g} {kind}seconds"


def _why(leaf: dict[str, Any]) -> str:
    if leaf["reason"]:
        return leaf["reason"]
    if not leaf["seconds"]:
        return ""
    return ", ".join(f"{name} {1e6 * seconds:.2g} us" for name, seconds in leaf["seconds"].items()) + " an example"


def _size(count: float) -> str:
    unit = min(3, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**unit:.{0 if unit == 0 else 1}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"
