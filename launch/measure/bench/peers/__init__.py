"""Other projects' implementations, on the same models and weights: needs the extra `peers`."""

from __future__ import annotations

import os
from importlib.util import find_spec

from dpdist.errors import InputError
from dpdist_launch.measure.bench.program import Arm

#: Every peer arm, and what it is.
PEERS = {
    "jax_privacy": "`jax_privacy.clipped_grad`, with its padding mask",
    "torch sgd": "plain SGD in eager PyTorch: one backward pass over the summed losses",
    "opacus": "Opacus, per-sample gradients (`GradSampleModule`, `DPOptimizer.clip_and_accumulate`)",
    "opacus ghost": "Opacus, ghost clipping (`GradSampleModuleFastGradientClipping`, two backward passes)",
}
#: Peers that one would expect and that are not here, and why.
ABSENT = {"fastDP": "not installable from a registry"}


def peer_arms() -> list[Arm]:
    """All of them, each framework's plain SGD before its private arms.

    Raises:
        InputError: a package is missing; it names them all.
    """
    missing = [name for name in ("jax_privacy", "torch", "opacus") if find_spec(name) is None]
    if missing:
        raise InputError("--peers", ", ".join(missing), "is not installed here: pip install -e .[peers].")
    # Threads of PyTorch spin while they wait for each other. On cores that any other process wants too, that made its
    # times twenty times longer (measured); OpenMP reads this as it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dpdist_launch.measure.bench.peers.jax_privacy_arm import jax_privacy_arm
    from dpdist_launch.measure.bench.peers.torch_arms import torch_arms

    return [jax_privacy_arm(), *torch_arms()]
