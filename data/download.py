"""Downloads of many large files over HTTP that survive what happens in a week of downloading: prepare.py --download.

A file comes as PATH.part and is renamed when it is whole: as long as the list says, with the sha256 the list says. An
interrupted one goes on from its last byte (Range, and If-Range where the server names versions by ETag). After 429,
5xx, a cut connection or a silent one, the pause before the next try doubles up to a minute, and is no shorter than the
server's Retry-After; a try that brought bytes starts the count anew.
"""

import hashlib
import http.client
import json
import os
import queue
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

REPOSITORY = "https://huggingface.co/datasets/cerebras/SlimPajama-627B/resolve/main/"
LISTING = "https://huggingface.co/api/datasets/cerebras/SlimPajama-627B/tree/main/%s?recursive=true"
TIMEOUT = 60  # seconds without a byte
LONGEST_PAUSE = 60  # seconds between tries
CHUNK = 1 << 18


class Permanent(Exception):
    """Trying again would not help."""


class Temporary(Exception):
    """(what happened, seconds that the server asked to wait)."""


class SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but takes the token along only to the same host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.headers.pop("Authorization", None)
        return new


OPENER = urllib.request.build_opener(SameHost)


def open_url(url, headers):
    """The answer, or Temporary or Permanent."""
    headers = dict(headers, **{"User-Agent": "mta.c/prepare.py", "Accept-Encoding": "identity"})
    token = os.environ.get("HF_TOKEN")
    if token and urllib.parse.urlsplit(url).netloc == "huggingface.co":
        headers["Authorization"] = "Bearer " + token
    try:
        return OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416:
            raise
        wait = e.headers.get("Retry-After", "")
        if e.code in (408, 425, 429) or e.code >= 500:
            raise Temporary("HTTP %d" % e.code, float(wait) if re.fullmatch(r"\d{1,6}", wait) else 0.0)
        hint = " (set HF_TOKEN to a token that may read the data set?)" if e.code in (401, 403) else ""
        raise Permanent("HTTP %d %s%s" % (e.code, e.reason, hint))
    except (OSError, http.client.HTTPException) as e:
        raise Temporary(str(getattr(e, "reason", e)) or type(e).__name__, 0.0)


class Download:
    """One file: its url, where it goes, and what is known of it (bytes and sha256, None where not)."""

    def __init__(self, url, path, size=None, sha256=None):
        self.url, self.path, self.size, self.sha256 = url, path, size, sha256
        self.got = 0

    def complete(self):
        """There already. Only whole and checked files ever get this name, so the size is enough."""
        return os.path.exists(self.path) and self.size in (None, os.path.getsize(self.path))

    def fetch(self, on_bytes):
        """One try. Returns when the file is whole and checked; on_bytes(n) counts what arrives."""
        part = self.path + ".part"
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        have = os.path.getsize(part) if os.path.exists(part) else 0
        if self.size is not None and have > self.size:
            have = 0
        if have == 0 or have != self.size:
            self.transfer(part, have, on_bytes)
        size = os.path.getsize(part)
        if self.size is not None and size != self.size:
            if size > self.size:
                os.remove(part)
            raise Temporary("%d bytes, wanted %d" % (size, self.size), 0.0)
        if self.sha256 is not None and sha256_of(part) != self.sha256:
            os.remove(part)
            raise Temporary("sha256 differs from the list's; starting anew", 0.0)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, self.path)
        if os.path.exists(part + ".etag"):
            os.remove(part + ".etag")

    def transfer(self, part, have, on_bytes):
        etag = ""
        if have and os.path.exists(part + ".etag"):
            with open(part + ".etag", encoding="utf-8") as f:
                etag = f.read()
        headers = {"Range": "bytes=%d-" % have} if have else {}
        if have and etag:
            headers["If-Range"] = etag
        try:
            answer = open_url(self.url, headers)
        except urllib.error.HTTPError as e:  # 416: nothing from there on; whole if its length is what we have
            total = re.fullmatch(r"bytes \*/(\d+)", e.headers.get("Content-Range", ""))
            if total and int(total[1]) == have and self.size in (None, have):
                return
            os.remove(part)
            raise Temporary("HTTP 416 at %d bytes; starting anew" % have, 0.0)
        with answer:
            total = self.begin_at(answer, have)
            if total is None:  # the whole file comes, whatever was asked
                have, total = 0, answer.headers.get("Content-Length")
                total = int(total) if total and total.isdigit() else None
            if self.size is not None and total is not None and total != self.size:
                raise Temporary("the server has %d bytes, the list says %d" % (total, self.size), 0.0)
            if not have:
                self.remember_etag(part, answer.headers.get("ETag", ""))
            with open(part, "r+b" if have else "wb") as f:
                f.seek(have)
                f.truncate()
                self.copy(answer, f, on_bytes)
                size = f.tell()
            if total is not None and size < total:
                raise Temporary("the connection was cut at %d of %d bytes" % (size, total), 0.0)

    @staticmethod
    def begin_at(answer, have):
        """Total length where the answer begins at byte `have`, None where it is the whole file."""
        if answer.status != 206:
            return None
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not match or int(match[1]) != have:
            raise Temporary("the server answered another range than the one from %d" % have, 0.0)
        return int(match[2])

    @staticmethod
    def remember_etag(part, etag):
        if etag and not etag.startswith("W/"):
            with open(part + ".etag", "w", encoding="utf-8") as f:
                f.write(etag)
        elif os.path.exists(part + ".etag"):
            os.remove(part + ".etag")

    def copy(self, answer, f, on_bytes):
        while True:
            try:
                chunk = answer.read(CHUNK)
            except http.client.IncompleteRead as e:
                f.write(e.partial)
                self.got += len(e.partial)
                on_bytes(len(e.partial))
                raise Temporary("the connection was cut", 0.0)
            except (OSError, http.client.HTTPException) as e:
                raise Temporary(str(e) or type(e).__name__, 0.0)
            if not chunk:
                return
            f.write(chunk)
            self.got += len(chunk)
            on_bytes(len(chunk))

    def run(self, retries, pause, on_bytes, stop):
        """Tries until it is there. None, or why it is not."""
        tries = 0
        while not stop.is_set():
            before = self.got
            try:
                self.fetch(on_bytes)
                return None
            except Permanent as e:
                return str(e)
            except Temporary as e:
                tries = 1 if self.got > before else tries + 1
                if tries > retries:
                    return "%s, after %d tries without progress" % (e.args[0], tries)
                wait = max(e.args[1], min(LONGEST_PAUSE, pause * 2 ** (tries - 1)) * random.uniform(0.75, 1.25))
                print("%s: %s; trying again in %.1f s" % (self.url, e.args[0], wait), file=sys.stderr)
                stop.wait(wait)
            except OSError as e:
                return "%s: %s" % (e.filename or self.path, e.strerror)
        return "interrupted"


def sha256_of(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(1 << 20), b""):
            h.update(chunk)
    return h.hexdigest()


def download_all(downloads, connections, retries, pause):
    """All of them, `connections` at once. Returns [(download, why)] of those that failed."""
    waiting, failed, lock, stop = queue.SimpleQueue(), [], threading.Lock(), threading.Event()
    counts = {"files": 0, "bytes": 0}
    todo = [d for d in downloads if not d.complete()]
    for d in todo:
        waiting.put(d)

    def on_bytes(n):
        with lock:
            counts["bytes"] += n

    def work():
        while not stop.is_set():
            try:
                d = waiting.get_nowait()
            except queue.Empty:
                return
            why = d.run(retries, pause, on_bytes, stop)
            with lock:
                counts["files"] += 1
                if why:
                    failed.append((d, why))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(connections, len(todo))))]
    for t in threads:
        t.start()
    try:
        start, last = time.time(), time.time()
        while any(t.is_alive() for t in threads):
            time.sleep(0.1)
            if time.time() - last >= (1 if sys.stderr.isatty() else 30):
                last = time.time()
                print(
                    "%d of %d files, %.1f MB, %.2f MB/s"
                    % (counts["files"], len(todo), counts["bytes"] / 1e6, counts["bytes"] / 1e6 / (last - start)),
                    file=sys.stderr,
                    end="\r" if sys.stderr.isatty() else "\n",
                )
    finally:
        stop.set()  # also on Ctrl-C: what has arrived stays in the .part files
    print(
        "%d files are there, %d of them new (%.1f MB), %d failed"
        % (len(downloads) - len(failed), len(todo) - len(failed), counts["bytes"] / 1e6, len(failed)),
        file=sys.stderr,
    )
    return failed


def read_file_list(path, error):
    """Lines "PATH [BYTES [SHA256]]" -> [(path, bytes or None, sha256 or None)]."""
    entries = []
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise error("%s: %s" % (path, getattr(e, "strerror", None) or e))
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name = words[0]
        if (
            name.startswith("/")
            or ".." in name.split("/")
            or len(words) > 3
            or (len(words) > 1 and not words[1].isdigit())
            or (len(words) > 2 and not re.fullmatch(r"[0-9a-fA-F]{64}", words[2]))
        ):
            raise error("%s:%d: wanted PATH [BYTES [SHA256]], the path relative and without .." % (path, number))
        entries.append((name, int(words[1]) if len(words) > 1 else None, words[2].lower() if len(words) > 2 else None))
    if not entries:
        raise error("%s: no file in this list" % path)
    return entries


def repository_list(listing, retries, pause, error):
    """The files of the data set's own repository: [(path, bytes, sha256)], page after page."""
    entries = []
    for folder in ("train", "validation", "test"):
        url, tries = listing % folder, 0
        while url:
            try:
                with open_url(url, {}) as answer:
                    page, links = json.load(answer), answer.headers.get("Link", "")
            except (Temporary, OSError, ValueError) as e:
                tries += 1
                if tries > retries:
                    raise error("%s: %s" % (url, e.args[0] if e.args else e))
                time.sleep(min(LONGEST_PAUSE, pause * 2 ** (tries - 1)))
                continue
            except Permanent as e:
                raise error("%s: %s; --mirror URL with --file-list FILE names another place" % (url, e))
            tries = 0
            for entry in page:
                if entry.get("type") == "file" and entry["path"].endswith(".jsonl.zst"):
                    entries.append((entry["path"], entry.get("size"), (entry.get("lfs") or {}).get("oid")))
            following = re.search(r'<([^>]*)>;\s*rel="next"', links)
            url = following[1] if following else None
    return sorted(entries)


def slimpajama(args, error):
    """What prepare.py slimpajama --download does. Returns the folder, in which every file of the list is then whole."""
    if args.mirror and not args.file_list:
        raise error("--mirror needs --file-list FILE, lines PATH [BYTES [SHA256]]")
    base = (args.mirror or REPOSITORY).rstrip("/") + "/"
    if not re.match(r"https?://", base):
        raise error("--mirror %s: wanted an http:// or https:// address" % args.mirror)
    entries = (
        read_file_list(args.file_list, error)
        if args.file_list
        else repository_list(LISTING, args.retries, args.retry_pause, error)
    )
    chosen, total = [], 0
    for entry in entries[: args.max_files]:
        total += entry[1] or 0
        if args.max_bytes is not None and total > args.max_bytes:
            break
        chosen.append(entry)
    if not chosen:
        raise error("--max-files and --max-bytes leave no file to download")
    downloads = [
        Download(base + urllib.parse.quote(name), os.path.join(args.download, name), size, sha256)
        for name, size, sha256 in chosen
    ]
    failed = download_all(downloads, args.connections, args.retries, args.retry_pause)
    for d, why in failed:
        print("%s: %s" % (d.url, why), file=sys.stderr)
    if failed:
        raise error(
            "%d of %d files could not be downloaded; the same command goes on with them" % (len(failed), len(downloads))
        )
    return args.download
