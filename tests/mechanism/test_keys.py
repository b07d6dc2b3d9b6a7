"""Keys: distinct for every purpose, step and block, and the same wherever derived; the secret stays hidden."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dpdist.mechanism.keys import NONCE_BYTES, SECRET_BYTES, Keys, Secret, fresh_nonce

KEY = bytes(range(100, 132))
NONCE = bytes(range(32))

PINNED_SAMPLING = [14367974757019557451, 2784659444243886795]
PINNED_NOISE = [[3250386388, 712929397], [2313836453, 1095175068], [3012448259, 2522313145]]
PINNED_ORDER = [236656590517664643, 11952823569030090637]
PINNED_LOSS = [1256475856, 2406330747]
PINNED_TAG = "2ce7046546ae788a11e8af6abe2ba90052a150ca600033d7b6b50d8f6cc5fa07"
PINNED_SEED_0 = "376c40152a31b32728a0d78e160701f166a3f5ae3bcec2faa431f5a44cafefd3"


def keys(key: bytes = KEY, nonce: bytes = NONCE) -> Keys:
    return Keys(Secret(key), nonce)


def streams(k: Keys, step: int) -> dict[str, bytes]:
    """Return all 64-bit halves of the keys that a step derives for three blocks, by name."""
    sampling, order, noise = k.sampling(step), k.order(step), k.noise(step, 3)
    named = {f"sampling {i}": sampling[i].tobytes() for i in range(2)} | {"loss": k.loss(step).tobytes()}
    named |= {f"order {i}": order[i].tobytes() for i in range(2)}
    return named | {f"noise {block} {z}": noise[block, z].tobytes() for block in range(3) for z in range(3)}


def test_no_two_purposes_steps_blocks_or_nonces_share_a_key() -> None:
    other_secret, other_nonce = keys(key=bytes(32)), keys(nonce=bytes(32))
    seen = [
        value
        for k in (keys(), other_secret, other_nonce)
        for step in (0, 1, 2, 256, 2**32, 2**40)
        for value in streams(k, step).values()
    ]
    assert len(set(seen)) == len(seen) == 3 * 6 * 14


def test_every_field_of_a_derivation_matters() -> None:
    secret = Secret(KEY)
    variants: list[dict[str, Any]] = [
        {"purpose": "a"},
        {"purpose": "b"},
        {"purpose": "a", "nonce": b"n"},
        {"purpose": "an"},
        {"purpose": "a", "step": 1},
        {"purpose": "a", "block": 1},
        {"purpose": "a", "step": 1 << 32},
        {"purpose": "a", "nonce": b"\0"},
        {"purpose": "a\0"},
        {"purpose": "a", "size": 17},
    ]
    derived = [secret.derive(**variant)[:16] for variant in variants]
    assert len(set(derived)) == len(variants)


def test_derivation_is_deterministic() -> None:
    assert streams(keys(), 5) == streams(keys(), 5)
    assert np.array_equal(keys().noise(5, 3), keys().noise(5, 4)[:3])  # a block's key depends only on its position


def test_derivation_gives_the_pinned_bits() -> None:
    """An accidental change would silently give every resumed run different samples and noise."""
    assert keys().sampling(7).tolist() == PINNED_SAMPLING
    assert keys().noise(7, 2)[1].tolist() == PINNED_NOISE
    assert keys().order(7).tolist() == PINNED_ORDER
    assert keys().loss(7).tolist() == PINNED_LOSS
    assert Secret(KEY).tag(b"message") == PINNED_TAG
    assert Secret.from_insecure_seed(0).reveal().hex() == PINNED_SEED_0


def test_key_shapes_and_types_are_what_the_generators_take() -> None:
    assert (keys().sampling(0).dtype, keys().sampling(0).shape) == (np.uint64, (2,))
    assert (keys().noise(0, 5).dtype, keys().noise(0, 5).shape) == (np.uint32, (5, 3, 2))
    assert (keys().loss(0).dtype, keys().loss(0).shape) == (np.uint32, (2,))


def traces(secret: Secret) -> str:
    """Return the traceback, with local variables, of a failing derivation."""
    text = ""
    for broken in ({"step": -1}, {"block": 1 << 40}, {"size": 65}, {"nonce": "text"}):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            Keys(secret, NONCE).secret.derive("noise", **broken)  # type: ignore[arg-type]
        text += "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    with pytest.raises(OverflowError) as overflow:
        Keys(secret, NONCE).noise(-1, 3)
    return text + "".join(traceback.TracebackException.from_exception(overflow.value, capture_locals=True).format())


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        format,
        "{!r}".format,
        "%s".__mod__,
        "{0}".format,
        lambda s: repr([s, {"secret": s}]),
        lambda s: repr(Keys(s, NONCE)),
        lambda s: f"{s} {Keys(s, NONCE)}",
        traces,
        lambda s: repr(dir(s)),
        lambda s: json.dumps({"secret": s}, default=str),
    ],
)
def test_the_secret_is_not_printed(show: Callable[[Secret], str]) -> None:
    secret = Secret(KEY)
    text = show(secret)
    assert text
    for leak in (KEY.hex(), repr(KEY)[2:-1], KEY.decode("latin1"), str(list(KEY))[1:-1], KEY.hex()[:16]):
        assert leak not in text


@pytest.mark.parametrize(
    "copy_out",
    [
        pickle.dumps,
        copy.copy,
        copy.deepcopy,
        vars,
        lambda s: pickle.dumps(Keys(s, NONCE)),
        json.dumps,
        lambda s: dataclasses.asdict(Keys(s, NONCE)),
    ],
)
def test_the_secret_is_not_copied_out(copy_out: Callable[[Secret], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        copy_out(Secret(KEY))
    assert KEY.hex() not in str(caught.value)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, not {size}"):
        Secret(bytes(size))


def test_fresh_secrets_and_nonces_never_repeat() -> None:
    made = [Secret.fresh() for _ in range(4)]
    nonces = [fresh_nonce(made[0]) for _ in range(4)]
    assert len({s.reveal() for s in made}) == len(set(nonces)) == 4
    assert all(len(s.reveal()) == SECRET_BYTES and not s.insecure for s in made)
    assert all(len(nonce) == NONCE_BYTES for nonce in nonces)


def test_an_insecure_seed_says_so_and_repeats() -> None:
    a, b, c = (Secret.from_insecure_seed(seed) for seed in (1, 1, 2))
    assert a.insecure
    assert a.reveal() == b.reveal() != c.reveal()
    assert fresh_nonce(a) == fresh_nonce(b) != fresh_nonce(c)
    assert len(fresh_nonce(a)) == NONCE_BYTES


def test_tags_agree_only_for_the_same_secret_and_message() -> None:
    tags = [Secret(key).tag(message) for key, message in itertools.product((KEY, bytes(32)), (b"a", b"b"))]
    assert len(set(tags)) == 4
    assert Secret(KEY).tag(b"a") == tags[0]
