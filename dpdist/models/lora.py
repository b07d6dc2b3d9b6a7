"""Low-rank adapters (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021) for NNX models.

The factors' products with the activations are two small products of their own, so that clipping knows them by their
factors; of a merged kernel W + A B it would have to form the gradient of every example at full size.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dpdist.config.lora import FIELD, Lora
from dpdist.errors import InputError
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.models import Model
from dpdist.models.adapters import ADAPTERS, A, B, LoraStandardisedConv, obstacle
from dpdist.models.nnx_model import NnxModel, from_nnx

#: Keeps the factors' random numbers apart from those of the weights.
_STREAM = 0x10A4
_Path = tuple[Any, ...]


def with_lora(model: Model, lora: Lora) -> Model:
    """Return `model` with adapters beside the layers that `lora` names: A normal with variance 1 / inputs, B zero.

    The inputs of an output are those of the kernel: `in`, or kh kw in. At first the outputs are those of `model`, which
    come from the same key or the same pretrained weights.

    Raises:
        InputError: the model is not made of NNX layers by `from_nnx`, or a target is no kernel that takes an adapter.
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
                inputs = math.prod(leaf.shape[:-1])
                value = jax.random.normal(jax.random.fold_in(own, place), leaf.shape) * inputs**-0.5
            else:
                value = jnp.zeros(leaf.shape) if path[-1].key == B else there[path]
            parameters.append(value)
        return jax.tree.unflatten(structure, parameters)

    return dataclasses.replace(adapted, init=init, loss=model.loss)


def _adapt(module: nnx.Module, lora: Lora) -> nnx.Module:
    """Put adapters in the place of the layers that `lora` names."""
    layers, refused = _layers(module)
    chosen = {name: layers[name] for name in sorted(_chosen(lora.targets, layers, refused))}
    held = list(_held(module))
    for name, (_, layer) in chosen.items():
        if any(sum(value is shared for value in held) > 1 for shared in (layer, layer.kernel)):
            raise InputError(f"{FIELD}.targets", name, "belongs to several layers; leave them out.")
    for path, layer in chosen.values():
        holder: Any = module
        for key in path[:-1]:
            holder = (operator.getitem if isinstance(holder, _INDEXED) else getattr)(holder, key)
        put = operator.setitem if isinstance(holder, _INDEXED) else setattr
        put(holder, path[-1], ADAPTERS[type(layer)](layer, lora))
    return module


#: Containers whose members have numbers or keys, and no names.
_INDEXED = (list, tuple, dict, nnx.List)


def _chosen(targets: Iterable[str], layers: Mapping[str, Any], refused: Mapping[str, str]) -> set[str]:
    """The names among `layers` that patterns match; each must match one, and no kernel among `refused`."""
    chosen: set[str] = set()
    for pattern in targets:
        found = {name for name in layers if fnmatchcase(name, pattern)}
        others = [name for name in refused if fnmatchcase(name, pattern)]
        others = [name for name in others if name.split("/")[-1] == "kernel"] or ([] if found else others)
        if others or not found:
            what = f"{others[0]}, {refused[others[0]]}" if others else "no kernel"
            remedy = f"name others: adapters can be beside {_grouped(layers)}."
            if not layers:
                remedy = (
                    "no layer of this model takes adapters; leave model.lora out and train kernels by model.trainable."
                )
            raise InputError(f"{FIELD}.targets", pattern, f"matches {what}; {remedy}")
        chosen |= found
    return chosen


def _layers(module: nnx.Module) -> tuple[dict[str, tuple[_Path, Any]], dict[str, str]]:
    """By the path of the kernel, the layers that take adapters and where they are; and why other parameters take none.

    The module itself takes none: it has no place in which another could be put.
    """
    nodes = dict(nnx.iter_graph(module))
    layers: dict[str, tuple[_Path, Any]] = {}
    refused = dict.fromkeys(paths_of(nnx.to_pure_dict(nnx.state(module, nnx.Param))), "which is no layer's kernel")
    for path, node in nodes.items():
        if not path or not isinstance(node, nnx.Module) or not isinstance(getattr(node, "kernel", None), nnx.Param):
            continue
        name, above = "/".join(map(str, (*path, "kernel"))), [nodes[path[:depth]] for depth in range(len(path))]
        reason = obstacle(node)
        if any(isinstance(each, nnx.WeightNorm) for each in above):
            reason = "which nnx.WeightNorm changes before its use"
        elif isinstance(above[-1], tuple):
            reason = "whose layer is in a tuple, where nothing can take its place: make it an nnx.List"
        if reason:
            refused[name] = reason
        else:
            layers[name] = (path, node)
            refused.pop(name, None)
    return layers, refused


def _held(module: nnx.Module) -> Iterable[Any]:
    """All that the parts of a module hold, as often as it is held."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            yield from vars(node).values()
        elif isinstance(node, dict | list | tuple):
            yield from node.values() if isinstance(node, dict) else node


def _grouped(paths: Iterable[str]) -> str:
    """Paths, with those of a list's members once."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=/)\d+(?=/)", "*", path) for path in paths))


def require_rank(model: Model, lora: Lora) -> None:
    """Check that no adapter of `model` is larger than it can need to be.

    Raises:
        InputError: the rank is above the inputs or the outputs of a kernel.
    """
    for path, node in _parts(model):
        if isinstance(node, tuple(ADAPTERS.values())):
            *inputs, out = nnx.state(node)["kernel"].shape
            if lora.rank > (most := min(math.prod(inputs), out)):
                name = "/".join(map(str, (*path, "kernel")))
                remedy = f"{name} has {math.prod(inputs)} inputs and {out} outputs, so that factors of a rank beyond "
                remedy += (
                    f"{most} have more parameters than the kernel itself; give at most {most}, or leave it out of "
                )
                raise InputError(f"{FIELD}.rank", lora.rank, f"{remedy}{FIELD}.targets.")


def _parts(model: Model) -> Iterable[tuple[_Path, Any]]:
    if not isinstance(model, NnxModel):
        raise TypeError("adapters are those of `with_lora`, which makes an NnxModel")
    return nnx.iter_graph(nnx.eval_shape(lambda: model.module(nnx.Rngs(0))))


def merged(model: Model, params: Any, lora: Lora) -> Any:
    """Return `params` of the model without adapters: W + scale A B, as float32, in the place of W, A and B.

    A kernel that is kept in bfloat16 does not stay so: much of what the adapters learned would be rounded away.

    Args:
        model: with the adapters.

    Raises:
        InputError: an adapter is beside a kernel that is standardised, in whose place no other gives the same outputs.
    """
    for path, node in _parts(model):
        if isinstance(node, LoraStandardisedConv):
            raise InputError(
                f"{FIELD}.targets",
                "/".join(map(str, (*path, "kernel"))),
                "is standardised before its use, so its adapter cannot be merged into it; export without merging (no "
                "--merge-lora, no --as), or train the head or whole kernels by model.trainable, without model.lora.",
            )
    return _merged(params, lora.scale)


def _merged(params: Any, scale: float) -> Any:
    if not isinstance(params, dict):
        return params
    kept = {key: _merged(value, scale) for key, value in params.items() if key not in (A, B)}
    if A in params:
        a, b = (np.asarray(params[name], np.float64) for name in (A, B))
        kept["kernel"] = (np.asarray(params["kernel"], np.float64) + scale * (a @ b)).astype(np.float32)
    return kept
