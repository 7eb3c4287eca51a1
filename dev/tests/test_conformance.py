"""dev/conformance.py: the reference passes, planted mistakes are named, and the copies of the definition are the
definition where nothing is wrong with them."""
import importlib.util
import os
import subprocess
import sys
import tempfile
import unittest

from helpers import BIN, ROOT, call, main

sys.path[:0] = [os.path.join(ROOT, "dev"), os.path.join(ROOT, "dev", "ref")]
HAVE_TORCH = importlib.util.find_spec("torch") is not None
CONFORMANCE = os.path.join(ROOT, "dev", "conformance.py")

# Three ways in which people write it, none of them by dev/ref: each is right but for one thing.
MISTAKEN = '''
import math
import torch
import torch.nn.functional as F


def conv(s, w, rows_masked):
    """As unfold would do it: gathers the window of every score."""
    B, NH, T, _ = s.shape
    cq, ck = w.shape[1:]
    if rows_masked:
        s = s * torch.ones(T, T, dtype=s.dtype).tril()
    padded = F.pad(s, (ck // 2, ck // 2, cq - 1, 0))
    windows = padded.unfold(2, cq, 1).unfold(3, ck, 1)
    return torch.einsum("bhijuv,huv->bhij", windows, w)


def mix(s, w):
    return torch.cat([torch.einsum("no,bnij->boij", w[g].T, s[:, g * w.shape[1]:(g + 1) * w.shape[1]])
                      for g in range(len(w))], 1)


def attention(q, k, v, kq_conv=None, kq_conv_post=None, head_mix_pre=None, head_mix=None, head_norm=None,
              norm_scale=1.0, head_gate=None, head_gate_bias=None, masked=True, transposed=False, detached=False):
    B, NH, T, HS = q.shape
    future = torch.ones(T, T).triu(1).bool()
    s = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(HS)
    if kq_conv is not None:
        s = conv(s, kq_conv.detach() if detached else kq_conv, masked)
    if head_mix_pre is not None:
        s = mix(s, head_mix_pre)
    a = s.masked_fill(future, -torch.inf).softmax(-1)
    if kq_conv_post is not None:
        a = conv(a, kq_conv_post, True).masked_fill(future, 0)
    if head_mix is not None:
        a = mix(a, head_mix.transpose(1, 2) if transposed else head_mix)
    o = a @ v
    if head_norm is not None:
        o = o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * head_norm * norm_scale
    if head_gate is not None:
        o = o * torch.sigmoid(o @ head_gate + head_gate_bias)[..., None]
    return o


def right(q, k, v, **w):
    return attention(q, k, v, **w)


def future_scores(q, k, v, **w):
    return attention(q, k, v, masked=False, **w)


def transposed(q, k, v, **w):
    return attention(q, k, v, transposed=True, **w)


def detached(q, k, v, **w):
    return attention(q, k, v, detached=True, **w)


def only_plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ByHand(torch.autograd.Function):
    """A softmax whose backward pass sums otherwise: the gradient of a query with one key is rounding, not 0."""

    @staticmethod
    def forward(ctx, s):
        a = torch.softmax(s, -1)
        ctx.save_for_backward(a)
        return a

    @staticmethod
    def backward(ctx, da):
        a, = ctx.saved_tensors
        return a * (da - (da / 3 * a).sum(-1, keepdim=True) * 3)


def right_by_hand(q, k, v, **w):
    softmax, torch.Tensor.softmax = torch.Tensor.softmax, lambda s, _: ByHand.apply(s)
    try:
        return attention(q, k, v, **w)
    finally:
        torch.Tensor.softmax = softmax


def right_by_fourier(q, k, v, kq_conv=None, **w):
    global conv

    def transformed(s, w, rows_masked):
        T, ck = s.shape[2], w.shape[2]
        s = s * torch.ones(T, T, dtype=s.dtype).tril()
        both = torch.fft.rfft2(s, s=(T + 16, T + 16)) * torch.fft.rfft2(w.flip(1, 2), s=(T + 16, T + 16))
        return torch.fft.irfft2(both, s=(T + 16, T + 16))[:, :, :T, ck // 2:ck // 2 + T]

    by_windows, conv = conv, transformed
    try:
        return attention(q, k, v, kq_conv=kq_conv, **w)
    finally:
        conv = by_windows


def transposed_in_place(q, k, v, **w):
    q *= 2
    return attention(q.div_(2), k, v, transposed=True, **w)


def in_type(dtype, function, q, k, v, w):
    return function(*(t.to(dtype) for t in (q, k, v)), **{n: t if n == "norm_scale" else t.to(dtype)
                                                         for n, t in w.items()})


def in_bf16(q, k, v, **w):
    return in_type(torch.bfloat16, right, q, k, v, w).to(q.dtype)


def transposed_in_bf16(q, k, v, **w):
    return in_type(torch.bfloat16, transposed, q, k, v, w).to(q.dtype)


def returns_float32(q, k, v, **w):
    return in_type(torch.float32, right, q, k, v, w)


def returns_weights(q, k, v, **w):
    return right(q, k, v, **w), None


def heads_last(q, k, v, **w):
    return right(q, k, v, **w).transpose(1, 2)


def not_finite(q, k, v, **w):
    return right(q, k, v, **w).index_fill(2, torch.tensor([0]), torch.nan)


def without_graph(q, k, v, **w):
    return right(q, k, v, **w).detach()


def one_convolution(q, k, v, kq_conv_post=None, **w):
    return right(q, k, v, **w)


def layer_norm(q, k, v, head_norm=None, norm_scale=1.0, **w):
    o = right(q, k, v, **{n: t for n, t in w.items() if "gate" not in n})
    if head_norm is not None:
        o = F.layer_norm(o, o.shape[-1:], head_norm, None, 1e-5) * norm_scale
    return o * torch.sigmoid(o @ w["head_gate"] + w["head_gate_bias"])[..., None] if "head_gate" in w else o


def other_eps(q, k, v, head_norm=None, norm_scale=1.0, **w):
    o = right(q, k, v, **{n: t for n, t in w.items() if "gate" not in n})
    if head_norm is not None:
        o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-6) * head_norm * norm_scale
    return o * torch.sigmoid(o @ w["head_gate"] + w["head_gate_bias"])[..., None] if "head_gate" in w else o


def softmax_twice(q, k, v, **w):
    if "kq_conv_post" in w or "head_mix" in w:
        return right(q, k, v, **w)
    future = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
    softmax = torch.Tensor.softmax
    torch.Tensor.softmax = lambda s, _: softmax(softmax(s, -1).masked_fill(future, -torch.inf), -1)
    try:
        return right(q, k, v, **w)
    finally:
        torch.Tensor.softmax = softmax


not_a_function = 3
'''


@unittest.skipUnless(HAVE_TORCH, "no PyTorch (dev/.venv has it)")
class Conformance(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.module = os.path.join(cls.folder.name, "mistaken.py")
        with open(cls.module, "w", encoding="utf-8") as f:
            f.write(MISTAKEN)
        cls.few = cls.cases("few", "full", "gqa", "one_token", "toy")  # enough to tell
        cls.one = cls.cases("one", "gqa")  # where all pairs of details are tried in vain, which takes seconds

    @classmethod
    def cases(cls, name, *cases):
        """A folder of these golden cases."""
        folder = os.path.join(cls.folder.name, name)
        os.mkdir(folder)
        for case in cases:
            os.symlink(os.path.join(ROOT, "dev", "golden", case + ".safetensors"),
                       os.path.join(folder, case + ".safetensors"))
        return folder

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def run_on(self, *arguments, program=False):
        """conformance.py with these arguments: inside this process, or as a program of its own."""
        if program:
            return subprocess.run([sys.executable, CONFORMANCE, *arguments], capture_output=True, text=True)
        import conformance

        return call(conformance, *arguments)

    def test_right_ones_pass(self):
        for arguments in ([], [self.module + ":right"], [self.module + ":right", "--dtype", "float32"]):
            done = self.run_on(*arguments, program=not arguments)
            self.assertEqual((done.returncode, done.stdout.splitlines()[-1], "missed" in done.stdout),
                             (0, "11 passed, 0 failed", False), done.stdout + done.stderr)

    def test_planted_mistakes_are_named(self):
        for function, sentence in (("future_scores", "not set to 0 before the convolution"),
                                   ("transposed", "head mixing after the softmax is transposed"),
                                   ("detached", "the outputs are right, but not the gradient of kq_conv"),
                                   ("only_plain", "does not take kq_conv")):
            done = self.run_on(f"{self.module}:{function}", "--golden", self.few)
            self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
            self.assertIn(sentence, done.stdout)
        self.assertNotIn("head mixing before the softmax is transposed",
                         self.run_on(f"{self.module}:transposed", "--golden", self.few).stdout)

    def test_right_ones_by_other_ways_pass(self):
        """Sums in another order: a gradient that is 0, later positions in one Fourier transform with earlier ones."""
        for function in ("right_by_hand", "right_by_fourier"):
            done = self.run_on(f"{self.module}:{function}", "--golden", self.few)
            self.assertEqual((done.returncode, done.stdout.splitlines()[-1]), (0, "4 passed, 0 failed"), done.stdout)

    def test_results_of_another_kind_are_named(self):
        """Each by all that is missed, so that nothing else is blamed."""
        coarse = "the numbers differ a little, as arithmetic in bf16 or float16 makes them"
        post = "head mixing after the softmax is transposed"
        for function, wanted in (("returns_weights", ["returns a tuple, wanted a tensor (B, NH, T, HS)"]),
                                 ("heads_last", ["returns the shape (B, T, NH, HS), wanted (B, NH, T, HS)"]),
                                 ("returns_float32", ["returns torch.float32 on cpu, wanted torch.float64 on cpu"]),
                                 ("without_graph", ["autograd does not go through them: there is no graph"]),
                                 ("not_finite", [*["first differing"] * 4, "values that are not finite"]),
                                 ("transposed_in_place", [post]),
                                 ("in_bf16", [coarse]),
                                 ("transposed_in_bf16", [coarse, post]),
                                 ("one_convolution", ["the convolution after the softmax is left out"]),
                                 ("layer_norm", ["the norm subtracts the mean"]),
                                 ("other_eps", ["the norm's eps is 1e-6 instead of 1e-5"]),
                                 ("softmax_twice", ["the softmax is taken twice"])):
            done = self.run_on(f"{self.module}:{function}", "--golden", self.one if "bf16" in function else self.few)
            missed = sorted(line for line in done.stdout.splitlines() if line.startswith("missed: "))
            self.assertEqual((done.returncode, len(missed)), (1, len(wanted)), function + done.stdout + done.stderr)
            for text in wanted:
                self.assertTrue(any(text in line for line in missed), text + done.stdout)

    def test_names_of_our_own_modules_are_free(self):
        """Someone's changed mta_ref, beside helpers of theirs, is what runs, and ours is what it is compared with."""
        with open(os.path.join(ROOT, "dev", "ref", "mta_ref.py"), encoding="utf-8") as f:
            text = f.read()
        with open(os.path.join(self.folder.name, "mta_ref.py"), "w", encoding="utf-8") as f:
            f.write("import helpers\n" + text.replace("/ math.sqrt(HS)", "/ helpers.HALF"))
        with open(os.path.join(self.folder.name, "helpers.py"), "w", encoding="utf-8") as f:
            f.write("HALF = 1\n")
        here = os.getcwd()
        os.chdir(self.folder.name)
        try:
            for module in ("mta_ref", "./mta_ref.py"):
                done = self.run_on(module + ":multi_token_attention", "--golden", self.few)
                self.assertIn("missed: scores are not divided by sqrt(HS) (full, gqa, toy)", done.stdout, done.stderr)
        finally:
            os.chdir(here)

    def test_each_detail_is_told_from_the_others(self):
        """The copy with nothing wrong is the definition; each detail changes some golden case, and no two change all of
        them alike. An eps changes little, so that float32 does not show it."""
        import conformance
        import mta_ref
        import torch

        torch.set_num_threads(1)
        seen = {}
        layers = [layer for case in ("full", "paper", "post_only", "toy", "short")
                  for layer in conformance.read_case(os.path.join(ROOT, "dev", "golden", case + ".safetensors"),
                                                     torch.float64)[3]]
        wanted = [mta_ref.multi_token_attention(*layer.inputs, **layer.weights) for layer in layers]
        self.assertTrue(all(conformance.distance(copy, want) < 1e-12
                            for copy, want in zip(conformance.copies_of((), layers), wanted)))
        for detail in conformance.DETAILS:
            outputs = list(conformance.copies_of((detail,), layers))
            least = 3e-6 if "eps" in detail else 1e-3
            self.assertGreater(max(conformance.distance(copy, want) for copy, want in zip(outputs, wanted)), least,
                               detail)
            for other, theirs in seen.items():
                self.assertGreater(max(conformance.distance(copy, their) for copy, their in zip(outputs, theirs)),
                                   min(least, 3e-6 if "eps" in other else 1e-3), f"{detail} and {other}")
            seen[detail] = outputs

    def test_entry_points_of_the_reference(self):
        """dev/ref: what is asked of it wrongly is said, not passed over or taken for a folder."""
        import make_golden
        import mta_ref

        with self.assertRaisesRegex(TypeError, "kq_conv_layer: no such field"):
            mta_ref.make_config(kq_conv_layer=[1])
        for _, _, fields in make_golden.CASES.values():
            mta_ref.make_config(**fields)
        out = os.path.join(self.folder.name, "out")
        for arguments, wanted in ((["--help", "1"], "make_golden.py OUTDIR SEED CASE"), (["--check"], "--check DIR"),
                                  ([out, "1", "mta"], "mta: no such case, wanted one of mha, paper")):
            done = call(make_golden, *arguments)
            self.assertEqual((done.returncode, os.path.exists(arguments[0])), (1, False), done.stderr)
            self.assertIn(wanted, done.stderr)

    @unittest.skipUnless(os.path.exists(os.path.join(BIN, "test_mta")), "test_mta is not built")
    def test_cases_of_test_mta(self):
        """Those that test_mta --write writes, in fp32, with all of config.json."""
        folder = self.cases("written")
        subprocess.run([os.path.join(BIN, "test_mta"), "--write", folder], check=True, stdout=subprocess.DEVNULL)
        done = self.run_on("--golden", folder, "--dtype", "float32")
        self.assertEqual((done.returncode, done.stdout.splitlines()[-1:]), (0, ["4 passed, 0 failed"]), done)

    def test_refusals(self):
        broken = os.path.join(self.folder.name, "broken.py")
        with open(broken, "w", encoding="utf-8") as f:
            f.write("raise RuntimeError('wants\\na GPU')\n")
        for name, wanted in ((broken + ":f", "RuntimeError: wants a GPU"),
                             (self.module + ":not_a_function", "a int, wanted a function"),
                             ("no_colon", "wanted MODULE:FUNCTION"), (self.module + ":absent", "absent"),
                             ("no_such_module_here:f", "No module named")):
            done = self.run_on(name)
            self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
            self.assertIn(wanted, done.stderr)


if __name__ == "__main__":
    main()
