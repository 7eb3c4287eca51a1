#!/usr/bin/env python3
"""Tests of scripts/plot_run.py and scripts/plot_kernels.py on logs and checkpoints made here.

python3 dev/tests/test_plots.py    (uses data/.venv's python where it is there; skipped without numpy and matplotlib)
"""
import array
import json
import math
import os
import shutil
import subprocess
import sys
import unittest
from unittest import mock

from helpers import ROOT, Folder, call, main, png_size, to_bf16, write_safetensors

VENV = os.path.join(ROOT, "data", ".venv", "bin", "python")
try:
    import matplotlib
    import numpy
except ImportError:
    if os.path.exists(VENV) and os.path.abspath(sys.executable) != VENV:
        os.execv(VENV, [VENV, *sys.argv])
    matplotlib = numpy = None
sys.path.insert(0, os.path.join(ROOT, "scripts"))
import plot_kernels  # noqa: E402
import plot_run  # noqa: E402
import toy_report  # noqa: E402


def write_checkpoint(folder, tensors, dtype="F32"):
    """tensors: {name: shape}; values count up from -1 in steps of 1/64."""
    os.makedirs(folder)
    entries = {}
    for name, shape in tensors.items():
        raw = array.array("f", [i / 64 - 1 for i in range(math.prod(shape))]).tobytes()
        entries[name] = (dtype, shape, to_bf16(raw) if dtype == "BF16" else raw)
    write_safetensors(os.path.join(folder, "model.safetensors"), entries)


@unittest.skipUnless(matplotlib and numpy, "numpy and matplotlib are missing")
class Plots(Folder):
    def command(self, script, *arguments):
        return subprocess.run([sys.executable, os.path.join(ROOT, "scripts", script), *arguments], capture_output=True,
                              text=True)

    def write_log(self, name, events):
        os.makedirs(self.path(name))
        with open(self.path(name, "log.jsonl"), "w") as f:
            f.write(events)

    def test_curves(self):
        lines = ['{"event":"start","step":0}']
        for i in range(1, 200):
            lines.append(json.dumps({"event": "step", "step": i, "loss": None if i == 7 else 5 / i}))
        lines.append(json.dumps({"event": "val", "step": 199, "name": "toy", "loss": 0.1, "error": 0.25}))
        self.write_log("a", "\n".join(lines) + '\n{"event":"st')
        self.write_log("b", '{"event":"step","step":1,"loss":3}\n{"event":"val","step":1,"name":"x","loss":2}\n')
        done = self.command("plot_run.py", "one=" + self.path("a"), "two=" + self.path("b"), "--out",
                            self.path("ab.png"))
        self.assertEqual((done.returncode, done.stderr, done.stdout), (0, "", self.path("ab.png") + "\n"))
        three = png_size(self.path("ab.png"))
        self.assertEqual(call(plot_run, self.path("b", "log.jsonl")).returncode, 0)
        two = png_size(self.path("b", "curves.png"))
        self.assertGreater(three[0], two[0], "a masked set adds a panel")

    def test_the_file_that_is_named(self):
        """A name without an ending is taken as it is, and an empty one is none."""
        self.write_log("a", '{"event":"step","step":1,"loss":3}\n')
        self.assertEqual(call(plot_run, self.path("a"), "--out", self.path("curves")).returncode, 0)
        png_size(self.path("curves"))
        for out in ("", self.path("a")):
            done = call(plot_run, self.path("a"), "--out", out)
            self.assertNotEqual(done.returncode, 0, done.stdout)
        self.assertEqual(sorted(os.listdir(self.path("a")) + os.listdir(self.path())), ["a", "curves", "log.jsonl"])

    def test_seven_domains(self):
        """Against steps, tokens and hours; the places are those of the log, pauses between two parts of a run left out.
        The legend lies below the curves."""
        names, events, now = "arxiv book c4 commoncrawl github stackexchange wikipedia".split(), [], 5000.0
        for step in range(1, 9):
            if step in (1, 5):
                now += 90000 * (step == 5)
                events.append({"event": "start", "step": step - 1, "time": now})
            now += 1800
            events.append({"event": "step", "step": step, "loss": 3 / step, "tokens": 100 * step, "tokens_per_s": 0.5,
                           "time": now})
        events += [{"event": "val", "step": 8, "name": n, "loss": 2.0 + i, "time": now} for i, n in enumerate(names)]
        events.append({"event": "val_mean", "step": 8, "sets": 7, "loss": 5.0, "time": now})
        self.write_log("a", "".join(json.dumps(e) + "\n" for e in events))
        self.write_log("old", "".join(json.dumps({k: v for k, v in e.items() if k != "time"}) + "\n"
                                      for e in events if e["event"] != "val_mean"))
        for x in ("steps", "tokens", "hours"):
            done = call(plot_run, self.path("a"), *[self.path("old")] * (x == "hours"), "--x", x, "--out",
                       self.path("x.png"))
            self.assertEqual((done.returncode, done.stderr), (0, ""))
        drawn = []
        for name, x in (("a", "steps"), ("a", "tokens"), ("a", "hours"), ("old", "hours")):
            r = plot_run.Run(name, self.path(name), x)
            places = [round(float(v), 6) for v in r.steps[:, 0]]
            drawn.append((places, round(float(r.val["book"][0, 0]), 6), len(r.mean)))
        hours = [0.5 * i for i in range(1, 9)]
        old = [round(200 * i / 3600, 6) for i in range(1, 9)]
        steps = [float(i) for i in range(1, 9)]
        self.assertEqual(drawn, [(steps, 8.0, 1), ([100 * i for i in steps], 800.0, 1), (hours, 4.0, 1),
                                 (old, old[-1], 0)])

        figure, ax = plot_run.plt.subplots(layout="constrained")
        plot_run.draw_validation(ax, [plot_run.Run("a", self.path("a"), "steps")], {"a": plot_run.colour_of(0)}, 1, 1.0)
        plot_run.legend(ax)
        figure.canvas.draw()
        self.assertEqual(len({line.get_color() for line in ax.get_lines()}), 8)
        self.assertLessEqual(ax.get_legend().get_window_extent().y1, ax.get_window_extent().y0)
        plot_run.plt.close(figure)

    def test_many_runs_and_sets_look_different(self):
        """Beyond four runs of several sets, and beyond twenty runs or sets, two looked the same."""
        names = ["s%d" % i for i in range(25)]
        for i in range(12):
            self.write_log("m%d" % i, "".join(json.dumps({"event": "val", "step": 1, "name": n, "loss": 2.0}) + "\n"
                                              for n in names))
        runs = [plot_run.Run("m%d" % i, self.path("m%d" % i), "steps") for i in range(12)]
        figure, ax = plot_run.plt.subplots()
        plot_run.draw_validation(ax, runs, {run.label: plot_run.colour_of(i) for i, run in enumerate(runs)}, 1, 1.0)
        look = lambda line: (line.get_color(), line.get_linestyle(), line.get_marker())
        drawn = [look(line) for line in ax.get_lines() if len(line.get_xdata())]
        self.assertEqual((len(drawn), len(set(drawn))), (12 * 25, 12 * 25))
        named = [look(line)[1:] for line in ax.get_lines() if not len(line.get_xdata())]
        self.assertEqual(named, [look(ax.get_lines()[25 * i])[1:] for i in range(12)])
        plot_run.plt.close(figure)
        self.assertEqual(len({plot_run.colour_of(i) for i in range(60)}), 60)

    def test_odd_names(self):
        """A name that begins with "_", which a legend of matplotlib's leaves out, or that holds "$" stands in it."""
        self.write_log("a", '{"event":"step","step":1,"loss":3}\n{"event":"val","step":1,"name":"_s","loss":2}\n'
                            '{"event":"val","step":1,"name":"t","loss":2}\n')
        with mock.patch.object(matplotlib.figure.Figure, "savefig", autospec=True) as saved:
            done = call(plot_run, "_new=" + self.path("a"), "$5=" + self.path("a"))
        self.assertEqual(done.returncode, 0, done.stderr)
        figure = saved.call_args.args[0]
        named = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]
        self.assertEqual(named, [[r"$\_$new", r"\$5"], [r"$\_$s", "t", r"$\_$new", r"\$5"]])

    def test_curves_refused(self):
        self.write_log("empty", "")
        self.write_log("holed", '{"event":"step","step":1,"loss":3}\n{"event":"st\n{"event":"step","step":3}\n')
        self.write_log("evaluated", '{"event":"val","step":7,"name":"x","loss":2}\n')
        self.write_log("other", '{"event":"val","step":7,"name":"x","loss":2,"bits_per_byte":"3"}\n')
        for arguments, words in (([self.path("nothing")], "No such file"), ([self.path("empty")], "no step"),
                                 ([self.path("holed")], "log.jsonl:2: no JSON"),
                                 ([self.path("other")], "other/log.jsonl: an event that is none of a run: "),
                                 ([self.path("evaluated"), "--x", "tokens"], "do not tell the tokens of step 7")):
            done = call(plot_run, *arguments)
            self.assertEqual(done.returncode, 1, arguments)
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
            self.assertIn(words, done.stderr)

    def test_bits_per_byte(self):
        """The axis says what the log says, BOS and EOS of short documents included, or is not there."""
        for name, ratios in (("a", (1.8, 1.8)), ("b", (1.8, 1.803)), ("c", (1.44,)), ("d", (None,)),
                             ("e", (1.8, None))):
            events = [{"event": "val", "step": 1, "name": str(i), "loss": 2.0, "bits_per_byte": r and 2 * r}
                      for i, r in enumerate(ratios)]
            self.write_log(name, "".join(json.dumps(e) + "\n" for e in events))
        bits = lambda *names: plot_run.bits_of_a_nat([plot_run.Run(n, self.path(n)) for n in names])
        self.assertAlmostEqual(bits("a", "b"), 1.80075)
        self.assertEqual((bits("c"), bits("a", "c"), bits("a", "d"), bits("d")), (1.44, None, None, None))
        self.assertIsNone(bits("e"))  # a set with a mask in the same picture

    def test_runs_of_one_name(self):
        """Two runs that are called alike in two folders are not drawn as seeds of one; a label joins them."""
        a, b, c = (self.path(*names) for names in (("a", "seed1"), ("b", "seed1"), ("b", "x")))
        labels = lambda *texts: [label for label, _ in plot_run.with_labels(texts)]
        self.assertEqual(labels(a, b, "m=" + c), ["a/seed1", "b/seed1", "m"])
        self.assertEqual(labels(a, c), ["seed1", "x"])
        self.assertEqual(labels("m=" + a, "m=" + b, a, a), ["m", "m", "seed1", "seed1"])

    def test_a_mean_over_nothing(self):
        """Steps without a loss are a gap, not a loss of 0; a window of two has two values."""
        nan = math.nan
        for y, width, want in (([5, 5, nan, nan, nan, 5, 7], 3, [5, 5, 5, nan, 5, 6, 6]), ([1, 3, 5], 2, [1, 2, 4])):
            numpy.testing.assert_equal(plot_run.smooth(numpy.array(y, dtype=float), width), want)

    def test_a_clock_that_is_set_back(self):
        times = [7200.0, 9000.0, 5400.0, 7200.0]  # half an hour, an hour back, half an hour
        events = [{"event": "step", "step": i, "loss": 1.0, "time": t} for i, t in enumerate(times, 1)]
        self.write_log("a", "".join(json.dumps(e) + "\n" for e in events))
        self.assertEqual(plot_run.Run("a", self.path("a"), "hours").steps[:, 0].tolist(), [0, 0.5, 0.5, 1])

    def test_kernels(self):
        base = "model.layers.{}.self_attn.{}.weight"
        tensors = {base.format(layer, "kq_conv"): [2, 2, 7] for layer in (0, 1)}
        tensors.update({base.format(layer, "head_mix"): [2, 3, 3] for layer in range(7)})
        tensors[base.format(0, "kq_conv_post")] = [9, 6, 11]
        tensors[base.format(0, "q_proj")] = [8, 8]
        for dtype in ("F32", "BF16"):
            if dtype == "BF16":  # which is read as F32 is: fewer squares to draw
                tensors = {name: shape for name, shape in tensors.items() if "head_mix" not in name or ".0." in name}
            write_checkpoint(self.path(dtype, "step-00000009"), tensors, dtype)
            write_checkpoint(self.path(dtype, "step-00000003"), {base.format(0, "q_proj"): [1, 1]})
            done = call(plot_kernels, self.path(dtype))
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            for name in ("kq_conv", "kq_conv_post", "head_mix"):
                self.assertGreater(min(png_size(self.path(dtype, name + ".png"))), 200)
            self.assertFalse(os.path.exists(self.path(dtype, "head_mix_pre.png")))
        self.assertEqual(png_size(self.path("F32", "kq_conv.png")), png_size(self.path("BF16", "kq_conv.png")))

    def test_kernels_refused(self):
        write_checkpoint(self.path("plain", "step-00000001"), {"model.norm.weight": [4]})
        done = call(plot_kernels, self.path("plain"))
        self.assertEqual(done.returncode, 1)
        self.assertIn("plain Transformer", done.stderr)
        name, weights = "model.layers.0.self_attn.kq_conv.weight", self.path("plain", "step-00000001")
        for header in (None, [1], {name: {"dtype": "F32", "shape": [1, 1, 1], "data_offsets": None}}, {name: 1}):
            text = json.dumps(header).encode()
            with open(os.path.join(weights, "model.safetensors"), "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text if header else b"\xff" * 100)
            done = call(plot_kernels, self.path("plain"))
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        os.remove(os.path.join(weights, "model.safetensors"))
        with open(os.path.join(weights, "model.safetensors.index.json"), "w") as f:
            f.write('{"weight_map": null}')
        done = call(plot_kernels, self.path("plain"))
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)

    def test_colours_beside_a_weight_that_is_not_finite(self):
        import numpy as np

        values = np.array([[[np.nan, np.inf, 0.5], [0.25, 1.0, -0.75]]])
        identity = np.array([[False] * 3, [False, True, False]])
        self.assertEqual(plot_kernels.colour_limit({0: values}, identity), 0.75)


class ToyReport(Folder):
    """scripts/toy_report.py: what it would have to guess is refused or said."""

    def report(self, **runs):
        task = self.path("n5_all")
        shutil.rmtree(task, ignore_errors=True)
        for name, events in runs.items():
            os.makedirs(os.path.join(task, name))
            with open(os.path.join(task, name, "log.jsonl"), "w") as f:
                f.writelines(json.dumps(dict(event="val", **e)) + "\n" for e in events)
        return call(toy_report, task)

    def test_one_set_and_one_run_a_seed(self):
        a, b = dict(step=10, name="a", error=0.25), dict(step=10, name="b", error=0.9)
        done = self.report(mta_1=[a, dict(a, step=20, error=0.125)], transformer_1=[dict(a, step=20)])
        self.assertIn("25.0", done.stdout)
        self.assertIn("12.5", done.stdout)
        self.assertNotIn("lengths", done.stdout)
        self.assertIn("of steps 10 to 20", self.report(mta_1=[a], transformer_1=[dict(a, step=20)]).stdout)
        none = "mta_1/log.jsonl: an event that is none of a run: "
        for runs, why in ((dict(mta_1=[a, b]), "2 validation sets with a mask (a, b), wanted"),
                          (dict(mta_1=[a], mta_01=[a]), "two runs of mta"),
                          (dict(mta_1=[dict(name="a", error=0.5)]), none + "no 'step'"),
                          (dict(mta_1=[dict(a, error="x")]), none), (dict(mta_1=[dict(a, step="x")]), none)):
            done = self.report(**runs)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
            self.assertIn(why, done.stderr)


class WithoutMatplotlib(unittest.TestCase):
    def test_hint(self):
        """With the modules hidden, each script says in one line what to install."""
        for script in ("plot_run.py", "plot_kernels.py"):
            code = ("import sys, runpy; sys.modules['matplotlib'] = None; sys.argv = ['x', 'y']; "
                    f"runpy.run_path({os.path.join(ROOT, 'scripts', script)!r}, run_name='__main__')")
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn("pip install numpy matplotlib", done.stderr)


if __name__ == "__main__":
    main()
