"""The memory of a gradient sum by XLA's analysis, and so the largest physical batch: compiled, and never run.

Parameters and examples are shapes, so that any model fits any machine. With a target, XLA compiles for a GPU that is
not there (openxla/xla#16913); it takes the CUDA plugin of JAX, but no driver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dpdist.errors import InputError
from dpdist.models import build, example_loss
from dpdist_launch.measure import machine
from dpdist_launch.measure.bench.arms import ARMS, NAIVE, SGD, grad_sum
from dpdist_launch.measure.bench.clipping import FORMATS
from dpdist_launch.measure.bench.program import compiled
from dpdist_launch.measure.bench.table import markdown
from dpdist_launch.measure.bench.tasks import CLIP_NORM, TASKS, Problem, Task, in_dtype

#: What XLA asks a GPU of each name, as its own `gpu_specs` say.
TARGETS = {
    "H100": """
        gpu_device_info {
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
          device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
          cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }
        platform_name: "CUDA"
        dnn_version_info { major: 9 minor: 10 }
        runtime_version { major: 12 minor: 9 }
        device_description_str: "NVIDIA H100 80GB HBM3"
    """
}
#: XLA cannot time kernels on a GPU that is not there.
_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of a program, as a line through those of two physical batch sizes."""

    per_example: float
    fixed: float

    def largest(self, limit: float) -> int:
        """Return the largest physical batch that needs at most `limit` bytes."""
        return max(0, int((limit - self.fixed) // self.per_example))


def need_of(sizes: tuple[int, int], totals: tuple[int, int]) -> Need:
    """Return the line through (size, bytes)."""
    per_example = (totals[1] - totals[0]) / (sizes[1] - sizes[0])
    return Need(per_example=per_example, fixed=totals[0] - per_example * sizes[0])


def device_of(target: str | None) -> Any:
    """Return the device here, or the one of `TARGETS`, which programs can be compiled for but not run on.

    Raises:
        InputError: there is no such target, or JAX lacks the plugin.
    """
    if target is None:
        return jax.devices()[0]
    if target not in TARGETS:
        raise InputError("--target", target, f"there are {', '.join(TARGETS)}.")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"  # read when the plugin is loaded
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=TARGETS[target], topology="1x1x1").devices[0]
    except NotImplementedError:
        raise InputError("--target", target, "JAX's CUDA plugin is not installed: pip install 'jax[cuda12]'.") from None


def task_of(name: str) -> Task:
    """Return the task of `NAME` or `NAME:LENGTH`, the latter with so many tokens an example.

    Raises:
        InputError: there is no such task, or it has no tokens.
    """
    name, _, length = name.partition(":")
    if name not in TASKS:
        raise InputError("--models", name, f"there are {', '.join(TASKS)}.")
    task = TASKS[name]
    if not length:
        return task
    if "input_ids" not in task.example or not length.isdecimal():
        raise InputError("--models", f"{name}:{length}", "give a number of tokens, to a model of tokens.")
    return replace(task, example={**task.example, "input_ids": ((int(length),), "int32")})


def bytes_of(task: Task, arm: str, size: int, device: Any) -> int:
    """Return the bytes that the arm needs for a physical batch, with its arguments and results."""
    model = build(task.model, example=task.shapes(), classes=task.classes)
    there = jax.sharding.SingleDeviceSharding(device)

    def placed(shape: Sequence[int], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=there)

    params = jax.tree.map(lambda x: placed(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0)))
    batch = {name: placed((size, *column.shape), column.dtype) for name, column in task.shapes().items()}
    mask = placed((size,), jnp.float32)
    problem = Problem(task=task, loss=example_loss(model), params=params, batch=batch, mask=mask, clip_norm=CLIP_NORM)
    return compiled(grad_sum(arm, problem, device=device), (params, batch, mask))[1].memory


def bench_memory(
    models: Sequence[str],
    arms: Sequence[str],
    *,
    form: str,
    sizes: tuple[int, int],
    limits: Sequence[float],
    target: str | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Compile every arm of every model at both sizes; return bytes and the largest batches, by model and arm.

    Args:
        form: of `FORMATS`.
        limits: bytes of devices.
    """
    for arm in arms:
        if arm not in ARMS or arm == NAIVE:
            raise InputError("--methods", arm, f"there are {', '.join(name for name in ARMS if name != NAIVE)}.")
    if form not in FORMATS:
        raise InputError("--format", form, f"there are {', '.join(FORMATS)}.")
    if not 0 < sizes[0] < sizes[1]:
        raise InputError("--sizes", ",".join(map(str, sizes)), "give two numbers of examples, the smaller first.")
    dtype, precision = FORMATS[form]
    tasks, device = {name: in_dtype(task_of(name), dtype) for name in models}, device_of(target)
    content: dict[str, Any] = {
        "what": "bytes of a gradient sum with its arguments and results, by XLA's analysis; nothing was run",
        "device": device.device_kind,
        "versions": machine.all_versions(peers=False),
        "format": form,
        "sizes": list(sizes),
        "limits": list(limits),
        "models": {},
    }
    with jax.default_matmul_precision(precision):
        for name, task in tasks.items():
            found: dict[str, Any] = {}
            for arm in dict.fromkeys((SGD, *arms)):
                totals = bytes_of(task, arm, sizes[0], device), bytes_of(task, arm, sizes[1], device)
                need = need_of(sizes, totals)
                found[arm] = {"bytes": totals, "per_example": need.per_example, "fixed": need.fixed}
                found[arm]["largest"] = [need.largest(limit) for limit in limits]
                progress(f"{name}: {arm}: {need.per_example / 2**20:,.1f} MiB an example")
            content["models"][name] = found
    return content


def text(content: dict[str, Any]) -> str:
    """Return the table; the ratio is that of the largest batch to plain SGD's."""
    rows = []
    for model, arms in content["models"].items():
        for name, arm in arms.items():
            row = [model, name, f"{arm['per_example'] / 2**20:,.1f}", f"{arm['fixed'] / 2**20:,.0f}"]
            for own, plain in zip(arm["largest"], arms[SGD]["largest"], strict=True):
                row.append(f"{own:,} · {own / plain:.2f}" if plain else f"{own:,}")
            rows.append(row)
    limits = [f"largest in {limit / 2**30:g} GiB, of SGD's" for limit in content["limits"]]
    return markdown(["model", "arm", "MiB an example", "fixed MiB", *limits], rows) + "\n"
