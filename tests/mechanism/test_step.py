"""The step: noise once whatever the number of devices, the public normaliser, and sums that are what they say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dpdist.mechanism.clipping import clipped_grad_sum
from dpdist.mechanism.keys import Keys, Secret
from dpdist.mechanism.noise import block_size
from dpdist.mechanism.sampling import poisson_sample
from dpdist.mechanism.step import DIAGNOSTICS, Microbatch, StepPrograms, StepSpec, accumulate_sample
from dpdist.program.update import initial_state, placed, update_of

RigOf = Callable[..., Any]
PLACED = pytest.mark.parametrize("placement", ["designated", "fused"])
DEVICES = pytest.mark.parametrize("devices", [1, 2, 8])
SAMPLE = list(range(3, 40, 2))
ALPHA = 1e-5
MOMENTUM = optax.sgd(1.0, momentum=0.9)


# Noise


@PLACED
@DEVICES
def test_noise_of_sigma_times_c_is_added_once(rig: RigOf, devices: int, placement: str) -> None:
    """The chi-square interval tells sigma C from twice, sqrt(2) times or `devices` times as much, and from none."""
    r = rig(devices, placement)
    residuals = np.stack([r.noisy_sum(SAMPLE, step) - r.gradient_sum(SAMPLE) for step in range(4)])
    for leaf in np.split(residuals, [r.directions[0].size], axis=1):
        statistic = np.sum((leaf / (r.noise_multiplier * r.clip_norm)) ** 2)
        low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], leaf.size)
        assert low < statistic < high
    assert stats.kstest(residuals.ravel() / (r.noise_multiplier * r.clip_norm), "norm").pvalue > ALPHA
    correlation = np.corrcoef(residuals)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(residuals.shape[1])  # steps do not share noise


def test_the_noise_has_the_same_bits_on_any_number_of_devices(rig: RigOf) -> None:
    draws, added = set(), set()
    for devices in (1, 2, 8):
        for placement in ("designated", "fused"):
            r = rig(devices, placement)
            state, sums = r.start()
            state, _, _, draw = r.take(state, sums, [], 5)
            draws.add(draw.tobytes())
            added.add(r.flat(state.params).tobytes())
    assert len(draws) == 1
    # With an empty sample the noisy sum is the draw itself: what the update is made of, to the last bit.
    assert added == {(np.frombuffer(*draws, np.int64) * (-r.grid / r.expected_batch_size)).astype(np.float32).tobytes()}


@PLACED
@pytest.mark.parametrize("devices", [2, 8])
def test_only_the_designated_device_holds_noise(rig: RigOf, devices: int, placement: str) -> None:
    r = rig(devices, placement)
    for step in range(2):  # the zeros of the others are used again and must stay zeros
        noise, draw = r.step.draw(r.keys, step)
        slices = {shard.device: np.asarray(shard.data) for shard in noise.addressable_shards}
        assert slices.keys() == set(r.mesh.devices.flat)
        holders = [device for device, values in slices.items() if values.any()]
        assert holders == [r.step.designated] == [r.mesh.devices.flat[0]]
        assert np.array_equal(slices[r.step.designated], np.asarray(draw))
        assert draw.devices() == {r.step.designated}
        r.step.apply(*r.start(), noise)


@pytest.mark.parametrize("assignment", ["chunks", "balanced"])
def test_the_placements_give_the_same_bits(rig: RigOf, assignment: str) -> None:
    for devices in (1, 2, 8):
        one, other = (
            rig(devices, placement).noisy_sum(SAMPLE, 1, assignment=assignment) for placement in ("designated", "fused")
        )
        assert one.tobytes() == other.tobytes()


def test_chunks_give_the_same_bits_on_any_number_of_devices(rig: RigOf) -> None:
    """Momentum and all: integer sums of the same products, and one program of a single device for the rest."""
    results = set()
    for devices in (1, 2, 3, 5, 8):
        r = rig(devices, optimizer=MOMENTUM)
        state, sums = r.start()
        for step in range(3):
            state, sums, *_ = r.take(state, sums, SAMPLE, step, assignment="chunks")
        results.add(r.flat(state.params).tobytes())
    assert len(results) == 1


def test_balanced_agrees_across_devices_to_rounding_within_products(rig: RigOf) -> None:
    a, b, c = (rig(devices).noisy_sum(SAMPLE, 1) for devices in (1, 2, 8))
    assert max(np.abs(a - b).max(), np.abs(a - c).max()) < 1e-6 * np.abs(a).max()


def test_the_draw_is_that_of_the_steps_own_keys(rig: RigOf) -> None:
    """Change the keys of one block and its noise changes, all of it and no other."""

    class OtherKeys(Keys):
        def noise(self, step: int, blocks: int) -> np.ndarray:
            asked.append((step, blocks))
            keys = super().noise(step, blocks)
            keys[1] ^= 1
            return keys

    asked: list[tuple[int, int]] = []
    r = rig(1)
    own, other = (np.asarray(r.step.draw(keys, 3)[1]) for keys in (r.keys, OtherKeys(r.keys.secret, r.keys.nonce)))
    size = block_size(r.step.parameters)
    assert asked == [(3, -(-r.step.parameters // size))]
    changed = own != other
    assert changed[size : 2 * size].mean() > 0.99
    assert not changed[:size].any()
    assert not changed[2 * size :].any()


# Sums


@pytest.mark.parametrize("sample", [[5], list(range(4)), list(range(64))])
@DEVICES
def test_the_sum_is_divided_by_b_not_by_the_realised_size(rig: RigOf, devices: int, sample: list[int]) -> None:
    r = rig(devices)
    state, sums = r.start()
    state, _, _, draw = r.take(state, sums, sample, 2)
    update = -r.flat(state.params).astype(np.float64)
    expected = (r.gradient_sum(sample) + draw * r.grid) / r.expected_batch_size
    assert np.abs(update - expected).max() < 1e-5 * np.abs(expected).max()


@DEVICES
@pytest.mark.parametrize("padding", [np.nan, 1e30, 7.0])
def test_padding_adds_exactly_nothing(rig: RigOf, devices: int, padding: float) -> None:
    r = rig(devices)
    state, _ = r.start()
    sample = list(range(5 * devices))  # five examples a device: a full microbatch, and a small one half empty

    def accumulated(fill: float) -> np.ndarray:
        return np.asarray(r.accumulate(state, r.step.zero_sums(), sample, 0, padding=fill, physical=4))

    assert np.array_equal(accumulated(padding), accumulated(0.0))
    own = accumulated(padding).reshape(devices, -1)[:, : r.step.parameters].sum(axis=0) * r.grid
    assert np.linalg.norm(own - r.gradient_sum(sample)) < 1e-5 * np.linalg.norm(own)


def test_the_sum_does_not_depend_on_the_microbatches(rig: RigOf) -> None:
    r = rig(2)
    noisy = [r.noisy_sum(SAMPLE, 1, physical=physical) for physical in (4, 2)]
    assert np.abs(noisy[0] - noisy[1]).max() < 1e-6 * np.abs(noisy[0]).max()


@DEVICES
def test_one_example_moves_the_sum_by_at_most_the_clipping_norm(rig: RigOf, devices: int) -> None:
    """Zero-out neighbours, through the whole accumulation: the example with the largest gradient left out."""
    r = rig(devices)
    state, _ = r.start()
    largest = SAMPLE[int(np.argmax(np.linalg.norm(r.data[SAMPLE], axis=1)))]
    sums = [
        np.asarray(r.accumulate(state, r.step.zero_sums(), sample, 0, padding=np.nan, physical=4))
        .reshape(devices, -1)[:, : r.step.parameters]
        .sum(axis=0)
        * r.grid
        for sample in (SAMPLE, [i for i in SAMPLE if i != largest])
    ]
    assert np.linalg.norm(r.data[largest]) > 4 * r.clip_norm
    assert 0.999 * r.clip_norm < np.linalg.norm(sums[0] - sums[1]) <= r.clip_norm * (1 + 1e-6)


@DEVICES
def test_diagnostics_count_what_they_name(rig: RigOf, devices: int) -> None:
    r = rig(devices)
    state, sums = r.start()
    state, sums, diagnostics, _ = r.take(state, sums, SAMPLE, 0)
    norms = np.linalg.norm(r.data[SAMPLE], axis=1)
    found = dict(zip(DIAGNOSTICS, diagnostics, strict=True))
    assert found["examples"] == len(SAMPLE)
    assert found["clipped"] == np.sum(norms > r.clip_norm)
    assert found["not_finite"] == 0
    assert abs(found["norm_sum"] / norms.sum() - 1) < 1e-5
    assert not np.asarray(sums).any()  # the next step starts from zero
    assert not r.take(state, sums, [], 1)[2].any()


def test_many_steps_add_up(rig: RigOf) -> None:
    """Twenty steps with Poisson samples: the parameters are minus the sum of all noisy sums over B."""
    r = rig(2)
    state, sums = r.start()
    expected = np.zeros(r.step.parameters)
    for step in range(20):
        sample = poisson_sample(r.keys.sampling(step), 0.15, 0, r.examples)
        state, sums, diagnostics, draw = r.take(state, sums, sample, step)
        assert diagnostics[0] == len(sample)
        expected -= (r.gradient_sum(sample) + draw * r.grid) / r.expected_batch_size
    assert int(state.step) == 20
    assert np.abs(r.flat(state.params) - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_plain_arm_is_an_ordinary_gradient_step(rig: RigOf) -> None:
    r = rig(2, private=False)
    state, sums = r.start()
    assert r.step.draw(r.keys, 0) == (None, None)
    state, sums, diagnostics, draw = r.take(state, sums, SAMPLE, 0)
    assert draw is None
    expected = -r.gradient_sum(SAMPLE, clipped=False) / r.expected_batch_size
    assert np.linalg.norm(r.flat(state.params) - expected) < 1e-6 * np.linalg.norm(expected)
    assert diagnostics.tolist() == [len(SAMPLE), 0, 0, 0]


# Programs

COLLECTIVE = re.compile(
    r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|send|recv)"
    r"(?:-start)?\((.*?)\)(?:,|$)",
    re.MULTILINE,
)


def operands(text: str) -> list[str]:
    """All arrays that the collectives of a program move; XLA may merge two collectives into one of two arrays."""
    return [name for inside in COLLECTIVE.findall(text) for name in inside.split(",")]


@pytest.mark.parametrize(
    ("devices", "how", "expected"),
    [
        (2, {}, 2),
        (8, {}, 2),
        (2, {"placement": "fused"}, 1),
        (8, {"placement": "fused"}, 1),
        (2, {"private": False}, 1),
    ],
)
def test_collectives_a_step_are_few_and_outside_any_loop(
    rig: RigOf, devices: int, how: dict[str, Any], expected: int
) -> None:
    r = rig(devices, **how)
    texts = {name: program.as_text() for name, program in r.step.compiled().items()}
    assert texts.keys() == {"accumulate_2", "accumulate_4", "update", "reduce"}
    for name, text in texts.items():
        assert len(operands(text)) == (expected if name == "reduce" else 0), name
    # Each is in the entry computation itself, so none is in the body of a while loop.
    entry = texts["reduce"][texts["reduce"].index("\nENTRY") :]
    assert len(operands(entry)) == expected
    width = r.step.parameters + len(DIAGNOSTICS)
    reduced = [line for line in entry.splitlines() if " all-reduce(" in line]
    sizes = [int(n) for line in reduced for n in re.findall(r"(?:f32|s64)\[(\d+)\]", line.split(" all-reduce(")[0])]
    assert sorted(sizes) == [r.step.parameters, width][2 - expected :]  # one vector each, not a tree of leaves


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of what XLA compiled while the test ran."""
    seen: list[str] = []
    active = True

    def listen(event: str, _: float, **kwargs: Any) -> None:
        if active and event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(kwargs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active = False


@PLACED
@pytest.mark.compiles
def test_nothing_is_compiled_after_the_construction(rig: RigOf, compiled: list[str], placement: str) -> None:
    jax.jit(lambda x: x * len(placement))(np.ones(3)).block_until_ready()
    assert len(compiled) == 1  # the listener hears
    r = rig(8, placement)
    state, sums = r.start()
    compiled.clear()
    sizes = set()
    for step in range(50):
        sample = [] if step in (0, 20) else poisson_sample(r.keys.sampling(step), 0.1 + 0.018 * step, 0, r.examples)
        sizes.add(len(sample))
        state, sums, _, _ = r.take(state, sums, sample, step)
    assert len(sizes) > 20
    assert {0} < sizes
    assert compiled == []


def test_noise_without_a_grid_is_refused_instead_of_left_out(rig: RigOf) -> None:
    """As an old ledger would have it, whose plan names no grid."""
    without_grid = dataclasses.replace(rig(1).step._spec, grid=None)
    with pytest.raises(ValueError, match="needs one"):
        StepPrograms(without_grid)


def test_another_shape_is_refused_instead_of_compiled(rig: RigOf) -> None:
    r = rig(1)
    state, sums = r.start()
    three = Microbatch({"x": np.zeros((3, 2), np.float32)}, np.ones(3, np.float32), np.zeros(3, np.int32))
    with pytest.raises((KeyError, TypeError, ValueError)):
        accumulate_sample(r.step, state.params, sums, [{0: three}], r.step.loss_key(r.keys, 0))


def test_buffers_are_donated(rig: RigOf) -> None:
    r = rig(2)
    state, sums = r.start()
    moved = r.accumulate(state, sums, SAMPLE, 0, padding=0.0, physical=4)
    assert sums.is_deleted()
    noise, _ = r.step.draw(r.keys, 0)
    r.step.apply(state, moved, noise)
    assert moved.is_deleted()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not noise.is_deleted()  # its zeros serve the next step


# Randomised losses


def randomised_sums(devices: int, size: int, indices: list[int], keys: Keys, at: int) -> np.ndarray:
    """Each device's gradient sum where the gradient of an example is a normal draw from its key."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:devices]), ("devices",))
    params = {"w": jnp.zeros(16)}

    def loss_fn(params: Any, example: Any) -> Any:
        return jnp.sum(params["w"] * jax.random.normal(example["key"], (16,))) + 0 * example["x"]

    spec = StepSpec(
        grad_sum=clipped_grad_sum(loss_fn, clip_norm=1e3),
        state=initial_state(params, optax.sgd(1.0), False),
        example={"x": jax.ShapeDtypeStruct((), jnp.float32)},
        update=update_of(optax.sgd(1.0), average_decay=0.0),
        mesh=mesh,
        batch_sizes=(size,),
        normaliser=1.0,
        clip_norm=1e3,
        noise_scale=None,
        grid=2.0**-30,
        placement="designated",
        randomised=True,
    )
    step = StepPrograms(spec)
    state, sums = placed(initial_state(params, optax.sgd(1.0), False), step.replicated), step.zero_sums()
    for number, begin in enumerate(range(0, len(indices), size)):
        position = number % devices
        part = np.array(indices[begin : begin + size], np.int32)
        index = np.zeros(size, np.int32)
        index[: len(part)] = part
        batch = Microbatch({"x": np.zeros(size, np.float32)}, (np.arange(size) < len(part)).astype(np.float32), index)
        batch = jax.device_put(batch, step.local[position])
        sums = accumulate_sample(step, state.params, sums, [{position: batch}], step.loss_key(keys, at))
    return np.asarray(sums).reshape(devices, -1)[:, :16].sum(axis=0) * 2.0**-30


def test_an_examples_randomness_depends_on_its_index_and_step_alone() -> None:
    keys = Keys(Secret.from_insecure_seed(7), b"loss")
    indices = [5, 0, 17, 63, 8, 30, 31]

    def expected(at: int) -> np.ndarray:
        root = jax.random.wrap_key_data(keys.loss(at), impl="threefry2x32")
        return sum(np.asarray(jax.random.normal(jax.random.fold_in(root, i), (16,)), np.float64) for i in indices)

    one = randomised_sums(1, 2, indices, keys, 4)
    four = randomised_sums(4, 1, indices[::-1], keys, 4)  # other devices, microbatches and order
    assert np.abs(one - expected(4)).max() < 1e-5
    assert np.abs(four - expected(4)).max() < 1e-5
    assert np.abs(expected(4) - expected(5)).max() > 0.1
