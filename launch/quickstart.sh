#!/usr/bin/env bash
# From a fresh clone to a trained private model: a virtual environment, the install, and configs/digits.yaml on
# 2 processes x 2 CPU devices. Needs Python >= 3.11 with venv; PYTHON and RUN_DIR may name others.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

run_dir=${RUN_DIR:-runs/quickstart}
echo "+ dpdist train configs/digits.yaml --processes 2 --run-dir $run_dir"
.venv/bin/dpdist train configs/digits.yaml --processes 2 --run-dir "$run_dir"
echo "The privacy statement and the accuracy are in $run_dir/summary.json, the plots in $run_dir/plots/."
