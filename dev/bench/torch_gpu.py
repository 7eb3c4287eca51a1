#!/usr/bin/env python3
"""Speed of the same model in PyTorch on this GPU: torch_gpu.py ATTENTION [T] [B] [SECONDS]; one line for a table,
printed anew after every timed step: the last one counts, also where a limit of time ends the program.

The 880m model of train_mta, bf16 autocast weights, fused AdamW, each block compiled by torch.compile. `transformer`
uses PyTorch's scaled dot product attention; `mta` and `mta-full` are the dense definition, every T x T matrix in
memory, since nothing better is to be had there.
B is halved until it fits. Exit status 2 where there is no PyTorch or no GPU.
"""
import math
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    print("PyTorch: not here")
    sys.exit(2)

C, L, NH, FF, V, CQ, CK = 1536, 24, 16, 4096, 128256, 6, 11
HS = C // NH


def conv(x, weight, causal):
    """Key-query convolution of scores x (B,NH,T,T), masked before and not after."""
    x = torch.where(causal, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return F.conv2d(F.pad(x, (CK // 2, CK // 2, CQ - 1, 0)), weight[:, None], groups=NH)


def mix(x, weight):
    """Head mixing within groups, weight (groups, out, in)."""
    groups, heads, _ = weight.shape
    B, _, T, _ = x.shape
    return torch.einsum("gon,bgnij->bgoij", weight, x.view(B, groups, heads, T, T)).reshape(B, NH, T, T)


class Block(nn.Module):
    """One layer."""

    def __init__(self, kind, layer, device):
        super().__init__()
        parameter = lambda *shape: nn.Parameter(torch.randn(shape, device=device, dtype=torch.bfloat16) * C ** -0.5)
        self.kind = kind
        # a tensor, not a number: torch.compile would compile every layer anew for a number of its own
        self.register_buffer("scale", torch.tensor(1 - (0.8 - 0.6 * math.exp(-0.3 * layer)), device=device,
                                                   dtype=torch.bfloat16))
        self.qkv, self.o, self.gate_up, self.down = parameter(3 * C,
                                                              C), parameter(C,
                                                                            C), parameter(2 * FF, C), parameter(C, FF)
        self.norm1 = nn.Parameter(torch.ones(C, device=device, dtype=torch.bfloat16))
        self.norm2 = nn.Parameter(torch.ones(C, device=device, dtype=torch.bfloat16))
        self.convolved = kind != "transformer" and layer % 4 == 2
        full = kind == "mta-full"
        if self.convolved:
            self.conv_pre = parameter(NH, CQ, CK)
            if full:
                self.conv_post = parameter(NH, CQ, CK)
        if full:
            self.mix_pre, self.gate, self.bias = parameter(1, NH, NH), parameter(HS), parameter(1)
        if kind != "transformer":
            self.mix_post = parameter(1, NH, NH) if full else parameter(NH // 2, 2, 2)
            self.head_norm = nn.Parameter(torch.ones(HS, device=device, dtype=torch.bfloat16))

    def scores(self, q, k, v):
        """Dense Multi-Token Attention."""
        T = q.shape[2]
        causal = torch.tril(torch.ones(T, T, dtype=torch.bool, device=q.device))
        full = self.kind == "mta-full"
        s = q @ k.transpose(2, 3) / math.sqrt(HS)
        if self.convolved:
            s = conv(s, self.conv_pre, causal)
        if full:
            s = mix(s, self.mix_pre)
        p = torch.softmax(s.float().masked_fill(~causal, -math.inf), -1).to(q.dtype)
        if full and self.convolved:
            p = torch.where(causal, conv(p, self.conv_post, causal), torch.zeros((), dtype=p.dtype, device=p.device))
        o = F.rms_norm(mix(p, self.mix_post) @ v, (HS,), self.head_norm, 1e-5)
        if full:
            return o * torch.sigmoid((o * self.gate).sum(-1, keepdim=True) + self.bias)
        return o * self.scale

    def forward(self, x, cosine, sine):
        B, T, _ = x.shape
        q, k, v = F.linear(F.rms_norm(x, (C,), self.norm1, 1e-5), self.qkv).view(B, T, 3, NH, HS).permute(2, 0, 3, 1, 4)
        rotate = lambda a: torch.cat((a[..., : HS // 2] * cosine - a[..., HS // 2:] * sine,
                                      a[..., HS // 2:] * cosine + a[..., : HS // 2] * sine), -1)
        q, k = rotate(q), rotate(k)
        o = F.scaled_dot_product_attention(q, k, v,
                                           is_causal=True) if self.kind == "transformer" else self.scores(q, k, v)
        x = x + F.linear(o.transpose(1, 2).reshape(B, T, C), self.o)
        gate, up = F.linear(F.rms_norm(x, (C,), self.norm2, 1e-5), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


def measure(kind, T, B, limit):
    """Steps within `limit` seconds; after each, the row of the best one."""
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()  # of a larger micro-batch that did not fit
    torch.manual_seed(1)
    blocks = nn.ModuleList(Block(kind, layer, device) for layer in range(L))
    embed = nn.Parameter(torch.randn(V, C, device=device, dtype=torch.bfloat16) * C ** -0.5)
    norm = nn.Parameter(torch.ones(C, device=device, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([*blocks.parameters(), embed, norm], lr=1e-5, betas=(0.9, 0.98), fused=True)
    angles = torch.arange(T, device=device)[:, None] * 100000.0 ** (-torch.arange(0, HS // 2, device=device) * 2 / HS)
    cosine, sine = angles.cos().bfloat16(), angles.sin().bfloat16()
    compiled = [torch.compile(b, dynamic=False) for b in blocks]
    tokens = torch.randint(0, V, (B, T), device=device)
    best, start, steps = math.inf, time.perf_counter(), 0
    while steps < 3 or (time.perf_counter() - start < limit and steps < 8):
        began = time.perf_counter()
        x = F.embedding(tokens, embed)
        for b in compiled:
            x = b(x, cosine, sine)
        loss = F.cross_entropy(F.linear(F.rms_norm(x, (C,), norm, 1e-5), embed).float().flatten(0, 1), tokens.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_([*blocks.parameters(), embed, norm], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if steps == 0:
            start = time.perf_counter()  # the first step compiles
        else:
            best = min(best, time.perf_counter() - began)
            memory = torch.cuda.max_memory_allocated() / 2 ** 20
            print(f"{kind:<14s} T {T:<5d} B {B:<3d} {B * T / best:9.0f} tokens/s  {memory:8.0f} MiB  loss "
                  f"{loss.item():.3f}  PyTorch {torch.__version__}", flush=True)
        steps += 1


def main(kind, T=2048, B=4, limit=30):
    """Rows of the largest micro-batch up to B that fits."""
    if not torch.cuda.is_available():
        print("PyTorch: no GPU")
        sys.exit(2)
    fits = False
    while not fits:
        try:
            measure(kind, T, B, limit)
            fits = True
        except torch.cuda.OutOfMemoryError:
            pass
        if not fits:  # outside of the exception, which holds all tensors of the step
            if B == 1:
                print(f"PyTorch {kind}: not even one sequence of {T} fits")
                sys.exit(1)
            B //= 2
            torch.cuda.empty_cache()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("transformer", "mta", "mta-full"):
        sys.exit("usage: torch_gpu.py transformer|mta|mta-full [T] [B] [SECONDS]")
    main(sys.argv[1], *map(int, sys.argv[2:5]))
