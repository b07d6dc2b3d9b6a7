"""The pages that a reviewer follows name tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["threat-model.md", "guarantee.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / "docs" / page).read_text(), flags=re.S)
    named = re.findall(r"`(tests/[^`]+)`", text)
    assert len(named) > 20
    for entry in named:
        path, _, test = entry.partition("::")
        assert (ROOT / path).is_file(), entry
        if test:
            tree = ast.parse((ROOT / path).read_text())
            assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, entry
