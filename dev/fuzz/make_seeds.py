#!/usr/bin/env python3
"""Writes a small seed corpus for the harnesses of this folder: make_seeds.py DIR ->
DIR/{json,config,checkpoint,directory,shard,tokenizer}/*. Beside it the corpus of this folder."""

import base64
import json
import os
import struct
import sys
import zlib

CONFIG = {
    "vocab_size": 7, "hidden_size": 4, "intermediate_size": 3, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "kq_conv_layers": [0],
    "kq_conv_pre_softmax": True, "kq_conv_query_size": 2, "kq_conv_key_size": 3, "head_mix_post_softmax": 2,
    "head_norm": "group", "head_gate": True, "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}
LAYER = {
    "input_layernorm.weight": [4], "self_attn.q_proj.weight": [4, 4], "self_attn.k_proj.weight": [2, 4],
    "self_attn.v_proj.weight": [2, 4], "self_attn.o_proj.weight": [4, 4], "self_attn.kq_conv.weight": [2, 2, 3],
    "self_attn.head_mix.weight": [1, 2, 2], "self_attn.head_norm.weight": [2], "self_attn.head_gate.weight": [2],
    "self_attn.head_gate.bias": [1], "post_attention_layernorm.weight": [4], "mlp.gate_proj.weight": [3, 4],
    "mlp.up_proj.weight": [3, 4], "mlp.down_proj.weight": [4, 3],
}
SIZE = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8}


def safetensors(shapes, dtype):
    """Bytes of a safetensors file with tensors of zeros."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = SIZE[dtype]
        for s in shape:
            size *= s
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def checkpoint(config, shapes, dtype):
    """One input of fuzz_checkpoint.c."""
    text = json.dumps(config).encode()
    return struct.pack("<H", len(text)) + text + safetensors(shapes, dtype)


def shard(tokens, size, vocab, masked=0):
    """A shard of llm.c's format."""
    magic, version = (20240520, 1) if size == 2 else (20240801, 7)
    head = struct.pack("<6i", magic, version, len(tokens), vocab, 0, masked) + bytes(1000)
    return head + struct.pack("<%d%s" % (len(tokens), "H" if size == 2 else "I"), *tokens)


def several(files):
    """Several files in one input (structure.h)."""
    return b"".join(name.encode() + b"\0" + struct.pack("<I", len(data)) + data for name, data in files.items())


def directory(files):
    """The files of a checkpoint with their manifest."""
    listed = {name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in files.items()}
    return several(dict(files, **{"manifest.json": json.dumps({"step": 3, "files": listed}).encode()}))


def trainer_state():
    """trainer.json of fuzz_directory.c's run."""
    source = {"name": "x", "weight": 1, "windows": 7, "drawn": 6}
    loader = {"seed": "5", "mix": "token", "seq_len": 8, "windows": 6, "sources": [source]}
    state = {
        "format": 1, "step": 3, "tokens_seen": 48, "skipped": 0, "batch_size": 2, "tokens_per_step": 16, "timed": True,
    }
    return json.dumps(dict(state, random={"seed": 5, "step": 3}, loader=loader, arguments=["--steps", "3"])).encode()


def directories(shapes, ranks):
    """A checkpoint in one file and in two, with a rank file."""
    config = dict(CONFIG, model_type="mta", architectures=["MtaForCausalLM"], tokenizer="bytes", eos_token_id=[257, 2])
    optimizer = safetensors({p + name: shape for p in ("m.", "v.") for name, shape in shapes.items()}, "F32")
    whole = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors(shapes, "F32"),
        "optimizer.safetensors": optimizer,
        "trainer.json": trainer_state(),
    }
    names = sorted(shapes)
    pieces = {
        "model-0000%d-of-00002.safetensors" % (i + 1): names[i * 8 : i * 8 + 8 if i == 0 else None] for i in range(2)
    }
    parts = {
        "config.json": json.dumps(dict(config, tokenizer="gpt2.tiktoken", tokenizer_pattern="gpt2")).encode(),
        "gpt2.tiktoken": ranks,
    }
    for name, inside in pieces.items():
        parts[name] = safetensors({n: shapes[n] for n in inside}, "BF16")
    index = {"metadata": {"total_size": 1}, "weight_map": {n: name for name, inside in pieces.items() for n in inside}}
    parts["model.safetensors.index.json"] = json.dumps(index).encode()
    return {"directory/whole": directory(whole), "directory/parts": directory(parts)}


def configs():
    """Configurations of families, of scaled RoPE, and what else stands beside a model."""
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 64,
        "num_attention_heads": 4,
    }
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    mistral = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "hidden_size": 4096,
        "head_dim": 128,
    }
    return {
        "config/mta": dict(CONFIG, model_type="mta", architectures=["MtaForCausalLM"], auto_map={"AutoConfig": "x.y"}),
        "config/llama": dict(llama, rope_scaling=scaling, head_dim=16, eos_token_id=[1, 2], torch_dtype="bfloat16"),
        "config/new": dict(
            llama, rope_parameters=dict(scaling, rope_theta=500000.0), dtype="bfloat16", layer_types=["full_attention"]
        ),
        "config/linear": dict(llama, rope_scaling={"type": "linear", "factor": 1.0}, hidden_act="silu", mlp_bias=False),
        "config/mistral": mistral,
        "config/generation": {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6, "max_length": 4096},
    }


def main():
    out = sys.argv[1]
    shapes = {"model.embed_tokens.weight": [7, 4], "model.norm.weight": [4]}
    shapes.update({"model.layers.0." + k: v for k, v in LAYER.items()})
    plain = {
        k: v
        for k, v in CONFIG.items()
        if "kq_" not in k and "head_mix" not in k and "head_norm" not in k and "gate" not in k
    }
    diff = dict(plain, attention_type="diff", head_norm="group_depth_scaled")
    ranks = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    ranks += b"".join(
        base64.b64encode(w) + b" %d\n" % (256 + i) for i, w in enumerate([b"th", b"the", b" t", b"\xc3\xa9", b"  "])
    )
    tokenizer = {"name": "bytes", "vocab_size": 259}
    prepared = {
        "shards": {
            "x_train_000000.bin": {"tokens": 40, "documents": 3, "preparation": "1"},
            "y_train_000000.bin": {"tokens": 20, "documents": 2, "preparation": "1"},
        },
        "preparations": {"1": {"tokenizer": tokenizer}},
    }
    text = "The the  \u00e9\u00e8 don't 12345\n\n x\t\U0001f600 ".encode()
    seeds = {
        "json/config": json.dumps(CONFIG).encode(),
        "json/escapes":
            b'["\\u00e9\\ud83d\\ude00\\n\\"\\\\/\xc3\xa9", -0.5e-3, 1e300, true, false, null, {}, [], '
            b'{"a":{"a":1,"a":2}}]',
        "json/deep": b"[" * 20 + b"]" * 20,
        "checkpoint/mta": checkpoint(CONFIG, shapes, "F32"),
        "checkpoint/bf16": checkpoint(CONFIG, shapes, "BF16"),
        "checkpoint/plain": checkpoint(
            plain, {k: v for k, v in shapes.items() if "kq_" not in k and "head_" not in k}, "F16"
        ),
        "checkpoint/diff": checkpoint(
            diff, {k: v for k, v in shapes.items() if "kq_" not in k and "head_" not in k}, "F64"
        ),
        "checkpoint/odd": checkpoint({}, {"a": [], "b": [0, 3], "c": [2, 1, 1, 1, 1, 1, 1, 1]}, "I64"),
        "shard/u16": several({"x_train_000000.bin": shard(list(range(40)), 2, 300)}),
        "shard/u32": several({"x_train_000000.bin": shard(list(range(40)), 4, 0)}),
        "shard/header": several({"x_train_000000.bin": shard([], 2, 300)}),
        "shard/folder": several(
            {
                "x_train_000000.bin": shard(list(range(40)), 2, 259, 1),
                "x_train_000000.mask": bytes(i % 2 for i in range(40)),
                "y_train_000000.bin": shard(list(range(20)), 2, 259),
                "manifest.json": json.dumps(prepared).encode(),
            }
        ),
    }
    seeds.update({name: json.dumps(config).encode() for name, config in configs().items()})
    seeds.update(directories(shapes, ranks))
    for i in range(4):
        seeds["tokenizer/pattern%d" % i] = bytes([i]) + ranks + b"\0" + text
    for name, data in seeds.items():
        path = os.path.join(out, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(data)


if __name__ == "__main__":
    main()
