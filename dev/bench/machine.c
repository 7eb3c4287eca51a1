// machine.c: what this machine can do at best, the yardstick of the speed tables: bytes a second read from memory in
// one stream per core, and fp32 operations a second of a matrix product (CBLAS's sgemm where built with -DMTA_CBLAS).
//   gcc -std=gnu11 -O3 -march=native -fopenmp -I. dev/bench/machine.c -lm [-DMTA_CBLAS -lopenblas] -o machine &&
//     ./machine [read|sgemm]
#include "mta/util.h"

#include <math.h>
#include <omp.h>
#ifdef MTA_CBLAS
#include <cblas.h>
#endif

typedef int64_t v8 __attribute__((vector_size(64)));

// Memory on large pages, every byte touched.
static char* read_buffer(size_t bytes) {
    char* p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) { die("out of memory: %zu bytes", bytes); }
    madvise(p, bytes, MADV_HUGEPAGE);
#pragma omp parallel for
    for (size_t i = 0; i < bytes; i += 4096) { memset(p + i, 1, bytes - i < 4096 ? bytes - i : 4096); }
    return p;
}

// Bytes a second of one pass over the buffer, one stream per core, prefetched 8 KiB ahead into the second level of
// caches: the fastest of what was tried (plain loads, 4 to 32 KiB ahead, either level, one to eight streams a core), up
// to 14% over plain loads. A yardstick should be what the machine can do.
static double read_pass(const char* p, size_t bytes) {
    int64_t sink = 0;
    double start = seconds_now();
#pragma omp parallel reduction(+ : sink)
    {
        size_t n = (size_t)omp_get_num_threads(), part = bytes / 128 / n * 128, me = (size_t)omp_get_thread_num();
        const char* q = p + me * part;
        v8 a = {0}, b = {0};
        for (size_t i = 0; i < part; i += 128) {
            __builtin_prefetch(q + i + 8192, 0, 2);
            __builtin_prefetch(q + i + 8192 + 64, 0, 2);
            a += *(const v8*)(q + i);
            b += *(const v8*)(q + i + 64);
        }
        a += b;
        sink += a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
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
        size_t bytes = (size_t)2 << 30;
        char* p = read_buffer(bytes);
        for (int t = 0; t < 8; t++) { best = fmax(best, read_pass(p, bytes)); }
        printf("read %.2f GB/s, %d threads\n", best * 1e-9, omp_get_max_threads());
        munmap(p, bytes);
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
