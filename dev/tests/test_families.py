#!/usr/bin/env python3
"""Models of other programs: computed as transformers computes them, or refused with one line that names what is not
known.

    dev/.venv/bin/python dev/tests/test_families.py [-k PATTERN]     (MTA_BIN: folder of the binaries, default the
                                                                     repository)

Tiny configurations of many families, as transformers' own classes write them, and of LLaMA and Mistral with keys that
are absent, null, harmless or harmful. Where infer_mta reads a model, its logits are compared with those of
transformers, which loads the same folder. The same folders go to --init-from. Without transformers the comparisons are
skipped; what needs no model is tested all the same.
"""
import json
import os
import struct
import subprocess
import zlib

from helpers import BIN, Folder, main, read_safetensors, write_safetensors

INFER, TRAIN = os.path.join(BIN, "infer_mta"), os.path.join(BIN, "train_mta")
try:
    import torch
    import transformers
except ImportError:
    torch = transformers = None

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
IDS = [1, 5, 9, 33, 2, 60, 17, 8, 41, 3, 3, 12, 7, 50, 21, 30]
# What the smallest configuration of a family needs beside SIZES.
FAMILIES = {
    "granite": dict(embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.1),
    "helium": dict(head_dim=8),
    "gemma": dict(head_dim=8), "gemma2": dict(head_dim=8), "gemma3_text": dict(head_dim=8), "qwen2": {},
    "qwen3": dict(head_dim=8),
    "qwen2_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                      shared_expert_intermediate_size=16),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8), "phi": {},
    "phi3": dict(pad_token_id=0),
    "olmo": {}, "olmo2": {}, "olmo3": {}, "cohere": {}, "cohere2": {}, "starcoder2": {}, "stablelm": {}, "smollm3": {},
    "mixtral": dict(num_local_experts=4),
    "nemotron": {}, "exaone4": {}, "glm": dict(head_dim=8, pad_token_id=0), "glm4": dict(head_dim=8, pad_token_id=0),
    "deepseek_v2": {}, "deepseek_v3": {},
    "ministral": {}, "arcee": {}, "bitnet": {}, "seed_oss": dict(head_dim=8), "hunyuan_v1_dense": dict(head_dim=8),
    "ernie4_5": {}, "granitemoe": {},
    "diffllama": {}, "gpt_neox": {}, "gptj": {}, "persimmon": {}, "falcon": {}, "mpt": {}, "bloom": {}, "opt": {},
    "gpt2": {}, "apertus": {}, "dots1": {},
    "lfm2": {}, "minimax": {}, "jetmoe": {}, "recurrent_gemma": {}, "zamba": {}, "vaultgemma": {}, "doge": {},
    "csm": {}, "moshi": {},
}
# Families whose code lies with their weights: only what their config.json says.
REMOTE = {
    "minicpm": dict(architectures=["MiniCPMForCausalLM"], scale_emb=12, scale_depth=1.4, dim_model_base=256),
    "internlm2": dict(architectures=["InternLM2ForCausalLM"], bias=False),
    "internlm": dict(architectures=["InternLMForCausalLM"], bias=True),
    "deepseek": dict(architectures=["DeepseekForCausalLM"], n_routed_experts=4),
    "baichuan": dict(architectures=["BaichuanForCausalLM"]),
    "Yi": dict(architectures=["YiForCausalLM"]), "aquila": dict(architectures=["AquilaForCausalLM"]),
    "xverse": dict(architectures=["XverseForCausalLM"]),
    "orion": dict(architectures=["OrionForCausalLM"]), "exaone": dict(architectures=["ExaoneForCausalLM"]),
    "telechat": dict(architectures=["TeleChat"]),
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
PLAIN = dict(SIZES, model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", rms_norm_eps=1e-6,
             rope_theta=10000.0, bos_token_id=1, eos_token_id=2)
DROP = object()  # as a value: the key is taken out


def run(*words):
    environment = dict(os.environ, OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="1")
    return subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment, timeout=120)


def random_weights(config):
    """Small numbers under LLaMA's names, as a model of this configuration has them."""
    C, FF, V, NH = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"))
    KV = C // NH * (config.get("num_key_value_heads") or NH)
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, C)
    for l in range(config["num_hidden_layers"]):
        at = f"model.layers.{l}."
        shapes.update({at + "input_layernorm.weight": (C,), at + "post_attention_layernorm.weight": (C,),
                       at + "self_attn.q_proj.weight": (C, C),
                       at + "self_attn.k_proj.weight": (KV, C), at + "self_attn.v_proj.weight": (KV, C),
                       at + "self_attn.o_proj.weight": (C, C),
                       at + "mlp.gate_proj.weight": (FF, C), at + "mlp.up_proj.weight": (FF, C),
                       at + "mlp.down_proj.weight": (C, FF)})
    state, tensors = 1, {}
    for name, shape in shapes.items():
        n, values = 1, []
        for s in shape:
            n *= s
        for _ in range(n):
            state = (state * 1103515245 + 12345) % 2**31
            values.append(1.0 + state / 2**33 if name.endswith("norm.weight") else (state / 2**30 - 1) * 0.4)
        tensors[name] = ("F32", list(shape), struct.pack(f"<{n}f", *values))
    return tensors


class Folders(Folder):
    count = 0

    def model(self, config, weights=None):
        """A folder with this config.json and weights that fit it (or `weights`)."""
        self.count += 1
        folder = os.path.join(self.folder, str(self.count))
        os.makedirs(folder)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(config, f)
        write_safetensors(os.path.join(folder, "model.safetensors"), weights or random_weights(config))
        return folder

    def infer(self, folder, *more):
        out = os.path.join(folder, "logits.safetensors")
        return run(INFER, folder, "--token-ids", " ".join(map(str, IDS)), "--logits", out, "--quiet", *more), out

    def train(self, folder, *more):
        return run(TRAIN, "--init-from", folder, "--dry-run", *more)

    def assert_refused(self, done, *pieces):
        self.assertEqual(done.returncode, 1, done.stdout[-300:] + done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        for piece in pieces:
            self.assertIn(str(piece), done.stderr)

    def refused(self, folder, *pieces):
        """By both programs."""
        self.assert_refused(self.infer(folder)[0], *pieces)
        self.assert_refused(self.train(folder), *pieces)

    def accepted(self, folder, *more):
        done, out = self.infer(folder, *more)
        self.assertEqual(done.returncode, 0, done.stderr)
        again = self.train(folder, *more)
        self.assertEqual(again.returncode, 0, again.stderr)
        return out

    def assert_as_transformers(self, folder, *more):
        out = self.accepted(folder, *more)
        if torch is None:
            return
        _, shape, raw = read_safetensors(out)[0]["logits"]
        got = torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw)).reshape(shape)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                  attn_implementation="eager").eval()
        with torch.no_grad():
            want = model(torch.tensor([IDS])).logits[0]
        self.assertLess((got - want).abs().max().item(), 1e-4 * max(1.0, want.abs().max().item()))


def changed(config, changes):
    config = dict(config, **changes)
    return {k: v for k, v in config.items() if v is not DROP}


class Accepted(Folders):
    """Right: the logits are those of transformers, which reads the same folder."""

    def test_llama(self):
        for changes in ({}, {"num_key_value_heads": None}, {"num_key_value_heads": DROP}, {"tie_word_embeddings": True},
                        {"rope_theta": DROP},
                        {"rms_norm_eps": DROP}, {"hidden_act": DROP}, {"hidden_act": "swish"},
                        {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
                        {"rope_scaling": dict({k: v for k, v in LLAMA3.items() if k != "rope_type"}, type="llama3")},
                        {"rope_theta": DROP, "rope_parameters": dict(LLAMA3, rope_theta=500000.0)},
                        {"rope_theta": DROP, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
                        {"rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_scaling": {"rope_type": "default"}},
                        {"rope_scaling": None},
                        {"head_dim": 8}, {"head_dim": None}, {"pretraining_tp": 1},
                        {"attention_bias": False, "mlp_bias": False},
                        {"quantization_config": None, "some_new_key": None}, {"rms_norm_eps": 1e-3},
                        {"eos_token_id": list(range(20))},
                        {"partial_rotary_factor": 1.0}, {"layer_types": None},
                        {"model_type": "llama", "architectures": DROP}):
            with self.subTest(**{k: "absent" if v is DROP else v for k, v in changes.items()}):
                self.assert_as_transformers(self.model(changed(PLAIN, changes)))

    def test_mistral(self):
        mistral = dict(PLAIN, model_type="mistral", architectures=["MistralForCausalLM"], num_attention_heads=8)
        for changes in ({}, {"sliding_window": None}, {"sliding_window": 64}, {"sliding_window": 4096},
                        {"num_key_value_heads": DROP, "num_attention_heads": 16},
                        {"max_position_embeddings": DROP, "sliding_window": None},
                        {"rope_theta": DROP}, {"rms_norm_eps": DROP}):
            config = changed(mistral, changes)
            heads = config.get("num_key_value_heads", 8)  # MistralConfig's, not all of them
            with self.subTest(**{k: "absent" if v is DROP else v for k, v in changes.items()}):
                weights = random_weights(dict(config, num_key_value_heads=heads))
                self.assert_as_transformers(self.model(config, weights))

    def test_neither_key_is_read_as_ever(self):
        self.accepted(self.model(changed(PLAIN, {"model_type": DROP, "architectures": DROP})))

    def test_as_transformers_writes_them(self):
        if transformers is None:
            self.skipTest("transformers is not here")
        for name in ("Llama", "Mistral"):
            with self.subTest(name=name):
                torch.manual_seed(1)
                config = getattr(transformers, name + "Config")(**SIZES, initializer_range=0.3)
                folder = os.path.join(self.folder, name)
                getattr(transformers, name + "ForCausalLM")(config).save_pretrained(folder)
                self.assert_as_transformers(folder)

    def test_assume_llama(self):
        """On the user's word: another family and unknown keys are read as LLaMA; what is known to be wrong stays
        refused."""
        for changes in ({"model_type": "smaller", "architectures": ["SmallerForCausalLM"]}, {"some_new_key": 3},
                        {"attention_multiplier": 0.5},
                        {"rope_scaling": dict(LLAMA3, new=1)}, {"auto_map": {"AutoModelForCausalLM": "m.M"}}):
            folder = self.model(changed(PLAIN, changes))
            with self.subTest(**changes):
                self.refused(folder, "--assume-llama")
                self.accepted(folder, "--assume-llama")
        for changes in ({"attention_bias": True}, {"quantization_config": {"bits": 4}}, {"head_dim": 16},
                        {"hidden_act": "gelu"},
                        {"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"sliding_window": 16}):
            with self.subTest(**changes):
                self.assert_refused(self.infer(self.model(changed(PLAIN, changes)), "--assume-llama")[0],
                                    next(iter(changes)))


class Refused(Folders):
    """What would be computed wrongly; the line names it."""

    def test_keys(self):
        for changes, piece in (
                ({"head_dim": 16}, "head_dim"), ({"attention_bias": True}, "attention_bias"),
            ({"mlp_bias": True}, "mlp_bias"),
                ({"hidden_act": "gelu"}, "hidden_act"), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
                ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
            ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
                ({"rope_scaling": {"type": "linear"}}, "linear"),
            ({"rope_scaling": dict(LLAMA3, mrope_section=[1, 2])}, "mrope_section"),
                ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
                ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
                ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
                 "differ"),
                ({"rope_scaling": dict(LLAMA3, high_freq_factor=1.0)}, "low_freq_factor"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
                ({"sliding_window": 16}, "sliding_window"), ({"attention_multiplier": 1.0}, "attention_multiplier"),
                ({"logits_scaling": 8.0}, "logits_scaling"), ({"residual_multiplier": 0.22}, "residual_multiplier"),
            ({"scale_emb": 12}, "scale_emb"),
                ({"scale_depth": 1.4}, "scale_depth"), ({"qk_norm": True}, "qk_norm"),
            ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
                ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
            ({"some_new_key": 1}, "some_new_key"),
                ({"rope_scaling": dict(LLAMA3, factor=None)}, "factor"),
            ({"rope_scaling": dict(LLAMA3, factor=0)}, "a factor of 0"),
                ({"rope_parameters": dict(LLAMA3, factor=-0.0)}, "a factor of 0"),
            ({"rope_scaling": dict(LLAMA3, factor=0.5)}, "factor"),
            ({"layer_types": "sliding_attention"}, "layer_types"),
                ({"some\nkey": 1}, "some?key"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
            ({"rope_interleaved": True}, "rope_interleaved"),
                ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map"),
            ({"num_experts": 4}, "num_experts"),
                ({"rms_norm_eps": None}, "rms_norm_eps"), ({"vocab_size": None}, "vocab_size"),
            ({"hidden_size": "32"}, "hidden_size"),
                ({"model_type": "LLAMA"}, "model_type"), ({"model_type": 3}, "model_type"),
            ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
                ({"model_type": DROP, "architectures": ["GraniteForCausalLM"]}, "GraniteForCausalLM"),
            ({"architectures": "GraniteForCausalLM"}, "architectures"),
                ({"architectures": ["LlamaForCausalLM", "Own"]}, "Own"),
            ({"rope_scaling": {"factor": 8.0}}, "a factor without rope_type"),
                ({"rope_scaling": {"rope_type": "default", "type": "mrope"}}, "differ"),
                ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
                 "rope_parameters says 10000"),
                ({"rope_scaling": dict(LLAMA3, rope_theta=5e5)}, "rope_scaling says 500000"),
                # C's strings end at a NUL: these were the known words before it.
                ({"model_type": "llama\0x"}, "model_type: wanted a text without NUL"),
                ({"architectures": ["LlamaForCausalLM\0x"]}, "architectures: wanted a text without NUL"),
                ({"hidden_act": "silu\0x"}, "hidden_act: wanted a text without NUL"),
                ({"rope_scaling": dict(LLAMA3, rope_type="llama3\0x")}, "rope_type: wanted a text without NUL")):
            with self.subTest(piece=piece, **{k: "absent" if v is DROP else v for k, v in changes.items()}):
                self.refused(self.model(changed(PLAIN, changes), random_weights(PLAIN)), piece)

    def test_llama3_without_one_of_its_numbers(self):
        for key in LLAMA3:
            if key != "rope_type":
                with self.subTest(key=key):
                    self.refused(self.model(changed(PLAIN, {"rope_scaling": {k: v for k, v in LLAMA3.items()
                                                                             if k != key}})), key)

    def test_mistral_window(self):
        """Absent is MistralConfig's 4096, not none."""
        mistral = dict(PLAIN, model_type="mistral", architectures=["MistralForCausalLM"])
        for changes in ({"max_position_embeddings": 8192}, {"max_position_embeddings": DROP}, {"sliding_window": 63},
                        {"sliding_window": 63, "use_sliding_window": False}):
            with self.subTest(**{k: "absent" if v is DROP else v for k, v in changes.items()}):
                self.refused(self.model(changed(mistral, changes)), "sliding_window")

    def test_a_context_longer_than_the_window(self):
        """Up to its context such a model is a full one; beyond, it is another than transformers computes, and said."""
        folder, said = self.model(changed(PLAIN, {"sliding_window": 64})), "sliding_window 64; here attention sees all"
        preset = ["--model", "toy", "--attention", "transformer", "--num-attention-heads", 4, "--num-key-value-heads",
                  2, "--rope-theta", PLAIN["rope_theta"], "--rms-norm-eps", PLAIN["rms_norm_eps"]]
        for words in ([], ["--model", os.path.join(folder, "config.json")], preset):
            with self.subTest(words):
                self.assertIn(said, self.train(folder, *words, "--seq-len", "128").stdout)
                self.assertNotIn(said, self.train(folder, *words, "--seq-len", "64").stdout)

    def test_a_head_that_is_not_the_embedding(self):
        config = dict(PLAIN, tie_word_embeddings=True)
        weights = random_weights(PLAIN)
        self.assert_refused(self.infer(self.model(config, weights))[0], "lm_head.weight", "tie_word_embeddings")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.assert_as_transformers(self.model(config, weights))

    def test_files_that_are_not_as_the_manifest_says(self):
        """A checkpoint's manifest.json beside a model; another program's, or none, says nothing."""
        folder = self.model(PLAIN)
        path = os.path.join(folder, "model.safetensors")
        with open(path, "rb") as f:
            data = f.read()
        manifest = {"step": 1, "files": {"model.safetensors": {"bytes": len(data), "crc32": zlib.crc32(data)},
                                         "optimizer.safetensors": {"bytes": 8, "crc32": 1}}}
        with open(os.path.join(folder, "manifest.json"), "w") as f:
            json.dump(manifest, f)
        self.accepted(folder)  # the optimizer's file is not needed
        with open(path, "wb") as f:
            f.write(data[:-4] + b"\0\0\0\0")
        self.refused(folder, "model.safetensors", "CRC-32")
        self.accepted(folder, "--no-verify")
        with open(os.path.join(folder, "manifest.json"), "w") as f:
            json.dump({"name": "of a web page"}, f)
        self.accepted(folder)

    def test_pipes_in_place_of_files(self):
        """Nobody writes to them: refused, not waited for."""
        for name in ("model.safetensors", "manifest.json"):
            folder = self.model(PLAIN)
            path = os.path.join(folder, name)
            if os.path.exists(path):
                os.remove(path)
            os.mkfifo(path)
            with self.subTest(name=name):
                self.assert_refused(self.infer(folder)[0], name)

    def test_numbers_that_a_preset_would_replace(self):
        folder = self.model(changed(PLAIN, {"rope_theta": 500000.0}))
        small = ["--model", "1m", "--attention", "transformer", "--hidden-size", 32, "--num-hidden-layers", 2,
                 "--num-attention-heads", 4,
                 "--num-key-value-heads", 2, "--intermediate-size", 48, "--vocab-size", 64, "--tie-word-embeddings",
                 "off", "--rms-norm-eps", 1e-6]
        self.assert_refused(self.train(folder, *small), "rope_theta", "500000", "10000")
        self.assertEqual(self.train(folder, *small, "--rope-theta", 500000).returncode, 0)
        os.remove(os.path.join(folder, "config.json"))
        self.assertIn("no config.json", self.train(folder, *small).stdout)
        granite = self.model(changed(PLAIN, {"model_type": "granite"}))
        self.assert_refused(self.train(granite, *small, "--rope-theta", 10000), "granite")

    def test_families_with_code_of_their_own(self):
        for name, more in REMOTE.items():
            with self.subTest(name=name):
                self.refused(self.model(dict(PLAIN, model_type=name, **more)), name)

    def test_families_of_transformers(self):
        if transformers is None:
            self.skipTest("transformers is not here")
        seen = 0
        for name, more in FAMILIES.items():
            try:
                config = transformers.CONFIG_MAPPING[name](**dict(SIZES, **more))
            except Exception:  # not in this version, or of other sizes than these: counted below
                continue
            seen += 1
            text = json.loads(config.to_json_string(use_diff=False))
            with self.subTest(name=name):
                self.refused(self.model(text, random_weights(SIZES)), "model_type", name)
            del text["model_type"]  # its class alone tells
            text["architectures"] = [name.title().replace("_", "") + "ForCausalLM"]
            with self.subTest(name=name, by="architectures"):
                self.refused(self.model(text, random_weights(SIZES)), "architectures")
        self.assertGreaterEqual(seen, 25)


if transformers is not None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
if __name__ == "__main__":
    main()
