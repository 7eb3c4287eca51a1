#!/usr/bin/env python3
"""Runs an implementation of Multi-Token Attention on the golden cases, and names the details of the definition that it
misses.

    dev/conformance.py MODULE:FUNCTION      MODULE: an importable name or a .py file; without a name: this project's own
                                            dev/ref/mta_ref.py

FUNCTION(q, k, v, **weights) takes rotated queries, keys and values (B, NH, T, HS), and of the weights below those that
the layer has, as keywords; it returns one tensor (B, NH, T, HS) of the same type, through which PyTorch's autograd can
go. It scales by 1/sqrt(HS) itself (dev/MODEL.md, equations 3 to 11). All tensors are on the CPU and of --dtype: what
needs a GPU or computes in less is tested through a function that takes them there and back.

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

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.join(HERE, "ref"))

# of the largest value of a tensor; the golden files are rounded to float32 (6e-8)
TOLERANCE = {"float64": 1e-6, "float32": 2e-4}
# The same, of what another order of sums does to an output: a change of later positions may do that much to it
# (convolutions by a Fourier transform).
ROUNDING = {"float64": 1e-10, "float32": 1e-5}
# What arithmetic of less than --dtype does to outputs and gradients, at most.
COARSE = {"float32": 1e-4, "bf16 or float16": 5e-2}
# A gradient's tolerance is of its own largest value, but of no less than this part of the largest of all gradients:
# where a query has one key, those of q and k are 0, and of rounding alone where the backward pass is written by hand.
SMALL_GRADIENT = 0.01

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
    "no_mask_in_softmax": "future keys take part in the softmax with their scores; they must be left out of it",
    "softmax_twice": "the softmax is taken twice",
    "rows_to_one": "rows are divided by their sum after the operations that follow the softmax; they need not sum to 1",
    "not_scaled": "scores are not divided by sqrt(HS)",
    "scaled_after": "scores are divided by sqrt(HS) twice",
    "scaled_by_width": "scores are divided by sqrt(NH HS), the width of all heads together, instead of sqrt(HS)",
    "norm_over_heads": "the norm is taken over all heads together instead of the HS values of each",
    "norm_over_positions": "the norm is taken over the values of a head at all positions instead of those at each",
    "norm_across_heads": "the norm is taken over the heads for each of the HS values instead of over the HS values",
    "norm_without_mean": "the norm subtracts the mean, as LayerNorm does; RMSNorm does not",
    "norm_eps_1e-6": "the norm's eps is 1e-6 instead of 1e-5",
    "norm_eps_0": "the norm's eps is 1e-8 or less instead of 1e-5",
    "norm_not_scaled": "the norm's result is not multiplied by norm_scale, 1 - lambda_init(layer)",
    "gate_before_norm": "the gate is computed from the values before the norm",
    "gate_without_bias": "the gate's bias is left out",
    "without_kq_conv": "the convolution before the softmax is left out",
    "without_kq_conv_post": "the convolution after the softmax is left out",
    "without_head_mix_pre": "head mixing before the softmax is left out",
    "without_head_mix": "head mixing after the softmax is left out",
    "without_head_norm": "the norm of heads is left out, with its factor norm_scale",
    "without_head_gate": "the gate is left out",
}


class Unusable(Exception):
    """A result that cannot be compared, as a sentence."""


def wrong_definition(wrong, q, k, v, kq_conv=None, kq_conv_post=None, head_mix_pre=None, head_mix=None, head_norm=None,
                     norm_scale=1.0, head_gate=None, head_gate_bias=None):
    """The definition with the details named in `wrong` wrong; with none it is mta_ref.multi_token_attention, in other
    words."""
    import torch

    B, NH, T, HS = q.shape
    causal = torch.tril(torch.ones(T, T, dtype=torch.bool))
    kq_conv, kq_conv_post, head_mix_pre, head_mix, head_norm, head_gate = (
        None if "without_" + name in wrong else weight
        for name, weight in (("kq_conv", kq_conv), ("kq_conv_post", kq_conv_post), ("head_mix_pre", head_mix_pre),
                             ("head_mix", head_mix), ("head_norm", head_norm), ("head_gate", head_gate)))

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

    s = q @ k.transpose(2, 3) / (1 if "not_scaled" in wrong else HS if "scaled_after" in wrong else
                                 (NH * HS)**0.5 if "scaled_by_width" in wrong else HS**0.5)
    before = [(kq_conv is not None, lambda s: convolution(s, kq_conv)),
              (head_mix_pre is not None, lambda s: mixed(s, head_mix_pre, "pre_transposed" in wrong))]
    for there, step in reversed(before) if "pre_mix_first" in wrong else before:
        s = step(s) if there else s
    left_out = torch.zeros_like(s) if "future_in_softmax" in wrong else torch.full_like(s, -torch.inf)
    a = torch.softmax(s if "no_mask_in_softmax" in wrong else torch.where(causal, s, left_out), -1)
    if "future_in_softmax" in wrong:
        a = torch.where(causal, a, torch.zeros_like(a))
    if "softmax_twice" in wrong:
        a = torch.softmax(torch.where(causal, a, torch.full_like(a, -torch.inf)), -1)

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
        over = ((1, 3) if "norm_over_heads" in wrong else (2, 3) if "norm_over_positions" in wrong else
                (1,) if "norm_across_heads" in wrong else (3,))
        eps = 1e-6 if "norm_eps_1e-6" in wrong else 0 if "norm_eps_0" in wrong else 1e-5
        o = o - o.mean(-1, keepdim=True) if "norm_without_mean" in wrong else o
        o = o * torch.rsqrt(o.pow(2).mean(over, keepdim=True) + eps) * head_norm
        o = o * (1.0 if "norm_not_scaled" in wrong else norm_scale)
    if head_gate is not None:
        read = plain if "gate_before_norm" in wrong else o
        o = o * torch.sigmoid((read * head_gate).sum(-1, keepdim=True) + (0 if "gate_without_bias" in wrong
                                                                          else head_gate_bias))
    return o


def load_module(module):
    """A module, or a .py file, under test. Its names, and those of what it imports, may be those of this project's own
    modules (mta_ref, helpers): each gets its own."""
    import make_golden  # noqa: F401  it brings mta_ref and helpers along

    own = {name: sys.modules.pop(name) for name in ("make_golden", "mta_ref", "helpers")}
    is_file = module.endswith(".py")
    sys.path.insert(0, os.path.dirname(os.path.abspath(module)) if is_file else os.getcwd())
    try:
        if not is_file:
            return importlib.import_module(module)
        spec = importlib.util.spec_from_file_location("tested_" + os.path.basename(module)[:-3], module)
        loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
        spec.loader.exec_module(loaded)
        return loaded
    finally:
        sys.modules.update(own)


def load(name):
    """The function behind MODULE:FUNCTION."""
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise SystemExit(f"conformance.py: {name}: wanted MODULE:FUNCTION")
    try:
        loaded = getattr(load_module(module), function)
    except Exception as error:  # what a module under test does when it is imported is its own
        kind = "" if isinstance(error, (ImportError, OSError, AttributeError)) else type(error).__name__ + ": "
        line = " ".join(str(error).split())
        raise SystemExit(f"conformance.py: {name}: {kind}{line}") from None
    if not callable(loaded):
        raise SystemExit(f"conformance.py: {name}: a {type(loaded).__name__}, wanted a function")
    return loaded


def takes(function, name):
    """Can it be given this keyword? Where Python knows no signature, the call will tell."""
    try:
        known = inspect.signature(function).parameters
    except ValueError:
        return True
    return name in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


def checked(function):
    """The function, but that a result of another kind than q raises Unusable: what comes after it would raise, or
    compute, something that has nothing to do with the mistake."""
    import torch

    def call(q, k, v, **weights):
        (B, NH, T, HS), like = q.shape, (q.dtype, q.device)
        out = function(q, k, v, **weights)
        if not isinstance(out, torch.Tensor):
            raise Unusable(f"returns a {type(out).__name__}, wanted a tensor (B, NH, T, HS)")
        if out.shape != (B, NH, T, HS):
            named = {(B, T, NH, HS): "(B, T, NH, HS)", (B, T, NH * HS): "(B, T, NH HS)"}
            raise Unusable(f"returns the shape {named.get(tuple(out.shape), tuple(out.shape))}, wanted (B, NH, T, HS)")
        if (out.dtype, out.device) != like:
            raise Unusable(f"returns {out.dtype} on {out.device.type}, wanted {q.dtype} on {q.device.type} as its "
                           f"arguments are")
        return out

    return call


def distance(got, want, floor=1e-12):
    """Largest difference over the largest value wanted, or over floor; infinite for another shape and for numbers that
    are not finite."""
    if got is None or tuple(got.shape) != tuple(want.shape) or not got.isfinite().all():
        return float("inf")
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(floor)).item()


def distances(got, want):
    """{name: distance} of two results; a name with "grad" in it is a gradient's."""
    floor = SMALL_GRADIENT * max(t.abs().max().item() for n, t in want.items() if "grad" in n)
    return {n: distance(got[n], t, floor if "grad" in n else 1e-12) for n, t in want.items()}


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
        out = function(*[t.clone() for t in inputs], **weights)  # of copies: it may change them in place, as in a model
        result = {"output": out.detach()}
        self.has_graph = out.requires_grad
        seen = torch.randn(self.inputs[0].shape, generator=torch.Generator().manual_seed(1),
                           dtype=torch.float64).to(out.dtype)
        named = {**dict(zip("qkv", inputs)), **{n: w for n, w in weights.items() if hasattr(w, "grad")}}
        gradients = torch.autograd.grad((out * seen).sum(), list(named.values()),
                                        allow_unused=True) if out.requires_grad else [None] * len(named)
        result.update({"gradient of " + n: torch.zeros_like(t) if g is None else g
                       for (n, t), g in zip(named.items(), gradients)})
        return result


def copies_of(wrong, layers):
    """The outputs of the copy of the definition with these details wrong, layer by layer as they are asked for."""
    return (wrong_definition(wrong, *layer.inputs, **layer.weights) for layer in layers)


def coarse(most):
    """Sentences about differences that arithmetic of less than --dtype makes."""
    name = next((n for n, limit in COARSE.items() if most <= limit), None)
    return [f"the numbers differ a little, as arithmetic in {name} makes them; wanted that of --dtype"] if name else []


def explained(layers, outputs, wants, tolerance):
    """Sentences: the copy of the definition with one or two details wrong that computes these outputs; or one that
    comes ten times as close to them as the definition does, which computed in bf16 would tell no more."""
    far = max(distance(got, want) for got, want in zip(outputs, wants))
    closest = {}
    for detail in DETAILS:
        copies = list(copies_of((detail,), layers))
        if any(distance(copy, want) > tolerance for copy, want in zip(copies, wants)):
            closest[detail] = max(distance(got, copy) for got, copy in zip(outputs, copies))
    best = min(closest, key=closest.get, default=None)
    if best and closest[best] <= tolerance:
        return [DETAILS[best]]
    for pair in itertools.combinations(closest, 2):
        if all(distance(got, copy) <= tolerance for got, copy in zip(outputs, copies_of(pair, layers))):
            return [DETAILS[d] for d in pair]
    if best and closest[best] <= min(0.1 * far, max(COARSE.values())):
        return [DETAILS[best], *coarse(closest[best])]
    return coarse(far)


def diagnose(layers, function, tolerance):
    """What `function` misses, as sentences."""
    import mta_ref

    wants = [layer.run(mta_ref.multi_token_attention) for layer in layers]
    gots = [layer.run(function) for layer in layers]
    every = [distances(got, want) for got, want in zip(gots, wants)]
    differ = sorted({n for d in every for n in d if not d[n] <= tolerance})
    if "output" not in differ:
        if differ and not all(layer.has_graph for layer in layers):
            return ["the outputs are right, but autograd does not go through them: there is no graph"]
        names = ", ".join(n[len("gradient of "):] for n in differ)
        return differ and (coarse(max(max(d.values()) for d in every))
                           or ["the outputs are right, but not the gradient of " + names])
    outputs = [got["output"] for got in gots]
    finite = all(out.isfinite().all() for out in outputs)
    sentences = explained(layers, outputs, [want["output"] for want in wants], tolerance) if finite else []
    if sentences:
        return sentences
    got, want = next((g["output"], w["output"]) for g, w, d in zip(gots, wants, every) if not d["output"] <= tolerance)
    rows = [(h, i) for h in range(want.shape[1]) for i in range(want.shape[2])
            if not distance(got[:, h, i], want[:, h, i]) <= tolerance]
    return ["the output differs, and none of the known mistakes (or two of them together) explains it" if finite else
            "the output has values that are not finite",
            "first differing: head %d, query %d; %d of %d (head, query) differ" %
            (*rows[0], len(rows), want[0, :, :, 0].numel()) if rows else "no row differs by itself"]


def leaks(layers, function, rounding):
    """Whether the output at a position depends on what comes after it."""
    for layer in layers:
        T = layer.inputs[0].shape[2]
        if T > 1:
            kept, changed = ([t.clone() for t in layer.inputs] for _ in "ab")
            for t in changed:
                t[:, :, T - 1] += 1
            a, b = (function(*inputs, **layer.weights)[:, :, :T - 1] for inputs in (kept, changed))
            if a.isfinite().all() and not distance(b, a) <= rounding:
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


def run_model(tensors, config, weights, layers, function, dtype):
    """One golden case through `function`. Returns (worst error, sentences about what is missed)."""
    import mta_ref
    import torch

    tolerance = TOLERANCE[dtype]
    logits, loss, gradients = mta_ref.loss_and_grads(tensors["golden.tokens"], tensors["golden.targets"], weights,
                                                     config, function)
    got = {"golden.logits": logits, "golden.loss": loss.view(1)}
    # None: what autograd says where nothing depends
    got.update({"grad." + n: torch.zeros_like(weights[n]) if g is None else g for n, g in gradients.items()})
    worst = max(distances(got, {n: tensors[n] for n in got}).values())
    sentences = diagnose(layers, function, tolerance) if not worst <= tolerance else []
    if not worst <= tolerance and not sentences:
        sentences = coarse(worst) or ["the whole model differs, though each layer by itself does not"]
    if leaks(layers, function, ROUNDING[dtype]):
        sentences.append("an output depends on later positions")
    return worst, sentences


def run_case(case, function, dtype):
    """One golden case, as read_case gives it. Returns (the weights that it asks for, worst error, sentences about what
    is missed)."""
    layers = case[3]
    asked = sorted({n for layer in layers for n in layer.weights})
    unknown = [n for n in asked if not takes(function, n)]
    if unknown:
        return asked, float("nan"), ["does not take " + ", ".join(unknown)]
    try:
        return asked, *run_model(*case, checked(function), dtype)
    except Unusable as error:
        return asked, float("inf"), [str(error)]
    except Exception as error:  # an implementation under test may raise anything
        return asked, float("inf"), [f"raises {type(error).__name__}: {' '.join(str(error).split())}"]


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
    for path in sorted(glob.glob(os.path.join(options.golden, "*.safetensors"))):
        try:
            case = read_case(path, getattr(torch, options.dtype))
        except (KeyError, ValueError) as error:
            raise SystemExit(f"conformance.py: {path}: no golden case: {type(error).__name__}: {error}") from None
        if not case[3]:
            continue  # DIFF Transformer: no layer of it is MTA's
        asked, worst, sentences = run_case(case, function, options.dtype)
        good = not sentences
        passed, failed = passed + good, failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'} {os.path.basename(path)[:-12]:14} "
              f"{', '.join(asked) or 'plain attention'}: error {worst:.1e}")
        for sentence in sentences:
            missed.setdefault(sentence, []).append(os.path.basename(path)[:-12])
    for sentence, cases in missed.items():
        print(f"missed: {sentence} ({', '.join(cases)})")
    if not passed + failed:
        raise SystemExit(f"conformance.py: {options.golden}: no golden cases")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
