#!/usr/bin/env python3
"""scripts/train_880m.sh as torchrun, srun, mpirun and mpiexec start it, and what scripts/ranks_check.sh finds: with
stubs that write down what they were called with or pretend runs, and with the CUDA trainer on the emulator.

python3 dev/tests/test_launchers.py     torchrun of dev/.venv, mpirun.openmpi, mpirun.mpich, Slurm: those that are there
"""
import getpass
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest

from helpers import ROOT, Folder, main, read_bytes, write_shard

TORCHRUN = os.path.join(ROOT, "dev", ".venv", "bin", "torchrun")
TRAINER = os.path.join(ROOT, "build", "train_mta_cuda_cpu")
TWO = {"torchrun": [TORCHRUN, "--no-python", "--standalone", "--nproc-per-node", "2"],
       "mpirun": ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"],
       "mpiexec": ["mpiexec.mpich", "-n", "2"]}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Plans say that 40 sequences fit, and on which GPU and with which launcher's variables they were made.
STUB = """#!/usr/bin/env python3
import fcntl, json, os, sys
with open(os.environ["STUB_LOG"], "a") as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    f.write(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}) + "\\n")
if "--dry-run" in sys.argv:
    print("device      a card; the largest micro-batch that fits: 40 or more")
"""


# A run whose numbers follow from its options; FAULT, on the processes of a run of two: another loss, another byte, a
# death.
RUN = """#!/usr/bin/env python3
import os, sys
option = lambda name: sys.argv[sys.argv.index(name) + 1]
if "--dry-run" in sys.argv:
    print("largest micro-batch that fits: 40")
    sys.exit()
fault = os.environ["FAULT"] if os.environ["WORLD_SIZE"] == "2" else ""
if fault == "dies" and os.environ["RANK"] == "1":
    sys.exit("stub: process 1 dies")
if os.environ["RANK"] != "0":
    sys.exit(0)
steps = range(1 + 2 * ("--resume" in sys.argv), int(option("--steps")) + 1)
os.makedirs("run", exist_ok=True)
with open("run/log.jsonl", "a") as f:
    for step in steps:
        loss = 1 / step + (1e-7 if fault == "loss" and step == 2 else 0)
        f.write('{"event": "step", "time": %d, "step": %d, "loss": %.17g, "tokens_per_s": %d.5}\\n' %
                (os.getpid(), step, loss, 100 + 80 * (fault == "fast")))
    f.write('{"event": "stop", "pid": %d}\\n' % os.getpid())
for step in steps:
    folder = "run/step-%08d" % step
    os.makedirs(folder)
    for name in ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", "manifest.json"):
        with open(os.path.join(folder, name), "w") as f:
            f.write("%s of %d%s" % (name, step, fault if fault in name and step == 4 else ""))
"""


class Scripts(Folder):
    def setUp(self):
        super().setUp()
        self.environment = dict(os.environ)

    def stub(self, text):
        path = os.path.join(self.folder, "stub")
        with open(path, "w") as f:
            f.write(text)
        os.chmod(path, 0o755)
        return path


class Launchers(Scripts):
    def setUp(self):
        super().setUp()
        self.shards, self.log = (os.path.join(self.folder, name) for name in ("shards [1]", "log"))
        os.mkdir(self.shards)
        for name in ("commoncrawl", "c4", "github", "wikipedia", "stackexchange", "arxiv", "book"):
            open(os.path.join(self.shards, name + "_train_000000.bin"), "w").close()
        hidden = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "MPI_", "CUDA_VISIBLE_DEVICES") + LAUNCHED
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        self.environment.update(TRAINER=self.stub(STUB), STUB_LOG=self.log)

    def start(self, launcher, environment=None, size=2):
        """Runs the script on `size` processes; their plans, their runs, and what was printed."""
        script = [os.path.join(ROOT, "scripts", "train_880m.sh"), self.shards, "out", "mta", "--seed", "9"]
        children = [subprocess.Popen(launcher + script, cwd=self.folder, text=True, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, env=dict(self.environment, **variables))
                    for variables in environment or [{}]]
        texts = [child.communicate(timeout=120) for child in children]
        self.assertEqual([child.returncode for child in children], [0] * len(children), texts)
        self.assertEqual([name for name in os.listdir(self.shards) if not name.endswith(".bin")], ["recipe.txt"])
        with open(self.log) as f:
            calls = [json.loads(line) for line in f]
        plans = [call for call in calls if "--dry-run" in call["arguments"]]
        runs = [call for call in calls if "--dry-run" not in call["arguments"]]
        self.assertEqual((len(plans), len(runs)), (size, size))
        return plans, runs, "".join(stdout for stdout, _ in texts)

    def test_shards_of_the_checkpoint(self):
        """The micro-batch is chosen beside the sums of as many shards as the run has that goes on."""
        for step, shards in (("00000009", 4), ("00000010", 32)):
            os.makedirs(os.path.join(self.folder, "out", "step-" + step))
            with open(os.path.join(self.folder, "out", "step-" + step, "trainer.json"), "w") as f:
                f.write('{\n  "format": 1,\n  "shards": %d,\n  "lr": 0.1\n}\n' % shards)
        [plan], [run], _ = self.start([], size=1)
        at = plan["arguments"].index("--shards")
        self.assertEqual(plan["arguments"][at + 1], "32")
        self.assertNotIn("--shards", run["arguments"])  # the trainer reads it there

    def test_shards_of_others(self):
        """No recipe of SlimPajama's is written beside them: --train among the options says which there are. A run
        stands for its newest checkpoint."""
        shards, run = self.path("others [2]"), self.path("run [3]")
        os.mkdir(shards)
        os.makedirs(os.path.join(run, "step-00000001"))
        tune, train = ["finetune_4k.sh", run], ["train_880m.sh"]
        for (name, *before), options, said in ((tune, [], "holds no config.json"),
                                               (tune, [], "has no commoncrawl_train_*.bin"), (tune, ["--train=x"], ""),
                                               (train, [], "has no commoncrawl_"), (train, ["--train", "x"], "")):
            script = [os.path.join(ROOT, "scripts", name), *before, shards, "out", *options]
            done = subprocess.run(script, cwd=self.folder, env=self.environment, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1) if said else (0, 0), done.stderr)
            self.assertIn(said, done.stderr)
            self.assertEqual(os.listdir(shards), [])
            open(os.path.join(run, "step-00000001", "config.json"), "w").close()

    def check(self, plans, runs, printed, names, size=2, gpus=("0", "1"), batch="32"):
        """Plans of one process each, on a GPU of its own; runs with the launcher's variables and the same arguments."""
        number, count = names
        for plan in plans:
            self.assertIn(f"--ranks {size} ", " ".join(plan["arguments"]))
            self.assertEqual(plan["arguments"][-2:], ["--seed", "9"])
            self.assertNotIn(count, plan["environment"])
        self.assertEqual(sorted(plan["environment"].get("CUDA_VISIBLE_DEVICES", "") for plan in plans), list(gpus))
        self.assertEqual(sorted(int(run["environment"][number]) for run in runs), list(range(size)))
        self.assertEqual({run["environment"][count] for run in runs}, {str(size)})
        self.assertEqual({tuple(run["arguments"]) for run in runs}, {tuple(runs[0]["arguments"])})
        self.assertEqual(runs[0]["arguments"][runs[0]["arguments"].index("--batch-size") + 1], batch)
        self.assertNotIn("--ranks", runs[0]["arguments"])
        self.assertEqual([printed.count(words) for words in ("micro-batches of", "nothing is evaluated")], [1, 1])
        self.assertIn(f"micro-batches of {batch} sequences (40 would fit)", printed)

    def test_torchrun(self):
        if not os.path.exists(TORCHRUN):
            self.skipTest("no dev/.venv with PyTorch")
        done = self.start(TWO["torchrun"])
        self.check(*done, ("RANK", "WORLD_SIZE"))
        for run in done[1]:
            self.assertEqual([name for name in LAUNCHED if not run["environment"].get(name)], [])

    def test_mpirun(self):
        if not shutil.which("mpirun.openmpi"):
            self.skipTest("no Open MPI")
        self.check(*self.start(TWO["mpirun"]), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))

    def test_mpiexec(self):
        if not shutil.which("mpiexec.mpich"):
            self.skipTest("no MPICH")
        self.check(*self.start(TWO["mpiexec"]), ("PMI_RANK", "PMI_SIZE"))

    def test_srun(self):
        """Eight tasks on two hosts, which see the GPUs 4 to 7: a step of 128 sequences leaves 16 for each."""
        tasks = [{"SLURM_PROCID": str(i), "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": str(i % 4),
                  "CUDA_VISIBLE_DEVICES": "4,5,6,7"} for i in range(8)]
        self.check(*self.start([], tasks, 8), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), 8, sorted("45674567"), "16")

    def test_srun_by_pmi2(self):
        """It sets MPICH's variables beside its own, but for the number on the host."""
        tasks = [{"SLURM_PROCID": str(i), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(i), "PMI_RANK": str(i),
                  "PMI_SIZE": "2"} for i in range(2)]
        self.check(*self.start([], tasks), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))

    def test_srun_that_shows_each_task_its_own_gpu(self):
        tasks = [{"SLURM_PROCID": str(i), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(i),
                  "CUDA_VISIBLE_DEVICES": "3"} for i in range(2)]
        self.check(*self.start([], tasks), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), 2, ("3", "3"))

    def test_launchers_that_set_mpich_s_variables(self):
        """Cray's PALS and Flux, each with one of its own for the number on the host."""
        for local in ("PMI_LOCAL_RANK", "FLUX_TASK_LOCAL_ID"):
            tasks = [{"PMI_RANK": str(i), "PMI_SIZE": "2", local: str(i)} for i in range(2)]
            self.check(*self.start([], tasks), ("PMI_RANK", "PMI_SIZE"))
            os.remove(self.log)

    def test_script_of_a_job(self):
        """One process, whatever sbatch says of the job: nothing changes."""
        plans, runs, printed = self.start([], [{"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}], 1)
        self.assertNotIn("--ranks", plans[0]["arguments"])
        self.assertNotIn("CUDA_VISIBLE_DEVICES", plans[0]["environment"])
        self.assertIn("micro-batches of 32 sequences (40 would fit)", printed)
        self.assertEqual(runs[0]["arguments"][runs[0]["arguments"].index("--batch-size") + 1], "32")


class Emulated(Scripts):
    """The CUDA trainer on the emulator, by the same script and launchers."""

    SMALL = ["--hidden-size", "32", "--num-hidden-layers", "1", "--num-attention-heads", "2", "--num-key-value-heads",
             "2", "--intermediate-size", "48", "--vocab-size", "64", "--tokens-per-step", "64", "--batch-size", "1",
             "--seq-len", "16", "--steps", "2", "--shards", "2"]

    def run_script(self, *launchers, trainer=TRAINER):
        """A run in a folder of its own, of one process or as each of the launchers starts them; its weights and
        moments."""
        folder = tempfile.mkdtemp(dir=self.folder)
        os.symlink(self.shards, os.path.join(folder, "shards"))
        script = [os.path.join(ROOT, "scripts", "train_880m.sh"), "shards", "out", "mta", *self.SMALL]
        variables = dict(self.environment, TRAINER=trainer, CUDA_CPU_DEVICES="2", OMP_NUM_THREADS="1")
        children = [subprocess.Popen(launcher + script, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT) for launcher in launchers]
        texts = [child.communicate(timeout=120)[0] for child in children]
        self.assertEqual({child.returncode for child in children}, {0}, texts)
        with open(os.path.join(folder, "out", "log.jsonl")) as f:
            ranks = [json.loads(line)["ranks"] for line in f if '"event": "start"' in line]
        self.assertEqual(ranks, [2 if launchers[0] else 1])
        checkpoint = os.path.join(folder, "out", "step-00000002")
        return [read_bytes(os.path.join(checkpoint, f"{name}.safetensors")) for name in ("model", "optimizer")]

    def make_shards(self):
        self.shards = os.path.join(self.folder, "shards")
        os.mkdir(self.shards)
        for domain in ("commoncrawl", "c4", "github", "wikipedia", "stackexchange", "arxiv", "book"):
            write_shard(os.path.join(self.shards, f"{domain}_train_000000.bin"),
                        [i * len(domain) % 61 for i in range(2500)], vocab=64, width=4)
        counts = {name: {"documents": 30, "tokens": 2500} for name in os.listdir(self.shards)}
        with open(os.path.join(self.shards, "manifest.json"), "w") as f:
            json.dump({"shards": counts}, f)


class Trained(Emulated):
    def test_plan_of_the_paper(self):
        """Four machines of eight: what a rank holds and sends, in steps of a card of 81,559 MiB."""
        self.make_shards()
        script = [os.path.join(ROOT, "scripts", "train_880m.sh"), self.shards, "out", "--dry-run", "--ranks", "32",
                  "--ranks-per-node", "8"]  # mta without a word
        plan = subprocess.run(script, capture_output=True, text=True, timeout=120,
                              env=dict(self.environment, TRAINER=TRAINER, CUDA_CPU_MEMORY_MIB="81559"))
        self.assertEqual((plan.returncode, plan.stderr), (0, ""))
        mib = 876_563_136 / 2**20
        for name, wanted in (("weights bf16", 2 * mib), ("gradients fp32", 4 * mib),
                             ("own m, v, master", 12 * mib / 32)):
            self.assertAlmostEqual(float(re.search(name + r" +([\d.]+) MiB", plan.stdout)[1]), wanted, delta=1)
        sent = re.search(r"sent +([\d.]+) MiB of gradients and ([\d.]+) of weights by each rank in a step; ([\d.]+) "
                         r"and ([\d.]+) by each machine of 8 through its network", plan.stdout)
        for got, wanted in zip(sent.groups(), (4 * mib * 31 / 32, 2 * mib * 31 / 32, 4 * mib * 3 / 4, 2 * mib * 3 / 4)):
            self.assertAlmostEqual(float(got), wanted, delta=2)
        self.assertRegex(plan.stdout, r"ranks +32 of 1 shard each: 1 micro-batches of at most 4 sequences, 8192 tokens")

    def test_same_bits_by_every_launcher(self):
        there = {name: launcher for name, launcher in TWO.items() if shutil.which(launcher[0])}
        if not there:
            self.skipTest("no launcher: torchrun, mpirun.openmpi or mpiexec.mpich")
        self.make_shards()
        alone = self.run_script([])
        for name, launcher in there.items():
            self.assertTrue(self.run_script(launcher) == alone, name)


class Hosts(Emulated):
    """Two network namespaces as hosts, a cable between them: what a job of Slurm on two hosts sees."""

    def ip(self, words):
        return subprocess.run(["ip", *words.split()], stderr=subprocess.DEVNULL).returncode == 0

    def test_same_bits(self):
        if os.geteuid() != 0 or not shutil.which("ip"):
            self.skipTest("hosts are network namespaces: wanted root and ip")
        spaces = [f"mta{os.getpid() % 100000}h{i}" for i in range(2)]
        for space in spaces:
            self.addCleanup(self.ip, f"netns del {space}")
        made = all([self.ip(f"netns add {space}") for space in spaces]) and \
            self.ip(f"-n {spaces[0]} link add eth0 type veth peer name eth0 netns {spaces[1]}")
        for i, space in enumerate(spaces):
            made = made and self.ip(f"-n {space} link set lo up") and self.ip(f"-n {space} link set eth0 up") and \
                self.ip(f"-n {space} addr add 10.78.0.{i + 1}/24 dev eth0")
        if not made:
            self.skipTest("network namespaces are not allowed here")
        self.make_shards()
        tasks = [{"SLURM_PROCID": str(i), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(i),
                  "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "10.78.0.[1-2]", "SLURM_JOB_ID": "77"}
                 for i in range(2)]
        launchers = [["ip", "netns", "exec", space, "env", *(f"{k}={v}" for k, v in task.items())]
                     for space, task in zip(spaces, tasks)]
        self.assertTrue(self.run_script(*launchers) == self.run_script([]))


SLURM = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8
PartitionName=all Nodes={host} Default=YES State=UP
"""


@unittest.skipUnless(all(map(shutil.which, ("slurmctld", "slurmd", "srun", "sinfo"))), "no Slurm")
class Slurm(Emulated):
    """Slurm itself, of one host, without its own authentication; srun starts two tasks."""

    def setUp(self):
        super().setUp()
        host, sockets = socket.gethostname().split(".")[0], [socket.socket() for _ in range(2)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        home = os.path.join(self.folder, "slurm")
        for name in ("state", "spool"):
            os.makedirs(os.path.join(home, name))
        path = os.path.join(home, "slurm.conf")
        with open(path, "w") as f:
            f.write(SLURM.format(host=host, ports=ports, user=getpass.getuser(), folder=home))
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True).stdout
        if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (23, 11):  # it wants a cgroup, which containers lack
            with open(os.path.join(home, "cgroup.conf"), "w") as f:
                f.write("CgroupPlugin=disabled\n")
        self.environment["SLURM_CONF"] = path
        with open(os.path.join(home, "log"), "w") as log:
            for program in ("slurmctld", "slurmd"):
                daemon = subprocess.Popen([program, "-D"], env=self.environment, stdout=log, stderr=log)
                self.addCleanup(daemon.wait)
                self.addCleanup(daemon.terminate)
        end = time.monotonic() + 120
        while subprocess.run(["sinfo", "--noheader", "--format=%t"], env=self.environment, capture_output=True,
                             text=True).stdout.strip() != "idle":
            with open(os.path.join(home, "log")) as log:
                self.assertLess(time.monotonic(), end, log.read()[-2000:])
            time.sleep(0.2)
        self.make_shards()

    def programs(self):
        """The CUDA trainer, and what is there of the CPU trainers by each MPI: program, srun's way to start it."""
        for name, mpi in (("train_mta_cuda_cpu", "none"), ("openmpi/train_mta", "pmix"), ("mpich/train_mta", "pmi2")):
            program = os.path.join(ROOT, "build", name)
            if program == TRAINER or os.path.exists(program):
                yield program, ["srun", f"--mpi={mpi}", "--ntasks", "2"]

    def test_same_bits(self):
        for program, srun in self.programs():
            with self.subTest(program=program):
                self.assertTrue(self.run_script(srun, trainer=program) == self.run_script([], trainer=program))

    def test_a_task_is_killed(self):
        """Without --kill-on-bad-exit: the other ends by itself, with its line."""
        for program, srun in self.programs():
            with self.subTest(program=program):
                out = os.path.join(tempfile.mkdtemp(dir=self.folder), "out")
                run = subprocess.Popen(
                    [*srun, program, "--model", "880m", *self.SMALL, "--steps", "100000", "--save-every", "10",
                     "--rank-timeout", "0",  # a lost connection is noticed though silence is not
                     "--train", os.path.join(self.shards, "c4_train_*.bin"), "--out", out], text=True,
                    env=dict(self.environment, CUDA_CPU_DEVICES="2", OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE)
                self.addCleanup(run.wait, 120)
                self.addCleanup(run.terminate)
                end = time.monotonic() + 120
                while not glob.glob(os.path.join(out, "step-*")):  # any: old ones go while new ones come
                    self.assertIsNone(run.poll())
                    self.assertLess(time.monotonic(), end)
                    time.sleep(0.05)
                os.kill(self.task(program, 1), signal.SIGKILL)
                _, err = run.communicate(timeout=120)
                if "mpich" in program and "process_vm_readv" in err:  # UCX was about to read the dead one's memory
                    self.assertIn("task 0: Aborted", err)
                    continue
                self.assertIn("task 0: Exited with exit code 71", err)
                self.assertRegex(err, r"rank 1 \(.*\) was lost in .*; all ranks end, the last good checkpoint: .*step-")

    def task(self, program, number):
        """The process of a task of srun."""
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as f:
                    variables = f.read().split(b"\0")
                if os.readlink(f"/proc/{pid}/exe") == os.path.realpath(program) and \
                        b"SLURM_CONF=" + self.environment["SLURM_CONF"].encode() in variables and \
                        b"SLURM_PROCID=%d" % number in variables:
                    return int(pid)
            except OSError:
                continue
        self.fail(f"task {number} is not there")


class RanksCheck(Scripts):
    def check(self, *options, failed=0, small=("--small",), **environment):
        work = os.path.join(self.folder, "work")
        script = [os.path.join(ROOT, "scripts", "ranks_check.sh"), *small, "--ranks", "2", "--work", work]
        done = subprocess.run([*script, *options], capture_output=True, text=True, timeout=120,
                              env=dict(self.environment, **environment))
        self.assertEqual((done.returncode, done.stderr), (int(failed > 0), ""), done.stdout)
        self.assertFalse(os.path.exists(work))
        self.assertEqual(done.stdout.splitlines()[-1], f"ranks_check: {f'{failed} failed' if failed else 'all passed'}")
        return done.stdout

    def test_what_it_finds(self):
        run = self.stub(RUN)
        good = self.check("--part", "bits", TRAINER=run, FAULT="")
        self.assertIn("ok      2 processes as one: 4 lines of losses and norms, model.safetensors ", good)
        self.assertIn("ok      begun by 2, ended by one: 4 lines", good)
        dies = "FAIL    on_2: exit status 1\n        process 1: stub: process 1 dies"
        for fault, failed, words in (("loss", 2, "FAIL    2 processes as one: other losses or norms: "),
                                     ("manifest.json", 1, "FAIL    2 processes as one: another manifest.json: "),
                                     ("dies", 2, dies)):
            self.assertIn(words, self.check("--part", "bits", failed=failed, TRAINER=run, FAULT=fault))

    def test_a_number_that_is_none(self):
        script = [os.path.join(ROOT, "scripts", "ranks_check.sh"), "--ranks", "08"]
        done = subprocess.run(script, capture_output=True, text=True, env=self.environment)
        self.assertEqual((done.returncode, done.stderr), (1, "ranks_check.sh: got 08 GPUs, wanted two or more\n"))

    def test_gpus_that_cuda_sees(self):
        """nvidia-smi shows all that the machine has."""
        bin = os.path.join(self.folder, "bin")
        os.mkdir(bin)
        os.rename(self.stub("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo \"GPU $i: NVIDIA H200\"; done\n"),
                  os.path.join(bin, "nvidia-smi"))
        script = [os.path.join(ROOT, "scripts", "ranks_check.sh"), "--small", "--part", "speed"]
        for seen, count in (("2,3", 2), ("GPU-1,GPU-2,GPU-3", 3), (None, 8)):
            variables = dict(self.environment, TRAINER=self.stub(RUN), FAULT="", PATH=bin + ":" + os.environ["PATH"])
            variables.update({"CUDA_VISIBLE_DEVICES": seen} if seen else {})
            done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=variables, cwd=self.folder)
            self.assertIn(f"speed   {count} processes, --reduce nccl", done.stdout + done.stderr)

    def test_build_that_fails(self):
        """What lies there from another commit is not checked in its place."""
        copy = os.path.join(self.folder, "copy")
        bin = os.path.join(copy, "bin")
        shutil.copytree(os.path.join(ROOT, "scripts"), os.path.join(copy, "scripts"))
        os.mkdir(bin)
        for path, text in (("train_mta_cuda", RUN), ("bin/make", "#!/bin/sh\nexit 2\n")):
            os.rename(self.stub(text), os.path.join(copy, path))
        variables = dict(self.environment, FAULT="", PATH=bin + ":" + os.environ["PATH"])
        variables.pop("TRAINER", None)
        done = subprocess.run([os.path.join(copy, "scripts", "ranks_check.sh"), "--small", "--ranks", "2"], cwd=copy,
                              capture_output=True, text=True, timeout=120, env=variables)
        self.assertEqual((done.returncode, done.stdout.split("\n\n")[1]),
                         (1, "FAIL    make train_mta_cuda\nranks_check: 1 failed\n"), done.stderr)

    def test_the_work_folder_is_the_user_s(self):
        """What lies in --work stays, whether the check begins or not."""
        work = os.path.join(self.folder, "mine")
        os.makedirs(work)
        with open(os.path.join(work, "precious"), "w") as f:
            f.write("x")
        script = [os.path.join(ROOT, "scripts", "ranks_check.sh"), "--small", "--ranks", "2", "--work", work]
        for trainer in ("/none", self.stub(RUN)):
            done = subprocess.run([*script, "--part", "speed"], capture_output=True, text=True,
                                  env=dict(self.environment, TRAINER=trainer, FAULT="fast"))
            self.assertEqual(done.returncode, int(trainer == "/none"), done.stdout + done.stderr)
            self.assertEqual(os.listdir(work), ["precious"])

    def test_speed(self):
        """Of the small model, and of the one whose micro-batch is chosen by what fits."""
        for small, batch in ((["--small"], 1), ([], 32)):
            speed = self.check("--part", "speed", small=small, TRAINER=self.stub(RUN), FAULT="fast")
            self.assertIn(f"speed   1 process: 100 tokens/s, {batch} sequences at once", speed)
            self.assertIn("speed   2 processes, --reduce nccl: 180 tokens/s, 90.0% of 2 times one", speed)

    def test_on_the_emulator(self):
        done = self.check(TRAINER=TRAINER, CUDA_CPU_DEVICES="2", OMP_NUM_THREADS="1")
        self.assertEqual(done.count("\nok "), 4, done)  # two checks, each printed when it is made and in the table
        self.assertEqual(done.count("\nspeed "), 6, done)


if __name__ == "__main__":
    main()
