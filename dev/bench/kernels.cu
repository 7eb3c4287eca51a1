// kernels.cu: every kernel of a training step but attention's (attention.cu has those) alone, at the 880M model's shapes, against its roofline: elementwise kernels
// against a copy of device memory in the same run, matrix products, cuBLAS's own choice, against the device's peak.
// It includes the trainer: what is measured is what ships.
//   make build/kernels_cuda && build/kernels_cuda [MODEL=880m] [T=2048] [B=16]
//   make build/kernels_cpu && build/kernels_cpu 1m 32 2      no times that mean anything: shows that the bench runs
// Bytes are what a kernel must read and write at least, each element once; FLOPs are 2 M N K.
#if !defined(MTA_LIBRARY)
#define MTA_LIBRARY
#endif
#include "../../train_mta.cu"
#include <functional>

typedef std::function<void()> Work;

enum { TRIALS = 4 };
// Best of TRIALS of work(), in microseconds; one more before them warms up.
static float best_microseconds(Cuda* g, const Work& work) {
    cudaEvent_t start, stop;
    cudaCheck(cudaEventCreate(&start));
    cudaCheck(cudaEventCreate(&stop));
    float best = INFINITY;
    for (int r = 0; r <= TRIALS; r++) {
        float ms = 0;
        cudaCheck(cudaEventRecord(start, g->stream));
        work();
        cudaCheck(cudaEventRecord(stop, g->stream));
        cudaCheck(cudaEventSynchronize(stop));
        cudaCheck(cudaEventElapsedTime(&ms, start, stop));
        if (r > 0 && ms < best) { best = ms; }
    }
    cudaCheck(cudaEventDestroy(start));
    cudaCheck(cudaEventDestroy(stop));
    return 1000 * best;
}

// ---- elementwise kernels: all of one layer of `mta`, then those of the whole model

static void elementwise(Model* m, int B, int T) {
    const Config* c = &m->config;
    Scratch* s = &m->scratch;
    Activations* a = &m->acts;
    Cuda* g = &m->cuda;
    int N = B * T, C = c->hidden_size, FF = c->intermediate_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads, HS = config_head_size(c);
    int S = m->sequences, rows = min_int(m->logit_rows, N), V = c->vocab_size, ld = logit_stride(V);
    double NC = (double)N * C, NF = (double)N * FF, numel = (double)m->tensors.numel, eps = c->rms_norm_eps, x = sizeof(floatX), heads = (NH + 2.0 * NKV) / NH;
    LayerOf<floatX> w = model_layer(m, m->weights, 0);
    LayerOf<float> d = model_layer(m, m->grads, 0);
    HeadOutput o = head_output_of(m, &w, 0, B, T);
    Rope rope = {s->cosine, s->sine, T, NH, NKV, HS};
    AdamWStep h = {1, 0.9f, 0.98f, 1e-8f, 1, 1e-5f, 1};
    // one micro-batch at random fills every buffer with values like those of training
    int32_t* tokens = (int32_t*)alloc_or_die((size_t)N, sizeof(int32_t), "tokens");
    Rng rng = rng_make(1, 2);
    for (int n = 0; n < N; n++) { tokens[n] = (int32_t)(rng_u32(&rng) % (uint32_t)V); }
    model_zero_gradients(m);
    model_forward(m, tokens, B, T);
    model_loss(m, tokens, N, (float)(1.0 / N), true, NULL);
    model_backward(m, tokens, B, T);
    int distinct = rows_by_token(m, tokens, N);
    free(tokens);
    // device memory's own rate: half of the optimizer's first moment onto the other half
    size_t half = m->tensors.numel / 2 * sizeof(float);
    Work copy = [=] { cudaCheck(cudaMemcpyAsync(m->m, (char*)m->m + half, half, cudaMemcpyDeviceToDevice, g->stream)); };
    double peak = 2 * (double)half / (double)best_microseconds(g, copy);
    printf("copy of device memory %.0f GB/s\n", peak * 1e-3);
    const struct { const char* name; double bytes; Work work; } list[] = {
        {"embedding_forward", NC * (x + 4), [=] { embedding_forward(a->x, s->tokens, model_tensor(m, m->weights, TENSOR_EMBED), N, C, g); }},
        {"embedding_backward", NC * 4 + 8.0 * distinct * C,
         [=] { embedding_backward(model_tensor(m, m->grads, TENSOR_EMBED), s->dx, s->tokens, s->rows, s->starts, distinct, C, g); }},
        {"residual_rmsnorm_forward", NC * (12 + x), [=] { residual_rmsnorm_forward(a->ln2, a->rstd2, a->x_mid, a->x, s->branch, w.post_norm, N, C, eps, g); }},
        {"rmsnorm_backward", NC * (12 + 2 * x),
         [=] { rmsnorm_backward(s->dx, s->dx_rounded, d.post_norm, s->dln, a->x_mid, w.post_norm, a->rstd2, N, C, s->parts, true, g); }},
        {"rope_forward", NC * (heads + 3) * x, [=] { rope_forward(a->q, a->k, a->v, s->qkv, &rope, B, g); }},
        {"rope_backward (1 part)", (double)S * T * C * (12 + heads * x),
         [=] { rope_backward(s->qkv, s->attention.dq, s->attention.dk, s->attention.dv, &rope, S, 1, 1, g); }},
        {"head_output_forward", NC * x * (m->att_parts + 1), [=] { head_output_forward(a->out, a->att, &o, g); }},
        {"head_output_backward", NC * x * (m->att_parts + 2),
         [=] { head_output_backward(s->datt, d.head_norm, d.gate_weight, d.gate_bias, s->dout, a->att, &o, s->head_stats, s->parts, g); }},
        {"swiglu_forward", NF * 3 * x, [=] { swiglu_forward(s->act, a->gate_up, N, FF, g); }},
        {"swiglu_backward", NF * 6 * x, [=] { swiglu_backward(s->dgate_up, s->act, s->act, a->gate_up, N, FF, g); }},
        {"crossentropy", (double)rows * ld * 2 * x, [=] { crossentropy_forward_backward(s->losses, s->wrong, s->logits, s->targets, rows, V, ld, 1, true, g); }},
        {"zero_gradients", numel * 4, [=] { model_zero_gradients(m); }},
        {"gradient_norm", numel * 4, [=] { gradient_norm(m, g); }},
        {"adamw", numel * (28 + (EXACT ? 0 : x)),
         [=] { LAUNCH(adamw_kernel<8>, ceil_div(m->tensors.numel, 256 * 8), 256, 0, g->stream, m->weights, m->master, m->m, m->v, m->grads, m->tensors.numel, h); }},
    };
    for (const auto& k : list) {
        double us = (double)best_microseconds(g, k.work), rate = k.bytes / us;
        printf("%-28s %9.1f us  %8.1f MB  %7.0f GB/s  %.2f of the copy\n", k.name, us, k.bytes * 1e-6, rate * 1e-3, rate / peak);
    }
}

// ---- matrix products: out (M,N) = A B, as gemm has it

typedef struct { const char* name; bool ta, tb; int M, N, K; bool wide_out, add; } Product;  // wide_out: fp32; add: onto what is there

// Operands are whatever buffers are large enough: the model's own hold the values of no training step either.
static void products(Model* m, int B, int T, double peak) {
    const Config* c = &m->config;
    Cuda* g = &m->cuda;
    int N = B * T, C = c->hidden_size, FF = c->intermediate_size, QKV = (c->num_attention_heads + 2 * c->num_key_value_heads) * config_head_size(c);
    int V = c->vocab_size, rows = min_int(m->logit_rows, N), F = 2 * FF;
    const Product list[] = {
        {"qkv", false, true, N, QKV, C, false, false},          {"o", false, true, N, C, C, true, false},
        {"gate, up", false, true, N, F, C, false, false},       {"down", false, true, N, C, FF, true, false},
        {"head", false, true, rows, V, C, false, false},        {"qkv, dinp", false, false, N, C, QKV, false, false},
        {"o, dinp", false, false, N, C, C, false, false},       {"gate, up, dinp", false, false, N, C, F, false, false},
        {"down, dinp", false, false, N, FF, C, false, false},   {"head, dinp", false, false, rows, C, V, false, false},
        {"qkv, dweight", true, false, QKV, C, N, true, true},   {"o, dweight", true, false, C, C, N, true, true},
        {"gate, up, dweight", true, false, F, C, N, true, true}, {"down, dweight", true, false, C, FF, N, true, true},
        {"head, dweight", true, false, V, C, rows, true, true},
    };
    size_t most = 0, widest = 0;
    for (const Product& p : list) {
        most = std::max(most, std::max((size_t)p.M * p.K, (size_t)p.K * p.N));
        widest = std::max(widest, (size_t)p.M * p.N * (p.wide_out ? sizeof(float) : sizeof(floatX)));
    }
    floatX *A = NULL, *W = NULL;
    char* out = NULL;
    cudaCheck(cudaMalloc((void**)&A, most * sizeof(floatX)));
    cudaCheck(cudaMalloc((void**)&W, most * sizeof(floatX)));
    cudaCheck(cudaMalloc((void**)&out, widest));
    cudaCheck(cudaMemsetAsync(out, 0, widest, g->stream));
    for (floatX* x : {A, W}) {  // real values: zeros would draw less power and run faster
        for (size_t i = 0; i < most; i += m->tensors.numel) {
            cudaCheck(cudaMemcpyAsync(x + i, m->weights, std::min(m->tensors.numel, most - i) * sizeof(floatX), cudaMemcpyDeviceToDevice, g->stream));
        }
    }
    for (const Product& p : list) {
        size_t lda = (size_t)(p.ta ? p.M : p.K), ldb = (size_t)(p.tb ? p.K : p.N);
        double us = (double)best_microseconds(g, [&] {
            gemm(p.wide_out ? matrix((float*)out, (size_t)p.N) : matrix((floatX*)out, (size_t)p.N), matrix(A, lda), matrix(W, ldb),
                 {p.ta, p.tb, p.M, p.N, p.K, 1, p.add ? 1.0f : 0.0f}, g);
        }), rate = 2.0 * p.M * p.N * p.K / us;
        printf("%-20s %6d x %6d x %6d %9.1f us  %6.1f TFLOP/s  %.3f of peak\n", p.name, p.M, p.N, p.K, us, rate * 1e-6, peak > 0 ? rate * 1e6 / peak : 0.0);
    }
    cudaFree(A);
    cudaFree(W);
    cudaFree(out);
}

int main(int argc, char** argv) {
    const char* model = argc > 1 ? argv[1] : "880m";
    int T = argc > 2 ? atoi(argv[2]) : 2048, B = argc > 3 ? atoi(argv[3]) : 16;
    Config c;
    Error e = {{0}};
    cudaDeviceProp device;
    if (argc > 4 || !preset_find(model) || T < 1 || B < 1) { die("usage: kernels [MODEL] [T] [B]"); }
    config_from_preset(&c, preset_find(model));
    c.num_hidden_layers = 1;
    for (int l = 0; l < MAX_LAYERS; l++) { c.kq_conv_layer[l] = false; }
    if (!config_set_attention(&c, "mta", false, &e) || !config_check(&c, &e)) { die("%s", e.text); }
    setvbuf(stdout, NULL, _IOLBF, 0);  // a limit of time may end this before the last row
    Model* m = model_create(&c, B, T, 0, RECOMPUTE_NONE, &e);
    if (!m) { die("%s", e.text); }
    model_initialise(trainer_cuda(), m, &m->config, 1);
    cudaCheck(cudaGetDeviceProperties(&device, 0));
    printf("%s; %s, %d x %d tokens, one layer; best of %d\n", device.name, model, B, T, TRIALS);
    elementwise(m, B, T);
    products(m, B, T, matmul_rate(&device));
    model_free(m);
    return 0;
}
