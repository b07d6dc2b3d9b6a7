"""The released model of a search, composed with others: at what the whole search costs, never at that of one trial."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from private_runs import edit, export_of, private_run

from dpdist.errors import InputError
from dpdist.joint.compose import compose
from dpdist.joint.selection import SELECTION, Law, binding_orders, search_cost, trial_divergences
from dpdist.mechanism.composition import Phase
from dpdist.release.statement import SearchedFor, as_text, of_search
from dpdist_launch.cli import main

DELTA = 1e-5


def search_of(run: Path, root: Path, *, sigma: float = 2.0, epsilon: float | None = None) -> Path:
    """The directory of a search whose best trial is `run`, of noise 2; `sigma` is what it says that bounds all."""
    law, trial = Law(8.0, 1.0), Phase(0.01, sigma, 100)
    losses = trial_divergences(trial)
    terms = {
        "trial": {"sampling_probability": 0.01, "noise_multiplier": sigma, "steps": 100},
        "orders": list(binding_orders(losses, law, DELTA)),
        "epsilon_of_one_trial": 0.1,
        "metric": {"name": "accuracy", "best": "highest"},
    }
    cost = search_cost(losses, law, DELTA).epsilon if epsilon is None else epsilon
    searched = SearchedFor(epsilon=cost, delta=DELTA, record=law.to_record() | terms, guarantee="holds")
    root.mkdir()
    (root / "search.json").write_text("{}")
    file = export_of(run, root / "best") / "privacy.json"
    file.write_text(json.dumps(of_search(json.loads(file.read_text()), searched)))
    return root


def test_it_is_composed_at_what_the_whole_search_costs(tmp_path: Path) -> None:
    trial, other = private_run(tmp_path / "a", steps=100), private_run(tmp_path / "b", steps=100)
    root = search_of(trial, tmp_path / "s")
    cost = json.loads((root / "best/privacy.json").read_text())["epsilon"]
    alone = compose([root])
    assert (alone["epsilon"], alone["accountant"]) == (cost, SELECTION)
    one = compose([other])["epsilon"]
    assert cost > 1.3 * one
    for paths in ([root, other], [other, root / "best"]):
        found = compose(paths, at_once=True)
        assert (found["epsilon"], found["delta"], found["accountant"]) == (pytest.approx(cost + one), 2e-5, "sum")
        assert not found["at_once"]
    assert compose([root, root / "best"])["epsilon"] == cost, "named twice, counted once"
    both = compose([root, trial])
    assert both["epsilon"] == pytest.approx(cost + one), "its trial released as a run beside it is charged too"
    with pytest.raises(InputError, match="leave it out"):
        compose([root, other], delta=1e-5)


def test_a_statement_of_a_search_that_says_less_than_it_costs_is_refused(tmp_path: Path) -> None:
    trial = private_run(tmp_path / "a", steps=100)
    with pytest.raises(ValueError, match="but it costs"):
        search_of(trial, tmp_path / "less", epsilon=0.05)
    with pytest.raises(ValueError, match="costs more than any trial may"):
        search_of(trial, tmp_path / "noisier", sigma=2.1)
    root = search_of(trial, tmp_path / "s")
    file = root / "best/privacy.json"
    facts = json.loads(file.read_text())
    assert f"{facts['epsilon']:.6g} for the whole search" in as_text(facts)
    edit(file, epsilon=facts["epsilon"] * 0.99)
    with pytest.raises(InputError, match="states epsilon"):
        compose([root])
    edit(file, epsilon=facts["epsilon"], search=facts["search"] | {"orders": [2]})
    with pytest.raises(InputError, match="is damaged"):
        compose([root])


def test_a_search_that_has_released_nothing_is_not_taken_for_free(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(InputError, match="released no model"):
        compose([tmp_path])


@pytest.mark.parametrize("view", ["curve", "gdp", "zcdp", "attack"])
def test_no_view_of_one_trial_passes_for_one_of_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], view: str
) -> None:
    root = search_of(private_run(tmp_path / "a", steps=100), tmp_path / "s")
    for path in (root, root / "best"):
        assert main(["privacy", view, str(path)]) == 2
        assert "the best model of a search" in capsys.readouterr().err
