#!/usr/bin/env bash
# Sets up .venv with the test extra and runs the tests.
#   bash tests/run.sh                            everything, in lanes that run side by side
#   bash tests/run.sh fast                       the pure tests, in under a minute
#   bash tests/run.sh nightly                    everything, a long soak (DPDIST_SOAK_MINUTES), every fault at every phase
#   bash tests/run.sh tests/mechanism -k noise   any other arguments: one pytest, with these
set -euo pipefail
cd "$(dirname "$0")/.."
DPDIST_EXTRAS=test
. launch/environment.sh
case ${1-} in
    "" | fast | nightly) exec .venv/bin/python tests/support/run_lanes.py "$@" ;;
    *) exec .venv/bin/python -m pytest "$@" ;;
esac
