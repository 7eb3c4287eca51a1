#!/usr/bin/env python3
"""Runs of train_mta.cu on the emulator beside train_mta: resume bit for bit, checkpoints that change sides, recompute, missing GPU or memory.

python3 dev/tests/test_cuda_run.py [-k PATTERN]
Needs train_mta, build/train_mta_cuda_cpu (bf16) and build/train_mta_cuda_cpu_fp32; MTA_BIN: folder of train_mta; MTA_CUDA, MTA_CUDA_FP32: other
binaries in place of the emulator's, as scripts/gpu_check.sh gives those for a GPU.
"""
import array
import json
import os
import random
import struct
import subprocess
import tempfile
import unittest
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CPU = os.path.join(os.environ.get("MTA_BIN", ROOT), "train_mta")
BF16 = os.environ.get("MTA_CUDA", os.path.join(ROOT, "build", "train_mta_cuda_cpu"))
FP32 = os.environ.get("MTA_CUDA_FP32", os.path.join(ROOT, "build", "train_mta_cuda_cpu_fp32"))
EMULATED = "MTA_CUDA" not in os.environ
MODEL = ["--model", "toy", "--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "4", "--num-key-value-heads", "4",
         "--intermediate-size", "48", "--vocab-size", "32", "--seq-len", "24", "--batch-size", "2", "--tokens-per-step", "96", "--lr", "1e-3",
         "--schedule", "constant", "--warmup", "2", "--eval-windows", "4", "--seed", "5"]


def safetensors(path):
    """{name: (dtype, bytes)}"""
    with open(path, "rb") as f:
        data = f.read()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    return {n: (e["dtype"], data[8 + length + e["data_offsets"][0]:8 + length + e["data_offsets"][1]]) for n, e in header.items()}


def floats(entry):
    dtype, data = entry
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i:i + 2])[0] for i in range(0, len(data), 2)]
    return list(struct.unpack("<%df" % (len(data) // 4), data))


class CudaRuns(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="mta_cuda_")
        self.addCleanup(self.folder.cleanup)
        rng = random.Random(1)
        tokens = array.array("H", [rng.randrange(8) + 8 * (i % 3) for i in range(4000)]).tobytes()
        header = struct.pack("<5i", 20240520, 1, 4000, 32, zlib.crc32(tokens) - (1 << 32 if zlib.crc32(tokens) >= 1 << 31 else 0))
        for name in ("a_train_000000.bin", "a_val_000000.bin"):
            with open(self.path(name), "wb") as f:
                f.write(header.ljust(1024, b"\0") + tokens)

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def train(self, program, out, *options, status=0, attention="mta-full", env=None):
        """Runs a trainer; returns (lines of the log, output)."""
        command = [program, *MODEL, "--attention", attention, "--train", self.path("a_train_*.bin"), "--val", "v=" + self.path("a_val_*.bin"),
                   "--out", self.path(out), *options]
        run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, **(env or {})), timeout=300, check=False)
        self.assertEqual(run.returncode, status, run.stderr + run.stdout)
        if status:
            self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
            return [], run.stderr
        with open(os.path.join(self.path(out), "log.jsonl"), encoding="utf-8") as f:
            return [json.loads(line) for line in f], run.stdout

    def figures(self, log):
        return [(e["step"], e["loss"], e["grad_norm"], e["lr"]) for e in log if e["event"] == "step"]

    def checkpoint(self, out, step):
        folder = os.path.join(self.path(out), "step-%08d" % step)
        tensors = dict(safetensors(os.path.join(folder, "model.safetensors")))
        tensors.update(safetensors(os.path.join(folder, "optimizer.safetensors")))
        return tensors

    def test_resume_bit_for_bit(self):
        for attention in ("mta", "diff"):
            whole, _ = self.train(BF16, "whole" + attention, "--steps", "8", attention=attention)
            self.train(BF16, "parts" + attention, "--steps", "4", "--schedule-steps", "8", attention=attention)
            parts, _ = self.train(BF16, "parts" + attention, "--steps", "8", "--resume", attention=attention)
            self.assertEqual(self.figures(whole), self.figures(parts))
            self.assertEqual(self.checkpoint("whole" + attention, 8), self.checkpoint("parts" + attention, 8))

    def test_checkpoint_files(self):
        self.train(BF16, "run", "--steps", "2")
        tensors = self.checkpoint("run", 2)
        name = "model.layers.0.self_attn.kq_conv.weight"
        self.assertEqual([tensors[name][0], tensors["m." + name][0], tensors["master." + name][0]], ["BF16", "F32", "F32"])
        for weight, master in zip(floats(tensors[name]), floats(tensors["master." + name])):
            bits = struct.unpack("<I", struct.pack("<f", master))[0]
            nearest = struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0]
            self.assertEqual(weight, nearest)

    def compare(self, got, want, distance):
        self.assertEqual([e[0] for e in got], [e[0] for e in want])
        for g, w in zip(got, want):
            self.assertLess(abs(g[1] - w[1]), distance, (g, w))
            self.assertEqual(g[3], w[3])

    def test_cpu_continues_what_cuda_began(self):
        want, _ = self.train(CPU, "cpu", "--steps", "8")
        for program, distance in ((FP32, 1e-4), (BF16, 0.02)):
            out = "mixed" + str(distance)
            self.train(program, out, "--steps", "4", "--schedule-steps", "8")
            log, _ = self.train(CPU, out, "--steps", "8", "--resume")
            self.compare(self.figures(log), self.figures(want), distance)
            self.assertNotIn("master.model.norm.weight", self.checkpoint(out, 8))

    def test_cuda_continues_what_the_cpu_began(self):
        want, _ = self.train(CPU, "cpu", "--steps", "8")
        for program, distance in ((FP32, 1e-4), (BF16, 0.02)):
            out = "mixed" + str(distance)
            self.train(CPU, out, "--steps", "4", "--schedule-steps", "8")
            log, _ = self.train(program, out, "--steps", "8", "--resume")
            self.compare(self.figures(log), self.figures(want), distance)

    def test_recompute_changes_no_bit(self):
        for attention in ("mta-full", "diff"):
            runs = [self.train(BF16, attention + mode, "--steps", "3", "--recompute", mode, attention=attention)[0] for mode in ("none", "elementwise", "block")]
            self.assertEqual(self.figures(runs[0]), self.figures(runs[1]))
            self.assertEqual(self.figures(runs[0]), self.figures(runs[2]))
            self.assertEqual(self.checkpoint(attention + "none", 3), self.checkpoint(attention + "block", 3))

    @unittest.skipUnless(EMULATED, "skip: a GPU orders its threads as it likes")
    def test_thread_order_changes_no_bit(self):
        """Another order of the threads of a block would show a race past a missing barrier."""
        for attention in ("mta-full", "diff"):
            runs = [self.train(BF16, attention + order, "--steps", "2", attention=attention, env={"CUDA_CPU_ORDER": order}) for order in ("0", "1", "7")]
            self.assertEqual(self.figures(runs[0][0]), self.figures(runs[1][0]))
            self.assertEqual(self.figures(runs[0][0]), self.figures(runs[2][0]))
            self.assertEqual(self.checkpoint(attention + "0", 2), self.checkpoint(attention + "7", 2))

    def test_accumulation(self):
        """A step of four sequences at once, two at a time or one at a time is the same step."""
        runs = [self.train(FP32, "batch" + n, "--steps", "3", "--batch-size", n)[0] for n in ("4", "2", "1")]
        for other in runs[1:]:
            for g, w in zip(self.figures(other), self.figures(runs[0])):
                self.assertLess(abs(g[1] - w[1]), 1e-5)
                self.assertLess(abs(g[2] - w[2]), 1e-4 * w[2])

    def test_another_model(self):
        self.train(BF16, "run", "--steps", "2", "--save-every", "1")
        _, error = self.train(BF16, "run", "--steps", "4", "--resume", "--num-hidden-layers", "3", status=1)
        self.assertIn("num_hidden_layers", error)
        _, error = self.train(BF16, "new", "--steps", "4", "--init-from", self.path("run/step-00000002"), "--intermediate-size", "64", status=1)
        self.assertIn("mlp.gate_proj", error)

    @unittest.skipUnless(EMULATED, "skip: a real GPU cannot be pretended away")
    def test_no_gpu_old_driver_little_memory(self):
        for env, words in (({"CUDA_CPU_DEVICES": "0"}, "no usable NVIDIA GPU"), ({"CUDA_CPU_DRIVER": "old"}, "driver"),
                           ({"CUDA_CPU_MEMORY_MIB": "512"}, "the largest that fits is")):
            _, error = self.train(BF16, "run", "--steps", "1", status=1, env=env)
            self.assertIn(words, error)
            self.assertFalse(os.path.exists(self.path("run")))


if __name__ == "__main__":
    unittest.main()
