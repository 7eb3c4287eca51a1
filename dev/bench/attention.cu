// attention.cu: the attention of one layer alone, fused and chunked, at the 880M model's shapes. It includes the trainer: what is measured is what ships.
//   make build/attention_cuda && build/attention_cuda [SEQUENCES=16]   on a GPU: microseconds a sequence, TFLOP/s, share of the roofline
//   make build/attention_cpu && build/attention_cpu                    without one: what the fused kernels execute per tile, counted by dev/cuda_cpu
// FLOPs are those of the definition on the causal half: 4 T^2/2 (HS + values) forward, values HS or 2 HS wide, 2.5 times that backward, and for a convolution
// 2 cq ck T^2/2 forward, twice that backward.
#if !defined(MTA_LIBRARY)
#define MTA_LIBRARY
#endif
#include "../../train_mta.cu"

typedef struct { const char* title; bool conv, mix; } Layer;
static const Layer LAYERS[] = {{"plain", false, false}, {"pairs mixed", false, true}, {"convolution, pairs mixed", true, true}};

static Model* layer_model(const Layer* l, int B, int T, int NH, int HS, int chunk) {
    Config c = config_default();
    Error e = {{0}};
    c.vocab_size = 8, c.hidden_size = NH * HS, c.intermediate_size = 8, c.num_hidden_layers = 1, c.num_attention_heads = c.num_key_value_heads = NH;
    c.max_position_embeddings = T, c.kq_conv_layer[0] = l->conv, c.kq_conv_pre_softmax = l->conv, c.kq_conv_query_size = 6, c.kq_conv_key_size = 11;
    c.head_mix_post_softmax = l->mix ? 2 : 0;
    if (!config_check(&c, &e)) { die("%s", e.text); }
    Model* m = model_create(&c, B, T, chunk, RECOMPUTE_NONE, &e);
    if (!m) { die("%s", e.text); }
    model_initialise(trainer_cuda(), m, &m->config, 1);
    size_t n = (size_t)NH * T * HS;  // of a sequence; all have the same, since drawing numbers for 16 of them takes longer than everything that is timed
    floatX* x = (floatX*)alloc_or_die(n, sizeof(floatX), "inputs");
    floatX* const to[] = {m->acts.q, m->acts.k, m->acts.v, m->scratch.datt};
    for (int i = 0; i < 4; i++) {
        Rng rng = rng_make(2, (uint64_t)i);
        for (size_t k = 0; k < n; k++) { x[k] = (floatX)rng_normal(&rng); }
        for (int b = 0; b < B; b++) { cudaCheck(cudaMemcpyAsync(to[i] + b * n, x, n * sizeof(floatX), cudaMemcpyHostToDevice, m->cuda.stream)); }
        cudaCheck(cudaStreamSynchronize(m->cuda.stream));
    }
    free(x);
    return m;
}
static Attention layer_attention(Model* m, int B, int T) {
    LayerOf<floatX> w = model_layer(m, m->weights, 0);
    Attention a = attention_of(m, &w, 0, B, T);
    if (a.pair_mix) { convert(m->scratch.pair_mix, w.head_mix, 2 * m->config.num_attention_heads, &m->cuda); }
    return a;
}
static void layer_forward_once(Model* m, const Attention* a) {
    attention_forward(m->acts.att, m->acts.stats, m->acts.q, m->acts.k, m->acts.v, a, &m->scratch.attention, &m->cuda);
}
static void layer_backward_once(Model* m, const Attention* a) {
    Scratch* s = &m->scratch;
    Rope rope = {s->cosine, s->sine, a->T, a->NH, a->NH, a->HS};
    attention_backward(s->qkv, &m->sums, s->datt, m->acts.att, m->acts.q, m->acts.k, m->acts.v, m->acts.stats, &rope, a, &s->attention, &m->cuda);
}

#if defined(CUDA_CPU)
static void count(const Layer* l) {
    enum { T = 512, NH = 2, HS = 96 };
    Model* m = layer_model(l, 1, T, NH, HS, 0);
    Attention a = layer_attention(m, 1, T);
    for (int backward = 0; backward < 2; backward++) {
        int rows = backward && l->conv ? 64 : 128, tiles = 0, lag = l->conv && !backward ? 8 : 0;
        for (int i = 0; i < T; i += rows) { tiles += backward ? (min_int(i + rows, T) - 1) / FLASH_KEYS + 1 : (i + rows - 1 + lag) / FLASH_KEYS + 1; }
        tiles *= NH;
        cuda_cpu::tensor_counts = {};
        if (backward) { layer_backward_once(m, &a); } else { layer_forward_once(m, &a); }
        cudaCheck(cudaStreamSynchronize(m->cuda.stream));
        const cuda_cpu::TensorCounts& n = cuda_cpu::tensor_counts;
        double ideal = (double)rows * FLASH_KEYS * HS * (l->mix ? 3 : 2) / 2048 * (backward ? 2.5 : 1);
        if (backward && l->mix) { ideal = (double)rows * FLASH_KEYS * HS * (3 + 2 * 2) / 2048; }  // S, dQ, dK; dP and dV twice as wide
        if (l->conv) { ideal += (double)rows * FLASH_KEYS * 144 * (backward ? 3 : 1) / 2048; }
        printf("%-26s %-8s tile %3d x %d: %7.1f mma (%.1f without halos), %7.1f ldmatrix = %6.1f KB, %6.1f KB copied\n", l->title, backward ? "backward" : "forward",
               rows, FLASH_KEYS, (double)n.mma / tiles, ideal, (double)n.ldmatrix / tiles, 0.5 * (double)n.ldmatrix / tiles, 16.0 / 1024 * (double)n.copies / tiles);
    }
    model_free(m);
}
int main(void) {
    for (const Layer& l : LAYERS) { count(&l); }
    return 0;
}
#else
static double microseconds(Model* m, const Attention* a, bool backward) {
    enum { ROUNDS = 5 };
    cudaEvent_t start, stop;
    cudaCheck(cudaEventCreate(&start));
    cudaCheck(cudaEventCreate(&stop));
    float best = INFINITY;
    for (int r = 0; r <= ROUNDS; r++) {  // the first warms up
        cudaCheck(cudaEventRecord(start, m->cuda.stream));
        if (backward) { layer_backward_once(m, a); } else { layer_forward_once(m, a); }
        cudaCheck(cudaEventRecord(stop, m->cuda.stream));
        cudaCheck(cudaEventSynchronize(stop));
        float ms = 0;
        cudaCheck(cudaEventElapsedTime(&ms, start, stop));
        if (r > 0 && ms < best) { best = ms; }
    }
    cudaCheck(cudaEventDestroy(start));
    cudaCheck(cudaEventDestroy(stop));
    return 1000.0 * (double)best;
}
int main(int argc, char** argv) {
    enum { NH = 16, HS = 96 };
    int sequences = argc > 1 ? atoi(argv[1]) : 16;
    cudaDeviceProp device;
    cudaCheck(cudaGetDeviceProperties(&device, 0));
    double peak = matmul_rate(&device);
    setvbuf(stdout, NULL, _IOLBF, 0);  // a limit of time may end this before the last row
    printf("%s; microseconds a sequence and layer of %d heads of %d, best of 5; TFLOP/s; share of %.0f TFLOP/s\n", device.name, NH, HS, peak / 1e12);
    for (int T = 2048; T <= 4096; T *= 2) {
        int B = max_int(1, sequences * 2048 / T);
        for (const Layer& l : LAYERS) {
            for (int fused = 1; fused >= 0; fused--) {
                Model* m = layer_model(&l, B, T, NH, HS, fused ? 0 : attention_chunk(T));
                Attention a = layer_attention(m, B, T);
                for (int backward = 0; backward < 2; backward++) {
                    double us = microseconds(m, &a, backward) / B, half = 0.5 * T * T * NH;
                    double flops = half * 4 * (HS + (l.mix ? 2 : 1) * HS) / 2 * (backward ? 2.5 : 1) + (l.conv ? half * 2 * 66 * (backward ? 2 : 1) : 0);
                    printf("%-26s T %d  %-7s %-8s %9.1f us %7.1f TFLOP/s  %.3f\n", l.title, T, fused ? "fused" : "chunked", backward ? "backward" : "forward", us,
                           flops / us / 1e6, peak > 0 ? flops / us * 1e6 / peak : 0.0);
                }
                model_free(m);
            }
        }
    }
    return 0;
}
#endif
