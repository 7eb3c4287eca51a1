// ops_reference.c: train_mta.c in double behind the table of ops_reference.h.
#define MTA_REAL double
#define MTA_LIBRARY
#include "../../train_mta.c"
#include "ops_reference.h"

static double* doubles(size_t n) { return (double*)alloc_or_die(n, sizeof(double), "the reference's arrays"); }

static void rmsnorm_backward_alone(double* dinp, double* dweight, const double* dout, const double* inp,
                                   const double* weight, const double* rstd, int N, int C, double scale,
                                   bool add_dinp) {
    double* parts = doubles((size_t)NORM_PARTS * (size_t)C);
    rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd, N, C, scale, parts, add_dinp);
    free(parts);
}
static void head_gate_backward_alone(double* dinp, double* dweight, double* dbias, const double* dout,
                                     const double* inp, const double* weight, const double* bias, int N, int HS) {
    double* parts = doubles((size_t)NORM_PARTS * (size_t)(HS + 1));
    head_gate_backward(dinp, dweight, dbias, dout, inp, weight, bias, N, HS, parts);
    free(parts);
}
static void diff_lambda_forward_alone(double* mix, const double* x, double lambda_init, int NH, int HS) {
    Lambda w = {x, x + HS, x + 2 * HS, x + 3 * HS};
    diff_lambda_forward(mix, &w, lambda_init, NH, HS);
}
static void diff_lambda_backward_alone(double* dx, const double* dmix, const double* x, int NH, int HS) {
    Lambda w = {x, x + HS, x + 2 * HS, x + 3 * HS};
    diff_lambda_backward(dx, dx + HS, dx + 2 * HS, dx + 3 * HS, dmix, &w, NH, HS);
}
// AdamW of all n elements, MODEL.md eq. 15: train_mta.c leaves its update out in double
static double update_alone(double* weights, double* m, double* v, const double* grads, size_t n, const AdamW* h,
                           long step) {
    double squares = 0;
    for (size_t i = 0; i < n; i++) { squares += grads[i] * grads[i]; }
    double norm = sqrt(squares), clip = h->grad_clip > 0 && norm > h->grad_clip ? h->grad_clip / norm : 1;
    for (size_t i = 0; i < n; i++) {
        m[i] = h->beta1 * m[i] + (1 - h->beta1) * clip * grads[i];
        v[i] = h->beta2 * v[i] + (1 - h->beta2) * clip * clip * grads[i] * grads[i];
        double m_hat = m[i] / (1 - pow(h->beta1, (double)step)), v_hat = v[i] / (1 - pow(h->beta2, (double)step));
        weights[i] -= h->lr * (m_hat / (sqrt(v_hat) + h->eps) + h->weight_decay * weights[i]);
    }
    return norm;
}

// ---- steps of attention: a map becomes a tile that has all rows of a sequence, and halos above and below it

static Attention shape_of(const RefAttention* r, int chunk) {
    Attention a = {r->B,       r->T,        r->NH,        r->NKV,     r->HS,       r->cq, r->ck, r->ch_pre,
                   r->ch_post, r->conv_pre, r->conv_post, r->mix_pre, r->mix_post, chunk, false, NULL};
    return a;
}
static Tile tile_new(const Attention* a) {
    int halo = 2 * MAX_KERNEL;
    Tile t = {NULL, -halo, a->T + 2 * halo, tile_stride(a->T)};
    t.data = doubles((size_t)a->NH * (size_t)t.rows * (size_t)t.ld);  // zeros
    return t;
}
static double* map_row(double* map, const Attention* a, int b, int h, int i) {
    return map + (((size_t)b * a->NH + h) * a->T + i) * a->T;
}
// Of sequence b; only what lies left of the diagonal
static Tile tile_from(const double* map, const Attention* a, int b) {
    Tile t = tile_new(a);
    for (int h = 0; h < a->NH; h++) {
        for (int i = 0; i < a->T; i++) {
            memcpy(tile_row(&t, h, i), map_row((double*)(uintptr_t)map, a, b, h, i), (size_t)(i + 1) * sizeof(double));
        }
    }
    return t;
}
static void tile_to(double* map, Tile t, const Attention* a, int b, int lo, int hi, int nk) {
    for (int h = 0; h < a->NH; h++) {
        for (int i = max_int(lo, 0); i < min_int(hi, a->T); i++) {
            memcpy(map_row(map, a, b, h, i), tile_row(&t, h, i), (size_t)nk * sizeof(double));
        }
    }
    free(t.data);
}
// (T,heads,HS) from (heads,T,HS), and back
static double* rows_of(const double* x, int heads, int T, int HS) {
    double* rows = doubles((size_t)heads * (size_t)T * (size_t)HS);
    for (int h = 0; h < heads; h++) {
        for (int t = 0; t < T; t++) {
            memcpy(rows + ((size_t)t * heads + h) * HS, x + ((size_t)h * T + t) * HS, (size_t)HS * sizeof(double));
        }
    }
    return rows;
}
static void heads_of(double* x, double* rows, int heads, int T, int HS) {
    for (int h = 0; h < heads; h++) {
        for (int t = 0; t < T; t++) {
            memcpy(x + ((size_t)h * T + t) * HS, rows + ((size_t)t * heads + h) * HS, (size_t)HS * sizeof(double));
        }
    }
    free(rows);
}

static void scores_forward_map(double* out, const double* q, const double* k, const RefAttention* r, int lo, int hi,
                               int nk) {
    Attention a = shape_of(r, r->T);
    size_t n = (size_t)a.NH * a.T * a.HS;
    for (int b = 0; b < a.B; b++) {
        Tile t = tile_new(&a);
        double *qr = rows_of(q + b * n, a.NH, a.T, a.HS), *kr = rows_of(k + b * n, a.NH, a.T, a.HS);
        scores_forward(&t, qr, kr, &a, 0, a.NH, lo, hi, nk);
        tile_to(out, t, &a, b, lo, hi, nk);
        free(qr);
        free(kr);
    }
}
static void scores_backward_map(double* dq, double* dk, const double* dout, const double* q, const double* k,
                                const RefAttention* r, int lo, int hi) {
    Attention a = shape_of(r, r->T);
    size_t n = (size_t)a.NH * a.T * a.HS;
    for (int b = 0; b < a.B; b++) {
        Tile d = tile_from(dout, &a, b);
        double *qr = rows_of(q + b * n, a.NH, a.T, a.HS), *kr = rows_of(k + b * n, a.NH, a.T, a.HS);
        double *dqr = rows_of(dq + b * n, a.NH, a.T, a.HS), *dkr = rows_of(dk + b * n, a.NH, a.T, a.HS);
        scores_backward(dqr, dkr, &d, qr, kr, &a, 0, a.NH, lo, hi);
        heads_of(dq + b * n, dqr, a.NH, a.T, a.HS);
        heads_of(dk + b * n, dkr, a.NH, a.T, a.HS);
        free(d.data);
        free(qr);
        free(kr);
    }
}
static void kq_conv_forward_map(double* out, const double* inp, const double* weight, const RefAttention* r, int lo,
                                int hi, int nk) {
    Attention a = shape_of(r, r->T);
    for (int b = 0; b < a.B; b++) {
        Tile x = tile_from(inp, &a, b), y = tile_new(&a);
        kq_conv_forward(&y, &x, weight, &a, 0, a.NH, lo, hi, nk);
        tile_to(out, y, &a, b, lo, hi, nk);
        free(x.data);
    }
}
static void kq_conv_backward_input_map(double* dinp, const double* dout, const double* weight, const RefAttention* r,
                                       int lo, int hi, int nk) {
    Attention a = shape_of(r, r->T);
    for (int b = 0; b < a.B; b++) {
        Tile d = tile_from(dout, &a, b), y = tile_new(&a);
        kq_conv_backward_input(&y, &d, weight, &a, 0, a.NH, lo, hi, nk);
        tile_to(dinp, y, &a, b, lo, hi, nk);
        free(d.data);
    }
}
static void kq_conv_backward_weight_map(double* dweight, const double* dout, const double* inp, const RefAttention* r,
                                        int lo, int hi) {
    Attention a = shape_of(r, r->T);
    size_t n = (size_t)a.NH * (size_t)a.cq * (size_t)a.ck;
    double* one = doubles(n);
    for (int b = 0; b < a.B; b++) {
        Tile d = tile_from(dout, &a, b), x = tile_from(inp, &a, b);
        kq_conv_backward_weight(one, &d, &x, &a, a.NH, lo, hi, hi);
        for (size_t i = 0; i < n; i++) { dweight[i] += one[i]; }
        free(d.data);
        free(x.data);
    }
    free(one);
}
static void head_mix_forward_map(double* out, const double* inp, const double* weight, bool transpose, int ch,
                                 const RefAttention* r, int lo, int hi, int nk) {
    Attention a = shape_of(r, r->T);
    for (int b = 0; b < a.B; b++) {
        Tile x = tile_from(inp, &a, b), y = tile_new(&a);
        head_mix_forward(&y, &x, weight, transpose, ch, &a, a.NH, lo, hi, nk);
        tile_to(out, y, &a, b, lo, hi, nk);
        free(x.data);
    }
}
static void head_mix_backward_weight_map(double* dweight, const double* dout, const double* inp, int ch,
                                         const RefAttention* r, int lo, int hi) {
    Attention a = shape_of(r, r->T);
    size_t n = (size_t)a.NH * (size_t)ch, rows = (size_t)(hi - lo);
    double* each = doubles(rows * n);
    for (int b = 0; b < a.B; b++) {
        Tile d = tile_from(dout, &a, b), x = tile_from(inp, &a, b);
        head_mix_backward_weight(each, &d, &x, ch, &a, a.NH, lo, hi);
        for (size_t i = 0; i < rows * n; i++) { dweight[i % n] += each[i]; }
        free(d.data);
        free(x.data);
    }
    free(each);
}
static void softmax_forward_map(double* out, const double* inp, double* stats, const RefAttention* r, int lo, int own,
                                int hi, int nk) {
    Attention a = shape_of(r, r->T);
    for (int b = 0; b < a.B; b++) {
        Tile x = tile_from(inp, &a, b);
        softmax_forward(&x, &x, stats + (size_t)b * a.NH * a.T * 2, &a, 0, a.NH, lo, own, hi, nk);
        tile_to(out, x, &a, b, lo, hi, nk);
    }
}
static void softmax_backward_map(double* dinp, const double* dout, const double* att, const RefAttention* r, int lo,
                                 int hi, int nk) {
    Attention a = shape_of(r, r->T);
    for (int b = 0; b < a.B; b++) {
        Tile d = tile_from(dout, &a, b), p = tile_from(att, &a, b);
        softmax_backward(&d, &d, &p, &a, a.NH, lo, hi, nk);
        tile_to(dinp, d, &a, b, lo, hi, nk);
        free(p.data);
    }
}
static void values_forward_map(double* out, const double* att, const double* v, const RefAttention* r, int lo, int hi) {
    Attention a = shape_of(r, r->T);
    size_t n = (size_t)a.NH * a.T * a.HS;
    for (int b = 0; b < a.B; b++) {
        Tile p = tile_from(att, &a, b);
        double *rows = rows_of(out + b * n, a.NH, a.T, a.HS), *vr = rows_of(v + b * n, a.NH, a.T, a.HS);
        values_forward(rows, &p, vr, &a, 0, a.NH, lo, hi);
        heads_of(out + b * n, rows, a.NH, a.T, a.HS);
        free(p.data);
        free(vr);
    }
}
static void values_backward_att_map(double* datt, const double* dout, const double* v, const RefAttention* r, int lo,
                                    int hi, int nk) {
    Attention a = shape_of(r, r->T);
    size_t n = (size_t)a.NH * a.T * a.HS;
    for (int b = 0; b < a.B; b++) {
        Tile d = tile_new(&a);
        double *rows = rows_of(dout + b * n, a.NH, a.T, a.HS), *vr = rows_of(v + b * n, a.NH, a.T, a.HS);
        values_backward_att(&d, rows, vr, &a, 0, a.NH, lo, hi, nk);
        tile_to(datt, d, &a, b, lo, hi, nk);
        free(rows);
        free(vr);
    }
}
static void values_backward_v_map(double* dv, const double* att, const double* dout, const RefAttention* r, int lo,
                                  int hi) {
    Attention a = shape_of(r, r->T);
    size_t n = (size_t)a.NH * a.T * a.HS;
    for (int b = 0; b < a.B; b++) {
        Tile p = tile_from(att, &a, b);
        double *rows = rows_of(dv + b * n, a.NH, a.T, a.HS), *dr = rows_of(dout + b * n, a.NH, a.T, a.HS);
        values_backward_v(rows, &p, dr, &a, 0, a.NH, lo, hi);
        heads_of(dv + b * n, rows, a.NH, a.T, a.HS);
        free(p.data);
        free(dr);
    }
}

// ---- the whole

// (B,T,heads,HS) from (B,heads,T,HS), and back
static double* batch_rows(const double* x, int B, int heads, int T, int HS) {
    size_t n = (size_t)heads * (size_t)T * (size_t)HS;
    double* rows = doubles((size_t)B * n);
    for (int b = 0; b < B; b++) {
        double* one = rows_of(x + b * n, heads, T, HS);
        memcpy(rows + b * n, one, n * sizeof(double));
        free(one);
    }
    return rows;
}
static void batch_heads(double* x, double* rows, int B, int heads, int T, int HS) {
    size_t n = (size_t)heads * (size_t)T * (size_t)HS;
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < heads; h++) {
            for (int t = 0; t < T; t++) {
                memcpy(x + b * n + ((size_t)h * T + t) * HS, rows + b * n + ((size_t)t * heads + h) * HS,
                       (size_t)HS * sizeof(double));
            }
        }
    }
    free(rows);
}
static double* attention_scratch(const Attention* a) {
    return doubles((size_t)omp_get_max_threads() * ATTENTION_TILES * attention_tile_size(a));
}
static Attention chunked_shape(const RefAttention* r) {
    Attention a = shape_of(r, 1);
    a.chunk = attention_chunk(a.T, attention_group(&a));
    return a;
}
static void attention_forward_alone(double* out, double* stats, const double* q, const double* k, const double* v,
                                    const RefAttention* r) {
    Attention a = chunked_shape(r);
    double *scratch = attention_scratch(&a), *rows = batch_rows(q, a.B, a.NH, a.T, a.HS);
    double *qr = batch_rows(q, a.B, a.NH, a.T, a.HS), *kr = batch_rows(k, a.B, a.NKV, a.T, a.HS),
           *vr = batch_rows(v, a.B, a.NKV, a.T, a.HS);
    attention_forward(rows, stats, qr, kr, vr, &a, scratch);
    batch_heads(out, rows, a.B, a.NH, a.T, a.HS);
    double* const all[] = {scratch, qr, kr, vr};
    for (int i = 0; i < 4; i++) { free(all[i]); }
}
static void attention_backward_alone(double* dq, double* dk, double* dv, double* dconv_pre, double* dconv_post,
                                     double* dmix_pre, double* dmix_post, const double* dout, const double* q,
                                     const double* k, const double* v, double* stats, const RefAttention* r) {
    Attention a = chunked_shape(r);
    size_t conv = (size_t)a.NH * a.cq * a.ck, pre = (size_t)a.NH * a.ch_pre, post = (size_t)a.NH * a.ch_post;
    AttentionSums sums;
    double *scratch = attention_scratch(&a), *sum = doubles(carve_sums(&sums, &a, NULL) + 1);
    carve_sums(&sums, &a, sum);
    double *dqr = batch_rows(q, a.B, a.NH, a.T, a.HS), *dkr = batch_rows(k, a.B, a.NKV, a.T, a.HS),
           *dvr = batch_rows(v, a.B, a.NKV, a.T, a.HS);
    double *qr = batch_rows(q, a.B, a.NH, a.T, a.HS), *kr = batch_rows(k, a.B, a.NKV, a.T, a.HS),
           *vr = batch_rows(v, a.B, a.NKV, a.T, a.HS);
    double* dr = batch_rows(dout, a.B, a.NH, a.T, a.HS);
    attention_backward(dqr, dkr, dvr, &sums, dr, qr, kr, vr, stats, &a, scratch);
    batch_heads(dq, dqr, a.B, a.NH, a.T, a.HS);
    batch_heads(dk, dkr, a.B, a.NKV, a.T, a.HS);
    batch_heads(dv, dvr, a.B, a.NKV, a.T, a.HS);
    double* const to[] = {dconv_pre, dconv_post, dmix_pre, dmix_post};
    const double* const from[] = {sums.conv_pre, sums.conv_post, sums.mix_pre, sums.mix_post};
    const double* const weights[] = {a.conv_pre, a.conv_post, a.mix_pre, a.mix_post};
    const size_t n[] = {conv, conv, pre, post};
    for (int i = 0; i < 4; i++) {
        if (!weights[i]) { continue; }
        memset(to[i], 0, n[i] * sizeof(double));
        attention_sums_add(to[i], from[i], a.B, sums.n, n[i]);
    }
    double* const all[] = {scratch, sum, qr, kr, vr, dr};
    for (int i = 0; i < 6; i++) { free(all[i]); }
}

static void gemm_alone(bool ta, bool tb, int M, int N, int K, double alpha, const double* A, size_t lda,
                       const double* B, size_t ldb, double beta, double* out, size_t ldo) {
    gemm(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, out, ldo, NULL);
}
static void matmul_forward_alone(double* out, const double* inp, const double* weight, int N, int C, int OC) {
    matmul_forward(out, inp, weight, N, C, OC, NULL);
}
static void matmul_backward_alone(double* dinp, double* dweight, const double* dout, const double* inp,
                                  const double* weight, int N, int C, int OC, bool add_dinp) {
    matmul_backward(dinp, dweight, dout, inp, weight, N, C, OC, add_dinp, NULL);
}

const Reference* reference(void) {
    static const Reference table = {gemm_alone,
                                    matmul_forward_alone,
                                    matmul_backward_alone,
                                    embedding_forward,
                                    embedding_backward,
                                    rmsnorm_forward,
                                    rmsnorm_backward_alone,
                                    rope_table,
                                    rope_forward,
                                    scores_forward_map,
                                    scores_backward_map,
                                    kq_conv_forward_map,
                                    kq_conv_backward_input_map,
                                    kq_conv_backward_weight_map,
                                    head_mix_forward_map,
                                    head_mix_backward_weight_map,
                                    softmax_forward_map,
                                    softmax_backward_map,
                                    values_forward_map,
                                    values_backward_att_map,
                                    values_backward_v_map,
                                    attention_forward_alone,
                                    attention_backward_alone,
                                    head_gate_forward,
                                    head_gate_backward_alone,
                                    diff_lambda_forward_alone,
                                    diff_lambda_backward_alone,
                                    swiglu_forward,
                                    swiglu_backward,
                                    crossentropy_forward_backward,
                                    update_alone};
    return &table;
}
