"""`dpdist train` refuses a model whose examples see each other before anything is spent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from jobs import Jobs


@pytest.mark.parametrize("method", ["per_example", "auto"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("batched", ["custom_vmap_call at ", "mixing.py:", "could let one example see another"]),
        ("remembering", ["pure_callback at ", "mixing.py:", "could let one example see another"]),
        ("collective", ["mixing.py, line ", "unbound axis name", "psum"]),  # one example alone has no such axis
    ],
)
def test_a_model_that_mixes_examples_is_refused_by_its_place(
    jobs: Jobs, model: str, words: list[str], method: str
) -> None:
    run = jobs.new("mixing")
    shutil.copy(Path(__file__).with_name("mixing.py"), jobs.root)
    ended = jobs.train(run, f"model.name=mixing:{model}", f"training.clipping={method}").wait()
    assert ended.code == 2, ended.err
    assert all(word in ended.err for word in words), ended.err
    assert not run.ledger


def test_a_test_metric_may_call_back(jobs: Jobs) -> None:
    run = jobs.new("metric")
    shutil.copy(Path(__file__).with_name("mixing.py"), jobs.root)
    ended = jobs.train(run, "model.metrics.on_the_host=mixing:on_the_host", "training.steps=1").wait()
    assert ended.code == 0, ended.err
    assert "on_the_host" in run.summary["metrics"]
