"""Who imports whom: the trusted base stands alone, and no arrow closes a circle."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import dpdist.mechanism

PACKAGE = Path(dpdist.mechanism.__file__).parent.parent
MECHANISM = PACKAGE / "mechanism"
LINES_A_READER_CAN_CHECK = 2000


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, at its top or within a function; `from a import b` gives `a.b`."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: -node.level]] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str | None:
    """`dpdist.data.feed` is in room `data`; the facade `dpdist` itself is in none."""
    parts = name.split(".")
    return parts[1] if parts[0] == "dpdist" and len(parts) > 1 else None


def arrows() -> dict[str, set[str]]:
    """room -> the other rooms it imports; a module of its own, such as `train.py`, is a room too."""
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        own = room(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        if own and own != "__init__":
            others = {room(name) for name in imports(path)} - {None, own}
            graph.setdefault(own, set()).update(str(other) for other in others)
    return graph


def test_the_mechanism_imports_no_other_room() -> None:
    for path in MECHANISM.rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top != "launch", f"{path} imports {name}"
            assert top != "dpdist" or name.startswith("dpdist.mechanism."), f"{path} imports {name}"
            assert top != "importlib", f"{path} could import anything through {name}"


def test_the_mechanism_loads_no_other_room() -> None:
    """The same at run time, where an import hidden from the syntax tree would show."""
    modules = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in MECHANISM.rglob("*.py")]
    code = (
        f"import sys, {', '.join(m.removesuffix('.__init__') for m in modules)}\n"
        "print(*[m for m in sys.modules if m.split('.')[0] in ('dpdist', 'launch')])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout.split()
    assert [m for m in loaded if m != "dpdist" and not m.startswith("dpdist.mechanism")] == []


def test_sampling_needs_numpy_only() -> None:
    allowed = {"numpy", "jaxtyping", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(MECHANISM / "sampling.py")} <= allowed


def test_dpdist_imports_nothing_from_launch() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "launch"], path


def test_no_circles_between_rooms() -> None:
    graph = arrows()
    assert {"mechanism", "data", "cluster", "train"} <= graph.keys()  # the walk sees the house
    assert graph["train"] >= {"mechanism", "cluster", "data"}  # and its arrows
    while graph:
        leaves = {own for own, others in graph.items() if not others & graph.keys()}
        assert leaves, f"a circle among { ({own: others & graph.keys() for own, others in graph.items()}) }"
        graph = {own: others for own, others in graph.items() if own not in leaves}


def lines_of_code(path: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings, which are there to be read too."""
    source = path.read_text()
    described = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, described) and ast.get_docstring(node)]
    docstrings = {line for node in nodes for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = {line for t in tokens if t.type not in layout for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docstrings)


def test_the_mechanism_can_be_read_in_one_sitting() -> None:
    assert sum(lines_of_code(path) for path in MECHANISM.rglob("*.py")) < LINES_A_READER_CAN_CHECK
