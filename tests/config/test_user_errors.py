"""What is said in the open of errors in the user's own code: the place, Python's and JAX's words, and no record."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dpdist.config.plugins import load_object
from dpdist.config.user_errors import users_code
from dpdist.errors import InputError

#: What the records hold; made here, so that no source file has it.
RECORD = " ".join(f"qz{number:x}v {number}" for number in (7_340_033, 9_437_189))
READ = "from pathlib import Path\nRECORD = Path(__file__).with_name('records').read_text()\n"
TRACE = "import jax, jax.numpy as jnp\nS = jax.ShapeDtypeStruct\n"

Run = Callable[[str], str]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """What is said of `f()` of a module with this source."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records").write_text(RECORD)
    monkeypatch.syspath_prepend(tmp_path)

    def run(source: str) -> str:
        name = f"mytask_{abs(hash(source))}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        with pytest.raises(InputError) as caught, users_code("model.name", name):
            load_object(f"{name}:f", "model.name", [])()
        sys.modules.pop(name, None)
        return caught.value.remedy.replace(f"{name}.py", "mytask.py")

    return run


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(:\n    pass", "SyntaxError in mytask.py, line 1: invalid syntax."),
        ("def f():\npass", "IndentationError in mytask.py, line 2: expected an indented block"),
        ("def f():\n    return foo + 1", "NameError in mytask.py, line 2: name 'foo' is not defined."),
        ("x = foo\ndef f(): ...", "NameError in mytask.py, line 1: name 'foo' is not defined."),
        ("import notthere_x\ndef f(): ...", "ModuleNotFoundError in mytask.py, line 1: No module named 'notthere_x'."),
        (
            "def f():\n    return f.foo",
            "AttributeError in mytask.py, line 2: 'function' object has no attribute 'foo'.",
        ),
        ("import jax.numpy as jnp\ndef f():\n    jnp.sofmax", "'jax.numpy' has no attribute 'sofmax'."),
        ("def f():\n    {'image': 1}['imge']", "KeyError in mytask.py, line 2: 'imge'."),
        ("def g(a, b): ...\ndef f():\n    g(1)", "g() missing 1 required positional argument: 'b'."),
        ("def f():\n    open('nofile')", "FileNotFoundError in mytask.py, line 2: No such file or directory."),
        (
            TRACE + "def f():\n    jax.eval_shape(lambda p, x: p @ x, S((13, 5), 'float32'), S((17,), 'float32'))",
            "line 4: dot_general requires contracting dimensions to have the same shape, got (5,) and (17,).",
        ),
        (
            TRACE + "def f():\n    jax.eval_shape(lambda x: x.reshape(4, 4), S((17,), 'float32'))",
            "line 4: cannot reshape array of shape (17,) (size 17) into shape (4, 4)",
        ),
    ],
)
def test_a_slip_is_shown_with_its_place_in_the_words_of_python_or_jax(said: Run, source: str, expected: str) -> None:
    assert expected in said(source)


@pytest.mark.parametrize(
    "statement",
    [
        "raise ValueError(RECORD)",
        "raise NameError(f'name {RECORD!r} is not defined')",
        "raise SyntaxError(RECORD, (__file__, 3, 1, RECORD))",
        "raise ImportError(RECORD)",
        "raise ExceptionGroup(RECORD, [ValueError(RECORD)])",
        "raise type(RECORD.split()[0] + 'Error', (ValueError,), {})(RECORD) from None",
        "assert not RECORD, RECORD",
        "(_ for _ in ()).throw(ValueError(RECORD))",
        "int(RECORD)",
        "{}[RECORD]",
        "[][int(RECORD.split()[1])]",
        "getattr(Path, RECORD)",
        "eval(RECORD)",
        "eval(RECORD.split()[0])",
        "exec(compile('1 / 0', RECORD + '.py', 'exec'))",
        "__import__(RECORD)",
        "__import__('json').loads(RECORD)",
        "__import__('ast').literal_eval(RECORD)",
        "__import__('numpy').asarray([RECORD]).astype('float32')",
        "__import__('jax').numpy.zeros(3, dtype=RECORD)",
        "__import__('jax').numpy.einsum(RECORD, [1.0])",
        "jax = __import__('jax'); jax.eval_shape(lambda x: x.reshape(int(RECORD.split()[1]), 3), jax.numpy.ones(5))",
        "jax = __import__('jax'); jax.eval_shape(lambda x: x[RECORD], jax.numpy.ones(5))",
    ],
)
@pytest.mark.parametrize("when", ["while it is imported", "while it runs"])
def test_no_text_quotes_a_record(said: Run, statement: str, when: str) -> None:
    source = f"{READ}def f():\n    {statement}\n" + ("f()\n" if when == "while it is imported" else "")
    text = said(source)
    if "type(RECORD" in statement:
        text = text.partition(" in ")[2]  # the name of a class is of the code, and shown everywhere
    assert re.search(r"mytask\.py, line 4", text)
    for piece in RECORD.split():
        assert piece not in text


def test_where_records_are_read_only_slips_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reading_records.py").write_text("def f(s):\n    int(s)\n\ndef g():\n    foo\n")
    module = importlib.import_module("reading_records")
    with pytest.raises(ValueError, match="Alice"), users_code("data.source", "x", slips_only=True):
        module.f("Alice")
    with pytest.raises(InputError, match="line 5: name 'foo'"), users_code("data.source", "x", slips_only=True):
        module.g()
    sys.modules.pop("reading_records")


def test_errors_of_ours_and_of_machines_pass_through() -> None:
    for error in (InputError("a", 1, "b."), MemoryError()):
        with pytest.raises(type(error)) as caught, users_code("model.name", "x"):
            raise error
        assert caught.value is error
