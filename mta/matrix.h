// mta/matrix.h: matrices as they are stored (f32, bf16, f16) or in int8, and their products with rows of x.
//
// Products of a few rows are dot products along the stored rows, read from memory once; of many rows, panels of TILE
// outputs are unpacked to fp32 and multiplied by gemm_tile, which serves other products of fp32 or bf16 panels as well.
// All of it is memory and arithmetic: no layer of the model. Vectors, as GCC and clang have them, are of 16 floats.
#ifndef MTA_MATRIX_H
#define MTA_MATRIX_H
#include "exp.h"
#include "safetensors.h"
#include "util.h"
#include "vector.h"

#include <math.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of 16 floats. The compiler makes one AVX-512 register of each, two of AVX2, four of SSE or NEON; only the
// conversions that it does badly are written with intrinsics, with a plain loop beside them.

typedef int32_t IntVec __attribute__((vector_size(VECTOR_BYTES)));

// Tile of gemm_tile: MR rows by TILE columns of accumulators that fit the registers (AVX-512 has 32 of 16 floats, AVX2
// 16 of 8).
#ifdef __AVX512F__
enum { MR = 8, TILE_VECTORS = 2 };
#else
enum { MR = 6, TILE_VECTORS = 1 };
#endif
enum { TILE = TILE_VECTORS * LANES };

static inline Vec splat(float x) { return (Vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

static inline Vec to_float(IntVec x) {
#if defined(__clang__) || __GNUC__ >= 9
    return __builtin_convertvector(x, Vec);
#else  // gcc 8 has no such builtin, and makes the same instructions of the loop
    float f[LANES];
    for (int i = 0; i < LANES; i++) { f[i] = (float)x[i]; }
    return load(f);
#endif
}

static inline Vec load_bf16(const uint16_t* p) {
#ifdef __AVX512F__
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    float f[LANES];
    for (int i = 0; i < LANES; i++) { f[i] = bf16_to_f32(p[i]); }
    return load(f);
#endif
}

static inline Vec load_f16(const uint16_t* p) {
#ifdef __AVX512F__
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    float f[LANES];
#ifdef __F16C__
    _mm256_storeu_ps(f, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
    _mm256_storeu_ps(f + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8))));
#else
    for (int i = 0; i < LANES; i++) { f[i] = f16_to_f32(p[i]); }
#endif
    return load(f);
#endif
}

static inline float sum_lanes(Vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) { s += x[i]; }
    return s;
#endif
}

// The largest of n values; -infinity of none.
static inline float largest_of(const float* x, int n) {
    float largest = -INFINITY;
    int whole = n / LANES * LANES;
    Vec most = splat(-INFINITY);
    for (int i = 0; i < whole; i += LANES) {
        Vec y = load(x + i);
        most = (Vec)(((IntVec)y & (y > most)) | ((IntVec)most & ~(y > most)));
    }
    for (int i = 0; i < LANES; i++) { largest = most[i] > largest ? most[i] : largest; }
    for (int i = whole; i < n; i++) { largest = x[i] > largest ? x[i] : largest; }
    return largest;
}

// Is each of n values finite?
static inline bool all_finite(const float* x, size_t n) {
    size_t i = 0;
    Vec zeros = splat(0);  // x - x is 0, or NaN where x is NaN or infinite; a NaN stays one in the sum
    for (; i + LANES <= n; i += LANES) { zeros += load(x + i) - load(x + i); }
    float sum = sum_lanes(zeros);
    for (; i < n; i++) { sum += x[i] - x[i]; }
    return sum == 0;
}

// exp_float of every lane; the compiler makes vector instructions of the loop.
static inline Vec exp_lanes(Vec x) {
    float lane[LANES];
    store(lane, x);
    for (int i = 0; i < LANES; i++) { lane[i] = exp_float(lane[i]); }
    return load(lane);
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrices. rows x cols, y = x W^T, stored row by row; int8 by tiles of LANES rows and GROUP columns, padded with
// zeros. The GROUP values of a row in a tile share a scale. Four of them are one of the 16 integers of a vector, one
// integer a row: so products need no sums over lanes, and one instruction multiplies 64 weights.

typedef enum { W_F32, W_BF16, W_F16, W_INT8 } WeightKind;
static const char* const weight_names[] = {"f32", "bf16", "f16", "int8"};
// from GEMM_ROWS rows on, unpacking panels costs less than it saves (measured)
enum { GROUP = 64, GEMM_ROWS = 5, K_BLOCK = 384 };

typedef struct {
    uint8_t q[GROUP / 4][4 * LANES];  // row r, column k: 128 + weight / scale[r] at [k / 4][4 r + k % 4]
    float scale[LANES];
} Int8Tile;

typedef struct {
    WeightKind kind;
    size_t rows, cols;
    const void* data;  // of the kind; in the mapping, or in memory of our own; int8: panels of LANES rows, of tiles
    size_t bytes;      // read by one pass, scales included
} Matrix;

// Memory is asked for this far ahead of its use, into the second level of caches: it covers the page walks at which the
// hardware's own prefetch stops, and the first level's few buffers for lines under way stay free (dev/experiments.tsv).
// The compiler must not move it: one beside each load is 4% faster than several in a row.
enum { AHEAD = 3072 };
static inline void prefetch(const void* p) {
    __builtin_prefetch((const char*)p + AHEAD, 0, 2);
    __asm__ volatile("" ::: "memory");
}

static inline size_t groups_of(size_t cols) { return (cols + GROUP - 1) / GROUP; }
static inline size_t panels_of(size_t rows) { return (rows + LANES - 1) / LANES; }

// The tile that holds row and column c.
static inline const Int8Tile* tile_at(const Matrix* w, size_t row, size_t c) {
    return (const Int8Tile*)w->data + row / LANES * groups_of(w->cols) + c / GROUP;
}

// The weights of columns k, without their scales, one row a lane.
static inline Vec tile_column(const Int8Tile* t, size_t k) {
    IntVec four = *(const IntVec*)t->q[k / 4];
    return to_float(((four >> (int)(8 * (k % 4))) & 255) - 128);
}

// Always inline, so that the compiler sees the same loops in every program: of a loop that it does not turn into
// vectors it fuses products and sums, which changes last bits.
INLINE float weight_at(const Matrix* w, size_t row, size_t c) {
    size_t i = row * w->cols + c;
    if (w->kind == W_F32) {
        float f;
        memcpy(&f, (const char*)w->data + 4 * i, 4);
        return f;
    }
    if (w->kind == W_INT8) {
        const Int8Tile* t = tile_at(w, row, c);
        size_t r = row % LANES, k = c % GROUP;
        return (float)(t->q[k / 4][4 * r + k % 4] - 128) * t->scale[r];
    }
    uint16_t h;
    memcpy(&h, (const char*)w->data + 2 * i, 2);
    return w->kind == W_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

// 16 weights of a row from column c on; not of int8.
INLINE Vec weights_at(const Matrix* w, WeightKind kind, size_t row, size_t c) {
    size_t i = row * w->cols + c;
    if (kind == W_F32) { return load((const float*)w->data + i); }
    if (kind == W_BF16) { return load_bf16((const uint16_t*)w->data + i); }
    return load_f16((const uint16_t*)w->data + i);
}

static inline void matrix_row(const Matrix* w, size_t row, float* out) {
    for (size_t c = 0; c < w->cols; c++) { out[c] = weight_at(w, row, c); }
}

// A group of x for int8 weights. Where the processor multiplies and sums bytes, x is held in 15 bits, scale * (128 high
// + low): two integer dot products then do the work of four conversions to float and four multiplications, which would
// be slower than memory. They take unsigned by signed bytes, hence the 128 in a tile, which `start` takes out again.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef struct {
    int8_t high[GROUP], low[GROUP];
    float scale;
    int32_t start;
} SplitGroup;
#else
typedef struct {
    float x[GROUP];
} SplitGroup;
#endif

static inline void split_group(SplitGroup* g, const float* x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    const __m512i half = _mm512_set1_epi32(64);
    __m512 v[4];
    __m512i largest =
        _mm512_setzero_si512();  // of the bits without the sign: in the order of the values, NaN above all
    for (int u = 0; u < 4; u++) {
        v[u] = _mm512_loadu_ps(x + u * LANES);
        largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(v[u])));
    }
    int32_t bits = _mm512_reduce_max_epi32(largest);
    float most;
    memcpy(&most, &bits, sizeof most);
    float inverse = most > 0 ? 16256.0f / most : 0;
    if (!isfinite(inverse)) { inverse = 0; }  // all below 1e-34: zeros
    g->scale = inverse > 0 ? most / 16256.0f : 0;
    if (!isfinite(most)) {  // what is not finite must show in the result
        memset(g, 0, sizeof *g);
        g->scale = NAN;
        return;
    }
    __m512i sum = _mm512_setzero_si512();
    for (int u = 0; u < 4; u++) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[u], _mm512_set1_ps(inverse)));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, half), 7);
        _mm_storeu_si128((__m128i*)(g->high + u * LANES), _mm512_cvtepi32_epi8(high));
        __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 7));
        _mm_storeu_si128((__m128i*)(g->low + u * LANES), _mm512_cvtepi32_epi8(low));
        sum = _mm512_add_epi32(sum, q);
    }
    g->start = -128 * _mm512_reduce_add_epi32(sum);
#else
    memcpy(g->x, x, sizeof g->x);
#endif
}

// x (n, cols) -> groups (n, groups_of(cols)), the last one of a row filled up with zeros; malloc'ed.
static inline SplitGroup* split_groups(const float* x, size_t ldx, int n, size_t cols) {
    size_t groups = groups_of(cols);
    SplitGroup* out = (SplitGroup*)alloc_or_die((size_t)n * groups, sizeof *out, "split activations");
    for (size_t i = 0; i < (size_t)n * groups; i++) {
        size_t c = i % groups * GROUP;
        const float* from = x + i / groups * ldx + c;
        float last[GROUP] = {0};
        if (c + GROUP > cols) { memcpy(last, from, (cols - c) * sizeof *last); }
        split_group(&out[i], c + GROUP > cols ? last : from);
    }
    return out;
}

// Dot products of the LANES rows of one panel, `groups` tiles, with x.
static inline Vec dot_panel(const Int8Tile* t, size_t groups, const SplitGroup* g) {
    Vec sum = splat(0);
    for (; groups; groups--, t++, g++) {
        prefetch(t->scale);
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        __m512i high[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        __m512i low[2] = {_mm512_set1_epi32(g->start), _mm512_setzero_si512()};
#pragma GCC unroll 16
        for (int k = 0; k < GROUP / 4; k++) {
            prefetch(t->q[k]);
            int32_t four[2];
            memcpy(&four[0], g->high + 4 * k, 4);
            memcpy(&four[1], g->low + 4 * k, 4);
            __m512i q = _mm512_load_si512(t->q[k]);
            high[k % 2] = _mm512_dpbusd_epi32(high[k % 2], q, _mm512_set1_epi32(four[0]));
            low[k % 2] = _mm512_dpbusd_epi32(low[k % 2], q, _mm512_set1_epi32(four[1]));
        }
        IntVec whole = (((IntVec)high[0] + (IntVec)high[1]) << 7) + (IntVec)low[0] + (IntVec)low[1];
        sum += to_float(whole) * (load(t->scale) * g->scale);
#else
        Vec part = splat(0);
        for (size_t k = 0; k < GROUP; k++) {
            if (k % 4 == 0) { prefetch(t->q[k / 4]); }
            part += tile_column(t, k) * g->x[k];
        }
        sum += part * load(t->scale);
#endif
    }
    return sum;
}

// Dot products of one row of W with n <= GEMM_ROWS - 1 rows of x (stride ldx): the row is read from memory once.
INLINE void dot_rows(const Matrix* matrix, WeightKind kind, size_t row, const float* x, size_t ldx, int n, float* y,
                     size_t ldy) {
    const Matrix copy = *matrix, *w = &copy;  // stays in registers across prefetch
    size_t K = w->cols, c = 0;
    Vec acc[GEMM_ROWS - 1][4];
    for (int m = 0; m < n; m++) {
        for (int u = 0; u < 4; u++) { acc[m][u] = splat(0); }
    }
    for (; c + 4 * LANES <= K; c += 4 * LANES) {
        for (int u = 0; u < 4; u++) {
            Vec q = weights_at(w, kind, row, c + (size_t)u * LANES);
            if (kind == W_F32 || u % 2 == 0) {
                prefetch((const char*)w->data + (row * K + c + (size_t)u * LANES) * (kind == W_F32 ? 4 : 2));
            }
            for (int m = 0; m < n; m++) { acc[m][u] += q * load(x + (size_t)m * ldx + c + (size_t)u * LANES); }
        }
    }
    for (; c + LANES <= K; c += LANES) {
        Vec q = weights_at(w, kind, row, c);
        for (int m = 0; m < n; m++) { acc[m][0] += q * load(x + (size_t)m * ldx + c); }
    }
    for (int m = 0; m < n; m++) {
        float s = sum_lanes((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]));
        for (size_t k = c; k < K; k++) { s += weight_at(w, row, k) * x[(size_t)m * ldx + k]; }
        y[(size_t)m * ldy + row] = s;
    }
}

INLINE void dot_rows_range(const Matrix* w, WeightKind kind, size_t from, size_t to, const float* x, size_t ldx, int n,
                           float* y, size_t ldy) {
    for (size_t r = from; r < to; r++) {
        switch (n) {  // a constant n keeps the accumulators in registers
            case 1: dot_rows(w, kind, r, x, ldx, 1, y, ldy); break;
            case 2: dot_rows(w, kind, r, x, ldx, 2, y, ldy); break;
            case 3: dot_rows(w, kind, r, x, ldx, 3, y, ldy); break;
            default: dot_rows(w, kind, r, x, ldx, 4, y, ldy); break;
        }
    }
}

typedef struct {
    float* y;
    const Matrix* w;
} Product;  // y (n, w->rows), rows side by side

// Panel p of y (n, rows): rows LANES p ..
static inline void dot_panel_rows(Product product, size_t p, const float* x, size_t ldx, const SplitGroup* split,
                                  int n) {
    const Matrix* w = product.w;
    float* y = product.y;
    size_t from = p * LANES, to = w->rows - from < LANES ? w->rows : from + LANES, groups = groups_of(w->cols);
    switch (w->kind) {
        case W_F32: dot_rows_range(w, W_F32, from, to, x, ldx, n, y, w->rows); break;
        case W_BF16: dot_rows_range(w, W_BF16, from, to, x, ldx, n, y, w->rows); break;
        case W_F16: dot_rows_range(w, W_F16, from, to, x, ldx, n, y, w->rows); break;
        default:
            for (size_t k = 0; k < (size_t)n; k++) {
                Vec sum = dot_panel(tile_at(w, from, 0), groups, split + k * groups);
                memcpy(y + k * w->rows + from, &sum, (to - from) * sizeof *y);
            }
    }
}

// y (n, rows) = x (n, cols) W^T of several W that read the same few x. Each thread has a part of all panels, stretches
// of memory, and once that is done takes panels of the others': on a machine with other work one core is always late.
// Who computes a row does not change it.
static inline void matvecs(const Product* products, int count, const float* x, size_t ldx, int n) {
    struct {
        size_t next, end, unused[6];
    } part[omp_get_max_threads()];  // a line of memory each
    size_t threads = (size_t)omp_get_max_threads(), panels = 0;
    for (int i = 0; i < count; i++) { panels += panels_of(products[i].w->rows); }
    for (size_t t = 0; t < threads; t++) {
        part[t].next = panels * t / threads;
        part[t].end = panels * (t + 1) / threads;
    }
    SplitGroup* split = products[0].w->kind == W_INT8 ? split_groups(x, ldx, n, products[0].w->cols) : NULL;
#pragma omp parallel
    {
        size_t me = (size_t)omp_get_thread_num();
        for (size_t t = me; t < me + threads; t++) {
            size_t p, end = part[t % threads].end, *next = &part[t % threads].next;
            while (__atomic_load_n(next, __ATOMIC_RELAXED) < end &&
                   (p = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < end) {
                int i = 0;
                for (; p >= panels_of(products[i].w->rows); i++) { p -= panels_of(products[i].w->rows); }
                dot_panel_rows(products[i], p, x, ldx, split, n);
            }
        }
    }
    free(split);
}

// c (m, TILE) = or += a (m, K) b (K, TILE): a by rows of stride lda, b a panel with stride TILE, fp32 or bf16.
INLINE void gemm_tile_rows(int m, float* c, size_t ldc, const float* a, size_t lda, const void* b, bool half, size_t K,
                           bool add) {
    Vec acc[MR][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 2
        for (int u = 0; u < TILE_VECTORS; u++) { acc[r][u] = add ? load(c + (size_t)r * ldc + u * LANES) : splat(0); }
    }
    for (size_t k = 0; k < K; k++) {
        Vec panel[TILE_VECTORS];
#pragma GCC unroll 2
        for (int u = 0; u < TILE_VECTORS; u++) {
            // few rows: straight from memory
            if (m < MR && (!half || u % 2 == 0)) { prefetch((const char*)b + (k * TILE + u * LANES) * (half ? 2 : 4)); }
            panel[u] = half ? load_bf16((const uint16_t*)b + k * TILE + u * LANES)
                            : load((const float*)b + k * TILE + u * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < m; r++) {
            Vec x = splat(a[(size_t)r * lda + k]);
#pragma GCC unroll 2
            for (int u = 0; u < TILE_VECTORS; u++) { acc[r][u] += x * panel[u]; }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 2
        for (int u = 0; u < TILE_VECTORS; u++) { store(c + (size_t)r * ldc + u * LANES, acc[r][u]); }
    }
}

INLINE void gemm_tile_any(int m, float* c, size_t ldc, const float* a, size_t lda, const void* b, bool half, size_t K,
                          bool add) {
    switch (m) {
        case 1: gemm_tile_rows(1, c, ldc, a, lda, b, half, K, add); break;
        case 2: gemm_tile_rows(2, c, ldc, a, lda, b, half, K, add); break;
        case 3: gemm_tile_rows(3, c, ldc, a, lda, b, half, K, add); break;
        case 4: gemm_tile_rows(4, c, ldc, a, lda, b, half, K, add); break;
        case 5: gemm_tile_rows(5, c, ldc, a, lda, b, half, K, add); break;
        case 6: gemm_tile_rows(6, c, ldc, a, lda, b, half, K, add); break;
#if defined(__AVX512F__)
        case 7: gemm_tile_rows(7, c, ldc, a, lda, b, half, K, add); break;
        default: gemm_tile_rows(8, c, ldc, a, lda, b, half, K, add); break;
#else
        default: assert(false);
#endif
    }
}

static inline void gemm_tile(int m, float* c, size_t ldc, const float* a, size_t lda, const float* b, size_t K,
                             bool add) {
    gemm_tile_any(m, c, ldc, a, lda, b, false, K, add);
}

static inline void gemm_tile_bf16(int m, float* c, size_t ldc, const float* a, size_t lda, const uint16_t* b, size_t K,
                                  bool add) {
    gemm_tile_any(m, c, ldc, a, lda, b, true, K, add);
}

// Lanes of a and, from 16 on, of b. gcc has clang's builtin since 12.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

// 16 x 16 transposed in place: four rounds of interleaving row i with row i + 8.
static inline void transpose16(Vec* a) {
    Vec b[16];
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = SHUFFLE(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] = SHUFFLE(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < 16; i++) { a[i] = b[i]; }
    }
}

// Unpacks W[r0 .. r0+TILE)[k0 .. k0+K) to a panel (K, TILE) in fp32; rows beyond the last are zeros.
INLINE void unpack_panel(const Matrix* w, WeightKind kind, size_t r0, size_t k0, size_t K, float* panel) {
    for (size_t r = 0; r < TILE; r += LANES) {
        size_t k = 0, there = w->rows > r0 + r ? w->rows - r0 - r : 0;
        for (; kind == W_INT8 && there && k < K; k++) {  // columns of tiles are vectors of a panel
            const Int8Tile* t = tile_at(w, r0 + r, k0 + k);
            store(panel + k * TILE + r, tile_column(t, (k0 + k) % GROUP) * load(t->scale));
        }
        for (; there >= LANES && k + LANES <= K; k += LANES) {
            Vec block[LANES];
            for (size_t i = 0; i < LANES; i++) { block[i] = weights_at(w, kind, r0 + r + i, k0 + k); }
            transpose16(block);
            for (size_t i = 0; i < LANES; i++) { store(panel + (k + i) * TILE + r, block[i]); }
        }
        for (; k < K; k++) {
            for (size_t i = 0; i < LANES; i++) {
                panel[k * TILE + r + i] = i < there ? weight_at(w, r0 + r + i, k0 + k) : 0;
            }
        }
    }
}

// y (n, rows) = x (n, cols) W^T for many x: threads own panels of TILE rows of W, unpacked K_BLOCK columns at a time.
static inline void matmul_panels(const Matrix* w, const float* x, size_t ldx, int n, float* y, size_t ldy) {
#pragma omp parallel
    {
        float panel[K_BLOCK * TILE] __attribute__((aligned(64)));
        float edge[MR * TILE] __attribute__((aligned(64)));  // the last panel may be wider than what is left of y
#pragma omp for schedule(dynamic, 1)
        for (size_t r0 = 0; r0 < w->rows; r0 += TILE) {
            size_t width = w->rows - r0 < TILE ? w->rows - r0 : (size_t)TILE;
            for (size_t k0 = 0; k0 < w->cols; k0 += K_BLOCK) {
                size_t K = w->cols - k0 < K_BLOCK ? w->cols - k0 : (size_t)K_BLOCK;
                switch (w->kind) {
                    case W_F32: unpack_panel(w, W_F32, r0, k0, K, panel); break;
                    case W_BF16: unpack_panel(w, W_BF16, r0, k0, K, panel); break;
                    case W_F16: unpack_panel(w, W_F16, r0, k0, K, panel); break;
                    default: unpack_panel(w, W_INT8, r0, k0, K, panel); break;
                }
                for (int m = 0; m < n; m += MR) {
                    int rows = n - m < MR ? n - m : MR;
                    const float* a = x + (size_t)m * ldx + k0;
                    float* c = y + (size_t)m * ldy + r0;
                    if (width == TILE) {
                        gemm_tile(rows, c, ldy, a, ldx, panel, K, k0 > 0);
                        continue;
                    }
                    gemm_tile(rows, edge, TILE, a, ldx, panel, K, false);
                    for (int r = 0; r < rows; r++) {
                        for (size_t i = 0; i < width; i++) {
                            c[(size_t)r * ldy + i] = edge[r * TILE + (int)i] + (k0 > 0 ? c[(size_t)r * ldy + i] : 0);
                        }
                    }
                }
            }
        }
    }
}

static inline void matmuls(const Product* products, int count, const float* x, size_t ldx, int n) {
    if (n < GEMM_ROWS) {
        matvecs(products, count, x, ldx, n);
        return;
    }
    for (int i = 0; i < count; i++) { matmul_panels(products[i].w, x, ldx, n, products[i].y, products[i].w->rows); }
}

static inline void matmul(float* y, const float* x, size_t ldx, int n, const Matrix* w) {
    const Product product = {y, w};
    matmuls(&product, 1, x, ldx, n);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory, and matrices from the tensors of a file

// Zeroed memory on large pages where the system has them, taken only as it is touched; kept until the program ends.
static inline void* big_alloc(size_t bytes, const char* what) {
    size_t size = (bytes + ((size_t)2 << 20) - 1) & ~(((size_t)2 << 20) - 1);
    void* p = size >= bytes ? mmap(NULL, size + ((size_t)2 << 20), PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                            : MAP_FAILED;
    if (p == MAP_FAILED) { die("out of memory: %s needs %.1f MiB", what, (double)bytes / 1048576); }
    p = (void*)(((uintptr_t)p + ((size_t)2 << 20) - 1) & ~(uintptr_t)(((size_t)2 << 20) - 1));
    madvise(p, size, MADV_HUGEPAGE);
    return p;
}

// Where the matrices of a model lie. Those in memory of our own share large pages: each on pages of its own would waste
// a megabyte, and a scale array nearly two.
typedef struct {
    bool copy;                       // also what could be used where it is mapped: large pages are read a third faster
    size_t own_bytes, mapped_bytes;  // of all matrices so far
    char* at;                        // the block of large pages that is being filled
    size_t left;                     // bytes of it
} MatrixMemory;

static inline void* matrix_alloc(MatrixMemory* memory, size_t bytes, const char* what) {
    const size_t block = (size_t)64 << 20;
    memory->own_bytes += bytes;
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > block / 2) { return big_alloc(bytes, what); }
    if (bytes > memory->left) {
        memory->at = (char*)big_alloc(block, what);
        memory->left = block;
    }
    void* out = memory->at;
    memory->at += bytes;
    memory->left -= bytes;
    return out;
}

// Refuses NaN and infinity, which have all exponent bits set, among the values first .. first+n of a tensor.
static inline bool tensor_finite(const StTensor* t, size_t first, size_t n, Error* e) {
    size_t bad = SIZE_MAX;
    const uint8_t* p = (const uint8_t*)t->data;
    if (t->dtype == DT_F32) {
#pragma omp parallel for reduction(min : bad)
        for (size_t i = first; i < first + n; i++) {
            uint32_t x;
            memcpy(&x, p + 4 * i, 4);
            if ((x & 0x7F800000u) == 0x7F800000u && i < bad) { bad = i; }
        }
    } else if (t->dtype == DT_BF16 || t->dtype == DT_F16) {
        const uint16_t mask = t->dtype == DT_BF16 ? 0x7F80 : 0x7C00;
#pragma omp parallel for reduction(min : bad)
        for (size_t i = first; i < first + n; i++) {
            uint16_t x;
            memcpy(&x, p + 2 * i, 2);
            if ((x & mask) == mask && i < bad) { bad = i; }
        }
    } else {
        return fail(e, "%s: tensor %s: dtype %s, wanted F32, BF16 or F16", t->file, t->name, dtype_name(t->dtype));
    }
    return bad == SIZE_MAX || fail(e, "%s: tensor %s: value %zu is not finite", t->file, t->name, bad);
}

// What was converted is not needed in the mapping any more: the pages of the values before `end` go back to the file.
static inline void tensor_release(const StTensor* t, size_t end) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = ((uintptr_t)t->data + page - 1) / page * page;
    uintptr_t to = ((uintptr_t)t->data + end * dtype_size(t->dtype)) / page * page;
    if (to > from) { madvise((void*)from, to - from, MADV_DONTNEED); }
}

INLINE float stored_value(const StTensor* t, size_t i) {
    uint16_t h;
    if (t->dtype == DT_F32) {
        float f;
        memcpy(&f, (const char*)t->data + 4 * i, 4);
        return f;
    }
    memcpy(&h, (const char*)t->data + 2 * i, 2);
    return t->dtype == DT_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

// Row `row` of the tensor into its lane of the tiles of w.
static inline void quantize_row(const StTensor* t, const Matrix* w, size_t row) {
    size_t r = row % LANES;
    for (size_t c = 0; c < w->cols; c += GROUP) {
        Int8Tile* tile = (Int8Tile*)(uintptr_t)tile_at(w, row, c);
        size_t n = w->cols - c < GROUP ? w->cols - c : (size_t)GROUP;
        float x[GROUP] = {0}, largest = 0;
        for (size_t k = 0; k < n; k++) { x[k] = stored_value(t, row * w->cols + c + k); }
        // A loop of its own: of both in one, gcc 12 for aarch64 makes an internal error at -O3.
        for (size_t k = 0; k < GROUP; k++) { largest = fmaxf(largest, fabsf(x[k])); }
        float s = largest / 127.0f, inverse = s > 0 ? 1.0f / s : 0;
        if (!isfinite(inverse)) { s = inverse = 0; }  // all below 1e-36
        for (size_t k = 0; k < GROUP; k++) { tile->q[k / 4][4 * r + k % 4] = (uint8_t)(128 + lrintf(x[k] * inverse)); }
        tile->scale[r] = s;
    }
}

// Rows [r0, r1) of the tensor in the form of w, into w's own memory.
static inline void convert_rows(const StTensor* t, const Matrix* w, WeightKind stored, size_t r0, size_t r1) {
    char* own = (char*)(uintptr_t)w->data;
#pragma omp parallel for
    for (size_t r = r0; r < r1; r++) {
        size_t first = r * w->cols;
        if (w->kind == W_INT8) {
            quantize_row(t, w, r);
        } else if (w->kind == stored) {
            size_t width = dtype_size(t->dtype);
            memcpy(own + first * width, (const char*)t->data + first * width, w->cols * width);
        } else if (w->kind == W_F32) {
            for (size_t i = first; i < first + w->cols; i++) { ((float*)own)[i] = stored_value(t, i); }
        } else {
            for (size_t i = first; i < first + w->cols; i++) { ((uint16_t*)own)[i] = f32_to_bf16(stored_value(t, i)); }
        }
    }
}

// The tensor, checked, as a matrix: where it lies if it is stored in the wanted form (want < 0: any) and a mapping will
// do; else converted into own memory, a slice at a time, so that the mapping adds little to it.
static inline Matrix matrix_from(MatrixMemory* memory, const StTensor* t, int want) {
    Matrix w;
    Error e = {{0}};
    WeightKind stored = t->dtype == DT_F32 ? W_F32 : t->dtype == DT_BF16 ? W_BF16 : W_F16;
    w.rows = t->shape[0];
    w.cols = t->shape[1];
    w.kind = want < 0 ? stored : (WeightKind)want;
    size_t n = t->numel, width = w.kind == W_F32 ? 4 : 2;
    w.bytes = w.kind == W_INT8 ? panels_of(w.rows) * groups_of(w.cols) * sizeof(Int8Tile) : n * width;
    if (w.kind == stored && !memory->copy && (uintptr_t)t->data % width == 0) {
        if (!tensor_finite(t, 0, n, &e)) { die("%s", e.text); }
        w.data = t->data;
        memory->mapped_bytes += t->bytes;
        return w;
    }
    w.data = matrix_alloc(memory, w.bytes, t->name);
    size_t slice = ((size_t)4 << 20) / w.cols + 1;  // rows
    for (size_t r = 0; r < w.rows; r += slice) {
        size_t end = r + slice < w.rows ? r + slice : w.rows;
        if (!tensor_finite(t, r * w.cols, (end - r) * w.cols, &e)) { die("%s", e.text); }
        convert_rows(t, &w, stored, r, end);
        tensor_release(t, end * w.cols);
    }
    return w;
}

#pragma GCC diagnostic pop
#endif
