"""`dpdist train` refuses a model whose examples see each other before anything is spent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from jobs import Jobs


@pytest.mark.parametrize("method", ["per_example", "auto"])
@pytest.mark.parametrize(("model", "named"), [("batched", "custom_vmap_call at "), ("collective", "jax.lax.psum(")])
def test_a_model_that_mixes_examples_is_refused_by_its_equation(
    jobs: Jobs, model: str, named: str, method: str
) -> None:
    run = jobs.new("mixing")
    shutil.copy(Path(__file__).with_name("mixing.py"), jobs.root)
    ended = jobs.train(run, f"model.name=mixing:{model}", f"training.clipping={method}").wait()
    assert ended.code == 2, ended.err
    assert named in ended.err
    assert "mixing.py:" in ended.err
    assert "could let one example see another" in ended.err
    assert not run.ledger
