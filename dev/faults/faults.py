#!/usr/bin/env python3
"""What must hold when the machine fails: system calls that fail, kills, no memory. Ends with "N passed, N failed".

dev/faults/faults.py calls   [--long]     a fault at the n-th system call on a run's files: trainer and prepare.py. The
                                          last good checkpoint verifies, a resume goes on bit for bit, and all is synced
                                          before it is renamed
dev/faults/faults.py kills   [--count N]  SIGKILL at random moments while a trainer saves
dev/faults/faults.py memory  [--long]     the n-th allocation of the programs' own code fails: one line, exit status 1

Without --long a sample of the calls. TRAINER names another trainer than train_mta (build/train_mta_cuda_cpu).
`make build/faults.so train_mta infer_mta` first. The faults come from faults.c, by LD_PRELOAD.
"""

import argparse
import concurrent.futures
import glob
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "dev", "tests"))
from helpers import read_bytes, write_shard  # noqa: E402

LIBRARY = os.path.join(ROOT, "build", "faults.so")
TRAINER = os.path.join(ROOT, os.environ.get("TRAINER", "train_mta"))
INFER = os.path.join(ROOT, "infer_mta")
PREPARE = os.path.join(ROOT, "data", "prepare.py")
SHARDS = os.path.join(ROOT, "data", "shards.py")
KINDS = ("ENOSPC", "EIO", "EINTR", "KILL", "SHORT")
MODEL = [
    "--model", "toy", "--attention", "mta-full", "--hidden-size", "16", "--num-hidden-layers", "1",
    "--num-attention-heads", "2", "--intermediate-size", "16", "--vocab-size", "32", "--kq-conv-key-size", "3",
    "--seq-len", "16", "--batch-size", "2", "--warmup", "0", "--schedule", "constant", "--sample-every", "0",
    "--seed", "5",
]
TIMEOUT = 120


class Verdict:
    """Counts what passed, and says what failed."""

    def __init__(self):
        self.passed, self.failed, self.figures = 0, 0, []

    def check(self, problem):
        self.passed += not problem
        self.failed += bool(problem)
        if problem:
            print("FAILED: " + problem, flush=True)

    def end(self):
        for figure in self.figures:
            print(figure)
        print("%d passed, %d failed" % (self.passed, self.failed))
        sys.exit(self.failed != 0)


class Faulty:
    """A program under the library: its counter of calls in a file of its own."""

    def __init__(self, folder):
        self.state = tempfile.NamedTemporaryFile(dir=folder, prefix="state")
        self.state.write(bytes(mmap.PAGESIZE))
        self.state.flush()

    def run(self, command, at=0, kind="EIO", **settings):
        """The finished process, and how many calls it made."""
        self.state.seek(0)
        self.state.write(bytes(8))
        self.state.flush()
        env = environment(FAULT_STATE=self.state.name, FAULT_AT=str(at), FAULT_KIND=kind, **settings)
        done = subprocess.run(
            command, env=env, input='{"text": "abc"}\n', stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            timeout=TIMEOUT,
        )
        with open(self.state.name, "rb") as f:
            return done, struct.unpack("<Q", f.read(8))[0]


def environment(**settings):
    """The library without FAULT_STATE makes nothing fail."""
    return dict(os.environ, LD_PRELOAD=LIBRARY, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1",
                OMP_WAIT_POLICY="passive", PYTHONDONTWRITEBYTECODE="1", **settings)


def clean(command):
    env = environment()
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)


def must(command):
    done = clean(command)
    if done.returncode:
        sys.exit("%s: exit status %d: %s" % (" ".join(command), done.returncode, done.stderr))


def taken(path):
    """The calls of a trace, which is removed: [(call, path)]."""
    with open(path) as f:
        lines = [line.rstrip("\n").split(" ", 2) for line in f]
    os.unlink(path)
    return [(call, name) for _, call, name in lines]


def out_of_order(name, trace):
    """What a power cut could take: a file renamed (with its folder) before it was synced, a checkpoint removed before
    the newer one's name was. "" = nothing."""
    unsynced, renamed = set(), set()
    for call, path in trace:
        if call in ("write", "pwrite", "ftruncate", "ftruncate64"):
            unsynced.add(path)
        elif call in ("fsync", "fdatasync"):
            unsynced.discard(path)
            renamed = {r for r in renamed if os.path.dirname(r) != path}
        elif call in ("rename", "renameat", "renameat2"):
            lost = [u for u in unsynced if u == path or u.startswith(path + "/")]
            if lost:
                return "%s: %s is renamed before it is synced" % (name, lost[0])
            renamed.add(path)
        elif call == "unlink":
            unsynced.discard(path)
            waiting = [
                r
                for r in renamed
                if r.endswith(".partial") and not r.startswith(os.path.dirname(path)) and "/step-" in path
            ]
            if waiting:
                return "%s: %s is removed before the name of %s is synced" % (name, path, waiting[0])
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# A trainer's run directory


def damage(folder):
    """What is wrong with a checkpoint, by its manifest; "" = nothing."""
    try:
        files = json.loads(read_bytes(os.path.join(folder, "manifest.json")))["files"]
        for name, entry in files.items():
            data = read_bytes(os.path.join(folder, name))
            if len(data) != entry["bytes"] or zlib.crc32(data) != entry["crc32"]:
                return name + " is damaged"
        return (
            ""
            if {"config.json", "trainer.json", "model.safetensors", "optimizer.safetensors"} <= set(files)
            else "files are missing"
        )
    except (OSError, ValueError, KeyError) as e:
        return str(e)


def checkpoints(out):
    """{step: path}"""
    return {int(path[-8:]): path for path in glob.glob(os.path.join(out, "step-" + "[0-9]" * 8))}


def newest_good(out):
    return max([step for step, path in checkpoints(out).items() if not damage(path)], default=-1)


def contents(folder):
    """The files of a checkpoint that a resume must give again to the bit."""
    state = json.loads(read_bytes(os.path.join(folder, "trainer.json")))
    for key in ("arguments", "steps", "keep"):  # what the runs that are compared were asked to do differs
        del state[key]
    files = ("config.json", "model.safetensors", "optimizer.safetensors")
    return {"trainer.json": state, **{n: read_bytes(os.path.join(folder, n)) for n in files}}


def bad_log(out):
    steps = []
    try:
        for line in read_bytes(os.path.join(out, "log.jsonl")).splitlines():
            event = json.loads(line)
            if event["event"] == "step":
                steps.append(event["step"])
    except (OSError, ValueError) as e:
        return "log.jsonl: %s" % e
    return "" if steps == sorted(set(steps)) else "log.jsonl: steps %s" % steps


def ending(done, kind):
    """What is wrong with how a program ended under a fault; "" = nothing."""
    if kind == "KILL":
        return "" if done.returncode == -signal.SIGKILL else "exit status %d after a SIGKILL" % done.returncode
    if done.returncode not in (0, 1):
        return "exit status %d" % done.returncode
    return "exit status 1 without a word" if done.returncode == 1 and not done.stderr.strip() else ""


class TrainerScenario:
    """A run that is continued under a fault, from a copy of `start` (None: a new run)."""

    def __init__(self, name, start, options, wanted, settings=None):
        self.name, self.start, self.options, self.wanted, self.settings = name, start, options, wanted, settings or {}
        self.ended = set()  # statuses under calls that failed

    def arguments(self, out, resume):
        return [TRAINER, *MODEL, "--train", self.data, "--out", out, *self.options, *(["--resume"] if resume else [])]

    def lay(self, out):
        if self.start:
            shutil.copytree(self.start, out)
        return newest_good(out)

    def count(self, faulty, folder):
        out, trace = os.path.join(folder, "count"), os.path.join(folder, "trace")
        self.lay(out)
        done, calls = faulty.run(
            self.arguments(out, bool(self.start)), FAULT_UNDER=out, FAULT_TRACE=trace, **self.settings
        )
        if done.returncode:
            sys.exit("%s without a fault: %s" % (self.name, done.stderr))
        shutil.rmtree(out)
        return calls, taken(trace)

    def trial(self, faulty, out, at, kind):
        """What is wrong after the fault and after a resume; "" = nothing."""
        before = self.lay(out)
        done, _ = faulty.run(self.arguments(out, bool(self.start)), at, kind, FAULT_UNDER=out, **self.settings)
        if kind in ("ENOSPC", "EIO"):
            self.ended.add(done.returncode)
        problem = ending(done, kind) or self.left(out, done, before) or self.resumed(out)
        return "%s, %s at call %d: %s" % (self.name, kind, at, problem) if problem else ""

    def left(self, out, done, before):
        """What is wrong with what the program said and with its checkpoints; `before`: the step of the newest good one
        that it found."""
        name, last = os.path.basename(TRAINER), max(self.wanted)
        if any(not line.startswith(name + ": ") for line in done.stderr.splitlines()):
            return "on stderr: " + done.stderr
        if done.stderr.count("\n") > 3:
            return "%d lines on stderr: %s" % (done.stderr.count("\n"), done.stderr)
        if newest_good(out) < before:
            return "the checkpoint of step %d is gone, the newest good one is %d" % (before, newest_good(out))
        if done.returncode == 0 and contents(checkpoints(out)[last]) != self.wanted[last]:
            return "the program was content, but its checkpoint is another"
        return ""

    def resumed(self, out):
        holds_run = os.path.exists(os.path.join(out, "log.jsonl")) or checkpoints(out)
        done = clean(self.arguments(out, bool(holds_run)))
        last = max(self.wanted)
        if done.returncode:
            return "the resume ends with %d: %s" % (done.returncode, done.stderr)
        for step, path in checkpoints(out).items():
            if step in self.wanted and (damage(path) or contents(path) != self.wanted[step]):
                return "step %d after the resume is not that of a run without faults" % step
        if last not in checkpoints(out):
            return "no checkpoint of step %d after the resume" % last
        if glob.glob(os.path.join(out, ".step-*")):
            return "left behind: %s" % glob.glob(os.path.join(out, ".step-*"))
        return bad_log(out)


def trainer_scenarios(folder):
    data = os.path.join(folder, "x_train_000000.bin")
    rng = random.Random(1)
    write_shard(data, [rng.randrange(32) for _ in range(2000)])
    TrainerScenario.data = data
    base = os.path.join(folder, "whole")
    options = ["--steps", "4", "--save-every", "1", "--keep", "0"]
    whole = TrainerScenario("", None, options, {})
    must(whole.arguments(base, False))
    wanted = {step: contents(path) for step, path in checkpoints(base).items()}

    def start(name, steps, damaged=()):
        """A run stopped after its last step, with these checkpoints, some of them damaged."""
        path = os.path.join(folder, name)
        must(
            TrainerScenario("", None, ["--steps", str(max(steps)), "--save-every", "1", "--keep", "0"], {}).arguments(
                path, False
            )
        )
        for step, checkpoint in checkpoints(path).items():
            if step not in steps:
                shutil.rmtree(checkpoint)
            elif step in damaged:
                with open(os.path.join(checkpoint, "model.safetensors"), "r+b") as f:
                    f.write(b"x")
        return path

    two = start("two", [1, 2])
    over = start("over", [2, 3], damaged=[3])
    last = {3: wanted[3]}
    return [
        TrainerScenario("a new run", None, ["--steps", "2", "--save-every", "1", "--keep", "1"], {2: wanted[2]}),
        TrainerScenario("the next checkpoint", two, ["--steps", "3", "--save-every", "3", "--keep", "2"], last),
        TrainerScenario("over a damaged one", over, ["--steps", "3", "--save-every", "3", "--keep", "1"], last),
        TrainerScenario("over a damaged one, without exchange", over,
                        ["--steps", "3", "--save-every", "3", "--keep", "1"], last, {"FAULT_NO_EXCHANGE": "1"}),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# prepare.py


def digest(out):
    """Every file of a finished preparation, but for an empty lock that stays where the very last removal fails."""
    return {
        os.path.relpath(os.path.join(d, n), out): hashlib.sha256(read_bytes(os.path.join(d, n))).hexdigest()
        for d, _, names in os.walk(out)
        for n in names
        if n != "lock"
    }


class PrepareScenario:
    name = "prepare.py"

    def __init__(self, folder):
        rng = random.Random(2)
        self.text, whole = os.path.join(folder, "text.jsonl"), os.path.join(folder, "prepared")
        with open(self.text, "w") as f:
            for _ in range(60):
                f.write(
                    json.dumps({"text": "".join(chr(97 + rng.randrange(26)) for _ in range(rng.randrange(100)))}) + "\n"
                )
            f.write("no json\n")
        must(self.arguments(whole))
        self.wanted, self.ended = digest(whole), set()

    def arguments(self, out):
        return [
            sys.executable, PREPARE, "text", self.text, "--tokenizer", "bytes", "--workers", "1", "--save-seconds", "0",
            "--shard-tokens", "1k", "--out", out,
        ]

    def count(self, faulty, folder):
        out, trace = os.path.join(folder, "count"), os.path.join(folder, "trace")
        done, calls = faulty.run(self.arguments(out), FAULT_UNDER=out, FAULT_TRACE=trace)
        if done.returncode:
            sys.exit("prepare.py without a fault: " + done.stderr)
        shutil.rmtree(out)
        return calls, taken(trace)

    def trial(self, faulty, out, at, kind):
        done, _ = faulty.run(self.arguments(out), at, kind, FAULT_UNDER=out)
        if kind in ("ENOSPC", "EIO"):
            self.ended.add(done.returncode)
        problem = ending(done, kind) or self.left(out, done) or self.restarted(out)
        return "prepare.py, %s at call %d: %s" % (kind, at, problem) if problem else ""

    def left(self, out, done):
        """What is wrong with what prepare.py said and with its files."""
        if "Traceback" in done.stderr:
            return "on stderr: " + done.stderr
        if done.returncode == 0 and digest(out) != self.wanted:
            return "it was content, but the files are others"
        published = os.path.exists(os.path.join(out, "manifest.json"))
        if published and clean([sys.executable, SHARDS, "verify", out]).returncode:
            return "published shards do not verify"
        return ""

    def restarted(self, out):
        again = clean(self.arguments(out))
        if again.returncode:
            return "the restart ends with %d: %s" % (again.returncode, again.stderr)
        others = sorted(set(digest(out).items()) ^ set(self.wanted.items()))
        return "other files after the restart: %s" % others if others else ""


# ---------------------------------------------------------------------------------------------------------------------
# The three commands


def room():
    """Where the files lie: in memory, where a kill costs no disk."""
    return tempfile.TemporaryDirectory(prefix="faults_", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def calls(o, verdict):
    with room() as folder:
        scenarios = trainer_scenarios(folder) if "trainer" in o.programs else []
        scenarios += [PrepareScenario(folder)] if "prepare" in o.programs else []
        for scenario in scenarios:
            began = time.time()
            n, trace = scenario.count(Faulty(folder), folder)
            verdict.check(out_of_order(scenario.name, trace) if n else scenario.name + ": no call was counted")
            every = 1 if o.long else max(1, n // 4)
            trials = [
                (at, kind) for k, kind in enumerate(KINDS) for at in range(1 + k * every // len(KINDS), n + 1, every)
            ]

            def one(trial):
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    try:
                        return scenario.trial(Faulty(own), os.path.join(own, "run"), *trial)
                    except subprocess.TimeoutExpired:
                        return "%s, %s at call %d: no end after %d s" % (scenario.name, trial[1], trial[0], TIMEOUT)

            with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
                for problem in pool.map(one, trials):
                    verdict.check(problem)
            # All of that holds of a run without a fault too.
            verdict.check("" if 1 in scenario.ended else "%s: no failing call ended it" % scenario.name)
            verdict.figures.append(
                "%s: %d calls, %d faults in %.0f s" % (scenario.name, n, len(trials), time.time() - began)
            )


def kills(o, verdict):
    """One run, killed and resumed again and again; it saves after each step: most kills come inside of a save."""
    began, rng = time.time(), random.Random(o.seed)
    with tempfile.TemporaryDirectory(prefix="kills_") as folder:
        trainer_data = os.path.join(folder, "x_train_000000.bin")
        write_shard(trainer_data, [rng.randrange(32) for _ in range(2000)])
        TrainerScenario.data = trainer_data
        out, whole = os.path.join(folder, "run"), os.path.join(folder, "whole")
        endless = TrainerScenario("", None, ["--steps", "1000000", "--save-every", "1", "--keep", "2"], {})
        inside, done, newest = 0, 0, -1
        env = environment()
        while done < o.count:
            child = subprocess.Popen(endless.arguments(out, os.path.exists(out)), env=env, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True)
            for line in child.stdout:  # from its first save on
                if line.startswith("saved"):
                    break
            time.sleep(rng.uniform(0, 0.03))
            child.send_signal(signal.SIGKILL)
            errors = child.communicate()[1]
            done += 1
            inside += bool(glob.glob(os.path.join(out, ".step-*")))
            good = newest_good(out)
            complete = all(not damage(path) for step, path in checkpoints(out).items() if step >= good)
            verdict.check(
                ""
                if good > newest and complete and not errors
                else "kill %d: newest good step %d, before %d, complete %s, stderr %r"
                % (done, good, newest, complete, errors)
            )
            newest = good
            if done % 100 == 0 or done == o.count:  # the same as a run that was never killed?
                must(
                    TrainerScenario(
                        "", None, ["--steps", str(newest), "--save-every", str(newest), "--keep", "1"], {}
                    ).arguments(whole, os.path.exists(whole))
                )
                same = contents(checkpoints(whole)[newest]) == contents(checkpoints(out)[newest])
                verdict.check(
                    ""
                    if same and not bad_log(out)
                    else "after %d kills step %d is another, or the log: %s" % (done, newest, bad_log(out))
                )
        verdict.check("" if inside else "no kill came inside of a save")
        verdict.figures.append(
            "%d kills, %d of them inside of a save, %d steps, %.0f s" % (done, inside, newest, time.time() - began)
        )


def memory(o, verdict):
    with room() as folder:
        data, out, lines = (os.path.join(folder, "x_train_000000.bin"), os.path.join(folder, "run"),
                            os.path.join(folder, "lines.jsonl"))
        rng = random.Random(1)
        write_shard(data, [rng.randrange(32) for _ in range(2000)])
        write_shard(data.replace("train", "val"), [rng.randrange(32) for _ in range(200)])
        TrainerScenario.data = data
        train = TrainerScenario(
            "", None, ["--steps", "1", "--val", data.replace("train", "val"), "--tokenizer", "toy"], {}
        )
        must(train.arguments(out, False))
        model = checkpoints(out)[1]
        with open(lines, "w") as f:
            f.write('{"context": "ab", "continuation": "cd"}\n')
        commands = {
            "train": lambda own: train.arguments(os.path.join(own, "new"), False),
            "train --resume": lambda own: train.arguments(shutil.copytree(out, os.path.join(own, "copy")), True),
            "train --init-from": lambda own: [
                TRAINER, "--init-from", model, "--train", data, "--out", os.path.join(own, "new"), "--steps", "1",
                "--seq-len", "16", "--batch-size", "2",
            ],
        }
        if "infer" in o.programs:
            commands["infer --prompt"] = lambda own: [INFER, model, "--quiet", "--prompt", "ab", "--max-tokens", "2"]
            commands["infer --score"] = lambda own: [INFER, model, "--quiet", "--score", lines]
            commands["infer --tokenize"] = lambda own: [INFER, "--tokenize", "--tokenizer", "toy"]
        for name, command in commands.items():
            began = time.time()
            with tempfile.TemporaryDirectory(dir=folder) as own:
                done, n = Faulty(folder).run(command(own), FAULT_MEMORY="1")
            if done.returncode or not n:
                sys.exit("%s without a fault: %d allocations, %s" % (name, n, done.stderr))
            numbers = range(1, n + 1) if o.long or n <= 20 else sorted({1 + k * (n - 1) // 19 for k in range(20)})

            def one(at):
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    trace = os.path.join(own, "trace")
                    done, _ = Faulty(own).run(command(own), at, "ENOMEM", FAULT_MEMORY="1", FAULT_TRACE=trace)
                    with open(trace) as f:
                        where = f.read().splitlines()[at - 1 : at]
                if done.returncode == 1 and done.stderr.count("\n") == 1 and re.match(r"\S+: .*memory", done.stderr):
                    return ""
                return "%s, allocation %d (%s): exit status %d, stderr %r" % (
                    name, at, where, done.returncode, done.stderr,
                )

            with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
                for problem in pool.map(one, numbers):
                    verdict.check(problem)
            verdict.figures.append(
                "%s: %d allocations, %d failed in turn, %.0f s" % (name, n, len(numbers), time.time() - began)
            )


def main():
    p = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("calls", "kills", "memory"))
    p.add_argument("--long", action="store_true", help="every call or allocation, not a sample")
    p.add_argument("--count", type=int, default=20, help="kills (20)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--jobs", type=int, default=2 * os.cpu_count())
    p.add_argument("--programs", default="trainer,infer,prepare", help="which of them (all)")
    o = p.parse_args()
    if not os.path.exists(LIBRARY):
        sys.exit("%s is missing: make build/faults.so" % LIBRARY)
    verdict = Verdict()
    {"calls": calls, "kills": kills, "memory": memory}[o.what](o, verdict)
    verdict.end()


if __name__ == "__main__":
    main()
