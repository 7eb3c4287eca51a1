#!/usr/bin/env python3
"""Draws the curves of one or several runs from their log.jsonl: training loss, validation loss, and the error of masked
sets.

    data/.venv/bin/python scripts/plot_run.py runs/text --out curves.png
    data/.venv/bin/python scripts/plot_run.py mta=runs/mta_1 mta=runs/mta_2 plain=runs/plain --title "Toy task"
    data/.venv/bin/python scripts/plot_run.py runs/mta runs/plain --x hours

A run is a folder with log.jsonl, or such a file; LABEL= in front of it names it. Runs of one label (seeds) look the
same; without labels no two do. Of several validation sets each has its colour, and the mean is black; several runs are
then told apart by dashes, more than four by the shape of their points too.
numpy and matplotlib are needed.
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "data")]
from options import Parser, picture_format, picture_name, split_name  # noqa: E402
from runlog import events_of_a_run, log_events  # noqa: E402
from shards import run_program  # noqa: E402

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker
    import numpy as np
    missing = None
except ImportError as error:  # --help works without; main() says what is missing
    missing = (f"plot_run.py: {error}; python3 -m venv data/.venv && data/.venv/bin/pip install numpy matplotlib, then "
               "run it with data/.venv/bin/python")

DASHES = ["-", "--", ":", "-."]
POINTS = "os^Dv<>p*h"
AXES = {"steps": "optimizer step", "tokens": "tokens", "hours": "hours"}


def colour_of(i):
    """Ten that tell apart, then their ten lighter ones, then 40 shades."""
    if i < 20:
        return plt.get_cmap("tab10")(i) if i < 10 else plt.get_cmap("tab20")(2 * (i % 10) + 1)
    return plt.get_cmap("tab20b" if i // 20 % 2 else "tab20c")(i % 20)


def line_of(labels, label):
    """How a run's curves of several sets look: dashes and points that no other of 40 has."""
    i, several = labels.index(label), len(labels) > len(DASHES)
    point = POINTS[i // len(DASHES) % len(POINTS)]
    return {"linestyle": DASHES[i % len(DASHES)], "marker": point, "markersize": 4.5 if several else 2.5}


def number(x):
    """A value of the log as a float; null, which stands for NaN and infinity, as NaN."""
    return float("nan") if x is None else float(x)


class Run:
    """What a log says: steps (n, 2) of place on the axis and loss; val[name] (n, 3) of place, loss and error (NaN where
    there is none); mean (n, 3) of several sets; bits: of each validation, bits per byte over loss."""

    def __init__(self, label, path, x="steps"):
        self.label, self.path, self.bits = label, path, []
        file = os.path.join(path, "log.jsonl") if os.path.isdir(path) else path
        with events_of_a_run(file):
            self.read(file, x)

    def read(self, file, x):
        steps, val, mean, places, clock = {}, {}, {}, {0: 0.0}, Clock()
        for event in log_events(file):
            kind, step = event.get("event"), event.get("step")
            clock.pass_by(event)
            if kind == "step":
                steps[step] = number(event.get("loss"))
                places[step] = {"steps": step, "tokens": number(event.get("tokens")), "hours": clock.hours}[x]
            elif kind == "val":
                val.setdefault(str(event.get("name", "val")),
                               {})[step] = (number(event.get("loss")), number(event.get("error")))
                if event.get("loss"):  # 0: a set that does not tell it, as one with a mask
                    self.bits.append((event.get("bits_per_byte") or 0.0) / event["loss"])
            elif kind == "val_mean":
                mean[step] = (number(event.get("loss")), float("nan"))
        evaluated = {s for rows in [mean, *val.values()] for s in rows}
        if x == "steps":
            places.update((s, s) for s in evaluated)
        elif evaluated - set(places):
            raise ValueError(f"{file}: its steps do not tell the {x} of step {min(evaluated - set(places))}, which was "
                             "evaluated; --x steps is always there")
        rows_of = lambda rows: np.array([(places[s], *v) for s, v in sorted(rows.items())], dtype=float).reshape(-1, 3)
        self.steps = np.array([(places[s], loss) for s, loss in sorted(steps.items())], dtype=float).reshape(-1, 2)
        self.val = {name: rows_of(rows) for name, rows in val.items()}
        self.mean = rows_of(mean)
        if not len(self.steps) and not self.val:
            raise ValueError(f"{file}: no step and no validation in this log")
        if len(self.steps) and not np.isfinite(self.steps[:, 0]).all():
            raise ValueError(f"{file}: its steps do not tell the {x}; --x steps is always there")


class Clock:
    """Hours that a run has taken, pauses between its parts left out, and a clock that was set back; of a log without
    times, the hours of its steps alone."""

    def __init__(self):
        self.hours, self.last, self.tokens = 0.0, None, 0.0

    def pass_by(self, event):
        if "time" in event:
            if self.last is not None and event["event"] != "start":
                self.hours += max(0, event["time"] - self.last) / 3600
            self.last = event["time"]
        elif event.get("event") == "step":
            tokens, rate = number(event.get("tokens")), number(event.get("tokens_per_s"))
            self.hours += (tokens - self.tokens) / rate / 3600 if rate else 0.0
            self.tokens = tokens


def bits_of_a_nat(runs):
    """Bits per byte where the loss is 1 nat, as the validations of the logs have it: tokens around documents, or of
    several bytes, count. None where a set does not tell it, or sets differ by more than the width of a curve."""
    ratios = [ratio for run in runs for ratio in run.bits]
    known = ratios and all(run.bits for run in runs if run.val)
    return sum(ratios) / len(ratios) if known and max(ratios) < 1.005 * min(ratios) else None


def smooth(y, width):
    """Mean over a window of `width` values that shrinks towards the ends; NaN are left out of it, and of nothing but
    NaN it is NaN."""
    if width < 2:
        return y
    good = np.isfinite(y)
    total, count = np.cumsum(np.r_[0, np.where(good, y, 0)]), np.cumsum(np.r_[0, good])
    i = np.arange(len(y))
    lo, hi = np.maximum(i - width // 2, 0), np.minimum(i + (width + 1) // 2, len(y))
    n = count[hi] - count[lo]
    return np.where(n > 0, (total[hi] - total[lo]) / np.maximum(n, 1), np.nan)


def legend(ax):
    """Below the panel, never on the curves."""
    handles, names = ax.get_legend_handles_labels()
    if names:
        columns = max(1, min(4, 56 // (max(map(len, names)) + 6)))
        ax.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=columns, fontsize=8,
                  frameon=False)


def draw_training(ax, runs, colours):
    used = set()
    for run in runs:
        if not len(run.steps):
            continue
        x, loss = run.steps[:, 0], run.steps[:, 1]
        width = max(1, len(x) // 50)
        name = picture_name(run.label) if run.label not in used else None
        used.add(run.label)
        if len(runs) == 1 and width > 1:
            ax.plot(x, loss, color=colours[run.label], alpha=0.25, linewidth=0.7)
        ax.plot(x, smooth(loss, width), color=colours[run.label], linewidth=1.4, label=name)
    widths = sorted({max(1, len(r.steps) // 50) for r in runs if len(r.steps)})
    smoothed = f" (mean of {widths[-1]} steps)" if widths and widths[-1] > 1 else ""
    ax.set_ylabel("loss (nats per counted token)")
    ax.set_title("training loss" + smoothed)


def draw_validation(ax, runs, colours, column, scale):
    """Column 1 is the loss, 2 the error. One set: a colour for each run. Several: a colour for each set, black for
    their mean, dashes for the runs."""
    names = sorted({name for run in runs for name in run.val})
    labels = list(colours)
    used = set()
    for run in runs:
        curves = [(name, rows, colours[run.label] if len(names) == 1 else colour_of(names.index(name)))
                  for name, rows in run.val.items()]
        if len(names) > 1:
            curves.append(("mean", run.mean, "black"))
        for name, rows, colour in curves:
            good = np.isfinite(rows[:, column])
            if not good.any():
                continue
            label = run.label if len(names) == 1 else name
            look = line_of(labels if len(names) > 1 else [run.label], run.label)
            ax.plot(rows[good, 0], rows[good, column] * scale, color=colour, **look,
                    linewidth=2.0 if colour == "black" else 1.3,
                    label=picture_name(label) if label not in used else None)
            used.add(label)
    if len(names) > 1 and len(labels) > 1 and used:
        for label in labels:
            look = dict(line_of(labels, label), **({} if len(labels) > len(DASHES) else {"marker": None}))
            ax.plot([], [], color="0.35", linewidth=1.3, label=picture_name(label), **look)


def draw(runs, title, out, x):
    labels = list(dict.fromkeys(run.label for run in runs))
    colours = {label: colour_of(i) for i, label in enumerate(labels)}
    panels = []
    if any(len(run.steps) for run in runs):
        panels.append("training")
    if any(run.val for run in runs):
        panels.append("validation")
    if any(np.isfinite(rows[:, 2]).any() for run in runs for rows in run.val.values()):
        panels.append("error")
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels) + 0.6, 4.8), squeeze=False,
                                layout="constrained")
    for ax, panel in zip(axes[0], panels):
        if panel == "training":
            draw_training(ax, runs, colours)
        elif panel == "validation":
            draw_validation(ax, runs, colours, 1, 1.0)
            ax.set_ylabel("loss (nats per counted token)")
            ax.set_title("validation loss")
            bits = bits_of_a_nat(runs)
            if bits:
                ax.secondary_yaxis("right", functions=(lambda x: x * bits,
                                                       lambda x: x / bits)).set_ylabel("bits per byte")
        else:
            draw_validation(ax, runs, colours, 2, 100.0)
            ax.set_ylabel("sequences with a wrong answer token (%)")
            ax.set_title("error on the test set")
            ax.set_ylim(-2, 102)
        if x == "tokens":
            ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        ax.set_xlabel(AXES[x])
        ax.grid(alpha=0.25)
        legend(ax)
    figure.suptitle(picture_name(title))
    figure.savefig(out, dpi=110, format=picture_format(out))
    plt.close(figure)


def with_labels(texts):
    """[(label, path)] of [LABEL=]PATH. Without a label it is the path's last part; where those of several runs are the
    same (a/seed1, b/seed1), as many parts as tell them apart: runs look the same where a label says so alone."""
    named = [split_name(text) for text in texts]
    parts = {path: os.path.abspath(path).split(os.sep) for label, path in named if label is None}
    n = 1
    while len({tuple(p[-n:]) for p in parts.values()}) < len({tuple(p) for p in parts.values()}):
        n += 1
    return [(os.path.join(*parts[path][-n:]) if label is None else label, path) for label, path in named]


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folder with log.jsonl, or the file")
    parser.add_argument("--out", metavar="FILE", help="PNG to write (default: curves.png in the first run's folder)")
    parser.add_argument("--x", choices=list(AXES), default="steps",
                        help="what the curves are drawn against (default: steps)")
    parser.add_argument("--title", help="heading (default: the names of the runs)")
    options = parser.parse_args()
    if missing:
        sys.exit(missing)
    try:
        runs = [Run(label, path, options.x) for label, path in with_labels(options.runs)]
        first = runs[0].path if os.path.isdir(runs[0].path) else os.path.dirname(runs[0].path)
        out = os.path.join(first, "curves.png") if options.out is None else options.out
        draw(runs, options.title or ", ".join(dict.fromkeys(run.label for run in runs)), out, options.x)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_run.py: {error}")
    print(out)


if __name__ == "__main__":
    run_program(main)
