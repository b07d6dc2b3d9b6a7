"""No command and no block of a page goes untested: a test executes each, or a reason says why none can."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from pages import ROOT, Shown, everything
from ways import WAYS, By, Cannot, way

TESTS = ROOT / "tests"
UNITS = everything()


@cache
def definitions(file: Path) -> dict[str, str]:
    """The source of each function, class and constant of a file, and `NAME: from where` of what it imports."""
    text = file.read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(text, node) or ""
            found |= {f"@{node.name}": " ".join(ast.unparse(each) for each in node.decorator_list)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: ast.get_source_segment(text, node) or "" for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = TESTS / "support" / f"{node.module.rpartition('.')[2]}.py"
            if module.exists():
                found |= {alias.name: definitions(module).get(alias.name, "") for alias in node.names}
    return found


def source(test: str) -> str:
    """The test, and whatever of its file and of tests/support it names, directly or through those."""
    name, _, function = test.partition("::")
    known = definitions(TESTS / name)
    assert function in known, f"there is no {test}"
    text, seen, left = f"tests/{test} ", set(), [function]
    while left:
        if (each := left.pop()) in known and each not in seen:
            seen.add(each)
            text += known[each] + known.get(f"@{each}", "")
            left += re.findall(r"\w+", known[each])
    return text


@pytest.mark.parametrize("page", sorted({each.page for each in UNITS}))
def test_everything_that_a_page_shows_has_a_way(page: str) -> None:
    names = [each.name for each in UNITS if each.page == page]
    assert [name for name in names if way(page, name) is None] == [], "say in tests/support/ways.py how it is executed"
    for at, (pattern, _) in enumerate(WAYS[page]):
        before = [each for each, _ in WAYS[page][:at]]
        first = [n for n in names if re.match(pattern, n) and not any(re.match(each, n) for each in before)]
        assert first, f"ways.py has {pattern!r} for {page}, and nothing there is of that kind"


def test_no_page_is_in_the_table_that_shows_nothing() -> None:
    assert set(WAYS) == {each.page for each in UNITS}


def test_a_test_that_takes_blocks_from_the_pages_exists_and_takes_them() -> None:
    """The fixture `given` fails it where it leaves any of them."""
    here = [*TESTS.glob("docs/test_*.py"), *TESTS.glob("slurm/test_*.py")]
    for name in {each for ways in WAYS.values() for _, each in ways if isinstance(each, str)}:
        (found,) = [definitions(file)[name] for file in here if name in definitions(file)]
        assert "given: Given" in found, name


@pytest.mark.parametrize(
    "unit",
    [each for each in UNITS if isinstance(way(each.page, each.name), By)],
    ids=lambda unit: f"{unit.page}: {unit.name}"[:60],
)
def test_what_another_test_executes_is_in_that_test(unit: Shown) -> None:
    by = way(unit.page, unit.name)
    assert isinstance(by, By)
    text = source(by.test)
    for word in by.words:
        assert word in text, f"{by.test} does not have {word!r} any more"
    assert unit.kind.startswith("{") or any(word in unit.text for word in by.words)


def test_what_cannot_be_run_has_a_reason_and_a_shorter_form() -> None:
    reasons = {each for ways in WAYS.values() for _, each in ways if isinstance(each, Cannot)}
    assert len(reasons) <= 12
    for each in reasons:
        assert len(each.reason) > 10
        if each.shortened is not None:
            source(each.shortened)
