#!/usr/bin/env python3
"""Makes a checkpoint of mta.c into a model for transformers and the programs that build on it:

    export.py DIR OUT [--bf16]      DIR: a checkpoint; or a run's folder, whose newest checkpoint is taken; or a LLaMA
        of another program, in one file or in several with model.safetensors.index.json

writes into OUT, which must be new or empty:
    model.safetensors, config.json      the weights as they are stored (--bf16: rounded to bf16), without the optimizer
    configuration_mta.py, modeling_mta.py     of a model with MTA's or DIFF Transformer's attention: its code, for
        AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)   (transformers 4.57 and 5.24 are tested)
    tokenizer.json, tokenizer_config.json, generation_config.json     of a rank file or of `bytes`, for AutoTokenizer:
        the same ids. BOS goes before a text, as infer_mta does it. Text that looks like a special token stays text,
        in a chat template too. TRL's trainers write the end of a text as text; for them load the tokenizer by
        AutoTokenizer.from_pretrained(OUT, split_special_tokens=False).
        If DIR has a tokenizer.json, as transformers saves it, or a generation_config.json, it is copied as it is.
    the rank file, so that infer_mta reads OUT too
A plain model is LLaMA and needs no code. The tokenizer `toy` has no counterpart in transformers, since it refuses most
characters: no tokenizer is written. The standard library suffices; --bf16 needs numpy.
"""

import argparse
import json
import math
import os
import re
import shutil
import struct
import sys
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
CODE = os.path.join(ROOT, "scripts", "hf")
sys.path.insert(0, os.path.join(ROOT, "data"))
from options import Parser  # noqa: E402
from shards import run_program  # noqa: E402
from tokenizer import PATTERNS, UserError, members, need, open_tokenizer, read_ranks  # noqa: E402

# What mta.c writes into the config.json of a model with an attention of its own: LLaMA's keys, then those that
# transformers adds where it saves such a model again, then that attention's with what they are where they are absent
# (mta/config.h).
LLAMA_KEYS = set(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings hidden_act attention_bias mlp_bias attention_dropout "
    "rope_theta rms_norm_eps tie_word_embeddings rope_scaling bos_token_id eos_token_id tokenizer tokenizer_pattern "
    "initializer_range torch_dtype use_cache auto_map query_chunk "
    "dtype transformers_version rope_parameters pad_token_id pretraining_tp".split()
)
ATTENTION = {
    "attention_type": "mta",
    "kq_conv_layers": [],
    "kq_conv_query_size": 6,
    "kq_conv_key_size": 11,
    "kq_conv_pre_softmax": False,
    "kq_conv_post_softmax": False,
    "head_mix_pre_softmax": 0,
    "head_mix_post_softmax": 0,
    "head_norm": "none",
    "head_gate": False,
}
CHOICES = {
    "attention_type": ("mta", "diff"),
    "head_norm": ("none", "group", "group_depth_scaled"),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
}
AUTO_MAP = {
    "AutoConfig": "configuration_mta.MtaConfig",
    "AutoModel": "modeling_mta.MtaModel",
    "AutoModelForCausalLM": "modeling_mta.MtaForCausalLM",
}
# What transformers saves of a tokenizer: with tokens that were added, a chat template, what its class was read from.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt",
)
CHAT_TEMPLATES = "additional_chat_templates"  # those of names, each a file in this folder
INDEX = "model.safetensors.index.json"
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}  # bytes of a value
PIECE = 1 << 24  # bytes read at once


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint


def find_checkpoint(path):
    """The folder itself, or the newest checkpoint of a run's folder."""
    if os.path.isfile(os.path.join(path, "config.json")):
        return path
    names = os.listdir(path) if os.path.isdir(path) else ()
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step-(?!0\d{8})\d{8,18}", name)]
    if not steps:
        raise UserError("%s: no checkpoint: neither config.json nor step-NNNNNNNN in it" % path)
    return os.path.join(path, "step-%08d" % max(steps))


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f, object_pairs_hook=members)
    except ValueError as e:
        raise UserError("%s: no JSON: %s" % (path, e))
    if not isinstance(value, dict):
        raise UserError("%s: wanted a JSON object" % path)
    return value


def verify(folder, names):
    """Sizes and checksums as the checkpoint's manifest has them, where there is one."""
    path = os.path.join(folder, "manifest.json")
    files = read_json(path).get("files", {}) if os.path.exists(path) else {}
    if not isinstance(files, dict):
        raise UserError('%s: "files" is no object' % path)
    for name in filter(files.get, names):
        size, crc = 0, 0
        with open(os.path.join(folder, name), "rb") as f:
            for piece in iter(lambda: f.read(PIECE), b""):
                size, crc = size + len(piece), zlib.crc32(piece, crc)
        got, wanted = (size, crc), (files[name]["bytes"], files[name]["crc32"])
        if got != wanted:
            raise UserError(
                "%s: damaged: got %d bytes with CRC-32 %08x, manifest.json says %d and %08x"
                % (os.path.join(folder, name), *got, *wanted)
            )


def read_config(path):
    """config.json, every key of the attention in it; refused where the code of the export would not do what it says."""
    config = read_json(path)
    family, classes = config.get("model_type"), config.get("architectures") or []
    known = {"llama": ["LlamaForCausalLM"], "mta": ["MtaForCausalLM"]}
    if family not in known or classes not in ([], known[family]):
        raise UserError("%s: model_type %s, architectures %s: wanted a llama or mta of mta.c" % (path, family, classes))
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError("%s: %s: got %s, wanted a whole number from 1" % (path, key, json.dumps(config.get(key))))
    if family == "llama":
        return config
    check_keys(path, config)
    config = dict(config, **{k: config[k] if config.get(k) is not None else v for k, v in ATTENTION.items()})
    check_values(path, config)
    return config


def check_keys(path, config):
    """Refuses a key of config.json that mta.c does not write, nor transformers where it saves such a model again."""
    unknown = sorted(k for k in set(config) - LLAMA_KEYS - set(ATTENTION) if config[k] is not None)
    if unknown:
        raise UserError("%s: what the key %s does is not known here" % (path, unknown[0]))


def check_values(path, config):
    """Refuses a value of config.json that says something else than what mta.c computes."""
    for key, words in CHOICES.items():
        if config.get(key) is not None and config[key] not in words:
            wanted = " or ".join(str(w).lower() for w in words)
            raise UserError("%s: %s: got %s, wanted %s" % (path, key, json.dumps(config[key]), wanted))


def attention_tensors(c, layer):
    """[(name, shape)] of what a layer's attention has beside LLaMA's projections."""
    heads, out = c["num_attention_heads"], []
    size = c["hidden_size"] // heads
    for when, suffix in (("pre", ""), ("post", "_post")):
        if layer in c["kq_conv_layers"] and c["kq_conv_%s_softmax" % when]:
            kernel = (heads, c["kq_conv_query_size"], c["kq_conv_key_size"])
            out.append(("kq_conv%s.weight" % suffix, kernel))
    for when, suffix in (("pre", "_pre"), ("post", "")):
        group = c["head_mix_%s_softmax" % when]
        if group:
            out.append(("head_mix%s.weight" % suffix, (heads // group, group, group)))
    if c["head_norm"] != "none":
        out.append(("head_norm.weight", (size * (2 if c["attention_type"] == "diff" else 1),)))
    if c["head_gate"]:
        out += [("head_gate.weight", (size,)), ("head_gate.bias", (1,))]
    if c["attention_type"] == "diff":
        out += [("lambda_" + x, (size,)) for x in ("q1", "k1", "q2", "k2")]
    return out


def model_tensors(c):
    """{name: shape} of all tensors of a model."""
    wide, hidden, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    heads = c["num_attention_heads"]
    keys = (c.get("num_key_value_heads") or heads) * (wide // heads)
    out = {"model.embed_tokens.weight": (vocab, wide), "model.norm.weight": (wide,)}
    for layer in range(c["num_hidden_layers"]):
        attention = [(x + "_proj.weight", (n, wide)) for x, n in (("q", wide), ("k", keys), ("v", keys), ("o", wide))]
        if c["model_type"] == "mta":
            attention += attention_tensors(c, layer)
        names = [("self_attn." + name, shape) for name, shape in attention]
        names += [("mlp.%s_proj.weight" % x, (hidden, wide)) for x in ("gate", "up")]
        names += [("mlp.down_proj.weight", (wide, hidden))]
        names += [(x + "_layernorm.weight", (wide,)) for x in ("input", "post_attention")]
        out.update(("model.layers.%d.%s" % (layer, name), shape) for name, shape in names)
    if not c.get("tie_word_embeddings"):
        out["lm_head.weight"] = (vocab, wide)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# The weights


def read_header(path):
    """{name: {"dtype", "shape", "path", "begin", "end", "format"}} of a safetensors file: where each tensor's bytes
    are, and whose form the file says it has. Refused where a reader of safetensors would refuse it."""
    with open(path, "rb") as f:
        head, size = f.read(8), os.path.getsize(path)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 1 << 40
        if length > size - 8:
            raise UserError("%s: no safetensors file" % path)
        try:
            header = json.loads(f.read(length), object_pairs_hook=members)
        except ValueError as e:
            raise UserError("%s: its header is no JSON: %s" % (path, e))
    start = 8 + length
    if not isinstance(header, dict):
        raise UserError("%s: its header is no JSON object" % path)
    more = header.pop("__metadata__", None) or {}
    if not isinstance(more, dict) or not all(isinstance(value, str) for value in more.values()):
        raise UserError("%s: __metadata__: wanted an object of texts" % path)
    for name, t in header.items():
        try:
            begin, end = t.pop("data_offsets")
            t.update(path=path, begin=start + begin, end=start + end, shape=list(t["shape"]), dtype=t["dtype"],
                     format=more.get("format"))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError("%s: tensor %s: wanted its dtype, shape and data_offsets" % (path, name))
        if not start <= t["begin"] <= t["end"] <= size:
            raise UserError("%s: tensor %s is not inside of the file" % (path, name))
    at = start
    for name, t in sorted(header.items(), key=lambda entry: (entry[1]["begin"], entry[1]["end"])):
        if t["begin"] != at:
            raise UserError("%s: tensor %s begins at byte %d of the data, wanted %d" %
                            (path, name, t["begin"] - start, at - start))
        at = t["end"]
    if at != size:
        raise UserError("%s: the tensors end at byte %d of the data, the file at %d" % (path, at - start, size - start))
    return header


def weight_files(folder):
    """The names of the files that hold the weights, and {tensor: its file} where there is an index, else None."""
    index = os.path.join(folder, INDEX)
    single = os.path.join(folder, "model.safetensors")
    if os.path.isfile(single) or os.path.islink(single):
        return ["model.safetensors"], None
    if not os.path.isfile(index):
        raise UserError("%s: neither model.safetensors nor %s in it, wanted a checkpoint" % (folder, INDEX))
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError("%s: no weight_map" % index)
    for name, file in placed.items():
        if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
            raise UserError("%s: %s: got %s, wanted the name of a file beside it" % (index, name, json.dumps(file)))
    return sorted(set(placed.values())), placed


def read_tensors(folder, files, placed):
    """read_header of all files together."""
    tensors = {}
    for file in files:
        for name, t in read_header(os.path.join(folder, file)).items():
            if name in tensors:
                raise UserError("%s: tensor %s is in %s too" % (t["path"], name, tensors[name]["path"]))
            tensors[name] = t
    for name, file in (placed or {}).items():
        if name not in tensors or os.path.basename(tensors[name]["path"]) != file:
            raise UserError("%s: tensor %s is not in %s" % (os.path.join(folder, INDEX), name, file))
    return tensors


def same_bytes(a, b):
    if a["dtype"] != b["dtype"] or a["end"] - a["begin"] != b["end"] - b["begin"]:
        return False
    with open(a["path"], "rb") as x, open(b["path"], "rb") as y:
        return all(p == q for p, q in zip(pieces(x, a), pieces(y, b)))


def without_extras(tensors, config):
    """The tensors but for what may stand beside a model: tables of RoPE, and the embedding once more as the head."""
    tied = config.get("tie_word_embeddings") and {"lm_head.weight", "model.embed_tokens.weight"} <= set(tensors)
    head = tensors["lm_head.weight"] if tied else None
    if head and not same_bytes(head, tensors["model.embed_tokens.weight"]):
        raise UserError(
            "%s: tensor lm_head.weight is another than model.embed_tokens.weight, but config.json says that they are "
            "one (tie_word_embeddings)" % head["path"]
        )
    return {n: t for n, t in tensors.items() if not n.endswith(".rotary_emb.inv_freq") and t is not head}


def check_tensors(where, tensors, wanted):
    for name in sorted(set(wanted) ^ set(tensors)):
        at, what = (where, "missing") if name in wanted else (tensors[name]["path"], "not one of this model")
        raise UserError("%s: tensor %s is %s" % (at, name, what))
    for name, shape in wanted.items():
        t = tensors[name]
        if tuple(t["shape"]) != shape:
            raise UserError("%s: tensor %s: got %s, wanted %s" % (t["path"], name, t["shape"], list(shape)))
        if t["dtype"] not in WIDTHS:
            raise UserError("%s: tensor %s: got %s, wanted F32, BF16 or F16" % (t["path"], name, t["dtype"]))
        if t["end"] - t["begin"] != math.prod(shape) * WIDTHS[t["dtype"]]:
            raise UserError("%s: tensor %s: %d bytes do not make its shape" % (t["path"], name, t["end"] - t["begin"]))


def rounded_to_bf16(data, dtype):
    """Bytes of F32 or F16 values -> of BF16, to the nearest, to the even one of two."""
    numpy = need("numpy")
    bits = numpy.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype("<f4").view("<u4")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    near = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return numpy.where(nan, bits >> 16 | 0x40, near).astype("<u2").tobytes()


def pieces(f, t):
    """The bytes of a tensor, of which f is the file."""
    f.seek(t["begin"])
    for left in range(t["end"] - t["begin"], 0, -PIECE):
        piece = f.read(min(PIECE, left))
        if len(piece) != min(PIECE, left):
            raise UserError("%s: it became shorter" % t["path"])
        yield piece


def write_tensors(tensors, path, bf16):
    """All tensors into one file, in the order in which they lie; bf16: rounded to it."""
    names = sorted(tensors, key=lambda n: (tensors[n]["path"], tensors[n]["begin"]))
    out, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        dtype = "BF16" if bf16 else tensors[name]["dtype"]
        size = math.prod(tensors[name]["shape"]) * WIDTHS[dtype]
        out[name] = {"dtype": dtype, "shape": tensors[name]["shape"], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(out).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as to:
        to.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            t = tensors[name]
            with open(t["path"], "rb") as f:
                for piece in pieces(f, t):
                    to.write(rounded_to_bf16(piece, t["dtype"]) if bf16 and t["dtype"] != "BF16" else piece)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


def characters_of_bytes():
    """The printable character that stands for each byte in tokenizer.json (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def unicode_classes():
    """{class: its ranges} of mta/unicode_tables.h: classes of another Unicode version would cut elsewhere."""
    with open(os.path.join(ROOT, "mta", "unicode_tables.h"), encoding="ascii") as f:
        text = f.read()
    names = re.search(r"enum \{ (CLASS_OTHER.*?) \}", text).group(1).replace("CLASS_", "").split(", ")
    starts = [int(x, 16) for x in re.findall(r"0x[0-9a-f]+", text.split("unicode_ranges[UNICODE_RANGES]")[1])]
    ranges = {name: "" for name in names}
    for entry, following in zip(starts, starts[1:] + [0x110000 << 3]):
        ranges[names[entry & 7]] += r"\x{%x}-\x{%x}" % (entry >> 3, (following >> 3) - 1)
    return ranges


def split_regex(pattern):
    """A pattern of data/tokenizer.py as the library tokenizers understands it (Oniguruma): classes of characters and
    both cases spelt out, no possessive repeats (which change no match here), the end of the text as \\z."""
    c = unicode_classes()
    groups = {
        "L": c["UPPER"] + c["LOWER"] + c["LETTER"],
        "N": c["NUMBER"],
        "M": c["MARK"],
        "Lu}\\p{Lt": c["UPPER"],
        "Ll": c["LOWER"],
        "Lm}\\p{Lo": c["LETTER"],
    }
    both = lambda m: "[%s%s%s]" % (m.group(), m.group().upper(), "\u017f" if m.group() == "s" else "")
    out = re.sub(r"\(\?i:(.*?)\)", lambda m: "(?:%s)" % re.sub("[a-z]", both, m.group(1)), PATTERNS[pattern])
    out = re.sub(r"([+*?]|\{1,3\})\+", r"\1", out).replace("$", r"\z")
    for name, ranges in groups.items():
        out = out.replace(r"\p{%s}" % name, "[%s]" % ranges)
    return out.replace(r"\s", "[%s]" % c["SPACE"]).replace(r"\S", "[^%s]" % c["SPACE"])


def last_merge(token, ranks):
    """The two tokens whose merge is the last one that makes `token` of its bytes; None where merges do not get there.
    In any text those two are the only ones that merge to it: what is merged inside of it, is merged in this order."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1)]
        rank, i = min(found)
        if rank == 1 << 30:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts if len(parts) == 2 else None


def special_tokens(tok):
    """{id: name} of what stands around a document."""
    if tok.name == "bytes":
        return {256: "<|bos|>", 257: "<|eos|>", 258: "<|pad|>"}
    if tok.eos >= 0:  # Llama 3's and 4's
        return {tok.bos: "<|begin_of_text|>", tok.eos: "<|end_of_text|>"}
    return {tok.bos: "<|endoftext|>", **unused_tokens(tok)}


def unused_tokens(tok):
    """{id: name} of the ids between the ranks and BOS: without a name each would be a hole, and len(tokenizer), to
    which users resize a model's embedding, less than the largest id and one."""
    return {i: "<|unused_%d|>" % i for i in range(len(read_ranks(tok.path)), tok.bos)}


def tokenizer_json(tok):
    ranks = {bytes([b]): b for b in range(256)} if tok.name == "bytes" else read_ranks(tok.path)
    table = characters_of_bytes()
    spell = lambda token: "".join(table[b] for b in token)
    order = sorted(ranks, key=ranks.get)
    merges = [last_merge(token, ranks) for token in order]
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps = [cut]
    if tok.name != "bytes":
        regex = {"Regex": split_regex(tok.name)}
        steps.insert(0, {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False})
    specials, flags = special_tokens(tok), ("single_word", "lstrip", "rstrip", "normalized")
    vocab = {spell(token): ranks[token] for token in order}
    vocab.update((name, i) for i, name in specials.items())  # else they would get the next free ids, not their own
    start = specials[tok.bos]
    bos = {"SpecialToken": {"id": start, "type_id": 0}}
    text, second = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict({"id": i, "content": name, "special": True}, **dict.fromkeys(flags, False))
            for i, name in sorted(specials.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, bos, second],
            "special_tokens": {start: {"id": start, "ids": [tok.bos], "tokens": [start]}},
        },
        "decoder": cut,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tok.name != "bytes",  # a piece that is a token is that token
            "vocab": vocab,
            "merges": ["%s %s" % (spell(m[0]), spell(m[1])) for m in merges if m],
        },
    }


def tokenizer_config(tok, positions):
    specials = special_tokens(tok)
    out = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": specials[tok.bos],
        "eos_token": specials[tok.eos if tok.eos >= 0 else tok.bos],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # nothing in a text is special
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": positions,
    }
    return dict(out, pad_token=specials[258]) if tok.name == "bytes" else out


# ----------------------------------------------------------------------------------------------------------------------


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def write_tokenizer(folder, config, out):
    """What there is of the tokenizer's files; returns a line about it."""
    name = config.get("tokenizer")
    theirs = os.path.isfile(os.path.join(folder, "tokenizer.json"))
    for file in TOKENIZER_FILES if theirs else ():
        if os.path.isfile(os.path.join(folder, file)):
            shutil.copyfile(os.path.join(folder, file), os.path.join(out, file))
    if theirs and os.path.isdir(os.path.join(folder, CHAT_TEMPLATES)):
        shutil.copytree(os.path.join(folder, CHAT_TEMPLATES), os.path.join(out, CHAT_TEMPLATES))
    if theirs and not os.path.isfile(os.path.join(out, "tokenizer_config.json")):  # in which transformers 4 looks
        write_json(out, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    if theirs and name in (None, "", "toy", "bytes"):
        return "its tokenizer.json"
    if name in (None, "", "toy"):
        none = "config.json names none, and there is no tokenizer.json"
        return "no tokenizer: %s" % ("toy has no counterpart in transformers" if name else none)
    if not isinstance(name, str) or "/" in name:
        raise UserError("tokenizer: got %s, wanted a name or a file beside config.json" % json.dumps(name))
    path = name if name == "bytes" else os.path.join(folder, name)
    if theirs and not os.path.isfile(path):  # save_pretrained leaves it behind
        raise UserError("%s: no such file, which config.json names for infer_mta; copy it there" % path)
    tok = open_tokenizer(path, config.get("tokenizer_pattern") or None, encoder=False)
    if not theirs:
        write_json(out, "tokenizer.json", tokenizer_json(tok))
        write_json(out, "tokenizer_config.json", tokenizer_config(tok, config.get("max_position_embeddings", 2048)))
    if tok.path:
        shutil.copyfile(tok.path, os.path.join(out, name))
    return "its tokenizer.json" if theirs else "tokenizer %s" % tok.name


def with_old_keys(path, config):
    """Of RoPE what transformers 5 saves, in the keys of transformers 4 too, which takes 10000 where it finds no
    rope_theta."""
    rope, config = config.get("rope_parameters") or {}, dict(config)
    if not isinstance(rope, dict):
        raise UserError("%s: rope_parameters: got %s, wanted an object" % (path, json.dumps(rope)))
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    theta, kind = (rope.get("rope_theta"), config.get("rope_theta")), scaling.get("rope_type", scaling.get("type"))
    if None not in theta and theta[0] != theta[1]:
        raise UserError("%s: rope_theta: got %s, and %s in rope_parameters, wanted one" % (path, theta[1], theta[0]))
    if theta[0] is not None:
        config["rope_theta"] = theta[0]
    if kind not in (None, "default") and config.get("rope_scaling") is None:
        config["rope_scaling"] = scaling
    return config


def export(folder, out, bf16):
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError("%s: no such file, wanted a checkpoint" % os.path.join(folder, "config.json"))
    path = os.path.join(folder, "config.json")
    config = with_old_keys(path, read_config(path))
    files, placed = weight_files(folder)
    verify(folder, ["config.json", *files, config.get("tokenizer") or ""])
    stored = read_tensors(folder, files, placed)
    tensors = without_extras(stored, config)
    check_tensors(folder, tensors, model_tensors(config))

    weights = os.path.join(out, "model.safetensors")
    bf16 = bf16 and {t["dtype"] for t in tensors.values()} != {"BF16"}
    ours = all(t["format"] == "pt" for t in stored.values())  # transformers 4 reads no file of none or of TensorFlow's
    if bf16 or len(files) > 1 or len(tensors) < len(stored) or not ours:
        write_tensors(tensors, weights, bf16)
    else:
        shutil.copyfile(os.path.join(folder, files[0]), weights)
    if bf16:
        config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    if config["model_type"] == "mta":
        config["auto_map"] = AUTO_MAP
        for name in ("configuration_mta.py", "modeling_mta.py"):
            shutil.copyfile(os.path.join(CODE, name), os.path.join(out, name))
    write_json(out, "config.json", config)
    said = write_tokenizer(folder, config, out)
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id") if config.get(k) is not None}
    if config.get("tokenizer") == "bytes":
        ids["pad_token_id"] = 258
    theirs = os.path.join(folder, "generation_config.json")
    if os.path.exists(theirs):  # another program's, whose ids end a text before those of config.json do
        write_json(out, "generation_config.json", read_json(theirs))
    elif "eos_token_id" in ids:
        write_json(out, "generation_config.json", ids)
    count = sum(math.prod(t["shape"]) for t in tensors.values())
    return "%s, %d parameters, %s" % (config["model_type"], count, said)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="DIR")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--bf16", action="store_true", help="round the weights to bf16")
    args = parser.parse_args()
    partial = None
    try:
        source, out = find_checkpoint(args.source), os.path.abspath(args.out)
        if os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
            raise UserError("%s: it is there and not empty, wanted a new folder" % args.out)
        os.makedirs(os.path.dirname(out), exist_ok=True)
        partial = "%s.partial-%d" % (out, os.getpid())
        os.mkdir(partial)
        said = export(source, partial, args.bf16)
        os.rename(partial, out)  # all or nothing
        partial = None
    except (UserError, OSError, KeyError, TypeError, ValueError) as e:
        print("export.py: %s" % e, file=sys.stderr)
        return 1
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    print("%s -> %s: %s" % (source, args.out, said))
    return 0


if __name__ == "__main__":
    run_program(main)
