"""What can be shown to everyone of an error in the user's own code: where it is, and what Python or JAX says of it.

Everyone may know the code, the settings and the shapes of arrays, but no value of a record. So of a text, only words
and numbers that are such are shown: words of the source files that the error passed through, numbers of the user's own
file, and sizes of arrays. Everything else in it becomes `?`. A text that the user's own code has made (`raise`) is not
shown at all: it may quote anything. The whole of it is in the log under `private/`, where there is one.
"""

from __future__ import annotations

import contextlib
import dis
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from dpdist.errors import InputError

#: Errors that a slip in the code makes, whatever the data are.
SLIPS = (SyntaxError, ImportError, NameError, AttributeError)
#: Words of Python's own messages.
_PYTHON = frozenset(
    re.findall(
        r"\w+",
        """a an and are argument arguments as assignment associated at attribute be been before but by callable
        can cannot circular concatenate convert could defined does due expected for free found from
        function gave given global got has have import in incorrect index indices initialized int
        float str list tuple dict set bool bytes NoneType type module method invalid integers object
        iterable item items it its keyword least likely local missing more most multiple must name
        named No no not of on only operand operands or out partially positional range referenced
        required scope sequence slices subscriptable support supported syntax takes than the to too
        many trying types unexpected unexpectedly unpack unsupported used using value values
        variable was were where which with you your builtin_function_or_method""",
    )
)
#: What Python says of a call with other arguments than the function has.
_UNCALLABLE = re.compile(r"[\w.<>]+\(\) (missing|takes|got) ")
_TOKEN = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_LONGEST = 400
#: Libraries that see shapes of arrays and no values while a model is traced; others may have words of their own for
#: what they have read.
_LIBRARIES = {"jax", "flax", "optax", "equinox", "dpdist"}
_OURS = Path(__file__).parents[1]


@contextlib.contextmanager
def users_code(
    field: str, value: object, *, slips_only: bool = False, quote: bool = True, traced: bool = False
) -> Iterator[None]:
    """Within the block runs code of the user's own that `field` names: an error there is said in the open.

    Args:
        slips_only: where the code reads records, which line it fails at may tell something of them: then only errors
            that are slips in the code itself are said.
        quote: False where the code may have read anything, as a module may that is imported: of an error that is no
            slip, the text is then not shown.
        traced: whether the code is only traced for shapes, without a record: then what a library says of these is
            shown, too, where none of the code is to be seen in the traceback, as of a layer that the user has chosen.

    Raises:
        InputError: in place of an error that came through the user's own code.
    """
    with _whole_tracebacks():
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Exception as error:
            said = said_of(error, quote=quote or isinstance(error, SLIPS), traced=traced)
            if said is None or (slips_only and not isinstance(error, SLIPS)):
                raise
            raise InputError(field, value, said) from error


@contextlib.contextmanager
def _whole_tracebacks() -> Iterator[None]:
    """JAX takes its own frames out of tracebacks; here they tell its errors from the user's."""
    jax = sys.modules.get("jax")
    if jax is None:
        yield
        return
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        yield
    finally:
        jax.config.update("jax_traceback_filtering", before)


def said_of(error: BaseException, *, quote: bool = True, traced: bool = False) -> str | None:
    """`NameError in mytask.py, line 12: name 'foo' is not defined`; None where no code of the user's is in it.

    Args:
        quote: as `users_code` takes it, as is `traced`.
    """
    steps = [(step.tb_frame, step.tb_lineno, step.tb_lasti) for step in _steps(error.__traceback__)]
    own = [number for number, (frame, *_) in enumerate(steps) if _is_users(frame.f_code.co_filename)]
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        said = _syntax(error.filename)
        if said is not None:
            return said
    if not steps or kind in ("JaxRuntimeError", "XlaRuntimeError"):  # of the machine, not of the code
        return None
    if Path(steps[-1][0].f_code.co_filename).is_relative_to(_OURS):
        # A call of ours that the function does not take: names of functions and of their arguments. All else that
        # arises in dpdist has a caller who knows what to say.
        return f"{kind}: {error}." if isinstance(error, TypeError) and _UNCALLABLE.match(str(error)) else None
    if not own:
        told = traced and isinstance(error, TypeError | ValueError) and _is_languages(error)
        text = _masked(str(error), [each for each, *_ in steps]) if told else ""
        return f"{kind} as one example was traced: {text}." if text else None
    frame, line, last = steps[own[-1]]
    place = f"{kind} in {_shown(frame.f_code.co_filename)}, line {line}"
    if isinstance(error, OSError) and isinstance(error.errno, int):
        return f"{place}: {os.strerror(error.errno)}."
    if not quote or not _is_languages(error) or (own[-1] == len(steps) - 1 and _raises(frame, last)):
        return f"{place} (its text may quote data)."
    text = _masked(str(error), [each for each, *_ in steps])
    return f"{place}: {text}." if text else f"{place} (its text may quote data)."


def _steps(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _syntax(filename: str) -> str | None:
    """What Python says of a source file, asked again without running any of it; None if it finds nothing wrong."""
    try:
        compile(Path(filename).read_bytes(), filename, "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"{type(error).__name__} in {_shown(filename)}, line {error.lineno}: {error.msg}."
    except (OSError, ValueError):
        return None
    return None


def _is_users(filename: str) -> bool:
    """Whether a source file is neither of Python, of an installed library, nor of dpdist."""
    if not filename.endswith(".py") or not Path(filename).is_file():
        return False  # `<string>`, `<frozen ...>`, and what a program has made up
    path = Path(filename)
    library = {"site-packages", "dist-packages"} & set(path.parts)
    ours = path.is_relative_to(_OURS) or path.resolve().is_relative_to(_OURS.parent / "launch")
    return not library and not ours and not path.is_relative_to(sysconfig.get_path("stdlib"))


def _is_languages(error: BaseException) -> bool:
    """Whether the error's class is one of Python's or of a library, whose texts follow a pattern."""
    module = sys.modules.get(type(error).__module__)
    file = getattr(module, "__file__", None)
    return module is not None and (file is None or not _is_users(file))


def _raises(frame: FrameType, last: int) -> bool:
    """Whether a frame stopped at a `raise` of its own."""
    return dis.opname[frame.f_code.co_code[last]] in ("RAISE_VARARGS", "RERAISE")


def _shown(filename: str) -> str:
    path, here = Path(filename), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _masked(text: str, frames: list[FrameType]) -> str:
    """`text` with `?` for what is neither of the code nor a size; empty if little is left."""
    words, numbers = set(_PYTHON), set[str]()
    for frame in frames:
        found = set(_TOKEN.findall(_source(frame.f_code.co_filename)))
        if _is_users(frame.f_code.co_filename) or _LIBRARIES & set(Path(frame.f_code.co_filename).parts):
            words |= {token for token in found if not token[0].isdigit()}
        if _is_users(frame.f_code.co_filename):
            numbers |= {token for token in found if token[0].isdigit()}
        for value in list(frame.f_locals.values()):
            numbers |= _sizes(value)
    shown = 0

    def known(match: re.Match[str]) -> str:
        nonlocal shown
        token = match[0]
        kept = token in (numbers if token[0].isdigit() else words)
        shown += kept
        return token if kept else "?"

    line = " ".join(text.split())[:_LONGEST].rstrip(".")
    masked = _TOKEN.sub(known, line)
    return masked if shown > masked.count("?") else ""


def _source(filename: str) -> str:
    try:
        return Path(filename).read_text(errors="replace")
    except OSError:
        return ""


def _sizes(value: Any, depth: int = 2) -> set[str]:
    """Sizes of the axes of an array, or of those in a dict or list, as words; shapes are public."""
    if isinstance(value, dict | list | tuple) and depth:
        inner = value.values() if isinstance(value, dict) else value
        return {size for each in list(inner)[:100] for size in _sizes(each, depth - 1)}
    try:
        shape = tuple(map(int, value.shape))
    except Exception:  # whatever an object of somebody else's does
        return set()
    product = 1
    for size in shape:
        product *= size
    return {*map(str, shape), str(product)}
