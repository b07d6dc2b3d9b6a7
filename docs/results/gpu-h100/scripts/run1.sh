#!/usr/bin/env bash
# Facts of the device and the digits twice. From the repository's root: bash docs/results/gpu-h100/scripts/run1.sh OUT [WHEL] [BUDGET]; TINY=1 tries it on a CPU.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "$platform" = cpu ] || step device 20 nvidia-smi
[ "$platform" = cpu ] || grep -o 'NVIDIA [A-Z0-9].*MiB' "$out/device.log" | head -n 3
step versions 60 "$py" -c 'import jax, jaxlib, flax, optax, numpy, platform; print(jax.devices(), jax.__version__, flax.__version__, optax.__version__, numpy.__version__, platform.python_version())'
step facts 115 "$py" "$here/facts.py" --to "$out" $tiny
digits() { # N LIMIT
    step "digits$1" "$2" "$py" -m launch train configs/digits.yaml --run-dir "$out/d$1" cluster.platform=$platform cluster.devices_per_process=1 privacy.insecure_seed=1 run.progress=lines
    cp "$out/d$1/summary.json" "$out/summary$1.json" 2>/dev/null
}
digits 1 90; digits 2 60
rm -rf "$out"/d1 "$out"/d2
sums=$(grep -ho '"params_sha256": *"[0-9a-f]*' "$out"/summary?.json 2>/dev/null | sort | uniq -c)
echo "params_sha256 (one line with 2: the runs agree bit for bit): $sums" | tee -a "$out/steps.txt"
grep -q '== facts, compact' "$out/facts.log" || JAX_PLATFORMS=cpu timeout 30 "$py" "$here/facts.py" --to "$out" --only - >>"$out/facts.log" 2>&1   # it was cut off: its summary
compact=$(sed -n '/== facts, compact/,$p' "$out/facts.log")
pack
echo "${compact:0:9000}"
cat "$out/steps.txt"
