#!/usr/bin/env python3
"""A user's whole day on a CPU: text of seven kinds into shards, a model trained on them, scripts/evaluate.sh's report,
the export for transformers, lm_eval's own class; and the same numbers everywhere.

    dev/.venv/bin/python dev/tests/test_day.py [--keep DIR [--mb N] [--steps N]]     (MTA_BIN: folder of the binaries)

The text is what is installed on the machine; a kind is an ending of file names. By default all is small and thrown
away. With --keep runs/day there is something to look at: 48 MB, the preset 1m with 2048 positions, needles and
BabiLong, their pictures; minutes on two cores. Without PyTorch the day ends with the report.
"""

import argparse
import array
import csv
import glob
import json
import os
import subprocess
import sys
import tempfile
import unittest

from helpers import BIN, ROOT, main, read_bytes, without_torch, zip_all

TRAINER = os.path.join(BIN, "train_mta")
WHERE = ("/usr/share", "/usr/lib", "/usr/include", os.path.dirname(os.__file__))
FOLDER = tempfile.TemporaryDirectory(prefix="test_day_")
os.environ.update(HF_HOME=os.path.join(FOLDER.name, "home"), HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_WAIT_POLICY="passive", TRAINER=TRAINER)
try:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
except ImportError as e:
    torch, REASON = None, without_torch(e)


def texts_of_this_machine(wanted):
    """{kind: [text, ...]}: seven kinds of files, `wanted` bytes of each or all there are, no file above 200 kB or a
    quarter of that: a long one on the side of validation would take PyTorch most of the test's time."""
    found, held, longest = {}, {}, min(200000, wanted // 4)
    for path in (os.path.join(d, name) for where in WHERE for d, _, files in os.walk(where) for name in sorted(files)):
        kind = (os.path.splitext(path)[1][1:] or os.path.basename(path)).lower()
        if not kind.isalnum() or held.get(kind, 0) >= wanted or os.path.islink(path):
            continue
        try:
            text = read_bytes(path).decode("utf-8") if 500 < os.path.getsize(path) < longest else "\0"
        except (OSError, UnicodeDecodeError):
            continue
        if "\0" not in text:
            found.setdefault(kind, []).append(text)
            held[kind] = held.get(kind, 0) + len(text)
            if sum(size >= wanted for size in held.values()) == 7:
                break
    return {kind: found[kind] for kind in sorted(held, key=lambda k: (-held[k], k))[:7]}


class Day(unittest.TestCase):
    def run_text(self, *arguments):
        done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout[-1000:] + done.stderr[-2000:])
        return done.stdout

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def tool(self, name, *arguments):
        return self.run_text(sys.executable, os.path.join(ROOT, *name.split("/")), *arguments)

    def write(self, name, records):
        with open(self.path(name), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)
        return self.path(name)

    def test_day(self):
        self.folder = os.path.abspath(OPTIONS.keep or FOLDER.name)
        os.makedirs(self.folder, exist_ok=True)
        self.kinds, self.out = self.prepare(), self.path("exported")
        self.train()
        self.evaluate()
        self.tool("scripts/export.py", self.path("run"), self.out)
        if torch is None:
            self.skipTest(REASON)
        self.compare_validation()
        self.compare_requests()

    def prepare(self):
        """Shards of seven domains, and questions whose answers are sentences of these texts."""
        texts = texts_of_this_machine(int(OPTIONS.mb * 1e6 / 7))
        self.assertEqual(len(texts), 7, sorted(texts))
        documents = [{"text": t, "kind": kind} for kind, some in texts.items() for t in some]
        path = self.write("text.jsonl", documents)
        options = ["--domain-field", "kind", "--name", "day", "--out", self.path("shards"), "--overwrite"]
        self.tool("data/prepare.py", "text", path, "--tokenizer", "bytes", *options)
        os.makedirs(self.path("requests"), exist_ok=True)
        with open(self.path("book.txt"), "w", encoding="utf-8") as f:
            f.write("\n".join(t for t in texts[max(texts)] if t.isascii())[:400000])
        words = [d["text"][:200].split() for d in documents[:: max(1, len(documents) // 20)]]
        questions = [
            {"question": " ".join(w[:5]), "choices": [" ".join(w[5:9]), "no", "of the"], "answer": 0}
            for w in words
            if len(w) > 9
        ]
        out = self.path("requests", "choice.jsonl")
        self.tool("data/evals.py", "choice", self.write("choice.jsonl", questions), "--out", out)
        return sorted(texts)

    def train(self):
        small = "--hidden-size 64 --num-hidden-layers 2 --intermediate-size 128 --seq-len 256 --batch-size 4"
        size = "--seq-len 2048 --batch-size 1" if OPTIONS.keep else small
        data = ["--train", self.path("shards/day_*_train_*.bin"), "--val", self.path("shards/*_val_*.bin")]
        steps = f"--steps {OPTIONS.steps} --eval-every {OPTIONS.steps // 2} --eval-windows 4 --save-every 0".split()
        recipe = "--model 1m --attention mta --lr 3e-3 --warmup 10 --resume --out".split()
        self.assertIn("mean", self.run_text(TRAINER, *recipe, self.path("run"), *size.split(), *data, *steps))

    def evaluate(self):
        options = ["--val", self.path("shards/*_val_*.bin"), "--requests", self.path("requests")]
        if OPTIONS.keep:
            options += ["--text", self.path("book.txt"), "--samples", 2]
        said = self.run_text(os.path.join(ROOT, "scripts", "evaluate.sh"), self.path("run"), *options)
        self.assertIn("Zero-shot accuracy", said)
        (self.report,) = glob.glob(self.path("run", "eval", "step-*"))

    def validation(self):
        """{set: loss} of the report."""
        with open(os.path.join(self.report, "report.csv"), encoding="utf-8", newline="") as f:
            rows = [r for r in csv.DictReader(f) if r["task"].startswith("validation ")]
        return {r["task"].split(" ")[1]: float(r["loss"]) for r in rows if r["task"].split(" ")[1] != "mean"}

    def compare_validation(self):
        """The report's loss of each domain is that of the exported model on the same windows."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.out, trust_remote_code=True, dtype=torch.float32)
        T, losses = model.config.max_position_embeddings, self.validation()
        self.assertEqual(sorted(losses), ["day_" + kind for kind in self.kinds])
        for name, loss in losses.items():
            ids = array.array("H", read_bytes(self.path("shards", name + "_val_000000.bin"))[1024:])
            windows = [torch.tensor(ids[at : at + T + 1]) for at in range(0, min(len(ids) - 1, 2097152) - T + 1, T)]
            total = 0
            for x in torch.stack(windows).split(8):
                with torch.no_grad():
                    logits = model(x[:, :-1]).logits.flatten(0, 1)
                total += torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten(), reduction="sum").item()
            self.assertAlmostEqual(total / (T * len(windows)), loss, delta=1e-4 * loss, msg=name)

    def compare_requests(self):
        """lm_eval's own class gives the log-probabilities of evaluate.sh."""
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        with open(os.path.join(self.report, "choice.jsonl"), encoding="utf-8") as f:
            asked = [json.loads(line) for line in f]
        with open(os.path.join(self.report, "choice.scores"), encoding="utf-8") as f:
            want = [json.loads(line)["logprob"] for line in f]
        lm = HFLM(pretrained=self.out, trust_remote_code=True, dtype="float32", device="cpu", batch_size=4)
        pairs = [(a["context"], a["continuation"]) for a in asked]
        requests = [Instance(request_type="loglikelihood", doc={}, arguments=p, idx=0) for p in pairs]
        got = lm.loglikelihood(requests, disable_tqdm=True)
        self.assertGreater(len(want), 20)
        for (logprob, _), w, pair in zip_all(got, want, pairs):
            self.assertAlmostEqual(logprob, w, delta=1e-4 * abs(w), msg=pair)


parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--keep")
parser.add_argument("--mb", type=float)
parser.add_argument("--steps", type=int)
OPTIONS, sys.argv[1:] = parser.parse_known_args()
OPTIONS.mb = OPTIONS.mb or (48 if OPTIONS.keep else 0.7)
OPTIONS.steps = OPTIONS.steps or (400 if OPTIONS.keep else 40)

if __name__ == "__main__":
    main()
