# Sourced by run1.sh and run2.sh: OUT [WHEL] [BUDGET]. Every step has a limit, writes as it goes, and does not stop the rest.
set -u
out=${1:?a folder for results}; wheels=${2:-}; budget=${3:-540}; began=$(date +%s); here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd); mkdir -p "$out"
site=${SITE:-/tmp/site}; py=${PYTHON:-python3}
if [ -n "$wheels" ] && [ ! -e "$site/.installed" ]; then
    "$py" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl >"$out/pip.log" 2>&1 && touch "$site/.installed" || {
        echo "pip failed, unzipped instead: $(tail -n 1 "$out/pip.log" | cut -c1-100)" | tee -a "$out/steps.txt"
        "$py" -c 'import sys, zipfile; [zipfile.ZipFile(w).extractall(sys.argv[1]) for w in sys.argv[2:]]' "$site" "$wheels"/*.whl && touch "$site/.installed"
    }
fi
export PYTHONPATH=$PWD:$site:${PYTHONPATH-} XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAXCACHE:-/tmp/jaxcache} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
platform=gpu tiny=; [ "${TINY:-}" != 1 ] || { platform=cpu tiny=--tiny; }
left() { echo $(( budget - ($(date +%s) - began) )); }
step() { # NAME LIMIT COMMAND...; the limit that it gets is in $LIMIT for the command
    local name=$1 limit=$2; shift 2; local rest; rest=$(left); [ "$rest" -gt 20 ] || { echo "$name: no time left" | tee -a "$out/steps.txt"; return; }
    [ "$limit" -lt $((rest - 8)) ] || limit=$((rest - 8))
    local t code; t=$(date +%s); LIMIT=$((limit - 3)) timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1; code=$?
    echo "$name: exit $code after $(( $(date +%s) - t )) s: $(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c1-120)" | tee -a "$out/steps.txt"
}
pack() { # one archive of everything (at most 16 MiB) and steps.txt are what stays in $out
    find "$out" -size +8M -type f -delete
    tar -C "$out" -czf "$out/all.tgz" --exclude all.tgz . && find "$out" -mindepth 1 -maxdepth 1 ! -name all.tgz ! -name steps.txt -exec rm -rf {} +
}
