"""The pages' commands and Python run as they stand there, as far as that takes seconds; `test_docs` parses the others.

Each page has a folder with what its reader would have by then; every command runs in it, in the page's order.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from jobs import Jobs
from private_runs import private_run, whole_export
from test_docs import ROOT, blocks

from dpdist.config import from_dict
from dpdist.data import open_dataset
from dpdist.data.checks import fingerprints
from dpdist_launch.cli import main

#: Of runs in composing.md and verify.md.
SIGMA, Q, N = 2.948293151011462, 512 / 1437, 1437
#: Compiling is most of what a run of seconds costs.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
DIGITS = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())


def shown(page: str) -> Iterator[tuple[str, str]]:
    """The commands of a page's shell blocks, and what is shown below each; without a prompt that is nothing."""
    for text in blocks(ROOT / "docs" / page, "bash", "console"):
        if not text.startswith("$ "):
            yield from ((line, "") for line in text.replace("\\\n", " ").splitlines() if line.strip())
            continue
        for item in re.split(r"^\$ ", text, flags=re.M)[1:]:
            line, _, output = item.partition("\n")
            yield line, output


def plain(text: str) -> list[str]:
    """Lines without what is another one each time or here: digests, times; numbers to five digits."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "SHA", text)
    text = re.sub(r"\d+\.\d{5,}(?:e-\d+)?", lambda number: f"{float(number[0]):.5g}", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def require_printed(expected: str, printed: str) -> None:
    """Every line that is shown was printed, in this order; `...` stands for any."""
    lines = iter(plain(printed))
    for line in plain(expected):
        assert line == "..." or line in lines, f"{line!r} is not (or not here) in:\n{printed}"


def execute(page: str, root: Path, dpdist: Callable[[list[str]], tuple[int, str]], *, without: str) -> int:
    """Run the commands of a page in `root`, but for those that match `without`; returns how many there were."""
    code, count = 0, 0
    for line, expected in shown(page):
        if re.match(without, line):
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "dpdist":
            code, printed = dpdist(words[1:])
        else:
            script = f"(exit {code}); {line}"
            done = subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True, check=False)
            code, printed = done.returncode, done.stdout + done.stderr
        require_printed(expected, printed.replace(str(root), "/shared"))
        count += 1
    return count


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `configs`, in which the test is."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_this_process(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str]]:
    def run(words: list[str]) -> tuple[int, str]:
        code = main(words)
        return code, "".join(capsys.readouterr())

    return run


def forked(jobs: Jobs, words: list[str]) -> tuple[int, str]:
    """A command in `jobs.root`, by forks that compile little; of `--processes`, two ranks are enough to see it run."""
    identities: list[dict[str, str]] = [{}]
    if "--processes" in words:
        at = words.index("--processes")
        words, identities = words[:at] + words[at + 2 :], jobs.identities(2)
    started = [jobs.command(*words, **QUICK, **identity) for identity in identities]
    ended = [each.wait() for each in started]
    return max(each.code for each in ended), "".join(each.out + each.err for each in ended)


@pytest.fixture
def reader(jobs: Jobs) -> Jobs:
    """With the repository's configs in the folder."""
    if not (configs := jobs.root / "configs").exists():
        configs.symlink_to(ROOT / "configs")
    return jobs


@pytest.mark.wait
def test_the_quickstart_and_verifying_what_it_gives_away(reader: Jobs) -> None:
    def run(words: list[str]) -> tuple[int, str]:
        code, printed = forked(reader, words)
        assert code == 0, (words, printed)
        return code, printed

    # A plan of the same config is in tuning.md.
    assert execute("quickstart.md", reader.root, run, without="bash launch/quickstart.sh|dpdist plan") == 7
    shutil.copytree(reader.root / "exports/digits", reader.root / "given")
    # Signing needs somebody's key.
    assert execute("verify.md", reader.root, lambda words: forked(reader, words), without="dpdist .* --sign") == 4


@pytest.mark.wait
def test_what_a_search_costs(reader: Jobs) -> None:
    assert execute("tuning.md", reader.root, lambda words: forked(reader, words), without="(?!dpdist plan)") == 1


@pytest.mark.wait
def test_python_of_the_pages(reader: Jobs, tmp_path: Path) -> None:
    """One process for all of it: a fresh one takes seconds to begin."""
    page = {name: list(blocks(ROOT / "docs" / f"{name}.md", "python")) for name in ("quickstart", "data", "tasks")}
    yamls = dict(re.findall(r"```yaml\n# (\w+)\.yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(), flags=re.S))
    small = {"sampling": {"expected_batch_size": 16}, "training": {"steps": 2}, "run": {"plots": False}}
    config = yaml.safe_load(yamls["rest"]) | yaml.safe_load(yamls["frame"])
    for section, values in small.items():
        config[section] = config.get(section, {}) | values
    (tmp_path / "frame.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "ranking.py").write_text(page["tasks"][0])
    (tmp_path / "mydata.py").write_text(page["data"][2])
    script = [
        f"import os; os.chdir({str(tmp_path)!r})",
        page["data"][0],
        page["data"][1],
        "train_frame, test_frame = frame[:455], frame[455:]",  # as many as above: nothing is compiled again
        "config = dpdist.load_config('frame.yaml', ['run.dir=runs/quickstart'])",
        page["quickstart"][0],
        "assert summary['status'] == 'finished'",
        "import datasets, mydata, ranking",
        "whole = datasets.Dataset.from_dict({'x': [1.0, 2.0]})",
        "datasets.DatasetDict(train=whole, test=whole).save_to_disk('saved')",
        "assert mydata.digits('saved')['train'][1] == {'x': 2.0}",
        "assert ranking.task.loss(3.0, {'score': 1.0}) == 4.0",
    ]
    (tmp_path / "script.py").write_text("\n".join(script))
    ended = reader.program([sys.executable, str(tmp_path / "script.py")], **QUICK).wait()
    assert ended.code == 0, ended.err


@pytest.mark.wait
def test_composing(here: Path, in_this_process: Callable[[list[str]], tuple[int, str]]) -> None:
    data = open_dataset(from_dict(DIGITS).data)
    tag = fingerprints(data.train, data.test)["training data"]
    for name in ("lr-1.0", "lr-0.5"):
        private_run(
            here / "runs" / name,
            q=Q,
            sigma=SIGMA,
            steps=40,
            delta=1e-4,
            size=N,
            data_tag=tag,
            data={"source": "digits"},
        )
    whole_export(here / "runs/lr-1.0", here / "given")

    def run(words: list[str]) -> tuple[int, str]:
        answer = in_this_process(words)
        if "--create" in words:  # the runs of the page were trained with the registry
            main(["privacy", "registry", "registry", "--dataset", "digits", "--charge", "runs/lr-1.0", "runs/lr-0.5"])
        return answer

    assert execute("composing.md", here, run, without="dpdist (export|train|plan)") == 8
