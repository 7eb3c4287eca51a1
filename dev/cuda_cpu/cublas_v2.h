// cublas_v2.h: stand-in for the cuBLAS calls that train_mta.cu makes: matrix products with fp32 accumulation,
// column-major as cuBLAS is. Refuses what cuBLAS refuses: leading dimensions that are too small, and combinations of
// types that it does not have. And, more strictly than cuBLAS, which would allocate inside the graph: a product that is
// captured before the handle was given a workspace; and one with a result of 16 bits on a handle that allows cuBLAS to
// add up its parts in 16 bits. A matrix that does not lie in device memory, which a GPU would find out later, ends the
// program.
#ifndef CUDA_CPU_CUBLAS_H
#define CUDA_CPU_CUBLAS_H
#include "cuda_runtime.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

typedef enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 } cudaDataType_t;
typedef cudaDataType_t cudaDataType;
typedef enum { CUBLAS_COMPUTE_32F = 68 } cublasComputeType_t;
typedef enum { CUBLAS_GEMM_DEFAULT = -1 } cublasGemmAlgo_t;
typedef enum { CUBLAS_DEFAULT_MATH, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 } cublasMath_t;

namespace cuda_cpu {
enum { BLAS_BUFFERS = 32 << 20 };  // that a handle must be able to take of the device's memory
struct Blas {
    cudaStream_t stream;
    void* workspace;
    cublasMath_t math;
};

inline float load(const void* p, cudaDataType t, size_t i) {
    return t == CUDA_R_32F    ? ((const float*)p)[i]
           : t == CUDA_R_16BF ? (float)((const __nv_bfloat16*)p)[i]
                              : (float)((const __half*)p)[i];
}
inline void store(void* p, cudaDataType t, size_t i, float v) {
    if (t == CUDA_R_32F) {
        ((float*)p)[i] = v;
    } else if (t == CUDA_R_16BF) {
        ((__nv_bfloat16*)p)[i] = v;
    } else {
        ((__half*)p)[i] = v;
    }
}
inline size_t type_bytes(cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; }

// Ends the program unless a batch of matrices (rows, columns), column-major, lies in device memory.
inline void need_on_device(const char* name, const void* p, cudaDataType t, int rows, int columns, int ld,
                           long long stride, int batch) {
    if (rows == 0 || columns == 0 || batch == 0) { return; }
    size_t elements = (size_t)(batch - 1) * (size_t)stride + (size_t)(columns - 1) * (size_t)ld + (size_t)rows;
    if (!on_device(p, elements * type_bytes(t))) { fault("cublas: %s does not lie in device memory", name); }
}

// 8 rows of a column, so that every optimisation computes them at once
struct Rows {
    float v __attribute__((vector_size(32)));
};

// C (m x n) = alpha op(A) op(B) + beta C; one column of C at a time, accumulated over k in fp32
inline void gemm(bool ta, bool tb, int m, int n, int k, float alpha, const void* A, cudaDataType at, size_t lda,
                 const void* B, cudaDataType bt, size_t ldb, float beta, void* C, cudaDataType ct, size_t ldc) {
    size_t blocks = ((size_t)m + 7) / 8;
    std::vector<Rows> a(blocks * (size_t)k), sum(blocks);
    for (int l = 0; l < k; l++) {
        for (int i = 0; i < m; i++) { a[l * blocks + i / 8].v[i % 8] = load(A, at, ta ? i * lda + l : l * lda + i); }
    }
    for (int j = 0; j < n; j++) {
        std::fill(sum.begin(), sum.end(), Rows{});
        for (int l = 0; l < k; l++) {
            float b = load(B, bt, tb ? l * ldb + j : j * ldb + l);
            for (size_t i = 0; i < blocks; i++) { sum[i].v += a[l * blocks + i].v * b; }
        }
        for (int i = 0; i < m; i++) {
            size_t at_c = j * ldc + i;
            store(C, ct, at_c, alpha * sum[i / 8].v[i % 8] + (beta == 0.0f ? 0.0f : beta * load(C, ct, at_c)));
        }
    }
}
}  // namespace cuda_cpu

typedef cuda_cpu::Blas* cublasHandle_t;
static inline cublasStatus_t cublasCreate(cublasHandle_t* h) {
    if (cuda_cpu::planted_failure("cublasCreate")) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    if (cuda_cpu::memory_total() < cuda_cpu::allocated + cuda_cpu::BLAS_BUFFERS) { return CUBLAS_STATUS_ALLOC_FAILED; }
    *h = new cuda_cpu::Blas{NULL, NULL, CUBLAS_DEFAULT_MATH};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasDestroy(cublasHandle_t h) {
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasSetStream(cublasHandle_t h,
                                             cudaStream_t s) {  // as documented, it also takes the workspace away
    h->stream = s, h->workspace = NULL;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t math) {
    h->math = math;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasSetWorkspace(cublasHandle_t h, void* p, size_t n) {
    if (p && !cuda_cpu::on_device(p, n)) { cuda_cpu::fault("cublas: the workspace does not lie in device memory"); }
    if ((size_t)p % 256) { return CUBLAS_STATUS_INVALID_VALUE; }
    h->workspace = p;
    return CUBLAS_STATUS_SUCCESS;
}
static inline const char* cublasGetStatusString(cublasStatus_t s) {
    switch (s) {
        case CUBLAS_STATUS_SUCCESS: return "success";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "the library was not initialized";
        case CUBLAS_STATUS_ALLOC_FAILED: return "the resource allocation failed";
        case CUBLAS_STATUS_EXECUTION_FAILED: return "the function failed to launch on the GPU";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "the functionality is not supported";
        default: return "an unsupported value or parameter was passed to the function";
    }
}

static inline cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb,
                                                        int m, int n, int k, const void* alpha, const void* A,
                                                        cudaDataType at, int lda, long long stride_a, const void* B,
                                                        cudaDataType bt, int ldb, long long stride_b, const void* beta,
                                                        void* C, cudaDataType ct, int ldc, long long stride_c,
                                                        int batch, cublasComputeType_t, cublasGemmAlgo_t) {
    if (!h) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    if (cuda_cpu::planted_failure(__func__)) { return CUBLAS_STATUS_EXECUTION_FAILED; }
    if (h->stream && h->stream->capture && !h->workspace) { return CUBLAS_STATUS_NOT_SUPPORTED; }
    if (m < 0 || n < 0 || k < 0 || batch < 0 || lda < std::max(1, ta == CUBLAS_OP_N ? m : k) ||
        ldb < std::max(1, tb == CUBLAS_OP_N ? k : n) || ldc < std::max(1, m)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (at != bt || (ct != at && ct != CUDA_R_32F)) { return CUBLAS_STATUS_NOT_SUPPORTED; }
    if (ct != CUDA_R_32F && !(h->math & CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    bool na = ta == CUBLAS_OP_N, nb = tb == CUBLAS_OP_N;
    cuda_cpu::need_on_device("A", A, at, na ? m : k, na ? k : m, lda, stride_a, batch);
    cuda_cpu::need_on_device("B", B, bt, nb ? k : n, nb ? n : k, ldb, stride_b, batch);
    cuda_cpu::need_on_device("C", C, ct, m, n, ldc, stride_c, batch);
    float al = *(const float*)alpha, be = *(const float*)beta;
    cuda_cpu::submit(h->stream, [=] {
        for (long long b = 0; b < batch; b++) {
            cuda_cpu::gemm(ta == CUBLAS_OP_T, tb == CUBLAS_OP_T, m, n, k, al,
                           (const char*)A + b * stride_a * cuda_cpu::type_bytes(at), at, lda,
                           (const char*)B + b * stride_b * cuda_cpu::type_bytes(bt), bt, ldb, be,
                           (char*)C + b * stride_c * cuda_cpu::type_bytes(ct), ct, ldc);
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                          int k, const void* alpha, const void* A, cudaDataType at, int lda,
                                          const void* B, cudaDataType bt, int ldb, const void* beta, void* C,
                                          cudaDataType ct, int ldc, cublasComputeType_t compute,
                                          cublasGemmAlgo_t algo) {
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, A, at, lda, 0, B, bt, ldb, 0, beta, C, ct, ldc, 0, 1,
                                      compute, algo);
}
#endif
