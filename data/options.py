"""What the options of all scripts share: a mistake is one line and exit status 1, as in the programs; part of a name is
none; numbers are written as the programs take them, so that 1_000 and nan are none."""

import argparse
import fractions
import math
import os
import re
import sys

if sys.version_info < (3, 9):
    sys.exit("%s: Python %d.%d runs it, wanted 3.9 or later" % (os.path.basename(sys.argv[0]), *sys.version_info[:2]))


NAMED = ("FILE", "DIR", "FOLDER", "PROGRAM", "NAME|FILE")  # metavars of what is there or is made


class Parser(argparse.ArgumentParser):
    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """Says that the last one counts where an option of a text is given twice, as the programs do
        (mta/options.h)."""
        words = list(sys.argv[1:] if args is None else args)
        words = words[: words.index("--")] if "--" in words else words
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        for name in dict.fromkeys(name for name in given if given.count(name) > 1):
            action = self._option_string_actions.get(name)
            if type(action) is argparse._StoreAction and action.type is None:
                print("%s: %s is given twice: the last one counts, the one before does not" % (self.prog, name),
                      file=sys.stderr)
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._actions:  # an empty TEXT is one, but no file
            if action.option_strings and action.metavar in NAMED and getattr(parsed, action.dest, None) == "":
                self.error('%s: got "", wanted %s' % (action.option_strings[0], action.metavar))
        return parsed, rest

    def error(self, message):
        self.exit(1, "%s: %s; --help lists all options\n" % (self.prog, message))


def split_name(text):
    """[NAME=]PATH -> (NAME or None, PATH). Either may hold a "=": what is there as a whole is a path, else the longest
    that is there after a "="."""
    if os.path.exists(text):
        return None, text
    places = [i for i, c in enumerate(text) if c == "="]
    at = next((i for i in places if os.path.exists(text[i + 1 :])), places[0] if places else None)
    return (None, text) if at is None else (text[:at], text[at + 1 :])


def picture_name(text):
    """A name in a picture of matplotlib's, where "$" begins a formula and a legend leaves out what begins with "_"."""
    text = text.replace("$", r"\$")
    return r"$\_$" + text[1:] if text.startswith("_") else text


def picture_format(path):
    """For matplotlib's savefig, which would write to another file than the one that was named: to x.png for x."""
    return None if os.path.splitext(path)[1] else "png"


def refused(text, wanted):
    return argparse.ArgumentTypeError("got %r, wanted %s" % (text, wanted))


def whole_number(least=None, most=None):
    """A type for add_argument: a whole number in this range."""
    wanted = "a whole number" + ("" if least is None else " of at least %d" % least if most is None else
                                 " from %d to %d" % (least, most))

    def parse(text):
        number = int(text) if re.fullmatch("[-+]?[0-9]{1,18}", text) else None
        if most is None and re.fullmatch("[-+]?[0-9]{19,}", text):
            raise refused(text, wanted + ", of at most 18 digits")
        if number is None or (least is not None and number < least) or (most is not None and number > most):
            raise refused(text, wanted)
        return number

    return parse


def real_number(least=None):
    """A type for add_argument: a finite number, not below `least`."""

    def parse(text):
        shape = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
        number = float(text) if re.fullmatch(shape, text) else math.inf
        if not math.isfinite(number) or (least is not None and number < least):
            raise refused(text, "a number" + ("" if least is None else " of at least %g" % least))
        return number

    return parse


def parse_count(text):
    """100000000, 100M, 1.5k: a whole number all the same."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([kKmMgGbB]?)", text)
    number = match and fractions.Fraction(match[1]) * {"": 1, "k": 10**3, "m": 10**6}.get(match[2].lower(), 10**9)
    if not match or number.denominator != 1:
        raise refused(text, "a whole number such as 100000000 or 100M, of at most 18 digits")
    return int(number)
