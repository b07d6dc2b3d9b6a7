# What differs from site to site, and the only file to edit:
#
#   cp slurm/site.example.sh slurm/site.sh     (git ignores it)
#   source slurm/site.sh && bash launch/quickstart.sh    installs with the right CUDA extra, and tries it
#   source slurm/site.sh && sbatch slurm/train_80gpu.sh configs/digits.yaml --run-dir /shared/runs/digits
#
# It is read twice: by your shell, so that sbatch sees SBATCH_*, and by the job on its first node, from where srun carries
# what is exported to all others. `dpdist submit` and `dpdist scaling` read it by themselves.

# --- Whose hours, and where ---
# export SBATCH_ACCOUNT=project_2001234
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal

# --- What to install: cuda12, cuda13, or cuda12-volta for V100 (CUDA 13 and newer cuDNN dropped them) ---
# export DPDIST_EXTRAS=cuda12

# --- Where Python comes from: modules and .venv (the default), another command, or a container ---
# module load python-data
# export DPDIST=/shared/envs/dpdist/bin/dpdist
# export DPDIST_CONTAINER=/shared/images/dpdist.sif                      # built as docker/README.md says
# export DPDIST_CONTAINER_EXEC="apptainer exec --nv --bind /scratch"     # what runs it

# --- Network. NCCL picks an interface by itself, and at some sites the wrong one ---
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=WARN

# --- XLA. Autotuning may differ between ranks; a shared cache makes a requeued job start in seconds ---
# export XLA_FLAGS=--xla_gpu_autotune_level=0
# export JAX_COMPILATION_CACHE_DIR=/scratch/$USER/jax-cache
# export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9

# --- Restarts: after how many starts that saved nothing new to give up; with how few nodes to go on when one dies ---
# export DPDIST_MAX_RESTARTS=20
# export DPDIST_MIN_NODES=18      # default: all of the job's; then it is requeued without the dead one

# Worked examples, written from the sites' public user guides and UNTESTED there:
#
# CSC Puhti, V100 x 4 a node (partition gpu, at most 20 nodes):
#   export SBATCH_ACCOUNT=project_2001234 SBATCH_PARTITION=gpu DPDIST_EXTRAS=cuda12-volta
#   module load python-data
#   sbatch --gpus-per-node=v100:4 --cpus-per-task=10 --mem=340G slurm/train_80gpu.sh ...
#
# CSC Mahti, A100 x 4 a node (partition gpumedium):
#   export SBATCH_ACCOUNT=project_2001234 SBATCH_PARTITION=gpumedium DPDIST_EXTRAS=cuda12
#   sbatch --gpus-per-node=a100:4 --cpus-per-task=32 slurm/train_80gpu.sh ...
#
# CSC LUMI, MI250X, 8 GPU dies a node (partition standard-g): JAX needs its ROCm build, which pyproject.toml has no extra
# for; use a container of the site that has jax for ROCm and install dpdist into it.
#   export SBATCH_ACCOUNT=project_465000000 SBATCH_PARTITION=standard-g
#   export DPDIST_CONTAINER=/scratch/project_465000000/dpdist-rocm.sif
#   export DPDIST_CONTAINER_EXEC="singularity exec --rocm --bind /scratch,/project"
#   export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3
#   sbatch --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=7 slurm/train_80gpu.sh ...
#
# NERSC Perlmutter, A100 x 4 a node:
#   export SBATCH_ACCOUNT=m0000_g SBATCH_QOS=regular SBATCH_CONSTRAINT=gpu DPDIST_EXTRAS=cuda12
#   module load python
#   export NCCL_SOCKET_IFNAME=hsn
#   sbatch --cpus-per-task=32 slurm/train_80gpu.sh ...
