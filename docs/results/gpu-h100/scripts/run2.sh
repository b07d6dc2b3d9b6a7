#!/usr/bin/env bash
# Clipping on the big models. From the repository's root: bash docs/results/gpu-h100/scripts/run2.sh OUT [WHEL] [BUDGET]; TINY=1 tries it on a CPU.
# ONLY="vit-b:32:float32 ..." chooses; c after compile seconds: it came from the compilation cache; x sgd with *: not interleaved.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arms=sgd,auto-gpu,auto,bookkeeping,per_example,jax-masked
list="vit-b:32:float32:170 vit-b:32:bfloat16:110 bert-base:64:float32:110 r50x1:32:float32:110 bert-base:64:bfloat16:110 vit-l:16:float32:110 vit-ti:64:float32:110"
rounds=5 seconds=0.2
[ "$platform" != cpu ] || { list="mnist-cnn:16:float32:60 bert-mini:2:bfloat16:90" rounds=2 seconds=0.02; }
for entry in ${ONLY:-$list}; do
    IFS=: read -r model batch dtype limit <<<"$entry"
    peers=; [ "$model:$dtype" != vit-b:float32 ] && [ "$platform" != cpu ] || peers=--peers
    # The step's own limit reaches the program, which then prints what it has.
    step "$model-$dtype" "${limit:-110}" bash -c 'exec "$0" "$@" --limit "$LIMIT"' "$py" "$here/benches.py" "$model" "$batch" "$dtype" --to "$out" --rounds $rounds --seconds $seconds --arms "$arms" $peers
    cat "$out/table-$model-$dtype.md" 2>/dev/null
done
all=$(cat "$out"/table-*.md 2>/dev/null)
pack
echo "== all tables"; echo "${all:0:9500}"
cat "$out/steps.txt"
