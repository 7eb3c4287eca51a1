// test_emulator.cpp: tests of dev/cuda_cpu, the emulator that runs train_mta.cu's kernels on a CPU. Among them planted
// faults: an instrument that cannot see a missing barrier would let every kernel pass.
//   make build/test_emulator build/test_races    the latter those of races.cpp
#include <cuda_runtime.h>
#include <cublas_v2.h>
#include "tensor_cores.h"
#include "check.h"
#include <sys/wait.h>
#include <unistd.h>
#include <memory>
#include <string>

// ---- kernels that are right
// -------------------------------------------------------------------------------------------------------

static __global__ void index_kernel(int* out) {
    int block = (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    int thread = (int)(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
    out[block * (int)(blockDim.x * blockDim.y * blockDim.z) + thread] += 1000 * block + thread;
}

static __global__ void block_sum_kernel(float* out, const float* inp, int n) {
    __shared__ float warp_sum[32];
    float v = (int)threadIdx.x < n ? inp[threadIdx.x] : 0.0f;
    for (int o = 16; o > 0; o /= 2) { v += __shfl_xor_sync(0xffffffffu, v, o); }
    if (threadIdx.x % 32 == 0) { warp_sum[threadIdx.x / 32] = v; }
    __syncthreads();
    float sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) { sum += warp_sum[w]; }
    if ((int)threadIdx.x < n) { out[threadIdx.x] = sum; }
}

static __global__ void warp_kernel(int* out) {
    int t = (int)threadIdx.x;
    out[2 * t] = __shfl_xor_sync(0xffffffffu, t, 5);
    out[2 * t + 1] = t % 2 ? __shfl_xor_sync(0xaaaaaaaau, t, 2) : __shfl_xor_sync(0x55555555u, -t, 2);
}

static __global__ void atomic_kernel(int* out) {
    atomicAdd(&out[0], 1);
    atomicMax(&out[1], (int)threadIdx.x);
}

// c (16,16) = a (16,16) b, one warp: the left 8 columns with b given as (8 columns, 16), the right 8 as (16, 8
// columns). WAIT 0: reads what asynchronous copies have yet to bring; WAIT -1: returns with copies in flight.
template <typename T, int WAIT>
static __global__ void product_kernel(float* c, const T* a, const T* left, const T* right) {
    DYNAMIC_SHARED(T, s);  // a (16,16), left (8,16), right (16,8)
    int lane = (int)threadIdx.x;
    for (int t = lane; t < 64; t += 32) {
        copy_async(s + 8 * t, t < 32 ? a + 8 * t : t < 48 ? left + 8 * (t - 32) : right + 8 * (t - 48), t != 63);
    }
    copy_commit();
    if (WAIT < 0) { return; }
    if (WAIT) { copy_wait<0>(); }
    __syncthreads();
    unsigned x[4], y[4], z[4];
    float l[4] = {}, r[4] = {};
    ldmatrix(x, s + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix(y, s + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
    ldmatrix_transposed(z, s + 384 + lane % 16 * 8);
    if (std::is_same<T, __half>::value) {
        mma_half(l, x, y[0], y[1]);
        mma_half(r, x, z[0], z[1]);
    } else {
        mma_bf16(l, x, y[0], y[1]);
        mma_bf16(r, x, z[0], z[1]);
    }
    for (int e = 0; e < 4; e++) {
        int at = (lane / 4 + e / 2 * 8) * 16 + lane % 4 * 2 + e % 2;
        c[at] = l[e];
        c[at + 8] = r[e];
    }
    copy_wait<0>();
}

static __global__ void unaligned_kernel(float* out) {
    DYNAMIC_SHARED(__half, s);
    unsigned x[4];
    ldmatrix(x, s + threadIdx.x * 8 + 1);
    out[threadIdx.x] = (float)x[0];
}

// Reverses n floats through dynamic shared memory; BARRIER 0 is the planted race.
template <int BARRIER> static __global__ void reverse_kernel(float* out, const float* inp) {
    DYNAMIC_SHARED(float, s);
    s[threadIdx.x] = inp[threadIdx.x];
    if (BARRIER) { __syncthreads(); }
    out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}

// A running sum in place: BARRIER 0 lets a thread overwrite what its neighbour still has to read.
template <int BARRIER> static __global__ void shift_kernel(float* x) {
    float left = threadIdx.x > 0 ? x[threadIdx.x - 1] : 0.0f;
    if (BARRIER) { __syncthreads(); }
    x[threadIdx.x] += left;
}

static __global__ void scale_kernel(float* x, int n, float a) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) { x[i] *= a; }
}

static __global__ void scale_by_kernel(float* x, int n, const float* a) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) { x[i] *= *a; }
}

// ---- kernels that are wrong
// -------------------------------------------------------------------------------------------------------

static __global__ void divergent_kernel(float* x) {
    if (threadIdx.x >= 50) { return; }
    __syncthreads();
    x[threadIdx.x] = 1;
}
static __global__ void two_barriers_kernel(float* x) {
    if (threadIdx.x < 10) {
        x[threadIdx.x] = 1;
        __syncthreads();
    } else {
        __syncthreads();
    }
}
static __global__ void lost_lane_kernel(int* x) {
    if (threadIdx.x != 7) { x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, (int)threadIdx.x, 1); }
}
static __global__ void wrong_mask_kernel(int* x) {
    x[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 2 ? 0xffffffffu : 0x55555555u, 1, 2);
}
template <int LANES>
static __global__ void two_products_kernel(float* out) {  // the first LANES lanes at one place, the others at another
    unsigned a[4] = {}, b = 0;
    float c[4] = {};
    if ((int)threadIdx.x < LANES) {
        mma_half(c, a, b, b);
    } else {
        mma_half(c, a, b, b);
    }
    out[threadIdx.x] = c[0];
}
static __global__ void write_kernel(float* x, int i) { x[i] = 1; }
static __global__ void write_shared_kernel(float* x, int i) {
    __shared__ float before[8], s[8], after[8];
    before[threadIdx.x] = after[threadIdx.x] = s[threadIdx.x] = 1;
    s[i] = 2;
    x[threadIdx.x] = s[0] + before[0] + after[0];
}
static __global__ void write_dynamic_kernel(float* x, int i) {
    DYNAMIC_SHARED(float, s);
    s[i] = 2;
    x[0] = s[i];
}
static __global__ void read_shared_kernel(float* out) {
    __shared__ float s[4];
    DYNAMIC_SHARED(float, d);
    if (threadIdx.x == 1) { s[1] = 1, d[1] = 1; }
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
    out[4 + threadIdx.x] = d[threadIdx.x];
}

// ---- tests
// ---------------------------------------------------------------------------------------------------------------------

template <typename T> struct Device {  // n elements of device memory, freed at the end of the scope
    T* p;
    explicit Device(size_t n) {
        if (cudaMalloc(&p, n * sizeof(T)) != cudaSuccess) { abort(); }
    }
    ~Device() { cudaFree(p); }
};

static void test_index() {
    Device<int> out(2 * 3 * 2 * 4 * 2 * 3);
    cudaMemset(out.p, 0, 288 * sizeof(int));
    LAUNCH(index_kernel, dim3(2, 3, 2), dim3(4, 2, 3), 0, NULL, out.p);
    bool ok = cudaGetLastError() == cudaSuccess;
    for (int i = 0; i < 288; i++) { ok = ok && out.p[i] == 1000 * (i / 24) + i % 24; }
    check(ok, "every thread of every block runs once, with its indices");
}

static void test_reduction() {
    Device<float> in(200), out(200);
    for (int i = 0; i < 200; i++) { in.p[i] = (float)i; }
    bool ok = true;
    for (uint64_t seed = 0; seed < 6; seed++) {
        cuda_cpu::set_order(seed);
        LAUNCH(block_sum_kernel, 1, 256, 0, NULL, out.p, in.p, 200);
        for (int i = 0; i < 200; i++) { ok = ok && out.p[i] == 19900.0f; }
    }
    cuda_cpu::set_order(0);
    check(ok, "block sum by shuffles and shared memory, in every order");
}

static void test_warp() {
    Device<int> out(64 * 2);
    LAUNCH(warp_kernel, 1, 64, 0, NULL, out.p);
    bool ok = true;
    for (int t = 0; t < 64; t++) {
        ok = ok && out.p[2 * t] == (t ^ 5) && out.p[2 * t + 1] == (t % 2 ? t ^ 2 : -(t ^ 2));
    }
    check(ok, "shuffles, of whole warps and of half masks");
    Device<int> a(2);
    cudaMemset(a.p, 0, 8);
    LAUNCH(atomic_kernel, 3, 100, 0, NULL, a.p);
    check(a.p[0] == 300 && a.p[1] == 99, "atomics");
}

static void test_half_types() {
    bool ok = true;
    for (uint32_t b = 0; b < 65536; b++) {
        __half h;
        __nv_bfloat16 q;
        h.bits = q.bits = (uint16_t)b;
        float fh = h, fq = q;
        ok = ok && (isnan(fh) ? isnan((float)__half(fh)) : __half(fh).bits == b);
        ok = ok && (isnan(fq) ? isnan((float)__nv_bfloat16(fq)) : __nv_bfloat16(fq).bits == b);
        // halfway to the next value: to the even one; a little beyond: up
        if (b >= 0x7bff) { continue; }
        __half up = h;
        up.bits++;
        float middle = (fh + (float)up) / 2, above = nextafterf(middle, INFINITY);
        ok = ok && __half(middle).bits == (b % 2 ? b + 1 : b) && __half(above).bits == b + 1;
        __nv_bfloat16 qu = q;
        qu.bits++;
        middle = __uint_as_float((b << 16) + 0x8000u), above = __uint_as_float((b << 16) + 0x8001u);
        ok = ok && __nv_bfloat16(middle).bits == (b % 2 ? b + 1 : b) && __nv_bfloat16(above).bits == b + 1;
    }
    // 1.5 x 683/1024 is halfway between 1 and the next half: the least of all halves decides
    __half least = (__half)0x1p-24f, none = (__half)0.0f, x = (__half)1.5f, y = (__half)(683 / 1024.0f);
    ok = ok && (float)fma_half(x, y, least) == 1 + 0x1p-10f && (float)fma_half(x, y, none) == 1.0f &&
         (float)fma_half((__half)-1.5f, y, least) == -1.0f && isnan((float)fma_half((__half)INFINITY, none, x));
    check(__fdividef(1.0f, 0x1p126f) == 0x1p-126f && __fdividef(-1.0f, 0x1p127f) == 0 &&
              isnan(__fdividef(INFINITY, 0x1p127f)) && __fdividef(1.0f, INFINITY) == 0,
          "a quick division by more than 2^126 is 0");
    ok = ok && isinf((float)__half(65520.0f)) && (float)__half(65519.0f) == 65504.0f && (float)__half(1e-8f) == 0.0f;
    check(ok, "half and bfloat16 round to nearest even, all 65536 values and their midpoints");
}

template <typename T> static bool gemm_case(cudaDataType type, bool ta, bool tb, float beta) {
    const int m = 5, n = 7, k = 11, batch = 2, lda = (ta ? k : m) + 2, ldb = (tb ? n : k) + 1, ldc = m + 3;
    int sa = lda * (ta ? m : k), sb = ldb * (tb ? k : n), sc = ldc * n;
    Device<T> a(batch * sa), b(batch * sb);
    Device<float> c(batch * sc);
    std::vector<float> before(batch * sc);
    for (int i = 0; i < batch * sa; i++) { a.p[i] = (T)(float)(i % 13 - 6); }
    for (int i = 0; i < batch * sb; i++) { b.p[i] = (T)(float)(i % 7 - 3); }
    for (int i = 0; i < batch * sc; i++) { before[i] = c.p[i] = beta == 0 ? NAN : (float)(i % 5); }
    cublasHandle_t h;
    cublasCreate(&h);
    float alpha = 0.5f;
    bool ok = cublasGemmStridedBatchedEx(h, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k,
                                         &alpha, a.p, type, lda, sa, b.p, type, ldb, sb, &beta, c.p, CUDA_R_32F, ldc,
                                         sc, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
    for (int q = 0; q < batch; q++) {
        for (int i = 0; i < m; i++) {
            for (int j = 0; j < n; j++) {
                double sum = 0;
                for (int l = 0; l < k; l++) {
                    sum += (double)(float)a.p[q * sa + (ta ? i * lda + l : l * lda + i)] *
                           (float)b.p[q * sb + (tb ? l * ldb + j : j * ldb + l)];
                }
                double want = 0.5 * sum + (beta == 0 ? 0 : beta * before[q * sc + j * ldc + i]);
                ok = ok && c.p[q * sc + j * ldc + i] == (float)want;
            }
        }
    }
    ok = ok && cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &alpha, a.p, type, m - 1, b.p, type, k, &beta, c.p,
                            CUDA_R_32F, m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_INVALID_VALUE;
    cublasDestroy(h);
    return ok;
}

// Runs the fault in a child; it must die and say `message`.
template <typename F> static void check_fault(F run, const char* message, const char* what) {
    int pipes[2];
    if (pipe(pipes) != 0) { abort(); }
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipes[1], 2);
        close(pipes[0]);
        run();
        _exit(0);
    }
    close(pipes[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = read(pipes[0], buffer, sizeof buffer)) > 0;) { text.append(buffer, (size_t)n); }
    close(pipes[0]);
    int status = 0;
    waitpid(child, &status, 0);
    bool ok = !(WIFEXITED(status) && WEXITSTATUS(status) == 0) && text.find(message) != std::string::npos;
    check(ok, what);
    if (!ok) { printf("  status %d, stderr: %.300s\n", status, text.c_str()); }
}

static void test_gemm() {
    bool ok = true;
    for (int i = 0; i < 8; i++) {
        ok = ok && gemm_case<float>(CUDA_R_32F, i & 1, i & 2, i & 4 ? 1.0f : 0.0f);
        ok = ok && gemm_case<__nv_bfloat16>(CUDA_R_16BF, i & 1, i & 2, i & 4 ? 2.0f : 0.0f);
        ok = ok && gemm_case<__half>(CUDA_R_16F, i & 1, i & 2, i & 4 ? 1.0f : 0.0f);
    }
    check(ok,
          "matrix products: every transposition and type, strided batches, beta; a short leading dimension is refused");
    cublasHandle_t h;
    cublasCreate(&h);
    float one = 1, host[4] = {0, 0, 0, 0};
    Device<float> device(4);
    float* x = device.p;
    for (int i = 0; i < 4; i++) { x[i] = 0; }
    check(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, x, CUDA_R_16BF, 1, x, CUDA_R_16BF, 1, &one, x,
                       CUDA_R_16F, 1, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_NOT_SUPPORTED,
          "a mix of types that cuBLAS lacks is refused");
    auto halves = [&] {
        return cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, x, CUDA_R_16BF, 1, x, CUDA_R_16BF, 1, &one, x,
                            CUDA_R_16BF, 1, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    };
    cublasStatus_t allowed = halves();
    cublasSetMathMode(h, (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    check(allowed == CUBLAS_STATUS_NOT_SUPPORTED && halves() == CUBLAS_STATUS_SUCCESS,
          "a result of 16 bits whose parts may be added in 16 bits is refused");
    check_fault([=] { cublasSetWorkspace(h, (void*)((size_t)host / 256 * 256), 256); }, "the workspace does not lie in",
                "planted: a workspace in the host's memory");
    for (float* y : {host, x + 1}) {  // the host's, and four numbers of which the last lies behind the allocation
        auto run = [=] {
            cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 1, &one, x, CUDA_R_32F, 2, x, CUDA_R_32F, 1, &one, y,
                         CUDA_R_32F, 2, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        };
        check_fault(run, "C does not lie in device memory", "planted: a product into memory that is not the device's");
    }
    cublasDestroy(h);
}

static void test_graph() {
    Device<float> x(10);
    for (int i = 0; i < 10; i++) { x.p[i] = 1; }
    cudaStream_t s;
    cudaStreamCreate(&s);
    cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
    float a = 3;
    LAUNCH(scale_kernel, 1, 32, 0, s, x.p, 10, a);
    a = 5;  // a launch keeps the value it was given
    LAUNCH(scale_kernel, 1, 32, 0, s, x.p, 5, a);
    cudaGraph_t g;
    cudaGraphExec_t e;
    bool ok = cudaStreamEndCapture(s, &g) == cudaSuccess && x.p[0] == 1;
    cudaGraphInstantiate(&e, g);
    cudaGraphLaunch(e, s);
    cudaGraphLaunch(e, s);
    cudaStreamSynchronize(s);
    ok = ok && x.p[0] == 225 && x.p[9] == 9;
    cudaGraphExecDestroy(e);
    cudaGraphDestroy(g);
    cudaStreamDestroy(s);
    check(ok, "a captured graph runs when launched, with the arguments of its capture");
}

// Three passes that scale x by 2, 3 and 4: submitted, captured and replayed, replayed. The factor lies in device
// memory, or is an argument.
static float three_passes(bool in_memory) {
    Device<float> x(1), factor(1);
    cudaStream_t s;
    cudaGraph_t g;
    cudaGraphExec_t e = NULL;
    cudaStreamCreate(&s);
    x.p[0] = 1;
    for (int pass = 0; pass < 3; pass++) {
        float a = (float)(pass + 2);
        cudaMemcpyAsync(factor.p, &a, sizeof a, cudaMemcpyHostToDevice, s);
        auto submit = [&] {
            if (in_memory) {
                LAUNCH(scale_by_kernel, 1, 32, 0, s, x.p, 1, factor.p);
            } else {
                LAUNCH(scale_kernel, 1, 32, 0, s, x.p, 1, a);
            }
        };
        if (pass == 0) { submit(); }
        if (pass == 1) {
            cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
            submit();
            cudaStreamEndCapture(s, &g);
            cudaGraphInstantiate(&e, g);
            cudaGraphDestroy(g);
        }
        if (pass > 0) { cudaGraphLaunch(e, s); }
        cudaStreamSynchronize(s);
    }
    cudaGraphExecDestroy(e);
    cudaStreamDestroy(s);
    return x.p[0];
}

static void test_streams() {
    Device<float> x(1), y(1);
    cudaStream_t s;
    float from = 5, to = 0;
    cudaStreamCreate(&s);
    x.p[0] = y.p[0] = 1;
    cudaMemcpyAsync(x.p, &from, sizeof from, cudaMemcpyHostToDevice, s);
    LAUNCH(scale_kernel, 1, 32, 0, s, x.p, 1, 2.0f);
    cudaMemcpyAsync(&to, x.p, sizeof to, cudaMemcpyDeviceToHost, s);
    LAUNCH(scale_kernel, 1, 32, 0, NULL, y.p, 1, 3.0f);
    check(x.p[0] == 1 && to == 0 && y.p[0] == 3,
          "planted: what nobody waited for is not there yet; the default stream does not wait for others");
    from = 7;
    cudaStreamSynchronize(s);
    check(to == 14, "planted: a host buffer that changes before its copy was waited for arrives changed");
    const struct {
        void *to, *from;
        cudaMemcpyKind kind;
        size_t n;
    } wrong[] = {{x.p, &from, cudaMemcpyDeviceToHost, 4},
                 {&to, x.p, cudaMemcpyHostToDevice, 4},
                 {x.p, &from, cudaMemcpyDeviceToDevice, 4},
                 {x.p, y.p, cudaMemcpyDeviceToDevice, 8}};
    for (const auto& w : wrong) {
        check(cudaMemcpyAsync(w.to, w.from, w.n, w.kind, s) == cudaErrorInvalidValue &&
                  cudaMemcpy(w.to, w.from, w.n, w.kind) == cudaErrorInvalidValue,
              "planted: a copy of another kind than it is said to be, or beyond an allocation");
    }
    check(cudaMemsetAsync(&to, 0, 4, s) == cudaErrorInvalidValue && cudaMemset(x.p, 0, 5) == cudaErrorInvalidValue,
          "planted: a memset of the host's memory, or beyond an allocation");
    cudaGetLastError();
    cudaMemcpyAsync(&to, y.p, sizeof to, cudaMemcpyDeviceToHost, s);
    cudaStreamDestroy(s);
    check(to == 14, "planted: whoever destroys a stream has not waited for it");
    cudaDeviceSynchronize();
    check(to == 3, "the device does what the stream had yet to do");
}

// The host's own code cannot touch guarded device memory, copies and kernels can.
static void test_guard() {
    cuda_cpu::guarded = true;
    {
        Device<float> x(1), y(5000);
        cudaStream_t s;
        float from = 5, to[2] = {};
        cudaStreamCreate(&s);
        cudaMemcpyAsync(x.p, &from, sizeof from, cudaMemcpyHostToDevice, s);
        LAUNCH(scale_kernel, 1, 32, 0, s, x.p, 1, 2.0f);
        cudaMemcpyAsync(&to[0], x.p, sizeof from, cudaMemcpyDeviceToHost, s);
        cudaStreamSynchronize(s);
        cudaMemset(y.p, 0, 20000);
        LAUNCH(scale_kernel, 1, 32, 0, NULL, x.p, 1, 2.0f);
        cudaMemcpy(&to[1], x.p, sizeof from, cudaMemcpyDeviceToHost);
        check(to[0] == 10 && to[1] == 20, "what is guarded is open while a stream works");
        check_fault([&] { from = *(volatile float*)y.p; }, "the host touches device memory",
                    "planted: the host reads device memory");
        check_fault([&] { *(volatile float*)x.p = from; }, "the host touches device memory",
                    "planted: the host writes to device memory");
        cudaStreamDestroy(s);
    }
    cuda_cpu::guarded = false;
}

// Work on a stream whose result another one reads, with and without an event between them.
static void test_events() {
    Device<float> x(1), y(1);
    cudaStream_t first, second;
    cudaEvent_t made, quiet;
    cudaStreamCreate(&first);
    cudaStreamCreateWithPriority(&second, cudaStreamNonBlocking, -5);
    cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
    cudaEventCreate(&quiet);
    check(cudaStreamWaitEvent(second, made) == cudaSuccess && cudaStreamSynchronize(second) == cudaSuccess,
          "an event that was never recorded holds nothing up");
    // Late, as all streams are, and CUDA_CPU_EAGER: then the stream of high priority is ahead.
    cudaStream_t ahead;
    setenv("CUDA_CPU_EAGER", "1", 1);
    cudaStreamCreateWithPriority(&ahead, cudaStreamNonBlocking, -5);
    unsetenv("CUDA_CPU_EAGER");
    for (bool eager : {false, true}) {
        cudaStream_t reads = eager ? ahead : second;
        for (bool waits : {false, true}) {
            x.p[0] = 1, y.p[0] = 0;
            LAUNCH(scale_kernel, 1, 32, 0, first, x.p, 1, 2.0f);
            cudaEventRecord(made, first);
            LAUNCH(scale_kernel, 1, 32, 0, first, x.p, 1, 50.0f);
            if (waits) { cudaStreamWaitEvent(reads, made); }
            cudaMemcpyAsync(y.p, x.p, sizeof(float), cudaMemcpyDeviceToDevice, reads);
            if (!eager) { cudaStreamSynchronize(reads); }
            check(y.p[0] == (waits ? 2 : 1), waits ? "a stream that waits for an event sees what was before it, no more"
                                             : eager ? "planted: a missing event lets an eager stream go ahead"
                                                     : "planted: a missing event leaves stale data");
            cudaStreamSynchronize(first);
        }
    }
    cudaStreamDestroy(ahead);

    // The record of then counts, not one that comes later.
    x.p[0] = 1;
    LAUNCH(scale_kernel, 1, 32, 0, first, x.p, 1, 2.0f);
    cudaEventRecord(made, first);
    cudaStreamWaitEvent(second, made);
    LAUNCH(scale_kernel, 1, 32, 0, first, x.p, 1, 2.0f);
    cudaEventRecord(made, first);
    cudaStreamSynchronize(second);
    check(x.p[0] == 2, "a stream waits for the record of its call");
    check(cudaEventSynchronize(made) == cudaSuccess && x.p[0] == 4, "the host waits for the last record");

    // Two streams that wait for each other in turn.
    x.p[0] = 1;
    for (int i = 0; i < 3; i++) {
        cudaStream_t s = i % 2 ? second : first, next = i % 2 ? first : second;
        LAUNCH(scale_kernel, 1, 32, 0, s, x.p, 1, 2.0f);
        cudaEventRecord(made, s);
        cudaStreamWaitEvent(next, made);
    }
    check(cudaStreamSynchronize(second) == cudaSuccess && x.p[0] == 8, "streams that wait for each other in turn");
    cudaStreamSynchronize(first);

    // Queries: late, then done; none of them runs what is behind.
    LAUNCH(scale_kernel, 1, 32, 0, first, x.p, 1, 2.0f);
    cudaEventRecord(quiet, first);
    LAUNCH(scale_kernel, 1, 32, 0, first, x.p, 1, 2.0f);
    check(cudaEventQuery(quiet) == cudaErrorNotReady && x.p[0] == 8, "an event that is asked for is not ready at once");
    check(cudaGetLastError() == cudaErrorNotReady, "which stays the last error until it is cleared");
    check(cudaEventQuery(quiet) == cudaSuccess && x.p[0] == 16 && cudaEventQuery(quiet) == cudaSuccess,
          "asked again it is, and nothing behind it");
    check(cudaStreamQuery(first) == cudaErrorNotReady && x.p[0] == 16 && cudaStreamQuery(first) == cudaSuccess &&
              x.p[0] == 32 && cudaStreamQuery(first) == cudaSuccess,
          "and so is a stream");
    float ms = -1;
    check(cudaEventElapsedTime(&ms, made, quiet) == cudaErrorInvalidResourceHandle &&
              cudaEventElapsedTime(&ms, quiet, quiet) == cudaSuccess && ms == 0,
          "an event without timing tells no time");
    cudaStreamBeginCapture(first, cudaStreamCaptureModeRelaxed);
    cudaError_t inside = cudaStreamWaitEvent(first, quiet);
    cudaGraph_t graph = NULL;
    check(inside == cudaErrorStreamCaptureIsolation &&
              cudaStreamEndCapture(first, &graph) == cudaErrorStreamCaptureInvalidated,
          "planted: a capture that waits for what is outside of it");
    cudaEventDestroy(made);
    cudaEventDestroy(quiet);
    cudaStreamDestroy(first);
    cudaStreamDestroy(second);
    cudaGetLastError();
}

static void test_devices() {
    Device<float> x(1);
    cudaStream_t s;
    cudaDeviceProp a, b;
    int n = 0, now = 9;
    setenv("CUDA_CPU_DEVICES", "3", 1);
    check(cudaGetDeviceCount(&n) == cudaSuccess && n == 3 && cudaSetDevice(3) == cudaErrorInvalidDevice &&
              cudaSetDevice(2) == cudaSuccess && cudaGetDevice(&now) == cudaSuccess && now == 2,
          "several devices");
    cudaGetDeviceProperties(&a, 1);
    cudaGetDeviceProperties(&b, 2);
    check(memcmp(&a.uuid, &b.uuid, sizeof a.uuid) != 0, "each with a number of its own");
    cudaStreamCreate(&s);
    cudaSetDevice(0);
    cudaGetLastError();
    LAUNCH(scale_kernel, 1, 32, 0, s, x.p, 1, 2.0f);
    check(cudaGetLastError() == cudaErrorInvalidResourceHandle, "planted: a launch into another device's stream");
    cudaEvent_t e;
    cudaEventCreate(&e);
    check(cudaEventRecord(e, s) == cudaErrorInvalidResourceHandle && cudaEventRecord(e) == cudaSuccess &&
              cudaGetLastError() == cudaErrorInvalidResourceHandle,
          "planted: another device's event");
    cudaEventDestroy(e);
    cudaStreamDestroy(s);
    unsetenv("CUDA_CPU_DEVICES");
}

// Captures what `submit` does; the graph, or NULL with *error.
template <typename F> static cudaGraph_t capture(cudaStream_t s, F submit, cudaError_t* error) {
    cudaGraph_t g = NULL;
    cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
    submit();
    *error = cudaStreamEndCapture(s, &g);
    return g;
}

static void test_capture() {
    check(three_passes(true) == 24, "what lies in device memory may change between replays");
    check(three_passes(false) == 18,
          "planted: a scalar that changes between passes is frozen by capture, and the result shows it");
    cudaStream_t s;
    cudaStreamCreate(&s);
    cudaError_t inside = cudaSuccess, end = cudaSuccess;
    cudaGraph_t g = capture(
        s, [&] { inside = cudaStreamSynchronize(s); }, &end);
    check(inside == cudaErrorStreamCaptureUnsupported && end == cudaErrorStreamCaptureInvalidated && !g,
          "planted: a wait inside a capture breaks it");
    float* p = NULL;
    g = capture(
        s, [&] { inside = cudaMalloc(&p, 4); }, &end);
    check(inside == cudaErrorStreamCaptureUnsupported && end == cudaErrorStreamCaptureInvalidated && !g && !p,
          "planted: so does an allocation");
    Device<float> x(4), workspace(64);
    for (int i = 0; i < 4; i++) { x.p[i] = 1; }
    float one = 1;
    cublasHandle_t h;
    cublasCreate(&h);
    cublasSetStream(h, s);
    auto product = [&] {
        return cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, x.p, CUDA_R_32F, 1, x.p, CUDA_R_32F, 1, &one,
                            x.p, CUDA_R_32F, 1, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    };
    cublasStatus_t status = product(), without = CUBLAS_STATUS_SUCCESS, with = CUBLAS_STATUS_SUCCESS,
                   taken = CUBLAS_STATUS_SUCCESS;
    cudaGraphDestroy(capture(
        s, [&] { without = product(); }, &end));
    cublasSetWorkspace(h, workspace.p, 256);
    cudaGraphDestroy(capture(
        s, [&] { with = product(); }, &end));
    cublasSetStream(h, s);
    cudaGraphDestroy(capture(
        s, [&] { taken = product(); }, &end));
    check(status == CUBLAS_STATUS_SUCCESS && without == CUBLAS_STATUS_NOT_SUPPORTED && with == CUBLAS_STATUS_SUCCESS &&
              taken == CUBLAS_STATUS_NOT_SUPPORTED,
          "planted: a product is captured only with a workspace, which setting the stream takes away");
    cublasDestroy(h);
    cudaEvent_t a, b;
    float ms = 0;
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    cudaGraphDestroy(capture(
        s,
        [&] {
            cudaEventRecord(a, s);
            cudaEventRecord(b, s);
        },
        &end));
    check(cudaEventElapsedTime(&ms, a, b) == cudaErrorCapturedEvent,
          "planted: events recorded in a capture tell no time");
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    cudaStreamDestroy(s);
    cudaGetLastError();
}

// The launch hook sees what a launch is made of, at its turn in the stream, and decides how often the kernel runs.
static cuda_cpu::Launch seen;
static int seen_times, hook_runs;
static void hook(const cuda_cpu::Launch& launch, const std::function<void()>& emulate) {
    seen = launch;
    seen_times++;
    for (int i = 0; i < hook_runs; i++) { emulate(); }
}
static void test_hook() {
    Device<float> x(40);
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    for (int i = 0; i < 40; i++) { x.p[i] = 1; }
    cuda_cpu::launch_hook = hook;
    hook_runs = 2;
    LAUNCH(scale_kernel, dim3(2), 32, 64, stream, x.p, 40, 3);  // 3 becomes the float that the kernel wants
    check(seen_times == 0, "a hook is not called before its launch's turn");
    cudaStreamSynchronize(stream);
    check(seen_times == 1 && x.p[0] == 9 && x.p[39] == 9, "a hook may run the kernel twice");
    const auto& a = seen.arguments;
    check(strcmp(seen.name, "scale_kernel") == 0 && seen.kernel == (const void*)scale_kernel && seen.grid.x == 2 &&
              seen.block.x == 32 && seen.shared == 64 && a.size() == 3 && strcmp(a[0].type, "Pf") == 0 &&
              strcmp(a[1].type, "i") == 0 && strcmp(a[2].type, "f") == 0 && a[2].size == sizeof(float),
          "it sees name, kernel, grid, block, shared bytes, and each argument's size and type");
    hook_runs = 0;
    LAUNCH(scale_kernel, 2, 32, 0, NULL, x.p, 40, 3.0f);
    check(seen_times == 2 && x.p[0] == 9, "or not at all");
    LAUNCH(scale_kernel, 2, 2000, 0, NULL, x.p, 40, 3.0f);
    check(seen_times == 2 && cudaGetLastError() == cudaErrorInvalidConfiguration, "it sees no launch that is refused");
    cuda_cpu::launch_hook = NULL;
    LAUNCH(scale_kernel, 2, 32, 0, NULL, x.p, 40, 3.0f);
    check(seen_times == 2 && x.p[0] == 27, "without one the kernel runs as ever");
    cudaStreamDestroy(stream);
}

static void test_failures() {
    Device<float> x(4);
    setenv("CUDA_CPU_FAIL", "cudaMemsetAsync:2", 1);
    bool ok = cudaMemsetAsync(x.p, 0, 16) == cudaSuccess && cudaMemset(x.p, 0, 16) == cudaSuccess &&
              cudaMemsetAsync(x.p, 0, 16) == cudaErrorUnknown;
    check(ok && cudaGetLastError() == cudaErrorUnknown && cudaMemsetAsync(x.p, 0, 16) == cudaSuccess,
          "the n-th call of a function can be told to fail");
    unsetenv("CUDA_CPU_FAIL");
    cudaMemsetAsync(x.p, 0, 16);
    setenv("CUDA_CPU_FAIL", "scale_kernel:1", 1);
    x.p[0] = 1;
    LAUNCH(scale_by_kernel, 1, 32, 0, NULL, x.p, 1, x.p);
    ok = cudaGetLastError() == cudaSuccess;
    LAUNCH(scale_kernel, 1, 32, 0, NULL, x.p, 1, 3.0f);
    check(ok && cudaGetLastError() == cudaErrorLaunchFailure && x.p[0] == 1,
          "and so can a launch, which then does nothing");
    unsetenv("CUDA_CPU_FAIL");
}

static void test_runtime() {
    float* x = NULL;
    bool ok = cudaMalloc(&x, 12) == cudaSuccess && isnan(x[0]) && isnan(x[2]) && isnan((float)*(__half*)x) &&
              isnan((float)*(__nv_bfloat16*)x);
    check(ok, "device memory starts as NaN in every format");
    check(cudaFree(x + 1) == cudaErrorInvalidDevicePointer && cudaFree(x) == cudaSuccess,
          "freeing what was not allocated is an error");
    cudaGetLastError();
    setenv("CUDA_CPU_MEMORY_MIB", "1", 1);
    float* y = NULL;
    check(cudaMalloc(&y, 2 << 20) == cudaErrorMemoryAllocation && !y, "more than the pretended memory cannot be had");
    unsetenv("CUDA_CPU_MEMORY_MIB");
    setenv("CUDA_CPU_DEVICES", "0", 1);
    int n = -1;
    check(cudaGetDeviceCount(&n) == cudaErrorNoDevice && n == 0, "a machine without a GPU can be pretended");
    unsetenv("CUDA_CPU_DEVICES");
    setenv("CUDA_CPU_DRIVER", "old", 1);
    check(cudaGetDeviceCount(&n) == cudaErrorInsufficientDriver, "and one with an old driver");
    unsetenv("CUDA_CPU_DRIVER");
    setenv("CUDA_CPU_FULL", "46", 1);
    size_t most = 0, left = 0;
    check(cudaGetDeviceCount(&n) == cudaSuccess && cudaSetDevice(0) == cudaErrorDevicesUnavailable &&
              cudaMemGetInfo(&left, &most) == cudaErrorDevicesUnavailable,
          "and one that others have: there is no context to be had");
    unsetenv("CUDA_CPU_FULL");
    cudaGetLastError();
    Device<float> z(64);
    LAUNCH(scale_kernel, 1, 1025, 0, NULL, z.p, 4, 1.0f);
    ok = cudaGetLastError() == cudaErrorInvalidConfiguration;
    LAUNCH(reverse_kernel<1>, 1, 32, 64 << 10, NULL, z.p, z.p);
    ok = ok && cudaGetLastError() == cudaErrorInvalidConfiguration;
    cudaFuncSetAttribute(reverse_kernel<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
    LAUNCH(reverse_kernel<1>, 1, 32, 64 << 10, NULL, z.p, z.p);
    check(ok && cudaGetLastError() == cudaSuccess,
          "launches beyond the limits of a GPU are refused, the opt-in limit of shared memory works");
}

// Tensor-core products and the copies that feed them, against plain sums. The last row of b's right half is not copied
// (its copy is not valid): zeros.
static __global__ void transpose_kernel(unsigned* out, const unsigned* inp) {
    out[threadIdx.x] = transpose8(inp[threadIdx.x]);
}
static void test_transpose() {  // element (row, column) of the 8x8 matrix is 8 row + column
    Device<unsigned> inp(32), out(32);
    bool ok = true;
    for (unsigned l = 0; l < 32; l++) { inp.p[l] = 2 * l | (2 * l + 1) << 16; }
    LAUNCH(transpose_kernel, 1, 32, 0, NULL, out.p, inp.p);
    cudaDeviceSynchronize();
    for (unsigned l = 0; l < 32; l++) {
        ok = ok && out.p[l] == ((16 * (l % 4) + l / 4) | (16 * (l % 4) + 8 + l / 4) << 16);
    }
    check(ok, "movmatrix transposes");
}
template <typename T> static bool product_case() {
    Device<T> a(256), left(128), right(128);
    Device<float> c(256);
    for (int i = 0; i < 256; i++) { a.p[i] = (T)(float)((i * 7 + i / 16) % 23 - 11); }
    for (int i = 0; i < 128; i++) { left.p[i] = (T)(float)(i * 5 % 19 - 9), right.p[i] = (T)(float)(i * 3 % 17 - 8); }
    LAUNCH((product_kernel<T, 1>), 1, 32, 512 * sizeof(T), NULL, c.p, a.p, left.p, right.p);
    cudaDeviceSynchronize();
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) {
                sum += (float)a.p[i * 16 + k] * (j < 8    ? (float)left.p[j * 16 + k]
                                                 : k < 15 ? (float)right.p[k * 8 + j - 8]
                                                          : 0.0f);
            }
            if (c.p[i * 16 + j] != sum) { return false; }
        }
    }
    return true;
}
static void test_tensor_cores() {
    check(product_case<__half>(), "ldmatrix, mma and asynchronous copies, fp16");
    check(product_case<__nv_bfloat16>(), "ldmatrix, mma and asynchronous copies, bf16");
    Device<__half> a(256), b(128);
    Device<float> c(256);
    for (int i = 0; i < 256; i++) { a.p[i] = (__half)1.0f, b.p[i / 2] = (__half)1.0f; }
    LAUNCH((product_kernel<__half, 0>), 1, 32, 1024, NULL, c.p, a.p, b.p, b.p);
    cudaDeviceSynchronize();
    check(isnan(c.p[0]), "planted: what an asynchronous copy has yet to bring is NaN");
}

template <typename K> static bool orders_agree(K run, int n) {
    std::vector<float> first(n), x(n);
    bool same = true;
    for (uint64_t seed = 0; seed < 8; seed++) {
        cuda_cpu::set_order(seed);
        run(x.data());
        if (seed == 0) { first = x; }
        same = same && memcmp(x.data(), first.data(), n * sizeof(float)) == 0;
    }
    cuda_cpu::set_order(0);
    return same;
}

static void test_races() {
    auto reverse = [](bool barrier) {
        return orders_agree(
            [=](float* host) {
                Device<float> in(64), out(64);
                for (int i = 0; i < 64; i++) { in.p[i] = (float)i; }
                if (barrier) {
                    LAUNCH(reverse_kernel<1>, 1, 64, 256, NULL, out.p, in.p);
                } else {
                    LAUNCH(reverse_kernel<0>, 1, 64, 256, NULL, out.p, in.p);
                }
                memcpy(host, out.p, 256);
            },
            64);
    };
    auto shift = [](bool barrier) {
        return orders_agree(
            [=](float* host) {
                for (int i = 0; i < 64; i++) { host[i] = (float)i; }
                if (barrier) {
                    LAUNCH(shift_kernel<1>, 1, 64, 0, NULL, host);
                } else {
                    LAUNCH(shift_kernel<0>, 1, 64, 0, NULL, host);
                }
            },
            64);
    };
    check(reverse(true) && shift(true), "right kernels give the same bits under every order of threads");
    setenv("CUDA_CPU_ORDER", "7", 1);
    std::unique_ptr<cuda_cpu::Machine> begun(new cuda_cpu::Machine());
    check(begun->order_seed == 7, "CUDA_CPU_ORDER chooses the order that a program begins with");
    unsetenv("CUDA_CPU_ORDER");
    check(!reverse(false), "planted: a read after write past a missing barrier differs under a permuted order");
    check(!shift(false), "planted: a write after read past a missing barrier differs under a permuted order");
}

static void test_uninitialised() {
    Device<float> out(8), x(4), y(4);
    LAUNCH(read_shared_kernel, 1, 4, 16, NULL, out.p);
    check(out.p[1] == 1 && out.p[5] == 1 && isnan(out.p[0]) && isnan(out.p[4]),
          "planted: shared memory read before it is written is NaN");
    LAUNCH(scale_kernel, 1, 4, 0, NULL, x.p, 4, 0.0f);
    check(isnan(x.p[0]), "planted: device memory read before it is written is NaN, even times zero");
}

static void test_faults() {
    Device<float> x(64);
    Device<int> n(64);
    float* p = x.p;
    int* q = n.p;
    check_fault([=] { LAUNCH(divergent_kernel, 1, 64, 0, NULL, p); }, "divergent barrier: 50 of 64",
                "planted: an early return ahead of a barrier");
    check_fault([=] { LAUNCH(two_barriers_kernel, 1, 64, 0, NULL, p); }, "reaches the barrier of line",
                "planted: two branches, two barriers");
    check_fault([=] { LAUNCH(lost_lane_kernel, 1, 32, 0, NULL, q); }, "only ffffff7f came",
                "planted: a shuffle that one lane misses");
    check_fault([=] { LAUNCH(wrong_mask_kernel, 1, 32, 0, NULL, q); }, "only aaaaaaaa came",
                "planted: lanes that disagree about the mask");
    LAUNCH(two_products_kernel<32>, 1, 32, 0, NULL, p);
    check_fault([=] { LAUNCH(two_products_kernel<16>, 1, 32, 0, NULL, p); }, "while other lanes wait at that of line",
                "planted: a warp's lanes in two products");
#if defined(__SANITIZE_ADDRESS__)
    check_fault(
        [=] {
            LAUNCH((product_kernel<__half, -1>), 1, 32, 1024, NULL, p, (const __half*)p, (const __half*)p,
                   (const __half*)p);
        },
        "asynchronous copies in flight", "planted: a thread that returns before its copies are there");
    check_fault([=] { LAUNCH(unaligned_kernel, 1, 32, 1024, NULL, p); }, "not at a multiple of 16 bytes",
                "planted: a row of ldmatrix between two banks");
    check_fault([=] { LAUNCH(write_kernel, 1, 1, 0, NULL, p, 64); }, "AddressSanitizer",
                "planted: a write past the end of device memory");
    check_fault([=] { LAUNCH(write_kernel, 1, 1, 0, NULL, p, -1); }, "AddressSanitizer",
                "planted: a write ahead of device memory");
    check_fault([=] { LAUNCH(write_shared_kernel, 1, 8, 0, NULL, p, 8); }, "AddressSanitizer",
                "planted: a write past a static shared array");
    check_fault([=] { LAUNCH(write_dynamic_kernel, 1, 1, 20, NULL, p, 5); }, "AddressSanitizer",
                "planted: a write past dynamic shared memory");
    check_fault(
        [=] {
            cudaFree(p);
            LAUNCH(write_kernel, 1, 1, 0, NULL, p, 0);
        },
        "AddressSanitizer", "planted: a write to freed device memory");
    LAUNCH(write_shared_kernel, 1, 8, 0, NULL, p, 7);
    check(p[0] == 3, "a write inside the static shared array passes");
#else
    printf("SKIP out-of-bounds faults: built without -fsanitize=address\n");
    skipped += 6;
    (void)write_kernel, (void)write_shared_kernel, (void)write_dynamic_kernel;
#endif
}

#if defined(__SANITIZE_THREAD__)  // built for races.cpp
// ---- races: kernels that are right with BARRIER 1, wrong with 0, whatever the order of threads
// ------------------------------------

template <int BARRIER> static __global__ void exchange_kernel(float* out) {  // between the lanes of a warp
    DYNAMIC_SHARED(float, s);
    s[threadIdx.x] = (float)threadIdx.x;
    if (BARRIER) { __syncwarp(); }
    out[threadIdx.x] = s[threadIdx.x ^ 1];
}
template <int BARRIER>
static __global__ void
rounds_kernel(float* out) {  // a slow thread still reads what a fast one overwrites in the next round
    DYNAMIC_SHARED(float, s);
    float sum = 0;
    for (int round = 0; round < 2; round++) {
        if (BARRIER) { __syncthreads(); }
        s[threadIdx.x] = (float)round;
        __syncthreads();
        sum += s[blockDim.x - 1 - threadIdx.x];
    }
    out[threadIdx.x] = sum;
}
template <int BARRIER>
static __global__ void copies_kernel(float* out, const float* inp) {  // the copy is under way while others still read
    DYNAMIC_SHARED(float, s);
    for (int e = 0; e < 4; e++) { s[4 * threadIdx.x + e] = 1; }
    __syncthreads();
    out[threadIdx.x] = s[(4 * threadIdx.x + 4) % (4 * blockDim.x)];
    if (BARRIER) { __syncthreads(); }
    copy_async(s + 4 * threadIdx.x, inp, true);
    copy_commit();
    copy_wait<0>();
}
template <int BARRIER>
static __global__ void early_kernel(float* out,
                                    const float* inp) {  // a thread reads where its own copy has yet to arrive
    DYNAMIC_SHARED(float, s);
    s[0] = 1;
    copy_async(s, inp, true);
    copy_commit();
    if (BARRIER) { copy_wait<0>(); }
    out[0] = s[0];
    copy_wait<0>();
}
template <int OWN> static __global__ void blocks_kernel(float* out) {  // OWN 0: block 0 reads what block 1 writes
    float before = OWN ? 0 : out[1];
    out[blockIdx.x] = before;
}

static void test_race_detector() {
    Device<float> x(64), y(64);
    Device<int> n(2);
    float *p = x.p, *q = y.p;
    for (int i = 0; i < 64; i++) { p[i] = q[i] = 1; }
    n.p[0] = n.p[1] = 0;
    LAUNCH(block_sum_kernel, 1, 64, 0, NULL, p, q, 64);
    LAUNCH(reverse_kernel<1>, 1, 64, 256, NULL, p, q);
    LAUNCH(shift_kernel<1>, 1, 64, 0, NULL, p);
    LAUNCH(exchange_kernel<1>, 1, 64, 256, NULL, p);
    LAUNCH(rounds_kernel<1>, 1, 64, 256, NULL, p);
    LAUNCH(copies_kernel<1>, 1, 64, 1024, NULL, p, q);
    LAUNCH(early_kernel<1>, 1, 1, 16, NULL, p, q);
    LAUNCH(blocks_kernel<1>, 2, 1, 0, NULL, p);
    LAUNCH(atomic_kernel, 3, 100, 0, NULL, n.p);
    check(product_case<__half>() && cudaGetLastError() == cudaSuccess, "right kernels race nowhere");
    for (uint64_t order = 0; order < 3; order++) {
        cuda_cpu::set_order(order);
        check_fault([=] { LAUNCH(reverse_kernel<0>, 1, 64, 256, NULL, p, q); },
                    "race: ", "planted: a read after write past a missing barrier");
        check_fault([=] { LAUNCH(shift_kernel<0>, 1, 64, 0, NULL, p); },
                    "race: ", "planted: a write after read past a missing barrier");
        check_fault([=] { LAUNCH(exchange_kernel<0>, 1, 64, 256, NULL, p); },
                    "race: ", "planted: lanes that exchange past a missing __syncwarp");
        check_fault([=] { LAUNCH(rounds_kernel<0>, 1, 64, 256, NULL, p); },
                    "race: ", "planted: rounds without a barrier between");
        check_fault([=] { LAUNCH(copies_kernel<0>, 1, 64, 1024, NULL, p, q); },
                    "race: ", "planted: a copy begins while others still read there");
        check_fault([=] { LAUNCH(early_kernel<0>, 1, 1, 16, NULL, p, q); }, "asynchronous copy is under way",
                    "planted: a read ahead of the own copy's end");
        check_fault([=] { LAUNCH(blocks_kernel<0>, 2, 1, 0, NULL, p); }, "another block",
                    "planted: blocks that touch the same memory");
    }
}
int main() {
    test_race_detector();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
#else
int main() {
    test_index();
    test_reduction();
    test_warp();
    test_half_types();
    test_gemm();
    test_graph();
    test_streams();
    test_guard();
    test_events();
    test_devices();
    test_capture();
    test_hook();
    test_failures();
    test_runtime();
    test_tensor_cores();
    test_transpose();
    test_races();
    test_uninitialised();
    test_faults();
    return test_verdict();
}
#endif
