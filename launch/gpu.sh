#!/usr/bin/env bash
# Everything worth measuring on one GPU, in one command and within a time limit; no network, no root, no installation.
#   bash launch/gpu.sh [--minutes 10] [--to DIR]    results in DIR/README.md and DIR/gpu.json (runs/gpu), after every step
#   bash launch/gpu.sh --tiny                       the same steps on small shapes, without a GPU: tries the command itself
# It takes the repository's .venv where there is one, else python3; PYTHON names another. That Python needs jax with CUDA
# (pip install -e .[cuda12]) and what dpdist needs, not dpdist itself. Peers (jax_privacy, torch, opacus) are measured
# where they are installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; else python=python3; fi
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "launch/gpu.sh needs Python 3.11 or newer; set PYTHON to one (found: $python)." >&2
    exit 2
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m dpdist_launch.measure.gpu "$@"
