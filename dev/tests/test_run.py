#!/usr/bin/env python3
"""Black-box tests of train_mta: runs, resume, signals, and every kind of bad input. Whatever a user can do wrong gives
one line and exit 1.

python3 dev/tests/test_run.py [-k PATTERN]     (MTA_BIN: folder of the binary, default the repository; TRAINER: its
                                               name, default train_mta)
"""
import array
import base64
import datetime
import fcntl
import glob
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import socket
import subprocess
import tempfile
import time
import unittest
import zlib

from helpers import BIN, GOLDEN, ROOT, golden_checkpoint, main, read_bytes, read_safetensors, write_safetensors
from helpers import values, write_shard, zip_all

BINARY = os.path.join(BIN, os.environ.get("TRAINER", "train_mta"))
NAME = os.path.basename(BINARY)
SANITIZED = b"__asan_init" in read_bytes(BINARY)
unsanitized = unittest.skipIf(SANITIZED, "skip: the address sanitizer wants all of memory, and to be loaded first")
SMALL = {"--model": "toy", "--attention": "mta", "--hidden-size": 32, "--num-hidden-layers": 2,
         "--num-attention-heads": 2,
         "--num-key-value-heads": 2, "--intermediate-size": 48, "--vocab-size": 32, "--kq-conv-key-size": 5,
         "--seq-len": 16, "--batch-size": 2,
         "--steps": 6, "--lr": 1e-3, "--schedule": "constant", "--warmup": 0, "--log-every": 1, "--sample-every": 0,
         "--seed": 5}
TIMEOUT = float(os.environ.get("TEST_TIMEOUT", 120))  # seconds for one run


# ----------------------------------------------------------------------------------------------------------------------
# Files

def mend_manifest(folder):
    """Makes the manifest agree with the files again, so that what was changed in them is what is refused."""
    path = os.path.join(folder, "manifest.json")
    with open(path) as f:
        manifest = json.load(f)
    for name in manifest["files"]:
        data = read_bytes(os.path.join(folder, name))
        manifest["files"][name].update(bytes=len(data), crc32=zlib.crc32(data))
    with open(path, "w") as f:
        json.dump(manifest, f)


def checkpoints(out):
    return sorted(glob.glob(os.path.join(out, "step-*")))


def log_events(out, kind=None, times=False):
    """The events of a kind; without the times at which their lines were written."""
    with open(os.path.join(out, "log.jsonl")) as f:
        events = [json.loads(line) for line in f]
    return [e if times else {k: v for k, v in e.items() if k != "time"} for e in events if kind is None
            or e["event"] == kind]


def tree(folder):
    """Every file below the folder with its bytes."""
    return {os.path.relpath(os.path.join(d, n), folder): read_bytes(os.path.join(d, n))
            for d, _, names in os.walk(folder) for n in names}


# ----------------------------------------------------------------------------------------------------------------------

class Trainer(unittest.TestCase):
    """A folder with two shards of a learnable sequence, and ways to run the trainer in it."""

    @classmethod
    def setUpClass(cls):
        if not os.path.exists(BINARY):
            raise unittest.SkipTest(f"{BINARY} is not built: make {NAME}")
        cls.folder = tempfile.mkdtemp(prefix="test_run_")
        rng = random.Random(1)
        period = [rng.randrange(32) for _ in range(50)]
        write_shard(cls.path("a_train_000000.bin"),
                    [period[i % 50] if i % 7 else rng.randrange(32) for i in range(16 * 200 + 1)])
        write_shard(cls.path("a_val_000000.bin"), [period[i % 50] for i in range(16 * 8 + 1)])

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    @classmethod
    def path(cls, *parts):
        return os.path.join(cls.folder, *parts)

    def arguments(self, out, changes=None, flags=()):
        """changes: options that differ from the small run's; None drops one."""
        options = dict(SMALL)
        options.update({"--train": self.path("a_train_*.bin"), "--val": self.path("a_val_*.bin"), "--out": out,
                        "--threads": None})
        options.update(changes or {})
        words = [BINARY]
        for name, value in options.items():
            if value is not None:
                words += [name, str(value)]
        return words + list(flags)

    def out(self):
        return os.path.join(tempfile.mkdtemp(dir=self.folder), "run")

    def launch(self, words, threads=1, limit=None):
        def prepare():
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS="1",
                           OMP_WAIT_POLICY="passive")
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                                preexec_fn=prepare, cwd=self.folder)

    def execute(self, words, threads=1, limit=None):
        with self.launch(words, threads, limit) as child:
            try:
                stdout, stderr = child.communicate(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        return subprocess.CompletedProcess(words, child.returncode, stdout, stderr)

    def run_ok(self, out, changes=None, flags=(), threads=1):
        done = self.execute(self.arguments(out, changes, flags), threads)
        self.assertEqual(done.returncode, 0, done.stdout[-2000:] + done.stderr)
        return done

    def wait_for_step(self, out, step=1, child=None):
        """Until the log has it."""
        start = time.time()
        while time.time() - start < TIMEOUT and (child is None or child.poll() is None):
            try:
                with open(os.path.join(out, "log.jsonl")) as f:
                    if f'"step":{step},' in f.read().replace(" ", ""):
                        return
            except OSError:
                pass
            time.sleep(0.005)
        self.fail("the run did not get there")

    def assert_refused(self, done, *pieces):
        """Exit 1 and one line on stderr that starts with the program's name and holds every piece."""
        self.assertEqual(done.returncode, 1, done.stdout[-1000:] + done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertTrue(done.stderr.startswith(NAME + ": "), done.stderr)
        for piece in pieces:
            self.assertIn(str(piece), done.stderr)

    def refused(self, pieces, changes=None, flags=(), out=None):
        """A new run with these options is refused and leaves no checkpoint."""
        out = out or self.out()
        done = self.execute(self.arguments(out, changes, flags))
        self.assert_refused(done, *pieces)
        self.assertEqual(checkpoints(out), [])


class Runs(Trainer):
    def test_a_run(self):
        out = self.out()
        self.run_ok(out, {"--steps": 60, "--lr": 1e-2, "--eval-every": 20, "--save-every": 20, "--keep": 2})
        names = [os.path.basename(c) for c in checkpoints(out)]
        self.assertEqual(names, ["step-00000040", "step-00000060"])
        steps, val = log_events(out, "step"), log_events(out, "val")
        self.assertEqual([e["step"] for e in steps], list(range(1, 61)))
        self.assertEqual([e["step"] for e in val], [20, 40, 60])
        self.assertTrue(all(math.isfinite(e[k]) for e in steps for k in ("loss", "grad_norm", "lr")))
        self.assertLess(val[-1]["loss"], val[0]["loss"] - 0.3)
        self.assertEqual(val[-1]["step"], 60)
        self.assertAlmostEqual(val[-1]["perplexity"], math.exp(val[-1]["loss"]), delta=1e-4 * val[-1]["perplexity"])
        self.assertNotIn("error", val[-1])
        self.assertEqual(log_events(out)[0]["event"], "start")
        self.assertEqual(log_events(out)[-1]["event"], "stop")
        last = checkpoints(out)[-1]
        with open(os.path.join(last, "manifest.json")) as f:
            manifest = json.load(f)
        self.assertEqual(manifest["step"], 60)
        self.assertEqual(set(manifest["files"]) | {"manifest.json"}, set(os.listdir(last)))
        for name, entry in manifest["files"].items():
            data = read_bytes(os.path.join(last, name))
            self.assertEqual((entry["bytes"], entry["crc32"]), (len(data), zlib.crc32(data)), name)
        tensors, metadata = read_safetensors(os.path.join(last, "model.safetensors"))
        self.assertEqual(metadata.get("format"), "pt")
        self.assertEqual(tensors["model.layers.0.self_attn.kq_conv.weight"][1], [2, 2, 5])
        moments, _ = read_safetensors(os.path.join(last, "optimizer.safetensors"))
        self.assertEqual(set(moments), {p + n for n in tensors for p in ("m.", "v.")})
        self.assertFalse([n for n in os.listdir(out) if "partial" in n])

    def test_evaluation_only_at_the_end(self):
        out = self.out()
        os.makedirs(self.path("lr=3"))
        shutil.copy(self.path("a_val_000000.bin"), self.path("lr=3", "b_val_000000.bin"))
        self.run_ok(out, {"--eval-every": 0, "--val": "%s,c=%s" % ((self.path("lr=3", "b_val_*.bin"),) * 2)})
        self.assertEqual([(e["step"], e["name"]) for e in log_events(out, "val")], [(6, "b"), (6, "c")])

    def test_a_set_for_each_name_before_val(self):
        """One glob, three domains: each has its row, what the manifest counts makes bits per byte, and all have their
        mean; as with the sets one by one."""
        folder = self.path("domains")
        os.makedirs(folder)
        rng, shards, sets = random.Random(1), {}, {}
        for k, name in enumerate(("arxiv", "book-2", "c4_b")):
            for part in range(1 + (k == 1)):
                tokens = [rng.randrange(32) for _ in range(200 + 50 * k)]
                write_shard(os.path.join(folder, "%s_val_%06d.bin" % (name, part)), tokens)
                shards["%s_val_%06d.bin" % (name, part)] = {"preparation": "p", "set": name, "split": "val",
                                                            "tokens": len(tokens)}
            sets[name] = {"val": {"tokens": 1000, "text_bytes": 2000 + 500 * k}}
        with open(os.path.join(folder, "manifest.json"), "w") as f:
            json.dump({"preparations": {"p": {"tokenizer": {"name": "toy", "vocab_size": 32}, "sets": sets}},
                       "shards": shards}, f)
        out, single, glob_of = self.out(), self.out(), lambda n: os.path.join(folder, n + "_val_*.bin")
        one = self.run_ok(out, {"--val": glob_of("*"), "--eval-windows": 0, "--eval-every": 0}).stdout
        self.run_ok(single, {"--val": ",".join("%s=%s" % (n, glob_of(n)) for n in sets), "--eval-windows": 0,
                             "--eval-every": 0})
        val, mean = log_events(out, "val"), log_events(out, "val_mean")
        self.assertEqual(val, log_events(single, "val"))
        self.assertEqual([e["name"] for e in val], list(sets))
        for k, e in enumerate(val):
            self.assertAlmostEqual(e["bits_per_byte"], e["loss"] / math.log(2) / (2 + k / 2), places=9)
            self.assertRegex(one, r"(?m)^val  %s +%.4f +%.3f +%.4f +\d+$" % (e["name"], e["loss"], e["perplexity"],
                                                                             e["bits_per_byte"]))
        for key in ("loss", "perplexity", "bits_per_byte"):
            self.assertAlmostEqual(mean[0][key], sum(e[key] for e in val) / 3, places=9)
        rows = [line for line in one.splitlines() if line.startswith("val  ")]
        self.assertEqual([line.split()[1] for line in rows], ["step"] + list(sets) + ["mean"])
        self.assertEqual({line.index(".") for line in rows[1:]}, {rows[1].index(".")})
        del shards["c4_b_val_000000.bin"]  # of this one nothing is known: no figure is made of it, nor of the mean
        with open(os.path.join(folder, "manifest.json"), "w") as f:
            json.dump({"preparations": {"p": {"tokenizer": {"name": "toy", "vocab_size": 32}, "sets": sets}},
                       "shards": shards}, f)
        out = self.out()
        self.run_ok(out, {"--val": glob_of("*"), "--eval-every": 0})
        self.assertEqual(["bits_per_byte" in e for e in log_events(out, "val") + log_events(out, "val_mean")],
                         [True, True, False, False])
        self.refused(["--val", "255", "n" * 256], {"--val": "n" * 256 + "=" + glob_of("*")})

    def test_every_line_has_a_time_and_the_start_an_origin(self):
        out, before = self.out(), time.time()
        self.run_ok(out, {"--save-every": 3})
        self.run_ok(out, {"--steps": 8}, ["--resume"])
        events = log_events(out, times=True)
        times = [e["time"] for e in events]
        self.assertEqual(times, sorted(times))
        self.assertTrue(before - 1 <= times[0] <= times[-1] <= time.time() + 1)
        with open(os.path.join(ROOT, "VERSION")) as f:
            version = f.read().strip()
        for e in (e for e in events if e["event"] == "start"):
            self.assertEqual((e["program"], e["version"], e["host"]), (NAME, version, socket.gethostname()))
            self.assertRegex(e["commit"], r"^([0-9a-f]{12}\+?|unknown)$")
            self.assertAlmostEqual(datetime.datetime.fromisoformat(e["date"].replace("Z", "+00:00")).timestamp(),
                                   e["time"], delta=2)
            self.assertRegex(e["device"], "[0-9]+ threads$")
            self.assertGreater(e["flops_per_second"], 0)
        for e in (e for e in events if e["event"] == "step"):
            self.assertGreater(e["mfu"], 0)
        for path in checkpoints(out):  # what is not the same twice is no part of a checkpoint
            state = read_bytes(os.path.join(path, "trainer.json"))
            self.assertNotIn(f'"{socket.gethostname()}"'.encode(), state)
            self.assertEqual(json.loads(state)["version"], version)

    def test_length_by_tokens_or_epochs(self):
        """Rounded up to whole steps, which is said; two lengths that differ are refused; --resume without one keeps
        that of the run."""
        windows = 4  # of 16 tokens, in 64 tokens of a step
        tokens = (os.path.getsize(self.path("a_train_000000.bin")) - 1024) // 2
        epoch = (tokens - 1) // 16 * 16
        base = {"--steps": None, "--tokens-per-step": 16 * windows, "--eval-every": 0, "--val": None}
        for options, steps, words in (({"--tokens": 256}, 4, "--tokens 256: 4 steps)"),
                                      ({"--tokens": "2.57e2"}, 5, "4.015625 steps, rounded up)"),
                                      ({"--tokens": 250, "--steps": 4}, 4, "3.90625 steps, rounded up)"),
                                      ({"--epochs": 320 / epoch}, 5, "of %d tokens: 5 steps)" % epoch)):
            with self.subTest(options=options):
                done = self.run_ok(self.out(), dict(base, **options))
                self.assertIn(words, done.stdout)
                self.assertIn("done: %d steps" % steps, done.stdout)
        out, whole = self.out(), self.out()
        self.run_ok(out, dict(base, **{"--tokens": 256, "--schedule-steps": 6}))
        again = self.run_ok(out, dict(base, **{"--schedule-steps": 6}), ["--resume"])
        self.assertIn("done: 4 steps", again.stdout)
        self.assertNotIn("changed", again.stdout)
        self.run_ok(out, dict(base, **{"--epochs": 6 * 64 / epoch, "--schedule-steps": 6}), ["--resume"])
        self.run_ok(whole, dict(base, **{"--steps": 6}))
        self.assertEqual([(e["step"], e["loss"], e["lr"]) for e in log_events(out, "step")],
                         [(e["step"], e["loss"], e["lr"]) for e in log_events(whole, "step")])
        self.refused(["--tokens 256 is 4 steps", "--steps says 6"],
                     {"--tokens": 256, "--steps": 6, "--tokens-per-step": 64})
        self.refused(["--epochs 1", "--tokens says 4"], dict(base, **{"--tokens": 256, "--epochs": 1}))
        self.refused(["--tokens", "0.5"], dict(base, **{"--tokens": 0.5}))
        self.refused(["--epochs", "nan"], dict(base, **{"--epochs": "nan"}))
        alone = self.execute([BINARY, "--model", "toy", "--dry-run", "--epochs", "2"])
        self.assert_refused(alone, "--epochs", "--train")

    def test_tokens_of_a_run_whose_steps_change(self):
        """--tokens counts those of the steps that are done, which had fewer."""
        out, base = self.out(), {"--steps": None, "--val": None}
        self.run_ok(out, dict(base, **{"--tokens": 320, "--tokens-per-step": 32}))
        done = self.run_ok(out, dict(base, **{"--tokens": 640, "--tokens-per-step": 64}), ["--resume"])
        self.assertEqual([log_events(out, "step")[-1][key] for key in ("step", "tokens")], [15, 640])
        self.assertIn("run         15 steps, 640 tokens (--tokens 640: 15 steps)\ndone        10 steps, 320 tokens\n",
                      done.stdout)
        self.assertIn("for the rest at half", done.stdout)
        for few in (100, 1):
            done = self.run_ok(out, dict(base, **{"--tokens": few, "--tokens-per-step": 320}), ["--resume"])
            self.assertRegex(done.stdout, r"--steps \d+ \(--tokens %d: .*\): the checkpoint has 15 already\n" % few)

    def test_a_dry_run_of_what_goes_on(self):
        """--resume --dry-run: the run's own model and length, what is done; what a start would refuse is refused."""
        out = self.out()
        self.run_ok(out, {"--steps": 6})
        before, words = tree(out), ["--resume", "--dry-run"]
        model = ("--model", "--attention", "--hidden", "--num", "--inter", "--vocab", "--kq")
        none = {name: None for name in SMALL if name.startswith(model)}
        plan = self.run_ok(out, dict(none, **{"--steps": None}), words).stdout
        self.assertIn("run         6 steps, 192 tokens\ndone        6 steps, 192 tokens\n", plan)
        for pieces, changes in ((["hidden"], {"--hidden-size": 64}), (["--train", "no such shard"], {"--train": "no"}),
                                (["--val", "one window needs"], {"--seq-len": 500})):
            self.assert_refused(self.execute(self.arguments(out, changes, words)), *pieces)
        self.assertTrue(tree(out) == before)

    def test_data_that_is_taken_more_than_once_is_said(self):
        """200 sequences of one set, 31 tokens of another, of which one sequence is all that there is."""
        os.makedirs(self.path("some"))
        few = self.path("some", "few_train_000000.bin")
        write_shard(few, [3] * 31)
        both = self.path("a_train_*.bin") + "=0.9,%s=0.1" % few
        left = f"--train: {few}: 14 of 31 tokens are not used: they come after their shard's last " \
               "window of 17 tokens"
        for train, steps, said in ((self.path("a_train_*.bin"), 100, []),
                                   (self.path("a_train_*.bin"), 250,
                                    ["--train: %s: the run takes each of its 3.20k tokens 2.5 times" %
                                     self.path("a_train_*.bin")]),
                                   (both, 100, [left,
                                                f"--train: {few}: the run takes each of its 16 tokens 20 times"])):
            done = self.run_ok(self.out(), {"--train": train, "--steps": steps}, ["--dry-run"])
            self.assertEqual([line for line in done.stdout.splitlines() if line.startswith("--")], said)

    def test_plan(self):
        """What a run needs is beside what there is; of a run that is too large nothing starts."""
        long = [BINARY, "--model", "toy", "--max-position-embeddings", "4096", "--dry-run"]  # as one continued at 4096
        said = "positions   2048 of the model's 4096; --seq-len takes more\n"
        for more in ([], ["--seq-len", "2048"]):
            self.assertEqual(said in self.execute(long + more).stdout, not more)
        plan = self.execute([BINARY, "--model", "880m", "--attention", "mta", "--batch-size", "1", "--dry-run", "--out",
                             self.path("not/yet/there"), "--steps", "10", "--save-every", "1", "--keep", "5"]).stdout
        self.assertFalse(os.path.exists(self.path("not")))
        self.assertIn("of them     9,408 that a plain Transformer of this size lacks: 0.0011%", plan)
        total, available, verdict = re.search(r"total +([0-9.]+) MiB, of ([0-9.]+) available: it (.*)", plan).groups()
        self.assertEqual(verdict, "fits" if float(total) <= float(available) else "does not fit")
        each, kept, all_of_them, free = re.search(r"checkpoints ([0-9.]+) MiB each, at most (\d+) at a time: ([0-9.]+) "
                                                  r"MiB, of ([0-9.]+) free at ", plan).groups()
        self.assertAlmostEqual(float(each), 876563136 * 12 / 2**20, delta=0.1)
        self.assertEqual(int(kept), 5 + 1 + 1)
        self.assertAlmostEqual(float(all_of_them), 7 * float(each), delta=0.2)
        self.assertGreater(float(free), 0)
        for steps, every, keep, most in ((20, 0, 0, 2), (6, 2, 0, 4), (7, 2, 0, 5), (6, 2, 1, 3), (1, 1, 1, 2)):
            few = self.execute([BINARY, "--model", "toy", "--dry-run", "--steps", str(steps), "--save-every",
                                str(every), "--keep", str(keep)]).stdout  # and that of --save-minutes
            self.assertIn("at most %d at a time" % most, few)
        self.assertRegex(plan, r"time        about .* GFLOP/s\)")
        large = self.execute([BINARY, "--model", "880m", "--batch-size", "512", "--dry-run"]).stdout
        self.assertIn("it does not fit", large)
        self.assertNotIn("that a plain",
                         self.execute([BINARY, "--model", "toy", "--attention", "transformer", "--dry-run"]).stdout)

    def test_the_kind_of_attention_of_a_checkpoint(self):
        """The plan's first line names it by the model's operations, however it was made."""
        full, conv = ["--attention", "mta-full"], ["--head-norm", "none", "--head-mix-post-softmax", "0"]
        for more, kind, later in ((full, "mta-full", None), (["--attention", "talking-heads"], "talking-heads", None),
                                  (["--model", "toy", "--kq-conv-key-size", "15"], "mta", None),
                                  (["--model", "1m", *conv, "--kq-conv-layers", "none"], "transformer", None),
                                  (["--model", "1m", "--head-norm", "none"], "mta with changed fields", None),
                                  ([*full, "--head-gate", "off"], "mta-full with changed fields",
                                   "mta with changed fields")):
            out = self.out()
            made = self.run_ok(out, {"--steps": 0, "--model": "toy", "--attention": None}, more)
            done = self.execute([BINARY, "--eval-only", "--init-from", out, "--val", self.path("a_val_*.bin"),
                                 "--dry-run"])
            self.assertIn(", attention %s: " % kind, made.stdout)
            self.assertIn("model       from the checkpoint, attention %s: " % (later or kind), done.stdout)

    def test_masked_set_reports_error(self):
        tokens = [5, 6, 7, 8] * 32 + [0]
        write_shard(self.path("m_train_000000.bin"), tokens * 4, mask=[1] * (4 * len(tokens)))
        write_shard(self.path("m_val_000000.bin"), tokens, mask=[int(i % 16 == 15) for i in range(len(tokens))])
        out = self.out()
        self.run_ok(out, {"--train": self.path("m_train_*.bin"), "--val": "easy=" + self.path("m_val_*.bin"),
                          "--steps": 60, "--lr": 1e-2, "--eval-every": 60})
        val = log_events(out, "val")[-1]
        self.assertEqual(val["name"], "easy")
        self.assertEqual(val["tokens"], 8)
        self.assertEqual(val["error"], 0)

    def test_a_step_without_a_counted_target_has_no_loss(self):
        """Not one of 0, which would be the best of all."""
        os.makedirs(self.path("few"))
        path, out = self.path("few", "a_train_000000.bin"), self.out()
        write_shard(path, [i % 32 for i in range(65)], mask=[int(i % 32 == 15) for i in range(65)])
        done = self.run_ok(out, {"--train": path, "--val": None, "--batch-size": 1, "--steps": 4})
        losses = sorted((e["loss"] is None, e["loss"] != 0, e["skipped"]) for e in log_events(out, "step"))
        self.assertEqual(losses, [(False, True, 0)] * 2 + [(True, True, 0)] * 2)
        self.assertEqual(done.stdout.count("  no target counts"), 2)

    def test_the_error_is_of_sequences_that_are_asked(self):
        """Where no target of a sequence counts, none can be wrong: it is no right answer either."""
        rng = random.Random(7)
        windows = [[rng.randrange(32) for _ in range(16)] for _ in range(8)]
        tokens, asked = sum(windows, []) + [0], sum(windows[::2], []) + [0]
        os.makedirs(self.path("masks"))
        out, sets = self.out(), [self.path("masks", name + "_val_000000.bin") for name in ("half", "asked")]
        for path, ids, every in zip(sets, (tokens, asked), (32, 16)):
            write_shard(path, ids, mask=[int(i % every == 15) for i in range(len(ids))])
        self.run_ok(out, {"--val": ",".join(sets), "--steps": 1, "--lr": 0})
        half, asked = ({k: e[k] for k in ("tokens", "loss", "error")} for e in log_events(out, "val"))
        self.assertGreater(asked["error"], 0)
        self.assertEqual(half, asked)

    def test_options_that_do_nothing_are_said(self):
        done = self.run_ok(self.out(), {"--steps": 2, "--warmup": 3})
        self.assertIn("warmup      3 steps, the run has 2", done.stdout)
        self.assertNotIn("warmup", self.run_ok(self.out(), {"--steps": 3, "--warmup": 3}).stdout)
        one, two = self.path("a_train_*.bin"), self.path("a_val_*.bin")
        done = self.run_ok(self.out(), {"--train": f"{one}=3,{two}"})
        self.assertIn("--train: no weight for a-2, taken as 1", done.stdout)
        self.assertEqual(done.stdout.count("no weight for"), 1)
        self.assertNotIn("no weight for",
                         self.run_ok(self.out(),
                                     {"--train": f"{one}=3,{two}=1"}).stdout + self.run_ok(self.out()).stdout)

    def test_an_option_given_twice_is_said(self):
        for name in ("--train", "--val"):
            done = self.run_ok(self.out(), {"--steps": 1}, [name, self.path("a_train_000000.bin")])
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
            self.assertIn(f"{name} is given twice: {self.path('a_train_000000.bin')} counts", done.stderr)
        self.assertEqual(self.run_ok(self.out(), {"--steps": 1},
                                     ["--schedule", "linear", "--val", self.path("a_val_*.bin")]).stderr, "")

    def test_a_sample_prompt_that_leaves_no_room(self):
        """15 ids and BOS are all of 16 positions."""
        changes = {"--tokenizer": "toy", "--sample-every": 1, "--sample-tokens": 1, "--steps": 1}
        self.run_ok(self.out(), dict(changes, **{"--sample-prompt": "a" * 14}))
        done = self.execute(self.arguments(self.out(), dict(changes, **{"--sample-prompt": "a" * 15})))
        self.assert_refused(done, "--sample-prompt: got 16 tokens with BOS, wanted fewer than --seq-len 16")

    def test_a_schedule_that_ends_within_the_warmup_is_said(self):
        done = self.run_ok(self.out(), {"--steps": 4, "--schedule": "linear", "--warmup": 3, "--schedule-steps": 2})
        self.assertIn("warmup      3 steps, --schedule-steps 2: after that the learning rate is --min-lr", done.stdout)

    def test_a_schedule_that_ends_before_the_run_is_said(self):
        said = "schedule    2 steps, the run has 4: after that the learning rate is --min-lr 0"
        given = {"--steps": 4, "--schedule": "cosine", "--schedule-steps": 2}
        self.assertIn(said, self.run_ok(self.out(), given).stdout)
        for changes in ({"--schedule-steps": 4}, {"--schedule": "constant"}):
            self.assertNotIn("schedule    ", self.run_ok(self.out(), dict(given, **changes)).stdout)

    def test_mixture_from_a_recipe(self):
        write_shard(self.path("x_train_000000.bin"), [i % 32 for i in range(400)])
        with open(self.path("recipe.txt"), "w") as f:
            f.write("a_train_*.bin=0.75 # most\nx_train_*.bin=0.25\n")
        out = self.out()
        os.mkdir(self.path("other"))
        write_shard(self.path("other", "a_train_000000.bin"), [i % 31 for i in range(400)])
        # told apart in the log
        self.run_ok(out, {"--train": self.path("a_train_*.bin") + "," + self.path("other/a_train_*.bin"), "--steps": 2})
        self.assertEqual(log_events(out, "step")[-1]["sources"], {"a": 32, "a-2": 32})
        out = self.out()
        self.run_ok(out, {"--train": "@" + self.path("recipe.txt")})
        with open(os.path.join(checkpoints(out)[-1], "trainer.json")) as f:
            text = f.read()
        self.assertEqual([int(x) for x in re.findall(r'"drawn": (\d+)', text)], [9, 3])

    def test_same_bits(self):
        """The same run twice, and with one or two threads."""
        trees = []
        for threads in (1, 1, 2):
            out = self.out()
            self.run_ok(out, {"--steps": 8}, threads=threads)
            last = checkpoints(out)[-1]
            steps = [(e["loss"], e["grad_norm"], e["lr"]) for e in log_events(out, "step")]
            trees.append((read_bytes(os.path.join(last, "model.safetensors")),
                          read_bytes(os.path.join(last, "optimizer.safetensors")), steps))
        self.assertTrue(trees[0] == trees[1], "the same run gave other bits")
        self.assertTrue(trees[0] == trees[2], "two threads gave other bits than one")
        out = self.out()
        self.run_ok(out, {"--steps": 8, "--seed": 6})
        self.assertNotEqual(read_bytes(os.path.join(checkpoints(out)[-1], "model.safetensors")), trees[0][0])

    def test_accumulation_does_not_depend_on_the_batch_size(self):
        """The loss is a mean over all targets of a step: 8 windows as 1 x 8 or 4 x 2 agree to rounding."""
        losses = []
        for batch in (8, 2, 1):
            out = self.out()
            self.run_ok(out, {"--batch-size": batch, "--tokens-per-step": 128, "--steps": 5})
            losses.append([e["loss"] for e in log_events(out, "step")])
        for other in losses[1:]:
            for a, b in zip_all(losses[0], other):
                self.assertAlmostEqual(a, b, delta=2e-5)

    def test_dry_run_counts(self):
        """The parameter counts of the paper's sizes, without --train and --out and without the memory."""
        for model, attention, count in (("880m", "transformer", 876553728), ("880m", "mta", 876563136),
                                        ("880m", "mta-full", 876583320),
                                        ("880m", "talking-heads", 876566016), ("880m", "diff", 876567552),
                                        ("300m", "transformer", 388277248),
                                        ("550m", "transformer", 651818240), ("1b", "transformer", 1495894016)):
            done = self.execute([BINARY, "--model", model, "--attention", attention, "--dry-run"])
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(str(count), re.sub(r"(?<=\d)[,_'](?=\d)", "", done.stdout), (model, attention))

    def test_help(self):
        done = self.execute([BINARY, "--help"])
        self.assertEqual(done.returncode, 0)
        for name in ("--model", "--attention", "--train", "--val", "--out", "--resume", "--init-from", "--dry-run",
                     "--kq-conv-layers"):
            self.assertIn(name + " " if name not in ("--resume", "--dry-run") else name, done.stdout)
        self.assertRegex(done.stdout, r"--dry-run +open --train, --val and the run of --resume, print parameters")
        self.assertRegex(done.stdout, r"--lr X +peak learning rate \(default: that of --model's preset, else 1.5e-4\)")
        for line in done.stdout.splitlines():  # a default is said once, and is one that could be given
            self.assertLess(line.count("(default"), 2, line)
            self.assertNotIn("(default: -1)", line)
            if line.startswith(("  --hidden", "  --rope", "  --seq-len", "  --lr ")):
                self.assertNotIn("(default: 0)", line)


class Resume(Trainer):
    def compare(self, whole, parts, first_step):
        """Weights, optimizer state, and the log from first_step on are equal bit for bit."""
        a, b = checkpoints(whole)[-1], checkpoints(parts)[-1]
        self.assertEqual(os.path.basename(a), os.path.basename(b))
        for name in ("model.safetensors", "optimizer.safetensors"):
            self.assertTrue(read_bytes(os.path.join(a, name)) == read_bytes(os.path.join(b, name)), name + " differs")
        keys = ("step", "loss", "grad_norm", "lr")
        rows = [[tuple(e[k] for k in keys) for e in log_events(out, "step") if e["step"] >= first_step]
                for out in (whole, parts)]
        self.assertEqual(rows[0], rows[1])
        self.assertEqual([e["step"] for e in log_events(parts, "step")], list(range(1, rows[0][-1][0] + 1)))

    def test_ten_and_ten_is_twenty(self):
        whole, parts = self.out(), self.out()
        common = {"--tokens-per-step": 64, "--eval-every": 5}
        self.run_ok(whole, dict(common, **{"--steps": 20}))
        self.run_ok(parts, dict(common, **{"--steps": 10}))
        self.run_ok(parts, dict(common, **{"--steps": 20}), ["--resume"])
        self.compare(whole, parts, 1)

    def test_stopped_and_resumed_on_a_schedule(self):
        """Stopped by a signal at whatever step, resumed with the same options, linear decay and warmup."""
        common = {"--steps": 400, "--schedule": "linear", "--warmup": 7, "--save-every": 150, "--keep": 0}
        whole, parts = self.out(), self.out()
        self.run_ok(whole, common)
        child = self.launch(self.arguments(parts, common))
        size = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # Python 3.9 has no such name
        fcntl.fcntl(child.stdout, size, 16384)  # so little that it waits for this test before its end
        self.wait_for_step(parts, 20)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=TIMEOUT)
        self.assertEqual(child.returncode, 75)
        self.assertLess(int(checkpoints(parts)[-1][-8:]), 400)
        self.run_ok(parts, common, ["--resume"])
        self.compare(whole, parts, 1)

    def test_killed_and_resumed(self):
        """kill -9 between checkpoints: the log's later lines are cut, the end is the same."""
        common = {"--steps": 300, "--save-every": 25, "--keep": 0}
        whole, parts = self.out(), self.out()
        self.run_ok(whole, common)
        child = self.launch(self.arguments(parts, common))
        self.wait_for_step(parts, 60)
        child.kill()
        child.communicate()
        with open(os.path.join(parts, "log.jsonl"), "a") as f:
            f.write('{"event":"step","step":')
        os.makedirs(os.path.join(parts, ".step-00000099.partial"))
        self.run_ok(parts, common, ["--resume"])
        self.compare(whole, parts, 1)
        self.assertFalse([n for n in os.listdir(parts) if "partial" in n])
        os.makedirs(os.path.join(parts, ".step-00000300.partial"))  # and where nothing is left to be saved
        self.run_ok(parts, common, ["--resume"])
        self.assertFalse([n for n in os.listdir(parts) if "partial" in n])

    def test_broken_newest_is_passed_over(self):
        out, whole = self.out(), self.out()
        common = {"--steps": 6, "--save-every": 2, "--keep": 0}
        self.run_ok(whole, common)
        self.run_ok(out, common)
        newest, second = checkpoints(out)[-1], checkpoints(out)[-2]
        with open(os.path.join(newest, "model.safetensors"), "r+b") as f:
            f.seek(-3, 2)
            f.write(b"\xff\xff\xff")
        os.remove(os.path.join(second, "manifest.json"))
        done = self.run_ok(out, common, ["--resume"])
        self.assertIn("step-00000006", done.stderr)
        self.assertIn("step-00000004", done.stderr)
        damaged = [e["reason"] for e in log_events(out, "damaged")]
        self.assertEqual(len(damaged), 2)
        self.assertTrue("step-00000006" in damaged[0] and "CRC" in damaged[0] and "step-00000004" in damaged[1],
                        damaged)
        self.compare(whole, out, 1)

    def test_only_damaged_checkpoints(self):
        """Weeks may lie there: nothing is started over them, nothing is cut."""
        out = self.out()
        self.run_ok(out, {"--save-every": 3, "--keep": 0})
        for folder in checkpoints(out):
            with open(os.path.join(folder, "optimizer.safetensors"), "r+b") as f:
                f.truncate(100)
        before = tree(out)
        done = self.execute(self.arguments(out, None, ["--resume"]))
        self.assertEqual(done.returncode, 1, done.stdout)
        lines = done.stderr.splitlines()
        self.assertEqual(len(lines), 3, done.stderr)
        self.assertTrue("step-00000006" in lines[0] and "step-00000003" in lines[1] and "no checkpoint" in lines[2],
                        lines)
        self.assertTrue(tree(out) == before, "files changed")

    def test_one_run_at_a_time(self):
        out = self.out()
        child = self.launch(self.arguments(out, {"--steps": 10 ** 6, "--save-every": 5}))
        self.wait_for_step(out, 12)
        done = self.execute(self.arguments(out, {"--steps": 10 ** 6}, ["--resume"]))
        self.assert_refused(done, "in use by another run")
        self.assertIsNone(child.poll())
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=TIMEOUT)
        self.assertEqual(child.returncode, 75)
        steps = [e["step"] for e in log_events(out, "step")]
        self.assertEqual(steps, list(range(1, len(steps) + 1)))
        self.run_ok(out, {"--steps": steps[-1] + 1}, ["--resume"])

    def test_a_folder_that_is_renamed_or_removed_under_a_run(self):
        """Another run under its name keeps its checkpoints; the first goes on where its folder is now, or ends with a
        line. A log that an editor has replaced is written on."""
        def rename(out):
            os.rename(out, out + "-2")
            self.run_ok(out)
            return out + "-2"

        def remove(out):
            shutil.rmtree(out)
            self.run_ok(out)

        def edit(out):
            shutil.copy(os.path.join(out, "log.jsonl"), out + "-copy")
            os.rename(out + "-copy", os.path.join(out, "log.jsonl"))
            return out

        for change, status, said in ((rename, 75, "%s is called %s-2 now, where the run goes on"),
                                     (remove, 1, "%s was renamed or removed, and holds another run now"),
                                     (edit, 75, "%s/log.jsonl was removed or replaced: lines since then are lost")):
            out = self.out()
            options = {"--steps": 10**6, "--save-every": 300, "--keep": 1, "--val": None, "--log-every": 10**6}
            child = self.launch(self.arguments(out, options))
            self.wait_for_step(out, 1, child)
            child.send_signal(signal.SIGSTOP)
            now = change(out)
            before = tree(out)
            child.send_signal(signal.SIGCONT)
            if now:
                log, end = os.path.join(now, "log.jsonl"), time.monotonic() + TIMEOUT
                saves = first = read_bytes(log).count(b'"save"')
                while saves < first + 2 and time.monotonic() < end:
                    time.sleep(0.05)
                    saves = read_bytes(log).count(b'"save"')
                child.send_signal(signal.SIGTERM)
            stderr = child.communicate(timeout=TIMEOUT)[1]
            self.assertEqual(child.returncode, status, stderr)
            self.assertIn(said % ((out,) * said.count("%s")), stderr)
            if change is not edit:
                self.assertTrue(tree(out) == before, "the other run's folder has changed")
            if now:
                step = log_events(now, "stop")[0]["step"]
                self.assertEqual([os.path.basename(c) for c in checkpoints(now)], ["step-%08d" % step])

    def test_a_folder_that_was_copied_by_hard_links(self):
        """A resume in one changes nothing in the other, and holds the lock of its own log."""
        out = self.out()
        self.run_ok(out, {"--steps": 6, "--save-every": 2, "--keep": 0})
        subprocess.run(["cp", "-al", out, out + "-2"], check=True)
        shutil.rmtree(os.path.join(out, "step-00000006"))
        before = tree(out + "-2")
        options = {"--steps": 10**6, "--save-every": 0, "--val": None}
        child = self.launch(self.arguments(out, options, ["--resume"]))
        self.wait_for_step(out, 9, child)
        self.assert_refused(self.execute(self.arguments(out, options, ["--resume"])), "in use by another run")
        child.send_signal(signal.SIGTERM)
        self.assertEqual((child.communicate(timeout=TIMEOUT) and child.returncode), 75)
        self.assertTrue(tree(out + "-2") == before, "the other folder has changed")
        self.assertEqual([e["step"] for e in log_events(out, "start")], [0, 4])
        self.assertEqual([n for n in os.listdir(out) if not n.startswith("step-")], ["log.jsonl"])

    def test_two_that_resume_where_nothing_is(self):
        """The second finds no log either, and must not cut the first one's."""
        out = self.out()
        os.makedirs(out)
        words = self.arguments(out, {"--steps": 10 ** 6, "--save-every": 5}, ["--resume"])
        children = [self.launch(words), self.launch(words)]
        try:
            deadline = time.time() + TIMEOUT
            while all(c.poll() is None for c in children) and time.time() < deadline:
                time.sleep(0.05)
            ended = [c for c in children if c.poll() is not None]
            self.assertEqual([c.returncode for c in ended], [1])
            self.assertIn("in use by another run", ended[0].communicate()[1])
            self.wait_for_step(out, 12)
        finally:
            for c in children:
                if c.poll() is None:
                    c.send_signal(signal.SIGTERM)
                    c.communicate(timeout=TIMEOUT)
        self.assertEqual(len(log_events(out, "start")), 1)

    @unsanitized
    def test_file_system_without_locks(self):
        """Lustre without the option flock, for example: the run goes on and says so."""
        source, library = self.path("no_flock.c"), self.path("no_flock.so")
        with open(source, "w") as f:
            f.write("#include <errno.h>\n#include <stdlib.h>\nint flock(int fd, int operation) { (void)fd; "
                    "(void)operation; errno = ENOSYS; return getenv(\"ALONE\") ? 0 : -1; }\n")
        if shutil.which("cc") is None or subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source]).returncode:
            self.skipTest("no C compiler")
        out = self.out()
        done = self.execute(["env", "LD_PRELOAD=" + library] + self.arguments(out))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("no lock on", done.stdout)
        self.assertEqual(len(log_events(out, "step")), 6)
        # GPFS: each host has an flock of its own, and one lock of the file's bytes for all.
        child = self.launch(["env", "LD_PRELOAD=" + library, "ALONE=1"] + self.arguments(out, {"--steps": 10 ** 6},
                                                                                         ["--resume"]))
        self.wait_for_step(out, 8, child)
        done = self.execute(["env", "LD_PRELOAD=" + library, "ALONE=1"] + self.arguments(out, {}, ["--resume"]))
        self.assert_refused(done, "in use by another run")
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=TIMEOUT)
        self.assertEqual(child.returncode, 75)

    def test_timed_checkpoints(self):
        """Each replaces the one before; --keep counts the others; a resume from one continues bit for bit."""
        whole, out = self.out(), self.out()
        common = {"--save-every": 30, "--keep": 1, "--save-minutes": 1e-9}
        self.run_ok(out, dict(common, **{"--steps": 70}))
        saves = log_events(out, "save")
        self.assertEqual([e["step"] for e in saves], list(range(1, 71)))
        self.assertEqual([e["step"] for e in saves if not e.get("timed")], [30, 60, 70])
        self.assertEqual([os.path.basename(c) for c in checkpoints(out)], ["step-00000070"])
        child = self.launch(self.arguments(out, dict(common, **{"--steps": 10 ** 6, "--save-every": 0}), ["--resume"]))
        self.wait_for_step(out, 75)
        child.kill()  # the newest is a timed one, beside the one that is kept
        child.communicate()
        names = [os.path.basename(c) for c in checkpoints(out)]
        last = int(names[-1][-8:])
        if len(names) == 3:  # killed between a save and the removal of the one before, which the kill has prevented
            self.assertEqual(names.pop(1), "step-%08d" % (last - 1))
            shutil.rmtree(os.path.join(out, "step-%08d" % (last - 1)))
        self.assertEqual((len(names), names[0]), (2, "step-00000070"))
        for folder, more in ((whole, []), (out, ["--resume"])):
            self.run_ok(folder, {"--steps": last + 2, "--keep": 5}, more)
        self.assertEqual([os.path.basename(c) for c in checkpoints(out)], [names[0], "step-%08d" % (last + 2)])
        self.compare(whole, out, last + 1)
        off = self.out()
        self.run_ok(off, {"--steps": 20, "--save-minutes": 0})
        self.assertEqual([e["step"] for e in log_events(off, "save")], [20])

    def test_a_resume_keeps_as_many_checkpoints(self):
        """All of a run of --keep 0, also where the resume says nothing; another number is said before any goes."""
        out = self.out()
        self.run_ok(out, {"--steps": 4, "--save-every": 1, "--keep": 0})
        done = self.run_ok(out, {"--steps": 6, "--save-every": 1}, ["--resume"])
        self.assertEqual(self.changed(done), ["steps 4 -> 6"])
        self.assertEqual([int(path[-8:]) for path in checkpoints(out)], [1, 2, 3, 4, 5, 6])
        done = self.run_ok(out, {"--steps": 7, "--save-every": 1, "--keep": 3}, ["--resume"])
        self.assertEqual(self.changed(done), ["steps 6 -> 7", "keep 0 -> 3"])
        self.assertEqual([int(path[-8:]) for path in checkpoints(out)], [5, 6, 7])
        other = self.out()
        self.run_ok(other, {"--steps": 3, "--save-every": 1})
        self.assertEqual([int(path[-8:]) for path in checkpoints(other)], [2, 3])

    def matmul_of(self, out):
        with open(os.path.join(checkpoints(out)[-1], "trainer.json")) as f:
            return json.load(f)["matmul"]

    def test_other_products(self):
        """--matmul: kept in trainer.json, a change is said, and what this build or processor cannot do is refused."""
        out = self.out()
        self.run_ok(out, {"--steps": 2})
        first = self.matmul_of(out)
        other = "fp32" if first == "bf16" else "bf16"
        self.run_ok(out, {"--steps": 3, "--matmul": first}, ["--resume"])
        words = self.arguments(out, {"--steps": 4, "--matmul": other}, ["--resume"])
        done = self.execute(words)
        if done.returncode:
            self.assert_refused(done, "--matmul", other)
            return
        self.assertIn("changed on --resume: matmul %s -> %s\n" % (first, other), done.stdout)
        self.assertEqual(self.matmul_of(out), other)
        self.assertIn("rounded to bf16", done.stdout)
        again = self.run_ok(out, {"--steps": 5, "--matmul": other}, ["--resume"])
        self.assertNotIn("changed on --resume: matmul", again.stdout)
        self.assertNotIn("rounded to bf16", self.run_ok(self.out(), {"--steps": 1}).stdout)

    def test_products_that_cannot_be(self):
        """--matmul bf16 where oneDNN finds no bf16 instructions (it is told of an older processor), and in a build
        without oneDNN: one line."""
        if NAME != "train_mta":
            self.skipTest("of the CPU trainer")
        words = [BINARY, "--model", "1m", "--dry-run", "--matmul", "bf16"]
        done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ, ONEDNN_MAX_CPU_ISA="AVX2"),
                              timeout=TIMEOUT)
        if "no oneDNN" not in done.stderr:
            self.assert_refused(done, "--matmul bf16", "no bf16 instructions")
        without = os.path.join(self.folder, "train_mta")
        subprocess.run([os.environ.get("CC", "cc"), "-std=gnu11", "-w", "-fopenmp", '-DMTA_VERSION="0"',
                        os.path.join(ROOT, "train_mta.c"), "-o", without, "-lm"],
                       check=True, capture_output=True)
        self.assert_refused(self.execute([without] + words[1:]), "--matmul bf16", "no oneDNN")
        self.assertEqual(self.execute([without, "--model", "1m", "--dry-run", "--matmul", "fp32"]).returncode, 0)

    def changed(self, done):
        return [line[len("changed on --resume: "):]
                for line in done.stdout.splitlines() if line.startswith("changed on --resume: ")]

    def test_a_resume_keeps_the_context(self):
        """A run of a preset whose model was given a longer context: it keeps it, and another one, as an option or in a
        file, is said."""
        def context(step):
            with open(os.path.join(out, "step-%08d" % step, "config.json"), encoding="utf-8") as f:
                return json.load(f)["max_position_embeddings"]

        out, option = self.out(), "--max-position-embeddings"
        self.run_ok(out, {"--steps": 1, "--keep": 0, option: 64})
        self.assertEqual(self.changed(self.run_ok(out, {"--steps": 2}, ["--resume"])), ["steps 1 -> 2"])
        done = self.run_ok(out, {"--steps": 3, option: 128}, ["--resume"])
        self.assertEqual(self.changed(done), ["steps 2 -> 3", "max-position-embeddings 64 -> 128"])
        self.assertEqual(log_events(out, "start")[-1]["changed"], self.changed(done))
        file = dict.fromkeys((n for n in SMALL if n.startswith(("--attention", "--hidden", "--num", "--inter",
                                                                "--vocab", "--kq"))))
        file["--model"] = self.path("longer.json")
        with open(os.path.join(out, "step-00000003", "config.json"), encoding="utf-8") as f:
            config = json.load(f)
        with open(file["--model"], "w", encoding="utf-8") as f:
            json.dump({**config, "max_position_embeddings": 256}, f)
        self.assertEqual(self.changed(self.run_ok(out, {"--steps": 4, **file}, ["--resume"])),
                         ["steps 3 -> 4", "max-position-embeddings 128 -> 256"])
        self.assertEqual([context(step) for step in (2, 3, 4)], [64, 128, 256])

    def test_options_without_use(self):
        """What would do nothing without another option is refused by name, or said."""
        for changes, flags, wanted in (({"--val": None}, ["--eval-first"], "--val"), ({}, ["--shift"], "--score"),
                                       ({"--ranks": 2}, (), "--dry-run"),
                                       ({"--ranks-per-node": 2}, ["--dry-run"], "--ranks N"),
                                       ({"--pattern": "gpt2"}, (), "--tokenizer FILE")):
            option = flags[0] if flags and flags[0] != "--dry-run" else list(changes)[-1]
            with self.subTest(option):
                self.refused(["%s: wanted %s" % (option, wanted), "beside it"], changes, flags)
        self.refused(["--ranks-per-node: got 4, wanted a divisor of --ranks 6: as many on each machine"],
                     {"--ranks": 6, "--ranks-per-node": 4}, ["--dry-run"])
        idle = {"--sample-tokens": 5, "--sample-prompt": "a", "--sample-temperature": 1, "--val": None,
                "--eval-every": 1, "--eval-windows": 1}
        said = self.run_ok(self.out(), idle, ["--no-verify", "--assume-llama"]).stderr
        for option in (*idle, "--no-verify", "--assume-llama"):
            if option != "--val":
                self.assertEqual(said.count("%s does nothing without" % option), 1, said)
        done = self.run_ok(self.out(), {"--schedule": "constant", "--min-lr": 1e-4, "--schedule-steps": 9,
                                        "--recompute": "block", "--cuda-graphs": "off"})
        for option in ("--min-lr", "--schedule-steps"):
            self.assertIn("--schedule constant: %s does nothing" % option, done.stdout)
        for option in ("--recompute", "--cuda-graphs"):
            self.assertEqual(option + ": it does nothing on the CPU" in done.stdout, NAME == "train_mta")

    def test_a_directory_that_is_no_checkpoint_of_ours(self):
        """step-4 and step-x in a run are named, whoever looks for its checkpoints; a file of that name is nothing."""
        out = self.out()
        os.makedirs(os.path.join(out, "step-4"))
        os.mkdir(os.path.join(out, "step-x"))
        with open(os.path.join(out, "step-notes.txt"), "w"):
            pass
        for words in (self.arguments(out, {"--steps": 1}), self.arguments(out, {"--steps": 2}, ["--resume"]),
                      [BINARY, "--init-from", out, "--train", self.path("a_train_*.bin"), "--out", self.out(),
                       "--steps", "1", "--seq-len", "16"]):
            done = self.execute(words)
            for name in ("step-4", "step-x"):
                self.assertEqual(done.stderr.count("%s: ignored: a checkpoint is called step-00000004" % name), 1,
                                 done.stderr)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 2), done.stderr)

    def test_a_log_with_a_bad_line_inside(self):
        """What a resume cuts off behind it is kept and said; so is a log that is gone, and --init-from without use."""
        out = self.out()
        self.run_ok(out, {"--steps": 2})
        path = os.path.join(out, "log.jsonl")
        with open(path) as f:
            lines = f.readlines()
        with open(path, "w") as f:
            f.writelines([lines[0], "garbage\n", *lines[1:]])
        done = self.run_ok(out, {"--steps": 3}, ["--resume"])
        self.assertIn("log.jsonl: a line that is no JSON: it and the lines after it are cut off and kept", done.stderr)
        with open(path + ".cut-2") as f:
            self.assertEqual(f.readlines(), ["garbage\n", *lines[1:]])
        log_events(out)
        with open(path, "a") as f:
            f.write('{"event": "st')  # of a crash: nothing that could be kept
        self.assertEqual(self.run_ok(out, {"--steps": 4}, ["--resume"]).stderr, "")
        os.remove(path)
        done = self.run_ok(out, {"--steps": 5, "--init-from": out}, ["--resume"])
        self.assertIn("log.jsonl is gone or empty: a new one begins", done.stdout)
        self.assertIn("--init-from: not read", done.stdout)

    def test_what_a_resume_changes_is_said(self):
        """Every option that changes the numbers which follow: one line each on the screen, and in the log's start."""
        out = self.out()
        self.run_ok(out, {"--steps": 2})
        self.assertEqual(self.changed(self.run_ok(out, {"--steps": 2}, ["--resume"])), [])
        table = (("--batch-size", 1, "batch-size 2 -> 1"), ("--lr", 0.002, "lr 0.001 -> 0.002"),
                 ("--min-lr", 1e-5, "min-lr 0 -> 1e-05"),
                 ("--schedule", "cosine", "schedule constant -> cosine"),
                 ("--schedule-steps", 40, "schedule-steps 0 -> 40"),
                 ("--warmup", 1, "warmup 0 -> 1"), ("--beta1", 0.8, "beta1 0.9 -> 0.8"),
                 ("--beta2", 0.99, "beta2 0.98 -> 0.99"),
                 ("--eps", 1e-7, "eps 1e-08 -> 1e-07"), ("--weight-decay", 0, "weight-decay 0.05 -> 0"),
                 ("--grad-clip", 0.5, "grad-clip 1 -> 0.5"),
                 ("--eval-windows", 3, "eval-windows 128 -> 3"),
                 ("--val", self.path("*_val_000000.bin"), "val %s -> %s" % (
                     self.path("a_val_*.bin"), self.path("*_val_000000.bin"))))
        options = {"--steps": 3, "--tokens-per-step": 32}
        for name, value, words in table:
            with self.subTest(name):
                copy = self.out()
                shutil.copytree(out, copy)
                self.assertEqual(self.changed(self.run_ok(copy, dict(options, **{name: value}), ["--resume"])),
                                 ["steps 2 -> 3", words])
                self.assertEqual(log_events(copy, "start")[-1]["changed"], ["steps 2 -> 3", words])
        self.run_ok(out, dict(options, **{name: value for name, value, _ in table}), ["--resume"])
        # and with it the tokens of a step
        again = dict({name: value for name, value, _ in table}, **{"--steps": 4, "--batch-size": 4})
        self.assertEqual(self.changed(self.run_ok(out, again, ["--resume"])),
                         ["steps 3 -> 4", "tokens-per-step 32 -> 64", "batch-size 1 -> 4"])
        path = os.path.join(checkpoints(out)[-1], "trainer.json")
        with open(path) as f:
            state = json.load(f)
        del state["lr"], state["schedule"]  # a checkpoint of an earlier version
        with open(path, "w") as f:
            json.dump(state, f)
        mend_manifest(checkpoints(out)[-1])
        self.assertEqual(self.changed(self.run_ok(out, dict(again, **{"--steps": 4}), ["--resume"])),
                         ["lr (the checkpoint does not say) -> 0.002",
                          "schedule (the checkpoint does not say) -> cosine"])

    def test_other_tokens_to_evaluate_on_are_said(self):
        """What --val names may be made anew under a run: its curve is then of two sets."""
        out, val, tokens = self.out(), self.path("made_anew", "b_val_000000.bin"), [i % 32 for i in range(33)]
        os.makedirs(os.path.dirname(val))
        write_shard(val, tokens, mask=[1] * 33)
        self.run_ok(out, {"--steps": 2, "--val": val})
        for changed in ((tokens, [0, 1] + [1] * 31), (tokens[::-1], [1] * 33)):  # the mask, the tokens
            write_shard(val, changed[0], mask=changed[1])
            said = self.changed(self.run_ok(out, {"--steps": 2, "--val": val}, ["--resume"]))
            self.assertEqual(len(said), 1, said)
            self.assertRegex(said[0], r"^val-crc32 \d+ -> \d+$")

    def test_a_run_that_steps_end_at_its_checkpoint(self):
        """The last step is evaluated, once, as in a run of so many steps from the beginning."""
        out, whole = self.out(), self.out()
        self.run_ok(out, {"--steps": 4, "--save-every": 2, "--keep": 0, "--eval-every": 0})
        shutil.rmtree(checkpoints(out)[-1])
        for _ in range(2):
            self.run_ok(out, {"--steps": 2, "--eval-every": 0}, ["--resume"])
        self.run_ok(whole, {"--steps": 2, "--eval-every": 0})
        self.assertEqual(*[log_events(folder, "val") for folder in (out, whole)])
        out = self.out()
        self.run_ok(out, {"--steps": 4, "--save-every": 2, "--keep": 0, "--eval-every": 2})
        shutil.rmtree(checkpoints(out)[-1])
        self.run_ok(out, {"--steps": 2, "--val": None}, ["--resume"])  # it was evaluated before
        self.assertEqual([e["event"] for e in log_events(out)],
                         ["start", "step", "step", "val", "save", "start", "stop"])

    def test_damaged_newest_does_not_cost_the_one_that_is_saved(self):
        """With --keep 1, going on from an older checkpoint: what is saved before the damaged one's step stays."""
        out = self.out()
        self.run_ok(out, {"--steps": 6, "--save-every": 3, "--keep": 0})
        with open(os.path.join(out, "step-00000006", "model.safetensors"), "r+b") as f:
            f.seek(-3, 2)
            f.write(b"\xff\xff\xff")
        self.run_ok(out, {"--steps": 5, "--save-every": 1, "--keep": 1}, ["--resume"])
        self.assertEqual([os.path.basename(c) for c in checkpoints(out)], ["step-00000005", "step-00000006"])
        self.run_ok(out, {"--steps": 7, "--save-every": 1, "--keep": 1}, ["--resume"])
        self.assertEqual([os.path.basename(c) for c in checkpoints(out)], ["step-00000007"])

    def test_rank_file_is_in_every_checkpoint(self):
        """Also when the only copy lay in a checkpoint that --keep has removed."""
        ranks, out = self.path("ranks.bin"), self.out()
        with open(ranks, "wb") as f:
            f.write(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
        write_shard(self.path("ranked_train_000000.bin"), [i % 250 for i in range(16 * 40 + 1)], vocab=257)
        changes = {"--tokenizer": ranks, "--pattern": "gpt2", "--vocab-size": 257, "--save-every": 1, "--keep": 1,
                   "--val": None, "--train": self.path("ranked_train_*.bin")}
        self.refused(["ranks.bin", "--pattern"], dict(changes, **{"--pattern": None}))
        self.run_ok(out, dict(changes, **{"--steps": 1}))
        text = read_bytes(ranks)
        os.remove(ranks)
        self.run_ok(out, dict(changes, **{"--steps": 4, "--tokenizer": None, "--pattern": None, "--sample-every": 2}),
                    ["--resume"])
        self.assertEqual(read_bytes(os.path.join(out, "step-00000004", "gpt2.tiktoken")), text)
        with open(os.path.join(out, "step-00000004", "config.json")) as f:
            self.assertEqual(json.load(f)["tokenizer_pattern"], "gpt2")  # 256 ranks do not tell it
        self.assertEqual([e["step"] for e in log_events(out, "sample")], [2, 4])
        with open(os.path.join(out, "step-00000004", "config.json")) as f:
            config = json.load(f)  # 256 ranks tell no pattern; without an EOS, <|endoftext|> ends a text
        self.assertEqual([config[k] for k in ("tokenizer_pattern", "bos_token_id", "eos_token_id")], ["gpt2", 256, 256])
        for name, value in (("--init-from", os.path.join(out, "step-00000004")),
                            ("--model", os.path.join(out, "step-00000004", "config.json"))):
            other = self.out()
            none = {n: None for n in SMALL
                    if n.startswith(("--attention", "--hidden", "--num", "--inter", "--vocab", "--kq", "--model"))}
            self.run_ok(other, dict(none, **{name: value, "--steps": 1, "--val": None,
                                             "--train": self.path("ranked_train_*.bin")}))
            self.assertEqual(read_bytes(os.path.join(other, "step-00000001", "gpt2.tiktoken")), text)

    def test_resume_without_a_checkpoint(self):
        out = self.out()
        done = self.run_ok(out, None, ["--resume"])
        self.assertIn("step 0", done.stdout + done.stderr)
        self.assertEqual(len(checkpoints(out)), 1)

    def test_a_checkpoint_in_place_of_the_run(self):
        """As --out it is a mistake: a run began inside of it, with --resume from step 0."""
        out = self.out()
        self.run_ok(out, {"--steps": 1})
        [checkpoint] = checkpoints(out)
        files = tree(out)
        for flags in ([], ["--resume"], ["--dry-run"]):
            self.refused(["--out: %s is a checkpoint, wanted the directory of a run" % checkpoint], flags=flags,
                         out=checkpoint)
        self.assertEqual(tree(out), files)

    def test_resume_where_the_checkpoints_are_gone(self):
        """The log says that there was one: weeks of it are not cut for a run from step 0."""
        out = self.out()
        self.run_ok(out)
        shutil.rmtree(checkpoints(out)[0])
        before = tree(out)
        self.assert_refused(self.execute(self.arguments(out, None, ["--resume"])), "log.jsonl says that one was saved")
        self.assertTrue(tree(out) == before)

    def test_resume_of_a_finished_run(self):
        out = self.out()
        self.run_ok(out)
        before = read_bytes(os.path.join(checkpoints(out)[-1], "model.safetensors"))
        self.run_ok(out, None, ["--resume"])
        self.assertEqual(len(checkpoints(out)), 1)
        self.assertTrue(before == read_bytes(os.path.join(checkpoints(out)[-1], "model.safetensors")))

    def test_refused(self):
        """A run in the way, another model, other data, another seed: refused, and nothing changes."""
        out = self.out()
        self.run_ok(out)
        before = tree(out)
        more = {"--steps": 12}
        for pieces, changes, flags in (
                (("--resume",), more, ()),
                (("hidden", "32"), dict(more, **{"--hidden-size": 64}), ["--resume"]),
                (("kq",), dict(more, **{"--kq-conv-key-size": 7}), ["--resume"]),
                (("resume",), dict(more, **{"--attention": "transformer"}), ["--resume"]),
                (("seed",), dict(more, **{"--seed": 6}), ["--resume"]),
                (("source",), dict(more, **{"--train": self.path("a_val_*.bin")}), ["--resume"]),
                (("window length",), dict(more, **{"--seq-len": 15}), ["--resume"])):
            done = self.execute(self.arguments(out, changes, flags))
            self.assert_refused(done, *pieces)
            self.assertTrue(tree(out) == before, f"{changes} {flags} changed the run's files")

    def test_data_made_anew_under_the_same_names(self):
        """As many tokens, but others: a resume would go on with windows that were trained on already."""
        shard, out = self.path("n_train_000000.bin"), self.out()
        write_shard(shard, [i % 32 for i in range(400)])
        self.run_ok(out, {"--train": shard})
        before = tree(out)
        write_shard(shard, [i % 31 for i in range(400)])
        self.assert_refused(self.execute(self.arguments(out, {"--train": shard, "--steps": 12}, ["--resume"])),
                            "source", "other tokens of n")
        self.assertTrue(tree(out) == before)

    def test_every_number_of_the_rope_scaling_is_part_of_the_model(self):
        """A --model config.json that differs from the run's in one of them is another model; the context may grow."""
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 16}
        config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "intermediate_size": 48, "vocab_size": 32,
                  "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": scaling}
        none = {n: None for n in SMALL
                if n.startswith(("--attention", "--hidden", "--num", "--inter", "--vocab", "--kq"))}
        name, out = self.path("scaled.json"), self.out()

        def changed(**keys):
            with open(name, "w") as f:
                json.dump(dict(config, **keys), f)
            return dict(none, **{"--model": name})

        self.run_ok(out, dict(changed(), **{"--steps": 1}))
        for key, value in (("factor", 4.0), ("low_freq_factor", 2.0), ("high_freq_factor", 5.0),
                           ("original_max_position_embeddings", 32)):
            done = self.execute(self.arguments(out, changed(rope_scaling=dict(scaling, **{key: value})), ["--resume"]))
            self.assert_refused(done, "another model", "rope_scaling." + key)
        self.run_ok(out, changed(max_position_embeddings=128), ["--resume"])

    def test_bad_state(self):
        """A trainer.json that lacks something or is of another step, under a manifest that holds."""
        out = self.out()
        self.run_ok(out, {"--steps": 2})
        path = os.path.join(checkpoints(out)[0], "trainer.json")
        with open(path) as f:
            state = json.load(f)
        for text, piece in (("{", "JSON"), ("{}", "step"), (json.dumps(dict(state, step=1)), "step 1, wanted 2"),
                            (json.dumps(dict(state, tokens_seen=-1)), "tokens_seen"),
                            (json.dumps(dict(state, loader={})), "loader"),
                            (json.dumps(dict(state, format=2)), "format"),
                            (json.dumps({k: v for k, v in state.items() if k != "format"}), "format")):
            with open(path, "w") as f:
                f.write(text)
            mend_manifest(checkpoints(out)[0])
            self.assert_refused(self.execute(self.arguments(out, {"--steps": 4}, ["--resume"])), piece)
            self.assertEqual(len(checkpoints(out)), 1)

    def test_bad_checkpoints(self):
        """Tensors that do not fit the model, under a manifest that holds."""
        out = self.out()
        self.run_ok(out, {"--steps": 2})
        for file in ("model.safetensors", "optimizer.safetensors"):
            prefix = "m." if file.startswith("opt") else ""
            for what, pieces in BAD_TENSORS.items():
                copy = self.out()
                shutil.copytree(out, copy)
                path = os.path.join(checkpoints(copy)[-1], file)
                name = spoil(path, what, prefix)
                mend_manifest(checkpoints(copy)[-1])
                before = tree(copy)
                done = self.execute(self.arguments(copy, {"--steps": 4}, ["--resume"]))
                with self.subTest(file=file, what=what):
                    self.assert_refused(done, *(p.format(name=name) for p in pieces))
                    self.assertTrue(tree(copy) == before, "files changed")


BAD_TENSORS = {  # what is done to a tensor file, and what the message must hold
    "missing": ("{name}",), "extra": ("model.layers.0.surprise.weight",), "shape": ("{name}",), "nan": ("{name}",),
               "inf": ("{name}",),
    "cut": ("safetensors",), "longer": ("safetensors",), "header length": ("safetensors",), "offsets": ("safetensors",),
               "dtype": ("{name}",),
    "huge shape": ("safetensors",), "not json": ("safetensors",),
}


def spoil(path, what, prefix=""):
    """Damages a safetensors file; returns the name of the tensor that is hit."""
    tensors, metadata = read_safetensors(path)
    name = prefix + "model.layers.1.self_attn.q_proj.weight"
    dtype, shape, raw = tensors[name]
    if what == "missing":
        del tensors[name]
    elif what == "extra":
        tensors[prefix + "model.layers.0.surprise.weight"] = ("F32", [2], bytes(8))
    elif what == "shape":
        tensors[name] = (dtype, [shape[0] // 2, shape[1] * 2], raw)
    elif what in ("nan", "inf"):
        tensors[name] = (dtype, shape, raw[:40] + struct.pack("<f", float(what)) + raw[44:])
    elif what == "dtype":
        tensors[name] = ("I32", shape, raw)
    if what in ("missing", "extra", "shape", "nan", "inf", "dtype"):
        write_safetensors(path, tensors, metadata)
        return name
    data = bytearray(read_bytes(path))
    length = struct.unpack("<Q", data[:8])[0]
    header = bytes(data[8:8 + length])
    if what == "cut":
        data = data[:-4]
    elif what == "longer":
        data += b"\0\0\0\0"
    elif what == "header length":
        data[:8] = struct.pack("<Q", 1 << 62)
    elif what == "not json":
        data[8:10] = b"[["
    else:
        entries = json.loads(header)
        if what == "offsets":
            entries[name]["data_offsets"][1] += 4
        else:
            entries[name]["shape"] = [1 << 32, 1 << 33]
        new = json.dumps(entries).encode()
        data = bytearray(struct.pack("<Q", len(new))) + new + data[8 + length:]
    with open(path, "wb") as f:
        f.write(data)
    return name


class Tokenizers(Trainer):
    """The shards' tokenizer stands in the manifest.json beside them; all that are known must be one."""

    def shards(self, folder, tokenizer=None, vocab=32, name="a"):
        """Two sets under a manifest as data/README.md describes it, or without one."""
        os.makedirs(self.path(folder), exist_ok=True)
        names = [f"{name}_train_000000.bin", f"{name}_val_000000.bin"]
        for n in names:
            write_shard(self.path(folder, n), [i % 26 for i in range(16 * 20 + 1)], vocab=vocab)
        if tokenizer is not None:
            path = self.path(folder, "manifest.json")
            manifest = {"preparations": {}, "shards": {}}
            if os.path.exists(path):
                with open(path) as f:
                    manifest = json.load(f)
            manifest["preparations"][name] = {"tokenizer": tokenizer}
            manifest["shards"].update({n: {"preparation": name, "tokens": 321} for n in names})
            with open(path, "w") as f:
                json.dump(manifest, f)
        return {"--train": self.path(folder, f"{name}_train_*.bin"), "--val": self.path(folder, f"{name}_val_*.bin")}

    def ranks(self, folder, swap=0):
        """A rank file of 256 single bytes, the first `swap` of them in another order."""
        order = list(range(swap))[::-1] + list(range(swap, 256))
        os.makedirs(self.path(folder), exist_ok=True)
        with open(self.path(folder, "r.tiktoken"), "wb") as f:
            f.write(b"".join(b"%s %d\n" % (base64.b64encode(bytes([b])), i) for i, b in enumerate(order)))
        return {"name": "gpt2", "vocab_size": 257, "bos": 256, "eos": -1, "file": "r.tiktoken", "sha256": str(swap)}

    TOY, BYTES = {"name": "toy", "vocab_size": 32}, {"name": "bytes", "vocab_size": 259}

    def test_from_the_manifest(self):
        out = self.out()
        self.run_ok(out, dict(self.shards("toy", self.TOY), **{"--sample-every": 3}))
        self.assertEqual(len(log_events(out, "sample")), 2)
        with open(os.path.join(checkpoints(out)[-1], "config.json")) as f:
            self.assertEqual(json.load(f)["tokenizer"], "toy")
        out = self.out()
        self.run_ok(out, dict(self.shards("ranks", self.ranks("ranks"), 257),
                              **{"--vocab-size": 257, "--sample-every": 6}))
        with open(os.path.join(checkpoints(out)[-1], "config.json")) as f:
            config = json.load(f)
        self.assertEqual((config["tokenizer"], config["tokenizer_pattern"], config["eos_token_id"]),
                         ("gpt2.tiktoken", "gpt2", 256))
        self.assertEqual(len(log_events(out, "sample")), 1)

    def test_unknown(self):
        """No manifest, or one of another kind: nothing is guessed from the vocabulary, and it is said."""
        for folder, text in (("none", None), ("other", '{"name": "of a web page"}')):
            changes = self.shards(folder)
            if text:
                with open(self.path(folder, "manifest.json"), "w") as f:
                    f.write(text)
            out = self.out()
            done = self.run_ok(out, dict(changes, **{"--sample-every": 3}))
            self.assertIn("unknown", done.stdout)
            self.assertIn("--tokenizer", done.stdout)
            self.assertEqual(log_events(out, "sample"), [])
            with open(os.path.join(checkpoints(out)[-1], "config.json")) as f:
                self.assertNotIn("tokenizer", json.load(f))

    def test_refused(self):
        # two preparations of one folder
        toy, other = self.shards("both", self.TOY), self.shards("both", self.BYTES, 259, "b")
        one, two = self.shards("r1", self.ranks("r1"), 257), self.shards("r2", self.ranks("r2", 9), 257)
        plain = self.shards("plain", None, 259)
        wide = {"--vocab-size": 259}
        for pieces, changes in ((("toy", "bytes"), dict(toy, **{"--train": toy["--train"] + "," + other["--train"]})),
                                (("toy", "bytes"), dict(toy, **{"--val": other["--val"]})),
                                (("toy", "259"), dict(toy, **{"--train": toy["--train"] + "," + plain["--train"]})),
                                (("toy", "259"), dict(toy, **{"--val": plain["--val"]})),
                                (("toy", "bytes"), dict(toy, **{"--tokenizer": "bytes"})),
                                (("259", "toy"), dict(plain, **{"--tokenizer": "toy"})),
                                (("r1/r.tiktoken", "r2/r.tiktoken"),
                                 dict(one, **{"--train": one["--train"] + "," + two["--train"]})),
                                (("r1/r.tiktoken", "r2/r.tiktoken"),
                                 dict(one, **{"--tokenizer": self.path("r2/r.tiktoken"), "--pattern": "gpt2"})),
                                (("gpt2", "llama3"),
                                 dict(one, **{"--tokenizer": self.path("r1/r.tiktoken"), "--pattern": "llama3"}))):
            with self.subTest(pieces=pieces, changes=changes):
                self.refused(pieces, dict(wide, **changes))
        self.run_ok(self.out(),
                    dict(wide, **dict(one, **{"--tokenizer": self.path("r1/r.tiktoken"), "--pattern": "gpt2",
                                              "--steps": 1})))
        out = self.out()
        self.run_ok(out, dict(toy, **{"--vocab-size": 259, "--steps": 1}))
        # who names the tokenizer is blamed, not an option that was not given
        self.refused(("%s: %s: toy" % (NAME, os.path.join(checkpoints(out)[-1], "config.json")), "bytes"),
                     dict(other, **{"--init-from": checkpoints(out)[-1], "--vocab-size": 259}))
        os.remove(self.path("r2/r.tiktoken"))
        self.refused(("the manifest.json beside ", "r2/r.tiktoken: No such file"), dict(two, **wide))

    def test_the_tokenizer_that_the_weights_were_trained_with(self):
        """--tokenizer and --pattern beside --init-from and --resume: another pattern or rank file is refused."""
        ranked, out = dict(self.shards("u", None, 257), **{"--vocab-size": 257}), self.out()
        self.ranks("u"), self.ranks("u2", 9)
        good = dict(ranked, **{"--tokenizer": self.path("u/r.tiktoken"), "--pattern": "gpt2"})
        self.run_ok(out, dict(good, **{"--steps": 1}))
        start, plain = checkpoints(out)[-1], self.out()
        write_shard(self.path("z_train_000000.bin"), [i % 26 for i in range(400)], vocab=0)
        for pieces, changes in ((("llama3", "trained with gpt2"), {"--pattern": "llama3"}),
                                (("u2/r.tiktoken", "CRC-32"), {"--tokenizer": self.path("u2/r.tiktoken")}),
                                (("toy", "trained with gpt2"), {"--tokenizer": "toy", "--pattern": None})):
            self.refused(pieces, dict(good, **dict(changes, **{"--init-from": start,
                                                               "--train": self.path("z_train_*.bin"), "--val": None})))
            self.assert_refused(self.execute(self.arguments(out, dict(good, **dict(changes, **{"--steps": 2})),
                                                            ["--resume"])), *pieces[:1])
        self.run_ok(self.out(), dict(good, **{"--steps": 1, "--init-from": start}))
        self.run_ok(self.out(),
                    dict(good, **{"--steps": 1, "--init-from": start, "--tokenizer": self.path("u2/r.tiktoken")}),
                    ["--no-verify"])
        # no weights: nothing to agree with
        self.run_ok(plain, dict(good, **{"--steps": 1, "--pattern": "llama3", "--vocab-size": 600,
                                         "--train": self.path("z_train_*.bin"), "--val": None}))

    def test_a_sample_ends_where_a_document_does(self):
        """Of a tokenizer without EOS with the BOS of the next one."""
        self.ranks("end")
        write_shard(self.path("end_train_000000.bin"), [256] * 400, vocab=257)
        out = self.out()
        self.run_ok(out, {"--train": self.path("end_train_*.bin"), "--val": None, "--vocab-size": 257, "--steps": 20,
                          "--tokenizer": self.path("end/r.tiktoken"), "--pattern": "gpt2", "--lr": 1e-2,
                          "--sample-every": 20, "--sample-prompt": "ab", "--sample-temperature": 0})
        self.assertEqual([e["text"] for e in log_events(out, "sample")], ["ab"])

    def test_a_sample_of_a_prompt_that_is_not_utf8(self):
        """The log has all of it, with U+FFFD for each byte that is no character, not only what stands before."""
        out = self.out()
        changes = {"--vocab-size": 259, "--sample-every": 6, "--sample-tokens": 1,
                   "--sample-prompt": os.fsdecode(b"ab\xffcd")}
        words = self.arguments(out, {**self.shards("odd_prompt", self.BYTES, 259), **changes})
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        self.assertTrue(log_events(out, "sample")[0]["text"].startswith("ab\ufffdcd"), log_events(out, "sample"))

    def test_a_tokenizer_that_is_not_beside_the_model(self):
        """A file of its name elsewhere, such as where the program was started, is another one."""
        self.ranks("o")
        out, copy = self.out(), self.out()
        self.run_ok(out, dict(self.shards("o", None, 257), **{"--vocab-size": 257, "--steps": 1, "--pattern": "gpt2",
                                                              "--tokenizer": self.path("o/r.tiktoken")}))
        shutil.copytree(checkpoints(out)[-1], copy)
        shutil.move(os.path.join(copy, "gpt2.tiktoken"), self.path("gpt2.tiktoken"))
        self.addCleanup(os.remove, self.path("gpt2.tiktoken"))
        hint = "config.json names it; copy it there or give --tokenizer FILE"
        self.refused([os.path.join(copy, "gpt2.tiktoken"), "No such file", hint],
                     {"--init-from": copy, "--model": None, "--train": self.path("a_train_*.bin"), "--val": None})
        done = subprocess.run([os.path.join(BIN, "infer_mta"), copy, "--prompt", "a"], cwd=self.folder,
                              capture_output=True, text=True)
        self.assertEqual(done.stderr, f"infer_mta: {copy}/gpt2.tiktoken: No such file or directory: {hint}\n")

    def test_a_rank_file_that_is_not_the_manifest_s(self):
        """The checksum of the rank file that the shards were made with stands in the manifest."""
        made = self.ranks("m")
        data = read_bytes(self.path("m/r.tiktoken"))
        changes = dict(self.shards("m", dict(made, bytes=len(data), crc32="%08x" % zlib.crc32(data)), 257),
                       **{"--vocab-size": 257})
        self.run_ok(self.out(), dict(changes, **{"--steps": 1}))
        self.ranks("m", 9)  # the file beside the shards, spoilt
        self.refused(["m/r.tiktoken", "manifest.json", "%08x" % zlib.crc32(data)], changes)
        os.rename(self.path("m/r.tiktoken"), self.path("m/other"))
        self.refused(["m/other", "manifest.json"],
                     dict(changes, **{"--tokenizer": self.path("m/other"), "--pattern": "gpt2"}))

    def test_names_with_signs(self):
        """A folder or file of that very name is meant where there is one, by glob or in full, with a weight and a
        name."""
        for folder in ("a,b", "c[1],d", "e=3,f"):
            changes = self.shards(folder, self.TOY)
            both = changes["--train"] + "=2," + self.path("a_train_*.bin")
            for train, val in ((changes["--train"], changes["--val"]), (both, "n=" + changes["--val"]),
                               (changes["--train"].replace("*", "000000"),
                                changes["--val"].replace("*", "000000") + ",other=" + self.path("a_train_*.bin"))):
                with self.subTest(train=train, val=val):
                    out = self.out()
                    self.run_ok(out, {"--train": train, "--val": val, "--steps": 1})
                    self.assertEqual(len(log_events(out, "val")), 1 + val.count(self.path("a_train_")))

    def said(self, done):
        return [line for line in done.stdout.splitlines() if line.startswith(("--train: ", "--val: "))]

    def test_a_file_twice(self):
        """The same shard by two paths is refused; copies, and what is evaluated and trained on, are said."""
        changes = self.shards("twice", self.TOY)
        shard = self.path("twice", "a_train_000000.bin")
        os.symlink("a_train_000000.bin", self.path("twice", "a_train_000001.bin"))
        os.link(shard, self.path("twice", "b_train_000000.bin"))
        os.symlink("twice", self.path("again"))
        write_shard(self.path("twice", "c_train_000000.bin"), [i % 26 for i in range(16 * 20 + 1)])
        with open(self.path("twice", "recipe.txt"), "w") as f:
            f.write("a_train_000000.bin=2\n./a_train_000000.bin=1\n")
        for train in ("%s,%s" % (shard, shard), "%s,%s" % (shard, os.path.relpath(shard, self.folder)),
                      "%s,%s" % (shard, self.path("again/a_train_000000.bin")),
                      "%s,%s" % (shard, self.path("twice/b_train_*.bin=3")), self.path("twice/a_train_*.bin"),
                      self.path("twice/[ab]_train_000000.bin"), "@" + self.path("twice/recipe.txt")):
            with self.subTest(train):
                self.refused(["--train", "one file"], dict(changes, **{"--train": train}))
        self.refused(["--val", "one file"],
                     dict(changes, **{"--train": shard, "--val": self.path("twice/a_train_*.bin")}))
        self.refused(["--val", "one file"],
                     dict(changes, **{"--train": shard, "--val": "v=" + self.path("twice/[ab]_train_000000.bin")}))
        done = self.run_ok(self.out(),
                           dict(changes, **{"--train": self.path("a_train_*.bin"),
                                            "--val": self.path("twice/[ab]_train_000000.bin"), "--steps": 1}))
        self.assertEqual(self.said(done),
                         ["--val: b: %s is also in another set, as %s" % (self.path("twice/b_train_000000.bin"),
                                                                          shard)])
        done = self.run_ok(self.out(),
                           dict(changes, **{"--train": shard + "," + self.path("twice/c_train_*.bin"), "--steps": 1}))
        self.assertIn("--train: %s and %s hold the same tokens: both count" %
                      (shard, self.path("twice/c_train_000000.bin")), self.said(done))
        for val, words in ((shard, shard), (self.path("again/a_train_000000.bin"), shard),
                           (self.path("twice/c_train_*.bin"), shard)):
            done = self.run_ok(self.out(), dict(changes, **{"--train": shard, "--val": "v=" + val, "--steps": 1}))
            said = [line for line in self.said(done) if "also trained on" in line]
            self.assertEqual((len(said), said[0].startswith("--val: v: "), words in said[0]), (1, True, True),
                             done.stdout)
        write_shard(self.path("twice", "v_val_000000.bin"), [i % 25 for i in range(16 * 20 + 1)])
        self.assertEqual(self.said(self.run_ok(self.out(),
                                               dict(changes, **{"--train": shard,
                                                                "--val": self.path("twice/v_val_*.bin"),
                                                                "--steps": 1}))), [])

    def test_shards_that_are_shorter_than_a_window(self):
        write_shard(self.path("s_train_000000.bin"), [1] * 16)
        write_shard(self.path("s_train_000001.bin"), [i % 26 for i in range(400)])
        done = self.run_ok(self.out(), {"--train": self.path("s_train_*.bin"), "--steps": 1})
        self.assertEqual(self.said(done),
                         ["--train: %s: 16 tokens, less than one window of 17: it is not used" %
                          self.path("s_train_000000.bin")])
        write_shard(self.path("s_train_000002.bin"), [2] * 3)
        self.assertIn("--train: 2 shards are so short",
                      self.said(self.run_ok(self.out(), {"--train": self.path("s_train_*.bin"), "--steps": 1})))

    def test_shards_and_their_manifest(self):
        """Sizes and the header's checksum are compared always, the tokens with --verify-data; what is missing is
        said."""
        changes, shard = self.shards("whole", self.TOY), self.path("whole", "a_train_000000.bin")
        write_shard(self.path("whole", "a_val_000000.bin"), [i % 25 for i in range(16 * 20 + 1)])
        path = self.path("whole", "manifest.json")
        with open(path) as f:
            manifest = json.load(f)
        good = {n: {"preparation": "a", "tokens": 321, "bytes": 1666,
                    "crc32": "%08x" % zlib.crc32(read_bytes(self.path("whole", n))[1024:])}
                for n in ("a_train_000000.bin", "a_val_000000.bin")}

        def say(**entry):
            manifest["shards"] = json.loads(json.dumps(good))
            manifest["shards"]["a_train_000000.bin"].update(entry)
            with open(path, "w") as f:
                json.dump(manifest, f)
        say()
        self.assertEqual(self.said(self.run_ok(self.out(), dict(changes, **{"--steps": 1}))), [])
        done = self.run_ok(self.out(), dict(changes, **{"--steps": 1}), ["--verify-data"])
        self.assertRegex("\n".join(self.said(done)),
                         "^--train: checksums of 0.0 MiB compared in .*\n--val: checksums of 0.0 MiB")
        for entry in ({"bytes": 1668}, {"tokens": 320}, {"crc32": "00000001"}):
            say(**entry)
            self.refused([shard, "manifest.json", str(list(entry.values())[0])], changes)
            self.refused(["--val", shard, "manifest.json"],
                         dict(changes, **{"--train": self.path("a_train_*.bin"), "--val": shard}))
        say()
        data = bytearray(read_bytes(shard))
        data[1500] ^= 1
        with open(shard, "wb") as f:
            f.write(data)
        self.run_ok(self.out(), dict(changes, **{"--steps": 1}))
        self.refused([shard, "damaged"], changes, ["--verify-data"])
        self.refused(["--val", shard, "damaged"],
                     dict(changes, **{"--train": self.path("a_train_*.bin"), "--val": shard}), ["--verify-data"])
        os.remove(path)
        self.refused([shard, "damaged"], changes, ["--verify-data"])  # the header has it too
        data[16:20] = bytes(4)
        with open(shard, "wb") as f:
            f.write(data)
        done = self.run_ok(self.out(), dict(changes, **{"--steps": 1}), ["--verify-data"])
        self.assertIn("--train: 1 shards have no checksum to compare", self.said(done))
        good.update({"a_train_%06d.bin" % i: {} for i in (1, 2)}, b_train_000000={})
        say()
        with open(shard, "wb") as f:
            f.write(data)
        stray = self.path("whole", "a_train_000007.bin")  # of another preparation that was not ended
        write_shard(stray, [i % 23 for i in range(321)])
        done = self.run_ok(self.out(), dict(changes, **{"--steps": 1}))
        self.assertIn(f"--train: {stray} is in no manifest.json, 1 of its set is: it counts all the same",
                      self.said(done))
        os.remove(stray)
        os.symlink("whole", self.path("[w]"))  # a folder of that very name
        for folder in ("whole", "[w]"):
            done = self.run_ok(self.out(),
                               dict(changes, **{"--steps": 1, "--train": self.path(folder, "a_train_*.bin")}))
            self.assertEqual([line for line in self.said(done)
                              if "lists 2 that are not there: %s and others" %
                              self.path(folder, "a_train_000001.bin") in line],
                             self.said(done)[:1])
            self.assertEqual(len(self.said(done)), 1, done.stdout)
        write_shard(self.path("whole", "c_val_000000.bin"), [i % 24 for i in range(400)])
        good["b_val_000000.bin"] = {}
        say()
        done = self.run_ok(self.out(),
                           dict(changes, **{"--steps": 1, "--train": shard,
                                            "--val": self.path("whole", "*_val_*.bin")}))
        self.assertEqual([line.split(": ")[-1] for line in self.said(done)], [self.path("whole", "b_val_000000.bin")],
                         done.stdout)

    def test_bad_manifests(self):
        changes = self.shards("bad", self.TOY)
        for tokenizer, piece in (({"name": "toy", "vocab_size": 31}, "31"), ({"name": "toy"}, "vocabulary"),
                                 ({"name": "gpt2", "vocab_size": 32, "file": "../r"}, "../r"),
                                 ({"name": "gpt2", "vocab_size": 32, "file": "gone"}, "gone")):
            with self.subTest(tokenizer=tokenizer):
                self.shards("bad", tokenizer)
                self.refused(["manifest.json" if piece != "gone" else "gone", piece] if piece != "vocabulary"
                             else [piece], changes)
        with open(self.path("bad", "manifest.json"), "w") as f:
            f.write("{")
        self.refused(["manifest.json", "JSON"], changes)


class InitFrom(Trainer):
    def test_from_a_run(self):
        """RUN stands for its newest good checkpoint, which is named."""
        run, out, other = self.out(), self.out(), self.out()
        self.run_ok(run, {"--save-every": 2, "--keep": 0})
        none = {n: None for n in SMALL
                if n.startswith(("--attention", "--hidden", "--num", "--inter", "--vocab", "--kq", "--model"))}
        done = self.run_ok(out, dict(none, **{"--init-from": run, "--steps": 1}))
        self.assertIn("weights from " + os.path.join(run, "step-00000006"), done.stdout)
        with open(os.path.join(run, "step-00000006", "config.json"), "a") as f:
            f.write(" ")
        done = self.run_ok(other, {"--init-from": run, "--steps": 1})
        self.assertIn("weights from " + os.path.join(run, "step-00000004"), done.stdout)
        self.assertIn("step-00000006", done.stderr)
        empty = tempfile.mkdtemp(dir=self.folder)
        self.refused([empty, "config.json"], dict(none, **{"--init-from": empty}))

    def test_longer_context(self):
        """Fine-tuning with another length, RoPE theta, decay and warmup starts from the weights and a fresh
        optimizer."""
        base, out = self.out(), self.out()
        self.run_ok(base, {"--steps": 30, "--lr": 1e-2})
        self.run_ok(out, {"--init-from": checkpoints(base)[-1], "--seq-len": 32, "--rope-theta": 500000,
                          "--weight-decay": 0, "--warmup": 2, "--steps": 2, "--lr": 1e-9, "--eval-every": 1})
        first = log_events(out, "step")[0]["loss"]
        self.assertLess(first, log_events(base, "step")[0]["loss"] - 0.2)
        with open(os.path.join(checkpoints(out)[-1], "config.json")) as f:
            self.assertEqual(json.load(f)["rope_theta"], 500000)

    def test_plain_checkpoint_starts_mta_at_the_identity(self):
        base, out = self.out(), self.out()
        self.run_ok(base, {"--attention": "transformer", "--kq-conv-key-size": None})
        done = self.run_ok(out, {"--init-from": checkpoints(base)[-1], "--steps": 1, "--lr": 0})
        self.assertIn("started at the identity: model.layers.0.self_attn.kq_conv.weight", done.stdout)
        self.assertNotIn("no identity", done.stdout)
        tensors, _ = read_safetensors(os.path.join(checkpoints(out)[-1], "model.safetensors"))
        kernel = array.array("f", tensors["model.layers.1.self_attn.kq_conv.weight"][2]).tolist()
        self.assertEqual(kernel, ([0] * 5 + [0, 0, 1, 0, 0]) * 2)
        plain, _ = read_safetensors(os.path.join(checkpoints(base)[-1], "model.safetensors"))
        for name, entry in plain.items():
            self.assertEqual(tensors[name], entry, name)

    def test_what_is_left_behind_is_said(self):
        """Of a model from elsewhere: ids that end a text, fp32 weights beside rounded ones; and a tokenizer that is
        taken for the shards' own."""
        base, copy = self.out(), self.out()
        self.run_ok(base, {"--steps": 1, "--tokenizer": "toy"})
        start = {"--init-from": copy, "--model": None, "--attention": None, "--steps": 1, "--lr": 0}
        shutil.copytree(checkpoints(base)[-1], copy)
        quiet = self.run_ok(self.out(), start).stdout
        self.assertNotIn("eos_token_id", quiet)
        self.assertRegex(quiet, r"tokenizer of .*a_train_000000.bin is unknown .*: taken for the model's, toy\n")
        done = self.execute([BINARY, "--init-from", copy, "--val", self.path("a_val_*.bin"), "--eval-only"])
        self.assertRegex(done.stdout, r"tokenizer of .*a_val_000000.bin is unknown .*: taken for the model's, toy\n")
        os.remove(os.path.join(copy, "manifest.json"))
        header = b'{"master.model.embed_tokens.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        with open(os.path.join(copy, "optimizer.safetensors"), "wb") as f:
            f.write(struct.pack("<Q", len(header)) + header + bytes(4))
        for name, ends in (("config.json", [30, 5]), ("generation_config.json", [30, 6])):
            path = os.path.join(copy, name)
            config = {}
            if os.path.exists(path):
                with open(path) as f:
                    config = json.load(f)
            with open(path, "w") as f:
                json.dump(dict(config, eos_token_id=ends), f)
            done = self.run_ok(self.out(), start)
            self.assertIn(f"{copy} has eos_token_id {ends}, the checkpoints of this run 30\n", done.stdout)
            self.assertIn(f"weights from {copy}, as model.safetensors has them in bf16: its fp32 weights", done.stdout)
        with open(path, "w") as f:
            f.write('{"eos_token_id": "</s>"}')
        self.refused(["generation_config.json: eos_token_id: wanted a token id or a list of them"], start)

    def test_what_is_no_identity_is_said(self):
        """A norm of heads and a gate change the model that they are put into."""
        base = self.out()
        self.run_ok(base, {"--attention": "transformer", "--kq-conv-key-size": None, "--steps": 1})
        for kind, said in (("mta", "the norm of heads and its factor by depth"),
                           ("mta-full", "the norm of heads, the gate"),
                           ("diff", "the norm of heads and its factor by depth, what DIFF Transformer subtracts")):
            done = self.run_ok(self.out(), {"--model": None, "--attention": kind, "--kq-conv-key-size": None,
                                            "--init-from": base, "--steps": 1})
            self.assertIn("no identity, so that the model begins as another one: " + said + "\n", done.stdout)

    def test_what_no_tensor_shows(self):
        """The number of heads and the norm's factor: refused where --model brings another one, said where it is asked
        for."""
        base, normed = self.out(), self.out()
        self.run_ok(base, {"--attention": "transformer", "--kq-conv-key-size": None, "--num-attention-heads": 4,
                           "--num-key-value-heads": None, "--steps": 1})
        plain = {"--attention": "transformer", "--kq-conv-key-size": None, "--num-key-value-heads": None, "--steps": 1,
                 "--init-from": base}
        self.refused(["num_attention_heads 4, --model toy has 2", "give --num-attention-heads"],
                     dict(plain, **{"--num-attention-heads": None}))
        done = self.run_ok(self.out(), dict(plain, **{"--num-attention-heads": 2}))
        self.assertIn("step-00000001 has num_attention_heads 4, this run 2\n", done.stdout)
        self.assertNotIn("has num", self.run_ok(self.out(), dict(plain, **{"--num-attention-heads": 4})).stdout)
        self.run_ok(normed, {"--head-norm": "group", "--steps": 1})
        again = {"--init-from": normed, "--model": None, "--attention": None, "--head-norm": "group_depth_scaled",
                 "--steps": 1}
        self.assertIn('has head_norm "group", this run "group_depth_scaled"\n', self.run_ok(self.out(), again).stdout)

    def test_a_head_of_its_own_under_a_preset(self):
        """It is --model that ties them: config.json of the checkpoint does not."""
        base = self.out()
        self.run_ok(base, {"--tie-word-embeddings": "off", "--steps": 1})
        self.refused(["lm_head.weight", "this model's are one (tie_word_embeddings)"], {"--init-from": base})

    def test_bad_checkpoints(self):
        base = self.out()
        self.run_ok(base, {"--steps": 2})
        for what, pieces in BAD_TENSORS.items():
            copy = self.out()
            shutil.copytree(checkpoints(base)[-1], copy)
            name = spoil(os.path.join(copy, "model.safetensors"), what)
            with self.subTest(what=what):
                out = self.out()
                # its manifest says so first
                self.refused(["--init-from", "model.safetensors", "wanted"], {"--init-from": copy}, out=out)
                self.refused([p.format(name=name) for p in pieces], {"--init-from": copy}, ["--no-verify"], out=out)
                self.assertEqual(os.listdir(out), [], "a run that did not start is in the way of the next")
        copy = self.out()
        shutil.copytree(checkpoints(base)[-1], copy)
        config = read_bytes(os.path.join(copy, "config.json"))
        with open(os.path.join(copy, "config.json"), "wb") as f:  # of the same size
            f.write(config.replace(b'"rms_norm_eps": 1', b'"rms_norm_eps": 2'))
        with self.subTest(what="config.json changed"):
            self.refused(["config.json", "CRC-32"], {"--init-from": copy})
        with self.subTest(what="only what a model needs"):
            os.remove(os.path.join(copy, "optimizer.safetensors"))
            with open(os.path.join(copy, "config.json"), "wb") as f:
                f.write(config)
            self.run_ok(self.out(), {"--init-from": copy, "--steps": 1})
        with self.subTest(what="no such folder"):
            self.refused(["/no/such"], {"--init-from": "/no/such"})
        with self.subTest(what="another size"):
            self.refused(["64"], {"--init-from": checkpoints(base)[-1], "--hidden-size": 64})


class Evaluation(Trainer):
    """--eval-only, --score, --eval-first: a checkpoint on the trainer's device, without training."""

    INFER = os.path.join(BIN, "infer_mta")

    def alone(self, checkpoint, *options, stdin=None, stdout=subprocess.PIPE):
        return subprocess.run([BINARY, "--init-from", checkpoint, *map(str, options)], input=stdin, stdout=stdout,
                              stderr=subprocess.PIPE, text=True, cwd=self.folder,
                              env=dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive"), timeout=TIMEOUT,
                              check=False)

    def lines(self, name, requests):
        path = os.path.join(tempfile.mkdtemp(dir=self.folder), name)
        with open(path, "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in requests)
        return path

    def requests(self, texts, limit):
        """Continuations of every length, none among them, of contexts that are shared, in no order."""
        found = []
        for ids in texts:
            ids = ids[:limit + 1]
            for cut in sorted({1, 2, len(ids) // 2, len(ids) - 1} - {0, len(ids)}):
                found += [{"context_ids": ids[:cut], "continuation_ids": ids[cut:end]}
                          for end in {cut, cut + 1, (cut + len(ids)) // 2, len(ids)}]
        random.Random(len(found)).shuffle(found)
        return found

    def agree(self, folder, path, *options):
        """infer_mta's answers to the lines and this trainer's are the same to 1e-4, in the same order."""
        infer = subprocess.run([self.INFER, folder, "--score", path, "--quiet"], capture_output=True, text=True,
                               timeout=TIMEOUT, check=True)
        done = self.alone(folder, "--score", path, *options)
        self.assertEqual(done.returncode, 0, done.stderr)
        got, want = ([json.loads(x) for x in text.splitlines()] for text in (done.stdout, infer.stdout))
        for g, w in zip_all(got, want):
            self.assertEqual(list(g), list(w))
            self.assertEqual((g["tokens"], g["greedy"]), (w["tokens"], w["greedy"]))
            self.assertAlmostEqual(g["logprob"], w["logprob"], delta=1e-4)
            for a, b in zip_all(g["token_logprobs"], w["token_logprobs"]):
                self.assertAlmostEqual(a, b, delta=1e-4)
        return done

    @unittest.skipUnless(os.path.exists(INFER), "infer_mta is not built")
    def test_golden_models_score_as_infer_mta_does(self):
        files = sorted(glob.glob(os.path.join(GOLDEN, "*.safetensors")))
        self.assertGreater(len(files), 9)
        for file in files:
            folder = self.path("golden_" + os.path.basename(file)[:-len(".safetensors")])
            config, texts = golden_checkpoint(file, folder)
            limit = config["max_position_embeddings"]
            path = self.lines("requests.jsonl",
                              self.requests(texts, limit) + [{"context_ids": [1], "continuation_ids": [2]}])
            with self.subTest(case=folder):
                for options in ([], ["--batch-size", 1], ["--batch-size", 3, "--seq-len", min(limit, len(texts[0]))]):
                    self.agree(folder, path, *options)

    @unittest.skipUnless(os.path.exists(INFER), "infer_mta is not built")
    def test_of_equally_probable_ids_the_first_is_greedy(self):
        """All logits are 0: greedy decoding takes id 0, and no other is said to be what it takes."""
        folder = self.path("all_equal")
        golden_checkpoint(sorted(glob.glob(os.path.join(GOLDEN, "*.safetensors")))[0], folder)
        path = os.path.join(folder, "model.safetensors")
        tensors = read_safetensors(path)[0]
        write_safetensors(path, {name: (dtype, shape, bytes(len(raw)) if "embed" in name or "head.w" in name else raw)
                                 for name, (dtype, shape, raw) in tensors.items()})
        ends = [0], [1], [0, 0], [0, 2]
        requests = self.lines("equal.jsonl", [{"context_ids": [1], "continuation_ids": ids} for ids in ends])
        answers = [json.loads(x) for x in self.agree(folder, requests).stdout.splitlines()]
        self.assertEqual([a["greedy"] for a in answers], [True, False, True, False])

    @unittest.skipUnless(os.path.exists(INFER), "infer_mta is not built")
    def test_a_trained_model_scores_texts(self):
        run, out = self.out(), self.out()
        self.run_ok(run, {"--tokenizer": "toy", "--steps": 20, "--lr": 1e-2})
        texts = [("ab" * k, "cde"[:1 + k % 3]) for k in range(1, 7)] + [("", "abc"), ("a", "")]
        path = self.lines("texts.jsonl", [{"context": c, "continuation": e} for c, e in texts])
        done = self.agree(checkpoints(run)[-1], path, "--out", out)
        self.assertEqual(len(done.stdout.splitlines()), len(texts))
        self.assertIn("scored %d in" % len(texts), done.stderr)
        self.assertEqual([e["event"] for e in log_events(out)], ["start", "score", "stop"])
        self.assertEqual(log_events(out, "score")[0]["step"], 20)
        self.assertEqual(checkpoints(out), [])
        long = self.lines("long.jsonl", [{"context": "ab" * 30, "continuation": "c"}])
        self.assert_refused_line(self.alone(run, "--score", long), "line 1", "62 tokens", "16 positions", "--shift")
        infer = subprocess.run([self.INFER, run, "--score", long, "--shift", "--quiet"], capture_output=True, text=True,
                               timeout=TIMEOUT, check=True)
        self.assertAlmostEqual(json.loads(self.alone(run, "--score", long, "--shift").stdout)["logprob"],
                               json.loads(infer.stdout)["logprob"], delta=1e-4)

    def test_answers_come_while_the_input_stays_open(self):
        run = self.out()
        self.run_ok(run)
        line = json.dumps({"context_ids": [1, 2], "continuation_ids": [3]}) + "\n"
        with subprocess.Popen([BINARY, "--init-from", run, "--score", "-"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, env=dict(os.environ, OMP_NUM_THREADS="1")) as child:
            answers = []
            for _ in range(3):
                child.stdin.write(line)
                child.stdin.flush()
                self.assertTrue(select.select([child.stdout], [], [], TIMEOUT)[0])
                answers.append(child.stdout.readline())
            child.stdin.close()
            self.assertEqual(child.wait(timeout=TIMEOUT), 0)
        self.assertEqual(answers, [answers[0]] * 3)

    def test_eval_only_is_what_the_run_said(self):
        """Every set, the loss of the last evaluation bit for bit, the run's step; the checkpoint stays as it is."""
        run, out = self.out(), self.out()
        sets = "one=%s,two=%s" % (self.path("a_val_*.bin"), self.path("a_train_*.bin"))
        self.run_ok(run, {"--val": sets, "--eval-windows": 6})
        before = tree(run)
        want = [e for e in log_events(run, "val") if e["step"] == 6]
        self.assertEqual(len(want), 2)
        options = ["--eval-only", "--val", sets, "--seq-len", 16, "--batch-size", 2, "--eval-windows", 6]
        done = self.alone(run, *options, "--out", out)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(log_events(out, "val"), want)
        for e in want:
            self.assertRegex(done.stdout, r"(?m)^val  %s +%.4f +%.3f +\d+$" % (e["name"], e["loss"], e["perplexity"]))
        self.assertEqual(tree(run), before)
        self.assertEqual(os.listdir(out), ["log.jsonl"])
        figures = [[line for line in text.splitlines() if "available" not in line]
                   for text in (self.alone(run, *options).stdout, done.stdout)]
        self.assertEqual(figures[0], figures[1])  # --out is optional
        if os.path.exists("/dev/full"):  # without it, what cannot be printed is lost
            for more, status, said in (([], 1, NAME + ": standard output: No space left on device\n"),
                                       (["--out", self.out()], 0, "")):
                with open("/dev/full", "w") as full:
                    done = self.alone(run, *options, *more, stdout=full)
                self.assertEqual((done.returncode, done.stderr), (status, said))

    def test_eval_first(self):
        first, plain = self.out(), self.out()
        self.run_ok(first, {"--eval-every": 3}, ["--eval-first"])
        self.run_ok(plain, {"--eval-every": 3})
        self.assertEqual([e["step"] for e in log_events(first, "val")], [0, 3, 6])
        self.assertAlmostEqual(log_events(first, "val")[0]["loss"], math.log(32), delta=0.5)
        self.assertEqual([e["loss"] for e in log_events(first, "step")], [e["loss"] for e in log_events(plain, "step")])
        self.refused(["--eval-first", "--val"], {"--val": None}, ["--eval-first"])

    def test_eval_first_of_a_run_in_parts(self):
        """Once: where it is in the checkpoint of step 0, not again; where it is not, or there is none, it is done."""
        early, late, lost = self.out(), self.out(), self.out()
        for out, flags in ((early, ["--eval-first"]), (late, [])):
            self.run_ok(out, {"--steps": 0}, flags)
        os.makedirs(lost)
        with open(os.path.join(early, "log.jsonl")) as log, open(os.path.join(lost, "log.jsonl"), "w") as copy:
            copy.writelines(log.readlines()[:2])  # as a crash in the first step leaves them
        self.assertEqual([e["event"] for e in log_events(lost)], ["start", "val"])
        for out in (early, late, lost):
            self.run_ok(out, {"--steps": 2, "--eval-every": 2}, ["--eval-first", "--resume"])
            self.assertEqual([e["step"] for e in log_events(out, "val")], [0, 2])

    def assert_refused_line(self, done, *pieces):
        """As assert_refused, where the plan may stand on stderr before the line."""
        self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
        last = done.stderr.splitlines()[-1]
        self.assertTrue(last.startswith(NAME + ": "), done.stderr)
        for piece in pieces:
            self.assertIn(piece, last)

    def test_refused(self):
        run, val = self.out(), self.path("a_val_*.bin")
        self.run_ok(run)
        checkpoint, before = checkpoints(run)[-1], tree(run)
        path = self.lines("one.jsonl", [{"context_ids": [1], "continuation_ids": [2]}])
        for pieces, options in (
            (["--train", "--score"], ["--score", path, "--train", val]),
            (["--steps: it has no use beside --eval-only"], ["--eval-only", "--val", val, "--steps", 3]),
            (["--lr"], ["--score", path, "--lr", 1]),
            (["--resume"], ["--eval-only", "--val", val, "--resume"]),
            (["--val", "--score"], ["--score", path, "--val", val]),
            (["--eval-only and --score"], ["--score", path, "--eval-only"]),
            (["--eval-only", "--val"], ["--eval-only"]),
            (["--shift"], ["--eval-only", "--val", val, "--shift"]),
            (["--seq-len", "17", "16 positions"], ["--score", path, "--seq-len", 17]),
            (["--seq-len", "17", "16 positions"], ["--eval-only", "--val", val, "--seq-len", 17]),
            (["/no/such"], ["--score", "/no/such"]),
            (["/no/such"], ["--eval-only", "--val", "/no/such"]),
            (["holds a run; choose another"], ["--eval-only", "--val", val, "--out", run]),
            (["line 1", "names no tokenizer"],
             ["--score", self.lines("text.jsonl", [{"context": "a", "continuation": "b"}])]),
            (["line 1", "0 to 31"],
             ["--score", self.lines("id.jsonl", [{"context_ids": [1], "continuation_ids": [32]}])]),
        ):
            with self.subTest(options=options):
                done = self.alone(checkpoint, *options)
                self.assertEqual((done.returncode, [p for p in pieces if p not in done.stderr.splitlines()[-1]]),
                                 (1, []), done.stderr)
                if "--score" not in options:
                    self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertTrue(tree(run) == before)
        self.assert_refused(self.execute([BINARY, "--score", path]), "--init-from")
        self.assert_refused(self.execute([BINARY, "--shift", *self.arguments(self.out())[1:]]), "--shift", "--score")

    def test_no_tensor_may_be_absent(self):
        """Training would start it at the identity; there is nothing to evaluate in that."""
        plain, val = self.out(), self.path("a_val_*.bin")
        self.run_ok(plain, {"--attention": "transformer", "--kq-conv-key-size": None})
        done = self.alone(plain, "--eval-only", "--val", val, "--attention", "mta")
        self.assert_refused(done, "kq_conv.weight is missing")
        mta = self.out()
        self.run_ok(mta)
        tensors, _ = read_safetensors(os.path.join(checkpoints(mta)[-1], "model.safetensors"))
        name = "model.layers.1.self_attn.kq_conv.weight"
        write_safetensors(os.path.join(checkpoints(mta)[-1], "model.safetensors"),
                          {n: t for n, t in tensors.items() if n != name})
        path = self.lines("one.jsonl", [{"context_ids": [1], "continuation_ids": [2]}])
        self.assert_refused_line(self.alone(checkpoints(mta)[-1], "--score", path, "--no-verify"), name + " is missing")


class Refused(Trainer):
    def test_options(self):
        self.refused(["unknown option --bacth-size", "--batch-size"], flags=["--bacth-size", "4"])
        self.refused(["--steps", "many"], {"--steps": "many"})
        self.refused(["--lr", "-1"], {"--lr": -1})
        self.refused(["--schedule", "sideways"], {"--schedule": "sideways"})
        self.refused(["--batch-size", "0"], {"--batch-size": 0})
        self.refused(["--seq-len", "0"], {"--seq-len": 0})
        self.refused(["--attention", "some"], {"--attention": "some"})
        self.refused(["no-such-model"], {"--model": "no-such-model"})
        self.refused(["stray"], flags=["stray"])
        self.refused(["--tokens-per-step"], {"--tokens-per-step": 33})
        self.refused(["--train"], {"--train": None})
        self.refused(["--val", "NAME"], {"--val": ""})
        self.refused(["--val", "NAME"], {"--val": "a="})
        for empty in ("%s,", ",%s", "%s,,b=%s"):  # a variable that is not set
            self.refused(["--val", "NAME"], {"--val": empty.replace("%s", self.path("a_val_*.bin"))})
        self.refused(["--val", "called a", "NAME="], {"--val": ",".join([self.path("a_val_*.bin")] * 2)})
        self.refused(["--val", "NAME"], {"--val": "=" + self.path("a_val_*.bin")})
        self.refused(["--sample-prompt", "byte 0x48"],
                     {"--tokenizer": "toy", "--sample-prompt": "Hello", "--sample-every": 3})
        self.refused(["--tokenizer"], {"--tokenizer": ""})
        self.refused(["--pattern", "--tokenizer"], {"--pattern": "gpt2"})
        self.refused(["--lr", "1e-400"], {"--lr": "1e-400"})
        for name in ("--beta1", "--beta2"):  # fp32 has no such number below 1, nor one less it
            self.refused([name, "wanted a number from 0 to 0.99999"], {name: "0.99999998"})
        self.refused(["--val", "no weight"], {"--val": self.path("a_val_*.bin") + "=2"})
        self.refused(["--batch-size", "2147483647"],
                     {"--batch-size": 1 << 20, "--tokens-per-step": 1 << 33, "--seq-len": 1 << 20})
        self.refused(["1073741824 tokens at once, wanted at most 1073741823 with 2 heads"],
                     {"--batch-size": 1 << 20, "--tokens-per-step": 1 << 30, "--seq-len": 1 << 10})

    def test_models(self):
        self.refused(["hidden_size 32", "num_attention_heads 3"],
                     {"--num-attention-heads": 3, "--num-key-value-heads": 3})
        self.refused(["num_attention_heads 4", "num_key_value_heads 3"],
                     {"--num-attention-heads": 4, "--num-key-value-heads": 3})
        self.refused(["kq_conv_key_size: got 6, wanted an odd"], {"--kq-conv-key-size": 6})
        self.refused(['--kq-conv-query-size: got "0"'], {"--kq-conv-query-size": 0})
        self.refused(["num_attention_heads 2", "head_mix_post_softmax 3"], {"--head-mix-post-softmax": 3})
        for layers in ("1,7", "x", " 1", "+1", "1, 0", "1,"):
            self.refused(['kq_conv_layers: got "%s"' % layers, "layers 0 to 1"], {"--kq-conv-layers": layers})
        self.refused(["attention_type diff", "no kq_conv"], {"--attention-type": "diff", "--kq-conv-layers": "all"})
        none, off = "on: no layer has a convolution", "their convolutions are off"
        for kind, changes, words in (("transformer", {"pre-softmax": "on"}, none),
                                     ("diff", {"post-softmax": "on"}, none),
                                     ("mta", {"layers": "none", "pre-softmax": "on"}, none),
                                     ("transformer", {"layers": "1"}, "--kq-conv-layers 1: " + off),
                                     ("mta", {"layers": "all", "pre-softmax": "off"}, off)):
            with self.subTest(kind=kind, changes=changes):  # what was asked for would not come to be
                changes = {"--kq-conv-" + name: value for name, value in changes.items()}
                self.refused([words], dict(changes, **{"--attention": kind}), ["--dry-run"])
        said = self.run_ok(self.out(), {"--attention": "transformer", "--kq-conv-layers": "none"}, ["--dry-run"]).stdout
        self.assertIn("--kq-conv-key-size does nothing: no layer has a convolution", said)
        self.refused(["head size 15 is odd"],
                     {"--hidden-size": 30, "--num-attention-heads": 2, "--intermediate-size": 30})
        path = self.path("broken.json")
        for text, pieces in (("{", ["broken.json"]), ("[]", ["broken.json"]),
                             ('{"hidden_size": "big"}', ["hidden_size"]), ('{"hidden_size": 1e30}', ["hidden_size"]),
                             ('{"hidden_size": 64, "num_attention_heads": 4, "head_dim": 8}', ["head_dim"])):
            with open(path, "w") as f:
                f.write(text)
            changes = {name: None
                       for name in SMALL
                       if name.startswith(("--hidden", "--num", "--inter", "--vocab", "--kq", "--attention"))}
            with self.subTest(config=text):
                self.refused(pieces, dict(changes, **{"--model": path}))

    def test_shards(self):
        bad = self.path("bad.bin")
        tokens = [i % 32 for i in range(200)]
        self.refused(["/no/such_*.bin"], {"--train": "/no/such_*.bin"})
        write_shard(bad, tokens)
        os.truncate(bad, 1024 + 399)
        self.refused(["bad.bin", "cut off"], {"--train": bad})
        os.truncate(bad, 500)
        self.refused(["bad.bin", "header"], {"--train": bad})
        write_shard(bad, tokens)
        with open(bad, "ab") as f:
            f.write(b"\0\0")
        self.refused(["bad.bin", "too long"], {"--train": bad})
        write_shard(bad, tokens, magic=20240521)
        self.refused(["bad.bin", "magic 20240521"], {"--train": bad})
        write_shard(bad, tokens, version=2)
        self.refused(["bad.bin", "version 2"], {"--train": bad})
        write_shard(bad, tokens, count=-3)
        self.refused(["bad.bin", "-3"], {"--train": bad})
        write_shard(bad, tokens, vocab=33)
        self.refused(["bad.bin", "33", "32"], {"--train": bad})
        write_shard(bad, [40] * 200, vocab=0)
        self.refused(["bad.bin", "token id 40", "32"], {"--train": bad})
        self.refused(["bad.bin", "token id 40", "32"], {"--val": bad, "--eval-every": 1})
        write_shard(bad, tokens, mask=[1] * 199)
        self.refused(["bad.mask", "199"], {"--train": bad})
        write_shard(bad, tokens)
        self.refused(["200 tokens", "301"], {"--train": bad, "--seq-len": 300})
        for weight in ("-1", "0", "nan", "0x10", "1e", ""):
            self.refused(["weight"], {"--train": bad + "=" + weight})
        self.refused(["/no/val.bin"], {"--val": "/no/val.bin"})

    def test_output(self):
        blocked = self.path("a_file")
        with open(blocked, "w") as f:
            f.write("x")
        self.refused(["a_file"], out=os.path.join(blocked, "run"))
        self.refused(["a_file"], out=blocked)
        self.refused(["/proc"], out="/proc/no/run")
        self.assertEqual(read_bytes(blocked), b"x")

    def test_names_and_files_that_are_odd(self):
        out = os.path.join(tempfile.mkdtemp(dir=self.folder), "two\nlines")
        self.run_ok(out, {"--steps": 1})
        self.refused_again(out, "two?lines", {})
        os.remove(os.path.join(out, "log.jsonl"))
        os.mkfifo(os.path.join(out, "log.jsonl"))
        self.refused_again(out, "log.jsonl", {"--steps": 2}, ["--resume"])

    def test_a_folder_whose_name_is_very_long(self):
        """A run saves, removes what is not to be kept and goes on, or it is refused before its first step."""
        longest = 4096 - 340
        for length in (longest, longest + 1, 4000, 4095):
            out = os.path.join(self.out(), "")
            out = (out + "/".join(["d" * 200] * 20))[:length]
            if length == longest:
                self.run_ok(out, {"--steps": 3, "--save-every": 1, "--keep": 1, "--val": None})
                self.run_ok(out, {"--steps": 4, "--val": None}, ["--resume"])
                self.assertEqual([name for name in os.listdir(out) if name != "log.jsonl"], ["step-00000004"])
            else:
                self.assert_refused(self.execute(self.arguments(out)), "too long")
                self.assertFalse(os.path.exists(out))

    def test_shards_of_a_resume(self):
        """More than a step of the resume has sequences: where their number comes from is said."""
        out = self.out()
        self.run_ok(out, {"--steps": 1, "--shards": 2})
        less = {"--steps": 2, "--batch-size": 1, "--tokens-per-step": 16}
        self.refused_again(out, "--shards: got 2, as the checkpoint has it, a step has 1 sequences", less, ["--resume"])

    def refused_again(self, out, piece, changes, flags=()):
        """What is there stays."""
        before = [os.path.basename(c) for c in checkpoints(out)]
        self.assert_refused(self.execute(self.arguments(out, changes, flags)), piece)
        self.assertEqual([os.path.basename(c) for c in checkpoints(out)], before)

    @unittest.skipUnless(os.geteuid() == 0, "needs to become another user")
    def test_a_folder_that_may_not_be_read(self):
        """Shards in a folder that cannot be listed are not left out of a pattern without a word."""
        for name in ("open", "closed"):
            os.makedirs(self.path("parts", name))
            write_shard(self.path("parts", name, "a_train_000000.bin"), [i % 32 for i in range(33)])
        os.chmod(self.folder, 0o755)
        os.chmod(self.path("parts", "closed"), 0)
        program = shutil.copy(BINARY, self.path("parts", NAME))  # where this one lies, nobody may look in either
        words = [program, "--model", "toy", "--out", self.path("none"), "--train", self.path("parts/*/a_train_*.bin")]
        done = subprocess.run(words, preexec_fn=lambda: os.setuid(65534), capture_output=True, text=True, cwd="/")
        os.chmod(self.path("parts", "closed"), 0o755)
        self.assert_refused(done, "parts/*/a_train_*.bin: one of its folders cannot be read")

    def test_a_checkpoint_that_is_a_link(self):
        """--keep removes the link, not what it leads to."""
        out, away = self.out(), os.path.join(tempfile.mkdtemp(dir=self.folder), "away")
        self.run_ok(out, {"--steps": 1})
        os.rename(checkpoints(out)[0], away)
        os.symlink(away, os.path.join(out, "step-00000001"))
        before = tree(away)
        self.run_ok(out, {"--steps": 4, "--save-every": 1, "--keep": 1}, ["--resume"])
        self.assertEqual([os.path.basename(c) for c in checkpoints(out)], ["step-00000004"])
        self.assertTrue(tree(away) == before)

    def test_a_shard_that_is_cut_off_under_a_run(self):
        shard, words = self.path("cut_train_000000.bin"), {"--train": self.path("cut_train_*.bin"), "--steps": 10 ** 9,
                                                           "--val": None}
        write_shard(shard, [i % 32 for i in range(100000)])
        with self.launch(self.arguments(self.out(), words)) as child:
            while not child.stdout.readline().startswith("step 1/"):
                self.assertIsNone(child.poll())
            os.truncate(shard, 4096)
            stderr = child.communicate(timeout=TIMEOUT)[1]
        self.assertEqual((child.returncode, stderr.count("\n")), (1, 1), stderr)
        self.assertRegex(stderr, "was cut off while it was read")

    @unsanitized
    @unittest.skipIf(NAME != "train_mta", "skip: the plan of the CPU trainer names its threads")
    def test_threads_follow_what_the_environment_allows(self):
        """As many threads as cores, also where OMP_PROC_BIND has bound the first one before the program starts itself
        again; no more than OMP_THREAD_LIMIT."""
        cores = sorted(os.sched_getaffinity(0))
        bare = {k: v for k, v in os.environ.items()
                if not k.startswith(("OMP_", "GOMP_", "KMP_", "OPENBLAS_"))}
        counts = []
        for variables in ({}, {"OMP_PROC_BIND": "true"}, {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"},
                          {"OMP_PLACES": "{%d}" % cores[0]}, {"OMP_THREAD_LIMIT": "1"},
                          {"OMP_NUM_THREADS": "3", "OMP_THREAD_LIMIT": "2"}):
            done = subprocess.run([BINARY, "--model", "1m", "--dry-run"], env=dict(bare, **variables), text=True,
                                  capture_output=True, timeout=TIMEOUT)
            counts.append(int(re.search(r", (\d+) threads, ", done.stdout)[1]))
        self.assertLessEqual(counts[0], len(cores))
        self.assertEqual(counts, [counts[0]] * 3 + [1, 1, 2])

    def test_little_address_space(self):
        """Under any ulimit -v the program ends: done, or one line (before main: what the loader or OpenBLAS says)."""
        environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS")}

        def start(kib, words):
            return kib, subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                         cwd=self.folder, env=dict(environment, OMP_NUM_THREADS="2"),
                                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (kib * 1024,) * 2))

        # OpenBLAS 0.3.29 tries for ever to get its threads' memory, before main: --version does not end either.
        limits, end = [], time.monotonic() + 20
        for kib, child in [start(kib, [BINARY, "--version"]) for kib in (60000, 90000, *range(100000, 480001, 38000))]:
            try:
                child.communicate(timeout=max(end - time.monotonic(), 0.1))
                limits.append(kib)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
                print(f"left out: ulimit -v {kib}, under which --version does not end")
        children = [start(kib, self.arguments(self.out(), {"--steps": 1, "--val": None})) for kib in limits + [700000]]
        ended = {}
        try:
            for kib, child in children:
                stderr = child.communicate(timeout=60)[1].strip()
                ended[kib] = child.returncode
                self.assertEqual(child.returncode == 0, stderr == "", (kib, child.returncode, stderr))
                if stderr.startswith(NAME + ": out of memory"):
                    self.assertEqual((child.returncode, stderr.count("\n")), (1, 0), (kib, stderr))
        finally:
            for _, child in children:
                child.kill()
        self.assertEqual(ended[700000], 0)
        if NAME == "train_mta":
            self.assertIn(1, ended.values())

    def test_full_disk(self):
        """A file size limit stands for a full disk: one line, no half checkpoint, the one before stays good."""
        out = self.out()
        self.run_ok(out, {"--steps": 2})
        good = tree(checkpoints(out)[0])
        done = self.execute(self.arguments(out, {"--steps": 4}, ["--resume"]), limit=20000)
        self.assert_refused(done, "safetensors")
        self.assertEqual([os.path.basename(c) for c in checkpoints(out)], ["step-00000002"])
        self.assertTrue(tree(checkpoints(out)[0]) == good)
        self.assertFalse([n for n in os.listdir(out) if "partial" in n])
        self.run_ok(out, {"--steps": 4}, ["--resume"])
        self.assertIn("--steps 2: the checkpoint has 4 already", self.run_ok(out, {"--steps": 2}, ["--resume"]).stdout)
        self.assert_refused(self.execute(self.arguments(self.out()), limit=0), ".writable")

    def test_full_file_system(self):
        """A tmpfs, where this user may mount one: too small for a checkpoint, and with room for some and not for
        all."""
        mount = self.path("mount")
        os.makedirs(mount)
        every = {"--save-every": 1, "--keep": 0, "--steps": 9}
        for size, changes, piece, left in (("256k", {"--hidden-size": 128}, "free", 0),
                                           ("5m", dict(every, **{"--hidden-size": 128}), None, 1),
                                           ("12m", dict(every, **{"--hidden-size": 256}), "No space left", 1)):
            if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount],
                              stderr=subprocess.DEVNULL).returncode != 0:
                self.skipTest("mounting a tmpfs is not allowed here")
            try:
                out = os.path.join(mount, "run")
                done = self.execute(self.arguments(out, changes))
                good = checkpoints(out)
                self.assertGreaterEqual(len(good), left, done.stderr)
                if piece is None:  # the oldest made room for the newest, and it is said
                    self.assertEqual(done.returncode, 0, done.stderr)
                    self.assertIn("step-00000001, the oldest checkpoint, was removed", done.stderr)
                    self.assertEqual(os.path.basename(good[-1]), "step-00000009")
                    self.assertEqual(log_events(out, "disk full")[0]["removed"], 1)
                else:
                    self.assert_refused(done, piece)
                if good and piece:
                    self.assertIn(good[-1], done.stderr)
                if good:
                    with open(os.path.join(good[-1], "manifest.json")) as f:
                        for name, entry in json.load(f)["files"].items():
                            self.assertEqual(entry["crc32"], zlib.crc32(read_bytes(os.path.join(good[-1], name))))
                    self.assertFalse([n for n in os.listdir(out) if "partial" in n])
            finally:
                subprocess.run(["umount", mount], check=True)


class Failing(Trainer):
    ATTENTION = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")

    def overflowing(self, out, names=ATTENTION, changes=None, value=lambda i: 3e38 if i % 3 else -3e38):
        """A run of three steps, then weights so large that what they compute overflows. Returns its checkpoint."""
        self.run_ok(out, {**(changes or {}), "--steps": 3})
        last = checkpoints(out)[-1]
        path = os.path.join(last, "model.safetensors")
        tensors, metadata = read_safetensors(path)
        for name in names:
            dtype, shape, raw = tensors[name]
            tensors[name] = (dtype, shape, array.array("f", [value(i) for i in range(len(raw) // 4)]).tobytes())
        write_safetensors(path, tensors, metadata)
        mend_manifest(last)
        return last

    def test_nan_is_skipped_and_counted(self):
        """Every loss is not finite, each update is skipped and changes nothing, the run stops and names the last good
        checkpoint."""
        out = self.out()
        last = self.overflowing(out)
        before = tree(last)
        done = self.execute(self.arguments(out, {"--steps": 200}, ["--resume"]))
        self.assertEqual(done.returncode, 3, done.stdout[-500:] + done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1)
        self.assertIn("step-00000003", done.stderr)
        steps = log_events(out, "step")[3:]
        self.assertEqual([e["skipped"] for e in steps], list(range(1, len(steps) + 1)))
        self.assertTrue(all(e["loss"] is None for e in steps))
        self.assertTrue(2 <= len(steps) <= 20)
        self.assertEqual(log_events(out)[-1]["event"], "stop")
        self.assertEqual(checkpoints(out), [last])
        self.assertTrue(tree(last) == before)

    def test_nan_is_counted_across_a_resume(self):
        """A run that stops between skipped updates gives up at the step at which the whole one does."""
        whole, parts = self.out(), self.out()
        self.overflowing(whole)
        shutil.copytree(whole, parts)
        for out, steps, status in ((whole, 200, 3), (parts, 5, 0), (parts, 200, 3)):
            done = self.execute(self.arguments(out, {"--steps": steps}, ["--resume"]))
            self.assertEqual(done.returncode, status, done.stdout[-500:] + done.stderr)
        self.assertEqual(*[log_events(out)[-1]["step"] for out in (whole, parts)])

    def test_a_checkpoint_that_is_due_behind_a_skipped_update(self):
        """It is made behind the next update that is none. Sequences of one token, and a head whose logits are infinite
        for some tokens only: others train on."""
        out = self.out()
        changes = {"--seq-len": 1, "--batch-size": 1, "--tie-word-embeddings": "off", "--save-every": 2, "--keep": 0,
                   "--val": None}
        self.overflowing(out, ["lm_head.weight"], changes, lambda i: 3e38 if i < 2 else 0)
        self.run_ok(out, {**changes, "--steps": 12}, ["--resume"])
        skipped = [e["step"] for e in log_events(out, "step") if not math.isfinite(e["grad_norm"] or math.nan)]
        due = range(4, 13, 2)
        self.assertTrue(set(due) & set(skipped))
        self.assertEqual({e["step"] for e in log_events(out, "save") if e["step"] > 3},
                         {next(step for step in range(first, 40) if step not in skipped) for first in due})

    def test_a_skipped_update_does_not_count_in_adamw(self):
        """The t of the bias correction is that of the updates that m and v hold, also after a resume. A trainer.json
        with more skipped updates than steps is refused: there is no such t."""
        out = self.out()
        changes = {"--seq-len": 1, "--batch-size": 1, "--tie-word-embeddings": "off", "--save-every": 1, "--keep": 0,
                   "--val": None, "--weight-decay": 0, "--lr": 1e-2, "--beta1": 0.9, "--beta2": 0.98}
        self.overflowing(out, ["lm_head.weight"], changes, lambda i: 3e38 if i < 2 else 0)
        self.run_ok(out, {**changes, "--steps": 8}, ["--resume"])
        self.run_ok(out, {**changes, "--steps": 16}, ["--resume"])
        steps = {e["step"]: e for e in log_events(out, "step")}
        saved = [int(path[-8:]) for path in checkpoints(out)]
        name, compared = "model.norm.weight", 0
        for step in saved:
            if step < 4 or step - 1 not in saved or not steps[step]["skipped"]:
                continue
            tensors = {}
            for at in (step - 1, step):
                for part in ("model", "optimizer"):
                    held = read_safetensors(os.path.join(out, "step-%08d" % at, part + ".safetensors"))[0]
                    tensors.update({(at, n): values(t) for n, t in held.items()})
            weight = "master." + name if (step, "master." + name) in tensors else name
            t = step - steps[step]["skipped"]
            for before, after, m, v in zip_all(*(tensors[key] for key in ((step - 1, weight), (step, weight),
                                                                          (step, "m." + name), (step, "v." + name)))):
                change = 1e-2 * m / (1 - 0.9 ** t) / (math.sqrt(v / (1 - 0.98 ** t)) + 1e-8)
                self.assertAlmostEqual(before - after, change, delta=1e-6 + 1e-3 * abs(change))
                compared += abs(change) > 1e-4
        self.assertGreater(compared, 100)
        path = os.path.join(checkpoints(out)[-1], "trainer.json")
        with open(path, encoding="utf-8") as f:
            state = json.load(f)
        with open(path, "w", encoding="utf-8") as f:
            json.dump({**state, "skipped": state["step"] + 1}, f)
        mend_manifest(checkpoints(out)[-1])
        self.assertIn("trainer.json: skipped 17, wanted at most step, 16",
                      self.execute(self.arguments(out, {**changes, "--steps": 18}, ["--resume"])).stderr)

    def wait_for_file(self, path, child=None):
        """Until the file is there or, where it is one that goes away again, the child has ended."""
        start = time.time()
        while not os.path.exists(path) and time.time() - start < TIMEOUT and (not child or child.poll() is None):
            time.sleep(0.01 if not child else 0.001)

    def stopped(self, child, sig=signal.SIGTERM):
        """Sends the signal: it is answered on the screen, the run is saved and ends with 75."""
        child.send_signal(sig)
        stdout, stderr = child.communicate(timeout=TIMEOUT)
        self.assertEqual(child.returncode, 75, stderr)
        self.assertIn("stopping", stderr)
        return stdout

    def test_signals(self):
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            with self.subTest(signal=sig):
                out = self.out()
                child = self.launch(self.arguments(out, {"--steps": 10 ** 6}))
                self.wait_for_step(out, child=child)
                stdout = self.stopped(child, sig)
                last = checkpoints(out)[-1]
                self.assertIn(os.path.basename(last), stdout)
                self.assertEqual(log_events(out)[-1]["event"], "stop")
                self.assertEqual(log_events(out, "step")[-1]["step"], int(last[-8:]))
                self.run_ok(out, {"--steps": int(last[-8:]) + 1}, ["--resume"])

    def test_signals_that_come_in_pairs(self):
        """A terminal that closes sends SIGHUP twice; Slurm at a job's time limit SIGTERM, SIGCONT and SIGTERM within
        milliseconds, SIGUSR1 before them where it was asked for: the run is saved all the same."""
        limit = (signal.SIGTERM, signal.SIGCONT, signal.SIGTERM)
        for *first, second in ((signal.SIGHUP, signal.SIGHUP), (signal.SIGHUP, signal.SIGINT), limit,
                               (signal.SIGUSR1, *limit)):
            out = self.out()
            child = self.launch(self.arguments(out, {"--hidden-size": 128, "--num-hidden-layers": 4,
                                                     "--batch-size": 200, "--tokens-per-step": 16 * 200 * 100,
                                                     "--steps": 5}))
            self.wait_for_file(os.path.join(out, "log.jsonl"))
            time.sleep(0.2)
            for number in first:
                child.send_signal(number)
                time.sleep(0.02)
            self.stopped(child, second)
            self.assertEqual(len(checkpoints(out)), 1)

    def test_hangup_under_nohup(self):
        """A run that was started with SIGHUP ignored outlives its terminal."""
        out = self.out()
        child = self.launch(["nohup"] + self.arguments(out, {"--steps": 10 ** 6}))
        self.wait_for_step(out, child=child)
        child.send_signal(signal.SIGHUP)
        self.wait_for_step(out, log_events(out, "step")[-1]["step"] + 50, child)
        self.stopped(child)

    def test_signal_during_evaluation_and_sampling(self):
        """Minutes of either are given up; the step before is saved."""
        write_shard(self.path("big_val_000000.bin"), [i % 31 for i in range(16 * 100000 + 1)])
        for changes, event in (({"--val": self.path("big_val_*.bin"), "--eval-windows": 0, "--eval-every": 1}, "val"),
                               ({"--seq-len": 1000, "--batch-size": 1, "--sample-every": 1, "--sample-tokens": 10 ** 6,
                                 "--tokenizer": "toy",
                                 "--sample-temperature": 0, "--num-hidden-layers": 12, "--val": None}, "sample")):
            out = self.out()
            child = self.launch(self.arguments(out, dict(changes, **{"--steps": 10 ** 6})))
            self.wait_for_step(out, child=child)
            time.sleep(0.3)
            self.stopped(child)
            self.assertEqual([os.path.basename(c) for c in checkpoints(out)], ["step-00000001"])
            self.assertEqual(log_events(out, event), [])  # as all of them would have been, minutes later

    def test_signal_leaves_evaluation_and_sample_to_resume(self):
        """Also where it comes behind the last step, in the second of two sets: the log has every line once, and none of
        a part."""
        write_shard(self.path("long_val_000000.bin"), [i % 31 for i in range(16 * 20000 + 1)])
        changes = {"--val": f"a={self.path('a_val_*.bin')},b={self.path('long_val_*.bin')}", "--eval-windows": 0,
                   "--eval-every": 1, "--sample-every": 1, "--sample-tokens": 3, "--tokenizer": "toy", "--steps": 1}
        for _ in range(5):  # the evaluation may be over where this test stood still
            out = self.out()
            child = self.launch(self.arguments(out, changes))
            self.wait_for_step(out)
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=TIMEOUT)
            if child.returncode == 75:
                break
        self.assertEqual([e["event"] for e in log_events(out)], ["start", "step", "save", "stop"])
        left = tree(checkpoints(out)[-1])
        self.run_ok(out, changes, ["--resume"])
        done = ["start", "val", "val", "val_mean", "sample", "save", "stop"]
        self.assertEqual([e["event"] for e in log_events(out)][4:], done)
        for name, data in left.items():  # as a crash before that last save leaves it
            with open(os.path.join(checkpoints(out)[-1], name), "wb") as f:
                f.write(data)
        self.run_ok(out, changes, ["--resume"])
        self.assertEqual([e["event"] for e in log_events(out)][4:], ["start", *done])
        self.run_ok(out, changes, ["--resume"])
        self.assertEqual([e["event"] for e in log_events(out)][12:], ["start", "stop"])
        whole = self.out()
        self.run_ok(whole, changes)
        kinds = ("val", "val_mean", "sample")
        without_time = [[{k: v for k, v in e.items() if k != "time"} for e in log_events(folder) if e["event"] in kinds]
                        for folder in (out, whole)]
        self.assertEqual(*without_time)
        self.assertEqual(*[read_bytes(os.path.join(checkpoints(folder)[-1], "model.safetensors"))
                           for folder in (out, whole)])

    def test_signal_in_the_last_checkpoint(self):
        """All is done by then: the log says so too, as the exit status does."""
        for _ in range(10):  # the checkpoint may be there before the signal
            out = self.out()
            child = self.launch(self.arguments(out, {"--steps": 1, "--hidden-size": 256, "--num-hidden-layers": 4}))
            self.wait_for_file(os.path.join(out, ".step-00000001.partial"), child)
            child.send_signal(signal.SIGTERM)
            stdout, stderr = child.communicate(timeout=TIMEOUT)
            if "stopping" in stderr:
                break
        self.assertIn("stopping", stderr)
        self.assertEqual((child.returncode, log_events(out)[-1]["reason"]), (0, "done"), stdout + stderr)
        self.assertIn("done: 1 steps", stdout)

    def test_second_signal_stops_at_once(self):
        """In a step that takes seconds, the first signal is answered and the second ends the process without a save."""
        for _ in range(5):  # the first signal may come just before the step notices it
            out = self.out()
            child = self.launch(self.arguments(out, {"--hidden-size": 256, "--num-hidden-layers": 8,
                                                     "--intermediate-size": 1024,
                                                     "--batch-size": 200, "--tokens-per-step": 16 * 200 * 100,
                                                     "--steps": 5}))
            self.wait_for_file(os.path.join(out, "log.jsonl"))
            time.sleep(1)
            child.send_signal(signal.SIGINT)
            self.assertTrue(select.select([child.stderr], [], [], TIMEOUT)[0])
            if log_events(out, "step") or checkpoints(out):  # the answer came at the end of the step
                child.communicate()
                continue
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=TIMEOUT)
            if child.returncode == 75:  # the step had come to its end
                continue
            self.assertEqual(child.returncode, 128 + signal.SIGINT)
            self.assertEqual(checkpoints(out), [])
            return
        self.fail("neither was the first signal answered in the middle of a step, nor did the second end it")


class Golden(unittest.TestCase):
    def test_files_that_are_no_golden_case(self):
        """test_mta --golden says what is wrong with a file in one line, and tells a wrong result by its status."""
        program = os.path.join(os.path.dirname(BINARY), "test_mta")
        if not os.path.exists(program):
            self.skipTest("test_mta is not built")
        good, metadata = read_safetensors(os.path.join(ROOT, "dev", "golden", "paper.safetensors"))
        kernel = "model.layers.1.self_attn.kq_conv.weight"
        b, t = good["golden.tokens"][1]
        cases = (({}, None), ({"golden.loss": ("F32", [1], struct.pack("<f", math.nan))}, ""),
                 ({"golden.tokens": ("I32", [0, t], b""), "golden.targets": ("I32", [0, t], b"")}, "at least one"),
                 ({"golden.tokens": ("I32", [b * t],) + good["golden.tokens"][2:]}, "1 dimensions"),
                 ({"golden.tokens": good["golden.tokens"][:2] +
                   (struct.pack("<i", -1) + good["golden.tokens"][2][4:],)}, "out of range"),
                 ({kernel: ("F32", good[kernel][1][::-1], good[kernel][2])}, kernel), ({kernel: None}, kernel),
                 ({"grad." + kernel: None}, "grad." + kernel))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "case.safetensors")
            for changes, message in cases:
                tensors = {n: e for n, e in {**good, **changes}.items() if e is not None}
                write_safetensors(path, tensors, metadata)
                done = subprocess.run([program, "--golden", path], capture_output=True, text=True)
                self.assertEqual(done.returncode, int(message is not None), (changes, done.stdout, done.stderr))
                self.assertIn(message or "", done.stderr)
                self.assertEqual(done.stderr.count("\n"), int(bool(message)))


if __name__ == "__main__":
    main()
