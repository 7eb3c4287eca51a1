#!/usr/bin/env python3
"""Reads what `make -nB` would run and writes compile_commands.json of it: for clangd and other tools (make
compile_commands)."""
import json
import os
import shlex
import sys

commands = []
for line in sys.stdin:
    words = line.split("#")[0].strip()
    if " -c " not in words:
        continue
    source = next(word for word in shlex.split(words) if word.endswith((".c", ".cu", ".cpp")))
    commands.append({"directory": os.getcwd(), "file": source, "command": words})
json.dump(commands, sys.stdout, indent=1)
print()
