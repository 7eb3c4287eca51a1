"""Seconds of one step of the dense PyTorch reference at the shapes of cpu_step.c: torch_step.py ATTENTION [T] [REPEATS]; one line of JSON.

Forward, loss and backward of dev/ref/mta_ref.py in float32 on all cores. No optimizer update is counted, in its favour."""
import json
import os
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "ref"))
import mta_ref as R  # noqa: E402

KINDS = {
    "transformer": {},
    "mta": dict(kq_conv_layers=[1, 3, 5], head_mix_post_softmax=2, head_norm="group_depth_scaled"),
    "mta-full": dict(kq_conv_layers=[1, 3, 5], kq_conv_post_softmax=True, head_mix_pre_softmax=6, head_mix_post_softmax=6,
                     head_norm="group", head_gate=True),
}


def main(kind, T=1024, repeats=2):
    """Prints the best of `repeats` steps."""
    torch.set_num_threads(os.cpu_count())  # Debian's build starts with one
    c = R.make_config(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
                      num_key_value_heads=6, max_position_embeddings=T, **KINDS[kind])
    w = R.random_weights(c, 1)
    x, y = torch.randint(0, 8192, (2, T)), torch.randint(0, 8192, (2, T))
    best = float("inf")
    for _ in range(repeats):
        t = time.perf_counter()
        R.loss_and_grads(x, y, w, c)
        best = min(best, time.perf_counter() - t)
    print(json.dumps({"attention": kind, "T": T, "step_s": round(best, 4), "torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]))
