// infer_mta.c: samples, scores and streams from a checkpoint on a CPU, at the speed at which memory can be read.
//   make infer_mta && ./infer_mta runs/x/step-00001000 --prompt "Once upon a time"
//
// The checkpoint is mapped: matrices are used as they are stored (F32, BF16, F16) unless --weights asks for another
// form; to generate, they are first copied to memory on large pages, which is read a third faster (--mapped does
// without). One pass over the weights makes one token. What makes this decode path its own, and not a call into the
// trainer, is the cache:
//   keys and values of every position, as any transformer keeps them;
//   the last cq-1 rotated queries of a layer that convolves before the softmax: the score rows i-(cq-1) .. i that the
//     convolution of row i needs are computed again from them, in the same pass over the keys: arithmetic, no traffic;
//   the last cq-1 rows of probabilities of a layer that convolves after the softmax.
// So a token costs O(T), nothing is approximated, and a cache can go back to a position where those two were set aside
// (CacheMark).
//
// Many tokens at once (a prompt, a text to score) go through the same code as one: forward() takes a chunk of
// positions. Products with stored matrices are mta/matrix.h's; its gemm_tile serves scores (keys are cached as panels
// of TILE) and values (so are they) as well. What is not decoding stands in mta/: the options in infer_options.h; how a
// token is drawn in sample.h; in score.h, prompts.h, attention_map.h and tokenize.h how requests are read and answers
// written.
//
// C dim   NH heads   NKV key/value heads   HS head size   FF feed-forward   V vocabulary   cq, ck size of a convolution
// T positions so far   n positions of a chunk   R of those one attention block handles   i, p query   j key position
#include "mta/util.h"
#include "mta/json.h"
#include "mta/config.h"
#include "mta/safetensors.h"
#include "mta/checkpoint.h"
#include "mta/matrix.h"
#include "mta/random.h"
#include "mta/infer_options.h"
#include "mta/sample.h"
#include "mta/score.h"
#include "mta/prompts.h"
#include "mta/attention_map.h"
#include "mta/tokenize.h"
#include "mta/tokenizer.h"

#include <signal.h>

// ---------------------------------------------------------------------------------------------------------------------
// The model: mapped files, matrices as stored or converted, small tensors in fp32

typedef struct {
    Matrix q, k, v, o, gate, up, down;
    const float *input_norm, *post_norm;
    const float *conv_pre, *conv_post;  // (NH, cq, ck), NULL: none
    const float *mix_pre, *mix_post;    // (NH/ch, ch, ch) out, in; NULL: none
    const float* head_norm;             // (HS), diff (2 HS); NULL: none
    const float* head_gate;             // (HS); NULL: none
    float gate_bias, lambda;            // lambda: diff
    float head_scale;                   // 1 or 1 - lambda_init
} Layer;

typedef struct {
    Config c;
    int C, NH, NKV, HS, FF, V, cq, ck;
    Matrix embed, head;
    const float* norm;
    Layer* layers;
    SafeTensors files;
    float* small;            // all small tensors
    size_t bytes_per_token;  // of weights, read for one token
    MatrixMemory memory;     // of the matrices; own_bytes counts the small tensors too
} Model;

static float* small_from(Model* m, const StTensor* t, size_t* at) {  // NULL where the model has none
    if (!t) { return NULL; }
    float* out = m->small + *at;
    Error e = {{0}};
    if (!st_to_f32(t, out, &e)) { die("%s", e.text); }
    *at += (t->numel + 63) / 64 * 64;
    return out;
}

static void layer_build(Model* m, const TensorList* list, const StTensor* const* found, int l, int want, size_t* at) {
    Layer* y = &m->layers[l];
    const StTensor* t[TENSOR_KINDS];
    for (int k = 0; k < TENSOR_KINDS; k++) {
        int i = tensor_at(list, l, (TensorKind)k);
        t[k] = i < 0 ? NULL : found[i];
    }
    y->q = matrix_from(&m->memory, t[TENSOR_Q], want);
    y->k = matrix_from(&m->memory, t[TENSOR_K], want);
    y->v = matrix_from(&m->memory, t[TENSOR_V], want);
    y->o = matrix_from(&m->memory, t[TENSOR_O], want);
    y->gate = matrix_from(&m->memory, t[TENSOR_GATE_PROJ], want);
    y->up = matrix_from(&m->memory, t[TENSOR_UP_PROJ], want);
    y->down = matrix_from(&m->memory, t[TENSOR_DOWN_PROJ], want);
    y->input_norm = small_from(m, t[TENSOR_INPUT_NORM], at);
    y->post_norm = small_from(m, t[TENSOR_POST_NORM], at);
    y->conv_pre = small_from(m, t[TENSOR_KQ_CONV], at);
    y->conv_post = small_from(m, t[TENSOR_KQ_CONV_POST], at);
    y->mix_pre = small_from(m, t[TENSOR_HEAD_MIX_PRE], at);
    y->mix_post = small_from(m, t[TENSOR_HEAD_MIX], at);
    y->head_norm = small_from(m, t[TENSOR_HEAD_NORM], at);
    y->head_gate = small_from(m, t[TENSOR_GATE_WEIGHT], at);
    y->gate_bias = t[TENSOR_GATE_BIAS] ? *small_from(m, t[TENSOR_GATE_BIAS], at) : 0;
    y->head_scale = m->c.head_norm == HEAD_NORM_GROUP_DEPTH_SCALED ? (float)(1 - config_lambda_init(l)) : 1;
    if (m->c.attention_type == ATTENTION_DIFF) {
        const float *q1 = small_from(m, t[TENSOR_LAMBDA_Q1], at), *k1 = small_from(m, t[TENSOR_LAMBDA_K1], at);
        const float *q2 = small_from(m, t[TENSOR_LAMBDA_Q2], at), *k2 = small_from(m, t[TENSOR_LAMBDA_K2], at);
        double dot1 = 0, dot2 = 0;
        for (int i = 0; i < m->HS; i++) {
            dot1 += (double)q1[i] * k1[i];
            dot2 += (double)q2[i] * k2[i];
        }
        y->lambda = (float)(exp(dot1) - exp(dot2) + config_lambda_init(l));
    }
    m->bytes_per_token +=
        y->q.bytes + y->k.bytes + y->v.bytes + y->o.bytes + y->gate.bytes + y->up.bytes + y->down.bytes;
}

// Reads DIR/config.json and its tensors; any mistake in them is the end of the program. want: a WeightKind, or -1 as
// stored. threads: 0 for all cores, but none for less than half a million weights: it would cost more at the barriers
// than it brings. large_pages: copy also what could be used where it is mapped, if there is memory for that.
// assume_llama: a model of another family is read as LLaMA. verify: against DIR/manifest.json, where there is one.
static void model_open(Model* m, const char* dir, int want, int threads, bool large_pages, bool assume_llama,
                       bool verify) {
    char path[PATH_SIZE];
    Error e = {{0}};
    memset(m, 0, sizeof *m);
    if (!dir_exists(dir)) {
        die("%s: not a checkpoint directory; give one with config.json and model.safetensors", dir);
    }
    path_join(path, sizeof path, dir, "config.json");
    if ((verify && !checkpoint_verify_model(dir, &e)) || !config_read(&m->c, path, assume_llama, &e) ||
        !safetensors_open_dir(&m->files, dir, &e)) {
        die("%s", e.text);
    }
    const Config* c = &m->c;
    m->C = c->hidden_size;
    m->NH = c->num_attention_heads;
    m->NKV = c->num_key_value_heads;
    m->HS = config_head_size(c);
    size_t stored = 0;
    for (int i = 0; i < m->files.n_files; i++) { stored += m->files.maps[i].size; }
    m->memory.copy = large_pages && (double)stored < 0.75 * memory_available(1);
    m->FF = c->intermediate_size;
    m->V = c->vocab_size;
    m->cq = c->kq_conv_query_size;
    m->ck = c->kq_conv_key_size;
    TensorList list;
    tensor_list(&list, c);
    omp_set_num_threads(threads ? threads
                                : (int)fmin(fmax((double)list.parameters / 524288, 1), omp_get_max_threads()));
    const char* const prefix[1] = {""};
    const StTensor** found = checkpoint_match(&m->files, dir, &list, prefix, 1, false, NULL, &e);
    if (!found) { die("%s", e.text); }
    size_t small = 0, at = 0;
    for (int i = 0; i < list.n; i++) {
        if (found[i]->ndim != 2) { small += (found[i]->numel + 63) / 64 * 64; }
    }
    m->small = alloc_or_die(small, sizeof(float), "norms and kernels");
    m->memory.own_bytes += small * sizeof(float);
    m->layers = alloc_or_die((size_t)c->num_hidden_layers, sizeof(Layer), "layers");
    m->embed = matrix_from(&m->memory, found[tensor_at(&list, 0, TENSOR_EMBED)], want);
    int head = tensor_at(&list, 0, TENSOR_LM_HEAD);
    m->head = head < 0 ? m->embed : matrix_from(&m->memory, found[head], want);
    m->bytes_per_token = m->head.bytes;
    for (int l = 0; l < c->num_hidden_layers; l++) { layer_build(m, &list, found, l, want, &at); }
    m->norm = small_from(m, found[tensor_at(&list, 0, TENSOR_NORM)], &at);
    assert(at == small);
    free(found);
    tensor_list_free(&list);
}

// ---------------------------------------------------------------------------------------------------------------------
// The cache

// Zeros at both ends of a row of scores: a convolution reads up to 31 beyond, its two vectors 31 more.
enum { PAD = 64 };

typedef struct {
    int T, capacity;          // positions held, and at most
    bool half;                // keys and values in bf16
    size_t k_layer, v_layer;  // elements of one layer
    // k: (layer, NKV, tiles of TILE keys, HS, TILE); v: (layer, NKV, panels of TILE values, capacity, TILE)
    char *k, *v;
    // (layer, cq-1, NH HS): rotated queries before position T, zeros before 0; layers without convolution: unused
    float* last_q;
    // (layer, NH, cq-1, p_stride): row of position p at p % (cq-1), key j at PAD + j, zeros beyond p
    float* last_p;
    size_t p_stride;
    size_t bytes;
} Cache;

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static void cache_open(Cache* cache, const Model* m, int capacity, bool half) {
    size_t L = (size_t)m->c.num_hidden_layers, cap = round_up((size_t)capacity, TILE), width = half ? 2 : 4;
    memset(cache, 0, sizeof *cache);
    cache->capacity = capacity;
    cache->half = half;
    cache->k_layer = (size_t)m->NKV * cap * (size_t)m->HS;
    cache->v_layer = (size_t)m->NKV * cap * round_up((size_t)m->HS, TILE);
    cache->p_stride = round_up(cap + 2 * PAD, LANES);
    bool pre = false, post = false;
    for (size_t l = 0; l < L; l++) {
        pre = pre || m->layers[l].conv_pre;
        post = post || m->layers[l].conv_post;
    }
    size_t q = pre ? L * (size_t)(m->cq - 1) * (size_t)(m->NH * m->HS) : 0,
           p = post ? L * (size_t)m->NH * (size_t)(m->cq - 1) * cache->p_stride : 0;
    cache->k = big_alloc(L * cache->k_layer * width, "the cache of keys");
    cache->v = big_alloc(L * cache->v_layer * width, "the cache of values");
    cache->last_q = pre ? big_alloc((q + 1) * 4, "the cache of queries") : NULL;
    cache->last_p = post ? big_alloc((p + 1) * 4, "the cache of probabilities") : NULL;
    for (size_t l = 0; l < L; l++) {  // what is counted is what will be touched
        cache->bytes += (cache->k_layer + cache->v_layer) * width + (m->layers[l].conv_pre ? q / L * 4 : 0) +
                        (m->layers[l].conv_post ? p / L * 4 : 0);
    }
}

static float* cache_q(const Cache* cache, const Model* m, int l) {
    return cache->last_q + (size_t)l * (size_t)(m->cq - 1) * (size_t)(m->NH * m->HS);
}

static float* cache_p(const Cache* cache, const Model* m, int l, int h, int p) {  // row of position p
    return cache->last_p + (((size_t)l * (size_t)m->NH + (size_t)h) * (size_t)(m->cq - 1) + (size_t)(p % (m->cq - 1))) *
                               cache->p_stride;
}

static void cache_clear(Cache* cache, const Model* m) {
    cache->T = 0;
    if (cache->last_q) {
        memset(cache->last_q, 0, (size_t)m->c.num_hidden_layers * (size_t)(m->cq - 1) * (size_t)(m->NH * m->HS) * 4);
    }
}

// What must be set aside to come back to position T later: keys and values stay where they are, the two short memories
// are copied.
typedef struct {
    int T;
    float *q, *p;
} CacheMark;

static void mark_free(CacheMark* k) {
    free(k->q);
    free(k->p);
    memset(k, 0, sizeof *k);
}

// copies out, or back in; returns floats of rows
static size_t mark_walk(Cache* cache, const Model* m, CacheMark* k, bool back) {
    size_t q_layer = (size_t)(m->cq - 1) * (size_t)(m->NH * m->HS), at = 0;
    size_t row = (size_t)k->T + 3 * PAD < cache->p_stride ? (size_t)k->T + 3 * PAD : cache->p_stride;
    for (int l = 0; l < m->c.num_hidden_layers; l++) {
        const Layer* y = &m->layers[l];
        if (y->conv_pre && k->q) {
            memcpy(back ? cache_q(cache, m, l) : k->q + (size_t)l * q_layer,
                   back ? k->q + (size_t)l * q_layer : cache_q(cache, m, l), q_layer * 4);
        }
        for (int h = 0; y->conv_post && h < m->NH; h++) {
            for (int p = k->T - (m->cq - 1); p < k->T; p++, at += row) {
                if (p < 0 || !k->p) { continue; }
                float* there = cache_p(cache, m, l, h, p);
                memcpy(back ? there : k->p + at, back ? k->p + at : there, row * 4);
            }
        }
    }
    return at;
}

static void mark_set(CacheMark* k, Cache* cache, const Model* m) {
    mark_free(k);
    k->T = cache->T;
    size_t rows = mark_walk(cache, m, k, false);  // counts
    if (cache->last_q) {
        k->q = alloc_or_die((size_t)m->c.num_hidden_layers * (size_t)(m->cq - 1), (size_t)(m->NH * m->HS) * 4,
                            "a mark in the cache");
    }
    if (rows) { k->p = alloc_or_die(rows, 4, "a mark in the cache"); }
    mark_walk(cache, m, k, false);
}

static void mark_return(CacheMark* k, Cache* cache, const Model* m) {
    mark_walk(cache, m, k, true);
    cache->T = k->T;
}

// ---------------------------------------------------------------------------------------------------------------------
// The forward pass of a chunk

typedef struct {
    int chunk;          // positions at a time, at most
    float *x, *xn;      // (chunk, C) residual stream; normalised
    float* q;           // (cq-1 + chunk, NH HS) rotated and scaled queries, the cq-1 before the chunk first
    float *k, *v;       // (chunk, NKV HS)
    float* o;           // (chunk, NH HS)
    float *gate, *up;   // (chunk, FF)
    float* angles;      // (chunk, HS): cosines, then sines
    float *a, *b;       // blocks of score rows: (NH, rows, stride)
    size_t block;       // floats of each
    float* heads;       // (NH, R, HS rounded up to TILE): values before norm and gate
    int R;              // queries of a block at most, whatever the number of keys
    float* zero_row;    // (row) of zeros
    AttentionTap* tap;  // NULL: none
    size_t bytes;
} Work;

static size_t row_stride(int T) { return round_up((size_t)T, TILE) + 2 * PAD; }

// Queries of a block that sees T keys. A block of score rows stays near 8 MiB: with more rows a pass over the keys
// serves more queries, with fewer it stays in the cache.
enum { BLOCK_FLOATS = 2 << 20, BLOCK_QUERIES = 64 };
static int block_queries(const Model* m, int chunk, int T) {
    size_t fit = BLOCK_FLOATS / ((size_t)m->NH * row_stride(T)), extra = (size_t)m->cq - 1;
    int R = fit > extra + BLOCK_QUERIES ? BLOCK_QUERIES : fit > extra + 1 ? (int)(fit - extra) : 1;
    return R < chunk ? R : chunk;
}

static void work_open(Work* w, const Model* m, int chunk, int capacity) {
    size_t n = (size_t)chunk, C = (size_t)m->C, D = (size_t)(m->NH * m->HS), extra = (size_t)m->cq - 1,
           NH = (size_t)m->NH, one = NH * (extra + 1) * row_stride(capacity);
    memset(w, 0, sizeof *w);
    w->chunk = chunk;
    w->R = BLOCK_QUERIES < chunk ? BLOCK_QUERIES : chunk;
    w->block = NH * (extra + (size_t)w->R) * row_stride(capacity);
    if (w->block > BLOCK_FLOATS) { w->block = one > BLOCK_FLOATS ? one : BLOCK_FLOATS; }
    size_t head_floats = NH * (size_t)w->R * round_up((size_t)m->HS, TILE);
    struct {
        float** p;
        size_t n;
    } parts[] = {
        {&w->x, n * C},
        {&w->xn, n * C},
        {&w->q, (extra + n) * D},
        {&w->k, n * (size_t)(m->NKV * m->HS)},
        {&w->v, n * (size_t)(m->NKV * m->HS)},
        {&w->o, n * D},
        {&w->gate, n * (size_t)m->FF},
        {&w->up, n * (size_t)m->FF},
        {&w->angles, n * (size_t)m->HS},
        {&w->a, w->block},
        {&w->b, w->block},
        {&w->heads, head_floats},
        {&w->zero_row, row_stride(capacity)},
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) { total += round_up(parts[i].n, 64); }
    float* at = big_alloc(total * 4, "working memory");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].p = at;
        at += round_up(parts[i].n, 64);
    }
    w->bytes = total * 4;
}

static void rmsnorm(float* out, const float* x, const float* weight, int n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) { sum += x[i] * x[i]; }
    float scale = isfinite(sum) ? 1.0f / sqrtf(sum / (float)n + eps) : NAN;  // 1 / sqrt(inf) = 0 would hide it
#pragma omp simd
    for (int i = 0; i < n; i++) { out[i] = x[i] * scale * weight[i]; }
}

static void rmsnorm_rows(float* out, const float* x, const float* weight, int n, int C, float eps) {
#pragma omp parallel for if (n > 4)
    for (int i = 0; i < n; i++) { rmsnorm(out + (size_t)i * (size_t)C, x + (size_t)i * (size_t)C, weight, C, eps); }
}

static void add_rows(float* x, const float* y, int n, int C) {  // x += y
#pragma omp parallel for if (n > 4)
    for (int i = 0; i < n; i++) {
        for (size_t c = (size_t)i * (size_t)C; c < (size_t)(i + 1) * (size_t)C; c++) { x[c] += y[c]; }
    }
}

// Rotates heads of one position: pairs (t, t + HS/2). scale: 1/sqrt(HS) for queries.
static void rope(float* x, int heads, int HS, const float* angles, float scale) {
    int half = HS / 2;
    const float *cosine = angles, *sine = angles + half;
    for (int h = 0; h < heads; h++, x += HS) {
#pragma omp simd
        for (int t = 0; t < half; t++) {
            float a = x[t] * scale, b = x[t + half] * scale;
            x[t] = a * cosine[t] - b * sine[t];
            x[t + half] = b * cosine[t] + a * sine[t];
        }
    }
}

static void rope_angles(float* out, const Config* c, int position) {
    int half = config_head_size(c) / 2;
    for (int t = 0; t < half; t++) {
        double angle = position * config_rope_frequency(c, t);
        out[t] = (float)cos(angle);
        out[half + t] = (float)sin(angle);
    }
}

static inline void cache_store(const Cache* cache, char* base, size_t at, float value) {
    if (cache->half) {
        ((uint16_t*)base)[at] = f32_to_bf16(value);
    } else {
        ((float*)base)[at] = value;
    }
}

// Puts n rotated keys and values (n, NKV HS) into the cache from position T on. A key goes to a line of memory a value:
// so many writes that are waited for are worth all threads, even of one position.
static void cache_put(Cache* cache, const Model* m, int l, const float* k, const float* v, int n) {
    size_t HS = (size_t)m->HS, NKV = (size_t)m->NKV, cap = round_up((size_t)cache->capacity, TILE),
           HSP = round_up(HS, TILE), width = cache->half ? 2 : 4;
    char *keys = cache->k + (size_t)l * cache->k_layer * width, *values = cache->v + (size_t)l * cache->v_layer * width;
#pragma omp parallel for collapse(2) if ((size_t)n * NKV * HS >= 1024)
    for (int i = 0; i < n; i++) {
        for (size_t h = 0; h < NKV; h++) {
            size_t j = (size_t)(cache->T + i), row = ((size_t)i * NKV + h) * HS;
            size_t key = h * cap * HS + j / TILE * HS * TILE + j % TILE;
            for (size_t t = 0; t < HS; t++) { cache_store(cache, keys, key + t * TILE, k[row + t]); }
            for (size_t t = 0; t < HS; t++) {
                cache_store(cache, values, h * cap * HSP + (t / TILE * cap + j) * TILE + t % TILE, v[row + t]);
            }
        }
    }
}

// A block of R queries of one layer, positions p0 .. p0+R-1, and `extra` rows before them where the convolution needs
// those.
typedef struct {
    const Model* m;
    Cache* cache;
    Work* w;
    int l, p0, R, extra, T;  // T = p0 + R keys
    bool keeps;              // the cache will go on from here: its last rows of probabilities are kept
    size_t stride;           // of a score row; key j at PAD + j
    const float* q;          // (extra + R, NH HS)
    // (NH, extra + R, stride) each: a step reads `in` and leaves its result in `in` again (block_swap)
    float *in, *out;
} Block;

static inline float* block_row(const Block* b, float* base, int h, int r) {
    return base + ((size_t)h * (size_t)(b->extra + b->R) + (size_t)(r + b->extra)) * b->stride;
}

// Scores of TILE keys from j0 on, for all rows of head h: S0 = q.k / sqrt(HS) where key <= query, else 0. Also zeroes
// the row ends.
static void scores_tile(const Block* b, int h, int tile) {
    const Model* m = b->m;
    size_t HS = (size_t)m->HS, D = (size_t)m->NH * HS, width = b->cache->half ? 2 : 4,
           cap = round_up((size_t)b->cache->capacity, TILE);
    int kvh = h / (m->NH / m->NKV), j0 = tile * TILE, rows = b->extra + b->R;
    bool last = j0 + TILE >= b->T;
    const char* k =
        b->cache->k + ((size_t)b->l * b->cache->k_layer + (size_t)kvh * cap * HS + (size_t)tile * HS * TILE) * width;
    for (int r = 0; r < rows; r += MR) {
        int mr = rows - r < MR ? rows - r : MR;
        float* c = block_row(b, b->in, h, r - b->extra) + PAD + j0;
        const float* q = b->q + (size_t)r * D + (size_t)h * HS;
        bool some = b->p0 - b->extra + r + mr - 1 >= j0;
        if (some && b->cache->half) {
            gemm_tile_bf16(mr, c, b->stride, q, D, (const uint16_t*)k, HS, false);
        } else if (some) {
            gemm_tile(mr, c, b->stride, q, D, (const float*)k, HS, false);
        }
        for (int i = 0; i < mr; i++) {
            float* row = c + (size_t)i * b->stride;
            int keep = b->p0 - b->extra + r + i + 1 - j0;  // keys of this tile at or before the query
            keep = !some || keep < 0 ? 0 : keep > TILE ? TILE : keep;
            memset(row + keep, 0, (size_t)(TILE - keep + (last ? PAD : 0)) * 4);
            if (tile == 0) { memset(row - PAD, 0, PAD * 4); }
        }
    }
}

// Key-query convolution of one row: out[j] = sum_{a<cq, k<ck} weight[a,k] * rows[a][j - ck/2 + k] for j <= p. rows[a]
// point at key 0 and are zero outside their own causal range.
static void kq_conv_row(float* out, const float* const* rows, const float* weight, int cq, int ck, int p) {
    for (int j = 0; j <= p; j += 2 * LANES) {
        Vec s0 = splat(0), s1 = splat(0);
        for (int a = 0; a < cq; a++) {
            const float* in = rows[a] + j - ck / 2;
            const float* w = weight + a * ck;
            for (int k = 0; k < ck; k++) {
                s0 += load(in + k) * w[k];
                s1 += load(in + k + LANES) * w[k];
            }
        }
        store(out + j, s0);
        store(out + j + LANES, s1);
    }
}

// in -> out, before the softmax: the rows before are in the block.
static void conv_pre_row(const Block* b, int h, int r) {
    const float* rows[MAX_KERNEL];
    int cq = b->m->cq, ck = b->m->ck;
    for (int a = 0; a < cq; a++) { rows[a] = block_row(b, b->in, h, r - (cq - 1) + a) + PAD; }
    kq_conv_row(block_row(b, b->out, h, r) + PAD, rows, b->m->layers[b->l].conv_pre + (size_t)h * (size_t)(cq * ck), cq,
                ck, b->p0 + r);
}

// in -> out, after the softmax: rows before the block come from the cache. Zero above the diagonal again.
static void conv_post_row(const Block* b, int h, int r) {
    const float* rows[MAX_KERNEL];
    int cq = b->m->cq, ck = b->m->ck, p = b->p0 + r;
    for (int a = 0; a < cq; a++) {
        int there = r - (cq - 1) + a;
        const float* row = there >= 0          ? block_row(b, b->in, h, there)
                           : b->p0 + there < 0 ? b->w->zero_row
                                               : cache_p(b->cache, b->m, b->l, h, b->p0 + there);
        rows[a] = row + PAD;
    }
    float* out = block_row(b, b->out, h, r) + PAD;
    kq_conv_row(out, rows, b->m->layers[b->l].conv_post + (size_t)h * (size_t)(cq * ck), cq, ck, p);
    memset(out + p + 1, 0, ((size_t)b->T - (size_t)p - 1 + PAD) * 4);
}

// Keeps the last cq-1 rows of probabilities. Behind a row's own position it must read as zeros for the next cq-1
// queries.
static void keep_probabilities(const Block* b, int h) {
    int keep = b->m->cq - 1 < b->R ? b->m->cq - 1 : b->R;
    for (int r = b->R - keep; r < b->R; r++) {
        size_t n = (size_t)(PAD + b->p0 + r + 1);
        float* to = cache_p(b->cache, b->m, b->l, h, b->p0 + r);
        memcpy(to, block_row(b, b->in, h, r), n * 4);
        memset(to + n, 0, (b->cache->p_stride - n < 2 * PAD ? b->cache->p_stride - n : 2 * PAD) * 4);
    }
}

// Mixes the heads of group g, in -> out: out_o = sum_n weight[g,o,n] in_n. Sums run over n in order.
static void head_mix_row(const Block* b, const float* weight, int ch, int g, int r) {
    const float* w = weight + (size_t)g * (size_t)(ch * ch);
    int end = b->p0 + r;  // the last key that the query sees; zeros follow, which products and convolutions read
    for (int o = 0; o < ch; o++) {
        float* out = block_row(b, b->out, g * ch + o, r) + PAD;
        for (int j = 0; j <= end; j += LANES) {
            Vec sum = splat(0);
            for (int n = 0; n < ch; n++) { sum += load(block_row(b, b->in, g * ch + n, r) + PAD + j) * w[o * ch + n]; }
            store(out + j, sum);
        }
        memset(out + end + 1, 0, ((size_t)b->T - (size_t)end - 1 + PAD) * 4);
    }
}

// Softmax over keys <= p in place; zeros before key 0 and beyond p, where the convolution and the products read on.
static void softmax_row(float* row, int p, int T) {
    float* x = row + PAD;
    float largest = largest_of(x, p + 1), sum = 0;
    int whole = (p + 1) / LANES * LANES;
    Vec sums = splat(0);
    for (int j = 0; j < whole; j += LANES) {
        Vec y = exp_lanes(load(x + j) - largest);
        sums += y;
        store(x + j, y);
    }
    sum = sum_lanes(sums);
    for (int j = whole; j <= p; j++) { sum += x[j] = expf(x[j] - largest); }
    float inverse = 1.0f / sum;
#pragma omp simd
    for (int j = 0; j <= p; j++) { x[j] *= inverse; }
    memset(row, 0, PAD * 4);
    memset(x + p + 1, 0, ((size_t)T - (size_t)p - 1 + PAD) * 4);
}

// O (rows, HS) of head h: up to MR rows of the block from r on, one panel of TILE values.
static void values_tile(const Block* b, int h, int r, int panel) {
    const Model* m = b->m;
    size_t HSP = round_up((size_t)m->HS, TILE), cap = round_up((size_t)b->cache->capacity, TILE),
           width = b->cache->half ? 2 : 4;
    int kvh = h / (m->NH / m->NKV), mr = b->R - r < MR ? b->R - r : MR,
        from = m->c.attention_type == ATTENTION_DIFF ? h & ~1 : h;
    size_t keys = (size_t)(b->p0 + r + mr);
    const char* v =
        b->cache->v + ((size_t)b->l * b->cache->v_layer + (size_t)kvh * cap * HSP + (size_t)panel * cap * TILE) * width;
    float* o = b->w->heads + ((size_t)h * (size_t)b->w->R + (size_t)r) * HSP + (size_t)panel * TILE;
    const float* p = block_row(b, b->in, from, r) + PAD;
    if (b->cache->half) {
        gemm_tile_bf16(mr, o, HSP, p, b->stride, (const uint16_t*)v, keys, false);
    } else {
        gemm_tile(mr, o, HSP, p, b->stride, (const float*)v, keys, false);
    }
}

// Norm and gate of head (diff: pair of heads) u of query r, into o (R, NH HS).
static void head_out(const Block* b, int u, int r, float* o) {
    const Model* m = b->m;
    const Layer* y = &m->layers[b->l];
    int HS = m->HS, heads = config_norm_heads(&m->c), n = heads * HS;
    size_t HSP = round_up((size_t)HS, TILE);
    float* out = o + (size_t)r * (size_t)(m->NH * HS) + (size_t)(u * n);
    for (int i = 0; i < heads; i++) {
        memcpy(out + i * HS, b->w->heads + ((size_t)(u * heads + i) * (size_t)b->w->R + (size_t)r) * HSP,
               (size_t)HS * 4);
    }
    if (y->head_norm) {
        rmsnorm(out, out, y->head_norm, n, 1e-5f);
        for (int i = 0; i < n; i++) { out[i] *= y->head_scale; }
    }
    if (y->head_gate) {
        float dot = y->gate_bias;
        for (int i = 0; i < n; i++) { dot += out[i] * y->head_gate[i]; }
        float gate = 1.0f / (1.0f + expf(-dot));
        for (int i = 0; i < n; i++) { out[i] *= gate; }
    }
}

// One row for the picture: before = softmax of the scores as they come from q.k, after = the weights that multiply the
// values.
static void tap_row(const Block* b, AttentionTap* t, int r, bool after) {
    int p = b->p0 + r;
    if (t->layer != b->l || p >= t->n) { return; }
    int h = after && b->m->c.attention_type == ATTENTION_DIFF ? t->head & ~1 : t->head;
    float* to = (after ? t->after : t->before) + (size_t)p * (size_t)t->n;
    if (after) {
        memcpy(to, block_row(b, b->in, h, r) + PAD, (size_t)(p + 1) * 4);
        return;
    }
    float* row = alloc_or_die((size_t)p + 1 + 2 * PAD + LANES, 4, "a row of the picture");
    memcpy(row + PAD, block_row(b, b->in, h, r) + PAD, (size_t)(p + 1) * 4);
    softmax_row(row, p, p + 1);
    memcpy(to, row + PAD, (size_t)(p + 1) * 4);
    free(row);
}

static inline void block_swap(Block* b) {
    float* t = b->in;
    b->in = b->out;
    b->out = t;
}

// All steps of one block. A barrier (the end of each omp for) separates steps that read other heads or rows; every
// thread swaps its own copy of the block.
static void attention_block(const Block* shared, float* o) {
    const Model* m = shared->m;
    const Layer* y = &m->layers[shared->l];
    bool diff = m->c.attention_type == ATTENTION_DIFF;
    int NH = m->NH, R = shared->R, tiles = (shared->T + TILE - 1) / TILE,
        panels = (int)(round_up((size_t)m->HS, TILE) / TILE);
    AttentionTap* tap = shared->w->tap;
#pragma omp parallel
    {
        Block b = *shared;
#pragma omp for collapse(2) schedule(static)
        for (int h = 0; h < NH; h++) {
            for (int tile = 0; tile < tiles; tile++) { scores_tile(&b, h, tile); }
        }
        if (tap) {
#pragma omp for
            for (int r = 0; r < R; r++) { tap_row(&b, tap, r, false); }
        }
        if (y->conv_pre) {
#pragma omp for collapse(2) schedule(static)
            for (int h = 0; h < NH; h++) {
                for (int r = 0; r < R; r++) { conv_pre_row(&b, h, r); }
            }
            block_swap(&b);
        }
        if (y->mix_pre) {
            int ch = m->c.head_mix_pre_softmax;
#pragma omp for collapse(2) schedule(static)
            for (int g = 0; g < NH / ch; g++) {
                for (int r = 0; r < R; r++) { head_mix_row(&b, y->mix_pre, ch, g, r); }
            }
            block_swap(&b);
        }
#pragma omp for collapse(2) schedule(static)
        for (int h = 0; h < NH; h++) {
            for (int r = 0; r < R; r++) { softmax_row(block_row(&b, b.in, h, r), b.p0 + r, b.T); }
        }
        if (y->conv_post) {
#pragma omp for collapse(2) schedule(static)
            for (int h = 0; h < NH; h++) {
                for (int r = 0; r < R; r++) { conv_post_row(&b, h, r); }
            }
#pragma omp for schedule(static)
            for (int h = 0; h < NH; h++) {
                if (m->cq > 1 && b.keeps) { keep_probabilities(&b, h); }
            }
            block_swap(&b);
        }
        if (y->mix_post) {
            int ch = m->c.head_mix_post_softmax;
#pragma omp for collapse(2) schedule(static)
            for (int g = 0; g < NH / ch; g++) {
                for (int r = 0; r < R; r++) { head_mix_row(&b, y->mix_post, ch, g, r); }
            }
            block_swap(&b);
        }
        if (diff) {  // P_2p - lambda P_2p+1, in place of P_2p
#pragma omp for collapse(2) schedule(static)
            for (int h = 0; h < NH; h += 2) {
                for (int r = 0; r < R; r++) {
                    float *first = block_row(&b, b.in, h, r) + PAD, *second = block_row(&b, b.in, h + 1, r) + PAD;
                    for (int j = 0; j <= b.p0 + r; j++) { first[j] -= y->lambda * second[j]; }
                }
            }
        }
        if (tap) {
#pragma omp for
            for (int r = 0; r < R; r++) { tap_row(&b, tap, r, true); }
        }
#pragma omp for collapse(3) schedule(static)
        for (int h = 0; h < NH; h++) {
            for (int panel = 0; panel < panels; panel++) {
                for (int r = 0; r < R; r += MR) { values_tile(&b, h, r, panel); }
            }
        }
#pragma omp for collapse(2) schedule(static)
        for (int u = 0; u < NH / config_norm_heads(&m->c); u++) {
            for (int r = 0; r < R; r++) { head_out(&b, u, r, o); }
        }
    }
}

// Attention of n positions from T on, which are rows `first` .. of the chunk: keys and values into the cache, the cq-1
// queries before T out of it, to the place before row `first` (of other sequences, whose turn is over). Result in w->o.
// keeps: the cache will go on behind them; else n is one block, and only keys and values from T on are overwritten.
static void attention(const Model* m, Cache* cache, Work* w, int l, int first, int n, bool keeps) {
    const Layer* y = &m->layers[l];
    size_t D = (size_t)(m->NH * m->HS), KV = (size_t)(m->NKV * m->HS), before = (size_t)m->cq - 1, row = (size_t)first;
    float* q = w->q + row * D;
    int R = block_queries(m, w->chunk, cache->T + n);
    assert(keeps || n <= R);
    cache_put(cache, m, l, w->k + row * KV, w->v + row * KV, n);
    if (y->conv_pre && before) { memcpy(q, cache_q(cache, m, l), before * D * 4); }
    for (int i = 0; i < n; i += R) {
        Block b = {.m = m,
                   .cache = cache,
                   .w = w,
                   .l = l,
                   .p0 = cache->T + i,
                   .R = n - i < R ? n - i : R,
                   .extra = y->conv_pre ? m->cq - 1 : 0,
                   .keeps = keeps};
        b.T = b.p0 + b.R;
        b.stride = row_stride(b.T);
        b.q = q + (before + (size_t)i - (size_t)b.extra) * D;
        b.in = w->a;
        b.out = w->b;
        attention_block(&b, w->o + (row + (size_t)i) * D);
    }
    if (y->conv_pre && before && keeps) { memcpy(cache_q(cache, m, l), q + (size_t)n * D, before * D * 4); }
}

static void swiglu(float* gate, const float* up, size_t n) {  // gate = silu(gate) * up
    size_t whole = n / LANES * LANES;
#pragma omp parallel for if (n > 1 << 15)
    for (size_t i = 0; i < whole; i += LANES) {
        Vec g = load(gate + i);
        store(gate + i, g / (exp_lanes(-g) + 1.0f) * load(up + i));
    }
    for (size_t i = whole; i < n; i++) { gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i]; }
}

// Several sequences that all follow the T positions in the cache, or one: sequence k is the next lengths[k] of the
// tokens, together n <= chunk. They go through the products side by side, so that one pass over the weights serves them
// all; attention takes one after the other, each over the positions in the cache and its own. Their final normalised
// states are left in w->xn (n, C). One sequence stays in the cache; of several, each one block, none does.
static void forward_sequences(const Model* m, Cache* cache, Work* w, const int32_t* tokens, const int* lengths,
                              int count) {
    size_t C = (size_t)m->C, D = (size_t)(m->NH * m->HS), KV = (size_t)(m->NKV * m->HS), FF = (size_t)m->FF;
    float eps = (float)m->c.rms_norm_eps, scale = 1.0f / sqrtf((float)m->HS);
    float* q = w->q + (size_t)(m->cq - 1) * D;
    int n = 0;
    for (int k = 0; k < count; k++) {
        assert(lengths[k] >= 1 && n + lengths[k] <= w->chunk && cache->T + lengths[k] <= cache->capacity);
        for (int i = 0; i < lengths[k]; i++, n++) {
            rope_angles(w->angles + (size_t)n * (size_t)m->HS, &m->c, cache->T + i);
        }
    }
#pragma omp parallel for if (n > 4)
    for (int i = 0; i < n; i++) { matrix_row(&m->embed, (size_t)tokens[i], w->x + (size_t)i * C); }
    for (int l = 0; l < m->c.num_hidden_layers; l++) {
        const Layer* y = &m->layers[l];
        rmsnorm_rows(w->xn, w->x, y->input_norm, n, m->C, eps);
        const Product qkv[] = {{q, &y->q}, {w->k, &y->k}, {w->v, &y->v}},
                      gate_up[] = {{w->gate, &y->gate}, {w->up, &y->up}};
        matmuls(qkv, 3, w->xn, C, n);
#pragma omp parallel for if (n > 4)
        for (int i = 0; i < n; i++) {
            const float* angles = w->angles + (size_t)i * (size_t)m->HS;
            rope(q + (size_t)i * D, m->NH, m->HS, angles, scale);
            rope(w->k + (size_t)i * KV, m->NKV, m->HS, angles, 1);
        }
        for (int k = 0, first = 0; k < count; first += lengths[k++]) {
            attention(m, cache, w, l, first, lengths[k], count == 1);
        }
        matmul(w->xn, w->o, D, n, &y->o);
        add_rows(w->x, w->xn, n, m->C);
        rmsnorm_rows(w->xn, w->x, y->post_norm, n, m->C, eps);
        matmuls(gate_up, 2, w->xn, C, n);
        swiglu(w->gate, w->up, (size_t)n * FF);
        matmul(w->xn, w->gate, FF, n, &y->down);
        add_rows(w->x, w->xn, n, m->C);
    }
    rmsnorm_rows(w->xn, w->x, m->norm, n, m->C, eps);
    if (count == 1) { cache->T += n; }
}

static void forward(const Model* m, Cache* cache, Work* w, const int32_t* tokens, int n) {
    forward_sequences(m, cache, w, tokens, &n, 1);
}

// Logits (rows, V) of `rows` states of the last forward from row `first` on.
static void logits_of(const Model* m, const Work* w, int first, int rows, float* out) {
    matmul(out, w->xn + (size_t)first * (size_t)m->C, (size_t)m->C, rows, &m->head);
}

// A whole prompt in chunks; the logits of its last token into `logits` (V).
static void read_tokens(const Model* m, Cache* cache, Work* w, const int32_t* tokens, size_t n, float* logits) {
    for (size_t i = 0; i < n;) {
        int part = n - i < (size_t)w->chunk ? (int)(n - i) : w->chunk;
        forward(m, cache, w, tokens + i, part);
        i += (size_t)part;
        if (i == n && logits) { logits_of(m, w, part - 1, 1, logits); }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A session: model, cache and the tokens so far

typedef struct {
    InferOptions options;
    Model model;
    Cache cache;
    Work work;
    Tokenizer* tokenizer;  // NULL: ids only
    float* logits;         // (LOGIT_ROWS, V)
    int32_t* ids;          // the tokens so far, capacity of them; the first cache.T are in the cache
    int32_t* ends;         // (n_ends) the ids that end a text
    int n_ends;
    int32_t* batch;  // (chunk) tokens of several sequences, for --score
    int n;
    float* candidates;  // (2, V): sampling's weights, and the ids they belong to
    double prompt_seconds, decode_seconds, decode_bytes, best_seconds, best_bytes;  // best: of one token
    long prompt_tokens, decode_tokens, passes;  // passes over the weights that --score made
    long cut;                                   // prompts of --prompts that lost their earliest tokens
    bool terminal;                              // standard output is one
    bool utf8;                                  // it shows UTF-8, as far as is known
} Session;

// At a time: the head is unpacked once for so many, and 32 rows of 128,256 logits are 16 MiB.
enum { LOGIT_ROWS = 32 };

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal) {
    (void)signal;
    interrupted = 1;
}

// Notes Ctrl-C from now on. flags 0: a read that waits ends with EINTR; SA_RESTART: a write that waits goes on.
static void note_interrupts(int flags) {
    struct sigaction action = {0};
    action.sa_handler = on_interrupt;
    action.sa_flags = flags;
    sigaction(SIGINT, &action, NULL);
}

// Does the user's locale say UTF-8? One that names no character set, as "C" and none at all, says nothing against it.
static bool locale_is_utf8(void) {
    static const char* const names[] = {"LC_ALL", "LC_CTYPE", "LANG"};
    const char* locale = NULL;
    for (int i = 0; i < 3 && !(locale && locale[0]); i++) { locale = getenv(names[i]); }
    const char* set = locale ? strchr(locale, '.') : NULL;
    return !set || !strncasecmp(set, ".UTF-8", 6) || !strncasecmp(set, ".UTF8", 5);
}

// Text for a reader: on a terminal control characters are shown, not obeyed (C0 but newline and tab, DEL, C1), and so
// is what it cannot show: all but ASCII where it has another character set than UTF-8.
static void put_text(const Session* session, const char* text, size_t n) {
    for (size_t i = 0, from = 0; session->terminal && i <= n; i++) {
        unsigned char c = i < n ? (unsigned char)text[i] : 0;
        bool shows = session->utf8 || c < 0x80;
        bool c1 = shows && c == 0xC2 && i + 1 < n && (unsigned char)text[i + 1] < 0xA0;
        if (i < n && !c1 && shows && ((c >= 0x20 && c != 0x7F) || c == '\n' || c == '\t')) { continue; }
        put_out(text + from, i - from, false);
        char shown[16];
        if (i < n) {
            put_out(shown, (size_t)snprintf(shown, sizeof shown, "\\x%02x", c1 ? (unsigned char)text[i + 1] : c),
                    false);
        }
        i += c1;
        from = i + 1;
    }
    if (!session->terminal) { put_out(text, n, false); }
    put_out("", 0, true);
}

static void add_end(Session* session, int64_t id) {
    session->ends = realloc(session->ends, ((size_t)session->n_ends + 1) * sizeof *session->ends);
    if (!session->ends) { die("out of memory: ids that end a text"); }
    session->ends[session->n_ends++] = (int32_t)id;
}

// Adds the ids of eos_token_id of a generation_config.json: a number, a list or none.
static bool ends_of_file(Session* session, const char* path, Error* e) {
    Json* j = json_read(path, (size_t)1 << 20, e);
    bool good = j && (j->type == JSON_OBJECT || fail(e, "%s: wanted a JSON object", path));
    const Json* end = json_get(j, "eos_token_id");
    bool list = end && end->type == JSON_ARRAY;
    for (const Json* i = list ? end->child : end; good && i && (list || i->type != JSON_NULL);
         i = list ? i->next : NULL) {
        int64_t id = -1;
        good = json_integer(i, INT32_MIN, INT32_MAX, &id) ||
               fail(e, "%s: eos_token_id: wanted an id or a list of ids", path);
        if (good) { add_end(session, id); }
    }
    json_free(j);
    return good;
}

// The ids that end a text. As in transformers those of DIR/generation_config.json where that file is there; else
// config.json's and the tokenizer's. One beyond the vocabulary never comes.
static void find_ends(Session* session) {
    char path[PATH_SIZE];
    Error e = {{0}};
    const Config* c = &session->model.c;
    path_join(path, sizeof path, session->options.dir, "generation_config.json");
    if (!file_exists(path)) {
        if (c->eos_token_id >= 0) { add_end(session, c->eos_token_id); }
        for (int i = 0; i < c->n_other_eos; i++) { add_end(session, c->other_eos[i]); }
        if (session->tokenizer) { add_end(session, tokenizer_end(session->tokenizer)); }
        return;
    }
    if (!ends_of_file(session, path, &e)) { die("%s", e.text); }
    if (!session->n_ends && !session->options.quiet) {
        fprintf(stderr, "%s names no id that ends a text: only --max-tokens does, as in transformers\n", path);
    }
}

static void session_open(Session* session, const InferOptions* o) {
    memset(session, 0, sizeof *session);
    session->options = *o;
    int want = -1;
    for (int i = W_F32; i <= W_INT8; i++) {
        if (!strcmp(o->weights, weight_names[i])) { want = i; }
    }
    bool generates =
        !o->score && !o->perplexity && !o->logits && !o->attention_map;  // else weights are read once for many tokens
    model_open(&session->model, o->dir, want, o->threads, generates && !o->mapped, o->assume_llama, !o->no_verify);
    const Config* c = &session->model.c;
    if (o->context > c->max_position_embeddings) {
        die("--context: got %d, the model has %d positions", o->context, c->max_position_embeddings);
    }
    session->tokenizer = tokenizer_for(o, c);
    find_ends(session);
    int capacity = o->context ? o->context : c->max_position_embeddings;
    int chunk = o->chunk < capacity ? o->chunk : capacity;
    cache_open(&session->cache, &session->model, capacity, !strcmp(o->cache, "bf16"));
    work_open(&session->work, &session->model, chunk, capacity);
    session->logits = big_alloc((size_t)LOGIT_ROWS * (size_t)session->model.V * 4, "logits");
    session->candidates = big_alloc(2 * (size_t)session->model.V * 4, "candidates");
    session->ids = big_alloc(((size_t)capacity + 1) * 4, "tokens");
    session->batch = big_alloc((size_t)chunk * 4, "tokens of a batch");
    session->terminal = isatty(1);
    session->utf8 = locale_is_utf8();
    if (!o->quiet) {
        const MatrixMemory* memory = &session->model.memory;
        size_t weights = memory->mapped_bytes + memory->own_bytes;
        size_t work = session->work.bytes + (size_t)session->model.V * 4 * (LOGIT_ROWS + 2);
        fprintf(stderr,
                "weights %.1f MiB %s (%.1f mapped), cache %.1f MiB %s for %d positions, working memory %.1f MiB, "
                "together %.1f MiB; %d threads\n",
                (double)weights / 1048576, weight_names[session->model.head.kind],
                (double)memory->mapped_bytes / 1048576, (double)session->cache.bytes / 1048576,
                session->cache.half ? "bf16" : "f32", capacity, (double)work / 1048576,
                (double)(weights + session->cache.bytes + work) / 1048576, omp_get_max_threads());
    }
}

static void summary(const Session* session) {
    if (session->options.quiet) { return; }
    FILE* f = fopen("/proc/self/status", "r");  // ru_maxrss would count the parent's pages before exec
    char line[256];
    long peak = 0;
    while (f && fgets(line, sizeof line, f)) {
        if (!strncmp(line, "VmHWM:", 6)) { peak = strtol(line + 6, NULL, 10); }
    }
    if (f) { fclose(f); }
    fprintf(stderr, "prompt %ld tokens, %.1f tokens/s; ", session->prompt_tokens,
            session->prompt_seconds > 0 ? (double)session->prompt_tokens / session->prompt_seconds : 0);
    if (session->decode_tokens) {
        fprintf(stderr,
                "decode %ld tokens, %.2f tokens/s, %.2f GB/s of weights and cache (fastest token %.2f ms, %.2f GB/s); ",
                session->decode_tokens, (double)session->decode_tokens / session->decode_seconds,
                session->decode_bytes / session->decode_seconds * 1e-9, session->best_seconds * 1e3,
                session->best_bytes / session->best_seconds * 1e-9);
    }
    if (session->cut) { fprintf(stderr, "%ld prompts without their earliest tokens; ", session->cut); }
    fprintf(stderr, "peak memory %.1f MiB\n", (double)peak / 1024);
}

static size_t cache_bytes_read(const Session* session) {  // keys and values of all positions so far, once
    const Model* m = &session->model;
    const Cache* cache = &session->cache;
    return 2 * (size_t)m->c.num_hidden_layers * (size_t)(m->NKV * m->HS) * (size_t)cache->T * (cache->half ? 2 : 4);
}

// The end of a program whose model gives NaN or infinity: what it would go on with is no text and no JSON.
__attribute__((noreturn)) static void die_not_finite(const Session* session, const char* what, int position) {
    die("%s: the %s at position %d are not finite: the numbers of this model overflow", session->options.dir, what,
        position);
}

// Puts the tokens that are not yet in the cache there; the logits of the last one are in session->logits.
static void feed(Session* session) {
    double t0 = seconds_now();
    int fresh = session->n - session->cache.T;
    read_tokens(&session->model, &session->cache, &session->work, session->ids + session->cache.T, (size_t)fresh,
                session->logits);
    if (!all_finite(session->logits, (size_t)session->model.V)) { die_not_finite(session, "logits", session->n - 1); }
    double dt = seconds_now() - t0;
    if (fresh == 1) {
        session->decode_seconds += dt;
        session->decode_tokens++;
        double bytes = (double)(session->model.bytes_per_token + cache_bytes_read(session));
        session->decode_bytes += bytes;
        if (!session->best_seconds || dt < session->best_seconds) {
            session->best_seconds = dt;
            session->best_bytes = bytes;
        }
    } else {
        session->prompt_seconds += dt;
        session->prompt_tokens += fresh;
    }
}

// Are there positions for the tokens so far and `more`? With --shift the first token and the later half are kept where
// there are not, and computed anew.
static bool make_room(Session* session, int more) {
    int capacity = session->cache.capacity, keep = capacity / 2;
    if (session->n + more <= capacity) { return true; }
    if (!session->options.shift || keep < 1 || 1 + keep + more > capacity) { return false; }
    if (session->n > keep + 1) {
        memmove(session->ids + 1, session->ids + session->n - keep, (size_t)keep * sizeof(int32_t));
        session->n = keep + 1;
    }
    cache_clear(&session->cache, &session->model);
    return true;
}

// `all` tokens are more than the context holds.
static bool context_full(const Session* session, size_t all, Error* e) {
    int room = session->cache.capacity;
    return fail(e, "%zu tokens, the context has %d positions%s; shorten the prompt or use --shift", all, room,
                room < session->model.c.max_position_embeddings ? " (--context)" : "");
}

// Appends tokens to the session; too many are refused. With --shift those for which make_room has no room are cut to
// the last that fit half the context, behind the first of all, and how many are not is said.
static void append_ids(Session* session, const int32_t* ids, size_t n) {
    int capacity = session->cache.capacity;
    size_t keep = (size_t)capacity / 2;
    if (session->options.shift && session->n + n > (size_t)capacity && 1 + keep + n > (size_t)capacity) {
        int32_t first = session->n ? session->ids[0] : ids[0];
        size_t lost = n - keep - (session->n == 0);
        if (lost) {
            fprintf(stderr, "%s: %zu of %zu tokens are left out, the earliest: the context has %d positions\n",
                    program_invocation_short_name, lost, n, capacity);
        }
        session->ids[0] = first;
        memcpy(session->ids + 1, ids + n - keep, keep * sizeof(int32_t));
        session->n = 1 + (int)keep;
        cache_clear(&session->cache, &session->model);
        return;
    }
    if (n > (size_t)capacity || !make_room(session, (int)n)) {
        Error e = {{0}};
        context_full(session, (size_t)session->n + n, &e);
        die("%s", e.text);
    }
    memcpy(session->ids + session->n, ids, n * sizeof(int32_t));
    session->n += (int)n;
}

// ---------------------------------------------------------------------------------------------------------------------
// Generating

// Draws a token by the options. The logits stay as they are: where an answer ended at once, the next one begins with
// them too.
static int32_t next_token(Session* session, Rng* rng) {
    int V = session->model.V, known = session->tokenizer ? tokenizer_vocab(session->tokenizer) : V;
    return sample_token(&session->options, session->logits, V, known < V ? known : V, session->ids, session->n,
                        session->candidates, rng);
}

static bool ends_text(const Session* session, int32_t id) {
    bool found = false;
    for (int i = 0; i < session->n_ends && !session->options.ignore_eos; i++) { found |= session->ends[i] == id; }
    return found;
}

// Prints a text up to where a stop begins, and of the rest all but what may yet become one (`last`: nothing may);
// keeps that in it. True: a stop was there.
static bool print_to_stop(Session* session, Text* text, const Stops* stops, bool last) {
    bool stopped = cut_at_stop(text, stops);
    size_t kept = stopped || last ? 0 : maybe_a_stop(text, stops), printed = text->n - kept;
    put_text(session, text->text, printed);
    if (printed) { memmove(text->text, text->text + printed, kept); }
    text->n = kept;
    return stopped;
}

// Continues the session by up to max_tokens tokens, printing each as it comes: text, or ids where as_ids.
static void generate(Session* session, Rng* rng, bool as_ids) {
    TokenStream stream = {{0}, 0};
    Text text = {0};
    Stops stops = stops_of(&session->options.stops, NULL);
    bool stopped = false;
    char* piece =
        session->tokenizer ? alloc_or_die(tokenizer_max_bytes(session->tokenizer) + 8, 1, "a token's text") : NULL;
    for (int i = 0; i < session->options.max_tokens && !interrupted && !stopped; i++) {
        if (!make_room(session, 0)) {
            fprintf(stderr, "%s%s: the context of %d positions is full%s\n", session->terminal ? "\n" : "",
                    program_invocation_short_name, session->cache.capacity,
                    session->options.shift ? ", and too short for --shift" : "; --shift goes on");
            break;
        }
        if (session->cache.T < session->n) { feed(session); }
        int32_t id = next_token(session, rng);
        if (ends_text(session, id)) { break; }
        session->ids[session->n++] = id;
        if (as_ids) {
            char number[16];
            put_out(number, (size_t)snprintf(number, sizeof number, i ? " %d" : "%d", id), true);
        } else {
            text_append(&text, piece, tokenizer_decode(session->tokenizer, &stream, id, piece));
            stopped = print_to_stop(session, &text, &stops, false);
        }
    }
    if (piece && !stopped) {
        text_append(&text, piece, tokenizer_flush(&stream, piece));
        print_to_stop(session, &text, &stops, true);
    }
    text_free(&text);
    free(stops.all);
    free(piece);
}

static const Tokenizer* need_tokenizer(const Session* session) {
    if (!session->tokenizer) {
        die("%s: config.json names no tokenizer that is there; give --tokenizer NAME|FILE, or ids",
            session->options.dir);
    }
    return session->tokenizer;
}

// false: the tokenizer has no ids for it, or the context no room.
static bool append_text(Session* session, const char* text, size_t n, Error* e) {
    int32_t* ids;
    size_t count;
    if (!tokenizer_encode(need_tokenizer(session), text, n, &ids, &count, e)) { return false; }
    size_t all = (size_t)session->n + count;
    bool fits = all <= (size_t)session->cache.capacity || session->options.shift;
    if (fits) { append_ids(session, ids, count); }
    free(ids);
    return fits || context_full(session, all, e);
}

static void append_bos(Session* session) {
    int32_t bos = tokenizer_bos(need_tokenizer(session));
    if (bos >= 0) { append_ids(session, &bos, 1); }
}

static void read_prompt(Session* session) {
    if (session->options.token_ids) {
        size_t n;
        int32_t* ids = parse_ids(session->options.token_ids, session->model.V, "--token-ids", &n);
        append_ids(session, ids, n);
        free(ids);
    } else {
        char* text = NULL;
        size_t n = session->options.prompt ? strlen(session->options.prompt) : 0;
        Error e = {{0}};
        need_tokenizer(session);
        if (!session->options.prompt && !session->options.quiet && isatty(STDIN_FILENO)) {
            fprintf(stderr, "the prompt, up to Ctrl-D:\n");
        }
        // The descriptor itself: opened by name, a file would begin anew, and a socket could not be opened.
        if (!session->options.prompt &&
            !read_descriptor(STDIN_FILENO, "standard input", (size_t)1 << 30, &text, &n, &e)) {
            die("%s", e.text);
        }
        size_t mark = text ? byte_order_mark(text, n) : 0;
        const char* prompt = text ? text + mark : session->options.prompt;
        n -= mark;
        append_bos(session);
        if (!append_text(session, prompt, n, &e)) { die("prompt: %s", e.text); }
        if (session->options.echo) { put_text(session, prompt, n); }
        free(text);
    }
    if (!session->n) {
        die("%s: nothing to continue", session->options.token_ids
                                           ? "--token-ids: the list is empty, and no BOS goes before ids"
                                           : "the prompt is empty and the tokenizer has no BOS");
    }
}

static void run_samples(Session* session) {
    bool as_ids = session->options.token_ids != NULL;
    CacheMark start = {0};
    read_prompt(session);
    int prompt = session->n;
    float* first = alloc_or_die((size_t)session->model.V, 4, "logits of the prompt");
    feed(session);
    if (session->options.samples > 1) { mark_set(&start, &session->cache, &session->model); }
    memcpy(first, session->logits, (size_t)session->model.V * 4);
    int32_t* ids = alloc_or_die((size_t)prompt, sizeof *ids, "the prompt");
    memcpy(ids, session->ids, (size_t)prompt * sizeof *ids);
    for (int i = 0; i < session->options.samples; i++) {
        Rng rng = rng_make((uint64_t)session->options.seed, (uint64_t)i);
        if (i) {  // a shift may have moved the prompt out of the cache: then it is read again
            memcpy(session->ids, ids, (size_t)prompt * sizeof *ids);
            session->n = prompt;
            if (session->options.shift) {
                cache_clear(&session->cache, &session->model);
                feed(session);
            } else {
                mark_return(&start, &session->cache, &session->model);
            }
            memcpy(session->logits, first, (size_t)session->model.V * 4);
            if (!as_ids) { put_out("----\n", 5, false); }
        }
        generate(session, &rng, as_ids);
        put_out("\n", 1, true);
    }
    mark_free(&start);
    free(first);
    free(ids);
}

// Continues the session by up to max_tokens tokens into `out`, until a text of `stops` comes; returns how many.
static int complete(Session* session, Rng* rng, const Stops* stops, Text* out) {
    TokenStream stream = {{0}, 0};
    char* piece = alloc_or_die(tokenizer_max_bytes(session->tokenizer) + 8, 1, "a token's text");
    bool stopped = false;
    int tokens = 0;
    while (tokens < session->options.max_tokens && !stopped) {
        if (session->cache.T < session->n) { feed(session); }
        int32_t id = next_token(session, rng);
        if (ends_text(session, id)) { break; }
        session->ids[session->n++] = id;
        tokens++;
        text_append(out, piece, tokenizer_decode(session->tokenizer, &stream, id, piece));
        stopped = cut_at_stop(out, stops);
    }
    if (!stopped) { text_append(out, piece, tokenizer_flush(&stream, piece)); }
    cut_at_stop(out, stops);  // what was left of a character may have made one whole
    free(piece);
    return tokens;
}

// The prompt of a request into the session, where room for the answer stays. With --shift a longer prompt loses its
// earliest tokens, as an evaluation harness has it.
static void append_request(Session* session, const Json* prompt, const char* where) {
    Error e = {{0}};
    int32_t *ids, bos = tokenizer_bos(need_tokenizer(session));
    size_t n, room = (size_t)session->cache.capacity, answer = (size_t)session->options.max_tokens;
    if (!prompt || prompt->type != JSON_STRING) { die("%s: wanted an object with \"prompt\", a string", where); }
    if (!tokenizer_encode(session->tokenizer, prompt->string, prompt->length, &ids, &n, &e)) {
        die("%s: prompt: %s", where, e.text);
    }
    size_t all = n + (bos >= 0), kept = answer < room && all > room - answer ? room - answer : all;
    if (answer >= room || (kept < all && !session->options.shift)) {
        die("%s: %zu tokens and %zu to come, the context has %zu positions%s", where, all, answer, room,
            answer < room ? "; --shift drops the earliest" : "");
    }
    if (!all) { die("%s: the prompt is empty and the tokenizer has no BOS: nothing to continue", where); }
    session->n = 0;
    session->cut += kept < all;
    cache_clear(&session->cache, &session->model);
    if (bos >= 0 && kept == all) { session->ids[session->n++] = bos; }
    size_t rest = kept - (size_t)session->n;
    memcpy(session->ids + session->n, ids + n - rest, rest * sizeof *ids);
    session->n += (int)rest;
    free(ids);
}

// One line: the answer goes out at once, so that a program that asks and waits gets it.
static void answer_request(void* model, const Json* j, long number, const char* where) {
    Session* session = model;
    InferOptions options = session->options, *o = &session->options;
    Rng rng = rng_make((uint64_t)o->seed, (uint64_t)number);
    const Json *until = json_get(j, "until"), *length = json_get(j, "max_tokens");
    if (until && until->type == JSON_NULL) { until = NULL; }
    o->max_tokens = (int)request_number(j, "max_tokens", o->max_tokens, 0, MAX_CONTEXT, true, where);
    // The length that nobody asked for leaves half of a short context to the prompt.
    bool asked = o->own_length || (length && length->type != JSON_NULL);
    if (!asked && o->max_tokens > session->cache.capacity / 2) { o->max_tokens = session->cache.capacity / 2; }
    o->temperature = request_number(j, "temperature", o->temperature, 0, 100, false, where);
    o->top_k = (int)request_number(j, "top_k", o->top_k, 0, MAX_VOCAB, true, where);
    o->top_p = request_number(j, "top_p", o->top_p, 0, 1, false, where);
    bool good = !until || until->type == JSON_ARRAY;
    for (const Json* s = good && until ? until->child : NULL; s; s = s->next) { good &= s->type == JSON_STRING; }
    if (!good) { die("%s: until: wanted a list of strings", where); }
    append_request(session, json_get(j, "prompt"), where);

    Text text = {0};
    Stops stops = stops_of(&o->stops, until);
    prompt_put(&text, complete(session, &rng, &stops, &text));
    text_free(&text);
    free(stops.all);
    *o = options;
}

static void run_interactive(Session* session) {
    Rng rng = rng_make((uint64_t)session->options.seed, 0);
    char* line = NULL;
    size_t cap = 0;
    bool asks = isatty(0);
    append_bos(session);
    for (;;) {
        if (asks) { put_out("> ", 2, true); }
        note_interrupts(0);
        errno = 0;
        ssize_t n = getline(&line, &cap, stdin);
        int why = errno;
        note_interrupts(SA_RESTART);
        if (n < 0 && why == EINTR) {
            clearerr(stdin);
            interrupted = 0;
            if (asks) { put_out("\n", 1, true); }
            continue;
        }
        if (n < 0 && !feof(stdin)) { die("standard input: %s", strerror(why)); }
        if (n < 0) { break; }
        while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) { n--; }
        Error e = {{0}};
        if (!append_text(session, line, (size_t)n, &e)) {  // who types can type again
            if (!asks) { die("prompt: %s", e.text); }
            fprintf(stderr, "%s: %s\n", program_invocation_short_name, e.text);
            continue;
        }
        if (!session->n) { continue; }
        interrupted = 0;
        generate(session, &rng, false);
        put_out("\n", 1, true);
    }
    free(line);
}

static bool is_file(const char* path, const struct stat* file) {
    struct stat st;
    return stat(path, &st) == 0 && st.st_dev == file->st_dev && st.st_ino == file->st_ino;
}

// Refuses an output that would take the place of a file which the model is read from.
static void refuse_input(const Session* session, const char* option, const char* path) {
    const SafeTensors* files = &session->model.files;
    const char *const names[] = {"config.json", "generation_config.json", "manifest.json",
                                 "model.safetensors.index.json", session->model.c.tokenizer},
                      *tokenizer = session->options.tokenizer;
    struct stat out;
    if (stat(path, &out)) { return; }
    bool same = tokenizer && is_file(tokenizer, &out);
    for (int i = 0; i < files->n_files; i++) { same |= is_file(files->paths[i], &out); }
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char name[PATH_SIZE];
        path_join(name, sizeof name, session->options.dir, names[i]);
        same |= is_file(name, &out);
    }
    if (same) { die("%s: %s is a file of the model itself, wanted another one to write to", option, path); }
}

// --logits: every position's logits, as they come, into a safetensors file.
static void run_logits(Session* session) {
    refuse_input(session, "--logits", session->options.logits);
    read_prompt(session);
    size_t V = (size_t)session->model.V;
    Error e = {{0}};
    StWriter out;
    StEntry entry = {"logits", DT_F32, 2, {(size_t)session->n, (size_t)session->model.V}};
    bool good = st_writer_open(&out, session->options.logits, &entry, 1, NULL, 0, &e);
    for (int i = 0; good && i < session->n;) {
        int part = session->n - i < session->work.chunk ? session->n - i : session->work.chunk;
        forward(&session->model, &session->cache, &session->work, session->ids + i, part);
        for (int r = 0; good && r < part; r += LOGIT_ROWS) {
            int rows = part - r < LOGIT_ROWS ? part - r : LOGIT_ROWS;
            logits_of(&session->model, &session->work, r, rows, session->logits);
            for (int k = 0; k < rows; k++) {
                if (all_finite(session->logits + (size_t)k * V, V)) { continue; }
                st_writer_abort(&out);
                die_not_finite(session, "logits", i + r + k);
            }
            good = st_writer_put(&out, session->logits, (size_t)rows * (size_t)session->model.V * 4, &e);
        }
        i += part;
    }
    if (!good || !st_writer_close(&out, NULL, NULL, &e)) { die("%s", e.text); }
}

// --attention-map (mta/attention_map.h).
static void run_attention_map(Session* session) {
    refuse_input(session, "--attention-map", session->options.attention_map);
    if (session->options.layer >= session->model.c.num_hidden_layers || session->options.head >= session->model.NH) {
        die("--layer %d --head %d: the model has layers 0 to %d and heads 0 to %d", session->options.layer,
            session->options.head, session->model.c.num_hidden_layers - 1, session->model.NH - 1);
    }
    read_prompt(session);
    if (session->n > 1024) { die("--attention-map: a picture of %d tokens, wanted at most 1024", session->n); }
    size_t cells = (size_t)session->n * (size_t)session->n;
    AttentionTap tap = {session->options.layer, session->options.head, session->n,
                        alloc_or_die(cells, 4, "the picture"), alloc_or_die(cells, 4, "the picture")};
    session->work.tap = &tap;
    feed(session);
    for (int i = 0; i < session->n; i++) {
        size_t row = (size_t)i * (size_t)session->n;
        if (!all_finite(tap.before + row, (size_t)session->n) || !all_finite(tap.after + row, (size_t)session->n)) {
            die_not_finite(session, "attention weights", i);
        }
    }
    attention_map_write(session->options.attention_map, &tap, session->tokenizer, session->ids);
    free(tap.before);
    free(tap.after);
}

// ---------------------------------------------------------------------------------------------------------------------
// Scoring (mta/score.h reads and answers the requests). They come sorted by their tokens, so that neighbours share
// prefixes. Where the next ones will part from this one, the cache is marked; they start there. Neighbours that differ
// in short ends only, as the choices of a question do, are a batch: what they share goes into the cache, and one pass
// over the weights serves all ends.

// A pass over the weights costs about as much as PASS tokens more in one that is made anyway (measured: 880m, bf16, two
// cores, passes of 5 to 128 tokens: 120 ms and 6.9 ms a token).
enum { MARKS = 8, BATCH = 64, PASS = 16 };

// Of one row of logits (V): the log-probability of `target`, NaN where one of them is not finite, and whether greedy
// decoding takes it: no other is more probable, none before it as probable.
typedef struct {
    double logprob;
    bool best;
} RowScore;

static RowScore score_row(const float* logits, int V, int32_t target) {
    float largest = largest_of(logits, V);
    double sum = all_finite(logits, (size_t)V) ? 0 : NAN;
    for (int v = 0, part; v < V; v += part) {  // parts of 4096 in float, together in double
        part = V - v < 4096 ? V - v : 4096;
        Vec sums = splat(0);
        int i = 0;
        for (; i + LANES <= part; i += LANES) { sums += exp_lanes(load(logits + v + i) - largest); }
        sum += (double)sum_lanes(sums);
        for (; i < part; i++) { sum += expf(logits[v + i] - largest); }
    }
    bool best = logits[target] == largest;
    for (int v = 0; best && v < target; v++) { best = logits[v] != largest; }
    return (RowScore){(double)logits[target] - largest - log(sum), best};
}

// Scores what the last forward has computed: of sequence k, lengths[k] rows, row r is position `start` + r of request
// q[k] and predicts the one behind it. The rows that predict continuations are moved together first.
static void score_rows(Session* session, ScoreRequest* const* q, const int* lengths, int count, int start) {
    size_t C = (size_t)session->model.C, V = (size_t)session->model.V;
    int rows = 0, row = 0, target[LOGIT_ROWS];
    ScoreRequest* owner[LOGIT_ROWS];
    RowScore score[LOGIT_ROWS];
    for (int k = 0; k < count; k++) {
        for (int r = 0; r < lengths[k]; r++, row++) {
            bool wanted = start + r + 1 >= q[k]->context && start + r + 1 < q[k]->n;
            if (wanted) {
                memmove(session->work.xn + (size_t)rows * C, session->work.xn + (size_t)row * C, C * 4);
                owner[rows] = q[k];
                target[rows++] = start + r + 1;
            }
            bool last = k == count - 1 && r == lengths[k] - 1;
            if (!rows || (rows < LOGIT_ROWS && !last)) { continue; }
            logits_of(&session->model, &session->work, 0, rows, session->logits);
#pragma omp parallel for if (V > 4096)
            for (int i = 0; i < rows; i++) {
                score[i] = score_row(session->logits + (size_t)i * V, (int)V, owner[i]->ids[target[i]]);
            }
            for (int i = 0; i < rows; i++) {
                owner[i]->token_logprobs[target[i] - owner[i]->context] = (float)score[i].logprob;
                owner[i]->logprob += score[i].logprob;
                owner[i]->greedy = owner[i]->greedy && score[i].best;
            }
            rows = 0;
        }
    }
}

// Depths at which later requests, behind number k, will start again, none deeper than `lowest`: the running minima of
// what they share. Two that are near each other are one, the shallower, and one near `from`, where this one starts, is
// none.
static int mark_depths(ScoreRequest* const* sorted, int k, int n, int from, int lowest, int* depths) {
    int count = 0, opened = 0;
    for (int i = k; i + 1 < n && count < MARKS; i++) {
        int shared = score_shared(sorted[i], sorted[i + 1]);
        lowest = shared < lowest ? shared : lowest;
        if (lowest < from + PASS) { break; }
        if (count && opened - lowest < PASS) {
            depths[count - 1] = lowest;
        } else {
            opened = depths[count++] = lowest;
        }
    }
    return count;  // falling: the last is the shallowest
}

// How many of sorted[k] .. make a batch, and the positions that its ends share, at least `from`. One more joins while
// the tokens that are computed once more for it cost less than the pass over the weights that it saves; an end fits a
// block of attention, all together a chunk.
static int batch_size(const Session* session, ScoreRequest* const* sorted, int k, int n, int from, int* common) {
    int size = 1, first = sorted[k]->n - 1, longest = first, together = first;  // input tokens, shared ones too
    *common = first;
    for (; size < BATCH && k + size < n; size++) {
        const ScoreRequest* q = sorted[k + size];
        int shared = score_shared(sorted[k + size - 1], q), next = shared < *common ? shared : *common;
        int again = (size - 1) * (*common - next) + (shared - next);
        longest = q->n - 1 > longest ? q->n - 1 : longest;
        together += q->n - 1;
        if (q->n == q->context || next < from || next == first || again >= PASS) { break; }
        int chunk = session->work.chunk, block = block_queries(&session->model, chunk, longest);
        if (longest - next > block || together - (size + 1) * next > chunk) { break; }
        *common = next;
    }
    return size;
}

// sorted[k] alone, up to position `end`: its prefix from the cache's position on, scored where it is continuation,
// with marks at the depths.
static void score_to(Session* session, ScoreRequest* q, int end, const int* depths, int stops, CacheMark* marks,
                     int* held) {
    while (session->cache.T < end) {
        int start = session->cache.T, stop = stops && depths[stops - 1] < end ? depths[stops - 1] : end;
        int part = stop - start < session->work.chunk ? stop - start : session->work.chunk;
        forward(&session->model, &session->cache, &session->work, q->ids + start, part);
        session->passes++;
        score_rows(session, &q, &part, 1, start);
        if (stops && session->cache.T == depths[stops - 1]) {
            stops--;
            if (*held < MARKS) { mark_set(&marks[(*held)++], &session->cache, &session->model); }
        }
    }
}

// The ends of a batch, from the cache's position on.
static void score_ends(Session* session, ScoreRequest* const* q, int count) {
    int lengths[BATCH], n = 0, start = session->cache.T;
    for (int k = 0; k < count; k++) {
        lengths[k] = q[k]->n - 1 - start;
        memcpy(session->batch + n, q[k]->ids + start, (size_t)lengths[k] * sizeof(int32_t));
        n += lengths[k];
    }
    forward_sequences(&session->model, &session->cache, &session->work, session->batch, lengths, count);
    session->passes++;
    score_rows(session, q, lengths, count, start);
}

// Scorer.score: the requests sorted by their ids, model a Session.
static int score_part(void* model, ScoreRequest** sorted, int left, long* passes) {
    enum { PART = 256 };  // requests between two reports of how far it is
    Session* session = model;
    CacheMark marks[MARKS] = {{0}};
    int held = 0, n = left < PART ? left : PART, depths[MARKS], size, common;
    long before = session->passes;
    for (int k = 0; k < n; k += size) {
        ScoreRequest* q = sorted[k];
        int shared = k ? score_shared(sorted[k - 1], q) : 0;
        while (held && marks[held - 1].T > shared) { mark_free(&marks[--held]); }
        if (held) {
            mark_return(&marks[held - 1], &session->cache, &session->model);
        } else {
            cache_clear(&session->cache, &session->model);
        }
        size = q->n == q->context ? 1 : batch_size(session, sorted, k, n, session->cache.T, &common);
        int end = size > 1 ? common : q->n > q->context ? q->n - 1 : 0;
        int stops = mark_depths(sorted, k + size - 1, n, session->cache.T, end, depths);
        score_to(session, q, end, depths, stops, marks, &held);
        if (size > 1) { score_ends(session, sorted + k, size); }
        for (int i = k; i < k + size; i++) {
            session->prompt_tokens += sorted[i]->n - (sorted[i]->n > sorted[i]->context);
        }
    }
    while (held) { mark_free(&marks[--held]); }
    *passes += session->passes - before;
    return n;
}

static void run_score(Session* session) {
    char unknown[PATH_SIZE + 128];
    snprintf(unknown, sizeof unknown,
             "%s: config.json names no tokenizer that is there; give --tokenizer NAME|FILE, or ids",
             session->options.dir);
    Scorer scorer = {.tokenizer = session->tokenizer,
                     .no_tokenizer = unknown,
                     .vocab = session->model.V,
                     .positions = session->cache.capacity,
                     .shift = session->options.shift,
                     .quiet = session->options.quiet,
                     .order = score_by_ids,
                     .score = score_part,
                     .model = session};
    session->prompt_seconds = score_lines(&scorer, session->options.score);
}

// Perplexity.score: one window, of which the tokens behind its context are scored.
static void score_window(void* model, ScoreRequest* q) {
    Session* session = model;
    int held = 0;  // no marks: windows share no prefix
    cache_clear(&session->cache, &session->model);
    score_to(session, q, q->n - 1, NULL, 0, NULL, &held);
    session->prompt_tokens += q->n - 1;
}

static void run_perplexity(Session* session) {
    Perplexity p = {.tokenizer = need_tokenizer(session),
                    .positions = session->cache.capacity,
                    .stride = session->options.stride,
                    .quiet = session->options.quiet,
                    .score = score_window,
                    .model = session};
    session->prompt_seconds = perplexity_of(&p, session->options.perplexity);
}

#ifndef MTA_LIBRARY  // dev/bench/infer_step.c includes this file
int main(int argc, char** argv) {
    static Session session;
    InferOptions o = infer_options_default();
    settle_signals();
    settle_threads(argv);
    open_standard_files();
    signal(SIGPIPE, SIG_IGN);  // a closed pipe is an error of write(2), told as one
    infer_options_read(&o, argc, argv);
    if (o.tokenize || o.detokenize) {
        run_tokenizer(&o);
        return 0;
    }
    session_open(&session, &o);
    if (o.score) {
        run_score(&session);
    } else if (o.perplexity) {
        run_perplexity(&session);
    } else if (o.logits) {
        run_logits(&session);
    } else if (o.attention_map) {
        run_attention_map(&session);
    } else if (o.prompts) {
        prompt_lines(o.prompts, answer_request, &session);
    } else if (o.interactive) {
        run_interactive(&session);
    } else {
        run_samples(&session);
    }
    summary(&session);
    tokenizer_free(session.tokenizer);
    return 0;
}
#endif
