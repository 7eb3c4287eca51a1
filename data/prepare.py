#!/usr/bin/env python3
"""Turns text into the token shards that train_mta reads: llm.c's format, see data/README.md.

    prepare.py text INPUTS... --tokenizer bytes --out DIR [--name NAME]
    prepare.py slimpajama INPUTS... --tokenizer tokenizer.model --out DIR [--download FOLDER]
    prepare.py inspect SHARD
    prepare.py verify DIR

INPUTS are files, folders or quoted globs: .jsonl, .jsonl.zst, .jsonl.gz and .parquet hold many documents, any other
file is one document. With a built-in tokenizer (bytes, toy) and inputs that are not .zst or .parquet the standard
library suffices. A preparation that is stopped at any moment, even by kill -9, goes on when the same command is given
again, and ends with the same bytes.
"""

import argparse
import base64
import codecs
import collections
import fcntl
import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
import signal
import stat
import struct
import sys
import threading
import time
import zlib

MAGIC = {2: (20240520, 1), 4: (20240801, 7)}  # bytes a token -> llm.c's magic and version
HEADER_BYTES = 1024
TOY = "abcdefghijklmnopqrstuvwxyz.#_"
BLOCK = 1 << 20  # bytes of lines that a worker gets at once
SEGMENT = 4 << 20  # bytes of one long text that a worker gets at once
FORMAT = 1  # of manifest and state

# SlimPajama's names of its sources -> the names of our shards
SLIMPAJAMA = {
    "RedPajamaCommonCrawl": "commoncrawl",
    "RedPajamaC4": "c4",
    "RedPajamaGithub": "github",
    "RedPajamaBook": "book",
    "RedPajamaArXiv": "arxiv",
    "RedPajamaWikipedia": "wikipedia",
    "RedPajamaStackExchange": "stackexchange",
}

# How text is cut into pieces before byte-pair merging: gpt2, cl100k_base and o200k_base as tiktoken 0.14.0 has them,
# llama3 as Meta published it.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s""",
    "llama3": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "o200k_base": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit status 1."""


class Parser(argparse.ArgumentParser):
    """A mistake in the options is one line and exit status 1, as in the programs."""

    def error(self, message):
        self.exit(1, "%s: %s; --help lists all options\n" % (self.prog, message))


class BadDocument(Exception):
    """A document that cannot be used: (kind, detail). The kind is what is counted."""


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: encode() gives the packed ids of a text, `width` bytes each, without BOS and EOS


@functools.lru_cache(maxsize=1)
def read_ranks(path):
    """A tiktoken rank file as a dictionary {bytes: rank}; refused with file and line where it is not whole."""
    ranks, lines = {}, {}
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise UserError("%s: %s" % (path, e.strerror))
    if data[:1] == b"{":
        raise UserError(
            "%s: JSON (Hugging Face's tokenizer.json?), wanted a tiktoken rank file, like Llama 3's tokenizer.model"
            % path
        )
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            raise UserError("%s:%d: wanted a line of a tiktoken rank file: BASE64 RANK" % (path, number))
        if not token or rank < 0:
            raise UserError("%s:%d: wanted a token of one byte at least and a rank from 0" % (path, number))
        if token in ranks:
            raise UserError("%s:%d: the same token as on line %d" % (path, number, lines[ranks[token]]))
        if rank in lines:
            raise UserError("%s:%d: rank %d a second time, it was on line %d" % (path, number, rank, lines[rank]))
        ranks[token] = rank
        lines[rank] = number
    for expected, rank in enumerate(sorted(lines)):
        if rank != expected:
            raise UserError("%s:%d: a hole: got rank %d, but no line has rank %d" % (path, lines[rank], rank, expected))
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError("%s: no token for the single byte 0x%02x, wanted one for each of the 256" % (path, byte))
    return ranks


def split_pattern_of(path):
    """The pattern that a rank file's name tells, None where it tells none. mta/tokenizer.h has the same list."""
    name = os.path.basename(path).lower()
    for pattern, marks in (
        ("gpt2", ("gpt2", "gpt-2", "r50k")),
        ("cl100k_base", ("cl100k",)),
        ("o200k_base", ("o200k",)),
        ("llama3", ("llama3", "llama-3", "tokenizer.model")),
    ):
        if any(mark in name for mark in marks):
            return pattern
    return None


class BytesTokenizer:
    """One id a byte; 256 starts a document, 257 ends it, 258 pads."""

    name, vocab, bos, eos, width, path, file_name = "bytes", 259, 256, 257, 2, None, "bytes"

    def encode(self, text):
        data = text.encode("utf-8")
        ids = bytearray(2 * len(data))
        ids[::2] = data
        return bytes(ids)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256)


class ToyTokenizer:
    """a-z . # _ as 0 to 28; 29 starts a document, 30 ends it; 32 ids in all."""

    name, vocab, bos, eos, width, path, file_name = "toy", 32, 29, 30, 2, None, "toy"
    ids = {c: i for i, c in enumerate(TOY)}

    def encode(self, text):
        try:
            return struct.pack("<%dH" % len(text), *[self.ids[c] for c in text])
        except KeyError as e:
            raise BadDocument("tokenizer refused", "the toy tokenizer has no %s, only a-z . # _" % ascii(e.args[0]))

    def decode(self, ids):
        return "".join(TOY[i] for i in ids if i < len(TOY)).encode()


class RankTokenizer:
    """A tiktoken rank file with one of the four patterns; ids as in the head of mta/tokenizer.h."""

    def __init__(self, path, pattern, encoder=True):
        self.name, self.path, self.file_name = pattern, path, pattern + ".tiktoken"
        self.ranks = read_ranks(path)
        n = len(self.ranks)
        self.bos = n if pattern in ("gpt2", "llama3") else n + 1
        self.eos = n + 1 if pattern == "llama3" else -1
        self.vocab = n + {"gpt2": 1, "llama3": 256}.get(pattern, 21)
        self.width = 2 if self.vocab <= 65536 else 4
        self.tokens = None
        if encoder:
            tiktoken = need("tiktoken")
            # encode() allows no special token, so this one is text like any other; with none at all tiktoken would look
            # for the empty string, which is everywhere, and be slower
            self.encoding = tiktoken.Encoding(
                pattern,
                pat_str=PATTERNS[pattern],
                mergeable_ranks=self.ranks,
                special_tokens={"<|endoftext|>": self.bos},
            )
            self.dtype = "<u2" if self.width == 2 else "<u4"

    def encode(self, text):
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:
            raise BadDocument("lone surrogate", "half of a surrogate pair, which UTF-8 cannot hold")
        except BaseException as e:  # the Rust side's panics are no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise BadDocument("tokenizer refused", "tiktoken: %s" % str(e).split("\n")[0][:200])
        return ids.astype(self.dtype, copy=False).tobytes()

    def decode(self, ids):
        if self.tokens is None:
            self.tokens = {rank: token for token, rank in self.ranks.items()}
        return b"".join(self.tokens.get(i, b"") for i in ids)


def need(module):
    """Imports an optional package, or says how to get it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.split(".")[0]
        raise UserError(
            "the package %s is needed and not installed: python3 -m venv data/.venv && data/.venv/bin/pip install "
            "-r data/requirements.txt, then run data/.venv/bin/python data/prepare.py" % package
        )


def open_tokenizer(spec, pattern=None, encoder=True):
    """bytes, toy, or a rank file. encoder=False: for decoding only, which does not need tiktoken."""
    if spec in ("bytes", "toy"):
        if pattern not in (None, spec):
            raise UserError("tokenizer %s: built in, it takes no pattern %s" % (spec, pattern))
        return BytesTokenizer() if spec == "bytes" else ToyTokenizer()
    if spec in PATTERNS and not os.path.exists(spec):
        raise UserError(
            "tokenizer %s: not built in; give its rank file, such as --tokenizer PATH/%s.tiktoken" % (spec, spec)
        )
    if not os.path.isfile(spec):
        raise UserError("tokenizer %s: no such file; wanted bytes, toy or a tiktoken rank file" % spec)
    pattern = pattern or split_pattern_of(spec)
    if pattern is None:
        read_ranks(spec)  # first: a tokenizer.json is told what is wrong with it, not with its name
        raise UserError("%s: its name does not tell how text is split; add --pattern %s" % (spec, "|".join(PATTERNS)))
    return RankTokenizer(spec, pattern, encoder)


def file_sha256(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(1 << 20), b""):
            h.update(chunk)
    return h.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Inputs

LINE_ENDINGS = (".jsonl", ".ndjson", ".json")


def kind_of(path):
    """lines, lines.gz, lines.zst, parquet or text, by the name's ending."""
    name = path.lower()
    for ending in LINE_ENDINGS:
        if name.endswith(ending):
            return "lines"
        if name.endswith((ending + ".zst", ending + ".gz")):
            return "lines" + name[name.rindex(".") :]
    return "parquet" if name.endswith(".parquet") else "text"


def expand_inputs(inputs):
    """Files, folders (of known endings, recursively) and globs -> a sorted list of files without repetition."""
    files = []
    for item in inputs:
        if os.path.isdir(item):
            found, others = [], 0
            for folder, folders, names in os.walk(item):
                folders.sort()
                for name in sorted(names):
                    known = kind_of(name) != "text" or name.lower().endswith(".txt")
                    found += [os.path.join(folder, name)] if known else []
                    others += not known
            if not found:
                raise UserError("%s: no .jsonl, .jsonl.zst, .jsonl.gz, .parquet or .txt file in this folder" % item)
            if others:
                print("%s: %d files of other kinds are left out" % (item, others), file=sys.stderr)
            files += found
        elif os.path.exists(item):
            files.append(item)
        else:
            found = sorted(p for p in glob.glob(item, recursive=True) if os.path.isfile(p))
            if not found:
                raise UserError("%s: no such file, folder or match" % item)
            files += found
    return sorted(set(files))


def text_cut(path, size):
    """Where a single text is cut for validation: its last 5%, from the start of a line if one begins near."""
    near = size - size // 20
    with open(path, "rb") as f:
        start = max(0, near - 4096)
        f.seek(start)
        window = f.read(near - start)
        newline = window.rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        f.seek(near)
        rest = f.read(4)
    while rest and near < size and rest[0] & 0xC0 == 0x80:  # not inside a character
        near, rest = near + 1, rest[1:]
    return near


def make_plan(files, job):
    """The inputs in order: what each is, and for texts (one document a file) which split they go to."""
    plan = []
    for path in files:
        try:
            info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                raise UserError("%s: not a regular file; what is read again after an interruption must be one" % path)
            with open(path, "rb"):
                pass
        except OSError as e:
            raise UserError("%s: %s" % (path, e.strerror))
        plan.append({"path": path, "kind": kind_of(path), "bytes": info.st_size, "mtime": info.st_mtime_ns})
    texts = [p for p in plan if p["kind"] == "text"]
    if len(plan) == 1 and len(texts) == 1 and job["val_fraction"] > 0:
        texts[0]["split"] = "tail"
        return plan

    def order(i):
        return hashlib.blake2b(
            ("%d %d %s" % (job["seed"], i, os.path.basename(texts[i]["path"]))).encode("utf-8", "surrogateescape"),
            digest_size=8,
        ).digest()

    held = (
        sorted(range(len(texts)), key=order)[: max(1, round(job["val_fraction"] * len(texts)))]
        if job["val_fraction"] > 0
        else []
    )
    for i, entry in enumerate(texts):
        entry["split"] = "val" if i in set(held) and len(texts) > 1 else "train"
    return plan


# ----------------------------------------------------------------------------------------------------------------------
# Reading: inputs -> tasks in a fixed order, each with the position behind it, from which a restart goes on


def raw_chunks(path, kind, tell):
    """Decompressed bytes of a file of lines. Raises BadDocument where the file breaks off."""
    with open(path, "rb") as f:
        if kind == "lines":
            for chunk in iter(lambda: f.read(BLOCK), b""):
                tell(f.tell())
                yield chunk
        else:
            yield from decompressed_chunks(f, kind, tell)


def decompressed_chunks(f, kind, tell):
    """The same of a compressed file, which may be several compressed streams one after another."""
    if kind == "lines.zst":
        zstandard = need("zstandard")
        error, begin = zstandard.ZstdError, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    else:
        error, begin = zlib.error, functools.partial(zlib.decompressobj, 31)
    stream = None
    for data in iter(lambda: f.read(1 << 17), b""):
        tell(f.tell())
        while data:
            stream = stream or begin()
            try:
                out = stream.decompress(data)
            except error as e:
                raise BadDocument("truncated or damaged file", "%s: %s" % (kind[-3:].lstrip("."), e))
            data = b""
            if stream.eof:
                data, stream = stream.unused_data, None
            if out:
                yield out
    if stream is not None:
        raise BadDocument(
            "truncated or damaged file", "%s: the file ends inside a compressed stream" % kind[-3:].lstrip(".")
        )


def line_tasks(index, entry, at, tell):
    """Blocks of whole lines from `at` on; `at` and the positions count decompressed bytes and lines."""
    offset, line = at["offset"], at["line"]
    skip, rest = offset, b""
    try:
        for chunk in raw_chunks(entry["path"], entry["kind"], tell):
            if skip:
                chunk, skip = chunk[skip:], max(0, skip - len(chunk))
            rest = rest + chunk if rest else chunk
            cut = rest.rfind(b"\n", max(0, len(rest) - len(chunk))) + 1
            if len(rest) >= BLOCK and cut:
                block, rest = rest[:cut], rest[cut:]
                first, line, offset = line, line + block.count(b"\n"), offset + cut
                yield ("lines", entry["path"], first, block), {"input": index, "offset": offset, "line": line}
    except BadDocument as e:
        cut = rest.rfind(b"\n") + 1
        if cut:
            yield ("lines", entry["path"], line, rest[:cut]), {
                "input": index,
                "offset": offset + cut,
                "line": line + rest.count(b"\n"),
            }
        yield ("bad", entry["path"], line + rest.count(b"\n") + 1, e.args), {"input": index + 1, "offset": 0, "line": 0}
        return
    if rest:
        yield ("lines", entry["path"], line, rest), {"input": index + 1, "offset": 0, "line": 0}


def parquet_tasks(index, entry, at):
    parquet = need("pyarrow.parquet")
    try:
        with parquet.ParquetFile(entry["path"]) as f:
            groups = f.num_row_groups
    except Exception as e:
        yield ("bad", entry["path"], 0, ("truncated or damaged file", "parquet: %s" % str(e).split("\n")[0])), {
            "input": index + 1,
            "offset": 0,
            "line": 0,
        }
        return
    for group in range(at["offset"], groups):
        yield ("rows", entry["path"], group, None), {"input": index, "offset": group + 1, "line": 0}


# A text may be cut between a newline and an ASCII letter, where one visible ASCII character stands before the newline:
# no piece of any of the patterns reaches across, so the tokens are those of the whole text.
SAFE_CUT = re.compile(rb"[!-~]\n(?=[A-Za-z])")


def text_tasks(index, entry, at, tell, whole):
    """One document a file, or two (train, val) where a single text is split; long ones in segments."""
    path, size = entry["path"], entry["bytes"]
    done = {"input": index + 1, "offset": 0, "line": 0}
    if size == 0:
        yield ("bad", path, 1, ("empty document", "an empty file")), done
        return
    bad = not_utf8(path) if size > SEGMENT or entry["split"] == "tail" else None
    if bad:
        yield ("bad", path, bad[0], ("invalid UTF-8", bad[1])), done
        return
    cut = text_cut(path, size) if entry["split"] == "tail" else size
    parts = [(0, cut, "val" if entry["split"] == "val" else "train")] + ([(cut, size, "val")] if cut < size else [])
    with open(path, "rb") as f:
        for begin, end, split in parts:
            while at["offset"] < end:
                start = at["offset"]
                stop = end if whole else segment_end(f, start, end)
                tell(stop)
                f.seek(start)
                at = {"input": index, "offset": stop, "line": 0}
                yield ("text", path, (start == begin, stop == end, split), f.read(stop - start)), at


def segment_end(f, start, end):
    """End of the segment that begins at `start`: the first safe cut behind SEGMENT bytes, or the end."""
    at = start + SEGMENT
    overlap = b""
    f.seek(min(at, end))
    while at < end:
        window = overlap + f.read(min(1 << 16, end - at))
        match = SAFE_CUT.search(window)
        if match:
            return at - len(overlap) + match.end()
        at += len(window) - len(overlap)
        overlap = window[-2:]
    return end


def not_utf8(path):
    """(line, what) of the first byte that is not UTF-8, None where all is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with open(path, "rb") as f:
        while True:
            chunk = f.read(BLOCK)
            pending = decoder.getstate()[0]
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as e:
                return line + (pending + chunk)[: e.start].count(b"\n"), describe_utf8(e)
            if not chunk:
                return None
            line += chunk.count(b"\n")


def describe_utf8(e):
    return "byte 0x%02x: %s" % (e.object[e.start], e.reason) if e.start < len(e.object) else e.reason


def read_tasks(plan, at, tell, whole):
    """All tasks from position `at`. tell(n) is told the bytes of inputs that were read. whole: no long text is cut."""
    before = sum(entry["bytes"] for entry in plan[: at["input"]])
    for index in range(at["input"], len(plan)):
        entry = plan[index]
        here = at if index == at["input"] else {"input": index, "offset": 0, "line": 0}

        def tell_here(n, before=before):
            tell(before + n)

        if entry["kind"] == "parquet":
            yield from parquet_tasks(index, entry, here)
        elif entry["kind"] == "text":
            yield from text_tasks(index, entry, here, tell_here, whole)
        else:
            yield from line_tasks(index, entry, here, tell_here)
        before += entry["bytes"]
        tell(before)


# ----------------------------------------------------------------------------------------------------------------------
# Working: a task -> packed tokens by set


class Worker:
    """Tokenises tasks. A set is "NAME/train" or "NAME/val"; NAME is a domain's where documents have domains."""

    def __init__(self, job):
        self.job = job
        self.tok = open_tokenizer(job["tokenizer"], job["pattern"])
        form = "<H" if self.tok.width == 2 else "<I"
        self.bos = struct.pack(form, self.tok.bos)
        self.eos = struct.pack(form, self.tok.eos) if self.tok.eos >= 0 else b""
        self.threshold = int(job["val_fraction"] * 2**64)
        self.seed = b"%d" % job["seed"]

    def run(self, task):
        """-> (sets, bad): {name: (packed tokens, leading tokens, [tokens of each document that starts], text bytes)}
        and [(line, kind, detail)]."""
        kind, path, where, payload = task
        if kind == "bad":
            return {}, [(where, *payload)]
        if kind == "text":
            return self.text(path, where, payload)
        documents = self.lines(where, payload) if kind == "lines" else self.rows(path, where)
        sets, bad = {}, []
        for line, get in documents:
            try:
                text, domain = get()
                name, tokens, size = self.document(text, domain)
            except BadDocument as e:
                bad.append((line,) + e.args)
                continue
            pieces = sets.setdefault(name, [[], [], 0])
            pieces[0].append(tokens)
            pieces[1].append(len(tokens) // self.tok.width)
            pieces[2] += size
        return {name: (b"".join(p[0]), 0, p[1], p[2]) for name, p in sets.items()}, bad

    def document(self, text, domain):
        if not isinstance(text, str):
            raise BadDocument(
                "field is not text", "%s is %s, wanted a string" % (self.job["text_field"], type(text).__name__)
            )
        if not text:
            raise BadDocument("empty document", "the text is empty")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadDocument("lone surrogate", "half of a surrogate pair, which UTF-8 cannot hold")
        name = self.set_name(domain)
        held = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self.seed).digest(), "big") < self.threshold
        return name + ("/val" if held else "/train"), self.bos + self.tok.encode(text) + self.eos, len(data)

    def set_name(self, domain):
        job = self.job
        if not job["domain_field"]:
            return job["name"]
        if not isinstance(domain, str) or not domain:
            raise BadDocument("missing field", "no text in %s" % job["domain_field"])
        if job["command"] == "slimpajama":
            if domain not in SLIMPAJAMA:
                raise BadDocument("unknown domain", "%s, wanted one of %s" % (ascii(domain), ", ".join(SLIMPAJAMA)))
            return job["prefix"] + SLIMPAJAMA[domain]
        return job["prefix"] + re.sub(r"[^a-z0-9]+", "-", domain.lower())

    def field(self, record, path):
        """record["a.b"] or record["a"]["b"] for "a.b"; an object may be there as a JSON string."""
        if isinstance(record, dict) and path in record:
            return record[path]
        for key in path.split("."):
            if isinstance(record, str):
                try:
                    record = json.loads(record)
                except ValueError:
                    record = None
            if not isinstance(record, dict) or key not in record:
                raise BadDocument("missing field", "no %s" % path)
            record = record[key]
        return record

    def fields(self, record):
        domain = self.field(record, self.job["domain_field"]) if self.job["domain_field"] else None
        return self.field(record, self.job["text_field"]), domain

    def lines(self, number, block):
        for line in block.split(b"\n"):
            number += 1
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line = line[3:]
            if line and not line.isspace():
                yield number, lambda: self.parse(line)

    def parse(self, line):
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise BadDocument("invalid UTF-8", describe_utf8(e))
        except (ValueError, RecursionError) as e:
            raise BadDocument("broken JSON", str(e)[:200])
        if not isinstance(record, dict):
            raise BadDocument("broken JSON", "%s, wanted an object" % type(record).__name__)
        return self.fields(record)

    def rows(self, path, group):
        parquet = need("pyarrow.parquet")
        wanted = [self.job["text_field"]] + ([self.job["domain_field"]] if self.job["domain_field"] else [])
        try:
            with parquet.ParquetFile(path) as f:
                first = sum(f.metadata.row_group(i).num_rows for i in range(group))
                have = set(f.schema_arrow.names)
                columns = sorted({w if w in have else w.split(".")[0] for w in wanted} & have)
                table = f.read_row_group(group, columns=columns)
            rows = table.to_pylist()
        except Exception as e:
            detail = "parquet row group %d: %s" % (group, str(e).split("\n")[0])

            def fail():
                raise BadDocument("truncated or damaged file", detail)

            yield 0, fail
            return
        for number, row in enumerate(rows, first + 1):
            yield number, lambda: self.fields(row)

    def text(self, path, where, data):
        first, last, split = where
        try:
            text = data.decode("utf-8")
            name = self.set_name("text" if self.job["domain_field"] else None)
            tokens = (self.bos if first else b"") + self.tok.encode(text) + (self.eos if last else b"")
        except UnicodeDecodeError as e:
            return {}, [(data[: e.start].count(b"\n") + 1, "invalid UTF-8", describe_utf8(e))]
        except BadDocument as e:
            if not (first and last):
                raise UserError("%s: %s, in the midst of a long text; split it, or leave it out" % (path, e.args[1]))
            return {}, [(1,) + e.args]
        n = len(tokens) // self.tok.width
        return {name + "/" + split: (tokens, 0 if first else n, [n] if first else [], len(data))}, []


worker = None  # of a worker process


def worker_start(job, parent):
    """Runs once in each worker process: it ends with its parent, however that ends."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    worker = Worker(job)


def worker_run(task):
    return worker.run(task)


def results(tasks, job, workers):
    """Tasks' results in the order of the tasks, by `workers` processes (in this one, if 1)."""
    if workers <= 1:
        here = Worker(job)
        for task, at in tasks:
            yield task, here.run(task), at
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    import multiprocessing

    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=worker_start, initargs=(job, os.getpid())
    )
    waiting = collections.deque()
    try:
        for task, at in tasks:
            waiting.append(((task[0], task[1], task[2]), pool.submit(worker_run, task), at))
            while len(waiting) > 4 * workers or waiting and waiting[0][1].done():
                task, future, at = waiting.popleft()
                yield task, future.result(), at
        while waiting:
            task, future, at = waiting.popleft()
            yield task, future.result(), at
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?); run the same command again to go on, with fewer --workers"
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Writing: sets -> shards in the work folder DIR/.NAME.partial, with a state from which a restart goes on


def shard_header(width, tokens, vocab, crc):
    header = [*MAGIC[width], tokens, vocab, crc - (1 << 32) if crc >= 1 << 31 else crc]
    return struct.pack("<256i", *(header + [0] * (256 - len(header))))


def write_synced(path, data):
    """Written beside, synced, renamed: the file is there whole or not at all."""
    with open(path + ".tmp", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class SetWriter:
    """The shards of one set (a name and a split). `record` is its part of the state: what a restart needs to know."""

    def __init__(self, folder, key, tok, shard_tokens, record=None):
        self.folder, self.key, self.tok, self.shard_tokens = folder, key, tok, shard_tokens
        self.record = record or {"done": [], "open": None, "documents": 0, "tokens": 0, "text_bytes": 0, "last": 0}
        self.file = None

    def name(self, number):
        return "%s_%s_%06d.bin" % (*self.key.rsplit("/", 1), number)

    def path(self):
        """Of the open shard."""
        return os.path.join(self.folder, self.name(len(self.record["done"])) + self.record["open"].get("suffix", ""))

    def restore(self):
        """Back to what the state says: whatever was written later is cut off. Names of the files that belong to it."""
        names = [shard["file"] for shard in self.record["done"]]
        if self.record["open"]:
            names.append(self.name(len(self.record["done"])))
            path = os.path.join(self.folder, names[-1])
            size = HEADER_BYTES + self.record["open"]["tokens"] * self.tok.width
            if not os.path.exists(path) or os.path.getsize(path) < size:
                raise UserError(
                    "%s: shorter than the state beside it says; remove %s to start anew" % (path, self.folder)
                )
            os.truncate(path, size)
        return names

    def append(self, tokens, lead, lengths, text_bytes):
        """Packed tokens: `lead` that belong to the document before, then documents of these lengths."""
        record, width = self.record, self.tok.width
        record["documents"] += len(lengths)
        record["text_bytes"] += text_bytes
        record["last"] = lengths[-1] if lengths else record["last"] + lead
        starts, position = [], lead
        for n in lengths:
            starts.append(position)
            position += n
        done, total, next_start = 0, len(tokens) // width, 0
        record["tokens"] += total
        while done < total:
            shard = record["open"] or self.begin()
            n = min(total - done, self.shard_tokens - shard["tokens"])
            piece = tokens[done * width : (done + n) * width]
            self.open_file().write(piece)
            shard["crc32"] = zlib.crc32(piece, shard["crc32"])
            shard["tokens"] += n
            done += n
            while next_start < len(starts) and starts[next_start] < done:
                shard["documents"] += 1
                next_start += 1
            if shard["tokens"] == self.shard_tokens:
                self.finish_shard()

    def begin(self):
        self.record["open"] = {"tokens": 0, "documents": 0, "crc32": 0}
        with open(self.path(), "wb") as f:
            f.write(bytes(HEADER_BYTES))
        return self.record["open"]

    def open_file(self):
        if self.file is None:
            self.file = open(self.path(), "ab")
        return self.file

    def finish_shard(self):
        """The header is written last; a shard with zeros in its place is refused by every reader."""
        shard, name = self.record["open"], self.name(len(self.record["done"]))
        self.close()
        with open(self.path(), "r+b") as f:
            f.truncate(HEADER_BYTES + shard["tokens"] * self.tok.width)
            f.write(shard_header(self.tok.width, shard["tokens"], self.tok.vocab, shard["crc32"]))
            f.flush()
            os.fsync(f.fileno())
        self.record["done"].append({"file": name, **shard})
        self.record["open"] = None

    def close(self):
        if self.file is not None:
            self.file.close()
            self.file = None

    def sync(self):
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def take_back(self, n):
        """Takes the last n tokens off the open shard. What remains goes to a copy, so that the state that was
        saved last still holds."""
        shard, width = self.record["open"], self.tok.width
        self.close()
        with open(self.path(), "rb") as f, open(self.path() + ".cut", "wb") as copy:
            left, crc = (shard["tokens"] - n) * width, 0
            copy.write(f.read(HEADER_BYTES))
            while left:
                chunk = f.read(min(left, 1 << 20))
                copy.write(chunk)
                crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            taken = f.read(n * width)
        shard.update(tokens=shard["tokens"] - n, crc32=crc, suffix=".cut")
        self.record["tokens"] -= n
        return taken


class Preparation:
    """One preparation in its work folder: sets, bad documents, and the state that is saved now and then."""

    def __init__(self, out, job, plan, digest):
        self.out, self.job, self.plan, self.digest = out, job, plan, digest
        self.work = os.path.join(out, ".%s.partial" % job["name"])
        self.tok = open_tokenizer(job["tokenizer"], job["pattern"], encoder=False)
        self.sets, self.bad_file = {}, None
        self.state = {
            "format": FORMAT,
            "plan": digest,
            "stage": "tokenise",
            "at": {"input": 0, "offset": 0, "line": 0},
            "bad": {"bytes": 0, "counts": {}},
        }
        self.resumed = False

    def path(self, name):
        return os.path.join(self.work, name)

    def open(self, overwrite):
        """Locks the work folder; takes up the state that an interrupted run has left there (of other inputs or options:
        drops it, if overwrite)."""
        os.makedirs(self.work, exist_ok=True)
        self.lock = open(self.path("lock"), "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("%s: another prepare.py is at work there" % self.work)
        sets = {}
        if os.path.exists(self.path("state.json")):
            with open(self.path("state.json"), encoding="utf-8") as f:
                state = json.load(f)
            if state.get("plan") == self.digest:
                sets = state.pop("sets")
                self.state, self.resumed = state, True
            elif not overwrite:
                raise UserError(
                    "%s holds an unfinished preparation of other inputs or options; finish that one, give another "
                    "--name or --out, or --overwrite" % self.work
                )
            else:
                os.remove(self.path("state.json"))
        names = {"lock", "state.json"}
        for key, record in sets.items():
            self.sets[key] = SetWriter(self.work, key, self.tok, self.job["shard_tokens"], record)
            if self.state["stage"] == "tokenise":
                names.update(self.sets[key].restore())
        if self.state["stage"] == "tokenise":
            if self.state["bad"]["bytes"]:
                names.add("bad.jsonl")
                os.truncate(self.path("bad.jsonl"), self.state["bad"]["bytes"])
            for name in set(os.listdir(self.work)) - names:
                os.remove(self.path(name))

    def add(self, key, *pieces):
        if key not in self.sets:
            self.sets[key] = SetWriter(self.work, key, self.tok, self.job["shard_tokens"])
        self.sets[key].append(*pieces)
        if sum(s.file is not None for s in self.sets.values()) > 200:
            for s in self.sets.values():
                s.sync()
                s.close()

    def add_bad(self, path, line, kind, detail):
        if self.bad_file is None:
            self.bad_file = open(self.path("bad.jsonl"), "ab")
        text = json.dumps({"file": path, "line": line, "kind": kind, "detail": detail}) + "\n"
        self.bad_file.write(text.encode())
        bad = self.state["bad"]
        bad["bytes"] += len(text)
        bad["counts"][kind] = bad["counts"].get(kind, 0) + 1

    def commit(self):
        """Everything so far is on the disk, and the state says so: a restart goes on from here."""
        for s in self.sets.values():
            s.sync()
        if self.bad_file is not None:
            self.bad_file.flush()
            os.fsync(self.bad_file.fileno())
        sync_folder(self.work)
        state = dict(self.state, sets={key: s.record for key, s in sorted(self.sets.items())})
        write_synced(self.path("state.json"), json.dumps(state, sort_keys=True).encode())

    def documents(self):
        return sum(s.record["documents"] for s in self.sets.values())

    def finish(self):
        """The last step before publishing: a set without validation gives some, then all headers are written."""
        self.commit()
        if self.job["val_fraction"] > 0:
            for key in sorted(k for k in self.sets if k.endswith("/train")):
                self.give_validation(key)
        for s in self.sets.values():
            if s.record["open"]:
                s.finish_shard()
        self.state["stage"] = "publish"
        self.commit()

    def give_validation(self, key):
        """Where no document fell into validation: the last one, or the last 5% of the only one, moves there."""
        name, train = key[: -len("/train")], self.sets[key]
        n, shard, width = train.record["last"], train.record["open"], self.tok.width
        if name + "/val" in self.sets or not shard or shard["tokens"] < n:
            return
        form = "<H" if width == 2 else "<I"
        eos = struct.pack(form, self.tok.eos) if self.tok.eos >= 0 else b""
        if train.record["documents"] > 1:
            moved = train.take_back(n)
            train.record["documents"] -= 1
            shard["documents"] -= 1
        else:
            tail = (n - 1 - len(eos) // width) // 20
            if tail == 0:
                return
            moved = struct.pack(form, self.tok.bos) + train.take_back(tail + len(eos) // width)
            train.append(eos, len(eos) // width, [], 0)
        ids = struct.unpack("<%d%s" % (len(moved) // width, form[1]), moved)
        text_bytes = len(self.tok.decode(ids))
        train.record["text_bytes"] -= text_bytes
        self.add(name + "/val", moved, 0, [len(ids)], text_bytes)

    def publish(self):
        """Shards, the tokenizer's rank file and the list of bad documents go to DIR, the manifest last."""
        job, shards = self.job, {}
        manifest = read_manifest(self.out)
        for key, s in sorted(self.sets.items()):
            for shard in s.record["done"]:
                name = shard["file"]
                ready, target = self.path(name + shard.get("suffix", "")), os.path.join(self.out, name)
                if os.path.exists(ready):
                    owner = manifest["shards"].get(name, {}).get("preparation", job["name"])
                    if owner != job["name"]:
                        raise UserError("%s belongs to the preparation %s; give another --name" % (target, owner))
                    os.replace(ready, target)
                elif not os.path.exists(target):
                    raise UserError("%s is gone; remove %s to start anew" % (target, self.work))
                shards[name] = {
                    "preparation": job["name"],
                    "set": key.rsplit("/", 1)[0],
                    "split": key.rsplit("/", 1)[1],
                    "documents": shard["documents"],
                    "tokens": shard["tokens"],
                    "crc32": "%08x" % shard["crc32"],
                    "bytes": HEADER_BYTES + shard["tokens"] * self.tok.width,
                }
        for name in sorted(
            n for n, shard in manifest["shards"].items() if shard["preparation"] == job["name"] and n not in shards
        ):
            if os.path.exists(
                os.path.join(self.out, name)
            ):  # of an earlier preparation of this name, which --overwrite replaces
                os.remove(os.path.join(self.out, name))
            del manifest["shards"][name]
        manifest["shards"].update(shards)
        manifest["preparations"][job["name"]] = self.summary()
        if self.tok.path:
            with open(self.tok.path, "rb") as f:
                write_synced(os.path.join(self.out, self.tok.file_name), f.read())
        bad_name = os.path.join(self.out, job["name"] + ".bad.jsonl")
        if os.path.exists(self.path("bad.jsonl")):
            os.replace(self.path("bad.jsonl"), bad_name)
        elif not self.state["bad"]["bytes"] and os.path.exists(bad_name):
            os.remove(bad_name)
        sync_folder(self.out)
        write_synced(
            os.path.join(self.out, "manifest.json"), (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
        )
        for name in sorted(os.listdir(self.work), key=lambda n: n in ("state.json", "lock")):
            os.remove(self.path(name))
        os.rmdir(self.work)

    def summary(self):
        """This preparation's part of the manifest: nothing in it depends on when, where or how fast it was made."""
        job, sets = self.job, {}
        for key, s in sorted(self.sets.items()):
            name, split = key.rsplit("/", 1)
            sets.setdefault(name, {})[split] = {k: s.record[k] for k in ("documents", "tokens", "text_bytes")}
            sets[name][split]["shards"] = len(s.record["done"])
        tokenizer = {
            "name": self.tok.name,
            "vocab_size": self.tok.vocab,
            "bos": self.tok.bos,
            "eos": self.tok.eos,
            "bytes_per_token": self.tok.width,
        }
        if self.tok.path:
            tokenizer.update(file=self.tok.file_name, sha256=job["tokenizer_sha256"])
        return {
            "format": FORMAT,
            "tokenizer": tokenizer,
            "sets": sets,
            "bad": self.state["bad"]["counts"],
            "options": {k: job[k] for k in OPTIONS_IN_MANIFEST},
            "inputs": inputs_summary(self.plan),
        }


OPTIONS_IN_MANIFEST = ("command", "text_field", "domain_field", "val_fraction", "seed", "shard_tokens")


def inputs_summary(plan):
    listing = "".join("%s %d\n" % (p["path"], p["bytes"]) for p in plan).encode("utf-8", "surrogateescape")
    return {"files": len(plan), "bytes": sum(p["bytes"] for p in plan), "sha256": hashlib.sha256(listing).hexdigest()}


def read_manifest(folder, wanted=False):
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        if not isinstance(manifest["preparations"], dict) or not isinstance(manifest["shards"], dict):
            raise KeyError
        return manifest
    except FileNotFoundError:
        if wanted:
            raise UserError("%s: no such file; wanted a folder that prepare.py has written" % path)
        return {"preparations": {}, "shards": {}}
    except OSError as e:
        raise UserError("%s: %s" % (path, e.strerror))
    except (ValueError, KeyError, TypeError):
        raise UserError("%s: not a manifest of prepare.py" % path)


# ----------------------------------------------------------------------------------------------------------------------
# Progress


class Progress:
    """One line, rewritten on a terminal, once in half a minute elsewhere."""

    def __init__(self, total, done):
        self.total, self.first, self.start, self.last = total, done, time.time(), 0.0
        self.terminal = sys.stderr.isatty()
        self.documents = self.text_bytes = 0

    def add(self, documents, text_bytes, read, force=False):
        self.documents += documents
        self.text_bytes += text_bytes
        now = time.time()
        if not force and now - max(self.last, 0 if self.terminal else self.start) < (0.2 if self.terminal else 30):
            return
        self.last = now
        spent = max(now - self.start, 1e-6)
        left = (self.total - read) * spent / (read - self.first) if read > self.first else 0
        share = read / self.total if self.total else 1
        line = "%5.1f%%  %d documents, %.0f/s  %.2f MB/s  ETA %d:%02d:%02d" % (
            100 * share,
            self.documents,
            self.documents / spent,
            self.text_bytes / 1e6 / spent,
            left // 3600,
            left // 60 % 60,
            left % 60,
        )
        if self.terminal:
            width = 20
            bar = "#" * int(width * share) + "-" * (width - int(width * share))
            sys.stderr.write("\r[%s] %s\033[K%s" % (bar, line, "\n" if force else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


# ----------------------------------------------------------------------------------------------------------------------
# The command that prepares


def parse_count(text):
    """100000000, 100M, 1.5k."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGbB]?)", text)
    if not match:
        raise argparse.ArgumentTypeError("got %r, wanted a number such as 100000000 or 100M" % text)
    return int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}[match[2].lower()])


def make_job(args, files):
    """What determines the bytes of the shards, given the inputs."""
    single = len(files) == 1 and kind_of(files[0]) == "text"
    stem = os.path.basename(files[0]).split(".")[0] if single else args.command
    name = args.name or re.sub(r"[^A-Za-z0-9_-]+", "_", stem).lstrip("_-") or "text"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError("--name %s: wanted letters, digits, points, dashes and underscores" % ascii(name))
    if not 0 <= args.val_fraction < 1:
        raise UserError("--val-fraction %g: wanted 0 up to, not including, 1" % args.val_fraction)
    if not 1 <= args.shard_tokens < 2**31:
        raise UserError("--shard-tokens %d: wanted 1 to 2147483647" % args.shard_tokens)
    tok = open_tokenizer(args.tokenizer, args.pattern, encoder=False)
    needed = (
        ["tiktoken"] * bool(tok.path)
        + ["zstandard"] * any(kind_of(f) == "lines.zst" for f in files)
        + ["pyarrow"] * any(kind_of(f) == "parquet" for f in files)
    )
    for package in needed:
        if importlib.util.find_spec(package) is None:
            need(package)
    return {
        "command": args.command,
        "name": name,
        "prefix": args.name + "_" if args.name else "",
        "tokenizer": args.tokenizer,
        "pattern": args.pattern,
        "tokenizer_sha256": file_sha256(args.tokenizer) if tok.path else "",
        "text_field": args.text_field,
        "domain_field": args.domain_field,
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "shard_tokens": args.shard_tokens,
    }


def already_there(out, job, plan, overwrite):
    """True where the manifest says that this very preparation is complete; refuses another one of its name."""
    manifest = read_manifest(out)
    there = manifest["preparations"].get(job["name"])
    if there is None:
        names = (
            "*_[0-9]*.bin"
            if job["domain_field"] and not job["prefix"]
            else (job["prefix"] or job["name"] + "_") + "*_[0-9]*.bin"
        )
        known = set(manifest["shards"])
        foreign = [
            p
            for p in glob.glob(os.path.join(glob.escape(out), names))
            if os.path.basename(p) not in known and re.search(r"_(train|val)_\d{6}\.bin$", p)
        ]
        if foreign and not overwrite:
            raise UserError(
                "%s is there and in no manifest; give another --name or --out, or --overwrite" % sorted(foreign)[0]
            )
        return False
    same = (
        there.get("options") == {k: job[k] for k in OPTIONS_IN_MANIFEST}
        and there.get("inputs") == inputs_summary(plan)
        and there["tokenizer"].get("sha256", "") == job["tokenizer_sha256"]
        and there["tokenizer"]["name"]
        == (job["tokenizer"] if not job["tokenizer_sha256"] else job["pattern"] or split_pattern_of(job["tokenizer"]))
    )
    if overwrite:
        return False
    if not same:
        raise UserError(
            "%s holds a preparation %s of other inputs or options; give another --name or --out, or --overwrite"
            % (out, job["name"])
        )
    for name, shard in manifest["shards"].items():
        path = os.path.join(out, name)
        if shard["preparation"] == job["name"] and (
            not os.path.exists(path) or os.path.getsize(path) != shard["bytes"]
        ):
            raise UserError("%s is missing or of another size than the manifest says; --overwrite prepares anew" % path)
    return True


def prepare(args):
    if args.command == "slimpajama" and args.download:
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        import download

        folder = download.slimpajama(args, UserError)
        args.inputs = args.inputs + [folder]
        if not args.out:
            return
    if not args.out:
        raise UserError("--out DIR is needed")
    if not args.inputs:
        raise UserError(
            "no inputs; give files, folders or globs"
            + (", or --download FOLDER" if args.command == "slimpajama" else "")
        )
    files = expand_inputs(args.inputs)
    job = make_job(args, files)
    plan = make_plan(files, job)
    try:
        os.makedirs(args.out, exist_ok=True)
        prepare_into(args, job, plan)
    except OSError as e:
        raise UserError("%s: %s" % (e.filename or args.out, e.strerror))


def prepare_into(args, job, plan):
    digest = hashlib.sha256(
        json.dumps([FORMAT, {k: v for k, v in job.items() if k != "tokenizer"}, plan], sort_keys=True).encode(
            "utf-8", "surrogateescape"
        )
    ).hexdigest()
    unfinished = os.path.exists(os.path.join(args.out, ".%s.partial" % job["name"], "state.json"))
    if not unfinished and already_there(args.out, job, plan, args.overwrite):
        print("%s: %s is complete already; --overwrite prepares it anew" % (args.out, job["name"]))
        report(args.out, job["name"])
        return
    p = Preparation(args.out, job, plan, digest)
    p.open(args.overwrite)
    if p.resumed:
        print("going on where an earlier run stopped: %d documents are done" % p.documents(), file=sys.stderr)
    if p.state["stage"] == "tokenise":
        tokenise(args, p)
        p.finish()
    p.publish()
    report(args.out, job["name"])


def tokenise(args, p):
    total = sum(entry["bytes"] for entry in p.plan)
    workers = args.workers or os.cpu_count() or 1
    if not args.workers and total < 4 << 20:
        workers = 1  # starting processes takes longer
    read = [sum(entry["bytes"] for entry in p.plan[: p.state["at"]["input"]])]

    def tell(n):
        read[0] = n

    progress, saved, shown = Progress(total, read[0]), time.time(), 0
    tasks = read_tasks(p.plan, p.state["at"], tell, whole=p.job["tokenizer"] == "toy")
    whole = True  # the state fits what is written: not so while a task's results are being added
    try:
        for task, (sets, bad), at in results(tasks, p.job, workers):
            if bad and args.on_bad == "refuse":
                raise UserError(
                    "%s:%d: %s: %s; mend it, or --on-bad skip leaves such documents out" % (task[1], *bad[0])
                )
            whole = False
            for line, kind, detail in bad:
                p.add_bad(task[1], line, kind, detail)
                shown += 1
                if shown <= 10:
                    print("%s:%d: %s: %s; skipped" % (task[1], line, kind, detail), file=sys.stderr)
                elif shown == 11:
                    print("more bad documents: they will be listed in %s.bad.jsonl" % p.job["name"], file=sys.stderr)
            for key, pieces in sets.items():
                p.add(key, *pieces)
            p.state["at"] = at
            whole = True
            progress.add(sum(len(s[2]) for s in sets.values()), sum(s[3] for s in sets.values()), read[0])
            if time.time() - saved >= args.save_seconds:
                p.commit()
                saved = time.time()
    except BaseException:
        if whole:
            p.commit()  # whatever stops us: the next run goes on from here
        raise
    progress.add(0, 0, total, force=True)


def report(out, name):
    """What the manifest says, as a table."""
    summary = read_manifest(out)["preparations"][name]
    print("%-24s %-6s %12s %14s %14s %7s" % ("set", "split", "documents", "tokens", "text bytes", "shards"))
    for key, splits in summary["sets"].items():
        for split, n in splits.items():
            print(
                "%-24s %-6s %12d %14d %14d %7d"
                % (key, split, n["documents"], n["tokens"], n["text_bytes"], n["shards"])
            )
        if "val" not in splits and summary["options"]["val_fraction"] > 0:
            print("%s: no validation: too little text" % key)
    if summary["bad"]:
        print(
            "left out: %s; listed in %s"
            % (
                ", ".join("%d %s" % (n, kind) for kind, n in sorted(summary["bad"].items())),
                os.path.join(out, name + ".bad.jsonl"),
            )
        )
    if not summary["sets"]:
        raise UserError("%s: no document could be used" % out)


# ----------------------------------------------------------------------------------------------------------------------
# Reading shards: inspect and verify


class Shard:
    """The header of a shard, checked against its size."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as f:
                header = f.read(HEADER_BYTES)
                self.size = os.fstat(f.fileno()).st_size
        except OSError as e:
            raise UserError("%s: %s" % (path, e.strerror))
        if len(header) < HEADER_BYTES:
            raise UserError("%s: %d bytes, a shard has a header of %d" % (path, len(header), HEADER_BYTES))
        magic, version, self.tokens, self.vocab, crc, self.mask = struct.unpack("<6i", header[:24])
        widths = {MAGIC[w]: w for w in MAGIC}
        if (magic, version) not in widths:
            raise UserError(
                "%s: magic %d, version %d; wanted 20240520, 1 (uint16) or 20240801, 7 (uint32)" % (path, magic, version)
            )
        self.magic, self.version, self.crc, self.width = magic, version, crc & 0xFFFFFFFF, widths[magic, version]
        if self.tokens < 0 or self.size != HEADER_BYTES + self.tokens * self.width:
            raise UserError(
                "%s: %d bytes, its header says %d tokens, which is %d"
                % (path, self.size, self.tokens, HEADER_BYTES + self.tokens * self.width)
            )

    def chunks(self, tokens=1 << 20):
        """Packed tokens and the same as numbers, piece by piece."""
        try:
            import numpy
        except ImportError:
            numpy = None
        with open(self.path, "rb") as f:
            f.seek(HEADER_BYTES)
            for data in iter(lambda: f.read(tokens * self.width), b""):
                if numpy:
                    yield data, numpy.frombuffer(data, dtype="<u%d" % self.width)
                else:
                    yield data, struct.unpack("<%d%s" % (len(data) // self.width, "HI"[self.width == 4]), data)


def tokenizer_of(folder, name, spec, pattern):
    """The tokenizer of a shard: as given, or as the manifest beside it says; None where nobody knows."""
    if spec:
        return open_tokenizer(spec, pattern, encoder=False)
    manifest = read_manifest(folder)
    preparation = manifest["preparations"].get(manifest["shards"].get(name, {}).get("preparation"))
    if preparation is None:
        return None
    tokenizer = preparation["tokenizer"]
    return open_tokenizer(
        os.path.join(folder, tokenizer["file"]) if "file" in tokenizer else tokenizer["name"], None, encoder=False
    )


def inspect(args):
    shard = Shard(args.shard)
    folder, name = os.path.split(args.shard)
    tok = tokenizer_of(folder or ".", name, args.tokenizer, args.pattern)
    print(
        "%s: %d bytes, magic %d version %d (uint%d)"
        % (args.shard, shard.size, shard.magic, shard.version, 8 * shard.width)
    )
    print(
        "tokens %d, vocabulary %s, crc32 %s, mask %s"
        % (
            shard.tokens,
            shard.vocab or "unknown",
            "%08x" % shard.crc if shard.crc else "unknown",
            "yes" if shard.mask else "no",
        )
    )
    starts, position, largest, ids = 0, 0, 0, []
    first = []  # where the first documents start
    for _, numbers in shard.chunks():
        if hasattr(numbers, "max"):
            largest = max(largest, int(numbers.max()))
            found = (numbers == tok.bos).nonzero()[0].tolist() if tok else []
        else:
            largest = max(largest, max(numbers))
            found = [i for i, n in enumerate(numbers) if n == tok.bos] if tok else []
        starts += len(found)
        first += [position + i for i in found[: args.documents + 1]]
        if position < 1 << 22:
            ids += [int(n) for n in numbers]
        position += len(numbers)
    print("largest id %d%s" % (largest, ", NOT BELOW THE VOCABULARY" if shard.vocab and largest >= shard.vocab else ""))
    if tok is None:
        print(
            "no manifest beside it names its tokenizer: give --tokenizer to see documents; the first ids: %s" % ids[:32]
        )
        return
    print("tokenizer %s: %d documents start here (ids %d)" % (tok.name, starts, tok.bos))
    if first[:1] != [0] and shard.tokens:
        first = [0] + first  # the shard begins inside a document
    for i, start in enumerate(first[: args.documents]):
        end = first[i + 1] if i + 1 < len(first) else min(shard.tokens, len(ids))
        text = tok.decode(n for n in ids[start:end] if n not in (tok.bos, tok.eos)).decode("utf-8", "replace")
        print(
            "--- tokens %d to %d%s"
            % (start, end, "" if ids[start : start + 1] == [tok.bos] else ", begun in the shard before")
        )
        print(
            text
            if len(text) <= args.characters
            else text[: args.characters] + " [... %d characters more]" % (len(text) - args.characters)
        )


def verify_shard(path, entry, tok):
    """Everything that can be wrong with one shard; entry: its part of the manifest or None. -> its tokens."""
    shard = Shard(path)
    crc = starts = 0
    position = 0
    for data, numbers in shard.chunks():
        crc = zlib.crc32(data, crc)
        largest = int(max(numbers)) if isinstance(numbers, tuple) else int(numbers.max())
        if shard.vocab and largest >= shard.vocab:
            at = next(i for i, n in enumerate(numbers) if n >= shard.vocab)
            raise UserError(
                "%s: id %d at token %d, the vocabulary has %d" % (path, numbers[at], position + at, shard.vocab)
            )
        if tok:
            starts += numbers.count(tok.bos) if isinstance(numbers, tuple) else int((numbers == tok.bos).sum())
        position += len(numbers)
    if shard.crc and crc != shard.crc:
        raise UserError("%s: crc32 of the tokens is %08x, its header says %08x" % (path, crc, shard.crc))
    if shard.mask:
        verify_mask(os.path.splitext(path)[0] + ".mask" if path.endswith(".bin") else path + ".mask", shard)
    if entry:
        for what, got, want in (
            ("crc32", "%08x" % crc, entry["crc32"]),
            ("tokens", shard.tokens, entry["tokens"]),
            ("bytes", shard.size, entry["bytes"]),
            ("vocabulary", shard.vocab, tok.vocab if tok else shard.vocab),
            ("documents that start in it", starts if tok else entry["documents"], entry["documents"]),
        ):
            if got != want:
                raise UserError("%s: %s %s, the manifest says %s" % (path, what, got, want))
    return shard.tokens


def verify_mask(path, shard):
    if shard.mask != 1:
        raise UserError("%s: word 5 of the header is %d, wanted 0 (no mask) or 1 (mask)" % (shard.path, shard.mask))
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            bad = any(chunk.translate(None, b"\0\1") for chunk in iter(lambda: f.read(1 << 20), b""))
    except OSError as e:
        raise UserError("%s: %s" % (path, e.strerror))
    if size != shard.tokens:
        raise UserError("%s: %d bytes, wanted one for each of the %d tokens" % (path, size, shard.tokens))
    if bad:
        raise UserError("%s: bytes other than 0 and 1" % path)


def verify(args):
    """Folders with a manifest, or single shards. Prints one line for each thing that is wrong."""
    wrong = good = tokens = 0
    for item in args.items:
        shards, folder = [], item
        if os.path.isdir(item):
            manifest = read_manifest(item, wanted=True)
            shards = sorted(manifest["shards"])
            for name, preparation in sorted(manifest["preparations"].items()):
                tokenizer = preparation["tokenizer"]
                path = os.path.join(item, tokenizer.get("file", ""))
                if "file" in tokenizer and (not os.path.exists(path) or file_sha256(path) != tokenizer["sha256"]):
                    print(
                        "%s: missing, or not the tokenizer of %s: its sha256 differs from the manifest's" % (path, name)
                    )
                    wrong += 1
                sums = {}
                for shard in manifest["shards"].values():
                    if shard["preparation"] == name:
                        n = sums.setdefault((shard["set"], shard["split"]), [0, 0, 0])
                        n[0], n[1], n[2] = n[0] + shard["documents"], n[1] + shard["tokens"], n[2] + 1
                said = {
                    (key, split): [n["documents"], n["tokens"], n["shards"]]
                    for key, splits in preparation["sets"].items()
                    for split, n in splits.items()
                }
                if sums != said:
                    print("%s: the sums of the shards of %s are not what the manifest says of its sets" % (item, name))
                    wrong += 1
            strangers = [
                p
                for p in sorted(os.listdir(item))
                if re.search(r"_(train|val)_\d{6}\.bin$", p) and p not in manifest["shards"]
            ]
            for name in strangers:
                print("%s: not in the manifest" % os.path.join(item, name))
            wrong += len(strangers)
        else:
            folder, name = os.path.split(item)
            shards, manifest = [name], read_manifest(folder or ".")
        for name in shards:
            path = os.path.join(folder, name)
            try:
                tok = tokenizer_of(folder or ".", name, args.tokenizer, args.pattern)
                tokens += verify_shard(path, manifest["shards"].get(name), tok)
                good += 1
            except UserError as e:
                print(e)
                wrong += 1
    print("%d shards good, %d tokens; %d things wrong" % (good, tokens, wrong))
    return 1 if wrong else 0


# ----------------------------------------------------------------------------------------------------------------------


def add_prepare_options(p, command):
    p.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders or quoted globs")
    p.add_argument("--out", metavar="DIR", help="where the shards go")
    p.add_argument(
        "--name",
        help="shards are NAME_train_000000.bin ...; default: a single text's name, else %s"
        % ("text" if command == "text" else "the domains' names without one"),
    )
    p.add_argument(
        "--tokenizer", default="bytes", metavar="NAME|FILE", help="bytes (default), toy, or a tiktoken rank file"
    )
    p.add_argument(
        "--pattern", choices=list(PATTERNS), help="how text is split; default: what the rank file's name tells"
    )
    p.add_argument(
        "--text-field", default="text", metavar="FIELD", help="of JSON lines and parquet; a.b for b in a; default text"
    )
    p.add_argument(
        "--domain-field",
        default="meta.redpajama_set_name" if command == "slimpajama" else "",
        metavar="FIELD",
        help="documents go to one set of shards for each value of this field",
    )
    p.add_argument(
        "--val-fraction",
        type=float,
        default=0.05 if command == "text" else 0.001,
        metavar="X",
        help="share of documents for validation, chosen by a hash; default %(default)s",
    )
    p.add_argument("--seed", type=int, default=0, help="of that hash")
    p.add_argument(
        "--shard-tokens", type=parse_count, default=100000000, metavar="N", help="tokens in a shard, default 100M"
    )
    p.add_argument(
        "--on-bad",
        choices=["skip", "refuse"],
        default="skip",
        help="a document that cannot be used is left out and listed in NAME.bad.jsonl (default), or ends the run",
    )
    p.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default: one a core")
    p.add_argument(
        "--save-seconds",
        type=float,
        default=10,
        metavar="S",
        help="how often the state for a restart is saved; default 10",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an earlier preparation of this name")


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="any texts to shards")
    add_prepare_options(text, "text")
    slim = commands.add_parser("slimpajama", help="SlimPajama to shards, a set for each of its seven domains")
    add_prepare_options(slim, "slimpajama")
    slim.add_argument(
        "--download", metavar="FOLDER", help="fetch SlimPajama's files into FOLDER first, or go on doing so"
    )
    slim.add_argument("--mirror", metavar="URL", help="where the files are; default: the data set's own repository")
    slim.add_argument(
        "--file-list",
        metavar="FILE",
        help="lines PATH [BYTES [SHA256]], relative to the mirror; default: ask the repository",
    )
    slim.add_argument("--max-files", type=int, metavar="N", help="download no more than N files")
    slim.add_argument("--max-bytes", type=parse_count, metavar="N", help="download no more than N bytes")
    slim.add_argument("--connections", type=int, default=8, metavar="N", help="at once; default 8")
    slim.add_argument(
        "--retries", type=int, default=8, metavar="N", help="tries in a row without a byte of progress; default 8"
    )
    slim.add_argument(
        "--retry-pause", type=float, default=1.0, metavar="S", help="first pause, doubled up to a minute; default 1"
    )
    look = commands.add_parser("inspect", help="header, counts and first documents of a shard")
    look.add_argument("shard")
    look.add_argument("--documents", type=int, default=3, metavar="N")
    look.add_argument("--characters", type=int, default=400, metavar="N", help="of each document")
    check = commands.add_parser("verify", help="checks every checksum, id and mask")
    check.add_argument("items", nargs="+", metavar="DIR|SHARD")
    for p in (look, check):
        p.add_argument("--tokenizer", metavar="NAME|FILE", help="default: what the manifest beside the shard says")
        p.add_argument("--pattern", choices=list(PATTERNS))
    return parser


def interrupted(number, frame):
    raise KeyboardInterrupt


def main():
    args = make_parser().parse_args()
    signal.signal(signal.SIGTERM, interrupted)
    try:
        if args.command == "inspect":
            return inspect(args)
        if args.command == "verify":
            return verify(args)
        return prepare(args)
    except UserError as e:
        sys.exit("prepare.py: %s" % e)
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; the same command goes on from here")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == "__main__":
    sys.exit(main())
