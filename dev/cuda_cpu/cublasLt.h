// cublasLt.h: stand-in for the cuBLASLt calls that train_mta.cu makes: it proposes two algorithms, which sum over k from either end, so that a test sees
// which of them a product ran with. Refuses descriptors that do not fit each other, an algorithm it did not propose, and pointers below the alignment that
// was asked for when the algorithm was proposed.
#ifndef CUDA_CPU_CUBLASLT_H
#define CUDA_CPU_CUBLASLT_H
#include "cublas_v2.h"

typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;  // data: 0, which; 1, bytes of alignment
typedef enum { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4 } cublasLtMatmulDescAttributes_t;
typedef enum {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
} cublasLtMatmulPreferenceAttributes_t;

namespace cuda_cpu {
struct LtHandle { int unused; };
struct LtDesc { cublasOperation_t ta, tb; };
struct LtLayout { cudaDataType type; uint64_t rows, cols; int64_t ld; };
struct LtPreference { size_t workspace; uint32_t align[4]; };
}  // namespace cuda_cpu

typedef cuda_cpu::LtHandle* cublasLtHandle_t;
typedef cuda_cpu::LtDesc* cublasLtMatmulDesc_t;
typedef cuda_cpu::LtLayout* cublasLtMatrixLayout_t;
typedef cuda_cpu::LtPreference* cublasLtMatmulPreference_t;
typedef struct { cublasLtMatmulAlgo_t algo; size_t workspaceSize; cublasStatus_t state; float wavesCount; int reserved[4]; } cublasLtMatmulHeuristicResult_t;

static inline size_t cublasLtGetVersion(void) { return 130000; }
static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) { *h = new cuda_cpu::LtHandle{0}; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { delete h; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t, cudaDataType_t) {
    *d = new cuda_cpu::LtDesc{CUBLAS_OP_N, CUBLAS_OP_N};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { delete d; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t which, const void* value, size_t n) {
    if (n != sizeof(cublasOperation_t)) { return CUBLAS_STATUS_INVALID_VALUE; }
    memcpy(which == CUBLASLT_MATMUL_DESC_TRANSA ? &d->ta : &d->tb, value, n);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (ld < (int64_t)rows) { return CUBLAS_STATUS_INVALID_VALUE; }
    *l = new cuda_cpu::LtLayout{type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { delete l; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
    *p = new cuda_cpu::LtPreference{0, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { delete p; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t which, const void* value,
                                                                  size_t n) {
    bool space = which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    if (n != (space ? sizeof(size_t) : sizeof(uint32_t))) { return CUBLAS_STATUS_INVALID_VALUE; }
    memcpy(space ? (void*)&p->workspace : &p->align[which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, n);
    return CUBLAS_STATUS_SUCCESS;
}
static inline bool cuda_cpu_lt_fits(cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c) {
    uint64_t m = d->ta == CUBLAS_OP_N ? a->rows : a->cols, k = d->ta == CUBLAS_OP_N ? a->cols : a->rows;
    return k == (d->tb == CUBLAS_OP_N ? b->rows : b->cols) && m == c->rows && (d->tb == CUBLAS_OP_N ? b->cols : b->rows) == c->cols;
}
static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                            cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t p, int wanted,
                                                            cublasLtMatmulHeuristicResult_t* found, int* n) {
    if (cuda_cpu::planted_failure(__func__)) { return CUBLAS_STATUS_NOT_SUPPORTED; }
    if (!cuda_cpu_lt_fits(d, a, b, c)) { return CUBLAS_STATUS_INVALID_VALUE; }
    *n = std::min(wanted, 2);
    uint64_t align = std::min(std::min(p->align[0], p->align[1]), std::min(p->align[2], p->align[3]));
    for (int i = 0; i < *n; i++) { found[i] = {{{(uint64_t)i + 1, align}}, 0, CUBLAS_STATUS_SUCCESS, 1, {0}}; }
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t* algo,
                                                     cublasLtMatmulHeuristicResult_t* result) {
    bool known = algo->data[0] >= 1 && algo->data[0] <= 2 && algo->data[1] >= 1 && cuda_cpu_lt_fits(d, a, b, c);
    *result = {*algo, 0, known ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE, 1, {0}};
    return result->state;
}
static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void* alpha, const void* A, cublasLtMatrixLayout_t a, const void* B,
                                            cublasLtMatrixLayout_t b, const void* beta, const void* C, cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t,
                                            const cublasLtMatmulAlgo_t* algo, void*, size_t, cudaStream_t stream) {
    if (cuda_cpu::planted_failure(__func__)) { return CUBLAS_STATUS_EXECUTION_FAILED; }
    size_t align = algo->data[1];
    if (algo->data[0] < 1 || algo->data[0] > 2 || align < 1 || ((size_t)A | (size_t)B | (size_t)D) % align || C != D) { return CUBLAS_STATUS_INVALID_VALUE; }
    float al = *(const float*)alpha, be = *(const float*)beta;
    bool ta = d->ta == CUBLAS_OP_T, tb = d->tb == CUBLAS_OP_T, backwards = algo->data[0] == 2;
    cuda_cpu::LtLayout la = *a, lb = *b, lc = *c;
    int m = (int)lc.rows, n = (int)lc.cols, k = (int)(ta ? la.rows : la.cols);
    cuda_cpu::submit(stream, [=] {
        cuda_cpu::gemm(ta, tb, m, n, k, al, A, la.type, la.ld, B, lb.type, lb.ld, be, D, lc.type, lc.ld, backwards);
    });
    return CUBLAS_STATUS_SUCCESS;
}
#endif
