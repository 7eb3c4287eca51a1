#!/usr/bin/env bash
# scripts/finetune_4k.sh CHECKPOINT SHARDS OUT [more options of train_mta_cuda...]
#
# The paper's long-context stage: 10.5B more tokens at a context of 4096 from a checkpoint of scripts/train_880m.sh (or
# a run, whose newest one it is), RoPE theta 500,000, weight decay 0, warmup 50, a fresh optimizer, the rest as before:
# 40,000 steps of 64 sequences of 4096. The same command continues an interrupted run, and a launcher starts it on
# several GPUs as it does train_880m.sh.
set -euo pipefail
unset CDPATH
case ${1:-} in -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
root=$(cd "$(dirname "$(realpath "$0")")/.." && pwd)
source "$root/scripts/recipe.bash"
usage="usage: scripts/finetune_4k.sh CHECKPOINT SHARDS OUT [options...]"
checkpoint=${1:?$usage} shards=${2:?$usage} out=${3:?$usage}
shift 3
trainer=${TRAINER:-$root/train_mta_cuda}
[ -x "$trainer" ] || { echo "finetune_4k.sh: $trainer is missing, run: make -C $root train_mta_cuda" >&2; exit 1; }
found=("$checkpoint"/step-*/config.json)
[ -e "$checkpoint/config.json" ] || [ -e "${found[0]}" ] || {
    echo "finetune_4k.sh: $checkpoint holds no config.json, wanted a checkpoint or a run with one" >&2
    exit 1
}
write_recipe "$@"

recipe=(--init-from "$checkpoint" --seq-len 4096 --max-position-embeddings 4096 --rope-theta 500000
        --tokens-per-step 262144 --steps 40000 --lr 1.5e-4
        --schedule linear --warmup 50 --beta1 0.9 --beta2 0.98 --eps 1e-8 --weight-decay 0 --grad-clip 1)
choose_batch 64 "${recipe[@]}" "$@"

choose_val 1000 512 "$@"  # 2.1 million tokens of each domain
exec "$trainer" "${recipe[@]}" --batch-size "$batch" --train "@$shards/recipe.txt" --mix document "${val[@]}" \
    --out "$out" --resume --save-every 1000 --keep 3 \
    ${TOKENIZER:+--tokenizer "$TOKENIZER" --sample-every 1000} "$@"
