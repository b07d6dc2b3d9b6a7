"""From config and plan to compiled programs: the model, the optimizer and the step, within device memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from dpdist import models
from dpdist.cluster.agreement import all_gather
from dpdist.cluster.world import World
from dpdist.config import Config
from dpdist.config.lora import read as read_lora
from dpdist.config.user_errors import users_code
from dpdist.data import Dataset
from dpdist.data.checks import require_below, require_values
from dpdist.data.sources import Source, read_rows
from dpdist.data.units import MASK, UnitSource
from dpdist.errors import InputError
from dpdist.mechanism.clipping import UnsupportedLossError
from dpdist.mechanism.clipping.paths import trainable
from dpdist.mechanism.ledger import Plan
from dpdist.mechanism.step import StepPrograms, StepSpec, TrainState
from dpdist.models.augment import augmentation
from dpdist.models.frozen import frozen_paths
from dpdist.models.lora import require_rank
from dpdist.models.tasks import Loss, Task, own_metrics, task_of
from dpdist.models.whole import over_records, over_views
from dpdist.program import optimizer as optimizers
from dpdist.program.evaluate import Evaluator
from dpdist.program.flops import flops_per_example
from dpdist.program.gradients import ExampleLoss, Gradients, build_gradients
from dpdist.program.guards import require_guards
from dpdist.program.host import on_the_host
from dpdist.program.memory import Memory, memory_limit, memory_of
from dpdist.program.microbatches import LARGEST, choose_physical_batch, largest_that_fits, tail_of
from dpdist.program.probe import Probe
from dpdist.program.update import initial_state, update_of


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """The model that a config names, as made for a dataset, with its initial parameters."""

    model: models.Model
    task: models.Task
    #: The user's own test metrics, by name.
    metrics: dict[str, Loss]
    params: Any
    #: Shapes and dtypes, by column, of what the model sees, and of one training example: another thing for units.
    record: dict[str, jax.ShapeDtypeStruct]
    example: dict[str, jax.ShapeDtypeStruct]
    #: The loss of one training example.
    loss: ExampleLoss
    #: Whether each example gets a key.
    randomised: bool
    classes: int | None
    #: Paths of the parameters that do not train.
    frozen: frozenset[str]

    @property
    def coordinates(self) -> int:
        """d, the number of single parameters that train; public."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable(self.params, self.frozen)))


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The compiled programs of a run, and its initial state."""

    model: models.Model
    step_programs: StepPrograms
    initial: TrainState
    #: Shapes and dtypes of what the model sees, by column.
    record: dict[str, jax.ShapeDtypeStruct]
    #: The loss of one training example.
    loss: ExampleLoss
    #: None where there is nothing to evaluate on.
    evaluator: Evaluator | None
    classes: int | None
    #: Looks at a few training examples, on process 0.
    probe: Probe | None
    #: Names of the classes, public constants; None where they have none.
    class_names: tuple[str, ...] | None
    #: Physical batch sizes: the full microbatch and the small one for the rest.
    physical: int
    tail: int
    #: What they need on a device.
    memory: Memory
    #: How the gradient norm of each parameter is computed, by path; None where every gradient is instantiated.
    strategies: dict[str, str] | None
    #: `highest` or `tensor`: the precision of norms and sums.
    precision: str
    #: Floating-point operations an example; None where they are not known.
    flops: float | None

    def decisions(self) -> dict[str, Any]:
        """What a checkpoint keeps so that a resumed or loaded run compiles the same programs, as JSON."""
        example = {name: [list(x.shape), x.dtype.name] for name, x in self.record.items()}
        return {
            "physical_batch_size": self.physical,
            "devices": self.step_programs.devices,
            "classes": self.classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "example": example,
            "clipping": self.strategies,
            "precision": self.precision,
            "leaves": {
                jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
                for path, leaf in jax.tree_util.tree_leaves_with_path(self.initial)
            },
        }


def example_spec(source: Source) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example, by column.

    Raises:
        InputError: a column is called `key`, the name of a randomised model's random key, or holds no values.
    """
    first = read_rows(source, np.zeros(1, np.int64))
    if "key" in first:
        raise InputError("data.source", "column 'key'", "is the name of the random key of an example; rename it.")
    example = {name: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype) for name, rows in first.items()}
    require_values(example)
    return example


def record_spec(source: Source, example: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what the model sees of one training example: of a unit, one of its records."""
    if not isinstance(source, UnitSource):
        return example
    return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in example.items() if name != MASK}


def with_key(example: dict[str, jax.ShapeDtypeStruct], randomised: bool) -> dict[str, Any]:
    """One example as the training loss sees it: with a random key where something is random."""
    return example | {"key": jax.eval_shape(lambda: jax.random.key(0))} if randomised else example


def open_model(config: Config, dataset: Dataset) -> OpenModel:
    """Build the model that `config` names for the examples of `dataset`, and initialise it.

    Raises:
        InputError: the model or the task cannot be used with these examples, or `model.trainable` matches nothing.
    """
    example = example_spec(dataset.train)
    record = record_spec(dataset.train, example)
    if config.data.unit is not None and config.sampling.assignment == "shard":
        remedy = "a unit's records may lie in any part of the data; with data.unit take chunks or balanced."
        raise InputError("sampling.assignment", "shard", remedy)
    classes = config.model.classes or dataset.classes
    task, metrics = task_of(config.model), own_metrics(config.model)
    model = models.build(config.model, example=record, classes=classes)
    if config.model.lora is not None:
        require_rank(model, read_lora(config.model.lora))
    # A model of the user's own may begin with kernels of the accelerator's, or draw differently on every processor.
    where = nullcontext() if ":" in config.model.name else on_the_host()
    with users_code("model.name", config.model.name), where:
        params = model.init(jax.random.key(config.training.seed))
    _require_arrays(config, params)
    if dataset.vocabulary is not None and config.model.name in ("bert", "gpt2", "llama"):
        _require_vocabulary(params, dataset.vocabulary)
    records = dataset.train.source if isinstance(dataset.train, UnitSource) else dataset.train
    _require_fit(config, task, model, params, record, records, "train")
    if dataset.test is not None:
        _require_fit(config, task, model, params, example_spec(dataset.test), dataset.test, "test")
    loss_fn, randomised = models.example_loss(model), model.randomised or config.training.augment is not None
    if config.training.augment is not None:
        augment = augmentation(config.training.augment, config.training.augment_options, record)
        loss_fn = over_views(loss_fn, augment, config.training.views, randomised=model.randomised)
    if isinstance(dataset.train, UnitSource):
        loss_fn = over_records(loss_fn, dataset.train.records, MASK)
    return OpenModel(
        model=model,
        task=task,
        metrics=metrics,
        params=params,
        record=record,
        example=example,
        loss=ExampleLoss(loss_fn=loss_fn, params=params, example=with_key(example, randomised)),
        randomised=randomised,
        classes=classes,
        frozen=frozen_paths(config.model, params),
    )


def _require_vocabulary(params: Any, tokens: int) -> None:
    """Check that a built-in model has a row of its table of words for every token id that the tokenizer gives.

    Raises:
        InputError: it has fewer. More are no error: published tables are often padded.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tables = [leaf for path, leaf in leaves if jax.tree_util.keystr(path, simple=True, separator="/").endswith("words")]
    if tables and tables[0].shape[0] < tokens:
        raise InputError(
            "model.options.vocabulary",
            tables[0].shape[0],
            f"the tokenizer has {tokens} token ids; give {tokens}, or the tokenizer that belongs to the weights.",
        )


def _require_arrays(config: Config, params: Any) -> None:
    """Check that `init` of the user's own model gives arrays of numbers.

    Raises:
        InputError: it gives something else.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            remedy = f"init gave a {type(leaf).__name__} for {name or 'all parameters'}; give arrays."
            raise InputError("model.name", config.model.name, remedy)


def _require_fit(
    config: Config, task: Task, model: models.Model, params: Any, example: dict[str, Any], source: Source, part: str
) -> None:
    """Check the columns of one part of the data, and the model's outputs, by what the task makes of them.

    Raises:
        InputError: they do not fit, or an integer is out of range.
    """
    with users_code("model.name", config.model.name, traced=True):
        outputs = jax.eval_shape(model.apply, params, with_key(example, model.randomised and part == "train"))
    if model.loss is task.loss and not isinstance(outputs, jax.ShapeDtypeStruct):
        remedy = f"apply gave a {type(outputs).__name__}; the task {task.name} takes one array, or give model.loss."
        raise InputError("model.name", config.model.name, remedy)
    if model.loss is not task.loss and part == "train":
        with users_code("model.loss", config.model.loss or config.model.name, traced=True):
            jax.eval_shape(models.example_loss(model), params, with_key(example, model.randomised))
    try:
        below = task.check(example, outputs, part)
    except InputError as error:
        if model.loss is task.loss:
            raise
        if part == "train":
            return  # a loss of the user's own may take anything
        remedy = f"{error.remedy} Or set model.task=none, to measure your own loss alone."
        raise InputError(error.field, error.value, remedy) from None
    for column, bound in below.items():
        classes = task.name == "classification"
        field, value = ("model.classes", bound) if classes else ("data.source", f"column {column!r} of {part}")
        require_below(source, column, bound, field=field, value=value, remedy=task.out_of_range)


def build_setup(
    config: Config,
    plan: Plan,
    opened: OpenModel,
    dataset: Dataset,
    world: World,
    earlier: dict[str, Any] | None,
    compiling: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TrainingSetup:
    """Compile everything a run needs, before its first step.

    Args:
        earlier: the `decisions` of an earlier part of the run, or None for a new one.
        compiling: is entered around all that compiles, equally often on all processes.

    Raises:
        InputError: the model or the physical batch size cannot be used.
    """
    model, params, example, loss = opened.model, opened.params, opened.example, opened.loss
    optimizer = optimizers.build(config.optimizer, plan.steps_asked)
    gradients = build_gradients(config, plan, loss, world, earlier)
    averaged = config.optimizer.average_decay > 0
    with compiling(), on_the_host():
        initial = initial_state(params, optimizer, averaged=averaged, frozen=gradients.frozen)
    terms = plan.privacy

    @cache
    def compiled(physical: int) -> StepPrograms:
        spec = StepSpec(
            grad_sum=gradients.of_batches((physical, tail_of(physical))),
            state=initial,
            example=example,
            update=update_of(optimizer, average_decay=config.optimizer.average_decay, frozen=gradients.frozen),
            mesh=world.mesh,
            batch_sizes=(physical, tail_of(physical)),
            normaliser=plan.expected_batch_size,
            clip_norm=math.inf if terms is None else terms.clip_norm,
            noise_scale=None if terms is None else terms.noise_scale,
            grid=None if terms is None else terms.grid,
            placement=config.privacy.noise_placement,
            randomised=opened.randomised,
            frozen=gradients.frozen,
        )
        try:
            with compiling():
                return StepPrograms(spec)
        except UnsupportedLossError as error:
            raise InputError("training.clipping", config.training.clipping, f"{error}.") from None

    def memory(physical: int) -> Memory:
        return memory_of(
            compiled(physical),
            initial,
            example,
            physical,
            prefetch=config.data.prefetch,
            noisy=terms is not None,
        )

    def needed(physical: int) -> int:
        return max(all_gather(memory(physical).needed, world, timeout=config.cluster.initialization_timeout))

    physical = _physical_batch(config, plan, world, earlier, needed)
    if terms is not None and terms.grid is not None:
        sizes = (physical, tail_of(physical))
        require_guards(
            compiled(physical),
            initial.params,
            example,
            sizes,
            clip_norm=terms.clip_norm,
            grid=terms.grid,
            precision=gradients.precision,
        )
    evaluator = None
    if dataset.test is not None:
        with compiling():
            evaluator = Evaluator(
                model,
                opened.task,
                opened.metrics,
                initial.params,
                dataset.test,
                world.mesh,
                batch_size=config.training.evaluation_batch_size,
                workers=config.data.workers,
            )
    return TrainingSetup(
        model=model,
        step_programs=compiled(physical),
        initial=initial,
        record=opened.record,
        loss=loss,
        evaluator=evaluator,
        probe=_probe(config, loss, gradients, dataset, world) if world.is_main else None,
        physical=physical,
        tail=tail_of(physical),
        memory=memory(physical),
        classes=opened.classes,
        class_names=dataset.label_names,
        strategies=gradients.strategies,
        precision=gradients.precision,
        flops=flops_per_example(compiled(physical), physical),
    )


def _probe(config: Config, loss: ExampleLoss, gradients: Gradients, dataset: Dataset, world: World) -> Probe:
    here = world.num_processes if config.sampling.assignment == "shard" else 1  # data of other hosts may not be here
    return Probe(loss, gradients.frozen, dataset.train, available=max(1, len(dataset.train) // here))


def _physical_batch(
    config: Config, plan: Plan, world: World, earlier: dict[str, Any] | None, needed: Callable[[int], int]
) -> int:
    """The physical batch size: the one asked for, the one decided earlier, or the one that fits and pads least.

    Args:
        needed: bytes a device, by physical batch size; each call compiles.

    Raises:
        InputError: the size asked for, or even the smallest, does not fit.
    """
    limit, asked = memory_limit(config, world), config.training.physical_batch_size
    if asked != "auto":
        physical = asked
    elif earlier is not None and (config.sampling.assignment == "chunks" or earlier["devices"] == world.device_count):
        physical = int(earlier["physical_batch_size"])  # kept while it decides bits, so that resuming is exact
    else:

        def choose(largest: int) -> int:
            return choose_physical_batch(
                dataset_size=plan.dataset_size,
                sampling_probability=plan.sampling_probability,
                host_of_device=world.host_of_device,
                assignment=config.sampling.assignment,
                largest=largest,
            )

        physical = largest_that_fits(choose, LARGEST.get(world.platform, LARGEST["gpu"]), needed, limit)
    if (size := needed(physical)) > limit:
        raise InputError(
            "training.physical_batch_size",
            physical,
            f"needs {size / 2**30:.2f} GiB on a device, state, sums and examples read ahead included, of "
            f"{limit / 2**30:.2f}; give a smaller one or less data.prefetch (or raise cluster.memory_per_device).",
        )
    return physical
