"""Load a model's parameters from local `.safetensors` files, and write them under the same names.

Every tensor in a file must be used.

Nothing is downloaded, and no pickle is opened, because loading one can run code.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dpdist.errors import InputError
from dpdist.models import Model

FIELD = "model.options.pretrained"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a parameter's axes are arranged in a file, compared with the model."""

    #: Returns the shape in the file of a parameter of the given shape.
    shape: Callable[[Shape], Shape]
    #: Turns the file's array into the parameter.
    convert: Callable[[np.ndarray], np.ndarray]
    #: The inverse of `convert`.
    invert: Callable[[np.ndarray], np.ndarray]
    #: Resizes the file's array to the given shape in the file, or returns it unchanged if it cannot.
    fit: Callable[[np.ndarray, Shape], np.ndarray] = lambda array, shape: array


def interpolate_positions(positions: np.ndarray, shape: Shape) -> np.ndarray:
    """Resize position embeddings [1, 1 + n^2, width] to another square grid; the class token's is kept.

    Bilinear interpolation, as in Dosovitskiy et al. 2020 (section 3.2) for images larger than those of pretraining.
    """
    old, new = (math.isqrt(s[1] - 1) if len(s) == 3 and s[1] > 1 else 0 for s in (positions.shape, shape))
    if positions.shape != (1, old**2 + 1, shape[-1]) or shape[:2] != (1, new**2 + 1):
        return positions
    grid = positions[0, 1:].reshape(old, old, -1).astype(np.float32)
    resized = jax.image.resize(grid, (new, new, grid.shape[-1]), "bilinear")
    return np.concatenate([positions[:, :1], np.asarray(resized).reshape(1, new**2, -1)], axis=1)


SAME = Layout(lambda s: s, lambda a: a, lambda a: a)
#: PyTorch's linear layers are [out, in], and its convolutions [out, in, height, width].
LINEAR = Layout(lambda s: s[::-1], lambda a: a.T, lambda a: a.T)
CONVOLUTION = Layout(
    lambda s: (s[3], s[2], s[0], s[1]), lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)
)
#: A linear layer written as a 1x1 convolution.
POINTWISE = Layout(lambda s: (s[1], s[0], 1, 1), lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])
#: With an additional leading axis of length 1 in the file.
LEADING = Layout(lambda s: (1, *s), lambda a: a[0], lambda a: a[None])
POSITIONS = Layout(LEADING.shape, LEADING.convert, LEADING.invert, interpolate_positions)


def patches(patch: int, channels: int) -> Layout:
    """Return the layout of a patch embedding: a convolution in the file, [patch * patch * channels, width] here."""
    return Layout(
        lambda s: (s[1], channels, patch, patch),
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
        lambda a: a.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
    )


Tensors = dict[str, tuple[str, Layout]]


def dense(ours: str, theirs: str, layout: Layout = LINEAR) -> Tensors:
    """Return the names and layouts of a layer with kernel and bias."""
    return {f"{ours}.kernel": (f"{theirs}.weight", layout), f"{ours}.bias": (f"{theirs}.bias", SAME)}


def norm(ours: str, theirs: str) -> Tensors:
    """Return the names and layouts of a layer norm or group norm."""
    return {f"{ours}.scale": (f"{theirs}.weight", SAME), f"{ours}.bias": (f"{theirs}.bias", SAME)}


@dataclass(frozen=True, kw_only=True)
class Naming:
    """The tensor names in a family of checkpoints; a classifier must be `head.kernel` and `head.bias`."""

    #: Parameter's dotted path in the model -> (tensor's name in the file, layout).
    tensors: Tensors
    #: What stands before the names in a file of the whole model, but not where an encoder was saved alone.
    prefix: str = ""
    #: Beginnings of the names before which it never stands.
    unprefixed: tuple[str, ...] = ()
    #: Turns a name found in a file, without its prefix, into the one in `tensors`: older files spell some differently.
    rename: Callable[[str], str] = lambda name: name
    #: Patterns of names that the model has no place for, such as those of other tasks.
    ignored: tuple[str, ...] = ()
    #: Name -> the one in `tensors` that it must equal, where a file holds a shared tensor twice.
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Name in the file -> names in `tensors` that it holds one after the other, along its first axis.
    fused: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def understood(self, path: Path, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a file's tensors by the names in `tensors`; what has no place in the model keeps its name."""
        named = {self.rename(name.removeprefix(self.prefix)): array for name, array in found.items()}
        named = {name: a for name, a in named.items() if not any(fnmatchcase(name, each) for each in self.ignored)}
        for copy, original in self.copies.items():
            if copy in named and original in named and not np.array_equal(named.pop(copy), named[original]):
                raise InputError(
                    FIELD, str(path), f"its {copy!r} is not its {original!r}, but in this model they are one tensor."
                )
        for name, parts in self.fused.items():
            if name in named and not len(named[name]) % len(parts):
                named |= zip(parts, np.split(named.pop(name), len(parts)), strict=True)
        return named


def with_weights(model: Model, path: str | None, *namings: Naming) -> Model:
    """Return `model` with an `init` that reads the weights at `path`; if `path` is None, return it unchanged."""
    if path is None:
        return model
    weights = Path(path).expanduser()

    def init(key: Array) -> Any:
        if isinstance(key, jax.core.Tracer):
            # Tracing asks for shapes only, as when a finished run is loaded, and needs no file. Were the result used as
            # values all the same, they would be NaN.
            return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), model.init(key))
        return load(weights, jax.eval_shape(model.init, key), *namings)

    return dataclasses.replace(model, init=init)


def load(path: Path, like: Any, *namings: Naming) -> Any:
    """Load the weights at `path` as float32 parameters.

    If the file has a classifier for the same number of classes, it is used. Otherwise the classifier is all zeros, as
    for fine-tuning in Dosovitskiy et al. 2020: at first all classes are equally likely, and the result does not depend
    on a seed.

    Args:
        path: a `.safetensors` file, or a directory as `transformers` saves it, in one file or several shards.
        like: shapes of the parameters, nested dicts.
        namings: names that the parameters may have in the file; those of which it has most are taken.

    Raises:
        InputError: a file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    tensors = read(path)
    by_naming = [(naming, naming.understood(path, tensors)) for naming in namings]
    naming, found = max(by_naming, key=lambda each: sum(name in each[1] for name, _ in each[0].tensors.values()))
    new_head = "head" in like and (
        (kernel := found.get(naming.tensors["head.kernel"][0])) is None
        or kernel.shape[:1] != (like["head"]["bias"].size,)
    )

    def parameter(keys: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        ours = ".".join(str(key.key) for key in keys)
        theirs, layout = naming.tensors[ours]
        array = found.pop(theirs, None)
        if new_head and ours.startswith("head."):
            return jnp.zeros(leaf.shape, jnp.float32)
        shape = layout.shape(leaf.shape)
        if array is None:
            raise InputError(
                FIELD,
                str(path),
                f"has no tensor {theirs!r}, which must be {shape}; are these weights of another "
                "architecture, or of a smaller variant than model.options say?",
            )
        if array.shape != shape:
            array = layout.fit(array, shape)
        if array.shape != shape:
            raise InputError(
                FIELD,
                str(path),
                f"tensor {theirs!r} is {array.shape}, but must be {shape}; "
                "choose the variant in model.options that the weights belong to.",
            )
        return jnp.asarray(layout.convert(array), jnp.float32)

    params = jax.tree_util.tree_map_with_path(parameter, like)
    if found:
        name = min(found)
        raise InputError(
            FIELD,
            str(path),
            f"has {name!r} {found[name].shape}, which has no place in the model, and {len(found) - 1} more such; "
            "choose the variant in model.options that the weights belong to.",
        )
    return params


def written(params: Any, naming: Naming) -> dict[str, np.ndarray]:
    """Return the tensors of a file of the whole model, by name: what `load` makes `params` of, bit for bit.

    Args:
        params: nested dicts of arrays, on the host or on a device.
        naming: the names of the library that is to read the file.
    """
    tensors = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, layout = naming.tensors[".".join(str(key.key) for key in keys)]
        tensors[name] = layout.invert(np.asarray(leaf))
    for name, parts in naming.fused.items():
        tensors[name] = np.concatenate([tensors.pop(part) for part in parts])
    return {
        name if name.startswith(naming.unprefixed) else naming.prefix + name: np.ascontiguousarray(array)
        for name, array in tensors.items()
    }


def read(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors, by name, from a `.safetensors` file or from a directory with one file or several shards.

    Raises:
        InputError: `path` does not exist, or a file is missing or damaged.
    """
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise InputError(
            FIELD, str(path), "no such file or directory; nothing is downloaded, so put the weights there first."
        )
    return _read_file(path)


def _read_directory(path: Path) -> dict[str, np.ndarray]:
    if (path / SINGLE).is_file():
        return _read_file(path / SINGLE)
    if not (path / INDEX).is_file():
        names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise InputError(
            FIELD,
            str(path),
            f"holds neither {SINGLE} nor {INDEX}, but {names}; other formats are not read, so save it as safetensors.",
        )
    try:
        index = json.loads((path / INDEX).read_text())
        shard_of = {str(name): str(shard) for name, shard in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(FIELD, str(path / INDEX), "is damaged: it maps no tensors to files; fetch it again.") from None
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(shard_of.values())):
        if not (path / shard).is_file():
            raise InputError(FIELD, str(path), f"lacks {shard}, which {INDEX} names; fetch it too.")
        tensors |= _read_file(path / shard)
    if lost := sorted(shard_of.keys() - tensors.keys()):
        raise InputError(
            FIELD,
            str(path),
            f"{INDEX} names {lost[0]!r}, but {shard_of[lost[0]]} has no such tensor; fetch both again.",
        )
    return tensors


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            FIELD, str(path), f"is no complete safetensors file ({error}); fetch or save it again."
        ) from None
