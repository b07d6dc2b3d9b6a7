"""Digests that a checkpoint carries of its own content, and whether they still match.

Orbax writes no checksum over a whole checkpoint: a bit that flips in an array file is restored as another number.
So the JSON part carries a digest of the state and one of itself. They guard against accidents, not against someone
who can write the files: such a person can write the digests too.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

#: The two items of a checkpoint, and the names of the digests in its JSON part.
STATE, META = "state", "meta"
STATE_DIGEST, META_DIGEST = "state_sha256", "meta_sha256"
#: Leaves hashed at a time. SHA-256 runs outside Python's lock, at 0.4 to 2 GB/s a core.
_THREADS = 8


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes and reads a pytree of arrays, without the files that restoring onto given shardings does not need.

    Orbax would read one of them, `array_metadatas/`, all the same: 80 files on 80 processes, and one more thing that
    can be damaged without `damage` noticing.
    """
    arrays = ocp.type_handlers.ArrayHandler(array_metadata_store=None, enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def state_digest(state: Any) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of all leaves, whatever kind of container holds them.

    Unlike `fingerprints.params_digest` it is the same for a NamedTuple and for the dict that Orbax reads back without
    knowing it. Where something is empty is part of it: Orbax refuses a state that differs in that.

    Every leaf must be whole on this process: replicated, or on its own devices.

    Raises:
        ValueError: two leaves have the same path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_empty)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = dict(zip(named, pool.map(_leaf_digest, named.values()), strict=True))
    return json_digest(digests)


def sealed(meta: dict[str, Any], state: Any) -> dict[str, Any]:
    """`meta` as JSON gives it back, with the digest of `state`, and one over `meta` and that digest."""
    plain = json.loads(json.dumps(meta)) | {STATE_DIGEST: state_digest(state)}
    return plain | {META_DIGEST: json_digest(plain)}


def is_intact(meta: dict[str, Any]) -> bool:
    """Whether the JSON part is unchanged since `sealed` made it."""
    return meta.get(META_DIGEST) == json_digest({name: meta[name] for name in meta if name != META_DIGEST})


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, in words that quote nothing of it; None where it is whole.

    For process 0 alone: it waits for nobody. It reads all of the state into host memory. It does not see damage that
    leaves the restored content unchanged, such as another time of saving.
    """
    if not (path / "_CHECKPOINT_METADATA").is_file():
        return "it has no _CHECKPOINT_METADATA, which every committed checkpoint has"
    part = META
    try:
        meta = ocp.JsonCheckpointHandler().restore(path / META)
        if not is_intact(meta):
            return "its JSON part is not what was saved"
        part = STATE
        if state_digest(read_state(path / STATE)) != meta[STATE_DIGEST]:
            return "its arrays are not what was saved"
    except Exception as error:  # a damaged file makes its parser raise anything
        return f"its {part} cannot be read ({type(error).__name__})"
    return None


def read_state(path: Path) -> Any:
    """The state as NumPy arrays in plain containers, whatever devices it was saved from."""
    handler = array_handler()  # a handler has no barriers: those are the checkpointer's
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree)
    return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _is_empty(node: Any) -> bool:
    return not jax.tree.leaves(node)


def _leaf_digest(leaf: Any) -> str:
    if _is_empty(leaf):
        return "empty"
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        leaf = leaf.addressable_data(0)  # an object of its own: JAX keeps the host's copy only as long as this lives
    array = np.asarray(leaf)
    digest = hashlib.sha256(f"{array.dtype} {array.shape}\0".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
