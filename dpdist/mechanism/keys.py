"""The run's secret, and the sampling, noise and loss keys derived from it for every step.

All randomness behind the guarantee is a function of (secret, nonce, step) alone: it does not depend on the number of
processes or devices, nor on which of them samples an example or draws the noise. Keys are BLAKE2b digests keyed by
the secret (RFC 7693) over length-prefixed and fixed-width fields, so no two purposes can collide.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from jaxtyping import UInt32, UInt64

SECRET_BYTES = 32
NONCE_BYTES = 32
_PERSON = b"dpdist keys v1"


class Secret:
    """32 random bytes that can be neither printed nor pickled, only read by calling `reveal`.

    Anyone who holds them can subtract the noise, so they must reach no log, metric, checkpoint or process argument.
    """

    __slots__ = ("_key", "insecure")

    def __init__(self, key: bytes, *, insecure: bool = False) -> None:
        if len(key) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(key)}")
        self._key = key
        #: True for a secret made from a known seed; the guarantee does not hold.
        self.insecure = insecure

    @classmethod
    def fresh(cls) -> Secret:
        """Make a new secret from the operating system's random generator."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def from_insecure_seed(cls, seed: int) -> Secret:
        """Make a secret that anyone can recompute, for tests and debugging only."""
        return cls(hashlib.blake2b(b"insecure seed %d" % seed, digest_size=SECRET_BYTES).digest(), insecure=True)

    def reveal(self) -> bytes:
        """Return the bytes, for the one file that stores them."""
        return self._key

    def derive(self, purpose: str, *, nonce: bytes = b"", step: int = 0, block: int = 0, size: int = 16) -> bytes:
        """Return `size` pseudorandom bytes (at most 64) for one purpose, incarnation, step and block of coordinates."""
        label = purpose.encode()
        message = b"".join(
            (
                len(label).to_bytes(2, "little"),
                label,
                len(nonce).to_bytes(2, "little"),
                nonce,
                step.to_bytes(8, "little"),
                block.to_bytes(4, "little"),
            )
        )
        return hashlib.blake2b(message, digest_size=size, key=self._key, person=_PERSON).digest()

    def tag(self, message: bytes) -> str:
        """Return a keyed digest of `message` in hex, to compare messages or secrets without revealing either."""
        return self.derive("tag:" + hashlib.sha256(message).hexdigest(), size=32).hex()

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled: it stays in this process and in its own file")


def fresh_nonce(secret: Secret, incarnation: int = 0) -> bytes:
    """Return the nonce of a new incarnation: random, so that two copies of a run can never reuse keys.

    With an insecure secret the nonce is derived from the incarnation's number, so that tests can compare runs.
    """
    if secret.insecure:
        return secret.derive("nonce", step=incarnation, size=NONCE_BYTES)
    return secrets.token_bytes(NONCE_BYTES)


@dataclass(frozen=True, repr=False)
class Keys:
    """The keys of one incarnation: one set for every step."""

    secret: Secret
    nonce: bytes

    def sampling(self, step: int) -> UInt64[np.ndarray, " 2"]:
        """Return the Philox key that decides which examples are in step `step`."""
        return np.frombuffer(self._derive("sampling", step), dtype="<u8").astype(np.uint64)

    def order(self, step: int) -> UInt64[np.ndarray, " 2"]:
        """Return the Philox key of the order in which the examples of step `step` are grouped."""
        return np.frombuffer(self._derive("order", step), dtype="<u8").astype(np.uint64)

    def noise(self, step: int, blocks: int) -> UInt32[np.ndarray, "{blocks} 3 2"]:
        """Return the noise keys of step `step`: for each of `blocks` blocks, the keys of its three draws."""
        raw = b"".join(self._derive("noise", step, block=block, size=24) for block in range(blocks))
        return np.frombuffer(raw, dtype="<u4").astype(np.uint32).reshape(blocks, 3, 2)

    def loss(self, step: int) -> UInt32[np.ndarray, " 2"]:
        """Return the key of step `step` for randomised losses; each example folds its index into it."""
        return np.frombuffer(self._derive("loss", step, size=8), dtype="<u4").astype(np.uint32)

    def _derive(self, purpose: str, step: int, *, block: int = 0, size: int = 16) -> bytes:
        return self.secret.derive(purpose, nonce=self.nonce, step=step, block=block, size=size)
