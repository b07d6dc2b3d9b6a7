"""docs/threat-model.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_threat_model_names_exists() -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / "docs/threat-model.md").read_text(), flags=re.S)
    named = re.findall(r"`(tests/[^`]+)`", text)
    assert len(named) > 20
    for entry in named:
        path, _, test = entry.partition("::")
        assert (ROOT / path).is_file(), entry
        if test:
            tree = ast.parse((ROOT / path).read_text())
            assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, entry
