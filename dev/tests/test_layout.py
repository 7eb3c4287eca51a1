#!/usr/bin/env python3
"""train_mta.c and train_mta.cu scroll side by side: the same headings, the same layers in the same order, and nothing
said twice outside of them. No line of code or of a page's text is longer than 120 columns; the files that HACKING.md's
map, README.md and others name are there. Whoever adds a field or an attention to mta/config.h is told what else must
know it.

python3 dev/tests/test_layout.py
"""
import ast
import glob
import json
import os
import re
import sys
import unittest

import helpers

RULE = re.compile(r"^// ={20,}$")
# Sections where the two files may say the same.
LAYERS = ("Embedding", "RMSNorm", "RoPE", "Attention", "SwiGLU", "Cross-entropy")

# Functions of train_mta.c that train_mta.cu has under another name, and why.
RENAMED = {
    "head_gate_forward": "head_output_forward",  # the norm of a head and its gate are one pass there
    "head_gate_backward": "head_output_backward",
}
RUN = 6  # code lines


def read(name):
    with open(os.path.join(helpers.ROOT, name), encoding="utf-8") as f:
        return f.read().split("\n")


def headings(lines):
    """[(line number, title)] of the sections: the line under a rule, up to what explains it."""
    under_a_rule = [i for i in range(1, len(lines)) if RULE.match(lines[i - 1])]
    return [(i + 1, re.split(r" \(|, |; |(?<!Fast paths): ", lines[i][3:])[0]) for i in under_a_rule]


def steps(lines):
    """The titles of the parts of sections, "// ---- title: more", up to the colon or the bracket."""
    titles = (re.match(r"// ---- (.*)", line) for line in lines)
    return [re.split(r"[:(,]| over | with ", title[1])[0].strip() for title in titles if title]


def section(lines, start):
    """The lines of the section whose title begins so."""
    starts = headings(lines) + [(len(lines) + 1, "")]
    pairs = zip(starts, starts[1:])
    return next(lines[first:after - 1] for (first, title), (after, _) in pairs if title.startswith(start))


def functions(lines):
    """Names of the functions that are defined at the left margin, in order: not of kernels, not of declarations."""
    text = re.sub(r"//[^\n]*", "", "\n".join(lines))
    return re.findall(r"^static (?!__global__)[^;={}()]*?\b(\w+)\([^;{}]*\)\s*\{", text, re.M)


def code(lines, first=0):
    """[(line number, code)] without comments, blanks, includes and lines of brackets alone."""
    out = []
    for number, line in enumerate(lines, first + 1):
        line = re.sub(r"//.*", "", line).strip()
        if re.search(r"\w", line) and not line.startswith("#include"):
            out.append((number, line))
    return out


def outside_layers(lines):
    """The code lines of all sections that are not a layer; None stands for each layer left out, so that no run reaches
    over it."""
    out, starts = [], [(0, "")] + headings(lines) + [(len(lines) + 1, "")]
    for (first, title), (after, _) in zip(starts, starts[1:]):
        layer = title.startswith(LAYERS)
        out += [(0, None)] if layer else code(lines[first:after - 1], first)
    return out


def repeated(a, b):
    """Runs of at least RUN lines of a that stand in b too: [(line of a, line of b, length)]."""
    places = {}
    for j in range(len(b) - RUN + 1):
        places.setdefault(tuple(line for _, line in b[j:j + RUN]), j)
    runs, i = [], 0
    while i <= len(a) - RUN:
        window = tuple(line for _, line in a[i:i + RUN])
        j = places.get(window) if None not in window else None
        if j is None:
            i += 1
            continue
        n = RUN
        while i + n < len(a) and j + n < len(b) and a[i + n][1] == b[j + n][1] is not None:
            n += 1
        runs.append((a[i][0], b[j][0], n))
        i += n
    return runs


def in_order(wanted, there):
    """The first of `wanted` that does not come after the ones before it in `there`, or None."""
    at = 0
    for name in wanted:
        if name not in there[at:]:
            return name
        at = there.index(name, at) + 1
    return None


def files(*ends):
    """The files of this repository whose names end so."""
    for folder, below, names in os.walk(helpers.ROOT):
        below[:] = sorted(set(below) - {".git", ".venv", "build", "runs", "corpus", "__pycache__"})
        for name in sorted(names):
            if name.endswith(ends):
                yield os.path.relpath(os.path.join(folder, name), helpers.ROOT)


def sources():
    return files("Makefile", ".c", ".h", ".cu", ".cpp", ".py", ".sh", ".bash", ".mk")


def prose(page):
    """[(line number, line)] of a page in Markdown without its tables and its code."""
    out, fenced = [], False
    for number, line in enumerate(read(page), 1):
        fence = line.lstrip().startswith("```")
        fenced = fenced != fence
        if not (fenced or fence or line.startswith("|")):
            out.append((number, line))
    return out


class Files(unittest.TestCase):
    def test_lines_are_at_most_120_columns_long(self):
        """Of pages the paragraphs, which is all that can be filled; RESULTS.md is written by a program."""
        pages = [page for page in files(".md") if page != "dev/RESULTS.md"]
        lines = [(name, *line) for name in sources() for line in enumerate(read(name), 1)]
        lines += [(page, *line) for page in pages for line in prose(page)]
        self.assertGreater(len(lines), 40000)
        self.assertEqual(["%s:%d" % (name, number) for name, number, line in lines if len(line) > 120], [])

    def test_the_map_names_files_that_are_there(self):
        """The first column of the table in HACKING.md: whole paths, or names beside the first one of the row. Every
        header of mta/ and every folder of dev/ with code is in it."""
        rows = [line.split("|")[1] for line in read("dev/HACKING.md") if line.startswith("| `")]
        paths = set()
        for row in rows:
            names = re.findall(r"`([^`]+)`", row)
            beside = os.path.dirname(names[0])
            paths |= {name if "/" in name or name in os.listdir(helpers.ROOT) else os.path.join(beside, name)
                      for name in names}
        self.assertGreater(len(paths), 20)
        self.assertEqual([path for path in sorted(paths) if not os.path.exists(os.path.join(helpers.ROOT, path))], [])
        parts = {name for name in sources() if re.match(r"mta/|dev/[^/]+/", name)}
        parts = {name if name.startswith("mta/") else os.path.dirname(name) for name in parts}
        self.assertEqual([part for part in sorted(parts) if not any(part.startswith(path) for path in paths)], [])

    def test_names_in_hacking_are_there(self):
        """What HACKING.md writes as code is a word of some source."""
        names = set(re.findall(r"`([A-Za-z_]\w+)`", "\n".join(read("dev/HACKING.md"))))
        names -= {"NAME_forward", "NAME_backward", "scalar_NAME", "head_bias", "head_temperature",
                  "logit_softcap"}
        self.assertGreater(len(names), 70)
        words = set(re.findall(r"\w+", "\n".join("\n".join(read(name)) for name in sources())))
        self.assertEqual(sorted(names - words), [])

    def test_links_lead_somewhere(self):
        """Those of the pages in Markdown, and pictures."""
        broken, seen = [], 0
        for page in files(".md"):
            for link in re.findall(r"\]\(([^)#\s]+)", "\n".join(read(page))):
                target = os.path.join(helpers.ROOT, os.path.dirname(page), link)
                seen += "://" not in link
                if "://" not in link and not os.path.exists(target):
                    broken.append("%s: %s" % (page, link))
        self.assertEqual(broken, [])
        self.assertGreater(seen, 20)

    def test_links_to_a_heading_lead_to_one(self):
        broken, seen = [], 0
        for page in files(".md"):
            for link, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", "\n".join(read(page))):
                target = os.path.join(os.path.dirname(page), link) if link else page
                titles = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()) for line in read(target)
                          if line.startswith("#")]
                seen += 1
                if anchor not in [title.replace(" ", "-") for title in titles]:
                    broken.append("%s: %s#%s" % (page, link, anchor))
        self.assertEqual(broken, [])
        self.assertGreater(seen, 0)

    def test_what_pages_call_can_be_called(self):
        """A script that stands where a command begins, without python3 or bash before it, is executable."""
        script, called = r"(?:\w+=\S+ |nice (?:-n \d+ )?)*((?:scripts|data|dev)/[\w/]+\.(?:py|sh))", set()
        for page in files(".md"):
            text = "\n".join(read(page))
            called |= set(re.findall("`" + script + " [^`]", text))
            for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
                called |= set(re.findall("^" + script, block, re.M))
        self.assertGreater(len(called), 8)
        self.assertEqual([name for name in sorted(called)
                          if not os.access(os.path.join(helpers.ROOT, name), os.X_OK)], [])

    def test_readme_s_numbers_of_lines_hold(self):
        rows = re.findall(r"^\| \[[^]]*\]\(([^)]+)\) \| ([\d,]+) \|", "\n".join(read("README.md")), re.M)
        self.assertGreater(len(rows), 4)
        for name, lines in rows:
            path = os.path.join(helpers.ROOT, name)
            names = [os.path.join(name, n) for n in os.listdir(path)] if os.path.isdir(path) else [name]
            there = sum(len(read(n)) - 1 for n in names)
            self.assertLess(abs(int(lines.replace(",", "")) / there - 1), 0.05, "%s has %d lines" % (name, there))

    def test_the_fields_of_the_log_are_explained(self):
        """Events of log.jsonl and their fields, at the head of mta/log.h."""
        head = set(re.findall(r"\w+", "\n".join(read("mta/log.h")).split("#ifndef")[0]))
        functions = "\n".join(sum((read(name) for name in files("run.h", "train.h")), [])).split("\n}\n")
        said = [f for f in functions if '{\\"event\\"' in f or "run_log_origin(const" in f]
        fields = set(re.findall(r'\\"(\w+)\\": |text_json_field\(&t, "(\w+)"|\{"(\w+)", ', "\n".join(said)))
        fields = {name for found in fields for name in found if name}
        self.assertGreater(len(fields), 40)
        self.assertEqual(sorted(fields - head - {"event"}), [])


class Additions(unittest.TestCase):
    """What stands in a table of mta/config.h stands wherever HACKING.md, "Adding an attention", sends one."""

    @classmethod
    def setUpClass(cls):
        sys.path.insert(0, os.path.join(helpers.ROOT, "scripts"))
        import export

        config = "\n".join(read("mta/config.h"))
        rows = re.findall(r'^    \{"([\w.]+)", FIELD_\w+, PART_(\w+), AT\(\w+\),\s*(\w+),', config, re.M)
        cls.export, cls.part = export, {key: part for key, part, _ in rows}
        cls.numbers = {key: int(value) for key, _, value in rows if value.isdigit()}
        cls.attention = [key for key, part, _ in rows if part == "ATTENTION"]
        cls.kinds = re.search(r'#define ATTENTION_NAMES "(.*)"', config)[1].split(", ")

    def test_export_knows_the_fields(self):
        """export.py and transformers' MtaConfig: the same fields with the same defaults as config.h has."""
        self.assertGreater(len(self.attention), 9)
        self.assertEqual(list(self.export.ATTENTION), self.attention)
        others = {key.split(".")[0] for key in self.part} - set(self.attention)
        self.assertEqual(others - self.export.LLAMA_KEYS, set(), "LLaMA has no such field: wanted PART_ATTENTION")
        for key in set(self.attention) & set(self.numbers):
            self.assertIn(self.export.ATTENTION[key], (self.numbers[key], []), key)
        tree = ast.walk(ast.parse("\n".join(read("scripts/hf/configuration_mta.py"))))
        init = next(node.args for node in tree if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        values = [ast.literal_eval(value) for value in init.defaults]
        there = {name.arg: value for name, value in zip(init.args[-len(values):], values)}
        self.assertEqual({key: there.get(key, "missing") for key in self.attention},
                         {key: () if value == [] else value for key, value in self.export.ATTENTION.items()})

    def test_fields_are_named(self):
        """Where one is computed, converted or tested."""
        missing = []
        for name in ("scripts/hf/modeling_mta.py", "scripts/convert_ram.py", "dev/ref/mta_ref.py",
                     "dev/ref/make_golden.py", "dev/tests/test_export.py", "dev/tests/test_infer.py",
                     "dev/tests/test_steps.py"):
            words = set(re.findall(r"\w+", "\n".join(read(name))))
            missing += [(name, key) for key in self.attention if key not in words]
        self.assertEqual(missing, [])

    def test_golden_cases_have_the_fields(self):
        """Each field has two values or more among the golden cases."""
        cases = [helpers.read_safetensors(path)[1] for path in glob.glob(os.path.join(helpers.GOLDEN, "*.safetensors"))]
        configs = [dict(self.export.ATTENTION, **json.loads(case["config"])) for case in cases]
        self.assertEqual([key for key in self.attention if len({str(c.get(key)) for c in configs}) < 2], [])

    def test_kinds_are_named(self):
        """The attentions: in the pages, and among the models that are exported."""
        self.assertGreater(len(self.kinds), 4)
        for name, quote in (("README.md", "`%s`"), ("dev/MODEL.md", "`%s`"), ("dev/tests/test_export.py", '"%s":')):
            text = "\n".join(read(name))
            self.assertEqual([kind for kind in self.kinds if quote % kind not in text], [], name)


class Layout(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cpu, cls.cuda = read("train_mta.c"), read("train_mta.cu")

    def test_sections(self):
        """Every heading of train_mta.c stands in train_mta.cu, in the same order; what only that file has is the device
        and the fast paths."""
        cpu, cuda = ([title for _, title in headings(lines)] for lines in (self.cpu, self.cuda))
        self.assertGreater(len(cpu), 8)
        self.assertIsNone(in_order(cpu, cuda))
        for title in cuda:
            self.assertTrue(title in cpu or title == "The device" or title.startswith("Fast paths: "), title)

    def test_fast_paths_come_after_the_layers(self):
        titles = [title for _, title in headings(self.cuda)]
        fast = [i for i, title in enumerate(titles) if title.startswith("Fast paths: ")]
        last = max(i for i, title in enumerate(titles) if title.startswith(LAYERS))
        self.assertEqual(fast, list(range(last + 1, last + 1 + len(fast))))

    def test_steps_of_attention(self):
        """The same for the parts of the section on attention."""
        cpu, cuda = (steps(section(lines, "Attention")) for lines in (self.cpu, self.cuda))
        self.assertGreater(len(cpu), 6)
        self.assertIsNone(in_order(cpu, cuda))

    def test_functions(self):
        """Every layer's forward and backward functions exist in both, in the same order."""
        wanted = [name for name in functions(self.cpu) if re.search(r"_(forward|backward)(_|$)", name)]
        self.assertGreater(len(wanted), 30)
        self.assertIsNone(in_order([RENAMED.get(name, name) for name in wanted], functions(self.cuda)))

    def test_nothing_is_said_twice(self):
        """Outside of the layers what both trainers do is in mta/."""
        runs = repeated(outside_layers(self.cpu), outside_layers(self.cuda))
        self.assertEqual(runs, [], "train_mta.c line, train_mta.cu line, code lines that are the same")

    def test_the_test(self):
        """What the comparisons must see: a name out of order, one that is missing, a run of six lines but not one of
        five."""
        self.assertEqual(in_order(["a", "b"], ["b", "x", "a"]), "b")
        self.assertEqual(in_order(["a", "c"], ["a", "b"]), "c")
        self.assertIsNone(in_order(["a", "c"], ["a", "b", "c"]))
        lines = [(i, "line %d" % i) for i in range(9)]
        self.assertEqual(repeated(lines[:7], lines[1:]), [(1, 1, 6)])
        self.assertEqual(repeated(lines[:6], lines[1:]), [])
        left_out = lines[:4] + [(0, None)] + lines[4:]
        self.assertEqual(repeated(left_out, left_out), [])
        source = ["static int a(int b) { return b; }", "static int c(int);", "static void d(int e,", "  int f) {"]
        self.assertEqual(functions(source), ["a", "d"])


if __name__ == "__main__":
    helpers.main()
