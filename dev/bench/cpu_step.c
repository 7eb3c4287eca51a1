// cpu_step.c: seconds of one optimizer step of train_mta.c, with products in fp32 and in bf16, and of a 2048^3 matrix
// product, in one run on one machine, all in turns.
// Called by cpu_step.sh, which says what the figures mean. Prints one line of JSON.
//   cpu_step ATTENTION [T] [REPEATS] [CHUNK]
#define MTA_LIBRARY
#include "../../train_mta.c"

static int compare_doubles(const void* a, const void* b) {
    return (*(const double*)a > *(const double*)b) - (*(const double*)a < *(const double*)b);
}
static double median(double* x, int n) {
    qsort(x, (size_t)n, sizeof(double), compare_doubles);
    return x[n / 2];
}

enum { SIDE = 2048, MAX_REPEATS = 100 };

// Operations a second of one product of 2048^3: the library's own, with its own threads (blocks false), or cut into our
// blocks.
static double product_rate(float* a, bool blocks) {
    float *b = a + (size_t)SIDE * SIDE, *c = b + (size_t)SIDE * SIDE;
    double start;
#ifdef MTA_CBLAS
    extern void openblas_set_num_threads(int) __attribute__((weak));
    if (!blocks) {
        if (openblas_set_num_threads) { openblas_set_num_threads(omp_get_max_threads()); }
        start = seconds_now();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, SIDE, SIDE, SIDE, 1, a, SIDE, b, SIDE, 0, c, SIDE);
        double rate = 2.0 * SIDE * SIDE * SIDE / (seconds_now() - start);
        blas_single_thread();
        return rate;
    }
#endif
    (void)blocks;
    start = seconds_now();
    gemm(false, false, SIDE, SIDE, SIDE, 1, a, SIDE, b, SIDE, 0, c, SIDE, NULL);
    return 2.0 * SIDE * SIDE * SIDE / (seconds_now() - start);
}

// Seconds of one optimizer step of random tokens; its loss into *loss.
static double step_seconds(Model* m, const int32_t* tokens, int B, int T, long step, double* loss) {
    const AdamW h = {1e-4, 0.9, 0.98, 1e-8, 0.05, 1.0};
    double start = seconds_now();
    model_zero_gradients(m);
    model_forward(m, tokens, B, T);
    *loss = model_loss(m, tokens + B * T, B * T, (real)(1.0 / (B * T)), true, NULL) / (B * T);
    model_backward(m, tokens, B, T);
    model_update(m, &h, step);
    return seconds_now() - start;
}

int main(int argc, char** argv) {
    Config c;
    Error e = {{0}};
    int B = 2, T = argc > 2 ? atoi(argv[2]) : 1024, repeats = argc > 3 ? atoi(argv[3]) : 5,
        chunk = argc > 4 ? atoi(argv[4]) : 0;
    config_from_preset(&c, preset_find("11m"));
    c.vocab_size = 8192;
    if (argc < 2 || T < 1 || repeats < 1 || repeats > MAX_REPEATS || !config_set_attention(&c, argv[1], false, &e)) {
        die("usage: cpu_step ATTENTION [T] [REPEATS up to %d] [CHUNK]: %s", MAX_REPEATS, e.text);
    }
    blas_single_thread();
    float* matrices = (float*)alloc_or_die(3 * (size_t)SIDE * SIDE, sizeof(float), "matrices");
    for (int i = 0; i < 2 * SIDE * SIDE; i++) { matrices[i] = (float)(i % 97) * 0.01f; }
    Model *m = model_create(&c, B, T, chunk, true),
          *rounded = bf16_products(&e) ? model_create(&c, B, T, chunk, true) : NULL;
    model_initialise(trainer_cpu(), m, &m->config, 1);
    if (rounded) {
        model_round_products(rounded);
        model_initialise(trainer_cpu(), rounded, &m->config, 1);
    }
    int32_t* tokens = (int32_t*)alloc_or_die((size_t)2 * B * T, sizeof(int32_t), "tokens");
    for (int i = 0; i < 2 * B * T; i++) { tokens[i] = (int32_t)((unsigned)i * 2654435761u % 8192u); }
    double steps[MAX_REPEATS], bf16[MAX_REPEATS], library[3 * MAX_REPEATS], blocks[3 * MAX_REPEATS], loss = 0,
                                                                                                     bf16_loss = 0;
    for (int r = -1; r < repeats; r++) {  // the first round touches memory for the first time
        for (int i = 0; i < 3 && r >= 0; i++) {
            library[3 * r + i] = product_rate(matrices, false);
            blocks[3 * r + i] = product_rate(matrices, true);
        }
        double seconds = step_seconds(m, tokens, B, T, r + 2, &loss),
               seconds_bf16 = rounded ? step_seconds(rounded, tokens, B, T, r + 2, &bf16_loss) : 0;
        if (r >= 0) {
            steps[r] = seconds;
            bf16[r] = seconds_bf16;
        }
    }
    double step = median(steps, repeats), sgemm = median(library, 3 * repeats), own = median(blocks, 3 * repeats);
    double flops = model_flops_per_token(&c, T) * B * T;
    printf("{\"attention\": \"%s\", \"T\": %d, \"chunk\": %d, \"step_s\": %.4f, \"best_step_s\": %.4f, "
           "\"model_gflops\": %.1f, \"sgemm_gflops\": %.1f, "
           "\"gemm_gflops\": %.1f, \"ratio\": %.3f, \"best_ratio\": %.3f, \"loss\": %.4f",
           argv[1], T, m->chunk, step, steps[0], flops / step * 1e-9, sgemm * 1e-9, own * 1e-9, flops / step / sgemm,
           flops / steps[0] / library[3 * repeats - 1], loss);
    if (rounded) {
        double bf16_step = median(bf16, repeats);
        printf(", \"bf16_step_s\": %.4f, \"best_bf16_step_s\": %.4f, \"bf16_loss\": %.4f", bf16_step, bf16[0],
               bf16_loss);
        model_free(rounded);
    }
    printf("}\n");
    model_free(m);
    free(matrices);
    free(tokens);
    return 0;
}
