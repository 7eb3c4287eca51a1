#!/usr/bin/env bash
# dev/bench/spin.sh [ROUNDS=2]: what waiting in a loop costs on this machine, idle and with other work on it: tokens a
# second of a training step and of decoding, with the waiting of these programs (a thousand turns, then sleep:
# settle_threads in mta/util.h), with libgomp's own (GOMP_SPINCOUNT=300000) and with none (OMP_WAIT_POLICY=passive), in
# turns. "busy": beside one endless loop for each core. About three minutes; wants the machine to itself. SPEED_DIR:
# where a model of random weights is kept (default build/speed).
set -eu
export LC_ALL=C  # figures with a decimal point, in every locale
cd "$(dirname "$0")/../.."
rounds=${1:-2} dir=${SPEED_DIR:-build/speed} work=$(mktemp -d) loops=()
end() { [ ${#loops[@]} -eq 0 ] || kill "${loops[@]}" 2> /dev/null || true; rm -rf "$work"; }
trap end EXIT
trap 'exit 130' INT TERM
make -s train_mta infer_mta
mkdir -p "$dir"
gcc -std=gnu11 -O2 -I. dev/bench/random_model.c -lm -o "$dir/random_model"
[ -f "$dir/300m/model.safetensors" ] || "$dir/random_model" 300m mta BF16 "$dir/300m" > /dev/null
cat README.md dev/*.md > "$work/text.txt"
python3 data/prepare.py text "$work/text.txt" --tokenizer bytes --out "$work" --name text > /dev/null 2>&1

# Tokens a second: the median of the steps of five seconds; of eight tokens after a prompt of eight.
train() {
    rm -rf "$work/run"
    env "$@" timeout -s TERM 5 ./train_mta --model 3m --attention mta --tokenizer bytes --seq-len 256 --batch-size 4 \
        --train "$work/text_train_*.bin" \
        --steps 100000 --save-every 0 --sample-every 0 --log-every 1 --out "$work/run" > /dev/null 2>&1 || true
    sed -n -E 's/.*"event": *"step".*"tokens_per_s": *([0-9.]+).*/\1/p' "$work/run/log.jsonl" | sort -n |
        awk '{x[NR] = $1} END {printf "%.0f\n", NR ? x[int((NR + 1) / 2)] : 0}'
}
decode() {
    env "$@" ./infer_mta "$dir/300m" --token-ids "1 2 3 4 5 6 7 8" --max-tokens 8 --ignore-eos --temperature 0 2>&1 \
        > /dev/null |
        grep -oE '[0-9.]+ tokens/s' | tail -n 1 | cut -d' ' -f1
}

grep -m1 'model name' /proc/cpuinfo | sed 's/.*: //' || true
commit=$(git rev-parse --short HEAD 2> /dev/null || echo none)
echo "$(nproc) cores, load $(cut -d' ' -f1-3 /proc/loadavg), commit $commit; tokens/s"
printf '%-22s %12s %12s %12s\n' "" "ours" "libgomp's" "none"
for state in idle busy; do
    if [ $state = busy ]; then
        for _ in $(seq "$(nproc)"); do (while :; do :; done) & loops+=($!); done
    fi
    for _ in $(seq "$rounds"); do
        for program in train decode; do
            row=()
            for setting in MTA_UNSET=1 GOMP_SPINCOUNT=300000 OMP_WAIT_POLICY=passive; do
                row+=("$($program $setting)")
            done
            printf '%-22s %12s %12s %12s\n' "$state, $program" "${row[@]}"
        done
    done
done
