#!/usr/bin/env bash
# scripts/gpu_check.sh [--part tests|speed] [--python PYTHON]: tests train_mta.cu and measures its speed on the GPU of
# this machine, in at most 9 minutes. The table comes last, also after Ctrl-C or SIGTERM. It needs nvcc. It uses
# compute-sanitizer and a PyTorch with CUDA if they are there. If the toolkit lacks cuBLAS or cuDNN, it takes them from
# the Python packages that PyTorch came with.
#
#   tests   every operation alone; test_mta_cuda in bf16 and fp32; compute-sanitizer's memcheck and racecheck on tiny
#           shapes; runs (resume, checkpoints from CPU to GPU and back)
#   speed   steps of 880m at T 2048 and 4096 for each attention: tokens/s, MFU, memory, and where the time goes; the
#           same model in PyTorch
# The table names what was left out for lack of time or tools. Exit status 1 if a test failed or a step did not run.
set -u
unset CDPATH
export LC_ALL=C  # figures with a decimal point, in every locale
cd "$(dirname "$(realpath "$0")")/.." || exit 1
part=all python=""
while [ $# -gt 0 ]; do
    case $1 in
        --part) part=${2:?--part needs tests or speed}; shift ;;
        --python) python=${2:?--python needs a program}; shift ;;
        -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' scripts/gpu_check.sh; exit 0 ;;
        *) echo "usage: scripts/gpu_check.sh [--part tests|speed] [--python PYTHON]" >&2; exit 1 ;;
    esac
    shift
done
case $part in
    all | tests | speed) ;;
    *)
        echo "gpu_check.sh: --part: got $part, wanted tests or speed" >&2
        exit 1 ;;
esac

# Every step has a limit of its own, and none goes on beyond `deadline`: 520 s for everything, of which the tests leave
# the speed at least 220 s.
started=$(date +%s)
limit=${GPU_CHECK_SECONDS:-520}
deadline=$((started + limit))
left() { echo $((deadline - $(date +%s))); }
table=() failed=0 job=""
row() { table+=("$*"); echo "$*"; }
fail() { failed=$((failed + 1)); row "FAIL    $*"; }
finish() {
    trap - EXIT INT TERM
    jobs -rp | xargs -r kill 2> /dev/null
    echo
    echo "==== took $(($(date +%s) - started)) s"
    printf '%s\n' "${table[@]}"
    if [ $failed -eq 0 ]; then echo "gpu_check: all passed"; else echo "gpu_check: $failed failed"; fi
    [ $failed -eq 0 ]
    exit
}

PATH=$PATH:/usr/local/cuda/bin:/usr/local/nvidia/bin
export OMP_WAIT_POLICY=passive  # the tests share the cores: threads that wait sleep
command -v nvcc > /dev/null || { echo "gpu_check.sh: no nvcc on PATH, wanted the CUDA toolkit" >&2; exit 1; }
# The GPU that CUDA takes: the first that is visible; of different ones the most capable, which is made the visible one.
# Both count them by their place in the machine.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
visible=${CUDA_VISIBLE_DEVICES-all} of=()
case $visible in
    all | MIG-*) ;;
    GPU-*-*-*-*-* | [0-9]*) of=(-i "${visible%%,*}") ;;
    GPU-*) ;;  # nvidia-smi knows no abbreviations
    *) echo "gpu_check.sh: CUDA_VISIBLE_DEVICES, '$visible', hides all GPUs" >&2; exit 1 ;;
esac
ask() { nvidia-smi "${of[@]}" --query-gpu="$1" --format=csv,noheader 2> /dev/null; }
gpu=$(ask name,driver_version,memory.total,compute_cap)
best=$(awk -F, '{gsub(/[ .]/, "", $4)} $4 + 0 > most + 0 {most = $4 + 0; at = NR} END {print at ? at : 1}' <<< "$gpu")
if [ "$visible" = all ] && [ "$best" -gt 1 ]; then
    export CUDA_VISIBLE_DEVICES=$((best - 1))
    of=(-i "$CUDA_VISIBLE_DEVICES")
fi
gpu=$(sed -n "${best}p" <<< "$gpu")
capability=$(awk -F, '{gsub(/[ .]/, "", $4); print $4}' <<< "$gpu")
case $capability in  # nvidia-smi prints its errors where others print results
    "" | *[!0-9]*) echo "gpu_check.sh: nvidia-smi finds no GPU${gpu:+: $gpu}" >&2; exit 1 ;;
esac
if [ "$capability" -lt 80 ]; then
    echo "gpu_check.sh: $gpu: wanted a compute capability of 8.0 or more (bf16)" >&2
    exit 1
fi
case $capability in 90) arch=sm_90a ;; *) arch=sm_$capability ;; esac
loader=${LD_LIBRARY_PATH:-}  # for PyTorch, which finds its own libraries, of other versions maybe
mkdir -p build/log
trap finish EXIT
trap 'fail "interrupted"; exit 1' INT TERM
commit=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
row "gpu     $gpu; $(nvcc --version | grep -oE 'release [0-9.]+'); $arch; commit $commit"
exclusive=$(ask compute_mode | head -n 1 | grep Exclusive)
if [ -n "$exclusive" ]; then row "note    compute mode $exclusive: the tests run one after another"; fi
mig=$(ask mig.mode.current | head -n 1 | grep Enabled)
if [ -n "$mig" ]; then row "note    MIG: what is measured is a part of this GPU"; fi
gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU')
if [ "$gpus" -gt 1 ]; then row "note    $gpus GPUs here: scripts/ranks_check.sh compares all of them with one"; fi

# start SECONDS LOG COMMAND...: in the background, as $job, within the limit and the deadline; 125: there was no time
# left, and no log, also none of an earlier call
start() {
    local seconds=$1 log=$2 rest
    shift 2
    rm -f "$log"
    rest=$(left)
    [ "$rest" -ge 8 ] || return 125
    [ "$rest" -lt "$seconds" ] && seconds=$rest
    timeout -k 3 "$seconds" "$@" > "$log" 2>&1 < /dev/null &
    job=$!
}
# ended JOB: its exit status; 124: out of time. A signal ends the wait at once, not when the step is over. A process
# that hangs inside of the driver cannot be killed: it is left behind, five seconds after the deadline.
ended() {
    local status
    while kill -0 "$1" 2> /dev/null; do
        [ "$(left)" -gt -5 ] || return 124
        sleep 0.1
    done
    wait "$1"
    status=$?
    if [ $status -eq 137 ]; then status=124; fi
    return $status
}
run() { start "$@" && ended "$job"; }

# begin REPORT NAME SECONDS COMMAND...: a step of the tests, beside those begun before it, or alone where the GPU takes
# one process at a time, as the administrators of clusters set it (compute mode); collect: waits for all, and
# reports each by `REPORT STATUS NAME SECONDS LOG`, in the order in which they were begun.
steps=()
begin() {
    local log=build/log/gpu_${2//[^A-Za-z0-9_]/_}.log pid=0
    if start "$3" "$log" "${@:4}"; then pid=$job; fi
    steps+=("$pid $1 $3 $log $2")
    if [ -n "$exclusive" ]; then collect; fi
}
collect() {
    local step pid report seconds log name status
    for step in "${steps[@]}"; do
        read -r pid report seconds log name <<< "$step"
        status=125
        if [ "$pid" -ne 0 ]; then ended "$pid"; status=$?; fi
        "$report" "$status" "$name" "$seconds" "$log"
    done
    steps=()
}
verdict() {  # the last line of the step in the table
    local last
    last=$(tail -n 1 "$4" 2> /dev/null)
    case $1 in
        0) row "ok      $2: ${last:-done}" ;;
        124) fail "$2: out of its $3 s or of the deadline (see $4): $last" ;;
        125) row "skip    $2: no time left" ;;
        *)
            fail "$2: exit status $1: $last (see $4)"
            { grep -E '^FAIL|error|Error' "$4" | head -n 20; tail -n 3 "$4"; } | awk '!seen[$0]++' ;;
    esac
}
sanitizer() {  # the same of compute-sanitizer, which may refuse the device
    local summary refusal='^=====.*(not supported|unable to|refuse|failed to init|no attachable|error 999)'
    summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$4" 2> /dev/null | tail -n 1)
    case $1 in
        0)
            if [ -n "$summary" ]; then
                row "ok      $2: $summary"
            else
                row "skip    $2: it says of nothing that it was checked: $(tail -n 1 "$4")"
            fi ;;
        124) row "skip    $2: over $3 s" ;;
        125) row "skip    $2: no time left" ;;
        *)
            if grep -qiE "$refusal" "$4"; then
                row "skip    $2: it refuses this device: $(grep -iE "$refusal" "$4" | head -n 1)"
                return
            fi
           fail "$2: exit status $1: ${summary:-$(tail -n 1 "$4")} (see $4)"
           grep '=====' "$4" | head -n 20 ;;
    esac
}
# sanitize TOOL PROGRAM...: our kernels alone, not those of cuDNN and cuBLAS, whose names may hold "_kernel" as ours do;
# and no failing calls: cuBLAS asks the driver for functions that it may not have
sanitize() {
    local options=(--tool "$1" --error-exitcode 9 --kernel-name kns=_kernel) theirs
    for theirs in cudnn cublas cutlass gemm gemv splitK; do  # an option each: only these are documented to add up
        options+=(--kernel-name-exclude "kns=$theirs")
    done
    if [ "$1" = memcheck ]; then options+=(--report-api-errors no); fi
    begin sanitizer "compute-sanitizer $1 of ${2##*/}" 150 compute-sanitizer "${options[@]}" "${@:2}"
}

# The folders nvidia of Python packages, in which PyTorch's libraries are: nvidia/cu13, nvidia/cublas, nvidia/cudnn
packages() {
    local candidate
    for candidate in "$python" data/.venv/bin/python python3 /usr/bin/python3; do
        [ -n "$candidate" ] && "$candidate" -c 'import nvidia; print(*nvidia.__path__, sep="\n")' 2> /dev/null
    done | sort -u
}
# Where the toolkit has no cuBLAS that can be linked: the packages', under the names that the linker looks for.
find_cublas() {
    local header library
    echo 'int main() { return cublasGetStatusString(CUBLAS_STATUS_SUCCESS) == 0; }' |
        nvcc -include cublas_v2.h -x c++ - -lcublas -o build/log/gpu_cublas > build/log/gpu_cublas.log 2>&1 && return
    for header in $(packages | while IFS= read -r home; do find "$home" -maxdepth 3 -name cublas_v2.h; done); do
        mkdir -p build/cublas
        for library in "${header%/include/*}"/lib/libcublas*.so.*; do
            ln -sf "$library" build/cublas/
            ln -sf "$library" "build/cublas/$(basename "${library%.so.*}").so"
        done
        export CPATH="${CPATH:+$CPATH:}${header%/*}" LIBRARY_PATH="${LIBRARY_PATH:+$LIBRARY_PATH:}$PWD/build/cublas"
        row "note    the toolkit links no cuBLAS: that of ${header%/include/*} is taken"
        return
    done
    row "note    the toolkit links no cuBLAS, and no Python package has one: $(tail -n 1 build/log/gpu_cublas.log)"
}
# With cuDNN where the Makefile, or else a package, has one that is new enough.
cudnn_version() {
    awk '$2 == "CUDNN_MAJOR" {a = $3} $2 == "CUDNN_MINOR" {b = $3} END {print 100 * a + b}' \
        "$1/include/cudnn_version.h" 2> /dev/null
}
find_cudnn() {
    local home
    for home in $(printf 'include Makefile\nfound:\n\t@echo $(CUDNN_HOME)\n' |
        make -s --no-print-directory -f - found 2> /dev/null) $(packages | sed 's:$:/cudnn:'); do
        if [ "$(cudnn_version "$home")" -ge 916 ] 2> /dev/null; then
            cudnn=$home
            return
        fi
    done
}
# The toolkit's libraries, and those that were found elsewhere, for programs that do not find theirs.
find_libraries() {
    ldd "$@" 2> /dev/null | grep -q 'not found' || return
    LD_LIBRARY_PATH=${loader:+$loader:}$PWD/build/cublas:$(dirname "$(command -v nvcc)")/../lib64
    export LD_LIBRARY_PATH
}
# All at once: each is one compilation of train_mta.cu, and the machine has cores for them. Where cuDNN is in the way,
# once more without it.
build() {
    local programs=() missing=0 program
    if [ "$part" != speed ]; then
        programs+=(train_mta train_mta_cuda test_mta_cuda build/train_mta_cuda_fp32 build/test_mta_cuda_fp32
                   build/test_ops_cuda)
    fi
    if [ "$part" != tests ]; then programs+=(build/cuda_step build/test_ops_cuda); fi
    rm -f "${programs[@]}" build/*cuda*.o
    begin verdict "build${cudnn:+ with cuDNN}" 200 \
        make -s -k -j8 NVCC_ARCH="$arch" ${cudnn:+CUDNN=1 CUDNN_HOME="$cudnn"} "${programs[@]}"
    collect
    for program in "${programs[@]}"; do [ -x "$program" ] || missing=1; done
    if [ $missing -eq 1 ] && [ -n "$cudnn" ]; then
        cudnn=""
        build
        return
    fi
    find_libraries "${programs[@]}"
}
# Beside one another: most of each is the start of processes and the CPU's own answers. The sanitizers, which slow the
# GPU for all, come after.
run_tests() {
    local golden=(--golden dev/golden/full.safetensors dev/golden/diff.safetensors) tool
    if [ -x build/test_ops_cuda ]; then begin verdict "operations" 150 build/test_ops_cuda; fi
    if [ -x test_mta_cuda ]; then begin verdict "test_mta_cuda bf16" 150 ./test_mta_cuda; fi
    if [ -x build/test_mta_cuda_fp32 ]; then begin verdict "test_mta_cuda fp32" 150 build/test_mta_cuda_fp32; fi
    if [ ! -x train_mta ] || [ ! -x train_mta_cuda ] || [ ! -x build/train_mta_cuda_fp32 ]; then
        row "skip    runs: a program is missing"
    else
        begin verdict runs 220 env MTA_CUDA="$PWD/train_mta_cuda" MTA_CUDA_FP32="$PWD/build/train_mta_cuda_fp32" \
            python3 dev/tests/test_cuda_run.py
    fi
    collect
    if ! command -v compute-sanitizer > /dev/null; then row "skip    compute-sanitizer: not here"
    else
        for tool in memcheck racecheck; do
            if [ -x test_mta_cuda ]; then sanitize $tool ./test_mta_cuda "${golden[@]}"; fi
            if [ -x build/test_ops_cuda ]; then sanitize $tool build/test_ops_cuda --longest 130; fi
        done
    fi
    collect
}

# predicted ATTENTION T: tokens/s of 880m by dev/SPEED.md's table, where it has this GPU: those named so by PCIe and NVL
# are slower, parts of one too, and a GH200 has another memory
predicted() {
    local column
    case $mig$gpu in
        Enabled* | *PCIe* | *NVL* | *GH200*) return 0 ;;
        *H100*) column=4 ;;
        *H200*) column=5 ;;
        *) return 0 ;;
    esac
    sed -n '/^| predicted /,/^$/p' dev/SPEED.md |
        awk -F' *[|] *' -v kind="\`$1\`" -v T="$2" -v column=$column \
            '$2 == kind && $3 == T {print "; predicted " $column}'
}
# speed_row MODEL ATTENTION T [--cudnn]: one row of cuda_step; the classes go to the screen and the log
speed_row() {
    local log=build/log/gpu_speed_$1_$2_$3${4:-}.log
    run 90 "$log" build/cuda_step "$1" "$2" "$3" 0 4 ${4:+"$4"} --classes
    local status=$?
    if grep -q '^[a-z-]* *T .*tokens/s' "$log" 2> /dev/null; then
        row "ours    $(grep -m 1 '^[a-z-]* *T .*tokens/s' "$log")$([ -n "${4:-}" ] || predicted "$2" "$3")"
    fi  # also what it had when its time was over
    case $status in
        0) grep -v 'tokens/s' "$log" ;;
        125) row "skip    ours $2 T $3${4:+ $4}: no time left" ;;
        *)
            if grep -q 'has no engine for this' "$log"; then  # cuDNN's answer on GPUs other than Hopper
                row "skip    ours $2 T $3${4:+ $4}: $(tail -n 1 "$log")"
            else
                fail "ours $2 T $3${4:+ $4}: $(tail -n 1 "$log")"
            fi ;;
    esac
}
# bench_rows TITLE TEXT: what operations whose name contains TEXT cost: the attention of one layer alone, fused and
# chunked; every other kernel; products
bench_rows() {
    local log=build/log/gpu_$1.log line
    [ -x build/test_ops_cuda ] || return 0
    run 40 "$log" build/test_ops_cuda perf --only "$2"
    case $? in
        0) ;;
        125) row "skip    $1: no time left"; return ;;
        *) fail "$1: $(tail -n 1 "$log")" ;;
    esac
    while IFS= read -r line; do
        row "$(printf '%-7s' "$1") $line"
    done < <(tail -n +2 "$log")  # also what there was when the time was over
}
ratio() {  # tokens/s of the row that begins with $1 over that of $2; $3: what it is
    local a b
    a=$(printf '%s\n' "${table[@]}" | grep -E "^$1" | grep -oE '[0-9]+ tokens/s' | head -n 1 | cut -d' ' -f1)
    b=$(printf '%s\n' "${table[@]}" | grep -E "^$2" | grep -oE '[0-9]+ tokens/s' | head -n 1 | cut -d' ' -f1)
    if [ "${a:-0}" -gt 0 ] && [ "${b:-0}" -gt 0 ]; then row "ratio   $3: $(awk "BEGIN {printf \"%.2f\", $a / $b}")"; fi
}
run_speed() {
    local kind T
    [ -x build/cuda_step ] || return
    for kind in mta transformer mta-full; do speed_row 880m $kind 2048; done
    if [ -z "$cudnn" ]; then
        row "skip    attention by cuDNN: none of 9.16 or later that builds was found"
    else
        for kind in mta transformer; do speed_row 880m $kind 2048 --cudnn; done
    fi
    bench_rows layer attention
    run_torch
    for kind in mta transformer mta-full; do speed_row 880m $kind 4096; done
    bench_rows kernel kernel
    bench_rows matmul product
    for kind in talking-heads diff; do for T in 2048 4096; do speed_row 880m $kind $T; done; done
    for T in 2048 4096; do ratio "ours    mta +T $T" "ours    transformer +T $T" "mta over transformer, T $T"; done
    for kind in transformer mta mta-full; do
        ratio "ours    $kind +T 2048" "torch   $kind +T 2048" "$kind over PyTorch, T 2048"
    done
}
# The first Python whose PyTorch sees a GPU, into this file: looked for while the programs are built, since the first
# import reads gigabytes. Where the script ends before the search, a signal ends this and the Python that it waits for.
torch_python=build/log/gpu_torch_python
find_torch() {
    local candidate
    trap 'kill $! 2> /dev/null; exit' TERM
    for candidate in "$python" data/.venv/bin/python python3 /usr/bin/python3; do
        [ -n "$candidate" ] || continue
        LD_LIBRARY_PATH=$loader timeout -k 3 150 "$candidate" -c 'import torch; assert torch.cuda.is_available()' \
            2> /dev/null &
        if wait $!; then
            echo "$candidate"
            return
        fi
    done
}
run_torch() {
    local kind log found rest torch_end=$(($(date +%s) + 120))
    if kill -0 "$torch_job" 2> /dev/null; then row "skip    PyTorch: none was found in time"; return 0; fi
    found=$(cat "$torch_python")
    if [ -z "$found" ]; then row "skip    PyTorch: none with CUDA here"; return 0; fi
    for kind in mta transformer mta-full; do
        rest=$((torch_end - $(date +%s)))
        if [ "$rest" -lt 15 ]; then row "skip    PyTorch $kind: its two minutes are over"; continue; fi
        log=build/log/gpu_torch_$kind.log
        run "$rest" "$log" env LD_LIBRARY_PATH="$loader" "$found" dev/bench/torch_gpu.py $kind 2048 4 10 ||
            [ $? -ne 125 ] || echo "no time left" > "$log"
        if grep -q 'tokens/s' "$log"; then
            row "torch   $(grep 'tokens/s' "$log" | tail -n 1)"  # also what it had when its time was over
        else
            row "skip    PyTorch $kind: $(tail -n 1 "$log" | cut -c1-120)"
        fi
    done
}

cudnn=""
if [ "$part" != tests ]; then find_torch > "$torch_python" & torch_job=$!; fi
find_cublas
find_cudnn
build
if [ "$part" != speed ]; then
    if [ "$part" = all ]; then deadline=$((started + limit - 220)); fi
    run_tests
fi
deadline=$((started + limit))
if [ "$part" != tests ]; then run_speed; fi
finish
