#!/usr/bin/env python3
"""The CUDA trainer on several processes, over the emulator's stand-in for NCCL: the same bits whatever their number,
faults, and planted faults.

python3 dev/tests/test_ranks_cuda.py [-k PATTERN]     build/train_mta_cuda_cpu and build/train_mta_cuda_cpu_fp32
"""
import glob
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest

import test_ranks
from helpers import ROOT, awake, main, read_bytes, zip_all

TIMEOUT = 120  # seconds for one run
BLOCK = test_ranks.BLOCK
EAGER = {"CUDA_CPU_EAGER": "1"}  # what is sent goes ahead of what is computed, else it comes after it
# Can processes be told that they have a host of their own?
HOSTS = os.geteuid() == 0 and shutil.which("unshare") and subprocess.run(["unshare", "--uts", "true"]).returncode == 0

# Of 5 sequences a step four shards have 1, 1, 1 and 2.
SMALL = dict(test_ranks.SMALL, **{"--tokens-per-step": 80, "--steps": 3, "--eval-windows": 5, "--sample-tokens": 2,
                                  "--shards": 4})


def program(precision):
    return os.path.join(ROOT, "build", {"bf16": "train_mta_cuda_cpu", "fp32": "train_mta_cuda_cpu_fp32"}[precision])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Started:
    """So many processes of a program, started as torchrun does it, each with a GPU of its own; where that is
    allowed, `node` of them as if they had a host. more: variables of all; of_rank: by rank, of one."""

    def __init__(self, words, cwd, ranks, more=None, of_rank=None, node=None):
        port, self.ranks = free_port(), []
        for rank in range(ranks):
            variables = dict(os.environ, OMP_NUM_THREADS="1", CUDA_CPU_DEVICES=str(ranks))
            if ranks > 1:
                variables.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank),
                                 LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MTA_PORT=str(port))
            variables.update(more or {})
            variables.update((of_rank or {}).get(rank, {}))
            out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
            named = []
            if node and HOSTS:
                named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"', f"host{rank // node}"]
            child = subprocess.Popen(named + words, cwd=cwd, env=variables, stdin=subprocess.DEVNULL, stdout=out,
                                     stderr=err)
            self.ranks.append((child, out, err))

    def finish(self):
        """Statuses by rank, standard output of rank 0, standard error of all."""
        end, texts = time.monotonic() + TIMEOUT, []
        try:
            for child, _, _ in self.ranks:
                child.wait(max(0.1, end - time.monotonic()))
        finally:
            for child, _, _ in self.ranks:
                child.kill()
                child.wait()
        for _, out, err in self.ranks:
            for file in (out, err):
                file.seek(0)
            texts.append((out.read(), err.read()))
            out.close()
            err.close()
        return [child.returncode for child, _, _ in self.ranks], texts[0][0], "".join(err for _, err in texts)


class Ranks(test_ranks.Runs):
    def start(self, cwd, ranks, precision="bf16", changes=None, flags=(), more=None, of_rank=None, node=None):
        options = dict(SMALL, **(changes or {}))
        given = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
        return Started([program(precision)] + given + list(flags), cwd, ranks, more, of_rank, node)

    def run_ok(self, cwd, *args, **more):
        statuses, out, err = self.start(cwd, *args, **more).finish()
        self.assertEqual(set(statuses), {0}, out[-2000:] + err)
        return out


class Bits(Ranks):
    def same_on(self, precision, sizes, changes):
        """On four ranks, of two hosts, with sending ahead of computing, on others behind it. Returns the folders."""
        one, folders = self.place(), []
        self.run_ok(one, 1, precision, changes)
        for ranks in sizes:
            many = self.place()
            self.run_ok(many, ranks, precision, changes, more=EAGER if ranks == 4 else None,
                        node=2 if ranks == 4 else None)
            self.assert_same(one, many, f"{ranks} ranks, {precision}")
            self.check_bytes(many, ranks, precision, dict(SMALL, **changes))
            if ranks == 4 and HOSTS:
                [shares] = self.events(many, "ranks")
                self.assertEqual([share["host"] for share in shares["ranks"]], ["host0", "host0", "host1", "host1"])
            folders.append(many)
        return folders

    def check_bytes(self, cwd, ranks, precision, options):
        """Each step sends gradients to their owners in fp32 and weights to all as they are stored; each checkpoint asks
        for m, v, master."""
        steps = options["--steps"]
        sent = self.check_windows(cwd, ranks, options["--shards"], steps,
                                  options["--tokens-per-step"] // options["--seq-len"])
        width = 2 if precision == "bf16" else 4
        numel = os.path.getsize(os.path.join(cwd, "run", "step-00000002", "model.safetensors")) / width
        part = min(numel, math.ceil(math.ceil(numel / BLOCK) / ranks) * BLOCK)
        states, saves = 3 if width == 2 else 2, len(glob.glob(os.path.join(cwd, "run", "step-*")))
        least = steps * (ranks - 1) * (4 * numel + width * ranks * part) + saves * 4 * states * (numel - part)
        self.assertGreater(sent, 0.98 * least)
        self.assertLess(sent, 1.02 * least + 60_000 * ranks * ranks)

    @unittest.skipUnless(HOSTS, "ranks of two hosts: wanted root and unshare; the tests here take one")
    def test_bf16_on_two_hosts(self):
        self.same_on("bf16", (4,), {})

    def test_bf16(self):
        self.same_on("bf16", (2,) if HOSTS else (2, 4), {})

    def test_fp32_untied(self):
        self.same_on("fp32", (2, 4), {"--attention": "mta", "--tie-word-embeddings": "off",
                                      "--num-key-value-heads": 4})

    def test_under_the_backward_pass(self):
        """A model of many layers: most gradients are on their way before the backward pass has come to its end, whether
        a rank has one shard or two, with layers that are computed again; nothing more is sent than else."""
        deep = {"--attention": "transformer", "--num-hidden-layers": 12, "--recompute": "block", "--steps": 2}
        for folder in self.same_on("fp32", (2, 4), deep):
            shares = self.events(folder, "ranks")[0]["ranks"]
            early, all_ = (sum(share[key] for share in shares) for key in ("bytes_early", "bytes_reduced"))
            numel = os.path.getsize(os.path.join(folder, "run", "step-00000002", "model.safetensors")) / 4
            self.assertAlmostEqual(all_ / (4 * numel * (len(shares) - 1) * deep["--steps"]), 1, delta=0.02)
            self.assertGreaterEqual(early / all_, 0.8, shares)
            self.assertLess(early / all_, 0.9, "and the first bucket holds the embedding")

    def test_eight_and_twelve_shards(self):
        """Of which a rank has two or more: sums wait for their neighbours."""
        for sizes, shards in (((2, 4), 8), ((3, 6), 12)):
            self.same_on("bf16", sizes, {"--shards": shards, "--tokens-per-step": 16 * 13, "--steps": 2})

    def test_one_block(self):
        """A model that one rank owns whole; three ranks."""
        self.same_on("bf16", (3,), {"--attention": "diff", "--hidden-size": 32, "--num-attention-heads": 2,
                                    "--num-key-value-heads": 2, "--intermediate-size": 48, "--shards": 3})

    def test_sums_of_nccl(self):
        """--reduce nccl: nearly the same, said in the plan and the log; and nothing changes for one process. In fp32:
        the sum of four gradients that were rounded to bf16 is nearly always exact, in any order."""
        tree, nccl = self.place(), self.place()
        self.run_ok(tree, 4, "fp32", {"--steps": 2})
        out = self.run_ok(nccl, 4, "fp32", {"--steps": 2, "--reduce": "nccl"})
        self.assertIn("--reduce nccl: NCCL adds the gradients in its own order", out)
        self.assertEqual(self.events(nccl, "start")[0]["reduce"], "nccl")
        a, b = self.events(tree, "step"), self.events(nccl, "step")
        self.assertNotEqual(a, b)
        self.assertTrue(all(abs(x["loss"] - y["loss"]) < 1e-3 * x["loss"] for x, y in zip_all(a, b)), (a, b))

    def test_evaluation_alone(self):
        cwd = self.place()
        self.run_ok(cwd, 1, "bf16", {"--steps": 2})
        nothing = {name: None for name in SMALL}
        alone = ["--eval-only", "--init-from", "run/step-00000002", "--val", "a_val_*.bin,m=b_val_*.bin",
                 "--batch-size", "2", "--eval-windows", "7"]
        outs = [re.sub(r"\x1b\[K", "", self.run_ok(cwd, n, "bf16", nothing, alone)) for n in (1, 3)]
        figures = [re.findall(r"^val .*", out, re.M) for out in outs]
        self.assertGreaterEqual(len(figures[0]), 2)
        self.assertEqual(figures[0], figures[1])

    def test_score(self):
        """--score on two and three ranks: the bytes of one. A GPU that hangs is named."""
        cwd = self.place()
        self.run_ok(cwd, 1, "bf16", {"--steps": 2})
        test_ranks.write_requests(os.path.join(cwd, "requests"), 60)
        flags = ["--score", "requests", "--init-from", "run/step-00000002", "--batch-size", "2"]
        nothing = {name: None for name in SMALL}
        answers = [self.run_ok(cwd, n, "bf16", nothing, flags) for n in (1, 2, 3)]
        self.assertEqual(answers[0].count("\n"), 60)
        self.assertEqual(answers, [answers[0]] * 3)
        run = self.start(cwd, 3, "bf16", nothing, flags + ["--rank-timeout", "6"],
                         of_rank={1: {"CUDA_CPU_HANG": "embedding_forward_kernel<WIDE>:3"}})
        statuses, out, err = run.finish()
        self.assertEqual((set(statuses), out), ({71}, ""), err)
        self.assertRegex(err.splitlines()[-1], r"rank 1 \(.*\) has stood still .* in the requests from line \d+; all")


class Plan(Ranks):
    def test_prediction(self):
        """880m on four machines of eight: of 3.5 GB of gradients NVLink carries 7/8, and a NIC three quarters of an
        eighth; weights of half the size; all but the embedding and one layer can hide."""
        paper = ["--dry-run", "--model", "880m", "--seq-len", "2048", "--tokens-per-step", "262144", "--ranks", "32",
                 "--ranks-per-node", "8"]
        out = self.run_ok(self.place(), 1, "bf16", {name: None for name in SMALL}, paper)
        found = re.search(r"predicted +(\d+)% of the speed of 32 GPUs that need not speak to each other, (\d+)% if "
                          r"nothing were sent under the backward pass\n +\(computing ([\d.]+) ms, gradients ([\d.]+), "
                          r"of which ([\d.]+) can hide, weights ([\d.]+); .*nothing was measured\)", out)
        self.assertIsNotNone(found, out)
        under, after, computing, gradients, hidden, weights = map(float, found.groups())
        size = 4 * 876_563_136 * 1e-6  # MB: over GB/s, ms
        self.assertAlmostEqual(gradients, size * (7 / 8 / 360 + (1 / 8 - 1 / 32) / 46), delta=0.1)
        self.assertAlmostEqual(weights, size / 2 * 31 / 32 / 360, delta=0.1)
        self.assertAlmostEqual(hidden / gradients, 1 - (197_001_216 + 28_320_000) / 876_563_136, delta=0.01)
        self.assertAlmostEqual(after, 100 * computing / (computing + gradients + weights), delta=1)
        self.assertAlmostEqual(under, 100 * computing / (computing + gradients - hidden + weights), delta=1)


class Resume(Ranks):
    def test_four_two_one_four(self):
        settings = {"--schedule-steps": 8, "--seed": 3}
        whole, parts = self.place(), self.place()
        self.run_ok(whole, 1, "bf16", dict(settings, **{"--steps": 8}), ["--resume"])
        for ranks, steps in ((4, 2), (2, 4), (1, 6), (4, 8)):
            changes = dict(settings, **{"--steps": steps, "--shards": 4 if steps == 2 else None})
            out = self.run_ok(parts, ranks, "bf16", changes, ["--resume"])
            if steps > 2:
                self.assertIn(f"resumed from run/step-{steps - 2:08d}", out)
        self.assertEqual(self.events(whole, "step", "val", "sample"), self.events(parts, "step", "val", "sample"))
        a, b = self.checkpoints(whole), self.checkpoints(parts)
        tensors = [name for name in a if name.endswith(".safetensors")]
        self.assertEqual(len(tensors), 8)
        self.assertEqual([name for name in tensors if a[name] != b[name]], [])


class Faults(Ranks):
    RUN = {"--steps": 4000, "--save-every": 2, "--eval-every": 0, "--sample-every": 0, "--sample-tokens": None,
           "--rank-timeout": 0}  # a lost connection is noticed though silence is not
    LITTLE = {"--hidden-size": 64, "--num-attention-heads": 2, "--num-key-value-heads": 2, "--intermediate-size": 128}

    def underway(self, ranks):
        cwd = self.place()
        run = self.start(cwd, ranks, "bf16", self.RUN)
        end = time.monotonic() + TIMEOUT
        while self.newest(cwd) < 4:
            self.assertIsNone(run.ranks[0][0].poll(), "the run ended by itself")
            self.assertLess(time.monotonic(), end)
            time.sleep(0.02)
        return cwd, run

    def newest(self, cwd):
        """Its step; 0: there is no checkpoint yet."""
        return max((int(path[-8:]) for path in glob.glob(os.path.join(cwd, "run", "step-*"))), default=0)

    def last_good(self, cwd, model=None):
        step = self.newest(cwd)
        changes = dict(self.RUN, **{"--steps": step + 1, "--shards": None}, **(model or {}))
        out = self.run_ok(cwd, 1, "bf16", changes, ["--resume"])
        self.assertIn(f"resumed from run/step-{step:08d}", out)

    def lines(self, err):
        return [line for line in err.splitlines() if " is slow: " not in line]

    def test_a_rank_is_killed(self):
        for victim in (2, 0):
            with self.subTest(victim=victim):
                cwd, run = self.underway(4)
                run.ranks[victim][0].kill()
                statuses, _, err = run.finish()
                self.assertEqual([s for rank, s in enumerate(statuses) if rank != victim], [71] * 3, err)
                self.assertEqual(len(self.lines(err)), 1, err)
                self.assertRegex(err, rf"rank {victim} \(.*\) was lost in .*; all ranks end, the last .*: run/step-")
                if victim:
                    self.last_good(cwd)

    def test_a_rank_is_killed_in_each_phase(self):
        """In which a hanging GPU holds the run until then: of rank 1, or of rank 0 where that works alone. The start is
        in test_start.c, --score in test_ranks.py."""
        fixed = dict(self.RUN, **self.LITTLE, **{"--cuda-graphs": "off", "--shards": 2})
        every = {"--eval-every": 1, "--sample-every": 1, "--sample-tokens": 14, "--save-every": 1, "--eval-windows": 20}
        forward = "embedding_forward_kernel<WIDE>"
        cases = ((1, f"{forward}:9", {}, ("save", 4), "in step 5"),
                 (1, "gradients_add_kernel:5", {}, ("save", 4), "in step 5"),
                 (1, "adamw_kernel<8>:5", {}, ("save", 4), "in step 5"),
                 (1, "ncclAllGather:6", {}, ("save", 4), "in step 5"),
                 (1, f"{forward}:5", every, ("step", 1), "in the evaluation after step 1"),
                 (0, f"{forward}:14", every, ("val_mean", 1), "in the samples after step 1"),
                 (0, "cudaMemcpyAsync:235", every, ("sample", 1), "in the checkpoint of step 1"))
        places = [self.place() for _ in cases]
        runs = [self.start(cwd, 2, "bf16", dict(fixed, **changes), of_rank={rank: {"CUDA_CPU_HANG": call}})
                for cwd, (rank, call, changes, _, _) in zip(places, cases)]
        for cwd, (_, _, _, last, _) in zip(places, cases):
            self.wait_for_event(cwd, *last)
        awake(2)  # from that line it is not far
        for cwd, run, (_, call, changes, _, where) in zip(places, runs, cases):
            with self.subTest(call=call):
                run.ranks[1][0].kill()
                statuses, _, err = run.finish()
                self.assertEqual((statuses, len(self.lines(err))), ([71, -9], 1), err)
                self.assertRegex(err, rf"rank 1 \(.*\) was lost {where}; all ranks end, the last good checkpoint: ")
                if not changes:
                    self.assertIn("the last good checkpoint: run/step-00000004", err)
                    self.last_good(cwd, self.LITTLE)

    def wait_for_event(self, cwd, kind, step):
        end, log = time.monotonic() + TIMEOUT, os.path.join(cwd, "run", "log.jsonl")
        wanted = f'{{"event": "{kind}", "step": {step},'.encode()
        while not os.path.exists(log) or wanted not in read_bytes(log):
            self.assertLess(time.monotonic(), end, wanted)
            time.sleep(0.05)

    def test_signal(self):
        cwd, run = self.underway(2)
        run.ranks[1][0].send_signal(signal.SIGTERM)
        statuses, out, err = run.finish()
        self.assertEqual(statuses, [75, 75], err)
        self.assertRegex(out, r"stopped by signal 15 at step \d+, saved")

    def test_nccl_fails(self):
        """On one rank, in a step, at a call and afterwards: one line, and the status of a CUDA call that fails."""
        for call in ("ncclSend:40", "ncclAllGather:2", "cudaStreamWaitEvent:30"):
            with self.subTest(call=call):
                cwd = self.place()
                run = self.start(cwd, 2, "bf16", more={"CUDA_CPU_FAIL": call})
                statuses, _, err = run.finish()
                self.assertEqual(set(statuses), {70}, err)
                self.assertIn(f"in {call.split(':')[0]}", err)
                self.assertLessEqual(len(self.lines(err)), 2, err)  # both ranks may come to their N-th call

    def test_nccl_does_not_connect(self):
        """On all ranks, or on one of them."""
        for rank, line in ((None, r"\w+: unhandled"), (1, r"\w+: rank 1 \(.*\): unhandled")):
            fails = {"CUDA_CPU_FAIL": "ncclCommInitRankConfig:1"}
            run = self.start(self.place(), 2, "bf16", more=None if rank else fails,
                             of_rank={rank: fails} if rank else None)
            statuses, _, err = run.finish()
            self.assertEqual((set(statuses), len(self.lines(err))), ({70}, 1), err)
            self.assertRegex(err, line + ".* system error.*, in ncclCommInitRankConfig")

    def test_memory_that_nccl_takes(self):
        """NCCL takes it at the first use, which comes before the model's is counted: what is too little for both is
        refused at the start, not in the first step."""
        need = 500  # MiB, at first less than a model's reserve
        for more in (0, 30):
            memory = {"CUDA_CPU_MEMORY_MIB": str(need + more)}
            statuses, _, err = self.start(self.place(), 2, "bf16", more=memory).finish()
            self.assertEqual(set(statuses), {1}, err)
            need = int(re.search(r"needs (\d+) MiB, the GPU has \d+ MiB free", err)[1])

    def test_a_gpu_hangs(self):
        """One rank's never finishes what it was given: a kernel of a step, of its update, of an evaluation or a sample,
        a copy for a checkpoint; or all wait for a message that never comes."""
        fixed = dict(self.RUN, **dict(self.LITTLE, **{"--rank-timeout": 6, "--cuda-graphs": "off", "--shards": 2}))
        every = {"--eval-every": 1, "--sample-every": 1, "--sample-tokens": 14, "--save-every": 1, "--eval-windows": 20}
        forward, still = "embedding_forward_kernel<WIDE>", "has stood still for"
        cases = ((1, f"{forward}:9", {}, still, "in step 5"),
                 (1, "adamw_kernel<8>:5", {}, still, "in step 5"),
                 (1, f"{forward}:5", every, still, "in the evaluation after step 1"),
                 (0, f"{forward}:14", every, still, "in the samples after step 1"),
                 (0, "cudaMemcpyAsync:235", every, "", "in the checkpoint of step 1"),
                 (1, "cudaMemcpyAsync:244", every, "", "in the checkpoint of step 1"),
                 (1, "ncclSend:100", {}, "and all others wait for each other", r"in .*step \d+"))
        places = [self.place() for _ in cases]
        for some in range(0, len(cases), 4):
            runs = [self.start(places[some + i], 2, "bf16", dict(fixed, **changes),
                               of_rank={rank: {"CUDA_CPU_HANG": call}})
                    for i, (rank, call, changes, _, _) in enumerate(cases[some:some + 4])]
            began = time.monotonic()
            for cwd, run, (rank, call, changes, words, where) in zip(places[some:], runs, cases[some:]):
                with self.subTest(call=call):
                    statuses, _, err = run.finish()
                    self.assertEqual((set(statuses), len(self.lines(err))), ({71}, 1), err)
                    named = {still: rank, "": r"\d"}.get(words, 0)
                    print(f"{call} on rank {rank}: {time.monotonic() - began:.1f} s, {err.strip()}")
                    self.assertRegex(err, rf"rank {named} \(.*\) {words}.* {where}; all ranks end")
                    if not changes:
                        self.assertIn("the last good checkpoint: run/step-", err)
                        self.last_good(cwd, self.LITTLE)

    def test_refusals(self):
        cwd = self.place()
        statuses, _, err = self.start(cwd, 2, "bf16", {}, ["--bogus"]).finish()
        self.assertEqual((statuses, len(self.lines(err))), ([1, 1], 1), err)
        self.assertIn("unknown option --bogus", err)
        statuses, _, err = self.start(cwd, 2, "bf16", {}, more={"CUDA_CPU_DEVICES": "1"}).finish()
        self.assertEqual(set(statuses), {1}, err)
        self.assertIn("on one GPU", err)

        # What a rank finds before all meet, rank 0 says.
        for rank, variable, value, status, line in (
                (1, "CUDA_CPU_DEVICES", "0", 1, "no usable NVIDIA GPU (no CUDA-capable device is detected)"),
                (2, "CUDA_CPU_FAIL", "cudaSetDevice:1", 1, "GPU 2: unknown error"),
                (0, "CUDA_CPU_FAIL", "ncclGetUniqueId:1", 70, "in ncclGetUniqueId")):
            statuses, _, err = self.start(cwd, 3, "bf16", {}, of_rank={rank: {variable: value}}).finish()
            self.assertEqual((set(statuses), len(self.lines(err))), ({status}, 1), err)
            self.assertRegex(err, rf": rank {rank} \(.*\): .*{re.escape(line)}")
        self.assertFalse(os.path.exists(os.path.join(cwd, "run")))


class Planted(unittest.TestCase):
    """Faults in the headers, each of which ranks_nccl.cpp must find. All are compiled in, beside what is right, and the
    variable PLANTED names the one that a run has."""

    # The name, the header, what stands there, what would be wrong: statements, or expressions.
    FAULTS = (
        ("event", "ranks_nccl.h", "ncclCudaCheck(r, cudaStreamWaitEvent(s->stream, s->ready, 0));", ""),
        ("wait", "ranks.h", "if (!ranks_alone(r)) { ranks_wait(r, r->backend->done); }", ""),
        ("stream", "ranks_nccl.h", "s->ranks->stream = s->stream;", ""),
        ("slice", "ranks.h", "(char*)arena + part.begin * sum->bytes", "(char*)arena + (part.begin + 1) * sum->bytes"),
        ("places", "ranks_nccl.h", "(char*)data + (size_t)ranks_place(s->ranks, s->ranks->rank) * bytes",
         "(char*)data + (size_t)s->ranks->rank * bytes"),
        ("stage", "ranks_nccl.h", "nccl_again(list, i) || nccl_on_gpu(s->ranks, list[i].data)",
         "nccl_on_gpu(s->ranks, list[i].data)"),
        ("leaves", "ranks.h", "1 << (31 - __builtin_clz((unsigned)n - 1))", "n - 1"),
    )

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="test_ranks_cuda_")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        shutil.copytree(os.path.join(ROOT, "mta"), os.path.join(cls.folder, "mta"))
        for fault in cls.FAULTS:
            cls.plant(*fault)
        with open(os.path.join(ROOT, "VERSION")) as f:
            version = f.read().strip()
        cls.binary = os.path.join(cls.folder, "ranks_nccl")
        built = subprocess.run(["g++", "-x", "c++", "-std=c++17", "-O2", "-w", f'-DMTA_VERSION="{version}"',
                                "-DMTA_NCCL", "-I", cls.folder, "-I", os.path.join(ROOT, "dev", "cuda_cpu"),
                                os.path.join(ROOT, "dev", "tests", "ranks_nccl.cpp"), "-o", cls.binary],
                               stderr=subprocess.PIPE, text=True)
        assert built.returncode == 0, built.stderr

    @classmethod
    def plant(cls, name, file, good, bad):
        path, condition = os.path.join(cls.folder, "mta", file), f'planted("{name}")'
        with open(path) as f:
            text = f.read()
        assert text.count(good) == 1, (file, good)
        statement = good.endswith((";", "}"))
        both = f"if ({condition}) {{ {bad} }} else {{ {good} }}" if statement else f"({condition} ? {bad} : {good})"
        with open(path, "w") as f:
            f.write(text.replace(good, both))

    def test_none(self):
        """On 4, 6 and 2 ranks of one host, and as if 2 of them had one each: the tree's sums in two stages."""
        for ranks, more in ((4, {}), (4, EAGER), (4, {"NODE": "2"}), (4, dict(EAGER, NODE="2")), (6, {"NODE": "2"}),
                            (2, {"NODE": "1"})):
            statuses, _, err = Started([self.binary], self.folder, ranks, more).finish()
            self.assertEqual((statuses, err), ([0] * ranks, ""), (ranks, more))

    def found(self, fault, more=None):
        self.assertIn(fault, [name for name, *_ in self.FAULTS])
        statuses, _, err = Started([self.binary], self.folder, 4, dict(more or {}, PLANTED=fault)).finish()
        self.assertTrue(any(statuses), err)  # who finds it says so; by then the others may have ended it all
        self.assertIn("not as it should be", err)

    def test_a_missing_event(self):
        self.found("event")

    def test_the_way_back_not_awaited(self):
        self.found("wait")

    def test_sums_in_another_stream(self):
        self.found("stream")

    def test_a_slice_off_by_one(self):
        self.found("slice")

    def test_places_out_of_order(self):
        self.found("places", {"NODE": "2"})

    def test_another_order_of_leaves(self):
        self.found("leaves")

    def test_room_for_a_piece_once_for_each_that_it_goes_to(self):
        self.found("stage")


if __name__ == "__main__":
    main()
