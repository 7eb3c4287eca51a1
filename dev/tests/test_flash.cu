// test_flash.cu: the fused attention kernels of train_mta.cu and its chunked path, each against the dense definition in double (MODEL.md eq. 3 to 9), forward and
// all gradients, on random inputs at odd shapes. One file for both machines:
//   make build/test_flash && build/test_flash                 the kernels executed on the CPU (dev/cuda_cpu)
//   make build/test_flash_cuda && build/test_flash_cuda       on a GPU, with sequences up to 4099 (an argument: the longest to try)
// A line a case: the relative Frobenius error of each tensor, fused / chunked. The same inputs, in bf16, go into all three.
#if !defined(MTA_LIBRARY)
#define MTA_LIBRARY
#endif
#include "../../train_mta.cu"
#include <vector>

typedef std::vector<double> Doubles;
typedef struct { const char* title; int B, T, NH, HS, cq, ck; bool conv, mix; } Case;  // cq, ck: with conv; mix: pairs of heads after softmax

// What both are compared on
enum { OUT, DQ, DK, DV, DCONV, DMIX, N_RESULTS };
static const char* const NAMES[N_RESULTS] = {"out", "dq", "dk", "dv", "dconv", "dmix"};
// Largest relative error allowed. Measured on the cases below (dev/SPEED.md): fused 0.004 in out, 0.011 in the gradients; a wrong mask, halo or scale gives 0.05 and more.
static const double LIMIT[N_RESULTS] = {0.008, 0.02, 0.02, 0.015, 0.02, 0.03};

static double rounded(double x) { return (double)(float)(floatX)(float)x; }
static Doubles random_rounded(Rng* rng, size_t n, double std) {
    Doubles x(n);
    for (double& v : x) { v = rounded(std * rng_normal(rng)); }
    return x;
}

typedef struct { Doubles q, k, v, dout, conv, mix; } Inputs;  // (B,NH,T,HS) each; (NH,cq,ck); (NH/2,2,2)

static Inputs make_inputs(const Case* c) {
    Rng rng = rng_make(11, (uint64_t)(c->T * 131 + c->HS));
    size_t n = (size_t)c->B * c->NH * c->T * c->HS;
    Inputs in = {random_rounded(&rng, n, 1.5), random_rounded(&rng, n, 1.5), random_rounded(&rng, n, 1), random_rounded(&rng, n, 0.01), {}, {}};
    if (c->conv) {
        in.conv = random_rounded(&rng, (size_t)c->NH * c->cq * c->ck, 0.1);
        for (int h = 0; h < c->NH; h++) { double* w = &in.conv[((size_t)h * c->cq + c->cq - 1) * c->ck + (c->ck - 1) / 2]; *w = rounded(*w + 1); }
    }
    if (c->mix) {
        in.mix = random_rounded(&rng, (size_t)c->NH * 2, 0.3);
        for (size_t i = 0; i < in.mix.size(); i++) { if (i / 2 % 2 == i % 2) { in.mix[i] = rounded(in.mix[i] + 1); } }
    }
    return in;
}

// One head: S masked, L = conv(S), P = softmax(L), in (T,T)
static void dense_maps(Doubles* S, Doubles* P, const double* q, const double* k, const double* conv, const Case* c) {
    int T = c->T, HS = c->HS, r = (c->ck - 1) / 2;
    S->assign((size_t)T * T, 0.0);
    P->assign((size_t)T * T, 0.0);
#pragma omp parallel for schedule(dynamic, 16)
    for (int i = 0; i < T; i++) {
        for (int j = 0; j <= i; j++) {
            double s = 0;
            for (int x = 0; x < HS; x++) { s += q[(size_t)i * HS + x] * k[(size_t)j * HS + x]; }
            (*S)[(size_t)i * T + j] = s / sqrt(HS);
        }
    }
#pragma omp parallel for schedule(dynamic, 16)
    for (int i = 0; i < T; i++) {
        double *p = P->data() + (size_t)i * T, top = -INFINITY, sum = 0;
        for (int j = 0; j <= i; j++) {
            if (!conv) { p[j] = (*S)[(size_t)i * T + j]; }
            for (int a = 0; conv && a < c->cq; a++) {
                for (int b = 0; b < c->ck; b++) {
                    int i2 = i - (c->cq - 1) + a, j2 = j - r + b;
                    if (i2 >= 0 && j2 >= 0 && j2 <= i2) { p[j] += conv[a * c->ck + b] * (*S)[(size_t)i2 * T + j2]; }
                }
            }
            top = fmax(top, p[j]);
        }
        for (int j = 0; j <= i; j++) { p[j] = exp(p[j] - top); sum += p[j]; }
        for (int j = 0; j <= i; j++) { p[j] /= sum; }
    }
}

// The definition, head by head of the sources n; O_o = sum_n W[o,n] P_n V_o
static void dense_attention(Doubles* res, const Inputs* in, const Case* c) {
    int T = c->T, HS = c->HS, r = (c->ck - 1) / 2, ch = c->mix ? 2 : 1;
    size_t head = (size_t)T * HS, n_all = in->q.size();
    for (int x = 0; x < N_RESULTS; x++) { res[x].assign(x < DCONV ? n_all : x == DCONV ? in->conv.size() : in->mix.size(), 0.0); }
    Doubles S, P, dC((size_t)T * T), dS((size_t)T * T);
    for (int bh = 0; bh < c->B * c->NH; bh++) {
        int h = bh % c->NH, first = bh / ch * ch, n = bh - first;
        const double* conv = c->conv ? &in->conv[(size_t)h * c->cq * c->ck] : NULL;
        dense_maps(&S, &P, &in->q[bh * head], &in->k[bh * head], conv, c);
        double W[2] = {1, 0}, dW[2] = {0, 0};
        for (int o = 0; c->mix && o < 2; o++) { W[o] = in->mix[(size_t)h / 2 * 4 + o * 2 + n]; }
#pragma omp parallel for schedule(dynamic, 16) reduction(+ : dW[:2])
        for (int i = 0; i < T; i++) {
            Doubles dP(i + 1), z(HS);
            double dot = 0;
            for (int o = 0; o < ch; o++) {
                const double *v = &in->v[(first + o) * head], *d = &in->dout[(first + o) * head + (size_t)i * HS];
                double* out = &res[OUT][(first + o) * head + (size_t)i * HS];
                std::fill(z.begin(), z.end(), 0.0);
                for (int j = 0; j <= i; j++) {
                    double s = 0;
                    for (int x = 0; x < HS; x++) { z[x] += P[(size_t)i * T + j] * v[(size_t)j * HS + x], s += d[x] * v[(size_t)j * HS + x]; }
                    dP[j] += W[o] * s;
                }
                for (int x = 0; x < HS; x++) { out[x] += W[o] * z[x], dW[o] += d[x] * z[x]; }
            }
            for (int j = 0; j <= i; j++) { dot += P[(size_t)i * T + j] * dP[j]; }
            for (int j = 0; j < T; j++) { dC[(size_t)i * T + j] = j <= i ? P[(size_t)i * T + j] * (dP[j] - dot) : 0.0; }
        }
        for (int o = 0; c->mix && o < 2; o++) { res[DMIX][(size_t)h / 2 * 4 + o * 2 + n] += dW[o]; }
#pragma omp parallel for schedule(dynamic, 16)
        for (int j = 0; j < T; j++) {  // dV_o[j] = sum_i W[o,n] P[i,j] dO_o[i]
            for (int i = j; i < T; i++) {
                for (int o = 0; o < ch; o++) {
                    for (int x = 0; x < HS; x++) { res[DV][(first + o) * head + (size_t)j * HS + x] += W[o] * P[(size_t)i * T + j] * in->dout[(first + o) * head + (size_t)i * HS + x]; }
                }
            }
        }
        if (conv) {
            double* dconv = &res[DCONV][(size_t)h * c->cq * c->ck];
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
            for (int a = 0; a < c->cq; a++) {
                for (int b = 0; b < c->ck; b++) {
                    double sum = 0;
                    for (int i = c->cq - 1 - a; i < T; i++) {
                        int i2 = i - (c->cq - 1) + a;
                        for (int j2 = std::max(0, b - r); j2 <= i2; j2++) { int j = j2 + r - b; if (j >= 0 && j <= i) { sum += dC[(size_t)i * T + j] * S[(size_t)i2 * T + j2]; } }
                    }
                    dconv[a * c->ck + b] += sum;
                }
            }
        }
#pragma omp parallel for schedule(dynamic, 16)
        for (int i = 0; i < T; i++) {
            double* dq = &res[DQ][bh * head + (size_t)i * HS];
            for (int j = 0; j <= i; j++) {
                double s = 0;
                for (int a = 0; conv && a < c->cq; a++) {
                    for (int b = 0; b < c->ck; b++) {
                        int i2 = i + (c->cq - 1) - a, j2 = j + r - b;
                        if (i2 < T && j2 >= 0 && j2 <= i2) { s += conv[a * c->ck + b] * dC[(size_t)i2 * T + j2]; }
                    }
                }
                dS[(size_t)i * T + j] = (conv ? s : dC[(size_t)i * T + j]) / sqrt(HS);
                for (int x = 0; x < HS; x++) { dq[x] += dS[(size_t)i * T + j] * in->k[bh * head + (size_t)j * HS + x]; }
            }
        }
#pragma omp parallel for schedule(dynamic, 16)
        for (int j = 0; j < T; j++) {
            for (int i = j; i < T; i++) {
                for (int x = 0; x < HS; x++) { res[DK][bh * head + (size_t)j * HS + x] += dS[(size_t)i * T + j] * in->q[bh * head + (size_t)i * HS + x]; }
            }
        }
    }
}

// ---- the trainer's attention, chunk 0: the fused kernels

template <typename T>
static void upload(T* to, const Doubles& from, Cuda* g) {
    std::vector<T> x(from.size());
    for (size_t i = 0; i < x.size(); i++) { x[i] = (T)(float)from[i]; }
    cudaCheck(cudaMemcpyAsync(to, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice, g->stream));
    cudaCheck(cudaStreamSynchronize(g->stream));
}
template <typename T>
static Doubles download(const T* from, size_t n, Cuda* g) {
    std::vector<T> x(n);
    cudaCheck(cudaMemcpyAsync(x.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost, g->stream));
    cudaCheck(cudaStreamSynchronize(g->stream));
    Doubles y(n);
    for (size_t i = 0; i < n; i++) { y[i] = (double)x[i]; }
    return y;
}
static Doubles download_bf16(const floatX* from, size_t n, Cuda* g) {
    std::vector<floatX> x(n);
    cudaCheck(cudaMemcpyAsync(x.data(), from, n * sizeof(floatX), cudaMemcpyDeviceToHost, g->stream));
    cudaCheck(cudaStreamSynchronize(g->stream));
    Doubles y(n);
    for (size_t i = 0; i < n; i++) { y[i] = (double)(float)x[i]; }
    return y;
}

static Config case_config(const Case* c) {
    Config f = config_default();
    Error e = {{0}};
    f.vocab_size = 8, f.hidden_size = c->NH * c->HS, f.intermediate_size = 8, f.num_hidden_layers = 1;
    f.num_attention_heads = f.num_key_value_heads = c->NH, f.max_position_embeddings = std::max(16, c->T);
    f.kq_conv_layer[0] = c->conv, f.kq_conv_pre_softmax = c->conv, f.kq_conv_query_size = c->cq, f.kq_conv_key_size = c->ck;
    f.head_mix_post_softmax = c->mix ? 2 : 0;
    if (!config_check(&f, &e)) { die("%s: %s", c->title, e.text); }
    return f;
}

static void trainer_attention(Doubles* res, const Inputs* in, const Case* c, int chunk) {
    Config config = case_config(c);
    Error e = {{0}};
    Model* m = model_create(&config, c->B, c->T, chunk, RECOMPUTE_NONE, &e);
    if (!m) { die("%s: %s", c->title, e.text); }
    Cuda* g = &m->cuda;
    Scratch* s = &m->scratch;
    size_t n = in->q.size(), table = (size_t)c->T * (c->HS / 2);
    LayerOf<floatX> w = model_layer(m, m->weights, 0);
    upload(m->acts.q, in->q, g);
    upload(m->acts.k, in->k, g);
    upload(m->acts.v, in->v, g);
    upload(s->datt, in->dout, g);
    upload(s->cosine, Doubles(table, 1.0), g);  // no rotation: the gradients come back as attention made them
    upload(s->sine, Doubles(table, 0.0), g);
    if (c->conv) { upload(w.kq_conv, in->conv, g); }
    if (c->mix) { upload(w.head_mix, in->mix, g); }
    Attention a = attention_of(m, &w, 0, c->B, c->T);
    if (a.flash != (chunk == 0)) { die("%s: the %s path was wanted, the other was taken", c->title, chunk ? "chunked" : "fused"); }
    if (a.pair_mix) { convert(s->pair_mix, w.head_mix, 2 * c->NH, g); }
    attention_forward(m->acts.att, m->acts.stats, m->acts.q, m->acts.k, m->acts.v, &a, &s->attention, g);
    HeadOutput output = {NULL, NULL, NULL, 1, c->B, c->T, c->NH, c->HS, 1, a.pair_mix};
    head_output_forward(m->acts.out, m->acts.att, &output, g);
    Rope rope = {s->cosine, s->sine, c->T, c->NH, c->NH, c->HS};
    attention_backward(s->qkv, &m->sums, s->datt, m->acts.att, m->acts.q, m->acts.k, m->acts.v, m->acts.stats, &rope, &a, &s->attention, g);
    Doubles out = download_bf16(m->acts.out, n, g), dqkv = download_bf16(s->qkv, 3 * n, g);
    for (int x = OUT; x <= DV; x++) { res[x].resize(n); }
    for (size_t i = 0; i < n; i++) {  // (B,NH,T,HS) from rows of heads
        size_t t = i / c->HS % c->T, h = i / c->HS / c->T % c->NH, row = i / c->HS / c->T / c->NH * c->T + t, x = i % c->HS;
        res[OUT][i] = out[(row * c->NH + h) * c->HS + x];
        for (int kind = 0; kind < 3; kind++) { res[DQ + kind][i] = dqkv[(row * 3 * c->NH + kind * c->NH + h) * c->HS + x]; }
    }
    res[DCONV] = c->conv ? download(m->sums.conv_pre, in->conv.size(), g) : Doubles();
    res[DMIX] = c->mix ? download(m->sums.mix_post, in->mix.size(), g) : Doubles();
    model_free(m);
}

// Relative Frobenius error; 0 where nothing was wanted and nothing came; not a number fails
static double error_of(const Doubles& got, const Doubles& want) {
    double off = 0, all = 0;
    for (size_t i = 0; i < want.size(); i++) { off += (got[i] - want[i]) * (got[i] - want[i]), all += want[i] * want[i]; }
    return off == 0 ? 0 : all > 0 ? sqrt(off / all) : (double)INFINITY;
}

static bool run_case(const Case* c) {
    Inputs in = make_inputs(c);
    Doubles want[N_RESULTS], fused[N_RESULTS], again[N_RESULTS], chunked[N_RESULTS];
    dense_attention(want, &in, c);
    trainer_attention(fused, &in, c, 0);
    trainer_attention(again, &in, c, 0);
    trainer_attention(chunked, &in, c, std::min(c->T, 96));
    bool good = true;
    Text line = {NULL, 0, 0};
    for (int x = 0; x < N_RESULTS; x++) {
        if (want[x].empty()) { continue; }
        double e = error_of(fused[x], want[x]), f = error_of(chunked[x], want[x]);
        bool same = fused[x] == again[x];
        good = good && e <= LIMIT[x] && same;
        text_printf(&line, "  %s %.4f/%.4f%s%s", NAMES[x], e, f, e <= LIMIT[x] ? "" : " over its limit", same ? "" : " not the same twice");
    }
    printf("%s %-46s%s\n", good ? "ok  " : "FAIL", c->title, line.text);
    fflush(stdout);
    text_free(&line);
    return good;
}

int main(int argc, char** argv) {
#if defined(CUDA_CPU)
    int longest = 257;
#else
    int longest = 4099;
#endif
    if (argc > 1) { longest = atoi(argv[1]); }
    static const Case cases[] = {
        {"plain, one token", 1, 1, 2, 96, 1, 1, false, false},
        {"convolution and pairs, one token", 2, 1, 2, 96, 6, 11, true, true},
        {"plain, head 64", 3, 65, 1, 64, 1, 1, false, false},
        {"plain, head 96", 1, 257, 2, 96, 1, 1, false, false},
        {"plain, head 128", 2, 130, 1, 128, 1, 1, false, false},
        {"plain, head 40", 1, 71, 3, 40, 1, 1, false, false},
        {"pairs, head 64", 1, 129, 4, 64, 1, 1, false, true},
        {"pairs, head 96", 1, 257, 2, 96, 1, 1, false, true},
        {"pairs, head 96, a short batch", 3, 33, 4, 96, 1, 1, false, true},
        {"pairs, head 128", 1, 131, 2, 128, 1, 1, false, true},
        {"convolution 6 x 11, head 96", 1, 193, 1, 96, 6, 11, true, false},
        {"convolution 6 x 11 and pairs, head 96", 1, 257, 2, 96, 6, 11, true, true},
        {"convolution 6 x 11 and pairs, head 64", 2, 127, 2, 64, 6, 11, true, true},
        {"convolution 6 x 11 and pairs, head 128", 1, 129, 2, 128, 6, 11, true, true},
        {"convolution 2 x 9 (toy), head 128", 2, 74, 2, 128, 2, 9, true, false},
        {"convolution 2 x 15 (toy, N = 8), head 128", 1, 97, 2, 128, 2, 15, true, false},
        {"convolution 1 x 3, head 96", 1, 66, 1, 96, 1, 3, true, false},
        {"convolution 5 x 17, head 88", 1, 100, 2, 88, 5, 17, true, true},
        {"convolution 3 x 5, head 16", 3, 67, 2, 16, 3, 5, true, true},
        {"convolution 6 x 1, head 8", 1, 7, 2, 8, 6, 1, true, true},
        {"convolution 6 x 11 and pairs, 132 heads of 16", 1, 300, 132, 16, 6, 11, true, true},  // blocks of several tiles of keys, as 880m at B 16 has
        {"pairs, 132 heads of 32", 1, 300, 132, 32, 1, 1, false, true},
        {"plain, 1023 tokens", 1, 1023, 2, 96, 1, 1, false, false},
        {"pairs, 2047 tokens", 1, 2047, 2, 96, 1, 1, false, true},
        {"convolution 6 x 11 and pairs, 2048 tokens", 2, 2048, 2, 96, 6, 11, true, true},
        {"convolution 6 x 11 and pairs, 4099 tokens", 1, 4099, 2, 96, 6, 11, true, true},
    };
    int passed = 0, failed = 0, skipped = 0;
    printf("relative error against double, fused/chunked\n");
    for (const Case& c : cases) {
        if (c.T > longest) { skipped++; printf("skip %-46s longer than %d\n", c.title, longest); continue; }
        if (run_case(&c)) { passed++; } else { failed++; }
    }
    printf("%d passed, %d failed", passed, failed);
    if (skipped) { printf(", %d skipped", skipped); }
    printf("\n");
    return failed ? 1 : 0;
}
