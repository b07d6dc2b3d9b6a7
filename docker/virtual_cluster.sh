#!/usr/bin/env bash
# Entry point of the virtual-cluster image: brings up a SLURM of $NODES virtual nodes, then runs the given command.
set -euo pipefail
bash /dpdist/slurm/virtual_cluster.sh up --nodes "${NODES:-20}" --dir "${SLURM_CONF%/*}" >/dev/null
# Not exec: this shell is process 1, and reaps the daemons that SLURM leaves to it.
"$@"
