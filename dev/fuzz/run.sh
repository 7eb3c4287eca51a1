#!/usr/bin/env bash
# Builds the fuzz harnesses with libFuzzer under the address and undefined-behaviour sanitizers and runs each for RUNS
# inputs from the seeds of make_seeds.py and the inputs of corpus/: dev/fuzz/run.sh [RUNS=20000] [HARNESS...]. Each
# harness changes files as one who knows their format would (structure.h). FUZZ_DIR keeps what was found new (default: a
# temporary directory).
# Ends with "N passed, N failed[, N skipped]"; skips where clang or its fuzzer runtime is absent.
set -u
cd "$(dirname "$0")/../.." || exit 1
runs=${1:-20000}
shift || true
harnesses=("$@")
[ ${#harnesses[@]} -gt 0 ] || harnesses=(json config checkpoint directory shard tokenizer)
clang=${CLANG:-clang}
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
passed=0
failed=0
for h in "${harnesses[@]}"; do
    if ! "$clang" -std=gnu11 -gline-tables-only -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
        -Wno-psabi -I. "dev/fuzz/fuzz_$h.c" -lm -o "$dir/fuzz_$h"; then
        echo "fuzz_$h: does not build"
        failed=$((failed + 1))
        continue
    fi
    mkdir -p "$dir/corpus_$h"
    if "$dir/fuzz_$h" -runs="$runs" -max_len=8192 -timeout=10 -rss_limit_mb=4096 -seed=1 -close_fd_mask=3 \
        -artifact_prefix="$dir/found_${h}_" \
            "$dir/corpus_$h" "$dir/seeds/$h" $(ls -d "dev/fuzz/corpus/$h" 2> /dev/null) > "$dir/fuzz_$h.log" 2>&1; then
        echo "fuzz_$h: $(grep -E '^Done|DONE' "$dir/fuzz_$h.log" | tr '\n' ' ')"
        passed=$((passed + 1))
    else
        echo "fuzz_$h: FAILED"
        grep -vE '^#[0-9]+\s+(NEW|REDUCE|pulse|RELOAD|INITED)' "$dir/fuzz_$h.log" | tail -40
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
