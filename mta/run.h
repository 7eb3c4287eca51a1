// mta/run.h: one training run as it was settled from the options: the model's configuration, the plan, the run
// directory, the learning rate, one step's data, the log, signals, and trainer.json. No model mathematics, no device.
#ifndef MTA_RUN_H
#define MTA_RUN_H

#include "checkpoint.h"
#include "config.h"
#include "log.h"
#include "ranks.h"
#include "shards.h"
#include "tokenizer.h"
#include "train_options.h"
#include "trainer.h"

#include <math.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <time.h>

// The commit that was built: the Makefile links it in where git is there, build/commit.o.
#ifdef __cplusplus
extern "C" {
#endif
const char* mta_commit(void) __attribute__((weak));
#ifdef __cplusplus
}
#endif

// Exit statuses of the trainers.
enum { EXIT_DONE = 0, EXIT_USER_ERROR = 1, EXIT_NOT_FINITE = 3, EXIT_STOPPED = 75 };
enum { MAX_SKIPPED_IN_A_ROW = 5, MAX_VAL_SETS = 64, TRAINER_MAX_BYTES = 1 << 24 };  // of trainer.json

// ---------------------------------------------------------------------------------------------------------------------
// A run

typedef struct {
    char name[SET_NAME];
    Loader loader;
    bool masked;             // has it targets that do not count? Then sequences are right or wrong
    double bytes_per_token;  // of text, 0 = not known
    // Of the last evaluation.
    double loss, bits_per_byte;  // bits_per_byte NAN where it is not known
} ValSet;

// The learning rate: linear warmup to lr, then by kind ("linear", "cosine" or "wsd") down to min_lr at step `steps`; it
// stays at lr where that is "constant".
typedef struct {
    const char* kind;
    double lr, min_lr;
    int64_t warmup, steps;
} Schedule;

typedef struct {
    const Trainer* trainer;
    void* model;                  // the trainer's own
    const TrainOptions* options;  // what was given
    Config config;                // from here on: what was settled
    int saved_context;            // max_position_embeddings of the checkpoint that is resumed
    int seq_len;                  // T
    int batch_size;               // sequences computed at once
    Ranks* ranks;                 // the processes of the run
    int shards;                   // of a step (mta/ranks.h)
    double* losses;               // (shards) of the current step
    bool timed_save;              // --save-minutes are over
    int slow, slow_steps;         // the rank that was called slow last, -1 = none; steps since then
    double* rank_seconds;         // (ranks) that each has worked for a window, averaged over those steps
    int windows;                  // sequences of an optimizer step
    int64_t tokens_per_step;
    int64_t steps;
    int64_t done_steps, done_tokens;  // of them, by the checkpoint that is resumed
    int64_t keep;                     // checkpoints, 0 = all
    int64_t eval_every;               // steps between evaluations, 0 = only the last
    Schedule schedule;
    char init_dir[PATH_SIZE];        // directory whose tensors start the run, "" = random
    char resume_dir[PATH_SIZE];      // checkpoint that is continued, "" = none
    ShardTokenizer shard_tokenizer;  // what the training shards say of theirs
    Tokenizer* tokenizer;            // NULL = unknown: no samples
    char tokenizer_from[PATH_SIZE];  // what named it: --tokenizer, a config.json or the shards' manifest.json
    Text rank_file;  // of the tokenizer, which goes into every checkpoint: it may lie in one that --keep removes
    Loader train;
    ValSet val[MAX_VAL_SETS];
    int n_val;
    int32_t *tokens, *targets;  // (windows, T) of the current step
    Text loader_state;          // as of the last finished step
    RunLog log;
    Progress progress;
    int64_t step;  // finished optimizer steps
    int64_t tokens_seen;
    int64_t skipped;  // updates left out because loss or gradient norm was not finite
    int skipped_in_a_row;
    int64_t saved_step;           // of the newest checkpoint, -1 = none
    int64_t timed_step;           // of the one that the next checkpoint replaces (--save-minutes), -1 = none
    double saved_at;              // seconds_now() then, or when training began
    bool timed;                   // is the checkpoint that is being written one of --save-minutes?
    bool to_evaluate, to_sample;  // due after the last step and not done: after a signal --resume does it
    bool evaluated;               // the step that was finished last, or before the first; as its checkpoint says
    Text val_lines;               // of the log, from an evaluation of which not all sets are done
    Text passed_over;             // what was wrong with newer checkpoints than the one that is resumed, a line each
    Text changes;                 // what --resume changes, a JSON string each, comma separated
    int lock;                     // descriptor that holds the run's lock, -1 = none
    char moved[PATH_SIZE];        // the run's directory where it was renamed since the start, "" = it is --out
    uint64_t log_first;           // hash of the log's first line, by which the run knows its directory again
    int answers;                  // --score: standard output as the program got it, see run_divert_output
    double flops_per_token, flops_per_second;  // for MFU: the model's, and the machine's peak as the trainer states it
    double (*measure)(bool bf16);              // measures that peak again, NULL = it is not measured
    double measure_after;                      // when next, in seconds of training
    char device[128];                          // the machine's name for it
    char length[160];                          // how --tokens or --epochs became steps, for the plan
    double started;                            // seconds_now() when training began
    double training_seconds;                   // in train_step since then: what tokens/s and ETA are of
    int64_t first_step;
    int64_t computed;  // windows of steps, or of --eval-only, or requests of --score, that this process has computed
} Run;

// The one variable that a signal handler may write.
static volatile sig_atomic_t run_signal = 0;

// The first signal is answered at once. Ctrl-C a second time stops without saving; a terminal that closes sends SIGHUP
// twice, Slurm SIGTERM twice within milliseconds at a job's time limit, perhaps after SIGUSR1: those must not end a
// save.
static inline void run_on_signal(int number) {
    static const char text[] = "\nstopping after this micro-batch (several processes: this step), then saving; Ctrl-C "
                               "again stops at once\n";
    int before = errno;
    if (run_signal == number && number == SIGINT) { _exit(128 + number); }
    if (!run_signal && write(STDERR_FILENO, text, sizeof text - 1) < 0) {
        errno = before;
    }  // a terminal that is gone reads nothing
    run_signal = number;
    errno = before;
}

// On a rank other than 0: what it does about a signal, all do at the end of the step, and rank 0 says so.
static inline void run_on_signal_quietly(int number) {
    if (run_signal == number && number == SIGINT) { _exit(128 + number); }
    run_signal = number;
}

static inline void run_catch_signals(const Ranks* ranks) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = ranks_lead(ranks) ? run_on_signal : run_on_signal_quietly;
    a.sa_flags = SA_RESTART;  // a checkpoint that is being written is not broken off: some network disks would
    sigaction(SIGINT, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
    sigaction(SIGUSR1, &a, NULL);  // what clusters send before a job's time is over
    if (signal(SIGHUP, SIG_IGN) != SIG_IGN) {
        sigaction(SIGHUP, &a, NULL);
    }                          // the terminal is gone, and the run was not started by nohup
    signal(SIGPIPE, SIG_IGN);  // a closed terminal pipe must not end a run
}

// Is the run to stop? With several ranks: what all have agreed on, so that none waits for one that has gone.
static inline bool run_stops(const Run* r) { return ranks_alone(r->ranks) ? run_signal : r->ranks->signal; }

// ---- the model's configuration

// Sizes and numbers that were given; other heads bring as many key/value heads along.
static inline void run_override_fields(Config* c, const TrainOptions* o) {
    Error e = {{0}};
    if (!config_override(c, o->fields, PART_SIZES, &e) || !config_override(c, o->fields, PART_NUMBERS, &e)) {
        die("%s", e.text);
    }
    if (options_field_given(o, "num_attention_heads") && !options_field_given(o, "num_key_value_heads")) {
        c->num_key_value_heads = c->num_attention_heads;
    }
    for (int l = c->num_hidden_layers; l < MAX_LAYERS; l++) { c->kq_conv_layer[l] = false; }
}

// Options for convolutions in a model in which no layer comes to have one: those that ask for one are refused, the
// sizes are said to do nothing.
static inline void run_check_convolutions(const Config* c, const TrainOptions* o) {
    bool before_or_after = c->kq_conv_pre_softmax || c->kq_conv_post_softmax;
    for (int i = 0; i < CONFIG_FIELD_COUNT && !config_any_conv(c); i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        if (f->change != CHANGE_CONV || !field_given(f, o->fields[i])) { continue; }
        if (f->type == FIELD_INT) {
            printf("%s does nothing: no layer has a convolution\n", f->flag);
        } else if (f->type == FIELD_SWITCH && o->fields[i].integer) {
            die("%s on: no layer has a convolution; --kq-conv-layers says which are to have one", f->flag);
        } else if (f->type == FIELD_LAYERS && !before_or_after && strcmp(o->fields[i].text, "none") != 0) {
            die("%s %s: their convolutions are off; wanted --kq-conv-pre-softmax on or --kq-conv-post-softmax on",
                f->flag, o->fields[i].text);
        }
    }
}

static inline bool run_holds_run(const char* dir) {
    char path[PATH_SIZE];
    long* steps;
    path_join(path, sizeof path, dir, "log.jsonl");
    int n = checkpoint_list(dir, &steps);
    free(steps);
    return n > 0 || file_exists(path);
}

// What the training shards say of their tokenizer.
static inline void run_shard_tokenizer(Run* r) {
    const TrainOptions* o = r->options;
    Loader l;
    Error e = {{0}};
    memset(&r->shard_tokenizer, 0, sizeof r->shard_tokenizer);
    if (!o->train) { return; }
    if (!loader_open(&l, o->train, 1, MAX_VOCAB, 0, &e) || !loader_tokenizer(&l, &r->shard_tokenizer, &e)) {
        die("--train: %s", e.text);
    }
    loader_close(&l);
}

// The tokenizer that a config.json names: its file beside it or its built-in name into path, how its text is split into
// pattern (32 bytes, "" = as the file tells). False if it names none.
static inline bool run_named_tokenizer(const char* config, bool assume_llama, char* path, char* pattern) {
    Config c;
    Error e = {{0}};
    char dir[PATH_SIZE];
    const char* slash = strrchr(config, '/');
    if (!config_read(&c, config, assume_llama, &e)) { die("%s", e.text); }
    if (!c.tokenizer[0]) { return false; }
    snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - config) + 1 : 0, config);
    path_join(path, PATH_SIZE, dir, c.tokenizer);
    if (tokenizer_built_in(c.tokenizer) && !file_exists(path)) { snprintf(path, PATH_SIZE, "%s", c.tokenizer); }
    const char* told = c.tokenizer_pattern[0] ? c.tokenizer_pattern : tokenizer_copy_pattern(path);
    snprintf(pattern, 32, "%s", told ? told : "");
    return true;
}

// Refuses a tokenizer that is not the one the shards were made with: by name, number of ids, and rank file where theirs
// is there.
static inline void run_check_tokenizer(const Run* r, const ShardTokenizer* s) {
    const Tokenizer* t = r->tokenizer;
    Error e = {{0}};
    char text[256], *ranks = NULL;
    size_t n = 0;
    bool same = (s->vocab_size == 0 || s->vocab_size == tokenizer_vocab(t)) &&
                (!s->name[0] || !strcmp(s->name, tokenizer_name(t)));
    if (same && s->path[0] && file_exists(s->path)) {
        if (!read_file(s->path, UINT32_MAX, &ranks, &n, &e)) { die("%s", e.text); }
        same = n == r->rank_file.n && !memcmp(ranks, r->rank_file.text, n);
        free(ranks);
    }
    if (same && tokenizer_file(t) && s->bytes > 0 &&
        ((int64_t)r->rank_file.n != s->bytes || crc32_update(0, r->rank_file.text, r->rank_file.n) != s->crc)) {
        die("%s: %s: %zu bytes, CRC-32 %08x, but the manifest.json beside %s says %lld and %08x", r->tokenizer_from,
            tokenizer_file(t), r->rank_file.n, crc32_update(0, r->rank_file.text, r->rank_file.n), s->shard,
            (long long)s->bytes, s->crc);
    }
    if (!same) {
        die("%s: %s is %s (%d ids), but %s was made with %s", r->tokenizer_from,
            tokenizer_file(t) ? tokenizer_file(t) : tokenizer_name(t), tokenizer_name(t), tokenizer_vocab(t), s->shard,
            shard_tokenizer_text(s, text, sizeof text));
    }
}

// Says that shards of an unknown tokenizer are taken for ones of the tokenizer that the model names.
static inline void run_say_taken(const Run* r, const ShardTokenizer* s) {
    bool told = r->options->tokenizer || r->resume_dir[0];
    if (told || !r->tokenizer || !s->shard[0] || s->name[0]) { return; }
    printf("the tokenizer of %s is unknown (no manifest.json beside it names one): taken for the model's, %s\n",
           s->shard, tokenizer_file_name(r->tokenizer));
}

// Refuses --tokenizer, with or without --pattern, where the weights in `from` were trained with another one.
static inline void run_check_trained_tokenizer(const Run* r, const char* from) {
    char path[PATH_SIZE];
    Config c;
    Error e = {{0}};
    path_join(path, sizeof path, from, "config.json");
    if (!file_exists(path)) { return; }
    if (!config_read(&c, path, r->options->assume_llama, &e) ||
        !checkpoint_check_tokenizer(from, &c, r->tokenizer, !r->options->no_verify, &e)) {
        die("--tokenizer: %s", e.text);
    }
}

// --tokenizer, else the one that `config` names ("" = no such file), else the shards' own. All that are known must be
// the same.
static inline void run_open_tokenizer(Run* r, const char* config) {
    char path[PATH_SIZE] = "", pattern[32] = "";
    Error e = {{0}};
    const TrainOptions* o = r->options;
    const ShardTokenizer* s = &r->shard_tokenizer;
    bool has = !o->tokenizer && config[0] && run_named_tokenizer(config, o->assume_llama, path, pattern);
    snprintf(r->tokenizer_from, sizeof r->tokenizer_from, "%s", has ? config : "--tokenizer");
    if (o->tokenizer) {
        snprintf(path, sizeof path, "%s", o->tokenizer);
        snprintf(pattern, sizeof pattern, "%s", o->pattern ? o->pattern : "");
    } else if (!has && s->name[0]) {
        snprintf(path, sizeof path, "%s", s->path[0] ? s->path : s->name);
        snprintf(pattern, sizeof pattern, "%s", s->path[0] ? s->name : "");
        snprintf(r->tokenizer_from, sizeof r->tokenizer_from, "the manifest.json beside %.4000s", s->shard);
    }
    if (!path[0] && !o->tokenizer) {
        if (s->shard[0]) {
            printf("the tokenizer of %s is unknown (no manifest.json beside it names one): samples need --tokenizer "
                   "NAME|FILE\n",
                   s->shard);
        }
        return;
    }
    r->tokenizer = tokenizer_open(path, pattern[0] ? pattern : NULL, &e);
    if (!r->tokenizer && has && tokenizer_missing(path, path)[0]) {
        die("%s%s", e.text, tokenizer_missing(path, path));
    }
    if (!r->tokenizer ||
        (tokenizer_file(r->tokenizer) && !read_file(path, UINT32_MAX, &r->rank_file.text, &r->rank_file.n, &e))) {
        die("%s: %s", r->tokenizer_from, e.text);
    }
    run_check_tokenizer(r, s);
    run_say_taken(r, s);
    const char* from = r->resume_dir[0] ? r->resume_dir : r->init_dir;
    if (o->tokenizer && from[0]) { run_check_trained_tokenizer(r, from); }
    Config* c = &r->config;
    snprintf(c->tokenizer, sizeof c->tokenizer, "%s", tokenizer_file_name(r->tokenizer));
    snprintf(c->tokenizer_pattern, sizeof c->tokenizer_pattern, "%s", tokenizer_kept_pattern(r->tokenizer));
    c->bos_token_id = tokenizer_bos(r->tokenizer);
    c->eos_token_id = tokenizer_end(r->tokenizer);
    c->n_other_eos = 0;
}

// Refuses a --sample-prompt that has no ids, or too many to be continued: better now than at the first sample.
static inline void run_check_sample_prompt(const Run* r) {
    const char* prompt = r->options->sample_prompt;
    int32_t* ids = NULL;
    size_t n = 0;
    Error e = {{0}};
    if (!prompt || !r->tokenizer) { return; }
    if (!tokenizer_encode(r->tokenizer, prompt, strlen(prompt), &ids, &n, &e)) { die("--sample-prompt: %s", e.text); }
    free(ids);
    n += tokenizer_bos(r->tokenizer) >= 0;
    if (n >= (size_t)r->seq_len) {
        die("--sample-prompt: got %zu tokens with BOS, wanted fewer than --seq-len %d, which hold the sample too", n,
            r->seq_len);
    }
}

// Is this a field that changes what a model computes and that the shapes of its tensors do not show?
static inline bool field_is_hidden(const ConfigField* f) {
    return f->part == PART_ROPE || f->type == FIELD_NUMBER || !strcmp(f->key, "num_attention_heads") ||
           !strcmp(f->key, "head_norm");
}

// What the run's configuration computes otherwise than --init-from's, whose tensors fit all the same: said where an
// option asks for it, else refused where it comes from a preset (a norm of heads that is absent there is named among
// the tensors).
static inline void run_check_hidden_fields(const Run* r, const Config* init, bool preset) {
    const TrainOptions* o = r->options;
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        Text mine = {NULL, 0, 0}, theirs = {NULL, 0, 0};
        bool asked = field_given(f, o->fields[i]) || (f->part == PART_ATTENTION && o->attention);
        if (!field_is_hidden(f) || config_get(&r->config, f) == config_get(init, f)) { continue; }
        if (f->type == FIELD_CHOICE && (!config_get(&r->config, f) || !config_get(init, f))) { continue; }
        config_field_write(&r->config, f, &mine);
        config_field_write(init, f, &theirs);
        if (preset && !asked) {
            die("--init-from: %s has %s %s, --model %s has %s; leave out --model%s%s", r->init_dir, f->key, theirs.text,
                o->model, mine.text, f->flag ? " or give " : "", f->flag ? f->flag : "");
        }
        printf("--init-from: %s has %s %s, this run %s\n", r->init_dir, f->key, theirs.text, mine.text);
        text_free(&mine);
        text_free(&theirs);
    }
}

// Says which ids end a text of --init-from's model, as infer_mta takes them, where this run's checkpoints have others.
static inline void run_say_ends(const Run* r, Config* init) {
    const ConfigField* f = &CONFIG_FIELDS[config_field("eos_token_id")];
    char path[PATH_SIZE];
    Text mine = {NULL, 0, 0}, theirs = {NULL, 0, 0};
    path_join(path, sizeof path, r->init_dir, "generation_config.json");
    if (file_exists(path)) {
        Error e = {{0}};
        Json* j = json_read(path, (size_t)1 << 20, &e);
        const Json* ends = json_get(j, f->key);
        bool good = j && (ends ? config_read_field(init, f, ends, &e) : config_read_null(init, f, &e));
        if (!good) { die("--init-from: %s: %s", path, e.text); }
        json_free(j);
    }
    config_field_write(init, f, &theirs);
    config_field_write(&r->config, f, &mine);
    if (init->eos_token_id >= 0 && strcmp(mine.text, theirs.text) != 0) {
        printf("--init-from: %s has eos_token_id %s, the checkpoints of this run %s\n", r->init_dir, theirs.text,
               mine.text);
    }
    text_free(&mine);
    text_free(&theirs);
}

// Says that a model has had a window that a longer context would show: attention sees all positions here.
static inline void run_say_window(const Run* r, const Config* theirs, const char* where) {
    if (theirs->sliding_window && r->config.max_position_embeddings > theirs->sliding_window) {
        printf("%s has sliding_window %d; here attention sees all of the %d positions\n", where, theirs->sliding_window,
               r->config.max_position_embeddings);
    }
}

// Refuses an --init-from whose files are damaged, whose mathematics is not known, or of which a preset would replace
// what no tensor shows; to evaluate it, more positions than it has.
static inline void run_check_init(const Run* r, bool preset) {
    const TrainOptions* o = r->options;
    Config c;
    Error e = {{0}};
    char path[PATH_SIZE];
    if (!o->no_verify && !checkpoint_verify_model(r->init_dir, &e)) { die("--init-from: %s", e.text); }
    path_join(path, sizeof path, r->init_dir, "config.json");
    if (!file_exists(path) && !link_leads_nowhere(path)) {
        printf("--init-from: no config.json in %s: RoPE's base and scaling, the norms' epsilon and the number of heads "
               "are those of --model\n",
               r->init_dir);
        return;
    }
    if (!config_read(&c, path, o->assume_llama, &e)) { die("--init-from: %s", e.text); }
    run_check_hidden_fields(r, &c, preset);
    if (!options_evaluate(o)) { run_say_ends(r, &c); }
    if (options_evaluate(o) && !options_field_given(o, "max_position_embeddings") &&
        r->seq_len > c.max_position_embeddings) {
        die("--seq-len: got %d, %s has %d positions; --max-position-embeddings says that it may have more", r->seq_len,
            r->init_dir, c.max_position_embeddings);
    }
    run_say_window(r, &c, r->init_dir);
}

// Which model: a checkpoint that is resumed, a preset, a configuration file, or --init-from's.
static inline void run_configure(Run* r) {
    const TrainOptions* o = r->options;
    Config* c = &r->config;
    Error e = {{0}};
    char path[PATH_SIZE];
    const Preset* preset = o->model ? preset_find(o->model) : NULL;
    const char* base = o->model;
    if (o->init_from) {
        if (!dir_exists(o->init_from)) { die("--init-from: %s is not a directory", o->init_from); }
        path_join(path, sizeof path, o->init_from, "config.json");
        if (file_exists(path) || checkpoint_newest(o->init_from, r->init_dir, NULL) < 0) {
            snprintf(r->init_dir, sizeof r->init_dir, "%s", o->init_from);
        }
    }
    if (!base && r->resume_dir[0]) { base = r->resume_dir; }
    if (!base && o->init_from) { base = r->init_dir; }
    if (!base) { die("--model is missing, wanted one of %s or a config.json; see --help", MODEL_NAMES); }
    if (preset) {
        config_from_preset(c, preset);
    } else {
        snprintf(path, sizeof path, "%s", base);
        if (dir_exists(base)) { path_join(path, sizeof path, base, "config.json"); }
        if (!file_exists(path)) {
            if (base == r->init_dir) {
                die("--init-from: %s: no config.json in it, and no good checkpoint step-N; wanted a checkpoint", base);
            }
            die("--model: got \"%s\", wanted one of %s or a config.json", base, MODEL_NAMES);
        }
        if (!config_read(c, path, o->assume_llama, &e)) { die("%s", e.text); }
    }
    run_override_fields(c, o);
    // The preset's pattern of layers, over another number of them where that was given.
    for (int l = 0; preset && l < c->num_hidden_layers; l++) {
        c->kq_conv_layer[l] = l >= preset->first_conv && (l - preset->first_conv) % preset->conv_stride == 0;
    }
    const char* attention = o->attention ? o->attention : preset ? "mta" : NULL;  // NULL: as the file has it
    if (attention && !config_set_attention(c, attention, preset && !strcmp(preset->name, "toy"), &e)) {
        die("--%s", e.text);
    }
    if (!config_override(c, o->fields, PART_ATTENTION, &e)) { die("%s", e.text); }
    run_check_convolutions(c, o);
    run_shard_tokenizer(r);
    int shard_vocabulary = r->shard_tokenizer.vocab_size;
    const char* from = r->resume_dir[0] ? r->resume_dir : r->init_dir;
    if (from[0]) { path_join(path, sizeof path, from, "config.json"); }
    run_open_tokenizer(r, (from[0] || !preset) && file_exists(path) ? path : "");
    int needed = r->tokenizer ? tokenizer_vocab(r->tokenizer) : 0;
    if (shard_vocabulary > needed) { needed = shard_vocabulary; }
    if (preset && !options_field_given(o, "vocab_size") && needed > c->vocab_size) { c->vocab_size = needed; }
    if (r->tokenizer && tokenizer_vocab(r->tokenizer) > c->vocab_size) {
        die("%s: %s has %d ids, the model's vocabulary is %d", r->tokenizer_from, tokenizer_file_name(r->tokenizer),
            tokenizer_vocab(r->tokenizer), c->vocab_size);
    }
    bool context_given = options_field_given(o, "max_position_embeddings");
    if (!config_override(c, o->fields, PART_CONTEXT, &e)) { die("%s", e.text); }
    bool whole = o->score || c->max_position_embeddings < 2048;  // --score serves what infer_mta serves
    r->seq_len = o->seq_len ? o->seq_len : whole ? c->max_position_embeddings : 2048;
    Config saved;  // the checkpoint's that is resumed; its context is the run's unless another is given
    if (r->resume_dir[0]) {
        path_join(path, sizeof path, r->resume_dir, "config.json");
        if (!config_read(&saved, path, false, &e)) { die("%s", e.text); }
        r->saved_context = saved.max_position_embeddings;
        if (preset && !context_given) { c->max_position_embeddings = r->saved_context; }
    }
    if (!context_given && ((preset && !r->resume_dir[0]) || r->seq_len > c->max_position_embeddings)) {
        c->max_position_embeddings = r->seq_len;
    }
    if (r->seq_len > c->max_position_embeddings) {
        die("--seq-len: got %d, wanted at most --max-position-embeddings %d", r->seq_len, c->max_position_embeddings);
    }
    run_check_sample_prompt(r);
    if (!preset && base == o->model) { run_say_window(r, c, base); }
    if (r->init_dir[0] && !r->resume_dir[0]) { run_check_init(r, preset != NULL || (o->model && options_evaluate(o))); }
    r->schedule.lr = o->lr >= 0 ? o->lr : preset ? preset->lr : 1.5e-4;
    if (!config_check(c, &e)) { die("model: %s", e.text); }
    if (r->resume_dir[0] && !config_same_model(c, &saved, &e)) {
        die("--resume: %s is another model: %s", r->resume_dir, e.text);
    }
}

// ---- options into a run

// Tokens of all windows of --train.
static inline double run_epoch_tokens(const Run* r) {
    Loader l;
    Error e = {{0}};
    if (!r->options->train) { die("--epochs: wanted --train beside it, whose tokens it counts"); }
    if (!loader_open(&l, r->options->train, r->seq_len, r->config.vocab_size, 0, &e)) { die("--train: %s", e.text); }
    double tokens = (double)loader_windows(&l) * r->seq_len;
    loader_close(&l);
    return tokens;
}

// Reads what the trainer.json of the checkpoint that is resumed says of the run's length. Returns its steps, -1 = none
// said; puts those that are done, and their tokens, into *r, and how many checkpoints are kept unless --keep says so.
static inline int64_t run_read_length(Run* r) {
    char path[PATH_SIZE];
    int64_t steps = -1;
    path_join(path, sizeof path, r->resume_dir, "trainer.json");
    Json* j = r->resume_dir[0] ? json_read(path, TRAINER_MAX_BYTES, NULL) : NULL;
    json_integer(json_get(j, "steps"), 0, INT64_MAX, &steps);
    json_integer(json_get(j, "step"), 0, INT64_MAX, &r->done_steps);
    json_integer(json_get(j, "tokens_seen"), 0, INT64_MAX, &r->done_tokens);
    r->keep = 2;
    json_integer(json_get(j, "keep"), 0, INT32_MAX, &r->keep);
    if (r->options->keep >= 0) { r->keep = r->options->keep; }
    json_free(j);
    return steps;
}

// Tokens of the whole run: steps that are done may have had more of them or fewer than those that follow.
static inline double run_tokens(const Run* r) {
    int64_t left = r->steps > r->done_steps ? r->steps - r->done_steps : 0;
    return (double)r->done_tokens + (double)left * (double)r->tokens_per_step;
}

// How long the run is: --steps, --tokens or --epochs, the last two rounded up to whole steps; two that differ are
// refused.
static inline void run_settle_length(Run* r) {
    const TrainOptions* o = r->options;
    double step = (double)r->tokens_per_step, epoch = o->epochs > 0 ? run_epoch_tokens(r) : 0;
    int64_t saved = run_read_length(r);
    const struct {
        const char* option;
        double given, tokens;
    } lengths[] = {{"--tokens", o->tokens, o->tokens}, {"--epochs", o->epochs, o->epochs * epoch}};
    const char* by = "--steps";
    r->steps = o->steps;
    for (int i = 0; i < 2; i++) {
        if (!(lengths[i].given > 0)) { continue; }
        double exact = fmax(0, (double)r->done_steps + (lengths[i].tokens - (double)r->done_tokens) / step);
        int64_t steps = (int64_t)ceil(exact * (1 - 1e-12));  // 0.1 of 30 steps are 3, whatever the last bit says
        if (r->steps >= 0 && steps != r->steps) {
            die("%s %.15g is %lld steps of %lld tokens, %s says %lld; give one of them", lengths[i].option,
                lengths[i].given, (long long)steps, (long long)r->tokens_per_step, by, (long long)r->steps);
        }
        r->steps = steps;
        by = lengths[i].option;
        char epochs[64] = "";
        if (i) { snprintf(epochs, sizeof epochs, " of %.15g tokens", epoch); }
        snprintf(r->length, sizeof r->length, " (%s %.15g%s: %.10g steps%s)", by, lengths[i].given, epochs, exact,
                 (double)steps - exact > 1e-6 ? ", rounded up" : "");
    }
    if (r->steps < 0) { r->steps = saved >= 0 ? saved : 1000; }
}

// The sizes of a step, the learning rate, when things are due.
static inline void run_settle_steps(Run* r) {
    const TrainOptions* o = r->options;
    int64_t T = r->seq_len;
    r->tokens_per_step = o->tokens_per_step ? o->tokens_per_step : T * o->batch_size;
    if (r->tokens_per_step % T || r->tokens_per_step / T > (1 << 24)) {
        die("--tokens-per-step: got %lld, wanted a multiple of --seq-len %lld, at most %d sequences",
            (long long)r->tokens_per_step, (long long)T, 1 << 24);
    }
    r->windows = (int)(r->tokens_per_step / T);
    r->batch_size = o->batch_size < r->windows ? o->batch_size : r->windows;
    int heads = r->config.num_attention_heads, most = INT32_MAX / heads;  // tokens x heads are counted in int
    if (T * r->batch_size > INT32_MAX) {
        die("--batch-size: %d sequences of %lld are %lld tokens at once, wanted at most %d", r->batch_size,
            (long long)T, (long long)T * r->batch_size, INT32_MAX);
    }
    if (T * r->batch_size > most) {
        die("--batch-size: %d sequences of %lld are %lld tokens at once, wanted at most %d with %d heads",
            r->batch_size, (long long)T, (long long)T * r->batch_size, most, heads);
    }
    if (!options_evaluate(o)) { run_settle_length(r); }
    Schedule schedule = {o->schedule, r->schedule.lr, o->min_lr, o->warmup,
                         o->schedule_steps ? o->schedule_steps : r->steps};
    r->schedule = schedule;
    bool constant = !strcmp(o->schedule, "constant");
    if (constant && o->min_lr > 0) { printf("--schedule constant: --min-lr does nothing\n"); }
    if (constant && o->schedule_steps) { printf("--schedule constant: --schedule-steps does nothing\n"); }
    if (strcmp(o->recompute, "none") && !strncmp(r->trainer->name, "cpu", 3) && !options_evaluate(o)) {
        printf("--recompute: it does nothing on the CPU, which keeps no more than its backward pass needs\n");
    }
    if (!o->cuda_graphs && !strncmp(r->trainer->name, "cpu", 3)) {
        printf("--cuda-graphs: it does nothing on the CPU\n");
    }
    if (o->min_lr > schedule.lr) { die("--min-lr: got %g, wanted at most --lr %g", o->min_lr, schedule.lr); }
    r->eval_every = o->eval_every >= 0 ? o->eval_every : r->steps >= 10 ? r->steps / 10 : 1;
}

// The run's directory.
static inline const char* run_out(const Run* r) { return r->moved[0] ? r->moved : r->options->out; }

// Keeps other programs out of the run, where its log is. A file system without locks is no reason not to run.
static inline void run_lock(Run* r, bool create) {
    char path[PATH_SIZE];
    path_join(path, sizeof path, run_out(r), "log.jsonl");
    int fd = r->lock < 0 ? open(path, O_WRONLY | O_APPEND | O_NONBLOCK | O_CLOEXEC | (create ? O_CREAT : 0), 0644) : -1;
    if (fd < 0) { return; }  // no log yet: a new run's comes into being once; what else is wrong, runlog_open says
    // GPFS keeps a flock within the host, but not a lock of all bytes; what does not offer that one has the first.
    struct flock all;
    memset(&all, 0, sizeof all);
    all.l_type = F_WRLCK, all.l_whence = SEEK_SET;
    bool locked = flock(fd, LOCK_EX | LOCK_NB) == 0, taken = !locked && errno == EWOULDBLOCK;
    if (locked && fcntl(fd, F_OFD_SETLK, &all)) { taken = errno == EAGAIN || errno == EACCES; }
    if (locked && !taken) {
        r->lock = fd;
        return;
    }
    if (taken) {
        die("--out: %s is in use by another run; wanted that one to end first, or another directory", run_out(r));
    }
    printf("no lock on %s (%s): two runs at once there would spoil it\n", path, strerror(errno));
    close(fd);
}

// Does the log say that a checkpoint was saved? Then one must be there.
static inline bool run_log_says_saved(const char* out) {
    char path[PATH_SIZE], *text = NULL;
    size_t n = 0;
    path_join(path, sizeof path, out, "log.jsonl");
    bool saved =
        file_exists(path) && read_file(path, (size_t)1 << 40, &text, &n, NULL) && strstr(text, "{\"event\": \"save\"");
    free(text);
    return saved;
}

// --resume: the newest good checkpoint. Where there are checkpoints and none is good, or where they are gone, nothing
// is touched.
static inline void run_find_checkpoint(Run* r) {
    const char* out = r->options->out;
    if (!r->options->dry_run) { run_lock(r, false); }
    r->saved_step = checkpoint_newest(out, r->resume_dir, &r->passed_over);
    if (r->saved_step >= 0) { return; }
    r->resume_dir[0] = 0;
    if (r->passed_over.n) {
        die("--resume: no checkpoint in %s is good; all is left as it is, --out with another directory starts anew",
            out);
    }
    if (run_log_says_saved(out)) {
        die("--resume: %s holds no checkpoint, but its log.jsonl says that one was saved; all is left as it is, --out "
            "with another directory starts anew",
            out);
    }
}

// --score: standard output is for the answers alone, all else that is printed goes to standard error until
// run_return_output.
static inline void run_divert_output(Run* r) {
    r->answers = fcntl(1, F_DUPFD_CLOEXEC, 3);
    if (r->answers < 0 || dup2(2, 1) < 0) { die("standard output: %s", strerror(errno)); }
}
static inline void run_return_output(Run* r) {
    if (fflush(stdout) || dup2(r->answers, 1) < 0) { die("standard output: %s", strerror(errno)); }
    close(r->answers);
}

// What the products multiply.
static inline const char* run_matmul(const Run* r) { return r->trainer->exact ? "fp32" : "bf16"; }

// The checkpoint that rank 0 has found, to all. The tensors are read by rank 0 alone.
static inline void run_share_checkpoint(Run* r) {
    if (ranks_alone(r->ranks)) { return; }
    ranks_meet(r->ranks, false, 0);
    ranks_from_root(r->ranks, &r->saved_step, sizeof r->saved_step);
    ranks_from_root(r->ranks, r->resume_dir, sizeof r->resume_dir);
    if (r->resume_dir[0] && !dir_exists(r->resume_dir)) {
        die("--resume: %s is not there; wanted --out on a file system that all ranks see", r->resume_dir);
    }
}

// The shards that the checkpoint's trainer.json names: one where it names none, as before there were any.
static inline int run_saved_shards(const char* dir) {
    char path[PATH_SIZE];
    Error e = {{0}};
    int64_t shards = 1;
    path_join(path, sizeof path, dir, "trainer.json");
    Json* j = json_read(path, TRAINER_MAX_BYTES, &e);
    if (!j) { die("--resume: %s", e.text); }
    const Json* value = json_get(j, "shards");
    if (value && !json_integer(value, 1, MAX_RANKS, &shards)) {
        die("--resume: %s: shards: wanted a number from 1 to %d", path, MAX_RANKS);
    }
    json_free(j);
    return (int)shards;
}

// Ranks that the run has or, in a dry run, would have.
static inline int run_ranks(const Run* r) { return r->options->n_ranks ? r->options->n_ranks : r->ranks->size; }

// --shards, else those of the checkpoint, else one for each rank.
static inline void run_settle_shards(Run* r) {
    const TrainOptions* o = r->options;
    int ranks = run_ranks(r), n = 0;
    r->shards = o->shards ? o->shards : r->resume_dir[0] ? run_saved_shards(r->resume_dir) : ranks;
    if (options_evaluate(o)) { r->shards = 1; }
    if ((r->shards > 1 || ranks > 1) && !r->trainer->share) {
        die("--shards: got %d on %d ranks, this trainer has one shard on one process so far", r->shards, ranks);
    }
    if (r->shards > r->windows) {
        const char* from = o->shards ? "" : r->resume_dir[0] ? ", as the checkpoint has it" : ", one for each rank";
        die("--shards: got %d%s, a step has %d sequences", r->shards, from, r->windows);
    }
    if (options_evaluate(o) || shards_divide(r->shards, ranks)) { return; }
    Text can = {NULL, 0, 0};
    for (int i = 1; i <= r->shards; i++) {
        if (shards_divide(r->shards, i)) { text_printf(&can, "%s%d", n++ ? ", " : "", i); }
    }
    die("%d shard%s cannot be divided over %d ranks, only over %s; --shards %d goes on with other rounding", r->shards,
        r->shards > 1 ? "s" : "", ranks, can.text, ranks);
}

// Finds the checkpoint to continue, settles the model and the steps. Ends the program on a mistake.
static inline void run_settle(Run* r, const Trainer* trainer, const TrainOptions* o) {
    memset(r, 0, sizeof *r);
    r->trainer = trainer;
    r->options = o;
    r->ranks = o->ranks;
    r->saved_step = r->timed_step = -1;
    r->lock = -1;
    r->log.fd = -1;
    if (o->matmul && strcmp(o->matmul, run_matmul(r)) != 0) {
        die("--matmul: got %s, this build's products are in %s", o->matmul, run_matmul(r));
    }
    if (o->score && ranks_lead(r->ranks)) { run_divert_output(r); }
    if (o->out && ranks_lead(r->ranks)) {
        char state[PATH_SIZE];
        path_join(state, sizeof state, o->out, "trainer.json");
        if (!run_holds_run(o->out) && file_exists(state)) {  // a run would begin inside of it, also with --resume
            die("--out: %s is a checkpoint, wanted the directory of a run", o->out);
        }
        if (!o->resume && !o->dry_run && run_holds_run(o->out)) {
            die("--out: %s holds a run; %schoose another directory", o->out,
                options_evaluate(o) ? "" : "--resume continues it, or ");
        }
        if (!o->resume && !o->dry_run) { checkpoint_say_strange(o->out); }
        if (o->resume) { run_find_checkpoint(r); }
    }
    if (o->resume) { run_share_checkpoint(r); }
    run_configure(r);
    run_settle_steps(r);
    run_settle_shards(r);
    r->progress = progress_make(stdout);
}

// ---- opening: data, directory, log

// Checks the shards of --train or a set of --val (`option`, as it is named in messages); says what is odd, a line each.
// missing: also which shards are not there.
static inline void run_verify_data(const Run* r, const Loader* l, const char* option, bool missing) {
    Error e = {{0}};
    Text said = {NULL, 0, 0};
    char* rest = NULL;
    double start = seconds_now(), bytes = 0;
    bool good = loader_verify(l, missing, r->options->verify_data, &said, &e);
    for (char* line = said.n ? strtok_r(said.text, "\n", &rest) : NULL; line; line = strtok_r(NULL, "\n", &rest)) {
        printf("%s: %s\n", option, line);
    }
    text_free(&said);
    if (!good) { die("%s: %s", option, e.text); }
    if (!r->options->verify_data) { return; }
    for (int i = 0; loader_shard(l, i); i++) { bytes += (double)loader_shard(l, i)->file.size; }
    printf("%s: checksums of %.1f MiB compared in %.1f s\n", option, bytes / 1048576, seconds_now() - start);
}

// A line where a set of --val holds a shard of `other`, which is trained on or another set.
static inline void run_say_overlap(const ValSet* v, const Loader* other, const char* use) {
    const Shard *a, *b;
    for (int i = 0; (a = loader_shard(&v->loader, i)) != NULL; i++) {
        for (int j = 0; (b = loader_shard(other, j)) != NULL; j++) {
            if (!shards_same_file(a, b) && !shards_same_tokens(a, b)) { continue; }
            bool same = !strcmp(a->path, b->path);
            printf("--val: %s: %s is also %s%s%s\n", v->name, a->path, use, same ? "" : ", as ", same ? "" : b->path);
            return;
        }
    }
}

// One set of --val: the files of a glob that belong to `set` (NULL = all), called `name` (NULL = after the glob).
// first: no other set of this glob came before.
static inline void run_open_val_set(Run* r, const char* glob, const char* set, const char* name, bool first) {
    Error e = {{0}};
    if (r->n_val == MAX_VAL_SETS) { die("--val: more than %d sets", MAX_VAL_SETS); }
    ValSet* v = &r->val[r->n_val++];
    if (!loader_open_mix(&v->loader, glob, set, r->seq_len, r->config.vocab_size, 0, MIX_TOKEN, &e)) {
        die("--val: %s", e.text);
    }
    if (v->loader.sources[0].weighted) {
        die("--val: got \"%s\", wanted no weight: each set has its own figures", glob);
    }
    ShardTokenizer made;
    if (!loader_tokenizer(&v->loader, &made, &e) || !loader_bytes_per_token(&v->loader, &v->bytes_per_token, &e) ||
        (r->shard_tokenizer.shard[0] && !shard_tokenizers_agree(&made, &r->shard_tokenizer, &e))) {
        die("--val: %s", e.text);
    }
    if (r->tokenizer) { run_check_tokenizer(r, &made); }
    if (!r->options->train) { run_say_taken(r, &made); }
    v->masked = loader_masked(&v->loader);
    if (!name) { name = v->loader.sources[0].name; }
    if (strlen(name) >= SET_NAME) {
        die("--val: the name %s has %zu bytes, wanted at most %d", name, strlen(name), SET_NAME - 1);
    }
    memcpy(v->name, name, strlen(name) + 1);
    run_verify_data(r, &v->loader, "--val", first);
    run_say_overlap(v, &r->train, "trained on");
    for (ValSet* w = r->val; w < v; w++) {
        run_say_overlap(v, &w->loader, "in another set");
        if (!strcmp(w->name, v->name)) { die("--val: two sets are called %s; NAME=GLOB gives another name", v->name); }
    }
}

// --val [NAME=]GLOB,...: with NAME one set; without, one for each name before _val_ among the glob's files.
static inline void run_open_val(Run* r) {
    const TrainOptions* o = r->options;
    char sets[MAX_VAL_SETS][SET_NAME];
    if (!o->val) { return; }
    char* copy = copy_or_die(o->val);
    for (char* rest = copy; rest;) {
        char* part = spec_part(&rest);
        char* equals = part + strcspn(part, "=/*?[");  // of a NAME; a folder may be called "lr=3"
        if (*equals != '=') { equals = NULL; }
        char* glob = equals ? equals + 1 : part;
        if (equals) { *equals = 0; }
        if (equals == part || !*glob) { die("--val: got \"%s\", wanted [NAME=]GLOB,...", o->val); }
        int n = equals ? 0 : pattern_sets(glob, sets, MAX_VAL_SETS);
        if (n > MAX_VAL_SETS) { die("--val: %s has files of %d sets, wanted at most %d", glob, n, MAX_VAL_SETS); }
        for (int i = 0; i < n; i++) { run_open_val_set(r, glob, sets[i], sets[i], i == 0); }
        if (!n) { run_open_val_set(r, glob, NULL, equals ? part : NULL, true); }
    }
    free(copy);
}

// Bytes of a checkpoint's tensors: the weights as they are stored, m, v, and master weights where those are rounded.
static inline double run_checkpoint_bytes(const Run* r, const TensorList* list) {
    return (double)list->parameters * (r->trainer->rounded ? 2 + 3 * 4 : 3 * 4);
}

// Refuses a directory that cannot be written or has no room for one checkpoint.
static inline void run_check_directory(const Run* r) {
    Error e = {{0}};
    struct statvfs fs;
    char path[PATH_SIZE];
    TensorList list;
    if (!checkpoint_run_fits(r->options->out, &e) || !make_dirs(r->options->out, &e)) { die("--out: %s", e.text); }
    path_join(path, sizeof path, r->options->out, ".writable");
    if (!write_file_synced(path, "1", 1, &e)) { die("--out: %s", e.text); }
    unlink(path);
    tensor_list(&list, &r->config);
    double needed = run_checkpoint_bytes(r, &list) + (1 << 20);
    tensor_list_free(&list);
    if (!statvfs(r->options->out, &fs) && fs.f_blocks > 0 && (double)fs.f_bavail * (double)fs.f_frsize < needed) {
        die("--out: %s has %.0f MiB free, one checkpoint needs %.0f", r->options->out,
            (double)fs.f_bavail * (double)fs.f_frsize / 1048576, needed / 1048576);
    }
}

static inline bool run_read_state(Run* r, Error* e);

// A line for each source of --train that the run takes more than once.
static inline void run_say_repeated(const Run* r) {
    double windows = run_tokens(r) / r->seq_len;
    for (int i = 0; i < r->train.n_sources; i++) {
        const LoaderSource* s = &r->train.sources[i];
        double times = windows * s->share / (double)s->windows;
        char count[32];
        if (times < 1.01) { continue; }  // --epochs 1 is rounded up to whole steps
        printf("--train: %s: the run takes each of its %s tokens %.3g times\n", s->pattern,
               format_count((double)s->windows * r->seq_len, count, sizeof count), times);
    }
}

// The data, and room for a step of it, which a dry run does without. Ends the program on a mistake; nothing is written
// yet.
static inline void run_open_data(Run* r) {
    const TrainOptions* o = r->options;
    Error e = {{0}};
    LoaderMix mix = strcmp(o->mix, "document") ? MIX_TOKEN : MIX_DOCUMENT;
    if (o->train &&
        !loader_open_mix(&r->train, o->train, NULL, r->seq_len, r->config.vocab_size, (uint64_t)o->seed, mix, &e)) {
        die("--train: %s", e.text);
    }
    if (o->train) { run_verify_data(r, &r->train, "--train", true); }
    for (int i = 0; i < r->train.n_sources && r->train.n_sources > 1; i++) {
        if (!r->train.sources[i].weighted) {
            printf("--train: no weight for %s, taken as 1\n", r->train.sources[i].name);
        }
    }
    if (!options_evaluate(o)) { run_say_repeated(r); }
    run_open_val(r);
    if (o->dry_run) {
        put_out("", 0, true);  // what is said of the data is part of the plan
        return;
    }
    size_t n = (size_t)r->windows * (size_t)r->seq_len;
    r->tokens = (int32_t*)alloc_or_die(n, sizeof(int32_t), "a step's tokens");
    r->targets = (int32_t*)alloc_or_die(n, sizeof(int32_t), "a step's targets");
    r->slow = -1;
    r->rank_seconds = (double*)alloc_or_die((size_t)r->ranks->size, sizeof(double), "seconds of ranks");
    r->losses = (double*)alloc_or_die((size_t)r->shards, sizeof(double), "losses of shards");
}

// What a loader's shards are: by their sizes and headers, which hold the tokens' CRC-32, and what no header covers by
// its sample.
static inline uint64_t run_hash_data(const Loader* l, uint64_t hash) {
    for (int i = 0; i < l->n_sources; i++) {
        const LoaderSource* s = &l->sources[i];
        hash = hash * 1000003 + s->sample;
        for (int j = 0; j < s->n_shards; j++) {
            const MappedFile* f = &s->shards[j].file;
            hash = hash * 1000003 + ranks_hash((const char*)f->data, SHARD_HEADER_BYTES) + f->size;
        }
    }
    return hash;
}

// All ranks have the same program and arguments, and so will send each other the same messages.
static inline void run_meet_first(const TrainOptions* o) {
    Text arguments = {NULL, 0, 0};
    char* program = NULL;
    size_t n = 0;
    Error e = {{0}};
    if (ranks_alone(o->ranks)) { return; }
    for (int i = 1; i < o->argc; i++) { text_printf(&arguments, "%s\n", o->argv[i]); }
    if (!read_file("/proc/self/exe", (size_t)1 << 32, &program, &n, &e)) { die("%s", e.text); }
    const RanksSame same[] = {{"another program file", ranks_hash(program, n)},
                              {"other arguments", ranks_hash(arguments.text, arguments.n)}};
    free(program);
    text_free(&arguments);
    ranks_meet(o->ranks, false, 0);
    ranks_same(o->ranks, same, (int)(sizeof same / sizeof same[0]));
}

// trainer.json of the checkpoint that is resumed, which every rank reads: in a directory that only looks the same it is
// another one's. 0: none.
static inline uint64_t run_hash_state(const Run* r) {
    char path[PATH_SIZE], *text = NULL;
    size_t n = 0;
    Error e = {{0}};
    if (!r->resume_dir[0]) { return 0; }
    path_join(path, sizeof path, r->resume_dir, "trainer.json");
    if (!read_file(path, TRAINER_MAX_BYTES, &text, &n, &e)) { die("--resume: %s", e.text); }
    uint64_t hash = ranks_hash(text, n);
    free(text);
    return hash;
}

// All ranks have the same model, checkpoint and data, and none has found a mistake so far.
static inline void run_meet(Run* r) {
    if (ranks_alone(r->ranks)) { return; }
    Text config = {NULL, 0, 0};
    config_to_json(&r->config, "", &config);
    uint64_t data = run_hash_data(&r->train, 1);
    for (int i = 0; i < r->n_val; i++) { data = run_hash_data(&r->val[i].loader, data); }
    const RanksSame same[] = {{"another config.json or tokenizer", ranks_hash(config.text, config.n)},
                              {"another trainer.json in the checkpoint of --resume", run_hash_state(r)},
                              {"other shards for --train or --val", data}};
    text_free(&config);
    ranks_meet(r->ranks, false, 0);
    ranks_same(r->ranks, same, (int)(sizeof same / sizeof same[0]));
    ranks_limit(r->ranks, r->options->rank_timeout);
    ranks_saved(r->ranks, r->resume_dir);
}

// --eval-only and --score: the directory if there is to be one, and the step that the checkpoint's trainer.json says.
static inline void run_open_evaluation(Run* r) {
    char path[PATH_SIZE];
    Error e = {{0}};
    if (r->options->out && ranks_lead(r->ranks) && !make_dirs(r->options->out, &e)) { die("--out: %s", e.text); }
    path_join(path, sizeof path, r->init_dir, "trainer.json");
    if (!file_exists(path)) { return; }
    Json* j = json_read(path, TRAINER_MAX_BYTES, &e);
    if (j && !json_integer(json_get(j, "step"), 0, INT64_MAX, &r->step)) { fail(&e, "%s: step is missing", path); }
    if (e.text[0]) { die("--init-from: %s", e.text); }
    json_free(j);
}

// The run directory, signals; reads trainer.json of the checkpoint that is resumed. Ends the program on any mistake.
static inline void run_open_directory(Run* r) {
    if (ranks_lead(r->ranks)) { run_check_directory(r); }
    Error e = {{0}};
    if (r->resume_dir[0] && !run_read_state(r, &e)) { die("%s", e.text); }
    loader_state_write(&r->train, &r->loader_state);
    r->first_step = r->step;
    run_catch_signals(r->ranks);
}

// ---- trainer.json

// What the trainer writes into model.safetensors, for config.json.
static inline const char* run_torch_dtype(const Run* r) { return r->trainer->rounded ? "bfloat16" : "float32"; }

// What changes the numbers of a run, or what is left of it, and may be given otherwise on --resume. trainer.json keeps
// each under its key.
typedef struct {
    const char* key;
    double number;
    const char* word;  // NULL: a number
} RunSetting;

enum { MAX_RUN_SETTINGS = 22 };

// One number for the shards of all sets of --val: of their checksums and of what these do not cover; 0: no set.
static inline uint32_t run_val_checksum(const Run* r) {
    uint32_t crc = 0;
    for (int i = 0; i < r->n_val; i++) {
        const LoaderSource* s = r->val[i].loader.sources;
        const uint32_t of_set[2] = {source_checksum(s), s->sample};
        crc = crc32_update(crc, of_set, sizeof of_set);
    }
    return crc;
}

// The settings as they hold now into s (MAX_RUN_SETTINGS); how many.
static inline int run_settings(const Run* r, RunSetting* s) {
    const TrainOptions* o = r->options;
    const RunSetting all[] = {{"steps", (double)r->steps, NULL},
                              {"tokens_per_step", (double)r->tokens_per_step, NULL},
                              {"batch_size", (double)r->batch_size, NULL},
                              {"shards", (double)r->shards, NULL},
                              {"lr", r->schedule.lr, NULL},
                              {"min_lr", r->schedule.min_lr, NULL},
                              {"schedule", 0, r->schedule.kind},
                              {"schedule_steps", (double)o->schedule_steps, NULL},
                              {"warmup", (double)r->schedule.warmup, NULL},
                              {"beta1", o->beta1, NULL},
                              {"beta2", o->beta2, NULL},
                              {"eps", o->eps, NULL},
                              {"weight_decay", o->weight_decay, NULL},
                              {"grad_clip", o->grad_clip, NULL},
                              {"matmul", 0, run_matmul(r)},
                              {"attention_kernels", 0, o->attention_kernels},
                              {"reduce", 0, o->reduce},
                              {"val", 0, o->val ? o->val : ""},
                              {"val_crc32", (double)run_val_checksum(r), NULL},
                              {"eval_windows", (double)o->eval_windows, NULL},
                              {"keep", (double)r->keep, NULL},
                              {"program", 0, program_invocation_short_name}};
    int n = (int)(sizeof all / sizeof all[0]);
    assert(n <= MAX_RUN_SETTINGS);
    memcpy(s, all, sizeof all);
    return n;
}

static inline void run_state_json(const Run* r, Text* t) {
    RunSetting settings[MAX_RUN_SETTINGS];
    text_printf(t, "{\n  \"format\": 1,\n  \"step\": %lld,\n  \"tokens_seen\": %lld,\n  \"skipped\": %lld,\n",
                (long long)r->step, (long long)r->tokens_seen, (long long)r->skipped);
    for (int i = 0, n = run_settings(r, settings); i < n; i++) {
        const RunSetting* s = &settings[i];
        text_printf(t, "  \"%s\": ", s->key);
        if (s->word) {
            text_json_string(t, s->word, strlen(s->word));
        } else {
            text_json_number(t, s->number);
        }
        text_append(t, ",\n", 2);
    }
    if (r->skipped_in_a_row) { text_printf(t, "  \"skipped_in_a_row\": %d,\n", r->skipped_in_a_row); }
    text_printf(t, "%s%s%s%s", r->timed ? "  \"timed\": true,\n" : "", r->evaluated ? "  \"evaluated\": true,\n" : "",
                r->to_evaluate ? "  \"evaluation_left\": true,\n" : "",
                r->to_sample ? "  \"sample_left\": true,\n" : "");
    text_printf(t, "  \"random\": {\"seed\": %lld, \"step\": %lld},\n  \"loader\": ", (long long)r->options->seed,
                (long long)r->step);
    text_append(t, r->loader_state.text, r->loader_state.n);
    text_printf(t, ",\n  \"version\": \"" MTA_VERSION "\",\n  \"compiler\": ");
    text_json_string(t, __VERSION__, strlen(__VERSION__));
    text_printf(t, ",\n  \"arguments\": [");
    for (int i = 1; i < r->options->argc; i++) {
        if (i > 1) { text_append(t, ", ", 2); }
        text_json_string(t, r->options->argv[i], strlen(r->options->argv[i]));
    }
    text_printf(t, "]\n}\n");
}

// "lr 0.001 -> 0.002" into *change where the checkpoint's value (NULL: it has none) is another than the run's; else it
// stays empty. Keys are shown as the options are called.
static inline void run_compare_setting(const RunSetting* s, const Json* saved, Text* change) {
    bool same = s->word ? saved && saved->type == JSON_STRING && !strcmp(saved->string, s->word)
                        : saved && saved->type == JSON_NUMBER && saved->number == s->number;
    bool unsaid = !saved && ((!strcmp(s->key, "shards") && s->number == 1) ||  // before there were any, there was one
                             !strcmp(s->key, "val_crc32") || !strcmp(s->key, "keep") ||
                             (!strcmp(s->key, "reduce") && !strcmp(s->word, "tree")) ||
                             (!strcmp(s->key, "attention_kernels") && !strcmp(s->word, "own")));
    if (same || unsaid) { return; }
    text_printf(change, "%s ", s->key);
    for (char* c = change->text; *c; c++) { *c = *c == '_' ? '-' : *c; }
    if (!saved) {
        text_printf(change, "(the checkpoint does not say)");
    } else if (saved->type == JSON_STRING) {
        text_printf(change, "%s", saved->string[0] ? saved->string : "none");
    } else {
        text_json_number(change, saved->number);
    }
    text_append(change, " -> ", 4);
    if (s->word) {
        text_printf(change, "%s", s->word[0] ? s->word : "none");
    } else {
        text_json_number(change, s->number);
    }
}

// Prints what is not as it was when the checkpoint was saved, and keeps it for the log. Frees the text; none: all is.
static inline void run_say_change(Run* r, Text* change) {
    if (!change->n) { return; }
    make_one_line(change->text);
    printf("changed on --resume: %s\n", change->text);
    text_printf(&r->changes, "%s", r->changes.n ? ", " : "");
    text_json_string(&r->changes, change->text, strlen(change->text));
    text_free(change);
}

// What is not as it was when the checkpoint was saved, and changes the numbers that follow, or what the model says of
// itself.
static inline void run_say_changes(Run* r, const Json* saved) {
    RunSetting settings[MAX_RUN_SETTINGS];
    Text context = {NULL, 0, 0};
    if (r->step > r->steps) {
        printf("--steps %lld%s: the checkpoint has %lld already\n", (long long)r->steps, r->length, (long long)r->step);
    }
    for (int i = 0, n = run_settings(r, settings); i < n; i++) {
        Text change = {NULL, 0, 0};
        run_compare_setting(&settings[i], json_get(saved, settings[i].key), &change);
        run_say_change(r, &change);
    }
    if (r->config.max_position_embeddings != r->saved_context) {
        text_printf(&context, "max-position-embeddings %d -> %d", r->saved_context, r->config.max_position_embeddings);
    }
    run_say_change(r, &context);
}

static inline bool run_state_says(const Json* j, const char* key) {
    const Json* value = json_get(j, key);
    return value && value->type == JSON_BOOL && value->boolean;
}

// What trainer.json says of step, tokens, skipped updates, the loader and what a signal has left to do.
static inline bool run_take_state(Run* r, const Json* j, const char* path, Error* e) {
    if (!json_integer(json_get(j, "step"), 0, INT64_MAX, &r->step) ||
        !json_integer(json_get(j, "tokens_seen"), 0, INT64_MAX, &r->tokens_seen) ||
        !json_integer(json_get(j, "skipped"), 0, INT64_MAX, &r->skipped)) {
        return fail(e, "%s: step, tokens_seen or skipped is missing", path);
    }
    int64_t format = 0;
    if (!json_integer(json_get(j, "format"), 1, 1, &format)) {
        return fail(e, "%s: its format is not the one that this version writes, 1; wanted the version that saved it",
                    path);
    }
    if (r->skipped > r->step) {
        return fail(e, "%s: skipped %lld, wanted at most step, %lld", path, (long long)r->skipped, (long long)r->step);
    }
    if (r->step != r->saved_step) {
        return fail(e, "%s: step %lld, wanted %lld as the directory's name says", path, (long long)r->step,
                    (long long)r->saved_step);
    }
    const Json* in_a_row = json_get(j, "skipped_in_a_row");
    int64_t skipped = 0;
    if (in_a_row && !json_integer(in_a_row, 0, MAX_SKIPPED_IN_A_ROW - 1, &skipped)) {
        return fail(e, "%s: skipped_in_a_row: wanted a number below %d", path, MAX_SKIPPED_IN_A_ROW);
    }
    r->skipped_in_a_row = (int)skipped;
    if (!loader_state_read(&r->train, json_get(j, "loader"), e)) { return false; }
    run_say_changes(r, j);
    if (run_state_says(j, "timed")) { r->timed_step = r->step; }
    r->evaluated = run_state_says(j, "evaluated");
    // A run that --steps ends at a checkpoint which was not its last lacks the evaluation of the last step.
    int64_t steps = 0;
    bool ends = json_integer(json_get(j, "steps"), 0, INT64_MAX, &steps) && steps > r->step && r->step == r->steps;
    r->to_evaluate = (ends && !r->evaluated) || run_state_says(j, "evaluation_left");
    r->to_sample = run_state_says(j, "sample_left");
    return true;
}

// trainer.json of the checkpoint that is resumed.
static inline bool run_read_state(Run* r, Error* e) {
    char path[PATH_SIZE];
    path_join(path, sizeof path, r->resume_dir, "trainer.json");
    Json* j = json_read(path, TRAINER_MAX_BYTES, e);
    bool good = j && run_take_state(r, j, path, e);
    json_free(j);
    return good;
}

// Ends a line of the log, an object, and writes it.
static inline void run_log_line(Run* r, Text* t) {
    text_append(t, "}", 1);
    runlog_line(&r->log, t->text);
    text_free(t);
}

// ---- one step

// Learning rate of step `step`, counted from 0: linear warmup, then the schedule.
static inline double learning_rate(const Schedule* s, int64_t step) {
    if (step < s->warmup) { return s->lr * (double)(step + 1) / (double)s->warmup; }
    int64_t rest = s->steps - s->warmup;
    double p = rest > 0 ? (double)(step - s->warmup) / (double)rest : 1;  // share of the schedule that is over
    if (p > 1) { p = 1; }
    double share = 1;  // of the way from min_lr up to lr
    if (!strcmp(s->kind, "linear")) { share = 1 - p; }
    if (!strcmp(s->kind, "cosine")) { share = 0.5 * (1 + cos(3.14159265358979323846 * p)); }
    if (!strcmp(s->kind, "wsd")) { share = p < 0.8 ? 1 : (1 - p) / 0.2; }
    return s->min_lr + (s->lr - s->min_lr) * share;
}

// Reads the next step's windows. A bad token ends the program: the checkpoints stay.
static inline Step run_load_step(Run* r) {
    const TrainOptions* o = r->options;
    AdamW hyper = {learning_rate(&r->schedule, r->step), o->beta1, o->beta2, o->eps, o->weight_decay, o->grad_clip};
    int64_t update = r->step + 1 - r->skipped;
    Step s = {r->tokens,  r->targets,
              r->windows, r->batch_size,
              r->seq_len, 0,
              update,     hyper,
              r->shards,  ranks_own(r->ranks, (size_t)r->shards),
              r->losses,  !ranks_alone(r->ranks)};
    Error e = {{0}};
    size_t T = (size_t)r->seq_len, V = (size_t)r->shards, windows = (size_t)r->windows;
    size_t begin = windows * s.own.begin / V, end = windows * s.own.end / V;  // what this process computes
    for (size_t w = 0; w < windows; w++) {
        bool mine = w >= begin && w < end;
        if (!mine) {
            loader_skip(&r->train, 1);
        } else if (!loader_next(&r->train, r->tokens + w * T, r->targets + w * T, &e)) {
            die("--train: %s", e.text);
        }
    }
    for (size_t i = begin * T; i < end * T; i++) { s.counted += r->targets[i] >= 0; }
    r->computed += (int64_t)(end - begin);
    s.counted = ranks_total(r->ranks, s.counted);
    return s;
}

// The peak that MFU is of, where the trainer measures it: its best product so far. Measured again after 10, 20, 40, ...
// seconds of training, since other programs may have been in the way at the start; a short run is not made longer.
static inline void run_measure(Run* r) {
    if (!r->measure || r->training_seconds < fmax(10, r->measure_after)) { return; }
    double now = r->measure(!r->trainer->exact);
    if (now > r->flops_per_second) { r->flops_per_second = now; }
    r->measure_after = 2 * r->training_seconds;
}

// Counts a finished step of so many seconds, writes its log line, shows progress.
static inline void run_log_step(Run* r, const StepResult* s, const Step* step, double seconds) {
    char line[512], eta[32], rate_text[32], mfu_text[32] = "";  // "": the peak is not known
    int64_t tokens = r->tokens_per_step;
    bool skipped = !isfinite(s->loss) || !isfinite(s->grad_norm);
    double loss = step->counted ? s->loss : NAN, lr = step->hyper.lr;
    r->step++;
    r->evaluated = false;
    r->tokens_seen += tokens;
    r->skipped += skipped;
    r->skipped_in_a_row = skipped ? r->skipped_in_a_row + 1 : 0;
    r->training_seconds += seconds;
    r->loader_state.n = 0;
    loader_state_write(&r->train, &r->loader_state);
    double rate = (double)tokens / seconds,
           mfu = r->flops_per_second > 0 ? rate * r->flops_per_token / (r->flops_per_second * r->ranks->size) : 0;
    double average = (double)(r->step - r->first_step) / r->training_seconds;
    Text t = {NULL, 0, 0};
    const struct {
        const char* name;
        double value;
    } fields[] = {{"loss", loss},
                  {"grad_norm", s->grad_norm},
                  {"lr", lr},
                  {"tokens", (double)r->tokens_seen},
                  {"tokens_per_s", rate},
                  {"mfu", mfu},
                  {"skipped", (double)r->skipped}};
    text_printf(&t, "{\"event\": \"step\", \"step\": %lld", (long long)r->step);
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        text_json_field(&t, fields[i].name, fields[i].value);
    }
    if (r->train.n_sources > 1) {
        text_printf(&t, ", \"sources\": {");
        for (int i = 0; i < r->train.n_sources; i++) {
            text_printf(&t, "%s", i ? ", " : "");
            text_json_string(&t, r->train.sources[i].name, strlen(r->train.sources[i].name));
            text_printf(&t, ": %llu", (unsigned long long)r->train.sources[i].drawn * (unsigned long long)r->seq_len);
        }
        text_printf(&t, "}");
    }
    run_log_line(r, &t);
    if (r->flops_per_second > 0) { snprintf(mfu_text, sizeof mfu_text, "  MFU %.1f%%", 100 * mfu); }
    snprintf(line, sizeof line, "step %lld/%lld  loss %.4f  norm %.3f  lr %.2e  %s tokens/s%s  ETA %s%s",
             (long long)r->step, (long long)r->steps, loss, s->grad_norm, lr,
             format_count(rate, rate_text, sizeof rate_text), mfu_text,
             format_duration((double)(r->steps - r->step) / average, eta, sizeof eta),
             skipped          ? "  update skipped: not finite"
             : !step->counted ? "  no target counts"
                              : "");
    progress_line(&r->progress, line,
                  skipped || r->step % r->options->log_every == 0 || r->step == r->steps ||
                      r->step == r->first_step + 1);
}

// Is something due that happens every `every` steps (0 = never)?
static inline bool run_due(const Run* r, int64_t every) { return every > 0 && r->step % every == 0; }

// ---- reports

// A line of the log for each newer checkpoint that was passed over as damaged.
static inline void run_log_passed_over(Run* r) {
    char *rest = NULL, *why = r->passed_over.n ? strtok_r(r->passed_over.text, "\n", &rest) : NULL;
    for (; why; why = strtok_r(NULL, "\n", &rest)) {
        Text t = {NULL, 0, 0};
        text_printf(&t, "{\"event\": \"damaged\", \"step\": %lld, \"reason\": ", (long long)r->step);
        text_json_string(&t, why, strlen(why));
        run_log_line(r, &t);
    }
}

// Where a run was made, and by what.
static inline void run_log_origin(const Run* r, Text* t) {
    char host[256] = "unknown", date[64];
    time_t now = time(NULL);
    struct tm utc;
    gethostname(host, sizeof host - 1);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    const char* const origin[][2] = {{"date", date},           {"host", host},
                                     {"device", r->device},    {"program", program_invocation_short_name},
                                     {"version", MTA_VERSION}, {"commit", mta_commit ? mta_commit() : "unknown"}};
    for (size_t i = 0; i < sizeof origin / sizeof origin[0]; i++) {
        text_printf(t, ", \"%s\": ", origin[i][0]);
        text_json_string(t, origin[i][1], strlen(origin[i][1]));
    }
}

// A hash of the first line of the log in `out`; 0: it has none. It tells the start of a run, to the millisecond.
static inline uint64_t run_log_first(const char* out) {
    char path[PATH_SIZE], *line = NULL;
    size_t room = 0;
    path_join(path, sizeof path, out, "log.jsonl");
    FILE* f = fopen(path, "r");
    ssize_t n = f ? getline(&line, &room, f) : -1;
    uint64_t hash = n > 0 ? ranks_hash(line, (size_t)n) : 0;
    free(line);
    if (f) { fclose(f); }
    return hash;
}

// Is the log that is open the file with these numbers?
static inline bool run_log_is(const Run* r, const struct stat* file) {
    struct stat held;
    return !fstat(r->log.fd, &held) && held.st_dev == file->st_dev && held.st_ino == file->st_ino;
}

// Opens the log; only here, where the model has been read: a run that cannot start leaves none in the way of the next.
static inline void run_log_start(Run* r, size_t parameters) {
    Text t = {NULL, 0, 0}, config = {NULL, 0, 0};
    Error e = {{0}};
    struct stat locked;
    // Of two that found no log, the second must not cut the first one's.
    const char* out = ranks_lead(r->ranks) ? r->options->out : NULL;  // rank 0's alone
    if (out && r->options->resume) {
        run_lock(r, true);
        // What a crash left of an unfinished checkpoint; a run that is at its end saves no more, which would remove
        // it. Only under the lock: before it, that might be the checkpoint which another run is writing.
        checkpoint_remove_partials(out);
    }
    // After a crash the log may have what was left to do: it is done again, and must not stand there twice.
    const char* again = r->to_evaluate && r->n_val ? "val" : r->to_sample && r->tokenizer ? "sample" : NULL;
    if (out && !runlog_open(&r->log, out, r->options->resume ? (long)r->step : -1, again, &e)) {
        die("--out: %s", e.text);
    }
    config_to_json(&r->config, run_torch_dtype(r), &config);
    for (size_t i = 0; i < config.n; i++) {
        if (config.text[i] == '\n') { config.text[i] = ' '; }
    }
    text_printf(&t,
                "{\"event\": \"start\", \"step\": %lld, \"parameters\": %zu, \"tokens_per_step\": %lld, \"seq_len\": "
                "%d, \"flops_per_token\": %.17g, \"flops_per_second\": %.17g, \"ranks\": %d, \"shards\": %d, "
                "\"reduce\": \"%s\"",
                (long long)r->step, parameters, (long long)r->tokens_per_step, r->seq_len, r->flops_per_token,
                r->flops_per_second, r->ranks->size, r->shards, r->options->reduce);
    run_log_origin(r, &t);
    text_printf(&t, ", \"config\": ");
    text_append(&t, config.text, config.n);
    text_printf(&t, ", \"arguments\": [");
    for (int i = 1; i < r->options->argc; i++) {
        if (i > 1) { text_append(&t, ", ", 2); }
        text_json_string(&t, r->options->argv[i], strlen(r->options->argv[i]));
    }
    text_append(&t, "]", 1);
    if (r->changes.n) { text_printf(&t, ", \"changed\": [%s]", r->changes.text); }
    run_log_line(r, &t);
    text_free(&config);
    if (out) {
        if (r->lock >= 0 && !fstat(r->lock, &locked) && !run_log_is(r, &locked)) {  // it was shared by hard links
            close(r->lock);
            r->lock = -1;
        }
        run_lock(r, false);
        r->log_first = run_log_first(out);
    }
    r->started = r->saved_at = seconds_now();
    run_log_passed_over(r);
    if (r->resume_dir[0]) {
        printf("resumed from %s\n", r->resume_dir);
        if (r->options->init_from) { printf("--init-from: not read, the run goes on from its own checkpoint\n"); }
    } else if (r->options->resume) {
        printf("no checkpoint in %s: starting from step 0\n", r->options->out);
    }
    if (!ranks_alone(r->ranks) && !strcmp(r->options->reduce, "nccl")) {
        printf("--reduce nccl: NCCL adds the gradients in its own order, the bits depend on the processes\n");
    }
    fflush(stdout);
}

// Columns of the table of an evaluation: names, bits per byte where some set's are known, errors where some set has a
// mask.
typedef struct {
    int width;
    bool bits, errors;
} ValColumns;

static inline ValColumns run_val_columns(const Run* r) {
    ValColumns columns = {snprintf(NULL, 0, "step %lld", (long long)r->step), false, false};
    for (int i = 0; i < r->n_val; i++) {
        int length = (int)strlen(r->val[i].name);
        columns.width = length > columns.width ? length : columns.width;
        columns.bits = columns.bits || (r->val[i].bytes_per_token > 0 && !r->val[i].masked);
        columns.errors = columns.errors || r->val[i].masked;
    }
    return columns;
}

// The line above the table of several sets; one set is a line that says all.
static inline void run_show_val_head(Run* r) {
    char line[512], step[32];
    ValColumns columns = run_val_columns(r);
    if (r->n_val < 2) { return; }
    snprintf(step, sizeof step, "step %lld", (long long)r->step);
    snprintf(line, sizeof line, "val  %-*s      loss    perplexity%s    tokens%s", columns.width, step,
             columns.bits ? "  bits/byte" : "", columns.errors ? "   error" : "");
    progress_line(&r->progress, line, true);
}

// One row of it. tokens < 0, error < 0, bits NAN: a blank, or - where there might have been a figure.
static inline void run_show_val(Run* r, const char* name, double loss, double perplexity, double bits, int64_t tokens,
                                double error) {
    ValColumns columns = run_val_columns(r);
    char count[32], cell[64];
    Text t = {NULL, 0, 0};
    if (r->n_val < 2) {
        text_printf(&t, "val %s  step %lld  loss %.4f  perplexity %.3f", name, (long long)r->step, loss, perplexity);
        if (columns.bits) { text_printf(&t, "  %.4f bits/byte", bits); }
        if (columns.errors) { text_printf(&t, "  error %.2f%%", 100 * error); }
    } else {
        text_printf(&t, "val  %-*s %9.4f %13.3f", columns.width, name, loss, perplexity);
        snprintf(cell, sizeof cell, "%.4f", bits);
        if (columns.bits) { text_printf(&t, " %10s", isnan(bits) ? "-" : cell); }
        text_printf(&t, " %9s", tokens < 0 ? "" : format_count((double)tokens, count, sizeof count));
        snprintf(cell, sizeof cell, "%.2f%%", 100 * error);
        if (columns.errors) { text_printf(&t, " %7s", error < 0 ? "-" : cell); }
        while (t.n && t.text[t.n - 1] == ' ') { t.text[--t.n] = 0; }
    }
    progress_line(&r->progress, t.text, true);
    text_free(&t);
}

// A line of an evaluation. In training it waits for the others, since --resume does again what a signal has cut off.
static inline void run_log_val_line(Run* r, Text* t) {
    if (options_evaluate(r->options)) {
        run_log_line(r, t);
        return;
    }
    text_append(t, "}\n", 2);
    text_append(&r->val_lines, t->text, t->n);
    text_free(t);
}

// The end of an evaluation; whole: of all sets.
static inline void run_log_val_end(Run* r, bool whole) {
    for (char* line = r->val_lines.text; whole && line && *line;) {
        char* end = strchr(line, '\n');
        *end = 0;
        runlog_line(&r->log, line);
        line = end + 1;
    }
    text_free(&r->val_lines);
}

// One validation set's result: loss over `counted` targets; wrong of the `asked` sequences, those with a counted
// target, where the set has a mask.
static inline void run_log_val(Run* r, ValSet* v, double loss_sum, int64_t counted, int64_t wrong, int64_t asked) {
    Text t = {NULL, 0, 0};
    double error = !v->masked ? -1 : asked ? (double)wrong / (double)asked : NAN;
    v->loss = counted ? loss_sum / (double)counted : NAN;
    v->bits_per_byte = v->bytes_per_token > 0 && !v->masked ? v->loss / M_LN2 / v->bytes_per_token : NAN;
    text_printf(&t, "{\"event\": \"val\", \"step\": %lld, \"name\": ", (long long)r->step);
    text_json_string(&t, v->name, strlen(v->name));
    text_json_field(&t, "loss", v->loss);
    text_json_field(&t, "perplexity", exp(v->loss));
    text_printf(&t, ", \"tokens\": %lld", (long long)counted);
    if (!isnan(v->bits_per_byte)) { text_json_field(&t, "bits_per_byte", v->bits_per_byte); }
    if (v->masked) { text_json_field(&t, "error", error); }
    run_log_val_line(r, &t);
    run_show_val(r, v->name, v->loss, exp(v->loss), v->bits_per_byte, counted, error);
}

// The means over several sets, each of the same weight: the paper's headline is the mean of their perplexities.
static inline void run_log_val_mean(Run* r) {
    double loss = 0, perplexity = 0, bits = 0;
    Text t = {NULL, 0, 0};
    if (r->n_val < 2) { return; }
    for (int i = 0; i < r->n_val; i++) {
        loss += r->val[i].loss / r->n_val;
        perplexity += exp(r->val[i].loss) / r->n_val;
        bits += r->val[i].bits_per_byte / r->n_val;
    }
    text_printf(&t, "{\"event\": \"val_mean\", \"step\": %lld, \"sets\": %d", (long long)r->step, r->n_val);
    text_json_field(&t, "loss", loss);
    text_json_field(&t, "perplexity", perplexity);
    if (!isnan(bits)) { text_json_field(&t, "bits_per_byte", bits); }
    run_log_val_line(r, &t);
    run_show_val(r, "mean", loss, perplexity, bits, -1, -1);
}

static inline void run_log_sample(Run* r, const char* text, size_t n) {
    Text t = {NULL, 0, 0};
    text_printf(&t, "{\"event\": \"sample\", \"step\": %lld, \"text\": ", (long long)r->step);
    text_json_string(&t, text, n);
    run_log_line(r, &t);
    progress_break(&r->progress);
    printf("sample at step %lld: ", (long long)r->step);
    for (size_t i = 0; i < n; i++) {  // what could steer a terminal is shown, not sent
        unsigned char b = (unsigned char)text[i];
        if ((b < 32 && b != '\n' && b != '\t') || b == 127) {
            printf("\\x%02x", b);
        } else {
            putchar(b);
        }
    }
    printf("\n");
    fflush(stdout);
}

// Files of a checkpoint that are not tensors: config.json, the tokenizer's ranks, trainer.json.
static inline bool run_save_texts(const Run* r, CheckpointWriter* w, Error* e) {
    Text config = {NULL, 0, 0}, state = {NULL, 0, 0};
    config_to_json(&r->config, run_torch_dtype(r), &config);
    run_state_json(r, &state);
    bool good = checkpoint_add_text(w, "config.json", config.text, config.n, e) &&
                checkpoint_add_text(w, "trainer.json", state.text, state.n, e);
    if (good && r->tokenizer && tokenizer_file(r->tokenizer)) {
        good = checkpoint_add_text(w, tokenizer_file_name(r->tokenizer), r->rank_file.text, r->rank_file.n, e);
    }
    text_free(&config);
    text_free(&state);
    return good;
}

// After a checkpoint was committed to `path`: removes those that are not to be kept.
static inline void run_saved(Run* r, const char* path, double seconds) {
    char line[PATH_SIZE + 64], old[PATH_SIZE];
    Text t = {NULL, 0, 0};
    r->saved_step = r->step;
    r->saved_at = seconds_now();
    ranks_saved(r->ranks, path);
    if (r->timed_step >= 0 && r->timed_step != r->step) {
        checkpoint_path(run_out(r), (long)r->timed_step, old);
        checkpoint_remove_dir(old);
    }
    r->timed_step = r->timed ? r->step : -1;
    if (!r->timed) { checkpoint_prune(run_out(r), (int)r->keep, (long)r->step); }
    text_printf(&t, "{\"event\": \"save\", \"step\": %lld, \"seconds\": %.3f, %s\"path\": ", (long long)r->step,
                seconds, r->timed ? "\"timed\": true, " : "");
    text_json_string(&t, path, strlen(path));
    run_log_line(r, &t);
    runlog_sync(&r->log);
    snprintf(line, sizeof line, "saved %s", path);
    progress_line(&r->progress, line, true);
}

// Where a checkpoint failed because the disk is full: removes the oldest one kept, never the newest good one, and
// says so.
static inline bool run_make_room(Run* r, const Error* e) {
    char line[128];
    if (!strstr(e->text, strerror(ENOSPC)) && !strstr(e->text, strerror(EDQUOT))) { return false; }
    long removed = checkpoint_make_room(run_out(r), (long)r->saved_step);
    if (removed < 0) { return false; }
    snprintf(line, sizeof line, "{\"event\": \"disk full\", \"step\": %lld, \"removed\": %ld}", (long long)r->step,
             removed);
    runlog_line(&r->log, line);
    fprintf(stderr, "%s: the disk is full: step-%08ld, the oldest checkpoint, was removed to save step %lld\n",
            program_invocation_short_name, removed, (long long)r->step);
    if (r->timed_step == removed) { r->timed_step = -1; }
    return true;
}

// A checkpoint that could not be written: says so, names what is left, ends the program.
__attribute__((noreturn)) static inline void run_save_failed(const Run* r, const Error* e) {
    char path[PATH_SIZE];
    if (r->saved_step < 0) {
        die("checkpoint of step %lld not saved: %s; there is no earlier one", (long long)r->step, e->text);
    }
    checkpoint_path(run_out(r), (long)r->saved_step, path);
    die("checkpoint of step %lld not saved: %s; the last good one is %s", (long long)r->step, e->text, path);
}

// Takes the directory of `path`, where the kernel says that the open log lies, for the run's if it is: renamed since.
static inline bool run_was_moved(Run* r, char* path) {
    char step[PATH_SIZE];
    struct stat st;
    size_t n = strlen(path), end = strlen("/log.jsonl");
    if (n <= end || strcmp(path + n - end, "/log.jsonl") || stat(path, &st) || !run_log_is(r, &st)) { return false; }
    path[n - end] = 0;
    if (r->saved_step >= 0) { checkpoint_path(path, (long)r->saved_step, step); }
    return (r->saved_step < 0 || dir_exists(step)) && checkpoint_run_fits(path, NULL);
}

// Before a checkpoint is written: whoever has renamed or removed the run's directory may have begun another run under
// its name, which must neither get this one's checkpoints nor lose its own to --keep. Where the directory has another
// name, the run follows it; where the log is gone, or a copy is in its place, it goes on there. False: all is as it
// was.
static inline bool run_find_directory(Run* r) {
    char path[PATH_SIZE], moved[PATH_SIZE], real[PATH_SIZE], link[64];
    struct stat st;
    Error e = {{0}};
    path_join(path, sizeof path, run_out(r), "log.jsonl");
    if (r->log.fd < 0 || (!stat(path, &st) && run_log_is(r, &st))) { return false; }
    const char* name = program_invocation_short_name;
    snprintf(link, sizeof link, "/proc/self/fd/%d", r->log.fd);
    ssize_t n = readlink(link, moved, sizeof moved - 1);
    moved[n > 0 ? n : 0] = 0;
    // Some file systems give a file another number each time.
    if (realpath(path, real) && !strcmp(real, moved)) { return false; }
    if (run_was_moved(r, moved)) {
        fprintf(stderr, "%s: --out: %s is called %s now, where the run goes on\n", name, run_out(r), moved);
        snprintf(r->moved, sizeof r->moved, "%s", moved);
        return true;
    }
    if (!stat(path, &st) && st.st_size > 0 && run_log_first(run_out(r)) != r->log_first) {
        die("checkpoint of step %lld not saved: %s was renamed or removed, and holds another run now",
            (long long)r->step, run_out(r));
    }
    int fd = make_dirs(run_out(r), &e) ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_CLOEXEC, 0644) : -1;
    if (fd < 0) {
        fail(&e, "%s: cannot open for writing: %s", path, strerror(errno));
        run_save_failed(r, &e);
    }
    fprintf(stderr, "%s: %s was removed or replaced: lines since then are lost, the next ones go into what is there\n",
            name, path);
    runlog_close(&r->log);
    r->log.fd = fd;
    r->log.size = lseek(fd, 0, SEEK_END);
    if (r->lock >= 0) { close(r->lock); }
    r->lock = -1;
    run_lock(r, false);
    return true;
}

static inline bool run_goes_on(const Run* r) {
    return r->step < r->steps && !run_stops(r) && r->skipped_in_a_row < MAX_SKIPPED_IN_A_ROW;
}

static inline int run_by_seconds(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// Warns of a rank that was slower than 1.2 times the middle one, and by a millisecond, on average over 20 steps, once
// as long as it stays the slowest. seconds: that each rank has worked in this step for one of its windows.
static inline void run_note_slow(Run* r, const double* seconds) {
    enum { STEPS = 20 };
    int n = r->ranks->size, slow = 0;
    double* sums = r->rank_seconds;
    for (int p = 0; p < n; p++) { sums[p] += seconds[p] / STEPS; }
    if (++r->slow_steps < STEPS) { return; }
    for (int p = 1; p < n; p++) { slow = sums[p] > sums[slow] ? p : slow; }
    double most = sums[slow];
    qsort(sums, (size_t)n, sizeof *sums, run_by_seconds);
    double middle = sums[(n - 1) / 2];
    memset(sums, 0, (size_t)n * sizeof *sums);
    r->slow_steps = 0;
    if (most <= 1.2 * middle || most - middle < 0.001) { slow = -1; }
    if (slow >= 0 && slow != r->slow && ranks_lead(r->ranks)) {
        progress_break(&r->progress);
        fprintf(stderr,
                "%s: rank %d (%s) is slow: %.3f s for a sequence, the middle rank %.3f; all others wait for it\n",
                program_invocation_short_name, slow, r->ranks->watch.peers[slow].host, most, middle);
    }
    r->slow = slow;
}

// A line of the log: what each rank has computed, sent and waited; of what it sent the gradients, and of these what was
// on its way before the backward pass had ended.
static inline void run_log_ranks(Run* r) {
    typedef struct {
        int64_t windows;
        uint64_t sent, reduced, early;
        double waited;
    } Share;
    if (ranks_alone(r->ranks)) { return; }
    Share mine = {r->computed, r->ranks->bytes_sent, r->ranks->bytes_reduced, r->ranks->bytes_early, r->ranks->waited};
    Share* all = (Share*)alloc_or_die((size_t)r->ranks->size, sizeof mine, "shares of ranks");
    Text t = {NULL, 0, 0};
    ranks_exchange(r->ranks, &mine, sizeof mine, all);
    text_printf(&t, "{\"event\": \"ranks\", \"step\": %lld, \"ranks\": [", (long long)r->step);
    for (int p = 0; p < r->ranks->size; p++) {
        text_printf(&t, "%s{\"host\": ", p ? ", " : "");
        text_json_string(&t, r->ranks->watch.peers[p].host, strlen(r->ranks->watch.peers[p].host));
        text_printf(&t,
                    ", \"windows\": %lld, \"bytes_sent\": %llu, \"bytes_reduced\": %llu, \"bytes_early\": %llu, "
                    "\"seconds_waited\": %.3f}",
                    (long long)all[p].windows, (unsigned long long)all[p].sent, (unsigned long long)all[p].reduced,
                    (unsigned long long)all[p].early, all[p].waited);
    }
    text_append(&t, "]", 1);
    run_log_line(r, &t);
    free(all);
}

// The exit status of a run that ends. A signal that leaves nothing to do, as in the last checkpoint, stops none.
static inline int run_status(const Run* r) {
    bool left = r->step < r->steps || r->to_evaluate || r->to_sample;
    if (r->skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW) { return EXIT_NOT_FINITE; }
    return run_stops(r) && left ? EXIT_STOPPED : EXIT_DONE;
}

// Says how the run ended; the exit status.
static inline int run_end(Run* r) {
    int status = run_status(r);
    const char* reason = status == EXIT_NOT_FINITE ? "not finite" : status == EXIT_STOPPED ? "signal" : "done";
    run_log_ranks(r);
    char line[256];
    snprintf(line, sizeof line, "{\"event\": \"stop\", \"step\": %lld, \"reason\": \"%s\", \"seconds\": %.3f}",
             (long long)r->step, reason, seconds_now() - r->started);
    runlog_line(&r->log, line);
    runlog_close(&r->log);
    progress_break(&r->progress);
    if (status == EXIT_NOT_FINITE) {
        char path[PATH_SIZE] = "none was saved";
        if (r->saved_step >= 0) { checkpoint_path(run_out(r), (long)r->saved_step, path); }
        if (ranks_lead(r->ranks)) {
            fprintf(stderr,
                    "%s: loss or gradient norm was not finite in %d steps in a row, stopped at step %lld; the last "
                    "good checkpoint: %s\n",
                    program_invocation_short_name, r->skipped_in_a_row, (long long)r->step, path);
        }
    } else if (status == EXIT_STOPPED) {
        printf("stopped by signal %d at step %lld, saved; --resume continues\n",
               ranks_alone(r->ranks) ? (int)run_signal : r->ranks->signal, (long long)r->step);
    } else if (!options_evaluate(r->options)) {
        printf("done: %lld steps, %lld updates skipped\n", (long long)r->step, (long long)r->skipped);
    }
    loader_close(&r->train);
    for (int i = 0; i < r->n_val; i++) { loader_close(&r->val[i].loader); }
    if (r->tokenizer) { tokenizer_free(r->tokenizer); }
    if (r->lock >= 0) { close(r->lock); }
    text_free(&r->rank_file);
    text_free(&r->loader_state);
    text_free(&r->passed_over);
    text_free(&r->changes);
    free(r->tokens);
    free(r->targets);
    free(r->losses);
    free(r->rank_seconds);
    ranks_close(r->ranks);
    return status;
}

#endif
