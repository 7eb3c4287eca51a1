#!/usr/bin/env python3
"""data/evals.py and scripts/lm_eval_mta.py against the real lm-evaluation-harness, whose package holds its tasks'
templates.

The harness builds the requests of each task from records made here, in place of the data set that it would download;
evals.py builds them from the same records. Then the harness evaluates a small model through lm_eval_mta.py.

dev/.venv/bin/python dev/tests/test_lm_eval.py    (dev/.venv: pip install lm-eval)
"""

import contextlib
import functools
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from helpers import BIN, ROOT, Folder, call, main, without_torch, write_safetensors, zip_all

FOLDER = tempfile.TemporaryDirectory(prefix="test_lm_eval_")
os.environ.update(HF_HOME=FOLDER.name, HF_HUB_OFFLINE="1")
try:
    import datasets
    import lm_eval
    import numpy
    import yaml
    from lm_eval import evaluator, utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as e:
    print("skipped: %s\n0 passed, 0 failed, 1 skipped" % without_torch(e))
    sys.exit(0)

TASK_FOLDER = os.path.join(os.path.dirname(lm_eval.__file__), "tasks")
INFER = os.path.join(BIN, "infer_mta")
TRAINER = os.path.join(BIN, "train_mta")
RANKS = os.path.join(ROOT, "dev", "golden", "tokenizers", "cl100k_base.tiktoken")
EVALS = os.path.join(ROOT, "data", "evals.py")
sys.path.insert(0, os.path.join(ROOT, "scripts"))
import lm_eval_mta  # noqa: E402

# The harness's task: the file of its package, evals.py's name of the format, and records as the harness's data set has
# them. They are made so that what a template does to a text shows: marks, brackets, blanks at both ends, other scripts.
ARC = [
    {
        "id": "Mercury_1",
        "question": "Which of these is a plan\u00e8te?",
        "choices": {"text": ["the Moon", "Mars", "a com\u00e8te", " the Sun"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    {
        "id": "Mercury_2",
        "question": "What falls? ",
        "choices": {"text": ["rain", "smoke that rises", "x"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
]
TASKS = {
    "boolq": (
        "super_glue/boolq/default.yaml",
        "boolq",
        [
            {"passage": "Water is wet.", "question": "is water wet", "idx": 0, "label": 1},
            {"passage": " It rains. ", "question": "does it snow?", "idx": 1, "label": 0},
        ],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        "piqa",
        [
            {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "turn the jar, the lid and the table", "label": 0},
            {"goal": "Caf\u00e9? ", "sol1": " boil it", "sol2": "na\u00efve: don't", "label": 1},
        ],
    ),
    "social_iqa": (
        "siqa/siqa.yaml",
        "siqa",
        [
            {
                "context": "Tracy left.", "question": "Why did Tracy do this?", "answerA": "to rest",
                "answerB": "she was \u00e9nerv\u00e9e", "answerC": "no reason", "label": "2",
            }
        ],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "hellaswag",
        [
            {
                "activity_label": "Roof shingle removal",
                "ctx_a": "A man is [header] sitting  on a roof. [title] He",
                "ctx_b": "he STARTS",
                "ctx": "not used",
                "endings": ["pulls up [substeps] shingles. [title] Done", " rips", "is  \u00fcber it.", "x"],
                "label": "3",
            },
            {"activity_label": "Tea", "ctx_a": "Boil water.", "ctx_b": "", "ctx": "", "endings": list("abcd"),
             "label": "0"},
        ],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        "winogrande",
        [
            {"sentence": "The cup hit the ball as _ was big_ger. ", "option1": "the cup", "option2": "it",
             "answer": "2"},
            {"sentence": "_ slept, so Ann left.", "option1": "\u00c9mile", "option2": "Bo", "answer": "1"},
        ],
    ),
    "arc_easy": ("arc/arc_easy.yaml", "arc", ARC),
    "arc_challenge": ("arc/arc_challenge.yaml", "arc", ARC),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        "openbookqa",
        [
            {
                "id": "7-980",
                "question_stem": "The sun is responsible for",
                "choices": {"text": ["puppies", "children growing up", "plants", "\u7530"], "label": list("ABCD")},
                "answerKey": "D",
            },
            {
                "id": "8-1",
                "question_stem": "A blank follows this ",
                "choices": {"text": ["yes", "no", "so", "what"], "label": list("ABCD")},
                "answerKey": " C",
            },
        ],
    ),
    "mmlu_high_school_physics": (
        "mmlu/default/mmlu_high_school_physics.yaml",
        "mmlu",
        [
            {
                "question": "  What is 2 + 2?\nSay it. ",
                "subject": "high_school_physics",
                "choices": ["3", "4 ", "f\u00fcnf", "7"],
                "answer": 1,
            },
            {"question": "Why?", "subject": "high_school_physics", "choices": list("wxyz"), "answer": 3},
        ],
    ),
    "lambada_openai": (
        "lambada/lambada_openai.yaml",
        "lambada",
        [
            {"text": "He came back to the old  house"},
            {"text": "\u201cWhy,\u201d she asked, \u201cwould I go?\u201d\n\nNobody said a na\u00efve word"},
        ],
    ),
}


# What it collects of the machine for its report, pip's list of all packages too: 1 s at each evaluation.
no_machine = mock.patch("lm_eval.evaluator.add_env_info")


def harness_tasks(names):
    """{name: the harness's own task over our records}"""
    tasks = {}
    for name in names:
        splits = {s: datasets.Dataset.from_list(TASKS[name][2]) for s in ("train", "validation", "test", "dev")}
        with mock.patch.object(datasets, "load_dataset", lambda *args, **kw: datasets.DatasetDict(splits)):
            path = os.path.join(TASK_FOLDER, TASKS[name][0])
            tasks.update(TaskManager(include_defaults=False).load([path])["tasks"])
    return tasks


class Case(Folder):
    def write(self, name, records):
        with open(self.path(name), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)
        return self.path(name)

    def run_text(self, args, **more):
        done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        return done.stdout

    def requests(self, name, records=None, *options):
        """evals.py's requests for a task of the harness."""
        path = self.write("in.jsonl", records or TASKS[name][2])
        out = self.path(name + ".jsonl")
        command = "lambada" if TASKS[name][1] == "lambada" else "choice"
        args = [sys.executable, EVALS, command, path, "--out", out, "--on-bad", "refuse", "--task", name, *options]
        self.said = self.run_text(args)
        with open(out, encoding="utf-8") as f:
            return [json.loads(line) for line in f]


class Requests(Case):
    def test_the_checkpoint_of_a_run(self):
        """The newest that has a config.json; what has another name than a checkpoint is none, as for infer_mta."""
        for name in ("step-00000010", "step-00000020", "step-000000030", "step-40"):
            os.makedirs(os.path.join(self.folder, "run", name))
        wanted = os.path.join(self.folder, "run", "step-00000010", "config.json")
        for path in (wanted, os.path.join(self.folder, "run", "step-000000030", "config.json")):
            with open(path, "w") as f:
                f.write("{}")
        self.assertEqual(lm_eval_mta.config_file(os.path.join(self.folder, "run")), wanted)

    def test_all_tasks_of_the_paper(self):
        for name, task in harness_tasks(TASKS).items():
            with self.subTest(name), contextlib.redirect_stderr(io.StringIO()):
                task.build_all_requests(limit=None, rank=0, world_size=1)
                want = [instance.args for instance in task.instances]
                got = self.requests(name)
                self.assertEqual([(g["context"], g["continuation"]) for g in got], want)
                self.assertIn("as " + TASKS[name][1], self.said)
                if name == "lambada_openai":
                    continue
                for item, record in enumerate(task.eval_docs):
                    gold = task.doc_to_text(record) if task.multiple_input else task.doc_to_target(record)
                    self.assertEqual({g["gold"] for g in got if g["item"] == item}, {int(gold)})

    def test_records_as_their_authors_publish_them(self):
        """The same questions in the other form give the same requests."""

        def nested(record, question):
            choices = [{"text": t, "label": n} for t, n in zip(record["choices"]["text"], record["choices"]["label"])]
            question = {"stem": record[question], "choices": choices}
            return {"id": record["id"], "question": question, "answerKey": record["answerKey"]}

        boolq = [dict(r, answer=bool(r["label"])) for r in TASKS["boolq"][2]]
        for record in boolq:
            del record["label"]
        mmlu = [dict(r, answer="ABCD"[r["answer"]]) for r in TASKS["mmlu_high_school_physics"][2]]
        for name, records in (
            ("boolq", boolq),
            ("mmlu_high_school_physics", mmlu),
            ("arc_easy", [nested(r, "question") for r in ARC]),
            ("openbookqa", [nested(r, "question_stem") for r in TASKS["openbookqa"][2]]),
        ):
            self.assertEqual(self.requests(name, records), self.requests(name))

    def test_all_subjects_of_mmlu(self):
        """The harness's sentence about the subject is evals.py's for each of the 57."""
        folder, texts = os.path.join(TASK_FOLDER, "mmlu", "default"), {}
        for file in sorted(os.listdir(folder)):
            if file.startswith("mmlu_"):
                with open(os.path.join(folder, file), encoding="utf-8") as f:
                    task = yaml.safe_load(f)
                texts[task["dataset_name"]] = task["description"]
        self.assertEqual(len(texts), 57)
        record = TASKS["mmlu_high_school_physics"][2][0]
        got = self.requests("mmlu_high_school_physics", [dict(record, subject=s) for s in texts])
        for request, text in zip_all(got[::4], texts.values()):
            self.assertEqual(request["context"][: len(text)], text)


POSITIONS, VOCABULARY, BOS = 192, 100277, 100257


def write_model(folder):
    """A plain model of two small layers with random weights and cl100k_base's tokens."""
    config = dict(model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config.update(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, tokenizer="cl100k_base.tiktoken")
    config.update(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=10000.0)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    shutil.copy(RANKS, folder)
    rng = numpy.random.default_rng(1)
    normal = lambda *shape: rng.normal(0, 0.4, shape).astype(numpy.float32)
    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, 32), "model.norm.weight": normal(32) + 1}
    for layer in ("model.layers.0.", "model.layers.1."):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[layer + name + ".weight"] = normal(32) + 1
        for name in "qkvo":
            tensors[layer + "self_attn.%s_proj.weight" % name] = normal(32, 32)
        for name, shape in (("gate", (48, 32)), ("up", (48, 32)), ("down", (32, 48))):
            tensors[layer + "mlp.%s_proj.weight" % name] = normal(*shape)
    tensors = {name: ("F32", t.shape, t.tobytes()) for name, t in tensors.items()}
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)


class Reference(TemplateLM):
    """The harness's own splitting of texts into tokens of context and continuation, and its own windows; infer_mta only
    makes tokens of a text and scores tokens."""

    eot_token_id = BOS

    def __init__(self, case):
        super().__init__()
        self.lm = case.lm()

    def tok_encode(self, string, add_special_tokens=None, **more):
        ids = self.lm.run([INFER, self.lm.checkpoint, "--tokenize"], [json.dumps({"text": string})])[0].split()
        return ([] if add_special_tokens is False else [BOS]) + [int(x) for x in ids]

    def _loglikelihood_tokens(self, requests, **more):
        lines = []
        for _, context, continuation in requests:
            assert context and continuation
            ids = (context + continuation)[-(POSITIONS + 1) :]
            n = len(continuation)
            lines.append({"context_ids": ids[:-n], "continuation_ids": ids[-n:]})
        return [(x["logprob"], x["greedy"]) for x in self.lm.score(lines)]

    def loglikelihood_rolling(self, requests, **more):
        sums = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, POSITIONS, 1)
            windows = [(None,) + utils.make_disjoint_window(w) for w in windows]
            sums.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(windows)))
        return sums

    def generate_until(self, requests, **more):
        raise NotImplementedError


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


class Model(Case):
    @classmethod
    def setUpClass(cls):
        cls.model = tempfile.mkdtemp(prefix="test_lm_eval_model_")
        cls.addClassCleanup(shutil.rmtree, cls.model, ignore_errors=True)
        write_model(cls.model)

    def lm(self, **options):
        lm = lm_eval_mta.MtaLM(self.model, infer=INFER, threads=1, **options)
        self.addCleanup(lm.close)
        return lm

    def close_to(self, got, want):
        self.assertEqual(len(got), len(want))
        for a, b in zip(got, want):
            self.assertAlmostEqual(a, b, delta=2e-4 * abs(b) + 1e-4)

    def test_tokens_at_the_join(self):
        """Blanks, line ends that join the mark before them, a word that goes on, no context, more than the
        positions."""
        pairs = [
            ("The cat sat on the", " mat."),
            ("The cat sat on the ", "mat."),
            ("He said so.\n", "\nThen he left"),
            ("He said so.\n\n ", "Then"),
            ("inter", "nationally known"),
            ("every blank" + "".join(chr(c) for c in range(0x110000) if chr(c).isspace()), "b c"),
            ("", "No context"),
            ("  ", " blanks alone"),
            ("many words " * 150, "and an end"),
        ]
        requests = instances("loglikelihood", pairs)
        got, want = self.lm().loglikelihood(requests), Reference(self).loglikelihood(requests, disable_tqdm=True)
        self.close_to([x for x, _ in got], [x for x, _ in want])
        self.assertEqual([x for _, x in got], [x for _, x in want])

    def test_a_continuation_without_a_token(self):
        """"inter" and "national" are one token together. The harness stops there too."""
        line = json.dumps({"context": "inter", "continuation": "national"})
        done = subprocess.run(
            [INFER, self.model, "--score", "-", "--quiet"], input=line, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True
        )
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("line 1: the continuation adds no token: with it the context has 1, without it 1", done.stderr)
        with self.assertRaises(AssertionError), contextlib.redirect_stderr(io.StringIO()):
            Reference(self).loglikelihood(instances("loglikelihood", [("inter", "national")]), disable_tqdm=True)

    @unittest.skipUnless(os.path.exists(TRAINER), "train_mta is not built")
    def test_a_trainer_scores_the_same(self):
        """Contexts that are too long, windows of a text, and requests that come one after the other."""
        lm = self.lm(trainer=TRAINER, batch_size=2)
        pairs = [("The cat", " sat"), ("long " * 300, "end"), ("", "start"), ("a", "")]
        for some in (pairs, pairs[:1]):
            got, want = (m.loglikelihood(instances("loglikelihood", some)) for m in (lm, self.lm()))
            self.close_to([x for x, _ in got], [x for x, _ in want])
            self.assertEqual([g for _, g in got], [g for _, g in want])
        texts = instances("loglikelihood_rolling", [("word " * 200,), ("short",)])
        self.close_to(lm.loglikelihood_rolling(texts), self.lm().loglikelihood_rolling(texts))
        with self.assertRaisesRegex(ValueError, "int8"):
            self.lm(trainer=TRAINER, weights="int8")

    def test_rolling_windows(self):
        words = ["word%d" % i for i in range(400)]
        texts = ["", "short", " ".join(words[:60]), " ".join(words), "x" * 3]
        requests = instances("loglikelihood_rolling", [(t,) for t in texts])
        self.close_to(self.lm().loglikelihood_rolling(requests), Reference(self).loglikelihood_rolling(requests))
        for n in (1, 7, 8, 9, 16, 17, 23):
            want = [utils.make_disjoint_window(w) for w in utils.get_rolling_token_windows(list(range(n)), BOS, 8, 1)]
            self.assertEqual([(a or [BOS], b) for a, b in lm_eval_mta.rolling_windows(list(range(n)), 8)], want)

    def test_generation(self):
        """One program answers all; an answer is what infer_mta --prompt prints, up to the first text that ends it."""
        lm = self.lm()
        options = ["--temperature", "0", "--max-tokens", "12", "--quiet", "--threads", "1"]
        alone = lambda prompt: self.run_text([INFER, self.model, "--prompt", prompt, *options])[:-1]
        prompts = ["The cat", "a line\nand another\n", "The cat"]
        whole = [alone(p) for p in prompts]
        ask = lambda prompts, **more: lm.generate_until(
            instances("generate_until", [(p, dict({"do_sample": False, "max_gen_toks": 12}, **more)) for p in prompts])
        )
        self.assertEqual(ask(prompts), whole)
        program = lm.generator
        middle, later = whole[0][len(whole[0]) // 2], whole[0][-3:]
        self.assertEqual(ask(prompts[:1], until=[later, middle, "", "not there"]), [whole[0].split(middle)[0]])
        self.assertEqual(ask(prompts[:1], until=later), [whole[0].split(later)[0]])
        self.assertIs(lm.generator, program)

        # The harness keeps the last tokens that leave room for the answer.
        text = " ".join("word%d" % i for i in range(300))
        ids = lm.run([INFER, self.model, "--tokenize"], [json.dumps({"text": text})])[0].split()[-(POSITIONS - 12) :]
        ids = self.run_text([INFER, self.model, "--token-ids", " ".join(ids), *options])
        want = json.loads(self.run_text([INFER, self.model, "--detokenize"], input=ids))["text"]
        self.assertEqual(ask([text]), [want])

        # Sampling: the same seed and line, the same text; what infer_mta does not have is refused.
        sampled = dict(do_sample=True, temperature=0.7, top_p=0.9, max_gen_toks=20)
        self.assertEqual(*[self.lm().generate_until(instances("generate_until", [("a", sampled)])) for _ in range(2)])
        with self.assertRaisesRegex(ValueError, "num_beams"):
            ask(["a"], num_beams=4)

    def test_bad_prompts(self):
        for line, why in (
            ("{", "broken"),
            ("{}", 'wanted an object with "prompt", a string'),
            ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens: wanted an integer from 0 to"),
            ('{"prompt": "a", "top_p": 2}', "top_p: wanted a number from 0 to 1"),
            ('{"prompt": "a", "until": [1]}', "until: wanted a list of strings"),
            ('{"prompt": "a", "max_tokens": 192}', "2 tokens and 192 to come, the context has 192 positions"),
            (json.dumps({"prompt": "a b c " * 99}), "--shift drops the earliest"),
        ):
            args = [INFER, self.model, "--prompts", "-", "--quiet", "--max-tokens", "9"]
            done = subprocess.run(
                args, input='{"prompt": "good", "max_tokens": 0}\n' + line, capture_output=True, text=True
            )
            self.assertEqual((done.returncode, done.stdout), (1, '{"text": "", "tokens": 0}\n'), line)
            self.assertEqual(done.stderr.count("\n"), 1)
            self.assertIn("standard input: line 2: ", done.stderr)
            if why != "broken":
                self.assertIn(why, done.stderr)

    def test_no_program(self):
        for option in ("--infer", "--trainer"):
            done = call(lm_eval_mta, self.model, option, self.path("none"), "--tasks", "none")
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn("no program", done.stderr)
        lm = lm_eval_mta.MtaLM(self.model, infer=self.path("none"), trainer=TRAINER)  # these tasks want infer_mta too
        for ask, arguments in ((lm.loglikelihood_rolling, ("a",)), (lm.generate_until, ("a", {}))):
            with self.assertRaisesRegex(lm_eval_mta.Failed, "none: no program; make none"):
                ask(instances("generate_until", [arguments]))

    def test_the_command_with_the_harness_s_flags(self):
        """A local task of each kind of request, through lm_eval_mta.py itself."""
        data = self.write("data.jsonl", [{"q": "Which?", "c": ["one", "two words"], "a": i % 2} for i in range(4)])
        common = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n" % data
        tasks = {
            "choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: a\n",
            "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}} {{c[1]}}'\n"
            "metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n",
            "generate": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{c[0]}}'\n"
            "generation_kwargs: {until: ['x'], max_gen_toks: 5, do_sample: false}\nmetric_list: [{metric: "
            "exact_match}]\n",
        }
        for name, text in tasks.items():
            with open(self.path("local_%s.yaml" % name), "w") as f:
                f.write("task: local_%s\n" % name + common + text)
        paths = ",".join(self.path("local_%s.yaml" % name) for name in tasks)
        args = [self.model, "--infer", INFER, "--tasks", paths, "--limit", "3", "--output_path", self.path("out.json")]
        alone = functools.partial(TaskManager, include_defaults=False)  # the harness's own tasks: 8 s to read
        with mock.patch("lm_eval.tasks.TaskManager", alone), no_machine:
            done = call(lm_eval_mta, *args, "--log_samples", "--threads", "1", "--seed", "3")
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        for name in tasks:
            self.assertIn("local_" + name, done.stdout)
        result = next(f for f in os.listdir(self.folder) if f.startswith("out_"))
        with open(self.path(result)) as f:
            self.assertEqual(json.load(f)["model_name"], self.model)
        found = [os.path.join(d, f) for d, _, files in os.walk(self.folder)
                 for f in files if f.startswith("samples_local_")]
        self.assertEqual(len(found), 3)
        for path in found:
            with open(path) as f:
                self.assertEqual(len(f.readlines()), 3)

    def test_measures_are_the_harness_s(self):
        """The harness evaluates the model; evals.py reports what infer_mta --score says of its requests: the same."""
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            tasks = list(harness_tasks(TASKS).values())
            alone = TaskManager(include_defaults=False)  # the harness's own tasks: 8 s to read
            common = dict(bootstrap_iters=0, task_manager=alone)
            with no_machine:
                results = evaluator.simple_evaluate(model=self.lm(), tasks=tasks, **common)["results"]
        files = []
        for name in TASKS:
            self.requests(name)
            files += [self.path(name + ".jsonl"), self.path(name + ".scores")]
            with open(files[-1], "w") as f:
                f.write(self.run_text([INFER, self.model, "--score", files[-2], "--threads", "1", "--quiet"]))
        self.run_text([sys.executable, EVALS, "report", *files, "--json", self.path("report.json")])
        with open(self.path("report.json")) as f:
            rows = json.load(f)
        names = {"acc": "accuracy", "acc_norm": "acc_norm", "perplexity": "perplexity"}
        compared = 0
        for task, result in results.items():
            for key, value in result.items():
                measure = names.get(key.split(",")[0])
                if measure:
                    self.assertAlmostEqual(rows[task][measure], value, delta=1e-3 * value, msg=(task, key))
                    compared += 1
        # acc of all, acc_norm of HellaSwag, PIQA, ARC twice, OpenBookQA; LAMBADA
        self.assertEqual(compared, 10 + 5 + 1)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
