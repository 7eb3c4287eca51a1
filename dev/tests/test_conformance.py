"""dev/conformance.py: the reference passes, planted mistakes are named, and the copies of the definition are the
definition where nothing is wrong with them."""
import importlib.util
import os
import subprocess
import sys
import tempfile
import unittest

from helpers import ROOT, call, main

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
'''


@unittest.skipUnless(HAVE_TORCH, "no PyTorch (dev/.venv has it)")
class Conformance(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.module = os.path.join(cls.folder.name, "mistaken.py")
        with open(cls.module, "w", encoding="utf-8") as f:
            f.write(MISTAKEN)

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
            done = self.run_on(f"{self.module}:{function}")
            self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
            self.assertIn(sentence, done.stdout)
        self.assertNotIn("head mixing before the softmax is transposed",
                         self.run_on(f"{self.module}:transposed").stdout)

    def test_each_detail_is_told_from_the_others(self):
        """The copy with nothing wrong is the definition; each detail changes some golden case, and no two change all of
        them alike."""
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
                            for copy, want in zip(conformance.outputs_of((), layers), wanted)))
        for detail in conformance.DETAILS:
            outputs = conformance.outputs_of((detail,), layers)
            self.assertGreater(max(conformance.distance(copy, want) for copy, want in zip(outputs, wanted)), 1e-3,
                               detail)
            for other, theirs in seen.items():
                self.assertGreater(max(conformance.distance(copy, their) for copy, their in zip(outputs, theirs)), 1e-3,
                                   f"{detail} and {other}")
            seen[detail] = outputs

    def test_refusals(self):
        for name, wanted in (("no_colon", "wanted MODULE:FUNCTION"), (self.module + ":absent", "absent"),
                             ("no_such_module_here:f", "No module named")):
            done = self.run_on(name, program=name == "no_colon")
            self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
            self.assertIn(wanted, done.stderr)


if __name__ == "__main__":
    main()
