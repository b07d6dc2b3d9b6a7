"""Lines that libraries print in every run and that say nothing about it: Gloo's connections, XLA's start-up messages.

One table, each pattern with a line that was seen. A pattern matches a whole line, and a library's own words in it: no
line of dpdist, SLURM or a traceback can match. XLA's other messages stay, however long: they may be the cause.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: How XLA's log begins a line: a letter for its severity and a time, or the older form with the date in front.
_HEAD = r"([IWE]\d{4} \d\d:\d\d:[\d.]+\s+\d+ |\d{4}-\d\d-\d\d \d\d:\d\d:[\d.]+: [IWE] )(\S*/)?"


@dataclass(frozen=True)
class Noise:
    """A kind of line."""

    pattern: str
    example: str


NOISE = (
    # Also torn, where two ranks write at once.
    Noise(
        r"(?=.*peer ranks)(\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :"
        r"|\d+|\s)+",
        "[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1",
    ),
    Noise(
        r"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR",
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    ),
    Noise(
        _HEAD + r"cuda_(dnn|blas|fft)\.cc:\d+\] Unable to register \w+ factory: .*already been registered",
        "E0000 00:00:1764230571.201482    7101 cuda_dnn.cc:8579] Unable to register cuDNN factory: Attempting to "
        "register factory for plugin cuDNN when one has already been registered",
    ),
    Noise(
        _HEAD + r"computation_placer\.cc:\d+\] computation placer already registered.*",
        "W0000 00:00:1764230571.214306    7101 computation_placer.cc:177] computation placer already registered. "
        "Please check linkage and avoid linking the same target more than once.",
    ),
    Noise(
        _HEAD + r"(cuda_timer|gpu_timer)\.cc:\d+\] Delay kernel timed out: measured time has sub-optimal accuracy\..*",
        "2025-05-14 10:34:02.197166: E external/xla/xla/stream_executor/cuda/cuda_timer.cc:86] Delay kernel timed out: "
        "measured time has sub-optimal accuracy. There may be a missing warmup execution, please investigate in Nsight "
        "Systems.",
    ),
    Noise(
        _HEAD + r"cpu_aot_loader\.cc:\d+\] Loading XLA:CPU AOT result\. .*",
        "E0000 00:00:1764230571.214306    7101 cpu_aot_loader.cc:210] Loading XLA:CPU AOT result. Target machine "
        "feature +prefer-no-scatter is not  supported on the host machine. Machine type used for XLA:CPU compilation "
        "doesn't match the machine type for execution.",
    ),
    Noise(
        _HEAD + r"cpu_feature_guard\.cc:\d+\] This TensorFlow binary is optimized to use available CPU instructions.*",
        "2025-05-14 10:34:02.197166: I tensorflow/core/platform/cpu_feature_guard.cc:210] This TensorFlow binary is "
        "optimized to use available CPU instructions in performance-critical operations.",
    ),
)
_ANY = re.compile("|".join(f"(?:{noise.pattern})" for noise in NOISE))


def is_noise(line: str) -> bool:
    """Whether a line, without the rank in front of it, is nothing but a library's chatter."""
    return _ANY.fullmatch(line.rstrip()) is not None
