"""What the pages show is typed as it stands there, as `ways.py` in tests/support says; here by a reader on one machine.

A reader has a folder with `configs` and what the page lets them make. Full size unless a test names what it changes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from pages import ROOT, Given, Shown, everything, require_printed
from private_runs import private_run, whole_export
from reader import Reader
from sklearn.datasets import load_digits

from dpdist.config import from_dict
from dpdist.data import open_dataset
from dpdist.data.checks import fingerprints
from dpdist.run.events import FIELDS
from dpdist_launch.tune.space import read_space

pytestmark = pytest.mark.wait

Write = Callable[[str, str], None]
Fashion = Callable[[int], str]
#: Of runs in composing.md.
SIGMA, Q, N = 2.948293151011462, 512 / 1437, 1437
DIGITS = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
#: Calibrating takes seconds.
GIVEN_NOISE = ("privacy.target_epsilon=null", "privacy.noise_multiplier=3")
#: Behind a command whose run nobody looks at.
SHORT = ("training.steps=2", "run.plots=false", "cluster.preflight=false", *GIVEN_NOISE)
#: A Python whose virtual environments have a `dpdist` that notes its words: all is real but for the installation.
INSTALLED = """#!/bin/bash
case "$*" in
    "-m venv .venv")
        mkdir -p .venv/bin && cp "$0" .venv/bin/python
        printf '#!/bin/sh\\necho dpdist "$@" >called\\n' >.venv/bin/dpdist && chmod +x .venv/bin/dpdist ;;
    "-m pip "*) ;;
    *) exec {python} "$@" ;;
esac
"""
#: Of a run directory, what is there only in some cases.
SOMETIMES = {"abandoned/", "stragglers.jsonl"}


def block(page: str, beginning: str) -> str:
    """A block of a page that another test executes."""
    (found,) = [each.text for each in everything() if each.page == page and each.name.startswith(beginning)]
    return found


def quickstart(reader: Reader) -> str:
    """What `bash launch/quickstart.sh` prints in a clone; what it calls `dpdist` with runs in forks."""
    for name in ("launch/quickstart.sh", "launch/environment.sh", "slurm/site.example.sh", "pyproject.toml"):
        (reader.root / name).parent.mkdir(exist_ok=True)
        (reader.root / name).write_text((ROOT / name).read_text())
    (reader.root / "requirements").symlink_to(ROOT / "requirements")
    (python := reader.root / "python").write_text(INSTALLED.format(python=sys.executable))
    python.chmod(0o755)
    reader.type("cp slurm/site.example.sh slurm/site.sh")
    printed = reader.type("source slurm/site.sh && bash launch/quickstart.sh", PYTHON=str(python))
    assert reader.code == 0, printed
    return printed + reader.type((reader.root / "called").read_text())


def test_digits_from_a_clone_to_who_gets_the_model(
    reader: Reader, given: Given, fashion: Fashion, write: Write
) -> None:
    printed = quickstart(reader)
    typed = {each.text for page in ("first-day.md", "slurm.md", "README.md") for each in given.of(page, "cp|source")}
    assert typed == {
        "cp slurm/site.example.sh slurm/site.sh",
        "source slurm/site.sh",
        "source slurm/site.sh && bash launch/quickstart.sh",
    }
    for page in ("README.md", "quickstart.md"):
        given.one(page, "bash launch/quickstart.sh")  # has been typed, with the site file before it
        require_printed(given.one(page, r"\[text\] (\+|\[0\]) *dpdist").text, printed)
    data = fashion(300)
    for page in ("README.md", "quickstart.md"):
        for each in given.of(page, "dpdist (?!predict|export runs/digits --to given|verify given)"):
            reader.follow(each, *shorter(each.text, data))
    run_directory(given.one("README.md", r"\[text\] config.yaml"), reader.root / "runs/digits")
    reader.follow(given.one("tasks.md", "dpdist diagnose"), numbers=False)
    np.savez(reader.root / "new.npz", image=load_digits().images[:5, ..., None].astype(np.uint8))
    for page in ("README.md", "giving.md"):
        reader.type("rm -rf given predictions.csv")
        for each in given.of(page, "dpdist (export|predict)|ls|python|head"):
            if each.text == "python":
                typed_into_python(reader, each)
            else:
                reader.follow(each, numbers="head" not in each.text)
    assert given.one("README.md", "dpdist verify").text == "dpdist verify given"  # as here
    for each in given.of("verify.md", "(?!dpdist.*--sign)"):
        reader.follow(each, ok=False)  # the exit code is on the page
    key = "mkdir -p ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 && cp ~/.ssh/id_ed25519.pub alice.pub"
    reader.type(f"rm -r given && {key}")
    for each in given.of("verify.md"):
        reader.follow(Shown(each.page, each.kind, each.text.replace("~", str(reader.root / "home")), each.output))
    mytask = given.one("README.md", r"\[python\]").text
    write("mytask.py", mytask)
    write("my.yaml", given.one("README.md", r"\[yaml\]").text)
    reader.type("dpdist train my.yaml --run-dir runs/mine")
    assert json.loads((reader.root / "runs/mine/summary.json").read_text())["accuracy"] > 0.75  # guessing gives 0.5
    write("mytask.py", mytask.rstrip("\n").rpartition("\n")[0] + "\n    return jnp.dot(logits, jnp.ones(5))\n")
    require_printed(given.one("README.md", r"\[text\] dpdist: error").text, reader.type("dpdist train my.yaml"))


def shorter(command: str, data: str) -> tuple[str, ...]:
    """What is put behind the trainings, but for that of `runs/digits`."""
    if "fashion" in command:
        return (data, "training.epochs=null", "sampling.expected_batch_size=32", *SHORT)
    return SHORT if "train" in command and "runs/digits " not in f"{command} " else ()


def run_directory(told: Shown, run: Path) -> None:
    """All files that the README names are there, but for those that come with an accident; `private/` is ours alone."""
    folder = run
    for line in told.text.splitlines():
        if line.startswith(" " * 8):
            continue  # goes on
        folder = run / "private" if line.startswith("  ") else run
        name = line.split()[0]
        if name not in SOMETIMES:
            assert list(folder.glob(name.rstrip("/").replace(".N", ".*"))), f"{name} is not in {folder}"
    assert (run / "private").stat().st_mode & 0o777 == 0o700


def typed_into_python(reader: Reader, session: Shown) -> None:
    """What is shown after `>>>` is what the statement before prints."""
    lines = session.output.splitlines()
    code = [f"_({line[4:]!r})" for line in lines if line.startswith(">>> ")]
    ask = "def _(line):\n    try: print(repr(eval(line, globals())))\n    except SyntaxError: exec(line, globals())\n"
    told = "\n".join(line for line in lines if not line.startswith(">>> "))
    require_printed(
        re.sub(r"array\(.*\)", "array(5)", told), re.sub(r"array\(.*\)", "array(5)", reader.python(ask, *code))
    )


def test_what_plans_cost(reader: Reader, given: Given, fashion: Fashion, write: Write) -> None:
    """`roofline` of all models takes half a minute: of one, where no other is named."""
    data = fashion(60000)
    write("optimizer.yaml", yaml.safe_dump(DIGITS | yaml.safe_load(given.one("README.md", r"\[yaml\]").text)))
    assert "clipping    auto" in reader.type("dpdist plan optimizer.yaml")
    page = (ROOT / "docs/roofline.md").read_text()
    space = given.one("tuning.md", "cat")
    write("space.yaml", space.output)
    reader.follow(space)
    assert list(read_space(reader.root / "space.yaml").samples())
    for name in ("README.md", "planning.md", "tuning.md", "quickstart.md", "roofline.md", "benchmarks.md"):
        for each in given.of(name):
            more = {"fashion": (data,), "roofline": ("--models", "mnist-cnn")}
            words = next(
                (words for word, words in more.items() if word in each.text and "--models" not in each.text), ()
            )
            printed = reader.follow(each, *words)
            if "--models vit-b" in each.text:
                require_printed(printed, page)


def test_python(reader: Reader, given: Given, write: Write) -> None:
    """One program of all that needs nothing but what its page makes; a run of two steps has the page's columns."""
    config = yaml.safe_load(block("data.md", "[yaml] # rest.yaml"))
    config |= yaml.safe_load(given.one("data.md", r"\[yaml\] # frame").text)
    small = {"sampling": {"expected_batch_size": 16}, "training": {"steps": 2}, "run": {"plots": False}}
    write(
        "frame.yaml", yaml.safe_dump(config | {name: config.get(name, {}) | values for name, values in small.items()})
    )
    write("ranking.py", given.one("tasks.md", r"\[python\]").text)
    write("mydata.py", given.one("data.md", r"\[python\] # mydata").text)
    printed = reader.python(
        block("data.md", "[python] # cells.py"),
        given.one("data.md", r"\[python\] import dpdist").text,
        "train_frame, test_frame = frame[:455], frame[455:]",  # as many as above: nothing is compiled again
        "config = dpdist.load_config('frame.yaml', ['run.dir=runs/quickstart'])",
        given.one("quickstart.md", r"\[python\]").text,
        "assert summary['status'] == 'finished'",
        "import datasets, mydata, ranking",
        "whole = datasets.Dataset.from_dict({'x': [1.0, 2.0]})",
        "datasets.DatasetDict(train=whole, test=whole).save_to_disk('saved')",
        "assert mydata.digits('saved')['train'][1] == {'x': 2.0}",
        "assert ranking.task.loss(3.0, {'score': 1.0}) == 4.0",
        "import jax.numpy as jnp",
        "loss_fn = lambda params, example: jnp.dot(params, example)",
        "params, batch, mask = jnp.zeros(2), jnp.array([[3.0, 4.0], [0.3, 0.4], [7.0, 7.0]]), jnp.array([1, 1, 0])",
        given.one("README.md", r"\[python\] from dpdist").text,
        "assert jnp.allclose(sums, jnp.array([0.9, 1.2]), atol=1e-4), sums",
        "assert jnp.allclose(norms[:2], jnp.array([5.0, 0.5]), atol=1e-3), norms",
    )
    assert re.match(r"0\.\d+\n", printed), printed
    printed = reader.python(given.one("README.md", r"\[python\] import").text)
    assert "'guarantee': 'holds'" in printed
    assert re.search(r"^\[\d \d \d \d \d\]$", printed, re.M), printed
    assert json.loads((reader.root / "runs/notebook/summary.json").read_text())["accuracy"] >= 0.85


def of_digits(root: Path, name: str, data_tag: bytes = b"") -> None:
    """A run of 40 steps that costs epsilon 3, made without training."""
    private_run(
        root / "runs" / name,
        q=Q,
        sigma=SIGMA,
        steps=40,
        delta=1e-4,
        size=N,
        data_tag=data_tag,
        data={"source": "digits"},
    )


def test_composing(reader: Reader, given: Given) -> None:
    data = open_dataset(from_dict(DIGITS).data)
    tag = fingerprints(data.train, data.test)["training data"]
    for name in ("lr-1.0", "lr-0.5"):
        of_digits(reader.root, name, tag)
    whole_export(reader.root / "runs/lr-1.0", reader.root / "given")
    least = {"training": {"steps": 1}, "privacy": {"enabled": False}}
    run = from_dict(yaml.safe_load(given.one("composing.md", r"\[yaml\]").text) | least).run
    assert (run.registry, run.registry_dataset) == ("/shared/registry", "digits")
    for each in given.of("composing.md"):
        reader.follow(each, ok="train" not in each.text)
        if "--create" in each.text:  # the runs of the page were trained with the registry
            reader.type("dpdist privacy registry registry --dataset digits --charge runs/lr-1.0 runs/lr-0.5")
    # The three points of the sweep in slurm.md: what they cost together.
    table = given.one("slurm.md", r"\[text\]").text
    of_digits(reader.root, "lr-0.1")
    together = reader.type("dpdist privacy compose runs/lr-1.0 runs/lr-0.5 runs/lr-0.1 --at-once --json")
    cost = json.loads(together.splitlines()[0])["epsilon"]
    assert f"costs the composed epsilon, {cost:.4g} at delta 0.0001" in table


def test_what_people_see(reader: Reader, given: Given, write: Write) -> None:
    (reader.root / "runs").mkdir()
    for name in ("lr0.5", "lr1.0", "lr2.0"):
        of_digits(reader.root, name)
    reader.follow(given.one("observing.md", "dpdist report"))
    assert "Learning rates on digits" in (reader.root / "rates.html").read_text()
    write("notify.sh", '#!/bin/sh\ncat >"told$1"\n')
    (reader.root / "notify.sh").chmod(0o755)
    told = DIGITS | {"run": {"plots": False} | yaml.safe_load(given.one("observing.md", r"\[yaml\]").text)["run"]}
    write("told.yaml", yaml.safe_dump(told | {"training": {"steps": 2}}))
    printed = reader.type(
        "dpdist train told.yaml --run-dir runs/told", *GIVEN_NOISE, PATH=f"{reader.root}:/usr/bin:/bin"
    )
    hours = r"dpdist: [\d.]+ node-hours: (?:[a-z-]+ \d+%(?:, )?){3,}"  # in order of their shares
    assert re.match(hours, given.one("observing.md", r"\[text\] dpdist: ").text)
    assert re.search(hours, printed), printed
    for text in (given.one("observing.md", r"\[json\]").text, (reader.root / "runs/told/events.jsonl").read_text()):
        for line in text.splitlines():
            event = json.loads(line)
            assert event.keys() == {"time", "event", *FIELDS[event["event"]]}
    last = json.loads((reader.root / "runs/told/events.jsonl").read_text().splitlines()[-1])
    (heard,) = reader.root.rglob("told--urgent")
    assert json.loads(heard.read_text()) | last == json.loads(heard.read_text())


def test_what_is_drawn_of_kept_numbers(reader: Reader, given: Given, write: Write) -> None:
    """`measure.py` of one point of its 78; `plot.py` of all that are kept, and the report of a sweep that is."""
    folder = reader.root / "docs/results/choosing"
    for name in ("measure.py", "plot.py", "results.json"):
        write(f"docs/results/choosing/{name}", (ROOT / "docs/results/choosing" / name).read_text())
    (reader.root / "docs/pictures").mkdir()
    write("bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (reader.root / "bin/python").chmod(0o755)
    reader.follow(given.one("choosing.md", "python"), PATH=f"{reader.root}/bin:/usr/bin:/bin")
    assert "expected batch size B" in (reader.root / "docs/pictures/choosing.svg").read_text()
    whole = (folder / "measure.py").read_text()
    one = re.sub(r"SWEEPS = \{.*?^\}", 'SWEEPS = {"steps": [2]}', whole, flags=re.S | re.M).replace(
        "REPEATS = EPSILON", ""
    )
    reader.python(
        "import sys; sys.argv = ['measure.py', 'one.json']",
        one.replace("DELTA, REPEATS = 3.0, 1e-4, 3", "DELTA, REPEATS = 3.0, 1e-4, 1"),
    )
    (measured,) = json.loads((reader.root / "one.json").read_text())
    assert measured.keys() == json.loads((folder / "results.json").read_text())[0].keys()
    kept = json.loads((ROOT / "docs/results/scaling/scaling.json").read_text())
    names = [f"{each['arm']}-n{each['nodes']}-r{each['repeat']}" for each in kept["points"]]
    asked = {name: kept[name] for name in ("command", "created", "measured")}
    write("scaling/fashion_mnist/sweep.json", json.dumps(asked | {"points": names}))
    for name, each in zip(names, kept["points"], strict=True):
        write(f"scaling/fashion_mnist/points/{name}.json", json.dumps(each))
    reader.follow(given.one("scaling.md", "dpdist scaling --collect"))
    assert "dp / sgd" in (reader.root / "scaling/fashion_mnist/scaling.md").read_text()
