#!/usr/bin/env python3
"""Tests of scripts/convert_ram.py: a model in the authors' form (interleaved RoPE, head kernels stored in, out),
computed in that form, equals the converted one under our reference; there and back is the identity, bit for bit; and
what --back writes has the keys and sizes that their code wants. Skips without PyTorch."""

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from argparse import Namespace

from helpers import GOLDEN, ROOT, call, main, read_bytes

sys.path.insert(0, os.path.join(ROOT, "dev", "ref"))
sys.path.insert(0, os.path.join(ROOT, "scripts"))
try:
    import torch
    import mta_ref
    import convert_ram
except ImportError:
    torch = None

MTA = {
    "use_mta": True, "query_kernel_size": 6, "key_kernel_size": 11, "pad_key": "both", "mta_layers": "1",
    "group_norm": True,
}
KINDS = {
    "first": dict(MTA, head_kernel_size=2, layer_norm_rescale=True),
    "released": dict(
        MTA, after_sm_query_kernel_size=6, after_sm_key_kernel_size=11, pre_sm_linear_head=True, head_kernel_size=4,
        add_gating=True,
    ),
    "linear": dict(MTA, pre_sm_linear_head=True, post_sm_linear_head=True),
    "plain": {"use_mta": False},
    "sparse": dict(MTA, add_gating=True),  # layer 0 has plain attention, and norm and gate all the same
    "norm": {"use_mta": False, "group_norm": True, "layer_norm_rescale": True, "add_gating": True},
}
TIED = "output.tied_module.weight"  # a tied model's second key of its embedding


def their_width(model):
    """Of the MLP there: two thirds of 4 times the model's, times a factor, rounded up to a multiple."""
    width, multiple = int(2 * (4 * model["dim"]) / 3), model.get("multiple_of", 256)
    if model.get("ffn_dim_multiplier") is not None:
        width = int(model["ffn_dim_multiplier"] * width)
    return (width + multiple - 1) // multiple * multiple


def tensors_of(folder):
    """name -> tensor of a model of ours."""
    return convert_ram.load_tensors(convert_ram.read_tensors(folder, ["model.safetensors"], None))


def their_state(mta, seed):
    """A random model of two layers in the authors' names and shapes."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g) * 0.2
    s = {"tok_embeddings.weight": r(61, 32), "norm.weight": 1 + r(32)}
    for i in range(2):
        a = "layers.%d.attention." % i
        s.update(
            {
                a + "wq.weight": r(32, 32),
                a + "wk.weight": r(32, 32),
                a + "wv.weight": r(32, 32),
                a + "wo.weight": r(32, 32),
            }
        )
        if i == 1 and mta.get("query_kernel_size"):
            s[a + "mta_kernel"] = r(4, 1, 6, 11)
        if i == 1 and mta.get("after_sm_query_kernel_size"):
            s[a + "mta_kernel_after_sm"] = r(4, 1, 6, 11)
        if mta.get("pre_sm_linear_head"):
            s[a + "wpsm.weight"] = r(4, 4)
        if mta.get("post_sm_linear_head"):
            s[a + "wposm.weight"] = r(4, 4)
        if mta.get("head_kernel_size"):
            n = mta["head_kernel_size"]
            s[a + "head_kernel"] = r(4 // n, n, n)
        if mta.get("group_norm"):
            s[a + "subln.weight"] = 1 + r(8)
        if mta.get("add_gating"):
            s.update({a + "gate.weight": r(1, 8), a + "gate.bias": r(1)})
        f = "layers.%d.feed_forward." % i
        s.update({f + "w1.weight": r(48, 32), f + "w3.weight": r(48, 32), f + "w2.weight": r(32, 48)})
        s.update({"layers.%d.attention_norm.weight" % i: 1 + r(32), "layers.%d.ffn_norm.weight" % i: 1 + r(32)})
    return s


def their_attention(x, s, i, mta, theta):
    """Written from the equations in the authors' conventions; x (T, 32)."""
    T, a = x.shape[0], "layers.%d.attention." % i
    q, k, v = ((x @ s[a + n].T).view(T, 4, 8) for n in ("wq.weight", "wk.weight", "wv.weight"))
    turn = torch.polar(
        torch.ones(T, 4, dtype=torch.float64),
        torch.outer(torch.arange(T).double(), theta ** (-torch.arange(0, 8, 2).double() / 8)),
    )
    q, k = (
        torch.view_as_real(torch.view_as_complex(z.double().reshape(T, 4, 4, 2)) * turn[:, None]).reshape(T, 4, 8)
        for z in (q, k)
    )
    scores = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    mask = torch.ones(T, T).triu(1).bool()
    conv = lambda z, w: torch.nn.functional.conv2d(
        torch.nn.functional.pad(z.masked_fill(mask, 0)[None], (5, 5, 5, 0)), w, groups=4
    )[0]
    if a + "mta_kernel" in s:
        scores = conv(scores, s[a + "mta_kernel"])
    if a + "wpsm.weight" in s:
        scores = torch.einsum("on,nij->oij", s[a + "wpsm.weight"], scores)
    p = scores.masked_fill(mask, float("-inf")).softmax(-1)
    if a + "mta_kernel_after_sm" in s:
        p = conv(p, s[a + "mta_kernel_after_sm"]).masked_fill(mask, 0)
    if a + "wposm.weight" in s:
        p = torch.einsum("on,nij->oij", s[a + "wposm.weight"], p)
    if a + "head_kernel" in s:
        w = s[a + "head_kernel"]
        p = torch.einsum("gnij,gno->goij", p.view(w.shape[0], w.shape[1], T, T), w).reshape(4, T, T)
    o = torch.einsum("hij,jhd->ihd", p, v)
    if a + "subln.weight" in s:
        o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-5) * s[a + "subln.weight"]
        if mta.get("layer_norm_rescale"):
            o = o * (1 - (0.8 - 0.6 * torch.exp(torch.tensor(-0.3 * i, dtype=torch.float64))))
    if a + "gate.weight" in s:
        o = o * torch.sigmoid(o @ s[a + "gate.weight"].T + s[a + "gate.bias"])
    return o.reshape(T, 32) @ s[a + "wo.weight"].T


def their_logits(ids, state, mta, theta):
    s = {k: v.double() for k, v in state.items()}
    norm = lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w
    x = s["tok_embeddings.weight"][ids]
    for i in range(2):
        x = x + their_attention(norm(x, s["layers.%d.attention_norm.weight" % i]), s, i, mta, theta)
        f, h = "layers.%d.feed_forward." % i, norm(x, s["layers.%d.ffn_norm.weight" % i])
        x = x + (torch.nn.functional.silu(h @ s[f + "w1.weight"].T) * (h @ s[f + "w3.weight"].T)) @ s[f + "w2.weight"].T
    return norm(x, s["norm.weight"]) @ s["tok_embeddings.weight"].T


@unittest.skipIf(torch is None, "no PyTorch here")
class Convert(unittest.TestCase):
    def test_there_and_back(self):
        for seed, (kind, mta) in enumerate(KINDS.items()):
            with tempfile.TemporaryDirectory() as tmp:
                state = their_state(mta, seed)
                state[TIED] = state["tok_embeddings.weight"]
                params = {
                    "model": {
                        "dim": 32, "n_layers": 2, "n_heads": 4, "rope_theta": 5000.0, "norm_eps": 1e-5,
                        "weight_tying": True, "mta": mta,
                    },
                    "data": {"seq_len": 64},
                }
                paths = [os.path.join(tmp, x) for x in ("ram", "ours", "back", "again")]
                os.makedirs(paths[0])
                torch.save({"model": state}, os.path.join(paths[0], "consolidated.pth"))
                with open(os.path.join(paths[0], "params.json"), "w") as f:
                    json.dump(params, f)
                for args in ([paths[0], paths[1]], ["--back", paths[1], paths[2]], [paths[2], paths[3]]):
                    done = call(convert_ram, *args)
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
                done = call(convert_ram, *args)
                self.assertEqual(done.returncode, 1)
                self.assertIn("model.safetensors is there already", done.stderr)
                with open(os.path.join(paths[1], "config.json")) as f:
                    config = json.load(f)
                self.assertEqual(config["max_position_embeddings"], 64)
                weights = {k: v.double() for k, v in tensors_of(paths[1]).items()}
                shapes = {k: tuple(v.shape) for k, v in weights.items()}
                self.assertEqual(dict(mta_ref.names_and_shapes(config)), shapes)
                ids = torch.randint(0, 61, (23,), generator=torch.Generator().manual_seed(seed))
                want, got = their_logits(ids, state, mta, 5000.0), mta_ref.forward(ids[None], weights, config)[0]
                self.assertLess((want - got).abs().max().item(), 1e-9 * want.abs().max().item(), kind)
                with open(os.path.join(paths[2], "params.json")) as f:
                    model = json.load(f)["model"]
                back = convert_ram.load_state(os.path.join(paths[2], "consolidated.pth"))
                self.assertEqual(set(back), {TIED, *their_state(model["mta"], 0)}, kind)  # of a strict load
                self.assertEqual(their_width(model), 48)
                for name in set(back) & set(state):
                    self.assertTrue(torch.equal(back[name], state[name]), name)
                got = their_logits(ids, back, model["mta"], model["rope_theta"])
                self.assertLess((want - got).abs().max().item(), 1e-9 * want.abs().max().item(), kind)
                again = tensors_of(paths[3])
                for name, t in tensors_of(paths[1]).items():
                    self.assertTrue(torch.equal(t, again[name]), name)

    def test_a_tied_head(self):
        """A second key there, which must be the embedding; stored once."""
        state = their_state({}, 1)
        model = {"dim": 32, "n_heads": 4, "weight_tying": True}
        for head, why in ((state["tok_embeddings.weight"].clone(), ""), (torch.zeros(61, 32), TIED + " is another")):
            with tempfile.TemporaryDirectory() as tmp:
                ours, back = os.path.join(tmp, "ours"), os.path.join(tmp, "back")
                with open(os.path.join(tmp, "params.json"), "w") as f:
                    json.dump(model, f)
                torch.save(dict(state, **{TIED: head}), os.path.join(tmp, "consolidated.pth"))
                done = call(convert_ram, tmp, ours)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1) if why else (0, 0), done.stderr)
                self.assertIn(why, done.stderr)
                self.assertEqual(os.path.exists(ours), not why)
                if not why:
                    self.assertEqual(call(convert_ram, "--back", ours, back).returncode, 0)
                    again = convert_ram.load_state(os.path.join(back, "consolidated.pth"))
                    self.assertEqual(again[TIED].data_ptr(), again["tok_embeddings.weight"].data_ptr())
        state["output.weight"] = torch.ones(61, 32)
        tensors, config = convert_ram.to_ours(state, dict(model, weight_tying=False))
        again, params = convert_ram.to_theirs(tensors, config)
        self.assertEqual((set(again), params["weight_tying"]), (set(state), False))

    def test_the_width_there_is_ours(self):
        """Of every preset, and of widths below and above the usual one, down to 1: a factor of 1 / 98 times 98 is
        0 there."""
        text = read_bytes(os.path.join(ROOT, "mta", "config.h")).decode()
        presets = re.findall(r'^    \{"(\w+)", (\d+), \d+, \d+, (\d+), \d+', text, re.M)
        names = re.search(r'#define MODEL_NAMES "(.*)"', text)[1].split(", ")
        self.assertEqual([name for name, _, _ in presets], names)
        sizes = [(int(dim), int(hidden)) for _, dim, hidden in presets]
        sizes += [(4096, 11008), (4096, 14336), (37, 1)]
        sizes += [(dim, hidden) for dim in (2, 32, 37, 100) for hidden in range(1, 4 * dim)]
        for dim, hidden in sizes:
            config = {"vocab_size": 1, "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": 0,
                      "num_attention_heads": 1}
            model = convert_ram.to_theirs({"model.embed_tokens.weight": torch.zeros(1, dim)}, config)[1]
            self.assertEqual(their_width(model), hidden, model)

    def test_back_names_what_generate_reads(self):
        """The form of the weights, and the tokenizer where the code there has it; else it is said why not."""
        tensors = convert_ram.to_ours(their_state({}, 1), {"dim": 32, "n_heads": 4, "weight_tying": True})[0]
        base = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True,
                "max_position_embeddings": 96}
        ranks = "gpt2.tiktoken"
        forms = (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
        for i, (more, name, why) in enumerate((
                ({"tokenizer": "bytes"}, "bytes", ""), ({"tokenizer": "toy"}, "char", ""),
                ({"tokenizer": ranks, "tokenizer_pattern": "llama3"}, "tiktoken", ""),
                ({"tokenizer": ranks}, None, "gpt2.tiktoken is split as gpt2, theirs as llama3"),
                ({"tokenizer": "lost"}, None, "lost: no such file"), ({}, None, "config.json names none"))):
            form, dtype = forms[i % 3]
            with tempfile.TemporaryDirectory() as tmp:
                with open(os.path.join(tmp, "config.json"), "w") as f:
                    json.dump(dict(base, **more), f)
                with open(os.path.join(tmp, ranks), "wb") as f:
                    f.write(read_bytes(os.path.join(GOLDEN, "tokenizers", ranks)))
                state = {name: t.to(dtype) for name, t in tensors.items()}
                convert_ram.write_safetensors(os.path.join(tmp, "model.safetensors"), state)
                done = call(convert_ram, "--back", tmp, os.path.join(tmp, "out"))
                self.assertEqual((done.returncode, done.stderr, done.stdout.count("\n")), (0, "", 1))
                self.assertEqual("params.json names no tokenizer" in done.stdout, bool(why), done.stdout)
                self.assertIn(why, done.stdout)
                with open(os.path.join(tmp, "out", "params.json")) as f:
                    params = json.load(f)
                path = os.path.join(tmp, ranks) if name == "tiktoken" else None
                self.assertEqual(params["data"], {"seq_len": 96, "tokenizer": {"name": name, "path": path}})
                self.assertEqual(params["distributed"], {"model_dtype": form})

    def test_ids_that_end_a_text(self):
        """Those of the rank file, or none; of a plain model too, whose texts would end at the id 2, LLaMA's default."""
        ranks = os.path.join(GOLDEN, "tokenizers", "gpt2.tiktoken")
        with tempfile.TemporaryDirectory() as tmp:
            with open(os.path.join(tmp, "params.json"), "w") as f:
                json.dump({"dim": 32, "n_heads": 4, "weight_tying": True}, f)
            state = their_state({}, 1)
            wide = {name: torch.zeros(50400, 32) for name in ("tok_embeddings.weight", *convert_ram.TIED)}
            torch.save(dict(state, **{k: v for k, v in wide.items() if k in state}),
                       os.path.join(tmp, "consolidated.pth"))
            for more, want in (([], (None, None, None)), (["--tokenizer", ranks], (50256, 50256, None)),
                               (["--tokenizer", ranks, "--pattern", "cl100k_base"], (50257, 50257, "cl100k_base"))):
                out = os.path.join(tmp, "out%d" % len(more))
                self.assertEqual(call(convert_ram, tmp, out, *more).stderr, "")
                with open(os.path.join(out, "config.json")) as f:
                    config = json.load(f)
                self.assertEqual(config["model_type"], "llama")
                got = config["bos_token_id"], config["eos_token_id"], config.get("tokenizer_pattern")
                self.assertEqual(got, want)
            done = call(convert_ram, tmp, os.path.join(tmp, "more"), "--pattern", "llama3")
            self.assertIn("no use without --tokenizer", done.stderr)
            self.assertEqual((done.returncode, os.path.exists(os.path.join(tmp, "more"))), (1, False))

    def test_tokenizer_of_params_json(self):
        """The one that the authors' params.json names, the rank file beside the weights too; else it is said why not.
        What --back writes comes back."""
        ranks = read_bytes(os.path.join(GOLDEN, "tokenizers", "gpt2.tiktoken"))
        tensors = their_state({}, 1)
        with tempfile.TemporaryDirectory() as tmp:
            def convert(vocab, tokenizer, *more):
                with open(os.path.join(tmp, "params.json"), "w") as f:
                    json.dump({"model": {"dim": 32, "n_heads": 4, "weight_tying": True}, "data": tokenizer}, f)
                wide = {name: torch.zeros(vocab, 32) if name in ("tok_embeddings.weight", *convert_ram.TIED) else t
                        for name, t in tensors.items()}
                torch.save(wide, os.path.join(tmp, "consolidated.pth"))
                out = tempfile.mkdtemp(dir=tmp)
                done = call(convert_ram, tmp, out, *more)
                self.assertEqual((done.returncode, done.stderr, done.stdout.count("\n")), (0, "", 1), done.stderr)
                with open(os.path.join(out, "config.json")) as f:
                    config = json.load(f)
                keys = "tokenizer", "bos_token_id", "eos_token_id", "tokenizer_pattern"
                return [config.get(k) for k in keys], done.stdout, out

            named = lambda name, path=None: {"tokenizer": {"name": name, "path": path}}
            nothing = [None] * 4
            lost = "/home/somebody/tokenizer.model"
            for vocab, tokenizer, want, said in (
                    (259, named("bytes"), ["bytes", 256, 257, None], "; tokenizer bytes\n"),
                    (32, named("char"), ["toy", 29, 30, None], "; tokenizer toy\n"),
                    (258, named("bytes"), nothing, "bytes has 259 ids here, the model's vocabulary 258"),
                    (300, named("sp"), nothing, "sp of params.json has no counterpart here"),
                    (300, named("tiktoken", lost), nothing, lost + ", which params.json names, is neither there nor"),
                    (300, named("tiktoken"), nothing, "no counterpart"), (300, {}, nothing, "params.json names none"),
                    (300, {"tokenizer": "bytes"}, nothing, "params.json names none"),
                    (300, [], nothing, "params.json names none")):
                got, printed, out = convert(vocab, tokenizer)
                self.assertEqual(got, want, tokenizer)
                self.assertIn(said, printed)
            with open(os.path.join(tmp, "tokenizer.model"), "wb") as f:
                f.write(ranks)
            got, _, out = convert(50600, named("tiktoken", lost))
            self.assertEqual(got, ["tokenizer.model", 50256, 50257, "llama3"])
            self.assertEqual(read_bytes(os.path.join(out, "tokenizer.model")), ranks)
            back, again = os.path.join(tmp, "back"), os.path.join(tmp, "again")
            self.assertEqual(call(convert_ram, "--back", out, back).stderr, "")
            self.assertEqual(call(convert_ram, back, again).stderr, "")
            self.assertEqual(*(read_bytes(os.path.join(d, "config.json")) for d in (out, again)))
            got, printed, _ = convert(300, named("tiktoken", lost), "--tokenizer", "bytes")
            self.assertEqual((got[0], got[3]), ("bytes", None))
            given, other = os.path.join(tmp, "given.model"), os.path.join(tmp, "other.model")
            for path, data in ((given, ranks), (other, ranks.replace(b" 5\n", b" -\n").replace(b" 6\n", b" 5\n")
                                               .replace(b" -\n", b" 6\n"))):
                with open(path, "wb") as f:
                    f.write(data)
            same = convert(50600, named("tiktoken", lost), "--tokenizer", given, "--pattern", "llama3")[0]
            self.assertEqual(same, ["given.model", 50256, 50257, "llama3"])
            for words, why in ((["bytes"], "params.json names"), ([given, "--pattern", "cl100k_base"], "is another"),
                               ([other, "--pattern", "llama3"], "is another"), ([""], 'got "", wanted NAME|FILE')):
                done = call(convert_ram, tmp, os.path.join(tmp, "no"), "--tokenizer", *words)
                self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
                self.assertIn(why, done.stderr)
                self.assertFalse(os.path.exists(os.path.join(tmp, "no")))
            with open(os.path.join(tmp, "params.json"), "w") as f:
                json.dump({"dim": 32, "n_heads": 4, "weight_tying": True}, f)
            torch.save(tensors, os.path.join(tmp, "consolidated.pth"))
            done = call(convert_ram, tmp, os.path.join(tmp, "no"), "--tokenizer", "bytes")
            self.assertIn("--tokenizer: bytes has 259 ids, the model's vocabulary 61", done.stderr)

    def test_as_a_program(self):
        """Started by its path, as a user does: one line of what is wrong."""
        script = os.path.join(ROOT, "scripts", "convert_ram.py")
        done = subprocess.run([sys.executable, script, "none", "out"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
        self.assertIn("none", done.stderr)

    def test_a_damaged_checkpoint(self):
        """What its manifest says of the files holds on the way back too."""
        with tempfile.TemporaryDirectory() as tmp:
            for name in ("config.json", "model.safetensors"):
                with open(os.path.join(tmp, name), "w") as f:
                    f.write("{}")
            with open(os.path.join(tmp, "manifest.json"), "w") as f:
                json.dump({"files": {"model.safetensors": {"bytes": 2, "crc32": 5}}}, f)
            done = call(convert_ram, "--back", tmp, os.path.join(tmp, "out"))
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn("model.safetensors: damaged", done.stderr)

    def test_back_takes_all_of_a_model_and_nothing_else(self):
        """A model that lacks a tensor, whose head is another than its embedding, that was edited or that computes
        otherwise was written as if it were whole and a LLaMA of theirs."""
        plain = {"model_type": "llama", "attention_type": "mta"}
        base = dict(plain, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, tie_word_embeddings=True)
        tensors = convert_ram.to_ours(their_state({}, 1), {"dim": 32, "n_heads": 4, "weight_tying": True})[0]
        missing = {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}
        for more, state, why in (({}, tensors, ""), ({"tokenizer": "bytes", "head_dim": 8}, tensors, ""),
                                 ({}, missing, "tensor model.layers.1.mlp.up_proj.weight is missing"),
                                 ({}, dict(tensors, **{"lm_head.weight": torch.zeros(61, 32)}), "is another than"),
                                 ({"num_key_value_heads": 2}, tensors, "k_proj.weight: got [32, 32], wanted [16, 32]"),
                                 ({"hidden_act": "gelu"}, tensors, 'hidden_act: got "gelu"'),
                                 ({"sliding_window": 512}, tensors, "what the key sliding_window does"),
                                 ({"model_type": "mistral"}, tensors, "model_type mistral"),
                                 ({"model_type": "mta", "head_gate": True},
                                  dict(tensors, **{"model.layers.%d.self_attn.head_gate.%s" % (i, n): torch.ones(size)
                                                   for i in (0, 1) for n, size in (("weight", 8), ("bias", 1))}),
                                  "")):
            with tempfile.TemporaryDirectory() as tmp:
                with open(os.path.join(tmp, "config.json"), "w") as f:
                    json.dump(dict(base, **more), f)
                convert_ram.write_safetensors(os.path.join(tmp, "model.safetensors"), state)
                done = call(convert_ram, "--back", tmp, os.path.join(tmp, "out"))
                self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1) if why else (0, 0), done.stderr)
                self.assertIn(why, done.stderr)
                self.assertEqual(os.path.exists(os.path.join(tmp, "out")), not why)
                self.assertEqual("names no tokenizer" in done.stdout, not why and "tokenizer" not in more)

    def test_refuses_what_it_cannot_read_or_would_pass_over(self):
        with tempfile.TemporaryDirectory() as tmp:
            path, out = os.path.join(tmp, "consolidated.pth"), os.path.join(tmp, "out")
            with open(os.path.join(tmp, "params.json"), "w") as f:
                f.write("{}")
            for data, why in ((b"", "does not read it"), (b"PK\3\4" + bytes(90), "does not read it"), (None, "a list")):
                if data is None:
                    torch.save([1], path)
                else:
                    with open(path, "wb") as f:
                        f.write(data)
                done = call(convert_ram, tmp, out)
                self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
                self.assertIn(why, done.stderr)
            for params in ("[]", '{"model": 1}'):
                with open(os.path.join(tmp, "params.json"), "w") as f:
                    f.write(params)
                done = call(convert_ram, tmp, out)
                said = "convert_ram.py: params.json: wanted an object with the model's parameters\n"
                self.assertEqual((done.returncode, done.stderr), (1, said))
            for more in (["--dtype", "bf16"], ["--tokenizer", path]):
                done = call(convert_ram, "--back", tmp, out, *more)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
                self.assertIn("no use beside --back", done.stderr)

    def test_a_part_of_a_model_is_none(self):
        """Each tensor that is missing, and each that params.json says otherwise of: with a kernel less a layer was a
        plain one, without a word."""
        for kind, mta in KINDS.items():
            state, model = their_state(mta, 1), {"dim": 32, "n_heads": 4, "weight_tying": True, "mta": mta}
            convert_ram.to_ours(state, model)
            for name in state:
                with self.subTest(kind, without=name), self.assertRaises((convert_ram.UserError, KeyError)):
                    convert_ram.to_ours({n: t for n, t in state.items() if n != name}, model)
            missing = {n: t for n, t in state.items() if not re.search("kernel|wpsm|wposm", n)}
            if len(missing) < len(state):
                with self.subTest(kind), self.assertRaisesRegex(convert_ram.UserError, "^params.json: .* but the"):
                    convert_ram.to_ours(missing, model)
        for more, why in (({"n_kv_heads": 2}, "k_proj.weight, as it is called here, is .32, 32., wanted .16, 32."),
                          ({"mta": dict(MTA, mta_layers="0")}, r"mta_kernel in the layers .0., but .* have it in .1."),
                          ({"mta": dict(MTA, mta_layers=None)}, r"in the layers .0, 1., but .* have it in .1."),
                          ({"mta": dict(MTA, head_kernel_size=2)}, "head_kernel_size is set, but .* mix no heads"),
                          ({"n_heads": "4"}, 'n_heads: got "4", wanted a number'),
                          ({"rope_theta": None}, "rope_theta: got null, wanted a number")):
            with self.assertRaisesRegex(convert_ram.UserError, why):
                convert_ram.to_ours(their_state(MTA, 1), dict({"dim": 32, "n_heads": 4, "weight_tying": True,
                                                               "mta": MTA}, **more))

    def test_kinds_of_numbers(self):
        """Parameters are tensors; doubles want --dtype; what is quantised, or none, is refused."""
        state, first = their_state({}, 1), "norm.weight"
        kept = {n: torch.nn.Parameter(t) for n, t in state.items()}
        for more, options, why in (
            ({}, (), ""), (kept, (), ""), (kept, ("--dtype", "bf16"), ""),
            ({first: state[first].double()}, (), "model.norm.weight, as it is called here, is float64: --dtype"),
            ({first: state[first].double()}, ("--dtype", "f32"), ""),
            ({first: state[first].to(torch.int8)}, ("--dtype", "f32"), "tensor norm.weight: got int8, wanted"),
            ({first: [1.0] * 32}, (), "tensor norm.weight: got list, wanted"),
            ({1: torch.zeros(1)}, (), "tensor 1 is unknown"),
            ({"args": Namespace()}, (), "it holds argparse.Namespace too"),
        ):
            with self.subTest(why, options=options), tempfile.TemporaryDirectory() as tmp:
                with open(os.path.join(tmp, "params.json"), "w") as f:
                    json.dump({"dim": 32, "n_heads": 4, "weight_tying": True}, f)
                torch.save({**state, **more}, os.path.join(tmp, "consolidated.pth"))
                done = call(convert_ram, tmp, os.path.join(tmp, "out"), *options)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1) if why else (0, 0), done.stderr)
                self.assertIn(why, done.stderr)

    def test_refuses_what_has_no_counterpart(self):
        with self.assertRaisesRegex(convert_ram.UserError, "sliding_window"):
            convert_ram.to_ours({}, {"dim": 32, "n_heads": 4, "sliding_window": 512})
        for more in ({"use_scaled_rope": True}, {"mta": {"pad_query": "left"}}):  # the first is Llama 3.1's own
            with self.assertRaisesRegex(convert_ram.UserError, "key (use_scaled_rope|pad_query)"):
                convert_ram.to_ours(their_state({}, 1), dict({"dim": 32, "n_heads": 4, "weight_tying": True}, **more))
        model = {"dim": 32, "n_heads": 4, "weight_tying": True, "use_scaled_rope": False}
        self.assertEqual(convert_ram.to_ours(their_state({}, 1), model)[1]["model_type"], "llama")
        for bad in ({"curse_norm": True}, {"pad_key": "left"}, {"add_gating": True, "gate_1d": False}):
            with self.assertRaisesRegex(convert_ram.UserError, "curse_norm, gate_1d false and pad_key"):
                convert_ram.to_ours({}, {"dim": 32, "n_heads": 4, "mta": bad})
        both = their_state(dict(KINDS["linear"], head_kernel_size=2), 1)
        model = {"dim": 32, "n_heads": 4, "weight_tying": True, "mta": KINDS["linear"]}
        with self.assertRaisesRegex(convert_ram.UserError, "a second one for model.layers.0.self_attn.head_mix.weight"):
            convert_ram.to_ours(both, model)
        mixed = their_state({"head_kernel_size": 2}, 1)
        mixed["layers.1.attention.head_kernel"] = torch.zeros(1, 4, 4)
        with self.assertRaisesRegex(convert_ram.UserError, "head mixings of different sizes .2 and 4."):
            convert_ram.to_ours(mixed, dict(model, mta={}))
        with self.assertRaisesRegex(convert_ram.UserError, "output.weight is missing"):
            convert_ram.to_ours(their_state({}, 1), dict(model, weight_tying=False, mta={}))
        with self.assertRaisesRegex(convert_ram.UserError, r"mta_kernel: its shape .4, 1, 6, 11. does not fit 8 heads"):
            convert_ram.to_ours(their_state(KINDS["first"], 1), dict(model, n_heads=8))
        embedding = {name: t for name, t in their_state({}, 1).items() if not name.startswith("layers.")}
        with self.assertRaisesRegex(convert_ram.UserError, "no tensor of a layer in it, wanted layers.0. and so on"):
            convert_ram.to_ours(embedding, dict(model, mta={}))
        for key in ("n_layers", "dim"):  # a part of a model is none
            with self.assertRaisesRegex(convert_ram.UserError, key + " 64, but the tensors have (2|32)$"):
                convert_ram.to_ours(their_state({}, 1), dict(model, mta={}, head_dim=8, **{**{"dim": 32}, key: 64}))
        for key in ("rope_scaling", "rope_parameters"):
            for rope in ({"rope_type": "llama3", "rope_theta": 5e5}, {"factor": 8.0}, "llama3"):
                with self.assertRaisesRegex(convert_ram.UserError, key + " has no counterpart"):
                    convert_ram.to_theirs({}, {"hidden_size": 32, "num_attention_heads": 4, key: rope})
            saved = {key: {"rope_type": "default", "rope_theta": 5e5}}  # as transformers saves it
            self.assertEqual(convert_ram.rope_theta(saved), 5e5)
            with self.assertRaisesRegex(convert_ram.UserError, "rope_theta: got 10000 and 500000, wanted one"):
                convert_ram.rope_theta(dict(saved, rope_theta=10000))
        with self.assertRaisesRegex(convert_ram.UserError, "output.weight is another than tok_embeddings.weight"):
            convert_ram.to_ours(dict(their_state({}, 1), **{"output.weight": torch.zeros(61, 32)}), dict(model, mta={}))
        for name in ("model.layers.0.self_attn.q_proj.bias", "model.rotary"):
            with self.assertRaisesRegex(convert_ram.UserError, name + " has no counterpart"):
                convert_ram.to_theirs({name: torch.zeros(32)}, {"hidden_size": 32, "num_attention_heads": 4})


if __name__ == "__main__":
    main()
