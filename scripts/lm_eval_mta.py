#!/usr/bin/env python3
"""infer_mta as a model of EleutherAI's lm-evaluation-harness (pip install lm-eval):

    lm_eval_mta.py DIR --tasks lambada_openai,hellaswag,piqa [any flag of "lm_eval": --limit, --num_fewshot, ...]
    lm_eval_mta.py DIR --weights int8 --tasks wikitext --output_path results --log_samples
    lm_eval_mta.py DIR --trainer ./train_mta_cuda --batch_size 16 --tasks hellaswag       scores on the trainer's device

or, from Python, `import lm_eval_mta` registers the model "mta" with arguments checkpoint=, infer=, weights=, threads=,
trainer=. One program --score and one infer_mta --prompts answer all requests as JSON lines: the weights are read once.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:  # --help works without the harness; main() says what is missing
    LM, register_model = object, lambda name: lambda model: model

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
WEIGHTS = ["stored", "f32", "bf16", "int8"]
NOT_STORED = "--weights %s: a trainer scores with the weights as they are stored"


NO_PROGRAM = "%s: no program; make %s"


class Failed(RuntimeError):
    """A program that is not there, or that ended before it had answered."""


class Program:
    """A program that answers each line with a line; it ends when its input does."""

    def __init__(self, args):
        self.args = args
        if not shutil.which(args[0]):  # beside a trainer infer_mta is wanted by some tasks alone
            raise Failed(NO_PROGRAM % (args[0], os.path.basename(args[0])))
        self.process = subprocess.Popen(
            args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def ask(self, lines, last):
        """The answers to `lines`, written by a thread, since both sides stream. last: the input ends with them."""

        def write():
            try:
                self.process.stdin.writelines(line + "\n" for line in lines)
                self.process.stdin.close() if last else self.process.stdin.flush()
            except BrokenPipeError:
                pass  # the missing answers tell

        writer = threading.Thread(target=write)
        writer.start()
        answers = []
        while len(answers) < len(lines):
            answer = self.process.stdout.readline()
            if not answer:
                break
            answers.append(answer.rstrip("\n"))
        writer.join()
        if len(answers) < len(lines) or (last and self.process.wait()):
            status = "exit status %d, %d answers to %d lines" % (self.process.wait(), len(answers), len(lines))
            raise Failed("%s: %s" % (" ".join(self.args), status))
        return answers

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def rolling_windows(ids, positions):
    """[(context, continuation)] of a text's ids, each predicted once. The first window has no context but BOS, the
    others end where they end and reach back as far as the model's positions do, so that the last one has a whole
    context too."""
    windows = [([], ids[:positions])] if ids else []
    for start in range(positions, len(ids), positions):
        end = min(start + positions, len(ids))
        windows.append((ids[end - positions - 1 : start], ids[start:end]))
    return windows


COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts


def generation_request(context, options, count):
    """A line for infer_mta --prompts. What the harness asks for and infer_mta cannot do is refused by name."""
    counts = [options.pop(name, None) for name in COUNTS]
    until, sample = options.pop("until", None) or [], options.pop("do_sample", None)
    temperature = options.pop("temperature", 1.0 if sample else 0.0)
    request = {
        "prompt": context,
        "until": [until] if isinstance(until, str) else until,
        "max_tokens": int(next((c for c in counts if c is not None), count)),
        "temperature": 0.0 if sample is False else float(temperature),
        "top_k": int(options.pop("top_k", 0)),
        "top_p": float(options.pop("top_p", 1.0)),
    }
    others = {k: v for k, v in options.items() if (k, v) not in (("num_beams", 1), ("repetition_penalty", 1.0))}
    if others:
        raise ValueError("generation options that infer_mta does not have: %s" % ", ".join(sorted(others)))
    return request


def config_file(checkpoint):
    """Of a checkpoint, or of the newest one in a run's folder that has one, as infer_mta looks for it."""
    path = os.path.join(checkpoint, "config.json")
    if os.path.exists(path):
        return path
    names = [name for name in os.listdir(checkpoint) if re.fullmatch(r"step-(?!0\d{8})\d{8,18}", name)]
    files = [os.path.join(checkpoint, name, "config.json") for name in sorted(names, key=lambda name: int(name[5:]))]
    return next(filter(os.path.exists, reversed(files)), path)


@register_model("mta")
class MtaLM(LM):
    """checkpoint: a directory; infer: the program; weights, threads: its options. trainer: train_mta or train_mta_cuda,
    which then scores in its place, batch_size requests of the model's context at once, or more shorter ones. The
    harness gives max_batch_size and device to every model, "cuda:0" by itself: they say nothing here, nor does path,
    after which it names the folder of --output_path; without it that name is random."""

    def __init__(self, checkpoint, infer=os.path.join(ROOT, "infer_mta"), weights="stored", threads=0, max_gen_toks=256,
                 trainer=None, batch_size=None, max_batch_size=None, device=None, path=None):
        super().__init__()
        if trainer and weights != "stored":
            raise ValueError(NOT_STORED % weights)
        self.trainer_command = [trainer, "--init-from", str(checkpoint)] if trainer else None
        if trainer and str(batch_size or "").isdigit():
            self.trainer_command += ["--batch-size", str(batch_size)]
        self.command = [infer, str(checkpoint), "--weights", weights, "--threads", str(threads)]
        self.checkpoint, self.infer, self.max_gen_toks = str(checkpoint), infer, max_gen_toks
        self.scorer = self.generator = None  # the Programs that score and generate, from the first request on
        with open(config_file(checkpoint), encoding="utf-8") as f:
            config = json.load(f)
        self.positions = config.get("max_position_embeddings", 2048)

    def close(self):
        for program in filter(None, (self.scorer, self.generator)):
            program.close()
        self.scorer = self.generator = None

    def run(self, args, lines):
        """The answers of a program of its own to `lines`."""
        program = Program(args)
        answers = program.ask(lines, last=True)
        program.close()
        return answers

    def score(self, requests):
        """The answers of a program with --score, which stays and waits for the next requests."""
        if not self.scorer:
            self.scorer = Program((self.trainer_command or self.command) + ["--score", "-", "--shift"])
        return [json.loads(x) for x in self.scorer.ask([json.dumps(r) for r in requests], last=False)]

    def loglikelihood(self, requests, disable_tqdm=False):
        """The program cuts the texts into tokens of context and continuation as the harness does it (mta/score.h)."""
        answers = self.score([{"context": r.args[0], "continuation": r.args[1]} for r in requests])
        return [(a["logprob"], a["greedy"]) for a in answers]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        texts = [json.dumps({"text": r.args[0]}) for r in requests]
        lines, owner = [], []
        for k, ids in enumerate(self.run([self.infer, self.checkpoint, "--tokenize"], texts)):
            for context, continuation in rolling_windows([int(x) for x in ids.split()], self.positions):
                start = {"context_ids": context} if context else {"context": ""}
                lines.append(dict(start, continuation_ids=continuation))
                owner.append(k)
        sums = [0.0] * len(texts)
        for k, answer in zip(owner, self.score(lines)):
            sums[k] += answer["logprob"]
        return sums

    def generate_until(self, requests, disable_tqdm=False):
        """The answers of infer_mta --prompts, which stays as score's program does. A context that leaves no room for
        the answer loses its earliest tokens."""
        if not self.generator:
            self.generator = Program(self.command + ["--prompts", "-", "--shift"])
        lines = [json.dumps(generation_request(r.args[0], dict(r.args[1] or {}), self.max_gen_toks)) for r in requests]
        return [json.loads(x)["text"] for x in self.generator.ask(lines, last=False)]


def main():
    sys.path.insert(0, os.path.join(ROOT, "data"))  # here: what imports this module keeps its path as it is
    from options import Parser, whole_number

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="All other flags are the harness's own: see `lm_eval run --help`, in older versions "
                           "`lm_eval --help`.")
    parser.add_argument("checkpoint", metavar="DIR")
    parser.add_argument("--weights", default="stored", choices=WEIGHTS)
    parser.add_argument("--threads", type=whole_number(0), default=0, metavar="N", help="0: all cores")
    parser.add_argument("--infer", default=os.path.join(ROOT, "infer_mta"), metavar="PROGRAM")
    parser.add_argument("--trainer", metavar="PROGRAM",
                        help="train_mta or train_mta_cuda: scores in place of infer_mta")
    args, others = parser.parse_known_args()
    if args.trainer and args.weights != "stored":
        parser.error(NOT_STORED % args.weights)
    try:
        with open(config_file(args.checkpoint), encoding="utf-8"):
            pass
    except OSError as e:
        sys.exit("lm_eval_mta.py: %s: %s; wanted a checkpoint, or a run with one" % (e.filename, e.strerror))
    needed = args.trainer or args.infer
    if not shutil.which(needed):
        sys.exit("lm_eval_mta.py: " + NO_PROGRAM % (needed, os.path.basename(needed)))
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as e:
        sys.exit("lm_eval_mta.py: %s; install the harness: pip install lm-eval" % e)
    given = json.dumps(dict(vars(args), path=args.checkpoint))
    sys.argv = ["lm_eval", "--model", "mta", "--model_args", given, *others]
    try:
        cli_evaluate()
    except Failed as e:
        sys.exit("lm_eval_mta.py: %s" % e)


if __name__ == "__main__":
    main()
