#!/usr/bin/env bash
# scripts/train_880m.sh SHARDS OUT [ATTENTION=mta] [more options of train_mta_cuda...]
#
# The paper's recipe (arXiv 2504.00927) for the 880M model: 104.9B tokens of SlimPajama in 400,000 steps of 128
# sequences of 2048, AdamW 1.5e-4, betas 0.9 and 0.98, weight decay 0.05, clip 1, warmup 375, linear to 0, RoPE theta
# 100,000. A step is split into micro-batches that fit into the GPU's memory. SHARDS is the folder that data/prepare.py
# slimpajama wrote with Llama 3's tokenizer.model (TOKENIZER=FILE names it for samples). After Ctrl-C, SIGTERM or a
# crash the same command continues. 105 billion tokens take weeks on one GPU. No GPU has run it yet.
#
# On several GPUs a launcher starts it once for each GPU, on one host, or on several hosts that all see SHARDS and OUT:
#   torchrun --no-python --nproc-per-node 8 scripts/train_880m.sh SHARDS OUT       (and --nnodes, --rdzv-endpoint)
#            it kills 30 s after SIGTERM and dies of SIGUSR1 itself: --shutdown-timeout 180
#            --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
#   srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --signal=USR1@180 scripts/train_880m.sh SHARDS OUT
#            (inside of a job srun's --signal does nothing; give it to sbatch: #SBATCH --signal=USR1@180)
#   mpirun -n 8 scripts/train_880m.sh SHARDS OUT           (on several hosts MASTER_ADDR=HOST of the first, with -x)
# The bits of the run depend only on --shards and --batch-size. If both are given, another number of GPUs continues it
# with the same bits. --dry-run --ranks 32 --ranks-per-node 8 plans such a run without starting it.
set -euo pipefail
unset CDPATH
case ${1:-} in -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
root=$(cd "$(dirname "$(realpath "$0")")/.." && pwd)
source "$root/scripts/recipe.bash"
usage="usage: scripts/train_880m.sh SHARDS OUT [ATTENTION] [options...]"
shards=${1:?$usage} out=${2:?$usage}
attention=mta
shift 2
case ${1:-} in -*) ;; *) attention=${1:-mta}; shift $(($# > 0)) ;; esac
trainer=${TRAINER:-$root/train_mta_cuda}
[ -x "$trainer" ] || { echo "train_880m.sh: $trainer is missing, run: make -C $root train_mta_cuda" >&2; exit 1; }
write_recipe "$@"

recipe=(--model 880m --attention "$attention" --seq-len 2048 --tokens-per-step 262144 --steps 400000 --lr 1.5e-4
        --schedule linear --warmup 375 --beta1 0.9 --beta2 0.98 --eps 1e-8 --weight-decay 0.05 --grad-clip 1
        --rope-theta 100000)
choose_batch 128 "${recipe[@]}" "$@"

choose_val 2000 1024 "$@"  # 2.1 million tokens of each domain
exec "$trainer" "${recipe[@]}" --batch-size "$batch" --train "@$shards/recipe.txt" --mix document "${val[@]}" \
    --out "$out" --resume --save-every 1000 --keep 3 \
    ${TOKENIZER:+--tokenizer "$TOKENIZER" --sample-every 2000} "$@"
