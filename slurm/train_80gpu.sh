#!/usr/bin/env bash
#SBATCH --job-name=dpdist
#SBATCH --nodes=20
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dpdist-%j.log
#
# One training run on 20 nodes of 4 GPUs, one process a GPU. What follows the script goes to `dpdist train`; options of
# sbatch before it override the numbers above, nothing here needs an edit:
#
#   sbatch slurm/train_80gpu.sh --run-dir /shared/runs/vit                 ViT-B/16 on CIFAR-100, configs/vit_base_cifar100.yaml
#   sbatch slurm/train_80gpu.sh configs/fashion_mnist.yaml --run-dir /shared/runs/fashion privacy.target_epsilon=2
#   sbatch --nodes=2 --time=1:00:00 slurm/train_80gpu.sh configs/digits.yaml --run-dir /shared/runs/digits
#
# Account, partition, modules, container: slurm/site.sh, copied from slurm/site.example.sh (`source slurm/site.sh` first,
# so that sbatch sees them too). Submit from the repository, or name it as DPDIST_HOME, on a file system that all nodes share.
# Preempted or short of time, the run is saved on all ranks, put back into the queue, and goes on from there. After the death
# of a rank or a node it starts again in this job, or is put back into the queue without that node (docs/slurm.md).
set -euo pipefail

[ -n "${SLURM_JOB_ID:-}" ] || { echo "submit it: sbatch slurm/train_80gpu.sh CONFIG [--run-dir DIR] [key=value ...]" >&2; exit 2; }
repository=${DPDIST_HOME:-$SLURM_SUBMIT_DIR}
[ -f "$repository/slurm/job.sh" ] \
    || { echo "dpdist job: no slurm/job.sh in $repository; submit from the repository, or set DPDIST_HOME to it" >&2; exit 2; }
. "$repository/slurm/job.sh"
read_site "$repository"

case ${1-} in
    "" | --* | *=*) set -- "$repository/configs/vit_base_cifar100.yaml" "$@" ;; # no config is named
esac
# Asked for, not guessed: it may stand in the config. The same line again must find the same run.
begin_job
run_dir=$("${dpdist_command[@]}" run-dir "$@" --default "runs/$SLURM_JOB_ID") || end_job $?
[ -n "$run_dir" ] || die "${dpdist_command[*]} does not say which run directory is meant: it seems to be something other than dpdist"
set -- "$@" --run-dir "$run_dir"

echo "+ job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $SLURM_NTASKS processes on $SLURM_JOB_NODELIST: ${dpdist_command[*]} train $*"
begin_run "$run_dir"
code=0
# --kill-on-bad-exit: one dead rank ends all. --cpus-per-task: srun no longer inherits it from sbatch.
supervise --kill-on-bad-exit=1 --wait=60 --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "${dpdist_command[@]}" train "$@" || code=$?
end_job "$code"
