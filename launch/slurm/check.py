"""What can be known of a job before it is in the queue: whether its code, files, devices and directory are there."""

from __future__ import annotations

import os
from pathlib import Path

from dpdist.config import Config
from dpdist.config.user_code import require_function
from dpdist.errors import InputError
from dpdist.run.directory import RunDirectory
from dpdist_launch.slurm import script
from dpdist_launch.slurm.request import Request

#: Names that need no function of the user's, by the setting that takes one.
BUILT_IN = {
    "data.source": (
        "digits",
        "idx",
        "npy",
        "cifar10",
        "cifar100",
        "image_folder",
        "parquet",
        "arrow",
        "hf",
        "webdataset",
        "csv",
        "text",
    ),
    "model.name": ("mlp", "cnn", "vit", "bit_resnet", "bert", "gpt2", "llama"),
    "model.loss": ("cross_entropy",),
    "model.task": ("classification", "binary", "regression", "multilabel", "language_modeling", "none"),
    "training.augment": ("flip", "crop", "flip_and_crop"),
}


def require_runnable(config: Config, request: Request, *, paths_on_nodes: bool) -> None:
    """Check what the job would otherwise find wrong after its wait in the queue.

    Args:
        paths_on_nodes: data and weights are on the compute nodes alone, and not looked for.

    Raises:
        InputError: a function, a file or a kind of device is not there, or the run directory is not ours.
    """
    environ = script.submission_environment(script.site_file(request.site))
    _require_devices(config, gpus=request.asks_for_gpus(environ))
    if not environ.get("DPDIST_CONTAINER"):  # it has its own modules, and perhaps other paths
        _require_code(config)
        if not paths_on_nodes:
            _require_paths(config)
    if any("\udc80" <= letter <= "\udcff" for letter in config.run.dir):  # as Python holds what it could not decode
        remedy = (
            "is no UTF-8, which checkpoints need; name another directory, or, in a locale such as C, set LANG=C.UTF-8."
        )
        raise InputError("run.dir", config.run.dir, remedy)
    RunDirectory(Path(config.run.dir)).require_ours()


def _require_devices(config: Config, *, gpus: bool) -> None:
    platform = config.cluster.platform
    if platform == "cpu" and gpus:
        remedy = "the job asks for GPUs; leave --gpus-per-node out (--tasks-per-node N starts N processes a node)."
        raise InputError("cluster.platform", platform, remedy)
    if platform == "gpu" and not gpus:
        raise InputError("cluster.platform", platform, "the job asks for no GPU; give --gpus-per-node.")


def _require_code(config: Config) -> None:
    model = config.model
    named = {"data.source": config.data.source, "model.name": model.name}
    named |= {"model.loss": model.loss} if model.loss is not None else {}
    named |= {"model.task": model.task} if model.task is not None else {}
    named |= {"training.augment": config.training.augment} if config.training.augment is not None else {}
    optimizer = {"optimizer.name": config.optimizer.name, "optimizer.schedule": config.optimizer.schedule}
    named |= {field: path for field, path in optimizer.items() if ":" in path}
    named |= {f"model.metrics.{name}": path for name, path in model.metrics.items()}
    for field, name in named.items():
        if name not in (builtin := BUILT_IN.get(field, ())):
            require_function(name, field, builtin)


def _require_paths(config: Config) -> None:
    paths: dict[str, object] = {"model.options.pretrained": config.model.options.get("pretrained")}
    if config.data.source == "text":
        paths["data.options.tokenizer"] = config.data.options.get("tokenizer")
    if config.data.source in BUILT_IN["data.source"] and config.data.source != "digits":
        paths["data.path"] = config.data.path
        if config.data.path is None:
            raise InputError("data.path", None, f"the source {config.data.source} needs the path of its files.")
    if config.model.name not in BUILT_IN["model.name"]:
        del paths["model.options.pretrained"]  # an option of the user's own
    for field, path in paths.items():
        if isinstance(path, str | os.PathLike) and not Path(path).expanduser().exists():
            remedy = "no such file or directory; if it is on the compute nodes alone, give --paths-on-nodes."
            raise InputError(field, str(path), remedy)
