// ops_reference.h: the layers of train_mta.c in double, for test_ops.cu to compare with. A table of functions, because
// the two trainers cannot meet in one translation unit: they have the same names (Model, Tile, attention_forward), and
// train_mta.c is C whose vectors nvcc does not read. Where a function of the table has the signature of its namesake it
// is the namesake; steps of attention, which in train_mta.c work on tiles, work here on whole maps, and attention's
// heads lie as in train_mta.cu: (B,NH,T,HS).
#ifndef OPS_REFERENCE_H
#define OPS_REFERENCE_H

#include "../../mta/config.h"
#include "../../mta/trainer.h"

// A map is (B*NH,T,T): of each head a row of scores for each query. As in train_mta.cu, ch_* are heads of a mixing
// group, and all weights may be NULL.
typedef struct {
    int B, T, NH, NKV, HS, cq, ck, ch_pre, ch_post;
    const double *conv_pre, *conv_post;  // (NH,cq,ck)
    const double *mix_pre, *mix_post;    // (NH/ch,ch,ch)
} RefAttention;

typedef struct {
    void (*gemm)(bool ta, bool tb, int M, int N, int K, double alpha, const double* A, size_t lda, const double* B,
                 size_t ldb, double beta, double* out, size_t ldo);
    void (*matmul_forward)(double* out, const double* inp, const double* weight, int N, int C, int OC);
    void (*matmul_backward)(double* dinp, double* dweight, const double* dout, const double* inp, const double* weight,
                            int N, int C, int OC, bool add_dinp);
    void (*embedding_forward)(double* out, const int32_t* tokens, const double* weight, int N, int C);
    void (*embedding_backward)(double* dweight, const double* dout, const int32_t* tokens, int N, int C);
    void (*rmsnorm_forward)(double* out, double* rstd, const double* inp, const double* weight, int N, int C,
                            double eps, double scale);
    void (*rmsnorm_backward)(double* dinp, double* dweight, const double* dout, const double* inp, const double* weight,
                             const double* rstd, int N, int C, double scale, bool add_dinp);
    void (*rope_table)(double* cosine, double* sine, const Config* config, int T);
    void (*rope_forward)(double* x, const double* cosine, const double* sine, int B, int T, int heads, int HS,
                         int direction);  // x (B,T,heads,HS)

    // Maps out and inp; rows lo <= i < hi, of which those outside the sequence are left out, keys j < nk are written;
    // inp is read left of the diagonal only.
    void (*scores_forward)(double* out, const double* q, const double* k, const RefAttention* a, int lo, int hi,
                           int nk);
    void (*scores_backward)(double* dq, double* dk, const double* dout, const double* q, const double* k,
                            const RefAttention* a, int lo, int hi);
    void (*kq_conv_forward)(double* out, const double* inp, const double* weight, const RefAttention* a, int lo, int hi,
                            int nk);
    void (*kq_conv_backward_input)(double* dinp, const double* dout, const double* weight, const RefAttention* a,
                                   int lo, int hi, int nk);
    void (*kq_conv_backward_weight)(double* dweight, const double* dout, const double* inp, const RefAttention* a,
                                    int lo, int hi);
    void (*head_mix_forward)(double* out, const double* inp, const double* weight, bool transpose, int ch,
                             const RefAttention* a, int lo, int hi, int nk);
    void (*head_mix_backward_weight)(double* dweight, const double* dout, const double* inp, int ch,
                                     const RefAttention* a, int lo, int hi);
    void (*softmax_forward)(double* out, const double* inp, double* stats, const RefAttention* a, int lo, int own,
                            int hi, int nk);
    void (*softmax_backward)(double* dinp, const double* dout, const double* att, const RefAttention* a, int lo, int hi,
                             int nk);
    void (*values_forward)(double* out, const double* att, const double* v, const RefAttention* a, int lo, int hi);
    void (*values_backward_att)(double* datt, const double* dout, const double* v, const RefAttention* a, int lo,
                                int hi, int nk);
    void (*values_backward_v)(double* dv, const double* att, const double* dout, const RefAttention* a, int lo, int hi);

    // The whole: out, dout, q, dq (B,NH,T,HS), k, v, dk, dv (B,NKV,T,HS), stats (B,NH,T,2); the weights' gradients,
    // where there is the weight, are set
    void (*attention_forward)(double* out, double* stats, const double* q, const double* k, const double* v,
                              const RefAttention* a);
    void (*attention_backward)(double* dq, double* dk, double* dv, double* dconv_pre, double* dconv_post,
                               double* dmix_pre, double* dmix_post, const double* dout, const double* q,
                               const double* k, const double* v, double* stats, const RefAttention* a);

    void (*head_gate_forward)(double* out, const double* inp, const double* weight, const double* bias, int N, int HS);
    void (*head_gate_backward)(double* dinp, double* dweight, double* dbias, const double* dout, const double* inp,
                               const double* weight, const double* bias, int N, int HS);
    void (*diff_lambda_forward)(double* mix, const double* lambda, double lambda_init, int NH,
                                int HS);  // lambda (4,HS): q1, k1, q2, k2
    void (*diff_lambda_backward)(double* dlambda, const double* dmix, const double* lambda, int NH, int HS);
    void (*swiglu_forward)(double* out, const double* gate, const double* up, size_t n);
    void (*swiglu_backward)(double* dgate, double* dup, double* act, const double* dout, const double* gate,
                            const double* up, size_t n);
    void (*crossentropy_forward_backward)(double* losses, unsigned char* wrong, double* logits, const int32_t* targets,
                                          int N, int V, double dloss, bool gradient);
    double (*update)(double* weights, double* m, double* v, const double* grads, size_t n, const AdamW* hyper,
                     long step);  // returns the norm of the gradients
} Reference;

#ifdef __cplusplus
extern "C"
#endif
    const Reference*
    reference(void);

#endif
