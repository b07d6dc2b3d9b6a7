"""Draw initial parameters on the host's processor, also where training is on a GPU.

They are drawn once, and compiling takes longer than that: the initialisers of a ViT-B/16, in one program, 38 s for an
H100 and 5 s for a processor, which then draws for half a second (jax 0.11.2 and 0.10.2, 2 cores).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import jax

_LEAST = "jax_persistent_cache_min_compile_time_secs"


@contextlib.contextmanager
def on_the_host() -> Iterator[None]:
    """While the block runs, what JAX computes is on this host's processor, if JAX has one: JAX_PLATFORMS may not.

    What is compiled meanwhile is not kept for a restart, which may be on another kind of processor. Processors without
    fused multiply-add may also differ in a draw's last bit; that ranks begin with the same parameters is checked
    (`dpdist.trainer`). Not for several threads at once: the setting is the process's.
    """
    if jax.default_backend() == "cpu":
        yield
        return
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        yield
        return
    least = getattr(jax.config, _LEAST)
    jax.config.update(_LEAST, math.inf)
    try:
        with jax.default_device(host):
            yield
    finally:
        jax.config.update(_LEAST, least)
