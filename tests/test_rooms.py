"""Who may import whom, the whole table: the trusted base stands alone, and no arrow points up or closes a circle."""

from __future__ import annotations

import ast
import gc
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpdist.mechanism

SOURCE = Path(dpdist.mechanism.__file__).parents[2]
MECHANISM = SOURCE / "dpdist" / "mechanism"
LINES_A_READER_CAN_CHECK = 2000
LINES_A_FILE_MAY_HAVE = 400

#: Room -> the rooms it may import, floor by floor from the ground. A file on its own, such as `trainer`, is a room
#: too. `launch` is the package `dpdist_launch`, whose rooms may import everything in `dpdist/`.
FLOORS: list[dict[str, set[str]]] = [
    {"errors": set(), "mechanism": set()},
    {"config": {"errors"}},
    {"cluster": {"errors", "config", "mechanism"}, "data": {"errors", "config", "mechanism"}}
    | {"models": {"errors", "config", "mechanism"}},
    {"program": {"errors", "config", "mechanism", "cluster", "data", "models"}}
    | {"run": {"errors", "config", "mechanism", "cluster"}},
    {"joint": {"errors", "config", "mechanism", "run"}},
    {
        room: {"errors", "config", "mechanism", "cluster", "data", "models", "program", "run", "joint"}
        for room in ("trainer", "release", "audit")
    },
    {"report": {"errors", "config", "mechanism", "run", "joint", "release"}},
]
MAY_IMPORT = {room: others for floor in FLOORS for room, others in floor.items()}
LAUNCH_MAY_IMPORT: dict[str, set[str]] = {
    "paths": set(),
    "ranks": set(),
    "noise": set(),
    "local": {"ranks", "noise"},
    "failures": set(),
    "ending": set(),
    "training": {"failures"},
    "plan": set(),
    "elsewhere": {"plan", "measure"},
    "predict": {"paths"},
    "report": {"paths"},
    "privacy": {"paths"},
    "verify": {"paths"},
    "settings": set(),
    "data": {"paths"},
    "audit": {"paths", "local", "ranks"},
    "slurm": {"ranks", "training"},
    "observe": {"paths", "noise"},
    "tune": {"paths", "local", "ranks", "slurm"},
    "measure": {"paths", "local", "ranks", "slurm", "failures"},
    "cli": {"audit", "data", "elsewhere", "local", "measure", "observe", "paths", "plan", "predict", "privacy"}
    | {"ending", "report", "settings", "slurm", "training", "tune", "verify"},
    "__main__": {"cli"},
    "__init__": {"slurm"},
}


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_finalised_while_parsing() -> Iterator[None]:
    """Python 3.11's parser fails ("AST constructor recursion depth mismatch") where a finalizer runs in its midst."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def files_of(package: str) -> list[Path]:
    return sorted((SOURCE / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, at its top or within a function; `from a import b` gives `a.b`."""
    here = path.relative_to(SOURCE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: -node.level]] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path, package: str) -> str:
    return path.relative_to(SOURCE / package).with_suffix("").parts[0]


def rooms_in(path: Path, package: str) -> set[str]:
    """The rooms of `package` that a file imports; `dpdist.data.feed` is in room `data`."""
    parts = [name.split(".") for name in imports(path)]
    return {each[1] for each in parts if each[0] == package and len(each) > 1}


@pytest.mark.parametrize("path", files_of("dpdist"), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_file_imports_only_rooms_below_it(path: Path) -> None:
    own = room_of(path, "dpdist")
    if own != "__init__":  # the facade shows what is on every floor
        assert rooms_in(path, "dpdist") - {own} <= MAY_IMPORT[own]


@pytest.mark.parametrize("path", files_of("launch"), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_file_of_launch_imports_only_rooms_below_it(path: Path) -> None:
    own = room_of(path, "launch")
    assert rooms_in(path, "dpdist_launch") - {own} <= LAUNCH_MAY_IMPORT[own]
    # A `launch.py` beside the user would win over that name.
    assert not [name for name in imports(path) if name.split(".")[0] == "launch"]


def test_the_table_is_the_house() -> None:
    """Every room is in the table, every arrow that the table allows upward would be caught, and each is used."""
    assert {room_of(path, "dpdist") for path in files_of("dpdist")} == MAY_IMPORT.keys() | {"__init__"}
    assert {room_of(path, "launch") for path in files_of("launch")} == LAUNCH_MAY_IMPORT.keys()
    below: set[str] = set()
    for floor in FLOORS:
        assert all(others <= below for others in floor.values()), "an arrow that does not point down"
        below |= floor.keys()
    assert len(FLOORS) <= 7
    assert len(MAY_IMPORT) <= 14


def test_the_mechanism_imports_no_other_room() -> None:
    for path in MECHANISM.rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in ("launch", "dpdist_launch"), f"{path} imports {name}"
            assert top != "dpdist" or name.startswith("dpdist.mechanism."), f"{path} imports {name}"
            assert top != "importlib", f"{path} could import anything through {name}"


def test_the_mechanism_loads_no_other_room() -> None:
    """The same at run time, where an import hidden from the syntax tree would show."""
    modules = [".".join(p.relative_to(SOURCE).with_suffix("").parts) for p in MECHANISM.rglob("*.py")]
    code = (
        f"import sys, {', '.join(m.removesuffix('.__init__') for m in modules)}\n"
        "print(*[m for m in sys.modules if m.split('.')[0] in ('dpdist', 'launch', 'dpdist_launch')])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE
    ).stdout.split()
    assert [m for m in loaded if m != "dpdist" and not m.startswith("dpdist.mechanism")] == []


def test_sampling_needs_numpy_only() -> None:
    allowed = {"numpy", "jaxtyping", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(MECHANISM / "sampling.py")} <= allowed


def test_dpdist_imports_nothing_from_launch() -> None:
    for path in files_of("dpdist"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("launch", "dpdist_launch")], path


def test_files_fit_a_head() -> None:
    long = {
        str(path.relative_to(SOURCE)): len(path.read_text().splitlines())
        for folder in ("dpdist", "launch", "tests")
        for path in files_of(folder)
    }
    assert {name: lines for name, lines in long.items() if lines > LINES_A_FILE_MAY_HAVE} == {}


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
