#!/usr/bin/env python3
"""scripts/export.py: what transformers computes with an exported checkpoint is what infer_mta computes with it.

    dev/.venv/bin/python dev/tests/test_export.py [--long] [-k PATTERN]     (MTA_BIN: folder of the binaries)

Logits, greedy text and token ids against infer_mta, gradients against the golden cases, evaluations by the real
lm-evaluation-harness against those of scripts/lm_eval_mta.py. --long: 100,000 strings for each tokenizer, not 1,000.
Without torch and transformers only what is written and refused is tested.
"""

import array
import contextlib
import glob
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from helpers import (
    BIN, GOLDEN, ROOT, call, floats, golden_checkpoint, main, read_bytes, read_safetensors, without_torch,
    write_safetensors, zip_all,
)

FOLDER = tempfile.TemporaryDirectory(prefix="test_export_")
os.environ.update(HF_HOME=os.path.join(FOLDER.name, "home"), HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_WAIT_POLICY="passive")
EXPORT = os.path.join(ROOT, "scripts", "export.py")
INFER, TRAINER = os.path.join(BIN, "infer_mta"), os.path.join(BIN, "train_mta")
RANKS = os.path.join(GOLDEN, "tokenizers")
sys.path.insert(0, os.path.join(ROOT, "scripts"))
import export  # noqa: E402

try:
    import torch
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

    transformers.utils.logging.disable_progress_bar()
    fields = transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
    CACHE = "cache" if "cache" in fields else "past_key_values"
except ImportError as e:
    torch, REASON = None, without_torch(e)
needs_torch = unittest.skipIf(torch is None, "" if torch else REASON)
LONG = "--long" in sys.argv
sys.argv = [a for a in sys.argv if a != "--long"]

SIZES = dict(
    vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=96, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=256, eos_token_id=257, tokenizer="bytes",
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
PRE, POST = dict(kq_conv_pre_softmax=True), dict(kq_conv_post_softmax=True)
CONV = dict(kq_conv_layers=[0, 2], kq_conv_query_size=6, kq_conv_key_size=11)
MTA = dict(CONV, **PRE, head_mix_post_softmax=2, head_norm="group_depth_scaled")
ALL = dict(head_mix_pre_softmax=4, head_mix_post_softmax=4)
MODELS = {
    "transformer": {},
    "mta": MTA,
    "mta-full": dict(CONV, **PRE, **POST, **ALL, head_norm="group", head_gate=True),
    "talking-heads": ALL,
    "diff": dict(attention_type="diff", head_norm="group_depth_scaled"),
    "toy": dict(PRE, kq_conv_layers=[0, 1, 2], kq_conv_query_size=2, kq_conv_key_size=9),
    "grouped heads, untied": dict(MTA, num_key_value_heads=2, tie_word_embeddings=False, head_gate=True),
    "after the softmax alone": dict(CONV, **POST, head_mix_pre_softmax=2),
    "tall and narrow": dict(CONV, **PRE, **POST, kq_conv_query_size=9, kq_conv_key_size=1),
    "flat and wide": dict(CONV, **PRE, **POST, kq_conv_query_size=1, kq_conv_key_size=5, head_norm="group"),
    "scaled RoPE": dict(MTA, rope_scaling=LLAMA3),
    "plain with scaled RoPE": dict(rope_scaling=LLAMA3, tie_word_embeddings=False, num_key_value_heads=2),
    "diff with grouped heads, no norm": dict(attention_type="diff", num_key_value_heads=2),
}
PLAIN = ("transformer", "plain with scaled RoPE")
IDS = random.Random(5).choices(range(256), k=60)


def run(*arguments, check=True, **more):
    """A program; scripts/export.py inside of this process."""
    if arguments[0] is export:
        done = call(*arguments)
    else:
        done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=600, **more)
    if check and done.returncode:
        raise AssertionError("%s: exit %d: %s" % (arguments, done.returncode, done.stderr[-2000:]))
    return done


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f)


def write_config(folder, config):
    write_json(os.path.join(folder, "config.json"), config)


def random_tensors(config):
    """Tensors of a model, far enough from where training starts that every one of them counts."""
    rng, tensors = random.Random(7), {}
    for name, shape in export.model_tensors(dict(export.ATTENTION, **config)).items():
        n, spread = math.prod(shape), 0.5 if "embed" in name else 1.3 * shape[-1] ** -0.5
        values = [spread * rng.gauss(0, 1) for _ in range(n)]
        if "kq_conv" in name or "head_mix" in name or "lambda" in name or "gate." in name and "proj" not in name:
            values = [0.3 * rng.gauss(0, 1) for _ in range(n)]
        if "kq_conv" in name:
            rows, keys = shape[1:]
            values = [x + (i % (rows * keys) == (rows - 1) * keys + keys // 2) for i, x in enumerate(values)]
        if "head_mix" in name:
            values = [x + (i // shape[1] % shape[1] == i % shape[1]) for i, x in enumerate(values)]
        if "norm.weight" in name:
            values = [1 + 0.1 * rng.gauss(0, 1) for _ in range(n)]
        tensors[name] = ("F32", shape, array.array("f", values).tobytes())
    return tensors


def checkpoint(name):
    """The folder of a model with random weights, and of its export; made once."""
    folder = os.path.join(FOLDER.name, "".join(c if c.isalnum() else "_" for c in name))
    if not os.path.exists(folder):
        plain = name in PLAIN
        config = dict(SIZES, model_type="llama" if plain else "mta")
        config.update(MODELS.get(name, {}), torch_dtype="float32")
        config["architectures"] = ["LlamaForCausalLM" if plain else "MtaForCausalLM"]
        os.mkdir(folder)
        write_config(folder, config)
        write_safetensors(os.path.join(folder, "model.safetensors"), random_tensors(config))
        run(export, folder, folder + "_out")
    return folder, folder + "_out"


def infer_logits(folder, ids):
    """A row of logits for each position."""
    out = os.path.join(FOLDER.name, "logits.safetensors")
    run(INFER, folder, "--token-ids", " ".join(map(str, ids)), "--logits", out, "--quiet")
    rows = floats(read_safetensors(out)[0]["logits"][2])
    return torch.tensor(rows).view(len(ids), -1)


def infer_greedy(folder, ids, count):
    options = ["--temperature", "0", "--max-tokens", count, "--quiet"]
    return [int(x) for x in run(INFER, folder, "--token-ids", " ".join(map(str, ids)), *options).stdout.split()]


def load(folder, **more):
    remote = os.path.exists(os.path.join(folder, "modeling_mta.py"))
    more = dict(dict(dtype=torch.float32), **more)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, **more).eval()


class Case(unittest.TestCase):
    def close_to(self, got, want, tolerance):
        self.assertEqual(got.shape, want.shape)
        worst = ((got - want).abs().max() / (want.abs().max() + 1e-9)).item()
        self.assertLessEqual(worst, tolerance)


@needs_torch
class Models(Case):
    def test_logits(self):
        """Dense, by chunks of queries, in pieces that the cache joins, behind padding: the same numbers as infer_mta's,
        which reads the export too."""
        x = torch.tensor([IDS])
        for name in MODELS:
            with self.subTest(name):
                folder, out = checkpoint(name)
                model = load(out)
                with torch.no_grad():
                    want = infer_logits(folder, IDS)
                    self.close_to(model(x).logits[0], want, 3e-5)
                    self.close_to(infer_logits(out, IDS), want, 0)
                    cache, pieces, at = DynamicCache(), [], 0
                    for n in (5, 1, 20, 1, 33):
                        part = x[:, at : at + n]
                        pieces.append(model(part, use_cache=True, **{CACHE: cache}).logits[0])
                        at += n
                    self.close_to(torch.cat(pieces), want, 3e-5)
                    short = torch.tensor([[258] * 9 + IDS[:51], IDS])
                    mask = (torch.arange(60) >= torch.tensor([[9], [0]])).long()
                    both = model(short, attention_mask=mask).logits
                    self.close_to(both[0, 9:], want[:51], 3e-5)
                    self.close_to(both[1], want, 3e-5)
                    if name not in PLAIN:
                        model.config.query_chunk = 7
                        self.close_to(model(x).logits[0], want, 3e-5)
                        self.close_to(model(short, attention_mask=mask).logits[0, 9:], want[:51], 3e-5)

    def test_greedy_text(self):
        """generate with its cache gives infer_mta's text, one prompt or two of different lengths at once; beams run."""
        for name in MODELS:
            with self.subTest(name):
                folder, out = checkpoint(name)
                model = load(out)
                prompts = IDS[:7], IDS[20:40]
                want = [infer_greedy(folder, p, 25) for p in prompts]
                options = dict(max_new_tokens=25, do_sample=False, pad_token_id=258)
                end = lambda ids: [i for i in ids.tolist() if i not in (257, 258)]
                for p, w in zip(prompts, want):
                    self.assertEqual(end(model.generate(torch.tensor([p]), **options)[0, len(p) :]), w)
                x = torch.tensor([[258] * 13 + prompts[0], prompts[1]])
                both = model.generate(x, attention_mask=(x != 258).long(), **options)
                self.assertEqual([end(row[20:]) for row in both], want)
                few = dict(options, max_new_tokens=5, num_beams=3)
                self.assertEqual(model.generate(x[1:], **few)[0, :20].tolist(), prompts[1])

    def test_fewer_layers_propose(self):
        """assistant_early_exit: the first layers propose tokens that all of them check; the text stays."""
        model, x = load(checkpoint("mta-full")[1]), torch.tensor([IDS[:20]])
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=258)
        want = model.generate(x, **options).tolist()
        self.assertEqual(model.generate(x, assistant_early_exit=1, **options).tolist(), want)
        self.assertEqual(model.config.num_hidden_layers, 3)

    def test_maps_under_autocast(self):
        """Convolutions and mixings stay in fp32, as the Trainer's bf16=True has it too."""
        model, seen = load(checkpoint("mta-full")[1]), set()
        for module in model.modules():
            if type(module).__name__ in ("KeyQueryConv", "HeadMix"):
                module.register_forward_hook(lambda module, given, out: seen.update((given[0].dtype, out.dtype)))
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.tensor([IDS]))
        self.assertEqual(seen, {torch.float32})

    def test_whatever_the_default_device_is(self):
        """torch.set_default_device("cuda") puts what names no device there; "meta" shows it on a CPU."""
        x, options = torch.tensor([IDS[:30]]), dict(max_new_tokens=4, do_sample=False, pad_token_id=258)
        for name in ("mta-full", "diff", "scaled RoPE"):
            with self.subTest(name):
                model = load(checkpoint(name)[1])
                model.config.query_chunk = 9
                want, text = model(x, labels=x), model.generate(x, **options).tolist()
                with torch.device("meta"):
                    got, again = model(x, labels=x), model.generate(x, **options).tolist()
                    got.loss.backward()
                self.close_to(got.logits, want.logits, 1e-6)
                self.assertEqual((got.loss.item(), again), (want.loss.item(), text))

    def test_a_cache_that_goes_on(self):
        """The whole text or its new tokens alone beside a cache that holds some: the text without one. A cache that has
        no token left to compute is refused."""
        x = torch.tensor([IDS[:40]])
        options = dict(max_new_tokens=6, do_sample=False, pad_token_id=258)
        for name in ("mta-full", "diff"):
            model = load(checkpoint(name)[1])
            want = model.generate(x, **options)[0, 40:].tolist()
            for held in (5, 25, 39):
                for given in (x, x[:, held:]):
                    with self.subTest(name, held=held, given=given.shape[1]):
                        cache = model(x[:, :held], use_cache=True)[CACHE]
                        more = dict(options, attention_mask=torch.ones_like(x), **{CACHE: cache})
                        self.assertEqual(model.generate(given, **more)[0, given.shape[1] :].tolist(), want)
            for held in (40, 45):
                cache = model(torch.tensor([IDS[:held]]), use_cache=True)[CACHE]
                with self.assertRaisesRegex(ValueError, "cache of %d tokens" % held):
                    model.generate(x, **dict(options, **{CACHE: cache}))
            vectors = model.model.embed_tokens(x)
            self.assertEqual(model.generate(inputs_embeds=vectors, **options)[0].tolist(), want)
            if CACHE == "cache":  # of transformers 5; 4 does not say which call is the first, and gives positions
                more = dict(options, cache=model(x[:, :25], use_cache=True).cache)
                self.assertEqual(model.generate(inputs_embeds=vectors, **more)[0].tolist(), want)
                cut = dict(options, prefill_chunk_size=16)
                self.assertEqual(model.generate(x, **cut)[0, 40:].tolist(), want)

    def test_gradients_of_the_golden_cases(self):
        """In double, so that only how the cases are rounded is left; dense, and by chunks, which are computed twice."""
        seen = 0
        for path in sorted(glob.glob(os.path.join(GOLDEN, "*.safetensors"))):
            name = os.path.basename(path)[:-12]
            with self.subTest(name):
                folder = os.path.join(FOLDER.name, "golden_" + name)
                config, _ = golden_checkpoint(path, folder)
                plain = name == "mha"
                write_config(folder, dict(config, model_type="llama" if plain else "mta"))
                run(export, folder, folder + "_out")
                tensors, _ = read_safetensors(path)
                values = (
                    lambda n: torch.frombuffer(bytearray(tensors[n][2]), dtype=torch.float32)
                    .view(tensors[n][1])
                    .double()
                )
                ids = lambda n: torch.frombuffer(bytearray(tensors[n][2]), dtype=torch.int32).view(tensors[n][1]).long()
                model = load(folder + "_out").double()
                for chunk in (512, 5) if not plain else (512,):
                    model.config.query_chunk = chunk
                    model.zero_grad()
                    logits = model(ids("golden.tokens")).logits
                    targets = ids("golden.targets").flatten()
                    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100).backward()
                    tolerance = 1e-5 if plain else 1e-6  # transformers' LLaMA normalises in fp32
                    self.close_to(logits, values("golden.logits"), tolerance)
                    for n, p in model.named_parameters():
                        self.close_to(p.grad, values("grad." + n), tolerance)
                        seen += 1
        self.assertGreater(seen, 500)

    def test_training(self):
        """The loss of labels is that of the next tokens; checkpointed layers give the same gradients; what is saved is
        a checkpoint for infer_mta, and for transformers again."""
        out = checkpoint("mta-full")[1]
        model, x = load(out).train(), torch.tensor([IDS[:40], IDS[20:]])
        labels = x.clone()
        labels[0, :5] = -100
        result = model(x, labels=labels)
        want = torch.nn.functional.cross_entropy(result.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        self.assertAlmostEqual(result.loss.item(), want.item(), places=5)
        result.loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model.config.query_chunk = 16
        model(x, labels=labels).loss.backward()
        for p, g in zip(model.parameters(), grads):
            self.close_to(p.grad, g, 1e-4)
        for again in (True, False):  # a layer that is computed twice would put its keys into a cache twice
            model.gradient_checkpointing_enable({"use_reentrant": again})
            with self.assertRaisesRegex(ValueError, "use_cache=False"):
                model(x, labels=labels, use_cache=True)
        model.gradient_checkpointing_disable()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
        saved = os.path.join(FOLDER.name, "saved")
        model.eval().save_pretrained(saved)
        with torch.no_grad():
            want = model(x[:1]).logits[0]
            self.close_to(infer_logits(saved, IDS[:40]), want, 3e-5)
            self.close_to(load(saved)(x[:1]).logits[0], want, 1e-6)
            run(export, saved, saved + "_bf16", "--bf16")
            again = load(saved + "_bf16", dtype="auto")
            self.assertEqual(again.dtype, torch.bfloat16)
            self.close_to(again(x[:1]).logits[0].float(), want, 0.1)
            request = json.dumps({"context_ids": IDS[:39], "continuation_ids": IDS[39:40]})
            answer = run(TRAINER, "--init-from", saved, "--score", "-", input=request).stdout
            self.assertAlmostEqual(json.loads(answer)["logprob"], want[38].log_softmax(-1)[IDS[39]].item(), delta=1e-3)

    def test_the_trainer_s_loss(self):
        """transformers' Trainer: a step in two batches of different lengths is one of all targets, not a mean of
        means, as for its own LLaMA and here; a smoothed loss is of the next tokens too."""
        try:
            trainer_of = transformers.Trainer
        except (ImportError, RuntimeError) as e:  # it needs accelerate
            self.skipTest(str(e).split("\n")[0])
        rows = [{"input_ids": IDS[:40], "labels": IDS[:40]}, {"input_ids": IDS[20:], "labels": [-100] * 30 + IDS[50:]}]
        places = [(i, t) for i, row in enumerate(rows) for t in range(39) if row["labels"][t + 1] >= 0]
        for name in ("transformer", "mta-full"):
            model = load(checkpoint(name)[1])
            with torch.no_grad():
                logs = model(torch.tensor([row["input_ids"] for row in rows])).logits.log_softmax(-1)
            right = -sum(logs[i, t, rows[i]["labels"][t + 1]] for i, t in places)
            even = -sum(logs[i, t].mean() for i, t in places)
            for smooth in (0.0, 0.1):
                with self.subTest(name, smooth=smooth):
                    arguments = transformers.TrainingArguments(
                        os.path.join(FOLDER.name, "trainer"), use_cpu=True, report_to=[], max_steps=1,
                        per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.0,
                        label_smoothing_factor=smooth, disable_tqdm=True, save_strategy="no",
                        dataloader_pin_memory=False,
                    )
                    trainer = trainer_of(model=model.train(), args=arguments, train_dataset=rows)
                    batch = {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}
                    want = (((1 - smooth) * right + smooth * even) / len(places)).item()
                    self.assertAlmostEqual(trainer.compute_loss(model, batch).item(), want, delta=1e-4)
                    if not smooth:  # transformers 4 takes the first label of a row for a target too
                        share = 1.0 if CACHE == "cache" else len(places) / (len(places) + 1)
                        with contextlib.redirect_stdout(io.StringIO()):
                            self.assertAlmostEqual(trainer.train().training_loss, share * want, delta=1e-4)

    def test_a_fresh_model_is_plain(self):
        """Without norm and gate, what a model starts with is the plain model; every layer's output can be had."""
        out = checkpoint("tall and narrow")[1]
        config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
        torch.manual_seed(1)
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
        plain = load(checkpoint("transformer")[1])
        missing = plain.load_state_dict(fresh.state_dict(), strict=False).missing_keys
        self.assertEqual([k for k in missing if k != "lm_head.weight"], [])
        self.assertAlmostEqual(fresh.model.layers[0].mlp.down_proj.weight.std().item(), 48**-0.5, delta=0.01)
        with torch.no_grad():
            got = fresh(torch.tensor([IDS]), output_hidden_states=True)
            self.close_to(got.logits, plain(torch.tensor([IDS])).logits, 1e-5)
            self.assertEqual(len(got.hidden_states), 4)
            body = AutoModel.from_pretrained(out, trust_remote_code=True)
            want = load(out)(torch.tensor([IDS]), output_hidden_states=True)
            self.close_to(body.eval()(torch.tensor([IDS])).last_hidden_state, want.hidden_states[-1], 1e-6)

    def test_what_a_checkpoint_lacks(self):
        """A plain model under the configuration of another attention: what that adds starts as in a new model. No
        module leaves a tensor of its own without values: it has a start."""
        plain, x = checkpoint("transformer")[1], torch.tensor([IDS])
        want = load(plain)(x).logits
        for name in MODELS:
            if name in PLAIN or MODELS[name].get("num_key_value_heads") or MODELS[name].get("rope_scaling"):
                continue
            with self.subTest(name):
                out = checkpoint(name)[1]
                config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
                model = type(load(out)).from_pretrained(plain, config=config, dtype=torch.float32).eval()
                if config.head_norm == "none" and not config.head_gate:
                    self.close_to(model(x).logits, want, 1e-5)
                for n, p in model.model.layers[0].self_attn.named_parameters():
                    if n in ("head_norm.weight", "head_gate.bias"):
                        self.assertTrue(torch.equal(p, torch.full_like(p, n == "head_norm.weight")), n)
                    elif n.startswith("lambda") or n == "head_gate.weight":
                        self.assertTrue(0.01 < p.std() < 1, n)
                gate, largest = model.model.layers[0].self_attn.head_gate if config.head_gate else None, []
                while gate and len(largest) < 500:  # of a normal that is not cut some of 4,000 lie beyond 3 sigma
                    gate.start()
                    largest.append(gate.weight.detach().abs().max().item())
                self.assertLessEqual(max(largest, default=0), 3.001 * gate.std if gate else 0)
                for module in model.modules():
                    own = list(module.parameters(recurse=False))
                    for loaded in (True, False):  # as transformers marks them
                        for p in own:
                            p.data.fill_(math.nan)
                            p._is_hf_initialized = loaded
                        model._init_weights(module)
                        self.assertTrue(all(p.isfinite().all() != loaded for p in own), type(module).__name__)

    def test_a_version_that_loses_the_head(self):
        """transformers 5.3.0 leaves the head of a model of its own code without values where it is the embedding."""
        for name, tied in (("mta", True), ("grouped heads, untied", False)):
            model = load(checkpoint(name)[1])
            refused = self.assertRaisesRegex(ImportError, "5.3.0") if tied else contextlib.nullcontext()
            seen = sys.modules[type(model).__module__].transformers
            with mock.patch.object(seen, "__version__", "5.3.0"), refused:
                type(model)(model.config)

    def test_weights_on_disk(self):
        """Whichever module's weights lie on the disk, or a hook changes: the head is called as the others are."""
        for name in ("mta", "grouped heads, untied"):
            folder, out = checkpoint(name)
            want = infer_logits(folder, IDS)
            for away in ("model.embed_tokens", "model.layers.0", "model.norm"):
                with self.subTest(name, away=away):
                    parts = ["model.embed_tokens", "model.norm", *("model.layers.%d" % i for i in range(3)), "lm_head"]
                    places = {part: "cpu" for part in parts}
                    places[away] = "disk"
                    places["lm_head"] = places["model.embed_tokens"]  # one tensor where they are tied
                    if CACHE != "cache" and name == "mta" and places["lm_head"] == "disk":
                        continue  # transformers 4 does not find it there, of its own models neither
                    model = load(out, device_map=places, offload_folder=tempfile.mkdtemp(dir=FOLDER.name))
                    self.close_to(model(torch.tensor([IDS])).logits[0].detach(), want, 3e-5)
            model = load(out)
            model.lm_head.register_forward_hook(lambda module, given, logits: logits + 1)
            self.close_to(model(torch.tensor([IDS])).logits[0].detach(), want + 1, 3e-5)

    def test_refused_by_the_model(self):
        model = load(checkpoint("mta")[1])
        x = torch.tensor([IDS[:4]])
        for mask, why in (
            ([[1, 0, 1, 1]], "padding between tokens"),
            ([[1, 1, 1]], "wanted (batch, 4)"),
            ([[[[1, 1, 1, 1]]]], "wanted (batch, 4)"),
            ([[1, 1, 2, 2]], "nothing else"),
            ([[0.0, 0.0, 0.0, -1e9]], "nothing else"),
        ):
            with self.assertRaises(ValueError) as e:
                model(x, attention_mask=torch.tensor(mask))
            self.assertIn(why, str(e.exception))
        rows = [model(x, logits_to_keep=keep).logits for keep in (0, 2, torch.tensor([2, 3]), torch.tensor([2]))]
        for got, want in zip(rows[1:], (rows[0][:, 2:], rows[0][:, 2:], rows[0][:, 2:3])):
            self.close_to(got, want, 1e-6)
        with self.assertRaises(TypeError):
            model(x, position_ids=torch.arange(4)[None])
        with self.assertRaisesRegex(ValueError, "position_ids"):
            model.generate(x, max_new_tokens=2, position_ids=torch.arange(4)[None])
        with self.assertRaisesRegex(ValueError, "wanted a DynamicCache"):
            model.generate(x, max_new_tokens=2, cache_implementation="static", disable_compile=True)
        config = type(model.config)(**dict(SIZES, **MTA))
        config.sliding_window = 2
        with self.assertRaisesRegex(ValueError, "drops tokens"):
            model(x, use_cache=True, **{CACHE: DynamicCache(config=config)})
        with self.assertRaisesRegex(ValueError, "output_attentions"):
            load(checkpoint("mta")[1], output_attentions=True)(x)
        for part in (model, model.model):  # PEFT's models pass it always
            self.assertTrue(torch.equal(part(x, output_attentions=None)[0], part(x)[0]))
            with self.assertRaisesRegex(ValueError, "output_attentions"):
                part(x, output_attentions=True)
        for bad, why in (
            (dict(attention_type="new"), "wanted mta or diff"),
            (dict(head_norm="x"), "wanted none or group"),
            (dict(kq_conv_key_size=4), "odd"),
            (dict(attention_type="diff"), "takes head_norm only"),
            (dict(kq_conv_layers=[0, 3]), "wanted layers from 0 to 2"),
            (dict(hidden_act="gelu"), "hidden_act: got 'gelu', wanted silu"),
            (dict(attention_bias=True), "attention_bias"),
            (dict(mlp_bias=True), "mlp_bias"),
            (dict(attention_dropout=0.1), "attention_dropout"),
            (dict(head_dim=16), "head_dim: got 16, wanted 8"),
        ):
            with self.assertRaisesRegex(ValueError, why):
                type(model.config)(**dict(SIZES, **dict(MTA, **bad)))
        with self.assertRaisesRegex(Exception, "even"):  # by transformers where it asks first
            type(model.config)(**dict(SIZES, hidden_size=36))
        for bad in (dict(attention_dropout=0.1), dict(kq_conv_layers=[7])):
            with self.assertRaisesRegex(ValueError, next(iter(bad))):
                load(checkpoint("mta")[1], **bad)
        for bad in ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "partial_rotary_factor": 0.5}):
            model.config.rope_parameters = dict(bad, rope_theta=1e4)
            with self.assertRaisesRegex(ValueError, "linear|partial_rotary_factor"):
                model(x)

    def test_bf16(self):
        """--bf16 rounds as PyTorch does, and transformers loads it as bf16."""
        folder, out = checkpoint("mta-full")
        small = out + "_bf16"
        run(export, folder, small, "--bf16")
        tensors = read_safetensors(os.path.join(folder, "model.safetensors"))[0]
        for name, (dtype, shape, data) in read_safetensors(os.path.join(small, "model.safetensors"))[0].items():
            want = torch.frombuffer(bytearray(tensors[name][2]), dtype=torch.float32).bfloat16()
            got = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
            self.assertTrue(
                dtype == "BF16" and tuple(shape) == tuple(tensors[name][1]) and torch.equal(got, want), name
            )
        self.close_to(load(small)(torch.tensor([IDS])).logits[0].detach(), infer_logits(small, IDS), 1e-4)
        model = load(small, dtype="auto")
        self.assertEqual(model.dtype, torch.bfloat16)
        self.close_to(model(torch.tensor([IDS])).logits[0].detach().float(), infer_logits(small, IDS), 0.1)


@needs_torch
class Tokenizers(Case):
    def tokenizer(self, file, pattern=None):
        """AutoTokenizer of an export whose checkpoint has this rank file."""
        folder = tempfile.mkdtemp(dir=FOLDER.name)
        config = dict(
            SIZES, model_type="mta", hidden_size=4, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1
        )
        config.update(
            head_gate=True, vocab_size=4, tokenizer=os.path.basename(file), bos_token_id=None, eos_token_id=None
        )
        write_config(folder, dict(config, tokenizer_pattern=pattern or ""))
        write_safetensors(os.path.join(folder, "model.safetensors"), random_tensors(config))
        shutil.copy(file, folder)
        run(export, folder, folder + "_out")
        return AutoTokenizer.from_pretrained(folder + "_out", trust_remote_code=True)

    def ids_of_infer(self, file, pattern, texts):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
        more = ["--pattern", pattern] if pattern else []
        out = run(INFER, "--tokenize", "--tokenizer", file, *more, input=lines).stdout
        return [[int(x) for x in line.split()] for line in out.split("\n")[:-1]]

    def test_ids(self):
        """The golden texts, random strings of all scripts, words that split nowhere: infer_mta's ids, and back."""
        import test_tokenizer

        rng, pools = random.Random(11), test_tokenizer.character_pools()
        with open(os.path.join(RANKS, "golden.jsonl"), encoding="utf-8") as f:
            golden = [json.loads(line) for line in f]
        texts = [test_tokenizer.random_text(rng, pools) for _ in range(100000 if LONG else 1000)]
        texts += [test_tokenizer.long_piece(rng) for _ in range(5)] + ["", "<|endoftext|> <|begin_of_text|>"]
        ranks = os.path.join(FOLDER.name, "ranks.tiktoken")
        shutil.copy(os.path.join(RANKS, "gpt2.tiktoken"), ranks)
        for file, pattern in (
            (os.path.join(RANKS, "gpt2.tiktoken"), None),
            (os.path.join(RANKS, "cl100k_base.tiktoken"), None),
            (ranks, "llama3"),
            (ranks, "o200k_base"),
        ):
            with self.subTest(pattern or os.path.basename(file)):
                tokenizer = self.tokenizer(file, pattern)
                if not pattern:
                    got = tokenizer([g["text"] for g in golden], add_special_tokens=False).input_ids
                    self.assertEqual(got, [g[os.path.basename(file)[:-9]] for g in golden])
                    bos = {"gpt2.tiktoken": 50256, "cl100k_base.tiktoken": 100257}[os.path.basename(file)]
                    self.check_specials(tokenizer, file, bos, bos)
                got = tokenizer(texts, add_special_tokens=False).input_ids
                for text, ids, want in zip_all(texts, got, self.ids_of_infer(file, pattern, texts)):
                    self.assertEqual(ids, want, ascii(text))
                    if not LONG:
                        self.assertEqual(tokenizer.decode(ids), text)

    def check_specials(self, tokenizer, file, bos, eos):
        """BOS before a text, none inside of it; the ids of the table in mta/tokenizer.h."""
        self.assertEqual((tokenizer.bos_token_id, tokenizer.eos_token_id), (bos, eos))
        text = "a<|endoftext|><|begin_of_text|><|end_of_text|>b"
        want, x = self.ids_of_infer(file, None, [text, "x"])
        self.assertEqual(tokenizer(text).input_ids, [bos] + want)
        self.assertEqual(tokenizer(text, "x").input_ids, [bos] + want + [bos] + x)
        self.assertEqual(tokenizer.decode([bos] + want, skip_special_tokens=True), text)
        self.assertEqual(tokenizer.decode([eos] + want), tokenizer.eos_token + text)
        self.assertEqual(sorted(tokenizer.get_vocab().values()), list(range(len(tokenizer))))

    def test_special_ids_of_large_ones(self):
        import test_tokenizer

        for name, n, bos, eos in (
            ("tokenizer.model", 128000, 128000, 128001),
            ("o200k_base.tiktoken", 199998, 199999, 199999),
            ("llama4.model", 200000, 200000, 200001),
        ):
            with self.subTest(name):
                file = os.path.join(FOLDER.name, name)
                test_tokenizer.write_ranks(file, n)
                self.check_specials(self.tokenizer(file), file, bos, eos)

    def test_bytes(self):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint("mta")[1], trust_remote_code=True)
        text = "na\u00efve <|eos|>\0\r\n\U0001f600  x"
        self.assertEqual(tokenizer(text).input_ids, [256, *text.encode()])
        self.assertEqual((tokenizer.eos_token_id, tokenizer.pad_token_id), (257, 258))
        marks = AutoTokenizer.from_pretrained(checkpoint("mta")[1], trust_remote_code=True, split_special_tokens=False)
        self.assertEqual(marks("a<|eos|>").input_ids, [256, 97, 257])  # as TRL's trainers end a text
        self.assertEqual(tokenizer.decode([*text.encode()]), text)
        self.assertEqual(tokenizer(["a", "bcd"], padding=True).input_ids, [[258, 258, 256, 97], [256, 98, 99, 100]])


@needs_torch
class WholeWay(Case):
    """A model that train_mta has trained on bytes, its run's folder exported."""

    @classmethod
    def setUpClass(cls):
        import pydoc_data.topics

        text, shards = os.path.join(FOLDER.name, "text.txt"), os.path.join(FOLDER.name, "shards")
        with open(text, "w") as f:
            f.write("\n\n".join(pydoc_data.topics.topics.values())[:200000].encode("ascii", "ignore").decode())
        run(
            sys.executable, os.path.join(ROOT, "data", "prepare.py"), "text", text, "--tokenizer", "bytes",
            "--out", shards, "--name", "t",
        )
        cls.folder, cls.out = os.path.join(FOLDER.name, "run"), os.path.join(FOLDER.name, "run_out")
        options = "--model 1m --attention mta-full --hidden-size 64 --intermediate-size 128 --seq-len 128"
        more = ["--batch-size", "2", "--lr", "3e-3", "--warmup", "5", "--steps", "60", "--out", cls.folder]
        run(TRAINER, *options.split(), *more, "--train", os.path.join(shards, "t_train_*.bin"))
        cls.said = run(sys.executable, EXPORT, cls.folder, cls.out).stdout

    def test_what_is_written(self):
        self.assertIn("step-00000060 -> %s: mta, " % self.out, self.said)
        names = "config.json configuration_mta.py generation_config.json model.safetensors modeling_mta.py".split()
        self.assertEqual(sorted(os.listdir(self.out)), [*names, "tokenizer.json", "tokenizer_config.json"])
        model = os.path.join(self.folder, "step-00000060", "model.safetensors")
        self.assertEqual(read_bytes(os.path.join(self.out, "model.safetensors")), read_bytes(model))

    def test_text(self):
        model, tokenizer = load(self.out), AutoTokenizer.from_pretrained(self.out, trust_remote_code=True)
        for prompt in ("The ", "import os\nfor x in"):
            want = run(
                INFER, self.folder, "--prompt", prompt, "--temperature", "0", "--max-tokens", "60", "--quiet"
            ).stdout
            got = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=60)
            self.assertEqual(tokenizer.decode(got[0], skip_special_tokens=True), prompt + want[:-1])

    def test_the_harness_s_own_class(self):
        """lm_eval's `hf` gives the numbers of scripts/lm_eval_mta.py, request by request: choices, texts, answers."""
        try:
            import lm_eval.models  # noqa: F401: registers hf
            from lm_eval import simple_evaluate
            from lm_eval.tasks import TaskManager
        except Exception as e:
            self.skipTest("lm_eval: %s" % str(e).split("\n")[0])
        import lm_eval_mta

        records = [
            {"q": q, "c": ["one.", " two words", "a"], "a": i % 3}
            for i, q in enumerate(("Which?", "It is", "", "for x in"))
        ]
        data = os.path.join(FOLDER.name, "data.jsonl")
        with open(data, "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)
        tasks = {
            "choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: a\n",
            "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}} {{c[1]}} and more "
            "than the model has positions for: %s'\n" % ("many words " * 30)
            + "metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n",
            "generate": "output_type: generate_until\ndoc_to_text: '{{q}} x'\ndoc_to_target: '{{c[0]}}'\n"
            "generation_kwargs: {until: ['\\n\\n'], max_gen_toks: 20, do_sample: false}\n"
            "metric_list: [{metric: exact_match}]\n",
        }
        paths = []
        for name, text in tasks.items():
            paths.append(os.path.join(FOLDER.name, "local_%s.yaml" % name))
            with open(paths[-1], "w") as f:
                f.write(
                    "task: local_%s\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
                    % (name, data)
                    + text
                )
        ours = lm_eval_mta.MtaLM(self.folder, infer=INFER, threads=1)
        self.addCleanup(ours.close)
        theirs = dict(pretrained=self.out, trust_remote_code=True, dtype="float32")
        # What it collects of the machine, pip's list of all packages too, takes 1 s at each evaluation.
        quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
        with quiet[0], quiet[1], mock.patch("lm_eval.evaluator.add_env_info"):
            alone = TaskManager(include_defaults=False)  # the harness's own tasks: 8 s to read, three times
            common = dict(bootstrap_iters=0, log_samples=True, task_manager=alone)
            want = simple_evaluate(model=ours, tasks=paths, **common)
            common.update(model="hf", batch_size=3, device="cpu")
            got = simple_evaluate(model_args=theirs, tasks=[p for p in paths if "rolling" not in p], **common)
            # Of whole texts the harness's class puts BOS before the tokenizer's BOS, and counts that one as a target.
            rolling = simple_evaluate(
                model_args=dict(theirs, add_bos_token=False), tasks=[p for p in paths if "rolling" in p], **common
            )
        for part in ("samples", "results"):
            got[part].update(rolling[part])
        compared = 0
        for task, samples in want["samples"].items():
            for a, b in zip_all(got["samples"][task], samples):
                flat = lambda r: [x for y in r for x in flat(y)] if isinstance(r, (list, tuple)) else [r]
                for x, y in zip_all(flat(a["resps"]), flat(b["resps"])):
                    if isinstance(y, float):
                        self.assertAlmostEqual(x, y, delta=1e-4 * abs(y) + 1e-4)
                    else:
                        self.assertEqual(x, y)
                    compared += 1
            for key, value in want["results"][task].items():
                if isinstance(value, float):
                    self.assertAlmostEqual(got["results"][task][key], value, delta=1e-4 * abs(value), msg=key)
        self.assertEqual(compared, 4 * 3 * 2 + 4 + 4)


class Refusals(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(dir=FOLDER.name)
        self.source, self.out = os.path.join(self.folder, "in"), os.path.join(self.folder, "out")
        self.config = dict(SIZES, **MTA, model_type="mta", hidden_size=8, vocab_size=8)
        os.mkdir(self.source)
        write_config(self.source, self.config)
        self.tensors = random_tensors(self.config)
        write_safetensors(os.path.join(self.source, "model.safetensors"), self.tensors)

    def refused(self, why, *arguments):
        done = run(export, *(arguments or (self.source, self.out)), check=False)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
        self.assertIn(why, done.stderr)
        self.assertEqual([n for n in os.listdir(self.folder) if n.startswith("out")], [])

    def test_places(self):
        self.refused("no checkpoint", self.folder, self.out)
        self.refused("no checkpoint", os.path.join(self.folder, "not there"), self.out)
        files = lambda: {name: read_bytes(os.path.join(self.source, name)) for name in os.listdir(self.source)}
        before = files()
        done = run(export, self.source, self.source, check=False)
        self.assertEqual((done.returncode, "not empty" in done.stderr), (1, True))
        self.assertEqual(files(), before)
        os.mkdir(self.out)
        run(export, self.source, self.out)
        self.assertIn("config.json", os.listdir(self.out))

    def test_models(self):
        for change, why in (
            (dict(attention_type="linear"), 'attention_type: got "linear", wanted mta or diff'),
            (dict(head_norm="layer"), 'head_norm: got "layer"'),
            (dict(new_key=1), "key new_key"),
            (dict(model_type="gpt2"), "model_type gpt2"),
            (dict(architectures=["LlamaForCausalLM"]), "wanted a llama or mta"),
            (dict(kq_conv_layers=[0, 1, 2]), "model.layers.1.self_attn.kq_conv.weight is missing"),
            (dict(kq_conv_layers=[0]), "model.layers.2.self_attn.kq_conv.weight is not one of this model"),
            (dict(kq_conv_key_size=9), "got [4, 6, 11], wanted [4, 6, 9]"),
            (dict(tokenizer="not_there.tiktoken"), "not_there.tiktoken"),
            (dict(attention_bias=True), "attention_bias: got true, wanted false"),
            (dict(attention_dropout=0.1), "attention_dropout: got 0.1, wanted 0"),
            (dict(tokenizer="../in/gpt2.tiktoken"), "wanted a name or a file beside config.json"),
        ):
            with self.subTest(str(change)):
                write_config(self.source, dict(self.config, **change))
                self.refused(why)

    def test_damage(self):
        path = os.path.join(self.source, "model.safetensors")
        good = read_bytes(path)
        with open(path, "wb") as f:
            f.write(good[:100])
        self.refused("no safetensors file")
        for there, instead, why in ((b'{"__', b'["__', "model.safetensors: its header is no JSON"),
                                    (b'"dtype"', b'"dtyqe"', "wanted its dtype, shape and data_offsets")):
            with open(path, "wb") as f:
                f.write(good.replace(there, instead, 1))
            self.refused(why)
        manifest = {"files": {"model.safetensors": {"bytes": len(good), "crc32": 1}}}
        write_json(os.path.join(self.source, "manifest.json"), manifest)
        with open(path, "wb") as f:
            f.write(good)
        self.refused("damaged")
        write_json(os.path.join(self.source, "manifest.json"), {"files": ["model.safetensors"]})
        self.refused('manifest.json: "files" is no object')
        with open(os.path.join(self.source, "config.json"), "a") as f:
            f.write("}")
        self.refused("no JSON")
        write_config(self.source, self.config)
        os.remove(path)
        self.refused("neither model.safetensors nor model.safetensors.index.json")
        for layers in (None, "2", 0):
            write_config(self.source, dict(self.config, num_hidden_layers=layers))
            self.refused("config.json: num_hidden_layers: got %s, wanted a whole number" % json.dumps(layers))
        self.refused("unrecognized arguments: --bf17", self.source, self.out, "--bf17")
        os.remove(os.path.join(self.source, "config.json"))
        self.refused("no checkpoint")

    def test_files_that_no_reader_takes(self):
        """They went along as they were, with success."""
        path = os.path.join(self.source, "model.safetensors")
        good = read_bytes(path)
        n = int.from_bytes(good[:8], "little")
        header, data = json.loads(good[8 : 8 + n]), good[8 + n :]
        moved = {k: dict(t, data_offsets=[x + 8 for x in t["data_offsets"]]) if "data_offsets" in t else t
                 for k, t in header.items()}
        for head, body, why in ((header, data + b"xx", "the tensors end at byte %d of the data, the file at %d" %
                                 (len(data), len(data) + 2)),
                                (moved, bytes(8) + data, "begins at byte 8 of the data, wanted 0"),
                                (dict(header, __metadata__={"n": 5}), data, "__metadata__: wanted an object of texts"),
                                (dict(header, __metadata__={"format": "tf"}), data, ""),
                                ({k: t for k, t in header.items() if k != "__metadata__"}, data, "")):
            text = json.dumps(head).encode()
            with open(path, "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text + body)
            if why:
                self.refused(why)
                continue
            run(export, self.source, self.out)  # the form that all versions of transformers take
            got = read_bytes(os.path.join(self.out, "model.safetensors"))
            said = json.loads(got[8 : 8 + int.from_bytes(got[:8], "little")])
            self.assertEqual((said["__metadata__"], got[-len(data) :]), ({"format": "pt"}, data))
            shutil.rmtree(self.out)

    def split(self):
        """The model in two files under an index, as other programs save large ones."""
        os.remove(os.path.join(self.source, "model.safetensors"))
        names = sorted(self.tensors)
        parts = {"model-0000%d-of-00002.safetensors" % (i + 1): names[i::2] for i in range(2)}
        for file, inside in parts.items():
            write_safetensors(os.path.join(self.source, file), {n: self.tensors[n] for n in inside})
        self.index({"weight_map": {n: file for file, inside in parts.items() for n in inside}})
        return parts

    def index(self, value):
        write_json(os.path.join(self.source, "model.safetensors.index.json"), value)

    def test_several_files(self):
        """The same export as of one file, which infer_mta reads; what the index says wrongly is refused."""
        run(export, self.source, self.out)
        run(export, self.source, self.out + "_bf16", "--bf16")
        parts = self.split()
        for more in ((), ("--bf16",)):
            out = os.path.join(self.folder, "again" + "".join(more))
            run(export, self.source, out, *more)
            want = read_safetensors(os.path.join(self.out + ("_bf16" if more else ""), "model.safetensors"))[0]
            self.assertEqual(read_safetensors(os.path.join(out, "model.safetensors"))[0], want)
            self.assertEqual([n for n in os.listdir(out) if "-of-" in n or "index" in n], [])
            shutil.rmtree(self.out + ("_bf16" if more else ""))
        first, second = parts
        place = {n: file for file, inside in parts.items() for n in inside}
        norm = "model.norm.weight"
        for wrong, why in ((dict(place, **{norm: "gone.safetensors"}), "gone.safetensors"),
                           (dict(place, **{norm: "../" + first}), "wanted the name of a file"),
                           (dict(place, **{norm: second if place[norm] == first else first}), norm + " is not in"),
                           (dict(place, more=first), "tensor more is not in"), ({}, "no weight_map")):
            with self.subTest(why):
                self.index({"weight_map": wrong})
                self.refused(why)
        write_safetensors(os.path.join(self.source, second), {n: self.tensors[n] for n in [*parts[second], norm]})
        write_safetensors(os.path.join(self.source, first), {n: self.tensors[n] for n in [*parts[first], norm]})
        self.index({"weight_map": place})
        self.refused("tensor %s is in" % norm)

    def test_what_stands_beside_a_model(self):
        """Tables of RoPE and the embedding once more are left out; another head is refused."""
        embed = self.tensors["model.embed_tokens.weight"]
        table = ("F32", (1,), array.array("f", [1]).tobytes())
        path = os.path.join(self.source, "model.safetensors")
        more = {"model.layers.0.self_attn.rotary_emb.inv_freq": table, "lm_head.weight": embed}
        write_safetensors(path, dict(self.tensors, **more))
        run(export, self.source, self.out)
        self.assertEqual(sorted(read_safetensors(os.path.join(self.out, "model.safetensors"))[0]), sorted(self.tensors))
        shutil.rmtree(self.out)
        write_safetensors(path, dict(self.tensors, **{"lm_head.weight": (*embed[:2], bytes(len(embed[2])))}))
        self.refused("lm_head.weight is another")

    def test_ids_that_end_a_text(self):
        """generation_config.json of another program goes along: infer_mta ends a text by it, config.json's ids are
        others. A broken one is refused."""
        path = os.path.join(self.source, "generation_config.json")
        for theirs in (None, dict(eos_token_id=[3, 5], temperature=0.6), dict(do_sample=True)):
            if theirs is not None:
                write_json(path, theirs)
            run(export, self.source, self.out)
            with open(os.path.join(self.out, "generation_config.json")) as f:
                got = json.load(f)
            shutil.rmtree(self.out)
            self.assertEqual(got, theirs or dict(bos_token_id=256, eos_token_id=257, pad_token_id=258))
        with open(path, "a") as f:
            f.write("]")
        self.refused("generation_config.json: no JSON")

    def test_a_tokenizer_that_was_saved(self):
        """A tokenizer.json of DIR, of another program or with tokens that a user has added, goes along as it is; what
        belongs to it too, infer_mta's name of a tokenizer stays."""
        more = "additional_chat_templates"
        files = {"tokenizer.json": "{}", "tokenizer_config.json": '{"extra": 1}', "chat_template.jinja": "{{ x }}",
                 "tokenizer.model": "sp", "vocab.json": "{ }", "merges.txt": "#", more + "/tool_use.jinja": "{{ y }}"}
        os.mkdir(os.path.join(self.source, more))
        for name, text in files.items():
            with open(os.path.join(self.source, name), "w") as f:
                f.write(text)
        for tokenizer in ("bytes", None, "toy"):
            write_config(self.source, dict(self.config, tokenizer=tokenizer))
            self.assertIn("its tokenizer.json", run(export, self.source, self.out).stdout)
            for name, text in files.items():
                self.assertEqual(read_bytes(os.path.join(self.out, name)).decode(), text)
            shutil.rmtree(self.out)
        os.remove(os.path.join(self.source, "tokenizer_config.json"))  # without it transformers 4 finds no class
        run(export, self.source, self.out)
        with open(os.path.join(self.out, "tokenizer_config.json")) as f:
            self.assertEqual(json.load(f), {"tokenizer_class": "PreTrainedTokenizerFast"})
        shutil.rmtree(self.out)
        write_config(self.source, dict(self.config, tokenizer="gpt2.tiktoken"))  # which transformers does not save
        self.refused("gpt2.tiktoken: no such file, which config.json names for infer_mta; copy it there")

    def test_rope_as_transformers_5_saves_it(self):
        """In the keys of transformers 4 too, which took a plain model's rope_theta for 10000."""
        config = dict(self.config, model_type="llama", rope_theta=None)
        tensors = {n: t for n, t in self.tensors.items() if n in export.model_tensors(config)}
        write_safetensors(os.path.join(self.source, "model.safetensors"), tensors)
        for rope, more in ((dict(rope_type="default"), {}), (LLAMA3, {}), (LLAMA3, dict(rope_scaling=LLAMA3))):
            write_config(self.source, dict(config, rope_parameters=dict(rope, rope_theta=5e5), **more))
            run(export, self.source, self.out)
            with open(os.path.join(self.out, "config.json")) as f:
                got = json.load(f)
            self.assertEqual((got["rope_theta"], got.get("rope_scaling")), (5e5, LLAMA3 if rope is LLAMA3 else None))
            self.assertEqual(got["rope_parameters"], dict(rope, rope_theta=5e5))
            shutil.rmtree(self.out)
        write_config(self.source, dict(config, rope_theta=1e4, rope_parameters=dict(rope_theta=5e5)))
        self.refused("rope_theta: got 10000.0, and 500000.0 in rope_parameters, wanted one")
        write_config(self.source, dict(config, rope_parameters=[1]))
        self.refused("rope_parameters: got [1], wanted an object")

    def test_the_newest(self):
        """Of a run the checkpoint with the largest number, whatever its digits; others' folders are none."""
        for name in ("step-00000009", "step-100000000", "step-99999999", "step-9", "step-0999999999", "step-x"):
            shutil.copytree(self.source, os.path.join(self.folder, "run", name))
        done = run(export, os.path.join(self.folder, "run"), self.out)
        self.assertIn("step-100000000 ->", done.stdout)

    def test_toy_and_unknown_tokenizers(self):
        for name, said in (("toy", "toy has no counterpart"), (None, "config.json names none")):
            write_config(self.source, dict(self.config, tokenizer=name))
            out = os.path.join(self.folder, "out_%s" % name)
            self.assertIn(said, run(export, self.source, out).stdout)
            self.assertNotIn("tokenizer.json", os.listdir(out))

    def test_plain_models_bring_no_code(self):
        for folder in [checkpoint(name)[1] for name in PLAIN]:
            want = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                    "tokenizer_config.json"]
            self.assertEqual(sorted(os.listdir(folder)), want)
            with open(os.path.join(folder, "config.json")) as f:
                self.assertNotIn("auto_map", f.read())


if __name__ == "__main__":
    main()
