"""The typed description of a run, and its checks, each with a remedy; `dpdist.config.file` reads it from YAML.

A config is a tree of frozen dataclasses, one a section. `from_dict` decodes plain dicts with draccus, chosen over
jsonargparse and tyro because it turns dicts into dataclasses without owning the command line, and its errors carry
the dotted path of the field. Whatever can be checked without data or devices is checked here, next to the field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import draccus

from dpdist.errors import InputError


def _require(section: object, name: str, ok: bool, remedy: str) -> None:
    if not ok:
        raise InputError(f"{type(section).__name__.lower()}.{name}", getattr(section, name), remedy)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where examples come from."""

    #: `digits`, `idx`, `npy`, `cifar10`, `cifar100`, or `module:function` that returns train and test sources.
    source: str = "digits"
    #: Directory or file the source reads; not used by `digits`.
    path: str | None = None
    #: Held-out fraction, split by index, where the source has no test set of its own.
    test_fraction: float = 0.2
    #: Seed of the (public) split by index.
    split_seed: int = 0
    #: Further keyword arguments for a source given as `module:function`; `checksum` for CIFAR's archives.
    options: dict[str, Any] = field(default_factory=dict)
    #: Threads that call a source's `__getitem__`; array sources need none.
    workers: int = 4
    #: Microbatches held ready on the devices, beyond the one in use.
    prefetch: int = 8

    def __post_init__(self) -> None:
        _require(
            self,
            "test_fraction",
            0 < self.test_fraction < 1,
            "give the held-out share as a number between 0 and 1, such as 0.2.",
        )
        _require(self, "split_seed", self.split_seed >= 0, "give 0 or more.")
        _require(self, "workers", self.workers >= 1, "give at least 1 thread.")
        _require(self, "prefetch", self.prefetch >= 1, "hold at least 1 microbatch ready.")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained."""

    #: `mlp`, `cnn`, `vit`, `bit_resnet`, `bert`, or `module:function` that returns a `dpdist.models.Model`.
    name: str = "mlp"
    #: Keyword arguments for that function, e.g. `{hidden: [64], activation: relu}`.
    options: dict[str, Any] = field(default_factory=dict)
    #: `cross_entropy`, or `module:function` taking (logits, example) of one example to a scalar.
    loss: str = "cross_entropy"
    #: Number of classes; None takes it from the data source (a public constant there).
    classes: int | None = None
    #: Paths of the parameters that train, `*` standing for anything: `["head/*"]`. The others stay as they are.
    trainable: list[str] = field(default_factory=lambda: ["*"])

    def __post_init__(self) -> None:
        _require(self, "trainable", bool(self.trainable), 'name at least one, or leave it out for ["*"].')
        _require(
            self,
            "classes",
            self.classes is None or self.classes >= 2,
            "give at least 2 classes, or leave it out to take the data source's.",
        )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How the noisy gradient moves the parameters (post-processing: costs no privacy)."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    #: Peak learning rate, applied to the noisy mean gradient.
    learning_rate: float = 1.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    #: Steps over which the rate rises from 0 to its peak.
    warmup_steps: int = 0
    #: Heavy-ball momentum of `sgd`.
    momentum: float = 0.0
    #: `b1`, `b2` and `eps` of `adam` and `adamw`.
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    #: Decoupled weight decay of `adamw`.
    weight_decay: float = 0.0
    #: Decay of an exponential average of the parameters, used for evaluation and export; 0 is off.
    average_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            _require(self, name, _positive(value), "give a positive, finite number.")
        for name in ("momentum", "b1", "b2", "average_decay"):
            value = getattr(self, name)
            _require(self, name, 0 <= value < 1, "give a number in [0, 1).")
        _require(self, "weight_decay", self.weight_decay >= 0, "give 0 or more.")
        _require(self, "warmup_steps", self.warmup_steps >= 0, "give 0 or more.")
        _require(
            self, "momentum", self.name == "sgd" or self.momentum == 0, f"momentum belongs to sgd; {self.name} has b1."
        )
        _require(
            self,
            "weight_decay",
            self.name == "adamw" or self.weight_decay == 0,
            "weight decay needs optimizer.name=adamw.",
        )


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What is promised: give `target_epsilon` (sigma is calibrated) or `noise_multiplier`, and `delta`."""

    #: False trains the plain, non-private arm through the same loop.
    enabled: bool = True
    #: The epsilon that the whole run may cost at `delta`.
    target_epsilon: float | None = None
    #: Must be below 1/N; see `allow_large_delta`.
    delta: float | None = None
    #: Noise standard deviation over the clipping norm. With `target_epsilon` too, training stops at it.
    noise_multiplier: float | None = None
    #: Largest L2 norm an example's gradient keeps.
    clip_norm: float = 1.0
    #: `designated`: all-reduce, then add the designated device's draw. `fused`: one all-reduce.
    noise_placement: Literal["designated", "fused"] = "designated"
    #: Replaces the secret by a known seed. FOR TESTS: it voids the guarantee.
    insecure_seed: int | None = None
    #: Accept delta >= 1/N, which permits publishing a record outright.
    allow_large_delta: bool = False

    def __post_init__(self) -> None:
        if not self.enabled:
            return
        _require(self, "delta", self.delta is not None, "set it, to well below 1/N; a common choice is 1e-5.")
        assert self.delta is not None
        _require(self, "delta", 0 < self.delta < 1, "give a number between 0 and 1.")
        if self.target_epsilon is not None:
            _require(self, "target_epsilon", _positive(self.target_epsilon), "give a positive, finite number.")
        if self.noise_multiplier is not None:
            _require(
                self,
                "noise_multiplier",
                _positive(self.noise_multiplier),
                "give a positive, finite number, or target_epsilon to have it calibrated; "
                "for training without noise set privacy.enabled=false.",
            )
        _require(
            self,
            "target_epsilon",
            self.target_epsilon is not None or self.noise_multiplier is not None,
            "give target_epsilon (sigma is calibrated) or noise_multiplier.",
        )
        _require(
            self,
            "clip_norm",
            math.isfinite(self.clip_norm) and 1e-6 <= self.clip_norm <= 1e6,
            "give a number between 1e-6 and 1e6 (norms are summed in float32).",
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Poisson subsampling: every example enters every step with probability q = expected batch / N."""

    #: B = qN, a public constant, and the normaliser of every step.
    expected_batch_size: float = 256
    #: `balanced` over all devices, or `shard`: a host processes its own shard alone.
    assignment: Literal["balanced", "shard"] = "balanced"

    def __post_init__(self) -> None:
        _require(
            self,
            "expected_batch_size",
            _positive(self.expected_batch_size),
            "give a positive number.",
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, and in what pieces."""

    #: Number of steps T; or give `epochs`.
    steps: int | None = None
    #: Expected passes over the data: T = epochs / q.
    epochs: float | None = None
    #: Examples a device processes at once, or `auto`.
    physical_batch_size: int | Literal["auto"] = "auto"
    #: How clipped sums are computed: the same sum in all; `auto` takes what is fastest for each parameter.
    clipping: Literal["auto", "per_example", "ghost", "bookkeeping"] = "auto"
    #: `ghost` or `instantiate` by parameter path (`*` is anything), instead of what `clipping` would choose.
    clipping_strategies: dict[str, str] = field(default_factory=dict)
    #: Steps between evaluations; None evaluates whenever a checkpoint is due.
    evaluate_every: int | None = None
    #: Test examples a device evaluates at once.
    evaluation_batch_size: int = 256
    #: Seed of the initial parameters (public).
    seed: int = 0
    #: Write the SHA-256 of every step's sample and noise to private/diagnostics.jsonl.
    record_digests: bool = False

    def __post_init__(self) -> None:
        _require(
            self,
            "steps",
            (self.steps is None) != (self.epochs is None),
            f"give either training.steps or training.epochs (epochs = {self.epochs!r}), not both.",
        )
        _require(self, "steps", self.steps is None or self.steps >= 1, "give at least 1.")
        _require(
            self,
            "epochs",
            self.epochs is None or _positive(self.epochs),
            "give a positive number.",
        )
        for pattern, strategy in self.clipping_strategies.items():
            if strategy not in ("ghost", "instantiate") or self.clipping == "per_example":
                raise InputError(
                    f"training.clipping_strategies.{pattern}",
                    strategy,
                    "give ghost or instantiate; training.clipping=per_example takes neither.",
                )
        p = self.physical_batch_size
        _require(self, "physical_batch_size", p == "auto" or p >= 1, "give at least 1, or auto.")
        _require(
            self,
            "evaluate_every",
            self.evaluate_every is None or self.evaluate_every >= 1,
            "give at least 1, or leave it out.",
        )
        _require(self, "evaluation_batch_size", self.evaluation_batch_size >= 1, "give at least 1.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the run is saved."""

    #: Steps between checkpoints; the last step is always saved.
    every_steps: int = 100
    #: Newest checkpoints kept.
    keep: int = 2
    #: Seconds that training waits at most for the save before; then this one is left out, unless it is the last.
    stall_timeout: float = 30
    #: Go back, once, to the checkpoint of this step: a new incarnation, in which what came after stays charged.
    resume_step: int | None = None

    def __post_init__(self) -> None:
        _require(self, "every_steps", self.every_steps >= 1, "give at least 1.")
        _require(
            self, "resume_step", self.resume_step is None or self.resume_step >= 0, "give the step of a checkpoint."
        )
        _require(self, "keep", self.keep >= 1, "keep at least 1.")
        _require(self, "stall_timeout", self.stall_timeout >= 0, "give 0 or more.")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes and devices of the job; it never changes what the mechanism samples or draws."""

    platform: Literal["auto", "cpu", "gpu"] = "auto"
    #: Devices each process must have. On CPU so many virtual devices are made; None takes what is there.
    devices_per_process: int | None = None
    #: GiB a device may use, where the backend reports none (CPU).
    memory_per_device: float = 2.0
    #: Seconds to wait for all processes to join. Cold starts of large jobs are slow.
    initialization_timeout: int = 1800
    #: Seconds without a heartbeat after which a process counts as dead.
    heartbeat_timeout: int = 100
    #: Seconds to wait for the others when leaving, and at every barrier.
    shutdown_timeout: int = 300
    #: Seconds a step may take before the job is ended with exit code 124.
    watchdog_timeout: int = 1800
    #: Seconds without a sign of life after which a job's hold on its run directory ends, so that another may go on.
    lease_timeout: int = 60
    #: Directory of XLA's persistent compilation cache, on a path all nodes share; None is off.
    compilation_cache: str | None = None

    def __post_init__(self) -> None:
        _require(
            self,
            "devices_per_process",
            self.devices_per_process is None or self.devices_per_process >= 1,
            "give at least 1.",
        )
        for name in (
            "memory_per_device",
            "initialization_timeout",
            "heartbeat_timeout",
            "shutdown_timeout",
            "watchdog_timeout",
            "lease_timeout",
        ):
            value = getattr(self, name)
            _require(self, name, value > 0, "give a positive number.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the run lives and how it talks."""

    #: The run directory; an existing run there is resumed.
    dir: str = "runs/default"
    #: Steps between public metric records.
    log_every: int = 10
    #: A `bar` on a terminal, `lines` elsewhere, by `auto`.
    progress: Literal["auto", "bar", "lines", "off"] = "auto"

    def __post_init__(self) -> None:
        _require(self, "dir", bool(self.dir), "name a directory.")
        _require(self, "log_every", self.log_every >= 1, "give at least 1.")


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


SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Config)}


def from_dict(tree: Mapping[str, Any]) -> Config:
    """A `Config` from nested dicts; unknown keys, wrong types and impossible values raise `InputError`."""
    for section, values in tree.items():
        if section not in SECTIONS:
            raise InputError(str(section), values, f"no such section; the sections are {', '.join(SECTIONS)}.")
        if not isinstance(values, Mapping):
            raise InputError(section, values, "a section holds `key: value` lines.")
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]  # type: ignore[arg-type]
        for key, value in values.items():
            if key not in known:
                raise InputError(f"{section}.{key}", value, f"no such key; {section} has {', '.join(known)}.")
            kind = _annotation(section, key)
            if (isinstance(value, bool) and kind != "bool") or (value is None and "None" not in kind):
                raise InputError(f"{section}.{key}", value, f"wrong type; give {_annotation(section, key)}.")
    try:
        return draccus.decode(Config, {k: dict(v) for k, v in tree.items()})
    except draccus.utils.DecodingError as error:
        section, key = (str(k) for k in error.key_path[:2])
        raise InputError(
            f"{section}.{key}", tree[section][key], f"wrong type; give {_annotation(section, key)}."
        ) from None
    except draccus.utils.ParsingError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise InputError("config", "null", f"a value is missing: {error.__cause__ or error}.") from None


def _annotation(section: str, key: str) -> str:
    return str(next(f.type for f in dataclasses.fields(SECTIONS[section]) if f.name == key))  # type: ignore[arg-type]


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The nested dicts of a config, every default filled in."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """`{"privacy.delta": 1e-05, ...}`, every field by its dotted name."""
    return {f"{section}.{key}": value for section, values in to_dict(config).items() for key, value in values.items()}
