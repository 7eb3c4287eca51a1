// test_ops.cu: every launcher of train_mta.cu alone, at odd shapes, against its namesake of train_mta.c in double.
//
//   build/test_ops [test] [--quick] [--only TEXT] [--longest T]
//                                    the kernels executed on the CPU by dev/cuda_cpu, in bf16; build/test_ops_fp32 the
//                                    same in fp32; build/test_ops_cuda on a GPU
//   build/test_ops perf [--only TEXT] [--model NAME] [T] [B]
//                                    what each operation costs: time, bytes, operations, share of the roofline; on the
//                                    CPU only that it runs, and how many products and loads of tensor cores it executes
//
// The table OPERATIONS is the list of tests. An operation is a function that draws inputs at random, rounds them to
// what the device stores, gives the same values to both trainers and compares. What a device's array holds before it is
// written is NaN in every type, also beyond the rows, columns and elements that an operation may write, and those must
// still hold it afterwards. train_mta.cu itself says what must be tested: a launcher that no operation names, and a
// launch that none has reached, fail.
#include <cuda_runtime.h>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

// Which launches of train_mta.cu were reached: the line, and the kernel as written there.
typedef std::set<std::pair<int, std::string>> Launches;
static Launches& launches() {
    static Launches all;
    return all;
}
#if defined(CUDA_CPU)
#undef LAUNCH
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    (launches().insert({__LINE__, #kernel}),             \
     cuda_cpu::launch(#kernel, grid, block, shared, stream, kernel, __VA_ARGS__))
#else
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    (launches().insert({__LINE__, #kernel}), kernel<<<grid, block, shared, stream>>>(__VA_ARGS__))
#endif
#define main train_main  // the emulator's trainer is linked from this very object (dev/dev.mk)
#include "../../train_mta.cu"
#undef main
#include "ops_reference.h"

// =====================================================================================================================
// Harness

typedef std::vector<double> Doubles;

// A result passes where |got - want| <= atol + rtol * largest |want| for every element of a tensor; NaN fails. About
// twice the largest error measured over the cases below and three orders of threads.
typedef struct {
    double atol, rtol;
} Tolerance;
static const Tolerance MOVED = {0, 0};         // values are moved, not computed
static const Tolerance FLOAT = {1e-30, 3e-6};  // an fp32 result: sums of up to some thousand terms
static const Tolerance STORED =
    EXACT ? Tolerance{1e-30, 1e-5}
          : Tolerance{1e-30, 0.0042};  // floatX of an fp32 result: bf16 rounds by 2^-8 = 0.0039 at most
static const Tolerance STREAM =
    EXACT ? FLOAT : Tolerance{1e-30, 1.2e-5};  // of the residual stream: two bf16 round by 2^-17 at most
static const Tolerance MAPPED =
    EXACT ? Tolerance{1e-30, 1e-5} : Tolerance{1e-30, 0.0006};  // floatS: fp16 rounds by 2^-11 = 0.0005 at most
static const Tolerance ROUNDED =
    EXACT ? Tolerance{1e-30, 1e-5} : Tolerance{1e-5, 0.01};  // sums of products whose factors are rounded on the way
static const Tolerance CHAINED =
    EXACT ? Tolerance{1e-7, 2e-5} : Tolerance{1e-5, 0.02};  // all of attention, every step of it rounded

typedef struct {
    Cuda* g;
    const Reference* ref;
    Rng rng;
    double worst;         // error / tolerance so far; over 1: failed
    std::string what;     // of the worst
    std::string skipped;  // why nothing was tested
} Test;

static void failed_with(Test* t, double worst, const std::string& what) {
    if (!(worst <= t->worst)) { t->worst = std::isnan(worst) ? (double)INFINITY : worst, t->what = what; }
}
static void expect(Test* t, const char* name, const Doubles& got, const Doubles& want, Tolerance tolerance) {
    double largest = 0;
    if (got.size() != want.size()) {
        failed_with(t, INFINITY, std::string(name) + ": another size");
        return;
    }
    for (double x : want) { largest = std::fmax(largest, std::fabs(x)); }
    for (size_t i = 0; i < want.size(); i++) {
        double off = std::fabs(got[i] - want[i]),
               error = off == 0 ? 0 : off / (tolerance.atol + tolerance.rtol * largest);
        if (error <= t->worst) { continue; }
        char text[128];
        snprintf(text, sizeof text, "%s[%zu] is %.6g, wanted %.6g, largest %.3g", name, i, got[i], want[i], largest);
        failed_with(t, error, text);
    }
}

static Doubles normal(Test* t, size_t n, double std = 1, double mean = 0) {
    Doubles x(n);
    for (double& v : x) { v = mean + std * rng_normal(&t->rng); }
    return x;
}
static std::vector<int32_t> draw_ids(Test* t, int n, int V) {
    std::vector<int32_t> ids((size_t)n);
    for (int32_t& id : ids) { id = (int32_t)(rng_u32(&t->rng) % (uint32_t)V); }
    return ids;
}

// n elements on the device between two guards; NaN, or the values given, of which `host` has what the device's type
// makes of them.
template <typename T> struct Device {
    enum { GUARD = 512 };  // bytes
    T* p;
    Doubles host;
    Device(Test* test, size_t n_) : t(test), n(n_) { allocate(); }
    Device(Test* test, const Doubles& x) : host(x), t(test), n(x.size()) {
        std::vector<T> y(n);
        allocate();
        for (size_t i = 0; i < n; i++) { y[i] = element(x[i]), host[i] = number(y[i]); }
        put(y.data());
    }
    Device(Test* test, const std::vector<int32_t>& x) : t(test), n(x.size()) { allocate(), put((const T*)x.data()); }
    ~Device() {
        std::vector<unsigned char> all(bytes());
        cudaCheck(cudaMemcpyAsync(all.data(), memory, bytes(), cudaMemcpyDeviceToHost, t->g->stream));
        cudaCheck(cudaStreamSynchronize(t->g->stream));
        for (size_t i = 0; i < bytes(); i++) {
            if ((i < GUARD || i >= GUARD + n * sizeof(T)) && all[i] != 0xff) {
                failed_with(t, INFINITY, "written outside of an array");
            }
        }
        cudaCheck(cudaFree(memory));
    }
    std::vector<T> raw() const {
        std::vector<T> y(n);
        cudaCheck(cudaMemcpyAsync(y.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost, t->g->stream));
        cudaCheck(cudaStreamSynchronize(t->g->stream));
        return y;
    }
    Doubles get() const {
        Doubles x(n);
        std::vector<T> y = raw();
        for (size_t i = 0; i < n; i++) { x[i] = number(y[i]); }
        return x;
    }
    void put(const T* y) {
        cudaCheck(cudaMemcpyAsync(p, y, n * sizeof(T), cudaMemcpyHostToDevice, t->g->stream));
        cudaCheck(cudaStreamSynchronize(t->g->stream));
    }
    static T element(double x) {
        if constexpr (std::is_same<T, double>::value) {
            return x;
        } else {
            return (T)(float)x;
        }
    }
    static double number(T x) {
        if constexpr (std::is_same<T, double>::value) {
            return x;
        } else {
            return (double)(float)x;
        }
    }

  private:
    Test* t;
    size_t n;
    char* memory;
    size_t bytes() const { return n * sizeof(T) + 2 * GUARD; }
    void allocate() {
        cudaCheck(cudaMalloc((void**)&memory, bytes()));
        cudaCheck(cudaMemsetAsync(memory, 0xff, bytes(), t->g->stream));
        p = (T*)(memory + GUARD);
    }
    Device(const Device&);
};

// =====================================================================================================================
// Small helpers of the device, products, embedding, norms, RoPE. s: the shape, numbers in the order that OPERATIONS
// names.

static void test_parts_add(Test* t, const int* s) {
    int n_parts = s[0], n = s[1], stride = s[2];
    Device<float> dweight(t, normal(t, n)), parts(t, normal(t, (size_t)n_parts * stride));
    Doubles want = dweight.host;
    for (int i = 0; i < n_parts * n; i++) { want[i % n] += parts.host[(size_t)(i / n) * stride + i % n]; }
    parts_add(dweight.p, parts.p, n_parts, n, stride, t->g);
    expect(t, "dweight", dweight.get(), want, FLOAT);
}
static void test_sums_add(Test* t, const int* s) {
    int S = s[0], groups = s[1], blocks = s[2], n = s[3];
    Device<double> sums(t, normal(t, (size_t)groups * n));
    Device<float> parts(t, normal(t, (size_t)S * groups * blocks * n));
    Doubles want = sums.host;
    for (int x = 0; x < S; x++) {
        for (int group = 0; group < groups; group++) {
            for (int i = 0; i < blocks * n; i++) {
                want[group * n + i % n] += parts.host[((size_t)(x * groups + group) * blocks) * n + i];
            }
        }
    }
    sums_add(sums.p, parts.p, S, groups, blocks, n, t->g);
    expect(t, "sums", sums.get(), want, Tolerance{1e-30, 1e-13});
}
static void test_attention_sums_add(Test* t, const int* s) {
    Device<float> dweight(t, normal(t, s[0]));
    Device<double> sums(t, normal(t, s[0]));
    Doubles want = dweight.host;
    for (int i = 0; i < s[0]; i++) { want[i] += sums.host[i]; }
    attention_sums_add(dweight.p, sums.p, s[0], t->g);
    expect(t, "dweight", dweight.get(), want, FLOAT);
}

// The first call launches, the second captures and replays, the others replay.
static void test_replay(Test* t, const int* s) {
    Device<float> dweight(t, normal(t, s[0])), parts(t, normal(t, s[0]));
    Doubles want = dweight.host;
    Replay r = {};
    for (int i = 0; i < s[0]; i++) { want[i] += s[1] * parts.host[i]; }
    for (int i = 0; i < s[1]; i++) {
        replay(
            &r, [&] { parts_add(dweight.p, parts.p, 1, s[0], s[0], t->g); }, t->g);
    }
    expect(t, "dweight", dweight.get(), want, FLOAT);
    if (r.graph) { cudaCheck(cudaGraphExecDestroy(r.graph)); }
}

template <typename To, typename From> static void convert_case(Test* t, int n, bool wide, Tolerance tolerance) {
    Device<From> from(t, normal(t, n));
    Device<To> to(t, n);
    convert(to.p, from.p, n, t->g, wide);
    expect(t, "to", to.get(), from.host, tolerance);
}
static void test_convert(Test* t, const int* s) {
    convert_case<float, floatX>(t, s[0], s[1], MOVED);
    convert_case<floatS, floatX>(t, s[0], s[1], MAPPED);
}

template <typename Out> static void gemm_case(Test* t, const int* s, Tolerance tolerance) {
    bool ta = s[0], tb = s[1];
    int M = s[2], N = s[3], K = s[4], batch = s[5], add = s[6], lda = (ta ? M : K) + 3, ldb = (tb ? K : N) + 1,
        ldo = N + 2;
    size_t na = (size_t)(ta ? K : M) * lda, nb = (size_t)(tb ? N : K) * ldb, no = (size_t)M * ldo;
    Device<floatX> A(t, normal(t, batch * na)), B(t, normal(t, batch * nb));
    Device<Out> out(t, normal(t, batch * no));
    Doubles want = out.host;
    for (int b = 0; b < batch; b++) {
        t->ref->gemm(ta, tb, M, N, K, 0.5, &A.host[b * na], lda, &B.host[b * nb], ldb, add, &want[b * no], ldo);
    }
    gemm(matrix(out.p, ldo, no), matrix(A.p, lda, na), matrix(B.p, ldb, nb), {ta, tb, M, N, K, 0.5f, (float)add, batch},
         t->g);
    expect(t, "out", out.get(), want, tolerance);
}
static void test_gemm(Test* t, const int* s) {
    gemm_case<float>(t, s, FLOAT);
    gemm_case<floatX>(t, s, STORED);
}

// Columns of `wide` rows that hold `narrow` ones at `at`
static Doubles columns_of(const Doubles& wide, int rows, int width, int at, int narrow) {
    Doubles x((size_t)rows * narrow);
    for (int i = 0; i < rows * narrow; i++) { x[i] = wide[(size_t)(i / narrow) * width + at + i % narrow]; }
    return x;
}
static void columns_put(Doubles* wide, const Doubles& x, int rows, int width, int at, int narrow) {
    for (int i = 0; i < rows * narrow; i++) { (*wide)[(size_t)(i / narrow) * width + at + i % narrow] = x[i]; }
}

static void test_matmul_forward(Test* t, const int* s) {
    int N = s[0], C = s[1], OC = s[2], ldo = OC + s[3];
    Device<floatX> inp(t, normal(t, (size_t)N * C)), weight(t, normal(t, (size_t)OC * C)),
        out(t, normal(t, (size_t)N * ldo));
    Doubles want = out.host, own((size_t)N * OC);
    t->ref->matmul_forward(own.data(), inp.host.data(), weight.host.data(), N, C, OC);
    columns_put(&want, own, N, ldo, 0, OC);
    matmul_forward(out.p, ldo, inp.p, weight.p, N, C, OC, t->g);
    expect(t, "out", out.get(), want, STORED);
}
static void test_matmul_backward(Test* t, const int* s) {
    int N = s[0], C = s[1], OC = s[2], ldd = OC + s[3];
    bool add = s[4];
    Device<floatX> dout(t, normal(t, (size_t)N * ldd)), inp(t, normal(t, (size_t)N * C)),
        weight(t, normal(t, (size_t)OC * C)), dinp(t, normal(t, (size_t)N * C));
    Device<float> dweight(t, normal(t, (size_t)OC * C));
    Doubles want = dinp.host, want_weight = dweight.host, own = columns_of(dout.host, N, ldd, 0, OC);
    t->ref->matmul_backward(want.data(), want_weight.data(), own.data(), inp.host.data(), weight.host.data(), N, C, OC,
                            add);
    matmul_backward(dinp.p, dweight.p, dout.p, ldd, inp.p, weight.p, N, C, OC, add, t->g);
    expect(t, "dinp", dinp.get(), want, STORED);
    expect(t, "dweight", dweight.get(), want_weight, FLOAT);
}
// Three weights of one input, the first two behind one another, the third elsewhere if apart.
static void test_matmul_joined(Test* t, const int* s) {
    int N = s[0], C = s[1], OC[3] = {s[2], s[3], s[4]}, gap = s[5] * 8, width = OC[0] + OC[1] + OC[2],
        first[3] = {0, OC[0] * C, (OC[0] + OC[1]) * C + gap};
    size_t n = (size_t)width * C + gap;
    Device<floatX> inp(t, normal(t, (size_t)N * C)), weight(t, normal(t, n)), out(t, (size_t)N * width),
        dout(t, normal(t, (size_t)N * width)), dinp(t, (size_t)N * C);
    Device<float> dweight(t, normal(t, n));
    Joined joined = {3, {OC[0], OC[1], OC[2]}, width, {}, {}};
    Doubles want((size_t)N * width), want_dinp((size_t)N * C), want_dweight = dweight.host;
    for (int i = 0, at = 0; i < 3; at += OC[i++]) {
        Doubles own((size_t)N * OC[i]), down = columns_of(dout.host, N, width, at, OC[i]);
        joined.weight[i] = weight.p + first[i], joined.dweight[i] = dweight.p + first[i];
        t->ref->matmul_forward(own.data(), inp.host.data(), &weight.host[first[i]], N, C, OC[i]);
        t->ref->matmul_backward(want_dinp.data(), &want_dweight[first[i]], down.data(), inp.host.data(),
                                &weight.host[first[i]], N, C, OC[i], i > 0);
        columns_put(&want, own, N, width, at, OC[i]);
    }
    matmul_joined_forward(out.p, inp.p, &joined, N, C, t->g);
    matmul_joined_backward(dinp.p, dout.p, inp.p, &joined, N, C, t->g);
    expect(t, "out", out.get(), want, STORED);
    expect(t, "dinp", dinp.get(), want_dinp, ROUNDED);  // rounded after each product
    expect(t, "dweight", dweight.get(), want_dweight, FLOAT);
}

// Numbers of the residual stream: host has what the two arrays make of them.
struct DeviceStream {
    Device<floatX> high, low;
    Stream p;
    Doubles host;
    DeviceStream(Test* t, size_t n) : high(t, n), low(t, n), p{high.p, low.p} {}
    DeviceStream(Test* t, const Doubles& x) : high(t, x), low(t, rest(x, high.host)), p{high.p, low.p}, host(get()) {}
    Doubles get() const {
        Doubles x = high.get(), y = low.get();
        for (size_t i = 0; i < x.size() && !EXACT; i++) { x[i] += y[i]; }
        return x;
    }
    static Doubles rest(Doubles x, const Doubles& rounded) {
        for (size_t i = 0; i < x.size(); i++) { x[i] -= rounded[i]; }
        return x;
    }
};
static void test_embedding(Test* t, const int* s) {
    int N = s[0], C = s[1], V = s[2];
    std::vector<int32_t> ids = draw_ids(t, N, V), rows((size_t)N), starts;
    for (int n = 0; n < N; n++) { rows[n] = n; }
    std::stable_sort(rows.begin(), rows.end(), [&](int a, int b) { return ids[a] < ids[b]; });
    for (int i = 0; i < N; i++) {
        if (i == 0 || ids[rows[i]] != ids[rows[i - 1]]) { starts.push_back(i); }
    }
    int distinct = (int)starts.size();
    starts.push_back(N);
    Device<int> tokens(t, ids), sorted(t, rows), begin(t, starts);
    Device<floatX> weight(t, normal(t, (size_t)V * C));
    DeviceStream out(t, (size_t)N * C), dout(t, normal(t, (size_t)N * C));
    Device<float> dweight(t, normal(t, (size_t)V * C));
    Doubles want((size_t)N * C), want_dweight = dweight.host;
    t->ref->embedding_forward(want.data(), ids.data(), weight.host.data(), N, C);
    t->ref->embedding_backward(want_dweight.data(), dout.host.data(), ids.data(), N, C);
    embedding_forward(out.p, tokens.p, weight.p, N, C, t->g);
    embedding_backward(dweight.p, dout.p, tokens.p, sorted.p, begin.p, distinct, C, t->g);
    expect(t, "out", out.get(), want, MOVED);
    expect(t, "dweight", dweight.get(), want_dweight, FLOAT);
}

static void test_rmsnorm_forward(Test* t, const int* s) {
    int N = s[0], C = s[1];
    bool branch = s[2];
    size_t n = (size_t)N * C;
    DeviceStream inp(t, normal(t, n)), sum(t, n);
    Device<float> rstd(t, N);
    Device<floatX> weight(t, normal(t, C, 0.3, 1)), add(t, normal(t, n)), out(t, n);
    Doubles x = inp.host, want(n), want_rstd(N);
    for (size_t i = 0; branch && i < n; i++) { x[i] += add.host[i]; }
    t->ref->rmsnorm_forward(want.data(), want_rstd.data(), x.data(), weight.host.data(), N, C, 1e-5, 1);
    if (branch) {
        residual_rmsnorm_forward(out.p, rstd.p, sum.p, inp.p, add.p, weight.p, N, C, 1e-5, t->g);
    } else {
        rmsnorm_forward(out.p, rstd.p, inp.p, weight.p, N, C, 1e-5, t->g);
    }
    expect(t, "out", out.get(), want, STORED);
    expect(t, "rstd", rstd.get(), want_rstd, FLOAT);
    if (branch) { expect(t, "sum", sum.get(), x, STREAM); }
}
static void test_rmsnorm_backward(Test* t, const int* s) {
    int N = s[0], C = s[1];
    bool add = s[2];
    size_t n = (size_t)N * C;
    DeviceStream dinp(t, normal(t, n));
    Device<float> rstd(t, normal(t, N, 0.2, 1)), dweight(t, normal(t, C)), parts(t, (size_t)NORM_PARTS * C);
    Device<floatX> weight(t, normal(t, C, 0.3, 1)), dout(t, normal(t, n)), inp(t, normal(t, n));
    Doubles want = dinp.host, want_dweight = dweight.host;
    t->ref->rmsnorm_backward(want.data(), want_dweight.data(), dout.host.data(), inp.host.data(), weight.host.data(),
                             rstd.host.data(), N, C, 1, add);
    rmsnorm_backward(dinp.p, dweight.p, dout.p, inp.p, weight.p, rstd.p, N, C, parts.p, add, t->g);
    expect(t, "dinp", dinp.get(), want, STREAM);
    expect(t, "what the products read of dinp", dinp.high.get(), want, STORED);
    expect(t, "dweight", dweight.get(), want_dweight, FLOAT);
}

// Row n of `packed` (B*T,NH+2*NKV,HS): head h of kind 0 q, 1 k, 2 v
static size_t packed_at(int n, int kind, int h, int NH, int NKV, int HS) {
    return ((size_t)n * (NH + 2 * NKV) + (kind == 0 ? h : NH + (kind - 1) * NKV + h)) * HS;
}
static Doubles angles(Test* t, int T, int HS, bool sine) {
    Config c = config_default();
    c.hidden_size = HS, c.num_attention_heads = 1;
    Doubles cosines((size_t)T * (HS / 2)), sines(cosines.size());
    t->ref->rope_table(cosines.data(), sines.data(), &c, T);
    return sine ? sines : cosines;
}
static void test_rope_forward(Test* t, const int* s) {
    int B = s[0], T = s[1], NH = s[2], NKV = s[3], HS = s[4], share = NH / NKV;
    size_t n = (size_t)B * NH * T * HS;
    Device<floatX> qkv(t, normal(t, (size_t)B * T * (NH + 2 * NKV) * HS)), q(t, n), k(t, n), v(t, n);
    Device<float> cosine(t, angles(t, T, HS, false)), sine(t, angles(t, T, HS, true));
    Doubles want[3] = {Doubles(n), Doubles(n), Doubles(n)}, turned = qkv.host;
    t->ref->rope_forward(turned.data(), cosine.host.data(), sine.host.data(), B, T, NH + 2 * NKV, HS, 1);
    for (size_t i = 0; i < 3 * n; i++) {
        size_t kind = i / n, x = i % HS, time = i / HS % T, h = i / HS / T % NH, b = i % n / HS / T / NH;
        const Doubles& from = kind < 2 ? turned : qkv.host;
        want[kind][i % n] =
            from[packed_at((int)(b * T + time), (int)kind, (int)(kind ? h / share : h), NH, NKV, HS) + x];
    }
    Rope rope = {cosine.p, sine.p, T, NH, NKV, HS};
    rope_forward(q.p, k.p, v.p, qkv.p, &rope, B, t->g);
    expect(t, "q", q.get(), want[0], STORED);
    expect(t, "k", k.get(), want[1], STORED);
    expect(t, "v", v.get(), want[2], MOVED);
}
template <typename FromQ, typename From> static void rope_backward_case(Test* t, const int* s) {
    int S = s[0], T = s[1], NH = s[2], NKV = s[3], HS = s[4], q_parts = s[5], q_step = s[6], v_parts = s[7],
        share = NH / NKV;
    size_t n = (size_t)S * NH * T * HS;
    Device<FromQ> dq(t, normal(t, q_parts * n));
    Device<From> dk(t, normal(t, n)), dv(t, normal(t, v_parts * n));
    Device<float> cosine(t, angles(t, T, HS, false)), sine(t, angles(t, T, HS, true));
    Device<floatX> dqkv(t, (size_t)S * T * (NH + 2 * NKV) * HS);
    Doubles want((size_t)S * T * (NH + 2 * NKV) * HS), turned;
    const Doubles* from[3] = {&dq.host, &dk.host, &dv.host};
    for (int kind = 0; kind < 3; kind++) {
        for (size_t i = 0; i < from[kind]->size(); i++) {
            size_t x = i % HS, time = i / HS % T, h = i / HS / T % NH, b = i % n / HS / T / NH;
            if (kind == 0 && time < i / n * q_step) { continue; }  // a part's rows that nobody wrote
            want[packed_at((int)(b * T + time), kind, (int)(kind ? h / share : h), NH, NKV, HS) + x] +=
                (*from[kind])[i];
        }
    }
    turned = want;
    t->ref->rope_forward(turned.data(), cosine.host.data(), sine.host.data(), S, T, NH + 2 * NKV, HS, -1);
    for (size_t i = 0; i < want.size(); i++) {
        if (i / HS % (NH + 2 * NKV) < (size_t)(NH + NKV)) { want[i] = turned[i]; }
    }
    Rope rope = {cosine.p, sine.p, T, NH, NKV, HS};
    rope_backward(dqkv.p, dq.p, dk.p, dv.p, &rope, S, q_parts, q_step, v_parts, t->g);
    expect(t, "dqkv", dqkv.get(), want, STORED);
}
static void test_rope_backward(Test* t, const int* s) {
    rope_backward_case<float, float>(t, s);  // of the chunks, the fused kernels, cuDNN
    rope_backward_case<float, floatX>(t, s);
    rope_backward_case<floatX, floatX>(t, s);
}

// =====================================================================================================================
// Steps of attention. A shape begins with S T NH lo hi: maps of S*NH heads, of which the rows lo <= i < hi are
// computed, in a tile that has some rows more above and below, and keys up to nk.

typedef struct {
    int S, T, NH, lo, hi, nk;
    RefAttention ref;
    Attention own;
} Steps;

static Steps steps_of(const int* s, int HS = 8, int cq = 1, int ck = 1) {
    Steps x = {s[0], s[1], s[2], s[3], s[4], min_int(s[4], s[1]), {}, {}};
    x.ref.B = x.S, x.ref.T = x.T, x.ref.NH = x.ref.NKV = x.NH, x.ref.HS = HS, x.ref.cq = cq, x.ref.ck = ck;
    x.own.B = x.own.S = x.S, x.own.T = x.T, x.own.NH = x.NH, x.own.HS = HS, x.own.cq = cq, x.own.ck = ck,
    x.own.chunk = x.hi - x.lo;
    return x;
}
static size_t map_size(const Steps& x) { return (size_t)x.S * x.NH * x.T * x.T; }

// A tile and its map. Input: NaN right of the diagonal, or zeros where a product reads it, and NaN above and below the
// sequence. Output: NaN everywhere.
template <typename T> struct MapTile {
    enum { HALO = 9 };  // rows beyond those computed: more than a convolution of 6 needs
    Device<T> memory;
    TileOf<T> tile;
    Doubles map;  // as the tile's type rounds it
    MapTile(Test* test, const Steps& x) : memory(test, size(x)), tile(make(x)), map(map_size(x)), t(test), steps(x) {}
    MapTile(Test* test, const Steps& x, const Doubles& values, bool zeros = false)
        : memory(test, filled(x, values, zeros)), tile(make(x)), map(values), t(test), steps(x) {
        each([&](size_t at, size_t in_map, int i, int j) {
            if (j < x.T) { map[in_map] = j <= i ? memory.host[at] : 0; }
        });
    }
    // Rows lo <= i < hi, keys < nk, are `want`; with `left` only left of the diagonal. Other rows are as they were, but
    // where the tile was also the input.
    void check(const char* name, const Doubles& want, Tolerance tolerance, int lo, int hi, int nk, bool left = false,
               bool in_place = false) {
        Doubles all = memory.get(), got(map.size()), expected(map.size());
        bool touched = false;
        for (size_t at = 0; at < all.size(); at++) {
            int i = tile.i0 + (int)(at / tile.ld % tile.rows);
            touched |= (i < lo || i >= hi) && !std::isnan(all[at]) && !in_place;
        }
        each([&](size_t at, size_t in_map, int i, int j) {
            if (i >= lo && i < hi && j < nk && (!left || j <= i)) {
                got[in_map] = all[at], expected[in_map] = j <= i ? want[in_map] : 0;
            }
        });
        if (touched) { failed_with(t, INFINITY, std::string(name) + ": rows that are not its own were written"); }
        expect(t, name, got, expected, tolerance);
    }

  private:
    Test* t;
    Steps steps;
    static int rows(const Steps& x) { return x.hi - x.lo + 2 * HALO; }
    static size_t size(const Steps& x) { return (size_t)x.S * x.NH * rows(x) * tile_stride(x.T); }
    TileOf<T> make(const Steps& x) { return TileOf<T>{memory.p, x.lo - HALO, rows(x), tile_stride(x.T)}; }
    // f(place in the tile, in the map, i, j) for the rows of both
    template <typename F> void each(const F& f) { each_of(steps, f); }
    template <typename F> static void each_of(const Steps& x, const F& f) {
        for (int head = 0; head < x.S * x.NH; head++) {
            for (int i = max_int(0, x.lo - HALO); i < min_int(x.T, x.hi + HALO); i++) {
                for (int j = 0; j < tile_stride(x.T); j++) {
                    f(((size_t)head * rows(x) + i - (x.lo - HALO)) * tile_stride(x.T) + j,
                      ((size_t)head * x.T + i) * x.T + j, i, j);
                }
            }
        }
    }
    static Doubles filled(const Steps& x, const Doubles& values, bool zeros) {
        Doubles y(size(x), NAN);
        each_of(x, [&](size_t at, size_t in_map, int i, int j) {
            y[at] = j <= i ? values[in_map] : zeros ? 0 : (double)NAN;
        });
        return y;
    }
};

static void test_scores_forward(Test* t, const int* s) {
    Steps x = steps_of(s, s[5]);
    size_t n = (size_t)x.S * x.NH * x.T * s[5];
    Device<floatX> q(t, normal(t, n)), k(t, normal(t, n));
    Device<floatS> room_q(t, n), room_k(t, n);
    MapTile<floatS> out(t, x);
    Doubles want(map_size(x));
    t->ref->scores_forward(want.data(), q.host.data(), k.host.data(), &x.ref, x.lo, x.hi, x.nk);
    const floatS *q_s = scores_input(room_q.p, q.p, &x.own, x.S, t->g),
                 *k_s = scores_input(room_k.p, k.p, &x.own, x.S, t->g);
    scores_forward(&out.tile, q_s, k_s, &x.own, x.S, x.lo, x.hi, x.nk, t->g);
    out.check("out", want, MAPPED, x.lo, x.hi, x.nk, true);
}
static void test_scores_backward(Test* t, const int* s) {
    Steps x = steps_of(s, s[5]);
    size_t n = (size_t)x.S * x.NH * x.T * s[5];
    Device<floatX> q(t, normal(t, n)), k(t, normal(t, n));
    Device<float> dq(t, normal(t, n)), dk(t, normal(t, n));
    MapTile<floatX> dout(t, x, normal(t, map_size(x)), true);
    Doubles want_q = dq.host, want_k = dk.host;
    t->ref->scores_backward(want_q.data(), want_k.data(), dout.map.data(), q.host.data(), k.host.data(), &x.ref, x.lo,
                            x.hi);
    scores_backward(dq.p, dk.p, &dout.tile, q.p, k.p, &x.own, x.S, x.lo, x.hi, t->g);
    expect(t, "dq", dq.get(), want_q, FLOAT);
    expect(t, "dk", dk.get(), want_k, FLOAT);
}

template <typename Out> static void kq_conv_forward_case(Test* t, const int* s, Tolerance tolerance) {
    Steps x = steps_of(s, 8, s[5], s[6]);
    Device<floatX> weight(t, normal(t, (size_t)x.NH * s[5] * s[6], 0.3));
    MapTile<floatS> inp(t, x, normal(t, map_size(x)));
    MapTile<Out> out(t, x);
    Doubles want(map_size(x));
    t->ref->kq_conv_forward(want.data(), inp.map.data(), weight.host.data(), &x.ref, x.lo, x.hi, x.nk);
    kq_conv_forward(&out.tile, &inp.tile, weight.p, &x.own, x.S, x.lo, x.hi, x.nk, t->g);
    out.check("out", want, tolerance, x.lo, x.hi, x.nk);
}
static void test_kq_conv_forward(Test* t, const int* s) {
    kq_conv_forward_case<floatS>(t, s, ROUNDED);
    kq_conv_forward_case<floatX>(t, s, ROUNDED);
}
static void test_kq_conv_backward_input(Test* t, const int* s) {
    Steps x = steps_of(s, 8, s[5], s[6]);
    Device<floatX> weight(t, normal(t, (size_t)x.NH * s[5] * s[6], 0.3));
    MapTile<floatX> dout(t, x, normal(t, map_size(x))), dinp(t, x);
    Doubles want(map_size(x));
    t->ref->kq_conv_backward_input(want.data(), dout.map.data(), weight.host.data(), &x.ref, x.lo, x.hi, x.nk);
    kq_conv_backward_input(&dinp.tile, &dout.tile, weight.p, &x.own, x.S, x.lo, x.hi, x.nk, t->g);
    dinp.check("dinp", want, STORED, x.lo, x.hi, x.nk);
}
static void test_kq_conv_backward_weight(Test* t, const int* s) {
    Steps x = steps_of(s, 8, s[5], s[6]);
    int n = s[5] * s[6];
    Device<double> dweight(t, normal(t, (size_t)x.NH * n));
    Device<float> parts(t, attention_parts_size(&x.own));
    MapTile<floatX> dout(t, x, normal(t, map_size(x)));
    MapTile<floatS> inp(t, x, normal(t, map_size(x)));
    Doubles want = dweight.host;
    t->ref->kq_conv_backward_weight(want.data(), dout.map.data(), inp.map.data(), &x.ref, x.lo, x.hi);
    kq_conv_backward_weight(dweight.p, &dout.tile, &inp.tile, &x.own, x.S, x.lo, x.hi, parts.p, t->g);
    expect(t, "dweight", dweight.get(), want, ROUNDED);
}

template <typename Out, typename Weight> static void head_mix_forward_case(Test* t, const int* s, Tolerance tolerance) {
    Steps x = steps_of(s);
    int ch = s[5];
    Device<Weight> weight(t, normal(t, (size_t)x.NH * ch, 0.5));
    MapTile<floatS> inp(t, x, normal(t, map_size(x)));
    MapTile<Out> out(t, x);
    Doubles want(map_size(x));
    t->ref->head_mix_forward(want.data(), inp.map.data(), weight.host.data(), false, ch, &x.ref, x.lo, x.hi, x.nk);
    head_mix_forward(&out.tile, &inp.tile, weight.p, false, ch, &x.own, x.S, x.lo, x.hi, x.nk, t->g);
    out.check("out", want, tolerance, x.lo, x.hi, x.nk);
}
static void test_head_mix_forward(Test* t, const int* s) {
    head_mix_forward_case<floatS, floatX>(t, s, MAPPED);
    head_mix_forward_case<floatX, floatX>(t, s, STORED);
    if (s[5] == 2) { head_mix_forward_case<floatX, float>(t, s, STORED); }  // diff's
}
template <typename Weight> static void head_mix_backward_input_case(Test* t, const int* s) {
    Steps x = steps_of(s);
    int ch = s[5];
    Device<Weight> weight(t, normal(t, (size_t)x.NH * ch, 0.5));
    MapTile<floatX> dout(t, x, normal(t, map_size(x)));
    Doubles want(map_size(x));
    t->ref->head_mix_forward(want.data(), dout.map.data(), weight.host.data(), true, ch, &x.ref, x.lo, x.hi, x.nk);
    head_mix_backward_input(&dout.tile, &dout.tile, weight.p, ch, &x.own, x.S, x.lo, x.hi, x.nk,
                            t->g);  // in place, as attention has it
    dout.check("dinp", want, STORED, x.lo, x.hi, x.nk, false, true);
}
static void test_head_mix_backward_input(Test* t, const int* s) {
    head_mix_backward_input_case<floatX>(t, s);
    if (s[5] == 2) { head_mix_backward_input_case<float>(t, s); }
}
static void test_head_mix_backward_weight(Test* t, const int* s) {
    Steps x = steps_of(s);
    int ch = x.own.ch_pre = s[5];
    Device<double> dweight(t, normal(t, (size_t)x.NH * ch));
    Device<float> parts(t, attention_parts_size(&x.own));
    MapTile<floatX> dout(t, x, normal(t, map_size(x)));
    MapTile<floatS> inp(t, x, normal(t, map_size(x)));
    Doubles want = dweight.host;
    t->ref->head_mix_backward_weight(want.data(), dout.map.data(), inp.map.data(), ch, &x.ref, x.lo, x.hi);
    head_mix_backward_weight(dweight.p, &dout.tile, &inp.tile, ch, &x.own, x.S, x.lo, x.hi, parts.p, t->g);
    expect(t, "dweight", dweight.get(), want, FLOAT);
}

// stats (S,NH,T,2) as the softmax of all rows of `map` has them
static Doubles stats_of(Test* t, const Steps& x, const Doubles& map) {
    Doubles unused(map_size(x)), stats((size_t)x.S * x.NH * x.T * 2);
    t->ref->softmax_forward(unused.data(), map.data(), stats.data(), &x.ref, 0, 0, x.T, x.T);
    return stats;
}
// Of the rows `own` up to hi that of `all`, else NaN: what a softmax writes
static Doubles own_stats(const Steps& x, const Doubles& all, int own) {
    Doubles y(all.size(), NAN);
    for (size_t i = 0; i < y.size(); i++) {
        int row = (int)(i / 2 % x.T);
        if (row >= own && row < x.hi) { y[i] = all[i]; }
    }
    return y;
}
static void expect_stats(Test* t, const Doubles& got, Doubles want, Tolerance tolerance) {
    Doubles y = got;
    for (size_t i = 0; i < y.size(); i++) {
        if (std::isnan(want[i]) && std::isnan(y[i])) { want[i] = y[i] = 0; }
    }
    expect(t, "stats", y, want, tolerance);
}
template <typename Out> static void softmax_forward_case(Test* t, const int* s, Tolerance tolerance) {
    Steps x = steps_of(s);
    int own = x.lo + s[5];
    bool recompute = s[6];
    MapTile<floatS> inp(t, x, normal(t, map_size(x), 3));
    MapTile<Out> out(t, x);
    Doubles want(map_size(x)), all = stats_of(t, x, inp.map), unused = all;
    Device<float> stats(t, recompute ? all : Doubles(all.size(), NAN));
    t->ref->softmax_forward(want.data(), inp.map.data(), unused.data(), &x.ref, x.lo, own, x.hi, x.nk);
    if (recompute) {
        softmax_recompute(&out.tile, &inp.tile, stats.p, &x.own, x.S, x.lo, x.hi, x.nk, t->g);
    } else {
        softmax_forward(&out.tile, &inp.tile, stats.p, &x.own, x.S, x.lo, own, x.hi, x.nk, t->g);
    }
    out.check("out", want, tolerance, x.lo, x.hi, x.nk);
    expect_stats(t, stats.get(), recompute ? stats.host : own_stats(x, all, own), FLOAT);
}
static void test_softmax_forward(Test* t, const int* s) {
    softmax_forward_case<floatS>(t, s, MAPPED);
    softmax_forward_case<floatX>(t, s, STORED);
}
static void test_softmax_backward(Test* t, const int* s) {
    Steps x = steps_of(s);
    MapTile<floatS> inp(t, x, normal(t, map_size(x), 3));
    MapTile<floatX> dout(t, x, normal(t, map_size(x)));
    Doubles want(map_size(x)), att(map_size(x)), all = stats_of(t, x, inp.map), unused = all;
    Device<float> stats(t, all);
    t->ref->softmax_forward(att.data(), inp.map.data(), unused.data(), &x.ref, 0, 0, x.T, x.T);
    t->ref->softmax_backward(want.data(), dout.map.data(), att.data(), &x.ref, x.lo, x.hi, x.nk);
    softmax_backward(&dout.tile, &dout.tile, &inp.tile, stats.p, &x.own, x.S, x.lo, x.hi, x.nk, t->g);
    dout.check("dinp", want, STORED, x.lo, x.hi, x.nk, false, true);
}

static void test_values_forward(Test* t, const int* s) {
    Steps x = steps_of(s, s[5]);
    size_t n = (size_t)x.S * x.NH * x.T * s[5];
    Device<floatX> v(t, normal(t, n)), out(t, normal(t, n));
    MapTile<floatX> att(t, x, normal(t, map_size(x)), true);
    Doubles want = out.host;
    t->ref->values_forward(want.data(), att.map.data(), v.host.data(), &x.ref, x.lo, x.hi);
    values_forward(out.p, &att.tile, v.p, &x.own, x.S, x.lo, x.hi, t->g);
    expect(t, "out", out.get(), want, STORED);
}
static void test_values_backward(Test* t, const int* s) {
    Steps x = steps_of(s, s[5]);
    size_t n = (size_t)x.S * x.NH * x.T * s[5];
    Device<floatX> v(t, normal(t, n)), dout(t, normal(t, n));
    Device<float> dv(t, normal(t, n));
    MapTile<floatX> att(t, x, normal(t, map_size(x)), true), datt(t, x);
    Doubles want = dv.host, want_att(map_size(x));
    t->ref->values_backward_att(want_att.data(), dout.host.data(), v.host.data(), &x.ref, x.lo, x.hi, x.nk);
    t->ref->values_backward_v(want.data(), att.map.data(), dout.host.data(), &x.ref, x.lo, min_int(x.hi, x.T));
    values_backward_att(&datt.tile, dout.p, v.p, &x.own, x.S, x.lo, x.hi, x.nk, t->g);
    values_backward_v(dv.p, &att.tile, dout.p, &x.own, x.S, x.lo, min_int(x.hi, x.T), t->g);
    datt.check("datt", want_att, STORED, x.lo, x.hi, x.nk, true);
    expect(t, "dv", dv.get(), want, FLOAT);
}

// ---- 16 heads mixed, softmax, mixed, in one kernel

#if !defined(PRECISION_FP32)
// maps of the definition: L = pre C, P = softmax(L), A = post P, or what of it is on
typedef struct {
    Doubles L, P, A, stats;
} Mix16Maps;
static Mix16Maps mix16_definition(Test* t, const Steps& x, const Doubles& C, const Doubles& pre, const Doubles& post,
                                  bool softmax, bool mix_post) {
    Mix16Maps m = {C, C, C, Doubles((size_t)x.S * x.NH * x.T * 2)};
    if (softmax) {
        t->ref->head_mix_forward(m.L.data(), C.data(), pre.data(), false, 16, &x.ref, 0, x.T, x.T);
        t->ref->softmax_forward(m.P.data(), m.L.data(), m.stats.data(), &x.ref, 0, 0, x.T, x.T);
    }
    m.A = m.P;
    if (mix_post) { t->ref->head_mix_forward(m.A.data(), m.P.data(), post.data(), false, 16, &x.ref, 0, x.T, x.T); }
    return m;
}
template <bool SOFTMAX, bool POST, typename Out> static void head_mix16_forward_case(Test* t, const int* s) {
    Steps x = steps_of(s);
    int own = x.lo + s[5];
    bool recompute = SOFTMAX && s[6];
    Device<floatX> pre(t, normal(t, (size_t)x.NH * 16, 0.3)), post(t, normal(t, (size_t)x.NH * 16, 0.3));
    MapTile<floatS> inp(t, x, normal(t, map_size(x), 2));
    MapTile<Out> out(t, x);
    Mix16Maps want = mix16_definition(t, x, inp.map, pre.host, post.host, SOFTMAX, POST);
    Device<float> stats(t, recompute ? want.stats : Doubles(want.stats.size(), NAN));
    x.own.mix_pre = pre.p, x.own.mix_post = post.p;
    head_mix16_forward<SOFTMAX, POST>(&out.tile, &inp.tile, stats.p, recompute, &x.own, {x.S, x.lo, x.hi, own, x.nk},
                                      t->g);
    out.check("out", want.A, ROUNDED, x.lo, x.hi, x.nk);
    if (SOFTMAX) { expect_stats(t, stats.get(), recompute ? stats.host : own_stats(x, want.stats, own), ROUNDED); }
}
static void test_head_mix16_forward(Test* t, const int* s) {
    head_mix16_forward_case<true, true, floatX>(t, s);
    head_mix16_forward_case<true, false, floatS>(t, s);
    head_mix16_forward_case<false, true, floatX>(t, s);
}
template <bool SOFTMAX, bool POST> static void head_mix16_backward_case(Test* t, const int* s) {
    Steps x = steps_of(s);
    int end = x.hi + s[5], last = min_int(end, x.T);  // gradients go on for some rows below those whose weights count
    Device<floatX> pre(t, normal(t, (size_t)x.NH * 16, 0.3)), post(t, normal(t, (size_t)x.NH * 16, 0.3));
    Device<double> dpre(t, normal(t, (size_t)x.NH * 16)), dpost(t, normal(t, (size_t)x.NH * 16));
    MapTile<floatS> inp(t, x, normal(t, map_size(x), 2));
    MapTile<floatX> dout(t, x, normal(t, map_size(x))), att(t, x);
    Mix16Maps m = mix16_definition(t, x, inp.map, pre.host, post.host, SOFTMAX, POST);
    Device<float> stats(t, m.stats), parts(t, (size_t)x.S * x.NH * 16 * 2 * ceil_div(end - x.lo, MIX16_ROWS));
    Doubles d = dout.map, next = d, want_pre = dpre.host, want_post = dpost.host;
    if (POST) {
        t->ref->head_mix_backward_weight(want_post.data(), d.data(), m.P.data(), 16, &x.ref, x.lo, x.hi);
        t->ref->head_mix_forward(next.data(), d.data(), post.host.data(), true, 16, &x.ref, x.lo, last, last);
        d = next;
    }
    if (SOFTMAX) {
        t->ref->softmax_backward(next.data(), d.data(), m.P.data(), &x.ref, x.lo, last, last);
        t->ref->head_mix_backward_weight(want_pre.data(), next.data(), inp.map.data(), 16, &x.ref, x.lo, x.hi);
        d = next;
        t->ref->head_mix_forward(next.data(), d.data(), pre.host.data(), true, 16, &x.ref, x.lo, last, last);
    }
    x.own.mix_pre = pre.p, x.own.mix_post = post.p;
    AttentionSums sums = {NULL, NULL, SOFTMAX ? dpre.p : NULL, POST ? dpost.p : NULL, 0};
    head_mix16_backward<SOFTMAX, POST>(&sums, &dout.tile, &att.tile, &dout.tile, &inp.tile, stats.p, &x.own,
                                       {x.S, x.lo, end, x.hi, last}, parts.p, t->g);
    dout.check("dinp", next, ROUNDED, x.lo, last, last, false, true);
    if (POST) { att.check("att", m.A, ROUNDED, x.lo, x.hi, x.nk); }
    expect(t, "dpre", dpre.get(), want_pre, ROUNDED);
    expect(t, "dpost", dpost.get(), want_post, ROUNDED);
}
static void test_head_mix16_backward(Test* t, const int* s) {
    head_mix16_backward_case<true, true>(t, s);
    head_mix16_backward_case<true, false>(t, s);
    head_mix16_backward_case<false, true>(t, s);
}
#endif

// =====================================================================================================================
// All of attention, through a model of one layer: the path that the configuration takes (chunk 0), or chunks of so many
// queries

enum { OUT, DQ, DK, DV, DCONV_PRE, DCONV_POST, DMIX_PRE, DMIX_POST, N_RESULTS };
typedef struct {
    int B, T, NH, NKV, HS, cq, ck, pre, post, ch_pre, ch_post, diff, chunk;
    int shared;  // KiB of shared memory that the fused kernels may take; 0: what the device has
} Whole;

static Config whole_config(const Whole* w) {
    Config c = config_default();
    Error e = {{0}};
    c.vocab_size = 8, c.hidden_size = w->NH * w->HS, c.intermediate_size = 8, c.num_hidden_layers = 1;
    c.num_attention_heads = w->NH, c.num_key_value_heads = w->NKV, c.max_position_embeddings = std::max(16, w->T);
    c.kq_conv_layer[0] = w->pre || w->post, c.kq_conv_pre_softmax = w->pre, c.kq_conv_post_softmax = w->post;
    c.kq_conv_query_size = w->cq, c.kq_conv_key_size = w->ck, c.head_mix_pre_softmax = w->ch_pre,
    c.head_mix_post_softmax = w->ch_post;
    if (w->diff) { c.attention_type = ATTENTION_DIFF; }
    if (!config_check(&c, &e)) { die("%s", e.text); }
    return c;
}
template <typename T> static void upload(T* to, const Doubles& from, Cuda* g) {
    std::vector<T> x(from.size());
    for (size_t i = 0; i < x.size(); i++) { x[i] = Device<T>::element(from[i]); }
    cudaCheck(cudaMemcpyAsync(to, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice, g->stream));
    cudaCheck(cudaStreamSynchronize(g->stream));
}
template <typename T> static Doubles download(const T* from, size_t n, Cuda* g) {
    std::vector<T> x(n);
    Doubles y(n);
    cudaCheck(cudaMemcpyAsync(x.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost, g->stream));
    cudaCheck(cudaStreamSynchronize(g->stream));
    for (size_t i = 0; i < n; i++) { y[i] = Device<T>::number(x[i]); }
    return y;
}
static Doubles rounded(Doubles x) {
    for (double& v : x) { v = (double)(float)(floatX)(float)v; }
    return x;
}
// near the identity: of (NH,cq,ck) the tap at the query's own score, of (NH/ch,ch,ch) the diagonal
static Doubles conv_weights(Test* t, const Whole* w) {
    Doubles x = normal(t, (size_t)w->NH * w->cq * w->ck, 0.1);
    for (int h = 0; h < w->NH; h++) { x[((size_t)h * w->cq + w->cq - 1) * w->ck + (w->ck - 1) / 2] += 1; }
    return rounded(x);
}
static Doubles mix_weights(Test* t, int NH, int ch) {
    Doubles x = normal(t, (size_t)NH * ch, 0.3);
    for (size_t i = 0; i < x.size(); i++) { x[i] += i / ch % ch == i % ch; }
    return rounded(x);
}
typedef struct {
    Doubles q, k, v, dout, conv_pre, conv_post, mix_pre, mix_post;
} Inputs;

static Inputs whole_inputs(Test* t, const Whole* w) {
    size_t n = (size_t)w->B * w->NH * w->T * w->HS, nk = n / w->NH * w->NKV;
    Inputs in = {rounded(normal(t, n, 1.5)),
                 rounded(normal(t, nk, 1.5)),
                 rounded(normal(t, nk)),
                 rounded(normal(t, n, 0.01)),
                 {},
                 {},
                 {},
                 {}};
    if (w->pre) { in.conv_pre = conv_weights(t, w); }
    if (w->post) { in.conv_post = conv_weights(t, w); }
    if (w->ch_pre) { in.mix_pre = mix_weights(t, w->NH, w->ch_pre); }
    if (w->ch_post) { in.mix_post = mix_weights(t, w->NH, w->ch_post); }
    if (w->diff) {
        for (int i = 0; i < 2 * w->NH; i++) { in.mix_post.push_back(i % 2 ? -0.625 : 1); }
    }
    return in;
}
static void whole_reference(Test* t, Doubles* res, const Whole* w, const Inputs* in) {
    auto pointer = [](const Doubles& x) { return x.empty() ? NULL : x.data(); };
    RefAttention a = {w->B,
                      w->T,
                      w->NH,
                      w->NKV,
                      w->HS,
                      w->cq,
                      w->ck,
                      w->ch_pre,
                      w->diff ? 2 : w->ch_post,
                      pointer(in->conv_pre),
                      pointer(in->conv_post),
                      pointer(in->mix_pre),
                      pointer(in->mix_post)};
    size_t sizes[N_RESULTS] = {in->q.size(),        in->q.size(),         in->k.size(),       in->v.size(),
                               in->conv_pre.size(), in->conv_post.size(), in->mix_pre.size(), in->mix_post.size()};
    for (int i = 0; i < N_RESULTS; i++) { res[i].assign(sizes[i], 0.0); }
    Doubles stats((size_t)w->B * w->NH * w->T * 2);
    t->ref->attention_forward(res[OUT].data(), stats.data(), in->q.data(), in->k.data(), in->v.data(), &a);
    t->ref->attention_backward(res[DQ].data(), res[DK].data(), res[DV].data(), res[DCONV_PRE].data(),
                               res[DCONV_POST].data(), res[DMIX_PRE].data(), res[DMIX_POST].data(), in->dout.data(),
                               in->q.data(), in->k.data(), in->v.data(), stats.data(), &a);
}
// k and v, (B,NKV,T,HS), for every head that reads them
static Doubles repeated(const Doubles& x, const Whole* w) {
    size_t head = (size_t)w->T * w->HS;
    Doubles y((size_t)w->B * w->NH * head);
    for (size_t i = 0; i < y.size(); i++) {
        size_t b = i / head / w->NH, h = i / head % w->NH / (w->NH / w->NKV);
        y[i] = x[(b * w->NKV + h) * head + i % head];
    }
    return y;
}
static bool whole_trainer(Test* t, Doubles* res, const Whole* w, const Inputs* in) {
    Config config = whole_config(w);
    Error e = {{0}};
    ModelShape shape = shape_alone(w->B, w->T, w->chunk, RECOMPUTE_NONE);
    Model* m = model_create(&config, &shape, NULL, &e);
    if (!m && w->chunk == CHUNK_CUDNN && strstr(e.text, "has no engine")) {  // as the GPU is
        t->skipped = e.text;
        return false;
    }
    if (!m) { die("%s", e.text); }
    Cuda* g = &m->cuda;
    Scratch* s = &m->scratch;
    int NH = w->NH, NKV = w->NKV, HS = w->HS;
    size_t n = in->q.size(), table = (size_t)w->T * (HS / 2);
    LayerOf<floatX> weights = model_layer(m, m->weights, 0);
    upload(m->acts.q, in->q, g);
    upload(m->acts.k, repeated(in->k, w), g);
    upload(m->acts.v, repeated(in->v, w), g);
    upload(s->datt, in->dout, g);
    upload(s->cosine, Doubles(table, 1.0), g);  // no rotation: the gradients come back as attention made them
    upload(s->sine, Doubles(table, 0.0), g);
    if (w->pre) { upload(weights.kq_conv, in->conv_pre, g); }
    if (w->post) { upload(weights.kq_conv_post, in->conv_post, g); }
    if (w->ch_pre) { upload(weights.head_mix_pre, in->mix_pre, g); }
    if (w->ch_post) { upload(weights.head_mix, in->mix_post, g); }
    if (w->diff) { upload(s->pair_mix, in->mix_post, g); }
    Attention a = attention_of(m, &weights, 0, w->B, w->T);
    if (w->shared) { a.shared = (size_t)w->shared << 10; }
    if (a.pair_mix && !w->diff) { convert(s->pair_mix, weights.head_mix, 2 * NH, g); }
    int q_parts = a.flash ? flash_splits(a.S, NH, w->T) : 1;
    cudaCheck(cudaMemsetAsync(s->attention.dq, 0xff, q_parts * (size_t)a.S * NH * w->T * HS * sizeof(float),
                              g->stream));  // NaN: what nobody writes is not read
    attention_forward(m->acts.att, m->acts.stats, m->acts.q, m->acts.k, m->acts.v, &a, &s->attention, g);
    HeadOutput output = {};
    output.scale = 1, output.B = w->B, output.T = w->T, output.NH = NH, output.HS = HS, output.wide = 1,
    output.pair_mix = a.pair_mix;
    head_output_forward(m->acts.out, m->acts.att, &output, g);
    Rope rope = {s->cosine, s->sine, w->T, NH, NKV, HS};
    attention_backward(s->qkv, &m->sums, s->datt, m->acts.att, m->acts.q, m->acts.k, m->acts.v, m->acts.stats, &rope,
                       &a, &s->attention, g);
    Doubles out = download(m->acts.out, n, g), dqkv = download(s->qkv, n / NH * (NH + 2 * NKV), g);
    for (int kind = OUT; kind <= DV; kind++) {  // (B,heads,T,HS) from rows of heads
        int heads = kind <= DQ ? NH : NKV;
        res[kind].resize(n / NH * heads);
        for (size_t i = 0; i < res[kind].size(); i++) {
            size_t x = i % HS, row = i / HS / w->T / heads * w->T + i / HS % w->T, h = i / HS / w->T % heads;
            res[kind][i] = kind == OUT ? out[(row * NH + h) * HS + x]
                                       : dqkv[packed_at((int)row, kind - DQ, (int)h, NH, NKV, HS) + x];
        }
    }
    const double* const sums[4] = {m->sums.conv_pre, m->sums.conv_post, m->sums.mix_pre, m->sums.mix_post};
    const Doubles* const like[4] = {&in->conv_pre, &in->conv_post, &in->mix_pre, &in->mix_post};
    for (int i = 0; i < 4; i++) {
        res[DCONV_PRE + i] = like[i]->empty() ? Doubles() : download(sums[i], like[i]->size(), g);
    }
    model_free(m);
    return true;
}
static void attention_case(Test* t, const int* s, int shared) {
    static const char* const names[N_RESULTS] = {"out",       "dq",         "dk",       "dv",
                                                 "dconv_pre", "dconv_post", "dmix_pre", "dmix_post"};
    Whole w = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], shared};
    Inputs in = whole_inputs(t, &w);
    Doubles want[N_RESULTS], got[N_RESULTS], again[N_RESULTS];
    whole_reference(t, want, &w, &in);
    if (!whole_trainer(t, got, &w, &in)) { return; }
    bool twice = w.T < 256;  // the same bits again; not where it takes seconds
    if (twice) { whole_trainer(t, again, &w, &in); }
    for (int i = 0; i < N_RESULTS; i++) {
        expect(t, names[i], got[i], want[i], CHAINED);
        if (twice) { expect(t, "the same launches again", again[i], got[i], MOVED); }
    }
}
static void test_attention(Test* t, const int* s) { attention_case(t, s, 0); }
#if !defined(PRECISION_FP32)
static void test_attention_little(Test* t, const int* s) { attention_case(t, s, 96); }
#endif

// =====================================================================================================================
// What follows attention; loss, update

typedef struct {
    int B, T, NH, HS, wide;
    bool norm, gate, mix;
} HeadShape;

// Values of heads (B,NH,T,HS) as rows (B*T,NH*HS), or back
static Doubles head_rows(const Doubles& x, const HeadShape& h, bool back) {
    Doubles y(x.size());
    for (int i = 0; i < (int)x.size(); i++) {
        int e = i % h.HS, t = i / h.HS % h.T, head = i / h.HS / h.T % h.NH, b = i / h.HS / h.T / h.NH,
            row = ((b * h.T + t) * h.NH + head) * h.HS + e;
        if (back) {
            y[i] = x[row];
        } else {
            y[row] = x[i];
        }
    }
    return y;
}
static void test_head_output(Test* t, const int* s) {
    HeadShape h = {s[0], s[1], s[2], s[3], s[4], s[5] != 0, s[6] != 0, s[7] != 0};
    int N = h.B * h.T, units = h.NH / h.wide, size = h.wide * h.HS;
    size_t n = (size_t)N * h.NH * h.HS;
    double scale = h.norm ? 0.75 : 1;
    Device<floatX> inp(t, normal(t, h.mix ? 2 * n : n)), norm(t, normal(t, size, 0.3, 1)),
        gate(t, normal(t, h.HS, 0.5)), bias(t, normal(t, 1)), out(t, n), dinp(t, n);
    Device<floatX> dout(t, normal(t, n));
    Device<float> mix(t, normal(t, 2 * h.NH)), dnorm(t, normal(t, size)), dgate(t, normal(t, h.HS)),
        dbias(t, normal(t, 1));
    Device<float> parts(t, head_parts(units, h.B) * (size_t)head_width(h.wide, h.HS));
    HeadOutput o = {};
    if (h.norm) { o.norm = norm.p; }
    if (h.gate) { o.gate = gate.p, o.bias = bias.p; }
    if (h.mix) { o.pair_mix = mix.p; }
    o.scale = (float)scale, o.B = h.B, o.T = h.T, o.NH = h.NH, o.HS = h.HS, o.wide = h.wide;
    Doubles heads(inp.host.begin(), inp.host.begin() + n);
    for (size_t i = 0; h.mix && i < n; i++) {
        size_t head = i / h.HS / h.T % h.NH;
        heads[i] = mix.host[2 * head] * inp.host[i] + mix.host[2 * head + 1] * inp.host[n + i];
    }
    Doubles x = head_rows(heads, h, false), normed = x, rstd((size_t)N * units), want = x, d = dout.host, back = d;
    Doubles want_dnorm = dnorm.host, want_dgate = dgate.host, want_dbias = dbias.host;
    if (h.norm) {
        t->ref->rmsnorm_forward(normed.data(), rstd.data(), x.data(), norm.host.data(), N * units, size, 1e-5, scale);
    }
    want = normed;
    if (h.gate) {
        t->ref->head_gate_forward(want.data(), normed.data(), gate.host.data(), bias.host.data(), N * h.NH, h.HS);
        t->ref->head_gate_backward(back.data(), want_dgate.data(), want_dbias.data(), d.data(), normed.data(),
                                   gate.host.data(), bias.host.data(), N * h.NH, h.HS);
        d = back;
    }
    if (h.norm) {
        t->ref->rmsnorm_backward(back.data(), want_dnorm.data(), d.data(), x.data(), norm.host.data(), rstd.data(),
                                 N * units, size, scale, false);
    }
    head_output_forward(out.p, inp.p, &o, t->g);
    head_output_backward(dinp.p, dnorm.p, dgate.p, dbias.p, dout.p, inp.p, &o, parts.p, t->g);
    expect(t, "out", out.get(), want, STORED);
    expect(t, "dinp", dinp.get(), head_rows(back, h, true), STORED);
    expect(t, "dnorm", dnorm.get(), want_dnorm, FLOAT);
    expect(t, "dgate", dgate.get(), want_dgate, FLOAT);
    expect(t, "dbias", dbias.get(), want_dbias, FLOAT);
}

static void test_diff_lambda(Test* t, const int* s) {
    int NH = s[0], HS = s[1];
    Device<floatX> w(t, normal(t, 4 * HS, 0.2));
    Device<float> mix(t, 2 * NH), d(t, normal(t, 4 * HS));
    Device<double> dmix(t, normal(t, 2 * NH));
    Lambda lambda = {w.p, w.p + HS, w.p + 2 * HS, w.p + 3 * HS};
    Doubles want(2 * NH), want_d = d.host;
    t->ref->diff_lambda_forward(want.data(), w.host.data(), 0.35, NH, HS);
    t->ref->diff_lambda_backward(want_d.data(), dmix.host.data(), w.host.data(), NH, HS);
    diff_lambda_forward(mix.p, &lambda, 0.35, NH, HS, t->g);
    diff_lambda_backward(d.p, d.p + HS, d.p + 2 * HS, d.p + 3 * HS, dmix.p, &lambda, NH, HS, t->g);
    expect(t, "mix", mix.get(), want, FLOAT);
    expect(t, "dlambda", d.get(), want_d, FLOAT);
}

static void test_swiglu(Test* t, const int* s) {
    int N = s[0], FF = s[1];
    size_t n = (size_t)N * FF;
    Device<floatX> gate_up(t, normal(t, 2 * n, 2)), out(t, n), dout(t, normal(t, n)), dgate_up(t, 2 * n),
        alone(t, 2 * n);
    Doubles gate = columns_of(gate_up.host, N, 2 * FF, 0, FF), up = columns_of(gate_up.host, N, 2 * FF, FF, FF),
            want(n), again(n), dgate(n), dup(n), want_d(2 * n);
    t->ref->swiglu_forward(want.data(), gate.data(), up.data(), n);
    t->ref->swiglu_backward(dgate.data(), dup.data(), again.data(), dout.host.data(), gate.data(), up.data(), n);
    columns_put(&want_d, dgate, N, 2 * FF, 0, FF);
    columns_put(&want_d, dup, N, 2 * FF, FF, FF);
    swiglu_forward(out.p, gate_up.p, N, FF, t->g);
    swiglu_backward(alone.p, NULL, dout.p, gate_up.p, N, FF, t->g);
    // The forward result takes the gradient's place, as the trainer has it where that result was not kept.
    swiglu_backward(dgate_up.p, dout.p, dout.p, gate_up.p, N, FF, t->g);
    expect(t, "out", out.get(), want, STORED);
    expect(t, "act", dout.get(), want, STORED);
    expect(t, "dgate_up", dgate_up.get(), want_d, STORED);
    expect(t, "dgate_up alone", alone.get(), want_d, STORED);
}

static void test_crossentropy(Test* t, const int* s) {
    int N = s[0], V = s[1], ld = logit_stride(V);
    bool gradient = s[2];
    double dloss = 0.125;
    std::vector<int32_t> ids = draw_ids(t, N, V);
    for (int n = 1; n < N; n += 3) { ids[n] = -100; }
    Device<int> targets(t, ids);
    Device<floatX> logits(t, normal(t, (size_t)N * ld, 2));
    Device<float> losses(t, N);
    Device<unsigned char> wrong(t, N);
    Doubles x = columns_of(logits.host, N, ld, 0, V), want(N), want_wrong(N);
    std::vector<unsigned char> flags(N);
    for (int n = 0; n < N; n += 2) {  // every other row's target is the best
        if (ids[n] >= 0) { logits.host[(size_t)n * ld + ids[n]] = x[(size_t)n * V + ids[n]] = 9; }
        int other = ids[n] + (n % 8 < 4 ? -1 : 1);  // and as good as the id before it, or as the one behind it
        if (n % 4 && other >= 0 && other < V) { logits.host[(size_t)n * ld + other] = x[(size_t)n * V + other] = 9; }
    }
    std::vector<floatX> changed(logits.host.size());
    for (size_t i = 0; i < changed.size(); i++) { changed[i] = Device<floatX>::element(logits.host[i]); }
    logits.put(changed.data());
    t->ref->crossentropy_forward_backward(want.data(), flags.data(), x.data(), ids.data(), N, V, dloss, gradient);
    for (int n = 0; n < N; n++) { want_wrong[n] = flags[n]; }
    crossentropy_forward_backward(losses.p, wrong.p, logits.p, targets.p, N, V, ld, (float)dloss, gradient, t->g);
    expect(t, "losses", losses.get(), want, FLOAT);
    expect(t, "wrong", wrong.get(), want_wrong, MOVED);
    expect(t, "logits", columns_of(logits.get(), N, ld, 0, V), x, gradient ? STORED : MOVED);
}

// The update of a model's arena, whose size is the model's: clipped or not, first step or later
static void test_gradients_add(Test* t, const int* s) {
    size_t n = (size_t)s[0];
    Device<float> sum(t, normal(t, n)), more(t, normal(t, n));
    Doubles want = sum.host;
    for (size_t i = 0; i < n; i++) { want[i] += more.host[i]; }
    gradients_add(t->g->stream, sum.p, more.p, n);
    expect(t, "sum", sum.get(), want, FLOAT);
}
static void test_update(Test* t, const int* s) {
    Whole w = {1, 4, 2, 2, s[0], 1, 1, 0, 0, 0, 0, 0, 0, 0};
    Config c = whole_config(&w);
    Error e = {{0}};
    ModelShape shape = shape_alone(1, 4, 0, RECOMPUTE_NONE);
    shape.shards = s[3];  // of several, the norm is a sum of blocks that ranks could share
    Model* m = model_create(&c, &shape, NULL, &e);
    if (!m) { die("%s", e.text); }
    size_t n = m->tensors.numel;
    Doubles master = normal(t, n), first = normal(t, n, 0.1), second = normal(t, n, 0.1), grads = normal(t, n);
    for (double& v : second) { v = v * v; }
    for (Doubles* x : {&master, &first, &second, &grads}) {
        for (double& v : *x) { v = (double)(float)v; }
    }
    AdamW hyper = {0.01, 0.9, 0.95, 1e-8, 0.1, s[1] ? 1.0 : 0.0};
    upload(m->master, master, &m->cuda);
    upload(m->m, first, &m->cuda);
    upload(m->v, second, &m->cuda);
    upload(m->grads, grads, &m->cuda);
    double want = t->ref->update(master.data(), first.data(), second.data(), grads.data(), n, &hyper, s[2]),
           got = model_update(m, &hyper, s[2]);
    expect(t, "norm", {got}, {want}, FLOAT);
    expect(t, "master", download(m->master, n, &m->cuda), master, FLOAT);
    expect(t, "weights", download(m->weights, n, &m->cuda), master, STORED);
    expect(t, "m", download(m->m, n, &m->cuda), first, FLOAT);
    expect(t, "v", download(m->v, n, &m->cuda), second, FLOAT);
    model_free(m);
}

// What the vendor's data sheets say of a GPU, in TFLOP/s; nothing of one that is none of theirs
static void test_card_rate(Test* t, const int* s) {
    double rate = card_rate(s[0], s[1], s[2] ? "NVIDIA H200 NVL" : "NVIDIA H200");
    expect(t, "rate", {rate * 1e-12}, {(double)s[EXACT ? 4 : 3]}, FLOAT);
}

// =====================================================================================================================
// The list of tests

// launchers: what of train_mta.cu a test calls. fields: what the numbers of a shape are. The first shape is that of
// --quick; large ones are for a GPU, or for --large.
typedef std::vector<std::vector<int>> Shapes;
typedef struct {
    const char *name, *launchers, *fields;
    void (*run)(Test* t, const int* shape);
    Shapes shapes, large;
} Operation;

// Steps of attention: one row, a chunk whose halo reaches above the sequence, one in the middle, one that ends with the
// sequence, one that would go beyond it; several tiles of each kernel (32, 64, 128 rows, 64 columns), and sizes that
// are multiples of nothing.
static std::vector<Operation> operations(void) {
    std::vector<Operation> list = {
        {"parts_add",
         "parts_add sums_launch",
         "parts n stride",
         test_parts_add,
         {{5, 131, 140}, {1, 1, 1}, {67, 8, 9}},
         {}},
        {"sums_add", "sums_add", "S groups blocks n", test_sums_add, {{2, 3, 5, 7}, {1, 1, 1, 1}, {3, 2, 70, 66}}, {}},
        {"attention_sums_add", "attention_sums_add", "n", test_attention_sums_add, {{131}, {1}, {256}}, {}},
        {"replay", "replay", "n calls", test_replay, {{37, 4}, {37, 1}}, {}},
        {"convert", "convert", "n wide", test_convert, {{259, 0}, {2056, 1}, {1, 0}}, {}},
        {"gemm",
         "gemm",
         "ta tb M N K batch add",
         test_gemm,
         {{0, 1, 7, 13, 19, 3, 0},
          {1, 0, 7, 13, 19, 3, 1},
          {0, 0, 33, 5, 70, 2, 1},
          {1, 1, 6, 9, 11, 1, 0},
          {0, 1, 1, 1, 1, 1, 1}},
         {}},
        {"matmul_forward", "matmul_forward", "N C OC apart", test_matmul_forward, {{11, 37, 21, 3}, {1, 1, 1, 0}}, {}},
        {"matmul_backward",
         "matmul_backward",
         "N C OC apart add",
         test_matmul_backward,
         {{11, 37, 21, 3, 0}, {11, 37, 21, 0, 1}, {1, 1, 1, 0, 0}},
         {}},
        {"matmul_joined",
         "matmul_joined_forward matmul_joined_backward",
         "N C OC0 OC1 OC2 apart",
         test_matmul_joined,
         {{9, 16, 8, 24, 5, 0}, {9, 16, 8, 24, 5, 1}},
         {}},
        {"embedding",
         "embedding_forward embedding_backward",
         "N C V",
         test_embedding,
         {{37, 19, 11}, {70, 136, 5}, {1, 1, 1}, {300, 72, 40}},
         {}},
        {"rmsnorm_forward",
         "rmsnorm_forward residual_rmsnorm_forward",
         "N C branch",
         test_rmsnorm_forward,
         {{9, 37, 1}, {9, 37, 0}, {17, 520, 1}, {3, 264, 0}, {1, 1, 0}},
         {}},
        {"rmsnorm_backward",
         "rmsnorm_backward",
         "N C add",
         test_rmsnorm_backward,
         {{9, 37, 1}, {13, 520, 0}, {1100, 8, 1}, {300, 72, 1}, {2, 4096, 1}, {2, 8192, 1}, {2, 8200, 1}, {1, 1, 0}},
         {}},
        {"rope_forward",
         "rope_forward",
         "B T NH NKV HS",
         test_rope_forward,
         {{2, 7, 6, 2, 10}, {1, 19, 3, 3, 48}, {2, 1, 2, 1, 2}},
         {}},
        {"rope_backward",
         "rope_backward",
         "B T NH NKV HS q_parts q_step v_parts",
         test_rope_backward,
         {{2, 7, 6, 2, 10, 1, 1, 1}, {1, 19, 4, 2, 48, 3, 8, 2}, {2, 1, 2, 1, 2, 2, 1, 1}},
         {}},
        {"scores_forward",
         "scores_input scores_forward",
         "S T NH lo hi HS",
         test_scores_forward,
         {{2, 37, 3, 5, 29, 12}, {1, 19, 2, -3, 23, 16}, {1, 1, 1, 0, 1, 2}},
         {}},
        {"scores_backward",
         "scores_backward",
         "S T NH lo hi HS",
         test_scores_backward,
         {{2, 37, 3, 5, 29, 12}, {1, 19, 2, 0, 19, 16}, {1, 1, 1, 0, 1, 2}},
         {}},
        {"kq_conv_forward",
         "kq_conv kq_conv_band kq_conv_forward",
         "S T NH lo hi cq ck",
         test_kq_conv_forward,
         {{2, 150, 2, 71, 143, 6, 11},
          {1, 37, 3, -4, 41, 6, 11},
          {1, 1, 2, 0, 1, 6, 11},
          {1, 140, 2, 0, 140, 2, 9},
          {2, 75, 2, 3, 75, 5, 17},
          {1, 100, 1, 20, 100, 3, 1},
          {1, 150, 2, 71, 143, 6, 33},
          {2, 74, 1, -1, 74, 2, 19},
          {1, 75, 3, 9, 80, 9, 5},
          {1, 70, 2, 0, 33, 7, 13},
          {1, 140, 2, 10, 139, 1, 3},
          {1, 4, 1, 0, 4, 1, 1}},
         {}},
        {"kq_conv_backward_input",
         "kq_conv kq_conv_band kq_conv_backward_input",
         "S T NH lo hi cq ck",
         test_kq_conv_backward_input,
         {{2, 150, 2, 71, 143, 6, 11},
          {1, 37, 3, 0, 41, 6, 11},
          {1, 1, 2, 0, 1, 6, 11},
          {1, 140, 2, 0, 140, 2, 9},
          {2, 75, 2, 3, 75, 5, 17},
          {1, 100, 1, 20, 90, 3, 1},
          {1, 150, 2, 71, 143, 6, 33},
          {2, 74, 1, 0, 72, 2, 19},
          {1, 75, 3, 9, 70, 9, 5},
          {1, 70, 2, 0, 33, 7, 13},
          {1, 140, 2, 10, 139, 1, 3},
          {1, 4, 1, 0, 4, 1, 1}},
         {}},
        {"kq_conv_backward_weight",
         "kq_conv_backward_weight kq_conv_band_backward_weight",
         "S T NH lo hi cq ck",
         test_kq_conv_backward_weight,
         {{2, 150, 2, 71, 143, 6, 11},
          {1, 37, 3, 0, 37, 6, 11},
          {1, 1, 2, 0, 1, 6, 11},
          {1, 140, 2, 0, 140, 2, 9},
          {2, 75, 2, 3, 75, 5, 17},
          {1, 100, 1, 20, 90, 3, 1},
          {1, 150, 2, 71, 143, 6, 33},
          {2, 74, 1, 0, 72, 2, 19},
          {1, 75, 3, 9, 70, 9, 5},
          {1, 70, 2, 0, 33, 7, 13},
          {1, 140, 2, 10, 139, 1, 3},
          {1, 4, 1, 0, 4, 1, 1}},
         {}},
        {"head_mix_forward",
         "head_mix_forward",
         "S T NH lo hi ch",
         test_head_mix_forward,
         {{2, 135, 4, 5, 23, 2},
          {1, 37, 3, -3, 41, 3},
          {2, 37, 32, 30, 37, 16},
          {1, 40, 130, 33, 40, 65},
          {1, 1, 2, 0, 1, 2},
          {1, 131, 12, 126, 131, 6}},
         {}},
        {"head_mix_backward_input",
         "head_mix_backward_input",
         "S T NH lo hi ch",
         test_head_mix_backward_input,
         {{2, 135, 4, 5, 23, 2},
          {1, 37, 3, 0, 41, 3},
          {2, 37, 32, 30, 37, 16},
          {1, 40, 130, 33, 40, 65},
          {1, 1, 2, 0, 1, 2},
          {1, 131, 12, 126, 131, 6}},
         {}},
        {"head_mix_backward_weight",
         "head_mix_backward_weight",
         "S T NH lo hi ch",
         test_head_mix_backward_weight,
         {{2, 135, 4, 5, 23, 2},
          {1, 37, 3, 0, 37, 3},
          {2, 37, 32, 30, 37, 16},
          {1, 80, 34, 71, 80, 17},
          {1, 1, 2, 0, 1, 2},
          {1, 600, 4, 590, 600, 2},
          {1, 420, 12, 415, 420, 12}},
         {}},
        {"softmax_forward",
         "softmax_forward softmax_recompute",
         "S T NH lo hi own recompute",
         test_softmax_forward,
         {{2, 300, 2, 271, 300, 3, 0}, {1, 37, 3, -3, 41, 3, 0}, {2, 75, 2, 9, 70, 0, 1}, {1, 1, 1, 0, 1, 0, 0}},
         {}},
        {"softmax_backward",
         "softmax_backward",
         "S T NH lo hi",
         test_softmax_backward,
         {{2, 300, 2, 271, 300}, {1, 37, 3, 0, 41}, {2, 75, 2, 9, 70}, {1, 1, 1, 0, 1}},
         {}},
        {"values_forward",
         "values_forward",
         "S T NH lo hi HS",
         test_values_forward,
         {{2, 37, 3, 5, 29, 12}, {1, 19, 2, 0, 19, 16}, {1, 1, 1, 0, 1, 2}},
         {}},
        {"values_backward",
         "values_backward_att values_backward_v",
         "S T NH lo hi HS",
         test_values_backward,
         {{2, 37, 3, 5, 29, 12}, {1, 19, 2, 0, 24, 16}, {1, 1, 1, 0, 1, 2}},
         {}},
        {"attention in chunks",
         "attention_heads attention_forward attention_backward attention_maps attention_chunk_backward mix16_maps "
         "mix16_maps_backward",
         "B T NH NKV HS cq ck pre post ch_pre ch_post diff chunk",
         test_attention,
         {{1, 41, 2, 2, 8, 6, 11, 1, 0, 0, 2, 0, 16},
          {2, 53, 4, 2, 8, 6, 11, 1, 1, 4, 2, 0, 16},
          {1, 41, 4, 4, 8, 1, 1, 0, 0, 0, 0, 0, 16},
          {2, 33, 4, 1, 6, 1, 1, 0, 0, 0, 0, 1, 7},
          {1, 50, 4, 4, 8, 5, 3, 0, 1, 0, 0, 0, 16},
          {1, 29, 4, 4, 8, 9, 5, 1, 1, 0, 0, 0, 3},
          {1, 50, 6, 6, 8, 1, 1, 0, 0, 6, 3, 0, 20},
          {1, 1, 4, 4, 8, 6, 11, 1, 1, 4, 4, 0, 1},
          {1, 1, 32, 32, 8, 6, 11, 1, 1, 16, 16, 0, 1},
          {1, 75, 32, 16, 8, 6, 11, 1, 1, 16, 16, 0, 32},
          {1, 75, 16, 16, 8, 1, 1, 0, 0, 16, 16, 0, 32},
          {2, 75, 16, 16, 8, 6, 11, 1, 0, 16, 16, 0, 20},
          {1, 75, 16, 16, 8, 6, 11, 0, 1, 16, 16, 0, 20},
          {1, 515, 16, 16, 8, 6, 11, 1, 1, 16, 16, 0, 256},
          {1, 613, 2, 2, 8, 6, 11, 1, 1, 2, 2, 0, 256}},
         {}},  // mta-full as it is trained: chunks of 256, three of them (515: three queries in the last)
        {"head_output",
         "head_output_forward head_output_backward",
         "B T NH HS wide norm gate mix",
         test_head_output,
         {{2, 7, 4, 12, 1, 1, 1, 0},
          {2, 7, 4, 12, 2, 1, 0, 0},
          {1, 19, 4, 40, 1, 1, 0, 1},
          {1, 19, 2, 264, 1, 0, 1, 0},
          {3, 35, 4, 40, 2, 1, 0, 1},
          {1, 33, 4, 96, 2, 1, 0, 1},
          {2, 3, 2, 6, 1, 0, 0, 1},
          {1, 300, 2, 8, 1, 1, 1, 1}},
         {}},
        {"diff_lambda",
         "diff_lambda_forward diff_lambda_backward",
         "NH HS",
         test_diff_lambda,
         {{4, 37}, {66, 96}, {2, 1}},
         {}},
        {"swiglu", "swiglu_forward swiglu_backward", "N FF", test_swiglu, {{7, 37}, {9, 136}, {1, 1}}, {}},
        {"crossentropy",
         "crossentropy_forward_backward",
         "N V gradient",
         test_crossentropy,
         {{7, 37, 1}, {4, 9001, 1}, {7, 37, 0}, {1, 1, 1}, {5, 8192, 0}, {3, 264, 1}},
         {}},
        {"gradients_add", "gradients_add", "n", test_gradients_add, {{4}, {2052}}, {}},
        {"update",
         "gradient_norm norm_of_blocks model_update",
         "HS clip step shards",
         test_update,
         {{8, 1, 1, 1}, {6, 0, 3, 1}, {250, 1, 2, 1}, {8, 1, 1, 2}, {250, 1, 2, 4}},
         {}},
        {"card_rate",
         "",
         "capability multiprocessors NVL bf16 fp32",
         test_card_rate,
         {{90, 132, 0, 989, 67},
          {90, 132, 1, 835, 60},
          {90, 114, 0, 756, 51},
          {90, 78, 0, 0, 0},
          {80, 56, 0, 0, 0},
          {89, 128, 0, 0, 0}},
         {}},
    };
#if !defined(PRECISION_FP32)
    std::vector<Operation> bf16 = {
        {"head_mix16_forward",
         "head_mix16_forward",
         "S T NH lo hi own recompute",
         test_head_mix16_forward,
         {{1, 150, 16, 139, 150, 3, 0}, {2, 37, 32, -3, 41, 3, 0}, {1, 75, 16, 60, 70, 0, 1}, {1, 1, 16, 0, 1, 0, 0}},
         {}},
        {"head_mix16_backward",
         "head_mix16_backward",
         "S T NH lo hi further",
         test_head_mix16_backward,
         {{1, 150, 16, 139, 145, 5}, {2, 37, 32, 30, 37, 5}, {1, 75, 16, 60, 70, 0}, {1, 1, 16, 0, 1, 0}},
         {}},
        {"attention fused, little shared memory",  // tiles of 64 queries in the backward pass, as on an A100
         "flash_backward",
         "B T NH NKV HS cq ck pre post ch_pre ch_post diff chunk",
         test_attention_little,
         {{1, 131, 2, 2, 96, 1, 1, 0, 0, 0, 2, 0, 0},
          {1, 130, 1, 1, 96, 1, 1, 0, 0, 0, 0, 0, 0},
          {2, 67, 2, 2, 96, 1, 1, 0, 0, 0, 0, 1, 0},
          {1, 70, 2, 2, 64, 1, 1, 0, 0, 0, 2, 0, 0},
          {2, 65, 1, 1, 64, 1, 1, 0, 0, 0, 0, 0, 0}},
         {{1, 1023, 2, 2, 96, 1, 1, 0, 0, 0, 2, 0, 0}}},
        {"attention fused",
         "attention_forward attention_backward flash_attention_forward flash_attention_backward flash_forward "
         "flash_backward",
         "B T NH NKV HS cq ck pre post ch_pre ch_post diff chunk",
         test_attention,
         {{1, 74, 2, 2, 96, 6, 11, 1, 0, 0, 2, 0, 0},  {1, 1, 2, 2, 96, 1, 1, 0, 0, 0, 0, 0, 0},
          {2, 1, 2, 2, 96, 6, 11, 1, 0, 0, 2, 0, 0},   {3, 65, 1, 1, 64, 1, 1, 0, 0, 0, 0, 0, 0},
          {1, 257, 2, 1, 96, 1, 1, 0, 0, 0, 0, 0, 0},  {2, 130, 1, 1, 128, 1, 1, 0, 0, 0, 0, 0, 0},
          {1, 71, 3, 3, 40, 1, 1, 0, 0, 0, 0, 0, 0},   {1, 129, 4, 2, 64, 1, 1, 0, 0, 0, 2, 0, 0},
          {3, 33, 4, 4, 96, 1, 1, 0, 0, 0, 2, 0, 0},   {1, 131, 2, 2, 128, 1, 1, 0, 0, 0, 2, 0, 0},
          {1, 193, 1, 1, 96, 6, 11, 1, 0, 0, 0, 0, 0}, {1, 257, 2, 2, 96, 6, 11, 1, 0, 0, 2, 0, 0},
          {2, 127, 2, 2, 64, 6, 11, 1, 0, 0, 2, 0, 0}, {1, 129, 2, 2, 128, 6, 11, 1, 0, 0, 2, 0, 0},
          {1, 70, 2, 2, 64, 2, 9, 1, 0, 0, 0, 0, 0},   {2, 74, 2, 2, 128, 2, 9, 1, 0, 0, 0, 0, 0},
          {1, 97, 2, 2, 128, 2, 15, 1, 0, 0, 0, 0, 0}, {1, 66, 1, 1, 96, 1, 3, 1, 0, 0, 0, 0, 0},
          {1, 100, 2, 2, 88, 5, 17, 1, 0, 0, 2, 0, 0}, {3, 67, 2, 2, 16, 3, 5, 1, 0, 0, 2, 0, 0},
          {1, 7, 2, 2, 8, 6, 1, 1, 0, 0, 2, 0, 0},     {1, 90, 4, 2, 64, 1, 1, 0, 0, 0, 0, 1, 0}},
         {{1, 300, 132, 132, 16, 6, 11, 1, 0, 0, 2, 0, 0},
          {1, 300, 132, 132, 32, 1, 1, 0, 0, 0, 2, 0, 0},  // blocks of several tiles of keys, as 880m has at B 16
          {1, 1023, 2, 2, 96, 1, 1, 0, 0, 0, 0, 0, 0},
          {1, 2047, 2, 2, 96, 1, 1, 0, 0, 0, 2, 0, 0},
          {2, 2048, 2, 2, 96, 6, 11, 1, 0, 0, 2, 0, 0},
          {1, 4099, 2, 2, 96, 6, 11, 1, 0, 0, 2, 0, 0}}},
        {"attention by cuDNN",  // the last, since a call that the library fails ends the program; chunk -1: CHUNK_CUDNN
         "cudnn_attention_forward cudnn_attention_backward pair_rows flash_prepare",
         "B T NH NKV HS cq ck pre post ch_pre ch_post diff chunk",
         test_attention,
         {{1, 33, 4, 4, 96, 1, 1, 0, 0, 0, 2, 0, CHUNK_CUDNN},
          {3, 65, 1, 1, 64, 1, 1, 0, 0, 0, 0, 0, CHUNK_CUDNN},
          {5, 40, 4, 2, 16, 1, 1, 0, 0, 0, 2, 0, CHUNK_CUDNN},
          {2, 67, 2, 2, 96, 1, 1, 0, 0, 0, 0, 1, CHUNK_CUDNN},
          {1, 130, 2, 2, 128, 1, 1, 0, 0, 0, 2, 0, CHUNK_CUDNN},
          {2, 1, 2, 2, 8, 1, 1, 0, 0, 0, 2, 0, CHUNK_CUDNN}},
         {}},
    };
    list.insert(list.end(), bf16.begin(), bf16.end());
    auto needs_cudnn = [](const Operation& o) { return !strcmp(o.name, "attention by cuDNN"); };
    if (!HAS_CUDNN) { list.erase(std::remove_if(list.begin(), list.end(), needs_cudnn), list.end()); }
#endif
    return list;
}

// ---- what train_mta.cu says must be tested: functions whose last parameter is the Cuda context, and those that launch
// a kernel

typedef struct {
    int line;
    bool wide;
    std::string launcher;
} Site;  // a LAUNCH or LAUNCH_WIDE
typedef struct {
    std::set<std::string> launchers;
    std::vector<Site> sites;
} Source;

static Source read_source(void) {
    std::string path(__FILE__), line, head;
    path = path.substr(0, path.rfind("dev/tests/")) + "train_mta.cu";
    Source s;
    char *text, *end;
    size_t n;
    Error e = {{0}};
    std::string name;
    int depth = 0, skipped = 0;  // of #if; that of one that leaves lines out of this build
    bool in_head = false;
    if (!read_file(path.c_str(), 16 << 20, &text, &n, &e)) { die("test_ops: %s; run from the repository", e.text); }
    int number = 0;
    for (char* p = text; p < text + n; p = end + 1) {
        end = (char*)memchr(p, '\n', (size_t)(text + n - p));
        if (!end) { end = text + n; }
        line.assign(p, end);
        number++;
        if (line.find("#if") == 0) { depth++; }
        if (EXACT && !skipped && line.find("#if !defined(PRECISION_FP32)") == 0) { skipped = depth; }
        if (line.find("#else") == 0 && depth == skipped) { skipped = 0; }
        if (line.find("#endif") == 0 && depth-- == skipped) { skipped = 0; }
        if (skipped) { continue; }
        if (line.find("static ") == 0 && line.find("__device__") == std::string::npos &&
            line.find('(') != std::string::npos) {
            size_t paren = line.find('('), begin = line.find_last_of(" *", paren) + 1;
            name = line.substr(begin, paren - begin), head = "", in_head = true;
        }
        if (in_head) {
            head += line + " ";
            size_t brace = head.find('{');
            in_head = brace == std::string::npos && head.find(';') == std::string::npos;
            size_t context = head.find(", Cuda* g");
            if (!in_head && brace != std::string::npos && context != std::string::npos &&
                (head[context + 9] == ')' || head.compare(context + 9, 6, ", bool") == 0)) {
                s.launchers.insert(name);
            }
        }
        size_t at = line.find("LAUNCH");
        if (at != std::string::npos && line.find("//") > at && line[0] != '#' && line.back() != '\\' &&
            (line.compare(at, 7, "LAUNCH(") == 0 || line.compare(at, 12, "LAUNCH_WIDE(") == 0)) {
            s.launchers.insert(name);
            s.sites.push_back({number, line[at + 6] == '_', name});
        }
    }
    free(text);
    return s;
}
// What the fp32 build never calls: kernels for tensor cores; and one without cuDNN
static bool other_build(const std::string& launcher) {
    if (!HAS_CUDNN && (launcher.find("cudnn_attention") == 0 || launcher == "pair_rows")) { return true; }
    return EXACT && (launcher.find("head_mix16") == 0 || launcher.find("kq_conv_band") == 0);
}

// Those that no operation names
static std::vector<std::string> untested(const Source& source, const std::vector<Operation>& list) {
    std::string all = " ";
    std::vector<std::string> missing;
    for (const Operation& o : list) { all += std::string(o.launchers) + " "; }
    for (const std::string& name : source.launchers) {
        if (all.find(" " + name + " ") == std::string::npos && !other_build(name)) {
            missing.push_back(name + ": no operation tests it");
        }
    }
    return missing;
}
// Launches that nothing reached; of those in two widths, either. A launch belongs to the last site before or at its
// line: a macro's line is that of its end for some compilers.
static std::vector<std::string> unreached(const Source& source) {
    std::map<int, std::set<std::string>> reached;
    std::vector<std::string> missing;
    for (const auto& l : launches()) {
        int line = 0;
        for (const Site& s : source.sites) {
            if (s.line <= l.first) { line = s.line; }
        }
        reached[line].insert(l.second);
    }
    for (const Site& s : source.sites) {
        if (!other_build(s.launcher) && reached[s.line].size() < (s.wide ? 2u : 1u)) {
            missing.push_back(s.launcher + ", line " + std::to_string(s.line) + ": " +
                              (s.wide ? "a launch of one width was not reached" : "a launch was not reached"));
        }
    }
    return missing;
}

static bool run_shape(const Operation& o, const std::vector<int>& shape, Cuda* g, int* skipped) {
    std::string title = o.name, fields = o.fields;
    uint64_t seed = 7;
    size_t at = 0;
    for (int x : shape) {
        size_t space = fields.find(' ', at);
        title += " " + fields.substr(at, space - at) + " " + std::to_string(x), at = space + 1;
        seed = seed * 31 + (uint64_t)(x + 100);
    }
    Test t = {g, reference(), rng_make(11, seed), 0, "", ""};
    double start = seconds_now();
    o.run(&t, shape.data());
    bool good = t.worst <= 1;
    if (!t.skipped.empty()) {
        (*skipped)++;
        printf("skip %s: %s\n", title.c_str(), t.skipped.c_str());
        return true;
    }
    printf("%s %-100s %5.2f s, %.3f of the tolerance%s%s\n", good ? "ok  " : "FAIL", title.c_str(),
           seconds_now() - start, t.worst, good ? "" : ": ", good ? "" : t.what.c_str());
    fflush(stdout);
    return good;
}

// =====================================================================================================================
// perf: what an operation costs. Bytes are what it must read and write at least, each element once; operations are 2 M
// N K of a product and, of attention, those of the definition on the causal half: 4 T^2/2 (HS + values) forward, values
// HS or 2 HS wide, 2.5 times that backward, and for a convolution 2 cq ck T^2/2 forward, twice that backward. The
// roofline is the larger of the times that the bytes need at the rate of a copy of device memory and the operations at
// the vendor's peak.

typedef std::function<void()> Work;
typedef struct {
    std::string name;
    double bytes, flops;
    Work work;
} Cost;
typedef struct {
    Cuda* g;
    const char* only;
    double bytes_per_us, flops_per_us;
} Perf;
enum { ROUNDS = 5 };

// The best of ROUNDS, in microseconds; one more before them warms up.
static double best_microseconds(Cuda* g, const Work& work) {
    cudaEvent_t start, stop;
    cudaCheck(cudaEventCreate(&start));
    cudaCheck(cudaEventCreate(&stop));
    float best = INFINITY;
    for (int r = 0; r <= ROUNDS; r++) {
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
    return 1000.0 * (double)best;
}
static void print_cost(const Perf* p, const Cost& c) {
    if (c.name.find(p->only) == std::string::npos) { return; }
#if defined(CUDA_CPU)
    cuda_cpu::tensor_counts = {};
    c.work();
    cudaCheck(cudaStreamSynchronize(p->g->stream));
    const cuda_cpu::TensorCounts& n = cuda_cpu::tensor_counts;
    printf("%-56s %8.2f MB %9.4f GFLOP", c.name.c_str(), c.bytes * 1e-6, c.flops * 1e-9);
    if (n.mma) {
        printf("  %.2f of its products of 4096 executed, %.2f KB loaded each, %.1f KB copied",
               4096.0 * (double)n.mma / c.flops, 0.5 * (double)n.ldmatrix / (double)n.mma,
               16.0 / 1024 * (double)n.copies);
    }
    printf("\n");
#else
    double us = best_microseconds(p->g, c.work),
           least = std::max(c.bytes / p->bytes_per_us, p->flops_per_us > 0 ? c.flops / p->flops_per_us : 0);
    printf("%-56s %9.1f us %8.1f MB %7.0f GB/s %9.2f GFLOP %7.1f TFLOP/s  %.3f of the roofline\n", c.name.c_str(), us,
           c.bytes * 1e-6, c.bytes / us * 1e-3, c.flops * 1e-9, c.flops / us * 1e-6, least / us);
#endif
    fflush(stdout);
}

// One micro-batch at random fills every buffer with values like those of training. Returns how many tokens are
// distinct.
static int fill_model(Model* m, int B, int T) {
    int N = B * T, V = m->config.vocab_size;
    std::vector<int32_t> tokens((size_t)N);
    Rng rng = rng_make(1, 2);
    for (int32_t& id : tokens) { id = (int32_t)(rng_u32(&rng) % (uint32_t)V); }
    model_initialise(trainer_cuda(), m, &m->config, 1);
    model_zero_gradients(m);
    model_forward(m, tokens.data(), B, T);
    model_loss(m, tokens.data(), N, (float)(1.0 / N), true, NULL);
    model_backward(m, tokens.data(), B, T);
    return rows_by_token(m, tokens.data(), N);
}
// All kernels of a layer of `mta` but attention's, then those of the whole model
static std::vector<Cost> kernel_costs(Model* m, int B, int T, int distinct) {
    const Config* c = &m->config;
    Scratch* s = &m->scratch;
    Activations* a = &m->acts;
    Cuda* g = &m->cuda;
    int N = B * T, C = c->hidden_size, FF = c->intermediate_size, NH = c->num_attention_heads,
        NKV = c->num_key_value_heads, HS = config_head_size(c);
    int S = m->sequences, rows = min_int(m->logit_rows, N), V = c->vocab_size, ld = logit_stride(V);
    double NC = (double)N * C, NF = (double)N * FF, numel = (double)m->tensors.numel, eps = c->rms_norm_eps,
           x = sizeof(floatX), heads = (NH + 2.0 * NKV) / NH;
    LayerOf<floatX> w = model_layer(m, m->weights, 0);
    LayerOf<float> d = model_layer(m, m->grads, 0);
    HeadOutput o = head_output_of(m, &w, 0, B, T);
    AdamW hyper = {1e-5, 0.9, 0.98, 1e-8, 0, 0};
    Rope rope = {s->cosine, s->sine, T, NH, NKV, HS};
    return {
        {"kernel embedding_forward", NC * (x + 4), 0,
         [=] { embedding_forward(a->x, s->tokens, model_tensor(m, m->weights, TENSOR_EMBED), N, C, g); }},
        {"kernel embedding_backward", NC * 4 + 8.0 * distinct * C, 0,
         [=] {
             embedding_backward(model_tensor(m, m->grads, TENSOR_EMBED), s->dx, s->tokens, s->rows, s->starts, distinct,
                                C, g);
         }},
        {"kernel residual_rmsnorm_forward", NC * (8 + 2 * x), 0,
         [=] { residual_rmsnorm_forward(a->ln2, a->rstd2, a->x_mid, a->x, s->branch, w.post_norm, N, C, eps, g); }},
        {"kernel rmsnorm_backward", NC * (8 + 2 * x), 0,
         [=] {
             rmsnorm_backward(s->dx, d.post_norm, s->dln, a->x_mid.high, w.post_norm, a->rstd2, N, C, s->parts, true,
                              g);
         }},
        {"kernel rope_forward", NC * (heads + 3) * x, 0, [=] { rope_forward(a->q, a->k, a->v, s->qkv, &rope, B, g); }},
        {"kernel rope_backward, 1 part", (double)S * T * C * (4 + 2 * x + heads * x), 0,
         [=] {
             rope_backward(s->qkv, s->attention.dq, (floatX*)s->attention.dk, (floatX*)s->attention.dv, &rope, S, 1, 1,
                           1, g);
         }},
        {"kernel head_output_forward", NC * x * (m->att_parts + 1), 0,
         [=] { head_output_forward(a->out, a->att, &o, g); }},
        {"kernel head_output_backward", NC * x * (m->att_parts + 2), 0,
         [=] {
             head_output_backward(s->datt, d.head_norm, d.gate_weight, d.gate_bias, s->dout, a->att, &o, s->parts, g);
         }},
        {"kernel swiglu_forward", NF * 3 * x, 0, [=] { swiglu_forward(s->act, a->gate_up, N, FF, g); }},
        {"kernel swiglu_backward", NF * 5 * x, 0,
         [=] { swiglu_backward(s->dgate_up, NULL, s->act, a->gate_up, N, FF, g); }},
        {"kernel crossentropy", (double)rows * ld * 2 * x, 0,
         [=] { crossentropy_forward_backward(s->losses, s->wrong, s->logits, s->targets, rows, V, ld, 1, true, g); }},
        {"kernel zero_gradients", numel * 4, 0, [=] { model_zero_gradients(m); }},
        {"kernel gradient_norm", numel * 4, 0, [=] { gradient_norm(m, g); }},
        {"kernel gradient_norm, adamw", numel * (32 + (EXACT ? 0 : x)), 0, [=] { model_update(m, &hyper, 1); }},
    };
}

// Matrix products of a layer: out (M,N) = A B. wide: fp32 out; add: onto what is there
typedef struct {
    const char* name;
    bool ta, tb;
    int M, N, K;
    bool wide, add;
} Product;
static void print_products(const Perf* p, Model* m, int B, int T) {
    const Config* c = &m->config;
    Cuda* g = &m->cuda;
    int N = B * T, C = c->hidden_size, FF = c->intermediate_size,
        QKV = (c->num_attention_heads + 2 * c->num_key_value_heads) * config_head_size(c);
    int V = c->vocab_size, rows = min_int(m->logit_rows, N), F = 2 * FF;
    const Product list[] = {
        {"qkv", false, true, N, QKV, C, false, false},
        {"o", false, true, N, C, C, false, false},
        {"gate, up", false, true, N, F, C, false, false},
        {"down", false, true, N, C, FF, false, false},
        {"head", false, true, rows, V, C, false, false},
        {"qkv, dinp", false, false, N, C, QKV, false, false},
        {"o, dinp", false, false, N, C, C, false, false},
        {"gate, up, dinp", false, false, N, C, F, false, false},
        {"down, dinp", false, false, N, FF, C, false, false},
        {"head, dinp", false, false, rows, C, V, false, false},
        {"qkv, dweight", true, false, QKV, C, N, true, true},
        {"o, dweight", true, false, C, C, N, true, true},
        {"gate, up, dweight", true, false, F, C, N, true, true},
        {"down, dweight", true, false, C, FF, N, true, true},
        {"head, dweight", true, false, V, C, rows, true, true},
    };
    size_t most = 0, widest = 0;
    for (const Product& x : list) {
        most = std::max(most, std::max((size_t)x.M * x.K, (size_t)x.K * x.N));
        widest = std::max(widest, (size_t)x.M * x.N * sizeof(float));
    }
    floatX *A = NULL, *W = NULL;
    char* out = NULL;
    cudaCheck(cudaMalloc((void**)&A, most * sizeof(floatX)));
    cudaCheck(cudaMalloc((void**)&W, most * sizeof(floatX)));
    cudaCheck(cudaMalloc((void**)&out, widest));
    cudaCheck(cudaMemsetAsync(out, 0, widest, g->stream));
    for (floatX* x : {A, W}) {  // real values: zeros would draw less power and run faster
        for (size_t i = 0; i < most; i += m->tensors.numel) {
            cudaCheck(cudaMemcpyAsync(x + i, m->weights, std::min(m->tensors.numel, most - i) * sizeof(floatX),
                                      cudaMemcpyDeviceToDevice, g->stream));
        }
    }
    for (const Product& x : list) {
        size_t lda = (size_t)(x.ta ? x.M : x.K), ldb = (size_t)(x.tb ? x.K : x.N);
        double bytes = ((double)x.M * x.K + (double)x.K * x.N) * sizeof(floatX) +
                       (double)x.M * x.N * (x.wide ? 4 : sizeof(floatX)) * (x.add ? 2 : 1);
        std::string name = std::string("product ") + x.name + " " + std::to_string(x.M) + " x " + std::to_string(x.N) +
                           " x " + std::to_string(x.K);
        print_cost(
            p, {name, bytes, 2.0 * x.M * x.N * x.K, [&] {
                    Matrix to = x.wide ? matrix((float*)out, (size_t)x.N) : matrix((floatX*)out, (size_t)x.N);
                    gemm(to, matrix(A, lda), matrix(W, ldb), {x.ta, x.tb, x.M, x.N, x.K, 1, x.add ? 1.0f : 0.0f}, g);
                }});
    }
    cudaCheck(cudaStreamSynchronize(g->stream));
    cudaCheck(cudaFree(A));
    cudaCheck(cudaFree(W));
    cudaCheck(cudaFree(out));
}

// The attention of one layer alone, forward and backward, fused or in chunks
typedef struct {
    const char* title;
    bool conv, mix;
} Layer;
static void print_layer(const Perf* p, const Layer* l, int B, int T, int NH, int HS, bool fused) {
    Whole w = {B, T, NH, NH, HS, 6, 11, l->conv, 0, 0, l->mix ? 2 : 0, 0, fused ? 0 : attention_chunk(T), 0};
    Config c = whole_config(&w);
    Error e = {{0}};
    ModelShape shape = shape_alone(B, T, w.chunk, RECOMPUTE_NONE);
    Model* m = model_create(&c, &shape, NULL, &e);
    if (!m) { die("%s", e.text); }
    model_initialise(trainer_cuda(), m, &m->config, 1);
    Scratch* s = &m->scratch;
    Activations* acts = &m->acts;
    Cuda* g = &m->cuda;
    size_t n = (size_t)NH * T *
               HS;  // of a sequence; all have the same: to draw numbers for 16 of them takes longer than what is timed
    std::vector<floatX> x(n);
    floatX* const to[] = {acts->q, acts->k, acts->v, s->datt};
    for (int i = 0; i < 4; i++) {
        Rng rng = rng_make(2, (uint64_t)i);
        for (floatX& v : x) { v = (floatX)rng_normal(&rng); }
        for (int b = 0; b < B; b++) {
            cudaCheck(cudaMemcpyAsync(to[i] + b * n, x.data(), n * sizeof(floatX), cudaMemcpyHostToDevice, g->stream));
        }
        cudaCheck(cudaStreamSynchronize(g->stream));
    }
    LayerOf<floatX> weights = model_layer(m, m->weights, 0);
    Attention a = attention_of(m, &weights, 0, B, T);
    if (a.pair_mix) { convert(s->pair_mix, weights.head_mix, 2 * NH, g); }
    Rope rope = {s->cosine, s->sine, T, NH, NH, HS};
    std::string name = std::string("attention ") + l->title + ", " + std::to_string(B) + " x " + std::to_string(T) +
                       (a.flash ? " fused" : " chunked");
    double half = 0.5 * T * T * NH * B, products = half * 4 * (HS + (l->mix ? 2 : 1) * HS) / 2,
           conv = l->conv ? half * 2 * 66 : 0, row = (double)B * n * sizeof(floatX);
    Perf own = {g, p->only, p->bytes_per_us, p->flops_per_us};  // the model's own stream
    print_cost(&own, {name + " forward", row * (3 + m->att_parts), products + conv, [=] {
                          attention_forward(acts->att, acts->stats, acts->q, acts->k, acts->v, &a, &s->attention, g);
                      }});
    print_cost(&own, {name + " backward", row * (7 + m->att_parts), 2.5 * products + 2 * conv, [=] {
                          attention_backward(s->qkv, &m->sums, s->datt, acts->att, acts->q, acts->k, acts->v,
                                             acts->stats, &rope, &a, &s->attention, g);
                      }});
    cudaCheck(cudaStreamSynchronize(g->stream));
    model_free(m);
}

static int perf(const char* only, const char* model, int T, int B) {
    Config c;
    Error e = {{0}};
    cudaDeviceProp device;
    if (!preset_find(model)) { die("test_ops: --model: no preset %s", model); }
    config_from_preset(&c, preset_find(model));
    c.num_hidden_layers = 1;
    for (int l = 0; l < MAX_LAYERS; l++) { c.kq_conv_layer[l] = false; }
    if (!config_set_attention(&c, "mta", false, &e) || !config_check(&c, &e)) { die("%s", e.text); }
    ModelShape shape = shape_alone(B, T, 0, RECOMPUTE_NONE);
    Model* m = model_create(&c, &shape, NULL, &e);
    if (!m) { die("%s", e.text); }
    cudaCheck(cudaGetDeviceProperties(&device, 0));
    size_t half = m->tensors.numel / 2 *
                  sizeof(float);  // device memory's own rate: half of the optimizer's first moment onto the other half
    double us = best_microseconds(&m->cuda, [&] {
        cudaCheck(cudaMemcpyAsync(m->m, (char*)m->m + half, half, cudaMemcpyDeviceToDevice, m->cuda.stream));
    });
    Perf p = {&m->cuda, only, 2 * (double)half / us, matmul_rate(&device) * 1e-6};
    printf("%s; one layer of %s, %d x %d tokens; best of %d; a copy of device memory %.0f GB/s, products at most %.0f "
           "TFLOP/s\n",
           device.name, model, B, T, ROUNDS, p.bytes_per_us * 1e-3, p.flops_per_us * 1e-6);
    static const Layer layers[] = {
        {"plain", false, false}, {"pairs mixed", false, true}, {"convolution, pairs mixed", true, true}};
    bool others = strncmp(only, "attention", 9) != 0;
    if (strncmp(only, "kernel", 6) && strncmp(only, "product", 7)) {
        for (int longer = 1; longer <= (B > 1 ? 2 : 1); longer++) {
            for (const Layer& l : layers) {
                for (int fused = !EXACT; fused >= 0; fused--) {
                    print_layer(&p, &l, B / longer, longer * T, c.num_attention_heads, config_head_size(&c), fused);
                }
            }
        }
    }
    if (others) {
        for (const Cost& k : kernel_costs(m, B, T, fill_model(m, B, T))) { print_cost(&p, k); }
        print_products(&p, m, B, T);
    }
    model_free(m);
    return 0;
}

// =====================================================================================================================
// main

static int test(const char* only, bool quick, bool large, int longest) {
    Source source = read_source();
    std::vector<Operation> list = operations();
    std::vector<std::string> missing = untested(source, list);
    Cuda g = {};
    Error e = {{0}};
    int passed = 0, failed = 0, skipped = 0;
    if (!cuda_open(&g, &e)) { die("test_ops: %s", e.text); }
    for (const Operation& o : list) {
        Shapes shapes = o.shapes;
        if (large) { shapes.insert(shapes.end(), o.large.begin(), o.large.end()); }
        if (quick) { shapes.resize(1); }
        bool whole = strncmp(o.fields, "B T", 3) == 0 || strncmp(o.fields, "S T", 3) == 0;
        for (const std::vector<int>& shape : shapes) {
            if (std::string(o.name).find(only) == std::string::npos || (whole && shape[1] > longest)) { continue; }
            if (run_shape(o, shape, &g, &skipped)) {
                passed++;
            } else {
                failed++;
            }
        }
    }
    cuda_close(&g);
    if (!*only && !quick && longest >= 613) {
        for (const std::string& x : unreached(source)) { missing.push_back(x); }
    }
    for (const std::string& x : missing) { printf("FAIL %s\n", x.c_str()); }
    failed += (int)missing.size();
    printf(skipped ? "%d passed, %d failed, %d skipped\n" : "%d passed, %d failed\n", passed - skipped, failed,
           skipped);
    return failed ? 1 : 0;
}

int main(int argc, char** argv) {
#if defined(CUDA_CPU)
    // Small shapes are cut as large ones are: into several chunks and splits.
    setenv("CUDA_CPU_SCRATCH", "1048576", 0);
    setenv("CUDA_CPU_MULTIPROCESSORS", "2", 0);
    setenv("CUDA_CPU_HEAD_BLOCKS", "6", 0);
    bool large = false;
    int T = 128, B = 2;
    const char* model = "1m";
#else
    bool large = true;
    int T = 2048, B = 16;
    const char* model = "880m";
#endif
    bool quick = false;
    const char *only = "", *mode[1] = {"test"};
    int longest = 1 << 20;
    Opt table[] = {{"--only", OPT_STRING, &only, "TEXT", "operations whose name contains TEXT", 0, 0, false},
                   {"--quick", OPT_FLAG, &quick, NULL, "test: one shape of each operation", 0, 0, false},
                   {"--large", OPT_FLAG, &large, NULL, "test: also shapes that are large for a CPU", 0, 0, false},
                   {"--longest", OPT_INT, &longest, "T", "test: no longer sequences", 1, 1 << 20, false},
                   {"--model", OPT_STRING, &model, "NAME", "perf: shapes of a preset", 0, 0, false},
                   {"--seq-len", OPT_INT, &T, "T", "perf: tokens of a sequence", 1, 1 << 20, false},
                   {"--batch-size", OPT_INT, &B, "B", "perf: sequences", 1, 1 << 16, false},
                   OPT_END};
    options_parse(table, "usage: test_ops [test|perf] [options]", argc, argv, mode, 1);
    if (!strcmp(mode[0], "perf")) { return perf(only, model, T, B); }
    if (strcmp(mode[0], "test")) { die("test_ops: got %s, wanted test or perf", mode[0]); }
    return test(only, quick, large, longest);
}
