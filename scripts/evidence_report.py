"""Writes dev/RESULTS.md and its pictures from the cells in dev/evidence/*.jsonl: `scripts/evidence.sh --report` calls
write().

Every table says what the paper has, what we have, at which size, over how many seeds, by which command and commit. A
part without finished cells is said to be open. The pictures need matplotlib; without it the tables alone are
written."""

import os
import statistics
import sys
import textwrap

import evidence
import evidence_long
import toy_report

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

PICTURES = os.path.join(evidence.ROOT, "dev", "pictures")
TOY_PAPER = {a: {task: e.replace("+-", "±") for task, e in row.items()} for a, row in toy_report.PAPER.items()}
COLOURS = ("#7f7f7f", "#e69f00", "#0000a7", "#009e73")  # of all attentions but the plain one
PAIR = ("transformer", "mta")
LANGUAGE_PAPER = {
    "transformer": 11.25, "diff": 11.15, "talking-heads": 11.04, "mta": 11.09, "mta-full": 10.91,
}  # mean validation perplexity, 880M


def spread(values, scale=1.0, digits=1):
    """Mean and standard deviation over seeds, as text; "-" for none."""
    values = [scale * v for v in values]
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t for 95%, two sides, by degrees of freedom


def another_seed(values, scale=1.0, digits=1):
    """Where one more seed's value lies with 95%, as text, "-" where fewer than two or more than five are known: the
    mean +- t s sqrt(1 + 1/n), for values that scatter normally; an error is not below 0."""
    values, n = [scale * v for v in values], len(values)
    if n - 1 not in T_95:
        return "-"
    reach = T_95[n - 1] * statistics.stdev(values) * (1 + 1 / n) ** 0.5
    low, high = max(0.0, statistics.mean(values) - reach), statistics.mean(values) + reach
    return f"{low:.{digits}f} to {high:.{digits}f}"


def mean_interval(values):
    """(low, high) of the mean with 95%: mean +- t s / sqrt(n), for values that scatter normally; of one value nothing
    is known."""
    n = len(values)
    reach = T_95[n - 1] * statistics.stdev(values) / n**0.5 if n - 1 in T_95 else float("inf")
    return statistics.mean(values) - reach, statistics.mean(values) + reach


def pooled(groups):
    """The standard deviation within groups of values, over all that have at least two; None without any."""
    groups = [g for g in groups if len(g) > 1]
    freedom = sum(len(g) - 1 for g in groups)
    return (sum(statistics.variance(g) * (len(g) - 1) for g in groups) / freedom) ** 0.5 if groups else None


def seeds_of(results):
    """Over which seeds of initialisation and data a table's values are."""
    seeds = sorted({r["seed"] for r in results})
    if len(seeds) < 2:
        return f"seed {seeds[0]} of initialisation and data" if seeds else "no seed yet"
    return f"mean and standard deviation over seeds {', '.join(map(str, seeds))} of initialisation and data"


def filled(line):
    """A paragraph in lines of at most 120 columns; a table's row, a picture and a heading stay as they are."""
    if line.startswith(("|", "!", "#")):
        return line
    options = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, subsequent_indent="  " if line.startswith("- ") else "", **options)


def count(n):
    return "one seed" if n == 1 else f"{n} seeds"


def table(head, rows):
    return (
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
        + [""]
    )


def origin(results, part):
    """The line below a table: command, commits, processors, hours by the clock."""
    commits = ", ".join(sorted({r["commit"] for r in results}))
    machines = ", ".join(sorted({r["processor"] for r in results}))
    hours = sum(r["seconds"] for r in results) / 3600
    done, wanted = len(results), len(evidence.cells_of(part))
    return [
        f"`scripts/evidence.sh {part}`: {done} of {wanted} cells, {hours:.1f} hours ({machines}), commit {commits}.",
        "",
    ]


def paper_toy_flop():
    """As dev/MODEL.md counts a step; 4 layers of 256 channels, MLP of 768, 32 ids, 100,000 steps of 64 x 321 tokens."""
    parameters = 4 * (4 * 256 * 256 + 3 * 256 * 768) + 256 * 32
    return (6.0 * parameters + 3 * 4 * 2 * 256 * 321) * 100000 * 64 * 321


def toy(results):
    chosen = [r for r in results if r["steps"] == evidence.TOY_STEPS]
    lines = [
        "## The toy task: find the block that holds two letters",
        "",
        "Claim: a plain Transformer fails at it, MTA does not.",
        "- The paper: 4 layers, 2 heads, 256 channels, sequences of 321 tokens (34 to 52 blocks), 100,000 steps, "
        "attention dropout 0.1.",
        f"- Here: {evidence.TOY_BEST['layers']} layers, 2 heads, {evidence.TOY_BEST['width']} channels, "
        f"{evidence.TOY_BLOCKS} blocks, {evidence.TOY_STEPS} steps of 64 fresh sequences, no dropout. The learning "
        f"rate is {evidence.TOY_BEST['lr']:g} with linear decay. It was chosen for the plain Transformer, by one "
        "seed of each setting of `toy-tuning`. The errors of these settings differ by no more than those of different "
        "seeds.",
        "- This does not show that a plain model fails even if it is trained much longer. The next section has three "
        "times the steps.",
        "- The table has the share of sequences with a wrong answer token, in percent, of 1000 sequences that training "
        f"never saw; {seeds_of(chosen)}.",
        "- A model that only repeats one of the question's two letters is right in one of N cases: with probability 2 "
        "/ N the wanted letter is one of the two, and then it repeats the right one in half of the cases. A plain "
        "model near that error has learned nothing about blocks.",
        f"- The paper's own size would take {paper_toy_flop():.1e} operations a run, for 36 runs: about 5 hours of one "
        "H200 at a tenth of its 990 TFLOP/s, a prediction (`scripts/evidence.sh toy-paper`).",
        "",
    ]
    tasks = [f"n{n}_{kind}" for n, kind in evidence.TOY_TASKS]
    repeats = ["-" if kind == "all" else f"{100 * (1 - 1 / n):.1f}" for n, kind in evidence.TOY_TASKS]
    rows = [["a letter of the question repeated", *repeats]]
    for attention in ("transformer", "mta"):
        values = {
            t: [r["last"]["toy"] for r in chosen if r["task"] == t and r["attention"] == attention] for t in tasks
        }
        rows.append([f"{attention}, paper"] + [TOY_PAPER[attention][t] for t in tasks])
        rows.append(
            [f"{attention}, ours"]
            + [spread(values[t], 100) + (f" ({len(values[t])})" if values[t] else "") for t in tasks]
        )
    lines += table(["error in % (seeds)"] + [t.replace("_", ", ").replace("n", "N ", 1) for t in tasks], rows)
    return lines + origin(chosen, "toy")


def tuned_longer():
    """The cells of toy-tuning that have three times the steps: N 5, first, of seed 1."""
    return [r for r in evidence.read_results("toy-tuning").values() if r["steps"] == evidence.TOY_LONG_STEPS]


def toy_long(results):
    """The table's cells beside the same cells with three times the steps, that of toy-tuning among them: what longer
    training gives each model."""
    short = {(r["task"], r["seed"], r["attention"]): r for r in evidence.read_results("toy").values()}
    longer = {(r["task"], r["seed"], r["attention"]): r for r in [*results, *tuned_longer()]}
    late, rows = 7 * evidence.TOY_LONG_STEPS // 10, []
    for n, kind in evidence.TOY_TASKS:
        for seed in sorted({seed for task, seed, _ in longer if task == f"n{n}_{kind}"}):
            row = [f"N {n}, {kind}", " and ".join(TOY_PAPER[a][f"n{n}_{kind}"] for a in PAIR), seed]
            for attention in PAIR:
                before, after = (cells.get((f"n{n}_{kind}", seed, attention)) for cells in (short, longer))
                at = [before and before["last"]["toy"], after and dict(after["curve"]["toy"]).get(late)]
                at.append(after and after["last"]["toy"])
                row += ["-" if error is None else f"{100 * error:.1f}" for error in at]
            rows.append(row)
    end = evidence.TOY_LONG_STEPS
    head = [f"{a} {when}" for a in PAIR for when in (f"after {evidence.TOY_STEPS}", f"{late} of {end}", f"{end}")]
    lines = [
        "## The toy task with three times the steps", "",
        f"The table above may be far from its plateau. This one has errors in percent during {end} steps of fresh "
        f"sequences (none is drawn twice). In each run the learning rate falls to 0 at its last step. Where the error "
        f"after {end} steps is far below that after {evidence.TOY_STEPS}, the table above shows which model learns "
        "faster, and this one which model learns the task at all. Two of its runs are cells of `toy-tuning` (N 5, "
        "first, seed 1).",
        "",
    ]
    return lines + table(["task", "paper: plain and mta", "seed", *head], rows) + origin(results, "toy-long")


def again(results):
    """Cells by a seed that the table has not seen, beside the range of the table's seeds."""
    rows = []
    for r in results:
        seen = [
            c["last"]["toy"]
            for c in evidence.read_results("toy").values()
            if (c["task"], c["attention"], c["steps"]) == (r["task"], r["attention"], r["steps"])
        ]
        at = f"{100 * min(seen):.1f} to {100 * max(seen):.1f}" if seen else "-"
        mine = f"{100 * r['last']['toy']:.1f}"
        rows.append([r["task"], r["attention"], mine, another_seed(seen, 100), at, spread(seen, 100), len(seen)])
    lines = [
        "## Run again by another seed", "",
        "Two cells of the toy table were trained again with seed 4; errors in percent. If errors are normally "
        "distributed, a new seed lies within mean ± t s sqrt(1 + 1/n) with a probability of 95%. Here s is the "
        "standard deviation of the n seeds, and t is Student's. It lies outside the range of three seeds in half of "
        "all cases.",
        "",
    ]
    head = ["task", "attention", "seed 4", "expected with 95%", "the table's range", "mean, deviation", "seeds"]
    return lines + table(head, rows) + origin(results, "again")


def toy_tuning(results):
    """The settings tried, by their error at the end; the same settings for three times as many steps show how far from
    the plateau they are."""
    lines = [
        "## How the baseline of the toy task was chosen", "",
        "N 5, first letter, one seed: error in percent during training. In each row the learning rate falls to 0 at "
        "the last step of that row.",
        "",
    ]
    rows = []
    for r in sorted(results, key=lambda r: (r["steps"], r["last"]["toy"])):
        curve = dict(r["curve"]["toy"])
        at = [curve.get(r["steps"] * k // 10) for k in (2, 5, 10)]
        rows.append(
            [r["attention"], r["layers"], r["width"], f"{r['lr']:g}", r["steps"]]
            + [f"{100 * e:.1f}" if e is not None else "-" for e in at]
        )
    lines += table(
        ["attention", "layers", "channels", "learning rate", "steps", "after a fifth", "after half", "at the end"], rows
    )
    return lines + origin(results, "toy-tuning")


def language(results):
    domains = sorted({d for r in results for d in r["last"]})
    lines = [
        "## Language: validation loss",
        "",
        "Claim: at equal size, data and steps MTA models have a lower validation loss than the plain Transformer.",
        "- The paper: 880M parameters, perplexity " + ", ".join(f"{a} {p}" for a, p in LANGUAGE_PAPER.items()) + ".",
        "- Here: bytes as tokens, five domains of Debian's documentation, sequences of 256, "
        f"{evidence.LANGUAGE_STEPS} steps of 4096 tokens, products in {evidence.LANGUAGE_MATMUL}. The learning rate "
        "was tuned for the plain Transformer (`language-tuning`).",
        "- The tables have nats a byte, mean and standard deviation over seeds. The last column is the mean of the "
        "domains minus that of the plain Transformer of the same seed.",
        "",
    ]
    exact = [r for r in results if r["matmul"] != evidence.LANGUAGE_MATMUL]
    chosen = [r for r in results if r["matmul"] == evidence.LANGUAGE_MATMUL]
    for model in evidence.LANGUAGE_MODELS:
        rows = []
        plain = losses_of(chosen, model, "transformer")
        for attention in evidence.LANGUAGE_ATTENTIONS:
            mine = [r for r in chosen if r["model"] == model and r["attention"] == attention]
            if mine:
                differences = [mean_loss(r) - plain[r["seed"]] for r in mine if r["seed"] in plain]
                rows.append(
                    [attention, len(mine)]
                    + [spread([r["last"][d] for r in mine], 1, 4) for d in domains]
                    + [
                        spread([mean_loss(r) for r in mine], 1, 4),
                        spread(differences, 1, 4) if attention != "transformer" else "",
                    ]
                )
        if rows:
            lines += [f"Model {model}:", ""] + table(
                ["attention", "seeds"] + domains + ["mean", "minus transformer"], rows
            )
    for r in exact:
        other = losses_of(chosen, r["model"], r["attention"]).get(r["seed"])
        if other is not None:
            lines += [
                f"Model {r['model']}, {r['attention']}, seed {r['seed']}, with products in {r['matmul']}: "
                f"{mean_loss(r):.4f}, in {evidence.LANGUAGE_MATMUL} {other:.4f}.",
                "",
            ]
    if exact:
        lines += [
            "Rounding changes the loss at the end of a run as another seed does. Compared with the differences in the "
            "table that is much. (Over three seeds of the quickstart's text model bf16 changes the mean by 0.0008: "
            "SPEED.md.)",
            "",
        ]
    return lines + origin(results, "language")


def losses_of(results, model, attention):
    """{seed: mean loss of the domains}."""
    return {r["seed"]: mean_loss(r) for r in results if (r["model"], r["attention"]) == (model, attention)}


def draw_language(results):
    """The mean loss of the domains minus the plain Transformer's of the same seed, over steps; a panel a model. A
    domain may lack a step: up to 5800d30 the trainer did not repeat an evaluation that a signal had cut off."""
    curves = {}
    for r in results:
        if r["matmul"] == evidence.LANGUAGE_MATMUL:
            points = [dict(points) for points in r["curve"].values()]
            steps = [step for step in points[0] if all(step in p for p in points)]
            means = {step: statistics.mean(p[step] for p in points) for step in steps}
            curves[r["model"], r["attention"], r["seed"]] = means
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4))
    for axis, model in zip(axes, evidence.LANGUAGE_MODELS):
        for attention, colour in zip(evidence.LANGUAGE_ATTENTIONS[1:], COLOURS):
            for (m, a, seed), curve in sorted(curves.items()):
                plain = curves.get((model, "transformer", seed))
                if (m, a) == (model, attention) and plain:
                    style = {"color": colour, "linestyle": {1: "-", 2: "--"}.get(seed, ":"), "marker": "."}
                    steps = [s for s in curve if s in plain]
                    axis.plot(steps, [curve[s] - plain[s] for s in steps], label=f"{a}, seed {seed}", **style)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(model)
        axis.grid(alpha=0.3)
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    names = [n for a in evidence.LANGUAGE_ATTENTIONS for n in sorted(lines) if n.split(",")[0] == a]
    axes[-1].legend([lines[n] for n in names], names, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
    figure.supxlabel("optimizer step")
    figure.supylabel("nats a byte minus plain")
    return figure


def language_tuning(results):
    lines = [
        "## How the learning rate of the language models was chosen", "",
        f"The plain Transformer, {evidence.LANGUAGE_TUNING_STEPS} steps, seed 1: mean loss of the domains.", "",
    ]
    rows = [
        [r["model"], f"{r['lr']:g}", f"{statistics.mean(r['last'].values()):.4f}"]
        for r in sorted(results, key=lambda r: (r["model"], r["lr"]))
    ]
    return lines + table(["model", "learning rate", "loss"], rows) + origin(results, "language-tuning")


def draw_toy(results):
    """The error over steps of every seed, a panel a task."""
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), sharex=True, sharey=True)
    for axis, (n, kind) in zip(axes.flat, evidence.TOY_TASKS):
        for attention, colour in (("transformer", "#c1272d"), ("mta", "#0000a7")):
            for i, r in enumerate(r for r in results if r["task"] == f"n{n}_{kind}" and r["attention"] == attention):
                axis.plot(
                    [s for s, _ in r["curve"]["toy"]], [100 * e for _, e in r["curve"]["toy"]], color=colour,
                    marker=".", label=None if i else attention,
                )
        axis.set_title(f"N = {n}, {kind}")
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.supxlabel("optimizer step")
    figure.supylabel("sequences with a wrong answer token (%)")
    return figure


ABLATION_PAPER = (
    "all four with gate 10.90, all four with the norm scaled by depth 10.92, without the convolution after the softmax "
    "10.95, convolution before "
    "and heads after 11.09, these two without a norm 11.16, convolution after and heads after 11.11, convolution and "
    "heads before 11.10, "
    "heads alone 11.04, convolution before alone 11.23 (8 x 13: 11.31), plain 11.25"
)


def ablation(results):
    lines = [
        "## Ablation: which operation the toy task needs",
        "",
        f"- The paper: 880M parameters, mean validation perplexity: {ABLATION_PAPER}.",
        f"- Here: N 5, first letter, 2 layers of 2 or 4 heads, {evidence.TOY_BEST['width']} channels, "
        f"{evidence.ABLATION_STEPS} steps of 64 sequences, learning rate {evidence.TOY_BEST['lr']:g}. A retrofit "
        "trains for as many steps once more.",
        f"- The table has wrong sequences in percent; {seeds_of(results)}. The last column is the number of seeds.",
        "- The task asks where two letters occur together. A convolution before the softmax finds that, if it is in "
        "the first layer. Mixing heads alone does not.",
        "- In names of rows \"the same\" means the convolution before the softmax.",
        "- Most rows below 10% do not differ by more than chance explains. None of this says anything about language.",
        "",
    ]
    rows, groups = [], {}
    for row in evidence.ABLATION:
        errors = [100 * r["last"]["toy"] for r in results if r["row"] == row]
        groups[row] = errors
        rows.append(
            [row, spread(errors), f"{min(errors):.1f} to {max(errors):.1f}" if errors else "", len(errors)]
        )
    two = [g for row, g in groups.items() if g and not row.startswith("4 heads")]
    for name, some in (
        ("of 2 heads below 10%", [g for g in two if statistics.mean(g) < 10]),
        ("of 2 heads above", [g for g in two if statistics.mean(g) >= 10]),
        ("of 4 heads", [g for row, g in groups.items() if row.startswith("4 heads")]),
    ):
        s = pooled(some)
        if s:
            lines += [
                f"Rows {name}: the pooled standard deviation s over seeds is {s:.2f} points. Two rows of n seeds that "
                "were chosen beforehand differ by more than chance explains if their distance is above 2 s sqrt(2/n): "
                + ", ".join(f"{2 * s * (2 / n) ** 0.5:.1f} points with {count(n)}" for n in (1, 2, 3, 10)) + ".",
                "",
            ]
    return lines + table(["row", "error, %", "range", "seeds"], rows) + origin(results, "ablation")


def long(results):
    lines = [
        "## Longer context: trained at 256 tokens, continued at 512",
        "",
        "Claim: MTA is better at finding facts in a long text, at 2k tokens and, continued with another base of RoPE, "
        "at 4k. Here: the 1m model of bytes.",
        f"- Training: {evidence.LONG_STEPS} steps of 4096 tokens at a length of 256 with RoPE's base "
        f"{evidence.LONG_THETAS[0]}, then {evidence.LONG_MORE_STEPS} at 512 with base {evidence.LONG_THETAS[1]}, on "
        "questions with their answers.",
        f"- Needles: a text holds {evidence_long.NEEDLES} facts, and one is asked for. The whole number must be the "
        "greedy continuation. Neither model has learned to find needles: both guess, so these sets compare nothing.",
        "- BabiLong's QA1: the answer is the likeliest of six rooms. Its stories have up to 450 bytes. qa1_256 has no "
        "distraction. qa1_512 has whole sentences of at most 62 bytes; 131 of its 200 questions have none (counted at "
        "a1db8f5), so it is almost the same as qa1_256, with other questions.",
        "- Each set has 200 questions. The table has the right answers in percent, and the nats of the right answer, "
        "which tell more where few are right: a number guessed digit by digit has 16.0 nats, a room among six 1.8. "
        "Each is a mean and standard deviation over seeds.",
        "",
    ]
    rows = []
    for attention in evidence.LONG_ATTENTIONS:
        mine = [r for r in results if r["attention"] == attention]
        for when, label in (("before ", "at 256"), ("", "continued at 512")):
            rows.append(
                [attention, label, len(mine)]
                + [spread([r["last"][when + name] for r in mine], 100) for name in evidence_long.SETS]
                + [spread([r["last"][f"{when}{name} nats"] for r in mine], 1, 2) for name in evidence_long.SETS]
            )
    head = ["attention", "trained", "seeds", *evidence_long.SETS, *(f"{name}, nats" for name in evidence_long.SETS)]
    return lines + table(head, rows) + origin(results, "long")


def patterns():
    """Counts of what the kernels of all finished cells look like, whatever their part."""
    found = [
        r
        for part in evidence.PATTERNS
        for r in evidence.read_results(part).values()
        if r.get("patterns")
    ]
    if not found:
        return []
    lines = [
        "## Patterns: what the kernels have learned",
        "",
        "The paper shows kernels of four kinds, without counts: near the identity, diagonal, one-sided, and heads "
        "that are subtracted from others. Kernels start at the identity, but for those of two rows of the ablation "
        "(at random, as the mean). So the counts say how many have left it. Each kernel is counted once, by the first "
        "kind below that fits; shares are those of its squared weights (scripts/evidence_kernels.py).",
        "- Convolution, identity: the identity's tap has at least 90%.",
        "- Convolution, diagonal: the taps that move along with the query have at least 60%, and two of them at least "
        "10% each.",
        "- Convolution, one-sided: of what is outside the identity's tap, the keys before it have at least 60%, or "
        "the keys after it.",
        "- Mixing, identity: the diagonal has at least 90%. Mixing, contrast: a head is subtracted from another with "
        "at least 10% of its row.",
        "",
    ]
    groups = {}
    for r in found:
        for name, kinds in r["patterns"].items():
            group = groups.setdefault((r["part"], r["model"], r["attention"], name), {"models": 0})
            group["models"] += 1
            for kind, n in kinds.items():
                group[kind] = group.get(kind, 0) + n
    kinds = ("identity", "diagonal", "one-sided", "contrast", "other")
    rows = [[*key, group["models"], *(group.get(kind, "-") for kind in kinds)] for key, group in sorted(groups.items())]
    return lines + table(["part", "model", "attention", "tensor", "models", *(f"{k}, kernels" for k in kinds)], rows)


def draw_kernels(results):
    """The convolutions of the toy model of seed 1, a row a layer, a column a head."""
    cells = [r for r in results if r.get("kernels") and r["seed"] == 1]
    if not cells:
        return None
    kernels = next((r for r in cells if r["task"] == "n5_first"), cells[0])["kernels"]
    figure, axes = pyplot.subplots(
        len(kernels), len(next(iter(kernels.values()))), figsize=(9, 1.3 * len(kernels)), squeeze=False
    )
    limit = max(abs(w) for tensor in kernels.values() for head in tensor for line in head for w in line)
    for row, (name, tensor) in zip(axes, sorted(kernels.items())):
        for head, axis in enumerate(row):
            axis.imshow(tensor[head], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            axis.set_title(f"layer {name.split()[0]}, head {head}", fontsize=8)
            axis.set_xticks(
                range(len(tensor[head][0])),
                [f"{k - len(tensor[head][0]) // 2:+d}" for k in range(len(tensor[head][0]))], fontsize=6,
            )
            axis.set_yticks(
                range(len(tensor[head])), [f"{q + 1 - len(tensor[head])}" for q in range(len(tensor[head]))], fontsize=6
            )
    figure.supxlabel("key, from the one that is weighed", fontsize=8)
    figure.supylabel("query, from this one", fontsize=8)
    return figure


COST_PAPER = {  # of 880M, T 2048, over the plain Transformer's
    "time": {"diff": 54.3 / 17.6, "talking-heads": 54.3 / 14.6, "mta-full": 54.3 / 5.7},
    "memory": {"diff": 21.6 / 17.5, "talking-heads": 63.0 / 17.5, "mta-full": 73.8 / 17.5},
}


def cost(results):
    measured = [r for r in results if r["task"] == "cost"]
    plans = [r for r in results if r["task"] == "plan"]
    lines = [
        "## Cost: the step and the memory beside the plain Transformer's",
        "",
        "- The last rows of both tables are the paper's own code on H200s. Machine and size are others, so they do not "
        "compare directly.",
        "- Here: the CPU trainer with all threads, one sequence a step, whole steps with the update. Models take "
        "turns with the plain Transformer of the same size: the median of three rounds, of each the fastest step. "
        "Memory is the program's largest resident size.",
        "",
    ]
    for quantity in ("time", "memory"):
        rows = []
        for h in evidence.COST_MODELS:
            for a in evidence.COST_ATTENTIONS:
                cells = {
                    r["length"]: r["last"][quantity] for r in measured if r["head_size"] == h and r["attention"] == a
                }
                if cells:
                    rows.append(
                        [evidence.COST_MODELS[h][0], h, a]
                        + [f"{cells[t]:.2f}" if t in cells else "-" for t in evidence.COST_LENGTHS]
                    )
        if rows:
            for a, ratio in COST_PAPER[quantity].items():
                at = [f"{ratio:.2f}" if t == 2048 else "-" for t in evidence.COST_LENGTHS]
                rows.append(["880m, the paper's code", 96, a, *at])
            lines += [f"Times the plain Transformer's {quantity}:", ""]
            lines += table(["model", "head size", "attention"] + [f"T {t}" for t in evidence.COST_LENGTHS], rows)
    if plans:
        plain = {r["length"]: r["last"]["MiB"] for r in plans if r["attention"] == "transformer"}
        rows = [
            [a]
            + [
                f"{r['last']['MiB'] / 1024:.1f} ({r['last']['MiB'] / plain[t]:.2f})"
                if (r := found.get((a, t))) and t in plain
                else "-"
                for t in evidence.COST_PLANS
            ]
            for found in [{(r["attention"], r["length"]): r for r in plans}]
            for a in ("transformer", *evidence.COST_ATTENTIONS)
        ]
        lines += [
            "What the CUDA trainer plans for 880m, 4 sequences at once, GiB (times the plain Transformer's): computed "
            "by its `--dry-run`, not measured.",
            "",
        ]
        lines += table(["attention"] + [f"T {t}" for t in evidence.COST_PLANS], rows)
    return lines + origin(results, "cost")


def draw_cost(results):
    """Time over length of sequence, a panel a head size."""
    measured = [r for r in results if r["task"] == "cost"]
    if not measured:
        return None
    figure, axes = pyplot.subplots(1, len(evidence.COST_MODELS), figsize=(12, 4), sharey=True)
    for axis, h in zip(axes, evidence.COST_MODELS):
        for a, colour in zip(evidence.COST_ATTENTIONS, COLOURS):
            cells = sorted(
                (r["length"], r["last"]["time"]) for r in measured if r["head_size"] == h and r["attention"] == a
            )
            axis.plot([t for t, _ in cells], [x for _, x in cells], color=colour, marker="o", label=a)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(evidence.COST_LENGTHS, [str(t) for t in evidence.COST_LENGTHS])
        axis.set_title(f"{evidence.COST_MODELS[h][0]}, heads of {h}")
        axis.grid(alpha=0.3)
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
    figure.supxlabel("tokens of a sequence")
    figure.supylabel("time of a step / plain Transformer's")
    return figure


def mean_loss(result):
    return statistics.mean(result["last"].values())


def comparisons():
    """What is compared with the plain Transformer: [(claim, attention, {seed: plain}, {seed: that attention}, is less
    better, unit, digits)], in the order of the claims."""
    found = []
    longer = [*evidence.read_results("toy-long").values(), *tuned_longer()]
    for steps, cells in ((evidence.TOY_STEPS, evidence.read_results("toy").values()),
                         (evidence.TOY_LONG_STEPS, longer)):
        for n, kind in evidence.TOY_TASKS:
            mine = [r for r in cells if r["task"] == f"n{n}_{kind}" and r["steps"] == steps]
            plain, mta = ({r["seed"]: 100 * r["last"]["toy"] for r in mine if r["attention"] == a} for a in PAIR)
            if steps == evidence.TOY_STEPS or len(plain.keys() & mta.keys()) > 1:  # of the longer ones some are open
                found.append((f"toy, N {n}, {kind}, {steps} steps: errors", "mta", plain, mta, True, "%", 1))
    trained = [r for r in evidence.read_results("language").values() if r["matmul"] == evidence.LANGUAGE_MATMUL]
    for model in evidence.LANGUAGE_MODELS:
        plain = losses_of(trained, model, "transformer")
        for attention in ("mta", "mta-full"):
            other = losses_of(trained, model, attention)
            found.append((f"language, {model}: nats a byte", attention, plain, other, True, "", 3))
    asked = evidence.read_results("long").values()
    for name in evidence_long.SETS:
        plain, mta = ({r["seed"]: 100 * r["last"][name] for r in asked if r["attention"] == a} for a in PAIR)
        found.append((f"long, {name}: right answers", "mta", plain, mta, False, "%", 1))
    return found


def verdict_of(differences, less_is_better):
    """Undecided by one seed, where nothing differs, and where the 95% interval of the mean holds 0."""
    low, high = mean_interval(differences)
    if low <= 0 <= high:
        return "undecided"
    return "favourable" if (high < 0) == less_is_better else "unfavourable"


def verdicts():
    """The lines of the verdicts: the cost, then a table, the unfavourable ones first."""
    lines, rows = [], []
    measured = [r for r in evidence.read_results("cost").values() if r["task"] == "cost"]
    for attention in ("mta", "mta-full"):
        mine = [r for r in measured if r["attention"] == attention]
        times = sorted((r["last"]["time"], r["head_size"], r["length"]) for r in mine)
        if times:
            best, worst = (f"{t:.2f} times (heads of {h}, T {length})" for t, h, length in (times[0], times[-1]))
            lines.append(f"- Cost on the CPU, unfavourable: a step of {attention} takes from {best} to {worst} the "
                         "plain model's time.")
    for claim, attention, plain, other, less, unit, digits in comparisons():
        seeds = sorted(set(plain) & set(other))
        if not seeds:
            continue
        differences = [other[seed] - plain[seed] for seed in seeds]
        low, high = mean_interval(differences)
        interval = f"{low:+.{digits}f} to {high:+.{digits}f}" if len(seeds) > 1 else "-"
        rows.append([
            verdict_of(differences, less), claim,
            f"{statistics.mean(plain[s] for s in seeds):.{digits}f}{unit}", attention,
            f"{statistics.mean(other[s] for s in seeds):.{digits}f}{unit}", interval,
            ", ".join(f"{d:+.{digits}f}" for d in differences),
        ])
    order = ("unfavourable", "undecided", "favourable")
    rows.sort(key=lambda row: order.index(row[0]))
    head = ["verdict", "claim", "plain", "attention", "with it", "minus plain, 95%", "by seed"]
    return [*lines, "", *table(head, rows)] if rows else [*lines, ""]


def hours():
    """Hours of one core, part by part."""
    rows = []
    for part in evidence.PARTS:
        done = evidence.read_results(part).values()
        spent = sum(r["seconds"] for r in done) / 3600
        machines = ", ".join(sorted({r["processor"] for r in done})) or "-"
        rows.append([part, len(done), len(evidence.cells_of(part)), f"{spent:.1f}", machines])
    how = "By the clock, pauses included: one thread for each cell, all threads for `cost`. Often other programs ran "
    how += "on the same two cores."
    lines = ["## Machine hours", "", how, ""]
    return lines + table(["part", "cells done", "of", "hours", "processor"], rows)


PARTS = {
    "toy": toy, "toy-long": toy_long, "again": again, "toy-tuning": toy_tuning, "ablation": ablation,
    "language": language, "language-tuning": language_tuning, "long": long, "cost": cost,
}


DRAWN = {
    "toy": (draw_toy, "error over steps of each toy task, every seed"),
    "language": (draw_language, "loss minus the plain Transformer's, over steps"),
    "cost": (draw_cost, "time of a step over the plain Transformer's, by length and head size"),
    "kernels": (draw_kernels, "the convolution kernels of a toy model, by layer and head"),
}


def picture(name, results):
    """Draws a picture, if there is one of this name and anything to show; its line of the page."""
    draw, text = DRAWN.get(name, (None, ""))
    figure = draw(results) if draw and pyplot else None
    if not figure:
        return []
    figure.tight_layout()
    figure.savefig(os.path.join(PICTURES, f"evidence_{name}.png"), dpi=100)
    return [f"![{text}](pictures/evidence_{name}.png)", ""]


def write():
    if not pyplot:
        print("evidence_report.py: no matplotlib, so no pictures; data/.venv has it", file=sys.stderr)
    lines = [
        "# Results: the paper's claims, and what was found here",
        "",
        "`scripts/evidence.sh --report` writes this page from the cells in [dev/evidence](evidence). A cell is one "
        "training run on the CPU; in the part `cost` it is a measurement or a plan. Each cell has one line there, with "
        "its options, curve, seconds, processor and commit. `scripts/evidence.sh --plan` lists the cells that are "
        "missing. All models are small: nobody has trained the 880M model with this code.",
        "",
    ]
    missing = {part: len(evidence.cells_of(part)) - len(evidence.read_results(part)) for part in PARTS}
    if any(missing.values()):
        still = ", ".join(f"{part} {n} of {len(evidence.cells_of(part))}" for part, n in missing.items() if n)
        lines += [f"**Still open**, cells: {still}.", ""]
    lines += [
        "## Verdicts, the unfavourable ones first", "",
        "One rule holds for all rows.",
        "- Each model is compared with the plain model of the same seed. The 95% interval of the mean difference is "
        "mean ± t s / sqrt(n), with Student's t (12.7 for two seeds, 4.3 for three). If it contains 0 the verdict is "
        "undecided, otherwise favourable or unfavourable.",
        "- The rule assumes that differences are normally distributed. It is not corrected for the number of rows: "
        "of twenty rows without any effect about one would be decided by chance.",
        "- After the results of two seeds were known, the rule was made stricter, and a third seed was added to "
        "language at 1m. With two seeds mta was 0.030 nats below the plain model.",
        "", *verdicts(),
    ]
    for part, section in PARTS.items():
        results = list(evidence.read_results(part).values())
        if not results:
            continue
        lines += section(results) + picture(part, results)
    lines += patterns() + picture("kernels", list(evidence.read_results("toy").values())) + hours()
    with open(os.path.join(evidence.ROOT, "dev", "RESULTS.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(filled(line) for line in lines).rstrip() + "\n")
    print("wrote dev/RESULTS.md")
    return 0
