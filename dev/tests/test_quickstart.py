#!/usr/bin/env python3
"""Tests of scripts/quickstart.sh at its --tiny size, and of what it says when something is missing; what
scripts/test.sh installs.

python3 dev/tests/test_quickstart.py     (needs train_mta and infer_mta: MTA_BIN, default the repository)

Each runs in a copy of the repository with the programs already built, so that nothing is installed or compiled. What is
missing is acted by stand-ins in PATH: an apt-get that fails, an id that is not root, a compiler without cblas.h, a
Python without matplotlib.
"""
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

from helpers import BIN, ROOT, main

PROGRAMS = ("train_mta", "infer_mta")


def write_program(path, text):
    with open(path, "w") as f:
        f.write("#!/bin/sh\n" + text)
    os.chmod(path, 0o755)


def read_text(path):
    """The whole file, "" if it is not there yet."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except FileNotFoundError:
        return ""


def kill_group(leader):
    """Ends whatever a test left running."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Quickstart(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        for name in PROGRAMS:
            if not os.path.exists(os.path.join(BIN, name)):
                raise unittest.SkipTest(f"{name} is not built")
        cls.folder = tempfile.mkdtemp(prefix="test_quickstart_")
        cls.home = os.path.join(cls.folder, "mta")
        os.makedirs(cls.home)
        for name in ("mta", "scripts"):
            shutil.copytree(os.path.join(ROOT, name), os.path.join(cls.home, name))
        shutil.copytree(os.path.join(ROOT, "data"), os.path.join(cls.home, "data"),
                        ignore=shutil.ignore_patterns(".venv", "__pycache__"))
        for folder in ("build", "dev"):
            os.mkdir(os.path.join(cls.home, folder))
        for name in ("Makefile", "VERSION", "dev/dev.mk", "train_mta.c", "infer_mta.c"):
            shutil.copy2(os.path.join(ROOT, name), os.path.join(cls.home, name))
        # each newer than what it is made of: make leaves it
        for name in ("build/flags_c", *(f"build/{name}.o" for name in PROGRAMS), *PROGRAMS):
            shutil.copyfile(os.path.join(BIN, name), os.path.join(cls.home, name))
            shutil.copymode(os.path.join(BIN, name), os.path.join(cls.home, name))
        # matplotlib is hidden from every Python, and a farm of links stands for PATH where a tool must be missing
        os.makedirs(os.path.join(cls.folder, "hide", "matplotlib"))
        with open(os.path.join(cls.folder, "hide", "matplotlib", "__init__.py"), "w") as f:
            f.write("raise ImportError('hidden')\n")

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)

    def environment(self, **changes):
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CC")}
        environment.update(PYTHONPATH=os.path.join(self.folder, "hide"), TERM="xterm", **changes)
        return environment

    def stand_ins(self, **programs):
        """A PATH whose first folder holds these scripts."""
        folder = tempfile.mkdtemp(dir=self.folder)
        for name, text in programs.items():
            write_program(os.path.join(folder, name.replace("_", "-")), text)
        return folder + os.pathsep + os.environ["PATH"]

    def path_without(self, *names):
        farm = tempfile.mkdtemp(dir=self.folder)
        for folder in os.environ["PATH"].split(os.pathsep):
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                if name not in names and not os.path.lexists(os.path.join(farm, name)):
                    os.symlink(os.path.join(folder, name), os.path.join(farm, name))
        return farm

    def run_script(self, *words, **changes):
        return subprocess.run(["scripts/quickstart.sh", *words], cwd=self.home, env=self.environment(**changes),
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", timeout=600)

    def run_on_terminal(self, *words, **changes):
        """(status, what a terminal got)"""
        master, slave = pty.openpty()
        child = subprocess.Popen(["scripts/quickstart.sh", *words], cwd=self.home, env=self.environment(**changes),
                                 stdin=slave, stdout=slave, stderr=slave, close_fds=True)
        os.close(slave)
        got = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            got += piece
        os.close(master)
        return child.wait(), got.decode(errors="replace")

    def assert_table(self, text):
        self.assertRegex(text, r"transformer +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +78\.2 +28\.9")
        self.assertRegex(text, r"mta +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +0\.0 +0\.0")
        self.assertRegex(text, r"validation: \d\.\d+ bits per byte")
        self.assertIn("finished after", text)

    def test_plain_output_and_terminals(self):
        """A non-terminal gets plain lines; a second call continues; a terminal gets colours unless NO_COLOR is set."""
        done = self.run_script("--no-install", "--tiny", "--out", "runs/a")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assert_table(done.stdout)
        self.assertNotRegex(done.stdout, "[\x1b\r]")
        self.assertIn("no matplotlib, so no pictures", done.stdout)
        self.assertRegex(read_text(os.path.join(self.home, "runs/a/n4_first/mta_3.txt")), r"step 4 .* error \d+\.00%",
                         "of 100 sequences: whole percents")
        self.assertNotIn("Traceback", done.stdout + done.stderr)
        done = self.run_script("--no-install", "--out", "runs/a")  # the data of 4 steps would be that of 600
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stdout + done.stderr)
        self.assertIn("runs/a holds what a run with --tiny has begun", done.stderr)
        status, text = self.run_on_terminal("--no-install", "--tiny", "--out", "runs/a", NO_COLOR="1")
        self.assertEqual(status, 0, text)
        self.assert_table(text)
        self.assertFalse([c for c in re.findall(r"\x1b\[[\d;]*[a-zA-Z]", text) if not c.endswith("K")])
        status, text = self.run_on_terminal("--no-install", "--tiny", "--out", "runs/a", PATH=self.path_without("make"))
        self.assertEqual(status, 1, "it ends below its first headline")
        self.assertIn("\x1b[1mTools\x1b[0m", text)

    def test_nothing_can_be_installed(self):
        """A quota of one core, not root, apt-get and pip without a network, no CBLAS: a line for each, and the rest
        works."""
        gcc, python = shutil.which("gcc"), shutil.which("python3")
        compiler = 'case "$*" in *-E*) input=$(cat); case "$input" in *cblas*) exit 1;; esac; '
        compiler += f'echo "$input" | exec {gcc} "$@";; esac\nexec {gcc} "$@"\n'
        cores = f'case "$*" in *shards.cores*) echo 1;; *) exec {python} "$@";; esac\n'
        path = self.stand_ins(gcc=compiler, cc=compiler, python3=cores,
                              apt_get='echo "E: Unable to fetch some archives" >&2; exit 100\n', id="echo 1000\n",
                              sudo='[ "$1" = -n ] && shift; exec "$@"\n')
        done = self.run_script("--tiny", "--out", "runs/b", PATH=path, PIP_INDEX_URL="http://127.0.0.1:9/",
                               PIP_NO_CACHE_DIR="1")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assert_table(done.stdout)
        for piece in ("installing with apt-get through sudo: libopenblas-dev",
                      "apt-get failed (no network?): E: Unable to fetch", "no CBLAS", "so no pictures", "one core"):
            self.assertIn(piece, done.stdout)
        self.assertNotIn("Traceback", done.stdout + done.stderr)

    def test_no_sudo(self):
        path = self.path_without("sudo", "gcc", "cc", "clang")
        os.remove(os.path.join(path, "id"))
        write_program(os.path.join(path, "id"), "echo 1000\n")
        done = self.run_script("--tiny", "--out", "runs/c", PATH=path)
        self.assertEqual(done.returncode, 1)
        self.assertIn("not root and no sudo: ask for these packages: gcc libc6-dev", done.stdout)
        self.assertEqual(done.stderr, "quickstart.sh: no C compiler: install gcc and libc6-dev, then run this again\n")

    def test_sudo_with_a_password(self):
        path = self.stand_ins(id="echo 1000\n", sudo="exit 1\n", make="exit 1\n")
        compiler = os.path.join(self.folder, "none_at_all")
        done = self.run_script("--tiny", "--out", "runs/c", PATH=path, CC=compiler)
        self.assertEqual(done.returncode, 1)
        self.assertIn("sudo wants a password and there is no terminal", done.stdout)

    def test_compiler_of_several_words(self):
        """As make takes it: ccache gcc, gcc -m64."""
        done = self.run_script("--tiny", "--no-install", "--out", "runs/c", PATH=self.stand_ins(make="exit 1\n"),
                               CC="gcc -m64")
        self.assertEqual(done.returncode, 1)
        self.assertNotIn("no C compiler", done.stderr)
        self.assertIn("building", done.stdout)

    def test_unknown_package(self):
        """A package that this system does not know keeps the others from being installed together: each is tried
        alone."""
        path = self.path_without("make", "apt-get", "id", "gcc", "cc")
        write_program(os.path.join(path, "id"), "echo 0\n")
        write_program(os.path.join(path, "apt-get"),
                      'case "$*" in *update*) exit 0;; *libopenblas-dev*) echo "E: Unable to locate package '
                      'libopenblas-dev"; '
                      'exit 100;; *install*make) ln -s "$(PATH=$OLD command -v make)" "$(dirname "$0")/make";; esac\n')
        for name in ("gcc", "cc"):  # compiles nothing: what is there is up to date
            write_program(os.path.join(path, name),
                          'case "$*" in *-E*) input=$(cat); case "$input" in *cblas*) exit 1;; esac;; '
                          f'-dumpmachine) exec {shutil.which("gcc")} "$@";; esac\nexit 0\n')
        with open(os.path.join(self.folder, "little.txt"), "w") as f:
            f.write("x")
        done = self.run_script("--tiny", "--out", "runs/h", "--text", os.path.join(self.folder, "little.txt"),
                               PATH=path, OLD=os.environ["PATH"],
                               PIP_INDEX_URL="http://127.0.0.1:9/", PIP_NO_CACHE_DIR="1")
        self.assertIn("installing with apt-get: make libopenblas-dev", done.stdout)
        self.assertIn("note: apt-get cannot install libopenblas-dev\n", done.stdout)
        self.assertIn("building train_mta", done.stdout, "make was installed")
        self.assertEqual(done.returncode, 1, "the text is too short")
        self.assertIn("tokens", done.stderr)
        self.assertNotIn("Traceback", done.stdout + done.stderr)

    def test_missing_tools(self):
        for tool in ("make", "python3"):
            done = self.run_script("--no-install", "--tiny", "--out", "runs/c", PATH=self.path_without(tool))
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertEqual(done.stderr, f"quickstart.sh: no {tool}: install it, then run this again\n")

    def test_a_python_that_is_too_old(self):
        """RHEL 8's python3 is 3.6."""
        python = shutil.which("python3")
        old = f'case "$*" in *version_info*) exit 1;; -V) echo Python 3.6.8;; *) exec {python} "$@";; esac\n'
        done = self.run_script("--no-install", "--tiny", "--out", "runs/c", PATH=self.stand_ins(python3=old))
        self.assertEqual((done.returncode, done.stderr),
                         (1, "quickstart.sh: python3 is Python 3.6.8, wanted 3.9 or later: a folder with such a "
                             "python3 first on PATH will do\n"))

    def test_own_text(self):
        text = os.path.join(self.folder, "my text.txt")
        with open(text, "w") as f:
            f.write("Call me Ishmael. Some years ago, never mind how long precisely. " * 400)
        done = self.run_script("--no-install", "--tiny", "--out", "runs/d", "--text=" + text)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("my text.txt", done.stdout)
        with open(text, "a") as f:
            f.write("It is a way I have of driving off the spleen.")
        done = self.run_script("--no-install", "--tiny", "--out", "runs/d", "--text", text)
        self.assertEqual(done.returncode, 1, "another text in the same folder")
        self.assertIn("--out", done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)

    def test_options(self):
        for words, piece in ((("--sideways",), "unknown option --sideways"), (("--text",), "value of the last option"),
                             (("--text", "/no/such"), "no such file"), (("--text", ""), "--text: : no such file"),
                             (("--text=",), "--text: : no such file"), (("--out", "/proc/x"), "cannot write there")):
            done = self.run_script(*words)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn(piece, done.stderr)
        self.assertIn("--no-install", self.run_script("--help").stdout)
        # Names are those of the folder from which the script is called.
        with open(os.path.join(self.folder, "near.txt"), "w") as f:
            f.write("x")
        for words, piece in ((("--text", "near.txt", "--out", "near.txt/x"),
                              self.folder + "/near.txt/x: cannot write there"),
                             (("--text=none.txt",), "--text: " + self.folder + "/none.txt: no such file")):
            done = subprocess.run([os.path.join(self.home, "scripts/quickstart.sh"), *words], cwd=self.folder,
                                  env=self.environment(), capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn(piece, done.stderr)

    def test_interrupted(self):
        """SIGTERM in the middle: both trainings save and end, status 75."""
        child = subprocess.Popen(["scripts/quickstart.sh", "--no-install", "--out", "runs/f"], cwd=self.home,
                                 env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.addCleanup(kill_group, child.pid)
        logs = [os.path.join(self.home, "runs/f/n4_first", kind + "_1", "log.jsonl") for kind in ("transformer", "mta")]
        start = time.time()
        while time.time() - start < 300 and not all('"event": "step"' in read_text(log) for log in logs):
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        _, stderr = child.communicate(timeout=300)
        self.assertEqual(child.returncode, 75, stderr)
        self.assertIn("the same command continues", stderr)
        for log in logs:
            self.assertEqual(json.loads(read_text(log).splitlines()[-1])["reason"], "signal")


class Installing(unittest.TestCase):
    """What scripts/test.sh asks apt-get for on a bare system: that part of it, where nothing is there."""

    def asked(self, unknown):
        """Its output, and the packages of each call of an apt-get that knows all packages but one."""
        with open(os.path.join(ROOT, "scripts", "test.sh"), encoding="utf-8") as f:
            text = f.read()
        part = text[text.index("as_root()"):text.index("# make_venv FOLDER")]
        part += 'has() { false; }\ncompiles() { false; }\npython3() { false; }\n'
        part += f'as_root() {{ echo "$*" >> asked; [[ " $* " != *" {unknown} "* ]]; }}\ninstall_packages\n'
        with tempfile.TemporaryDirectory() as folder:
            os.makedirs(os.path.join(folder, "build", "log"))
            done = subprocess.run(["bash", "-c", part], cwd=folder, capture_output=True, text=True)
            lines = read_text(os.path.join(folder, "asked")).splitlines()
        self.assertEqual(done.stderr, "")
        return done.stdout, [line.split("--no-install-recommends ")[1].split() for line in lines if "install" in line]

    def test_a_bare_system(self):
        """All at once; the runtimes of a clang that is not there yet have no version, and are asked for later."""
        out, calls = self.asked("nothing")
        self.assertEqual((len(calls), out), (1, "installing " + " ".join(calls[0]) + "\n"))
        self.assertIn("clang", calls[0])
        self.assertFalse([name for name in calls[0] if name.startswith("libclang-rt")])

    def test_a_package_that_is_unknown(self):
        """It keeps no other out."""
        out, calls = self.asked("libdnnl-dev")
        self.assertEqual(calls[1:], [[name] for name in calls[0]])
        self.assertIn("could not install libdnnl-dev: see", out)


if __name__ == "__main__":
    main()
