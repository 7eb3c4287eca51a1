#!/usr/bin/env python3
"""Runs of train_mta.cu on the emulator beside train_mta: resume bit for bit, checkpoints that change sides, recompute,
CUDA graphs, failing CUDA calls, missing GPU or memory, the scripts that train the paper's model.

python3 dev/tests/test_cuda_run.py [-k PATTERN]
Needs train_mta, build/train_mta_cuda_cpu (bf16), build/train_mta_cuda_cpu_fp32 and test_mta_cuda_cpu_bf16; MTA_BIN:
folder of train_mta; MTA_CUDA, MTA_CUDA_FP32: other binaries in place of the emulator's, as scripts/gpu_check.sh gives
those for a GPU.
"""
import json
import os
import random
import re
import shutil
import struct
import subprocess
import unittest

from helpers import BIN, GOLDEN, ROOT, Folder, golden_checkpoint, main, read_safetensors, values, worst, write_shard
from helpers import zip_all

CPU = os.path.join(BIN, "train_mta")
BF16 = os.environ.get("MTA_CUDA", os.path.join(ROOT, "build", "train_mta_cuda_cpu"))
INFER = os.path.join(BIN, "infer_mta")
FP32 = os.environ.get("MTA_CUDA_FP32", os.path.join(ROOT, "build", "train_mta_cuda_cpu_fp32"))
# nvcc's
REAL = next(filter(os.path.exists,
                   (os.path.join(ROOT, "build", "nvcc", "train_mta_cuda"), os.path.join(ROOT, "train_mta_cuda"))), None)
EMULATED = "MTA_CUDA" not in os.environ
COMPARE = os.path.join(ROOT, "test_mta_cuda_cpu_bf16" if EMULATED else "test_mta_cuda")
MODEL = ["--model", "toy", "--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "4",
         "--num-key-value-heads", "4",
         "--intermediate-size", "48", "--vocab-size", "32", "--seq-len", "24", "--batch-size", "2", "--tokens-per-step",
         "48", "--lr", "1e-3",
         # an emulated micro-batch takes a quarter of a second
         "--schedule", "constant", "--warmup", "2", "--eval-windows", "4", "--seed", "5"]
TWO = ["--tokens-per-step", "96"]  # micro-batches of two sequences a step


class CudaRuns(Folder):
    def setUp(self):
        super().setUp()
        rng = random.Random(1)
        tokens = [rng.randrange(8) + 8 * (i % 3) for i in range(4000)]
        for name in ("a_train_000000.bin", "a_val_000000.bin"):
            write_shard(self.path(name), tokens)

    def train(self, program, out, *options, status=0, attention="mta-full", env=None):
        """Runs a trainer; returns (lines of the log, output)."""
        command = [program, *MODEL, "--attention", attention, "--train", self.path("a_train_*.bin"), "--val",
                   "v=" + self.path("a_val_*.bin"), "--out", self.path(out), *options]
        run = self.execute(command, env)
        self.assertEqual(run.returncode, status, run.stderr + run.stdout)
        if status:
            self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
            return [], run.stderr
        with open(os.path.join(self.path(out), "log.jsonl"), encoding="utf-8") as f:
            return [json.loads(line) for line in f], run.stdout

    def execute(self, command, env=None):
        return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, **(env or {})), timeout=300,
                              check=False)

    def figures(self, log):
        return [(e["step"], e["loss"], e["grad_norm"], e["lr"]) for e in log if e["event"] == "step"]

    def checkpoint(self, out, step):
        folder = os.path.join(self.path(out), "step-%08d" % step)
        tensors = read_safetensors(os.path.join(folder, "model.safetensors"))[0]
        tensors.update(read_safetensors(os.path.join(folder, "optimizer.safetensors"))[0])
        return tensors

    def test_resume_bit_for_bit(self):
        for attention in ("mta", "diff"):
            whole, _ = self.train(BF16, "whole" + attention, "--steps", "2", attention=attention)
            self.train(BF16, "parts" + attention, "--steps", "1", "--schedule-steps", "2", attention=attention)
            parts, _ = self.train(BF16, "parts" + attention, "--steps", "2", "--resume", attention=attention)
            self.assertEqual(self.figures(whole), self.figures(parts))
            self.assertEqual(self.checkpoint("whole" + attention, 2), self.checkpoint("parts" + attention, 2))

    def test_checkpoint_files(self):
        _, output = self.train(BF16, "run", "--steps", "2")
        if EMULATED:  # no figure where the machine's peak is not known
            self.assertIn(" tokens/s  ETA ", output)
        tensors = self.checkpoint("run", 2)
        name = "model.layers.0.self_attn.kq_conv.weight"
        self.assertEqual([tensors[name][0], tensors["m." + name][0], tensors["master." + name][0]],
                         ["BF16", "F32", "F32"])
        for weight, master in zip(values(tensors[name]), values(tensors["master." + name])):
            bits = struct.unpack("<I", struct.pack("<f", master))[0]
            nearest = struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0]
            self.assertEqual(weight, nearest)

    def test_config_says_what_the_tensors_are(self):
        names = {"BF16": "bfloat16", "F32": "float32"}
        for step, program in enumerate((CPU, FP32, BF16, CPU), 1):  # each continues what the one before began
            self.train(program, "run", "--steps", str(step), "--schedule-steps", "4", "--resume")
            folder = os.path.join(self.path("run"), "step-%08d" % step)
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
                stated = json.load(f)["torch_dtype"]
            held = {names[dtype]
                    for dtype, _, _ in read_safetensors(os.path.join(folder, "model.safetensors"))[0].values()}
            self.assertEqual(held, {stated}, program)
            self.assertEqual(stated, "bfloat16" if program == BF16 else "float32")

    def compare(self, got, want, distance):
        self.assertEqual([e[0] for e in got], [e[0] for e in want])
        for g, w in zip(got, want):
            self.assertLess(abs(g[1] - w[1]), distance, (g, w))
            self.assertEqual(g[3], w[3])

    def test_cpu_continues_what_cuda_began(self):
        want, _ = self.train(CPU, "cpu", "--steps", "4")
        for program, distance in ((FP32, 1e-4), (BF16, 0.02)):
            out = "mixed" + str(distance)
            self.train(program, out, "--steps", "2", "--schedule-steps", "4")
            log, _ = self.train(CPU, out, "--steps", "4", "--resume")
            self.compare(self.figures(log), self.figures(want), distance)
            self.assertNotIn("master.model.norm.weight", self.checkpoint(out, 4))

    def test_cuda_continues_what_the_cpu_began(self):
        want, _ = self.train(CPU, "cpu", "--steps", "4")
        for program, distance in ((FP32, 1e-4), (BF16, 0.02)):
            out = "mixed" + str(distance)
            self.train(CPU, out, "--steps", "2", "--schedule-steps", "4")
            log, _ = self.train(program, out, "--steps", "4", "--resume")
            self.compare(self.figures(log), self.figures(want), distance)

    def test_recompute_changes_no_bit(self):
        for attention in ("mta-full", "diff"):
            runs = [self.train(BF16, attention + mode, "--steps", "2", "--recompute", mode, attention=attention)[0]
                    for mode in ("none", "elementwise", "block")]
            self.assertEqual(self.figures(runs[0]), self.figures(runs[1]))
            self.assertEqual(self.figures(runs[0]), self.figures(runs[2]))
            self.assertEqual(self.checkpoint(attention + "none", 2), self.checkpoint(attention + "block", 2))

    @unittest.skipUnless(EMULATED, "skip: a GPU orders its threads as it likes")
    def test_thread_order_changes_no_bit(self):
        """Another order of the threads of a block would show a race past a missing barrier."""
        for attention in ("mta-full", "diff"):
            runs = [self.train(BF16, attention + order, "--steps", "1", attention=attention,
                               env={"CUDA_CPU_ORDER": order}) for order in ("0", "1", "7")]
            self.assertEqual(self.figures(runs[0][0]), self.figures(runs[1][0]))
            self.assertEqual(self.figures(runs[0][0]), self.figures(runs[2][0]))
            self.assertEqual(self.checkpoint(attention + "0", 1), self.checkpoint(attention + "7", 1))

    @unittest.skipUnless(os.path.exists(INFER), "infer_mta is not built")
    def test_scores_are_infer_mta_s(self):
        """Golden models, whose logits are far from tame (log-probabilities of -15), and a trained one: to 1e-4 in fp32,
        in bf16 to 2% of the largest and, of the trained model, 0.02 in the mean as its loss. Short requests, many at
        once, lie in a batch of more sequences than --batch-size."""
        self.train(CPU, "run", "--steps", "8")
        folders = [self.path("run/step-00000008")]
        requests = [[{"context_ids": [k], "continuation_ids": [k + 1] * (k % 22)} for k in range(30)]]
        for name in ("full", "diff", "toy", "one_token"):
            folders.append(self.path(name))
            config, texts = golden_checkpoint(os.path.join(GOLDEN, name + ".safetensors"), folders[-1])
            texts = [ids[:config["max_position_embeddings"] + 1] for ids in texts]
            requests.append([{"context_ids": ids[:cut], "continuation_ids": ids[cut:]} for ids in texts
                             for cut in range(1, len(ids), 3)] +
                            [{"context_ids": [1], "continuation_ids": [2]}] * 9)
        for folder, lines in zip(folders, requests):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            with open(self.path("requests"), "w", encoding="utf-8") as f:
                f.write(text)
            ask = lambda *command: [json.loads(x)
                                    for x in self.ok([*command, "--score", self.path("requests")]).stdout.splitlines()]
            want = ask(INFER, folder)
            values = [x for w in want for x in w["token_logprobs"]]
            for program, distance in ((FP32, 1e-4), (BF16, 0.02 * max(map(abs, values)))):
                got = ask(program, "--init-from", folder)
                self.assertEqual([g["tokens"] for g in got], [w["tokens"] for w in want])
                errors = [g - w for g, w in zip_all((x for g in got for x in g["token_logprobs"]), values)]
                self.assertLess(worst(map(abs, errors)), distance, (program, folder))
                if folder == folders[0]:
                    self.assertLess(abs(sum(errors)) / len(errors), min(distance, 0.02))

    def test_logits_that_no_target_wants_are_left_out(self):
        """Long contexts: chunks of 64 rows without a continuation have no logits, and the scores keep their bits."""
        self.train(CPU, "run", "--steps", "1", "--max-position-embeddings", "256", attention="transformer")
        requests = self.path("requests")
        with open(requests, "w", encoding="utf-8") as f:
            for n in (1, 63, 64, 150, 240):
                f.write(json.dumps({"context_ids": [i * 7 % 23 for i in range(n)], "continuation_ids": [5, 9]}) + "\n")
        command = [BF16, "--init-from", self.path("run/step-00000001"), "--score", requests]
        whole, chunks = (self.execute(command, {"CUDA_CPU_LOGITS": size}) for size in ("1073741824", "1024"))
        self.assertEqual((whole.returncode, whole.stdout.count("\n")), (0, 5), whole.stderr)
        self.assertEqual((chunks.returncode, chunks.stdout), (0, whole.stdout), chunks.stderr)
        want = self.ok([INFER, self.path("run/step-00000001"), "--score", requests]).stdout
        for got, line in zip_all(chunks.stdout.splitlines(), want.splitlines()):
            self.assertLess(abs(json.loads(got)["logprob"] - json.loads(line)["logprob"]), 0.1)

    def test_evaluation_alone(self):
        """--eval-only says what the run's own last evaluation said, bit for bit; --eval-first's loss is that of the
        start."""
        log, _ = self.train(BF16, "run", "--steps", "2", "--eval-first")
        losses = {e["step"]: e["loss"] for e in log if e["event"] == "val"}
        self.assertEqual(sorted(losses), [0, 1, 2])
        alone = [BF16, "--init-from", self.path("run"), "--eval-only", "--val", "v=" + self.path("a_val_*.bin"),
                 "--seq-len", "24", "--batch-size", "2", "--eval-windows", "4"]
        self.ok([*alone, "--out", self.path("alone")])
        with open(self.path("alone/log.jsonl"), encoding="utf-8") as f:
            self.assertEqual([e["loss"] for e in map(json.loads, f) if e["event"] == "val"], [losses[2]])

    def ok(self, command):
        run = self.execute(command)
        self.assertEqual(run.returncode, 0, run.stderr)
        return run

    # Layer 0 of mta without a convolution, for cuDNN; diff is served whole.
    CUDNN = (("mta", ["--kq-conv-layers", "1", "--attention-kernels", "cudnn"]),
             ("diff", ["--attention-kernels", "cudnn"]))

    @unittest.skipUnless(EMULATED, "skip: train_mta_cuda may be built without cuDNN")
    def test_attention_by_cudnn(self):
        """Beside the own kernels, which give other bits; resume, graphs and recompute, which give the same."""
        for attention, options in self.CUDNN:
            whole, output = self.train(BF16, attention, "--steps", "2", *TWO, *options, attention=attention)
            self.assertRegex(output, r"attention   cuDNN in \d of 2 layers, 2 sequences at a time in \d\.\d MiB")
            own, _ = self.train(BF16, attention + "own", "--steps", "2", *TWO, *options[:-2], attention=attention)
            self.compare(self.figures(whole), self.figures(own), 0.02)
            self.assertNotEqual(self.figures(whole), self.figures(own))
            again = [*options, "--recompute", "block", "--cuda-graphs", "off"]
            self.train(BF16, "parts", "--steps", "1", "--schedule-steps", "2", *TWO, *again, attention=attention)
            parts, _ = self.train(BF16, "parts", "--steps", "2", "--resume", *TWO, *again, attention=attention)
            self.assertEqual(self.figures(whole), self.figures(parts))
            self.assertEqual(self.checkpoint(attention, 2), self.checkpoint("parts", 2))
            self.assertEqual(parts[0]["arguments"].count("cudnn"), 1)
            self.assertNotIn("attention-kernels", str(parts[-1].get("changed")))
            shutil.rmtree(self.path("parts"))

    @unittest.skipUnless(EMULATED, "skip: calls cannot be made to fail there")
    def test_cudnn_refused(self):
        attention, options = self.CUDNN[0]
        for program, words in ((CPU, "got cudnn, this trainer has its own alone"), (FP32, "computes in fp32")):
            _, error = self.train(program, "run", "--steps", "1", *options, attention=attention, status=1)
            self.assertIn(words, error)
        self.assertIn("no layer that it serves", self.refused(*options[-2:]))
        kind, more = self.CUDNN[1]
        _, error = self.train(BF16, "run", "--steps", "1", *more, "--hidden-size", "384", attention=kind, status=1,
                              env={"CUDA_CPU_CAPABILITY": "80"})
        self.assertIn("backward of 2 sequences of 24 tokens, 4 heads of 96, values of 192: cuDNN 91900 has no engine "
                      "for this on this GPU", error)
        for call, words in (("cudnnCreate:1", "cuDNN cannot be used: CUDNN_STATUS_NOT_INITIALIZED"),
                            ("cudnnBackendFinalize:9", "cuDNN refused ")):
            _, error = self.train(BF16, "run", "--steps", "1", *options, attention=attention, status=1,
                                  env={"CUDA_CPU_FAIL": call})
            self.assertIn(words, error)
        _, error = self.train(BF16, "run", "--steps", "1", *options, attention=attention, status=70,
                              env={"CUDA_CPU_FAIL": "cudnnBackendExecute:2"})
        self.assertIn("attention by cuDNN, backward: CUDNN_STATUS_EXECUTION_FAILED", error)

    def test_kernels_changed_on_resume_are_said(self):
        plan = self.execute([BF16, *MODEL, "--attention", "diff", "--attention-kernels", "cudnn", "--dry-run"])
        if "this build has none" in plan.stderr:
            self.skipTest("skip: train_mta_cuda was built without cuDNN")
        self.train(BF16, "run", "--steps", "1", "--schedule-steps", "2", attention="diff")
        log, output = self.train(BF16, "run", "--steps", "2", "--resume", "--attention-kernels", "cudnn",
                                 attention="diff")
        self.assertIn("attention-kernels own -> cudnn", output)
        self.assertIn("attention-kernels own -> cudnn", str([e.get("changed") for e in log]))

    def test_accumulation(self):
        """A step of four sequences at once, two at a time or one at a time is the same step."""
        runs = [self.train(FP32, "batch" + n, "--steps", "2", *TWO, "--batch-size", n)[0] for n in ("4", "2", "1")]
        for other in runs[1:]:
            for g, w in zip_all(self.figures(other), self.figures(runs[0])):
                self.assertLess(abs(g[1] - w[1]), 1e-5)
                self.assertLess(abs(g[2] - w[2]), 1e-4 * w[2])

    def test_another_model(self):
        self.train(BF16, "run", "--steps", "2", "--save-every", "1")
        _, error = self.train(BF16, "run", "--steps", "4", "--resume", "--num-hidden-layers", "3", status=1)
        self.assertIn("num_hidden_layers", error)
        _, error = self.train(BF16, "new", "--steps", "4", "--init-from", self.path("run/step-00000002"),
                              "--intermediate-size", "64", status=1)
        self.assertIn("mlp.gate_proj", error)

    def test_graphs_change_no_bit(self):
        """Captured passes replayed against launches one by one: evaluations in between, a smaller last micro-batch,
        recompute. Of each size of micro-batch the first pass is launched, the second captured, the third replayed."""
        for attention, batch, mode, steps in (("mta-full", "2", "none", "2"), ("mta", "3", "block", "3"),
                                              ("diff", "2", "block", "2")):
            runs = [self.train(BF16, attention + graphs, "--steps", steps, *TWO, "--batch-size", batch, "--eval-every",
                               "1", "--recompute", mode,
                               "--cuda-graphs", graphs, attention=attention)[0] for graphs in ("on", "off")]
            self.assertEqual(self.figures(runs[0]), self.figures(runs[1]))
            self.assertEqual([e["loss"] for e in runs[0] if e["event"] == "val"],
                             [e["loss"] for e in runs[1] if e["event"] == "val"])
            self.assertEqual(self.checkpoint(attention + "on", int(steps)),
                             self.checkpoint(attention + "off", int(steps)))

    @unittest.skipUnless(EMULATED, "skip: a GPU cannot be told to fail")
    def test_a_failing_call_is_named(self):
        """One line with file, line and call, exit status 70; a launch names its launcher."""
        with open(os.path.join(ROOT, "train_mta.cu"), encoding="utf-8") as f:
            source = f.read().split("\n")
        cases = [("cublasCreate", 1, None), ("cudaStreamCreateWithFlags", 1, None), ("cudaMemGetInfo", 2, None),
                 ("cudaMemsetAsync", 9, None),
                 ("cudaMemcpyAsync", 40, None), ("cudaStreamSynchronize", 50, None),
                 ("cublasGemmStridedBatchedEx", 7, None),
                 ("cudaStreamBeginCapture", 1, None), ("cudaStreamEndCapture", 2, None),
                 ("cudaGraphInstantiate", 1, None), ("cudaGraphLaunch", 3, None),
                 ("crossentropy_kernel", 2, "crossentropy_forward_backward"), ("adamw_kernel<8>", 1, "model_update"),
                 ("launch", 100, "")]
        for i, (function, n, launcher) in enumerate(cases):
            _, error = self.train(BF16, "run%d" % i, "--steps", "2", *TWO, status=70,
                                  env={"CUDA_CPU_FAIL": "%s:%d" % (function, n)})
            match = re.fullmatch(r"train_mta_cuda_cpu: CUDA error at (?:.*/)?train_mta\.cu:(\d+): (.+), in (.+)\n",
                                 error)
            self.assertTrue(match, error)
            line, what, call = int(match[1]), match[2], match[3]
            self.assertTrue(what not in ("success", "no error"), error)
            if launcher is None:
                self.assertEqual(call, function, error)
                self.assertIn(function + "(", "\n".join(source[line - 6:line + 6]), error)
            else:
                self.assertTrue(call.startswith("a kernel launched by " + launcher), error)
                self.assertRegex(source[line - 1], r"launchCheck|LAUNCH_WIDE", error)

    @unittest.skipUnless(EMULATED, "skip: a GPU cannot be told to fail")
    def test_graphs_can_be_left_out(self):
        self.train(BF16, "run", "--steps", "2", "--cuda-graphs", "off",
                   env={"CUDA_CPU_FAIL": "cudaStreamBeginCapture:1"})

    @unittest.skipUnless(EMULATED, "skip: a GPU's graphs are as large as they are")
    def test_graphs_leave_memory_alone(self):
        """What no plan counts, graphs of thousands of launches, stays within what is kept free: a pass whose graph
        would not is launched one by one, and says the same."""
        want, output = self.train(BF16, "run", "--steps", "2", *TWO)
        plan = float(re.search(r"total +([0-9.]+) MiB", output)[1])
        least = {"CUDA_CPU_MEMORY_MIB": str(int(plan) + 513), "CUDA_CPU_GRAPH_NODE": str(8 << 20)}
        log, _ = self.train(BF16, "large", "--steps", "2", *TWO, env=least)
        self.assertEqual(self.figures(log), self.figures(want))
        self.assertEqual(self.checkpoint("large", 2), self.checkpoint("run", 2))
        self.train(BF16, "none", "--steps", "2", *TWO, env=dict(least, CUDA_CPU_FAIL="cudaGraphInstantiate:2"))

    @unittest.skipUnless(EMULATED, "skip: plans for a card of a stated size")
    def test_scripts_of_the_paper(self):
        """train_880m.sh and finetune_4k.sh: the plan on a card of 143,771 MiB, a small run through both, and their
        refusals."""
        shards, out, tuned = self.path("shards"), self.path("out"), self.path("tuned")
        os.mkdir(shards)
        tokens = [random.Random(2).randrange(60) if i % 50 else 61 for i in range(5000)]
        for domain in ("commoncrawl", "c4", "github", "wikipedia", "stackexchange", "arxiv", "book"):
            for split in ("train", "val")[:2 if domain in ("c4", "book") else 1]:
                write_shard(os.path.join(shards, "%s_%s_000000.bin" % (domain, split)), tokens, vocab=64, width=4)
        counts = {name: {"documents": 60, "tokens": 5000} for name in os.listdir(shards)}
        with open(os.path.join(shards, "manifest.json"), "w", encoding="utf-8") as f:
            json.dump({"shards": counts}, f)
        environment = {"TRAINER": BF16, "CUDA_CPU_MEMORY_MIB": "143771"}
        script = lambda name, *options, **more: self.execute([os.path.join(ROOT, "scripts", name), *options],
                                                             dict(environment, **more))
        for attention, parameters in (("mta", "876563136"), ("mta-full", "876583320"), ("transformer", "876553728")):
            plan = script("train_880m.sh", shards, out, attention, "--dry-run")
            self.assertEqual((plan.returncode, plan.stderr), (0, ""))
            batch, fits = map(int, re.search(r"micro-batches of (\d+) sequences \((\d+) would fit\)",
                                             plan.stdout).groups())
            self.assertTrue(8 <= batch <= fits < 2 * batch, plan.stdout)
            for words in (parameters, "128 sequences of 2048 = 262,144 tokens, %d at once" % batch,
                          "400000 steps, 105G tokens"):
                self.assertIn(words, plan.stdout)
        small = ["--hidden-size", "32", "--num-hidden-layers", "3", "--num-attention-heads", "4",
                 "--num-key-value-heads", "4", "--intermediate-size", "48",
                 "--vocab-size", "64", "--tokens-per-step", "128", "--batch-size", "2", "--eval-windows", "2"]
        for steps in ("1", "2"):  # the same command continues
            run = script("train_880m.sh", shards, out, "mta", *small, "--seq-len", "32", "--steps", steps)
            self.assertEqual((run.returncode, run.stderr), (0, ""))
            self.assertNotIn("micro-batches of", run.stdout)  # --batch-size says it
        run = script("finetune_4k.sh", out, shards, tuned, "--seq-len", "64",  # of a run the newest checkpoint
                     "--tokens-per-step", "128", "--batch-size", "1", "--steps", "2", "--eval-windows", "2")
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        for folder, theta, decay, warmup in ((out, 100000, "0.05", "375"), (tuned, 500000, "0", "50")):
            with open(os.path.join(folder, "step-00000002", "config.json"), encoding="utf-8") as f:
                config = json.load(f)
            self.assertEqual((config["rope_theta"], config["kq_conv_layers"], config["head_norm"]),
                             (theta, [2], "group_depth_scaled"))
            with open(os.path.join(folder, "step-00000002", "trainer.json"), encoding="utf-8") as f:
                arguments = json.load(f)["arguments"]
            self.assertEqual([arguments[arguments.index(o) + 1] for o in ("--weight-decay", "--warmup", "--mix")],
                             [decay, warmup, "document"])
            self.assertEqual(arguments[arguments.index("--val") + 1], shards + "/*_val_*.bin")
            windows, length = int(arguments[arguments.index("--eval-windows") +
                                            1]), int(arguments[arguments.index("--seq-len") + 1])
            self.assertEqual(windows * length, 1 << 21, "2.1 million tokens of each domain")
            with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
                self.assertEqual(sorted({e["name"] for e in map(json.loads, f) if e["event"] == "val"}), ["book", "c4"])
        plan = script("finetune_4k.sh", os.path.join(out, "step-00000002"), shards, tuned, "--dry-run")
        self.assertEqual((plan.returncode, plan.stderr), (0, ""))
        self.assertIn("done        2 steps, 256 tokens", plan.stdout)
        self.assertIn("64 sequences of 4096 = 262,144 tokens", plan.stdout)
        self.assertIn("40000 steps, 10.5G tokens", plan.stdout)
        for name, arguments, more, words in (("train_880m.sh", (), {}, "usage: "),
                                             ("train_880m.sh", (self.path("none"), out), {}, "is not a directory"),
                                             ("train_880m.sh", (shards, out, "nothing", "--dry-run"), {},
                                              "attention: got"),
                                             ("train_880m.sh", (shards, out), {"TRAINER": self.path("none")},
                                              "is missing"),
                                             ("finetune_4k.sh", (shards, shards, tuned), {}, "holds no config.json"),
                                             ("finetune_4k.sh", (out, self.path("own"), tuned), {},
                                              "own has no commoncrawl_train_*.bin")):
            os.makedirs(self.path("own"), exist_ok=True)
            refused = script(name, *arguments, **more)
            self.assertEqual((refused.returncode, refused.stderr.count("\n")), (1, 1), refused.stderr)
            self.assertIn(words, refused.stderr)
        self.assertEqual(os.listdir(self.path("own")), [])

    def refused(self, *options, env=None, **kwargs):
        """The one line of a refusal that comes before anything is allocated or written."""
        _, error = self.train(BF16, "run", "--steps", "1", *options, status=1,
                              env=dict(env or {}, CUDA_CPU_FAIL="cudaMalloc:1"), **kwargs)
        self.assertFalse(os.path.exists(self.path("run")))
        return error

    @unittest.skipUnless(EMULATED, "skip: a real GPU cannot be pretended away")
    def test_no_gpu_old_driver_wrong_gpu(self):
        for env, words in (({"CUDA_CPU_DEVICES": "0"}, "no usable NVIDIA GPU"),
                           ({"CUDA_CPU_DRIVER": "old"}, "supports CUDA 11.0, this build needs 13.0"),
                           ({"CUDA_CPU_CAPABILITY": "75"}, "compute capability 7.5, wanted 8.0 or more"),
                           ({"CUDA_CPU_CAPABILITY": "80", "CUDA_CPU_IMAGE": "none"}, "make NVCC_ARCH=sm_80"),
                           ({"CUDA_CPU_CAPABILITY": "90", "CUDA_CPU_IMAGE": "none"}, "make NVCC_ARCH=sm_90a"),
                           ({"CUDA_CPU_CAPABILITY": "100", "CUDA_CPU_IMAGE": "invalid"}, "make NVCC_ARCH=sm_100"),
                           ({"CUDA_CPU_FULL": "46"}, "takes no process more (CUDA-capable device(s) is/are busy or"),
                           ({"CUDA_CPU_FULL": "2"}, "takes no process more (out of memory)"),
                           ({"CUDA_CPU_MEMORY_MIB": "16"}, "no GPU memory for cuBLAS")):
            self.assertIn(words, self.refused(env=env))

    @unittest.skipUnless(EMULATED, "skip: a real GPU cannot be pretended away")
    def test_a_plan_beside_who_has_the_gpu(self):
        plan = self.ok([BF16, *MODEL, "--dry-run"]).stdout
        full = self.execute([BF16, *MODEL, "--dry-run"], {"CUDA_CPU_FULL": "46"})
        self.assertEqual((full.returncode, full.stderr), (0, ""))
        self.assertIn("which takes no process more (CUDA-capable device(s) is/are busy or unavailable)\n", full.stdout)
        self.assertEqual(re.sub(", of .*", "", plan).splitlines()[:-1], full.stdout.splitlines()[:-1])

    @unittest.skipUnless(EMULATED, "skip: a real GPU cannot be pretended away")
    def test_little_memory(self):
        """The plan says what would fit, and that fits."""
        wide = ["--seq-len", "512", "--max-position-embeddings", "512", "--tokens-per-step", "32768", "--batch-size",
                "64", "--num-hidden-layers", "24"]
        memory = {"CUDA_CPU_MEMORY_MIB": "740"}
        match = re.search(r"the largest that fits is (\d+) sequences, (\d+) with --recompute block\n",
                          self.refused(*wide, env=memory))
        self.assertTrue(match)
        fits, block = int(match[1]), int(match[2])
        self.assertTrue(0 < fits < block < 64, (fits, block))
        dry = [BF16, *MODEL, "--attention", "mta-full", *wide, "--dry-run"]
        for extra, size in (([], fits), (["--recompute", "block"], block)):
            self.assertIn("the largest micro-batch that fits: %d\n" % size, self.execute([*dry, *extra], memory).stdout)
            self.refused(*wide, *extra, "--batch-size", str(size + 1), env=memory)
            error = self.train(BF16, "fits", "--steps", "1", *wide, *extra, "--batch-size", str(size), status=1,
                               env=dict(memory, CUDA_CPU_FAIL="cudaMalloc:3"))[1]
            self.assertIn("MiB of GPU memory for ", error)  # the plan let it through; the driver had less after all
        self.assertIn("not even one sequence fits", self.refused(env={"CUDA_CPU_MEMORY_MIB": "256"}))

    @unittest.skipUnless(EMULATED, "skip: a real GPU cannot be pretended away")
    def test_little_memory_to_evaluate(self):
        """What is advised to --eval-only is what fits without gradients and optimizer, and nothing of --recompute,
        which it does not take; a plan does not say that no more would fit than it has looked for."""
        short = ["--seq-len", "2", "--tokens-per-step", "4", "--eval-windows", "1"]
        self.train(BF16, "run", "--steps", "1", *short, "--vocab-size", "100000")
        command = [BF16, "--init-from", self.path("run"), "--eval-only", "--val", self.path("a_val_*.bin"), "--seq-len",
                   "24", "--max-position-embeddings", "24", "--batch-size"]
        memory = {"CUDA_CPU_MEMORY_MIB": "590"}
        error = self.execute([*command, "64"], memory).stderr
        match = re.search(r"the GPU has \d+ MiB free; the largest that fits is (\d+) sequences\n$", error)
        self.assertTrue(match, error)
        self.assertEqual(self.execute([*command, match[1], "--eval-windows", "1"], memory).returncode, 0)
        self.assertIn("the largest micro-batch that fits: 1024 or more\n",
                      self.execute([BF16, *MODEL, "--dry-run"], {"CUDA_CPU_MEMORY_MIB": "80000"}).stdout)

    def test_what_cannot_be_served(self):
        large = ["--batch-size", "60000", "--seq-len", "40000", "--max-position-embeddings", "40000",
                 "--tokens-per-step", "2400000000"]
        sequences = ["--batch-size", "70000", "--tokens-per-step", "1680000"]
        for options, words in ((["--hidden-size", "20"], "head size 5 is odd"),
                               (large, "tokens at once, wanted at most 2147483647"),
                               (sequences, "at most 65535 sequences")):
            self.assertIn(words, self.refused(*options))

    @unittest.skipUnless(EMULATED, "skip: a real GPU has the shared memory it has")
    def test_little_shared_memory(self):
        """A GPU whose blocks have 99 KiB: what needs more is refused, the presets' sizes train, chunk by chunk where
        the fused kernels do not fit."""
        few = {"CUDA_CPU_SHARED_KIB": "99"}
        many = ["--hidden-size", "2048", "--num-attention-heads", "1024", "--num-key-value-heads", "1024",
                "--head-mix-pre-softmax", "1024"]
        for options, words in ((many, "head mixing of 1024 heads needs 128 KiB"),
                               (["--kq-conv-query-size", "63", "--kq-conv-key-size", "63"],
                                "kq_conv of 63 x 63 needs 110 KiB")):
            self.assertIn(words, self.refused(*options, env=few))
        # an A100, a 4090
        for kib, kind, fused in ((163, "mta", 24), (163, "transformer", 24), (163, "diff", 24), (99, "mta", 0),
                                 (99, "transformer", 24)):
            done = self.execute([BF16, "--model", "880m", "--attention", kind, "--seq-len", "256", "--dry-run"],
                                {"CUDA_CPU_SHARED_KIB": str(kib)})
            self.assertIn("attention   fused in %d of 24 layers" % fused, done.stdout, (kib, kind))
        for attention in ("mta", "transformer"):
            log, _ = self.train(BF16, "few" + attention, "--steps", "2", attention=attention, env=few)
            self.compare(self.figures(log),
                         self.figures(self.train(CPU, "cpu" + attention, "--steps", "2", attention=attention)[0]), 0.02)

    def test_odd_sizes(self):
        """Head sizes, widths and vocabularies that 16-byte accesses do not divide are served, by the kernels for one
        element at a time."""
        odd = ["--hidden-size", "30", "--num-attention-heads", "3", "--num-key-value-heads", "1", "--intermediate-size",
               "45", "--vocab-size", "33", "--seq-len", "23", "--tokens-per-step", "46", "--head-mix-post-softmax", "3"]
        want, _ = self.train(CPU, "cpu", "--steps", "2", *odd)
        for program, distance in ((FP32, 1e-4), (BF16, 0.02)):
            self.compare(self.figures(self.train(program, "odd" + str(distance), "--steps", "2", *odd)[0]),
                         self.figures(want), distance)

    def test_spoilt_checkpoints(self):
        """A checkpoint of another model, or one that is damaged: one line that names the file, the tensor or the
        field."""
        self.train(BF16, "run", "--steps", "1")
        good = self.path("run/step-00000001")
        for name, spoil, words in (("vocabulary", ["--vocab-size", "40"], "model.embed_tokens.weight"),
                                   ("heads", ["--num-key-value-heads", "2"], "k_proj"),
                                   ("missing", [], "is not a directory")):
            source = self.path("nowhere") if name == "missing" else good
            _, error = self.train(BF16, "new" + name, "--steps", "1", "--init-from", source, *spoil, status=1)
            self.assertIn(words, error)
        with open(os.path.join(good, "model.safetensors"), "r+b") as f:
            f.truncate(1000)
        _, error = self.train(BF16, "cut", "--steps", "1", "--init-from", good, status=1)
        self.assertIn("model.safetensors", error)

    @unittest.skipUnless(os.path.exists(COMPARE), "skip: there is no " + COMPARE)
    def test_compare(self):
        """test_mta_cuda --compare takes a checkpoint or a run, says which batch it took, and refuses what is damaged or
        tells nothing."""
        self.train(CPU, "run", "--steps", "1")
        step = self.path("run/step-00000001")
        compare = lambda *words: self.execute([COMPARE, "--compare", *map(str, words)])
        for folder in (step, self.path("run")):
            for words, said in ((["--seq-len", "9", "--batch-size", "2"], "2 x 9 tokens at random"),
                                (["--train", self.path("a_train_*.bin"), "--seq-len", "24"], "1 x 24 tokens\n")):
                done = compare(folder, *words)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                for text in (step + ": train_mta.c in fp32 against cuda bf16, " + said, "head_gate.bias", "loss: cpu"):
                    self.assertIn(text, done.stdout)
        write_shard(self.path("masked.bin"), [1] * 2000, mask=[0] * 1999 + [1])
        os.mkdir(self.path("empty"))
        for words, why in (([step, "--seq-len", "1"], "wanted 2 or more"), ([self.path("empty")], "no config.json"),
                           ([step, "--train", self.path("masked.bin"), "--seq-len", "9"], "1 x 9 targets none counts")):
            done = compare(*words)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done)
            self.assertIn(why, done.stderr)
        with open(os.path.join(step, "model.safetensors"), "r+b") as f:
            f.seek(-4, os.SEEK_END)
            f.write(b"\0\0\0\0")
        done = compare(step)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("the file is damaged", done.stderr)

    @unittest.skipUnless(REAL, "skip: nvcc built no train_mta_cuda here")
    @unittest.skipUnless(EMULATED, "skip: here is a GPU")
    def test_the_real_program_without_a_gpu(self):
        """What nvcc built starts, plans, and refuses to train where there is no GPU."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""}  # where there is one
        plan = self.execute([REAL, "--model", "880m", "--dry-run"], hidden)
        self.assertEqual((plan.returncode, plan.stderr), (0, ""))
        self.assertIn("876563136", plan.stdout)
        self.assertIn("no GPU found", plan.stdout)
        _, error = self.train(REAL, "run", "--steps", "1", status=1, env=hidden)
        self.assertIn("no usable NVIDIA GPU", error)
        self.assertFalse(os.path.exists(self.path("run")))


if __name__ == "__main__":
    main()
