"""The inputs of prepare.py: fetching them, finding them, and their documents as tasks for workers in a fixed order.

What cannot be read as what it claims to be is named, never passed over: a task of kind "bad" carries (line, kind,
detail).
"""

import codecs
import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import stat
import sys
import time
import zlib

from shards import MAGIC, read_manifest
from tokenizer import BadDocument, KeyTwice, UserError, file_sums, members, need, reason

BLOCK = 1 << 20  # bytes of lines that a worker gets at once
SEGMENT = 4 << 20  # bytes of one long text that a worker gets at once
WHOLE = 1 << 30  # bytes of a JSON array, which is held in memory
LINE_ENDINGS = (".jsonl", ".ndjson", ".json")
BOM = codecs.BOM_UTF8
REPOSITORY = "cerebras/SlimPajama-627B"  # gone from the hub in 2026; it may still be on a mirror that HF_ENDPOINT names
COPY = "gmongaras/SlimPajama-627B_Reupload"  # a third party's
ANOTHER = "file of another format"
BROKEN_OFF = "truncated or damaged file"


def kind_of(path):
    """lines, lines.gz, lines.zst, parquet or text, by the name's ending."""
    name = path.lower()
    for ending in LINE_ENDINGS:
        if name.endswith(ending):
            return "lines"
        if name.endswith((ending + ".zst", ending + ".gz")):
            return "lines" + name[name.rindex(".") :]
    return "parquet" if name.endswith(".parquet") else "text"


# ----------------------------------------------------------------------------------------------------------------------
# Which files


def say(*words):
    print(*words, file=sys.stderr)


def own_output(folder):
    """Names of the files of `folder` that an earlier preparation has written there."""
    try:
        manifest = read_manifest(folder, wanted=True)
    except UserError:  # none, or of another program
        return set()
    names = {"manifest.json", *manifest["shards"]}
    for name, preparation in manifest["preparations"].items():
        names.update((name + ".bad.jsonl", name + "_task.json", preparation.get("tokenizer", {}).get("file")))
    return names


def walk(item):
    """Files below a folder as (path, path from the folder on); links to folders are followed, each folder read once."""
    found, others, seen = [], {}, set()

    def refuse(e):
        raise UserError("%s: %s" % (e.filename, e.strerror))

    for folder, folders, names in os.walk(item, followlinks=True, onerror=refuse):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:
            say("%s: the same folder as another one below %s; its files are taken once" % (folder, item))
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        cache = os.path.join(folder, ".cache")
        folders[:] = sorted(f for f in folders if not re.fullmatch(r"\..+\.partial", f))
        if any(os.path.exists(os.path.join(cache, n)) for n in ("lock", "coming", "huggingface")):
            folders.remove(".cache")  # --download's and huggingface_hub's: files that come in part
        for name in sorted(names):
            path = os.path.join(folder, name)
            if kind_of(name) != "text" or name.lower().endswith(".txt"):
                found.append((path, os.path.join(os.path.basename(os.path.abspath(item)), os.path.relpath(path, item))))
            else:
                ending = os.path.splitext(name)[1] or "no ending"
                others[ending] = others.get(ending, 0) + 1
    if not found:
        raise UserError("%s: no .jsonl, .jsonl.zst, .jsonl.gz, .parquet or .txt file in this folder" % item)
    if others:
        say(
            "%s: files of other kinds are left out: %s"
            % (item, ", ".join("%d %s" % (n, e) for e, n in sorted(others.items())))
        )
    return found


def matches(item):
    """What a glob matches; the folders at its beginning that are there are taken as they are called, with brackets
    too."""
    head, parts = "", item.split("/")
    while len(parts) > 1 and os.path.isdir(head + parts[0] + "/"):
        head += parts.pop(0) + "/"
    return sorted(glob.glob(glob.escape(head) + "/".join(parts), recursive=True))


def expand_inputs(inputs, out):
    """Files, folders (of known endings, recursively) and globs -> {path: where it lies below what was named}, sorted by
    path, each file once. What an earlier preparation has written, and the unfinished one in `out`, is no input."""
    found = []
    for item in inputs:
        paths = [item] if os.path.lexists(item) else matches(item)
        if not paths:
            raise UserError("%s: no such file, folder or match" % item)
        for path in paths:
            if os.path.isdir(path):
                found += walk(path) if "**" not in item or path == item else []  # ** gives the files in them too
            else:
                found.append((path, "/".join(os.path.abspath(path).split("/")[-3:])))
    files, places, own, own_names = {}, {}, 0, {}
    for path, below in sorted(found):
        folder, name = os.path.split(path)
        if folder not in own_names:
            own_names[folder] = own_output(folder)
        unfinished = name.endswith(".bad.jsonl") and os.path.realpath(folder or ".") == os.path.realpath(
            out or os.devnull
        )
        try:
            place = os.stat(path)[1:3]  # the file itself, by whatever name
        except OSError:  # reported where it is opened
            place = path
        if name in own_names[folder] or unfinished:
            own += 1
        elif places.setdefault(place, path) != path:
            say("%s: the same file as %s; taken once" % (path, places[place]))
        elif path in files:
            say("%s: named twice; taken once" % path)
        else:
            files[path] = below
    if own:
        say("%d files that prepare.py has written are left out" % own)
    if not files:
        raise UserError("%s: nothing there but what prepare.py has written" % inputs[0])
    return files


SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}


def split_of(below):
    """train, val or test where the file's name or the nearest folder above it says so, as SlimPajama's do; else
    None."""
    *folders, name = below.lower().split("/")
    match = re.match("(%s)[-_.]" % "|".join(SPLITS), name)
    return SPLITS[match[1]] if match else next((SPLITS[f] for f in reversed(folders) if f in SPLITS), None)


def text_cut(path, size, fraction):
    """Where a single text is cut for validation: its last part, from the start of a line if one begins shortly before:
    at most 4096 bytes, and no more than this part has, or a twentieth of the text."""
    near = size - int(size * fraction)
    with open(path, "rb") as f:
        start = max(0, near - min(4096, max(size - near, size // 20)))
        f.seek(start)
        window = f.read(near - start)
        newline = window.rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        f.seek(near)
        rest = f.read(4)
    while rest and near < size and rest[0] & 0xC0 == 0x80:  # not inside a character
        near, rest = near + 1, rest[1:]
    return near


def make_plan(files, job):
    """The inputs in order: what each is, and which split it goes to where that does not depend on its documents."""
    plan = []
    for path in files:
        try:
            info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                raise UserError("%s: not a regular file; what is read again after an interruption must be one" % path)
            with open(path, "rb"):
                pass
        except OSError as e:
            raise UserError("%s: %s" % (path, reason(e, path)))
        plan.append({"path": path, "kind": kind_of(path), "bytes": info.st_size, "mtime": info.st_mtime_ns})
    if job["split"]:
        return plan_by_folders(plan, files)
    texts = [p for p in plan if p["kind"] == "text"]
    if len(plan) == 1 and len(texts) == 1 and job["val_fraction"] > 0:
        texts[0].update(split="tail", fraction=job["val_fraction"])
        return plan

    def order(i):
        key = "%d %d %s" % (job["seed"], i, os.path.basename(texts[i]["path"]))
        return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()

    share = max(1, round(job["val_fraction"] * len(texts)))
    count = min(share, len(texts) - 1) if job["val_fraction"] > 0 and texts else 0  # one at least to either side
    held = set(sorted(range(len(texts)), key=order)[:count])
    for i, entry in enumerate(texts):
        entry["split"] = "val" if i in held else "train"
    return plan


def plan_by_folders(plan, files):
    """Where folders say train, validation and test: the test split is left out; without a validation split hashes make
    one."""
    splits = {path: split_of(below) for path, below in files.items()}
    left = [entry["path"] for entry in plan if splits[entry["path"]] == "test"]
    if len(left) == len(plan):
        raise UserError(
            "all inputs lie in the test split, which is not trained on; --split hash takes them all the same"
        )
    if left:
        say("%d files of the test split are left out, such as %s" % (len(left), left[0]))
    for entry in plan:
        if "val" in splits.values() or entry["kind"] == "text":
            entry["split"] = splits[entry["path"]] or "train"
    return [entry for entry in plan if splits[entry["path"]] != "test"]


# ----------------------------------------------------------------------------------------------------------------------
# SlimPajama's files, by the package huggingface_hub, which asks HF_ENDPOINT


def spread(entries, n):
    """n of the entries of a sorted list, evenly: all chunks of a data set have their part."""
    return [entries[i * len(entries) // n] for i in range(min(n, len(entries)))] if n < len(entries) else entries


def chosen_files(entries, max_files, max_bytes):
    """Which of [(path, bytes, sha256)] to fetch: train and validation, never test; where not all, one in twenty for
    validation."""
    parts = {"train": [], "val": [], "test": []}
    for entry in sorted(entries):
        parts[split_of(entry[0]) or "train"].append(entry)
    if parts["test"]:
        say("%d files of the test split are not fetched: they are not trained on" % len(parts["test"]))

    def pick(n):
        val = min(max(1, n // 20, n - len(parts["train"])), len(parts["val"])) if n > 1 else 0
        return spread(parts["train"], n - val) + spread(parts["val"], val)

    total = len(parts["train"]) + len(parts["val"])
    n = total if max_files is None else min(max_files, total)
    files = pick(n) if n < total else parts["train"] + parts["val"]
    while files and max_bytes is not None and sum(size for _, size, _ in files) > max_bytes:
        n = min(n - 1, int(n * max_bytes / sum(size for _, size, _ in files)) + 1)
        files = pick(n)
    if not files:
        raise UserError("--max-files and --max-bytes leave no file to download")
    return files


# Lines of huggingface_hub's messages that are no reason: advice, and last what the hub says to whoever has no token and
# asks for a repository that is not there.
ADVICE = ("For more ", "Please make sure ", "If you are trying ", "Make sure ", "Invalid username or password")
NEVER_PASS = (401, 403, 404, 410, 451)
NEVER_PASS_EITHER = (  # what huggingface_hub, httpx and requests raise when they are offline, and for wrong names
    "OfflineModeIsEnabled", "HFValidationError", "UnsupportedProtocol", "InvalidURL", "MissingSchema", "InvalidSchema",
)
GONE = (
    "%s is gone from the hub since 2026: add --repo %s, a third party's copy (1.5 TB), or --repo NAME for another; now "
    "the hub says: %s"
)


class Failure:
    """Why a call of huggingface_hub failed, of the exception that it raised."""

    def __init__(self, error):
        while type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__:  # which alone says why
            error = error.__cause__
        self.kind, self.text = type(error).__name__, str(error)
        self.bad_token = "Invalid credentials" in self.text
        self.status = getattr(getattr(error, "response", None), "status_code", 0)
        self.hopeless = (
            self.status in NEVER_PASS
            or self.kind in NEVER_PASS_EITHER
            or getattr(error, "errno", 0) in (errno.ENOSPC, errno.EACCES, errno.EROFS)
        )

    def no_repository(self):
        """Whether the repository may not be there: the hub says 401 of it to whoever has no token."""
        plain_401 = self.status == 401 and self.kind != "GatedRepoError" and not self.bad_token
        return self.kind == "RepositoryNotFoundError" or plain_401

    def reason(self):
        """The message's lines as one, without advice and the request's number."""
        lines = [line.strip() for line in self.text.split("\n")]
        text = " ".join(line for line in lines if line and not line.startswith(ADVICE))
        return re.sub(r" \((Request|Amzn Trace|Amz CF) ID: [^)]*\)", "", text)[:400] or self.kind

    def hint(self):
        if self.bad_token:
            return "; the token in HF_TOKEN, or the one that `hf auth login` has kept, is not valid"
        if self.kind == "GatedRepoError" or self.status == 403:
            return "; set HF_TOKEN to a token of an account that may read it"
        if self.status == 401:
            return "; it is not there, or wants a token in HF_TOKEN; --repo NAME takes another copy"
        return "; --repo NAME takes another copy" if self.no_repository() else ""


def trying(what, call, args):
    """call(), again after failures that may pass, with pauses that double up to a minute; UserError after --retries of
    them."""
    for tries in range(1, args.retries + 2):
        try:
            return call()
        except Exception as e:
            failure = Failure(e)
            why = failure.reason()
            if failure.hopeless or tries > args.retries:
                message = "%s: %s%s" % (what, why, failure.hint())
                if what == REPOSITORY and failure.no_repository():
                    message = GONE % (REPOSITORY, COPY, why)
                raise UserError(message + (", after %d tries" % tries if tries > 1 else ""))
            pause = min(60, args.retry_pause * 2 ** (tries - 1))
            say("%s: %s; trying again in %.1f s" % (what, why, pause))
            time.sleep(pause)


def fetch(hub, args, name, size, sha256):
    """One file. It comes below .cache and gets its name once its sha256 is what the repository says; else it is deleted
    and fetched anew."""
    path, beside = os.path.join(args.download, name), os.path.join(args.download, ".cache", "coming")
    come = os.path.join(beside, name)
    if os.path.exists(path) and os.path.getsize(path) == size:
        return 0

    def once():
        hub.hf_hub_download(args.repo, name, repo_type="dataset", local_dir=beside)
        if sha256 and file_sums(come)["sha256"] != sha256:
            os.remove(come)
            raise ValueError("its sha256 is not the repository's")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.replace(come, path)

    trying(name, once, args)
    return size


@contextlib.contextmanager
def download_lock(folder):
    """Held, together with others, while files come into `folder`. Who finds nobody else there removes what killed ones
    have left: huggingface_hub, from 1.18 on, writes each try to a new file and goes on with none."""
    try:
        os.makedirs(os.path.join(folder, ".cache"), exist_ok=True)
        lock = open(os.path.join(folder, ".cache", "lock"), "w")
    except OSError as e:
        raise UserError("%s: %s" % (e.filename or folder, e.strerror))
    with lock:
        with contextlib.suppress(OSError):  # another one is at work, or this file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_left_over(os.path.join(folder, ".cache", "coming"))
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def remove_left_over(folder):
    found = [
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if re.search(r"\.[0-9a-f]{8}\.incomplete$", name)  # without these digits: of an older version, which goes on
    ]
    size = sum(os.path.getsize(path) for path in found)
    for path in found:
        os.remove(path)
    if found:
        say("%d files that had come in part are removed, %.1f MB; they begin anew" % (len(found), size / 1e6))


def download(args):
    """Fetches what is missing of the repository's files into args.download."""
    hub = need("huggingface_hub")
    utils = need("huggingface_hub.utils")
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    listing = trying(
        args.repo, lambda: list(hub.HfApi().list_repo_tree(args.repo, repo_type="dataset", recursive=True)), args
    )
    entries = [
        (f.path, f.size, f.lfs.sha256 if f.lfs else None)
        for f in listing
        if hasattr(f, "size") and kind_of(f.path) != "text" and "/" in f.path
    ]
    for name, _, _ in entries:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError("%s: the file %s would lie outside of %s" % (args.repo, ascii(name), args.download))
    top = [f.path for f in listing if hasattr(f, "size") and kind_of(f.path) != "text" and "/" not in f.path]
    if top:
        say("%d files that lie in no folder of %s are not fetched, such as %s" % (len(top), args.repo, top[0]))
    if not entries:
        raise UserError(
            "%s: no .jsonl, .jsonl.zst, .jsonl.gz or .parquet file in a folder of this data set" % args.repo
        )
    files = chosen_files(entries, args.max_files, args.max_bytes)
    with download_lock(args.download):
        fetch_all(hub, args, files)


def fetch_all(hub, args, files):
    from concurrent.futures import ThreadPoolExecutor, as_completed

    total, done, new, failed, shown = sum(size for _, size, _ in files), 0, 0, [], time.monotonic()
    pool = ThreadPoolExecutor(max(1, args.connections))
    try:
        jobs = {pool.submit(fetch, hub, args, *entry): entry for entry in files}
        for job in as_completed(jobs):
            try:
                new += job.result()
                done += jobs[job][1]
            except UserError as e:
                failed.append(str(e))
            if time.monotonic() - shown > (1 if sys.stderr.isatty() else 30):
                shown = time.monotonic()
                print("%.1f of %.1f GB" % (done / 1e9, total / 1e9), file=sys.stderr,
                      end="\r" if sys.stderr.isatty() else "\n")
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command goes on, complete files stay", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for files that come
    say("%d files are there, %.1f MB of them new; %d failed" % (len(files) - len(failed), new / 1e6, len(failed)))
    for line in failed:
        say(line)
    if failed:
        raise UserError(
            "%d of %d files could not be downloaded; the same command goes on with them" % (len(failed), len(files))
        )


# ----------------------------------------------------------------------------------------------------------------------
# What a file is

STARTS = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"PAR1": "parquet",
    b"PK\3\4": "a zip archive",
    b"\xfd7zXZ\0": "xz data",
    b"%PDF-": "a PDF",
    b"\x7fELF": "a program",
    b"SQLite format 3\0": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    codecs.BOM_UTF32_LE: "UTF-32 text; wanted UTF-8 (iconv -t UTF-8 makes it)",
    codecs.BOM_UTF32_BE: "UTF-32 text; wanted UTF-8 (iconv -t UTF-8 makes it)",
    codecs.BOM_UTF16_LE: "UTF-16 text; wanted UTF-8 (iconv -t UTF-8 makes it)",
    codecs.BOM_UTF16_BE: "UTF-16 text; wanted UTF-8 (iconv -t UTF-8 makes it)",
    **{
        number.to_bytes(4, "little") + version.to_bytes(4, "little"): "a token shard"
        for number, version in MAGIC.values()
    },
}


def what_is(head):
    """What else than UTF-8 text the first bytes of a file are, None where nothing is known."""
    for start, what in STARTS.items():
        if head.startswith(start):
            return what
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return "bzip2 data"
    head = head[:4096]
    if len(head) >= 16 and head.count(0) * 4 >= len(head):
        return "no text: a quarter of it or more are zeros, as in UTF-16 without its mark; wanted UTF-8"
    return None


def check_text(head):
    what = what_is(head)
    if what:
        raise BadDocument(ANOTHER, what)


# ----------------------------------------------------------------------------------------------------------------------
# JSON of any depth and with numbers of any length, where Python's own reader gives up at 1,000 levels and 4,300 digits

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
JSON_TOKEN = re.compile(
    r'([{}\[\],:])|("[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*")|'
    r'(-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null)'
)


def plain(word):
    """The value of true, false, null or a number; one of more digits than Python's own reader takes is a float."""
    if word in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[word]
    return float(word) if len(word) > 4300 or any(c in word for c in ".eE") else int(word)


def patient_decode(text, at, names=()):
    """One JSON value from `at` on -> (value, end). Without recursion. Raises KeyTwice for one of the keys `names`."""
    root, stack, keys, expect = None, [], [], ("value",)
    while True:
        at = SPACE.match(text, at).end()
        token = JSON_TOKEN.match(text, at)
        mark, string, word = token.groups() if token else (None, None, None)
        if token and "value" in expect and (not mark or mark in "{["):
            value = {} if mark == "{" else [] if mark == "[" else json.loads(string) if string else plain(word)
            if not stack:
                root = value
            elif isinstance(stack[-1], list):
                stack[-1].append(value)
            else:
                key = keys.pop()
                if key in names and key in stack[-1]:
                    raise KeyTwice(key)
                stack[-1][key] = value
            if mark:
                stack.append(value)
            expect = ("key", "}") if mark == "{" else ("value", "]") if mark == "[" else None
        elif string and "key" in expect:
            keys.append(json.loads(string))
            expect = (":",)
        elif mark and mark in expect:
            if mark in "}]":
                stack.pop()
                expect = None
            else:
                expect = ("value",) if mark == ":" or isinstance(stack[-1], list) else ("key",)
        else:
            raise json.JSONDecodeError("Expecting " + " or ".join(expect), text, at)
        at = token.end()
        if expect is None:
            if not stack:
                return root, at
            expect = (",", "}") if isinstance(stack[-1], dict) else (",", "]")


def decode_json(text, at=0):
    """One JSON value from `at` on -> (value, end)."""
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):
        return patient_decode(text, at)


def decoder_of(names):
    """A decoder that raises KeyTwice where one of the keys `names` occurs twice in an object, however it is spelt."""
    return json.JSONDecoder(object_pairs_hook=functools.partial(members, names=names))


def load_json(text, decoder=DECODER, names=()):
    """The JSON value that a text is; decoder: DECODER, or decoder_of(names)."""
    try:
        return decoder.decode(text)
    except (KeyTwice, json.JSONDecodeError):
        raise
    except (RecursionError, ValueError):
        value, end = patient_decode(text, 0, names)
        end = SPACE.match(text, end).end()
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value


def json_values(text):
    """The values of a text that is an array, or one value after another over several lines, each as its own JSON on one
    line."""
    at = SPACE.match(text, 0).end()
    array = text[at : at + 1] == "["
    at = SPACE.match(text, at + array).end()
    closed = array and text[at : at + 1] == "]"
    while at < len(text) and not closed:
        _, end = decode_json(text, at)
        yield re.sub(r"[\r\n]", " ", text[at:end])  # in valid JSON they stand between values only
        at = SPACE.match(text, end).end()
        if array:
            closed = text[at : at + 1] == "]"
            if not closed and text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting , or ]", text, at)
            at = SPACE.match(text, at + 1).end() if not closed else at
    if array and (not closed or text[at + 1 :].strip(" \t\r\n")):
        raise json.JSONDecodeError("Expecting the end of the array, and nothing after it", text, at)


# ----------------------------------------------------------------------------------------------------------------------
# Reading: inputs -> tasks in a fixed order, each with the position after it, from which a restart goes on.
# A task is (kind, path, split, where, payload); split: None where the documents' hashes decide.


def compressed_chunks(f, kind, tell):
    """Decompressed bytes of a file, which may be several compressed streams one after another. Raises BadDocument where
    it breaks off."""
    name = kind[-3:].lstrip(".")
    if name == "zst":
        zstandard = need("zstandard")
        error, begin = zstandard.ZstdError, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    else:
        error, begin = zlib.error, functools.partial(zlib.decompressobj, 31)
    stream, first = None, True
    for data in iter(lambda: f.read(1 << 17), b""):
        tell(f.tell())
        if first and not re.match(rb"\x1f\x8b" if name == "gz" else rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", data):
            raise BadDocument(ANOTHER, "%s, wanted %s" % (what_is(data) or "it begins with %r" % data[:8], name))
        first = False
        while data:
            if stream is None and name == "gz":
                data = data.lstrip(b"\0")  # what tapes and tar fill up with; gzip passes over it too
                if not data:
                    break
            stream = stream or begin()
            try:
                out = stream.decompress(data)
            except error as e:
                if "Allocation error" in str(e):  # zstd's word where it has no memory for the window
                    raise MemoryError(str(e))
                raise BadDocument(BROKEN_OFF, "%s: %s" % (name, e))
            data = b""
            if stream.eof:
                data, stream = stream.unused_data, None
            if out:
                yield out
    if stream is not None:
        raise BadDocument(BROKEN_OFF, "%s: the file ends inside a compressed stream" % name)


def raw_chunks(path, kind, tell):
    """Decompressed bytes of a file of lines; checked to be text at its beginning, a byte-order mark taken off."""
    with open(path, "rb") as f:
        chunks = iter(lambda: f.read(BLOCK), b"") if kind == "lines" else compressed_chunks(f, kind, tell)
        first = True
        for chunk in chunks:
            if first:
                check_text(chunk)
                chunk = chunk[3:] if chunk.startswith(BOM) else chunk
                first = False
            if kind == "lines":
                tell(f.tell())
            yield chunk


def one_value_a_line(chunks):
    """The same, where the file is a JSON array or has values over several lines, as one value a line."""
    head, broken = b"", None
    while len(head) < 4096:
        try:
            more = next(chunks, None)
        except BadDocument as e:
            more, broken = None, e
        if more is None:
            break
        head += more
    start = head[:4096].lstrip(b" \t\r\n")
    if broken or not (start.startswith(b"[") or re.match(rb"\{[ \t]*\r?\n", start)):
        yield head
        if broken:
            raise broken
        yield from chunks
        return
    parts, size = [head], len(head)
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > WHOLE:
            raise BadDocument(
                ANOTHER,
                "a JSON array, or values over several lines, of more than %d bytes; wanted one object a line" % WHOLE,
            )
    data = b"".join(parts)
    try:
        values = list(json_values(data.decode("utf-8")))
    except UnicodeDecodeError as e:
        raise BadDocument("invalid UTF-8", describe_utf8(e))
    except ValueError as e:
        line = start.split(b"\n", 1)[0]
        if (
            start.startswith(b"[") and b"\n" in start and is_json(line)
        ):  # lines after all, of which the first is an array
            yield data
            return
        raise BadDocument("broken JSON", "an array, or values over several lines: %s" % str(e)[:200])
    for i in range(0, len(values), 1000):
        yield "".join(value + "\n" for value in values[i : i + 1000]).encode()


def is_json(line):
    try:
        load_json(line.decode("utf-8"))
        return True
    except ValueError:
        return False


def line_tasks(index, entry, at, tell):
    """Blocks of whole lines from `at` on; `at` and the positions count decompressed bytes and lines."""
    path, split, offset, line = entry["path"], entry.get("split"), at["offset"], at["line"]
    end = {"input": index + 1, "offset": 0, "line": 0}
    skip, parts, size, whole = offset, [], 0, 0  # whole: bytes of `parts` up to the last newline
    blank, bad = offset == 0, None
    chunks = one_value_a_line(raw_chunks(path, entry["kind"], tell))
    while True:
        try:
            chunk = next(chunks, None)
        except BadDocument as e:
            chunk, bad = None, e
        if chunk and skip:
            chunk, skip = chunk[skip:], max(0, skip - len(chunk))
        if chunk:
            blank = blank and not chunk.strip()
            newline = chunk.rfind(b"\n") + 1
            whole = size + newline if newline else whole
            parts.append(chunk)
            size += len(chunk)
        if whole and (size >= BLOCK or bad):
            data = b"".join(parts)
            block, parts = data[:whole], [data[whole:]]
            size, offset, first, whole = size - whole, offset + whole, line, 0
            line += block.count(b"\n")
            yield ("lines", path, split, first, block), {"input": index, "offset": offset, "line": line}
        if chunk is None:
            break
    if bad:
        yield ("bad", path, split, line + 1, bad.args), end
    elif blank:
        yield ("bad", path, split, 1, ("empty document", "no document in this file")), end
    elif size:
        yield ("lines", path, split, line, b"".join(parts)), end


def fault_of_machine(e):
    """Whether an exception of pyarrow is about memory, a disk, a network or pyarrow itself: then no document may be
    left out because of it. pyarrow's errors about what a file holds have no errno."""
    return isinstance(e, (MemoryError, UserError)) or (isinstance(e, OSError) and e.errno is not None)


@contextlib.contextmanager
def parquet_file(path):
    """A file of parquet, whatever bytes its name has: pyarrow wants a name as text to be UTF-8. Where the file has
    checksums, they are compared, which pyarrow leaves out unless it is told."""
    with need("pyarrow").OSFile(os.fsencode(path)) as f:
        with need("pyarrow.parquet").ParquetFile(f, page_checksum_verification=True) as parquet:
            yield parquet


def column_of(field, schema):
    """[the longest beginning of a field a.b.c under which the file has columns], [] where there is none."""
    parts, columns = field.split("."), [schema.column(i).path + "." for i in range(len(schema))]
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return [name for name in names if any(column.startswith(name + ".") for column in columns)][:1]


def rows_of(batch):
    """The rows of a batch as Python has them; UnicodeDecodeError in the place of a row whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as e:
        return [e] if batch.num_rows == 1 else [rows_of(batch.slice(i, 1))[0] for i in range(batch.num_rows)]


def parquet_tasks(index, entry, at):
    path, split = entry["path"], entry.get("split")
    try:
        with parquet_file(path) as f:
            groups, rows = f.num_row_groups, f.metadata.num_rows
    except Exception as e:
        if fault_of_machine(e):
            raise
        with open(path, "rb") as f:
            head = f.read(64)
        what = (
            (BROKEN_OFF, "parquet: %s" % str(e).split("\n")[0])
            if head.startswith(b"PAR")
            else (ANOTHER, "%s, wanted parquet" % (what_is(head) or "it begins with %r" % head[:8]))
        )
        yield ("bad", path, split, 0, what), {"input": index + 1, "offset": 0, "line": 0}
        return
    if rows == 0:
        end = {"input": index + 1, "offset": 0, "line": 0}
        yield ("bad", path, split, 0, ("empty document", "no document in this file")), end
        return
    for group in range(at["offset"], groups):
        yield ("rows", path, split, group, None), {"input": index, "offset": group + 1, "line": 0}


# A text may be cut between a newline and an ASCII letter, where one visible ASCII character stands before the newline;
# or after a letter, before a space and another letter or before a comma or full stop of Chinese and Japanese. No piece
# of any of the patterns reaches across, so the tokens are those of the whole text. Letters are some that all versions
# of Unicode have: Latin, Cyrillic, Arabic, Devanagari, Chinese, Korean.
LETTER = (rb"(?:[A-Za-z]|\xd0[\x90-\xbf]|\xd1[\x80-\x8f]|\xd8[\xa7-\xba]|\xe0\xa4[\x85-\xb9]|[\xe5-\xe8][\x80-\xbf]{2}"
          rb"|[\xeb\xec][\x80-\xbf]{2})")
SAFE_CUT = re.compile(rb"[!-~]\n(?=[A-Za-z])|" + LETTER + rb"(?= " + LETTER + rb"|\xe3\x80[\x81\x82]|\xef\xbc\x8c)")
CUT_REACH = 7  # bytes that the rule looks at, at most


def text_tasks(index, entry, at, tell, whole):
    """One document a file, or two (train, val) where a single text is split; long ones in segments. where: (first,
    last) segment."""
    path, size, split = entry["path"], entry["bytes"], entry["split"]
    done = {"input": index + 1, "offset": 0, "line": 0}
    with open(path, "rb") as f:
        head = f.read(4096)
        what = what_is(head)
        bad = what and (1, ANOTHER, what)
        if not bad and size == (3 if head.startswith(BOM) else 0):
            bad = (1, "empty document", "an empty file")
        if not bad and (size > SEGMENT or split == "tail"):
            bad = not_utf8(path)
        if bad:
            yield ("bad", path, split, bad[0], bad[1:]), done
            return
        cut = text_cut(path, size, entry["fraction"]) if split == "tail" else size
        start = 3 if head.startswith(BOM) else 0
        parts = [(start, cut, "val" if split == "val" else "train")] + ([(cut, size, "val")] if cut < size else [])
        at = {"offset": max(at["offset"], start)}
        for begin, end, side in parts:
            while at["offset"] < end:
                start = at["offset"]
                stop = end if whole else segment_end(f, start, end)
                tell(stop)
                f.seek(start)
                data = f.read(stop - start)
                if len(data) < stop - start:
                    refuse_changed(entry)
                at = {"input": index, "offset": stop, "line": 0}
                yield ("text", path, side, (start == begin, stop == end), data), at


def segment_end(f, start, end):
    """End of the segment that begins at `start`: the first safe cut after SEGMENT bytes, or the end."""
    at = start + SEGMENT
    overlap = b""
    f.seek(min(at, end))
    while at < end:
        more = f.read(min(1 << 16, end - at))
        if not more:  # the file has become shorter, which its reader will see
            break
        window = overlap + more
        match = SAFE_CUT.search(window)
        if match:
            return at - len(overlap) + match.end()
        at += len(window) - len(overlap)
        overlap = window[1 - CUT_REACH :]
    return end


def not_utf8(path):
    """(line, kind, what) of the first byte that is not UTF-8, None where all is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with open(path, "rb") as f:
        while True:
            chunk = f.read(BLOCK)
            pending = decoder.getstate()[0]
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as e:
                return line + (pending + chunk)[: e.start].count(b"\n"), "invalid UTF-8", describe_utf8(e)
            if not chunk:
                return None
            line += chunk.count(b"\n")


def describe_utf8(e):
    return "byte 0x%02x: %s" % (e.object[e.start], e.reason) if e.start < len(e.object) else e.reason


def refuse_changed(entry):
    """A file that somebody writes to while it is read, such as a download: what was read is neither what was there
    nor what will be."""
    with contextlib.suppress(FileNotFoundError):  # removed once it was read
        info = os.stat(entry["path"])
        if (info.st_size, info.st_mtime_ns) != (entry["bytes"], entry["mtime"]):
            text = "%s: changed while it was read; --overwrite prepares anew once nobody writes to it"
            raise UserError(text % entry["path"])


def unchanged(index, entry, tasks):
    """The tasks of one input, the last of them only where the file is still what it was."""
    for task, position in tasks:
        if position["input"] > index:
            refuse_changed(entry)
        yield task, position
    refuse_changed(entry)


def entry_tasks(index, entry, at, tell, whole):
    """The tasks of one input."""
    try:
        if entry["bytes"] == 0 and entry["kind"] != "text":
            detail = "0 bytes: a download that failed?"
            end = {"input": index + 1, "offset": 0, "line": 0}
            yield ("bad", entry["path"], entry.get("split"), 0, (BROKEN_OFF, detail)), end
        elif entry["kind"] == "parquet":
            yield from parquet_tasks(index, entry, at)
        elif entry["kind"] == "text":
            yield from text_tasks(index, entry, at, tell, whole)
        else:
            yield from line_tasks(index, entry, at, tell)
    except OSError as e:
        raise UserError("%s: %s" % (entry["path"], e.strerror))
    except MemoryError as e:
        raise UserError("%s: out of memory%s" % (entry["path"], ": %s" % e if str(e) else ""))


def read_tasks(plan, at, tell, whole, full):
    """All tasks from position `at`. tell(n) is told the bytes of inputs that were read. whole: no long text is cut.
    full(split): no more documents of this split are wanted."""
    before = sum(entry["bytes"] for entry in plan[: at["input"]])
    for index in range(at["input"], len(plan)):
        here, split = at if index == at["input"] else {"input": index, "offset": 0, "line": 0}, plan[index].get("split")
        begun = here["offset"] > 0 and plan[index]["kind"] == "text"
        tasks = (
            unchanged(index, plan[index], entry_tasks(index, plan[index], here, lambda n: tell(before + n), whole))
            if begun or not full(split)
            else ()
        )
        for task, position in tasks:
            if full(split) and not goes_on(task):
                break
            yield task, position
        before += plan[index]["bytes"]
        tell(before)


def goes_on(task):
    """A segment of a text that began in an earlier one."""
    return task[0] == "text" and not task[3][0]
