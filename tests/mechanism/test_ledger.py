"""The ledger: charged before anything runs, durable, never more than planned, and never a guess."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest

from dpdist.mechanism.ledger import BudgetExhaustedError, Ledger, LedgerError, Plan

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
    clip_norm=1.0,
    noise_multiplier=1.5,
    delta=1e-5,
    target_epsilon=3.0,
    epsilon=2.9,
    epsilon_rdp=3.2,
    accountant="pld",
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
    for opened in (ledger, Ledger(path)):
        with pytest.raises(LedgerError, match="already holds another plan"):
            opened.begin(dataclasses.replace(PLAN, noise_multiplier=9.0))
        opened.begin(PLAN)  # as a resumed run does: nothing to write
    assert path.read_bytes() == before


def test_the_newest_saved_step_is_remembered(ledger: Ledger, path: Path) -> None:
    ledger.reserve(0, 20)
    for step in (10, 20, 10):
        ledger.record_saved(step)
    assert ledger.saved_step == Ledger(path).saved_step == 20
    assert Ledger(path).charged_steps() == 20
    assert path.read_text().count('"saved"') == 2


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
    ],
)
def test_damage_before_the_last_line_is_never_guessed_over(ledger: Ledger, path: Path, damage: bytes) -> None:
    ledger.reserve(0, 5)
    ledger.reserve(5, 10)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(LedgerError, match=r"line 2 is damaged.*restore"):
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


@pytest.mark.parametrize("broken", ["fsync", "pwrite"])
def test_steps_that_could_not_be_written_may_not_run(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    ledger.reserve(0, 5)
    pwrite = os.pwrite

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if broken == "fsync":
            patch.setattr(os, "fsync", no_space)
        else:
            patch.setattr(os, "pwrite", lambda descriptor, line, at: pwrite(descriptor, line[:3], at))
        for _ in range(2):  # asking again does not help
            with pytest.raises((OSError, LedgerError)):
                ledger.reserve(5, 10)
    assert ledger.charged_steps() == 5
    again = Ledger(path)  # the job that follows, with room again
    again.reserve(5, 10)
    assert again.charged_steps() == Ledger(path).charged_steps() == 10


def test_a_full_disk_is_named(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    with pytest.raises(LedgerError, match="disk full"):
        ledger.reserve(0, 5)
