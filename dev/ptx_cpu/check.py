#!/usr/bin/env python3
"""Executes what nvcc made of train_mta.cu on the CPU and says what came of it.

    check.py [--long] [--jobs N] [--only TEXT]      from the repository, after `make ptx` (with --long `make ptx_long`)

The quick part is for sm_90a, in bf16 and fp32: every launch of dev/tests/test_ops.cu by PTX and, two of a shape, by the
emulator, compared; the golden cases by PTX alone; mistakes planted into the PTX, each of which must be noticed. --long,
instead: test_mta's tests by PTX alone, sm_80 and sm_100, sums fused and truncated, other orders of warps. Prints the
table kernel, launches, worst difference, and "N passed, N failed".
"""

import argparse
import concurrent.futures
import glob
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

FOLDER = "build/ptx"

# How far the PTX's results may be from the emulator's, relative to the largest written: a step of bf16 is 2^-7 of a
# number at most, of fp16 2^-10; fp32 may come from such numbers (gradients of attention), fp64 from sums in fp32. What
# is left of sums that cancel is not counted (replay.cpp).
LIMIT = {"bf16": 2**-7, "fp16": 2**-10, "fp32": 1e-3, "fp64": 1e-6, "int": 0.0}

# Kernels of the PTX that nothing launches, by precision: a regular expression, the reason. One without a kernel fails.
NEVER = {
    "bf16": [(r"head_mix_kernel<float, (0|16), .*", "weights in fp32 are those of pairs, which have <float, 2>")],
    "fp32": [
        (r"head_mix16_.*", "mixes by products of bf16: in fp32 the launcher takes head_mix_kernel"),
        (r"kq_conv_band_.*", "convolves by products of bf16: in fp32 the launcher takes kq_conv_kernel"),
    ],
}

# Mistakes that are planted into the PTX of bf16, sm_90a: a name; part of the kernel's name there; what to replace, by
# what, in which place of each kernel (-1: all); the operation of test_ops that must notice.
FUSED, MIX, BAND, SOFTMAX = "attention fused", "head_mix16", "kq_conv_forward", "softmax_forward"
REGISTERS = r"(%r\d+),\s*(%r\d+)"
PAIR = r"(cvt\.rn\.bf16x2\.f32\s+%r\d+, )(%f\d+), (%f\d+)"
COPY, ALWAYS = r"(cp\.async\.cg[^;]*), 16, %r\d+", r"\1, 16, 16"
SUMS, ONE_SUM = r"red\.(\S+)\.v2\.f32 (\[[^\]]*\]), \{(%f\d+),(%f\d+)\}", r"red.\1.f32 \2, \3"
MUTATIONS = [
    ("mma: a1 and a2 swapped", "flash_forward", r"(mma\S+\s*\{[^}]*\}, \{%r\d+,)" + REGISTERS, r"\1\3,\2", 0, FUSED),
    ("mma: b0 and b1 swapped", "flash_backward", r"(mma\S+\s*(?:\{[^}]*\}, ){2}\{)" + REGISTERS, r"\1\3,\2", 0, FUSED),
    ("mma: c1 and c2 swapped", "kq_conv_band_kernel", r"(mma\S+\s*\{%f\d+,)(%f\d+),(%f\d+)", r"\1\3,\2", 0, BAND),
    ("ldmatrix: .trans dropped", "flash_forward", r"x4\.trans\.", "x4.", 0, FUSED),
    ("ldmatrix: .trans added", "flash_backward", r"(ldmatrix\S+x4)\.shared", r"\1.trans.shared", 0, FUSED),
    ("ldmatrix: r1 and r2 swapped", "flash_backward", r"(ldmatrix\S+\s*\{%r\d+,)" + REGISTERS, r"\1\3,\2", 3, FUSED),
    ("movmatrix: a copy", "head_mix16_forward", r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16", "mov.b32", 0, MIX),
    ("bf16 pair: halves swapped", "flash_forward", PAIR, r"\1\3, \2", 0, FUSED),
    ("cp.async: 16 bytes where none are valid", "flash_backward", COPY, ALWAYS, -1, FUSED),
    ("cp.async: 16 bytes where none are valid, forward", "flash_forward", COPY, ALWAYS, -1, FUSED),
    ("wait_group 0 made 1, forward", "flash_forward", r"wait_group 0", "wait_group 1", 0, FUSED),
    ("wait_group 1 made 2, backward", "flash_backward", r"wait_group 1", "wait_group 2", 0, FUSED),
    ("second wait_group 1 made 2, backward", "flash_backward", r"wait_group 1", "wait_group 2", 1, FUSED),
    ("first barrier dropped, forward", "flash_forward", r"bar\.sync\s+0;", "", 0, FUSED),
    ("last barrier dropped, forward", "flash_forward", r"bar\.sync\s+0;", "", 1, FUSED),
    ("second barrier dropped, backward", "flash_backward", r"bar\.sync\s+0;", "", 1, FUSED),
    ("fourth barrier dropped, backward", "flash_backward", r"bar\.sync\s+0;", "", 3, FUSED),
    ("last barrier dropped, backward", "flash_backward", r"bar\.sync\s+0;", "", 6, FUSED),
    ("shfl: from 4 lanes across", "flash_forward", r"(shfl[^,]*, %r\d+, )[^,]+", r"\g<1>4", 0, FUSED),
    ("ex2: a copy", "softmax_forward", r"ex2\.approx\.ftz\.f32", "mov.f32", 0, SOFTMAX),
    ("red: the second of two sums lost", "flash_backward", SUMS, ONE_SUM, 0, FUSED),
    ("a branch turned round", "flash_forward", r"@(%p\d+) bra", r"@!\1 bra", 9, FUSED),
    ("a store moved by 4 bytes", "flash_backward", r"(st\.shared\.u32\s+\[%r\d+)\]", r"\1+4]", 0, FUSED),
]


def run(command, environment, timeout=1500):
    """(exit status, output, seconds of this process)"""
    began = time.monotonic()
    try:
        small = {"OMP_NUM_THREADS": "1", "CUDA_CPU_BLAS_WORKSPACE": "4096"}  # of which each launch makes copies
        p = subprocess.run(command, env=dict(os.environ, **small, **environment), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired as late:
        return 124, f"{(late.stdout or b'').decode(errors='replace')}\nstopped after {timeout} s", timeout
    return p.returncode, p.stdout, time.monotonic() - began


class Report:
    """What replay.cpp wrote of one or more runs."""

    def __init__(self):
        self.launches, self.blocks, self.instructions = defaultdict(int), defaultdict(int), defaultdict(int)
        self.differences, self.notes, self.absent = defaultdict(dict), defaultdict(list), set()

    def read(self, path):
        for line in open(path) if os.path.exists(path) else []:
            f = line.rstrip("\n").split("\t")
            if f[0] == "K":
                self.launches[f[1]] += int(f[2])
                self.blocks[f[1]] += int(f[3])
                self.instructions[f[1]] += int(f[4])
            elif f[0] == "W":
                old = self.differences[f[1]].get(f[2], (0.0, 0.0))
                self.differences[f[1]][f[2]] = (max(old[0], float(f[3])), max(old[1], float(f[4])))
            elif f[0] == "N":
                self.notes[f[1]].append(f[3])
            elif f[0] == "U":
                self.absent.add(f[1])
        return self

    def worst(self, kernel):
        d = self.differences[kernel]
        return ", ".join(f"{t} {f'{w:.1e}' if w else 'exact'}" for t, (w, _) in sorted(d.items())) or "wrote nothing"

    def faults(self, kernel):
        """What is wrong with a kernel's launches: differences beyond LIMIT, races, any other note."""
        excess = {t: e for t, (_, e) in self.differences[kernel].items() if not e <= LIMIT[t]}
        return [f"{t} differs by {e:.2g}, at most {LIMIT[t]:.2g}" for t, e in excess.items()] + self.notes[kernel]


def last_line(text):
    lines = text.strip().splitlines()
    return next((x for x in lines if x.startswith("ptx:")), lines[-1] if lines else "no output")


def execute(name, precision, arch, command, environment):
    """One program by the PTX of a precision and architecture: (name, what is wrong, its report, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        report, ptx = os.path.join(folder, "report"), f"{FOLDER}/{precision}_{arch}.ptx"
        status, text, seconds = run(command, {"PTX_FILE": ptx, "PTX_REPORT": report, **environment})
        r = Report().read(report)
    wrong = [] if status == 0 else [last_line(text)] + [x for x in text.splitlines() if x.startswith("FAIL")][:5]
    if not r.launches:
        wrong.append("nothing was executed")
    return name, wrong + [f"{k}: {x}" for k in sorted(r.launches) for x in r.faults(k)], r, seconds


def programs(long):
    """The runs: (name, precision, architecture, command, environment). In fp32 sequences of up to 74 tokens launch
    every kernel in a fifth of the time of 330, which --long takes."""
    files, alone, runs = sorted(glob.glob("dev/golden/*.safetensors")), {"PTX_ALONE": "1"}, []
    for p, suffix in (("bf16", ""), ("fp32", "_fp32")):
        longest = "74" if p == "fp32" and not long else "330"
        ops, test_mta = [f"{FOLDER}/test_ops{suffix}", "--longest", longest], f"{FOLDER}/test_mta_{p}"
        golden = [test_mta, "--golden", *files]
        if not long:
            runs.append((f"operations {p}", p, "sm_90a", ops, {}))
            runs.append((f"golden cases {p}", p, "sm_90a", golden, alone))
            continue
        runs.append((f"test_mta {p}", p, "sm_90a", [test_mta], alone))
        for setting in ("PTX_FUSE=1", "PTX_MMA=truncate", "PTX_ORDER=1", "PTX_ORDER=7"):
            runs.append((f"operations {p}, {setting}", p, "sm_90a", ops, dict([setting.split("=")])))
        for arch in ("sm_80", "sm_100"):
            runs.append((f"operations {p} {arch}", p, arch, ops, {}))
            runs.append((f"golden cases {p} {arch}", p, arch, golden, alone))
    return runs


def mutate(text, kernel, find, put, place):
    """The PTX with a mistake in the kernels of that name, and in how many places."""
    pieces, places = re.split(r"(?=^[ \t]*(?:\.visible )?\.entry)", text, flags=re.M), 0
    for n, piece in enumerate(pieces):
        if n and kernel in piece[:300].split("(")[0]:
            found = list(re.finditer(find, piece))
            found = found if place < 0 else found[place : place + 1]
            places += len(found)
            for m in reversed(found):
                piece = piece[: m.start()] + m.expand(put) + piece[m.end() :]
            pieces[n] = piece
    return "".join(pieces), places


def plant(text, mutation):
    """(name, by what it was noticed or "", how many places, seconds)"""
    name, kernel, find, put, place, only = mutation
    changed, places = mutate(text, kernel, find, put, place)
    with tempfile.TemporaryDirectory() as folder:
        path, report = os.path.join(folder, "x.ptx"), os.path.join(folder, "report")
        with open(path, "w") as f:
            f.write(changed)
        command = [f"{FOLDER}/test_ops", "--quick", "--only", only]
        status, out, seconds = run(command, {"PTX_FILE": path, "PTX_REPORT": report, "PTX_ALONE": "1"}, 120)
        notes = [x for list_ in Report().read(report).notes.values() for x in list_]
    failed = [x for x in out.splitlines() if x.startswith("FAIL " + only)]
    noticed = [last_line(out)] if "ptx:" in out else notes + failed
    return name, noticed[0] if noticed else "no verdict" if status else "", places, seconds


def print_table(precision, report):
    """The table of a precision's kernels; returns which were neither launched nor excused."""
    print(f"\n{precision + ', sm_90a':58} {'launches':>8} {'blocks':>7}  worst difference, of the largest value")
    for k in sorted(report.launches):
        print(f"{k:58} {report.launches[k]:8} {report.blocks[k]:7}  {report.worst(k)}")
    wrong, used = [], set()
    for k in sorted(report.absent):
        reason = next(((e, why) for e, why in NEVER[precision] if re.fullmatch(e, k)), None)
        if reason:
            used.add(reason[0])
            print(f"{k:58}        -       -  never launched: {reason[1]}")
        else:
            wrong.append(f"{precision}: {k} was not launched, and no reason is known")
    return wrong + [f"{precision}: {e}: all such kernels are launched" for e, _ in NEVER[precision] if e not in used]


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true",
                        help="what takes long, in place of the quick part")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N",
                        help="programs at a time (2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs and mutations whose name contains TEXT")
    options = parser.parse_args()
    if not os.path.exists(f"{FOLDER}/bf16_sm_90a.ptx"):
        sys.exit(f"check.py: {FOLDER}/bf16_sm_90a.ptx is missing; run: make ptx{'_long' * options.long}")
    began, passed, failed, executed = time.monotonic(), 0, 0, 0

    def verdict(wrong, text, seconds):
        nonlocal passed, failed
        passed, failed = passed + (not wrong), failed + bool(wrong)
        print(f"{'FAIL' if wrong else 'ok  '} {text}  {seconds:.0f} s", *wrong[:12], sep="\n       ", flush=True)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(execute, *r) for r in programs(options.long) if options.only in r[0]]
        text = open(f"{FOLDER}/bf16_sm_90a.ptx").read()
        chosen = [m for m in MUTATIONS if not options.long and options.only in "mutation: " + m[0]]
        planted = [pool.submit(plant, text, m) for m in chosen]
        reports = {}
        for future in runs:
            name, wrong, report, seconds = future.result()
            reports[name] = report
            executed += sum(report.instructions.values())
            verdict(wrong, f"{name}: {sum(report.launches.values())} launches", seconds)
        found = 0
        for future in planted:
            name, noticed, places, seconds = future.result()
            found += noticed != ""
            wrong = [] if places and noticed else [f"noticed: {noticed or 'nothing'}"]
            verdict(wrong, f"mutation: {name} ({places}): {noticed[:160]}", seconds)
    for p in ("bf16", "fp32"):
        if f"operations {p}" in reports:
            verdict(print_table(p, reports[f"operations {p}"]), f"every kernel of {p} is launched", 0)
    print(f"\n{executed * 32 / 1e9:.2f} billion instructions of threads; {found} of {len(chosen)} mutations found")
    print(f"{time.monotonic() - began:.0f} s")
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
