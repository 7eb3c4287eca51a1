"""Writes golden cases: make_golden.py OUTDIR SEED CASE... ; or checks that a folder's cases are what this reference
computes: make_golden.py --check DIR. A case file is a safetensors file with
__metadata__ {"format": "mta-golden", "version": "1", "config": JSON}, the model's weights under their checkpoint names
(F32), golden.tokens I32 [B,T], golden.targets I32 [B,T] (-100 = ignored), golden.logits F32 [B,T,V], golden.loss F32
[1], grad.NAME F32.
Computed in float64 from the float32 weights. Those of dev/golden are of seed 1; short, one_token and tall_kernel of
seed 7."""
import glob, json, os, sys

import numpy as np
import torch

import mta_ref as R

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))
from helpers import read_safetensors, worst  # noqa: E402

S = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
         vocab_size=61)
CASES = {
    "mha":            (2, 24, dict()),
    "paper":          (2, 37, dict(kq_conv_layers=[1], head_mix_post_softmax=2, head_norm="group_depth_scaled")),
    "paper_every":    (1, 50, dict(kq_conv_layers=[0, 1], head_mix_post_softmax=2, head_norm="group_depth_scaled",
                                   rope_theta=500000.0)),
    "full":           (2, 29, dict(kq_conv_layers=[0], kq_conv_post_softmax=True, head_mix_pre_softmax=4,
                                   head_mix_post_softmax=4, head_norm="group", head_gate=True)),
    "post_only":      (1, 33, dict(kq_conv_layers=[0, 1], kq_conv_pre_softmax=False, kq_conv_post_softmax=True,
                                   head_mix_pre_softmax=2)),
    "toy":            (3, 40, dict(kq_conv_layers=[0, 1], kq_conv_query_size=2, kq_conv_key_size=9,
                                   num_attention_heads=2, num_key_value_heads=2)),
    "talking_heads":  (2, 21, dict(head_mix_pre_softmax=4, head_mix_post_softmax=4)),
    "diff":           (2, 26, dict(attention_type="diff", head_norm="group_depth_scaled")),
    "gqa":            (2, 31, dict(num_key_value_heads=2, kq_conv_layers=[0], head_mix_post_softmax=2,
                                   head_norm="group", tie_word_embeddings=False)),
    "short":          (2, 3, dict(kq_conv_layers=[0, 1], head_mix_post_softmax=4, head_gate=True)),
    "one_token":      (1, 1, dict(kq_conv_layers=[0, 1], head_mix_post_softmax=2)),
    "tall_kernel":    (1, 45, dict(kq_conv_layers=[0, 1], kq_conv_query_size=9, kq_conv_key_size=3)),
}

def write(out, seed, names):
    unknown = [n for n in names if n not in CASES]
    if unknown: raise SystemExit(f"make_golden.py: {unknown[0]}: no such case, wanted one of {', '.join(CASES)}")
    os.makedirs(out, exist_ok=True)
    for n in names or CASES:
        B, T, kw = CASES[n]
        c = R.make_config(**{**S, **kw}); c["max_position_embeddings"] = 64
        k = seed * 1000 + list(CASES).index(n)
        w = R.random_weights(c, k); g = torch.Generator().manual_seed(k + 500)
        x, y = (torch.randint(0, c["vocab_size"], (B, T), generator=g) for _ in range(2))
        if T > 5: y[0, 2:5] = -100
        logits, loss, grads = R.loss_and_grads(x, y, {a: b.double() for a, b in w.items()}, c)
        t = dict(w)
        t.update({"golden.tokens": x.int(), "golden.targets": y.int()})
        t.update({"golden.logits": logits.float(), "golden.loss": loss.float().view(1)})
        t.update({"grad." + a: b.float() for a, b in grads.items()})
        R.save_safetensors(f"{out}/{n}.safetensors", t, dict(format="mta-golden", version="1", config=json.dumps(c)))
        print(n, "loss %.6f" % loss.item(), "min max|grad| %.2e" % min(b.abs().max().item() for b in grads.values()),
              os.path.getsize(f"{out}/{n}.safetensors"))

def read_case(path):
    """Tensors of a golden case as float64 or int64 torch tensors, and its configuration; a field that is newer than the
    case is off. What else config.json has stands in cases that test_mta --write wrote."""
    tensors, metadata = read_safetensors(path)
    config = {key: value for key, value in json.loads(metadata["config"]).items() if key in R.DEFAULTS}
    read = {"F32": (np.float32, np.float64), "I32": (np.int32, np.int64)}
    return {n: torch.from_numpy(np.frombuffer(data, read[dtype][0]).reshape(shape).astype(read[dtype][1]))
            for n, (dtype, shape, data) in tensors.items()}, R.make_config(**config)


def check(folder):
    """Recomputes every case of a folder from its weights; a logit, loss or gradient further off than fp32 rounding
    fails."""
    passed = failed = 0
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        t, c = read_case(path)
        w = {n: x for n, x in t.items() if not n.startswith(("golden.", "grad."))}
        logits, loss, grads = R.loss_and_grads(t["golden.tokens"], t["golden.targets"], w, c)
        got = {"golden.logits": logits, "golden.loss": loss.view(1), **{"grad." + n: g for n, g in grads.items()}}
        error = worst(((x - t[n]).abs().max() / (1e-7 * t[n].abs().max() + 1e-12)).item() for n, x in got.items())
        good = error <= 1 and set(got) == {n for n in t if n.startswith("grad.")
                                           or n in ("golden.logits", "golden.loss")}
        print("ok  " if good else "FAIL", os.path.basename(path), "error / fp32 rounding %.3f" % error)
        passed, failed = passed + good, failed + (not good)
    print(f"{passed} passed, {failed} failed")
    return failed == 0 and passed > 0


def main():
    arguments = sys.argv[1:]
    if len(arguments) == 2 and arguments[0] == "--check":
        return 0 if check(arguments[1]) else 1
    if len(arguments) < 2 or arguments[0].startswith("-") or not arguments[1].isdecimal():
        raise SystemExit(__doc__)
    write(arguments[0], int(arguments[1]), arguments[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
