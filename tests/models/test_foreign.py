"""A model as another library's checkpoint: reading and writing are inverse bit for bit, and the library loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import BUILT_AS, CLASSES, GOLDEN, OPTIONS, columns, golden, golden_model, logits

from dpdist import config, models
from dpdist.errors import InputError
from dpdist.models.foreign import LIBRARIES, checkpoint
from dpdist.models.pretrained import written
from dpdist.models.resnet import naming

TRANSFORMERS = ["gpt2", "llama", "gemma", "bert", "vit"]
#: The class that loads each, by its checkpoint's config.
AUTO = {"bert": "AutoModelForSequenceClassification", "vit": "AutoModelForImageClassification"}


def chosen(name: str, **options: Any) -> config.Model:
    return config.Model(name=BUILT_AS.get(name, name), options=OPTIONS[name] | options)


def saved(directory: Path, name: str, library: str, params: Any = None) -> Path:
    """Write the tiny model with its golden weights, as `library` reads it."""
    tensors, files = checkpoint(chosen(name), golden_model(name)[1] if params is None else params, library)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content))
    return directory


def loaded(name: str, path: Path) -> tuple[models.Model, Any]:
    """The model and its parameters, from nothing but a checkpoint."""
    example = {column: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype) for column, rows in columns(name).items()}
    given = config.Model(name=BUILT_AS.get(name, name), options={"pretrained": str(path)})
    model = models.build(given, example=example, classes=CLASSES)
    return model, model.init(jax.random.key(0))


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_was_read_is_written_bit_for_bit(name: str) -> None:
    tensors, _ = checkpoint(chosen(name), golden_model(name)[1], "transformers")
    assert same_bits(tensors, load_file(GOLDEN / f"{name}.safetensors"))


def test_a_bit_that_was_read_is_written_bit_for_bit() -> None:
    tensors = written(golden_model("bit_resnet")[1], naming(OPTIONS["bit_resnet"]["layers"]))
    expected = {name: array.astype(np.float32) for name, array in load_file(GOLDEN / "bit_resnet.safetensors").items()}
    assert same_bits(tensors, expected)


@pytest.mark.parametrize(("name", "library"), [*((name, "transformers") for name in TRANSFORMERS), ("vit", "timm")])
def test_what_is_written_is_read_again_from_nothing_else(name: str, library: str, tmp_path: Path) -> None:
    path = saved(tmp_path, name, library)
    model, found = loaded(name, path)
    params = golden_model(name)[1]
    assert jax.tree.structure(params) == jax.tree.structure(found)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), params, found)))
    _, data, expected = golden(name)
    np.testing.assert_allclose(logits(model, found, data), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_loads_it_and_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    transformers = pytest.importorskip("transformers", reason="needs the peers extra")
    # Other weights than those that came from there.
    params = jax.tree.map(lambda x: x * 1.1 + 0.01, golden_model(name)[1])
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    theirs, report = auto.from_pretrained(saved(tmp_path, name, "transformers", params), output_loading_info=True)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    data = columns(name)
    if name == "vit":
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        inputs = processor(list(data["image"]), return_tensors="pt")
    else:
        inputs = {column: torch.from_numpy(rows) for column, rows in data.items()}
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits.numpy()
    np.testing.assert_allclose(logits(golden_model(name)[0], params, data), expected, rtol=1e-4, atol=1e-4)


def test_timm_loads_it_and_gives_the_same_outputs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    timm = pytest.importorskip("timm", reason="needs the peers extra")
    theirs = timm.create_model(f"local-dir:{saved(tmp_path, 'vit', 'timm')}", pretrained=True).eval()
    _, data, expected = golden("vit")
    pixels = torch.from_numpy((data["image"].astype(np.float32) - 127.5) / 127.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(pixels).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_timm_loads_a_bit_and_gives_the_same_outputs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    timm = pytest.importorskip("timm", reason="needs the peers extra")
    given = config.Model(name="bit_resnet", options={"image_size": 64})
    example = {"image": jax.ShapeDtypeStruct((64, 64, 3), np.uint8)}
    model = models.build(given, example=example, classes=CLASSES)
    params = jax.tree.map(lambda x: x + 0.01, model.init(jax.random.key(0)))
    tensors, files = checkpoint(given, params, "timm")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(files["config.json"]))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    pixels = torch.from_numpy((images.astype(np.float32) - 127.5) / 127.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(pixels).numpy()
    np.testing.assert_allclose(logits(model, params, {"image": images}), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "library", "message"),
    [
        ("vit", "keras", "give one of transformers, timm"),
        ("bert", "timm", "it has no counterpart of bert, but of vit, bit_resnet"),
        ("bit_resnet", "transformers", "it has no counterpart of bit_resnet, but of gpt2, llama, bert, vit"),
        ("bit_resnet", "timm", r"it has no BiT of layers \[1, 2\] and channels \[128, 128\]"),
    ],
)
def test_what_has_no_counterpart_is_refused(name: str, library: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        checkpoint(chosen(name), golden_model(name)[1], library)
    assert caught.value.field == "--as"


def test_classes_have_their_names_and_a_language_model_its_special_tokens() -> None:
    names = [f"a class {i}" for i in range(CLASSES)]
    params = {name: golden_model(name)[1] for name in ("vit", "gpt2")}
    _, files = checkpoint(chosen("vit"), params["vit"], "transformers", class_names=names, tokens={"eos_token_id": 3})
    said = files["config.json"]
    assert said["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert said["label2id"] == {name: i for i, name in enumerate(names)}
    assert "eos_token_id" not in said
    _, files = checkpoint(chosen("vit"), params["vit"], "timm", class_names=names)
    assert files["config.json"]["label_names"] == names
    for unusable in (None, names[1:], ["same"] * CLASSES):
        for library in ("transformers", "timm"):
            said = checkpoint(chosen("vit"), params["vit"], library, class_names=unusable)[1]["config.json"]
            assert "label_names" not in said
            assert library == "timm" or said["id2label"]["0"] == "LABEL_0"
    known = {"bos_token_id": 1, "eos_token_id": [2, 3]}
    said = checkpoint(chosen("gpt2"), params["gpt2"], "transformers", tokens=known)[1]["config.json"]
    assert {key: said[key] for key in known} == known
    # The library's own default is a token that this vocabulary has not.
    said = checkpoint(chosen("gpt2"), params["gpt2"], "transformers")[1]["config.json"]
    assert (said["bos_token_id"], said["eos_token_id"]) == (None, None)


def test_every_model_of_a_family_can_be_written() -> None:
    assert {name for names in LIBRARIES.values() for name in names} == {"gpt2", "llama", "bert", "vit", "bit_resnet"}
