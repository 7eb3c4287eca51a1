// test_products.c: products in bf16 (--matmul bf16) as train_mta.c makes them: their values, whether the rounded copy
// of every operand is that of what is there when a product reads it, and the same bits whatever the threads.
static void check_rounded(const void* products, const float* x, int rows, int cols, unsigned long ld);
#define CHECK_ROUNDED(p, x, rows, cols, ld) check_rounded(p, x, rows, cols, ld)
#define MTA_LIBRARY
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../../train_mta.c"

#include "check.h"

static long operands, stale;  // that products have read; whose copy was not that of their values

static void check_rounded(const void* products, const float* x, int rows, int cols, unsigned long ld) {
    long bad = 0;
    for (int r = 0; r < rows; r++) {
        const uint16_t* copy = rounded_copy((const Products*)products, x + (size_t)r * ld);
        for (int c = 0; c < cols; c++) { bad += copy[c] != f32_to_bf16(x[(size_t)r * ld + c]); }
    }
#pragma omp atomic
    operands++;
#pragma omp atomic
    stale += bad > 0;
}

static float* random_floats(uint64_t seed, size_t n) {
    float* x = (float*)alloc_or_die(n, sizeof(float), "test data");
    Rng rng = rng_make(seed, 1);
    for (size_t i = 0; i < n; i++) { x[i] = (float)rng_normal(&rng); }
    return x;
}

// One product of each kind against sums in double of the rounded operands; what lies beside the result stays.
static void test_values(int M, int N, int K) {
    int lda = max_int(M, K) + 3, ldb = max_int(N, K) + 5, ldo = N + 2;
    size_t na = (size_t)lda * max_int(M, K), nb = (size_t)ldb * max_int(N, K), no = (size_t)ldo * M;
    float *a = random_floats(1, na), *b = random_floats(2, nb), *out = random_floats(3, no),
          *got = random_floats(3, no);
    const Rounded of[3] = {{a, na, NULL}, {b, nb, NULL}, {NULL, 0, NULL}};
    Products* p = products_create(of, 0.25f);
    round_operand(p, a, na);
    round_operand(p, b, nb);
    for (int kind = 0; kind < 16; kind++) {
        bool ta = kind & 1, tb = kind & 2, good = true;
        float alpha = kind & 4 ? 0.25f : 1, beta = kind & 8 ? 1 : 0;
        memcpy(got, out, no * sizeof(float));
        gemm(ta, tb, M, N, K, alpha, a, (size_t)lda, b, (size_t)ldb, beta, got, (size_t)ldo, p);
        for (int m = 0; m < M; m++) {
            for (int n = 0; n < ldo; n++) {
                double sum = 0, was = (double)out[m * ldo + n];
                for (int k = 0; k < K && n < N; k++) {
                    sum += (double)bf16_to_f32(f32_to_bf16(ta ? a[k * lda + m] : a[m * lda + k])) *
                           (double)bf16_to_f32(f32_to_bf16(tb ? b[n * ldb + k] : b[k * ldb + n]));
                }
                double want = n < N ? (double)alpha * sum + (double)beta * was : was;
                good = good && fabs((double)got[m * ldo + n] - want) <= 1e-5 * (1 + sqrt(K) + fabs(want));
            }
        }
        char text[96];
        snprintf(text, sizeof text, "M=%d N=%d K=%d kind %d", M, N, K, kind);
        check(good, "a product in bf16 has its value", text);
    }
    products_free(p);
    free(a);
    free(b);
    free(out);
    free(got);
}

// Two steps of two micro-batches and an evaluation on so many threads: the gradients and weights, for the caller to
// free.
static float* train_steps(const Config* c, int B, int T, int threads) {
    omp_set_num_threads(threads);
    const AdamW hyper = {1e-2, 0.9, 0.98, 1e-8, 0.05, 1};
    Model* m = (Model*)trainer_cpu_bf16()->create(c, B, T, 16, true, NULL);
    int32_t* tokens = (int32_t*)alloc_or_die((size_t)2 * B * T, sizeof(int32_t), "tokens");
    Rng rng = rng_make(7, 7);
    for (int i = 0; i < 2 * B * T; i++) { tokens[i] = (int32_t)(rng_u32(&rng) % (uint32_t)c->vocab_size); }
    model_initialise(trainer_cpu_bf16(), m, c, 5);
    for (int step = 1; step <= 2; step++) {
        model_zero_gradients(m);
        model_forward_backward(m, tokens, tokens + B * T, B, T, 0.01);
        model_forward_backward(m, tokens + B * T, tokens, B - 1, T - 5, 0.01);
        model_update(m, &hyper, step);
        table_forward(m, tokens, tokens + B * T, B, T, NULL);
    }
    table_last_logits(m, tokens, 3, m->scratch.logits);
    float* state = (float*)alloc_or_die(2 * m->tensors.numel, sizeof(float), "state");
    memcpy(state, m->weights, m->tensors.numel * sizeof(float));
    memcpy(state + m->tensors.numel, m->grads, m->tensors.numel * sizeof(float));
    MemoryPlan plan = model_memory(c, B, T, true);
    size_t held = 0;
    for (int i = 0; i < 3; i++) { held += m->products->of[i].n * sizeof(uint16_t); }
    if (threads == omp_get_max_threads()) { CHECK(held <= plan.rounded && held > plan.weights / 2); }
    model_free(m);
    free(tokens);
    return state;
}

static void test_steps(const char* kind, int kv_heads, bool tied) {
    Config c;
    Error e = {{0}};
    config_from_preset(&c, preset_find("1m"));
    c.vocab_size = 61;
    c.hidden_size = 48;
    c.intermediate_size = 40;
    c.num_hidden_layers = 3;
    c.num_attention_heads = 4;
    c.num_key_value_heads = kv_heads;
    c.tie_word_embeddings = tied;
    for (int l = 0; l < MAX_LAYERS; l++) { c.kq_conv_layer[l] = l == 1; }
    check(config_set_attention(&c, kind, false, &e) && config_check(&c, &e), "the model is one", e.text);
    int T = 70;
    TensorList list;
    tensor_list(&list, &c);
    size_t bytes = 2 * list.numel * sizeof(float);
    operands = stale = 0;
    float *one = train_steps(&c, 2, T, 1), *two = train_steps(&c, 2, T, 2), *five = train_steps(&c, 2, T, 5);
    check(operands > 1000 && stale == 0, "every operand's copy is that of its values", kind);
    check(!memcmp(one, two, bytes) && !memcmp(one, five, bytes), "the same bits with 1, 2 and 5 threads", kind);
    tensor_list_free(&list);
    free(one);
    free(two);
    free(five);
}

int main(void) {
    Error e = {{0}};
    if (!bf16_products(&e)) {
        printf("skip: %s\n", e.text);
        skipped++;
        return test_verdict();
    }
    const int sizes[][3] = {{1, 1, 1}, {1, 7, 3}, {2, 1, 130}, {17, 33, 1}, {64, 96, 40}, {3, 700, 5}, {600, 9, 70}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) { test_values(sizes[i][0], sizes[i][1], sizes[i][2]); }
    for (int k = 0; k < ATTENTION_KIND_COUNT; k++) { test_steps(ATTENTION_KINDS[k].name, 4, k % 2 == 0); }
    test_steps("transformer", 2, false);
    return test_verdict();
}
