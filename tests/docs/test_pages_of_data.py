"""What the pages on data, tasks and models show is run as it stands there, on the data that they speak of."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
from pages import Given, Shown, require_printed
from PIL import Image
from reader import Reader
from sklearn.datasets import load_digits
from tokenizers import models, pre_tokenizers

pytestmark = pytest.mark.wait

Write = Callable[[str, str], None]
#: What takes time and changes nothing that is looked at.
QUIET = ("run.plots=false", "cluster.preflight=false")
#: With the noise that `target_epsilon: 8` comes to, they cost what is shown, and nothing has to be calibrated for
#: seconds, as for `images.yaml` it is.
NOISE = {
    "parquet": 0.9200493528746245,
    "hf": 0.9200493528746245,
    "shards": 0.9200493528746245,
    "csv": 2.060213298945859,
    "text": 2.7792500302759597,
    "block": 2.2760983787756714,
}
#: Of scikit-learn's 1,797 digits, those that the page trains on.
TRAIN = 1437


def digits_as_files(root: Path) -> None:
    """`digits/PART/CLASS/NUMBER.png`, and the same as tables, as saved by `datasets`, and as tar archives."""
    digits = load_digits()
    pictures = [Image.fromarray((image * 15).astype(np.uint8)) for image in digits.images]
    parts = {"train": range(TRAIN), "test": range(TRAIN, len(pictures))}
    features = datasets.Features(
        {"pixel_values": datasets.Image(), "labels": datasets.ClassLabel(names=[str(name) for name in range(10)])}
    )
    tables = {}
    for part, numbers in parts.items():
        labels = [int(digits.target[number]) for number in numbers]
        (root / "shards").mkdir(exist_ok=True)
        with tarfile.open(root / "shards" / f"digits-{part}-000000.tar", "w") as archive:
            for number, label in zip(numbers, labels, strict=True):
                file = root / "digits" / part / str(label) / f"{number:04}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pictures[number].save(file)
                add(archive, f"{number:04}.png", file.read_bytes())
                add(archive, f"{number:04}.cls", str(label).encode())
        columns = {"pixel_values": [pictures[number] for number in numbers], "labels": labels}
        tables[part] = datasets.Dataset.from_dict(columns, features=features)
        (root / "tables").mkdir(exist_ok=True)
        tables[part].to_parquet(root / "tables" / f"{part}-00000-of-00001.parquet")
    datasets.DatasetDict(tables).save_to_disk(root / "saved")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def made_up_texts(root: Path) -> None:
    """Reviews that say what they are worth, letters, and a tokenizer of 25 words."""
    words = ["[PAD]", "[UNK]", "</s>", *"abcdefghijklmnop", "good", "bad", "film", "play", "was", "the"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "tokenizer.json"))
    rows = [f"the {('film', 'play')[i % 3 % 2]} was {('bad', 'good')[i % 2]}" for i in range(1000)]
    lines = [f"{row},{('negative', 'positive')[i % 2]}" for i, row in enumerate(rows)]
    (root / "reviews.csv").write_text("\n".join(["review,stars", *lines]))
    (root / "letters.txt").write_text("".join(f"{' '.join('abcdefghijklmnop'[i % 9 :][:8])}\n" for i in range(900)))


def test_data(reader: Reader, given: Given, write: Write) -> None:
    """Each config of the page, with what every run needs, on its data to the line that the page shows."""
    digits_as_files(reader.root)
    made_up_texts(reader.root)
    describe, unreadable = given.of("data.md", "dpdist data describe")
    reader.follow(describe)
    assert (reader.root / "shown/train.png").exists()
    picture = reader.root / "digits/train/3/0045.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) * 3 // 4])
    reader.follow(unreadable)
    picture.write_bytes(whole)
    rest = given.one("data.md", r"\[yaml\] # rest").text
    reader.python(given.one("data.md", r"\[python\] # cells").text)
    for each in given.of("data.md"):
        if each.kind == "yaml":
            name = each.text.split()[1]
            sections = set(re.findall(r"^\w+", each.text, re.M))
            write(
                name,
                each.text + "".join(line + "\n" for line in rest.splitlines() if line.split(":")[0] not in sections),
            )
        else:
            asked = ["training.steps=60", "sampling.expected_batch_size=512"] if name == "text.yaml" else []
            if (stem := Path(name).stem) in NOISE:
                asked += ["privacy.target_epsilon=null", f"privacy.noise_multiplier={NOISE[stem]}"]
            require_printed(each.text, reader.type(f"dpdist train {name}", *QUIET, *asked))


def test_tasks(reader: Reader, given: Given, write: Write) -> None:
    refused = [each for each in given.of("tasks.md", "dpdist train configs")]
    for each in refused:
        reader.follow(each, ok=False)
        assert reader.code == 2
    draw = np.random.default_rng(0)
    lines = ["age,pressure,dose,days,patient"]
    for patient in range(480):  # a fifth of whom is tested on
        for _ in range(draw.integers(1, 12)):
            age, pressure, dose = draw.uniform(0, 1, 3)
            lines.append(f"{age:.3f},{pressure:.3f},{dose:.3f},{2 * age - 3 * dose + pressure:.3f},p{patient}")
    write("visits.csv", "\n".join(lines))
    write("visits.yaml", given.one("tasks.md", r"\[yaml\]").text)
    reader.follow(given.one("tasks.md", "dpdist train visits"), *QUIET)


def test_a_bit_with_adapters_beside_its_convolutions(reader: Reader, given: Given, write: Write) -> None:
    """One process: two are in tests/trainer/test_adapters.py."""
    write("bit.yaml", given.one("models.md", r"\[yaml\]").text)
    plan, train, merge, export = given.of("models.md")
    reader.follow(plan, numbers=False)
    alone = train.text.replace(" --processes 2", ""), train.output.replace("[0] ", "")
    reader.follow(Shown(train.page, train.kind, *alone), *QUIET, numbers=False)
    reader.follow(merge, ok=False)
    assert reader.code == 2
    reader.follow(export, numbers=False)


def test_a_language_model_that_is_adapted_in_private(reader: Reader, given: Given, write: Write) -> None:
    """Two steps of each run; how many paragraphs there are depends on the version of Python."""
    for each in given.of("models.md", r"\[(yaml|python)\]"):
        write(each.text.split()[1], each.text)
    heads, prepare, *then = given.of("models.md")
    reader.python((reader.root / "prepare.py").read_text())
    assert prepare.text == "python prepare.py"
    for each in then:
        short = ("training.steps=2", *QUIET) if "train" in each.text else ()
        if "adapters" in each.text:
            short += ("privacy.target_epsilon=null", "privacy.noise_multiplier=1")
        # One process: several are in the README.
        alone = each.text.replace(" --processes 2", ""), each.output.replace("[0] ", "")
        reader.follow(Shown(each.page, each.kind, *alone), *short, numbers=False)
        if "public-gpt2" in each.text:
            reader.follow(heads, ok=False)
    assert json.loads((reader.root / "given/config.json").read_text())["model_type"] == "gpt2"
