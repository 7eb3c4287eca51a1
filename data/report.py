"""Tables, CSV and pictures of what models have scored, for evals.py report. Standard library; matplotlib for the
pictures.

A model is the answers to some files of requests, and the log of an evaluation of its validation sets where there is
one. The tables are the paper's: validation perplexity by domain and its mean, LAMBADA, zero-shot tasks, needles in a
haystack, BabiLong; models stand below each other, the best figure of a column is bold.
"""

import csv
import glob
import hashlib
import json
import math
import os
import re
import sys

from options import picture_name, split_name
from tokenizer import UserError, members, naming

SETTINGS = ("needles", "length", "depth", "distraction")
MEASURES = ("accuracy", "acc_norm", "acc_bytes", "acc_token", "greedy")
COLUMNS = ("questions", "accuracy", "stderr") + MEASURES[1:] + ("perplexity", "token_ppl")
OF_VALIDATION = ("loss", "bits_per_byte", "tokens", "error")  # columns of validation sets alone

# ----------------------------------------------------------------------------------------------------------------------
# What was asked and answered


def is_request(record):
    return (
        isinstance(record["continuation"], str)
        and isinstance(record["task"], str)
        and type(record["item"]) in (int, str)
        and type(record.get("choice", 0)) is int
    )


def read_lines(path, keys):
    records = []
    try:
        with naming(path), open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=members)
                    missing = [k for k in keys if not isinstance(record, dict) or k not in record]
                    if missing:
                        raise UserError("%s:%d: no %s" % (path, number, ", ".join(missing)))
                    if "greedy" in keys and not (type(record["greedy"]) is bool and type(record["tokens"]) is int):
                        raise UserError("%s:%d: wanted a number of tokens, and true or false as greedy" %
                                        (path, number))
                    if "item" in keys and not is_request(record):
                        raise UserError("%s:%d: wanted texts as continuation and task, and numbers as item and choice" %
                                        (path, number))
                    records.append(record)
    except (ValueError, RecursionError) as e:
        raise UserError("%s:%d: broken JSON: %s" % (path, number, e))
    return records


def choice_of(request):
    """The choice without the space that separates it from the context."""
    return request["continuation"].removeprefix(" ")


def score_item(answers):
    """One question: [(request, score)] of its choices in order -> the numbers that are averaged."""
    gold = answers[0][0].get("gold", 0 if len(answers) == 1 else None)
    known = type(gold) is int and gold in range(len(answers)) and all(r.get("gold", gold) == gold for r, _ in answers)
    if [r.get("choice", 0) for r, _ in answers] != list(range(len(answers))) or not known:
        raise UserError("item %s: its choices are not whole, or none of them is gold" % answers[0][0]["item"])
    _, score = answers[gold]
    result = {
        "logprob": score["logprob"],
        "tokens": score["tokens"],
        "greedy": float(score["greedy"]),
        "accuracy": float(score["greedy"]),
        "choices": len(answers),
    }
    if len(answers) > 1:
        for name, value in (
            ("accuracy", lambda r, s: s["logprob"]),
            ("acc_norm", lambda r, s: s["logprob"] / max(1, len(choice_of(r)))),
            ("acc_bytes", lambda r, s: s["logprob"] / max(1, len(choice_of(r).encode()))),
            ("acc_token", lambda r, s: s["logprob"] / max(1, s["tokens"])),
        ):
            values = [value(r, s) for r, s in answers]
            result[name] = float(values.index(max(values)) == gold)
    return result


def safe_exp(x):
    return math.exp(x) if x < 700 else math.inf


def mean_of(items):
    n = len(items)
    logprob, tokens = sum(i["logprob"] for i in items), sum(i["tokens"] for i in items)
    row = {"questions": n}
    for name in MEASURES:
        if name in items[0]:
            row[name] = sum(i[name] for i in items) / n
    row["stderr"] = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / max(1, n - 1))
    row["perplexity"] = safe_exp(-logprob / n)
    row["token_ppl"] = safe_exp(-logprob / tokens) if tokens else None
    return row


class Model:
    """items: [(task, {setting: number}, numbers of the question)]. validation: {set: its event in the log}. asked:
    {(checksum of a question, its item): its file}. questions: {(task, its settings): checksums}. kinds:
    {task: what kind_of says}. files: {task without settings: files that ask its questions}. window: tokens of a
    sequence of the validation, None not known."""

    def __init__(self, name):
        self.name, self.items, self.validation, self.asked, self.questions, self.kinds = name, [], {}, {}, {}, {}
        self.window, self.files = None, {}

    def add(self, requests_path, scores_path):
        requests = read_lines(requests_path, ("continuation", "task", "item"))
        scores = read_lines(scores_path, ("logprob", "tokens", "greedy"))
        if len(requests) != len(scores):
            raise UserError(
                "%s has %d requests, %s has %d scores" % (requests_path, len(requests), scores_path, len(scores))
            )
        items = {}
        for request, score in zip(requests, scores):
            if not isinstance(score["logprob"], (int, float)) or not math.isfinite(score["logprob"]):
                raise UserError("%s: a log-probability that is no number, for item %s" % (scores_path, request["item"]))
            items.setdefault(request["item"], []).append((request, score))
        for answers in items.values():
            answers.sort(key=lambda a: a[0].get("choice", 0))
            first = answers[0][0]
            settings = {k: first[k] for k in SETTINGS if k in first}
            if not all(type(v) in (int, float) for v in settings.values()):
                raise UserError("%s: item %s: its settings are no numbers: %s" % (requests_path, first["item"],
                                                                                  settings))
            numbers = score_item(answers)
            kind = kind_of(settings, numbers)
            if kind != self.kinds.setdefault(first["task"], kind):
                raise UserError("%s: item %s: task %s has questions with choices and without, or of other settings" %
                                (requests_path, first["item"], first["task"]))
            self.items.append((first["task"], settings, numbers))
            if not settings and requests_path not in self.files.setdefault(first["task"], []):
                self.files[first["task"]].append(requests_path)
            asked = [{k: v for k, v in request.items() if k != "item"} for request, _ in answers]
            question = hashlib.sha256(repr(asked).encode("utf-8", "replace")).digest()
            before = self.asked.setdefault((question, first["item"]), requests_path)
            if before != requests_path:
                raise UserError("%s: item %s is asked in %s too and would count twice; for several models give "
                                "NAME=FOLDER of each" % (requests_path, first["item"], before))
            self.questions.setdefault((first["task"], tuple(settings.items())), set()).add(question)

    def add_folder(self, folder):
        """Every NAME.scores with NAME.jsonl beside it, and validation/log.jsonl."""
        scores = sorted(glob.glob(os.path.join(glob.escape(folder), "*.scores")))
        log = os.path.join(folder, "validation", "log.jsonl")
        for path in scores:
            self.add(path[: -len(".scores")] + ".jsonl", path)
        if os.path.exists(log):
            self.read_validation(read_lines(log, ("event",)))
        if not scores and not self.validation:
            raise UserError("%s: no NAME.scores and no validation/log.jsonl in it" % folder)

    def read_validation(self, events):
        for e in events:
            if e["event"] == "start":
                self.window = e.get("seq_len")
            elif e["event"] == "val":
                self.validation[e["name"]] = e

    def groups(self):
        """{(task, settings in their order): mean}: of each task, and of each of its settings; sorted, numbers as
        numbers."""
        found = {}
        for task, settings, numbers in self.items:
            for key in {(task, ()), (task, tuple(settings.items()))}:
                found.setdefault(key, []).append(numbers)
        order = sorted(found, key=lambda k: (k[0], [v for _, v in k[1]]))
        return {key: mean_of(found[key]) for key in order}

    def tasks(self, kind):
        """Names of the tasks of a kind, in the order in which they came."""
        return list(dict.fromkeys(t for t, s, n in self.items if kind_of(s, n) == kind))

    def mean(self, task=None, kind=None, **settings):
        """The mean over the questions of a task or kind that have these settings; None where there is none."""
        found = [
            n
            for t, s, n in self.items
            if task in (None, t) and kind in (None, kind_of(s, n)) and all(s.get(k) == v for k, v in settings.items())
        ]
        return mean_of(found) if found else None

    def chance(self, task):
        choices = [1 / n["choices"] for t, _, n in self.items if t == task]
        return sum(choices) / len(choices)


def kind_of(settings, numbers):
    if "needles" in settings:
        return "needle"
    if "distraction" in settings:
        return "babilong"
    return "choice" if numbers["choices"] > 1 else "word"


def settings_of(models, kind, name):
    """All values of a setting, sorted."""
    return sorted({s[name] for m in models for _, s, n in m.items if kind_of(s, n) == kind and name in s})


# ----------------------------------------------------------------------------------------------------------------------
# Tables: title, heads of the leading columns, columns [(head, which is better, digits)], groups of rows. In a group the
# rows are models, [leading cells, values]; the best of each column is bold.


def mean_if_whole(values):
    return sum(values) / len(values) if values and None not in values else None


def percent(row, measure="accuracy"):
    return None if row is None or row.get(measure) is None else 100 * row[measure]


def with_mean(columns, values):
    """A column of the mean after several; only where all of them are known."""
    if len(columns) < 2:
        return columns, values
    return columns + [("mean",) + columns[0][1:]], [v + [mean_if_whole(v)] for v in values]


def plain_table(title, models, columns, values):
    columns, values = with_mean(columns, values)
    return title, ["model"], columns, [[([m.name], v) for m, v in zip(models, values)]]


def validation_tables(models):
    models = [m for m in models if m.validation]
    sets = list(dict.fromkeys(name for m in models for name in m.validation))
    for key, title, digits, scale in (("perplexity", "Validation perplexity", 2, 1),
                                      ("bits_per_byte", "Validation, bits per byte", 4, 1),
                                      ("error", "Sequences with a wrong answer token, %", 1, 100)):
        values = [[m.validation.get(s, {}).get(key) for s in sets] for m in models]
        if any(v is not None for row in values for v in row):
            scaled = [[None if v is None else scale * v for v in row] for row in values]
            yield plain_table(title, models, [(s, min, digits) for s in sets], scaled)


def word_table(models):
    models = [m for m in models if m.tasks("word")]
    tasks = list(dict.fromkeys(t for m in models for t in m.tasks("word")))
    columns = [c for t in tasks for c in ((t + ": perplexity", min, 2), (t + ": accuracy %", max, 1))]
    rows = []
    for m in models:
        cells = [(row["perplexity"] if row else None, percent(row)) for row in (m.mean(t) for t in tasks)]
        rows.append(([m.name], [x for pair in cells for x in pair]))
    return ("Last word of a passage (LAMBADA)", ["model"], columns, [rows])


def choice_tables(models):
    models = [m for m in models if m.tasks("choice")]
    tasks = sorted({t for m in models for t in m.tasks("choice")})
    for measure, title in (("accuracy", "Zero-shot accuracy, %"),
                           ("acc_norm", "Zero-shot accuracy per character (acc_norm), %")):
        values = [[percent(m.mean(t), measure) for t in tasks] for m in models]
        yield plain_table(title, models, [(t, max, 1) for t in tasks], values)


def needle_tables(models):
    models = [m for m in models if m.tasks("needle")]
    counts, depths = settings_of(models, "needle", "needles"), settings_of(models, "needle", "depth")
    for length in settings_of(models, "needle", "length"):
        found = lambda m, **more: percent(m.mean(kind="needle", length=length, **more))
        values = [[found(m, needles=n) for n in counts] for m in models]
        title = "Needles in a haystack of %d tokens, accuracy in %%, mean over depths" % length
        yield plain_table(title, models, [("%d needle%s" % (n, "s" * (n > 1)), max, 1) for n in counts], values)
        columns, groups = [("%d%%" % d, max, 1) for d in depths], []
        for n in counts:
            wide, rows = with_mean(columns, [[found(m, needles=n, depth=d) for d in depths] for m in models])
            groups.append([(["%d" % n, m.name], row) for m, row in zip(models, rows)])
        yield ("The same by the depth of the needle that is asked for", ["needles", "model"], wide, groups)


def babilong_table(models):
    models = [m for m in models if m.tasks("babilong")]
    tasks = sorted({t for m in models for t in m.tasks("babilong")})
    lengths = settings_of(models, "babilong", "distraction")
    groups, grid = [], {}
    for task in tasks:
        for m in models:
            grid[task, m.name] = [percent(m.mean(task, distraction=d)) for d in lengths]
    if len(tasks) > 1:
        for m in models:
            grid["mean", m.name] = [mean_if_whole(list(v)) for v in zip(*(grid[t, m.name] for t in tasks))]
    for task in tasks + ["mean"] * (len(tasks) > 1):
        wide, rows = with_mean([("%d" % d, max, 1) for d in lengths], [grid[task, m.name] for m in models])
        groups.append([([task, m.name], row) for m, row in zip(models, rows)])
    return ("BabiLong, accuracy in %, by tokens of distraction", ["task", "model"], wide, groups)


def not_the_same(models):
    """Tasks for which two models were not asked the same questions under one setting."""
    groups = {}
    for m in models:
        for key, questions in m.questions.items():
            groups.setdefault(key, set()).add(frozenset(questions))
    return sorted({task for (task, _), asked in groups.items() if len(asked) > 1})


def joined_files(models):
    """A line for each task whose questions are those of several files: parts of one set, or sets of one name."""
    for m in models:
        for task, files in m.files.items():
            if len(files) > 1:
                names = list(map(os.path.basename, files))
                yield "%s: %s has the questions of %s together; of two sets, give each a name (evals.py --task)." % (
                    m.name, task, ", ".join(names if len(set(names)) == len(names) else files))


def other_windows(models):
    """A line for each validation set on which models were not measured alike: over other tokens, or in windows of
    another length, where each token has another context. Such figures do not compare."""
    for name in dict.fromkeys(name for m in models for name in m.validation):
        tokens = lambda m: m.validation[name].get("tokens")
        how = {m.name: "%s tokens in windows of %s" % tuple("?" if n is None else n for n in (tokens(m), m.window))
               for m in models if name in m.validation}
        if len(set(how.values())) > 1:
            yield "Not all models were validated alike on %s: %s." % (
                name, "; ".join("%s on %s" % pair for pair in how.items()))


def tables_of(models):
    has = lambda kind: any(m.tasks(kind) for m in models)
    found = list(validation_tables(models))
    found += [word_table(models)] if has("word") else []
    found += list(choice_tables(models)) if has("choice") else []
    found += list(needle_tables(models)) if has("needle") else []
    return found + ([babilong_table(models)] if has("babilong") else [])


def cell(value, digits):
    """A figure of a table; a perplexity beyond a million is that of a model that knows nothing."""
    return "-" if value is None else "%.*f" % (digits, value) if value < 1e6 else "%.2e" % value


def in_markdown(name):
    """A name as a page of Markdown shows it: *, < and an _ at the end of a word would be marks there, and vanish."""
    return re.sub(r"[\\`*<\[]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", name)


def markdown(table, several, name=str):
    """A table in Markdown whose columns stand below each other as plain text too. name(text): how names are written."""
    title, leading, columns, groups = table
    lines = [leading + [name(c[0]) for c in columns]]
    for group in groups:
        bests = []
        for i, (_, better, _) in enumerate(columns):
            known = [values[i] for _, values in group if values[i] is not None]
            bests.append(better(known) if known and several and len(group) > 1 else None)
        for cells, values in group:
            row = list(map(name, cells))
            for (_, _, digits), value, best in zip(columns, values, bests):
                text = cell(value, digits)
                row.append("**%s**" % text if value is not None and value == best else text)
            lines.append(row)
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in escaped)) for i in range(len(lines[0]))]
    n = len(leading)
    show = lambda line: "| " + " | ".join(c.ljust(w) if i < n else c.rjust(w)
                                          for i, (c, w) in enumerate(zip(line, widths))) + " |"
    rule = "|" + "|".join("-" * (w + 2) if i < n else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join(["### " + title, "", show(escaped[0]), rule] + [show(line) for line in escaped[1:]]) + "\n"


def label(key):
    task, settings = key
    return ", ".join([task] + ["%s %s" % pair for pair in settings])


def flat(model):
    """Every measure of every task and setting."""
    rows = {label(key): row for key, row in model.groups().items()}
    width = max([len(g) for g in rows] + [4])
    lines = ["%-*s %s" % (width, "task", " ".join("%10s" % c for c in COLUMNS))]
    for group, row in rows.items():
        cells = ["%10d" % row["questions"]]
        cells += ["%10s" % cell(row.get(c), 4) for c in COLUMNS[1:]]
        lines.append("%-*s %s" % (width, group, " ".join(cells)))
    return "\n".join(lines) + "\n"


def write_csv(f, models):
    """A row for each model, task and setting; all that was measured, not rounded."""
    writer = csv.writer(f, lineterminator="\n")
    writer.writerow(("model", "task") + SETTINGS + COLUMNS + OF_VALIDATION)
    for m in models:
        for name, event in m.validation.items():
            row = ["" if event.get(c) is None else event[c] for c in COLUMNS + OF_VALIDATION]
            writer.writerow([m.name, "validation " + name] + [""] * len(SETTINGS) + row)
        for (task, settings), row in m.groups().items():
            cells = [dict(settings).get(k, "") for k in SETTINGS]
            writer.writerow([m.name, task] + cells + ["" if row.get(c) is None else row[c] for c in COLUMNS] +
                            [""] * len(OF_VALIDATION))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_needles(pyplot, models, path):
    """Heat maps: a row of panels for each model, one for each number of needles; depth downwards, length to the
    right."""
    models = [m for m in models if m.tasks("needle")]
    counts, depths, lengths = (settings_of(models, "needle", k) for k in ("needles", "depth", "length"))
    size = (1.6 + len(counts) * max(1.5, 0.62 * len(lengths) + 0.5),
            1.1 + len(models) * max(1.7, 0.36 * len(depths) + 0.5))
    figure, axes = pyplot.subplots(len(models), len(counts), figsize=size, squeeze=False, layout="constrained")
    for m, row in zip(models, axes):
        for count, ax in zip(counts, row):
            cells = [[percent(m.mean(kind="needle", needles=count, length=n, depth=d)) for n in lengths]
                     for d in depths]
            grid = [[math.nan if c is None else c for c in line] for line in cells]
            picture = ax.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
            for i, line in enumerate(cells):
                for k, cell in enumerate(line):
                    if cell is not None:
                        dark = cell < 15 or cell > 90
                        ax.text(k, i, "%.0f" % cell, ha="center", va="center", fontsize=8,
                                color="white" if dark else "black")
            ax.set_xticks(range(len(lengths)), ["%d" % n for n in lengths], rotation=90 if len(lengths) > 3 else 0,
                          fontsize=8)
            ax.set_yticks(range(len(depths)), ["%d" % d for d in depths] if ax is row[0] else [], fontsize=8)
            if ax in axes[0]:
                ax.set_title("%d needle%s" % (count, "s" * (count > 1)), fontsize=10)
            if ax in axes[-1]:
                ax.set_xlabel("length (tokens)", fontsize=9)
        row[0].set_ylabel("%s\ndepth (%%)" % picture_name(m.name), fontsize=9)
    figure.colorbar(picture, ax=axes, label="accuracy (%)", fraction=0.08, pad=0.02)
    figure.suptitle("Needles in a haystack", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def point_of(i):
    """With one of ten colours no two of 100 models look the same."""
    return "os^Dv<>pP*"[(i + i // 10) % 10]


def draw_babilong(pyplot, models, path):
    """A panel for each task and their mean: accuracy over distraction, a curve for each model, chance dotted."""
    models = [m for m in models if m.tasks("babilong")]
    tasks = sorted({t for m in models for t in m.tasks("babilong")})
    lengths = settings_of(models, "babilong", "distraction")
    panels = tasks + ["mean"] * (len(tasks) > 1)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.1 * columns + 1.6, 2.6 * rows + 0.5), squeeze=False,
                                   sharey=True, layout="constrained")
    colours, at = pyplot.get_cmap("tab10").colors, range(len(lengths))
    for panel, ax in zip(panels, axes.flat):
        shown = tasks if panel == "mean" else [panel]
        for i, m in enumerate(models):
            known = [mean_if_whole([percent(m.mean(t, distraction=d)) for t in shown]) for d in lengths]
            values = [math.nan if v is None else v for v in known]
            ax.plot(at, values, point_of(i) + "-", color=colours[i % 10], label=picture_name(m.name), markersize=4,
                    linewidth=1.5)
        chances = [m.chance(t) for m in models for t in shown if t in m.tasks("babilong")]
        ax.axhline(100 * sum(chances) / len(chances), color="0.5", linestyle=":", linewidth=1.2, label="chance")
        ax.set_title(panel.upper() if panel != "mean" else "mean", fontsize=10)
        ax.set_xticks(at, ["%d" % d for d in lengths], fontsize=8)
        ax.set_ylim(-3, 103)
        ax.grid(alpha=0.25)
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    figure.supxlabel("distraction (tokens)", fontsize=9)
    figure.supylabel("accuracy (%)", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.suptitle("BabiLong", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw(models, folder):
    """needles.png and babilong.png in the folder; the names of those that there was something to draw for."""
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("--pictures: %s; pip install -r data/requirements.txt installs it" % e)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for kind, name, picture in (("needle", "needles.png", draw_needles), ("babilong", "babilong.png", draw_babilong)):
        if any(m.tasks(kind) for m in models):
            picture(pyplot, models, os.path.join(folder, name))
            drawn.append(name)
    return drawn


# ----------------------------------------------------------------------------------------------------------------------


def models_of(arguments):
    """Folders, [NAME=]FOLDER each a model; or pairs of files, REQUESTS SCORES, all of one model."""
    named = [(name or os.path.basename(os.path.abspath(path)), path) for name, path in map(split_name, arguments)]
    folders = [os.path.isdir(path) for _, path in named]
    if any(folders):
        wrong = [path for (_, path), folder in zip(named, folders) if not folder]
        if wrong:
            raise UserError("%s: no folder; wanted folders alone, or pairs of files REQUESTS SCORES" % wrong[0])
        names = [name for name, _ in named]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError("two models are called %s; NAME=FOLDER gives another name" % twice[0])
        models = [Model(name) for name in names]
        for m, (_, path) in zip(models, named):
            m.add_folder(path)
        return models
    if len(arguments) % 2:
        raise UserError("wanted folders of evaluations, or pairs of files: REQUESTS SCORES ...")
    model, seen = Model("model"), set()
    for requests, scores in zip(arguments[::2], arguments[1::2]):
        if os.path.realpath(requests) in seen:
            raise UserError("%s: given twice, its questions would count twice" % requests)
        seen.add(os.path.realpath(requests))
        model.add(requests, scores)
    return [model]


def refuse_input(path, inputs):
    """A result must not take the place of what it is made from."""
    for other in filter(None, inputs):
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise UserError("%s: the input itself, wanted another file to write to" % path)


def write(path, text):
    # names of folders need not be UTF-8
    with naming(path), open(path, "w", encoding="utf-8", errors="backslashreplace") as f:
        f.write(text)


def check_outputs(args):
    """Each output is a file of its own and none of those that the report is made from."""
    outputs = [path for path in (args.json, args.csv, args.markdown) if path]
    read = []
    for _, path in map(split_name, args.files):
        parts = ("*.jsonl", "*.scores", os.path.join("validation", "log.jsonl"))
        read += [path] + [file for part in parts for file in glob.glob(os.path.join(glob.escape(path), part))]
    for i, path in enumerate(outputs):
        refuse_input(path, read)
        if os.path.realpath(path) in map(os.path.realpath, outputs[:i]):
            raise UserError("%s: named for two outputs, wanted a file for each" % path)


def report(args):
    check_outputs(args)
    models = models_of(args.files)
    tables = list(tables_of(models))
    text = "\n".join(markdown(t, len(models) > 1) for t in tables)
    page = "\n".join(markdown(t, len(models) > 1, in_markdown) for t in tables)
    other = not_the_same(models)
    notes = "\nNot all models were asked the same questions: %s.\n" % ", ".join(other) if other else ""
    notes += "".join("\n%s\n" % line for line in [*other_windows(models), *joined_files(models)])
    text, page = text + notes, page + in_markdown(notes)
    details = "\n".join(("### %s: every measure\n\n" % m.name if len(models) > 1 else "") + flat(m)
                        for m in models if m.items)
    if args.json:
        finite = lambda row: {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}  # as JSON has it
        rows = {m.name: {label(key): finite(row) for key, row in m.groups().items()} for m in models}
        for m in models:
            for name, event in m.validation.items():
                rows[m.name]["validation " + name] = {c: event[c] for c in COLUMNS + OF_VALIDATION if c in event}
        write(args.json, json.dumps(rows if len(models) > 1 else rows[models[0].name], indent=1) + "\n")
    if args.csv:
        with naming(args.csv), open(args.csv, "w", encoding="utf-8", errors="backslashreplace", newline="") as f:
            write_csv(f, models)
    pictures = []
    if args.pictures:
        with naming(args.pictures):
            os.makedirs(args.pictures, exist_ok=True)
            pictures = draw(models, args.pictures)
    if args.markdown:
        base = os.path.relpath(args.pictures, os.path.dirname(args.markdown) or ".") if pictures else ""
        links = "".join("\n![%s](%s)\n" % (name[:-4], os.path.normpath(os.path.join(base, name)).replace(" ", "%20"))
                        for name in pictures)
        write(args.markdown, page + links + ("\n```\n%s```\n" % details if details else ""))
    sys.stdout.write(text + ("\n" if text and details else "") + details)
    return 0
