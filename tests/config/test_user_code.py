"""Which files stand for the user's code."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dpdist.config import Config, Data, Model, Privacy, Training
from dpdist.config.user_code import module_sources
from dpdist.run.fingerprints import user_code_digest

FILES = {
    "mine.py": "import numpy as np, helpers.layers\nfrom package import inner\nimport os\n",
    "helpers/layers.py": "from .deeper import more\nfrom . import beside\n",  # a package without __init__.py
    "helpers/beside.py": "",
    "helpers/unused.py": "",
    "helpers/deeper/__init__.py": "from ..beside import x\n",
    "helpers/deeper/more.py": "def f():\n    import late\n",
    "late.py": "import mine\nimport gone\n",  # a circle, and something that isn't there
    "package/__init__.py": "raise RuntimeError('nothing is run')\n",
    "package/inner.py": "import broken\n",
    "broken.py": "def (\n",
    "apart.py": "from . import mine\n",
}
USED = {
    "broken", "helpers.beside", "helpers.deeper", "helpers.deeper.more", "helpers.layers", "late", "mine", "package",
    "package.inner",
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    return tmp_path


def digest(function: str = "mine:f") -> str:
    return user_code_digest(
        Config(
            data=Data(source="digits"),
            model=Model(name=function),
            privacy=Privacy(enabled=False),
            training=Training(steps=1),
        )
    )


def test_all_that_is_imported_of_the_users_own_is_found_and_nothing_is_run(here: Path) -> None:
    before = set(sys.modules)
    found: Mapping[str, Path] = module_sources(["mine"])
    assert set(found) == USED
    assert found["helpers.deeper"] == here / "helpers/deeper/__init__.py"
    assert list(found) == sorted(found)
    assert set(sys.modules) - before == set()


def test_a_module_in_a_package_brings_the_package(here: Path) -> None:
    assert set(module_sources(["package.inner"])) == {"package.inner", "package", "broken"}


def test_what_is_not_there_or_reaches_out_of_no_package_is_left_out(here: Path) -> None:
    assert module_sources(["gone"]) == {} == module_sources(["gone.deeper"]) == module_sources(["mine.deeper"])
    assert set(module_sources(["apart"])) == {"apart"}


def test_an_installed_module_stands_for_itself(here: Path) -> None:
    assert set(module_sources(["optax.losses"])) == {"optax.losses"}


def test_the_digest_depends_on_every_file_that_is_used_and_on_no_other(here: Path) -> None:
    whole = digest()
    for name in FILES:
        path = here / name
        content = path.read_text()
        path.write_text(content + "# changed\n")
        used = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") in USED
        assert (digest() != whole) == used, name
        path.write_text(content)
    assert digest() == whole
