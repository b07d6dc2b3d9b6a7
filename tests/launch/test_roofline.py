"""`dpdist bench roofline`: the operations are those of the model's own loss, and the ratios follow from them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dpdist.config import Model
from dpdist.mechanism.clipping.paths import paths_of
from dpdist.models import build, example_loss
from dpdist.program.device_rates import PEAK_RATES, device_rates, faster, table_name
from dpdist.program.gradients import choose_strategies
from dpdist_launch.cli import main
from dpdist_launch.measure.bench import roofline, workload
from dpdist_launch.measure.bench.roofline import ASSUMED, Setting
from dpdist_launch.measure.bench.tasks import TASKS
from dpdist_launch.measure.bench.workload import Workload, workload_of

VIT = replace(
    TASKS["vit-b"],
    model=Model(name="vit", options={"image_size": 32, "patch": 8, "width": 24, "depth": 2, "heads": 3, "mlp": 48}),
)
A100 = Setting(device="A100", peak=PEAK_RATES["A100"], format="bf16", efficiency=ASSUMED)


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def vit(*trained: str) -> Workload:
    """All of it trains, or the parameters whose paths begin so."""
    model = build(VIT.model, example=VIT.shapes(), classes=VIT.classes)
    params = jax.eval_shape(model.init, jax.random.key(0))
    frozen = {path for path in paths_of(params) if trained and not path.startswith(trained)}
    return workload_of(example_loss(model), params, VIT.shapes(), frozen=frozen)


def test_operations_are_counted_in_calls_scans_and_convolutions() -> None:
    params = {"w": shape(3, 5, 5), "kernel": shape(3, 3, 2, 4), "b": shape(5)}
    example = {"x": shape(7, 5), "image": shape(1, 8, 8, 2)}

    def loss(params: Any, example: Any) -> Any:
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w + params["b"]), None), example["x"], params["w"])
        mixed = jax.jit(lambda x: x @ x.T)(x)
        y = jax.lax.conv_general_dilated(
            example["image"], params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        # A product of parameters alone is the same for all examples: it costs a batch nothing.
        return jnp.sum(mixed) + jnp.sum(y) + jnp.sum(params["w"][0] @ params["w"][1])

    work = workload_of(loss, params, example)
    assert work.parameter_flops == 3 * 2 * 7 * 5 * 5 + 2 * 4 * 4 * 4 * (3 * 3 * 2)
    assert work.data_flops == 2 * 7 * 7 * 5
    assert work.moved == 4 * (3 * 2 * 7 * 5 + 2 * 7 * 5 + 7 * 7 + 8 * 8 * 2 + 4 * 4 * 4)


def test_the_uses_are_those_of_the_models_own_loss() -> None:
    work, layers, t = vit(), 2, 17  # of an image that is resized, which costs no gradient
    products = layers * t * (4 * 24 * 24 + 2 * 24 * 48) + 16 * (8 * 8 * 3) * 24 + 24 * 100
    assert work.parameter_flops == 2 * products
    assert work.data_flops == layers * 2 * (2 * t * t * 24)
    assert sorted(work.sharing.values()) == [1] * (3 * layers + 2) + [3] * layers  # query, key and value share one
    uses = {leaf.path: [(u.length, u.m, u.n) for group in leaf.groups for u in group] for leaf in work.leaves}
    assert uses["layers/1/mlp/grow/kernel"] == [(t, 24, 48)]
    assert uses["embed/kernel"] == [(16, 192, 24)]
    assert uses["layers/0/norm1/scale"] == []


def test_what_does_not_train_has_no_gradient_to_compute_or_to_keep() -> None:
    whole, head, last, t = vit(), vit("head"), vit("layers/1/mlp/grow"), 17
    assert whole.parameter_flops == whole.back_flops == whole.weight_flops
    assert (whole.data_back_flops, whole.moved_back) == (whole.data_flops, whole.moved)
    # The forward pass is the same; before the first parameter that trains, nothing is passed back.
    assert head.parameter_flops == last.parameter_flops == whole.parameter_flops
    assert head.back_flops == head.weight_flops == 2 * 24 * 100
    assert head.data_back_flops == last.data_back_flops == 0
    assert last.weight_flops == 2 * t * 24 * 48
    assert last.back_flops == 2 * last.weight_flops + head.weight_flops  # it, and the two products behind it
    assert {leaf.path for leaf in head.leaves} == {"head/kernel", "head/bias"}
    assert 0 < head.moved_back < last.moved_back < whole.moved_back
    assert head.largest == whole.largest < whole.moved
    seconds = [roofline.predict(work, A100)["tensor"]["seconds"] for work in (head, last, whole)]
    assert sorted(seconds) == seconds
    assert seconds[0] < seconds[2] / 2


def test_highest_takes_the_strategies_that_training_takes_on_that_device() -> None:
    model = build(VIT.model, example=VIT.shapes(), classes=VIT.classes)
    params = jax.eval_shape(model.init, jax.random.key(0))
    for device in ("A100", "L40S"):
        prefer = faster(device_rates(f"NVIDIA {device}", "gpu"))
        chosen = choose_strategies(example_loss(model), params, VIT.shapes(), prefer=prefer)
        at = Setting(device=device, peak=PEAK_RATES[device], format="tf32", efficiency=ASSUMED)
        found = {leaf.path: cost.how for leaf, cost in roofline.highest(vit(), at)}
        assert found == {leaf.path: leaf.strategy for leaf in chosen if not leaf.reason}


def one_product(t: int, m: int, n: int, uses: int = 1) -> Workload:
    params = [shape(m, n, dtype=jnp.bfloat16) for _ in range(uses)]
    return workload_of(lambda p, x: sum(jnp.sum(jnp.tanh(x @ w)) for w in p), params, shape(t, m, dtype=jnp.bfloat16))


def test_one_layer_costs_what_a_calculation_by_hand_gives() -> None:
    t, m, n = 256, 512, 1024
    ((_, cost),) = roofline.tensor(one_product(t, m, n), A100)
    rate, bandwidth = 312e12, 0.80 * 1.56e12
    square = t * t * 10 / 16
    norms = 2 * square * (m + n) / (0.5 * rate) + 10 * square / (19.5e12 / 2)
    norms += (2 * t * (m + n) + 2 * 8 * square) / bandwidth
    assert cost.how == "ghost"
    assert cost.norms == pytest.approx(norms)
    assert cost.sums == pytest.approx(2 * t * m * n / (0.65 * rate) + 4 * t * m / bandwidth)  # m is the smaller


def test_uses_that_share_an_operand_compute_its_inner_products_once() -> None:
    alone = sum(cost.total for _, cost in roofline.tensor(one_product(256, 512, 512), A100))
    three = sum(cost.total for _, cost in roofline.tensor(one_product(256, 512, 512, uses=3), A100))
    assert 2.0 < three / alone < 2.7


def test_a_long_sequence_is_instantiated_and_a_kernel_never_costs_more() -> None:
    long, short = one_product(16384, 64, 64), one_product(64, 2048, 2048)
    assert [cost.how for _, cost in roofline.tensor(long, A100)] == ["instantiate"]
    assert [cost.how for _, cost in roofline.tensor(short, A100)] == ["ghost"]
    for work in (long, short, vit()):
        plain = roofline.predict(work, A100)
        assert plain["fused"]["ratio"] <= plain["tensor"]["ratio"]


def test_both_uses_of_a_tied_table_count() -> None:
    work = workload.named("gpt2-tiny", "float32")
    tied = next(leaf for leaf in work.leaves if leaf.path == "words")
    assert sorted(use.one_hot for group in tied.groups for use in group) == [False, True]
    flops, t = roofline._gram_flops(tied.groups[0], share={}, pad=1)
    assert t == 64
    assert flops > 2 * 32 * 32 * 1000  # the inner products of gradients at the logits are the largest part


@pytest.mark.parametrize("form", ["bf16", "tf32"])
@pytest.mark.parametrize("device", roofline.TARGET_DEVICES)
def test_the_design_meets_the_projects_targets(device: str, form: str) -> None:
    """By the assumed efficiencies; docs/roofline.md says what those reached on an H100 give."""
    at = Setting(device=device, peak=PEAK_RATES[device], format=form, efficiency=ASSUMED)
    for model in ("vit-b", "gpt2-small"):
        ratio = roofline.predict(workload.named(model, roofline.FORMATS[form]), at)["tensor"]["ratio"]
        assert ratio <= roofline.TARGETS[model, form], (model, ratio)


def test_the_command_prints_a_table_or_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "roofline", "--device", "V100,A100", "--models", "mnist-cnn,bert-mini"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + (1 + 2) + (1 + 3)  # mnist-cnn has no bfloat16, and V100s have float32 alone
    assert lines[2].startswith("| mnist-cnn | V100 | float32 |")
    assert main(["bench", "roofline", "--device", "A100", "--models", "bert-mini", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in content["rows"]] == ["bf16", "tf32", "float32"]
    assert content["rows"][0]["highest"]["ratio"] > content["rows"][0]["tensor"]["ratio"] > 1
    assert "tensor" not in content["rows"][2]


@pytest.mark.parametrize("flag", [["--device", "GTX"], ["--models", "vgg"]])
def test_an_unknown_name_is_bad_input(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "roofline", *flag]) == 2
    assert "there are" in capsys.readouterr().err


def test_the_table_of_rates_is_found_by_a_devices_name() -> None:
    assert table_name("NVIDIA A100-SXM4-40GB") == "A100"
    assert table_name("NVIDIA GeForce RTX 4090") is None
