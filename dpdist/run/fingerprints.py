"""What a step depends on, as digests: settings, our source, library versions, the user's code, data and topology."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpdist.cluster.world import World
from dpdist.config import Config, flatten
from dpdist.config.user_code import module_sources
from dpdist.mechanism.incarnation import StepInputs, settings_digest

_PACKAGE = Path(__file__).parents[1]
#: Files of `dpdist/program/` that decide what a step computes.
_STEP_FILES = ("gradients.py", "optimizer.py", "plain_gradients.py")


def code_digest(room: str = "") -> str:
    """SHA-256 over the source files of this package, or of one room of it, to tell two installations apart."""
    digest = hashlib.sha256()
    root = _PACKAGE / room
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def user_code_digest(config: Config) -> str:
    """SHA-256 over the modules that a config names as `module:function`, and what they import of the user's own."""
    named = (config.data.source, config.model.name, config.model.loss)
    digest = hashlib.sha256()
    for name, file in module_sources({path.partition(":")[0] for path in named if ":" in path}).items():
        digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def step_code_digest(config: Config) -> str:
    """SHA-256 over the code that computes gradients and updates outside the mechanism.

    That is dpdist's models and optimizers, the versions of flax and optax, and `user_code_digest`.
    """
    digest = hashlib.sha256(f"{user_code_digest(config)} flax {flax.__version__} optax {optax.__version__}".encode())
    for path in sorted([*(_PACKAGE / "models").rglob("*.py"), *(_PACKAGE / "program" / name for name in _STEP_FILES)]):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment(platform: str) -> str:
    """What turns keys into bits: another JAX, platform or mechanism may draw other bits from the same keys."""
    return f"jax {jax.__version__} on {platform}, mechanism {code_digest('mechanism')[:12]}"


def topology(config: Config, world: World) -> str:
    """What the order of summation depends on; two equal topologies compute a step bit for bit alike on CPU."""
    shape = [world.platform, world.num_processes, world.device_count, list(world.host_of_device)]
    return json.dumps([*shape, config.sampling.assignment, config.training.physical_batch_size])


def step_inputs(config: Config, world: World, *, data: str) -> StepInputs:
    """What the steps of this job depend on; `data` is the keyed tag of the training data."""
    return StepInputs(
        environment=environment(world.platform),
        settings=settings_digest(flatten(config)),
        code=step_code_digest(config),
        data=data,
        topology=topology(config, world),
        repeatable=world.platform == "cpu",
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
