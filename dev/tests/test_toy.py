#!/usr/bin/env python3
"""Tests of data/toy_task.py: every sequence of its shards is taken apart and checked against the task's definition. And
dev/models/toy, which has learnt the task: infer_mta answers its questions, and its attention shows why.

python3 dev/tests/test_toy.py     (MTA_BIN: folder of infer_mta)
"""
import array
import collections
import contextlib
import filecmp
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
import zlib
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

from helpers import BIN, ROOT, main, read_bytes

SCRIPT = os.path.join(ROOT, "data", "toy_task.py")
INFER = os.path.join(BIN, "infer_mta")
MODEL = os.path.join(ROOT, "dev", "models", "toy")
sys.path.insert(0, os.path.join(ROOT, "data"))
import shards  # noqa: E402
import toy_task  # noqa: E402


def die_halfway():
    """Of a worker process: what it sends is announced as a thousand bytes, of which one comes."""
    def send(connection, _):
        os.write(connection.fileno(), struct.pack("!i", 1000) + b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    multiprocessing.connection.Connection._send_bytes = send


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


def read_shard(path):
    """Tokens and mask of a shard, its header checked word by word."""
    with open(path, "rb") as f:
        data = f.read()
    with open(path[:-4] + ".mask", "rb") as f:
        mask = f.read()
    header = array.array("i", data[:1024])
    tokens = array.array("H", data[1024:])
    assert list(header[:4]) == [20240520, 1, len(tokens), 32], list(header[:4])
    assert header[4] & 0xFFFFFFFF == zlib.crc32(data[1024:]) and header[5] == 1 and not any(header[6:])
    assert len(mask) == len(tokens)
    return list(tokens), list(mask)


def sequences(folder, split, length):
    """(tokens, mask) of every sequence of a split."""
    out = []
    for name in sorted(os.listdir(folder)):
        if f"_{split}_" in name and name.endswith(".bin"):
            tokens, mask = read_shard(os.path.join(folder, name))
            assert len(tokens) % length == 1, "one token follows the last window"
            assert tokens[-1] == 29 and mask[-1] == 0, "it is masked"
            out += [(tokens[i:i + length], mask[i:i + length]) for i in range(0, len(tokens) - 1, length)]
    return out


class Toy(unittest.TestCase):
    def check_sequence(self, tokens, mask, n, l, kind, blocks):
        """Takes one sequence apart; returns its prompt and the place of the matching block."""
        self.assertEqual(tokens[0], 29)
        end = tokens.index(30)
        self.assertEqual(tokens[end + 1:], [28] * (len(tokens) - end - 1))
        mark = tokens.index(27)
        body, tail = tokens[1:mark], tokens[mark + 1:end]
        self.assertEqual(len(body), blocks * (n + 1) - 1)
        self.assertEqual(body[n::n + 1], [26] * (blocks - 1))
        rows = [body[i:i + n] for i in range(0, len(body), n + 1)]
        for row in rows:
            self.assertEqual(len(set(row)), n)
            self.assertTrue(all(t < 26 for t in row))
        question, answer = tail[:l], tail[l:]
        self.assertEqual(len(set(question)), l)
        matches = [i for i, row in enumerate(rows) if set(question) <= set(row)]
        self.assertEqual(len(matches), 1)
        target = rows[matches[0]]
        self.assertEqual(answer, {"all": target, "first": target[:1], "last": target[-1:]}[kind])
        counted = range(mark + 1 + l, end + 1)
        self.assertEqual([i for i, m in enumerate(mask) if m], list(counted))
        return tuple(tokens[:mark + 1 + l]), matches[0]

    def check_task(self, n, l, kind, blocks, length, extra=()):
        with tempfile.TemporaryDirectory() as folder:
            done = run("--out", folder, "--n", n, "--l", l, "--kind", kind, "--blocks", blocks, "--train-samples", 3000,
                       "--test-samples", 300, "--seed", 3, *extra)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(f"--seq-len {length}", done.stdout)
            with open(os.path.join(folder, "toy_task.json")) as f:
                self.assertEqual(json.load(f)["length"], length)
            prompts, places = {}, collections.Counter()
            for split, count in (("train", 3000), ("val", 300)):
                rows = sequences(folder, split, length)
                self.assertEqual(len(rows), count)
                prompts[split] = []
                for tokens, mask in rows:
                    prompt, place = self.check_sequence(tokens, mask, n, l, kind, blocks)
                    prompts[split].append(prompt)
                    places[place] += 1
            self.assertFalse(set(prompts["train"]) & set(prompts["val"]), "training and test sets overlap")
            self.assertEqual(len(set(prompts["val"])), 300)
            if blocks > 1:  # the place is uniform: 3300 draws, five standard deviations
                expected = 3300 / blocks
                self.assertLess(max(abs(places[i] - expected) for i in range(blocks)), 5 * expected ** 0.5 + 1)
            self.assertFalse([name for name in os.listdir(folder) if "partial" in name])

    def test_two_at_once_and_numbers(self):
        with tempfile.TemporaryDirectory() as folder:
            with toy_task.locked(os.path.join(folder, ".toy.lock")):
                done = run("--out", folder, "--n", 2, "--blocks", 2, "--train-samples", 3, "--test-samples", 1)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
                self.assertIn("another toy_task.py is at work on toy there", done.stderr)
            self.assertEqual(os.listdir(folder), [])
        for option, value in (("--n", "1_0"), ("--seed", "1.5"), ("--jobs", "0")):
            done = run("--examples", 1, option, value)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)

    def test_another_preparation_of_the_name(self):
        """Shards of prepare.py, or of another task, are not written over; the same task again gives the same bytes."""
        small = ("--n", 2, "--blocks", 2, "--train-samples", 3, "--test-samples", 1)
        with tempfile.TemporaryDirectory() as folder:
            book, texts, tasks = (os.path.join(folder, x) for x in ("book.txt", "texts", "tasks"))
            with open(book, "w") as f:
                f.write("a line of text\n" * 99)
            prepare = [sys.executable, os.path.join(ROOT, "data", "prepare.py"), "text", book, "--name", "toy"]
            subprocess.run([*prepare, "--out", texts], check=True, capture_output=True)
            self.assertEqual(run("--out", tasks, *small).returncode, 0)
            for out, changes in ((texts, small), (tasks, (*small, "--seed", 2))):
                before = {name: read_bytes(os.path.join(out, name)) for name in os.listdir(out)}
                done = run("--out", out, *changes)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stdout + done.stderr)
                self.assertIn(f"{out} holds a preparation toy of other options", done.stderr)
                self.assertEqual({name: read_bytes(os.path.join(out, name)) for name in os.listdir(out)}, before)
            self.assertEqual(run("--out", tasks, *small).returncode, 0)
            self.assertEqual({name: read_bytes(os.path.join(tasks, name)) for name in os.listdir(tasks)}, before)

    def test_shards_that_no_manifest_lists(self):
        """A shard of the name, which trainers would read among the task's, is refused; what was not ended goes."""
        small = ("--n", 2, "--blocks", 2, "--train-samples", 3, "--test-samples", 1)
        with tempfile.TemporaryDirectory() as folder:
            strange, left = (os.path.join(folder, "toy_train_00000" + x) for x in ("1.bin", "2.bin.partial"))
            for path in (strange, left):
                with open(path, "w") as f:
                    f.write("somebody's")
            done = run("--out", folder, *small)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn(f"{strange} is there and in no manifest", done.stderr)
            self.assertEqual(len(os.listdir(folder)), 2)
            os.remove(strange)
            self.assertEqual(run("--out", folder, *small).returncode, 0)
            self.assertFalse(os.path.exists(left))

    def test_stopped_between_two_names(self):
        """Whenever it is stopped, the same command goes on: shards that it has put in place itself are its own."""
        small = ["--n", "2", "--blocks", "2", "--train-samples", "3", "--test-samples", "1"]
        rename, wanted = os.replace, None
        for stop in range(6):  # after so many files have got their names, of 5
            done = []

            def replace(source, target):
                if len(done) == stop:
                    raise KeyboardInterrupt
                rename(source, target)
                done.append(target)

            with tempfile.TemporaryDirectory() as folder:
                with unittest.mock.patch("os.replace", replace), contextlib.redirect_stdout(io.StringIO()), \
                        unittest.mock.patch("sys.argv", ["toy_task.py", *small, "--out", folder]), \
                        contextlib.suppress(KeyboardInterrupt):
                    toy_task.main()
                self.assertEqual(len(done), min(stop, 5))
                again = run(*small, "--out", folder)
                self.assertEqual((again.returncode, again.stderr), (0, ""), done)
                got = {name: read_bytes(os.path.join(folder, name)) for name in os.listdir(folder)}
            wanted = wanted or got
            self.assertEqual(got, wanted)

    def test_a_full_disk_is_said_with_its_place(self):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, SCRIPT, "--out", folder, "--train-samples", "99"]
            done = subprocess.run(words, capture_output=True, text=True,
                                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
            self.assertEqual((done.returncode, done.stderr), (1, f"toy_task.py: {folder}: File too large\n"))

    def ended_early(self, end, words=(), **more):
        """What is printed where end(process) is done once the training set is being written by two workers."""
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, SCRIPT, "--out", folder, "--jobs", "2", "--train-samples", "300000", *words]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                       start_new_session=True, **more)
            try:
                begun, late = os.path.join(folder, "toy_train_000000.bin.partial"), time.monotonic() + 60
                while not (os.path.exists(begun) and os.path.getsize(begun)) and time.monotonic() < late:
                    time.sleep(0.01)
                end(process)
                out, shown = process.communicate(timeout=60)
                self.assertEqual((process.returncode, out), (1, ""), shown)
                return shown.replace(folder, "FOLDER")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def test_an_end_while_workers_are_at_work(self):
        """They and their parent waited for each other, forever."""
        shown = self.ended_early(lambda process: os.killpg(process.pid, signal.SIGINT))
        self.assertEqual(shown, "toy_task.py: interrupted\n")
        limit = 4 << 20
        shown = self.ended_early(lambda process: None, ["--test-samples", "9"],
                                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        self.assertEqual(shown, "toy_task.py: FOLDER: File too large\n")

        def kill_a_worker(process):
            with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
                os.kill(int(f.read().split()[-1]), signal.SIGKILL)

        if os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            self.assertIn("a worker process died", self.ended_early(kill_a_worker))

    def test_a_worker_is_killed_while_it_hands_over_a_result(self):
        """The pool waited for the rest of it, forever, and so did toy_task.py and prepare.py."""
        for context in map(multiprocessing.get_context, ("fork", "spawn")):
            pool = ProcessPoolExecutor(2, mp_context=context, initializer=die_halfway)
            try:
                with self.assertRaises(BrokenProcessPool):
                    shards.outcome(pool, pool.submit(len, ""), 0.3)
            finally:
                pool.shutdown()

    def test_paper_sizes(self):
        self.check_task(5, 2, "all", 52, 321)
        self.check_task(8, 2, "last", 34, 1 + 34 * 9 - 1 + 1 + 2 + 1 + 1)

    def test_quickstart_size(self):
        self.check_task(4, 2, "first", 8, 45)

    def test_kinds_and_padding(self):
        self.check_task(4, 2, "all", 8, 60, ("--length", 60))
        self.check_task(4, 3, "last", 8, 46)
        self.check_task(14, 2, "first", 6, 1 + 89 + 1 + 2 + 1 + 1)
        self.check_task(5, 5, "all", 1, 1 + 5 + 1 + 5 + 5 + 1)

    def test_little_room(self):
        """Of one block of two letters there are only 1300 prompts: test and training set still do not overlap."""
        self.check_task(2, 2, "all", 1, 1 + 2 + 1 + 2 + 2 + 1)

    def test_defaults_fit_the_paper(self):
        self.assertEqual(toy_task.Task(5, 2, "all", 52).length, 321)
        self.assertLessEqual(toy_task.Task(8, 2, "all", 34).length, 321)
        done = run("--examples", 4, "--n", 8)
        self.assertEqual(done.returncode, 0)
        self.assertEqual([line.count(".") for line in done.stdout.splitlines()], [33] * 4)

    def test_seeds_jobs_and_shards(self):
        """The same seed gives the same bytes whatever the number of processes; another one shares no prompt; shards
        only cut."""
        with tempfile.TemporaryDirectory() as folder:
            names = {}
            for name, seed, jobs in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
                out = os.path.join(folder, name)
                self.assertEqual(run("--out", out, "--n", 4, "--blocks", 8, "--train-samples", 20001, "--test-samples",
                                     50, "--seed", seed, "--jobs", jobs).returncode, 0)
                names[name] = os.path.join(out, "toy_train_000000.bin")
            self.assertTrue(filecmp.cmp(names["a"], names["b"], shallow=False))
            a, c = (set(map(tuple, (s[0] for s in sequences(os.path.join(folder, x), "train", 48)))) for x in "ac")
            self.assertFalse(a & c)
            task, old = toy_task.Task(4, 2, "all", 8), toy_task.SHARD_TOKENS
            toy_task.SHARD_TOKENS = 48 * 100 + 1
            try:
                pairs = toy_task.take(task, toy_task.chunk_rng(task, 1, "x", 0), 250, set(), False)
                writer = toy_task.write_split(task, "x", [pairs[:130], pairs[130:]],
                                              os.path.join(folder, "s_train"), 250, False)
                writer.publish()
            finally:
                toy_task.SHARD_TOKENS = old
            self.assertEqual(list(writer.shards), [f"s_train_00000{i}.bin" for i in range(3)])
            want = [list(toy_task.finish(task, *pair)[0]) for pair in pairs]
            self.assertEqual([tokens for tokens, _ in sequences(folder, "train", 48)], want)

    def test_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            blocked = os.path.join(folder, "file")
            open(blocked, "w").close()
            for arguments, piece in (
                    (("--n", 0), "--n: got 0"), (("--n", 27), "--n: got 27"), (("--l", 6), "--l: got 6"),
                (("--blocks", 0), "--blocks: got 0"),
                    (("--n", 26), "every block holds every letter"),
                (("--length", 320), "--length: got 320, the sequences have 321"),
                    (("--n", 2, "--blocks", 1, "--test-samples", 1301), "found only 1300 of 1301"),
                    (("--n", 2, "--blocks", 1, "--test-samples", 1300, "--train-samples", 5), "found only 0 of 5"),
                    (("--train-samples", -1), "wanted 0 or more"), (("--kind", "some"), "--kind"),
                (("--seed", "x"), "--seed"), (("--out", blocked), "File exists"),
                    (("--name", "a/b"), "--name a/b: wanted"), (("--name", ""), "--name : wanted"),
                    (("--name", "a_train"), "wanted no _train")):
                out = () if "--out" in arguments else ("--out", os.path.join(folder, "x"))
                done = run(*out, *arguments)
                self.assertEqual(done.returncode, 1, (arguments, done.stdout, done.stderr))
                self.assertIn(piece, done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
            self.assertEqual(run().returncode, 1)


@unittest.skipUnless(os.path.exists(INFER), "infer_mta is not built")
class Trained(unittest.TestCase):
    def infer(self, *arguments, **more):
        done = subprocess.run([INFER, MODEL, *arguments, "--quiet"], capture_output=True, text=True, **more)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_answers(self):
        """200 questions, and a model that is small."""
        examples = run("--examples", 200, "--n", 4, "--blocks", 8, "--kind", "first", "--seed",
                       7).stdout.split("\n")[:200]
        pairs = [line.lstrip("^").rstrip("$").split(" ") for line in examples]
        prompts = "".join(json.dumps({"prompt": question, "temperature": 0, "max_tokens": 2}) + "\n"
                          for question, _ in pairs)
        answers = [json.loads(line)["text"] for line in self.infer("--prompts", "-", input=prompts).splitlines()]
        self.assertEqual(answers, [answer for _, answer in pairs])
        self.assertLess(sum(os.path.getsize(os.path.join(MODEL, name)) for name in os.listdir(MODEL)), 500_000)

    def test_attention_map(self):
        """The example of its README: the question's last letter looks at the letters t of the text, and through the
        convolution at the first letter of the block that also holds an e."""
        text = "txwy.tjmh.joyu.wnoi.aebt.nrdf.yzpb.pfvc#et"
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "map.json")
            self.infer("--prompt", text, "--attention-map", path, "--layer", "0", "--head", "1")
            with open(path) as f:
                found = json.load(f)
        answer = 1 + text.index("aebt")  # behind BOS
        self.assertEqual(found["tokens"][answer:answer + 4], list("aebt"))
        before, after = found["before"][-1], found["after"][-1]
        self.assertGreater(sum(w for w, t in zip(before, found["tokens"]) if t == "t"), 0.95)
        self.assertGreater(after[answer], 0.9)


if __name__ == "__main__":
    main()
