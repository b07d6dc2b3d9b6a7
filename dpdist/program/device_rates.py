"""Device rates by the device name JAX reports: `DeviceRates` to choose by, `PeakRates` to predict with.

`DeviceRates` choose between ways to compute a gradient norm. They are a table, not a measurement at run time: equal
devices must choose equally, or two runs would not agree bit for bit. The H100's rates are those that float64 inner
products and a copy reached on one (see docs/results/gpu-h100); the H200 has the same chip and more bandwidth. The
others are the published peak rates of float64 matrix products and of memory, which flatter `ghost`: with them the H100
took 1.2 to 1.3 times as long. On tensor cores, small products are taken to reach half of the published TF32 rate.

`PeakRates` are the dense rates (without sparsity) of NVIDIA's data sheets, for the SXM modules (V100 of 32 GB, A100 of
40 GB, H100, H200) and the L40S. No choice of training depends on them; `dpdist bench roofline` predicts with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from dpdist.mechanism.clipping import Preference
from dpdist.mechanism.clipping.factors import Factors
from dpdist.mechanism.clipping.strategy import Strategy, length_of, size_of


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """Peak rates of a device; the choice of strategy depends only on their ratio."""

    #: Floating-point operations per second in a float64 matrix product.
    flops_float64: float
    #: The same of float32 products on tensor cores (TF32, or faster), in many small ones; as `flops_float64` elsewhere.
    flops_tensor: float
    #: Bytes per second read from or written to the device's memory.
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class PeakRates:
    """Published dense peak rates of a device: operations per second by format, bytes per second of memory."""

    #: Matrix products on tensor cores with float32 accumulation; None where the cores do not have the format.
    bfloat16: float | None
    tf32: float | None
    #: Float32 outside of tensor cores.
    float32: float
    #: Matrix products in float64, on tensor cores where these have it.
    float64: float
    bandwidth: float


#: Two CPU cores of 2024: the rates of any CPU.
TWO_CORES = DeviceRates(flops_float64=4e10, flops_tensor=8e10, bandwidth=1e10)
_BY_NAME = {
    "V100": DeviceRates(flops_float64=7.8e12, flops_tensor=7.8e12, bandwidth=0.9e12),
    "A100": DeviceRates(flops_float64=19.5e12, flops_tensor=78e12, bandwidth=1.6e12),
    "H100": DeviceRates(flops_float64=9.5e12, flops_tensor=247e12, bandwidth=2.6e12),
    "H200": DeviceRates(flops_float64=9.5e12, flops_tensor=247e12, bandwidth=3.8e12),
}
PEAK_RATES = {
    "V100": PeakRates(bfloat16=None, tf32=None, float32=15.7e12, float64=7.8e12, bandwidth=0.9e12),
    "A100": PeakRates(bfloat16=312e12, tf32=156e12, float32=19.5e12, float64=19.5e12, bandwidth=1.56e12),
    "H100": PeakRates(bfloat16=989e12, tf32=495e12, float32=67e12, float64=67e12, bandwidth=3.35e12),
    "H200": PeakRates(bfloat16=989e12, tf32=495e12, float32=67e12, float64=67e12, bandwidth=4.8e12),
    "L40S": PeakRates(bfloat16=362e12, tf32=183e12, float32=91.6e12, float64=1.43e12, bandwidth=0.864e12),
}
#: Any other GPU: most GPUs that are not made for data centres are slow in float64.
_OTHER_GPU = DeviceRates(flops_float64=0.5e12, flops_tensor=30e12, bandwidth=0.6e12)


def device_rates(device_kind: str, platform: str) -> DeviceRates:
    """Return the rates of a device, such as `NVIDIA A100-SXM4-80GB` of platform `gpu`."""
    if platform == "cpu":
        return TWO_CORES
    return next((rates for name, rates in _BY_NAME.items() if name in device_kind), _OTHER_GPU)


def has_tensor_cores(device: jax.Device) -> bool:
    """Return whether a device has tensor cores for bfloat16 and TF32: NVIDIA GPUs from compute capability 8 on."""
    capability = str(getattr(device, "compute_capability", "0"))
    return device.platform == "gpu" and capability[0].isdigit() and int(capability.split(".")[0]) >= 8


def table_name(device_kind: str) -> str | None:
    """Return the name in `PEAK_RATES` of a device, such as A100 of `NVIDIA A100-SXM4-80GB`; None if it is not there."""
    return next((name for name in PEAK_RATES if name in device_kind), None)


def faster(rates: DeviceRates, *, tensor: bool = False) -> Preference:
    """Prefer the strategy that takes less time on `rates`: operations and bytes, each divided by its rate, added up.

    Args:
        tensor: whether inner products run on tensor cores, from short factors, or in float64.
    """
    flops = rates.flops_tensor if tensor else rates.flops_float64
    # Bytes a factor's entry and a pair of rows: in float64, factors are converted, and both [t, t] products are written
    # and read; on tensor cores the factors are read once more and the products are float32.
    entry, pair = (4, 16) if tensor else (12, 32)

    def prefer(groups: Sequence[Sequence[Factors]]) -> tuple[Strategy, dict[str, float]]:
        ghost = instantiate = 0.0
        for group in groups:
            t, f = length_of(group), group[0]
            wide = max((0 if use.one_hot else use.m) + use.n for use in group)  # of a tied table, the dense use
            inner = (2 if tensor else 1) * t * (t + 1) * wide * f.groups  # in float64, each pair of rows is taken once
            moved = entry * t * wide * f.groups + pair * t * t * f.groups
            ghost += inner / flops + moved / rates.bandwidth
            # The product that `instantiate` computes is not counted: `ghost` computes it too, for the weighted sum.
            instantiate += 12 * size_of(f) / rates.bandwidth
        return ("ghost" if ghost < instantiate else "instantiate"), {"ghost": ghost, "instantiate": instantiate}

    return prefer
