// cuda_step.cu: speed of train_mta.cu's training step on this GPU: tokens/s, MFU, memory, and time by kernel class. It
// includes the trainer, so what is measured is what ships; it adds only the clock around launches and products.
//   make build/cuda_step && build/cuda_step MODEL ATTENTION T [B=0: 32768 tokens, or less if memory is short] [STEPS=5]
// One line for a table, then (--classes) one line for each class that takes at least 1% of a step; cuDNN's own
// launches, of attention with --cudnn, are in none. Random tokens, random weights.
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

static bool profiling = false;
static void clock_start(const char* name, cudaStream_t stream);
static void clock_stop(cudaStream_t stream);
// A launch through a pointer that chooses among instances is named after its launcher.
static const char* launch_name(const char* kernel, const char* function) {
    return strcmp(kernel, "kernel") ? kernel : function;
}

#if defined(CUDA_CPU)
#undef LAUNCH
#define LAUNCH(kernel, grid, block, shared, stream, ...)                             \
    do {                                                                             \
        if (profiling) { clock_start(launch_name(#kernel, __func__), stream); }      \
        cuda_cpu::launch(#kernel, grid, block, shared, stream, kernel, __VA_ARGS__); \
        if (profiling) { clock_stop(stream); }                                       \
    } while (0)
#else
#define LAUNCH(kernel, grid, block, shared, stream, ...)                        \
    do {                                                                        \
        if (profiling) { clock_start(launch_name(#kernel, __func__), stream); } \
        kernel<<<grid, block, shared, stream>>>(__VA_ARGS__);                   \
        if (profiling) { clock_stop(stream); }                                  \
    } while (0)
#endif

// Products of attention are batches, all others are single.
static cublasStatus_t timed_gemm(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                 const void* alpha, const void* A, cudaDataType_t at, int lda, long long sa,
                                 const void* B, cudaDataType_t bt, int ldb, long long sb, const void* beta, void* C,
                                 cudaDataType_t ct, int ldc, long long sc, int batch, cublasComputeType_t compute,
                                 cublasGemmAlgo_t algo) {
    cudaStream_t stream = NULL;
#if defined(CUDA_CPU)
    stream = h->stream;
#else
    cublasGetStream(h, &stream);
#endif
    if (profiling) { clock_start(sc ? "attention products" : "matrix products", stream); }
    cublasStatus_t s = cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, A, at, lda, sa, B, bt, ldb, sb, beta, C,
                                                  ct, ldc, sc, batch, compute, algo);
    if (profiling) { clock_stop(stream); }
    return s;
}
#define cublasGemmStridedBatchedEx timed_gemm
#define MTA_LIBRARY
#include "../../train_mta.cu"

enum { MAX_SPANS = 1 << 18, MAX_CLASSES = 128 };
typedef struct {
    const char* name;
    cudaEvent_t start, stop;
} TimedSpan;
static TimedSpan spans[MAX_SPANS];
static int n_spans = 0;

static void clock_start(const char* name, cudaStream_t stream) {
    if (n_spans == MAX_SPANS) {
        profiling = false;
        return;
    }
    TimedSpan* s = &spans[n_spans];
    s->name = name;
    cudaCheck(cudaEventCreate(&s->start));
    cudaCheck(cudaEventCreate(&s->stop));
    cudaCheck(cudaEventRecord(s->start, stream));
}
static void clock_stop(cudaStream_t stream) {
    if (n_spans < MAX_SPANS) { cudaCheck(cudaEventRecord(spans[n_spans++].stop, stream)); }
}

typedef struct {
    char name[64];
    double ms;
    int launches;
} Class;
static int by_time(const void* a, const void* b) { return ((const Class*)a)->ms < ((const Class*)b)->ms ? 1 : -1; }

// "(head_mix_kernel<float>)" and "rope_forward_kernel<WIDE>" are "head_mix" and "rope_forward"
static void class_name(char* out, size_t n, const char* name) {
    snprintf(out, n, "%s", name + (name[0] == '('));
    char* end = strstr(out, "_kernel");
    if (end) { *end = 0; }
}

static void print_classes(int N) {
    static Class classes[MAX_CLASSES];
    int n = 0;
    double total = 0;
    for (int i = 0; i < n_spans; i++) {
        char name[64];
        float ms = 0;
        int c = 0;
        class_name(name, sizeof name, spans[i].name);
        cudaCheck(cudaEventElapsedTime(&ms, spans[i].start, spans[i].stop));
        while (c < n && strcmp(classes[c].name, name)) { c++; }
        if (c == n) {
            if (n == MAX_CLASSES) { continue; }
            snprintf(classes[n++].name, sizeof classes[0].name, "%s", name);
        }
        classes[c].ms += (double)ms;
        classes[c].launches++;
        total += (double)ms;
    }
    qsort(classes, (size_t)n, sizeof classes[0], by_time);
    for (int c = 0; c < n && classes[c].ms >= 0.01 * total; c++) {
        printf("    %-28s %7.1f ms  %5.1f%%  %8.1f ns a token  %6d launches\n", classes[c].name, classes[c].ms,
               100 * classes[c].ms / total, 1e6 * classes[c].ms / N, classes[c].launches);
    }
}

int main(int argc, char** argv) {
    Config c;
    Error e = {{0}};
    bool classes = argc > 1 && !strcmp(argv[argc - 1], "--classes");
    argc -= classes;
    bool by_cudnn = argc > 1 && !strcmp(argv[argc - 1], "--cudnn");
    argc -= by_cudnn;
    int chunk = by_cudnn ? CHUNK_CUDNN : 0;
    if (argc < 4 || argc > 6 || !preset_find(argv[1])) {
        die("usage: cuda_step MODEL ATTENTION T [B] [STEPS] [--cudnn] [--classes]");
    }
    int T = atoi(argv[3]), B = argc > 4 ? atoi(argv[4]) : 0, steps = argc > 5 ? atoi(argv[5]) : 5;
    config_from_preset(&c, preset_find(argv[1]));
    if (!config_set_attention(&c, argv[2], false, &e) || !config_check(&c, &e)) { die("%s", e.text); }
    if (T < 1 || steps < 1) { die("T and STEPS must be positive"); }
    cudaDeviceProp device;
    size_t available = 0, total = 0, reserve = (size_t)MEMORY_RESERVE_MIB << 20;
    Cuda probe = {};
    if (!cuda_open(&probe, &e)) { die("%s", e.text); }
    cudaCheck(cudaGetDeviceProperties(&device, 0));
    cudaCheck(cudaMemGetInfo(&available, &total));
    cuda_close(&probe);
    ModelShape shape = shape_alone(B, T, chunk, RECOMPUTE_NONE);
    if (!B) {
        int fits = largest_batch(&c, &shape, available > reserve ? available - reserve : 0);
        shape.B = B = max_int(1, min_int(max_int(1, 32768 / T), fits));
    }
    Model* m = model_create(&c, &shape, NULL, &e);
    if (!m) { die("%s", e.text); }
    model_initialise(trainer_cuda(), m, &m->config, 1);
    int N = B * T;
    int32_t* tokens = (int32_t*)alloc_or_die((size_t)N, sizeof(int32_t), "tokens");
    Rng rng = rng_make(1, 2);
    for (int n = 0; n < N; n++) { tokens[n] = (int32_t)(rng_u32(&rng) % (uint32_t)c.vocab_size); }
    AdamW hyper = {1e-5, 0.9, 0.98, 1e-8, 0.05, 1};
    double best = INFINITY, direct = 0, loss = 0;
    auto seconds_of_step = [&](int step) {
        double start = seconds_now();
        model_zero_gradients(m);
        model_forward(m, tokens, B, T);
        loss = model_loss(m, tokens, N, (float)(1.0 / N), true, NULL) / N;
        model_backward(m, tokens, B, T);
        model_update(m, &hyper, step);
        cudaCheck(cudaStreamSynchronize(m->cuda.stream));
        return seconds_now() - start;
    };
    // the first step launches one by one, the second captures the graphs, the timed ones replay them; then one without
    // graphs, and one with the clock inside, since events recorded in a capture tell no time
    int step = 1;
    m->graphs = !WAITS;
    for (; step <= steps + 2; step++) {
        double seconds = seconds_of_step(step);
        if (step > 2) { best = fmin(best, seconds); }
    }
    m->graphs = false;
    direct = seconds_of_step(step++);
    profiling = classes;
    if (classes) { seconds_of_step(step++); }
    profiling = false;
    MemoryPlan p = model_memory(&c, &shape);
    double rate = N / best, peak = matmul_rate(&device);
    char name[64], mfu[32] = " not known";  // of a GPU that card_rate does not have
    if (peak > 0) { snprintf(mfu, sizeof mfu, " %5.1f%%", 100 * rate * model_flops_per_token(&c, T) / peak); }
    snprintf(name, sizeof name, "%s%s", argv[2], by_cudnn ? "-cudnn" : "");
    printf("%-14s T %-5d B %-3d %9.0f tokens/s  MFU%s  %8.0f MiB  loss %.3f  without graphs %.0f tokens/s\n", name, T,
           B, rate, mfu, (double)memory_total(&p) / 1048576, loss, N / direct);
    if (classes) { print_classes(N); }
    fflush(stdout);
    model_free(m);
    free(tokens);
    return isfinite(loss) ? 0 : 1;
}
