#!/usr/bin/env python3
"""mta/tokenizer.h against Python's tiktoken: the same ids, none different, and decode(encode(x)) = x.

    data/.venv/bin/python dev/tests/test_tokenizer.py [--full] [--strings N] [--text-mb N] [--text DIR ...] [--seed N]

Default: the golden texts, every code point, 8,000 random strings, 2 MB of the machine's own text: ten seconds.
--full: 1,000,000 random strings and 100 MB of text. Each text goes through all four patterns with real ranks
(cl100k_base's; gpt2's for gpt2), and through all four again with made-up ranks in which any two bytes are a token, so
that a piece that ends one character too early or too late changes the ids even where the real ranks would hide it.
Without tiktoken only the golden texts are compared.
"""

import argparse
import array
import binascii
import ctypes
import functools
import glob
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import unittest.mock

try:
    import tiktoken
except ImportError:
    tiktoken = None

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GOLDEN = os.path.join(ROOT, "dev", "golden", "tokenizers")
sys.path.insert(0, os.path.join(ROOT, "data"))
from tokenizer import PATTERN_OF_RANKS, PATTERNS, UserError, open_tokenizer, read_ranks  # noqa: E402


class Library:
    """mta/tokenizer.h, compiled into a shared library."""

    def __init__(self, folder):
        path = os.path.join(folder, "tokenizer_lib.so")
        command = [
            os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-I" + ROOT,
            os.path.join(ROOT, "dev", "tests", "tokenizer_lib.c"), "-o", path,
        ]
        subprocess.run(command, check=True)
        self.lib = ctypes.CDLL(path)
        self.lib.lib_open.restype = ctypes.c_void_p
        self.lib.lib_encode.restype = ctypes.c_long
        self.lib.lib_encode.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p,
                                        ctypes.c_char_p]
        self.lib.lib_decode.restype = self.lib.lib_max_bytes.restype = ctypes.c_size_t
        self.lib.lib_decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        self.lib.lib_name.restype = ctypes.c_char_p
        for name in ("lib_name", "lib_max_bytes", "lib_vocab", "lib_bos", "lib_eos", "lib_close"):
            getattr(self.lib, name).argtypes = [ctypes.c_void_p]


class Tokenizer:
    """One tokenizer of the library."""

    def __init__(self, library, path, pattern):
        self.lib = library.lib
        self.message = ctypes.create_string_buffer(512)
        self.handle = self.lib.lib_open(path.encode(), pattern and pattern.encode(), self.message)
        if not self.handle:
            raise UserError(self.message.value.decode())
        self.path, self.pattern = path, pattern
        self.room = 1 << 16
        self.ids = (ctypes.c_int32 * self.room)()
        self.longest = self.lib.lib_max_bytes(self.handle) + 8
        self.text = ctypes.create_string_buffer(self.room)

    @functools.cached_property
    def reference(self):
        """tiktoken's of the same ranks and pattern."""
        return tiktoken.Encoding(self.pattern, pat_str=PATTERNS[self.pattern], mergeable_ranks=read_ranks(self.path),
                                 special_tokens={})

    def encode(self, data):
        """Ids of UTF-8 bytes as a slice of C's own array, and their number."""
        if len(data) + 1 > self.room:
            self.room = len(data) * 2
            self.ids = (ctypes.c_int32 * self.room)()
        n = self.lib.lib_encode(self.handle, data, len(data), self.ids, self.message)
        if n < 0:
            raise UserError(self.message.value.decode())
        return self.ids[:n]

    def decode(self, ids, size=None):
        """Text of ids as UTF-8 bytes, decoded one id after another; `size` where it is known that there are so many."""
        numbers = array.array("i", ids)
        room = len(ids) * self.longest if size is None else 4 * size + self.longest
        if room + 8 > len(self.text):
            self.text = ctypes.create_string_buffer(2 * room + 8)
        n = self.lib.lib_decode(self.handle, numbers.buffer_info()[0], len(ids), self.text)
        return ctypes.string_at(self.text, n)

    def __del__(self):
        if self.handle:
            self.lib.lib_close(self.handle)


class Checker:
    """Counts what is equal and what is not, and shows the first differences."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, name, ok, detail=""):
        self.passed += ok
        self.failed += not ok
        print("%s %s%s" % ("ok  " if ok else "FAIL", name, detail), flush=True)

    def compare(self, name, tokenizers, texts):
        """Every text through every tokenizer and its reference: one check a tokenizer."""
        for key, t in tokenizers.items():
            start, wrong, size, first = time.time(), 0, 0, None
            for text in texts:
                data = text.encode("utf-8")
                size += len(data)
                got = t.encode(data)
                if got != t.reference.encode_ordinary(text) or t.decode(got, size=len(data)) != data:
                    wrong += 1
                    first = first or text
            detail = ": %d texts, %.1f MB, %d different, %.1f s" % (len(texts), size / 1e6, wrong, time.time() - start)
            self.check("%s, %s" % (name, key), wrong == 0 < len(texts), detail)
            if first:
                print("     first: %s" % ascii(smallest(t, first)))


def smallest(t, text):
    """A part of the text that still differs, found by leaving away what can be left away."""

    def differs(s):
        ids = t.encode(s.encode("utf-8"))
        return ids != t.reference.encode_ordinary(s) or t.decode(ids) != s.encode("utf-8")

    size = max(1, len(text) // 2)
    while size:
        at = 0
        while at < len(text):
            shorter = text[:at] + text[at + size :]
            if differs(shorter):
                text = shorter
            else:
                at += size
        size //= 2
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Texts


def code_point_texts(full, assigned=False):
    """Every code point but the surrogates, each in the places where a pattern could treat it specially (full: all of
    them; otherwise between letters and before a space, which tells the classes apart). assigned: without the planes in
    which no code point has a class of its own."""
    form = "{0} {0}a A{0}B{0} 1{0}2 {0}{0}.'{0}x '{0}{0}\n{0}" if full else "a{0}B{0} "
    texts = []
    for first in range(0, 0x110000, 256):
        if 0xD800 <= first < 0xE000 or (assigned and not (first < 0x40000 or first >> 16 == 0xE)):
            continue
        texts.append("".join(form.format(chr(c)) for c in range(first, first + 256)))
    return texts


WORDS = [
    "the", " model", "Hello", " WORLD", "'s", "'LL", "'\u017f", "'Ve", "'re", "don't", "I'M", "\u2019s", "12345",
    "3.14", "0xFF", " ", "  ", "    ", "\t", "\n", "\r\n", "\n\n", " \n ", "\u00a0", "\u3000", "\u2028", "\x85", "\x0b",
    "\x1c", "...", "!?", "/", "//", "\n/", "#", "<|endoftext|>", "\u00e9", "e\u0301", "\u0301", "\u0915\u094d\u0937",
    "\u0e44\u0e17\u0e22", "\uc548\ub155", "\u4f60\u597d", "\U0001f600", "\U0001f469\u200d\U0001f467", "\u01c5",
    "\u02b0", "\u00aa", "\u2160", "\u00bd", "\u0660\u0661", "\U0001d7d8", "\ufeff", "\x00", "\u1e9e", "\ufb01", "K",
    "\u212a", "_x", "camelCase", "HTTPServer", "\U0002a6d6",
]


def random_text(rng, pools):
    """A short string that mixes words, spaces and characters of all classes and planes."""
    parts = []
    for _ in range(rng.randrange(1, 14)):
        kind = rng.random()
        if kind < 0.45:
            parts.append(rng.choice(WORDS))
        elif kind < 0.85:
            pool = rng.choice(pools)
            parts.append("".join(rng.choices(pool, k=rng.randrange(1, 6))))
        elif kind < 0.95:
            parts.append(rng.choice(WORDS) * rng.randrange(1, 9))
        else:
            c = rng.randrange(0x110000 - 0x800)
            parts.append(chr(c if c < 0xD800 else c + 0x800))
    return "".join(parts)


def long_piece(rng):
    """Letters without a place to split: few kinds or many, in runs or not, so that merges come in all orders."""
    letters = rng.choice(
        ["ab", "aeiou", "abcdefghijklmnopqrstuvwxyz", "\u00e9\u00ea\u0430\u0431", "etaoinshrdlu" * 9 + "zq\u4f60"]
    )
    size = rng.choice([90, 97, 120, 500, 3000, 20000])
    text = ""
    while len(text) < size:
        text += rng.choice(letters) * rng.choice([1, 1, 1, 2, 5, 40]) + "".join(
            rng.choices(letters, k=rng.randrange(8))
        )
    return text


def character_pools():
    """Characters by general category (of Python's own Unicode version; it only steers what is drawn)."""
    import unicodedata

    pools = {}
    for c in range(0x110000):
        if not 0xD800 <= c < 0xE000:
            pools.setdefault(unicodedata.category(chr(c)), []).append(chr(c))
    return list(pools.values()) + [" \t\n\r\u00a0\u2003", "'sStTdDmMlLvVeErR\u017f", "aAbB'. \n", "0123456789 "]


def machine_texts(folders, limit):
    """Text files of this machine, whole, up to `limit` bytes of valid UTF-8 in all."""
    texts, size = [], 0
    for folder in folders:
        for path in sorted(glob.iglob(os.path.join(folder, "**", "*"), recursive=True)):
            if size >= limit:
                return texts
            try:
                if os.path.islink(path) or not os.path.isfile(path) or not 0 < os.path.getsize(path) < 8 << 20:
                    continue
                with open(path, "rb") as f:
                    data = f.read()
                if b"\0" in data[:4096]:
                    continue
                texts.append(data.decode("utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
            size += len(data)
    return texts


def write_pair_ranks(path):
    """A rank file in which every two bytes are a token, in an order that has no pattern."""
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    random.Random(7).shuffle(pairs)
    with open(path, "w") as f:
        for rank, token in enumerate([bytes([a]) for a in range(256)] + pairs):
            f.write("%s %d\n" % (binascii.b2a_base64(token, newline=False).decode(), rank))


# ----------------------------------------------------------------------------------------------------------------------


def write_ranks(path, n):
    """A rank file of n tokens: the bytes, then six digits each."""
    encode = lambda token: binascii.b2a_base64(token, newline=False)
    lines = [b"%s %d\n" % (encode(bytes([rank]) if rank < 256 else b"%06d" % rank), rank) for rank in range(n)]
    with open(path, "wb") as f:
        f.writelines(lines)


def check_twins(checker, library, folder):
    """What stands in data/tokenizer.py and in mta/tokenizer.h: patterns, which number of ranks has which, names,
    special ids."""
    with open(os.path.join(ROOT, "mta", "tokenizer.h"), encoding="utf-8") as f:
        head = f.read().split("Encoding:")[0]
    said = dict(re.findall(r"^//   (\w+) +([^\s].*(?:\n// {10,}\|.*)*)", head, re.M))
    letters = dict(re.findall(r"([UWC]) = (.+?)(?:, |\n)", said.get("o200k_base", "") + "\n" + head))
    for pattern, text in PATTERNS.items():
        got = re.sub(r"\n// +", "", said.get(pattern, ""))
        if pattern == "o200k_base":
            got = re.sub(r"(?<![\\{A-Za-z])[UWC](?=[*+?])", lambda m: letters[m[0]], got)
        checker.check("the pattern %s is the same in both" % pattern, got == text, "" if got == text else ": %s" % got)

    def outcome(path, pattern, which):
        """name, vocabulary, bos, eos; or the refusal."""
        try:
            if which == "Python":
                t = open_tokenizer(path, pattern, encoder=False)
                return t.name, t.vocab, t.bos, t.eos
            t = Tokenizer(library, path, pattern)
            return (
                t.lib.lib_name(t.handle).decode(),
                *(getattr(t.lib, "lib_" + x)(t.handle) for x in ("vocab", "bos", "eos")),
            )
        except UserError as e:
            return str(e)

    known = {  # as those who published them have them: name, vocabulary, BOS, EOS
        50256: ("gpt2", 50257, 50256, -1),
        100256: ("cl100k_base", 100277, 100257, -1),
        128000: ("llama3", 128256, 128000, 128001),
        199998: ("o200k_base", 200019, 199999, -1),
        200000: ("o200k_base", 202048, 200000, 200001),  # Llama 4's
    }
    checker.check("every known number of ranks is compared", known.keys() == PATTERN_OF_RANKS.keys())
    names = ["tokenizer.model", "GPT-2.bin", "cl100k.tiktoken", "my_o200k", "Llama-3-tokenizer.model"]
    for name in names:
        os.symlink("ranks", os.path.join(folder, name))
    for n in [*PATTERN_OF_RANKS, 1000]:
        wrong = []
        write_ranks(os.path.join(folder, "ranks"), n)
        ranks = read_ranks.__wrapped__(os.path.join(folder, "ranks"))
        for name in names:
            path = os.path.join(folder, name)
            for pattern in (None, *(PATTERNS if name == names[0] else ())):
                with unittest.mock.patch("tokenizer.read_ranks", return_value=ranks):  # a second each
                    python = outcome(path, pattern, "Python")
                c = outcome(path, pattern, "C")
                told = pattern or name == names[0] and n in PATTERN_OF_RANKS  # what must not be refused
                if (
                    (python != c and isinstance(python, tuple) | isinstance(c, tuple))
                    or (told and isinstance(python, str))
                    or (n in known and isinstance(c, tuple) and c[0] == known[n][0] and c != known[n])
                ):
                    wrong.append((name, pattern, python, c))
        checker.check(
            "%d ranks: the same tokenizer or refusal in both" % n, not wrong, "".join("\n     %s" % (w,) for w in wrong)
        )
    for name in ("bytes", "toy"):
        checker.check("%s is the same in both" % name, outcome(name, None, "Python") == outcome(name, None, "C"))


def check_golden(checker, library):
    for pattern in ("cl100k_base", "gpt2"):
        t = Tokenizer(library, os.path.join(GOLDEN, pattern + ".tiktoken"), pattern)
        with open(os.path.join(GOLDEN, "golden.jsonl"), encoding="utf-8") as f:
            cases = [json.loads(line) for line in f]
        wrong = sum(
            t.encode(c["text"].encode()) != c[pattern] or t.decode(c[pattern]) != c["text"].encode() for c in cases
        )
        checker.check(
            "golden texts, %s" % pattern, wrong == 0 and len(cases) == 300, ": %d, %d different" % (len(cases), wrong)
        )


def check_program(checker):
    """infer_mta --tokenize and --detokenize, the face of all this on the command line."""
    program = os.path.join(os.environ.get("MTA_BIN", ROOT), "infer_mta")
    if not os.path.exists(program):
        print("skipped: no %s" % program)
        return 1
    with open(os.path.join(GOLDEN, "golden.jsonl"), "rb") as f:
        lines = f.read()
    cases = [json.loads(line) for line in lines.split(b"\n") if line]
    for pattern in ("cl100k_base", "gpt2"):
        tokenizer = ["--tokenizer", os.path.join(GOLDEN, pattern + ".tiktoken")]
        ids = subprocess.run([program, "--tokenize", *tokenizer], input=lines, stdout=subprocess.PIPE).stdout
        texts = subprocess.run([program, "--detokenize", *tokenizer], input=ids, stdout=subprocess.PIPE).stdout
        wanted = "".join(" ".join(map(str, c[pattern])) + "\n" for c in cases)
        checker.check("infer_mta --tokenize, %s" % pattern, ids == wanted.encode())
        back = [json.loads(line)["text"] for line in texts.split(b"\n") if line]
        checker.check("infer_mta --detokenize, %s" % pattern, back == [c["text"] for c in cases])
    return 0


def check_streaming(checker, tokenizers, rng):
    """Arbitrary ids, whose bytes need not be characters: as Python decodes them, and whole characters at every step."""
    for key, t in tokenizers.items():
        wrong = 0
        for _ in range(2000):
            ids = [
                rng.randrange(t.reference.max_token_value + 1) if rng.random() < 0.5 else rng.randrange(256)
                for _ in range(rng.randrange(12))
            ]
            wrong += (
                t.decode(ids)
                != b"".join(t.reference.decode_single_token_bytes(i) for i in ids).decode("utf-8", "replace").encode()
            )
        checker.check(
            "arbitrary ids decoded as Python's errors='replace', %s" % key, wrong == 0, ": 2000, %d different" % wrong
        )


def check_long_runs(checker, tokenizers):
    runs = ["a", "ab", " ", "\n", "=", "\u00e9", "A", "7", " \t", "\u0301", "\U0001f600"]
    for key, t in tokenizers.items():
        slowest = 0.0
        for run in runs:
            data = (run * (1 << 20)).encode("utf-8")[: 1 << 20]
            data = data.decode("utf-8", "ignore").encode()
            start = time.process_time()
            ids = t.encode(data)
            slowest = max(slowest, time.process_time() - start)
            if t.decode(ids, size=len(data)) != data:
                slowest = float("inf")
        checker.check("a megabyte of one thing, %s" % key, slowest < 1.0, ": slowest %.2f s" % slowest)


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="1,000,000 strings and 100 MB of text")
    parser.add_argument("--strings", type=int, help="random strings, default 8000")
    parser.add_argument("--text-mb", type=float, help="MB of this machine's text, default 2")
    parser.add_argument("--text", nargs="+",
                        default=["/usr/share", "/usr/lib/python3", "/usr/local/lib", "/usr/include", "/usr/lib"],
                        help="folders to take text from")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    strings = args.strings if args.strings is not None else 1000000 if args.full else 8000
    megabytes = args.text_mb if args.text_mb is not None else 100 if args.full else 2
    checker = Checker()
    with tempfile.TemporaryDirectory() as folder:
        library = Library(folder)
        check_golden(checker, library)
        check_twins(checker, library, folder)
        skipped = check_program(checker)
        if tiktoken:
            pair_file = os.path.join(folder, "pairs.tiktoken")
            write_pair_ranks(pair_file)
            real, pairs = {}, {}
            for pattern in PATTERNS:
                ranks = "gpt2" if pattern == "gpt2" else "cl100k_base"
                real["%s with %s's ranks" % (pattern, ranks)] = Tokenizer(
                    library, os.path.join(GOLDEN, ranks + ".tiktoken"), pattern
                )
                pairs["%s with any two bytes" % pattern] = Tokenizer(library, pair_file, pattern)
            rng = random.Random(args.seed)
            check_streaming(checker, {k: real[k] for k in list(real)[:2]}, rng)
            check_long_runs(checker, real)
            everything = {**pairs, **real}
            # The classes that gpt2's and o200k's patterns tell apart are all there are. In planes of nothing but
            # unassigned and private code points o200k's alone must do: gpt2's would tell letters from marks there.
            if args.full:
                checker.compare("every code point", everything, code_point_texts(True))
            else:
                for pattern, assigned in (("gpt2", True), ("o200k", False)):
                    some = {k: pairs[k] for k in pairs if k.startswith(pattern)}
                    checker.compare("every code point", some, code_point_texts(False, assigned))
            checker.compare("long pieces", everything, [long_piece(rng) for _ in range(300 if args.full else 60)])
            pools = character_pools()
            checker.compare("random strings", everything, [random_text(rng, pools) for _ in range(strings)])
            checker.compare("text of this machine", real, machine_texts(args.text, megabytes * 1e6))
        else:
            skipped += 1
            print("skipped: comparisons with tiktoken, which is not installed (data/README.md says how)")
    print("%d passed, %d failed%s" % (checker.passed, checker.failed, ", %d skipped" % skipped if skipped else ""))
    return 1 if checker.failed else 0


if __name__ == "__main__":
    sys.exit(main())
