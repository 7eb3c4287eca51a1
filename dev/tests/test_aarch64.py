#!/usr/bin/env python3
"""The programs for aarch64: compiled with Debian's cross compiler as a user would, run under qemu-user.

python3 dev/tests/test_aarch64.py [--long]     (skipped without aarch64-linux-gnu-gcc or qemu-aarch64; needs this
                                               machine's train_mta and infer_mta)

infer_mta, whose vectors once broke this compiler, is optimised as a user's is; train_mta and test_mta in less of the
compiler's time, with --long as a user's.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

from helpers import BIN, ROOT, main, write_shard

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
QUICK = ("aarch64_quick", "-O1")
# folders with the sources by links: their programs are not this machine's
HOMES = {"infer_mta": ("aarch64", "-O3"), "train_mta": QUICK, "test_mta": QUICK}
if "--long" in sys.argv:
    sys.argv.remove("--long")
    HOMES = dict.fromkeys(HOMES, HOMES["infer_mta"])
MODEL = ["--model", "toy", "--attention", "mta-full", "--hidden-size", "32", "--num-hidden-layers", "2",
         "--num-attention-heads", "2",
         "--num-key-value-heads", "2", "--intermediate-size", "48", "--seq-len", "32", "--batch-size", "2",
         "--lr", "3e-3", "--schedule", "constant", "--warmup", "0", "--steps", "20", "--sample-every", "0"]


@unittest.skipUnless(shutil.which(COMPILER) and shutil.which(EMULATOR), f"no {COMPILER} or no {EMULATOR} here")
class Aarch64(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS")}
        for folder, optimised in sorted(set(HOMES.values())):
            home = os.path.join(ROOT, "build", folder)
            os.makedirs(home, exist_ok=True)
            for name in ("Makefile", "VERSION", "mta", "dev", "train_mta.c", "infer_mta.c", "test_mta.c"):
                link = os.path.join(home, name)
                if not os.path.islink(link):
                    os.symlink(os.path.join("..", "..", name), link)
            programs = [program for program, where in HOMES.items() if where[0] == folder]
            made = subprocess.run(["make", *programs, "CC=" + COMPILER, "OPT=" + optimised, "WERROR=1"], cwd=home,
                                  env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert made.returncode == 0, made.stdout

    def run_program(self, name, *options):
        program = os.path.join(ROOT, "build", HOMES[name][0], name)
        done = subprocess.run([EMULATOR, "-L", "/usr/aarch64-linux-gnu", program, *options], cwd=ROOT, text=True,
                              timeout=600, capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def test_golden_cases(self):
        self.assertRegex(self.run_program("test_mta", "--only", "golden"), r"\n1[2-9] passed, 0 failed")

    def test_decodes_the_same_tokens(self):
        """A model that this machine trains gives the same 20 tokens there and here. (train_mta there first measures a
        product of 512^3: a minute.)"""
        with tempfile.TemporaryDirectory() as folder:
            write_shard(os.path.join(folder, "a_train_000000.bin"), [(7 * i + i // 5) % 24 for i in range(4000)])
            subprocess.run([os.path.join(BIN, "train_mta"), *MODEL, "--train", os.path.join(folder, "a_train_*.bin"),
                            "--out", os.path.join(folder, "run")],
                           check=True, stdout=subprocess.DEVNULL)
            options = [os.path.join(folder, "run", "step-00000020"), "--token-ids", "1 2 3", "--max-tokens", "20",
                       "--temperature", "0", "--ignore-eos", "--quiet"]
            got = self.run_program("infer_mta", *options)
            want = subprocess.run([os.path.join(BIN, "infer_mta"), *options], capture_output=True, text=True,
                                  check=True).stdout
            self.assertEqual(len(want.split()), 20, want)
            self.assertEqual(got, want)
        self.assertIn("--resume", self.run_program("train_mta", "--help"))


if __name__ == "__main__":
    main()
