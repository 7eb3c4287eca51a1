// infer_step.c: tokens of infer_mta.c and what this machine can do at best, in turns in one process, so that neither a
// burst nor a lull of the machine decides a ratio. Called by infer_speed.sh, which says what the figures mean.
//   infer_step DIR WEIGHTS CACHE ROUNDS T [T ...]      WEIGHTS: stored, f32, bf16 or int8; CACHE: f32 or bf16; T rising
//
// Up to each T the prompt is processed in chunks of 512, sgemm products between them. Then ROUNDS times, in turns: one
// token as number T; the same with the convolutions taken out of the model (where it has any); two passes of reading
// the weights and the cached keys and values that this token reads, where they lie (memory is not all equally near:
// other memory was read a third faster or slower on a virtual machine), in the plain way and prefetched. The cache goes
// back by one position after each, so that all are token number T.
#define MTA_LIBRARY
#include "../../infer_mta.c"
#include "machine.c"

enum { SIDE = 2048, MAX_ROUNDS = 1000, PART = 512, MAX_SPANS = 1 << 16 };

static int compare_doubles(const void* a, const void* b) {
    return (*(const double*)a > *(const double*)b) - (*(const double*)a < *(const double*)b);
}

static double median(const double* x, int n) {
    double y[MAX_ROUNDS];
    memcpy(y, x, (size_t)n * sizeof *y);
    qsort(y, (size_t)n, sizeof *y, compare_doubles);
    return n % 2 ? y[n / 2] : (y[n / 2 - 1] + y[n / 2]) / 2;
}

static double least(const double* x, int n) {
    double y = x[0];
    for (int i = 1; i < n; i++) { y = fmin(y, x[i]); }
    return y;
}

// Seconds of token number T: into the cache, logits, the best id; the cache is then back at T - 1.
static double token_seconds(Session* session, int T) {
    double start = seconds_now();
    Rng rng = rng_make(1, 1);
    int32_t token = T % session->model.V;
    session->cache.T = T - 1;
    read_tokens(&session->model, &session->cache, &session->work, &token, 1, session->logits);
    next_token(session, &rng);
    session->cache.T = T - 1;
    return seconds_now() - start;
}

static int span_add(Span* spans, int n, const void* p, size_t bytes) {
    if (n == MAX_SPANS) { die("more than %d stretches of memory", MAX_SPANS); }
    spans[n] = (Span){p, bytes};
    return n + 1;
}

// The memory that token number T reads, into spans (MAX_SPANS); how many there are.
static int token_spans(const Session* session, int T, Span* spans) {
    const Model* m = &session->model;
    const Cache* c = &session->cache;
    size_t HS = (size_t)m->HS, width = c->half ? 2 : 4, cap = round_up((size_t)c->capacity, TILE);
    size_t HSP = round_up(HS, TILE), keys = (size_t)T;
    int n = span_add(spans, 0, m->head.data, m->head.bytes);
    for (int l = 0; l < m->c.num_hidden_layers; l++) {
        const Layer* y = &m->layers[l];
        const Matrix* const w[] = {&y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down};
        for (int i = 0; i < 7; i++) { n = span_add(spans, n, w[i]->data, w[i]->bytes); }
        for (size_t h = 0; h < (size_t)m->NKV; h++) {
            n = span_add(spans, n, c->k + ((size_t)l * c->k_layer + h * cap * HS) * width, keys * HS * width);
            for (size_t t = 0; t < HS; t += TILE) {
                n = span_add(spans, n, c->v + ((size_t)l * c->v_layer + h * cap * HSP + t * cap) * width,
                             keys * (HS - t < TILE ? HS - t : TILE) * width);
            }
        }
    }
    return n;
}

// Takes the convolutions out of all layers, or puts them back; says whether there are any.
static bool convolutions(Model* m, const float* (*kept)[2], bool out) {
    bool any = false;
    for (int l = 0; l < m->c.num_hidden_layers; l++) {
        Layer* y = &m->layers[l];
        if (out) {
            kept[l][0] = y->conv_pre;
            kept[l][1] = y->conv_post;
        }
        any = any || kept[l][0] || kept[l][1];
        y->conv_pre = out ? NULL : kept[l][0];
        y->conv_post = out ? NULL : kept[l][1];
    }
    return any;
}

// The prompt up to position T: tokens a second, and operations a second of products, scores and values over sgemm's.
static void prompt_to(Session* session, int T, float* matrices) {
    const Model* m = &session->model;
    double layers = m->c.num_hidden_layers, flops = 0, seconds = 0, sgemm[MAX_ROUNDS];
    double per_token = layers * (2.0 * m->C * (2.0 * m->NH + 2.0 * m->NKV) * m->HS + 6.0 * m->C * m->FF);
    int from = session->cache.T, n = 0;
    (void)matrices;
    while (session->cache.T < T) {
        int32_t tokens[PART];
        int part = T - session->cache.T < PART ? T - session->cache.T : PART;
        for (int i = 0; i < part; i++) { tokens[i] = (session->cache.T + i) * 31 % m->V; }
#ifdef MTA_CBLAS
        for (int i = 0; i < 3 && n < MAX_ROUNDS; i++) {
            sgemm[n++] = sgemm_pass(SIDE, matrices, matrices + SIDE * SIDE, matrices + 2 * SIDE * SIDE);
        }
        usleep(200000);  // its threads spin a while after a product
#endif
        double start = seconds_now();
        flops += part * per_token + 4.0 * layers * m->NH * m->HS * part * (session->cache.T + part / 2.0);
        forward(m, &session->cache, &session->work, tokens, part);
        seconds += seconds_now() - start;
    }
    printf("  prompt %d to %d: %.1f tokens/s, %.1f GFLOP/s", from, T, (T - from) / seconds, flops / seconds * 1e-9);
    if (n) {
        double rate = median(sgemm, n);
        printf("; sgemm %.1f GFLOP/s; ratio %.2f", rate * 1e-9, flops / seconds / rate);
    }
    printf("\n");
    fflush(stdout);
}

static void decode_at(Session* session, int T, int rounds) {
    const float* kept[MAX_LAYERS][2];
    static double with[MAX_ROUNDS], without[MAX_ROUNDS], read[2][MAX_ROUNDS], ratio[2][MAX_ROUNDS], extra[MAX_ROUNDS];
    static Span spans[MAX_SPANS];
    session->cache.T = T;
    size_t bytes = session->model.bytes_per_token + cache_bytes_read(session);
    int n_spans = token_spans(session, T, spans);
    bool convolves = convolutions(&session->model, kept, true);
    convolutions(&session->model, kept, false);
    token_seconds(session, T);
    for (int i = 0; i < rounds; i++) {
        with[i] = token_seconds(session, T);
        for (int k = 0; k < 2; k++) {
            read[k][i] = (double)bytes / read_pass(spans, n_spans, (Reading)k);
            ratio[k][i] = read[k][i] / with[i];
        }
        if (convolves) {
            convolutions(&session->model, kept, true);
            without[i] = token_seconds(session, T);
            convolutions(&session->model, kept, false);
            extra[i] = with[i] / without[i];
        }
    }
    double token = median(with, rounds);
    printf("  token %4d: %6.1f MB, median %6.2f ms %6.2f GB/s, best %6.2f ms", T, (double)bytes * 1e-6, token * 1e3,
           (double)bytes / token * 1e-9, least(with, rounds) * 1e3);
    for (int k = 0; k < 2; k++) {
        printf("; %s %6.2f GB/s, best %6.2f: of it %.3f, best %.3f", k ? "prefetched" : "reading",
               (double)bytes / median(read[k], rounds) * 1e-9, (double)bytes / least(read[k], rounds) * 1e-9,
               median(ratio[k], rounds), least(read[k], rounds) / least(with, rounds));
    }
    if (convolves) {
        printf("; without convolution %6.2f ms, best %6.2f: it adds %.1f%%, best %.1f%%", median(without, rounds) * 1e3,
               least(without, rounds) * 1e3, 100 * (median(extra, rounds) - 1),
               100 * (least(with, rounds) / least(without, rounds) - 1));
    }
    printf("\n");
    fflush(stdout);
}

int main(int argc, char** argv) {
    static Session session;
    int rounds = argc > 4 ? atoi(argv[4]) : 0, last = argc > 5 ? atoi(argv[argc - 1]) : 0;
    if (rounds < 1 || rounds > MAX_ROUNDS || last < 1) {
        die("usage: infer_step DIR WEIGHTS CACHE ROUNDS T [T ...], rounds up to %d", MAX_ROUNDS);
    }
    InferOptions o = infer_options_default();
    o.dir = argv[1];
    o.weights = argv[2];
    o.cache = argv[3];
    o.context = last;
    o.token_ids = "";
    o.quiet = true;
    o.temperature = 0;
    session_open(&session, &o);
    float* matrices = NULL;
#ifdef MTA_CBLAS
    matrices = sgemm_matrices(SIDE);
#endif
    for (int i = 5; i < argc; i++) {
        int T = atoi(argv[i]);
        if (T > last || T <= session.cache.T) { die("T: got %s, wanted rising numbers", argv[i]); }
        prompt_to(&session, T - 1, matrices);
        decode_at(&session, T, rounds);
    }
    return 0;
}
