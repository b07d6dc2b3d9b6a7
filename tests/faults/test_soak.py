"""Random kills and resumes for a while (DPDIST_SOAK_MINUTES, 1 by default), and proof that the checks can fail."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

from jobs import Run

from .soak import Soak, soak


def test_a_run_that_is_killed_at_random_again_and_again_ends_bit_for_bit_as_if_left_alone(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    minutes = float(os.environ.get("DPDIST_SOAK_MINUTES", "1"))
    tally = soak(tmp_path, seed, [2], minutes=minutes)
    print(tally.record())
    assert not tally.violations, f"python -m tests.faults.soak --seed {seed} --cycles {tally.cycles} --processes 2"
    assert tally.cycles > 0
    page = (Path(__file__).parents[2] / "docs/faults.md").read_text()
    (shown,) = re.findall(r'^\{"seed".*', page, re.M)
    assert json.loads(shown).keys() - {"seconds"} == tally.record().keys()


def test_the_soak_notices_a_ledger_that_lost_a_line(tmp_path: Path) -> None:
    lost: list[bytes] = []

    def lose(run: Run) -> None:
        """The first note of a saved checkpoint, which dpdist itself does not miss."""
        ledger = run.root / "ledger.jsonl"
        lines = ledger.read_bytes().splitlines(keepends=True) if ledger.exists() else []
        lost.extend(line for line in lines if b'"saved"' in line)
        if lost:
            lines.remove(lost[0])
            ledger.write_bytes(b"".join(lines))

    it = Soak(tmp_path, seed=1, processes=[2], between=lose)
    try:
        while not lost and it.tally.cycles < 20:
            it.cycle()
    finally:
        it.jobs.close()
    assert any("the ledger lost" in violation for violation in it.tally.violations), it.tally
