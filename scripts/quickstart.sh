#!/usr/bin/env bash
# quickstart.sh: from a fresh clone to two results in about three minutes on two cores, and the time that
# missing packages take.
#   1. the paper's toy task at a small size: a plain Transformer against Multi-Token Attention (MTA), three seeds
#   2. a byte-level MTA language model of English text, and a sample of it
#
# Usage: scripts/quickstart.sh [--no-install] [--text FILE] [--out DIR] [--tiny]
#   --no-install   installs nothing: neither Debian packages nor Python ones; what is missing is said and left out
#   --text FILE    the text to learn; default: the Python language reference and the licences that every Debian or
#                  Ubuntu has
#   --out DIR      where everything goes; default: runs/quickstart. A second call continues there what a first one did
#                  not finish.
#   --tiny         a few steps of everything: shows that it works, not what it finds
#
# On Debian and Ubuntu it installs what is missing of gcc, make, python3, python3-venv and libopenblas-dev (through
# sudo, if you are not root), and numpy and matplotlib into data/.venv for the pictures. Nothing else outside of this
# folder is touched.
set -euo pipefail
unset CDPATH
caller=$(pwd -P)
cd "$(dirname "$(realpath "$0")")/.."
# A file as the caller named it, seen from here.
from_here() {
    case $1 in
        '' | /*) echo "$1" ;;
        *) if [ "$caller" = "$PWD" ]; then echo "$1"; else echo "$caller/$1"; fi ;;
    esac
}

# The toy task: N = 4 letters a block, 8 blocks, the question asks for the first letter; 2 layers of 2 heads, dim 64.
TOY_N=4 TOY_BLOCKS=8 TOY_KIND=first TOY_SEEDS="1 2 3" TOY_STEPS=600 TOY_BATCH=64 TOY_TESTS=1000
TOY_MODEL=(--model toy --hidden-size 64 --num-hidden-layers 2 --num-attention-heads 2 --num-key-value-heads 2
           --intermediate-size 192
           --kq-conv-key-size $((2 * TOY_N - 1)) --lr 2e-3 --schedule constant --warmup 0 --weight-decay 0)
# The text model: bytes are tokens.
TEXT_STEPS=300 TEXT_BATCH=16 TEXT_WINDOWS=100
TEXT_MODEL=(--model 1m --attention mta --tokenizer bytes --seq-len 256 --lr 3e-3 --schedule linear --warmup 20)

install=yes text="" with_text=no out=runs/quickstart size=""
while [ $# -gt 0 ]; do
    case $1 in
        --no-install) install=no ;;
        --text) with_text=yes text=$(from_here "${2:-}"); shift ;;
        --text=*) with_text=yes text=$(from_here "${1#*=}") ;;
        --out) out=$(from_here "${2:-}"); shift ;;
        --out=*) out=$(from_here "${1#*=}") ;;
        --tiny) size=--tiny; TOY_STEPS=4 TOY_BATCH=8 TOY_TESTS=100 TEXT_STEPS=4 TEXT_BATCH=2 TEXT_WINDOWS=8 ;;
        -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' scripts/quickstart.sh; exit 0 ;;
        *) echo "quickstart.sh: unknown option $1; --help lists all" >&2; exit 1 ;;
    esac
    shift || { echo "quickstart.sh: the value of the last option is missing; --help lists all" >&2; exit 1; }
done

bold="" dim="" normal="" terminal=no
if [ -t 1 ] && [ "${TERM:-dumb}" != dumb ]; then
    terminal=yes
    if [ -z "${NO_COLOR:-}" ]; then bold=$'\033[1m' dim=$'\033[2m' normal=$'\033[0m'; fi
fi
started=$SECONDS
# Threads that wait sleep: on a machine that is busy with something else, waiting in a loop costs several times the
# whole run.
export OMP_WAIT_POLICY=passive
say() { echo "$*"; }
headline() { printf '\n%s%s%s  %s%d s%s\n' "$bold" "$*" "$normal" "$dim" $((SECONDS - started)) "$normal"; }
note() { echo "note: $*"; }
fail() { echo "quickstart.sh: $*" >&2; exit 1; }

if [ $with_text = yes ] && ! { [ -r "$text" ] && [ -f "$text" ]; }; then
    fail "--text: $text: no such file, or not readable"
fi
[ -n "$out" ] || fail "--out: the folder is missing"
mkdir -p "$out" 2> /dev/null && [ -w "$out" ] || fail "$out: cannot write there; choose a folder with --out"
# The data and the runs of one size are not those of the other.
if [ -d "$out/data" ] && [ "$(cat "$out/size" 2> /dev/null)" != "$size" ]; then
    fail "$out holds what a run with${size:+out} --tiny has begun; choose another folder with --out, or remove it"
fi
echo "$size" > "$out/size"

children=() watcher=""
# Ends the trainings, which save first.
stop() {
    trap '' INT TERM
    [ -z "$watcher" ] || kill "$watcher" 2> /dev/null || true
    [ ${#children[@]} -eq 0 ] || { kill "${children[@]}" 2> /dev/null || true; wait || true; }
    echo
    echo "quickstart.sh: stopped; the same command continues in $out" >&2
    exit 75
}
trap stop INT TERM

# ----------------------------------------------------------------------------------------------------------------------
headline "Tools"

has() { command -v "$1" > /dev/null 2>&1; }
compiles() { echo "$1" | ${CC:-gcc} $(pkg-config --cflags openblas 2> /dev/null) -E - > /dev/null 2>&1; }
missing_packages() {
    has ${CC:-gcc} || echo gcc
    compiles '#include <stdio.h>' || echo libc6-dev
    has make || echo make
    has python3 || echo python3
    python3 -c 'import ensurepip, venv' > /dev/null 2>&1 || echo python3-venv
    compiles '#include <cblas.h>' || echo libopenblas-dev
}
install_packages() {
    local sudo=""
    has apt-get || { note "no apt-get here: install these as your system does: $*"; return; }
    if [ "$(id -u)" != 0 ]; then
        has sudo || { note "not root and no sudo: ask for these packages: $*"; return; }
        sudo=sudo
        if ! sudo -n true 2> /dev/null && ! [ -t 0 ]; then
            note "sudo wants a password and there is no terminal: install these yourself: $*"
            return
        fi
    fi
    say "installing with apt-get${sudo:+ through sudo}: $*  ${dim}(log: $out/install.log)${normal}"
    local package options=(-y -q --no-install-recommends -o Acquire::Retries=1 -o Acquire::http::Timeout=15
                           -o DPkg::Lock::Timeout=60)
    apt_install() { $sudo env DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "$@"; }
    { $sudo apt-get update -q && apt_install "$@"; } > "$out/install.log" 2>&1 && return
    if grep -q -E 'Unable to locate|no installation candidate' "$out/install.log"; then
        # One that is unknown here must not keep the others out
        for package in "$@"; do
            apt_install "$package" >> "$out/install.log" 2>&1 || note "apt-get cannot install $package"
        done
    else
        note "apt-get failed (no network?): $(grep -m 1 -E '^E' "$out/install.log" || tail -n 1 "$out/install.log")"
    fi
}
packages=$(missing_packages | tr '\n' ' ')
if [ -n "$packages" ]; then
    if [ $install = no ]; then note "--no-install: going on without $packages"; else install_packages $packages; fi
fi
has ${CC:-gcc} && compiles '#include <stdio.h>' ||
    fail "no C compiler: install gcc and libc6-dev, then run this again"
has make || fail "no make: install it, then run this again"
has python3 || fail "no python3: install it, then run this again"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
    fail "python3 is $(python3 -V 2>&1), wanted 3.9 or later: a folder with such a python3 first on PATH will do"
# nproc does not know the quota of a container (docker --cpus).
cores=$(python3 -c 'import sys; sys.path.insert(0, "data"); import shards; print(shards.cores())') || exit 1
threads=$((cores > 2 ? cores / 2 : 1))   # of each of two trainings side by side
compiles '#include <cblas.h>' || note "no CBLAS: matrix products use the built-in loop, which is slower"

# A Python with numpy and matplotlib for the pictures: the system's, or data/.venv's. Made while the programs are built.
python=python3
find_plots() {
    local p
    for p in data/.venv/bin/python python3; do
        if "$p" -c 'import numpy, matplotlib' > /dev/null 2>&1; then python=$p; return 0; fi
    done
    return 1
}
make_venv() {
    { [ -x data/.venv/bin/python ] || python3 -m venv data/.venv; } &&
        data/.venv/bin/python -m pip install -q --disable-pip-version-check --timeout 15 --retries 1 numpy matplotlib
}
venv_job=""
if ! find_plots; then
    if [ $install = no ]; then
        note "--no-install: no matplotlib, so no pictures"
    else
        say "installing numpy and matplotlib into data/.venv"
        make_venv > "$out/venv.log" 2>&1 &
        venv_job=$!
        children+=("$venv_job")
    fi
fi

say "building train_mta and infer_mta with $cores core$([ "$cores" = 1 ] || echo s)"
make -j "$cores" train_mta infer_mta > "$out/build.log" 2>&1 || {
    tail -n 15 "$out/build.log" >&2
    fail "the build failed; its whole output is in $out/build.log"
}
if [ -n "$venv_job" ]; then
    wait "$venv_job" || true
    find_plots || note "numpy and matplotlib could not be installed, so no pictures: $(tail -n 1 "$out/venv.log")"
fi
children=()

# ----------------------------------------------------------------------------------------------------------------------
headline "Toy task: find the block that holds both letters, and name its first letter"
[ "$cores" -gt 1 ] || note "one core: this takes about twice as long as on two"

# The newest finished step of a run, 0 before the first.
step_of() {
    { tail -c 4000 "$1/log.jsonl" 2> /dev/null || true; } |
        sed -n -E 's/.*"event": *"step", *"step": *([0-9]+).*/\1/p' | tail -n 1 | grep . || echo 0
}
loss_of() {
    { tail -c 4000 "$1/log.jsonl" 2> /dev/null || true; } |
        sed -n -E 's/.*"event": *"step".*"loss": *([0-9.eE+-]+).*/\1/p' | tail -n 1 | cut -c 1-5
}
# Shows how far runs are until they end: one line that overwrites itself on a terminal, a line every ten seconds
# elsewhere. Runs as a process of its own (bash 5.2 fails if a signal comes while it expands a $(...), of which there
# are many here).
watch_runs() {  # STEPS LABEL RUN... ; children: their processes
    local steps=$1 label=$2 last=$SECONDS run line alive=yes
    shift 2
    trap - INT TERM
    while [ $alive = yes ]; do
        sleep 0.5
        alive=no
        for run in "${children[@]}"; do kill -0 "$run" 2> /dev/null && alive=yes; done
        line="$label"
        for run in "$@"; do
            line="$line  $(basename "$run" | sed 's/_[0-9]*$//') $(step_of "$run")/$steps loss $(loss_of "$run")"
        done
        if [ $terminal = yes ]; then
            printf '\r%s\033[K' "$line"
        elif [ $((SECONDS - last)) -ge 10 ]; then
            say "$line"
            last=$SECONDS
        fi
    done
    if [ $terminal = yes ]; then printf '\r\033[K'; fi
    say "$line"
}
# Waits for the children, shows their progress; ends the script with the last words of one that failed.
wait_runs() {  # STEPS LABEL RUN... in the order of children
    local i=0 status run
    watch_runs "$@" &
    watcher=$!
    shift 2
    for run in "$@"; do
        status=0
        wait "${children[$i]}" || status=$?
        if [ $status != 0 ]; then
            kill "$watcher" "${children[@]}" 2> /dev/null || true
            wait
            fail "a training failed with status $status: $(tail -n 1 "$run.txt")"
        fi
        i=$((i + 1))
    done
    wait "$watcher" || true
    children=() watcher=""
}

example=$(python3 data/toy_task.py --n $TOY_N --blocks $TOY_BLOCKS --kind $TOY_KIND --examples 1)
say "for example  $(sed 's/^^//; s/ / -> /' <<< "$example")"
task=$out/n${TOY_N}_$TOY_KIND
mkdir -p "$task"
for seed in $TOY_SEEDS; do
    data=$out/data/toy_$seed
    [ -f "$data/toy_task.json" ] || python3 data/toy_task.py --out "$data" --n $TOY_N --blocks $TOY_BLOCKS \
        --kind $TOY_KIND --train-samples $((TOY_STEPS * TOY_BATCH)) --test-samples $TOY_TESTS --seed "$seed" \
        > "$task/data.txt" 2>&1 ||
        fail "$(tail -n 1 "$task/data.txt")"
    length=$(sed -n 's/.*"length": \([0-9]*\).*/\1/p' "$data/toy_task.json")
    for kind in transformer mta; do
        OMP_NUM_THREADS=$threads ./train_mta "${TOY_MODEL[@]}" --attention $kind --tokenizer toy \
            --train "$data/toy_train_*.bin" --val "toy=$data/toy_val_*.bin" \
            --seq-len "$length" --batch-size $TOY_BATCH --steps $TOY_STEPS --eval-every 100 --eval-windows 0 \
            --save-every 0 --seed "$seed" --resume \
            --out "$task/${kind}_$seed" > "$task/${kind}_$seed.txt" 2>&1 &
        children+=($!)
        # Two at once need two cores.
        if [ "$cores" = 1 ]; then wait_runs $TOY_STEPS "seed $seed:" "$task/${kind}_$seed"; fi
    done
    if [ "$cores" -gt 1 ]; then wait_runs $TOY_STEPS "seed $seed:" "$task/transformer_$seed" "$task/mta_$seed"; fi
done
say
say "sequences with a wrong answer, of $TOY_TESTS that training never saw, after $TOY_STEPS steps:"
python3 scripts/toy_report.py "$task"
say "${dim}  (the paper: 4 layers, dim 256, sequences of up to 321 tokens, 100,000 steps;" \
    "here: 2 layers, dim 64, $length tokens, $TOY_STEPS steps)${normal}"

# ----------------------------------------------------------------------------------------------------------------------
headline "A language model of English text, byte by byte"

if [ -z "$text" ]; then
    text=$out/data/english.txt
    if ! [ -s "$text" ]; then
        mkdir -p "$out/data"
        # The language reference of Python, which comes with python3, then the licences of base-files (links to others
        # left out).
        python3 -c 'import pydoc_data.topics as t; print("\n\n".join(x.strip() for x in t.topics.values()))' \
            > "$text.partial" 2> /dev/null || true
        find /usr/share/common-licenses -type f 2> /dev/null | sort |
            while read -r f; do cat "$f"; done > "$text.licences" || true
        cat "$text.licences" >> "$text.partial"
        rm -f "$text.licences"
        [ "$(wc -c < "$text.partial")" -ge 100000 ] ||
            fail "found no English text on this machine; give some with --text FILE"
        mv "$text.partial" "$text"
        say "text: the Python language reference and the licences of this machine"
    fi
fi
say "$(wc -c < "$text") bytes of $text"
python3 data/prepare.py text "$text" --tokenizer bytes --out "$out/data/text" --name text \
    > "$out/data/text.txt" 2>&1 || fail "$(tail -n 1 "$out/data/text.txt")"
OMP_NUM_THREADS=$cores ./train_mta "${TEXT_MODEL[@]}" --batch-size $TEXT_BATCH --steps $TEXT_STEPS \
    --train "$out/data/text/text_train_*.bin" --val "text=$out/data/text/text_val_*.bin" --eval-every 50 \
    --eval-windows $TEXT_WINDOWS --save-every 0 --sample-every 0 --log-every 25 --seed 1 --resume --out "$out/text" ||
    fail "training on the text failed; with another --text, choose another --out too"
checkpoint=$(ls -d "$out"/text/step-* | sort | tail -n 1)
say
python3 - "$out/text/log.jsonl" << 'PYTHON'
import json, math, sys
val = [e for e in map(json.loads, open(sys.argv[1], "rb")) if e["event"] == "val"][-1]
print(f"validation: {val['loss'] / math.log(2):.3f} bits per byte after {val['step']} steps (8 without a model)")
PYTHON
say "a sample of $checkpoint:"
say
./infer_mta "$checkpoint" --prompt "The " --max-tokens 240 --temperature 0.7 --seed 1 ||
    note "no sample: infer_mta failed"
say

# ----------------------------------------------------------------------------------------------------------------------
headline "Where everything is"

if find_plots; then
    runs=()
    for seed in $TOY_SEEDS; do runs+=("transformer=$task/transformer_$seed"); done
    for seed in $TOY_SEEDS; do runs+=("mta=$task/mta_$seed"); done
    "$python" scripts/plot_run.py "${runs[@]}" --out "$out/toy_curves.png" \
        --title "Toy task: N = $TOY_N, $TOY_BLOCKS blocks, $TOY_KIND letter; three seeds" &&
        "$python" scripts/plot_kernels.py "$task/mta_1" --out "$out/toy_kernels" \
        --title "toy task, seed 1, after $TOY_STEPS steps" &&
        "$python" scripts/plot_run.py "$out/text" --out "$out/text_curves.png" --title "Byte-level language model" &&
        "$python" scripts/plot_kernels.py "$out/text" --out "$out/text_kernels" || note "a picture could not be drawn"
fi
cat << END
$task/*/   the six toy runs: log.jsonl and the last checkpoint of each
$checkpoint   the language model: config.json, model.safetensors and what --resume needs

next:
  ./infer_mta $checkpoint --prompt "If you"              more text
  ./train_mta --help                                     every option; your own text: data/README.md
  scripts/evidence.sh --help                             the paper's whole toy table, and its other claims
finished after $((SECONDS - started)) s
END
