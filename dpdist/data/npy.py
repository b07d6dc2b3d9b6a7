"""Read columns from NumPy files: a directory of memory-mapped `.npy` files, or one `.npz`.

`train_image.npy` is the column `image` of the train set and `test_image.npy` that of the test set; a `.npz` has the
same names as keys. Other files and keys are ignored. Pickled arrays are rejected, because loading a pickle can run
code.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dpdist.data.sources import BadRecordError
from dpdist.errors import InputError


def read_npy(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the train and the test columns at `path`, by name; the latter may be empty.

    Raises:
        InputError: `path` does not exist or has no train columns, or a file is damaged or holds Python objects.
    """
    if path.is_dir():
        # Sorted, because the order of a directory listing differs between machines.
        files = {file.stem: file for file in sorted(path.glob("*.npy"))}
        arrays = {name: _map(file) for name, file in files.items() if name.startswith(("train_", "test_"))}
        found = [file.name for file in files.values()]
    elif path.is_file():
        arrays = _read_npz(path)
        found = list(arrays)
    else:
        raise InputError(
            "data.path",
            str(path),
            "no such file or directory; name a directory of train_<column>.npy and test_<column>.npy files, or a .npz.",
        )
    train, test = (
        {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        for prefix in ("train_", "test_")
    )
    if not train:
        raise InputError(
            "data.path",
            str(path),
            "has no train columns; looked for the names train_<column>, "
            f"such as train_image, and found {f'{len(found)} of other names' if found else 'nothing'}.",
        ) from BadRecordError(f"found {', '.join(found)}")
    return train, test


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a directory of `.npy` files, of one such file, or of a `.npz`, under their own names.

    Raises:
        InputError: `path` does not exist, or a file is damaged or holds Python objects.
    """
    if path.is_dir():
        return {file.stem: _map(file) for file in sorted(path.glob("*.npy"))}
    if not path.is_file():
        raise InputError("data.path", str(path), "no such file or directory.")
    return {path.stem: _map(path)} if path.suffix == ".npy" else _read_npz(path)


def _map(file: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except (ValueError, OSError) as error:
        raise InputError("data.path", str(file), _remedy(error)) from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise InputError("data.path", str(path), "is neither a directory nor a complete .npz file.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError("data.path", str(path), _remedy(error)) from error


def _remedy(error: Exception) -> str:
    # In our own words: what NumPy says may quote the file's first bytes.
    reason = error.strerror if isinstance(error, OSError) else "damaged"
    if isinstance(error, ValueError):
        reason = "not whole, or Python objects"
    return f"cannot be read ({reason}); save complete arrays of numbers or bools with np.save or np.savez."
