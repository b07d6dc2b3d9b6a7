# Sourced by quickstart.sh and tests/run.sh: makes .venv in the working directory and installs dpdist there.
# DPDIST_EXTRAS names extras, such as `test` or `cuda12`. Installs again only when pyproject.toml has changed.

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "dpdist needs Python 3.11 or newer; set PYTHON to one." >&2
    exit 2
fi

stamp=.venv/.installed
wanted="$(cksum <pyproject.toml) ${DPDIST_EXTRAS:-}"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "+ $python -m venv .venv && pip install -e .${DPDIST_EXTRAS:+[$DPDIST_EXTRAS]}"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${DPDIST_EXTRAS:+[$DPDIST_EXTRAS]}"
    echo "$wanted" >"$stamp"
fi
