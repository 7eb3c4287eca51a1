// cudnn.h: stand-in for the calls of cuDNN's backend interface that mta/attention_cudnn.h makes. A graph of operations
// is described, planned and executed as with the library; here it is computed one operation after the other, in plain
// loops and fp32, each tensor through its own sizes and strides. What flows between operations is rounded to the type
// that its tensor has, and operands of products to bf16, as tensor cores read them.
//
// Refuses what the library refuses or must not be asked: sizes that do not fit together, two tensors of one number, a
// tensor that nothing has computed, memory that is not aligned or reaches beyond its allocation, and a plan that is
// built while a stream is captured. For backward of values wider than 128 it has engines on sm_90 alone.
// CUDA_CPU_FAIL=NAME:N makes the N-th call of cudnnCreate, cudnnBackendFinalize or cudnnBackendExecute fail.
#ifndef CUDA_CPU_CUDNN_H
#define CUDA_CPU_CUDNN_H
#include <memory>
#include "cuda_bf16.h"
#include "cuda_runtime.h"

typedef enum {
    CUDNN_STATUS_SUCCESS = 0,
    CUDNN_STATUS_NOT_INITIALIZED = 1001,
    CUDNN_STATUS_BAD_PARAM = 2000,
    CUDNN_STATUS_NOT_SUPPORTED = 3000,
    CUDNN_STATUS_EXECUTION_FAILED = 5000
} cudnnStatus_t;
typedef enum {
    CUDNN_DATA_FLOAT = 0,
    CUDNN_DATA_INT32 = 4,
    CUDNN_DATA_BFLOAT16 = 9,
    CUDNN_DATA_BOOLEAN = 11
} cudnnDataType_t;
typedef enum {
    CUDNN_POINTWISE_ADD,
    CUDNN_POINTWISE_SUB,
    CUDNN_POINTWISE_MUL,
    CUDNN_POINTWISE_DIV,
    CUDNN_POINTWISE_EXP,
    CUDNN_POINTWISE_LOG,
    CUDNN_POINTWISE_CMP_GT,
    CUDNN_POINTWISE_CMP_GE,
    CUDNN_POINTWISE_GEN_INDEX,
    CUDNN_POINTWISE_BINARY_SELECT
} cudnnPointwiseMode_t;
typedef enum { CUDNN_REDUCE_TENSOR_ADD, CUDNN_REDUCE_TENSOR_MAX } cudnnReduceTensorOp_t;
typedef enum { CUDNN_HEUR_MODE_A } cudnnBackendHeurMode_t;
typedef enum {
    CUDNN_BACKEND_POINTWISE_DESCRIPTOR,
    CUDNN_BACKEND_MATMUL_DESCRIPTOR,
    CUDNN_BACKEND_REDUCTION_DESCRIPTOR,
    CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR,
    CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR,
    CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR,
    CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR,
    CUDNN_BACKEND_TENSOR_DESCRIPTOR,
    CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR,
    CUDNN_BACKEND_ENGINECFG_DESCRIPTOR,
    CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR,
    CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR,
    CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR,
    CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR
} cudnnBackendDescriptorType_t;
typedef enum {
    CUDNN_ATTR_TENSOR_DATA_TYPE,
    CUDNN_ATTR_TENSOR_DIMENSIONS,
    CUDNN_ATTR_TENSOR_STRIDES,
    CUDNN_ATTR_TENSOR_UNIQUE_ID,
    CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT,
    CUDNN_ATTR_TENSOR_IS_VIRTUAL,
    CUDNN_ATTR_TENSOR_IS_BY_VALUE,
    CUDNN_ATTR_POINTWISE_MODE,
    CUDNN_ATTR_POINTWISE_MATH_PREC,
    CUDNN_ATTR_POINTWISE_AXIS,
    CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR,
    CUDNN_ATTR_OPERATION_POINTWISE_XDESC,
    CUDNN_ATTR_OPERATION_POINTWISE_BDESC,
    CUDNN_ATTR_OPERATION_POINTWISE_TDESC,
    CUDNN_ATTR_OPERATION_POINTWISE_YDESC,
    CUDNN_ATTR_MATMUL_COMP_TYPE,
    CUDNN_ATTR_OPERATION_MATMUL_DESC,
    CUDNN_ATTR_OPERATION_MATMUL_ADESC,
    CUDNN_ATTR_OPERATION_MATMUL_BDESC,
    CUDNN_ATTR_OPERATION_MATMUL_CDESC,
    CUDNN_ATTR_REDUCTION_OPERATOR,
    CUDNN_ATTR_REDUCTION_COMP_TYPE,
    CUDNN_ATTR_OPERATION_REDUCTION_DESC,
    CUDNN_ATTR_OPERATION_REDUCTION_XDESC,
    CUDNN_ATTR_OPERATION_REDUCTION_YDESC,
    CUDNN_ATTR_OPERATION_RESHAPE_XDESC,
    CUDNN_ATTR_OPERATION_RESHAPE_YDESC,
    CUDNN_ATTR_OPERATIONGRAPH_OPS,
    CUDNN_ATTR_OPERATIONGRAPH_HANDLE,
    CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH,
    CUDNN_ATTR_ENGINEHEUR_MODE,
    CUDNN_ATTR_ENGINEHEUR_DEVICEPROP,
    CUDNN_ATTR_ENGINEHEUR_RESULTS,
    CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
    CUDNN_ATTR_EXECUTION_PLAN_HANDLE,
    CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP,
    CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
    CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
    CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
    CUDNN_ATTR_VARIANT_PACK_WORKSPACE
} cudnnBackendAttributeName_t;
typedef enum {
    CUDNN_TYPE_HANDLE,
    CUDNN_TYPE_DATA_TYPE,
    CUDNN_TYPE_BOOLEAN,
    CUDNN_TYPE_INT64,
    CUDNN_TYPE_VOID_PTR,
    CUDNN_TYPE_HEUR_MODE,
    CUDNN_TYPE_POINTWISE_MODE,
    CUDNN_TYPE_BACKEND_DESCRIPTOR,
    CUDNN_TYPE_REDUCTION_OPERATOR_TYPE
} cudnnBackendAttributeType_t;

namespace cuda_cpu {
typedef __nv_bfloat16 Bf16;

struct Dnn {
    cudaStream_t stream;
};

// A descriptor: the bytes of each attribute, by name.
struct Descriptor {
    cudnnBackendDescriptorType_t type;
    std::map<int, std::vector<char>> attributes;

    template <typename T> T get(int name, size_t i = 0, T otherwise = T()) const {
        auto found = attributes.find(name);
        if (found == attributes.end() || (i + 1) * sizeof(T) > found->second.size()) { return otherwise; }
        T x;
        memcpy(&x, found->second.data() + i * sizeof(T), sizeof(T));
        return x;
    }
    Descriptor* at(int name, size_t i = 0) const { return get<Descriptor*>(name, i); }
    template <typename T> size_t count(int name) const {
        auto found = attributes.find(name);
        return found == attributes.end() ? 0 : found->second.size() / sizeof(T);
    }
};

// A tensor of a plan, by value, since descriptors may go before a captured call runs.
struct DnnTensor {
    int64_t number, sizes[4], steps[4], alignment;
    cudnnDataType_t type;
    bool is_virtual, by_value;

    size_t offset(const int64_t* i) const {  // a size of 1 serves every index
        size_t at = 0;
        for (int d = 0; d < 4; d++) { at += sizes[d] == 1 ? 0 : (size_t)(i[d] * steps[d]); }
        return at;
    }
    size_t extent() const {  // elements from the first to the last
        size_t last = 0;
        for (int d = 0; d < 4; d++) { last += (size_t)((sizes[d] - 1) * steps[d]); }
        return last + 1;
    }
    bool same(const DnnTensor& t) const {
        return number == t.number && type == t.type && is_virtual == t.is_virtual && by_value == t.by_value &&
               std::equal(sizes, sizes + 4, t.sizes) && std::equal(steps, steps + 4, t.steps);
    }
    size_t bytes() const { return extent() * (type == CUDNN_DATA_BFLOAT16 ? 2 : 4); }
};
// Its values by offset: all of them in floats, in memory when a plan ends
typedef std::shared_ptr<std::vector<float>> DnnValues;

struct DnnOperation {
    cudnnBackendDescriptorType_t type;
    int mode, axis;
    DnnTensor x, b, mask, y;
    bool has_b, has_mask;
};
typedef std::vector<DnnOperation> DnnGraph;
struct DnnPlan {
    DnnGraph operations;
    size_t workspace;
};

inline DnnTensor dnn_tensor(const Descriptor* d) {
    DnnTensor t = {};
    t.number = d->get<int64_t>(CUDNN_ATTR_TENSOR_UNIQUE_ID);
    t.alignment = d->get<int64_t>(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT);
    t.type = d->get<cudnnDataType_t>(CUDNN_ATTR_TENSOR_DATA_TYPE);
    t.is_virtual = d->get<bool>(CUDNN_ATTR_TENSOR_IS_VIRTUAL), t.by_value = d->get<bool>(CUDNN_ATTR_TENSOR_IS_BY_VALUE);
    for (int i = 0; i < 4; i++) {
        t.sizes[i] = d->get<int64_t>(CUDNN_ATTR_TENSOR_DIMENSIONS, i);
        t.steps[i] = d->get<int64_t>(CUDNN_ATTR_TENSOR_STRIDES, i);
    }
    return t;
}
inline DnnOperation dnn_operation(const Descriptor* d) {
    DnnOperation o = {};
    o.type = d->type;
    auto tensor = [&](int name) { return dnn_tensor(d->at(name)); };
    if (o.type == CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR) {
        o.x = tensor(CUDNN_ATTR_OPERATION_MATMUL_ADESC), o.b = tensor(CUDNN_ATTR_OPERATION_MATMUL_BDESC);
        o.y = tensor(CUDNN_ATTR_OPERATION_MATMUL_CDESC), o.has_b = true;
    } else if (o.type == CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR) {
        const Descriptor* how = d->at(CUDNN_ATTR_OPERATION_REDUCTION_DESC);
        o.mode = how->get<cudnnReduceTensorOp_t>(CUDNN_ATTR_REDUCTION_OPERATOR);
        o.x = tensor(CUDNN_ATTR_OPERATION_REDUCTION_XDESC), o.y = tensor(CUDNN_ATTR_OPERATION_REDUCTION_YDESC);
    } else if (o.type == CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR) {
        o.x = tensor(CUDNN_ATTR_OPERATION_RESHAPE_XDESC), o.y = tensor(CUDNN_ATTR_OPERATION_RESHAPE_YDESC);
    } else {
        const Descriptor* how = d->at(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR);
        o.mode = how->get<cudnnPointwiseMode_t>(CUDNN_ATTR_POINTWISE_MODE);
        o.axis = (int)how->get<int64_t>(CUDNN_ATTR_POINTWISE_AXIS);
        o.x = tensor(CUDNN_ATTR_OPERATION_POINTWISE_XDESC), o.y = tensor(CUDNN_ATTR_OPERATION_POINTWISE_YDESC);
        o.has_b = d->at(CUDNN_ATTR_OPERATION_POINTWISE_BDESC), o.has_mask = d->at(CUDNN_ATTR_OPERATION_POINTWISE_TDESC);
        if (o.has_b) { o.b = tensor(CUDNN_ATTR_OPERATION_POINTWISE_BDESC); }
        if (o.has_mask) { o.mask = tensor(CUDNN_ATTR_OPERATION_POINTWISE_TDESC); }
    }
    return o;
}

// Are the tensors' sizes those that the operation needs?
inline bool dnn_fits(const DnnOperation& o) {
    const int64_t *x = o.x.sizes, *b = o.b.sizes, *y = o.y.sizes;
    auto as = [](const int64_t* part, const int64_t* whole) {
        return std::equal(part, part + 4, whole, [](int64_t p, int64_t w) { return p == w || p == 1; });
    };
    for (int d = 0; d < 4; d++) {
        if (x[d] < 1 || y[d] < 1) { return false; }
    }
    if (o.type == CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR) {
        return std::equal(x, x + 2, y) && std::equal(b, b + 2, y) && x[2] == y[2] && b[3] == y[3] && x[3] == b[2];
    }
    if (o.type == CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR) { return std::equal(x, x + 3, y) && y[3] == 1; }
    if (o.type == CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR) { return o.x.extent() == o.y.extent(); }
    return std::equal(x, x + 4, y) && (!o.has_b || as(b, y)) && (!o.has_mask || as(o.mask.sizes, y));
}
// Is the graph one that can be computed in this order, and each number one tensor's?
inline bool dnn_sound(const DnnGraph& graph) {
    std::map<int64_t, DnnTensor> seen;
    for (const DnnOperation& o : graph) {
        const DnnTensor* inputs[] = {&o.x, o.has_b ? &o.b : NULL, o.has_mask ? &o.mask : NULL};
        for (const DnnTensor* t : inputs) {
            if (!t) { continue; }
            auto found = seen.find(t->number);
            if (found == seen.end() ? t->is_virtual : !found->second.same(*t)) { return false; }
            seen[t->number] = *t;
        }
        if (!dnn_fits(o) || seen.count(o.y.number)) { return false; }
        seen[o.y.number] = o.y;
    }
    return !graph.empty();
}

inline float dnn_round(float x, cudnnDataType_t type) { return type == CUDNN_DATA_BFLOAT16 ? (float)Bf16(x) : x; }
inline float dnn_pointwise(int mode, float x, float b, float mask) {
    switch (mode) {
        case CUDNN_POINTWISE_ADD: return x + b;
        case CUDNN_POINTWISE_SUB: return x - b;
        case CUDNN_POINTWISE_MUL: return x * b;
        case CUDNN_POINTWISE_DIV: return x / b;
        case CUDNN_POINTWISE_EXP: return expf(x);
        case CUDNN_POINTWISE_LOG: return logf(x);
        case CUDNN_POINTWISE_CMP_GT: return x > b;
        case CUDNN_POINTWISE_CMP_GE: return x >= b;
        default: return mask != 0 ? x : b;  // CUDNN_POINTWISE_BINARY_SELECT
    }
}
// out: by the offsets of o.y
inline void dnn_compute(const DnnOperation& o, float* out, const float* x, const float* b, const float* mask) {
    int64_t i[4];
    std::vector<float> sums((size_t)o.y.sizes[3]);
    for (i[0] = 0; i[0] < o.y.sizes[0]; i[0]++) {
        for (i[1] = 0; i[1] < o.y.sizes[1]; i[1]++) {
            for (i[2] = 0; i[2] < o.y.sizes[2]; i[2]++) {
                std::fill(sums.begin(), sums.end(), 0.0f);
                if (o.type == CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR) {
                    for (int64_t k = 0; k < o.x.sizes[3]; k++) {
                        int64_t ix[4] = {i[0], i[1], i[2], k}, ib[4] = {i[0], i[1], k, 0};
                        float a = (float)Bf16(x[o.x.offset(ix)]);
                        const float* row = b + o.b.offset(ib);
                        for (int64_t c = 0; c < o.y.sizes[3]; c++) {
                            sums[c] += a * (float)Bf16(row[c * o.b.steps[3]]);
                        }
                    }
                }
                for (i[3] = 0; i[3] < o.y.sizes[3]; i[3]++) {
                    float value = sums[i[3]];
                    if (o.type == CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR) {
                        bool most = o.mode == CUDNN_REDUCE_TENSOR_MAX;
                        value = most ? -INFINITY : 0;
                        for (int64_t c = 0; c < o.x.sizes[3]; c++) {
                            int64_t ix[4] = {i[0], i[1], i[2], c};
                            float term = x[o.x.offset(ix)];
                            value = most ? fmaxf(value, term) : value + term;
                        }
                    } else if (o.type == CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR) {
                        value = o.mode == CUDNN_POINTWISE_GEN_INDEX
                                    ? (float)i[o.axis]
                                    : dnn_pointwise(o.mode, x[o.x.offset(i)], b ? b[o.b.offset(i)] : 0,
                                                    mask ? mask[o.mask.offset(i)] : 0);
                    }
                    out[o.y.offset(i)] = dnn_round(value, o.y.type);
                }
            }
        }
    }
}
inline DnnValues dnn_read(const DnnTensor& t, const void* p) {
    DnnValues v = std::make_shared<std::vector<float>>(t.extent());
    for (size_t i = 0; i < v->size(); i++) {
        (*v)[i] = t.type == CUDNN_DATA_BFLOAT16 ? (float)((const Bf16*)p)[i] : ((const float*)p)[i];
    }
    return v;
}
inline void dnn_write(const DnnTensor& t, const std::vector<float>& v, void* p) {
    for (size_t i = 0; i < v.size(); i++) {
        if (t.type == CUDNN_DATA_BFLOAT16) {
            ((Bf16*)p)[i] = Bf16(v[i]);
        } else {
            ((float*)p)[i] = v[i];
        }
    }
}
// memory: addresses by number; values: of the tensors that are given by value
inline void dnn_run(const DnnGraph& graph, const std::map<int64_t, void*>& memory,
                    std::map<int64_t, DnnValues> values) {
    for (const DnnOperation& o : graph) {
        auto input = [&](const DnnTensor& t) {
            DnnValues& v = values[t.number];
            if (!v) { v = dnn_read(t, memory.at(t.number)); }
            return v->data();
        };
        const float *x = input(o.x), *b = o.has_b ? input(o.b) : NULL, *mask = o.has_mask ? input(o.mask) : NULL;
        DnnValues y = std::make_shared<std::vector<float>>(o.y.extent());
        if (o.type == CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR) {  // the same memory, through other sizes and strides
            for (size_t i = 0; i < y->size(); i++) { (*y)[i] = dnn_round(x[i], o.y.type); }
        } else {
            dnn_compute(o, y->data(), x, b, mask);
        }
        values[o.y.number] = y;
        if (!o.y.is_virtual) { dnn_write(o.y, *y, memory.at(o.y.number)); }
    }
}
}  // namespace cuda_cpu

typedef cuda_cpu::Dnn* cudnnHandle_t;
typedef cuda_cpu::Descriptor* cudnnBackendDescriptor_t;

static inline size_t cudnnGetVersion(void) { return 91900; }
static inline const char* cudnnGetErrorString(cudnnStatus_t s) {
    switch (s) {
        case CUDNN_STATUS_SUCCESS: return "CUDNN_STATUS_SUCCESS";
        case CUDNN_STATUS_NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
        case CUDNN_STATUS_BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
        case CUDNN_STATUS_NOT_SUPPORTED: return "CUDNN_STATUS_NOT_SUPPORTED";
        default: return "CUDNN_STATUS_EXECUTION_FAILED";
    }
}
static inline void cudnnGetLastErrorString(char* text, size_t n) { snprintf(text, n, "the emulator says no more"); }
static inline cudnnStatus_t cudnnCreate(cudnnHandle_t* h) {
    if (cuda_cpu::planted_failure("cudnnCreate")) { return CUDNN_STATUS_NOT_INITIALIZED; }
    *h = new cuda_cpu::Dnn{NULL};
    return CUDNN_STATUS_SUCCESS;
}
static inline cudnnStatus_t cudnnSetStream(cudnnHandle_t h, cudaStream_t s) {
    h->stream = s;
    return CUDNN_STATUS_SUCCESS;
}
static inline cudnnStatus_t cudnnDestroy(cudnnHandle_t h) {
    delete h;
    return CUDNN_STATUS_SUCCESS;
}
static inline cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                                         cudnnBackendDescriptor_t* d) {
    *d = new cuda_cpu::Descriptor;
    (*d)->type = type;
    return CUDNN_STATUS_SUCCESS;
}
static inline cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t d) {
    delete d;
    return CUDNN_STATUS_SUCCESS;
}
static inline cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                                                     cudnnBackendAttributeType_t type, int64_t n, const void* values) {
    size_t size = type == CUDNN_TYPE_BOOLEAN ? sizeof(bool)
                  : type == CUDNN_TYPE_HANDLE || type == CUDNN_TYPE_INT64 || type == CUDNN_TYPE_VOID_PTR ||
                          type == CUDNN_TYPE_BACKEND_DESCRIPTOR
                      ? sizeof(void*)
                      : sizeof(int);
    if (n < 1 || !values) { return CUDNN_STATUS_BAD_PARAM; }
    d->attributes[name].assign((const char*)values, (const char*)values + (size_t)n * size);
    return CUDNN_STATUS_SUCCESS;
}

namespace cuda_cpu {
// of a configuration of an engine, or of the question for engines
inline DnnGraph dnn_asked(const Descriptor* config) {
    const Descriptor* graph = config->at(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH);
    DnnGraph operations;
    for (size_t i = 0; i < graph->count<Descriptor*>(CUDNN_ATTR_OPERATIONGRAPH_OPS); i++) {
        operations.push_back(dnn_operation(graph->at(CUDNN_ATTR_OPERATIONGRAPH_OPS, i)));
    }
    return operations;
}
inline DnnGraph dnn_graph(const Descriptor* plan) {
    return dnn_asked(plan->at(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG));
}
inline bool dnn_backward(const DnnGraph& graph) { return graph.size() > 16; }
// Is there an engine for it on this device?
inline bool dnn_served(const DnnGraph& graph) {
    bool wide = false;
    cudaDeviceProp device;
    cudaGetDeviceProperties(&device, cuda_cpu::device);
    for (const auto& o : graph) { wide = wide || (!o.y.is_virtual && o.y.sizes[3] > 128); }
    return !wide || !dnn_backward(graph) || device.major == 9;
}
}  // namespace cuda_cpu
static inline cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t d) {
    if (cuda_cpu::planted_failure(__func__)) { return CUDNN_STATUS_NOT_SUPPORTED; }
    if (d->type != CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) { return CUDNN_STATUS_SUCCESS; }
    if (cuda_cpu::capturing) { return CUDNN_STATUS_EXECUTION_FAILED; }
    return cuda_cpu::dnn_sound(cuda_cpu::dnn_graph(d)) ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_NOT_SUPPORTED;
}
static inline cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                                                     cudnnBackendAttributeType_t, int64_t room, int64_t* n,
                                                     void* values) {
    if (name == CUDNN_ATTR_ENGINEHEUR_RESULTS) {
        int64_t engines = cuda_cpu::dnn_served(cuda_cpu::dnn_asked(d)) ? 2 : 0;
        for (*n = 0; *n < engines && *n < room; ++*n) {
            ((cudnnBackendDescriptor_t*)values)[*n]->attributes = d->attributes;
        }
    } else if (name ==
               CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE) {  // as the library wants it on sm_90: dS, and 256 bytes
        int64_t most = 0;
        cuda_cpu::DnnGraph graph = cuda_cpu::dnn_graph(d);
        for (const auto& o : graph) {
            const int64_t* s = o.y.sizes;
            if (cuda_cpu::dnn_backward(graph)) {
                most = std::max(most, 2 * s[0] * s[1] * ((s[2] + 63) / 64 * 64) * ((s[2] + 127) / 128 * 128));
            }
        }
        *(int64_t*)values = most + 256, *n = 1;
    } else {
        return CUDNN_STATUS_BAD_PARAM;
    }
    return CUDNN_STATUS_SUCCESS;
}
static inline cudnnStatus_t cudnnBackendExecute(cudnnHandle_t h, cudnnBackendDescriptor_t plan,
                                                cudnnBackendDescriptor_t pack) {
    if (cuda_cpu::planted_failure(__func__)) { return CUDNN_STATUS_EXECUTION_FAILED; }
    cuda_cpu::DnnGraph graph = cuda_cpu::dnn_graph(plan);
    std::map<int64_t, void*> memory;
    std::map<int64_t, cuda_cpu::DnnValues> values;
    for (size_t i = 0; i < pack->count<int64_t>(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS); i++) {
        memory[pack->get<int64_t>(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, i)] =
            pack->get<void*>(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, i);
    }

    // Every tensor of the graph that is in memory must have been given; one by value is read now, not when the stream
    // runs.
    size_t used = 0;
    std::map<int64_t, bool> seen;
    for (const auto& o : graph) {
        const cuda_cpu::DnnTensor* tensors[] = {&o.x, o.has_b ? &o.b : NULL, o.has_mask ? &o.mask : NULL, &o.y};
        for (const auto* t : tensors) {
            if (!t || t->is_virtual || seen[t->number]) { continue; }
            seen[t->number] = true, used++;
            void* p = memory[t->number];
            if (!p) { return CUDNN_STATUS_BAD_PARAM; }
            if (t->by_value) {
                values[t->number] = cuda_cpu::dnn_read(*t, p);
            } else if ((size_t)p % (size_t)t->alignment || !cuda_cpu::on_device(p, t->bytes())) {
                return CUDNN_STATUS_BAD_PARAM;
            }
        }
    }
    int64_t bytes = 0, n = 0;
    void* workspace = pack->get<void*>(CUDNN_ATTR_VARIANT_PACK_WORKSPACE);
    cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &n, &bytes);
    if (used != memory.size() || !cuda_cpu::on_device(workspace, (size_t)bytes)) { return CUDNN_STATUS_BAD_PARAM; }
    cuda_cpu::submit(h->stream, [=] {
        memset(workspace, 0xff, (size_t)bytes);
        cuda_cpu::dnn_run(graph, memory, values);
    });
    return CUDNN_STATUS_SUCCESS;
}
#endif
