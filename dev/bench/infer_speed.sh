#!/usr/bin/env bash
# Speed of infer_mta on this machine, against what the machine can do (dev/bench/machine.c), measured in the same run:
#   dev/bench/infer_speed.sh [REPEATS=3]     SPEED_DIR: where two 1.7 GiB models of random weights are kept (default build/speed)
# 880m, weights BF16 in the file. GB/s: bytes of weights and cache that a token reads, over its time; "mean" of all tokens, "best" of the
# fastest one. Each figure is the best of REPEATS runs; the machine's rates are the best of measurements before, between and after.
set -eu
cd "$(dirname "$0")/../.."
repeats=${1:-3}
dir=${SPEED_DIR:-build/speed}
mkdir -p "$dir"
make -s infer_mta
gcc -std=gnu11 -O2 -I. dev/bench/random_model.c -lm -o "$dir/random_model"
gcc -std=gnu11 -O3 -march=native -fopenmp -I. dev/bench/machine.c -DMTA_CBLAS $(pkg-config --cflags openblas 2> /dev/null) -o "$dir/machine" -lopenblas -lm 2> /dev/null ||
    gcc -std=gnu11 -O3 -march=native -fopenmp -I. dev/bench/machine.c -o "$dir/machine" -lm
for kind in transformer mta; do
    [ -f "$dir/$kind/model.safetensors" ] || "$dir/random_model" 880m $kind BF16 "$dir/$kind"
done
read_best=0 sgemm_best=0
machine() {
    local line
    while read -r line; do
        case $line in
            read*) read_best=$(awk -v a="$read_best" -v b="$(awk '{print $2}' <<< "$line")" 'BEGIN {print (a > b ? a : b)}') ;;
            sgemm*) sgemm_best=$(awk -v a="$sgemm_best" -v b="$(awk '{print $2}' <<< "$line")" 'BEGIN {print (a > b ? a : b)}') ;;
        esac
    done < <("$dir/machine")
}
# best LABEL KIND TOKENS GENERATE OPTIONS...: prints prompt tokens/s, mean and fastest decode GB/s and the fastest token's ms, each the best of the runs
best() {
    local label=$1 kind=$2 tokens=$3 generate=$4 out
    shift 4
    for _ in $(seq "$repeats"); do
        out=$(./infer_mta "$dir/$kind" --token-ids "$(seq -s ' ' 1 "$tokens")" --max-tokens "$generate" --ignore-eos --temperature 0 "$@" 2>&1 > /dev/null | tail -n 1)
        sed -E 's/.*tokens, ([0-9.]+) tokens\/s; decode .* ([0-9.]+) GB\/s of weights and cache \(fastest token ([0-9.]+) ms, ([0-9.]+) GB\/s\); peak memory ([0-9.]+) MiB.*/\1 \2 \3 \4 \5/' <<< "$out"
    done | awk -v label="$label" -v read="$read_best" '{if ($1 > p) p = $1; if ($2 > m) m = $2; if (!t || $3 < t) t = $3; if ($4 > b) b = $4; if ($5 > k) k = $5}
        END {printf "%-44s prompt %7.1f tokens/s  decode mean %6.2f best %6.2f GB/s (%.2f, %.2f of read)  fastest token %7.2f ms  peak %.0f MiB\n", label, p, m, b, m / read, b / read, t, k}'
    machine
}
grep -m1 'model name' /proc/cpuinfo | sed 's/.*: //' || true
echo "$(nproc) cores, load $(cut -d' ' -f1-3 /proc/loadavg), commit $(git rev-parse --short HEAD 2> /dev/null || echo none)"
machine
machine
echo "machine: read $read_best GB/s, sgemm $sgemm_best GFLOP/s"
best "mta bf16, context to 128" mta 64 64
best "mta int8, context to 128" mta 64 64 --weights int8
for kind in transformer mta; do
    for T in 512 1024 2016; do best "$kind bf16, cache f32, T $T" $kind $T 16; done
done
best "mta bf16, cache bf16, T 2016" mta 2016 16 --cache bf16
best "mta int8, cache bf16, T 2016" mta 2016 16 --weights int8 --cache bf16
echo "machine: read $read_best GB/s, sgemm $sgemm_best GFLOP/s, load $(cut -d' ' -f1-3 /proc/loadavg)"
echo "prompt of 2016 tokens: 1.359 GFLOP of matrix products and 0.149 GFLOP of scores and values a token"
