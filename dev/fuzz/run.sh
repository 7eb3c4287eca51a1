#!/usr/bin/env bash
# Builds the fuzz harnesses with libFuzzer under the address and undefined-behaviour sanitizers and runs each for RUNS
# inputs from the seeds of make_seeds.py and the inputs of corpus/: dev/fuzz/run.sh [RUNS=20000] [HARNESS...]. Each
# harness changes files as one who knows their format would (structure.h).
# FUZZ_DIR (default: a temporary directory) keeps the programs, what was found new, and in runs_HARNESS how many inputs
# have run. RUNS counts those of all calls with one FUZZ_DIR: a call goes on where the last one ended or was stopped,
# so that millions can be run in pieces. RUNS that were reached before run nothing.
# Ends with "N passed, N failed[, N skipped]"; skips where clang or its fuzzer runtime is absent.
set -u
cd "$(dirname "$0")/../.." || exit 1
runs=${1:-20000}
shift || true
harnesses=("$@")
[ ${#harnesses[@]} -gt 0 ] || harnesses=(json config checkpoint directory shard tokenizer)
clang=${CLANG:-clang}
piece=100000  # inputs between two counts
dir=${FUZZ_DIR:-}
if [ -z "$dir" ]; then
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
fi
mkdir -p "$dir"
printf '#include <stddef.h>
int LLVMFuzzerTestOneInput(const unsigned char* d, size_t n) { return d && n ? 0 : 0; }
' > "$dir/probe.c"
if ! "$clang" -fsanitize=fuzzer,address,undefined "$dir/probe.c" -o "$dir/probe" 2> "$dir/probe.log"; then
    echo "fuzz: skipped, no clang with a libFuzzer runtime here"
    echo "0 passed, 0 failed, ${#harnesses[@]} skipped"
    exit 0
fi
if ! command -v python3 > /dev/null; then
    echo "fuzz: skipped, no python3 for the seeds"
    echo "0 passed, 0 failed, ${#harnesses[@]} skipped"
    exit 0
fi
python3 dev/fuzz/make_seeds.py "$dir/seeds" || exit 1

child=
stopped=0
trap 'stopped=1; [ -z "$child" ] || kill "$child"' INT TERM

# build HARNESS: unless it is there and no source is newer. Comparisons are not traced: they take 2 of 5 seconds, and
# libFuzzer only learns from them what the mutators of structure.h know. Optimised where the inputs take longer than the
# compiler.
optimise=-O2
[ "$runs" -gt 20000 ] || optimise=-O0
build() {
    if [ -x "$dir/fuzz_$1" ] && [ -z "$(find dev/fuzz/*.* mta infer_mta.c -newer "$dir/fuzz_$1")" ]; then return; fi
    "$clang" -std=gnu11 -gline-tables-only $optimise -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
        -fno-sanitize-coverage=trace-cmp -Werror -Wno-psabi -I. "dev/fuzz/fuzz_$1.c" -lm -o "$dir/fuzz_$1"
}

# fuzz HARNESS N: N new inputs, after those that are kept; how many have run is added to `have`.
fuzz() {
    local h=$1 log=$dir/fuzz_$1.log inputs executed kept status longest=8192
    [ "$h" != directory ] || longest=16384  # whole checkpoints
    inputs=("$dir/corpus_$h" "$dir/seeds/$h")
    [ ! -d "dev/fuzz/corpus/$h" ] || inputs+=("dev/fuzz/corpus/$h")
    kept=$(find "${inputs[@]}" -type f | wc -l)  # run first, and one or two empty ones
    "$dir/fuzz_$h" -runs=$(($2 + kept + 2)) -seed=$((have + 1)) -max_len="$longest" -len_control=0 -timeout=3600 \
        -rss_limit_mb=2048 -close_fd_mask=3 -print_final_stats=1 -artifact_prefix="$dir/found_${h}_" "${inputs[@]}" \
        > "$log" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    if [ "$stopped" -eq 1 ]; then wait "$child"; fi  # it ends with its counts
    child=
    executed=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    kept=$(sed -nE 's/^#([0-9]+)[[:space:]]+INITED.*/\1/p' "$log")
    executed=$((${executed:-0} - ${kept:-${executed:-0}}))
    have=$((have + executed))
    echo "$have" > "$dir/runs_$h"
    [ "$status" -eq 0 ] && [ "$executed" -gt 0 ]
}

passed=0
failed=0
for h in "${harnesses[@]}"; do
    if ! build "$h"; then
        echo "fuzz_$h: does not build"
        failed=$((failed + 1))
        continue
    fi
    mkdir -p "$dir/corpus_$h"
    have=$(cat "$dir/runs_$h" 2> /dev/null || echo 0)
    before=$have
    began=$SECONDS
    good=1
    while [ "$good" -eq 1 ] && [ "$have" -lt "$runs" ] && [ "$stopped" -eq 0 ]; do
        left=$((runs - have))
        fuzz "$h" "$((left < piece ? left : piece))" || [ "$stopped" -eq 1 ] || good=0
    done
    if [ "$good" -eq 1 ]; then
        echo "fuzz_$h: $have inputs of $runs, $((have - before)) of them in $((SECONDS - began)) s now"
    else
        echo "fuzz_$h: FAILED"
        grep -vE '^#[0-9]+\s+(NEW|REDUCE|pulse|RELOAD|INITED)' "$dir/fuzz_$h.log" | tail -40
    fi
    if [ "$stopped" -eq 1 ]; then
        echo "fuzz: stopped"
        exit 1
    fi
    passed=$((passed + good))
    failed=$((failed + 1 - good))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
