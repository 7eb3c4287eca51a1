#!/usr/bin/env bash
# dev/bench/cpu_step.sh [REPEATS=5]: speed of train_mta.c on this machine, as ratios measured in one run.
#
# Shapes: vocabulary 8192, 384 channels, 1024 hidden units, 6 layers of 6 heads, T 1024, batch 2, convolution in layers 1, 3, 5.
#   ratio        model FLOP/s of a whole optimizer step (dev/MODEL.md) over the machine's own sgemm at 2048^3, medians of steps and products
#                taken in turns; best_ratio: the fastest step over the fastest product
#   gemm_gflops  our cut of that product into single-threaded blocks; without CBLAS the plain OpenMP product
#   PyTorch      one forward and backward of the dense reference (no update) over our whole step
set -eu
cd "$(dirname "$0")/../.."
repeats=${1:-5}
mkdir -p build
make -s --no-print-directory bench_programs
echo "machine: $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs), $(nproc) threads; commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
for kind in transformer mta mta-full; do build/cpu_step $kind 1024 "$repeats"; done
echo "without CBLAS:"
build/cpu_step_nocblas transformer 1024 "$repeats"
for python in data/.venv/bin/python /usr/bin/python3 python3; do
    if "$python" -c 'import torch, numpy' 2> /dev/null; then
        for kind in transformer mta; do "$python" dev/bench/torch_step.py $kind 1024 2; done
        exit 0
    fi
done
echo "PyTorch: not here (apt-get install python3-torch python3-numpy)"
