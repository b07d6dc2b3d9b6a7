"""What README.md and the pages of docs/ show in fences: commands with their output, and blocks of code and of text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.M | re.S)
_SHELL = ("bash", "console", "sh")
#: What is measured, and so is another number each time: how well a model came out, how fast, and when.
_MEASURED = [
    (r"(accuracy|loss|auroc|perplexity|mse|mae|r2|acc) -?\d[\d.]*(?:e[-+]\d+)?", r"\1 N"),
    (r"\"(accuracy|loss|best_\w+)\": [\d.]+", r'"\1": N'),
    (r"[\d,.]+ (ex/s|examples/s)", r"N \1"),
    (r"takes [\d.e-]+ s", "takes N s"),
    (r"ETA [\d:]+", "ETA N"),
    (r"fullest over mean [\d.]+", "fullest over mean N"),  # of samples that are drawn for it, as is padding
    (r"padding [\d.]+%", "padding N%"),
    (r"about [\d.]+ (\w+), [\d.]+ node-", r"about N \1, N node-"),  # which padding is a part of
    (
        r"[\d.]+ \w+ temporary; at most [\d.]+ \w+ at once",
        "N temporary; at most N at once",
    ),  # another XLA, another size
]


@dataclass(frozen=True)
class Shown:
    """A command of a page and what is printed below it, or a block that is no command."""

    page: str
    kind: str
    text: str
    output: str = ""

    @property
    def name(self) -> str:
        """How `ways.py` knows it: the command, or `[kind]` and the first line of the block."""
        if self.kind == "command":
            return self.text
        lines = [line for line in self.text.splitlines() if line.strip()]
        return f"[{self.kind}] {lines[0] if lines else ''}"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fence, in order; one without a language is `text`."""
    for indent, kind, text in _FENCE.findall(page.read_text()):
        yield (kind.strip() or "text"), textwrap.dedent(text) if indent else text


def shown(page: Path) -> list[Shown]:
    """All that a page shows, in order; a line that ends in a backslash goes on, a comment is no command."""
    found = []
    for kind, text in blocks(page):
        prompts = re.search(r"^\$ ", text, re.M) is not None
        if kind not in _SHELL and not prompts:
            found.append(Shown(page.name, kind, text))
        elif prompts:
            for item in re.split(r"^\$ ", text, flags=re.M)[1:]:
                line, _, output = item.partition("\n")
                found.append(Shown(page.name, "command", line.strip(), output))
        else:
            for line in text.replace("\\\n", " ").splitlines():
                if command := re.split(r"\s+#\s", line)[0].strip():
                    found.append(Shown(page.name, "command", " ".join(command.split())))
    return found


def everything() -> list[Shown]:
    return [each for page in PAGES for each in shown(page)]


def plain(text: str, *, numbers: bool = True) -> list[str]:
    """Lines without what is another one each time or here: digests, what is measured; numbers to five digits.

    Args:
        numbers: False puts an N for every number, where all of them are measured.
    """
    text = re.sub(r"\b[0-9a-f]{64}\b|\"\.\.\.\"", lambda found: '"SHA"' if '"' in found[0] else "SHA", text)
    for pattern, instead in _MEASURED:
        text = re.sub(pattern, instead, text)
    text = re.sub(r"\d+\.\d{5,}(?:e-\d+)?", lambda number: f"{float(number[0]):.5g}", text)
    if not numbers:
        text = re.sub(r"\d[\d.,:/]*(?:e[-+]?\d+)?", "N", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def require_printed(expected: str, printed: str, *, numbers: bool = True) -> None:
    """Every line that is shown was printed, in this order; `...` stands for any number of lines."""
    lines = iter(plain(printed, numbers=numbers))
    for line in plain(expected, numbers=numbers):
        assert line == "..." or line in lines, f"{line!r} is not (or not here) in:\n{printed}"


class Given:
    """What `ways.py` leaves to one test; at its end, nothing may be left."""

    def __init__(self, test: str, units: list[Shown]) -> None:
        self.test, self.left = test, units

    def of(self, page: str, pattern: str = "") -> Iterator[Shown]:
        """What is left of a page and begins so, in order."""
        for each in [each for each in self.left if each.page == page and re.match(pattern, each.name)]:
            self.left.remove(each)
            yield each

    def one(self, page: str, pattern: str) -> Shown:
        (found,) = self.of(page, pattern)
        return found
