"""Arithmetic and memory rates of devices by JAX's device name, to choose each parameter's clipping strategy.

The rates come from a table, not from a measurement: two runs on equal devices must choose the same strategies, or their
results would differ in the last bits. They are the published peak rates of float64 matrix products and of memory.
"""

from __future__ import annotations

from dpdist.mechanism.clipping import TWO_CORES, DeviceRates

_BY_NAME = {
    "V100": DeviceRates(flops_float64=7.8e12, bandwidth=0.9e12),
    "A100": DeviceRates(flops_float64=19.5e12, bandwidth=1.6e12),
    "H100": DeviceRates(flops_float64=67e12, bandwidth=3.3e12),
    "H200": DeviceRates(flops_float64=67e12, bandwidth=4.8e12),
}
#: Any other GPU: most GPUs that are not made for data centres are slow in float64.
_OTHER_GPU = DeviceRates(flops_float64=0.5e12, bandwidth=0.6e12)


def device_rates(device_kind: str, platform: str) -> DeviceRates:
    """Return the rates of a device, such as `NVIDIA A100-SXM4-80GB` of platform `gpu`."""
    if platform == "cpu":
        return TWO_CORES
    return next((rates for name, rates in _BY_NAME.items() if name in device_kind), _OTHER_GPU)
