#!/usr/bin/env python3
"""data/evals.py: requests of each format, generated tasks checked by reading their stories again, the report's sums.

python3 dev/tests/test_evals.py
"""

import csv
import gzip
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import unittest
from unittest import mock

from helpers import BIN, ROOT, Folder, call, main, png_size, write_shard

sys.path.insert(0, os.path.join(ROOT, "data"))
import evals  # noqa: E402
import report  # noqa: E402

PLOTS = importlib.util.find_spec("matplotlib") is not None


def run(*args, status=0):
    done = call(evals, *map(str, args))
    said = done.stdout + done.stderr
    if done.returncode != status:
        raise AssertionError("exit status %d, wanted %d\n%s" % (done.returncode, status, said))
    return said


class Case(Folder):
    def write(self, name, records):
        with open(self.path(name), "w", encoding="utf-8") as f:
            for record in records:
                f.write((record if isinstance(record, str) else json.dumps(record)) + "\n")
        return self.path(name)

    def read(self, name):
        with open(self.path(name), encoding="utf-8") as f:
            return [json.loads(line) for line in f]

    def read_all(self, name):
        with open(self.path(name), encoding="utf-8") as f:
            return json.load(f)


class Formats(Case):
    def convert(self, record, *options, command="choice"):
        run(command, self.write("in.jsonl", [record]), "--out", self.path("out.jsonl"), *options)
        return self.read("out.jsonl")

    def test_lambada(self):
        self.assertEqual(
            self.convert({"text": "He came back to the old house ."}, command="lambada"),
            [{"context": "He came back to the old house", "continuation": " .", "task": "in", "item": 0}],
        )

    def test_hellaswag_as_the_evaluation_harness_cleans_it(self):
        got = self.convert(
            {
                "activity_label": "Roof",
                "ctx_a": "A man is [substeps] sitting.",
                "ctx_b": "he",
                "endings": ["a [title] b", "c", "d", "e"],
                "label": "2",
            }
        )
        self.assertEqual([g["continuation"] for g in got], [" a. b", " c", " d", " e"])
        self.assertEqual({(g["context"], g["gold"]) for g in got}, {("Roof: A man is sitting. He", 2)})

    def test_arc_in_both_forms(self):
        want = [
            ("Question: Q?\nAnswer:", " x", 0, 1),
            ("Question: Q?\nAnswer:", " y", 1, 1),
            ("Question: Q?\nAnswer:", " z", 2, 1),
        ]
        for record in (
            {
                "question": {"stem": "Q?", "choices": [{"text": t, "label": n} for t, n in zip("xyz", "123")]},
                "answerKey": "2",
            },
            {"question": "Q?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        ):
            self.assertEqual(
                [(g["context"], g["continuation"], g["choice"], g["gold"]) for g in self.convert(record)], want
            )

    def test_piqa_with_labels_beside_it(self):
        labels = self.write("labels.lst", ["1"])
        got = self.convert({"goal": "G", "sol1": "s", "sol2": "t"}, "--labels", labels)
        self.assertEqual(
            [(g["context"], g["continuation"], g["gold"]) for g in got],
            [("Question: G\nAnswer:", " s", 1), ("Question: G\nAnswer:", " t", 1)],
        )
        for label, out in ((1, 2), (-1, 2), ("", 2), (True, 2), ("0", 0), (False, 0), (0, 0)):  # its own is another
            own = self.write("own.jsonl", [{"goal": "G", "sol1": "s", "sol2": "t", "label": label}])
            shown = run("choice", own, "--out", self.path("o"), "--labels", labels, status=0 if out else 1)
            self.assertIn("%d requests" % out, shown)
        self.assertIn("own.jsonl:1: the record says choice 0, --labels says 1", shown)

        for label in ("1_0", "\u0661", "1.0"):
            with open(labels, "w") as f:
                f.write(label)
            self.assertIn("wanted a number a line", run("choice", self.path("in.jsonl"), "--out", self.path("o"),
                                                        "--labels", labels, status=1))

    def test_options_that_would_do_nothing(self):
        labels, out = self.write("labels.lst", ["1"]), self.path("o")
        passage = self.write("in.jsonl", [{"text": "He came back to the old house ."}])
        for words, why in ((["lambada", passage, "--format", "piqa"], "--format piqa: "),
                           (["lambada", passage, "--labels", labels], "in.jsonl:1: a passage has no choices"),
                           (["choice", passage, "--labels", labels], "in.jsonl:1: a passage has no choices"),
                           (["lambada", passage, "--labels", ""], '--labels: got ""'),
                           (["choice", passage, "--labels-from", "1"], "--labels-from: wanted --labels FILE beside it"),
                           (["choice", passage, "--task", ""], "--task: got ''")):
            self.assertIn(why, run(*words, "--out", out, status=1))
            self.assertFalse(os.path.exists(out))

    def test_others(self):
        self.assertEqual(
            self.convert({"passage": "P.", "question": "is it", "answer": True})[1]["continuation"], " yes"
        )
        got = self.convert(
            {"sentence": "The cup beat the ball because _ was large.", "option1": "it", "option2": "he", "answer": "2"}
        )
        self.assertEqual(
            [(g["context"][-10:], g["continuation"], g["gold"]) for g in got],
            [("because it", " was large.", 1), ("because he", " was large.", 1)],
        )
        self.assertEqual(
            self.convert(
                {"context": "C", "question": "q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}
            )[0]["gold"],
            2,
        )
        self.assertEqual(len(self.convert({"question": "2+2", "choices": list("abcdefghij"), "answer": 7})), 10)
        self.assertEqual(self.convert({"query": "q", "choices": ["no", "yes"], "gold": "yes"})[0]["gold"], 1)

    def test_prompts_of_the_evaluation_harness(self):
        """Those that other tests show no context of; dev/tests/test_lm_eval.py compares all with the harness itself."""
        choices = {"text": ["a", "b"], "label": ["A", "B"]}
        mmlu = {"question": " Q? ", "subject": "high_school_physics", "choices": ["3", "4", "5", "7"], "answer": "C"}
        for record, context, continuation, gold in (
            ({"question_stem": "The sun is", "choices": choices, "answerKey": " B"}, "The sun is", " b", 1),
            ({"id": "7-9", "answerKey": "B",
              "question": {"stem": "The sun", "choices": [{"text": t, "label": t.upper()} for t in "ab"]}},
             "The sun", " b", 1),
            ({"passage": "P", "question": "is it?", "label": 0}, "P\nQuestion: is it??\nAnswer:", " yes", 0),
            ({"context": "C.", "question": "q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"},
             "Q: C. q?\nA:", " c", 0),
            (
                mmlu,
                "The following are multiple choice questions (with answers) about high school physics.\n\n"
                "Q?\nA. 3\nB. 4\nC. 5\nD. 7\nAnswer:",
                " D",
                2,
            ),
        ):
            last = self.convert(record)[-1]
            self.assertEqual((last["context"], last["continuation"], last.get("gold")), (context, continuation, gold))
        shown = run("choice", self.write("in.jsonl", [mmlu]), "--out", self.path("o.jsonl"))
        self.assertIn("1 questions, 4 requests, 0 lines left out, as mmlu", shown)

    def test_records_that_the_harness_has_no_prompt_for(self):
        for record, why in (
            ({"endings": ["a", "b"], "ctx": "C", "label": 0}, "no field 'activity_label'"),
            ({"question": "Q", "subject": "", "choices": list("abcd"), "answer": 0}, "wanted a subject"),
            ({"question": "Q", "subject": "s", "choices": list("abc"), "answer": 0}, "4 choices, got 's' and 3"),
            ({"question": "Q", "choices": {"text": ["a", "b", "c"], "label": ["A", "A", "C"]}, "answerKey": "A"},
             "3 choices with the labels ['A', 'A', 'C'], wanted a label of its own"),
            ({"question": "Q", "choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}, "answerKey": "B"},
             "3 choices with the labels ['A', 'B']"),
            ({"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["a", "b"]}, "answerKey": "B"},
             "answerKey is B, wanted one of the labels ['a', 'b']"),  # as a data set on the hub had them
            ({"text": "word"}, "a text of several words"),
            ({"text": "it ends in a blank "}, "that ends with a word"),
        ):
            path = self.write("in.jsonl", [record])
            self.assertIn(why, run("choice", path, "--out", self.path("o.jsonl"), status=1))

    def test_answers_and_choices_that_are_none(self):
        """Refused as a whole: no half question joins the next one, no number is cut to a whole one."""
        good = {"context": "Q:", "choices": ["a", "b"], "gold": 1}
        mmlu = {"question": "q", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 2}
        piqa = {"goal": "G", "sol1": "s", "sol2": "t", "label": 0}
        bad = [
            dict(good, gold=1.7), dict(mmlu, answer=2.5), dict(mmlu, choices=["a", None, "c", "d"]),
            dict(piqa, sol2=""), {"sentence": "The _ is x.", "option1": "a", "option2": "b", "answer": 1.5},
            {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": 2.5},
            dict(good, choices=[]), dict(good, choices=["a"], gold=0),
            dict(activity_label="A", ctx_a="a", ctx_b="b", endings=[], label=0),
            dict(good, choices={"text": ["a", "b"], "label": ["A", "B"]}),
            dict(good, context="\ud800"), dict(good, choices=["1", "0"], gold="1"), dict(good, gold="0_1"),
            '{"context": "c", "choices": ["a", "b"], "gold": 0, "x": ' + "[" * 100000 + "]" * 100000 + "}",
        ]  # fmt: skip
        path = self.write("in.jsonl", [line for record in bad for line in (record, good)])
        shown = run("choice", path, "--out", self.path("o.jsonl"))
        for i in range(len(bad)):
            self.assertIn("%s:%d: " % (path, 2 * i + 1), shown)
        requests = self.read("o.jsonl")
        self.assertEqual([(r["item"], r["choice"]) for r in requests],
                         [(i, c) for i in range(len(bad)) for c in (0, 1)])
        self.assertIn("the input itself", run("choice", path, "--out", path, status=1))
        text = self.write("text.txt", ["Some words. "])
        self.assertIn("the input itself", run("needle", "--text", text, "--out", text, status=1))
        self.assertIn("the input itself", run("babilong", "--text", text, "--out", text, status=1))
        self.assertIn("the input itself", run("report", path, text, "--csv", path, status=1))

    def test_byte_order_marks(self):
        """As editors of other systems write them, and Project Gutenberg's books have them."""
        mark, record = "\ufeff", '{"goal": "G", "sol1": "s", "sol2": "t"}'
        labels = self.write("labels.txt", [mark + "1"])
        got = self.convert(mark + record, "--labels", labels, "--on-bad", "refuse")
        self.assertEqual([g["gold"] for g in got], [1, 1])
        book = self.write("book.txt", [mark + "It was late. " * 40])
        run("needle", "--text", book, "--samples", "1", "--length", "500", "--out", self.path("n.jsonl"))
        self.assertNotIn("\\ufeff", ascii(self.read("n.jsonl")))
        scores = self.write("s.jsonl", [mark + '{"logprob": -1, "tokens": 1, "greedy": true}'] +
                            ['{"logprob": -2, "tokens": 1, "greedy": true}'])
        requests = self.write("r.jsonl", [(mark if i == 0 else "") + json.dumps(g) for i, g in enumerate(got)])
        self.assertRegex(run("report", requests, scores), r"(?m)^in +1 ")

    def test_a_file_of_another_kind(self):
        """Is named, and nothing takes the place of requests that are there."""
        out = self.write("o.jsonl", [{"mine": 1}])
        for name, data, said in (("x.parquet", b"PAR1\n\xff", "x.parquet: parquet, wanted JSON lines"),
                                 ("x.jsonl", gzip.compress(b"{}\n"), "x.jsonl: gzip data, wanted JSON lines"),
                                 ("y.jsonl", b'{"body": 1}\n', "y.jsonl: 0 requests of 1 lines, ")):
            with open(self.path(name), "wb") as f:
                f.write(data)
            self.assertIn(said, run("choice", self.path(name), "--out", out, status=1))
            self.assertEqual(self.read("o.jsonl"), [{"mine": 1}])

    def test_a_passage_with_choices_of_its_own(self):
        """Is no question of BoolQ, whose answers are yes and no; of two texts before the choices none is left out."""
        record = {"question": "Which?", "choices": ["red", "blue"], "answer": 1}
        arc = {"text": ["a", "b"], "label": "AB"}
        for key, other in (("passage", {}), ("context", {}), ("article", {}),
                           ("context", {"subject": "colours", "choices": ["red", "blue", "green", "grey"]}),
                           ("passage", {"answerKey": "B", "choices": arc})):
            shown = run("choice", self.write("race.jsonl", [dict(record, **{key: "p"}, **other)]), "--out",
                        self.path("o"), status=1)
            self.assertIn("race.jsonl:1: %s and question: one of them would be left out" % key, shown)
        for key in ("passage", "context"):  # a blank one is none, and no passage goes without its question
            self.assertEqual(self.convert(dict(record, **{key: " "}))[1]["context"], "Which?")
        shown = run("choice", self.write("race.jsonl", [dict(record, passage="p", question=" ")]), "--out",
                    self.path("o"), status=1)
        self.assertIn("race.jsonl:1: no context", shown)

    def test_bad_lines_are_named(self):
        path = self.write(
            "in.jsonl",
            [
                "{broken",
                {"goal": "G", "sol1": "s", "sol2": "t", "label": 5},
                {"x": 1},
                {"goal": "G", "sol1": "s", "sol2": "t", "label": 0},
                '{"goal": "G", "sol1": "s", "sol1": "r", "sol2": "t", "label": 0}',
                {"text": "a good film", "label": 1},
            ],
        )
        shown = run("choice", path, "--out", self.path("o.jsonl"))
        for number, why in ((1, ""), (2, "gold is 5, wanted one of the 2 choices"), (3, "no format that is known"),
                            (5, "the key sol1 occurs twice"), (6, "no format that is known: it has label, text")):
            self.assertIn("%s:%d: %s" % (path, number, why), shown)
        self.assertIn("1 questions, 2 requests, 5 lines left out", shown)
        self.assertIn("in.jsonl:1", run("choice", path, "--out", self.path("p.jsonl"), "--on-bad", "refuse", status=1))
        self.assertFalse(os.path.exists(self.path("p.jsonl")))
        self.assertIn("--task: '\\udce9' is not UTF-8", run("choice", path, "--out", self.path("p.jsonl"), "--task",
                                                             "\udce9", status=1))


def solve(story, question):
    """Answers a question from the sentences alone, read once more from the text."""
    place, holder, trail, gifts, sides = {}, {}, {}, [], []
    for sentence in story:
        words = sentence.rstrip(".").split()
        if re.match(r"The \w+ is (north|south|east|west) of the", sentence):
            sides.append((words[1], words[3], words[6]))
        elif re.search(r" (gave|handed|passed) the \w+ to ", sentence):
            gifts.append((words[0], words[3], words[5]))
        elif re.search(r" (went|moved|journeyed|travelled)( back)? to the ", sentence):
            place[words[0]] = words[-1]
            for thing in [t for t, h in holder.items() if h == words[0]]:
                trail[thing].append(words[-1])
        elif re.search(r" (picked up|grabbed|got|took) the ", sentence):
            holder[words[-1]] = words[0]
            rooms = trail.setdefault(words[-1], [])
            if words[0] in place and rooms[-1:] != [place[words[0]]]:
                rooms.append(place[words[0]])
        elif re.search(r" (dropped|put down|discarded|left) the ", sentence):
            holder.pop(words[-1])
    words = question.rstrip("?").split()
    if words[:2] == ["Where", "was"]:
        rooms = trail[words[3]]
        at = max(i for i, r in enumerate(rooms) if r == words[-1])
        return rooms[at - 1]
    if words[:3] == ["Where", "is", "the"]:
        return trail[words[3]][-1]
    if words[0] == "Where":
        return place[words[2]]
    if words[0] == "What" and words[-1] == "of":
        opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
        return next(a for a, way, b in sides if b == words[3] and way == opposite[words[4]])
    if words[:2] == ["What", "is"]:
        return next(a for a, way, b in sides if b == words[-1] and way == words[2])
    for giver, thing, taker in reversed(gifts):
        if words[:2] == ["What", "did"] and (giver, taker) == (words[2], words[5]):
            return thing
        if words[:2] == ["Who", "gave"] and thing == words[3] and (len(words) == 4 or taker == words[5]):
            return giver
        if words[:2] == ["Who", "did"] and (giver, thing) == (words[2], words[5]):
            return taker
        if words[:2] == ["Who", "received"] and thing == words[3]:
            return taker
    raise AssertionError(question)


class Generated(Case):
    def book(self):
        rng = random.Random(1)
        with open(self.path("book.txt"), "w") as f:
            for i in range(3000):
                f.write(
                    "Sentence %d of the dull %s ends here%s"
                    % (i, rng.choice(["novel", "history", "manual"]) * rng.randrange(1, 3),
                       rng.choice([". ", "!\n", "?\n\n"]))
                )
        return self.path("book.txt")

    def test_questions_have_the_answer_that_the_story_gives(self):
        for task, make in evals.TASKS.items():
            rng, seen = random.Random(task), set()
            for _ in range(3000):
                facts, question, answer, answers = make(rng)
                self.assertEqual(solve(facts, question), answer, (facts, question))
                self.assertIn(answer, answers)
                seen.add(answer)
            self.assertEqual(seen, set(answers) if task != 5 else {*evals.GIVERS, *evals.THINGS})

    def test_babilong(self):
        book = self.book()
        for name in ("a.jsonl", "b.jsonl"):
            run("babilong", "--text", book, "--samples", "20", "--distraction", "0,500,4000", "--out", self.path(name),
                "--seed", "3")
        requests = self.read("a.jsonl")
        self.assertEqual(requests, self.read("b.jsonl"))
        items = {}
        for r in requests:
            items.setdefault(r["item"], []).append(r)
        self.assertEqual(len(items), 5 * 3 * 20)
        for choices in items.values():
            r = choices[choices[0]["gold"]]
            story, question = re.match(r"(?s)(.*)\nQuestion: (.*)\nAnswer:$", r["context"]).groups()
            sentences = re.split(r"(?<=[.!?]) ", story)
            facts = [s for s in sentences if not s.startswith("Sentence ")]
            self.assertEqual(" " + solve(facts, question), r["continuation"])
            noise = sum(len(s) + 1 for s in sentences if s.startswith("Sentence "))
            self.assertTrue(noise <= r["distraction"] and noise > r["distraction"] - 100, (noise, r["distraction"]))

    def test_needle(self):
        run("needle", "--text", self.book(), "--samples", "5", "--length", "1000,2k", "--out", self.path("n.jsonl"))
        requests = self.read("n.jsonl")
        self.assertEqual(len(requests), 5 * 2 * 5 * 5)
        for r in requests:
            facts = dict(re.findall(r"The secret number of (\w+) is (\d+)\.", r["context"]))
            asked = re.search(r"What is the secret number of (\w+)\?", r["context"])[1]
            self.assertEqual((len(facts), " " + facts[asked]), (r["needles"], r["continuation"]))
            size = len(r["context"]) + 1
            self.assertTrue(r["length"] - 100 < size <= r["length"], (size, r["length"]))
            depth = r["context"].index("number of %s is" % asked) / r["context"].index("Question:")
            self.assertTrue(abs(depth - r["depth"] / 100) < 0.13, (depth, r["depth"]))

    def test_depth_counts_tokens(self):
        """Not sentences, of which a text may have long ones together."""
        with open(self.path("uneven.txt"), "w") as f:
            f.write(("Short one. " * 40 + "A sentence of the longer kind that goes on and on. " * 20) * 9)
        run("needle", "--text", self.path("uneven.txt"), "--needles", "2", "--length", "2000", "--samples", "20",
            "--out", self.path("n.jsonl"))
        for r in self.read("n.jsonl"):
            asked = re.search(r"What is the secret number of (\w+)\?", r["context"])[1]
            fact = re.search(r"The secret number of %s is \d+\. ?" % asked, r["context"])
            depth = 100 * fact.start() / (r["context"].index("Question:") - len(fact[0]))
            self.assertLess(abs(depth - r["depth"]), 2.5, r["context"])

    def test_a_full_disk_leaves_what_was_there(self):
        command = [sys.executable, os.path.join(ROOT, "data", "evals.py"), "babilong", "--distraction", "0", "--out",
                   self.path("q.jsonl"), "--tasks", "1", "--samples"]
        subprocess.run([*command, "2"], check=True, capture_output=True)
        before = self.read("q.jsonl")
        done = subprocess.run([*command, "99"], capture_output=True, text=True,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
        self.assertEqual((done.returncode, done.stderr), (1, "evals.py: %s: File too large\n" % self.path("q.jsonl")))
        self.assertEqual((self.read("q.jsonl"), os.listdir(self.folder)), (before, ["q.jsonl"]))
        os.mkdir(self.path("folder"))
        self.write("folder.tmp", [])
        self.assertIn("folder: Is a directory", run("babilong", "--distraction", "0", "--out", self.path("folder"),
                                                    status=1))
        self.assertTrue(os.path.exists(self.path("folder.tmp")), "somebody's file that is called so")
        done = subprocess.run([*command[:-4], "/dev/stdout", *command[-3:], "2"], check=True, capture_output=True)
        self.assertEqual([json.loads(line) for line in done.stdout.splitlines()[:-1]], before)

    def test_a_text_that_is_repeated_is_said(self):
        with open(self.path("short.txt"), "w") as f:
            f.write("A sentence of some words. Another one of them. ")
        command = ("babilong", "--text", self.path("short.txt"), "--samples", "2", "--out", self.path("s.jsonl"))
        shown = run(*command, "--distraction", "0,40,100,200")
        self.assertEqual(shown.count("the text has 2 sentences: it is repeated to make 100 tokens"), 1, shown)
        self.assertEqual(shown.count("repeated"), 1, shown)
        self.assertNotIn("repeated", run(*command, "--distraction", "0,40"))

    def test_a_text_of_long_sentences_is_said(self):
        """A text without full stops, or with those of another script, is one sentence: nothing of it is taken."""
        for text, few in (("walks over the river " * 500, True), ("\u6211\u4eec\u56de\u5bb6\u3002" * 900, True),
                          ("He walks over the river. " * 500, False)):
            with open(self.path("long.txt"), "w", encoding="utf-8") as f:
                f.write(text)
            for command in (("needle", "--needles", "2", "--length", "2000", "--depth", "50"),
                            ("babilong", "--tasks", "1", "--distraction", "2000")):
                shown = run(*command, "--text", self.path("long.txt"), "--samples", "2", "--out", self.path("l.jsonl"))
                self.assertEqual("2000 tokens: a question has but " in shown, few, shown)

    def test_room(self):
        """Settings that do not fit a model's positions are named and left out; where none fits it is refused."""
        book, out = self.book(), self.path("r.jsonl")
        shown = run("needle", "--text", book, "--samples", "3", "--length", "500,1000", "--room", "1024", "--out", out)
        self.assertIn("10 needles in 500 tokens: left out: --length 500: 10 needles and the question alone have", shown)
        requests = self.read("r.jsonl")
        self.assertEqual([r["item"] for r in requests], list(range((5 + 4) * 5 * 3)))
        self.assertEqual({r["length"] for r in requests if r["needles"] == 10}, {1000})
        shown = run("babilong", "--text", book, "--samples", "30", "--distraction", "0,256", "--room", "1024",
                    "--out", out)
        requests = self.read("r.jsonl")
        longest = {}
        for r in requests:
            need = len((r["context"] + r["continuation"]).encode())  # with BOS, without the last
            longest[r["task"], r["distraction"]] = max(need, longest.get((r["task"], r["distraction"]), 0))
        self.assertLessEqual(max(longest.values()), 1024)
        left_out = {(m[1], int(m[2])) for m in re.finditer(r"(qa\d) within (\d+) tokens: left out", shown)}
        self.assertEqual((len(left_out) + len(longest), left_out & set(longest)), (10, set()))
        self.assertTrue(left_out and ("qa3", 256) in left_out, shown)
        self.assertEqual(sorted({r["item"] for r in requests}), list(range(30 * len(longest))))
        shown = run("babilong", "--text", book, "--samples", "2", "--room", "9", "--out", out, status=1)
        self.assertRegex(shown, r"--room 9: no setting fits; the shortest needs \d+")

    def test_refusals(self):
        self.assertIn("no text to distract with", run("babilong", "--out", self.path("x"), "--samples", "1", status=1))
        self.assertIn(
            "alone have", run("needle", "--text", self.book(), "--length", "50", "--out", self.path("x"), status=1)
        )
        self.assertIn("wanted 1 to 5", run("babilong", "--tasks", "6", "--out", self.path("x"), status=1))
        self.assertIn("invalid choice: 'gpt5'", run("needle", "--pattern", "gpt5", "--out", self.path("x"), status=1))
        for n in ("0", "-1", "1.5"):
            self.assertIn("from 1", run("needle", "--samples=" + n, "--out", self.path("x"), status=1))
        self.assertIn("each once", run("needle", "--needles", "2,4,2", "--out", self.path("x"), status=1))
        self.assertIn("No such file", run("needle", "--text", self.path("none"), "--out", self.path("x"), status=1))


class Report(Case):
    def test_arithmetic(self):
        choices = [
            {"context": "c", "continuation": t, "task": "t", "item": i, "choice": c, "gold": 1}
            for i in range(2)
            for c, t in enumerate((" a", " bbbb", " cc"))
        ]
        logprobs = [-1.0, -2.0, -3.0, -9.0, -4.0, -5.0]  # first: raw says a, per byte says b; second: b either way
        words = [{"context": "c", "continuation": " w", "task": "l", "item": i} for i in range(2)]
        requests = self.write("r.jsonl", choices)
        scores = self.write("s.jsonl", [{"logprob": x, "tokens": 2, "greedy": x == -4.0} for x in logprobs])
        more = self.write("r2.jsonl", words)
        less = self.write(
            "s2.jsonl",
            [{"logprob": -1.0, "tokens": 1, "greedy": True}, {"logprob": -2.0, "tokens": 3, "greedy": False}],
        )
        shown = run("report", requests, scores, more, less, "--json", self.path("j"))
        with open(self.path("j")) as f:
            rows = json.load(f)
        t, word = rows["t"], rows["l"]
        self.assertEqual(
            (t["questions"], t["accuracy"], t["acc_norm"], t["acc_token"], t["greedy"]), (2, 0.5, 1.0, 0.5, 0.5)
        )
        self.assertAlmostEqual(t["perplexity"], math.exp(3))
        self.assertAlmostEqual(word["perplexity"], math.exp(1.5))
        self.assertAlmostEqual(word["token_ppl"], math.exp(0.75))
        self.assertEqual(word["accuracy"], 0.5)
        self.assertRegex(shown, r"(?m)^t +2 +0\.5000 ")

    def test_length_of_a_choice(self):
        """acc_norm counts characters, acc_bytes bytes, neither the space before the choice; of equal ones the first is
        taken, as the harness does it."""
        for texts, logprobs, want in (
            ((" \u00e9\u00e9\u00e9\u00e9", " abcdef"), (-4.0, -5.4), (1.0, 0.0, 1.0)),
            ((" ab", " abcd"), (-2.0, -3.9), (1.0, 0.0, 0.0)),
            ((" ab ", " abcd"), (-2.7, -3.9), (1.0, 1.0, 1.0)),  # a blank at its end is part of a choice
            ((" a", " b"), (-1.0, -1.0), (1.0, 1.0, 1.0)),
        ):
            requests = [
                {"context": "c", "continuation": t, "task": "t", "item": 0, "choice": c, "gold": 0}
                for c, t in enumerate(texts)
            ]
            scores = [{"logprob": x, "tokens": 1, "greedy": False} for x in logprobs]
            files = self.write("r.jsonl", requests), self.write("s.jsonl", scores)
            run("report", *files, "--json", self.path("j"))
            with open(self.path("j")) as f:
                row = json.load(f)["t"]
            self.assertEqual((row["accuracy"], row["acc_norm"], row["acc_bytes"]), want, texts)

    def test_refusals(self):
        requests = self.write("r.jsonl", [{"continuation": "x", "task": "t", "item": i} for i in (0, 1)])
        one = self.write("s.jsonl", [{"logprob": -1.0, "tokens": 1, "greedy": True}])
        self.assertIn("2 requests", run("report", requests, one, status=1))
        self.assertIn(":1: no logprob", run("report", requests, self.write("b.jsonl", [{}] * 2), status=1))
        self.assertIn(
            "no number",
            run("report", requests, self.write("n.jsonl", [{"logprob": None, "tokens": 1, "greedy": True}] * 2),
                status=1),
        )
        two = self.write("s2.jsonl", [{"logprob": -1.0, "tokens": 1, "greedy": True}] * 2)
        hopeless = self.write("s3.jsonl", [{"logprob": -9e3, "tokens": 1, "greedy": False}] * 2)
        run("report", requests, hopeless, "--json", self.path("j"))
        self.assertEqual(self.read_all("j")["t"]["perplexity"], None)  # JSON has no infinity
        self.assertIn("no/j: No such file", run("report", requests, two, "--json", self.path("no/j"), status=1))
        self.assertIn("broken JSON", run("report", requests, self.write("x.jsonl", ["{"]), status=1))
        with open(self.path("y.jsonl"), "wb") as f:
            f.write(b"\n\xff\xfe{\n")
        self.assertIn("y.jsonl:2: broken JSON: 'utf-8'", run("report", self.path("y.jsonl"), one, status=1))
        for change in ({"greedy": "no"}, {"tokens": None}):
            wrong = self.write("w.jsonl", [dict({"logprob": -1.0, "tokens": 1, "greedy": True}, **change)] * 2)
            self.assertIn("w.jsonl:1: wanted a number of tokens", run("report", requests, wrong, status=1))
        whole = [{"continuation": "x", "task": "t", "item": 0, "choice": c, "gold": 1} for c in (0, 1)]
        for change in ({"item": [0]}, {"task": 1}, {"continuation": None}, {"choice": "0"}):
            odd = self.write("odd.jsonl", [dict(record, **change) for record in whole])
            self.assertIn("odd.jsonl:1: wanted texts as continuation and task", run("report", odd, two, status=1))
        self.assertIn("r.jsonl: given twice", run("report", requests, two, requests, two, status=1))
        same = self.write("same.jsonl", self.read("r.jsonl"))  # another model's copy of the questions is no second part
        shown = run("report", requests, two, same, two, status=1)
        self.assertRegex(shown, r"same.jsonl: item 0 is asked in .*/r.jsonl too and would count twice; for several")
        part = self.write("part.jsonl", [{"continuation": "y", "task": "t", "item": i} for i in (0, 1)])
        run("report", requests, two, part, two, "--json", self.path("j"))
        self.assertEqual(self.read_all("j")["t"]["questions"], 4)
        without = [{k: v for k, v in r.items() if k != "gold"} for r in whole]
        for half in (whole[:1] * 2, [dict(r, gold=2) for r in whole], [dict(r, gold=1.0) for r in whole], without,
                     [dict(r, gold=r["choice"]) for r in whole]):
            self.assertIn("not whole", run("report", self.write("h.jsonl", half), two, status=1))
        three = self.write("s4.jsonl", [{"logprob": -1.0, "tokens": 1, "greedy": True}] * 3)
        alone = {"continuation": "x", "task": "t", "item": 1}
        for mixed in ([alone] + whole, whole + [alone]):
            self.assertIn("task t has questions with choices and without",
                          run("report", self.write("m.jsonl", mixed), three, status=1))

    def evaluation(self, name, right, losses):
        """A folder as scripts/evaluate.sh leaves it: needles of which the share right[needles, length, depth] of 10 is
        found, BabiLong, a passage."""
        folder = self.path(name)
        os.makedirs(os.path.join(folder, "validation"))
        needles, scores = [], []
        for (n, length, depth), share in right.items():
            for i in range(10):
                setting = {"needles": n, "length": length, "depth": depth}
                needles.append(dict(context="c", continuation=" 1", task="needle", item=len(needles), **setting))
                scores.append({"logprob": -1.0, "tokens": 2, "greedy": i < 10 * share})
        self.write(name + "/needle.jsonl", needles)
        self.write(name + "/needle.scores", scores)
        stories = [
            {"context": "c", "continuation": " " + w, "task": "qa%d" % t, "item": 10 * t + k, "distraction": d,
             "choice": c, "gold": 0}
            for t in (1, 2)
            for k, d in enumerate((0, 1000, 200))
            for c, w in enumerate("ab")
        ]
        self.write(name + "/babilong.jsonl", stories)
        self.write(name + "/babilong.scores",
                   [{"logprob": -1.0 * r["choice"], "tokens": 1, "greedy": False} for r in stories])
        self.write(name + "/lambada.jsonl", [{"context": "c", "continuation": " w", "task": "lambada|x", "item": 0}])
        self.write(name + "/lambada.scores", [{"logprob": -1.0, "tokens": 1, "greedy": True}])
        events = [dict(event="val", step=1, name=s, loss=x, perplexity=math.exp(x), tokens=5)
                  for s, x in losses.items()]
        self.write(name + "/validation/log.jsonl",
                   [{"event": "start", "step": 1}] + events + [{"event": "stop", "step": 1}])
        return folder

    def test_names_with_an_equals_sign_and_outputs(self):
        """NAME=FOLDER where either may hold a "="; nothing is written over what the report is made from, or twice."""
        folder = self.evaluation("lr=3", {(2, 1000, 0): 0.5}, {"c4": 1.5})
        for given, name in ((folder, "lr=3"), ("lr=1e-3=" + folder, "lr=1e-3"), ("x=" + folder, "x")):
            shown = run("report", given, "--csv", self.path("o.csv"))
            with open(self.path("o.csv")) as f:
                self.assertEqual({line.split(",")[0] for line in f.read().splitlines()[1:]}, {name}, shown)
        run("report", "\udce9=" + folder, "--csv", self.path("o.csv"), "--markdown", self.path("o.md"))
        with open(self.path("o.csv")) as f:  # a name that is not UTF-8
            self.assertEqual({line.split(",")[0] for line in f.read().splitlines()[1:]}, {"\\udce9"})
        for own in ("needle.jsonl", "needle.scores", "validation/log.jsonl"):
            path = os.path.join(folder, own)
            self.assertIn("the input itself", run("report", "x=" + folder, "--json", path, status=1))
        shown = run("report", folder, "--json", self.path("o"), "--csv", self.path("o"), status=1)
        self.assertIn("o: named for two outputs", shown)

    def test_tables_of_several_models(self):
        """Depths and lengths are numbers, means are over depths, the best of a column is bold, CSV has everything,
        pictures are drawn."""
        depths, right = (0, 5, 100), {}
        for n, length, depth in ((n, length, d) for n in (2, 10) for length in (1000, 200) for d in depths):
            right[n, length, depth] = 0.5 if length == 200 else depth / 100
        a = self.evaluation("a", right, {"arxiv": 1.0, "book": 2.0})
        b = self.evaluation("b", dict(right, **{}), {"arxiv": 1.5, "book": 1.9})
        worse = self.evaluation("c", {k: v / 2 if k[0] == 2 else v for k, v in right.items()}, {"arxiv": 1.5})
        shown = run("report", "x=" + a, b, "--csv", self.path("r.csv"), "--json", self.path("r.json"))
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")]
        self.assertIn(["model", "arxiv", "book", "mean"], cells)
        mean = [(math.exp(p) + math.exp(q)) / 2 for p, q in ((1.0, 2.0), (1.5, 1.9))]
        self.assertIn(["x", "**2.72**", "7.39", "**%.2f**" % mean[0]], cells)
        self.assertIn(["b", "4.48", "**6.69**", "%.2f" % mean[1]], cells)
        self.assertIn(["needles", "model", "0%", "5%", "100%", "mean"], cells)
        self.assertLess(shown.index("haystack of 200 tokens"), shown.index("haystack of 1000 tokens"))
        self.assertIn(["x", "**50.0**", "**50.0**", "**50.0**"], cells)  # of equal ones all
        self.assertIn(["x", "**36.7**", "**36.7**", "**36.7**"], cells)  # (0 + 10 + 100) / 3: 5% of 10 is one of them
        self.assertIn(["task", "model", "0", "200", "1000", "mean"], cells)
        self.assertIn("lambada\\|x: perplexity", shown)
        for block in shown.split("\n\n"):
            self.assertEqual(len({len(line) for line in block.splitlines() if line.startswith("|")} | {0}) - 1,
                             int(block.startswith("|")))
        flat = [line.split("  ")[0] for line in shown.splitlines() if line.startswith("needle,")]
        self.assertEqual(flat[:4], ["needle, needles 2, length 200, depth %d" % d
                                    for d in depths] + ["needle, needles 2, length 1000, depth 0"])
        with open(self.path("r.csv"), newline="") as f:
            rows = list(csv.DictReader(f))
        found = [r for r in rows if (r["model"], r["needles"], r["length"], r["depth"]) == ("x", "10", "1000", "5")]
        self.assertEqual([(float(r["accuracy"]), r["questions"]) for r in found], [(0.1, "10")])
        self.assertEqual([r["loss"] for r in rows if r["task"] == "validation book"], ["2.0", "1.9"])
        with open(self.path("r.json")) as f:
            rows = json.load(f)
        self.assertEqual(list(rows), ["x", "b"])
        self.assertEqual(rows["b"]["validation book"], {"perplexity": math.exp(1.9), "loss": 1.9, "tokens": 5})
        self.assertNotIn("same questions", shown)
        self.write("c/lambada.jsonl", [{"context": "d", "continuation": " w", "task": "lambada|x", "item": 0}])
        self.write("c/needle.jsonl", [dict(r, item=r["item"] + 1000) for r in self.read("c/needle.jsonl")])
        cells = run("report", a, worse)
        self.assertIn("\n\nNot all models were asked the same questions: lambada|x.\n", cells)
        self.assertRegex(cells, r"(?m)^\| c +\| +4\.48 \| +- \| +- \|$")  # a mean over other sets would not compare
        self.assertRegex(cells, r"(?m)^\| 2 +\| c +\| +30\.0 \|")
        self.assertIn("no folder", run("report", a, self.path("r.csv"), status=1))
        self.assertIn("NAME=FOLDER", run("report", a, a, status=1))
        self.assertIn("no NAME.scores", run("report", self.folder, status=1))

    def test_sets_of_one_name(self):
        """Two sets that came as test.jsonl are one task of the report, which says so."""
        for i, name in enumerate(("arc", "piqa")):
            self.write(name + ".jsonl", [{"context": name, "continuation": " a", "task": "test", "item": 0}])
            self.write(name + ".scores", [{"logprob": -1.0, "tokens": 1, "greedy": True}])
            shown = run("report", self.folder) if i else run("report", *map(self.path, ("arc.jsonl", "arc.scores")))
            self.assertEqual("test has the questions of arc.jsonl, piqa.jsonl together" in shown, i == 1, shown)
        os.mkdir(self.path("arc"))
        other = [shutil.copy(self.path("piqa" + end), self.path("arc", "arc" + end)) for end in (".jsonl", ".scores")]
        shown = run("report", *map(self.path, ("arc.jsonl", "arc.scores")), *other)
        self.assertIn("the questions of %s, %s together" % (self.path("arc.jsonl"), other[0]), shown)

    def test_validation_that_does_not_compare(self):
        """Other windows (a model continued at 4096) or other tokens are said; masked sets have their error."""
        for name, window, tokens in (("a", 2048, 2097152), ("b", 2048, 2097152), ("c", 4096, 2097152), ("d", 2048, 9)):
            os.makedirs(self.path(name, "validation"))
            events = [dict(event="val", name="s", loss=1.0, perplexity=math.e, tokens=tokens),
                      dict(event="val", name="toy", loss=1.0, perplexity=math.e, tokens=5, error=0.125)]
            start = {"event": "start", "seq_len": window}
            self.write(name + "/validation/log.jsonl", [start] + events[: 2 - (name > "b")])
        shown = run("report", self.path("a"), self.path("b"), "--csv", self.path("r.csv"))
        self.assertNotIn("alike", shown)
        self.assertRegex(shown, r"(?s)wrong answer token, %.*\| a +\| +- \| \*\*12\.5\*\* \|")
        with open(self.path("r.csv"), newline="") as f:
            self.assertEqual([r["error"] for r in csv.DictReader(f)], ["", "0.125"] * 2)
        for other, how in (("c", "2097152 tokens in windows of 4096"), ("d", "9 tokens in windows of 2048")):
            line = "Not all models were validated alike on s: a on 2097152 tokens in windows of 2048; %s on %s."
            self.assertIn(line % (other, how), run("report", self.path("a"), self.path(other)))

    def test_names_on_a_page_of_markdown(self):
        """Their marks vanished there, as GitHub shows it; on the terminal they are as they are."""
        right = {(2, 100, 0): 0.5}
        names = ["__a_b__", "a*b*", "<i>", "`x` [y](z)", "plain_name|1"]
        folders = [self.evaluation("m%d" % i, right, {"s": 1.0}) for i in range(len(names))]
        shown = run("report", *("%s=%s" % pair for pair in zip(names, folders)), "--markdown", self.path("r.md"))
        with open(self.path("r.md")) as f:
            text = f.read().split("```")[0]
        for name, escaped in zip(names, (r"\_\_a_b\_\_", r"a\*b\*", r"\<i>", r"\`x\` \[y](z)", r"plain_name\|1")):
            self.assertIn("| %s " % name.replace("|", r"\|"), shown)
            self.assertIn("| %s " % escaped, text)

    def test_no_two_models_of_a_picture_look_the_same(self):
        """The eleventh looked as the first."""
        self.assertEqual(len({(i % 10, report.point_of(i)) for i in range(100)}), 100)

    @unittest.skipUnless(PLOTS, "matplotlib is missing")
    def test_pictures(self):
        right = {(n, length, d): 0.5 for n in (2, 4) for length in (100, 200, 400) for d in (0, 50, 100)}
        a, b = (self.evaluation(n, right, {"s": 1.0}) for n in ("a", "b $x$"))
        picture = lambda *of: run("report", *of, "--pictures", self.path("p"), "--markdown", self.path("r.md"))
        picture(a)
        one = [png_size(self.path("p/" + n)) for n in ("needles.png", "babilong.png")]
        picture(a, b)
        two = [png_size(self.path("p/" + n)) for n in ("needles.png", "babilong.png")]
        self.assertGreater(two[0][1], one[0][1] * 1.5, "a row of heat maps for each model")
        self.assertEqual(two[1], one[1])
        with open(self.path("r.md")) as f:
            text = f.read()
        self.assertIn("![needles](p/needles.png)", text)
        self.assertIn("| **50.0** |", text)
        from matplotlib import figure

        with mock.patch.object(figure.Figure, "savefig", autospec=True) as saved:
            picture("_new=" + a, b)  # a legend of matplotlib's leaves out what begins with "_"
        named = [text.get_text() for legend in saved.call_args.args[0].legends for text in legend.get_texts()]
        self.assertEqual(named, [r"$\_$new", r"b \$x\$", "chance"])
        run("report", a, "--pictures", self.folder, "--markdown", self.path("r.md"))
        with open(self.path("r.md")) as f:
            self.assertIn("![needles](needles.png)", f.read())

    def test_infer_mta_reads_what_is_written(self):
        """The whole way with a model of no training: chance is what it knows."""
        infer, train = os.path.join(BIN, "infer_mta"), os.path.join(BIN, "train_mta")
        if not (os.path.exists(infer) and os.path.exists(train)):
            self.skipTest("no infer_mta and train_mta in %s" % BIN)
        with open(self.path("t.txt"), "w") as f:
            f.write("A line of text for a model that learns nothing.\n" * 200)
        subprocess.run(
            [
                sys.executable, os.path.join(ROOT, "data", "prepare.py"), "text", self.path("t.txt"),
                "--out", self.path("d"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        subprocess.run(
            [
                train, "--model", "toy", "--attention", "transformer", "--vocab-size", "259", "--hidden-size", "32",
                "--num-hidden-layers", "1", "--num-attention-heads", "2", "--num-key-value-heads", "2",
                "--intermediate-size", "64", "--max-position-embeddings", "2048", "--seq-len", "64",
                "--batch-size", "1", "--tokens-per-step", "64", "--steps", "1", "--tokenizer", "bytes",
                "--train", self.path("d") + "/t_train_*.bin", "--out", self.path("run"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        run("babilong", "--samples", "4", "--distraction", "0", "--out", self.path("r.jsonl"))
        with open(self.path("s.jsonl"), "w") as f:
            subprocess.run([infer, self.path("run/step-00000001"), "--score", self.path("r.jsonl")], check=True,
                           stdout=f, stderr=subprocess.DEVNULL)
        self.assertIn("qa5, distraction 0", run("report", self.path("r.jsonl"), self.path("s.jsonl")))


class Harness(Case):
    def test_a_folder_without_a_checkpoint(self):
        """One line, before the harness is asked for."""
        script = os.path.join(ROOT, "scripts", "lm_eval_mta.py")
        for arguments, words in (([self.path("none")], "none"), ([self.folder], "config.json"),
                                 ([self.folder, "--trainer", "x", "--weights", "int8"], "--weights int8")):
            done = subprocess.run([sys.executable, script, *arguments, "--tasks", "x"], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn(words, done.stderr)

    def test_the_newest_checkpoint_of_a_run(self):
        """By its number: step-100000000 is later than step-99999999."""
        sys.path.insert(0, os.path.join(ROOT, "scripts"))
        import lm_eval_mta

        for name in ("step-99999999", "step-100000000", "step-old"):
            os.mkdir(self.path(name))
            with open(self.path(name, "config.json"), "w") as f:
                f.write("{}")
        self.assertEqual(lm_eval_mta.config_file(self.folder), self.path("step-100000000/config.json"))

    def test_arguments_that_the_model_does_not_have(self):
        """A wrong name is not passed over; what the harness gives to every model is."""
        sys.path.insert(0, os.path.join(ROOT, "scripts"))
        import lm_eval_mta

        with open(self.path("config.json"), "w") as f:
            f.write("{}")
        taken = lm_eval_mta.MtaLM(self.folder, batch_size=1, max_batch_size=8, device="cuda:0", weights="int8")
        self.assertEqual(taken.command[2:4], ["--weights", "int8"])
        with self.assertRaisesRegex(TypeError, "weight"):
            lm_eval_mta.MtaLM(self.folder, weight="int8")


@unittest.skipUnless(os.path.exists(os.path.join(BIN, "train_mta")), "train_mta is not built")
class Evaluate(Case):
    """scripts/evaluate.sh: each part once, whatever stops it; nothing of another checkpoint or other requests."""

    def make_model(self):
        texts = self.path("texts")
        os.makedirs(texts)
        for name in ("arxiv", "book"):
            with open(os.path.join(texts, name + ".txt"), "w") as f:
                f.write("".join("Line %d of the text called %s says little. \n" % (i, name) for i in range(1000)))
            prepare = [sys.executable, os.path.join(ROOT, "data", "prepare.py"), "text",
                       os.path.join(texts, name + ".txt")]
            subprocess.run(prepare + ["--out", self.path("shards")], check=True, capture_output=True)
        small = "--model toy --vocab-size 259 --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2"
        small += " --intermediate-size 32 --max-position-embeddings 1536 --seq-len 64 --batch-size 1 --steps 2"
        small += " --save-every 1 --eval-every 0"
        train = [os.path.join(BIN, "train_mta"), *small.split(), "--train", self.path("shards/*_train_*.bin"), "--out",
                 self.path("run")]
        subprocess.run(train, check=True, capture_output=True)

    def evaluate(self, *options, status=0, checkpoint="run"):
        script = [os.path.join(ROOT, "scripts", "evaluate.sh"), self.path(checkpoint), *options]
        done = subprocess.run(script, env=dict(os.environ, TRAINER=self.path("trainer")), capture_output=True,
                              text=True)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def calls(self):
        with open(self.path("calls")) as f:
            return f.read().split()

    def test_parts(self):
        self.make_model()
        os.makedirs(self.path("requests"))
        passages = [{"text": "The line said %d and no more" % i} for i in range(3)]
        run("lambada", self.write("passages.jsonl", passages), "--task", "lambada", "--out",
            self.path("requests/lambada.jsonl"))
        with open(self.path("trainer"), "w") as f:  # the trainer, that notes its calls and fails where it is told to
            f.write('#!/bin/sh\nfor x; do case $x in *.jsonl) echo $(basename $x);; --eval-only) echo validation;; '
                    'esac; done >> "%s"\n' % self.path("calls"))
            f.write('case "$*" in *needle*) [ ! -e "%s" ] || { echo half an answer; exit 1; };; esac\n' %
                    self.path("fail"))
            f.write('exec "%s" "$@"\n' % os.path.join(BIN, "train_mta"))
        os.chmod(self.path("trainer"), 0o755)
        text = ["--text", self.path("texts/book.txt"), "--samples", "1", "--lengths", "700", "--distraction", "0,100"]
        everything = ["--val", self.path("shards/*_val_*.bin"), "--requests", self.path("requests"), *text]
        self.write("fail", [])
        self.assertIn("needle.scores: not finished", self.evaluate(*everything, status=1))
        out = self.path("run/eval/step-00000002")
        self.assertFalse(os.path.exists(os.path.join(out, "needle.scores")))
        self.assertEqual(self.calls(), ["validation", "babilong.jsonl", "lambada.jsonl", "needle.jsonl"])
        os.remove(self.path("fail"))
        shown = self.evaluate(*everything)
        self.assertEqual(self.calls()[4:], ["needle.jsonl"])
        for words in ("Validation perplexity", "bits per byte", "lambada: perplexity", "haystack of 700 tokens", "qa5",
                      "5 were finished before"):
            self.assertIn(words, shown)
        for name in ("report.md", "report.csv", "report.json"):
            self.assertGreater(os.path.getsize(os.path.join(out, name)), 100)
        with open(os.path.join(out, "report.md")) as f:
            before = f.read()
        self.evaluate(*everything)
        with open(os.path.join(out, "report.md")) as f:
            self.assertEqual(f.read(), before)
        self.assertEqual(len(self.calls()), 5)
        self.assertIn("another checkpoint",
                      self.evaluate(*everything, "--out", out, status=1, checkpoint="run/step-00000001"))
        for changes in (["--seq-len", "64"], ["--samples", "2"], ["--lengths", "600"]):
            again = [x for i, x in enumerate(everything) if changes[0] not in everything[max(0, i - 1):i + 1]]
            self.assertIn("was made with other options or of other files", self.evaluate(*again, *changes, status=1))
        shown = self.evaluate("--val", self.path("shards/book_val_*.bin"), status=1)
        self.assertIn("validation was made with other options", shown)
        with open(self.path("requests/lambada.jsonl"), "a") as f:
            f.write("\n")
        self.assertIn("is not what", self.evaluate("--requests", self.path("requests"), status=1))
        self.assertIn("no checkpoint", self.evaluate(*everything, status=1, checkpoint="texts"))
        self.assertEqual(len(self.calls()), 5)
        shutil.copy(self.path("shards/arxiv_val_000000.bin"), self.path("shards/book_val_000000.bin"))
        shown = self.evaluate("--val", self.path("shards/*_val_*.bin"), status=1)
        self.assertIn("validation was made with other options or of other files", shown)
        # without a manifest other weights beside the same config.json are another checkpoint; a name may hold a "="
        shutil.copytree(self.path("run/step-00000002"), self.path("lr=3"))
        os.remove(self.path("lr=3/manifest.json"))
        val = ["--val", self.path("shards/arxiv_val_*.bin"), "--seq-len", "64"]
        self.assertRegex(self.evaluate(*val, checkpoint="lr=3"), r"\| lr=3 +\|")
        shutil.copy(self.path("run/step-00000001/model.safetensors"), self.path("lr=3"))
        self.assertIn("another checkpoint", self.evaluate(*val, checkpoint="lr=3", status=1))

    def test_requests_that_were_wrong(self):
        """They can be mended, or taken away: a copy that was not scored holds nobody up. --shift cuts long contexts."""
        os.makedirs(self.path("run"))
        os.makedirs(self.path("requests"))
        for name in ("run/config.json", "run/model.safetensors"):
            self.write(name, [{"vocab_size": 259}])
        with open(self.path("trainer"), "w") as f:  # scores each line that has a context
            f.write('#!/bin/sh\ncase "$*" in *--shift*) echo cut >&2;; '
                    '*--tokenizer\\ bytes*) echo by bytes >&2;; esac\n'
                    'for file; do case $file in *.jsonl) grep -q no_context "$file" && exit 1; while read -r line; do '
                    'echo \'{"logprob": -1, "tokens": 1, "greedy": true}\'; done < "$file";; esac; done\n')
        os.chmod(self.path("trainer"), 0o755)
        good = {"context": "c", "continuation": " d", "task": "good", "item": 0}
        self.write("requests/good.jsonl", [good])
        ask = lambda *more, **status: self.evaluate("--requests", self.path("requests"), "--out", self.path("o"), *more,
                                                    **status)
        for mend in (lambda: self.write("requests/bad.jsonl", [dict(good, task="bad")]),
                     lambda: os.remove(self.path("requests/bad.jsonl"))):
            self.write("requests/bad.jsonl", ["no_context"])
            self.assertIn("bad.scores: not finished", ask(status=1))
            mend()
            said = ask()
            self.assertEqual("bad.jsonl: not scored before and not in --requests: left out" in said,
                             not os.path.exists(self.path("requests/bad.jsonl")), said)
            self.assertTrue(os.path.exists(self.path("o/bad.jsonl")))  # left out, not taken away
            shutil.rmtree(self.path("o"))
        self.assertNotIn("cut", ask())
        self.assertIn("was made with other options", ask("--shift", status=1))
        shutil.rmtree(self.path("o"))
        self.assertIn("cut", ask("--shift"))
        shutil.rmtree(self.path("o"))
        self.assertIn("none: no such file", ask("--tokenizer", self.path("none"), status=1))
        self.assertIn("by bytes", ask("--tokenizer", "bytes"))
        self.assertIn("was made with other options", ask(status=1))

    def test_shards_without_a_checksum_and_masks(self):
        """Tokens whose header has no checksum, as llm.c writes them, and masks: none changes behind a finished part."""
        os.makedirs(self.path("run"))
        for name in ("run/config.json", "run/model.safetensors"):
            self.write(name, [{"vocab_size": 259}])
        with open(self.path("trainer"), "w") as f:  # the last argument is the folder
            f.write('#!/bin/sh\nfor out; do :; done\nmkdir "$out"\n'
                    'echo \'{"event": "val", "name": "s", "perplexity": 2.5}\' > "$out/log.jsonl"\n')
        os.chmod(self.path("trainer"), 0o755)
        shard = self.path("s_val_000000.bin")
        for tokens, mask in (([1, 2, 3], None), ([1, 2, 3], [1, 1, 0])):
            out = self.path("out%d" % (mask is None))
            ask = lambda status: self.evaluate("--val", shard, "--seq-len", "2", "--out", out, status=status)
            write_shard(shard, tokens, mask=mask)
            if mask is None:
                with open(shard, "r+b") as f:
                    f.seek(16)
                    f.write(bytes(4))
            self.assertIn("0 were finished before", ask(0))
            self.assertIn("1 were finished before", ask(0))
            changed = shard if mask is None else shard[:-4] + ".mask"
            with open(changed, "r+b") as f:
                f.seek(-1, os.SEEK_END)
                last = f.read(1)
                f.seek(-1, os.SEEK_END)
                f.write(bytes([1 - last[0]]))
            self.assertIn("validation was made with other options or of other files", ask(1))

    def test_mistakes(self):
        os.makedirs(self.path("run"))
        self.write("run/config.json", [{"vocab_size": 259}])
        self.write("trainer", [])
        os.chmod(self.path("trainer"), 0o755)
        val = ["--val", "x"]
        for options, message in (([], "nothing to evaluate on"), ([*val, "--val", "y"], "--val is given twice"),
                                 ([*val, "--seq-len", "0"], '--seq-len: got "0", wanted a whole number from 1'),
                                 ([*val, "--seq-len", "1_0"], "--seq-len: got"), ([*val, "--samples", ""], "got"),
                                 ([*val, "--samples", "9"], "--samples: wanted --text FILE beside it"),
                                 ([*val, "--requests", "none"], "none is no directory"),
                                 (["--text", self.path("none")], "no such file"),
                                 ([*val, "--sample", "9"], "unknown option --sample"),
                                 (["--val"], "a value is missing"), (["--val="], '--val: got ""'),
                                 ([*val, "--out", ""], '--out: got ""'),
                                 (["--val=x", "--shift", "--samples=9"], "--samples: wanted --text FILE beside it"),
                                 ([*val, "--shift=on"], "unknown option --shift=on")):
            shown = self.evaluate(*options, status=1)
            self.assertIn(message, shown)
            self.assertEqual(shown.count("\n"), 1, shown)

    def test_a_report_of_something_else(self):
        os.makedirs(self.path("run"))
        self.write("run/config.json", [{"vocab_size": 259}])
        self.write("trainer", [])
        os.chmod(self.path("trainer"), 0o755)
        self.write("report.md", [{"mine": 1}])
        shown = self.evaluate("--val", "x", "--out", self.folder, status=1)
        self.assertIn("report.md was not made by evaluate.sh; wanted another --out", shown)
        self.assertEqual(self.read("report.md"), [{"mine": 1}])

    def test_a_python_that_is_too_old(self):
        """It says so, and not that there is no checkpoint."""
        with open(self.path("python3"), "w") as f:
            f.write("#!/bin/sh\necho '-c: Python 3.6 runs it, wanted 3.9 or later' >&2\nexit 1\n")
        os.chmod(self.path("python3"), 0o755)
        path = self.folder + os.pathsep + os.environ["PATH"]
        shown = subprocess.run(["scripts/evaluate.sh", self.folder, "--text", "README.md"], cwd=ROOT,
                               env=dict(os.environ, PATH=path), capture_output=True, text=True)
        self.assertEqual((shown.returncode, shown.stderr),
                         (1, "evaluate.sh: Python 3.6 runs it, wanted 3.9 or later\n"))

    def test_from_a_folder_that_cdpath_names(self):
        shown = subprocess.run(["scripts/evaluate.sh"], cwd=ROOT, env=dict(os.environ, CDPATH=f".:{ROOT}"),
                               capture_output=True, text=True)
        self.assertEqual((shown.returncode, shown.stderr), (1, "evaluate.sh: wanted a checkpoint; --help says more\n"))


if __name__ == "__main__":
    main()
