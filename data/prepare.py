#!/usr/bin/env python3
"""Turns text into the token shards that train_mta reads: llm.c's format, see data/README.md.

    prepare.py text INPUTS... --tokenizer bytes --out DIR [--name NAME]
    prepare.py slimpajama INPUTS... --tokenizer tokenizer.model --out DIR [--download FOLDER]
    prepare.py inspect SHARD
    prepare.py verify DIR

INPUTS are files, folders or quoted globs: .jsonl, .jsonl.zst, .jsonl.gz and .parquet hold many documents, any other
file is one document. With a built-in tokenizer (bytes, toy), or a rank file where infer_mta is built, and inputs that
are not .zst or .parquet the standard library suffices. A preparation that is stopped at any moment, even by kill -9,
goes on when the same command is given again, and ends with the same bytes.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import signal
import struct
import sys
import time
import zlib

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import inputs  # noqa: E402
from options import Parser, parse_count, real_number, whole_number  # noqa: E402
from shards import (  # noqa: E402
    FORMAT,
    HEADER_BYTES,
    NAME_WITH_SPLIT,
    SHARD_NAME,
    SPLIT_IN_NAME,
    add_commands,
    cores,
    foreign_shard,
    manifest_lock,
    read_manifest,
    run_program,
    shard_header,
    sync_file,
    sync_folder,
    tokenizer_entry,
    write_manifest,
    write_synced,
)
from tokenizer import (  # noqa: E402
    PATTERNS, UserError, file_sums, find_encoder, need, open_tokenizer, reason, refuse_old,
)
from worker import results  # noqa: E402

VAL_FRACTION = {"text": 0.05, "slimpajama": 0.001}  # by command, where none is given
FOLDERS_DECIDE = "--val-fraction %g does nothing: folders or files decide what is validation; --split hash takes it"

# ----------------------------------------------------------------------------------------------------------------------
# Writing: sets -> shards in the work folder DIR/.NAME.partial, with a state from which a restart goes on


def slug(domain):
    return re.sub(r"[^a-z0-9]+", "-", domain.lower()).strip("-")[:60] or "set"


def unlike(domain):
    """A name that no other domain has."""
    return "%s-%s" % (slug(domain), hashlib.blake2b(domain.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest())


def work_name(job, name, split):
    """What the files of a set are called while others may still come whose names look the same."""
    return "%s_%s" % (unlike(name) if job["domain_field"] and job["command"] != "slimpajama" else name, split)


def set_names(job, names):
    """{name of a set: what its shards are called}. Domains whose letters and digits are the same (C, C++, C#) get a
    hash at the end."""
    if not job["domain_field"]:
        return {name: name for name in names}
    if job["command"] == "slimpajama":
        return {name: job["prefix"] + name for name in names}
    slugs = [slug(name) for name in names]
    return {name: job["prefix"] + (slug(name) if slugs.count(slug(name)) == 1 else unlike(name)) for name in names}


class SetWriter:
    """The shards of one set (a name and a split). `record` is its part of the state: what a restart needs to know."""

    def __init__(self, folder, key, job, tok, record=None):
        self.folder, self.tok, self.shard_tokens = folder, tok, job["shard_tokens"]
        self.stem = work_name(job, *key.rsplit("/", 1))
        self.record = record or {"done": [], "open": None, "documents": 0, "tokens": 0, "text_bytes": 0, "last": 0}
        self.file = None

    def name(self, number):
        return "%s_%06d.bin" % (self.stem, number)

    def path(self):
        """Of the open shard."""
        return os.path.join(self.folder, self.name(len(self.record["done"])) + self.record["open"].get("suffix", ""))

    def restore(self):
        """Back to what the state says: whatever was written later is cut off. Names of the files that belong to it."""
        names = [shard["file"] for shard in self.record["done"]]
        if self.record["open"]:
            names.append(self.name(len(self.record["done"])))
            path = os.path.join(self.folder, names[-1])
            size = HEADER_BYTES + self.record["open"]["tokens"] * self.tok.width
            if not os.path.exists(path) or os.path.getsize(path) < size:
                raise UserError(
                    "%s: shorter than the state beside it says; remove %s to start anew" % (path, self.folder)
                )
            os.truncate(path, size)
        return names

    def append(self, tokens, lead, lengths, text_bytes):
        """Packed tokens: `lead` that belong to the document before, then documents of these lengths."""
        record, width = self.record, self.tok.width
        record["documents"] += len(lengths)
        record["text_bytes"] += text_bytes
        record["last"] = lengths[-1] if lengths else record["last"] + lead
        starts, position = [], lead
        for n in lengths:
            starts.append(position)
            position += n
        done, total, next_start = 0, len(tokens) // width, 0
        record["tokens"] += total
        while done < total:
            shard = record["open"] or self.begin()
            n = min(total - done, self.shard_tokens - shard["tokens"])
            piece = tokens[done * width : (done + n) * width]
            self.open_file().write(piece)
            shard["crc32"] = zlib.crc32(piece, shard["crc32"])
            shard["tokens"] += n
            done += n
            while next_start < len(starts) and starts[next_start] < done:
                shard["documents"] += 1
                next_start += 1
            if shard["tokens"] == self.shard_tokens:
                self.finish_shard()

    def begin(self):
        self.record["open"] = {"tokens": 0, "documents": 0, "crc32": 0}
        with open(self.path(), "wb") as f:
            f.write(bytes(HEADER_BYTES))
        return self.record["open"]

    def open_file(self):
        if self.file is None:
            self.file = open(self.path(), "ab")
        return self.file

    def finish_shard(self):
        """The header is written last; a shard with zeros in its place is refused by every reader."""
        shard, name = self.record["open"], self.name(len(self.record["done"]))
        self.close()
        with open(self.path(), "r+b") as f:
            f.truncate(HEADER_BYTES + shard["tokens"] * self.tok.width)
            f.write(shard_header(self.tok.width, shard["tokens"], self.tok.vocab, shard["crc32"]))
            f.flush()
            sync_file(f.fileno())
        self.record["done"].append({"file": name, **shard})
        self.record["open"] = None

    def close(self):
        if self.file is not None:
            self.file.close()
            self.file = None

    def sync(self):
        if self.file is not None:
            self.file.flush()
            sync_file(self.file.fileno())

    def take_back(self, n):
        """Takes the last n tokens off the open shard. What remains goes to a copy, so that the state that was
        saved last still holds."""
        shard, width = self.record["open"], self.tok.width
        self.close()
        with open(self.path(), "rb") as f, open(self.path() + ".cut", "wb") as copy:
            left, crc = (shard["tokens"] - n) * width, 0
            copy.write(f.read(HEADER_BYTES))
            while left:
                chunk = f.read(min(left, 1 << 20))
                copy.write(chunk)
                crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            taken = f.read(n * width)
        shard.update(tokens=shard["tokens"] - n, crc32=crc, suffix=".cut")
        self.record["tokens"] -= n
        return taken


class Preparation:
    """One preparation in its work folder: sets, bad documents, and the state that is saved now and then."""

    def __init__(self, out, job, plan, digest):
        self.out, self.job, self.plan, self.digest = out, job, plan, digest
        self.work = os.path.join(out, ".%s.partial" % job["name"])
        self.tok = open_tokenizer(job["tokenizer"], job["pattern"], encoder=False)
        self.sets, self.bad_file = {}, None
        self.state = {
            "format": FORMAT,
            "plan": digest,
            "stage": "tokenise",
            "at": {"input": 0, "offset": 0, "line": 0},
            "bad": {"bytes": 0, "counts": {}},
        }
        self.resumed = False

    def path(self, name):
        return os.path.join(self.work, name)

    def open(self, overwrite):
        """Locks the work folder; takes up the state that an interrupted run has left there (of other inputs or options:
        drops it, if overwrite)."""
        os.makedirs(self.work, exist_ok=True)
        self.lock = open(self.path("lock"), "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError("%s: another prepare.py is at work there" % self.work)
            text = "%s: this file system has no locks (%s); see to it that no other prepare.py works there"
            print(text % (self.work, e.strerror), file=sys.stderr)
        sets = {}
        if os.path.exists(self.path("state.json")):
            try:
                with open(self.path("state.json"), encoding="utf-8") as f:
                    state = json.load(f)
            except ValueError as e:
                raise UserError("%s: %s; remove %s to start anew" % (self.path("state.json"), e, self.work))
            if state.get("plan") == self.digest:
                sets = state.pop("sets")
                self.state, self.resumed = state, True
            elif not overwrite:
                raise UserError(
                    "%s holds an unfinished preparation of other inputs or options; finish that one, give another "
                    "--name or --out, or --overwrite" % self.work
                )
            else:
                os.remove(self.path("state.json"))
        names = {"lock", "state.json"}
        for key, record in sets.items():
            self.sets[key] = SetWriter(self.work, key, self.job, self.tok, record)
            if self.state["stage"] == "tokenise":
                names.update(self.sets[key].restore())
        if self.state["stage"] == "tokenise":
            if self.state["bad"]["bytes"]:
                names.add("bad.jsonl")
                os.truncate(self.path("bad.jsonl"), self.state["bad"]["bytes"])
            for name in set(os.listdir(self.work)) - names:
                os.remove(self.path(name))

    def add(self, key, *pieces):
        if key not in self.sets:
            self.sets[key] = SetWriter(self.work, key, self.job, self.tok)
        self.sets[key].append(*pieces)
        if sum(s.file is not None for s in self.sets.values()) > 200:
            for s in self.sets.values():
                s.sync()
                s.close()

    def add_bad(self, path, line, kind, detail):
        if self.bad_file is None:
            self.bad_file = open(self.path("bad.jsonl"), "ab")
        text = json.dumps({"file": path, "line": line, "kind": kind, "detail": detail}) + "\n"
        self.bad_file.write(text.encode())
        bad = self.state["bad"]
        bad["bytes"] += len(text)
        bad["counts"][kind] = bad["counts"].get(kind, 0) + 1

    def leave(self):
        """Closes the lock and the list of bad documents: what no commit has written there is dropped, as a restart
        does. Left to Python, a failure would be a traceback since 3.13."""
        for file in (self.bad_file, self.lock):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()

    def commit(self):
        """Everything so far is on the disk, and the state says so: a restart goes on from here."""
        for s in self.sets.values():
            s.sync()
        if self.bad_file is not None:
            self.bad_file.flush()
            sync_file(self.bad_file.fileno())
        sync_folder(self.work)
        state = dict(self.state, sets={key: s.record for key, s in sorted(self.sets.items())})
        write_synced(self.path("state.json"), json.dumps(state, sort_keys=True).encode())

    def full(self, split):
        """--max-tokens is reached: no more documents of this split are wanted."""
        by_folders, limit = self.job["split"] and split, self.job["max_tokens"]
        if by_folders and split == "val":
            limit = (limit + 19) // 20
        tokens = sum(s.record["tokens"] for key, s in self.sets.items() if not by_folders or key.endswith("/" + split))
        return limit > 0 and tokens >= limit

    def wanted(self, task):
        """Whether the results of this task count: those after --max-tokens do not, but a text that was begun is
        ended."""
        if inputs.goes_on(task):
            return self.state.get("dropped") != task[1]
        if self.full(task[2]):
            self.state["dropped"] = task[1]
            return False
        return True

    def documents(self):
        return sum(s.record["documents"] for s in self.sets.values())

    def finish(self):
        """The last step before publishing: a set without validation gives some, then all headers are written."""
        self.commit()
        given = self.job["split"] and any(entry.get("split") == "val" for entry in self.plan)
        if self.job["val_fraction"] > 0 and not given:
            for key in sorted(k for k in self.sets if k.endswith("/train")):
                self.give_validation(key)
        for s in self.sets.values():
            if s.record["open"] and s.record["open"]["tokens"]:
                s.finish_shard()
        self.state["stage"] = "publish"
        self.commit()

    def give_validation(self, key):
        """Where no document fell into validation: the last one, or the last 5% of the only one, moves there."""
        name, train = key[: -len("/train")], self.sets[key]
        n, shard, width = train.record["last"], train.record["open"], self.tok.width
        if name + "/val" in self.sets or not shard or shard["tokens"] < n:
            return
        form = "<H" if width == 2 else "<I"
        eos = struct.pack(form, self.tok.eos) if self.tok.eos >= 0 else b""
        if train.record["documents"] > 1:
            moved = train.take_back(n)
            train.record["documents"] -= 1
            shard["documents"] -= 1
        else:
            tail = (n - 1 - len(eos) // width) // 20
            if tail == 0:
                return
            moved = struct.pack(form, self.tok.bos) + train.take_back(tail + len(eos) // width)
            train.append(eos, len(eos) // width, [], 0)
        ids = struct.unpack("<%d%s" % (len(moved) // width, form[1]), moved)
        text_bytes = len(self.tok.decode(ids))
        train.record["text_bytes"] -= text_bytes
        self.add(name + "/val", moved, 0, [len(ids)], text_bytes)

    def publish(self):
        """Shards, the tokenizer's rank file and the list of bad documents go to DIR, the manifest last."""
        with manifest_lock(self.out):
            self.publish_alone()
        for name in sorted(os.listdir(self.work), key=lambda n: n in ("state.json", "lock")):
            os.remove(self.path(name))
        os.rmdir(self.work)

    def publish_alone(self):
        job, manifest = self.job, read_manifest(self.out)
        names = set_names(job, sorted({key.rsplit("/", 1)[0] for key in self.sets}))
        shards, moves = {}, []
        for key, s in sorted(self.sets.items()):
            name, split = key.rsplit("/", 1)
            for number, shard in enumerate(s.record["done"]):
                file = "%s_%s_%06d.bin" % (names[name], split, number)
                moves.append((self.path(shard["file"] + shard.get("suffix", "")), file))
                entry = {k: shard[k] for k in ("documents", "tokens")}
                size = HEADER_BYTES + shard["tokens"] * self.tok.width
                entry.update(
                    preparation=job["name"], set=names[name], split=split, crc32="%08x" % shard["crc32"], bytes=size
                )
                shards[file] = entry
        self.refuse_foreign(manifest, [file for ready, file in moves if os.path.exists(ready)])
        for ready, file in moves:
            if os.path.exists(ready):
                os.replace(ready, os.path.join(self.out, file))
            elif not os.path.exists(os.path.join(self.out, file)):
                raise UserError("%s is gone; remove %s to start anew" % (os.path.join(self.out, file), self.work))
        bad_name = os.path.join(self.out, job["name"] + ".bad.jsonl")
        try:  # a look whether it is there would take a disk that fails for a list that is not
            os.replace(self.path("bad.jsonl"), bad_name)
        except FileNotFoundError:
            if not self.state["bad"]["bytes"] and os.path.exists(bad_name):
                os.remove(bad_name)
        write_manifest(self.out, manifest, job["name"], self.summary(manifest, names), shards, self.tok)

    def refuse_foreign(self, manifest, files):
        found = foreign_shard(self.out, manifest, self.job["name"], files, owned=self.job["overwrite"])
        if found:
            owner = "the preparation " + found[1] if found[1] else "no preparation"
            raise UserError("%s belongs to %s; give another --name" % (found[0], owner))

    def summary(self, manifest, names):
        """This preparation's part of the manifest: nothing in it depends on when, where or how fast it was made."""
        sets = {}
        for key, s in sorted(self.sets.items()):
            name, split = key.rsplit("/", 1)
            part = sets.setdefault(names[name], {})[split] = {
                k: s.record[k] for k in ("documents", "tokens", "text_bytes")
            }
            part["shards"] = len(s.record["done"])
        summary = {
            "format": FORMAT,
            "tokenizer": tokenizer_entry(self.tok, manifest, self.job["name"]),
            "sets": sets,
            "bad": self.state["bad"]["counts"],
            "options": options_in_manifest(self.job),
            "inputs": inputs_summary(self.plan),
        }
        if self.job["domain_field"] and self.job["command"] != "slimpajama":
            summary["domains"] = {file: name for name, file in names.items()}
        return summary


def options_in_manifest(job):
    """Of the options that not every preparation has, those that act."""
    options = {k: job[k] for k in OPTIONS_IN_MANIFEST}
    options.update({k: job[k] for k in ("split", "max_tokens") if job[k]})
    return options


OPTIONS_IN_MANIFEST = ("command", "text_field", "domain_field", "val_fraction", "seed", "shard_tokens")


def inputs_summary(plan):
    listing = "".join("%s %d\n" % (p["path"], p["bytes"]) for p in plan).encode("utf-8", "surrogateescape")
    return {"files": len(plan), "bytes": sum(p["bytes"] for p in plan), "sha256": hashlib.sha256(listing).hexdigest()}


# ----------------------------------------------------------------------------------------------------------------------
# Progress


class Progress:
    """One line, rewritten on a terminal, once in half a minute elsewhere."""

    def __init__(self, total, done):
        self.total, self.first, self.start, self.last = total, done, time.monotonic(), 0.0
        self.terminal = sys.stderr.isatty()
        self.documents = self.text_bytes = 0

    def add(self, documents, text_bytes, read, force=False):
        self.documents += documents
        self.text_bytes += text_bytes
        now = time.monotonic()
        if not force and now - max(self.last, 0 if self.terminal else self.start) < (0.2 if self.terminal else 30):
            return
        self.last = now
        spent = max(now - self.start, 1e-6)
        left = (self.total - read) * spent / (read - self.first) if read > self.first else 0
        share = read / self.total if self.total else 1
        line = "%5.1f%%  %d documents, %.0f/s  %.2f MB/s  ETA %d:%02d:%02d" % (
            100 * share, self.documents, self.documents / spent, self.text_bytes / 1e6 / spent, left // 3600,
            left // 60 % 60, left % 60,
        )
        if self.terminal:
            width = 20
            bar = "#" * int(width * share) + "-" * (width - int(width * share))
            sys.stderr.write("\r[%s] %s\033[K%s" % (bar, line, "\n" if force else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


# ----------------------------------------------------------------------------------------------------------------------
# The command that prepares


def make_job(args, files):
    """What determines the bytes of the shards, given the inputs; and how they are made (NOT_IN_DIGEST), which does
    not."""
    kinds = {inputs.kind_of(path) for path in files}
    single = len(files) == 1 and kinds == {"text"}
    stem = os.path.basename(next(iter(files))).split(".")[0] if single else args.command
    name = args.name or SPLIT_IN_NAME.sub("-", re.sub(r"[^A-Za-z0-9_-]+", "_", stem).lstrip("_-")) or "text"
    if args.name == "" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        got = ascii(name if args.name is None else args.name)
        raise UserError("--name %s: wanted letters, digits, points, dashes and underscores" % got)
    if SPLIT_IN_NAME.search(name):
        raise UserError(NAME_WITH_SPLIT % name)
    if not args.text_field:
        raise UserError("--text-field: got \"\", wanted the name of the field that holds the text")
    fraction = VAL_FRACTION[args.command] if args.val_fraction is None else args.val_fraction
    if not 0 <= fraction < 1:
        raise UserError("--val-fraction %g: wanted 0 up to, not including, 1" % fraction)
    if not 1 <= args.shard_tokens < 2**31:
        raise UserError("--shard-tokens %d: wanted 1 to 2147483647" % args.shard_tokens)
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError("--max-tokens %d: wanted 1 or more" % args.max_tokens)
    tok = open_tokenizer(args.tokenizer, args.pattern, encoder=False)
    encoder = tok.path and find_encoder(args.encoder)
    for package, wanted in (
        ("tiktoken", encoder == "tiktoken"),
        ("zstandard", "lines.zst" in kinds),
        ("pyarrow", "parquet" in kinds),
    ):
        if wanted:
            refuse_old(package)
        if wanted and importlib.util.find_spec(package) is None:
            need(package)
    by_folders = args.split == "folders" and {"val", "test"} & {inputs.split_of(below) for below in files.values()}
    return {
        "command": args.command,
        "name": name,
        "prefix": args.name + "_" if args.name else "",
        "tokenizer": args.tokenizer,
        "pattern": tok.name if tok.path else None,
        "tokenizer_sha256": file_sums(args.tokenizer)["sha256"] if tok.path else "",
        "text_field": args.text_field,
        "domain_field": args.domain_field,
        "val_fraction": fraction,
        "seed": args.seed,
        "shard_tokens": args.shard_tokens,
        "split": "folders" if by_folders else "",
        "max_tokens": args.max_tokens or 0,
        "encoder": args.encoder,
        "overwrite": args.overwrite,
    }


NOT_IN_DIGEST = ("tokenizer", "encoder", "overwrite")


def already_there(out, job, plan):
    """True where the manifest says that this very preparation is complete; refuses another one of its name."""
    if job["overwrite"]:
        return False
    manifest = read_manifest(out)
    there = manifest["preparations"].get(job["name"])
    if there is None:
        start = job["prefix"] or ("" if job["domain_field"] else job["name"] + "_")
        for file in sorted(os.listdir(out)):
            if file.startswith(start) and SHARD_NAME.fullmatch(file) and file not in manifest["shards"]:
                path = os.path.join(out, file)
                raise UserError("%s is there and in no manifest; give another --name or --out, or --overwrite" % path)
        return False
    if not (
        there.get("options") == options_in_manifest(job)
        and there.get("inputs") == inputs_summary(plan)
        and there["tokenizer"].get("sha256", "") == job["tokenizer_sha256"]
        and there["tokenizer"]["name"] == (job["pattern"] or job["tokenizer"])
    ):
        raise UserError(
            "%s holds a preparation %s of other inputs or options; give another --name or --out, or --overwrite"
            % (out, job["name"])
        )
    for name, shard in manifest["shards"].items():
        path = os.path.join(out, name)
        if shard["preparation"] == job["name"] and (
            not os.path.exists(path) or os.path.getsize(path) != shard["bytes"]
        ):
            raise UserError("%s is missing or of another size than the manifest says; --overwrite prepares anew" % path)
    return True


DOWNLOADS = {"--repo": inputs.REPOSITORY, "--max-files": None, "--max-bytes": None}  # what it is where none is given


def prepare(args):
    if args.command == "slimpajama" and not args.download:
        for name, default in DOWNLOADS.items():
            if getattr(args, name[2:].replace("-", "_")) != default:
                raise UserError(name + ": wanted --download beside it, since it is about what is fetched; --max-tokens "
                                "limits what is prepared")
    if args.command == "slimpajama" and args.download:
        inputs.download(args)
        args.inputs = args.inputs + [args.download]
        if not args.out:
            return
    if not args.out:
        raise UserError("--out DIR is needed")
    if not args.inputs:
        more = ", or --download FOLDER" if args.command == "slimpajama" else ""
        raise UserError("no inputs; give files, folders or globs" + more)
    files = inputs.expand_inputs(args.inputs, args.out)
    job = make_job(args, files)
    plan = inputs.make_plan(files, job)
    if args.val_fraction is not None and job["split"] and any(entry.get("split") == "val" for entry in plan):
        print(FOLDERS_DECIDE % args.val_fraction, file=sys.stderr)
    try:
        os.makedirs(args.out, exist_ok=True)
        prepare_into(args, job, plan)
    except BrokenPipeError:
        raise
    except OSError as e:
        path = e.filename or args.out
        raise UserError("%s: %s" % (path, reason(e, path)))


def prepare_into(args, job, plan):
    determined = [FORMAT, {k: v for k, v in job.items() if k not in NOT_IN_DIGEST}, plan]
    digest = hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()
    unfinished = os.path.exists(os.path.join(args.out, ".%s.partial" % job["name"], "state.json"))
    if not unfinished and already_there(args.out, job, plan):
        bad = read_manifest(args.out)["preparations"][job["name"]]["bad"]
        refuse_left_out(args, bad, os.path.join(args.out, job["name"] + ".bad.jsonl"), "--overwrite prepares it anew")
        print("%s: %s is complete already; --overwrite prepares it anew" % (args.out, job["name"]))
        say_newer(args.out, plan)
        report(args.out, job["name"])
        return
    p = Preparation(args.out, job, plan, digest)
    p.open(args.overwrite)
    try:
        if p.resumed:
            bad = p.state["bad"]["counts"]
            refuse_left_out(args, bad, p.path("bad.jsonl"), "remove %s to start anew" % p.work)
            print("going on where an earlier run stopped: %d documents are done" % p.documents(), file=sys.stderr)
        if p.state["stage"] == "tokenise":
            tokenise(args, p)
            p.finish()
        p.publish()
    finally:
        p.leave()
    report(args.out, job["name"])


def refuse_left_out(args, counts, listed, anew):
    """--on-bad refuse is of all documents, also of those that an earlier call with --on-bad skip left out."""
    if args.on_bad == "refuse" and counts:
        text = "--on-bad refuse: an earlier call left out %d documents, listed in %s; %s"
        raise UserError(text % (sum(counts.values()), listed, anew))


def say_newer(out, plan):
    """Inputs are known by their names and sizes: a line where one was written after its shards were made."""
    made = os.stat(os.path.join(out, "manifest.json")).st_mtime_ns
    newer = [entry["path"] for entry in plan if entry["mtime"] > made]
    if newer:
        more = " and %d others are" % (len(newer) - 1) if len(newer) > 1 else " is"
        text = "%s%s newer than the shards in %s: if the text is another one, --overwrite"
        print(text % (newer[0], more, out), file=sys.stderr)


def tokenise(args, p):
    total = sum(entry["bytes"] for entry in p.plan)
    workers = args.workers or cores()
    if not args.workers and total < 4 << 20:
        workers = 1  # starting processes takes longer
    read = [sum(entry["bytes"] for entry in p.plan[: p.state["at"]["input"]])]

    def tell(n):
        read[0] = n

    progress, saved, shown = Progress(total, read[0]), time.monotonic(), 0
    tasks = inputs.read_tasks(p.plan, p.state["at"], tell, p.job["tokenizer"] == "toy", p.full)
    whole = True  # the state fits what is written: not so while a task's results are being added
    try:
        for task, (sets, bad), at in results(tasks, p.job, workers):
            if not p.wanted(task):
                p.state["at"] = at
                continue
            if bad and args.on_bad == "refuse":
                what = (task[1], *bad[0])
                raise UserError("%s:%d: %s: %s; mend it, or --on-bad skip leaves such documents out" % what)
            whole = False
            for line, kind, detail in bad:
                p.add_bad(task[1], line, kind, detail)
                shown += 1
                if shown <= 10:
                    print("%s:%d: %s: %s; skipped" % (task[1], line, kind, detail), file=sys.stderr)
                elif shown == 11:
                    print("more bad documents: they will be listed in %s.bad.jsonl" % p.job["name"], file=sys.stderr)
            for key, pieces in sets.items():
                p.add(key, *pieces)
            p.state["at"] = at
            whole = True
            progress.add(sum(len(s[2]) for s in sets.values()), sum(s[3] for s in sets.values()), read[0])
            if time.monotonic() - saved >= args.save_seconds:
                p.commit()
                saved = time.monotonic()
    except BaseException:
        if whole:
            p.commit()  # whatever stops us: the next run goes on from here
        raise
    progress.add(0, 0, total, force=True)


def say_max_tokens(summary):
    """Whether --max-tokens was reached: by all documents, or with a split by folders by those of each split."""
    most = summary["options"]["max_tokens"]
    limits = {"train": most, "val": (most + 19) // 20} if "split" in summary["options"] else {"": most}
    for split, limit in limits.items():
        tokens = sum(n["tokens"] for splits in summary["sets"].values() for s, n in splits.items() if split in ("", s))
        print("--max-tokens %d: %s%s" % (most, split and "%s: " % split, "stopped after the block of documents that "
              "reached %d" % limit if tokens >= limit else "all documents have fewer than %d" % limit))


def report(out, name):
    """What the manifest says, as a table."""
    summary = read_manifest(out)["preparations"][name]
    print("%-24s %-6s %12s %14s %14s %7s" % ("set", "split", "documents", "tokens", "text bytes", "shards"))
    for key, splits in summary["sets"].items():
        for split, n in splits.items():
            row = (key, split, n["documents"], n["tokens"], n["text_bytes"], n["shards"])
            print("%-24s %-6s %12d %14d %14d %7d" % row)
        if "val" not in splits and summary["options"]["val_fraction"] > 0:
            print("%s: no validation set" % key)
        if "train" not in splits:
            print("%s: no training set" % key)
    for key, domain in summary.get("domains", {}).items():
        if key != domain:
            print("%s is %s" % (key, domain))
    if "max_tokens" in summary["options"]:
        say_max_tokens(summary)
    if summary["bad"]:
        counts = ", ".join("%d %s" % (n, kind) for kind, n in sorted(summary["bad"].items()))
        print("left out: %s; listed in %s" % (counts, os.path.join(out, name + ".bad.jsonl")))
    if not summary["sets"]:
        field = "; --text-field and --domain-field name the fields of a document" * ("missing field" in summary["bad"])
        raise UserError("%s: no document could be used%s" % (out, field))


# ----------------------------------------------------------------------------------------------------------------------


def add_prepare_options(p, slim):
    def option(name, text, **more):
        p.add_argument(name, help=text, **more)

    p.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders or quoted globs")
    option("--out", "where the shards go", metavar="DIR")
    default = "the domains' names without one" if slim else "a single text's name, else text"
    option("--name", "shards are NAME_train_000000.bin ...; default: " + default)
    option("--tokenizer", "bytes (default), toy, or a tiktoken rank file", default="bytes", metavar="NAME|FILE")
    option("--pattern", "how text is split; default: what the number of ranks tells", choices=list(PATTERNS))
    option("--encoder", "what encodes with a rank file; default: infer_mta where it is built",
           choices=["infer_mta", "tiktoken"])
    option("--text-field", "of JSON lines and parquet; a.b for b in a; default text", default="text", metavar="FIELD")
    domain, command = "meta.redpajama_set_name" if slim else "", "slimpajama" if slim else "text"
    option("--domain-field", "documents go to one set of shards for each value of this field" +
           "; default %(default)s" * slim, default=domain, metavar="FIELD")
    text = "share of documents for validation, chosen by a hash; of a single text its last part; default %g"
    option("--val-fraction", text % VAL_FRACTION[command],
           type=real_number(), metavar="X")
    if slim:
        text = "folders (default): as folders or files called train, validation, test say; hash: by --val-fraction"
        option("--split", text + " alone", choices=["folders", "hash"], default="folders")
    option("--seed", "of that hash; default 0", type=whole_number(), default=0, metavar="N")
    option("--shard-tokens", "tokens in a shard, default 100M", type=parse_count, default=100000000, metavar="N")
    text = "stop after the block of documents that reaches N tokens; split by folders: N of train, N/20 of validation"
    option("--max-tokens", text, type=parse_count, metavar="N")
    text = "a document that cannot be used is left out and listed in NAME.bad.jsonl (default), or ends the run"
    option("--on-bad", text, choices=["skip", "refuse"], default="skip")
    text = "processes; default: one a core that this process may use"
    option("--workers", text, type=whole_number(0), default=0, metavar="N")
    text = "how often the state for a restart is saved; default 10"
    option("--save-seconds", text, type=real_number(0), default=10, metavar="S")
    option("--overwrite", "replace an earlier preparation of this name", action="store_true")


def add_download_options(slim):
    def option(name, text, **more):
        slim.add_argument(name, help=text, **more)

    option("--download", "fetch SlimPajama's files into FOLDER first, or go on doing so", metavar="FOLDER")
    text = "the data set on the Hugging Face hub, or at HF_ENDPOINT; default %(default)s, which is gone from the hub "
    text += "since 2026; a third party's copy is " + inputs.COPY
    option("--repo", text, default=inputs.REPOSITORY, metavar="NAME")
    option("--max-files", "download no more than N files, spread over the data set", type=whole_number(0), metavar="N")
    option("--max-bytes", "download no more than N bytes", type=parse_count, metavar="N")
    option("--connections", "at once; default 8", type=whole_number(1), default=8, metavar="N")
    option("--retries", "tries of a file after the first; default 8", type=whole_number(0), default=8, metavar="N")
    text = "first pause, doubled up to a minute; default 1"
    option("--retry-pause", text, type=real_number(0), default=1.0, metavar="S")


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="any texts to shards")
    text.set_defaults(split="hash", run=prepare)
    slim = commands.add_parser("slimpajama", help="SlimPajama to shards, a set for each of its seven domains")
    slim.set_defaults(run=prepare)
    add_prepare_options(text, slim=False)
    add_prepare_options(slim, slim=True)
    add_download_options(slim)
    add_commands(commands)
    return parser


def interrupted(number, frame):
    raise KeyboardInterrupt


def main():
    args = make_parser().parse_args()
    signal.signal(signal.SIGTERM, interrupted)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        raise UserError("interrupted; the same command goes on from here")


if __name__ == "__main__":
    run_program(main)
