#!/usr/bin/env python3
"""data/prepare.py: shards against tokens made independently, restarts after a kill at any moment, bad input, downloads.

    data/.venv/bin/python dev/tests/test_prepare.py [--full]

Runs under any Python; what needs zstandard, pyarrow or tiktoken is skipped without them, and training on the shards
without train_mta. --full: 20 kills at random moments of a longer preparation instead of 4.
"""

import argparse
import array
import binascii
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
import zlib

from helpers import BIN, ROOT, Folder, main

PREPARE = os.path.join(ROOT, "data", "prepare.py")
RANKS = os.path.join(ROOT, "dev", "golden", "tokenizers", "cl100k_base.tiktoken")
FULL = "--full" in sys.argv
if FULL:
    sys.argv.remove("--full")
sys.path.insert(0, os.path.join(ROOT, "data"))
import inputs  # noqa: E402
import prepare  # noqa: E402
import shards  # noqa: E402
import tokenizer  # noqa: E402
import worker  # noqa: E402

try:
    import tiktoken
    import zstandard
except ImportError:
    tiktoken = zstandard = None
try:
    import huggingface_hub as hub
except ImportError:
    hub = None
try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

DOMAINS = list(worker.SLIMPAJAMA)
WORDS = (
    "the of and a to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man"
).split()


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + rng.choice(
        [".\n", ". ", "!\n\n", " \u2014 \u00e9t\u00e9 <|endoftext|>\n"]
    )


def document(rng, size=200):
    return "".join(sentence(rng, rng.randrange(3, 20)) for _ in range(max(1, size // 60)))


def main_in_a_copy(arguments, fd):
    """prepare.py with these arguments, in a process that was copied from this one; what it prints goes to fd."""
    os.dup2(fd, 1), os.dup2(fd, 2)
    sys.argv = [PREPARE, *arguments]
    sys.modules["__main__"] = prepare  # which its worker processes load
    prepare.run_program(prepare.main)


def run(*args, status=0, python=None, environment=None, **more):
    """prepare.py with these arguments -> what it printed; its exit status is checked (None: 0 or 1). In a copy of this
    process, which saves the start of Python and of its packages; with more options than that in a process of its own,
    by `python`."""
    args = [str(word) for word in args]
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        if python or environment or more:
            command = [*(python or [sys.executable]), PREPARE, *args]
            variables = dict(os.environ, **(environment or {}))
            got = subprocess.run(command, stdout=out, stderr=out, env=variables, timeout=300, **more).returncode
        else:
            child = multiprocessing.get_context("fork").Process(target=main_in_a_copy, args=(args, out.fileno()))
            child.start()
            child.join(300)
            got = child.exitcode
        out.seek(0)
        shown = out.read()
    if got not in ((0, 1) if status is None else (status,)):
        raise AssertionError("exit status %s, wanted %s\n%s" % (got, status, shown))
    return shown


def shard_tokens(path):
    """Ids of one shard and its header, read without prepare.py's help."""
    with open(path, "rb") as f:
        header, body = struct.unpack("<256i", f.read(1024)), f.read()
    ids = array.array("H" if header[0] == 20240520 else "I", body)
    assert (header[0], header[1]) in ((20240520, 1), (20240801, 7)) and header[2] == len(ids)
    return list(ids), header


def set_tokens(folder, name, split):
    ids = []
    for file in sorted(f for f in os.listdir(folder) if f.startswith("%s_%s_" % (name, split))):
        ids += shard_tokens(os.path.join(folder, file))[0]
    return ids


def digest(folder):
    """{file: sha256} of everything in the folder; a work folder that was left counts too."""
    sums = {}
    for where, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(where, name), "rb") as f:
                sums[os.path.relpath(os.path.join(where, name), folder)] = hashlib.sha256(f.read()).hexdigest()
    return sums


def write_lines(path, documents, meta=True):
    with open(path, "w", encoding="utf-8") as f:
        for text, domain in documents:
            f.write(
                json.dumps(
                    {"text": text, "meta": {"redpajama_set_name": domain}} if meta else {"text": text},
                    ensure_ascii=False,
                )
                + "\n"
            )


class Case(Folder):
    def write(self, name, data):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "wb") as f:
            f.write(data if isinstance(data, bytes) else data.encode())
        return self.path(name)


class Texts(Case):
    def test_single_text_is_split_at_a_line_near_its_end(self):
        text = document(random.Random(1), 20000)
        run("text", self.write("book.txt", text), "--out", self.path("o"), python=(sys.executable, "-I", "-S"))
        train, header = shard_tokens(self.path("o", "book_train_000000.bin"))
        val, _ = shard_tokens(self.path("o", "book_val_000000.bin"))
        self.assertEqual((train[0], train[-1], val[0], val[-1]), (256, 257, 256, 257))
        self.assertEqual(bytes(train[1:-1] + val[1:-1]), text.encode())
        self.assertTrue(0.045 < len(val) / (len(train) + len(val)) < 0.06)
        self.assertEqual(train[-2], 10)
        self.assertEqual(header[3], 259)
        self.assertEqual(header[4] & 0xFFFFFFFF, zlib.crc32(array.array("H", train).tobytes()))

    def test_a_single_text_gives_the_fraction_that_is_asked_for(self):
        text = self.write("book.txt", document(random.Random(2), 20000))
        for fraction in (0.3, 0.9):
            out = self.path("o%g" % fraction)
            run("text", text, "--out", out, "--val-fraction", fraction)
            val, all_of_it = set_tokens(out, "book", "val"), os.path.getsize(text)
            self.assertAlmostEqual(len(val) / all_of_it, fraction, delta=0.02)

    def test_a_heading_alone_is_no_text_to_train_on(self):
        """The line before the place where a text is cut may be the whole text."""
        run("text", self.write("x.txt", "Heading\n" + "word " * 700), "--out", self.path("o"))
        self.assertAlmostEqual(len(set_tokens(self.path("o"), "x", "val")) / 3500, 0.05, delta=0.01)

    def test_a_large_fraction_leaves_a_text_to_train_on(self):
        texts = [self.write("%d.txt" % i, "text %d\n" % i) for i in range(3)]
        run("text", *texts, "--out", self.path("o"), "--val-fraction", 0.9)
        self.assertEqual([set_tokens(self.path("o"), "text", s).count(256) for s in ("train", "val")], [1, 2])
        lines = self.write("lines.jsonl", "".join('{"text": "%d"}\n' % i for i in range(5)))
        shown = run("text", lines, "--out", self.path("p"), "--val-fraction", 0.9999999)
        self.assertIn("text: no training set", shown)

    def test_a_character_is_never_cut(self):
        run("text", self.write("x.txt", "\u00e9\U0001f600" * 500), "--out", self.path("o"))
        for split in ("train", "val"):
            bytes(set_tokens(self.path("o"), "x", split)[1:-1]).decode("utf-8")

    def test_several_texts_go_whole_to_one_side(self):
        texts = {"%02d.txt" % i: document(random.Random(i)) for i in range(12)}
        for name, text in texts.items():
            self.write("in/" + name, text)
        for out in ("a", "b"):
            run("text", self.path("in"), "--name", "t", "--out", self.path(out))
        self.assertEqual(digest(self.path("a")), digest(self.path("b")))
        found = []
        for split in ("train", "val"):
            ids = set_tokens(self.path("a"), "t", split)
            starts = [i for i, n in enumerate(ids) if n == 256] + [len(ids)]
            self.assertTrue(len(starts) > 1, split)
            found += [bytes(ids[a + 1 : b - 1]).decode() for a, b in zip(starts, starts[1:])]
        self.assertEqual(sorted(found), sorted(texts.values()))

    def test_toy(self):
        run("text", self.write("t.txt", "abc.z#_" * 30), "--tokenizer", "toy", "--out", self.path("o"))
        self.assertEqual(set_tokens(self.path("o"), "t", "train")[:8], [29, 0, 1, 2, 26, 25, 27, 28])
        self.assertIn(
            "toy tokenizer has no 'B'",
            run("text", self.write("u.txt", "aB"), "--tokenizer", "toy", "--out", self.path("o"), status=1),
        )

    def test_two_names_share_a_folder_and_a_manifest(self):
        for name in ("a", "b"):
            run("text", self.write(name + ".txt", document(random.Random(name))), "--out", self.path("o"))
        self.assertIn("4 shards good", run("verify", self.path("o")))
        with open(self.path("o", "manifest.json")) as f:
            manifest = json.load(f)
        self.assertEqual(sorted(manifest["preparations"]), ["a", "b"])
        self.assertEqual(manifest["shards"]["a_train_000000.bin"]["documents"], 1)

    def test_again_changes_nothing_and_other_options_are_refused(self):
        text = self.write("a.txt", document(random.Random(3)))
        run("text", text, "--out", self.path("o"))
        before = digest(self.path("o"))
        self.assertIn("complete already", run("text", text, "--out", self.path("o")))
        self.assertIn(
            "other inputs or options", run("text", text, "--out", self.path("o"), "--val-fraction", "0.5", status=1)
        )
        self.assertEqual(digest(self.path("o")), before)
        run("text", text, "--out", self.path("o"), "--shard-tokens", "50", "--overwrite")
        run("text", text, "--out", self.path("o"), "--overwrite")
        self.assertEqual(digest(self.path("o")), before)

    def test_an_input_that_is_newer_than_its_shards_is_said(self):
        """Another text may have the same name and length."""
        text = self.write("a.txt", "one text\n" * 9)
        run("text", text, "--out", self.path("o"))
        self.assertNotIn("newer", run("text", text, "--out", self.path("o")))
        self.write("a.txt", "two text\n" * 9)
        os.utime(text, (time.time() + 5, time.time() + 5))
        self.assertIn("a.txt is newer than the shards in", run("text", text, "--out", self.path("o")))

    def test_inspect_shows_where_a_long_document_ends(self):
        run("text", self.write("book.txt", b"a line\n" * 200000), "--out", self.path("o"), "--val-fraction", 0)
        path, shown = self.path("o", "book_train_000000.bin"), io.StringIO()
        args = argparse.Namespace(shard=path, tokenizer=None, pattern=None, documents=1, characters=6)
        with unittest.mock.patch.object(shards, "KEPT", 1), contextlib.redirect_stdout(shown):
            shards.inspect(args)  # of which a megabyte at a time is kept to be shown
        self.assertIn("--- tokens 0 to 1400002\na line [... more]\n", shown.getvalue())

    def test_inspect_of_documents_beyond_what_is_kept(self):
        """A later one has not begun in the shard before because its first id is not kept."""
        lines = json.dumps({"text": "a line\n" * 200000}) + '\n{"text": "second"}\n{"text": "third"}\n'
        run("text", self.write("two.jsonl", lines), "--out", self.path("o"), "--val-fraction", 0,
            "--name", "two")
        path, shown = self.path("o", "two_train_000000.bin"), io.StringIO()
        args = argparse.Namespace(shard=path, tokenizer=None, pattern=None, documents=3, characters=6)
        with unittest.mock.patch.object(shards, "KEPT", 1), contextlib.redirect_stdout(shown):
            shards.inspect(args)
        self.assertEqual(shown.getvalue().count("\n--- tokens "), 3)
        self.assertNotIn("begun in the shard before", shown.getvalue())

    def test_shards_have_the_size_asked_for(self):
        run("text", self.write("a.txt", "x" * 5000), "--out", self.path("o"), "--shard-tokens", "1k", "--val-fraction",
            "0")
        sizes = [shard_tokens(self.path("o", "a_train_%06d.bin" % i))[1][2] for i in range(6)]
        self.assertEqual(sizes, [1000] * 5 + [2])
        self.assertIn("6 shards good, 5002 tokens", run("verify", self.path("o")))

    def test_no_shard_is_left_empty(self):
        """The last document, which became validation, was alone in the last shard."""
        lines = self.write("two.jsonl", '{"text": "abcd"}\n{"text": "x"}\n')
        run("text", lines, "--shard-tokens", 6, "--val-fraction", "1e-9", "--out", self.path("o"))
        self.assertEqual(sorted(os.listdir(self.path("o"))),
                         ["manifest.json", "text_train_000000.bin", "text_val_000000.bin"])
        run("verify", self.path("o"))

    def test_overwrite_is_of_its_own_name(self):
        """Shards of another preparation stay, also where --overwrite replaces one."""
        lines = self.write("code.jsonl", b'{"text": "print(1)", "lang": "python"}\n' * 3)
        run("text", lines, "--domain-field", "lang", "--out", self.path("o"))
        before = digest(self.path("o"))
        book = self.write("python.txt", "a book on snakes\n" * 99)
        shown = run("text", book, "--out", self.path("o"), "--overwrite", status=1)
        self.assertIn("belongs to the preparation text; give another --name", shown)
        shutil.rmtree(self.path("o", ".python.partial"))
        self.assertEqual(digest(self.path("o")), before)

    def test_a_file_that_was_there_is_not_overwritten(self):
        self.write("o/a_train_000000.bin", "mine")
        self.assertIn("in no manifest", run("text", self.write("a.txt", "abc" * 50), "--out", self.path("o"), status=1))
        self.assertEqual(digest(self.path("o")), {"a_train_000000.bin": hashlib.sha256(b"mine").hexdigest()})


class Domains(Case):
    def corpus(self, n=210):
        """Documents of all seven domains: jsonl.zst, parquet with meta as an object, parquet with meta as JSON text."""
        rng = random.Random(5)
        documents = [(document(rng, rng.randrange(60, 900)), DOMAINS[i % 7]) for i in range(n)]
        third = n // 3
        os.makedirs(self.path("in"))
        lines = b"".join(
            json.dumps({"text": t, "meta": {"redpajama_set_name": d}}).encode() + b"\n" for t, d in documents[:third]
        )
        half = lines.index(b"\n", len(lines) // 2) + 1
        with open(self.path("in", "a.jsonl.zst"), "wb") as f:  # two frames, one after another
            f.write(
                zstandard.ZstdCompressor().compress(lines[:half]) + zstandard.ZstdCompressor().compress(lines[half:])
            )
        for name, part, form in (
            ("b", documents[third : 2 * third], lambda d: {"redpajama_set_name": d}),
            ("c", documents[2 * third :], lambda d: json.dumps({"redpajama_set_name": d})),
        ):
            table = pyarrow.table({"text": [t for t, _ in part], "meta": [form(d) for _, d in part]})
            pyarrow.parquet.write_table(table, self.path("in", name + ".parquet"), row_group_size=16)
        return documents

    @unittest.skipUnless(tiktoken and pyarrow, "needs tiktoken, zstandard and pyarrow")
    def test_slimpajama(self):
        documents = self.corpus()
        options = ("--tokenizer", RANKS, "--val-fraction", "0.2", "--shard-tokens", "3000")
        run("slimpajama", self.path("in"), "--out", self.path("o"), *options)
        run("slimpajama", self.path("in"), "--out", self.path("p"), "--workers", "2", *options)
        self.assertEqual(digest(self.path("o")), digest(self.path("p")))
        encoding = tiktoken.Encoding("x", pat_str=tokenizer.PATTERNS["cl100k_base"],
                                     mergeable_ranks=tokenizer.read_ranks(RANKS), special_tokens={})
        with open(self.path("o", "manifest.json")) as f:
            manifest = json.load(f)
        for domain, name in worker.SLIMPAJAMA.items():
            wanted = [[100257] + encoding.encode_ordinary(t) for t, d in documents if d == domain]
            got = {split: set_tokens(self.path("o"), name, split) for split in ("train", "val")}
            rest = {split: ids[:] for split, ids in got.items()}
            for ids in wanted:  # each document in its place on exactly one side
                side = [split for split in rest if rest[split][: len(ids)] == ids]
                self.assertEqual(len(side), 1)
                rest[side[0]] = rest[side[0]][len(ids) :]
            self.assertEqual(rest, {"train": [], "val": []})
            self.assertTrue(got["train"] and got["val"])
            sets = manifest["preparations"]["slimpajama"]["sets"][name]
            self.assertEqual(sum(s["documents"] for s in sets.values()), 30)
            self.assertEqual(sets["train"]["tokens"], len(got["train"]))
        self.assertIn("0 things wrong", run("verify", self.path("o")))
        shown = run("inspect", self.path("o", "arxiv_train_000000.bin"), "--documents", "1", "--characters", "20")
        ids = set_tokens(self.path("o"), "arxiv", "train")[1:]
        first = encoding.decode(ids[: ids.index(100257)])
        self.assertIn(first[:20], shown)
        self.train()

    def train(self):
        """Two steps at the paper's weights, by token and by document."""
        program = os.path.join(BIN, "train_mta")
        if not os.path.exists(program):
            self.skipTest("not trained on: no %s" % program)
        recipe = shutil.copy(os.path.join(ROOT, "data", "slimpajama_weights.txt"), self.path("o", "recipe.txt"))
        for mix in ("token", "document"):
            command = [program, "--model", "toy", "--vocab-size", "100277", "--hidden-size", "32",
                       "--num-hidden-layers", "1", "--num-attention-heads", "2", "--num-key-value-heads", "2",
                       "--intermediate-size", "64", "--seq-len", "32", "--batch-size", "4", "--tokens-per-step", "128",
                       "--steps", "2", "--train", "@" + recipe, "--mix", mix, "--out", self.path("run-" + mix)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self.assertEqual(done.returncode, 0, done.stdout)

    def test_any_field_makes_domains(self):
        rng = random.Random(2)
        with open(self.path("x.jsonl"), "w") as f:
            for i in range(40):
                f.write(json.dumps({"body": {"content": document(rng)}, "lang": ["en", "d e"][i % 2]}) + "\n")
        run("text", self.path("x.jsonl"), "--text-field", "body.content", "--domain-field", "lang", "--out",
            self.path("o"))
        self.assertEqual(sorted({f.split("_")[0] for f in os.listdir(self.path("o"))}), ["d-e", "en", "manifest.json"])

    def test_gz_equals_plain_lines(self):
        documents = [(document(random.Random(i)), None) for i in range(50)]
        write_lines(self.path("x.jsonl"), documents, meta=False)
        with open(self.path("x.jsonl"), "rb") as f, gzip.open(self.path("y.jsonl.gz"), "wb") as g:
            g.write(f.read())
        run("text", self.path("x.jsonl"), "--name", "n", "--out", self.path("a"))
        run("text", self.path("y.jsonl.gz"), "--name", "n", "--out", self.path("b"))
        for split in ("train", "val"):
            self.assertEqual(set_tokens(self.path("a"), "n", split), set_tokens(self.path("b"), "n", split))


@unittest.skipUnless(tiktoken, "needs tiktoken")
class Segments(Case):
    def test_a_long_text_in_segments_has_the_tokens_of_the_whole(self):
        rng = random.Random(11)
        tails = ["\n", "\n\n", " \n", ".\n", "'\n", "/\n", "\r\n", "\u3000\n", "\u00e9\n", "1\n"]
        text = "".join(
            document(rng, 80)
            + rng.choice(WORDS)
            + rng.choice(tails)
            + rng.choice(["s ", "Ll ", "'s", " x", "9", "\u4f60", "x"])
            for _ in range(800)
        )
        path = self.write("long.txt", text)
        old, inputs.SEGMENT = inputs.SEGMENT, 997
        try:
            for pattern in tokenizer.PATTERNS:
                out = self.path(pattern)
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    sys.argv = ["prepare.py", "text", path, "--tokenizer", RANKS, "--pattern", pattern,
                                "--val-fraction", "0", "--out", out, "--workers", "1"]
                    self.assertIn(prepare.main(), (None, 0))
                encoding = tiktoken.Encoding("x", pat_str=tokenizer.PATTERNS[pattern],
                                             mergeable_ranks=tokenizer.read_ranks(RANKS), special_tokens={})
                ids = set_tokens(out, "long", "train")
                self.assertEqual(ids[1:-1] if pattern == "llama3" else ids[1:], encoding.encode_ordinary(text))
        finally:
            inputs.SEGMENT = old

    def test_tokens_are_the_same_where_a_text_is_cut_at_every_safe_place(self):
        rng = random.Random(12)
        parts = ["a", "bc", "D", "'s", "'S", "'ll", " ", " ", "\n", "\r\n", "1", "!", "/", "_",
                 *"\u4e2d\u56fd\uff0c\u3002\u3001\u3000\u044f\u0411\ud55c\uae00\u0639\u0915",
                 *"\u093f\u0301\u00e9\u017f\u00a0\U0001f600"]
        text = "".join(rng.choice(parts) for _ in range(20000)).encode()
        ends = [match.end() for match in inputs.SAFE_CUT.finditer(text)]
        self.assertGreater(len(ends), 500)
        segments = [text[i:j].decode() for i, j in zip([0, *ends], [*ends, len(text)])]
        for pattern in tokenizer.PATTERNS:
            encoding = tiktoken.Encoding("x", pat_str=tokenizer.PATTERNS[pattern],
                                         mergeable_ranks=tokenizer.read_ranks(RANKS), special_tokens={})
            self.assertEqual([i for ids in encoding.encode_ordinary_batch(segments) for i in ids],
                             encoding.encode_ordinary(text.decode()))


class Large(Case):
    """What only texts of gigabytes have come to: too much of them at once."""

    def test_texts_of_all_scripts_have_places_to_cut(self):
        texts = {"crlf": "A line.\r\nAnother line\r\n", "one line": "no line ends here ", "upper": "ALL CAPITALS ",
                 "chinese": "\u5929\u6c14\u5f88\u597d\uff0c\u53bb\u516c\u56ed\u3002\r\n",
                 "russian": "\u0414\u043e\u0431\u0440\u044b\u0439 \u0434\u0435\u043d\u044c.\n",
                 "korean": "\uc548\ub155 \uc138\uacc4.\n",
                 "arabic": "\u0645\u0631\u062d\u0628\u0627 \u0639\u0627\u0644\u0645\n",
                 "hindi": "\u0918\u0930 \u092e\u0928\n"}
        with unittest.mock.patch.object(inputs, "SEGMENT", 1000):
            for name, text in texts.items():
                data = text.encode() * 200
                path = self.write(name + ".txt", data)
                plan = inputs.make_plan({path: path}, {"split": "", "val_fraction": 0, "seed": 0})
                tasks = list(inputs.entry_tasks(0, plan[0], {"offset": 0}, lambda n: None, False))
                self.assertEqual(b"".join(task[4] for task, _ in tasks), data)
                self.assertLess(max(len(task[4]) for task, _ in tasks), 1100, name)

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_a_row_group_is_encoded_a_part_at_a_time(self):
        rows = ["text %d" % i * (i % 50) for i in range(2000)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), self.path("x.parquet"), row_group_size=2000)
        one = worker.Worker({"tokenizer": "bytes", "pattern": None, "encoder": None, "val_fraction": 0.1, "seed": 0,
                             "text_field": "text", "domain_field": "", "name": "n", "command": "text"})
        encode, sizes, results = one.tok.encode_all, [], []
        one.tok.encode_all = lambda texts: sizes.append(sum(map(len, texts))) or encode(texts)
        for batch in (worker.BATCH, 5000):
            with unittest.mock.patch.object(worker, "BATCH", batch):
                sizes.clear()
                results.append(one.run(("rows", self.path("x.parquet"), None, 0, None)))
        self.assertEqual(sum(sizes), sum(map(len, rows)))
        self.assertLess(max(sizes), 5000 + 50 * len("text 2000"))
        self.assertEqual(results[0], results[1])
        self.assertEqual([line for line, _, _ in results[0][1]], list(range(1, 2001, 50)))  # the empty ones

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_a_file_of_many_row_groups_is_opened_once(self):
        """Each time takes as long as there are groups: a file of 33,000 took more than 4 minutes."""
        paths, results, wanted = [self.path("a.parquet"), self.path("b.parquet")], [], []
        for path in paths:
            rows = ["%s %d" % (path[-9], i) if i % 7 else "" for i in range(40)]
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=2)
        one = worker.Worker({"tokenizer": "bytes", "pattern": None, "encoder": None, "val_fraction": 0, "seed": 0,
                             "text_field": "text", "domain_field": "", "name": "n", "command": "text"})
        with unittest.mock.patch.object(inputs, "parquet_file", wraps=inputs.parquet_file) as opened:
            for path in (*paths, paths[0]):
                results += [one.run(("rows", path, None, group, None)) for group in range(20)]
        self.assertEqual([call.args[0] for call in opened.mock_calls], [*paths, paths[0]])
        self.assertEqual([line for _, bad in results for line, _, _ in bad], list(range(1, 41, 7)) * 3)
        for path in (*paths, paths[0]):
            for group in range(20):
                wanted.append(b"".join(b"%s %d" % (path[-9].encode(), i) for i in (2 * group, 2 * group + 1) if i % 7))
        texts = [bytes(i for i in struct.unpack("<%dH" % (len(sets["n/train"][0]) // 2), sets["n/train"][0]) if i < 256)
                 for sets, _ in results]
        self.assertEqual(texts, wanted)

    @unittest.skipUnless(os.path.exists(os.path.join(BIN, "infer_mta")), "needs infer_mta")
    def test_a_text_of_more_than_the_encoder_takes_is_left_out_by_name(self):
        lines = b"".join(b'{"text": "%s"}\n' % (b"abc " * n) for n in (2, 400, 3, 300, 5))
        path = self.write("x.jsonl", lines)
        with unittest.mock.patch.object(tokenizer, "BATCH_MOST", 1300):
            shown = run("text", path, "--out", self.path("o"), "--tokenizer", RANKS, "--pattern", "cl100k_base",
                        "--encoder", "infer_mta")
        self.assertIn("x.jsonl:2: tokenizer refused: 1600 bytes in one piece, wanted less than 4 GiB; skipped", shown)
        self.assertIn("left out: 1 tokenizer refused", shown)

    def test_shards_are_known_by_their_names_beyond_a_million(self):
        self.assertTrue(shards.SHARD_NAME.fullmatch("c4_train_1000000.bin"))


class Bad(Case):
    def lines(self):
        good = [json.dumps({"text": document(random.Random(i))}).encode() for i in range(6)]
        bad = {
            2: (b'{"text": "unfinished', "broken JSON"),
            4: (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
            6: (b'{"text": ""}', "empty document"),
            8: (b'{"body": "x"}', "missing field"),
            10: (b'{"text": 5}', "field is not text"),
            12: (b'{"text": "\\ud800"}', "lone surrogate"),
            14: (b"[1]", "broken JSON"),
        }
        lines = []
        for number in range(1, 15):
            lines.append(bad[number][0] if number in bad else good.pop() if good else b"")
        return b"\n".join(lines) + b"\n", {n: kind for n, (_, kind) in bad.items()}

    def test_each_kind_is_counted_and_reported_with_file_and_line(self):
        data, bad = self.lines()
        path = self.write("x.jsonl", data)
        shown = run("text", path, "--out", self.path("o"))
        with open(self.path("o", "text.bad.jsonl")) as f:
            listed = {entry["line"]: entry["kind"] for entry in map(json.loads, f)}
        self.assertEqual(listed, bad)
        for number, kind in bad.items():
            self.assertIn("%s:%d: %s" % (path, number, kind), shown)
        with open(self.path("o", "manifest.json")) as f:
            summary = json.load(f)["preparations"]["text"]
        self.assertEqual(sum(summary["bad"].values()), 7)
        self.assertEqual(sum(s["documents"] for s in summary["sets"]["text"].values()), 6)

    def test_refuse_stops_at_the_first_and_skip_goes_on_from_there(self):
        data, _ = self.lines()
        path = self.write("x.jsonl", data)
        self.assertIn(
            "%s:2: broken JSON" % path, run("text", path, "--out", self.path("o"), "--on-bad", "refuse", status=1)
        )
        self.assertFalse([f for f in os.listdir(self.path("o")) if f.endswith(".bin")])
        run("text", path, "--out", self.path("o"))
        run("text", path, "--out", self.path("p"))
        self.assertEqual(digest(self.path("o")), digest(self.path("p")))
        shown = run("text", path, "--out", self.path("o"), "--on-bad", "refuse", status=1)  # of all documents
        self.assertIn("an earlier call left out 7 documents, listed in %s; --overwrite" % self.path("o/text.bad.jsonl"),
                      shown)

    def test_text_that_is_not_utf8(self):
        good = self.write("good.txt", document(random.Random(1), 3000))
        bad = self.write("bad.txt", b"fine\nfine\nno\xffno\n")
        self.assertIn("%s:3: invalid UTF-8" % bad, run("text", good, bad, "--name", "n", "--out", self.path("o")))
        self.assertIn("%s:3: invalid UTF-8" % bad, run("text", bad, "--out", self.path("p"), status=1))
        self.assertIn("empty document", run("text", self.write("none.txt", b""), "--out", self.path("q"), status=1))

    def test_files_that_break_off(self):
        lines = b"".join(json.dumps({"text": document(random.Random(i))}).encode() + b"\n" for i in range(4000))
        files = {"a.jsonl.gz": gzip.compress(lines)}
        if zstandard:
            files["b.jsonl.zst"] = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
        for name, data in files.items():
            path = self.write(name, data[: len(data) * 3 // 4])
            shown = run("text", path, "--out", self.path("o-" + name))
            self.assertIn("truncated or damaged file", shown)
            with open(self.path("o-" + name, "manifest.json")) as f:
                sets = json.load(f)["preparations"]["text"]["sets"]["text"]
            documents = sum(s["documents"] for s in sets.values())
            self.assertTrue(0 < documents < 4000, documents)
            self.assertIn("%s:%d: truncated" % (path, documents + 1), shown)
            self.assertIn(
                "truncated", run("text", path, "--on-bad", "refuse", "--out", self.path("r-" + name), status=1)
            )
            damaged = bytearray(data)
            damaged[len(data) // 2] ^= 0xFF
            shown = run(
                "text", self.write("d" + name, bytes(damaged)), "--out", self.path("d-" + name), status=None
            )  # 1 if nothing is left
            self.assertIn("truncated or damaged file", shown)

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_parquet_that_breaks_off(self):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["abc", None, "", "def" * 9]}), self.path("x.parquet"))
        shown = run("text", self.path("x.parquet"), "--out", self.path("o"))
        self.assertIn("x.parquet:2: field is not text", shown)
        self.assertIn("x.parquet:3: empty document", shown)
        with open(self.path("x.parquet"), "rb") as f:
            data = f.read()
        self.assertIn(
            "truncated or damaged", run("text", self.write("y.parquet", data[:-20]), "--out", self.path("p"), status=1)
        )

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_a_machine_without_memory_or_disk_is_no_damaged_parquet(self):
        """Its rows were left out as those of a truncated file, and the status was 0."""
        pyarrow.parquet.write_table(pyarrow.table({"text": ["abc", "def"]}), self.path("x.parquet"))
        self.write("y.jsonl", '{"text": "hello"}\n' * 3)
        for i, error in enumerate((pyarrow.ArrowMemoryError("malloc of size 1 failed"), OSError(5, "I/O error"))):
            for method in ("__init__", "iter_batches"):
                with unittest.mock.patch.object(pyarrow.parquet.ParquetFile, method, side_effect=error):
                    shown = run("text", self.path("x.parquet"), self.path("y.jsonl"), "--out",
                                self.path("o%s%d" % (method, i)), status=1)
                self.assertNotIn("truncated", shown)
                self.assertRegex(shown, r"(?m)^prepare\.py: .*x\.parquet: .*(malloc of size 1 failed|I/O error)$")

    def test_packages_that_are_too_old(self):
        """They lack what is asked of them: each document, or file, was left out as one that is damaged."""
        self.write("x.parquet", b"PAR1")
        self.write("x.jsonl.zst", b"\x28\xb5\x2f\xfd")
        self.write("x.jsonl", '{"text": "hello"}\n')
        ranks = ["--tokenizer", RANKS, "--pattern", "cl100k_base", "--encoder", "tiktoken"]
        out = ["--out", self.path("o")]
        for package, version, oldest, command in (
            ("pyarrow", "14.0.2", "15.0", ["text", self.path("x.parquet"), *out]),
            ("zstandard", "0.18.0", "0.19", ["text", self.path("x.jsonl.zst"), *out]),
            ("tiktoken", "0.8.0", "0.9", ["text", self.path("x.jsonl"), *out, *ranks]),
            ("huggingface_hub", "0.22.2", "0.23", ["slimpajama", "--download", self.path("d"), "--repo", "a/b"]),
        ):
            tokenizer.refuse_old.cache_clear()
            with unittest.mock.patch("importlib.metadata.version", lambda name, version=version: version):
                shown = run(*command, status=1)
            said = "the package %s %s is too old, wanted %s or later: python3 -m venv" % (package, version, oldest)
            self.assertIn(said, shown)
        tokenizer.refuse_old.cache_clear()

    @unittest.skipUnless(zstandard, "needs zstandard")
    def test_a_machine_without_memory_is_no_damaged_zst(self):
        path = self.write("a.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"text": "hello"}\n' * 9))
        error = zstandard.ZstdError("zstd decompress error: Allocation error : not enough memory")
        with unittest.mock.patch("zstandard.ZstdDecompressor") as decompressor:
            decompressor.return_value.decompressobj.return_value.decompress.side_effect = error
            shown = run("text", path, "--out", self.path("o"), status=1)
        self.assertIn("a.jsonl.zst: out of memory: zstd", shown)

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_rows_are_counted_over_batches_and_groups(self):
        rows = [{"text": "abc", "meta": {"text": "def"}}] * 9000
        for i in (4095, 4096, 8999):
            rows[i] = {"text": "", "meta": None}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), self.path("x.parquet"), row_group_size=5000)
        for field, kind in (("text", "empty document"), ("meta.text", "missing field")):
            run("text", self.path("x.parquet"), "--text-field", field, "--out", self.path(field))
            with open(self.path(field, "text.bad.jsonl")) as f:
                bad = [json.loads(line) for line in f]
            self.assertEqual([(b["line"], b["kind"]) for b in bad], [(n, kind) for n in (4096, 4097, 9000)])

    def test_a_program_without_memory_says_so(self):
        with unittest.mock.patch("inputs.expand_inputs", side_effect=MemoryError):
            shown = run("text", self.write("a.txt", "hello"), "--out", self.path("o"), status=1)
        self.assertEqual(shown, "prepare.py: out of memory\n")

    def test_a_system_without_semaphores_has_no_workers(self):
        """A container whose /dev/shm may not be written: the folder of --out was blamed."""
        path = self.write("a.jsonl", '{"text": "hello"}\n' * 9)
        with unittest.mock.patch("_multiprocessing.SemLock", side_effect=PermissionError(13, "Permission denied")):
            shown = run("text", path, "--out", self.path("o"), "--workers", "2")
        self.assertIn("no worker processes here, this one does all: Permission denied", shown)
        run("text", path, "--out", self.path("p"))
        self.assertEqual(digest(self.path("o")), digest(self.path("p")))

    def test_links_that_lead_nowhere(self):
        """Of purged scratch space: "No such file" and "File exists" were said of names that ls shows."""
        os.symlink(self.path("gone"), self.path("a.txt"))
        said = "prepare.py: %s: a link that leads nowhere\n"
        self.assertEqual(run("text", self.path("a.txt"), "--out", self.path("o"), status=1), said % self.path("a.txt"))
        text = self.write("b.txt", "hello\n" * 9)
        self.assertEqual(run("text", text, "--out", self.path("a.txt"), status=1), said % self.path("a.txt"))
        os.symlink("c.txt", self.path("c.txt"))
        for words in ((self.path("c.txt"), "--out", self.path("o")), (text, "--out", self.path("c.txt"))):
            self.assertIn("c.txt: Too many levels of symbolic links\n", run("text", *words, status=1))

    def test_a_clock_that_is_set_back(self):
        """The state was not saved until the clock had come back to where it was, and the rates were nonsense."""
        path, commit, saves = self.write("a.jsonl", '{"text": "hello"}\n' * 9), prepare.Preparation.commit, []
        said = unittest.mock.patch.object(prepare.Preparation, "commit", lambda p: print("saved") or commit(p))
        for seconds in (0, 3600):
            with said, unittest.mock.patch("time.time", side_effect=range(10**9, 0, -1000)):
                shown = run("text", path, "--save-seconds", seconds, "--out", self.path("o%d" % seconds))
            saves.append(shown.count("saved\n"))
            self.assertLess(int(re.search(r"9 documents, (\d+)/s", shown)[1]), 1000000, shown)
        self.assertGreater(*saves)

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_a_row_of_parquet_that_is_not_utf8(self):
        """It took the rest of its row group along, as of a damaged file."""
        rows = [b"row %d" % i for i in range(5000)]
        rows[2], rows[4999] = b"caf\xe9 au lait", b"\xff"
        text = pyarrow.Array.from_buffers(pyarrow.string(), 5000, pyarrow.array(rows).buffers())
        pyarrow.parquet.write_table(pyarrow.table({"text": text}), self.path("x.parquet"))
        shown = run("text", self.path("x.parquet"), "--val-fraction", 0, "--out", self.path("o"))
        self.assertIn("x.parquet:3: invalid UTF-8: byte 0xe9", shown)
        self.assertIn("x.parquet:5000: invalid UTF-8: byte 0xff", shown)
        self.assertRegex(shown, r"text +train +4998 ")

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_an_object_in_parquet_with_what_python_has_no_value_for(self):
        """A date to the nanosecond beside the wanted field made the file a damaged one."""
        kind = pyarrow.struct([("set", pyarrow.string()), ("when", pyarrow.timestamp("ns"))])
        meta = [{"set": "a", "when": 1700000000123456789}, None, {"set": "b", "when": None}, {"set": None, "when": 1}]
        table = {"text": ["one", "two", "three", "four"], "meta": pyarrow.array(meta, type=kind)}
        pyarrow.parquet.write_table(pyarrow.table(table), self.path("x.parquet"))
        shown = run("text", self.path("x.parquet"), "--domain-field", "meta.set", "--val-fraction", 0, "--out",
                    self.path("o"))
        self.assertIn("x.parquet:2: missing field: no meta.set", shown)
        self.assertIn("x.parquet:4: missing field: no text in meta.set", shown)
        self.assertEqual([set_tokens(self.path("o"), name, "train") for name in "ab"],
                         [[256, *b"one", 257], [256, *b"three", 257]])
        table["meta.set"] = ["flat"] * 4
        pyarrow.parquet.write_table(pyarrow.table(table), self.path("y.parquet"))
        shown = run("text", self.path("y.parquet"), "--domain-field", "meta.set", "--out", self.path("p"))
        self.assertIn("y.parquet:1: ambiguous field: meta.set is there flat and nested", shown)

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_checksums_in_parquet(self):
        """A changed letter was taken as it was."""
        table = pyarrow.table({"text": ["one", "brown fox", "three"]})
        more = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
        pyarrow.parquet.write_table(table, self.path("x.parquet"), row_group_size=1, **more)
        run("text", self.path("x.parquet"), "--val-fraction", 0, "--out", self.path("o"))
        with open(self.path("x.parquet"), "rb") as f:
            self.write("x.parquet", f.read().replace(b"fox", b"gox"))
        shown = run("text", self.path("x.parquet"), "--val-fraction", 0, "--out", self.path("p"))
        self.assertRegex(shown, r"x\.parquet:0: truncated or damaged file: parquet row group 1: .*CRC")
        self.assertEqual(set_tokens(self.path("p"), "text", "train"), [256, *b"one", 257, 256, *b"three", 257])

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_parquet_whose_name_is_not_utf8(self):
        """It was called damaged, and left out."""
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), self.path("x.parquet"))
        name = os.fsencode(self.path("caf")) + b"\xe9.parquet"
        os.rename(self.path("x.parquet"), name)
        for workers in (1, 2):
            shown = run("text", os.fsdecode(name), "--workers", workers, "--out", self.path("o%d" % workers))
            self.assertNotIn("left out", shown)

    @unittest.skipUnless(pyarrow, "needs pyarrow")
    def test_parquet_with_a_column_twice(self):
        """Which of the two is meant, nobody knows; another column may be there twice."""
        one, two = pyarrow.array(["one"]), pyarrow.array(["two"])
        for names, status in ((["text", "text"], 1), (["text", "more", "more"], 0)):
            table = pyarrow.Table.from_arrays([one, two, two][: len(names)], names=names)
            pyarrow.parquet.write_table(table, self.path("x%d.parquet" % status))
            shown = run("text", self.path("x%d.parquet" % status), "--out", self.path("o%d" % status), status=status)
            self.assertEqual("ambiguous field: the column text occurs twice" in shown, status == 1, shown)

    @unittest.skipUnless(tiktoken, "needs tiktoken")
    def test_rank_files(self):
        with open(RANKS, "rb") as f:
            lines = f.read().splitlines()[:1000]
        text = self.write("t.txt", "hello")
        cases = {
            "hole": (lines[:500] + lines[501:], ":501: a hole"),
            "base64": (lines[:9] + [b"!! 9"], ":10: wanted a line"),
            "rank": (lines + [b"AAAA x"], ":1001: wanted a line"),
            "twice": (lines + [lines[3].split()[0] + b" 1000"], ":1001: the same token"),
            "byte": (lines[:200], "no token for the single byte"),
            "json": ([b"{}"], "JSON"),
            "tab": (lines + [b"AAAA\t1000"], ":1001: wanted a line"),  # the C programs refuse these too
            "spaces": (lines + [b"AAAA  1000"], ":1001: wanted a line"),
            "behind": (lines + [b"AAAA 1000 "], ":1001: wanted a line"),
        }
        for name, (content, message) in cases.items():
            path = self.write("cl100k_%s.tiktoken" % name, b"\n".join(content) + b"\n")
            self.assertIn(message, run("text", text, "--tokenizer", path, "--out", self.path("o"), status=1))
        path = self.write("tokenizer.json", '{"version": "1.0"}')
        self.assertIn("Hugging Face's", run("text", text, "--tokenizer", path, "--out", self.path("o"), status=1))
        self.assertIn("not built in", run("text", text, "--tokenizer", "gpt2", "--out", self.path("o"), status=1))

    def test_options(self):
        text = self.write("t.txt", "hello")
        for options, message in (
            (("--val-fraction", "2"), "wanted 0 up to"),
            (("--shard-tokens", "x"), "got 'x'"),
            (("--shard-tokens", "0"), "wanted 1 to"),
            (("--name", "a/b"), "wanted letters"),
            (("--name", ""), "--name '': wanted letters"),
            (("--name", "a_train"), "--name a_train: wanted no _train or _val"),
            (("--name", "a_val_b"), "--name a_val_b: wanted no _train"),
            (("--shard-toknes", "9"), "unrecognized arguments: --shard-toknes"),
            (("--shard", "9"), "unrecognized arguments: --shard"),
            (("--max-tokens", "0"), "wanted 1 or more"),
            (("--max-tokens", "1.5"), "got '1.5', wanted a whole number such as"),
            (("--max-tokens", "1" + 18 * "0"), "of at most 18 digits"),
            (("--seed", "1_000"), "got '1_000', wanted a whole number; "),
            (("--seed", "-1" + 18 * "0"), "wanted a whole number, of at most 18 digits"),
            (("--workers", "-1"), "got '-1', wanted a whole number of at least 0"),
            (("--val-fraction", "nan"), "got 'nan', wanted a number"),
            (("--save-seconds", "1e400"), "got '1e400', wanted a number of at least 0"),
            (("--text-field", ""), 'wanted the name of the field'),
        ):
            shown = run("text", text, "--out", self.path("o"), *options, status=1)
            self.assertIn(message, shown)
            self.assertEqual(shown.count("\n"), 1, shown)
        for options in (("--max-files", "1"), ("--max-bytes", "9"), ("--repo", "a/b")):  # all inputs were taken
            shown = run("slimpajama", text, "--out", self.path("o"), *options, status=1)
            self.assertIn(options[0] + ": wanted --download beside it", shown)
        # what NAME is made of
        for name, made in (("a b", "a_b"), ("\u00e9t\u00e9", "t_"), ("\u4e2d", "text"), ("2024-11_x", "2024-11_x"),
                           ("wiki_train", "wiki-train"), ("a_val_b", "a-val_b"), ("_train", "train"),
                           ("x_training", "x_training")):
            out = self.path("o " + made)
            run("text", self.write(name + ".txt", "hello\n" * 99), "--out", out)
            self.assertTrue(os.path.exists(os.path.join(out, made + "_train_000000.bin")), os.listdir(out))
        os.mkfifo(self.path("pipe"))
        self.assertIn("not a regular file", run("text", self.path("pipe"), "--out", self.path("o"), status=1))
        self.assertIn("no such file", run("text", self.path("none"), "--out", self.path("o"), status=1))
        self.assertIn("t.txt", run("text", text, "--out", text, status=1))


class Verify(Case):
    def test_every_damage_is_seen(self):
        run("text", self.write("a.txt", document(random.Random(1), 4000)), "--out", self.path("o"))
        path = self.path("o", "a_train_000000.bin")
        with open(path, "rb") as f:
            data = f.read()

        def damaged(at, value):
            return data[:at] + bytes([value]) + data[at + 1 :]

        for content, message in (
            (damaged(0, 1), "magic"),
            (damaged(8, data[8] ^ 1), "its header says"),
            (damaged(1100, data[1100] ^ 1), "crc32"),
            (damaged(1101, 9), "the vocabulary has 259"),
            (data[:-1], "its header says"),
            (data[:100], "a header of"),
            (damaged(16, data[16] ^ 1), "crc32"),
            (damaged(13, 2), "vocabulary"),
        ):
            with open(path, "wb") as f:
                f.write(content)
            self.assertIn(message, run("verify", self.path("o"), status=1))
        with open(path, "wb") as f:
            f.write(data)
        run("verify", self.path("o"))
        mask = self.path("o", "a_train_000000.mask")
        tokens = (len(data) - 1024) // 2
        with open(path, "wb") as f:
            f.write(damaged(20, 1))
        self.assertIn("a_train_000000.mask: No such file", run("verify", path, status=1))
        for content, message in (
            (b"\1" * (tokens - 1), "one for each of the %d tokens" % tokens),
            (b"\2" * tokens, "other than 0 and 1"),
            (b"\1\0" * (tokens // 2) + b"\1" * (tokens % 2), None),
        ):
            with open(mask, "wb") as f:
                f.write(content)
            self.assertIn(message or "1 shards good", run("verify", path, status=1 if message else 0))
        os.remove(mask)
        with open(path, "wb") as f:
            f.write(data)
        shutil.copy(path, self.path("o", "b_train_000000.bin"))
        self.assertIn("not in the manifest", run("verify", self.path("o"), status=1))
        os.remove(self.path("o", "b_train_000000.bin"))
        os.remove(path)
        self.assertIn("No such file", run("verify", self.path("o"), status=1))
        self.assertIn("manifest.json", run("verify", self.folder, status=1))


    def test_another_tokenizer_than_the_shards(self):
        """Its vocabulary was the manifest's by the message, and --pattern alone did nothing, without a word."""
        run("text", self.write("a.txt", document(random.Random(1), 4000)), "--out", self.path("o"))
        path = self.path("o", "a_train_000000.bin")
        said = "%s: made with a vocabulary of 259, --tokenizer toy has 32\n" % path
        for command in ("inspect", "verify"):
            self.assertIn(said, run(command, path, "--tokenizer", "toy", status=1))
            self.assertIn("--pattern: wanted --tokenizer", run(command, path, "--pattern", "gpt2", status=1))
        with open(path, "r+b") as f:
            f.seek(12)
            f.write(bytes(8))  # as llm.c's: no vocabulary, no checksum
        other = shutil.copy(path, self.path("b.bin"))
        run("verify", other, "--tokenizer", "bytes")
        shown = run("verify", other, "--tokenizer", "toy", status=1)
        self.assertIn("id 256 at token 0, the vocabulary has 32", shown)
        self.assertIn("largest id 257, NOT BELOW THE VOCABULARY, 32", run("inspect", other, "--tokenizer", "toy"))


class Restarts(Case):
    def job(self, name, documents, size):
        rng = random.Random(9)
        # then again, each behind its number: words by chance take time
        texts = [document(rng, size) for _ in range(min(documents, 500))]
        write_lines(self.path(name), [("%d %s" % (i, texts[i % 500]), rng.choice(DOMAINS)) for i in range(documents)])
        with open(self.path(name), "a") as f:
            f.write('{"text": 1}\n{broken\n')

    def test_a_crash_at_every_step_that_touches_the_disk(self):
        """A child dies (os._exit) before its n-th fsync, replace, remove, truncate or write of a shard's piece, for
        every n (without --full for every fifth)."""
        self.job("x.jsonl", 60, 400)
        options = ["slimpajama", self.path("x.jsonl"), "--save-seconds", "0", "--shard-tokens", "2000", "--workers",
                   "1", "--val-fraction", "0.1", "--out"]
        run(*options, self.path("whole"))
        wanted = digest(self.path("whole"))
        crashes = 0
        for n in range(1, 2000) if FULL else range(random.randrange(1, 6), 2000, 5):
            out = self.path("crash%d" % n)
            if not self.crash(options + [out], n):
                break
            crashes += 1
            self.assertEqual(self.crash(options + [out], 10**9), False)
            self.assertEqual(digest(out), wanted, "crash before step %d" % n)
            shutil.rmtree(out)
        self.assertTrue(20 < crashes < 1999, crashes)
        print("crashed at %d steps" % crashes)

    def crash(self, argv, n):
        """Runs prepare.py in a child that dies at step n. True if it died."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            left = [n]

            def counted(function):
                def wrapper(*args, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(77)
                    return function(*args, **kwargs)

                return wrapper

            for name in ("fsync", "replace", "remove", "truncate", "rmdir", "makedirs"):
                setattr(prepare.os, name, counted(getattr(os, name)))
            prepare.SetWriter.append = counted(prepare.SetWriter.append)
            prepare.SetWriter.finish_shard = counted(prepare.SetWriter.finish_shard)
            inputs.BLOCK = 5000
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.argv = ["prepare.py"] + argv
            try:
                status = prepare.main() or 0
            except BaseException:
                status = 1
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.assertIn(status, (0, 77))
        return status == 77

    def test_kill_9_at_random_moments(self):
        self.job("x.jsonl", 60000 if FULL else 6000, 1500)
        options = ["slimpajama", self.path("x.jsonl"), "--save-seconds", "0.1", "--shard-tokens", "300k", "--workers",
                   "2", "--out"]
        start = time.time()
        run(*options, self.path("whole"))
        spent, wanted = time.time() - start, digest(self.path("whole"))
        rng, kills, rounds = random.Random(), 0, 0
        while kills < (20 if FULL else 4):
            rounds += 1
            out = self.path("round%d" % rounds)
            for _ in range(3):  # then it is left alone: on a slow machine every kill may come before any progress
                child = subprocess.Popen(
                    [sys.executable, PREPARE, *options, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                try:
                    child.wait(timeout=rng.uniform(0, spent))
                    self.assertEqual(child.returncode, 0)
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    kills += 1
            run(*options, out)
            self.assertEqual(digest(out), wanted, "round %d" % rounds)
            shutil.rmtree(out)
        print("killed %d times in %d preparations of %.1f s" % (kills, rounds, spent))

    def stopped_in_the_middle(self, options):
        """A prepare.py that has saved its state at least once and is held by SIGSTOP before it is done."""
        child = subprocess.Popen([sys.executable, PREPARE, *options, "--save-seconds", "0"], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        out = options[options.index("--out") + 1]
        while not os.path.exists(os.path.join(out, ".slimpajama.partial", "state.json")):
            self.assertIsNone(child.poll(), "it ended before it could be stopped")
            time.sleep(0.002)
        child.send_signal(signal.SIGSTOP)
        self.assertFalse(os.path.exists(os.path.join(out, "manifest.json")))
        return child

    def test_sigterm_saves_and_says_so(self):
        self.job("x.jsonl", 20000, 1500)
        options = ["slimpajama", self.path("x.jsonl"), "--workers", "1", "--out"]
        child = self.stopped_in_the_middle(options + [self.path("o")])
        child.send_signal(signal.SIGTERM)
        child.send_signal(signal.SIGCONT)
        self.assertIn("goes on from here", child.communicate()[1])
        self.assertEqual(child.returncode, 1)
        self.assertIn("going on", run(*options, self.path("o")))
        run(*options, self.path("whole"))
        self.assertEqual(digest(self.path("o")), digest(self.path("whole")))

    def test_an_unfinished_one_of_other_options(self):
        self.job("x.jsonl", 20000, 1500)
        options = ["slimpajama", self.path("x.jsonl"), "--workers", "1", "--out", self.path("o")]
        child = self.stopped_in_the_middle(options)
        child.kill()
        child.wait()
        self.assertIn("unfinished preparation of other", run(*options, "--seed", "1", status=1))
        state = self.path("o", ".slimpajama.partial", "state.json")
        with open(state) as f:
            left_out = json.load(f)
        with open(state, "w") as f:
            json.dump(dict(left_out, bad=dict(left_out["bad"], counts={"empty document": 1})), f)
        self.assertIn("an earlier call left out 1 documents", run(*options, "--on-bad", "refuse", status=1))
        run(*options, "--seed", "1", "--overwrite")
        run(*options[:-1], self.path("p"), "--seed", "1")
        self.assertEqual(digest(self.path("o")), digest(self.path("p")))

    def test_two_at_once_are_refused(self):
        self.job("x.jsonl", 20000, 1500)
        options = ["slimpajama", self.path("x.jsonl"), "--workers", "1", "--out", self.path("o")]
        self.stopped_in_the_middle(options)
        self.assertIn("another prepare.py is at work", run(*options, status=1))

    def test_several_at_once_into_one_folder(self):
        """Each under its own name: none loses what another has written into the manifest."""
        names, out = ["n%d" % i for i in range(6)], self.path("o")
        text = self.write("a.txt", "some text\n" * 9)
        words = [sys.executable, PREPARE, "text", text, "--out", out, "--name"]
        children = [subprocess.Popen([*words, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    for name in names]
        self.assertEqual([child.wait() for child in children], [0] * 6)
        with open(os.path.join(out, "manifest.json")) as f:
            manifest = json.load(f)
        self.assertEqual((sorted(manifest["preparations"]), len(manifest["shards"])), (names, 12))
        self.assertEqual(sorted(n for n in os.listdir(out) if n.startswith(".")), [])


class Kinds(Case):
    """What an input may be besides what it should be: read rightly, or named with the rest read."""

    GOOD = b'{"text": "good"}\n'

    def read(self, *inputs, **more):
        """The documents that came out of a preparation with no validation, and what was said."""
        out = self.path("o%d" % len(os.listdir(self.folder)))
        options = more.pop("options", ())
        shown = run("text", *inputs, "--name", "t", "--val-fraction", "0", "--out", out, *options, **more)
        ids = set_tokens(out, "t", "train") if os.path.exists(out) else []
        starts = [i for i, n in enumerate(ids) if n == 256] + [len(ids)]
        return [bytes(ids[a + 1 : b - 1]) for a, b in zip(starts, starts[1:])], shown

    def test_a_folder_that_is_called_as_a_cache(self):
        """Is read, but for that of --download. Fields that are there are named where the wanted one is not."""
        os.makedirs(self.path("in", ".cache"))
        self.write("in/.cache/x.jsonl", self.GOOD)
        self.write("in/y.jsonl", b'{"body": "b", "title": "t"}\n' + self.GOOD)
        documents, shown = self.read(self.path("in"))
        self.assertEqual(documents, [b"good"] * 2)
        self.assertIn("y.jsonl:1: missing field: no text; there: body, title; skipped", shown)
        odd = self.write("odd.jsonl", b'{"text": "a", "year": 2020}\n{"text": "b", "year": "2021"}\n{"text": "c"}\n')
        _, shown = self.read(odd, options=("--domain-field", "year"))
        for words in ("odd.jsonl:1: field is not text: year is int, wanted a string", "odd.jsonl:3: missing field"):
            self.assertIn(words, shown)
        ends = self.write("cr.jsonl", self.GOOD.replace(b"\n", b"\r") * 2)
        _, shown = self.read(ends, self.path("in", "y.jsonl"))
        self.assertRegex(shown, r"cr.jsonl:1: broken JSON: .*; lines end in CR alone, wanted LF")
        inside = self.write("inside.jsonl", b'{"text": "a\rb"}\n' + self.GOOD)
        self.assertIn("inside.jsonl:1: broken JSON: Invalid control character at: line 1 column 12 (char 11); skipped",
                      self.read(inside)[1])
        self.write("in/.cache/lock", b"")
        self.assertEqual(self.read(self.path("in"))[0], [b"good"])
        shown = self.read(self.path("in", "y.jsonl"), options=["--text-field", "x"], status=1)[1]
        self.assertIn("no document could be used; --text-field", shown)

    def test_files_that_are_not_what_they_are_called_are_named(self):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 5\n" % 0
        text = "a text\nof lines\n" * 3
        cases = {
            "zero.jsonl": (b"", "0 bytes"),
            "zero.jsonl.gz": (b"", "0 bytes"),
            "space.jsonl": (b"\n \n\n", "no document"),
            "space.jsonl.gz": (gzip.compress(b"\n"), "no document"),
            "empty.json": (b"[]", "no document"),
            "zipped.jsonl": (gzip.compress(self.GOOD), "gzip data"),
            "twice.jsonl.gz": (gzip.compress(gzip.compress(self.GOOD)), "gzip data"),
            "plain.jsonl.gz": (self.GOOD, "wanted gz"),
            "page.jsonl.gz": (b"<html>403</html>", "wanted gz"),
            "pointer.jsonl": (pointer, "Git LFS pointer"),
            "pointer.jsonl.gz": (pointer, "Git LFS pointer"),
            "pointer.txt": (pointer, "Git LFS pointer"),
            "wide.txt": (text.encode("utf-16"), "UTF-16"),
            "wide.jsonl": (self.GOOD.decode().encode("utf-16"), "UTF-16"),
            "big.txt": (b"\xfe\xff" + text.encode("utf-16-be"), "UTF-16"),
            "unmarked.txt": (text.encode("utf-16-le"), "UTF-16"),
            "wider.txt": (text.encode("utf-32"), "UTF-32"),
            "paper.txt": (b"%PDF-1.7\n", "a PDF"),
            "archive.txt": (b"PK\3\4" + bytes(30), "zip archive"),
            "shard.txt": (struct.pack("<2i", 20240520, 1) + bytes(1016), "token shard"),
            "mark.txt": (b"\xef\xbb\xbf", "empty document"),
            "half.json": (b'[\n {"text": "x"},\n', "broken JSON"),
            "garbage.jsonl.gz": (gzip.compress(self.GOOD) + b"\0\0xyz", "truncated or damaged file"),
        }
        if zstandard:
            cases["zero.jsonl.zst"] = (b"", "0 bytes")
            cases["gz.jsonl.zst"] = (gzip.compress(self.GOOD), "gzip data, wanted zst")
        if pyarrow:
            cases["zero.parquet"] = (b"", "0 bytes")
            cases["pointer.parquet"] = (pointer, "Git LFS pointer")
            cases["lines.parquet"] = (self.GOOD, "wanted parquet")
            none = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), none)
            cases["none.parquet"] = (none.getvalue(), "no document")
        good = self.write("good.jsonl", self.GOOD)
        paths = [self.write(name, data) for name, (data, _) in cases.items()]
        documents, _ = self.read(good, *paths)
        self.assertEqual(documents.count(b"good"), 2)  # the one before the garbage was whole
        bad = next(os.path.join(w, n) for w, _, names in os.walk(self.folder) for n in names if n == "t.bad.jsonl")
        with open(bad) as f:
            said = [json.loads(line) for line in f]
        self.assertEqual(sorted(os.path.basename(entry["file"]) for entry in said), sorted(cases))
        for entry in said:
            self.assertIn(cases[os.path.basename(entry["file"])][1], entry["kind"] + ": " + entry["detail"], entry)

    def test_valid_input_of_an_unusual_form_is_read(self):
        lines = b'{"text": "one"}\n{"text": "two"}\n'
        deep = (
            b'{"meta": '
            + b"[" * 20000
            + b"]" * 20000
            + b', "text": "one"}\n{"a": '
            + b'{"b":' * 5000
            + b"1"
            + b"}" * 5000
        )
        cases = {
            "mark.jsonl": b"\xef\xbb\xbf" + lines,
            "marks.jsonl": lines[:16] + b"\xef\xbb\xbf" + lines[16:],
            "mark.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + lines),
            "dos.jsonl": lines.replace(b"\n", b"\r\n"),
            "array.json": b'[\n {"text": "one"},\n {"text":\n "two"}]\n',
            "row.jsonl": b'[{"text": "one"}, {"text": "two"}]',
            "array.json.gz": gzip.compress(b'\xef\xbb\xbf[{"text": "one"},{"text": "two"}]'),
            "pretty.jsonl": b'{\n  "text": "one"\n}\n{\n  "text": "two"\n}\n',
            "zeros.jsonl.gz": gzip.compress(lines) + bytes(300000),
            "between.jsonl.gz": gzip.compress(lines[:16]) + bytes(512) + gzip.compress(lines[16:]),
            "long.jsonl": b'{"n": %s, "text": "one"}\n{"text": "two", "n": -%s.5e3}' % (b"9" * 9000, b"8" * 5000),
            "deep.jsonl": deep + b', "text": "two"}\n',
            "deep.json": b"[" + deep.replace(b"\n", b",") + b', "text": "two"}]',
        }
        if zstandard:
            squeeze = zstandard.ZstdCompressor().compress
            cases["skip.jsonl.zst"] = b"\x50\x2a\x4d\x18\4\0\0\0abcd" + squeeze(lines[:16]) + squeeze(lines[16:])
            cases["array.json.zst"] = squeeze(b'[{"text": "one"},{"text": "two"}]')
        for name, data in cases.items():
            documents, shown = self.read(self.write(name, data))
            self.assertEqual(documents, [b"one", b"two"], name)
            self.assertNotIn("skipped", shown, name)
        documents, shown = self.read(self.write("mixed.jsonl", b'[1]\n{"text": "x"}\n'))
        self.assertEqual(documents, [b"x"])
        self.assertIn("mixed.jsonl:1: broken JSON: list", shown)
        documents, _ = self.read(self.write("mark.txt", b"\xef\xbb\xbfHello\n\xef\xbb\xbf"))
        self.assertEqual(documents, [b"Hello\n\xef\xbb\xbf"])

    def test_the_patient_reader_of_json_is_json(self):
        rng = random.Random(3)

        def value(depth):
            kind = rng.randrange(7 if depth < 5 else 5)
            if kind == 5:
                return [value(depth + 1) for _ in range(rng.randrange(4))]
            if kind == 6:
                return {rng.choice('ab\u00e9"\\') * rng.randrange(3): value(depth + 1) for _ in range(rng.randrange(4))}
            return rng.choice([None, True, False, 'x\n"\\\u4e2d', "", "[{,:", 0, -17, 2.5, 1e300])

        for _ in range(2000):
            x = value(0)
            text = json.dumps(x, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
            self.assertEqual(repr(inputs.patient_decode(text, 0)), repr((x, len(text))))
            at = rng.randrange(len(text))
            broken = text[:at] + rng.choice('[]{},:"x1') + text[at + rng.randrange(2) :]
            try:
                end = json.JSONDecoder().raw_decode(broken)[1]
            except ValueError:
                self.assertRaises(ValueError, inputs.patient_decode, broken, 0)
            else:
                self.assertEqual(inputs.patient_decode(broken, 0)[1], end)

    def test_what_is_no_text_is_none_beside_deep_json(self):
        """Numbers and null became texts where only the patient reader gets through."""
        deep, digits = "[" * 3000 + "]" * 3000, "1" * 5000
        lines = ['{"text": null, "d": %s}' % deep, '{"text": 17, "d": %s}' % deep, '{"text": %s}' % digits,
                 '{"text": true, "d": %s}' % digits, '{"text": "good", "d": %s}' % deep]
        documents, shown = self.read(self.write("deep.jsonl", "\n".join(lines)))
        self.assertEqual(documents, [b"good"])
        for line, kind in ((1, "NoneType"), (2, "int"), (3, "float"), (4, "bool")):
            self.assertIn("deep.jsonl:%d: field is not text: text is %s, wanted a string" % (line, kind), shown)

    def test_an_input_that_changes_while_it_is_read(self):
        """A text that became shorter was waited for forever; a download that went on was a truncated file."""
        for name, data in (("long.txt", b"a line\n" * 4000), ("a.jsonl", self.GOOD * 4000)):
            for less in (True, False):
                path, out, worked = self.write(name, data), self.path("o %s %d" % (name, less)), worker.Worker.run

                def change(worker, task):
                    if os.path.getsize(path) == len(data):
                        self.write(name, data[: len(data) // 2] if less else data + data)
                    return worked(worker, task)

                with unittest.mock.patch.object(worker.Worker, "run", change), unittest.mock.patch.multiple(
                    inputs, SEGMENT=1000, BLOCK=1000
                ):
                    shown = run("text", path, "--val-fraction", 0, "--out", out, status=1)
                self.assertIn("%s: changed while it was read; --overwrite" % path, shown)
                self.assertIn("of other inputs", run("text", path, "--val-fraction", 0, "--out", out, status=1))
                run("text", path, "--val-fraction", 0, "--out", out, "--overwrite")

    def test_a_long_line_takes_time_in_proportion(self):
        def seconds(size):
            path = self.write("long.jsonl.gz", gzip.compress(b'{"text": "' + b"a" * size + b'"}\n', 1))
            entry = {"path": path, "kind": "lines.gz"}
            start = time.process_time()
            tasks = list(inputs.line_tasks(0, entry, {"offset": 0, "line": 0}, lambda n: None))
            self.assertEqual(sum(len(task[4]) for task, _ in tasks), size + 13)
            return time.process_time() - start

        small, large = seconds(8 << 20), seconds(160 << 20)
        self.assertTrue(large < 50 * small + 0.5, (small, large))

    def test_a_key_that_occurs_twice(self):
        """Which text is meant? Elsewhere in the record it does no harm, nor does a value that reads like the key."""
        lines = (b'{"text": "one", "text": "two"}\n', b'{"type": "text", "text": "good", "x": 1, "x": 2}\n',
                 b'{"m": {"text": "other"}, "text": "well"}\n', b'{"m": {"n": "a", "n": "b"}, "text": "x"}\n')
        path = self.write("twice.jsonl", b"".join(lines))
        documents, shown = self.read(path)
        self.assertEqual(documents, [b"good", b"well", b"x"])
        self.assertIn("twice.jsonl:1: broken JSON: the key text occurs twice", shown)
        shown = run("text", path, "--text-field", "m.n", "--out", self.path("none"), status=1)
        self.assertIn("twice.jsonl:4: broken JSON: the key n occurs twice", shown)

    def test_a_key_that_occurs_twice_spelt_otherwise(self):
        """With an escape, in a name with an accent, in JSON inside of a string, and where only the patient reader gets
        through: as plainly as above."""
        deep, digits = b"[" * 3000 + b"]" * 3000, b"1" * 5000
        lines = (b'{"text": "one", "te\\u0078t": "two"}\n', b'{"te\\u0078t": "two", "text": "one"}\n',
                 b'{"te\\u0078t": "one spelling"}\n', b'{"text": "with \\u0074 and \\u00e9"}\n',
                 b'{"text": "deep", "d": %s, "\\u0074ext": "two"}\n' % deep,
                 b'{"text": "long", "d": %s, "t\\u0065xt": "two"}\n' % digits,
                 b'{"text": "it says \\"text\\"", "a": ["text"], "d": %s}\n' % digits)
        documents, shown = self.read(self.write("spelt.jsonl", b"".join(lines)))
        self.assertEqual(documents, [b"one spelling", b"with t and \xc3\xa9", b'it says "text"'])
        for line in (1, 2, 5, 6):
            self.assertIn("spelt.jsonl:%d: broken JSON: the key text occurs twice" % line, shown)
        accents = (b'{"\xc3\xa9t\xc3\xa9": "one", "\xc3\xa9t\xc3\xa9": "two"}\n',
                   b'{"\xc3\xa9t\xc3\xa9": "one", "\\u00E9t\\u00e9": "two"}\n',
                   b'{"\xc3\xa9t\xc3\xa9": "good"}\n')
        path = self.write("accents.jsonl", b"".join(accents))
        shown = run("text", path, "--text-field", "\u00e9t\u00e9", "--out", self.path("accents"))
        for line in (1, 2):
            self.assertIn("accents.jsonl:%d: broken JSON: the key \u00e9t\u00e9 occurs twice" % line, shown)
        inside = self.write("inside.jsonl", b'{"m": "{\\"n\\": \\"a\\", \\"n\\": \\"b\\"}"}\n'
                                            b'{"m": "{\\"n\\": \\"a\\"}"}\n')
        shown = run("text", inside, "--text-field", "m.n", "--out", self.path("inside"))
        self.assertIn("inside.jsonl:1: broken JSON: in m.n: the key n occurs twice", shown)

    def test_what_is_there_twice_is_said(self):
        path = self.write("once.jsonl", b'{"text": "a", "m.n": "flat", "m": {"n": "nested"}}\n'
                                        b'{"m.n": "good", "m": 1}\n')
        self.assertIn("named twice; taken once", run("text", path, path, "--out", self.path("once")))
        shown = run("text", path, "--text-field", "m.n", "--out", self.path("flat"))
        self.assertIn("once.jsonl:1: ambiguous field: m.n is there flat and nested", shown)

    def test_a_manifest_with_a_key_twice(self):
        path = self.write("in.txt", b"some text\n")
        run("text", path, "--out", self.path("made"))
        manifest = self.path("made/manifest.json")
        with open(manifest) as f:
            text = f.read()
        with open(manifest, "w") as f:
            f.write(text.replace('"shards"', '"shards": {}, "sh\\u0061rds"', 1))
        shown = run("text", path, "--name", "more", "--out", self.path("made"), status=1)
        self.assertIn("not a manifest of prepare.py: the key shards occurs twice", shown)

    def test_manifests_that_lack_something(self):
        path, made = self.write("in.txt", b"some text\n" * 9), self.path("made")
        run("text", path, "--out", made)
        with open(self.path("made/manifest.json")) as f:
            good = json.load(f)
        for part, entry, key in (("preparations", "in", "tokenizer"), ("preparations", "in", "sets"),
                                 ("shards", "in_train_000000.bin", "crc32"), ("shards", "in_val_000000.bin", None)):
            bad = json.loads(json.dumps(good))
            if key:
                del bad[part][entry][key]
            else:
                bad[part][entry] = 3
            self.write("made/manifest.json", json.dumps(bad))
            for words in (("text", path, "--out", made), ("verify", made), ("inspect", made + "/in_val_000000.bin")):
                shown = run(*words, status=1)
                self.assertIn("manifest.json: not a manifest of prepare.py\n", shown)
                self.assertEqual(shown.count("\n"), 1, shown)

    def test_links(self):
        self.write("tree/a.jsonl", self.GOOD)
        self.write("elsewhere/b.jsonl", b'{"text": "far"}\n')
        os.symlink(self.path("elsewhere"), self.path("tree", "link"))
        os.symlink(self.path("tree"), self.path("tree", "loop"))
        os.symlink(self.path("tree", "a.jsonl"), self.path("tree", "same.jsonl"))
        os.symlink(self.path("elsewhere"), self.path("tree", "twin"))
        documents, shown = self.read(self.path("tree"))
        self.assertEqual(sorted(documents), [b"far", b"good"])
        os.link(self.path("tree", "a.jsonl"), self.path("tree", "second_name.jsonl"))
        documents, shown = self.read(self.path("tree"))
        self.assertEqual(sorted(documents), [b"far", b"good"])
        for name in ("loop: the same folder", "twin: the same folder", "same.jsonl: the same file",
                     "second_name.jsonl: the same file"):
            self.assertIn(name, shown)
        documents, _ = self.read(self.path("tree", "l*k"))  # a glob that matches a folder
        self.assertEqual(documents, [b"far"])
        os.symlink(self.path("gone"), self.path("tree", "broken.jsonl"))
        self.assertIn("broken.jsonl: a link", run("text", self.path("tree"), "--out", self.path("x"), status=1))
        self.write("br[1]/a.jsonl", self.GOOD)
        self.assertEqual(self.read(self.path("br[1]", "*.jsonl"))[0], [b"good"])
        self.write("notes/readme.md", b"x")
        self.write("notes/a.txt", b"x")
        self.assertIn("left out: 1 .md", self.read(self.path("notes"))[1])

    @unittest.skipUnless(os.geteuid() == 0, "needs to become another user")
    def test_what_may_not_be_read_or_written_is_named(self):
        self.write("tree/a.jsonl", self.GOOD)
        self.write("tree/closed/b.jsonl", self.GOOD)
        os.chmod(self.folder, 0o755)
        os.chmod(self.path("tree", "closed"), 0)
        os.mkdir(self.path("o"), 0o777)
        os.chmod(self.path("o"), 0o777)
        other = {"preexec_fn": lambda: os.setuid(65534), "status": 1, "python": ("/usr/bin/python3", "-B")}
        try:
            subprocess.run(["/usr/bin/python3", PREPARE, "--help"], check=True, preexec_fn=other["preexec_fn"],
                           stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            self.skipTest("another user may not run prepare.py")
        shown = run("text", self.path("tree"), "--out", self.path("o"), **other)
        self.assertIn("closed: Permission denied", shown)
        os.chmod(self.path("tree", "closed"), 0o755)
        os.chmod(self.path("tree", "closed", "b.jsonl"), 0)
        shown = run("text", self.path("tree"), "--out", self.path("o"), **other)
        self.assertIn("b.jsonl: Permission denied", shown)
        os.chmod(self.path("o"), 0o555)
        shown = run("text", self.path("tree", "a.jsonl"), "--out", self.path("o"), **other)
        self.assertIn("Permission denied", shown)
        self.assertEqual(shown.count("\n"), 1, shown)

    def test_domains_that_look_alike_stay_apart(self):
        domains = ["C", "C++", "C#", "c", "\u4e2d\u6587", "\u0440\u0443\u0441\u0441\u043a\u0438\u0439", "a b", "a-b",
                   "a/b", "en", "EN", "text"]
        rows = [json.dumps({"text": "of %d" % i, "lang": d}) for i, d in enumerate(domains) for _ in range(3)]
        random.Random(1).shuffle(rows)
        lines, loose = self.write("x.jsonl", "\n".join(rows)), self.write("loose.txt", "no field")
        options = ("--domain-field", "lang", "--val-fraction", "0")
        shown = run("text", lines, loose, *options, "--out", self.path("o"))
        run("text", lines, loose, *options, "--out", self.path("p"), "--workers", "2")
        self.assertEqual(digest(self.path("o")), digest(self.path("p")))
        self.assertIn("loose.txt:1: missing field", shown)
        with open(self.path("o", "manifest.json")) as f:
            preparation = json.load(f)["preparations"]["text"]
        self.assertEqual(sorted(preparation["domains"].values()), sorted(domains))
        for name, domain in preparation["domains"].items():
            ids = set_tokens(self.path("o"), name, "train")
            self.assertEqual(bytes(n for n in ids if n < 256), (b"of %d" % domains.index(domain)) * 3)
        self.assertIn("text", preparation["domains"])
        self.assertIn("12 shards good", run("verify", self.path("o")))

    def test_own_output_is_no_input(self):
        for out in ("in/shards", "in"):
            shutil.rmtree(self.path("in"), ignore_errors=True)
            self.write("in/a.jsonl", self.GOOD * 30 + b"broken\n")
            self.write("in/manifest.d/manifest.json", b'{"text": "of another program"}')
            for _ in range(2):
                shown = run("text", self.path("in"), "--name", "t", "--out", self.path(out))
                self.assertIn("left out: 1 broken JSON", shown)
            self.assertIn("complete already", shown)
            shown = run(
                "text", self.path("in"), "--name", "u", "--tokenizer", "bytes", "--out", self.path("v"), "--overwrite"
            )
            self.assertIn("that prepare.py has written are left out", shown)
        shown = run("text", *map(self.path, ("in/a.jsonl", "in/manifest.json", "in/t_train_000000.bin")), "--out",
                    self.path("w"))
        self.assertIn("2 files that prepare.py has written", shown)
        self.assertIn("nothing there but", run("text", self.path("in", "t_*.bin"), "--out", self.path("x"), status=1))

    def test_splits_by_folders(self):
        def lines(word):
            rows = [{"text": "%s %d" % (word, i), "meta": {"redpajama_set_name": "RedPajamaC4"}} for i in range(40)]
            return "\n".join(map(json.dumps, rows))

        for name in ("train", "validation", "test"):
            self.write("sp/%s/chunk1/x.jsonl" % name, lines(name))
            self.write("flat/data/%s-00000-of-1.jsonl" % name, lines(name))

        def words(out, split):
            ids = set_tokens(self.path(out), "c4", split)
            return {w for w in ("train", "validation", "test") if w.encode() in bytes(n for n in ids if n < 256)}

        for i, item in enumerate(("sp", "flat", "sp/*", "sp/*/chunk1/*")):
            shown = run("slimpajama", self.path(item), "--out", self.path("o%d" % i))
            self.assertEqual((words("o%d" % i, "train"), words("o%d" % i, "val")), ({"train"}, {"validation"}), item)
            self.assertIn("1 files of the test split are left out", shown)
        self.assertIn("complete already", run("slimpajama", self.path("sp/*/chunk1/*"), "--out", self.path("o3")))
        shown = run("slimpajama", self.path("sp"), "--val-fraction", "0", "--out", self.path("z"))
        self.assertIn("--val-fraction 0 does nothing: folders", shown)
        self.assertEqual(words("z", "val"), {"validation"})
        shown = run("slimpajama", self.path("sp"), "--split", "hash", "--val-fraction", "0.5", "--out", self.path("h"))
        self.assertNotIn("--val-fraction", shown)
        self.assertEqual(words("h", "train"), {"train", "validation", "test"})
        run("slimpajama", self.path("sp", "train"), "--val-fraction", "0.5", "--out", self.path("t"))
        self.assertEqual((words("t", "train"), words("t", "val")), ({"train"}, {"train"}))
        run("slimpajama", self.path("sp", "validation"), "--out", self.path("v"))
        self.assertEqual((words("v", "train"), words("v", "val")), (set(), {"validation"}))
        self.assertIn("--split hash", run("slimpajama", self.path("sp", "test"), "--out", self.path("x"), status=1))
        run("text", self.path("sp"), "--out", self.path("all"))  # of any other text a folder's name says nothing
        self.assertEqual(
            len([n for s in ("train", "val") for n in set_tokens(self.path("all"), "text", s) if n == 256]), 120
        )

    def test_max_tokens(self):
        rng = random.Random(1)
        for i in range(6):
            write_lines(self.path("%d.jsonl" % i), [(document(rng, 900), None) for _ in range(2000)], meta=False)
        sizes = {}
        for n, workers in ((100000, 1), (100000, 2), (3000000, 1), (100000000, 1)):
            out = self.path("o%d_%d" % (n, workers))
            run("text", self.path("*.jsonl"), "--max-tokens", n, "--workers", workers, "--out", out)
            sizes[n] = sum(shard_tokens(os.path.join(out, f))[1][2] for f in os.listdir(out) if f.endswith(".bin"))
        self.assertEqual(digest(self.path("o100000_1")), digest(self.path("o100000_2")))
        self.assertTrue(
            100000 <= sizes[100000] < 1200000 and 3000000 <= sizes[3000000] < 4200000 < sizes[100000000], sizes
        )
        for n, said in ((sizes[100000000], "stopped after the block of documents that reached"),
                        (sizes[100000000] + 1, "all documents have fewer than")):
            shown = run("text", self.path("*.jsonl"), "--max-tokens", n, "--overwrite", "--out", out)
            self.assertIn("--max-tokens %d: %s %d\n" % (n, said, n), shown)
        self.write("a.txt", "x" * 500), self.write("b.txt", "y" * 500)
        run("text", self.path("a.txt"), self.path("b.txt"), "--max-tokens", "10", "--val-fraction", "0", "--out",
            self.path("t"))
        self.assertEqual(set_tokens(self.path("t"), "text", "train"), [256] + [120] * 500 + [257])


class Systems(Case):
    """Machines and terminals that are not as one's own."""

    def python(self, code, *args, **more):
        """prepare.py in a Python in which `code` was run before."""
        start = "import errno, fcntl, os, sys\nsys.path.insert(0, %r)\n%s\nimport prepare\n"
        start += "prepare.run_program(prepare.main)\n"
        command = [sys.executable, "-c", start % (os.path.dirname(PREPARE), code), *map(str, args)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, **more)

    def test_file_systems_without_locks_and_folders_that_cannot_be_synced(self):
        refusing = "def f(*a): raise OSError(errno.%s, os.strerror(errno.%s))\n"
        folder = "import stat\nreal = os.fsync\n"
        folder += "def g(fd):\n    f() if stat.S_ISDIR(os.fstat(fd).st_mode) else real(fd)\n"
        text = self.write("a.txt", "hello\n" * 50)
        for i, (code, status, words) in enumerate(
            (
                (refusing % ("ENOSYS", "ENOSYS") + "fcntl.flock = f", 0, "has no locks"),
                (refusing % ("ENOTSUP", "ENOTSUP") + "fcntl.flock = f", 0, "has no locks"),
                (refusing % ("ENOLCK", "ENOLCK") + "fcntl.flock = f", 0, "has no locks"),
                (refusing % ("EWOULDBLOCK", "EWOULDBLOCK") + "fcntl.flock = f", 1, "another prepare.py"),
                (refusing % ("EINVAL", "EINVAL") + folder + "os.fsync = g", 0, "set"),
                (refusing % ("ENOTSUP", "ENOTSUP") + folder + "os.fsync = g", 0, "set"),
                (refusing % ("EBADF", "EBADF") + folder + "os.fsync = g", 0, "set"),
                (refusing % ("EIO", "EIO") + folder + "os.fsync = g", 1, "Input/output error"),
                (refusing % ("ENOSPC", "ENOSPC") + "os.fsync = f", 1, "No space left"),
            )
        ):
            done = self.python(code, "text", text, "--out", self.path("o%d" % i))
            self.assertEqual(done.returncode, status, (code, done.stdout))
            self.assertIn(words, done.stdout)
            self.assertNotIn("Traceback", done.stdout)

    def test_a_disk_that_fails_while_publishing(self):
        """os.path.exists takes an error for a file that is not there: the list of bad documents was left out."""
        text = self.write("a.jsonl", '{"text": "hello"}\nno json\n' * 20)
        failing = (
            "real = os.stat\ndef f(path, *a, **k):\n    if str(path).endswith('bad.jsonl'): raise OSError(errno.EIO, "
            "'failed')\n"
            "    return real(path, *a, **k)\nos.stat = f"
        )
        done = self.python(failing, "text", text, "--name", "a", "--out", self.path("o"))
        self.assertEqual(done.returncode, 0, done.stdout)
        with open(self.path("o/a.bad.jsonl")) as f:
            self.assertEqual(len(f.readlines()), 20)

    def test_closed_descriptors(self):
        text = self.write("a.txt", "hello\n" * 50)
        for closed in ((0,), (1,), (2,), (0, 1, 2), (1, 2)):
            out = self.path("o%s" % "".join(map(str, closed)))
            command = [sys.executable, PREPARE, "text", text, "--out", out, "--workers", "2"]
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            done = subprocess.run(command, preexec_fn=lambda: [os.close(fd) for fd in closed], **streams)
            self.assertEqual(done.returncode, 0, closed)
            self.assertEqual(digest(out), digest(self.path("o0")))

    def test_terminals_without_utf8(self):
        text = self.write("a.txt", "na\u00efve \u4e2d\u6587 \U0001f600\n" * 50)
        for i, environment in enumerate(
            (
                {"PYTHONIOENCODING": "ascii"},
                {"PYTHONIOENCODING": "latin-1"},
                {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            )
        ):
            out = self.path("o%d" % i)
            run("text", text, "--out", out, environment=environment)
            self.assertIn("\\u4e2d", run("inspect", os.path.join(out, "a_train_000000.bin"), environment=environment))
            os.rename(text, self.path("\u4e2d.txt"))
            shown = run("text", self.path("\u4e2d.txt"), self.write("bad.jsonl", b"\xff\n{}"), "--out", out + "x",
                        environment=environment)
            self.assertIn("bad.jsonl:1", shown)
            os.rename(self.path("\u4e2d.txt"), text)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_an_output_on_a_full_disk(self):
        """The folder of --out was blamed, whose shards are whole; elsewhere it was a traceback."""
        text = self.write("a.txt", "hello\n" * 50)
        evals = os.path.join(ROOT, "data", "evals.py")
        passage = self.write("l.jsonl", '{"text": "He came back to the old house ."}')
        for command in ((PREPARE, "text", text, "--out", self.path("o")), (PREPARE, "verify", self.path("o")),
                        (PREPARE, "inspect", self.path("o", "a_train_000000.bin")),
                        (evals, "lambada", passage, "--out", self.path("l"))):
            with open("/dev/full", "w") as full:
                done = subprocess.run([sys.executable, *command], stdout=full, stderr=subprocess.PIPE, text=True)
            self.assertEqual((done.returncode, done.stderr.splitlines()[-1]),
                             (1, "%s: standard output: No space left on device" % os.path.basename(command[0])))
            self.assertNotIn("Traceback", done.stderr)

    def test_readers_that_go_away(self):
        run("text", self.write("a.txt", "hello\n" * 5000), "--out", self.path("o"))
        for command in (
            ("inspect", self.path("o", "a_train_000000.bin"), "--characters", "100000"),
            ("--help",),
            ("verify", self.path("o")),
            ("text", "--help"),
        ):
            read, write = os.pipe()
            os.close(read)
            done = subprocess.run([sys.executable, PREPARE, *command], stdout=write, stderr=subprocess.PIPE, text=True)
            os.close(write)
            self.assertEqual(done.stderr, "", command)
            self.assertIn(done.returncode, (0, 1) if "--help" in command else (1,), command)  # argparse passes over it

    def test_help(self):
        for script in ("prepare.py", "shards.py", "toy_task.py"):
            for words in (
                ((), ("text",), ("slimpajama",), ("inspect",), ("verify",)) if script == "prepare.py" else ((),)
            ):
                command = [sys.executable, os.path.join(ROOT, "data", script), *words, "--help"]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                self.assertEqual(done.returncode, 0, done.stdout)
                self.assertIn("usage:", done.stdout)

    def test_an_old_python_is_refused_by_one_line(self):
        """It was a traceback, in the midst of the work too."""
        code = "import runpy, sys; sys.version_info = (3, 8, 18); sys.argv = sys.argv[1:]; "
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        for script in ("data/prepare.py", "data/shards.py", "data/toy_task.py", "data/evals.py", "scripts/export.py",
                       "scripts/plot_run.py"):
            done = subprocess.run([sys.executable, "-c", code, os.path.join(ROOT, script), "--help"],
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            want = "%s: Python 3.8 runs it, wanted 3.9 or later\n" % os.path.basename(script)
            self.assertEqual((done.returncode, done.stdout), (1, want))

    def test_where_a_number_stands_without_numpy(self):
        """Python 3.9, RHEL 9's, has no array.index from a place on."""
        for code, numbers in (("H", [256, 1, 257, 257, 0, 257]), ("I", [1, 65536, 257, 257])):
            want = [i for i, n in enumerate(numbers) if n == 257]
            self.assertEqual(shards.places(array.array(code, numbers), 257), want)
            self.assertEqual(shards.places(array.array(code, numbers), 2), [])

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "needs sched_getaffinity")
    def test_workers_follow_the_affinity(self):
        one = min(os.sched_getaffinity(0))
        code = "os.sched_setaffinity(0, [%d]); import shards; print('cores', shards.cores())" % one
        self.assertIn("cores 1\n", self.python(code, "--help").stdout)

    def test_workers_follow_a_quota_of_time(self):
        """docker --cpus: the narrowest of the process's cgroups and those above them, in both versions of cgroups."""
        for i, (line, file, text, quota) in enumerate((
                ("0::/a/b", "sys/fs/cgroup/a/b/cpu.max", "150000 100000", 1.5),
                ("0::/a/b", "sys/fs/cgroup/cpu.max", "200000 100000", 2),  # a container's own is the uppermost
                ("0::/", "sys/fs/cgroup/cpu.max", "max 100000", float("inf")),
                ("4:cpu,cpuacct:/a", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "300000", 3),
                ("4:cpuacct,cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000", 3),
                ("4:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1", float("inf")),
                ("4:cpuset:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000", float("inf")))):
            root = "r%d/" % i
            self.write(root + "proc/self/cgroup", "7:pids:/x\n%s\n" % line)
            self.write(root + file, text + "\n")
            self.write(root + os.path.dirname(file) + "/cpu.cfs_period_us", "100000\n")
            self.assertEqual(shards.core_quota(self.path("r%d" % i)), quota, (line, file, text))
        self.assertEqual(shards.core_quota(self.path("nothing")), float("inf"))
        with unittest.mock.patch("shards.core_quota", return_value=0.5):
            self.assertEqual(shards.cores(), 1)


class Encoders(Case):
    """infer_mta and tiktoken give the same shards, and each rank file its own pattern."""

    PROGRAM = os.path.exists(os.path.join(BIN, "infer_mta"))

    def ranks(self, n, name):
        """A rank file of n tokens: the bytes, then made-up ones."""
        tokens = [bytes([i]) for i in range(256)] + [b"%06d" % i for i in range(n - 256)]
        lines = (b"%s %d\n" % (binascii.b2a_base64(token, newline=False), i) for i, token in enumerate(tokens[:n]))
        return self.write(name, b"".join(lines))

    @unittest.skipUnless(PROGRAM and tiktoken, "needs infer_mta and tiktoken")
    def test_the_same_shards_whatever_encodes(self):
        rng = random.Random(7)
        texts = [
            document(rng, rng.randrange(10, 3000))
            + rng.choice(["\u4f60\u597d ", "\U0001f600'LL", "  \n\n x", "<|endoftext|>", "\0"])
            for _ in range(300)
        ]
        write_lines(self.path("x.jsonl"), [(t, None) for t in texts], meta=False)
        self.write("long.txt", "".join(texts))
        gpt2 = os.path.join(os.path.dirname(RANKS), "gpt2.tiktoken")
        for ranks, pattern in ((RANKS, None), (RANKS, "llama3"), (RANKS, "o200k_base"), (gpt2, None)):
            tokenizer.read_ranks(ranks)  # here, for all copies of this process
            sums = []
            for i, more in enumerate((("infer_mta", "--workers", "1"), ("tiktoken",), ("infer_mta", "--workers", "2"))):
                out = self.path("o%d" % i)
                shutil.rmtree(out, ignore_errors=True)
                options = ("--tokenizer", ranks, *(("--pattern", pattern) if pattern else ()), "--encoder", *more,
                           "--out", out)
                run("text", self.path("x.jsonl"), self.path("long.txt"), *options)
                sums.append(digest(out))
            self.assertEqual(sums[0], sums[1])
            self.assertEqual(sums[0], sums[2])
        self.assertIn("0 things wrong", run("verify", self.path("o0")))

    @unittest.skipUnless(PROGRAM, "needs infer_mta")
    def test_with_infer_mta_the_standard_library_suffices(self):
        text = self.write("a.txt", "hello there\n" * 99)
        run("text", text, "--tokenizer", RANKS, "--out", self.path("o"), python=(sys.executable, "-I", "-S"))
        self.assertIn(
            "hello there", run("inspect", self.path("o", "a_train_000000.bin"), python=(sys.executable, "-I", "-S"))
        )

    def test_a_program_that_is_missing_old_or_dies(self):
        text = self.write("a.txt", "hello there\n" * 99)
        options = ("text", text, "--tokenizer", RANKS, "--out", self.path("o"))
        wanted = ("--encoder", "infer_mta")
        self.assertIn("is not there", run(*options, *wanted, status=1, environment={"MTA_BIN": self.path("none")}))
        fake = self.write("bin/infer_mta", "#!/bin/sh\n[ $1 = --help ] && echo usage\n")
        os.chmod(fake, 0o755)
        self.assertIn("earlier version", run(*options, *wanted, status=1, environment={"MTA_BIN": self.path("bin")}))
        self.write(
            "bin/infer_mta", "#!/bin/sh\n[ $1 = --help ] && echo --binary && exit 0\nhead -c 5 > /dev/null\nexit 3\n"
        )
        shown = run(*options, *wanted, status=1, environment={"MTA_BIN": self.path("bin")})
        self.assertIn("ended with status 3", shown)
        self.assertEqual(shown.count("\n"), 1, shown)
        shown = run(*options, *wanted, "--workers", "2", status=1, environment={"MTA_BIN": self.path("bin")})
        self.assertIn("ended with status 3", shown)

    def interrupted(self, begun, options, environment):
        """What is printed where Ctrl-C comes, to all of the terminal's processes, once the file `begun` is there."""
        child = subprocess.Popen([sys.executable, PREPARE, "text", *options, "--out", self.path("o")], text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                 env=dict(os.environ, **environment))
        end = time.monotonic() + 60
        while not os.path.exists(begun) and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(child.pid, signal.SIGINT)
        shown = child.communicate(timeout=60)[0]  # once its workers have ended, too
        self.assertEqual(child.returncode, 1, shown)
        return shown

    def test_ctrl_c_is_one_line(self):
        """infer_mta complained of a broken pipe, and workers that had just been started of KeyboardInterrupt."""
        said, begun = "prepare.py: interrupted; the same command goes on from here\n", self.path("begun")
        lines = self.write("a.jsonl", '{"text": "hello"}\n' * 9)
        fake = self.write("bin/infer_mta", """#!%s
import sys, time
if "--help" in sys.argv:
    sys.exit(print("--binary"))
sys.stdin.buffer.read(8)
open(%r, "w").close()
time.sleep(1)
try:
    sys.stdout.buffer.write(bytes(36)), sys.stdout.flush()
except BrokenPipeError:
    sys.stderr.write("infer_mta: standard output: Broken pipe\\n")
""" % (sys.executable, begun))
        os.chmod(fake, 0o755)
        options = [lines, "--tokenizer", RANKS, "--workers", "1"]
        self.assertEqual(self.interrupted(begun, options, {"MTA_BIN": self.path("bin")}), said)
        begun = self.path("begun 2")
        self.write("start/sitecustomize.py", """import time
if b"--multiprocessing-fork" in open("/proc/self/cmdline", "rb").read():
    open(%r, "w").close()
    time.sleep(1)
""" % begun)
        shown = self.interrupted(begun, [lines, "--workers", "2", "--name", "two"], {"PYTHONPATH": self.path("start")})
        self.assertEqual(shown, said)

    def test_the_number_of_ranks_tells_the_pattern(self):
        for n, pattern in tokenizer.PATTERN_OF_RANKS.items():
            ranks = tokenizer.read_ranks(self.ranks(n, "%d.tiktoken" % n))
            other = "gpt2" if pattern != "gpt2" else "Llama-3"
            words = "%d ranks as %s has them, but its name says %s" % (n, pattern, other.lower().replace("-", ""))
            with unittest.mock.patch("tokenizer.read_ranks", return_value=ranks):  # read once, under all names
                self.assertEqual(tokenizer.pattern_of("tokenizer.model"), pattern)
                with self.assertRaisesRegex(tokenizer.UserError, words):
                    tokenizer.pattern_of(other + ".tiktoken")
                self.assertEqual(tokenizer.pattern_of(other + ".tiktoken", "llama3"), "llama3")
        for name in ("tokenizer.model", "cl100k_base.tiktoken"):
            with self.assertRaisesRegex(tokenizer.UserError, "1000 ranks, which no known tokenizer has; add --pattern"):
                tokenizer.pattern_of(self.ranks(1000, name))

    def test_other_files_are_named_for_what_they_are(self):
        text = self.write("t.txt", "hello")
        piece = b"<unk>"
        model = b"\n" + bytes([len(piece) + 9]) + b"\n" + bytes([len(piece)]) + piece + b"\x15\0\0\0\0\x18\2"
        for data, words in (
            (model, "SentencePiece"),
            (model.replace(b"<unk>", b"<pad>"), "SentencePiece"),
            (b'\n {"version": "1.0"}', "tokenizer.json"),
            (b'\xef\xbb\xbf{"version": "1.0"}', "tokenizer.json"),
            (b"#version: 0.2\nt h\n", "merges"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
            (b"<!DOCTYPE html>", "HTML"),
            (b"", "empty"),
            (b"a\tb\n", ":1: wanted a line"),
        ):
            shown = run(
                "text", text, "--tokenizer", self.write("tokenizer.model", data), "--out", self.path("o"), status=1
            )
            self.assertIn(words, shown)
            self.assertEqual(shown.count("\n"), 1, shown)

    @unittest.skipUnless(PROGRAM or tiktoken, "needs infer_mta or tiktoken")
    def test_a_rank_file_that_was_there_is_not_overwritten(self):
        """The copy is called by the pattern, as a file of the user's may be."""
        text, mine = self.write("t.txt", "hello there\n" * 9), self.ranks(2000, "o/llama3.tiktoken")
        options = ("--tokenizer", self.ranks(1000, "mine.model"), "--pattern", "llama3", "--out", self.path("o"))
        before = digest(self.path("o"))
        shown = run("text", text, *options, status=1)
        self.assertIn("o/llama3.tiktoken is another rank file", shown)
        self.assertEqual(digest(self.path("o"))["llama3.tiktoken"], before["llama3.tiktoken"])
        os.rename(mine, self.path("llama3.tiktoken"))
        run("text", text, *options)
        self.ranks(1500, "mine.model")
        run("text", text, *options, "--overwrite")  # its own copy may be another one
        self.assertIn("things wrong", run("verify", self.path("o")))

    def test_each_preparation_keeps_its_own_rank_file_and_the_folder_moves(self):
        text = self.write("t.txt", "hello there\n" * 99)
        for i, n in enumerate((1000, 2000, 3000)):
            options = ("--tokenizer", self.ranks(n, "mine.model"), "--pattern", "llama3", "--name", "p%d" % i)
            run("text", text, *options, "--out", self.path("o"))
        run("text", text, "--tokenizer", "bytes", "--name", "b", "--out", self.path("o"))
        os.remove(self.path("mine.model"))
        os.rename(self.path("o"), self.path("moved"))
        self.assertIn("8 shards good", run("verify", self.path("moved")))
        with open(self.path("moved", "manifest.json")) as f:
            preparations = json.load(f)["preparations"]
        for i, n in enumerate((1000, 2000, 3000)):
            t = preparations["p%d" % i]["tokenizer"]
            with open(self.path("moved", t["file"]), "rb") as f:
                data = f.read()
            self.assertEqual(
                (t["name"], t["vocab_size"], t["bytes"], int(t["crc32"], 16)),
                ("llama3", n + 256, len(data), zlib.crc32(data)),
            )
            shown = run("inspect", self.path("moved", "p%d_train_000000.bin" % i))
            self.assertIn("hello there", shown)
        self.assertNotIn("file", preparations["b"]["tokenizer"])


# ----------------------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face hub's protocol that a download needs, for server.files, misbehaving as server.faults
    says: {path: [what to do at each GET in turn]}."""

    def log_message(self, *args):
        pass

    def answer(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        return data

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        server.requests.append((self.command, path, self.headers.get("Range")))
        always = server.always.get(self.command + path.split("/")[1])
        if always:
            status, error = always if isinstance(always, tuple) else (always, {})
            return self.answer(status, **error)
        if path == "/api/datasets/%s/tree/main" % server.repo:
            return self.wfile.write(
                self.answer(200, json.dumps(self.listing()).encode(), Content_Type="application/json")
            )
        start = "/datasets/%s/resolve/main/" % server.repo
        name = path[len(start) :]
        if not path.startswith(start) or name not in server.files or name in server.missing:
            return self.answer(404, X_Error_Code="EntryNotFound" if path.startswith(start) else "RepoNotFound")
        data, faults = server.files[name], server.faults.get(name)
        known = {"ETag": '"%s"' % hashlib.sha256(data).hexdigest(), "X_Repo_Commit": "0" * 39 + "1"}
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in {"Content-Length": str(len(data)), "Accept-Ranges": "bytes", **known}.items():
                self.send_header(key.replace("_", "-"), value)
            return self.end_headers()
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return self.answer(fault)
        asked = self.headers.get("Range")
        begin = int(asked[len("bytes=") :].split("-")[0]) if asked else 0
        if asked:
            known["Content_Range"] = "bytes %d-%d/%d" % (begin, len(data) - 1, len(data))
        body = self.answer(206 if asked else 200, data[begin:], **known)
        if fault == "hang":
            self.wfile.write(body[: len(body) // 2])
            return server.go_on.wait(60)
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = True

    def listing(self):
        entries = [{"type": "directory", "path": "train", "oid": "0" * 40, "size": 0}]
        for name, data in sorted(self.server.files.items()):
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append({"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs})
        return entries


@unittest.skipUnless(hub, "needs huggingface_hub")
class Downloads(Case):
    @classmethod
    def setUpClass(cls):
        """One server for all: its address is read when the package is loaded, here for all copies of this process."""
        cls.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=cls.server.serve_forever, daemon=True).start()
        cls.addClassCleanup(cls.server.server_close)
        cls.addClassCleanup(cls.server.shutdown)
        home = tempfile.TemporaryDirectory(prefix="test_prepare_home_")
        cls.addClassCleanup(home.cleanup)
        os.environ.update(HF_ENDPOINT="http://127.0.0.1:%d" % cls.server.server_port, HF_HOME=home.name,
                          HF_HUB_DISABLE_TELEMETRY="1")
        hub.hf_hub_download, hub.HfApi  # names that load it

    def setUp(self):
        super().setUp()
        self.server.repo, self.server.files, self.server.faults, self.server.requests = "some/mirror", {}, {}, []
        self.server.missing, self.server.always = set(), {}  # always: {"GETapi": status, or with headers (status, {})}
        self.server.go_on = threading.Event()
        rng = random.Random(4)
        names = ["train/chunk%d/f%d.jsonl" % (i % 3, i) for i in range(6)] + [
            "validation/chunk1/v.jsonl",
            "test/chunk1/t.jsonl",
        ]
        for i, name in enumerate(names):
            documents = [(document(rng), DOMAINS[(i + j) % 7]) for j in range(30)]
            lines = (json.dumps({"text": t, "meta": {"redpajama_set_name": d}}) + "\n" for t, d in documents)
            self.server.files[name] = "".join(lines).encode()
        self.server.files["README.md"] = b"about"

    def download(self, *more, status=0):
        options = ("--download", self.path("d"), "--repo", "some/mirror", "--retry-pause", "0.05", *more)
        return run("slimpajama", *options, status=status)

    def wanted(self):
        return sorted(n for n in self.server.files if n.startswith(("train/", "validation/")))

    def there(self):
        found = [
            os.path.relpath(os.path.join(w, n), self.path("d"))
            for w, _, names in os.walk(self.path("d"))
            for n in names
        ]
        found = sorted(n for n in found if not n.startswith(".cache"))
        for name in found:
            with open(self.path("d", name), "rb") as f:
                self.assertEqual(f.read(), self.server.files[name], name)
        return found

    def test_faults_of_all_kinds(self):
        names = self.wanted()
        self.server.files[names[0]] += b" " * (24 << 20)  # the package writes 10 MB at a time
        self.server.faults = dict(zip(names, (["cut"], [503], ["corrupt"], ["cut", "corrupt"], [], [502, "cut"])))
        shown = self.download()
        self.assertEqual(self.there(), names)
        self.assertIn("sha256 is not the repository's", shown)
        self.assertTrue(
            [r for r in self.server.requests if r[1].endswith(names[0]) and r[2]],
            "a cut one goes on from its last byte",
        )
        self.assertIn("1 files of the test split are not fetched", shown)
        before = len(self.server.requests)
        self.download()
        self.assertEqual(len(self.server.requests), before + 1)  # the listing: all files are there

    def test_stopped_before_the_sha256_was_compared(self):
        """What has its name has been compared: at the next start its size is enough."""
        class Hub:
            @staticmethod
            def hf_hub_download(repo, name, repo_type, local_dir):
                os.makedirs(os.path.dirname(os.path.join(local_dir, name)))
                with open(os.path.join(local_dir, name), "w") as f:
                    f.write("damaged")

        args = argparse.Namespace(download=self.path("d"), repo="r", retries=0, retry_pause=0)
        with unittest.mock.patch.object(prepare.inputs, "file_sums", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt):
                prepare.inputs.fetch(Hub, args, "train/a.jsonl", 7, "0" * 64)
        self.assertEqual(self.there(), [])

    def test_a_sha256_that_is_never_right_ends(self):
        name = self.wanted()[0]
        self.server.faults = {name: ["corrupt"] * 1000}
        shown = self.download("--retries", "2", status=1)
        self.assertIn("%s: its sha256 is not the repository's, after 3 tries" % name, shown)
        self.assertEqual(len([r for r in self.server.requests if r[0] == "GET" and r[1].endswith(name)]), 3)
        self.assertEqual(self.there(), self.wanted()[1:])

    def test_errors_that_never_pass_end(self):
        name = self.wanted()[1]
        self.server.faults = {name: [503] * 1000}
        self.assertIn("1 of 7 files could not be downloaded", self.download("--retries", "1", status=1))
        self.assertTrue(len(self.server.requests) < 100, len(self.server.requests))
        self.server.faults = {}
        self.download()
        self.assertEqual(self.there(), self.wanted())

    def test_a_server_that_never_answers_rightly_ends(self):
        cases = [("GETapi", 401, "HF_TOKEN"), ("HEADdatasets", 403, "7 of 7 files")]
        if FULL:  # the package's own pauses: 47 s each
            cases += [("GETapi", 503, "503"), ("GETapi", 429, "429"), ("HEADdatasets", 429, "7 of 7 files")]
        for request, status, words in cases:
            self.server.always, self.server.requests = {request: status}, []
            start = time.time()
            shown = self.download("--retries", "1", status=1)
            self.assertIn(words, shown)
            self.assertNotIn("Traceback", shown)
            print("%s %d: %d requests in %.1f s" % (request, status, len(self.server.requests), time.time() - start))
            self.assertTrue(len(self.server.requests) < 300)
            self.assertEqual(self.there(), [])

    def test_reasons_are_told_in_one_line_and_at_once(self):
        """Of what no further try can change."""
        plain = {"X_Error_Message": "Invalid username or password."}  # what the hub says without a token
        to_log_in = dict(plain, X_Error_Code="RepoNotFound", X_Request_ID="Root=1-2")
        gated = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to dataset x is restricted. Ask at X."}
        missing = "it is not there, or wants a token in HF_TOKEN; --repo NAME takes another copy\n"
        listing, file = "GETapi", "HEADdatasets"
        for request, status, error, words in (
            (listing, 401, to_log_in, "some/mirror: 401 Client Error. Repository Not Found for url: "),
            (listing, 401, to_log_in, missing),
            (listing, 401, plain, missing),
            (listing, 401, {"X_Error_Message": "Invalid credentials in Authorization header"}, "is not valid\n"),
            (listing, 404, {"X_Error_Code": "RepoNotFound"}, "; --repo NAME takes another copy\n"),
            (listing, 403, {"X_Error_Message": "No access from here"}, "403 Forbidden: No access from here."),
            (file, 401, gated, "is restricted. Ask at X.; set HF_TOKEN"),
            (file, 403, gated, "is restricted. Ask at X.; set HF_TOKEN"),
            (file, 403, {"X_Error_Message": "No access from here"}, "403 Forbidden: No access from here."),
            (file, 410, {}, "410 Gone"),
        ):
            with self.subTest(request=request, status=status, words=words):
                self.server.always, self.server.requests = {request: (status, error)}, []
                shown = self.download(status=1)
                self.assertIn(words, shown)
                self.assertNotIn("trying again", shown)
                self.assertNotIn("Invalid username", shown)
                self.assertNotIn("Root=", shown)
                told = [line for line in shown.split("\n") if str(status) in line]
                self.assertEqual(len(told), 1 if request == listing else 7, shown)

    def test_the_original_is_gone(self):
        """The first line says what to type; a mirror may still have it."""
        no_repository = {"X_Error_Code": "RepoNotFound"}
        for answer in ((401, {}), (401, no_repository), (404, no_repository)):
            self.server.always = {"GETapi": answer}
            shown = run("slimpajama", "--download", self.path("d"), status=1)
            self.assertIn("add --repo gmongaras/SlimPajama-627B_Reupload", shown.split("\n")[0])
            self.assertEqual(shown.count("\n"), 1)
        self.server.always, self.server.repo = {}, inputs.REPOSITORY
        run("slimpajama", "--download", self.path("d"))
        self.assertEqual(self.there(), self.wanted())

    def test_offline_and_wrong_names_end_at_once(self):
        for environment, repo, words in (
            ({"HF_HUB_OFFLINE": "1"}, "some/mirror", "offline mode is enabled"),
            ({"HF_ENDPOINT": "localhost/x"}, "some/mirror", "http"),
            ({}, "a/b/c", "a/b/c"),
        ):
            shown = run("slimpajama", "--download", self.path("d"), "--repo", repo, "--retry-pause", "0.01", status=1,
                        environment=environment)
            self.assertIn(words, shown)
            self.assertEqual(shown.count("\n"), 1, shown)

    def test_a_copy_without_a_validation_split(self):
        self.server.files = {
            "data/train-%05d-of-00002.jsonl" % i: data for i, data in enumerate(list(self.server.files.values())[:2])
        }
        self.download("--out", self.path("o"), "--val-fraction", "0.3", "--tokenizer", "bytes")
        found = [n for n in os.listdir(self.path("d", "data"))]
        self.assertEqual(sorted("data/" + n for n in found), sorted(self.server.files))
        with open(self.path("o", "manifest.json")) as f:
            sets = json.load(f)["preparations"]["slimpajama"]["sets"].values()
        split = [sum(s.get(name, {"documents": 0})["documents"] for s in sets) for name in ("train", "val")]
        self.assertEqual(sum(split), 60)
        self.assertTrue(5 < split[1] < 40, split)

    def test_what_a_killed_one_left_is_removed_but_not_what_a_living_one_writes(self):
        def coming():
            return [n for _, _, names in os.walk(self.path("d")) for n in names if n.endswith(".incomplete")]

        names = self.wanted()
        self.server.files[names[3]] += b" " * (24 << 20)  # the package writes 10 MB at a time
        self.server.faults = {names[3]: ["hang"]}
        args = ["slimpajama", "--download", self.path("d"), "--repo", "some/mirror"]
        with open(os.devnull, "w") as out:
            child = multiprocessing.get_context("fork").Process(target=main_in_a_copy, args=(args, out.fileno()))
            child.start()
        self.addCleanup(child.kill)
        self.addCleanup(self.server.go_on.set)
        for _ in range(600):
            if len(coming()) == 1 and len(self.there()) == 6:
                break
            time.sleep(0.05)
        self.assertEqual(len(coming()), 1)
        self.assertEqual(self.there(), names[:3] + names[4:])
        self.download("--max-files", "2")
        self.assertEqual(len(coming()), 1, "a living one's file")
        self.assertTrue(child.is_alive())
        child.kill()
        child.join()
        self.server.requests = []
        shown = self.download()
        self.assertEqual(coming(), [])
        if int(hub.__version__.split(".")[0]) > 1:
            self.assertIn("1 files that had come in part are removed", shown)
        self.assertEqual(self.there(), names)
        self.assertEqual({r[1].split("/main/")[-1] for r in self.server.requests if "/resolve/" in r[1]}, {names[3]})

    def test_what_lies_in_no_folder_is_said(self):
        self.server.files["more.parquet"] = self.server.files["infos.json"] = b"x"
        said = "2 files that lie in no folder of some/mirror are not fetched, such as infos.json\n"
        self.assertIn(said, self.download())
        self.assertEqual(self.there(), self.wanted())

    def test_what_cannot_be_had_is_named_and_the_rest_comes(self):
        missing = self.wanted()[2]
        self.server.missing.add(missing)
        shown = self.download(status=1)
        self.assertIn(missing, shown)
        self.assertEqual(self.there(), [n for n in self.wanted() if n != missing])
        self.server.missing.clear()
        self.download("--out", self.path("o"))
        self.assertEqual(self.there(), self.wanted())
        self.assertIn("0 things wrong", run("verify", self.path("o")))
        with open(self.path("o", "manifest.json")) as f:
            sets = json.load(f)["preparations"]["slimpajama"]["sets"].values()
        self.assertEqual(sum(s["train"]["documents"] for s in sets), 180)  # its own split: whole files
        self.assertEqual(sum(s.get("val", {"documents": 0})["documents"] for s in sets), 30)

    def test_limits_are_spread(self):
        self.download("--max-files", "4")
        self.assertEqual(len({n.split("/")[1] for n in self.there() if n.startswith("train")}), 3)
        self.assertEqual([n for n in self.there() if n.startswith("validation")], ["validation/chunk1/v.jsonl"])
        self.assertEqual(len(self.there()), 4)
        shutil.rmtree(self.path("d"))
        limit = 3 * max(len(data) for data in self.server.files.values())
        self.download("--max-bytes", limit)
        self.assertTrue(2 <= len(self.there()) <= 4 and sum(len(self.server.files[n]) for n in self.there()) <= limit)
        self.assertIn("leave no file", self.download("--max-bytes", "10", status=1))

    def test_spread_takes_part_of_every_chunk(self):
        entries = [("train/chunk%d/%d.jsonl.zst" % (c, i), 10, None) for c in range(10) for i in range(100)]
        entries += [("test/chunk1/%d.jsonl.zst" % i, 10, None) for i in range(50)] + [
            ("validation/chunk1/0.jsonl.zst", 10, None)
        ]
        with contextlib.redirect_stderr(io.StringIO()):
            for n in (1, 2, 11, 40, 1001, 5000):
                files = inputs.chosen_files(entries, n, None)
                self.assertEqual(len(files), min(n, 1001))
                self.assertEqual(len(set(files)), len(files))
                self.assertFalse([f for f in files if f[0].startswith("test")])
                self.assertTrue(n == 1 or [f for f in files if f[0].startswith("validation")])
                self.assertTrue(len({f[0].split("/")[1] for f in files}) >= min(n - 1, 10))
            self.assertEqual(len(inputs.chosen_files(entries, None, 405)), 40)

    def test_names_that_lead_outside_and_unknown_repositories(self):
        self.server.files["train/../../x.jsonl"] = b"{}"
        self.assertIn("would lie outside", self.download(status=1))
        del self.server.files["train/../../x.jsonl"]
        self.server.repo = "another"
        self.assertIn("some/mirror: ", self.download(status=1))


if __name__ == "__main__":
    main()
