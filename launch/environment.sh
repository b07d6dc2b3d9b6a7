# Sourced by quickstart.sh and tests/run.sh: makes .venv in the working directory and installs dpdist there.
# DPDIST_EXTRAS names extras, such as `test` or `cuda12`. Installs again only when pyproject.toml or the lock has changed.
# The versions are those of requirements/test-pyXYZ.txt, where there is one for this Python and no extra but `test`;
# DPDIST_CONSTRAINTS names another constraint file of pip, or none where it is set and empty.

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "dpdist needs Python 3.11 or newer; set PYTHON to one." >&2
    exit 2
elif ! new_enough "$python"; then
    found=$("$python" --version 2>&1) || found="no Python that can be run"
    echo "dpdist needs Python 3.11 or newer; PYTHON = $python is $found." >&2
    exit 2
fi

case ${DPDIST_EXTRAS:-} in
    "" | test) constraints=requirements/test-$("$python" -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt ;;
    *) constraints="" ;; # GPU builds and peers need versions of their own
esac
[ -f "$constraints" ] || constraints=""
constraints=${DPDIST_CONSTRAINTS-$constraints}

stamp=.venv/.installed
wanted="$(cat pyproject.toml ${constraints:+"$constraints"} | cksum) ${DPDIST_EXTRAS:-} $constraints"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "+ $python -m venv .venv && pip install ${constraints:+-c $constraints }-e .${DPDIST_EXTRAS:+[$DPDIST_EXTRAS]}"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ${constraints:+--constraint "$constraints"} \
        --editable ".${DPDIST_EXTRAS:+[$DPDIST_EXTRAS]}"
    echo "$wanted" >"$stamp"
fi

# Where Python may not write bytecode (PYTHONDONTWRITEBYTECODE, a tree of somebody else's), each rank would compile
# dpdist for itself: 0.2 to 0.3 s of processor time.
.venv/bin/python -m compileall -qq dpdist launch || true
