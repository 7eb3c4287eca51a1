#!/usr/bin/env python3
"""Writes mta/unicode_tables.h: the classes of characters that the split patterns of mta/tokenizer.h distinguish.

    python3 -m venv /tmp/ucd && /tmp/ucd/bin/pip install unicodedata2==16.0.0
    /tmp/ucd/bin/python dev/unicode/make_tables.py > mta/unicode_tables.h
or, from the Unicode Consortium's file:
    python3 dev/unicode/make_tables.py --ucd UnicodeData.txt > mta/unicode_tables.h

The version must be the one that tiktoken's regular expressions use, or ids differ on the characters in between:
tiktoken 0.14.0 is built with regex-syntax 0.8.11, whose tables are Unicode 16.0.0 (`--unicode-version` states
another).
dev/tests/test_tokenizer.py compares every code point with tiktoken.
"""

import argparse
import sys

# Property White_Space (PropList.txt), what \s means: unchanged since Unicode 6.3.
WHITE_SPACE = {
    *range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000,
}

# General categories by class; everything else (punctuation, symbols, controls, unassigned) is CLASS_OTHER.
CLASS_OF = {
    "Lu": "UPPER", "Lt": "UPPER", "Ll": "LOWER", "Lm": "LETTER", "Lo": "LETTER", "Mn": "MARK", "Mc": "MARK",
    "Me": "MARK", "Nd": "NUMBER", "Nl": "NUMBER", "No": "NUMBER",
}


def categories_from_file(path):
    """General category of every code point, from UnicodeData.txt (ranges are given by their First and Last)."""
    categories = ["Cn"] * 0x110000
    first = None
    with open(path, encoding="ascii") as f:
        for line in f:
            code, name, category = line.split(";")[:3]
            code = int(code, 16)
            if name.endswith(", First>"):
                first = code
                continue
            for c in range(code if first is None else first, code + 1):
                categories[c] = category
            first = None
    return categories


def categories_from_module(version):
    """The same from the package unicodedata2, whose version number is Unicode's."""
    import unicodedata2

    if unicodedata2.unidata_version != version:
        sys.exit("make_tables.py: unicodedata2 has Unicode %s, wanted %s" % (unicodedata2.unidata_version, version))
    return [unicodedata2.category(chr(c)) for c in range(0x110000)]


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ucd", help="UnicodeData.txt of that version; default: the package unicodedata2")
    parser.add_argument("--unicode-version", default="16.0.0")
    args = parser.parse_args()
    categories = categories_from_file(args.ucd) if args.ucd else categories_from_module(args.unicode_version)
    classes = ["SPACE" if c in WHITE_SPACE else CLASS_OF.get(g, "OTHER") for c, g in enumerate(categories)]
    ranges = [(c, k) for c, k in enumerate(classes) if c == 0 or k != classes[c - 1]]
    print(
        "// mta/unicode_tables.h: character classes of Unicode %s. Written by dev/unicode/make_tables.py; do not edit."
        % args.unicode_version
    )
    print(
        "// UPPER Lu Lt, LOWER Ll, LETTER Lm Lo, MARK Mn Mc Me, NUMBER Nd Nl No, SPACE the property White_Space, "
        "OTHER the rest."
    )
    print("// clang-format off\n#ifndef MTA_UNICODE_TABLES_H\n#define MTA_UNICODE_TABLES_H\n\n#include <stdint.h>\n")
    print("enum { CLASS_OTHER, CLASS_UPPER, CLASS_LOWER, CLASS_LETTER, CLASS_MARK, CLASS_NUMBER, CLASS_SPACE };\n")
    print("// Each entry is a first code point times 8 plus the class from there to the next entry's first code point.")
    print("enum { UNICODE_RANGES = %d };" % len(ranges))
    print("static const uint32_t unicode_ranges[UNICODE_RANGES] = {")
    number = {"OTHER": 0, "UPPER": 1, "LOWER": 2, "LETTER": 3, "MARK": 4, "NUMBER": 5, "SPACE": 6}
    for i in range(0, len(ranges), 12):
        print("    " + " ".join("0x%x," % (c * 8 + number[k]) for c, k in ranges[i : i + 12]))
    print("};\n\n#endif")


if __name__ == "__main__":
    main()
