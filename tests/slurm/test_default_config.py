"""The default of slurm/train_80gpu.sh, ViT fine-tuning on CIFAR-100, at a size that this machine can run."""

from __future__ import annotations

from pathlib import Path

from batch import REPOSITORY, SCRIPT, sbatch
from cifar_archive import made_cifar100
from jobs import Jobs

GOLDEN = REPOSITORY / "tests/models/golden/vit.safetensors"


def test_a_tiny_vit_is_fine_tuned_from_an_archive_of_the_official_format_also_with_a_gpu_per_task(
    slurm: dict[str, str], jobs: Jobs, tmp_path: Path
) -> None:
    """No config is named. --gpus-per-task=1 hides the other GPUs from each task, on which JAX's own detection fails."""
    archive = made_cifar100(tmp_path / "made.tar.gz", train=200, test=50)
    settings = (
        f"data.path={archive}",
        f"model.options.pretrained={GOLDEN}",
        *(f"model.options.{name}" for name in ("width=32", "depth=2", "heads=4", "mlp=48", "patch=4", "image_size=24")),
        "sampling.expected_batch_size=50",
        "cluster.platform=cpu",
        "cluster.devices_per_process=1",
    )
    run = jobs.new("default-config")
    log = run.root.with_suffix(".log")
    options = ("--cpus-per-task=1", "--gpus-per-node=2", "--gpus-per-task=1")
    batch = sbatch(
        slurm,
        SCRIPT,
        "--run-dir",
        str(run.root),
        *settings,
        nodes=1,
        tasks_per_node=2,
        log=log,
        options=options,
        NPROC="1",
    )
    assert batch.wait() == "COMPLETED", batch.text
    assert f"train {REPOSITORY}/configs/vit_base_cifar100.yaml --run-dir {run.root}" in batch.text
    summary = run.summary
    assert (summary["status"], summary["processes"], summary["devices"]) == ("finished", 2, 2)
    assert (summary["clip_norm"], summary["target_epsilon"], summary["guarantee"]) == (4.63, 8.0, "holds")
    assert summary["epsilon"] <= 8.0
    # Four expected epochs, as in the config, at q = 1/4.
    assert (summary["step"], summary["dataset_size"]) == (16, 200)
