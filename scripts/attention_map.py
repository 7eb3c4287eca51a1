#!/usr/bin/env python3
"""Draws what heads attend to over a prompt: attention_map.py DIR --prompt TEXT --layer 2 --head 0 --out FILE.png.
Several heads (--head 0,1,5 or --head all) stand below each other. Each has two pictures: the plain softmax of the
scores, and the weights that multiply the values, after convolution and mixing. --json FILE ... draws files that
infer_mta --attention-map wrote. Needs matplotlib."""

import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "data"))
from export import find_checkpoint  # noqa: E402
from options import Parser, picture_format, whole_number  # noqa: E402
from shards import run_program  # noqa: E402
from tokenizer import UserError  # noqa: E402


def parse_heads(text):
    return text if text == "all" else [whole_number(0)(h) for h in text.split(",")]


def heads_of(args):
    """The heads that --head names; "all" are those that config.json counts."""
    if args.head != "all":
        return args.head
    with open(os.path.join(find_checkpoint(args.dir), "config.json"), encoding="utf-8") as f:
        return list(range(json.load(f)["num_attention_heads"]))


def read_maps(args):
    """The maps' JSON, from the files given or from infer_mta, one for each head."""
    if args.json:
        return [load(path) for path in args.json]
    maps = []
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "map.json")
        for head in heads_of(args):
            command = [args.infer, args.dir, "--attention-map", path, "--layer", str(args.layer), "--head", str(head),
                       "--quiet", "--mapped"]
            for option in ("prompt", "token_ids", "tokenizer"):
                if getattr(args, option) is not None:
                    command.append("--%s=%s" % (option.replace("_", "-"), getattr(args, option)))
            if subprocess.run(command).returncode:
                sys.exit(1)
            maps.append(load(path))
    return maps


def is_triangle(rows, n):
    number = lambda x: type(x) in (int, float)
    return isinstance(rows, list) and len(rows) == n and all(
        isinstance(row, list) and len(row) == i + 1 and all(map(number, row)) for i, row in enumerate(rows))


def load(path):
    """A map of infer_mta's: row i has the weights of query i over keys 0 to i."""
    with open(path, encoding="utf-8") as f:
        try:
            data = json.load(f)
        except ValueError as error:
            raise UserError("%s: no JSON: %s" % (path, error))
    tokens = data.get("tokens") if isinstance(data, dict) else None
    good = isinstance(tokens, list) and tokens and all(isinstance(t, str) for t in tokens)
    good = good and all(type(data.get(key)) is int for key in ("layer", "head"))
    if not good or not all(is_triangle(data.get(key), len(tokens)) for key in ("before", "after")):
        raise UserError("%s: no map as infer_mta --attention-map writes it" % path)
    return data


def label(token):
    """A token as an axis label: blanks and control characters visible, dollar signs not taken for mathematics."""
    return "".join("\u2423" if c == " " else repr(c)[1:-1] if ord(c) < 32 or c == "\x7f" else c for c in token).replace(
        "$", r"\$"
    )


def draw(maps, out):
    """A row for each head: two squares, rows are queries, columns keys; weights below zero (after a convolution) in
    the other colour. The squares of a row have scales of their own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n = max(len(data["tokens"]) for data in maps)
    size = min(40, max(4, 0.16 * n + 1.5))
    font = max(2, min(7, 72 * 0.8 * (size - 1.5) / n))
    figure, grid = pyplot.subplots(len(maps), 2, figsize=(2 * size + 1, len(maps) * size), squeeze=False,
                                   layout="constrained")
    for data, axes in zip(maps, grid):
        labels = [label(t) for t in data["tokens"]]
        for axis, key, title in zip(axes, ("before", "after"), ("softmax of the scores", "weights of the values")):
            rows = [row + [float("nan")] * (len(labels) - len(row)) for row in data[key]]
            top = max(max(abs(x) for x in row) for row in data[key]) or 1.0
            picture = axis.imshow(rows, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
            axis.set_title("layer %d, head %d: %s" % (data["layer"], data["head"], title), fontsize=10)
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=font)
            axis.set_yticks(range(len(labels)), labels, fontsize=font)
            axis.set_xlabel("key: the token that is attended to", fontsize=9)
            axis.set_ylabel("query: the token that attends", fontsize=9)
            figure.colorbar(picture, ax=axis, shrink=0.7, label="weight")
    figure.savefig(out, dpi=150 if len(maps) < 5 else 90, format=picture_format(out))


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("dir", metavar="DIR", nargs="?", help="checkpoint")
    parser.add_argument("--json", metavar="FILE", nargs="+", action="extend", help="draw these files")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="text over which the heads attend")
    given.add_argument("--token-ids", metavar="IDS", help="or its ids")
    parser.add_argument("--tokenizer", metavar="NAME|FILE", help="default: the one that the checkpoint names")
    parser.add_argument("--layer", type=whole_number(0), metavar="N", help="from 0; default 0")
    parser.add_argument("--head", type=parse_heads, metavar="N,...|all", help="from 0; default 0")
    parser.add_argument(
        "--infer", default=os.path.join(ROOT, "infer_mta"), metavar="PROGRAM",
        help="infer_mta (default: the repository's)"
    )
    parser.add_argument("--out", default="attention.png", metavar="FILE", help="the picture (default: attention.png)")
    args = parser.parse_args()
    if bool(args.dir) == bool(args.json):
        parser.error("give a checkpoint directory, or --json FILE")
    for option in ("prompt", "token_ids", "tokenizer", "layer", "head"):
        if args.json and getattr(args, option) is not None:
            parser.error("--%s: no use beside --json, whose files are drawn as they are" % option.replace("_", "-"))
    if args.dir and args.prompt is None and args.token_ids is None:
        parser.error("wanted --prompt TEXT or --token-ids IDS, over which the heads attend")
    args.layer, args.head = args.layer or 0, args.head or [0]
    try:
        draw(read_maps(args), args.out)
    except (UserError, OSError, ValueError, KeyError, ImportError) as error:
        sys.exit("attention_map.py: %s" % error)
    print(args.out)


if __name__ == "__main__":
    run_program(main)
