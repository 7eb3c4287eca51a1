#!/usr/bin/env python3
"""Draws every learned convolution kernel and head mixing matrix of a checkpoint, by layer and head.

    data/.venv/bin/python scripts/plot_kernels.py runs/text         # the newest checkpoint of a run, pictures beside it
    data/.venv/bin/python scripts/plot_kernels.py runs/text/step-00001000 --out pictures

writes, for each kind the checkpoint has, kq_conv.png, kq_conv_post.png, head_mix_pre.png, head_mix.png. A square marks
where training started: the identity, 1 there and 0 elsewhere. Colours end at the largest weight beside those squares,
which are often beyond. numpy and matplotlib are needed.
"""
import os
import re
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "data")]
from export import find_checkpoint, read_header, weight_files  # noqa: E402
from options import Parser  # noqa: E402
from shards import run_program  # noqa: E402
from tokenizer import UserError  # noqa: E402

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    missing = None
except ImportError as error:  # --help works without; main() says what is missing
    missing = (f"plot_kernels.py: {error}; python3 -m venv data/.venv && data/.venv/bin/pip install numpy matplotlib, "
               "then run it with data/.venv/bin/python")

KINDS = {
    "kq_conv": "key-query convolution before the softmax",
    "kq_conv_post": "key-query convolution after the softmax",
    "head_mix_pre": "head mixing before the softmax",
    "head_mix": "head mixing after the softmax",
}
WANTED = re.compile(r"model\.layers\.(\d+)\.self_attn\.(kq_conv|kq_conv_post|head_mix_pre|head_mix)\.weight")
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2"}  # as numpy names them


def read_tensors(path):
    """The tensors of one safetensors file whose names are WANTED: {(kind, layer): array}."""
    out = {}
    with open(path, "rb") as f:
        for name, entry in read_header(path).items():
            match = WANTED.fullmatch(name)
            if not match:
                continue
            f.seek(entry["begin"])
            data = np.frombuffer(f.read(entry["end"] - entry["begin"]), dtype=DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                data = (data.astype(np.uint32) << 16).view(np.float32)
            out[match[2], int(match[1])] = data.reshape(entry["shape"]).astype(np.float64)
    return out


def read_checkpoint(folder):
    """All of them, from model.safetensors or the files of its index."""
    out = {}
    for name in weight_files(folder)[0]:
        out.update(read_tensors(os.path.join(folder, name)))
    return out


def colour_limit(layers, identity):
    """Where the colours end: the largest weight beside the identity's ones, so that these do not make everything else
    look like zero."""
    beside = (np.where(identity | ~np.isfinite(values), 0, values) for values in layers.values())
    return max(max(np.abs(values).max() for values in beside), 0.01)


def heat(ax, values, marks, limit):
    """One matrix: red above zero, blue below; `marks` are the (row, column) cells of the identity. Small ones get their
    numbers."""
    rows, columns = values.shape
    image = ax.imshow(np.ma.masked_invalid(values), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="equal",
                      interpolation="nearest")
    ax.set_facecolor("#e8e8e8")
    for r, c in marks:
        ax.add_patch(plt.Rectangle((c - 0.5, r - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.3))
    if rows * columns <= 36:
        for r in range(rows):
            for c in range(columns):
                if np.isfinite(values[r, c]):
                    ax.text(c, r, f"{values[r, c]:.2f}", ha="center", va="center", fontsize=6.5,
                            color="white" if abs(values[r, c]) > 0.6 * limit else "black")
    return image


def draw_kernels(kind, layers, title, out):
    """layers: {layer: (heads, cq, ck)}; the heads of a layer in rows of up to eight."""
    heads, cq, ck = next(iter(layers.values())).shape
    identity = np.zeros((cq, ck), dtype=bool)
    identity[cq - 1, (ck - 1) // 2] = True
    limit = colour_limit(layers, identity)
    columns = min(heads, 8)
    rows_each = -(-heads // columns)
    cell = 0.42 if cq * ck <= 36 else 0.2
    width = max(ck * cell, 1.5) * columns + 2.4
    height = (max(cq * cell, 0.7) + 0.55) * len(layers) * rows_each + 1.0
    figure, axes = plt.subplots(len(layers) * rows_each, columns, figsize=(max(width, 6.5), height), squeeze=False,
                                layout="constrained")
    for place, (layer, kernels) in enumerate(sorted(layers.items())):
        panels = axes[place * rows_each:(place + 1) * rows_each].flat
        for h, ax in enumerate(panels):
            if h >= heads:
                ax.axis("off")
                continue
            image = heat(ax, kernels[h], [(cq - 1, (ck - 1) // 2)], limit)
            ax.set_title(f"layer {layer}, head {h}", fontsize=8)
            step = 1 if ck <= 9 else 2 if ck <= 15 else 5
            offsets = [b for b in range(-(ck - 1) // 2, (ck - 1) // 2 + 1) if b % step == 0]
            ax.set_xticks([b + (ck - 1) // 2 for b in offsets], [f"{b:+d}" if b else "0" for b in offsets], fontsize=6)
            ax.set_yticks(range(cq), [f"{a - cq + 1}" for a in range(cq)], fontsize=6)
    figure.supxlabel("key, relative to the attended one", fontsize=9)
    figure.supylabel("query, relative to the current one", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight", aspect=30, extend="both")
    figure.suptitle(f"{title}\n{KINDS[kind]}; the square marks the identity", fontsize=10)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_mixing(kind, layers, title, out):
    """layers: {layer: (groups, ch, ch)}; a panel a layer, its groups along the diagonal of a heads x heads matrix."""
    groups, ch, _ = next(iter(layers.values())).shape
    heads = groups * ch
    limit = colour_limit(layers, np.eye(ch, dtype=bool))
    columns = min(len(layers), 6)
    rows = -(-len(layers) // columns)
    side = max(1.6, heads * (0.42 if heads <= 6 else 0.14))
    figure, axes = plt.subplots(rows, columns,
                                figsize=(max(6.5, (side + 0.5) * columns + 2.4), (side + 0.7) * rows + 1.4),
                                squeeze=False, layout="constrained")
    for ax in axes.flat[len(layers):]:
        ax.axis("off")
    for ax, (layer, weights) in zip(axes.flat, sorted(layers.items())):
        whole = np.full((heads, heads), np.nan)
        for g in range(groups):
            whole[g * ch:(g + 1) * ch, g * ch:(g + 1) * ch] = weights[g]
        image = heat(ax, whole, [(h, h) for h in range(heads)], limit)
        ax.set_title(f"layer {layer}", fontsize=8)
        ticks = range(0, heads, 1 if heads <= 8 else 4)
        ax.set_xticks(ticks, ticks, fontsize=6)
        ax.set_yticks(ticks, ticks, fontsize=6)
    figure.supxlabel("from head", fontsize=9)
    figure.supylabel("to head", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight", aspect=30, extend="both")
    grey = ", grey: heads of other groups" if groups > 1 else ""
    figure.suptitle(f"{title}\n{KINDS[kind]}; the squares mark the identity{grey}", fontsize=10)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="checkpoint folder, or a run's folder for its newest checkpoint")
    parser.add_argument("--out", metavar="DIR", help="folder of the pictures (default: the given folder)")
    parser.add_argument("--title", help="first line of the heading (default: the checkpoint's folder)")
    options = parser.parse_args()
    if missing:
        sys.exit(missing)
    try:
        folder = find_checkpoint(options.checkpoint)
        tensors = read_checkpoint(folder)
        if not tensors:
            raise ValueError(f"{folder}: no convolution kernel and no mixing matrix: a plain Transformer")
        out = options.checkpoint if options.out is None else options.out
        os.makedirs(out, exist_ok=True)
        title = options.title or "/".join(os.path.normpath(os.path.abspath(folder)).split(os.sep)[-2:])
        for kind in KINDS:
            layers = {layer: values for (k, layer), values in tensors.items() if k == kind}
            if layers:
                path = os.path.join(out, kind + ".png")
                (draw_kernels if kind.startswith("kq") else draw_mixing)(kind, layers, title, path)
                print(path)
    except (UserError, OSError, ValueError, KeyError) as error:
        sys.exit(f"plot_kernels.py: {error}")


if __name__ == "__main__":
    run_program(main)
