#!/usr/bin/env python3
"""Runs test files that compare with PyTorch and its kin, one after another, each in a copy of this process, which has
loaded the packages once: they take 2 to 6 s of a core in each process that loads them.

dev/.venv/bin/python dev/tests/with_torch.py dev/tests/test_*.py ...    (scripts/test.sh names them)
"""
import contextlib
import importlib
import os
import re
import runpy
import shutil
import sys
import tempfile

HOME = tempfile.mkdtemp(prefix="with_torch_")
os.environ.update(HF_HOME=HOME, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
sys.dont_write_bytecode = True


def run_in_a_copy(path):
    """What the test file prints, and its exit status."""
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            sys.argv = [path]
            runpy.run_path(path, run_name="__main__")
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        return out.read(), status


def main():
    packages = ("torch", "transformers.models.llama.modeling_llama", "lm_eval.models.huggingface")
    for name in packages if len(sys.argv) > 2 else ():  # one file alone loads what it needs
        with contextlib.suppress(ImportError):  # the tests say what is missing
            importlib.import_module(name)
    counts, last = [0, 0, 0], []
    for path in sys.argv[1:]:
        text, status = run_in_a_copy(path)
        said = re.findall(r"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?", text, re.M)
        passed, failed, skipped = (int(n or 0) for n in said[-1]) if said else (0, 0, 0)
        failed = failed or int(status != 0 or not said)
        text = "%s: exit status %d\n%s" % (path, status, text)
        if failed:
            last.append(text)  # where the eye falls first
        else:
            print(text, flush=True)
        counts = [a + b for a, b in zip(counts, (passed, failed, skipped))]
    shutil.rmtree(HOME)
    print(*last, "%d passed, %d failed, %d skipped" % tuple(counts), sep="\n")
    return counts[1] != 0


if __name__ == "__main__":
    sys.exit(main())
