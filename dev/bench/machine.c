// machine.c: what this machine can do, the yardstick of the speed tables: bytes a second read from memory in one stream
// per core, and fp32 operations a second of a matrix product (CBLAS's sgemm where built with -DMTA_CBLAS).
//   gcc -std=gnu11 -O3 -march=native -fopenmp -I. dev/bench/machine.c -lm [-DMTA_CBLAS -lopenblas] -o machine &&
//     ./machine [read|sgemm]
#include "mta/util.h"

#include <math.h>
#include <omp.h>
#ifdef MTA_CBLAS
#include <cblas.h>
#endif

typedef int64_t v8 __attribute__((vector_size(64), aligned(8)));

// Memory on large pages, every byte touched.
static char* read_buffer(size_t bytes) {
    char* p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) { die("out of memory: %zu bytes", bytes); }
    madvise(p, bytes, MADV_HUGEPAGE);
#pragma omp parallel for
    for (size_t i = 0; i < bytes; i += 4096) { memset(p + i, 1, bytes - i < 4096 ? bytes - i : 4096); }
    return p;
}

enum { LINES = 128 };  // bytes of one round of read_stretch: two lines of memory

// Two ways to read memory. Plain: vector loads in order, nothing else, as streaming rates are commonly measured.
// Prefetched: 2 KiB ahead, the fastest of what was tried (0.5 to 32 KiB ahead, either level of caches, 1 to 16 lines a
// round, one to eight streams a core; dev/experiments.tsv).
typedef enum { READ_PLAIN, READ_PREFETCHED } Reading;

// The sum of the 8-byte values of a stretch of memory. bytes: what is left of them behind whole LINES is not read.
static inline __attribute__((always_inline)) int64_t read_stretch_as(const char* p, size_t bytes, Reading how) {
    v8 a = {0}, b = {0};
    for (size_t i = 0; i + LINES <= bytes; i += LINES) {
        if (how == READ_PREFETCHED) {
            __builtin_prefetch(p + i + 2048, 0, 3);
            __builtin_prefetch(p + i + 2048 + 64, 0, 3);
        }
        a += *(const v8*)(p + i);
        b += *(const v8*)(p + i + 64);
    }
    a += b;
    return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

static int64_t read_stretch(const char* p, size_t bytes, Reading how) {
    return how == READ_PLAIN ? read_stretch_as(p, bytes, READ_PLAIN) : read_stretch_as(p, bytes, READ_PREFETCHED);
}

typedef struct {
    const char* p;
    size_t bytes;
} Span;

// Bytes a second of reading all spans: each core an equal part of the bytes, one stretch after another.
static double read_pass(const Span* spans, int n, Reading how) {
    size_t bytes = 0;
    int64_t sink = 0;
    for (int i = 0; i < n; i++) { bytes += spans[i].bytes; }
    double start = seconds_now();
#pragma omp parallel reduction(+ : sink)
    {
        size_t threads = (size_t)omp_get_num_threads(), me = (size_t)omp_get_thread_num();
        size_t from = bytes / LINES * me / threads * LINES, to = bytes / LINES * (me + 1) / threads * LINES, at = 0;
        for (int i = 0; i < n; at += spans[i++].bytes) {
            size_t a = from > at ? from - at : 0, b = to > at ? to - at : 0;
            if (b > spans[i].bytes) { b = spans[i].bytes; }
            if (a < b) { sink += read_stretch(spans[i].p + a, b - a, how); }
        }
    }
    double rate = (double)bytes / (seconds_now() - start);
    return sink ? rate : 0;
}

#ifdef MTA_CBLAS
// Operations a second of one product of n x n matrices, with the library's own threads.
static double sgemm_pass(int n, const float* a, const float* b, float* c) {
    double start = seconds_now();
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, n, n, 1, a, n, b, n, 0, c, n);
    return 2.0 * n * n * n / (seconds_now() - start);
}

static float* sgemm_matrices(int n) {  // three, one behind another
    size_t size = (size_t)n * (size_t)n;
    float* a = alloc_or_die(3 * size, 4, "matrices");
    for (size_t i = 0; i < 2 * size; i++) { a[i] = (float)(i % 7); }
    return a;
}
#endif

#ifndef MTA_LIBRARY  // infer_step.c includes this file
int main(int argc, char** argv) {
    bool all = argc < 2;
    double best = 0;
    if (all || !strcmp(argv[1], "read")) {
        Span span = {read_buffer((size_t)2 << 30), (size_t)2 << 30};
        double plain = 0;
        for (int t = 0; t < 8; t++) {
            plain = fmax(plain, read_pass(&span, 1, READ_PLAIN));
            best = fmax(best, read_pass(&span, 1, READ_PREFETCHED));
        }
        printf("read %.2f GB/s, prefetched %.2f GB/s, %d threads\n", plain * 1e-9, best * 1e-9, omp_get_max_threads());
        munmap((void*)(uintptr_t)span.p, span.bytes);
    }
#ifdef MTA_CBLAS
    if (all || !strcmp(argv[1], "sgemm")) {
        enum { SIDE = 2048 };
        float *a = sgemm_matrices(SIDE), *b = a + SIDE * SIDE;
        best = 0;
        for (int t = 0; t < 8; t++) { best = fmax(best, sgemm_pass(SIDE, a, b, b + SIDE * SIDE)); }
        printf("sgemm %.1f GFLOP/s at 2048^3\n", best * 1e-9);
        free(a);
    }
#endif
    return 0;
}
#endif
