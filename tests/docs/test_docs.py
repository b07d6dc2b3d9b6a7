"""What the pages show can be typed: commands and settings exist, and the site builds without a broken link."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, ROOT, blocks, shown

from dpdist.config import SECTIONS, setting_names
from dpdist_launch.cli import parser

#: Of settings whose value is a dict, the keys below are the user's.
SETTINGS = set(setting_names())


def commands(page: Path) -> list[list[str]]:
    """The `dpdist` commands that a page shows, as words, up to a pipe."""
    found = []
    for each in shown(page):
        line = re.sub(r"^(?:[A-Z_]+=\S+ |srun (?:-\S+ )*)+(?=dpdist )", "", each.text)
        if each.kind == "command" and re.match(r"dpdist [a-z]", line):
            found.append(shlex.split(re.split(r"\s[|>&;]|\s2>", line)[0], comments=True)[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_can_be_typed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        try:
            options, rest = parser().parse_known_args(words)
        except SystemExit as end:
            if end.code:
                pytest.fail(f"{page.name}: dpdist {' '.join(words)}: {capsys.readouterr().err}")
            continue
        assert all("=" in word and not word.startswith("-") for word in rest), f"{page.name}: {words}: {rest}"
        for item in [*getattr(options, "overrides", []), *rest]:
            name = item.partition("=")[0]
            assert any(name == known or name.startswith(f"{known}.") for known in SETTINGS), f"{page.name}: {item}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_in_a_shown_config_exists(page: Path) -> None:
    for text in [text for kind, text in blocks(page) if kind == "yaml"]:
        tree: Any = yaml.safe_load(text)
        if isinstance(tree, dict) and set(tree) & set(SECTIONS):
            assert set(tree) <= set(SECTIONS), f"{page.name}: {sorted(set(tree) - set(SECTIONS))}"
            names = {f"{section}.{key}" for section, values in tree.items() for key in (values or {})}
            assert names <= SETTINGS, f"{page.name}: {sorted(names - SETTINGS)}"


def test_the_pages_show_commands_at_all() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 50


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or re.search(rf"^{page.stem}$", index, re.M), page.name


@pytest.mark.wait
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_parser", reason="the site needs the extra `docs`")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(ROOT / "docs"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text()
    assert "dpdist.train" in page
    assert "epsilon" in page
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://', page), "it loads something from elsewhere"
