#!/usr/bin/env python3
"""Makes the text that the part `language` of scripts/evidence.sh learns: five domains of English out of Debian's own
documentation packages.

    python3 scripts/evidence_text.py --out runs/evidence/text

fetches the packages by name with apt-get (nothing is installed), takes out the texts, and makes byte-level shards
DOMAIN_train_*.bin and DOMAIN_val_*.bin, 5% of the documents held out. Equal packages give equal bytes. Writes the
domains into OUT/done, the packages' versions into OUT/packages.txt.
Standard library, apt-get and dpkg-deb only."""
import argparse
import glob
import gzip
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
LIMIT = 10 << 20  # bytes of a domain at most, so that none drowns the others
PIECE = 8192      # bytes of a document of the dictionary, which is one file


class Text(html.parser.HTMLParser):
    """The text of an HTML page, without scripts and styles."""

    def __init__(self):
        super().__init__()
        self.parts, self.hidden = [], 0

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def read(path):
    with (gzip.open if path.endswith((".gz", ".dz")) else open)(path, "rb") as f:
        return f.read().decode("utf-8", "replace")


def plain(folder, pattern):
    for path in sorted(glob.glob(os.path.join(folder, pattern), recursive=True)):
        yield read(path)


def pages(folder, pattern):
    for page in plain(folder, pattern):
        text = Text()
        text.feed(page)
        yield re.sub(r"\n\s*\n+", "\n\n", "".join(text.parts))


def pieces(folder, pattern):
    """One long text, cut at empty lines."""
    for whole in plain(folder, pattern):
        piece = ""
        for paragraph in whole.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= PIECE:
                yield piece
                piece = ""


DOMAINS = {  # name: package, how its files become documents, which files
    "perl": ("perl-doc", plain, "usr/share/perl/**/*.pod"),
    "python": ("python3.11-doc", plain, "usr/share/doc/python3.11/html/_sources/**/*.txt"),
    "kernel": ("linux-doc-6.1", plain, "usr/share/doc/linux-doc-6.1/html/_sources/**/*.txt*"),
    "postgres": ("postgresql-doc-15", pages, "usr/share/doc/postgresql-doc-15/html/*.html"),
    "dictionary": ("dict-gcide", pieces, "usr/share/dictd/gcide.dict.dz"),
}


def fetch(package, folder):
    """Downloads and unpacks a package below folder, where it is whole or not there; returns (folder of its files, its
    version)."""
    target = os.path.join(folder, package)
    if not os.path.isdir(target):
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
        (deb,) = glob.glob(os.path.join(folder, package + "_*.deb"))
        shutil.rmtree(target + ".partial", ignore_errors=True)
        subprocess.run(["dpkg-deb", "-x", deb, target + ".partial"], check=True)
        os.rename(target + ".partial", target)
    (deb,) = glob.glob(os.path.join(folder, package + "_*.deb"))
    return target, os.path.basename(deb).split("_")[1]


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--out", required=True)
    out = os.path.abspath(parser.parse_args().out)
    packages = os.path.join(out, "packages")
    os.makedirs(packages, exist_ok=True)
    versions = []
    for domain, (package, documents, pattern) in DOMAINS.items():
        folder, version = fetch(package, packages)
        texts = {t.strip() + "\n" for t in documents(folder, pattern) if len(t.strip()) >= 200}
        # an order that says nothing of the documents
        texts = sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest())
        lines, size = [], 0
        for text in texts:
            if size + len(text.encode()) <= LIMIT:
                size += len(text.encode())
                lines.append(json.dumps({"text": text}))
        if size < 1 << 20:
            sys.exit(f"evidence_text.py: {package} {version}: {size} bytes of text only; its files have moved, wanted "
                     f"{pattern}")
        source = os.path.join(out, domain + ".jsonl")
        with open(source, "w", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
        subprocess.run([sys.executable, os.path.join(ROOT, "data", "prepare.py"), "text", source, "--tokenizer",
                        "bytes", "--name", domain, "--out", out],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        versions.append(f"{domain}  {package} {version}  {len(lines)} documents  {size} bytes")
        print(versions[-1], flush=True)
    with open(os.path.join(out, "packages.txt"), "w", encoding="utf-8") as f:
        f.write("\n".join(versions) + "\n")
    with open(os.path.join(out, "done"), "w", encoding="utf-8") as f:
        f.write(" ".join(DOMAINS) + "\n")


if __name__ == "__main__":
    main()
