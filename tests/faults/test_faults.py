"""Invariants 2 and 11 under faults: each at the phase where it hurts, and every phase with some fault.

`python -m tests.faults.matrix` has all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import disk, network
from .faults import FAULTS
from .harness import Bench, Outcome, disturb


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.close()


def require(fault: str) -> None:
    """Skip where this fault cannot be made; with DPDIST_REQUIRE_SLURM=1, which CI sets, fail."""
    makers = {"plain": lambda: None, "host": network.can_be_made, "pair": network.can_be_made, "disk": disk.can_be_made}
    why = makers[FAULTS[fault].world]()
    if why is None:
        return
    if os.environ.get("DPDIST_REQUIRE_SLURM") == "1":
        pytest.fail(f"{fault!r} cannot be made here: {why}")
    pytest.skip(f"{fault!r} cannot be made here: {why}")


def check(outcome: Outcome) -> None:
    assert not outcome.violations, f"{outcome}"


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("kill rank 0", "save commit"),
        ("kill rank 1", "mid-accumulate"),
        ("kill launcher", "committed"),
        ("terminate", "noise"),
        ("exception in rank 1", "start-up"),
        ("stop rank 1", "all-reduce"),
        ("stop rank 1 for 3 s", "update"),
        ("network down", "save middle"),
        ("partition", "evaluation"),
        ("partition for 3 s", "first compile"),
        ("disk full", "save begin"),
        ("disk slow", "shutdown"),
    ],
)
def test_a_disturbed_run_ends_or_goes_on_in_time_and_ends_bit_for_bit_as_if_left_alone(
    bench: Bench, fault: str, phase: str
) -> None:
    require(fault)
    check(disturb(bench, FAULTS[fault], phase))


def test_a_disturbed_run_goes_on_elsewhere_with_the_same_samples_and_noise(bench: Bench) -> None:
    check(disturb(bench, FAULTS["kill rank 0"], "all-reduce", again=(1, 2)))


def test_the_harness_notices_noise_that_differs_after_a_resume(bench: Bench) -> None:
    outcome = disturb(bench, FAULTS["kill rank 1"], "noise", environ_again={"FAULT_NOISE": "1"})
    found = "; ".join(outcome.violations)
    assert "params_sha256" in found, found
    assert "sampled or drew" in found, found
