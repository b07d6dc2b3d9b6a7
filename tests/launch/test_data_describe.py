"""`dpdist data describe` shows what a run would see: counts, columns, rows, pictures, text, and what cannot be read."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from PIL import Image

from dpdist_launch.cli import main

WORDS = ("[PAD]", "good", "bad", "film")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for label, value in (("dark", 20), ("light", 230)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(np.full((5, 6, 3), value + index, np.uint8)).save(
                tmp_path / "data" / label / f"{index}.png"
            )
    return tmp_path / "data"


def test_a_folder_of_images_is_described_and_drawn(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "describe", f"image_folder:{folders}", "--to", str(tmp_path / "drawn"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["private"].startswith("PRIVATE: what follows quotes the data")
    assert (report["classes"], report["label_names"]) == (2, ["dark", "light"])
    assert (report["train"]["examples"], report["test"]["examples"]) == (16, 4)
    assert report["train"]["columns"] == {"image": "uint8[5,6,3]", "label": "int32[]"}
    assert report["train"]["labels"].keys() == {"0 dark", "1 light"}
    assert sum(report["train"]["labels"].values()) == 16
    assert report["train"]["rows"][0]["label"] == "0 dark"
    assert report["train"]["rows"][0]["image"].endswith("... of 90")
    assert report["train"]["examples_per_second"] > 0
    drawing = Path(report["train"]["drawing"])
    assert drawing == tmp_path / "drawn/train.png"
    assert stat.S_IMODE(drawing.stat().st_mode) == 0o600
    pixels = np.asarray(Image.open(drawing).convert("L"))
    assert (pixels < 40).mean() > 0.1  # the dark ones
    assert (pixels > 225).mean() > 0.1


def test_what_cannot_be_read_is_named_with_its_file(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("dark/0.png", "dark/1.png", "dark/2.png", "dark/3.png", "light/7.png")  # the first of both parts, too
    for name in wrong:
        (folders / name).write_bytes(b"no image")
    assert main(["data", "describe", f"image_folder:{folders}", "--all"]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("PRIVATE")
    assert said.count("CANNOT BE READ") == len(wrong)
    for name in wrong:
        assert f"{name}: ValueError: no image of a format that Pillow knows" in said


def test_an_error_about_a_record_says_which_to_its_owner(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in folders.rglob("*.png"):
        file.write_bytes(b"no image")
    assert main(["data", "describe", f"image_folder:{folders}"]) == 2
    assert "dark/" in capsys.readouterr().err


def test_text_is_decoded_by_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "reviews.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 3)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{source: text, path: {tmp_path / 'reviews.csv'},"
        f" options: {{tokenizer: {tmp_path / 'tokenizer.json'}, length: 4}}}}\n"
        "privacy: {enabled: false}\ntraining: {steps: 1}\nsampling: {expected_batch_size: 2}\n"
    )
    assert main(["data", "describe", str(config), "--rows", "6"]) == 0
    said = capsys.readouterr().out
    assert "input_ids: good film\n" in said
    assert "input_ids: bad film\n" in said
    assert "vocabulary  4 token ids" in said
    assert "a step of 2 expected examples takes" in said


def test_a_source_without_a_path_is_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "describe", "digits", "--rows", "0"]) == 0
    assert "train: 1,437 examples" in capsys.readouterr().out


def test_a_wrong_spec_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spec, message in (
        ("image_folder:/nowhere", "data.path = '/nowhere': no such directory"),
        ("imagefolder:/nowhere", "did you mean image_folder"),
        (str(tmp_path / "no.yaml"), "no such file"),
    ):
        assert main(["data", "describe", spec]) == 2
        assert message in capsys.readouterr().err


def test_a_column_without_values_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", train_x=np.zeros((10, 0), np.float32), train_label=np.arange(10, dtype=np.int32))
    assert main(["data", "describe", f"npy:{tmp_path / 'x.npz'}"]) == 0
    assert re.search(r"  x +float32\[0\] +no values in 8 examples\n", capsys.readouterr().out)
