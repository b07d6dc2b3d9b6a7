"""Low-rank adapters (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021) for NNX models.

The factors' products with the activations are two small matrix products of their own, so that clipping knows them by
their factors; of a merged kernel W + A B it would have to form the gradient of every example at full size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dpdist.config.lora import FIELD, Lora
from dpdist.errors import InputError
from dpdist.mechanism.clipping import paths_of
from dpdist.models import Model
from dpdist.models.nnx_model import NnxModel, from_nnx

#: Names of the factors, beside the kernel.
A, B = "lora_a", "lora_b"


class LoraLinear(nnx.Linear):
    """x W + b + scale (x A) B, with A [in, rank] and B [rank, out]; parameters of a layer that is there stay in place.

    The products of the factors have the dtype of the layer's.
    """

    def __init__(self, layer: nnx.Linear, lora: Lora) -> None:
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        # Both are given their values by `with_lora`.
        self.lora_a = nnx.Param(jnp.zeros((layer.in_features, lora.rank), jnp.float32))
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, layer.out_features), jnp.float32))
        self.scale = lora.scale

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Return the outputs [..., out] of inputs [..., in]."""
        outputs = super().__call__(inputs, out_sharding=out_sharding)
        x, a, b = (each.astype(self.dtype or inputs.dtype) for each in (inputs, self.lora_a[...], self.lora_b[...]))
        return outputs + (((x @ a) * self.scale) @ b).astype(outputs.dtype)


#: Keeps the factors' random numbers apart from those of the weights.
_STREAM = 0x10A4


def with_lora(model: Model, lora: Lora) -> Model:
    """Return `model` with adapters beside the layers that `lora` names: A normal with variance 1 / in, B zero.

    At first the outputs are those of `model`, which come from the same key or the same pretrained weights.

    Raises:
        InputError: the model is not made of NNX layers by `from_nnx`, or a target is no kernel of an `nnx.Linear`.
    """
    if not isinstance(model, NnxModel):
        raise InputError(
            FIELD,
            f"rank {lora.rank}",
            "this model is not made by dpdist.models.nnx_model.from_nnx, so its layers are not known; add the factors "
            "in the model itself and name them in model.trainable.",
        )
    adapted = from_nnx(lambda rngs: _adapt(model.module(rngs), lora), model.prepare)
    template = jax.eval_shape(adapted.init, jax.random.key(0))

    def init(key: Array) -> Any:
        own = jax.random.fold_in(key, _STREAM)  # `nnx.Rngs` draws the weights from the folds of the key itself
        there, parameters = dict(jax.tree_util.tree_leaves_with_path(model.init(key))), []
        leaves, structure = jax.tree_util.tree_flatten_with_path(template)
        for place, (path, leaf) in enumerate(leaves):
            if path[-1].key == A:
                value = jax.random.normal(jax.random.fold_in(own, place), leaf.shape) * leaf.shape[0] ** -0.5
            else:
                value = jnp.zeros(leaf.shape) if path[-1].key == B else there[path]
            parameters.append(value)
        return jax.tree.unflatten(structure, parameters)

    return dataclasses.replace(adapted, init=init, loss=model.loss)


def _adapt(module: nnx.Module, lora: Lora) -> nnx.Module:
    layers = {"/".join(map(str, (*path, "kernel"))): (path, layer) for path, layer in _linear_layers(module)}
    chosen: set[str] = set()
    for pattern in lora.targets:
        found = {path for path in layers if fnmatchcase(path, pattern)}
        if not found:
            raise InputError(
                f"{FIELD}.targets", pattern, f"matches no kernel of an nnx.Linear layer; there are {_grouped(layers)}."
            )
        others = [each for each in _other_kernels(module, layers) if fnmatchcase(each, pattern)]
        if others:
            raise InputError(
                f"{FIELD}.targets",
                pattern,
                f"matches {others[0]}, which is no kernel of an nnx.Linear layer; only those take adapters: "
                f"{_grouped(layers)}.",
            )
        chosen |= found
    for name in sorted(chosen):
        path, layer = layers[name]
        holder: Any = module
        for key in path[:-1]:
            holder = holder[key] if isinstance(key, int) else getattr(holder, key)
        adapter = LoraLinear(layer, lora)
        if isinstance(path[-1], int):
            holder[path[-1]] = adapter
        else:
            setattr(holder, path[-1], adapter)
    holders = [id(node.kernel) for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Linear)]
    for name in sorted(chosen):
        if holders.count(id(layers[name][1].kernel)) > 1:
            raise InputError(f"{FIELD}.targets", name, "belongs to several layers; leave them out.")
    return module


def _linear_layers(module: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Linear]]:
    for path, node in nnx.iter_graph(module):
        if type(node) is nnx.Linear and path:
            yield path, node


def _grouped(paths: Iterable[str]) -> str:
    """Paths, with those of a list's members once."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=/)\d+(?=/)", "*", path) for path in paths)) or "none"


def _other_kernels(module: nnx.Module, layers: dict[str, Any]) -> list[str]:
    paths = paths_of(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return [path for path in paths if path.split("/")[-1] == "kernel" and path not in layers]


def merged(params: Any, lora: Lora) -> Any:
    """Return `params` of the model without adapters: W + scale A B, as float32, in the place of W, A and B.

    A kernel that is kept in bfloat16 does not stay so: much of what the adapters learned would be rounded away.
    """
    if not isinstance(params, dict):
        return params
    kept = {key: merged(value, lora) for key, value in params.items() if key not in (A, B)}
    if A in params:
        a, b = (np.asarray(params[name], np.float64) for name in (A, B))
        kept["kernel"] = (np.asarray(params["kernel"], np.float64) + lora.scale * (a @ b)).astype(np.float32)
    return kept
