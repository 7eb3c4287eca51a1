// cpu_step.c: seconds of one optimizer step of train_mta.c, and of a 2048^3 matrix product, in one run on one machine.
// Called by cpu_step.sh, which says what the figures mean. Prints one line of JSON.
//   cpu_step ATTENTION [T] [REPEATS] [CHUNK]
#define MTA_LIBRARY
#include "../../train_mta.c"

// Best of several: the machine may be busy with something else for a while.
static double gemm_rate(int n, int repeats) {
    float* a = (float*)alloc_or_die((size_t)3 * n * n, sizeof(float), "matrices");
    float *b = a + (size_t)n * n, *c = b + (size_t)n * n;
    double best = 0;
    for (int i = 0; i < 2 * n * n; i++) { a[i] = (float)(i % 97) * 0.01f; }
    for (int r = 0; r < repeats; r++) {
        double t = seconds_now();
#ifdef MTA_CBLAS
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, n, n, 1, a, n, b, n, 0, c, n);
#else
        gemm(false, false, n, n, n, 1, a, (size_t)n, b, (size_t)n, 0, c, (size_t)n);
#endif
        best = fmax(best, 2.0 * n * n * n / (seconds_now() - t));
    }
    free(a);
    return best;
}

int main(int argc, char** argv) {
    Config c;
    Error e = {{0}};
    int B = 2, T = argc > 2 ? atoi(argv[2]) : 1024, repeats = argc > 3 ? atoi(argv[3]) : 5, chunk = argc > 4 ? atoi(argv[4]) : 0;
    config_from_preset(&c, preset_find("11m"));
    c.vocab_size = 8192;
    if (argc < 2 || !config_set_attention(&c, argv[1], false, &e)) { die("usage: cpu_step ATTENTION [T] [REPEATS]: %s", e.text); }
    double sgemm = gemm_rate(2048, 5);
    blas_single_thread();
    double blocked = 0;
    {
        int n = 2048;
        float* a = (float*)alloc_or_die((size_t)3 * n * n, sizeof(float), "matrices");
        for (int i = 0; i < 2 * n * n; i++) { a[i] = (float)(i % 97) * 0.01f; }
        for (int r = 0; r < 5; r++) {
            double t = seconds_now();
            gemm(false, false, n, n, n, 1, a, (size_t)n, a + (size_t)n * n, (size_t)n, 0, a + 2 * (size_t)n * n, (size_t)n);
            blocked = fmax(blocked, 2.0 * n * n * n / (seconds_now() - t));
        }
        free(a);
    }
    Model* m = model_create(&c, B, T, chunk);
    model_initialise(m, 1);
    int32_t* tokens = (int32_t*)alloc_or_die((size_t)2 * B * T, sizeof(int32_t), "tokens");
    for (int i = 0; i < 2 * B * T; i++) { tokens[i] = (int32_t)((unsigned)i * 2654435761u % 8192u); }
    double best = INFINITY, loss = 0;
    AdamW h = {1e-4, 0.9, 0.98, 1e-8, 0.05, 1.0};
    for (int r = 0; r < repeats + 1; r++) {
        double t = seconds_now();
        model_zero_gradients(m);
        model_forward(m, tokens, B, T);
        loss = model_loss(m, tokens + B * T, B * T, (real)(1.0 / (B * T)), true, NULL) / (B * T);
        model_backward(m, tokens, B, T);
        model_update(m, &h, r + 1);
        if (r) { best = fmin(best, seconds_now() - t); }  // the first step touches memory for the first time
    }
    double flops = model_flops_per_token(&c, T) * B * T;
    printf("{\"attention\": \"%s\", \"T\": %d, \"chunk\": %d, \"step_s\": %.4f, \"model_gflops\": %.1f, \"sgemm_gflops\": %.1f, \"gemm_gflops\": %.1f, \"ratio\": %.3f, \"loss\": %.4f}\n", argv[1], T, m->chunk,
           best, flops / best * 1e-9, sgemm * 1e-9, blocked * 1e-9, flops / best / sgemm, loss);
    return 0;
}
