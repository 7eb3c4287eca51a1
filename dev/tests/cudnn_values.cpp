// cudnn_values.cpp: the graphs of mta/attention_cudnn.h, computed by the emulator's cudnn.h, against attention in plain
// loops in double. dev/tests/test_cudnn.py compiles it, also with mistakes planted into the header, which it must
// notice: the library itself takes any graph that has a meaning.
#include <omp.h>
#include <cuda_runtime.h>
#include "mta/attention_cudnn.h"

typedef std::vector<double> Doubles;

// What bf16 holds, normal, of a size that lets a softmax be neither flat nor a single one
static Doubles random_values(size_t n, double size) {
    static uint64_t state = 1;
    Doubles x(n);
    for (double& v : x) {
        double sum = 0;
        for (int i = 0; i < 12; i++) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            sum += (double)(state >> 40) / (1 << 24);
        }
        v = (float)__nv_bfloat16((float)(size * (sum - 6)));
    }
    return x;
}

// An array of the device, of bf16 or float
template <typename T> struct Array {
    T* p;
    size_t n;
    explicit Array(size_t size) : n(size) { cudaMalloc(&p, n * sizeof(T)); }
    explicit Array(const Doubles& x) : Array(x.size()) {
        for (size_t i = 0; i < n; i++) { p[i] = T((float)x[i]); }
    }
    ~Array() { cudaFree(p); }
};
typedef Array<__nv_bfloat16> Rounded;

// The worst distance relative to the largest value wanted; a NaN is infinite.
template <typename T> static void compare(const char* what, const Array<T>& got, const Doubles& want, double limit) {
    double largest = 0, worst = 0;
    for (double w : want) { largest = fmax(largest, fabs(w)); }
    for (size_t i = 0; i < want.size(); i++) {
        double error = fabs((double)(float)got.p[i] - want[i]) / largest;
        if (!(error <= worst)) { worst = std::isnan(error) ? INFINITY : error; }
    }
    printf("%s %.2g of %.2g\n", what, worst, limit);
    if (!(worst <= limit)) {
        die("cudnn_values: %s differs by %.2g of the largest, wanted %.2g at most", what, worst, limit);
    }
}

static double dot(const double* a, const double* b, int n) {
    double sum = 0;
    for (int e = 0; e < n; e++) { sum += a[e] * b[e]; }
    return sum;
}

int main() {
    const AttentionShape s = {2, 3, 37, 16, 24, 0.3f};
    const size_t heads = (size_t)s.B * s.NH, T = s.T, HS = s.HS, VS = s.VS;
    Doubles q = random_values(heads * T * HS, 1), k = random_values(heads * T * HS, 1),
            v = random_values(heads * T * VS, 1), d_o = random_values(heads * T * VS, 1), o(v.size()), stats(heads * T),
            dq(q.size()), dk(k.size()), dv(v.size());

    // By the definition.
    for (size_t row = 0; row < heads * T; row++) {
        size_t i = row % T, first = row - i;  // the head's row 0
        Doubles p(i + 1);
        double sum = 0, rest = 0;
        for (size_t j = 0; j <= i; j++) {
            sum += p[j] = exp((double)s.scale * dot(&q[row * HS], &k[(first + j) * HS], s.HS));
        }
        stats[row] = log(sum);
        for (size_t j = 0; j <= i; j++) {
            p[j] /= sum;
            rest += p[j] * dot(&d_o[row * VS], &v[(first + j) * VS], s.VS);
            for (size_t e = 0; e < VS; e++) {
                o[row * VS + e] += p[j] * v[(first + j) * VS + e];
                dv[(first + j) * VS + e] += p[j] * d_o[row * VS + e];
            }
        }
        for (size_t j = 0; j <= i; j++) {
            double ds = (double)s.scale * p[j] * (dot(&d_o[row * VS], &v[(first + j) * VS], s.VS) - rest);
            for (size_t e = 0; e < HS; e++) {
                dq[row * HS + e] += ds * k[(first + j) * HS + e];
                dk[(first + j) * HS + e] += ds * q[row * HS + e];
            }
        }
    }

    // By the graphs.
    static AttentionCudnn c;
    Error e = {{0}};
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    Rounded q_in(q), k_in(k), v_in(v), do_in(d_o), o_out(o.size()), dq_out(q.size()), dk_out(k.size()),
        dv_out(v.size());
    Array<float> stats_out(stats.size());
    Array<char> workspace(attention_cudnn_workspace(&s));
    if (!attention_cudnn_open(&c, stream, &e) ||
        !attention_cudnn_forward(&c, o_out.p, stats_out.p, q_in.p, k_in.p, v_in.p, &s, workspace.p, &e) ||
        !attention_cudnn_backward(&c, dq_out.p, dk_out.p, dv_out.p, do_in.p, o_out.p, stats_out.p, q_in.p, k_in.p,
                                  v_in.p, &s, workspace.p, &e)) {
        die("cudnn_values: %s", e.text);
    }
    cudaStreamSynchronize(stream);
    compare("O", o_out, o, 8e-3);
    compare("stats", stats_out, stats, 1e-6);
    compare("dQ", dq_out, dq, 1.2e-2);
    compare("dK", dk_out, dk, 1.2e-2);
    compare("dV", dv_out, dv, 8e-3);
    attention_cudnn_close(&c);
    return 0;
}
