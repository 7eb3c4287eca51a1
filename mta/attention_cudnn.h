// mta/attention_cudnn.h: plain causal attention by NVIDIA's cuDNN, forward and backward: what train_mta.cu calls with
// --attention-kernels cudnn for layers without operations on the scores before the softmax. These are the two functions
// at the end and what must be called around them; nothing else of the project knows cuDNN.
//
//   O = P V,  P = softmax of Q K^T * scale over the keys at or before the query, of each head and sequence
//
// Shapes, all row after row without gaps, the last size the fastest: Q, K (B,NH,T,HS), V, O (B,NH,T,VS), their
// gradients dQ, dK, dV, dO alike, all bf16 and at addresses that are multiples of 16; stats (B,NH,T), fp32: the
// natural logarithm of each row's sum of exp(score), the only thing that forward keeps for backward. There is no key
// or value head that several query heads share and no mask but the causal one: the trainer repeats shared heads, cuts
// all sequences to T tokens, and leaves targets that do not count to the loss; so cuDNN's padding masks, offsets and
// dropout are never used. HS and VS are multiples of 8, HS at most 128, VS at most 256; backward has engines for a VS
// above 128, which is that of pairs of heads above 64, on Hopper (sm_90) alone: cuDNN 9.19, dev/tests/test_cudnn.py.
//
// Deterministic by the form of the graph of backward: dQ is the product dS K itself. cuDNN then keeps dS in bf16 in its
// workspace, 2 B NH T^2 bytes, the one array of T x T in this project, which is why the trainer gives few sequences at
// a time. The form without it adds to dQ in fp32 by atomics; the library tells the two apart in no other way (9.19
// gives neither the note that an engine is not deterministic).
//
// cuDNN takes attention as a graph of the operations that it consists of; a plan is a kernel that some engine of the
// library has for the whole graph. Plans are built once for each shape and direction, a new shape's at its first call:
// make that call before a stream is captured. Built with -DMTA_CUDNN (make CUDNN=1) against the library's C headers
// alone, cuDNN 9.16 or later; without it attention_cudnn_open refuses. On the emulator dev/cuda_cpu/cudnn.h stands for
// the library: it computes the graphs of this file operation by operation, and so do all tests of the trainer.
// dev/tests/test_cudnn.py has the real library build their plans without a GPU. None has run them.
#ifndef MTA_ATTENTION_CUDNN_H
#define MTA_ATTENTION_CUDNN_H

#include "util.h"

typedef struct {
    int B, NH, T, HS, VS;  // sequences, heads, tokens; sizes of a head's queries and keys, and of its values
    float scale;
} AttentionShape;

// Bytes of workspace that one call needs at most. Known without cuDNN and without a GPU, for the plan of the run: a
// plan of cuDNN that wants more is passed over. dS padded to tiles of 128, the sums of rows, and 4 KiB, of which
// cuDNN 9.19 and 9.26 want 256 bytes on sm_90.
static inline size_t attention_cudnn_sums(const AttentionShape* s) {
    return ((size_t)s->B * s->NH * s->T * sizeof(float) + 255) / 256 * 256;
}
static inline size_t attention_cudnn_workspace(const AttentionShape* s) {
    size_t padded = ((size_t)s->T + 127) / 128 * 128, heads = (size_t)s->B * s->NH;
    return 2 * heads * padded * padded + attention_cudnn_sums(s) + 4096;
}

#if defined(CUDA_CPU) || defined(MTA_CUDNN)
#include <cudnn.h>
#include <math.h>

enum { HAS_CUDNN = 1, CUDNN_PLANS = 64, CUDNN_OPERATIONS = 32, CUDNN_DESCRIPTORS = 128, CUDNN_ENGINES = 16 };

// ---- the graph of operations

// Tensors that are in memory, by the numbers under which a call gives their addresses; what only flows from one
// operation to the next is numbered from CUDNN_VIRTUAL on.
enum {
    CUDNN_Q = 1,
    CUDNN_K,
    CUDNN_V,
    CUDNN_O,
    CUDNN_STATS,
    CUDNN_DO,
    CUDNN_DQ,
    CUDNN_DK,
    CUDNN_DV,
    CUDNN_SUMS,
    CUDNN_SCALE,
    CUDNN_MASKED,
    CUDNN_ONE,
    CUDNN_VIRTUAL
};

typedef cudnnBackendDescriptor_t CudnnPart;  // a tensor, an operation, how it is done, ...

// A graph under construction. The first call that fails is remembered, and all after it are left out.
typedef struct {
    AttentionShape s;
    CudnnPart made[CUDNN_DESCRIPTORS], operations[CUDNN_OPERATIONS];
    int n_made, n_operations;
    int64_t next;          // number of the next virtual tensor
    cudnnStatus_t status;  // of the first call that failed
    const char* what;      // that is being described, or was when it failed
} CudnnGraph;

static inline void cudnn_step(CudnnGraph* g, cudnnStatus_t status) {
    if (g->status == CUDNN_STATUS_SUCCESS) { g->status = status; }
}
// A descriptor of the graph's own, which goes with it; NULL if something has failed. `what` is for the message.
static inline CudnnPart cudnn_make(CudnnGraph* g, cudnnBackendDescriptorType_t type, const char* what) {
    CudnnPart d = NULL;
    if (g->status != CUDNN_STATUS_SUCCESS) { return NULL; }
    assert(g->n_made < CUDNN_DESCRIPTORS);
    g->what = what;
    cudnn_step(g, cudnnBackendCreateDescriptor(type, &d));
    if (d) { g->made[g->n_made++] = d; }
    return d;
}
static inline void cudnn_set(CudnnGraph* g, CudnnPart d, cudnnBackendAttributeName_t name,
                             cudnnBackendAttributeType_t type, int64_t n, const void* values) {
    if (g->status == CUDNN_STATUS_SUCCESS) { cudnn_step(g, cudnnBackendSetAttribute(d, name, type, n, values)); }
}
static inline void cudnn_set_descriptor(CudnnGraph* g, CudnnPart d, cudnnBackendAttributeName_t name, CudnnPart value) {
    cudnn_set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}
static inline void cudnn_finish(CudnnGraph* g, CudnnPart d) {
    if (g->status == CUDNN_STATUS_SUCCESS) { cudnn_step(g, cudnnBackendFinalize(d)); }
}
static inline void cudnn_graph_free(CudnnGraph* g) {
    while (g->n_made > 0) { cudnnBackendDestroyDescriptor(g->made[--g->n_made]); }
}

// Tensor `number` of (B,NH,rows,columns); `across`: memory has the columns' index as the slower one, as (columns,rows).
// number 0: a virtual one.
static inline CudnnPart cudnn_tensor(CudnnGraph* g, int64_t number, cudnnDataType_t type, int rows, int columns,
                                     bool across) {
    const int64_t size = (int64_t)rows * columns, one[4] = {1, 1, 1, 1};
    const int64_t sizes[4] = {g->s.B, g->s.NH, rows, columns};
    const int64_t steps[4] = {g->s.NH * size, size, across ? 1 : columns, across ? rows : 1};
    const bool is_virtual = number == 0, value = number >= CUDNN_SCALE && number < CUDNN_VIRTUAL;  // a single one
    const int64_t aligned = type == CUDNN_DATA_BFLOAT16 ? 16 : 4;
    CudnnPart d = cudnn_make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR, "a tensor");
    if (is_virtual) { number = g->next++; }
    cudnn_set(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    cudnn_set(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, value ? one : sizes);
    cudnn_set(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, value ? one : steps);
    cudnn_set(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &number);
    cudnn_set(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &aligned);
    cudnn_set(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
    cudnn_set(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &value);
    cudnn_finish(g, d);
    return d;
}
static inline CudnnPart cudnn_value(CudnnGraph* g, int64_t number) {
    return cudnn_tensor(g, number, CUDNN_DATA_FLOAT, 1, 1, false);
}
static inline CudnnPart cudnn_scores(CudnnGraph* g, cudnnDataType_t type) {  // (T,T), virtual
    return cudnn_tensor(g, 0, type, g->s.T, g->s.T, false);
}
static inline CudnnPart cudnn_rows(CudnnGraph* g, int64_t number) {  // one number of each row
    return cudnn_tensor(g, number, CUDNN_DATA_FLOAT, g->s.T, 1, false);
}

// Makes the operation the graph's next.
static inline void cudnn_add(CudnnGraph* g, CudnnPart operation) {
    cudnn_finish(g, operation);
    if (g->status != CUDNN_STATUS_SUCCESS) { return; }
    assert(g->n_operations < CUDNN_OPERATIONS);
    g->operations[g->n_operations++] = operation;
}

// y = mode(x, b), b NULL where mode has one operand; with `mask` y = mask ? x : b. axis: of CUDNN_POINTWISE_GEN_INDEX.
static inline CudnnPart cudnn_pointwise_as(CudnnGraph* g, cudnnPointwiseMode_t mode, cudnnDataType_t compute,
                                           CudnnPart y, CudnnPart x, CudnnPart b, CudnnPart mask, int64_t axis) {
    CudnnPart how = cudnn_make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR, "an operation on single elements");
    cudnn_set(g, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    cudnn_set(g, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    if (mode == CUDNN_POINTWISE_GEN_INDEX) { cudnn_set(g, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis); }
    cudnn_finish(g, how);

    CudnnPart d = cudnn_make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, "an operation on single elements");
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    if (b) { cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b); }
    if (mask) { cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, mask); }
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    cudnn_add(g, d);
    return y;
}
static inline CudnnPart cudnn_pointwise(CudnnGraph* g, cudnnPointwiseMode_t mode, CudnnPart y, CudnnPart x,
                                        CudnnPart b) {
    return cudnn_pointwise_as(g, mode, CUDNN_DATA_FLOAT, y, x, b, NULL, 0);
}
// c = a b, of each head
static inline CudnnPart cudnn_product(CudnnGraph* g, CudnnPart c, CudnnPart a, CudnnPart b) {
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    CudnnPart how = cudnn_make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR, "a matrix product");
    cudnn_set(g, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    cudnn_finish(g, how);

    CudnnPart d = cudnn_make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, "a matrix product");
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_DESC, how);
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
    cudnn_add(g, d);
    return c;
}
// The sum or the maximum of each row of x
static inline CudnnPart cudnn_reduce(CudnnGraph* g, cudnnReduceTensorOp_t reduction, CudnnPart x) {
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    CudnnPart y = cudnn_rows(g, 0), how = cudnn_make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR, "a sum of rows");
    cudnn_set(g, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &reduction);
    cudnn_set(g, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    cudnn_finish(g, how);

    CudnnPart d = cudnn_make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, "a sum of rows");
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_DESC, how);
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
    cudnn_add(g, d);
    return y;
}
// y: x read across, rows as columns
static inline CudnnPart cudnn_across(CudnnGraph* g, CudnnPart y, CudnnPart x) {
    CudnnPart d = cudnn_make(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, "a transposition");
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
    cudnn_set_descriptor(g, d, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
    cudnn_add(g, d);
    return y;
}
// x where the key is at or before the query, minus infinity elsewhere
static inline CudnnPart cudnn_causal(CudnnGraph* g, CudnnPart x) {
    CudnnPart query = cudnn_scores(g, CUDNN_DATA_INT32), key = cudnn_scores(g, CUDNN_DATA_INT32),
              mask = cudnn_scores(g, CUDNN_DATA_BOOLEAN);
    cudnn_pointwise_as(g, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_INT32, query, x, NULL, NULL, 2);
    cudnn_pointwise_as(g, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_INT32, key, x, NULL, NULL, 3);
    cudnn_pointwise_as(g, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, mask, query, key, NULL, 0);
    return cudnn_pointwise_as(g, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, cudnn_scores(g, CUDNN_DATA_FLOAT), x,
                              cudnn_value(g, CUDNN_MASKED), mask, 0);
}

static inline void cudnn_forward_graph(CudnnGraph* g) {
    const int T = g->s.T, HS = g->s.HS, VS = g->s.VS;
    const cudnnDataType_t bf16 = CUDNN_DATA_BFLOAT16, fp32 = CUDNN_DATA_FLOAT;
    CudnnPart q = cudnn_tensor(g, CUDNN_Q, bf16, T, HS, false), k = cudnn_tensor(g, CUDNN_K, bf16, HS, T, true),
              v = cudnn_tensor(g, CUDNN_V, bf16, T, VS, false), o = cudnn_tensor(g, CUDNN_O, bf16, T, VS, false);

    // The scores, masked.
    CudnnPart s = cudnn_product(g, cudnn_scores(g, fp32), q, k);
    s = cudnn_pointwise(g, CUDNN_POINTWISE_MUL, cudnn_scores(g, fp32), s, cudnn_value(g, CUDNN_SCALE));
    s = cudnn_causal(g, s);

    // The softmax; stats = maximum + log of the sum.
    CudnnPart largest = cudnn_reduce(g, CUDNN_REDUCE_TENSOR_MAX, s);
    s = cudnn_pointwise(g, CUDNN_POINTWISE_SUB, cudnn_scores(g, fp32), s, largest);
    s = cudnn_pointwise(g, CUDNN_POINTWISE_EXP, cudnn_scores(g, fp32), s, NULL);
    CudnnPart sum = cudnn_reduce(g, CUDNN_REDUCE_TENSOR_ADD, s);
    CudnnPart log_sum = cudnn_pointwise(g, CUDNN_POINTWISE_LOG, cudnn_rows(g, 0), sum, NULL);
    cudnn_pointwise(g, CUDNN_POINTWISE_ADD, cudnn_rows(g, CUDNN_STATS), largest, log_sum);
    CudnnPart p = cudnn_pointwise(g, CUDNN_POINTWISE_DIV, cudnn_scores(g, bf16), s, sum);

    cudnn_product(g, o, p, v);
}

static inline void cudnn_backward_graph(CudnnGraph* g) {
    const int T = g->s.T, HS = g->s.HS, VS = g->s.VS;
    const cudnnDataType_t bf16 = CUDNN_DATA_BFLOAT16, fp32 = CUDNN_DATA_FLOAT;
    CudnnPart q = cudnn_tensor(g, CUDNN_Q, bf16, T, HS, false), k = cudnn_tensor(g, CUDNN_K, bf16, HS, T, true),
              v = cudnn_tensor(g, CUDNN_V, bf16, VS, T, true), o = cudnn_tensor(g, CUDNN_O, bf16, T, VS, false),
              d_o = cudnn_tensor(g, CUDNN_DO, bf16, T, VS, false), scale = cudnn_value(g, CUDNN_SCALE);

    // Each row's sum of P dP, which is that of dO O.
    CudnnPart x = cudnn_tensor(g, 0, fp32, T, VS, false);
    cudnn_pointwise(g, CUDNN_POINTWISE_MUL, x, d_o, o);
    CudnnPart sums = cudnn_pointwise(g, CUDNN_POINTWISE_MUL, cudnn_rows(g, CUDNN_SUMS),
                                     cudnn_reduce(g, CUDNN_REDUCE_TENSOR_ADD, x), cudnn_value(g, CUDNN_ONE));

    // P = exp(S - stats), and dV = P^T dO.
    CudnnPart s = cudnn_product(g, cudnn_scores(g, fp32), q, k);
    s = cudnn_pointwise(g, CUDNN_POINTWISE_MUL, cudnn_scores(g, fp32), s, scale);
    s = cudnn_pointwise(g, CUDNN_POINTWISE_SUB, cudnn_scores(g, fp32), s, cudnn_rows(g, CUDNN_STATS));
    s = cudnn_causal(g, s);
    CudnnPart p = cudnn_pointwise(g, CUDNN_POINTWISE_EXP, cudnn_scores(g, fp32), s, NULL);
    cudnn_product(g, cudnn_tensor(g, CUDNN_DV, bf16, T, VS, false),
                  cudnn_across(g, cudnn_tensor(g, 0, bf16, T, T, true), p), d_o);

    // dS = P (dP - sums) * scale, dP = dO V^T.
    CudnnPart d = cudnn_product(g, cudnn_scores(g, fp32), d_o, v);
    d = cudnn_pointwise(g, CUDNN_POINTWISE_SUB, cudnn_scores(g, fp32), d, sums);
    d = cudnn_pointwise(g, CUDNN_POINTWISE_MUL, cudnn_scores(g, fp32), d, p);
    d = cudnn_pointwise(g, CUDNN_POINTWISE_MUL, cudnn_scores(g, fp32), d, scale);

    // dK = dS^T Q, dQ = dS K.
    cudnn_product(g, cudnn_tensor(g, CUDNN_DK, bf16, T, HS, false),
                  cudnn_across(g, cudnn_tensor(g, 0, bf16, T, T, true), d), q);
    cudnn_product(g, cudnn_tensor(g, CUDNN_DQ, bf16, T, HS, false), d,
                  cudnn_across(g, cudnn_tensor(g, 0, bf16, T, HS, false), k));
}

// ---- plans

typedef struct {
    AttentionShape shape;
    bool backward;
    size_t workspace;  // bytes
    CudnnPart plan;    // one of the graph's descriptors, all of which stay
    CudnnGraph graph;
} CudnnPlan;

typedef struct {
    cudnnHandle_t handle;  // NULL: plans are only built, for the machine that `device` describes
    CudnnPart device;      // NULL: the handle's own
    CudnnPlan plans[CUDNN_PLANS];
    int n;
} AttentionCudnn;

// What the library says of its last failure, its first line
static inline void cudnn_last_error(char* text, size_t n) {
    cudnnGetLastErrorString(text, n);
    text[strcspn(text, "\n")] = 0;
}
// The configurations that cuDNN thinks of for the graph, the best first; how many.
static inline int64_t cudnn_configurations(const AttentionCudnn* c, CudnnGraph* g, CudnnPart* list) {
    const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    int64_t n = 0;
    CudnnPart graph = cudnn_make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, "the graph"),
              ask = cudnn_make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, "engines");
    cudnn_set(g, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g->n_operations, g->operations);
    if (c->handle) { cudnn_set(g, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &c->handle); }
    cudnn_finish(g, graph);
    cudnn_set_descriptor(g, ask, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
    cudnn_set(g, ask, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    if (c->device) { cudnn_set_descriptor(g, ask, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, c->device); }
    cudnn_finish(g, ask);
    for (int i = 0; i < CUDNN_ENGINES; i++) { list[i] = cudnn_make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, "engines"); }
    if (g->status == CUDNN_STATUS_SUCCESS) {
        cudnn_step(g, cudnnBackendGetAttribute(ask, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                               CUDNN_ENGINES, &n, list));
    }
    return n < CUDNN_ENGINES ? n : (int64_t)CUDNN_ENGINES;
}

// Fills p->plan with the first whose workspace is within attention_cudnn_workspace.
static inline bool cudnn_plan_build(const AttentionCudnn* c, CudnnPlan* p, Error* e) {
    CudnnGraph* g = &p->graph;
    CudnnPart configurations[CUDNN_ENGINES];
    const size_t room = attention_cudnn_workspace(&p->shape) - attention_cudnn_sums(&p->shape);
    int large = 0;
    char last[256] = "";
    g->s = p->shape;
    g->next = CUDNN_VIRTUAL;
    if (p->backward) {
        cudnn_backward_graph(g);
    } else {
        cudnn_forward_graph(g);
    }
    int64_t n = cudnn_configurations(c, g, configurations);
    if (g->status != CUDNN_STATUS_SUCCESS) {
        cudnn_last_error(last, sizeof last);
        return fail(e, "cuDNN refused %s: %s; %s", g->what, cudnnGetErrorString(g->status), last);
    }
    if (!n) { return fail(e, "cuDNN %zu has no engine for this on this GPU", cudnnGetVersion()); }
    for (int64_t i = 0; i < n; i++) {
        int64_t workspace = 0, got = 0;
        CudnnPart d = cudnn_make(g, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, "a plan");
        cudnn_set_descriptor(g, d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, configurations[i]);
        if (c->device) { cudnn_set_descriptor(g, d, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, c->device); }
        if (c->handle) { cudnn_set(g, d, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &c->handle); }
        cudnn_finish(g, d);
        if (g->status == CUDNN_STATUS_SUCCESS) {
            cudnn_step(g, cudnnBackendGetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1,
                                                   &got, &workspace));
        }
        if (g->status == CUDNN_STATUS_SUCCESS && (size_t)workspace <= room) {
            p->plan = d, p->workspace = (size_t)workspace;
            return true;
        }
        if (g->status == CUDNN_STATUS_SUCCESS) {
            large++;
        } else {
            cudnn_last_error(last, sizeof last);
        }
        g->status = CUDNN_STATUS_SUCCESS;  // the next engine may do better
    }
    return fail(e, "cuDNN %zu has no plan: of %lld engines %d want more than %zu MiB of workspace%s%s",
                cudnnGetVersion(), (long long)n, large, room >> 20, *last ? "; " : "", last);
}

// The plan of a shape, built if there is none yet; NULL with a message that names the shape if cuDNN has none.
static inline const CudnnPlan* attention_cudnn_plan(AttentionCudnn* c, const AttentionShape* s, bool backward,
                                                    Error* e) {
    Error why = {{0}};
    for (int i = 0; i < c->n; i++) {
        if (c->plans[i].backward == backward && !memcmp(&c->plans[i].shape, s, sizeof *s)) { return &c->plans[i]; }
    }
    if (c->n == CUDNN_PLANS) {
        fail(e, "attention by cuDNN: more than %d shapes in a run", CUDNN_PLANS);
        return NULL;
    }
    CudnnPlan* p = &c->plans[c->n];
    memset(p, 0, sizeof *p);
    p->shape = *s;
    p->backward = backward;
    if (cudnn_plan_build(c, p, &why)) { return &c->plans[c->n++]; }
    cudnn_graph_free(&p->graph);
    fail(e, "attention by cuDNN, %s of %d sequences of %d tokens, %d heads of %d, values of %d: %s",
         backward ? "backward" : "forward", s->B, s->T, s->NH, s->HS, s->VS, why.text);
    return NULL;
}

// False with a message if this cuDNN cannot be used. The stream is where calls go.
static inline bool attention_cudnn_open(AttentionCudnn* c, cudaStream_t stream, Error* e) {
    size_t version = cudnnGetVersion();
    memset(c, 0, sizeof *c);
    if (version < 91600) { return fail(e, "cuDNN: got version %zu, wanted 91600 (9.16) or later", version); }
    cudnnStatus_t status = cudnnCreate(&c->handle);
    if (status == CUDNN_STATUS_SUCCESS) { status = cudnnSetStream(c->handle, stream); }
    return status == CUDNN_STATUS_SUCCESS || fail(e, "cuDNN cannot be used: %s", cudnnGetErrorString(status));
}
static inline void attention_cudnn_close(AttentionCudnn* c) {
    while (c->n > 0) { cudnn_graph_free(&c->plans[--c->n].graph); }
    if (c->handle) { cudnnDestroy(c->handle); }
    c->handle = NULL;
}

// Runs a plan; memory[number] is the address of tensor `number`, NULL where the graph has none.
static inline bool cudnn_run(AttentionCudnn* c, const AttentionShape* s, bool backward, void** memory, void* workspace,
                             Error* e) {
    int64_t numbers[CUDNN_VIRTUAL], n = 0;
    void* addresses[CUDNN_VIRTUAL];
    float scale = s->scale, masked = -INFINITY, one = 1;
    const CudnnPlan* p = attention_cudnn_plan(c, s, backward, e);
    if (!p) { return false; }
    memory[CUDNN_SCALE] = &scale, memory[CUDNN_MASKED] = &masked, memory[CUDNN_ONE] = backward ? &one : NULL;
    for (int64_t i = 1; i < CUDNN_VIRTUAL; i++) {
        if (memory[i]) { numbers[n] = i, addresses[n++] = memory[i]; }
    }

    CudnnGraph call;  // of one descriptor
    memset(&call, 0, sizeof call);
    CudnnPart d = cudnn_make(&call, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, "a call");
    cudnn_set(&call, d, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, numbers);
    cudnn_set(&call, d, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, addresses);
    cudnn_set(&call, d, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    cudnn_finish(&call, d);
    if (call.status == CUDNN_STATUS_SUCCESS) { cudnn_step(&call, cudnnBackendExecute(c->handle, p->plan, d)); }
    cudnn_graph_free(&call);
    return call.status == CUDNN_STATUS_SUCCESS ||
           fail(e, "attention by cuDNN, %s: %s", backward ? "backward" : "forward", cudnnGetErrorString(call.status));
}

// ---- the two functions. False with a message if cuDNN has no plan or refuses the call; they launch and do not wait.

// o and stats are set. workspace: attention_cudnn_workspace bytes, at a multiple of 256
static inline bool attention_cudnn_forward(AttentionCudnn* c, void* o, float* stats, const void* q, const void* k,
                                           const void* v, const AttentionShape* s, void* workspace, Error* e) {
    void* memory[CUDNN_VIRTUAL] = {NULL};
    memory[CUDNN_Q] = (void*)q, memory[CUDNN_K] = (void*)k, memory[CUDNN_V] = (void*)v;
    memory[CUDNN_O] = o, memory[CUDNN_STATS] = stats;
    return cudnn_run(c, s, false, memory, workspace, e);
}

// dq, dk and dv are set. o and stats: as forward left them, of the same q, k and v
static inline bool attention_cudnn_backward(AttentionCudnn* c, void* dq, void* dk, void* dv, const void* d_o,
                                            const void* o, const float* stats, const void* q, const void* k,
                                            const void* v, const AttentionShape* s, void* workspace, Error* e) {
    void* memory[CUDNN_VIRTUAL] = {NULL};
    memory[CUDNN_Q] = (void*)q, memory[CUDNN_K] = (void*)k, memory[CUDNN_V] = (void*)v, memory[CUDNN_O] = (void*)o;
    memory[CUDNN_STATS] = (void*)stats, memory[CUDNN_DO] = (void*)d_o;
    memory[CUDNN_DQ] = dq, memory[CUDNN_DK] = dk, memory[CUDNN_DV] = dv, memory[CUDNN_SUMS] = workspace;
    return cudnn_run(c, s, true, memory, (char*)workspace + attention_cudnn_sums(s), e);
}
#else
enum { HAS_CUDNN = 0 };
typedef struct {
    int plans;
} AttentionCudnn;
static inline bool attention_cudnn_open(AttentionCudnn* c, void* stream, Error* e) {
    (void)c, (void)stream;
    return fail(e, "this build has no cuDNN; make train_mta_cuda CUDNN=1 builds with it");
}
// None of these is reached: a model without cuDNN has no use for them.
static inline void attention_cudnn_close(AttentionCudnn* c) { (void)c; }
static inline const void* attention_cudnn_plan(AttentionCudnn* c, const AttentionShape* s, bool backward, Error* e) {
    (void)s, (void)backward;
    attention_cudnn_open(c, NULL, e);
    return NULL;
}
static inline bool attention_cudnn_forward(AttentionCudnn* c, void* o, float* stats, const void* q, const void* k,
                                           const void* v, const AttentionShape* s, void* workspace, Error* e) {
    (void)o, (void)stats, (void)q, (void)k, (void)v, (void)s, (void)workspace;
    return attention_cudnn_open(c, NULL, e);
}
static inline bool attention_cudnn_backward(AttentionCudnn* c, void* dq, void* dk, void* dv, const void* d_o,
                                            const void* o, const float* stats, const void* q, const void* k,
                                            const void* v, const AttentionShape* s, void* workspace, Error* e) {
    (void)dq, (void)dk, (void)dv, (void)d_o, (void)o, (void)stats, (void)q, (void)k, (void)v, (void)s, (void)workspace;
    return attention_cudnn_open(c, NULL, e);
}
#endif

#endif
