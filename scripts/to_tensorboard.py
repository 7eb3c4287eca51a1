#!/usr/bin/env python3
"""Writes a run's log.jsonl as TensorBoard's events: scalars of training and of each validation set, samples and
configuration as text.

    dev/.venv/bin/python scripts/to_tensorboard.py runs/mta runs/plain
    dev/.venv/bin/tensorboard --logdir runs

Each run's events go into its folder tensorboard, which is made anew each time: the same command shows what has been
added. --out DIR is another folder for the events of one run. The package tensorboard is needed (python3 -m pip install
tensorboard); TensorFlow is not.
"""
import argparse
import glob
import json
import math
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "data"))
from options import Parser  # noqa: E402
from runlog import events_of_a_run, log_events  # noqa: E402
from shards import run_program  # noqa: E402

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto
    missing = None
except ImportError as error:  # --help works without; main() says what is missing
    missing = f"to_tensorboard.py: {error}; python3 -m pip install tensorboard, in dev/.venv or another environment"

STEP = ("loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "skipped")
VAL = ("loss", "perplexity", "bits_per_byte", "error")


def scalars(event):
    """{tag: value} of an event; null, which stands for NaN and infinity, as NaN."""
    number = lambda key: math.nan if event[key] is None else float(event[key])
    kind = event.get("event")
    if kind == "step":
        found = {"train/" + key: number(key) for key in STEP if key in event}
        found.update({f"train tokens/{name}": float(n) for name, n in event.get("sources", {}).items()})
        return found
    if kind in ("val", "val_mean"):  # a measure's sets in one group
        name = event["name"] if kind == "val" else "mean of the sets"
        return {f"validation {key}/{name}": number(key) for key in VAL if key in event}
    return {}


MARKDOWN = re.compile(r"[][\\`*_{}()<>#~|&!]")


def row(name, value):
    """A row of a table; the value as it is, whatever of it has a meaning in Markdown, as the * of a glob has."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "%s | %s" % (name, MARKDOWN.sub(lambda c: "&#%d;" % ord(c.group()), text))


def texts(event):
    """{tag: text in Markdown} of an event."""
    if event.get("event") == "sample":
        return {"sample": "    " + re.sub("\r\n?|\n", "\n    ", event["text"])}  # Markdown's lines end in CR too
    if event.get("event") == "start":
        rows = [row(k, v) for k, v in event.items() if k not in ("event", "config")]
        config = [row(k, v) for k, v in event.get("config", {}).items()]
        return {"run": "\n".join(["field | value", "---|---"] + rows),
                "config": "\n".join(["field | value", "---|---"] + config)}
    return {}


def converted(events):
    """TensorBoard's events of a log's."""
    out, clock = [], 0.0
    for event in events:
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars(event).items()]
        for tag, text in texts(event).items():
            values.append(Summary.Value(tag=tag, metadata=create_summary_metadata(tag, tag),
                                        tensor=make_tensor_proto([text.encode()])))
        clock = event.get("time", clock)  # logs of earlier versions have no times
        if values:
            out.append(Event(wall_time=clock, step=int(event.get("step", 0)), summary=Summary(value=values)))
    return out


def convert(log, folder):
    """Writes the events; how many values there were. Of a log that cannot be read all stays as it is."""
    with events_of_a_run(log):
        events = converted(log_events(log))
    os.makedirs(folder, exist_ok=True)
    for old in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
        os.remove(old)
    writer = EventFileWriter(folder)
    for event in events:
        writer.add_event(event)
    writer.close()
    return sum(len(event.summary.value) for event in events)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with log.jsonl")
    parser.add_argument("--out", metavar="DIR",
                        help="of one run: the folder for its events, which holds none yet (default: RUN/tensorboard)")
    options = parser.parse_args()
    if missing:
        sys.exit(missing)
    if options.out and len(options.runs) > 1:
        sys.exit("to_tensorboard.py: --out is for one run; without it each has its own folder")
    if options.out and glob.glob(os.path.join(glob.escape(options.out), "events.out.tfevents.*")):
        sys.exit(f"to_tensorboard.py: --out: {options.out} holds events; remove them, or choose another folder")
    try:
        for run in options.runs:
            folder = options.out or os.path.join(run, "tensorboard")
            print(f"{folder}: {convert(os.path.join(run, 'log.jsonl'), folder)} values")
    except (OSError, ValueError) as error:
        sys.exit(f"to_tensorboard.py: {error}")


if __name__ == "__main__":
    run_program(main)
