#!/usr/bin/env bash
# scripts/evaluate.sh CHECKPOINT [--val GLOB] [--requests DIR] [--text FILE] [--out DIR] [options]: evaluates a
# checkpoint and writes one report.
#
#   CHECKPOINT          a step-XXXXXXXX directory, or a run: its newest checkpoint
#   --val GLOB          token shards: loss, perplexity and bits per byte of each set, over 2.1 million tokens. Shards
#                       with the same name before _val_ are one set
#   --requests DIR      scores every *.jsonl in it, as written by data/evals.py lambada, choice, needle and babilong
#   --text FILE         makes needles in a haystack and BabiLong from this text, as long as the checkpoint's context
#                       allows. Settings that do not fit into the context are named and left out (10 needles alone
#                       have about 500 bytes)
#   --out DIR           default: RUN/eval/step-XXXXXXXX
#   --samples N         questions of each setting of --text, default 100 (the paper: 500 needles)
#   --lengths N,...     tokens of a haystack; default half of the context and all of it (1000,2000 of 2048)
#   --distraction N,... tokens around a story; default 0, a quarter of the context and half of it
#   --seq-len N         tokens of a sequence; default the checkpoint's context, 4096 at most
#   --tokenizer X       bytes, toy or a tiktoken rank file; for a checkpoint that names none (another program's LLaMA)
#   --batch-size N      sequences that the trainer computes at once (its default is 4)
#   --shift             takes the earliest tokens away from a context that is too long, as scripts/lm_eval_mta.py does.
#                       Without it such a context is refused
#
# The trainer computes everything: TRAINER=PROGRAM, else train_mta_cuda if it is built and there is a GPU, else
# train_mta. The report is DIR/report.md, with report.csv, report.json, needles.png and babilong.png (the pictures need
# matplotlib, which data/.venv has). If it is stopped, the same command continues and repeats no finished part.
# To compare several checkpoints: python3 data/evals.py report A=DIR_A B=DIR_B --markdown report.md --pictures .
set -euo pipefail
unset CDPATH
case ${1:-} in -h|--help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
root=$(cd "$(dirname "$(realpath "$0")")/.." && pwd)
stop() { echo "evaluate.sh: $*" >&2; exit 1; }
# whole WHAT VALUE: refuses what is no whole number from 1.
whole() { [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || stop "$1: got \"$2\", wanted a whole number from 1"; }
given=${1:-} val="" requests="" text="" out="" samples=100 lengths="" distraction="" positions="" batch=()
cut="" with=() seen=" "
[ -n "$given" ] || stop "wanted a checkpoint; --help says more"
shift
while [ $# -gt 0 ]; do
    if [ "$1" = --shift ]; then cut=--shift && shift && continue; fi
    case $1 in
        --shift=*) stop "unknown option $1; --help lists all" ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    [ $# -gt 1 ] || stop "$1: a value is missing; --help says more"
    [[ $seen != *" $1 "* ]] || stop "$1 is given twice"
    seen+="$1 "
    case $1 in
        --val) val=$2 ;;
        --requests) requests=$2 ;;
        --text) text=$2 ;;
        --out) out=$2 ;;
        --samples) whole "$1" "$2"; samples=$2 ;;
        --lengths) lengths=$2 ;;
        --distraction) distraction=$2 ;;
        --seq-len) whole "$1" "$2"; positions=$2 ;;
        --tokenizer) with=(--tokenizer "$2") ;;
        --batch-size) whole "$1" "$2"; batch=(--batch-size "$2") ;;
        *) stop "unknown option $1; --help lists all" ;;
    esac
    [ -n "$2" ] || stop "$1: got \"\", wanted a value"
    shift 2
done
[ -n "$val$requests$text" ] || stop "nothing to evaluate on: wanted --val, --requests or --text"
[ -z "$text" ] || [ -r "$text" ] || stop "--text: $text: no such file, or not readable"
[ -z "$requests" ] || [ -d "$requests" ] || stop "--requests: $requests is no directory"
for name in --samples --lengths --distraction; do
    [ -n "$text" ] || [[ $seen != *" $name "* ]] || stop "$name: wanted --text FILE beside it"
done

# ---- which checkpoint, by which programs

checkpoint=$given
if [ ! -e "$checkpoint/config.json" ]; then
    newest='import sys; sys.path.insert(0, sys.argv[1]); import export; print(export.find_checkpoint(sys.argv[2]))'
    checkpoint=$(python3 -c "$newest" "$root/scripts" "$given" 2> /dev/null) || {
        newest='import sys; sys.path.insert(0, sys.argv[1]); import options'  # which wants a Python that is new enough
        why=$(python3 -c "$newest" "$root/data" 2>&1) || stop "${why#-c: }"
        stop "$given: no checkpoint, and no run with one"
    }
    [ -e "$checkpoint/config.json" ] || stop "$checkpoint: no config.json in it; wanted a checkpoint"
fi
checkpoint=$(cd "$checkpoint" && pwd)
out=${out:-$(dirname "$checkpoint")/eval/$(basename "$checkpoint")}
if [ -z "${TRAINER:-}" ]; then
    TRAINER=$root/train_mta
    if [ -x "$root/train_mta_cuda" ] && nvidia-smi > /dev/null 2>&1; then TRAINER=$root/train_mta_cuda; fi
fi
[ -x "$TRAINER" ] || stop "$TRAINER is missing, run: make -C $root train_mta"
python=python3
[ -x "$root/data/.venv/bin/python" ] && python=$root/data/.venv/bin/python

# What config.json says: positions, tokenizer (the file beside it, or a built-in name), pattern.
config() {
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1], "rb")).get(sys.argv[2]) or sys.argv[3])' \
        "$checkpoint/config.json" "$1" "$2" 2> /dev/null || stop "$checkpoint/config.json: not readable, or no JSON"
}
context=$(config max_position_embeddings 2048)
whole "$checkpoint/config.json: max_position_embeddings" "$context"
positions=${positions:-$((context < 4096 ? context : 4096))}
tokenizer=$(config tokenizer "")
pattern=$(config tokenizer_pattern "")
case $tokenizer in '' | bytes | toy) ;; *) tokenizer=$checkpoint/$tokenizer ;; esac
by=""  # of a tokenizer that is given, for what is kept with a part
if [ ${#with[@]} -gt 0 ]; then
    tokenizer=${with[1]} pattern=""
    case $tokenizer in
        bytes | toy) by=" --tokenizer $tokenizer" ;;
        *) [ -r "$tokenizer" ] || stop "--tokenizer: $tokenizer: no such file, or not readable"
            by=" --tokenizer of CRC and size $(cksum < "$tokenizer")" ;;
    esac
fi

# ---- the parts. One is finished when its file has its last name.

# What the checkpoint is, byte by byte: its manifest, which holds checksums; without one those of its files.
identity() {
    if [ -e "$checkpoint/manifest.json" ]; then
        cat "$checkpoint/manifest.json"
    else
        (cd "$checkpoint" && cat config.json && cksum ./*.safetensors)
    fi
}
mkdir -p "$out"
out=$(cd "$out" && pwd)
for name in report.md report.csv report.json needles.png babilong.png; do
    if [ -e "$out/$name" ] && ! [ -e "$out/checkpoint" ]; then
        stop "$out/$name was not made by evaluate.sh; wanted another --out"
    fi
done
identity > "$out/checkpoint.partial" || stop "$checkpoint: not readable, or no model.safetensors in it"
if [ -e "$out/checkpoint" ] && ! cmp -s "$out/checkpoint.partial" "$out/checkpoint"; then
    rm "$out/checkpoint.partial"
    stop "$out holds the evaluation of another checkpoint; wanted another --out"
fi
mv "$out/checkpoint.partial" "$out/checkpoint"

parts=0 done_before=0
# part FILE HOW COMMAND: unless FILE is there, runs the command, which makes FILE.partial, and gives it that name. HOW:
# all that its contents depend on beside the checkpoint, kept in FILE.made; a FILE that was made otherwise is refused.
part() {
    local file=$1 how=$2
    shift 2
    parts=$((parts + 1))
    if [ -e "$file" ]; then
        [ "$(cat "$file.made" 2> /dev/null)" = "$how" ] ||
            stop "$file was made with other options or of other files; wanted those, or another --out"
        done_before=$((done_before + 1))
        return 0
    fi
    rm -rf "$file.partial"
    printf '%s\n' "$how" > "$file.made"
    "$@" || stop "$(basename "$file"): not finished, the command above says why; the same command goes on from here"
    mv "$file.partial" "$file"
}

validate() {
    echo "validation: $val"
    "$TRAINER" --init-from "$checkpoint" --eval-only --val "$val" --seq-len "$positions" \
        --eval-windows $(((2097152 + positions - 1) / positions)) \
        "${batch[@]}" --out "$out/validation.partial"
}
# The options that name the tokenizer stand behind the subcommand.
make_requests() {
    local name=$1
    shift
    "$python" "$root/data/evals.py" "$name" --text "$text" --samples "$samples" --tokenizer "${tokenizer:-bytes}" \
        ${pattern:+--pattern "$pattern"} --room "$positions" "$@" \
        --out "$out/$name.jsonl.partial"
}
score() {
    echo "scoring $1: $(wc -l < "$out/$1.jsonl") requests"
    "$TRAINER" --init-from "$checkpoint" --score "$out/$1.jsonl" --seq-len "$positions" "${batch[@]}" \
        "${with[@]}" $cut > "$out/$1.scores.partial"
}

# Sizes and headers, which hold checksums, of the shards behind --val [NAME=]GLOB,...; a folder may be called "a,b".
# Shards of others may have none in their headers: those, and masks, are read.
shards_of_val() {
    "$python" - "$root/data" "$val" << 'END'
import os, re, sys, zlib
sys.path.insert(0, sys.argv[1])
from inputs import matches
from tokenizer import file_sums
sum, parts = 0, sys.argv[2].split(",")
while parts:
    for n in range(len(parts), 0, -1):
        files = matches(re.sub(r"^[^=/*?[]+=", "", ",".join(parts[:n])))
        if files:
            break
    for file in filter(os.path.isfile, files):
        with open(file, "rb") as f:
            head = f.read(1024)
        sum = zlib.crc32(b"%d %s" % (os.path.getsize(file), head), sum)
        mask, has_mask = file.removesuffix(".bin") + ".mask", any(head[20:24])
        for path in [file] * (not any(head[16:20])) + [mask] * has_mask:
            sum = zlib.crc32(file_sums(path)["crc32"].encode(), sum)
    parts = parts[n:]
print("%08x" % sum)
END
}
if [ -n "$val" ]; then
    shards=$(shards_of_val) || stop "--val: $val: not readable"
    part "$out/validation" "--val $val --seq-len $positions, shards of CRC $shards" validate
fi
if [ -n "$text" ]; then
    [ -n "$tokenizer" ] ||
        stop "--text: $checkpoint/config.json names no tokenizer that counts its tokens; --tokenizer NAME|FILE does"
    room=$((positions * 125 / 128))
    lengths=${lengths:-$((room / 2)),$room} distraction=${distraction:-0,$((room / 4)),$((room / 2))}
    how="--text of CRC and size $(cksum < "$text") --samples $samples --seq-len $positions$by"
    part "$out/needle.jsonl" "$how --lengths $lengths" make_requests needle --length "$lengths"
    part "$out/babilong.jsonl" "$how --distraction $distraction" make_requests babilong --distraction "$distraction"
fi
if [ -n "$requests" ]; then
    found=0
    for file in "$requests"/*.jsonl; do
        [ -e "$file" ] || continue
        found=$((found + 1))
        copy=$out/$(basename "$file")
        if [ -e "$copy" ] && { [ -e "$copy.made" ] || [ -e "${copy%.jsonl}.scores" ]; }; then
            cmp -s "$file" "$copy" || stop "$file is not what $copy was; wanted another --out"
        else
            cp "$file" "$copy.partial"
            mv "$copy.partial" "$copy"
        fi
    done
    [ $found -gt 0 ] || stop "--requests: no *.jsonl in $requests"
fi
for file in "$out"/*.jsonl; do
    [ -e "$file" ] || continue
    name=$(basename "$file" .jsonl)
    # A copy that was never scored, as its requests were wrong, and that --requests has no longer.
    if ! [ -e "$file.made" ] && ! [ -e "$out/$name.scores" ] && ! [ -e "${requests:-$out/none}/$name.jsonl" ]; then
        echo "$file: not scored before and not in --requests: left out"
        continue
    fi
    part "$out/$name.scores" "--seq-len $positions${cut:+ $cut}$by of CRC and size $(cksum < "$file")" score "$name"
done

# ---- the report

echo "parts: $parts, of which $done_before were finished before"
pictures=(--pictures "$out")
"$python" -c 'import matplotlib' 2> /dev/null || {
    pictures=()
    echo "no pictures: matplotlib is missing, data/README.md says how to install it"
}
"$python" "$root/data/evals.py" report "$(basename "$given")=$out" --markdown "$out/report.md" --csv "$out/report.csv" \
    --json "$out/report.json" "${pictures[@]}"
echo "$out/report.md"
