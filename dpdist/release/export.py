"""Export of a trained run to a directory to share: parameters, config, privacy statement, and nothing private."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from safetensors.numpy import save_file

from dpdist import config as config_module
from dpdist.config import Config
from dpdist.config.constraints import expand_home
from dpdist.config.file import YamlDumper
from dpdist.errors import InputError
from dpdist.release.exported import (
    CONFIG,
    FORMAT,
    MODEL,
    PARAMS,
    PRIVACY,
    REMOVED,
    STATEMENT,
    load_export,
    removed_options,
    sha256_of,
)
from dpdist.release.foreign import without_adapters, write_foreign
from dpdist.release.signature import sign
from dpdist.release.statement import SearchedFor, as_text, of_search
from dpdist.release.trained import TrainedRun
from dpdist.release.trained_run import load_run
from dpdist.run.directory import RunDirectory
from dpdist.run.fingerprints import params_digest
from dpdist.run.summary import exposed_secret

#: Sections that say where and how the run ran, not what was trained.
_LEFT_OUT = ("run", "checkpoint", "cluster")
#: Options of the built-in sources that say what is learned from, and not where it lies.
_PUBLIC_OPTIONS = ("size", "mode", "classes", "length", "pack", "delimiter", "train", "test", "checksum")
#: A value that names a place: a path, an address, a home, or a file in a folder (`B/16` is none).
_PLACE = re.compile(r"^(~|\.{0,2}/)|://|/.*/|/[^/]*\.\w+$")
_PATH = re.compile(r"(?<![\w.])(~|\.{0,2})/[^\s'\",}\]]*")


def export(
    run_dir: str | Path,
    to: str | Path,
    *,
    without_guarantee: bool = False,
    merge_lora: bool = False,
    library: str | None = None,
    searched: SearchedFor | None = None,
    sign_with: Path | None = None,
) -> dict[str, Any]:
    """Write `params.safetensors`, `model.json`, `config.yaml`, `privacy.json` and `PRIVACY.md` into a new directory.

    What is written is loaded again before the directory gets its name, so that a recipient can load it too.

    Args:
        without_guarantee: export also where no guarantee holds; the statement then says so.
        merge_lora: merge the adapters of `model.lora` into the kernels, so that the export is of the plain model.
        library: `transformers` or `timm`: weights and config as it reads them, adapters merged, instead of the first
            two files.
        searched: the search that this run is the best trial of; the statement is then of the whole search.
        sign_with: an SSH key to sign the statement with, into `privacy.json.sig`.

    Returns:
        The statement, as in `privacy.json`, whose own SHA-256 is its `statement_sha256`.

    Raises:
        InputError: there is nothing to export, `to` holds something, no guarantee holds, what was written cannot be
            loaded again, or the key cannot sign.
    """
    run_dir = expand_home(run_dir, "run_dir")
    run, to = RunDirectory(Path(run_dir)), Path(expand_home(to, "--to"))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError("--to", str(to), "is there already; name a new or empty directory.")
    trained = load_run(run.root)
    privacy = dict(trained.privacy) if searched is None else of_search(trained.privacy, searched)
    privacy["guarantee"] = exposed_secret(run) or privacy["guarantee"]
    if not privacy["guarantee"].startswith("holds") and not without_guarantee:
        raise InputError(
            "guarantee",
            privacy["guarantee"],
            "a model without its guarantee is not exported, unless you ask for that (--without-guarantee); the "
            "statement then says so.",
        )
    for incarnation in privacy["incarnations"]:
        incarnation["reasons"] = [_shared_reason(reason) for reason in incarnation["reasons"]]
    if merge_lora or library is not None:
        trained = without_adapters(trained)
    leaves = jax.tree_util.tree_leaves_with_path(trained.params)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, order="C") for path, leaf in leaves
    }
    digest = params_digest(trained.params)
    privacy |= {"params_sha256": digest}
    to.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary directory first, so that whatever has the final name is whole.
    made = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}."))
    try:
        metadata = {"params_sha256": digest, "guarantee": privacy["guarantee"]}
        shared = shareable(trained.config)
        (made / CONFIG).write_text(yaml.dump(shared, Dumper=YamlDumper, sort_keys=False))
        if library is None:
            save_file(arrays, made / PARAMS, metadata=metadata)
            _write_model(made / MODEL, trained)
        else:
            write_foreign(made, trained, library, metadata)
        (made / STATEMENT).write_text(as_text(privacy))
        # Last, since it vouches for all others.
        privacy |= {"files": {path.name: sha256_of(path) for path in sorted(made.iterdir())}}
        (made / PRIVACY).write_text(json.dumps(privacy, indent=2) + "\n")
        if library is None and not removed_options(shared["model"]["options"]):
            load_export(made, allow_code=True)
        if sign_with is not None:
            sign(made, sign_with)
        for path in made.iterdir():
            path.chmod(0o644)
        made.chmod(0o755)
        stated = sha256_of(made / PRIVACY)
        made.replace(to)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return privacy | {"statement_sha256": stated}


def _write_model(path: Path, trained: TrainedRun) -> None:
    """Write `model.json`, a line for each of what `_of_model` says."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in _of_model(trained).items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _of_model(trained: TrainedRun) -> dict[str, Any]:
    """The content of `model.json`: what the model takes and gives."""
    outputs = trained.outputs
    return {
        "format": FORMAT,
        "model": trained.config.model.name,
        "task": trained.task,
        **trained.signature.to_record(),
        "columns_read": list(trained.columns),
        "outputs": [list(outputs.shape), outputs.dtype.name],
    }


def _shared_reason(reason: str) -> str:
    """Why an incarnation began, without paths; of the options of a source, which may be anything, no value."""
    name, colon, _ = reason.partition(": ")
    return f"{name}: {REMOVED}" if colon and name == "data.options" else _PATH.sub(REMOVED, reason)


def shareable(config: Config) -> dict[str, dict[str, Any]]:
    """The settings of the training, without those of this site: paths, processes, files."""
    tree = config_module.to_dict(config)
    shared = {section: _without_paths(values) for section, values in tree.items() if section not in _LEFT_OUT}
    ours = ":" not in config.data.source
    for name, value in config.data.options.items():
        if not ours or name not in _PUBLIC_OPTIONS:
            shared["data"]["options"][name] = REMOVED if value else value
    return shared


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: REMOVED if key in ("path", "pretrained") and inner else _without_paths(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return REMOVED if isinstance(value, str) and _PLACE.search(value) else value
