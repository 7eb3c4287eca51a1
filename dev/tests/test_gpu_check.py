#!/usr/bin/env python3
"""scripts/gpu_check.sh where there is no GPU: make, nvcc, nvidia-smi and all programs are stand-ins that succeed, fail
or hang; what the script makes of it.

python3 dev/tests/test_gpu_check.py [-k PATTERN]
"""
import os
import re
import shutil
import signal
import subprocess
import time

from helpers import ROOT, Folder, main

# What every program that "make" builds is, by its name. FAILS, HANGS: names of those that do. EXCLUSIVE: one at a time.
PROGRAM = """#!/bin/bash
name=$(basename "$0")
case " $HANGS " in *" $name "*) echo "begun"; sleep 1000 ;; esac
if [ -n "$EXCLUSIVE" ]; then
    mkdir taken || { echo "all CUDA-capable devices are busy or unavailable"; exit 70; }
    sleep 0.3
    rmdir taken
fi
case " $FAILS " in *" $name "*) echo "FAIL gemm"; echo "8 passed, 1 failed"; exit 1 ;; esac
case $name in
    cuda_step)
        case "$*" in *"$NO_ENGINE --cudnn"*) [ -z "$NO_ENGINE" ] || {
            echo "cuda_step: values of 192: cuDNN 91900 has no engine for this on this GPU"; exit 1; } ;; esac
        echo "$2 T $3 B 16 ${4:+}1000 tokens/s  MFU 40.0%"; echo "    matrix products 9.0 ms" ;;
    test_ops_cuda)
        if [ "$1" = perf ]; then echo "NVIDIA H200"; echo "$3 one 2.0 us"; else echo "9 passed, 0 failed"; fi ;;
    *) echo "9 passed, 0 failed" ;;
esac
"""
STUBS = {
    "nvidia-smi": """[ -z "$NO_GPU" ] || { echo -n "${NO_GPU#-}"; exit 9; }  # errors, too, go to standard output
if [ "$1" = -L ]; then echo "GPU 0: NVIDIA H200"; exit; fi
line='1,$'
if [ "$1" = -i ]; then line=$((${2%%,*} + 1)); shift 2; fi
case $1 in
    *compute_mode) echo "${EXCLUSIVE:-Default}" ;;
    *mig.mode.current) echo "${MIG:-Disabled}" ;;
    *) echo -e "NVIDIA ${GPU:-H200}, 580.1, 143771 MiB, ${CAPABILITY:-9.0}$OTHER_GPU" ;;
esac | sed -n ${line}p""",
    "nvcc": """if [ "$1" = --version ]; then echo "release 13.0, V13.0.88"; exit; fi
[ -z "$NO_CUBLAS" ] || [ -e build/cublas/libcublas.so ] || { echo "cannot find -lcublas"; exit 1; }""",
    "compute-sanitizer": """echo "$@" >> build/sanitized
if [ "$2" = "$BLIND" ]; then echo "8 passed, 0 failed"; else echo "========= ERROR SUMMARY: 0 errors"; fi""",
    "torch_python": """case $2 in
    *torch.cuda*) ;;
    *nvidia*) echo "$PACKAGES" ;;
    *) echo "$2 T $3 B 4 500 tokens/s" ;;
esac""",
    "make": """case $* in *found*) echo "$CUDNN_FOUND"; exit ;; esac
for word in "$@"; do
    case $word in
        CUDNN=1) [ -z "$CUDNN_BROKEN" ] || { echo "cudnn.h:1: error: no"; exit 2; } ;;
        NVCC_ARCH=*) echo "$word" > build/arch ;;
        CUDNN_HOME=*) echo "$word" > build/cudnn ;;
        -*) ;;
        *) mkdir -p "$(dirname "$word")"; cp program "$word" ;;
    esac
done""",
}


class GpuCheck(Folder):
    def setUp(self):
        super().setUp()
        for name in ("scripts", "bin", "dev/tests", "dev/bench", "dev/golden"):
            os.makedirs(self.path(name))
        shutil.copy(os.path.join(ROOT, "scripts", "gpu_check.sh"), self.path("scripts"))
        shutil.copy(os.path.join(ROOT, "dev", "SPEED.md"), self.path("dev"))
        self.write("program", PROGRAM)
        self.write("dev/tests/test_cuda_run.py", "print('7 passed, 0 failed')\n")
        self.write("dev/bench/torch_gpu.py", "")
        for name, text in STUBS.items():
            self.write("bin/" + name, "#!/bin/bash\n" + text + "\n")

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as f:
            f.write(text)
        os.chmod(self.path(name), 0o755)

    def cudnn(self, minor):
        """A folder with a cuDNN 9.MINOR, by its headers."""
        os.makedirs(self.path("cudnn/include"), exist_ok=True)
        self.write("cudnn/include/cudnn_version.h",
                   "#define CUDNN_MAJOR 9\n#define CUDNN_MINOR %d\n#define CUDNN_PATCHLEVEL 0\n" % minor)
        return self.path("cudnn")

    def clock(self, each_time=""):
        """What the script takes for seconds: the file `clock`, which a command may move on, each time it looks."""
        self.write("clock", "1000\n")
        self.write("bin/date", "#!/bin/bash\nnow=$(cat clock)\necho $now\n" + each_time + "\n")

    def begin(self, *options, **variables):
        path = self.path("bin") + ":" + os.environ["PATH"]
        command = [self.path("scripts/gpu_check.sh"), "--python", self.path("bin/torch_python"), *options]
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment.update(variables, PATH=path)
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def check(self, *options, status=0, **variables):
        """The table, the last lines of the output."""
        child = self.begin(*options, **variables)
        output = child.communicate(timeout=100)[0]
        self.assertEqual(child.returncode, status, output)
        self.assertIn("\n==== took ", output)
        return output.split("\n==== took ")[1]

    def commas(self):
        """Variables of a locale with decimal commas, where it can be made here."""
        command = ["localedef", "-i", "de_DE", "-f", "UTF-8", self.path("de_DE.UTF-8")]
        if not shutil.which("localedef") or subprocess.run(command, capture_output=True).returncode:
            return {}
        return {"LOCPATH": self.path("."), "LC_ALL": "de_DE.UTF-8"}

    def test_all_is_well(self):
        table = self.check(CUDNN_FOUND=self.cudnn(16), **self.commas())
        self.assertTrue(table.endswith("gpu_check: all passed\n"), table)
        for words in ("NVIDIA H200, 580.1, 143771 MiB, 9.0; release 13.0; sm_90a", "ok      build with cuDNN: done",
                      "ok      operations: 9 passed, 0 failed", "ok      test_mta_cuda bf16: 9 passed",
                      "ok      test_mta_cuda fp32: 9 passed", "ok      runs: 7 passed, 0 failed",
                      "ok      compute-sanitizer racecheck of test_ops_cuda: ========= ERROR SUMMARY: 0 errors",
                      "ours    mta-full T 4096 B 16 1000 tokens/s", "kernel  kernel one 2.0 us",
                      "torch   mta T 2048 B 4 500 tokens/s", "mta over PyTorch, T 2048: 2.00"):
            self.assertIn(words, table)
        self.assertNotIn("skip", table)
        with open(self.path("build/arch"), encoding="utf-8") as f:
            self.assertEqual(f.read(), "NVCC_ARCH=sm_90a\n")
        with open(self.path("build/sanitized"), encoding="utf-8") as f:
            self.sanitized(f.read().splitlines())

    def sanitized(self, calls):
        """The sanitizers look at every kernel of ours and at none of the libraries'."""
        with open(os.path.join(ROOT, "train_mta.cu"), encoding="utf-8") as f:
            ours = re.findall(r"__global__[^;{]*?(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)", "", f.read()))
        self.assertGreater(len(ours), 30)
        theirs = ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x192_4x1x1_kernel0_0",
                  "cublasLt_fused_imma_dgemm_kernel_sm80", "gemmSN_NN_kernel", "splitKreduce_kernel"]
        self.assertEqual(len(calls), 4)
        for call in calls:
            words = call.split()
            wanted, unwanted = ([re.fullmatch("kns=([^,=]+)", words[i + 1])[1] for i, word in enumerate(words)
                                 if word == option] for option in ("--kernel-name", "--kernel-name-exclude"))
            looked_at = [name for name in ours + theirs
                         if any(w in name for w in wanted) and not any(w in name for w in unwanted)]
            self.assertEqual(looked_at, ours)

    def test_what_fails_stops_nothing_else(self):
        table = self.check(FAILS="test_ops_cuda cuda_step", status=1)
        self.assertIn("FAIL    operations: exit status 1: 8 passed, 1 failed (see build/log/gpu_operations.log)", table)
        self.assertIn("FAIL    ours mta T 2048: 8 passed, 1 failed", table)
        for words in ("ok      test_mta_cuda bf16", "ok      runs", "torch   transformer"):
            self.assertIn(words, table)
        self.assertRegex(table, r"\ngpu_check: \d+ failed\n$")

    def test_what_hangs_is_stopped(self):
        """What cannot be killed, as inside of a driver whose GPU has gone, is left behind. The time of one program is
        over when it has begun, and all time when nothing but the other hangs."""
        self.write("bin/timeout", """#!/bin/bash
case $* in
    *cuda_fp32) echo $$ > hangs; trap '' TERM; exec sleep 1000 ;;
    *test_mta_cuda)
        /usr/bin/timeout "$@" & child=$!
        until grep -q begun build/log/gpu_test_mta_cuda_bf16.log; do sleep 0.02; done
        kill $child; wait $child; exit 124 ;;
    *test_cuda_run.py) /usr/bin/timeout "$@"; touch runs; exit ;;
    *) exec /usr/bin/timeout "$@" ;;
esac\n""")
        self.clock("if [ -e hangs ] && [ -e runs ]; then echo $((now + 100)) > clock; fi")
        table = self.check("--part", "tests", HANGS="test_mta_cuda", status=1)
        with open(self.path("hangs"), encoding="utf-8") as f:
            os.kill(int(f.read()), signal.SIGKILL)  # it is still there
        self.assertRegex(table, r"FAIL    test_mta_cuda bf16: out of its 150 s or of the deadline \(see .*\): begun")
        for words in ("FAIL    test_mta_cuda fp32: out of its 150 s or of the deadline", "ok      operations",
                      "ok      runs", "skip    compute-sanitizer racecheck of test_ops_cuda: no time left"):
            self.assertIn(words, table)

    def test_one_process_at_a_time(self):
        """The compute mode Exclusive_Process, which clusters have; and a sanitizer that lets the program run alone."""
        table = self.check("--part", "tests", EXCLUSIVE="Exclusive_Process", BLIND="memcheck")
        self.assertIn("skip    compute-sanitizer memcheck of test_mta_cuda: it says of nothing that it was checked: 8",
                      table)
        for words in ("note    compute mode Exclusive_Process: the tests run one after another", "ok      operations",
                      "ok      test_mta_cuda bf16", "ok      test_mta_cuda fp32", "gpu_check: all passed"):
            self.assertIn(words, table)

    def test_figures_of_an_earlier_call_are_not_this_one_s(self):
        """Where no time is left for a step, what its log said last time is not in the table."""
        self.assertIn("ours    mta T 2048", self.check("--part", "speed"))
        self.clock()
        self.write("bin/make", "#!/bin/bash\ncase $* in *NVCC_ARCH*) echo 1513 > clock ;; esac\n" + STUBS["make"])
        table = self.check("--part", "speed")  # 7 s of 520 are left behind the build
        self.assertIn("skip    ours mta T 2048: no time left", table)
        for words in ("tokens/s", "ratio", " us"):
            self.assertNotIn(words, table)

    def test_predictions_are_of_the_gpu_that_they_name(self):
        for gpu, mig, there in (("H200", "Disabled", True), ("H100 PCIe", "[N/A]", False), ("H200", "Enabled", False),
                                ("GH200 480GB", "Disabled", False)):
            table = self.check("--part", "speed", GPU=gpu, MIG=mig)
            self.assertEqual("; predicted " in table, there, table)
            self.assertEqual("note    MIG: what is measured is a part of this GPU" in table, mig == "Enabled", table)

    def test_the_gpu_that_is_taken(self):
        """Of different ones the most capable; the one that is visible; the line in the table, the architecture and what
        the programs see are of the same."""
        self.write("program", PROGRAM.replace("case $name in\n", "case $name in\n    test_ops_cuda) echo "
                                              "\"saw $CUDA_DEVICE_ORDER ${CUDA_VISIBLE_DEVICES-all}\" ;;\n"))
        second = "\\nNVIDIA RTX 5090, 580.1, 32607 MiB, 12.0"
        for visible, capability, line, arch in ((None, "8.9", "NVIDIA RTX 5090, 580.1, 32607 MiB, 12.0", "sm_120"),
                                                ("0", "8.9", "NVIDIA H200, 580.1, 143771 MiB, 8.9", "sm_89"),
                                                (None, "12.0", "NVIDIA H200, 580.1, 143771 MiB, 12.0", "sm_120")):
            variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
            table = self.check("--part", "tests", OTHER_GPU=second, CAPABILITY=capability, **variables)
            self.assertIn("gpu     %s; release 13.0; %s" % (line, arch), table)
            with open(self.path("build/arch"), encoding="utf-8") as f:
                self.assertEqual(f.read(), "NVCC_ARCH=%s\n" % arch)
            seen = visible or ("1" if capability == "8.9" else "all")
            self.assertIn("ok      operations: saw PCI_BUS_ID %s\n" % seen, table)

    def test_refused_before_anything_is_built(self):
        for variables, words in (({"CAPABILITY": "7.5"}, "wanted a compute capability of 8.0 or more (bf16)"),
                                 ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES, '', hides all GPUs"),
                                 ({"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES, '-1', hides all GPUs")):
            child = self.begin(**variables)
            output = child.communicate(timeout=100)[0]
            self.assertEqual((child.returncode, output.count("\n")), (1, 1), output)
            self.assertIn(words, output)

    def test_a_torch_that_is_still_looked_for_is_not_missing(self):
        """And it is not looked for any longer when the script has ended."""
        self.write("bin/torch_python", "#!/bin/bash\n"
                                       "case $2 in *torch.cuda*) echo $$ > searching; exec sleep 300 ;; esac\n")
        self.write("bin/make", "#!/bin/bash\nuntil [ -s searching ]; do sleep 0.1; done\n" + STUBS["make"])
        self.assertIn("skip    PyTorch: none was found in time", self.check("--part", "speed"))
        with open(self.path("searching"), encoding="utf-8") as f:
            search = int(f.read())
        until = time.monotonic() + 60
        while self.runs(search) and time.monotonic() < until:
            time.sleep(0.1)
        self.assertFalse(self.runs(search))

    @staticmethod
    def runs(process):
        """One that has ended and waits for its parent to ask runs no longer."""
        try:
            with open("/proc/%d/stat" % process, encoding="utf-8") as f:
                return f.read().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    def test_ended_from_outside(self):
        """As by a machine whose time is up: the table comes at once."""
        child = self.begin("--part", "tests", HANGS="test_ops_cuda")
        self.addCleanup(child.kill)
        while "ok      build" not in child.stdout.readline():
            self.assertIsNone(child.poll())
        child.send_signal(signal.SIGTERM)
        output = child.communicate(timeout=100)[0]
        self.assertEqual(child.returncode, 1)
        for words in ("==== took", "ok      build", "FAIL    interrupted", "gpu_check: 1 failed"):
            self.assertIn(words, output)

    def test_cudnn_in_the_way(self):
        """One that is too old is left alone; one with which nothing builds is given up; one of a package serves."""
        table = self.check("--part", "speed", CUDNN_FOUND=self.cudnn(5))
        self.assertIn("skip    attention by cuDNN: none of 9.16", table)
        table = self.check("--part", "speed", CUDNN_FOUND=self.cudnn(19), CUDNN_BROKEN="1", status=1)
        for words in ("FAIL    build with cuDNN: exit status 2: cudnn.h:1: error: no", "ok      build: done",
                      "ours    mta T 2048", "skip    attention by cuDNN", "gpu_check: 1 failed"):
            self.assertIn(words, table)
        table = self.check("--part", "speed", PACKAGES=self.folder, NO_ENGINE="mta 2048 0 4")
        for words in ("ok      build with cuDNN", "ours    transformer T 2048 B 16 1000", "gpu_check: all passed",
                      "skip    ours mta T 2048 --cudnn: cuda_step: values of 192: cuDNN 91900 has no engine for this"):
            self.assertIn(words, table)
        with open(self.path("build/cudnn"), encoding="utf-8") as f:
            self.assertEqual(f.read(), "CUDNN_HOME=%s\n" % self.path("cudnn"))

    def test_cublas_of_a_package(self):
        for name in ("include", "lib"):
            os.makedirs(self.path("packages/cu13/" + name))
        for name in ("include/cublas_v2.h", "lib/libcublas.so.13", "lib/libcublasLt.so.13"):
            self.write("packages/cu13/" + name, "")
        table = self.check("--part", "speed", NO_CUBLAS="1", PACKAGES=self.path("packages"))
        self.assertIn("note    the toolkit links no cuBLAS: that of %s is taken" % self.path("packages/cu13"), table)
        self.assertEqual(sorted(os.listdir(self.path("build/cublas"))),
                         ["libcublas.so", "libcublas.so.13", "libcublasLt.so", "libcublasLt.so.13"])
        shutil.rmtree(self.path("build"))
        self.assertIn("no Python package has one: cannot find -lcublas",
                      self.check("--part", "speed", NO_CUBLAS="1", PACKAGES=self.path("none")))

    def test_no_gpu(self):
        driver = "NVIDIA-SMI has failed because it couldn't communicate, as here, with the NVIDIA driver, 4 tries"
        for says, told in (("-", ""), (driver, ": " + driver), ("No devices were found", ": No devices were found")):
            child = self.begin(NO_GPU=says)
            self.assertEqual((child.communicate()[0], child.returncode),
                             (f"gpu_check.sh: nvidia-smi finds no GPU{told}\n", 1))


if __name__ == "__main__":
    main()
