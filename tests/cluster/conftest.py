"""Owners of a lease on the directory of the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from owners import Owners


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Owners]:
    owners = Owners(tmp_path)
    yield owners
    owners.end()
