#!/usr/bin/env python3
"""Token shards and the manifest beside them (data/README.md describes both): what writes them shares this, and what
reads them.

python3 data/shards.py inspect SHARD      header, counts and first documents; the same as data/prepare.py inspect
python3 data/shards.py verify DIR|SHARD   checks every checksum, id and mask
"""

import argparse
import array
import contextlib
import errno
import fcntl
import json
import math
import os
import re
import signal
import struct
import sys
import threading
import time
import zlib

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from options import Parser, whole_number  # noqa: E402
from tokenizer import PATTERNS, UserError, file_sums, members, naming, open_tokenizer  # noqa: E402

# What every entry of a manifest has, and of which type.
ENTRIES = {
    "preparations": {"tokenizer": dict, "sets": dict, "options": dict},
    "shards": {"preparation": str, "set": str, "split": str, "documents": int, "tokens": int, "bytes": int,
               "crc32": str},
}
MAGIC = {2: (20240520, 1), 4: (20240801, 7)}  # bytes a token -> llm.c's magic and version
HEADER_BYTES = 1024
FORMAT = 1  # of manifest and state
KEPT = 1 << 22  # tokens of a shard of which inspect shows the text
SHARD_NAME = re.compile(r"(.+)_(train|val)_\d{6,}\.bin")
SPLIT_IN_NAME = re.compile(r"_(?=(train|val)(_|$))")  # with which x_train_val_000000.bin would be one of *_train_*.bin
NAME_WITH_SPLIT = "--name %s: wanted no _train or _val in it, with which *_train_*.bin finds validation too"


# ----------------------------------------------------------------------------------------------------------------------
# What the programs in data/ share


def core_quota(root=""):
    """How many cores' time the cgroups of this process allow it (docker --cpus 1.5); infinity where they set no limit.
    mta/util.h reads the same. root: a test's own tree in place of "/"."""
    quota = math.inf
    with contextlib.suppress(OSError, ValueError), open(root + "/proc/self/cgroup", encoding="utf-8") as f:
        for line in f:
            _, names, path = line.rstrip("\n").split(":", 2)
            folder = root + "/sys/fs/cgroup" + ("/cpu" if names else "")  # of version 1, or 2
            while not names or "cpu" in names.split(","):
                with contextlib.suppress(OSError, ValueError):
                    words = []
                    for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") if names else ("cpu.max",):
                        with open(folder + path + "/" + name, encoding="utf-8") as numbers:
                            words += numbers.read().split()
                    time, period = map(float, words)
                    quota = min(quota, time / period) if time > 0 and period > 0 else quota
                if not path:
                    break
                path = path.rpartition("/")[0]
    return quota


def cores():
    """Cores that this process may use: taskset and batch systems allow fewer than the machine has, containers less of
    their time."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(max(1, min(n, core_quota())))


def of_output(call):
    """Wraps write or flush of standard output: an error is reported as its own, not as that of a file."""

    def call_and_tell(*words):
        try:
            return call(*words)
        except BrokenPipeError:
            raise
        except OSError as e:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
            raise UserError("standard output: %s" % e.strerror)

    return call_and_tell


def run_program(main):
    """Runs main() as a program and exits. Closed descriptors 0 to 2 are opened on /dev/null before anything else can
    take their numbers; a terminal without UTF-8 gets \\u escapes; a reader that went away ends the program quietly."""
    name = os.path.basename(sys.argv[0])
    for fd, stream in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    sys.stdout.write, sys.stdout.flush = of_output(sys.stdout.write), of_output(sys.stdout.flush)
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except UserError as e:
        status = "%s: %s" % (name, e)
    except KeyboardInterrupt:
        status = "%s: interrupted" % name
    except MemoryError:
        status = "%s: out of memory" % name
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        os.dup2(1, 2)
        status = 1
    sys.exit(status)


@contextlib.contextmanager
def interrupts_later():
    """A process that is started in here never sees Ctrl-C, which is for this one, even before end_with; here it comes
    afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outcome(pool, future, seconds=5):
    """The result of a future of a ProcessPoolExecutor. A worker that is killed while it hands over a result leaves the
    pool waiting for the rest of it, forever: where one is dead and nothing comes in that time, all end, and the pool is
    broken."""
    from concurrent.futures import wait

    while not wait([future], seconds).done:
        workers = list((pool._processes or {}).values())
        if not all(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.kill()
            pool._result_queue._writer.close()  # now the pool, too, finds that nobody writes any more
            break
    return future.result()


def end_with(parent):
    """Of a worker process: it ends with its parent, however that ends, and Ctrl-C is its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR)


def sync_file(fd):
    """fsync, where the file system has it: CIFS, sshfs and some FUSE refuse it for folders, which is no fault of the
    data."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in NO_SYNC:
            raise


def sync_folder(path):
    try:
        fd = os.open(path or ".", os.O_RDONLY)
    except OSError as e:
        if e.errno in NO_SYNC:
            return
        raise
    try:
        sync_file(fd)
    finally:
        os.close(fd)


def write_synced(path, data):
    """Written beside, synced, renamed: the file is there whole or not at all."""
    f = open(path + ".tmp", "wb")
    try:
        with f:
            f.write(data)
            f.flush()
            sync_file(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise
    sync_folder(os.path.dirname(path))


# ----------------------------------------------------------------------------------------------------------------------
# The manifest


def shard_header(width, tokens, vocab, crc, mask=0):
    header = [*MAGIC[width], tokens, vocab, crc - (1 << 32) if crc >= 1 << 31 else crc, mask]
    return struct.pack("<256i", *(header + [0] * (256 - len(header))))


def read_manifest(folder, wanted=False):
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f, object_pairs_hook=members)
        for part, keys in ENTRIES.items():
            for entry in manifest[part].values():
                if not all(isinstance(entry[key], type) for key, type in keys.items()):
                    raise KeyError
        if not all(isinstance(p["tokenizer"]["name"], str) for p in manifest["preparations"].values()):
            raise KeyError
        return manifest
    except FileNotFoundError:
        if wanted:
            raise UserError("%s: no such file; wanted a folder that prepare.py or toy_task.py has written" % path)
        return {"preparations": {}, "shards": {}}
    except OSError as e:
        raise UserError("%s: %s" % (path, e.strerror))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError("%s: not a manifest of prepare.py" % path)
    except ValueError as e:  # a key twice, bytes that are no UTF-8
        raise UserError("%s: not a manifest of prepare.py: %s" % (path, e))


@contextlib.contextmanager
def locked(path, busy=None):
    """Holds the lock `path`, a file that is there while somebody holds it. Who finds it held waits, or raises UserError
    with the text `busy`."""
    while True:
        lock = open(path, "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except OSError as e:
            if busy and e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(busy)
            break  # a file system without locks
        with contextlib.suppress(FileNotFoundError):  # the holder has removed the file: try again with a new one
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
        lock.close()
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        lock.close()


def manifest_lock(folder):
    """For one program that reads the folder's manifest and writes it: the others wait, so that none loses its part."""
    return locked(os.path.join(folder, ".manifest.lock"))


def tokenizer_entry(tok, manifest, name):
    """The manifest's part on a tokenizer. The rank file's copy has another name where a preparation beside `name` has
    another file under the same one."""
    entry = {"name": tok.name, "vocab_size": tok.vocab, "bos": tok.bos, "eos": tok.eos, "bytes_per_token": tok.width}
    if tok.path:
        sums, file = file_sums(tok.path), tok.file_name
        others = [p["tokenizer"] for key, p in manifest["preparations"].items() if key != name]
        if any(t.get("file") == file and t.get("sha256") != sums["sha256"] for t in others):
            file = "%s-%s.tiktoken" % (tok.name, sums["crc32"])
        entry.update(sums, file=file)
    return entry


def refuse_foreign_ranks(copy, manifest, tokenizer):
    """A rank file of the user's that is called like this one's copy stays, unless it is the same or listed."""
    listed = [p["tokenizer"] for p in manifest["preparations"].values()] + [tokenizer]
    known = {t.get("sha256") for t in listed if t.get("file") == tokenizer["file"]}
    if os.path.exists(copy) and file_sums(copy)["sha256"] not in known:
        raise UserError("%s is another rank file, wanted none or a copy of --tokenizer's; move it elsewhere" % copy)


def write_manifest(folder, manifest, name, preparation, shards, tok):
    """Adds or replaces the preparation `name` with its shards {file name: entry} and copies its rank file. Shards of an
    earlier preparation of this name that are no longer its own are deleted. The manifest is written last. The caller
    holds manifest_lock since it has read the manifest."""
    if tok.path:
        copy = os.path.join(folder, preparation["tokenizer"]["file"])
        refuse_foreign_ranks(copy, manifest, preparation["tokenizer"])
    for file in [f for f, shard in manifest["shards"].items() if shard["preparation"] == name and f not in shards]:
        for path in (os.path.join(folder, file), os.path.join(folder, file[: -len(".bin")] + ".mask")):
            if os.path.exists(path):
                os.remove(path)
        del manifest["shards"][file]
    manifest["shards"].update(shards)
    manifest["preparations"][name] = preparation
    if tok.path:
        if not (os.path.exists(copy) and os.path.samefile(copy, tok.path)):
            with open(tok.path, "rb") as f:
                write_synced(copy, f.read())
    sync_folder(folder)
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    write_synced(os.path.join(folder, "manifest.json"), text.encode())


def foreign_shard(folder, manifest, name, files, owned=False):
    """The first of these file names that is in the folder already and belongs to another preparation or, unless
    `owned`, to none."""
    for file in sorted(files):
        owner = manifest["shards"].get(file, {}).get("preparation")
        if owner != name and (owner or not owned) and os.path.exists(os.path.join(folder, file)):
            return os.path.join(folder, file), owner
    return None


def tokenizer_of(folder, name, spec, pattern):
    """The tokenizer of a shard: as given, or as the manifest beside it says; None where nobody knows."""
    if spec:
        return open_tokenizer(spec, pattern, encoder=False)
    manifest = read_manifest(folder)
    preparation = manifest["preparations"].get(manifest["shards"].get(name, {}).get("preparation"))
    if preparation is None:
        return None
    tokenizer = preparation["tokenizer"]
    if "file" not in tokenizer:
        return open_tokenizer(tokenizer["name"], None, encoder=False)
    return open_tokenizer(os.path.join(folder, tokenizer["file"]), tokenizer["name"], encoder=False)


# ----------------------------------------------------------------------------------------------------------------------
# Reading: inspect and verify


class Shard:
    """The header of a shard, checked against its size."""

    def __init__(self, path):
        self.path = path
        with naming(path), open(path, "rb") as f:
            header = f.read(HEADER_BYTES)
            self.size = os.fstat(f.fileno()).st_size
        if len(header) < HEADER_BYTES:
            raise UserError("%s: %d bytes, a shard has a header of %d" % (path, len(header), HEADER_BYTES))
        magic, version, self.tokens, self.vocab, crc, self.mask = struct.unpack("<6i", header[:24])
        widths = {MAGIC[w]: w for w in MAGIC}
        if (magic, version) not in widths:
            raise UserError(
                "%s: magic %d, version %d; wanted 20240520, 1 (uint16) or 20240801, 7 (uint32)" % (path, magic, version)
            )
        self.magic, self.version, self.crc, self.width = magic, version, crc & 0xFFFFFFFF, widths[magic, version]
        wanted = HEADER_BYTES + self.tokens * self.width
        if self.tokens < 0 or self.size != wanted:
            raise UserError(
                "%s: %d bytes, its header says %d tokens, which is %d" % (path, self.size, self.tokens, wanted)
            )

    def chunks(self, tokens=1 << 20):
        """Packed tokens and the same as numbers (numpy's where it is there, which is faster), piece by piece."""
        try:
            import numpy  # here, because a preparation does without and should not wait for it
        except ImportError:
            numpy = None
        with open(self.path, "rb") as f:
            f.seek(HEADER_BYTES)
            for data in iter(lambda: f.read(tokens * self.width), b""):
                if numpy:
                    yield data, numpy.frombuffer(data, dtype="<u%d" % self.width)
                else:
                    yield data, array.array("HI"[self.width == 4], data)


def largest_of(numbers):
    return int(numbers.max()) if hasattr(numbers, "max") else max(numbers)


def places(numbers, wanted):
    """Where a number stands in what chunks() gives."""
    if hasattr(numbers, "nonzero"):
        return (numbers == wanted).nonzero()[0].tolist()
    data, one, found = numbers.tobytes(), array.array(numbers.typecode, [wanted]).tobytes(), []
    at = data.find(one)
    while at >= 0:
        if at % len(one) == 0:  # else it is halves of two numbers
            found.append(at // len(one))
        at = data.find(one, at + 1)
    return found


def refuse_pattern_alone(args):
    if args.pattern and not args.tokenizer:
        raise UserError("--pattern: wanted --tokenizer beside it, the rank file whose text it splits")


def refuse_other_vocabulary(shard, tok, given):
    """given: --tokenizer, which need not be what the shard was made with."""
    if given and shard.vocab not in (0, tok.vocab):
        form = (shard.path, shard.vocab, given, tok.vocab)
        raise UserError("%s: made with a vocabulary of %d, --tokenizer %s has %d" % form)


def inspect(args):
    refuse_pattern_alone(args)
    shard = Shard(args.shard)
    folder, name = os.path.split(args.shard)
    tok = tokenizer_of(folder or ".", name, args.tokenizer, args.pattern)
    refuse_other_vocabulary(shard, tok, args.tokenizer)
    form = (args.shard, shard.size, shard.magic, shard.version, 8 * shard.width)
    print("%s: %d bytes, magic %d version %d (uint%d)" % form)
    crc = "%08x" % shard.crc if shard.crc else "unknown"
    form = (shard.tokens, shard.vocab or "unknown", crc, "yes" if shard.mask else "no")
    print("tokens %d, vocabulary %s, crc32 %s, mask %s" % form)
    starts, position, largest, ids = 0, 0, 0, []
    first = []  # where the first documents start
    for _, numbers in shard.chunks():
        largest = max(largest, largest_of(numbers))
        found = places(numbers, tok.bos) if tok else []
        starts += len(found)
        first += [position + i for i in found[: args.documents + 1]]
        if position < KEPT:
            ids += numbers.tolist()
        position += len(numbers)
    vocab = shard.vocab or (tok.vocab if tok else 0)
    print("largest id %d%s" % (largest, ", NOT BELOW THE VOCABULARY, %d" % vocab if 0 < vocab <= largest else ""))
    if tok is None:
        print(
            "no manifest beside it names its tokenizer: give --tokenizer to see documents; the first ids: %s" % ids[:32]
        )
        return
    print("tokenizer %s: %d documents start here (ids %d)" % (tok.name, starts, tok.bos))
    inside = first[:1] != [0] and shard.tokens > 0  # the shard begins inside a document
    first = [0] * inside + first
    for i, start in enumerate(first[: args.documents]):
        end = first[i + 1] if i + 1 < len(first) else shard.tokens
        text = tok.decode(n for n in ids[start:end] if n not in (tok.bos, tok.eos)).decode("utf-8", "replace")
        begun = ", begun in the shard before" if inside and i == 0 else ""
        print("--- tokens %d to %d%s" % (start, end, begun))
        more = len(text) - args.characters
        rest = "%d characters more" % more if end <= len(ids) else "more"
        print(text if more <= 0 and end <= len(ids) else "%s [... %s]" % (text[: args.characters], rest))


def verify_shard(path, entry, tok, given):
    """Everything that can be wrong with one shard; entry: its part of the manifest or None; given: --tokenizer. -> its
    tokens."""
    shard = Shard(path)
    refuse_other_vocabulary(shard, tok, given)
    crc = starts = position = 0
    vocab = shard.vocab or (tok.vocab if tok else 0)
    for data, numbers in shard.chunks():
        crc = zlib.crc32(data, crc)
        if vocab and largest_of(numbers) >= vocab:
            at = next(i for i, n in enumerate(numbers) if n >= vocab)
            form = (path, numbers[at], position + at, vocab)
            raise UserError("%s: id %d at token %d, the vocabulary has %d" % form)
        starts += len(places(numbers, tok.bos)) if tok else 0
        position += len(numbers)
    if shard.crc and crc != shard.crc:
        raise UserError("%s: crc32 of the tokens is %08x, its header says %08x" % (path, crc, shard.crc))
    if shard.mask:
        verify_mask(os.path.splitext(path)[0] + ".mask" if path.endswith(".bin") else path + ".mask", shard)
    if entry:
        for what, got, want in (
            ("crc32", "%08x" % crc, entry["crc32"]),
            ("tokens", shard.tokens, entry["tokens"]),
            ("bytes", shard.size, entry["bytes"]),
            ("vocabulary", shard.vocab, tok.vocab if tok else shard.vocab),
            ("documents that start in it", starts if tok else entry["documents"], entry["documents"]),
        ):
            if got != want:
                raise UserError("%s: %s %s, the manifest says %s" % (path, what, got, want))
    return shard.tokens


def verify_mask(path, shard):
    if shard.mask != 1:
        raise UserError("%s: word 5 of the header is %d, wanted 0 (no mask) or 1 (mask)" % (shard.path, shard.mask))
    with naming(path), open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        bad = any(chunk.translate(None, b"\0\1") for chunk in iter(lambda: f.read(1 << 20), b""))
    if size != shard.tokens:
        raise UserError("%s: %d bytes, wanted one for each of the %d tokens" % (path, size, shard.tokens))
    if bad:
        raise UserError("%s: bytes other than 0 and 1" % path)


def verify_preparation(folder, manifest, name):
    """What is wrong with a preparation beside its shards, a line each: its rank file, the sums of its sets."""
    preparation = manifest["preparations"][name]
    tokenizer, wrong = preparation["tokenizer"], []
    if "file" in tokenizer:
        path = os.path.join(folder, tokenizer["file"])
        if not os.path.exists(path) or file_sums(path)["sha256"] != tokenizer["sha256"]:
            wrong.append(
                "%s: missing, or not the tokenizer of %s: its sha256 differs from the manifest's" % (path, name)
            )
    sums = {}
    for shard in manifest["shards"].values():
        if shard["preparation"] == name:
            n = sums.setdefault((shard["set"], shard["split"]), [0, 0, 0])
            n[0], n[1], n[2] = n[0] + shard["documents"], n[1] + shard["tokens"], n[2] + 1
    said = {
        (key, split): [n["documents"], n["tokens"], n["shards"]]
        for key, splits in preparation["sets"].items()
        for split, n in splits.items()
    }
    if sums != said:
        wrong.append("%s: the sums of the shards of %s are not what the manifest says of its sets" % (folder, name))
    return wrong


def verify(args):
    """Folders with a manifest, or single shards. Prints one line for each thing that is wrong."""
    refuse_pattern_alone(args)
    wrong = good = tokens = 0
    for item in args.items:
        if os.path.isdir(item):
            folder, manifest = item, read_manifest(item, wanted=True)
            shards, complaints = sorted(manifest["shards"]), []
            for name in sorted(manifest["preparations"]):
                complaints += verify_preparation(item, manifest, name)
            for name in sorted(os.listdir(item)):
                if SHARD_NAME.fullmatch(name) and name not in manifest["shards"]:
                    complaints.append("%s: not in the manifest" % os.path.join(item, name))
            for complaint in complaints:
                print(complaint)
            wrong += len(complaints)
        else:
            folder, name = os.path.split(item)
            shards, manifest = [name], read_manifest(folder or ".")
        for name in shards:
            try:
                tok = tokenizer_of(folder or ".", name, args.tokenizer, args.pattern)
                tokens += verify_shard(os.path.join(folder, name), manifest["shards"].get(name), tok, args.tokenizer)
                good += 1
            except UserError as e:
                print(e)
                wrong += 1
    print("%d shards good, %d tokens; %d things wrong" % (good, tokens, wrong))
    return 1 if wrong else 0


def add_commands(commands):
    """inspect and verify, to a parser's subcommands."""
    look = commands.add_parser("inspect", help="header, counts and first documents of a shard")
    look.add_argument("shard")
    look.add_argument("--documents", type=whole_number(0), default=3, metavar="N",
                      help="that are shown; default 3")
    look.add_argument("--characters", type=whole_number(0), default=400, metavar="N",
                      help="of each document; default 400")
    look.set_defaults(run=inspect)
    check = commands.add_parser("verify", help="checks every checksum, id and mask")
    check.add_argument("items", nargs="+", metavar="DIR|SHARD")
    check.set_defaults(run=verify)
    for p in (look, check):
        p.add_argument("--tokenizer", metavar="NAME|FILE", help="default: what the manifest beside the shard says")
        p.add_argument("--pattern", choices=list(PATTERNS))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser.add_subparsers(dest="command", required=True))
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    run_program(main)
