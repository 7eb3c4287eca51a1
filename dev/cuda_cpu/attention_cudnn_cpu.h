// attention_cudnn_cpu.h: stand-in for mta/attention_cudnn.h's functions: the same graphs in plain loops, one row of a
// head at a time, sums in fp32, rounded to bf16 where cuDNN's graph has bf16: P and dS before they are multiplied, and
// every result. As the library does, it refuses a plan for a shape that it sees first while a stream is captured.
// CUDA_CPU_FAIL=attention_cudnn_open:N, attention_cudnn_plan:N, attention_cudnn_forward:N and so on make calls fail.
#ifndef CUDA_CPU_ATTENTION_CUDNN_H
#define CUDA_CPU_ATTENTION_CUDNN_H
#include "cuda_bf16.h"
#include "cuda_runtime.h"

typedef struct {
    cudaStream_t stream;
    std::vector<AttentionShape>* plans[2];  // forward, backward
} AttentionCudnn;

static inline bool attention_cudnn_open(AttentionCudnn* c, cudaStream_t stream, Error* e) {
    c->stream = stream;
    c->plans[0] = c->plans[1] = NULL;
    if (cuda_cpu::planted_failure(__func__)) { return fail(e, "cuDNN cannot be used: planted"); }
    for (auto& plans : c->plans) { plans = new std::vector<AttentionShape>; }
    return true;
}
static inline void attention_cudnn_close(AttentionCudnn* c) {
    for (auto& plans : c->plans) {
        delete plans;
        plans = NULL;
    }
}
static inline const AttentionShape* attention_cudnn_plan(AttentionCudnn* c, const AttentionShape* s, bool backward,
                                                         Error* e) {
    auto& plans = *c->plans[backward];
    for (auto& plan : plans) {
        if (!memcmp(&plan, s, sizeof *s)) { return &plan; }
    }
    const char* why = cuda_cpu::planted_failure(__func__)         ? "planted"
                      : s->HS % 8 || s->VS % 8                    ? "sizes of a head that are no multiples of 8"
                      : s->HS > 128 || s->VS > 256                ? "a head that is too large"
                      : c->stream->capture || cuda_cpu::capturing ? "a new plan while a stream is captured"
                                                                  : NULL;
    if (why) {
        fail(e, "attention by cuDNN, %s of %d sequences of %d tokens, %d heads of %d, values of %d: %s",
             backward ? "backward" : "forward", s->B, s->T, s->NH, s->HS, s->VS, why);
        return NULL;
    }
    plans.push_back(*s);
    return &plans.back();
}

namespace cuda_cpu {
typedef __nv_bfloat16 Bf16;

inline float dot(const Bf16* a, const Bf16* b, int n) {
    float sum = 0;
    for (int e = 0; e < n; e++) { sum += (float)a[e] * (float)b[e]; }
    return sum;
}
inline void add(float* sum, float factor, const Bf16* x, int n) {
    for (int e = 0; e < n; e++) { sum[e] += factor * (float)x[e]; }
}
inline void round_into(Bf16* out, const float* x, size_t n) {
    for (size_t e = 0; e < n; e++) { out[e] = Bf16(x[e]); }
}

// One head: o, v (T,VS), q, k (T,HS), stats (T)
inline void attention_head(Bf16* o, float* stats, const Bf16* q, const Bf16* k, const Bf16* v,
                           const AttentionShape& s) {
    std::vector<float> p((size_t)s.T), sum((size_t)s.VS);
    for (int i = 0; i < s.T; i++) {
        float largest = -INFINITY, total = 0;
        for (int j = 0; j <= i; j++) {
            p[j] = dot(q + (size_t)i * s.HS, k + (size_t)j * s.HS, s.HS) * s.scale;
            largest = fmaxf(largest, p[j]);
        }
        for (int j = 0; j <= i; j++) { total += p[j] = expf(p[j] - largest); }
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int j = 0; j <= i; j++) { add(sum.data(), (float)Bf16(p[j] / total), v + (size_t)j * s.VS, s.VS); }
        round_into(o + (size_t)i * s.VS, sum.data(), (size_t)s.VS);
        stats[i] = largest + logf(total);
    }
}

// The gradients of one head; every sum over queries runs from the first to the last.
inline void attention_head_backward(Bf16* dq, Bf16* dk, Bf16* dv, const Bf16* d_o, const Bf16* o, const float* stats,
                                    const Bf16* q, const Bf16* k, const Bf16* v, const AttentionShape& s) {
    std::vector<float> dk_sum((size_t)s.T * s.HS), dv_sum((size_t)s.T * s.VS), dq_sum((size_t)s.HS);
    for (int i = 0; i < s.T; i++) {
        const Bf16 *qi = q + (size_t)i * s.HS, *doi = d_o + (size_t)i * s.VS;
        float row = dot(doi, o + (size_t)i * s.VS, s.VS);
        std::fill(dq_sum.begin(), dq_sum.end(), 0.0f);
        for (int j = 0; j <= i; j++) {
            const Bf16* kj = k + (size_t)j * s.HS;
            float p = expf(dot(qi, kj, s.HS) * s.scale - stats[i]);
            float ds = (float)Bf16((dot(doi, v + (size_t)j * s.VS, s.VS) - row) * p * s.scale);
            add(&dv_sum[(size_t)j * s.VS], (float)Bf16(p), doi, s.VS);
            add(&dk_sum[(size_t)j * s.HS], ds, qi, s.HS);
            add(dq_sum.data(), ds, kj, s.HS);
        }
        round_into(dq + (size_t)i * s.HS, dq_sum.data(), (size_t)s.HS);
    }
    round_into(dk, dk_sum.data(), dk_sum.size());
    round_into(dv, dv_sum.data(), dv_sum.size());
}
}  // namespace cuda_cpu

static inline bool attention_cudnn_forward(AttentionCudnn* c, void* o, float* stats, const void* q, const void* k,
                                           const void* v, const AttentionShape* shape, void* workspace, Error* e) {
    typedef cuda_cpu::Bf16 Bf16;
    AttentionShape s = *shape;
    if (!attention_cudnn_plan(c, shape, false, e)) { return false; }
    if (cuda_cpu::planted_failure(__func__)) { return fail(e, "attention by cuDNN, forward: planted"); }
    cuda_cpu::submit(c->stream, [=] {
        memset(workspace, 0xff, attention_cudnn_workspace(&s));
        for (size_t h = 0; h < (size_t)s.B * s.NH; h++) {
            size_t at = h * s.T * s.HS, at_v = h * s.T * s.VS;
            cuda_cpu::attention_head((Bf16*)o + at_v, stats + h * s.T, (const Bf16*)q + at, (const Bf16*)k + at,
                                     (const Bf16*)v + at_v, s);
        }
    });
    return true;
}
static inline bool attention_cudnn_backward(AttentionCudnn* c, void* dq, void* dk, void* dv, const void* d_o,
                                            const void* o, const float* stats, const void* q, const void* k,
                                            const void* v, const AttentionShape* shape, void* workspace, Error* e) {
    typedef cuda_cpu::Bf16 Bf16;
    AttentionShape s = *shape;
    if (!attention_cudnn_plan(c, shape, true, e)) { return false; }
    if (cuda_cpu::planted_failure(__func__)) { return fail(e, "attention by cuDNN, backward: planted"); }
    cuda_cpu::submit(c->stream, [=] {
        memset(workspace, 0xff, attention_cudnn_workspace(&s));
        for (size_t h = 0; h < (size_t)s.B * s.NH; h++) {
            size_t at = h * s.T * s.HS, at_v = h * s.T * s.VS;
            cuda_cpu::attention_head_backward((Bf16*)dq + at, (Bf16*)dk + at, (Bf16*)dv + at_v, (const Bf16*)d_o + at_v,
                                              (const Bf16*)o + at_v, stats + h * s.T, (const Bf16*)q + at,
                                              (const Bf16*)k + at, (const Bf16*)v + at_v, s);
        }
    });
    return true;
}
#endif
