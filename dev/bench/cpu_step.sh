#!/usr/bin/env bash
# dev/bench/cpu_step.sh [REPEATS=5] [ROUNDS=3]: speed of train_mta.c on this machine, as ratios measured in one run.
#
# Shapes: vocabulary 8192, 384 channels, 1024 hidden units, 6 layers of 6 heads, T 1024, batch 2, convolution in layers
# 1, 3, 5.
#   ratio        model FLOP/s of a whole optimizer step (dev/MODEL.md) over the machine's own sgemm at 2048^3, medians
#                of steps and products taken in turns; best_ratio: the fastest step over the fastest product
#   gemm_gflops  our cut of that product into single-threaded blocks; without CBLAS the plain OpenMP product
#   bf16_step_s  the same step with products in bf16 (--matmul bf16), in turns with that in fp32; only where oneDNN and
#                the processor can
#   PyTorch      ROUNDS times in turns with ours: a whole step of the same model as its users would write it, in fp32
#                and with bf16 autocast (torch_step.py); then the best of each, and PyTorch's over ours. PYTHON=: the
#                interpreter that has torch; default
#                dev/.venv, then the system's.
# Wants the machine to itself; about ten minutes on two cores, of which PyTorch's compiler takes three the first time.
set -eu
cd "$(dirname "$0")/../.."
repeats=${1:-5} rounds=${2:-3}
mkdir -p build/log
make -s --no-print-directory bench_programs
commit=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
echo "machine: $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs), $(nproc) threads; commit $commit"
for kind in transformer mta mta-full; do build/cpu_step $kind 1024 "$repeats"; done
echo "without CBLAS:"
build/cpu_step_nocblas transformer 1024 "$repeats"
for python in ${PYTHON:+"$PYTHON"} dev/.venv/bin/python data/.venv/bin/python /usr/bin/python3 python3; do
    "$python" -c 'import torch; torch.nn.functional.rms_norm' 2> /dev/null || continue
    echo "beside PyTorch:"
    for kind in transformer mta; do
        for _ in $(seq "$rounds"); do
            build/cpu_step $kind 1024 2
            for precision in fp32 bf16; do
                "$python" dev/bench/torch_step.py $kind $precision 1024 3 2> build/log/torch_step.log
            done
        done
    done | tee build/log/cpu_step.jsonl
    "$python" - build/log/cpu_step.jsonl << 'PYTHON'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
for kind in ("transformer", "mta"):
    ours = {"fp32": [r["best_step_s"] for r in rows if r["attention"] == kind and "torch" not in r],
            "bf16": [r["best_bf16_step_s"] for r in rows if r["attention"] == kind and "best_bf16_step_s" in r]}
    for precision in ("fp32", "bf16"):
        theirs = (r for r in rows if r["attention"] == kind and r.get("torch") and r["matmul"] == precision)
        torch = min(r["best_step_s"] for r in theirs)
        mine = min(ours[precision], default=float("nan"))
        print("%-11s %s: ours %.3f s, PyTorch %.3f s, PyTorch over ours %.2f" %
              (kind, precision, mine, torch, torch / mine))
PYTHON
    exit 0
done
echo "PyTorch: none here of 2.4 or newer (dev/requirements.txt, or PYTHON=)"
