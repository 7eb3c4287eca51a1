"""The workers of prepare.py: the tasks of inputs.py -> packed tokens by set, in one process or in several."""

import collections
import contextlib
import hashlib
import itertools
import os
import struct
import sys

import inputs
from shards import end_with, interrupts_later, outcome
from tokenizer import BadDocument, KeyTwice, UserError, need, open_tokenizer

# SlimPajama's names of its sources -> the names of our shards
SLIMPAJAMA = {
    "RedPajamaCommonCrawl": "commoncrawl",
    "RedPajamaC4": "c4",
    "RedPajamaGithub": "github",
    "RedPajamaBook": "book",
    "RedPajamaArXiv": "arxiv",
    "RedPajamaWikipedia": "wikipedia",
    "RedPajamaStackExchange": "stackexchange",
}

BATCH = 16 << 20  # bytes of text that are encoded at once: a row group of parquet may have gigabytes


class Worker:
    """Tokenises tasks. A set is "NAME/train" or "NAME/val"; NAME is a domain where documents have domains."""

    def __init__(self, job):
        self.job = job
        self.tok = open_tokenizer(job["tokenizer"], job["pattern"], job["encoder"])
        form = "<H" if self.tok.width == 2 else "<I"
        self.bos = struct.pack(form, self.tok.bos)
        self.eos = struct.pack(form, self.tok.eos) if self.tok.eos >= 0 else b""
        self.threshold = int(job["val_fraction"] * 2**64)
        self.seed = b"%d" % job["seed"]
        paths = [job["text_field"], job["domain_field"] or job["text_field"]]
        self.names = {name for path in paths for name in (path, *path.split("."))}
        self.decoder = inputs.decoder_of(self.names)
        self.parquet, self.opened = None, contextlib.ExitStack()  # as of open_parquet

    def run(self, task):
        """-> (sets, bad): {name: (packed tokens, leading tokens, [tokens of each document that starts], text bytes)}
        and [(line, kind, detail)]."""
        kind, path, split, where, payload = task
        if kind == "bad":
            return {}, [(where, *payload)]
        if kind == "text":
            return self.text(path, split, where, payload)
        sets, bad, documents, size = {}, [], [], 0
        for line, get in self.lines(where, payload) if kind == "lines" else self.rows(path, where):
            try:
                documents.append((line, *self.document(split, *get())))
                size += len(documents[-1][2])
            except BadDocument as e:
                bad.append((line,) + e.args)
            if size >= BATCH:
                self.encode(documents, sets, bad)
                documents, size = [], 0
        self.encode(documents, sets, bad)
        bad.sort(key=lambda b: b[0])
        return {name: (b"".join(p[0]), 0, p[1], p[2]) for name, p in sets.items()}, bad

    def encode(self, documents, sets, bad):
        """Adds the tokens of documents [(line, name of the set, UTF-8 bytes)] to `sets`, those without to `bad`."""
        texts = [data for _, _, data in documents]
        for (line, name, data), tokens in zip(documents, self.tok.encode_all(texts) if texts else []):
            if isinstance(tokens, BadDocument):
                bad.append((line,) + tokens.args)
                continue
            pieces = sets.setdefault(name, [[], [], 0])
            pieces[0] += (self.bos, tokens, self.eos)
            pieces[1].append(len(self.bos + self.eos + tokens) // self.tok.width)
            pieces[2] += len(data)

    def document(self, split, text, domain):
        """The set and the UTF-8 bytes of a document."""
        if not isinstance(text, str):
            detail = "%s is %s, wanted a string" % (self.job["text_field"], type(text).__name__)
            raise BadDocument("field is not text", detail)
        if not text:
            raise BadDocument("empty document", "the text is empty")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadDocument("lone surrogate", "half of a surrogate pair, which UTF-8 cannot hold")
        name = self.set_name(domain)
        if not split:
            number = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self.seed).digest(), "big")
            split = "val" if number < self.threshold else "train"
        return name + "/" + split, data

    def set_name(self, domain):
        job = self.job
        if not job["domain_field"]:
            return job["name"]
        if domain is not None and not isinstance(domain, str):
            kind = type(domain).__name__
            raise BadDocument("field is not text", "%s is %s, wanted a string" % (job["domain_field"], kind))
        if not domain:
            raise BadDocument("missing field", "no text in %s" % job["domain_field"])
        if job["command"] == "slimpajama":
            if domain not in SLIMPAJAMA:
                raise BadDocument("unknown domain", "%s, wanted one of %s" % (ascii(domain), ", ".join(SLIMPAJAMA)))
            return SLIMPAJAMA[domain]
        return domain

    def field(self, record, path):
        """record["a.b"] or record["a"]["b"] for "a.b"; an object may be there as a JSON string."""
        if isinstance(record, dict) and path in record:
            first, _, rest = path.partition(".")
            if isinstance(record.get(first), dict) and rest in record[first]:
                raise BadDocument("ambiguous field", "%s is there flat and nested" % path)
            return record[path]
        for key in path.split("."):
            if isinstance(record, str):
                try:
                    record = inputs.load_json(record, self.decoder, self.names)
                except KeyTwice as e:
                    raise BadDocument("broken JSON", "in %s: %s" % (path, e))
                except ValueError:
                    record = None
            if not isinstance(record, dict) or key not in record:
                there = ", ".join(sorted(record)[:8])[:200] if isinstance(record, dict) else ""
                raise BadDocument("missing field", "no %s%s" % (path, there and "; there: " + ascii(there)[1:-1]))
            record = record[key]
        return record

    def fields(self, record):
        domain = self.field(record, self.job["domain_field"]) if self.job["domain_field"] else None
        return self.field(record, self.job["text_field"]), domain

    def lines(self, number, block):
        for line in block.split(b"\n"):
            number += 1
            if line.startswith(inputs.BOM):  # files put one after another bring theirs along
                line = line[3:]
            if line and not line.isspace():
                yield number, lambda: self.parse(line)

    def parse(self, line):
        try:
            record = inputs.load_json(line.decode("utf-8"), self.decoder, self.names)
        except UnicodeDecodeError as e:
            raise BadDocument("invalid UTF-8", inputs.describe_utf8(e))
        except ValueError as e:
            several = "Extra data" in str(e) and b"\r" in line.strip()  # a CR inside of a string ends no line
            ends = "; lines end in CR alone, wanted LF" * several
            raise BadDocument("broken JSON", str(e)[:200] + ends)
        if not isinstance(record, dict):
            raise BadDocument("broken JSON", "%s, wanted an object" % type(record).__name__)
        return self.fields(record)

    def open_parquet(self, path):
        """The file, and how many rows stand before each of its row groups. It stays open for its next groups: what says
        where they are grows with their number, so to read it anew for each takes hours where there are 30,000."""
        if not self.parquet or self.parquet[0] != path:
            self.opened.close()
            f = self.opened.enter_context(inputs.parquet_file(path))
            rows = [f.metadata.row_group(i).num_rows for i in range(f.num_row_groups)]
            self.parquet = path, f, [0, *itertools.accumulate(rows)]
        return self.parquet[1:]

    def rows(self, path, group):
        wanted = [self.job["text_field"]] + ([self.job["domain_field"]] if self.job["domain_field"] else [])
        bad = None
        try:
            f, before = self.open_parquet(path)
            number, names = before[group], f.schema_arrow.names
            # Of an object only what is wanted: pyarrow makes no Python values of some dates beside it.
            columns = sorted({column for w in wanted for column in inputs.column_of(w, f.schema)})
            twice = [name for w in columns for name in (w, w.split(".")[0]) if names.count(name) > 1]
            if twice:
                bad = "ambiguous field", "the column %s occurs twice" % twice[0]
            # Not the whole group at once: that takes more memory, and pyarrow cannot read 2 GiB of a nested column.
            for batch in () if bad else f.iter_batches(4096, row_groups=[group], columns=columns):
                for number, row in enumerate(inputs.rows_of(batch), number + 1):
                    yield number, lambda: self.row(row)
        except Exception as e:
            self.opened.close()
            self.parquet = None
            why = "parquet row group %d: %s" % (group, str(e).split("\n")[0] or "out of memory")
            if inputs.fault_of_machine(e):
                raise UserError("%s: %s" % (path, why))
            bad = inputs.BROKEN_OFF, why
        if bad:

            def fail():
                raise BadDocument(*bad)

            yield 0, fail

    def row(self, row):
        if isinstance(row, UnicodeDecodeError):
            raise BadDocument("invalid UTF-8", inputs.describe_utf8(row))
        return self.fields(row)

    def text(self, path, split, where, data):
        """A text, or a segment of one."""
        first, last = where
        try:
            data.decode("utf-8")
            if self.job["domain_field"]:
                raise BadDocument("missing field", "a text has no field %s" % self.job["domain_field"])
            tokens = self.tok.encode_all([data])[0]
            if isinstance(tokens, BadDocument):
                raise tokens
        except UnicodeDecodeError as e:
            return {}, [(data[: e.start].count(b"\n") + 1, "invalid UTF-8", inputs.describe_utf8(e))]
        except BadDocument as e:
            if not (first and last):
                raise UserError("%s: %s, in the midst of a long text; split it, or leave it out" % (path, e.args[1]))
            return {}, [(1,) + e.args]
        tokens = (self.bos if first else b"") + tokens + (self.eos if last else b"")
        n = len(tokens) // self.tok.width
        return {"%s/%s" % (self.job["name"], split): (tokens, 0 if first else n, [n] if first else [], len(data))}, []


worker = None  # of a worker process


def worker_start(job, parent):
    """Runs once in each worker process."""
    global worker
    end_with(parent)
    worker = Worker(job)


def worker_run(task):
    return worker.run(task)


def start_workers(job, workers):
    """A pool of worker processes; None, after a warning, where the system has none, as a container without /dev/shm."""
    try:
        from concurrent.futures import ProcessPoolExecutor
        import multiprocessing

        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=worker_start,
                                   initargs=(job, os.getpid()))
    except (OSError, ImportError, NotImplementedError) as e:  # no semaphores
        text = "no worker processes here, this one does all: %s (they need a /dev/shm that can be written)"
        print(text % (getattr(e, "strerror", None) or e), file=sys.stderr)
        return None


def results(tasks, job, workers):
    """Tasks' results in the order of the tasks, by `workers` processes (in this one, if 1)."""
    pool = start_workers(job, workers) if workers > 1 else None
    if not pool:
        here = Worker(job)
        for task, at in tasks:
            yield task, here.run(task), at
        return
    from concurrent.futures.process import BrokenProcessPool

    waiting = collections.deque()
    try:
        for task, at in tasks:
            with interrupts_later():  # the pool starts a process when it has work for it
                waiting.append((task[:4], pool.submit(worker_run, task), at))
            while len(waiting) > 4 * workers or waiting and waiting[0][1].done():
                task, future, at = waiting.popleft()
                yield task, outcome(pool, future), at
        while waiting:
            task, future, at = waiting.popleft()
            yield task, outcome(pool, future), at
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?); run the same command again to go on, with fewer --workers"
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
