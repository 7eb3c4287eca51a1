// mta/train_options.h: what the user of a trainer may give: the options of both trainers, their defaults, and the one
// table that makes the parser and --help. What a run makes of them is settled in mta/run.h.
#ifndef MTA_TRAIN_OPTIONS_H
#define MTA_TRAIN_OPTIONS_H

#include "config.h"
#include "options.h"
#include "ranks.h"

typedef struct {
    const char *model, *attention, *train, *val, *out, *init_from, *tokenizer, *pattern, *mix, *schedule, *recompute,
        *score, *matmul, *attention_kernels, *reduce;
    bool resume, dry_run, assume_llama, no_verify, verify_data, eval_first, eval_only, shift;
    FieldValue fields[CONFIG_FIELD_COUNT];  // of config.json, a row of CONFIG_FIELDS each
    // training
    int seq_len, batch_size, cuda_graphs, shards, n_ranks, ranks_per_node;  // the last two of a dry run
    int64_t tokens_per_step, steps, schedule_steps, warmup, seed;
    double tokens, epochs;  // lengths of the run, 0 = not given
    double lr, min_lr, beta1, beta2, eps, weight_decay, grad_clip;
    // reports
    int64_t eval_every, eval_windows, save_every, keep, sample_every, sample_tokens, log_every;
    const char* sample_prompt;
    double sample_temperature, save_minutes, rank_timeout;
    Ranks* ranks;  // the processes that were started
    int argc;
    char** argv;  // the command line itself
} TrainOptions;

static inline TrainOptions options_default(void) {
    TrainOptions o;
    memset(&o, 0, sizeof o);
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) { o.fields[i] = field_not_given(&CONFIG_FIELDS[i]); }
    o.lr = o.eval_every = o.keep = -1;  // not given; 0 is a rate too
    o.mix = "token";
    o.schedule = "linear";
    o.recompute = "none";
    o.attention_kernels = "own";
    o.reduce = "tree";
    o.batch_size = 4;
    o.cuda_graphs = 1;
    o.steps = -1;  // not given
    o.warmup = 50;
    o.seed = 1;
    o.beta1 = 0.9;
    o.beta2 = 0.98;
    o.eps = 1e-8;
    o.weight_decay = 0.05;
    o.grad_clip = 1;
    o.eval_windows = 128;
    o.sample_tokens = 100;
    o.sample_temperature = 0.8;
    o.log_every = 10;
    o.save_minutes = 30;
    o.rank_timeout = 300;
    return o;
}

static const char* const TRAIN_USAGE =
    "usage: PROGRAM --model NAME|config.json --train GLOB[=WEIGHT],... --out DIR [options]\n"
    "       PROGRAM --eval-only --init-from DIR --val [NAME=]GLOB,...   the loss of a checkpoint, without training\n"
    "       PROGRAM --score FILE --init-from DIR   log-probabilities of continuations, JSON lines in and out\n"
    "Trains a language model with Multi-Token Attention. --dry-run prints the plan and stops.\n"
    "Exit status: 0 done, 1 a mistake in options or files, 3 stopped after steps with NaN or infinite loss, 70 a CUDA "
    "or NCCL call failed,\n"
    "71 another process of the run was lost, 75 stopped by a signal and saved.";

// Was this field of config.json given?
static inline bool options_field_given(const TrainOptions* o, const char* key) {
    int i = config_field(key);
    assert(i >= 0);
    return field_given(&CONFIG_FIELDS[i], o->fields[i]);
}

// A row for each field of config.json that has an option, its value into `fields`; how many rows.
static inline int config_options(Opt* table, FieldValue* fields) {
    static const OptType types[] = {OPT_INT, OPT_FLOAT, OPT_SWITCH, OPT_CHOICE,
                                    OPT_STRING};  // of FIELD_INT to FIELD_LAYERS
    int n = 0;
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        if (!f->flag) { continue; }
        const char* arg = f->type == FIELD_LAYERS ? "LIST|all|none" : f->words;
        bool number = f->type == FIELD_INT || f->type == FIELD_NUMBER;
        Opt row = {f->flag, types[f->type], &fields[i], arg, f->help, number ? f->min : 0, number ? f->max : 0, false};
        table[n++] = row;
    }
    return n;
}

enum { TRAIN_OPTIONS = 96 };  // rows of the table, at most

// The one table of both trainers. `table` has room for TRAIN_OPTIONS rows.
static inline void train_options_table(Opt* table, TrainOptions* o) {
    const double any = 1e300;
    int n = 0;
#define ROW(name, type, field, arg, help, low, high)                         \
    {                                                                        \
        Opt row = {name, type, (void*)(field), arg, help, low, high, false}; \
        table[n++] = row;                                                    \
    }
#define HEADING(name) ROW(name, OPT_HEADING, NULL, NULL, NULL, 0, 0)
    HEADING("Model")
    ROW("--model", OPT_STRING, &o->model, "NAME|config.json", MODEL_NAMES ", or a configuration file", 0, 0)
    ROW("--attention", OPT_STRING, &o->attention, "KIND",
        ATTENTION_NAMES " (default: a configuration file's, else mta)", 0, 0)
    ROW("--init-from", OPT_STRING, &o->init_from, "DIR",
        "start from the weights of a checkpoint, or of a LLaMA or Mistral model", 0, 0)
    ROW("--assume-llama", OPT_FLAG, &o->assume_llama, NULL,
        "read a config.json of another family, or with unknown keys, as LLaMA", 0, 0)
    ROW("--no-verify", OPT_FLAG, &o->no_verify, NULL, "do not check --init-from's files against its manifest.json", 0,
        0)
    ROW("--tokenizer", OPT_STRING, &o->tokenizer, "NAME|FILE",
        "bytes, toy or a tiktoken rank file, for samples and the checkpoint", 0, 0)
    ROW("--pattern", OPT_CHOICE, &o->pattern, "gpt2|cl100k_base|llama3|o200k_base",
        "how text is split; needed if the number of ranks in the file does not determine it", 0, 0)
    HEADING("Model, field by field (overrides --model and --attention)")
    n += config_options(table + n, o->fields);
    HEADING("Data")
    ROW("--train", OPT_STRING, &o->train, "GLOB[=WEIGHT],...|@RECIPE", "token shards to train on", 0, 0)
    ROW("--mix", OPT_CHOICE, &o->mix, "token|document",
        "what the weights of --train are shares of: tokens, or draws of a document", 0, 0)
    ROW("--val", OPT_STRING, &o->val, "[NAME=]GLOB,...",
        "token shards to evaluate on: a set for each NAME; without NAME, a set for each file name before _val_", 0, 0)
    ROW("--verify-data", OPT_FLAG, &o->verify_data, NULL,
        "read every shard first and compare its checksum; sizes are always compared with manifest.json", 0, 0)
    ROW("--seq-len", OPT_INT, &o->seq_len, NULL,
        "tokens of a sequence (default: the model's context, at most 2048; with --score all of it)", 1, MAX_CONTEXT)
    ROW("--batch-size", OPT_INT, &o->batch_size, NULL, "sequences computed at once", 1, 1 << 20)
    ROW("--tokens-per-step", OPT_LONG, &o->tokens_per_step, NULL,
        "tokens of an optimizer step (default: batch size x sequence length)", 1, any)
    HEADING("Training (AdamW; the paper's recipe unless said otherwise)")
    ROW("--steps", OPT_LONG, &o->steps, NULL,
        "optimizer steps in all (default: those of the run that --resume continues, else 1000)", 0, any)
    ROW("--tokens", OPT_FLOAT, &o->tokens, NULL,
        "the same, counted in tokens: rounded up to whole steps; may be written as 1e9", 1, 1e15)
    ROW("--epochs", OPT_FLOAT, &o->epochs, NULL,
        "the same, counted in passes over all of --train: rounded up to whole steps", 1e-9, 1e9)
    ROW("--lr", OPT_FLOAT, &o->lr, NULL, "peak learning rate (default: that of --model's preset, else 1.5e-4)", 0, 1e3)
    ROW("--schedule", OPT_CHOICE, &o->schedule, "linear|cosine|constant|wsd",
        "learning rate after warmup; wsd: constant, the last fifth linear", 0, 0)
    ROW("--schedule-steps", OPT_LONG, &o->schedule_steps, NULL, "steps of the schedule, if not --steps", 1, any)
    ROW("--warmup", OPT_LONG, &o->warmup, NULL, "steps of linear warmup", 0, any)
    ROW("--min-lr", OPT_FLOAT, &o->min_lr, NULL, "learning rate at the end of the schedule", 0, 1e3)
    // AdamW computes 1 - beta in fp32, which is 0 from 0.99999998 on: weights would be divided by eps.
    ROW("--beta1", OPT_FLOAT, &o->beta1, NULL, "decay of the first moment", 0, 0.99999)
    ROW("--beta2", OPT_FLOAT, &o->beta2, NULL, "decay of the second moment", 0, 0.99999)
    ROW("--eps", OPT_FLOAT, &o->eps, NULL, "AdamW's epsilon", 1e-20, 1)
    ROW("--weight-decay", OPT_FLOAT, &o->weight_decay, NULL, "decoupled decay of every tensor", 0, 1e3)
    ROW("--grad-clip", OPT_FLOAT, &o->grad_clip, NULL, "largest global gradient norm, 0 = off", 0, 1e9)
    ROW("--seed", OPT_LONG, &o->seed, NULL, "random seed of initialisation, data order and samples", 0, 9e15)
    ROW("--matmul", OPT_CHOICE, &o->matmul, "fp32|bf16",
        "format of the operands of matrix products (default: fp32 on the CPU; CUDA: only the format it was built with)",
        0, 0)
    ROW("--recompute", OPT_CHOICE, &o->recompute, "none|elementwise|block",
        "activations computed again in the backward pass (CUDA)", 0, 0)
    ROW("--attention-kernels", OPT_CHOICE, &o->attention_kernels, "own|cudnn",
        "cudnn: those of cuDNN, in layers without operations on the scores before the softmax (CUDA; make CUDNN=1)", 0,
        0)
    ROW("--cuda-graphs", OPT_SWITCH, &o->cuda_graphs, NULL,
        "replay a micro-batch's launches as CUDA graphs; off: one by one, to find a fault (CUDA)", 0, 0)
    HEADING("Several processes (started by torchrun, mpirun, mpiexec or srun; on a CPU MPI=1 builds for them)")
    ROW("--shards", OPT_INT, &o->shards, NULL,
        "parts into which a step's sequences are cut; the bits of the results depend on N, not on the number of "
        "processes (default: as in the run that --resume continues, else one per process)",
        1, MAX_RANKS)
    ROW("--reduce", OPT_CHOICE, &o->reduce, "tree|nccl",
        "tree: add gradients in the order of the shards; nccl: by NCCL (CUDA), the bits depend on the number of "
        "processes",
        0, 0)
    ROW("--rank-timeout", OPT_FLOAT, &o->rank_timeout, NULL,
        "seconds that a process may stand still before all end with status 71, 0 = for ever", 0, 1e6)
    ROW("--ranks", OPT_INT, &o->n_ranks, NULL, "with --dry-run: plan for this many processes", 1, MAX_RANKS)
    ROW("--ranks-per-node", OPT_INT, &o->ranks_per_node, NULL, "with --ranks: processes on each machine", 1, MAX_RANKS)
    HEADING("Run")
    ROW("--out", OPT_STRING, &o->out, "DIR", "run directory: log.jsonl and checkpoints", 0, 0)
    ROW("--resume", OPT_FLAG, &o->resume, NULL, "continue from the newest good checkpoint in --out", 0, 0)
    ROW("--eval-every", OPT_LONG, &o->eval_every, NULL,
        "steps between evaluations, 0 = only the last (default: a tenth of the run)", 0, any)
    ROW("--eval-windows", OPT_LONG, &o->eval_windows, NULL,
        "sequences of a set per evaluation, spread over it; 0 = all", 0, any)
    ROW("--eval-first", OPT_FLAG, &o->eval_first, NULL, "evaluate before the first step too", 0, 0)
    ROW("--save-every", OPT_LONG, &o->save_every, NULL, "steps between checkpoints, 0 = only the last", 0, any)
    ROW("--save-minutes", OPT_FLOAT, &o->save_minutes, NULL,
        "minutes between further checkpoints, each of which replaces the one before; 0 = none", 0, 1e6)
    ROW("--keep", OPT_LONG, &o->keep, NULL,
        "checkpoints kept, not counting those of --save-minutes; 0 = all (default: as in the run that --resume "
        "continues, else 2)",
        0, 1e9)
    ROW("--sample-every", OPT_LONG, &o->sample_every, NULL, "steps between samples, 0 = none", 0, any)
    ROW("--sample-tokens", OPT_LONG, &o->sample_tokens, NULL, "tokens of a sample", 1, 1e6)
    ROW("--sample-prompt", OPT_STRING, &o->sample_prompt, "TEXT", "prompt that a sample continues", 0, 0)
    ROW("--sample-temperature", OPT_FLOAT, &o->sample_temperature, NULL,
        "sampling temperature, 0 = the most probable token", 0, 100)
    ROW("--log-every", OPT_LONG, &o->log_every, NULL, "steps between progress lines that stay on the screen", 1, any)
    ROW("--dry-run", OPT_FLAG, &o->dry_run, NULL,
        "open --train, --val and the run of --resume, print parameters, memory and time, then stop", 0, 0)
    HEADING("A checkpoint without training (--init-from DIR, in which no tensor may be absent; --out is optional)")
    ROW("--eval-only", OPT_FLAG, &o->eval_only, NULL, "evaluate every set of --val, then stop", 0, 0)
    ROW("--score", OPT_STRING, &o->score, "FILE",
        "JSON lines as infer_mta --score takes them, - for standard input; the same answers on standard output", 0, 0)
    ROW("--shift", OPT_FLAG, &o->shift, NULL,
        "with --score: a context that is too long loses its earliest tokens (without --shift it is refused)", 0, 0)
#undef ROW
#undef HEADING
    Opt end = OPT_END;
    table[n++] = end;
    assert(n <= TRAIN_OPTIONS);
}

// Does the program stop without training, once it has evaluated or scored?
static inline bool options_evaluate(const TrainOptions* o) { return o->eval_only || o->score; }

// Of the options after those of the model: what --eval-only and --score take. The others are of training.
static inline bool options_serve_evaluation(const TrainOptions* o, const char* name) {
    const char* both = "--seq-len|--batch-size|--matmul|--attention-kernels|--cuda-graphs|--out|--dry-run|--eval-only|"
                       "--score|--rank-timeout";
    const char* own = o->score ? "--shift" : "--val|--eval-windows|--verify-data";
    return choice_index(both, name) >= 0 || choice_index(own, name) >= 0;
}

// Refuses what --eval-only or --score would leave out without a word, and what they lack.
static inline void options_check_evaluation(const TrainOptions* o, const Opt* table) {
    const char* mode = o->score ? "--score" : "--eval-only";
    bool of_model = true;
    if (o->score && o->eval_only) { die("--eval-only and --score exclude each other; give one"); }
    for (const Opt* row = table; row->name; row++) {
        if (row->type == OPT_HEADING) { of_model = of_model && strcmp(row->name, "Data") != 0; }
        if (row->given && !of_model && !options_serve_evaluation(o, row->name)) {
            die("%s: it has no use beside %s; leave it out", row->name, mode);
        }
    }
    if (!o->init_from) { die("%s: wanted --init-from DIR, a checkpoint", mode); }
    if (o->eval_only && !o->val) { die("--eval-only: wanted --val [NAME=]GLOB,..., what to evaluate on"); }
}

// Refuses options that do nothing without another one; those that only tune it are passed over with a line.
static inline void options_check_useful(const TrainOptions* o, const Opt* table) {
    static const char val[] = "--val [NAME=]GLOB,..., what to evaluate on", samples[] = "--sample-every N";
    bool val_set = o->val || o->dry_run, given_file = o->model && !preset_find(o->model);
    const OptNeed needs[] = {
        {"--pattern", o->tokenizer != NULL, "--tokenizer FILE, whose text it splits,", true},
        {"--assume-llama", o->init_from || given_file, "--init-from DIR or --model config.json", false},
        {"--no-verify", o->init_from != NULL, "--init-from DIR", false},
        {"--ranks", o->dry_run, "--dry-run (mpirun -n N starts processes)", true},
        {"--ranks-per-node", o->n_ranks > 0, "--ranks N", true},
        {"--shift", o->score != NULL, "--score FILE", true},
        {"--eval-first", val_set, val, true},
        {"--eval-every", val_set || o->eval_every == 0, val, false},
        {"--eval-windows", val_set, val, false},
        {"--sample-tokens", o->sample_every > 0, samples, false},
        {"--sample-prompt", o->sample_every > 0, samples, false},
        {"--sample-temperature", o->sample_every > 0, samples, false}};
    options_check_needs(table, needs, sizeof needs / sizeof *needs);
    if (o->ranks_per_node > 0 && o->n_ranks > o->ranks_per_node && o->n_ranks % o->ranks_per_node) {
        die("--ranks-per-node: got %d, wanted a divisor of --ranks %d: as many on each machine", o->ranks_per_node,
            o->n_ranks);
    }
    if (o->rank_timeout > 0 && o->rank_timeout < WATCH_LEAST) {
        die("--rank-timeout: got %g, wanted 0 or at least %d: processes tell each other once a second where they are",
            o->rank_timeout, WATCH_LEAST);
    }
}

// The command line into *o, which nothing changes afterwards. Ends the program on a mistake, or with --help.
static inline void options_given(TrainOptions* o, int argc, char** argv) {
    Opt table[TRAIN_OPTIONS];
    const char* extra[1] = {""};
    Text usage = {NULL, 0, 0};
    *o = options_default();
    o->argc = argc;
    o->argv = argv;
    train_options_table(table, o);
    for (const char *at = TRAIN_USAGE, *next; at; at = next) {  // PROGRAM stands for the name
        next = strstr(at, "PROGRAM");
        text_append(&usage, at, next ? (size_t)(next - at) : strlen(at));
        if (next) { text_printf(&usage, "%s", program_invocation_short_name); }
        next = next ? next + strlen("PROGRAM") : NULL;
    }
    if (options_parse(table, usage.text, argc, argv, extra, 1)) {
        die("unexpected \"%s\"; every option starts with --, see --help", extra[0]);
    }
    text_free(&usage);
    options_check_useful(o, table);
    if (options_evaluate(o)) {
        options_check_evaluation(o, table);
        o->recompute = "never";  // no backward pass needs what a layer has computed
        return;
    }
    if (!o->dry_run) {
        if (!o->train) { die("--train is missing: wanted token shards, made by data/prepare.py; see --help"); }
        if (!o->out) { die("--out is missing: wanted a directory for the log and checkpoints; see --help"); }
    }
}

#endif
