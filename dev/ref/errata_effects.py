#!/usr/bin/env python3
"""Measures what the differences of dev/ERRATA.md do to small models: errata_effects.py toy|text [--seeds N] [--steps N]
[--text DIR]

The same model, weights, data and order, trained in PyTorch by dev/ref/mta_ref.py with one detail of the attention
exchanged:

    ours            the definition of dev/MODEL.md: row i-u of the convolution's input is masked by its own query i-u
    reader_mask     the paper's equation: every row is masked by the query i that reads it
    double_softmax  the released code of June 2025 where nothing follows the softmax: the softmax of the softmax (toy
                    alone, whose models are such)

toy: the quickstart's task and model (N 4, 8 blocks, first letter; 2 layers of 64 channels), error in % of 1000
sequences. text: 4 layers of 128 channels, bytes, sequences of 128, 8 a step, loss on the held-out parts of the domains
of scripts/evidence_text.py. Prints one JSON line a run. float32, one thread.
"""
import argparse
import glob
import json
import math
import os
import sys
import time

try:
    import mta_ref
    import numpy
    import torch
    import torch.nn.functional as F
except ImportError as error:
    raise SystemExit(f"errata_effects.py: {error}; dev/.venv has it (scripts/test.sh makes it)") from None

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "data"))


def masked_by_reader(s, weight, causal):
    """The convolution of equation 4 with keys masked by the query that reads them: one row of the kernel at a time."""
    NH, cq, ck = weight.shape
    out, T = 0, s.shape[-1]
    for a in range(cq):
        above = cq - 1 - a
        rows = torch.where(causal, F.pad(s, (0, 0, above, 0))[:, :, :T], torch.zeros((), dtype=s.dtype))
        out = out + F.conv2d(F.pad(rows, (ck // 2, ck // 2)), weight[:, None, a:a + 1], groups=NH)
    return out


def reader_mask(q, k, v, **weights):
    kept = mta_ref.kq_convolution
    mta_ref.kq_convolution = masked_by_reader
    try:
        return mta_ref.multi_token_attention(q, k, v, **weights)
    finally:
        mta_ref.kq_convolution = kept


def double_softmax(q, k, v, kq_conv):
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    s = mta_ref.kq_convolution(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), kq_conv, causal)
    a = s.masked_fill(~causal, -math.inf).softmax(-1)
    return a.masked_fill(~causal, -math.inf).softmax(-1) @ v


ATTENTIONS = {"ours": mta_ref.multi_token_attention, "reader_mask": reader_mask, "double_softmax": double_softmax}


def toy_batches(seed):
    """Endless batches of the quickstart's toy task: tokens and targets, -100 where none counts; and 1000 sequences
    apart."""
    import toy_task as toy

    task = toy.Task(4, 2, "first", 8)

    def tensors(pairs):
        rows = [toy.finish(task, *pair) for pair in pairs]
        tokens, masks = (torch.tensor([list(row[i]) for row in rows]) for i in (0, 1))
        return tokens[:, :-1], torch.where(masks[:, 1:] > 0, tokens[:, 1:], -100)

    test = toy.take(task, toy.chunk_rng(task, seed, "val", 0), 1000, set(), True)
    source = toy.draw_sequences(task, toy.chunk_rng(task, seed, "train", 0))
    return (tensors([next(source) for _ in range(64)]) for _ in iter(int, 1)), tensors(test)


def text_batches(seed, folder, T=128, B=8):
    """Endless batches of windows drawn from all domains alike, and 40 windows of each domain's held-out part."""
    from shards import Shard

    def read(path):
        return numpy.concatenate([numpy.array(numbers) for _, numbers in Shard(path).chunks()]).astype(numpy.int64)

    paths = sorted(glob.glob(os.path.join(folder, "*_train_000000.bin")))
    if not paths:
        raise SystemExit(f"errata_effects.py: {folder}: no *_train_000000.bin; scripts/evidence_text.py --out makes "
                         f"them")
    train, test = [read(p) for p in paths], [read(p.replace("_train_", "_val_")) for p in paths]
    rng = numpy.random.default_rng(seed)

    def batch():
        windows = []
        for _ in range(B):
            tokens = train[rng.integers(len(train))]
            start = rng.integers(len(tokens) - T - 1)
            windows.append(tokens[start:start + T + 1])
        windows = torch.from_numpy(numpy.stack(windows))
        return windows[:, :-1], windows[:, 1:]

    held = torch.from_numpy(numpy.stack([tokens[i * (T + 1):(i + 1) * (T + 1)] for tokens in test for i in range(40)]))
    return (batch() for _ in iter(int, 1)), (held[:, :-1], held[:, 1:])


def configuration(task):
    if task == "toy":
        return mta_ref.make_config(vocab_size=32, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
                                   num_attention_heads=2, num_key_value_heads=2,
                                   kq_conv_layers=[0, 1], kq_conv_query_size=2, kq_conv_key_size=7, rope_theta=1e5)
    return mta_ref.make_config(vocab_size=259, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                               num_attention_heads=4, num_key_value_heads=4,
                               kq_conv_layers=[1, 3], head_mix_post_softmax=2, head_norm="group_depth_scaled")


def initial_weights(config, seed):
    """As dev/MODEL.md, Initialisation; but what is beyond 3 sigma (0.3% of the weights) is taken modulo that."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in mta_ref.names_and_shapes(config):
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif "kq_conv" in name:
            weights[name] = torch.zeros(shape)
            weights[name][:, -1, shape[2] // 2] = 1
        elif "head_mix" in name:
            weights[name] = torch.eye(shape[1]).expand(shape).clone()
        else:
            std = shape[-1]**-0.5 if "down_proj" in name else config["hidden_size"]**-0.5
            weights[name] = std * torch.fmod(torch.randn(shape, generator=generator), 3)
    return {n: w.requires_grad_(True) for n, w in weights.items()}


def train(task, attention, seed, steps, folder):
    """One run; its line."""
    config = configuration(task)
    weights = initial_weights(config, seed)
    batches, (held, wanted) = toy_batches(seed) if task == "toy" else text_batches(seed, folder)
    optimizer = torch.optim.AdamW(weights.values(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0)
    began = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 50, (steps - step) / (0.5 * steps), 1)
        tokens, targets = next(batches)
        loss = F.cross_entropy(mta_ref.forward(tokens, weights, config, ATTENTIONS[attention]).flatten(0, 1),
                               targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
    with torch.no_grad():
        logits = torch.cat([mta_ref.forward(part, weights, config, ATTENTIONS[attention]) for part in held.split(20)])
        result = {"loss": F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).item()}
        if task == "toy":
            result["error"] = 1 - ((logits.argmax(-1) == wanted) | (wanted < 0)).all(1).float().mean().item()
    return {"task": task, "attention": attention, "seed": seed, "steps": steps,
            **{n: round(v, 5) for n, v in result.items()}, "seconds": round(time.time() - began)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("task", choices=("toy", "text"))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many, from 1; default 3")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="default 600")
    parser.add_argument("--text", default=os.path.join(ROOT, "runs", "evidence", "text"), metavar="DIR",
                        help="what scripts/evidence_text.py has made; default runs/evidence/text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(1, options.seeds + 1):
        for attention in ATTENTIONS if options.task == "toy" else ("ours", "reader_mask"):
            print(json.dumps(train(options.task, attention, seed, options.steps, options.text)), flush=True)


if __name__ == "__main__":
    main()
