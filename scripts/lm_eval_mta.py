#!/usr/bin/env python3
"""infer_mta as a model of EleutherAI's lm-evaluation-harness (pip install lm-eval):

    lm_eval_mta.py DIR --tasks lambada_openai,hellaswag,piqa [--limit N] [--weights int8]

or, from Python, `import lm_eval_mta` registers the model "mta" with arguments checkpoint=, infer=, weights=.
Requests go to one infer_mta --score process as JSON lines, sorted and cached there; a context and its continuation
are tokenized apart, after trailing blanks of the context have moved to the continuation, as the harness does it."""

import argparse
import json
import os
import subprocess
import sys
import threading

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))


def move_blanks(context, continuation):
    """Trailing blanks of the context belong to the first token of the continuation."""
    n = len(context) - len(context.rstrip())
    return (context[:-n], context[-n:] + continuation) if n else (context, continuation)


@register_model("mta")
class MtaLM(LM):
    """checkpoint: a directory; infer: the program; weights, threads: its options."""

    def __init__(
        self, checkpoint, infer=os.path.join(ROOT, "infer_mta"), weights="stored", threads=0, max_gen_toks=256, **unused
    ):
        super().__init__()
        self.command = [infer, checkpoint, "--weights", weights, "--threads", str(threads)]
        self.checkpoint, self.infer, self.max_gen_toks = checkpoint, infer, max_gen_toks
        with open(os.path.join(checkpoint, "config.json")) as f:
            config = json.load(f)
        self.positions = config.get("max_position_embeddings", 2048)

    def run(self, args, lines):
        """Lines in, lines out; writing in a thread, since both sides stream."""
        p = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")

        def write():
            try:
                p.stdin.writelines(line + "\n" for line in lines)
                p.stdin.close()
            except BrokenPipeError:
                pass  # its exit status tells

        writer = threading.Thread(target=write)
        writer.start()
        out = [line.rstrip("\n") for line in p.stdout]
        writer.join()
        p.stdout.close()
        if p.wait() or len(out) != len(lines):
            raise RuntimeError(
                "%s: exit status %d, %d answers to %d lines" % (" ".join(args), p.returncode, len(out), len(lines))
            )
        return out

    def score(self, requests):
        return [
            json.loads(x)
            for x in self.run(self.command + ["--score", "-", "--shift"], [json.dumps(r) for r in requests])
        ]

    def loglikelihood(self, requests, disable_tqdm=False):
        pairs = [move_blanks(*r.args) for r in requests]
        answers = self.score([{"context": a, "continuation": b} for a, b in pairs])
        return [(a["logprob"], a["greedy"]) for a in answers]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Texts cut into windows of the model's length, each token predicted once; the first window starts at BOS, a
        later one at the last token of the one before."""
        texts = [json.dumps({"text": r.args[0]}) for r in requests]
        ids = [list(map(int, x.split())) for x in self.run([self.infer, self.checkpoint, "--tokenize"], texts)]
        lines, owner = [], []
        for k, tokens in enumerate(ids):
            for start in range(0, len(tokens), self.positions):
                window = {"continuation_ids": tokens[start : start + self.positions]}
                window.update({"context_ids": [tokens[start - 1]]} if start else {"context": ""})
                lines.append(window)
                owner.append(k)
        sums = [0.0] * len(ids)
        for k, answer in zip(owner, self.score(lines)):
            sums[k] += answer["logprob"]
        return sums

    def generate_until(self, requests, disable_tqdm=False):
        out = []
        for r in requests:
            context, options = r.args[0], dict(r.args[1] or {})
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            count = int(options.get("max_gen_toks", self.max_gen_toks))
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", False) else 0.0
            command = self.command + [
                "--max-tokens",
                str(count),
                "--temperature",
                str(temperature),
                "--quiet",
                "--shift",
            ]
            text = subprocess.run(command, input=context.encode(), stdout=subprocess.PIPE, check=True).stdout.decode(
                "utf-8", "replace"
            )
            text = text[:-1]  # the newline that ends the answer
            ends = [text.index(u) for u in until if u and u in text]
            out.append(text[: min(ends)] if ends else text)
        return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="DIR")
    parser.add_argument("--tasks", required=True, help="names, comma separated")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--weights", default="stored", choices=["stored", "f32", "bf16", "int8"])
    parser.add_argument("--infer", default=os.path.join(ROOT, "infer_mta"))
    args = parser.parse_args()
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=MtaLM(args.checkpoint, infer=args.infer, weights=args.weights),
        tasks=args.tasks.split(","),
        limit=args.limit,
        num_fewshot=args.num_fewshot,
    )
    json.dump(results["results"], sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
