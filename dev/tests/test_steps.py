"""Whole runs of train_mta on random tiny models against dev/ref in float64: every step from what the checkpoint before
it holds (learning rate, loss, norm, m, v, weights), and the evaluations of every checkpoint. --long: more models."""
import json
import math
import os
import random
import subprocess
import sys

from helpers import BIN, ROOT, Folder, floats, main, read_safetensors, without_torch, write_shard, zip_all

sys.path.insert(0, os.path.join(ROOT, "dev", "ref"))
try:
    import torch
    import mta_ref
except ImportError as error:
    torch = None
    WITHOUT_TORCH = without_torch(error)

LONG = "--long" in sys.argv
sys.argv = [a for a in sys.argv if a != "--long"]
MODELS = 60 if LONG else 12
# The kernels that go with the lengths T of a sequence below: of one row or one key, as large as can be, higher and
# wider than T is long, over more queries than attention computes at once (128).
KERNELS = [(1, 1), (6, 11), (63, 1), (2, 63), (7, 5), (63, 63), (13, 3), (5, 1)]
LENGTHS = [1, 17, 33, 40, 3, 5, 66, 130]
GRADIENT = 1e-4  # of the largest of its tensor: fp32 through all layers
CANCELLED = 1e-7  # of the norm: of sums that are small beside what they add
STORED = 1e-6  # a few roundings of what stands in a checkpoint


def random_model(rng, number):
    """A configuration in which every field has a value at random, and a length T."""
    (cq, ck), T = KERNELS[number % len(KERNELS)], LENGTHS[number % len(LENGTHS)]
    diff, layers = number % 5 == 4, rng.choice([1, 2, 3])
    heads = rng.choice([2, 4, 6]) if diff else rng.choice([1, 2, 3]) if cq * ck > 1000 else rng.choice([1, 2, 3, 4, 8])
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    config = dict(
        num_attention_heads=heads, num_key_value_heads=rng.choice(divisors), hidden_size=heads * rng.choice([4, 6, 10]),
        num_hidden_layers=layers, intermediate_size=rng.choice([1, 2, 17]), vocab_size=rng.choice([1, 2, 3, 33, 97]),
        max_position_embeddings=T, rope_theta=rng.choice([0.5, 1.0, 1e4, 1e12]), rms_norm_eps=rng.choice([1e-6, 0.1]),
        tie_word_embeddings=rng.random() < 0.5, head_norm=rng.choice(["none", "group", "group_depth_scaled"]),
        kq_conv_query_size=cq, kq_conv_key_size=ck)
    if diff:
        return mta_ref.make_config(attention_type="diff", **config), T
    pre = rng.random() < 0.6
    return mta_ref.make_config(
        kq_conv_layers=sorted(rng.sample(range(layers), rng.randint(1, layers))), kq_conv_pre_softmax=pre,
        kq_conv_post_softmax=not pre or rng.random() < 0.5, head_mix_pre_softmax=rng.choice([0] + divisors),
        head_mix_post_softmax=rng.choice([0] + divisors), head_gate=rng.random() < 0.5, **config), T


def random_weights(config, seed):
    """Those of the reference, with kernels whose sums stay of the size of a score whatever their size."""
    weights = mta_ref.random_weights(config, seed)
    for name, w in weights.items():
        if "kq_conv" in name:
            identity = torch.zeros_like(w)
            identity[:, -1, (w.shape[2] - 1) // 2] = 1
            w.copy_(identity + (w - identity) * min(1, 8 / math.sqrt(w[0].numel())))
    return weights


def random_options(rng, windows):
    """What a step depends on. Most batches do not divide the step, nor the shards."""
    constant = rng.random() < 0.25
    lr = rng.choice([1e-4, 1e-2])
    return {"--batch-size": rng.randint(1, windows), "--shards": rng.randint(1, min(windows, 4)), "--steps": 3,
            "--lr": lr, "--schedule": "constant" if constant else rng.choice(["linear", "cosine", "wsd"]),
            "--min-lr": 0 if constant else rng.choice([0, lr / 8]), "--warmup": rng.choice([0, 1, 5]),
            "--beta1": rng.choice([0, 0.5, 0.9]), "--beta2": rng.choice([0.5, 0.98, 0.999]),
            "--eps": rng.choice([1e-8, 1e-3]), "--weight-decay": rng.choice([0, 0.05, 1]),
            "--grad-clip": rng.choice([0, 1e-2, 1]), "--seed": rng.choice([0, 7])}


def learning_rate(o, step):
    """Of the step after `step` of them."""
    if step < o["--warmup"]:
        return o["--lr"] * (step + 1) / o["--warmup"]
    p = min(1, (step - o["--warmup"]) / (o["--steps"] - o["--warmup"])) if o["--steps"] > o["--warmup"] else 1
    share = {"linear": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2, "wsd": min(1, (1 - p) / 0.2), "constant": 1}
    return o["--min-lr"] + (o["--lr"] - o["--min-lr"]) * share[o["--schedule"]]


def read_tensors(path):
    """{name: float64 tensor}"""
    return {name: torch.tensor(floats(data), dtype=torch.float64).view(shape)
            for name, (_, shape, data) in read_safetensors(path)[0].items()}


class Steps(Folder):
    def setUp(self):
        if torch is None:
            self.skipTest(WITHOUT_TORCH)
        super().setUp()
        torch.set_num_threads(1)

    def within(self, got, want, tolerance, what):
        """tolerance: a number, or one for each value. A NaN is outside."""
        self.assertTrue(bool(((got - want).abs() <= tolerance).all()),
                        "%s: off by %g" % (what, (got - want).abs().max()))

    def shard(self, rng, name, windows, T, vocab):
        """Writes one of random tokens; (tokens, targets) of its windows. In two of three some targets count, in some
        windows of those none."""
        n = windows * T + 1 + rng.randrange(T)
        ids, mask = [rng.randrange(vocab) for _ in range(n)], None
        if rng.random() < 2 / 3:
            mask = [int(rng.random() < 0.4 and t % (3 * T) >= T) for t in range(n)]
            mask[min(n - 1, 2 * T)] = 1
        write_shard(self.path(name), ids, vocab=vocab, width=rng.choice([2, 4]), mask=mask)
        targets = [t if mask is None or mask[i] else -100 for i, t in enumerate(ids)]
        inputs, targets = (torch.tensor(x).view(windows, T) for x in (ids[:windows * T], targets[1:windows * T + 1]))
        return inputs, targets, mask is not None

    def check_step(self, o, step, event, data, before, after):
        """before, after: the checkpoints' tensors. Each step takes all windows of the data, in whatever order."""
        config, (tokens, targets, _) = data
        weights = {n: t for n, t in before.items() if not n.startswith(("m.", "v."))}
        self.assertEqual(set(after), {p + n for n in weights for p in ("", "m.", "v.")})
        _, loss, gradients = mta_ref.loss_and_grads(tokens, targets, weights, config)
        norm = math.sqrt(sum(g.pow(2).sum().item() for g in gradients.values()))
        rate, clip = learning_rate(o, step - 1), min(1, o["--grad-clip"] / norm) if o["--grad-clip"] and norm else 1
        self.assertAlmostEqual(event["lr"], rate, delta=1e-12)
        self.assertAlmostEqual(event["loss"], loss.item(), delta=1e-5 * max(0.1, loss.item()))
        self.assertAlmostEqual(event["grad_norm"], norm, delta=1e-4 * norm)
        b1, b2 = o["--beta1"], o["--beta2"]
        for name, w in weights.items():
            g, m, v = gradients[name] * clip, after["m." + name], after["v." + name]
            off = clip * (GRADIENT * gradients[name].abs().max() + CANCELLED * norm)
            self.within(m, b1 * before.get("m." + name, 0) + (1 - b1) * g, (1 - b1) * off + STORED * m.abs().max(),
                        "m." + name)
            self.within(v, b2 * before.get("v." + name, 0) + (1 - b2) * g * g,
                        (1 - b2) * (2 * g.abs().max() + off) * off + 2e-5 * v.abs(), "v." + name)
            # From its own m and v: where both are next to nothing, a rounding of them is much of what changes a weight.
            change = rate * m / (1 - b1 ** step) / ((v / (1 - b2 ** step)).sqrt() + o["--eps"])
            self.within(after[name], w * (1 - rate * o["--weight-decay"]) - change,
                        STORED * (w.abs() + 3 * change.abs()) + 1e-12, name)

    def check_evaluation(self, events, sets, config, weights):
        """events: of one evaluation, a line for each set and one for their means."""
        losses = []
        for event, (tokens, targets, masked) in zip_all(events[:-1], sets):
            logits, counted = mta_ref.forward(tokens, weights, config), targets >= 0
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
            self.assertEqual((event["tokens"], "error" in event), (int(counted.sum()), masked))
            self.assertAlmostEqual(event["loss"], losses[-1], delta=1e-5 * max(1, losses[-1]))
            self.assertAlmostEqual(event["perplexity"] / math.exp(losses[-1]), 1, delta=1e-4)
            if masked:
                wrong = ((logits.argmax(-1) != targets) & counted).any(1).sum() / counted.any(1).sum()
                self.assertAlmostEqual(event["error"], wrong.item(), delta=1e-6)
        self.assertEqual((events[-1]["event"], events[-1]["sets"]), ("val_mean", len(sets)))
        self.assertAlmostEqual(events[-1]["loss"], sum(losses) / len(sets), delta=1e-5 * max(1, max(losses)))
        perplexity = sum(map(math.exp, losses)) / len(sets)
        self.assertAlmostEqual(events[-1]["perplexity"] / perplexity, 1, delta=1e-4)

    def check_model(self, number):
        rng = random.Random(number)
        config, T = random_model(rng, number)
        weights, windows, folder = random_weights(config, number), rng.choice([3, 4, 5, 7]), "%d." % number
        os.makedirs(self.path(folder + "init"))
        with open(self.path(folder + "init", "config.json"), "w", encoding="utf-8") as f:
            json.dump(config, f)
        mta_ref.save_safetensors(self.path(folder + "init", "model.safetensors"), weights, {"format": "pt"})
        data = self.shard(rng, folder + "train.bin", windows, T, config["vocab_size"])
        sets = [self.shard(rng, folder + name, 3, T, config["vocab_size"]) for name in ("a.bin", "b.bin")]
        o, out = random_options(rng, windows), self.path(folder + "run")
        words = [os.path.join(BIN, "train_mta"), "--init-from", self.path(folder + "init"), "--out", out,
                 "--train", self.path(folder + "train.bin"), "--tokens-per-step", str(windows * T),
                 "--val", ",".join("%s=%s" % (x, self.path("%s%s.bin" % (folder, x))) for x in "ab"),
                 "--eval-first", "--eval-every", "1", "--save-every", "1", "--keep", "0"]
        words += [word for option, value in o.items() for word in (option, str(value)) if value or option != "--min-lr"]
        done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ, OMP_WAIT_POLICY="passive"))
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
            events = [json.loads(line) for line in f]
        before = {name: w.double() for name, w in weights.items()}
        for step in range(o["--steps"] + 1):
            now = [e for e in events if e.get("step") == step]
            after = before
            if step:
                after = {name: t for part in ("model", "optimizer") for name, t in
                         read_tensors(os.path.join(out, "step-%08d" % step, part + ".safetensors")).items()}
                self.check_step(o, step, next(e for e in now if e["event"] == "step"), (config, data), before, after)
            self.check_evaluation([e for e in now if e["event"].startswith("val")], sets, config, after)
            before = after

    def test_random_models(self):
        for number in range(MODELS):
            with self.subTest(number=number):
                self.check_model(number)


if __name__ == "__main__":
    main()
