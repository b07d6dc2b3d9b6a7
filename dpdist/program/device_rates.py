"""Device rates by the device name JAX reports, for choosing between ways to compute a gradient norm.

This is a table, not a measurement at run time: equal devices must choose equally, or two runs would not agree bit for
bit. The H100's rates are those that float64 inner products and a copy reached on one (see docs/results/gpu-h100);
the H200 has the same chip and more bandwidth. The others are the published peak rates of float64 matrix products and of
memory, which flatter `ghost`: with them the H100 took 1.2 to 1.3 times as long.
"""

from __future__ import annotations

from dpdist.mechanism.clipping import TWO_CORES, DeviceRates

_BY_NAME = {
    "V100": DeviceRates(flops_float64=7.8e12, bandwidth=0.9e12),
    "A100": DeviceRates(flops_float64=19.5e12, bandwidth=1.6e12),
    "H100": DeviceRates(flops_float64=9.5e12, bandwidth=2.6e12),
    "H200": DeviceRates(flops_float64=9.5e12, bandwidth=3.8e12),
}
#: Any other GPU: most GPUs that are not made for data centres are slow in float64.
_OTHER_GPU = DeviceRates(flops_float64=0.5e12, bandwidth=0.6e12)


def device_rates(device_kind: str, platform: str) -> DeviceRates:
    """Return the rates of a device, such as `NVIDIA A100-SXM4-80GB` of platform `gpu`."""
    if platform == "cpu":
        return TWO_CORES
    return next((rates for name, rates in _BY_NAME.items() if name in device_kind), _OTHER_GPU)
