"""The models of `dpdist.models` in PyTorch, built from layers that Opacus supports.

Modules have the names of our parameters, so that weights map one to one. Our bare parameters are embeddings here,
because Opacus computes per-sample gradients of modules only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdist.errors import InputError
from dpdist.models.bert import VARIANTS as BERT_VARIANTS
from dpdist.models.resnet import GROUPS
from dpdist.models.resnet import VARIANTS as RESNET_VARIANTS
from dpdist.models.standardised import WEIGHT_EPSILON
from dpdist.models.vit import VARIANTS as VIT_VARIANTS
from dpdist_launch.measure.bench.tasks import Task

#: Epsilon of the transformers' layer norms.
EPSILON = 1e-12


def torch_model(task: Task) -> nn.Module:
    """Build a task's module, which maps columns with a leading batch axis to logits [batch, classes].

    Raises:
        InputError: we have no PyTorch version of the task's model.
    """
    name, options = task.model.name, task.model.options
    if name not in _MODELS:
        raise InputError("model.name", name, f"for PyTorch there are {', '.join(_MODELS)}.")
    return _MODELS[name](task, options)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _TransformerMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.grow, self.shrink = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.shrink(F.gelu(self.grow(x)))


class _Layer(nn.Module):
    """A transformer layer; ViT normalises before attention and MLP, BERT after them."""

    def __init__(self, width: int, heads: int, inner: int, *, before: bool) -> None:
        super().__init__()
        self.attention, self.mlp = _Attention(width, heads), _TransformerMlp(width, inner)
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


def _rows(table: nn.Embedding, count: int, batch: int) -> Tensor:
    """Look up the first `count` rows for every example; Opacus needs a batch axis that exists in memory."""
    return table(torch.arange(count, device=table.weight.device).repeat(batch, 1))


def _channels_first(image: Tensor) -> Tensor:
    """Turn [batch, height, width, channels] into NCHW, with that order in memory too.

    Opacus 1.6 assumes that padded activations are contiguous, without looking at their strides, so its gradients of a
    convolution on channels-last memory are wrong. With one channel, only a copy changes the strides.
    """
    return image.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


class _Vit(nn.Module):
    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__()
        width, depth, heads, mlp, self.patch = _sizes(VIT_VARIANTS[options.get("variant", "B/16")], options)
        self.grid = options.get("image_size", 224) // self.patch
        channels = task.example["image"][0][-1]
        self.embed = nn.Linear(self.patch**2 * channels, width)
        self.class_token, self.positions = nn.Embedding(1, width), nn.Embedding(1 + self.grid**2, width)
        self.layers = nn.ModuleList([_Layer(width, heads, mlp, before=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width, EPSILON), nn.Linear(width, task.classes)

    def forward(self, columns: dict[str, Tensor]) -> Tensor:
        x = (columns["image"].float() - 127.5) / 127.5
        x = x.unflatten(1, (self.grid, self.patch)).unflatten(3, (self.grid, self.patch)).transpose(2, 3)
        x = self.embed(x.flatten(3).flatten(1, 2))
        x = torch.cat([_rows(self.class_token, 1, len(x)), x], 1)
        x = x + _rows(self.positions, x.shape[1], len(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


class _Bert(nn.Module):
    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__()
        width, depth, heads, mlp = _sizes(BERT_VARIANTS[options.get("variant", "base")], options)
        self.words = nn.Embedding(options.get("vocabulary", 30522), width)
        self.positions, self.segments = nn.Embedding(options.get("positions", 512), width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, EPSILON)
        self.layers = nn.ModuleList([_Layer(width, heads, mlp, before=False) for _ in range(depth)])
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, task.classes)

    def forward(self, columns: dict[str, Tensor]) -> Tensor:
        tokens = columns["input_ids"]
        x = self.words(tokens) + self.segments(torch.zeros_like(tokens))
        x = self.norm(x + _rows(self.positions, tokens.shape[1], len(x)))
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


def _sizes(usual: Mapping[str, int], options: Mapping[str, Any]) -> list[int]:
    """Width, depth, heads, the MLP's inner width, and the patch side of a ViT."""
    return [options.get(name, size) for name, size in usual.items()]


class _Cnn(nn.Module):
    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__()
        height, width, channels = task.example["image"][0]
        self.conv1, self.conv2 = nn.Conv2d(channels, 16, 8, 2, 3), nn.Conv2d(16, 32, 4, 2)
        rows, columns = (((side // 2 - 1) - 4) // 2 for side in (height, width))
        self.dense, self.head = nn.Linear(32 * rows * columns, 32), nn.Linear(32, task.classes)

    def forward(self, columns: dict[str, Tensor]) -> Tensor:
        x = _channels_first(columns["image"].float() / 255)
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2, 1)
        x = F.max_pool2d(torch.tanh(self.conv2(x)), 2, 1)
        return self.head(torch.tanh(self.dense(x.permute(0, 2, 3, 1).flatten(1))))


class _Mlp(nn.Module):
    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__()
        widths = [math.prod(task.example["image"][0]), *options.get("hidden", (64,)), task.classes]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])

    def forward(self, columns: dict[str, Tensor]) -> Tensor:
        x = columns["image"].float().flatten(1) / 255
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class _Convolution(nn.Module):
    """A convolution with a standardised kernel. Opacus has no rule for it and differentiates it with functorch."""

    def __init__(self, size: int, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, channels, size, size))
        self.stride, self.pad = stride, size // 2

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), unbiased=False, keepdim=True)
        kernel = (self.weight - mean) * torch.rsqrt(variance + WEIGHT_EPSILON)
        return F.conv2d(x, kernel, None, self.stride, self.pad)


class _Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group = nn.GroupNorm(GROUPS, channels, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.group(x))


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, first: bool) -> None:
        super().__init__()
        inner = out // 4
        self.norm1, self.conv1 = _Norm(channels), _Convolution(1, channels, inner)
        self.norm2, self.conv2 = _Norm(inner), _Convolution(3, inner, inner, stride)
        self.norm3, self.conv3 = _Norm(inner), _Convolution(1, inner, out)
        self.project = _Convolution(1, channels, out, stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shortcut = x if self.project is None else self.project(y)
        return shortcut + self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(y)))))


class _BitResNet(nn.Module):
    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__()
        usual = RESNET_VARIANTS[options.get("variant", "50x1")]
        channels = options.get("channels", usual["channels"])
        width = channels[0] // 4
        self.stem = _Convolution(7, task.example["image"][0][-1], width, 2)
        stages = []
        for stage, (depth, out) in enumerate(zip(options.get("layers", usual["layers"]), channels, strict=True)):
            blocks = []
            for i in range(depth):
                blocks.append(_Block(width, out, 2 if i == 0 < stage else 1, i == 0))
                width = out
            stages.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)
        self.norm, self.head = _Norm(width), nn.Linear(width, task.classes)

    def forward(self, columns: dict[str, Tensor]) -> Tensor:
        x = _channels_first((columns["image"].float() - 127.5) / 127.5)
        x = F.max_pool2d(F.pad(self.stem(x), (1, 1, 1, 1)), 3, 2)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(self.norm(x).mean((2, 3)))


_MODELS: dict[str, Callable[[Task, Mapping[str, Any]], nn.Module]] = {
    "cnn": _Cnn,
    "mlp": _Mlp,
    "vit": _Vit,
    "bert": _Bert,
    "bit_resnet": _BitResNet,
}
