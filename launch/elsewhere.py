"""`dpdist plan --device`: what a config would cost on a cluster that is not here; nothing is compiled or initialised.

The shapes are traced, and times come from a table of devices: operations and bytes, each divided by the rate that a
roofline takes for granted (`dpdist bench roofline`). Neither the weights nor, with `--examples`, the data are needed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np

from dpdist.config import Config
from dpdist.data import Dataset, open_dataset
from dpdist.data.cifar import CIFAR10, CIFAR100
from dpdist.errors import InputError
from dpdist.joint.charging import room_for
from dpdist.mechanism.keys import Keys, Secret, fresh_nonce
from dpdist.mechanism.ledger import Plan
from dpdist.models.families import settled
from dpdist.program import optimizer as optimizers
from dpdist.program.assignments import make_assigner, shape_of_work
from dpdist.program.build import OpenModel, open_model
from dpdist.program.device_rates import PEAK_RATES, device_rates, faster
from dpdist.program.gradients import choose_strategies
from dpdist.program.microbatches import LARGEST, choose_physical_batch, largest_that_fits, tail_of
from dpdist.program.update import initial_state
from dpdist.run.plan import plan_run
from dpdist_launch.measure.bench import roofline, workload
from dpdist_launch.plan import STEPS_LOOKED_AT, facts_of_plan

#: Memory of a device, bytes, of which JAX takes three quarters.
_MEMORY = {"V100": 32e9, "A100": 40e9, "H100": 80e9, "H200": 141e9, "L40S": 48e9}
_TAKEN = 0.75
#: Temporary bytes of clipping, in those that the forward pass's products read and write: 7.1 GB at 32 examples of ViT-B
#: in float32 on an H100 (docs/results/gpu-h100) are 1.1 times these; the rest is caution.
_TEMPORARY = 1.5
#: What built-in sources hold whose data are not here: columns, number of training examples, classes.
_KNOWN: dict[str, tuple[str, int, int]] = {
    "cifar10": ("image=uint8[32,32,3],label=int32[]", 50_000, CIFAR10.classes),
    "cifar100": ("image=uint8[32,32,3],label=int32[]", 50_000, CIFAR100.classes),
    "idx": ("image=uint8[28,28,1],label=uint8[]", 60_000, 10),
}
_EXAMPLE = "image=uint8[224,224,3],label=int32[]"
_COLUMN = re.compile(r"(\w+)=(\w+)\[([\d,]*)\]")


class Shapes:
    """A source of so many examples that are all zeros, in place of data that are not here."""

    def __init__(self, count: int, columns: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        self._count = count
        self._example = {name: np.zeros(x.shape, x.dtype) for name, x in columns.items()}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._example


def plan_elsewhere(
    config: Config, *, device: str, devices: int, per_node: int, examples: int | None, columns: str | None
) -> dict[str, Any]:
    """What training `config` on `devices` of a kind would cost: `plan_report`, with `estimate` beside it.

    Args:
        device: a name in `PEAK_RATES`.
        per_node: devices of a node.
        examples: number of training examples; None takes it from the data, which must then be here.
        columns: `image=uint8[224,224,3],label=int32[]`; None takes them from the data or the built-in source.

    Raises:
        InputError: whatever training would refuse, as far as it shows in shapes; or there is no such device.
    """
    if device not in PEAK_RATES:
        raise InputError("--device", device, f"is in no table; give one of {', '.join(PEAK_RATES)}.")
    for name, value in (("--devices", devices), ("--gpus-per-node", per_node), ("--examples", examples)):
        if value is not None and value < 1:
            raise InputError(name, value, "give at least 1.")
    opened, count = _open(config, examples, columns)
    secret, hosts = Secret.fresh(), tuple(i // per_node for i in range(devices))
    plan = plan_run(
        config, dataset_size=count, coordinates=opened.coordinates, nonce=fresh_nonce(secret), environment="elsewhere"
    )
    private, tensor = plan.privacy is not None, PEAK_RATES[device].tf32 is not None
    precision = {"auto": "tensor" if tensor else "highest"}.get(config.training.precision, config.training.precision)
    if precision == "tensor" and not tensor:
        raise InputError("training.precision", "tensor", f"the {device} has no tensor cores for bfloat16 or TF32.")
    leaves = []
    if private and config.training.clipping != "per_example":
        leaves = choose_strategies(
            opened.loss.loss_fn,
            opened.params,
            opened.loss.example,
            method=config.training.clipping,
            prefer=faster(device_rates(device, "gpu"), tensor=precision == "tensor"),
            strategies=config.training.clipping_strategies,
            frozen=opened.frozen,
        )
    work = workload.workload_of(opened.loss.loss_fn, opened.params, opened.loss.example, frozen=opened.frozen)
    limit = _TAKEN * _MEMORY[device]
    memory = _memory(config, opened, work, plan.steps_asked, private=private)
    physical = _physical(config, plan, hosts, limit, memory)
    keys, tail = Keys(secret, bytes.fromhex(plan.nonce)), tail_of(physical)
    sizes, world = SimpleNamespace(physical=physical, tail=tail), SimpleNamespace(host_of_device=hosts)
    assigner = make_assigner(config, plan, cast(Any, sizes), keys, cast(Any, world))  # it looks at nothing else of both
    shape = shape_of_work(tuple(assigner(step) for step in range(min(STEPS_LOOKED_AT, plan.steps))))
    nodes = math.ceil(devices / per_node)
    busy = plan.expected_batch_size / devices / (1 - shape["padding"])
    return {
        **facts_of_plan(plan),
        "registry": _registry(config, plan),
        "devices": devices,
        "nodes": nodes,
        "physical_batch_size": physical,
        "tail_batch_size": tail,
        **shape,
        "memory": memory(physical) | {"limit_bytes": limit},
        "clipping": {
            "method": config.training.clipping if private else "none",
            "precision": precision if private else None,
            "parameters": [dataclasses.asdict(leaf) | {"seconds": dict(leaf.seconds)} for leaf in leaves],
        },
        "estimate": _estimate(work, config, device, precision if private else None, busy, plan.steps, nodes),
    }


def _open(config: Config, examples: int | None, columns: str | None) -> tuple[OpenModel, int]:
    """The model, its parameters as shapes, and the number of training examples."""
    dataset = _dataset(config, examples, columns)
    kept: list[OpenModel] = []

    def shapes() -> Any:
        kept.append(open_model(_without_weights(config), dataset))  # traced: no weights are read, none are drawn
        return kept[0].params

    params = jax.eval_shape(shapes)
    loss = dataclasses.replace(kept[0].loss, params=params)
    return dataclasses.replace(kept[0], params=params, loss=loss), len(dataset.train)


def _without_weights(config: Config) -> Config:
    """The config without the path of weights; their sizes are those that a config.json there says, if it is here."""
    path = config.model.options.get("pretrained")
    if isinstance(path, str) and Path(path).expanduser().exists():
        config = dataclasses.replace(config, model=settled(config.model))
    options = {name: value for name, value in config.model.options.items() if name != "pretrained"}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, options=options))


def _dataset(config: Config, examples: int | None, columns: str | None) -> Dataset:
    known = _KNOWN.get(config.data.source)
    if columns is None and examples is None:
        try:
            dataset = open_dataset(config.data)
        except InputError as error:
            if known is None:
                remedy = f"{error.remedy} To plan without it, give --examples N and --columns NAME=DTYPE[SHAPE],..."
                raise InputError(error.field, error.value, remedy) from None
        else:
            return dataclasses.replace(dataset, test=None)
    if config.data.unit is not None:
        raise InputError("data.unit", config.data.unit, "groups records by their values: a plan of it needs the data.")
    columns, count = columns or (known[0] if known else None), examples or (known[1] if known else None)
    if columns is None or count is None:
        missing = ("--columns", _EXAMPLE) if columns is None else ("--examples", "50000")
        raise InputError(missing[0], None, f"without the data it is not known; give it, such as {missing[1]}.")
    found = {name: (dtype, shape) for name, dtype, shape in _COLUMN.findall(columns)}
    try:
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), np.dtype(dtype))
            for name, (dtype, shape) in found.items()
        }
    except TypeError as error:
        raise InputError("--columns", columns, f"{error}.") from None
    if ",".join(f"{n}={d}[{s}]" for n, (d, s) in found.items()) != columns.replace(" ", ""):
        raise InputError("--columns", columns, f"write NAME=DTYPE[SHAPE], such as {_EXAMPLE}.")
    return Dataset(train=Shapes(count, shapes), classes=known[2] if known else None, name=config.data.source)


def _registry(config: Config, plan: Plan) -> dict[str, Any] | None:
    """`room_for` the run; of a registry that is not here either, its name alone."""
    if config.run.registry is None or Path(config.run.registry).is_dir():
        return room_for(config, plan)
    return {"dataset": config.run.registry_dataset, "fits": None}


def _memory(config: Config, opened: OpenModel, work: workload.Workload, steps: int, *, private: bool) -> Any:
    """A function from the physical batch to what `plan_report` says of memory; temporary memory is estimated."""
    optimizer = optimizers.build(config.optimizer, steps)
    averaged = config.optimizer.average_decay > 0
    begin = partial(initial_state, optimizer=optimizer, averaged=averaged, frozen=opened.frozen)
    state = jax.eval_shape(begin, opened.params)
    held = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    sums = (8 if private else 4) * opened.coordinates
    row = 8 + sum(math.prod(x.shape) * x.dtype.itemsize for x in opened.example.values())
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(opened.params))
    # What is passed back is kept until then; of the rest, one product at a time.
    kept = _TEMPORARY * max(work.moved_back, work.largest)

    def at(physical: int) -> dict[str, float]:
        read, temporary = (config.data.prefetch + 2) * physical * row, int(physical * kept)
        if private and config.training.clipping == "per_example":
            temporary += 4 * physical * opened.coordinates
        # As `dpdist.program.memory.Memory.needed`.
        update = held + (3 if private else 2) * sums
        return {
            "parameters": total,
            "trainable_parameters": opened.coordinates,
            "state_bytes": held,
            "sums_and_noise_bytes": sums * (2 if private else 1),
            "prefetched_bytes": read,
            "temporary_bytes": temporary,
            "needed_bytes": held + read + max(sums + temporary, update),
        }

    return at


def _physical(config: Config, plan: Any, hosts: tuple[int, ...], limit: float, memory: Any) -> int:
    if config.training.physical_batch_size != "auto":
        physical = int(config.training.physical_batch_size)
        if (needed := memory(physical)["needed_bytes"]) > limit:
            remedy = f"needs about {needed / 2**30:.2f} GiB on a device, of {limit / 2**30:.2f}; give a smaller one."
            raise InputError("training.physical_batch_size", physical, remedy)
        return physical

    def choose(largest: int) -> int:
        return choose_physical_batch(
            dataset_size=plan.dataset_size,
            sampling_probability=plan.sampling_probability,
            host_of_device=hosts,
            assignment=config.sampling.assignment,
            largest=largest,
        )

    return largest_that_fits(choose, LARGEST["gpu"], lambda p: memory(p)["needed_bytes"], limit)


def _estimate(
    work: workload.Workload, config: Config, device: str, precision: str | None, busy: float, steps: int, nodes: int
) -> dict[str, Any]:
    """Hours and node-hours, and what they rest on.

    Args:
        precision: of clipping; None where nothing is clipped.
        busy: examples that the fullest device has time for in a step.
    """
    short = config.model.options.get("dtype") == "bfloat16"
    form = "float32" if PEAK_RATES[device].tf32 is None else "bf16" if short else "tf32"
    rates, at = [each for each in roofline.settings([device]) if each[1].format == form][-1]
    way = "sgd" if precision is None else "highest" if form == "float32" else precision
    seconds = roofline.predict(work, at)[way]["seconds"]
    hours = steps * busy * seconds / 3600
    return {
        "device": device,
        "format": form,
        "rates": rates,
        "seconds_per_example": seconds,
        "seconds_per_step": busy * seconds,
        "hours": hours,
        "node_hours": hours * nodes,
        "not_counted": "start-up, reading data, all-reduce, noise, evaluation, checkpoints",
    }
