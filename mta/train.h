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

static inline size_t largest_tensor(const TensorList* list) {
    size_t largest = 0;
    for (int i = 0; i < list->n; i++) {
        if (list->specs[i].numel > largest) { largest = list->specs[i].numel; }
    }
    return largest;
}

static inline void model_initialise(const Trainer* trainer, void* model, const Config* config, uint64_t seed) {
    const TensorList* list = trainer->tensors(model);
    float* w = (float*)alloc_or_die(largest_tensor(list), sizeof(float), "one tensor");
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
static const char* const MASTER_OF_EMBEDDING = "master.model.embed_tokens.weight";  // there where all are
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

// Rank 0 reads the checkpoint that is resumed; every tensor goes to all, which keep what is theirs.
static inline bool store_shared(void* ctx, int group, int tensor, const float* data, Error* e) {
    const TensorGroups* g = (const TensorGroups*)ctx;
    size_t bytes = g->run->trainer->tensors(g->run->model)->specs[tensor].numel * sizeof(float);
    ranks_from_root(g->run->ranks, (void*)(uintptr_t)data, bytes);
    return store_tensor(ctx, group, tensor, data, e);
}

// The same on another rank: the tensors of so many groups, in the order in which rank 0 reads them.
static inline void receive_tensors(Run* r, int n_groups, TensorGroups* groups) {
    const TensorList* list = r->trainer->tensors(r->model);
    float* room = (float*)alloc_or_die(largest_tensor(list), sizeof(float), "one tensor");
    for (int i = 0; i < n_groups * list->n; i++) {
        Error e = {{0}};
        store_shared(groups, i / list->n, i % list->n, room, &e);
    }
    free(room);
}

// Refuses ranks that start with other weights: their --init-from holds another model.
static inline void ranks_same_weights(Run* r) {
    const TensorList* list = r->trainer->tensors(r->model);
    if (ranks_alone(r->ranks)) { return; }
    float* room = (float*)alloc_or_die(largest_tensor(list), sizeof(float), "one tensor");
    uint32_t crc = 0;
    for (int i = 0; i < list->n; i++) {
        r->trainer->get(r->model, STATE_WEIGHT, i, 0, list->specs[i].numel, room);
        crc = crc32_update(crc, room, list->specs[i].numel * sizeof(float));
    }
    free(room);
    RanksSame same = {"other weights at the start", crc};
    ranks_same(r->ranks, &same, 1);
}

// Names the tensors that --init-from lacks, and what of them changes the model that it holds.
static inline void say_absent(const Config* c, const char* names) {
    const bool norm = strstr(names, "head_norm") != NULL, gate = strstr(names, "head_gate") != NULL,
               lambda = strstr(names, "lambda") != NULL;
    const char* depth = c->head_norm == HEAD_NORM_GROUP_DEPTH_SCALED ? " and its factor by depth" : "";
    printf("absent there, started at the identity: %s\n", names);
    if (!norm && !gate && !lambda) { return; }
    printf("no identity, so that the model begins as another one:%s%s%s%s%s%s\n", norm ? " the norm of heads" : "",
           norm ? depth : "", norm && (gate || lambda) ? "," : "", gate ? " the gate" : "", gate && lambda ? "," : "",
           lambda ? " what DIFF Transformer subtracts" : "");
}

// Does the checkpoint in DIR hold the fp32 weights of a model whose own file is rounded? false and e: not to be read.
static inline bool model_has_master(bool* found, const char* dir, Error* e) {
    char path[PATH_SIZE];
    *found = false;
    path_join(path, sizeof path, dir, "optimizer.safetensors");
    return !file_exists(path) || safetensors_holds(path, MASTER_OF_EMBEDDING, found, e);
}

static inline void model_start(Run* r) {
    const TensorList* list = r->trainer->tensors(r->model);
    TensorGroups weights = {r, READ_WEIGHTS, DT_F32, NULL}, optimizer = {r, OPTIMIZER_STATES, DT_F32, NULL};
    Text absent = {NULL, 0, 0};
    Error e = {{0}};
    bool good = true;
    if (r->resume_dir[0]) {
        char path[PATH_SIZE];
        ranks_met(r->ranks);  // from here on rank 0 sends what it reads
        path_join(path, sizeof path, r->resume_dir, "optimizer.safetensors");
        bool master = false;
        if (ranks_lead(r->ranks) && !safetensors_holds(path, MASTER_OF_EMBEDDING, &master, &e)) { die("%s", e.text); }
        ranks_from_root(r->ranks, &master, sizeof master);
        if (ranks_lead(r->ranks)) {
            good =
                checkpoint_read_tensors(r->resume_dir, list, NO_PREFIX, 1, false, NULL, store_shared, &weights, &e) &&
                checkpoint_read_tensors(path, list, OPTIMIZER_PREFIXES, master ? 3 : 2, false, NULL, store_shared,
                                        &optimizer, &e);
        } else {
            receive_tensors(r, 1, &weights);
            receive_tensors(r, master ? 3 : 2, &optimizer);
        }
    } else {
        bool whole = options_evaluate(r->options);  // then no tensor may be absent
        if (!whole) { model_initialise(r->trainer, r->model, &r->config, (uint64_t)r->options->seed); }
        if (r->init_dir[0]) {
            good =
                checkpoint_read_tensors(r->init_dir, list, NO_PREFIX, 1, !whole, &absent, store_tensor, &weights, &e);
        }
        bool master = false;
        if (good && r->init_dir[0] && !whole) { good = model_has_master(&master, r->init_dir, &e); }
        if (good && r->init_dir[0]) {
            printf("weights from %s%s\n", r->init_dir,
                   master ? ", as model.safetensors has them in bf16: its fp32 weights, in optimizer.safetensors, are "
                            "for --resume"
                          : "");
        }
        if (good && absent.n) { say_absent(&r->config, absent.text); }
    }
    if (!good) { die("%s", e.text); }
    text_free(&absent);
    ranks_met(r->ranks);
    ranks_same_weights(r);
}

// ---------------------------------------------------------------------------------------------------------------------
// The step, as each trainer's train_step goes through it

// One micro-batch of a step, and how far the step has come.
typedef struct {
    const int32_t *tokens, *targets;  // (B,T)
    int B, T;
    double dloss;   // of each counted target: the loss of a step is the mean over all that are counted in it
    int shard;      // which one of the step's
    int next, end;  // windows: of the next micro-batch, behind the shard's last
    double sum;     // of the shard's losses so far; after step_sum, of the step's
} Batch;

static inline void step_open_shard(const Step* s, Batch* b, int shard) {
    b->shard = shard;
    b->next = (int)((int64_t)s->windows * shard / s->shards);
    b->end = (int)((int64_t)s->windows * (shard + 1) / s->shards);
    b->sum = 0;
}

static inline Batch step_begin(const Step* s) {
    Batch b = {NULL, NULL, 0, s->T, s->counted ? 1.0 / (double)s->counted : 0, 0, 0, 0, 0};
    step_open_shard(s, &b, (int)s->own.begin);
    return b;
}

// Is any of n targets counted? Logits that no counted target needs are left out of an evaluation.
static inline bool any_counted(const int32_t* targets, int n) {
    for (int i = 0; i < n; i++) {
        if (targets[i] >= 0) { return true; }
    }
    return false;
}

// Moves to the shard's next micro-batch; false after the last, or when a signal has come.
static inline bool step_next(const Step* s, Batch* b) {
    if ((run_signal && !s->whole) || b->next >= b->end) { return false; }
    b->tokens = s->tokens + (size_t)b->next * (size_t)s->T;
    b->targets = s->targets + (size_t)b->next * (size_t)s->T;
    b->B = b->end - b->next < s->B ? b->end - b->next : s->B;
    b->next += b->B;
    return true;
}

// Moves to the next shard of this process; false after the last, or when a signal has come.
static inline bool step_next_shard(const Step* s, Batch* b) {
    if (s->losses) { s->losses[b->shard] = b->sum; }
    if (b->next < b->end || b->shard + 1 >= (int)s->own.end) { return false; }
    step_open_shard(s, b, b->shard + 1);
    return true;
}

// The losses of all shards, in their order, whoever computed them.
static inline void step_sum(const Step* s, Batch* b, Ranks* ranks) {
    if (!s->losses) { return; }
    ranks_gather(ranks, s->losses, (size_t)s->shards * sizeof(double), sizeof(double));
    b->sum = 0;
    for (int shard = 0; shard < s->shards; shard++) { b->sum += s->losses[shard]; }
}

static inline bool step_complete(const Step* s, const Batch* b) {
    return b->next >= b->end && b->shard + 1 >= (int)s->own.end;
}
static inline bool step_updates(const Step* s, const Batch* b) { return step_complete(s, b) && isfinite(b->sum); }
static inline StepResult step_result(const Step* s, const Batch* b, double norm) {
    StepResult result = {s->counted ? b->sum / (double)s->counted : 0, norm, step_complete(s, b)};
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Evaluation

typedef struct {
    double sum;
    int64_t counted, asked, wrong;  // targets; sequences that have one, and of these the wrong ones
    int signal;
} EvalSum;

// The batch of windows w to w + B - 1 of n, spread over `all` of the set.
static inline EvalSum evaluate_batch(Run* r, const ValSet* v, int64_t w, int B, int64_t n, int64_t all) {
    int T = r->seq_len;
    Error e = {{0}};
    for (int b = 0; b < B; b++) {
        if (!loader_window(&v->loader, (uint64_t)((w + b) * all / n), r->tokens + (size_t)b * T,
                           r->targets + (size_t)b * T, &e)) {
            die("--val: %s", e.text);
        }
    }
    Losses losses = r->trainer->forward(r->model, r->tokens, r->targets, B, T, NULL);
    r->computed += options_evaluate(r->options) ? B : 0;
    EvalSum part = {losses.sum, 0, 0, 0, 0};
    for (int b = 0; b < B; b++) {
        int bad = 0;
        for (int t = b * T; t < (b + 1) * T; t++) {
            bad |= losses.wrong[t];
            part.counted += r->targets[t] >= 0;
        }
        part.asked += any_counted(r->targets + (size_t)b * T, T);
        part.wrong += bad;
    }
    return part;
}

// A signal to a rank, of which all have learnt; 0: none. The first counts.
static inline void note_signal(Run* r, int number) { r->ranks->signal = r->ranks->signal ? r->ranks->signal : number; }

// All ranks learn of a signal to any of them.
static inline void agree_to_stop(Run* r) {
    if (ranks_alone(r->ranks)) { return; }
    int mine = (int)run_signal, *all = (int*)alloc_or_die((size_t)r->ranks->size, sizeof mine, "signals of ranks");
    ranks_exchange(r->ranks, &mine, sizeof mine, all);
    for (int p = 0; p < r->ranks->size; p++) { note_signal(r, all[p]); }
    free(all);
}

// Loss of every validation set over --eval-windows sequences spread evenly over it; with masks, the share of those
// that have a wrong token among the sequences of which some are counted (teacher forcing). Stops early when a signal
// comes. With several ranks each computes every so many-th batch, and all add the sums in the order of the batches.
static inline void evaluate(Run* r) {
    int size = r->ranks->size;
    EvalSum* parts = (EvalSum*)alloc_or_die((size_t)size, sizeof(EvalSum), "sums of an evaluation");
    ranks_at(r->ranks, AT_EVALUATION, r->step);
    run_show_val_head(r);
    int done = 0;  // sets
    for (int set = 0; set < r->n_val && !run_stops(r); set++) {
        ValSet* v = &r->val[set];
        int64_t all = (int64_t)loader_windows(&v->loader), n = r->options->eval_windows;
        if (n == 0 || n > all) { n = all; }
        EvalSum total = {0, 0, 0, 0, 0};
        int64_t w = 0;
        for (; w < n && !run_stops(r); w += (int64_t)size * r->batch_size) {
            int64_t first = w + (int64_t)r->ranks->rank * r->batch_size, left = n - first;
            EvalSum mine = {0, 0, 0, 0, 0};
            if (left > 0) {
                mine = evaluate_batch(r, v, first, (int)(left < r->batch_size ? left : r->batch_size), n, all);
            }
            mine.signal = run_signal;
            ranks_exchange(r->ranks, &mine, sizeof mine, parts);
            for (int p = 0; p < size; p++) {
                total.sum += parts[p].sum;
                total.counted += parts[p].counted;
                total.asked += parts[p].asked;
                total.wrong += parts[p].wrong;
                note_signal(r, parts[p].signal);
            }
        }
        if (w >= n) { run_log_val(r, v, total.sum, total.counted, total.wrong, total.asked), done++; }
    }
    r->to_evaluate = done < r->n_val;
    r->evaluated = !r->to_evaluate && r->n_val;
    if (!r->to_evaluate) { run_log_val_mean(r); }
    run_log_val_end(r, !r->to_evaluate);
    free(parts);
}

// ---------------------------------------------------------------------------------------------------------------------
// Scoring (mta/score.h reads and answers the requests): those of about equal length in one batch. With several ranks
// rank 0 reads and answers; it cuts the batches that one process would compute and deals them out, one for each rank in
// a round, so that the answers are the same bytes on any number of ranks.

// What a rank computes in a round: its tokens follow, then its targets, each (B,T) of room for as many as any batch
// has. The answer to it are the losses (B,T) as floats and, behind their room, whether each is wrong (B,T).
typedef struct {
    int32_t B, T;  // B 0: nothing in this round; -1: there is no other round
    int64_t line;  // of the first request
} ScoreBatch;

typedef struct {
    Run* run;
    size_t tokens;                     // of a batch at most
    size_t batch_bytes, answer_bytes;  // of one rank
    char *batches, *answers;           // of every rank, in their order; of another rank than 0 its own
} ScoreRounds;

static inline ScoreBatch* score_of(const ScoreRounds* s, int rank) {
    return (ScoreBatch*)(void*)(s->batches + (size_t)rank * s->batch_bytes);
}

static inline ScoreRounds score_open(Run* r) {
    size_t tokens = (size_t)r->batch_size * (size_t)r->seq_len, ranks = r->ranks->rank ? 1 : (size_t)r->ranks->size;
    ScoreRounds s = {r, tokens, sizeof(ScoreBatch) + 2 * tokens * sizeof(int32_t), 0, NULL, NULL};
    s.answer_bytes = (tokens * (sizeof(float) + 1) + 3) / 4 * 4;
    s.batches = (char*)alloc_or_die(ranks, s.batch_bytes, "batches of requests");
    s.answers = (char*)alloc_or_die(ranks, s.answer_bytes, "losses of requests");
    return s;
}

// Positions to compute: all tokens but the last, which is only predicted; none where nothing is.
static inline int score_positions(const ScoreRequest* q) { return q->n > q->context ? q->n - 1 : 0; }

// Longer requests come first, of equal ones those of earlier lines.
static inline int score_by_length(const void* a, const void* b) {
    const ScoreRequest *x = *(ScoreRequest*const*)a, *y = *(ScoreRequest*const*)b;
    int more = score_positions(y) - score_positions(x);
    return more ? more : (x->line > y->line) - (x->line < y->line);
}

// A batch of as many of the requests (n) as fit the model's tokens at once, all as long as the first. What stands
// behind a shorter one is of no effect: no token sees a later one. Returns how many; all where nothing is asked of the
// first, and so of the others.
static inline int score_fill(const ScoreRounds* s, ScoreBatch* batch, ScoreRequest** requests, int n) {
    enum { MOST = 65535 };  // sequences that the trainers count
    int T = n ? score_positions(requests[0]) : 0, most = T ? (int)(s->tokens / (size_t)T) : 0, B = 0;
    for (; B < n && B < most && B < MOST && score_positions(requests[B]); B++) {
        const ScoreRequest* q = requests[B];
        int32_t *tokens = (int32_t*)(batch + 1) + (size_t)B * T, *targets = tokens + s->tokens;
        for (int t = 0; t < T; t++) {
            tokens[t] = t < q->n - 1 ? q->ids[t] : 0;
            targets[t] = t + 1 >= q->context && t + 1 < q->n ? q->ids[t + 1] : -1;
        }
    }
    batch->B = B, batch->T = T, batch->line = n ? requests[0]->line : 0;
    return T ? B : n;
}

// The losses of this rank's batch, the first in its memory as rank 0's is in rank 0's.
static inline void score_compute(ScoreRounds* s) {
    Run* r = s->run;
    const ScoreBatch* batch = score_of(s, 0);
    const int32_t* tokens = (const int32_t*)(batch + 1);
    size_t n = (size_t)batch->B * (size_t)batch->T;
    ranks_at(r->ranks, AT_SCORE, batch->line);
    if (!n) { return; }
    Losses losses = r->trainer->forward(r->model, tokens, tokens + s->tokens, batch->B, batch->T, NULL);
    memcpy(s->answers, losses.losses, n * sizeof(float));
    memcpy(s->answers + s->tokens * sizeof(float), losses.wrong, n);
    r->computed += batch->B;
}

// The answers to the requests of a batch.
static inline void score_take(const ScoreRounds* s, int rank, ScoreRequest** requests) {
    const ScoreBatch* batch = score_of(s, rank);
    const char* answer = s->answers + (size_t)rank * s->answer_bytes;
    for (int b = 0; b < batch->B; b++) {
        ScoreRequest* q = requests[b];
        const float* losses = (const float*)(const void*)answer + (size_t)b * batch->T;
        const char* wrong = answer + s->tokens * sizeof(float) + (size_t)b * batch->T;
        for (int t = q->context - 1; t < q->n - 1; t++) {
            q->token_logprobs[t + 1 - q->context] = 0 - losses[t];
            q->logprob -= (double)losses[t];
            q->greedy = q->greedy && !wrong[t];
        }
    }
}

// Scorer.score, model the ScoreRounds: one round.
static inline int score_round(void* model, ScoreRequest** requests, int n, long* passes) {
    ScoreRounds* s = (ScoreRounds*)model;
    Ranks* ranks = s->run->ranks;
    int from[MAX_RANKS + 1] = {0};  // each rank's first request
    for (int p = 0; p < ranks->size; p++) {
        from[p + 1] = from[p] + score_fill(s, score_of(s, p), requests + from[p], n - from[p]);
        *passes += score_of(s, p)->B > 0;
    }
    ranks_deal(ranks, s->batches, s->batch_bytes, false);
    score_compute(s);
    ranks_deal(ranks, s->answers, s->answer_bytes, true);
    for (int p = 0; p < ranks->size; p++) { score_take(s, p, requests + from[p]); }
    ranks_at(ranks, AT_REQUESTS, score_of(s, 0)->line);
    return from[ranks->size];
}

// On the other ranks: rounds until there is no other.
static inline void score_for_root(ScoreRounds* s) {
    Ranks* ranks = s->run->ranks;
    ranks_at(ranks, AT_SCORE, 0);
    for (;;) {
        ranks_deal(ranks, s->batches, s->batch_bytes, false);
        if (score_of(s, 0)->B < 0) { return; }
        score_compute(s);
        ranks_deal(ranks, s->answers, s->answer_bytes, true);
    }
}

// Answers the lines of --score on standard output, and tells the others when all are answered.
static inline void score_for_all(ScoreRounds* s) {
    Run* r = s->run;
    char unknown[PATH_SIZE + 128];
    Text t = {NULL, 0, 0};
    Scorer scorer;
    memset(&scorer, 0, sizeof scorer);
    snprintf(unknown, sizeof unknown,
             "%.*s: config.json names no tokenizer that is there; give --tokenizer NAME|FILE, or ids", PATH_SIZE - 1,
             r->init_dir);
    scorer.tokenizer = r->tokenizer, scorer.no_tokenizer = unknown;
    scorer.vocab = r->config.vocab_size, scorer.positions = r->seq_len, scorer.shift = r->options->shift;
    scorer.order = score_by_length, scorer.score = score_round, scorer.model = s;
    run_return_output(r);
    ranks_at(r->ranks, AT_REQUESTS, 0);
    double seconds = score_lines(&scorer, r->options->score);
    for (int p = 0; p < r->ranks->size; p++) { score_of(s, p)->B = -1; }
    ranks_deal(r->ranks, s->batches, s->batch_bytes, false);
    text_printf(&t, "{\"event\": \"score\", \"step\": %lld, \"seconds\": %.3f, \"file\": ", (long long)r->step,
                seconds);
    text_json_string(&t, r->options->score, strlen(r->options->score));
    run_log_line(r, &t);
}

static inline void score(Run* r) {
    ScoreRounds s = score_open(r);
    if (ranks_lead(r->ranks)) {
        score_for_all(&s);
    } else {
        score_for_root(&s);
    }
    free(s.batches);
    free(s.answers);
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
static inline void sample_text(Run* r) {
    const TrainOptions* o = r->options;
    const char* prompt = o->sample_prompt ? o->sample_prompt : "";
    int V = r->config.vocab_size, n = 0;
    int32_t *ids = NULL, *tokens = r->tokens;  // free between steps; at least T of them
    size_t count = 0;
    Error e = {{0}};
    Text text = {NULL, 0, 0};
    TokenStream stream = {{0}, 0};
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
    r->to_sample = false;
    for (int64_t i = 0; i < o->sample_tokens && n > 0 && n < r->seq_len && !r->to_sample; i++) {
        r->trainer->last_logits(r->model, tokens, n, logits);
        int id = draw_token(logits, known, o->sample_temperature, &rng);
        if (id == tokenizer_end(r->tokenizer)) { break; }
        tokens[n++] = id;
        text_append(&text, piece, tokenizer_decode(r->tokenizer, &stream, id, piece));
        ranks_moved(r->ranks);
        r->to_sample = run_signal != 0;
    }
    text_append(&text, piece, tokenizer_flush(&stream, piece));
    if (!r->to_sample) { run_log_sample(r, text.text ? text.text : "", text.n); }
    text_free(&text);
    free(piece);
    free(logits);
}

// Rank 0 samples; the others wait for it and for its word whether a signal came, since all end with one status.
static inline void sample(Run* r) {
    ranks_at(r->ranks, AT_SAMPLES, r->step);
    r->to_sample = r->to_sample && r->tokenizer;
    if (ranks_lead(r->ranks) && r->to_sample) { sample_text(r); }
    ranks_from_root(r->ranks, &r->to_sample, sizeof r->to_sample);
    agree_to_stop(r);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints

// Replaces those of the n values that are other ranks' by theirs, which fetch_for_root gives.
static inline void fetch_from_ranks(const Run* r, StateKind kind, int tensor, size_t from, size_t n, float* room) {
    const TensorList* list = r->trainer->tensors(r->model);
    size_t first = list->specs[tensor].offset + from, end = first + n;  // in the arena
    if (kind == STATE_WEIGHT) { return; }
    for (size_t at = first; at < end;) {
        Stretch s = ranks_stretch(r->ranks, list->numel, at, end);
        RanksRequest request = {kind, tensor, from + (at - first), s.end - at};
        if (s.rank) { ranks_ask(r->ranks, s.rank, &request, room + (at - first), (s.end - at) * sizeof(float)); }
        at = s.end;
    }
}

// On the other ranks: answers rank 0 until it asks for nothing more.
static inline void fetch_for_root(const Run* r) {
    float* room = (float*)alloc_or_die(CHECKPOINT_PIECE, sizeof(float), "a piece of a tensor");
    for (;;) {
        RanksRequest request;
        ranks_from_root(r->ranks, &request, sizeof request);
        if (request.kind < 0) { break; }
        r->trainer->get(r->model, (StateKind)request.kind, request.tensor, request.from, request.n, room);
        ranks_answer(r->ranks, room, request.n * sizeof(float));
    }
    free(room);
}

static inline const void* fetch_tensor(void* ctx, int group, int tensor, size_t from, size_t n) {
    const TensorGroups* g = (const TensorGroups*)ctx;
    ranks_at(g->run->ranks, AT_FETCH, g->run->step);
    g->run->trainer->get(g->run->model, g->kinds[group], tensor, from, n, g->room);
    fetch_from_ranks(g->run, g->kinds[group], tensor, from, n, g->room);
    ranks_at(g->run->ranks, AT_CHECKPOINT, g->run->step);
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
        checkpoint_begin(&w, run_out(r), (long)r->step, e) &&
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
    ranks_at(r->ranks, AT_CHECKPOINT, r->step);
    if (!ranks_lead(r->ranks)) {
        fetch_for_root(r);
        r->saved_step = r->step;
        checkpoint_path(run_out(r), (long)r->step, path);
        ranks_saved(r->ranks, path);
        return;
    }
    progress_break(&r->progress);
    run_find_directory(r);
    while (!write_checkpoint(r, path, &e)) {
        if (!run_find_directory(r) && !run_make_room(r, &e)) { run_save_failed(r, &e); }
        e.text[0] = 0;
    }
    ranks_ask_no_more(r->ranks);
    run_saved(r, path, seconds_now() - start);
}

// At the end of a step the ranks agree on what only one of them knows: a signal, and rank 0's clock. own: seconds that
// this one has worked for one of its windows.
static inline void agree(Run* r, double own) {
    typedef struct {
        int signal, timed_save;
        double own;
    } Word;
    // Is it time for a checkpoint of --save-minutes? The last step has its own.
    r->timed_save = r->options->save_minutes > 0 && r->step < r->steps &&
                    seconds_now() - r->saved_at >= 60 * r->options->save_minutes;
    if (ranks_alone(r->ranks)) { return; }
    Word mine = {(int)run_signal, r->timed_save, own}, *all;
    all = (Word*)alloc_or_die((size_t)r->ranks->size, sizeof mine, "words of ranks");
    double* seconds = (double*)alloc_or_die((size_t)r->ranks->size, sizeof(double), "seconds of ranks");
    ranks_exchange(r->ranks, &mine, sizeof mine, all);
    r->timed_save = all[0].timed_save;
    for (int p = 0; p < r->ranks->size; p++) {
        note_signal(r, all[p].signal);
        seconds[p] = all[p].own;
    }
    run_note_slow(r, seconds);
    free(seconds);
    free(all);
}

// ---------------------------------------------------------------------------------------------------------------------
// The loop

// One optimizer step; false: a signal came in between.
static inline bool take_step(Run* r) {
    double start = seconds_now(), waited = r->ranks->waited;
    ranks_at(r->ranks, AT_STEP, r->step + 1);
    Step step = run_load_step(r);
    StepResult result = r->trainer->train_step(r->model, &step);
    if (!result.complete) { return false; }
    double seconds = seconds_now() - start;
    run_log_step(r, &result, &step, seconds);
    double own = (double)(step.own.end - step.own.begin) / step.shards * step.windows;
    agree(r, (seconds - (r->ranks->waited - waited)) / own);
    return true;
}

// What is due behind a step. Where a signal comes, what is not done is left to --resume.
static inline void evaluate_and_sample(Run* r) {
    if (r->to_evaluate) { evaluate(r); }
    if (r->to_sample && !run_stops(r)) { sample(r); }
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
        if (!r->options->out) { put_out("", 0, true); }  // then what was printed is all there is of the result
    }
    return run_end(r);
}

// What every trainer does before its first product: waiting threads that sleep, closed descriptors, the ranks, by its
// own way of opening them, the command line.
static inline void train_begin(TrainOptions* options, int argc, char** argv, Ranks* (*open_ranks)(void)) {
    settle_signals();
    settle_threads(argv);
    open_standard_files();
    Ranks* ranks = open_ranks();
    options_given(options, argc, argv);
    options->ranks = ranks;
    run_meet_first(options);
}

// Trains r->model, which the trainer has made, to the end of the run or a signal. Returns the program's exit status.
static inline int train(Run* r) {
    const TrainOptions* o = r->options;
    run_meet(r);
    if (options_evaluate(o)) { return evaluate_only(r); }
    if (r->trainer->share) { r->trainer->share(r->model, r->ranks, r->shards); }
    run_open_directory(r);
    model_start(r);
    int64_t left_at = r->to_evaluate || r->to_sample ? r->step : -1;  // then the checkpoint of this step says so
    r->to_evaluate = r->to_evaluate || (o->eval_first && !r->step && !r->evaluated);
    run_log_start(r, r->trainer->tensors(r->model)->parameters);
    evaluate_and_sample(r);
    bool due = false;  // a checkpoint; where updates are skipped it waits for one that is not
    while (run_goes_on(r) && take_step(r)) {
        run_measure(r);
        r->to_evaluate = run_due(r, r->eval_every) || r->step == r->steps;
        r->to_sample = run_due(r, o->sample_every);
        evaluate_and_sample(r);
        due = due || run_due(r, o->save_every);
        if (!r->skipped_in_a_row && (due || r->timed_save)) {
            save(r, !due);
            due = false;
        }
    }
    if ((r->saved_step != r->step || r->step == left_at) && r->skipped_in_a_row < MAX_SKIPPED_IN_A_ROW) {
        save(r, false);
    }
    return run_end(r);
}

#endif
