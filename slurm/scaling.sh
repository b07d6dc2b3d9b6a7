#!/usr/bin/env bash
#SBATCH --job-name=dpdist-scaling
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dpdist-scaling-%j.log
#
# A scaling sweep: throughput of DP-SGD and of plain SGD over node counts. This job only waits; every point is a job of its
# own that it submits. What follows the script goes to `dpdist scaling` (docs/scaling.md):
#
#   sbatch slurm/scaling.sh configs/fashion_mnist.yaml --nodes 1,2,4,8,20 --gpus-per-node 4 --repeats 3
#   sbatch --partition=small slurm/scaling.sh configs/fashion_mnist.yaml cluster.platform=cpu --nodes 1,2 --jobs 1
#
# Account, partition, modules, container: slurm/site.sh, copied from slurm/site.example.sh (`source slurm/site.sh` first,
# so that sbatch sees them too). Submit from the repository, or name it as DPDIST_HOME, on a file system that all nodes share.
# Short of time, it goes back to the queue; the points that are done stay done, and those that run are waited for.
set -euo pipefail

[ -n "${SLURM_JOB_ID:-}" ] || { echo "submit it: sbatch slurm/scaling.sh CONFIG --nodes 1,2,4 [key=value ...]" >&2; exit 2; }
repository=${DPDIST_HOME:-$SLURM_SUBMIT_DIR}
[ -f "$repository/slurm/job.sh" ] \
    || { echo "dpdist job: no slurm/job.sh in $repository; submit from the repository, or set DPDIST_HOME to it" >&2; exit 2; }
. "$repository/slurm/job.sh"
read_site "$repository"

# There is no sbatch in a container: the points run in it, this does not.
[ -z "${DPDIST_CONTAINER:-}" ] || dpdist_command=("$repository/.venv/bin/dpdist")
command -v "${dpdist_command[0]}" >/dev/null \
    || die "no command ${dpdist_command[0]}: sweeps need an installation outside the container; run launch/quickstart.sh"

begin_job # no run: srun's words alone tell how it ended
echo "+ job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: ${dpdist_command[*]} scaling $* --cluster slurm"
code=0
# In a step, not in this shell: SLURM sends TERM to steps.
supervise --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${dpdist_command[@]}" scaling "$@" --cluster slurm || code=$?
end_job "$code"
