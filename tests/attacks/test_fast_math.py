"""A run whose compiler deletes the guards against NaNs: refused, where one record turned every parameter to NaN."""

from __future__ import annotations

import pytest
from jobs import COMPILED_ANEW, Jobs

IGNORE = ("--xla_cpu_fast_math_honor_nans=false", "--xla_cpu_fast_math_honor_infs=false")


@pytest.mark.parametrize("clipping", ["auto", "per_example"])
def test_a_run_that_honours_no_nans_is_refused_before_anything_is_spent(jobs: Jobs, clipping: str) -> None:
    run = jobs.new("fast")
    flags = {"XLA_FLAGS": " ".join(("--xla_cpu_enable_fast_math=true", *IGNORE))} | COMPILED_ANEW
    data = ("data.source=userland:with_nans", "data.options={rows: [7]}", "sampling.expected_batch_size=1000")
    # Two processes are fresh ones, in which no flag has been read.
    ended = jobs.launch(run, 2, 1, *data, f"training.clipping={clipping}", **flags).wait()
    assert ended.code == 2, ended.err
    assert "XLA_FLAGS" in ended.err
    assert "moved the sum of" in ended.err
    assert not run.ledger


def test_parameters_that_are_not_finite_never_hold(jobs: Jobs) -> None:
    """Here it is the learning rate that makes them so, but the parameters do not say it."""
    run = jobs.new("diverged")
    overflowing = ("optimizer.learning_rate=1e40", "training.steps=2", "privacy.insecure_seed=null")
    ended = jobs.train(run, *overflowing).wait()
    assert ended.code == 0, ended.err
    assert run.summary["guarantee"].startswith("void: parameters are not finite")
    given = run.root.with_name("diverged-given")
    refused = jobs.command("export", str(run.root), "--to", str(given)).wait()
    assert refused.code == 2
    assert "parameters are not finite" in refused.err
    assert not given.exists()
    assert jobs.command("export", str(run.root), "--to", str(given), "--without-guarantee").wait().code == 0
    assert "WITHOUT A PRIVACY GUARANTEE" in (given / "PRIVACY.md").read_text()
