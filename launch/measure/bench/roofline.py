"""Predict the time of plain SGD and of DP-SGD on a GPU: operations and bytes, each divided by an assumed rate.

All times are seconds an example, at a physical batch so large that reading the parameters does not count. Only the
gradient sum is predicted: no noise, no all-reduce, no optimizer. Three ways to clip:

`highest`  norms in float64, weighted sums in float32 at HIGHEST precision, strategies as `auto` chooses for the device;
`tensor`   inner products and sums on tensor cores, the bound on their rounding in float64; per parameter the cheaper of
           `ghost` and `instantiate`, with one A A^T for all uses that share the operand A;
`fused`    the same with a third choice: a kernel that computes every example's gradient once more and squares it in the
           accumulators, so that neither it nor a [t, t] product is written.

A roofline adds what it takes for granted: that elementwise work is fused into the products around it, and that every
product reaches the assumed part of the peak. docs/roofline.md has the assumptions beside what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dpdist.errors import InputError
from dpdist.mechanism.clipping.factors import Factors
from dpdist.program.device_rates import PEAK_RATES, PeakRates, device_rates, faster
from dpdist_launch.measure.bench import workload
from dpdist_launch.measure.bench.table import markdown
from dpdist_launch.measure.bench.tasks import TASKS
from dpdist_launch.measure.bench.workload import Leaf, Workload

#: The format of the products in training -> the dtype of a model in that format.
FORMATS = {"bf16": "bfloat16", "tf32": "float32", "float32": "float32"}
MODELS = ("vit-b", "vit-l", "bert-base", "gpt2-small", "r50x1")
#: (model, format) -> the largest DP/SGD that the project aims at, on the devices of `TARGET_DEVICES`.
TARGETS = {
    ("vit-b", "bf16"): 1.35,
    ("vit-b", "tf32"): 1.35,
    ("gpt2-small", "bf16"): 1.2,
    ("gpt2-small", "tf32"): 1.2,
}
TARGET_DEVICES = ("A100", "H100")


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The part of a peak rate that each kind of work reaches."""

    #: Large products of training in the training format.
    product: float
    #: Products of data with data: attention.
    attention: float
    #: Batches of [t, t] inner products in the training format, with t padded to a multiple of 64.
    gram: float
    #: The same in float64.
    gram_float64: float
    #: Products in float32 at HIGHEST precision.
    highest: float
    memory: float


#: Our guess before any GPU was measured, with tensor cores.
ASSUMED = Efficiency(product=0.65, attention=0.40, gram=0.50, gram_float64=0.68, highest=0.85, memory=0.80)
#: Training in float32 outside of tensor cores.
ASSUMED_PLAIN = Efficiency(product=0.85, attention=0.85, gram=0.68, gram_float64=0.68, highest=0.85, memory=0.80)
#: (device, format) -> what was reached on one H100 (docs/results/gpu-h100): weight gradients and inner products of
#: ViT-B's layers at t = 197 (padded to 256 in the training format), float32 at HIGHEST, a copy; attention as assumed.
MEASURED = {
    ("H100", "bf16"): Efficiency(
        product=525 / 989, attention=0.40, gram=315 / 989, gram_float64=21 / 67, highest=43 / 67, memory=2.5 / 3.35
    ),
    ("H100", "tf32"): Efficiency(
        product=171 / 495, attention=0.40, gram=204 / 495, gram_float64=21 / 67, highest=43 / 67, memory=2.5 / 3.35
    ),
}
#: `ghost` computes 10 of the 16 blocks of a symmetric [t, t] product from this many rows on.
_SPLIT_FROM, _SPLIT = 128, 10 / 16


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how training runs."""

    device: str
    peak: PeakRates
    format: str
    efficiency: Efficiency

    @property
    def wide(self) -> int:
        """Bytes of a number in the training dtype."""
        return 2 if self.format == "bf16" else 4

    @property
    def rate(self) -> float:
        """Peak operations per second of the training format."""
        found = {"bf16": self.peak.bfloat16, "tf32": self.peak.tf32, "float32": self.peak.float32}[self.format]
        assert found is not None
        return found

    def product(self, flops: float) -> float:
        """Seconds of large products in the training format."""
        return flops / (self.rate * self.efficiency.product)

    def moved(self, count: float) -> float:
        """Seconds to read or write `count` bytes."""
        return count / (self.peak.bandwidth * self.efficiency.memory)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a way to clip takes beyond SGD, in seconds an example; `sums` replaces SGD's own weight gradients."""

    norms: float
    sums: float
    how: str

    @property
    def total(self) -> float:
        return self.norms + self.sums


def sgd(work: Workload, at: Setting) -> tuple[float, float]:
    """Return the seconds of the forward pass and the gradients at the data, and those of the weight gradients.

    Elementwise traffic is that of reading and writing every product's data-derived operands and results once in each of
    three passes.
    """
    attention = (work.data_flops + 2 * work.data_back_flops) / (at.rate * at.efficiency.attention)
    return (
        at.product(work.parameter_flops + work.back_flops) + attention + at.moved(work.moved + 2 * work.moved_back),
        at.product(work.weight_flops),
    )


def _flops(group: Sequence[Factors]) -> float:
    """Operations of the weight gradient of one example; a lookup has none."""
    return sum(2.0 * use.groups * use.length * use.m * use.n for use in group if not use.one_hot)


def _without_factors(work: Workload, at: Setting) -> tuple[float, float]:
    """Return (seconds to write and twice read the gradients without factors, seconds of their products)."""
    only = [leaf for leaf in work.leaves if not leaf.groups]
    known = sum(_flops(group) for leaf in work.leaves for group in leaf.groups)
    return at.moved(12 * sum(leaf.size for leaf in only)), at.product(max(0.0, work.weight_flops - known))


def highest(work: Workload, at: Setting) -> list[tuple[Leaf, Cost]]:
    """Return the cost of every parameter with factors, by the strategy that `auto` chooses on this device."""
    prefer, found = faster(device_rates(at.device, "gpu")), []
    plain = at.peak.float32 * at.efficiency.highest
    for leaf in work.leaves:
        if not leaf.groups:
            continue
        how = prefer(leaf.groups)[0]
        norms, sums = 0.0, sum(_flops(group) for group in leaf.groups) / plain
        for group in leaf.groups:
            if how == "instantiate":
                norms += at.moved(12 * group[0].groups * group[0].m * group[0].n)
                continue
            flops, t = _gram_flops(group, share={}, pad=1)
            columns = sum(use.length * use.groups * (use.n + (0 if use.one_hot else use.m)) for use in group)
            norms += flops / (at.peak.float64 * at.efficiency.gram_float64)
            # Both factors are converted to float64 (4 read, 8 written), the two [t, t] products written and read.
            norms += at.moved(12 * columns + 32 * t * t * group[0].groups)
            # The weight and the mask are applied to factors in float32: written and read.
            sums += at.moved(8 * columns)
        found.append((leaf, Cost(norms=norms, sums=sums, how=how)))
    return found


def tensor(work: Workload, at: Setting, *, fused: bool = False) -> list[tuple[Leaf, Cost]]:
    """Return the cost of every parameter with factors, by the cheapest way; `fused` allows the kernel."""
    share, found = work.sharing, []
    for leaf in work.leaves:
        if not leaf.groups:
            continue
        flops = sum(_flops(group) for group in leaf.groups)
        ways = [
            _tensor_ghost(leaf, at, share),
            Cost(norms=at.moved(12 * _size(leaf)), sums=at.product(flops), how="instantiate"),
        ]
        if fused and not any(use.one_hot for group in leaf.groups for use in group):
            folding = sum(_folding(group, at, share) for group in leaf.groups)
            ways.append(Cost(norms=at.product(flops), sums=at.product(flops) + folding, how="fused"))
        found.append((leaf, min(ways, key=lambda way: way.total)))
    return found


def _size(leaf: Leaf) -> int:
    return sum(group[0].groups * group[0].m * group[0].n for group in leaf.groups)


def _tensor_ghost(leaf: Leaf, at: Setting, share: dict[int, int]) -> Cost:
    norms = sums = 0.0
    for group in leaf.groups:
        flops, t = _gram_flops(group, share=share, pad=64)
        blocks, shared = (_SPLIT if t >= _SPLIT_FROM else 1.0), _shared(group, share)
        square = blocks * t * t * group[0].groups
        read = sum(use.length * use.groups * (use.n + (0 if use.one_hot else use.m / shared)) for use in group)
        norms += flops / (at.rate * at.efficiency.gram)
        # Two float32 products are written and read, with ten float64 operations an entry, not on tensor cores.
        norms += at.moved(at.wide * read + 8 * square * (1 / shared + 1)) + 10 * square / (at.peak.float64 / 2)
        sums += at.product(_flops(group)) + _folding(group, at, share)
    return Cost(norms=norms, sums=sums, how="ghost")


def _shared(group: Sequence[Factors], share: dict[int, int]) -> int:
    """Return how many uses divide this group's product A A^T; a group of several uses has its own."""
    return share.get(group[0].data, 1) if len(group) == 1 and not group[0].one_hot else 1


def _folding(group: Sequence[Factors], at: Setting, share: dict[int, int]) -> float:
    """Seconds to read the smaller factor and write it with the weight; the other is read as the loss stored it."""
    moved = 0.0
    for use in group:
        columns = use.m / _shared(group, share) if use.weighted_left else use.n
        moved += use.length * use.groups * columns
    return at.moved(2 * at.wide * moved)


def _gram_flops(group: Sequence[Factors], *, share: dict[int, int], pad: int) -> tuple[float, int]:
    """Return operations of the [t, t] inner products of a group, and t; its uses are stacked along t.

    Inner products of one-hot rows are comparisons, and those of one-hot with other rows are lookups: only the other
    factor has operations.
    """
    dense, hot = [use for use in group if not use.one_hot], [use for use in group if use.one_hot]
    t, rows = sum(use.length for use in group), sum(use.length for use in dense)
    if t == 1:
        return 0.0, 1
    flops = 0.0
    if dense:
        padded = math.ceil(rows / pad) * pad
        blocks = _SPLIT if rows >= _SPLIT_FROM else 1.0
        flops += 2 * blocks * padded**2 * dense[0].groups * (dense[0].m / _shared(group, share) + dense[0].n)
    for use in hot:
        # With its own rows (half of them, by symmetry) and with the rows of all other uses.
        flops += use.length**2 * use.n + 2 * use.length * rows * use.n
    return flops, t


def predict(work: Workload, at: Setting) -> dict[str, Any]:
    """Return seconds an example of SGD and of each way, the ratios, and how many parameters each way treats how.

    `tensor` and `fused` are None in float32, which no tensor core multiplies.
    """
    passes, weights = sgd(work, at)
    found: dict[str, Any] = {"sgd": {"seconds": passes + weights}}
    instantiated, products = _without_factors(work, at)
    ways = {"highest": highest(work, at)}
    if at.format != "float32":
        ways |= {"tensor": tensor(work, at), "fused": tensor(work, at, fused=True)}
    for name, costs in ways.items():
        norms, sums = (
            sum(cost.norms for _, cost in costs) + instantiated,
            sum(cost.sums for _, cost in costs) + products,
        )
        chosen = [cost.how for _, cost in costs]
        found[name] = {
            "seconds": passes + norms + sums,
            "ratio": (passes + norms + sums) / (passes + weights),
            "norms": norms,
            "sums": sums,
            "parameters": {how: chosen.count(how) for how in sorted(set(chosen))}
            | {"no factors": sum(not leaf.groups for leaf in work.leaves)},
        }
    return found


def settings(devices: Sequence[str]) -> Iterator[tuple[str, Setting]]:
    """Yield (assumed or measured, setting) of every format that the devices' cores have."""
    for device in devices:
        peak = PEAK_RATES[device]
        for form, rate in (("bf16", peak.bfloat16), ("tf32", peak.tf32), ("float32", peak.float32)):
            if rate is None:
                continue
            assumed = ASSUMED_PLAIN if form == "float32" else ASSUMED
            yield "assumed", Setting(device=device, peak=peak, format=form, efficiency=assumed)
            if (device, form) in MEASURED:
                yield "measured", Setting(device=device, peak=peak, format=form, efficiency=MEASURED[device, form])


def roofline(*, devices: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
    """Return predictions for all models on all devices, in every format.

    Raises:
        InputError: a device has no rates, or a model is unknown.
    """
    for device in devices:
        if device not in PEAK_RATES:
            raise InputError("--device", device, f"there are {', '.join(PEAK_RATES)}.")
    for model in models:
        if model not in TASKS:
            raise InputError("--models", model, f"there are {', '.join(TASKS)}.")
    rows = []
    for model in models:
        traced: dict[str, Workload] = {}
        for rates, at in settings(devices):
            dtype = FORMATS[at.format]
            if dtype == "bfloat16" and model in workload.FLOAT32_ONLY:
                continue
            if dtype not in traced:
                traced[dtype] = workload.named(model, dtype)
            target = TARGETS.get((model, at.format)) if at.device in TARGET_DEVICES else None
            found = predict(traced[dtype], at)
            rows.append(
                {"model": model, "device": at.device, "format": at.format, "rates": rates}
                | found
                | {"target": target, "met": None if target is None else found["tensor"]["ratio"] <= target}
            )
    return {
        "what": "predicted seconds of one example's part of a gradient sum, and ratios to plain SGD",
        "peak_rates": {device: vars(PEAK_RATES[device]) for device in devices},
        "efficiencies": {"assumed": vars(ASSUMED), "assumed in float32": vars(ASSUMED_PLAIN)}
        | {
            f"measured, {device} {form}": vars(found) for (device, form), found in MEASURED.items() if device in devices
        },
        "rows": rows,
    }


def text(content: dict[str, Any]) -> str:
    """Return the predictions as a Markdown table."""
    lines = []
    for row in content["rows"]:
        ratios = [f"{row[way]['ratio']:.2f}" if way in row else "-" for way in ("highest", "tensor", "fused")]
        aim = ""
        if row["target"] is not None:
            ratio, target = row["tensor"]["ratio"], row["target"]
            aim = f"met: <= {target:g}" if row["met"] else f"MISSED: {ratio:.3f} > {target:g}"
        ways = ", ".join(f"{n} {how}" for how, n in row.get("tensor", row["highest"])["parameters"].items())
        lines.append(
            [
                row["model"],
                row["device"],
                row["format"],
                row["rates"],
                f"{row['sgd']['seconds'] * 1e6:,.0f}",
                *ratios,
                aim,
                ways,
            ]
        )
    head = "model,device,format,rates,sgd us an example,highest / sgd,tensor / sgd,fused / sgd,target for tensor,ways"
    return markdown(head.split(","), lines) + "\n"
