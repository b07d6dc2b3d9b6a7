"""`dpdist audit` as a user calls it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import compiled
import pytest

from dpdist.audit.checks import SETTINGS, TRAININGS
from dpdist_launch import audit, cli

#: What the tests have compiled before is not compiled again.
KEPT = compiled.directory()
CACHE = {} if KEPT is None else {name.upper(): str(value) for name, value in compiled.settings(KEPT).items()}
REPORT: dict[str, Any] = {
    "epsilon_lower": 1.2,
    "epsilon_claimed": 1.1,
    "delta": 0.05,
    "confidence": 0.95,
    "refuted": True,
    "closest": "one step",
    "checks": [{"name": "one step", "epsilon_lower": 1.2, "epsilon_claimed": 1.1, "delta": 0.05}],
    "processes": 2,
    "devices_per_process": 1,
}


def test_the_short_form_prints_one_object_and_refutes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "audit", "--short", "--json", "--to", str(tmp_path / "audit.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | CACHE)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report == json.loads((tmp_path / "audit.json").read_text())
    assert not report["refuted"]
    assert report["confidence"] == 0.95
    assert 0.3 * report["epsilon_claimed"] < report["epsilon_lower"] < report["epsilon_claimed"]
    names = ["loud step", "one step", "one step", "sampled step", "four steps", "lowest bits", "one run", "went back"]
    assert [check["name"] for check in report["checks"]] == names
    assert all(check["confidence"] == pytest.approx(1 - 0.05 / len(names)) for check in report["checks"])
    page = (Path(__file__).parents[2] / "docs/audit.md").read_text()
    for check in report["checks"]:
        delta, claimed = f"{check['delta']:g}", f"{check['epsilon_claimed']:.2f}"
        assert re.search(rf"^{check['name']} +delta {delta} .*, claimed +{claimed}:", page, re.M), check


def test_the_mechanism_is_audited_in_two_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CACHE.items():
        monkeypatch.setenv(name, value)
    given = {"runs": {"one step": 30, "lowest bits": 30}, "devices": 1, "confidence": 0.99}
    audit.run_ranks("dpdist_launch.audit", [json.dumps(given | {"to": str(tmp_path / "checks")})], 2, 1)
    checks = json.loads((tmp_path / "checks").read_text())
    assert [(check["name"], check["delta"]) for check in checks] == [("one step", 0.05), ("one step", 1e-5)]
    assert all(check["evidence"]["runs"] == [20, 20] for check in checks)
    assert "not refuted" in capfd.readouterr().err


def test_ctrl_c_ends_an_audit_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "dpdist_launch", "audit", "--short"]
    audited = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | CACHE | {"TMPDIR": str(tmp_path)}
    )
    while not any(tmp_path.iterdir()):
        assert audited.poll() is None, audited.communicate()[1]
        time.sleep(0.02)
    audited.send_signal(signal.SIGINT)
    _, said = audited.communicate(timeout=120)
    assert audited.returncode == 130, said
    assert said.splitlines()[-1] == "dpdist: interrupted"
    assert "Traceback" not in said


def test_the_page_names_every_check_and_bug() -> None:
    page = (Path(__file__).parents[2] / "docs/audit.md").read_text()
    names = [setting.name for setting, _, _ in SETTINGS] + [plan.name for plan in TRAININGS]
    assert [name for name in names if f"`{name}`" not in page] == []
    assert page.count("| 1.57 |") + page.count("| 0.74 |") + page.count("| 1.43 |") + page.count("| 3.82 |") == 11


def test_a_refuted_claim_is_said_plainly_and_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "audit", lambda **_: dict(REPORT))
    assert cli.main(["audit"]) == 1
    said = capsys.readouterr().out
    assert "epsilon is at least  1.20, claimed  1.10: REFUTED" in said
    assert "A CLAIM IS REFUTED" in said
    assert "confidence 0.95; 2 process(es) with 1 CPU device(s) each" in said


@pytest.mark.parametrize("given", [("--confidence", "1"), ("--processes", "0"), ("--devices", "0")])
def test_numbers_out_of_range_are_refused(given: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", *given]) == 2
    assert f"{given[0]} = {given[1]}" in capsys.readouterr().err.replace("1.0", "1")
