"""Every file and setting that the README names exists; `tests/docs` runs what it shows."""

from __future__ import annotations

import re
from pathlib import Path

from dpdist import config as config_module

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_file_and_config_key_the_readme_names_exists() -> None:
    for path in re.findall(r"`((?:configs|docs|launch|tests|slurm|dpdist)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    known = config_module.flatten(config_module.from_dict({"training": {"steps": 1}, "privacy": {"enabled": False}}))
    for key in re.findall(
        r"`(?!model\.json)((?:privacy|training|data|model|run|cluster|checkpoint|sampling)\.[a-z_]+)", README
    ):
        assert key in known or key == "model.json", key
