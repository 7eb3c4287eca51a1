"""Seconds of one optimizer step in PyTorch on this CPU, at the shapes of cpu_step.c, as its users would write it:
torch_step.py ATTENTION fp32|bf16 [T] [REPEATS] [SECONDS]; one line of JSON.

The model of torch_gpu.py (scaled dot product attention for `transformer`, the dense definition otherwise), each block
and the loss compiled by torch.compile, fused AdamW, weights in fp32, with bf16 autocast for bf16. The best of REPEATS
steps, or of those that fit into SECONDS, after two that compile.
"""
import contextlib
import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import torch_gpu as G

G.C, G.L, G.NH, G.FF, G.V, G.HS = 384, 6, 6, 1024, 8192, 64


def main(kind, precision, T=1024, repeats=5, limit=60):
    """Prints the best step."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))  # Debian's build starts with one
    torch.manual_seed(1)
    B, device = 2, torch.device("cpu")
    # 2: one with a convolution
    blocks = nn.ModuleList(G.Block(kind, 2 if layer % 2 else 0, device).float() for layer in range(G.L))
    embed, norm = nn.Parameter(torch.randn(G.V, G.C) * G.C ** -0.5), nn.Parameter(torch.ones(G.C))
    optimizer = torch.optim.AdamW([*blocks.parameters(), embed, norm], lr=1e-5, betas=(0.9, 0.98), fused=True)
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, G.HS // 2) * 2 / G.HS)
    cosine, sine = angles.cos(), angles.sin()
    compiled = [torch.compile(b, dynamic=False) for b in blocks]
    tokens, targets = torch.randint(0, G.V, (B, T)), torch.randint(0, G.V, (B, T))
    cast = (lambda: torch.autocast("cpu", torch.bfloat16)) if precision == "bf16" else contextlib.nullcontext
    head = torch.compile(lambda x: F.cross_entropy(F.linear(F.rms_norm(x, (G.C,), norm, 1e-5),
                                                            embed).float().flatten(0, 1), targets.flatten()),
                         dynamic=False)
    best, began = float("inf"), time.perf_counter()
    for step in range(repeats + 2):
        start = time.perf_counter()
        with cast():
            x = F.embedding(tokens, embed)
            for b in compiled:
                x = b(x, cosine, sine)
            loss = head(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*blocks.parameters(), embed, norm], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 2:
            best = min(best, time.perf_counter() - start)
            if time.perf_counter() - began > limit:
                break
    print(json.dumps({"torch": torch.__version__, "attention": kind, "matmul": precision, "T": T,
                      "best_step_s": round(best, 4),
                      "threads": torch.get_num_threads(), "loss": round(loss.item(), 4)}))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: torch_step.py transformer|mta|mta-full fp32|bf16 [T] [REPEATS] [SECONDS]")
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
