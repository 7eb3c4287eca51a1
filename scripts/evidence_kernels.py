#!/usr/bin/env python3
"""Key-query convolutions of a checkpoint: starts them elsewhere than at the identity, or says what they have learned.

    python3 scripts/evidence_kernels.py patterns DIR        counts the patterns of a checkpoint, or a run's newest one
    python3 scripts/evidence_kernels.py random|mean DIR SEED

The second writes DIR/model.safetensors (F32) anew with every kernel drawn from a normal distribution of variance 1 /
taps, or with each tap 1 / taps; the same call gives the same bytes. scripts/evidence.py uses both, and kernels(DIR).
Standard library only.
"""

import array
import json
import os
import random
import re
import sys

sys.path[:0] = [os.path.dirname(os.path.realpath(__file__))]
from export import find_checkpoint, read_tensors, weight_files  # noqa: E402
from tokenizer import UserError  # noqa: E402

KERNEL = re.compile(r"model\.layers\.(\d+)\.self_attn\.(kq_conv|kq_conv_post)\.weight")
LEARNED = re.compile(r"model\.layers\.(\d+)\.self_attn\.(kq_conv|kq_conv_post|head_mix_pre|head_mix)\.weight")


def kernels(folder):
    """{(layer, name): floats} of a checkpoint, F32 or BF16: [head][query][key] of a convolution, where row cq - 1, key
    (ck - 1) / 2 is the identity's tap, and [group][head out][head in] of a mixing."""
    found = {}
    for name, entry in read_tensors(folder, *weight_files(folder)).items():
        if not (match := LEARNED.fullmatch(name)):
            continue
        with open(entry["path"], "rb") as f:
            f.seek(entry["begin"])
            raw = f.read(entry["end"] - entry["begin"])
        if entry["dtype"] == "BF16":
            raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        elif entry["dtype"] != "F32":
            raise UserError("%s: %s is %s, wanted F32 or BF16" % (folder, name, entry["dtype"]))
        taps = array.array("f", raw)
        heads, queries, keys = entry["shape"]
        found[int(match[1]), match[2]] = [
            [list(taps[(h * queries + q) * keys : (h * queries + q + 1) * keys]) for q in range(queries)]
            for h in range(heads)
        ]
    return found


def pattern(kernel):
    """What a kernel [query][key] looks like, by the squares of its weights: "identity" where the identity's tap has 90%
    of them or more; "diagonal" where taps that move along with the query (so many queries back, as many keys back) have
    60% or more, two of them at
    least 10%; "one-sided" where the keys before, or the keys behind, have 60% of what is not the identity's tap; else
    "other"."""
    queries, keys = len(kernel), len(kernel[0])
    row, centre = queries - 1, (keys - 1) // 2
    power = [[w * w for w in line] for line in kernel]
    total = sum(map(sum, power)) or 1.0
    if power[row][centre] >= 0.9 * total:
        return "identity"
    for key in range(keys):
        along = sorted(power[row - back][key - back] for back in range(min(row, key) + 1))
        if len(along) > 1 and sum(along) >= 0.6 * total and along[-2] >= 0.1 * total:
            return "diagonal"
    rest = total - power[row][centre]
    before, behind = (sum(sum(line[side]) for line in power) for side in (slice(0, centre), slice(centre + 1, keys)))
    return "one-sided" if max(before, behind) >= 0.6 * rest else "other"


def mixing(matrix):
    """What a mixing [head out][head in] looks like: "identity" where the diagonal has 90% of the squares or more;
    "contrast" where a head is subtracted from another with 10% of its row's squares or more; else "other"."""
    squares = [[w * w for w in line] for line in matrix]
    if sum(squares[i][i] for i in range(len(matrix))) >= 0.9 * sum(map(sum, squares)):
        return "identity"
    contrast = any(
        matrix[i][j] * matrix[i][i] < 0 and squares[i][j] >= 0.1 * sum(squares[i])
        for i in range(len(matrix))
        for j in range(len(matrix))
        if i != j
    )
    return "contrast" if contrast else "other"


def counts(found):
    """{name: {pattern: how many}} of what kernels() found."""
    table = {}
    for (_, name), tensors in found.items():
        for values in tensors:
            kind = (pattern if name.startswith("kq_conv") else mixing)(values)
            table.setdefault(name, {}).setdefault(kind, 0)
            table[name][kind] += 1
    return table


def start_at(kind, folder, seed):
    path = os.path.join(folder, "model.safetensors")
    dice = random.Random(seed)
    with open(path, "rb") as f:
        data = bytearray(f.read())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in sorted(json.loads(data[8:start]).items()):
        if KERNEL.fullmatch(name):
            heads, queries, keys = entry["shape"]
            n = queries * keys
            if entry["dtype"] != "F32":
                raise UserError("%s: %s is %s, wanted F32" % (path, name, entry["dtype"]))
            taps = array.array("f", [dice.gauss(0, n**-0.5) if kind == "random" else 1 / n for _ in range(heads * n)])
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]] = taps.tobytes()
    with open(path + ".partial", "wb") as f:
        f.write(data)
    os.replace(path + ".partial", path)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in ("--help", "-h"):
        print(__doc__.strip())
        sys.exit()
    try:
        if len(sys.argv) == 3 and sys.argv[1] == "patterns":
            for tensor, kinds in counts(kernels(find_checkpoint(sys.argv[2]))).items():
                print("%-13s" % tensor, ", ".join("%d %s" % (n, kind) for kind, n in sorted(kinds.items())))
        elif len(sys.argv) == 4 and sys.argv[1] in ("random", "mean"):
            start_at(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        else:
            raise UserError("wanted patterns and a checkpoint, or random or mean, a checkpoint and a seed; --help says "
                            "more")
    except (UserError, OSError, ValueError) as error:
        sys.exit("evidence_kernels.py: %s" % error)
