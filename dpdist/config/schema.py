"""The settings of a run, a section a frozen dataclass: type, constraints and default in one line, its meaning above it.

Whatever can be checked without data or devices is checked when a section is made: each value by what stands beside
it, and what concerns several values in `check_together`. `docs/settings.md` is made of this file.
"""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dpdist.config.constraints import AtLeast, Between, IsPath, NonEmpty, Positive
from dpdist.config.lora import read as read_lora
from dpdist.config.nearest import did_you_mean
from dpdist.config.section import Section, fields_of
from dpdist.errors import InputError

#: What `optimizer.name` and `optimizer.schedule` may be beside a path, and an example of such a path.
UPDATE_RULES, SCHEDULES = ("sgd", "adam", "adamw"), ("constant", "cosine", "linear")
_PATHS = {"name": "lion", "schedule": "warmup_cosine_decay_schedule"}
CLIPPING_STRATEGIES = ("ghost", "instantiate")


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """Where examples come from."""

    #: `digits`, `idx`, `npy`, `cifar10`, `cifar100`, `image_folder`, `parquet`, `arrow`, `hf`, `webdataset`, `csv`,
    #: `text`, or `module:function` that returns train and test examples: docs/data.md. `python`: passed to
    #: `dpdist.train`.
    source: str = "digits"
    #: Directory or file the source reads; passed to a `module:function` that has a parameter `path`.
    path: Annotated[str | None, IsPath()] = None
    #: Held-out fraction, split by index, where the source has no test set of its own.
    test_fraction: Annotated[
        float, Between(0, 1, remedy="give the held-out share as a number between 0 and 1, such as 0.2.")
    ] = 0.2
    #: Seed of the (public) split by index.
    split_seed: Annotated[int, AtLeast(0)] = 0
    #: The columns an example has, our name: theirs, such as `{image: pixel_values, label: fine_label}`; a list of
    #: theirs is stacked into one float32 column. null keeps all, under their own names.
    columns: dict[str, Any] | None = None
    #: Keyword arguments of a `module:function`. Built-in: `checksum` (CIFAR); `size` and `mode` (`rgb`, `grayscale`) of
    #: images; `classes`, a public list of names; `train` and `test`, names of the parts; `delimiter` (csv);
    #: `tokenizer`, `length` and `pack` (text).
    options: dict[str, Any] = field(default_factory=dict)
    #: The column, of integers or names, that says whose a record is: all records of one person (or household, or
    #: hospital) are then one example, and the guarantee is for that unit. null is for single records.
    unit: str | None = None
    #: The most records that a unit brings, its first ones; their mean loss is the unit's.
    records_per_unit: Annotated[int | None, AtLeast(1)] = None
    #: Threads that call a source's `__getitem__`; array sources need none.
    workers: Annotated[int, AtLeast(1)] = 4
    #: Processes that read examples instead, for a `module:function` that computes in Python, whose lock threads share:
    #: docs/data.md. 0 is threads.
    worker_processes: Annotated[int, AtLeast(0)] = 0
    #: Microbatches held ready on the devices, beyond the one in use.
    prefetch: Annotated[int, AtLeast(1)] = 8

    def check_together(self) -> None:
        both = (self.unit is None) == (self.records_per_unit is None)
        self.require(
            "records_per_unit", both, "give data.unit and data.records_per_unit together: whose records, and how many."
        )
        there = self.unit is None or self.columns is None or self.unit in self.columns
        self.require("unit", there, f"is none of data.columns; add it there: {{{self.unit}: ITS_NAME}}.")
        for ours, theirs in (self.columns or {}).items():
            several = theirs if isinstance(theirs, list) else [theirs]
            if not several or not all(type(name) in (str, int) for name in several):
                remedy = "give the name of a column, or a list of names to stack into one."
                raise InputError(f"data.columns.{ours}", theirs, remedy)
        self.require("columns", self.columns != {}, "name at least one column, or leave it out to keep all.")


@dataclass(frozen=True, kw_only=True)
class Model(Section):
    """What is trained."""

    #: `mlp`, `cnn`, `vit`, `bit_resnet`, `bert`, `gpt2`, `llama`, or `module:function` that returns a
    #: `dpdist.models.Model`.
    name: str = "mlp"
    #: Keyword arguments for that function, e.g. `{hidden: [64], activation: relu}`.
    options: dict[str, Any] = field(default_factory=dict)
    #: What is learned, hence the loss, the test metrics and the columns needed: `classification`, `binary`,
    #: `regression`, `multilabel`, `language_modeling`, `none` (the loss alone is measured), or `module:object`, a
    #: `dpdist.models.Task`. null is `language_modeling` for language models, else `classification`.
    task: str | None = None
    #: `module:function` taking (outputs, example) of one example to a scalar; null is the task's, or the model's own.
    loss: str | None = None
    #: More test metrics by name, each a `module:function` taking (outputs, example) of one test example to a number;
    #: their means are shown.
    metrics: dict[str, str] = field(default_factory=dict)
    #: Number of classes; null takes it from the data source (a public constant there).
    classes: Annotated[
        int | None, AtLeast(2, "give at least 2 classes, or leave it out to take the data source's.")
    ] = None
    #: Paths of the parameters that train, `*` standing for anything: `["head/*"]`. The others stay as they are. null is
    #: all of them; beside `lora` it is the adapters, and a classifier's `head/*`.
    trainable: Annotated[list[str] | None, NonEmpty("name at least one, or leave it out to train all.")] = None
    #: Low-rank adapters beside frozen layers: `{rank: 8, alpha: 16, targets: ["*attention/*/kernel"]}`. alpha / rank
    #: multiplies their product, and targets are kernels of `nnx.Linear` and `nnx.Conv` layers, or of a BiT's
    #: convolutions; left out, alpha is the rank and targets are those of the attention, or of a BiT
    #: `stages/*/conv*/kernel`. What trains beside them, `trainable` says.
    lora: dict[str, Any] | None = None
    #: The format in which matrices that do not train are kept; they cost no norm and no optimizer state in either.
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"

    def check_together(self) -> None:
        if self.lora is not None:
            read_lora(self.lora)


@dataclass(frozen=True, kw_only=True)
class Optimizer(Section):
    """How the noisy gradient moves the parameters (post-processing: costs no privacy)."""

    #: The update rule: `sgd`, `adam`, `adamw`, one of optax by its path, such as `optax.lion`, or `module:function`
    #: that returns an `optax.GradientTransformation`: a pure function of gradient, state and parameters.
    name: str = "sgd"
    #: Keyword arguments for an optimizer of optax or of one's own.
    options: dict[str, Any] = field(default_factory=dict)
    #: Peak learning rate, applied to the noisy mean gradient; null is 1 for `sgd`, and must be given for all others.
    learning_rate: Annotated[float | None, Positive()] = None
    #: How the learning rate goes on from its peak: it stays there (`constant`), or falls to 0 by the last step
    #: (`cosine`, `linear`). Or a schedule by its path, such as `optax.warmup_cosine_decay_schedule`, or
    #: `module:function`: it is given by `schedule_options` alone.
    schedule: str = "constant"
    #: Keyword arguments for a schedule given by its path; `decay_steps` or `transition_steps` is the run's steps unless
    #: it is given.
    schedule_options: dict[str, Any] = field(default_factory=dict)
    #: Steps over which the learning rate rises from 0 to its peak.
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    #: Heavy-ball momentum of `sgd`.
    momentum: Annotated[float, Between(0, 1, closed="left")] = 0.0
    #: Decay of the mean of gradients of `adam` and `adamw`.
    b1: Annotated[float, Between(0, 1, closed="left")] = 0.9
    #: Decay of the mean of squared gradients of `adam` and `adamw`.
    b2: Annotated[float, Between(0, 1, closed="left")] = 0.999
    #: What `adam` and `adamw` add to the root of the mean square before they divide by it.
    eps: Annotated[float, Positive()] = 1e-8
    #: Decoupled weight decay of `adamw`.
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    #: Decay of an exponential average of the parameters, used for evaluation and export; 0 is off.
    average_decay: Annotated[float, Between(0, 1, closed="left")] = 0.0

    def check_together(self) -> None:
        for name, known in (("name", UPDATE_RULES), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            path = value.startswith("optax.") or ":" in value
            meant = did_you_mean(value, known)
            remedy = f"no such choice; {meant}give one of {', '.join(known)}, a path such as optax.{_PATHS[name]}, or "
            self.require(name, value in known or path, f"{remedy}module:function of your own.")
        own, schedule = self.name not in UPDATE_RULES, self.schedule not in SCHEDULES
        self.require("options", own or not self.options, f"{self.name} has settings of its own: momentum, b1, ...")
        self.require("schedule_options", schedule or not self.schedule_options, "they belong to a schedule's path.")
        given = not schedule or (self.learning_rate is None and self.warmup_steps == 0)
        self.require("schedule", given, "gives the rate itself: leave out learning_rate and warmup_steps.")
        if self.learning_rate is None and not schedule:
            needed = "needs a learning rate: 1, as for sgd, would ruin it; give one, such as 1e-3."
            self.require("learning_rate", self.name not in ("adam", "adamw"), f"{self.name} {needed}")
            object.__setattr__(self, "learning_rate", 1.0 if self.name == "sgd" else None)
        for name in ("b1", "b2", "eps") if own else ():
            usual = getattr(self, name) == fields_of(Optimizer)[name].default
            self.require(name, usual, f"belongs to adam; give {self.name} its optimizer.options.")
        momentum = self.name == "sgd" or self.momentum == 0
        self.require("momentum", momentum, f"momentum belongs to sgd; {self.name} has its own settings.")
        decay = self.name == "adamw" or self.weight_decay == 0
        self.require("weight_decay", decay, "weight decay needs optimizer.name=adamw.")


@dataclass(frozen=True, kw_only=True)
class Privacy(Section):
    """What is promised: give `target_epsilon` (sigma is calibrated) or `noise_multiplier`, and `delta`."""

    #: false trains the plain, non-private arm through the same loop.
    enabled: bool = True
    #: The epsilon that the whole run may cost at `delta`.
    target_epsilon: Annotated[float | None, Positive()] = None
    #: The delta of the guarantee; it must be below 1/N, see `allow_large_delta`.
    delta: Annotated[float | None, Between(0, 1, remedy="give a number between 0 and 1.")] = None
    #: Noise standard deviation over the clipping norm. With `target_epsilon` too, training stops at it.
    noise_multiplier: Annotated[
        float | None,
        Between(
            1e-3,
            1e6,
            "both",
            "give a positive, finite number from 0.001 to 1e6, or target_epsilon to have it calibrated; for training "
            "without noise set privacy.enabled=false.",
        ),
    ] = None
    #: Largest L2 norm an example's gradient keeps.
    clip_norm: Annotated[
        float, Between(1e-6, 1e6, "both", "give a number between 1e-6 and 1e6 (norms are summed in float32).")
    ] = 1.0
    #: `designated`: all-reduce, then add the designated device's draw. `fused`: one all-reduce.
    noise_placement: Literal["designated", "fused"] = "designated"
    #: Replaces the secret by a known seed. FOR TESTS: it voids the guarantee.
    insecure_seed: int | None = None
    #: Accept delta >= 1/N, which permits publishing a record outright.
    allow_large_delta: bool = False

    def __post_init__(self) -> None:
        if self.enabled:  # the rest means nothing without it
            super().__post_init__()

    def check_together(self) -> None:
        self.require("delta", self.delta is not None, "set it, to well below 1/N; a common choice is 1e-5.")
        noise = self.target_epsilon is not None or self.noise_multiplier is not None
        self.require("target_epsilon", noise, "give target_epsilon (sigma is calibrated) or noise_multiplier.")


@dataclass(frozen=True, kw_only=True)
class Sampling(Section):
    """Poisson subsampling: every example enters every step with probability q = expected batch / N."""

    #: B = qN, a public constant, and the normaliser of every step.
    expected_batch_size: Annotated[float, Positive()] = 256
    #: `chunks`: of `physical_batch_size` examples whatever the devices, so that parameters have the same bits on any
    #: topology; `balanced`: as even as can be; `shard`: a host processes its own shard of the data alone.
    assignment: Literal["chunks", "balanced", "shard"] = "chunks"


@dataclass(frozen=True, kw_only=True)
class Training(Section):
    """How long, and in what pieces."""

    #: Number of steps T; or give `epochs`.
    steps: Annotated[int | None, AtLeast(1)] = None
    #: Expected passes over the data: T = epochs / q.
    epochs: Annotated[float | None, Positive()] = None
    #: Examples a device processes at once, or `auto`.
    physical_batch_size: Annotated[int | Literal["auto"], AtLeast(1, "give at least 1, or auto.")] = "auto"
    #: Random changes of a training image: `flip`, `crop`, `flip_and_crop`, or `module:function` taking (example, key)
    #: to an example; null is none.
    augment: str | None = None
    #: `{padding: 4}`: by how many pixels `crop` may move an image; or keyword arguments of that function.
    augment_options: dict[str, Any] = field(default_factory=dict)
    #: Augmented views of an example, whose gradients are averaged before they are clipped (De et al. 2022).
    views: Annotated[int, AtLeast(1)] = 1
    #: How clipped sums are computed: the same sum in all; `auto` takes what is fastest for each parameter.
    clipping: Literal["auto", "per_example", "ghost", "bookkeeping"] = "auto"
    #: Of gradient norms and clipped sums. `highest`: float64 norms, float32 sums. `tensor`: both from factors in
    #: bfloat16 (a model of `dtype: bfloat16`) or TF32, on tensor cores; C is lowered by what rounding may lose. `auto`:
    #: `tensor` on GPUs that have these formats.
    precision: Literal["auto", "highest", "tensor"] = "auto"
    #: `ghost` or `instantiate` by parameter path (`*` is anything), instead of what `clipping` would choose.
    clipping_strategies: dict[str, str] = field(default_factory=dict)
    #: Steps between evaluations; null evaluates whenever a checkpoint is due.
    evaluate_every: Annotated[int | None, AtLeast(1, "give at least 1, or leave it out.")] = None
    #: Test examples a device evaluates at once.
    evaluation_batch_size: Annotated[int, AtLeast(1)] = 256
    #: Seed of the initial parameters (public).
    seed: int = 0
    #: Write the SHA-256 of every step's sample and noise to private/diagnostics.jsonl.
    record_digests: bool = False
    #: The first and the last step, `[10, 12]` being the 10th to the 12th, that jax.profiler traces on process 0 into
    #: private/profile/.
    profile: list[int] | None = None

    def check_together(self) -> None:
        one = (self.steps is None) != (self.epochs is None)
        self.require(
            "steps", one, f"give either training.steps or training.epochs (epochs = {self.epochs!r}), not both."
        )
        augmented = self.augment is not None or (self.views == 1 and not self.augment_options)
        self.require("augment", augmented, "name one, such as flip_and_crop: views of an example differ by it.")
        if self.profile is not None:
            steps = len(self.profile) == 2 and all(type(step) is int for step in self.profile)
            ordered = steps and 1 <= self.profile[0] <= self.profile[1] <= (self.steps or self.profile[1])
            last = "" if self.steps is None else f" of at most {self.steps}"
            self.require("profile", ordered, f"give the first and the last step{last}, such as [10, 12].")
        for pattern, strategy in self.clipping_strategies.items():
            if strategy not in CLIPPING_STRATEGIES or self.clipping == "per_example":
                raise InputError(
                    f"training.clipping_strategies.{pattern}",
                    strategy,
                    f"{did_you_mean(strategy, CLIPPING_STRATEGIES)}give ghost or instantiate; "
                    "training.clipping=per_example takes neither.",
                )


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """When the run is saved."""

    #: Steps between checkpoints; the last step is always saved.
    every_steps: Annotated[int, AtLeast(1)] = 100
    #: Newest checkpoints kept.
    keep: Annotated[int, AtLeast(1, "keep at least 1.")] = 2
    #: Seconds that training waits at most for the save before; then this one is left out, unless it is the last.
    stall_timeout: Annotated[float, AtLeast(0)] = 30
    #: Go back, once, to the checkpoint of this step: a new incarnation, in which what came after stays charged.
    resume_step: Annotated[int | None, AtLeast(0, "give the step of a checkpoint.")] = None


@dataclass(frozen=True, kw_only=True)
class Cluster(Section):
    """The processes and devices of the job; it never changes what the mechanism samples or draws."""

    #: What trains; `auto` is a GPU where there is one, on every process the same.
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    #: Devices each process must have. On CPU so many virtual devices are made; null takes what is there.
    devices_per_process: Annotated[int | None, AtLeast(1)] = None
    #: GiB a device may use, where the backend reports none (CPU).
    memory_per_device: Annotated[float, Positive("give a positive number.")] = 2.0
    #: Seconds to wait for all processes to join. Cold starts of large jobs are slow.
    initialization_timeout: Annotated[int, Positive("give a positive number.")] = 1800
    #: Seconds without a heartbeat after which a process counts as dead.
    heartbeat_timeout: Annotated[int, Positive("give a positive number.")] = 100
    #: Seconds to wait for the others when leaving, and at every barrier.
    shutdown_timeout: Annotated[int, Positive("give a positive number.")] = 300
    #: Seconds a step may take before the job is ended with exit code 124.
    watchdog_timeout: Annotated[int, Positive("give a positive number.")] = 1800
    #: Seconds without a sign of life after which a job's hold on its run directory ends, so that another may go on.
    lease_timeout: Annotated[int, Positive("give a positive number.")] = 60
    #: Test the machines before the first step: the run directory from every process, its disk, memory, and the
    #: all-reduce of a step.
    preflight: bool = True
    #: GB/s of the all-reduce, for each device, below which the preflight ends the job and names the slow node; null
    #: measures alone.
    least_bandwidth: Annotated[float | None, Positive("give a positive number, or null.")] = None
    #: Where compiled programs are kept, so that a restart need not compile again: a directory that all nodes share and
    #: nobody else can write. `auto` is the run's own `private/compiled` on GPUs and, for several processes, on CPU,
    #: where process 0 compiles first, and those on the same kind of processor read what it made. null is nothing.
    compilation_cache: Annotated[Literal["auto"] | str | None, IsPath()] = "auto"


@dataclass(frozen=True, kw_only=True)
class Run(Section):
    """Where the run lives and how it talks."""

    #: The run directory, where an existing run is resumed; unless it is set, `runs/` and the config file's name.
    dir: Annotated[str, NonEmpty("name a directory."), IsPath()] = "runs/default"
    #: Steps between public metric records; times in them are of ten steps together or more, or they would tell samples.
    log_every: Annotated[int, AtLeast(1)] = 10
    #: A `bar` on a terminal, `lines` elsewhere, by `auto`.
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    #: Draw the curves of the public metrics into plots/ at the end.
    plots: bool = True
    #: Called when the run ends, fails, or is started again for the third time: the words of a command, or the URL of a
    #: webhook. It gets the event as JSON (docs/observing.md), has 10 seconds, and a failure of it is a warning.
    on_event: list[str] | str | None = None
    #: The directory of a registry that every private run on a dataset is charged to before its first step, and whose
    #: budget no run may pass: docs/composing.md. All nodes and all who train on the data must share it.
    registry: Annotated[str | None, IsPath()] = None
    #: What the registry calls the dataset.
    registry_dataset: str | None = None
    #: Set by `dpdist tune` for the trials of a search: then no guarantee holds for the run by itself.
    trial: bool = False

    def check_together(self) -> None:
        both = (self.registry is None) == (self.registry_dataset is None)
        self.require(
            "registry_dataset", both, "give run.registry and run.registry_dataset together: where, and which data."
        )
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", self.registry_dataset or "plain") is not None
        self.require("registry_dataset", plain, "give a plain name of at most 80 letters, digits, dots, _ and -.")
        if isinstance(self.on_event, str):
            web = self.on_event.startswith(("http://", "https://"))
            self.require("on_event", web, 'give a URL (http:// or https://), or a command as a list: ["notify.sh"].')
        elif self.on_event is not None:
            words = self.on_event and all(isinstance(word, str) and "\0" not in word for word in self.on_event)
            self.require("on_event", bool(words and self.on_event[0]), "name a command: a list of at least one word.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, one section an attribute."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    privacy: Privacy = field(default_factory=Privacy)
    sampling: Sampling = field(default_factory=Sampling)
    training: Training = field(default_factory=Training)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    cluster: Cluster = field(default_factory=Cluster)
    run: Run = field(default_factory=Run)


#: Section name -> its class, in the order of a file.
SECTIONS: dict[str, type] = typing.get_type_hints(Config)
