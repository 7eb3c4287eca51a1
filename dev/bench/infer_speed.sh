#!/usr/bin/env bash
# Speed of infer_mta on this machine, against what the machine can do, measured in turns in the same process
# (infer_step.c):
#   dev/bench/infer_speed.sh [ROUNDS=15]     SPEED_DIR: where three 1.7 GiB models of random weights are kept (default
#                                            build/speed)
# Needs the machine to itself, about five minutes; beside other work, as root: chrt -r 1 dev/bench/infer_speed.sh
# 880m, weights BF16 in the file; the row "memory" is infer_mta itself. What a line of figures means:
#   prompt A to B   chunks of 512; operations of products, scores and values a second over those of OpenBLAS's sgemm at
#                   2048^3 with its own threads; medians
#   token T         MB: weights and cached keys and values that token number T reads, int8 with its scales; median and
#                   best of ROUNDS tokens; reading: the same bytes read in one stream a core by plain vector loads;
#                   prefetched: by the fastest loop
#                   known; "of it": median over the rounds of the token's rate over the reading's beside it, and the
#                   fastest token over
#                   the fastest reading
#   convolution     the same token of the same model with the convolutions taken out; what they add is the median over
#                   the pairs
set -eu
cd "$(dirname "$0")/../.."
rounds=${1:-15}
dir=${SPEED_DIR:-build/speed}
mkdir -p "$dir"
make -s infer_mta build/infer_step
gcc -std=gnu11 -O2 -I. dev/bench/random_model.c -lm -o "$dir/random_model"
for kind in transformer mta mta-full; do
    [ -f "$dir/$kind/model.safetensors" ] || "$dir/random_model" 880m $kind BF16 "$dir/$kind"
done
row() {  # KIND WEIGHTS CACHE T...
    echo "$1, weights $2, cache $3"
    build/infer_step "$dir/$1" "$2" "$3" "$rounds" "${@:4}"
}
memory() {  # KIND OPTIONS...
    local kind=$1 out
    shift
    out=$(./infer_mta "$dir/$kind" --token-ids "$(seq -s ' ' 1 64)" --max-tokens 64 --ignore-eos \
        --temperature 0 "$@" 2>&1 > /dev/null)
    echo "memory, $kind $*: plan$(grep -oE 'together [0-9.]+ MiB' <<< "$out" | cut -c9-)," \
        "$(grep -oE 'peak memory .*' <<< "$out")"
}
grep -m1 'model name' /proc/cpuinfo | sed 's/.*: //' || true
commit=$(git rev-parse --short HEAD 2> /dev/null || echo none)
echo "$(nproc) cores, load $(cut -d' ' -f1-3 /proc/loadavg), commit $commit"
row transformer bf16 f32 128 512 1024 2048
row mta bf16 f32 128 512 1024 2048
row mta-full bf16 f32 128 2048
row mta bf16 bf16 2048
row mta int8 f32 128 2048
row mta int8 bf16 2048
memory mta
memory mta --weights int8 --cache bf16
memory mta --mapped
echo "load $(cut -d' ' -f1-3 /proc/loadavg)"
