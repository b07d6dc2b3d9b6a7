"""Joint epsilon of runs, exports and sweeps: the bound, and everything that must not be composed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from private_runs import config_of, edit, export_of, more, private_run, whole_export

from dpdist.data import fingerprint, open_dataset
from dpdist.errors import InputError
from dpdist.joint.charging import charge_spent
from dpdist.joint.compose import as_text, compose, orders_of, rounded_up
from dpdist.joint.members import read, unit_name
from dpdist.joint.registry import create
from dpdist.joint.standing import standing
from dpdist.joint.together import composed
from dpdist.mechanism.accounting import epsilon
from dpdist.mechanism.composition import adaptive_epsilon
from dpdist.mechanism.ledger import Ledger
from dpdist_launch.cli import main
from dpdist_launch.privacy.same_data import compared


def test_a_run_split_in_two_costs_what_it_costs_whole(tmp_path: Path) -> None:
    parts = [private_run(tmp_path / "a", steps=100), private_run(tmp_path / "b", steps=200)]
    whole = epsilon(sampling_probability=0.01, noise_multiplier=2.0, steps=300, delta=1e-5)
    found = compose(parts, at_once=True)
    assert found["epsilon"] == whole.epsilon
    assert found["delta"] == 1e-5
    assert found["at_once_by"] == "your word"


KINDS = [
    ({"q": 0.01, "sigma": 2.0, "steps": 100}, {"q": 0.01, "sigma": 2.0, "steps": 100}),
    ({"q": 0.02, "sigma": 0.8, "steps": 500}, {"q": 0.001, "sigma": 50.0, "steps": 1}),
    ({"q": 1.0, "sigma": 30.0, "steps": 10}, {"q": 0.05, "sigma": 1.0, "steps": 300}),
    ({"q": 0.01, "sigma": 1.0, "steps": 100, "delta": 1e-8}, {"q": 0.01, "sigma": 3.0, "steps": 900}),
]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("first", "second"), KINDS)
def test_it_is_never_below_the_larger_nor_above_the_sum(
    tmp_path: Path, first: dict[str, float], second: dict[str, float], at_once: bool
) -> None:
    runs = [private_run(tmp_path / "a", **first), private_run(tmp_path / "b", **second)]  # type: ignore[arg-type]
    found = compose(runs, at_once=at_once)
    alone = [run["epsilon"] for run in found["runs"]]
    assert max(alone) <= found["epsilon"] <= sum(alone)
    assert found["delta"] <= found["sum"]["delta"] + 0.01 * 1e-5


def test_without_the_users_word_the_filter_or_the_sum_is_stated(tmp_path: Path) -> None:
    runs = [private_run(tmp_path / str(n), steps=2000) for n in range(8)]
    fixed, adaptive = compose(runs, at_once=True), compose(runs)
    assert fixed["accountant"] == "pld"
    assert adaptive["accountant"] == "renyi filter"
    assert fixed["epsilon"] < adaptive["epsilon"] < adaptive["sum"]["epsilon"]
    two = compose(runs[:2])
    assert two["accountant"] == "sum"
    assert two["delta"] > 2e-5


def test_the_filter_has_the_order_of_the_run_that_began_first_and_the_dearest_where_that_is_unknown(
    tmp_path: Path,
) -> None:
    first = private_run(tmp_path / "first", steps=3000)
    runs = [private_run(tmp_path / str(n), steps=1) for n in range(8)] + [first]
    members, _, _ = read(runs)
    orders = {member.charges.order for member in members}
    assert len(orders) == 2
    assert orders_of(members) == [members[-1].charges.order]
    given = [export_of(first, tmp_path / "given"), *runs[:-1]]
    assert set(orders_of(read(given)[0])) == orders
    charges = [member.charges for member in members]
    each = [composed(charges, delta=1e-5, orders=[order], at_once=False).epsilon for order in sorted(orders)]
    assert composed(charges, delta=1e-5, orders=sorted(orders), at_once=False).epsilon == max(each) > min(each)


def test_one_run_costs_what_it_states(tmp_path: Path) -> None:
    run = private_run(tmp_path / "a")
    more(run, steps=300, sigma=1.5)
    found = compose([run])
    summed = found["runs"][0]
    assert found["epsilon"] == summed["epsilon"]
    assert summed["steps"] == 300
    assert found["accountant"] == "renyi filter"


def test_a_run_that_left_its_plan_is_not_composed_as_if_it_had_kept_it(tmp_path: Path) -> None:
    left, kept = private_run(tmp_path / "a"), private_run(tmp_path / "b")
    more(left, steps=300, sigma=1.5)
    found = compose([left, kept], at_once=True)
    assert not found["at_once"]
    assert found["accountant"] in ("renyi filter", "sum")
    assert any("gone beyond its first plan" in note for note in found["notes"])


def test_a_run_named_twice_and_an_export_beside_its_run_are_counted_once(tmp_path: Path) -> None:
    run = private_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(run)
    given = export_of(run, tmp_path / "given")
    for named in ([run, run], [run, tmp_path / "link"], [run, given], [given, run], [given, given / "privacy.json"]):
        found = compose(named, at_once=True)
        assert found["epsilon"] == compose([run])["epsilon"], named
        assert len(found["runs"]) == 1
        assert any("counted once" in note for note in found["notes"])


def test_an_export_from_before_its_run_went_on_is_covered_by_the_run(tmp_path: Path) -> None:
    run = private_run(tmp_path / "a")
    given = export_of(run, tmp_path / "given")
    more(run, steps=300, sigma=1.5)
    assert compose([given, run])["epsilon"] == compose([run])["epsilon"]
    assert [each["steps"] for each in compose([given, run])["runs"]] == [300]


def test_copies_that_went_on_apart_are_charged_in_full_and_never_as_if_planned(tmp_path: Path) -> None:
    run = private_run(tmp_path / "a")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert len(compose([run, copy])["runs"]) == 1, "the same run still"
    assert any("is a copy" in item for item in compose([copy])["on_trust"])
    more(run, steps=300, sigma=1.5)
    more(copy, steps=200, sigma=3.0)
    found = compose([run, copy], at_once=True)
    assert len(found["runs"]) == 2
    assert not found["at_once"]
    assert any("went on apart" in note for note in found["notes"])


def test_a_copy_that_stays_within_the_plan_is_not_taken_as_planned_either(tmp_path: Path) -> None:
    run = private_run(tmp_path / "a", steps=200, done=False)
    Ledger(run / "ledger.jsonl").reserve(0, 100)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    more(copy, steps=200, sigma=2.0, start=100)
    Ledger(run / "ledger.jsonl").reserve(100, 200)
    found = compose([run, copy], at_once=True)
    assert [each["steps"] for each in found["runs"]] == [200, 200]
    assert not found["at_once"]


def test_a_run_that_states_more_than_it_costs_is_not_joined_below_that(tmp_path: Path) -> None:
    run, other = private_run(tmp_path / "a"), private_run(tmp_path / "b")
    record, *rest = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join([json.dumps(json.loads(record) | {"epsilon": 7.0}) + "\n", *rest]))
    assert 7.0 <= compose([run, other], at_once=True)["epsilon"] <= 7.0 + compose([other])["epsilon"]


def test_an_old_export_that_may_be_the_run_is_refused_and_one_that_cannot_be_is_not(tmp_path: Path) -> None:
    run, other = private_run(tmp_path / "a"), private_run(tmp_path / "b", sigma=3.0)
    given = export_of(run, tmp_path / "given") / "privacy.json"
    told = json.loads(given.read_text())["incarnations"]
    edit(given, incarnations=[{k: v for k, v in told[0].items() if k not in ("nonce", "steps")}], unit_name=None)
    with pytest.raises(InputError, match="may be the same run"):
        compose([run, given])
    assert len(compose([other, given])["runs"]) == 2


def changed_steps(run: Path) -> None:
    text = (run / "ledger.jsonl").read_text().replace('"noise_multiplier": 2.0', '"noise_multiplier": 1.0')
    (run / "ledger.jsonl").write_text(text)


def without_noise(run: Path) -> None:
    plan = json.loads((run / "ledger.jsonl").read_text().splitlines()[0])
    names = ("clip_norm", "noise_multiplier", "delta", "target_epsilon", "epsilon", "epsilon_rdp", "accountant")
    plan |= dict.fromkeys((*names, "renyi_order", "grid", "grid_slack"))
    (run / "ledger.jsonl").write_text(json.dumps(plan) + "\n")


def known_seed(run: Path) -> None:
    text = (run / "ledger.jsonl").read_text().replace('"insecure": false', '"insecure": true')
    (run / "ledger.jsonl").write_text(text)


def key_for_all(run: Path) -> None:
    (run / "private" / "secret.key").write_bytes(b"k" * 32)
    (run / "private" / "secret.key").chmod(0o644)


def not_finite(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"status": "finished", "guarantee": "void: not finite"}))


def torn_summary(run: Path) -> None:
    (run / "summary.json").write_text('{"status": "fin')


def cut_ledger(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"status": "finished", "guarantee": "holds", "epsilon": 9.0}))


def nothing_in_it(run: Path) -> None:
    (run / "ledger.jsonl").write_text("")


def no_ledger(run: Path) -> None:
    (run / "ledger.jsonl").unlink()


def damaged(run: Path) -> None:
    (run / "ledger.jsonl").write_text("{}\n" + (run / "ledger.jsonl").read_text())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (changed_steps, "costs"),
        (without_noise, "adds no noise"),
        (known_seed, "insecure_seed"),
        (key_for_all, "can be read by others"),
        (not_finite, "not finite"),
        (torn_summary, "not whole"),
        (cut_ledger, "which was cut"),
        (nothing_in_it, "has not begun"),
        (no_ledger, "is no run"),
        (damaged, "damaged"),
    ],
)
def test_a_run_without_a_guarantee_is_refused_by_name(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    good, bad = private_run(tmp_path / "good"), private_run(tmp_path / "bad")
    harm(bad)
    with pytest.raises(InputError, match=words) as error:
        compose([good, bad])
    assert "bad" in str(error.value)


def test_an_export_that_states_too_little_or_nothing_is_refused(tmp_path: Path) -> None:
    given = export_of(private_run(tmp_path / "a"), tmp_path / "given") / "privacy.json"
    edit(given, epsilon=0.01)
    with pytest.raises(InputError, match="it was changed"):
        compose([given])
    edit(given, epsilon=float("nan"))
    with pytest.raises(InputError, match="NaN is no number"):
        compose([given])
    edit(given, epsilon=99.0, guarantee="void: x")
    with pytest.raises(InputError, match="void: x"):
        compose([given])
    told = json.loads(given.read_text())["incarnations"]
    edit(given, guarantee="holds", incarnations=[told[0] | {"charged_steps": -5}])
    with pytest.raises(InputError, match="make no sense"):
        compose([given])
    edit(given, incarnations=told, steps=None)
    with pytest.raises(InputError, match="damaged"):
        compose([given])


def test_an_export_whose_constants_were_changed_is_not_taken_for_its_run(tmp_path: Path) -> None:
    run = private_run(tmp_path / "a")
    given = export_of(run, tmp_path / "given") / "privacy.json"
    told = json.loads(given.read_text())["incarnations"]
    edit(given, incarnations=[told[0] | {"noise_multiplier": 3.0}])
    with pytest.raises(InputError, match=r"its constants cost .* these were changed"):
        compose([run, given])


def test_guarantees_for_units_and_for_records_are_not_mixed(tmp_path: Path) -> None:
    record = private_run(tmp_path / "record")
    unit = {"unit": "user", "records_per_unit": 4}
    users = [private_run(tmp_path / f"user{n}", data=unit | {"records_per_unit": 4 + n}) for n in range(2)]
    with pytest.raises(InputError, match="no joint epsilon covers both"):
        compose([record, users[0]])
    with pytest.raises(InputError, match="no joint epsilon covers both"):
        compose([users[0], private_run(tmp_path / "h", data=unit | {"unit": "household"})])
    assert compose(users)["unit"] == "all records with one value of 'user'"
    assert compose([users[0], export_of(users[1], tmp_path / "given")])["unit"] == compose(users)["unit"]


def test_runs_that_test_on_what_the_other_trains_on_are_refused(tmp_path: Path) -> None:
    runs = [private_run(tmp_path / str(n), data={"split_seed": n}) for n in range(2)]
    with pytest.raises(InputError, match="publishes its accuracy on them exactly"):
        compose(runs)


def test_the_smallest_delta_is_that_of_the_joint_guarantee_unless_one_is_given(tmp_path: Path) -> None:
    runs = [private_run(tmp_path / "a", delta=1e-5), private_run(tmp_path / "b", delta=1e-7)]
    assert compose(runs, at_once=True)["delta"] == 1e-7
    looser = compose(runs, at_once=True, delta=1e-5)
    assert looser["delta"] == 1e-5
    assert looser["epsilon"] < compose(runs, at_once=True)["epsilon"]
    with pytest.raises(InputError, match="between 0 and 1"):
        compose(runs, delta=1.5)


def sweep(root: Path, *groups: list[str], **digests: str) -> Path:
    """The record of a sweep, which asked for its points with the settings they have, or with the digests given."""
    points = [[{"name": name, "digest": digests.get(name, "")} for name in group] for group in groups]
    (root / "sweep.json").write_text(json.dumps({"asked": points}))
    return root


def test_a_sweeps_record_says_whether_all_were_asked_for_at_once(tmp_path: Path) -> None:
    for name in "ab":
        private_run(tmp_path / name)
    found = compose([sweep(tmp_path, ["a", "b"])])
    assert found["at_once_by"] == "the sweep's record"
    assert found["epsilon"] == compose([tmp_path / "a", tmp_path / "b"], at_once=True)["epsilon"]
    assert not compose([sweep(tmp_path, ["a"], ["b"])])["at_once"]
    assert not compose([sweep(tmp_path, ["a", "b"]), private_run(tmp_path / "c")])["at_once"]
    (tmp_path / "d").mkdir()
    waiting = compose([sweep(tmp_path, ["a", "b", "d"])], at_once=True)
    assert not waiting["at_once"]
    assert any("has not begun" in note for note in waiting["notes"])
    with pytest.raises(InputError, match="the points gone are gone"):
        compose([sweep(tmp_path, ["a", "gone"])])
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(InputError, match="is not whole"):
        compose([tmp_path])


def test_epsilon_is_never_rounded_down(tmp_path: Path) -> None:
    assert [rounded_up(x) for x in (1.0, 1.2341, 0.000123401, 123456.0)] == ["1", "1.235", "0.0001235", "1.235e+05"]
    assert rounded_up(float("inf")) == "inf"
    found = compose([private_run(tmp_path / "a"), private_run(tmp_path / "b")], at_once=True)
    shown = as_text(found).partition("joint epsilon: ")[2].partition(" ")[0]
    assert float(shown) >= found["epsilon"]


def test_the_command_prints_a_table_or_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(private_run(tmp_path / name)) for name in "ab"]
    assert main(["privacy", "compose", *runs]) == 0
    assert "taken on your word" in capsys.readouterr().out
    assert main(["privacy", "compose", *runs, "--at-once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["at_once"]
    assert main(["privacy", "compose", str(tmp_path / "none")]) == 2
    assert "is no run" in capsys.readouterr().err


def test_the_filter_is_the_one_of_the_mechanism(tmp_path: Path) -> None:
    runs = [private_run(tmp_path / str(n), steps=2000) for n in range(8)]
    members, _, _ = read(runs)
    phases = [phase for member in members for phase in member.charges.phases]
    assert compose(runs)["epsilon"] == adaptive_epsilon(phases, order=members[0].charges.order, delta=1e-5)


def test_packed_text_has_blocks_as_units() -> None:
    text = {"source": "text", "path": "x", "options": {"pack": True, "length": 64}}
    assert unit_name(config_of(data=text)) == "a block of 64 tokens"


def test_the_data_is_compared_by_the_keyed_tag_of_every_run_whose_secret_is_here(tmp_path: Path) -> None:
    tag_of = fingerprint(open_dataset(config_of()).train)
    runs = [private_run(tmp_path / name, data_tag=tag) for name, tag in (("a", tag_of), ("b", tag_of), ("c", b"other"))]
    given = export_of(runs[0], tmp_path / "given")
    hidden = private_run(tmp_path / "hidden", data_tag=tag_of)
    (hidden / "private" / "secret.key").unlink()
    told = compared([*runs, given, hidden]).split("; ")
    assert [str(runs[0]), str(runs[1])] == [word.strip(",") for word in told[0].split() if "/" in word][1:]
    assert told[1] == f"it is NOT that of {runs[2]}"
    assert told[2] == f"of {given}, {hidden} it is taken on your word"
    with pytest.raises(InputError, match="needs a run directory"):
        compared([given])


def test_the_registry_says_how_many_records_a_unit_brings_of_runs_and_of_exports(tmp_path: Path) -> None:
    unit = {"unit": "patient", "records_per_unit": 8}
    runs = [private_run(tmp_path / name, data=unit) for name in "ab"]
    given = whole_export(runs[1], tmp_path / "given")
    create(tmp_path / "reg", "people", delta=1e-5, budget=None)
    charge_spent(tmp_path / "reg", "people", [runs[0], given])
    assert [run["records_per_unit"] for run in standing(tmp_path / "reg", "people")["runs"]] == [8, 8]
    lines = (tmp_path / "reg/people.jsonl").read_text().splitlines()
    assert [json.loads(line)["records_per_unit"] for line in lines[1:]] == [8, 8]
