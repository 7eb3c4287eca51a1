#!/usr/bin/env python3
"""Draws what one head attends to over a prompt: attention_map.py DIR --prompt TEXT --layer 2 --head 0 --out
FILE.png. The left picture is the plain softmax of the scores, the right one the weights that multiply the values,
after convolution and mixing; with --json the file that infer_mta --attention-map wrote is drawn instead. Needs
matplotlib."""

import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))


def read_map(args):
    """The map's JSON, from the file given or from infer_mta."""
    if args.json:
        with open(args.json) as f:
            return json.load(f)
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "map.json")
        command = [
            args.infer,
            args.dir,
            "--attention-map",
            path,
            "--layer",
            str(args.layer),
            "--head",
            str(args.head),
            "--quiet",
        ]
        command += ["--token-ids", args.token_ids] if args.token_ids else ["--prompt", args.prompt or ""]
        command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
        if subprocess.run(command).returncode:
            sys.exit(1)
        with open(path) as f:
            return json.load(f)


def label(token):
    """A token as an axis label: blanks and control characters visible, dollar signs not taken for mathematics."""
    return "".join("\u2423" if c == " " else repr(c)[1:-1] if ord(c) < 32 or c == "\x7f" else c for c in token).replace(
        "$", r"\$"
    )


def draw(data, out):
    """Two squares side by side, rows are queries, columns keys; weights below zero (after a convolution) in the
    other colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n = len(data["tokens"])
    labels = [label(t) for t in data["tokens"]]
    size = min(40, max(4, 0.16 * n + 1.5))
    figure, axes = pyplot.subplots(1, 2, figsize=(2 * size, size), constrained_layout=True)
    for axis, key, title in zip(axes, ("before", "after"), ("softmax of the scores", "weights of the values")):
        rows = [row + [float("nan")] * (n - len(row)) for row in data[key]]
        top = max(max(abs(x) for x in row) for row in data[key]) or 1.0
        picture = axis.imshow(rows, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        axis.set_title("layer %d, head %d: %s" % (data["layer"], data["head"], title), fontsize=9)
        axis.set_xticks(range(n))
        axis.set_yticks(range(n))
        axis.set_xticklabels(labels, rotation=90, fontsize=6)
        axis.set_yticklabels(labels, fontsize=6)
        figure.colorbar(picture, ax=axis, shrink=0.7)
    figure.savefig(out, dpi=150)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("dir", metavar="DIR", nargs="?", help="checkpoint")
    parser.add_argument("--json", metavar="FILE", help="draw this file")
    parser.add_argument("--prompt")
    parser.add_argument("--token-ids")
    parser.add_argument("--tokenizer")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument(
        "--infer", default=os.path.join(ROOT, "infer_mta"), help="the program (default: the repository's)"
    )
    parser.add_argument("--out", default="attention.png")
    args = parser.parse_args()
    if not args.dir and not args.json:
        parser.error("give a checkpoint directory, or --json FILE")
    draw(read_map(args), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
