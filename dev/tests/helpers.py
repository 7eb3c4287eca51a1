"""What the Python tests share: where things are, safetensors files and shards read and written without any package,
waits on a machine that stands still now and then, scripts run inside of a test's process, the verdict."""
import array
import contextlib
import fnmatch
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.path.abspath(os.environ.get("MTA_BIN", ROOT))  # folder of train_mta and infer_mta
GOLDEN = os.environ.get("MTA_GOLDEN", os.path.join(ROOT, "dev", "golden"))
sys.dont_write_bytecode = True


class Folder(unittest.TestCase):
    """Tests that have a folder of their own each."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix=os.path.basename(sys.argv[0]).split(".")[0] + "_")
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def path(self, *names):
        return os.path.join(self.folder, *names)


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def read_safetensors(path):
    """{name: (dtype, shape, bytes)} and the metadata."""
    data = read_bytes(path)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    piece = lambda offsets: data[start + offsets[0]:start + offsets[1]]
    return {n: (e["dtype"], e["shape"], piece(e["data_offsets"])) for n, e in header.items()}, metadata


def write_safetensors(path, tensors, metadata=None):
    """tensors: {name: (dtype, shape, bytes)}."""
    header, at = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(raw for _, _, raw in tensors.values()))


def to_bf16(data):
    """F32 bytes -> BF16 bytes, truncated."""
    return b"".join(data[i + 2:i + 4] for i in range(0, len(data), 4))


def floats(data):
    """The values of F32 bytes."""
    return array.array("f", data)


def values(tensor):
    """The values of an F32 or BF16 tensor as read_safetensors gives it."""
    dtype, _, data = tensor
    return floats(data if dtype == "F32" else b"".join(b"\0\0" + data[i:i + 2] for i in range(0, len(data), 2)))


def worst(errors):
    """The largest, or NaN where one is: max() passes over it."""
    errors = list(errors)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def zip_all(*lists):
    """zip of lists that must be of one length (what strict=True says, which Python 3.9 does not have)."""
    lists = [list(x) for x in lists]
    assert len(set(map(len, lists))) == 1, "lengths %s" % [len(x) for x in lists]
    return zip(*lists)


def awake(seconds):
    """Sleeps so many seconds in pieces of 20 ms. While this machine stands still at most one of them passes."""
    for _ in range(round(50 * seconds)):
        time.sleep(0.02)


def communicate(child, seconds):
    """child.communicate() within so many seconds, counted like those of awake(); else TimeoutExpired."""
    for left in range(round(10 * seconds), 0, -1):
        try:
            return child.communicate(timeout=0.1)
        except subprocess.TimeoutExpired:
            if left == 1:
                raise


def write_shard(path, tokens, vocab=32, width=2, magic=None, version=None, count=None, mask=None):
    """A token shard; mask: one 0 or 1 a token, written beside it."""
    magic = magic if magic is not None else 20240520 if width == 2 else 20240801
    version = version if version is not None else 1 if width == 2 else 7
    data = array.array("H" if width == 2 else "I", tokens).tobytes()
    count = len(tokens) if count is None else count
    header = struct.pack("<4iIi", magic, version, count, vocab, zlib.crc32(data), int(mask is not None))
    with open(path, "wb") as f:
        f.write(header.ljust(1024, b"\0") + data)
    if mask is not None:
        with open(path[:-4] + ".mask", "wb") as f:
            f.write(bytes(mask))


def golden_checkpoint(path, folder):
    """A golden case as a checkpoint in folder: its config, and its tokens, a list for each sequence."""
    tensors, metadata = read_safetensors(path)
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        f.write(metadata["config"])
    weights = {n: t for n, t in tensors.items() if not n.startswith(("golden.", "grad."))}
    write_safetensors(os.path.join(folder, "model.safetensors"), weights)
    _, (B, T), raw = tensors["golden.tokens"]
    ids = array.array("i", raw).tolist()
    return json.loads(metadata["config"]), [ids[b * T:(b + 1) * T] for b in range(B)]


def png_size(path):
    """Width and height of a PNG."""
    with open(path, "rb") as f:
        head = f.read(24)
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def without_torch(error):
    """After a failed import of PyTorch or its kin: runs the calling file again by dev/.venv's Python, or gives the
    reason to skip."""
    python = os.path.join(ROOT, "dev", ".venv", "bin", "python")
    if os.path.exists(python) and os.path.abspath(sys.executable) != python:
        os.execv(python, [python, *sys.argv])
    return "%s; pip install -r dev/requirements.txt into dev/.venv" % error


def call(script, *arguments):
    """What a script that is imported here does with these arguments, as subprocess.run would give it: inside this
    process, which has loaded PyTorch once (2 s of a core)."""
    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = [script.__file__, *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = script.main()
    except SystemExit as end:  # with the line that Python would print
        status = end.code
        if isinstance(status, str):
            err.write(status + "\n")
            status = 1
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, status or 0, out.getvalue(), err.getvalue())


def names_of(tests):
    return sum(map(names_of, tests), []) if isinstance(tests, unittest.TestSuite) else [tests.id()]


def main():
    """Runs the tests of the calling file, or those that -k names; says what was skipped and why; ends with the
    counts. A name that no test has is a mistake."""
    program = unittest.main(module="__main__", exit=False, verbosity=1)
    result, names = program.result, names_of(unittest.TestLoader().loadTestsFromModule(sys.modules["__main__"]))
    bad = len(result.failures) + len(result.errors)
    for pattern in program.testNamePatterns or ():
        if not fnmatch.filter(names, pattern):
            sys.exit("no test has such a name: " + pattern.strip("*"))
    # Of what did not pass the tests that were begun: a failure may be one of several parts of a test, or of a class.
    begun = {getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors + result.skipped
             if isinstance(test, unittest.TestCase)}
    for test, reason in result.skipped:
        print(f"skipped: {test}: {reason}")
    left_out = f", {len(result.skipped)} skipped" if result.skipped else ""
    print(f"{result.testsRun - len(begun)} passed, {bad} failed{left_out}")
    sys.exit(bad != 0)
