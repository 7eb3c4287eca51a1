// machine.c: what this machine can do at best, the yardstick of the speed tables: bytes a second read from memory in
// one stream per core, and fp32 operations a second of a matrix product (CBLAS's sgemm where built with -DMTA_CBLAS).
//   gcc -std=gnu11 -O3 -march=native -fopenmp -I. dev/bench/machine.c -lm [-DMTA_CBLAS -lopenblas] -o machine &&
//     ./machine [read|sgemm]
#include "mta/util.h"

#include <omp.h>
#ifdef MTA_CBLAS
#include <cblas.h>
#endif

typedef int64_t v8 __attribute__((vector_size(64)));

// Best of `times` passes over `bytes` of memory on large pages, as fast as loads can be issued.
static double read_rate(size_t bytes, int times) {
    char* p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) { die("out of memory: %zu bytes", bytes); }
    madvise(p, bytes, MADV_HUGEPAGE);
#pragma omp parallel for
    for (size_t i = 0; i < bytes; i += 4096) { memset(p + i, 1, bytes - i < 4096 ? bytes - i : 4096); }
    double best = 0;
    int64_t sink = 0;
    for (int t = 0; t < times; t++) {
        double start = seconds_now();
#pragma omp parallel reduction(+ : sink)
        {
            size_t n = (size_t)omp_get_num_threads(), part = bytes / 512 / n * 512, me = (size_t)omp_get_thread_num();
            const v8* q = (const v8*)(p + me * part);
            v8 a = {0}, b = {0}, c = {0}, d = {0};
            for (size_t i = 0; i < part / 64; i += 4) {
                a += q[i];
                b += q[i + 1];
                c += q[i + 2];
                d += q[i + 3];
            }
            a += b + c + d;
            sink += a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
        }
        double rate = (double)bytes / (seconds_now() - start);
        best = rate > best ? rate : best;
    }
    munmap(p, bytes);
    return sink ? best : 0;
}

#ifdef MTA_CBLAS
static double sgemm_rate(int n, int times) {
    size_t size = (size_t)n * (size_t)n;
    float *a = alloc_or_die(size, 4, "a"), *b = alloc_or_die(size, 4, "b"), *c = alloc_or_die(size, 4, "c");
    for (size_t i = 0; i < size; i++) { a[i] = b[i] = (float)(i % 7); }
    double best = 0;
    for (int t = 0; t < times; t++) {
        double start = seconds_now();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, n, n, 1, a, n, b, n, 0, c, n);
        double rate = 2.0 * n * n * n / (seconds_now() - start);
        best = rate > best ? rate : best;
    }
    free(a);
    free(b);
    free(c);
    return best;
}
#endif

int main(int argc, char** argv) {
    bool all = argc < 2;
    if (all || !strcmp(argv[1], "read")) {
        printf("read %.2f GB/s, %d threads\n", read_rate((size_t)2 << 30, 8) * 1e-9, omp_get_max_threads());
    }
#ifdef MTA_CBLAS
    if (all || !strcmp(argv[1], "sgemm")) { printf("sgemm %.1f GFLOP/s at 2048^3\n", sgemm_rate(2048, 8) * 1e-9); }
#endif
    return 0;
}
