"""Adapters on a pretrained language model in two processes, and what is given away of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import userland
from jobs import Jobs, Run
from safetensors.numpy import load_file

from dpdist import config as config_module
from dpdist import load, models
from dpdist.errors import InputError
from dpdist.release.export import export
from dpdist.release.trained_run import load_run
from dpdist.run.checkpoint import Checkpoints

GOLDEN = Path(__file__).parents[1] / "models/golden"
GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"n_inner": 48, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights")
    shutil.copyfile(GOLDEN / "gpt2.safetensors", directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(GPT2))
    return directory


@pytest.fixture(scope="module")
def tuned(jobs: Jobs, weights: Path) -> Run:
    run = jobs.new("adapters")
    settings = (
        "data.source=userland:sentences",
        "model.name=gpt2",
        "model.classes=null",
        f"model.options={{pretrained: {weights}}}",
        "model.lora={rank: 2, alpha: 8}",
        "model.frozen_dtype=bfloat16",
        "optimizer.name=adam",
        "optimizer.momentum=0",
        "optimizer.learning_rate=0.01",
        "privacy.noise_multiplier=0.5",
        "privacy.insecure_seed=null",
        "training.steps=8",
    )
    ended = jobs.launch(run, 2, 1, *settings).wait()
    assert ended.code == 0, ended.err
    shutil.rmtree(weights)  # from here on, nobody needs them
    return run


@pytest.fixture(scope="module")
def exported(jobs: Jobs, tuned: Run) -> Exported:
    def export(*options: str) -> Path:
        target = tuned.root.with_name("-".join(["adapted", *(word.strip("-") for word in options)]))
        ended = jobs.command("export", str(tuned.root), "--to", str(target), *options).wait()
        assert ended.code == 0, ended.err
        return target

    return export


#: Their data, what loads them in `transformers`, and their sizes.
OTHERS = {
    "llama": ("userland:sentences", "AutoModelForCausalLM", {"vocabulary": 12, "positions": 8}),
    "bert": ("userland:rated_sentences", "AutoModelForSequenceClassification", {"vocabulary": 12, "positions": 8}),
    "vit": ("userland:pictures", "AutoModelForImageClassification", {"patch": 32, "image_size": 96}),
}


ADAM = ("privacy.insecure_seed=null", "optimizer.name=adam", "optimizer.momentum=0", "optimizer.learning_rate=0.1")


@pytest.fixture(scope="module")
def others(jobs: Jobs) -> dict[str, Run]:
    """Every other transformer, adapted in two processes."""
    runs = {name: jobs.new(f"adapted-{name}") for name in OTHERS}
    settings = ("model.lora={rank: 2}", "training.steps=2", "sampling.expected_batch_size=16")
    settings += ADAM
    sizes = {"width": 16, "depth": 1, "heads": 2, "mlp": 16}
    for name, (source, _, more) in OTHERS.items():
        chosen = (f"data.source={source}", f"model.name={name}", f"model.options={json.dumps(sizes | more)}")
        classes = ("model.classes=null",) if name == "llama" else ()
        ended = jobs.launch(runs[name], 2, 1, *chosen, *classes, *settings).wait()
        assert ended.code == 0, ended.err
    return runs


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_of_every_other_transformer_train(others: dict[str, Run], name: str) -> None:
    trained = load_run(others[name].root)
    factors = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trained.params) if path[-1].key == "lora_b"]
    assert len(factors) == 4
    assert all(np.any(leaf) for leaf in factors)
    fresh = models.build(trained.config.model, example=trained.signature.example, classes=4).init(jax.random.key(0))
    kernels = [params["layers"][0]["mlp"]["grow"]["kernel"] for params in (trained.params, fresh)]
    assert np.array_equal(*kernels)


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_fine_tuned_transformer_is_loaded_by_transformers(
    jobs: Jobs, others: dict[str, Run], name: str
) -> None:
    target = others[name].root.with_name(f"given-{name}")
    ended = jobs.command("export", str(others[name].root), "--to", str(target), "--as", "transformers").wait()
    assert ended.code == 0, ended.err
    source, auto, _ = OTHERS[name]
    rows = getattr(userland, source.partition(":")[2])()[0].take(np.arange(3))
    rows.pop("label", None)
    trained = load(others[name].root)
    expected = trained.predict(rows)
    # Read as pretrained weights are, from nothing but the export.
    section = config_module.Model(name=name, options={"pretrained": str(target)})
    model = models.build(section, example=trained.signature.example, classes=trained.signature.classes)
    found = jax.vmap(model.apply, (None, 0))(model.init(jax.random.key(0)), rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    transformers = pytest.importorskip("transformers", reason="needs the peers extra")
    theirs, report = getattr(transformers, auto).from_pretrained(target, output_loading_info=True)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if name == "vit":
        columns = transformers.AutoImageProcessor.from_pretrained(target)(list(rows["image"]), return_tensors="pt")
    else:
        columns = {column: torch.from_numpy(values.astype(np.int64)) for column, values in rows.items()}
    with torch.no_grad():
        np.testing.assert_allclose(theirs.eval()(**columns).logits.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_fine_tuned_bit_is_loaded_by_timm(jobs: Jobs) -> None:
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    timm = pytest.importorskip("timm", reason="needs the peers extra")
    run = jobs.new("fine-tuned-bit")
    chosen = ("data.source=userland:pictures", "model.name=bit_resnet", "model.options={image_size: 96}")
    settings = ("model.trainable=[head/*]", "training.steps=2", "sampling.expected_batch_size=16")
    ended = jobs.launch(run, 2, 1, *chosen, *settings, "privacy.insecure_seed=null").wait()
    assert ended.code == 0, ended.err
    target = run.root.with_name("given-bit")
    ended = jobs.command("export", str(run.root), "--to", str(target), "--as", "timm").wait()
    assert ended.code == 0, ended.err
    images = userland.pictures()[0].take(np.arange(3))["image"]  # type: ignore[attr-defined]
    pixels = torch.from_numpy((images.astype(np.float32) - 127.5) / 127.5).permute(0, 3, 1, 2)
    theirs = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    with torch.no_grad():
        expected = theirs(pixels).numpy()
    assert np.any(theirs.head.fc.weight.detach().numpy())  # zeros before the first step
    # Sums of 2,048 features times noise: float32 rounds by the size of the largest output.
    found = load(run.root).predict({"image": images})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def convolutions(jobs: Jobs) -> Run:
    """A BiT with adapters beside the convolutions of its blocks, as `model.lora` has them without targets."""
    run = jobs.new("adapted-bit")
    sizes = {"layers": [1], "channels": [128], "image_size": 32}
    chosen = ("data.source=userland:pictures", "model.name=bit_resnet", f"model.options={json.dumps(sizes)}")
    settings = ("model.lora={rank: 2}", "training.steps=2", "sampling.expected_batch_size=16", *ADAM)
    ended = jobs.launch(run, 2, 1, *chosen, *settings).wait()
    assert ended.code == 0, ended.err
    return run


def test_adapters_beside_convolutions_train_and_are_given_away(jobs: Jobs, convolutions: Run) -> None:
    trained = load_run(convolutions.root)
    fresh = models.build(trained.config.model, example=trained.signature.example, classes=4).init(jax.random.key(0))
    block, before = trained.params["stages"][0][0], fresh["stages"][0][0]
    adapted = {name for name, layer in block.items() if "lora_b" in layer and np.any(layer["lora_b"])}
    assert adapted == {"conv1", "conv2", "conv3"}
    assert all(np.array_equal(block[name]["kernel"], before[name]["kernel"]) for name in (*adapted, "project"))
    target = convolutions.root.with_name("given-adapted-bit")
    ended = jobs.command("export", str(convolutions.root), "--to", str(target)).wait()
    assert ended.code == 0, ended.err
    images = {"image": userland.pictures()[0].take(np.arange(3))["image"]}  # type: ignore[attr-defined]
    np.testing.assert_array_equal(load(target).predict(images), trained.predict(images))


def test_what_cannot_merge_is_refused_in_a_line_before_anything_is_written(jobs: Jobs, convolutions: Run) -> None:
    target = convolutions.root.parent / "nowhere" / "merged"
    ended = jobs.command("export", str(convolutions.root), "--to", str(target), "--merge-lora").wait()
    assert ended.code == 2
    said = "model.lora.targets = 'stages/0/0/conv1/kernel': is standardised before its use"
    assert [said in line for line in ended.err.splitlines()] == [True]
    with pytest.raises(InputError, match=r"no --merge-lora, no --as.*, or train .* by model\.trainable"):
        export(convolutions.root, target, library="timm")
    assert not target.parent.exists()


def tokens() -> dict[str, np.ndarray]:
    return userland.sentences()[1].take(np.arange(5))  # type: ignore[attr-defined]


def test_adapters_alone_train_and_have_an_optimizer_state(tuned: Run) -> None:
    assert tuned.summary["status"] == "finished"
    assert list(tuned.summary["metrics"]) == ["perplexity", "token_accuracy", "loss"]
    trained, leaves = load_run(tuned.root), 0
    tensors = load_file(GOLDEN / "gpt2.safetensors")
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained.params):
        if path[-1].key == "lora_b":
            assert np.any(leaf)
        leaves += path[-1].key in ("lora_a", "lora_b")
    words = trained.params["words"]
    assert words.dtype == "bfloat16"
    assert np.array_equal(words, tensors["transformer.wte.weight"].astype(words.dtype))
    checkpoints = Checkpoints(tuned.root / "checkpoints", read_only=True)
    kept = checkpoints.read_meta(max(tuned.checkpoints))["leaves"]
    checkpoints.close()
    assert sum("/mu/" in name for name in kept) == leaves == 8


@pytest.mark.parametrize("options", [(), ("--merge-lora",)])
def test_an_export_predicts_what_the_run_does_with_its_adapters_or_with_them_merged(
    tuned: Run, exported: Exported, options: tuple[str, ...]
) -> None:
    target = exported(*options)
    names = {name.split("/")[-1] for name in load_file(target / "params.safetensors")}
    assert ("lora_a" in names) == (not options)
    expected = load(tuned.root).predict(tokens())
    np.testing.assert_allclose(load(target).predict(tokens()), expected, rtol=1e-4, atol=1e-4)


def plain(path: Path) -> tuple[models.Model, Any]:
    example = {"input_ids": jax.ShapeDtypeStruct((8,), np.int32), "attention_mask": jax.ShapeDtypeStruct((8,), bool)}
    chosen = config_module.Model(name="gpt2", options={"pretrained": str(path)})
    model = models.build(chosen, example=example, classes=None)
    return dataclasses.replace(model, apply=jax.vmap(model.apply, (None, 0))), model.init(jax.random.key(0))


def test_what_is_exported_for_transformers_predicts_the_same_and_tells_of_its_privacy(
    tuned: Run, exported: Exported
) -> None:
    target = exported("--as", "transformers")
    there = {path.name for path in target.iterdir()}
    assert there == {"model.safetensors", "config.json", "config.yaml", "privacy.json", "PRIVACY.md"}
    model, params = plain(target)  # read as pretrained weights are, sizes from config.json
    expected = load(tuned.root).predict(tokens())
    np.testing.assert_allclose(model.apply(params, tokens()), expected, rtol=1e-4, atol=1e-4)
    if transformers := pytest.importorskip("transformers", reason="needs the peers extra"):
        torch = pytest.importorskip("torch", reason="needs the peers extra")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(target)
        columns = {name: torch.from_numpy(rows.astype(np.int64)) for name, rows in tokens().items()}
        with torch.no_grad():
            found = theirs.eval()(**columns).logits.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_library_without_such_a_model_is_refused_and_nothing_is_left(jobs: Jobs, tuned: Run) -> None:
    target = tuned.root.with_name("none")
    ended = jobs.command("export", str(tuned.root), "--to", str(target), "--as", "timm").wait()
    assert ended.code == 2
    assert "it has no counterpart of gpt2, but of vit, bit_resnet" in ended.err
    assert not target.exists()
