"""The registry of a dataset: every run is charged once, before its first step, and no run passes the budget."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from private_runs import export_of, more, private_run, whole_export

from dpdist import config as config_module
from dpdist.config import file as configfile
from dpdist.errors import InputError
from dpdist.joint.charging import charge, charge_spent, require_room
from dpdist.joint.registry import Registry, create, locked
from dpdist.joint.standing import standing
from dpdist.mechanism.accounting import epsilon
from dpdist.mechanism.ledger import Ledger
from dpdist.run.layout import RunPaths
from dpdist_launch.cli import main


def registered(root: Path, where: Path, name: str = "people", *, made: bool = True, **plan: Any) -> Path:
    """A run that names a registry, which is made where it is not there, and has not been charged."""
    if made and not (where / f"{name}.jsonl").exists():
        create(where, name, delta=1e-5, budget=None)
    return private_run(root, run={"registry": str(where), "registry_dataset": name}, **plan)


def charged(run: Path) -> None:
    """What a start of the run does before its first step."""
    paths = RunPaths(run)
    config, ledger = config_module.from_dict(configfile.read(paths.config)), Ledger(paths.ledger)
    assert ledger.plan is not None
    require_room(config, paths, ledger, ledger.plan)
    charge(config, paths, ledger)


def alone(**plan: Any) -> float:
    numbers = {"sampling_probability": 0.01, "noise_multiplier": 2.0, "steps": 100, "delta": 1e-5} | plan
    return epsilon(**numbers).epsilon


def test_every_run_is_charged_once_however_often_it_is_started(tmp_path: Path) -> None:
    runs = [registered(tmp_path / name, tmp_path / "reg", steps=100 + n) for n, name in enumerate("ab")]
    for run in (*runs, *runs, runs[0]):
        charged(run)
    lines = (tmp_path / "reg" / "people.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == ["registry", "charge", "charge"]
    found = standing(tmp_path / "reg", "people")
    assert [run["epsilon"] for run in found["runs"]] == [alone(), alone(steps=101)]
    assert found["budget"] is None
    assert max(run["epsilon"] for run in found["runs"]) < found["epsilon"]


def test_one_run_costs_its_own_epsilon_and_runs_with_small_deltas_cost_no_more_than_their_sum(tmp_path: Path) -> None:
    create(tmp_path / "reg", "people", delta=1e-5, budget=None)
    small = registered(tmp_path / "a", tmp_path / "reg", delta=1e-6)
    charged(small)
    assert standing(tmp_path / "reg", "people")["epsilon"] == alone(delta=1e-6)
    charged(registered(tmp_path / "b", tmp_path / "reg", delta=1e-6))
    assert standing(tmp_path / "reg", "people")["epsilon"] == pytest.approx(2 * alone(delta=1e-6))
    charged(registered(tmp_path / "c", tmp_path / "reg", delta=1e-5))
    assert standing(tmp_path / "reg", "people")["epsilon"] > 3 * alone(delta=1e-6), "deltas do not fit any more"


def test_beyond_the_budget_a_run_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    create(tmp_path / "reg", "people", delta=1e-5, budget=2.5 * alone(delta=1e-6))
    for name in "ab":
        charged(registered(tmp_path / name, tmp_path / "reg", delta=1e-6))
    before = (tmp_path / "reg" / "people.jsonl").read_bytes()
    third = registered(tmp_path / "c", tmp_path / "reg", delta=1e-6)
    for start in (charged, lambda run: charge_alone(run)):
        with pytest.raises(InputError, match="its budget is epsilon"):
            start(third)
    assert (tmp_path / "reg" / "people.jsonl").read_bytes() == before
    charged(tmp_path / "a")  # what is charged goes on
    more(tmp_path / "a", steps=5000, sigma=1.0)
    with pytest.raises(InputError, match="its budget is epsilon"):
        charged(tmp_path / "a")


def charge_alone(run: Path) -> None:
    """As where two runs have passed the first check at once."""
    paths = RunPaths(run)
    charge(config_module.from_dict(configfile.read(paths.config)), paths, Ledger(paths.ledger))


def test_a_budget_cannot_be_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["privacy", "registry", str(tmp_path / "reg")]
    assert main([*given, "--create", "people", "--delta", "1e-5", "--budget", "3"]) == 0
    assert "budget 3" in capsys.readouterr().out
    for argv in (["--create", "people", "--delta", "1e-5", "--budget", "9"], ["--budget", "9"], ["--create", "x/y"]):
        assert main([*given, *argv]) == 2
    assert main([*given, "--create", "x/y", "--delta", "1e-5"]) == 2
    assert main([*given, "--dataset", "other"]) == 2
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["datasets"][0]["budget"] == 3


def test_what_was_trained_without_the_registry_is_charged_by_hand_once_and_beyond_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create(tmp_path / "reg", "people", delta=1e-5, budget=0.01)
    before = private_run(tmp_path / "before")
    given = ["privacy", "registry", str(tmp_path / "reg"), "--charge", str(before)]
    assert main([*given, str(export_of(before, tmp_path / "given")), "--dataset", "people", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["datasets"]
    assert [run["steps"] for run in found["runs"]] == [100]
    assert found["epsilon"] == alone() > found["budget"]
    more(before, steps=150, sigma=3.0)
    assert main([*given, "--dataset", "people"]) == 0
    assert [run["steps"] for run in standing(tmp_path / "reg", "people")["runs"]] == [150]
    assert main(given) == 2
    assert main([*given, "--dataset", "../x"]) == 2
    unit = private_run(tmp_path / "unit", data={"unit": "user", "records_per_unit": 2})
    lines = (tmp_path / "reg" / "people.jsonl").read_bytes()
    assert main(["privacy", "registry", str(tmp_path / "reg"), "--dataset", "people", "--charge", str(unit)]) == 2
    assert (tmp_path / "reg" / "people.jsonl").read_bytes() == lines


def test_added_steps_are_charged_and_a_former_plan_is_not_given_back(tmp_path: Path) -> None:
    run = registered(tmp_path / "a", tmp_path / "reg", done=False)
    charged(run)
    more(run, steps=150, sigma=2.0, start=50)
    charged(run)
    charged(run)
    found = standing(tmp_path / "reg", "people")
    assert [each["steps"] for each in found["runs"]] == [200]


def test_a_copy_that_goes_on_is_charged_beside_the_original(tmp_path: Path) -> None:
    run = registered(tmp_path / "a", tmp_path / "reg", steps=200, done=False)
    Ledger(run / "ledger.jsonl").reserve(0, 100)
    charged(run)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    more(copy, steps=200, sigma=2.0, start=100)
    charged(copy)
    assert [each["steps"] for each in standing(tmp_path / "reg", "people")["runs"]] == [200 + 100]
    more(run, steps=300, sigma=2.0, start=200)
    charged(run)
    assert [each["steps"] for each in standing(tmp_path / "reg", "people")["runs"]] == [200 + 100 + 100]


def test_killed_at_any_byte_of_the_line_a_run_is_charged_once_when_it_is_started_again(tmp_path: Path) -> None:
    first, run = (registered(tmp_path / name, tmp_path / "reg") for name in "ab")
    path = tmp_path / "reg" / "people.jsonl"
    charged(first)
    before, old = path.read_bytes(), (tmp_path / "reg" / "people.head").read_text()
    note = run / "private" / "registry.json"
    charged(run)
    after = path.read_bytes()
    head = (tmp_path / "reg" / "people.head").read_text()
    for size in (*range(len(before), len(after), 7), len(after) - 1, len(after)):
        path.write_bytes(after[:size])
        note.unlink()
        (tmp_path / "reg" / "people.head").write_text(old)
        assert standing(tmp_path / "reg", "people")["torn"] == (len(before) < size < len(after))
        charged(run)
        assert path.read_bytes() == after, size
        assert json.loads(note.read_text())["line"] == Registry(tmp_path / "reg", "people").digests[-1]
        if size < len(after):
            assert (tmp_path / "reg" / "people.head").read_text() == head


def test_a_registry_that_is_not_there_is_not_made_by_a_run(tmp_path: Path) -> None:
    run, where = registered(tmp_path / "a", tmp_path / "reg", made=False), tmp_path / "reg"
    starts = (charged, charge_alone, lambda run: charge_spent(where, "people", [run]))
    for start in starts:
        with pytest.raises(InputError, match=r"dpdist privacy registry .*/reg --create people"):
            start(run)
    assert not where.exists(), "nothing was made"
    create(where, "peeple", delta=1e-5, budget=1.0)
    for start in starts:
        with pytest.raises(InputError, match="Is the name right"):
            start(run)
    assert sorted(path.name for path in where.iterdir()) == ["peeple.head", "peeple.jsonl", "peeple.lock"]


def test_killed_in_the_first_line_there_is_no_registry_until_it_is_made_anew(tmp_path: Path) -> None:
    run = registered(tmp_path / "a", tmp_path / "reg", made=False)
    (tmp_path / "reg").mkdir()
    (tmp_path / "reg" / "people.jsonl").write_text('{"record": "regis')
    with pytest.raises(InputError, match="is no registry"):
        charged(run)
    create(tmp_path / "reg", "people", delta=1e-5, budget=None)
    charged(run)
    assert len(Registry(tmp_path / "reg", "people").runs) == 1


def test_a_full_disk_charges_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, path = registered(tmp_path / "a", tmp_path / "reg"), tmp_path / "reg" / "people.jsonl"
    before, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
    with pytest.raises(InputError, match="no step may run uncharged"):
        charge_alone(run)
    monkeypatch.undo()
    assert path.read_bytes() == before
    charged(run)


def cut_last(lines: list[str]) -> list[str]:
    return lines[:-1]


def cut_middle(lines: list[str]) -> list[str]:
    return [*lines[:1], *lines[2:]]


def cheaper(lines: list[str]) -> list[str]:
    return [line.replace(", 100]", ", 1]") for line in lines]


def negative(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1].replace(", 100]", ", -9000]")]


def richer(lines: list[str]) -> list[str]:
    return [line.replace('"budget": 50.0', '"budget": 99.0') for line in lines]


def gone(lines: list[str]) -> list[str]:
    return []


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut_last, "lacks a line"),
        (cut_middle, "changed or taken out"),
        (cheaper, "changed or taken out"),
        (negative, "make no sense"),
        (richer, "changed or taken out"),
        (gone, "lacks a line"),
    ],
)
def test_a_line_that_was_changed_or_cut_stops_the_run_it_belongs_to(
    tmp_path: Path, harm: Callable[[list[str]], list[str]], words: str
) -> None:
    create(tmp_path / "reg", "people", delta=1e-5, budget=50.0)
    runs = [registered(tmp_path / name, tmp_path / "reg") for name in "ab"]
    for run in runs:
        charged(run)
    path = tmp_path / "reg" / "people.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert harm(lines) != lines
    path.write_text("".join(harm(lines)))
    with pytest.raises(InputError, match=words):
        charged(runs[1])


def test_a_registry_that_was_cut_or_is_gone_stops_new_runs_too(tmp_path: Path) -> None:
    create(tmp_path / "reg", "people", delta=1e-5, budget=50.0)
    charged(registered(tmp_path / "a", tmp_path / "reg"))
    path, new = tmp_path / "reg" / "people.jsonl", registered(tmp_path / "b", tmp_path / "reg")
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(InputError, match="was cut or is gone"):
        charged(new)
    path.unlink()
    with pytest.raises(InputError, match="was cut or is gone"):
        charged(new)


def test_a_run_finds_its_line_gone_where_the_head_was_removed_too(tmp_path: Path) -> None:
    runs = [registered(tmp_path / name, tmp_path / "reg") for name in "ab"]
    for run in runs:
        charged(run)
    path = tmp_path / "reg" / "people.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (tmp_path / "reg" / "people.head").unlink()
    charged(runs[0])
    with pytest.raises(InputError, match="has not the line"):
        charged(runs[1])


def test_who_may_write_the_directory_may_charge_whoever_made_the_files(tmp_path: Path) -> None:
    for name, mode, expected in (("own", 0o755, 0o644), ("group", 0o775, 0o664)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        charged(registered(tmp_path / f"run-{name}", tmp_path / name))
        files = sorted((tmp_path / name).iterdir())
        assert [path.name for path in files] == ["people.head", "people.jsonl", "people.lock"]
        assert {path.stat().st_mode & 0o777 for path in files} == {expected}


def test_a_run_cannot_leave_its_registry(tmp_path: Path) -> None:
    run = registered(tmp_path / "a", tmp_path / "reg")
    charged(run)
    config = (run / "config.yaml").read_text()
    for name in ("registry_dataset: other", "registry_dataset: null"):
        (run / "config.yaml").write_text(config.replace("registry_dataset: people", name))
        if "null" in name:
            (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(f"registry: {tmp_path}", "#"))
        with pytest.raises(InputError, match="is charged to people"):
            charged(run)


def test_other_units_and_runs_without_a_guarantee_are_refused(tmp_path: Path) -> None:
    charged(registered(tmp_path / "a", tmp_path / "reg"))
    unit = registered(tmp_path / "b", tmp_path / "reg", data={"unit": "user", "records_per_unit": 2})
    with pytest.raises(InputError, match="no joint epsilon covers both"):
        charged(unit)
    seed = registered(tmp_path / "c", tmp_path / "reg")
    ledger = seed / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"insecure": false', '"insecure": true'))
    with pytest.raises(InputError, match="known seed"):
        charged(seed)


@pytest.mark.parametrize("other", [{"split_seed": 1}, {"test_fraction": 0.3}])
def test_a_run_that_is_tested_on_what_another_trains_on_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    first, same = registered(tmp_path / "a", tmp_path / "reg"), registered(tmp_path / "b", tmp_path / "reg")
    for run in (first, same):
        charged(run)
    lines = (tmp_path / "reg" / "people.jsonl").read_bytes()
    second = registered(tmp_path / "c", tmp_path / "reg", data=other)
    with pytest.raises(InputError, match="publishes its accuracy on them exactly"):
        charged(second)
    with pytest.raises(InputError, match="publishes its accuracy on them exactly"):
        charge_spent(tmp_path / "reg", "people", [second])
    create(tmp_path / "reg", "others", delta=1e-5, budget=None)
    given = whole_export(second, tmp_path / "given")
    for charge_it in ([second], [given]):
        with pytest.raises(InputError, match=f"has another data.{next(iter(other))}"):
            charge_spent(tmp_path / "reg", "others", [first, *charge_it])
    with pytest.raises(InputError, match="publishes its accuracy on them exactly"):
        charge_spent(tmp_path / "reg", "people", [given])
    assert (tmp_path / "reg" / "people.jsonl").read_bytes() == lines


def test_who_does_not_keep_to_the_lock_is_noticed_and_who_holds_it_too_long_is_named(tmp_path: Path) -> None:
    create(tmp_path / "reg", "people", delta=1e-5, budget=None)
    with locked(tmp_path / "reg", "people") as registry:
        with (tmp_path / "reg" / "people.jsonl").open("a") as file:
            file.write("\n")
        with pytest.raises(InputError, match="does not keep to its lock"):
            registry.append({"record": "charge"})
    create(tmp_path / "reg2", "people", delta=1e-5, budget=None)
    code = "from dpdist.joint.registry import *; from pathlib import Path; import sys\n"
    code += "with locked(Path(sys.argv[1]), 'people'): print('held', flush=True); sys.stdin.read()"
    holder = [sys.executable, "-c", code, str(tmp_path / "reg2")]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="lock cannot be taken"), locked(tmp_path / "reg2", "people", 0.2):
            pass
        process.kill()
    with locked(tmp_path / "reg2", "people", 10):
        pass  # it ended with its holder


def test_runs_that_start_at_once_against_the_wall_do_not_pass_it_together(tmp_path: Path) -> None:
    create(tmp_path / "reg", "people", delta=1e-5, budget=1.5 * alone(delta=1e-6))
    runs = [registered(tmp_path / str(n), tmp_path / "reg", delta=1e-6) for n in range(3)]
    code = (
        "import sys; sys.path.insert(0, sys.argv[3])\n"
        "import dpdist.joint.registry, dpdist.joint.together\n"
        "from test_registry import charge_alone\nfrom pathlib import Path\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: charge_alone(Path(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__)\n"
        "else: print('charged')\n"
    )
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(run), "", str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": here},
        )
        for run in runs
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate()[0].strip() for process in started]
    assert sorted(told) == ["InputError", "InputError", "charged"]
    assert len(Registry(tmp_path / "reg", "people").runs) == 1
