"""How far this pytest is, in a file that DPDIST_TEST_PROGRESS names, for the process that runs the lanes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def register(config: pytest.Config) -> None:
    """Write the file, where one is named."""
    if file := os.environ.get("DPDIST_TEST_PROGRESS"):
        config.pluginmanager.register(Progress(Path(file)))


class Progress:
    """Tells the process that runs the lanes how far this one is, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._told: dict[str, int | str] = {"collected": 0, "done": 0, "failed": 0, "now": "collecting"}

    def _tell(self, **news: int | str) -> None:
        self._told |= news
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps(self._told))
        temporary.replace(self._file)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._tell(collected=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tell(now=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._told["failed"] = int(self._told["failed"]) + report.failed

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._tell(done=int(self._told["done"]) + 1)
