"""Other projects' implementations as arms, on the same models and weights; needs the extra `peers`."""

from __future__ import annotations

import os
from importlib.util import find_spec

from dpdist.errors import InputError
from dpdist_launch.measure.bench.program import Arm

#: Every peer arm, with its description.
PEERS = {
    "jax_privacy": "`jax_privacy.clipped_grad`, with its padding mask",
    "jax_privacy loop": "the same with `microbatch_size=1`: a loop over examples",
    "torch sgd": "plain SGD in eager PyTorch: one backward pass over the summed losses",
    "opacus": "Opacus, per-sample gradients (`GradSampleModule`, `DPOptimizer.clip_and_accumulate`)",
    "opacus ghost": "Opacus, ghost clipping (`GradSampleModuleFastGradientClipping`, two backward passes)",
}
#: Peers that a reader might miss, and why they are not measured.
ABSENT = {"fastDP": "not installable from a registry"}


def peer_arms(*, installed: bool = False) -> list[Arm]:
    """Return all peer arms, each framework's plain SGD before its private arms; or those that are `installed` here.

    Raises:
        InputError: packages are missing, and not `installed`; it names all of them.
    """
    missing = [name for name in ("jax_privacy", "torch", "opacus") if find_spec(name) is None]
    if missing and not installed:
        raise InputError("--peers", ", ".join(missing), "is not installed here: pip install -e .[peers].")
    # PyTorch's threads spin while they wait for each other. On cores shared with any other process that made its times
    # twenty times longer (measured). OpenMP reads this variable when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    found = []
    if "jax_privacy" not in missing:
        from dpdist_launch.measure.bench.peers.jax_privacy_arm import jax_privacy_arms

        found += jax_privacy_arms()
    if not {"torch", "opacus"} & set(missing):
        from dpdist_launch.measure.bench.peers.torch_arms import torch_arms

        found += torch_arms()
    return found
