#!/usr/bin/env bash
# dev/bench/matmul_losses.sh [SEEDS="1 2 3"]: the quickstart's text model trained with products in fp32 and in bf16,
# for each seed, two runs side by side: validation losses, their differences and the spread of the seeds. About 10
# minutes of a core. TEXT_DIR: shards of the quickstart's text (default runs/quickstart/data/text); OUT: where the runs
# go (default runs/matmul); what is finished there stays.
set -eu
cd "$(dirname "$0")/../.."
seeds=${1:-1 2 3} text=${TEXT_DIR:-runs/quickstart/data/text} out=${OUT:-runs/matmul}
[ -f "$text/text_val_000000.bin" ] || {
    echo "matmul_losses.sh: $text: no shards there; scripts/quickstart.sh makes them" >&2
    exit 1
}
make -s train_mta
mkdir -p "$out"
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
for seed in $seeds; do
    runs=()
    for matmul in fp32 bf16; do  # the options of scripts/quickstart.sh
        ./train_mta --model 1m --attention mta --tokenizer bytes --seq-len 256 --lr 3e-3 --schedule linear --warmup 20 \
            --batch-size 16 --steps 300 \
            --train "$text/text_train_*.bin" --val "text=$text/text_val_*.bin" --eval-every 50 --eval-windows 100 \
            --save-every 0 --sample-every 0 \
            --seed "$seed" --matmul $matmul --resume --out "$out/${matmul}_$seed" > "$out/${matmul}_$seed.txt" 2>&1 &
        runs+=($!)
    done
    for run in "${runs[@]}"; do wait "$run" || { tail -n 1 "$out"/*_"$seed".txt >&2; exit 1; }; done
done
python3 - "$out" "$seeds" << 'PYTHON'
import json, os, statistics, sys

def loss(matmul, seed):
    with open(os.path.join(sys.argv[1], "%s_%s" % (matmul, seed), "log.jsonl")) as f:
        return [e["loss"] for e in map(json.loads, f) if e["event"] == "val"][-1]

seeds = sys.argv[2].split()
rows = [(seed, loss("fp32", seed), loss("bf16", seed)) for seed in seeds]
print("seed  fp32    bf16    difference (validation loss, nats a byte)")
for seed, fp32, bf16 in rows:
    print("%-4s  %.4f  %.4f  %+.4f" % (seed, fp32, bf16, bf16 - fp32))
columns = [r[1] for r in rows], [r[2] for r in rows], [r[2] - r[1] for r in rows]
print("mean  %.4f  %.4f  %+.4f" % tuple(statistics.mean(x) for x in columns))
if len(rows) > 1:
    spreads = tuple(statistics.stdev(x) for x in columns[:2])
    print("spread of the seeds (standard deviation): fp32 %.4f, bf16 %.4f" % spreads)
PYTHON
