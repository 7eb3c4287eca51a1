#!/usr/bin/env python3
"""What the compiler made of train_mta.cu's kernels: registers, stack, spills, and, where nvdisasm is at hand,
instructions by class.

    dev/bench/kernel_report.py [--arch sm_90a] [--only flash] [--nvdisasm PROGRAM]

Needs nvcc. Instructions are static counts, of the whole kernel and of the shortest loop that holds the most tensor-core
products: a tile (a loop inside it counts once however often it runs). Exit status 1 if any kernel spills.
"""

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CLASSES = ("HMMA", "LDSM", "LDS", "STS", "LDG", "STG", "LDGSTS", "MUFU", "BAR")
REPORT = re.compile(
    r"Compiling entry function '(\S+)'.*?\n.*?\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes "
    r"spill loads"
    r"\n.*?Used (\d+) registers"
)


def readable(symbol):
    """flash_forward_kernel<96,2,6> from its mangled name."""
    found = re.match(r"_Z\d+(\w+?_kernel)(.*)", symbol)
    if not found:
        return symbol
    name, rest = found.groups()
    head = re.match(r"I((?:Li\d+E|Lb\dE|f|d|6__half|13__nv_bfloat16)+)E", rest)
    words = re.findall(r"Li(\d+)E|Lb(\d)E|(f|d|6__half|13__nv_bfloat16)", head.group(1)) if head else []
    return name + ("<%s>" % ",".join(re.sub(r"^\d+(?=__)", "", "".join(w)) for w in words) if words else "")


def opcode(instruction):
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def instructions(listing):
    """{symbol: (all instructions by opcode, those of the loop over tiles)} of nvdisasm's listing."""
    found = {}
    parts = re.split(r"\n\s*\.section\s+\.text\.(\S+?),", listing)
    for symbol, body in zip(parts[1::2], parts[2::2]):
        code, labels, loop = [], {}, []
        for line in body.split("\n"):
            label = re.match(r"(\.L_x_\d+):", line)
            if label:
                labels[label.group(1)] = len(code)
            instruction = re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", line)
            if instruction:
                code.append(instruction.group(1))
        for at, instruction in enumerate(code):
            back = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
            start = labels.get(back.group(1), at + 1) if back else at + 1
            body_codes = [opcode(c) for c in code[start : at + 1]]
            if (body_codes.count("HMMA"), -len(body_codes)) > (max(loop.count("HMMA"), 1), -len(loop)):
                loop = body_codes
        found[symbol] = collections.Counter(map(opcode, code)), collections.Counter(loop)
    return found


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--nvdisasm", default="nvdisasm", help="the disassembler, if it is not on PATH")
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        sys.exit("kernel_report.py: no nvcc on PATH")
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        command = ["nvcc", "-std=c++17", "-O3", "-arch=" + options.arch, "-DMTA_LIBRARY", "-Xcompiler", "-fopenmp"]
        done = subprocess.run(
            command + ["-Xptxas", "-v", "-cubin", "train_mta.cu", "-o", cubin], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit("kernel_report.py: nvcc failed\n" + done.stderr)
        counts = {}
        if shutil.which(options.nvdisasm):
            counts = instructions(subprocess.run([options.nvdisasm, "-c", cubin], capture_output=True,
                                                 text=True).stdout)
        else:
            print("no nvdisasm: registers only")
    kernels = [m.groups() for m in REPORT.finditer(done.stderr)]
    spilling = sum(int(k[2]) + int(k[3]) > 0 for k in kernels)
    print("%s: %d kernels, %d of them spill" % (options.arch, len(kernels), spilling))
    for symbol, stack, stores, loads, registers in sorted(kernels, key=lambda k: readable(k[0])):
        if options.only not in readable(symbol):
            continue
        print("%-52s %3s registers  stack %s  spills %s/%s" % (readable(symbol), registers, stack, stores, loads))
        for title, found in zip(("all", "loop"), counts.get(symbol, ())):
            if found:
                shown = "  ".join("%s %d" % (c, found[c]) for c in CLASSES if found[c])
                print("    %-4s %5d  %s" % (title, sum(found.values()), shown))
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
