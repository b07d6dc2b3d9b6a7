"""The other draw: the environment makes the same keys give other noise, or one rank compute otherwise than the rest."""

from __future__ import annotations

import pytest
from jobs import EVERY, Jobs, Run

#: Each of these gave other noise, other samples of dropout or other sums for the same keys, or ended the run.
PINNED = {
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_RANDOM_SEED_OFFSET": "7",
}


@pytest.mark.parametrize("names", [["JAX_THREEFRY_PARTITIONABLE"], list(PINNED)], ids=["threefry", "all"])
def test_what_is_pinned_changes_no_bit_of_a_resumed_run(jobs: Jobs, single: Run, names: list[str]) -> None:
    run = single.copy(jobs.new("pinned").root).crash(EVERY)
    ended = jobs.launch(run, 1, 1, **{name: PINNED[name] for name in names}).wait()
    assert ended.code == 0, ended.err
    assert run.digests == single.digests
    assert run.summary["params_sha256"] == single.summary["params_sha256"]
    assert run.summary["incarnation"] == 0


def test_a_rank_with_other_flags_is_named_before_the_first_collective(jobs: Jobs) -> None:
    run, told = jobs.new("ranks"), ({}, {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"})
    ranks = zip(jobs.identities(2), told, strict=True)
    for running in [jobs.train(run, **identity, **flags) for identity, flags in ranks]:
        ended = running.wait()
        assert ended.code == 2, ended.err
        assert 'XLA_FLAGS is "" on rank 0 but "--xla_cpu_enable_fast_math=true" on rank 1' in ended.err
    assert not (run.root / "ledger.jsonl").exists()


def test_other_flags_begin_an_incarnation_unless_they_decide_no_bits(jobs: Jobs, single: Run) -> None:
    for flags, incarnation in (
        ("--xla_force_host_platform_device_count=1", 0),
        ("--xla_cpu_prefer_vector_width=128", 1),
    ):
        run = single.copy(jobs.new("flags").root).crash(EVERY)
        ended = jobs.train(run, XLA_FLAGS=flags).wait()
        assert ended.code == 0, ended.err
        assert run.summary["incarnation"] == incarnation, ended.err
    assert f"incarnation 1 begins at step {EVERY}" in ended.err
