#!/usr/bin/env bash
# scripts/test.sh [--no-install] [--only TEXT]
#
# Builds everything and runs every test, on a machine with or without a GPU, with or without the CUDA toolkit. Installs what it needs on
# Debian and Ubuntu (as root, or through sudo): a C compiler, make, OpenBLAS, Python, clang; and a virtual environment data/.venv.
# What cannot run here is skipped with its reason. Ends with "N passed, N failed, N skipped" and fails if anything failed.
set -u
cd "$(dirname "$0")/.." || exit 1
install=1 only=""
while [ $# -gt 0 ]; do
    case $1 in
        --no-install) install=0 ;;
        --only) only=${2:?--only needs a text}; shift ;;
        *) echo "usage: scripts/test.sh [--no-install] [--only TEXT]" >&2; exit 1 ;;
    esac
    shift
done
passed=0 failed=0 skipped=0 reasons=() failures=()
mkdir -p build/log
start=$(date +%s)
export OMP_WAIT_POLICY=passive  # threads that wait sleep: many tests share few cores

skip() { skipped=$((skipped + ${2:-1})); reasons+=("$1"); echo "skip  $1"; }

trap 'echo "interrupted"; kill $(jobs -p) 2> /dev/null; exit 130' INT TERM  # runs when the step at work has ended
STEP_SECONDS=1200  # a step that hangs fails instead of holding up all others; the longest takes about 150 s on two cores of their own

log_of() { echo "build/log/${1//[^A-Za-z0-9_.-]/_}.log"; }
chosen() { [[ -z $only || $1 == *"$only"* ]]; }

# run NAME COMMAND...: into build/log/NAME.log; exit status and seconds into NAME.log.status.
run() {
    local log status began
    log=$(log_of "$1")
    began=$(date +%s)
    shift
    timeout -k 10 "$STEP_SECONDS" "$@" > "$log" 2>&1 < /dev/null
    status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then echo "stopped after $STEP_SECONDS s" >> "$log"; fi
    echo "$status $(($(date +%s) - began))" > "$log.status"
}

# report NAME: counts what was run. A last line "N passed, N failed[, N skipped]" (or unittest's own report) gives the counts; otherwise the
# exit status is one test.
report() {
    local name=$1 log line status seconds counts
    log=$(log_of "$name")
    read -r status seconds < "$log.status"
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    if [ -n "$line" ]; then
        read -r p f s < <(sed -E 's/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?.*/\1 \2 \4/' <<< "$line")
        if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi
    elif counts=$(grep -E '^Ran [0-9]+ tests?' "$log" | tail -n 1) && [ -n "$counts" ]; then
        p=$(awk '{print $2}' <<< "$counts")
        f=$(tail -n 3 "$log" | grep -oE '(failures|errors)=[0-9]+' | awk -F= '{n += $2} END {print n + 0}')
        s=$(tail -n 3 "$log" | grep -oE 'skipped=[0-9]+' | awk -F= '{n += $2} END {print n + 0}')
        p=$((p - f - s))
        if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi
    else
        p=$((status == 0)) f=$((status != 0)) s=0
    fi
    s=${s:-0}
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    if [ "$s" -gt 0 ]; then
        while IFS= read -r why; do reasons+=("$name: $why"); done < <(grep -iE 'skip' "$log" | grep -vE '^[0-9]+ passed|^OK|^FAILED' | sort -u | head -n 8)
    fi
    printf '%-5s %-34s %4d passed %3d failed %3d skipped  %4ds\n' "$([ "$f" -eq 0 ] && echo ok || echo FAIL)" "$name" "$p" "$f" "$s" "$seconds"
    if [ "$f" -gt 0 ]; then
        failures+=("$name")
        echo "---- the end of $log"
        tail -n 40 "$log"
        echo "----"
    fi
    return 0
}

step() { if chosen "$1"; then run "$@"; report "$1"; fi; }

# For programs of one thread that send no signals: beside NAME COMMAND... starts one, as many at once as there are cores; `meet` waits for
# all of them and reports them in their order.
side=()
beside() {
    chosen "$1" || return 0
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    side+=("$1")
    run "$@" &
}
meet() {
    local name
    wait
    for name in "${side[@]}"; do report "$name"; done
    side=()
}

# ---- what the machine needs

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi; }

install_packages() {
    local need=()
    command -v gcc > /dev/null || need+=(gcc libc6-dev)
    command -v g++ > /dev/null || need+=(g++)
    command -v make > /dev/null || need+=(make)
    command -v pkg-config > /dev/null || need+=(pkg-config)
    command -v clang > /dev/null || need+=(clang)
    echo 'int main(void){return cblas_sgemm == 0;}' | gcc -include cblas.h -x c - $(pkg-config --cflags --libs openblas 2> /dev/null) -lopenblas -o /dev/null 2> /dev/null || need+=(libopenblas-dev)
    echo 'int main(void){return 0;}' | clang -fopenmp -x c - -o /dev/null 2> /dev/null || need+=(libomp-dev)
    echo 'int LLVMFuzzerTestOneInput(void){return 0;}' | clang -fsanitize=fuzzer,address -x c - -o /dev/null 2> /dev/null || need+=("$(clang_runtime)")
    command -v python3 > /dev/null || need+=(python3)
    python3 -c 'import ensurepip' 2> /dev/null || need+=(python3-venv)
    [ ${#need[@]} -eq 0 ] && return 0
    echo "installing ${need[*]}"
    as_root apt-get update -qq > build/log/apt.log 2>&1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >> build/log/apt.log 2>&1 ||
        echo "could not install all of ${need[*]}: see build/log/apt.log; going on with what is here"
}

# The package that holds clang's sanitizer and fuzzer runtimes, by clang's own version.
clang_runtime() {
    local version
    version=$(clang --version 2> /dev/null | grep -oE 'version [0-9]+' | grep -oE '[0-9]+')
    echo "libclang-rt-${version:-14}-dev"
}

make_venv() {
    [ -x data/.venv/bin/python ] || python3 -m venv data/.venv || return 1
    data/.venv/bin/python -c 'import numpy, tiktoken, zstandard, tqdm, pyarrow, matplotlib' 2> /dev/null && return 0
    data/.venv/bin/python -m pip install -q --disable-pip-version-check -r data/requirements.txt
}

if [ $install -eq 1 ]; then
    if ! command -v apt-get > /dev/null; then echo "no apt-get here: using what is installed"
    elif [ "$(id -u)" -ne 0 ] && ! sudo -n true 2> /dev/null; then echo "not root and no sudo: using what is installed"
    else install_packages; command -v clang > /dev/null && install_packages; fi  # twice: clang's runtimes carry the version of the clang just installed
    if ! make_venv > build/log/venv.log 2>&1; then echo "no virtual environment with the packages of data/requirements.txt: see build/log/venv.log"; fi
fi
python=python3
[ -x data/.venv/bin/python ] && python=data/.venv/bin/python
torch_python=""
for candidate in "$python" /usr/bin/python3 python3; do
    if "$candidate" -c 'import torch, numpy' 2> /dev/null; then torch_python=$candidate; break; fi
done

# ---- build

step "build gcc" make -j2 train_mta infer_mta test_mta test_mta_nocblas WERROR=1
if command -v clang > /dev/null; then
    clang_openmp="-fopenmp"
    echo 'int main(void){return 0;}' | clang -fopenmp -x c - -o /dev/null 2> /dev/null || clang_openmp="-Wno-unknown-pragmas"
    for program in train_mta infer_mta test_mta; do
        step "build clang $program" clang -std=gnu11 -O1 -march=native -Wall -Wextra -Werror $clang_openmp -c $program.c -o build/clang_$program.o
    done
else
    skip "build clang: no clang here" 3
fi
step "headers in C11 and C++17" make header_check

# ---- the C tests

step "test_mta" ./test_mta
step "test_mta without CBLAS" ./test_mta_nocblas
step "build sanitizers" make -j2 build/asan/test_mta build/asan/train_mta build/asan/infer_mta
beside "test_mta sanitizers" env ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 build/asan/test_mta  # its models are too small for two cores
for source in dev/tests/test_*.c; do
    name=$(basename "$source" .c)
    step "build $name" make WERROR=1 "build/$name"
    step "$name" "build/$name"
done
step "fuzz" bash dev/fuzz/run.sh 20000
meet

# ---- the CUDA source: on the CPU, and through nvcc

if [ -f train_mta.cu ]; then
    step "build emulator" make -j2 build/test_emulator build/test_flash test_mta_cuda_cpu test_mta_cuda_cpu_bf16 build/train_mta_cuda_cpu \
        build/train_mta_cuda_cpu_fp32 build/asan/test_mta_cuda_cpu_bf16 build/test_races build/races/test_flash build/races/test_mta_bf16
    beside "emulator many heads order 7" env ASAN_OPTIONS=detect_leaks=0 CUDA_CPU_ORDER=7 build/asan/test_mta_cuda_cpu_bf16 --only "many heads" --models 6
    beside "test_mta_cuda_cpu" ./test_mta_cuda_cpu
    beside "test_mta_cuda_cpu_bf16" ./test_mta_cuda_cpu_bf16
    beside "emulator models order 1" env ASAN_OPTIONS=detect_leaks=0 CUDA_CPU_ORDER=1 build/asan/test_mta_cuda_cpu_bf16 --only "random models" --models 14
    beside "emulator golden order 1" env ASAN_OPTIONS=detect_leaks=0 CUDA_CPU_ORDER=1 build/asan/test_mta_cuda_cpu_bf16 --only golden
    beside "races fused attention" build/races/test_flash 74
    beside "races golden" build/races/test_mta_bf16 --only golden
    beside "races models" env CUDA_CPU_ORDER=7 build/races/test_mta_bf16 --only "random models" --models 10
    beside "fused attention" build/test_flash
    beside "fused attention order 7" env CUDA_CPU_ORDER=7 build/test_flash
    beside "emulator" build/test_emulator
    beside "emulator races" build/test_races
    meet
    if command -v nvcc > /dev/null; then
        step "nvcc" make -j2 nvcc_check
    else
        skip "nvcc: no CUDA toolkit here"
    fi
    if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then
        echo "a GPU is here: scripts/gpu_check.sh tests it"
    else
        skip "GPU tests: no GPU here (scripts/gpu_check.sh runs them)"
    fi
fi

# ---- the Python tests: they drive the programs

if command -v python3 > /dev/null; then
    beside test_cuda_run.py "$python" dev/tests/test_cuda_run.py  # the longest, of one thread
    for source in dev/tests/test_*.py; do
        runner=$python
        case $source in
            *test_cuda_run.py) continue ;;
            *test_convert.py | *test_infer.py) runner=${torch_python:-$python} ;;  # parts of these compare with PyTorch
        esac
        step "$(basename "$source")" "$runner" "$source"
    done
    meet
    if [ -n "$torch_python" ]; then
        step "reference writes the golden cases" "$torch_python" dev/ref/make_golden.py --check dev/golden
    else
        skip "reference writes the golden cases: no PyTorch here (apt-get install python3-torch python3-numpy)"
    fi
else
    skip "Python tests: no python3 here" "$(ls dev/tests/test_*.py | wc -l)"
fi

# ---- verdict

echo
echo "took $(($(date +%s) - start)) s"
if [ ${#reasons[@]} -gt 0 ]; then printf 'skipped: %s\n' "${reasons[@]}"; fi
if [ ${#failures[@]} -gt 0 ]; then printf 'FAILED: %s\n' "${failures[@]}"; fi
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
