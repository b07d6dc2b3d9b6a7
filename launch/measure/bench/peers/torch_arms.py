"""The arms of PyTorch: plain SGD and Opacus, with the same weights and batch as the JAX arms."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from dpdist.mechanism.clipping.paths import paths_of
from dpdist_launch.measure.bench.peers.torch_models import torch_model
from dpdist_launch.measure.bench.program import Arm, Program, Sums
from dpdist_launch.measure.bench.tasks import Problem

TORCH = "torch"
TORCH_SGD, OPACUS, OPACUS_GHOST = "torch sgd", "opacus", "opacus ghost"


def torch_arms() -> list[Arm]:
    """Return all arms of PyTorch, plain SGD first."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA uses
    # The warning is about layers whose input needs no gradient: embeddings, and the first layer.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    methods = {TORCH_SGD: _plain, OPACUS: _per_sample, OPACUS_GHOST: _ghost}
    return [
        Arm(name=name, framework=TORCH, private=name != TORCH_SGD, prepare=partial(_program, method))
        for name, method in methods.items()
    ]


#: (module, columns, labels, C) -> a function that computes the gradient sum of every parameter.
Method = Callable[[nn.Module, dict[str, Tensor], Tensor, float], Callable[[], list[Tensor]]]


def _program(method: Method, problem: Problem) -> Program:
    if problem.task.model.options.get("dtype", "float32") != "float32":
        raise ValueError("the PyTorch models are in float32 alone")
    # The same precision as XLA, whose default on a GPU is TF32 too.
    tf32 = jax.config.jax_default_matmul_precision != "highest"  # type: ignore[attr-defined, unused-ignore]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    module = torch_model(problem.task).to(device)
    paths = dict(zip(paths_of(problem.params), map(np.asarray, jax.tree.leaves(problem.params)), strict=True))
    # load_state_dict is strict: both models must have the same parameters in the same shapes.
    module.load_state_dict({_name(path): torch.tensor(_swap(path, leaf)) for path, leaf in paths.items()})
    columns = {name: torch.tensor(np.asarray(column), device=device) for name, column in problem.batch.items()}
    labels = columns.pop("label").long()
    order = [name for name, _ in module.named_parameters()]
    compute = method(module, columns, labels, problem.clip_norm)

    def run() -> list[Tensor]:
        sums = compute()
        if device == "cuda":
            torch.cuda.synchronize()
        return sums

    def read(sums: list[Tensor]) -> Sums:
        found = dict(zip(order, sums, strict=True))
        return {path: _swap(path, found[_name(path)].cpu().numpy(), back=True) for path in paths}

    return Program(run=run, read=read)


def _name(path: str) -> str:
    """Turn `layers/0/grow/kernel` into `layers.0.grow.weight`; a bare parameter is an embedding's weight there."""
    *module, leaf = path.split("/")
    own = {"kernel": ["weight"], "scale": ["weight"], "bias": ["bias"]}.get(leaf, [leaf, "weight"])
    return ".".join(module + own)


def _swap(path: str, array: np.ndarray, *, back: bool = False) -> np.ndarray:
    """Reorder a kernel's axes between JAX (inputs before outputs) and PyTorch (outputs before inputs)."""
    if not path.endswith("kernel"):
        return array
    if array.ndim == 2:
        return array.T
    return array.transpose((2, 3, 1, 0) if back else (3, 2, 0, 1))


def _plain(module: nn.Module, columns: dict[str, Tensor], labels: Tensor, clip_norm: float) -> Callable[[], list[Any]]:
    def compute() -> list[Any]:
        module.zero_grad(set_to_none=True)
        F.cross_entropy(module(columns), labels, reduction="sum").backward()
        return [parameter.grad for parameter in module.parameters()]

    return compute


def _per_sample(
    module: nn.Module, columns: dict[str, Tensor], labels: Tensor, clip_norm: float
) -> Callable[[], list[Any]]:
    wrapped = GradSampleModule(module, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )

    def compute() -> list[Any]:
        F.cross_entropy(wrapped(columns), labels, reduction="sum").backward()
        optimizer.clip_and_accumulate()
        sums = [parameter.summed_grad for parameter in module.parameters()]
        optimizer.zero_grad(set_to_none=True)
        return sums

    return compute


def _ghost(module: nn.Module, columns: dict[str, Tensor], labels: Tensor, clip_norm: float) -> Callable[[], list[Any]]:
    wrapped = GradSampleModuleFastGradientClipping(module, loss_reduction="sum", max_grad_norm=clip_norm)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    criterion = DPLossFastGradientClipping(
        wrapped, optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum"
    )

    def compute() -> list[Any]:
        criterion(wrapped(columns), labels).backward()  # runs both passes and clears the gradients in between
        sums = [parameter.grad for parameter in module.parameters()]
        optimizer.zero_grad(set_to_none=True)
        return sums

    return compute
