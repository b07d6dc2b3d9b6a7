"""Which files stand for the user's code."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from dpdist.config import Config, Data, Model, Privacy, Training
from dpdist.config.user_code import library_versions, module_sources
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


def install(place: Path, version: str) -> None:
    """A library as an installer leaves it."""
    described = place / f"drawing-{version}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: drawing\nVersion: {version}\n")
    (described / "top_level.txt").write_text("pencil\n")
    (place / "pencil.py").write_text("def f(): ...\n")


def test_an_installed_library_counts_by_its_version(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files may be many; that of a library which only another one imports is not looked for."""
    place = here / "site-packages"
    install(place, "1.0")
    monkeypatch.syspath_prepend(str(place))
    assert library_versions(["mine"]) == {"numpy": metadata.version("numpy")}
    before = digest()
    (here / "late.py").write_text("import pencil\n")
    with_it = digest()
    assert library_versions(["mine"]) == {"drawing": "1.0", "numpy": metadata.version("numpy")}
    (place / "drawing-1.0.dist-info").rename(place / "drawing-2.0.dist-info")
    described = place / "drawing-2.0.dist-info/METADATA"
    described.write_text(described.read_text().replace("1.0", "2.0"))
    assert library_versions(["mine"])["drawing"] == "2.0"
    assert len({before, with_it, digest()}) == 3
    assert "pencil" not in module_sources(["mine"])
