"""Training and other work as SLURM jobs."""
