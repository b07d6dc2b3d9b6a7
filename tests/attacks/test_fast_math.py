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
