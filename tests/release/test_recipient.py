"""What somebody does who was given an export and nothing else: load it, look at it, predict with it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import userland
from jobs import STEPS, Jobs, Run
from safetensors.numpy import load_file, save_file

from dpdist import load
from dpdist.errors import InputError

VIT = {"image_size": 8, "width": 8, "depth": 1, "heads": 1, "mlp": 8, "patch": 4}
#: A run that anybody can load: data, model and loss are built in.
BUILT_IN = (
    "data.source=digits",
    "model.name=vit",
    "model.classes=null",
    "training.steps=4",
    "privacy.insecure_seed=null",
)


@pytest.fixture(scope="module")
def vit(jobs: Jobs) -> tuple[Run, Path]:
    """A run from pretrained weights, and its export, made and to be used without them."""
    weights = jobs.root / "weights.safetensors"
    jobs.call("save_vit", options=VIT, to=str(weights))
    run, given = jobs.new("vit"), jobs.root / "vit-given"
    options = json.dumps(VIT | {"pretrained": str(weights), "scale": 16.0, "offset": 8.0})
    ended = jobs.train(run, *BUILT_IN, f"model.options={options}").wait()
    assert ended.code == 0, ended.err
    weights.unlink()
    ended = jobs.command("export", str(run.root), "--to", str(given)).wait()
    assert ended.code == 0, ended.err
    return run, given


@pytest.fixture(scope="module")
def own(jobs: Jobs) -> Path:
    """An export of a model that is code of the user's own."""
    run, given = jobs.new("own"), jobs.root / "own-given"
    assert jobs.train(run, "privacy.insecure_seed=null").wait().code == 0
    ended = jobs.command("export", str(run.root), "--to", str(given)).wait()
    assert ended.code == 0, ended.err
    return given


def predict(jobs: Jobs, *argv: object) -> tuple[int, str, str]:
    ended = jobs.command("predict", *map(str, argv)).wait()
    return ended.code, ended.out, ended.err


def columns(jobs: Jobs, **arrays: np.ndarray) -> Path:
    path = jobs.root / f"columns-{len(list(jobs.root.iterdir()))}.npz"
    np.savez(path, **arrays)
    return path


def test_an_export_gives_the_object_that_its_run_gives(jobs: Jobs, vit: tuple[Run, Path], tmp_path: Path) -> None:
    run, given = vit
    told = jobs.call("load", runs={"run": str(run.root), "export": str(given)}, to=str(tmp_path))
    assert told["run"].pop("privacy").items() <= told["export"].pop("privacy").items()
    assert told["export"] == told["run"]
    assert told["run"]["step"] == 4
    before, after = np.load(tmp_path / "run.npz"), np.load(tmp_path / "export.npz")
    assert sorted(after) == sorted(before)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


def test_the_model_file_says_what_it_takes_and_gives(vit: tuple[Run, Path]) -> None:
    record = json.loads((vit[1] / "model.json").read_text())
    assert record["example"] == {"image": [[8, 8, 1], "uint8"], "label": [[], "int32"]}
    assert (record["classes"], record["columns_read"], record["outputs"]) == (10, ["image"], [[10], "float32"])


def test_predictions_are_those_of_the_run_in_every_format_and_batch(
    jobs: Jobs, vit: tuple[Run, Path], tmp_path: Path
) -> None:
    for batch, name in ((7, "a.npy"), (1000, "b.npy"), (64, "c.csv"), (256, "d.jsonl")):
        code, out, err = predict(jobs, vit[1], "digits", "--part=test", "--to", tmp_path / name, "--batch-size", batch)
        assert code == 0, err
        assert json.loads(out)["examples"] == 360
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert a.shape == (360, 10)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [int(row["prediction"]) for row in rows] == a.argmax(-1).tolist()
    assert [int(row["index"]) for row in rows] == list(range(360))
    probabilities = np.exp(a) / np.exp(a).sum(-1, keepdims=True)
    np.testing.assert_allclose([float(row["probability"]) for row in rows], probabilities.max(-1), rtol=1e-4)
    said = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([row["outputs"] for row in said], a, rtol=1e-4, atol=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_columns_may_come_from_a_file_or_a_folder_without_labels(
    jobs: Jobs, vit: tuple[Run, Path], tmp_path: Path
) -> None:
    image = np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1)).astype(np.uint8)
    np.save(tmp_path / "image.npy", image)
    np.savez(tmp_path / "parts.npz", train_image=image[:2], test_image=image[2:])
    config = tmp_path / "data.yaml"
    config.write_text(f"data: {{source: npy, path: {tmp_path / 'parts.npz'}}}")
    specs = (columns(jobs, image=image), tmp_path / "image.npy", tmp_path, tmp_path / "parts.npz")
    outputs = [predict(jobs, vit[1], spec) for spec in (*specs, config, f"npy:{tmp_path / 'parts.npz'}")]
    assert [code for code, *_ in outputs] == [0] * 6, outputs
    assert {out for _, out, _ in outputs} == {outputs[0][1]}
    assert len(outputs[0][1].splitlines()) == 5


GOOD = np.zeros((3, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"picture": GOOD}, "column 'image' = 'picture': is missing; the model needs it as uint8[n,8,8,1]"),
        ({"images": GOOD}, "did you mean images?"),
        ({"image": GOOD[0]}, "is one example; give an axis of examples: values[None]"),
        ({"image": GOOD[:, :7]}, "'uint8[3,7,8,1]': the model was trained on uint8[n,8,8,1]"),
        ({"image": GOOD.astype(np.float32) / 16}, "neither scaled nor rounded"),
        ({"image": GOOD.astype(np.int64)}, "'int32[3,8,8,1]': the model was trained on uint8[n,8,8,1]"),
        ({"image": GOOD, "label": np.zeros(2, np.int32)}, "the columns differ in length"),
    ],
)
def test_columns_that_do_not_fit_are_named(
    jobs: Jobs, vit: tuple[Run, Path], arrays: dict[str, np.ndarray], words: str
) -> None:
    code, out, err = predict(jobs, vit[1], columns(jobs, **arrays))
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_an_array_alone_is_no_dict_of_columns(vit: tuple[Run, Path]) -> None:
    with pytest.raises(InputError, match=r"examples = 'ndarray': give a dict of columns, {'image': \.\.\.}\."):
        load(vit[1]).predict(GOOD)  # type: ignore[arg-type]


def test_wrong_commands_are_refused_before_anything_is_written(
    jobs: Jobs, vit: tuple[Run, Path], tmp_path: Path
) -> None:
    there = tmp_path / "there.csv"
    there.touch()
    for argv, words in (
        (("nowhere", "digits"), "holds no run (no config.yaml) and no export"),
        ((vit[1], "nothing"), "there is no such file"),
        ((vit[1], "digts:x"), "digts"),
        ((vit[1], tmp_path), "give a .npz of columns"),
        ((vit[1], "digits", "--to", tmp_path / "p.xls"), ".csv, .jsonl, .npy"),
        ((vit[1], "digits", "--to", there), "is there already"),
        ((vit[1], "digits", "--to", tmp_path / "no/p.csv"), "its folder is not there"),
        ((vit[1], "digits", "--batch-size=0"), "give at least 1"),
        ((vit[1], "digits", "--part=tset"), "did you mean test?"),
    ):
        code, out, err = predict(jobs, *argv)
        assert code == 2, argv
        assert words in err, (argv, err)
        assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"]


def other_parameter(given: Path) -> None:
    arrays = load_file(given / "params.safetensors")
    arrays["head/bias"] = arrays["head/bias"] + 1
    save_file(arrays, given / "params.safetensors")


def other_shape(given: Path) -> None:
    arrays = load_file(given / "params.safetensors")
    arrays["head/bias"] = arrays["head/bias"][:4]
    save_file(arrays, given / "params.safetensors")


def edited(name: str, before: str, after: str) -> Callable[[Path], None]:
    def edit(given: Path) -> None:
        text = (given / name).read_text()
        assert before in text
        (given / name).write_text(text.replace(before, after))

    return edit


def cut(name: str) -> Callable[[Path], None]:
    return lambda given: (given / name).write_bytes((given / name).read_bytes()[:40]) and None


def without(name: str) -> Callable[[Path], None]:
    return lambda given: (given / name).unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (other_parameter, "does not hold the parameters that privacy.json speaks of"),
        (other_shape, "head/bias has shape (4,)"),
        (edited("config.yaml", "width: 8", "width: 16"), "do not belong together"),
        (
            edited("config.yaml", "depth: 1", "depth: 2"),
            "is missing, but the model that config.yaml and model.json describe",
        ),
        (edited("config.yaml", "width: 8", "wdth: 8"), "wdth"),
        (edited("config.yaml", "source: digits", "sorce: digits"), "no such key; did you mean data.source?"),
        (edited("model.json", '"format": 1', '"format": 9'), "use the version of dpdist that exported it"),
        (edited("model.json", '"example"', '"exampel"'), "is damaged; get the export again"),
        (cut("params.safetensors"), "is no whole safetensors file"),
        (cut("privacy.json"), "is damaged; get the export again"),
        (without("params.safetensors"), "has no params.safetensors"),
        (without("model.json"), "has no model.json"),
        (without("config.yaml"), "has no config.yaml"),
        (without("privacy.json"), "has no privacy.json"),
    ],
)
def test_a_damaged_or_changed_export_is_refused_by_name(
    jobs: Jobs, vit: tuple[Run, Path], tmp_path: Path, harm: Callable[[Path], Any], words: str
) -> None:
    given = tmp_path / "given"
    shutil.copytree(vit[1], given)
    harm(given)
    code, _, err = predict(jobs, given, "digits")
    assert code == 2
    assert words in err
    assert str(given) in err or "model.options" in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_code_needs_that_code(jobs: Jobs, own: Path, tmp_path: Path) -> None:
    image = userland.test_columns()["image"]
    code, _, err = predict(jobs, own, columns(jobs, image=image))
    assert code == 2
    assert "model.name = 'userland:small': is code of whoever made this export" in err
    code, out, err = predict(jobs, own, columns(jobs, image=image), "--allow-code")
    assert code == 0, err
    assert len(out.splitlines()) == len(image)
    given = tmp_path / "given"
    shutil.copytree(own, given)
    edited("config.yaml", "name: userland:small", "name: notthere:small")(given)
    code, _, err = predict(jobs, given, columns(jobs, image=image), "--allow-code")
    assert code == 2
    assert "is code that no export holds; get the module notthere" in err
    assert json.loads((own / "privacy.json").read_text())["released_after_step"] == STEPS
