// mta/sample.h: how infer_mta draws the next token from its logits: a penalty of the tokens that stand before it, the
// temperature, then the k best, of them the best that make top_p, of these all with at least min_p times the
// probability of the best.
#ifndef MTA_SAMPLE_H
#define MTA_SAMPLE_H

#include "infer_options.h"
#include "matrix.h"
#include "random.h"

// Divides the positive logits of the last --repeat-last of n ids by the penalty, and multiplies the negative ones by it
// (CTRL, arXiv 1909.05858, section 4.1, with the sign minded). A token counts once, however often it stands there.
static inline void sample_penalize(const InferOptions* o, float* logits, const int32_t* ids, int n) {
    float penalty = (float)o->repeat_penalty;
    int from = n > o->repeat_last ? n - o->repeat_last : 0;
    for (int i = from; i < n && penalty != 1; i++) {
        bool again = false;
        for (int j = from; j < i && !again; j++) { again = ids[j] == ids[i]; }
        float* x = &logits[ids[i]];
        if (!again) { *x = *x > 0 ? *x / penalty : *x * penalty; }
    }
}

static inline void heap_swap(float* weight, int32_t* id, int i, int j) {
    float w = weight[i];
    int32_t k = id[i];
    weight[i] = weight[j];
    id[i] = id[j];
    weight[j] = w;
    id[j] = k;
}

// Restores the order of a heap of n below place i: the largest weight on top; of equal ones the lower id.
static inline void heap_sink(float* weight, int32_t* id, int n, int i) {
    for (;;) {
        int best = i;
        for (int c = 2 * i + 1; c <= 2 * i + 2 && c < n; c++) {
            if (weight[c] > weight[best] || (weight[c] == weight[best] && id[c] < id[best])) { best = c; }
        }
        if (best == i) { return; }
        heap_swap(weight, id, i, best);
        i = best;
    }
}

// Moves the k best of V weights (0: all), of them the fewest that make top_p of their sum, to the end of the arrays,
// the best one last. total: the sum of all weights. Returns how many these are; 0 where top_p alone leaves none.
static inline int sample_keep(float* weight, int32_t* id, int V, int k, double top_p, double total) {
    bool by_k = k > 0 && k < V;
    int taken = 0, kept = 0;
    double sum = 0, part = 0;
    if (!by_k && top_p >= 1) { return V; }
    for (int i = V / 2 - 1; i >= 0; i--) { heap_sink(weight, id, V, i); }
    while (taken < V && (by_k ? taken < k : sum < top_p * total)) {
        int left = V - ++taken;
        heap_swap(weight, id, 0, left);
        heap_sink(weight, id, left, 0);
        sum += weight[left];
    }
    if (!by_k || top_p >= 1) { return taken; }
    while (kept < taken && part < top_p * sum) { part += weight[V - ++kept]; }
    return kept ? kept : 1;
}

// Draws one of the first `known` ids by logits (V) and n ids before it. room (2, V) gets weights and their ids. At
// temperature 0 the likeliest one, the lowest of equal ones.
static inline int32_t sample_token(const InferOptions* o, const float* logits, int V, int known, const int32_t* ids,
                                   int n, float* room, Rng* rng) {
    float* weight = room;
    int32_t *id = (int32_t*)(room + V), best = 0;
    double total = 0, drawn = 0;
    memcpy(weight, logits, (size_t)V * sizeof *weight);
    sample_penalize(o, weight, ids, n);
    float largest = largest_of(weight, known);
    while (best < known - 1 && weight[best] != largest) { best++; }
    if (o->temperature == 0) { return best; }
    for (int i = 0; i < known; i++) {
        weight[i] = expf((weight[i] - largest) / (float)o->temperature);
        id[i] = i;
        total += weight[i];
    }
    int kept = sample_keep(weight, id, known, o->top_k, o->top_p, total);
    if (!kept) { return best; }
    for (int i = known - kept; i < known; i++) { drawn += weight[i] >= o->min_p ? weight[i] : 0; }
    double u = rng_uniform(rng) * drawn;
    for (int i = known - 1; i >= known - kept; i--) {
        if (weight[i] < o->min_p) { continue; }
        u -= weight[i];
        if (u < 0) { return id[i]; }
    }
    return best;
}

#endif
