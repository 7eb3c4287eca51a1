#!/usr/bin/env python3
"""What mta/attention_cudnn.h tells cuDNN, on a machine without a GPU: its graphs computed, and plans for them by the
real library.

python3 dev/tests/test_cudnn.py [-k PATTERN]
The plans need cuDNN 9.16 or later and the CUDA toolkit (make help says where they are found); without them they are
skipped.

The library is told that the GPU is an H200. It compiles the kernels of a plan and loads them through the driver: here
through one in which every call succeeds and does nothing, made from the names of the toolkit's own stub of libcuda.
"""
import json
import os
import shutil
import subprocess
import tempfile
import unittest

from helpers import ROOT, main

H200 = {
    "deviceName": "NVIDIA H200", "cudaDeviceId": 0, "deviceVer": 900, "multiProcessorCount": 132, "driverVer": 13000,
    "maxSharedMemoryPerBlockOptin": 232448, "totalGlobalMem": 150000000000, "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536, "smClockRateKHz": 1980000, "memClockRateKHz": 3201000,
    "l2CacheSize": 62914560, "warpSize": 32, "maxSharedMemoryPerBlock": 49152, "reservedSharedMemoryPerBlock": 1024,
    "maxRegistersPerSM": 65536, "pciDeviceId": 0, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048, "isTccDriver": 0, "supportCoopLaunch": 1,
}

# Sequences, heads, tokens; sizes of a head's queries and keys, and of its values (twice that with pairs): the presets
# 300m, 880m, 550m with 1b, at lengths that are trained and one that nothing divides; then the smallest.
SHAPES = [(4, 16, 2048, 64, 64), (4, 16, 2047, 64, 128), (4, 16, 2048, 96, 96), (4, 16, 2048, 96, 192),
          (4, 10, 2048, 128, 128), (1, 16, 4096, 128, 256), (1, 2, 64, 8, 16)]

# What others than Hopper have: backward has no engine for values wider than 128.
OTHERS = {"A100": {"deviceVer": 800, "multiProcessorCount": 108, "maxSharedMemoryPerBlockOptin": 166912},
          "B200": {"deviceVer": 1000, "multiProcessorCount": 148}}
NARROW, WIDE = (4, 16, 2048, 64, 128), (4, 16, 2048, 96, 192)

# Mistakes planted into the header: a name, what stands there, what is put in its place. What has no meaning is refused
# by the library; what has another meaning is noticed by its values.
REFUSED = [
    ("keys not across", "CUDNN_K, bf16, HS, T, true)", "CUDNN_K, bf16, T, HS, false)"),
    ("results of another size", "CUDNN_DQ, bf16, T, HS, false)", "CUDNN_DQ, bf16, T, HS + 8, false)"),
    ("half of the workspace", "return 2 * heads * padded", "return heads * padded"),
]
NOTICED = [
    ("a wrong stride of rows", "across ? 1 : columns,", "across ? 1 : columns + 8,"),
    ("a wrong stride of heads", "{g->s.NH * size, size,", "{size, g->s.NH * size,"),
    ("the diagonal masked", "CUDNN_POINTWISE_CMP_GE", "CUDNN_POINTWISE_CMP_GT"),
]


def from_make():
    """CUDA_HOME, CUDNN_HOME and CUDNN_LIBRARIES of the Makefile, empty where nothing was found."""
    rule = "include Makefile\nvalues:\n\t@echo '$(CUDA_HOME)'; echo '$(CUDNN_HOME)'; echo '$(CUDNN_LIBRARIES)'\n"
    run = subprocess.run(["make", "-s", "--no-print-directory", "-f", "-", "values"], cwd=ROOT, capture_output=True,
                         text=True, check=True, input=rule)
    return run.stdout.split("\n")[:3]


CUDA, CUDNN, LIBRARIES = from_make()
LINK = [*("-L" + x for x in LIBRARIES.split()), "-l:libcudnn.so.9", "-Wl,--unresolved-symbols=ignore-in-shared-libs",
        *("-Wl,-rpath," + x for x in LIBRARIES.split())]


def missing():
    """Why there is nothing to test, or None."""
    if not CUDA:
        return "no CUDA toolkit here"
    if not CUDNN:
        return "no cuDNN here: wanted the toolkit's, or the Python package nvidia-cudnn-cu13 in dev/.venv"
    with open(os.path.join(CUDNN, "include", "cudnn_version.h"), encoding="utf-8") as f:
        numbers = dict(line.split()[1:3] for line in f if line.startswith("#define CUDNN_M"))
    version = int(numbers["CUDNN_MAJOR"]), int(numbers["CUDNN_MINOR"])
    return None if version >= (9, 16) else "cuDNN %d.%d is older than 9.16" % version


def driver(folder):
    """libcuda.so.1 in which every call succeeds and does nothing; but there is no device for whoever looks for one."""
    libraries = [os.path.join(CUDA, lib, "stubs", "libcuda.so") for lib in ("lib64", "lib")]
    names = subprocess.run(["nm", "-D", "--defined-only", next(filter(os.path.exists, libraries))],
                           capture_output=True, text=True, check=True).stdout
    special = {
        "cuInit": "int cuInit(unsigned f) { return 100; }",
        "cuGetExportTable": "int cuGetExportTable(const void** t, const void* id) { *t = 0; return 500; }",
        "cuDriverGetVersion": "int cuDriverGetVersion(int* v) { *v = 13000; return 0; }",
    }
    for name, first in {"cuLibraryLoadData": "void** x, const void* d",
                        "cuLibraryGetKernel": "void** x, void* l, const char* n",
                        "cuKernelGetFunction": "void** x, void* k", "cuModuleLoadData": "void** x, const void* d",
                        "cuModuleGetFunction": "void** x, void* m, const char* n"}.items():
        special[name] = "int %s(%s) { *x = (void*)1; return 0; }" % (name, first)
    functions = [line.split()[2] for line in names.splitlines() if line.split()[1] == "T"]
    symbols = [name for name in functions if name.startswith("cu")]
    with open(os.path.join(folder, "stub.c"), "w", encoding="utf-8") as f:
        f.write("\n".join(special.values()))
        f.write("".join("\nint %s(void) { return 0; }" % s for s in symbols if s not in special) + "\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "stub.c", "-o", "libcuda.so.1"],
                   cwd=folder, check=True)


class Header(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="mta_cudnn_")
        self.addCleanup(self.folder.cleanup)

    def build(self, source, command, planted):
        """The program of dev/tests/SOURCE and a copy of mta/ with a planted mistake, or None."""
        folder = tempfile.mkdtemp(dir=self.folder.name)
        shutil.copytree(os.path.join(ROOT, "mta"), os.path.join(folder, "mta"))
        shutil.copy(os.path.join(ROOT, "dev", "tests", source), folder)
        path = os.path.join(folder, "mta", "attention_cudnn.h")
        with open(path, encoding="utf-8") as f:
            text = f.read()
        if planted:
            self.assertIn(planted[1], text)
            text = text.replace(*planted[1:])
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        link = LINK if source.endswith(".c") else []
        subprocess.run([*command, "-I.", source, "-o", "program", *link, "-lm"], cwd=folder, check=True)
        return os.path.join(folder, "program")


class Values(Header):
    COMMAND = ["c++", "-std=c++17", "-O0", "-w", "-fopenmp", "-I" + os.path.join(ROOT, "dev", "cuda_cpu")]

    def run_program(self, planted=None):
        return subprocess.run([self.build("cudnn_values.cpp", self.COMMAND, planted)], capture_output=True, text=True,
                              timeout=300, check=False)

    def test_graphs_are_attention(self):
        run = self.run_program()
        print(run.stdout, end="")
        self.assertEqual(run.returncode, 0, run.stderr)

    def test_planted_mistakes_are_noticed(self):
        for planted in NOTICED:
            with self.subTest(planted[0]):
                run = self.run_program(planted)
                self.assertEqual(run.returncode, 1, run.stdout + run.stderr)
                self.assertIn("cudnn_values: ", run.stderr)


class Plans(Header):
    def setUp(self):
        reason = missing()
        if reason:
            self.skipTest(reason)
        super().setUp()
        driver(self.folder.name)
        self.device(H200)

    def device(self, properties):
        with open(os.path.join(self.folder.name, "device.json"), "w", encoding="utf-8") as f:
            json.dump(properties, f)

    def plans(self, shapes, planted=None):
        """The lines of cudnn_plans for these shapes, two each."""
        command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-I" + os.path.join(CUDNN, "include"),
                   "-I" + os.path.join(CUDA, "include")]
        program = self.build("cudnn_plans.c", command, planted)
        run = subprocess.run([program, os.path.join(self.folder.name, "device.json")], capture_output=True, text=True,
                             input="".join("%d %d %d %d %d\n" % s for s in shapes), timeout=300, check=False,
                             env=dict(os.environ, LD_LIBRARY_PATH=self.folder.name))
        lines = run.stdout.splitlines()
        self.assertEqual((run.returncode, len(lines)), (0, 1 + 2 * len(shapes)), run.stdout + run.stderr)
        return lines

    def test_every_preset_and_head_size_has_plans(self):
        lines = self.plans(SHAPES)
        print("\n".join(lines))
        for line in lines[1:]:
            words = line.split()
            self.assertEqual(words[6], "workspace", line)
            self.assertLessEqual(int(words[7]), int(words[9]), line)
            if words[0] == "backward":  # dS is there, so dQ is no sum by atomics
                self.assertGreaterEqual(int(words[7]), 2 * int(words[1]) * int(words[2]) * int(words[3]) ** 2, line)

    def test_wide_values_on_other_gpus(self):
        for name, properties in OTHERS.items():
            self.device(dict(H200, deviceName="NVIDIA " + name, **properties))
            narrow, narrow_back, wide, wide_back = self.plans([NARROW, WIDE])[1:]
            for line in (narrow, narrow_back, wide):
                self.assertIn(" workspace ", line, name)
            self.assertRegex(wide_back, r"has no engine for this on this GPU$", name)

    def test_planted_mistakes_are_refused(self):
        for planted in REFUSED:
            with self.subTest(planted[0]):
                self.assertIn("refused", "".join(self.plans([(1, 2, 256, 64, 128)], planted)))


if __name__ == "__main__":
    main()
