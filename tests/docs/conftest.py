"""A reader of the pages, and the data that several pages speak of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Jobs
from reader import Reader, write_fashion


@pytest.fixture
def reader(jobs: Jobs, tmp_path: Path) -> Reader:
    return Reader(jobs, tmp_path)


@pytest.fixture
def fashion(tmp_path: Path) -> Callable[[int], str]:
    """Makes files like those of Fashion-MNIST, of so many images; returns the setting that names them."""

    def made(train: int) -> str:
        write_fashion(folder := tmp_path / f"fashion-{train}", train)
        return f"data.path={folder}"

    return made


@pytest.fixture
def write(reader: Reader) -> Callable[[str, str], None]:
    """Write a file in the reader's folder."""

    def to(name: str, text: str) -> None:
        (reader.root / name).parent.mkdir(parents=True, exist_ok=True)
        (reader.root / name).write_text(text)

    return to
