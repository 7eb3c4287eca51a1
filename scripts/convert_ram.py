#!/usr/bin/env python3
"""The checkpoints of the paper's authors (facebookresearch/RAM, projects/mta: consolidated.pth and params.json) to
ours and back.

    convert_ram.py RAM_DIR OUT_DIR [--dtype bf16] [--tokenizer NAME|FILE [--pattern NAME]]
                                                                         RAM -> OUT_DIR/config.json, model.safetensors
    convert_ram.py --back DIR OUT_DIR                                    DIR -> OUT_DIR/params.json, consolidated.pth

How the two forms differ, apart from names:
- RoPE turns pairs (2t, 2t+1) of a head in theirs, (t, t + HS/2) in ours. So the rows of wq and wk move.
- A head kernel after the softmax is stored as (in, out) in theirs, as (out, in) in ours. Their linear layers over all
  heads (wpsm, wposm) are (out, in) already.
- Their kernels have one more dimension, of size 1. A tied head is a second key of the embedding in theirs.

Without --tokenizer it is the one that params.json names: bytes, toy (in theirs: char), or a rank file, which is looked
for at its path and beside consolidated.pth.

--back writes what the authors' generate.py loads: every key of their model, the sizes that give our width of the MLP,
the type of the weights, and the tokenizer if their code has it: bytes, toy, or a rank file of Llama 3's pattern, by its
path. Of another tokenizer it says that params.json names none. Needs PyTorch."""

import argparse
import json
import os
import pickle
import re
import shutil
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "data"))
from export import (  # noqa: E402
    check_keys, check_tensors, check_values, model_tensors, pieces, read_config, read_tensors, verify, weight_files,
    without_extras,
)
from options import Parser  # noqa: E402
from shards import run_program  # noqa: E402
from tokenizer import PATTERNS, UserError, open_tokenizer  # noqa: E402

try:
    import torch
except ImportError:
    torch = None

LAYER_NAMES = {  # theirs: ours
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.mta_kernel": "self_attn.kq_conv.weight",
    "attention.mta_kernel_after_sm": "self_attn.kq_conv_post.weight",
    "attention.wpsm.weight": "self_attn.head_mix_pre.weight",
    "attention.wposm.weight": "self_attn.head_mix.weight",
    "attention.head_kernel": "self_attn.head_mix.weight",
    "attention.subln.weight": "self_attn.head_norm.weight",
    "attention.gate.weight": "self_attn.head_gate.weight",
    "attention.gate.bias": "self_attn.head_gate.bias",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
TOP_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
TIED = ("output.weight", "output.tied_module.weight")  # of a tied head; the second where it is a module of its own
TRITON_NAMES = {
    "mta_conv_triton.weight": "mta_kernel",
    "mta_conv_after_sm_triton.weight": "mta_kernel_after_sm",
    "wpsm_triton.weight": "wpsm.weight",
    "wposm_triton.weight": "wposm.weight",
}
# Keys of params.json that do not change a model's result, and those whose meaning is read here or shows in the tensors.
# Any other key that is set is refused.
KNOWN_KEYS = set(
    "dim n_layers head_dim n_heads n_kv_heads ffn_dim_multiplier multiple_of norm_eps rope_theta init_base_std "
    "init_std_factor max_seqlen cache_attention_maps dropout triton seed vocab_size weight_tying sliding_window mta "
    "use_mta query_kernel_size key_kernel_size pad_key mta_layers after_sm_query_kernel_size after_sm_key_kernel_size "
    "init_method head_kernel_size group_norm layer_norm_rescale curse_norm pre_sm_linear_head post_sm_linear_head "
    "add_gating gate_1d".split()
)
NUMBERS = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "rope_theta", "norm_eps", "max_seqlen"}
ABSENT = {"n_heads", "n_kv_heads", "head_dim"}  # may be null
DTYPES = torch and {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def halves_from_pairs(w, heads):
    """Rows of a head: (2t, 2t+1) -> (t, t + HS/2)."""
    rows, dim = w.shape
    return w.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def pairs_from_halves(w, heads):
    """The inverse of halves_from_pairs."""
    rows, dim = w.shape
    return w.view(heads, 2, rows // heads // 2, dim).transpose(1, 2).reshape(rows, dim)


def split_layer(name, prefix):
    """ "PREFIX.3.REST" -> (3, REST)."""
    number, rest = name[len(prefix) + 1 :].split(".", 1)
    return int(number), rest


def refuse_unknown(params, mta):
    """What of their model parameters has no counterpart here."""
    if (
        mta.get("curse_norm")
        or (mta.get("add_gating") and not mta.get("gate_1d", True))
        or mta.get("pad_key", "both") != "both"
    ):
        raise UserError("params.json: curse_norm, gate_1d false and pad_key other than both have no counterpart here")
    unknown = [key for part in (params, mta) for key in part if key not in KNOWN_KEYS and part[key]]
    if unknown:
        raise UserError("params.json: what the key %s does is not known here" % unknown[0])
    if params.get("sliding_window"):
        raise UserError("params.json: sliding_window has no counterpart here: attention sees all positions")


def our_name(name):
    """The name of a tensor of theirs here, and theirs in its layer ("" where it is in none)."""
    if name in TOP_NAMES:
        return TOP_NAMES[name], ""
    if not name.startswith("layers."):
        raise UserError("tensor %s is unknown" % name)
    layer, rest = split_layer(name, "layers")
    if rest.startswith("attention.triton_mta."):
        rest = "attention." + TRITON_NAMES.get(rest[len("attention.triton_mta.") :], "?")
    if rest not in LAYER_NAMES:
        raise UserError("tensor %s is unknown" % name)
    return "model.layers.%d.%s" % (layer, LAYER_NAMES[rest]), rest


def our_form(rest, t, heads, kv_heads):
    """A layer's tensor of theirs as it is here."""
    if rest == "attention.wq.weight":
        return halves_from_pairs(t, heads)
    if rest == "attention.wk.weight":
        return halves_from_pairs(t, kv_heads)
    if rest in ("attention.mta_kernel", "attention.mta_kernel_after_sm"):
        return t.reshape(heads, t.shape[-2], t.shape[-1])
    if rest == "attention.head_kernel":
        return t.transpose(1, 2)
    if rest in ("attention.wpsm.weight", "attention.wposm.weight"):
        return t.reshape(1, heads, heads)
    return t.reshape(-1) if rest.startswith("attention.gate.") else t


def shapes_of(tensors, kind):
    """{layer: shape} of self_attn.KIND.weight."""
    end = ".self_attn.%s.weight" % kind
    return {split_layer(n, "model.layers")[0]: tuple(t.shape) for n, t in tensors.items() if n.endswith(end)}


def floats_of(name, t):
    """A tensor of consolidated.pth without its gradient; refused where it is none, or holds no plain numbers."""
    kind = t.dtype if isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta else type(t).__name__
    if kind not in (*DTYPES.values(), torch.float64):
        kind = str(kind).replace("torch.", "")
        raise UserError("tensor %s: got %s, wanted a tensor of float32, bfloat16 or float16" % (name, kind))
    return t.detach()


def check_whole(tensors, config):
    """Refuses a part of a model, and tensors of other sizes."""
    wanted, form = model_tensors(config), "consolidated.pth: %s, as it is called here, "
    for name in sorted(set(wanted) ^ set(tensors)):
        raise UserError(form % name + ("is missing" if name in wanted else "is not one of this model"))
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(form % name + "is %s, wanted %s" % (list(tensors[name].shape), list(shape)))


def check_said(mta, layers, before, after, pre, post):
    """Refuses tensors of which params.json says something else: a layer whose kernel is missing would be a plain one.
    before, after: layers with convolutions; pre, post: how many heads are mixed."""
    on, places = mta.get("use_mta"), mta.get("mta_layers")
    chosen = set(range(layers)) & set(range(layers) if places is None else map(int, str(places).split(",")))
    kernels = ("mta_kernel", "", 1, before), ("mta_kernel_after_sm", "after_sm_", None, after)
    for name, prefix, absent, found in kernels:
        sizes = [mta.get(prefix + key, absent) for key in ("query_kernel_size", "key_kernel_size")]
        wanted = chosen if on and None not in sizes else set()
        if set(found) != wanted:
            raise UserError("params.json: %s in the layers %s, but the tensors have it in %s" %
                            (name, sorted(wanted), sorted(found)))
    for keys, found in ((["pre_sm_linear_head"], pre), (["post_sm_linear_head", "head_kernel_size"], post)):
        said = any(on and mta.get(key) for key in keys)
        if said != bool(found):
            raise UserError("params.json: %s %s set, but the tensors mix %s heads there" %
                            (" or ".join(keys), "is" if said else "is not", "some" if found else "no"))


def only(what, sizes, absent):
    """The one element of a set of sizes; `absent` of an empty one."""
    if len(sizes) > 1:
        raise UserError("%s of different sizes (%s and %s) have no counterpart here" % (what, *sorted(sizes)[:2]))
    return next(iter(sizes), absent)


def our_config(tensors, params, heads, kv_heads):
    """config.json of our tensors."""
    mta, embed = params.get("mta") or {}, tensors["model.embed_tokens.weight"]
    layers = 1 + max((split_layer(n, "model.layers")[0] for n in tensors if ".layers." in n), default=-1)
    if not layers:
        raise UserError("consolidated.pth: no tensor of a layer in it, wanted layers.0. and so on")
    for key, size in (("n_layers", layers), ("dim", embed.shape[1])):
        if params.get(key, size) != size:
            raise UserError("params.json: %s %s, but the tensors have %d" % (key, params[key], size))
    before, after = shapes_of(tensors, "kq_conv"), shapes_of(tensors, "kq_conv_post")
    if before and after and set(before) != set(after):
        raise UserError("convolutions before and after the softmax in different layers have no counterpart here")
    cq, ck = only("kernels", {shape[1:] for shape in [*before.values(), *after.values()]}, (6, 11))
    pre, post = (only("head mixings", {shape[1] for shape in shapes_of(tensors, kind).values()}, 0)
                 for kind in ("head_mix_pre", "head_mix"))
    check_said(mta, layers, before, after, pre, post)
    norm = "none" if not mta.get("group_norm") else "group_depth_scaled" if mta.get("layer_norm_rescale") else "group"
    plain = not (before or after or pre or post or norm != "none" or mta.get("add_gating"))
    return {
        "architectures": ["LlamaForCausalLM" if plain else "MtaForCausalLM"],
        "model_type": "llama" if plain else "mta",
        "vocab_size": embed.shape[0],
        "hidden_size": embed.shape[1],
        "intermediate_size": tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": params.get("max_seqlen", 2048),
        "hidden_act": "silu",
        "rope_theta": float(params.get("rope_theta", 10000.0)),
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_type": "mta",
        "kq_conv_layers": sorted(before or after),
        "kq_conv_query_size": cq,
        "kq_conv_key_size": ck,
        "kq_conv_pre_softmax": bool(before),
        "kq_conv_post_softmax": bool(after),
        "head_mix_pre_softmax": pre,
        "head_mix_post_softmax": post,
        "head_norm": norm,
        "head_gate": bool(mta.get("add_gating")),
        "bos_token_id": None,  # without these keys a LLaMA has 1 and 2, and its texts would end at the id 2
        "eos_token_id": None,
    }


def to_ours(state, params):
    """Their state dict and model parameters -> our tensors and config."""
    refuse_unknown(params, params.get("mta") or {})
    for key in sorted(NUMBERS & set(params)):
        if type(params[key]) not in (int, float) and (params[key] is not None or key not in ABSENT):
            raise UserError("params.json: %s: got %s, wanted a number" % (key, json.dumps(params[key])))
    heads = params.get("n_heads") or params["dim"] // params["head_dim"]
    kv_heads = params.get("n_kv_heads") or heads
    tensors = {}
    for name, t in ((str(name), t) for name, t in state.items()):
        if name in TIED and params.get("weight_tying"):
            if not torch.equal(t, state.get("tok_embeddings.weight", t)):
                raise UserError("tensor %s is another than tok_embeddings.weight, but params.json says that they are "
                                "one (weight_tying)" % name)
            continue
        if name.startswith("rope_embeddings."):
            continue
        ours, rest = our_name(name)
        if ours in tensors:
            raise UserError("tensor %s is a second one for %s" % (name, ours))
        try:
            tensors[ours] = our_form(rest, floats_of(name, t), heads, kv_heads)
        except (RuntimeError, ValueError):
            raise UserError("tensor %s: its shape %s does not fit %d heads" % (name, list(t.shape), heads)) from None
    if "lm_head.weight" not in tensors and not params.get("weight_tying"):
        raise UserError("tensor output.weight is missing, and params.json does not say weight_tying")
    config = our_config(tensors, params, heads, kv_heads)
    check_whole(tensors, config)
    return tensors, config


def their_form(rest, t, heads, kv_heads):
    """A layer's tensor of ours as it is there."""
    if rest == "self_attn.q_proj.weight":
        return pairs_from_halves(t, heads)
    if rest == "self_attn.k_proj.weight":
        return pairs_from_halves(t, kv_heads)
    if rest in ("self_attn.kq_conv.weight", "self_attn.kq_conv_post.weight"):
        return t[:, None]
    if rest == "self_attn.head_mix.weight":
        return t.transpose(1, 2)
    if rest == "self_attn.head_mix_pre.weight":
        if t.shape[0] != 1:
            raise UserError("head mixing before the softmax in groups has no counterpart there, only of all heads")
        return t[0]
    return t[None] if rest == "self_attn.head_gate.weight" else t


def rope_theta(config):
    """RoPE's base, wherever config.json has it: transformers saves it inside of rope_parameters."""
    said = [config.get("rope_theta")]
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        plain = isinstance(rope, dict) and {"default"} >= {rope.get(k) or "default" for k in ("rope_type", "type")}
        if not plain or set(rope) - {"rope_type", "type", "rope_theta"}:
            raise UserError("config.json: %s has no counterpart there, only rope_theta" % key)
        said.append(rope.get("rope_theta"))
    said = sorted({theta for theta in said if theta is not None})
    if len(said) > 1:
        raise UserError("config.json: rope_theta: got %g and %g, wanted one" % (said[0], said[1]))
    return said[0] if said else 10000.0


def their_width(dim, hidden):
    """The two keys of params.json that make an MLP of theirs `hidden` wide: int(factor * int(2 * 4 dim / 3)), rounded
    up to a multiple. With our width as the multiple anything from 1 up to it will do, so that every width has a factor;
    the half keeps rounding from taking 1 down to 0."""
    return {"ffn_dim_multiplier": min(1.0, (hidden + 0.5) / (8 * dim // 3)), "multiple_of": hidden}


def to_theirs(tensors, config):
    """Our tensors and config -> their state dict and model parameters."""
    theta = rope_theta(config)
    if config.get("attention_type", "mta") != "mta":
        raise UserError("config.json: attention_type diff has no counterpart there")
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    theirs = {v: k for k, v in LAYER_NAMES.items() if k != "attention.wposm.weight"}
    top = {v: k for k, v in TOP_NAMES.items()}
    state = {}
    for name, t in tensors.items():
        if name in top:
            state[top[name]] = t
            continue
        layer, rest = split_layer(name, "model.layers") if name.startswith("model.layers.") else (0, name)
        if rest not in theirs:
            raise UserError("%s has no counterpart there" % name)
        t = their_form(rest, t, heads, kv_heads)
        state["layers.%d.%s" % (layer, theirs[rest])] = t.contiguous()
    tied = "output.weight" not in state
    if tied:
        state[TIED[1]] = state["tok_embeddings.weight"]  # their load_state_dict is strict; stored once all the same
    norm, layers = config.get("head_norm", "none"), config.get("kq_conv_layers") or []
    mixed = config.get("head_mix_pre_softmax") or config.get("head_mix_post_softmax")
    cq, ck = config.get("kq_conv_query_size", 6), config.get("kq_conv_key_size", 11)
    pre, post = bool(layers) and config.get("kq_conv_pre_softmax"), bool(layers) and config.get("kq_conv_post_softmax")
    mta = {
        "use_mta": bool(layers or mixed),
        "query_kernel_size": cq if pre else None,
        "key_kernel_size": ck if pre else None,
        "after_sm_query_kernel_size": cq if post else None,
        "after_sm_key_kernel_size": ck if post else None,
        "pad_key": "both",
        "mta_layers": ",".join(map(str, layers)) if layers else None,
        "init_method": "identity",
        "head_kernel_size": config.get("head_mix_post_softmax") or None,
        "pre_sm_linear_head": bool(config.get("head_mix_pre_softmax")),
        "post_sm_linear_head": False,
        "group_norm": norm != "none",
        "layer_norm_rescale": norm == "group_depth_scaled",
        "add_gating": bool(config.get("head_gate")),
        "gate_1d": True,
    }
    params = {
        "dim": dim,
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        **their_width(dim, config["intermediate_size"]),
        "rope_theta": theta,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "vocab_size": config["vocab_size"],
        "weight_tying": tied,
        "max_seqlen": config.get("max_position_embeddings", 2048),
        "mta": mta,
    }
    return state, params


def write_safetensors(path, tensors):
    """tensors: name -> CPU tensor of F32, BF16 or F16; one at a time in memory beside them."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            t = t.contiguous()
            f.write((t.view(torch.int16) if t.element_size() == 2 else t).numpy().tobytes())


def load_tensors(headers):
    """What read_header says of tensors -> name: tensor, copied."""
    out = {}
    for name, t in headers.items():
        with open(t["path"], "rb") as f:
            data = bytearray(b"".join(pieces(f, t)))
        out[name] = torch.frombuffer(data, dtype=DTYPES[t["dtype"]]).view(t["shape"])
    return out


def read_model(folder):
    """Tensors and config.json of a model of ours, all that belongs to it and nothing else; of a LLaMA as far as its
    mathematics is known."""
    files, placed = weight_files(folder)
    verify(folder, ["config.json", *files])
    path = os.path.join(folder, "config.json")
    config = read_config(path)
    check_keys(path, config)
    check_values(path, config)
    tensors = without_extras(read_tensors(folder, files, placed), config)
    check_tensors(folder, tensors, model_tensors(config))
    return load_tensors(tensors), config


def load_state(path):
    """The tensors of consolidated.pth, which holds them alone or under "model"."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        other = re.search(r"GLOBAL (\S+) was not an allowed", str(e))
        if other:  # PyTorch's text is of how to trust it
            raise UserError("%s: it holds %s too, wanted tensors alone: save the model's state_dict() anew" %
                            (path, other[1]))
        raise UserError("%s: PyTorch does not read it: %s" % (path, (str(e) or type(e).__name__).split("\n")[0]))
    if not isinstance(state, dict):
        raise UserError("%s: holds a %s, wanted a dictionary of tensors" % (path, type(state).__name__))
    return state.get("model", state) if not hasattr(state.get("model", None), "shape") else state


def tokenizer_keys(file, pattern):
    """What config.json says of a tokenizer."""
    tok = open_tokenizer(file, pattern, encoder=False)
    keys = {"tokenizer": os.path.basename(file), "bos_token_id": tok.bos}
    keys["eos_token_id"] = tok.eos if tok.eos >= 0 else tok.bos
    return dict(keys, tokenizer_pattern=pattern) if pattern else keys


THEIR_TOKENIZERS = {"bytes": "bytes", "char": "toy"}  # theirs: ours


def tokenizer_of_theirs(source, params, vocab):
    """The tokenizer that params.json names, its pattern, and if it cannot be had, why."""
    data = params.get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    named = named if isinstance(named, dict) else {}
    name, path, pattern = named.get("name"), named.get("path"), None
    if not isinstance(name, str):
        return None, None, "params.json names none"
    ours = THEIR_TOKENIZERS.get(name)
    if name == "tiktoken" and isinstance(path, str):
        beside = os.path.join(source, os.path.basename(path))
        ours, pattern = next((p for p in (path, beside) if os.path.isfile(p)), None), "llama3"
        if not ours:
            return None, None, "%s, which params.json names, is neither there nor in %s" % (path, source)
    if not ours:
        return None, None, "%s of params.json has no counterpart here" % name
    try:
        ids = open_tokenizer(ours, pattern, encoder=False).vocab
    except UserError as e:
        return None, None, str(e)
    if ids > vocab:
        return None, None, "%s has %d ids here, the model's vocabulary %d" % (os.path.basename(ours), ids, vocab)
    return ours, pattern, None


def check_tokenizer(given, pattern, theirs, their_pattern, vocab):
    """Refuses --tokenizer where the model has no such ids, or params.json names another one that is there."""
    tok = open_tokenizer(given, pattern, encoder=False)
    if tok.vocab > vocab:
        raise UserError("--tokenizer: %s has %d ids, the model's vocabulary %d" % (given, tok.vocab, vocab))
    if not theirs:
        return
    of_theirs = open_tokenizer(theirs, their_pattern, encoder=False)
    same = (tok.name, tok.vocab) == (of_theirs.name, of_theirs.vocab)
    if same and theirs not in THEIR_TOKENIZERS.values():
        with open(given, "rb") as mine, open(theirs, "rb") as their:
            same = mine.read() == their.read()
    if not same:
        raise UserError("--tokenizer: %s, but params.json names %s, which is another" % (given, theirs))


def convert(source, out, dtype, tokenizer, pattern):
    with open(os.path.join(source, "params.json"), encoding="utf-8") as f:
        params = json.load(f)
    if not isinstance(params, dict) or not isinstance(params.get("model", params), dict):
        raise UserError("params.json: wanted an object with the model's parameters")
    model = dict(params.get("model", params))
    if "seq_len" in (params.get("data") or {}):
        model["max_seqlen"] = params["data"]["seq_len"]
    tensors, config = to_ours(load_state(os.path.join(source, "consolidated.pth")), model)
    if dtype != "stored":
        tensors = {name: t.to(DTYPES[dtype.upper()]) for name, t in tensors.items()}
    doubles = next((name for name, t in tensors.items() if t.dtype not in DTYPES.values()), None)
    if doubles:
        text = "consolidated.pth: %s, as it is called here, is float64: --dtype says what it becomes"
        raise UserError(text % doubles)
    theirs, their_pattern, why = tokenizer_of_theirs(source, params, config["vocab_size"])
    if tokenizer is None:
        tokenizer, pattern = theirs, their_pattern
    else:
        why = None
        check_tokenizer(tokenizer, pattern, theirs, their_pattern, config["vocab_size"])
    if tokenizer:
        config.update(tokenizer_keys(tokenizer, pattern))
    os.makedirs(out, exist_ok=True)
    if tokenizer and tokenizer not in THEIR_TOKENIZERS.values():
        shutil.copyfile(tokenizer, os.path.join(out, config["tokenizer"]))
    write_safetensors(os.path.join(out, "model.safetensors"), tensors)
    with open(os.path.join(out, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)
    said = "no tokenizer: %s; infer_mta --tokenizer names one" % why if why else "tokenizer %s" % config["tokenizer"]
    print("%s: %d tensors, %d parameters; %s" % (out, len(tensors), sum(t.numel() for t in tensors.values()), said))


def their_tokenizer(source, config):
    """The name and the path by which their build_tokenizer makes a model's tokenizer, and if it does not, why. Its
    tiktoken knows the pattern of Llama 3 alone, and the two ids after the ranks for a text's begin and end."""
    name = config.get("tokenizer")
    if not name:
        return None, None, "config.json names none"
    built_in = [theirs for theirs, ours in THEIR_TOKENIZERS.items() if ours == name]
    if built_in:
        return built_in[0], None, None
    path = os.path.abspath(os.path.join(source, name))
    try:
        pattern = open_tokenizer(path, config.get("tokenizer_pattern"), encoder=False).name
    except UserError as e:
        return None, None, str(e)
    if pattern != "llama3":
        return None, None, "%s is split as %s, theirs as llama3" % (name, pattern)
    return "tiktoken", path, None


def convert_back(source, out):
    tensors, config = read_model(source)
    state, params = to_theirs(tensors, config)
    name, path, why = their_tokenizer(source, config)
    form = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[state["tok_embeddings.weight"].dtype]
    written = {
        "model": params,
        "distributed": {"model_dtype": form},
        "data": {"seq_len": params["max_seqlen"], "tokenizer": {"name": name, "path": path}},
    }
    os.makedirs(out, exist_ok=True)
    torch.save({"model": state}, os.path.join(out, "consolidated.pth"))
    with open(os.path.join(out, "params.json"), "w", encoding="utf-8") as f:
        json.dump(written, f, indent=2)
    lost = "; params.json names no tokenizer, which generate.py there wants: %s" % why if why else ""
    print("%s: %d tensors%s" % (out, len(state), lost))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="DIR")
    parser.add_argument("out", metavar="OUT_DIR")
    parser.add_argument("--back", action="store_true", help="ours to theirs")
    parser.add_argument("--dtype", choices=("stored", "bf16", "f16", "f32"), default="stored",
                        help="form of the weights (default: as stored)")
    parser.add_argument(
        "--tokenizer", metavar="NAME|FILE",
        help="bytes, toy, or a rank file to copy and name in config.json (default: the one that params.json names)"
    )
    parser.add_argument("--pattern", choices=sorted(PATTERNS),
                        help="how it splits text, where its number of ranks does not tell")
    args = parser.parse_args()
    if args.back and (args.dtype != "stored" or args.tokenizer is not None):
        parser.error("--%s: it has no use beside --back" % ("dtype" if args.tokenizer is None else "tokenizer"))
    if args.pattern and args.tokenizer is None:
        parser.error("--pattern: it has no use without --tokenizer")
    try:
        if torch is None:
            raise UserError("PyTorch is needed to read and write .pth files: pip install torch")
        for name in ("consolidated.pth", "params.json") if args.back else ("model.safetensors", "config.json"):
            if os.path.lexists(os.path.join(args.out, name)):
                raise UserError("%s is there already; wanted a new folder" % os.path.join(args.out, name))
        if args.back:
            convert_back(args.source, args.out)
        else:
            convert(args.source, args.out, args.dtype, args.tokenizer, args.pattern)
    except (UserError, OSError, KeyError, ValueError) as e:
        print("convert_ram.py: %s" % (e if not isinstance(e, KeyError) else "key %s is missing" % e), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
