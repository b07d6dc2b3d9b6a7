"""What devices do in a second, by the name JAX gives them, for the choice between ways to a gradient's norm.

A table, not a measurement: two runs on equal devices must choose alike, or they would not agree bit for bit. Rates are
those that the makers publish, of float64 matrix products and of memory.
"""

from __future__ import annotations

from dpdist.mechanism.clipping import TWO_CORES, DeviceRates

_BY_NAME = {
    "V100": DeviceRates(flops_float64=7.8e12, bandwidth=0.9e12),
    "A100": DeviceRates(flops_float64=19.5e12, bandwidth=1.6e12),
    "H100": DeviceRates(flops_float64=67e12, bandwidth=3.3e12),
    "H200": DeviceRates(flops_float64=67e12, bandwidth=4.8e12),
}
#: A GPU that is not in the table: most that are not made for data centres do little in float64.
_OTHER_GPU = DeviceRates(flops_float64=0.5e12, bandwidth=0.6e12)


def device_rates(device_kind: str, platform: str) -> DeviceRates:
    """The rates of a device, such as `NVIDIA A100-SXM4-80GB` of platform `gpu`."""
    if platform == "cpu":
        return TWO_CORES
    return next((rates for name, rates in _BY_NAME.items() if name in device_kind), _OTHER_GPU)
