#!/usr/bin/env bash
# Sets up .venv with the test extra and runs the tests; arguments go to pytest.
#   bash tests/run.sh                       everything
#   bash tests/run.sh tests/mechanism -k noise
set -euo pipefail
cd "$(dirname "$0")/.."
DPDIST_EXTRAS=test
. launch/environment.sh
exec .venv/bin/python -m pytest "$@"
