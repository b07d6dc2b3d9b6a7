"""From config and plan to what runs: the model, the optimizer and the compiled step, within device memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dpdist import models
from dpdist import optimizer as optimizers
from dpdist.batching import choose_physical_batch, tail_of
from dpdist.cluster.agreement import gather
from dpdist.cluster.job import Job
from dpdist.config import Config
from dpdist.data import Dataset
from dpdist.data.sources import Source
from dpdist.errors import InputError
from dpdist.evaluate import Evaluator
from dpdist.mechanism.clipping import clipped_grad_sum, plain_grad_sum
from dpdist.mechanism.ledger import Plan
from dpdist.mechanism.step import Step, TrainState, initial_state


@dataclass(frozen=True, kw_only=True)
class Programs:
    """What is compiled for a run, and the state it starts from."""

    model: models.Model
    step: Step
    initial: TrainState
    #: Shapes and dtypes of one training example, by column.
    example: dict[str, jax.ShapeDtypeStruct]
    #: None where there is nothing to evaluate on.
    evaluator: Evaluator | None
    classes: int | None
    #: Physical batch sizes: the full microbatch and the small one for the rest.
    physical: int
    tail: int

    def decisions(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run and a loaded one compile the same programs."""
        example = {name: [list(x.shape), x.dtype.name] for name, x in self.example.items()}
        return {
            "physical_batch_size": self.physical,
            "devices": self.step.devices,
            "classes": self.classes,
            "example": example,
        }


def example_spec(source: Source) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example, by column.

    Raises:
        InputError: a column has the name that a randomised model's key goes by.
    """
    if "key" in source[0]:
        raise InputError("data.source", "column 'key'", "is the name of the random key of an example; rename it.")
    return {name: jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype) for name, value in source[0].items()}


def build_programs(config: Config, plan: Plan, dataset: Dataset, job: Job, earlier: dict[str, Any] | None) -> Programs:
    """Compile everything a run needs, before its first step.

    Args:
        earlier: the `decisions` of an earlier part of the run, or None for a new one.

    Raises:
        InputError: the model or the physical batch size cannot be used.
    """
    example = example_spec(dataset.train)
    classes = config.model.classes or dataset.classes
    model = models.build(config.model, example=example, classes=classes)
    loss_fn = models.example_loss(model)
    optimizer = optimizers.build(config.optimizer, plan.steps_asked)
    initial = initial_state(
        model.init(jax.random.key(config.training.seed)), optimizer, averaged=config.optimizer.average_decay > 0
    )
    if plan.clip_norm is None or plan.noise_multiplier is None:
        grad_sum, clip_norm, noise_scale = plain_grad_sum(loss_fn), float("inf"), None
    else:
        grad_sum = clipped_grad_sum(loss_fn, clip_norm=plan.clip_norm, method=config.training.clipping)
        clip_norm, noise_scale = plan.clip_norm, plan.noise_multiplier * plan.clip_norm

    def compiled(physical: int) -> Step:
        return Step(
            grad_sum=grad_sum,
            state=initial,
            example=example,
            optimizer=optimizer,
            mesh=job.mesh,
            batch_sizes=(physical, tail_of(physical)),
            normaliser=plan.expected_batch_size,
            clip_norm=clip_norm,
            noise_scale=noise_scale,
            placement=config.privacy.noise_placement,
            randomised=model.randomised,
            average_decay=config.optimizer.average_decay,
        )

    decided = None  # an automatic choice is kept while the devices are as many, so that resuming is exact
    if earlier is not None and earlier["devices"] == job.device_count:
        decided = int(earlier["physical_batch_size"])
    asked = config.training.physical_batch_size
    if asked != "auto":
        physical = asked
    elif decided is not None:
        physical = decided
    else:
        physical = choose_physical_batch(
            dataset_size=plan.dataset_size,
            sampling_probability=plan.sampling_probability,
            platform=job.platform,
            host_of_device=job.host_of_device,
            balanced=config.sampling.assignment == "balanced",
        )
    limit = memory_limit(config, job)
    while True:
        step = compiled(physical)
        needed = max(gather(step.peak_bytes(), job, timeout=config.cluster.initialization_timeout))
        if needed <= limit or physical == 1 or decided is not None or asked != "auto":
            break
        physical //= 2
    if needed > limit:
        raise InputError(
            "training.physical_batch_size",
            physical,
            f"needs {needed / 2**30:.2f} GiB of temporary memory "
            f"a device, of {limit / 2**30:.2f}; give a smaller one (or raise cluster.memory_per_device).",
        )
    evaluator = None
    if dataset.test is not None:
        evaluator = Evaluator(
            model,
            initial.params,
            dataset.test,
            job.mesh,
            batch_size=config.training.evaluation_batch_size,
            workers=config.data.workers,
        )
    return Programs(
        model=model,
        step=step,
        initial=initial,
        example=example,
        evaluator=evaluator,
        physical=physical,
        tail=tail_of(physical),
        classes=classes,
    )


def memory_limit(config: Config, job: Job) -> float:
    """Bytes of temporary memory on a device: what the backend reports, or the config's where it does not.

    The smallest over all processes, so that all decide alike.
    """
    statistics = job.mesh.local_devices[0].memory_stats() or {}
    own = float(statistics.get("bytes_limit", config.cluster.memory_per_device * 2**30))
    return min(gather(own, job))
