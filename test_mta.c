// test_mta.c: the tests of both trainers.
//   test_mta                         all tests of train_mta.c (test_mta_cuda: and of train_mta.cu)
//   test_mta --golden FILE...        the named golden cases alone: a table per tensor; exit status 1 if any tensor is
//                                    out of tolerance
//   test_mta --write DIR [N]         N golden cases of this trainer's own results (default 5: one of every kind of
//                                    attention; more: drawn at random)
//   test_mta --only TEXT             the tests whose name contains TEXT
//   test_mta_cuda --models N         so many random models instead of 60
//   test_mta_cuda --compare DIR [--train GLOB] [--seq-len N] [--batch-size N]
//                                    gradients of a checkpoint, CPU against GPU, on a batch (seeded random tokens
//                                    without shards)
//
// Three copies of a trainer meet here: train_mta.c in double, included below, for finite differences; train_mta.c in
// fp32 and train_mta.cu, linked, behind the table of mta/trainer.h. One metric serves all comparisons: the worst |got -
// want| / (atol + rtol * largest |want|) of a tensor, written so that NaN fails. The tolerances stand in one table.
#define MTA_REAL double
#define MTA_LIBRARY
#include "train_mta.c"

#include <dirent.h>
#include <sys/wait.h>

#pragma weak trainer_cuda  // NULL where train_mta.cu is not linked: one object makes test_mta and test_mta_cuda

// ---------------------------------------------------------------------------------------------------------------------
// Harness

static int passed, failed, skipped;
static const char* only = "";
static int models = 60;  // random ones of the CUDA trainer's tests, --models

static bool wanted(const char* name) { return strstr(name, only) != NULL; }

// One verdict: a line with the figure that decided it.
static void verdict(bool good, const char* name, const char* fmt, ...) {
    char text[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    printf("%-4s %-44s %s\n", good ? "ok" : "FAIL", name, text);
    fflush(stdout);
    if (good) {
        passed++;
    } else {
        failed++;
    }
}

// Tolerances, relative to the largest value of the tensor compared, and why.
typedef struct {
    double atol, rtol;
} Tolerance;
static const Tolerance GOLDEN_FP32 = {1e-6, 5e-5};  // fp32 against fp64; PyTorch in fp32 stays within a third of it
static const Tolerance DIFFERENCES = {1e-10,
                                      1e-8};  // central differences in double, step 1e-5: truncation near 1e-10,
                                              // rounding near 1e-16 / 1e-5; the worst measured is a tenth of this
static const Tolerance ROUNDING_FP32 = {1e-7, 1e-5};    // the same sums in another order, fp32
static const Tolerance ROUNDING_FP64 = {1e-14, 1e-11};  // the same in double
// What rounding to bf16 does to gradients, relative Frobenius errors against fp32 on the same weights, as measured (the
// CUDA trainer on dev/cuda_cpu): all gradients of a model together; then of the tensors of a part the worst one. A test
// allows half as much again. Small: scalars and lambda vectors (see Frobenius).
enum { PART_CONV, PART_MIX, PART_REST, N_PARTS };
typedef struct {
    double all, part[N_PARTS], small;
} Bf16Error;
// The errors of random models, each over the effect of rounding (rounding_effect): typical is the geometric mean of all
// models together, worst the largest of one, of the parts too; that of models with heads of 2 channels stands apart,
// whose gradients are small differences, since their norm leaves one direction.
typedef struct {
    double typical, worst, worst_of_2;
} Bf16Random;
typedef struct {
    const char* trainer;
    Bf16Error golden, real;  // golden cases; real initialisation
    Bf16Random random, many_heads;
} Bf16Measured;
static const Bf16Measured BF16_MEASURED[] = {
    {"cuda bf16",
     {0.0389, {0.0509, 0.131, 0.0809}, 0.152},
     {0.0172, {0.0241, 0.0599, 0.0242}, 0.0302},
     {0.78, 3.66, 7.03},
     {0.81, 1.72, 0}},
    {"cuda bf16, cuDNN",  // the random ones all of layers that it serves
     {0.0389, {0.0509, 0.131, 0.0809}, 0.152},
     {0.0172, {0.0241, 0.0690, 0.0242}, 0.0302},
     {0.78, 1.88, 0},  // none of heads of 2
     {0, 0, 0}},
    {"cpu bf16",
     {0.0575, {0.0684, 0.125, 0.123}, 0.0610},
     {0.0178, {0.0265, 0.0497, 0.0277}, 0.0302},
     {0.81, 4.53, 7.82},
     {0.85, 2.06, 0}},
};

typedef struct {
    double worst, largest;
    size_t at;
} Worst;  // worst <= 1 passes

static void worst_add(Worst* w, double got, double want, double limit, size_t i) {
    double err = fabs(got - want) / limit;
    if (!(err <= w->worst)) {
        w->worst = isnan(err) ? INFINITY : err;
        w->at = i;
    }
}

// The larger of two, NaN where one is: fmax() passes over it.
static double larger(double a, double b) { return isnan(a) || a > b ? a : b; }

static Worst compare_floats(const float* got, const float* want, size_t n, Tolerance t) {
    Worst w = {0, 0, 0};
    for (size_t i = 0; i < n; i++) {
        if (!(fabs((double)want[i]) <= w.largest)) { w.largest = fabs((double)want[i]); }
    }
    for (size_t i = 0; i < n; i++) { worst_add(&w, (double)got[i], (double)want[i], t.atol + t.rtol * w.largest, i); }
    return w;
}

static Worst compare_doubles(const double* got, const double* want, size_t n, Tolerance t) {
    Worst w = {0, 0, 0};
    for (size_t i = 0; i < n; i++) {
        if (!(fabs(want[i]) <= w.largest)) { w.largest = fabs(want[i]); }
    }
    for (size_t i = 0; i < n; i++) { worst_add(&w, got[i], want[i], t.atol + t.rtol * w.largest, i); }
    return w;
}

static double* doubles(size_t n) { return (double*)alloc_or_die(n, sizeof(double), "test data"); }
static float* floats(size_t n) { return (float*)alloc_or_die(n, sizeof(float), "test data"); }

static double* random_doubles(Rng* rng, size_t n) {
    double* x = doubles(n);
    for (size_t i = 0; i < n; i++) { x[i] = rng_normal(rng); }
    return x;
}

static int32_t* random_tokens(uint64_t seed, size_t n, int V) {
    int32_t* x = (int32_t*)alloc_or_die(n, sizeof(int32_t), "test tokens");
    Rng rng = rng_make(seed, 99);
    for (size_t i = 0; i < n; i++) { x[i] = (int32_t)(rng_u32(&rng) % (uint32_t)V); }
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Small models

static Config small_config(const char* kind) {
    Config c = config_default();
    Error e = {{0}};
    c.vocab_size = 37;
    c.hidden_size = 24;
    c.intermediate_size = 20;
    c.num_hidden_layers = 2;
    c.num_attention_heads = c.num_key_value_heads = 4;
    c.max_position_embeddings = 128;
    c.rms_norm_eps = 1e-5;
    c.tie_word_embeddings = true;
    if (!config_set_attention(&c, kind, false, &e) || !config_check(&c, &e)) { die("%s", e.text); }
    return c;
}

static int draw(Rng* rng, int n) { return (int)(rng_u32(rng) % (uint32_t)n); }

// A model drawn at random, every field in any combination, at odd sizes, and a batch of B x T tokens for it.
static Config random_config(Rng* rng, bool many_heads, int* B, int* T) {
    static const int few[] = {1, 2, 4, 6}, many[] = {16, 32, 16, 16}, sizes[] = {2, 6, 8, 16};
    Config c = small_config("transformer");
    Error e = {{0}};
    int NH = (many_heads ? many : few)[draw(rng, 4)], HS = sizes[many_heads ? 1 + draw(rng, 2) : draw(rng, 4)];
    *B = 1 + draw(rng, 3);
    *T = 1 + draw(rng, many_heads ? 140 : 60);
    bool diff = NH % 2 == 0 && draw(rng, 4) == 0;
    c.vocab_size = 3 + draw(rng, 70);
    c.hidden_size = NH * HS;
    c.intermediate_size = 1 + draw(rng, 40);
    c.num_hidden_layers = 1 + draw(rng, 3);
    c.num_attention_heads = NH;
    c.num_key_value_heads = NH % 2 == 0 && draw(rng, 2) ? NH / 2 : NH;
    c.tie_word_embeddings = draw(rng, 2);
    c.head_norm = (HeadNorm)draw(rng, 3);
    if (diff) {
        c.attention_type = ATTENTION_DIFF;
    } else {
        for (int l = 0; l < c.num_hidden_layers; l++) { c.kq_conv_layer[l] = draw(rng, 2); }
        c.kq_conv_query_size = 1 + draw(rng, 9);
        c.kq_conv_key_size = 1 + 2 * draw(rng, 7);
        c.kq_conv_pre_softmax = draw(rng, 2);
        c.kq_conv_post_softmax = draw(rng, 2);
        c.head_mix_pre_softmax = draw(rng, 2) ? 0 : NH;
        c.head_mix_post_softmax = draw(rng, 2) ? 0 : NH % 2 ? NH : 2;
        if (many_heads && draw(rng, 6)) { c.head_mix_pre_softmax = c.head_mix_post_softmax = 16; }
        c.head_gate = draw(rng, 2);
    }
    if (!config_check(&c, &e)) { die("%s", e.text); }
    return c;
}

// One whose layers are of heads that the fused kernels and cuDNN serve, some with a convolution before the softmax.
static Config random_fused_config(Rng* rng, int* B, int* T) {
    Config c = random_config(rng, false, B, T);
    Error e = {{0}};
    c.hidden_size = c.num_attention_heads * 8 * (1 + draw(rng, 2));
    c.kq_conv_query_size = 1 + (c.kq_conv_query_size - 1) % 6;
    c.kq_conv_post_softmax = false;
    c.head_mix_pre_softmax = 0;
    if (c.head_mix_post_softmax) { c.head_mix_post_softmax = c.num_attention_heads % 2 ? 0 : 2; }
    if (!config_check(&c, &e)) { die("%s", e.text); }
    return c;
}

// Random values that keep every gradient alive: kernels and mixers near the identity, norms near 1.
static void perturb_by(const Trainer* tr, void* m, const Config* c, uint64_t seed, double size) {
    const TensorList* list = tr->tensors(m);
    model_initialise(tr, m, c, seed);
    for (int i = 0; i < list->n; i++) {
        Rng rng = rng_make(seed, (uint64_t)1000 + (uint64_t)i);
        float* w = floats(list->specs[i].numel);
        tr->get(m, STATE_WEIGHT, i, 0, list->specs[i].numel, w);
        for (size_t k = 0; k < list->specs[i].numel; k++) { w[k] += (float)(size * rng_normal(&rng)); }
        tr->set(m, STATE_WEIGHT, i, w);
        free(w);
    }
}
static void perturb(const Trainer* tr, void* m, const Config* c, uint64_t seed) { perturb_by(tr, m, c, seed, 0.1); }

static void* make_model(const Trainer* tr, const Config* c, int B, int T, int chunk) {
    Error e = {{0}};
    void* m = tr->create(c, B, T, chunk, true, &e);
    if (!m) { die("%s: %s", tr->name, e.text); }
    return m;
}

static int64_t counted(const int32_t* targets, int N) {
    int64_t n = 0;
    for (int i = 0; i < N; i++) { n += targets[i] >= 0; }
    return n;
}

// Mean loss of the counted targets, 0 if there are none; logits (B,T,V) unless NULL.
static double mean_loss(const Trainer* tr, void* m, const int32_t* tokens, const int32_t* targets, int B, int T,
                        float* logits) {
    int64_t n = counted(targets, B * T);
    double sum = tr->forward(m, tokens, targets, B, T, logits).sum;
    return n ? sum / (double)n : 0;
}

// The same, and its gradients are added.
static double mean_gradients(const Trainer* tr, void* m, const int32_t* tokens, const int32_t* targets, int B, int T) {
    int64_t n = counted(targets, B * T);
    double sum = tr->forward_backward(m, tokens, targets, B, T, n ? 1.0 / (double)n : 0);
    return n ? sum / (double)n : 0;
}

static Step one_batch(const int32_t* tokens, const int32_t* targets, int B, int T, int64_t number, AdamW hyper) {
    Step s = {tokens, targets, B, B, T, counted(targets, B * T), number, hyper, 1, {0, 1}, NULL, false};
    return s;
}

// All tensors of one state, one behind another.
static float* get_all(const Trainer* tr, const void* m, StateKind kind) {
    const TensorList* list = tr->tensors(m);
    float *all = floats(list->parameters), *p = all;
    for (int i = 0; i < list->n; i++) {
        tr->get(m, kind, i, 0, list->specs[i].numel, p);
        p += list->specs[i].numel;
    }
    return all;
}

static void copy_state(const Trainer* from, const void* a, const Trainer* to, void* b, StateKind kind) {
    const TensorList* list = from->tensors(a);
    for (int i = 0; i < list->n; i++) {
        float* x = floats(list->specs[i].numel);
        from->get(a, kind, i, 0, list->specs[i].numel, x);
        to->set(b, kind, i, x);
        free(x);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden cases (dev/ref/make_golden.py writes them and says what is in one)

typedef struct {
    Config config;
    int B, T;
    SafeTensors file;
    const int32_t *tokens, *targets;
    const StTensor *logits, *loss;
} Golden;

static const StTensor* golden_tensor(const Golden* g, const char* name, DType dtype, size_t numel, const char* path) {
    const StTensor* t = safetensors_find(&g->file, name);
    if (!t) { die("%s: tensor %s is missing", path, name); }
    if (t->dtype != dtype || (numel && t->numel != numel)) {
        die("%s: tensor %s has another type or size than the configuration says", path, name);
    }
    return t;
}

static Golden golden_open(const char* path) {
    Golden g;
    Error e = {{0}};
    memset(&g, 0, sizeof g);
    if (!safetensors_open(&g.file, path, &e)) { die("%s", e.text); }
    const char* text = safetensors_metadata(&g.file, "config");
    if (!text) { die("%s: no configuration in its metadata: not a golden case", path); }
    Json* j = json_parse(text, strlen(text), &e);
    if (!j || !config_from_json(&g.config, j, false, &e)) { die("%s: %s", path, e.text); }
    json_free(j);
    const StTensor* tokens = golden_tensor(&g, "golden.tokens", DT_I32, 0, path);
    if (tokens->ndim != 2 || tokens->numel < 1 || tokens->numel > INT32_MAX) {
        die("%s: golden.tokens has %d dimensions and %zu values, wanted 2, (B,T), and at least one", path, tokens->ndim,
            tokens->numel);
    }
    g.B = (int)tokens->shape[0];
    g.T = (int)tokens->shape[1];
    size_t N = (size_t)g.B * (size_t)g.T;
    g.tokens = (const int32_t*)tokens->data;
    g.targets = (const int32_t*)golden_tensor(&g, "golden.targets", DT_I32, N, path)->data;
    g.logits = golden_tensor(&g, "golden.logits", DT_F32, N * (size_t)g.config.vocab_size, path);
    g.loss = golden_tensor(&g, "golden.loss", DT_F32, 1, path);
    for (size_t i = 0; i < N; i++) {
        if (g.tokens[i] < 0 || g.tokens[i] >= g.config.vocab_size || g.targets[i] >= g.config.vocab_size) {
            die("%s: token out of range", path);
        }
    }
    return g;
}

static void golden_weights(const Golden* g, const Trainer* tr, void* m, const char* path) {
    const TensorList* list = tr->tensors(m);
    for (int i = 0; i < list->n; i++) {
        const StTensor* t = golden_tensor(g, list->specs[i].name, DT_F32, list->specs[i].numel, path);
        Error e = {{0}};
        if (!checkpoint_check_shape(t, &list->specs[i], &e)) { die("%s", e.text); }
        tr->set(m, STATE_WEIGHT, i, (const float*)t->data);
    }
}

static bool golden_row(const char* name, Worst w, bool table) {
    if (table) {
        printf("  %-52s largest %.3e  error/tolerance %.3f at %zu%s\n", name, w.largest, w.worst, w.at,
               w.worst <= 1 ? "" : "  FAIL");
    }
    return w.worst <= 1;
}

// fp32: each tensor within tolerance of the file's fp64 results.
static void golden_exact(const Trainer* tr, const char* path, bool table) {
    Golden g = golden_open(path);
    void* m = make_model(tr, &g.config, g.B, g.T, 0);
    const TensorList* list = tr->tensors(m);
    char name[ST_NAME_SIZE], title[300];
    double worst = 0;
    bool good = true;
    golden_weights(&g, tr, m, path);
    size_t V = (size_t)g.config.vocab_size;
    float *logits = floats(g.logits->numel), *last = floats(V);
    const float* want = (const float*)g.logits->data;
    tr->last_logits(m, g.tokens, g.T, last);
    float loss_forward = (float)mean_loss(tr, m, g.tokens, g.targets, g.B, g.T, logits);
    float loss = (float)mean_gradients(tr, m, g.tokens, g.targets, g.B, g.T);
    if (table) { printf("%s (%s)\n", path, tr->name); }
    Worst rows[4] = {compare_floats(logits, want, g.logits->numel, GOLDEN_FP32),
                     compare_floats(last, want + (size_t)(g.T - 1) * V, V, GOLDEN_FP32),
                     compare_floats(&loss_forward, (const float*)g.loss->data, 1, GOLDEN_FP32),
                     compare_floats(&loss, (const float*)g.loss->data, 1, GOLDEN_FP32)};
    const char* const names[4] = {"logits", "last logits", "loss (forward)", "loss (with backward)"};
    for (int i = 0; i < 4; i++) {
        good &= golden_row(names[i], rows[i], table);
        worst = fmax(worst, rows[i].worst);
    }
    for (int i = 0; i < list->n; i++) {
        float* got = floats(list->specs[i].numel);
        snprintf(name, sizeof name, "grad.%s", list->specs[i].name);
        tr->get(m, STATE_GRADIENT, i, 0, list->specs[i].numel, got);
        Worst w = compare_floats(got, (const float*)golden_tensor(&g, name, DT_F32, list->specs[i].numel, path)->data,
                                 list->specs[i].numel, GOLDEN_FP32);
        good &= golden_row(name, w, table);
        worst = fmax(worst, w.worst);
        free(got);
    }
    const char* base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    snprintf(title, sizeof title, "%s golden %s", tr->name, base);
    verdict(good, title, "worst error/tolerance %.3f", worst);
    free(logits);
    free(last);
    tr->destroy(m);
    safetensors_close(&g.file);
}

// Relative Frobenius error of every gradient of `tr` against train_mta.c in fp32 on the weights that tr really holds
// (rounded to bf16). Gate biases and lambda vectors are kept apart: the gradient of each is one scalar (that of lambda,
// in all four vectors of a layer), a sum of terms of either sign over all tokens and heads. Where a layer's sum happens
// to vanish only rounding is left of it, so worst_small, by tensor, has no bound: above 0.3 at 9 of 60 seeds, 4.96 at
// one (dev/experiments.tsv). small_together takes the biases of all layers as one tensor and the lambda vectors as
// another, whose scale is the model's, at which the rounding enters: 0.10 at most.
typedef struct {
    double all, worst, worst_small, small_together;
    double part_worst[N_PARTS], part_together[N_PARTS];  // without the small ones
    char name[96];
    double loss, want_loss;
} Frobenius;

// Of the gradients that two models hold: m of `tr`, and ref of train_mta.c.
static Frobenius gradients_compare(const Trainer* tr, const void* m, const void* ref, bool table) {
    const Trainer* cpu = trainer_cpu();
    const TensorList* list = cpu->tensors(ref);
    Frobenius f;
    memset(&f, 0, sizeof f);
    double part[N_PARTS] = {0}, part_norm[N_PARTS] = {0};
    double all = 0, all_norm = 0, group[2] = {0}, group_norm[2] = {0};  // groups: biases, lambda vectors
    for (int i = 0; i < list->n; i++) {
        size_t n = list->specs[i].numel, at = 0;
        float *got = floats(n), *want = floats(n);
        double diff = 0, norm = 0, got_norm = 0, largest = 0;
        tr->get(m, STATE_GRADIENT, i, 0, n, got);
        cpu->get(ref, STATE_GRADIENT, i, 0, n, want);
        for (size_t k = 0; k < n; k++) {
            double d = (double)got[k] - (double)want[k];
            diff += d * d;
            norm += (double)want[k] * (double)want[k];
            got_norm += (double)got[k] * (double)got[k];
            if (!(fabs(d) <= largest)) {
                largest = fabs(d);
                at = k;
            }
        }
        double err = diff == 0 ? 0 : sqrt(diff / norm);
        if (table) {
            printf("  %-52s |cpu| %.4e  |gpu| %.4e  relative %.2e  worst %.2e at %zu\n", list->specs[i].name,
                   sqrt(norm), sqrt(got_norm), err, largest, at);
        }
        TensorKind kind = list->specs[i].kind;
        bool lambda = kind >= TENSOR_LAMBDA_Q1 && kind <= TENSOR_LAMBDA_K2, small = n == 1 || lambda;
        if (small) {
            group[lambda] += diff;
            group_norm[lambda] += norm;
        }
        if (isnan(err)) { err = INFINITY; }
        if (small && !(err <= f.worst_small)) { f.worst_small = err; }
        int of = kind == TENSOR_KQ_CONV || kind == TENSOR_KQ_CONV_POST    ? PART_CONV
                 : kind == TENSOR_HEAD_MIX || kind == TENSOR_HEAD_MIX_PRE ? PART_MIX
                                                                          : PART_REST;
        if (!small) {
            part[of] += diff;
            part_norm[of] += norm;
            f.part_worst[of] = fmax(f.part_worst[of], err);
        }
        if (!small && !(err <= f.worst)) {
            f.worst = err;
            snprintf(f.name, sizeof f.name, "%s", list->specs[i].name);
        }
        all += diff;
        all_norm += norm;
        free(got);
        free(want);
    }
    f.all = sqrt(all / all_norm);
    for (int k = 0; k < N_PARTS; k++) {
        // where all but nothing comes through (one key has no choice), only rounding is left: of a hundredth of the
        // whole
        f.part_together[k] = part[k] == 0 ? 0 : sqrt(part[k] / fmax(part_norm[k], 1e-4 * all_norm));
        if (isnan(f.part_together[k])) { f.part_together[k] = INFINITY; }
    }
    for (int k = 0; k < 2; k++) {
        double err = group[k] == 0 ? 0 : sqrt(group[k] / group_norm[k]);
        if (!(err <= f.small_together)) { f.small_together = isnan(err) ? INFINITY : err; }
    }
    return f;
}

static Frobenius frobenius(const Trainer* tr, void* m, const int32_t* tokens, const int32_t* targets, int B, int T,
                           const Config* c, bool table) {
    const Trainer* cpu = trainer_cpu();
    void* ref = make_model(cpu, c, B, T, 0);
    copy_state(tr, m, cpu, ref, STATE_WEIGHT);
    double loss = mean_gradients(tr, m, tokens, targets, B, T),
           want_loss = mean_gradients(cpu, ref, tokens, targets, B, T);
    Frobenius f = gradients_compare(tr, m, ref, table);
    f.loss = loss;
    f.want_loss = want_loss;
    cpu->destroy(ref);
    return f;
}

// How much of a model's gradients and loss rounding can change: the same errors where only the weights change, each by
// a random 2^-9 of itself, half a unit in the last place of bf16, all in fp32; root mean square of four draws. That
// differs from model to model a thousandfold, and errors of bf16 are mostly 0.5 to 1.5 times as large
// (experiments.tsv).
typedef struct {
    double all, part[N_PARTS], loss;
} Rounding;
static Rounding rounding_effect(const Trainer* tr, const void* m, const int32_t* tokens, const int32_t* targets, int B,
                                int T, const Config* c, uint64_t seed) {
    enum { DRAWS = 4 };
    const Trainer* cpu = trainer_cpu();
    Rounding r = {0, {0}, 0};
    void* ref = make_model(cpu, c, B, T, 0);
    copy_state(tr, m, cpu, ref, STATE_WEIGHT);
    double want_loss = mean_gradients(cpu, ref, tokens, targets, B, T);
    for (int k = 0; k < DRAWS; k++) {
        void* changed = make_model(cpu, c, B, T, 0);
        const TensorList* list = cpu->tensors(changed);
        for (int i = 0; i < list->n; i++) {
            size_t n = list->specs[i].numel;
            float* w = floats(n);
            Rng rng = rng_make(seed + (uint64_t)k, 2000 + (uint64_t)i);
            cpu->get(ref, STATE_WEIGHT, i, 0, n, w);
            for (size_t j = 0; j < n; j++) { w[j] *= 1 + (float)(ldexp(1, -9) * rng_normal(&rng)); }
            cpu->set(changed, STATE_WEIGHT, i, w);
            free(w);
        }
        double loss = mean_gradients(cpu, changed, tokens, targets, B, T);
        Frobenius f = gradients_compare(cpu, changed, ref, false);
        r.all += f.all * f.all / DRAWS;
        r.loss += pow(loss / want_loss - 1, 2) / DRAWS;
        for (int p = 0; p < N_PARTS; p++) { r.part[p] += f.part_together[p] * f.part_together[p] / DRAWS; }
        cpu->destroy(changed);
    }
    cpu->destroy(ref);
    r.all = sqrt(r.all);
    r.loss = sqrt(r.loss);
    for (int p = 0; p < N_PARTS; p++) { r.part[p] = sqrt(r.part[p]); }
    return r;
}

static Bf16Measured bf16_measured(const Trainer* tr) {
    for (size_t i = 0; i < sizeof BF16_MEASURED / sizeof BF16_MEASURED[0]; i++) {
        if (!strcmp(BF16_MEASURED[i].trainer, tr->name)) { return BF16_MEASURED[i]; }
    }
    die("%s: no errors of bf16 are known of this trainer", tr->name);
}

// Is what was found at most `times` as much as what was measured?
static bool bf16_within(const Bf16Error* found, const Bf16Error* measured, double times) {
    bool good = found->all <= times * measured->all && found->small <= times * measured->small;
    for (int k = 0; k < N_PARTS; k++) { good = good && found->part[k] <= times * measured->part[k]; }
    return good;
}

static Bf16Error bf16_error(double all, const double* part, double small) {
    Bf16Error e = {all, {part[0], part[1], part[2]}, small};
    return e;
}

// bf16 against fp32: errors of the whole gradient and of each tensor, in percent of its norm.
static void golden_rounded(const Trainer* tr, const char* path, bool table) {
    Golden g = golden_open(path);
    char title[300];
    void* m = make_model(tr, &g.config, g.B, g.T, 0);
    golden_weights(&g, tr, m, path);
    if (table) { printf("%s (%s)\n", path, tr->name); }
    Frobenius f = frobenius(tr, m, g.tokens, g.targets, g.B, g.T, &g.config, table);
    const char* base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    snprintf(title, sizeof title, "%s golden %s", tr->name, base);
    Bf16Error found = bf16_error(f.all, f.part_worst, f.worst_small);
    Bf16Measured measured = bf16_measured(tr);
    bool good = bf16_within(&found, &measured.golden, 1.5) && fabs(f.loss - f.want_loss) <= 0.01 * f.want_loss;
    verdict(good, title, "relative error %.3f in all, worst %.3f (%s)", f.all, f.worst, f.name);
    tr->destroy(m);
    safetensors_close(&g.file);
}

static void golden_case(const Trainer* tr, const char* path, bool table) {
    if (tr->exact) {
        golden_exact(tr, path, table);
    } else {
        golden_rounded(tr, path, table);
    }
}

// Tensors of a file to be written; all are four bytes an element.
typedef struct {
    StEntry* entries;
    const void** data;
    int n;
} GoldenParts;

static void golden_part(GoldenParts* p, const char* name, DType dtype, int ndim, const size_t* shape,
                        const void* data) {
    StEntry entry = {name, dtype, ndim, {shape[0], ndim > 1 ? shape[1] : 0, ndim > 2 ? shape[2] : 0}};
    p->entries[p->n] = entry;
    p->data[p->n++] = data;
}

static void golden_save(const GoldenParts* p, const char* path, const Config* c) {
    Text json = {NULL, 0, 0};
    Error e = {{0}};
    StWriter w;
    config_to_json(c, "float32", &json);
    const char* const metadata[2] = {"config", json.text};
    bool good = st_writer_open(&w, path, p->entries, p->n, metadata, 1, &e);
    for (int i = 0; good && i < p->n; i++) {
        size_t numel = 1;
        for (int d = 0; d < p->entries[i].ndim; d++) { numel *= p->entries[i].shape[d]; }
        good = st_writer_put(&w, p->data[i], numel * 4, &e);
    }
    if (!good || !st_writer_close(&w, NULL, NULL, &e)) { die("%s", e.text); }
    text_free(&json);
}

// A model of random weights, a batch of tokens and what this trainer makes of them: logits, loss, gradients.
static void golden_write(const Trainer* tr, const char* path, const Config* c, int B, int T, uint64_t seed) {
    void* m = make_model(tr, c, B, T, 0);
    const TensorList* list = tr->tensors(m);
    size_t N = (size_t)B * (size_t)T, shape[3] = {(size_t)B, (size_t)T, (size_t)c->vocab_size}, one = 1, at = 0;
    int32_t *tokens = random_tokens(seed, N, c->vocab_size), *targets = random_tokens(seed + 1000, N, c->vocab_size);
    for (size_t i = 1; i < N; i += 5) { targets[i] = -100; }
    perturb(tr, m, c, seed);
    float* logits = floats(N * shape[2]);
    tr->forward(m, tokens, targets, B, T, logits);
    float loss = (float)mean_gradients(tr, m, tokens, targets, B, T);
    float *weights = get_all(tr, m, STATE_WEIGHT), *gradients = get_all(tr, m, STATE_GRADIENT);
    char(*names)[ST_NAME_SIZE] =
        (char(*)[ST_NAME_SIZE])alloc_or_die((size_t)list->n, ST_NAME_SIZE, "names of gradients");
    GoldenParts parts = {(StEntry*)alloc_or_die(2 * (size_t)list->n + 4, sizeof(StEntry), "a golden case"),
                         (const void**)alloc_or_die(2 * (size_t)list->n + 4, sizeof(void*), "a golden case"), 0};
    golden_part(&parts, "golden.tokens", DT_I32, 2, shape, tokens);
    golden_part(&parts, "golden.targets", DT_I32, 2, shape, targets);
    golden_part(&parts, "golden.logits", DT_F32, 3, shape, logits);
    golden_part(&parts, "golden.loss", DT_F32, 1, &one, &loss);
    for (int i = 0; i < list->n; i++) {
        const TensorSpec* s = &list->specs[i];
        snprintf(names[i], sizeof names[i], "grad.%s", s->name);
        golden_part(&parts, s->name, DT_F32, s->ndim, s->shape, weights + at);
        golden_part(&parts, names[i], DT_F32, s->ndim, s->shape, gradients + at);
        at += s->numel;
    }
    golden_save(&parts, path, c);
    tr->destroy(m);
    free(tokens);
    free(targets);
    free(logits);
    free(weights);
    free(gradients);
    free(names);
    free(parts.entries);
    free(parts.data);
}

// --write: one case of every kind of attention, then models drawn at random.
static void golden_write_cases(const Trainer* tr, const char* dir, int n) {
    Rng rng = rng_make(23, 1);
    Error e = {{0}};
    if (!make_dirs(dir, &e)) { die("%s", e.text); }
    for (int i = 0; i < n; i++) {
        char name[64], path[PATH_SIZE];
        int B = 2, T = 100;
        Config c =
            i < ATTENTION_KIND_COUNT ? small_config(ATTENTION_KINDS[i].name) : random_config(&rng, false, &B, &T);
        snprintf(name, sizeof name, "random-%03d", i);
        path_join(path, sizeof path, dir, i < ATTENTION_KIND_COUNT ? ATTENTION_KINDS[i].name : name);
        size_t end = strlen(path);
        snprintf(path + end, sizeof path - end, ".safetensors");
        golden_write(tr, path, &c, B, T, (uint64_t)i);
    }
    printf("%d golden cases of %s in %s\n", n, tr->name, dir);
}

static void golden_directory(const Trainer* tr) {
    const char* const places[] = {"dev/golden", "../dev/golden", "../../dev/golden"};
    char* names[256];
    int n = 0;
    for (int p = 0; p < 3 && !n; p++) {
        DIR* d = opendir(places[p]);
        for (struct dirent* f = d ? readdir(d) : NULL; f && n < 256; f = readdir(d)) {
            size_t length = strlen(f->d_name);
            if (length < 12 || strcmp(f->d_name + length - 12, ".safetensors")) { continue; }
            names[n] = (char*)alloc_or_die(PATH_SIZE, 1, "a path");
            path_join(names[n++], PATH_SIZE, places[p], f->d_name);
        }
        if (d) { closedir(d); }
    }
    qsort(names, (size_t)n, sizeof names[0], compare_texts);
    if (!n) { verdict(false, "golden cases", "none found: run from the repository"); }
    for (int i = 0; i < n; i++) {
        golden_case(tr, names[i], false);
        free(names[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Finite differences, in double. A layer is a function from some arrays to an output; the scalar is sum(output * r), r
// random.

typedef struct {
    const char* name;
    double *x, *dx;
    size_t n;
} Argument;  // dx: what the backward pass says
typedef double (*Scalar)(void* ctx);

// Central differences of every element (or of at most `most`, spread out) of each argument against dx.
static Worst differences(const Argument* args, int n, Scalar f, void* ctx, size_t most) {
    Worst w = {0, 0, 0};
    for (int a = 0; a < n; a++) {
        size_t stride = args[a].n > most ? args[a].n / most : 1;
        double largest = 0;
        for (size_t i = 0; i < args[a].n; i++) { largest = fmax(largest, fabs(args[a].dx[i])); }
        for (size_t i = 0; i < args[a].n; i += stride) {
            double x = args[a].x[i], h = 1e-5 * fmax(1, fabs(x));
            args[a].x[i] = x + h;
            double up = f(ctx);
            args[a].x[i] = x - h;
            double down = f(ctx);
            args[a].x[i] = x;
            worst_add(&w, args[a].dx[i], (up - down) / (2 * h), DIFFERENCES.atol + DIFFERENCES.rtol * fmax(largest, 1),
                      i);
        }
    }
    return w;
}

static double dot_product(const double* a, const double* b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) { sum += a[i] * b[i]; }
    return sum;
}

// Everything a layer test may need; a layer uses what it uses.
typedef struct {
    int N, C, OC, T, heads, HS;
    double *x, *w, *w2, *out, *r, *aux, *parts;
    double *dx, *dw, *dw2;
    int32_t* ids;
    unsigned char* flags;
    double scale;
} LayerTest;

static LayerTest layer_test(uint64_t seed, int N, int C, int OC) {
    Rng rng = rng_make(seed, 5);
    LayerTest t;
    memset(&t, 0, sizeof t);
    size_t big = (size_t)(N + 1) * (size_t)(C + OC + 1) + (size_t)C * (size_t)OC;
    t.N = N;
    t.C = C;
    t.OC = OC;
    t.x = random_doubles(&rng, big);
    t.w = random_doubles(&rng, big);
    t.w2 = random_doubles(&rng, big);
    t.r = random_doubles(&rng, big);
    t.out = doubles(big);
    t.aux = doubles(big);
    t.dx = doubles(big);
    t.dw = doubles(big);
    t.dw2 = doubles(big);
    t.parts = doubles((size_t)NORM_PARTS * (size_t)(C + 1));
    t.ids = random_tokens(seed, (size_t)N, OC);
    t.flags = (unsigned char*)alloc_or_die((size_t)N, 1, "flags");
    return t;
}

static void layer_test_free(LayerTest* t) {
    void* const all[] = {t->x, t->w, t->w2, t->out, t->r, t->aux, t->parts, t->dx, t->dw, t->dw2, t->ids, t->flags};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) { free(all[i]); }
}

// Of all layers, or of those whose name --only asks for.
static void layer_verdict(const char* name, LayerTest* t, const Argument* args, int n, Scalar f) {
    char title[128];
    if (wanted("layers") || wanted(name)) {
        Worst w = differences(args, n, f, t, 400);
        snprintf(title, sizeof title, "differences %s N=%d C=%d", name, t->N, t->C);
        verdict(w.worst <= 1, title, "error/tolerance %.3f", w.worst);
    }
    layer_test_free(t);
}

static double scalar_embedding(void* p) {
    LayerTest* t = (LayerTest*)p;
    embedding_forward(t->out, t->ids, t->w, t->N, t->C);
    return dot_product(t->out, t->r, (size_t)t->N * (size_t)t->C);
}
static double scalar_matmul(void* p) {
    LayerTest* t = (LayerTest*)p;
    matmul_forward(t->out, t->x, t->w, t->N, t->C, t->OC, NULL);
    return dot_product(t->out, t->r, (size_t)t->N * (size_t)t->OC);
}
static double scalar_rmsnorm(void* p) {
    LayerTest* t = (LayerTest*)p;
    rmsnorm_forward(t->out, t->aux, t->x, t->w, t->N, t->C, 1e-5, t->scale);
    return dot_product(t->out, t->r, (size_t)t->N * (size_t)t->C);
}
static double scalar_swiglu(void* p) {
    LayerTest* t = (LayerTest*)p;
    swiglu_forward(t->out, t->x, t->w, (size_t)t->N * (size_t)t->C);
    return dot_product(t->out, t->r, (size_t)t->N * (size_t)t->C);
}
static double scalar_gate(void* p) {
    LayerTest* t = (LayerTest*)p;
    head_gate_forward(t->out, t->x, t->w, t->w2, t->N, t->C);
    return dot_product(t->out, t->r, (size_t)t->N * (size_t)t->C);
}
static double scalar_crossentropy(void* p) {
    LayerTest* t = (LayerTest*)p;
    double sum = 0;
    memcpy(t->out, t->x, (size_t)t->N * (size_t)t->C * sizeof(double));
    crossentropy_forward_backward(t->aux, t->flags, t->out, t->ids, t->N, t->C, 1, false);
    for (int n = 0; n < t->N; n++) { sum += t->aux[n]; }
    return sum * 0.3;
}
static double scalar_lambda(void* p) {
    LayerTest* t = (LayerTest*)p;
    Lambda l = {t->x, t->x + t->HS, t->x + 2 * t->HS, t->x + 3 * t->HS};
    diff_lambda_forward(t->out, &l, 0.3, 4, t->HS);
    return dot_product(t->out, t->r, 8);
}
static double scalar_rope(void* p) {
    LayerTest* t = (LayerTest*)p;
    size_t n = (size_t)t->N * (size_t)t->C;
    memcpy(t->out, t->x, n * sizeof(double));
    rope_forward(t->out, t->w, t->w2, 1, t->N, t->C / t->HS, t->HS, 1);
    return dot_product(t->out, t->r, n);
}

static void test_layers(void) {
    const int shapes[][3] = {{1, 2, 1}, {3, 5, 7}, {7, 24, 37}, {65, 9, 31}};  // N, C, OC
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        int N = shapes[s][0], C = shapes[s][1], OC = shapes[s][2];
        size_t NC = (size_t)N * (size_t)C;
        {
            LayerTest t = layer_test(1 + s, N, C, OC);
            embedding_backward(t.dw, t.r, t.ids, N, C);
            Argument args[] = {{"weight", t.w, t.dw, (size_t)OC * (size_t)C}};
            layer_verdict("embedding", &t, args, 1, scalar_embedding);
        }
        {
            LayerTest t = layer_test(2 + s, N, C, OC);
            matmul_backward(t.dx, t.dw, t.r, t.x, t.w, N, C, OC, false, NULL);
            Argument args[] = {{"inp", t.x, t.dx, NC}, {"weight", t.w, t.dw, (size_t)OC * (size_t)C}};
            layer_verdict("matmul", &t, args, 2, scalar_matmul);
        }
        {
            LayerTest t = layer_test(3 + s, N, C, OC);
            t.scale = 0.7;
            scalar_rmsnorm(&t);
            rmsnorm_backward(t.dx, t.dw, t.r, t.x, t.w, t.aux, N, C, t.scale, t.parts, false);
            Argument args[] = {{"inp", t.x, t.dx, NC}, {"weight", t.w, t.dw, (size_t)C}};
            layer_verdict("rmsnorm", &t, args, 2, scalar_rmsnorm);
        }
        {
            LayerTest t = layer_test(4 + s, N, C, OC);
            swiglu_backward(t.dx, t.dw, t.out, t.r, t.x, t.w, NC);
            Argument args[] = {{"gate", t.x, t.dx, NC}, {"up", t.w, t.dw, NC}};
            layer_verdict("swiglu", &t, args, 2, scalar_swiglu);
        }
        {
            LayerTest t = layer_test(5 + s, N, C, OC);
            head_gate_backward(t.dx, t.dw, t.dw2, t.r, t.x, t.w, t.w2, N, C, t.parts);
            Argument args[] = {{"inp", t.x, t.dx, NC}, {"weight", t.w, t.dw, (size_t)C}, {"bias", t.w2, t.dw2, 1}};
            layer_verdict("head_gate", &t, args, 3, scalar_gate);
        }
        {
            LayerTest t = layer_test(6 + s, N, C, C);  // C is the vocabulary here
            if (N > 2) { t.ids[1] = -100; }
            memcpy(t.dx, t.x, NC * sizeof(double));
            crossentropy_forward_backward(t.aux, t.flags, t.dx, t.ids, N, C, 0.3, true);
            Argument args[] = {{"logits", t.x, t.dx, NC}};
            layer_verdict("crossentropy", &t, args, 1, scalar_crossentropy);
        }
    }
    for (int T = 1; T <= 9; T += 4) {
        Config c = small_config("transformer");
        LayerTest t = layer_test(7, T, 24, 4);
        t.HS = 6;
        rope_table(t.w, t.w2, &c, T);
        memcpy(t.dx, t.r, (size_t)T * 24 * sizeof(double));
        rope_backward(t.dx, t.w, t.w2, 1, T, 4, 6);
        Argument args[] = {{"x", t.x, t.dx, (size_t)T * 24}};
        layer_verdict("rope", &t, args, 1, scalar_rope);
    }
    LayerTest t = layer_test(8, 4, 5, 3);
    t.HS = 5;
    for (int i = 0; i < 20; i++) { t.x[i] *= 0.4; }
    Lambda l = {t.x, t.x + 5, t.x + 10, t.x + 15};
    diff_lambda_backward(t.dx, t.dx + 5, t.dx + 10, t.dx + 15, t.r, &l, 4, 5);
    Argument args[] = {{"lambda", t.x, t.dx, 20}};
    layer_verdict("diff lambda", &t, args, 1, scalar_lambda);
}

// ---- attention: each step on and off, at lengths around the kernel's and the chunk's

typedef struct {
    Attention a;
    double *q, *k, *v, *out, *stats, *r, *scratch, *sum_memory;
    double *conv_pre, *conv_post, *mix_pre, *mix_post;
} AttentionTest;

static double scalar_attention(void* p) {
    AttentionTest* t = (AttentionTest*)p;
    attention_forward(t->out, t->stats, t->q, t->k, t->v, &t->a, t->scratch);
    return dot_product(t->out, t->r, (size_t)t->a.B * (size_t)t->a.T * (size_t)t->a.NH * (size_t)t->a.HS);
}

typedef struct {
    const char* name;
    int NH, NKV, cq, ck, pre, post, ch_pre, ch_post;
} AttentionCase;
static const AttentionCase ATTENTION_CASES[] = {
    {"scores, softmax, values", 2, 2, 1, 1, 0, 0, 0, 0}, {"grouped keys", 4, 2, 1, 1, 0, 0, 0, 0},
    {"kq_conv before", 2, 2, 6, 11, 1, 0, 0, 0},         {"kq_conv after", 2, 2, 6, 11, 0, 1, 0, 0},
    {"kq_conv 2x15", 2, 2, 2, 15, 1, 0, 0, 0},           {"kq_conv 9x3 both", 1, 1, 9, 3, 1, 1, 0, 0},
    {"kq_conv 1x5 both", 2, 1, 1, 5, 1, 1, 0, 0},        {"kq_conv 3x1", 2, 2, 3, 1, 1, 0, 0, 0},
    {"head_mix before", 4, 4, 1, 1, 0, 0, 4, 0},         {"head_mix after", 4, 4, 1, 1, 0, 0, 0, 2},
    {"head_mix 2 and 3", 6, 3, 1, 1, 0, 0, 2, 3},        {"everything", 4, 2, 6, 11, 1, 1, 4, 2},
    {"everything 4x7", 3, 3, 4, 7, 1, 1, 3, 3},
};

static void test_attention_case(const AttentionCase* s, int B, int T, int chunk) {
    Rng rng = rng_make(11, (uint64_t)T);
    int HS = 4;
    char title[128];
    size_t qn = (size_t)B * (size_t)T * (size_t)s->NH * (size_t)HS,
           kn = (size_t)B * (size_t)T * (size_t)s->NKV * (size_t)HS;
    size_t kernel = (size_t)s->NH * (size_t)s->cq * (size_t)s->ck, pre = (size_t)s->NH * (size_t)s->ch_pre,
           post = (size_t)s->NH * (size_t)s->ch_post;
    AttentionTest t;
    memset(&t, 0, sizeof t);
    t.q = random_doubles(&rng, qn);
    t.k = random_doubles(&rng, kn);
    t.v = random_doubles(&rng, kn);
    t.r = random_doubles(&rng, qn);
    t.conv_pre = random_doubles(&rng, kernel);
    t.conv_post = random_doubles(&rng, kernel);
    t.mix_pre = random_doubles(&rng, pre + 1);
    t.mix_post = random_doubles(&rng, post + 1);
    for (size_t i = 0; i < kernel; i++) {
        t.conv_pre[i] *= 0.2;
        t.conv_post[i] *= 0.2;
    }
    t.out = doubles(qn);
    t.stats = doubles(2 * (size_t)B * (size_t)s->NH * (size_t)T);
    Attention a = {B,
                   T,
                   s->NH,
                   s->NKV,
                   HS,
                   s->cq,
                   s->ck,
                   s->ch_pre,
                   s->ch_post,
                   s->pre ? t.conv_pre : NULL,
                   s->post ? t.conv_post : NULL,
                   s->ch_pre ? t.mix_pre : NULL,
                   s->ch_post ? t.mix_post : NULL,
                   min_int(chunk, T),
                   true,
                   NULL};
    t.a = a;
    t.scratch = doubles((size_t)omp_get_max_threads() * ATTENTION_TILES * attention_tile_size(&a));
    AttentionSums as;
    double *sums = doubles(carve_sums(&as, &a, NULL) + 1), *d = doubles(2 * qn + 2 * kn + 2 * kernel + pre + post + 4);
    carve_sums(&as, &a, sums);
    double *dq = d, *dk = dq + qn, *dv = dk + kn, *dcp = dv + kn, *dco = dcp + kernel, *dmp = dco + kernel,
           *dmo = dmp + pre;
    scalar_attention(&t);
    attention_backward(dq, dk, dv, &as, t.r, t.q, t.k, t.v, t.stats, &a, t.scratch);
    Argument args[7] = {{"q", t.q, dq, qn}, {"k", t.k, dk, kn}, {"v", t.v, dv, kn}};
    int n = 3;
    if (s->pre) {
        attention_sums_add(dcp, as.conv_pre, B, as.n, kernel);
        Argument x = {"conv_pre", t.conv_pre, dcp, kernel};
        args[n++] = x;
    }
    if (s->post) {
        attention_sums_add(dco, as.conv_post, B, as.n, kernel);
        Argument x = {"conv_post", t.conv_post, dco, kernel};
        args[n++] = x;
    }
    if (s->ch_pre) {
        attention_sums_add(dmp, as.mix_pre, B, as.n, pre);
        Argument x = {"mix_pre", t.mix_pre, dmp, pre};
        args[n++] = x;
    }
    if (s->ch_post) {
        attention_sums_add(dmo, as.mix_post, B, as.n, post);
        Argument x = {"mix_post", t.mix_post, dmo, post};
        args[n++] = x;
    }
    Worst w = differences(args, n, scalar_attention, &t, 60);
    snprintf(title, sizeof title, "differences attention %s T=%d", s->name, T);
    verdict(w.worst <= 1, title, "B=%d chunk=%d error/tolerance %.3f", B, a.chunk, w.worst);
    void* const all[] = {t.q,   t.k,     t.v,       t.r,  t.conv_pre, t.conv_post, t.mix_pre, t.mix_post,
                         t.out, t.stats, t.scratch, sums, d};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) { free(all[i]); }
}

static void test_attention(void) {
    for (size_t i = 0; i < sizeof ATTENTION_CASES / sizeof ATTENTION_CASES[0]; i++) {
        if (!wanted("attention") && !wanted(ATTENTION_CASES[i].name)) { continue; }
        test_attention_case(&ATTENTION_CASES[i], 2, 1, 16);  // one token
        test_attention_case(&ATTENTION_CASES[i], 1, 4, 16);  // shorter than most kernels
        test_attention_case(&ATTENTION_CASES[i], 2, 7, 3);   // chunks smaller than the halo, T no multiple of them
        test_attention_case(&ATTENTION_CASES[i], 1, 37, 16);
    }
}

// ---- the whole model, in double: forward, loss and backward of every kind

typedef struct {
    Model* m;
    const int32_t *tokens, *targets;
    int B, T, counted;
} ModelTest;

static double scalar_model(void* p) {
    ModelTest* t = (ModelTest*)p;
    model_forward(t->m, t->tokens, t->B, t->T);
    return model_loss(t->m, t->targets, t->B * t->T, 0, false, NULL) / t->counted;
}

static void add_floats(void* state, void* sum, const void* more, size_t n) {
    (void)state;
    for (size_t i = 0; i < n; i++) { ((float*)sum)[i] += ((const float*)more)[i]; }
}

static void initialise_double(Model* m, uint64_t seed) {
    for (int i = 0; i < m->tensors.n; i++) {
        const TensorSpec* s = &m->tensors.specs[i];
        float* w = floats(s->numel);
        tensor_initialise(w, s, i, &m->config, seed);
        for (size_t k = 0; k < s->numel; k++) { m->weights[s->offset + k] = (double)w[k]; }
        free(w);
    }
}

static void test_model_differences(void) {
    for (int k = 0; k < ATTENTION_KIND_COUNT + 1; k++) {
        Config c = small_config(ATTENTION_KINDS[k % ATTENTION_KIND_COUNT].name);
        int B = 2, T = 13;
        char title[128];
        if (k == ATTENTION_KIND_COUNT) {
            c.num_key_value_heads = 2;
            c.tie_word_embeddings = false;
            c.vocab_size = 41;
        }
        Model* m = model_create(&c, B, T, 5, true);
        initialise_double(m, 3);
        Rng rng = rng_make(4, 4);
        for (size_t i = 0; i < m->tensors.numel; i++) { m->weights[i] += 0.1 * rng_normal(&rng); }
        int32_t *tokens = random_tokens(1, (size_t)B * T, c.vocab_size),
                *targets = random_tokens(2, (size_t)B * T, c.vocab_size);
        targets[3] = targets[4] = -100;
        ModelTest t = {m, tokens, targets, B, T, B * T - 2};
        model_forward(m, tokens, B, T);
        model_loss(m, targets, B * T, 1.0 / t.counted, true, NULL);
        model_backward(m, tokens, B, T);
        Worst worst = {0, 0, 0};
        const char* where = "";
        for (int i = 0; i < m->tensors.n; i++) {
            size_t o = m->tensors.specs[i].offset;
            Argument arg = {m->tensors.specs[i].name, m->weights + o, m->grads + o, m->tensors.specs[i].numel};
            Worst w = differences(&arg, 1, scalar_model, &t, 12);
            if (!(w.worst <= worst.worst)) {
                worst = w;
                where = arg.name;
            }
        }
        snprintf(title, sizeof title, "differences model %s%s", ATTENTION_KINDS[k % ATTENTION_KIND_COUNT].name,
                 k == ATTENTION_KIND_COUNT ? " grouped untied" : "");
        verdict(worst.worst <= 1, title, "error/tolerance %.3f (%s)", worst.worst, where);
        model_free(m);
        free(tokens);
        free(targets);
    }
}

// A step in micro-batches with different numbers of counted targets is that of one batch: loss, norm, gradients, the
// weights after it.
static void test_accumulation(void) {
    Config c = small_config("mta");
    int B = 3, T = 9;
    Model *a = model_create(&c, B, T, 0, true), *b = model_create(&c, B, T, 0, true);
    int32_t *tokens = random_tokens(1, (size_t)B * T, c.vocab_size),
            *targets = random_tokens(2, (size_t)B * T, c.vocab_size);
    AdamW hyper = {1e-2, 0.9, 0.98, 1e-8, 0.05, 1};
    for (int i = 0; i < 7; i++) { targets[i] = -100; }
    Step step = one_batch(tokens, targets, B, T, 1, hyper);
    initialise_double(a, 1);
    initialise_double(b, 1);
    StepResult whole = train_step(a, &step);
    step.B = 2;  // two sequences, then one
    StepResult parts = train_step(b, &step);
    Worst g = compare_doubles(b->grads, a->grads, a->tensors.numel, ROUNDING_FP64),
          w = compare_doubles(b->weights, a->weights, a->tensors.numel, ROUNDING_FP64);
    bool same = fabs(parts.loss - whole.loss) < 1e-12 && fabs(parts.grad_norm - whole.grad_norm) < 1e-12;
    verdict(g.worst <= 1 && w.worst <= 1 && same, "micro-batches add up to the step",
            "error/tolerance %.3f, of the weights %.3f", g.worst, w.worst);
    model_free(a);
    model_free(b);
    free(tokens);
    free(targets);
}

// Gradients of shards are added as the tree has it, ((0 1) (2 3)) ((4 5) 6) for seven: in fp32 to the bit, and shards
// of one window each or of none give the step's loss. Then any rank's subtree is the sum of its own shards.
static void test_shards(void) {
    const Trainer* tr = trainer_cpu();
    Config c = small_config("mta");
    enum { T = 9, MOST = 7 };
    AdamW hyper = {0, 0.9, 0.98, 1e-8, 0, 0};
    Ranks alone;
    memset(&alone, 0, sizeof alone);
    alone.size = 1;
    int32_t *tokens = random_tokens(1, MOST * T, c.vocab_size), *targets = random_tokens(2, MOST * T, c.vocab_size);
    for (int shards = 1; shards <= MOST; shards++) {
        double losses[MOST], sum = 0;
        void* parts[MOST];
        size_t n = 0;
        for (int v = 0; v < shards; v++) {  // each window's gradients by themselves
            void* m = make_model(tr, &c, 2, T, 0);
            perturb(tr, m, &c, 1);
            sum += tr->forward_backward(m, tokens + v * T, targets + v * T, 1, T, 1.0 / (shards * T));
            parts[v] = get_all(tr, m, STATE_GRADIENT);
            n = tr->tensors(m)->parameters;
            tr->destroy(m);
        }
        const RanksSum floats_sum = {add_floats, NULL, sizeof(float), NULL};
        int to = shards / 2;  // whichever part takes the sum
        tree_add(parts, shards, to, n, &floats_sum);
        void* m = make_model(tr, &c, 2, T, 0);
        perturb(tr, m, &c, 1);
        tr->share(m, &alone, shards);
        Step step = {tokens, targets, shards, 2, T, (int64_t)shards * T, 1, hyper, shards, {0, (size_t)shards},
                     losses, false};
        StepResult result = tr->train_step(m, &step);
        float* got = get_all(tr, m, STATE_GRADIENT);
        verdict(!memcmp(got, parts[to], n * sizeof(float)) && result.complete && result.loss == sum / (shards * T),
                "shards are added as the tree has it", "%d shards, loss %.9g, wanted %.9g", shards, result.loss,
                sum / (shards * T));
        for (int v = 0; v < shards; v++) { free(parts[v]); }
        free(got);
        tr->destroy(m);
    }
    bool good = shards_divide(12, 3) && shards_divide(12, 1) && !shards_divide(12, 2) && !shards_divide(8, 3) &&
                shards_divide(8, 8) && !shards_divide(8, 16) && shards_waiting(1) == 0 && shards_waiting(12) == 3;
    verdict(good, "who can share out which shards", "");
    free(tokens);
    free(targets);
}

// A window that convolution kernels at the identity, mixers at the identity leave plain attention, in double to
// rounding.
static void test_identity(void) {
    Config plain = small_config("transformer"), mta = small_config("mta-full");
    mta.head_norm = HEAD_NORM_NONE;
    mta.head_gate = false;
    for (int l = 0; l < mta.num_hidden_layers; l++) { mta.kq_conv_layer[l] = true; }
    int B = 2, T = 33;
    size_t n = (size_t)B * T * plain.vocab_size;
    Model *a = model_create(&plain, B, T, 0, true), *b = model_create(&mta, B, T, 0, true);
    int32_t* tokens = random_tokens(5, (size_t)B * T, plain.vocab_size);
    float *la = floats(n), *lb = floats(n);
    initialise_double(b, 9);
    for (int i = 0; i < a->tensors.n; i++) {
        int j = tensor_find(&b->tensors, a->tensors.specs[i].name);
        memcpy(a->weights + a->tensors.specs[i].offset, b->weights + b->tensors.specs[j].offset,
               a->tensors.specs[i].numel * sizeof(real));
    }
    model_forward(a, tokens, B, T);
    model_loss(a, tokens, B * T, 0, false, la);
    model_forward(b, tokens, B, T);
    model_loss(b, tokens, B * T, 0, false, lb);
    Tolerance rounding = {1e-7, 1e-7};  // logits leave as fp32
    Worst w = compare_floats(lb, la, n, rounding);
    verdict(w.worst <= 1, "identity kernels equal plain attention", "error/tolerance %.3f", w.worst);
    model_free(a);
    model_free(b);
    free(tokens);
    free(la);
    free(lb);
}

// The plan that is printed, at growing T: attention's scratch and all else must grow in step with T.
static void test_memory_plan(void) {
    bool good = true;
    double worst = 0;
    for (int k = 0; k < ATTENTION_KIND_COUNT; k++) {
        Config c = small_config(ATTENTION_KINDS[k].name);
        size_t bytes[4];
        for (int i = 0; i < 4; i++) {
            MemoryPlan p = model_memory(&c, 1, 1024 << i, true);
            bytes[i] = p.activations + p.scratch;
        }
        for (int i = 1; i < 4; i++) {
            double growth = (double)bytes[i] / (double)bytes[i - 1];
            worst = fmax(worst, growth);
            good = good && growth <= 2.05;
        }
    }
    verdict(good, "memory grows with T, not with T x T", "doubling T multiplies it by at most %.3f", worst);
}

// ---- how evenly attention's work falls on threads, many more than this machine has: counted, not measured

// A piece of work; it waits until `waits` others, the numbers after[], are done.
typedef struct {
    double cost, ready;
    int waits, n_before, before[2 * MAX_HEADS];  // before[]: the pieces that wait for this one
} Piece;

static void piece_follows(Piece* pieces, int first, int then) {
    if (first < 0) { return; }
    assert(pieces[first].n_before < 2 * MAX_HEADS);
    pieces[first].before[pieces[first].n_before++] = then;
    pieces[then].waits++;
}

// Share of the time of so many threads that n pieces keep busy: a thread that is free takes what has been ready
// longest.
static double busy_share(Piece* pieces, int n, int threads) {
    double *until = doubles((size_t)threads), total = 0, end = 0;
    for (int done = 0; done < n; done++) {
        int thread = 0, next = -1;
        for (int t = 1; t < threads; t++) {
            if (until[t] < until[thread]) { thread = t; }
        }
        for (int i = 0; i < n; i++) {
            if (pieces[i].waits == 0 && (next < 0 || pieces[i].ready < pieces[next].ready)) { next = i; }
        }
        Piece* p = &pieces[next];
        until[thread] = fmax(until[thread], p->ready) + p->cost;
        end = fmax(end, until[thread]);
        total += p->cost;
        p->waits = -1;
        for (int i = 0; i < p->n_before; i++) {
            Piece* later = &pieces[p->before[i]];
            later->ready = fmax(later->ready, until[thread]);
            later->waits--;
        }
    }
    free(until);
    return total / (threads * end);
}

// The pieces of one pass over one sequence, as attention_forward and attention_backward make them. A product of a head,
// rows times keys, costs 1 each: of five in the backward pass two add to dk and dv, in the order of chunks.
// Convolutions, mixing and softmax count nothing; with them what waits for its turn is a smaller part.
static int attention_pieces(Piece* pieces, const Attention* a, bool backward) {
    int H = attention_group(a), groups = a->NH / H, chunks = (a->T + a->chunk - 1) / a->chunk, n = 0;
    bool together = backward && attention_together(a);
    int parts = !together && attention_heads_apart(a) ? H : 1, slots = attention_slots(a), last[2 * MAX_HEADS];
    int* slot_first = (int*)alloc_or_die((size_t)slots, sizeof(int), "slots");
    for (int i = 0; i < 2 * MAX_HEADS; i++) { last[i] = -1; }
    for (int task = 0; task < groups * chunks; task++) {
        int chunk = backward ? task / groups : chunks - 1 - task / groups, lo = chunk * a->chunk, maps = n;
        int hi = min_int(lo + a->chunk, a->T), added = maps + parts, slot = task % slots;
        if (together) {  // one piece, after the chunk before and what was in its slot
            pieces[n].cost = 5.0 * (hi - lo) * hi * H;
            piece_follows(pieces, task < groups ? -1 : n - groups, n);
            piece_follows(pieces, task < slots ? -1 : n - slots, n);
            n++;
            continue;
        }
        for (int i = 0; i < parts; i++, n++) {
            pieces[n].cost = (double)(hi - lo) * hi * (backward ? 3 : 2) * H / parts;
            for (int x = 0; backward && task >= slots && x < 2 * H; x++) {
                piece_follows(pieces, slot_first[slot] + x, n);
            }
        }
        for (int x = 0; backward && x < 2 * H; x++, n++) {  // dv and dk of each head
            int* before = &last[task % groups * 2 * H + x];
            pieces[n].cost = (double)(hi - lo) * hi;
            for (int i = 0; i < parts; i++) { piece_follows(pieces, maps + i, n); }
            piece_follows(pieces, *before, n);
            *before = n;
        }
        slot_first[slot] = added;
    }
    free(slot_first);
    return n;
}

// One sequence of 2048 tokens of each attention of the 880M model, so that only heads and chunks are side by side.
static void test_balance(void) {
    const int threads[] = {2, 16, 64, 128}, at_least[] = {98, 95, 70, 45}, before = omp_get_max_threads();
    for (int k = 0; k < 2 * ATTENTION_KIND_COUNT; k++) {
        Config c;
        Error e = {{0}};
        char title[96], text[160] = "";
        bool good = true, backward = k % 2;
        int n = 0;
        config_from_preset(&c, preset_find("880m"));
        if (!config_set_attention(&c, ATTENTION_KINDS[k / 2].name, false, &e)) { die("%s", e.text); }
        Attention a = attention_largest(&c, 1, 2048, 0);
        for (int i = 0; i < 4; i++) {
            omp_set_num_threads(threads[i]);
            Piece* pieces =
                (Piece*)alloc_or_die(3 * (size_t)attention_tasks(&a) * (size_t)a.NH, sizeof(Piece), "pieces");
            n = attention_pieces(pieces, &a, backward);
            double percent = 100 * busy_share(pieces, n, threads[i]);
            good = good && percent >= at_least[i];
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%d threads %.0f%%", i ? ", " : "", threads[i],
                     percent);
            free(pieces);
        }
        snprintf(title, sizeof title, "balance of attention %s %s", backward ? "backward" : "forward",
                 ATTENTION_KINDS[k / 2].name);
        verdict(good, title, "%d pieces; busy: %s", n, text);
    }
    omp_set_num_threads(before);
}

// The testers tested: a wrong gradient and a NaN must be seen.
static void test_checkers(void) {
    LayerTest t = layer_test(21, 3, 5, 4);
    matmul_backward(t.dx, t.dw, t.r, t.x, t.w, 3, 5, 4, false, NULL);
    Argument args[] = {{"inp", t.x, t.dx, 15}};
    Worst before = differences(args, 1, scalar_matmul, &t, 400);
    t.dx[7] += 1e-4;
    Worst after = differences(args, 1, scalar_matmul, &t, 400);
    verdict(before.worst <= 1 && !(after.worst <= 1), "an injected gradient error is caught", "%.3f before, %.3f after",
            before.worst, after.worst);
    layer_test_free(&t);
    float want[3] = {1, 2, 3}, got[3] = {1, NAN, 3};
    Worst nan = compare_floats(got, want, 3, GOLDEN_FP32);
    verdict(!(nan.worst <= 1) && isnan(larger(NAN, 1)) && isnan(larger(1, NAN)) && larger(1, 2) == 2, "a NaN is caught",
            "error/tolerance %.3f", nan.worst);
}

// ---------------------------------------------------------------------------------------------------------------------
// Invariants of a trainer behind its table

static void title_of(char* title, size_t n, const Trainer* tr, const char* what, const char* kind) {
    snprintf(title, n, "%s %s %s", tr->name, what, kind);
}

// Change token t: every logit before t keeps its bits.
static void test_causality(const Trainer* tr, const char* kind) {
    Config c = small_config(kind);
    int T = 41, changed = 23, V = c.vocab_size;
    char title[128];
    void* m = make_model(tr, &c, 1, T, 16);
    int32_t* tokens = random_tokens(3, (size_t)T, V);
    float *a = floats((size_t)T * V), *b = floats((size_t)T * V);
    perturb(tr, m, &c, 5);
    tr->forward(m, tokens, tokens, 1, T, a);
    tokens[changed] = (tokens[changed] + 1) % V;
    tr->forward(m, tokens, tokens, 1, T, b);
    bool before = memcmp(a, b, (size_t)changed * V * sizeof(float)) == 0,
         after = memcmp(a + changed * V, b + changed * V, (size_t)V * sizeof(float)) != 0;
    title_of(title, sizeof title, tr, "causality", kind);
    verdict(before && after, title, "before token %d %s, at it %s", changed, before ? "bits kept" : "CHANGED",
            after ? "changed" : "UNCHANGED");
    tr->destroy(m);
    free(tokens);
    free(a);
    free(b);
}

// With one thread, two or five: the same bits in every gradient and in the weights after two updates.
static float* train_twice(const Trainer* tr, const char* kind, int threads) {
    Config c = small_config(kind);
    int B = 2, T = 61, before = omp_get_max_threads();
    omp_set_num_threads(threads);
    void* m = make_model(tr, &c, B, T, 16);
    int32_t *tokens = random_tokens(3, (size_t)B * T, c.vocab_size),
            *targets = random_tokens(4, (size_t)B * T, c.vocab_size);
    AdamW hyper = {1e-2, 0.9, 0.98, 1e-8, 0.05, 1};
    perturb(tr, m, &c, 5);
    for (int step = 1; step <= 2; step++) {
        Step s = one_batch(tokens, targets, B, T, step, hyper);
        tr->train_step(m, &s);
    }
    size_t n = tr->tensors(m)->parameters;
    float *weights = get_all(tr, m, STATE_WEIGHT), *grads = get_all(tr, m, STATE_GRADIENT), *both = floats(2 * n);
    memcpy(both, weights, n * sizeof(float));
    memcpy(both + n, grads, n * sizeof(float));
    tr->destroy(m);
    omp_set_num_threads(before);
    free(tokens);
    free(targets);
    free(weights);
    free(grads);
    return both;
}

static void test_determinism(const Trainer* tr, const char* kind) {
    Config c = small_config(kind);
    TensorList list;
    char title[128];
    tensor_list(&list, &c);
    size_t bytes = 2 * list.parameters * sizeof(float);
    float *one = train_twice(tr, kind, 1), *two = train_twice(tr, kind, 2), *many = train_twice(tr, kind, 5);
    title_of(title, sizeof title, tr, "same bits with 1, 2 and 5 threads", kind);
    verdict(!memcmp(one, two, bytes) && !memcmp(one, many, bytes), title, "%zu values", 2 * list.parameters);
    tensor_list_free(&list);
    free(one);
    free(two);
    free(many);
}

// The chunk changes no result beyond rounding.
static void test_chunks(const Trainer* tr, const char* kind) {
    Config c = small_config(kind);
    int B = 2, T = 70;
    const int chunks[] = {70, 1, 7, 32};
    char title[128];
    Worst worst = {0, 0, 0};
    float* want = NULL;
    int32_t *tokens = random_tokens(3, (size_t)B * T, c.vocab_size),
            *targets = random_tokens(4, (size_t)B * T, c.vocab_size);
    for (int i = 0; i < 4; i++) {
        void* m = make_model(tr, &c, B, T, chunks[i]);
        perturb(tr, m, &c, 5);
        mean_gradients(tr, m, tokens, targets, B, T);
        float* got = get_all(tr, m, STATE_GRADIENT);
        if (want) {
            Worst w = compare_floats(got, want, tr->tensors(m)->parameters, ROUNDING_FP32);
            if (!(w.worst <= worst.worst)) { worst = w; }
            free(got);
        } else {
            want = got;
        }
        tr->destroy(m);
    }
    title_of(title, sizeof title, tr, "chunks of 1, 7, 32 and 70 agree", kind);
    verdict(worst.worst <= 1, title, "error/tolerance %.3f", worst.worst);
    free(want);
    free(tokens);
    free(targets);
}

// One batch can be learnt by heart, in 150 steps at most.
static void test_overfit(const Trainer* tr, const char* kind) {
    Config c = small_config(kind);
    int B = 2, T = 16, steps = 0;
    const double learnt = 0.1;
    char title[128];
    double first = 0, last = 0;
    void* m = make_model(tr, &c, B, T, 0);
    int32_t *tokens = random_tokens(3, (size_t)B * T, c.vocab_size),
            *targets = random_tokens(4, (size_t)B * T, c.vocab_size);
    AdamW hyper = {1e-2, 0.9, 0.98, 1e-8, 0, 1};
    model_initialise(tr, m, &c, 5);
    do {
        Step s = one_batch(tokens, targets, B, T, ++steps, hyper);
        last = tr->train_step(m, &s).loss;
        if (steps == 1) { first = last; }
    } while (!(last < learnt) && steps < 150);
    title_of(title, sizeof title, tr, "overfits one batch", kind);
    verdict(last < learnt && first > 3, title, "loss %.3f to %.4f in %d steps", first, last, steps);
    tr->destroy(m);
    free(tokens);
    free(targets);
}

// AdamW against its definition, element by element in double; clipping; a gradient that is not finite changes nothing.
static void test_update(const Trainer* tr) {
    Config c = small_config("mta");
    void* m = make_model(tr, &c, 1, 4, 0);
    const TensorList* list = tr->tensors(m);
    size_t n = list->parameters;
    char title[128];
    AdamW h = {1e-2, 0.9, 0.98, 1e-8, 0.05, 0.5};
    perturb(tr, m, &c, 5);
    float *w0 = get_all(tr, m, STATE_WEIGHT), *want = floats(n), *w1, *g = floats(n);
    double *am = doubles(n), *av = doubles(n), norm = 0, returned = 0;
    for (size_t i = 0; i < n; i++) { want[i] = w0[i]; }
    for (int step = 1; step <= 3; step++) {
        Rng rng = rng_make(77, (uint64_t)step);
        norm = 0;
        for (size_t i = 0; i < n; i++) {
            g[i] = (float)rng_normal(&rng);
            norm += (double)g[i] * (double)g[i];
        }
        norm = sqrt(norm);
        float* p = g;
        for (int i = 0; i < list->n; i++) {
            tr->set(m, STATE_GRADIENT, i, p);
            p += list->specs[i].numel;
        }
        returned = tr->update(m, &h, step);
        for (size_t i = 0; i < n; i++) {
            double d = (double)g[i] * fmin(1, h.grad_clip / norm);
            am[i] = h.beta1 * am[i] + (1 - h.beta1) * d;
            av[i] = h.beta2 * av[i] + (1 - h.beta2) * d * d;
            double mh = am[i] / (1 - pow(h.beta1, step)), vh = av[i] / (1 - pow(h.beta2, step));
            want[i] = (float)((double)want[i] * (1 - h.lr * h.weight_decay) - h.lr * mh / (sqrt(vh) + h.eps));
        }
    }
    w1 = get_all(tr, m, STATE_MASTER);
    float *m1 = get_all(tr, m, STATE_M), *v1 = get_all(tr, m, STATE_V);
    Worst w = compare_floats(w1, want, n, ROUNDING_FP32);
    title_of(title, sizeof title, tr, "AdamW with decay and clipping", "");
    verdict(w.worst <= 1 && fabs(returned / norm - 1) < (tr->exact ? 1e-6 : 1e-2), title,
            "error/tolerance %.3f, norm %.6f (want %.6f)", w.worst, returned, norm);
    g[list->specs[0].numel / 2] = NAN;
    tr->set(m, STATE_GRADIENT, 0, g);
    double bad = tr->update(m, &h, 4);
    float *w2 = get_all(tr, m, STATE_MASTER), *m2 = get_all(tr, m, STATE_M), *v2 = get_all(tr, m, STATE_V);
    bool same =
        !memcmp(w1, w2, n * sizeof(float)) && !memcmp(m1, m2, n * sizeof(float)) && !memcmp(v1, v2, n * sizeof(float));
    title_of(title, sizeof title, tr, "a NaN gradient changes nothing", "");
    verdict(!isfinite(bad) && same, title, "norm %f", bad);
    tr->destroy(m);
    float* const arrays[] = {w0, w1, w2, m1, m2, v1, v2, want, g};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) { free(arrays[i]); }
    free(am);
    free(av);
}

// Every state comes back as it went in, in pieces too; the weights are the rounded master weights, and setting them
// rounds both.
static void test_states(const Trainer* tr) {
    const StateKind kinds[] = {STATE_GRADIENT, STATE_M, STATE_V, STATE_MASTER};
    Config c = small_config("mta-full");
    void* m = make_model(tr, &c, 1, 4, 0);
    char title[128];
    int wrong = 0;
    for (int i = 0; i < tr->tensors(m)->n; i++) {
        size_t n = tr->tensors(m)->specs[i].numel, half = n / 2;
        float *x = floats(n), *rounded = floats(n), *got = floats(n);
        for (int k = 0; k < 4; k++) {
            Rng rng = rng_make((uint64_t)i, (uint64_t)k);
            for (size_t j = 0; j < n; j++) { x[j] = (float)rng_normal(&rng); }
            tr->set(m, kinds[k], i, x);
            tr->get(m, kinds[k], i, 0, half, got);
            tr->get(m, kinds[k], i, half, n - half, got + half);
            wrong += memcmp(got, x, n * sizeof(float)) != 0;
        }
        for (size_t j = 0; j < n; j++) { rounded[j] = tr->rounded ? bf16_to_f32(f32_to_bf16(x[j])) : x[j]; }
        tr->get(m, STATE_WEIGHT, i, 0, half, got);
        tr->get(m, STATE_WEIGHT, i, half, n - half, got + half);
        wrong += memcmp(got, rounded, n * sizeof(float)) != 0;
        tr->set(m, STATE_WEIGHT, i, x);
        tr->get(m, STATE_MASTER, i, 0, n, got);
        wrong += memcmp(got, rounded, n * sizeof(float)) != 0;
        free(x);
        free(rounded);
        free(got);
    }
    title_of(title, sizeof title, tr, "states come back bit for bit", "");
    verdict(wrong == 0, title, "%d tensors and states differ", wrong);
    tr->destroy(m);
}

// Logits of more rows than the classifier takes at once (32 of this vocabulary on the CPU, 64 on dev/cuda_cpu), the
// middle ones not counted: losses and gradients of five sequences are those of each alone.
static void test_classifier(const Trainer* tr) {
    enum { B = 5, T = 16, N = B * T };
    Config c = small_config("transformer");
    c.vocab_size = 1 << 17;
    int32_t *tokens = random_tokens(5, N, c.vocab_size), *targets = random_tokens(6, N, c.vocab_size);
    void *all = make_model(tr, &c, B, T, 0), *one = make_model(tr, &c, 1, T, 0);
    double apart = 0, off = 0, norm = 0;
    size_t n = tr->tensors(all)->parameters;
    for (int i = 2 * T; i < 4 * T; i++) { targets[i] = -100; }
    perturb(tr, all, &c, 7);
    perturb(tr, one, &c, 7);
    double together = tr->forward_backward(all, tokens, targets, B, T, 1.0 / N);
    for (int b = 0; b < B; b++) { apart += tr->forward_backward(one, tokens + b * T, targets + b * T, 1, T, 1.0 / N); }
    float *got = get_all(tr, all, STATE_GRADIENT), *want = get_all(tr, one, STATE_GRADIENT);
    for (size_t i = 0; i < n; i++) {
        off += pow((double)got[i] - (double)want[i], 2);
        norm += pow((double)want[i], 2);
    }
    double error = sqrt(off / norm), evaluated = tr->forward(all, tokens, targets, B, T, NULL).sum;
    verdict(error < 1e-6 && fabs(together - apart) < 1e-9 * apart && evaluated == together && norm > 0,
            "classifier in chunks of rows", "%s: gradients %.1e off; loss %.9g, each alone %.9g", tr->name, error,
            together, apart);
    tr->destroy(all);
    tr->destroy(one);
    free(tokens);
    free(targets);
    free(got);
    free(want);
}

// What forward says beside the logits follows from them: each loss, the sum, which targets another id beats. The logits
// after n tokens are the last row of n.
static void test_losses(const Trainer* tr) {
    Config c = small_config("mta");
    int B = 2, T = 13, V = c.vocab_size, wrong = 0;
    char title[128];
    Worst w = {0, 0, 0}, last = {0, 0, 0};
    double sum = 0;
    void* m = make_model(tr, &c, B, T, 0);
    int32_t *tokens = random_tokens(3, (size_t)B * T, V), *targets = random_tokens(4, (size_t)B * T, V);
    float *logits = floats((size_t)B * T * V), *row = floats((size_t)V);
    perturb(tr, m, &c, 5);
    for (int i = 0; i < B * T; i += 5) { targets[i] = -100; }
    mean_loss(tr, m, tokens, targets, B, T, logits);
    for (int i = 1; i < B * T; i += 5) {  // these are right: the likeliest ids
        targets[i] = 0;
        for (int v = 1; v < V; v++) {
            if (logits[i * V + v] > logits[i * V + targets[i]]) { targets[i] = v; }
        }
    }
    Losses l = tr->forward(m, tokens, targets, B, T, logits);
    for (int i = 0; i < B * T; i++) {
        const float* x = logits + (size_t)i * V;
        bool none = targets[i] < 0, beaten = false;
        double total = 0;
        for (int v = 0; v < V; v++) {
            total += exp((double)x[v]);
            beaten = beaten || (!none && (x[v] > x[targets[i]] || (v < targets[i] && x[v] == x[targets[i]])));
        }
        double want = none ? 0 : log(total) - (double)x[targets[i]];
        worst_add(&w, (double)l.losses[i], want, 1e-5 * fmax(1, want), (size_t)i);
        wrong += l.wrong[i] != beaten;
        sum += (double)l.losses[i];
    }
    title_of(title, sizeof title, tr, "losses, their sum, beaten targets", "");
    verdict(w.worst <= 1 && wrong == 0 && l.sum == sum && sum > 0, title,
            "error/tolerance %.3f, %d flags wrong, sums %.6f and %.6f", w.worst, wrong, l.sum, sum);
    Tolerance bf16 = {0, 1e-2};
    for (int n = 1; n <= T; n += 4) {
        tr->last_logits(m, tokens, n, row);
        Worst x = compare_floats(row, logits + (size_t)(n - 1) * V, (size_t)V, tr->exact ? ROUNDING_FP32 : bf16);
        if (!(x.worst <= last.worst)) { last = x; }
    }
    title_of(title, sizeof title, tr, "last logits are the last row of logits", "");
    verdict(last.worst <= 1, title, "error/tolerance %.3f", last.worst);
    tr->destroy(m);
    free(tokens);
    free(targets);
    free(logits);
    free(row);
}

// Ignored targets give no loss and no gradient; all ignored: loss 0, gradient exactly 0.
static void test_masked(const Trainer* tr) {
    Config c = small_config("mta");
    int T = 12;
    char title[128];
    void* m = make_model(tr, &c, 1, T, 0);
    int32_t *tokens = random_tokens(3, (size_t)T, c.vocab_size), targets[12];
    for (int t = 0; t < T; t++) { targets[t] = -100; }
    perturb(tr, m, &c, 5);
    double loss = mean_gradients(tr, m, tokens, targets, 1, T), largest = 0;
    float* g = get_all(tr, m, STATE_GRADIENT);
    for (size_t i = 0; i < tr->tensors(m)->parameters; i++) { largest = larger(largest, fabs((double)g[i])); }
    title_of(title, sizeof title, tr, "nothing counted: loss and gradient 0", "");
    verdict(loss == 0 && largest == 0, title, "loss %g, largest gradient %g", loss, largest);
    free(g);
    tr->destroy(m);
    free(tokens);
}

// ---------------------------------------------------------------------------------------------------------------------
// mta/config.h and mta/run.h

static void test_config(void) {
    const struct {
        const char *model, *kind;
        size_t parameters;
    } sizes[] = {// of a transformer L (4 C^2 + 3 C FF + 2 C) + C + V C
                 {"880m", "transformer", 876553728}, {"880m", "mta", 876563136},
                 {"880m", "mta-full", 876583320},    {"880m", "talking-heads", 876566016},
                 {"880m", "diff", 876567552},        {"300m", "transformer", 388277248},
                 {"550m", "transformer", 651818240}, {"1b", "transformer", 1495894016}};
    bool good = true;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        Config c, back;
        Error e = {{0}};
        TensorList list;
        Text t = {NULL, 0, 0};
        config_from_preset(&c, preset_find(sizes[i].model));
        good = good && config_set_attention(&c, sizes[i].kind, false, &e);
        tensor_list(&list, &c);
        good = good && list.parameters == sizes[i].parameters;
        tensor_list_free(&list);
        config_to_json(&c, "float32", &t);
        Json* j = json_parse(t.text, t.n, &e);
        good = good && j && config_from_json(&back, j, false, &e) && config_same_model(&back, &c, &e);
        json_free(j);
        text_free(&t);
    }
    verdict(good, "parameter counts; config.json there and back", "%zu models", sizeof sizes / sizeof sizes[0]);
}

// "a, b, c" of the names of a table's rows, which begin with their name.
static bool names_are(const char* names, const void* rows, size_t n, size_t row) {
    Text t = {NULL, 0, 0};
    for (size_t i = 0; i < n; i++) {
        const char* name;
        memcpy(&name, (const char*)rows + i * row, sizeof name);
        text_printf(&t, "%s%s", i ? ", " : "", name);
    }
    bool same = !strcmp(t.text, names);
    text_free(&t);
    return same;
}

static void test_names(void) {
    bool models = names_are(MODEL_NAMES, PRESETS, PRESET_COUNT, sizeof PRESETS[0]);
    bool kinds = names_are(ATTENTION_NAMES, ATTENTION_KINDS, ATTENTION_KIND_COUNT, sizeof ATTENTION_KINDS[0]);
    verdict(models && kinds, "--help and refusals name every preset and attention", "%s; %s", MODEL_NAMES,
            ATTENTION_NAMES);
}

// That random_config draws every field that makes another model, so that a field forgotten there, whose layer no
// comparison of random models would ever see, is named here; and config.json of each model there and back. RoPE's
// numbers and eps have tests of their own. What LLaMA does not have makes another model: a field marked otherwise would
// be left out of a "llama"'s config.json and change on --resume without a word; only those of convolutions, kq_conv_*,
// wait for a layer that has one.
static void test_random_config(void) {
    Rng rng = rng_make(23, 1);
    bool good = true, drawn[CONFIG_FIELD_COUNT] = {false};
    int models = 200, B, T;
    Error e = {{0}};
    Config first = random_config(&rng, false, &B, &T);
    for (int k = 0; k < models && good; k++) {
        Config c = random_config(&rng, false, &B, &T), back;
        Text t = {NULL, 0, 0};
        config_to_json(&c, "float32", &t);
        Json* j = json_parse(t.text, t.n, &e);
        good = j && config_from_json(&back, j, false, &e) && config_same_model(&back, &c, &e);
        json_free(j);
        text_free(&t);
        for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
            const ConfigField* f = &CONFIG_FIELDS[i];
            bool layers = f->type == FIELD_LAYERS;
            drawn[i] = drawn[i] || f->change == CHANGE_FREE || f->part == PART_ROPE || f->part == PART_NUMBERS ||
                       (layers ? config_any_conv(&c) : config_get(&c, f) != config_get(&first, f));
        }
    }
    for (int i = 0; i < CONFIG_FIELD_COUNT && good; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        FieldChange wanted = strncmp(f->key, "kq_conv_", 8) ? CHANGE_MODEL : CHANGE_CONV;
        good = (drawn[i] || fail(&e, "random_config never draws %s", f->key)) &&
               (f->part != PART_ATTENTION || f->change == wanted ||
                fail(&e, "%s: wanted %s in CONFIG_FIELDS", f->key,
                     wanted == CHANGE_MODEL ? "CHANGE_MODEL" : "CHANGE_CONV"));
    }
    verdict(good, "random models have every field; config.json there and back", "%d models%s%s", models,
            good ? "" : ": ", e.text);
}

static void test_schedules(void) {
    Schedule s = {"", 1, 0.1, 10, 110};
    const struct {
        const char* kind;
        int64_t step;
        double want;
    } cases[] = {{"linear", 0, 0.1},   {"linear", 9, 1},      {"linear", 10, 1},    {"linear", 60, 0.55},
                 {"linear", 110, 0.1}, {"linear", 1000, 0.1}, {"cosine", 60, 0.55}, {"cosine", 110, 0.1},
                 {"constant", 100, 1}, {"wsd", 80, 1},        {"wsd", 100, 0.55},   {"wsd", 110, 0.1}};
    double worst = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        s.kind = cases[i].kind;
        worst = larger(worst, fabs(learning_rate(&s, cases[i].step) - cases[i].want));
    }
    verdict(worst < 1e-12, "learning rate schedules", "largest error %.1e", worst);
}

// ---------------------------------------------------------------------------------------------------------------------
// CPU against GPU

// Every gradient at real initialisation: dim 128, 4 layers, 4 x 96 tokens. heads 0: the preset's
static void test_real_initialisation(const Trainer* tr, const char* kind, int heads) {
    Config c;
    Error e = {{0}};
    char title[128], name[64];
    int B = 4, T = 96;
    config_from_preset(&c, preset_find("1m"));
    if (heads) { c.num_attention_heads = c.num_key_value_heads = heads; }
    if (!config_set_attention(&c, kind, false, &e) || !config_check(&c, &e)) { die("%s", e.text); }
    void* m = make_model(tr, &c, B, T, 0);
    int32_t *tokens = random_tokens(3, (size_t)B * T, c.vocab_size),
            *targets = random_tokens(4, (size_t)B * T, c.vocab_size);
    model_initialise(tr, m, &c, 5);
    Frobenius f = frobenius(tr, m, tokens, targets, B, T, &c, false);
    snprintf(name, sizeof name, "%s, %d heads", kind, c.num_attention_heads);
    title_of(title, sizeof title, tr, "against the CPU, real initialisation", name);
    bool good = f.all <= 1e-5 && f.worst <= 5e-5 && f.small_together <= 5e-5;
    if (!tr->exact) {
        Bf16Error found = bf16_error(f.all, f.part_worst, f.small_together);
        Bf16Measured measured = bf16_measured(tr);
        good = bf16_within(&found, &measured.real, 1.5);
    }
    verdict(good, title, "relative error %.2g in all, worst %.2g (%s), scalars %.2g", f.all, f.worst, f.name,
            f.small_together);
    tr->destroy(m);
    free(tokens);
    free(targets);
}

// Models drawn at random, every field in any combination, at odd sizes, batches and chunks: loss and all gradients
// against the CPU. many_heads: 16 or 32, mostly mixed in groups of 16, which bf16 does on tensor cores. fused: all of
// random_fused_config. Errors are told in units: in fp32 of what a test allows, in bf16 of the effect of rounding.
static void test_random_models(const Trainer* tr, int models, bool many_heads, bool fused) {
    enum { LOSS = PART_REST, ALL, N_ERRORS };
    static const char* const NAMES[N_ERRORS] = {"convolutions", "mixings", "loss", "all gradients"};
    static const double EXACT[N_ERRORS] = {1e-4, 1e-4, 2e-6, 2e-5};
    // The least effect of rounding: where gradients of a part vanish there is none, and a loss may hardly change by
    // accident.
    static const double LEAST[N_ERRORS] = {0.03, 0.03, 0.002, 0.002};
    Rng rng = rng_make(17, many_heads ? 3 : 1);
    char worst_model[192] = "";
    double worst[2] = {0}, logs = 0;  // of heads of 2 channels, of others
    for (int i = 0; i < models; i++) {
        int B, T;
        Config c = fused ? random_fused_config(&rng, &B, &T) : random_config(&rng, many_heads, &B, &T);
        int NH = c.num_attention_heads, HS = config_head_size(&c);
        void* m = make_model(tr, &c, B, T, fused || draw(&rng, 2) ? 0 : 1 + draw(&rng, T));
        int32_t *tokens = random_tokens((uint64_t)i, (size_t)B * T, c.vocab_size),
                *targets = random_tokens((uint64_t)i + 1000, (size_t)B * T, c.vocab_size);
        for (int n = 1; n < B * T; n += 5) { targets[n] = -100; }
        perturb_by(tr, m, &c, (uint64_t)i,
                   many_heads ? 0.1 * sqrt(4.0 / NH) : 0.1);  // a mixed head gathers noise from all heads
        Frobenius f = frobenius(tr, m, tokens, targets, B, T, &c, false);
        Rounding r = {0, {0}, 0};
        if (!tr->exact) { r = rounding_effect(tr, m, tokens, targets, B, T, &c, (uint64_t)i); }
        const double found[] = {f.part_together[PART_CONV], f.part_together[PART_MIX], fabs(f.loss / f.want_loss - 1),
                                f.all},
                     effect[] = {r.part[PART_CONV], r.part[PART_MIX], r.loss, r.all};
        for (int k = 0; k < N_ERRORS; k++) {
            double units = found[k] / (tr->exact ? EXACT[k] : fmax(effect[k], LEAST[k]));
            if (!(units <= fmax(worst[0], worst[1]))) {
                snprintf(worst_model, sizeof worst_model, "model %d: %d heads of %d, T %d, %s, relative error %.2g", i,
                         NH, HS, T, NAMES[k], found[k]);
            }
            worst[HS > 2] = larger(worst[HS > 2], isnan(units) ? INFINITY : units);
            if (k == ALL) { logs += log(fmax(units, 0.01)) / models; }
        }
        tr->destroy(m);
        free(tokens);
        free(targets);
    }
    char title[128];
    title_of(title, sizeof title, tr,
             many_heads ? "models of many heads against the CPU" : "random models against the CPU", "");
    bool good = fmax(worst[0], worst[1]) <= 1;
    if (!tr->exact) {
        Bf16Measured all = bf16_measured(tr);
        Bf16Random measured = many_heads ? all.many_heads : all.random;
        good = worst[0] <= 1.5 * measured.worst_of_2 && worst[1] <= 1.5 * measured.worst &&
               (models < 10 || exp(logs) <= 1.5 * measured.typical);
    }
    verdict(good, title, "%d models, typical error %.2f %s, largest %.2f, with heads of 2 channels %.2f (%s)", models,
            exp(logs), tr->exact ? "of what is allowed" : "times the effect of rounding", worst[1], worst[0],
            worst_model);
}

// Ten optimizer steps from the same weights on the same batches: the losses stay within 1e-5 (fp32) or 0.02 (bf16) of
// the CPU's.
static void test_ten_steps(const Trainer* tr, const char* kind) {
    const Trainer* cpu = trainer_cpu();
    Config c = small_config(kind);
    int B = 2, T = 29;
    double worst = 0, first = 0, last = 0;
    char title[128];
    AdamW hyper = {3e-3, 0.9, 0.98, 1e-8, 0.05, 1};
    void *m = make_model(tr, &c, B, T, 0), *ref = make_model(cpu, &c, B, T, 0);
    model_initialise(tr, m, &c, 5);
    copy_state(tr, m, cpu, ref, STATE_MASTER);
    for (int step = 1; step <= 10; step++) {
        int32_t *tokens = random_tokens((uint64_t)step % 2, (size_t)B * T, c.vocab_size),
                *targets = random_tokens((uint64_t)step % 2 + 9, (size_t)B * T, c.vocab_size);
        Step s = one_batch(tokens, targets, B, T, step, hyper);
        double got = tr->train_step(m, &s).loss, want = cpu->train_step(ref, &s).loss;
        worst = larger(worst, fabs(got - want));
        if (step == 1) { first = want; }
        last = want;
        free(tokens);
        free(targets);
    }
    title_of(title, sizeof title, tr, "ten steps beside the CPU", kind);
    verdict(worst <= (tr->exact ? 1e-5 : 0.02) && last < first, title, "CPU loss %.3f to %.3f, largest distance %.1e",
            first, last, worst);
    tr->destroy(m);
    cpu->destroy(ref);
}

// The value of an option: a whole number from 1 to `most`; else the program ends.
static int whole_number(const char* option, const char* text, int most) {
    int64_t n = 0;
    if (!opt_parse_integer(text, &n) || n < 1 || n > most) {
        die("%s: got \"%s\", wanted a whole number from 1 to %d", option, text, most);
    }
    return (int)n;
}

typedef struct {
    const Trainer* tr;
    void* m;
} CompareTarget;
static bool compare_store(void* ctx, int group, int tensor, const float* data, Error* e) {
    const CompareTarget* t = (const CompareTarget*)ctx;
    (void)group;
    (void)e;
    t->tr->set(t->m, STATE_WEIGHT, tensor, data);
    return true;
}

// What --compare lets pass. fp32: ten times and more of what is measured. bf16: of trained models of 1M, T from 2 on,
// at most 0.034 in all, 0.16 in a tensor (T 2; 0.10 from 3 on), 0.03 in scalars; one of 16 heads without its gradient
// is 0.25.
static bool compare_agrees(const Frobenius* f, bool exact) {
    return f->all <= (exact ? 1e-4 : 0.06) && f->worst <= (exact ? 1e-3 : 0.2) &&
           f->small_together <= (exact ? 1e-3 : 0.3) &&
           fabs(f->loss - f->want_loss) <= (exact ? 1e-5 : 0.01) * f->want_loss;
}

// The checkpoint that DIR is, or the newest of the run that it is, into dir (PATH_SIZE bytes), and its configuration.
static void compare_open(const char* given, char* dir, Config* c) {
    char path[PATH_SIZE];
    Error e = {{0}};
    path_join(path, sizeof path, given, "config.json");
    if (file_exists(path) || checkpoint_newest(given, dir, NULL) < 0) { snprintf(dir, PATH_SIZE, "%s", given); }
    path_join(path, sizeof path, dir, "config.json");
    if (!file_exists(path)) { die("--compare: %s: no config.json in it, and no good checkpoint step-N", given); }
    if (!checkpoint_verify_model(dir, &e) || !config_read(c, path, false, &e)) { die("--compare: %s", e.text); }
}

// --compare: a table of all gradients of a checkpoint on one batch, of windows of --train or of seeded random tokens.
static void compare_checkpoint(const Trainer* tr, int argc, char** argv) {
    static const char* const no_prefix[] = {""};
    const char* train = NULL;
    int B = 1, T = 256;
    char dir[PATH_SIZE];
    Config c;
    Error e = {{0}};
    for (int i = 3; i < argc; i += 2) {
        if (i + 1 == argc) { die("%s: wanted a value", argv[i]); }
        if (!strcmp(argv[i], "--train")) {
            train = argv[i + 1];
        } else if (!strcmp(argv[i], "--seq-len")) {
            T = whole_number(argv[i], argv[i + 1], 1 << 24);
        } else if (!strcmp(argv[i], "--batch-size")) {
            B = whole_number(argv[i], argv[i + 1], 1 << 24);
        } else {
            die("--compare: unknown option %s, wanted --train GLOB, --seq-len N or --batch-size N", argv[i]);
        }
    }
    if (argc < 3 || (int64_t)B * T > 1 << 24) {
        die("--compare: wanted a checkpoint directory, and at most %d tokens", 1 << 24);
    }
    if (T < 2) { die("--seq-len: got 1, wanted 2 or more: one token attends to itself, whatever the scores"); }
    compare_open(argv[2], dir, &c);
    int32_t *tokens = random_tokens(1, (size_t)B * T, c.vocab_size),
            *targets = random_tokens(2, (size_t)B * T, c.vocab_size);
    if (train) {
        Loader loader;
        if (!loader_open(&loader, train, T, c.vocab_size, 1, &e)) { die("--train: %s", e.text); }
        for (int b = 0; b < B; b++) {
            if (!loader_next(&loader, tokens + (size_t)b * T, targets + (size_t)b * T, &e)) {
                die("--train: %s", e.text);
            }
        }
        loader_close(&loader);
        if (!counted(targets, B * T)) { die("--train: of %d x %d targets none counts, by its .mask", B, T); }
    }
    CompareTarget target = {tr, make_model(tr, &c, B, T, 0)};
    if (!checkpoint_read_tensors(dir, tr->tensors(target.m), no_prefix, 1, false, NULL, compare_store, &target, &e)) {
        die("%s", e.text);
    }
    printf("%s: train_mta.c in fp32 against %s, %d x %d tokens%s\n", dir, tr->name, B, T, train ? "" : " at random");
    Frobenius f = frobenius(tr, target.m, tokens, targets, B, T, &c, true);
    printf("loss: cpu %.6f, gpu %.6f\n", f.want_loss, f.loss);
    verdict(compare_agrees(&f, tr->exact), "CPU against GPU",
            "relative error %.2g in all, worst %.2g (%s), biases of gates or vectors lambda %.2g", f.all, f.worst,
            f.name, f.small_together);
    tr->destroy(target.m);
    free(tokens);
    free(targets);
}

// The CPU's gradients, of one kind of tensor so many times what they are, or its loss.
static struct {
    TensorKind kind;
    float factor;
    double loss_factor;
} lie;
static void lying_get(const void* m, StateKind kind, int tensor, size_t from, size_t n, float* data) {
    const Trainer* cpu = trainer_cpu();
    cpu->get(m, kind, tensor, from, n, data);
    for (size_t i = 0; kind == STATE_GRADIENT && cpu->tensors(m)->specs[tensor].kind == lie.kind && i < n; i++) {
        data[i] *= lie.factor;
    }
}
static double lying_forward_backward(void* m, const int32_t* tokens, const int32_t* targets, int B, int T,
                                     double dloss) {
    return lie.loss_factor * trainer_cpu()->forward_backward(m, tokens, targets, B, T, dloss);
}

// --compare passes the truth, and sees a gradient of any kind of tensor that is missing, has the other sign or (but for
// the small ones) is 1.4 times what it should be, and a loss that is 2% off.
static void test_compare_agrees(const char* attention) {
    static const float factors[] = {1, 0, -1, 1.4f};
    Trainer liar = *trainer_cpu();
    Config c = small_config(attention);
    int B = 2, T = 19, tried = 0, wrong = 0;
    char title[128], first[64] = "";
    liar.get = lying_get;
    liar.forward_backward = lying_forward_backward;
    int32_t *tokens = random_tokens(3, (size_t)B * T, c.vocab_size),
            *targets = random_tokens(4, (size_t)B * T, c.vocab_size);
    for (int n = 0; n < 4 * (TENSOR_KINDS + 1); n++) {
        int kind = n / 4;  // the last of them: the loss
        void* m = make_model(&liar, &c, B, T, 0);
        const TensorList* list = liar.tensors(m);
        bool has = kind == TENSOR_KINDS,
             small = kind == TENSOR_GATE_BIAS || (kind >= TENSOR_LAMBDA_Q1 && kind <= TENSOR_LAMBDA_K2);
        for (int t = 0; t < list->n; t++) { has = has || (int)list->specs[t].kind == kind; }
        lie.kind = (TensorKind)kind;
        lie.factor = factors[n % 4];
        lie.loss_factor = kind == TENSOR_KINDS && n % 4 ? 1.02 : 1;
        if (has && !(small && n % 4 == 3)) {
            perturb(&liar, m, &c, 5);
            Frobenius f = frobenius(&liar, m, tokens, targets, B, T, &c, false);
            bool truth = n % 4 == 0, exact = compare_agrees(&f, true), rounded = compare_agrees(&f, false);
            tried++;
            if (exact != truth || rounded != truth) {
                wrong++;
                snprintf(first, sizeof first, ", the last of kind %d, times %g", kind, (double)lie.factor);
            }
        }
        liar.destroy(m);
    }
    title_of(title, sizeof title, &liar, "--compare sees a wrong gradient", attention);
    verdict(tried > 40 && wrong == 0, title, "%d cases, %d wrong%s", tried, wrong, first);
    free(tokens);
    free(targets);
}

// A model that is made for evaluation alone gives the bits of one that trains, in batches of several shapes, also where
// only the last target of a sequence counts.
static void test_evaluation(const Trainer* tr, const char* kind) {
    Config c = small_config(kind);
    int B = 3, T = 16, N = B * T;
    Error e = {{0}};
    char title[128];
    double worst = 0;
    void *trains = make_model(tr, &c, B, T, 0), *evaluates = tr->create(&c, B, T, 0, false, &e);
    if (!evaluates) { die("%s: %s", tr->name, e.text); }
    int32_t *tokens = random_tokens(3, (size_t)N, c.vocab_size), *targets = random_tokens(4, (size_t)N, c.vocab_size);
    float *want = floats((size_t)N), *logits[2] = {floats((size_t)N * c.vocab_size), floats((size_t)N * c.vocab_size)};
    perturb(tr, trains, &c, 5);
    copy_state(tr, trains, tr, evaluates, STATE_MASTER);
    for (int shape = 0; shape < 4; shape++) {
        int b = shape == 1 ? 6 : B, t = shape == 1 ? 7 : T;
        for (int i = 0; i < N && shape == 3; i++) { targets[i] = i % T == T - 1 ? targets[i] : -1; }
        Losses losses = tr->forward(trains, tokens, targets, b, t, shape == 2 ? logits[0] : NULL);
        memcpy(want, losses.losses, (size_t)(b * t) * sizeof(float));
        losses = tr->forward(evaluates, tokens, targets, b, t, shape == 2 ? logits[1] : NULL);
        for (int i = 0; i < b * t; i++) { worst = larger(worst, fabs((double)want[i] - (double)losses.losses[i])); }
    }
    size_t bytes = (size_t)N * (size_t)c.vocab_size * sizeof(float);
    title_of(title, sizeof title, tr, "evaluates without training", kind);
    verdict(worst == 0 && !memcmp(logits[0], logits[1], bytes), title, "losses off by %g at most", worst);
    tr->destroy(trains);
    tr->destroy(evaluates);
    free(tokens);
    free(targets);
    free(want);
    free(logits[0]);
    free(logits[1]);
}

// Numbers too large for what they are stored in: a step that they make wrong shows in its loss or in the gradients'
// norm, and so changes nothing. The CPU's and fp32's scores hold those of the first row.
typedef struct {
    const char* name;
    float factor;         // of the weights of
    TensorKind kinds[2];  // these
    bool fp32_holds;
} Large;
static const Large LARGE[] = {
    {"scores beyond fp16", 1e3f, {TENSOR_Q, TENSOR_K}, true},
    {"scores beyond fp32", 1e20f, {TENSOR_Q, TENSOR_K}, false},
    {"squares of the stream beyond fp32", 1e25f, {TENSOR_EMBED, TENSOR_EMBED}, false},
    {"squares of a head beyond fp32", 1e25f, {TENSOR_V, TENSOR_V}, false},
};

static void scale_weights(const Trainer* tr, void* m, const Large* large) {
    const TensorList* list = tr->tensors(m);
    for (int i = 0; i < list->n; i++) {
        size_t n = list->specs[i].numel;
        if (list->specs[i].kind != large->kinds[0] && list->specs[i].kind != large->kinds[1]) { continue; }
        float* w = floats(n);
        tr->get(m, STATE_WEIGHT, i, 0, n, w);
        for (size_t k = 0; k < n; k++) { w[k] *= large->factor; }
        tr->set(m, STATE_WEIGHT, i, w);
        free(w);
    }
}

// chunk: queries at a time, 0 = the fused kernels of the CUDA trainer where they serve
static void test_large(const Trainer* tr, const char* kind, const Large* large, int chunk) {
    Config c = small_config(kind);
    int B = 1, T = 40;
    AdamW hyper = {0.01, 0.9, 0.95, 1e-8, 0.1, 1.0};
    char title[128];
    c.hidden_size = 32;  // heads of 8, which the fused kernels take
    for (int l = 0; l < c.num_hidden_layers; l++) {
        c.kq_conv_layer[l] = c.kq_conv_pre_softmax || c.kq_conv_post_softmax;
    }
    void* m = make_model(tr, &c, B, T, chunk);
    int32_t* tokens = random_tokens(3, (size_t)T, c.vocab_size);
    model_initialise(tr, m, &c, 5);
    scale_weights(tr, m, large);
    float* before = get_all(tr, m, STATE_MASTER);
    Step s = one_batch(tokens, tokens, B, T, 1, hyper);
    StepResult r = tr->train_step(m, &s);
    float* after = get_all(tr, m, STATE_MASTER);
    size_t n = tr->tensors(m)->parameters;
    bool seen = !isfinite(r.loss) || !isfinite(r.grad_norm), same = !memcmp(before, after, n * sizeof(float)),
         holds = large->fp32_holds && (tr->exact || !strncmp(tr->name, "cpu", 3));
    title_of(title, sizeof title, tr, large->name, kind);
    verdict(seen != holds && same == seen, title, "chunks of %d: loss %.3g, gradient norm %.3g, weights %s", chunk,
            r.loss, r.grad_norm, same ? "kept" : "changed");
    tr->destroy(m);
    free(tokens);
    free(before);
    free(after);
}

static void test_trainer(const Trainer* tr) {
    char name[64];
    snprintf(name, sizeof name, "%s golden", tr->name);
    if (wanted(name)) { golden_directory(tr); }
    for (int k = 0; k < ATTENTION_KIND_COUNT; k++) {
        if (wanted("causality")) { test_causality(tr, ATTENTION_KINDS[k].name); }
        if (wanted("determinism")) { test_determinism(tr, ATTENTION_KINDS[k].name); }
        if (wanted("chunks") && tr->exact) { test_chunks(tr, ATTENTION_KINDS[k].name); }
        if (wanted("overfit")) { test_overfit(tr, ATTENTION_KINDS[k].name); }
        if (wanted("evaluates")) { test_evaluation(tr, ATTENTION_KINDS[k].name); }
    }
    if (wanted("update")) { test_update(tr); }
    if (wanted("masked")) { test_masked(tr); }
    if (wanted("states")) { test_states(tr); }
    if (wanted("losses")) { test_losses(tr); }
    if (wanted("classifier")) { test_classifier(tr); }
    for (int k = 0; k < ATTENTION_KIND_COUNT * 2; k++) {
        for (size_t i = 0; wanted("beyond") && i < sizeof LARGE / sizeof *LARGE; i++) {
            test_large(tr, ATTENTION_KINDS[k / 2].name, &LARGE[i], k % 2 * 16);
        }
    }
}

// train_mta.cu against train_mta.c.
static void test_against_cpu(const Trainer* tr) {
    if (wanted("random models")) { test_random_models(tr, models, false, false); }
    if (wanted("many heads")) { test_random_models(tr, (models + 5) / 6, true, false); }
    for (int k = 0; k < ATTENTION_KIND_COUNT; k++) {
        if (wanted("against the CPU")) { test_real_initialisation(tr, ATTENTION_KINDS[k].name, 0); }
        if (wanted("ten steps")) { test_ten_steps(tr, ATTENTION_KINDS[k].name); }
    }
    if (wanted("against the CPU")) {  // these mix on tensor cores
        test_real_initialisation(tr, "mta-full", 16);
        test_real_initialisation(tr, "talking-heads", 16);
    }
}

// train_mta.cu with attention by cuDNN in the layers that it serves; on dev/cuda_cpu by a stand-in.
static void* create_by_cudnn(const Config* c, int B, int T, int chunk, bool training, Error* e) {
    return trainer_cuda()->create(c, B, T, chunk ? chunk : CHUNK_CUDNN, training, e);
}

// Its gradients beside those of the own kernels: not the same bits, as near as both are to fp32; and twice the same.
static void test_cudnn_beside_own(const Trainer* tr, const char* kind) {
    Config c = small_config(kind);
    int B = 3, T = 50;
    double difference = 0, norm = 0;
    char title[128];
    c.hidden_size = 32;  // heads of 8
    c.kq_conv_layer[1] = false;
    void *m = make_model(tr, &c, B, T, 0), *own = make_model(trainer_cuda(), &c, B, T, 0);
    int32_t *tokens = random_tokens(3, (size_t)B * T, c.vocab_size),
            *targets = random_tokens(4, (size_t)B * T, c.vocab_size);
    perturb(tr, m, &c, 5);
    perturb(tr, own, &c, 5);
    mean_gradients(tr, m, tokens, targets, B, T);
    mean_gradients(tr, own, tokens, targets, B, T);
    float *got = get_all(tr, m, STATE_GRADIENT), *want = get_all(tr, own, STATE_GRADIENT);
    size_t n = tr->tensors(m)->parameters;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    void* again_model = make_model(tr, &c, B, T, 0);
    perturb(tr, again_model, &c, 5);
    mean_gradients(tr, again_model, tokens, targets, B, T);
    float* again = get_all(tr, again_model, STATE_GRADIENT);
    bool same = !memcmp(got, again, n * sizeof(float));
    double error = sqrt(difference / norm);
    title_of(title, sizeof title, tr, "gradients beside the own kernels'", kind);
    verdict(error > 0 && error <= 1.5 * bf16_measured(tr).golden.all && same, title, "relative difference %.2g, %s",
            error, same ? "twice the same bits" : "other bits the second time");
    void* models_made[] = {m, own, again_model};
    for (int i = 0; i < 3; i++) { tr->destroy(models_made[i]); }
    float* arrays[] = {got, want, again};
    for (int i = 0; i < 3; i++) { free(arrays[i]); }
    free(tokens);
    free(targets);
}

static void test_cudnn(void) {
    static const char* const kinds[] = {"transformer", "mta", "diff"};
    const bool golden = wanted("cuDNN golden"), random = wanted("cuDNN random models"),
               beside = wanted("cuDNN beside own"), real = wanted("cuDNN against the CPU");
    Trainer tr = *trainer_cuda();
    Config c = small_config("transformer");
    Error e = {{0}};
    tr.name = "cuda bf16, cuDNN";
    tr.create = create_by_cudnn;
    if (tr.exact || !(golden || random || beside || real)) { return; }
    void* m = tr.create(&c, 1, 1, 0, true, &e);
    if (!m) {
        printf("skip %-44s %s\n", tr.name, e.text);
        skipped++;
        return;
    }
    tr.destroy(m);
    if (golden) { golden_directory(&tr); }
    if (random) { test_random_models(&tr, (models + 3) / 4, false, true); }
    for (int k = 0; k < 3 && beside; k++) { test_cudnn_beside_own(&tr, kinds[k]); }
    if (real) { test_real_initialisation(&tr, "mta", 0); }
}

// What test_mta alone runs: layers and models in double, and what needs no trainer.
static void test_double(void) {
    if (wanted("checkers")) {
        test_checkers();
        test_compare_agrees("mta-full");
        test_compare_agrees("diff");
    }
    if (wanted("config")) {
        test_config();
        test_names();
        test_random_config();
    }
    if (wanted("schedules")) { test_schedules(); }
    if (wanted("memory")) { test_memory_plan(); }
#ifdef _OPENMP  // one thread alone (make OPENMP=) shares nothing out
    if (wanted("balance")) { test_balance(); }
#endif
    test_layers();
    test_attention();
    if (wanted("model")) { test_model_differences(); }
    if (wanted("accumulation")) { test_accumulation(); }
    if (wanted("shards")) { test_shards(); }
    if (wanted("identity")) { test_identity(); }
}

// train_mta.c with products in bf16, where this machine has them.
static void test_bf16_products(void) {
    const Trainer* tr = trainer_cpu_bf16();
    Config c = small_config("mta");
    Error e = {{0}};
    void* m = tr->create(&c, 1, 1, 0, true, &e);
    if (!m) {
        printf("skip %-44s %s\n", tr->name, e.text);
        skipped++;
        return;
    }
    tr->destroy(m);
    test_trainer(tr);
    test_against_cpu(tr);
}

static const char USAGE[] =
    "usage: test_mta [--only TEXT] [--models N]        every test, or those whose name contains TEXT; N random models "
    "instead of 60\n"
    "       test_mta --golden FILE...                  the named golden cases: a table per tensor\n"
    "       test_mta --write DIR [N]                   N golden cases of this trainer's own results (default 5)\n"
    "       test_mta_cuda --compare DIR [--train GLOB] [--seq-len N] [--batch-size N]\n"
    "                                                  gradients of a checkpoint, or of a run's newest, CPU against "
    "GPU\n"
    "The exit status is the verdict. test_mta_cuda, test_mta_cuda_cpu and test_mta_cuda_cpu_bf16 take the same "
    "options.\n";

int main(int argc, char** argv) {
    open_standard_files();
    const Trainer* tr = trainer_cuda ? trainer_cuda() : trainer_cpu();
    omp_set_num_threads(
        1);  // the models are tiny: threads would only wait for each other; the determinism test sets its own number
    // On dev/cuda_cpu, small models are cut as large ones are: into several chunks and splits.
    setenv("CUDA_CPU_SCRATCH", "1048576", 0);
    setenv("CUDA_CPU_MULTIPROCESSORS", "2", 0);
    setenv("CUDA_CPU_HEAD_BLOCKS", "6", 0);
    setenv("CUDA_CPU_LOGITS", "4096", 0);
    if (argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))) {
        put_out(USAGE, strlen(USAGE), true);
        return 0;
    } else if (argc == 2 && !strcmp(argv[1], "--version")) {
        printf("%s %s\n", program_invocation_short_name, MTA_VERSION);
        put_out("", 0, true);
        return 0;
    } else if (argc > 1 && !strcmp(argv[1], "--golden")) {
        if (argc == 2) { die("--golden: wanted one or more golden case files"); }
        for (int i = 2; i < argc; i++) { golden_case(tr, argv[i], true); }
    } else if (argc > 1 && !strcmp(argv[1], "--write")) {
        if (argc < 3 || argc > 4) { die("--write: wanted a directory, and a number of cases from 1 to 1000"); }
        int n = argc > 3 ? whole_number("--write DIR", argv[3], 1000) : ATTENTION_KIND_COUNT;
        golden_write_cases(tr, argv[2], n);
        return 0;
    } else if (argc > 1 && !strcmp(argv[1], "--compare")) {
        if (!trainer_cuda) { die("--compare: this is the CPU trainer alone; test_mta_cuda compares CPU and GPU"); }
        omp_set_num_threads(omp_get_num_procs());
        compare_checkpoint(tr, argc, argv);
    } else {
        for (int i = 1; i < argc; i += 2) {
            if (i + 1 < argc && !strcmp(argv[i], "--only")) {
                only = argv[i + 1];
            } else if (i + 1 < argc && !strcmp(argv[i], "--models")) {
                models = whole_number(argv[i], argv[i + 1], 1000000);
            } else {
                die("got \"%s\", wanted nothing, --only TEXT, --models N, --golden FILE..., --write DIR or --compare "
                    "DIR; --help says more",
                    argv[i]);
            }
        }
        if (!trainer_cuda) { test_double(); }
        test_trainer(tr);
        if (trainer_cuda) {
            test_against_cpu(tr);
            test_cudnn();
        } else {
            test_bf16_products();
        }
        if (passed + failed == 0) { die("--only %s: no test's name contains it", only); }
    }
    printf(skipped ? "%d passed, %d failed, %d skipped\n" : "%d passed, %d failed\n", passed, failed, skipped);
    put_out("", 0, true);
    return failed != 0;
}
