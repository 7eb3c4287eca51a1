"""The data and the questions of the part `long` of scripts/evidence.sh: needles in a haystack and BabiLong's QA1, made
by data/evals.py, for a small model of bytes that is trained at 256 tokens and goes on at 512.

Training documents are questions with their answers among text of two domains, the text of scripts/evidence_text.py; the
questions that are scored have other seeds, and their distraction is another domain. Standard library only.
"""

import json
import os
import random
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
LENGTHS = (256, 512)  # tokens of a sequence at both stages
NEEDLES = 2  # facts of one form, one of which is asked for
DEPTHS = "0,25,50,75,100"  # percent
TRAINED, SCORED = 20000, 40  # questions of a length to train on; scored ones of a length and, for needles, of a depth
SETS = tuple(f"{task}_{length}" for task in ("needle", "qa1") for length in LENGTHS)


def run(program, *options):
    """A program of data/, without what it prints."""
    command = [sys.executable, os.path.join(ROOT, "data", program), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def questions(path, task, length, samples, seed, text):
    """Questions; those of 512 tokens and all needles stay below `length` with their answer, QA1 of "256" has no
    distraction and up to 450."""
    kind = ["babilong", "--tasks", "1", "--distraction", str(max(0, length - 450))]
    if task == "needle":
        kind = ["needle", "--needles", str(NEEDLES), "--length", str(length - 16), "--depth", DEPTHS]
    run("evals.py", *kind, "--out", path, "--text", text, "--samples", str(samples), "--seed", str(seed))


def make(out, text):
    """Shards and questions in `out`, unless they are there; text: the folder of evidence_text.py."""
    if os.path.exists(os.path.join(out, "done")):
        return
    os.makedirs(out, exist_ok=True)
    for use, domain in (("train", "python"), ("score", "postgres")):
        with (
            open(os.path.join(text, domain + ".jsonl"), encoding="utf-8") as f,
            open(os.path.join(out, use + ".txt"), "w", encoding="utf-8") as g,
        ):
            g.writelines(json.loads(line)["text"] + "\n" for _, line in zip(range(400), f))
    documents = []
    for length in LENGTHS:
        for task in ("needle", "qa1"):
            samples = TRAINED // 5 if task == "needle" else TRAINED  # needles: of each of five depths
            path = os.path.join(out, "questions.jsonl")
            questions(path, task, length, samples, 1, os.path.join(out, "train.txt"))
            with open(path, encoding="utf-8") as f:
                for request in map(json.loads, f):
                    if request.get("choice") == request.get("gold"):
                        documents.append(request["context"] + request["continuation"])
            os.remove(path)
            questions(
                os.path.join(out, f"{task}_{length}.jsonl"),
                task,
                length,
                SCORED * (1 if task == "needle" else 5),
                2,
                os.path.join(out, "score.txt"),
            )
    random.Random(1).shuffle(documents)
    with open(os.path.join(out, "questions_documents.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": d}) + "\n" for d in documents)
    run("prepare.py", "text", os.path.join(out, "questions_documents.jsonl"), "--tokenizer", "bytes", "--name",
        "questions", "--out", os.path.join(out, "shards"))
    with open(os.path.join(out, "done"), "w", encoding="utf-8") as f:
        f.write("shards and questions are complete\n")


def answered(requests, answers):
    """The share of questions answered rightly: the likeliest choice, or where there are none a continuation that is
    greedy throughout. And the mean of the right answer's -log-probability, which tells more where few are right."""
    right, best, nats = {}, {}, []
    for request, answer in zip(map(json.loads, requests), map(json.loads, answers)):
        item, chosen = request["item"], request.get("choice")
        if chosen == request.get("gold"):
            nats.append(-answer["logprob"])
        if chosen is None:
            right[item] = answer["greedy"]
        elif item not in best or answer["logprob"] > best[item]:
            best[item] = answer["logprob"]
            right[item] = chosen == request["gold"]
    return sum(right.values()) / len(right), sum(nats) / len(nats)


def score(trainer, checkpoint, out):
    """{set: share right, set + " nats": mean nats of the right answer} of a checkpoint, for SETS."""
    found = {}
    for name in SETS:
        path = os.path.join(out, name + ".jsonl")
        command = [trainer, "--init-from", checkpoint, "--score", path, "--batch-size", "16"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        answers = subprocess.run(command, check=True, text=True, **pipes).stdout.splitlines()
        with open(path, encoding="utf-8") as f:
            requests = f.readlines()
        if len(requests) != len(answers):
            raise SystemExit(f"evidence.py: {path}: {len(requests)} requests, {len(answers)} answers")
        found[name], found[name + " nats"] = answered(requests, answers)
    return found
