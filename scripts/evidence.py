#!/usr/bin/env python3
"""The cells behind dev/RESULTS.md: which runs there are, how one is trained, what is kept of it. scripts/evidence.sh
--help says how to call it.

A cell is one run of the CPU trainer: a task, a model, an attention, a seed and a learning rate. Its name says all of
them, and its options follow from the name alone, so that a line of dev/evidence/PART.jsonl can be made again by
`scripts/evidence.sh PART --cells NAME`. Standard library only.
"""

import argparse
import json
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib

import evidence_kernels
import evidence_long

HERE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(HERE)
RESULTS = os.path.join(ROOT, "dev", "evidence")

# ---- the cells

TOY_TASKS = [(n, kind) for n in (5, 8) for kind in ("all", "first", "last")]
TOY_ATTENTIONS = ("transformer", "mta")
TOY_BLOCKS = 8  # blocks of a sequence; the paper's sequences of 321 tokens hold 52 or 34
TOY_SAMPLES = 200000  # sequences of the training set, three times as many for the longest cells: more than are drawn
TOY_TESTS = 1000  # sequences of the validation set
TOY_STEPS, TOY_TUNING_STEPS, TOY_LONG_STEPS = 3000, 3000, 9000
TOY_BEST = {"layers": 4, "width": 64, "lr": 2e-3}  # settled by the part toy-tuning, for the plain Transformer
PAPER_TOY = {"layers": 4, "width": 256, "lr": 1e-4, "steps": 100000}  # the paper's own size, with its constant rate
PAPER_TOY_SAMPLES = 1000000  # of 321 tokens

ABLATION_SEEDS, ABLATION_STEPS = (1, 2, 3), 1000
NO_CONV = ["--kq-conv-layers", "none"]
FOUR_HEADS = ["--num-attention-heads", "4", "--num-key-value-heads", "4"]  # of 16 channels, in place of 2 of 32


def conv(queries=2, keys=9, layers="all", before="on", after="off"):
    """Options of a key-query convolution; without arguments the paper's for the toy task."""
    return [
        "--kq-conv-layers", layers, "--kq-conv-query-size", str(queries), "--kq-conv-key-size", str(keys),
        "--kq-conv-pre-softmax", before, "--kq-conv-post-softmax", after,
    ]


# what stands in a row: the attention it starts from, and the options over it; all of the toy model of two layers
ABLATION = {
    "transformer": ("transformer", []),
    "diff": ("diff", []),
    "heads before": ("mta", [*NO_CONV, "--head-mix-pre-softmax", "2"]),
    "heads after": ("mta", [*NO_CONV, "--head-mix-post-softmax", "2"]),
    "heads before and after (talking-heads)": ("talking-heads", []),
    "convolution before (the paper's toy model)": ("mta", conv()),
    "convolution after": ("mta", conv(before="off", after="on")),
    "convolution before and after": ("mta", conv(after="on")),
    "convolution before, heads before": ("mta", [*conv(), "--head-mix-pre-softmax", "2"]),
    "convolution before, heads after": ("mta", [*conv(), "--head-mix-post-softmax", "2"]),
    "convolution before, norm": ("mta", [*conv(), "--head-norm", "group"]),
    "convolution before, norm scaled by depth": ("mta", [*conv(), "--head-norm", "group_depth_scaled"]),
    "convolution before, norm, gate": ("mta", [*conv(), "--head-norm", "group", "--head-gate", "on"]),
    "all four, no norm": ("mta-full", [*conv(after="on"), "--head-norm", "none", "--head-gate", "off"]),
    "all four, norm scaled by depth": (
        "mta-full",
        [*conv(after="on"), "--head-norm", "group_depth_scaled", "--head-gate", "off"],
    ),
    "all four, norm, gate (mta-full)": ("mta-full", conv(after="on")),
    "kernel of 1 query, 9 keys": ("mta", conv(queries=1)),
    "kernel of 2 queries, 1 key": ("mta", conv(keys=1)),
    "kernel of 2 queries, 5 keys": ("mta", conv(keys=5)),
    "kernel of 6 queries, 11 keys": ("mta", conv(6, 11)),
    "4 heads: convolution before, no mixing": ("mta", [*FOUR_HEADS, *conv()]),
    "4 heads: the same, mixed in groups of 2": ("mta", [*FOUR_HEADS, *conv(), "--head-mix-post-softmax", "2"]),
    "4 heads: the same, all 4 mixed": ("mta", [*FOUR_HEADS, *conv(), "--head-mix-post-softmax", "4"]),
    "convolution in the first layer only": ("mta", conv(layers="0")),
    "convolution in the last layer only": ("mta", conv(layers="1")),
    "kernels start at random": ("mta", conv()),
    "kernels start as the mean": ("mta", conv()),
    "retrofit: plain, then plain": ("transformer", []),
    "retrofit: plain, then mta from the identity": ("mta", conv()),
}
RETROFIT = "retrofit: "  # rows that train a plain Transformer first
START = "kernels start "  # rows whose kernels do not start at the identity

LANGUAGE_MODELS = ("1m", "3m")
LANGUAGE_ATTENTIONS = ("transformer", "diff", "talking-heads", "mta", "mta-full")
LANGUAGE_MORE = [("1m", attention, 3) for attention in ("transformer", "mta", "mta-full")]  # beside seeds 1 and 2
LANGUAGE_STEPS, LANGUAGE_TUNING_STEPS = 1200, 400
LANGUAGE_MATMUL = "bf16"  # what products multiply; one cell of the part is trained in fp32 too
LANGUAGE_RATES = {"1m": (1.5e-3, 3e-3, 6e-3, 1.2e-2), "3m": (1.5e-3, 3e-3, 6e-3)}  # that are tried
LANGUAGE_LR = {"1m": 6e-3, "3m": 3e-3}  # settled by the part language-tuning, for the plain Transformer

LONG_ATTENTIONS, LONG_SEEDS = ("transformer", "mta"), (1, 2)
LONG_STEPS, LONG_MORE_STEPS = 2000, 500  # at 256 tokens, then at 512
LONG_THETAS = (10000, 50000)  # RoPE's base of the one and of the other

COST_ATTENTIONS = ("diff", "talking-heads", "mta", "mta-full")
COST_MODELS = {
    32: ("1m", []), 64: ("11m", []), 128: ("25m", ["--num-attention-heads", "4", "--num-key-value-heads", "4"]),
}  # by head size
COST_LENGTHS = (512, 1024, 2048, 4096)
COST_ROUNDS = 3  # of both programs in turns
COST_STEPS = {32: 10, 64: 5, 128: 4}  # of a round by head size, the first of which does not count
COST_PLANS = (2048, 4096)  # lengths of the 880m model whose memory on a GPU is planned, 4 sequences at once


def toy_cell(part, n, kind, attention, seed, layers, width, lr, steps):
    return {
        "part": part, "name": f"n{n}_{kind}/{attention}/layers{layers}_width{width}_lr{lr:g}_steps{steps}/seed{seed}",
        "task": f"n{n}_{kind}", "n": n, "kind": kind, "model": f"toy, {layers} layers of {width} channels",
        "attention": attention, "seed": seed, "layers": layers, "width": width, "lr": lr, "steps": steps,
    }


def ablation_cell(row, seed):
    attention, options = ABLATION[row]
    cell = toy_cell("ablation", 5, "first", attention, seed, 2, TOY_BEST["width"], TOY_BEST["lr"], ABLATION_STEPS)
    return {**cell, "name": f"{re.sub('[^a-z0-9]+', '_', row).strip('_')}/seed{seed}", "row": row, "options": options}


def language_cell(part, model, attention, seed, lr, steps, matmul=LANGUAGE_MATMUL):
    return {
        "part": part, "name": f"{model}/{attention}/lr{lr:g}_steps{steps}_{matmul}/seed{seed}", "task": "language",
        "model": model, "attention": attention, "seed": seed, "lr": lr, "steps": steps, "matmul": matmul,
    }


def cost_cell(attention, head_size, length):
    model = COST_MODELS[head_size][0]
    return {
        "part": "cost", "name": f"{model}_heads{head_size}/{attention}/T{length}", "task": "cost",
        "model": f"{model}, heads of {head_size}", "attention": attention, "seed": 1, "head_size": head_size,
        "length": length, "steps": COST_STEPS[head_size],
    }


def plan_cell(attention, length):
    return {
        "part": "cost", "name": f"880m_plan/{attention}/T{length}", "task": "plan", "model": "880m",
        "attention": attention, "seed": 1, "length": length, "steps": 1,
    }


def cells_of(part):
    """The cells of a part, those that tell most first."""
    if part == "toy-tuning":  # depth, width and learning rate of the plain Transformer on one task
        grid = [
            (4, 64, 2e-3), (4, 64, 1e-3), (4, 64, 4e-3), (2, 64, 2e-3), (6, 64, 2e-3), (4, 128, 1e-3), (4, 128, 2e-3),
        ]
        cells = [toy_cell(part, 5, "first", "transformer", 1, *g, TOY_TUNING_STEPS) for g in grid]
        cells += [toy_cell(part, 5, "first", "mta", 1, *g, TOY_TUNING_STEPS) for g in grid[:1]]
        best = (TOY_BEST["layers"], TOY_BEST["width"], TOY_BEST["lr"])
        return cells + [
            toy_cell(part, 5, "first", attention, 1, *best, TOY_LONG_STEPS) for attention in ("transformer", "mta")
        ]
    if part in ("toy", "toy-paper"):
        size = {**TOY_BEST, "steps": TOY_STEPS} if part == "toy" else PAPER_TOY
        return [
            toy_cell(part, n, kind, attention, seed, **size)
            for seed in (1, 2, 3)
            for n, kind in TOY_TASKS
            for attention in TOY_ATTENTIONS
        ]
    if part == "toy-long":  # the table of `toy` with thrice the steps; N 5, first, of seed 1 is in toy-tuning
        tasks = [(5, "last", seed) for seed in (1, 2, 3)]
        tasks += [(n, kind, seed) for seed in (1, 2, 3) for n, kind in TOY_TASKS if (n, kind) != (5, "last")]
        tasks.remove((5, "first", 1))
        return [
            toy_cell(part, n, kind, attention, seed, **TOY_BEST, steps=TOY_LONG_STEPS)
            for n, kind, seed in tasks
            for attention in TOY_ATTENTIONS
        ]
    if part == "again":  # two cells of the table by a seed that it has not seen
        return [toy_cell(part, 5, "first", attention, 4, **TOY_BEST, steps=TOY_STEPS) for attention in TOY_ATTENTIONS]
    if part == "ablation":
        return [ablation_cell(row, seed) for seed in ABLATION_SEEDS for row in ABLATION]
    if part == "language-tuning":
        return [
            language_cell(part, model, "transformer", 1, lr, LANGUAGE_TUNING_STEPS)
            for model in LANGUAGE_MODELS
            for lr in LANGUAGE_RATES[model]
        ]
    if part == "language":
        return [
            language_cell(part, model, attention, seed, LANGUAGE_LR[model], LANGUAGE_STEPS)
            for seed in (1, 2)
            for model in LANGUAGE_MODELS
            for attention in LANGUAGE_ATTENTIONS
        ] + [
            language_cell(part, "1m", attention, 1, LANGUAGE_LR["1m"], LANGUAGE_STEPS, "fp32")
            for attention in ("transformer", "mta")
        ] + [
            language_cell(part, model, attention, seed, LANGUAGE_LR[model], LANGUAGE_STEPS)
            for model, attention, seed in LANGUAGE_MORE
        ]
    if part == "long":
        return [
            {**language_cell(part, "1m", attention, seed, LANGUAGE_LR["1m"], LONG_MORE_STEPS), "task": "long"}
            for seed in LONG_SEEDS
            for attention in LONG_ATTENTIONS
        ]
    if part == "cost":
        return [cost_cell(a, h, t) for h in COST_MODELS for t in COST_LENGTHS for a in COST_ATTENTIONS] + [
            plan_cell(a, t) for t in COST_PLANS for a in ("transformer", *COST_ATTENTIONS)
        ]
    raise SystemExit(f"evidence.py: no part is called {part}; wanted one of {', '.join(PARTS + NAMED_PARTS)}, patterns")


PARTS = ("toy-tuning", "toy", "toy-long", "again", "ablation", "language-tuning", "language", "long", "cost")
NAMED_PARTS = ("toy-paper",)  # too long for a CPU: only where they are asked for by name
PATTERNS = ("toy-tuning", "toy", "ablation", "language")  # the part `patterns`: those whose kernels are counted

# ---- what is known of finished cells


def read_results(part):
    """{name: line} of dev/evidence/PART.jsonl."""
    path = os.path.join(RESULTS, part + ".jsonl")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f if line.strip()]
    return {line["name"]: line for line in lines}


def processor():
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return os.uname().machine


def git(*arguments):
    """What git says of the checkout; nothing where there is no git, or no checkout of this user's."""
    try:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def commit():
    """The commit of the checkout, "unknown" without one; "+" behind it where a program or a header that trains is
    changed."""
    changed = git("status", "--porcelain", "--", "train_mta.c", "mta", "data", "Makefile")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


# ---- one cell


def toy_data(cell, out):
    """Makes the data of a toy cell, unless it is there; a data seed is the run's seed. Returns the options that name
    it."""
    samples = TOY_SAMPLES if cell["steps"] <= TOY_STEPS else 3 * TOY_SAMPLES
    blocks = ["--blocks", str(TOY_BLOCKS)]
    if cell["part"] == "toy-paper":  # as many blocks as the paper's sequence holds
        samples, blocks = PAPER_TOY_SAMPLES, []
    folder = os.path.join(out, "data", f"{cell['task']}_{cell['seed']}_{samples}")
    if not os.path.exists(os.path.join(folder, "toy_task.json")):
        subprocess.run(
            [
                sys.executable, os.path.join(ROOT, "data", "toy_task.py"), "--out", folder, "--n", str(cell["n"]),
                "--kind", cell["kind"], *blocks, "--seed", str(cell["seed"]), "--train-samples", str(samples),
                "--test-samples", str(TOY_TESTS), "--jobs", "1",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    with open(os.path.join(folder, "toy_task.json"), encoding="utf-8") as f:
        length = json.load(f)["length"]
    return [
        "--train", folder + "/toy_train_*.bin", "--val", f"toy={folder}/toy_val_*.bin", "--seq-len", str(length),
        "--tokenizer", "toy",
    ]


def language_data(out):
    """Makes the shards of the text domains, unless they are there. Returns the options that name them."""
    folder = os.path.join(out, "text")
    if not os.path.exists(os.path.join(folder, "done")):
        subprocess.run([sys.executable, os.path.join(HERE, "evidence_text.py"), "--out", folder], check=True)
    with open(os.path.join(folder, "done"), encoding="utf-8") as f:
        domains = f.read().split()
    return [
        "--train", ",".join(f"{folder}/{d}_train_*.bin" for d in domains), "--val",
        ",".join(f"{d}={folder}/{d}_val_*.bin" for d in domains), "--seq-len", "256", "--tokenizer", "bytes",
    ]


def commands_of(cell, out, trainer):
    """The trainer's command lines of a cell, in their order; the last one's log is the cell's."""
    steps = cell["steps"]
    folder = os.path.join(out, cell["part"], cell["name"])
    paper = cell["part"] == "toy-paper"
    common = [
        "--lr", f"{cell['lr']:g}", "--schedule", "constant" if paper else "linear", "--steps", str(steps), "--seed",
        str(cell["seed"]), "--eval-every", str(steps // 10), "--save-every", str(steps // 10), "--keep", "1",
        "--sample-every", "0", "--log-every", "100", "--resume",
    ]
    attention = ["--attention", cell["attention"], *cell.get("options", [])]
    if "matmul" in cell:
        common += ["--matmul", cell["matmul"]]
    if cell["task"] == "language":
        return [
            [
                trainer, "--model", cell["model"], *language_data(out), "--batch-size", "16", "--tokens-per-step",
                "4096", "--eval-windows", "256", "--warmup", "100", *attention, *common, "--out", folder,
            ]
        ]
    if cell["task"] == "long":
        language_data(out)
        evidence_long.make(os.path.join(out, "long"), os.path.join(out, "text"))
        shards = os.path.join(out, "long", "shards")
        data = [
            "--train", f"{shards}/questions_train_*.bin", "--val", f"questions={shards}/questions_val_*.bin",
            "--batch-size", "8", "--tokens-per-step", "4096", "--eval-windows", "128", *attention,
        ]
        first = folder + ".first"
        lengths = [
            ["--seq-len", str(t), "--rope-theta", str(theta)] for t, theta in zip(evidence_long.LENGTHS, LONG_THETAS)
        ]
        before = [*common]
        before[before.index("--steps") + 1] = str(LONG_STEPS)
        return [
            [
                trainer, "--model", "1m", "--max-position-embeddings", "512", "--tokenizer", "bytes", *lengths[0],
                *data, "--warmup", "100", *before, "--out", first,
            ],
            [
                trainer, "--init-from", os.path.join(first, f"step-{LONG_STEPS:08d}"), *lengths[1], *data, "--warmup",
                "50", *common, "--out", folder,
            ],
        ]
    width, row = cell["width"], cell.get("row", "")
    task = [
        *toy_data(cell, out), "--batch-size", "64", "--eval-windows", "0", "--weight-decay", "0",
        *(["--warmup", "0", "--beta2", "0.98"] if paper else ["--warmup", "100"]),
    ]
    model = [
        "--model", "toy", "--hidden-size", str(width), "--num-hidden-layers", str(cell["layers"]),
        "--num-attention-heads", "2", "--num-key-value-heads", "2", "--intermediate-size", str(3 * width),
    ]
    if not row:
        model += ["--kq-conv-key-size", str(2 * cell["n"] - 1)]
    first = folder + ".first"
    continued = [
        trainer, "--init-from", os.path.join(first, f"step-{1 if row.startswith(START) else steps:08d}"), *task,
        *attention,
    ]
    if row.startswith(RETROFIT):
        return [
            [trainer, *model, *task, "--attention", "transformer", *common, "--out", first],
            [*continued, *common, "--out", folder],
        ]
    if row.startswith(START):
        start = [
            trainer, *model, *task, *attention, "--seed", str(cell["seed"]), "--steps", "1", "--lr", "0", "--resume",
            "--out", first,
        ]
        edit = [
            sys.executable, os.path.join(HERE, "evidence_kernels.py"), row[len(START) :].split()[-1], continued[2],
            str(cell["seed"]),
        ]
        # Once its kernels start elsewhere, that checkpoint is another than was saved, which --resume refuses.
        begun = [] if os.path.exists(continued[2]) else [start]
        return [*begun, edit, [*continued, "--no-verify", *common, "--out", folder]]
    return [[trainer, *model, *task, *attention, *common, "--out", folder]]


def seconds_of(log):
    """Seconds of the runs that a log holds; 0 where there is none."""
    if not os.path.exists(log):
        return 0.0
    with open(log, encoding="utf-8") as f:
        return sum(event["seconds"] for event in map(json.loads, f) if event["event"] == "stop")


def result_of(cell, out, trainer):
    """The line of a finished cell, or None: what its log says of the last step, and the curve of its validations."""
    log = os.path.join(out, cell["part"], cell["name"], "log.jsonl")
    if not os.path.exists(log):
        return None
    curve, parameters, arguments = {}, 0, []
    seconds = seconds_of(log) + seconds_of(os.path.join(os.path.dirname(log) + ".first", "log.jsonl"))
    with open(log, encoding="utf-8") as f:
        for line in f:
            event = json.loads(line)
            if event["event"] == "start":
                parameters, arguments = event["parameters"], event["arguments"]
            if event["event"] == "val":
                value = event["error"] if "error" in event else event["loss"]
                curve.setdefault(event["name"], []).append([event["step"], round(value, 5)])
    last = {name: points[-1][1] for name, points in curve.items() if points[-1][0] == cell["steps"]}
    if not last or len(last) < len(curve):
        return None
    arguments = [a.replace(os.path.join(out, ""), "RUNS/") for a in arguments]
    result = {
        **cell, "processor": processor(), "commit": commit(), "seconds": round(seconds, 1), "parameters": parameters,
        "last": last, "curve": curve, "arguments": arguments,
    }
    checkpoints = {"": os.path.join(os.path.dirname(log), f"step-{cell['steps']:08d}")}
    if cell["task"] == "long":
        checkpoints["before "] = os.path.join(os.path.dirname(log) + ".first", f"step-{LONG_STEPS:08d}")
        result["last"] |= {
            when + name: round(value, 4)
            for when, folder in checkpoints.items()
            for name, value in evidence_long.score(trainer, folder, os.path.join(out, "long")).items()
        }
    learned = evidence_kernels.kernels(checkpoints[""])
    if learned:
        result["patterns"] = evidence_kernels.counts(learned)
        result["kernels"] = {
            f"{layer} {name}": [[[round(w, 3) for w in line] for line in head] for head in tensor]
            for (layer, name), tensor in sorted(learned.items())
        }
    return result


def cost_shard(out):
    """A shard of random bytes: what a step costs does not depend on what it reads."""
    folder = os.path.join(out, "data", "cost")
    path = os.path.join(folder, "random_train_000000.bin")
    if not os.path.exists(path):
        sys.path.insert(0, os.path.join(ROOT, "data"))
        import shards

        os.makedirs(folder, exist_ok=True)
        data = b"".join(byte.to_bytes(2, "little") for byte in random.Random(1).randbytes(1 << 17))
        shards.write_synced(path, shards.shard_header(2, len(data) // 2, 259, zlib.crc32(data)) + data)
    return path


def timed_run(command, out):
    """Runs a training in a folder of its own in `out`, which is removed. Returns the seconds of its fastest step but
    the first, and its peak of resident memory in bytes."""
    with tempfile.TemporaryDirectory(prefix="cost_", dir=out) as folder:
        command = [*command, "--out", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        with process.stderr:
            message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said = message.decode(errors="replace").strip()
            raise SystemExit(f"evidence.py: {' '.join(command)}: status {process.returncode}: {said}")
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
            events = [json.loads(line) for line in f]
    tokens = next(e["tokens_per_step"] for e in events if e["event"] == "start")
    return tokens / max(
        e["tokens_per_s"] for e in events if e["event"] == "step" and e["step"] > 1
    ), usage.ru_maxrss * 1024


def measure_cost(cell, out, trainer):
    """Step time and memory of an attention beside the plain Transformer's, in turns on the idle machine: all threads,
    one sequence a step."""
    began = time.time()
    model, options = COST_MODELS[cell["head_size"]]
    seconds, peak, command = {}, {}, []
    for _ in range(COST_ROUNDS):
        for attention in ("transformer", cell["attention"]):
            command = [
                trainer, "--model", model, *options, "--attention", attention, "--train", cost_shard(out),
                "--tokenizer", "bytes", "--seq-len", str(cell["length"]), "--max-position-embeddings", "4096",
                "--batch-size", "1", "--steps", str(cell["steps"]), "--log-every", "1", "--save-every", "0",
                "--sample-every", "0",
            ]
            took, resident = timed_run(command, out)
            seconds.setdefault(attention, []).append(took)
            peak[attention] = max(peak.get(attention, 0), resident)
    mine, plain = (statistics.median(seconds[a]) for a in (cell["attention"], "transformer"))
    last = {"time": round(mine / plain, 4), "memory": round(peak[cell["attention"]] / peak["transformer"], 4)}
    return {
        **cell, "processor": processor(), "commit": commit(), "seconds": round(time.time() - began, 1), "last": last,
        "step_seconds": {a: [round(x, 5) for x in xs] for a, xs in seconds.items()}, "resident_bytes": peak,
        "arguments": [a.replace(os.path.join(out, ""), "RUNS/") for a in ["train_mta", *command[1:]]],
    }


def plan_memory(cell, emulator):
    """The memory that the CUDA trainer plans for the 880m model; its own --dry-run, compiled for the CPU, says it."""
    if not os.access(emulator, os.X_OK):
        raise SystemExit(f"evidence.py: {emulator}: no such program; make build/train_mta_cuda_cpu builds it")
    began = time.time()
    command = [
        emulator, "--dry-run", "--model", "880m", "--attention", cell["attention"], "--seq-len", str(cell["length"]),
        "--max-position-embeddings", "4096", "--batch-size", "4",
    ]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = {
        name: float(size) for name, size in re.findall(r"^(?:memory)? +(\S.*?) +([0-9.]+) MiB", plan, re.MULTILINE)
    }
    return {
        **cell, "processor": processor(), "commit": commit(), "seconds": round(time.time() - began, 1),
        "last": {"MiB": sizes["total"]}, "MiB": sizes, "arguments": command[1:],
    }


def measure_cells(only, out, trainer):
    """The cells of the part `cost`, one after the other: nothing else may run meanwhile."""
    for cell in [c for c in cells_of("cost") if only in c["name"] and c["name"] not in read_results("cost")]:
        if cell["task"] == "plan":
            keep(plan_memory(cell, os.path.join(ROOT, "build", "train_mta_cuda_cpu")))
        else:
            keep(measure_cost(cell, out, trainer))


def keep(result):
    """The line of a cell goes to its part's file, and what it found is said."""
    os.makedirs(RESULTS, exist_ok=True)
    with open(os.path.join(RESULTS, result["part"] + ".jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")
    last = ", ".join(f"{k} {v:g}" for k, v in result["last"].items())
    print(f"{result['part']}/{result['name']}: {last}  {result['seconds']:.0f} s", flush=True)


# ---- the plan, and running it


def predicted_seconds(cell, results):
    """Seconds of a cell on one thread: as long a cell of its part, model and steps took, else None."""
    same = [
        r["seconds"] / r["steps"]
        for r in results.values()
        if r["model"] == cell["model"] and r["task"] == cell["task"] and r["attention"] == cell["attention"]
    ]
    near = [r["seconds"] / r["steps"] for r in results.values() if r["model"] == cell["model"]]
    rates = same or near
    return sorted(rates)[len(rates) // 2] * cell["steps"] if rates else None


def print_plan(parts, only):
    for part in parts:
        results, seconds, unknown, open_cells = read_results(part), 0.0, 0, 0
        cells = [c for c in cells_of(part) if only in c["name"]]
        for cell in cells:
            done = cell["name"] in results
            guess = None if done else predicted_seconds(cell, results)
            seconds += guess or 0
            unknown += not done and guess is None
            open_cells += not done
            about = f"  about {guess / 60:.0f} min" if guess else ""
            print(f"{'done' if done else 'open'}  {part}/{cell['name']}{about}")
        print(
            f"{part}: {len(cells)} cells, {len(cells) - open_cells} done; the others take about {seconds / 3600:.1f} h "
            f"of one core"
            + (f", {unknown} of them not known yet" if unknown else "")
        )


def end_cells(running):
    """Tells trainings to save and stop: each has a session of its own, which no signal to this program reaches."""
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


def train_cells(waiting, running, stop, jobs, out, trainer):
    """Trains the cells that wait, `jobs` at a time, and keeps what they found, until none is left or `stop` is not
    empty. Was any training stopped?"""
    told, environment = False, dict(os.environ, OMP_NUM_THREADS="1")
    while running or (waiting and not stop):
        while waiting and len(running) < jobs and not stop:
            cell = waiting.pop(0)
            command = " && ".join(shlex.join(c) for c in commands_of(cell, out, trainer))
            folder = os.path.join(out, cell["part"], cell["name"])
            os.makedirs(folder, exist_ok=True)
            with open(folder + ".txt", "a", encoding="utf-8") as log:
                process = subprocess.Popen(["sh", "-c", "trap : TERM; " + command], stdout=log, stderr=log,
                                           env=environment, start_new_session=True)
                running[process] = cell
        time.sleep(0.5)
        for process in [p for p in running if p.poll() is not None]:
            cell = running.pop(process)
            result = result_of(cell, out, trainer) if process.returncode == 0 else None
            if result:
                keep(result)
            elif not stop:
                print(
                    f"evidence.py: {cell['part']}/{cell['name']} ended with status {process.returncode}; see {out}",
                    file=sys.stderr,
                )
                stop.append(1)
        if stop and not told:  # once: a second signal would end a trainer that is saving
            told = True
            end_cells(running)
    return told


def run_cells(parts, only, jobs, out, trainer):
    """Trains what is open, `jobs` at a time. A signal stops the trainings, which save first; the same command goes
    on."""
    waiting = [
        c
        for part in parts
        if part != "cost"
        for c in cells_of(part)
        if only in c["name"] and c["name"] not in read_results(part)
    ]
    running, stop = {}, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1))
    print(f"{len(waiting)} cells, {jobs} at a time", flush=True)
    try:
        told = train_cells(waiting, running, stop, jobs, out, trainer)
    except BaseException:
        end_cells(running)
        raise
    if told:
        print("evidence.py: stopped; the same command continues", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    return 75 if stop else 0


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", default=os.path.join(ROOT, "runs", "evidence"))
    parser.add_argument("--trainer", default=os.path.join(ROOT, "train_mta"))
    parser.add_argument("--cells", default="")
    options = parser.parse_args()
    options.parts = [p for part in options.parts for p in (PATTERNS if part == "patterns" else (part,))]
    if options.plan:
        return print_plan(options.parts, options.cells)
    if options.report:
        import evidence_report

        return evidence_report.write()
    if not os.access(options.trainer, os.X_OK):
        raise SystemExit(f"evidence.py: {options.trainer}: no such program; make train_mta builds it")
    if options.jobs < 1:
        raise SystemExit(f"evidence.py: --jobs: got {options.jobs}, wanted at least 1")
    out = os.path.abspath(options.out)
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"evidence.py: --out: {error}") from None
    status = run_cells(options.parts, options.cells, options.jobs, out, options.trainer)
    if "cost" in options.parts and not status:
        measure_cells(options.cells, out, options.trainer)
    return status


if __name__ == "__main__":
    sys.exit(main())
