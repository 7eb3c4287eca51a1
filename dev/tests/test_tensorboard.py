#!/usr/bin/env python3
"""scripts/to_tensorboard.py: what TensorBoard's own reader finds in the events is what the log says.

dev/.venv/bin/python dev/tests/test_tensorboard.py    (skipped without the package tensorboard)
"""
import html
import json
import math
import os
import re
import subprocess
import sys
import unittest

from helpers import ROOT, Folder, main

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html
    from tensorboard.util import tensor_util
    HAS = True
except ImportError:
    HAS = False

SCRIPT = os.path.join(ROOT, "scripts", "to_tensorboard.py")


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True)


@unittest.skipUnless(HAS, "the package tensorboard is missing")
class TensorBoard(Folder):
    def log(self, name, events, tail=""):
        os.makedirs(self.path(name), exist_ok=True)
        with open(self.path(name, "log.jsonl"), "w") as f:
            f.write("".join(json.dumps(e) + "\n" for e in events) + tail)

    def events(self):
        found = [{"event": "start", "step": 0, "host": "h", "arguments": ["--lr", "1"], "config": {"hidden_size": 8},
                  "time": 1000.5}]
        for i in range(1, 2001):  # more than a reader keeps unless it is told to
            found.append({"event": "step", "step": i, "loss": None if i == 7 else 5 / i, "grad_norm": 1.5, "lr": 1e-3,
                          "tokens": 64 * i, "tokens_per_s": 1e4, "mfu": 0.25,
                          "skipped": 0, "sources": {"a": 32 * i, "b": 32 * i}, "time": 1000.5 + i})
        for k, name in enumerate(("arxiv", "book")):
            found.append({"event": "val", "step": 2000, "name": name, "loss": 2.0 + k, "perplexity": 7.5,
                          "bits_per_byte": 0.5, "tokens": 9, "time": 3001.5})
        found.append({"event": "val_mean", "step": 2000, "sets": 2, "loss": 2.5, "perplexity": 8.0, "time": 3002.5})
        return found + [{"event": "sample", "step": 2000, "text": "A line\nand \u00e9", "time": 3003.5},
                        {"event": "stop", "step": 2000, "reason": "done", "time": 3004}]

    def read(self, folder):
        reader = EventAccumulator(folder, size_guidance={"scalars": 0, "tensors": 0})
        reader.Reload()
        return reader

    def test_what_the_reader_finds(self):
        events = self.events()
        self.log("run", events, '{"event": "st')
        for _ in range(2):  # the second time in place of the first
            done = run(self.path("run"))
            self.assertEqual((done.returncode, done.stderr), (0, ""))
        reader = self.read(self.path("run", "tensorboard"))
        steps = [e for e in events if e["event"] == "step"]
        for key in ("loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "skipped"):
            got = reader.Scalars("train/" + key)
            self.assertEqual([(g.step, g.wall_time) for g in got], [(e["step"], e["time"]) for e in steps])
            for g, e in zip(got, steps):
                if e[key] is None:
                    self.assertTrue(math.isnan(g.value))
                else:
                    self.assertAlmostEqual(g.value, e[key], delta=1e-6 * abs(e[key]))
        self.assertEqual([g.value for g in reader.Scalars("train tokens/b")][-1], 64000)
        found = {tag: [(g.step, g.value) for g in reader.Scalars(tag)]
                 for tag in reader.Tags()["scalars"] if tag.startswith("validation")}
        self.assertEqual(found, {"validation loss/arxiv": [(2000, 2.0)], "validation loss/book": [(2000, 3.0)],
                                 "validation loss/mean of the sets": [(2000, 2.5)],
                                 "validation perplexity/arxiv": [(2000, 7.5)],
                                 "validation perplexity/book": [(2000, 7.5)],
                                 "validation perplexity/mean of the sets": [(2000, 8.0)],
                                 "validation bits_per_byte/arxiv": [(2000, 0.5)],
                                 "validation bits_per_byte/book": [(2000, 0.5)]})
        text = lambda tag: tensor_util.make_ndarray(reader.Tensors(tag)[0].tensor_proto).item().decode()
        self.assertEqual(text("sample"), "    A line\n    and \u00e9")
        self.assertIn("hidden_size | 8", text("config"))
        self.assertIn("host | h", text("run"))
        self.assertEqual(reader.SummaryMetadata("sample").plugin_data.plugin_name, "text")

    def test_texts_as_they_are_shown(self):
        """What has a meaning in Markdown stays in arguments and configuration; a sample stays one block of code."""
        glob, name = "a=x/t_train_*.bin,y/t_*.bin", "<b>\\* [x](y) `z` &amp; | __p__ #~~q~~ | {0}"
        sample = "one\r\ntwo\rthree *4* _5_ <b>\n\n6"
        self.log("run", [{"event": "start", "step": 0, "host": name, "arguments": ["--train", glob], "time": 1.0,
                          "config": {"tokenizer": name}},
                         {"event": "sample", "step": 1, "text": sample, "time": 2.0}])
        self.assertEqual(run(self.path("run")).returncode, 0)
        reader = self.read(self.path("run", "tensorboard"))
        page = lambda tag: markdown_to_safe_html(tensor_util.make_ndarray(reader.Tensors(tag)[0].tensor_proto).item())
        cells = lambda tag: [html.unescape(cell) for cell in re.findall("<td>(.*)</td>", page(tag))]
        self.assertEqual(cells("run"), ["step", "0", "host", name, "arguments", json.dumps(["--train", glob]), "time",
                                        "1.0"])
        self.assertEqual(cells("config"), ["tokenizer", name])
        shown = re.fullmatch("<pre><code>(.*)\n</code></pre>", page("sample"), re.DOTALL)
        self.assertEqual(html.unescape(shown[1]), "one\ntwo\nthree *4* _5_ <b>\n\n6")

    def test_refused(self):
        self.log("run", self.events()[:3])
        for words, arguments in (("nothing", [self.path("nothing")]),
                                 ("holds events", [self.path("run"), "--out", self.path("out")]),
                                 ("one run", [self.path("run"), self.path("run"), "--out", self.path("x")])):
            if words == "holds events":
                self.assertEqual(run(*arguments).returncode, 0)
            done = run(*arguments)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn(words, done.stderr)
        self.assertFalse(os.path.exists(self.path("nothing")))
        self.assertEqual(run(self.path("run")).returncode, 0)
        before = os.listdir(self.path("run", "tensorboard"))
        val = '{"event": "val", "step": 1, "loss": 1%s}\n'
        for text, said in (("no log\n{}\n", "log.jsonl:1: no JSON"), (val % "", "log.jsonl: an event"),
                           (val % ', "name": "x", "time": "now"', "log.jsonl: an event"),
                           ('{"event": "step", "sources": 1}\n', "log.jsonl: an event"),
                           ('{"event": "step", "loss": 1, "step": "x"}\n', "log.jsonl: an event"),
                           ('{"event": "step", "loss": 1, "step": Infinity}\n', "log.jsonl: an event")):
            with open(self.path("run", "log.jsonl"), "w") as f:
                f.write(text)
            done = run(self.path("run"))
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn(said, done.stderr)
            self.assertEqual(os.listdir(self.path("run", "tensorboard")), before)


class WithoutThePackage(unittest.TestCase):
    def test_hint(self):
        code = "import sys, runpy; sys.modules['tensorboard'] = None; sys.argv = ['x', 'y']; "
        code += f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertIn("pip install tensorboard", done.stderr)


if __name__ == "__main__":
    main()
