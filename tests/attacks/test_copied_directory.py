"""The restored directory: a backup forgets what was released after it was made, and no ledger can know better."""

from __future__ import annotations

import json
import shutil

import pytest
from jobs import EVERY, STEPS, Jobs, Run

OWN_SECRET = "privacy.insecure_seed=null"


@pytest.fixture(scope="module")
def restored(jobs: Jobs) -> tuple[Run, Run]:
    """A run that was backed up at step EVERY, released at STEPS, deleted, restored and gone on with; and what was
    released."""
    run, backup = jobs.new("restored"), jobs.new("backup")
    assert jobs.train(run, OWN_SECRET).wait().code == 0
    lost = run.copy(jobs.new("lost").root)
    run.copy(backup.root).crash(EVERY)
    backup.write_ledger([record for record in backup.ledger if record.get("start", 0) < EVERY])
    shutil.rmtree(run.root)
    shutil.copytree(backup.root, run.root)
    number = (run.root / "ledger.jsonl").stat().st_ino
    run.write_ledger([record | ({"file": number} if "file" in record else {}) for record in run.ledger])
    ended = jobs.train(run, OWN_SECRET).wait()
    assert ended.code == 0, ended.err
    assert "the run directory is a copy" in ended.err
    return run, lost


def test_what_is_released_again_has_noise_of_its_own_though_the_file_has_the_number_of_the_deleted_one(
    restored: tuple[Run, Run],
) -> None:
    run, lost = restored
    again = {run.digests_by_incarnation[1, step] for step in range(EVERY, STEPS)}
    assert again.isdisjoint(lost.digests.values())


def test_the_statement_says_that_it_does_not_cover_what_was_released_before(
    jobs: Jobs, restored: tuple[Run, Run]
) -> None:
    """STEPS - EVERY steps were released beside those that it charges, and nothing in the directory tells."""
    run, _ = restored
    to = run.root.with_name(f"{run.root.name}-given")
    assert jobs.command("export", str(run.root), "--to", str(to)).wait().code == 0
    privacy = json.loads((to / "privacy.json").read_text())
    assert privacy["charged_steps"] == STEPS
    assert any("restored from a backup" in item for item in privacy["not_covered"])
    assert "the run directory is a copy" in (to / "PRIVACY.md").read_text()
