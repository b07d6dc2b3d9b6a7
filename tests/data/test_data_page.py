"""The configs of docs/data.md open the data that the page says, as they stand there."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from dpdist.config import from_dict
from dpdist.data import open_dataset, read_rows
from dpdist.data.datasets import BUILT_IN

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()
BLOCKS = dict(re.findall(r"```yaml\n# (\w+)\.yaml\n(.*?)```", PAGE, flags=re.DOTALL))
WORDS = ("[PAD]", "[UNK]", "</s>", "a", "b", "c", "d", "e")


def write_all(root: Path) -> None:
    """Small data under the names that the page uses."""
    images = [Image.fromarray(np.full((4, 4), index, np.uint8)) for index in range(20)]
    for index, image in enumerate(images):
        folder = root / "digits" / ("test" if index > 15 else "train") / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    features = datasets.Features(
        {
            "pixel_values": datasets.Image(),
            "labels": datasets.ClassLabel(names=["zero", "one"]),
            "id": datasets.Value("string"),
        }
    )
    columns = {"pixel_values": images, "labels": [0, 1] * 10, "id": ["x"] * 20}
    whole = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(train=whole, test=whole.select([3])).save_to_disk(root / "saved")
    (root / "shards").mkdir()
    for part in ("train", "test"):
        with tarfile.open(root / "shards" / f"digits-{part}-000000.tar", "w") as archive:
            for index, file in enumerate(sorted((root / "digits" / part).rglob("*.png"))):
                archive.add(file, f"{index}.png")
                (label := root / "label").write_text(file.parent.name)
                archive.add(label, f"{index}.cls")
    (root / "tables").mkdir()
    whole.to_parquet(root / "tables" / "train-00000-of-00001.parquet")
    lines = [f"{i},{i / 2},{('malignant', 'benign')[i % 2]}" for i in range(10)]
    (root / "cells.csv").write_text("\n".join(["mean_radius,mean_area,diagnosis", *lines]))
    lines = [f"a b c,{('negative', 'positive')[i % 2]}" for i in range(10)]
    (root / "reviews.csv").write_text("\n".join(["review,stars", *lines]))
    (root / "letters.txt").write_text("a b c d e\n" * 20)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("images", {"image": "uint8(4, 4, 1)", "label": "int32()"}),
        ("parquet", {"image": "uint8(4, 4, 1)", "label": "int32()"}),
        ("hf", {"image": "uint8(4, 4, 1)", "label": "int32()"}),
        ("shards", {"image": "uint8(4, 4, 1)", "label": "int32()"}),
        ("csv", {"features": "float32(2,)", "label": "int32()"}),
        ("text", {"attention_mask": "int32(16,)", "input_ids": "int32(16,)", "label": "int32()"}),
        ("block", {"attention_mask": "int32(16,)", "input_ids": "int32(16,)"}),
    ],
)
def test_a_config_of_the_page_opens_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_file: str, name: str, columns: dict[str, str]
) -> None:
    write_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(from_dict(yaml.safe_load(BLOCKS["rest"]) | yaml.safe_load(BLOCKS[name])))
    rows = read_rows(dataset.train, np.arange(2))
    assert {column: f"{values.dtype}{values.shape[1:]}" for column, values in sorted(rows.items())} == columns
    assert dataset.test is not None
    assert dataset.classes == (2 if "label" in columns and name != "shards" else None)


def test_the_page_names_every_source() -> None:
    assert all(f"`{source}`" in PAGE for source in BUILT_IN)
