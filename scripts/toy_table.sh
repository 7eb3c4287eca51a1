#!/usr/bin/env bash
# toy_table.sh: the paper's whole toy table (N 5 and 8; all, first, last; three seeds; transformer and mta: 36 runs),
# at a size you choose.
#
# Usage: scripts/toy_table.sh [--size paper|night|tiny] [--out DIR] [--trainer PROGRAM] [--jobs K] [--seeds "1 2 3"]
#                             [--tasks "5 all,8 last"]
#                             [-- OPTIONS OF THE TRAINER]
#   --size paper   the paper's own: 4 layers of 2 heads, dim 256, 321 tokens, a million sequences, batch 64, 100,000
#                  steps. For a GPU. (The paper also drops out 10% of its attention weights; this project has no
#                  dropout.)
#   --size night   2 layers of 2 heads, dim 64, 8 blocks, batch 64, learning rate 2e-3, 10,000 steps: a night on two
#                  cores. The default.
#   --size tiny    a few steps of everything: shows that it works, not what it finds
#   --out DIR      default runs/toy_table_SIZE. The same command continues what was interrupted; finished runs are not
#                  run again.
#   --trainer P    default ./train_mta; ./train_mta_cuda on a GPU
#   --jobs K       runs at a time; default: as many as there are cores for ./train_mta, one for another trainer
# Ends with the table (scripts/toy_report.py DIR/n*_* prints it at any time).
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."

size=night out="" trainer=./train_mta jobs="" seeds="1 2 3" tasks="5 all,5 first,5 last,8 all,8 first,8 last" extra=()
fail() { echo "toy_table.sh: $*" >&2; exit 1; }
while [ $# -gt 0 ]; do
    case $1 in
        --size|--out|--trainer|--jobs|--seeds|--tasks)
            [ $# -gt 1 ] || fail "$1: the value is missing; --help lists all options"
            declare "${1#--}=$2"
            shift ;;
        --help|-h) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' scripts/toy_table.sh; exit 0 ;;
        --) shift; extra=("$@"); break ;;
        *) fail "unknown option $1; --help lists all" ;;
    esac
    shift
done
case $size in
    paper) steps=100000 samples=1000000 blocks="" lr=1e-4 eval_every=5000 model=(--model toy) ;;
    night) steps=10000 samples=320000 blocks=8 lr=2e-3 eval_every=1000
           model=(--model toy --hidden-size 64 --num-hidden-layers 2 --num-attention-heads 2 --num-key-value-heads 2
                  --intermediate-size 192) ;;
    tiny) steps=4 samples=256 blocks=6 lr=1e-3 eval_every=4
          model=(--model toy --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 2
                 --intermediate-size 32) ;;
    *) fail "--size: got \"$size\", wanted paper, night or tiny" ;;
esac
case $out in  # a folder as the caller named it, seen from here
    '') out=runs/toy_table_$size ;;
    /*) ;;
    *) [ "$caller" = "$PWD" ] || out=$caller/$out ;;
esac
cores=$(nproc 2> /dev/null || echo 1)
if [ -z "$jobs" ]; then if [ "$trainer" = ./train_mta ]; then jobs=$cores; else jobs=1; fi; fi
case $jobs in ''|*[!0-9]*|0) fail "--jobs: got \"$jobs\", wanted a number of at least 1" ;; esac
[ -x "$trainer" ] || fail "$trainer: no such program; build it with make $(basename "$trainer")"
mkdir -p "$out/data" 2> /dev/null || fail "$out: cannot write there; choose a folder with --out"
threads=$((cores > jobs ? cores / jobs : 1))
export OMP_WAIT_POLICY=passive  # threads that wait sleep: other programs may need the cores

# Data of one task and seed, unless it is there.
make_data() {  # N KIND SEED
    local folder=$out/data/n$1_$2_$3 words=(--n "$1" --kind "$2" --seed "$3" --train-samples "$samples")
    [ -z "$blocks" ] || words+=(--blocks "$blocks")
    [ -f "$folder/toy_task.json" ] ||
        python3 data/toy_task.py --out "$folder" "${words[@]}" > "$out/data/log.txt" 2>&1 ||
        fail "$(tail -n 1 "$out/data/log.txt")"
}
finished() { grep -q "\"event\": *\"val\", *\"step\": *${steps}[,}]" "$1/log.jsonl" 2> /dev/null; }
train() {  # N KIND SEED MODEL; its output goes to RUN.txt. Becomes the trainer, so that a signal to the job reaches it.
    local data=$out/data/n$1_$2_$3 run=$out/n$1_$2/$4_$3 length
    length=$(sed -n 's/.*"length": \([0-9]*\).*/\1/p' "$data/toy_task.json")
    exec env OMP_NUM_THREADS=$threads "$trainer" "${model[@]}" --kq-conv-key-size $((2 * $1 - 1)) --attention "$4" \
        --tokenizer toy --train "$data/toy_train_*.bin" \
        --val "toy=$data/toy_val_*.bin" --seq-len "$length" --batch-size 64 --steps $steps --lr $lr \
        --schedule constant --warmup 0 --beta1 0.9 --beta2 0.98 \
        --weight-decay 0 --grad-clip 1 --eval-every $eval_every --eval-windows 0 --save-every $eval_every --keep 1 \
        --sample-every 0 --log-every 10 --seed "$3" --resume \
        --out "$run" ${extra[@]+"${extra[@]}"} > "$run.txt" 2>&1
}

total=0 done_before=0 running=() names=()
IFS=, read -r -a list <<< "$tasks"
plan=()
for task in "${list[@]}"; do
    read -r n kind <<< "$task"
    case $kind in all|first|last) ;; *) fail "--tasks: got \"$task\", wanted N and all, first or last" ;; esac
    for seed in $seeds; do
        for kind_of in transformer mta; do
            total=$((total + 1))
            if finished "$out/n${n}_$kind/${kind_of}_$seed"; then
                done_before=$((done_before + 1))
            else
                plan+=("$n $kind $seed $kind_of")
            fi
        done
    done
done
echo "$total runs of $steps steps each in $out, $done_before finished before; $jobs at a time with $threads thread(s)"

# Ends the runs, which save first; the same command continues.
stop() {
    trap '' INT TERM
    [ ${#running[@]} -eq 0 ] || { kill "${running[@]}" 2> /dev/null || true; wait || true; }
    echo "toy_table.sh: stopped; the same command continues" >&2
    exit 75
}
trap stop INT TERM
# Waits until fewer than the given number of runs are left, and reports each that ended.
started=$SECONDS ended=0
reap() {
    while [ ${#running[@]} -ge "$1" ] && [ ${#running[@]} -gt 0 ]; do
        local i status pids=() left=()
        for i in "${!running[@]}"; do
            if kill -0 "${running[$i]}" 2> /dev/null; then
                pids+=("${running[$i]}") left+=("${names[$i]}")
                continue
            fi
            status=0
            wait "${running[$i]}" || status=$?
            ended=$((ended + 1))
            if [ $status != 0 ]; then
                echo "toy_table.sh: ${names[$i]} ended with status $status: $(tail -n 1 "$out/${names[$i]}.txt")" >&2
                stop
            fi
            echo "${names[$i]} done, $((done_before + ended)) of $total," \
                "$(((SECONDS - started) / ended * (${#plan[@]} - ended) / 60)) min to go"
        done
        running=(${pids[@]+"${pids[@]}"}) names=(${left[@]+"${left[@]}"})
        [ ${#running[@]} -lt "$1" ] || sleep 1
    done
}
for job in ${plan[@]+"${plan[@]}"}; do
    read -r n kind seed kind_of <<< "$job"
    mkdir -p "$out/n${n}_$kind"
    make_data "$n" "$kind" "$seed"
    train "$n" "$kind" "$seed" "$kind_of" &
    running+=($!) names+=("n${n}_$kind/${kind_of}_$seed")
    reap "$jobs"
done
reap 1
echo
echo "sequences with a wrong answer token, of 1000 test sequences, after $steps steps (size $size):"
python3 scripts/toy_report.py "$out"/n[0-9]*_*
