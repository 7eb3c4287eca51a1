// train_mta.c: trains a LLaMA-style language model with Multi-Token Attention (arXiv 2504.00927) on the CPU, in fp32;
// its products read operands rounded to bf16 with --matmul bf16.
// The readable reference for train_mta.cu: every layer forward, then backward, in the order in which data meets them.
//
//   make train_mta
//   ./train_mta --model 3m --train "shards/text_train_*.bin" --val "shards/text_val_*.bin" --out runs/text
//
// What it is: one file with the whole model. What it is not: a framework; there is no graph, each backward is written
// below its forward. Equations are those of dev/MODEL.md. What all programs share (configuration, checkpoints, shards,
// options) is in mta/.
//
//   B batch   T positions   C channels   L layers   NH heads   NKV key/value heads   HS head size
//   FF hidden units of the MLP   V vocabulary   N = B*T rows
//   cq, ck    queries and keys of the convolution   ch heads of a mixing group
//   b t h i(query) j(key) c l are the loops over them. "scores" are before the softmax, "att" after it, and so
//   are names that end in _pre and _post.
//
// Memory: nothing of size T x T. Attention works on a chunk of queries at a time and its backward recomputes the chunk
// from q, k and the row's largest score and sum of exponentials. Threads: whatever their number, every sum has the
// same order: same seed, same bits.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // memmem and others, before the first header
#endif
#ifdef __clang__
// Without -ffast-math clang cannot vectorise a maximum, and warns that it cannot.
#pragma clang diagnostic ignored "-Wpass-failed"
#pragma clang diagnostic ignored "-Wsign-compare"  // clang 14 compares so in its own code for a taskloop
#endif
#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mta/config.h"
#include "mta/exp.h"
#include "mta/onednn.h"
#include "mta/ranks_mpi.h"
#include "mta/train.h"
#include "mta/trainer.h"
#include "mta/util.h"

// Arithmetic and storage: one vector register, 16 floats with AVX-512, 8 with AVX. The tests include this file a second
// time with MTA_REAL double, for finite differences.
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
enum { GEMM_ROWS = 14 };
#else
#define VECTOR_BYTES 32
enum { GEMM_ROWS = 6 };
#endif
#include "mta/vector.h"
#if defined(MTA_CBLAS) && defined(MTA_REAL_IS_FLOAT)
#include <cblas.h>
#endif

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }
static inline int lcm(int a, int b) {
    int x = a, y = b;
    while (y) {
        int r = x % y;
        x = y;
        y = r;
    }
    return a / x * b;
}

#ifdef MTA_REAL_IS_FLOAT
INLINE real exp_real(real x) { return exp_float(x); }
INLINE real sqrt_real(real x) { return sqrtf(x); }
#else
INLINE real exp_real(real x) { return exp(x); }
INLINE real sqrt_real(real x) { return sqrt(x); }
#endif

// =====================================================================================================================
// Matrix products

// out (M,N) = alpha * A B + beta * out on one thread; A (M,K), or its transpose (K,M) if ta; B (K,N), or (N,K) if tb;
// ld* are row strides.
#if defined(MTA_REAL_IS_FLOAT) && defined(MTA_CBLAS)
static void gemm_real(bool ta, bool tb, int M, int N, int K, real alpha, const real* A, size_t lda, const real* B,
                      size_t ldb, real beta, real* out, size_t ldo) {
    if (M <= 0 || N <= 0) { return; }
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, M, N, K, alpha, A,
                (int)lda, B, (int)ldb, beta, out, (int)ldo);
}
#else
// Without a BLAS: blocks of A and B are packed so that the inner kernel reads B, and A if it is transposed, in order
// (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008). The kernel keeps GEMM_ROWS x 2
// vectors of sums in registers.
enum { GEMM_COLS = 2 * LANES, GEMM_M = 8 * GEMM_ROWS, GEMM_N = 256, GEMM_K = 256 };

// a (GEMM_ROWS, kc), its values am apart from row to row and ak from column to column; b (kc, GEMM_COLS) packed;
// acc (GEMM_ROWS, GEMM_COLS)
INLINE void gemm_kernel(real* acc, const real* a, int am, int ak, const real* b, int kc) {
    Vec sum[GEMM_ROWS][2] = {{{0}}};
    for (int k = 0; k < kc; k++, a += ak, b += GEMM_COLS) {
        Vec b0 = load(b), b1 = load(b + LANES);
#pragma GCC unroll 16
        for (int m = 0; m < GEMM_ROWS; m++) {
            sum[m][0] += a[m * am] * b0;
            sum[m][1] += a[m * am] * b1;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < GEMM_ROWS; m++) {
        store(acc + m * GEMM_COLS, sum[m][0]);
        store(acc + m * GEMM_COLS + LANES, sum[m][1]);
    }
}

// Panels of `width` rows (of a matrix (n, K)) or columns (of (K, n)): out[panel][k][width], zeros beyond n.
INLINE void gemm_pack(real* out, const real* X, size_t ld, bool k_is_row, int n, int kc, int width) {
    for (int p = 0; p < n; p += width, out += (size_t)kc * width) {
        int w = min_int(width, n - p);
        if (w < width) { memset(out, 0, (size_t)kc * width * sizeof(real)); }
        if (!k_is_row) {
            for (int x = 0; x < w; x++) {
                const real* row = X + (size_t)(p + x) * ld;
                for (int k = 0; k < kc; k++) { out[k * width + x] = row[k]; }
            }
        } else if (w == width) {  // a width that the compiler knows: vectors. gcc makes `rep movs` of the loop below
            for (int k = 0; k < kc; k++) {
                for (int x = 0; x < width; x++) { out[k * width + x] = X[(size_t)k * ld + p + x]; }
            }
        } else {
            for (int k = 0; k < kc; k++) {
                for (int x = 0; x < w; x++) { out[k * width + x] = X[(size_t)k * ld + p + x]; }
            }
        }
    }
}

// out[m][GEMM_K] = A (mc,kc); zeros in the rows beyond, up to a multiple of GEMM_ROWS.
static void gemm_copy(real* out, const real* A, size_t lda, int mc, int kc) {
    for (int m = 0; m < mc; m++) { memcpy(out + m * GEMM_K, A + (size_t)m * lda, (size_t)kc * sizeof(real)); }
    memset(out + mc * GEMM_K, 0, (size_t)(round_up(mc, GEMM_ROWS) - mc) * GEMM_K * sizeof(real));
}

static void gemm_real(bool ta, bool tb, int M, int N, int K, real alpha, const real* A, size_t lda, const real* B,
                      size_t ldb, real beta, real* out, size_t ldo) {
    real pa[GEMM_M * GEMM_K] __attribute__((aligned(64))), pb[GEMM_N * GEMM_K] __attribute__((aligned(64)));
    real acc[GEMM_ROWS * GEMM_COLS] __attribute__((aligned(64)));
    for (int m = 0; m < M; m++) {
        if (beta == 0) {
            memset(out + (size_t)m * ldo, 0, (size_t)N * sizeof(real));
        } else if (beta != 1) {
            for (int n = 0; n < N; n++) { out[(size_t)m * ldo + n] *= beta; }
        }
    }
    for (int n0 = 0; n0 < N; n0 += GEMM_N) {
        for (int k0 = 0; k0 < K; k0 += GEMM_K) {
            int nc = min_int(GEMM_N, N - n0), kc = min_int(GEMM_K, K - k0);
            gemm_pack(pb, tb ? B + (size_t)n0 * ldb + k0 : B + (size_t)k0 * ldb + n0, ldb, !tb, nc, kc, GEMM_COLS);
            for (int m0 = 0; m0 < M; m0 += GEMM_M) {
                int mc = min_int(GEMM_M, M - m0);
                if (ta) {
                    gemm_pack(pa, A + (size_t)k0 * lda + m0, lda, true, mc, kc, GEMM_ROWS);
                } else {
                    gemm_copy(pa, A + (size_t)m0 * lda + k0, lda, mc, kc);
                }
                for (int n = 0; n < nc; n += GEMM_COLS) {
                    for (int m = 0; m < mc; m += GEMM_ROWS) {
                        if (ta) {
                            gemm_kernel(acc, pa + (size_t)m * kc, 1, GEMM_ROWS, pb + (size_t)n * kc, kc);
                        } else {
                            gemm_kernel(acc, pa + (size_t)m * GEMM_K, GEMM_K, 1, pb + (size_t)n * kc, kc);
                        }
                        for (int r = 0; r < min_int(GEMM_ROWS, mc - m); r++) {
                            real* o = out + (size_t)(m0 + m + r) * ldo + n0 + n;
                            int w = min_int(GEMM_COLS, nc - n);
                            for (int c = 0; c < w; c++) { o[c] += alpha * acc[r * GEMM_COLS + c]; }
                        }
                    }
                }
            }
        }
    }
}
#endif

// ---- products in bf16 (--matmul bf16): the operands rounded, the sums in fp32, by oneDNN
//
// Whoever writes an operand rounds it, once, by round_operand; its copy lies in memory of its own that repeats the
// operand's memory value for value, so that a product finds it by the operand's address.

typedef struct {
    const real* from;  // memory that holds operands
    size_t n;          // values
    uint16_t* copy;    // (n) the same in bf16
} Rounded;

#if defined(MTA_REAL_IS_FLOAT) && defined(MTA_ONEDNN)
#define MTA_BF16
typedef dnnl_engine_t Bf16Engine;
typedef DnnlProduct Bf16Product;
#else
typedef void *Bf16Engine, *Bf16Product;
#endif

// What a model's products in bf16 need. Where a function takes `const Products*`, NULL stands for products of reals.
typedef struct {
    Rounded of[3];  // weights, activations, scratch
    real scale;     // the alpha of products that have one: of the scores
    Bf16Engine engine;
    Bf16Product product[2][2][2][2];  // [ta][tb][alpha is scale, else 1][beta]
} Products;

static uint16_t* rounded_copy(const Products* p, const real* x) {
    for (int i = 0; i < 3; i++) {
        const Rounded* r = &p->of[i];
        if (x >= r->from && x < r->from + r->n) { return r->copy + (x - r->from); }
    }
    assert(!"an operand of a product lies in memory that has a copy");
    return NULL;
}

// x (rows,cols), ld apart, has been written: rounds it for the products that will read it. On one thread.
static void round_rows(const Products* p, const real* x, int rows, int cols, size_t ld) {
    if (!p) { return; }
    for (int r = 0; r < rows; r++) {
        uint16_t* copy = rounded_copy(p, x + (size_t)r * ld);
        for (int c = 0; c < cols; c++) { copy[c] = f32_to_bf16((float)x[(size_t)r * ld + c]); }
    }
}

// The same for n values, on all threads.
static void round_operand(const Products* p, const real* x, size_t n) {
    enum { PIECE = 1 << 14 };
    if (!p) { return; }
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i += PIECE) { round_rows(p, x + i, 1, n - i < PIECE ? (int)(n - i) : PIECE, 0); }
}

#ifdef MTA_BF16
#ifndef CHECK_ROUNDED
#define CHECK_ROUNDED(p, x, rows, cols, ld)  // dev/tests/test_products.c looks whether the copy is that of x
#endif

// A product in bf16, as gemm_real. On one thread, since every product here is inside a parallel loop.
static void gemm_bf16(bool ta, bool tb, int M, int N, int K, real alpha, const real* A, size_t lda, const real* B,
                      size_t ldb, real beta, real* out, size_t ldo, const Products* p) {
    if (M <= 0 || N <= 0) { return; }
    assert((alpha == 1 || alpha == p->scale) && (beta == 0 || beta == 1));
    dnnl_memory_desc_t shape[3] = {dnnl_matrix(ta, M, K, (dnnl_dim_t)lda, dnnl_bf16),
                                   dnnl_matrix(tb, K, N, (dnnl_dim_t)ldb, dnnl_bf16),
                                   dnnl_matrix(false, M, N, (dnnl_dim_t)ldo, dnnl_f32)};
    void* const data[3] = {rounded_copy(p, A), rounded_copy(p, B), out};
    CHECK_ROUNDED(p, A, ta ? K : M, ta ? M : K, lda);
    CHECK_ROUNDED(p, B, tb ? N : K, tb ? K : N, ldb);
    dnnl_multiply(&p->product[ta][tb][alpha != 1][beta != 0], p->engine, shape, data);
}
#endif

#ifdef MTA_REAL_IS_FLOAT
// Can this build and this processor multiply in bf16? If not, why.
static bool bf16_products(Error* e) {
#ifdef MTA_BF16
    int got = (int)dnnl_get_effective_cpu_isa(), wanted = (int)dnnl_cpu_isa_avx512_core_bf16;
    if ((got & wanted) == wanted) { return true; }
    return fail(e, "this processor has no bf16 instructions that oneDNN uses (AVX512-BF16 or AMX)");
#else
    return fail(e, "this build has no oneDNN; `make help` says what was found");
#endif
}

// Of operands that lie in three stretches of memory (weights, activations, scratch); scale: the alpha of some products.
static Products* products_create(const Rounded of[3], real scale) {
    Products* p = (Products*)alloc_or_die(1, sizeof(Products), "products");
    p->scale = scale;
    for (int i = 0; i < 3; i++) {
        p->of[i] = of[i];
        p->of[i].copy = (uint16_t*)alloc_or_die(of[i].n, sizeof(uint16_t), "rounded operands");
    }
#ifdef MTA_BF16
    dnnl_check(dnnl_engine_create(&p->engine, dnnl_cpu, 0), "an engine");
    for (int i = 0; i < 16; i++) {
        bool ta = i & 1, tb = i & 2, scaled = i & 4, add = i & 8;
        p->product[ta][tb][scaled][add] = dnnl_product(p->engine, ta, tb, scaled ? scale : 1, add);
    }
#endif
    return p;
}
#endif

static void products_free(Products* p) {
    if (!p) { return; }
    for (int i = 0; i < 3; i++) { free(p->of[i].copy); }
#ifdef MTA_BF16
    for (int i = 0; i < 16; i++) { dnnl_product_free(&p->product[i & 1][i >> 1 & 1][i >> 2 & 1][i >> 3]); }
    dnnl_engine_destroy(p->engine);
#endif
    free(p);
}

// ---- a product on one thread, and on all

static void gemm_serial(bool ta, bool tb, int M, int N, int K, real alpha, const real* A, size_t lda, const real* B,
                        size_t ldb, real beta, real* out, size_t ldo, const Products* p) {
#ifdef MTA_BF16
    if (p) {
        gemm_bf16(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, out, ldo, p);
        return;
    }
#endif
    (void)p;
    gemm_real(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, out, ldo);
}

// Our blocks run side by side, so the library inside must keep to one thread. Called once, before the first product.
#ifdef MTA_REAL_IS_FLOAT
static void blas_single_thread(void) {
#ifdef MTA_CBLAS
    if (openblas_set_num_threads) { openblas_set_num_threads(1); }
#endif
}

// OpenBLAS maps 128 MiB for each thread that multiplies, and tries for ever where a limit (ulimit -v, -d) leaves less.
// So there must be room for them before the first product, and OpenBLAS takes them here: it keeps them to the end.
#ifdef MTA_CBLAS
extern void* blas_memory_alloc(int) __attribute__((weak));
extern void blas_memory_free(void*) __attribute__((weak));
#endif
static void blas_take_memory(void) {
#ifdef MTA_CBLAS
    enum { MOST = 64 };  // of twice as many cores a build of OpenBLAS may know
    const size_t each = (size_t)129 << 20;
    void* room[MOST];
    int threads = blas_memory_alloc && blas_memory_free ? min_int(omp_get_max_threads(), MOST) : 0, n = 0;
    for (; n < threads; n++) {
        room[n] = mmap(NULL, each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (room[n] == MAP_FAILED) { break; }
    }
    for (int i = 0; i < n; i++) { munmap(room[i], each); }
    if (n < threads) {
        die("out of memory: OpenBLAS maps 128 MiB for each of %d threads, there is room for %d (ulimit -v?); wanted a "
            "larger limit, fewer threads by OMP_NUM_THREADS, or a build with NO_CBLAS=1",
            threads, n);
    }
    for (int i = 0; i < n; i++) { room[i] = blas_memory_alloc(0); }
    for (int i = 0; i < n; i++) { blas_memory_free(room[i]); }
#endif
}
#endif

// gemm_serial, split over all threads: the output is cut into blocks that depend on its size alone, each block one
// serial product.
static void gemm(bool ta, bool tb, int M, int N, int K, real alpha, const real* A, size_t lda, const real* B,
                 size_t ldb, real beta, real* out, size_t ldo, const Products* p) {
    // Smaller blocks pack the operands more often: 256 x 512 cost 8% of a step (dev/experiments.tsv).
    enum { TARGET_M = 512, TARGET_N = 1024 };
    int mb = (M + TARGET_M - 1) / TARGET_M, nb = (N + TARGET_N - 1) / TARGET_N;
    // With an odd number of blocks one core of a pair would wait.
    if (mb * nb % 2) { *(M > N ? &mb : &nb) += 1; }
    int bm = round_up((M + mb - 1) / mb, 16), bn = round_up((N + nb - 1) / nb, 32);
    mb = (M + bm - 1) / bm, nb = (N + bn - 1) / bn;
#pragma omp parallel for schedule(dynamic, 1)
    for (int block = 0; block < mb * nb; block++) {
        int m = block % mb * bm, n = block / mb * bn;
        gemm_serial(ta, tb, min_int(bm, M - m), min_int(bn, N - n), K, alpha, ta ? A + m : A + (size_t)m * lda, lda,
                    tb ? B + (size_t)n * ldb : B + n, ldb, beta, out + (size_t)m * ldo + n, ldo, p);
    }
}

// out (N,OC) = inp (N,C) weight^T, weight (OC,C)
static void matmul_forward(real* out, const real* inp, const real* weight, int N, int C, int OC, const Products* p) {
    gemm(false, true, N, OC, C, 1, inp, (size_t)C, weight, (size_t)C, 0, out, (size_t)OC, p);
}

// dinp (N,C) = dout weight, or += with add_dinp; dweight (OC,C) += dout^T inp. Either may be NULL.
static void matmul_backward(real* dinp, real* dweight, const real* dout, const real* inp, const real* weight, int N,
                            int C, int OC, bool add_dinp, const Products* p) {
    if (dinp) {
        gemm(false, false, N, C, OC, 1, dout, (size_t)OC, weight, (size_t)C, add_dinp ? 1 : 0, dinp, (size_t)C, p);
    }
    if (dweight) { gemm(true, false, OC, C, N, 1, dout, (size_t)OC, inp, (size_t)C, 1, dweight, (size_t)C, p); }
}

// =====================================================================================================================
// Embedding

// out (N,C) = weight[tokens[n]], weight (V,C)
static void embedding_forward(real* out, const int32_t* tokens, const real* weight, int N, int C) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        memcpy(out + (size_t)n * C, weight + (size_t)tokens[n] * C, (size_t)C * sizeof(real));
    }
}

// dweight[tokens[n]] += dout[n]. Threads own columns, so that a token's rows are added in order.
static void embedding_backward(real* dweight, const real* dout, const int32_t* tokens, int N, int C) {
    enum { STRIPE = 64 };
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += STRIPE) {
        int c1 = min_int(c0 + STRIPE, C);
        for (int n = 0; n < N; n++) {
            real* d = dweight + (size_t)tokens[n] * C;
            const real* o = dout + (size_t)n * C;
            for (int c = c0; c < c1; c++) { d[c] += o[c]; }
        }
    }
}

// =====================================================================================================================
// RMSNorm (MODEL.md eq. 1)
//
// Also the norm of a head's output (eq. 10), where `scale` is 1 - lambda_init.

// out (N,C) = scale * weight * inp * rstd, rstd (N) = 1 / sqrt(mean(inp^2) + eps)
static void rmsnorm_forward(real* out, real* rstd, const real* inp, const real* weight, int N, int C, double eps,
                            double scale) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        const real* x = inp + (size_t)n * C;
        real* o = out + (size_t)n * C;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) { sum += x[c] * x[c]; }
        real r = (real)(isfinite(sum) ? 1.0 / sqrt((double)sum / C + eps) : NAN);  // 1 / sqrt(inf) = 0 would hide it
        real s = r * (real)scale;
        rstd[n] = r;
        for (int c = 0; c < C; c++) { o[c] = x[c] * s * weight[c]; }
    }
}

// dinp (N,C) = (or += with add_dinp) scale * rstd * (g - xhat * mean(g . xhat)), g = dout * weight, xhat = inp * rstd;
// dinp may be dout; dweight (C) += scale * sum_n dout * xhat. parts (NORM_PARTS,C) is scratch: each part sums its own
// rows, then parts are added in order.
enum { NORM_PARTS = 32 };
static void rmsnorm_backward(real* dinp, real* dweight, const real* dout, const real* inp, const real* weight,
                             const real* rstd, int N, int C, double scale, real* parts, bool add_dinp) {
#pragma omp parallel for schedule(static)
    for (int p = 0; p < NORM_PARTS; p++) {
        real* dw = parts + (size_t)p * C;
        memset(dw, 0, (size_t)C * sizeof(real));
        int n0 = (int)((int64_t)N * p / NORM_PARTS), n1 = (int)((int64_t)N * (p + 1) / NORM_PARTS);
        for (int n = n0; n < n1; n++) {
            const real* x = inp + (size_t)n * C;
            const real* dy = dout + (size_t)n * C;
            real* dx = dinp + (size_t)n * C;
            real r = rstd[n], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int c = 0; c < C; c++) { dot += dy[c] * weight[c] * x[c]; }
            real k = dot * r * r / (real)C, s = r * (real)scale;
            for (int c = 0; c < C; c++) { dw[c] += dy[c] * x[c] * s; }  // before dx, which may be dy
            if (add_dinp) {
                for (int c = 0; c < C; c++) { dx[c] += s * (dy[c] * weight[c] - x[c] * k); }
            } else {
                for (int c = 0; c < C; c++) { dx[c] = s * (dy[c] * weight[c] - x[c] * k); }
            }
        }
    }
    for (int p = 0; p < NORM_PARTS; p++) {
        for (int c = 0; c < C; c++) { dweight[c] += parts[(size_t)p * C + c]; }
    }
}

// =====================================================================================================================
// RoPE (MODEL.md eq. 2): pairs (t, t + HS/2) of a head are rotated by position times frequency

// cosine, sine (T, HS/2)
static void rope_table(real* cosine, real* sine, const Config* config, int T) {
    int half = config_head_size(config) / 2;
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < half; i++) {
            double angle = t * config_rope_frequency(config, i);
            cosine[(size_t)t * half + i] = (real)cos(angle);
            sine[(size_t)t * half + i] = (real)sin(angle);
        }
    }
}

// x (B,T,heads,HS) in place; direction 1 rotates, -1 rotates back, which is the backward pass
static void rope_forward(real* x, const real* cosine, const real* sine, int B, int T, int heads, int HS,
                         int direction) {
    int half = HS / 2;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < B * T; n++) {
        const real* c = cosine + (size_t)(n % T) * half;
        const real* s = sine + (size_t)(n % T) * half;
        for (int h = 0; h < heads; h++) {
            real* a = x + ((size_t)n * heads + h) * HS;
            real* b = a + half;
            for (int i = 0; i < half; i++) {
                real s1 = direction * s[i], x0 = a[i], x1 = b[i];
                a[i] = x0 * c[i] - x1 * s1;
                b[i] = x1 * c[i] + x0 * s1;
            }
        }
    }
}

static void rope_backward(real* dx, const real* cosine, const real* sine, int B, int T, int heads, int HS) {
    rope_forward(dx, cosine, sine, B, T, heads, HS, -1);  // the inverse of a rotation is its transpose
}

// =====================================================================================================================
// Attention, a chunk of queries at a time (MODEL.md eq. 3 to 9). The steps first, each on a tile, forward then
// backward; then the chunk.
//
// A tile holds rows of scores of the heads of one mixing group: rows are queries i0 <= i < i0 + rows, columns are keys.
// Left of key 0 lie PAD zeros, and right of a row's last allowed key (its own query: causality) zeros up to tail(nk),
// so that the convolution needs no bounds checks at the edges. Rows outside the sequence are zero throughout.

enum { PAD = 32 };  // >= (MAX_KERNEL - 1) / 2, a multiple of LANES for fp32

typedef struct {
    real* data;
    int i0, rows, ld;
} Tile;

static inline real* tile_row(const Tile* t, int head, int i) {
    assert(i >= t->i0 && i < t->i0 + t->rows);
    return t->data + ((size_t)head * t->rows + (size_t)(i - t->i0)) * t->ld + PAD;
}
static inline int tile_stride(int T) { return round_up(T, 2 * PAD) + 2 * PAD; }
// Keys 0 .. nk-1 matter; columns up to here are defined.
static inline int tail(int nk) { return round_up(nk, PAD) + PAD; }

static void tile_clear_pads(const Tile* t, int H) {
    for (int r = 0; r < H * t->rows; r++) { memset(t->data + (size_t)r * t->ld, 0, PAD * sizeof(real)); }
}

// Keys that query i may see among the first nk: key <= query; none outside the sequence.
static inline int row_length(int i, int T, int nk) { return i < 0 || i >= T ? 0 : min_int(i + 1, nk); }

// Zeros right of the diagonal, by each row's own query (mask_0).
static inline void row_mask(real* row, int length, int nk) {
    memset(row + length, 0, (size_t)(tail(nk) - length) * sizeof(real));
}

// What attention needs to know. Strides: two tokens of q and out are NH*HS apart, of k and v NKV*HS.
typedef struct {
    int B, T, NH, NKV, HS, cq, ck, ch_pre, ch_post;  // ch_*: heads of a mixing group, 0 = off
    const real *conv_pre, *conv_post;                // (NH,cq,ck), NULL = off
    const real *mix_pre, *mix_post;                  // (NH/ch,ch,ch), NULL = off
    int chunk;                                       // queries of a chunk
    bool heads_apart;  // there are fewer chunks than threads can use: they share the heads of a chunk too
    const Products* products;
} Attention;

// ---- scores: S[i,j] = q_i . k_j / sqrt(HS), masked

static inline real attention_scale(int HS) { return (real)(1.0 / sqrt(HS)); }

// Rows lo <= i < hi of every head h0 .. h0+H-1, keys 0 .. nk-1; q (T,NH,HS), k (T,NKV,HS) of one sequence
static void scores_forward(const Tile* out, const real* q, const real* k, const Attention* a, int h0, int H, int lo,
                           int hi, int nk) {
    size_t qs = (size_t)a->NH * a->HS, ks = (size_t)a->NKV * a->HS;
    real scale = attention_scale(a->HS);
    int from = max_int(lo, 0), to = min_int(hi, a->T);
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        const real* kh = k + (size_t)((h0 + h) / (a->NH / a->NKV)) * a->HS;
        if (from < to) {
            gemm_serial(false, true, to - from, nk, a->HS, scale, q + (size_t)from * qs + (size_t)(h0 + h) * a->HS, qs,
                        kh, ks, 0, tile_row(out, h, from), (size_t)out->ld, a->products);
        }
        for (int i = lo; i < hi; i++) { row_mask(tile_row(out, h, i), row_length(i, a->T, nk), nk); }
    }
}

// dq_i = dS[i,:] k / sqrt(HS);  dk_j += dS[:,j]^T q / sqrt(HS), rows lo <= i < hi. Either may be NULL; dq goes first,
// since it rounds dS.
static void scores_backward(real* dq, real* dk, const Tile* dout, const real* q, const real* k, const Attention* a,
                            int h0, int H, int lo, int hi) {
    size_t qs = (size_t)a->NH * a->HS, ks = (size_t)a->NKV * a->HS;
    real scale = attention_scale(a->HS);
#pragma omp taskloop if (a->heads_apart && !dk)  // heads may share their dk
    for (int h = 0; h < H; h++) {
        size_t qo = (size_t)lo * qs + (size_t)(h0 + h) * a->HS, ko = (size_t)((h0 + h) / (a->NH / a->NKV)) * a->HS;
        const real* ds = tile_row(dout, h, lo);
        if (dq) {
            round_rows(a->products, ds, hi - lo, hi, (size_t)dout->ld);
            gemm_serial(false, false, hi - lo, a->HS, hi, scale, ds, (size_t)dout->ld, k + ko, ks, 0, dq + qo, qs,
                        a->products);
        }
        if (dk) {
            gemm_serial(true, false, hi, a->HS, hi - lo, scale, ds, (size_t)dout->ld, q + qo, qs, 1, dk + ko, ks,
                        a->products);
        }
    }
}

// ---- kq_conv: out[i,j] = sum_{a<cq, b<ck} weight[a,b] inp[i-(cq-1)+a, j-(ck-1)/2+b], inp masked by its own rows

// `taps` rows of the kernel: out rows 0 .. rows-1 += (or = with first) rows of inp, where inp is the row that tap 0 of
// row 0 reads. Walks down a strip of two vectors of columns; sum[a] is the row whose tap a meets the current input row,
// so each load serves all taps.
INLINE void conv_strip(real* out, const real* inp, const real* weight, int rows, int cols, size_t ld, int ck,
                       const int taps, bool first) {
    int r = (ck - 1) / 2;
    for (int j = 0; j < cols; j += 2 * LANES) {
        Vec sum[8][2] = {{{0}}};
        for (int s = 0; s < rows + taps - 1; s++) {
            const real* x = inp + (size_t)s * ld + j - r;
            for (int b = 0; b < ck; b++) {
                Vec x0 = load(x + b), x1 = load(x + b + LANES);
#pragma GCC unroll 8
                for (int a = 0; a < taps; a++) {
                    real w = weight[a * ck + b];
                    sum[a][0] += w * x0;
                    sum[a][1] += w * x1;
                }
            }
            int done = s - (taps - 1);
            if (done >= 0) {
                real* o = out + (size_t)done * ld + j;
                store(o, first ? sum[taps - 1][0] : load(o) + sum[taps - 1][0]);
                store(o + LANES, first ? sum[taps - 1][1] : load(o + LANES) + sum[taps - 1][1]);
            }
#pragma GCC unroll 8
            for (int a = taps - 1; a > 0; a--) {
                sum[a][0] = sum[a - 1][0];
                sum[a][1] = sum[a - 1][1];
            }
            sum[0][0] = sum[0][1] = (Vec){0};
        }
    }
}

// A kernel of any height as pieces of at most 6 rows, the height a constant in each so that the sums stay in registers.
static void conv_rows(real* out, const real* inp, const real* weight, int rows, int cols, size_t ld, int cq, int ck) {
    for (int a = 0; a < cq; a += 6) {
        const real* x = inp + (size_t)a * ld;
        const real* w = weight + (size_t)a * ck;
        switch (min_int(6, cq - a)) {
            case 1: conv_strip(out, x, w, rows, cols, ld, ck, 1, a == 0); break;
            case 2: conv_strip(out, x, w, rows, cols, ld, ck, 2, a == 0); break;
            case 3: conv_strip(out, x, w, rows, cols, ld, ck, 3, a == 0); break;
            case 4: conv_strip(out, x, w, rows, cols, ld, ck, 4, a == 0); break;
            case 5: conv_strip(out, x, w, rows, cols, ld, ck, 5, a == 0); break;
            default: conv_strip(out, x, w, rows, cols, ld, ck, 6, a == 0); break;
        }
    }
}

// Rows lo <= i < hi of each head, masked; inp must hold rows lo-(cq-1) .. hi-1. weight (NH,cq,ck)
static void kq_conv_forward(const Tile* out, const Tile* inp, const real* weight, const Attention* a, int h0, int H,
                            int lo, int hi, int nk) {
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        conv_rows(tile_row(out, h, lo), tile_row(inp, h, lo - (a->cq - 1)), weight + (size_t)(h0 + h) * a->cq * a->ck,
                  hi - lo, nk, (size_t)out->ld, a->cq, a->ck);
        for (int i = lo; i < hi; i++) { row_mask(tile_row(out, h, i), row_length(i, a->T, nk), nk); }
    }
}

// dinp[i,j] = sum weight[a,b] dout[i+(cq-1)-a, j+(ck-1)/2-b], masked: the same walk with the kernel turned around.
// Rows lo <= i < hi of dinp; dout must hold rows lo .. hi-1+(cq-1), masked.
static void kq_conv_backward_input(const Tile* dinp, const Tile* dout, const real* weight, const Attention* a, int h0,
                                   int H, int lo, int hi, int nk) {
    int n = a->cq * a->ck;
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        real turned[MAX_KERNEL * MAX_KERNEL];
        const real* w = weight + (size_t)(h0 + h) * n;
        for (int x = 0; x < n; x++) { turned[x] = w[n - 1 - x]; }
        conv_rows(tile_row(dinp, h, lo), tile_row(dout, h, lo), turned, hi - lo, nk, (size_t)dinp->ld, a->cq, a->ck);
        for (int i = lo; i < hi; i++) { row_mask(tile_row(dinp, h, i), row_length(i, a->T, nk), nk); }
    }
}

// dweight[a, b..b+2] = sum_{i,j} dout[i,j] inp[i-(cq-1)+a, j-r+b..] for `taps` rows a of the kernel; three columns b
// share each load of dout.
INLINE void conv_weight_strip(double* dweight, const real* dout, const real* inp, int rows, int cols, size_t ld, int ck,
                              const int taps, int b0) {
    int r = (ck - 1) / 2, nb = min_int(3, ck - b0);
    Vec sum[6][3] = {{{0}}};
    for (int j = 0; j < cols; j += LANES) {
        Vec d[6] = {{0}};  // d[a]: the row of dout whose tap a reads the current row of inp
        for (int s = 0; s < rows + taps - 1; s++) {
#pragma GCC unroll 8
            for (int a = taps - 1; a > 0; a--) { d[a] = d[a - 1]; }
            d[0] = s < rows ? load(dout + (size_t)s * ld + j) : (Vec){0};
            const real* x = inp + (size_t)s * ld + j - r + b0;
            Vec x0 = load(x), x1 = load(x + 1), x2 = load(x + 2);
#pragma GCC unroll 8
            for (int a = 0; a < taps; a++) {
                sum[a][0] += d[a] * x0;
                sum[a][1] += d[a] * x1;
                sum[a][2] += d[a] * x2;
            }
        }
    }
    for (int a = 0; a < taps; a++) {
        for (int b = 0; b < nb; b++) {
            double total = 0;
            for (int lane = 0; lane < LANES; lane++) { total += (double)sum[a][b][lane]; }
            dweight[a * ck + b0 + b] = total;
        }
    }
}

// dweight (H,cq,ck) = over the rows lo <= i < hi of dout; sums over chunks are kept in double
static void kq_conv_backward_weight(double* dweight, const Tile* dout, const Tile* inp, const Attention* a, int H,
                                    int lo, int hi, int nk) {
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        for (int tap = 0; tap < a->cq; tap += 6) {
            const real* d = tile_row(dout, h, lo);
            const real* x = tile_row(inp, h, lo - (a->cq - 1) + tap);
            double* dw = dweight + ((size_t)h * a->cq + tap) * a->ck;
            for (int b = 0; b < a->ck; b += 3) {
                switch (min_int(6, a->cq - tap)) {
                    case 1: conv_weight_strip(dw, d, x, hi - lo, nk, (size_t)dout->ld, a->ck, 1, b); break;
                    case 2: conv_weight_strip(dw, d, x, hi - lo, nk, (size_t)dout->ld, a->ck, 2, b); break;
                    case 3: conv_weight_strip(dw, d, x, hi - lo, nk, (size_t)dout->ld, a->ck, 3, b); break;
                    case 4: conv_weight_strip(dw, d, x, hi - lo, nk, (size_t)dout->ld, a->ck, 4, b); break;
                    case 5: conv_weight_strip(dw, d, x, hi - lo, nk, (size_t)dout->ld, a->ck, 5, b); break;
                    default: conv_weight_strip(dw, d, x, hi - lo, nk, (size_t)dout->ld, a->ck, 6, b); break;
                }
            }
        }
    }
}

// ---- head_mix: out_o = sum_n W[o,n] inp_n within groups of ch heads; zeros above the diagonal stay zeros

// Rows lo <= i < hi of the H heads of a tile, H a multiple of ch; weight (H/ch,ch,ch), its transpose for the backward
// pass. out may be inp: a vector of all heads is read before any is written.
static void head_mix_forward(const Tile* out, const Tile* inp, const real* weight, bool transpose, int ch,
                             const Attention* a, int H, int lo, int hi, int nk) {
    const int from_o = transpose ? 1 : ch, from_n = transpose ? ch : 1;  // steps from one weight to the next
    for (int g = 0; g < H; g += ch, weight += ch * ch) {
#pragma omp taskloop if (a->heads_apart)
        for (int i = lo; i < hi; i++) {
            Vec x[MAX_HEADS];
            int n1 = row_length(i, a->T, nk);
            const real* src = tile_row(inp, g, i);
            real* dst = tile_row(out, g, i);
            size_t is = (size_t)inp->rows * inp->ld, os = (size_t)out->rows * out->ld;
            if (ch == 2) {  // the paper's groups of two, without the detour through x
                real w00 = weight[0], w01 = weight[from_n], w10 = weight[from_o], w11 = weight[3];
                for (int j = 0; j < n1; j += LANES) {
                    Vec x0 = load(src + j), x1 = load(src + is + j);
                    store(dst + j, w00 * x0 + w01 * x1);
                    store(dst + os + j, w10 * x0 + w11 * x1);
                }
            } else {
                for (int j = 0; j < n1; j += LANES) {
                    for (int n = 0; n < ch; n++) { x[n] = load(src + n * is + j); }
                    for (int o = 0; o < ch; o++) {
                        Vec sum = {0};
                        for (int n = 0; n < ch; n++) { sum += weight[o * from_o + n * from_n] * x[n]; }
                        store(dst + o * os + j, sum);
                    }
                }
            }
            for (int o = 0; o < ch; o++) { row_mask(tile_row(out, g + o, i), n1, nk); }
        }
    }
}

static void head_mix_backward_input(const Tile* dinp, const Tile* dout, const real* weight, int ch, const Attention* a,
                                    int H, int lo, int hi, int nk) {
    head_mix_forward(dinp, dout, weight, true, ch, a, H, lo, hi, nk);
}

// dweight (hi-lo,H/ch,ch,ch) = sum_j dout_o[i,j] inp_n[i,j]: a (ch,ch) product over the keys of each row
static void head_mix_backward_weight(double* dweight, const Tile* dout, const Tile* inp, int ch, const Attention* a,
                                     int H, int lo, int hi) {
    for (int g = 0; g < H; g += ch, dweight += ch * ch) {
#pragma omp taskloop if (a->heads_apart)
        for (int i = lo; i < hi; i++) {
            real row[MAX_HEADS];
            for (int o = 0; o < ch; o++) {
                const real* d = tile_row(dout, g + o, i);
                const real* x = tile_row(inp, g, i);
                size_t ld = (size_t)inp->rows * inp->ld;
                if (ch == 2) {
                    const real* y = x + ld;
                    real dot_x = 0, dot_y = 0;
#pragma omp simd reduction(+ : dot_x, dot_y)
                    for (int j = 0; j <= i; j++) {
                        dot_x += d[j] * x[j];
                        dot_y += d[j] * y[j];
                    }
                    row[0] = dot_x;
                    row[1] = dot_y;
                } else {
                    gemm_serial(false, true, 1, ch, i + 1, 1, d, ld, x, ld, 0, row, (size_t)ch, NULL);
                }
                for (int n = 0; n < ch; n++) { dweight[(size_t)(i - lo) * H * ch + o * ch + n] = (double)row[n]; }
            }
        }
    }
}

// ---- softmax over keys <= query, fp32; of each row the maximum and 1 / sum are kept for the backward pass
// (a log-sum-exp in their place would cost the probabilities half their digits where it is large)

// out and inp may be the same tile. stats (NH,T,2) of the sequence is written for the rows from `own` on (those above
// are another chunk's).
static void softmax_forward(const Tile* out, const Tile* inp, real* stats, const Attention* a, int h0, int H, int lo,
                            int own, int hi, int nk) {
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        for (int i = lo; i < hi; i++) {
            real* p = tile_row(out, h, i);
            if (i >= 0 && i < a->T) {
                const real* s = tile_row(inp, h, i);
                real max = -INFINITY, sum = 0;
#pragma omp simd reduction(max : max)
                for (int j = 0; j <= i; j++) { max = s[j] > max ? s[j] : max; }
#pragma omp simd reduction(+ : sum)
                for (int j = 0; j <= i; j++) {
                    p[j] = exp_real(s[j] - max);
                    sum += p[j];
                }
                real inverse = 1 / sum;
                for (int j = 0; j <= i; j++) { p[j] *= inverse; }
                if (i >= own) {
                    stats[2 * ((size_t)(h0 + h) * a->T + i)] = max;
                    stats[2 * ((size_t)(h0 + h) * a->T + i) + 1] = inverse;
                }
            }
            row_mask(p, row_length(i, a->T, nk), nk);
        }
    }
}

// The same rows in the backward pass, from maximum and 1 / sum.
static void softmax_recompute(const Tile* out, const Tile* inp, const real* stats, const Attention* a, int h0, int H,
                              int lo, int hi, int nk) {
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        for (int i = lo; i < hi; i++) {
            real* p = tile_row(out, h, i);
            if (i >= 0 && i < a->T) {
                const real* s = tile_row(inp, h, i);
                real max = stats[2 * ((size_t)(h0 + h) * a->T + i)],
                     inverse = stats[2 * ((size_t)(h0 + h) * a->T + i) + 1];
#pragma omp simd
                for (int j = 0; j <= i; j++) { p[j] = exp_real(s[j] - max) * inverse; }
            }
            row_mask(p, row_length(i, a->T, nk), nk);
        }
    }
}

// dinp = att (dout - sum_j att dout); dinp may be dout. Rows beyond the sequence become zero.
static void softmax_backward(const Tile* dinp, const Tile* dout, const Tile* att, const Attention* a, int H, int lo,
                             int hi, int nk) {
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        for (int i = lo; i < hi; i++) {
            real* dx = tile_row(dinp, h, i);
            if (i < a->T) {
                const real* dy = tile_row(dout, h, i);
                const real* p = tile_row(att, h, i);
                real dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int j = 0; j <= i; j++) { dot += p[j] * dy[j]; }
                for (int j = 0; j <= i; j++) { dx[j] = p[j] * (dy[j] - dot); }
            }
            row_mask(dx, row_length(i, a->T, nk), nk);
        }
    }
}

// ---- values: O_i = sum_j att[i,j] v_j

// out (T,NH,HS), v (T,NKV,HS) of one sequence
static void values_forward(real* out, const Tile* att, const real* v, const Attention* a, int h0, int H, int lo,
                           int hi) {
    size_t os = (size_t)a->NH * a->HS, vs = (size_t)a->NKV * a->HS;
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        round_rows(a->products, tile_row(att, h, lo), hi - lo, hi, (size_t)att->ld);
        gemm_serial(false, false, hi - lo, a->HS, hi, 1, tile_row(att, h, lo), (size_t)att->ld,
                    v + (size_t)((h0 + h) / (a->NH / a->NKV)) * a->HS, vs, 0,
                    out + (size_t)lo * os + (size_t)(h0 + h) * a->HS, os, a->products);
    }
}

// datt[i,j] = dO_i . v_j, masked, rows lo <= i < hi
static void values_backward_att(const Tile* datt, const real* dout, const real* v, const Attention* a, int h0, int H,
                                int lo, int hi, int nk) {
    size_t os = (size_t)a->NH * a->HS, vs = (size_t)a->NKV * a->HS;
    int to = min_int(hi, a->T);
#pragma omp taskloop if (a->heads_apart)
    for (int h = 0; h < H; h++) {
        gemm_serial(false, true, to - lo, nk, a->HS, 1, dout + (size_t)lo * os + (size_t)(h0 + h) * a->HS, os,
                    v + (size_t)((h0 + h) / (a->NH / a->NKV)) * a->HS, vs, 0, tile_row(datt, h, lo), (size_t)datt->ld,
                    a->products);
        for (int i = lo; i < hi; i++) { row_mask(tile_row(datt, h, i), row_length(i, a->T, nk), nk); }
    }
}

// dv_j += sum_i att[i,j] dO_i
static void values_backward_v(real* dv, const Tile* att, const real* dout, const Attention* a, int h0, int H, int lo,
                              int hi) {
    size_t os = (size_t)a->NH * a->HS, vs = (size_t)a->NKV * a->HS;
    for (int h = 0; h < H; h++) {
        round_rows(a->products, tile_row(att, h, lo), hi - lo, hi, (size_t)att->ld);
        gemm_serial(true, false, hi, a->HS, hi - lo, 1, tile_row(att, h, lo), (size_t)att->ld,
                    dout + (size_t)lo * os + (size_t)(h0 + h) * a->HS, os, 1,
                    dv + (size_t)((h0 + h) / (a->NH / a->NKV)) * a->HS, vs, a->products);
    }
}

// ---- the chunk: all steps for the queries lo <= i < hi of one group of heads of one sequence

// Heads that must be in one tile (mixing groups), and those whose chunks are added in one order (they share keys and
// values too).
static int attention_group(const Attention* a) { return lcm(a->mix_pre ? a->ch_pre : 1, a->mix_post ? a->ch_post : 1); }
static int attention_unit(const Attention* a) { return lcm(attention_group(a), a->NH / a->NKV); }
static int halo_pre(const Attention* a) { return a->conv_pre ? a->cq - 1 : 0; }
static int halo_post(const Attention* a) { return a->conv_post ? a->cq - 1 : 0; }

enum { ATTENTION_TILES = 7 };  // S C L R A of the maps, and two for gradients
// Reals of one tile: every row any step needs, chunk plus halos above and below.
static size_t attention_tile_size(const Attention* a) {
    return (size_t)attention_group(a) * (size_t)(a->chunk + 2 * (halo_pre(a) + halo_post(a))) *
           (size_t)tile_stride(a->T);
}
// Queries of a chunk: few enough that a tile stays near a core's cache, many enough that the small products and the
// halo rows pay (dev/experiments.tsv has the measurement).
static int attention_chunk(int T, int group) {
    int rows = (1 << 18) / (tile_stride(T) * group) / 16 * 16;
    return min_int(T, max_int(64, min_int(128, rows)));
}

static Tile tile_make(real* scratch, int which, const Attention* a, int i0) {
    Tile t = {scratch + (size_t)which * attention_tile_size(a), i0, a->chunk + 2 * (halo_pre(a) + halo_post(a)),
              tile_stride(a->T)};
    return t;
}

// The maps of the chunk: S scores, C convolved, L mixed, P softmax, R convolved, A mixed. A step that is off shares its
// input's tile, and P takes L's place. For the forward pass rows lo-halo_post .. hi-1 of P; with `backward` S, C, L, P
// have halo_pre rows more below hi, and every map that a gradient needs is kept in a tile of its own. The gradients: dR
// takes dA's place, dL and dC that of dP.
typedef struct {
    Tile S, C, L, P, R, A, dA, dP, dS;
} Maps;

static Maps attention_layout(real* scratch, const Attention* a, int lo, bool backward) {
    int n = 0, i0 = lo - halo_post(a) - halo_pre(a);
    Maps m;
    m.S = tile_make(scratch, n++, a, i0);
    m.C = a->conv_pre ? tile_make(scratch, n++, a, i0) : m.S;
    m.L = a->mix_pre && backward ? tile_make(scratch, n++, a, i0) : m.C;
    m.P = m.L;
    m.R = a->conv_post ? tile_make(scratch, n++, a, i0) : m.P;
    m.A = a->mix_post && backward ? tile_make(scratch, n++, a, i0) : m.R;
    m.dA = tile_make(scratch, n++, a, lo);  // a convolution goes from one tile to another
    Tile other = a->conv_pre || a->conv_post ? tile_make(scratch, n++, a, lo) : m.dA;
    m.dP = a->conv_post ? other : m.dA;
    m.dS = !a->conv_pre ? m.dP : a->conv_post ? m.dA : other;
    assert(n <= ATTENTION_TILES);
    return m;
}

static void attention_maps(const Maps* m, real* stats, const real* q, const real* k, const Attention* a, int h0, int lo,
                           int hi, bool backward) {
    int H = attention_group(a), p = halo_pre(a), r = halo_post(a), end = hi + (backward ? p : 0),
        nk = min_int(end, a->T);
    scores_forward(&m->S, q, k, a, h0, H, lo - r - p, end, nk);
    if (a->conv_pre) { kq_conv_forward(&m->C, &m->S, a->conv_pre, a, h0, H, lo - r, end, nk); }
    if (a->mix_pre) {
        head_mix_forward(&m->L, &m->C, a->mix_pre + (size_t)h0 * a->ch_pre, false, a->ch_pre, a, H, lo - r, end, nk);
    }
    if (backward) {
        softmax_recompute(&m->P, &m->L, stats, a, h0, H, lo - r, end, nk);
    } else {
        softmax_forward(&m->P, &m->L, stats, a, h0, H, lo - r, lo, end, nk);
    }
    if (a->conv_post) { kq_conv_forward(&m->R, &m->P, a->conv_post, a, h0, H, lo, hi, nk); }
    if (a->mix_post) {
        head_mix_forward(&m->A, &m->R, a->mix_post + (size_t)h0 * a->ch_post, false, a->ch_post, a, H, lo, hi, nk);
    }
}

// Gradients of the attention's own weights, summed in double.
typedef struct {
    double *conv_pre, *conv_post, *mix_pre, *mix_post;  // of one sequence: (NH,cq,ck) twice, (NH,ch) twice
    size_t n;                                           // how many these are; those of the next sequence follow
    double* chunks;  // of the chunk in each slot: (group,cq,ck) twice, then (chunk,group,ch) twice: one of each query
} AttentionSums;

// Sums of so many heads and rows that begin at base; with base NULL it only measures.
static AttentionSums attention_sums_at(double* base, const Attention* a, int heads, int rows) {
    size_t H = (size_t)heads, conv = a->conv_pre || a->conv_post ? H * a->cq * a->ck : 0;
    size_t pre = a->mix_pre ? rows * H * a->ch_pre : 0, post = a->mix_post ? rows * H * a->ch_post : 0;
    AttentionSums s = {NULL, NULL, NULL, NULL, 2 * conv + pre + post, NULL};
    if (base) {
        s.conv_pre = base;
        s.conv_post = s.conv_pre + conv;
        s.mix_pre = s.conv_post + conv;
        s.mix_post = s.mix_pre + pre;
    }
    return s;
}

// dq and the sums of this chunk are set; dk, dv are added to, unless NULL: then A and dS stay for who does so. q, dq,
// dout (T,NH,HS), k, v, dk, dv (T,NKV,HS), stats (NH,T,2) of one sequence. Rows of dS come from rows of dC up to
// halo_pre further down, those from rows of dA up to halo_post further: all are recomputed here.
static void attention_chunk_backward(real* dq, real* dk, real* dv, const AttentionSums* sums, const Maps* m,
                                     const real* dout, const real* q, const real* k, const real* v, real* stats,
                                     const Attention* a, int h0, int lo, int hi) {
    int H = attention_group(a), end = hi + halo_pre(a), far = end + halo_post(a);
    int nk = min_int(end, a->T), nk_far = min_int(far, a->T);
    attention_maps(m, stats, q, k, a, h0, lo, hi, true);
    if (dv) { values_backward_v(dv, &m->A, dout, a, h0, H, lo, hi); }  // O = A v
    values_backward_att(&m->dA, dout, v, a, h0, H, lo, far, nk_far);
    if (a->mix_post) {  // A = mix(R)
        const real* w = a->mix_post + (size_t)h0 * a->ch_post;
        head_mix_backward_weight(sums->mix_post, &m->dA, &m->R, a->ch_post, a, H, lo, hi);
        head_mix_backward_input(&m->dA, &m->dA, w, a->ch_post, a, H, lo, far, nk_far);
    }
    if (a->conv_post) {  // R = conv(P)
        kq_conv_backward_weight(sums->conv_post, &m->dA, &m->P, a, H, lo, hi, hi);
        kq_conv_backward_input(&m->dP, &m->dA, a->conv_post, a, h0, H, lo, end, nk);
    }
    softmax_backward(&m->dP, &m->dP, &m->P, a, H, lo, end, nk);  // P = softmax(L)
    if (a->mix_pre) {                                            // L = mix(C)
        const real* w = a->mix_pre + (size_t)h0 * a->ch_pre;
        head_mix_backward_weight(sums->mix_pre, &m->dP, &m->C, a->ch_pre, a, H, lo, hi);
        head_mix_backward_input(&m->dP, &m->dP, w, a->ch_pre, a, H, lo, end, nk);
    }
    if (a->conv_pre) {  // C = conv(S)
        kq_conv_backward_weight(sums->conv_pre, &m->dP, &m->S, a, H, lo, hi, hi);
        kq_conv_backward_input(&m->dS, &m->dP, a->conv_pre, a, h0, H, lo, hi, hi);
    }
    scores_backward(dq, dk, &m->dS, q, k, a, h0, H, lo, hi);  // S = q k^T / sqrt(HS)
}

// The sums of sequence b += those of a chunk of `rows` queries of the heads h0 on, query for query.
static void attention_chunk_add(const AttentionSums* sums, const AttentionSums* chunk, const Attention* a, int b,
                                int h0, int rows) {
    int H = attention_group(a), n = H * a->cq * a->ck;
    double *conv_pre = sums->conv_pre + b * sums->n + h0 * a->cq * a->ck,
           *conv_post = sums->conv_post + b * sums->n + h0 * a->cq * a->ck;
    double *mix_pre = sums->mix_pre + b * sums->n + h0 * a->ch_pre,
           *mix_post = sums->mix_post + b * sums->n + h0 * a->ch_post;
    for (int x = 0; a->conv_pre && x < n; x++) { conv_pre[x] += chunk->conv_pre[x]; }
    for (int x = 0; a->conv_post && x < n; x++) { conv_post[x] += chunk->conv_post[x]; }
    for (int x = 0; a->mix_pre && x < rows * H * a->ch_pre; x++) { mix_pre[x % (H * a->ch_pre)] += chunk->mix_pre[x]; }
    for (int x = 0; a->mix_post && x < rows * H * a->ch_post; x++) {
        mix_post[x % (H * a->ch_post)] += chunk->mix_post[x];
    }
}

static void attention_clear_pads(real* scratch, const Attention* a) {
    for (int i = 0; i < ATTENTION_TILES; i++) {
        Tile t = tile_make(scratch, i, a, 0);
        tile_clear_pads(&t, attention_group(a));
    }
}

// What threads may compute side by side: a chunk of queries of a group of heads of a sequence.
static int attention_tasks(const Attention* a) {
    return a->B * a->NH / attention_group(a) * ((a->T + a->chunk - 1) / a->chunk);
}

// out (B,T,NH,HS); stats (B,NH,T,2) for the backward pass; q (B,T,NH,HS), k, v (B,T,NKV,HS), q and k rotated; scratch:
// ATTENTION_TILES tiles a thread.
static void attention_forward(real* out, real* stats, const real* q, const real* k, const real* v, const Attention* a,
                              real* scratch) {
    int group = attention_group(a), heads = a->B * a->NH / group;  // groups of heads, of all sequences
    size_t qn = (size_t)a->T * a->NH * a->HS, kn = (size_t)a->T * a->NKV * a->HS;
#pragma omp parallel
    {
        real* mine = scratch + (size_t)omp_get_thread_num() * ATTENTION_TILES * attention_tile_size(a);
        attention_clear_pads(mine, a);
#pragma omp for schedule(dynamic, 1)
        for (int task = attention_tasks(a) - 1; task >= 0; task--) {  // the last chunks first: they see most keys
            int lo = task / heads * a->chunk, hi = min_int(lo + a->chunk, a->T), h = task % heads * group % a->NH;
            size_t b = (size_t)(task % heads * group / a->NH);
            Maps m = attention_layout(mine, a, lo, false);
            attention_maps(&m, stats + b * a->NH * a->T * 2, q + b * qn, k + b * kn, a, h, lo, hi, false);
            values_forward(out + b * qn, &m.A, v + b * kn, a, h, group, lo, hi);
        }
    }
}

// How many chunks are in work at once in the backward pass: each holds ATTENTION_TILES tiles.
static int attention_slots(const Attention* a) { return min_int(omp_get_max_threads(), attention_tasks(a)); }

// So few chunks leave threads idle at the end, or from the beginning.
static bool attention_heads_apart(const Attention* a) {
    return attention_group(a) > 1 && attention_tasks(a) < 8 * omp_get_max_threads();
}

// Heads that add to the same dk and dv, of all sequences: where there is one for each thread, a chunk adds to them
// itself, while its maps are in the cache, and the next chunk waits for it.
static int attention_units(const Attention* a) { return a->B * a->NH / attention_unit(a); }
static bool attention_together(const Attention* a) { return attention_units(a) >= omp_get_max_threads(); }

// The head h of a tile as a tile of one head.
static Tile tile_head(const Tile* t, int h) {
    Tile one = {t->data + (size_t)h * t->rows * t->ld, t->i0, t->rows, t->ld};
    return one;
}

// dq, dk, dv are set; the sums of every sequence are set, `sums` are those of the first. Any thread computes any chunk;
// what several chunks add to (dk and dv of a head, the sums) waits for its turn, so that it is added in one order
// whatever the threads. That order and the sharing of slots are all that the tasks depend on.
static void attention_backward(real* dq, real* dk, real* dv, const AttentionSums* sums, const real* dout, const real* q,
                               const real* k, const real* v, real* stats, const Attention* a, real* scratch) {
    int group = attention_group(a), unit = attention_unit(a), units = attention_units(a), slots = attention_slots(a);
    int chunks = (a->T + a->chunk - 1) / a->chunk, share = a->NH / a->NKV;
    size_t slot_size = ATTENTION_TILES * attention_tile_size(a), pairs = (size_t)a->NH * a->T;
    AttentionSums chunk_sums = attention_sums_at(NULL, a, group, a->chunk);
    memset(dk, 0, pairs / share * a->B * a->HS * sizeof(real));
    memset(dv, 0, pairs / share * a->B * a->HS * sizeof(real));
    if (sums->n) { memset(sums->conv_pre, 0, (size_t)a->B * sums->n * sizeof(double)); }
#pragma omp parallel
    {
#pragma omp for
        for (int slot = 0; slot < slots; slot++) { attention_clear_pads(scratch + slot * slot_size, a); }
#pragma omp single
        for (int task = 0; task < attention_tasks(a); task++) {
            // The chunks of a unit (heads that share keys and values) in the order in which it adds them; the units
            // take turns.
            int step = task / units, head = task % units * unit, b = head / a->NH,
                h = head % a->NH + step / chunks * group;
            int lo = step % chunks * a->chunk, hi = min_int(lo + a->chunk, a->T), slot = task % slots;
            size_t qo = b * pairs * a->HS, ko = qo / share;
            real* mine = scratch + slot * slot_size;
            Maps m = attention_layout(mine, a, lo, true);
            AttentionSums chunk = attention_sums_at(sums->chunks + slot * chunk_sums.n, a, group, a->chunk);
            bool together = attention_together(a);
            real *own_dk = together ? dk + ko : NULL, *own_dv = together ? dv + ko : NULL,
                 *before = together ? dk + ko + (size_t)(head % a->NH / share) * a->HS : mine;
            (void)before;  // gcc counts a dependence as no use
#pragma omp task depend(inout : mine[0], before[0])
            attention_chunk_backward(dq + qo, own_dk, own_dv, &chunk, &m, dout + qo, q + qo, k + ko, v + ko,
                                     stats + 2 * b * pairs, a, h, lo, hi);
            for (int x = 0; x < group && !together; x++) {
                size_t turn = ko + (size_t)(h + x) / share * a->HS;  // the first value that this head adds to
                Tile A = tile_head(&m.A, x), dS = tile_head(&m.dS, x);
#pragma omp task depend(in : mine[0]) depend(inout : dv[turn])
                values_backward_v(dv + ko, &A, dout + qo, a, h + x, 1, lo, hi);
#pragma omp task depend(in : mine[0]) depend(inout : dk[turn])
                scores_backward(NULL, dk + ko, &dS, q + qo, k + ko, a, h + x, 1, lo, hi);
            }
            if (!sums->n) { continue; }
            double* total = sums->conv_pre + b * sums->n;  // gcc 8 takes no member in a dependence
            (void)total;
#pragma omp task depend(in : mine[0]) depend(inout : total[0])
            attention_chunk_add(sums, &chunk, a, b, h, hi - lo);
        }
    }
}

// dweight (n) += the sums (n) of B sequences, `stride` apart, in order
static void attention_sums_add(real* dweight, const double* sums, int B, size_t stride, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double total = 0;
        for (int b = 0; b < B; b++) { total += sums[b * stride + i]; }
        dweight[i] += (real)total;
    }
}

// ---- head_gate (MODEL.md eq. 11): each head's output times sigmoid(out . weight + bias)

// out, inp (N,HS), N = B*T*NH; weight (HS), bias (1). out may be inp only where no backward pass follows.
static void head_gate_forward(real* out, const real* inp, const real* weight, const real* bias, int N, int HS) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        const real* x = inp + (size_t)n * HS;
        real* o = out + (size_t)n * HS;
        real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < HS; c++) { dot += x[c] * weight[c]; }
        real gate = 1 / (1 + exp_real(-(dot + *bias)));
        for (int c = 0; c < HS; c++) { o[c] = x[c] * gate; }
    }
}

// dinp = g dout + weight ds, ds = g (1-g) (dout . inp); dweight += ds inp, dbias += ds. dinp may be dout. parts
// (NORM_PARTS,HS+1) is scratch.
static void head_gate_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                               const real* weight, const real* bias, int N, int HS, real* parts) {
#pragma omp parallel for schedule(static)
    for (int p = 0; p < NORM_PARTS; p++) {
        real* dw = parts + (size_t)p * (HS + 1);
        memset(dw, 0, (size_t)(HS + 1) * sizeof(real));
        int n0 = (int)((int64_t)N * p / NORM_PARTS), n1 = (int)((int64_t)N * (p + 1) / NORM_PARTS);
        for (int n = n0; n < n1; n++) {
            const real* x = inp + (size_t)n * HS;
            const real* dy = dout + (size_t)n * HS;
            real* dx = dinp + (size_t)n * HS;
            real dot = 0, through = 0;
#pragma omp simd reduction(+ : dot, through)
            for (int c = 0; c < HS; c++) {
                dot += x[c] * weight[c];
                through += x[c] * dy[c];
            }
            real gate = 1 / (1 + exp_real(-(dot + *bias))), ds = gate * (1 - gate) * through;
            for (int c = 0; c < HS; c++) { dx[c] = gate * dy[c] + ds * weight[c]; }
            for (int c = 0; c < HS; c++) { dw[c] += ds * x[c]; }
            dw[HS] += ds;
        }
    }
    for (int p = 0; p < NORM_PARTS; p++) {
        const real* dw = parts + (size_t)p * (HS + 1);
        for (int c = 0; c < HS; c++) { dweight[c] += dw[c]; }
        *dbias += dw[HS];
    }
}

// ---- diff (MODEL.md eq. 12): P_2p - lambda P_2p+1 on both heads' values is a mixing after softmax with W =
// [[1,-lambda],[1,-lambda]]

typedef struct {
    const real *q1, *k1, *q2, *k2;
} Lambda;  // (HS) each

static double lambda_dot(const real* a, const real* b, int HS) {
    double sum = 0;
    for (int i = 0; i < HS; i++) { sum += (double)a[i] * (double)b[i]; }
    return sum;
}

// mix (NH/2,2,2), lambda = exp(q1 . k1) - exp(q2 . k2) + lambda_init
static void diff_lambda_forward(real* mix, const Lambda* w, double lambda_init, int NH, int HS) {
    double lambda = exp(lambda_dot(w->q1, w->k1, HS)) - exp(lambda_dot(w->q2, w->k2, HS)) + lambda_init;
    for (int i = 0; i < NH * 2; i++) { mix[i] = i % 2 ? (real)-lambda : (real)1; }
}

// d* (HS) += from dmix (NH/2,2,2)
static void diff_lambda_backward(real* dq1, real* dk1, real* dq2, real* dk2, const real* dmix, const Lambda* w, int NH,
                                 int HS) {
    double dlambda = 0;
    for (int i = 1; i < NH * 2; i += 2) { dlambda -= (double)dmix[i]; }
    double d1 = dlambda * exp(lambda_dot(w->q1, w->k1, HS)), d2 = -dlambda * exp(lambda_dot(w->q2, w->k2, HS));
    for (int i = 0; i < HS; i++) {
        dq1[i] += (real)(d1 * (double)w->k1[i]);
        dk1[i] += (real)(d1 * (double)w->q1[i]);
        dq2[i] += (real)(d2 * (double)w->k2[i]);
        dk2[i] += (real)(d2 * (double)w->q2[i]);
    }
}

// =====================================================================================================================
// SwiGLU (MODEL.md eq. 13): out = silu(gate) * up

// out, gate, up (n)
static void swiglu_forward(real* out, const real* gate, const real* up, size_t n) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) { out[i] = gate[i] / (1 + exp_real(-gate[i])) * up[i]; }
}

// dgate = dout up s (1 + gate (1 - s)), dup = dout gate s, s = sigmoid(gate); act = the forward result again, for
// down_proj's gradient. dgate may be dout.
static void swiglu_backward(real* dgate, real* dup, real* act, const real* dout, const real* gate, const real* up,
                            size_t n) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) {
        real g = gate[i], s = 1 / (1 + exp_real(-g)), d = dout[i];
        act[i] = g * s * up[i];
        dup[i] = d * g * s;
        dgate[i] = d * up[i] * s * (1 + g * (1 - s));
    }
}

// =====================================================================================================================
// Cross-entropy (MODEL.md eq. 14)

// losses (N) = -log softmax(logits)[target], wrong (N) = 1 where another id scores higher or, without `gradient`, one
// before it as high: greedy decoding takes the first of the best; 0 where target < 0 (not counted). With `gradient`,
// logits (N,V) become dlogits = (softmax - onehot) * dloss, zero where not counted.
static void crossentropy_forward_backward(real* losses, unsigned char* wrong, real* logits, const int32_t* targets,
                                          int N, int V, real dloss, bool gradient) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        real* x = logits + (size_t)n * V;
        int target = targets[n];
        losses[n] = 0;
        wrong[n] = 0;
        if (target < 0) {
            if (gradient) { memset(x, 0, (size_t)V * sizeof(real)); }
            continue;
        }
        real max = -INFINITY, sum = 0, own = x[target];
        int before = 0;  // ids before the target that score as high
#pragma omp simd reduction(max : max)
        for (int v = 0; v < V; v++) { max = x[v] > max ? x[v] : max; }
        if (gradient) {
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) {
                x[v] = exp_real(x[v] - max);
                sum += x[v];
            }
            real scale = dloss / sum;
            for (int v = 0; v < V; v++) { x[v] *= scale; }
            x[target] -= dloss;
        } else {
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) { sum += exp_real(x[v] - max); }
            for (int v = 0; v < target; v++) { before += x[v] == own; }
        }
        losses[n] = (real)(log((double)sum) + (double)max - (double)own);
        wrong[n] = !(own >= max) || before;
    }
}

// =====================================================================================================================
// The model: state and memory

// Pointers to one layer's tensors inside an arena (weights or gradients), in the order of TensorKind; NULL where the
// model has none.
typedef struct {
    real *input_norm, *q, *k, *v, *o, *kq_conv, *kq_conv_post, *head_mix_pre, *head_mix, *head_norm, *gate_weight,
        *gate_bias;
    real *lambda_q1, *lambda_k1, *lambda_q2, *lambda_k2, *post_norm, *gate_proj, *up_proj, *down_proj;
} Layer;

// What the forward pass keeps for the backward pass. N = B*T rows, all layers behind one another: layer l of x starts
// at l*N*C.
typedef struct {
    real* x;              // (L+1,N,C) residual stream before each layer, and after the last
    real* x_mid;          // (L,N,C) after attention
    real *ln1, *ln2;      // (L,N,C) normalised inputs of attention and MLP
    real *rstd1, *rstd2;  // (L,N)
    real* q;              // (L,N,NH,HS) rotated
    real *k, *v;          // (L,N,NKV,HS) k rotated
    real* stats;          // (L,B,NH,T,2) maximum and 1 / sum of the score rows
    real* att;            // (L,N,NH,HS) output of the heads
    real* normed;         // (L,N,NH,HS) after head_norm, where there is one
    real* head_rstd;      // (L,N,NH)
    real* gated;          // (L,N,NH,HS) after head_gate, where there is one
    real *gate, *up;      // (L,N,FF)
    real *ln_f, *rstd_f;  // (N,C), (N)
    size_t operands;      // values at the beginning of this memory that products read
} Activations;

// What no pass keeps.
typedef struct {
    real *act, *dgate, *dup;     // (N,FF)
    real *dx, *dln;              // (N,C) gradient of the residual stream, of a normalised input
    real *datt, *dq, *dk, *dv;   // as att, q, k, v of one layer
    real* logits;                // (rows of a classifier chunk, V)
    real* losses;                // (N)
    real* parts;                 // partial sums of norm and gate weights
    real *diff_mix, *diff_dmix;  // (NH/2,2,2)
    real* tiles;                 // attention tiles of every thread
    real *cosine, *sine;         // (T,HS/2)
    size_t operands;             // values at the beginning of this memory that products read
} Scratch;

typedef struct {
    Config config;
    TensorList tensors;
    int B, T;                       // the largest micro-batch
    int chunk;                      // queries of an attention chunk
    int logit_rows;                 // rows of a classifier chunk
    real *weights, *grads, *m, *v;  // arenas of tensors.numel; without training only the first
    Ranks* ranks;                   // with which it is shared out, NULL = none
    real* waiting[MAX_WAITING];     // arenas for gradient sums of shards that wait for their neighbours
    int n_waiting;
    RanksSum sum;  // of gradients, over the ranks
    real *activation_memory, *scratch_memory;
    double* sum_memory;    // attention's weight gradients
    unsigned char* wrong;  // (N) counted targets that another id beats
    Activations acts;
    Scratch scratch;
    AttentionSums sums;
    Products* products;    // in bf16; NULL: products of reals
    bool weights_rounded;  // are the products' copies of the weights those of `weights`?
} Model;

typedef struct {
    real** ptr;
    size_t numel;
} Buffer;

// Sets every pointer of the list; with base NULL it only measures, so that size and layout cannot disagree. Returns
// reals.
static size_t carve(const Buffer* buffers, int n, real* base) {
    size_t offset = 0;
    for (int i = 0; i < n; i++) {
        size_t size = (buffers[i].numel + 63) / 64 * 64;  // whole cache lines
        *buffers[i].ptr = base && size ? base + offset : NULL;
        offset += size;
    }
    return offset;
}

// Without training the layers share one place: no backward pass reads what they computed.
static size_t carve_activations(Activations* a, const Config* c, int B, int T, bool training, real* base) {
    size_t N = (size_t)B * T, L = training ? (size_t)c->num_hidden_layers : 1, C = (size_t)c->hidden_size,
           FF = (size_t)c->intermediate_size;
    size_t NH = (size_t)c->num_attention_heads, KV = (size_t)c->num_key_value_heads * config_head_size(c);
    bool norm = c->head_norm != HEAD_NORM_NONE;
    const Buffer operands[] = {
        {&a->ln1, L * N * C},
        {&a->ln2, L * N * C},
        {&a->q, L * N * C},
        {&a->k, L * N * KV},
        {&a->v, L * N * KV},
        {&a->att, L * N * C},
        {&a->normed, norm ? L * N * C : 0},
        {&a->gated, c->head_gate ? L * N * C : 0},
        {&a->ln_f, N * C},
    };
    const Buffer others[] = {
        {&a->x, (training ? L + 1 : 1) * N * C},
        {&a->x_mid, L * N * C},
        {&a->rstd1, L * N},
        {&a->rstd2, L * N},
        {&a->stats, L * N * NH * 2},
        {&a->head_rstd, norm ? L * N * NH : 0},
        {&a->gate, L * N * FF},
        {&a->up, L * N * FF},
        {&a->rstd_f, N},
    };
    a->operands = carve(operands, (int)(sizeof operands / sizeof operands[0]), base);
    return a->operands + carve(others, (int)(sizeof others / sizeof others[0]), base ? base + a->operands : NULL);
}

// What the configuration alone says of attention.
static Attention attention_shape(const Config* c, int B, int T) {
    Attention a;
    memset(&a, 0, sizeof a);
    a.B = B, a.T = T, a.NH = c->num_attention_heads, a.NKV = c->num_key_value_heads, a.HS = config_head_size(c);
    a.cq = c->kq_conv_query_size, a.ck = c->kq_conv_key_size;
    a.ch_pre = c->head_mix_pre_softmax;
    a.ch_post = c->attention_type == ATTENTION_DIFF ? 2 : c->head_mix_post_softmax;
    return a;
}

static Attention attention_of(const Model* m, const Layer* w, int B, int T) {
    Attention a = attention_shape(&m->config, B, T);
    a.conv_pre = w->kq_conv, a.conv_post = w->kq_conv_post, a.mix_pre = w->head_mix_pre;
    a.mix_post = m->config.attention_type == ATTENTION_DIFF ? m->scratch.diff_mix : w->head_mix;
    a.chunk = min_int(m->chunk, T);
    a.heads_apart = attention_heads_apart(&a);
    a.products = m->products;
    return a;
}

// The largest tile of all layers: with every convolution and mixing that some layer has.
static Attention attention_largest(const Config* c, int B, int T, int chunk) {
    static const real one = 1;
    Attention a = attention_shape(c, B, T);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        if (config_conv_pre(c, l)) { a.conv_pre = &one; }
        if (config_conv_post(c, l)) { a.conv_post = &one; }
    }
    a.mix_pre = a.ch_pre ? &one : NULL;
    a.mix_post = a.ch_post ? &one : NULL;
    a.chunk = chunk;
    if (!a.chunk) { a.chunk = attention_chunk(T, attention_group(&a)); }
    a.chunk = min_int(a.chunk, T);
    return a;
}

static int logit_rows(int V, int N) { return min_int(N, max_int(16, (1 << 22) / V)); }  // 16 MiB of logits

// Doubles of the sums of all sequences and of the chunks in work; with base NULL it only measures.
static size_t carve_sums(AttentionSums* s, const Attention* a, double* base) {
    *s = attention_sums_at(base, a, a->NH, 1);
    s->chunks = base ? base + a->B * s->n : NULL;
    return a->B * s->n + attention_slots(a) * attention_sums_at(NULL, a, attention_group(a), a->chunk).n;
}

static size_t carve_scratch(Scratch* s, const Config* c, int B, int T, int chunk, real* base) {
    size_t N = (size_t)B * T, C = (size_t)c->hidden_size, FF = (size_t)c->intermediate_size,
           HS = (size_t)config_head_size(c);
    size_t NH = (size_t)c->num_attention_heads, KV = (size_t)c->num_key_value_heads * HS;
    Attention a = attention_largest(c, B, T, chunk);
    size_t widest = C > 2 * HS + 1 ? C : 2 * HS + 1;
    const Buffer operands[] = {
        {&s->act, N * FF},
        {&s->dgate, N * FF},
        {&s->dup, N * FF},
        {&s->dx, N * C},
        {&s->datt, N * C},
        {&s->dq, N * C},
        {&s->dk, N * KV},
        {&s->dv, N * KV},
        {&s->logits, (size_t)logit_rows(c->vocab_size, (int)N) * c->vocab_size},
        {&s->tiles, (size_t)omp_get_max_threads() * ATTENTION_TILES * attention_tile_size(&a)},
    };
    const Buffer others[] = {
        {&s->dln, N * C},
        {&s->losses, N},
        {&s->parts, NORM_PARTS * widest},
        {&s->diff_mix, 2 * NH},
        {&s->diff_dmix, 2 * NH},
        {&s->cosine, (size_t)T * HS / 2},
        {&s->sine, (size_t)T * HS / 2},
    };
    s->operands = carve(operands, (int)(sizeof operands / sizeof operands[0]), base);
    return s->operands + carve(others, (int)(sizeof others / sizeof others[0]), base ? base + s->operands : NULL);
}

// Bytes of each allocation of a model, in the order of the plan that is printed before any is made.
typedef struct {
    size_t weights, gradients, optimizer, activations, scratch;
    size_t rounded;  // the copies in bf16 of what products read, where they are in bf16
} MemoryPlan;

static MemoryPlan model_memory(const Config* c, int B, int T, bool training) {
    TensorList list;
    Activations acts;
    Scratch scratch;
    tensor_list(&list, c);
    size_t arena = list.numel * sizeof(real);
    AttentionSums sums;
    Attention largest = attention_largest(c, B, T, 0);
    MemoryPlan p = {arena,
                    training ? arena : 0,
                    training ? 2 * arena : 0,
                    carve_activations(&acts, c, B, T, training, NULL) * sizeof(real),
                    carve_scratch(&scratch, c, B, T, 0, NULL) * sizeof(real) + (size_t)B * T +
                        carve_sums(&sums, &largest, NULL) * sizeof(double),
                    (list.numel + acts.operands + scratch.operands) * sizeof(uint16_t)};
    tensor_list_free(&list);
    return p;
}

// The tensors of layer l inside an arena.
static Layer model_layer(const Model* m, real* arena, int l) {
    Layer w;
    static_assert(sizeof w == LAYER_TENSORS * sizeof(void*), "a field for each tensor of a layer");
    tensors_of_layer(&w, &m->tensors, l, arena, sizeof(real));
    return w;
}
static real* model_tensor(const Model* m, real* arena, TensorKind kind) {
    return arena + m->tensors.specs[tensor_at(&m->tensors, 0, kind)].offset;
}
static real* model_head(const Model* m, real* arena) {  // the classifier: the embedding itself if tied
    return model_tensor(m, arena, m->config.tie_word_embeddings ? TENSOR_EMBED : TENSOR_LM_HEAD);
}

// A model for micro-batches of at most B x T; chunk 0: chosen. Without `training` it has no gradients and no optimizer
// state: only the forward pass and the loss may be asked for.
static Model* model_create(const Config* config, int B, int T, int chunk, bool training) {
    Model* m = (Model*)alloc_or_die(1, sizeof(Model), "model");
    m->config = *config;
    m->B = B;
    m->T = T;
    m->logit_rows = logit_rows(config->vocab_size, B * T);
    tensor_list(&m->tensors, config);
    Attention largest = attention_largest(config, B, T, chunk);
    m->chunk = largest.chunk;
    m->weights = (real*)alloc_or_die(m->tensors.numel, sizeof(real), "weights");
    if (training) {
        m->grads = (real*)alloc_or_die(m->tensors.numel, sizeof(real), "gradients");
        m->m = (real*)alloc_untouched_or_die(m->tensors.numel, sizeof(real), "optimizer state m");
        m->v = (real*)alloc_untouched_or_die(m->tensors.numel, sizeof(real), "optimizer state v");
    }
    m->activation_memory =
        (real*)alloc_or_die(carve_activations(&m->acts, config, B, T, training, NULL), sizeof(real), "activations");
    m->scratch_memory =
        (real*)alloc_or_die(carve_scratch(&m->scratch, config, B, T, chunk, NULL), sizeof(real), "scratch");
    carve_activations(&m->acts, config, B, T, training, m->activation_memory);
    carve_scratch(&m->scratch, config, B, T, chunk, m->scratch_memory);
    m->sum_memory = (double*)alloc_or_die(carve_sums(&m->sums, &largest, NULL), sizeof(double), "gradient sums");
    carve_sums(&m->sums, &largest, m->sum_memory);
    m->wrong = (unsigned char*)alloc_or_die((size_t)B * T, 1, "wrong targets");
    rope_table(m->scratch.cosine, m->scratch.sine, config, T);
    return m;
}

#ifdef MTA_REAL_IS_FLOAT
// From here on this model's products are in bf16.
static void model_round_products(Model* m) {
    const Rounded of[3] = {{m->weights, m->tensors.numel, NULL},
                           {m->activation_memory, m->acts.operands, NULL},
                           {m->scratch_memory, m->scratch.operands, NULL}};
    m->products = products_create(of, attention_scale(config_head_size(&m->config)));
}
#endif

static void model_free(Model* m) {
    void* const memory[] = {m->weights,           m->grads,          m->m,          m->v,
                            m->activation_memory, m->scratch_memory, m->sum_memory, m->wrong};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) { free(memory[i]); }
    for (int i = 0; i < MAX_WAITING; i++) { free(m->waiting[i]); }
    free(m->sum.room);
    products_free(m->products);
    tensor_list_free(&m->tensors);
    free(m);
}

// =====================================================================================================================
// Forward, backward, update

// From tokens (B,T) to the normalised last state acts.ln_f (N,C).
static void model_forward(Model* m, const int32_t* tokens, int B, int T) {
    const Config* c = &m->config;
    const Products* mm = m->products;
    Activations* a = &m->acts;
    int N = B * T, C = c->hidden_size, FF = c->intermediate_size, NH = c->num_attention_heads,
        NKV = c->num_key_value_heads;
    int HS = config_head_size(c), KV = NKV * HS, wide = config_norm_heads(c);
    size_t NC = (size_t)N * C, NF = (size_t)N * FF, NK = (size_t)N * KV;
    assert((size_t)B * T <= (size_t)m->B * m->T && T <= m->T);
    if (mm && !m->weights_rounded) { round_operand(mm, m->weights, m->tensors.numel); }
    m->weights_rounded = true;
    embedding_forward(a->x, tokens, model_tensor(m, m->weights, TENSOR_EMBED), N, C);
    for (int layer = 0; layer < c->num_hidden_layers; layer++) {
        int l = m->grads ? layer : 0;  // where this layer's activations are
        Layer w = model_layer(m, m->weights, layer);
        real *x = a->x + l * NC, *x_next = m->grads ? x + NC : x, *ln1 = a->ln1 + l * NC, *ln2 = a->ln2 + l * NC,
             *x_mid = a->x_mid + l * NC;
        real *q = a->q + l * NC, *k = a->k + l * NK, *v = a->v + l * NK, *att = a->att + l * NC, *out = att;
        rmsnorm_forward(ln1, a->rstd1 + (size_t)l * N, x, w.input_norm, N, C, c->rms_norm_eps, 1);
        round_operand(mm, ln1, NC);
        matmul_forward(q, ln1, w.q, N, C, C, mm);
        matmul_forward(k, ln1, w.k, N, C, KV, mm);
        matmul_forward(v, ln1, w.v, N, C, KV, mm);
        rope_forward(q, m->scratch.cosine, m->scratch.sine, B, T, NH, HS, 1);
        rope_forward(k, m->scratch.cosine, m->scratch.sine, B, T, NKV, HS, 1);
        round_operand(mm, q, NC);
        round_operand(mm, k, NK);
        round_operand(mm, v, NK);
        if (w.lambda_q1) {
            Lambda lambda = {w.lambda_q1, w.lambda_k1, w.lambda_q2, w.lambda_k2};
            diff_lambda_forward(m->scratch.diff_mix, &lambda, config_lambda_init(layer), NH, HS);
        }
        Attention shape = attention_of(m, &w, B, T);
        attention_forward(att, a->stats + (size_t)l * N * NH * 2, q, k, v, &shape, m->scratch.tiles);
        if (w.head_norm) {
            double scale = c->head_norm == HEAD_NORM_GROUP_DEPTH_SCALED ? 1 - config_lambda_init(layer) : 1;
            out = a->normed + l * NC;
            rmsnorm_forward(out, a->head_rstd + (size_t)l * N * NH, att, w.head_norm, N * NH / wide, HS * wide, 1e-5,
                            scale);
        }
        if (w.gate_weight) {
            head_gate_forward(a->gated + l * NC, out, w.gate_weight, w.gate_bias, N * NH, HS);
            out = a->gated + l * NC;
        }
        round_operand(mm, out, NC);
        memcpy(x_mid, x, NC * sizeof(real));
        gemm(false, true, N, C, C, 1, out, (size_t)C, w.o, (size_t)C, 1, x_mid, (size_t)C, mm);  // x_mid = x + out Wo^T
        rmsnorm_forward(ln2, a->rstd2 + (size_t)l * N, x_mid, w.post_norm, N, C, c->rms_norm_eps, 1);
        round_operand(mm, ln2, NC);
        matmul_forward(a->gate + l * NF, ln2, w.gate_proj, N, C, FF, mm);
        matmul_forward(a->up + l * NF, ln2, w.up_proj, N, C, FF, mm);
        swiglu_forward(m->scratch.act, a->gate + l * NF, a->up + l * NF, NF);
        round_operand(mm, m->scratch.act, NF);
        memcpy(x_next, x_mid, NC * sizeof(real));
        gemm(false, true, N, C, FF, 1, m->scratch.act, (size_t)FF, w.down_proj, (size_t)FF, 1, x_next, (size_t)C, mm);
    }
    rmsnorm_forward(a->ln_f, a->rstd_f, a->x + (m->grads ? c->num_hidden_layers * NC : 0),
                    model_tensor(m, m->weights, TENSOR_NORM), N, C, c->rms_norm_eps, 1);
    round_operand(mm, a->ln_f, NC);
}

// The classifier and its loss, a chunk of rows at a time so that the logits of all rows never exist: returns the sum of
// the counted losses, fills scratch.losses and wrong. With `gradient`: scratch.dln = dL/d(ln_f) and the head's
// gradient, L = sum * dloss. logits (N,V) unless NULL.
static double model_loss(Model* m, const int32_t* targets, int N, real dloss, bool gradient, float* logits) {
    int C = m->config.hidden_size, V = m->config.vocab_size;
    const real* head = model_head(m, m->weights);
    const Products* mm = m->products;
    for (int n = 0; n < N; n += m->logit_rows) {
        int rows = min_int(m->logit_rows, N - n);
        const real* x = m->acts.ln_f + (size_t)n * C;
        real* chunk = m->scratch.logits;
        if (!gradient && !logits && !any_counted(targets + n, rows)) {
            memset(m->scratch.losses + n, 0, (size_t)rows * sizeof(real));
            memset(m->wrong + n, 0, (size_t)rows);
            continue;
        }
        matmul_forward(chunk, x, head, rows, C, V, mm);
        if (logits) {
            for (size_t i = 0; i < (size_t)rows * V; i++) { logits[(size_t)n * V + i] = (float)chunk[i]; }
        }
        crossentropy_forward_backward(m->scratch.losses + n, m->wrong + n, chunk, targets + n, rows, V, dloss,
                                      gradient);
        if (gradient) {
            round_operand(mm, chunk, (size_t)rows * V);
            matmul_backward(m->scratch.dln + (size_t)n * C, model_head(m, m->grads), chunk, x, head, rows, C, V, false,
                            mm);
        }
    }
    double sum = 0;
    for (int n = 0; n < N; n++) { sum += (double)m->scratch.losses[n]; }
    return sum;
}

// The exact reverse of model_forward, from scratch.dln; adds to the gradients.
static void model_backward(Model* m, const int32_t* tokens, int B, int T) {
    const Config* c = &m->config;
    const Activations* a = &m->acts;
    Scratch* s = &m->scratch;
    const Products* mm = m->products;
    int N = B * T, C = c->hidden_size, FF = c->intermediate_size, NH = c->num_attention_heads,
        NKV = c->num_key_value_heads;
    int HS = config_head_size(c), KV = NKV * HS, wide = config_norm_heads(c), L = c->num_hidden_layers;
    assert(B <= m->B && m->grads);
    size_t NC = (size_t)N * C, NF = (size_t)N * FF, NK = (size_t)N * KV,
           kernel = (size_t)NH * c->kq_conv_query_size * c->kq_conv_key_size;
    rmsnorm_backward(s->dx, model_tensor(m, m->grads, TENSOR_NORM), s->dln, a->x + L * NC,
                     model_tensor(m, m->weights, TENSOR_NORM), a->rstd_f, N, C, 1, s->parts, false);
    for (int l = L - 1; l >= 0; l--) {
        Layer w = model_layer(m, m->weights, l), g = model_layer(m, m->grads, l);
        const real *x = a->x + l * NC, *ln1 = a->ln1 + l * NC, *ln2 = a->ln2 + l * NC, *x_mid = a->x_mid + l * NC;
        const real *q = a->q + l * NC, *k = a->k + l * NK, *v = a->v + l * NK, *att = a->att + l * NC;
        const real *normed = w.head_norm ? a->normed + l * NC : att, *out = w.gate_weight ? a->gated + l * NC : normed;
        // x + down(act)
        round_operand(mm, s->dx, NC);
        matmul_backward(s->dgate, NULL, s->dx, NULL, w.down_proj, N, FF, C, false, mm);
        swiglu_backward(s->dgate, s->dup, s->act, s->dgate, a->gate + l * NF, a->up + l * NF, NF);
        round_operand(mm, s->act, NF);
        round_operand(mm, s->dgate, NF);
        round_operand(mm, s->dup, NF);
        matmul_backward(NULL, g.down_proj, s->dx, s->act, NULL, N, FF, C, false, mm);
        matmul_backward(s->dln, g.gate_proj, s->dgate, ln2, w.gate_proj, N, C, FF, false, mm);
        matmul_backward(s->dln, g.up_proj, s->dup, ln2, w.up_proj, N, C, FF, true, mm);
        rmsnorm_backward(s->dx, g.post_norm, s->dln, x_mid, w.post_norm, a->rstd2 + (size_t)l * N, N, C, 1, s->parts,
                         true);
        // x + o(out)
        round_operand(mm, s->dx, NC);
        matmul_backward(s->datt, g.o, s->dx, out, w.o, N, C, C, false, mm);
        if (w.gate_weight) {
            head_gate_backward(s->datt, g.gate_weight, g.gate_bias, s->datt, normed, w.gate_weight, w.gate_bias, N * NH,
                               HS, s->parts);
        }
        if (w.head_norm) {
            double scale = c->head_norm == HEAD_NORM_GROUP_DEPTH_SCALED ? 1 - config_lambda_init(l) : 1;
            rmsnorm_backward(s->datt, g.head_norm, s->datt, att, w.head_norm, a->head_rstd + (size_t)l * N * NH,
                             N * NH / wide, HS * wide, scale, s->parts, false);
        }
        if (w.lambda_q1) {
            Lambda lambda = {w.lambda_q1, w.lambda_k1, w.lambda_q2, w.lambda_k2};
            diff_lambda_forward(s->diff_mix, &lambda, config_lambda_init(l), NH, HS);
        }
        Attention shape = attention_of(m, &w, B, T);
        round_operand(mm, s->datt, NC);
        attention_backward(s->dq, s->dk, s->dv, &m->sums, s->datt, q, k, v, a->stats + (size_t)l * N * NH * 2, &shape,
                           s->tiles);
        if (g.kq_conv) { attention_sums_add(g.kq_conv, m->sums.conv_pre, B, m->sums.n, kernel); }
        if (g.kq_conv_post) { attention_sums_add(g.kq_conv_post, m->sums.conv_post, B, m->sums.n, kernel); }
        if (g.head_mix_pre) {
            attention_sums_add(g.head_mix_pre, m->sums.mix_pre, B, m->sums.n, (size_t)NH * c->head_mix_pre_softmax);
        }
        if (g.head_mix) {
            attention_sums_add(g.head_mix, m->sums.mix_post, B, m->sums.n, (size_t)NH * c->head_mix_post_softmax);
        }
        if (w.lambda_q1) {
            Lambda lambda = {w.lambda_q1, w.lambda_k1, w.lambda_q2, w.lambda_k2};
            memset(s->diff_dmix, 0, 2 * (size_t)NH * sizeof(real));
            attention_sums_add(s->diff_dmix, m->sums.mix_post, B, m->sums.n, 2 * (size_t)NH);
            diff_lambda_backward(g.lambda_q1, g.lambda_k1, g.lambda_q2, g.lambda_k2, s->diff_dmix, &lambda, NH, HS);
        }
        rope_backward(s->dq, s->cosine, s->sine, B, T, NH, HS);
        rope_backward(s->dk, s->cosine, s->sine, B, T, NKV, HS);
        round_operand(mm, s->dq, NC);
        round_operand(mm, s->dk, NK);
        round_operand(mm, s->dv, NK);
        matmul_backward(s->dln, g.q, s->dq, ln1, w.q, N, C, C, false, mm);
        matmul_backward(s->dln, g.k, s->dk, ln1, w.k, N, C, KV, true, mm);
        matmul_backward(s->dln, g.v, s->dv, ln1, w.v, N, C, KV, true, mm);
        rmsnorm_backward(s->dx, g.input_norm, s->dln, x, w.input_norm, a->rstd1 + (size_t)l * N, N, C, 1, s->parts,
                         true);
    }
    embedding_backward(model_tensor(m, m->grads, TENSOR_EMBED), s->dx, tokens, N, C);
}

// Both of a batch: adds dloss times the gradient of the summed loss, and returns that sum.
static double model_forward_backward(Model* m, const int32_t* tokens, const int32_t* targets, int B, int T,
                                     double dloss) {
    model_forward(m, tokens, B, T);
    double sum = model_loss(m, targets, B * T, (real)dloss, true, NULL);
    model_backward(m, tokens, B, T);
    return sum;
}

// Elements of an arena that one thread handles at a time.
enum { UPDATE_BLOCK = RANKS_BLOCK };

static void model_zero_gradients(Model* m) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < m->tensors.numel; i += UPDATE_BLOCK) {
        size_t n = m->tensors.numel - i < UPDATE_BLOCK ? m->tensors.numel - i : (size_t)UPDATE_BLOCK;
        memset(m->grads + i, 0, n * sizeof(real));
    }
}

// Adds n gradients of `more` to `sum`.
static void gradients_add(void* state, void* sum, const void* more, size_t n) {
    (void)state;
    real* a = (real*)sum;
    const real* b = (const real*)more;
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) { a[i] += b[i]; }
}

// The gradients of this process's shard `done` (1 = first) of n are complete: adds those of its neighbours in the tree
// (mta/ranks.h) that wait, then waits too, unless it is the last.
static void model_add_shard(Model* m, int done, int n) {
    for (int add = shards_to_add(done, n); add > 0; add--) {
        gradients_add(NULL, m->grads, m->waiting[--m->n_waiting], m->tensors.numel);
    }
    if (done == n) { return; }
    real* sum = m->grads;
    m->grads = m->waiting[m->n_waiting];
    m->waiting[m->n_waiting++] = sum;
}

// The elements of the j-th block of those that this process updates.
static Span own_block(const Model* m, size_t j) {
    size_t n = m->tensors.numel, begin = ranks_own_block(m->ranks, n, j);
    Span s = {begin, n - begin < UPDATE_BLOCK ? n : begin + UPDATE_BLOCK};
    return s;
}

// Square root of the sum of squares of all gradients; not finite if any is not.
static double gradient_norm(const Model* m) {
    size_t n = m->tensors.numel, blocks = ranks_own_blocks(m->ranks, n);
    double* sums = (double*)alloc_or_die(ranks_most_blocks(m->ranks, n), sizeof(double), "norm sums");
#pragma omp parallel for schedule(static)
    for (size_t j = 0; j < blocks; j++) {
        Span block = own_block(m, j);
        const real* g = m->grads;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = block.begin; i < block.end; i++) { sum += (double)g[i] * (double)g[i]; }
        sums[j] = sum;
    }
    double total = ranks_sum_blocks(m->ranks, sums, n);
    free(sums);
    return sqrt(total);
}

// AdamW with decoupled decay on every tensor (MODEL.md eq. 15); step counts updates from 1. Gradients are scaled down
// to the norm grad_clip (0 = off). Returns the norm before clipping. If it is not finite nothing is changed: the caller
// counts and decides.
static double model_update(Model* m, const AdamW* h, long step) {
    double norm = gradient_norm(m);
    if (!isfinite(norm)) { return norm; }
    real clip = (real)(h->grad_clip > 0 && norm > h->grad_clip ? h->grad_clip / norm : 1);
    real b1 = (real)h->beta1, b2 = (real)h->beta2, eps = (real)h->eps;
    real decay = (real)(1 - h->lr * h->weight_decay), rate = (real)(h->lr / (1 - pow(h->beta1, (double)step)));
    real correct = (real)(1 / sqrt(1 - pow(h->beta2, (double)step)));
    real *w = m->weights, *am = m->m, *av = m->v;
    const real* g = m->grads;
    size_t blocks = ranks_own_blocks(m->ranks, m->tensors.numel);
#pragma omp parallel for schedule(static)
    for (size_t j = 0; j < blocks; j++) {
        Span block = own_block(m, j);
#pragma omp simd
        for (size_t i = block.begin; i < block.end; i++) {
            real d = g[i] * clip;
            am[i] = b1 * am[i] + (1 - b1) * d;
            av[i] = b2 * av[i] + (1 - b2) * d * d;
            w[i] = w[i] * decay - rate * am[i] / (sqrt_real(av[i]) * correct + eps);
        }
    }
    ranks_gather_arena(m->ranks, w, m->tensors.numel, sizeof(real));
    m->weights_rounded = false;
    return norm;
}

// =====================================================================================================================
// The training step

// One optimizer step: the loss is the sum over all counted targets of the step over their number. Stops between
// micro-batches when a signal has come: then no weight is changed, nor where the loss or the gradient norm is not
// finite.
static StepResult train_step(Model* m, const Step* s) {
    Batch b = step_begin(s);
    m->n_waiting = 0;
    do {
        model_zero_gradients(m);
        while (step_next(s, &b)) { b.sum += model_forward_backward(m, b.tokens, b.targets, b.B, b.T, b.dloss); }
        model_add_shard(m, b.shard - (int)s->own.begin + 1, (int)(s->own.end - s->own.begin));
    } while (step_next_shard(s, &b));
    ranks_reduce_arena(m->ranks, m->grads, m->tensors.numel, &m->sum);
    step_sum(s, &b, m->ranks);
    double norm = step_updates(s, &b) ? model_update(m, &s->hyper, (long)s->number) : NAN;
    return step_result(s, &b, norm);
}

#ifdef MTA_REAL_IS_FLOAT  // the rest is left out where the tests include this file in double

// =====================================================================================================================
// What the plan must know of this machine

// Operations a second of matrix products, measured for a moment: what MFU and the plan's time are relative to. They are
// of 1024^3 where one of 512^3 takes less than a millisecond, so that no start of a program waits for long.
static double matmul_rate(bool bf16) {
    enum { MOST = 1024, NUMEL = MOST * MOST };
    real* a = (real*)alloc_or_die(3 * (size_t)NUMEL, sizeof(real), "a test product");
    const Rounded of[3] = {{a, NUMEL, NULL}, {a + NUMEL, NUMEL, NULL}, {NULL, 0, NULL}};
    Products* products = bf16 ? products_create(of, 1) : NULL;
    double seconds = 0;  // of the fastest product
    int side = MOST / 2;
    for (; side == MOST / 2 || (side == MOST && seconds < 1e-3); side *= 2) {
        size_t n = (size_t)side * (size_t)side;
        for (size_t i = 0; i < n; i++) { a[i] = a[NUMEL + i] = (real)(i % 97); }
        round_operand(products, a, n);
        round_operand(products, a + NUMEL, n);
        seconds = INFINITY;
        for (int i = 0; i < 3; i++) {  // the first finds cold caches
            double start = seconds_now();
            gemm(false, false, side, side, side, 1, a, side, a + NUMEL, side, 0, a + 2 * (size_t)NUMEL, side, products);
            seconds = fmin(seconds, seconds_now() - start);
        }
    }
    products_free(products);
    free(a);
    return 2 * pow(side / 2, 3) / seconds;
}

// Prints the plan; refuses one that this machine cannot hold, since the kernel would end the program without a word.
static void print_plan(Run* r) {
    char device[128], name[96];
    MemoryPlan p = model_memory(&r->config, r->batch_size, r->seq_len, !options_evaluate(r->options));
    bool bf16 = r->trainer == trainer_cpu_bf16();
    size_t ranks = (size_t)run_ranks(r), shards = (size_t)shards_waiting(max_int(1, r->shards / run_ranks(r)));
    const PlanRow rows[] = {{"weights fp32", p.weights},
                            {"gradients", p.gradients},
                            {"gradients of shards", shards * p.gradients},
                            {"gradients of ranks", p.gradients ? ranks_room((int)ranks, 1) * sizeof(real) : 0},
                            {ranks > 1 ? "own part of m, v" : "optimizer m, v", p.optimizer / ranks},
                            {"activations", p.activations},
                            {"scratch", p.scratch},
                            {"rounded to bf16", bf16 ? p.rounded : 0}};
    int n = (int)(sizeof rows / sizeof rows[0]);
    snprintf(device, sizeof device, "%s, %d threads", cpu_name(name, sizeof name), omp_get_max_threads());
    PlanMachine machine = {device, matmul_rate(bf16), memory_available(ranks_here(r->ranks))};
    double total = train_print_plan(r, &machine, rows, n);
    r->measure = matmul_rate;
    ranks_meet(r->ranks, false, 0);  // all have looked at the memory before any takes some
    if (!r->options->dry_run && machine.available > 0 && total > machine.available) {
        die("memory: the plan needs %.1f GiB, %.1f are available; try a smaller --batch-size or --seq-len",
            total / 1073741824, machine.available / 1073741824);
    }
}

// =====================================================================================================================
// The table of this trainer (mta/trainer.h), and main

static void* table_create(const Config* c, int B, int T, int chunk, bool training, Error* e) {
    (void)e;  // on the CPU, memory that cannot be had ends the program with a line that says how much
    return model_create(c, B, T, chunk, training);
}
static void* table_create_bf16(const Config* c, int B, int T, int chunk, bool training, Error* e) {
    if (!bf16_products(e)) { return NULL; }
    Model* m = model_create(c, B, T, chunk, training);
    model_round_products(m);
    return m;
}
static void table_destroy(void* m) { model_free((Model*)m); }
static const TensorList* table_tensors(const void* m) { return &((const Model*)m)->tensors; }

static real* table_state(const Model* m, StateKind kind, int i) {
    real* const arenas[] = {m->weights, m->grads, m->m, m->v, m->weights};  // the master weights are the weights
    return arenas[kind] + m->tensors.specs[i].offset;
}
static void table_set(void* model, StateKind kind, int tensor, const float* data) {
    Model* m = (Model*)model;
    size_t first = m->tensors.specs[tensor].offset, end = first + m->tensors.specs[tensor].numel;
    for (size_t at = first; at < end;) {  // m and v of its own elements only: what is never written takes no memory
        Stretch s = ranks_stretch(m->ranks, m->tensors.numel, at, end);
        if ((kind != STATE_M && kind != STATE_V) || s.rank == ranks_number(m->ranks)) {
            memcpy(table_state(m, kind, tensor) + (at - first), data + (at - first), (s.end - at) * sizeof(real));
        }
        at = s.end;
    }
    m->weights_rounded = false;
}
static void table_get(const void* m, StateKind kind, int tensor, size_t from, size_t n, float* data) {
    memcpy(data, table_state((const Model*)m, kind, tensor) + from, n * sizeof(real));
}

static Losses table_forward(void* model, const int32_t* tokens, const int32_t* targets, int B, int T, float* logits) {
    Model* m = (Model*)model;
    model_forward(m, tokens, B, T);
    Losses losses = {model_loss(m, targets, B * T, 0, false, logits), m->scratch.losses, m->wrong};
    return losses;
}
static void table_last_logits(void* model, const int32_t* tokens, int n, float* logits) {
    Model* m = (Model*)model;
    model_forward(m, tokens, 1, n);
    matmul_forward(logits, m->acts.ln_f + (size_t)(n - 1) * m->config.hidden_size, model_head(m, m->weights), 1,
                   m->config.hidden_size, m->config.vocab_size, m->products);
}
static double table_update(void* m, const AdamW* hyper, long step) { return model_update((Model*)m, hyper, step); }
static double table_forward_backward(void* m, const int32_t* tokens, const int32_t* targets, int B, int T,
                                     double dloss) {
    return model_forward_backward((Model*)m, tokens, targets, B, T, dloss);
}
static StepResult table_train_step(void* m, const Step* step) { return train_step((Model*)m, step); }
static void table_share(void* model, Ranks* ranks, int shards) {
    Model* m = (Model*)model;
    m->ranks = ranks;
    for (int i = shards_waiting(shards / ranks->size); i > 0; i--) {
        m->waiting[i - 1] = (real*)alloc_or_die(m->tensors.numel, sizeof(real), "gradients of shards");
    }
    if (ranks_alone(ranks)) { return; }
    size_t elements = ranks_room(ranks->size, m->tensors.numel);
    char* room = (char*)alloc_or_die(elements, sizeof(real), "gradients of other ranks");
    RanksSum sum = {gradients_add, NULL, sizeof(real), room};
    m->sum = sum;
}

const Trainer* trainer_cpu(void) {
    static const Trainer table = {
        "cpu fp32",       true,       false,         table_create,      table_destroy,          table_tensors,
        table_set,        table_get,  table_forward, table_last_logits, table_forward_backward, table_update,
        table_train_step, table_share};
    return &table;
}

// The same with products in bf16.
const Trainer* trainer_cpu_bf16(void) {
    static Trainer table;
    table = *trainer_cpu();
    table.name = "cpu bf16", table.exact = false, table.create = table_create_bf16;
    return &table;
}

#ifndef MTA_LIBRARY
int main(int argc, char** argv) {
    blas_single_thread();  // our threads share out the products
    Error e = {{0}};
    TrainOptions options;
    Run run;
    train_begin(&options, argc, argv, ranks_of_mpi);
    blas_take_memory();
    if (strcmp(options.reduce, "tree") != 0) { die("--reduce %s: the CPU trainer has no NCCL", options.reduce); }
    bool bf16 = options.matmul && !strcmp(options.matmul, "bf16");
    if (bf16 && !bf16_products(&e)) { die("--matmul bf16: %s", e.text); }
    if (strcmp(options.attention_kernels, "own") != 0) {
        die("--attention-kernels: got %s, this trainer has its own alone; cudnn is of train_mta_cuda",
            options.attention_kernels);
    }
    run_settle(&run, bf16 ? trainer_cpu_bf16() : trainer_cpu(), &options);
    print_plan(&run);
    run_open_data(&run);
    if (options.dry_run) {
        run_meet(&run);
        return EXIT_DONE;
    }
    run.model = run.trainer->create(&run.config, run.batch_size, run.seq_len, 0, !options_evaluate(&options), &e);
    int status = train(&run);
    run.trainer->destroy(run.model);
    return status;
}
#endif
#endif  // MTA_REAL_IS_FLOAT
