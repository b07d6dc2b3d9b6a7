"""The wheel: all of the code under both names, and types, found without the clone it was made from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpdist

SOURCE = Path(dpdist.__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install` makes of what setuptools is given; no dependencies."""
    root = tmp_path_factory.mktemp("wheel")
    clone, target = root / "clone", root / "installed"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SOURCE / name, clone)
    for name in ("dpdist", "launch"):
        shutil.copytree(SOURCE / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "dpdist_launch").symlink_to("launch")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", root, clone], check=True, timeout=120)
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True, timeout=120)
    return target


def test_every_module_is_in_the_wheel(installed: Path) -> None:
    for package, folder in (("dpdist", "dpdist"), ("dpdist_launch", "launch")):
        expected = {path.relative_to(SOURCE / folder) for path in (SOURCE / folder).rglob("*.py")}
        assert {path.relative_to(installed / package) for path in (installed / package).rglob("*.py")} == expected
    assert (installed / "dpdist" / "py.typed").exists()


def test_both_names_and_the_command_work_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(installed)}
    code = (
        "from dpdist_launch.cli import main\nfrom launch import submit\nimport dpdist, launch\n"
        "print(dpdist.__file__, launch.__file__, submit.__code__.co_filename)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [
        str(installed / "dpdist" / "__init__.py"),
        str(installed / "launch" / "__init__.py"),
        str(installed / "dpdist_launch" / "slurm" / "submit.py"),
    ]
    command = installed / "bin" / "dpdist"
    helped = subprocess.run([command, "--help"], env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert "train" in helped.stdout
