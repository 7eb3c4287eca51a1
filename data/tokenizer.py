"""The tokenizers of token shards: bytes, toy, and tiktoken rank files.

A rank file's ids come from infer_mta where it is built, with mta/tokenizer.h, else from the package tiktoken: the same
ids, the first several times as fast. What must be known on both sides (patterns, special ids, how many ranks tell which
pattern) stands here and in mta/tokenizer.h; dev/tests/test_tokenizer.py compares the two.
"""

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import re
import struct
import subprocess
import weakref
import zlib

TOY = "abcdefghijklmnopqrstuvwxyz.#_"
BATCH_MOST = 1 << 32  # bytes of a batch that infer_mta --tokenize --binary takes
PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "infer_mta")

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

# The number of ranks of a known tokenizer tells its pattern. Llama 4 splits text as o200k_base does; its special ids
# are others.
LLAMA4_RANKS = 200000
PATTERN_OF_RANKS = {50256: "gpt2", 100256: "cl100k_base", 128000: "llama3", 199998: "o200k_base",
                    LLAMA4_RANKS: "o200k_base"}
PATTERN_OF_NAME = (  # what the name of a rank file says; it must not contradict the number of ranks
    ("gpt2", ("gpt2", "gpt-2", "r50k")),
    ("cl100k_base", ("cl100k",)),
    ("o200k_base", ("o200k",)),
    ("llama3", ("llama3", "llama-3")),
)


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit status 1."""


def reason(error, path):
    """Why the system refuses a path. A link whose target is gone is there, whatever "No such file" says."""
    try:
        if os.path.islink(path):
            os.stat(path)
    except FileNotFoundError:
        return "a link that leads nowhere"
    except OSError as of_link:
        return of_link.strerror
    return error.strerror


@contextlib.contextmanager
def naming(path):
    """Around what uses a file: where the system refuses, the path is named."""
    try:
        yield
    except OSError as e:
        raise UserError("%s: %s" % (path, e.strerror))


class BadDocument(Exception):
    """A document that cannot be used: (kind, detail). The kind is what is counted."""


class KeyTwice(ValueError):
    """An object of a JSON text in which a key occurs twice: which of its values is meant, nobody knows."""

    def __init__(self, key):
        super().__init__("the key %s occurs twice" % key)


def members(pairs, names=None):
    """An object of a JSON text (object_pairs_hook). Raises KeyTwice where a key, or one of `names`, occurs twice,
    however it is spelt."""
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs if names is None or key in names]
        if len(keys) != len(set(keys)):
            raise KeyTwice(max(keys, key=keys.count))
    return record


# The first versions that have what is asked of a package here. Earlier ones of huggingface_hub leave links in a folder,
# the files in their cache.
OLDEST = {"tiktoken": (0, 9), "zstandard": (0, 19), "pyarrow": (15, 0), "huggingface_hub": (0, 23)}
INSTALL = ("python3 -m venv data/.venv && data/.venv/bin/pip install -r data/requirements.txt, then run "
           "data/.venv/bin/python data/prepare.py")


@functools.lru_cache(maxsize=None)
def refuse_old(package):
    """Refuses a package that lacks what is asked of it: each document, or file, would fail by itself and be left
    out."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return
    oldest = OLDEST.get(package, ())
    if tuple(map(int, re.findall("[0-9]+", version)))[: len(oldest)] < oldest:
        text = "the package %s %s is too old, wanted %d.%d or later: %s"
        raise UserError(text % (package, version, *oldest, INSTALL))


def need(module):
    """Imports an optional package, or says how to get it."""
    package = module.split(".")[0]
    refuse_old(package)
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UserError("the package %s is needed and not installed: %s" % (package, INSTALL))


# ----------------------------------------------------------------------------------------------------------------------
# Rank files


OTHER_FORMATS = {
    b"{": "JSON (Hugging Face's tokenizer.json?)",
    b"[": "JSON",
    b"#version": "a list of merges (GPT-2's merges.txt or vocab.bpe?)",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull fetches it)",
    b"GGUF\3": "a GGUF model",
    b"<": "HTML or XML, as of a download that was refused",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "compressed by gzip",
}


def other_format(data):
    """What a file is that is no rank file but is often taken for one; None where it may be one."""
    # A SentencePiece model is a protocol buffer: field 1, its length, in it field 1, its length, the first piece.
    if len(data) > 4 and data[0] == data[2] == 10 and 2 < data[1] and data[3] <= data[1] - 2:
        return "a SentencePiece model (Llama 2's?)"
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    return next((what for begin, what in OTHER_FORMATS.items() if start.startswith(begin)), None)


@functools.lru_cache(maxsize=1)
def read_ranks(path):
    """A tiktoken rank file as a dictionary {bytes: rank}; refused with file and line where it is not whole."""
    ranks, lines = {}, {}
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise UserError("%s: %s" % (path, e.strerror))
    what = "empty" if not data else other_format(data)
    if what:
        raise UserError("%s: %s, wanted a tiktoken rank file, like Llama 3's tokenizer.model" % (path, what))
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.removesuffix(b"\r").split(b" ")  # as mta/tokenizer.h reads it, not as tiktoken
            if not rank.isdigit():
                raise ValueError
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            raise UserError("%s:%d: wanted a line of a tiktoken rank file: BASE64 RANK" % (path, number))
        if not token:
            raise UserError("%s:%d: wanted a token of one byte at least" % (path, number))
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


def pattern_of(path, given=None):
    """The pattern that splits text for this rank file: as given, else as its number of ranks tells."""
    n, name = len(read_ranks(path)), os.path.basename(path).lower()
    if given:
        return given
    known = PATTERN_OF_RANKS.get(n)
    if known is None:
        raise UserError("%s: %d ranks, which no known tokenizer has; add --pattern %s" % (path, n, "|".join(PATTERNS)))
    for pattern, marks in PATTERN_OF_NAME:
        if any(mark in name for mark in marks) and pattern != known:
            raise UserError(
                "%s: %d ranks as %s has them, but its name says %s; rename it, or give --pattern"
                % (path, n, known, pattern)
            )
    return known


def file_sums(path):
    """What the manifest keeps of a rank file."""
    size, crc, sha256 = 0, 0, hashlib.sha256()
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(1 << 20), b""):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            sha256.update(chunk)
    return {"bytes": size, "crc32": "%08x" % crc, "sha256": sha256.hexdigest()}


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers. encode_all(texts): texts as UTF-8 bytes -> for each its packed ids, `width` bytes each, without BOS and
# EOS, or the BadDocument that says why it has none.


class Tokenizer:
    def encode(self, text):
        """The same of one str; raises its BadDocument."""
        ids = self.encode_all([text.encode("utf-8")])[0]
        if isinstance(ids, BadDocument):
            raise ids
        return ids


class BytesTokenizer(Tokenizer):
    """One id a byte; 256 starts a document, 257 ends it, 258 pads."""

    name, vocab, bos, eos, width, path, file_name = "bytes", 259, 256, 257, 2, None, "bytes"

    def encode_all(self, texts):
        return [widened(text) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256)


class ToyTokenizer(Tokenizer):
    """a-z . # _ as 0 to 28; 29 starts a document, 30 ends it; 32 ids in all."""

    name, vocab, bos, eos, width, path, file_name = "toy", 32, 29, 30, 2, None, "toy"
    ids = bytes(max(TOY.find(chr(c)), 0) for c in range(256))

    def encode_all(self, texts):
        return [self.encode_one(text) for text in texts]

    def encode_one(self, text):
        strangers = text.translate(None, TOY.encode())
        if strangers:
            first = strangers.decode("utf-8")[0]
            return BadDocument("tokenizer refused", "the toy tokenizer has no %s, only a-z . # _" % ascii(first))
        return widened(text.translate(self.ids))

    def decode(self, ids):
        return "".join(TOY[i] for i in ids if i < len(TOY)).encode()


def widened(data):
    """Bytes as packed 16-bit numbers."""
    ids = bytearray(2 * len(data))
    ids[::2] = data
    return bytes(ids)


class RankTokenizer(Tokenizer):
    """A tiktoken rank file with one of the four patterns; ids as in the head of mta/tokenizer.h."""

    def __init__(self, path, pattern, encoder):
        self.name, self.path, self.file_name = pattern, path, pattern + ".tiktoken"
        n = len(read_ranks(path))
        kind = "llama4" if pattern == "o200k_base" and n == LLAMA4_RANKS else pattern
        self.bos = n if kind in ("gpt2", "llama3", "llama4") else n + 1
        self.eos = n + 1 if kind in ("llama3", "llama4") else -1
        self.vocab = n + {"gpt2": 1, "llama3": 256, "llama4": 2048}.get(kind, 21)
        self.width = 2 if self.vocab <= 65536 else 4
        self.tokens = None
        if encoder == "tiktoken":
            self.encode_all = Tiktoken(path, pattern, self).encode_all
        elif encoder:
            self.encode_all = Program(encoder, path, pattern, self.width).encode_all

    def decode(self, ids):
        if self.tokens is None:
            self.tokens = {rank: token for token, rank in read_ranks(self.path).items()}
        return b"".join(self.tokens.get(i, b"") for i in ids)


class Tiktoken:
    """Encodes with the package tiktoken."""

    def __init__(self, path, pattern, tok):
        # encode() allows no special token, so this one is text like any other; with none at all tiktoken would look
        # for the empty string, which is everywhere, and be slower
        self.encoding = need("tiktoken").Encoding(pattern, pat_str=PATTERNS[pattern], mergeable_ranks=read_ranks(path),
                                                  special_tokens={"<|endoftext|>": tok.bos})
        self.dtype = "<u2" if tok.width == 2 else "<u4"

    def encode_all(self, texts):
        return [self.encode_one(text.decode("utf-8")) for text in texts]

    def encode_one(self, text):
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except BaseException as e:  # the Rust side's panics are no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            return BadDocument("tokenizer refused", "tiktoken: %s" % str(e).split("\n")[0][:200])
        return ids.astype(self.dtype, copy=False).tobytes()


class Program:
    """Encodes with infer_mta --tokenize --binary, a process of its own that ends when its standard input does."""

    def __init__(self, program, path, pattern, width):
        self.program, self.width = program, width
        command = [program, "--tokenize", "--binary", "--tokenizer", path, "--pattern", pattern]
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours
        )
        weakref.finalize(self, self.process.kill)  # before its pipes close, of which it would complain

    def encode_all(self, texts):
        batch = b"\xff".join(texts) + b"\xff"  # a byte that UTF-8 never holds
        if len(batch) > BATCH_MOST:
            if len(texts) > 1:
                return [self.encode_all([text])[0] for text in texts]
            return [BadDocument("tokenizer refused", "%d bytes in one piece, wanted less than 4 GiB" % len(texts[0]))]
        try:
            self.process.stdin.write(struct.pack("=Q", len(batch)))
            self.process.stdin.write(batch)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.ended()
        counts = struct.unpack("=%dI" % len(texts), self.read(4 * len(texts)))
        ids, start, out = self.read(4 * sum(counts)), 0, []
        if self.width == 2:
            narrow = bytearray(len(ids) // 2)
            narrow[0::2], narrow[1::2] = ids[0::4], ids[1::4]
            ids = bytes(narrow)
        for count in counts:
            out.append(ids[start : start + count * self.width])
            start += count * self.width
        return out

    def read(self, n):
        data = self.process.stdout.read(n)
        if len(data) != n:
            raise self.ended()
        return data

    def ended(self):
        status = self.process.wait()
        return UserError(
            "%s --tokenize ended with status %d; run the same command again to go on, or give --encoder tiktoken"
            % (self.program, status)
        )


@functools.lru_cache(maxsize=None)
def find_encoder(wanted=None):
    """tiktoken, or the path of an infer_mta that can encode for us: as wanted, else infer_mta where it is built."""
    if wanted == "tiktoken":
        return wanted
    program = os.path.join(os.environ.get("MTA_BIN", os.path.dirname(PROGRAM)), "infer_mta")
    if os.path.exists(program):
        try:
            help = subprocess.run([program, "--help"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            if b"--binary" in help:
                return program
        except OSError:
            pass  # of another kind of machine
    if wanted:
        raise UserError("--encoder infer_mta: %s is not there, or is of an earlier version; make infer_mta" % program)
    return "tiktoken"


def open_tokenizer(spec, pattern=None, encoder=None):
    """bytes, toy, or a rank file. encoder: "infer_mta" or "tiktoken", None for what there is, False for decoding
    only."""
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
    return RankTokenizer(spec, pattern_of(spec, pattern), encoder is not False and find_encoder(encoder))
