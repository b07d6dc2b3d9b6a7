#!/usr/bin/env bash
# Writes requirements/test-pyXYZ.txt for the Python that PYTHON names (python3): installs dpdist[test] into a new virtual
# environment, with the newest versions that pyproject.toml allows, and lists them. `make lock PYTHON=python3.12` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
lock=requirements/test-$("$python" -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
"$python" -m venv "$made"
"$made/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
{
    echo "# Versions for dpdist[test] on $("$python" --version), $(uname -sm): a constraint file of pip."
    echo "# launch/environment.sh installs from it, for the extras none and test; DPDIST_CONSTRAINTS= (empty) leaves it aside."
    echo "# Made by requirements/lock.sh; to renew it: make lock PYTHON=$(basename "$python"), then .ci/run."
    "$made/bin/python" -m pip freeze --disable-pip-version-check --all --exclude pip --exclude-editable
} >"$made/lock"
cp "$made/lock" "$lock"
echo "$lock: $(grep -c == "$lock") packages"
