#!/usr/bin/env python3
"""Evaluation sets for --score of infer_mta or a trainer, and their results. Standard library; --tokenizer with a rank
file needs infer_mta, where it is built, or tiktoken.

    evals.py lambada lambada_test.jsonl --out lambada.jsonl            last word of a passage
    evals.py choice hellaswag_val.jsonl --out hellaswag.jsonl          multiple choice, 2 choices or more
    evals.py needle --text BOOK.txt --out needle.jsonl                 needles in a haystack, generated
    evals.py babilong --text BOOK.txt --out babilong.jsonl             BabiLong-style QA1 to QA5, generated
    infer_mta CHECKPOINT --score lambada.jsonl > lambada.scores        on the CPU, or on the trainer's device:
    train_mta_cuda --init-from CHECKPOINT --score lambada.jsonl --batch-size 16 > lambada.scores
    evals.py report lambada.jsonl lambada.scores
    evals.py report mta=runs/mta/eval plain=runs/plain/eval --markdown report.md --csv report.csv --pictures .

A request is a JSON line with context and continuation, which the programs read, and what the report needs: task (and
its settings), item (which question), choice and gold (numbers; only where there are choices). The report has the
paper's tables, and says per task:
  accuracy   of choices: the one with the largest log-probability is gold (of equal ones the first); else the same as
             greedy
  acc_norm   the same with log-probability per character of the choice (the space before it is not one of them)
  acc_bytes  the same per byte of the choice in UTF-8
  acc_token  the same per token of the continuation
  greedy     share of gold continuations of which every token is the likeliest
  perplexity exp(-mean log-probability of a gold continuation); LAMBADA's perplexity is this one
  token_ppl  exp(-log-probability of a token of gold continuations)
"""

import argparse
import codecs
import json
import os
import random
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from inputs import what_is  # noqa: E402
from options import Parser, parse_count, whole_number  # noqa: E402
from report import refuse_input, report  # noqa: E402
from shards import run_program, write_synced  # noqa: E402
from tokenizer import PATTERNS, BadDocument, UserError, members, naming, open_tokenizer  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# Sets from files: a record -> [(context, continuation) of each choice], number of the gold one. Context and
# continuation are those of EleutherAI's lm-evaluation-harness for its task of that name, character by character
# (dev/tests/test_lm_eval.py compares them); "general" alone is ours.


def lambada(record):
    """{"text"}: the word after the last space is to be continued, with that space. The text is taken as it is."""
    context, space, word = record["text"].rpartition(" ")
    if not context.strip() or not word.strip():
        raise ValueError("wanted a text of several words that ends with a word")
    return [(context, space + word)], None


def hellaswag(record):
    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = "%s: %s %s" % (record["activity_label"], record["ctx_a"], record["ctx_b"].capitalize())
    return [(clean(context), " " + clean(ending)) for ending in record["endings"]], record.get("label")


PROMPTS = ("passage", "article", "context", "question", "query")


def prompts(record):
    """The names of the texts before a record's choices, those that are not blank where there are any. Of two a format
    would leave one out."""
    texts = [k for k in PROMPTS if isinstance(record.get(k), str)]
    full = [k for k in texts if record[k].strip()]
    if len(full) > 1:
        raise ValueError("%s: one of them would be left out; wanted all of the prompt in context" % " and ".join(full))
    return full or texts


def question_of(record):
    """ARC's and OpenBookQA's records, as their authors or as Hugging Face publish them -> question, choices, gold."""
    prompts(record)
    question, choices = record.get("question_stem", record.get("question")), record.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        texts, names = choices["text"], choices["label"]
    else:
        texts, names = [c["text"] for c in choices], [c["label"] for c in choices]
    answer = record.get("answerKey")
    if len(texts) != len(names) or len(set(names)) < len(names):
        raise ValueError("%d choices with the labels %s, wanted a label of its own for each" % (len(texts), names))
    if answer and answer.strip() not in names:
        raise ValueError("answerKey is %s, wanted one of the labels %s" % (answer, names))
    return question, texts, names.index(answer.strip()) if answer else None


def arc(record):
    question, choices, gold = question_of(record)
    return [("Question: %s\nAnswer:" % question, " " + text) for text in choices], gold


def openbookqa(record):
    """The question alone: its choices go on where it stops."""
    question, choices, gold = question_of(record)
    return [(question, " " + text) for text in choices], gold


def piqa(record):
    context = "Question: %s\nAnswer:" % record["goal"]
    return [(context, " " + record[key]) for key in ("sol1", "sol2")], record.get("label")


def boolq(record):
    """A question gets its mark whether it has one or not. Its authors name the answer "answer", SuperGLUE "label"."""
    context = "%s\nQuestion: %s?\nAnswer:" % (record["passage"], record["question"])
    return [(context, " no"), (context, " yes")], record["label"] if "label" in record else record["answer"]


def siqa(record):
    context = "Q: %s %s\nA:" % (record["context"], record["question"])
    return [(context, " " + record[key]) for key in ("answerA", "answerB", "answerC")], one_based(record.get("label"))


def winogrande(record):
    """The choices fill the blank; what follows it is scored."""
    before, blank, after = record["sentence"].partition("_")
    if not blank or not after.strip():
        raise ValueError("no blank with a text after it")
    return [(before + record[key], " " + after.strip()) for key in ("option1", "option2")], one_based(
        record.get("answer")
    )


def mmlu(record):
    """The four choices stand in the context with their letters, and the letters are scored."""
    prompts(record)
    subject, choices, answer = record["subject"].replace("_", " "), record["choices"], record["answer"]
    if not subject.strip() or len(choices) != 4 or not all(isinstance(c, str) for c in choices):
        raise ValueError("wanted a subject and 4 choices, got %r and %d" % (subject, len(choices)))
    lines = ["The following are multiple choice questions (with answers) about %s.\n" % subject]
    lines += [record["question"].strip()] + ["%s. %s" % pair for pair in zip("ABCD", choices)] + ["Answer:"]
    gold = "ABCD".index(answer) if answer in tuple("ABCD") else answer
    return [("\n".join(lines), " " + letter) for letter in "ABCD"], gold


def general(record):
    """{"context", "question" or "query"; "choices": [...]; "gold", "label" or "answer": number or the choice itself}"""
    context = next(record[k] for k in prompts(record) if k in ("context", "question", "query"))
    gold = next((record[k] for k in ("gold", "label", "answer") if record.get(k) is not None), None)
    if not isinstance(record["choices"], list) or not record["choices"]:
        raise ValueError("choices: wanted a list of texts")
    if gold in record["choices"]:
        found = record["choices"].index(gold)
        if isinstance(gold, str) and WHOLE.fullmatch(gold) and int(gold) in range(len(record["choices"])) and (
                int(gold) != found):
            raise ValueError("%s is a choice and the number of another one: which is right, nobody knows" % gold)
        gold = found
    return [(context, c if c[:1].isspace() else " " + c) for c in record["choices"]], gold


WHOLE = re.compile("-?[0-9]{1,18}")  # what int() takes is more: 1_0, digits of other scripts


def whole(value):
    """1, "1", 1.0 and true are a number of a choice; 1.5 is none."""
    cut = isinstance(value, float) and not value.is_integer()
    if cut or isinstance(value, str) and not WHOLE.fullmatch(value.strip()):
        raise ValueError("%s as the right choice, wanted a whole number" % value)
    return int(value)


def one_based(value):
    return None if value in (None, "") else whole(value) - 1


FORMATS = {  # in the order in which a record is tried
    "hellaswag": ({"endings"}, hellaswag),
    "piqa": ({"goal", "sol1", "sol2"}, piqa),
    "openbookqa": ({"question_stem"}, openbookqa),
    "arc": ({"question", "answerKey"}, arc),
    "boolq": ({"passage", "question"}, boolq),
    "siqa": ({"answerA", "answerB", "answerC"}, siqa),
    "winogrande": ({"sentence", "option1", "option2"}, winogrande),
    "mmlu": ({"question", "subject", "choices", "answer"}, mmlu),
    "general": ({"choices"}, general),
    "lambada": ({"text"}, lambada),
}


def format_of(record):
    """OpenBookQA's authors publish records of ARC's fields; theirs have a number as id, ARC's the name of an exam.
    A passage and a question with choices of their own are not answered by yes and no; a text with a label is none whose
    last word is asked for."""
    other = {"boolq": {"choices"}, "lambada": {"label", "gold", "answer"}}
    for name, (keys, _) in FORMATS.items():
        if keys <= set(record) and not other.get(name, set()) & set(record):
            numbered = re.fullmatch(r"[0-9]+(-[0-9]+)?", str(record.get("id", "")))
            return "openbookqa" if name == "arc" and isinstance(record["question"], dict) and numbered else name
    raise ValueError(
        "no format that is known: it has %s; --format one of %s"
        % (", ".join(sorted(record)) or "no field", ", ".join(FORMATS))
    )


def read_labels(path, one):
    try:
        with naming(path), open(path, encoding="utf-8-sig") as f:
            return [whole(line) - one for line in f.read().split()]
    except ValueError as e:
        raise UserError("%s: wanted a number a line: %s" % (path, e))


def convert(args):
    """Records of a file -> requests. A record that cannot be used is named, and left out or refused."""
    if args.command == "lambada" and args.format not in ("auto", "lambada"):
        raise UserError("--format %s: evals.py lambada makes no other than lambada; evals.py choice does" % args.format)
    if args.labels is None and args.labels_from is not None:
        raise UserError("--labels-from: wanted --labels FILE beside it")
    if args.task == "":
        raise UserError("--task: got '', wanted its name in the report")
    refuse_input(args.out, [args.input, args.labels])
    labels = None if args.labels is None else read_labels(args.labels, args.labels_from or 0)
    task = args.task or re.sub(r"\.jsonl?$", "", os.path.basename(args.input))
    if task != task.encode("utf-8", "replace").decode():
        raise UserError("--task: %s is not UTF-8, wanted a name that is" % ascii(task))
    requests, bad, items, formats = [], 0, 0, set()
    with naming(args.input), open(args.input, "rb") as f:
        lines = f.read().removeprefix(codecs.BOM_UTF8).split(b"\n")
    what = what_is(lines[0])
    if what:
        raise UserError("%s: %s, wanted JSON lines" % (args.input, what))
    lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if labels is not None and len(labels) != len(lines):
        raise UserError("%s: %d labels for %d lines of %s" % (args.labels, len(labels), len(lines), args.input))
    for i, (number, line) in enumerate(lines):
        try:
            record = json.loads(line.decode("utf-8"), object_pairs_hook=members)
            if not isinstance(record, dict):
                raise ValueError("wanted an object")
            name = "lambada" if args.command == "lambada" else args.format
            name = format_of(record) if name == "auto" else name
            pairs, gold = FORMATS[name][1](record)
            if len(pairs) < 2 and name != "lambada":
                raise ValueError("%d choices, wanted at least 2" % len(pairs))
            if labels is not None and name == "lambada":
                raise ValueError("a passage has no choices, and --labels no use")
            if labels is not None:
                own, gold = gold, labels[i]
                if any(own in (n, str(n)) for n in range(len(pairs)) if n != gold):
                    raise ValueError("the record says choice %d, --labels says %d (from 0)" % (whole(own), gold))
            if len(pairs) > 1:
                gold = whole(gold) if gold not in (None, "") else None
                if gold is None or not 0 <= gold < len(pairs):
                    raise ValueError("gold is %s, wanted one of the %d choices" % (gold, len(pairs)))
            for context, continuation in pairs:  # all of them, before any is taken
                if not isinstance(context, str) or not isinstance(continuation, str) or not continuation.strip():
                    raise ValueError("an empty continuation")
                (context + continuation).encode("utf-8")
            for choice, (context, continuation) in enumerate(pairs):
                request = {"context": context, "continuation": continuation, "task": task, "item": items}
                if len(pairs) > 1:
                    request.update(choice=choice, gold=gold)
                requests.append(request)
            items += 1
            formats.add(name)
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as e:
            why = "no field %s" % e if isinstance(e, KeyError) else str(e) or "no context"
            if args.on_bad == "refuse":
                raise UserError("%s:%d: %s; mend it, or --on-bad skip" % (args.input, number, why))
            print("%s:%d: %s; skipped" % (args.input, number, why), file=sys.stderr)
            bad += 1
    if not items:
        raise UserError("%s: 0 requests of %d lines, %s is not written" % (args.input, len(lines), args.out))
    write_requests(args.out, requests)
    taken = ", as " + ", ".join(sorted(formats))
    print("%s: %d questions, %d requests, %d lines left out%s" % (args.out, items, len(requests), bad, taken))
    return 0


def write_requests(path, requests):
    """The whole file or none of it: on a full disk the one that was there before stays."""
    data = "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests).encode()
    with naming(path):
        if path.startswith("/dev/") or os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as f:
                f.write(data)
        else:
            write_synced(os.path.realpath(path), data)


# ----------------------------------------------------------------------------------------------------------------------
# Distraction: sentences of any text, as many as make so many tokens


class Haystack:
    """Sentences of texts in their order; each call gives a stretch that begins somewhere else."""

    def __init__(self, paths, tokenizer):
        text = []
        for path in paths:
            try:
                # without a byte-order mark, as Project Gutenberg's have
                with naming(path), open(path, encoding="utf-8-sig") as f:
                    text.append(f.read())
            except UnicodeDecodeError as e:
                raise UserError("%s: not UTF-8 at byte %d" % (path, e.start))
        self.sentences = [
            s.strip() for s in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", " ".join(text))) if s.strip()
        ]
        self.tokenizer = tokenizer
        self.known = {}
        self.repeated = False  # whether the warning was printed
        self.short = {}  # {tokens that were asked for: the fewest that a question got}

    def size(self, sentence):
        """Tokens of a sentence with a space before it."""
        if sentence not in self.known:
            try:
                self.known[sentence] = len(self.tokenizer.encode(" " + sentence)) // self.tokenizer.width
            except BadDocument as e:
                raise UserError("the text: %s" % e.args[1])
        return self.known[sentence]

    def take(self, rng, tokens):
        """Consecutive sentences of `tokens` tokens at most, and at most one sentence less."""
        if tokens == 0:
            return []
        if not self.sentences:
            raise UserError("no text to distract with; give --text FILE")
        at, taken, left = rng.randrange(len(self.sentences)), [], tokens
        while True:
            sentence = self.sentences[at % len(self.sentences)]
            left -= self.size(sentence)
            if left < 0:
                break
            taken.append(sentence)
            at += 1
        if len(taken) > len(self.sentences) and not self.repeated:
            print("the text has %d sentences: it is repeated to make %d tokens" % (len(self.sentences), tokens),
                  file=sys.stderr)
            self.repeated = True
        return taken

    def note(self, asked, sentences):
        """That these sentences stand for so many tokens."""
        got = sum(map(self.size, sentences))
        self.short[asked] = min(got, self.short.get(asked, got))

    def say_short(self):
        """A sentence is not cut: of a text with a long one, or with none that ends, less is taken than was asked
        for."""
        for asked, got in sorted(self.short.items()):
            if got < 0.75 * asked:
                print("%d tokens: a question has but %d, since the text has a sentence of %d; sentences end with a "
                      "blank after . ! or ?" % (asked, got, max(self.known.values(), default=0)), file=sys.stderr)


class NoRoom(UserError):
    """A setting that cannot be made: so short a text does not hold what it asks for."""


class Room:
    """The positions of a model (None: no matter how many): settings of which a question needs more are left out, and
    each is named."""

    def __init__(self, positions, tokenizer):
        self.positions, self.tokenizer = positions, tokenizer
        self.taken, self.least = [], None

    def take(self, setting, make):
        """The requests that make() returns, or none."""
        try:
            requests = make()
        except NoRoom as e:
            if self.positions is None:
                raise
            print("%s: left out: %s" % (setting, e))
            return []
        if self.positions is not None:
            need = self.positions_of(requests)
            self.least = min(need, self.least or need)
            if need > self.positions:
                print("%s: left out: a question needs %d positions, the model has %d" % (setting, need, self.positions))
                return []
        self.taken.append(setting)
        return requests

    def positions_of(self, requests):
        """What the longest of them needs: BOS, context and continuation but for its last token."""
        texts = sorted({r["context"] + r["continuation"] for r in requests})
        ids = self.tokenizer.encode_all([text.encode() for text in texts])
        for bad in (x for x in ids if isinstance(x, BadDocument)):
            raise UserError("the text: %s" % bad.args[1])
        return max(map(len, ids)) // self.tokenizer.width + (self.tokenizer.bos >= 0) - 1

    def check(self):
        if not self.taken:
            least = "" if self.least is None else "; the shortest needs %d" % self.least
            raise UserError("--room %d: no setting fits%s" % (self.positions, least))


def spread(rng, sentences, facts):
    """Facts in their order at random places between sentences."""
    places = sorted(rng.randrange(len(sentences) + 1) for _ in facts)
    out, at = [], 0
    for place, fact in zip(places, facts):
        out += sentences[at:place] + [fact]
        at = place
    return out + sentences[at:]


# ----------------------------------------------------------------------------------------------------------------------
# Needles: several facts of one form in a haystack, one of them at a given depth is asked for

CITIES = (
    "Amsterdam Athens Bangkok Berlin Bogota Boston Brussels Cairo Chicago Copenhagen Dakar Dublin Geneva Hanoi Havana "
    "Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Melbourne Montreal Moscow Mumbai Nairobi "
    "Oslo Paris Prague Rome Seoul Stockholm Sydney Tokyo Vienna Warsaw"
).split()


def place(sizes, depth):
    """Between which of sentences of so many tokens lies `depth` percent of all their tokens, nearest."""
    before = [0]
    for size in sizes:
        before.append(before[-1] + size)
    return min(range(len(before)), key=lambda i: abs(before[i] - depth / 100 * before[-1]))


def needle_context(rng, haystack, needles, tokens, depth):
    """`needles` facts, the first asked for and at `depth` percent of the tokens, as near as sentences allow, the others
    anywhere. -> (context, answer)"""
    cities = rng.sample(CITIES, needles)
    numbers = rng.sample(range(1000000, 10000000), needles)
    facts = ["The secret number of %s is %d." % (c, n) for c, n in zip(cities, numbers)]
    question = "Question: What is the secret number of %s? Answer: The secret number of %s is" % (cities[0], cities[0])
    fixed = sum(haystack.size(f) for f in facts) + haystack.size(question)
    if fixed > tokens:
        raise NoRoom("--length %d: %d needles and the question alone have %d tokens" % (tokens, needles, fixed))
    sentences = haystack.take(rng, tokens - fixed)
    haystack.note(tokens, sentences + facts + [question])
    others = spread(rng, sentences, facts[1:])
    others.insert(place(list(map(haystack.size, others)), depth), facts[0])
    return " ".join(others + [question]), " %d" % numbers[0]


def needle_requests(rng, haystack, needles, tokens, depth, samples):
    """A setting's, without the numbers of their items."""
    pairs = [needle_context(rng, haystack, needles, tokens, depth) for _ in range(samples)]
    setting = {"task": "needle", "item": None, "needles": needles, "length": tokens, "depth": depth}
    return [dict({"context": context, "continuation": answer}, **setting) for context, answer in pairs]


def needle(args):
    refuse_input(args.out, args.text)
    haystack = Haystack(args.text, open_tokenizer(args.tokenizer, args.pattern))
    room, requests = Room(args.room, haystack.tokenizer), []
    for needles in args.needles:
        if not 1 <= needles <= len(CITIES):
            raise UserError("--needles %d: wanted 1 to %d" % (needles, len(CITIES)))
        for depth in args.depth:
            if not 0 <= depth <= 100:
                raise UserError("--depth %d: wanted 0 to 100" % depth)
        for tokens in args.length:

            def make():
                out = []
                for depth in args.depth:
                    rng = random.Random("needle %d %d %d %d" % (args.seed, needles, tokens, depth))
                    out += needle_requests(rng, haystack, needles, tokens, depth, args.samples)
                return out

            requests += room.take("%d needles in %d tokens" % (needles, tokens), make)
    room.check()
    haystack.say_short()
    write_requests(args.out, [dict(r, item=i) for i, r in enumerate(requests)])
    print("%s: %d questions" % (args.out, len(requests)))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# QA1 to QA5: small worlds that are acted out, so that the answer is known. -> (facts, question, answer, all answers)

PEOPLE = ["Mary", "John", "Sandra", "Daniel"]
GIVERS = ["Fred", "Bill", "Jeff", "Mary"]
ROOMS = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
THINGS = ["apple", "football", "milk"]
MOVES = ["went to", "moved to", "journeyed to", "travelled to", "went back to"]
GRABS = ["picked up", "grabbed", "got", "took"]
DROPS = ["dropped", "put down", "discarded", "left"]
WAYS = {"north": "south", "south": "north", "east": "west", "west": "east"}


def qa1(rng):
    """One fact: where is a person who was last seen somewhere?"""
    where, facts = {}, []
    for _ in range(rng.randrange(2, 11)):
        person = rng.choice(PEOPLE)
        where[person] = rng.choice([r for r in ROOMS if r != where.get(person)])
        facts.append("%s %s the %s." % (person, rng.choice(MOVES), where[person]))
    person = rng.choice(sorted(where))
    return facts, "Where is %s?" % person, where[person], ROOMS


class World:
    """People who walk, take things along and put them down. trail: the rooms in which a thing has been, in order."""

    def __init__(self, rng):
        self.rng, self.facts, self.where, self.holder, self.place = rng, [], {}, {}, {}
        self.trail = {t: [] for t in THINGS}

    def enter(self, thing, room):
        if self.trail[thing][-1:] != [room]:
            self.trail[thing].append(room)

    def step(self):
        rng, person = self.rng, self.rng.choice(PEOPLE)
        held = [t for t in THINGS if self.holder.get(t) == person]
        here = self.where.get(person)
        near = [t for t in THINGS if t not in self.holder and self.place.get(t, here) == here] if here else []
        act = rng.random()
        if near and act < 0.4:
            thing = rng.choice(near)
            self.holder[thing] = person
            self.place.pop(thing, None)
            self.enter(thing, here)
            self.facts.append("%s %s the %s." % (person, rng.choice(GRABS), thing))
        elif held and act < 0.55:
            thing = rng.choice(held)
            del self.holder[thing]
            self.place[thing] = here
            self.facts.append("%s %s the %s." % (person, rng.choice(DROPS), thing))
        else:
            room = rng.choice([r for r in ROOMS if r != here])
            self.where[person] = room
            for thing in held:
                self.enter(thing, room)
            self.facts.append("%s %s the %s." % (person, rng.choice(MOVES), room))


def qa2(rng):
    """Two facts: where is a thing that somebody carries or has put down?"""
    world = World(rng)
    steps = rng.randrange(4, 16)
    while len(world.facts) < steps or not any(world.trail.values()):
        world.step()
    thing = rng.choice([t for t in THINGS if world.trail[t]])
    return world.facts, "Where is the %s?" % thing, world.trail[thing][-1], ROOMS


def qa3(rng):
    """Three facts: where was a thing before it came to a room? Asked of its last stay in that room."""
    world = World(rng)
    steps = rng.randrange(8, 26)
    while len(world.facts) < steps or not any(len(t) > 1 for t in world.trail.values()):
        world.step()
    thing = rng.choice([t for t in THINGS if len(world.trail[t]) > 1])
    trail = world.trail[thing]
    at = rng.choice([i for i in range(1, len(trail)) if trail[i] not in trail[i + 1 :]])
    return world.facts, "Where was the %s before the %s?" % (thing, trail[at]), trail[at - 1], ROOMS


def qa4(rng):
    """Two rooms beside one: which lies on that side, or of which is it on that side?"""
    a, b, c = rng.sample(ROOMS, 3)
    first, second = rng.choice([(x, y) for x in WAYS for y in WAYS if y != x])
    facts = ["The %s is %s of the %s." % (a, first, b), "The %s is %s of the %s." % (c, second, b)]
    rng.shuffle(facts)
    room, way = rng.choice([(a, first), (c, second)])
    if rng.random() < 0.5:
        return facts, "What is %s of the %s?" % (way, b), room, ROOMS
    return facts, "What is the %s %s of?" % (b, WAYS[way]), room, ROOMS


def qa5(rng):
    """Who gave what to whom, of the last gift of that kind."""
    facts, gifts, holder = [], [], {}
    for _ in range(rng.randrange(2, 9)):
        thing = rng.choice(THINGS)
        giver = holder.get(thing) or rng.choice(GIVERS)
        taker = rng.choice([p for p in GIVERS if p != giver])
        if thing not in holder:
            facts.append("%s %s the %s." % (giver, rng.choice(GRABS), thing))
        holder[thing] = taker
        gifts.append((giver, thing, taker))
        facts.append("%s %s the %s to %s." % (giver, rng.choice(["gave", "handed", "passed"]), thing, taker))
    giver, thing, taker = rng.choice(gifts)
    last = {
        "thing": [g for g in gifts if g[1] == thing][-1],
        "pair": [g for g in gifts if (g[0], g[2]) == (giver, taker)][-1],
        "to": [g for g in gifts if (g[1], g[2]) == (thing, taker)][-1],
        "from": [g for g in gifts if (g[0], g[1]) == (giver, thing)][-1],
    }
    asked = rng.randrange(5)
    if asked == 0:
        return facts, "What did %s give to %s?" % (giver, taker), last["pair"][1], THINGS
    if asked == 1:
        return facts, "Who gave the %s to %s?" % (thing, taker), last["to"][0], GIVERS
    if asked == 2:
        return facts, "Who did %s give the %s to?" % (giver, thing), last["from"][2], GIVERS
    if asked == 3:
        return facts, "Who gave the %s?" % thing, last["thing"][0], GIVERS
    return facts, "Who received the %s?" % thing, last["thing"][2], GIVERS


TASKS = {1: qa1, 2: qa2, 3: qa3, 4: qa4, 5: qa5}


def babilong_requests(rng, haystack, task, tokens, samples):
    """A setting's; its items are counted from 0."""
    out = []
    for item in range(samples):
        facts, question, answer, answers = TASKS[task](rng)
        around = haystack.take(rng, tokens)
        haystack.note(tokens, around)
        story = spread(rng, around, facts)
        context = " ".join(story) + "\nQuestion: %s\nAnswer:" % question
        for choice, word in enumerate(answers):
            out.append(
                {
                    "context": context,
                    "continuation": " " + word,
                    "task": "qa%d" % task,
                    "item": item,
                    "distraction": tokens,
                    "choice": choice,
                    "gold": answers.index(answer),
                }
            )
    return out


def babilong(args):
    refuse_input(args.out, args.text)
    haystack = Haystack(args.text, open_tokenizer(args.tokenizer, args.pattern))
    room, requests = Room(args.room, haystack.tokenizer), []
    for task in args.tasks:
        if task not in TASKS:
            raise UserError("--tasks %d: wanted 1 to 5" % task)
        for tokens in args.distraction:
            rng = random.Random("babilong %d %d %d" % (args.seed, task, tokens))
            made = room.take(
                "qa%d within %d tokens" % (task, tokens),
                lambda: babilong_requests(rng, haystack, task, tokens, args.samples),
            )
            before = (requests[-1]["item"] + 1) if requests else 0
            requests += [dict(r, item=before + r["item"]) for r in made]
    room.check()
    haystack.say_short()
    write_requests(args.out, requests)
    items = len(room.taken) * args.samples
    print("%s: %d questions, %d requests" % (args.out, items, len(requests)))
    return 0


# ----------------------------------------------------------------------------------------------------------------------


def numbers(text):
    try:
        found = [parse_count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        found = []
    if not found or len(found) != len(set(found)):
        raise argparse.ArgumentTypeError("got %r, wanted numbers such as 0,1000,2k, each once" % text)
    return found


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("lambada", "JSON lines with \"text\""), ("choice", "JSON lines of a multiple-choice set")):
        p = commands.add_parser(name, help=text)
        p.add_argument("input", metavar="INPUT", help="JSON lines")
        p.add_argument("--out", required=True, metavar="FILE")
        p.add_argument("--task", help="its name in the report; default: the file's")
        p.add_argument("--format", choices=["auto"] + list(FORMATS), default="auto",
                       help="default: what the fields of a record tell")
        p.add_argument(
            "--labels", metavar="FILE", help="right answers, a number a line, where the records have none (PIQA, SIQA)"
        )
        p.add_argument("--labels-from", type=whole_number(0, 1), metavar="0|1",
                       help="number of the first choice in --labels; default 0")
        p.add_argument("--on-bad", choices=["skip", "refuse"], default="skip",
                       help="a record that cannot be used is left out and printed (default), or ends the run")
    for name, text in (
        ("needle", "generated needles in a haystack"),
        ("babilong", "generated questions QA1 to QA5 in a distracting text"),
    ):
        p = commands.add_parser(name, help=text)
        p.add_argument("--out", required=True, metavar="FILE")
        p.add_argument("--text", nargs="+", action="extend", default=[], metavar="FILE", help="texts to distract with")
        p.add_argument("--tokenizer", default="bytes", metavar="NAME|FILE", help="counts the tokens; default bytes")
        p.add_argument("--pattern", choices=list(PATTERNS),
                       help="how text is split; default: what the number of ranks tells")
        p.add_argument("--samples", type=whole_number(1, 10**9 - 1), default=100, metavar="N",
                       help="questions of each setting; default 100")
        p.add_argument("--seed", type=whole_number(), default=0, metavar="N",
                       help="another seed, other questions; default 0")
        p.add_argument("--room", type=whole_number(1, 10**9 - 1), metavar="N",
                       help="positions of a model: settings of which a question needs more are named and left out")
        if name == "needle":
            p.add_argument(
                "--needles", type=numbers, default=[2, 4, 6, 8, 10], metavar="N,...", help="default 2,4,6,8,10"
            )
            p.add_argument("--length", type=numbers, default=[2000, 4000], metavar="N,...",
                           help="tokens of the context; default 2000,4000")
            p.add_argument("--depth", type=numbers, default=[0, 25, 50, 75, 100], metavar="P,...",
                           help="percent; default 0,25,50,75,100")
        else:
            p.add_argument("--tasks", type=numbers, default=[1, 2, 3, 4, 5], metavar="N,...", help="default 1,2,3,4,5")
            p.add_argument("--distraction", type=numbers, default=[0, 1000, 2000, 4000], metavar="N,...",
                           help="tokens; default 0,1000,2000,4000")
    p = commands.add_parser("report", help="accuracy and perplexity: tables of one model or several, CSV, pictures")
    p.add_argument(
        "files",
        nargs="+",
        metavar="[NAME=]FOLDER|REQUESTS SCORES",
        help="folders of scripts/evaluate.sh, each a model (NAME.jsonl, NAME.scores, validation/log.jsonl); or pairs "
             "of files",
    )
    p.add_argument("--json", metavar="FILE", help="the numbers, not rounded")
    p.add_argument("--csv", metavar="FILE", help="the same, a row for each model, task and setting")
    p.add_argument("--markdown", metavar="FILE", help="the tables, with the pictures of --pictures")
    p.add_argument("--pictures", metavar="FOLDER",
                   help="needles.png (heat maps, depth by length) and babilong.png go there; needs matplotlib")
    args = parser.parse_args()
    command = {"lambada": convert, "choice": convert, "needle": needle, "babilong": babilong, "report": report}[
        args.command
    ]
    try:
        return command(args)
    except UserError as e:
        sys.exit("evals.py: %s" % e)


if __name__ == "__main__":
    run_program(main)
