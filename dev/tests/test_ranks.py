#!/usr/bin/env python3
"""One run on several processes over MPI: the same bits whatever their number, resumed on another number, and what
happens when one is lost.

python3 dev/tests/test_ranks.py [--long] [-k PATTERN]     build/openmpi/train_mta and build/mpich/train_mta, whichever
                                                          are there
"""
import glob
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import zlib

from helpers import ROOT, awake, communicate, main, read_bytes, write_shard, zip_all

LONG = "--long" in sys.argv
if LONG:
    sys.argv.remove("--long")
TIMEOUT = 120  # seconds for one run
MPIS = [mpi for mpi in ("openmpi", "mpich") if shutil.which(f"mpirun.{mpi}")
        and os.path.exists(os.path.join(ROOT, f"build/{mpi}/train_mta"))]
RANKED = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
BLOCK = 1 << 16  # elements of the weights that one rank owns: RANKS_BLOCK of mta/ranks.h
TIMES = {"time", "tokens_per_s", "mfu", "seconds", "path"}

# 330,000 parameters: 6 blocks of the arena; 13 sequences a step.
SMALL = {"--model": "1m", "--attention": "mta-full", "--num-hidden-layers": 2, "--hidden-size": 128,
         "--num-attention-heads": 4, "--num-key-value-heads": 2, "--intermediate-size": 256, "--vocab-size": 259,
         "--seq-len": 16, "--batch-size": 2, "--tokens-per-step": 208,
         "--train": "a_train_*.bin=2,b_train_*.bin=1", "--val": "a_val_*.bin,m=b_val_*.bin",
         "--eval-every": 2, "--eval-windows": 9, "--steps": 4, "--lr": 1e-3, "--warmup": 1,
         "--save-every": 2, "--keep": 0, "--sample-every": 2, "--sample-tokens": 4, "--tokenizer": "bytes",
         "--log-every": 1, "--out": "run"}


def binary(mpi):
    return os.path.join(ROOT, f"build/{mpi}/train_mta")


def children(pid):
    """The processes below pid, by /proc."""
    out = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        try:
            with open(path) as f:
                for child in map(int, f.read().split()):
                    out += [child] + children(child)
        except OSError:
            pass
    return out


def rank_of(pid):
    """The rank of a trainer's process, None of another's."""
    try:
        if os.path.basename(os.readlink(f"/proc/{pid}/exe")) != "train_mta":
            return None
        variables = dict(v.split("=", 1) for v in read_bytes(f"/proc/{pid}/environ").decode().split("\0") if "=" in v)
    except OSError:
        return None
    return next((int(variables[name]) for name in RANKED if name in variables), None)


def write_requests(path, n, bad=None):
    """Requests of --score of every length that 16 positions take, in no order; some ask for nothing, some are texts.
    Line `bad` is none. Returns how many ask for something."""
    rng, asked = random.Random(n), 0
    with open(path, "w") as f:
        for line in range(1, n + 1):
            ids = [rng.randrange(256) for _ in range(rng.randint(1, 17))]
            cut = rng.randint(1, len(ids))
            request = {"context_ids": ids[:cut], "continuation_ids": ids[cut:] if line != bad else [999]}
            if line % 7 == 0:
                request = {"context": "ab" * rng.randint(0, 5), "continuation": "cde"}
            asked += line % 7 == 0 or cut < len(ids)
            f.write(json.dumps(request) + "\n")
    return asked


def own_lines(text):
    """What our programs printed on standard error: launchers print more, and on a busy machine a rank may be called
    slow."""
    return [line for line in text.splitlines() if line.startswith("train_mta") and " is slow: " not in line]


class Runs(unittest.TestCase):
    """Shards, and what a run on them has left: also for the CUDA trainer's ranks, in test_ranks_cuda.py."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="test_ranks_")
        rng = random.Random(1)
        cls.data = os.path.join(cls.folder, "data")
        os.mkdir(cls.data)
        for name, windows in (("a_train", 60), ("b_train", 40), ("a_val", 20), ("b_val", 11)):
            n = 16 * windows + 1
            # so that counted targets differ by shard
            mask = [rng.random() < 0.6 for _ in range(n)] if name[0] == "b" else None
            write_shard(os.path.join(cls.data, f"{name}_000000.bin"), [rng.randrange(40) * (i % 3) for i in range(n)],
                        vocab=259, mask=mask)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    def place(self):
        """A working directory with the shards in it, so that all runs have the same arguments."""
        folder = tempfile.mkdtemp(dir=self.folder)
        for path in glob.glob(os.path.join(self.data, "*")):
            os.symlink(path, os.path.join(folder, os.path.basename(path)))
        return folder

    def events(self, cwd, *kinds):
        """The lines of the log of these kinds, without what the clock says."""
        with open(os.path.join(cwd, "run", "log.jsonl")) as f:
            lines = [json.loads(line) for line in f]
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if line["event"] in kinds]

    def checkpoints(self, cwd):
        return {os.path.relpath(path, cwd): read_bytes(path)
                for path in glob.glob(os.path.join(cwd, "run", "step-*", "*"))}

    def assert_same(self, a, b, what):
        self.assertEqual(self.events(a, "step", "val", "sample"), self.events(b, "step", "val", "sample"), what)
        mine, theirs = self.checkpoints(a), self.checkpoints(b)
        self.assertEqual(sorted(mine), sorted(theirs), what)
        self.assertGreater(len(mine), 4)
        self.assertEqual([name for name in mine if mine[name] != theirs[name]], [], what)

    def check_windows(self, cwd, ranks, shards, steps, windows):
        """Each rank has computed the sequences of its own shards. Returns the bytes that all have sent together."""
        [shares] = self.events(cwd, "ranks")
        cut = [windows * v // shards for v in range(shards + 1)]
        wanted = [steps * (cut[shards * (r + 1) // ranks] - cut[shards * r // ranks]) for r in range(ranks)]
        self.assertEqual([share["windows"] for share in shares["ranks"]], wanted)
        self.assertEqual(sum(wanted), steps * windows)
        return sum(share["bytes_sent"] for share in shares["ranks"])


class Ranks(Runs):
    @classmethod
    def setUpClass(cls):
        if not MPIS:
            raise unittest.SkipTest("no MPI: neither mpirun.openmpi with build/openmpi/train_mta nor mpirun.mpich with "
                                    "build/mpich/train_mta "
                                    "(Debian: libopenmpi-dev openmpi-bin, mpich libmpich-dev)")
        super().setUpClass()

    def words(self, ranks, changes=None, flags=(), mpi=None, program=None, launcher=()):
        mpi = mpi or MPIS[0]
        start = [] if ranks == 1 and not launcher else [f"mpirun.{mpi}"] + list(launcher) + ["-n", str(ranks)]
        if start and mpi == "openmpi":
            start[1:1] = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        options = dict(SMALL, **(changes or {}))
        given = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
        return start + (program or [binary(mpi)]) + given + list(flags)

    def start(self, cwd, *args, stdin=subprocess.DEVNULL, **more):
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
        return subprocess.Popen(self.words(*args, **more), cwd=cwd, env=environment, stdin=stdin,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")

    def finish(self, child, seconds=TIMEOUT):
        try:
            stdout, stderr = communicate(child, seconds)
        except subprocess.TimeoutExpired:
            for pid in children(child.pid):
                os.kill(pid, signal.SIGKILL)
            child.kill()
            child.communicate()
            raise
        return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)

    def run_ok(self, cwd, *args, **more):
        done = self.finish(self.start(cwd, *args, **more))
        self.assertEqual(done.returncode, 0, done.stdout[-2000:] + done.stderr)
        return done


class Bits(Ranks):
    def same_on(self, shards, sizes, changes, long_sizes=()):
        """The same losses, norms, samples and checkpoint files on every number of ranks; each computes its share and
        sends what it should."""
        one = self.place()
        self.run_ok(one, 1, dict(changes, **{"--shards": shards}))
        for mpi in MPIS:
            for ranks in list(sizes) + list(long_sizes if LONG else ()):
                many = self.place()
                self.run_ok(many, ranks, dict(changes, **{"--shards": shards}), mpi=mpi)
                self.assert_same(one, many, f"{ranks} ranks, {shards} shards, {mpi}")
                self.check_shares(many, ranks, shards)

    def check_shares(self, cwd, ranks, shards):
        steps = SMALL["--steps"]
        sent = self.check_windows(cwd, ranks, shards, steps, SMALL["--tokens-per-step"] // SMALL["--seq-len"])
        # Every rank sends its gradients of others' elements and to all others its own new weights, and at two saves
        # rank 0 gets m and v, all in fp32. More than that are the names at the start and, for each step, some hundred
        # bytes to every other rank.
        numel = os.path.getsize(os.path.join(cwd, "run", "step-00000002", "model.safetensors")) / 4
        of_rank_0 = math.ceil(math.ceil(numel / BLOCK) / ranks) * BLOCK
        least = 4 * (numel * 2 * steps * (ranks - 1) + 2 * 2 * (numel - of_rank_0))
        self.assertGreater(sent, 0.98 * least)
        self.assertLess(sent, 1.02 * least + 30_000 * ranks * ranks)

    def test_four_shards(self):
        self.same_on(4, (2, 4), {})

    def test_eight_shards_untied(self):
        self.same_on(8, (2, 4), {"--attention": "mta", "--tie-word-embeddings": "off", "--num-key-value-heads": 4},
                     (8,))

    def test_twelve_shards(self):
        """Three and six ranks; a shard of the 13 windows has one or two; --batch-size larger than a shard."""
        self.same_on(12, (3, 6), {"--attention": "transformer", "--batch-size": 3}, (12,))

    def test_more_ranks_than_blocks(self):
        """A model of one block: one rank has all of the moments."""
        small = {"--attention": "diff", "--hidden-size": 32, "--num-attention-heads": 2, "--num-key-value-heads": 2,
                 "--intermediate-size": 48}
        one, many = self.place(), self.place()
        for cwd, ranks in ((one, 1), (many, 4)):
            self.run_ok(cwd, ranks, dict(small, **{"--shards": 4}), mpi=MPIS[-1])
        self.assert_same(one, many, "one block")

    def test_few_counted_targets(self):
        """A step has one sequence with any at most, so that most ranks, or all, have none."""
        one, four = self.place(), self.place()
        for cwd, ranks in ((one, 1), (four, 4)):
            mask = [16 <= i < 32 for i in range(40 * 16 + 1)]
            write_shard(os.path.join(cwd, "c_train_000000.bin"), [i * i % 251 for i in range(len(mask))], vocab=259,
                        mask=mask)
            self.run_ok(cwd, ranks, {"--train": "c_train_*.bin", "--shards": 4})
        self.assert_same(one, four, "few counted targets")
        self.assertEqual({e["loss"] is None for e in self.events(one, "step")}, {True, False})

    def test_shards_change_bits(self):
        """And the comparison sees it: other shards, other last digits."""
        one, two = self.place(), self.place()
        self.run_ok(one, 1, {"--shards": 2})
        self.run_ok(two, 1, {"--shards": 4})
        a, b = self.events(one, "step"), self.events(two, "step")
        self.assertNotEqual(a, b)
        self.assertTrue(all(abs(x["loss"] - y["loss"]) < 1e-4 * x["loss"] for x, y in zip_all(a, b)))

    @unittest.skipUnless(len(MPIS) > 1, "only one MPI")
    def test_other_mpi(self):
        one, other = self.place(), self.place()
        self.run_ok(one, 2, {"--shards": 2}, mpi=MPIS[0])
        self.run_ok(other, 2, {"--shards": 2}, mpi=MPIS[1])
        self.assert_same(one, other, "two MPIs")

    def test_bf16_products(self):
        one, many = self.place(), self.place()
        bf16 = {"--shards": 2, "--matmul": "bf16", "--steps": 2}
        done = self.finish(self.start(one, 1, bf16))
        if "oneDNN" in done.stderr:
            raise unittest.SkipTest(done.stderr.strip())
        self.run_ok(many, 2, bf16)
        self.assert_same(one, many, "bf16")

    def test_not_finite(self):
        """A rate that soon leaves no finite number: every rank skips as one process does, and one of them says so."""
        one, four = self.place(), self.place()
        wild = {"--lr": 900, "--grad-clip": 0, "--steps": 40, "--shards": 4}
        for cwd, ranks in ((one, 1), (four, 4)):
            done = self.finish(self.start(cwd, ranks, wild))
            self.assertEqual(done.returncode, 3, done.stdout[-2000:] + done.stderr)
            self.assertEqual(len(own_lines(done.stderr)), 1, done.stderr)
            self.assertIn("loss or gradient norm was not finite in 5 steps in a row", own_lines(done.stderr)[0])
        steps = self.events(one, "step")
        self.assertEqual((steps[-1]["grad_norm"], steps[-1]["skipped"]), (None, 5))
        self.assertEqual(steps, self.events(four, "step"))

    def test_evaluation_alone(self):
        """--eval-only on three ranks: the figures of one, and in the log how many of the 18 windows each computed."""
        cwd = self.place()
        self.run_ok(cwd, 1, {"--steps": 2})
        alone = ["--eval-only", "--init-from", "run/step-00000002", "--val", "a_val_*.bin,m=b_val_*.bin",
                 "--batch-size", "2", "--eval-windows", "9"]
        nothing = {name: None for name in SMALL}
        figures = [re.findall(r"^val .*", re.sub(r"\x1b\[K", "", self.run_ok(cwd, n, nothing, alone).stdout), re.M)
                   for n in (1, 3)]
        self.assertGreaterEqual(len(figures[0]), 2)
        self.assertEqual(figures[0], figures[1])
        self.run_ok(cwd, 3, nothing, [*alone, "--out", "figures"])
        with open(os.path.join(cwd, "figures", "log.jsonl")) as f:
            ranks = [e["ranks"] for e in map(json.loads, f) if e["event"] == "ranks"]
        self.assertEqual([[r["windows"] for r in e] for e in ranks], [[8, 6, 4]])


class Score(Ranks):
    NOTHING = {name: None for name in SMALL}

    @staticmethod
    def flags(*more):
        return ["--init-from", "run/step-00000002", "--batch-size", "2", *more]

    def trained(self):
        cwd = self.place()
        self.run_ok(cwd, 1, {"--steps": 2})
        return cwd

    def test_same_answers(self):
        """The bytes of one process, in its order; each rank has computed its part of the requests."""
        cwd = self.trained()
        asked = write_requests(os.path.join(cwd, "requests"), 100)
        alone = self.run_ok(cwd, 1, self.NOTHING, self.flags("--score", "requests"))
        self.assertEqual(alone.stdout.count("\n"), 100)
        passes = re.search(r"(\d+) passes over the weights", alone.stderr)[1]
        for mpi in MPIS:
            for ranks in (2, 3):
                # Open MPI 5.0.7 loses pieces of what a rank writes to stdout between two writes to stderr.
                apart = ["sh", "-c", 'exec "$@" 2>> errors', "sh", binary(mpi)]
                done = self.run_ok(cwd, ranks, self.NOTHING, self.flags("--score", "requests", "--out", mpi), mpi=mpi,
                                   program=apart)
                self.assertEqual(done.stdout, alone.stdout, (mpi, ranks))
                errors = os.path.join(cwd, "errors")
                self.assertRegex(read_bytes(errors).decode(),
                                 rf"scored 100 in [\d.]+ s, {passes} passes over the weights")
                os.remove(errors)
                with open(os.path.join(cwd, mpi, "log.jsonl")) as f:
                    [shares] = [line["ranks"] for line in map(json.loads, f) if line["event"] == "ranks"]
                shutil.rmtree(os.path.join(cwd, mpi))
                computed = [share["windows"] for share in shares]
                self.assertEqual((len(computed), sum(computed)), (ranks, asked))
                self.assertGreater(min(computed), asked / ranks / 2)

    def test_bad_requests(self):
        """Refused once, when all before them are answered; a file that is not there, too."""
        cwd = self.trained()
        write_requests(os.path.join(cwd, "requests"), 30, bad=20)
        alone = self.finish(self.start(cwd, 1, self.NOTHING, self.flags("--score", "requests")))
        for name, piece in (("requests", "requests: line 20: continuation_ids: wanted token ids from 0 to 258"),
                            ("none", "none: No such file")):
            done = self.finish(self.start(cwd, 3, self.NOTHING, self.flags("--score", name)))
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertEqual(len(own_lines(done.stderr)), 1, done.stderr)
            self.assertIn(piece, own_lines(done.stderr)[0])
            self.assertEqual(done.stdout, alone.stdout if name == "requests" else "")
        self.assertEqual(alone.stdout.count("\n"), 19)

    def test_a_rank_is_lost(self):
        """Answers come while the input stays open; then a rank is killed while rank 0 waits for the next request."""
        cwd = self.trained()
        child = self.start(cwd, 3, self.NOTHING, self.flags("--score", "-"), stdin=subprocess.PIPE)
        for _ in range(2):
            child.stdin.write('{"context_ids": [1, 2], "continuation_ids": [3]}\n')
            child.stdin.flush()
            self.assertEqual(json.loads(child.stdout.readline())["tokens"], 1)
        pids = {rank_of(pid): pid for pid in children(child.pid)}
        os.kill(pids[1], signal.SIGKILL)
        began = time.monotonic()
        try:
            self.assertNotEqual(child.wait(timeout=TIMEOUT), 0)  # its input stays open: nothing else would end it
        finally:
            print(f"a rank of --score is killed: {time.monotonic() - began:.2f} s to the end")
            done = self.finish(child)
        self.assertEqual(done.stdout, "")
        if MPIS[0] == "openmpi":  # mpiexec of MPICH may end all before they can say why
            self.assertEqual(len(own_lines(done.stderr)), 1, done.stderr)
            self.assertRegex(own_lines(done.stderr)[0],
                             r"rank 1 \(.*\) was lost before the requests after line 2; all ranks end")


class Plan(Ranks):
    def test_dry_run(self):
        """The paper's run on four machines of eight: gradients and weights of 880m sent once but for the own 32nd,
        seven eighths of it inside a machine."""
        nothing = {name: None for name in SMALL}
        done = self.run_ok(self.place(), 1, nothing,
                           ["--dry-run", "--model", "880m", "--seq-len", "2048", "--tokens-per-step", "262144",
                            "--ranks", "32", "--ranks-per-node", "8"])
        self.assertIn("ranks       32 of 1 shard each: 1 micro-batches of at most 4 sequences, 8192 tokens a step",
                      done.stdout)
        sent, weights, added, gathered = map(float, re.search(
            r"sent +([\d.]+) MiB of gradients and ([\d.]+) of weights by each rank in a step; ([\d.]+) and ([\d.]+) by "
            r"each "
            r"machine of 8 through its network", done.stdout).groups())
        self.assertAlmostEqual(sent, 876_563_136 * 4 * 31 / 32 / 2**20, delta=1)
        self.assertEqual(sent, weights)
        self.assertAlmostEqual(added, 876_563_136 * 4 * 24 / 32 / 2**20, delta=2)
        self.assertAlmostEqual(gathered, 8 * 876_563_136 * 4 * 24 / 32 / 2**20, delta=10)
        self.assertIn("own part of m, v", done.stdout)

    def test_memory_taken(self):
        """A rank's memory is what the plan says, beside MPI's own: its part of m and v is all that it has of them."""
        changes = {name: None for name in SMALL if name[2:] not in ("train", "seq-len", "batch-size", "out")}
        changes.update({"--model": "11m", "--tokens-per-step": 128, "--steps": 1, "--save-every": 0})
        measure = "import os, resource, subprocess, sys\n" \
                  "done = subprocess.run(sys.argv[1:])\n" \
                  "rank = os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK'))\n" \
                  "with open('memory.' + rank, 'w') as f:\n" \
                  "    f.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024))\n" \
                  "sys.exit(done.returncode)\n"
        taken, planned = [], []
        for ranks in (2, 4):
            cwd, own = self.place(), dict(changes, **{"--shards": ranks})
            plan = self.run_ok(cwd, 1, own, ["--dry-run", "--ranks", str(ranks)]).stdout
            planned.append(float(re.search(r"total +([\d.]+) MiB", plan)[1]))
            self.run_ok(cwd, ranks, own, program=[sys.executable, "-c", measure, binary(MPIS[0])])
            taken.append([float(read_bytes(os.path.join(cwd, f"memory.{rank}"))) for rank in range(ranks)])
            for mib in taken[-1]:
                self.assertGreater(mib, planned[-1])
                self.assertLess(mib, planned[-1] + 60)
        # Of 11m, m and v are 82 MiB; a rank of four has 20 less of them than one of two.
        self.assertGreater(planned[0] - planned[1], 20)
        self.assertGreater(min(taken[0]) - max(taken[1]), 0.5 * (planned[0] - planned[1]))


class Resume(Ranks):
    def test_four_two_one_four(self):
        """4, 2, 1 and 4 ranks in turn, as the unbroken run on one."""
        settings = {"--save-every": 2, "--schedule-steps": 8, "--seed": 3}
        whole, parts = self.place(), self.place()
        self.run_ok(whole, 1, dict(settings, **{"--steps": 8, "--shards": 4}), ["--resume"])
        for ranks, steps in ((4, 2), (2, 4), (1, 6), (4, 8)):
            done = self.run_ok(parts, ranks,
                               dict(settings, **{"--steps": steps, "--shards": 4 if steps == 8 else None}),
                               ["--resume"])
            if steps > 2:
                self.assertIn(f"resumed from run/step-{steps - 2:08d}", done.stdout)
        self.assertEqual(self.events(whole, "step", "val", "sample"), self.events(parts, "step", "val", "sample"))
        a, b = self.checkpoints(whole), self.checkpoints(parts)
        last = [name for name in a if "step-00000008" in name or name.endswith(".safetensors")]
        self.assertEqual(len(last), 5 + 6)
        self.assertEqual([name for name in last if a[name] != b[name]], [])

    def test_newest_is_damaged(self):
        """It is named and passed over; what follows is what an unbroken run has."""
        whole, broken = self.place(), self.place()
        changes = {"--shards": 2, "--schedule-steps": 6}
        self.run_ok(whole, 1, dict(changes, **{"--steps": 6}), ["--resume"])
        self.run_ok(broken, 2, changes, ["--resume"])
        newest = os.path.join(broken, "run", "step-00000004", "optimizer.safetensors")
        os.truncate(newest, os.path.getsize(newest) - 1)
        done = self.run_ok(broken, 2, dict(changes, **{"--steps": 6}), ["--resume"])
        self.assertEqual(len(own_lines(done.stderr)), 1, done.stderr)
        self.assertIn("checkpoint ignored: run/step-00000004/optimizer.safetensors", own_lines(done.stderr)[0])
        self.assertIn("resumed from run/step-00000002", done.stdout)
        self.assertEqual(self.events(whole, "step", "val", "sample"), self.events(broken, "step", "val", "sample"))

    def test_another_run_in_its_place(self):
        """Where --out is each host's own, rank 1's may hold a checkpoint of that step by another run."""
        cwd, other = self.place(), self.place()
        self.run_ok(cwd, 2, {"--steps": 2})
        self.run_ok(other, 2, {"--steps": 2, "--tokens-per-step": 416})
        elsewhere = 'if [ "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" = 1 ]; then cd "$1"; fi; shift; exec "$@"'
        done = self.finish(self.start(cwd, 2, {}, ["--resume"],
                                      program=["bash", "-c", elsewhere, "elsewhere", other, binary(MPIS[0])]))
        self.assertNotEqual(done.returncode, 0, done.stdout)
        self.assertEqual(len(own_lines(done.stderr)), 1, done.stderr)
        self.assertRegex(own_lines(done.stderr)[0],
                         r"rank 1 \(.*\) has another trainer.json in the checkpoint of --resume")

    def test_full_disk(self):
        """Where rank 0 writes a checkpoint: the oldest gives way, and the others give their part once more. Rank 0
        alone writes below --out; on --resume the others read what the model is and where the run stands."""
        one, two = self.place(), self.place()
        self.run_ok(one, 2, {"--steps": 6, "--shards": 2}, program=self.traced())
        calls = self.calls_of(one, 0)
        at = [n for n, (call, path) in enumerate(calls, 1) if call == "write" and "00000006.partial/optimizer" in path]
        self.assertEqual(self.calls_of(one, 1), [("stat", "run")])
        done = self.run_ok(two, 2, {"--steps": 6, "--shards": 2}, program=self.traced(at[0]))
        self.assertEqual(len(own_lines(done.stderr)), 1, done.stderr)
        self.assertIn("the disk is full: step-00000002, the oldest checkpoint, was removed to save step 6",
                      own_lines(done.stderr)[0])
        a, b = self.checkpoints(one), self.checkpoints(two)
        self.assertEqual({name: a[name] for name in a if "step-00000002" not in name}, b)
        self.run_ok(one, 2, {"--steps": 8}, ["--resume"], program=self.traced())
        self.assertIn(("write", "run/log.jsonl"), self.calls_of(one, 0))
        newest = "run/step-00000006"
        looks = {("stat", "run"), ("statvfs", "run"), ("stat", newest), ("stat", newest + "/config.json")}
        reads = {(call, f"{newest}/{name}") for call in ("open", "read", "close")
                 for name in ("config.json", "trainer.json")}
        self.assertLessEqual(reads, set(self.calls_of(one, 1)))
        self.assertEqual(set(self.calls_of(one, 1)) - reads - looks, set())

    def traced(self, fail_at=0):
        """The trainer, each rank with a list of its system calls on files below --out; a write of rank 0's fails."""
        script = 'rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; head -c 8 /dev/zero > "state.$rank"; rm -f "trace.$rank"; ' \
                 'at=0; [ "$rank" != 0 ] || at=$2; export LD_PRELOAD="$1" FAULT_STATE="state.$rank" ' \
                 'FAULT_TRACE="trace.$rank" FAULT_AT="$at" FAULT_KIND=ENOSPC FAULT_UNDER=run; shift 2; exec "$@"'
        library = os.path.join(ROOT, "build", "faults.so")
        return ["bash", "-c", script, "traced", library, str(fail_at), binary(MPIS[0])]

    def calls_of(self, cwd, rank):
        with open(os.path.join(cwd, f"trace.{rank}")) as f:
            return [tuple(line.rstrip("\n").split(" ", 2)[1:]) for line in f]

    def test_timed_checkpoints(self):
        """When one is due rank 0's clock says: that of the others, who write none, would say so in every step."""
        cwd = self.place()
        self.run_ok(cwd, 2, {"--steps": 100, "--shards": 2, "--save-every": 0, "--save-minutes": 0.002,
                             "--eval-every": 0, "--sample-every": 0, "--sample-tokens": None})
        with open(os.path.join(cwd, "run", "log.jsonl")) as f:
            events = list(map(json.loads, f))
        began, saves = events[0]["time"], [line["time"] for line in events if line.get("timed")]
        self.assertGreater(len(saves), 1)
        # The first comes at least 0.12 s behind the start, each other one so long behind the end of the one before. The
        # line in the log is written later than that end, by however long.
        for n, saved in enumerate(saves, 1):
            self.assertGreaterEqual(saved - began, 0.12 * n - 0.01, (began, saves))

    def test_before_there_were_shards(self):
        """A checkpoint as the first version wrote it, whose trainer.json has no settings, has one shard: it goes on
        alone as it was, on two ranks only with --shards."""
        cwd = self.place()
        self.run_ok(cwd, 1, {"--steps": 2})
        path = os.path.join(cwd, "run", "step-00000002", "trainer.json")
        state = json.loads(read_bytes(path))
        self.assertEqual(state["shards"], 1)
        state = {key: state[key] for key in ("format", "step", "tokens_seen", "skipped", "random", "loader", "program",
                                             "compiler", "arguments")}
        for source in state["loader"]["sources"]:
            del source["crc32"]
            source.pop("sample_crc32", None)
        with open(path, "w") as f:
            json.dump(state, f)
        manifest = os.path.join(cwd, "run", "step-00000002", "manifest.json")
        listed = json.loads(read_bytes(manifest))
        listed["files"]["trainer.json"] = {"bytes": os.path.getsize(path), "crc32": zlib.crc32(read_bytes(path))}
        with open(manifest, "w") as f:
            json.dump(listed, f)
        refused = self.finish(self.start(cwd, 2, {}, ["--resume"]))
        self.assertEqual(refused.returncode, 1, refused.stderr)
        self.assertEqual(len(own_lines(refused.stderr)), 1, refused.stderr)
        self.assertIn("1 shard cannot be divided over 2 ranks, only over 1; --shards 2 goes on with other rounding",
                      refused.stderr)
        done = self.run_ok(cwd, 2, {"--shards": 2}, ["--resume"])
        self.assertIn("changed on --resume: shards (the checkpoint does not say) -> 2", done.stdout)
        shutil.rmtree(os.path.join(cwd, "run", "step-00000004"))
        whole = self.place()
        self.run_ok(cwd, 1, {}, ["--resume"])
        self.run_ok(whole, 1)
        self.assertEqual(self.events(cwd, "step"), self.events(whole, "step"))


class Refusals(Ranks):
    """Exit status 1 and one line, whoever finds the mistake."""

    # Rank 1 runs in another folder, with other arguments or another program.
    ODD = 'if [ "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" = 1 ]; then cd "$1"; shift; program=$1; shift; more=$1; ' \
          'shift 2; exec "$program" "$@" $more; fi; shift 3; exec "$@"'

    def refused(self, pieces, cwd, *args, mpi=None, **more):
        """MPICH 4.2's mpiexec now and then returns the status of a rank that it killed when the first ended."""
        done = self.finish(self.start(cwd, *args, mpi=mpi, **more))
        self.assertIn(done.returncode, (1, 9) if mpi == "mpich" else (1,), done.stdout + done.stderr)
        self.assertEqual(len(own_lines(done.stderr)), 1, done.stderr)
        for piece in pieces:
            self.assertIn(piece, own_lines(done.stderr)[0])
        self.assertFalse(glob.glob(os.path.join(cwd, "run", "step-*")))

    def odd(self, pieces, folder=None, program=None, more="", flags=()):
        cwd, mpi = self.place(), MPIS[0]
        folder, program = folder or cwd, program or binary(mpi)
        self.refused(pieces, cwd, 3, {}, flags, mpi=mpi,
                     program=["bash", "-c", self.ODD, "odd", folder, program, more, binary(mpi)])

    def test_of_all(self):
        self.refused(["unknown option --bogus"], self.place(), 3, {}, ["--bogus"], mpi=MPIS[-1])
        self.refused(["4 shards cannot be divided over 3 ranks, only over 1, 2, 4; --shards 3 goes"], self.place(), 3,
                     {"--shards": 4})
        self.refused(["--shards: got 14, a step has 13 sequences"], self.place(), 1, {"--shards": 14})

    def test_weights_that_none_can_take(self):
        """All find it at once, and only after the meeting about the data: still one line, of no rank."""
        cwd = self.place()
        self.run_ok(cwd, 1, {"--steps": 2, "--out": "first"})
        for _ in range(3):  # otherwise it was often another rank's line
            self.refused(["train_mta: first/step-00000002/model.safetensors: tensor"], cwd, 3,
                         {"--init-from": "first", "--intermediate-size": 192})

    def test_that_rank_0_finds(self):
        cwd = self.place()
        os.mkdir(os.path.join(cwd, "run"))
        with open(os.path.join(cwd, "run", "log.jsonl"), "w") as f:
            f.write("{}\n")
        self.refused(["--out: run holds a run"], cwd, 3)

    def test_other_arguments(self):
        self.odd(["rank 1 (", "other arguments than rank 0"], more="--lr 2e-3")
        # With which it would send and wait for other messages than the others.
        self.odd(["rank 1 (", "other arguments than rank 0"], more="--resume")

    def test_other_data(self):
        other = self.place()
        path = os.path.join(other, "a_train_000000.bin")
        os.remove(path)
        write_shard(path, [1] * (16 * 60 + 1), vocab=259)
        self.odd(["rank 1 (", "other shards for --train or --val than rank 0"], folder=other)
        os.remove(path)
        self.odd(["rank 1 (", "--train: a_train_*.bin: no such shard"], folder=other)

    def test_in_a_dry_run(self):
        """It looks at the data of all ranks, too."""
        other = self.place()
        path = os.path.join(other, "a_val_000000.bin")
        os.remove(path)
        self.odd(["rank 1 (", "--val: a_val_*.bin: no such shard"], folder=other, flags=["--dry-run"])
        write_shard(path, [1] * (16 * 20 + 1), vocab=259)
        self.odd(["rank 1 (", "other shards for --train or --val than rank 0"], folder=other, flags=["--dry-run"])

    def test_other_mask(self):
        """Of which no header tells."""
        other = self.place()
        path = os.path.join(other, "b_train_000000.mask")
        mask = bytearray(read_bytes(path))
        mask[-5] = not mask[-5]
        os.remove(path)
        with open(path, "wb") as f:
            f.write(mask)
        self.odd(["rank 1 (", "other shards for --train or --val than rank 0"], folder=other)

    def test_a_hasty_watch(self):
        self.refused(["--rank-timeout: got 1, wanted 0 or at least 3"], self.place(), 2, {"--rank-timeout": 1})

    def test_other_program(self):
        other = os.path.join(self.folder, "other")
        with open(other, "wb") as f:
            f.write(read_bytes(binary(MPIS[0])) + b"x")
        os.chmod(other, 0o755)
        self.odd(["rank 1 (", "another program file than rank 0"], program=other)

    def test_built_for_one_or_for_another_mpi(self):
        plain = os.path.join(ROOT, "train_mta")
        if os.path.exists(plain):
            self.refused(["started 3 processes, but this program is for one: `make train_mta MPI=1`"], self.place(), 3,
                         program=[plain])
        if len(MPIS) > 1:
            self.refused(["started 3 processes, but MPI sees 1: wanted the launcher of the MPI that"], self.place(), 3,
                         program=[binary(MPIS[1])])


class Underway(Ranks):
    """A run of 4000 steps with a checkpoint every 10, of which something befalls one rank."""

    RUN = {"--steps": 4000, "--save-every": 10, "--keep": 3, "--eval-every": 0, "--sample-every": 0,
           "--sample-tokens": None, "--rank-timeout": 60, "--shards": 4}

    def goes_on(self, child):
        if child.poll() is not None:
            self.fail(f"the run ended by itself, status {child.returncode}: {self.finish(child).stderr}")

    def underway(self, ranks=4, changes=None, mpi=None):
        """A run that has saved once; its processes by rank."""
        cwd = self.place()
        child = self.start(cwd, ranks, dict(self.RUN, **(changes or {})), mpi=mpi)
        end = time.monotonic() + TIMEOUT
        while not glob.glob(os.path.join(cwd, "run", "step-*")):
            self.goes_on(child)
            self.assertLess(time.monotonic(), end)
            time.sleep(0.02)
        saved = max(int(path[-8:]) for path in glob.glob(os.path.join(cwd, "run", "step-*")))
        while not any(e["step"] > saved for e in self.events(cwd, "step")):  # then every rank knows of it
            self.goes_on(child)
            time.sleep(0.02)
        pids = {rank_of(pid): pid for pid in children(child.pid)}
        pids.pop(None, None)
        self.assertEqual(sorted(pids), list(range(ranks)))
        return cwd, child, pids

    def last_good(self, cwd, again=False):
        """A resume on one rank takes up the newest checkpoint and goes on for a step. again: it is one that the run had
        come to (later checkpoints are removed for that), and has the same loss and norm."""
        before = {e["step"]: (e["loss"], e["grad_norm"]) for e in self.events(cwd, "step")}
        steps = sorted(int(path[-8:]) for path in glob.glob(os.path.join(cwd, "run", "step-*")))
        while again and steps[-1] + 1 not in before:
            shutil.rmtree(os.path.join(cwd, "run", f"step-{steps.pop():08d}"))
        step = steps[-1]
        done = self.run_ok(cwd, 1, dict(self.RUN, **{"--steps": step + 1, "--shards": None}), ["--resume"])
        self.assertIn(f"resumed from run/step-{step:08d}", done.stdout)
        self.assertNotIn("checkpoint ignored", done.stderr)
        if again:
            last = self.events(cwd, "step")[-1]
            self.assertEqual((last["loss"], last["grad_norm"]), before[step + 1])


class Faults(Underway):
    # A lost connection is noticed though silence is not.
    PATIENT = {"--rank-timeout": 0}

    def hastily(self, check):
        """With the shortest --rank-timeout; where this machine is so slow that a rank that works seems to stand still,
        once more with a longer one."""
        try:
            check({"--rank-timeout": 3})
        except AssertionError:
            check({"--rank-timeout": 12})

    def ends(self, child, cwd, pieces, seconds=TIMEOUT, status=None):
        """All processes end within so many seconds; one line of ours says why."""
        began = time.monotonic()
        pids = children(child.pid)
        done = self.finish(child, seconds)
        took = time.monotonic() - began
        for _ in range(50 * TIMEOUT):
            if all(rank_of(pid) is None for pid in pids):
                break
            time.sleep(0.02)
        self.assertEqual([pid for pid in pids if rank_of(pid) is not None], [])
        lines = own_lines(done.stderr)
        self.assertEqual(len(lines), 1, done.stderr)
        for piece in pieces + ["the last good checkpoint: run/step-"]:
            self.assertIn(piece, lines[0])
        if status is not None:
            self.assertEqual(done.returncode, status, done.stderr)
        print(f"{self.id().split('.')[-1]}: {took:.2f} s to the end, status {done.returncode}: {lines[0]}")
        self.last_good(cwd, again=True)

    def test_a_rank_is_killed(self):
        cwd, child, pids = self.underway(changes=self.PATIENT)
        os.kill(pids[2], signal.SIGKILL)
        self.ends(child, cwd, ["rank 2 (", "was lost in"])

    def test_rank_0_is_killed(self):
        cwd, child, pids = self.underway(changes=self.PATIENT)
        os.kill(pids[0], signal.SIGKILL)
        self.ends(child, cwd, ["rank 1 (", "rank 0 (", "was lost in"])

    def test_a_rank_is_stopped(self):
        self.hastily(self.a_rank_is_stopped)

    def a_rank_is_stopped(self, timeout):
        cwd, child, pids = self.underway(changes=timeout)
        os.kill(pids[3], signal.SIGSTOP)
        # Without --rank-timeout it would take 20 s.
        self.ends(child, cwd, ["rank 3 (", "is silent since it was"], 20, 71 if MPIS[0] == "openmpi" else None)

    def test_a_rank_hangs(self):
        """Its main thread alone is stopped, as ptrace does it: it lives, sends beats and does nothing."""
        self.hastily(self.a_rank_hangs)

    def a_rank_hangs(self, timeout):
        cwd, child, pids = self.underway(changes=timeout)
        attach = "import ctypes, os, sys\npid = int(sys.argv[1])\n" \
                 "if ctypes.CDLL(None).ptrace(16, pid, None, None): sys.exit(1)\n" \
                 "while os.WIFSTOPPED(os.waitpid(pid, 0)[1]): pass"
        tracer = subprocess.Popen([sys.executable, "-c", attach, str(pids[1])])
        self.ends(child, cwd, ["rank 1 (", "has stood still for"])  # without --rank-timeout it would take 300 s
        self.assertEqual(tracer.wait(), 0, "ptrace is not allowed here")

    @unittest.skipUnless(LONG, "--long")
    def test_a_rank_is_slow(self):
        """Stopped for most of the time: after 20 steps a line says so, and the run goes on."""
        cwd, child, pids = self.underway(2, {"--shards": 2, "--save-every": 2, "--rank-timeout": 60,
                                             "--tokens-per-step": 832})
        end = time.monotonic() + TIMEOUT / 2
        while time.monotonic() < end and len(self.events(cwd, "step")) < 48:
            for _ in range(10):
                os.kill(pids[1], signal.SIGSTOP)
                time.sleep(0.05)
                os.kill(pids[1], signal.SIGCONT)
                time.sleep(0.01)
        os.kill(pids[0], signal.SIGUSR1)
        done = self.finish(child)
        self.assertEqual(done.returncode, 75, done.stderr)
        self.assertRegex(done.stderr,
                         r"rank 1 \(.*\) is slow: [\d.]+ s for a sequence, the middle rank [\d.]+; all others wait for "
                         r"it")

    def test_an_instruction_is_missing(self):
        """Of a rank whose standard error is kept until all meet: it says so all the same."""
        cwd = self.place()
        child = self.start(cwd, 2, {"--shards": 2})
        end, victim = time.monotonic() + TIMEOUT, None
        while not victim:
            self.goes_on(child)
            self.assertLess(time.monotonic(), end)
            for pid in children(child.pid):
                if rank_of(pid) == 1 and "memfd:stderr" in os.readlink(f"/proc/{pid}/fd/2"):
                    victim = pid
            time.sleep(0.005)
        os.kill(victim, signal.SIGILL)
        done = self.finish(child)
        self.assertNotEqual(done.returncode, 0)
        self.assertRegex(done.stderr, r"train_mta: rank 1 \(.*\): this processor lacks an instruction")

    def test_a_mistake_in_the_middle(self):
        """A rank that cannot go on says why, and all end with its status."""
        cwd, child, pids = self.underway(2, {"--save-every": 400, "--shards": 2, "--save-minutes": 0.001})
        os.kill(pids[0], signal.SIGSTOP)  # who writes there
        while read_bytes(f"/proc/{pids[0]}/stat").rsplit(b")", 1)[1].split()[0] != b"T":
            time.sleep(0.001)
        shutil.rmtree(os.path.join(cwd, "run"))
        with open(os.path.join(cwd, "run"), "w"):
            pass
        os.kill(pids[0], signal.SIGCONT)
        done = self.finish(child)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertEqual(len(own_lines(done.stderr)), 1, done.stderr)
        self.assertIn("not saved", own_lines(done.stderr)[0])

    def obeyed(self, number, rank, changes=None, mpi=None):
        cwd, child, pids = self.underway(changes=changes, mpi=mpi)
        os.kill(pids[rank], number)
        done = self.finish(child)
        self.assertEqual(done.returncode, 75, done.stderr)
        self.assertEqual(own_lines(done.stderr), [])
        step = int(re.search(rf"stopped by signal {int(number)} at step (\d+), saved", done.stdout)[1])
        self.assertTrue(os.path.isdir(os.path.join(cwd, "run", f"step-{step:08d}")))
        self.last_good(cwd)
        return cwd, step

    def test_signal_to_another_rank(self):
        self.obeyed(signal.SIGTERM, 3)

    def test_signal_to_rank_0_of_the_other_mpi(self):
        self.obeyed(signal.SIGINT, 0, mpi=MPIS[-1])

    def test_signal_in_an_evaluation(self):
        """An evaluation of every step over all windows: most of the time is spent there. The resume does it again."""
        cwd, step = self.obeyed(signal.SIGUSR1, 1, {"--eval-every": 1, "--eval-windows": 0})
        steps = [e["step"] for e in self.events(cwd, "val")]
        self.assertEqual({steps.count(s) for s in range(1, step + 1)}, {2})


class Hosts(Underway):
    """Two network namespaces on a bridge as hosts, rank 0 on the first, rank 1 on the second."""

    AGENT = '#!/bin/bash\nhost=$1; shift; if [ "$host" = -x ]; then host=$1; shift; fi\n' \
            'exec ip netns exec "%s${host##*.}" bash -c "$*"\n'

    @classmethod
    def setUpClass(cls):
        if os.geteuid() != 0 or not shutil.which("ip"):
            raise unittest.SkipTest("hosts are network namespaces: wanted root and ip")
        super().setUpClass()
        cls.name = f"mta{os.getpid() % 100000}n"
        cls.bridge = cls.name + "b"
        made = cls.ip(f"link add {cls.bridge} type bridge") and cls.ip(f"link set {cls.bridge} up")
        for i in (1, 2):
            space, outer = f"{cls.name}{i}", f"{cls.name}v{i}"
            made = made and cls.ip(f"netns add {space}") and \
                cls.ip(f"link add {outer} type veth peer name eth0 netns {space}") and \
                cls.ip(f"link set {outer} master {cls.bridge} up") and cls.ip(f"-n {space} link set lo up") and \
                cls.ip(f"-n {space} addr add 10.77.0.{i}/24 dev eth0") and cls.ip(f"-n {space} link set eth0 up")
        if not made:
            cls.tearDownClass()
            raise unittest.SkipTest("network namespaces are not allowed here")
        cls.agent, cls.hosts = os.path.join(cls.folder, "agent"), os.path.join(cls.folder, "hosts")
        with open(cls.agent, "w") as f:
            f.write(cls.AGENT % cls.name)
        os.chmod(cls.agent, 0o755)
        with open(cls.hosts, "w") as f:
            f.write("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")

    @classmethod
    def tearDownClass(cls):
        for i in (1, 2):
            cls.ip(f"netns del {cls.name}{i}")
        cls.ip(f"link del {cls.bridge}")
        super().tearDownClass()

    @staticmethod
    def ip(words):
        return subprocess.run(["ip"] + words.split(), stderr=subprocess.DEVNULL).returncode == 0

    def words(self, ranks, changes=None, flags=(), mpi=None, program=None, launcher=()):
        if ranks == 1:
            return super().words(1, changes, flags)
        mpi = mpi or MPIS[0]
        network = {"openmpi": ["--hostfile", self.hosts, "--mca", "plm_rsh_agent", self.agent, "--mca", "btl",
                               "tcp,self"] +
                   [word for part in ("oob", "btl") for word in ("--mca", f"{part}_tcp_if_include", "10.77.0.0/24")],
                   "mpich": ["-launcher", "rsh", "-launcher-exec", self.agent, "-hosts", "10.77.0.1:1,10.77.0.2:1",
                             "-iface", "eth0"]}[mpi]
        words = super().words(ranks, changes, flags, mpi=mpi, launcher=network)
        return ["ip", "netns", "exec", f"{self.name}1"] + words

    def sent_by(self, host):
        """Bytes that its interface has sent: what the bridge's end of the cable has received."""
        with open(f"/sys/class/net/{self.name}v{host}/statistics/rx_bytes") as f:
            return int(f.read())

    def test_bits_and_bytes(self):
        one, two = self.place(), self.place()
        self.run_ok(one, 1, {"--shards": 2})
        before = [self.sent_by(1), self.sent_by(2)]
        self.run_ok(two, 2, {"--shards": 2})
        on_wire = [self.sent_by(1) - before[0], self.sent_by(2) - before[1]]
        self.assert_same(one, two, "two hosts")
        [shares] = self.events(two, "ranks")
        counted = [share["bytes_sent"] for share in shares["ranks"]]
        print(f"counted {counted} bytes, on the wire {on_wire}")
        for wire, count in zip(on_wire, counted):
            self.assertGreater(wire, count)
            self.assertLess(wire, 1.1 * count + 300_000)  # headers of TCP and IP; the launcher's own talk

    def test_a_cable_is_cut(self):
        """No launcher notices; both sides end, each by the other's silence. The launcher then waits for the other host:
        it is not ours to end."""
        cwd = self.place()
        child = self.start(cwd, 2, dict(self.RUN, **{"--shards": 2, "--rank-timeout": 8}))
        try:
            while not glob.glob(os.path.join(cwd, "run", "step-*")):
                self.assertIsNone(child.poll())
                time.sleep(0.02)
            awake(1.2)  # until each has told the other that it is in a step
            trainers = [pid for pid in children(child.pid) if rank_of(pid) is not None] + \
                [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if rank_of(pid) is not None
                 and self.works_in(pid, cwd)]
            self.assertEqual(len(set(trainers)), 2)
            began, looks = time.monotonic(), 0
            self.assertTrue(self.ip(f"link set {self.name}v2 down"))
            while any(rank_of(pid) is not None for pid in trainers):
                self.assertLess(looks, 1000, "without --rank-timeout it would take 20 s")
                looks += 1
                time.sleep(0.02)
            print(f"a cable is cut: {time.monotonic() - began:.2f} s to the end of both ranks")
        finally:
            self.ip(f"link set {self.name}v2 up")
            time.sleep(0.5)
            for pid in children(child.pid):
                os.kill(pid, signal.SIGKILL)
            child.kill()
            _, stderr = child.communicate()
        lines = own_lines(stderr)
        self.assertEqual(len(lines), 1, stderr)
        self.assertIn("rank 1 (", lines[0])
        self.assertIn("is silent since it was in", lines[0])
        self.last_good(cwd, again=True)

    @staticmethod
    def works_in(pid, folder):
        try:
            return os.path.realpath(f"/proc/{pid}/cwd") == os.path.realpath(folder)
        except OSError:
            return False


if __name__ == "__main__":
    main()
