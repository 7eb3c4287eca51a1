#!/usr/bin/env python3
"""Turns text into the token shards that train_mta reads.

    python3 data/prepare.py text FILES... --tokenizer bytes --out DIR [--name NAME]

writes DIR/NAME_train_000000.bin and DIR/NAME_val_000000.bin (llm.c's format, see data/README.md).
One document: its last 5% become the validation set. Several: each goes whole to one side, chosen by a hash.
"""
import argparse
import array
import base64
import hashlib
import os
import sys
import zlib

MAGIC = {2: (20240520, 1), 4: (20240801, 7)}    # bytes a token -> llm.c's magic and version
TOY = "abcdefghijklmnopqrstuvwxyz.#_"


# How text is cut into pieces before byte-pair merging. gpt2, cl100k_base and o200k_base as tiktoken 0.14.0 has them, llama3 as Meta published it.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
                   r"""|\s*[\r\n]|\s+(?!\S)|\s""",
    "llama3": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
              r"""|\s+(?!\S)|\s+""",
    "o200k_base": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
                  r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
                  r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit status 1."""


def read_ranks(path):
    """A tiktoken rank file as a dictionary {bytes: rank}; refused with file and line where it is not whole."""
    ranks, lines = {}, {}
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise UserError("%s: %s" % (path, e.strerror))
    if data[:1] == b"{":
        raise UserError("%s: JSON (Hugging Face's tokenizer.json?), wanted a tiktoken rank file, such as the model's tokenizer.model" % path)
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            raise UserError("%s:%d: wanted a line of a tiktoken rank file: BASE64 RANK" % (path, number))
        if not token or rank < 0:
            raise UserError("%s:%d: wanted a token of one byte at least and a rank from 0" % (path, number))
        if token in ranks:
            raise UserError("%s:%d: the same token as on line %d" % (path, number, lines[ranks[token]]))
        if rank in lines:
            raise UserError("%s:%d: rank %d a second time, it was on line %d" % (path, number, rank, lines[rank]))
        ranks[token] = rank
        lines[rank] = number
    for expected, rank in enumerate(sorted(lines)):
        if rank != expected:
            raise UserError("%s:%d: a hole: got rank %d, but no line has rank %d" % (path, lines[rank], rank, expected))
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError("%s: no token for the single byte 0x%02x, wanted one for each of the 256" % (path, byte))
    return ranks


class BytesTokenizer:
    """One id a byte; 256 starts a document, 257 ends it, 258 pads."""
    name, vocab, bos, eos = "bytes", 259, 256, 257

    def encode(self, text):
        return array.array("H", list(text.encode("utf-8")))


class ToyTokenizer:
    """a-z . # _ as 0 to 28; 29 starts a document, 30 ends it; 32 ids in all."""
    name, vocab, bos, eos = "toy", 32, 29, 30
    ids = {c: i for i, c in enumerate(TOY)}

    def encode(self, text):
        try:
            return array.array("H", [self.ids[c] for c in text])
        except KeyError as e:
            raise UserError("the toy tokenizer has no %s, only a-z . # _" % ascii(e.args[0]))


def write_shard(path, tokens, vocab):
    """tokens: array of unsigned shorts. Written beside, synced, renamed."""
    header = array.array("i", [0] * 256)
    payload = tokens.tobytes()
    header[0], header[1] = MAGIC[tokens.itemsize]
    header[2], header[3] = len(tokens), vocab
    crc = zlib.crc32(payload)
    header[4] = crc - (1 << 32) if crc >= 1 << 31 else crc
    with open(path + ".partial", "wb") as f:
        f.write(header.tobytes() + payload)
        f.flush()
        os.fsync(f.fileno())
    os.rename(path + ".partial", path)
    print("%s: %d tokens" % (path, len(tokens)))


def framed(tok, ids):
    return array.array("H", [tok.bos]) + ids + array.array("H", [tok.eos])


def run_text(args):
    tok = {"bytes": BytesTokenizer, "toy": ToyTokenizer}[args.tokenizer]()
    documents = []
    for path in args.files:
        try:
            with open(path, "rb") as f:
                documents.append(tok.encode(f.read().decode("utf-8")))
        except OSError as e:
            raise UserError("%s: %s" % (path, e.strerror))
        except UnicodeDecodeError as e:
            raise UserError("%s: not UTF-8 at byte %d" % (path, e.start))
    train, val = array.array("H"), array.array("H")
    if len(documents) == 1:
        cut = len(documents[0]) - len(documents[0]) // 20
        train, val = framed(tok, documents[0][:cut]), framed(tok, documents[0][cut:])
    else:
        def key(i):
            return hashlib.blake2b(b"%d" % i, digest_size=8).digest()
        held = set(sorted(range(len(documents)), key=key)[:max(1, len(documents) // 20)])
        for i, ids in enumerate(documents):
            (val if i in held else train).extend(framed(tok, ids))
    os.makedirs(args.out, exist_ok=True)
    name = args.name or (os.path.splitext(os.path.basename(args.files[0]))[0] if len(args.files) == 1 else "text")
    write_shard(os.path.join(args.out, name + "_train_000000.bin"), train, tok.vocab)
    write_shard(os.path.join(args.out, name + "_val_000000.bin"), val, tok.vocab)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="text files to shards")
    text.add_argument("files", nargs="+")
    text.add_argument("--tokenizer", choices=["bytes", "toy"], default="bytes")
    text.add_argument("--out", required=True)
    text.add_argument("--name")
    args = parser.parse_args()
    try:
        run_text(args)
    except UserError as e:
        sys.exit("prepare.py: %s" % e)


if __name__ == "__main__":
    main()
