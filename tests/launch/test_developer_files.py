"""What a developer meets first: the environment that the scripts make, and files that must agree with each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: The Pythons that pyproject.toml names.
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
#: A Python that answers what launch/environment.sh asks, and writes what pip is called with to `pip`.
FAKE = """#!/bin/bash
case "$*" in
    *"sys.exit("*) exit {old} ;;
    *print*) echo py311 ;;
    --version) echo Python 3.10.13 ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip "*) echo "$*" >>pip ;;
    "-m compileall "*) exec {real} "$@" ;;
    *) exit 9 ;;
esac
"""


def fake_python(tmp_path: Path, *, old: bool = False) -> str:
    python = tmp_path / "python"
    python.write_text(FAKE.format(old=int(old), real=sys.executable))
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "tests/run.sh"])
@pytest.mark.parametrize("python", ["old", "missing"])
def test_a_python_that_cannot_be_used_gets_one_line(script: str, python: str, tmp_path: Path) -> None:
    for name in ("launch/environment.sh", script):  # a clone: nothing here is touched, whatever the scripts do
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    path = fake_python(tmp_path, old=True) if python == "old" else "/nowhere/python"
    done = subprocess.run(
        ["bash", tmp_path / script],
        env=os.environ | {"PYTHON": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = "Python 3.10.13" if python == "old" else "no Python that can be run"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"dpdist needs Python 3.11 or newer; PYTHON = {path} is {found}.\n"


def installed(tmp_path: Path, **environ: str) -> str:
    """What pip is asked for in a clone that has a lock; nothing where it is not called."""
    for name in ("requirements", "launch"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "requirements" / "test-py311.txt").touch()
    log = tmp_path / "pip"
    log.unlink(missing_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DPDIST_")}
    subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . {ROOT}/launch/environment.sh"],
        cwd=tmp_path,
        env=clean | {"PYTHON": fake_python(tmp_path)} | environ,
        timeout=60,
        check=True,
    )
    return log.read_text().partition("--quiet --disable-pip-version-check ")[2].strip() if log.exists() else ""


def test_the_lock_holds_for_training_and_tests_and_for_nothing_else(tmp_path: Path) -> None:
    lock = "--constraint requirements/test-py311.txt"
    assert installed(tmp_path) == f"{lock} --editable ."
    assert installed(tmp_path) == ""  # nothing has changed
    assert installed(tmp_path, DPDIST_EXTRAS="test") == f"{lock} --editable .[test]"
    assert installed(tmp_path, DPDIST_EXTRAS="cuda12") == "--editable .[cuda12]"
    assert installed(tmp_path, DPDIST_CONSTRAINTS="") == "--editable ."
    (tmp_path / "own.txt").touch()
    assert installed(tmp_path, DPDIST_CONSTRAINTS="own.txt") == "--constraint own.txt --editable ."
    assert installed(tmp_path) == f"{lock} --editable ."
    (tmp_path / "requirements" / "test-py311.txt").write_text("numpy==2.4.6\n")
    assert installed(tmp_path) == f"{lock} --editable ."


def test_ranks_find_bytecode_where_python_writes_none(tmp_path: Path) -> None:
    for name in ("dpdist", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.py").write_text("value = 1\n")
    installed(tmp_path, PYTHONDONTWRITEBYTECODE="1")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("part.*.pyc")}
    assert sorted(path.parents[1].name for path in kept) == ["dpdist", "launch"]
    for path in kept:
        source = path.parents[1] / "part.py"
        source.write_text("value = 2\n")
        os.utime(source, (0, source.stat().st_mtime + 2))  # the whole seconds of it tell that it has changed
    installed(tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert all(path.read_bytes() != before for path, before in kept.items())


def test_every_python_that_is_named_has_a_lock_and_a_place_in_ci() -> None:
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["ci"]
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    assert job["steps"][-1]["run"].endswith("bash .ci/run")
    required = {re.split(r"[<>=\[]", line)[0] for line in PROJECT["dependencies"]}
    required |= {re.split(r"[<>=\[]", line)[0] for line in PROJECT["optional-dependencies"]["test"]}
    for version in PYTHONS:
        lines = (ROOT / f"requirements/test-py{version.replace('.', '')}.txt").read_text().splitlines()
        assert f"Python {version}" in lines[0]
        assert "make lock" in lines[2]
        pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
        assert {name.lower().replace("_", "-") for name in required} <= pinned


def test_what_the_documents_name_exists() -> None:
    for document in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text()
        for path in re.findall(r"`((?:configs|docs|docker|launch|tests|slurm|dpdist|requirements)/[\w./]+)`", text):
            assert (ROOT / path).exists() or "NAME" in path, f"{document}: {path}"
        for name in re.findall(r"`(test_\w+)`", text):
            assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").rglob("test_*.py")), name
        for target in re.findall(r"`make (\w+)", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        for link in re.findall(r"\]\(([\w./]+)\)", text):
            assert (ROOT / link).exists(), f"{document}: {link}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_the_hooks_are_linters_of_the_environment() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    ci = (ROOT / ".ci/run").read_text()
    for hook in repository["hooks"]:
        command = re.match(r"\.venv/bin/(?:ruff \w+|mypy)", hook["entry"])
        assert command is not None
        assert command[0] in ci
