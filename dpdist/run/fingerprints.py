"""What a step depends on, as digests: settings, our source, library versions and flags, the user's code and data."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

from dpdist.cluster.join import PINNED
from dpdist.cluster.world import World
from dpdist.config import Config, flatten
from dpdist.config.user_code import library_versions, module_sources
from dpdist.mechanism.incarnation import StepInputs
from dpdist.mechanism.keys import Secret
from dpdist.run.step_settings import settings_digest

_PACKAGE = Path(__file__).parents[1]
#: Files of `dpdist/program/` that decide what a step computes.
_STEP_FILES = ("cache.py", "flat_products.py", "gradients.py", "optimizer.py", "plain_gradients.py", "update.py")
#: Settings of JAX that decide bits, beside those that are pinned.
JAX_SETTINGS = (
    "jax_allow_f16_reductions",
    "jax_compiler_enable_remat_pass",
    "jax_default_matmul_precision",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_custom_prng",
    "jax_exec_time_optimization_effort",
    "jax_high_dynamic_range_gumbel",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_softmax_custom_jvp",
    "jax_threefry_gpu_kernel_lowering",
    "jax_use_direct_linearize",
)
#: Variables that decide bits, beside XLA_FLAGS.
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
#: Settings that may name the user's code as `module:function`, as the values of `model.metrics` may.
CODE_SETTINGS = (
    "data.source",
    "model.name",
    "model.loss",
    "model.task",
    "training.augment",
    "optimizer.name",
    "optimizer.schedule",
)
#: Beginnings of flags that do not count: they decide no bits.
FREE_FLAGS = ("--xla_dump_", "--xla_force_host_platform_device_count")


def code_digest(room: str = "") -> str:
    """SHA-256 over the source files of this package, or of one room of it, to tell two installations apart."""
    digest = hashlib.sha256()
    root = _PACKAGE / room
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def user_code_digest(config: Config) -> str:
    """SHA-256 over the modules that a config names as `module:function`, what they import of the user's own, and the
    versions of the installed libraries that these import."""
    return modules_digest(_user_modules(config))


def modules_digest(modules: set[str]) -> str:
    """The same of modules by name."""
    digest = hashlib.sha256(json.dumps(library_versions(modules)).encode())
    for name, file in module_sources(modules).items():
        digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def user_libraries(config: Config) -> dict[str, str]:
    """The versions of the installed libraries that the user's code imports, by name."""
    return library_versions(_user_modules(config))


def _user_modules(config: Config) -> set[str]:
    settings = flatten(config)
    named = [*(settings[name] for name in CODE_SETTINGS), *config.model.metrics.values()]
    return {path.partition(":")[0] for path in named if path is not None and ":" in path}


def step_code_digest(config: Config) -> str:
    """SHA-256 over the code that computes gradients and updates outside the mechanism.

    That is dpdist's models and optimizers, the versions of flax and optax, and `user_code_digest`.
    """
    digest = hashlib.sha256(f"{user_code_digest(config)} flax {flax.__version__} optax {optax.__version__}".encode())
    for path in sorted([*(_PACKAGE / "models").rglob("*.py"), *(_PACKAGE / "program" / name for name in _STEP_FILES)]):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def numeric_settings() -> dict[str, str]:
    """What decides bits beside versions, code and config, by name: settings of JAX, flags of XLA, variables.

    The processor is none of it: nodes differ in that, and no replay has to give the same bits (see
    `dpdist.mechanism.incarnation`).
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-") and Path(flags).is_file():  # as XLA reads it
        flags = Path(flags).read_text()
    counted = [flag for flag in shlex.split(flags) if not flag.startswith(FREE_FLAGS)]
    known = jax.config.values  # not what a `with` sets, which the attribute is
    settings = {name: str(getattr(jax.config, name, known.get(name))) for name in (*PINNED, *JAX_SETTINGS)}
    return settings | {name: os.environ.get(name, "") for name in VARIABLES} | {"XLA_FLAGS": " ".join(counted)}


def environment(platform: str) -> str:
    """What turns keys into bits: another JAX, platform, flag or mechanism may draw other bits from the same keys."""
    flags = hashlib.sha256(json.dumps(numeric_settings(), sort_keys=True).encode()).hexdigest()
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__} on {platform}"
    return f"{versions}, mechanism {code_digest('mechanism')[:12]}, flags {flags[:12]}"


def data_tags(secret: Secret, fingerprints: Mapping[str, bytes]) -> dict[str, str]:
    """The keyed tag of each part of the data: who lacks the secret cannot test a guess of the data by it."""
    return {part: secret.tag(b"data" + fingerprint) for part, fingerprint in fingerprints.items()}


def step_inputs(config: Config, world: World, *, data: str) -> StepInputs:
    """What the steps of this job depend on; `data` is the keyed tag of the training data."""
    return StepInputs(
        environment=environment(world.platform),
        settings=settings_digest(flatten(config)),
        code=step_code_digest(config),
        data=data,
    )


def all_finite(params: Any) -> bool:
    """Whether no parameter is NaN or infinite."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return all(bool(np.isfinite(leaf).all()) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact))


def params_digest(params: Any) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
