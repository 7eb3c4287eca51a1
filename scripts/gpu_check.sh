#!/usr/bin/env bash
# scripts/gpu_check.sh [--part tests|speed] [--python PYTHON]: tests and speed of train_mta.cu on the GPU of this machine, at most 9 minutes,
# the table last. Needs nvcc; compute-sanitizer and a PyTorch with CUDA are used where they are.
#
#   tests   test_mta_cuda in bf16 and fp32, runs (resume, checkpoints that change sides), compute-sanitizer's memcheck and racecheck on tiny shapes
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

started=$(date +%s)
limit=${GPU_CHECK_SECONDS:-530}                  # of wall clock, for everything
left() { echo $((limit - ($(date +%s) - started))); }
table=() failed=0
row() { table+=("$*"); echo "$*"; }
fail() { failed=$((failed + 1)); row "FAIL  $*"; }

command -v nvcc > /dev/null || { echo "gpu_check.sh: no nvcc on PATH, wanted the CUDA toolkit" >&2; exit 1; }
gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2> /dev/null | head -n 1)
[ -n "$gpu" ] || { echo "gpu_check.sh: nvidia-smi finds no GPU" >&2; exit 1; }
capability=$(echo "$gpu" | awk -F, '{gsub(/[ .]/, "", $4); print $4}')
case $capability in 90) arch=sm_90a ;; 100) arch=sm_100 ;; *) arch=sm_$capability ;; esac
mkdir -p build/log
row "gpu     $gpu; $(nvcc --version | grep -oE 'release [0-9.]+'); $arch; commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"

# check NAME SECONDS COMMAND...: a step of the tests, its last line in the table
check() {
    local name=$1 seconds=$2 log status rest
    shift 2
    rest=$(left)
    if [ "$rest" -lt 10 ]; then row "skip    $name: no time left"; return 0; fi
    [ "$rest" -lt "$seconds" ] && seconds=$rest
    log=build/log/gpu_${name//[^A-Za-z0-9_]/_}.log
    timeout "$seconds" "$@" > "$log" 2>&1 < /dev/null
    status=$?
    if [ $status -eq 124 ]; then fail "$name: over $seconds s (see $log)"; return 1; fi
    if [ $status -ne 0 ]; then fail "$name: $(tail -n 1 "$log") (see $log)"; grep -E '^FAIL|error' "$log" | head -n 20; return 1; fi
    row "ok      $name: $(tail -n 1 "$log" | sed "s/^$/done/")"
}

run_tests() {
    check "build bf16" 200 make -s -j4 NVCC_ARCH="$arch" train_mta train_mta_cuda test_mta_cuda || return
    check "test_mta_cuda bf16" 120 ./test_mta_cuda
    cp train_mta_cuda build/gpu_train_bf16
    cp test_mta_cuda build/gpu_test_bf16
    rm -f build/train_mta_cuda.o
    check "build fp32" 200 make -s -B NVCC_ARCH="$arch" PRECISION=FP32 build/train_mta_cuda.o && make -s NVCC_ARCH="$arch" PRECISION=FP32 test_mta_cuda > /dev/null 2>&1
    cp test_mta_cuda build/gpu_test_fp32
    check "test_mta_cuda fp32" 120 build/gpu_test_fp32
    nvcc -std=c++17 -O3 -arch="$arch" -Xcompiler -fopenmp -DPRECISION_FP32 train_mta.cu -o build/gpu_train_fp32 -lcublas 2> /dev/null
    check "runs" 120 env MTA_CUDA="$PWD/build/gpu_train_bf16" MTA_CUDA_FP32="$PWD/build/gpu_train_fp32" python3 dev/tests/test_cuda_run.py
    rm -f build/train_mta_cuda.o test_mta_cuda  # of the other precision
    cp build/gpu_test_bf16 test_mta_cuda
    if ! command -v compute-sanitizer > /dev/null; then row "skip    compute-sanitizer: not here"; return; fi
    for tool in memcheck racecheck; do
        local log=build/log/gpu_$tool.log
        if [ "$(left)" -lt 20 ]; then row "skip    $tool: no time left"; continue; fi
        timeout 60 compute-sanitizer --tool $tool --error-exitcode 9 build/gpu_test_bf16 --golden dev/golden/full.safetensors dev/golden/diff.safetensors > "$log" 2>&1
        case $? in
            0) row "ok      compute-sanitizer $tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1)" ;;
            124) row "skip    compute-sanitizer $tool: over 60 s" ;;
            9) fail "compute-sanitizer $tool: see $log"; grep '=====' "$log" | head -n 20 ;;
            *) if grep -qiE 'not supported|unable|refus|failed to init|no attachable' "$log"; then row "skip    compute-sanitizer $tool refuses this device: $(grep -iE 'not supported|unable|refus|failed to init|no attachable' "$log" | head -n 1)"
               else fail "compute-sanitizer $tool: $(tail -n 1 "$log")"; fi ;;
        esac
    done
}

# speed_row ARGS...: one row of cuda_step; the classes go to the log and the screen
speed_row() {
    local log=build/log/gpu_speed_$1_$2_$3.log rest
    rest=$(left)
    if [ "$rest" -lt 25 ]; then row "skip    $2 T $3: no time left"; return 0; fi
    if timeout $((rest < 90 ? rest : 90)) build/cuda_step "$1" "$2" "$3" 0 4 --classes > "$log" 2>&1; then
        row "ours    $(head -n 1 "$log")"
        tail -n +2 "$log"
    else
        fail "ours $2 T $3: $(tail -n 1 "$log")"
    fi
}
ratio() {  # tokens/s of the row that matches $1 over that of $2
    local a b
    a=$(printf '%s\n' "${table[@]}" | grep -E "^$1" | grep -oE '[0-9]+ tokens/s' | head -n 1 | cut -d' ' -f1)
    b=$(printf '%s\n' "${table[@]}" | grep -E "^$2" | grep -oE '[0-9]+ tokens/s' | head -n 1 | cut -d' ' -f1)
    [ -n "$a" ] && [ -n "$b" ] && row "ratio   $3: $(awk "BEGIN {printf \"%.2f\", $a / $b}")"
}

run_speed() {
    check "build cuda_step" 200 make -s NVCC_ARCH="$arch" build/cuda_step || return
    for kind in transformer mta mta-full; do speed_row 880m $kind 2048; done
    run_torch
    for kind in transformer mta mta-full; do speed_row 880m $kind 4096; done
    for kind in talking-heads diff; do for T in 2048 4096; do speed_row 880m $kind $T; done; done
    ratio "ours    mta  .* T 2048" "ours    transformer .* T 2048" "mta over transformer, T 2048"
    ratio "ours    mta  .* T 4096" "ours    transformer .* T 4096" "mta over transformer, T 4096"
    for kind in transformer mta mta-full; do ratio "ours    $kind  *T 2048" "torch   $kind  *T 2048" "$kind over PyTorch, T 2048"; done
}
run_torch() {
    local candidate log=build/log/gpu_torch.log torch_end=$(($(date +%s) + 120)) rest
    for candidate in "$python" data/.venv/bin/python python3 /usr/bin/python3; do
        [ -n "$candidate" ] && "$candidate" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null && { python=$candidate; break; }
        [ "$candidate" = /usr/bin/python3 ] && { row "skip    PyTorch: none with CUDA here"; return 0; }
    done
    for kind in mta transformer mta-full; do
        rest=$((torch_end - $(date +%s)))
        if [ "$rest" -lt 15 ]; then row "skip    PyTorch $kind: its two minutes are over"; continue; fi
        if timeout "$rest" "$python" dev/bench/torch_gpu.py $kind 2048 4 10 > "$log" 2>&1; then row "torch   $(tail -n 1 "$log")"
        else row "skip    PyTorch $kind: $(tail -n 1 "$log" | cut -c1-120)"; fi
    done
}

[ "$part" = speed ] || run_tests
[ "$part" = tests ] || run_speed

echo
echo "==== took $(($(date +%s) - started)) s"
printf '%s\n' "${table[@]}"
[ $failed -eq 0 ] && echo "gpu_check: all passed" || echo "gpu_check: $failed failed"
[ $failed -eq 0 ]
