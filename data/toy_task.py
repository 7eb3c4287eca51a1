#!/usr/bin/env python3
"""Makes the toy task of the Multi-Token Attention paper ("find the block") as token shards with loss masks.

A sequence is BOS, blocks of N letters joined by ".", "#", L letters, the answer, EOS. The letters of a block are
distinct, and exactly one block holds all L letters of the question. The answer is that block ("all"), or its "first" or
its "last" letter. To find it, a query must match L keys at once: one attention weight of a plain Transformer compares
one query with one key.

    python3 data/toy_task.py --out data/toy                     # the paper's size: N = 5, 52 blocks, a million
                                                                sequences of 321 tokens
    python3 data/toy_task.py --out data/toy --n 4 --blocks 8 --kind first --train-samples 50000
    python3 data/toy_task.py --examples 3 --n 4 --blocks 8      # prints, writes nothing

writes OUT/NAME_train_000000.bin (and more, if it is long) and OUT/NAME_val_000000.bin with .mask files beside them (1
for the answer and EOS), OUT/NAME_task.json, which says how they were made, and OUT/manifest.json, from which trainers
take the tokenizer. Every sequence has the same length S (printed, and "length" in the JSON file), "_" filling it up,
and starts at a multiple of S: train with --seq-len S. A sequence of the test set (val) is in it once and never in the
training set. The standard library suffices.
"""
import argparse
import collections
import json
import os
import random
import re
import sys
import zlib
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from options import Parser, whole_number  # noqa: E402
from shards import (  # noqa: E402
    FORMAT, HEADER_BYTES, NAME_WITH_SPLIT, SPLIT_IN_NAME, cores, end_with, foreign_shard, interrupts_later, locked,
    manifest_lock, outcome, read_manifest, run_program, shard_header, sync_file, tokenizer_entry, write_manifest,
)
from tokenizer import ToyTokenizer, UserError, widened  # noqa: E402

TOY = ToyTokenizer()
DOT, HASH, PAD, BOS, EOS = 26, 27, 28, TOY.bos, TOY.eos
SYMBOLS = "abcdefghijklmnopqrstuvwxyz.#_^$?"  # as printed by --examples: ^ BOS, $ EOS
KINDS = ("all", "first", "last")
PAPER_LENGTH = 321
CHUNK = 2000  # sequences that share a random state; part of what a seed means
SHARD_TOKENS = 1 << 27

# A random byte below 234 = 9 x 26 is a letter, others are dropped: bytes.translate makes uniform letters at the speed
# of C.
LETTER_OF_BYTE = bytes(b % 26 for b in range(256))
BYTES_DROPPED = bytes(range(234, 256))


class Task:
    """The sizes of one task; `length` is the number of tokens of every sequence."""

    def __init__(self, n, l, kind, blocks, length=None):
        self.n, self.l, self.kind, self.blocks = n, l, kind, blocks
        self.answer = n if kind == "all" else 1
        self.used = 1 + blocks * (n + 1) - 1 + 1 + l + self.answer + 1
        self.length = length or self.used


def letters(rng, count):
    """At least `count` independent uniform letters."""
    out = b""
    while len(out) < count:
        out += rng.randbytes(count + 64).translate(LETTER_OF_BYTE, BYTES_DROPPED)
    return out


def draw_blocks(rng, n):
    """Endless blocks of n distinct letters, each equally likely."""
    if n > 10:  # the chance that n letters are distinct is small: draw without replacement
        while True:
            yield bytes(rng.sample(range(26), n))
    while True:
        stream = letters(rng, 4096 * n)
        for start in range(0, len(stream) - n + 1, n):
            block = stream[start:start + n]
            if len(set(block)) == n:
                yield block


def draw_sequences(task, rng):
    """Endless (prompt, answer) pairs of token bytes; a prompt runs from BOS to the last letter of the question."""
    blocks = draw_blocks(rng, task.n)
    separator = bytes([DOT])
    head, question_mark = bytes([BOS]), bytes([HASH])
    while True:
        target = next(blocks)
        question = bytes(rng.sample(target, task.l))
        wanted = set(question)
        row = []
        while len(row) < task.blocks - 1:
            block = next(blocks)
            if not wanted.issubset(block):
                row.append(block)
        row.insert(rng.randrange(task.blocks), target)
        prompt = head + separator.join(row) + question_mark + question
        answer = {"all": target, "first": target[:1], "last": target[-1:]}[task.kind]
        yield prompt, answer


def finish(task, prompt, answer):
    """Token bytes and mask bytes of one whole sequence; the mask marks the answer and EOS, which are targets."""
    body = prompt + answer + bytes([EOS])
    fill = task.length - len(body)
    return body + bytes([PAD]) * fill, bytes(len(prompt)) + b"\1" * (len(answer) + 1) + bytes(fill)


def chunk_rng(task, seed, split, chunk):
    """The random state of a chunk: a function of the task without its kind, the seed, the split and the chunk's
    number."""
    return random.Random(f"mta toy {task.n} {task.l} {task.blocks} {seed} {split} {chunk}")


def take(task, rng, count, refused, distinct):
    """`count` sequences whose prompts are not in the set `refused`; distinct: and none twice. Returns a list of
    (prompt, answer)."""
    out, tries = [], 0
    seen = set(refused) if distinct else refused
    for prompt, answer in draw_sequences(task, rng):
        if len(out) == count:
            return out
        tries += 1
        if tries > 100 * count + 10000:
            raise ValueError(f"found only {len(out)} of {count} sequences that differ from the others; ask for fewer, "
                             f"or for more blocks")
        if prompt in seen:
            continue
        if distinct:
            seen.add(prompt)
        out.append((prompt, answer))
    raise AssertionError("draw_sequences ended")


class ShardWriter:
    """Writes NAME_SPLIT_000000.bin.partial, .mask.partial and so on, the header last; publish() renames them."""

    def __init__(self, task, prefix):
        self.task, self.prefix = task, prefix
        self.per_shard = max(1, (SHARD_TOKENS - 1) // task.length)
        self.number, self.count, self.files = 0, 0, None
        self.shards, self.ready = {}, []  # their entries in the manifest, by file name; their paths

    def paths(self):
        base = f"{self.prefix}_{self.number:06d}"
        return base + ".bin", base + ".mask"

    def open(self):
        self.files = [open(path + ".partial", "wb") for path in self.paths()]
        self.files[0].write(bytes(HEADER_BYTES))
        self.count, self.crc = 0, 0

    def put(self, tokens, mask):
        """Tokens and mask of whole sequences."""
        while tokens:
            if self.files is None:
                self.open()
            n = min(len(tokens), (self.per_shard - self.count) * self.task.length)
            self.write(tokens[:n], mask[:n])
            self.count += n // self.task.length
            tokens, mask = tokens[n:], mask[n:]
            if self.count == self.per_shard:
                self.close()

    def write(self, tokens, mask):
        wide = widened(tokens)
        self.crc = zlib.crc32(wide, self.crc)
        self.files[0].write(wide)
        self.files[1].write(mask)

    def close(self):
        """Adds the token that follows the last window, as its (masked) last target; the files are complete."""
        if self.files is None:
            return
        self.write(bytes([BOS]), b"\0")
        count = self.count * self.task.length + 1
        self.files[0].seek(0)
        self.files[0].write(shard_header(TOY.width, count, TOY.vocab, self.crc, mask=1))
        for f in self.files:
            f.flush()
            sync_file(f.fileno())
            f.close()
        self.files = None
        self.ready += reversed(self.paths())  # the mask first: a .bin in place is complete
        name = os.path.basename(self.paths()[0])
        self.shards[name] = {"documents": self.count + 1, "tokens": count, "bytes": HEADER_BYTES + TOY.width * count,
                             "crc32": "%08x" % self.crc}
        self.number += 1

    def publish(self):
        for path in self.ready:
            os.replace(path + ".partial", path)


def write_split(task, split, chunks, prefix, count, show):
    """Writes a split from an iterable of lists of (prompt, answer); returns its ShardWriter."""
    writer, done = ShardWriter(task, prefix), 0
    for pairs in chunks:
        parts = [finish(task, prompt, answer) for prompt, answer in pairs]
        writer.put(b"".join(p[0] for p in parts), b"".join(p[1] for p in parts))
        done += len(pairs)
        if show:
            print(f"\r{split}: {done} of {count} sequences", end="", file=sys.stderr, flush=True)
    writer.close()
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return writer


def train_chunk(job):
    """One chunk of the training set, in a process of its own."""
    task, seed, chunk, count, test_prompts = job
    return take(task, chunk_rng(task, seed, "train", chunk), count, test_prompts, distinct=False)


def train_chunks(task, seed, count, test_prompts, jobs):
    """The training set by chunks, in order, computed by `jobs` processes."""
    work = ((task, seed, start // CHUNK, min(CHUNK, count - start), test_prompts) for start in range(0, count, CHUNK))
    if jobs == 1 or count <= 4 * CHUNK:
        yield from map(train_chunk, work)
        return
    # Not a multiprocessing.Pool: it may wait forever where the writing ends early, and does where a worker dies.
    pool, waiting = ProcessPoolExecutor(jobs, initializer=end_with, initargs=(os.getpid(),)), collections.deque()
    try:
        for job in work:
            with interrupts_later():
                waiting.append(pool.submit(train_chunk, job))
            if len(waiting) > 4 * jobs:
                yield outcome(pool, waiting.popleft())
        while waiting:
            yield outcome(pool, waiting.popleft())
    except BrokenProcessPool:
        raise UserError("a worker process died (out of memory?); run the same command again, with fewer --jobs")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def text(tokens):
    return "".join(SYMBOLS[t] for t in tokens)


def check(options):
    """The task of these options, if they make one."""
    if not 1 <= options.n <= 26:
        raise UserError(f"--n: got {options.n}, wanted 1 to 26 letters a block")
    if not 1 <= options.l <= options.n:
        raise UserError(f"--l: got {options.l}, wanted 1 to N = {options.n} letters in the question")
    blocks = options.blocks
    if blocks is None:  # as many as the paper's length holds with the longest answer
        blocks = (PAPER_LENGTH - (1 + 1 + options.l + options.n + 1) + 1) // (options.n + 1)
    if blocks < 1:
        raise UserError(f"--blocks: got {blocks}, wanted at least 1")
    if blocks > 1 and options.n == 26:
        raise UserError("--n 26 with several blocks: every block holds every letter, so none is the only match")
    if options.train_samples < 0 or options.test_samples < 0:
        raise UserError("--train-samples and --test-samples: wanted 0 or more")
    task = Task(options.n, options.l, options.kind, blocks, options.length)
    if task.length < task.used:
        raise UserError(f"--length: got {task.length}, the sequences have {task.used} tokens")
    if task.length >= SHARD_TOKENS:
        raise UserError(f"sequences of {task.length} tokens are too long for a shard of {SHARD_TOKENS}")
    return task


class Defaults(argparse.HelpFormatter):
    """Says the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help + ("" if action.default in (None, argparse.SUPPRESS) else " (default: %(default)s)")


def main():
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=Defaults)
    parser.add_argument("--out", metavar="DIR", help="folder of the shards, made if missing")
    parser.add_argument("--name", default="toy", help="start of the file names")
    parser.add_argument("--n", type=whole_number(), default=5, metavar="N", help="letters a block (the paper: 5 and 8)")
    parser.add_argument("--l", type=whole_number(), default=2, metavar="N", help="letters in the question")
    parser.add_argument("--kind", choices=KINDS, default="all", help="what is asked for")
    parser.add_argument("--blocks", type=whole_number(), metavar="N",
                        help="blocks a sequence; by default what fits into 321 tokens (52 for N = 5, 34 for N = 8)")
    parser.add_argument("--length", type=whole_number(), metavar="N",
                        help="tokens a sequence, filled up with \"_\"; by default what is needed")
    parser.add_argument("--train-samples", type=whole_number(), default=1000000, metavar="N",
                        help="sequences of the training set")
    parser.add_argument("--test-samples", type=whole_number(), default=1000, metavar="N",
                        help="sequences of the test set")
    parser.add_argument("--seed", type=whole_number(), default=1, metavar="N", help="another seed, other sequences")
    parser.add_argument("--jobs", type=whole_number(1), default=cores(), metavar="N", help="processes")
    parser.add_argument("--examples", type=whole_number(0), default=0, metavar="N",
                        help="print N training sequences and stop; 0: make the shards")
    options = parser.parse_args()
    task = check(options)
    if options.examples > 0:
        for prompt, answer in take(task, chunk_rng(task, options.seed, "train", 0), options.examples, set(),
                                   distinct=False):
            print(text(prompt), text(answer))
        return
    if not options.out:
        raise UserError("--out: the folder of the shards is missing")
    if not options.name or "/" in options.name:
        raise UserError(f"--name {options.name}: wanted the start of a file's name")
    if SPLIT_IN_NAME.search(options.name):
        raise UserError(NAME_WITH_SPLIT % options.name)
    try:
        os.makedirs(options.out, exist_ok=True)
        lock = os.path.join(options.out, f".{options.name}.lock")
        with locked(lock, f"{options.out}: another toy_task.py is at work on {options.name} there"):
            write(options, task)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename or options.out}: {error.strerror}")
    except ValueError as error:
        raise UserError(error)


def refuse_others(options, made):
    """The manifest, unless it, or a shard that it does not list, is in the way."""
    manifest = read_manifest(options.out)
    there = manifest["preparations"].get(options.name)
    if there and there["options"] != {"command": "toy_task", **made}:
        raise UserError(f"{options.out} holds a preparation {options.name} of other options; give another --name or "
                        "--out")
    own = re.compile(re.escape(options.name) + r"_(train|val)_[0-9]{6}\.bin")
    found = foreign_shard(options.out, manifest, options.name, filter(own.fullmatch, os.listdir(options.out)))
    if found:
        owner = f"belongs to the preparation {found[1]}" if found[1] else "is there and in no manifest"
        raise UserError(f"{found[0]} {owner}; give another --name or --out")
    return manifest


def write(options, task):
    """All files of the task."""
    prefix, show = os.path.join(options.out, options.name), sys.stderr.isatty()
    made = {"task": "find the block", "n": task.n, "l": task.l, "kind": task.kind, "blocks": task.blocks,
            "length": task.length, "train_samples": options.train_samples, "test_samples": options.test_samples,
            "seed": options.seed, "tokenizer": "toy"}
    refuse_others(options, made)
    left = re.compile(re.escape(options.name) + r"_(train|val)_[0-9]{6}\.(bin|mask)\.partial")
    for name in filter(left.fullmatch, os.listdir(options.out)):  # of a call that was stopped
        os.remove(os.path.join(options.out, name))
    test = take(task, chunk_rng(task, options.seed, "test", 0), options.test_samples, set(), distinct=True)
    written = {"val": write_split(task, "test", [test], prefix + "_val", len(test), show)}
    chunks = train_chunks(task, options.seed, options.train_samples, {prompt for prompt, _ in test}, options.jobs)
    written["train"] = write_split(task, "training", chunks, prefix + "_train", options.train_samples, show)
    shards = {split: writer.shards for split, writer in written.items()}
    with manifest_lock(options.out):
        manifest = refuse_others(options, made)  # again: others may have come meanwhile
        # The manifest first: the same command, given again after an interruption, finds its own shards and goes on.
        write_entry(options.out, manifest, options.name, shards, {"command": "toy_task", **made})
        for writer in written.values():
            writer.publish()
    with open(prefix + "_task.json", "w", encoding="utf-8") as f:
        json.dump({**made, "shards": [*shards["val"], *shards["train"]]}, f, indent=1)
        f.write("\n")
    print(f"{prefix}_train_*.bin: {options.train_samples} sequences, {prefix}_val_*.bin: {options.test_samples}, of "
          f"{task.length} tokens each (--seq-len {task.length})")


def write_entry(out, manifest, name, shards, options):
    """The manifest's part on these shards; a document is what begins with BOS, the one after the last window too."""
    sets = {}
    for split, entries in shards.items():
        for entry in entries.values():
            entry.update(preparation=name, set=name, split=split)
        sums = {key: sum(entry[key] for entry in entries.values()) for key in ("documents", "tokens")}
        if entries:
            sets[split] = {**sums, "text_bytes": sums["tokens"], "shards": len(entries)}
    preparation = {"format": FORMAT, "tokenizer": tokenizer_entry(TOY, manifest, name), "sets": {name: sets}, "bad": {},
                   "options": options, "inputs": {}}
    write_manifest(out, manifest, name, preparation, {**shards["train"], **shards["val"]}, TOY)


if __name__ == "__main__":
    run_program(main)
