"""What the README shows runs as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from dpdist import config as config_module

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(code: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, *code], cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result


def test_the_python_example_trains_loads_and_predicts(tmp_path: Path) -> None:
    example = next(block for block in blocks("python") if "dpdist.train(config)" in block)
    (tmp_path / "example.py").write_text(example)
    output = run(["example.py"], tmp_path).stdout
    assert "'guarantee': 'holds'" in output
    assert re.search(r"^\[\d \d \d \d \d\]$", output, flags=re.MULTILINE), output
    summary = json.loads((tmp_path / "runs/notebook/summary.json").read_text())
    assert summary["accuracy"] >= 0.85
    assert summary["epsilon"] <= 3.0


def test_data_model_and_loss_of_the_users_own_plug_in_by_dotted_path(tmp_path: Path) -> None:
    module = next(block for block in blocks("python") if "# mytask.py" in block)
    config = next(block for block in blocks("yaml") if "mytask:data" in block)
    (tmp_path / "mytask.py").write_text(module)
    (tmp_path / "mytask.yaml").write_text(config)
    run(["-m", "launch", "train", "mytask.yaml", "--run-dir", "run"], tmp_path)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["accuracy"] > 0.75  # guessing gives 0.5


def test_the_privacy_commands_print_what_the_readme_shows() -> None:
    shown = re.findall(r"^\$ dpdist (privacy .*)\n(\{.*\})$", README, flags=re.MULTILINE)
    assert len(shown) == 2
    for command, answer in shown:
        printed = json.loads(run(["-m", "launch", *command.split()], ROOT).stdout)
        for key, value in json.loads(answer).items():
            if isinstance(value, float):
                assert abs(printed[key] - value) <= 1e-4 * abs(value), (command, key)
            else:
                assert printed[key] == value


def test_every_file_and_config_key_the_readme_names_exists() -> None:
    for path in re.findall(r"`((?:configs|docs|launch|tests|slurm|dpdist)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    known = config_module.flatten(config_module.from_dict({"training": {"steps": 1}, "privacy": {"enabled": False}}))
    for key in re.findall(
        r"`(?!model\.json)((?:privacy|training|data|model|run|cluster|checkpoint|sampling)\.[a-z_]+)", README
    ):
        assert key in known or key == "model.json", key
