#!/usr/bin/env python3
"""Prints the errors of toy-task runs, a column a seed, beside the paper's (arXiv 2504.00927, table 1). The standard
library suffices.

    python3 scripts/toy_report.py runs/quickstart/n4_first

A task's folder is called nN_KIND and holds runs called MODEL_SEED (transformer_1, mta_3); the last validation of each
log.jsonl counts. The paper's whole table: scripts/evidence.sh toy.
"""
import os
import re
import statistics
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "data"))
from options import Parser  # noqa: E402
from runlog import events_of_a_run, log_events  # noqa: E402
from shards import run_program  # noqa: E402

PAPER = {  # error in percent; the one standard deviation the paper's text gives is kept
    "transformer": {"n5_all": "51.6 +- 43.1", "n5_first": "78.2", "n5_last": "1.3", "n8_all": "31.2",
                    "n8_first": "28.9", "n8_last": "58.4"},
    "mta": {"n5_all": "0.1", "n5_first": "0.0", "n5_last": "0.0", "n8_all": "0.1", "n8_first": "0.0", "n8_last": "0.0"},
}


def last_error(run):
    """(step, error in percent) of a run's last masked validation; None if it has none yet, or no log."""
    found, names, log = None, set(), os.path.join(run, "log.jsonl")
    try:
        with events_of_a_run(log):
            for event in log_events(log):
                if event.get("event") == "val" and event.get("error") is not None:
                    found = (int(event["step"]), 100.0 * float(event["error"]))
                    names.add(event.get("name"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(names) > 1:
        named = ", ".join(sorted(map(str, names)))
        raise ValueError("%s: %d validation sets with a mask (%s), wanted one" % (run, len(names), named))
    return found


def read_task(folder):
    """{model: {seed: (step, error)}} of a task's folder."""
    out = {}
    for name in sorted(os.listdir(folder)):
        match = re.fullmatch(r"([a-z-]+)_(\d+)", name)
        result = match and last_error(os.path.join(folder, name))
        if result and int(match[2]) in out.get(match[1], {}):
            raise ValueError("%s: two runs of %s with seed %d" % (folder, match[1], int(match[2])))
        if result:
            out.setdefault(match[1], {})[int(match[2])] = result
    return out


def print_table(rows):
    """Rows of cells, the first left-aligned; the widths fit."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths))).rstrip())
        if number == 0:
            print("  " + "  ".join("-" * w for w in widths))


def print_task(name, task):
    seeds = sorted({seed for runs in task.values() for seed in runs})
    kind = name.rpartition("_")[2]
    rows = [["error in %"] + [f"seed {s}" for s in seeds] + ["mean", f"paper, N=5 {kind}", f"paper, N=8 {kind}"]]
    for model in [m for m in PAPER if m in task] + sorted(set(task) - set(PAPER)):
        runs = task[model]
        cells = [f"{runs[s][1]:.1f}" if s in runs else "-" for s in seeds]
        paper = [PAPER.get(model, {}).get(f"n{n}_{kind}", "-") for n in (5, 8)]
        rows.append([model] + cells + [f"{statistics.mean(e for _, e in runs.values()):.1f}"] + paper)
    print_table(rows)
    steps = [step for runs in task.values() for step, _ in runs.values()]
    if min(steps) < max(steps):
        print(f"  the runs are of different lengths: their last validations are of steps {min(steps)} to {max(steps)}")
    pairs = [(task["mta"][s][1], task["transformer"][s][1]) for s in seeds if s in task.get("mta", {})
             and s in task.get("transformer", {})]
    if pairs:
        below = sum(a < b for a, b in pairs)
        print(f"  mta is below transformer on {below} of {len(pairs)} seeds")


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="folder of a task: nN_KIND")
    folder = parser.parse_args().folder
    try:
        task = read_task(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"toy_report.py: {error}")
    if not task:
        sys.exit(f"toy_report.py: no run with a masked validation set below {folder}")
    print_task(os.path.basename(os.path.normpath(folder)), task)


if __name__ == "__main__":
    run_program(main)
