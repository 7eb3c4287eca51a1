#!/usr/bin/env bash
# scripts/gpu_check.sh [--part tests|speed] [--python PYTHON]: tests and speed of train_mta.cu on the GPU of this machine, at most 9 minutes,
# the table last, also after Ctrl-C or SIGTERM. Needs nvcc; compute-sanitizer and a PyTorch with CUDA are used where they are.
#
#   tests   the fused attention, test_mta_cuda in bf16 and fp32, compute-sanitizer's memcheck and racecheck on tiny shapes, runs (resume,
#           checkpoints that change sides)
#   speed   steps of 880m at T 2048 and 4096 for each attention: tokens/s, MFU, memory, and where the time goes; the same model in PyTorch
# What is left out for lack of time or tools is said in the table. Exit status 1 if a test failed or a step did not run.
set -u
cd "$(dirname "$0")/.." || exit 1
part=all python=""
while [ $# -gt 0 ]; do
    case $1 in
        --part) part=${2:?--part needs tests or speed}; shift ;;
        --python) python=${2:?--python needs a program}; shift ;;
        *) echo "usage: scripts/gpu_check.sh [--part tests|speed] [--python PYTHON]" >&2; exit 1 ;;
    esac
    shift
done
case $part in all | tests | speed) ;; *) echo "gpu_check.sh: --part: got $part, wanted tests or speed" >&2; exit 1 ;; esac

# Every step has a limit of its own, and none goes on beyond `deadline`: 520 s for everything, of which the tests leave the speed at least 220 s.
started=$(date +%s)
limit=${GPU_CHECK_SECONDS:-520}
deadline=$((started + limit))
left() { echo $((deadline - $(date +%s))); }
table=() failed=0 job=""
row() { table+=("$*"); echo "$*"; }
fail() { failed=$((failed + 1)); row "FAIL    $*"; }
finish() {
    trap - EXIT INT TERM
    echo
    echo "==== took $(($(date +%s) - started)) s"
    printf '%s\n' "${table[@]}"
    if [ $failed -eq 0 ]; then echo "gpu_check: all passed"; else echo "gpu_check: $failed failed"; fi
    [ $failed -eq 0 ]
    exit
}

PATH=$PATH:/usr/local/cuda/bin:/usr/local/nvidia/bin
command -v nvcc > /dev/null || { echo "gpu_check.sh: no nvcc on PATH, wanted the CUDA toolkit" >&2; exit 1; }
gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2> /dev/null | head -n 1)
[ -n "$gpu" ] || { echo "gpu_check.sh: nvidia-smi finds no GPU" >&2; exit 1; }
capability=$(awk -F, '{gsub(/[ .]/, "", $4); print $4}' <<< "$gpu")
case $capability in 90) arch=sm_90a ;; *) arch=sm_$capability ;; esac
mkdir -p build/log
trap finish EXIT
trap 'if [ -n "$job" ]; then kill "$job"; fi; fail "interrupted"; exit 1' INT TERM
row "gpu     $gpu; $(nvcc --version | grep -oE 'release [0-9.]+'); $arch; commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"

# run SECONDS LOG COMMAND...: within the limit and the deadline. 124: out of time; 125: there was none left.
run() {
    local seconds=$1 log=$2 rest
    shift 2
    rest=$(left)
    [ "$rest" -ge 8 ] || return 125
    [ "$rest" -lt "$seconds" ] && seconds=$rest
    timeout -k 3 "$seconds" "$@" > "$log" 2>&1 < /dev/null &
    job=$!
    wait "$job"  # a signal ends the wait at once, not when the step is over
    local status=$?
    job=""
    if [ $status -eq 137 ]; then status=124; fi
    return $status
}
# check NAME SECONDS COMMAND...: a step of the tests, its last line in the table
check() {
    local name=$1 log status last
    log=build/log/gpu_${name//[^A-Za-z0-9_]/_}.log
    run "$2" "$log" "${@:3}"
    status=$?
    last=$(tail -n 1 "$log" 2> /dev/null)
    case $status in
        0) row "ok      $name: ${last:-done}" ;;
        124) fail "$name: out of its $2 s or of the deadline (see $log): $last" ;;
        125) row "skip    $name: no time left" ;;
        *) fail "$name: exit status $status: $last (see $log)"; grep -E '^FAIL|error|Error' "$log" | head -n 20 ;;
    esac
    return $status
}

# All at once: each is one compilation of train_mta.cu, and the machine has cores for them.
build() {
    rm -f "${@:2}"
    check "build $1" 200 make -s -k -j8 NVCC_ARCH="$arch" "${@:2}"
}
run_tests() {
    rm -f build/*cuda*.o
    build tests train_mta train_mta_cuda test_mta_cuda build/train_mta_cuda_fp32 build/test_mta_cuda_fp32 build/test_flash_cuda
    [ -x build/test_flash_cuda ] && check "fused attention" 45 build/test_flash_cuda
    [ -x test_mta_cuda ] && check "test_mta_cuda bf16" 60 ./test_mta_cuda
    [ -x build/test_mta_cuda_fp32 ] && check "test_mta_cuda fp32" 60 build/test_mta_cuda_fp32
    local golden=(--golden dev/golden/full.safetensors dev/golden/diff.safetensors)
    [ -x test_mta_cuda ] && sanitize memcheck ./test_mta_cuda "${golden[@]}" && sanitize racecheck ./test_mta_cuda "${golden[@]}" &&
        [ -x build/test_flash_cuda ] && sanitize memcheck build/test_flash_cuda 130 && sanitize racecheck build/test_flash_cuda 130
    if [ ! -x train_mta ] || [ ! -x train_mta_cuda ] || [ ! -x build/train_mta_cuda_fp32 ]; then row "skip    runs: a program is missing"; return; fi
    check "runs" 100 env MTA_CUDA="$PWD/train_mta_cuda" MTA_CUDA_FP32="$PWD/build/train_mta_cuda_fp32" python3 dev/tests/test_cuda_run.py
}
# sanitize TOOL PROGRAM...: false if it refuses the device, so that the others need not be tried
sanitize() {
    local name="$1 of ${2##*/}" log=build/log/gpu_$1_${2##*/}.log refusal='^=====.*(not supported|unable to|refuse|failed to init|no attachable|error 999)'
    if ! command -v compute-sanitizer > /dev/null; then row "skip    compute-sanitizer: not here"; return 1; fi
    run 40 "$log" compute-sanitizer --tool "$1" --error-exitcode 9 "${@:2}"
    case $? in
        0) row "ok      compute-sanitizer $name: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1)" ;;
        124) row "skip    compute-sanitizer $name: over 40 s" ;;
        125) row "skip    compute-sanitizer $name: no time left" ;;
        *) if grep -qiE "$refusal" "$log"; then
               row "skip    compute-sanitizer refuses this device: $(grep -iE "$refusal" "$log" | head -n 1)"
               return 1
           fi
           fail "compute-sanitizer $name: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1) (see $log)"
           grep '=====' "$log" | head -n 20 ;;
    esac
}

# speed_row MODEL ATTENTION T: one row of cuda_step; the classes go to the screen and the log
speed_row() {
    local log=build/log/gpu_speed_$1_$2_$3.log
    run 75 "$log" build/cuda_step "$1" "$2" "$3" 0 4 --classes
    case $? in
        0) row "ours    $(grep -m 1 'tokens/s' "$log")"; grep -v 'tokens/s' "$log" ;;
        125) row "skip    ours $2 T $3: no time left" ;;
        *) fail "ours $2 T $3: $(tail -n 1 "$log")" ;;
    esac
}
# bench_rows TITLE PROGRAM: the attention of one layer alone, fused and chunked; every other kernel and product alone
bench_rows() {
    local log=build/log/gpu_$1.log line
    [ -x "$2" ] || return 0
    run 40 "$log" "$2"
    case $? in
        0) while IFS= read -r line; do row "$(printf '%-7s' "$1") $line"; done < <(tail -n +2 "$log") ;;
        125) row "skip    $1: no time left" ;;
        *) fail "$1: $(tail -n 1 "$log")" ;;
    esac
}
ratio() {  # tokens/s of the row that begins with $1 over that of $2; $3: what it is
    local a b
    a=$(printf '%s\n' "${table[@]}" | grep -E "^$1" | grep -oE '[0-9]+ tokens/s' | head -n 1 | cut -d' ' -f1)
    b=$(printf '%s\n' "${table[@]}" | grep -E "^$2" | grep -oE '[0-9]+ tokens/s' | head -n 1 | cut -d' ' -f1)
    if [ "${a:-0}" -gt 0 ] && [ "${b:-0}" -gt 0 ]; then row "ratio   $3: $(awk "BEGIN {printf \"%.2f\", $a / $b}")"; fi
}
run_speed() {
    local kind T
    build speed build/cuda_step build/attention_cuda build/kernels_cuda
    [ -x build/cuda_step ] || return
    for kind in mta transformer mta-full; do speed_row 880m $kind 2048; done
    bench_rows layer build/attention_cuda
    run_torch
    for kind in mta transformer mta-full; do speed_row 880m $kind 4096; done
    bench_rows kernel build/kernels_cuda
    for kind in talking-heads diff; do for T in 2048 4096; do speed_row 880m $kind $T; done; done
    for T in 2048 4096; do ratio "ours    mta +T $T" "ours    transformer +T $T" "mta over transformer, T $T"; done
    for kind in transformer mta mta-full; do ratio "ours    $kind +T 2048" "torch   $kind +T 2048" "$kind over PyTorch, T 2048"; done
}
run_torch() {
    local candidate kind log=build/log/gpu_torch.log torch_end=$(($(date +%s) + 120)) rest found=""
    for candidate in "$python" data/.venv/bin/python python3 /usr/bin/python3; do
        if [ -n "$candidate" ] && timeout 30 "$candidate" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null; then found=$candidate; break; fi
    done
    if [ -z "$found" ]; then row "skip    PyTorch: none with CUDA here"; return 0; fi
    for kind in mta transformer mta-full; do
        rest=$((torch_end - $(date +%s)))
        if [ "$rest" -lt 15 ]; then row "skip    PyTorch $kind: its two minutes are over"; continue; fi
        if run "$rest" "$log" "$found" dev/bench/torch_gpu.py $kind 2048 4 10; then row "torch   $(tail -n 1 "$log")"
        else row "skip    PyTorch $kind: $(tail -n 1 "$log" | cut -c1-120)"; fi
    done
}

if [ "$part" != speed ]; then
    if [ "$part" = all ]; then deadline=$((started + limit - 220)); fi
    run_tests
fi
deadline=$((started + limit))
if [ "$part" != tests ]; then run_speed; fi
finish
