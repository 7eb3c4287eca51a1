// mta/infer_options.h: what the user of infer_mta may give: its options, their defaults, and the one table that makes
// the parser and --help; which checkpoint and which tokenizer they mean.
#ifndef MTA_INFER_OPTIONS_H
#define MTA_INFER_OPTIONS_H

#include "checkpoint.h"
#include "config.h"
#include "options.h"
#include "tokenizer.h"

typedef struct {
    const char *dir, *tokenizer, *pattern, *weights, *cache, *prompt, *prompts, *token_ids, *score, *perplexity,
        *logits, *attention_map;
    int context, chunk, threads, stride, max_tokens, top_k, repeat_last, samples, layer, head;
    int64_t seed;
    double temperature, top_p, min_p, repeat_penalty;
    OptList stops;
    bool mapped, interactive, echo, ignore_eos, shift, quiet, tokenize, detokenize, binary, assume_llama, no_verify;
    bool own_length;  // --max-tokens was given
} InferOptions;

static inline InferOptions infer_options_default(void) {
    InferOptions o;
    memset(&o, 0, sizeof o);
    o.weights = "stored";
    o.cache = "f32";
    o.chunk = 512;
    o.max_tokens = 256;
    o.repeat_last = 64;
    o.samples = 1;
    o.seed = 1;
    o.temperature = 0.8;
    o.top_p = 0.95;
    o.repeat_penalty = 1;
    return o;
}

// What infer_mta does, a bit each, in the order of INFER_MODES.
enum {
    INFER_TEXT = 1 << 0,  // continues --prompt or standard input
    INFER_IDS = 1 << 1,
    INFER_PROMPTS = 1 << 2,
    INFER_INTERACTIVE = 1 << 3,
    INFER_SCORE = 1 << 4,
    INFER_PERPLEXITY = 1 << 5,
    INFER_LOGITS = 1 << 6,
    INFER_MAP = 1 << 7,
    INFER_TOKENIZE = 1 << 8,
    INFER_DETOKENIZE = 1 << 9,
    INFER_ANSWERS = INFER_TEXT | INFER_PROMPTS | INFER_INTERACTIVE,
    INFER_GENERATES = INFER_ANSWERS | INFER_IDS,
    INFER_LOOKS = INFER_LOGITS | INFER_MAP,
    INFER_COMPUTES = INFER_GENERATES | INFER_LOOKS | INFER_SCORE | INFER_PERPLEXITY
};
static const char* const INFER_MODES[] = {"--prompt",   "--token-ids",  "--prompts", "--interactive",
                                          "--score",    "--perplexity", "--logits",  "--attention-map",
                                          "--tokenize", "--detokenize"};

// The modes that use an option; what is not here, all do.
static const OptUse INFER_USES[] = {{"--weights", INFER_COMPUTES, false},
                                    {"--mapped", INFER_COMPUTES, false},
                                    {"--cache", INFER_COMPUTES, false},
                                    {"--context", INFER_COMPUTES, false},
                                    {"--chunk", INFER_COMPUTES, false},
                                    {"--threads", INFER_COMPUTES, false},
                                    {"--prompt", INFER_TEXT | INFER_LOOKS, true},
                                    {"--token-ids", INFER_IDS | INFER_LOOKS, true},
                                    {"--echo", INFER_TEXT | INFER_LOOKS, false},
                                    {"--max-tokens", INFER_GENERATES, false},
                                    {"--stop", INFER_ANSWERS, true},
                                    {"--ignore-eos", INFER_GENERATES, false},
                                    {"--shift", INFER_GENERATES | INFER_LOOKS | INFER_SCORE, false},
                                    {"--temperature", INFER_GENERATES, false},
                                    {"--top-k", INFER_GENERATES, false},
                                    {"--top-p", INFER_GENERATES, false},
                                    {"--min-p", INFER_GENERATES, false},
                                    {"--repeat-penalty", INFER_GENERATES, false},
                                    {"--repeat-last", INFER_GENERATES, false},
                                    {"--seed", INFER_GENERATES, false},
                                    {"--samples", INFER_TEXT | INFER_IDS, true},
                                    {"--stride", INFER_PERPLEXITY, true},
                                    {"--layer", INFER_MAP, true},
                                    {"--head", INFER_MAP, true},
                                    {"--binary", INFER_TOKENIZE, true}};

// Which of them; two that exclude each other are refused. --prompt and --token-ids alone are modes, and beside --logits
// or --attention-map what these look at.
static inline unsigned infer_mode(const InferOptions* o) {
    const bool given[] = {o->prompt != NULL, o->token_ids != NULL,  o->prompts != NULL, o->interactive,
                          o->score != NULL,  o->perplexity != NULL, o->logits != NULL,  o->attention_map != NULL,
                          o->tokenize,       o->detokenize};
    unsigned mode = 0, source = 0;
    for (int i = 0; i < (int)(sizeof given / sizeof *given); i++) {
        unsigned bit = given[i] ? 1u << i : 0;
        unsigned* place = bit & (INFER_TEXT | INFER_IDS) ? &source : &mode;
        if (bit && *place) {
            die("--prompt and --token-ids exclude each other, and so do --prompts, --interactive, --score, "
                "--perplexity, --logits, --attention-map, --tokenize and --detokenize; give one");
        }
        *place |= bit;
    }
    return mode ? mode : source ? source : (unsigned)INFER_TEXT;
}

// The checkpoint that DIR means: itself, or of a run's directory the newest step-N whose files are all there. Kept
// until the program ends.
static inline const char* checkpoint_of(const char* dir, bool quiet) {
    char* path = (char*)alloc_or_die(PATH_SIZE, 1, "a path");
    long* steps;
    path_join(path, PATH_SIZE, dir, "config.json");
    bool itself = file_exists(path);
    if (!itself) { checkpoint_say_strange(dir); }
    int n = itself ? 0 : checkpoint_list(dir, &steps), i = 0;
    for (; i < n; i++) {
        Error e = {{0}};
        checkpoint_path(dir, steps[i], path);
        if (checkpoint_verify(path, false, &e)) { break; }
        fprintf(stderr, "%s: checkpoint ignored: %s\n", program_invocation_short_name, e.text);
    }
    if (!n) { return dir; }
    if (i == n) { die("%s: none of its %d checkpoints is whole", dir, n); }
    free(steps);
    if (!quiet) { fprintf(stderr, "%s: the newest checkpoint of %s\n", path, dir); }
    return path;
}

static inline void infer_options_read(InferOptions* o, int argc, char** argv) {
    const char* usage =
        "usage: infer_mta DIR --prompt TEXT            continue a text (or standard input, without --prompt)\n"
        "       infer_mta DIR --token-ids \"1 2 3\"      continue ids; prints ids\n"
        "       infer_mta DIR --prompts FILE           continue many texts, JSON lines in and out\n"
        "       infer_mta DIR --score FILE             log-probabilities of continuations, JSON lines in and out\n"
        "       infer_mta DIR --perplexity FILE        the loss of a text in windows of the context, bits per byte\n"
        "       infer_mta DIR --interactive            turn by turn; Ctrl-C stops an answer, Ctrl-D the program\n"
        "       infer_mta --tokenize --tokenizer FILE  JSON lines {\"text\"} on standard input to lines of ids; "
        "--detokenize back\n"
        "DIR is a checkpoint: config.json, model.safetensors and a tokenizer; for a run's directory, its newest one. "
        "Exit status: 0 done, 1 a mistake in options or files.";
    Opt table[] = {
        {"Model", OPT_HEADING, NULL, NULL, NULL, 0, 0, false},
        {"--tokenizer", OPT_STRING, &o->tokenizer, "NAME|FILE",
         "bytes, toy or a tiktoken rank file; else the one config.json names", 0, 0, false},
        {"--pattern", OPT_CHOICE, &o->pattern, "gpt2|cl100k_base|llama3|o200k_base",
         "how text is split; needed if the number of ranks in FILE does not determine it", 0, 0, false},
        {"--weights", OPT_CHOICE, &o->weights, "stored|f32|bf16|int8",
         "format of the matrices in memory; a format other than stored needs a copy, and so does generating (see "
         "--mapped)",
         0, 0, false},
        {"--assume-llama", OPT_FLAG, &o->assume_llama, NULL,
         "read a config.json of another family, or with unknown keys, as LLaMA", 0, 0, false},
        {"--no-verify", OPT_FLAG, &o->no_verify, NULL, "do not check the files against DIR/manifest.json", 0, 0, false},
        {"--mapped", OPT_FLAG, &o->mapped, NULL,
         "use stored weights in the mapped file: starts at once, no memory of its own, generates slower", 0, 0, false},
        {"--cache", OPT_CHOICE, &o->cache, "f32|bf16", "format of cached keys and values", 0, 0, false},
        {"--context", OPT_INT, &o->context, "N", "positions of the context (0: the model's, which is the most)", 0,
         MAX_CONTEXT, false},
        {"--chunk", OPT_INT, &o->chunk, "N", "prompt tokens computed in one pass over the weights", 1, 65536, false},
        {"--threads", OPT_INT, &o->threads, "N", "0: all cores, fewer for small models", 0, 4096, false},
        {"Text", OPT_HEADING, NULL, NULL, NULL, 0, 0, false},
        {"--prompt", OPT_STRING, &o->prompt, "TEXT", "text to continue", 0, 0, false},
        {"--token-ids", OPT_STRING, &o->token_ids, "IDS", "ids to continue, taken as they are", 0, 0, false},
        {"--prompts", OPT_STRING, &o->prompts, "FILE",
         "JSON lines {\"prompt\"} to {\"text\", \"tokens\"}, - for standard input; a line may also have temperature, "
         "top_k, top_p, until (a list of texts that end the answer) and max_tokens (else --max-tokens; if that is not "
         "given, at most half of the context)",
         0, 0, false},
        {"--interactive", OPT_FLAG, &o->interactive, NULL, "read a line, continue, again; an empty line goes on", 0, 0,
         false},
        {"--echo", OPT_FLAG, &o->echo, NULL, "print the prompt too", 0, 0, false},
        {"--max-tokens", OPT_INT, &o->max_tokens, "N", "tokens to generate at most", 0, INT32_MAX, false},
        {"--stop", OPT_LIST, &o->stops, "TEXT",
         "stop before this text, which is not printed; may be given several times", 0, 0, false},
        {"--ignore-eos", OPT_FLAG, &o->ignore_eos, NULL, "go on after the end of a document", 0, 0, false},
        {"--shift", OPT_FLAG, &o->shift, NULL,
         "when the context is full, keep its first token and its later half and go on", 0, 0, false},
        {"Sampling", OPT_HEADING, NULL, NULL, NULL, 0, 0, false},
        {"--temperature", OPT_FLOAT, &o->temperature, "X", "0 is greedy", 0, 100, false},
        {"--top-k", OPT_INT, &o->top_k, "N", "only the N most probable tokens (0: all)", 0, MAX_VOCAB, false},
        {"--top-p", OPT_FLOAT, &o->top_p, "X", "only the most probable tokens whose probabilities add up to X", 0, 1,
         false},
        {"--min-p", OPT_FLOAT, &o->min_p, "X", "only tokens of at least X times the best one's probability", 0, 1,
         false},
        {"--repeat-penalty", OPT_FLOAT, &o->repeat_penalty, "X",
         "logits of recent tokens are divided (negative: multiplied) by X", 0.01, 100, false},
        {"--repeat-last", OPT_INT, &o->repeat_last, "N", "how many tokens are recent", 0, MAX_CONTEXT, false},
        {"--seed", OPT_LONG, &o->seed, "N", "random seed of the sampling", 0, 0, false},
        {"--samples", OPT_INT, &o->samples, "N", "continuations of the prompt; a line of ---- between texts", 1,
         1000000, false},
        {"Scoring and looking inside", OPT_HEADING, NULL, NULL, NULL, 0, 0, false},
        {"--score", OPT_STRING, &o->score, "FILE",
         "JSON lines {\"context\",\"continuation\"} or {\"context_ids\",\"continuation_ids\"}, - for standard input", 0,
         0, false},
        {"--perplexity", OPT_STRING, &o->perplexity, "FILE",
         "the loss of a text: each token once, in windows of the context; nats, perplexity, bits per byte as JSON", 0,
         0, false},
        {"--stride", OPT_INT, &o->stride, "N", "tokens by which the window moves each time (0: half the context)", 0,
         MAX_CONTEXT, false},
        {"--logits", OPT_STRING, &o->logits, "FILE",
         "write the logits of each position of the prompt (safetensors), generate nothing", 0, 0, false},
        {"--attention-map", OPT_STRING, &o->attention_map, "FILE",
         "write attention weights over the prompt (JSON; scripts/attention_map.py draws it)", 0, 0, false},
        {"--layer", OPT_INT, &o->layer, "N", "of the map, from 0", 0, MAX_LAYERS, false},
        {"--head", OPT_INT, &o->head, "N", "of the map, from 0", 0, MAX_HEADS, false},
        {"--quiet", OPT_FLAG, &o->quiet, NULL, "no plan and no speed summary on standard error", 0, 0, false},
        {"Tokenizer alone", OPT_HEADING, NULL, NULL, NULL, 0, 0, false},
        {"--tokenize", OPT_FLAG, &o->tokenize, NULL, "JSON lines with \"text\" in, a line of ids each out", 0, 0,
         false},
        {"--detokenize", OPT_FLAG, &o->detokenize, NULL, "lines of ids in, JSON lines with \"text\" out", 0, 0, false},
        {"--binary", OPT_FLAG, &o->binary, NULL,
         "with --tokenize: batches of texts in, numbers out, as data/prepare.py needs it", 0, 0, false},
        OPT_END};
    const char* positional[1] = {NULL};
    options_parse(table, usage, argc, argv, positional, 1);
    o->dir = positional[0];
    bool alone = o->tokenize || o->detokenize;
    unsigned mode = infer_mode(o);
    if (!alone && !o->dir) { die("no checkpoint directory given; usage: infer_mta DIR [options], --help lists them"); }
    options_check_uses(table, INFER_USES, sizeof INFER_USES / sizeof *INFER_USES, INFER_MODES,
                       sizeof INFER_MODES / sizeof *INFER_MODES, mode);
    const OptNeed needs[] = {{"--mapped", strcmp(o->weights, "stored") == 0, "--weights stored", false},
                             {"--echo", !o->token_ids || mode == INFER_IDS, "a text, not --token-ids,", false},
                             {"--repeat-last", option_given(table, "--repeat-penalty"), "--repeat-penalty", false},
                             {"--assume-llama", o->dir != NULL, "a checkpoint directory", false},
                             {"--no-verify", o->dir != NULL, "a checkpoint directory", false}};
    options_check_needs(table, needs, sizeof needs / sizeof *needs);
    o->own_length = option_given(table, "--max-tokens");
    if (o->dir) { o->dir = checkpoint_of(o->dir, o->quiet); }
    if (alone && !o->tokenizer && !o->dir) {
        die("%s needs --tokenizer NAME|FILE or a checkpoint directory", o->tokenize ? "--tokenize" : "--detokenize");
    }
}

// The tokenizer of --tokenizer, or the one that config.json names (a built-in name, or a file beside it). One that was
// named here must be the one the model was trained with, as far as the checkpoint tells, and never have more ids than
// the model.
static inline Tokenizer* tokenizer_for(const InferOptions* o, const Config* c) {
    Error e = {{0}};
    char path[PATH_SIZE];
    Tokenizer *own = NULL, *given = NULL;
    if (c && c->tokenizer[0]) {
        path_join(path, sizeof path, o->dir, c->tokenizer);
        if (file_exists(path) || !tokenizer_built_in(c->tokenizer)) {
            const char* kept = c->tokenizer_pattern[0] ? c->tokenizer_pattern : tokenizer_copy_pattern(path);
            if (kept && o->pattern && !o->tokenizer && strcmp(kept, o->pattern)) {
                die("--pattern: got %s, but the model was trained with %s", o->pattern, kept);
            }
            own = tokenizer_open(path, kept ? kept : o->tokenizer ? NULL : o->pattern, &e);
        } else {
            const char* kept = c->tokenizer_pattern[0] ? c->tokenizer_pattern : NULL;  // which a built-in one refuses
            own = tokenizer_open(c->tokenizer, o->tokenizer ? NULL : o->pattern ? o->pattern : kept, &e);
        }
    } else if (o->pattern && !o->tokenizer) {
        die("--pattern: wanted --tokenizer FILE beside it, whose text it splits");
    }
    if (o->tokenizer) {
        Error why = {{0}};
        given = tokenizer_open(o->tokenizer, o->pattern, &why);
        if (!given) { die("%s", why.text); }
        if (own && tokenizer_vocab(own) != tokenizer_vocab(given)) {
            die("%s: %d ids, but the model was trained with %s, which has %d", o->tokenizer, tokenizer_vocab(given),
                c->tokenizer, tokenizer_vocab(own));
        }
        if (own && strcmp(tokenizer_name(own), tokenizer_name(given))) {
            die("%s: split as %s, but the model was trained with %s", o->tokenizer, tokenizer_name(given),
                tokenizer_name(own));
        }
        if (c && !checkpoint_check_tokenizer(o->dir, c, given, !o->no_verify, &why)) { die("%s", why.text); }
        tokenizer_free(own);
    } else if (c && c->tokenizer[0] && !own) {
        // Ids need none; but without it one beyond its vocabulary may be drawn. So it may be absent, and no more.
        bool absent = !tokenizer_built_in(c->tokenizer) && !file_exists(path);
        if (!absent || o->pattern || (!o->token_ids && !o->score)) {
            die("%s%s", e.text, tokenizer_missing(c->tokenizer, path));
        }
        if (o->token_ids && !o->quiet) {
            fprintf(stderr, "%s: no such file, which config.json names as tokenizer: every id of the model may come\n",
                    path);
        }
    }
    Tokenizer* t = given ? given : own;
    if (t && c && tokenizer_vocab(t) > c->vocab_size) {
        die("tokenizer %s: %d ids, the model's vocabulary has %d; give the tokenizer it was trained with",
            o->tokenizer ? o->tokenizer : c->tokenizer, tokenizer_vocab(t), c->vocab_size);
    }
    return t;
}

#endif
