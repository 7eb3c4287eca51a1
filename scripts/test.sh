#!/usr/bin/env bash
# test.sh: builds everything and runs every test, on a machine with or without a GPU, with or without the CUDA toolkit.
#
# Usage: scripts/test.sh [--check] [--long] [--no-install] [--only TEXT]
#   --check        the quick tests alone, in about a minute and a half (make check); installs nothing
#   --long         also what takes long: the tests of train_mta and infer_mta as programs under the sanitizers; the
#                  kernels under the address sanitizer, and their undefined behaviour; operations in another order of
#                  threads at all shapes instead of one; test_mta without CBLAS in optimised code (else under the
#                  sanitizers alone), and without OpenMP; 300 random models on the emulator instead of 24; a million
#                  inputs for the fuzzers instead of 10,000; a million strings for the tokenizer; every system call and
#                  allocation, and many kills, as faults; train_mta and test_mta for aarch64 in optimised code; races in
#                  random models, and in fused attention of two sequences of 74 with heads of 128; nvcc for other
#                  architectures and what it made for them
#   --no-install   installs nothing: what is missing is said and left out
#   --only TEXT    the tests whose name contains TEXT, and what they need
#
# On Debian and Ubuntu it installs what it needs (as root, or through sudo): compilers, make, OpenBLAS, Open MPI, MPICH,
# Python, clang, a cross compiler and an emulator for aarch64; and the virtual environments data/.venv and dev/.venv
# (PyTorch and others to compare with: minutes and 4 GB the first time). What cannot run here is skipped with its
# reason. Prints seconds of the clock and of processors for each step. Ends with "N passed, N failed[, N skipped]"; the
# exit status is the verdict.
set -u
unset CDPATH
cd "$(dirname "$(realpath "$0")")/.." || exit 1
install=1 only="" mode=full
while [ $# -gt 0 ]; do
    case $1 in
        --check) mode=check install=0 ;;
        --long) mode=long ;;
        --no-install) install=0 ;;
        --only)
            only=${2:-}
            shift
            [ -n "$only" ] || { echo "test.sh: --only: the text is missing; --help lists all" >&2; exit 1; } ;;
        -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' scripts/test.sh; exit 0 ;;
        *) echo "test.sh: unknown option $1; --help lists all" >&2; exit 1 ;;
    esac
    shift
done
passed=0 failed=0 skipped=0 reasons=() failures=() seconds_of=() processor_seconds=0
mkdir -p build/log
started=$SECONDS
cores=$(nproc)
export OMP_WAIT_POLICY=passive  # threads that wait sleep: many tests share few cores
STEP_SECONDS=1200               # a step that hangs fails instead of holding up all others; the longest takes 100 s
[ "$mode" != long ] || STEP_SECONDS=14400  # --long: the longest took 71 minutes beside other work
trap 'echo "interrupted"; kill $(jobs -p) 2> /dev/null; wait; exit 130' INT TERM

# ---- steps: a name, the programs it needs (targets of make), its command

names=() targets=() commands=()

# A step of these runs: check (--check alone), both (--check and else), full (all but --check), long (--long alone).
step() {
    local runs=$1 name=$2 needs=$3
    shift 3
    case $mode:$runs in
        check:check | check:both | full:both | full:full | long:both | long:full | long:long) ;;
        *) return 0 ;;
    esac
    [[ -z $only || $name == *"$only"* ]] || return 0
    names+=("$name") targets+=("$needs") commands+=("$(printf '%q ' "$@")")
}

# Of --check what it would run itself: `skip REASON check`.
skip() {
    [[ ($mode != check || ${2:-} = check) && (-z $only || $1 == *"$only"*) ]] || return 0
    skipped=$((skipped + 1)) reasons+=("$1")
    echo "skip  $1"
}

log_of() { echo "build/log/${1//[^A-Za-z0-9_.-]/_}.log"; }

# run NAME COMMAND: into build/log/NAME.log; exit status, seconds of the clock and of processors (user and system) into
# NAME.log.status, which is there when the step has ended.
run() {
    local log status began=$SECONDS TIMEFORMAT='%U %S'
    log=$(log_of "$1")
    rm -f "$log.status"
    trap 'kill "$!"; wait "$!"; exit' TERM  # timeout has a process group of its own, which nothing else would end
    { time { timeout -k 10 "$STEP_SECONDS" bash -c "$2" > "$log" 2>&1 < /dev/null & wait "$!"; }; } 2> "$log.time"
    status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then echo "stopped after $STEP_SECONDS s" >> "$log"; fi
    echo "$status $((SECONDS - began)) $(tail -n 1 "$log.time" | awk '{ printf "%.0f", $1 + $2 }')" > "$log.new"
    mv "$log.new" "$log.status"
}

# report NAME: counts what was run. A last line "N passed, N failed[, N skipped]" gives the counts; without one the exit
# status is one test.
report() {
    local name=$1 log line status seconds processors p f s
    log=$(log_of "$name")
    read -r status seconds processors < "$log.status"
    line=$(grep -aE '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    if [ -n "$line" ]; then
        read -r p f s < <(sed -E 's/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?.*/\1 \2 \4/' <<< "$line")
        if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi
    else
        p=$((status == 0)) f=$((status != 0)) s=0
    fi
    s=${s:-0}
    if [ "$p$f$s" = 000 ]; then f=1; fi  # where nothing was tested, nothing is right
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s)) seconds_of+=("$seconds $name")
    processor_seconds=$((processor_seconds + processors))
    if [ "$s" -gt 0 ]; then
        while IFS= read -r why; do reasons+=("$name: $why"); done < \
            <(grep -aiE 'skip' "$log" | grep -avE '^[0-9]+ passed|^OK|^FAILED' | sort -u | head -n 8)
    fi
    printf '%-5s %-38s %5d passed %3d failed %3d skipped %5d s, of processors %4d s\n' \
        "$([ "$f" -eq 0 ] && echo ok || echo FAIL)" "$name" "$p" "$f" "$s" "$seconds" "$processors"
    if [ "$f" -gt 0 ]; then
        failures+=("$name")
        echo "---- the end of $log"
        tail -n 40 "$log"
        echo "----"
    fi
}

running=()
report_ended() {
    local name still=()
    for name in "${running[@]}"; do
        if [ -e "build/log/${name//[^A-Za-z0-9_.-]/_}.log.status" ]; then report "$name"; else still+=("$name"); fi
    done
    running=("${still[@]}")
}

# What takes longest begins first, builds and steps, so that no core is left alone with one of them at the end; what
# mostly waits begins beside the build.
FIRST_BUILT=(train_mta build/openmpi/train_mta build/mpich/train_mta nvcc_check build/races/test_mta_bf16)
FIRST=(test_start test_ranks.py test_ranks_cuda.py "emulator bf16" "PTX executed" test_cuda_run.py test_prepare.py
    test_run.py "emulator fp32" test_quickstart.py operations fuzz test_tokenizer.py test_aarch64.py "races golden"
    "test_mta without CBLAS, sanitizers" test_cudnn.py "races fused attention" "emulator many heads, order 7, asan")

# make_programs STEP...: makes what these steps need, each program once, and build/log/ready/STEP when a step has all.
make_programs() {
    local i goals=" " needed=" ${targets[*]} " ready=build/log/ready
    for i in "${FIRST_BUILT[@]}"; do [[ $needed != *" $i "* ]] || goals+="$i "; done
    {
        echo "include Makefile"
        for i in "$@"; do printf '%s: %s\n\t@touch $@\n' "$ready/$i" "${targets[i]}"; done
        echo "programs:$goals$(printf "$ready/%s " "$@")"
    } > $ready.mk
    run build "make -k -j$cores WERROR=1 -f $ready.mk programs"
}

# Runs the steps side by side while their programs are made: one more than there are cores, since some of them wait. The
# build counts as one step for each core.
run_steps() {
    local i name order=() others=0
    for name in "${FIRST[@]}"; do
        for i in "${!names[@]}"; do [[ ${names[i]} != "$name" ]] || order+=("$i"); done
    done
    for i in "${!names[@]}"; do [[ " ${order[*]} " == *" $i "* ]] || order+=("$i"); done
    for name in build "${names[@]}"; do rm -f "$(log_of "$name").status"; done
    if [ -n "${targets[*]// /}" ]; then
        rm -rf build/log/ready && mkdir build/log/ready  # before the first look: those of the last run mean nothing
        make_programs "${order[@]}" &
        running=(build)
    fi
    while [ ${#running[@]} -gt 0 ] || [ ${#order[@]} -gt 0 ]; do
        others=0
        if [ "${running[0]:-}" = build ]; then others=$((cores - 1)); fi
        for i in "${!order[@]}"; do
            if [ $((${#running[@]} + others)) -gt "$cores" ]; then break; fi
            name=${names[order[i]]}
            if [ "${running[0]:-}" = build ] && [ ! -e "build/log/ready/${order[i]}" ]; then continue; fi
            running+=("$name")
            run "$name" "${commands[order[i]]}" &
            unset "order[i]"
        done
        sleep 0.1
        report_ended
    done
}

# ---- what the machine needs

as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi; }
has() { command -v "$1" > /dev/null; }
compiles() { echo "$1" | "$2" -x c - -o /dev/null "${@:3}" 2> /dev/null; }  # libraries behind what needs them
has_aarch64() { has aarch64-linux-gnu-gcc && compiles '#include <stdio.h>
int main(void){return 0;}' aarch64-linux-gnu-gcc && has qemu-aarch64; }

install_packages() {
    local need=() missing=() package
    has gcc || need+=(gcc libc6-dev)
    has g++ || need+=(g++)
    has make || need+=(make)
    has pkg-config || need+=(pkg-config)
    has clang || need+=(clang)
    # Debian 13 has none of these
    has gcc-8 || has gcc-9 || has gcc-10 || has gcc-11 || ! apt-cache show gcc-11 > /dev/null 2>&1 || need+=(gcc-11)
    compiles 'int main(void){return cblas_sgemm == 0;}' gcc -include cblas.h \
        $(pkg-config --cflags --libs openblas 2> /dev/null) -lopenblas || need+=(libopenblas-dev)
    compiles 'int main(void){return dnnl_version == 0;}' gcc -include oneapi/dnnl/dnnl.h -ldnnl ||
        need+=(libdnnl-dev)
    compiles 'int main(void){return 0;}' clang -fopenmp || need+=(libomp-dev)
    ! has clang || compiles 'int LLVMFuzzerTestOneInput(void){return 0;}' clang -fsanitize=fuzzer,address ||
        need+=("$(clang_runtime)")
    has python3 || need+=(python3)
    python3 -c 'import ensurepip' 2> /dev/null || need+=(python3-venv)
    has mpicc.openmpi || need+=(libopenmpi-dev openmpi-bin)
    has mpicc.mpich || need+=(libmpich-dev mpich)
    { has slurmctld && has slurmd && has srun; } || need+=(slurm-wlm)
    has ip || need+=(iproute2)
    has_aarch64 || need+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)
    [ ${#need[@]} -eq 0 ] && return 0
    echo "installing ${need[*]}"
    as_root apt-get update -qq > build/log/apt.log 2>&1
    apt_install "${need[@]}" && return 0
    # One that is unknown here must not keep the others out
    for package in "${need[@]}"; do apt_install "$package" || missing+=("$package"); done
    [ ${#missing[@]} -eq 0 ] ||
        echo "could not install ${missing[*]}: see build/log/apt.log; going on with what is here"
}
apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" \
        >> build/log/apt.log 2>&1
}

# The package that holds clang's sanitizer and fuzzer runtimes, by clang's own version.
clang_runtime() {
    local version
    version=$(clang --version 2> /dev/null | grep -oE 'version [0-9]+' | grep -oE '[0-9]+')
    echo "libclang-rt-$version-dev"
}

# make_venv FOLDER: the environment FOLDER/.venv with the packages of FOLDER/requirements.txt. A copy of that file in it
# says that all are there; an environment that was left half made, or is of other requirements, is completed.
make_venv() {
    local folder=$1 log=build/log/venv_$1.log python=$1/.venv/bin/python torch
    cmp -s "$folder/requirements.txt" "$folder/.venv/requirements.txt" && "$python" -c "" 2> /dev/null && return 0
    echo "making $folder/.venv of $folder/requirements.txt$([ "$folder" = dev ] && echo ' (PyTorch: minutes)')"
    "$python" -m pip --version > "$log" 2>&1 || python3 -m venv --clear "$folder/.venv" >> "$log" 2>&1 || return 1
    local pip="$python -m pip install -q --disable-pip-version-check"
    if [ "$folder" = dev ] && ! "$python" -c "import torch" 2> /dev/null; then
        # Without CUDA it is a tenth of the size, where the index has such a one.
        torch=$("$python" -c 'import sys; print("2.15.0" if sys.version_info >= (3, 11) else "2.8.0")')
        $pip "torch==$torch+cpu" >> "$log" 2>&1
    fi
    $pip -r "$folder/requirements.txt" >> "$log" 2>&1 && cp "$folder/requirements.txt" "$folder/.venv/"
}

# no_venv FOLDER: says why there is none.
no_venv() { echo "$1/.venv lacks packages of $1/requirements.txt: $(tail -n 1 "build/log/venv_$1.log" 2> /dev/null)"; }

if [ $install -eq 1 ]; then
    if ! has apt-get; then echo "no apt-get here: using what is installed"
    elif [ "$(id -u)" -ne 0 ] && ! sudo -n true 2> /dev/null; then echo "not root and no sudo: using what is installed"
    else
        install_packages
        has clang && install_packages  # again: clang's runtimes carry the version of the clang just installed
    fi
    make_venv data || no_venv data
    make_venv dev || no_venv dev
fi
# A python3 that is a script which looks for the real one (pyenv's) takes 0.1 s of a core at each start.
real=$(python3 -c 'import sys; print(sys.executable)' 2> /dev/null)
[ "$real" = "$(command -v python3)" ] || PATH=${real%/*}:$PATH
python=python3 compare=""
if [ $mode != check ]; then
    [ -x data/.venv/bin/python ] && python=data/.venv/bin/python
    dev/.venv/bin/python -c 'import torch, numpy' 2> /dev/null && compare=dev/.venv/bin/python
    [ -n "$compare" ] || skip "comparisons with PyTorch, transformers and lm_eval: dev/.venv lacks them"
fi

# ---- the steps

# The Python tests drive the programs. Those that compare with PyTorch and its kin run in dev/.venv, as one step.
EMULATED="build/train_mta_cuda_cpu build/train_mta_cuda_cpu_fp32"
compared=()
python_step() {
    local source=dev/tests/$1 runs=full built="train_mta infer_mta test_mta"
    local kin='^ *(import|from) (torch|transformers|tokenizers|safetensors|lm_eval|tensorboard)\b'
    if [ -n "$compare" ] && grep -qE "$kin" "$source"; then
        [[ -n $only && $1 != *"$only"* ]] || compared+=("$source")
        return
    fi
    case $1 in test_help.py | test_layout.py) runs=both ;; *) built+=" $EMULATED" ;; esac
    if [ "$1" = test_launchers.py ]; then built+=$ranked; fi
    if [ "$1" = test_cuda_run.py ]; then built+=" test_mta_cuda_cpu_bf16"; fi
    step $runs "$1" "$built" "$python" "$source"
}
# The CPU trainer on several processes, by each MPI that is here.
ranked=""
for mpi in openmpi mpich; do
    if has mpicc.$mpi && has mpirun.$mpi; then ranked+=" build/$mpi/train_mta"; fi
done
ranks_step() {
    if [ -z "$ranked" ]; then skip "$1: no MPI (mpicc.openmpi or mpicc.mpich)"; return; fi
    step full "$1" "train_mta$ranked build/faults.so" "$python" "dev/tests/$1"
    step long "$1 --long" "train_mta$ranked build/faults.so" "$python" "dev/tests/$1" --long
}
if has python3; then
    for source in dev/tests/test_*.py; do
        name=$(basename "$source")
        case $name in test_ranks.py) ranks_step "$name" ;; *) python_step "$name" ;; esac
    done
    if [ ${#compared[@]} -gt 0 ]; then
        name=${compared[*]#dev/tests/}
        FIRST=("$name" "${FIRST[@]}")
        step full "$name" "train_mta infer_mta test_mta" "$compare" dev/tests/with_torch.py "${compared[@]}"
    fi
    step check "infer_mta gives the golden logits, and the trainer's" "infer_mta test_mta" \
        python3 dev/tests/test_infer.py -k test_logits_of_every_position -k trainers_forward
    step check "a run with resume" train_mta python3 dev/tests/test_run.py -k ten_and_ten
    [ -z "$compare" ] ||
        step full "reference writes the golden cases" "" "$compare" dev/ref/make_golden.py --check dev/golden
else
    skip "Python tests: no python3 here" check
fi

# The CUDA source, executed on the CPU: orders of threads, the address sanitizer, every access watched for races.
ASAN="env ASAN_OPTIONS=detect_leaks=0"
step full "emulator bf16" test_mta_cuda_cpu_bf16 ./test_mta_cuda_cpu_bf16 --models 24
step full "emulator fp32" test_mta_cuda_cpu ./test_mta_cuda_cpu --models 12
asan=build/asan/test_mta_cuda_cpu_bf16
step long "emulator many heads, order 7, asan" $asan $ASAN CUDA_CPU_ORDER=7 $asan --only "many heads" --models 6
step long "emulator models, order 1, asan" $asan $ASAN CUDA_CPU_ORDER=1 $asan --only "random models" --models 14
step long "emulator golden, order 1, asan" $asan $ASAN CUDA_CPU_ORDER=1 $asan --only golden
step long "races models" build/races/test_mta_bf16 \
    env CUDA_CPU_ORDER=7 build/races/test_mta_bf16 --only "random models" --models 10
step full "races golden" build/races/test_mta_bf16 build/races/test_mta_bf16 --only golden
step check "emulator golden cases" test_mta_cuda_cpu_bf16 ./test_mta_cuda_cpu_bf16 --only golden
step full "emulator, device memory guarded" test_mta_cuda_cpu_bf16 \
    env CUDA_CPU_GUARD=1 ./test_mta_cuda_cpu_bf16 --only golden
step check "emulator ten models" test_mta_cuda_cpu_bf16 ./test_mta_cuda_cpu_bf16 --only "random models" --models 10
step check "emulator many heads" test_mta_cuda_cpu_bf16 ./test_mta_cuda_cpu_bf16 --only "many heads" --models 10
step full "operations" build/test_ops build/test_ops
step full "operations fp32" build/test_ops_fp32 build/test_ops_fp32
step full "operations, order 7, device memory guarded" build/test_ops \
    env CUDA_CPU_GUARD=1 CUDA_CPU_ORDER=7 build/test_ops --quick
# There cuDNN has no engine for the three cases of values wider than 128, and test_ops leaves them out.
step full "operations by cuDNN, as on an A100" build/test_ops bash -c 'export CUDA_CPU_CAPABILITY=80
    said=$(build/test_ops --only cuDNN) && [ "$(grep -c "has no engine for this on this GPU" <<< "$said")" = 3 ]'
step full "races operations" build/races/test_ops build/races/test_ops --quick
step full "races fused attention" build/races/test_ops build/races/test_ops --only "attention fused" --longest 71
step full "the emulator itself" build/test_emulator build/test_emulator
step full "the stand-in for NCCL itself" build/test_nccl env ASAN_OPTIONS=detect_leaks=0 build/test_nccl
step full "the emulator itself, races" build/test_races build/test_races
step full "the interpreter of PTX itself" build/test_ptx build/test_ptx
if has nvcc; then
    step full "PTX executed" ptx "$python" dev/ptx_cpu/check.py
    step long "PTX executed, --long" ptx_long "$python" dev/ptx_cpu/check.py --long
    step full nvcc nvcc_check make WERROR=1 nvcc_check
    step long "nvcc, other architectures" "build/nvcc/sm_80.o build/nvcc/sm_100.o" \
        make WERROR=1 build/nvcc/sm_80.o build/nvcc/sm_100.o
else
    skip "nvcc: no CUDA toolkit here"
fi
if ! has nvidia-smi || ! nvidia-smi > /dev/null 2>&1; then
    skip "GPU tests: no GPU here (scripts/gpu_check.sh runs them)"
fi

# C.
step full "test_mta without CBLAS, sanitizers" build/asan/test_mta $ASAN OMP_NUM_THREADS=2 build/asan/test_mta
step both "test_mta" test_mta ./test_mta
for source in dev/tests/test_*.c; do
    name=$(basename "$source" .c)
    step both "$name" "build/$name" "build/$name"
done
step both "headers in C11 and C++17" "" make header_check
if has python3; then
    step full "faults: system calls" "train_mta infer_mta build/faults.so" python3 dev/faults/faults.py calls
    step full "faults: kills" "train_mta build/faults.so" python3 dev/faults/faults.py kills
    step full "faults: memory" "train_mta infer_mta build/faults.so" python3 dev/faults/faults.py memory
fi
step full "fuzz" "" bash dev/fuzz/run.sh 10000
step full "benches in C" "" gcc -std=gnu11 -I. -Wall -Werror -Wno-unused-function -Wno-psabi -fopenmp -fsyntax-only \
    dev/bench/cpu_step.c dev/bench/infer_step.c dev/bench/random_model.c
if has clang; then
    openmp=-fopenmp
    compiles 'int main(void){return 0;}' clang -fopenmp || openmp=-Wno-unknown-pragmas
    step full "clang" "" \
        clang -std=gnu11 -march=native -Wall -Wextra -Werror $openmp -fsyntax-only train_mta.c infer_mta.c test_mta.c
else
    skip "clang: none here"
fi

# Older compilers, of which each lacks a builtin that the next one has.
older=0
for old in gcc-8 gcc-9 gcc-10 gcc-11; do
    has $old || continue
    older=1
    step full $old "" $old -std=gnu11 -march=native -Wall -Wextra -Wno-psabi -Werror -fopenmp -fsyntax-only \
        train_mta.c infer_mta.c
done
[ $older -eq 1 ] || skip "older compilers: none of gcc-8 to gcc-11 here"

# What takes long. --help names it.
undefined=build/undefined/test_mta_cuda_cpu_bf16
for order in "7 many heads" "1 random models" "1 golden"; do
    step long "emulator ${order#* }, undefined behaviour" $undefined \
        $ASAN CUDA_CPU_ORDER="${order%% *}" $undefined --only "${order#* }" --models 14
done
step long "test_mta without CBLAS" test_mta_nocblas ./test_mta_nocblas
step long "test_mta without OpenMP" build/one_thread/test_mta build/one_thread/test_mta
step long "train_mta, sanitizers" build/asan/train_mta $ASAN MTA_BIN=build/asan "$python" dev/tests/test_run.py
step long "infer_mta, sanitizers" "build/asan/infer_mta build/asan/train_mta" \
    $ASAN MTA_BIN=build/asan "$python" dev/tests/test_infer.py
step long "operations, order 7, all shapes" build/test_ops env CUDA_CPU_ORDER=7 build/test_ops --longest 200
step long "races fused attention, T 74" build/races/test_ops build/races/test_ops --only "attention fused" --longest 74
step long "emulator 300 models" test_mta_cuda_cpu_bf16 ./test_mta_cuda_cpu_bf16 --only "models" --models 300
if has python3; then step long "aarch64, optimised" "train_mta infer_mta" python3 dev/tests/test_aarch64.py --long; fi
step long "tokenizer, a million strings" "" "$python" dev/tests/test_tokenizer.py --full
[ -z "$compare" ] ||
    step long "export, 100,000 strings" infer_mta "$compare" dev/tests/test_export.py --long -k test_ids
[ -z "$compare" ] || step long "steps of 60 models" train_mta "$compare" dev/tests/test_steps.py --long
step long "prepare.py, more kills" train_mta "$python" dev/tests/test_prepare.py --full
step long "fuzz, a million inputs" "" bash dev/fuzz/run.sh 1000000
step long "faults: every system call" "train_mta infer_mta build/faults.so" python3 dev/faults/faults.py calls --long
step long "faults: every call, CUDA trainer" "build/train_mta_cuda_cpu build/faults.so" \
    env TRAINER=build/train_mta_cuda_cpu python3 dev/faults/faults.py calls --long --programs trainer
step long "faults: 2,000 kills" "train_mta build/faults.so" python3 dev/faults/faults.py kills --count 2000
step long "faults: every allocation" "train_mta infer_mta build/faults.so" python3 dev/faults/faults.py memory --long

if [ ${#names[@]} -eq 0 ]; then echo "test.sh: no test's name contains \"$only\"" >&2; exit 1; fi
run_steps

# ---- verdict

echo
slowest=$(printf '%s\n' "${seconds_of[@]}" | sort -rn | head -n 5 | sed -E 's/^([0-9]+) (.*)/\2 \1 s/' | paste -sd,)
echo "took $((SECONDS - started)) s, $processor_seconds s of processors; the slowest: ${slowest//,/, }"
if [ ${#reasons[@]} -gt 0 ]; then printf 'skipped: %s\n' "${reasons[@]}"; fi
if [ ${#failures[@]} -gt 0 ]; then printf 'FAILED: %s\n' "${failures[@]}"; fi
echo "$passed passed, $failed failed$([ "$skipped" -eq 0 ] || echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
