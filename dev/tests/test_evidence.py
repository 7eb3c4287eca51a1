"""Tests of scripts/evidence.sh's list of cells: the trainer takes each one's options, a cell is trained once, an
unfinished one goes on, what is counted of kernels and answers is what it says.

    python3 dev/tests/test_evidence.py     (train_mta must be built)
"""

import array
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import helpers

sys.path.insert(0, os.path.join(helpers.ROOT, "scripts"))
import evidence  # noqa: E402
import evidence_kernels  # noqa: E402
import evidence_long  # noqa: E402
import evidence_report  # noqa: E402
import evidence_text  # noqa: E402

TRAINER = os.path.join(helpers.BIN, "train_mta")


class Evidence(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = os.path.join(folder.name, "runs")
        self.results = os.path.join(folder.name, "results")
        os.makedirs(self.out)

    def test_every_cell_is_a_model_that_the_trainer_takes(self):
        seen = set()
        with (
            mock.patch.object(evidence, "toy_data", lambda cell, out: ["--seq-len", "53", "--tokenizer", "toy"]),
            mock.patch.object(evidence, "language_data", lambda out: ["--seq-len", "256", "--tokenizer", "bytes"]),
            mock.patch.object(evidence_long, "make", lambda out, text: None),
        ):
            parts = [part for part in evidence.PARTS + evidence.NAMED_PARTS if part != "cost"]
            for cell in [c for part in parts for c in evidence.cells_of(part)]:
                key = (cell["part"], cell["model"], cell["attention"], cell.get("row"), cell["lr"], cell["steps"])
                if key in seen:
                    continue
                seen.add(key)
                command = [a for a in evidence.commands_of(cell, self.out, TRAINER)[0] if a != "--resume"]
                for option in {"--train", "--val"} & set(command):  # a plan needs no shards
                    at = command.index(option)
                    del command[at : at + 2]
                done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stderr), (0, ""), cell["name"])
        self.assertGreater(len(seen), 40)

    def test_names_of_cells_differ(self):
        for part in evidence.PARTS + evidence.NAMED_PARTS:
            names = [c["name"] for c in evidence.cells_of(part)]
            self.assertEqual(len(names), len(set(names)), part)

    def run_row(self, row, steps):
        with (
            mock.patch.object(evidence, "ABLATION", {row: evidence.ABLATION[row]}),
            mock.patch.object(evidence, "ABLATION_SEEDS", (1,)),
            mock.patch.object(evidence, "ABLATION_STEPS", steps),
            mock.patch.object(evidence, "TOY_SAMPLES", 640),
            mock.patch.object(evidence, "TOY_TESTS", 20),
            mock.patch.object(evidence, "RESULTS", self.results),
            mock.patch("builtins.print"),
        ):
            return evidence.run_cells(["ablation"], "", 1, self.out, TRAINER), list(
                evidence.read_results("ablation").values()
            )

    def test_a_cell_is_trained_once_and_its_line_says_what_it_was(self):
        for row in ("kernels start at random", "retrofit: plain, then mta from the identity"):
            status, lines = self.run_row(row, 10)
            self.assertEqual(status, 0, row)
            line = lines[-1]
            self.assertEqual((line["row"], line["attention"], line["seed"], line["steps"]), (row, "mta", 1, 10))
            self.assertEqual(
                set(line) & {"part", "model", "processor", "commit", "seconds", "last", "patterns", "arguments"},
                {"part", "model", "processor", "commit", "seconds", "last", "patterns", "arguments"},
            )
            self.assertEqual(sum(line["patterns"]["kq_conv"].values()), 4)  # two layers of two heads
            path = os.path.join(self.results, "ablation.jsonl")
            with open(path, encoding="utf-8") as f:
                before = f.read()
            self.assertEqual(self.run_row(row, 10)[0], 0)
            with open(path, encoding="utf-8") as f:
                self.assertEqual(f.read(), before)

    def test_the_commit_of_a_cell(self):
        """A cell that trained for hours must not end for want of git, or outside a checkout."""
        for root, path in ((evidence.ROOT, self.out), (self.out, os.environ["PATH"])):
            with mock.patch.object(evidence, "ROOT", root), mock.patch.dict(os.environ, PATH=path):
                self.assertEqual(evidence.commit(), "unknown")

    def test_no_cell_names_a_path_of_a_machine(self):
        paths = []
        for part in evidence.PARTS:
            for cell in evidence.read_results(part).values():
                paths += [a for a in cell.get("arguments", []) if a.startswith("/")]
        self.assertEqual(paths, [])

    def test_a_stopped_cell_goes_on(self):
        log = os.path.join(self.out, "ablation", "transformer", "seed1", "log.jsonl")

        def stop():
            while not (os.path.exists(log) and os.path.getsize(log)):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        self.assertEqual(self.run_row("transformer", 60), (75, []))
        thread.join()
        status, lines = self.run_row("transformer", 60)
        self.assertEqual((status, [line["steps"] for line in lines]), (0, [60]))
        with open(log, encoding="utf-8") as f:
            events = [json.loads(line) for line in f]
        reasons = [e["reason"] for e in events if e["event"] == "stop"]
        self.assertEqual((reasons, [e["step"] for e in events if e["event"] == "step"][-1]), (["signal", "done"], 60))

    def test_a_cell_goes_on_behind_its_first_run(self):
        """Stopped when its kernels had been started elsewhere, which makes that checkpoint another than was saved."""
        row = "kernels start as the mean"
        self.assertEqual(self.run_row(row, 10)[0], 0)
        with open(os.path.join(self.results, "ablation.jsonl"), encoding="utf-8") as f:
            line = json.loads(f.readline())
        folder = os.path.join(self.out, "ablation", line["name"])
        both = [evidence.seconds_of(os.path.join(d, "log.jsonl")) for d in (folder, folder + ".first")]
        self.assertGreater(min(both), 0)
        self.assertEqual(line["seconds"], round(sum(both), 1))  # of both runs
        os.remove(os.path.join(self.results, "ablation.jsonl"))
        self.assertEqual(self.run_row(row, 10)[0], 0)

    def test_what_fails_ends_the_other_trainings(self):
        """They run in sessions of their own: nothing else would end them."""
        trainings = []

        def popen(command, **options):
            trainings.append(real(["sleep", "1000"], start_new_session=True))
            return trainings[-1]

        def commands(cell, out, trainer):
            if trainings:
                raise subprocess.CalledProcessError(1, "data")
            return [[trainer]]

        real = subprocess.Popen
        with (
            mock.patch.object(evidence, "commands_of", commands),
            mock.patch.object(evidence, "RESULTS", self.results),
            mock.patch("subprocess.Popen", popen),
            mock.patch("builtins.print"),
            self.assertRaises(subprocess.CalledProcessError),
        ):
            evidence.run_cells(["again"], "", 2, self.out, TRAINER)
        self.addCleanup(trainings[0].kill)
        self.assertEqual(trainings[0].wait(100), -signal.SIGTERM)

    def test_costs_leave_what_is_not_theirs(self):
        """--out may be a folder with a `cost` of the user's."""
        theirs = os.path.join(self.out, "cost", "theirs.txt")
        os.makedirs(os.path.dirname(theirs))
        with open(theirs, "w", encoding="utf-8") as f:
            f.write("kept")
        cell = {"name": "x", "head_size": 32, "attention": "mta", "length": 16, "steps": 2}
        with mock.patch.object(evidence, "COST_ROUNDS", 1):
            result = evidence.measure_cost(cell, self.out, TRAINER)
        self.assertGreater(result["last"]["time"], 0)
        self.assertTrue(os.path.exists(theirs))
        self.assertEqual(sorted(os.listdir(self.out)), ["cost", "data"])  # nor anything of their own

    def test_a_package_that_was_unpacked_in_part_is_unpacked_again(self):
        files, whole = ("a.txt", "b.txt"), False

        def command(words, cwd=None, **_):
            if words[0] == "apt-get":
                open(os.path.join(cwd, "p_1.0_all.deb"), "w", encoding="utf-8").close()
                return
            os.makedirs(words[3])
            for name in files[: 2 if whole else 1]:
                open(os.path.join(words[3], name), "w", encoding="utf-8").close()
            if not whole:
                raise KeyboardInterrupt

        with mock.patch("subprocess.run", command):
            self.assertRaises(KeyboardInterrupt, evidence_text.fetch, "p", self.out)
            whole = True
            folder, version = evidence_text.fetch("p", self.out)
        self.assertEqual((sorted(os.listdir(folder)), version), (list(files), "1.0"))

    def test_kernels_that_start_elsewhere_do(self):
        self.run_row("kernels start as the mean", 10)
        folder = os.path.join(self.out, "ablation", "kernels_start_as_the_mean", "seed1")
        start = evidence_kernels.kernels(os.path.join(folder + ".first", "step-00000001"))
        self.assertEqual(
            {round(18 * w, 6) for tensor in start.values() for head in tensor for line in head for w in line}, {1.0}
        )

    def test_patterns(self):
        identity = [[0, 0, 0, 0, 0], [0, 0, 1, 0.1, 0]]
        diagonal = [[0, 0.9, 0, 0, 0], [0, 0.1, 1, 0, 0]]
        earlier = [[0, 0, 0, 0, 0], [0, 1, 1, 0, 0.1]]
        mixed = [[0, 0, 0, 1, 0], [0, 1, 1, 0, 0]]
        self.assertEqual(
            [evidence_kernels.pattern(k) for k in (identity, diagonal, earlier, mixed)],
            ["identity", "diagonal", "one-sided", "other"],
        )
        self.assertEqual(
            [evidence_kernels.mixing(m) for m in ([[1, 0.1], [0, 2]], [[1, -0.5], [0, 1]], [[1, 0.5], [0.5, 1]])],
            ["identity", "contrast", "other"],
        )
        self.assertEqual(
            evidence_kernels.counts({(0, "kq_conv"): [identity, diagonal], (1, "kq_conv"): [identity]}),
            {"kq_conv": {"identity": 2, "diagonal": 1}},
        )

    def test_patterns_of_a_checkpoint(self):
        """By the command; of bf16 the same as of f32, other types are refused."""
        script = os.path.join(helpers.ROOT, "scripts", "evidence_kernels.py")
        raw = array.array("f", [1, -1, 0, 1] * 2).tobytes()
        for dtype, data in (("F32", raw), ("BF16", helpers.to_bf16(raw)), ("F16", raw[: len(raw) // 2])):
            folder = os.path.join(self.out, dtype, "step-00000001")
            os.makedirs(folder)
            open(os.path.join(folder, "config.json"), "w").close()
            helpers.write_safetensors(os.path.join(folder, "model.safetensors"),
                                      {"model.layers.0.self_attn.head_mix.weight": (dtype, [2, 2, 2], data)})
            done = subprocess.run([sys.executable, script, "patterns", os.path.dirname(folder)], capture_output=True,
                                  text=True)
            self.assertEqual((done.returncode, "wanted F32 or BF16" in done.stderr), (1, True) if dtype == "F16" else
                             (0, False), done.stderr)
            self.assertEqual(done.stdout, "" if dtype == "F16" else "head_mix      2 contrast\n")

            name = "model-00001-of-00001.safetensors"  # as transformers writes a large one
            os.rename(os.path.join(folder, "model.safetensors"), os.path.join(folder, name))
            with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
                json.dump({"weight_map": {"model.layers.0.self_attn.head_mix.weight": name}}, f)
            again = subprocess.run([sys.executable, script, "patterns", folder], capture_output=True, text=True)
            self.assertEqual((again.returncode, again.stdout), (done.returncode, done.stdout), again.stderr)
            with open(os.path.join(folder, name), "wb") as f:
                f.write(b"\xff" * 100)
            broken = subprocess.run([sys.executable, script, "patterns", folder], capture_output=True, text=True)
            self.assertEqual((broken.returncode, broken.stderr.count("\n")), (1, 1), broken.stderr)

    def test_other_kernels_of_bf16(self):
        """Are refused, and the file stays: it would get floats where it says bf16."""
        script = os.path.join(helpers.ROOT, "scripts", "evidence_kernels.py")
        path = os.path.join(self.out, "model.safetensors")
        helpers.write_safetensors(path, {"model.layers.0.self_attn.kq_conv.weight": ("BF16", [2, 1, 3], b"ab" * 6)})
        before = helpers.read_bytes(path)
        for kind in ("random", "mean"):
            done = subprocess.run([sys.executable, script, kind, self.out, "1"], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn("kq_conv.weight is BF16, wanted F32", done.stderr)
            self.assertEqual(helpers.read_bytes(path), before)

    def test_what_a_few_seeds_tell(self):
        """Where one more seed lies with 95%: of draws that scatter normally, 19 of 20. Deviations are pooled by their
        degrees of freedom."""
        draw = random.Random(3)
        inside = 0
        for _ in range(4000):
            *seen, new = (draw.gauss(50, 4) for _ in range(4))
            low, high = map(float, evidence_report.another_seed(seen, 1, 6).split(" to "))
            inside += low <= new <= high
        self.assertAlmostEqual(inside / 4000, 0.95, delta=0.015)
        means = [evidence_report.mean_interval([draw.gauss(1, 4) for _ in range(3)]) for _ in range(4000)]
        self.assertAlmostEqual(sum(low <= 1 <= high for low, high in means) / 4000, 0.95, delta=0.015)
        self.assertEqual(evidence_report.mean_interval([1.0]), (float("-inf"), float("inf")))
        self.assertEqual(evidence_report.another_seed([0.01, 0.02, 0.03], 100), "0.0 to 7.0")
        self.assertEqual(evidence_report.another_seed([1.0]), "-")
        self.assertAlmostEqual(evidence_report.pooled([[1, 3], [2, 2, 2], [9]]), (2 / 3) ** 0.5)
        self.assertIsNone(evidence_report.pooled([[1], []]))

    def test_parts_by_name(self):
        """`patterns` stands for the parts whose kernels are counted; an unknown name is refused with all of them."""
        script = os.path.join(helpers.ROOT, "scripts", "evidence.sh")
        done = subprocess.run([script, "--plan", "patterns"], capture_output=True, text=True)
        counted = [line.split(":")[0] for line in done.stdout.splitlines() if " cells, " in line]
        self.assertEqual((done.returncode, counted), (0, list(evidence.PATTERNS)), done.stderr)
        done = subprocess.run([script, "--plan", "pattern"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("no part is called pattern; wanted one of toy-tuning, ", done.stderr)

    def test_answered(self):
        """Of two questions of each kind one is answered rightly; the right answers' log-probabilities alone count."""
        choices = [{"item": i, "choice": c, "gold": 1} for i in (0, 1) for c in (0, 1)]
        answers = [{"logprob": p} for p in (-2.0, -1.0, -1.0, -2.0)]
        needles, scores = [{"item": 5}, {"item": 6}], [{"greedy": g, "logprob": -p} for g, p in ((True, 1), (False, 4))]
        for requests, given, nats in ((choices, answers, 1.5), (needles, scores, 2.5)):
            found = evidence_long.answered(map(json.dumps, requests), map(json.dumps, given))
            self.assertEqual(found, (0.5, nats))


if __name__ == "__main__":
    helpers.main()
