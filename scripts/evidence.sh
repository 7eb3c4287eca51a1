#!/usr/bin/env bash
# evidence.sh: trains and measures what stands behind dev/RESULTS.md, cell by cell, on the CPU trainer.
#
# Usage: scripts/evidence.sh [PART ...] [--plan] [--report] [--jobs K] [--out DIR] [--trainer PROGRAM] [--cells TEXT]
#   PART        toy-tuning, toy, toy-long, again, ablation, language-tuning, language, long, cost: parts of the list in
#               scripts/evidence.py; default: all. patterns: those whose kernels are counted. toy-paper, only by name:
#               the toy table at the paper's own size (4 layers, 256 channels, 321 tokens, 100,000 steps; without its
#               dropout), for a GPU:
#               scripts/evidence.sh toy-paper --trainer ./train_mta_cuda --jobs 1
#   --plan      prints the cells, those done and the hours that the others take, and trains nothing
#   --report    writes the tables and figures of dev/RESULTS.md from the cells in dev/evidence/*.jsonl, and trains
#               nothing
#   --jobs K    cells at a time, one thread each (default: as many as there are cores)
#   --out DIR   runs in progress (default: runs/evidence)
#   --cells T   only the cells whose name holds T
# A cell is one training run. A finished one is a line in dev/evidence/PART.jsonl and is never repeated; an unfinished
# one resumes. It runs at the lowest priority, so that other work on the machine goes first.
set -euo pipefail
unset CDPATH
cd "$(dirname "$(realpath "$0")")/.."
case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' scripts/evidence.sh
    exit 0 ;;
esac
export OMP_WAIT_POLICY=passive  # threads that wait sleep: other programs may need the cores
exec nice -n 19 python3 scripts/evidence.py "$@"
