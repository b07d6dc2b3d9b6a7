"""The ledger: charged before anything runs, durable, never more than planned, and never a guess."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from dpdist.mechanism.ledger import BudgetExhaustedError, Ledger, LedgerError, Plan, PrivacyTerms, file_identity

PLAN = Plan(
    incarnation=0,
    nonce="ab" * 32,
    environment="jax on cpu",
    adjacency="zero-out",
    dataset_size=1000,
    sampling_probability=0.1,
    expected_batch_size=100.0,
    steps=50,
    steps_asked=60,
    privacy=PrivacyTerms(
        clip_norm=1.0,
        noise_multiplier=1.5,
        delta=1e-5,
        target_epsilon=3.0,
        epsilon=2.9,
        epsilon_rdp=3.2,
        accountant="pld",
        renyi_order=8,
    ),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    opened = Ledger(path)
    opened.begin(PLAN)
    return opened


def test_nothing_is_reserved_before_the_plan(path: Path) -> None:
    with pytest.raises(LedgerError, match="no plan"):
        Ledger(path).reserve(0, 1)
    assert not path.exists()


def test_a_second_plan_is_refused(ledger: Ledger, path: Path) -> None:
    before = path.read_bytes()
    other = dataclasses.replace(PLAN.private_terms(), noise_multiplier=9.0)
    for opened in (ledger, Ledger(path)):
        with pytest.raises(LedgerError, match="already holds another plan"):
            opened.begin(dataclasses.replace(PLAN, privacy=other))
        opened.begin(PLAN)  # as a resumed run does: nothing to write
    assert path.read_bytes() == before


def test_the_newest_saved_step_is_remembered(ledger: Ledger, path: Path) -> None:
    ledger.reserve(0, 20)
    for step in (10, 20, 10):
        ledger.record_saved(step)
    assert ledger.saved_step == Ledger(path).saved_step == 20
    assert Ledger(path).charged_steps() == 20
    assert path.read_text().count('"saved"') == 2


#: What ledgers looked like when `Plan` held the privacy terms itself: lines that runs have written.
FORMER = Path(__file__).with_name("ledgers")
TERMS = ["clip_norm", "noise_multiplier", "delta", "target_epsilon", "epsilon", "epsilon_rdp", "accountant"]


def plan_lines(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["record"] == "plan"]


def test_a_ledger_of_before_is_read(tmp_path: Path) -> None:
    ledger = Ledger(Path(shutil.copy(FORMER / "two_incarnations.jsonl", tmp_path / "ledger.jsonl")))
    first, second = (plan.private_terms() for plan in ledger.plans)
    assert first == PrivacyTerms(
        clip_norm=1.0,
        noise_multiplier=4.0,
        delta=1e-4,
        target_epsilon=None,
        epsilon=0.03782578746499736,
        epsilon_rdp=0.04761851773078089,
        accountant="pld",
        renyi_order=120,
    )
    assert (second.accountant, second.epsilon) == ("renyi filter", 0.10562777654887884)
    assert second.renyi_order == 120  # its line leaves that null: the first plan's counts
    assert (ledger.plans[1].start, ledger.plans[1].resume_step, ledger.charged_steps()) == (4, 4, 12)


def test_a_plain_ledger_of_before_has_no_privacy_terms(tmp_path: Path) -> None:
    (plan,) = Ledger(Path(shutil.copy(FORMER / "plain.jsonl", tmp_path / "ledger.jsonl"))).plans
    assert plan.privacy is None
    with pytest.raises(LedgerError, match="adds no noise"):
        plan.private_terms()


@pytest.mark.parametrize("name", ["two_incarnations.jsonl", "plain.jsonl"])
def test_a_plan_is_written_as_it_was_before(tmp_path: Path, name: str) -> None:
    """Key for key, so that what reads a ledger today reads tomorrow's, beside what was added since."""
    former = plan_lines(FORMER / name)
    written = tmp_path / "ledger.jsonl"
    ledger = Ledger(written)
    for plan in Ledger(FORMER / name).plans:
        ledger.begin(plan)
    again = plan_lines(written)
    for old, new in zip(former, again, strict=True):
        same_run = {"file": new["file"], "renyi_order": former[0]["renyi_order"]}  # the order is never left out
        assert new | old | same_run == new
    assert Ledger(written).plans == Ledger(FORMER / name).plans


@pytest.mark.parametrize("privacy", [PLAN.privacy, None], ids=["private", "plain"])
def test_a_plan_survives_its_record(privacy: PrivacyTerms | None) -> None:
    plan = dataclasses.replace(PLAN, privacy=privacy, reasons=["a change"], resume_step=3)
    record = json.loads(json.dumps(plan.to_record()))
    assert Plan.from_record(record) == plan
    assert "privacy" not in record
    assert all((record[name] is None) == (privacy is None) for name in TERMS)


def test_a_second_writer_is_noticed_before_it_can_erase_a_charge(ledger: Ledger, path: Path) -> None:
    other = Ledger(path)
    other.reserve(0, 10)
    before = path.read_bytes()
    for _ in range(2):  # asking again does not help
        with pytest.raises(LedgerError, match="another process"):
            ledger.reserve(0, 5)
    assert path.read_bytes() == before


def test_a_reopened_ledger_has_the_same_plan_and_charges(ledger: Ledger, path: Path) -> None:
    ledger.reserve(0, 10)
    ledger.reserve(10, 20)
    again = Ledger(path)
    assert again.plan == PLAN
    assert again.charged_steps() == ledger.charged_steps() == 20
    again.reserve(20, 25)
    assert Ledger(path).charged_steps() == 25


@pytest.mark.parametrize(("start", "stop"), [(50, 51), (49, 51), (0, 51), (1000, 1001), (-1, 1), (5, 5), (6, 5)])
def test_no_step_outside_the_plan_is_reserved(ledger: Ledger, path: Path, start: int, stop: int) -> None:
    ledger.reserve(0, 10)
    before = path.read_bytes()
    with pytest.raises(BudgetExhaustedError, match="50"):
        ledger.reserve(start, stop)
    assert path.read_bytes() == before
    assert ledger.charged_steps() == Ledger(path).charged_steps() == 10


def test_the_last_planned_step_is_within_the_budget(ledger: Ledger) -> None:
    ledger.reserve(40, 50)
    assert ledger.charged_steps() == 10


def test_a_replay_is_not_charged_again(ledger: Ledger, path: Path) -> None:
    ledger.reserve(0, 20)
    before = path.read_bytes()
    for opened in (ledger, Ledger(path)):
        opened.reserve(5, 20)
        opened.reserve(0, 20)
        assert opened.charged_steps() == 20
    assert path.read_bytes() == before


def test_an_overlap_is_charged_once(ledger: Ledger, path: Path) -> None:
    ledger.reserve(0, 20)
    ledger.reserve(10, 30)
    assert ledger.charged_steps() == Ledger(path).charged_steps() == 30


@pytest.mark.parametrize("torn", [b'{"record": "st', b"\0\0\0\0", b"{", b'{"record": "steps", "start": 5, "stop": 50}'])
def test_a_torn_last_line_is_dropped_and_overwritten(ledger: Ledger, path: Path, torn: bytes) -> None:
    ledger.reserve(0, 5)
    whole = path.read_bytes()
    path.write_bytes(whole + torn + b" " * 200)
    again = Ledger(path)
    assert again.charged_steps() == 5
    again.reserve(5, 6)
    assert path.read_bytes().startswith(whole)
    lines = path.read_bytes()[len(whole) :].splitlines()
    assert [json.loads(line) for line in lines] == [{"record": "steps", "incarnation": 0, "start": 5, "stop": 6}]
    assert Ledger(path).charged_steps() == 6


def test_a_torn_plan_is_begun_again(path: Path) -> None:
    path.write_bytes(b'{"record": "plan", "incarn')
    ledger = Ledger(path)
    assert ledger.plan is None
    ledger.begin(PLAN)
    assert Ledger(path).plan == PLAN


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b'"plan"',
        b"7",
        b"null",
        b'{"record": "other"}',
        b'{"start": 0, "stop": 1}',
        b'{"record": "steps"}',
        b'{"record": "steps", "start": 0, "stop": "x"}',
        b'{"record": "plan"}',
        (json.dumps({"record": "plan"} | PLAN.to_record() | {"incarnation": 1, "nonce": "cd", "delta": None})).encode(),
    ],
)
def test_damage_before_the_last_line_is_never_guessed_over(ledger: Ledger, path: Path, damage: bytes) -> None:
    ledger.reserve(0, 5)
    ledger.reserve(5, 10)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(LedgerError, match=r"line 2 is damaged.*new run.dir"):
        Ledger(path)


def test_a_line_is_on_the_disk_before_its_steps_may_run(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, fsync = [], os.fsync

    def recorded(descriptor: int) -> None:
        assert os.fstat(descriptor).st_ino == path.stat().st_ino
        events.append(("fsync", json.loads(path.read_bytes().splitlines()[-1])["stop"]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    for stop in (3, 6):
        ledger.reserve(stop - 3, stop)
        events.append(("run", stop))
    assert events == [("fsync", 3), ("run", 3), ("fsync", 6), ("run", 6)]


def test_a_new_ledgers_directory_entry_is_on_the_disk_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    Ledger(path).begin(PLAN)
    assert synced == [False, True]


@pytest.mark.parametrize("broken", ["fsync", "write"])
def test_steps_that_could_not_be_written_may_not_run(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    ledger.reserve(0, 5)
    write = os.write

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if broken == "fsync":
            patch.setattr(os, "fsync", no_space)
        else:
            patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:3]))
        for _ in range(2):  # asking again does not help
            with pytest.raises(LedgerError):
                ledger.reserve(5, 10)
    assert ledger.charged_steps() == 5
    again = Ledger(path)  # the job that follows, with room again
    again.reserve(5, 10)
    assert again.charged_steps() == Ledger(path).charged_steps() == 10


def test_a_full_disk_is_named(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda *_: 3)
    with pytest.raises(LedgerError, match=r"No space left on device.*nothing is lost"):
        ledger.reserve(0, 5)


def further(start: int, **changes: Any) -> Plan:
    return dataclasses.replace(PLAN, incarnation=1, nonce="cd" * 32, start=start, reasons=["a change"], **changes)


def test_a_new_incarnation_charges_the_same_steps_again_and_forgets_none(ledger: Ledger, path: Path) -> None:
    ledger.reserve(0, 20)
    ledger.begin(further(10, steps=40))
    ledger.reserve(10, 30)
    for opened in (ledger, Ledger(path)):
        assert opened.plans == [PLAN, further(10, steps=40)]
        assert opened.plan == further(10, steps=40)
        assert [opened.charged_to(incarnation) for incarnation in (0, 1)] == [20, 20]
        assert opened.charged_steps() == 40
        for block in ((9, 12), (30, 41)):
            with pytest.raises(BudgetExhaustedError):
                opened.reserve(*block)


def test_two_incarnations_never_share_a_nonce(ledger: Ledger, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="share a nonce"):
        ledger.begin(dataclasses.replace(further(0), nonce=PLAN.nonce))
    assert path.read_bytes() == before


def test_an_incarnation_is_never_skipped(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="another plan"):
        ledger.begin(dataclasses.replace(further(0), incarnation=2))


def test_the_saved_step_is_that_of_the_current_incarnation(ledger: Ledger, path: Path) -> None:
    ledger.reserve(0, 30)
    ledger.record_saved(10)
    ledger.record_saved(20)
    assert Ledger(path).saved_step == 20
    ledger.begin(further(10))
    for opened in (ledger, Ledger(path)):
        assert opened.saved_step == 10


def test_what_an_incarnation_went_back_behind_did_not_lead_here(ledger: Ledger) -> None:
    ledger.reserve(0, 30)
    ledger.begin(further(10))
    ledger.reserve(10, 20)
    assert ledger.is_ancestor(0, 10)
    assert not ledger.is_ancestor(0, 11)
    assert ledger.is_ancestor(1, 20)
    for uncharged in ((0, 31), (1, 21), (2, 0)):
        with pytest.raises(LedgerError, match="does not charge"):
            ledger.is_ancestor(*uncharged)


def test_a_copy_is_told_from_a_move_and_only_until_it_begins_anew(ledger: Ledger, path: Path) -> None:
    moved = path.rename(path.with_name("moved"))
    assert not Ledger(moved).copied
    copy = Path(shutil.copy(moved, path))
    opened = Ledger(copy)
    assert opened.copied
    opened.reserve(0, 10)
    assert Ledger(copy).copied
    opened.begin(further(0))
    assert not Ledger(copy).copied
    assert not Ledger(moved).copied


def test_a_copy_that_has_the_number_of_a_deleted_file_is_told_by_when_it_was_born(ledger: Ledger, path: Path) -> None:
    """As where a run directory is deleted and then restored from a backup: many file systems give numbers again."""
    shutil.copy(path, path.with_name("backup"))
    path.unlink()
    shutil.copy(path.with_name("backup"), path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[0]["born"] is not None, "this file system does not tell when a file was born"
    records[0]["file"] = path.stat().st_ino
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert Ledger(path).copied


def test_where_no_birth_is_known_the_number_has_to_do(ledger: Ledger, path: Path) -> None:
    for change, copied in (({"born": None}, False), ({"born": None, "file": 1}, True), ({}, False)):
        record = json.loads(path.read_text()) | change
        other = path.with_name("other")
        path.rename(other)
        other.write_text(json.dumps(record) + "\n")  # the same file
        other.rename(path)
        assert Ledger(path).copied == copied, change
        path.write_text(json.dumps(record | {"file": path.stat().st_ino, "born": file_identity(path)["born"]}) + "\n")


def test_a_writer_that_was_frozen_erases_nothing(ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even between its last look at the file and its write, where no check could help."""
    other, fsync = Ledger(path), os.fsync
    fstat = os.fstat

    def thaw(descriptor: int) -> os.stat_result:
        seen = fstat(descriptor)
        monkeypatch.setattr(os, "fstat", fstat)
        other.reserve(0, 20)
        return seen

    monkeypatch.setattr(os, "fstat", thaw)
    ledger.reserve(0, 10)
    assert os.fsync is fsync
    assert Ledger(path).charged_steps() == 20
