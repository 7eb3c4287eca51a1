// mta/train.h: one training run, for the CPU and the CUDA trainer alike (mta/trainer.h is the table of either):
// initialisation or resume, the loop, evaluation, scoring, samples, checkpoints. mta/plan.h prints the plan before.
// The model and its step are in train_mta.c and train_mta.cu.
#ifndef MTA_TRAIN_H
#define MTA_TRAIN_H

#include "run.h"  // first: it defines _GNU_SOURCE, which must stand before the first header of libc

#include "plan.h"
#include "random.h"
#include "score.h"

// ---------------------------------------------------------------------------------------------------------------------
// The start: weights at random, from --init-from, or everything from the checkpoint that is resumed

// Identity kernels and mixers, norm weights 1, gate bias 0, lambda vectors normal with std 0.1, all else normal with
// std C^-0.5 (down_proj FF^-0.5), cut at 3 sigma. Blocks of a tensor draw from streams of their own: the values do not
// depend on threads.
static inline void tensor_initialise(float* w, const TensorSpec* s, int index, const Config* c, uint64_t seed) {
    enum { BLOCK = 1 << 16 };
    size_t n = s->numel;
    if (s->kind == TENSOR_KQ_CONV || s->kind == TENSOR_KQ_CONV_POST) {
        size_t cq = s->shape[1], ck = s->shape[2];
        for (size_t i = 0; i < n; i++) { w[i] = i % (cq * ck) == (cq - 1) * ck + (ck - 1) / 2; }
    } else if (s->kind == TENSOR_HEAD_MIX_PRE || s->kind == TENSOR_HEAD_MIX) {
        size_t ch = s->shape[1];
        for (size_t i = 0; i < n; i++) { w[i] = i / ch % ch == i % ch; }
    } else if (tensor_is_norm(s) || s->kind == TENSOR_GATE_BIAS) {
        for (size_t i = 0; i < n; i++) { w[i] = tensor_is_norm(s); }
    } else {
        bool lambda = s->kind >= TENSOR_LAMBDA_Q1 && s->kind <= TENSOR_LAMBDA_K2;
        double std = lambda ? 0.1 : pow(s->kind == TENSOR_DOWN_PROJ ? c->intermediate_size : c->hidden_size, -0.5);
        int blocks = (int)((n + BLOCK - 1) / BLOCK);
#ifdef _OPENMP
#pragma omp parallel for schedule(static)
#endif
        for (int b = 0; b < blocks; b++) {
            Rng rng = rng_make(seed, (uint64_t)index << 32 | (uint64_t)b);
            size_t end = n < (size_t)(b + 1) * BLOCK ? n : (size_t)(b + 1) * BLOCK;
            for (size_t i = (size_t)b * BLOCK; i < end; i++) {
                w[i] = (float)(std * (lambda ? rng_normal(&rng) : rng_truncated_normal(&rng, 3)));
            }
        }
    }
}

static inline void model_initialise(const Trainer* trainer, void* model, const Config* config, uint64_t seed) {
    const TensorList* list = trainer->tensors(model);
    size_t largest = 0;
    for (int i = 0; i < list->n; i++) {
        if (list->specs[i].numel > largest) { largest = list->specs[i].numel; }
    }
    float* w = (float*)alloc_or_die(largest, sizeof(float), "one tensor");
    for (int i = 0; i < list->n; i++) {
        tensor_initialise(w, &list->specs[i], i, config, seed);
        trainer->set(model, STATE_MASTER, i, w);
    }
    free(w);
}

// Groups of tensors in a checkpoint: model.safetensors holds the weights in the storage's precision,
// optimizer.safetensors m, v and, where the weights are rounded, the master weights. What is read goes to the master
// weights: no bit is lost, whichever trainer wrote it.
static const char* const NO_PREFIX[] = {""};
static const char* const OPTIMIZER_PREFIXES[] = {"m.", "v.", "master."};
static const StateKind READ_WEIGHTS[] = {STATE_MASTER}, SAVED_WEIGHTS[] = {STATE_WEIGHT},
                       OPTIMIZER_STATES[] = {STATE_M, STATE_V, STATE_MASTER};

typedef struct {
    const Run* run;
    const StateKind* kinds;  // of each group
    DType dtype;             // of the file
    float* room;             // CHECKPOINT_PIECE values
} TensorGroups;

static inline bool store_tensor(void* ctx, int group, int tensor, const float* data, Error* e) {
    (void)e;
    const TensorGroups* g = (const TensorGroups*)ctx;
    g->run->trainer->set(g->run->model, g->kinds[group], tensor, data);
    return true;
}

static inline void model_start(Run* r) {
    const TensorList* list = r->trainer->tensors(r->model);
    TensorGroups weights = {r, READ_WEIGHTS, DT_F32, NULL}, optimizer = {r, OPTIMIZER_STATES, DT_F32, NULL};
    Text absent = {NULL, 0, 0};
    Error e = {{0}};
    bool good = true;
    if (r->resume_dir[0]) {
        char path[PATH_SIZE];
        path_join(path, sizeof path, r->resume_dir, "optimizer.safetensors");
        bool master = false;
        good = safetensors_holds(path, "master.model.embed_tokens.weight", &master, &e) &&
               checkpoint_read_tensors(r->resume_dir, list, NO_PREFIX, 1, false, NULL, store_tensor, &weights, &e) &&
               checkpoint_read_tensors(path, list, OPTIMIZER_PREFIXES, master ? 3 : 2, false, NULL, store_tensor,
                                       &optimizer, &e);
    } else {
        bool whole = options_evaluate(r->options);  // then no tensor may be absent
        if (!whole) { model_initialise(r->trainer, r->model, &r->config, (uint64_t)r->options->seed); }
        if (r->init_dir[0]) {
            good =
                checkpoint_read_tensors(r->init_dir, list, NO_PREFIX, 1, !whole, &absent, store_tensor, &weights, &e);
        }
        if (good && r->init_dir[0]) { printf("weights from %s\n", r->init_dir); }
        if (good && absent.n) { printf("absent there, started at the identity: %s\n", absent.text); }
    }
    if (!good) { die("%s", e.text); }
    text_free(&absent);
}

// ---------------------------------------------------------------------------------------------------------------------
// The step, as each trainer's train_step goes through it

// One micro-batch of a step, and how far the step has come.
typedef struct {
    const int32_t *tokens, *targets;  // (B,T)
    int B, T;
    double dloss;  // of each counted target: the loss of a step is the mean over all that are counted in it
    int next;      // window of the next micro-batch
    double sum;    // of the losses so far
} Batch;

static inline Batch step_begin(const Step* s) {
    Batch b = {NULL, NULL, 0, s->T, s->counted ? 1.0 / (double)s->counted : 0, 0, 0};
    return b;
}

// Is any of n targets counted? Logits that no counted target needs are left out of an evaluation.
static inline bool any_counted(const int32_t* targets, int n) {
    for (int i = 0; i < n; i++) {
        if (targets[i] >= 0) { return true; }
    }
    return false;
}

// Moves to the next micro-batch; false after the last, or when a signal has come.
static inline bool step_next(const Step* s, Batch* b) {
    if (run_signal || b->next >= s->windows) { return false; }
    b->tokens = s->tokens + (size_t)b->next * (size_t)s->T;
    b->targets = s->targets + (size_t)b->next * (size_t)s->T;
    b->B = s->windows - b->next < s->B ? s->windows - b->next : s->B;
    b->next += b->B;
    return true;
}

static inline bool step_complete(const Step* s, const Batch* b) { return b->next >= s->windows; }
static inline bool step_updates(const Step* s, const Batch* b) { return step_complete(s, b) && isfinite(b->sum); }
static inline StepResult step_result(const Step* s, const Batch* b, double norm) {
    StepResult result = {s->counted ? b->sum / (double)s->counted : 0, norm, step_complete(s, b)};
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Evaluation

// Loss of every validation set over --eval-windows sequences spread evenly over it; with masks, the share of sequences
// that have a wrong counted token (teacher forcing). Stops early when a signal comes.
static inline void evaluate(Run* r) {
    int T = r->seq_len;
    Error e = {{0}};
    run_show_val_head(r);
    for (int set = 0; set < r->n_val; set++) {
        ValSet* v = &r->val[set];
        int64_t all = (int64_t)loader_windows(&v->loader), n = r->options->eval_windows, counted = 0, wrong = 0;
        if (n == 0 || n > all) { n = all; }
        double sum = 0;
        for (int64_t w = 0; w < n; w += r->batch_size) {
            if (run_signal) { return; }
            int B = (int)(n - w < r->batch_size ? n - w : r->batch_size);
            for (int b = 0; b < B; b++) {
                if (!loader_window(&v->loader, (uint64_t)((w + b) * all / n), r->tokens + (size_t)b * T,
                                   r->targets + (size_t)b * T, &e)) {
                    die("--val: %s", e.text);
                }
            }
            Losses losses = r->trainer->forward(r->model, r->tokens, r->targets, B, T, NULL);
            sum += losses.sum;
            for (int b = 0; b < B; b++) {
                int bad = 0;
                for (int t = b * T; t < (b + 1) * T; t++) {
                    bad |= losses.wrong[t];
                    counted += r->targets[t] >= 0;
                }
                wrong += bad;
            }
        }
        run_log_val(r, v, sum, counted, wrong, n);
    }
    run_log_val_mean(r);
}

// ---------------------------------------------------------------------------------------------------------------------
// Scoring (mta/score.h reads and answers the requests): those of about equal length in one batch

// Positions to compute: all tokens but the last, which is only predicted; none where nothing is.
static inline int score_positions(const ScoreRequest* q) { return q->n > q->context ? q->n - 1 : 0; }

// Longer requests come first, of equal ones those of earlier lines.
static inline int score_by_length(const void* a, const void* b) {
    const ScoreRequest *x = *(ScoreRequest*const*)a, *y = *(ScoreRequest*const*)b;
    int more = score_positions(y) - score_positions(x);
    return more ? more : (x->line > y->line) - (x->line < y->line);
}

// Scorer.score, model a Run: as many of the requests (n) as fit the model's tokens at once, all as long as the first.
// What stands behind a shorter one is of no effect: no token sees a later one.
static inline int score_batch(void* model, ScoreRequest** requests, int n, long* passes) {
    enum { MOST = 65535 };  // sequences that the trainers count
    Run* r = (Run*)model;
    int T = score_positions(requests[0]), B = 0;
    if (!T) { return n; }  // and so are the others: nothing is asked of them
    int most = (int)((int64_t)r->batch_size * r->seq_len / T);
    for (; B < n && B < most && B < MOST && score_positions(requests[B]); B++) {
        const ScoreRequest* q = requests[B];
        int32_t *tokens = r->tokens + (size_t)B * T, *targets = r->targets + (size_t)B * T;
        for (int t = 0; t < T; t++) {
            tokens[t] = t < q->n - 1 ? q->ids[t] : 0;
            targets[t] = t + 1 >= q->context && t + 1 < q->n ? q->ids[t + 1] : -1;
        }
    }
    Losses losses = r->trainer->forward(r->model, r->tokens, r->targets, B, T, NULL);
    for (int b = 0; b < B; b++) {
        ScoreRequest* q = requests[b];
        for (int t = q->context - 1; t < q->n - 1; t++) {
            q->token_logprobs[t + 1 - q->context] = 0 - losses.losses[(size_t)b * T + t];
            q->logprob -= (double)losses.losses[(size_t)b * T + t];
            q->greedy = q->greedy && !losses.wrong[(size_t)b * T + t];
        }
    }
    ++*passes;
    return B;
}

// Answers the lines of --score on standard output.
static inline void score(Run* r) {
    char unknown[PATH_SIZE + 128];
    Text t = {NULL, 0, 0};
    Scorer scorer;
    memset(&scorer, 0, sizeof scorer);
    snprintf(unknown, sizeof unknown,
             "%s: config.json names no tokenizer that is there; give --tokenizer NAME|FILE, or ids", r->init_dir);
    scorer.tokenizer = r->tokenizer, scorer.no_tokenizer = unknown;
    scorer.vocab = r->config.vocab_size, scorer.positions = r->seq_len, scorer.shift = r->options->shift;
    scorer.order = score_by_length, scorer.score = score_batch, scorer.model = r;
    run_return_output(r);
    double seconds = score_lines(&scorer, r->options->score);
    text_printf(&t, "{\"event\": \"score\", \"step\": %lld, \"seconds\": %.3f, \"file\": ", (long long)r->step,
                seconds);
    text_json_string(&t, r->options->score, strlen(r->options->score));
    text_printf(&t, "}");
    runlog_line(&r->log, t.text);
    text_free(&t);
}

// ---------------------------------------------------------------------------------------------------------------------
// Samples

// The id drawn from softmax(logits / temperature); the likeliest at temperature 0. logits (V) are overwritten.
static inline int draw_token(float* logits, int V, double temperature, Rng* rng) {
    int best = 0;
    for (int v = 1; v < V; v++) {
        if (logits[v] > logits[best]) { best = v; }
    }
    if (temperature <= 0) { return best; }
    double top = (double)logits[best], sum = 0;
    for (int v = 0; v < V; v++) {
        logits[v] = (float)exp(((double)logits[v] - top) / temperature);
        sum += (double)logits[v];
    }
    double u = rng_uniform(rng) * sum;
    for (int v = 0; v < V; v++) {
        u -= (double)logits[v];
        if (u < 0) { return v; }
    }
    return best;
}

// Continues --sample-prompt, a full forward pass for every token: infer_mta has the fast way.
static inline void sample(Run* r) {
    const TrainOptions* o = r->options;
    const char* prompt = o->sample_prompt ? o->sample_prompt : "";
    int V = r->config.vocab_size, n = 0;
    int32_t *ids = NULL, *tokens = r->tokens;  // free between steps; at least T of them
    size_t count = 0;
    Error e = {{0}};
    Text text = {NULL, 0, 0};
    TokenStream stream = {{0}, 0};
    if (!r->tokenizer) { return; }
    if (!tokenizer_encode(r->tokenizer, prompt, strlen(prompt), &ids, &count, &e)) {
        die("--sample-prompt: %s", e.text);
    }
    if (tokenizer_bos(r->tokenizer) >= 0) { tokens[n++] = tokenizer_bos(r->tokenizer); }
    for (size_t i = 0; i < count && n < r->seq_len; i++) { tokens[n++] = ids[i]; }
    free(ids);
    text_append(&text, prompt, strlen(prompt));
    Rng rng = rng_make((uint64_t)o->seed, (uint64_t)1 << 63 | (uint64_t)r->step);
    char* piece = (char*)alloc_or_die(tokenizer_max_bytes(r->tokenizer) + 16, 1, "a token's text");
    float* logits = (float*)alloc_or_die((size_t)V, sizeof(float), "logits");
    int known = tokenizer_vocab(r->tokenizer) < V ? tokenizer_vocab(r->tokenizer) : V;  // ids that have a text
    for (int64_t i = 0; i < o->sample_tokens && n > 0 && n < r->seq_len && !run_signal; i++) {
        r->trainer->last_logits(r->model, tokens, n, logits);
        int id = draw_token(logits, known, o->sample_temperature, &rng);
        if (id == tokenizer_eos(r->tokenizer)) { break; }
        tokens[n++] = id;
        text_append(&text, piece, tokenizer_decode(r->tokenizer, &stream, id, piece));
    }
    text_append(&text, piece, tokenizer_flush(&stream, piece));
    run_log_sample(r, text.text ? text.text : "", text.n);
    text_free(&text);
    free(piece);
    free(logits);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints

static inline const void* fetch_tensor(void* ctx, int group, int tensor, size_t from, size_t n) {
    const TensorGroups* g = (const TensorGroups*)ctx;
    g->run->trainer->get(g->run->model, g->kinds[group], tensor, from, n, g->room);
    char* bytes = (char*)g->room;
    for (size_t i = 0; g->dtype == DT_BF16 && i < n; i++) {
        memcpy(bytes + 2 * i, bytes + 4 * i + 2, 2);
    }  // a bf16 is the upper half of a float; these are rounded already
    return g->room;
}

// Tries once; writes the checkpoint's directory into path.
static inline bool write_checkpoint(const Run* r, char* path, Error* e) {
    bool rounded = r->trainer->rounded;
    const TensorList* list = r->trainer->tensors(r->model);
    float* room = (float*)alloc_or_die(CHECKPOINT_PIECE, sizeof(float), "a piece of a tensor");
    TensorGroups weights = {r, SAVED_WEIGHTS, rounded ? DT_BF16 : DT_F32, room},
                 optimizer = {r, OPTIMIZER_STATES, DT_F32, room};
    CheckpointWriter w;
    bool good =
        checkpoint_begin(&w, r->options->out, (long)r->step, e) &&
        checkpoint_add_tensors(&w, "model.safetensors", list, NO_PREFIX, 1, weights.dtype, fetch_tensor, &weights, e) &&
        checkpoint_add_tensors(&w, "optimizer.safetensors", list, OPTIMIZER_PREFIXES, rounded ? 3 : 2, DT_F32,
                               fetch_tensor, &optimizer, e) &&
        run_save_texts(r, &w, e) && checkpoint_commit(&w, path, e);
    free(room);
    return good;
}

// timed: made by --save-minutes; the next checkpoint replaces it.
static inline void save(Run* r, bool timed) {
    Error e = {{0}};
    char path[PATH_SIZE];
    double start = seconds_now();
    r->timed = timed;
    progress_break(&r->progress);
    while (!write_checkpoint(r, path, &e)) {
        if (!run_make_room(r, &e)) { run_save_failed(r, &e); }
        e.text[0] = 0;
    }
    run_saved(r, path, seconds_now() - start);
}

// Is it time for a checkpoint of --save-minutes? The last step has its own.
static inline bool timed_save_due(const Run* r) {
    return r->options->save_minutes > 0 && r->step < r->steps &&
           seconds_now() - r->saved_at >= 60 * r->options->save_minutes;
}

// ---------------------------------------------------------------------------------------------------------------------
// The loop

// One optimizer step; false: a signal came in between.
static inline bool take_step(Run* r) {
    double start = seconds_now();
    Step step = run_load_step(r);
    StepResult result = r->trainer->train_step(r->model, &step);
    if (result.complete) { run_log_step(r, &result, step.hyper.lr, seconds_now() - start); }
    return result.complete;
}

// --eval-only or --score of r->model, which the trainer has made. Returns the program's exit status.
static inline int evaluate_only(Run* r) {
    run_open_evaluation(r);
    model_start(r);
    run_log_start(r, r->trainer->tensors(r->model)->parameters);
    if (r->options->score) {
        score(r);
    } else {
        evaluate(r);
    }
    return run_end(r);
}

// What every trainer does before its first product: waiting threads that sleep, closed descriptors, the command line.
static inline void train_begin(TrainOptions* options, int argc, char** argv) {
    settle_threads(argv);
    open_standard_files();
    options_given(options, argc, argv);
}

// Trains r->model, which the trainer has made, to the end of the run or a signal. Returns the program's exit status.
static inline int train(Run* r) {
    const TrainOptions* o = r->options;
    if (options_evaluate(o)) { return evaluate_only(r); }
    run_open_directory(r);
    model_start(r);
    run_log_start(r, r->trainer->tensors(r->model)->parameters);
    if (o->eval_first && !r->step) { evaluate(r); }
    while (run_goes_on(r) && take_step(r)) {
        run_measure(r);
        if (run_due(r, r->eval_every) || r->step == r->steps) { evaluate(r); }
        if (run_due(r, o->sample_every)) { sample(r); }
        bool due = run_due(r, o->save_every);
        if (!r->skipped_in_a_row && (due || timed_save_due(r))) { save(r, !due); }
    }
    if (r->saved_step != r->step && r->skipped_in_a_row < MAX_SKIPPED_IN_A_ROW) { save(r, false); }
    return run_end(r);
}

#endif
