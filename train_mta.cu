// train_mta.cu: trains a LLaMA-style language model with Multi-Token Attention (arXiv 2504.00927) on NVIDIA
// GPUs, one for each process.
// The same sections, names and order as train_mta.c, which is the truth this file is tested against: read them in two
// windows.
//
//   make train_mta_cuda && ./train_mta_cuda --model 880m --train "data/shards/*_train_*.bin" --out runs/880m
//
// Storage is bf16 (floatX) with fp32 accumulation; master weights, gradients and AdamW state are fp32, the residual
// stream has 16 of its 24 bits of mantissa. PRECISION=FP32 stores all in fp32, for tests. Matrix products are cuBLAS;
// everything else is a kernel below, each a few lines, followed by its launcher, which keeps the CPU's signature and
// adds the Cuda context. Attention comes twice: the chunked algorithm (a chunk of queries of all heads of some
// sequences at a time), which serves every variant, and fused kernels for the common ones. Those, and all else that
// only makes it fast, stand in sections of their own after the layers, "Fast paths", to be read last. Nothing of size T
// x T, but for cuDNN's workspace (mta/attention_cudnn.h). Deterministic: every sum has a fixed order; one thread alone
// adds to an address by atomics (add_pair). dev/cuda_cpu compiles this file with a C++ compiler and runs these kernels
// on a CPU; so launches go through LAUNCH, and dynamic shared memory through DYNAMIC_SHARED.
//
//   B batch   T positions   C channels   L layers   NH heads   NKV key/value heads   HS head size
//   FF hidden units of the MLP   V vocabulary   N = B*T rows   S sequences of an attention batch
//   cq, ck    queries and keys of the convolution   ch heads of a mixing group
//   W         elements that a thread loads at once (16 bytes of floatX, or 1 where sizes are odd)
//   b t h i(query) j(key) c l are the loops over them.

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <type_traits>
#include <vector>

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mta/attention_cudnn.h"
#include "mta/config.h"
#include "mta/ranks_nccl.h"
#include "mta/train.h"
#include "mta/trainer.h"
#include "mta/util.h"

#if defined(PRECISION_FP32)
typedef float floatX;
typedef float floatS;  // scores
#define PRECISION_NAME "fp32"
#else
typedef __nv_bfloat16 floatX;
typedef __half floatS;
#define PRECISION_NAME "bf16"
#endif
enum { EXACT = sizeof(floatX) == 4 };  // weights and master weights are one arena

#if !defined(LAUNCH)  // else the emulator's, or that of dev/bench/cuda_step.cu, which takes times
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif
#if !defined(DYNAMIC_SHARED)
#define DYNAMIC_SHARED(type, name)                                        \
    extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared_bytes)
#endif
#if defined(__CUDACC__)
#define UNROLL _Pragma("unroll")
#define UNROLL2 _Pragma("unroll 2")
#define ROLLED _Pragma("unroll 1")  // where copies of a loop's body would cost registers
#else
#define UNROLL
#define UNROLL2
#define ROLLED
#endif

static __host__ __device__ inline int min_int(int a, int b) { return a < b ? a : b; }
static __host__ __device__ inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int ceil_div(size_t n, size_t by) { return (int)((n + by - 1) / by); }
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// =====================================================================================================================
// The device: context, checks, small device functions

typedef struct {
    cudaStream_t stream;
    cublasHandle_t blas;
    size_t graph_bytes;  // that the graphs of its passes take of the GPU's memory
} Cuda;

enum { EXIT_CUDA = 70 };  // a CUDA call failed that should not have; a missing GPU or too little memory is exit 1

static void cuda_fail(const char* what, const char* call, const char* file, int line) {
    fflush(stdout);
    fprintf(stderr, "%s: CUDA error at %s:%d: %s, in %.*s\n", program_invocation_short_name, file, line, what,
            (int)strcspn(call, "("), call);  // arguments fill lines
    exit(EXIT_CUDA);
}
static void cuda_check(cudaError_t e, const char* call, const char* file, int line) {
    if (e != cudaSuccess) { cuda_fail(cudaGetErrorString(e), call, file, line); }
}
static void blas_check(cublasStatus_t s, const char* call, const char* file, int line) {
    if (s != CUBLAS_STATUS_SUCCESS) { cuda_fail(cublasGetStatusString(s), call, file, line); }
}
#define cudaCheck(call) cuda_check(call, #call, __FILE__, __LINE__)
#define blasCheck(call) blas_check(call, #call, __FILE__, __LINE__)

// After every launch, `function` is its launcher. With DEBUG_SYNC it waits, and so blames the right kernel; then
// nothing can be captured.
#if defined(DEBUG_SYNC)
enum { WAITS = 1 };
#else
enum { WAITS = 0 };
#endif
static void launch_check(cudaStream_t stream, const char* function, const char* file, int line) {
    char launch[128];
    cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess && WAITS) { e = cudaStreamSynchronize(stream); }
    if (e == cudaSuccess) { return; }
    snprintf(launch, sizeof launch, "a kernel launched by %s", function);
    cuda_check(e, launch, file, line);
}
#define launchCheck(stream) launch_check(stream, __func__, __FILE__, __LINE__)

// A kernel that needs more dynamic shared memory than the default 48 KiB has to say so once.
template <typename Kernel> static void allow_shared(Kernel* kernel, size_t bytes) {
    if (bytes > (48 << 10)) {
        cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    }
}

// W elements side by side, moved by one or two 16-byte accesses where W = WIDE
template <typename T, int W> struct alignas(sizeof(T) * W) Pack { T v[W]; };
enum { WIDE = 16 / sizeof(floatX) };
template <int W, typename T> static __device__ inline Pack<T, W> load(const T* p) {
    return *reinterpret_cast<const Pack<T, W>*>(p);
}
template <int W, typename T> static __device__ inline void store(T* p, const Pack<T, W>& x) {
    *reinterpret_cast<Pack<T, W>*>(p) = x;
}
// Launches kernel<WIDE> where every row starts at a multiple of WIDE elements, else kernel<1>.
#define LAUNCH_WIDE(size, kernel, grid, block, shared, stream, ...)           \
    do {                                                                      \
        if ((size) % WIDE == 0) {                                             \
            LAUNCH(kernel<WIDE>, (grid), block, shared, stream, __VA_ARGS__); \
        } else {                                                              \
            LAUNCH(kernel<1>, (grid), block, shared, stream, __VA_ARGS__);    \
        }                                                                     \
        launchCheck(stream);                                                  \
    } while (0)

enum {
    WARP_SIZE = 32,
    ROW_WARPS = 8,
    ROW_THREADS = ROW_WARPS * WARP_SIZE
};  // kernels that give each row a warp: warps of a block
#define ALL_LANES 0xffffffffu

static __device__ inline float warp_sum(float x) {
    for (int o = WARP_SIZE / 2; o > 0; o /= 2) { x += __shfl_xor_sync(ALL_LANES, x, o); }
    return x;
}
static __device__ inline float warp_max(float x) {
    for (int o = WARP_SIZE / 2; o > 0; o /= 2) { x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, o)); }
    return x;
}
// The sums of 8 values over the warp: lane l gets that of value l / 4. Half of the values change sides at each of the
// first three steps.
static __device__ inline float warp_sums_of_8(float* x) {
    int lane = threadIdx.x % WARP_SIZE;
    UNROLL
    for (int n = 4; n > 0; n /= 2) {
        bool upper = lane & 4 * n;
        UNROLL
        for (int k = 0; k < n; k++) {
            float give = upper ? x[k] : x[k + n], keep = upper ? x[k + n] : x[k];
            x[k] = keep + __shfl_xor_sync(ALL_LANES, give, 4 * n);
        }
    }
    x[0] += __shfl_xor_sync(ALL_LANES, x[0], 2);
    return x[0] + __shfl_xor_sync(ALL_LANES, x[0], 1);
}
// The sum (or maximum) over the block, for every thread. All threads of the block must call it, since it has barriers;
// blockDim.x is a multiple of 32, 1024 at most, so that the warps' results fit into one warp.
static __device__ inline float block_reduce(float x, bool maximum) {
    __shared__ float warps[WARP_SIZE];
    int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE, n = blockDim.x / WARP_SIZE;
    x = maximum ? warp_max(x) : warp_sum(x);
    __syncthreads();  // a slow warp may still read the result of the call before
    if (lane == 0) { warps[warp] = x; }
    __syncthreads();  // all partial results are there

    // Every warp reduces the warps' results once more for itself: so all threads end with the same bits.
    x = lane < n ? warps[lane] : maximum ? -INFINITY : 0.0f;
    return maximum ? warp_max(x) : warp_sum(x);
}

// ---- exponentials. Where results are stored in 2 bytes the hardware's own 2^x (relative error 2^-22, zero below
// 2^-126) has more than twice their digits, and is one instruction where exp2f, which keeps subnormal numbers, is four
// and expf eight. The fp32 build keeps to the library's.

#define LOG2E 1.4426950408889634f
static __device__ inline float exponential2(float x) {
#if defined(CUDA_CPU)
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
static __device__ inline float exponential(float x) { return EXACT ? expf(x) : exponential2(LOG2E * x); }
// 1 / sqrt(x) of a mean square; NaN where the squares overflow, which 0 would hide
static __device__ inline float inverse_root(float x) { return x < INFINITY ? 1.0f / sqrtf(x) : NAN; }
static __device__ inline float sigmoid(float x) {
    return EXACT ? 1.0f / (1.0f + expf(-x)) : __fdividef(1.0f, 1.0f + exponential(-x));
}

// sums (groups, n) += parts (S, groups, blocks, stride), of which n columns count, in double: a block owns SUMS
// elements, SUMS_SLICES threads each, whose sums are halved in order
enum { SUMS = 8, SUMS_SLICES = 64 };
template <typename T>
static __global__ void __launch_bounds__(SUMS* SUMS_SLICES)
    sums_add_kernel(T* sums, const float* parts, int S, int groups, int blocks, int n, int stride) {
    DYNAMIC_SHARED(double, slices);  // (SUMS_SLICES, SUMS)
    int e = blockIdx.x * SUMS + threadIdx.x % SUMS, slice = threadIdx.x / SUMS;

    // Each thread adds every SUMS_SLICES-th part of its element, the slices side by side.
    double sum = 0;
    for (int p = slice; e < groups * n && p < S * blocks; p += SUMS_SLICES) {
        sum += (double)parts[(((size_t)(p / blocks) * groups + e / n) * blocks + p % blocks) * stride + e % n];
    }

    // Then the upper half of the slices is added to the lower, until one is left: the order does not depend on the
    // clock.
    slices[threadIdx.x] = sum;
    for (int half = SUMS_SLICES / 2; half > 0; half /= 2) {
        __syncthreads();  // the slices to be added are there
        if (slice < half) { slices[threadIdx.x] += slices[threadIdx.x + half * SUMS]; }
    }
    if (slice == 0 && e < groups * n) { sums[e] = (T)((double)sums[e] + slices[threadIdx.x]); }
}
template <typename T>
static void sums_launch(T* sums, const float* parts, int S, int groups, int blocks, int n, int stride, Cuda* g) {
    LAUNCH(sums_add_kernel<T>, ceil_div((size_t)groups * n, SUMS), SUMS * SUMS_SLICES,
           SUMS * SUMS_SLICES * sizeof(double), g->stream, sums, parts, S, groups, blocks, n, stride);
    launchCheck(g->stream);
}
static void sums_add(double* sums, const float* parts, int S, int groups, int blocks, int n, Cuda* g) {
    sums_launch(sums, parts, S, groups, blocks, n, n, g);
}
// parts (n_parts, stride): dweight[i] += the sum of column i < n
static void parts_add(float* dweight, const float* parts, int n_parts, int n, int stride, Cuda* g) {
    sums_launch(dweight, parts, 1, 1, n_parts, n, stride, g);
}

// to (n) = from (n) in another precision. A thread moves W elements, n a multiple of W; wide: 8 at a time, both arrays
// start at multiples of that
template <int W, typename To, typename From> static __global__ void convert_kernel(To* to, const From* from, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= n) { return; }
    Pack<From, W> x = load<W>(from + i);
    Pack<To, W> y;
    for (int e = 0; e < W; e++) { y.v[e] = (To)(float)x.v[e]; }
    store<W>(to + i, y);
}
template <typename To, typename From>
static void convert(To* to, const From* from, size_t n, Cuda* g, bool wide = false) {
    auto kernel = wide ? convert_kernel<8, To, From> : convert_kernel<1, To, From>;
    LAUNCH(kernel, ceil_div(wide ? n / 8 : n, 256), 256, 0, g->stream, to, from, n);
    launchCheck(g->stream);
}

// The GPU of this process: the first, unless several share a machine (mta/ranks_nccl.h).
static int device_own(void) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) { cudaGetLastError(); }
    return device;
}

// Does a GPU take no process more? One has it for itself, or they have all its memory.
static bool device_full(cudaError_t e) { return e == cudaErrorDevicesUnavailable || e == cudaErrorMemoryAllocation; }

// Is there a GPU that this build can use? False with one line that says what is missing.
static bool cuda_open(Cuda* g, Error* e) {
    int devices = 0, driver = 0, runtime = 0;
    cudaError_t status = cudaGetDeviceCount(&devices);
    if (cudaDriverGetVersion(&driver) != cudaSuccess) { driver = 0; }
    cudaRuntimeGetVersion(&runtime);
    if (status == cudaErrorInsufficientDriver && driver > 0) {  // 0: there is no driver at all
        return fail(e,
                    "the NVIDIA driver supports CUDA %d.%d, this build needs %d.%d; update the driver or build with an "
                    "older toolkit",
                    driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    }
    if (status != cudaSuccess || devices == 0) {
        return fail(e, "no usable NVIDIA GPU (%s); train_mta trains on the CPU",
                    status != cudaSuccess ? cudaGetErrorString(status) : "none found");
    }
    status = cudaSetDevice(device_own());
    if (status == cudaSuccess) { status = cudaFree(NULL); }  // toolkits before 12 make the context here
    if (device_full(status)) { return fail(e, "this GPU takes no process more (%s)", cudaGetErrorString(status)); }
    cudaCheck(status);
    cudaDeviceProp device;
    cudaCheck(cudaGetDeviceProperties(&device, device_own()));
    if (device.major < 8) {
        return fail(e, "%s has compute capability %d.%d, wanted 8.0 or more (bf16)", device.name, device.major,
                    device.minor);
    }
    cudaFuncAttributes code;
    status = cudaFuncGetAttributes(&code, sums_add_kernel<float>);
    if (status == cudaErrorNoKernelImageForDevice ||
        status == cudaErrorInvalidDeviceFunction) {  // either, by the driver's version
        return fail(e,
                    "this build has no code for %s (compute capability %d.%d); build it with make NVCC_ARCH=sm_%d%d%s",
                    device.name, device.major, device.minor, device.major, device.minor, device.major == 9 ? "a" : "");
    }
    cudaCheck(status);
    cudaCheck(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    cublasStatus_t blas = cublasCreate(&g->blas);
    if (blas == CUBLAS_STATUS_ALLOC_FAILED) { return fail(e, "no GPU memory for cuBLAS"); }
    blas_check(blas, "cublasCreate(&g->blas)", __FILE__, __LINE__);
    blasCheck(cublasSetStream(g->blas, g->stream));
    // Where cuBLAS cuts a product along K, it may add up the parts in the result's 16 bits unless it is told not to.
    blasCheck(cublasSetMathMode(
        g->blas, (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
    return true;
}
// Bytes of shared memory that a block may have at most; without a GPU, where only a plan is made, as many as one likes.
static size_t device_shared(void) {
    int bytes = 0;
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_own()) == cudaSuccess) {
        return (size_t)bytes;
    }
    cudaGetLastError();
    return SIZE_MAX;
}
// Without a GPU, where only a plan is made, those of an H100 or H200.
static int device_multiprocessors(void) {
    int n = 0;
    if (cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device_own()) == cudaSuccess) { return n; }
    cudaGetLastError();
    return 132;
}
static void cuda_close(Cuda* g) {
    if (g->blas) { blasCheck(cublasDestroy(g->blas)); }
    if (g->stream) { cudaCheck(cudaStreamDestroy(g->stream)); }
}

// Allocates on the device; false if it cannot be had.
template <typename T> static bool device_memory(T** p, size_t bytes, const char* what, Error* e) {
    if (cudaMalloc(p, bytes ? bytes : 1) == cudaSuccess) { return true; }
    cudaGetLastError();
    return fail(e, "no %zu MiB of GPU memory for %s", bytes >> 20, what);
}

// =====================================================================================================================
// Matrix products

// A matrix in device memory, row-major, rows `ld` elements apart; in a batch, one matrix every `stride` elements.
typedef struct {
    const void* data;
    cudaDataType_t type;
    size_t ld, stride;
} Matrix;
template <typename T> static Matrix matrix(const T* data, size_t ld, size_t stride = 0) {
    return {data,
            std::is_same<T, float>::value    ? CUDA_R_32F
            : std::is_same<T, floatX>::value ? CUDA_R_16BF
                                             : CUDA_R_16F,
            ld, stride};
}

// out (M,N) = alpha * A B + beta * out; A (M,K), or its transpose (K,M) if ta; B (K,N), or (N,K) if tb; `batch` of
// them.
struct Gemm {
    bool ta, tb;
    int M, N, K;
    float alpha = 1, beta = 0;
    int batch = 1;
};
// What cuBLAS asks for on sm_90 and sm_100 (the emulator, which needs none, may be given less: what executes the PTX
// copies all memory that a launch could touch).
#if !defined(BLAS_WORKSPACE)
#define BLAS_WORKSPACE (32 << 20)
#endif

// cuBLAS is column-major, so it is asked for the transpose, out^T = B^T A^T.
static void gemm(const Matrix& out, const Matrix& A, const Matrix& B, const Gemm& p, Cuda* g) {
    blasCheck(cublasGemmStridedBatchedEx(g->blas, p.tb ? CUBLAS_OP_T : CUBLAS_OP_N, p.ta ? CUBLAS_OP_T : CUBLAS_OP_N,
                                         p.N, p.M, p.K, &p.alpha, B.data, B.type, (int)B.ld, (long long)B.stride,
                                         A.data, A.type, (int)A.ld, (long long)A.stride, &p.beta, (void*)out.data,
                                         out.type, (int)out.ld, (long long)out.stride, p.batch, CUBLAS_COMPUTE_32F,
                                         CUBLAS_GEMM_DEFAULT));
}

// out (N,OC), rows ldo apart = inp (N,C) weight^T, weight (OC,C)
template <typename Out>
static void matmul_forward(Out* out, size_t ldo, const floatX* inp, const floatX* weight, int N, int C, int OC,
                           Cuda* g) {
    gemm(matrix(out, ldo), matrix(inp, C), matrix(weight, C), {false, true, N, OC, C}, g);
}

// dinp (N,C) = dout weight, or += with add_dinp; dweight (OC,C) += dout^T inp in fp32. Either may be NULL. Rows of dout
// are ldd apart.
static void matmul_backward(floatX* dinp, float* dweight, const floatX* dout, size_t ldd, const floatX* inp,
                            const floatX* weight, int N, int C, int OC, bool add_dinp, Cuda* g) {
    if (dinp) {
        gemm(matrix(dinp, C), matrix(dout, ldd), matrix(weight, C), {false, false, N, C, OC, 1, add_dinp ? 1.0f : 0.0f},
             g);
    }
    if (dweight) { gemm(matrix(dweight, C), matrix(dout, ldd), matrix(inp, C), {true, false, OC, C, N, 1, 1}, g); }
}

// Several weights (OC,C) of one input, their outputs side by side in rows of `width`: one product where the weights lie
// behind one another.
typedef struct {
    int n, OC[3], width;
    const floatX* weight[3];
    float* dweight[3];
} Joined;

// Outputs of the weights from *i on that are one product; *i: the first that is not.
static int joined_outputs(const Joined* w, int* i, int C) {
    int first = *i, outputs = w->OC[(*i)++];
    while (*i < w->n && w->weight[*i] == w->weight[first] + (size_t)outputs * C) { outputs += w->OC[(*i)++]; }
    return outputs;
}
static void matmul_joined_forward(floatX* out, const floatX* inp, const Joined* w, int N, int C, Cuda* g) {
    for (int i = 0; i < w->n;) {
        int first = i, outputs = joined_outputs(w, &i, C);
        matmul_forward(out, w->width, inp, w->weight[first], N, C, outputs, g);
        out += outputs;
    }
}
static void matmul_joined_backward(floatX* dinp, const floatX* dout, const floatX* inp, const Joined* w, int N, int C,
                                   Cuda* g) {
    for (int i = 0; i < w->n;) {
        int first = i, outputs = joined_outputs(w, &i, C);
        matmul_backward(dinp, w->dweight[first], dout, w->width, inp, w->weight[first], N, C, outputs, first > 0, g);
        dout += outputs;
    }
}

// =====================================================================================================================
// Embedding

// The residual stream, and its gradient, as two arrays: a number rounded to bf16, and what that leaves out, rounded
// too: 16 bits of mantissa in all, since the roundings of bf16 alone would add up over the layers. Products and the
// norms' backward passes read `high` alone. In the fp32 build it is the number, and there is no `low`. A template, so
// that a kernel's name tells dev/ptx_cpu what the arrays hold.
template <typename T> struct StreamOf { T *high, *low; };
typedef StreamOf<floatX> Stream;
static Stream stream_at(Stream s, size_t i) { return {s.high + i, EXACT ? NULL : s.low + i}; }

template <int W> static __device__ inline Pack<float, W> stream_load(Stream s, size_t i) {
    Pack<floatX, W> high = load<W>(s.high + i), low = {};
    if (!EXACT) { low = load<W>(s.low + i); }
    Pack<float, W> x;
    for (int e = 0; e < W; e++) { x.v[e] = (float)high.v[e] + (float)low.v[e]; }
    return x;
}
// x becomes what stream_load will give.
template <int W> static __device__ inline void stream_store(Stream s, size_t i, Pack<float, W>* x) {
    Pack<floatX, W> high, low;
    for (int e = 0; e < W; e++) {
        high.v[e] = (floatX)x->v[e], low.v[e] = (floatX)(x->v[e] - (float)high.v[e]);
        x->v[e] = (float)high.v[e] + (float)low.v[e];
    }
    store<W>(s.high + i, high);
    if (!EXACT) { store<W>(s.low + i, low); }
}

// out (N,C) = weight[tokens[n]], weight (V,C). A thread moves W elements.
template <int W>
static __global__ void embedding_forward_kernel(Stream out, const int* tokens, const floatX* weight, int N, int C) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= (size_t)N * C) { return; }

    // W neighbours lie in one row, since W divides C.
    Pack<floatX, W> w = load<W>(weight + (size_t)tokens[i / C] * C + i % C);
    Pack<float, W> x;
    for (int e = 0; e < W; e++) { x.v[e] = (float)w.v[e]; }
    stream_store<W>(out, i, &x);
}
static void embedding_forward(Stream out, const int* tokens, const floatX* weight, int N, int C, Cuda* g) {
    LAUNCH_WIDE(C, embedding_forward_kernel, ceil_div((size_t)N * C, (size_t)256 * (C % WIDE ? 1 : WIDE)), 256, 0,
                g->stream, out, tokens, weight, N, C);
}

// dweight[id] += the rows of dout where that token stands, in order. The host has sorted the rows by token: occurrences
// of the k-th distinct token are rows[starts[k]] .. rows[starts[k+1]-1]. A block owns one token and blockDim.x*W
// columns, so no two threads add to one place.
template <int W>
static __global__ void embedding_backward_kernel(float* dweight, Stream dout, const int* tokens, const int* rows,
                                                 const int* starts, int C) {
    int k = blockIdx.x, c = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (c >= C) { return; }

    // The rows of this token, in the order of the batch.
    float sum[W] = {};
    for (int i = starts[k]; i < starts[k + 1]; i++) {
        Pack<float, W> d = stream_load<W>(dout, (size_t)rows[i] * C + c);
        for (int e = 0; e < W; e++) { sum[e] += d.v[e]; }
    }

    // No other thread has these columns of this token: a plain addition will do.
    float* dw = dweight + (size_t)tokens[rows[starts[k]]] * C + c;
    Pack<float, W> w = load<W>(dw);
    for (int e = 0; e < W; e++) { w.v[e] += sum[e]; }
    store<W>(dw, w);
}
static void embedding_backward(float* dweight, Stream dout, const int* tokens, const int* rows, const int* starts,
                               int distinct, int C, Cuda* g) {
    dim3 grid(distinct, ceil_div(C, 64 * (C % WIDE ? 1 : WIDE)));
    LAUNCH_WIDE(C, embedding_backward_kernel, grid, 64, 0, g->stream, dweight, dout, tokens, rows, starts, C);
}

// =====================================================================================================================
// RMSNorm (MODEL.md eq. 1)
//
// With the residual sum before it.

// sum (N,C) = inp + branch (branch NULL: sum is inp, and not written);
//   out = weight * sum * rstd,  rstd (N) = 1 / sqrt(mean(sum^2) + eps).
// Bytes an element: 4 of inp, 2 of branch, 4 of sum, 2 of out. A warp owns a row; a lane owns packs of W columns, every
// 32nd, in both passes: so it reads back only what it stored itself, and needs no barrier.
template <int W>
static __global__ void rmsnorm_forward_kernel(floatX* out, float* rstd, Stream sum, Stream inp, const floatX* branch,
                                              const floatX* weight, int N, int C, float eps) {
    int n = blockIdx.x * ROW_WARPS + threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    if (n >= N) { return; }  // whole warps leave

    // First pass: the residual sum, and the squares of what it gives.
    float squares = 0;
    for (int c = lane * W; c < C; c += WARP_SIZE * W) {
        Pack<float, W> x = stream_load<W>(inp, (size_t)n * C + c);
        if (branch) {
            Pack<floatX, W> y = load<W>(branch + (size_t)n * C + c);
            for (int e = 0; e < W; e++) { x.v[e] += (float)y.v[e]; }
            stream_store<W>(sum, (size_t)n * C + c, &x);
        }
        for (int e = 0; e < W; e++) { squares += x.v[e] * x.v[e]; }
    }
    float r = inverse_root(warp_sum(squares) / C + eps);
    if (lane == 0) { rstd[n] = r; }

    // Second pass: the row again, from the cache, scaled.
    for (int c = lane * W; c < C; c += WARP_SIZE * W) {
        size_t at = (size_t)n * C + c;
        Pack<float, W> x = branch ? stream_load<W>(sum, at) : stream_load<W>(inp, at);
        Pack<floatX, W> w = load<W>(weight + c);
        for (int e = 0; e < W; e++) { w.v[e] = (floatX)((float)w.v[e] * x.v[e] * r); }
        store<W>(out + (size_t)n * C + c, w);
    }
}
static void residual_rmsnorm_forward(floatX* out, float* rstd, Stream sum, Stream inp, const floatX* branch,
                                     const floatX* weight, int N, int C, double eps, Cuda* g) {
    LAUNCH_WIDE(C, rmsnorm_forward_kernel, ceil_div(N, ROW_WARPS), ROW_THREADS, 0, g->stream, out, rstd, sum, inp,
                branch, weight, N, C, (float)eps);
}
static void rmsnorm_forward(floatX* out, float* rstd, Stream inp, const floatX* weight, int N, int C, double eps,
                            Cuda* g) {
    residual_rmsnorm_forward(out, rstd, {}, inp, NULL, weight, N, C, eps, g);
}

// Of the norm's backward pass: blocks at most, so that the sums are the same on every GPU; threads of a block at most;
// threads with ONE, which takes more registers than there are for 1024
enum { NORM_PARTS = 1024, NORM_ROW = 1024, NORM_ONE = 512 };

// dinp (N,C) = (or += with add_dinp) rstd * (d - xhat * mean(d . xhat)), d = dout * weight, xhat = inp * rstd, inp the
// rounded stream; parts (blocks,C) the block's share of sum_n dout * xhat. A block owns every gridDim.x-th row, a
// thread packs of W columns of all its rows, so that nobody else adds to its sums. ONE: one pack, which stays in
// registers; else the sums stand in `parts`, and the row is read again from the cache. Bytes an element: 2 of dout, 2
// of inp, 8 of dinp, and 4 for every N / NORM_PARTS rows.
template <int W, bool ONE>
static __global__ void __launch_bounds__(ONE ? NORM_ONE : NORM_ROW)
    rmsnorm_backward_kernel(Stream dinp, float* parts, const floatX* dout, const floatX* inp, const floatX* weight,
                            const float* rstd, int N, int C, bool add_dinp) {
    const int first = threadIdx.x * W, step = blockDim.x * W;
    float* part = parts + (size_t)blockIdx.x * C;
    Pack<floatX, W> d = {}, w = {}, x = {};
    Pack<float, W> sum = {};
    for (int c = first; c < C; c += step) { store<W>(part + c, sum); }
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        // First pass: the dot product of the row's gradient with its normalised input.
        size_t row = (size_t)n * C;
        float r = rstd[n], dot = 0;
        for (int c = first; c < C; c += step) {
            d = load<W>(dout + row + c), w = load<W>(weight + c), x = load<W>(inp + row + c);
            for (int e = 0; e < W; e++) { dot += (float)d.v[e] * (float)w.v[e] * (float)x.v[e]; }
        }
        float mean = block_reduce(dot, false) * r / C;

        // Second pass: the gradients of the weight and of the input.
        for (int c = first; c < C; c += step) {
            Pack<float, W> dx = {};
            if (add_dinp) { dx = stream_load<W>(dinp, row + c); }
            if (!ONE) {
                d = load<W>(dout + row + c), w = load<W>(weight + c), x = load<W>(inp + row + c);
                sum = load<W>(part + c);
            }
            for (int e = 0; e < W; e++) {
                sum.v[e] += (float)d.v[e] * (float)x.v[e] * r;
                dx.v[e] += r * ((float)d.v[e] * (float)w.v[e] - (float)x.v[e] * r * mean);
            }
            if (!ONE) { store<W>(part + c, sum); }
            stream_store<W>(dinp, row + c, &dx);
        }
    }
    if (ONE && first < C) { store<W>(part + first, sum); }
}
// dweight (C) += sum_n dout * xhat; parts (NORM_PARTS,C) is scratch
static void rmsnorm_backward(Stream dinp, float* dweight, const floatX* dout, const floatX* inp, const floatX* weight,
                             const float* rstd, int N, int C, float* parts, bool add_dinp, Cuda* g) {
    int packs = C % WIDE ? C : C / WIDE, threads = min_int(NORM_ROW, round_up(packs, WARP_SIZE)),
        blocks = min_int(N, NORM_PARTS);
    auto kernel = C % WIDE            ? rmsnorm_backward_kernel<1, false>
                  : packs <= NORM_ONE ? rmsnorm_backward_kernel<WIDE, true>
                                      : rmsnorm_backward_kernel<WIDE, false>;
    LAUNCH(kernel, blocks, threads, 0, g->stream, dinp, parts, dout, inp, weight, rstd, N, C, add_dinp);
    launchCheck(g->stream);
    parts_add(dweight, parts, blocks, C, C, g);
}

// =====================================================================================================================
// RoPE (MODEL.md eq. 2): pairs (t, t + HS/2) of a head are rotated by position times frequency
//
// The same kernels split qkv into q, k and v by heads, and join their gradients.

// cosine, sine (T, HS/2), on the host
static void rope_table(float* cosine, float* sine, const Config* config, int T) {
    int half = config_head_size(config) / 2;
    for (int t = 0; t < half; t++) {
        double frequency = config_rope_frequency(config, t);
        for (int i = 0; i < T; i++) {
            cosine[(size_t)i * half + t] = (float)cos(i * frequency);
            sine[(size_t)i * half + t] = (float)sin(i * frequency);
        }
    }
}

// The tables (T,HS/2) and the shape of what they rotate
typedef struct {
    const float *cosine, *sine;
    int T, NH, NKV, HS;
} Rope;

// qkv (B,T,NH+2*NKV,HS) becomes q, k, v (B,NH,T,HS): q and k rotated, k and v repeated for the heads that share them,
// so that every product of attention is one strided batch. A thread moves W pairs of one head of one token; W divides
// HS/2. Neighbouring threads move neighbouring pairs.
template <int W>
static __global__ void rope_forward_kernel(floatX* q, floatX* k, floatX* v, const floatX* qkv, Rope r, int B) {
    const int T = r.T, NH = r.NH, NKV = r.NKV, HS = r.HS, half = HS / 2, packs = half / W;
    size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= (size_t)B * T * 3 * NH * packs) { return; }

    // Which pairs, of which of q, k and v, of which head and token this thread moves.
    int t2 = (int)(id % packs) * W, which = (int)(id / packs % (3 * NH));
    int n = (int)(id / packs / (3 * NH)), b = n / T, t = n % T, h = which % NH,
        kind = which / NH;  // kind: 0 q, 1 k, 2 v
    int from = kind == 0 ? h : NH + (kind - 1) * NKV + h / (NH / NKV);
    const floatX* inp = qkv + ((size_t)n * (NH + 2 * NKV) + from) * HS + t2;
    floatX* out = (kind == 0 ? q : kind == 1 ? k : v) + (((size_t)b * NH + h) * T + t) * HS + t2;

    // Rotate q and k; v is only moved.
    Pack<floatX, W> x = load<W>(inp), y = load<W>(inp + half);
    if (kind < 2) {
        Pack<float, W> cs = load<W>(r.cosine + (size_t)t * half + t2), sn = load<W>(r.sine + (size_t)t * half + t2);
        for (int e = 0; e < W; e++) {
            float a = (float)x.v[e], c = (float)y.v[e];
            x.v[e] = (floatX)(a * cs.v[e] - c * sn.v[e]);
            y.v[e] = (floatX)(c * cs.v[e] + a * sn.v[e]);
        }
    }
    store<W>(out, x);
    store<W>(out + half, y);
}
static void rope_forward(floatX* q, floatX* k, floatX* v, const floatX* qkv, const Rope* r, int B, Cuda* g) {
    int half = r->HS / 2, W = half % WIDE ? 1 : WIDE;
    LAUNCH_WIDE(half, rope_forward_kernel, ceil_div((size_t)B * r->T * 3 * r->NH * (half / W), 256), 256, 0, g->stream,
                q, k, v, qkv, *r, B);
}

// The x and y of parts, and of heads that share keys: parts (parts,S,NH,T,HS), `all` elements apart, `at` the first
// head's, heads `head` elements apart.
template <int W, typename From>
static __device__ inline void rope_sum(Pack<float, W>* x, Pack<float, W>* y, const From* from, size_t at, size_t all,
                                       size_t head, int half, int parts, int share) {
    for (int s = 0; s < share * parts; s++) {
        const From* inp = from + at + s / share * all + s % share * head;
        Pack<From, W> xi = load<W>(inp), yi = load<W>(inp + half);
        for (int e = 0; e < W; e++) { x->v[e] += (float)xi.v[e], y->v[e] += (float)yi.v[e]; }
    }
}

// The reverse for S sequences: dq (q_parts,S,NH,T,HS), in fp32 where it was added up in memory, dk (S,NH,T,HS) and dv
// (v_parts,S,NH,T,HS) become dqkv (S,T,NH+2*NKV,HS). Part p of dq begins with query p * q_step: above, nothing has been
// written. Parts, and heads that share keys, are added in order, then rotated back. Bytes an element of q: 4 a part and
// 2; of k and v: 2 a part (4 from the chunks) and 2.
template <int W, typename FromQ, typename From>
static __global__ void rope_backward_kernel(floatX* dqkv, const FromQ* dq, const From* dk, const From* dv, Rope r,
                                            int S, int q_parts, int q_step, int v_parts) {
    const int T = r.T, NH = r.NH, NKV = r.NKV, HS = r.HS, half = HS / 2, packs = half / W, heads = NH + 2 * NKV;
    size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x, all = (size_t)S * NH * T * HS;
    if (id >= (size_t)S * T * heads * packs) { return; }

    // Which pairs, of which packed head and token this thread writes.
    int t2 = (int)(id % packs) * W, which = (int)(id / packs % heads), n = (int)(id / packs / heads), b = n / T,
        t = n % T;
    int share = which < NH ? 1 : NH / NKV, head = which < NH ? which : (which - NH) % NKV * share;
    size_t at = (((size_t)b * NH + head) * T + t) * HS + t2, next = (size_t)T * HS;

    // Add up the parts of each head, then the heads that share these keys or values.
    Pack<float, W> x = {}, y = {};
    if (which < NH) {
        rope_sum<W>(&x, &y, dq, at, all, next, half, min_int(q_parts, t / q_step + 1), 1);
    } else {
        rope_sum<W>(&x, &y, which < NH + NKV ? dk : dv, at, all, next, half, which < NH + NKV ? 1 : v_parts, share);
    }

    // The inverse of a rotation is its transpose; v was not rotated.
    if (which < NH + NKV) {
        Pack<float, W> cs = load<W>(r.cosine + (size_t)t * half + t2), sn = load<W>(r.sine + (size_t)t * half + t2);
        for (int e = 0; e < W; e++) {
            float a = x.v[e], c = y.v[e];
            x.v[e] = a * cs.v[e] + c * sn.v[e];
            y.v[e] = c * cs.v[e] - a * sn.v[e];
        }
    }

    // Round once, at the end.
    Pack<floatX, W> xo, yo;
    for (int e = 0; e < W; e++) { xo.v[e] = (floatX)x.v[e], yo.v[e] = (floatX)y.v[e]; }
    floatX* out = dqkv + ((size_t)n * heads + which) * HS + t2;
    store<W>(out, xo);
    store<W>(out + half, yo);
}
template <typename FromQ, typename From>
static void rope_backward(floatX* dqkv, const FromQ* dq, const From* dk, const From* dv, const Rope* r, int S,
                          int q_parts, int q_step, int v_parts, Cuda* g) {
    int half = r->HS / 2, W = half % WIDE ? 1 : WIDE;
    auto kernel = half % WIDE ? rope_backward_kernel<1, FromQ, From> : rope_backward_kernel<WIDE, FromQ, From>;
    LAUNCH(kernel, ceil_div((size_t)S * r->T * (r->NH + 2 * r->NKV) * (half / W), 256), 256, 0, g->stream, dqkv, dq, dk,
           dv, *r, S, q_parts, q_step, v_parts);
    launchCheck(g->stream);
}

// =====================================================================================================================
// Attention, a chunk of queries at a time (MODEL.md eq. 3 to 9). The steps first, each on a tile, forward then
// backward; then the chunk.
//
// A tile holds rows of scores of all heads of S sequences: rows are queries i0 <= i < i0 + rows, columns are keys.
// Every step writes zeros right of the diagonal and reads through a mask: nothing outside 0 <= j <= i < T is ever used.
// Rows outside the sequence are never touched. Steps compute in fp32 and pass on 2 bytes a logit: the maps from the
// scores on in fp16 (floatS), whose 11 bits are 8 times bf16's; what a product with the values or the queries reads,
// and all gradients, which need bf16's range, in floatX.

template <typename T> struct TileOf {
    T* data;  // (S*NH, rows, ld)
    int i0, rows, ld;
    __host__ __device__ T* row(int head, int i) const { return data + ((size_t)head * rows + (size_t)(i - i0)) * ld; }
};
typedef TileOf<floatS> Tile;
typedef TileOf<floatX> TileX;

enum { PACK = 8 };  // elements of a row that the steps move at once; rows start at multiples of it
static inline int tile_stride(int T) { return round_up(T, PACK); }

// What attention needs to know. q, k, v, out and their gradients are (B,NH,T,HS).
typedef struct {
    int B, S, T, NH, HS, cq, ck, ch_pre, ch_post;  // S: sequences at a time; ch_*: heads of a mixing group, 0 = off
    const floatX *conv_pre, *conv_post;            // (NH,cq,ck), NULL = off
    const floatX* mix_pre;                         // (NH/ch,ch,ch), NULL = off
    const floatX* mix_post;
    const float* diff_mix;  // (NH/2,2,2): takes the place of mix_post for diff
    int chunk;              // queries of a chunk
    const float* pair_mix;  // (NH/2,2,2) mix_post or diff_mix in fp32, for the fused kernels
    bool flash;             // they serve this layer
    AttentionCudnn* cudnn;  // cuDNN does, in their place; NULL = off
    size_t shared;          // bytes of shared memory of a block there
} Attention;

// What follows is what every model can take, step by step. In bf16 --attention transformer, mta and diff take the fused
// kernels of "Fast paths: all of attention in one kernel" instead (flash_serves says which layers). What is only fast
// stands in such sections after cross-entropy, declared here and called where it serves: the convolution on tensor
// cores; mixing, softmax and mixing of groups of 16 heads in one kernel; all of attention in one kernel.
typedef struct KqConv KqConv;
typedef struct Heads Heads;
typedef struct Maps Maps;
typedef struct AttentionSums AttentionSums;
typedef struct AttentionScratch AttentionScratch;
typedef struct {
    int S, lo, hi;
} Chunk;  // the queries lo <= i < hi of S sequences
static bool conv_is_band(const Attention* a);
template <typename Out, typename In>
static void kq_conv_band(const TileOf<Out>* out, const TileOf<In>* inp, const KqConv& conv, int S, Cuda* g);
static void kq_conv_band_backward_weight(double* dweight, const TileX* dout, const Tile* inp, const Attention* a, int S,
                                         int lo, int hi, float* parts, Cuda* g);
static bool mixes_16(const Attention* a);
static size_t mix16_parts_size(const Attention* a);
static void mix16_maps(const Maps* m, float* stats, const Attention* a, Chunk c, bool backward, Cuda* g);
static void mix16_maps_backward(TileX* d, TileX* other, const AttentionSums* sums, const Maps* m, const float* stats,
                                const Attention* a, Chunk c, float* parts, Cuda* g);
enum { FLASH_KEYS = 64 };  // keys of a tile
static int flash_splits(int S, int NH, int T);
static void flash_attention_forward(floatX* out, float* stats, const floatX* q, const floatX* k, const floatX* v,
                                    const Attention* a, Cuda* g);
static void flash_attention_backward(const AttentionSums* sums, const floatX* dout, const floatX* out, const Heads* x,
                                     const Attention* a, int S, const AttentionScratch* scratch, Cuda* g);
static void cudnn_attention_forward(floatX* out, const Heads* x, const Attention* a, int S,
                                    const AttentionScratch* scratch, Cuda* g);
static void cudnn_attention_backward(const AttentionSums* sums, const floatX* dout, const floatX* out, const Heads* x,
                                     const Attention* a, int S, const AttentionScratch* scratch, Cuda* g);

// As operands of products, a batch of heads: a tile from row i on; x (heads,T,HS) from row i on
template <typename T> static Matrix tile_matrix(const TileOf<T>* t, int i) {
    return matrix(t->row(0, i), t->ld, (size_t)t->rows * t->ld);
}
template <typename T> static Matrix heads_matrix(const T* x, int i, const Attention* a) {
    return matrix(x + (size_t)i * a->HS, a->HS, (size_t)a->T * a->HS);
}

// ---- scores: S[i,j] = q_i . k_j / sqrt(HS); not masked, its readers are

// Rows lo <= i < hi within the sequence, keys 0 .. nk-1; q, k of S sequences, in floatS: cuBLAS writes no fp16 from
// bf16
static void scores_forward(const Tile* out, const floatS* q, const floatS* k, const Attention* a, int S, int lo, int hi,
                           int nk, Cuda* g) {
    float scale = (float)(1.0 / sqrt(a->HS));
    lo = max_int(lo, 0), hi = min_int(hi, a->T);
    gemm(tile_matrix(out, lo), heads_matrix(q, lo, a), heads_matrix(k, 0, a),
         {false, true, hi - lo, nk, a->HS, scale, 0, S * a->NH}, g);
}
// x (S,NH,T,HS) for it: as it is where that is floatS, else converted into scratch
template <typename From>
static const floatS* scores_input(floatS* scratch, const From* x, const Attention* a, int S, Cuda* g) {
    if constexpr (std::is_same<From, floatS>::value) {
        return x;
    } else {
        convert(scratch, x, (size_t)S * a->NH * a->T * a->HS, g, a->HS % PACK == 0);
        return scratch;
    }
}

// dq_i = dS[i,:] k / sqrt(HS);  dk_j += dS[:,j]^T q / sqrt(HS), rows lo <= i < hi
static void scores_backward(float* dq, float* dk, const TileX* dout, const floatX* q, const floatX* k,
                            const Attention* a, int S, int lo, int hi, Cuda* g) {
    float scale = (float)(1.0 / sqrt(a->HS));
    gemm(heads_matrix(dq, lo, a), tile_matrix(dout, lo), heads_matrix(k, 0, a),
         {false, false, hi - lo, a->HS, hi, scale, 0, S * a->NH}, g);
    gemm(heads_matrix(dk, 0, a), tile_matrix(dout, lo), heads_matrix(q, lo, a),
         {true, false, hi, a->HS, hi - lo, scale, 1, S * a->NH}, g);
}

// ---- kq_conv: out[i,j] = sum_{a<cq, b<ck} weight[a,b] inp[i-(cq-1)+a, j-(ck-1)/2+b], inp masked by its own rows

enum { CONV_ROWS = 32, CONV_COLS = 64, CONV_STRIP = 16, CONV_THREADS = CONV_ROWS / CONV_STRIP * CONV_COLS };

// Keys that a block loads to either side of its own: (ck-1)/2, rounded up so that it loads whole packs
static __host__ __device__ inline int conv_margin(int ck) { return ((ck - 1) / 2 + PACK - 1) / PACK * PACK; }
// Taps of one key column, as many as are loaded at once
static __host__ __device__ inline int conv_taps(int cq) { return (cq + 3) / 4 * 4; }
static size_t conv_shared(int cq, int ck) {
    return ((size_t)(CONV_ROWS + cq - 1) * (CONV_COLS + 2 * conv_margin(ck)) + (size_t)conv_taps(cq) * ck) *
           sizeof(float);
}
// Rows top .. top+rows-1, columns left .. left+cols-1 of one head into shared memory, left and cols multiples of PACK;
// zero outside begin <= i < end and right of the diagonal
template <typename T>
static __device__ inline void tile_load(float* shared, const TileOf<T>& inp, int head, int top, int left, int rows,
                                        int cols, int begin, int end) {
    for (int t = threadIdx.x; t < rows * (cols / PACK); t += blockDim.x) {
        int i = top + t / (cols / PACK), j = left + t % (cols / PACK) * PACK;
        bool inside = i >= begin && i < end && j >= 0 && j <= i;
        Pack<T, PACK> x = {};
        if (inside) { x = load<PACK>(inp.row(head, i) + j); }
        UNROLL
        for (int e = 0; e < PACK; e++) { shared[t * PACK + e] = inside && j + e <= i ? (float)x.v[e] : 0.0f; }
    }
}

// Output rows lo <= i < hi, columns < nk; input rows begin <= i < end. weight (NH,cq,ck). backward: the transpose, the
// same walk with the kernel turned around:
//   dinp[i,j] = sum weight[a,b] dout[i+(cq-1)-a, j+(ck-1)/2-b].
struct KqConv {
    const floatX* weight;
    int cq, ck, NH, lo, hi, nk, begin, end;
    bool backward;
};

// A block owns CONV_ROWS x CONV_COLS outputs of a head; a thread CONV_STRIP rows of one column. CQ: cq where it is
// worth a kernel of its own (the inputs of a column slide through registers), 0 = any.
template <int CQ, typename Out, typename In>
static __global__ void kq_conv_kernel(TileOf<Out> out, TileOf<In> inp, KqConv conv) {
    DYNAMIC_SHARED(float, s);
    const int cq = CQ ? CQ : conv.cq, ck = conv.ck, taps = conv_taps(cq), margin = conv_margin(ck),
              rows = CONV_ROWS + cq - 1, cols = CONV_COLS + 2 * margin;

    // The block's place: CONV_ROWS rows from i0 on, CONV_COLS columns from j0 on; the thread's: column j, CONV_STRIP
    // rows from r0 on.
    float* w = s + rows * cols;  // (ck,taps)
    int head = blockIdx.z, i0 = conv.lo + blockIdx.y * CONV_ROWS, j0 = blockIdx.x * CONV_COLS;
    int c = threadIdx.x % CONV_COLS, r0 = threadIdx.x / CONV_COLS * CONV_STRIP, j = j0 + c;
    float sum[CONV_STRIP] = {};

    // The tile with its halo (cq-1 rows above, or below for the transpose, `margin` columns on both sides) and the
    // kernel, a key column's taps side by side.
    if (j0 < i0 + CONV_ROWS) {  // else all of the block lies right of the diagonal
        tile_load(s, inp, head, conv.backward ? i0 : i0 - (cq - 1), j0 - margin, rows, cols, conv.begin, conv.end);
        const floatX* own = conv.weight + (size_t)(head % conv.NH) * cq * ck;
        for (int t = threadIdx.x; t < cq * ck; t += blockDim.x) {
            w[t % ck * taps + t / ck] = (float)own[conv.backward ? cq * ck - 1 - t : t];
        }
        __syncthreads();  // the tile and the kernel are there

        // A key column of the kernel at a time. With CQ known, the column's inputs are loaded once and serve all taps.
        for (int b = 0; b < ck; b++) {
            const float* x = s + r0 * cols + c + margin - (ck - 1) / 2 + b;
            if constexpr (CQ > 0) {
                float column[CONV_STRIP + CQ - 1];
                UNROLL
                for (int r = 0; r < CONV_STRIP + CQ - 1; r++) { column[r] = x[r * cols]; }
                UNROLL
                for (int a = 0; a < CQ; a++) {
                    float tap = load<4>(w + b * taps + a / 4 * 4).v[a % 4];
                    UNROLL
                    for (int r = 0; r < CONV_STRIP; r++) { sum[r] += tap * column[r + a]; }
                }
            } else {
                for (int a = 0; a < cq; a++) {
                    float tap = w[b * taps + a];
                    for (int r = 0; r < CONV_STRIP; r++) { sum[r] += tap * x[(r + a) * cols]; }
                }
            }
        }
    }

    // Right of the diagonal stand zeros; nothing is touched beyond the rows and columns that were asked for.
    for (int r = 0; r < CONV_STRIP; r++) {
        int i = i0 + r0 + r;
        if (i < conv.hi && j < conv.nk) { out.row(head, i)[j] = (Out)(j <= i ? sum[r] : 0.0f); }
    }
}

template <typename Out, typename In>
static void kq_conv(const TileOf<Out>* out, const TileOf<In>* inp, KqConv conv, const Attention* a, int S, Cuda* g) {
    conv.lo = max_int(conv.lo, 0), conv.hi = min_int(conv.hi, a->T), conv.begin = max_int(conv.begin, 0),
    conv.end = min_int(conv.end, a->T);
    if (conv_is_band(a)) {
        kq_conv_band(out, inp, conv, S, g);
        return;
    }
    dim3 grid(ceil_div(conv.nk, CONV_COLS), ceil_div(conv.hi - conv.lo, CONV_ROWS), S * a->NH);
    size_t shared = conv_shared(a->cq, a->ck);
    auto kernel = a->cq == 6   ? kq_conv_kernel<6, Out, In>
                  : a->cq == 2 ? kq_conv_kernel<2, Out, In>
                               : kq_conv_kernel<0, Out, In>;
    allow_shared(kernel, shared);
    LAUNCH(kernel, grid, CONV_THREADS, shared, g->stream, *out, *inp, conv);
    launchCheck(g->stream);
}
// Rows lo <= i < hi of each head; inp must hold rows lo-(cq-1) .. hi-1. weight (NH,cq,ck)
template <typename Out>
static void kq_conv_forward(const TileOf<Out>* out, const Tile* inp, const floatX* weight, const Attention* a, int S,
                            int lo, int hi, int nk, Cuda* g) {
    kq_conv(out, inp, {weight, a->cq, a->ck, a->NH, lo, hi, nk, lo - (a->cq - 1), hi, false}, a, S, g);
}
// Rows lo <= i < hi of dinp; dout must hold rows lo .. hi-1+(cq-1)
static void kq_conv_backward_input(const TileX* dinp, const TileX* dout, const floatX* weight, const Attention* a,
                                   int S, int lo, int hi, int nk, Cuda* g) {
    kq_conv(dinp, dout, {weight, a->cq, a->ck, a->NH, lo, hi, nk, lo, hi + a->cq - 1, true}, a, S, g);
}

// parts (heads, blocks of rows, cq*ck): dweight[a,b] of one head over CONV_ROWS rows and all their keys,
//   sum_{i,j} dout[i,j] inp[i-(cq-1)+a, j-r+b], rows lo <= i < hi.
// A thread has CONV_STRIP rows of one column of dout in registers and multiplies them by a column of inp that slides
// past: TAPS taps at a time (cq where it is worth a kernel of its own, else 8; 8 at most), added up over the warp, then
// in the warp's own sums, which no other warp touches.
template <int TAPS>
static __global__ void kq_conv_backward_weight_kernel(float* parts, TileX dout, Tile inp, int cq, int ck, int lo,
                                                      int hi) {
    DYNAMIC_SHARED(float, s);  // rows of inp, then (warps, ck, taps) sums
    const int taps = (cq + TAPS - 1) / TAPS * TAPS, margin = conv_margin(ck), rows = CONV_ROWS + taps - 1,
              cols = CONV_COLS + 2 * margin;
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, c = threadIdx.x % CONV_COLS,
              r0 = threadIdx.x / CONV_COLS * CONV_STRIP;
    float *sums = s + rows * cols, *own = sums + warp * ck * taps;
    int head = blockIdx.y, i0 = lo + blockIdx.x * CONV_ROWS, last = min_int(i0 + CONV_ROWS, hi) - 1;
    for (int t = threadIdx.x; t < CONV_THREADS / WARP_SIZE * ck * taps; t += CONV_THREADS) { sums[t] = 0; }
    for (int j0 = 0; j0 <= last; j0 += CONV_COLS) {
        // This thread's part of dout: it stays in registers for all taps.
        float d[CONV_STRIP];
        UNROLL
        for (int r = 0; r < CONV_STRIP; r++) {
            int i = i0 + r0 + r, j = j0 + c;
            d[r] = i < hi && j <= i ? (float)dout.row(head, i)[j] : 0.0f;
        }
        __syncthreads();  // the tile before is used up; the sums are zero
        tile_load(s, inp, head, i0 - (cq - 1), j0 - margin, rows, cols, 0, hi);
        __syncthreads();  // the new one is there

        // Every tap: products down the strip, summed over the warp's 32 columns; lane 4 a then holds tap a.
        for (int b = 0; b < ck; b++) {
            for (int a0 = 0; a0 < taps; a0 += TAPS) {
                const float* x = s + (r0 + a0) * cols + c + margin - (ck - 1) / 2 + b;
                float column[CONV_STRIP + TAPS - 1], tap[8] = {};
                UNROLL
                for (int r = 0; r < CONV_STRIP + TAPS - 1; r++) { column[r] = x[r * cols]; }
                UNROLL
                for (int a = 0; a < TAPS; a++) {
                    UNROLL
                    for (int r = 0; r < CONV_STRIP; r++) { tap[a] += d[r] * column[r + a]; }
                }
                float sum = warp_sums_of_8(tap);
                if (lane % 4 == 0 && lane / 4 < TAPS) { own[b * taps + a0 + lane / 4] += sum; }
            }
        }
    }

    // At last the warps' sums, in order.
    __syncthreads();  // all warps have their sums
    for (int t = threadIdx.x; t < cq * ck; t += CONV_THREADS) {
        float sum = 0;
        for (int w = 0; w < CONV_THREADS / WARP_SIZE; w++) { sum += sums[(w * ck + t % ck) * taps + t / ck]; }
        parts[((size_t)head * gridDim.x + blockIdx.x) * cq * ck + t] = sum;
    }
}

static size_t conv_weight_shared(int cq, int ck) {
    int taps = round_up(cq, cq == 6 || cq == 2 ? cq : 8);
    return ((size_t)(CONV_ROWS + taps - 1) * (CONV_COLS + 2 * conv_margin(ck)) +
            (size_t)CONV_THREADS / WARP_SIZE * ck * taps) *
           sizeof(float);
}
// dweight (NH,cq,ck) += over the rows lo <= i < hi of dout; sums over chunks are kept in double; parts is scratch
static void kq_conv_backward_weight(double* dweight, const TileX* dout, const Tile* inp, const Attention* a, int S,
                                    int lo, int hi, float* parts, Cuda* g) {
    if (conv_is_band(a)) {
        kq_conv_band_backward_weight(dweight, dout, inp, a, S, lo, hi, parts, g);
        return;
    }
    int blocks = ceil_div(hi - lo, CONV_ROWS);
    size_t shared = conv_weight_shared(a->cq, a->ck);
    auto kernel = a->cq == 6   ? kq_conv_backward_weight_kernel<6>
                  : a->cq == 2 ? kq_conv_backward_weight_kernel<2>
                               : kq_conv_backward_weight_kernel<8>;
    allow_shared(kernel, shared);
    LAUNCH(kernel, dim3(blocks, S * a->NH), CONV_THREADS, shared, g->stream, parts, *dout, *inp, a->cq, a->ck, lo, hi);
    launchCheck(g->stream);
    sums_add(dweight, parts, S, a->NH, blocks, a->cq * a->ck, g);
}

// ---- head_mix: out_o = sum_n W[o,n] inp_n within groups of ch heads. Where fused attention serves a layer (`mta` at
// 880m), pairs are mixed after it: pair_mix in head_output, below; groups of 16 are head_mix16 under "Fast paths"

// Block (columns, row, group): a thread owns one column of all heads of a group; it reads them all before it writes, so
// that out may be inp. CH: ch where it is worth a kernel of its own (the column in registers, the weights in shared
// memory), 0 = any (the column in the thread's own column of shared memory).
template <typename Weight, int CH, typename Out, typename In>
static __global__ void head_mix_kernel(TileOf<Out> out, TileOf<In> inp, const Weight* weight, bool transpose, int ch,
                                       int groups, int lo, int nk) {
    DYNAMIC_SHARED(float, s);  // CH: (ch,ch) weights; else (ch, blockDim.x)
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = lo + blockIdx.y, head = blockIdx.z * ch, threads = blockDim.x;
    const Weight* w = weight + (size_t)(blockIdx.z % groups) * ch * ch;
    if constexpr (CH > 0) {
        float x[CH];
        for (int t = threadIdx.x; t < CH * CH; t += threads) { s[t] = (float)w[transpose ? t % CH * CH + t / CH : t]; }
        __syncthreads();  // the weights are there
        if (j >= nk) { return; }

        // The column of all heads; zero right of the diagonal, where the tile may hold anything.
        UNROLL
        for (int n = 0; n < CH; n++) { x[n] = j <= i ? (float)inp.row(head + n, i)[j] : 0.0f; }
        UNROLL
        for (int o = 0; o < CH; o++) {
            float sum = 0;
            UNROLL
            for (int n = 0; n < CH; n++) { sum += s[o * CH + n] * x[n]; }
            out.row(head + o, i)[j] = (Out)sum;
        }
    } else if (j < nk) {
        // The thread's own column of shared memory: nobody else reads it, so no barrier is needed.
        float* own = s + threadIdx.x;
        for (int n = 0; n < ch; n++) { own[n * threads] = j <= i ? (float)inp.row(head + n, i)[j] : 0.0f; }
        for (int o = 0; o < ch; o++) {
            float sum = 0;
            for (int n = 0; n < ch; n++) { sum += (float)w[transpose ? n * ch + o : o * ch + n] * own[n * threads]; }
            out.row(head + o, i)[j] = (Out)sum;
        }
    }
}
static int mix_threads(int ch) { return ch <= 64 ? 128 : 32; }
static size_t mix_shared(int ch) { return (size_t)ch * (ch == 2 || ch == 16 ? ch : mix_threads(ch)) * sizeof(float); }
// Rows lo <= i < hi; weight (NH/ch,ch,ch), its transpose for the backward pass
template <typename Weight, typename Out, typename In>
static void head_mix_forward(const TileOf<Out>* out, const TileOf<In>* inp, const Weight* weight, bool transpose,
                             int ch, const Attention* a, int S, int lo, int hi, int nk, Cuda* g) {
    lo = max_int(lo, 0), hi = min_int(hi, a->T);
    int threads = mix_threads(ch);
    size_t shared = mix_shared(ch);
    auto kernel = ch == 2    ? head_mix_kernel<Weight, 2, Out, In>
                  : ch == 16 ? head_mix_kernel<Weight, 16, Out, In>
                             : head_mix_kernel<Weight, 0, Out, In>;
    allow_shared(kernel, shared);
    LAUNCH(kernel, dim3(ceil_div(nk, threads), hi - lo, S * a->NH / ch), threads, shared, g->stream, *out, *inp, weight,
           transpose, ch, a->NH / ch, lo, nk);
    launchCheck(g->stream);
}
template <typename Weight>
static void head_mix_backward_input(const TileX* dinp, const TileX* dout, const Weight* weight, int ch,
                                    const Attention* a, int S, int lo, int hi, int nk, Cuda* g) {
    head_mix_forward(dinp, dout, weight, true, ch, a, S, lo, hi, nk, g);
}

// parts (sequences*groups, blocks of rows, ch*ch): dweight[o,n] = sum_{i,j} dout_o[i,j] inp_n[i,j] over MIX_ROWS rows.
// A block stages `cols` columns of all heads; a thread owns a pair (o,n), or, where there are fewer pairs than threads,
// `slices` threads share one, each with every slices-th column. More pairs than threads take several walks over the
// rows (`first`). All threads meet every barrier, those without a pair too.
enum { MIX_ROWS = 8, MIX_THREADS = 256 };
// Two stages within 40 KiB; an odd number, so that the same column of all heads lies in different banks
static int mix_columns(int ch) { return max_int(1, (min_int(512, 5120 / ch) - 1) | 1); }
static __global__ void head_mix_backward_weight_kernel(float* parts, TileX dout, Tile inp, int ch, int cols, int lo,
                                                       int hi) {
    DYNAMIC_SHARED(float, d);  // (ch, cols) of dout, the same of inp, then the slices' sums
    float *x = d + ch * cols, *sums = x + ch * cols;
    const int pairs = ch * ch, threads = blockDim.x, slices = max_int(1, threads / pairs),
              step = slices > 1 ? pairs : threads;
    int head = blockIdx.y * ch, i0 = lo + blockIdx.x * MIX_ROWS, i1 = min_int(i0 + MIX_ROWS, hi);
    for (int first = 0; first < pairs; first += step) {
        // This thread's pair and slice; one without a pair helps to stage.
        int slice = slices > 1 ? threadIdx.x / pairs : 0,
            pair = first + (slices > 1 ? threadIdx.x % pairs : threadIdx.x);
        bool own = slice < slices && pair < pairs;
        const float *dp = d + (own ? pair / ch * cols : 0), *xp = x + (own ? pair % ch * cols : 0);
        float sum = 0;

        // The rows' keys up to the diagonal, `cols` at a time.
        for (int i = i0; i < i1; i++) {
            for (int j0 = 0; j0 <= i; j0 += cols) {
                __syncthreads();  // the stages before are used up
                for (int t = threadIdx.x; t < ch * cols; t += threads) {
                    int n = t / cols, j = j0 + t % cols;
                    d[t] = j <= i ? (float)dout.row(head + n, i)[j] : 0.0f;
                    x[t] = j <= i ? (float)inp.row(head + n, i)[j] : 0.0f;
                }
                __syncthreads();  // the new ones are there
                for (int c = slice; own && c < cols; c += slices) { sum += dp[c] * xp[c]; }
            }
        }

        // The slices of a pair, in order.
        __syncthreads();  // the sums of the pairs before have been read
        sums[threadIdx.x] = sum;
        __syncthreads();  // all slices have written
        if (own && slice == 0) {
            for (int q = 1; q < slices; q++) { sum += sums[q * pairs + threadIdx.x]; }
            parts[((size_t)blockIdx.y * gridDim.x + blockIdx.x) * pairs + pair] = sum;
        }
    }
}
static void head_mix_backward_weight(double* dweight, const TileX* dout, const Tile* inp, int ch, const Attention* a,
                                     int S, int lo, int hi, float* parts, Cuda* g) {
    int blocks = ceil_div(hi - lo, MIX_ROWS), cols = mix_columns(ch);
    size_t shared = ((size_t)2 * ch * cols + MIX_THREADS) * sizeof(float);
    LAUNCH(head_mix_backward_weight_kernel, dim3(blocks, S * a->NH / ch), MIX_THREADS, shared, g->stream, parts, *dout,
           *inp, ch, cols, lo, hi);
    launchCheck(g->stream);
    sums_add(dweight, parts, S, a->NH / ch, blocks, ch * ch, g);
}

// ---- softmax over keys <= query, fp32; of each row the maximum and 1 / sum are kept for the backward pass
// (a log-sum-exp in their place would cost the probabilities half their digits where it is large)

// A row's maximum and the sum of exp(x - maximum), of the values seen so far; more of them join
typedef struct {
    float max, sum;
} RowStats;
static __device__ inline void stats_join(RowStats* s, RowStats more) {
    float max = fmaxf(s->max, more.max);
    bool none = max == -INFINITY;  // of both; but a sum may be NaN, for which fmaxf takes no maximum
    s->sum = none ? s->sum + more.sum : s->sum * exponential(s->max - max) + more.sum * exponential(more.max - max);
    s->max = max;
}
// The first n values of a pack. An infinity is a logit that fp16 could not hold: times 0 it is NaN and so shows in the
// sum, where its exponential may be 0.
static __device__ inline void stats_add(RowStats* s, const float* x, int n) {
    RowStats more = {-INFINITY, 0};
    UNROLL
    for (int e = 0; e < PACK; e++) { more.max = e < n ? fmaxf(more.max, x[e]) : more.max; }
    if (more.max > s->max) { s->sum *= exponential(s->max - more.max), s->max = more.max; }
    UNROLL
    for (int e = 0; e < PACK; e++) { s->sum += e < n ? exponential(x[e] - s->max) + 0.0f * x[e] : 0.0f; }
}
static __device__ inline RowStats stats_shuffle(RowStats s, int flip) {
    RowStats other = {__shfl_xor_sync(ALL_LANES, s.max, flip), __shfl_xor_sync(ALL_LANES, s.sum, flip)};
    return other;
}

// out and inp may be the same tile. stats (heads,T,2), maximum and 1 / sum, is written for the rows from `own` on;
// recompute: read instead. A warp owns a row; a lane owns packs of PACK keys, every 32nd, in both passes, so that it
// may write over its own input.
template <typename Out>
static __global__ void softmax_forward_kernel(TileOf<Out> out, float* stats, Tile inp, bool recompute, int heads,
                                              int lo, int own, int hi, int nk, int T) {
    int row = blockIdx.x * ROW_WARPS + threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    if (row >= heads * (hi - lo)) { return; }  // whole warps leave
    int head = row / (hi - lo), i = lo + row % (hi - lo);
    const floatS* x = inp.row(head, i);
    Out* y = out.row(head, i);
    float* kept = stats + 2 * ((size_t)head * T + i);

    // First pass: maximum and sum of the row, each lane of its own keys, then joined over the warp. Every lane ends
    // with the same.
    RowStats s = {-INFINITY, 0};
    if (!recompute) {
        for (int j = lane * PACK; j <= i; j += WARP_SIZE * PACK) {
            Pack<floatS, PACK> p = load<PACK>(x + j);
            float v[PACK];
            for (int e = 0; e < PACK; e++) { v[e] = (float)p.v[e]; }
            stats_add(&s, v, i + 1 - j);
        }
        for (int o = WARP_SIZE / 2; o > 0; o /= 2) { stats_join(&s, stats_shuffle(s, o)); }
    }

    // Second pass: the probabilities; zeros right of the diagonal up to nk, which the next step reads.
    float max = recompute ? kept[0] : s.max, inverse = recompute ? kept[1] : 1.0f / s.sum;
    for (int j = lane * PACK; j < nk; j += WARP_SIZE * PACK) {
        Pack<Out, PACK> p = {};
        if (j <= i) {
            Pack<floatS, PACK> v = load<PACK>(x + j);
            for (int e = 0; e < PACK; e++) {
                p.v[e] = (Out)(j + e <= i ? exponential((float)v.v[e] - max) * inverse : 0.0f);
            }
        }
        store<PACK>(y + j, p);
    }
    if (lane == 0 && !recompute && i >= own) { kept[0] = max, kept[1] = inverse; }
}
template <typename Out>
static void softmax_forward(const TileOf<Out>* out, const Tile* inp, float* stats, const Attention* a, int S, int lo,
                            int own, int hi, int nk, Cuda* g) {
    lo = max_int(lo, 0), hi = min_int(hi, a->T);
    LAUNCH(softmax_forward_kernel<Out>, ceil_div((size_t)S * a->NH * (hi - lo), ROW_WARPS), ROW_THREADS, 0, g->stream,
           *out, stats, *inp, false, S * a->NH, lo, own, hi, nk, a->T);
    launchCheck(g->stream);
}

// The same rows in the backward pass, from maximum and 1 / sum.
template <typename Out>
static void softmax_recompute(const TileOf<Out>* out, const Tile* inp, float* stats, const Attention* a, int S, int lo,
                              int hi, int nk, Cuda* g) {
    lo = max_int(lo, 0), hi = min_int(hi, a->T);
    LAUNCH(softmax_forward_kernel<Out>, ceil_div((size_t)S * a->NH * (hi - lo), ROW_WARPS), ROW_THREADS, 0, g->stream,
           *out, stats, *inp, true, S * a->NH, lo, hi, hi, nk, a->T);
    launchCheck(g->stream);
}

// dinp = att (dout - sum_j att dout), att = softmax(inp) from its stats; dinp may be dout. A warp owns a row.
static __global__ void softmax_backward_kernel(TileX dinp, TileX dout, Tile inp, const float* stats, int heads, int lo,
                                               int hi, int nk, int T) {
    int row = blockIdx.x * ROW_WARPS + threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    if (row >= heads * (hi - lo)) { return; }
    int head = row / (hi - lo), i = lo + row % (hi - lo);

    // The row of logits, its gradient in and out, and what the forward pass kept of it.
    const floatS* x = inp.row(head, i);
    const floatX* dy = dout.row(head, i);
    floatX* dx = dinp.row(head, i);
    float max = stats[2 * ((size_t)head * T + i)], inverse = stats[2 * ((size_t)head * T + i) + 1], dot = 0;

    // First pass: the dot product. Second: with it, the gradient, which takes the place of what this lane alone reads.
    for (int pass = 0; pass < 2; pass++) {
        for (int j = lane * PACK; j < (pass ? nk : i + 1); j += WARP_SIZE * PACK) {
            Pack<floatX, PACK> d = {};
            if (j <= i) {
                Pack<floatS, PACK> v = load<PACK>(x + j);
                d = load<PACK>(dy + j);
                for (int e = 0; e < PACK; e++) {
                    float p = j + e <= i ? exponential((float)v.v[e] - max) * inverse : 0.0f,
                          de = j + e <= i ? (float)d.v[e] : 0.0f;
                    if (pass == 0) { dot += p * de; }
                    d.v[e] = (floatX)(p * (de - dot));
                }
            }
            if (pass) { store<PACK>(dx + j, d); }
        }
        if (pass == 0) { dot = warp_sum(dot); }
    }
}
static void softmax_backward(const TileX* dinp, const TileX* dout, const Tile* inp, const float* stats,
                             const Attention* a, int S, int lo, int hi, int nk, Cuda* g) {
    lo = max_int(lo, 0), hi = min_int(hi, a->T);
    LAUNCH(softmax_backward_kernel, ceil_div((size_t)S * a->NH * (hi - lo), ROW_WARPS), ROW_THREADS, 0, g->stream,
           *dinp, *dout, *inp, stats, S * a->NH, lo, hi, nk, a->T);
    launchCheck(g->stream);
}

// ---- values: O_i = sum_j att[i,j] v_j

static void values_forward(floatX* out, const TileX* att, const floatX* v, const Attention* a, int S, int lo, int hi,
                           Cuda* g) {
    gemm(heads_matrix(out, lo, a), tile_matrix(att, lo), heads_matrix(v, 0, a),
         {false, false, hi - lo, a->HS, hi, 1, 0, S * a->NH}, g);
}
// datt[i,j] = dO_i . v_j, rows lo <= i < hi within the sequence; not masked, its readers are
static void values_backward_att(const TileX* datt, const floatX* dout, const floatX* v, const Attention* a, int S,
                                int lo, int hi, int nk, Cuda* g) {
    hi = min_int(hi, a->T);
    gemm(tile_matrix(datt, lo), heads_matrix(dout, lo, a), heads_matrix(v, 0, a),
         {false, true, hi - lo, nk, a->HS, 1, 0, S * a->NH}, g);
}
// dv_j += sum_i att[i,j] dO_i, in fp32
static void values_backward_v(float* dv, const TileX* att, const floatX* dout, const Attention* a, int S, int lo,
                              int hi, Cuda* g) {
    gemm(heads_matrix(dv, 0, a), tile_matrix(att, lo), heads_matrix(dout, lo, a),
         {true, false, hi, a->HS, hi - lo, 1, 1, S * a->NH}, g);
}

// ---- the chunk: all steps for the queries lo <= i < hi of all heads of S sequences

// q, k, v (S,NH,T,HS) of S sequences; q_s, k_s: q and k as scores_forward reads them; stats (S,NH,T,2)
struct Heads {
    const floatX *q, *k, *v;
    const floatS *q_s, *k_s;
    float* stats;
};

static int halo_pre(const Attention* a) { return a->conv_pre ? a->cq - 1 : 0; }
static int halo_post(const Attention* a) { return a->conv_post ? a->cq - 1 : 0; }
static bool mixes_post(const Attention* a) { return a->mix_post || a->diff_mix; }
// Parts of a head's output, which head_output adds up, and of dv.
static int mix_parts(const Attention* a) { return a->flash && a->pair_mix ? 2 : 1; }
// Is the softmax's result not yet A?
static bool keeps_att(const Attention* a) { return a->conv_post || mixes_post(a); }

// Scratch of attention, shared by all layers. Tiles in floatS: S C L P R of the maps; in floatX: A, and two that
// gradients pass through in turns.
enum { ATTENTION_TILES_X = 3 };
struct AttentionScratch {
    floatS* tiles;    // (attention_tiles, tile)
    floatX* tiles_x;  // (ATTENTION_TILES_X, tile)
    floatS *q, *k;    // (S,NH,T,HS) where floatX is not floatS
    float* dq;        // (S,NH,T,HS), for the fused kernels its splits
    void *dk, *dv;    // the same, dv in parts for the fused kernels: floatX of those and of cuDNN, fp32 of the chunks
    float* parts;     // partial sums of the weight gradients
    float* dots;      // what the fused kernels need: FlashScratch
    unsigned* bounds;
    floatX *wide, *dz;  // what cuDNN needs: (4,S,NH,T,2*HS) rows of both values of a pair side by side; FlashScratch;
    void* cudnn;        // its workspace
};

static int attention_tiles(const Attention* a) {
    if (mixes_16(a)) { return 1 + (a->conv_pre != NULL) + 2 * (a->conv_post != NULL); }
    return 1 + (a->conv_pre != NULL) + (a->mix_pre != NULL) + keeps_att(a) + (a->conv_post != NULL);
}
static size_t attention_tile_size(const Attention* a) {
    return (size_t)a->S * a->NH * (size_t)(a->chunk + 2 * (halo_pre(a) + halo_post(a))) * (size_t)tile_stride(a->T);
}
static size_t attention_parts_size(const Attention* a) {
    size_t conv = (size_t)a->NH * a->cq * a->ck * (size_t)ceil_div(a->chunk + a->cq, CONV_ROWS);
    size_t mix = (size_t)a->NH * (size_t)max_int(a->ch_pre, a->ch_post) * (size_t)ceil_div(a->chunk, MIX_ROWS);
    if (mixes_16(a)) { mix = mix16_parts_size(a); }
    return (size_t)a->S * (conv > mix ? conv : mix);
}
// Queries of a chunk: enough that products are large; 16 heads x 256 x 2048 x 2 bytes, a tile of one sequence, are 17
// MB of an L2 cache of 50.
static int attention_chunk(int T) { return min_int(T, 256); }
// Sequences at a time: as many as let the tiles fit into a GiB, so that few launches do much (the emulator's builds set
// less, so that the tests have several batches of sequences); heads are a grid's z, at most 65535.
#if !defined(ATTENTION_SCRATCH)
#define ATTENTION_SCRATCH ((size_t)1 << 30)
#endif
static int attention_sequences(const Attention* one, int B) {
    size_t bytes =
        attention_tile_size(one) * ((size_t)attention_tiles(one) * sizeof(floatS) + ATTENTION_TILES_X * sizeof(floatX));
    return max_int(1, min_int(min_int(B, 65535 / one->NH), (int)((size_t)ATTENTION_SCRATCH / bytes)));
}

template <typename T> static TileOf<T> tile_make(T* scratch, int which, const Attention* a, int i0) {
    TileOf<T> t = {scratch + (size_t)which * attention_tile_size(a), i0, a->chunk + 2 * (halo_pre(a) + halo_post(a)),
                   tile_stride(a->T)};
    return t;
}

// The maps of the chunk: S scores, C convolved, L mixed, P softmax, R convolved, A mixed. A step that is off shares its
// input's tile; A, which the products read, is in floatX, and the last step writes it. For the forward pass rows
// lo-halo_post .. hi-1 of P; with `backward` S, C, L, P have halo_pre rows more below hi.
struct Maps {
    Tile S, C, L, P, R;
    TileX A;
};

static Maps attention_maps(const AttentionScratch* scratch, const Heads* x, const Attention* a, int S, int lo, int hi,
                           bool backward, Cuda* g) {
    int p = halo_pre(a), r = halo_post(a), end = hi + (backward ? p : 0), nk = min_int(end, a->T), tiles = 0;
    Maps m;

    // Scores, then the convolution before the softmax. Rows above lo are the halo that the convolutions of this chunk
    // reach up to.
    m.A = tile_make(scratch->tiles_x, 0, a, lo - r - p);
    m.S = m.C = tile_make(scratch->tiles, tiles++, a, lo - r - p);
    scores_forward(&m.S, x->q_s, x->k_s, a, S, lo - r - p, end, nk, g);
    if (a->conv_pre) {
        m.C = tile_make(scratch->tiles, tiles++, a, lo - r - p);
        kq_conv_forward(&m.C, &m.S, a->conv_pre, a, S, lo - r, end, nk, g);
    }
    if (mixes_16(a)) {
        if (a->conv_post) {
            m.P = tile_make(scratch->tiles, tiles++, a, lo - r - p);
            m.R = tile_make(scratch->tiles, tiles++, a, lo - r - p);
        }
        mix16_maps(&m, x->stats, a, {S, lo, hi}, backward, g);
        return m;
    }

    // Mixing before the softmax.
    m.L = m.C;
    if (a->mix_pre) {
        m.L = tile_make(scratch->tiles, tiles++, a, lo - r - p);
        head_mix_forward(&m.L, &m.C, a->mix_pre, false, a->ch_pre, a, S, lo - r, end, nk, g);
    }

    // The softmax: the last step, straight into A, or followed by a convolution, a mixing or both.
    if (!keeps_att(a)) {
        if (backward) {
            softmax_recompute(&m.A, &m.L, x->stats, a, S, lo, end, nk, g);
        } else {
            softmax_forward(&m.A, &m.L, x->stats, a, S, lo, lo, end, nk, g);
        }
        return m;
    }
    m.P = m.R = tile_make(scratch->tiles, tiles++, a, lo - r - p);
    if (backward) {
        softmax_recompute(&m.P, &m.L, x->stats, a, S, lo - r, end, nk, g);
    } else {
        softmax_forward(&m.P, &m.L, x->stats, a, S, lo - r, lo, end, nk, g);
    }

    // Then the convolution, and the mixing, whichever comes last into A.
    if (a->conv_post && mixes_post(a)) {
        m.R = tile_make(scratch->tiles, tiles++, a, lo - r - p);
        kq_conv_forward(&m.R, &m.P, a->conv_post, a, S, lo, hi, nk, g);
    } else if (a->conv_post) {
        kq_conv_forward(&m.A, &m.P, a->conv_post, a, S, lo, hi, nk, g);
    }
    if (a->diff_mix) {
        head_mix_forward(&m.A, &m.R, a->diff_mix, false, 2, a, S, lo, hi, nk, g);
    } else if (a->mix_post) {
        head_mix_forward(&m.A, &m.R, a->mix_post, false, a->ch_post, a, S, lo, hi, nk, g);
    }
    return m;
}

// Gradients of the attention's own weights as sums in double of all sequences: (NH*cq*ck), (NH*ch); n: how many, behind
// one another.
struct AttentionSums {
    double *conv_pre, *conv_post, *mix_pre, *mix_post;
    size_t n;
};

// dq of the scratch is set, its dk, dv and the sums are added to. dout (S,NH,T,HS).
// Rows of dS come from rows of dC up to halo_pre further down, those from rows of dA up to halo_post further down: all
// are recomputed here.
static void attention_chunk_backward(const AttentionSums* sums, const floatX* dout, const Heads* x, const Attention* a,
                                     int S, int lo, int hi, const AttentionScratch* scratch, Cuda* g) {
    int p = halo_pre(a), r = halo_post(a), end = hi + p, far = hi + p + r, nk = min_int(end, a->T),
        nk_far = min_int(far, a->T);
    Maps m = attention_maps(scratch, x, a, S, lo, hi, true, g);
    TileX d = tile_make(scratch->tiles_x, 1, a, lo),
          other = tile_make(scratch->tiles_x, 2, a, lo);  // a convolution goes from one to the other

    values_backward_att(&d, dout, x->v, a, S, lo, far, nk_far, g);  // O = A v
    if (mixes_16(a)) {                                              // from A to C, and A itself
        mix16_maps_backward(&d, &other, sums, &m, x->stats, a, {S, lo, hi}, scratch->parts, g);
    } else {
        if (mixes_post(a)) {  // A = mix(R)
            head_mix_backward_weight(sums->mix_post, &d, &m.R, a->ch_post, a, S, lo, hi, scratch->parts, g);
            if (a->diff_mix) {
                head_mix_backward_input(&d, &d, a->diff_mix, 2, a, S, lo, far, nk_far, g);
            } else {
                head_mix_backward_input(&d, &d, a->mix_post, a->ch_post, a, S, lo, far, nk_far, g);
            }
        }
        if (a->conv_post) {  // R = conv(P)
            kq_conv_backward_weight(sums->conv_post, &d, &m.P, a, S, lo, hi, scratch->parts, g);
            kq_conv_backward_input(&other, &d, a->conv_post, a, S, lo, end, nk, g);
            std::swap(d, other);
        }
        softmax_backward(&d, &d, &m.L, x->stats, a, S, lo, end, nk, g);  // P = softmax(L)
        if (a->mix_pre) {                                                // L = mix(C)
            head_mix_backward_weight(sums->mix_pre, &d, &m.C, a->ch_pre, a, S, lo, hi, scratch->parts, g);
            head_mix_backward_input(&d, &d, a->mix_pre, a->ch_pre, a, S, lo, end, nk, g);
        }
    }
    values_backward_v((float*)scratch->dv, &m.A, dout, a, S, lo, hi, g);  // O = A v, now that A is there in every case
    if (a->conv_pre) {                                                    // C = conv(S)
        kq_conv_backward_weight(sums->conv_pre, &d, &m.S, a, S, lo, hi, scratch->parts, g);
        kq_conv_backward_input(&other, &d, a->conv_pre, a, S, lo, hi, hi, g);
        std::swap(d, other);
    }
    scores_backward(scratch->dq, (float*)scratch->dk, &d, x->q, x->k, a, S, lo, hi, g);  // S = q k^T / sqrt(HS)
}

// Of the sequences b .. b+S-1 of q, k, v (B,NH,T,HS) and stats (B,NH,T,2)
static Heads attention_heads(const floatX* q, const floatX* k, const floatX* v, float* stats, const Attention* a, int b,
                             int S, const AttentionScratch* scratch, Cuda* g) {
    size_t rows = (size_t)b * a->NH * a->T, at = rows * a->HS;
    Heads x = {q + at, k + at, v + at, NULL, NULL, stats + 2 * rows};
    if (!a->flash) { x.q_s = scores_input(scratch->q, x.q, a, S, g), x.k_s = scores_input(scratch->k, x.k, a, S, g); }
    return x;
}

// out: with a->flash and mixing two parts of (B,NH,T,HS), B*NH*T*HS apart, that head_output is to mix; else
// (B,NH,T,HS). q, k, v (B,NH,T,HS), q and k rotated; stats (B,NH,T,2) for the backward pass
static void attention_forward(floatX* out, float* stats, const floatX* q, const floatX* k, const floatX* v,
                              const Attention* a, const AttentionScratch* scratch, Cuda* g) {
    if (a->flash && !a->cudnn) {
        flash_attention_forward(out, stats, q, k, v, a, g);
        return;
    }
    for (int b = 0; b < a->B; b += a->S) {
        int S = min_int(a->S, a->B - b);
        Heads x = attention_heads(q, k, v, stats, a, b, S, scratch, g);
        if (a->cudnn) {
            cudnn_attention_forward(out + (size_t)b * a->NH * a->T * a->HS, &x, a, S, scratch, g);
            continue;
        }
        for (int lo = 0; lo < a->T; lo += a->chunk) {
            int hi = min_int(lo + a->chunk, a->T);
            Maps m = attention_maps(scratch, &x, a, S, lo, hi, false, g);
            values_forward(out + (size_t)b * a->NH * a->T * a->HS, &m.A, x.v, a, S, lo, hi, g);
        }
    }
}

// dqkv (B,T,NH+2*NKV,HS) is set, gradients of q and k rotated back; the sums are set. dout (B,NH,T,HS); out as
// attention_forward left it.
static void attention_backward(floatX* dqkv, const AttentionSums* sums, const floatX* dout, const floatX* out,
                               const floatX* q, const floatX* k, const floatX* v, float* stats, const Rope* rope,
                               const Attention* a, const AttentionScratch* scratch, Cuda* g) {
    size_t sequence = (size_t)a->NH * a->T * a->HS, packed = (size_t)a->T * (a->NH + 2 * rope->NKV) * a->HS;
    if (sums->n) { cudaCheck(cudaMemsetAsync(sums->conv_pre, 0, sums->n * sizeof(double), g->stream)); }
    for (int b = 0; b < a->B; b += a->S) {
        int S = min_int(a->S, a->B - b);
        Heads x = attention_heads(q, k, v, stats, a, b, S, scratch, g);
        const floatX *dk = (const floatX*)scratch->dk, *dv = (const floatX*)scratch->dv;
        if (a->cudnn) {
            cudnn_attention_backward(sums, dout + b * sequence, out + b * sequence, &x, a, S, scratch, g);
            rope_backward(dqkv + b * packed, (const floatX*)scratch->dq, dk, dv, rope, S, 1, 1, mix_parts(a), g);
        } else if (a->flash) {
            flash_attention_backward(sums, dout + b * sequence, out + b * sequence, &x, a, S, scratch, g);
            rope_backward(dqkv + b * packed, scratch->dq, dk, dv, rope, S, flash_splits(S, a->NH, a->T), FLASH_KEYS,
                          mix_parts(a), g);
        } else {
            cudaCheck(cudaMemsetAsync(scratch->dk, 0, S * sequence * sizeof(float), g->stream));
            cudaCheck(cudaMemsetAsync(scratch->dv, 0, S * sequence * sizeof(float), g->stream));
            for (int lo = 0; lo < a->T; lo += a->chunk) {
                attention_chunk_backward(sums, dout + b * sequence, &x, a, S, lo, min_int(lo + a->chunk, a->T), scratch,
                                         g);
            }
            rope_backward(dqkv + b * packed, scratch->dq, (const float*)scratch->dk, (const float*)scratch->dv, rope, S,
                          1, 1, 1, g);
        }
    }
}

// dweight (n) += sums (n)
static __global__ void attention_sums_add_kernel(float* dweight, const double* sums, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { dweight[i] += (float)sums[i]; }
}
static void attention_sums_add(float* dweight, const double* sums, size_t n, Cuda* g) {
    LAUNCH(attention_sums_add_kernel, ceil_div(n, 128), 128, 0, g->stream, dweight, sums, n);
    launchCheck(g->stream);
}

// ---- head_gate with head_norm (MODEL.md eq. 11 and 10) and head_mix of pairs, one pass: outputs of heads become rows

// What the pass needs: wide heads share a norm (2 for diff); norm (wide*HS), gate (HS), bias (1), NULL = off; scale is
// 1 - lambda_init
typedef struct {
    const floatX *norm, *gate, *bias;
    float scale;
    int B, T, NH, HS, wide;
    const float* pair_mix;  // (NH/2,2,2), NULL = off: the heads' outputs come in two parts (fused attention), O_o =
                            // sum_n W[o,n] part_n (MODEL.md eq. 8)
} HeadOutput;

// 16 lanes have a token of a unit (`wide` heads side by side), a lane packs of W elements, every 16th. A block walks
// over tokens of unit blockIdx.y of sequence blockIdx.z, so that what a lane needs of a pack for every token is found
// once: there is no division in the walk. PACKS: packs of a lane, kept in registers; 0: any number, and a pack is read
// again from the cache whenever it is needed.
enum { HEAD_LANES = 16 };
template <int W> struct HeadPack {
    int e;                        // first element of the unit
    bool there;                   // false: beyond the unit, and all below is zero
    size_t at;                    // where it lies in (B,NH,T,HS) for token 0
    float mix[2];                 // of the two parts
    Pack<float, W> norm;          // norm times scale; 1 where the norm is off
    Pack<floatX, W> gate;         // 0 where it is off
    Pack<float, W> x;             // of a token: the head's output, mixed
    Pack<floatX, W> dy;           // of a token: gradient of what comes out
    Pack<float, W> dnorm, dgate;  // sums over the lane's tokens: of norm, divided by scale, and of gate
};
template <int W> static __device__ inline HeadPack<W> head_pack(const HeadOutput& o, int k) {
    HeadPack<W> p = {};
    p.e = (k * HEAD_LANES + (int)threadIdx.x % HEAD_LANES) * W, p.there = p.e < o.wide * o.HS;
    if (!p.there) { return p; }
    int head = (int)blockIdx.y * o.wide + p.e / o.HS;
    p.at = ((size_t)blockIdx.z * o.NH + head) * o.T * o.HS + p.e % o.HS;
    if (o.pair_mix) { p.mix[0] = o.pair_mix[2 * head], p.mix[1] = o.pair_mix[2 * head + 1]; }
    if (o.gate) { p.gate = load<W>(o.gate + p.e); }  // wide is 1 here: diff has no gate
    Pack<floatX, W> norm = {};
    if (o.norm) { norm = load<W>(o.norm + p.e); }
    for (int i = 0; i < W; i++) { p.norm.v[i] = o.norm ? o.scale * (float)norm.v[i] : 1.0f; }
    return p;
}
// Where a pack of token t lies in a row of channels (B,T,NH*HS)
template <int W> static __device__ inline size_t head_channel(const HeadOutput& o, const HeadPack<W>& p, int t) {
    return ((size_t)blockIdx.z * o.T + t) * o.NH * o.HS + (size_t)blockIdx.y * o.wide * o.HS + p.e;
}
// x and, unless dout is NULL, dy of token t; zeros beyond the last one
template <int W>
static __device__ inline void head_read(HeadPack<W>* p, const floatX* inp, const floatX* dout, const HeadOutput& o,
                                        int t) {
    Pack<floatX, W> x = {}, second = {};
    p->dy = {};
    if (p->there && t < o.T) {
        const floatX* from = inp + p->at + (size_t)t * o.HS;
        x = load<W>(from);
        if (o.pair_mix) { second = load<W>(from + (size_t)o.B * o.NH * o.T * o.HS); }
        if (dout) { p->dy = load<W>(dout + head_channel(o, *p, t)); }
    }
    for (int i = 0; i < W; i++) {
        p->x.v[i] = o.pair_mix ? p->mix[0] * (float)x.v[i] + p->mix[1] * (float)second.v[i] : (float)x.v[i];
    }
}
// Calls use(pack) for all packs of a lane's token: those in registers, or each read for the occasion by read(&pack).
template <int W, int PACKS, typename Read, typename Use>
static __device__ inline void head_packs(HeadPack<W>* packs, const HeadOutput& o, Read read, Use use) {
    if constexpr (PACKS > 0) {
        UNROLL
        for (int k = 0; k < PACKS; k++) { use(packs[k]); }
    } else {
        for (int k = 0; (*packs = head_pack<W>(o, k)).there; k++) { read(packs), use(*packs); }
    }
}
static __device__ inline float head_sum(float x) {  // over the 16 lanes of a token
    for (int flip = HEAD_LANES / 2; flip > 0; flip /= 2) { x += __shfl_xor_sync(ALL_LANES, x, flip); }
    return x;
}

// out (B,T,NH*HS) = gate(norm(inp)), inp (B,NH,T,HS), or two parts of it. Bytes of 880m `mta`, a token and layer: 6 KB
// of parts read, 3 KB written. Whole warps stay to the end of the walk, since sums go over all lanes.
template <int W, int PACKS>
static __global__ void head_output_forward_kernel(floatX* out, const floatX* inp, HeadOutput o) {
    const int rows = blockDim.x / HEAD_LANES, own = threadIdx.x / HEAD_LANES;
    HeadPack<W> packs[PACKS ? PACKS : 1];
    UNROLL
    for (int k = 0; k < PACKS; k++) { packs[k] = head_pack<W>(o, k); }
    for (int t0 = blockIdx.x * rows; t0 < o.T; t0 += gridDim.x * rows) {
        const int t = t0 + own;
        auto read = [&](HeadPack<W>* p) { head_read(p, inp, NULL, o, t); };
        UNROLL
        for (int k = 0; k < PACKS; k++) { read(&packs[k]); }

        // The sums that norm and gate need, in one pass: y = r norm x, so that y . gate = r sum(norm x gate).
        float squares = 0, dot = 0, r = 1, s = 1;
        head_packs<W, PACKS>(packs, o, read, [&](HeadPack<W>& p) {
            for (int i = 0; i < W; i++) { squares += p.x.v[i] * p.x.v[i]; }
            for (int i = 0; o.gate && i < W; i++) { dot += p.x.v[i] * p.norm.v[i] * (float)p.gate.v[i]; }
        });
        if (o.norm) { r = inverse_root(head_sum(squares) / (o.wide * o.HS) + 1e-5f); }
        if (o.gate) { s = sigmoid(r * head_sum(dot) + (float)*o.bias); }

        // Both applied, into the token's row of channels.
        head_packs<W, PACKS>(packs, o, read, [&](HeadPack<W>& p) {
            Pack<floatX, W> y;
            for (int i = 0; i < W; i++) { y.v[i] = (floatX)(p.x.v[i] * p.norm.v[i] * (r * s)); }
            if (p.there && t < o.T) { store<W>(out + head_channel(o, p, t), y); }
        });
    }
}

// Blocks of a unit of a sequence, so that a launch has HEAD_BLOCKS: the shape alone decides, so that sums are the same
// on every GPU (the emulator's builds set less, so that the tests have blocks that walk over several tokens).
#if !defined(HEAD_BLOCKS)
#define HEAD_BLOCKS 2048
#endif
// Floats that the sums of a token's lanes, and a part of the weights' gradients, have: of norm, gate and bias
static int head_width(int wide, int HS) { return wide * HS + HS + 1; }
// Tokens that a block has side by side: as many as have their sums within the default of shared memory, two at least.
static int head_tokens(int wide, int HS) {
    return (size_t)ROW_THREADS / HEAD_LANES * head_width(wide, HS) * sizeof(float) <= (48 << 10)
               ? ROW_THREADS / HEAD_LANES
               : WARP_SIZE / HEAD_LANES;
}
static size_t head_shared(int wide, int HS) {
    return (size_t)head_tokens(wide, HS) * head_width(wide, HS) * sizeof(float);
}
static dim3 head_grid(const HeadOutput* o) {
    int units = o->NH / o->wide, most = max_int(1, HEAD_BLOCKS / (units * o->B));
    return dim3(min_int(most, ceil_div(o->T, head_tokens(o->wide, o->HS))), units, o->B);
}
// Parts of the weights' gradients of B sequences at most, with any shorter or smaller micro-batch
static size_t head_parts(int units, int B) { return std::max<size_t>(HEAD_BLOCKS, (size_t)units * B); }

// Calls launch(W, PACKS) with the constants that serve: packs in registers where they are one or two a lane.
template <typename Launch> static void head_pick(const HeadOutput* o, Launch launch) {
    int packs = o->HS % WIDE ? 0 : ceil_div(o->wide * o->HS, HEAD_LANES * WIDE);
    if (packs == 1) {
        launch(std::integral_constant<int, WIDE>(), std::integral_constant<int, 1>());
    } else if (packs == 2) {
        launch(std::integral_constant<int, WIDE>(), std::integral_constant<int, 2>());
    } else {
        launch(std::integral_constant<int, 1>(), std::integral_constant<int, 0>());
    }
}
static void head_output_forward(floatX* out, const floatX* inp, const HeadOutput* o, Cuda* g) {
    head_pick(o, [&](auto W, auto packs) {
        auto head_forward = head_output_forward_kernel<W(), packs()>;
        LAUNCH(head_forward, head_grid(o), head_tokens(o->wide, o->HS) * HEAD_LANES, 0, g->stream, out, inp, *o);
        launchCheck(g->stream);
    });
}

// The lane's sums of a pack into those of its tokens: norm (wide*HS), gate (HS), bias (1)
template <int W> static __device__ inline void head_sums_put(float* sums, const HeadPack<W>& p, const HeadOutput& o) {
    for (int i = 0; p.there && i < W; i++) {
        sums[p.e + i] += o.scale * p.dnorm.v[i];
        if (o.gate) { sums[o.wide * o.HS + p.e + i] += p.dgate.v[i]; }
    }
}

// With x the head's output, r = 1/rms, y = r norm x, s = sigmoid(y . gate + bias), out = s y:
//   ds = s (1-s) (dy . y),  g = s dy + ds gate,  dnorm += g r x,  dgate += ds y,  dbias += ds,
//   dx = r (norm g - r x mean),  mean = sum(norm g r x) / size.
// parts (blocks, head_width): a block's sums of the weights' gradients, lane by lane in registers, then its tokens in
// order. Bytes of 880m `mta`, a token and layer: 6 KB of parts and 3 KB of dout read, 3 KB written.
template <int W, int PACKS>
static __global__ void __launch_bounds__(ROW_THREADS, PACKS == 2 ? 2 : 3)
    head_output_backward_kernel(floatX* dinp, float* parts, const floatX* dout, const floatX* inp, HeadOutput o) {
    DYNAMIC_SHARED(float, sums);  // (rows, width)
    const int rows = blockDim.x / HEAD_LANES, own = threadIdx.x / HEAD_LANES, size = o.wide * o.HS,
              width = size + o.HS + 1;
    float *own_sums = sums + own * width, bias = 0;
    for (int i = threadIdx.x; i < rows * width; i += blockDim.x) { sums[i] = 0; }
    __syncthreads();  // all are zero
    HeadPack<W> packs[PACKS ? PACKS : 1];
    UNROLL
    for (int k = 0; k < PACKS; k++) { packs[k] = head_pack<W>(o, k); }
    for (int t0 = blockIdx.x * rows; t0 < o.T; t0 += gridDim.x * rows) {
        const int t = t0 + own;
        auto read = [&](HeadPack<W>* p) { head_read(p, inp, dout, o, t); };
        UNROLL
        for (int k = 0; k < PACKS; k++) { read(&packs[k]); }

        // All sums of the row in one pass: dy . y, y . gate and the mean follow from sums without r, s and ds.
        float squares = 0, through = 0, gate = 0, r = 1, s = 1, ds = 0, mean = 0;
        head_packs<W, PACKS>(packs, o, read, [&](HeadPack<W>& p) {
            for (int i = 0; i < W; i++) {
                squares += p.x.v[i] * p.x.v[i], through += p.x.v[i] * p.norm.v[i] * (float)p.dy.v[i];
            }
            for (int i = 0; o.gate && i < W; i++) { gate += p.x.v[i] * p.norm.v[i] * (float)p.gate.v[i]; }
        });
        through = head_sum(through);
        if (o.norm) { r = inverse_root(head_sum(squares) / size + 1e-5f); }
        if (o.gate) {
            gate = head_sum(gate);
            s = sigmoid(r * gate + (float)*o.bias), ds = s * (1 - s) * r * through;
        }
        if (o.norm) { mean = r * (s * through + ds * gate) / size; }
        bias += t < o.T ? ds : 0.0f;

        // The gradients of the head's output and of the weights.
        head_packs<W, PACKS>(packs, o, read, [&](HeadPack<W>& p) {
            Pack<floatX, W> dx;
            for (int i = 0; i < W; i++) {
                float x = r * p.x.v[i], d = s * (float)p.dy.v[i];
                if (o.gate) { d += ds * (float)p.gate.v[i], p.dgate.v[i] += ds * x * p.norm.v[i]; }
                p.dnorm.v[i] += d * x;
                dx.v[i] = (floatX)(r * (p.norm.v[i] * d - x * mean));
            }
            if (p.there && t < o.T) { store<W>(dinp + p.at + (size_t)t * o.HS, dx); }
            if (PACKS == 0) { head_sums_put(own_sums, p, o); }
        });
    }

    // The tokens that the block had side by side, in order.
    UNROLL
    for (int k = 0; k < PACKS; k++) { head_sums_put(own_sums, packs[k], o); }
    if (threadIdx.x % HEAD_LANES == 0) { own_sums[width - 1] = bias; }
    __syncthreads();  // all sums are there
    float* part = parts + (((size_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0;
        for (int row = 0; row < rows; row++) { sum += sums[row * width + i]; }
        part[i] = sum;
    }
}
// dinp (B,NH,T,HS) is set; dnorm, dgate, dbias are added to; parts (head_parts, head_width) is scratch
static void head_output_backward(floatX* dinp, float* dnorm, float* dgate, float* dbias, const floatX* dout,
                                 const floatX* inp, const HeadOutput* o, float* parts, Cuda* g) {
    int size = o->wide * o->HS, width = head_width(o->wide, o->HS);
    size_t shared = head_shared(o->wide, o->HS);
    dim3 grid = head_grid(o);
    head_pick(o, [&](auto W, auto packs) {
        auto head_backward = head_output_backward_kernel<W(), packs()>;
        allow_shared(head_backward, shared);
        LAUNCH(head_backward, grid, head_tokens(o->wide, o->HS) * HEAD_LANES, shared, g->stream, dinp, parts, dout, inp,
               *o);
        launchCheck(g->stream);
    });
    int n = (int)(grid.x * grid.y * grid.z);
    if (o->norm) { parts_add(dnorm, parts, n, size, width, g); }
    if (o->gate) {
        parts_add(dgate, parts + size, n, o->HS, width, g);
        parts_add(dbias, parts + size + o->HS, n, 1, width, g);
    }
}

// ---- diff (MODEL.md eq. 12): P_2p - lambda P_2p+1 on both heads' values is a mixing after softmax with W =
// [[1,-lambda],[1,-lambda]]

typedef struct {
    const floatX *q1, *k1, *q2, *k2;
} Lambda;  // (HS) each

static __device__ inline float lambda_dot(const floatX* a, const floatX* b, int HS) {  // by one warp
    float sum = 0;
    for (int i = threadIdx.x; i < HS; i += WARP_SIZE) { sum += (float)a[i] * (float)b[i]; }
    return warp_sum(sum);
}
// mix (NH/2,2,2), lambda = exp(q1 . k1) - exp(q2 . k2) + lambda_init; one warp
static __global__ void diff_lambda_forward_kernel(float* mix, Lambda w, float lambda_init, int NH, int HS) {
    float lambda = expf(lambda_dot(w.q1, w.k1, HS)) - expf(lambda_dot(w.q2, w.k2, HS)) + lambda_init;
    for (int i = threadIdx.x; i < NH * 2; i += WARP_SIZE) { mix[i] = i % 2 ? -lambda : 1.0f; }
}
static void diff_lambda_forward(float* mix, const Lambda* w, double lambda_init, int NH, int HS, Cuda* g) {
    LAUNCH(diff_lambda_forward_kernel, 1, WARP_SIZE, 0, g->stream, mix, *w, (float)lambda_init, NH, HS);
    launchCheck(g->stream);
}
// d* (HS) += from dmix (NH/2,2,2); one warp
static __global__ void diff_lambda_backward_kernel(float* dq1, float* dk1, float* dq2, float* dk2, const double* dmix,
                                                   Lambda w, int NH, int HS) {
    float dlambda = 0;
    for (int i = threadIdx.x; i < NH; i += WARP_SIZE) { dlambda -= (float)dmix[2 * i + 1]; }
    dlambda = warp_sum(dlambda);
    float d1 = dlambda * expf(lambda_dot(w.q1, w.k1, HS)), d2 = -dlambda * expf(lambda_dot(w.q2, w.k2, HS));
    for (int i = threadIdx.x; i < HS; i += WARP_SIZE) {
        dq1[i] += d1 * (float)w.k1[i];
        dk1[i] += d1 * (float)w.q1[i];
        dq2[i] += d2 * (float)w.k2[i];
        dk2[i] += d2 * (float)w.q2[i];
    }
}
static void diff_lambda_backward(float* dq1, float* dk1, float* dq2, float* dk2, const double* dmix, const Lambda* w,
                                 int NH, int HS, Cuda* g) {
    LAUNCH(diff_lambda_backward_kernel, 1, WARP_SIZE, 0, g->stream, dq1, dk1, dq2, dk2, dmix, *w, NH, HS);
    launchCheck(g->stream);
}

// =====================================================================================================================
// SwiGLU (MODEL.md eq. 13): out = silu(gate) * up

// out (N,FF), gate_up (N,2*FF): gate in the first half of a row, up in the second. A thread owns W elements.
template <int W> static __global__ void swiglu_forward_kernel(floatX* out, const floatX* gate_up, int N, int FF) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= (size_t)N * FF) { return; }
    const floatX* row = gate_up + i / FF * 2 * FF + i % FF;
    Pack<floatX, W> a = load<W>(row), u = load<W>(row + FF);
    for (int e = 0; e < W; e++) {
        float x = (float)a.v[e];
        a.v[e] = (floatX)(x * sigmoid(x) * (float)u.v[e]);
    }
    store<W>(out + i, a);
}
static void swiglu_forward(floatX* out, const floatX* gate_up, int N, int FF, Cuda* g) {
    LAUNCH_WIDE(FF, swiglu_forward_kernel, ceil_div((size_t)N * FF, (size_t)256 * (FF % WIDE ? 1 : WIDE)), 256, 0,
                g->stream, out, gate_up, N, FF);
}

// dgate = dout up s (1 + gate (1 - s)), dup = dout gate s, s = sigmoid(gate), both into dgate_up. Unless act is NULL it
// becomes the forward result again, for down_proj's gradient; it may be dout.
template <int W>
static __global__ void swiglu_backward_kernel(floatX* dgate_up, floatX* act, const floatX* dout, const floatX* gate_up,
                                              int N, int FF) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= (size_t)N * FF) { return; }
    size_t at = i / FF * 2 * FF + i % FF;
    Pack<floatX, W> a = load<W>(gate_up + at), u = load<W>(gate_up + at + FF), d = load<W>(dout + i), da, du, out;
    for (int e = 0; e < W; e++) {
        float x = (float)a.v[e], y = (float)u.v[e], dy = (float)d.v[e], s = sigmoid(x);
        out.v[e] = (floatX)(x * s * y);
        du.v[e] = (floatX)(dy * x * s);
        da.v[e] = (floatX)(dy * y * s * (1.0f + x * (1.0f - s)));
    }
    if (act) { store<W>(act + i, out); }
    store<W>(dgate_up + at, da);
    store<W>(dgate_up + at + FF, du);
}
static void swiglu_backward(floatX* dgate_up, floatX* act, const floatX* dout, const floatX* gate_up, int N, int FF,
                            Cuda* g) {
    LAUNCH_WIDE(FF, swiglu_backward_kernel, ceil_div((size_t)N * FF, (size_t)256 * (FF % WIDE ? 1 : WIDE)), 256, 0,
                g->stream, dgate_up, act, dout, gate_up, N, FF);
}

// =====================================================================================================================
// Cross-entropy (MODEL.md eq. 14)

// losses (N) = -log softmax(logits)[target], wrong (N) = 1 where another id scores higher or, without `gradient`, one
// before it as high: greedy decoding takes the first of the best; 0 where target < 0 (not counted). With `gradient`,
// logits (N,V), rows ld apart, become dlogits = (softmax - onehot) * dloss, zero where not counted.
// A block owns every gridDim.x-th row: one pass for the running maximum and sum, one that writes. ld is a
// multiple of WIDE, blockDim.x of 32. A thread owns packs of WIDE logits, every blockDim.x-th. A multiprocessor has one
// block, so that the second pass finds the row in the L2 cache: rows of 128,256 logits that 132 have in work are 34 MB;
// bytes a logit 2 read and 2 written (with four smaller blocks 135 MB, and 2 more read).
enum { LOSS_THREADS = 1024 };
static __global__ void __launch_bounds__(LOSS_THREADS, 1)
    crossentropy_kernel(float* losses, unsigned char* wrong, floatX* logits, const int* targets, int N, int V, int ld,
                        float dloss, bool gradient) {
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        floatX* x = logits + (size_t)n * ld;
        const int target = targets[n];
        float own = target >= 0 ? (float)x[target] : 0.0f, max = -INFINITY, sum = 0;

        // Each thread's maximum so far, and the sum of exp(x - maximum), which a larger maximum scales down. Then both
        // over the block.
        if (target >= 0) {  // the same for the whole block
            for (int v = threadIdx.x * WIDE; v < V; v += blockDim.x * WIDE) {
                Pack<floatX, WIDE> p = load<WIDE>(x + v);
                float top = max;
                for (int e = 0; e < WIDE; e++) { top = fmaxf(top, v + e < V ? (float)p.v[e] : -INFINITY); }
                // 0 at first, whatever max: exponential(-inf) is 0
                if (top > max) { sum *= exponential(max - top), max = top; }
                for (int e = 0; e < WIDE; e++) { sum += v + e < V ? exponential((float)p.v[e] - max) : 0.0f; }
            }
            float top = block_reduce(max, true);
            // 0: a thread without elements
            sum = block_reduce(sum == 0.0f ? 0.0f : sum * exponential(max - top), false);
            max = top;
        }

        // Is the target beaten? There may be several that are best: in bf16 in about one row of a hundred.
        float beaten = own >= max ? 0.0f : 1.0f;
        if (!gradient && beaten == 0.0f) {  // the same for the whole block
            for (int v = threadIdx.x; v < target; v += blockDim.x) { beaten = (float)x[v] == own ? 1.0f : beaten; }
            beaten = block_reduce(beaten, true);
        }

        // The row's loss, by one thread.
        if (threadIdx.x == 0) {
            losses[n] = target >= 0 ? logf(sum) + max - own : 0.0f;
            wrong[n] = target >= 0 && beaten != 0.0f;
        }
        if (!gradient) { continue; }

        // Second pass: the gradient takes the logits' place. No thread reads what another writes: the target's logit
        // was read ahead of the barriers above.
        float inverse = 1.0f / sum;
        for (int v = threadIdx.x * WIDE; v < V; v += blockDim.x * WIDE) {
            Pack<floatX, WIDE> p = load<WIDE>(x + v);
            for (int e = 0; e < WIDE; e++) {  // beyond V lie rows' ends that no product reads
                float y = 0;
                if (target >= 0) { y = exponential((float)p.v[e] - max) * inverse - (v + e == target ? 1.0f : 0.0f); }
                p.v[e] = (floatX)(y * dloss);
            }
            store<WIDE>(x + v, p);
        }
    }
}
static void crossentropy_forward_backward(float* losses, unsigned char* wrong, floatX* logits, const int* targets,
                                          int N, int V, int ld, float dloss, bool gradient, Cuda* g) {
    int threads = min_int(LOSS_THREADS, round_up(ceil_div(V, WIDE), WARP_SIZE));
    LAUNCH(crossentropy_kernel, min_int(N, device_multiprocessors()), threads, 0, g->stream, losses, wrong, logits,
           targets, N, V, ld, dloss, gradient);
    launchCheck(g->stream);
}

// =====================================================================================================================
// Fast paths: tensor cores
//
// A warp multiplies tiles of 16-bit elements. ldmatrix loads them from shared memory into registers, and copy_async
// copies from device memory into shared memory (PTX manual: mma.m16n8k16, movmatrix.m8n8, ldmatrix.m8n8.x4, cp.async).
// dev/cuda_cpu/tensor_cores.h has the same functions for the CPU.
// All are volatile, because the lanes of a warp execute them together: the compiler must not move one into a branch.
// ldmatrix and the copies clobber "memory", so the compiler moves no access past them. That costs no instruction.

#if defined(CUDA_CPU)
#include "tensor_cores.h"
#else
static __device__ inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
// r[m] = this lane's pair of the m-th 8x8 matrix, whose rows the lanes 8m .. 8m+7 point to
static __device__ inline void ldmatrix(unsigned* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ inline void ldmatrix_transposed(unsigned* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// c (16,8) += a (16,16) b (16,8), in fp32
static __device__ inline void mma_bf16(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
static __device__ inline void mma_half(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The transpose of an 8x8 matrix of which lane 4g + t holds row g, columns 2t and 2t+1
static __device__ inline unsigned transpose8(unsigned pair) {
    unsigned out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}
// 16 bytes from global to shared memory, zeros where not valid; there after copy_wait<n>, which leaves at most the n
// newest commits in flight, and a barrier
[[maybe_unused]] static __device__ inline void copy_async(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
[[maybe_unused]] static __device__ inline void copy_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LEAVE> static __device__ inline void copy_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEAVE) : "memory");
}
#endif

// If valid, adds to two neighbours in global memory, 8-byte aligned, without waiting for what is there. The order of
// such sums is fixed only where one thread alone adds to an address: its own come in the order of its program.
[[maybe_unused]] static __device__ inline void add_pair(float* to, float x, float y, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p red.relaxed.gpu.global.add.v2.f32 [%0], {%1,%2}; }" ::"l"(to), "f"(x),
        "f"(y), "r"((int)valid)
        : "memory");
#else
    if (valid) { atomicAdd(to, x), atomicAdd(to + 1, y); }
#endif
}

// Two numbers as the pair that a tensor core's register holds
static __device__ inline unsigned pack_half(float x, float y) {
    __half2 h = __floats2half2_rn(x, y);
    unsigned pair;
    memcpy(&pair, &h, sizeof pair);
    return pair;
}
static __device__ inline unsigned pack_bf16(float x, float y) {
    __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
    unsigned pair;
    memcpy(&pair, &h, sizeof pair);
    return pair;
}
// Two scores. What fp16 cannot hold becomes NaN, not infinity: a weight next to zero would hide an infinite score from
// the loss, and the step would not be seen to be wrong. One instruction: x * 0 + x. (The fp32 build needs none.)
#define SCORES_END 65520.0f  // from here on fp16 rounds to infinity
[[maybe_unused]] static __device__ inline unsigned pack_scores(float x, float y) {
    __half2 h = __floats2half2_rn(x, y);
    h = __hfma2(h, __floats2half2_rn(0, 0), h);
    unsigned pair;
    memcpy(&pair, &h, sizeof pair);
    return pair;
}
// The same by type: __half, else bf16
template <typename T> static __device__ inline void mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    if constexpr (std::is_same<T, __half>::value) {
        mma_half(c, a, b0, b1);
    } else {
        mma_bf16(c, a, b0, b1);
    }
}
template <typename T> static __device__ inline unsigned pack_pair(float x, float y) {
    return std::is_same<T, __half>::value ? pack_half(x, y) : pack_bf16(x, y);
}
template <typename T> static __device__ inline float2 unpack_pair(unsigned pair) {
    __half2 h;
    memcpy(&h, &pair, sizeof h);
    return std::is_same<T, __half>::value
               ? __half22float2(h)
               : make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Operands from shared memory, rows PITCH elements apart: 8 more than a multiple of 16, so that the rows of an 8x8
// matrix lie in different banks. a: 16 rows (m) x 16 columns (k); a_transposed: 16 rows (k) x 16 columns (m); b: 16
// rows (two blocks of 8 n) x 16 columns (k), r[0..1] and r[2..3]; b_single: 8 rows (n), r[0..1]; b_transposed: 16 rows
// (k) x 16 columns (two blocks of 8 n).
template <int PITCH, typename T> static __device__ inline void load_a(unsigned* r, const T* tile) {
    int lane = threadIdx.x % WARP_SIZE;
    ldmatrix(r, tile + lane % 16 * PITCH + lane / 16 * 8);
}
template <int PITCH, typename T> static __device__ inline void load_a_transposed(unsigned* r, const T* tile) {
    int lane = threadIdx.x % WARP_SIZE;
    ldmatrix_transposed(r, tile + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8);
}
template <int PITCH, typename T> static __device__ inline void load_b(unsigned* r, const T* tile) {
    int lane = threadIdx.x % WARP_SIZE;
    ldmatrix(r, tile + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8);
}
template <int PITCH, typename T> static __device__ inline void load_b_single(unsigned* r, const T* tile) {
    int lane = threadIdx.x % WARP_SIZE;
    ldmatrix(r, tile + lane % 8 * PITCH + lane / 8 % 2 * 8);
}
template <int PITCH, typename T> static __device__ inline void load_b_transposed(unsigned* r, const T* tile) {
    int lane = threadIdx.x % WARP_SIZE;
    ldmatrix_transposed(r, tile + lane % 16 * PITCH + lane / 16 * 8);
}

// =====================================================================================================================
// Fast paths: the convolution on tensor cores

// kq_conv for kernels of at most BAND_TAPS x (2 BAND + 1), in the bf16 build. It is a product of matrices: for a row of
// the kernel (a tap a), the output columns j .. j+7 are the input columns j-8 .. j+15 of one row times a banded
// (Toeplitz) 24 x 8 matrix, T[c,n] = weight[a, c-8-n+r].
// Two taps are one mma.m16n8k16 for each 8 of the 24 columns. So a block of 16 x 8 outputs takes 9 products. Each tap's
// row is an address of ldmatrix, and T stays in 18 registers. 8 loaded input columns are used by three blocks of
// outputs. A block of threads owns BAND_ROWS x CONV_COLS outputs, a warp 16 rows of them.
enum { BAND = PACK, BAND_TAPS = 6, BAND_ROWS = CONV_THREADS / WARP_SIZE * 16, BAND_BLOCKS = CONV_COLS / 8 };
enum {
    BAND_PITCH = CONV_COLS + 2 * BAND + PACK,
    BAND_OUT_PITCH = CONV_COLS + PACK
};  // an odd number of 16 bytes, so that rows lie in different banks
static bool conv_is_band(const Attention* a) { return !EXACT && a->cq <= BAND_TAPS && (a->ck - 1) / 2 <= BAND; }

// x, which holds the columns j .. j+7, without those right of the diagonal of row i
template <typename T> static __device__ inline Pack<T, PACK> masked(Pack<T, PACK> x, int i, int j) {
    UNROLL
    for (int e = 0; e < PACK; e++) { x.v[e] = j + e <= i ? x.v[e] : (T)0.0f; }
    return x;
}
// As tile_load, in 2 bytes, converted if To is another type; rows `pitch` apart
template <typename To, typename From>
static __device__ inline void tile_load_pairs(To* shared, int pitch, const TileOf<From>& inp, int head, int top,
                                              int left, int rows, int cols, int begin, int end) {
    for (int t = threadIdx.x; t < rows * (cols / PACK); t += blockDim.x) {
        int row = t / (cols / PACK), column = t % (cols / PACK) * PACK, i = top + row, j = left + column;
        Pack<From, PACK> x = {};
        if (i >= begin && i < end && j >= 0 && j <= i) { x = masked(load<PACK>(inp.row(head, i) + j), i, j); }
        Pack<To, PACK> y;
        UNROLL
        for (int e = 0; e < PACK; e++) {
            if constexpr (std::is_same<To, From>::value) {
                y.v[e] = x.v[e];
            } else {
                y.v[e] = (To)(float)x.v[e];
            }
        }
        store<PACK>(shared + row * pitch + column, y);
    }
}
template <typename Out, typename In>
static __global__ void __launch_bounds__(CONV_THREADS)
    kq_conv_band_kernel(TileOf<Out> out, TileOf<In> inp, KqConv conv) {
    DYNAMIC_SHARED(In, s);  // (BAND_ROWS + BAND_TAPS - 1, BAND_PITCH) of inp, then (BAND_ROWS, BAND_OUT_PITCH) of out
    Out* result = (Out*)(s + (BAND_ROWS + BAND_TAPS - 1) * BAND_PITCH);
    const int cq = conv.cq, ck = conv.ck, head = blockIdx.z, i0 = conv.lo + blockIdx.y * BAND_ROWS,
              j0 = blockIdx.x * CONV_COLS;
    int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, g = lane / 4, t = lane % 4;
    if (j0 < i0 + BAND_ROWS) {  // else all of the block lies right of the diagonal
        tile_load_pairs(s, BAND_PITCH, inp, head, conv.backward ? i0 : i0 - (cq - 1), j0 - BAND,
                        BAND_ROWS + BAND_TAPS - 1, CONV_COLS + 2 * BAND, conv.begin, conv.end);
        const floatX* own = conv.weight + (size_t)(head % conv.NH) * cq * ck;
        unsigned T[BAND_TAPS / 2][3][2],
            x[3][BAND_TAPS / 2][4];  // [taps][8 of 24 columns][first, second tap], [columns][taps]
        UNROLL
        for (int e = 0; e < BAND_TAPS * 3; e++) {
            int a = e / 3, b = e % 3 * 8 - 8 + 2 * t - g + (ck - 1) / 2, at = a * ck + b, last = cq * ck - 1;
            float first = a < cq && b >= 0 && b < ck ? (float)own[conv.backward ? last - at : at] : 0.0f;
            float second = a < cq && b >= -1 && b < ck - 1 ? (float)own[conv.backward ? last - at - 1 : at + 1] : 0.0f;
            T[a / 2][e % 3][a % 2] = pack_pair<In>(first, second);
        }
        __syncthreads();  // the tile is there
        const In* rows =
            s + (warp * 16 + lane / 8 % 2 * 8 + lane % 8 + lane / 16) * BAND_PITCH;  // lanes 16 up: the second tap
        UNROLL
        for (int block = 0; block < BAND_BLOCKS + 2; block++) {
            UNROLL
            for (int p = 0; p < BAND_TAPS / 2; p++) {
                ldmatrix(x[block % 3][p], rows + 2 * p * BAND_PITCH + block * 8);
            }
            if (block < 2) { continue; }
            float c[4] = {};
            UNROLL
            for (int e = 0; e < 3; e++) {
                UNROLL
                for (int p = 0; p < BAND_TAPS / 2; p++) {
                    mma<In>(c, x[(block + 1 + e) % 3][p], T[p][e][0], T[p][e][1]);
                }
            }
            UNROLL
            for (int h = 0; h < 2; h++) {
                unsigned pair = pack_pair<Out>(c[2 * h], c[2 * h + 1]);
                memcpy(result + (warp * 16 + g + 8 * h) * BAND_OUT_PITCH + (block - 2) * 8 + 2 * t, &pair, sizeof pair);
            }
        }
        __syncwarp(ALL_LANES);  // the warp's rows are complete
    }
    for (int e = lane; e < 16 * CONV_COLS / PACK; e += WARP_SIZE) {
        int row = warp * 16 + e / (CONV_COLS / PACK), column = e % (CONV_COLS / PACK) * PACK, i = i0 + row,
            j = j0 + column;
        Pack<Out, PACK> y = {};
        if (j <= i) { y = masked(load<PACK>(result + row * BAND_OUT_PITCH + column), i, j); }
        if (i < conv.hi && j < conv.nk) { store<PACK>(out.row(head, i) + j, y); }
    }
}
template <typename Out, typename In>
static void kq_conv_band(const TileOf<Out>* out, const TileOf<In>* inp, const KqConv& conv, int S, Cuda* g) {
    dim3 grid(ceil_div(conv.nk, CONV_COLS), ceil_div(conv.hi - conv.lo, (int)BAND_ROWS), S * conv.NH);
    size_t shared = (BAND_ROWS + BAND_TAPS - 1) * BAND_PITCH * sizeof(In) + BAND_ROWS * BAND_OUT_PITCH * sizeof(Out);
    auto kernel = kq_conv_band_kernel<Out, In>;
    allow_shared(kernel, shared);
    LAUNCH(kernel, grid, CONV_THREADS, shared, g->stream, *out, *inp, conv);
    launchCheck(g->stream);
}

// kq_conv_backward_weight, a block for BAND_ROWS rows of inp. Where forward multiplies rows by banded matrices, here
// the matrices' gradients are products over rows: G_a[n,c] = sum over rows k and blocks of 8 keys j of dout[k+(cq-1)-a,
// j+n] inp[k, j-8+c], two taps a step, of which each diagonal is one weight,
//   dweight[a,b] = sum_n G_a[n, b-r+n+8].
// inp is rounded to bf16, which dout needs: the sums are over thousands of terms. A warp has 16 of the rows.
static __global__ void __launch_bounds__(CONV_THREADS)
    kq_conv_band_backward_weight_kernel(float* parts, TileX dout, Tile inp, int cq, int ck, int lo, int hi) {
    DYNAMIC_SHARED(floatX, d);  // (BAND_ROWS + BAND_TAPS - 1, BAND_OUT_PITCH) of dout, then (BAND_ROWS, BAND_PITCH) of
                                // inp; in the end G (warps, taps, 8, 24)
    floatX* s = d + (BAND_ROWS + BAND_TAPS - 1) * BAND_OUT_PITCH;
    int head = blockIdx.y, top = lo - (cq - 1) + blockIdx.x * BAND_ROWS,
        last = min_int(top + BAND_ROWS + cq - 1, hi) - 1;
    int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, g = lane / 4, t = lane % 4;
    float G[BAND_TAPS / 2][3][4] = {};  // [taps][8 of 24 columns]
    const floatX *rows[BAND_TAPS / 2], *columns = s + (warp * 16 + lane % 16) * BAND_PITCH + lane / 16 * 8;
    UNROLL
    for (int p = 0; p < BAND_TAPS / 2; p++) {  // lanes 8 up, of each half: the second tap; those of taps beyond cq
                                               // multiply something, which nobody reads
        rows[p] =
            d + (warp * 16 + lane / 16 * 8 + lane % 8 + max_int(0, cq - 1 - 2 * p - lane / 8 % 2)) * BAND_OUT_PITCH;
    }
    for (int j0 = 0; j0 <= last; j0 += CONV_COLS) {
        __syncthreads();  // the tiles before are used up
        tile_load_pairs(d, BAND_OUT_PITCH, dout, head, top, j0, BAND_ROWS + BAND_TAPS - 1, CONV_COLS, lo, hi);
        tile_load_pairs(s, BAND_PITCH, inp, head, top, j0 - BAND, BAND_ROWS, CONV_COLS + 2 * BAND, 0, hi);
        __syncthreads();         // the new ones are there
        unsigned x[2][4], y[4];  // 4 x 8 columns of inp, two registers each
        ldmatrix_transposed(x[0], columns);
        UNROLL
        for (int block = 0; block < BAND_BLOCKS; block++) {
            if (block % 2 == 0) { ldmatrix_transposed(x[(block / 2 + 1) % 2], columns + (block + 2) * 8); }
            UNROLL
            for (int p = 0; p < BAND_TAPS / 2; p++) {
                ldmatrix_transposed(y, rows[p] + block * 8);
                UNROLL
                for (int e = 0; e < 3; e++) {
                    const unsigned* b = x[(block + e) / 2 % 2] + (block + e) % 2 * 2;
                    mma<floatX>(G[p][e], y, b[0], b[1]);
                }
            }
        }
    }
    float* sums = (float*)d;
    __syncthreads();  // the last tiles are used up
    UNROLL
    for (int e = 0; e < BAND_TAPS / 2 * 3 * 4; e++) {
        int p = e / 12, part = e / 4 % 3, c = e % 4;
        sums[((warp * BAND_TAPS + 2 * p + c / 2) * 8 + g) * 24 + part * 8 + 2 * t + c % 2] = G[p][part][c];
    }
    __syncthreads();  // all warps have written
    for (int e = threadIdx.x; e < cq * ck; e += CONV_THREADS) {
        float sum = 0;
        for (int w = 0; w < CONV_THREADS / WARP_SIZE; w++) {
            for (int n = 0; n < 8; n++) {
                sum += sums[((w * BAND_TAPS + e / ck) * 8 + n) * 24 + e % ck - (ck - 1) / 2 + n + 8];
            }
        }
        parts[((size_t)head * gridDim.x + blockIdx.x) * cq * ck + e] = sum;
    }
}
static void kq_conv_band_backward_weight(double* dweight, const TileX* dout, const Tile* inp, const Attention* a, int S,
                                         int lo, int hi, float* parts, Cuda* g) {
    int blocks = ceil_div(hi - lo + a->cq - 1, BAND_ROWS);
    size_t shared = ((BAND_ROWS + BAND_TAPS - 1) * BAND_OUT_PITCH + BAND_ROWS * BAND_PITCH) * sizeof(floatX);
    auto kernel = kq_conv_band_backward_weight_kernel;
    allow_shared(kernel, shared);
    LAUNCH(kernel, dim3(blocks, S * a->NH), CONV_THREADS, shared, g->stream, parts, *dout, *inp, a->cq, a->ck, lo, hi);
    launchCheck(g->stream);
    sums_add(dweight, parts, S, a->NH, blocks, a->cq * a->ck, g);
}

// =====================================================================================================================
// Fast paths: head_mix, softmax, head_mix of groups of 16 heads in one kernel
//
// On tensor cores, in the bf16 build (MODEL.md eq. 5, 6, 8). The logits are read once and the result is written once.
// Mixing multiplies, for each key, the vector of its 16 heads by a 16 x 16 matrix. One mma.m16n8k16 does this for 8
// keys: forward in fp16 like the maps, backward in bf16 like the gradients, both summed in fp32.
// A warp takes 32 keys of a row at a time. Lane l holds the keys 8 (l%4) .. +7 of the heads l/4 and l/4 + 8, one access
// of 16 bytes for each head. Product t takes the keys 2t and 2t+1 of each lane. So a result is in the registers where
// the input was. The gradients of the weights are products over keys, which take pairs of keys of one head, as they are
// held. Mixing takes pairs of heads of one key as its second operand; transpose8 makes these of the former.

enum {
    MIX16_WARPS = 4,
    MIX16_THREADS = MIX16_WARPS * WARP_SIZE,
    MIX16_KEYS = 4 * PACK,
    MIX16_STEP = MIX16_WARPS * MIX16_KEYS,
    MIX16_ROWS = 2
};
typedef struct {
    unsigned p[2][4];
} Pairs;  // of head l/4 + 8h: p[h][t] keys 2t, 2t+1, as two fp16 or bf16
typedef struct {
    float v[2][PACK];
} Values;  // the same in fp32
typedef struct {
    unsigned a[4];
} Matrix16;  // 16 x 16 as a product's first operand

// w (out, in)
template <typename T> static __device__ inline Matrix16 matrix16(const floatX* w, bool transpose) {
    int lane = threadIdx.x % WARP_SIZE, down = transpose ? 1 : 16, across = transpose ? 16 : 1;
    Matrix16 m;
    UNROLL
    for (int e = 0; e < 4; e++) {
        const floatX* at = w + (lane / 4 + e % 2 * 8) * down + (lane % 4 * 2 + e / 2 * 8) * across;
        m.a[e] = pack_pair<T>((float)at[0], (float)at[across]);
    }
    return m;
}
// Keys j0 .. j0+31 of row i of the heads head .. head+15; zero right of the diagonal
template <typename T> static __device__ inline Pairs pairs_load(const TileOf<T>& inp, int head, int i, int j0) {
    int lane = threadIdx.x % WARP_SIZE, j = j0 + lane % 4 * PACK;
    Pairs x = {};
    if (j > i) { return x; }
    UNROLL
    for (int h = 0; h < 2; h++) {
        Pack<T, PACK> v = load<PACK>(inp.row(head + lane / 4 + 8 * h, i) + j);
        memcpy(x.p[h], &v, sizeof x.p[h]);
        UNROLL
        for (int t = 0; t < 4; t++) {
            x.p[h][t] = j + 2 * t + 1 <= i ? x.p[h][t] : j + 2 * t <= i ? x.p[h][t] & 0xffffu : 0;
        }
    }
    return x;
}
template <typename T>
static __device__ inline void pairs_store(const TileOf<T>& out, int head, int i, int j0, int nk, const Pairs& x) {
    int lane = threadIdx.x % WARP_SIZE, j = j0 + lane % 4 * PACK;
    if (j >= nk) { return; }
    UNROLL
    for (int h = 0; h < 2; h++) {
        Pack<T, PACK> v = {};
        memcpy(&v, x.p[h], sizeof x.p[h]);
        store<PACK>(out.row(head + lane / 4 + 8 * h, i) + j, v);
    }
}
template <typename T> static __device__ inline Pairs pairs_of(const Values& x) {
    Pairs y;
    UNROLL
    for (int e = 0; e < 8; e++) { y.p[e / 4][e % 4] = pack_pair<T>(x.v[e / 4][e % 4 * 2], x.v[e / 4][e % 4 * 2 + 1]); }
    return y;
}
template <typename T> static __device__ inline Values values_of(const Pairs& x) {
    Values y;
    UNROLL
    for (int e = 0; e < 8; e++) {
        float2 pair = unpack_pair<T>(x.p[e / 4][e % 4]);
        y.v[e / 4][e % 4 * 2] = pair.x, y.v[e / 4][e % 4 * 2 + 1] = pair.y;
    }
    return y;
}
// w x
template <typename T> static __device__ inline Values mix16(const Matrix16& w, const Pairs& x) {
    Values y;
    UNROLL
    for (int t = 0; t < 4; t++) {
        float c[4] = {};
        unsigned low = transpose8(x.p[0][t]), high = transpose8(x.p[1][t]);
        mma<T>(c, w.a, low, high);
        y.v[0][2 * t] = c[0], y.v[0][2 * t + 1] = c[1], y.v[1][2 * t] = c[2], y.v[1][2 * t + 1] = c[3];
    }
    return y;
}
// dw[o,n] += sum over the keys of dy[o] x[n], both bf16; dw[n/8] as a product's result
static __device__ inline void mix16_backward_weight(float (*dw)[4], const Pairs& dy, const Pairs& x) {
    UNROLL
    for (int t = 0; t < 4; t += 2) {
        unsigned a[4] = {dy.p[0][t], dy.p[1][t], dy.p[0][t + 1], dy.p[1][t + 1]};
        UNROLL
        for (int n = 0; n < 2; n++) { mma_bf16(dw[n], a, x.p[n][t], x.p[n][t + 1]); }
    }
}
// softmax(w x) of keys j0 .. of row i, from the maximum and 1 / sum of the lane's two rows
static __device__ inline Values mix16_softmax(const Matrix16& w, const Pairs& x, const RowStats* s, int i, int j0) {
    Values p = mix16<__half>(w, x);
    int left = i - (j0 + threadIdx.x % 4 * PACK);
    UNROLL
    for (int e = 0; e < 2 * PACK; e++) {
        float* x = &p.v[e / PACK][e % PACK];
        *x = e % PACK <= left ? exponential(*x - s[e / PACK].max) * s[e / PACK].sum : 0.0f;
    }
    return p;
}

// The weights (groups,16,16) before and after softmax
typedef struct {
    const floatX *pre, *post;
    int groups;
} MixWeights;
// What a launch makes: rows lo <= i < hi of S sequences, keys 0 .. nk-1. Rows from `own` on are the forward pass's own,
// whose statistics it keeps; rows below `own` are the backward pass's own: the others give input gradients only.
typedef struct {
    int S, lo, hi, own, nk;
} MixRows;

// out = post softmax(pre inp), or what of it is switched on; stats as in softmax_forward. A block owns a row of a
// group's heads, its warps every fourth 32 keys. Maximum and sum of a row take a pass of their own over the keys, the
// second read is the cache's.
template <bool SOFTMAX, bool POST, typename Out>
static __global__ void __launch_bounds__(MIX16_THREADS)
    head_mix16_forward_kernel(TileOf<Out> out, Tile inp, MixWeights weights, float* stats, bool recompute, MixRows r,
                              int T) {
    DYNAMIC_SHARED(RowStats, rows);  // (warps, 16)
    int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, i = r.lo + blockIdx.x, head = blockIdx.y * 16;
    size_t matrix = (size_t)(blockIdx.y % weights.groups) * 256;
    Matrix16 before = {}, after = {};
    RowStats s[2] = {{-INFINITY, 0}, {-INFINITY, 0}};  // of the heads l/4 and l/4 + 8
    if constexpr (POST) { after = matrix16<__half>(weights.post + matrix, false); }
    if constexpr (SOFTMAX) {
        before = matrix16<__half>(weights.pre + matrix, false);
        for (int j0 = warp * MIX16_KEYS; !recompute && j0 <= i; j0 += MIX16_STEP) {
            Values x = mix16<__half>(before, pairs_load(inp, head, i, j0));
            for (int h = 0; h < 2; h++) { stats_add(&s[h], x.v[h], i + 1 - (j0 + lane % 4 * PACK)); }
        }
        for (int h = 0; h < 2; h++) {
            stats_join(&s[h], stats_shuffle(s[h], 1));
            stats_join(&s[h], stats_shuffle(s[h], 2));
            if (lane % 4 == 0) { rows[warp * 16 + lane / 4 + 8 * h] = s[h]; }
        }
        __syncthreads();  // all warps have their part of the rows
        for (int h = 0; h < 2; h++) {
            float* kept = stats + 2 * ((size_t)(head + lane / 4 + 8 * h) * T + i);
            s[h] = {-INFINITY, 0};
            for (int w = 0; w < MIX16_WARPS; w++) { stats_join(&s[h], rows[w * 16 + lane / 4 + 8 * h]); }
            s[h].sum = 1.0f / s[h].sum;
            if (recompute) {
                s[h] = {kept[0], kept[1]};
            } else if (warp == 0 && lane % 4 == 0 && i >= r.own) {
                kept[0] = s[h].max, kept[1] = s[h].sum;
            }
        }
    }
    for (int j0 = warp * MIX16_KEYS; j0 < r.nk; j0 += MIX16_STEP) {
        Pairs y = {};
        if (j0 <= i) {
            Pairs x = pairs_load(inp, head, i, j0);
            if constexpr (SOFTMAX && POST) {
                y = pairs_of<Out>(mix16<__half>(after, pairs_of<__half>(mix16_softmax(before, x, s, i, j0))));
            } else if constexpr (SOFTMAX) {
                y = pairs_of<Out>(mix16_softmax(before, x, s, i, j0));
            } else {
                y = pairs_of<Out>(mix16<__half>(after, x));
            }
        }
        pairs_store(out, head, i, j0, r.nk, y);
    }
}
template <bool SOFTMAX, bool POST, typename Out>
static void head_mix16_forward(const TileOf<Out>* out, const Tile* inp, float* stats, bool recompute,
                               const Attention* a, MixRows r, Cuda* g) {
    r.lo = max_int(r.lo, 0), r.hi = min_int(r.hi, a->T);
    MixWeights weights = {a->mix_pre, a->mix_post, a->NH / 16};
    auto kernel = head_mix16_forward_kernel<SOFTMAX, POST, Out>;
    LAUNCH(kernel, dim3(r.hi - r.lo, r.S * weights.groups), MIX16_THREADS, MIX16_WARPS * 16 * sizeof(RowStats),
           g->stream, *out, *inp, weights, stats, recompute, r, a->T);
    launchCheck(g->stream);
}

// The block's sums of one weight to parts (sequences*groups, blocks, 16*16); s (warps, 256) in shared memory
static __device__ inline void mix16_parts(float* parts, float* s, float (*dw)[4]) {
    int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    __syncthreads();  // s has been read
    UNROLL
    for (int e = 0; e < 8; e++) {
        s[warp * 256 + (lane / 4 + e % 4 / 2 * 8) * 16 + e / 4 * 8 + lane % 4 * 2 + e % 2] = dw[e / 4][e % 4];
    }
    __syncthreads();  // all warps have written
    for (int t = threadIdx.x; t < 256; t += MIX16_THREADS) {
        float sum = 0;
        for (int w = 0; w < MIX16_WARPS; w++) { sum += s[w * 256 + t]; }
        parts[((size_t)blockIdx.y * gridDim.x + blockIdx.x) * 256 + t] = sum;
    }
}

// The transpose of the same; for its own rows also att = post softmax(pre inp), which the forward pass did not keep,
// and the weights' gradients. With P = softmax(pre inp), dP = post^T dout, dL = P (dP - sum_j P dP): dinp = pre^T dL,
// dpost = dout P^T, dpre = dL inp^T. dinp may be dout. The dot product takes a pass of its own. Without SOFTMAX: att =
// post inp, dinp = post^T dout. A block owns MIX16_ROWS rows.
template <bool SOFTMAX, bool POST>
static __global__ void __launch_bounds__(MIX16_THREADS)
    head_mix16_backward_kernel(TileX dinp, TileX att, TileX dout, Tile inp, MixWeights weights, const float* stats,
                               float* parts_pre, float* parts_post, MixRows r, int T) {
    DYNAMIC_SHARED(float, shared);  // (warps, 16) dot products, (warps, 256) sums
    int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, head = blockIdx.y * 16;
    size_t matrix = (size_t)(blockIdx.y % weights.groups) * 256;
    Matrix16 before = {}, before_t = {}, after = {}, after_t = {};
    if constexpr (SOFTMAX) {
        before = matrix16<__half>(weights.pre + matrix, false), before_t = matrix16<floatX>(weights.pre + matrix, true);
    }
    if constexpr (POST) {
        after = matrix16<__half>(weights.post + matrix, false), after_t = matrix16<floatX>(weights.post + matrix, true);
    }
    float dpre[2][4] = {}, dpost[2][4] = {};
    int end = min_int(r.hi, r.lo + (int)(blockIdx.x + 1) * MIX16_ROWS);
    for (int i = r.lo + blockIdx.x * MIX16_ROWS; i < end; i++) {
        RowStats s[2];
        float dot[2] = {};
        if constexpr (SOFTMAX) {
            for (int h = 0; h < 2; h++) {
                const float* kept = stats + 2 * ((size_t)(head + lane / 4 + 8 * h) * T + i);
                s[h] = {kept[0], kept[1]};
            }
            for (int j0 = warp * MIX16_KEYS; j0 <= i; j0 += MIX16_STEP) {
                Pairs d = pairs_load(dout, head, i, j0);
                Values p = mix16_softmax(before, pairs_load(inp, head, i, j0), s, i, j0),
                       dp = POST ? mix16<floatX>(after_t, d) : values_of<floatX>(d);
                UNROLL
                for (int e = 0; e < 2 * PACK; e++) {
                    dot[e / PACK] += p.v[e / PACK][e % PACK] * dp.v[e / PACK][e % PACK];
                }
            }
            __syncthreads();  // the products of the row before have been read
            for (int h = 0; h < 2; h++) {
                dot[h] += __shfl_xor_sync(ALL_LANES, dot[h], 1);
                dot[h] += __shfl_xor_sync(ALL_LANES, dot[h], 2);
                if (lane % 4 == 0) { shared[warp * 16 + lane / 4 + 8 * h] = dot[h]; }
            }
            __syncthreads();  // all warps have their part
            for (int h = 0; h < 2; h++) {
                dot[h] = 0;
                for (int w = 0; w < MIX16_WARPS; w++) { dot[h] += shared[w * 16 + lane / 4 + 8 * h]; }
            }
        }
        for (int j0 = warp * MIX16_KEYS; j0 < r.nk; j0 += MIX16_STEP) {
            Pairs dx = {}, y = {};
            if (j0 <= i) {
                Pairs d = pairs_load(dout, head, i, j0), x = {};
                if (SOFTMAX || i < r.own) { x = pairs_load(inp, head, i, j0); }
                if constexpr (SOFTMAX) {
                    Values p = mix16_softmax(before, x, s, i, j0),
                           dl = POST ? mix16<floatX>(after_t, d) : values_of<floatX>(d);
                    if (POST && i < r.own) {
                        y = pairs_of<floatX>(mix16<__half>(after, pairs_of<__half>(p)));
                        mix16_backward_weight(dpost, d, pairs_of<floatX>(p));
                    }
                    UNROLL
                    for (int e = 0; e < 2 * PACK; e++) {
                        dl.v[e / PACK][e % PACK] = p.v[e / PACK][e % PACK] * (dl.v[e / PACK][e % PACK] - dot[e / PACK]);
                    }
                    dx = pairs_of<floatX>(dl);
                    if (i < r.own) { mix16_backward_weight(dpre, dx, pairs_of<floatX>(values_of<__half>(x))); }
                    dx = pairs_of<floatX>(mix16<floatX>(before_t, dx));
                } else {
                    if (i < r.own) {
                        y = pairs_of<floatX>(mix16<__half>(after, x));
                        mix16_backward_weight(dpost, d, pairs_of<floatX>(values_of<__half>(x)));
                    }
                    dx = pairs_of<floatX>(mix16<floatX>(after_t, d));
                }
            }
            if (POST && i < r.own) { pairs_store(att, head, i, j0, r.nk, y); }
            pairs_store(dinp, head, i, j0, r.nk, dx);
        }
    }
    if constexpr (POST) { mix16_parts(parts_post, shared, dpost); }
    if constexpr (SOFTMAX) { mix16_parts(parts_pre, shared, dpre); }
}
// mix_pre, mix_post (NH/16,16,16) of the sums += as above; the one that is off is not read
template <bool SOFTMAX, bool POST>
static void head_mix16_backward(const AttentionSums* sums, const TileX* dinp, const TileX* att, const TileX* dout,
                                const Tile* inp, const float* stats, const Attention* a, MixRows r, float* parts,
                                Cuda* g) {
    r.hi = min_int(r.hi, a->T);
    MixWeights weights = {a->mix_pre, a->mix_post, a->NH / 16};
    int blocks = ceil_div(r.hi - r.lo, MIX16_ROWS), groups = weights.groups;
    float* parts_post = parts + (size_t)r.S * groups * blocks * 256;
    auto kernel = head_mix16_backward_kernel<SOFTMAX, POST>;
    LAUNCH(kernel, dim3(blocks, r.S * groups), MIX16_THREADS, MIX16_WARPS * 256 * sizeof(float), g->stream, *dinp, *att,
           *dout, *inp, weights, stats, parts, parts_post, r, a->T);
    launchCheck(g->stream);
    if (SOFTMAX) { sums_add(sums->mix_pre, parts, r.S, groups, blocks, 256, g); }
    if (POST) { sums_add(sums->mix_post, parts_post, r.S, groups, blocks, 256, g); }
}

static bool mixes_16(const Attention* a) {
    return !EXACT && a->mix_pre && a->mix_post && a->ch_pre == 16 && a->ch_post == 16;
}
// Floats of scratch that one sequence's partial sums take
static size_t mix16_parts_size(const Attention* a) {
    return (size_t)a->NH * 16 * 2 * (size_t)ceil_div(a->chunk + halo_pre(a) + halo_post(a), MIX16_ROWS);
}

// The rest of attention_maps, from C on: A = mix(softmax(mix(C))) in one kernel, or, with a convolution in between, P =
// softmax(mix(C)), R = conv(P) and A = mix(R). With `backward` A is left to mix16_maps_backward, whose kernels make it
// as well.
static void mix16_maps(const Maps* m, float* stats, const Attention* a, Chunk c, bool backward, Cuda* g) {
    int S = c.S, lo = c.lo, hi = c.hi, end = hi + (backward ? halo_pre(a) : 0), nk = min_int(end, a->T);
    if (!a->conv_post) {
        if (!backward) { head_mix16_forward<true, true>(&m->A, &m->C, stats, false, a, {S, lo, end, lo, nk}, g); }
        return;
    }
    head_mix16_forward<true, false>(&m->P, &m->C, stats, backward, a, {S, lo - halo_post(a), end, lo, nk}, g);
    kq_conv_forward(&m->R, &m->P, a->conv_post, a, S, lo, hi, nk, g);
    if (!backward) { head_mix16_forward<false, true>(&m->A, &m->R, stats, false, a, {S, lo, hi, lo, nk}, g); }
}

// Its reverse: d is dA and becomes dC; `other` is scratch, the two may change places.
static void mix16_maps_backward(TileX* d, TileX* other, const AttentionSums* sums, const Maps* m, const float* stats,
                                const Attention* a, Chunk c, float* parts, Cuda* g) {
    int S = c.S, lo = c.lo, hi = c.hi, end = hi + halo_pre(a), far = end + halo_post(a), nk = min_int(end, a->T),
        nk_far = min_int(far, a->T);
    MixRows rows = {S, lo, end, hi, nk};
    if (!a->conv_post) {
        head_mix16_backward<true, true>(sums, d, &m->A, d, &m->C, stats, a, rows, parts, g);
        return;
    }
    head_mix16_backward<false, true>(sums, d, &m->A, d, &m->R, stats, a, {S, lo, far, hi, nk_far}, parts, g);
    kq_conv_backward_weight(sums->conv_post, d, &m->P, a, S, lo, hi, parts, g);
    kq_conv_backward_input(other, d, a->conv_post, a, S, lo, end, nk, g);
    std::swap(*d, *other);
    head_mix16_backward<true, false>(sums, d, &m->A, d, &m->C, stats, a, rows, parts, g);
}

// =====================================================================================================================
// Fast paths: all of attention in one kernel
//
// Fused attention (MODEL.md, Fused attention) writes only its result to device memory. It serves layers of the bf16
// build whose only operations on scores are a convolution before softmax and the mixing of pairs of heads after it. All
// other layers, and the fp32 build, are computed chunk by chunk as above.
//
// Mixing after softmax is linear in the values. Vcat has the values of the group's CH heads side by side; then Z_n =
// P_n Vcat and O_o = sum_n W[o,n] Z_n[block o]. So a head needs no other head: each is plain flash attention with wide
// values, and head_output mixes the Z (MODEL.md eq. 8). Z, dZ and dV have CH parts of (B,NH,T,HS): part p of value head
// o is the share of the p-th head of its group.
//
// The convolution is a product of matrices, as in kq_conv_band: for 8 keys j..j+7 of a row, the scores j-8..j+15 of a
// tap's row (u queries back) times a banded (Toeplitz) matrix of the tap's weights. CQ taps are 3 CQ steps of 8
// columns, and two steps are one 16x8x16 product. Each tap's row is another address; its matrix stays in registers.
// Scores and their gradients are kept in shared memory in fp16, which has 11 bits where bf16 has 8. The gradients are
// scaled by a power of two.

enum {
    FLASH_HEAD = 128,
    FLASH_TAPS = 6,
    FLASH_REACH = 8
};  // largest head size; of a convolution: queries, keys to either side
// What every call for S sequences says of its shape; pairs: values of two heads
static AttentionShape cudnn_shape(const Attention* a, int S, bool pairs) {
    AttentionShape s = {S, a->NH, a->T, a->HS, pairs ? 2 * a->HS : a->HS, (float)(1.0 / sqrt(a->HS))};
    return s;
}

#if !defined(PRECISION_FP32)
enum { FLASH_WARPS = 8, FLASH_THREADS = FLASH_WARPS * WARP_SIZE };  // of a block

typedef struct {
    const floatX *q, *k, *v;  // (S,NH,T,HS), q and k rotated
    const floatX* conv;       // (NH,cq,ck), NULL = off
    const float* mix;         // (NH/2,2,2) of pairs
    int S, T, NH, HS, cq, ck;
    size_t z_part, dz_part;  // elements from one part of Z, of dZ, to the next
    float scale;             // 1 / sqrt(HS)
} Flash;
// W[o,n] of the pair that head blockIdx.y belongs to
static __device__ inline float flash_mix(const Flash& f, int o, int n) { return f.mix[blockIdx.y / 2 * 4 + 2 * o + n]; }

// ROWS rows of a (T,HS) matrix from row `first` on into shared memory, WIDTH columns of them, PITCH apart; zeros
// outside the matrix. By the whole block: a thread has 8 columns of every STEP-th row, so that both of its addresses
// move on by a constant (of 96 columns 252 threads copy). Where nothing is to be copied the source's address may be
// anything.
template <int WIDTH, int PITCH, int ROWS>
static __device__ inline void rows_load(floatX* shared, const floatX* from, int first, int T, int HS) {
    enum { PACKS = WIDTH / 8, STEP = FLASH_THREADS / PACKS };
    const int r = threadIdx.x / PACKS, c = threadIdx.x % PACKS * 8, rows = c < HS ? T : 0;
    if (r >= STEP) { return; }
    const floatX* row = from + (ptrdiff_t)(first + r) * HS + c;
    UNROLL
    for (int s = 0; s < ROWS; s += STEP, row += STEP * HS) {
        if (s + STEP > ROWS && r + s >= ROWS) { return; }
        copy_async(shared + (r + s) * PITCH + c, row, (unsigned)(first + r + s) < (unsigned)rows);
    }
}

// Multiplies what this thread has copied by rows_load, once it has arrived.
template <int WIDTH, int PITCH, int ROWS> static __device__ inline void rows_scale(floatX* shared, float scale) {
    enum { PACKS = WIDTH / 8, STEP = FLASH_THREADS / PACKS };
    const int c = threadIdx.x % PACKS * 8;
    ROLLED
    for (int r = threadIdx.x / PACKS; r < ROWS && threadIdx.x < STEP * PACKS; r += STEP) {
        Pack<floatX, 8> x = load<8>(shared + r * PITCH + c);
        UNROLL
        for (int e = 0; e < 8; e++) { x.v[e] = (floatX)(scale * (float)x.v[e]); }
        store<8>(shared + r * PITCH + c, x);
    }
}

// c[m][g] (16 x 8) += rows 16 m .. of a times the 8 rows of group g of b, over WIDTH columns of both. What is loaded of
// b serves all M.
template <int WIDTH, int M, int GROUPS, int PITCH>
static __device__ inline void rows_product(float (*c)[GROUPS][4], const floatX* a, const floatX* b) {
    UNROLL2
    for (int k = 0; k < WIDTH; k += 16) {
        unsigned x[M][4], y[4];
        UNROLL
        for (int m = 0; m < M; m++) { load_a<PITCH>(x[m], a + 16 * m * PITCH + k); }
        UNROLL
        for (int g = 0; g < GROUPS; g += 2) {
            if (g + 1 == GROUPS) {
                load_b_single<PITCH>(y, b + 8 * g * PITCH + k);
            } else {
                load_b<PITCH>(y, b + 8 * g * PITCH + k);
            }
            UNROLL
            for (int m = 0; m < M; m++) {
                mma_bf16(c[m][g], x[m], y[0], y[1]);
                if (g + 1 < GROUPS) { mma_bf16(c[m][g + 1], x[m], y[2], y[3]); }
            }
        }
    }
}

// c[m][g] (16 x 8) += rows 16 m .. of a (K columns) times the 8 columns of group g of b (K rows); a given transposed (K
// rows) if TA
template <int K, int M, int GROUPS, bool TA, int PITCH_A, int PITCH_B>
static __device__ inline void columns_product(float (*c)[GROUPS][4], const floatX* a, const floatX* b) {
    UNROLL2
    for (int k = 0; k < K; k += 16) {
        unsigned x[M][4], y[4];
        UNROLL
        for (int m = 0; m < M; m++) {
            if (TA) {
                load_a_transposed<PITCH_A>(x[m], a + k * PITCH_A + 16 * m);
            } else {
                load_a<PITCH_A>(x[m], a + 16 * m * PITCH_A + k);
            }
        }
        UNROLL
        for (int g = 0; g < GROUPS; g += 2) {
            load_b_transposed<PITCH_B>(y, b + k * PITCH_B + 8 * g);
            UNROLL
            for (int m = 0; m < M; m++) {
                mma_bf16(c[m][g], x[m], y[0], y[1]);
                mma_bf16(c[m][g + 1], x[m], y[2], y[3]);
            }
        }
    }
}

// The Toeplitz matrices of one head as operands b, by one warp, into bands (CQ/2, 3, 2, 32 lanes) in shared memory.
// Step (u/2, gr) multiplies two taps' rows u, u+1 of the gr-th of the three groups of columns around the outputs; tap u
// is the row u queries back (forward) or on (transposed). Column n of the outputs takes from row k of that group
// theta[u,v] = weight[cq-1-u, r-v], v the keys from input to output, n - (8 gr - 8 + k), or transposed its negative.
template <int CQ>
static __device__ inline void toeplitz(unsigned* bands, const floatX* weight, int cq, int ck, bool transposed) {
    int lane = threadIdx.x % WARP_SIZE, n = lane / 4, r = (ck - 1) / 2;
    for (int s = 0; s < 3 * CQ; s++) {
        int u = s / 6 * 2 + s % 2, gr = s / 2 % 3;
        float x[2];
        for (int e = 0; e < 2; e++) {
            int v = n + 8 - 8 * gr - (lane % 4 * 2 + e);
            if (transposed) { v = -v; }
            x[e] = u < cq && v >= -r && v <= r ? (float)weight[(cq - 1 - u) * ck + r - v] : 0.0f;
        }
        bands[s * WARP_SIZE + lane] = pack_half(x[0], x[1]);
    }
}

// c[g] (16 x 8) += the CQ taps' products for GROUPS groups of columns. tile: first of the 16 rows; column: of the group
// before the first, modulo RING if that is not 0; tap u reads the rows u * STEP further on. Two taps at a time, three
// groups of their columns stay in registers while the outputs move along.
template <int CQ, int GROUPS, int STEP, int PITCH, int RING>
static __device__ inline void conv_product(float (*c)[4], const half* tile, int column, const unsigned* bands) {
    int lane = threadIdx.x % WARP_SIZE;
    ROLLED
    for (int u = 0; u < CQ; u += 2) {
        unsigned x[3][4], band[3][2];
        const half* rows = tile + (STEP * (u + lane / 16) + lane % 16) * PITCH;
        UNROLL
        for (int s = 0; s < 6; s++) { band[s / 2][s % 2] = bands[(3 * u + s) * WARP_SIZE + lane]; }
        UNROLL
        for (int g = 0; g < GROUPS + 2;
             g++) {  // g: the group of columns that is loaded; the outputs of g-1, which is c[g-2], are complete then
            ldmatrix(x[g % 3], rows + (RING ? (column + 8 * g) % (RING ? RING : 1) : column + 8 * g));
            if (g < 2) { continue; }
            UNROLL
            for (int gr = 0; gr < 3; gr++) { mma_half(c[g - 2], x[(g - 2 + gr) % 3], band[gr][0], band[gr][1]); }
        }
    }
}

static __device__ inline float quad_sum(float x) {  // over the four lanes that hold a row of a product
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
static __device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Forward: z = softmax(conv(q k^T)) Vcat, and the rows' maximum and 1 / sum. Block (tile of 128 queries, head,
// sequence), a warp owns 16 queries. Keys come 64 at a time, copied while the 64 before are used. With a convolution
// the logits lag the scores by 8 keys: the scores' columns stand in a ring of 128, of which the last 16 of the step
// before are read again; only the rows above the tile, which the taps reach, are computed twice, a group of columns by
// each warp.
template <int WIDTH_, int CH_, int CQ_> struct FlashForward {
    enum {
        WIDTH = WIDTH_,
        CH = CH_,
        CQ = CQ_,
        ROWS = 16 * FLASH_WARPS,
        HALO = CQ_ ? 16 : 0,
        LAG = CQ_ ? 8 : 0,
        PITCH = WIDTH + 8,
        RING = 128,
        RING_PITCH = RING + 8,
        GROUPS = FLASH_KEYS / 8,
        OUT_GROUPS = CH * WIDTH / 8
    };
    enum {
        Q = (ROWS + HALO) * PITCH,
        K = FLASH_KEYS * PITCH,
        V = CH * FLASH_KEYS * PITCH,
        SCORES = CQ_ ? (ROWS + HALO) * RING_PITCH : 0
    };
    enum { BANDS = 3 * CQ * WARP_SIZE, BYTES = 2 * (Q + 2 * K + 2 * V + SCORES) + 4 * BANDS };  // of shared memory
};
// A block's place and its shared memory: two buffers of keys and of values
template <typename F> struct ForwardBlock {
    floatX *q_rows, *k_rows, *v_rows;
    half* scores;
    unsigned* bands;
    int i0, row0, head, group;  // first query, the warp's first query; the head, the first one of its group
};
// This lane's first row of a product of the warp: 8 more for the second half of its elements
static __device__ inline int lane_row(void) { return threadIdx.x % WARP_SIZE / 4; }
static __device__ inline int lane_column(void) { return threadIdx.x % 4 * 2; }

template <typename F> static __device__ inline ForwardBlock<F> forward_block(floatX* shared, const Flash& f) {
    ForwardBlock<F> x;
    x.q_rows = shared, x.k_rows = shared + F::Q, x.v_rows = x.k_rows + 2 * F::K;
    x.scores = reinterpret_cast<half*>(x.v_rows + 2 * F::V);
    x.bands = reinterpret_cast<unsigned*>(x.scores + F::SCORES);
    x.i0 = (gridDim.x - 1 - blockIdx.x) * F::ROWS;  // the longest rows first
    x.row0 = x.i0 + 16 * (threadIdx.x / WARP_SIZE);
    x.head = blockIdx.z * f.NH + blockIdx.y, x.group = x.head / F::CH * F::CH;
    return x;
}
// The keys of a step, and the values that its logits need
template <typename F> static __device__ inline void forward_load(const ForwardBlock<F>& x, const Flash& f, int step) {
    const size_t size = (size_t)f.T * f.HS;
    const int j0 = step * FLASH_KEYS;
    rows_load<F::WIDTH, F::PITCH, FLASH_KEYS>(x.k_rows + step % 2 * F::K, f.k + x.head * size, j0, f.T, f.HS);
    UNROLL
    for (int o = 0; o < F::CH; o++) {
        rows_load<F::WIDTH, F::PITCH, FLASH_KEYS>(x.v_rows + step % 2 * F::V + o * F::K, f.v + (x.group + o) * size,
                                                  j0 - F::LAG, f.T, f.HS);
    }
    copy_commit();
}
// The convolution's matrices, and zeros for the 16 columns before key 0
template <typename F> static __device__ inline void forward_conv_begin(const ForwardBlock<F>& x, const Flash& f) {
    if (threadIdx.x < WARP_SIZE) {
        toeplitz<F::CQ>(x.bands, f.conv + (size_t)blockIdx.y * f.cq * f.ck, f.cq, f.ck, false);
    }
    for (int t = threadIdx.x; t < (F::ROWS + F::HALO) * 8; t += FLASH_THREADS) {
        *reinterpret_cast<unsigned*>(x.scores + t / 8 * F::RING_PITCH + F::RING - 16 + t % 8 * 2) = 0;
    }
}
// fp16 scores of 16 rows from query i on and some groups of columns from key j on; zero right of the diagonal, as the
// convolution reads them
template <typename F, int GROUPS>
static __device__ inline void forward_scores_put(const ForwardBlock<F>& x, const float (*c)[4], int i, int j,
                                                 float scale) {
    UNROLL
    for (int g = 0; g < GROUPS; g++) {
        UNROLL
        for (int e = 0; e < 4; e += 2) {
            int query = i + lane_row() + 4 * e, key = j + 8 * g + lane_column();
            unsigned pair =
                pack_scores(key <= query ? c[g][e] * scale : 0.0f, key + 1 <= query ? c[g][e + 1] * scale : 0.0f);
            *reinterpret_cast<unsigned*>(x.scores + (query - x.i0 + F::HALO) * F::RING_PITCH + key % F::RING) = pair;
        }
    }
}
// The scores of a step's keys, j on, into the ring: of the warp's rows, and a group of columns of the rows above
template <typename F>
static __device__ inline void forward_scores(const ForwardBlock<F>& x, const floatX* q_tile, const floatX* k_tile,
                                             int j, float scale) {
    const int warp = threadIdx.x / WARP_SIZE;
    float c[F::GROUPS][4] = {}, above[1][4] = {};
    if (j <= x.row0 + 15) { rows_product<F::WIDTH, 1, F::GROUPS, F::PITCH>(&c, q_tile, k_tile); }
    forward_scores_put<F, F::GROUPS>(x, c, x.row0, j, scale);
    rows_product<F::WIDTH, 1, 1, F::PITCH>(&above, x.q_rows, k_tile + 8 * warp * F::PITCH);
    forward_scores_put<F, 1>(x, above, x.i0 - F::HALO, j + 8 * warp, scale);
}
// Logits of keys before the first, which a convolution's lag brings, and after the query
template <typename F> static __device__ inline void forward_mask(float (*c)[4], int j0, int row) {
    UNROLL
    for (int x = 0; x < 4 * F::GROUPS; x++) {
        int e = x % 4, key = j0 + x / 4 * 8 + lane_column() + e % 2;
        if (key < 0 || key > row + e / 2 * 8) { c[x / 4][e] = -INFINITY; }
    }
}
// c becomes exp(c * unit - maximum), in powers of 2, with the maximum of all keys so far; what was summed with a
// smaller one is scaled down. top, sum: of this lane's two rows
template <typename F>
static __device__ inline void forward_softmax(float (*c)[4], float (*out)[4], float* top, float* sum, float unit) {
    UNROLL
    for (int r = 0; r < 2; r++) {
        float high = -INFINITY;
        UNROLL
        for (int g = 0; g < F::GROUPS; g++) { high = fmaxf(high, fmaxf(c[g][2 * r], c[g][2 * r + 1])); }
        high = fmaxf(top[r], quad_max(high));
        float base = high == -INFINITY ? 0.0f : high * unit, factor = exponential2(top[r] * unit - base), partial = 0;
        top[r] = high;
        UNROLL
        for (int g = 0; g < F::GROUPS; g++) {
            UNROLL
            for (int e = 2 * r; e < 2 * r + 2; e++) { partial += c[g][e] = exponential2(c[g][e] * unit - base); }
        }
        sum[r] = sum[r] * factor + partial;
        UNROLL
        for (int g = 0; g < F::OUT_GROUPS; g++) { out[g][2 * r] *= factor, out[g][2 * r + 1] *= factor; }
    }
}
// out += P Vcat; two groups of P are the operand a as they stand
template <typename F>
static __device__ inline void forward_values(float (*out)[4], const float (*c)[4], const floatX* v_tile) {
    UNROLL
    for (int k = 0; k < FLASH_KEYS / 16; k++) {
        const float *left = c[2 * k], *right = c[2 * k + 1];
        unsigned a[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]), pack_bf16(right[0], right[1]),
                         pack_bf16(right[2], right[3])},
                 b[4];
        UNROLL
        for (int g = 0; g < F::OUT_GROUPS; g += 2) {
            load_b_transposed<F::PITCH>(b, v_tile + (g / (F::WIDTH / 8) * FLASH_KEYS + 16 * k) * F::PITCH +
                                               g % (F::WIDTH / 8) * 8);
            mma_bf16(out[g], a, b[0], b[1]);
            mma_bf16(out[g + 1], a, b[2], b[3]);
        }
    }
}
// z and the statistics of the warp's rows. A row with a score that the chunks' fp16 could not hold is NaN here as
// there: its gradient would be the rounding of P times such scores.
template <typename F>
static __device__ inline void forward_store(floatX* z, float* stats, const ForwardBlock<F>& x, const float (*out)[4],
                                            const float* top, const float* sum, const Flash& f) {
    UNROLL
    for (int r = 0; r < 2; r++) {
        int i = x.row0 + lane_row() + 8 * r;
        float max = F::CQ > 0 ? top[r] : top[r] * f.scale, all = quad_sum(sum[r]),
              inverse = max < SCORES_END ? 1.0f / all : NAN;
        if (i >= f.T) { continue; }
        if (threadIdx.x % 4 == 0) {
            float* kept = stats + 2 * ((size_t)x.head * f.T + i);
            kept[0] = max, kept[1] = inverse;
        }
        UNROLL
        for (int g = 0; g < F::OUT_GROUPS; g++) {
            int o = g / (F::WIDTH / 8), c = g % (F::WIDTH / 8) * 8 + lane_column();
            if (c < f.HS) {
                *reinterpret_cast<unsigned*>(z + (x.head - x.group) * f.z_part +
                                             ((size_t)(x.group + o) * f.T + i) * f.HS + c) =
                    pack_bf16(out[g][2 * r] * inverse, out[g][2 * r + 1] * inverse);
            }
        }
    }
}
template <int WIDTH, int CH, int CQ>
static __global__ void __launch_bounds__(FLASH_THREADS, 1) flash_forward_kernel(floatX* z, float* stats, Flash f) {
    typedef FlashForward<WIDTH, CH, CQ> F;
    DYNAMIC_SHARED(floatX, shared);
    const ForwardBlock<F> x = forward_block<F>(shared, f);
    const int warp = threadIdx.x / WARP_SIZE, last = min_int(x.i0 + F::ROWS, f.T) - 1,
              steps = (last + F::LAG) / FLASH_KEYS + 1;
    const float unit = CQ ? LOG2E : LOG2E * f.scale;  // to logarithms of 2: the convolution's input is scaled already
    float out[F::OUT_GROUPS][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    rows_load<WIDTH, F::PITCH, F::ROWS + F::HALO>(x.q_rows, f.q + (size_t)x.head * f.T * f.HS, x.i0 - F::HALO, f.T,
                                                  f.HS);
    forward_load(x, f, 0);
    if constexpr (CQ > 0) { forward_conv_begin(x, f); }

    for (int step = 0; step < steps; step++) {
        const int j0 = step * FLASH_KEYS - F::LAG;  // first key of the logits
        const floatX *k_tile = x.k_rows + step % 2 * F::K, *v_tile = x.v_rows + step % 2 * F::V,
                     *q_tile = x.q_rows + (F::HALO + 16 * warp) * F::PITCH;
        copy_wait<0>();
        __syncthreads();  // this step's keys are there, and all have left the other half of the buffers and of the ring
        if (step + 1 < steps) { forward_load(x, f, step + 1); }
        if constexpr (CQ > 0) {
            forward_scores(x, q_tile, k_tile, j0 + F::LAG, f.scale);
            __syncthreads();  // the scores of all rows are there
        }

        // From here on each warp is for itself; the barriers are above.
        if (j0 > x.row0 + 15) { continue; }
        float c[F::GROUPS][4] = {};
        if constexpr (CQ > 0) {
            conv_product<CQ, F::GROUPS, -1, F::RING_PITCH, F::RING>(c, x.scores + (F::HALO + 16 * warp) * F::RING_PITCH,
                                                                    j0 + F::RING - 8, x.bands);
        } else {
            rows_product<WIDTH, 1, F::GROUPS, F::PITCH>(&c, q_tile, k_tile);
        }
        if (j0 < 0 || j0 + FLASH_KEYS - 1 > x.row0) { forward_mask<F>(c, j0, x.row0 + lane_row()); }
        forward_softmax<F>(c, out, top, sum, unit);
        forward_values<F>(out, c, v_tile);
    }
    forward_store<F>(z, stats, x, out, top, sum, f);
}

// Before the backward kernel, for each row: dots (S,NH,T) D_n = sum_o dO_o . W[o,n] Z_n[block o] = sum_j P dP, what
// softmax's gradient subtracts; parts (S,NH/CH,blocks,CH*CH) of dW[o,n] = sum_i dO_o . Z_n[block o]; bounds (S,NH,2),
// as bits of floats that only grow: the longest row of dZ_n and of Vcat; and, unless dz is NULL, dz (CH parts) W[o,n]
// dO_o, which cuDNN reads. CH = 1: there is no mixing. A warp owns a row of all heads of a group, a lane 4 elements
// of each.
template <int CH>
static __global__ void flash_prepare_kernel(floatX* dz, float* dots, unsigned* bounds, float* parts, const floatX* dout,
                                            const floatX* z, Flash f) {
    DYNAMIC_SHARED(float, sums);  // (warps, CH*CH)
    const int T = f.T, HS = f.HS, warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, e0 = lane * 4;
    const int groups = f.NH / CH, group = blockIdx.z * f.NH + blockIdx.y * CH;
    const float* W = f.mix + (size_t)blockIdx.y * CH * CH;
    float dW[CH][CH] = {}, longest_dz[CH] = {}, longest_v = 0;
    for (int i = blockIdx.x * ROW_WARPS + warp; i < T; i += gridDim.x * ROW_WARPS) {
        float dot[CH] = {}, squares_dz[CH] = {}, squares_v = 0;
        UNROLL
        for (int o = 0; o < CH; o++) {
            size_t at = ((size_t)(group + o) * T + i) * HS + e0;
            Pack<floatX, 4> d = {}, v = {};
            if (e0 < HS) { d = load<4>(dout + at), v = load<4>(f.v + at); }
            float squares = 0;
            for (int e = 0; e < 4; e++) {
                squares += (float)d.v[e] * (float)d.v[e], squares_v += (float)v.v[e] * (float)v.v[e];
            }
            UNROLL
            for (int n = 0; n < CH; n++) {
                float w = CH > 1 ? W[o * CH + n] : 1.0f, r = 0;
                if (e0 < HS) {
                    Pack<floatX, 4> x = load<4>(z + n * f.z_part + at), y;
                    for (int e = 0; e < 4; e++) {
                        r += (float)d.v[e] * (float)x.v[e], y.v[e] = (floatX)(w * (float)d.v[e]);
                    }
                    if (CH > 1 && dz) { store<4>(dz + n * f.dz_part + at, y); }
                }
                dot[n] += w * r, dW[o][n] += r, squares_dz[n] += w * w * squares;
            }
        }
        longest_v = fmaxf(longest_v, warp_sum(squares_v));
        UNROLL
        for (int n = 0; n < CH; n++) {
            float d = warp_sum(dot[n]);
            longest_dz[n] = fmaxf(longest_dz[n], warp_sum(squares_dz[n]));
            if (lane == 0) { dots[(size_t)(group + n) * T + i] = d; }
        }
    }
    UNROLL
    for (int n = 0; n < CH; n++) {
        if (lane == 0) {
            atomicMax(bounds + 2 * (group + n), __float_as_uint(sqrtf(longest_dz[n])));
            atomicMax(bounds + 2 * (group + n) + 1, __float_as_uint(sqrtf(longest_v)));
        }
        UNROLL
        for (int o = 0; o < CH; o++) {
            float d = warp_sum(dW[o][n]);
            if (lane == 0) { sums[warp * CH * CH + o * CH + n] = d; }
        }
    }
    if (CH == 1) { return; }  // nothing was mixed
    __syncthreads();          // the sums of all warps are there
    if (threadIdx.x < CH * CH) {
        float d = 0;
        for (int w = 0; w < ROW_WARPS; w++) { d += sums[w * CH * CH + threadIdx.x]; }
        parts[(((size_t)blockIdx.z * groups + blockIdx.y) * gridDim.x + blockIdx.x) * CH * CH + threadIdx.x] = d;
    }
}

// Backward. Outputs, all in fp32: dk (S,NH,T,HS), dv (CH parts), dq (splits,S,NH,T,HS), and parts
// (S,NH,splits,cq*ck) of the convolution's gradient. They are set, not added to; part p of dq is written from query
// p * FLASH_KEYS on, and not above.
//
// Block (split, head, sequence) takes the blocks of 64 keys split, split + splits, ..., one after another. What a block
// of keys sums up stays in registers while the queries stream past. Only one block of the grid adds to its part of dq,
// and the same thread to an element at every block of keys, so the order of each sum is fixed.
//
// For each tile of queries:
//   1. the scores S;
//   2. P, dP = dZ Vcat^T, dL = P (dP - D);
//   3. dV += P^T dZ; dS is the transposed convolution of dL; dtheta;
//   4. dK += dS^T Q, dq += dS K.
//
// With pairs of heads dZ_n[block o] = W[o,n] dO_o. V is multiplied by W where a block of keys begins, and dV at its
// end. So it is dO itself that streams past, the same rows for both heads.
//
// With a convolution S takes 16 more keys on both sides of the block, and 16 more rows above the tile. dL takes 8 more
// keys, and 8 more rows below the tile, which are carried from the tile before: a row of dS needs the rows of dL below
// it, so the queries come from the last to the first. Without a convolution every other block of keys takes them from
// the first to the last: it begins with what the block before it left in the L2 cache.
//
// Warps are 4 (queries; for dK and dV keys) by 2 (columns).
template <int WIDTH_, int CH_, int CQ_, int R> struct FlashBackward {
    enum {
        WIDTH = WIDTH_,
        CH = CH_,
        CQ = CQ_,
        ROWS = R,    // queries of a tile: 64 or 128, flash_rows
        M = R / 64,  // products of 16 rows a warp has side by side
        PITCH = WIDTH + 8,
        KEYS_PITCH = FLASH_KEYS + 8,
        K_GROUPS = WIDTH / 16  // groups of columns of a warp in (3) and (4)
    };
    enum {
        HALO = CQ_ ? 16 : 0,
        SIDE = CQ_ ? 8 : 0,
        NEAR = FLASH_KEYS + 2 * SIDE,
        FAR = FLASH_KEYS + 4 * SIDE,
        NEAR_PITCH = NEAR + 8,
        FAR_PITCH = FAR + 8
    };
    enum { GROUPS = NEAR / 16, BANDS = 3 * CQ * WARP_SIZE };  // groups of columns of a warp in (2)
    enum {
        K = FAR * PITCH,
        V = NEAR * PITCH,
        Q = (ROWS + HALO) * PITCH,
        DOUT = ROWS * PITCH,
        TILE = ROWS * KEYS_PITCH
    };
    enum { SCORES = CQ_ ? (ROWS + HALO) * FAR_PITCH : 0, DLOGITS = CQ_ ? (ROWS + 8) * NEAR_PITCH : 0 };
    enum { BYTES = 2 * (K + CH * V + 2 * Q + CH * DOUT + 2 * TILE + SCORES + DLOGITS) + 4 * 2 * BANDS };
};
// A block's place and its shared memory
template <typename F> struct BackwardBlock {
    floatX *k_rows, *v_rows, *q_rows, *dout_rows, *att, *dscores;
    half *scores, *dlogits;
    unsigned* bands;          // those of the convolution, then of its transpose
    int head, group, wr, wc;  // the head, the first one of its group; the warp's rows and columns
    float gain;               // of dL in fp16: |dL| <= 2 |dZ| |V| becomes at most 2^15
};
template <typename F>
static __device__ inline BackwardBlock<F> backward_block(floatX* shared, const unsigned* bounds, const Flash& f) {
    BackwardBlock<F> x;
    x.k_rows = shared, x.v_rows = x.k_rows + F::K, x.q_rows = x.v_rows + F::CH * F::V;
    x.dout_rows = x.q_rows + 2 * F::Q, x.att = x.dout_rows + F::CH * F::DOUT, x.dscores = x.att + F::TILE;
    x.scores = reinterpret_cast<half*>(x.dscores + F::TILE), x.dlogits = x.scores + F::SCORES;
    x.bands = reinterpret_cast<unsigned*>(x.dlogits + F::DLOGITS);
    x.head = blockIdx.z * f.NH + blockIdx.y, x.group = x.head / F::CH * F::CH;
    x.wr = threadIdx.x / WARP_SIZE % 4, x.wc = threadIdx.x / WARP_SIZE / 4;
    x.gain = 1;
    if constexpr (F::CQ > 0) {
        float bound = 2 * __uint_as_float(bounds[2 * x.head]) * __uint_as_float(bounds[2 * x.head + 1]);
        x.gain = bound > 0 ? exp2f(fminf(fmaxf(floorf(15 - log2f(bound)), -60.0f), 60.0f)) : 1;
    }
    return x;
}
// The keys and values of a block of keys
template <typename F>
static __device__ inline void backward_load_keys(const BackwardBlock<F>& x, const Flash& f, int j0) {
    const size_t size = (size_t)f.T * f.HS;
    rows_load<F::WIDTH, F::PITCH, F::FAR>(x.k_rows, f.k + x.head * size, j0 - 2 * F::SIDE, f.T, f.HS);
    UNROLL
    for (int o = 0; o < F::CH; o++) {
        rows_load<F::WIDTH, F::PITCH, F::NEAR>(x.v_rows + o * F::V, f.v + (x.group + o) * size, j0 - F::SIDE, f.T,
                                               f.HS);
    }
}
template <typename F>
static __device__ inline void backward_load_queries(const BackwardBlock<F>& x, const Flash& f, int tile) {
    rows_load<F::WIDTH, F::PITCH, F::ROWS + F::HALO>(x.q_rows + tile % 2 * F::Q, f.q + (size_t)x.head * f.T * f.HS,
                                                     tile * F::ROWS - F::HALO, f.T, f.HS);
}
template <typename F>
static __device__ inline void backward_load_dout(const BackwardBlock<F>& x, const floatX* dout, const Flash& f,
                                                 int tile) {
    UNROLL
    for (int o = 0; o < F::CH; o++) {
        rows_load<F::WIDTH, F::PITCH, F::ROWS>(x.dout_rows + o * F::DOUT, dout + (size_t)(x.group + o) * f.T * f.HS,
                                               tile * F::ROWS, f.T, f.HS);
    }
}
// W V of the keys that this thread has copied
template <typename F> static __device__ inline void backward_mix_values(const BackwardBlock<F>& x, const Flash& f) {
    UNROLL
    for (int o = 0; o < F::CH; o++) {
        rows_scale<F::WIDTH, F::PITCH, F::NEAR>(x.v_rows + o * F::V, flash_mix(f, o, x.head - x.group));
    }
}

// (1) fp16 scores of 16 rows from r0 on and some groups of columns from c0 on, as forward_scores_put
template <typename F, int GROUPS>
static __device__ inline void backward_scores_put(const BackwardBlock<F>& x, const float (*c)[4], int r0, int c0,
                                                  int i0, int j0, float scale) {
    UNROLL
    for (int g = 0; g < GROUPS; g++) {
        UNROLL
        for (int e = 0; e < 4; e += 2) {
            int r = r0 + lane_row() + 4 * e, column = c0 + 8 * g + lane_column(),
                back = i0 - F::HALO + r - (j0 - 2 * F::SIDE + column);
            *reinterpret_cast<unsigned*>(x.scores + r * F::FAR_PITCH + column) =
                pack_scores(back >= 0 ? c[g][e] * scale : 0.0f, back >= 1 ? c[g][e + 1] * scale : 0.0f);
        }
    }
}
// The scores of a tile's queries and of the 16 above them
template <typename F>
static __device__ inline void backward_scores(const BackwardBlock<F>& x, const floatX* q_tile, int i0, int j0,
                                              float scale) {
    const int warp = threadIdx.x / WARP_SIZE;
    float c[6][4] = {}, above[2][4] = {};
    rows_product<F::WIDTH, 1, 6, F::PITCH>(&c, q_tile + (F::HALO + 16 * x.wr) * F::PITCH,
                                           x.k_rows + 48 * x.wc * F::PITCH);
    backward_scores_put<F, 6>(x, c, F::HALO + 16 * x.wr, 48 * x.wc, i0, j0, scale);
    if (warp < 6) {
        rows_product<F::WIDTH, 1, 2, F::PITCH>(&above, q_tile, x.k_rows + 16 * warp * F::PITCH);
        backward_scores_put<F, 2>(x, above, 0, 16 * warp, i0, j0, scale);
    }
}

// (2) Of this lane's rows: log2 of the sum of exponentials, and D
template <typename F>
static __device__ inline void backward_rows(float* lse, float* dot, const BackwardBlock<F>& x, const float* stats,
                                            const float* dots, int i0, int T) {
    UNROLL
    for (int r = 0; r < 2 * F::M; r++) {
        int query = i0 + 16 * (F::M * x.wr + r / 2) + lane_row() + r % 2 * 8, i = x.head * T + min_int(query, T - 1);
        Pack<float, 2> s = load<2>(stats + 2 * (size_t)i);  // maximum, 1 / sum
        lse[r] = s.v[0] * LOG2E - log2f(s.v[1]), dot[r] = dots[i];
    }
}
// Logits p and d = dP of the warp's rows and columns
template <typename F>
static __device__ inline void backward_logits(float (*p)[F::GROUPS][4], float (*d)[F::GROUPS][4],
                                              const BackwardBlock<F>& x, const floatX* q_tile) {
    const int row = 16 * F::M * x.wr, column = 8 * F::GROUPS * x.wc;
    UNROLL
    for (int o = 0; o < F::CH; o++) {
        rows_product<F::WIDTH, F::M, F::GROUPS, F::PITCH>(d, x.dout_rows + o * F::DOUT + row * F::PITCH,
                                                          x.v_rows + o * F::V + column * F::PITCH);
    }
    if constexpr (F::CQ > 0) {
        conv_product<F::CQ, F::GROUPS, -1, F::FAR_PITCH, 0>(p[0], x.scores + (F::HALO + row) * F::FAR_PITCH, column,
                                                            x.bands);
    } else {
        rows_product<F::WIDTH, F::M, F::GROUPS, F::PITCH>(p, q_tile + row * F::PITCH, x.k_rows + column * F::PITCH);
    }
}
// Over the diagonal, before key 0 or below the last query there is no P; row 0 has one key, so that its P is constant.
template <typename F>
static __device__ inline void backward_mask(float (*p)[F::GROUPS][4], float (*d)[F::GROUPS][4], const float* dot,
                                            int upper, int left, int T) {
    UNROLL
    for (int x = 0; x < 4 * F::M * F::GROUPS; x++) {
        int m = x / 4 / F::GROUPS, g = x / 4 % F::GROUPS, e = x % 4, query = upper + 16 * m + lane_row() + e / 2 * 8,
            key = left + 8 * g + lane_column() + e % 2;
        if (key < 0 || key > query || query >= T) { p[m][g][e] = -INFINITY; }
        if (query == 0) { d[m][g][e] = dot[2 * m + e / 2]; }
    }
}
// P of the block's own keys, and dL = P (dP - D): in fp16 with the keys to both sides for the convolution, else as dS
template <typename F>
static __device__ inline void backward_softmax(const BackwardBlock<F>& x, const float (*p)[F::GROUPS][4],
                                               const float (*d)[F::GROUPS][4], const float* lse, const float* dot,
                                               float unit) {
    UNROLL
    for (int y = 0; y < 2 * F::M; y++) {
        const int m = y / 2, e = y % 2 * 2, r = 16 * (F::M * x.wr + m) + lane_row() + 4 * e;
        UNROLL
        for (int g = 0; g < F::GROUPS; g++) {
            int column = 8 * (F::GROUPS * x.wc + g) + lane_column(), own = column - F::SIDE;
            float own_p[2], own_d[2];
            UNROLL
            for (int z = 0; z < 2; z++) {
                own_p[z] = exponential2(p[m][g][e + z] * unit - lse[y]);
                own_d[z] = own_p[z] * (d[m][g][e + z] - dot[y]) * x.gain;
            }
            if (own >= 0 && own < FLASH_KEYS) {
                *reinterpret_cast<unsigned*>(x.att + r * F::KEYS_PITCH + own) = pack_bf16(own_p[0], own_p[1]);
            }
            if (F::CQ > 0) {
                *reinterpret_cast<unsigned*>(x.dlogits + r * F::NEAR_PITCH + column) = pack_half(own_d[0], own_d[1]);
            } else {
                *reinterpret_cast<unsigned*>(x.dscores + r * F::KEYS_PITCH + column) = pack_bf16(own_d[0], own_d[1]);
            }
        }
    }
}

// (3) dS, the transposed convolution of dL
template <typename F> static __device__ inline void backward_conv(const BackwardBlock<F>& x, int i0, int j0) {
    float c[4][4] = {}, ungain = 1 / x.gain;
    conv_product<F::CQ, 4, 1, F::NEAR_PITCH, 0>(c, x.dlogits + 16 * x.wr * F::NEAR_PITCH, 32 * x.wc,
                                                x.bands + F::BANDS);
    UNROLL
    for (int g = 0; g < 4; g++) {
        UNROLL
        for (int e = 0; e < 4; e += 2) {
            int r = 16 * x.wr + lane_row() + 4 * e, column = 32 * x.wc + 8 * g + lane_column(),
                back = i0 + r - (j0 + column);
            *reinterpret_cast<unsigned*>(x.dscores + r * F::KEYS_PITCH + column) =
                pack_bf16(back >= 0 ? c[g][e] * ungain : 0.0f, back >= 1 ? c[g][e + 1] * ungain : 0.0f);
        }
    }
}
// theta [two taps x 8 columns of S] x 24 columns of dL += S^T dL of 16 rows and the warp's 4 groups of own keys
template <typename F> static __device__ inline void backward_theta(float (*theta)[3][4], const BackwardBlock<F>& x) {
    const int lane = threadIdx.x % WARP_SIZE;
    unsigned d[2][4];
    UNROLL
    for (int g = 0; g < 2; g++) {
        load_b_transposed<F::NEAR_PITCH>(d[g], x.dlogits + 16 * x.wr * F::NEAR_PITCH + F::SIDE + 32 * x.wc + 16 * g);
    }
    UNROLL
    for (int s = 0; s < 6; s++) {  // the groups of S that touch them: group s the dL groups s-2, s-1 and s
        UNROLL
        for (int u = 0; u < F::CQ; u += 2) {
            unsigned a[4];  // S transposed: rows 0-7 of tap u, of tap u+1, then rows 8-15
            int tap = u + lane / 8 % 2;
            ldmatrix_transposed(a, x.scores + (F::HALO + 16 * x.wr - tap + lane / 16 * 8 + lane % 8) * F::FAR_PITCH +
                                       F::SIDE + 32 * x.wc + 8 * s);
            UNROLL
            for (int b = 0; b < 3; b++) {
                int g = s - 2 + b;
                if (g >= 0 && g < 4) { mma_half(theta[u / 2][b], a, d[g / 2][g % 2 * 2], d[g / 2][g % 2 * 2 + 1]); }
            }
        }
    }
}
// 8 rows of dL below the tile's last: zeros, or `carried`, the tile's first rows, since queries come upwards
template <typename F> static __device__ inline void backward_rows_below(const BackwardBlock<F>& x, bool carried) {
    for (int t = threadIdx.x; t < 8 * F::NEAR / 2; t += FLASH_THREADS) {
        unsigned* at =
            reinterpret_cast<unsigned*>(x.dlogits + t / (F::NEAR / 2) * F::NEAR_PITCH + t % (F::NEAR / 2) * 2);
        at[F::ROWS * F::NEAR_PITCH / 2] = carried ? *at : 0;
    }
}

// (4) dq += dS K for the tile's rows, = if nothing has been written there yet; HS is a multiple of 8
template <typename F>
static __device__ inline void backward_dq(float* dq, const BackwardBlock<F>& x, const Flash& f, int i0, bool add) {
    float c[F::M][F::K_GROUPS][4] = {};
    columns_product<FLASH_KEYS, F::M, F::K_GROUPS, false, F::KEYS_PITCH, F::PITCH>(
        c, x.dscores + 16 * F::M * x.wr * F::KEYS_PITCH, x.k_rows + 2 * F::SIDE * F::PITCH + F::WIDTH / 2 * x.wc);
    UNROLL
    for (int y = 0; y < 2 * F::M; y++) {
        int i = i0 + 16 * (F::M * x.wr + y / 2) + lane_row() + y % 2 * 8, e = y % 2 * 2;
        float* row = dq + (size_t)i * f.HS + F::WIDTH / 2 * x.wc + lane_column();
        UNROLL
        for (int g = 0; g < F::K_GROUPS; g++) {
            Pack<float, 2> sum = {{c[y / 2][g][e] * f.scale, c[y / 2][g][e + 1] * f.scale}};
            bool valid = i < f.T && F::WIDTH / 2 * x.wc + 8 * g < f.HS;
            add_pair(row + 8 * g, sum.v[0], sum.v[1], valid && add);
            if (valid && !add) { store<2>(row + 8 * g, sum); }
        }
    }
}
// Sums c of 16 keys from j on and the groups of columns from `column` on
template <typename F>
static __device__ inline void backward_store(floatX* to, const float (*c)[4], int j, int column, float scale,
                                             const Flash& f) {
    UNROLL
    for (int g = 0; g < F::K_GROUPS; g++) {
        UNROLL
        for (int e = 0; e < 4; e += 2) {
            int key = j + lane_row() + 4 * e, at = column + 8 * g + lane_column();
            if (key < f.T && at < f.HS) {
                *reinterpret_cast<unsigned*>(to + (size_t)key * f.HS + at) =
                    pack_bf16(c[g][e] * scale, c[g][e + 1] * scale);
            }
        }
    }
}
// parts (cq*ck) of the block: dtheta[u,v] is the diagonal v = column of dL - column of S of what the 8 warps have
template <typename F>
static __device__ inline void backward_theta_store(float* parts, const float (*theta)[3][4], const BackwardBlock<F>& x,
                                                   const Flash& f) {
    float* sums = reinterpret_cast<float*>(x.q_rows);  // (8, 8 CQ, 24)
    const int warp = threadIdx.x / WARP_SIZE;
    __syncthreads();  // all have left the queries
    UNROLL
    for (int y = 0; y < F::CQ / 2 * 3 * 4; y++) {
        int u = y / 12, b = y / 4 % 3, e = y % 4;
        sums[(warp * 8 * F::CQ + 16 * u + lane_row() + e / 2 * 8) * 24 + 8 * b + lane_column() + e % 2] =
            theta[u][b][e];
    }
    __syncthreads();  // and those of all warps are there
    for (int t = threadIdx.x; t < f.cq * f.ck; t += FLASH_THREADS) {
        int u = f.cq - 1 - t / f.ck, v = (f.ck - 1) / 2 - t % f.ck;
        float sum = 0;
        for (int w = 0; w < FLASH_WARPS; w++) {
            for (int c = 0; c < 8; c++) { sum += sums[(w * 8 * F::CQ + 8 * u + c) * 24 + v + 8 + c]; }
        }
        parts[t] = sum * (1 / x.gain);
    }
}

template <int WIDTH, int CH, int CQ, int R>
static __global__ void __launch_bounds__(FLASH_THREADS, 1)
    flash_backward_kernel(float* dq, floatX* dk, floatX* dv, float* parts, const floatX* dout, const float* stats,
                          const float* dots, const unsigned* bounds, Flash f) {
    typedef FlashBackward<WIDTH, CH, CQ, R> F;
    DYNAMIC_SHARED(floatX, shared);
    const BackwardBlock<F> x = backward_block<F>(shared, bounds, f);
    const size_t size = (size_t)f.T * f.HS, all = (size_t)f.S * f.NH * size;
    const float unit = CQ ? LOG2E : LOG2E * f.scale;
    float theta[CQ ? CQ / 2 : 1][3][4] = {};
    if constexpr (CQ > 0) {
        if (threadIdx.x < 2 * WARP_SIZE) {
            toeplitz<CQ>(x.bands + x.wr * F::BANDS, f.conv + (size_t)blockIdx.y * f.cq * f.ck, f.cq, f.ck, x.wr == 1);
        }
    }

    // What a warp gathers: of dK 16 keys from 16 wr on and half wc of the columns; of dV 16 CH keys and half the
    // columns of one block of values
    const int v_key = CH == 1 ? 16 * x.wr : 32 * (x.wr % 2), v_block = CH == 1 ? 0 : x.wc,
              v_column = WIDTH / 2 * (CH == 1 ? x.wc : x.wr / 2);
    const int final = (f.T - 1) / F::ROWS;
    bool up = true;  // from the last query to the first

    for (int j0 = blockIdx.x * FLASH_KEYS; j0 < f.T; j0 += gridDim.x * FLASH_KEYS) {
        const int first = j0 / F::ROWS, step = up ? -1 : 1;
        int tile = up ? final : first;
        __syncthreads();  // all have left the keys before
        backward_load_keys(x, f, j0);
        backward_load_queries(x, f, tile);
        copy_commit();
        backward_load_dout(x, dout, f, tile);
        copy_commit();
        if constexpr (CQ > 0) { backward_rows_below(x, false); }
        if constexpr (CH > 1) {
            copy_wait<1>();  // for this thread's keys and values; the barrier that shows them to others comes with dO
            backward_mix_values(x, f);
        }
        float dv_sum[CH][F::K_GROUPS][4] = {}, dk_sum[1][F::K_GROUPS][4] = {};

        for (int left = final - first; left >= 0; left--, tile += step) {  // tiles still to come after this one
            const int i0 = tile * F::ROWS, upper = i0 + 16 * F::M * x.wr, near = j0 - F::SIDE + 8 * F::GROUPS * x.wc;
            const floatX* q_tile = x.q_rows + tile % 2 * F::Q;
            // commits in flight, oldest first: queries of this tile, its dZ
            if (CQ) {
                copy_wait<1>();
            } else {
                copy_wait<0>();
            }
            __syncthreads();  // they are there, and all have left the tile before
            if (left > 0) { backward_load_queries(x, f, tile + step); }
            copy_commit();
            if constexpr (CQ > 0) {
                backward_scores(x, q_tile, i0, j0, f.scale);
                copy_wait<1>();
                __syncthreads();  // the scores of all rows are there, and dZ
            }

            // lse and dot are asked for before the products that hide the wait.
            float p[F::M][F::GROUPS][4] = {}, d[F::M][F::GROUPS][4] = {}, lse[2 * F::M], dot[2 * F::M];
            backward_rows<F>(lse, dot, x, stats, dots, i0, f.T);
            backward_logits<F>(p, d, x, q_tile);
            if (near < 0 || near + 8 * F::GROUPS > upper || upper + 16 * F::M > f.T) {
                backward_mask<F>(p, d, dot, upper, near, f.T);
            }
            backward_softmax<F>(x, p, d, lse, dot, unit);
            __syncthreads();  // P and dL of all rows are there
            if constexpr (CQ > 0) {
                backward_conv(x, i0, j0);
                backward_theta<F>(theta, x);
            }
            columns_product<F::ROWS, CH, F::K_GROUPS, true, F::KEYS_PITCH, F::PITCH>(
                dv_sum, x.att + v_key, x.dout_rows + v_block * F::DOUT + v_column);
            __syncthreads();  // dS is there, and all have left dZ
            if (left > 0) { backward_load_dout(x, dout, f, tile + step); }
            copy_commit();
            if constexpr (CQ > 0) { backward_rows_below(x, true); }
            columns_product<F::ROWS, 1, F::K_GROUPS, true, F::KEYS_PITCH, F::PITCH>(
                dk_sum, x.dscores + 16 * x.wr, q_tile + F::HALO * F::PITCH + WIDTH / 2 * x.wc);
            backward_dq(dq + blockIdx.x * all + x.head * size, x, f, i0, j0 != (int)blockIdx.x * FLASH_KEYS);
        }
        backward_store<F>(dk + x.head * size, dk_sum[0], j0 + 16 * x.wr, WIDTH / 2 * x.wc, f.scale, f);
        UNROLL
        for (int m = 0; m < CH; m++) {
            backward_store<F>(dv + (x.head - x.group) * all + (x.group + v_block) * size, dv_sum[m],
                              j0 + v_key + 16 * m, v_column, CH > 1 ? flash_mix(f, v_block, x.head - x.group) : 1.0f,
                              f);
        }
        if (!CQ) { up = !up; }
    }
    if constexpr (CQ > 0) {
        backward_theta_store(parts + ((size_t)x.head * gridDim.x + blockIdx.x) * f.cq * f.ck, theta, x, f);
    }
}

// The kernels exist for head sizes up to 64, 96 and 128, with and without the mixing of pairs, with and without a
// convolution (fewer taps are zeros in it). Calls launch(WIDTH, CH, CQ) with the constants that serve.
template <int N> using Constant = std::integral_constant<int, N>;
template <typename Launch> static void flash_pick(int HS, int ch, bool conv, Launch launch) {
    auto heads = [&](auto width, auto taps) {
        if (ch == 2) {
            launch(width, Constant<2>(), taps);
        } else {
            launch(width, Constant<1>(), taps);
        }
    };
    auto taps = [&](auto width) {
        if (conv) {
            heads(width, Constant<FLASH_TAPS>());
        } else {
            heads(width, Constant<0>());
        }
    };
    if (HS <= 64) {
        taps(Constant<64>());
    } else if (HS <= 96) {
        taps(Constant<96>());
    } else {
        taps(Constant<128>());
    }
}

// Calls launch(ROWS) with the queries of a tile of the backward kernel: 128 if its sums are in registers and the rest
// in `shared` bytes of shared memory, else 64 (pairs of head size 96 on an A100).
template <int WIDTH, int CH, int CQ, typename Launch> static void flash_rows(size_t shared, Launch launch) {
    enum { MOST = CQ || WIDTH > 96 ? 64 : 128 };
    if (FlashBackward<WIDTH, CH, CQ, MOST>::BYTES <= shared) {
        launch(Constant<MOST>());
    } else {
        launch(Constant<64>());
    }
}

// Bytes of shared memory that the larger of the two kernels cannot do without
static size_t flash_shared(int HS, int ch, bool conv) {
    size_t bytes = 0;
    flash_pick(HS, ch, conv, [&](auto width, auto heads, auto taps) {
        bytes = std::max<size_t>(FlashForward<width(), heads(), taps()>::BYTES,
                                 FlashBackward<width(), heads(), taps(), 64>::BYTES);
    });
    return bytes;
}

// z (ch parts of (S,NH,T,HS), z_part apart), stats (S,NH,T,2)
static void flash_forward(floatX* z, float* stats, const Flash* f, int ch, Cuda* g) {
    flash_pick(f->HS, ch, f->conv, [&](auto width, auto heads, auto taps) {
        typedef FlashForward<width(), heads(), taps()> F;
        auto fused_forward = flash_forward_kernel<width(), heads(), taps()>;  // benches name launches by it
        allow_shared(fused_forward, F::BYTES);
        LAUNCH(fused_forward, dim3(ceil_div(f->T, F::ROWS), f->NH, f->S), FLASH_THREADS, F::BYTES, g->stream, z, stats,
               *f);
        launchCheck(g->stream);
    });
}

// Time of the backward kernel for so many heads of T tokens, `splits` blocks to a head: tiles of 64 x 64 in the rounds
// that the multiprocessors need, of which the last is as long as the longest block.
static double flash_time(int heads, int T, int splits, int multiprocessors) {
    int n = ceil_div(T, FLASH_KEYS), rounds = ceil_div((size_t)heads * splits, multiprocessors);
    double most = ceil_div(n, splits), longest = most * n - 0.5 * splits * most * (most - 1);
    return (rounds - 1) * 0.5 * n * (n + 1) / splits + longest;
}
// Blocks that share the keys of a head, each with a dq of its own: the fastest; FLASH_SHARE where that costs 5% at
// most, since blocks of a head run side by side and find its queries and dZ in the L2 cache; more only where heads are
// few.
enum { FLASH_SHARE = 2, FLASH_SPLITS = 16 };
static int flash_splits(int S, int NH, int T) {
    int heads = S * NH, m = device_multiprocessors(), best = 1,
        most = min_int(ceil_div(T, FLASH_KEYS), heads * FLASH_SHARE < m ? FLASH_SPLITS : FLASH_SHARE);
    for (int n = 2; n <= most; n++) {
        if (flash_time(heads, T, n, m) < flash_time(heads, T, best, m)) { best = n; }
    }
    double limit = 1.05 * flash_time(heads, T, best, m);
    for (int n = min_int(most, FLASH_SHARE); n > best; n--) {
        if (flash_time(heads, T, n, m) <= limit) { return n; }
    }
    return best;
}
// Of B sequences, S at a time
static double flash_batch_time(int B, int S, int NH, int T) {
    int m = device_multiprocessors();
    double time = B / S * flash_time(S * NH, T, flash_splits(S, NH, T), m);
    return B % S ? time + flash_time(B % S * NH, T, flash_splits(B % S, NH, T), m) : time;
}
enum { PREPARE_BLOCKS = 32 };  // of flash_prepare_kernel for a group of heads of a sequence, at most
static int prepare_blocks(int T) { return min_int(PREPARE_BLOCKS, ceil_div(T, ROW_WARPS)); }

// Gradients of the inputs
typedef struct {
    float* q;       // (splits,S,NH,T,HS); part p from query p * FLASH_KEYS on
    floatX *k, *v;  // (S,NH,T,HS), (ch parts,S,NH,T,HS)
} FlashGradients;

// What the backward pass needs beside them; all scratch
typedef struct {
    floatX* dz;        // (ch parts,S,NH,T,HS); NULL: not wanted
    float* dots;       // (S,NH,T)
    unsigned* bounds;  // (S,NH,2)
    float* parts;      // of the weights' gradients
} FlashScratch;

// dz, dots and bounds of the scratch are set, mix_post of the sums is added to.
static void flash_prepare(const AttentionSums* sums, const floatX* dout, const floatX* z, const Flash* f, int ch,
                          const FlashScratch* s, Cuda* g) {
    int blocks = prepare_blocks(f->T), groups = f->NH / ch;
    cudaCheck(cudaMemsetAsync(s->bounds, 0, (size_t)f->S * f->NH * 2 * sizeof(unsigned), g->stream));
    auto fused_prepare = ch == 2 ? flash_prepare_kernel<2> : flash_prepare_kernel<1>;
    LAUNCH(fused_prepare, dim3(blocks, groups, f->S), ROW_THREADS, ROW_WARPS * ch * ch * sizeof(float), g->stream,
           s->dz, s->dots, s->bounds, s->parts, dout, z, *f);
    launchCheck(g->stream);
    if (ch > 1) { sums_add(sums->mix_post, s->parts, f->S, groups, blocks, ch * ch, g); }
}

// d is set; conv_pre and mix_post of the sums are added to. shared: bytes that a block may have
static void flash_backward(const FlashGradients* d, const AttentionSums* sums, const floatX* dout, const floatX* z,
                           const float* stats, const Flash* f, int ch, size_t shared, const FlashScratch* s, Cuda* g) {
    int splits = flash_splits(f->S, f->NH, f->T);
    flash_prepare(sums, dout, z, f, ch, s, g);
    flash_pick(f->HS, ch, f->conv, [&](auto width, auto heads, auto taps) {
        flash_rows<width(), heads(), taps()>(shared, [&](auto rows) {
            typedef FlashBackward<width(), heads(), taps(), rows()> F;
            auto fused_backward = flash_backward_kernel<width(), heads(), taps(), rows()>;
            allow_shared(fused_backward, F::BYTES);
            LAUNCH(fused_backward, dim3(splits, f->NH, f->S), FLASH_THREADS, F::BYTES, g->stream, d->q, d->k, d->v,
                   s->parts, dout, stats, s->dots, s->bounds, *f);
            launchCheck(g->stream);
        });
    });
    if (f->conv) { sums_add(sums->conv_pre, s->parts, f->S, f->NH, splits, f->cq * f->ck, g); }
}

static void flash_attention_forward(floatX* out, float* stats, const floatX* q, const floatX* k, const floatX* v,
                                    const Attention* a, Cuda* g) {
    size_t sequence = (size_t)a->NH * a->T * a->HS;
    Flash f = {q,     k,     v,     a->conv_pre, a->pair_mix,     a->B, a->T,
               a->NH, a->HS, a->cq, a->ck,       a->B * sequence, 0,    (float)(1.0 / sqrt(a->HS))};
    flash_forward(out, stats, &f, mix_parts(a), g);
}
// S sequences of them
static Flash flash_of(const Heads* x, const Attention* a, int S) {
    size_t sequence = (size_t)a->NH * a->T * a->HS;
    Flash f = {x->q,         x->k,
               x->v,         a->conv_pre,
               a->pair_mix,  S,
               a->T,         a->NH,
               a->HS,        a->cq,
               a->ck,        a->B * sequence,
               S * sequence, (float)(1.0 / sqrt(a->HS))};
    return f;
}
static void flash_attention_backward(const AttentionSums* sums, const floatX* dout, const floatX* out, const Heads* x,
                                     const Attention* a, int S, const AttentionScratch* scratch, Cuda* g) {
    Flash f = flash_of(x, a, S);
    FlashScratch s = {NULL, scratch->dots, scratch->bounds, scratch->parts};
    FlashGradients d = {scratch->dq, (floatX*)scratch->dk, (floatX*)scratch->dv};
    flash_backward(&d, sums, dout, out, x->stats, &f, mix_parts(a), a->shared, &s, g);
}

// ---- attention by cuDNN (mta/attention_cudnn.h), --attention-kernels cudnn
//
// For the layers of the fused kernels that have no convolution, in sequences of the model's own length; others, as
// samples have them, take the fused kernels, since cuDNN compiles a plan for every length. Pairs are what they are
// there: a head with the values of its group side by side. cuDNN wants them as one row of 2*HS, where all else here
// has parts of HS: copied between the two layouts, 21 KB a token and layer forward, 45 backward (HS 96, 16 heads).

static void cudnn_check(bool done, const Error* e, const char* file, int line) {
    if (!done) { cuda_fail(e->text, "cuDNN", file, line); }
}
#define cudnnCheck(call) cudnn_check(call, &e, __FILE__, __LINE__)

// wide (heads,T,2*HS) from parts, or parts from wide. Of a pair of heads, element e of block o of head n's row is
// element e of part n of value head o; parts lie `part` elements apart, 0: the same for both heads. A thread moves 8
// elements, HS a multiple of 8.
enum { PAIR_PACK = 8 };
template <bool WIDEN>
static __global__ void pair_rows_kernel(floatX* wide, floatX* parts, size_t part, int T, int HS, size_t packs) {
    size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= packs) { return; }
    int row = 2 * HS / PAIR_PACK, c = (int)(id % row) * PAIR_PACK, o = c / HS, e = c % HS;
    size_t head = id / row / T, t = id / row % T, n = head % 2;
    floatX* narrow = parts + n * part + ((head - n + o) * T + t) * HS + e;
    if (WIDEN) {
        store<PAIR_PACK>(wide + id * PAIR_PACK, load<PAIR_PACK>(narrow));
    } else {
        store<PAIR_PACK>(narrow, load<PAIR_PACK>(wide + id * PAIR_PACK));
    }
}
template <bool WIDEN>
static void pair_rows(floatX* wide, floatX* parts, size_t part, const Attention* a, int S, Cuda* g) {
    size_t packs = (size_t)S * a->NH * a->T * 2 * a->HS / PAIR_PACK;
    LAUNCH(pair_rows_kernel<WIDEN>, ceil_div(packs, 256), 256, 0, g->stream, wide, parts, part, a->T, a->HS, packs);
    launchCheck(g->stream);
}

// out: as flash_attention_forward leaves it, of S sequences
static void cudnn_attention_forward(floatX* out, const Heads* x, const Attention* a, int S,
                                    const AttentionScratch* scratch, Cuda* g) {
    Error e = {{0}};
    bool pairs = a->pair_mix != NULL;
    AttentionShape s = cudnn_shape(a, S, pairs);
    size_t wide = (size_t)S * a->NH * a->T * 2 * a->HS;
    floatX *v = scratch->wide, *z = scratch->wide + wide;
    if (!pairs) {
        cudnnCheck(attention_cudnn_forward(a->cudnn, out, x->stats, x->q, x->k, x->v, &s, scratch->cudnn, &e));
        return;
    }
    pair_rows<true>(v, (floatX*)x->v, 0, a, S, g);
    cudnnCheck(attention_cudnn_forward(a->cudnn, z, x->stats, x->q, x->k, v, &s, scratch->cudnn, &e));
    pair_rows<false>(z, out, (size_t)a->B * a->NH * a->T * a->HS, a, S, g);
}

// dq, dk and dv (parts) of the scratch are set, all in floatX; mix_post of the sums is added to.
static void cudnn_attention_backward(const AttentionSums* sums, const floatX* dout, const floatX* out, const Heads* x,
                                     const Attention* a, int S, const AttentionScratch* scratch, Cuda* g) {
    Error e = {{0}};
    bool pairs = a->pair_mix != NULL;
    AttentionShape s = cudnn_shape(a, S, pairs);
    size_t sequence = (size_t)a->NH * a->T * a->HS, wide = 2 * S * sequence;
    floatX *dq = (floatX*)scratch->dq, *dk = (floatX*)scratch->dk, *dv = (floatX*)scratch->dv;
    floatX *v_wide = scratch->wide, *z = v_wide + wide, *dz = z + wide, *dv_wide = dz + wide;
    if (!pairs) {
        cudnnCheck(attention_cudnn_backward(a->cudnn, dq, dk, dv, dout, out, x->stats, x->q, x->k, x->v, &s,
                                            scratch->cudnn, &e));
        return;
    }

    // The gradient of the mixing, and through it that of Z.
    Flash f = flash_of(x, a, S);
    FlashScratch prepared = {scratch->dz, scratch->dots, scratch->bounds, scratch->parts};
    flash_prepare(sums, dout, out, &f, 2, &prepared, g);

    pair_rows<true>(v_wide, (floatX*)x->v, 0, a, S, g);
    pair_rows<true>(z, (floatX*)out, f.z_part, a, S, g);
    pair_rows<true>(dz, scratch->dz, f.dz_part, a, S, g);
    cudnnCheck(attention_cudnn_backward(a->cudnn, dq, dk, dv_wide, dz, z, x->stats, x->q, x->k, v_wide, &s,
                                        scratch->cudnn, &e));
    pair_rows<false>(dv_wide, dv, S * sequence, a, S, g);
}
#else  // flash_serves says no to every layer
static int flash_splits(int, int, int) { return 1; }
static double flash_batch_time(int, int, int, int) { return 0; }
static int prepare_blocks(int) { return 0; }
static size_t flash_shared(int, int, bool) { return 0; }
static void flash_attention_forward(floatX*, float*, const floatX*, const floatX*, const floatX*, const Attention*,
                                    Cuda*) {
    assert(false);
}
static void flash_attention_backward(const AttentionSums*, const floatX*, const floatX*, const Heads*, const Attention*,
                                     int, const AttentionScratch*, Cuda*) {
    assert(false);
}
static void cudnn_attention_forward(floatX*, const Heads*, const Attention*, int, const AttentionScratch*, Cuda*) {
    assert(false);
}
static void cudnn_attention_backward(const AttentionSums*, const floatX*, const floatX*, const Heads*, const Attention*,
                                     int, const AttentionScratch*, Cuda*) {
    assert(false);
}
#endif

// Do the fused kernels serve layer l? What stands in the config decides, the device's shared memory (163 KiB of an A100
// are too little for some), and `chunk`: one that is asked for means the chunks.
static bool flash_serves(const Config* c, int l, int chunk) {
    int HS = config_head_size(c), ch = c->attention_type == ATTENTION_DIFF ? 2 : c->head_mix_post_softmax;
    bool conv = config_conv_pre(c, l),
         small = c->kq_conv_query_size <= FLASH_TAPS && c->kq_conv_key_size / 2 <= FLASH_REACH;
    return !EXACT && chunk <= 0 && HS % 8 == 0 && HS <= FLASH_HEAD && !c->head_mix_pre_softmax &&
           !config_conv_post(c, l) && (ch == 0 || ch == 2) && (!conv || small) &&
           flash_shared(HS, ch, conv) <= device_shared();
}

// Does cuDNN serve layer l? chunk CHUNK_CUDNN: where it can
static bool cudnn_serves(const Config* c, int l, int chunk) {
    return chunk == CHUNK_CUDNN && flash_serves(c, l, chunk) && !config_conv_pre(c, l);
}

// The plans of all batches of sequences that a pass of B has: no other is needed while a stream is captured.
static bool cudnn_plans(AttentionCudnn* c, const Attention* a, int B, bool pairs, bool training, Error* e) {
    const int batches[] = {min_int(a->S, B), B % a->S};
    for (int S : batches) {
        AttentionShape s = cudnn_shape(a, S, pairs);
        if (S && (!attention_cudnn_plan(c, &s, false, e) || (training && !attention_cudnn_plan(c, &s, true, e)))) {
            return false;
        }
    }
    return true;
}

// =====================================================================================================================
// Fast paths: the launches of a pass as a CUDA graph
//
// A pass over all layers has thousands of launches if attention is computed chunk by chunk. As a graph they are one
// launch for the host. A graph keeps every pointer, scalar and grid of its capture, so whatever changes from one
// micro-batch to the next is in device memory, or is launched outside of the pass.

typedef struct {
    int calls;
    cudaGraphExec_t graph;  // NULL: not yet, or it would be too large
} Replay;

// What no plan of memory counts: 10 KiB of the GPU's for each node, as NVIDIA says of kernels (CCCL, pull request
// 3768). All graphs together may take GRAPHS_MIB of what memory_check leaves free. Attention in chunks goes beyond it:
// 32 sequences of 4096 tokens of 880m `mta-full` are 75,000 nodes, 740 MiB. Each of them works for so long that the
// launch of the next is hidden anyway.
#if !defined(GRAPH_NODE)
#define GRAPH_NODE (10 << 10)
#endif
enum { GRAPHS_MIB = 256 };

template <typename Pass> static void replay_capture(Replay* r, const Pass& pass, Cuda* g) {
    cudaGraph_t graph = NULL;
    size_t nodes = 0;
    cudaCheck(cudaStreamBeginCapture(g->stream, cudaStreamCaptureModeThreadLocal));
    pass();
    cudaCheck(cudaStreamEndCapture(g->stream, &graph));
    cudaCheck(cudaGraphGetNodes(graph, NULL, &nodes));
    if (g->graph_bytes + nodes * GRAPH_NODE <= (size_t)GRAPHS_MIB << 20) {
        cudaCheck(cudaGraphInstantiate(&r->graph, graph, 0));
        g->graph_bytes += nodes * GRAPH_NODE;
    }
    cudaCheck(cudaGraphDestroy(graph));
}

// Runs pass(), which launches and never waits, with the same arguments at every call: directly at the first call, when
// kernels are loaded and cuBLAS chooses; the second call captures it, and from then on it is replayed; directly again
// where its graph would be too large.
template <typename Pass> static void replay(Replay* r, const Pass& pass, Cuda* g) {
    if (r->calls++ == 1) { replay_capture(r, pass, g); }
    if (r->graph) {
        cudaCheck(cudaGraphLaunch(r->graph, g->stream));
    } else {
        pass();
    }
}

// =====================================================================================================================
// The model: state and memory

// Pointers to one layer's tensors inside an arena (weights or gradients), in the order of TensorKind; NULL where the
// model has none.
template <typename T> struct LayerOf {
    T *input_norm, *q, *k, *v, *o, *kq_conv, *kq_conv_post, *head_mix_pre, *head_mix, *head_norm, *gate_weight,
        *gate_bias;
    T *lambda_q1, *lambda_k1, *lambda_q2, *lambda_k2, *post_norm, *gate_proj, *up_proj, *down_proj;
};

// What the backward pass computes again instead of keeping it: nothing; norms, head outputs and SwiGLU; all of a layer
// but its input. FORWARD_ONLY: there is no backward pass, and no gradients and no optimizer either.
typedef enum { RECOMPUTE_NONE, RECOMPUTE_ELEMENTWISE, RECOMPUTE_BLOCK, FORWARD_ONLY } Recompute;

// What the forward pass keeps for the backward pass. N = B*T rows, all layers behind one another: layer l of x starts
// at l*N*C. LA, LE: layers kept of what RECOMPUTE_BLOCK, and already RECOMPUTE_ELEMENTWISE, computes again: L or 1.
typedef struct {
    Stream x;              // (L+1,N,C) residual stream before each layer, and after the last
    Stream x_mid;          // (LA,N,C) after attention
    floatX *ln1, *ln2;     // (LE,N,C) normalised inputs of attention and MLP
    float *rstd1, *rstd2;  // (LA,N)
    floatX *q, *k, *v;     // (LA,B,NH,T,HS) q and k rotated
    float* stats;          // (LA,B,NH,T,2) maximum and 1 / sum of the score rows
    floatX* att;           // (LA,parts,B,NH,T,HS) output of the heads, in parts where head_output mixes
    floatX* out;           // (LE,N,C) after head_norm and head_gate
    floatX* gate_up;       // (LA,N,2*FF)
    floatX* act;           // (L,N,FF) SwiGLU's result; of what is computed again scratch.act, which dact overwrites
    floatX* ln_f;          // (N,C)
    float* rstd_f;         // (N)
} Activations;

// What no pass keeps.
typedef struct {
    floatX *qkv, *act, *dgate_up;  // (N,(NH+2*NKV)*HS), also its gradient; (N,FF); (N,2*FF)
    floatX* branch;                // (N,C) what a layer adds to the residual stream
    Stream dx;                     // (N,C) the stream's gradient
    floatX* dln;                   // (N,C) gradient of a normalised input
    floatX *dout, *datt;           // (N,C) gradients of the head outputs, of the heads
    floatX* logits;                // (rows of a classifier chunk, V rounded up)
    float* losses;                 // (N)
    unsigned char* wrong;          // (N)
    int *tokens, *targets;         // (N)
    int *rows, *starts;            // (N), (N+1) rows by token, for embedding_backward
    float* parts;                  // partial sums of norm and gate weights
    double* norm_parts;            // (NORM_BLOCKS) of the gradient norm
    float* pair_mix;               // (NH/2,2,2) in fp32: diff's mixing, or a copy of head_mix for the fused kernels
    double* sums;                  // AttentionSums
    AttentionScratch attention;
    float *cosine, *sine;  // (T,HS/2)
    void* workspace;       // cuBLAS' own; what it would allocate itself could not be captured
} Scratch;

typedef struct {
    void** ptr;
    size_t bytes;
} Buffer;

typedef struct {
    Config config;
    TensorList tensors;
    int B, T;              // the largest micro-batch
    int chunk, sequences;  // queries, and sequences, of an attention chunk
    bool flash;            // fused attention where it serves
    bool by_cudnn;         // cuDNN's where that serves
    AttentionCudnn cudnn;
    int att_parts;   // of acts.att
    int logit_rows;  // rows of a classifier chunk
    Recompute recompute;
    floatX* weights;                // arenas of tensors.numel, and some more where ranks have parts of equal size
    float *master, *grads, *m, *v;  // master, m, v: of own elements, side by side; master is weights in fp32
    Ranks* ranks;                   // with which the model is shared out, NULL = none
    int shards;                     // of a step
    float* waiting[MAX_WAITING];    // arenas for gradient sums of shards that wait for their neighbours
    int n_waiting;
    RanksSum sum;   // of gradients, over the ranks
    size_t unsent;  // gradients, the first so many, of a step's last backward pass whose sums have not been begun
    char *activation_memory, *scratch_memory;
    Activations acts;
    Scratch scratch;
    AttentionSums sums;
    unsigned char* wrong;  // (N) on the host: counted targets that another id beats
    float* losses;         // (N) on the host
    int *rows, *starts;    // (N), (N+1) on the host
    bool graphs;           // are passes replayed as graphs?
    Replay forward;        // of layers_forward at B x T
    Replay* backward;      // (L) of layers_backward, by the layer where a part of it ends
    Cuda cuda;
} Model;

// Sets every pointer of the list; with base NULL it only measures, so that size and layout cannot disagree. Returns
// bytes.
static size_t carve(const Buffer* buffers, int n, char* base) {
    size_t offset = 0;
    for (int i = 0; i < n; i++) {
        *buffers[i].ptr = base && buffers[i].bytes ? base + offset : NULL;
        offset += (buffers[i].bytes + 255) / 256 * 256;
    }
    return offset;
}

// Parts of the heads' outputs: 2 where some layer's mixing is left to head_output
static int att_parts(const Config* c, int chunk) {
    bool mixes = c->attention_type == ATTENTION_DIFF || c->head_mix_post_softmax;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        if (mixes && flash_serves(c, l, chunk)) { return 2; }
    }
    return 1;
}

static size_t carve_activations(Activations* a, const Config* c, int B, int T, int chunk, Recompute recompute,
                                char* base) {
    size_t N = (size_t)B * T, L = (size_t)c->num_hidden_layers, NH = (size_t)c->num_attention_heads,
           F = 2 * (size_t)c->intermediate_size;
    size_t LA = recompute >= RECOMPUTE_BLOCK ? 1 : L, LE = recompute == RECOMPUTE_NONE ? L : 1;
    size_t row = N * (size_t)c->hidden_size * sizeof(floatX), f = sizeof(float), low = EXACT ? 0 : row,
           streams = recompute == FORWARD_ONLY ? 1 : L + 1;
#define BUFFER(name, bytes) \
    { (void**)&a->name, bytes }
    const Buffer list[] = {
        BUFFER(x.high, streams * row),
        BUFFER(x.low, streams * low),
        BUFFER(x_mid.high, LA * row),
        BUFFER(x_mid.low, LA * low),
        BUFFER(ln1, LE * row),
        BUFFER(ln2, LE * row),
        BUFFER(rstd1, LA * N * f),
        BUFFER(rstd2, LA * N * f),
        BUFFER(q, LA * row),
        BUFFER(k, LA * row),
        BUFFER(v, LA * row),
        BUFFER(stats, LA * N * NH * 2 * f),
        BUFFER(att, LA * row * att_parts(c, chunk)),
        BUFFER(out, LE * row),
        BUFFER(gate_up, LA * N * F * sizeof(floatX)),
        BUFFER(act, recompute == RECOMPUTE_NONE ? L * N * F / 2 * sizeof(floatX) : 0),
        BUFFER(ln_f, row),
        BUFFER(rstd_f, N * f),
    };
#undef BUFFER
    return carve(list, (int)(sizeof list / sizeof list[0]), base);
}

// What the scratch of attention must hold, all layers considered: a chunk's tile with every convolution and mixing that
// some layer has, unless the fused kernels serve all; chunk 0: chosen, and the fused kernels where they serve.
typedef struct {
    Attention chunked;
    bool any_chunked, any_flash, any_cudnn;
    int S;
} AttentionPlan;

// What the configuration alone says of attention; one sequence at a time.
static Attention attention_shape(const Config* c, int B, int T, int chunk) {
    Attention a = {};
    a.B = B, a.S = 1, a.T = T, a.NH = c->num_attention_heads, a.HS = config_head_size(c);
    a.cq = c->kq_conv_query_size, a.ck = c->kq_conv_key_size;
    a.ch_pre = c->head_mix_pre_softmax;
    a.ch_post = c->attention_type == ATTENTION_DIFF ? 2 : c->head_mix_post_softmax;
    a.chunk = min_int(chunk, T);
    return a;
}

// Bytes of an element of dk and dv
static size_t kv_bytes(const AttentionPlan* p) { return p->any_chunked ? sizeof(float) : sizeof(floatX); }
// Bytes of S sequences' scratch in the fused kernels: dq, dk, dv, dots; dz of cuDNN
static size_t flash_bytes(const AttentionPlan* p, int S, int parts) {
    const Attention* a = &p->chunked;
    size_t head = (size_t)a->T * a->HS, f = sizeof(float);
    int splits = flash_splits(S, a->NH, a->T);
    return (size_t)S * a->NH *
           (head * (splits * f + (1 + parts) * kv_bytes(p) + (p->any_cudnn ? parts : 0) * sizeof(floatX)) + a->T * f);
}
// And in cuDNN: its workspace, and rows of pairs
static size_t cudnn_wide(const Attention* a, int S, int parts) {
    return parts > 1 ? 4 * 2 * (size_t)S * a->NH * a->T * a->HS * sizeof(floatX) : 0;
}
static size_t cudnn_workspace(const AttentionPlan* p, int S, int parts) {
    AttentionShape s = cudnn_shape(&p->chunked, S, parts > 1);
    return p->any_cudnn ? attention_cudnn_workspace(&s) : 0;
}
// Sequences at a time in the fused kernels, at most `most`: batches of one size, few of them, each within the scratch;
// of the fewest, and of one or two more, what fills the rounds of the multiprocessors best.
static int flash_sequences(const AttentionPlan* p, int B, int most, int parts) {
    auto fits = [&](int S) {
        return flash_bytes(p, S, parts) + cudnn_workspace(p, S, parts) <= (size_t)ATTENTION_SCRATCH;
    };
    auto time = [&](int S) { return flash_batch_time(B, S, p->chunked.NH, p->chunked.T); };
    while (most > 1 && !fits(most)) { most--; }
    int fewest = ceil_div(B, most), best = ceil_div(B, fewest);
    for (int batches = fewest + 1; batches <= fewest + 2; batches++) {
        int S = ceil_div(B, batches);
        if (time(S) < time(best) && fits(S)) { best = S; }
    }
    return best;
}
static AttentionPlan attention_plan(const Config* c, int B, int T, int chunk) {
    static const floatX one = (floatX)1.0f;
    static const float one_float = 1;
    AttentionPlan p = {};
    bool pre = false, post = false, diff = c->attention_type == ATTENTION_DIFF;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        bool flash = flash_serves(c, l, chunk);
        p.any_flash = p.any_flash || flash, p.any_chunked = p.any_chunked || !flash;
        p.any_cudnn = p.any_cudnn || cudnn_serves(c, l, chunk);
        if (!flash) { pre = pre || config_conv_pre(c, l), post = post || config_conv_post(c, l); }
    }
    p.chunked = attention_shape(c, B, T, chunk > 0 ? chunk : attention_chunk(T));
    p.chunked.conv_pre = pre ? &one : NULL, p.chunked.conv_post = post ? &one : NULL;
    p.chunked.mix_pre = c->head_mix_pre_softmax ? &one : NULL,
    p.chunked.mix_post = c->head_mix_post_softmax ? &one : NULL;
    p.chunked.diff_mix = diff ? &one_float : NULL;
    p.S = B;
    if (p.any_chunked) { p.S = attention_sequences(&p.chunked, B); }
    if (p.any_flash) { p.S = flash_sequences(&p, B, p.S, att_parts(c, chunk)); }
    p.chunked.S = p.S;
    return p;
}

static Attention attention_of(const Model* m, const LayerOf<floatX>* w, int l, int B, int T) {
    const Config* c = &m->config;
    int chunk = m->by_cudnn ? CHUNK_CUDNN : m->flash ? 0 : m->chunk;
    bool diff = c->attention_type == ATTENTION_DIFF, flash = flash_serves(c, l, chunk);
    Attention a = attention_shape(c, B, T, m->chunk);
    a.S = min_int(m->sequences, B);
    a.conv_pre = w->kq_conv, a.conv_post = w->kq_conv_post, a.mix_pre = w->head_mix_pre, a.mix_post = w->head_mix;
    a.diff_mix = diff ? m->scratch.pair_mix : NULL;
    a.pair_mix = flash && (diff || w->head_mix) ? m->scratch.pair_mix : NULL;
    a.flash = flash;
    a.cudnn = T == m->T && cudnn_serves(c, l, chunk) ? (AttentionCudnn*)&m->cudnn : NULL;
    a.shared = device_shared();
    return a;
}

static int logit_stride(int V) { return round_up(V, 8); }
#if !defined(LOGITS)
#define LOGITS ((size_t)1 << 30)  // bytes of a classifier chunk: 4096 rows of 128,256 in bf16
#endif
static int logit_rows(int V, int N) {
    return min_int(N, max_int(64, (int)((size_t)LOGITS / ((size_t)logit_stride(V) * sizeof(floatX)) / 64 * 64)));
}
enum { NORM_BLOCKS = 1024 };  // of the gradient norm, at most

// Doubles of the sums; with base NULL it only measures.
static size_t carve_sums(AttentionSums* s, const Config* c, double* base) {
    size_t NH = (size_t)c->num_attention_heads,
           conv = config_any_conv(c) ? NH * c->kq_conv_query_size * c->kq_conv_key_size : 0;
    size_t pre = NH * c->head_mix_pre_softmax,
           post = NH * (c->attention_type == ATTENTION_DIFF ? 2 : c->head_mix_post_softmax);
    *s = {base, base ? base + conv : NULL, base ? base + 2 * conv : NULL, base ? base + 2 * conv + pre : NULL,
          2 * conv + pre + post};
    return s->n;
}

static size_t carve_scratch(Scratch* s, const Config* c, int B, int T, int chunk, char* base) {
    size_t N = (size_t)B * T, C = (size_t)c->hidden_size, FF = (size_t)c->intermediate_size,
           HS = (size_t)config_head_size(c);
    size_t NH = (size_t)c->num_attention_heads, NKV = (size_t)c->num_key_value_heads, x = sizeof(floatX),
           f = sizeof(float), i = sizeof(int);
    AttentionPlan plan = attention_plan(c, B, T, chunk);
    const Attention& a = plan.chunked;
    size_t tile = plan.any_chunked ? attention_tile_size(&a) : 0, sequence = (size_t)a.S * NH * T * HS;
    AttentionSums sums;
    int wide = config_norm_heads(c);
    size_t head_parts_most = head_parts((int)NH / wide, B) * (size_t)head_width(wide, (int)HS),
           attention_parts = plan.any_chunked ? attention_parts_size(&a) : 0, q_parts = 1, kv_parts = 1;
    if (plan.any_flash) {
        for (int S = 1; S <= a.S; S++) {
            q_parts = std::max(q_parts, ((size_t)flash_splits(S, (int)NH, T) * S + a.S - 1) / a.S);
        }  // the last batch may be smaller
        kv_parts = (size_t)att_parts(c, chunk);
        size_t taps = (size_t)c->kq_conv_query_size * c->kq_conv_key_size * q_parts,
               mix = 2 * (size_t)prepare_blocks(T);
        attention_parts = std::max(attention_parts, (size_t)a.S * NH * std::max(taps, mix));
    }
#define BUFFER(name, bytes) \
    { (void**)&s->name, bytes }
    const Buffer list[] = {
        BUFFER(qkv, N * (NH + 2 * NKV) * HS * x),
        BUFFER(act, N * FF * x),
        BUFFER(dgate_up, 2 * N * FF * x),
        BUFFER(branch, N * C * x),
        BUFFER(dx.high, N * C * x),
        BUFFER(dx.low, EXACT ? 0 : N * C * x),
        BUFFER(dln, N * C * x),
        BUFFER(dout, N * C * x),
        BUFFER(datt, N * C * x),
        BUFFER(attention.dq, q_parts * sequence * f),
        BUFFER(logits, (size_t)logit_rows(c->vocab_size, (int)N) * logit_stride(c->vocab_size) * x),
        BUFFER(losses, N * f),
        BUFFER(wrong, N),
        BUFFER(tokens, N * i),
        BUFFER(targets, N * i),
        BUFFER(rows, N * i),
        BUFFER(starts, (N + 1) * i),
        BUFFER(parts, std::max(NORM_PARTS * C, head_parts_most) * f),
        BUFFER(norm_parts, NORM_BLOCKS * sizeof(double)),
        BUFFER(pair_mix, 2 * NH * f),
        BUFFER(sums, carve_sums(&sums, c, NULL) * sizeof(double)),
        BUFFER(attention.tiles, (size_t)attention_tiles(&a) * tile * sizeof(floatS)),
        BUFFER(attention.tiles_x, ATTENTION_TILES_X * tile * x),
        BUFFER(attention.q, plan.any_chunked && !EXACT ? sequence * sizeof(floatS) : 0),
        BUFFER(attention.k, plan.any_chunked && !EXACT ? sequence * sizeof(floatS) : 0),
        BUFFER(attention.dk, sequence * kv_bytes(&plan)),
        BUFFER(attention.dv, kv_parts * sequence * kv_bytes(&plan)),
        BUFFER(attention.parts, attention_parts * f),
        BUFFER(attention.dz, plan.any_cudnn && kv_parts > 1 ? kv_parts * sequence * x : 0),
        BUFFER(attention.dots, plan.any_flash ? (size_t)a.S * NH * T * f : 0),
        BUFFER(attention.bounds, plan.any_flash ? 2 * (size_t)a.S * NH * sizeof(unsigned) : 0),
        BUFFER(attention.wide, plan.any_cudnn ? cudnn_wide(&a, a.S, att_parts(c, chunk)) : 0),
        BUFFER(attention.cudnn, cudnn_workspace(&plan, a.S, att_parts(c, chunk))),
        BUFFER(cosine, (size_t)T * HS / 2 * f),
        BUFFER(sine, (size_t)T * HS / 2 * f),
        BUFFER(workspace, BLAS_WORKSPACE),
    };
#undef BUFFER
    return carve(list, (int)(sizeof list / sizeof list[0]), base);
}

// Bytes of each allocation of a model, in the order of the plan that is printed before any is made. waiting: of one
// arena for each shard that waits; room: of gradients of other ranks.
typedef struct {
    size_t weights, gradients, waiting, room, optimizer, activations, scratch;
} MemoryPlan;

// A model's shape and who else there is.
typedef struct {
    int B, T, chunk;
    Recompute recompute;
    int ranks, shards;
} ModelShape;
static ModelShape shape_alone(int B, int T, int chunk, Recompute recompute) { return {B, T, chunk, recompute, 1, 1}; }

static MemoryPlan model_memory(const Config* c, const ModelShape* x) {
    TensorList list;
    Activations acts;
    Scratch scratch;
    tensor_list(&list, c);
    bool trains = x->recompute != FORWARD_ONLY;
    size_t f = sizeof(float), own = ranks_most_elements(x->ranks, list.numel), all = ranks_padded(x->ranks, list.numel),
           room = ranks_room(x->ranks, list.numel) * f,
           waiting = (size_t)shards_waiting(max_int(1, x->shards / x->ranks)) * list.numel * f;
    MemoryPlan p = {(trains ? all : list.numel) * sizeof(floatX),
                    trains ? all * f : 0,
                    trains ? waiting : 0,
                    trains ? room : 0,
                    trains ? (EXACT ? 2 : 3) * own * f : 0,
                    carve_activations(&acts, c, x->B, x->T, x->chunk, x->recompute, NULL),
                    carve_scratch(&scratch, c, x->B, x->T, x->chunk, NULL)};
    tensor_list_free(&list);
    return p;
}
static size_t memory_total(const MemoryPlan* p) {
    return p->weights + p->gradients + p->waiting + p->room + p->optimizer + p->activations + p->scratch;
}

// The largest micro-batch whose plan fits into `bytes`, of BATCH_MOST sequences at most; 0: not even one does.
enum { BATCH_MOST = 1024 };
static int largest_batch(const Config* c, const ModelShape* shape, size_t bytes) {
    int fits = 0;
    ModelShape x = *shape;
    for (x.B = 1; x.B <= BATCH_MOST; x.B++) {
        MemoryPlan p = model_memory(c, &x);
        if (memory_total(&p) > bytes) { break; }
        fits = x.B;
    }
    return fits;
}
// Of the largest micro-batch: it may be larger than was looked for.
static const char* or_more(int batch) { return batch == BATCH_MOST ? " or more" : ""; }

// The tensors of layer l inside an arena.
template <typename T> static LayerOf<T> model_layer(const Model* m, T* arena, int l) {
    LayerOf<T> w;
    static_assert(sizeof w == LAYER_TENSORS * sizeof(void*), "a field for each tensor of a layer");
    tensors_of_layer(&w, &m->tensors, l, arena, sizeof(T));
    return w;
}
template <typename T> static T* model_tensor(const Model* m, T* arena, TensorKind kind) {
    return arena + m->tensors.specs[tensor_at(&m->tensors, 0, kind)].offset;
}
template <typename T> static T* model_head(const Model* m, T* arena) {  // the classifier: the embedding itself if tied
    return model_tensor(m, arena, m->config.tie_word_embeddings ? TENSOR_EMBED : TENSOR_LM_HEAD);
}

// What the kernels cannot serve though the options may say it, refused before anything is planned: rows and heads of a
// micro-batch are counted in 32 bits, and sequences are a grid's z.
static bool model_check(const Config* c, int B, int T, Error* e) {
    if (B <= 65535 && (int64_t)B * T <= INT32_MAX / c->num_attention_heads) { return true; }
    return fail(e,
                "a micro-batch of %d x %d tokens of %d heads: wanted at most 65535 sequences, and a product below 2^31",
                B, T, c->num_attention_heads);
}

// Is a block's shared memory enough for the convolutions and mixings, a chunk at a time, and for a head's output? It is
// for every size of the presets; the largest that a configuration may have, 63 x 63, groups of 1024 heads and heads of
// thousands of channels, need more than some GPUs have.
static bool shared_check(const Config* c, size_t shared, Error* e) {
    int cq = c->kq_conv_query_size, ck = c->kq_conv_key_size,
        mixed = max_int(c->head_mix_pre_softmax, c->head_mix_post_softmax);
    size_t conv = config_any_conv(c) ? std::max(conv_shared(cq, ck), conv_weight_shared(cq, ck)) : 0,
           mix = mixed ? mix_shared(mixed) : 0, head = head_shared(config_norm_heads(c), config_head_size(c));
    if (conv > shared) {
        return fail(e, "kq_conv of %d x %d needs %zu KiB of shared memory, this GPU has %zu for a block", cq, ck,
                    conv >> 10, shared >> 10);
    }
    if (mix > shared) {
        return fail(e, "head mixing of %d heads needs %zu KiB of shared memory, this GPU has %zu for a block", mixed,
                    mix >> 10, shared >> 10);
    }
    if (head > shared) {
        return fail(e, "heads of %d channels need %zu KiB of shared memory, this GPU has %zu for a block",
                    config_head_size(c), head >> 10, shared >> 10);
    }
    return true;
}

static void model_free(Model* m);
static void gradients_add(void* stream, void* sum, const void* more, size_t n);
enum { MEMORY_RESERVE_MIB = 512 };  // for graphs (GRAPHS_MIB), the code of kernels and of cuBLAS, and fragmentation

// Refuses a model that does not fit into what is free of the GPU's memory.
static bool memory_check(const Config* c, const ModelShape* x, Error* e) {
    MemoryPlan p = model_memory(c, x);
    size_t available = 0, total = 0, reserve = (size_t)MEMORY_RESERVE_MIB << 20;
    cudaCheck(cudaMemGetInfo(&available, &total));
    if (memory_total(&p) + reserve <= available) { return true; }
    ModelShape least = *x;  // nothing is computed again where nothing is trained
    bool trains = x->recompute != FORWARD_ONLY;
    least.recompute = trains ? RECOMPUTE_BLOCK : FORWARD_ONLY;
    size_t room = available > reserve ? available - reserve : 0;
    int fits = largest_batch(c, x, room), most = largest_batch(c, &least, room);
    char advice[128] = "not even one sequence fits: wanted a smaller --seq-len or model, or a larger GPU";
    if (most > 0) {
        int n = snprintf(advice, sizeof advice, "the largest that fits is %d%s sequences", fits, or_more(fits));
        char* rest = advice + n;
        if (trains) { snprintf(rest, sizeof advice - n, ", %d%s with --recompute block", most, or_more(most)); }
    }
    return fail(e, "a micro-batch of %d x %d tokens needs %zu MiB, the GPU has %zu MiB free; %s", x->B, x->T,
                (memory_total(&p) + reserve) >> 20, available >> 20, advice);
}

// The arenas, all zero: weights, gradients, those of shards that wait, m, v and the master weights of own elements.
static bool model_arenas(Model* m, const MemoryPlan* p, Error* e) {
    cudaStream_t stream = m->cuda.stream;
    int n = m->tensors.numel ? (int)(p->waiting / (m->tensors.numel * sizeof(float))) : 0;
    bool ok = device_memory(&m->weights, p->weights, "weights", e);
    if (ok) { cudaCheck(cudaMemsetAsync(m->weights, 0, p->weights, stream)); }
    if (EXACT) { m->master = (float*)(void*)m->weights; }
    if (!ok || !p->gradients) { return ok; }
    size_t own = p->optimizer / (EXACT ? 2 : 3);
    ok = device_memory(&m->grads, p->gradients, "gradients", e) &&
         (!p->room || device_memory(&m->sum.room, p->room, "gradients of ranks", e)) &&
         (EXACT || device_memory(&m->master, own, "master weights", e)) &&
         device_memory(&m->m, own, "optimizer state m", e) && device_memory(&m->v, own, "optimizer state v", e);
    for (int i = 0; i < n && ok; i++) { ok = device_memory(&m->waiting[i], p->waiting / n, "gradients of shards", e); }
    if (!ok) { return false; }
    cudaCheck(cudaMemsetAsync(m->grads, 0, p->gradients, stream));
    float* const state[] = {m->m, m->v, m->master};
    for (int i = 0; i < (EXACT ? 2 : 3); i++) { cudaCheck(cudaMemsetAsync(state[i], 0, own, stream)); }
    return true;
}

// A model for micro-batches of at most B x T; chunk 0: chosen; CHUNK_CUDNN: and cuDNN where it serves. ranks: with
// which it is shared out, NULL = none. NULL with a message if there is no GPU or too little memory, or if cuDNN was
// wanted and has no plans.
static Model* model_create(const Config* config, const ModelShape* shape, Ranks* ranks, Error* e) {
    int B = shape->B, T = shape->T, chunk = shape->chunk;
    if (!model_check(config, B, T, e)) { return NULL; }
    Model* m = (Model*)alloc_or_die(1, sizeof(Model), "model");
    m->config = *config;
    m->B = B, m->T = T, m->recompute = shape->recompute, m->graphs = !WAITS;
    m->ranks = ranks, m->shards = shape->shards;
    m->backward = (Replay*)alloc_or_die(config->num_hidden_layers, sizeof(Replay), "parts of the backward pass");
    m->logit_rows = logit_rows(config->vocab_size, B * T);
    tensor_list(&m->tensors, config);
    if (!cuda_open(&m->cuda, e) || !shared_check(config, device_shared(), e)) {
        model_free(m);
        return NULL;
    }
    AttentionPlan plan = attention_plan(config, B, T, chunk);
    m->chunk = plan.chunked.chunk, m->sequences = plan.S, m->flash = chunk <= 0, m->by_cudnn = chunk == CHUNK_CUDNN,
    m->att_parts = att_parts(config, chunk);
    if (m->by_cudnn && (!attention_cudnn_open(&m->cudnn, m->cuda.stream, e) ||
                        (plan.any_cudnn && !cudnn_plans(&m->cudnn, &plan.chunked, B, m->att_parts > 1,
                                                        shape->recompute != FORWARD_ONLY, e)))) {
        model_free(m);
        return NULL;
    }
    m->sum.add = gradients_add, m->sum.bytes = sizeof(float);
    if (!ranks_alone(ranks)) { ranks->work = m->cuda.stream, m->sum.state = ranks->stream; }
    MemoryPlan p = model_memory(config, shape);
    if (!memory_check(config, shape, e) || !model_arenas(m, &p, e) ||
        !device_memory(&m->activation_memory, p.activations, "activations", e) ||
        !device_memory(&m->scratch_memory, p.scratch, "scratch", e)) {
        model_free(m);
        return NULL;
    }
    carve_activations(&m->acts, config, B, T, chunk, shape->recompute, m->activation_memory);
    carve_scratch(&m->scratch, config, B, T, chunk, m->scratch_memory);
    blasCheck(cublasSetWorkspace(m->cuda.blas, m->scratch.workspace, BLAS_WORKSPACE));
    carve_sums(&m->sums, config, m->scratch.sums);
    size_t N = (size_t)B * T, table = (size_t)T * (config_head_size(config) / 2), f = sizeof(float);
    m->wrong = (unsigned char*)alloc_or_die(N, 1, "wrong targets");
    m->losses = (float*)alloc_or_die(N, sizeof(float), "losses");
    m->rows = (int*)alloc_or_die(N, sizeof(int), "rows by token");
    m->starts = (int*)alloc_or_die(N + 1, sizeof(int), "rows by token");
    float* angles = (float*)alloc_or_die(2 * table, sizeof(float), "RoPE table");
    rope_table(angles, angles + table, config, T);
    cudaCheck(cudaMemcpyAsync(m->scratch.cosine, angles, table * f, cudaMemcpyHostToDevice, m->cuda.stream));
    cudaCheck(cudaMemcpyAsync(m->scratch.sine, angles + table, table * f, cudaMemcpyHostToDevice, m->cuda.stream));
    cudaCheck(cudaStreamSynchronize(m->cuda.stream));
    free(angles);
    return m;
}

static void model_free(Model* m) {
    if (m->forward.graph) { cudaCheck(cudaGraphExecDestroy(m->forward.graph)); }
    for (int l = 0; l < m->config.num_hidden_layers; l++) {
        if (m->backward[l].graph) { cudaCheck(cudaGraphExecDestroy(m->backward[l].graph)); }
    }
    void* const device[] = {m->weights, EXACT ? NULL : m->master, m->grads,          m->m,
                            m->v,       m->activation_memory,     m->scratch_memory, m->sum.room};
    for (size_t i = 0; i < sizeof device / sizeof device[0]; i++) {
        if (device[i]) { cudaCheck(cudaFree(device[i])); }
    }
    for (int i = 0; i < MAX_WAITING; i++) {
        if (m->waiting[i]) { cudaCheck(cudaFree(m->waiting[i])); }
    }
    void* const host[] = {m->wrong, m->losses, m->rows, m->starts, m->backward};
    for (size_t i = 0; i < sizeof host / sizeof host[0]; i++) { free(host[i]); }
    if (m->by_cudnn) { attention_cudnn_close(&m->cudnn); }
    if (!ranks_alone(m->ranks)) { m->ranks->work = NULL; }  // a refusal is still sent, without this stream
    cuda_close(&m->cuda);
    tensor_list_free(&m->tensors);
    free(m);
}

// =====================================================================================================================
// Forward, backward, update

// The activations of layer l; what is computed again shares one layer's place.
static Activations layer_activations(const Model* m, int l, int N) {
    const Config* c = &m->config;
    const Activations* all = &m->acts;
    size_t row = (size_t)N * c->hidden_size, kept = m->recompute >= RECOMPUTE_BLOCK ? 0 : l,
           stream = m->recompute == FORWARD_ONLY ? 0 : l, light = m->recompute == RECOMPUTE_NONE ? l : 0;
    Activations a = *all;
    a.x = stream_at(a.x, stream * row), a.x_mid = stream_at(a.x_mid, kept * row), a.ln1 += light * row,
    a.ln2 += light * row, a.rstd1 += kept * N, a.rstd2 += kept * N;
    a.q += kept * row, a.k += kept * row, a.v += kept * row, a.stats += kept * N * c->num_attention_heads * 2,
        a.att += kept * m->att_parts * row, a.out += light * row;
    a.gate_up += kept * N * 2 * c->intermediate_size;
    a.act = m->recompute == RECOMPUTE_NONE ? a.act + light * N * c->intermediate_size : m->scratch.act;
    return a;
}

static HeadOutput head_output_of(const Model* m, const LayerOf<floatX>* w, int l, int B, int T) {
    const Config* c = &m->config;
    double scale = c->head_norm == HEAD_NORM_GROUP_DEPTH_SCALED ? 1 - config_lambda_init(l) : 1;
    Attention a = attention_of(m, w, l, B, T);
    HeadOutput o = {w->head_norm,
                    w->gate_weight,
                    w->gate_bias,
                    (float)scale,
                    B,
                    T,
                    c->num_attention_heads,
                    config_head_size(c),
                    config_norm_heads(c),
                    a.flash ? a.pair_mix : NULL};
    return o;
}

// From a.ln1 to the MLP's result in scratch.branch, which the next norm adds to a.x_mid.
static void layer_forward(Model* m, int l, const Activations* a, int B, int T) {
    const Config* c = &m->config;
    Scratch* s = &m->scratch;
    Cuda* g = &m->cuda;
    int N = B * T, C = c->hidden_size, FF = c->intermediate_size, NH = c->num_attention_heads,
        NKV = c->num_key_value_heads, HS = config_head_size(c);
    LayerOf<floatX> w = model_layer(m, m->weights, l);
    Joined qkv = {3, {NH * HS, NKV * HS, NKV * HS}, (NH + 2 * NKV) * HS, {w.q, w.k, w.v}, {}},
           gate_up = {2, {FF, FF}, 2 * FF, {w.gate_proj, w.up_proj}, {}};
    Rope rope = {s->cosine, s->sine, T, NH, NKV, HS};
    matmul_joined_forward(s->qkv, a->ln1, &qkv, N, C, g);
    rope_forward(a->q, a->k, a->v, s->qkv, &rope, B, g);
    if (w.lambda_q1) {
        Lambda lambda = {w.lambda_q1, w.lambda_k1, w.lambda_q2, w.lambda_k2};
        diff_lambda_forward(s->pair_mix, &lambda, config_lambda_init(l), NH, HS, g);
    }
    Attention shape = attention_of(m, &w, l, B, T);
    if (shape.pair_mix && w.head_mix) { convert(s->pair_mix, w.head_mix, 2 * NH, g); }
    attention_forward(a->att, a->stats, a->q, a->k, a->v, &shape, &s->attention, g);
    HeadOutput output = head_output_of(m, &w, l, B, T);
    head_output_forward(a->out, a->att, &output, g);
    matmul_forward(s->branch, C, a->out, w.o, N, C, C, g);
    residual_rmsnorm_forward(a->ln2, a->rstd2, a->x_mid, a->x, s->branch, w.post_norm, N, C, c->rms_norm_eps,
                             g);  // x_mid = x + out Wo^T
    matmul_joined_forward(a->gate_up, a->ln2, &gate_up, N, C, g);
    swiglu_forward(a->act, a->gate_up, N, FF, g);
    matmul_forward(s->branch, C, a->act, w.down_proj, N, FF, C, g);
}

// From scratch.tokens to acts.ln_f.
static void layers_forward(Model* m, int B, int T) {
    const Config* c = &m->config;
    Cuda* g = &m->cuda;
    int N = B * T, C = c->hidden_size, L = c->num_hidden_layers;
    embedding_forward(m->acts.x, m->scratch.tokens, model_tensor(m, m->weights, TENSOR_EMBED), N, C, g);
    Stream before = {};  // x_mid of the layer before, to which its MLP is still to be added
    for (int l = 0; l < L; l++) {
        Activations a = layer_activations(m, l, N);
        residual_rmsnorm_forward(a.ln1, a.rstd1, a.x, l ? before : a.x, l ? m->scratch.branch : NULL,
                                 model_layer(m, m->weights, l).input_norm, N, C, c->rms_norm_eps, g);
        layer_forward(m, l, &a, B, T);
        before = a.x_mid;
    }
    Stream last = stream_at(m->acts.x, m->recompute == FORWARD_ONLY ? 0 : (size_t)L * N * C);
    residual_rmsnorm_forward(m->acts.ln_f, m->acts.rstd_f, last, before, m->scratch.branch,
                             model_tensor(m, m->weights, TENSOR_NORM), N, C, c->rms_norm_eps, g);
}

// Passes of the model's own shape are replayed; others (the last micro-batch of a step, samples) are launched one by
// one.
static bool model_replays(const Model* m, int B, int T) { return m->graphs && B == m->B && T == m->T; }

// From tokens (B,T), on the host, to the normalised last state acts.ln_f (N,C).
static void model_forward(Model* m, const int32_t* tokens, int B, int T) {
    assert((size_t)B * T <= (size_t)m->B * m->T && T <= m->T);
    cudaCheck(cudaMemcpyAsync(m->scratch.tokens, tokens, (size_t)B * T * sizeof(int), cudaMemcpyHostToDevice,
                              m->cuda.stream));
    auto pass = [=] { layers_forward(m, B, T); };
    if (model_replays(m, B, T)) {
        replay(&m->forward, pass, &m->cuda);
    } else {
        pass();
    }
}

// The classifier and its loss, a chunk of rows at a time so that the logits of all rows never exist: returns the sum of
// the counted losses, fills losses and wrong. With `gradient`: scratch.dln = dL/d(ln_f) and the head's gradient, L =
// sum * dloss. logits (N,V) on the host unless NULL.
static double model_loss(Model* m, const int32_t* targets, int N, float dloss, bool gradient, float* logits) {
    int C = m->config.hidden_size, V = m->config.vocab_size, ld = logit_stride(V);
    Scratch* s = &m->scratch;
    Cuda* g = &m->cuda;
    const floatX* head = model_head(m, m->weights);
    cudaCheck(cudaMemcpyAsync(s->targets, targets, N * sizeof(int), cudaMemcpyHostToDevice, g->stream));
    floatX* host = logits ? (floatX*)alloc_or_die((size_t)m->logit_rows * ld, sizeof(floatX), "logits") : NULL;
    for (int n = 0; n < N; n += m->logit_rows) {
        int rows = min_int(m->logit_rows, N - n);
        const floatX* x = m->acts.ln_f + (size_t)n * C;
        if (!gradient && !logits && !any_counted(targets + n, rows)) {
            cudaCheck(cudaMemsetAsync(s->losses + n, 0, rows * sizeof(float), g->stream));
            cudaCheck(cudaMemsetAsync(s->wrong + n, 0, rows, g->stream));
            continue;
        }
        matmul_forward(s->logits, ld, x, head, rows, C, V, g);
        if (logits) {
            cudaCheck(cudaMemcpyAsync(host, s->logits, (size_t)rows * ld * sizeof(floatX), cudaMemcpyDeviceToHost,
                                      g->stream));
            cudaCheck(cudaStreamSynchronize(g->stream));
            for (size_t i = 0; i < (size_t)rows * V; i++) {
                logits[(size_t)n * V + i] = (float)host[i / V * ld + i % V];
            }
        }
        crossentropy_forward_backward(s->losses + n, s->wrong + n, s->logits, s->targets + n, rows, V, ld, dloss,
                                      gradient, g);
        if (gradient) {
            matmul_backward(s->dln + (size_t)n * C, model_head(m, m->grads), s->logits, ld, x, head, rows, C, V, false,
                            g);
        }
    }
    free(host);
    cudaCheck(cudaMemcpyAsync(m->losses, s->losses, N * sizeof(float), cudaMemcpyDeviceToHost, g->stream));
    cudaCheck(cudaMemcpyAsync(m->wrong, s->wrong, N, cudaMemcpyDeviceToHost, g->stream));
    cudaCheck(cudaStreamSynchronize(g->stream));
    double sum = 0;
    for (int n = 0; n < N; n++) { sum += (double)m->losses[n]; }
    return sum;
}

// The exact reverse of layer_forward and of the norm before it: scratch.dx in and out; adds to the gradients.
static void layer_backward(Model* m, int l, const Activations* a, int B, int T) {
    const Config* c = &m->config;
    Scratch* s = &m->scratch;
    Cuda* g = &m->cuda;
    int N = B * T, C = c->hidden_size, FF = c->intermediate_size, NH = c->num_attention_heads,
        NKV = c->num_key_value_heads, HS = config_head_size(c);
    LayerOf<floatX> w = model_layer(m, m->weights, l);
    LayerOf<float> d = model_layer(m, m->grads, l);
    Joined qkv = {3, {NH * HS, NKV * HS, NKV * HS}, (NH + 2 * NKV) * HS, {w.q, w.k, w.v}, {d.q, d.k, d.v}};
    Joined gate_up = {2, {FF, FF}, 2 * FF, {w.gate_proj, w.up_proj}, {d.gate_proj, d.up_proj}};
    Rope rope = {s->cosine, s->sine, T, NH, NKV, HS};
    HeadOutput output = head_output_of(m, &w, l, B, T);
    Lambda lambda = {w.lambda_q1, w.lambda_k1, w.lambda_q2, w.lambda_k2};
    if (w.lambda_q1) {
        diff_lambda_forward(s->pair_mix, &lambda, config_lambda_init(l), NH, HS, g);
    } else if (output.pair_mix) {
        convert(s->pair_mix, w.head_mix, 2 * NH, g);
    }
    if (m->recompute == RECOMPUTE_ELEMENTWISE) {
        rmsnorm_forward(a->ln1, a->rstd1, a->x, w.input_norm, N, C, c->rms_norm_eps, g);
        rmsnorm_forward(a->ln2, a->rstd2, a->x_mid, w.post_norm, N, C, c->rms_norm_eps, g);
        head_output_forward(a->out, a->att, &output, g);
    }
    // x + down(act): scratch.act takes dact and, where it is not kept, act again
    matmul_backward(s->act, NULL, s->dx.high, C, NULL, w.down_proj, N, FF, C, false, g);
    swiglu_backward(s->dgate_up, m->recompute == RECOMPUTE_NONE ? NULL : s->act, s->act, a->gate_up, N, FF, g);
    matmul_backward(NULL, d.down_proj, s->dx.high, C, a->act, NULL, N, FF, C, false, g);
    matmul_joined_backward(s->dln, s->dgate_up, a->ln2, &gate_up, N, C, g);
    rmsnorm_backward(s->dx, d.post_norm, s->dln, a->x_mid.high, w.post_norm, a->rstd2, N, C, s->parts, true, g);
    // x + o(out)
    matmul_backward(s->dout, d.o, s->dx.high, C, a->out, w.o, N, C, C, false, g);
    head_output_backward(s->datt, d.head_norm, d.gate_weight, d.gate_bias, s->dout, a->att, &output, s->parts, g);
    Attention shape = attention_of(m, &w, l, B, T);
    attention_backward(s->qkv, &m->sums, s->datt, a->att, a->q, a->k, a->v, a->stats, &rope, &shape, &s->attention, g);
    size_t kernel = (size_t)NH * c->kq_conv_query_size * c->kq_conv_key_size;
    if (d.kq_conv) { attention_sums_add(d.kq_conv, m->sums.conv_pre, kernel, g); }
    if (d.kq_conv_post) { attention_sums_add(d.kq_conv_post, m->sums.conv_post, kernel, g); }
    if (d.head_mix_pre) {
        attention_sums_add(d.head_mix_pre, m->sums.mix_pre, (size_t)NH * c->head_mix_pre_softmax, g);
    }
    if (d.head_mix) { attention_sums_add(d.head_mix, m->sums.mix_post, (size_t)NH * c->head_mix_post_softmax, g); }
    if (w.lambda_q1) {
        diff_lambda_backward(d.lambda_q1, d.lambda_k1, d.lambda_q2, d.lambda_k2, m->sums.mix_post, &lambda, NH, HS, g);
    }
    matmul_joined_backward(s->dln, s->qkv, a->ln1, &qkv, N, C, g);
    rmsnorm_backward(s->dx, d.input_norm, s->dln, a->x.high, w.input_norm, a->rstd1, N, C, s->parts, true, g);
}

// The rows of the batch sorted by token, and where each distinct token starts. Returns how many there are.
static int rows_by_token(Model* m, const int32_t* tokens, int N) {
    int distinct = 0;
    for (int n = 0; n < N; n++) { m->rows[n] = n; }
    std::stable_sort(m->rows, m->rows + N, [=](int a, int b) { return tokens[a] < tokens[b]; });
    for (int i = 0; i < N; i++) {
        if (i == 0 || tokens[m->rows[i]] != tokens[m->rows[i - 1]]) { m->starts[distinct++] = i; }
    }
    m->starts[distinct] = N;
    return distinct;
}

// From scratch.dln, or from what layer `end` has left in scratch.dx, through the layers below `end` down to `begin`, to
// scratch.dx; through all of them, the gradient of the embedded tokens.
static void layers_backward(Model* m, int begin, int end, int B, int T) {
    const Config* c = &m->config;
    Scratch* s = &m->scratch;
    Cuda* g = &m->cuda;
    int N = B * T, C = c->hidden_size, L = c->num_hidden_layers;
    if (end == L) {
        rmsnorm_backward(s->dx, model_tensor(m, m->grads, TENSOR_NORM), s->dln, m->acts.x.high + (size_t)L * N * C,
                         model_tensor(m, m->weights, TENSOR_NORM), m->acts.rstd_f, N, C, s->parts, false, g);
    }
    for (int l = end - 1; l >= begin; l--) {
        Activations a = layer_activations(m, l, N);
        if (m->recompute == RECOMPUTE_BLOCK && l < L - 1) {  // the last layer's are still there
            rmsnorm_forward(a.ln1, a.rstd1, a.x, model_layer(m, m->weights, l).input_norm, N, C, c->rms_norm_eps, g);
            layer_forward(m, l, &a, B, T);
        }
        layer_backward(m, l, &a, B, T);
    }
}

// Where the gradients begin that are complete when the backward pass has come through layer l.
static size_t layer_begin(const Model* m, int l) {
    return m->tensors.specs[tensor_at(&m->tensors, l, TENSOR_INPUT_NORM)].offset;
}

// The backward pass goes in parts, so that gradients can be sent to other ranks in between: the part through the layers
// below `end` comes to where the next bucket of them (mta/ranks.h) is complete. One process has one bucket, and one
// part.
static int backward_stop(const Model* m, int end) {
    size_t n = m->tensors.numel, complete = end < m->config.num_hidden_layers ? layer_begin(m, end) : n,
           next = ranks_bucket_at(ranks_size(m->ranks), n, complete - 1).begin;
    int l = end - 1;
    while (l > 0 && layer_begin(m, l) > next) { l--; }
    return l;
}

// sum (n) += more (n), n a multiple of 4. A thread owns 4.
static __global__ void gradients_add_kernel(float* sum, const float* more, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) { return; }
    Pack<float, 4> x = load<4>(sum + i), y = load<4>(more + i);
    for (int e = 0; e < 4; e++) { x.v[e] += y.v[e]; }
    store<4>(sum + i, x);
}
static void gradients_add(void* stream, void* sum, const void* more, size_t n) {
    cudaStream_t on = (cudaStream_t)stream;
    LAUNCH(gradients_add_kernel, ceil_div(n, 256 * 4), 256, 0, on, (float*)sum, (const float*)more, n);
    launchCheck(on);
}

// The gradients from element `from` of the arena on are complete: begins the sums of the buckets which that makes
// complete, first over those of this process's shards that wait, then over the ranks.
static void model_reduce(Model* m, size_t from) {
    while (m->unsent) {
        Span bucket = ranks_bucket_at(ranks_size(m->ranks), m->tensors.numel, m->unsent - 1);
        if (bucket.begin < from) { return; }
        for (int i = m->n_waiting - 1; i >= 0; i--) {
            gradients_add(m->cuda.stream, m->grads + bucket.begin, m->waiting[i] + bucket.begin,
                          bucket.end - bucket.begin);
        }
        ranks_reduce(m->ranks, m->grads, bucket, &m->sum, from > 0);
        m->unsent = bucket.begin;
    }
}

// The exact reverse of model_forward, from scratch.dln; adds to the gradients. The embedding's grid depends on the
// tokens: it is no part of the pass.
static void model_backward(Model* m, const int32_t* tokens, int B, int T) {
    Scratch* s = &m->scratch;
    Cuda* g = &m->cuda;
    int N = B * T;
    assert(B <= m->B && T == m->T);  // flash_splits, and so the room for parts of gradients, is of this length
    for (int end = m->config.num_hidden_layers; end > 0;) {
        int begin = backward_stop(m, end);
        auto pass = [=] { layers_backward(m, begin, end, B, T); };
        if (model_replays(m, B, T)) {
            replay(&m->backward[begin], pass, g);
        } else {
            pass();
        }
        model_reduce(m, layer_begin(m, begin));
        end = begin;
    }
    int distinct = rows_by_token(m, tokens, N);  // while the GPU works
    cudaCheck(cudaMemcpyAsync(s->rows, m->rows, N * sizeof(int), cudaMemcpyHostToDevice, g->stream));
    cudaCheck(cudaMemcpyAsync(s->starts, m->starts, (distinct + 1) * sizeof(int), cudaMemcpyHostToDevice, g->stream));
    embedding_backward(model_tensor(m, m->grads, TENSOR_EMBED), s->dx, s->tokens, s->rows, s->starts, distinct,
                       m->config.hidden_size, g);
    model_reduce(m, 0);
    cudaCheck(cudaStreamSynchronize(g->stream));  // the host's rows may change now
}

// Both of a batch: adds dloss times the gradient of the summed loss, and returns that sum.
static double model_forward_backward(Model* m, const int32_t* tokens, const int32_t* targets, int B, int T,
                                     double dloss) {
    model_forward(m, tokens, B, T);
    double sum = model_loss(m, targets, B * T, (float)dloss, true, NULL);
    model_backward(m, tokens, B, T);
    return sum;
}

static void model_zero_gradients(Model* m) {
    cudaCheck(cudaMemsetAsync(m->grads, 0, m->tensors.numel * sizeof(float), m->cuda.stream));
}

// The gradients of this process's shard `done` (1 = first) of n are complete: adds those of its neighbours in the tree
// (mta/ranks.h) that wait, then waits too; the last has been added by model_reduce. It is copied, since graphs hold the
// pointer to grads.
static void model_keep_shard(Model* m, int done, int n) {
    if (done == n) { return; }
    if (done == 1) { m->n_waiting = 0; }  // whatever a signal has left
    for (int add = shards_to_add(done, n); add > 0; add--) {
        gradients_add(m->cuda.stream, m->grads, m->waiting[--m->n_waiting], m->tensors.numel);
    }
    cudaCheck(cudaMemcpyAsync(m->waiting[m->n_waiting++], m->grads, m->tensors.numel * sizeof(float),
                              cudaMemcpyDeviceToDevice, m->cuda.stream));
}

// norm_parts (gridDim.x): sums of squares of n gradients, n a multiple of 4. A block begins `apart` after the one
// before and goes by `step` as far as `reach`: so which elements it has depends on these alone.
enum { NORM_THREADS = 256 };
static __global__ void gradient_norm_kernel(double* norm_parts, const float* grads, size_t n, size_t apart,
                                            size_t reach, size_t step) {
    size_t begin = blockIdx.x * apart, end = n - begin < reach ? n : begin + reach;
    float sum = 0;
    for (size_t i = begin + threadIdx.x * 4; i < end; i += step) {
        Pack<float, 4> x = load<4>(grads + i);
        for (int e = 0; e < 4; e++) { sum += x.v[e] * x.v[e]; }
    }
    sum = block_reduce(sum, false);
    if (threadIdx.x == 0) { norm_parts[blockIdx.x] = (double)sum; }
}
// The sum of squares of all gradients where ranks can share it out: of RANKS_BLOCK elements for each block, and of
// these sums in the order of the blocks, whoever has computed them.
static double norm_of_blocks(const Model* m) {
    size_t n = m->tensors.numel, blocks = ranks_own_blocks(m->ranks, n), count = 0;
    double* parts = (double*)alloc_or_die(ranks_most_blocks(m->ranks, n), sizeof(double), "norm sums");
    cudaStream_t stream = m->cuda.stream;
    for (size_t j = 0; j < blocks; j += count) {  // as many as lie side by side, and as there is room for
        size_t begin = ranks_own_block(m->ranks, n, j), held = j % NORM_BLOCKS;
        Span own = ranks_elements(m->ranks, ranks_bucket_at(ranks_size(m->ranks), n, begin));
        count = std::min((size_t)ceil_div(own.end - begin, RANKS_BLOCK), NORM_BLOCKS - held);
        LAUNCH(gradient_norm_kernel, (unsigned)count, NORM_THREADS, 0, stream, m->scratch.norm_parts + held,
               m->grads + begin, n - begin, RANKS_BLOCK, RANKS_BLOCK, NORM_THREADS * 4);
        launchCheck(stream);
        if (held + count < NORM_BLOCKS && j + count < blocks) { continue; }
        cudaCheck(cudaMemcpyAsync(parts + (j - held), m->scratch.norm_parts, (held + count) * sizeof(double),
                                  cudaMemcpyDeviceToHost, stream));
    }
    cudaCheck(cudaStreamSynchronize(stream));
    double total = ranks_sum_blocks(m->ranks, parts, n);
    free(parts);
    return total;
}
// Square root of the sum of squares of all gradients; not finite if any is not. With one shard the blocks stride over
// the whole arena together.
static double gradient_norm(const Model* m, Cuda* g) {
    if (m->shards > 1) { return sqrt(norm_of_blocks(m)); }
    size_t n = m->tensors.numel, apart = NORM_THREADS * 4, blocks = (size_t)min_int(NORM_BLOCKS, ceil_div(n, apart));
    double parts[NORM_BLOCKS], total = 0;
    LAUNCH(gradient_norm_kernel, (unsigned)blocks, NORM_THREADS, 0, g->stream, m->scratch.norm_parts, m->grads, n,
           apart, n, blocks * apart);
    launchCheck(g->stream);
    cudaCheck(
        cudaMemcpyAsync(parts, m->scratch.norm_parts, blocks * sizeof(double), cudaMemcpyDeviceToHost, g->stream));
    cudaCheck(cudaStreamSynchronize(g->stream));
    for (size_t i = 0; i < blocks; i++) { total += parts[i]; }
    return sqrt(total);
}

// AdamW on n elements, n a multiple of W; a thread owns W. weights is the rounding of master (the same arena in fp32).
typedef struct {
    float clip, b1, b2, eps, decay, rate, correct;
} AdamWStep;
template <int W>
static __global__ void adamw_kernel(floatX* weights, float* master, float* m, float* v, const float* grads, size_t n,
                                    AdamWStep h) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= n) { return; }

    // All of the state is read before any is written.
    Pack<float, W> w = load<W>(master + i), am = load<W>(m + i), av = load<W>(v + i), d = load<W>(grads + i);
    Pack<floatX, W> rounded;
    for (int e = 0; e < W; e++) {
        float x = d.v[e] * h.clip;
        am.v[e] = h.b1 * am.v[e] + (1 - h.b1) * x;
        av.v[e] = h.b2 * av.v[e] + (1 - h.b2) * x * x;
        w.v[e] = w.v[e] * h.decay - h.rate * am.v[e] / (sqrtf(av.v[e]) * h.correct + h.eps);
        rounded.v[e] = (floatX)w.v[e];
    }

    // In the fp32 build master is weights: one store.
    store<W>(m + i, am);
    store<W>(v + i, av);
    store<W>(master + i, w);
    if (!EXACT) { store<W>(weights + i, rounded); }
}

// AdamW with decoupled decay on every tensor (MODEL.md eq. 15); step counts updates from 1. Gradients are scaled down
// to the norm grad_clip (0 = off). Returns the norm before clipping. If it is not finite nothing is changed: the caller
// counts and decides.
static double model_update(Model* m, const AdamW* h, long step) {
    Cuda* g = &m->cuda;
    double norm = gradient_norm(m, g);
    if (!isfinite(norm)) { return norm; }
    AdamWStep s = {(float)(h->grad_clip > 0 && norm > h->grad_clip ? h->grad_clip / norm : 1),
                   (float)h->beta1,
                   (float)h->beta2,
                   (float)h->eps,
                   (float)(1 - h->lr * h->weight_decay),
                   (float)(h->lr / (1 - pow(h->beta1, (double)step))),
                   (float)(1 / sqrt(1 - pow(h->beta2, (double)step)))};
    size_t done = 0;
    for (Span bucket = {0, 0}; bucket.end < m->tensors.numel;) {
        bucket = ranks_bucket_at(ranks_size(m->ranks), m->tensors.numel, bucket.end);
        Span own = ranks_elements(m->ranks, bucket);
        size_t n = own.end - own.begin;
        if (!n) { continue; }  // at the end there may be less blocks than ranks
        LAUNCH(adamw_kernel<8>, ceil_div(n, 256 * 8), 256, 0, g->stream, m->weights + own.begin,
               m->master + (EXACT ? own.begin : done), m->m + done, m->v + done, m->grads + own.begin, n, s);
        launchCheck(g->stream);
        done += n;
    }
    ranks_gather_arena(m->ranks, m->weights, m->tensors.numel, sizeof(floatX));
    return norm;
}

// =====================================================================================================================
// The training step

// One optimizer step: the loss is the sum over all counted targets of the step over their number. Stops between
// micro-batches when a signal has come: then no weight is changed, nor where the loss or the gradient norm is not
// finite. The GPU has done all of it on return.
static StepResult train_step(Model* m, const Step* s) {
    Batch b = step_begin(s);
    do {
        model_zero_gradients(m);
        while (step_next(s, &b)) {
            m->unsent = step_complete(s, &b) ? m->tensors.numel : 0;
            b.sum += model_forward_backward(m, b.tokens, b.targets, b.B, b.T, b.dloss);
            ranks_moved(m->ranks);
        }
        model_keep_shard(m, b.shard - (int)s->own.begin + 1, (int)(s->own.end - s->own.begin));
    } while (step_next_shard(s, &b));

    // Here the sums over the ranks are waited for. step_sum's exchange goes through the same stream, behind them, but
    // the copy that it begins with may wait for that stream inside of the driver: this waits as the watch can see it.
    ranks_finish(m->ranks);
    step_sum(s, &b, m->ranks);
    double norm = step_updates(s, &b) ? model_update(m, &s->hyper, (long)s->number) : (double)NAN;
    cudaCheck(cudaStreamSynchronize(m->cuda.stream));
    return step_result(s, &b, norm);
}

// =====================================================================================================================
// What the plan must know of this machine

// Dense operations a second of a GPU's tensor cores in bf16 (fp32: of its CUDA cores) by the vendor's data sheet; 0 =
// not known, no MFU. GPUs of one architecture differ in their multiprocessors (an H20 has 78, a part of a GPU has
// fewer), those named NVL in their clocks; the emulator is none.
static double card_rate(int capability, int multiprocessors, const char* name) {
    static const struct Card {
        int capability, multiprocessors;
        const char* word;  // of its name
        double bf16, fp32;
    } cards[] = {{80, 108, "NVIDIA", 312e12, 19.5e12},   // A100
                 {90, 132, "NVL", 835e12, 60e12},        // H100 NVL, H200 NVL
                 {90, 132, "NVIDIA", 989e12, 67e12},     // H100 SXM, H200 SXM
                 {90, 114, "NVIDIA", 756e12, 51e12},     // H100 PCIe
                 {100, 148, "NVIDIA", 2250e12, 75e12}};  // B200
    for (const Card& c : cards) {
        if (c.capability == capability && c.multiprocessors == multiprocessors && strstr(name, c.word)) {
            return EXACT ? c.fp32 : c.bf16;
        }
    }
    return 0;
}
static double matmul_rate(const cudaDeviceProp* device) {
    return card_rate(device->major * 10 + device->minor, device_multiprocessors(), device->name);
}

static Recompute recompute_of(const char* name) {
    return !strcmp(name, "block")         ? RECOMPUTE_BLOCK
           : !strcmp(name, "never")       ? FORWARD_ONLY
           : !strcmp(name, "elementwise") ? RECOMPUTE_ELEMENTWISE
                                          : RECOMPUTE_NONE;
}

// CHUNK_CUDNN for --attention-kernels cudnn, 0 for own. Ends the program where this build or this model has no use for
// it.
static int attention_kernels(const TrainOptions* o, const Config* c) {
    int served = 0;
    if (!strcmp(o->attention_kernels, "own")) { return 0; }
    if (!HAS_CUDNN) { die("--attention-kernels cudnn: this build has none; make train_mta_cuda CUDNN=1 has"); }
    if (EXACT) { die("--attention-kernels cudnn: this build computes in fp32, cuDNN's attention in bf16"); }
    for (int l = 0; l < c->num_hidden_layers; l++) { served += cudnn_serves(c, l, CHUNK_CUDNN); }
    if (!served) {
        die("--attention-kernels cudnn: got no layer that it serves, wanted one without operations on the scores "
            "before "
            "the softmax, of heads of at most %d in multiples of 8",
            FLASH_HEAD);
    }
    return CHUNK_CUDNN;
}

// Which layers take which kernels.
static void print_attention(const Run* r, int chunk) {
    const Config* c = &r->config;
    int fused = 0, by_cudnn = 0, layers = c->num_hidden_layers;
    for (int l = 0; l < layers; l++) {
        bool other = cudnn_serves(c, l, chunk);
        by_cudnn += other, fused += !other && flash_serves(c, l, chunk);
    }
    printf("attention   ");
    if (by_cudnn) {
        AttentionPlan plan = attention_plan(c, r->batch_size, r->seq_len, chunk);
        printf("cuDNN in %d of %d layers, %d sequences at a time in %.1f MiB of workspace", by_cudnn, layers, plan.S,
               (double)cudnn_workspace(&plan, plan.S, att_parts(c, chunk)) / 1048576);
    }
    if (fused || !by_cudnn) { printf("%sfused in %d of %d layers", by_cudnn ? ", " : "", fused, layers); }
    if (fused + by_cudnn < layers) {
        printf(", in chunks of %d queries in %d", attention_chunk(r->seq_len), layers - fused - by_cudnn);
    }
    printf("\n");
}

static ModelShape model_shape(const Run* r, int chunk) {
    return {r->batch_size, r->seq_len, chunk, recompute_of(r->options->recompute), run_ranks(r), r->shards};
}

// Needs no GPU; with one, says how large a micro-batch its free memory would hold. chunk: of model_create
static void print_plan(Run* r, int chunk) {
    cudaDeviceProp device;
    int devices = 0;
    bool found = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 &&
                 cudaGetDeviceProperties(&device, device_own()) == cudaSuccess;
    cudaGetLastError();
    ModelShape shape = model_shape(r, chunk);
    MemoryPlan p = model_memory(&r->config, &shape);
    const PlanRow rows[] = {{"weights " PRECISION_NAME, p.weights},
                            {"gradients fp32", p.gradients},
                            {"gradients of shards", p.waiting},
                            {"gradients of ranks", p.room},
                            {shape.ranks > 1 ? (EXACT ? "own part of m, v" : "own m, v, master")
                             : EXACT         ? "optimizer m, v"
                                             : "optimizer m, v, master",
                             p.optimizer},
                            {"activations", p.activations},
                            {"scratch", p.scratch}};
    size_t available = 0, total = 0, reserve = (size_t)MEMORY_RESERVE_MIB << 20;
    cudaError_t status = found ? cudaMemGetInfo(&available, &total) : cudaSuccess;
    if (device_full(status)) {
        cudaGetLastError();
    } else {
        cudaCheck(status);
    }
    size_t room = available > reserve ? available - reserve : 0;
    PlanMachine machine = {found ? device.name : "no GPU", found ? matmul_rate(&device) : 0, (double)room};
    train_print_plan(r, &machine, rows, (int)(sizeof rows / sizeof rows[0]));
    print_attention(r, chunk);
    if (!found) {
        printf("device      no GPU found\n");
        return;
    }
    if (status != cudaSuccess) {
        printf("device      %s, which takes no process more (%s)\n", device.name, cudaGetErrorString(status));
        return;
    }
    int fits = largest_batch(&r->config, &shape, room);
    printf("device      %s, %.1f MiB free of %.1f; the largest micro-batch that fits: %d%s\n", device.name,
           (double)available / 1048576, (double)total / 1048576, fits, or_more(fits));
    fflush(stdout);
}

// =====================================================================================================================
// The table of this trainer (mta/trainer.h), and main

static void* table_create(const Config* c, int B, int T, int chunk, bool training, Error* e) {
    ModelShape x = shape_alone(B, T, chunk, training ? RECOMPUTE_NONE : FORWARD_ONLY);
    return model_create(c, &x, NULL, e);
}
static void table_destroy(void* m) { model_free((Model*)m); }
static const TensorList* table_tensors(const void* m) { return &((const Model*)m)->tensors; }

// Copies n values of a tensor, in fp32, from value `from` on to the device, or back into data. Of m, v and master
// weights apart those that are this process's own.
static void copy_state(const Model* m, StateKind kind, int tensor, size_t from, size_t n, float* data,
                       cudaMemcpyKind way) {
    float* const arenas[] = {m->master, m->grads, m->m, m->v, m->master};
    bool whole = kind == STATE_GRADIENT || (EXACT && (kind == STATE_WEIGHT || kind == STATE_MASTER));
    size_t first = m->tensors.specs[tensor].offset + from, end = first + n;
    for (size_t at = first; at < end;) {
        Stretch s = ranks_stretch(m->ranks, m->tensors.numel, at, end);
        float *state = arenas[kind] + (whole ? at : s.local), *host = data + (at - first);
        if (whole || s.rank == ranks_number(m->ranks)) {
            bool in = way == cudaMemcpyHostToDevice;
            cudaCheck(cudaMemcpyAsync(in ? state : host, in ? host : state, (s.end - at) * sizeof(float), way,
                                      m->cuda.stream));
        }
        at = s.end;
    }
}

// In bf16 the weights that the products read are apart: the rounded master weights, and all that there is of those
// where nothing is trained.
static void table_set(void* model, StateKind kind, int tensor, const float* data) {
    Model* m = (Model*)model;
    cudaStream_t stream = m->cuda.stream;
    size_t n = m->tensors.specs[tensor].numel;
    std::vector<floatX> rounded;
    std::vector<float> widened;
    if (!EXACT && (kind == STATE_WEIGHT || kind == STATE_MASTER)) {
        rounded.assign(data, data + n);
        cudaCheck(cudaMemcpyAsync(m->weights + m->tensors.specs[tensor].offset, rounded.data(), n * sizeof(floatX),
                                  cudaMemcpyHostToDevice, stream));
        if (kind == STATE_WEIGHT) {
            widened.assign(rounded.begin(), rounded.end());
            data = widened.data();
        }
    }
    if (EXACT || m->recompute != FORWARD_ONLY) {
        copy_state(m, kind, tensor, 0, n, (float*)(uintptr_t)data, cudaMemcpyHostToDevice);
    }
    cudaCheck(cudaStreamSynchronize(stream));
}
static void table_get(const void* model, StateKind kind, int tensor, size_t from, size_t n, float* data) {
    const Model* m = (const Model*)model;
    cudaStream_t stream = m->cuda.stream;
    if (!EXACT && kind == STATE_WEIGHT) {
        std::vector<floatX> rounded(n);
        cudaCheck(cudaMemcpyAsync(rounded.data(), m->weights + m->tensors.specs[tensor].offset + from,
                                  n * sizeof(floatX), cudaMemcpyDeviceToHost, stream));
        cudaCheck(cudaStreamSynchronize(stream));
        for (size_t i = 0; i < n; i++) { data[i] = (float)rounded[i]; }
        return;
    }
    copy_state(m, kind, tensor, from, n, data, cudaMemcpyDeviceToHost);
    cudaCheck(cudaStreamSynchronize(stream));
}

static Losses table_forward(void* model, const int32_t* tokens, const int32_t* targets, int B, int T, float* logits) {
    Model* m = (Model*)model;
    model_forward(m, tokens, B, T);
    Losses losses = {model_loss(m, targets, B * T, 0, false, logits), m->losses, m->wrong};
    return losses;
}
static void table_last_logits(void* model, const int32_t* tokens, int n, float* logits) {
    Model* m = (Model*)model;
    int C = m->config.hidden_size, V = m->config.vocab_size;
    floatX* row = (floatX*)alloc_or_die(V, sizeof(floatX), "logits");
    model_forward(m, tokens, 1, n);
    matmul_forward(m->scratch.logits, logit_stride(V), m->acts.ln_f + (size_t)(n - 1) * C, model_head(m, m->weights), 1,
                   C, V, &m->cuda);
    cudaCheck(cudaMemcpyAsync(row, m->scratch.logits, V * sizeof(floatX), cudaMemcpyDeviceToHost, m->cuda.stream));
    cudaCheck(cudaStreamSynchronize(m->cuda.stream));
    for (int v = 0; v < V; v++) { logits[v] = (float)row[v]; }
    free(row);
}
static double table_forward_backward(void* m, const int32_t* tokens, const int32_t* targets, int B, int T,
                                     double dloss) {
    return model_forward_backward((Model*)m, tokens, targets, B, T, dloss);
}
static double table_update(void* m, const AdamW* hyper, long step) { return model_update((Model*)m, hyper, step); }
static StepResult table_train_step(void* m, const Step* step) { return train_step((Model*)m, step); }
static void table_share(void* model, Ranks* ranks, int shards) {
    const Model* m = (const Model*)model;
    (void)m, (void)ranks, (void)shards;
    assert(m->ranks == ranks && m->shards == shards);  // main has made it so: other ranks' parts take no memory
}

extern "C" const Trainer* trainer_cuda(void) {
    static const Trainer table = {
        "cuda " PRECISION_NAME, EXACT,        !EXACT,           table_create,  table_destroy,
        table_tensors,          table_set,    table_get,        table_forward, table_last_logits,
        table_forward_backward, table_update, table_train_step, table_share};
    return &table;
}

#ifndef MTA_LIBRARY
int main(int argc, char** argv) {
    Error e = {{0}};
    TrainOptions options;
    Run run;
    train_begin(&options, argc, argv, ranks_of_nccl);
    run_settle(&run, trainer_cuda(), &options);
    if (!model_check(&run.config, run.batch_size, run.seq_len, &e)) { die("%s", e.text); }
    int chunk = attention_kernels(&options, &run.config);
    print_plan(&run, chunk);
    run_open_data(&run);
    if (options.dry_run) {
        run_meet(&run);
        return EXIT_DONE;
    }
    ModelShape shape = model_shape(&run, chunk);
    Model* m = model_create(&run.config, &shape, run.ranks, &e);
    if (!m) { die("%s", e.text); }  // before the run directory is touched
    m->graphs = m->graphs && options.cuda_graphs;
    if (!strcmp(options.reduce, "nccl")) { m->sum.add = NULL; }
    run.model = m;
    int status = train(&run);
    model_free(m);
    return status;
}
#endif
