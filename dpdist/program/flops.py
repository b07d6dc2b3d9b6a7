"""How many floating-point operations an example costs, and which part of a device's peak rate a run reaches.

The operations are those of the compiled program that clips and sums one microbatch, as XLA counts them, divided by its
examples. The draw of the noise, the all-reduce and the optimizer are not in it, nor is padding: the rate is that of
useful work, B examples a step, whatever the samples' sizes were, and so it is public.
"""

from __future__ import annotations

from dpdist.mechanism.step import StepPrograms
from dpdist.program.device_rates import PEAK_RATES, table_name


def flops_per_example(programs: StepPrograms, physical: int) -> float | None:
    """Floating-point operations an example of the full microbatch, `physical` examples.

    None where XLA does not tell, or where the program has a loop: of that it counts one pass alone.
    """
    compiled = programs.compiled()[f"accumulate_{physical}"]
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return flops / physical if flops > 0 and " while(" not in compiled.as_text() else None


def peak_flops(device_kind: str, platform: str) -> float | None:
    """The published dense rate of a GPU, operations a second, in bfloat16, or in float32 where it has no such cores.

    One rate for all precisions, so that numbers can be compared; None for a CPU, and for GPUs that are in no table.
    """
    name = table_name(device_kind) if platform == "gpu" else None
    return None if name is None else PEAK_RATES[name].bfloat16 or PEAK_RATES[name].float32


def speed(
    flops: float | None, examples_per_second: float | None, devices: int, device_kind: str, platform: str
) -> dict[str, float | None]:
    """TFLOP/s of one device, and MFU: the part of `peak_flops` that this is. None where it is not known.

    Args:
        flops: operations an example.
        examples_per_second: of all `devices` together.
    """
    if flops is None or examples_per_second is None:
        return {"tflops_per_device": None, "mfu": None}
    rate, peak = flops * examples_per_second / devices, peak_flops(device_kind, platform)
    return {"tflops_per_device": rate / 1e12, "mfu": None if peak is None else rate / peak}
