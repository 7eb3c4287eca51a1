#!/usr/bin/env bash
# scripts/ranks_check.sh [--ranks N] [--part bits|speed] [--small] [--work DIR]: train_mta_cuda on N GPUs of this
# machine (default: all of them) against one. The first thing to run where there are two. Minutes; the table comes last.
#
#   bits    one run on 1, on N and, where N is even, on N/2 processes; and one that N begin and 1 ends. Losses, norms
#           and checkpoints must be the same, byte for byte.
#   speed   880m, steps of 262,144 tokens: tokens/s of one GPU and of N by both reductions, and the share of N times one
# --small: tiny models and few steps, for the emulator. --work: where runs go meanwhile, into a folder of their own that
# is removed, 15 GB of it for the speed (default: build). TRAINER=PROGRAM is taken in place of train_mta_cuda, which is
# built otherwise.
# Exit status 1 if bits differ or a run fails.
set -u
unset CDPATH
export LC_ALL=C  # figures with a decimal point, in every locale
cd "$(dirname "$(realpath "$0")")/.." || exit 1
root=$PWD ranks="" part=all small=no where=$PWD/build
while [ $# -gt 0 ]; do
    case $1 in
        --ranks) ranks=${2:-}; shift ;;
        --part) part=${2:-}; shift ;;
        --work) where=$(realpath -m "${2:?--work needs a directory}"); shift ;;
        --small) small=yes ;;
        -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' scripts/ranks_check.sh; exit 0 ;;
        *) echo "ranks_check.sh: unknown option $1; --help lists all" >&2; exit 1 ;;
    esac
    shift || { echo "ranks_check.sh: the value of the last option is missing; --help lists all" >&2; exit 1; }
done
case $part in
    all | bits | speed) ;;
    *) echo "ranks_check.sh: --part: got $part, wanted bits or speed" >&2; exit 1 ;;
esac
if [ -z "$ranks" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then  # nvidia-smi does not look at it
    ranks=$(tr , '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)
fi
ranks=${ranks:-$(nvidia-smi -L 2> /dev/null | grep -c '^GPU')}
if ! [[ $ranks =~ ^[1-9][0-9]{0,8}$ ]] || [ "$ranks" -lt 2 ]; then
    echo "ranks_check.sh: got ${ranks:-no} GPUs, wanted two or more" >&2
    exit 1
fi
source scripts/recipe.bash
made=no
[ -d "$where" ] || made=yes
mkdir -p "$where" && work=$(mktemp -d "$where/ranks_check.XXXXXX") || exit 1

table=() failed=0
row() { table+=("$*"); echo "$*"; }
fail() { failed=$((failed + 1)); row "FAIL    $*"; }
finish() {
    trap - EXIT
    rm -rf "$work"
    if [ $made = yes ]; then rmdir "$where"; fi
    echo
    printf '%s\n' "${table[@]}"
    if [ $failed -eq 0 ]; then echo "ranks_check: all passed"; else echo "ranks_check: $failed failed"; fi
    [ $failed -eq 0 ]
    exit
}
stop() { jobs -rp | xargs -r kill; wait; fail "interrupted"; exit 1; }  # what saves into `work` first ends
trap finish EXIT
trap stop INT TERM

# What a launcher may have left in the environment is none of these runs'.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
unset OMPI_COMM_WORLD_SIZE PMI_SIZE SLURM_STEP_NUM_TASKS
port=${MTA_PORT:-$((20000 + RANDOM % 10000))}

# launch RUN PROCESSES OPTIONS...: trains in WORK/RUN as torchrun would start it; what the processes print goes to
# WORK/RUN/PROCESS.log. A failure is told, with what they said.
launch() {
    local run=$work/$1 n=$2 r pid pids=() status=0
    shift 2
    mkdir -p "$run"
    for ((r = 0; r < n; r++)); do
        (cd "$run" && exec env RANK=$r WORLD_SIZE=$n LOCAL_RANK=$r LOCAL_WORLD_SIZE=$n MTA_PORT="$port" \
            timeout 600 "$trainer" --train "$work/text_train_*.bin" --tokenizer bytes --out run "$@" \
            > "$r.log" 2>&1 < /dev/null) &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    [ $status -ne 0 ] || return 0
    fail "${run##*/}: exit status $status"
    for ((r = 0; r < n; r++)); do tail -n 3 "$run/$r.log" | sed "s/^/        process $r: /"; done
    return 1
}

# The lines of a run's log that do not hang on the clock.
steps_of() {
    grep -E '^\{"event": "(step|val)"' "$work/$1/run/log.jsonl" |
        sed -E 's/"(time|tokens_per_s|mfu|seconds)": [^,}]*(, )?//g'
}
# same WHAT A B STEP FILE...: the logs of two runs, and files of their checkpoints after so many steps.
same() {
    local what=$1 a=$2 b=$3 file
    local step=step-$(printf %08d "$4")
    shift 4
    if [ -z "$(steps_of "$a")" ] || [ "$(steps_of "$a")" != "$(steps_of "$b")" ]; then
        fail "$what: other losses or norms: $(diff <(steps_of "$a") <(steps_of "$b") | grep -m 1 '^[<>]' | cut -c1-100)"
        return
    fi
    for file in "$@"; do
        cmp "$work/$a/run/$step/$file" "$work/$b/run/$step/$file" > "$work/cmp" 2>&1 ||
            { fail "$what: another $file: $(cut -c1-100 "$work/cmp")"; return; }
    done
    row "ok      $what: $(steps_of "$a" | wc -l) lines of losses and norms, $*: the same bytes"
}

check_bits() {
    local model=(--model 11m --seq-len 256 --tokens-per-step $((256 * 4 * ranks)) --batch-size 2) steps=20
    local n counts=("$ranks") whole=(model.safetensors optimizer.safetensors trainer.json config.json manifest.json)
    if [ $small = yes ]; then
        model=(--model 1m --num-hidden-layers 1 --hidden-size 32 --num-attention-heads 2 --num-key-value-heads 2
               --intermediate-size 48 --seq-len 16 --tokens-per-step $((16 * (ranks + 1))) --batch-size 1)
        steps=4
    fi
    model+=(--shards "$ranks" --warmup 2 --schedule-steps $steps --val "$work/text_val_*.bin" --eval-windows 8
            --eval-every $((steps / 2)) --save-every $((steps / 2)) --keep 0 --log-every 1)
    launch one 1 "${model[@]}" --steps $steps || return
    if [ $((ranks % 2)) -eq 0 ] && [ "$ranks" -gt 2 ]; then counts=($((ranks / 2)) "$ranks"); fi
    for n in "${counts[@]}"; do
        launch "on_$n" "$n" "${model[@]}" --steps $steps || continue
        same "$n processes as one" one "on_$n" $steps "${whole[@]}"
    done
    launch resumed "$ranks" "${model[@]}" --steps $((steps / 2)) &&
        launch resumed 1 "${model[@]}" --steps $steps --resume &&
        same "begun by $ranks, ended by one" one resumed $steps model.safetensors optimizer.safetensors
}

# The middle one of the tokens/s of a run's last steps.
rate_of() {
    grep '^{"event": "step"' "$work/$1/run/log.jsonl" | tail -n +4 |
        sed -E 's/.*"tokens_per_s": ([0-9.e+]*).*/\1/' | sort -g |
        awk '{x[NR] = $1} END {printf "%.0f", x[int((NR + 1) / 2)]}'
}
check_speed() {
    local model=(--model 880m --seq-len 2048 --tokens-per-step 262144 --steps 10) one reduce rate share batch=1
    local all=$ranks  # choose_batch sets ranks to those of a launcher, here none: 1
    if [ $small = yes ]; then
        model=(--model 1m --num-hidden-layers 1 --seq-len 16 --tokens-per-step $((16 * ranks)) --steps 5 --batch-size 1)
    fi
    model+=(--warmup 1 --eval-every 0 --save-every 0 --keep 1 --log-every 1)
    if [ $small = no ]; then choose_batch $((128 / ranks)) "${model[@]}"; fi
    ranks=$all
    model+=(--batch-size "$batch")
    launch speed_1 1 "${model[@]}" --shards 1 || return
    one=$(rate_of speed_1)
    row "speed   1 process: $one tokens/s, $batch sequences at once"
    rm -rf "$work/speed_1"
    for reduce in tree nccl; do
        launch "speed_$reduce" "$ranks" "${model[@]}" --shards "$ranks" --reduce $reduce || continue
        rate=$(rate_of "speed_$reduce")
        share=$(awk "BEGIN {printf \"%.1f\", 100 * $rate / $ranks / $one}")
        row "speed   $ranks processes, --reduce $reduce: $rate tokens/s, $share% of $ranks times one"
        rm -rf "$work/speed_$reduce"
    done
}

trainer=${TRAINER:-$root/train_mta_cuda}
if [ -z "${TRAINER:-}" ]; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d .)
    case $capability in 90 | "" | *[!0-9]*) capability=90a ;; esac  # nvidia-smi prints its errors there too
    PATH=$PATH:/usr/local/cuda/bin:/usr/local/nvidia/bin  # as gpu_check.sh
    make -s train_mta_cuda NVCC_ARCH="sm_$capability" || { fail "make train_mta_cuda"; exit 1; }
fi
trainer=$(realpath -m "$trainer")
[ -x "$trainer" ] || { fail "$trainer is missing"; exit 1; }
python3 data/prepare.py text ./*.md ./*.c ./*.cu mta/*.h --tokenizer bytes --name text --val-fraction 0.05 \
    --out "$work" > "$work/prepare.log" 2>&1 || { fail "data/prepare.py: $(tail -n 1 "$work/prepare.log")"; exit 1; }
row "$ranks processes of $trainer, commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
nvidia-smi topo -m 2> /dev/null
if [ "$part" != speed ]; then check_bits; fi
if [ "$part" != bits ]; then check_speed; fi
finish
