#!/usr/bin/env python3
"""Speed of tokenisation, everything in one run: tiktoken alone, data/prepare.py, and mta/tokenizer.h.

    data/.venv/bin/python dev/bench/tokenizers.py [--mb 100] [--rounds 3] [--text DIR ...]

Documents are text files of this machine. tiktoken: encode_ordinary_batch on all of them. prepare.py: the whole command
from start to published shards, from the same documents in .jsonl.zst. mta/tokenizer.h: tokenizer_encode of each
document. "per core" is MB of text per second of processor time (user and system, of all threads and processes), which
other work on the machine disturbs less than time on the clock; that is given beside it. Best of the rounds; the
three take turns.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "data"))
sys.path.insert(0, os.path.join(ROOT, "dev", "tests"))
import tiktoken  # noqa: E402
import zstandard  # noqa: E402
from tokenizer import PATTERNS, read_ranks  # noqa: E402
from test_tokenizer import GOLDEN, Library, Tokenizer, machine_texts  # noqa: E402


def processor_time():
    """Of this process and of the children that have ended."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


class Timer:
    """The best of several rounds, in processor time and on the clock."""

    def __init__(self, name, function, size):
        self.name, self.function, self.size = name, function, size
        self.cpu = self.wall = float("inf")

    def round(self):
        cpu, wall = processor_time(), time.perf_counter()
        self.function()
        self.cpu, self.wall = min(self.cpu, processor_time() - cpu), min(self.wall, time.perf_counter() - wall)

    def show(self, reference=None):
        ratio = "   %.2f of tiktoken's" % (reference.cpu / self.cpu) if reference else ""
        print(
            "%-44s %7.2f MB/s per core  %7.2f MB/s on the clock%s"
            % (self.name, self.size / self.cpu, self.size / self.wall, ratio),
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--text", nargs="+", default=["/usr/share", "/usr/lib/python3", "/usr/local/lib", "/usr/include", "/usr/lib"]
    )
    args = parser.parse_args()
    texts = machine_texts(args.text, args.mb * 1e6)
    data = [t.encode() for t in texts]
    size = sum(map(len, data)) / 1e6
    cores = os.cpu_count() or 1
    ranks = os.path.join(GOLDEN, "cl100k_base.tiktoken")
    encoding = tiktoken.Encoding(
        "x", pat_str=PATTERNS["cl100k_base"], mergeable_ranks=read_ranks(ranks), special_tokens={}
    )
    print("%d documents, %.1f MB, cl100k_base, %d cores" % (len(texts), size, cores), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.jsonl.zst")
        with open(path, "wb") as f:
            f.write(
                zstandard.ZstdCompressor().compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
            )

        def prepare(workers):
            subprocess.run(
                [
                    sys.executable, os.path.join(ROOT, "data", "prepare.py"), "text", path, "--tokenizer", ranks,
                    "--workers", str(workers), "--out", os.path.join(folder, "out"),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            shutil.rmtree(os.path.join(folder, "out"))

        alone = Timer(
            "tiktoken encode_ordinary_batch, 1 thread",
            lambda: encoding.encode_ordinary_batch(texts, num_threads=1),
            size,
        )
        timers = [
            Timer("prepare.py, %d worker%s" % (n, "s" * (n > 1)), lambda n=n: prepare(n), size)
            for n in sorted({1, cores})
        ]
        library = Library(folder)
        for pattern in PATTERNS:
            t = Tokenizer(
                library, os.path.join(GOLDEN, ("gpt2" if pattern == "gpt2" else "cl100k_base") + ".tiktoken"), pattern
            )
            t.encode(max(data, key=len))  # makes room for the longest
            timers.append(
                Timer(
                    "mta/tokenizer.h, 1 thread, " + pattern,
                    lambda t=t: [t.lib.lib_encode(t.handle, d, len(d), t.ids, t.message) for d in data],
                    size,
                )
            )
        for _ in range(args.rounds):
            for timer in [alone] + timers:
                timer.round()
    alone.show()
    for timer in timers:
        timer.show(alone)


if __name__ == "__main__":
    main()
