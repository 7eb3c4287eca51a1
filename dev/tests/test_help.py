#!/usr/bin/env python3
"""--help of every script and program: exit 0, text on standard output, nothing on standard error.

python3 dev/tests/test_help.py     (programs that are not built are skipped)
"""
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from helpers import BIN, ROOT, main, read_bytes

FILES = sorted(glob.glob(os.path.join(ROOT, "scripts", "*")) + glob.glob(os.path.join(ROOT, "data", "*.py")))
SCRIPTS = [path for path in FILES if path.endswith(".sh") or path.endswith(".py") and b"__main__" in read_bytes(path)]


def by(path):
    """What runs a script."""
    return "bash" if path.endswith(".sh") else sys.executable


class Help(unittest.TestCase):
    def check(self, command, cwd="/"):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120, cwd=cwd)
        self.assertEqual((done.returncode, done.stderr), (0, ""), command)
        self.assertGreater(len(done.stdout.splitlines()), 2, command)
        return done.stdout

    def test_scripts(self):
        """Called by their relative names, which are no longer good where a script changes its folder first."""
        self.assertGreater(len(SCRIPTS), 10)
        for path in SCRIPTS:
            with self.subTest(os.path.relpath(path, ROOT)):
                self.check([by(path), "./" + os.path.basename(path)], os.path.dirname(path))

    def test_scripts_by_a_link(self):
        """As somebody puts them into a folder of PATH: what lies beside a script is found, and nothing is made beside
        the link."""
        with tempfile.TemporaryDirectory() as folder:
            os.makedirs(os.path.join(folder, "bin"))
            for path in SCRIPTS:
                link = os.path.join(folder, "bin", os.path.basename(path))
                os.symlink(path, link)
                with self.subTest(os.path.relpath(path, ROOT)):
                    self.check([by(path), link], folder)
            evaluate = ["bash", os.path.join(folder, "bin", "evaluate.sh"), os.path.join(ROOT, "dev", "models", "toy")]
            done = subprocess.run(evaluate + ["--val", "none"], capture_output=True, text=True, cwd=folder,
                                  env=dict(os.environ, TRAINER=os.devnull))
            self.assertIn("run: make -C %s " % ROOT, done.stderr)
            self.assertEqual(os.listdir(folder), ["bin"])
        places = [line for path in FILES if path.endswith(".py") for line in read_bytes(path).decode().splitlines()
                  if "__file__" in line]
        self.assertTrue(places)
        self.assertEqual([line for line in places if "realpath(__file__)" not in line], [])  # the link's own place

    def test_sentences_are_whole_and_defaults_are_values(self):
        for name in ("data/toy_task.py", "dev/bench/kernel_report.py"):
            text = self.check([sys.executable, os.path.join(ROOT, name)])
            self.assertTrue(text.split("\n\n")[1].endswith("."), text)
            self.assertNotIn("None", text)

    def test_what_is_not_here_is_named(self):
        """A build, a package: a line, no traceback."""
        with tempfile.TemporaryDirectory() as folder:
            check = [sys.executable, os.path.join(ROOT, "dev", "ptx_cpu", "check.py")]
            done = subprocess.run(check, capture_output=True, text=True, cwd=folder)
            self.assertEqual((done.returncode, done.stderr),
                             (1, "check.py: build/ptx/bf16_sm_90a.ptx is missing; run: make ptx\n"))
            with open(os.path.join(folder, "torch.py"), "w", encoding="utf-8") as f:
                f.write("raise ImportError(\"No module named 'torch'\")\n")
            effects = [sys.executable, os.path.join(ROOT, "dev", "ref", "errata_effects.py"), "toy"]
            done = subprocess.run(effects, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=folder))
        said = "errata_effects.py: No module named 'torch'; dev/.venv has it (scripts/test.sh makes it)\n"
        self.assertEqual((done.returncode, done.stderr), (1, said))

    def test_part_of_an_option_is_no_option(self):
        """--hel is no --help: of no script, none of its commands and no program."""
        commands = [[by(path), path] for path in SCRIPTS]
        commands += [[sys.executable, p] for p in glob.glob(os.path.join(ROOT, "dev", "*", "*.py"))
                     if b"ArgumentParser(" in read_bytes(p) and "/tests/" not in p]
        commands += [[path] for path in (os.path.join(BIN, n) for n in ("train_mta", "infer_mta", "test_mta"))
                     if os.path.exists(path)]
        for name, parts in (("evals.py", ("lambada", "report")), ("prepare.py", ("text", "slimpajama", "verify")),
                            ("shards.py", ("inspect", "verify"))):
            commands += [[sys.executable, os.path.join(ROOT, "data", name), part] for part in parts]
        for command in commands:
            with self.subTest(os.path.relpath(command[-1], ROOT)):
                done = subprocess.run([*command, "--hel"], capture_output=True, text=True, timeout=120, cwd="/")
                self.assertNotEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_an_option_that_is_given_twice(self):
        """The last one counts, as in the programs, which is said; of texts and lists of files all count."""
        prepare, evals = (os.path.join(ROOT, "data", name) for name in ("prepare.py", "evals.py"))
        with tempfile.TemporaryDirectory() as folder:
            for name in "ab":
                with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                    f.write("The text %s goes on. " % name * 99)
            for script, options, said in ((prepare, "text a --text-field=x --text-field y --out s", 1),
                                          (prepare, "text a --val-fraction 0.5 --val-fraction 0.1 --out t", 0),
                                          (evals, "needle --text a --text b --length 2k --samples 1 --out n", 0)):
                done = subprocess.run([sys.executable, script, *options.split()], cwd=folder, capture_output=True,
                                      text=True)
                twice = ": --text-field is given twice: the last one counts, the one before does not\n"
                self.assertEqual((done.returncode, done.stderr.count("twice"), twice in done.stderr), (0, said, said),
                                 done.stderr)
            self.assertIn(b"The text a goes on. The text b goes on.", read_bytes(os.path.join(folder, "n")))

    def test_a_name_of_a_file_that_is_empty(self):
        """Of no script it is as if the option were not given: an unset variable is a mistake."""
        for script, words in (("data/evals.py", "report x --json="), ("data/evals.py", "lambada x --out="),
                              ("data/evals.py", "report x --pictures="), ("data/prepare.py", "text x --out="),
                              ("data/prepare.py", "text x --out o --tokenizer="), ("data/toy_task.py", "--out="),
                              ("scripts/plot_run.py", "x --out="), ("scripts/plot_kernels.py", "x --out="),
                              ("scripts/attention_map.py", "x --prompt a --infer=")):
            done = subprocess.run([sys.executable, os.path.join(ROOT, script), *words.split()], capture_output=True,
                                  text=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn('%s: got "", wanted ' % words.split()[-1].rstrip("="), done.stderr)

    def test_a_name_that_no_test_has(self):
        """Also beside one that a test has."""
        test = [sys.executable, os.path.join(ROOT, "dev", "tests", "test_layout.py"), "-k", "nothing_is_called_so"]
        for more in ([], ["-k", "test_sections"]):
            done = subprocess.run(test + more, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr.splitlines()[-1]),
                             (1, "no test has such a name: nothing_is_called_so"))

    def test_programs(self):
        for name in ("train_mta", "infer_mta", "test_mta"):
            with self.subTest(name):
                path = os.path.join(BIN, name)
                if not os.path.exists(path):
                    self.skipTest(f"{name} is not built")
                self.check([path])

    def test_a_result_that_cannot_be_written(self):
        """--help, --version and a plan into a full disk: one line, exit 1."""
        for name, options in (("train_mta", ["--help"]), ("infer_mta", ["--help"]), ("infer_mta", ["--version"]),
                              ("train_mta", ["--model", "toy", "--dry-run"]), ("test_mta", ["--help"]),
                              ("test_mta", ["--version"]), ("test_mta", ["--only", "rope"])):
            path = os.path.join(BIN, name)
            if os.path.exists(path) and os.path.exists("/dev/full"):
                with self.subTest(name, options=options), open("/dev/full", "w") as full:
                    done = subprocess.run([path, *options], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
                    self.assertEqual((done.returncode, done.stderr),
                                     (1, name + ": standard output: No space left on device\n"))

    def test_scripts_whose_output_cannot_take_all(self):
        """A full disk or a reader that goes away: one line or none, exit 1. An output of fewer characters gets \\ and a
        number: the work is done by then, and a name is no reason to fail."""
        with tempfile.TemporaryDirectory() as folder:
            run = os.path.join(folder, "gr\u00f6\u00dfe")
            os.makedirs(run)
            toy = shutil.copytree(os.path.join(ROOT, "dev", "models", "toy"), os.path.join(run, "toy"))
            scripts = sorted(path for path in SCRIPTS if path.endswith(".py") and b"run_program" in read_bytes(path))
            self.assertGreater(len(scripts), 9)
            export = os.path.join(ROOT, "scripts", "export.py")
            for command in [[path, "--help"] for path in scripts] + [[export, toy, os.path.join(run, "x")]]:
                command = [sys.executable, *command]
                with self.subTest(os.path.relpath(command[1], ROOT)):
                    if os.path.exists("/dev/full"):
                        with open("/dev/full", "w") as full:
                            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
                        said = os.path.basename(command[1]) + ": standard output: No space left on device\n"
                        self.assertEqual((done.returncode, done.stderr), (1, said))
            reader, writer = os.pipe()
            os.close(reader)
            shutil.rmtree(os.path.join(run, "x"), ignore_errors=True)
            done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
            os.close(writer)
            self.assertEqual((done.returncode, done.stderr), (1, ""))
            shutil.rmtree(os.path.join(run, "x"))
            done = subprocess.run(command, capture_output=True, text=True, timeout=60,
                                  env=dict(os.environ, PYTHONIOENCODING="ascii"))
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn("gr\\xf6\\xdfe/x: mta", done.stdout)

    def test_make_help_tells_the_version_of_onednn(self):
        """The Makefile takes oneDNN 2 and 3, whose functions differ, and no other: a header and a library of each."""
        if not shutil.which("make") or not shutil.which("cc"):
            self.skipTest("no make or no cc")
        for major, minor, told in ((2, 6, "-ldnnl 2.6"), (3, 7, "-ldnnl 3.7"), (4, 0, "none: ")):
            with self.subTest(major), tempfile.TemporaryDirectory() as folder:
                os.makedirs(os.path.join(folder, "oneapi", "dnnl"))
                with open(os.path.join(folder, "oneapi", "dnnl", "dnnl.h"), "w", encoding="utf-8") as f:
                    f.write(f"#define DNNL_VERSION_MAJOR {major}\n#define DNNL_VERSION_MINOR {minor}\n"
                            "int dnnl_version(void);\n")
                subprocess.run(["cc", "-shared", "-x", "c", "-", "-o", os.path.join(folder, "libdnnl.so")],
                               input="int dnnl_version(void) { return 0; }\n", text=True, check=True)
                done = subprocess.run(["make", "-C", ROOT, "help", "CC=cc"], capture_output=True, text=True,
                                      env=dict(os.environ, CPATH=folder, LIBRARY_PATH=folder))
                self.assertRegex(done.stdout, r"(?m)^ *oneDNN +" + re.escape(told), done.stderr)

    def test_make_where_a_cluster_has_set_things(self):
        """Grid Engine's ARCH, EasyBuild's CC=mpicc, no cc, a CBLAS of Spack that ld.so does not know. Only said: -n."""
        if not shutil.which("make") or not shutil.which("gcc"):
            self.skipTest("no make or no gcc")

        def said(*words, **variables):
            environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "CC", "ARCH")}
            done = subprocess.run(["make", "-nB", "-C", ROOT, "NO_ONEDNN=1", *words], capture_output=True, text=True,
                                  env=dict(environment, **variables))
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stdout

        self.assertNotIn("lx-amd64", said("train_mta", "NO_CBLAS=1", ARCH="lx-amd64"))
        self.assertIn(" -msse4 ", said("train_mta", "NO_CBLAS=1", ARCH="-msse4"))
        self.assertNotIn("-march", said("train_mta", "NO_CBLAS=1", "ARCH="))
        done = subprocess.run(["make", "-n", "-C", ROOT, "infer_mta", "CFLAGS=-O2"], capture_output=True, text=True)
        self.assertEqual((done.returncode, "wanted OPT or ARCH" in done.stderr, done.stdout.count("infer_mta.c")),
                         (2, True, 0), done.stdout)
        self.assertNotIn("OMPI_CC='mpicc'", said("train_mta", "NO_CBLAS=1", "CC=mpicc", "MPI=1"))
        with tempfile.TemporaryDirectory() as folder:
            for name in ("gcc", "sh", "uname", "cat", "mkdir"):
                os.symlink(shutil.which(name), os.path.join(folder, name))
            program = shutil.which("make")
            done = subprocess.run([program, "-nB", "-C", ROOT, "NO_ONEDNN=1", "NO_CBLAS=1", "infer_mta"],
                                  capture_output=True, text=True, env={"PATH": folder})
            self.assertRegex(done.stdout, r"(?m)^gcc .*infer_mta\.c", done.stderr)
        if not shutil.which("pkg-config"):
            self.skipTest("no pkg-config")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", os.path.join(folder, "libopenblas.so")],
                           input="void cblas_sgemm(void) {}\n", text=True, check=True)
            for name, text in (("cblas.h", "void cblas_sgemm(void);\n"),
                               ("openblas.pc", "Name: openblas\nDescription: none\nVersion: 1\n"
                                f"Cflags: -I{folder}\nLibs: -L{folder} -lopenblas\n")):
                with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                    f.write(text)
            self.assertIn(f" -rpath -Xlinker {folder} ", said("train_mta", PKG_CONFIG_PATH=folder))

    def test_test_mta_names_its_options(self):
        path = os.path.join(BIN, "test_mta")
        if not os.path.exists(path):
            self.skipTest("test_mta is not built")
        for option in ("--only", "--models", "--golden", "--write", "--compare"):
            self.assertIn(option, self.check([path]))
        for layer in ("rope", "kq_conv"):  # README.md's and HACKING.md's examples
            done = subprocess.run([path, "--only", layer], capture_output=True, text=True, timeout=60)
            lines = done.stdout.splitlines()
            self.assertEqual((done.returncode, {layer in line for line in lines[:-1]}), (0, {True}), done)
        for words in (["--models", "1_0"], ["--models", "0"], ["--write", "/tmp", "5x"], ["--models"]):
            done = subprocess.run([path, *words], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)


if __name__ == "__main__":
    main()
