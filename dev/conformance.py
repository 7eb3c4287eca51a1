#!/usr/bin/env python3
"""Runs an implementation of Multi-Token Attention on the golden cases, and names the details of the definition that it
misses.

    dev/conformance.py MODULE:FUNCTION      MODULE: an importable name or a .py file; without a name: this project's own
                                            dev/ref/mta_ref.py

FUNCTION(q, k, v, **weights) takes rotated queries, keys and values (B, NH, T, HS), and of the weights below those that
the layer has, as keywords; it returns (B, NH, T, HS), through which PyTorch's autograd can go. It scales by 1/sqrt(HS)
itself (dev/MODEL.md, equations 3 to 11):

    kq_conv, kq_conv_post   (NH, cq, ck)      the key-query convolutions before and after the softmax
    head_mix_pre, head_mix  (NH/ch, ch, ch)   the head mixings before and after the softmax, (group, output head, input
                                              head)
    head_norm, norm_scale   (HS), a number    the norm of a head's values, eps 1e-5, and its factor (1 - lambda_init)
    head_gate, head_gate_bias  (HS), (1)      the sigmoid gate of a head

Each case is a whole small model: its logits, loss and the gradients of all its weights are compared with the golden
file. Where they differ, the layers are run one by one against the definition, and against copies of it with one detail
wrong, or two; a copy that computes the same names the mistake.
Exit status 0: all cases pass. 1: some do not, or take a weight that FUNCTION does not know.
"""
import argparse
import glob
import importlib
import importlib.util
import inspect
import itertools
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "ref"))

# of the largest value of a tensor; the golden files are rounded to float32 (6e-8)
TOLERANCE = {"float64": 1e-6, "float32": 2e-4}

# What each copy of the definition does wrongly. Order: what is met most often first.
DETAILS = {
    "masked_by_reader":
        "the convolution reads every key up to query i in the rows above; each row i-u must be masked by its own query "
        "i-u first",
    "not_masked_before": "scores of future keys (j > i) are not set to 0 before the convolution",
    "future_in_softmax": "future keys take part in the softmax with a score of 0; they must be left out of it",
    "post_not_masked": "the map is not set to 0 at future keys after the convolution that follows the softmax",
    "flipped_queries":
        "the kernel is turned round along the queries: weight [cq-1] belongs to query i itself, [0] to query i-(cq-1)",
    "flipped_keys":
        "the kernel is turned round along the keys: it is a cross-correlation, weight [b] reads key j + b - (ck-1)/2",
    "queries_below": "the convolution reads rows below: queries i .. i+cq-1 instead of i-(cq-1) .. i",
    "queries_centred": "the convolution is centred on the query, so that it reads later ones; it must end at query i",
    "keys_to_the_left": "the kernel's keys end at j instead of being centred on it",
    "same_kernel": "all heads use the kernel of head 0",
    "pre_transposed": "head mixing before the softmax is transposed: the weight is (group, output head, input head)",
    "post_transposed": "head mixing after the softmax is transposed: the weight is (group, output head, input head)",
    "interleaved_groups": "mixing groups take every (NH/ch)-th head; a group is ch heads that follow one another",
    "pre_mix_first": "heads are mixed before the convolution that comes before the softmax; the convolution is first",
    "post_mix_first": "heads are mixed before the convolution that comes after the softmax; the convolution is first",
    "rows_to_one": "rows are divided by their sum after the operations that follow the softmax; they need not sum to 1",
    "not_scaled": "scores are not divided by sqrt(HS)",
    "scaled_after": "scores are divided by sqrt(HS) twice",
    "norm_over_heads": "the norm is taken over all heads together instead of the HS values of each",
    "norm_not_scaled": "the norm's result is not multiplied by norm_scale, 1 - lambda_init(layer)",
    "gate_before_norm": "the gate is computed from the values before the norm",
    "gate_without_bias": "the gate's bias is left out",
}


def wrong_definition(wrong, q, k, v, kq_conv=None, kq_conv_post=None, head_mix_pre=None, head_mix=None, head_norm=None,
                     norm_scale=1.0, head_gate=None, head_gate_bias=None):
    """The definition with the details named in `wrong` wrong; with none it is mta_ref.multi_token_attention, in other
    words."""
    import torch

    B, NH, T, HS = q.shape
    causal = torch.tril(torch.ones(T, T, dtype=torch.bool))

    def convolution(s, weight):
        """One row of the kernel at a time: a row of scores u queries above, then the keys."""
        cq, ck = weight.shape[1:]
        if "same_kernel" in wrong:
            weight = weight[:1].expand(NH, cq, ck)
        if "flipped_queries" in wrong:
            weight = weight.flip(1)
        if "flipped_keys" in wrong:
            weight = weight.flip(2)
        left = ck - 1 if "keys_to_the_left" in wrong else (ck - 1) // 2
        out = torch.zeros_like(s)
        for a in range(cq):
            above = ((cq - 1) // 2 if "queries_centred" in wrong else cq - 1) - a
            if "queries_below" in wrong:
                above = -a
            unmasked = "not_masked_before" in wrong or "masked_by_reader" in wrong
            masked = s if unmasked else torch.where(causal, s, torch.zeros_like(s))
            rows = torch.zeros_like(s)  # rows[i] = masked[i - above], zero outside
            if abs(above) < T:
                rows[:, :, max(above, 0):T + min(above, 0)] = masked[:, :, max(-above, 0):T - max(above, 0)]
            if "masked_by_reader" in wrong:
                rows = torch.where(causal, rows, torch.zeros_like(rows))
            wide = torch.nn.functional.pad(rows, (left, ck - 1 - left))
            out = out + sum(weight[None, :, a, b, None, None] * wide[..., b:b + T] for b in range(ck))
        return out

    def mixed(s, weight, transposed):
        groups, ch = weight.shape[:2]
        weight = weight.transpose(1, 2) if transposed else weight
        if "interleaved_groups" in wrong:
            return torch.einsum("gon,bngij->bogij", weight, s.view(B, ch, groups, T, T)).reshape(B, NH, T, T)
        return torch.einsum("gon,bgnij->bgoij", weight, s.view(B, groups, ch, T, T)).reshape(B, NH, T, T)

    s = q @ k.transpose(2, 3) / (1 if "not_scaled" in wrong else HS if "scaled_after" in wrong else HS**0.5)
    before = [(kq_conv is not None, lambda s: convolution(s, kq_conv)),
              (head_mix_pre is not None, lambda s: mixed(s, head_mix_pre, "pre_transposed" in wrong))]
    for there, step in reversed(before) if "pre_mix_first" in wrong else before:
        s = step(s) if there else s
    s = torch.where(causal, s, torch.zeros_like(s) if "future_in_softmax" in wrong else torch.full_like(s, -torch.inf))
    a = torch.softmax(s, -1)
    if "future_in_softmax" in wrong:
        a = torch.where(causal, a, torch.zeros_like(a))

    def convolution_after(a):
        a = convolution(a, kq_conv_post)
        return a if "post_not_masked" in wrong else torch.where(causal, a, torch.zeros_like(a))

    after = [(kq_conv_post is not None, convolution_after),
             (head_mix is not None, lambda a: mixed(a, head_mix, "post_transposed" in wrong))]
    for there, step in reversed(after) if "post_mix_first" in wrong else after:
        a = step(a) if there else a
    if "rows_to_one" in wrong:
        a = a / a.sum(-1, keepdim=True)
    o = plain = a @ v
    if head_norm is not None:
        square = o.pow(2).mean((1, 3), keepdim=True) if "norm_over_heads" in wrong else o.pow(2).mean(-1, keepdim=True)
        o = o * torch.rsqrt(square + 1e-5) * head_norm * (1.0 if "norm_not_scaled" in wrong else norm_scale)
    if head_gate is not None:
        read = plain if "gate_before_norm" in wrong else o
        o = o * torch.sigmoid((read * head_gate).sum(-1, keepdim=True) + (0 if "gate_without_bias" in wrong
                                                                          else head_gate_bias))
    return o


def load(name):
    """The function behind MODULE:FUNCTION."""
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise SystemExit(f"conformance.py: {name}: wanted MODULE:FUNCTION")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(os.path.basename(module)[:-3], module)
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            sys.path.insert(0, os.getcwd())
            loaded = importlib.import_module(module)
        return getattr(loaded, function)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise SystemExit(f"conformance.py: {name}: {error}") from None


def distance(got, want):
    """Largest difference over the largest value wanted; infinite for another shape and for numbers that are not
    finite."""
    if got is None or tuple(got.shape) != tuple(want.shape) or not got.isfinite().all():
        return float("inf")
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-12)).item()


class Layer:
    """What one attention of a case receives, kept so that others can be run on it."""

    def __init__(self, q, k, v, weights):
        self.inputs = [t.detach() for t in (q, k, v)]
        self.weights = {n: w.detach() if hasattr(w, "detach") else w for n, w in weights.items()}

    def run(self, function):
        """The output and the gradients of all inputs, of a fixed random weighting of the output; names -> tensors."""
        import torch

        inputs = [t.clone().requires_grad_(True) for t in self.inputs]
        weights = {n: w.clone().requires_grad_(True) if hasattr(w, "clone") else w for n, w in self.weights.items()}
        out = function(*inputs, **weights)
        result = {"output": out.detach()}
        seen = torch.randn(self.inputs[0].shape, generator=torch.Generator().manual_seed(1),
                           dtype=torch.float64).to(out.dtype)
        named = {**dict(zip("qkv", inputs)), **{n: w for n, w in weights.items() if hasattr(w, "grad")}}
        gradients = torch.autograd.grad((out * seen).sum(), list(named.values()),
                                        allow_unused=True) if out.requires_grad else [None] * len(named)
        result.update({"gradient of " + n: torch.zeros_like(t) if g is None else g
                       for (n, t), g in zip(named.items(), gradients)})
        return result


def differences(got, want, tolerance):
    """Names of what two results of Layer.run differ in."""
    return [n for n in want if not distance(got[n], want[n]) <= tolerance]


def outputs_of(wrong, layers):
    """The outputs of the copy of the definition with these details wrong, layer by layer."""
    return [wrong_definition(wrong, *layer.inputs, **layer.weights) for layer in layers]


def diagnose(layers, function, tolerance):
    """What `function` misses, as sentences: a copy of the definition with one or two details wrong that computes the
    same in every layer that it concerns."""
    import mta_ref

    wants = [layer.run(mta_ref.multi_token_attention) for layer in layers]
    gots = [layer.run(function) for layer in layers]
    if not any(differences(got, want, tolerance) for got, want in zip(gots, wants)):
        return []
    outputs_differ = [d for got, want in zip(gots, wants) for d in differences(got, want, tolerance) if d == "output"]
    if not outputs_differ:
        names = sorted({d for got, want in zip(gots, wants) for d in differences(got, want, tolerance)})
        return ["the outputs are right, but not the " + ", ".join(names)]
    matter = [d for d in DETAILS
              if any(distance(copy, want["output"]) > tolerance for copy, want in zip(outputs_of((d,), layers), wants))]
    for wrong in [*itertools.combinations(matter, 1), *itertools.combinations(matter, 2)]:
        if all(distance(got["output"], copy) <= tolerance for got, copy in zip(gots, outputs_of(wrong, layers))):
            return [DETAILS[w] for w in wrong]
    sentences = ["the output differs, and none of the known mistakes (or two of them together) explains it"]
    got, want = next((g, w) for g, w in zip(gots, wants) if "output" in differences(g, w, tolerance))
    if tuple(got["output"].shape) == tuple(want["output"].shape):
        rows = [(h, i) for h in range(want["output"].shape[1]) for i in range(want["output"].shape[2])
                if not distance(got["output"][:, h, i], want["output"][:, h, i]) <= tolerance]
        sentences.append("first differing: head %d, query %d; %d of %d (head, query) differ" %
                         (*rows[0], len(rows), want["output"][0, :, :, 0].numel())
                         if rows else "no row differs by itself")
    else:
        sentences.append(f"shape {tuple(got['output'].shape)}, wanted {tuple(want['output'].shape)}")
    return sentences


def leaks(layers, function):
    """Whether the output at a position depends on what comes after it."""
    for layer in layers:
        T = layer.inputs[0].shape[2]
        if T > 1:
            changed = [t.clone() for t in layer.inputs]
            for t in changed:
                t[:, :, T - 1] += 1
            if not (function(*layer.inputs,
                             **layer.weights)[:, :, :T - 1] == function(*changed, **layer.weights)[:, :, :T - 1]).all():
                return True
    return False


def read_case(path, dtype):
    """A golden case: its tensors, configuration, weights, and what each layer's attention receives."""
    import make_golden
    import mta_ref

    tensors, config = make_golden.read_case(path)
    weights = {n: t.to(dtype) for n, t in tensors.items() if not n.startswith(("golden.", "grad."))}
    layers = []

    def record(q, k, v, **given):
        layers.append(Layer(q, k, v, given))
        return mta_ref.multi_token_attention(q, k, v, **given)

    mta_ref.forward(tensors["golden.tokens"], weights, config, record)
    return tensors, config, weights, layers


def run_case(path, function, dtype, tolerance):
    """One golden case. Returns (the weights that it asks for, worst error, sentences about what is missed)."""
    import mta_ref
    import torch

    tensors, config, weights, layers = read_case(path, dtype)
    asked = sorted({n for layer in layers for n in layer.weights})
    known = inspect.signature(function).parameters
    unknown = [n for n in asked if n not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values())]
    if unknown:
        return asked, float("nan"), ["does not take " + ", ".join(unknown)]
    try:
        logits, loss, gradients = mta_ref.loss_and_grads(tensors["golden.tokens"], tensors["golden.targets"], weights,
                                                         config, function)
    except Exception as error:  # an implementation under test may raise anything
        return asked, float("inf"), [f"raises {type(error).__name__}: {error}"]
    got = {"golden.logits": logits, "golden.loss": loss.view(1)}
    # None: what autograd says where nothing depends
    got.update({"grad." + n: torch.zeros_like(weights[n]) if g is None else g for n, g in gradients.items()})
    worst = max(distance(g, tensors[n]) for n, g in got.items())
    sentences = diagnose(layers, function, tolerance) if not worst <= tolerance else []
    if not worst <= tolerance and not sentences:
        sentences = ["the whole model differs, though each layer by itself does not"]
    if leaks(layers, function):
        sentences.append("an output depends on later positions")
    return asked, worst, sentences


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("function", nargs="?",
                        default=os.path.join(HERE, "ref", "mta_ref.py") + ":multi_token_attention",
                        metavar="MODULE:FUNCTION")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float64",
                        help="of weights and activations (default: %(default)s)")
    parser.add_argument("--golden", default=os.path.join(HERE, "golden"), help="folder of cases (default: dev/golden)")
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        raise SystemExit("conformance.py: no PyTorch here; dev/.venv has it (scripts/test.sh makes it)") from None
    torch.set_num_threads(1)  # the cases are small
    function = load(options.function)
    missed, passed, failed = {}, 0, 0
    # diff is no MTA
    paths = sorted(p for p in glob.glob(os.path.join(options.golden, "*.safetensors"))
                   if os.path.basename(p) != "diff.safetensors")
    if not paths:
        raise SystemExit(f"conformance.py: {options.golden}: no golden cases")
    for path in paths:
        asked, worst, sentences = run_case(path, function, getattr(torch, options.dtype), TOLERANCE[options.dtype])
        good = not sentences
        passed, failed = passed + good, failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'} {os.path.basename(path)[:-12]:14} "
              f"{', '.join(asked) or 'plain attention'}: error {worst:.1e}")
        for sentence in sentences:
            missed.setdefault(sentence, []).append(os.path.basename(path)[:-12])
    for sentence, cases in missed.items():
        print(f"missed: {sentence} ({', '.join(cases)})")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
