#!/usr/bin/env python3
"""Tests of infer_mta from outside: python3 dev/tests/test_infer.py. The golden cases of dev/golden give checkpoints
and the logits that every way of running them must reproduce; where PyTorch is there, dev/ref is the yardstick for
long greedy continuations and scores.

MTA_BIN: directory of the binaries (default: the repository root). MTA_GOLDEN: directory of golden cases."""

import array
import base64
import fcntl
import glob
import importlib.util
import json
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest
import zlib

from helpers import BIN as FOLDER, GOLDEN, ROOT, call, floats, main, png_size, read_bytes, read_safetensors, to_bf16
from helpers import worst, write_safetensors, zip_all

BIN = os.path.join(FOLDER, "infer_mta")
sys.path.insert(0, os.path.join(ROOT, "dev", "ref"))
try:
    import torch
    import mta_ref
except ImportError:
    torch = None
try:
    import transformers  # 4.43 or later knows Llama 3's rope; test_infer.py runs without
except ImportError:
    transformers = None


def f32(x):
    """x rounded to fp32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def truncate_bf16(data):
    return b"".join(b"\0\0" + data[i + 2 : i + 4] for i in range(0, len(data), 4))


def run(args, stdin=None, check=True, **kw):
    """stdout of infer_mta as text; raises with its stderr where it fails."""
    p = subprocess.run([BIN] + args, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300, **kw)
    if check and p.returncode:
        raise AssertionError("%s: exit %d: %s" % (args, p.returncode, p.stderr.decode(errors="replace")))
    return p if not check else p.stdout.decode()


def log_softmax(row):
    top = max(row)
    total = math.log(sum(math.exp(x - top) for x in row))
    return [x - top - total for x in row]


class Case:
    """A golden case as a checkpoint directory."""

    def __init__(self, path, where, **config):
        tensors, meta = read_safetensors(path)
        self.name = os.path.basename(path)[: -len(".safetensors")]
        self.config = dict(json.loads(meta["config"]), **config)
        self.dir = os.path.join(where, self.name)
        self.weights = {k: v for k, v in tensors.items() if not k.startswith(("golden.", "grad."))}
        self.B, self.T = tensors["golden.tokens"][1]
        self.tokens = array.array("i", tensors["golden.tokens"][2]).tolist()
        self.logits = floats(tensors["golden.logits"][2])
        self.V = self.config["vocab_size"]
        self.write(self.dir, self.weights, self.config)

    @staticmethod
    def write(path, weights, config):
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, "config.json"), "w") as f:
            json.dump(config, f)
        write_safetensors(os.path.join(path, "model.safetensors"), weights)

    def row(self, b):
        return self.tokens[b * self.T : (b + 1) * self.T]

    def row_logits(self, b, t):
        at = (b * self.T + t) * self.V
        return self.logits[at : at + self.V]


class LogitsCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tmp = tempfile.TemporaryDirectory()

    @classmethod
    def tearDownClass(cls):
        cls.tmp.cleanup()

    def logits(self, path, ids, *options):
        out = os.path.join(self.tmp.name, "logits.safetensors")
        run([path, "--token-ids", " ".join(map(str, ids)), "--logits", out, "--quiet"] + list(options))
        return floats(read_safetensors(out)[0]["logits"][2])

    def compare(self, got, want, tolerance, what):
        self.assertEqual(len(got), len(want), what)
        largest = max(abs(x) for x in want)
        error = worst(abs(a - b) for a, b in zip(got, want))
        self.assertTrue(error <= tolerance * largest, "%s: worst difference %.3g of %.3g" % (what, error, largest))
        return error / largest

    def answers(self, where, lines, *options):
        """--score of the lines, and the passes over the weights that it took."""
        text = "".join(json.dumps(x) + "\n" for x in lines).encode()
        p = run([where, "--score", "-"] + list(options), stdin=text, check=False)
        self.assertEqual(p.returncode, 0, p.stderr)
        passes = re.search(rb"(\d+) passes over the weights", p.stderr)
        return [json.loads(x) for x in p.stdout.splitlines()], int(passes.group(1))


class Golden(LogitsCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        files = sorted(glob.glob(os.path.join(GOLDEN, "*.safetensors")))
        cls.cases = [Case(f, cls.tmp.name) for f in files]
        if not cls.cases:
            raise AssertionError("no golden cases in " + GOLDEN)

    def test_logits_of_every_position(self):
        """In one chunk, token by token, in odd chunks, with one thread: the golden logits."""
        for c in self.cases:
            for options in ([], ["--chunk", "1"], ["--chunk", "7"], ["--chunk", "16", "--threads", "2"]):
                for b in range(c.B):
                    want = c.logits[b * c.T * c.V : (b + 1) * c.T * c.V]
                    self.compare(
                        self.logits(c.dir, c.row(b), *options), want, 1e-5, "%s %s row %d" % (c.name, options, b)
                    )

    def test_forms_of_weights(self):
        """bf16 and f16 files, conversions and bf16 caches: the same numbers in each form give the same logits,
        roundings small ones, but not none."""
        for c in self.cases:
            same32 = {k: ("F32", s, truncate_bf16(d)) for k, (_, s, d) in c.weights.items()}
            same16 = {k: ("BF16", s, to_bf16(d)) for k, (_, s, d) in c.weights.items()}
            a, b = c.dir + "_32", c.dir + "_16"
            Case.write(a, same32, c.config)
            Case.write(b, same16, c.config)
            want = self.logits(a, c.row(0))
            for path, options in (
                (a, ["--weights", "bf16"]),
                (b, []),
                (b, ["--weights", "f32"]),
                (b, ["--weights", "bf16", "--chunk", "1"]),
            ):
                self.compare(self.logits(path, c.row(0), *options), want, 1e-5, "%s %s" % (c.name, options))
            half = {
                k: ("F16", s, struct.pack("<%de" % (len(d) // 4), *floats(d))) for k, (_, s, d) in c.weights.items()
            }
            Case.write(c.dir + "_f16", half, c.config)
            want = self.logits(c.dir, c.row(0))
            self.compare(self.logits(c.dir + "_f16", c.row(0)), want, 5e-3, c.name + " f16")
            for chunk in ("1", "64"):
                for options, tolerance in ((["--weights", "int8"], 0.1), (["--weights", "bf16"], 0.03),
                                           (["--cache", "bf16"], 0.03)):
                    got = self.logits(c.dir, c.row(0), *options, "--chunk", chunk)
                    error = self.compare(got, want, tolerance, "%s %s" % (c.name, options))
                    self.assertGreater(error, 0, "%s %s" % (c.name, options))

    def test_int8_is_its_rounded_weights(self):
        """int8 against the same weights rounded here, 64 along a row to the largest over 127, in f32: passes of many
        tokens differ by the order of sums, those of few by activations of 15 bits. Sizes that leave tiles unfilled."""
        case = next(c for c in self.cases if c.name == "mha")
        sizes, rng = {32: 72, 48: 200, 61: 150}, random.Random(5)
        config = dict(case.config, hidden_size=72, intermediate_size=200, vocab_size=150)
        exact, rounded = {}, {}
        for name, (dtype, shape, _) in case.weights.items():
            shape = [sizes.get(n, n) for n in shape]
            x = array.array("f", [rng.gauss(0, 0.2) for _ in range(math.prod(shape))])
            exact[name] = (dtype, shape, x.tobytes())
            for first in range(0, len(x), shape[-1]) if len(shape) == 2 else ():
                for at in range(first, first + shape[1], 64):
                    end = min(at + 64, first + shape[1])
                    scale = f32(max(map(abs, x[at:end])) / 127)
                    inverse = f32(1 / scale)
                    for i in range(at, end):
                        x[i] = round(f32(x[i] * inverse)) * scale
            rounded[name] = (dtype, shape, x.tobytes())
        a, b = os.path.join(self.tmp.name, "exact"), os.path.join(self.tmp.name, "rounded")
        Case.write(a, exact, config)
        Case.write(b, rounded, config)
        ids = [rng.randrange(150) for _ in range(16)]
        want = self.logits(b, ids)
        for chunk, tolerance in (("1", 1e-3), ("3", 1e-3), ("16", 1e-5)):
            got = self.logits(a, ids, "--weights", "int8", "--chunk", chunk)
            self.compare(got, want, tolerance, "chunk " + chunk)

    def test_greedy_follows_the_logits(self):
        """--temperature 0 from a prompt: each id is the argmax of the logits of everything before it."""
        for c in self.cases:
            prompt = c.row(0)[: max(1, min(5, c.T - 1))]
            steps = min(30, c.config["max_position_embeddings"] - len(prompt))
            out = run(
                [
                    c.dir, "--token-ids", " ".join(map(str, prompt)), "--temperature", "0", "--max-tokens", str(steps),
                    "--quiet",
                ]
            )
            ids = list(map(int, out.split()))
            self.assertEqual(len(ids), steps)
            flat = self.logits(c.dir, prompt + ids)
            for i, got in enumerate(ids):
                row = flat[(len(prompt) - 1 + i) * c.V : (len(prompt) + i) * c.V]
                self.assertGreaterEqual(row[got], max(row) - 1e-4, "%s step %d" % (c.name, i))

    def test_every_eos_ends(self):
        """Each id of a list in eos_token_id ends a text; a list of too many is refused."""
        c = next(c for c in self.cases if c.name == "mha")
        options = ["--token-ids", "1 2 3", "--temperature", "0", "--max-tokens", "12", "--quiet"]
        free = list(map(int, run([c.dir] + options).split()))
        unused = [i for i in range(c.V) if i not in free]
        where = c.dir + "_eos"
        for at in (0, 3, 7):
            for ids in ([free[at]], [unused[0], free[at]], unused[:20] + [free[at]]):
                Case.write(where, c.weights, dict(c.config, eos_token_id=ids if len(ids) > 1 else ids[0]))
                got = list(map(int, run([where] + options).split()))
                self.assertEqual(got, free[: free.index(free[at])], ids)
        Case.write(where, c.weights, dict(c.config, eos_token_id=(unused * 3)[:65]))
        p = run([where] + options, check=False)
        self.assertEqual(p.returncode, 1)
        self.assertIn(b"eos_token_id: more than 64 ids", p.stderr)

    def test_ends_of_generation_config(self):
        """generation_config.json's ids end a text where that file is there, and none where it names none, as in
        transformers; config.json's where it is not."""
        c = next(c for c in self.cases if c.name == "mha")
        options = ["--token-ids", "1 2 3", "--temperature", "0", "--max-tokens", "12", "--quiet"]
        free = list(map(int, run([c.dir] + options).split()))
        unused = [i for i in range(c.V) if i not in free]
        where = c.dir + "_generation"
        beside = os.path.join(where, "generation_config.json")
        Case.write(where, c.weights, dict(c.config, eos_token_id=free[5]))

        def ends_before(text, id, *more):
            with open(beside, "w") as f:
                f.write(text)
            got = list(map(int, run([where] + options + list(more)).split()))
            self.assertEqual(got, free if id is None else free[: free.index(id)], text)

        ends_before('{"eos_token_id": %d}' % free[3], free[3])
        ends_before('{"eos_token_id": [%d, %d]}' % (unused[0], free[2]), free[2])
        ends_before('{"eos_token_id": %s}' % ([unused[0]] * 20 + [free[4]]), free[4])
        ends_before('{"eos_token_id": %d}' % unused[0], None)  # config.json's does not end it then
        ends_before('{"eos_token_id": [%d, 999999, -1]}' % unused[0], None)
        ends_before('{"eos_token_id": %d}' % free[3], None, "--ignore-eos")
        for text in ("{}", '{"eos_token_id": null}', '{"eos_token_id": []}', '{"do_sample": true}'):
            ends_before(text, None)
        os.remove(beside)
        self.assertEqual(list(map(int, run([where] + options).split())), free[: free.index(free[5])])
        for text in ("", "{", "[]", '{"eos_token_id": "3"}', '{"eos_token_id": 1.5}', '{"eos_token_id": [1, null]}',
                     '{"eos_token_id": [[1]]}'):
            with open(beside, "w") as f:
                f.write(text)
            p = run([where] + options, check=False)
            self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), text)
            self.assertIn(b"generation_config.json", p.stderr)

    def test_score(self):
        """Scores equal the golden log-softmax, whatever prefixes the lines share and in whatever order they come."""
        for c in self.cases:
            if c.T < 8:
                continue
            lines, want = [], []
            for b in range(c.B):
                ids = c.row(b)
                for cut in (1, 2, c.T // 2, c.T // 2 + 1, c.T - 1):
                    for end in (cut, cut + 1, c.T):
                        lines.append({"context_ids": ids[:cut], "continuation_ids": ids[cut:end]})
                        rows = [list(c.row_logits(b, t)) for t in range(cut - 1, end - 1)]
                        want.append(
                            (
                                [log_softmax(r)[ids[cut + i]] for i, r in enumerate(rows)],
                                all(max(r) == r[ids[cut + i]] for i, r in enumerate(rows)),
                            )
                        )
            order = list(range(len(lines)))
            random.Random(1).shuffle(order)
            text = "".join(json.dumps(lines[i]) + "\n" for i in order).encode()
            path = os.path.join(self.tmp.name, "score.jsonl")
            with open(path, "wb") as f:
                f.write(text)
            for args, stdin in (
                (["--score", path], None),
                (["--score", "-"], text),
                (["--score", path, "--chunk", "3"], None),
            ):
                answers = [json.loads(x) for x in run([c.dir, "--quiet"] + args, stdin=stdin).splitlines()]
                self.assertEqual(len(answers), len(lines))
                for i, a in zip(order, answers):
                    self.assertEqual(a["tokens"], len(want[i][0]))
                    self.assertEqual(a["greedy"], want[i][1])
                    self.assertAlmostEqual(a["logprob"], sum(want[i][0]), delta=1e-4)
                    for x, y in zip_all(a["token_logprobs"], want[i][0]):
                        self.assertAlmostEqual(x, y, delta=1e-4)

    def test_score_in_batches(self):
        """Continuations of one context, short texts, ends that differ late, long ones, none: as a batch they get what
        each gets alone, token by token (--chunk 1), and take fewer passes over the weights than there are lines."""
        for c in self.cases:
            rng = random.Random(c.T)
            limit = c.config["max_position_embeddings"]
            ids = lambda n: [rng.randrange(c.V) for _ in range(n)]
            lines = []
            for context in (ids(1), ids(7), ids(limit // 2)):
                ends = [ids(n) for n in (1, 1, 2, 5, limit // 4, limit // 4)]
                ends += [ends[3][:4] + ids(2), ends[3], ends[3] + ids(3), []]
                lines += [{"context_ids": context, "continuation_ids": e} for e in ends]
                lines += [{"context_ids": context + ends[4][:k], "continuation_ids": ends[4][k:]} for k in (1, 3)]
            lines += [{"context_ids": [1], "continuation_ids": ids(n)} for n in (2, 3, 4, 5, 6)]
            rng.shuffle(lines)
            alone, many = self.answers(c.dir, lines, "--chunk", "1")
            for options in ([], ["--chunk", "20"], ["--threads", "2"]):
                got, few = self.answers(c.dir, lines, *options)
                self.assertEqual(len(got), len(lines))
                for a, b in zip_all(got, alone):
                    self.assertEqual((a["tokens"], a["greedy"]), (b["tokens"], b["greedy"]), c.name)
                    for x, y in zip_all(a["token_logprobs"] + [a["logprob"]], b["token_logprobs"] + [b["logprob"]]):
                        self.assertAlmostEqual(x, y, delta=1e-5 * max(1, abs(y)), msg="%s %s" % (c.name, options))
                self.assertLess(few, len(lines) * 2 // 3 if not options or options[0] != "--chunk" else many, c.name)

    def test_choices_of_a_question_are_one_pass(self):
        c = next(c for c in self.cases if c.T >= 8 and c.config.get("kq_conv_layers"))
        context = c.row(0)[:6]
        lines = [{"context_ids": context, "continuation_ids": [k, k + 1, k + 2]} for k in (3, 9, 12, 20)]
        self.assertEqual(self.answers(c.dir, lines)[1], 2)  # the context, then all four
        # nor does it change that the model could read far more than they are: Llama 3.1's number of positions
        Case.write(c.dir + "_long", c.weights, dict(c.config, max_position_embeddings=131072))
        self.assertEqual(self.answers(c.dir + "_long", lines), self.answers(c.dir, lines))
        want = self.logits(c.dir, c.row(0))
        self.assertEqual(self.logits(c.dir + "_long", c.row(0)), want)

    def test_several_samples(self):
        """A sample depends on its number and the seed, not on the samples before it; each is what it would be alone."""
        for c in self.cases:
            if c.T < 8:
                continue
            args = [
                c.dir, "--token-ids", " ".join(map(str, c.row(0)[:7])), "--max-tokens", "12", "--quiet",
                "--temperature", "3", "--top-p", "1",
            ]
            three = run(args + ["--samples", "3"]).splitlines()
            self.assertEqual(len(three), 3)
            self.assertEqual(three[0], run(args).strip())
            self.assertEqual(len(set(three)), 3)
            self.assertEqual(run(args + ["--samples", "3", "--seed", "2"]).splitlines()[0] == three[0], False)
            greedy = run(args + ["--samples", "2", "--temperature", "0"]).splitlines()
            self.assertEqual(greedy[0], greedy[1])

    def test_sampling_follows_the_distribution(self):
        """First tokens of many samples: their shares are the probabilities; top-k, top-p and min-p cut what they
        say."""
        c = self.cases[0]
        probs = [math.exp(x) for x in log_softmax(list(c.row_logits(0, 4)))]
        order = sorted(range(c.V), key=lambda i: -probs[i])
        args = [
            c.dir, "--token-ids", " ".join(map(str, c.row(0)[:5])), "--max-tokens", "1", "--samples", "20000",
            "--quiet", "--temperature", "1",
        ]

        def shares(*options):
            ids = list(map(int, run(args + list(options)).split()))
            self.assertEqual(len(ids), 20000)
            return {i: ids.count(i) / 20000.0 for i in set(ids)}

        def expect(kept, got):
            total = sum(probs[i] for i in kept)
            self.assertTrue(set(got) <= set(kept))
            for i in kept:
                p = probs[i] / total
                self.assertAlmostEqual(got.get(i, 0), p, delta=5 * math.sqrt(p * (1 - p) / 20000) + 1e-4)

        expect(order, shares("--top-p", "1"))
        expect(order[:5], shares("--top-k", "5", "--top-p", "1"))
        nucleus, mass = [], 0
        while mass < 0.6:
            nucleus.append(order[len(nucleus)])
            mass += probs[nucleus[-1]]
        expect(nucleus, shares("--top-p", "0.6"))
        expect([i for i in order if probs[i] >= 0.3 * probs[order[0]]], shares("--top-p", "1", "--min-p", "0.3"))
        self.assertEqual(list(shares("--top-p", "0")), [order[0]])

    def test_context_limit_and_shift(self):
        c = self.cases[0]
        limit = c.config["max_position_embeddings"]
        ids = [i % c.V for i in range(limit)]
        p = run([c.dir, "--token-ids", " ".join(map(str, ids + [1])), "--quiet"], check=False)
        self.assertEqual(p.returncode, 1)
        self.assertIn(b"the context has %d positions" % limit, p.stderr)
        p = run(
            [c.dir, "--token-ids", " ".join(map(str, ids)), "--max-tokens", "5", "--quiet", "--temperature", "0"],
            check=False,
        )
        self.assertEqual(p.returncode, 0)
        self.assertEqual(len(p.stdout.split()), 1)  # the last position's logits give one more
        self.assertRegex(p.stderr, rb"\Ainfer_mta: the context of \d+ positions is full; --shift goes on\n\Z")
        p = run([c.dir, "--token-ids", "1", "--context", "1", "--shift", "--quiet"], check=False)
        self.assertEqual(p.stderr, b"infer_mta: the context of 1 positions is full, and too short for --shift\n")
        out = run(
            [c.dir, "--token-ids", "1 2 3", "--max-tokens", str(3 * limit), "--quiet", "--temperature", "0", "--shift"]
        )
        self.assertEqual(len(out.split()), 3 * limit)

    def test_attention_map(self):
        for c in self.cases:
            out = os.path.join(self.tmp.name, "map.json")
            run([c.dir, "--token-ids", " ".join(map(str, c.row(0))), "--attention-map", out, "--layer", "1", "--quiet"])
            with open(out) as f:
                got = json.load(f)
            self.assertEqual(len(got["tokens"]), c.T)
            for key in ("before", "after"):
                self.assertEqual([len(row) for row in got[key]], list(range(1, c.T + 1)))
            for row in got["before"]:
                self.assertAlmostEqual(sum(row), 1, delta=1e-3)


class Trainer(LogitsCase):
    """Against train_mta.c itself: test_mta --write makes models of every kind of attention and models drawn at random
    (any combination of fields, odd sizes), with the logits of the trainer's full forward pass."""

    def test_token_by_token_is_the_trainers_forward(self):
        writer = os.path.join(os.path.dirname(BIN), "test_mta")
        if not os.path.exists(writer):
            self.skipTest("no test_mta beside infer_mta")
        where = os.path.join(self.tmp.name, "cases")
        subprocess.run([writer, "--write", where, "60"], check=True, stdout=subprocess.DEVNULL)
        files = sorted(glob.glob(os.path.join(where, "*.safetensors")))
        self.assertEqual(len(files), 60)
        largest, positions = 0, 0
        for path in files:
            c = Case(path, self.tmp.name)
            for b in range(c.B):
                want = c.logits[b * c.T * c.V : (b + 1) * c.T * c.V]
                for options in (["--chunk", "1"], ["--chunk", "7"], []):
                    got = self.logits(c.dir, c.row(b), *options)
                    # both in fp32; models with heads of 2 values reach 2e-5
                    error = self.compare(got, want, 1e-4, "%s %s row %d" % (c.name, options, b))
                    if options == ["--chunk", "1"]:
                        largest, positions = max(largest, error), positions + c.T
        print("token by token against the trainer: %d models, %d positions, worst relative difference %.2g"
              % (len(files), positions, largest))


class Llama(LogitsCase):
    """A LLaMA checkpoint as Hugging Face writes one (names, config.json with rope_scaling, grouped heads, a head of its
    own) against the model computed here in plain Python, in double, with the scaled frequencies of Llama 3 written from
    their definition by wavelengths."""

    CONFIG = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 23, "hidden_size": 32,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "rope_theta": 300.0, "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

    def weights(self, seed):
        c, rng = self.CONFIG, random.Random(seed)
        C, F, V, KV = c["hidden_size"], c["intermediate_size"], c["vocab_size"], 16
        shapes = {"model.embed_tokens.weight": [V, C], "lm_head.weight": [V, C], "model.norm.weight": [C]}
        for i in range(c["num_hidden_layers"]):
            p = "model.layers.%d." % i
            shapes.update(
                {
                    p + "self_attn.q_proj.weight": [C, C], p + "self_attn.k_proj.weight": [KV, C],
                    p + "self_attn.v_proj.weight": [KV, C], p + "self_attn.o_proj.weight": [C, C],
                    p + "mlp.gate_proj.weight": [F, C], p + "mlp.up_proj.weight": [F, C],
                    p + "mlp.down_proj.weight": [C, F], p + "input_layernorm.weight": [C],
                    p + "post_attention_layernorm.weight": [C],
                }
            )
        values = lambda s: [rng.gauss(1 if len(s) == 1 else 0, 0.25) for _ in range(math.prod(s))]
        return {name: ("F32", s, array.array("f", values(s)).tobytes()) for name, s in shapes.items()}

    @staticmethod
    def frequency(theta, t, size, scaling):
        f = theta ** (-2.0 * t / size)
        if not scaling:
            return f
        wavelength, context = 2 * math.pi / f, scaling["original_max_position_embeddings"]
        if wavelength < context / scaling["high_freq_factor"]:
            return f
        if wavelength > context / scaling["low_freq_factor"]:
            return f / scaling["factor"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = (context / wavelength - low) / (high - low)
        return (1 - smooth) * f / scaling["factor"] + smooth * f

    def forward(self, ids, weights, scaling):
        c = self.CONFIG
        NH, NKV, size = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"] // c["num_attention_heads"]
        tensors = {}
        for name, (_, shape, data) in weights.items():
            flat = list(floats(data))
            tensors[name] = flat if len(shape) == 1 else [flat[i : i + shape[1]] for i in range(0, len(flat), shape[1])]
        dot = lambda a, b: sum(x * y for x, y in zip(a, b))
        product = lambda x, name: [dot(x, row) for row in tensors[name]]

        def norm(x, name):
            scale = 1 / math.sqrt(dot(x, x) / len(x) + c["rms_norm_eps"])
            return [v * scale * w for v, w in zip(x, tensors[name])]

        def rotated(x, position):
            out = list(x)
            for h in range(0, len(x), size):
                for t in range(size // 2):
                    angle = position * self.frequency(c["rope_theta"], t, size, scaling)
                    a, b = x[h + t], x[h + t + size // 2]
                    out[h + t] = a * math.cos(angle) - b * math.sin(angle)
                    out[h + t + size // 2] = b * math.cos(angle) + a * math.sin(angle)
            return out

        xs = [tensors["model.embed_tokens.weight"][i] for i in ids]
        for layer in range(c["num_hidden_layers"]):
            p = "model.layers.%d." % layer
            keys, values, out = [], [], []
            for i, x in enumerate(xs):
                n = norm(x, p + "input_layernorm.weight")
                q = rotated(product(n, p + "self_attn.q_proj.weight"), i)
                keys.append(rotated(product(n, p + "self_attn.k_proj.weight"), i))
                values.append(product(n, p + "self_attn.v_proj.weight"))
                o = []
                for h in range(NH):
                    at = h // (NH // NKV) * size
                    scores = [dot(q[h * size : (h + 1) * size], k[at : at + size]) / math.sqrt(size) for k in keys]
                    shares = [math.exp(s) for s in log_softmax(scores)]
                    o += [dot(shares, [v[at + t] for v in values]) for t in range(size)]
                x = [a + b for a, b in zip(x, product(o, p + "self_attn.o_proj.weight"))]
                n = norm(x, p + "post_attention_layernorm.weight")
                gate, up = product(n, p + "mlp.gate_proj.weight"), product(n, p + "mlp.up_proj.weight")
                f = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up)]
                out.append([a + b for a, b in zip(x, product(f, p + "mlp.down_proj.weight"))])
            xs = out
        return [v for x in xs for v in product(norm(x, "model.norm.weight"), "lm_head.weight")]

    def test_scaled_rope(self):
        weights = self.weights(5)
        rng = random.Random(9)
        ids = [rng.randrange(23) for _ in range(60)]
        size, theta = 8, self.CONFIG["rope_theta"]
        kinds = [self.frequency(theta, t, size, self.SCALING) * theta ** (2.0 * t / size) for t in range(4)]
        self.assertTrue(kinds[0] == 1 and 0.25 < kinds[1] < 1 and kinds[3] == 0.25)  # all three cases of the definition
        plain, scaled = self.forward(ids, weights, None), self.forward(ids, weights, self.SCALING)
        forms = [
            ({}, plain),
            ({"rope_scaling": None}, plain),
            ({"rope_scaling": dict(self.SCALING, rope_type="llama3")}, scaled),
            ({"rope_scaling": dict(self.SCALING, type="llama3")}, scaled),
            ({"rope_parameters": dict(self.SCALING, rope_type="llama3", rope_theta=300.0), "rope_theta": 300.0},
             scaled),
        ]
        with self.assertRaises(AssertionError):
            self.compare(plain, scaled, 1e-2, "the scaling changes nothing")
        for number, (keys, want) in enumerate(forms):
            where = os.path.join(self.tmp.name, "llama%d" % number)
            Case.write(where, weights, dict(self.CONFIG, **keys))
            for options in ([], ["--chunk", "1"], ["--chunk", "9"]):
                self.compare(self.logits(where, ids, *options), want, 1e-5, "%s %s" % (keys, options))


@unittest.skipIf(torch is None or transformers is None, "no transformers here")
class Transformers(LogitsCase):
    def test_llama_checkpoint_of_transformers(self):
        """A checkpoint as `transformers` saves it, Llama 3's rope, grouped keys, a head of its own: logits and
        log-probabilities of every position, token by token and in chunks, and a score, as its own forward gives."""
        scaling = dict(Llama.SCALING, rope_type="llama3", factor=8.0, original_max_position_embeddings=64)
        for keys in (dict(rope_scaling=scaling, rope_theta=500000.0), dict(rope_scaling=None, num_key_value_heads=1)):
            torch.manual_seed(len(keys))
            shape = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4)
            shape.update(vocab_size=301, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5)
            shape.update(tie_word_embeddings=False, initializer_range=0.12, **keys)
            config = transformers.LlamaConfig(**shape)
            model = transformers.LlamaForCausalLM(config).eval()
            where = os.path.join(self.tmp.name, "transformers%d" % len(keys))
            model.save_pretrained(where, safe_serialization=True)
            ids = torch.randint(0, 301, (1, 512))
            with torch.no_grad():
                want = model(ids).logits[0]
            logp = want.log_softmax(-1)
            for options in (["--chunk", "1"], []):
                got = torch.tensor(list(self.logits(where, ids[0].tolist(), *options))).view(512, 301)
                difference = ((got - want).abs().max() / want.abs().max()).item()
                logp_difference = (got.log_softmax(-1) - logp).abs().max().item()
                self.assertLess(difference, 1e-5)
                self.assertLess(logp_difference, 1e-4)
                print("transformers %s, rope %s %s: logits differ by %.1e, log-probabilities by %.1e" % (
                    transformers.__version__, "llama3" if keys["rope_scaling"] else "default", options, difference,
                    logp_difference))
            tokens = ids[0].tolist()
            lines = [{"context_ids": tokens[:7], "continuation_ids": tokens[7:]}]
            for x, t in zip_all(self.answers(where, lines)[0][0]["token_logprobs"], range(7, 512)):
                self.assertAlmostEqual(x, logp[t - 1, tokens[t]].item(), delta=1e-4)


class Refusals(unittest.TestCase):
    """Bad input: exit status 1 and one line that names the matter."""

    def setUp(self):
        self.tmp = tempfile.TemporaryDirectory()
        path = sorted(glob.glob(os.path.join(GOLDEN, "*.safetensors")))[0]
        self.case = Case(path, self.tmp.name)

    def tearDown(self):
        self.tmp.cleanup()

    def refuse(self, args, part, stdin=b""):
        p = run(args + ["--quiet"], stdin=stdin, check=False)
        error = p.stderr.decode()
        self.assertEqual(p.returncode, 1, error)
        self.assertEqual(error.count("\n"), 1, error)
        self.assertIn(part, error)

    def test_files(self):
        d, ids = self.case.dir, ["--token-ids", "1 2"]
        model = os.path.join(d, "model.safetensors")
        with open(model, "rb") as f:
            whole = f.read()

        def with_model(data):
            with open(model, "wb") as f:
                f.write(data)

        self.refuse([os.path.join(self.tmp.name, "none")] + ids, "not a checkpoint directory")
        with_model(whole[:-4])
        self.refuse([d] + ids, "truncated")
        with_model(struct.pack("<Q", 1 << 62) + whole[8:])
        self.refuse([d] + ids, "header of 4611686018427387904 bytes")
        for bad in ("nan", "inf", "-inf"):
            for options in ([], ["--mapped"], ["--weights", "int8"], ["--weights", "bf16"]):
                with_model(whole[:-4] + struct.pack("<f", float(bad)))
                self.refuse([d] + ids + options, "is not finite")
        with_model(struct.pack("<Q", len(whole)) + whole[8:])
        self.refuse([d] + ids, "header of %d bytes" % len(whole))
        size = struct.unpack("<Q", whole[:8])[0]
        header = whole[8 : 8 + size].replace(b" ", b"")
        for there, instead in (
            (b'"F32"', b'"F3"'), (b'"data_offsets"', b'"data_offset"'), (b'"data_offsets":[0,', b'"data_offsets":[-1,'),
            (b"{", b"["), (b"[61,", b"[-1,"), (b"[61,", b"[1e99,"), (b"[61,", b"[9223372036854775807,"),
        ):
            self.assertIn(there, header)
            hostile = header.replace(there, instead, 1)
            hostile += b" " * (-len(hostile) % 8)
            with_model(struct.pack("<Q", len(hostile)) + hostile + whole[8 + size :])
            self.refuse([d] + ids, "model.safetensors")
        os.remove(model)
        self.refuse([d] + ids, "neither model.safetensors nor")
        os.mkdir(model)
        self.refuse([d] + ids, "model.safetensors")
        os.rmdir(model)
        weights = dict(self.case.weights)
        del weights["model.norm.weight"]
        Case.write(d, weights, self.case.config)
        self.refuse([d] + ids, "model.norm.weight is missing")
        Case.write(d, dict(self.case.weights, extra=("F32", [1], b"\0\0\0\0")), self.case.config)
        self.refuse([d] + ids, "extra is not one of this model's")
        Case.write(d, self.case.weights, dict(self.case.config, intermediate_size=40))
        self.refuse([d] + ids, "wanted [40, 32]")
        Case.write(d, self.case.weights, dict(self.case.config, num_attention_heads=7))
        self.refuse([d] + ids, "not divisible")
        Case.write(d, {k: ("I32", s, b) for k, (_, s, b) in self.case.weights.items()}, self.case.config)
        self.refuse([d] + ids, "dtype I32")
        Case.write(d, self.case.weights, dict(self.case.config, rope_scaling={"rope_type": "yarn", "factor": 4.0}))
        self.refuse([d] + ids, "yarn")
        for key, value in (("sliding_window", 32), ("partial_rotary_factor", 0.5), ("attention_bias", True),
                           ("hidden_act", "gelu")):
            Case.write(d, self.case.weights, dict(self.case.config, **{key: value}))
            self.refuse([d] + ids, key)
        Case.write(d, self.case.weights, dict(self.case.config, sliding_window=32, use_sliding_window=False))
        run([d, "--max-tokens", "1"] + ids)
        with open(os.path.join(d, "config.json"), "w") as f:
            f.write("{")
        self.refuse([d] + ids, "config.json")
        os.remove(os.path.join(d, "config.json"))
        self.refuse([d] + ids, "config.json")

    def test_tokenizer_of_another_vocabulary(self):
        d = text_model(os.path.join(self.tmp.name, "text"))
        self.refuse([d, "--prompt", "a", "--tokenizer", "toy"], "toy: 32 ids, but the model was trained with bytes")
        with open(os.path.join(d, "config.json")) as f:
            config = json.load(f)
        with open(os.path.join(d, "config.json"), "w") as f:
            json.dump(dict(config, tokenizer="ranks.tiktoken"), f)
        self.refuse([d, "--prompt", "a"], "ranks.tiktoken")
        self.refuse([d, "--prompt", "a", "--tokenizer", os.path.join(self.tmp.name, "none")], "none")

    def test_prompt_longer_than_the_context(self):
        d = text_model(os.path.join(self.tmp.name, "text"))
        for args, stdin in (
            (["--prompt", "x" * 64], b""),
            ([], b"x" * 64),
            (["--token-ids", "1 " * 65], b""),
            (["--interactive"], b"x" * 64 + b"\n"),
        ):
            self.refuse([d] + args, "65 tokens, the context has 64 positions", stdin=stdin)

    def test_requests(self):
        d = self.case.dir
        self.refuse([d, "--token-ids", "1 61"], "wanted token ids from 0 to 60")
        self.refuse([d, "--token-ids", "1 x"], 'got "x"')
        self.refuse([d, "--token-ids", ""], "empty")
        self.refuse([d, "--prompt", "a"], "names no tokenizer")
        self.refuse([d, "--prompt", "a", "--tokenizer", "bytes"], "vocabulary has 61")
        self.refuse([d, "--prompt", "a", "--tokenizer", "gpt2"], "rank file")
        self.refuse([d, "--token-ids", "1", "--pattern", "gpt2"], "--tokenizer FILE")
        self.refuse([d, "--token-ids", "1", "--context", "65"], "64 positions")
        self.refuse([d, "--token-ids", "1", "--temprature", "1"], "did you mean --temperature")
        self.refuse([d, "--token-ids", "1", "--prompt", "a"], "exclude each other")
        self.refuse(["--prompt", "a"], "no checkpoint directory")
        self.refuse([d, "--score", os.path.join(self.tmp.name, "none")], "No such file")
        for line, part in (
            (b"{", "line 1"),
            (b"{}", 'wanted "context"'),
            (b'{"context_ids":[],"continuation_ids":[1]}', "context is empty"),
            (b'{"context_ids":[],"continuation_ids":[]}', "context is empty"),
            (b'{"context":"a","context_ids":[1],"continuation_ids":[1]}', "ids of the context, wanted one"),
            (b'{"context":"a","context_ids":"1","continuation":"b"}', "ids of the context, wanted one"),
            (b'{"context":5,"context_ids":[1],"continuation_ids":[1]}', "ids of the context, wanted one"),
            (b'{"context_ids":[1],"continuation":["a"],"continuation_ids":[1]}', "ids of the continuation, wanted one"),
            (b'{"context_ids":[1],"continuation":"a","continuation_ids":[1]}', "ids of the continuation, wanted one"),
            (b'{"context_ids":[1],"continuation_ids":[99]}', "from 0 to 60"),
            (b'{"context_ids":[1],"continuation_ids":[99999999999999999999]}', "from 0 to 60"),
            (b'{"context_ids":[1],"context_ids":[2],"continuation_ids":[1]}', 'key "context_ids" occurs twice'),
            (b'{"context":"a\\ud800","continuation":"b"}', "half of a surrogate pair"),
            (b'{"context_ids":[1],"continuation_ids":[%s]}' % b",".join([b"1"] * 65), "the context has 64 positions"),
        ):
            self.refuse([d, "--score", "-"], part, stdin=line)
        self.refuse([d, "--token-ids", "1", "--logits", os.path.join(self.tmp.name, "no", "file")], "No such file")
        self.refuse([d, "--token-ids", "1", "--attention-map", "x", "--layer", "2"], "layers 0 to 1")

    def test_answers_before_a_bad_line(self):
        """What was asked before a bad line is answered, then one line tells of it, and the exit status is 1."""
        good = b'{"context_ids":[1,2],"continuation_ids":[3]}\n'
        want = json.loads(run([self.case.dir, "--score", "-", "--quiet"], stdin=good))["logprob"]
        for bad in (b"{", b"[1]", b"null", b'{"context_ids":[1],"continuation_ids":[61]}',
                    b'{"context":"a","continuation":"b"}', b"\xff"):
            for before in (0, 1, 300, 5000):
                p = run([self.case.dir, "--score", "-", "--quiet"], stdin=good * before + bad + b"\n" + good,
                        check=False)
                self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), p.stderr)
                self.assertIn(b"line %d: " % (before + 1), p.stderr)
                answers = [json.loads(x)["logprob"] for x in p.stdout.splitlines()]
                self.assertEqual(len(answers), before)
                self.assertTrue(all(abs(x - want) < 1e-5 for x in answers))

    def test_directory_of_a_run(self):
        """RUN means its newest checkpoint whose files are all there; a damaged newer one is named."""
        run_dir = os.path.join(self.tmp.name, "run")
        ids = ["--token-ids", "1 2 3", "--max-tokens", "5", "--temperature", "0", "--ignore-eos"]
        want = run([self.case.dir] + ids)
        for step, manifest in ((5, True), (20, True), (100, False)):
            where = os.path.join(run_dir, "step-%08d" % step)
            Case.write(where, self.case.weights, self.case.config)
            data = {n: read_bytes(os.path.join(where, n)) for n in ("config.json", "model.safetensors")}
            files = {n: {"bytes": len(b), "crc32": zlib.crc32(b)} for n, b in data.items()}
            if manifest:
                with open(os.path.join(where, "manifest.json"), "w") as f:
                    json.dump({"step": step, "files": files}, f)
        with open(os.path.join(run_dir, "step-00000005", "model.safetensors"), "wb") as f:
            f.write(b"older, so it is not looked at")
        p = run([run_dir] + ids, check=False)
        self.assertEqual((p.returncode, p.stdout.decode()), (0, want), p.stderr)
        self.assertIn("step-00000020: the newest checkpoint of " + run_dir, p.stderr.decode())
        self.assertIn("checkpoint ignored: " + run_dir + "/step-00000100", p.stderr.decode())
        os.remove(os.path.join(run_dir, "step-00000020", "model.safetensors"))
        p = run([run_dir, "--quiet"] + ids, check=False)
        self.assertEqual(p.returncode, 1)
        self.assertIn("none of its 3 checkpoints is whole", p.stderr.decode())
        os.makedirs(os.path.join(self.tmp.name, "empty"))
        self.refuse([os.path.join(self.tmp.name, "empty"), "--token-ids", "1"], "config.json: No such file")

    def not_finite(self, where, ids, good):
        """Every mode tells in one line that numbers overflow after ids, and writes nothing that is no JSON or no
        number. After `good` (None: there is no such text) all goes as usual."""
        out = os.path.join(self.tmp.name, "out")
        line = json.dumps({"context_ids": good, "continuation_ids": [1]}) + "\n" if good else ""
        bad = json.dumps({"context_ids": ids, "continuation_ids": [1]}) + "\n"
        for options in ([], ["--weights", "int8"], ["--cache", "bf16", "--chunk", "1"],
                        ["--weights", "int8", "--chunk", "1"]):
            for mode in (["--temperature", "0"], ["--samples", "2"], ["--logits", out],
                         ["--attention-map", out, "--layer", "1"]):
                self.refuse([where, "--token-ids", " ".join(map(str, ids))] + mode + options, "not finite")
                self.assertFalse(os.path.exists(out), mode)
            p = run([where, "--score", "-", "--quiet"] + options, stdin=(line + bad + line).encode(), check=False)
            self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), p.stderr)
            self.assertIn(b"its log-probability is not finite", p.stderr)
            self.assertEqual([math.isfinite(json.loads(x)["logprob"]) for x in p.stdout.splitlines()],
                             [True] * bool(good))

    def test_numbers_that_are_not_finite(self):
        """Overflows in each part of the model: of one token's embedding (its norm would be 0), of scores (a maximum and
        e^x could hide them), of values, of the feed-forward, of the head's row of one id that nobody asks for."""
        layer = "model.layers.1."
        for part, names in (
            ("embedding", []),
            ("scores", [layer + "self_attn.q_proj.weight", layer + "self_attn.k_proj.weight"]),
            ("values", [layer + "self_attn.v_proj.weight"]),
            ("feed-forward", [layer + "mlp.up_proj.weight"]),
            ("head", [next(n for n in ("lm_head.weight", "model.embed_tokens.weight") if n in self.case.weights)]),
        ):
            weights = {k: (d, s, array.array("f", v)) for k, (d, s, v) in self.case.weights.items()}
            width = self.case.config["hidden_size"]
            for name in names:
                x = weights[name][2]
                for i in range(50 * width, 51 * width) if part == "head" else range(len(x)):
                    x[i] = 3e38 if x[i] > 0 else -3e38
            embed = weights["model.embed_tokens.weight"][2]
            if part == "embedding":
                embed[7 * width : 8 * width] = array.array("f", [1e25] * width)
            where = os.path.join(self.tmp.name, part)
            Case.write(where, {k: (d, s, v.tobytes()) for k, (d, s, v) in weights.items()}, self.case.config)
            with self.subTest(part):
                self.not_finite(where, [3, 4, 5, 9, 11, 12, 7], [3, 4, 5] if part == "embedding" else None)

    def test_closed_pipe_and_full_disk(self):
        d = self.case.dir
        p = subprocess.Popen([BIN, d, "--token-ids", "1", "--max-tokens", "60", "--quiet", "--samples", "10000"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        p.stdout.read(10)
        p.stdout.close()
        error = p.stderr.read().decode()
        p.stderr.close()
        self.assertEqual(p.wait(60), 1)
        self.assertIn("standard output: Broken pipe", error)
        self.assertEqual(error.count("\n"), 1)
        line = b'{"context_ids":[1],"continuation_ids":[1]}\n'
        for args, stdin in ((["--score", "-"], line * 5000), (["--token-ids", "1", "--samples", "10000"], b"")):
            reader, writer = os.pipe()
            os.close(reader)
            p = subprocess.run([BIN, d, "--quiet"] + args, input=stdin, stdout=writer, stderr=subprocess.PIPE)
            os.close(writer)
            self.assertEqual((p.returncode, p.stderr.decode().count("\n")), (1, 1), p.stderr)
            self.assertIn(b"standard output: Broken pipe", p.stderr)
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                p = subprocess.run([BIN, d, "--token-ids", "1", "--quiet"], stdout=full, stderr=subprocess.PIPE)
            self.assertEqual(p.returncode, 1)
            self.assertIn(b"standard output", p.stderr)

    def test_closed_descriptors(self):
        """A daemon's child: no file of ours gets the number 0, 1 or 2, into which text is printed."""
        out, written = os.path.join(self.tmp.name, "closed.safetensors"), []
        for closed in ([], [0], [1], [2], [0, 1, 2]):
            args = [BIN, self.case.dir, "--token-ids", "1 2 3", "--logits", out]
            p = subprocess.run(args, preexec_fn=lambda: [os.close(fd) for fd in closed])
            self.assertEqual(p.returncode, 0, closed)
            with open(out, "rb") as f:
                written.append(f.read())
            self.assertEqual(written[-1], written[0], closed)

    def test_threads_that_wait_do_not_spin_for_long(self):
        """The program starts itself again with a bound on spinning, where the user has set none; as the same process,
        under the same name, with the same arguments."""
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
        bare = {k: v for k, v in os.environ.items() if k not in names}
        args = [BIN, self.case.dir, "--score", "-", "--quiet"]
        for extra, count in (
            ({}, b"GOMP_SPINCOUNT=1000"),
            ({"OMP_WAIT_POLICY": "active"}, None),
            ({"KMP_BLOCKTIME": "0"}, None),
            ({"GOMP_SPINCOUNT": "7"}, b"GOMP_SPINCOUNT=7"),
        ):
            p = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(bare, **extra))
            p.stdin.write(b'{"context_ids":[1],"continuation_ids":[1]}\n')
            p.stdin.flush()
            self.assertIn(b"logprob", p.stdout.readline())  # main is reached
            seen = []
            for name in ("environ", "cmdline", "comm"):
                with open("/proc/%d/%s" % (p.pid, name), "rb") as f:
                    seen.append(f.read().replace(b"\n", b"\0").split(b"\0"))
            p.communicate()
            spin = [x for x in seen[0] if x.startswith(b"GOMP_SPINCOUNT")]
            self.assertEqual(spin, [count] if count else [], extra)
            self.assertEqual(seen[1][:-1], [os.fsencode(x) for x in args])
            self.assertEqual(seen[2][0], b"infer_mta")

    def test_a_driver_gets_each_answer_at_once(self):
        """--score - answers what has arrived, so that a program may wait for one answer before it asks again."""
        p = subprocess.Popen(
            [BIN, self.case.dir, "--score", "-", "--quiet"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for i in range(3):
            p.stdin.write(b'{"context_ids":[1,2],"continuation_ids":[%d]}\n' % i)
            p.stdin.flush()
            self.assertEqual(json.loads(p.stdout.readline())["tokens"], 1)
        p.stdin.close()
        self.assertEqual(p.stdout.read(), b"")
        p.stdout.close()
        self.assertEqual(p.wait(60), 0)


def text_model(where, torch_free_seed=3, **changes):
    """A byte-level checkpoint of random weights for the tests of text."""
    rng = random.Random(torch_free_seed)
    config = {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "tokenizer": "bytes", "kq_conv_layers": [1], "kq_conv_pre_softmax": True, "kq_conv_post_softmax": True,
        "kq_conv_query_size": 3, "kq_conv_key_size": 5, "head_mix_post_softmax": 2, **changes,
    }
    shapes = {"model.embed_tokens.weight": [259, 16], "model.norm.weight": [16]}
    for i in range(2):
        p = "model.layers.%d." % i
        a = p + "self_attn."
        shapes.update(
            {
                p + "input_layernorm.weight": [16], p + "post_attention_layernorm.weight": [16],
                a + "q_proj.weight": [16, 16], a + "k_proj.weight": [8, 16], a + "v_proj.weight": [8, 16],
                a + "o_proj.weight": [16, 16], a + "head_mix.weight": [1, 2, 2], p + "mlp.gate_proj.weight": [24, 16],
                p + "mlp.up_proj.weight": [24, 16], p + "mlp.down_proj.weight": [16, 24],
            }
        )
    shapes["model.layers.1.self_attn.kq_conv.weight"] = [2, 3, 5]
    shapes["model.layers.1.self_attn.kq_conv_post.weight"] = [2, 3, 5]
    weights = {}
    for name, shape in shapes.items():
        n = math.prod(shape)
        weights[name] = ("F32", shape, array.array("f", [rng.gauss(0, 0.5) for _ in range(n)]).tobytes())
    Case.write(where, weights, config)
    return where


class TextIO(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tmp = tempfile.TemporaryDirectory()
        cls.dir = text_model(os.path.join(cls.tmp.name, "text"))

    @classmethod
    def tearDownClass(cls):
        cls.tmp.cleanup()

    def test_prompt_and_standard_input_agree(self):
        a = run([self.dir, "--prompt", "h\u00e9llo", "--max-tokens", "20", "--quiet"])
        b = run([self.dir, "--max-tokens", "20", "--quiet"], stdin="h\u00e9llo".encode())
        self.assertEqual(a, b)
        self.assertEqual(
            run([self.dir, "--prompt", "h\u00e9llo", "--max-tokens", "20", "--quiet", "--echo"]), "h\u00e9llo" + a
        )
        ids = "256 " + " ".join(map(str, "h\u00e9llo".encode()))
        c = run([self.dir, "--token-ids", ids, "--max-tokens", "20", "--quiet"])
        text = run(["--detokenize", "--tokenizer", "bytes"], stdin=c.encode())
        self.assertEqual(json.loads(text)["text"] + "\n", a)

    def test_long_lines(self):
        """Lines are read in pieces of 64 KiB: their ends before, at and after those of the pieces, the last without."""
        lengths = [65535, 65536, 0, 1, 131071, 200000, 65535 - 131072 % 65536, 3]
        lines = "\n".join('{"text": "%s"}' % ("a" * n) for n in lengths)
        out = run(["--tokenize", "--tokenizer", "bytes"], stdin=lines.encode()).split("\n")
        self.assertEqual([line.split().count("97") for line in out], [*lengths, 0])

    def test_byte_order_marks(self):
        """What editors of other systems put before a text belongs to none, as in data/prepare.py."""
        mark, plain = b"\xef\xbb\xbf", [self.dir, "--max-tokens", "9", "--quiet", "--echo"]
        self.assertEqual(run(plain, stdin=mark + b"hello"), run(plain, stdin=b"hello"))
        for option, line in (("--score", b'{"context": "a", "continuation": "b"}\r\n'),
                             ("--prompts", b'{"prompt": "a", "max_tokens": 3}\r\n')):
            args = [self.dir, option, "-", "--quiet"]
            self.assertEqual(run(args, stdin=mark + line + mark + line), run(args, stdin=2 * line))
        path, config = os.path.join(self.tmp.name, "mark.txt"), read_bytes(os.path.join(self.dir, "config.json"))
        losses = []
        for text in (b"hello", mark + b"hello"):
            with open(path, "wb") as f:
                f.write(text)
            losses.append(run([self.dir, "--perplexity", path, "--quiet"]))
        self.assertEqual(losses[0], losses[1])
        self.assertEqual(json.loads(losses[0])["bytes"], 5)
        with open(path, "wb") as f:
            f.write("hello".encode("utf-16"))
        p = run([self.dir, "--perplexity", path, "--quiet"], check=False)
        self.assertEqual((p.returncode, p.stderr.decode()), (1, "infer_mta: %s: no UTF-8 at byte 0, wanted a text in "
                                                                "UTF-8\n" % path))
        marked = os.path.join(self.tmp.name, "marked")
        text_model(marked)
        with open(os.path.join(marked, "config.json"), "wb") as f:
            f.write(mark + config)
        self.assertEqual(run([marked] + plain[1:], stdin=b"hello"), run(plain, stdin=b"hello"))

    def test_a_prompt_from_the_terminal_is_asked_for(self):
        """The program waited without a word."""
        ours, theirs = pty.openpty()
        p = subprocess.Popen([BIN, self.dir, "--max-tokens", "2"], stdin=theirs, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
        os.close(theirs)
        os.write(ours, b"ab\n\x04")
        said = p.communicate(timeout=60)[1].decode()
        os.close(ours)
        self.assertEqual(p.returncode, 0, said)
        self.assertIn("\nthe prompt, up to Ctrl-D:\n", said)

    def test_signals_that_say_nothing(self):
        """A processor that lacks an instruction, and a limit on the size of files: one line."""
        p = subprocess.Popen([BIN, self.dir], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        p.stderr.readline()  # of what it prints before it waits for its prompt
        p.send_signal(signal.SIGILL)
        said = p.communicate(timeout=60)[1].decode()
        self.assertEqual(p.returncode, 1, said)
        self.assertIn("infer_mta: this processor lacks an instruction", said)
        out = os.path.join(self.tmp.name, "large.safetensors")
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        p = run([self.dir, "--prompt", "abcdefgh", "--logits", out, "--quiet"], check=False, preexec_fn=limit)
        self.assertEqual((p.returncode, p.stderr.decode()),
                         (1, "infer_mta: %s: cannot write: File too large\n" % out))
        self.assertFalse(os.path.exists(out), "no half of a file is left")

    @unittest.skipUnless(shutil.which("qemu-x86_64") and os.uname().machine == "x86_64" and "MTA_BIN" not in os.environ,
                         "no qemu-x86_64 here, no x86-64, or programs under a sanitizer")
    def test_an_older_processor(self):
        """A processor without AVX: one line, though main begins with its instructions (or the answer, where this one
        has none either)."""
        for name in ("infer_mta", "train_mta"):
            p = subprocess.run(["qemu-x86_64", "-cpu", "Nehalem", os.path.join(ROOT, name), "--version"],
                               capture_output=True, text=True, timeout=60)
            said = [line for line in p.stderr.splitlines() if not line.startswith("qemu-x86_64: warning")]
            if p.returncode == 0:
                continue
            self.assertEqual((p.returncode, len(said)), (1, 1), p.stderr)
            self.assertIn(name + ": this processor lacks an instruction", said[0])

    def test_arithmetic_of_finite_numbers_alone_is_refused(self):
        """-Ofast folds isfinite to true: NaN would go on as text."""
        head = ["-include", os.path.join(ROOT, "mta", "util.h"), "-x", "c", "-fsyntax-only", os.devnull]
        for option, status in (("-O2", 0), ("-Ofast", 1), ("-ffast-math", 1), ("-ffinite-math-only", 1)):
            p = subprocess.run([os.environ.get("CC", "cc"), option] + head, stderr=subprocess.PIPE, text=True)
            self.assertEqual(p.returncode, status, (option, p.stderr))
            self.assertEqual("isfinite" in p.stderr, bool(status), p.stderr)

    def test_without_openmp_nothing_is_missing(self):
        """make OPENMP=: infer_mta could not be linked."""
        options = ["-std=gnu11", "-Werror=implicit-function-declaration", "-w", "-fsyntax-only"]
        for name in ("infer_mta.c", "train_mta.c", "test_mta.c"):
            p = subprocess.run([os.environ.get("CC", "cc"), *options, "-H", os.path.join(ROOT, name)], text=True,
                               stderr=subprocess.PIPE)
            self.assertEqual(p.returncode, 0, p.stderr[-2000:])
            self.assertNotIn("/omp.h", p.stderr, name)

    def test_standard_input_is_what_is_left_of_it(self):
        """Of a file that was read from before, the rest; also from a socket, which has no name to be opened by."""
        args = [BIN, self.dir, "--max-tokens", "0", "--echo", "--quiet"]
        with tempfile.TemporaryFile() as f:
            f.write(b"one\ntwo")
            f.flush()
            os.lseek(f.fileno(), 4, os.SEEK_SET)
            self.assertEqual(subprocess.run(args, stdin=f, stdout=subprocess.PIPE).stdout, b"two\n")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(b"three")
            ours.shutdown(socket.SHUT_WR)
            self.assertEqual(subprocess.run(args, stdin=theirs, stdout=subprocess.PIPE).stdout, b"three\n")

    def test_tokenizer_alone(self):
        texts = ["", "abc", '\u00e9\u4e2d\U0001f600\n"\\', "a b"]
        ids = run(
            ["--tokenize", "--tokenizer", "bytes"],
            stdin="".join(json.dumps({"text": t}) + "\n" for t in texts).encode(),
        )
        self.assertEqual([list(map(int, x.split())) for x in ids.split("\n")[:-1]], [list(t.encode()) for t in texts])
        back = run(["--detokenize", "--tokenizer", "bytes"], stdin=ids.encode())
        self.assertEqual([json.loads(x)["text"] for x in back.splitlines()], texts)
        for bad in (b"1 2 32\n", b"1 2\0 3\n"):
            p = run(["--detokenize", "--tokenizer", "toy"], stdin=bad, check=False)
            self.assertEqual((p.returncode, p.stdout), (1, b""))

    def test_score_of_text(self):
        """Text is BOS, context, continuation: the same as their ids."""
        lines = [
            {"context": "ab", "continuation": "cd"},
            {"context_ids": [256, 97, 98], "continuation_ids": [99, 100]},
            {"context": "", "continuation": "xy"},
            {"context_ids": [256], "continuation_ids": [120, 121]},
            {"context": "ab", "context_ids": None, "continuation": "cd", "continuation_ids": None},
        ]
        text = "\n".join(map(json.dumps, lines)).encode()
        # the last line has no end: it may come in later than the others, and is then no part of their batch
        for late in (0, 1):
            p = subprocess.Popen([BIN, self.dir, "--score", "-", "--quiet"], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
            p.stdin.write(text)
            p.stdin.flush()
            first = [p.stdout.readline() for _ in range(4 if late else 0)]
            rest = p.communicate(timeout=300)[0].splitlines()
            self.assertEqual(p.returncode, 0)
            out = [json.loads(x) for x in first + rest]
            self.assertEqual(len(out), len(lines))
            for a, b in ((0, 1), (2, 3), (4, 0)):
                self.assertEqual((out[a]["tokens"], out[a]["greedy"]), (out[b]["tokens"], out[b]["greedy"]))
                for x, y in zip_all(out[a]["token_logprobs"], out[b]["token_logprobs"]):
                    self.assertAlmostEqual(x, y, delta=1e-5)

    def test_interactive(self):
        out = run(
            [self.dir, "--interactive", "--max-tokens", "5", "--quiet", "--temperature", "0"], stdin=b"abc\n\nde\n"
        )
        self.assertGreaterEqual(out.count("\n"), 3)
        whole = run([self.dir, "--prompt", "abc", "--max-tokens", "10", "--quiet", "--temperature", "0"])
        first, second = out.split("\n")[:2]
        self.assertEqual(first + second + "\n", whole)

    def test_stops(self):
        """The text up to the first of the stops and nothing of it, whatever pieces it comes in; of --prompts too."""
        greedy = ["--temperature", "0", "--max-tokens", "40", "--quiet", "--ignore-eos"]
        prompt = [self.dir, "--prompt", "abc", *greedy]
        raw = subprocess.run([BIN, *prompt], stdout=subprocess.PIPE, check=True).stdout[:-1]
        bytes_of = lambda *more: subprocess.run([BIN, *prompt, *more], stdout=subprocess.PIPE, check=True).stdout[:-1]
        self.assertGreater(len(raw), 20)
        tried = 0
        for start, end in [(i, i + n) for i in range(0, len(raw) - 3, 3) for n in (1, 2, 3)]:
            stop = raw[start:end]
            if b"\0" in stop or stop.startswith(b"--"):
                continue
            tried += 1
            want = raw[: raw.index(stop)]
            with self.subTest(stop=stop):
                self.assertEqual(bytes_of(b"--stop=" + stop), want)
        self.assertGreater(tried, 20)
        self.assertEqual(bytes_of("--stop", "no such text", b"--stop=" + raw[9:11], b"--stop=" + raw[6:8]),
                         raw[: min(raw.index(raw[9:11]), raw.index(raw[6:8]))])
        # what was held back as its beginning comes at the end
        self.assertEqual(bytes_of(b"--stop=" + raw[-1:] + b"\x01never"), raw)
        ask = lambda line, *more: json.loads(run([self.dir, "--prompts", "-", *greedy, *more],
                                                 stdin=json.dumps(line).encode()))
        self.assertEqual(ask({"prompt": "abc"}, b"--stop=" + raw[:1])["text"], "")
        p = subprocess.run([BIN, self.dir, "--token-ids", "1", "--stop", "x"], capture_output=True)
        self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1))
        p = subprocess.run([BIN, self.dir, "--prompt", "a", *["--stop", "x"] * 17], capture_output=True)
        self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1))

    def test_stops_that_overlap(self):
        """The one that begins first counts, in whatever order they are given."""
        greedy = ["--temperature", "0", "--max-tokens", "9", "--quiet", "--ignore-eos"]
        prompt = [self.dir, "--prompt", "abc", *greedy]
        raw = subprocess.run([BIN, *prompt], stdout=subprocess.PIPE, check=True).stdout[:-1]
        inner, outer = b"--stop=" + raw[3:5], b"--stop=" + raw[1:5]
        for stops in ((inner, outer), (outer, inner)):
            out = subprocess.run([BIN, *prompt, *stops], stdout=subprocess.PIPE, check=True).stdout
            self.assertEqual(out, raw[:1] + b"\n", stops)

    def test_standard_input_that_cannot_be_read(self):
        """A folder, or a batch that is cut off, is no end of the input."""
        alone = ["--tokenize", "--binary", "--tokenizer", "bytes"]
        folder = os.open(self.tmp.name, os.O_RDONLY)
        for args, stdin, what in (([self.dir, "--interactive", "--quiet"], folder, b"Is a directory"),
                                  (alone, folder, b"Is a directory"), (alone, b"abc", b"it ends inside a batch")):
            given = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
            p = subprocess.run([BIN, *args], capture_output=True, **given)
            self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), p)
            self.assertIn(b"infer_mta: standard input: " + what, p.stderr)
        os.close(folder)

    def test_lines_of_half_the_context_shift(self):
        """--shift makes room for a line of exactly half the positions too."""
        lines = b"x" * 40 + b"\n" + b"y" * 32 + b"\n"
        p = run([self.dir, "--interactive", "--shift", "--quiet", "--max-tokens", "2"], stdin=lines, check=False)
        self.assertEqual((p.returncode, p.stderr), (0, b""))

    def test_what_shift_leaves_out_is_said(self):
        """Of a prompt that is longer than the context, of requests and of contexts: how many tokens, or how many."""
        out = os.path.join(self.tmp.name, "logits")
        for more in (["--max-tokens", "1"], ["--logits", out]):
            p = run([self.dir, "--prompt", "x" * 70, "--shift", "--quiet", *more], check=False)
            said = "infer_mta: 38 of 70 tokens are left out, the earliest: the context has 64 positions\n"
            self.assertEqual((p.returncode, p.stderr.decode()), (0, said))
        self.assertEqual(read_safetensors(out)[0]["logits"][1], [33, 259])
        long, short = ("x" * 70, "y")
        for mode, lines, words in (
            ("--prompts", [{"prompt": x, "max_tokens": 1} for x in (long, short, long)],
             "; 2 prompts without their earliest tokens; "),
            ("--score", [{"context": x, "continuation": "z"} for x in (long, short, long)],
             " passes over the weights, 2 contexts without their earliest tokens\n"),
        ):
            p = run([self.dir, mode, "-", "--shift"], stdin="\n".join(map(json.dumps, lines)).encode(), check=False)
            self.assertEqual((p.returncode, p.stdout.count(b"\n")), (0, 3))
            self.assertIn(words, p.stderr.decode())
        p = run([self.dir, "--score", "-", "--shift"], stdin=json.dumps(lines[1]).encode(), check=False)
        self.assertNotIn(b"without", p.stderr)

    def test_lines_that_are_waited_for(self):
        """A pipe that does not block, as a driver may leave it, is waited for."""
        for mode, line in (("--score", {"context": "a", "continuation": "b"}), ("--prompts", {"prompt": "a"})):
            ours, theirs = os.pipe()
            os.set_blocking(ours, False)
            with subprocess.Popen([BIN, self.dir, mode, "-", "--max-tokens", "2", "--quiet"], stdin=ours,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:
                os.close(ours)
                time.sleep(0.2)
                os.write(theirs, json.dumps(line).encode() + b"\n")
                self.assertEqual(p.stdout.read(1), b"{")
                os.close(theirs)
                p.stdout.read()
                self.assertEqual(p.wait(60), 0)

    def test_the_penalty_counts_once(self):
        """Where an answer ended at once and an empty line goes on, recent tokens are not penalised a second time."""
        where, out = text_model(os.path.join(self.tmp.name, "penalty")), os.path.join(self.tmp.name, "penalty.logits")
        run([where, "--prompt", "abc", "--logits", out, "--quiet"])
        last = floats(read_safetensors(out)[0]["logits"][2])[-259:]
        best, recent = max(range(256), key=last.__getitem__), max(last[i] for i in b"abc")
        self.assertGreater(last[best], recent)
        self.assertGreater(recent, 0)
        with open(os.path.join(where, "generation_config.json"), "w") as f:
            json.dump({"eos_token_id": best}, f)
        penalty = (recent / last[best]) ** 0.75  # applied twice it would lift a recent token above the best
        ask = ["--interactive", "--temperature", "0", "--max-tokens", "1", "--quiet", "--repeat-penalty", str(penalty)]
        self.assertEqual(run([where, *ask], stdin=b"abc\n\n"), "\n\n")

    def test_no_output_takes_the_place_of_the_model(self):
        where = text_model(os.path.join(self.tmp.name, "own"))
        names = read_safetensors(os.path.join(where, "model.safetensors"))[0]
        index = {"weight_map": {name: "model.safetensors" for name in names}}
        with open(os.path.join(where, "model.safetensors.index.json"), "w") as f:
            json.dump(index, f)
        for name in ("model.safetensors", "config.json", "model.safetensors.index.json"):
            path = os.path.join(where, name)
            before = read_bytes(path)
            for option in ("--logits", "--attention-map"):
                p = run([where, "--prompt", "a", option, path, "--quiet"], check=False)
                self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), p.stderr)
                self.assertIn(option.encode() + b": " + path.encode(), p.stderr)
                self.assertEqual(read_bytes(path), before)

    def test_typing_is_not_counted(self):
        """Tokens a second are of the time in which the model computes, not of that in which it asks for a line."""
        arguments = [BIN, self.dir, "--interactive", "--max-tokens", "20", "--ignore-eos", "--shift"]
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        began, typing = time.monotonic(), 0
        with subprocess.Popen(arguments, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
            os.close(theirs)
            for line in (b"abc\n", b"d\n", b"e\n", b"\4"):
                said = b""
                while not said.endswith(b"> "):
                    said += os.read(p.stdout.fileno(), 4096)
                    self.assertIsNone(p.poll())
                asked = time.monotonic()
                time.sleep(0.5)
                typing += time.monotonic() - asked
                os.write(ours, line)
            _, error = p.communicate(timeout=60)
        others = time.monotonic() - began - typing
        found = re.search(r"prompt (\d+) tokens, ([\d.]+) tokens/s; decode (\d+) tokens, ([\d.]+)", error.decode())
        prompt, prompt_rate, decoded, rate = map(float, found.groups())
        self.assertGreaterEqual(decoded, 50)
        self.assertLess(decoded / rate + prompt / prompt_rate, 1.05 * others + 0.1, error)

    def test_interrupt_stops_the_answer(self):
        p = subprocess.Popen([BIN, self.dir, "--interactive", "--max-tokens", "100000000", "--shift", "--quiet"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        p.stdin.write(b"abc\n")
        p.stdin.flush()
        p.stdout.read(20)
        p.send_signal(signal.SIGINT)
        time.sleep(0.2)
        self.assertIsNone(p.poll())
        p.stdin.close()
        while p.stdout.read(65536):
            pass
        p.stdout.close()
        self.assertEqual(p.wait(60), 0)

    def test_a_line_that_has_no_ids(self):
        """Who types it at a terminal is told and goes on, as of a line that is too long; of a file it is the end."""
        args = [BIN, os.path.join(ROOT, "dev", "models", "toy"), "--interactive", "--max-tokens", "3", "--quiet"]
        told = b"infer_mta: byte 0x41 at offset 0: the toy tokenizer has only a-z . # _\n"
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        with subprocess.Popen(args, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
            os.close(theirs)
            os.write(ours, b"ab\nAb\nab\n\4")
            out, error = p.communicate(timeout=60)
        self.assertEqual((p.returncode, error, out.count(b"> "), out.count(b"\n")), (0, told, 4, 2))
        told_long = b"infer_mta: 47 tokens, the context has 45 positions; shorten the prompt or use --shift\n"
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        with subprocess.Popen(args, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
            os.close(theirs)
            os.write(ours, b"a" * 46 + b"\nab\n\4")
            out, error = p.communicate(timeout=60)
        self.assertEqual((p.returncode, error, out.count(b"> ")), (0, told_long, 3))
        p = subprocess.run(args, input=b"ab\nAb\nab\n", capture_output=True)
        self.assertEqual((p.returncode, p.stderr), (1, told.replace(b": byte", b": prompt: byte")))

    def test_interrupt_of_an_answer_that_nobody_reads(self):
        """Ctrl-C while a full pipe, or a stopped terminal, is waited for ends the answer and not the session."""
        unread = lambda f: struct.unpack("i", fcntl.ioctl(f, termios.FIONREAD, bytes(4)))[0]
        endless = [BIN, self.dir, "--interactive", "--max-tokens", "100000000", "--shift", "--ignore-eos", "--quiet"]
        with subprocess.Popen(endless, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
            fcntl.fcntl(p.stdout, getattr(fcntl, "F_SETPIPE_SZ", 1031), 4096)
            p.stdin.write(b"abc\n")
            p.stdin.flush()
            held = 0
            while not held or held != unread(p.stdout):  # until it is full
                held = unread(p.stdout)
                time.sleep(0.2)
            p.send_signal(signal.SIGINT)
            time.sleep(0.2)
            self.assertIsNone(p.poll())
            self.assertEqual(p.communicate(timeout=60)[1], b"")
            self.assertEqual(p.returncode, 0)

    def test_picture_of_attention(self):
        """scripts/attention_map.py draws the weights over a prompt, whose tokens may be any characters."""
        python, other = sys.executable, os.path.join(ROOT, "data", ".venv", "bin", "python")
        if not importlib.util.find_spec("matplotlib"):
            python = other
            if not os.path.exists(other) or subprocess.call([other, "-c", "import matplotlib"],
                                                            stderr=subprocess.DEVNULL):
                self.skipTest("no matplotlib here")
        sys.path.insert(0, os.path.join(ROOT, "scripts"))
        import attention_map

        out = os.path.join(self.tmp.name, "map.png")
        options = [self.dir, "--infer", BIN, "--prompt", "a $b\n\u00e9", "--layer", "1", "--out", out]
        args = [python, attention_map.__file__, *options]
        subprocess.run(args, check=True, stdout=subprocess.DEVNULL)
        with open(out, "rb") as f:
            self.assertEqual(f.read(8), b"\x89PNG\r\n\x1a\n")
        one = png_size(out)
        ascii_alone = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        subprocess.run(args + ["--head", "all"], check=True, stdout=subprocess.DEVNULL, env=ascii_alone)
        self.assertGreater(png_size(out)[1], 1.5 * one[1], "a row for each head")
        written, odd = (os.path.join(self.tmp.name, name) for name in ("map.json", "odd.json"))
        run([self.dir, "--prompt", "a", "--attention-map", written, "--quiet"])
        with open(written) as f:
            good = json.load(f)
        self.assertEqual(good["tokens"], ["<BOS>", "a"])
        drawn = ["--out", out, "--json"]
        here = [self.dir, "--infer", BIN]
        for words, said in (([*options, "--head", "1_0"], "--head: got '1_0'"),
                            ([*options, "--token-ids", "1"], "not allowed with"),
                            ([*options, "--json", out], "--json FILE"),
                            ([*drawn, written, "--layer", "0"], "--layer: no use beside --json"),
                            ([*drawn, written, "--prompt", ""], "--prompt: no use beside --json"),
                            (here, "wanted --prompt TEXT")):
            self.refused_picture(attention_map, words, said)
        for bad in ([], {}, dict(good, tokens=[]), dict(good, after=[[None], [1, 2]]), dict(good, before=[[1]])):
            with open(odd, "w") as f:
                json.dump(bad, f)
            self.refused_picture(attention_map, [*drawn, odd], "no map as infer_mta")
        with open(odd, "w") as f:
            f.write("[1")
        self.refused_picture(attention_map, [*drawn, written, odd], "odd.json: no JSON")
        sizes = []
        for files in ([written], [written, "--json", written]):  # all are drawn
            subprocess.run([python, attention_map.__file__, *drawn, *files], check=True, stdout=subprocess.DEVNULL)
            sizes.append(png_size(out)[1])
        self.assertGreater(sizes[1], 1.5 * sizes[0])
        subprocess.run([python, attention_map.__file__, *here, "--prompt=--x", "--out", out[:-4]], check=True,
                       stdout=subprocess.DEVNULL)
        png_size(out[:-4])  # the file that was named, not that with an ending
        p = subprocess.run(args + ["--head", "7"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), p.stderr)

    def refused_picture(self, attention_map, options, said):
        done = call(attention_map, *options)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertIn(said, done.stderr)

    def test_model_class_of_the_evaluation_harness(self):
        """scripts/lm_eval_mta.py through the calls of lm-evaluation-harness, whose two classes stand in here: each
        answer is what --score says of the same ids."""
        harness = os.path.join(self.tmp.name, "harness", "lm_eval", "api")
        os.makedirs(harness)
        for name, text in (
            ("../__init__.py", ""),
            ("__init__.py", ""),
            ("model.py", "class LM:\n    pass\n"),
            ("registry.py", "def register_model(name):\n    return lambda c: c\n"),
        ):
            with open(os.path.join(harness, name), "w") as f:
                f.write(text)
        for path in (os.path.join(self.tmp.name, "harness"), os.path.join(ROOT, "scripts")):
            sys.path.insert(0, path)
            self.addCleanup(sys.path.remove, path)
        import lm_eval_mta

        class Instance:
            def __init__(self, *args):
                self.args = args

        def score(context, continuation):
            line = json.dumps({"context_ids": context, "continuation_ids": continuation})
            return json.loads(run([self.dir, "--score", "-", "--quiet"], stdin=line.encode()))

        model = lm_eval_mta.MtaLM(self.dir, infer=BIN)
        self.addCleanup(model.close)
        pairs = [("ab ", "cd"), ("", "xy"), ("ab", " cd"), ("long " * 20, "end")]
        got = model.loglikelihood([Instance(*p) for p in pairs])
        ids = [256] + list(b"ab")
        self.assertEqual(got[0], got[2])  # a blank at the end of a context belongs to the continuation
        for answer, (context, end) in zip(got, ((ids, b" cd"), ([256], b"xy"), (ids, b" cd"))):
            want = score(context, list(end))
            self.assertAlmostEqual(answer[0], want["logprob"], delta=1e-5)
            self.assertEqual(answer[1], want["greedy"])
        self.assertTrue(math.isfinite(got[3][0]))  # longer than the context: its earliest tokens are dropped
        text = "".join(chr(97 + i % 26) for i in range(150))
        tokens, want = list(text.encode()), 0
        for start in range(0, 150, 64):  # windows of the model's 64 positions, the last one with a whole context too
            end = min(start + 64, 150)
            context = tokens[end - 65 : start] if start else [256]
            want += score(context, tokens[start:end])["logprob"]
        self.assertAlmostEqual(model.loglikelihood_rolling([Instance(text)])[0], want, delta=1e-3)
        whole = run([self.dir, "--prompt", "abc", "--max-tokens", "9", "--temperature", "0", "--quiet"])[:-1]
        answers = model.generate_until([Instance("abc", {"until": [], "max_gen_toks": 9})])
        self.assertEqual(answers, [whole])
        cut = model.generate_until([Instance("abc", {"until": [whole[3]], "max_gen_toks": 9})])
        self.assertEqual(cut, [whole[: whole.index(whole[3])]])

    def test_request_without_a_length(self):
        """The default of 256 tokens is no reason to refuse in a context of less than twice that: half is left to the
        prompt. A length that was asked for is. null is no value."""
        lines = b'{"prompt": "a"}\n{"prompt": "a", "max_tokens": null, "until": null, "temperature": null}\n'
        answers = run([self.dir, "--prompts", "-", "--quiet", "--temperature", "0"], stdin=lines).splitlines()
        self.assertEqual(answers, answers[:1] * 2)
        where = text_model(os.path.join(self.tmp.name, "of_320"), max_position_embeddings=320)
        prompt = json.dumps({"prompt": "a" * 159}).encode() + b"\n"  # and BOS: half of it
        answer = json.loads(run([where, "--prompts", "-", "--quiet", "--ignore-eos"], stdin=prompt))
        self.assertEqual(answer["tokens"], 160)
        asked = ((b'{"prompt": "a", "max_tokens": 256}\n', []), (b'{"prompt": "a"}\n', ["--max-tokens", "256"]))
        for line, more in asked:
            p = run([self.dir, "--prompts", "-", "--quiet", *more], stdin=line, check=False)
            self.assertEqual((p.returncode, p.stdout, p.stderr.count(b"\n")), (1, b"", 1), p.stderr)
            self.assertIn(b"and 256 to come, the context has 64 positions", p.stderr)

    def test_keys_of_a_request_that_are_passed_over(self):
        """Each is named once, where it is first seen."""
        lines = b'{"prompt": "a", "max_tokens": 0}\n{"prompt": "a", "max_tokens": 0, "stop": ["b"], "id": 1}\n'
        lines += b'{"prompt": "a", "max_tokens": 0, "id": 2, "temprature": 0}\n'
        p = run([self.dir, "--prompts", "-", "--quiet"], stdin=lines, check=False)
        for words in (b'line 2: "stop" is ignored', b'line 2: "id" is', b'line 3: "temprature" is'):
            self.assertIn(words, p.stderr)
        self.assertEqual((p.stderr.count(b"\n"), p.stdout.count(b"\n")), (3, 3))

    def test_perplexity_of_a_text(self):
        """Each token once, in windows of the model's 64 positions that move on by the stride: what --score says of
        them."""
        path = os.path.join(self.tmp.name, "text.txt")
        for length, stride in ((150, None), (150, 7), (150, 64), (64, None), (65, 1), (1, None)):
            tokens = [256] + [97 + i * i % 26 for i in range(length)]
            with open(path, "wb") as f:
                f.write(bytes(tokens[1:]))
            lines, done = [], 1
            while done <= length:
                end = min(65 if done == 1 else done + (stride or 32), length + 1)
                start = max(0, end - 65)
                lines.append({"context_ids": tokens[start:done], "continuation_ids": tokens[done:end]})
                done = end
            answers = run([self.dir, "--score", "-", "--quiet"], stdin="\n".join(map(json.dumps, lines)).encode())
            want = -sum(json.loads(a)["logprob"] for a in answers.splitlines())
            got = json.loads(run([self.dir, "--perplexity", path,
                                  "--quiet"] + (["--stride", str(stride)] if stride else [])))
            self.assertEqual([got[k] for k in ("tokens", "bytes", "windows")], [length, length, len(lines)])
            self.assertAlmostEqual(got["nats"], want, delta=1e-4 * want)
            self.assertAlmostEqual(got["perplexity"], math.exp(got["nats"] / length), delta=1e-6 * got["perplexity"])
            self.assertAlmostEqual(got["bits_per_byte"], got["nats_per_byte"] / math.log(2), delta=1e-6)
        for options, words in (
            (["--perplexity", path, "--stride", "65"], "64 positions"),
            (["--prompt", "a", "--stride", "3"], "belongs to --perplexity"),
            (["--prompt", "a", "--layer", "1"], "belongs to --attention-map"),
            (["--perplexity", path, "--score", "-"], "exclude"),
            (["--perplexity", os.devnull], "no text"),
            (["--perplexity", path + ".none"], "No such file"),
        ):
            p = run([self.dir] + options + ["--quiet"], check=False)
            self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), p.stderr)
            self.assertIn(words, p.stderr.decode())

    def test_options_without_use(self):
        """What would do nothing is named, with the modes that it belongs to, and refused where it asks for something
        that the mode does not do; what a mode uses is taken."""
        for name, text in (("score", '{"context": "a", "continuation": "b"}'), ("perplexity", "some text"),
                           ("prompts", '{"prompt": "a", "max_tokens": 1}')):
            with open(os.path.join(self.tmp.name, name), "w") as f:
                f.write(text + "\n")
        modes = {name: ["--" + name, os.path.join(self.tmp.name, name)] for name in ("score", "prompts", "perplexity")}
        modes.update(prompt=["--prompt", "a"], ids=["--token-ids", "1 2"], interactive=["--interactive"],
                     tokenize=["--tokenize"], logits=["--prompt", "a", "--logits", os.path.join(self.tmp.name, "l")])
        generate = {"prompt", "ids", "prompts", "interactive"}
        uses = {"--temperature=1": generate, "--top-k=3": generate, "--top-p=0.5": generate, "--min-p=0.1": generate,
                "--seed=2": generate, "--repeat-penalty=2": generate, "--max-tokens=1": generate,
                "--ignore-eos": generate, "--stop=x": generate - {"ids"}, "--samples=2": {"prompt", "ids"},
                "--echo": {"prompt", "logits"}, "--shift": generate | {"score", "logits"}, "--stride=5": {"perplexity"},
                "--layer=0": set(), "--binary": {"tokenize"}, "--threads=1": set(modes) - {"tokenize"}}
        for option, those in uses.items():
            for mode, words in modes.items():
                with self.subTest(option=option, mode=mode):
                    p = run([self.dir, *words, option, "--quiet"], check=False)
                    if mode in those:
                        self.assertEqual((p.returncode, b"no use" in p.stderr), (0, False), p.stderr)
                    else:
                        name = option.split("=")[0]
                        refused = name in ("--stop", "--samples", "--stride", "--layer", "--binary")
                        self.assertEqual(p.returncode, int(refused), p.stderr)
                        self.assertEqual(p.stderr.decode().count("%s: no use beside" % name), 1, p.stderr)
                        if refused:
                            self.assertEqual((p.stdout, p.stderr.count(b"\n")), (b"", 1))
        p = run([self.dir, "--prompt", "a", "--repeat-last", "3", "--quiet"], check=False)
        self.assertIn(b"--repeat-last does nothing without --repeat-penalty", p.stderr)
        p = run([self.dir, "--prompt", "a", "--mapped", "--weights", "int8", "--quiet"], check=False)
        self.assertIn(b"--mapped does nothing without --weights stored", p.stderr)
        ids = ["--token-ids", "1", "--logits", os.path.join(self.tmp.name, "l"), "--echo"]
        self.assertEqual(run([self.dir, *ids, "--quiet"], check=False).stderr.count(b"--echo"), 1)
        p = run(["--detokenize"], stdin=b"1", check=False)
        self.assertEqual(p.stderr, b"infer_mta: --detokenize needs --tokenizer NAME|FILE or a checkpoint directory\n")
        for words, why in ((["--token-ids", ""], "--token-ids: the list is empty"),
                           (["--logits", "x", "--score", "-"], "exclude each other"),
                           (["--prompt", "a", "--token-ids", "1"], "exclude each other"),
                           (["--prompt", "a", "--score", "-"], "--prompt: no use beside --score")):
            p = run([self.dir, *words, "--quiet"], check=False)
            self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), p.stderr)
            self.assertIn(why, p.stderr.decode())

    def test_pattern_of_config_json(self):
        """A rank file whose number of ranks tells no pattern is split as config.json says, or as its copy's name
        does."""
        ranks = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i)
                         for i in range(256)) + b"MTI= 256\nMzQ= 257\nMTIz 258\nMTIzNA== 259\n"
        with open(os.path.join(self.dir, "config.json")) as f:
            config = json.load(f)
        for name, extra, want in (
            ("x.bin", {"tokenizer_pattern": "gpt2"}, "259"),  # \p{N}+: "1234" is one piece, and a token
            ("x.bin", {"tokenizer_pattern": "llama3"}, "258 52"),  # \p{N}{1,3}
            ("gpt2.tiktoken", {}, "259"),
            ("llama3.tiktoken", {"tokenizer_pattern": "gpt2"}, "259"),
            ("x.bin", {}, None),
        ):
            where = tempfile.mkdtemp(dir=self.tmp.name)
            with open(os.path.join(where, "config.json"), "w") as f:
                json.dump(dict(config, tokenizer=name, vocab_size=1000, **extra), f)
            with open(os.path.join(where, name), "wb") as f:
                f.write(ranks)
            p = run([where, "--tokenize"], stdin=b'{"text": "1234"}\n', check=False)
            if want:
                self.assertEqual((p.returncode, p.stdout.decode().strip()), (0, want), p.stderr)
                other = "llama3" if want == "259" else "gpt2"  # another than the model was trained with
                for more in (["--pattern", other], ["--pattern", other, "--tokenizer", os.path.join(where, name)]):
                    p = run([where, "--tokenize", *more], stdin=b'{"text": "1234"}\n', check=False)
                    self.assertEqual((p.returncode, p.stderr.count(b"\n")), (1, 1), p.stderr)
                    self.assertIn(b"the model was trained with", p.stderr)
            else:
                self.assertEqual(p.returncode, 1)
                self.assertIn(b"260 ranks, which no known tokenizer has; add --pattern", p.stderr)

    def test_ids_without_the_tokenizer_of_config_json(self):
        """Ids need no tokenizer, but what may be drawn is what it has: one that is there and cannot be opened is
        refused with ids too, one that is absent said."""
        with open(os.path.join(self.dir, "config.json")) as f:
            config = json.load(f)
        request = b'{"context_ids": [97], "continuation_ids": [98]}\n'
        both = ((["--token-ids", "97"], b""), (["--score", "-"], request))
        for words, stdin in both:
            p = run([self.dir, *words, "--pattern", "gpt2", "--quiet"], stdin=stdin, check=False)
            self.assertEqual((p.returncode, p.stdout), (1, b""), p.stderr)
            self.assertEqual(p.stderr, b"infer_mta: tokenizer bytes: built in, it takes no pattern gpt2\n")
        where = os.path.join(self.tmp.name, "no_ranks")
        shutil.copytree(self.dir, where)
        with open(os.path.join(where, "config.json"), "w") as f:
            json.dump(dict(config, tokenizer="x.bin", tokenizer_pattern="gpt2"), f)
        for words, stdin in both:
            p = run([where, *words, "--max-tokens", "3"], stdin=stdin, check=False)
            self.assertEqual(p.returncode, 0, p.stderr)
            self.assertEqual(b"x.bin: no such file" in p.stderr, words[0] == "--token-ids", p.stderr)
        with open(os.path.join(where, "x.bin"), "wb") as f:
            f.write(b"no ranks\n")
        for words, stdin in both:
            p = run([where, *words, "--quiet"], stdin=stdin, check=False)
            self.assertEqual((p.returncode, p.stdout, p.stderr.count(b"\n")), (1, b"", 1), p.stderr)
            self.assertIn(b"x.bin", p.stderr)

    def test_another_rank_file_of_the_same_size(self):
        """--tokenizer with as many ranks as the model's, but others: by the copy, by the manifest alone, by its
        name."""
        order = list(range(256))
        lines = [b"%s %d\n" % (base64.b64encode(bytes([b])), i) for i, b in enumerate(order)]
        ranks, other = b"".join(lines), b"".join(b"%s %d\n" % (base64.b64encode(bytes([b])), i)
                                                 for i, b in enumerate(order[::-1]))
        with open(os.path.join(self.dir, "config.json")) as f:
            config = json.load(f)
        where, given = tempfile.mkdtemp(dir=self.tmp.name), os.path.join(self.tmp.name, "given.tiktoken")
        copy = os.path.join(where, "gpt2.tiktoken")
        with open(os.path.join(where, "config.json"), "w") as f:
            json.dump(dict(config, tokenizer="gpt2.tiktoken", tokenizer_pattern="gpt2", vocab_size=1000), f)

        def tokenize(text, *more):
            with open(given, "wb") as f:
                f.write(text)
            args = [where, "--tokenize", "--tokenizer", given, "--pattern", "gpt2", *more]
            return run(args, stdin=b'{"text": "a"}\n', check=False)

        def refused(p, words):
            self.assertEqual((p.returncode, p.stdout, p.stderr.count(b"\n")), (1, b"", 1), p.stderr)
            self.assertIn(words, p.stderr)

        self.assertEqual(tokenize(other).returncode, 0)  # nothing is known
        with open(copy, "wb") as f:
            f.write(ranks)
        refused(tokenize(other), b"but the model was trained with gpt2.tiktoken of")
        refused(tokenize(ranks + b"\n"), b"but the model was trained with gpt2.tiktoken of")
        self.assertEqual(tokenize(ranks).stdout, b"97\n")
        self.assertEqual(tokenize(other, "--no-verify").stdout, b"158\n")
        os.remove(copy)
        with open(os.path.join(where, "manifest.json"), "w") as f:
            json.dump({"step": 1, "files": {"gpt2.tiktoken": {"bytes": len(ranks), "crc32": zlib.crc32(ranks)}}}, f)
        refused(tokenize(other), b"but the model was trained with gpt2.tiktoken of")
        self.assertEqual(tokenize(ranks).stdout, b"97\n")
        refused(tokenize(ranks, "--pattern", "llama3"), b"split as llama3, but the model was trained with gpt2")
        os.remove(os.path.join(where, "manifest.json"))
        refused(tokenize(ranks, "--pattern", "llama3"), b"split as llama3, but the model was trained with gpt2")

    def on_a_terminal(self, prompt, **locale):
        bare = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LC_CTYPE", "LANG")}
        master, slave = pty.openpty()
        args = [BIN, self.dir, "--prompt", prompt, "--echo", "--max-tokens", "0", "--quiet"]
        p = subprocess.Popen(args, stdout=slave, env=dict(bare, **locale))
        p.wait(60)
        os.close(slave)
        got = os.read(master, 1000)
        os.close(master)
        return got

    def test_control_characters_on_a_terminal(self):
        self.assertIn(b"a\\x1b[31mb\\x7f\\x85c\t", self.on_a_terminal("a\x1b[31mb\x7f\u0085c\t"))

    def test_terminal_without_utf8(self):
        """Bytes that another character set would show as other letters, or obey (0x9b), are shown by their numbers."""
        text = "h\u00e9\u8bdb."
        for locale in ({}, {"LANG": "C"}, {"LANG": "de_DE.UTF-8"}, {"LC_ALL": "C.utf8"},
                       {"LC_ALL": "", "LANG": "en_US.utf8@euro"}):
            self.assertIn(text.encode(), self.on_a_terminal(text, **locale), locale)
        for locale in ({"LANG": "de_DE.ISO-8859-1"}, {"LC_ALL": "ja_JP.eucJP", "LANG": "ja_JP.UTF-8"},
                       {"LC_CTYPE": "ru_RU.KOI8-R"}):
            self.assertIn(b"h\\xc3\\xa9\\xe8\\xaf\\x9b.", self.on_a_terminal(text, **locale), locale)


@unittest.skipIf(torch is None, "no PyTorch here")
class Reference(unittest.TestCase):
    """Models like the golden ones with 512 positions, against the PyTorch reference in dev/ref."""

    KINDS = {
        "plain": dict(),
        "mta": dict(kq_conv_layers=[1], head_mix_post_softmax=2, head_norm="group_depth_scaled"),
        "full": dict(
            kq_conv_layers=[0], kq_conv_post_softmax=True, head_mix_pre_softmax=4, head_mix_post_softmax=4,
            head_norm="group", head_gate=True,
        ),
        "post": dict(
            kq_conv_layers=[0, 1], kq_conv_pre_softmax=False, kq_conv_post_softmax=True, head_mix_pre_softmax=2
        ),
        "toy": dict(kq_conv_layers=[0, 1], kq_conv_query_size=2, kq_conv_key_size=9),
        "diff": dict(attention_type="diff", head_norm="group_depth_scaled"),
        "diff_gqa": dict(attention_type="diff", head_norm="group", num_key_value_heads=2),
        "gqa": dict(num_key_value_heads=2, kq_conv_layers=[0], head_mix_post_softmax=2, head_norm="group",
                    tie_word_embeddings=False),
        "tall": dict(kq_conv_layers=[0, 1], kq_conv_query_size=9, kq_conv_key_size=3, kq_conv_post_softmax=True),
        "one_by_one": dict(kq_conv_layers=[0, 1], kq_conv_query_size=1, kq_conv_key_size=1, kq_conv_post_softmax=True),
    }

    def model(self, kind, where, seed):
        kw = dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=61,
        )
        config = mta_ref.make_config(**dict(kw, **self.KINDS[kind]))
        config["max_position_embeddings"] = 512
        w = mta_ref.random_weights(config, seed)
        os.makedirs(where)
        mta_ref.save_safetensors(os.path.join(where, "model.safetensors"), w, {"format": "pt"})
        with open(os.path.join(where, "config.json"), "w") as f:
            json.dump(config, f)
        return config, {k: v.double() for k, v in w.items()}

    def test_greedy_and_scores(self):
        """200 greedy tokens equal the reference's own continuation; scores of a text of 300 tokens within 1e-4."""
        for number, kind in enumerate(self.KINDS):
            with tempfile.TemporaryDirectory() as tmp:
                where = os.path.join(tmp, kind)
                config, w = self.model(kind, where, 100 + number)
                rng = random.Random(number)
                prompt = [rng.randrange(61) for _ in range(9)]
                out = run(
                    [
                        where, "--token-ids", " ".join(map(str, prompt)), "--temperature", "0", "--max-tokens", "200",
                        "--quiet",
                    ]
                )
                got = list(map(int, out.split()))
                self.assertEqual(len(got), 200)
                # One pass over the result: each id must be the argmax of the reference given those before it.
                with torch.no_grad():
                    logits = mta_ref.forward(torch.tensor([prompt + got]), w, config)[0]
                self.assertEqual(got, logits[len(prompt) - 1 : -1].argmax(-1).tolist(), kind)
                ids = [rng.randrange(61) for _ in range(300)]
                lines = [{"context_ids": ids[:k], "continuation_ids": ids[k:]} for k in (1, 5, 6, 150, 299)]
                answers = run(
                    [where, "--score", "-", "--quiet"], stdin="\n".join(map(json.dumps, lines)).encode()
                ).splitlines()
                with torch.no_grad():
                    logp = mta_ref.forward(torch.tensor([ids]), w, config)[0].log_softmax(-1)
                for line, a in zip_all(lines, map(json.loads, answers)):
                    k = len(line["context_ids"])
                    want = [logp[t - 1, ids[t]].item() for t in range(k, 300)]
                    self.assertLess(worst(abs(x - y) for x, y in zip_all(a["token_logprobs"], want)), 1e-4, kind)
                    self.assertLess(abs(a["logprob"] - sum(want)), 1e-4 * max(1, len(want) / 100), kind)

    def test_attention_map(self):
        """Weights of every head of layer 0, before and after convolution and mixing, as the reference has them."""
        for number, kind in enumerate(self.KINDS):
            with tempfile.TemporaryDirectory() as tmp:
                where, out = os.path.join(tmp, kind), os.path.join(tmp, "map.json")
                config, w = self.model(kind, where, 200 + number)
                ids = [random.Random(number + i).randrange(61) for i in range(40)]
                before, after = self.maps(ids, w, config)
                for head in range(4):
                    args = ["--token-ids", " ".join(map(str, ids)), "--attention-map", out, "--head", str(head)]
                    run([where, "--quiet"] + args)
                    with open(out) as f:
                        got = json.load(f)
                    for key, want in (("before", before), ("after", after)):
                        self.assertEqual(len(got[key]), len(ids))
                        for i, row in enumerate(got[key]):
                            error = (torch.tensor(row, dtype=torch.float64) - want[head][i, : i + 1]).abs().max().item()
                            self.assertLess(error, 1e-5, "%s head %d %s row %d" % (kind, head, key, i))

    @staticmethod
    def maps(ids, w, c):
        """(heads, T, T) of layer 0: plain softmax, and what multiplies the values (both heads of a pair: the same)."""
        p, heads, n = "model.layers.0.self_attn.", c["num_attention_heads"], len(ids)
        x, norm = w["model.embed_tokens.weight"][ids], w["model.layers.0.input_layernorm.weight"]
        x = mta_ref.rms(x, norm, c["rms_norm_eps"])
        q, k = (
            mta_ref.rope((x @ w[p + name].T).view(1, n, -1, c["hidden_size"] // heads).transpose(1, 2), c["rope_theta"])
            for name in ("q_proj.weight", "k_proj.weight")
        )
        k = k.repeat_interleave(heads // k.shape[1], 1)
        causal = torch.ones(n, n).tril().bool()
        s = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        softmax = lambda z: z.masked_fill(~causal, -math.inf).softmax(-1)
        a = before = softmax(s)
        if c["attention_type"] == "diff":
            dots = [(w[p + "lambda_q%d" % i] * w[p + "lambda_k%d" % i]).sum().exp() for i in (1, 2)]
            a = (a[:, 0::2] - (dots[0] - dots[1] + 0.2) * a[:, 1::2]).repeat_interleave(2, 1)
        conv = 0 in c["kq_conv_layers"]
        if conv and c["kq_conv_pre_softmax"]:
            s = mta_ref.kq_convolution(s, w[p + "kq_conv.weight"], causal)
        if c["head_mix_pre_softmax"]:
            s = mta_ref.mix_heads(s, w[p + "head_mix_pre.weight"])
        a = a if c["attention_type"] == "diff" else softmax(s)
        if conv and c["kq_conv_post_softmax"]:
            a = mta_ref.kq_convolution(a, w[p + "kq_conv_post.weight"], causal).masked_fill(~causal, 0)
        if c["head_mix_post_softmax"]:
            a = mta_ref.mix_heads(a, w[p + "head_mix.weight"])
        return before[0], a[0]


if __name__ == "__main__":
    main()
