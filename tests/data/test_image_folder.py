"""Images in class folders: parts, classes, decoding to one size, and files that are no images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpdist.config import Data
from dpdist.data import Subset, fingerprint, open_dataset, read_rows
from dpdist.data.checks import require_below
from dpdist.data.sources import BadRecordError
from dpdist.errors import InputError


def pixels(seed: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(folder: Path, name: str, image: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / name)
    return folder / name


def parts(root: Path) -> Path:
    """Classes `cat` and `dog`: 3 and 2 to train on, 1 each to test on."""
    for part, label, seeds in (
        ("train", "cat", (1, 2, 3)),
        ("train", "dog", (4, 5)),
        ("val", "cat", (6,)),
        ("val", "dog", (7,)),
    ):
        for seed in seeds:
            write(root / part / label, f"{seed}.png", pixels(seed))
    return root


def opened(path: Path, **options: object) -> Data:
    return Data(source="image_folder", path=str(path), options=options)


def test_images_come_back_as_written_with_the_number_of_their_folder(tmp_path: Path) -> None:
    dataset = open_dataset(opened(parts(tmp_path)))
    assert dataset.test is not None
    assert (dataset.classes, dataset.label_names) == (2, ("cat", "dog"))
    train, test = read_rows(dataset.train, np.arange(5)), read_rows(dataset.test, np.arange(2))
    np.testing.assert_array_equal(train["image"], np.stack([pixels(seed) for seed in (1, 2, 3, 4, 5)]))
    np.testing.assert_array_equal(test["image"], np.stack([pixels(seed) for seed in (6, 7)]))
    assert (train["label"].tolist(), test["label"].tolist()) == ([0, 0, 0, 1, 1], [0, 1])
    assert train["image"].dtype == np.uint8


def test_without_parts_the_images_are_split_by_index(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for seed in range(10):
            write(tmp_path / label / "deeper", f"{seed}.png", pixels(seed))
    dataset = open_dataset(opened(tmp_path))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.label_names) == (16, 4, ("a", "b"))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """As one of CIFAR-100 is."""
    for label in ("train", "test", "bus"):
        for seed in range(4):
            write(tmp_path / label, f"{seed}.png", pixels(seed))
    assert open_dataset(opened(tmp_path)).label_names == ("bus", "test", "train")


def test_a_folder_beside_the_parts_is_not_left_out_in_silence(tmp_path: Path) -> None:
    write(parts(tmp_path) / "extra" / "cat", "8.png", pixels(8))
    with pytest.raises(
        InputError, match=r"data\.path = .*has 1 other folders beside a train folder with classes; move them away"
    ):
        open_dataset(opened(tmp_path))
    assert len(open_dataset(opened(tmp_path, train="train", test="val")).train) == 5


def test_a_linked_class_folder_is_read_and_a_link_within_one_is_refused(tmp_path: Path) -> None:
    parts(tmp_path / "here")
    (tmp_path / "here/train/cat").rename(tmp_path / "cats")
    (tmp_path / "here/train/cat").symlink_to(tmp_path / "cats")
    assert len(open_dataset(opened(tmp_path / "here")).train) == 5
    (tmp_path / "here/train/dog/more").symlink_to(tmp_path / "cats")
    with pytest.raises(InputError, match="a link to a folder within a class folder"):
        open_dataset(opened(tmp_path / "here"))


def test_parts_of_other_names_are_named_in_the_options(tmp_path: Path) -> None:
    parts(tmp_path)
    (tmp_path / "train").rename(tmp_path / "fold1")
    (tmp_path / "val").rename(tmp_path / "fold2")
    dataset = open_dataset(opened(tmp_path, train="fold1", test="fold2"))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (5, 2)
    with pytest.raises(InputError, match=r"data\.options\.train = 'fold3': .*has 2 parts and no such one"):
        open_dataset(opened(tmp_path, train="fold3"))


def test_a_size_scales_and_cuts_the_centre_and_grayscale_has_one_channel(tmp_path: Path) -> None:
    left_half_white = np.zeros((10, 30, 3), np.uint8)
    left_half_white[:, :15] = 255
    for label in ("a", "b"):
        write(tmp_path / label, "wide.png", left_half_white)
        write(tmp_path / label, "square.png", left_half_white[:, 10:20])
    dataset = open_dataset(opened(tmp_path, size=[10, 10], mode="grayscale"))
    rows = read_rows(dataset.train, np.arange(len(dataset.train)))
    assert rows["image"].shape[1:] == (10, 10, 1)
    for image in rows["image"]:  # the middle of the wide one is the square one
        np.testing.assert_array_equal(image[..., 0], left_half_white[:, 10:20, 0])


def test_images_of_differing_size_are_refused_with_the_option_that_mends_it(tmp_path: Path) -> None:
    parts(tmp_path)
    write(tmp_path / "train" / "dog", "9.png", pixels(9, height=7))
    dataset = open_dataset(opened(tmp_path))
    with pytest.raises(
        InputError, match=r"data\.options\.size = None: the images differ in size; give the \[height"
    ) as e:
        read_rows(dataset.train, np.arange(6))
    assert str(e.value.__cause__) == "example 5, dog/9.png"
    assert read_rows(open_dataset(opened(tmp_path, size=6)).train, np.arange(6))["image"].shape == (6, 6, 6, 3)


def test_a_damaged_image_is_refused_and_the_cause_alone_says_which(tmp_path: Path) -> None:
    parts(tmp_path)
    file = tmp_path / "train/dog/4.png"
    file.write_bytes(file.read_bytes()[:60])
    dataset = open_dataset(opened(tmp_path))
    with pytest.raises(InputError, match=r"data\.source = 'an image that cannot be decoded'") as caught:
        read_rows(dataset.train, np.arange(5))
    assert isinstance(caught.value.__cause__, BadRecordError)
    assert "example 3, dog/4.png" in str(caught.value.__cause__)
    assert "4.png" not in str(caught.value)


def test_deep_images_are_refused_and_not_cut_to_8_bits(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for index in range(3):
            write(tmp_path / label, f"{index}.png", np.full((4, 4), 60000, np.uint16))
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        open_dataset(opened(tmp_path))


def test_the_fingerprint_changes_with_any_file_and_label(tmp_path: Path) -> None:
    parts(tmp_path)
    before = fingerprint(open_dataset(opened(tmp_path)).train)
    assert before == fingerprint(open_dataset(opened(tmp_path)).train)
    write(tmp_path / "train/dog", "5.png", pixels(50))
    changed = fingerprint(open_dataset(opened(tmp_path)).train)
    (tmp_path / "train/cat/3.png").rename(tmp_path / "train/dog/3.png")
    moved = fingerprint(open_dataset(opened(tmp_path)).train)
    sized = fingerprint(open_dataset(opened(tmp_path, size=6)).train)
    assert len({before, changed, moved, sized}) == 4


def test_every_stored_byte_counts_beyond_the_examples_that_are_decoded(tmp_path: Path) -> None:
    """Of 200 images, 64 are decoded; a change in any other one must show, too."""
    for index in range(200):
        write(tmp_path / "ab"[index % 2], f"{index:03}.png", pixels(index))
    whole = open_dataset(opened(tmp_path, train=None)).train
    assert isinstance(whole, Subset)
    source = whole.source
    before = fingerprint(source)
    write(tmp_path / "a", "002.png", pixels(999))  # example 1
    assert fingerprint(source) != before


def test_all_labels_are_checked_without_decoding_an_image(tmp_path: Path) -> None:
    source = open_dataset(opened(parts(tmp_path))).train
    (tmp_path / "train/cat/1.png").write_bytes(b"")
    how = {"field": "model.classes", "value": 1, "remedy": "number them from 0."}
    require_below(source, "label", 2, **how)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"model\.classes = 1"):
        require_below(source, "label", 1, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no such directory; name one that holds a folder for each class"),
        (["a/1.png"], "holds only one folder; it needs one for each of at least 2 classes"),
        (["1.png"], "holds no folder"),
        (["a/1.png", "b/notes.txt"], "holds 1 files in its class folders that are no images"),
        (
            ["train/a/1.png", "train/b/1.png", "test/c/1.png"],
            "its test folder holds 1 folders that its train folder has not",
        ),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    root = tmp_path / "data"
    for file in files:
        write((root / file).parent, Path(file).with_suffix(".png").name, pixels(0)).rename(root / file)
    with pytest.raises(InputError, match=rf"data\.path = .*{message}"):
        open_dataset(opened(root))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "big"}, r"data\.options\.size = 'big': give \[height, width\]"),
        ({"size": [3]}, r"data\.options\.size"),
        ({"size": 0}, r"data\.options\.size"),
        ({"mode": "cmyk"}, r"data\.options\.mode = 'cmyk': give one of rgb, grayscale"),
        ({"sizes": 3}, r"data\.options\.sizes = 3: did you mean size\? image_folder takes size, mode, train, test"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(opened(parts(tmp_path), **options))
