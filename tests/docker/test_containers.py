"""The container recipes, as text: no engine runs here, so what would only break in a build must show before it."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
DEFINITION = (ROOT / "docker" / "dpdist.def").read_text()
INSTRUCTIONS = re.sub(r"\\\n", " ", DOCKERFILE)


def section(name: str) -> str:
    """The lines of one section of the Apptainer definition."""
    return re.split(r"^%\w+\n", DEFINITION.partition(f"%{name}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def copied_by_docker() -> dict[str, str]:
    copies = re.findall(r"^COPY (.+) (\S+)$", INSTRUCTIONS, re.MULTILINE)
    return {source: target for sources, target in copies for source in sources.split()}


def copied_by_apptainer() -> dict[str, str]:
    return dict(line.split() for line in section("files").splitlines() if line.strip())


def sent_to_docker(path: str) -> bool:
    """Whether a file is in Docker's build context: the last of the patterns that match it or its folders decides."""
    sent = True
    parents = [path, *map(str, Path(path).parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        names = (pattern, pattern.removeprefix("**/")) if pattern.startswith("**/") else (pattern,)
        if pattern and any(fnmatch.fnmatchcase(parent, name) for parent in parents for name in names):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("source", sorted(copied_by_docker() | copied_by_apptainer()))
def test_what_is_copied_exists_and_is_in_the_build_context(source: str) -> None:
    assert (ROOT / source).exists()
    assert sent_to_docker(source)


@pytest.mark.parametrize(
    "path", ["runs/digits/private/secret.key", "mine/secret.key", "configs/run/private/secret.key", ".git/config"]
)
def test_secrets_and_history_are_not_in_the_build_context(path: str) -> None:
    assert not sent_to_docker(path)


def test_both_recipes_install_the_same() -> None:
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert base is not None
    assert re.findall(r"^From: (\S+)$", DEFINITION, re.MULTILINE) == [base[1]]

    (by_docker,) = re.findall(r"^RUN (.+ pip install .+)$", DOCKERFILE, re.MULTILINE)
    (by_apptainer,) = re.findall(r"^ +(.+ pip install .+)$", section("post"), re.MULTILINE)
    assert by_docker.replace("EXTRA", "extra") == by_apptainer

    installed = {source: target for source, target in copied_by_docker().items() if target.startswith("/source")}
    assert installed.keys() | {"configs"} == copied_by_apptainer().keys()
    assert re.findall(r"PYTHON\w+=\S+", DOCKERFILE) == re.findall(r"PYTHON\w+=\S+", section("environment"))


def test_everything_that_setuptools_packages_and_reads_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert (ROOT / "dpdist_launch").readlink() == Path("launch")
    assert "ln -s launch /source/dpdist_launch && pip install" in DOCKERFILE
    files = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert packages | files <= copied_by_apptainer().keys()


@pytest.mark.parametrize("name", ["Dockerfile", "dpdist.def", "README.md"])
def test_the_extras_named_exist(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"\bcuda\d+(?:-\w+)?\b", (ROOT / "docker" / name).read_text()))
    assert named
    assert named <= extras.keys()


@pytest.mark.parametrize(
    "script",
    [
        (ROOT / "docker" / "virtual_cluster.sh").read_text(),
        section("post").replace("{{ extra }}", "cuda12"),
        section("environment"),
        section("runscript"),
        *re.findall(r"^RUN (.+)$", INSTRUCTIONS, re.MULTILINE),
    ],
)
def test_shell_in_the_recipes_parses(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
