// mta/onednn.h: products of matrices in bf16, with sums in fp32, by oneDNN 2 or 3 (Debian 12 has 2.6, Debian 13 has
// 3.7). Whatever differs between the two stands in the first part. Nothing here without MTA_ONEDNN, which the Makefile
// defines where it finds the library.
#ifndef MTA_ONEDNN_H
#define MTA_ONEDNN_H
#ifdef MTA_ONEDNN

#include <oneapi/dnnl/dnnl.h>
#include <stdbool.h>
#include <string.h>

#include "util.h"

static inline void dnnl_check(dnnl_status_t status, const char* what) {
    if (status != dnnl_success) { die("oneDNN: %s: status %d", what, (int)status); }
}

// A product of any size. What is transposed, alpha and whether it adds to what is there (beta) are its own.
typedef struct {
    dnnl_primitive_t primitive;
    dnnl_memory_t alpha;  // oneDNN 3 is given it at each execution, as argument DNNL_ALPHA; NULL where it is not
} DnnlProduct;

// ---- what differs between the two versions
//
// The shape of a matrix, dnnl_memory_desc_t, is a structure in oneDNN 2, and in oneDNN 3 a pointer to one that must be
// freed. Where a function takes a shape that is there, DNNL_SHAPE(d) gives it.

#if DNNL_VERSION_MAJOR < 3
#define DNNL_SHAPE(d) (&(d))
#define DNNL_ALPHA 0

static inline void dnnl_shape_create(dnnl_memory_desc_t* d, int axes, const dnnl_dims_t size, dnnl_data_type_t type,
                                     const dnnl_dims_t stride) {
    dnnl_check(dnnl_memory_desc_init_by_strides(d, axes, size, type, stride), "a matrix");
}

static inline void dnnl_shape_free(dnnl_memory_desc_t* d) { (void)d; }

static inline dnnl_memory_t dnnl_attributes(dnnl_engine_t engine, dnnl_primitive_attr_t attributes,
                                            dnnl_post_ops_t after, float alpha, bool add) {
    (void)engine;
    dnnl_check(dnnl_primitive_attr_set_output_scales(attributes, 1, 0, &alpha), "alpha");
    if (add) { dnnl_check(dnnl_post_ops_append_sum(after, 1), "beta"); }
    return NULL;
}

// of: the shapes of A, B and the result.
static inline dnnl_primitive_desc_t dnnl_describe_product(dnnl_engine_t engine, dnnl_memory_desc_t of[3],
                                                          dnnl_primitive_attr_t attributes) {
    dnnl_matmul_desc_t matmul;
    dnnl_primitive_desc_t description;
    dnnl_check(dnnl_matmul_desc_init(&matmul, &of[0], &of[1], NULL, &of[2]), "a product");
    dnnl_check(dnnl_primitive_desc_create(&description, &matmul, attributes, engine, NULL), "a product in bf16");
    return description;
}
#else
#define DNNL_SHAPE(d) (d)
#define DNNL_ALPHA (DNNL_ARG_ATTR_SCALES | DNNL_ARG_SRC)

static inline void dnnl_shape_create(dnnl_memory_desc_t* d, int axes, const dnnl_dims_t size, dnnl_data_type_t type,
                                     const dnnl_dims_t stride) {
    dnnl_check(dnnl_memory_desc_create_with_strides(d, axes, size, type, stride), "a matrix");
}

static inline void dnnl_shape_free(dnnl_memory_desc_t* d) { dnnl_memory_desc_destroy(*d); }

// A linear function after the product would hold alpha too, but with a sum behind it oneDNN 3.7 has reference code
// alone.
static inline dnnl_memory_t dnnl_attributes(dnnl_engine_t engine, dnnl_primitive_attr_t attributes,
                                            dnnl_post_ops_t after, float alpha, bool add) {
    const dnnl_dims_t one = {1};
    dnnl_memory_desc_t number;
    dnnl_memory_t memory = NULL;
    void* at;
    if (add) { dnnl_check(dnnl_post_ops_append_sum(after, 1, 0, dnnl_data_type_undef), "beta"); }
    if (alpha == 1) { return NULL; }
    dnnl_check(dnnl_primitive_attr_set_scales_mask(attributes, DNNL_ARG_SRC, 0), "alpha");
    dnnl_shape_create(&number, 1, one, dnnl_f32, one);
    dnnl_check(dnnl_memory_create(&memory, number, engine, DNNL_MEMORY_ALLOCATE), "alpha");
    dnnl_check(dnnl_memory_get_data_handle(memory, &at), "alpha");
    memcpy(at, &alpha, sizeof alpha);
    dnnl_shape_free(&number);
    return memory;
}

static inline dnnl_primitive_desc_t dnnl_describe_product(dnnl_engine_t engine, dnnl_memory_desc_t of[3],
                                                          dnnl_primitive_attr_t attributes) {
    dnnl_primitive_desc_t description;
    dnnl_check(dnnl_matmul_primitive_desc_create(&description, engine, of[0], of[1], NULL, of[2], attributes),
               "a product in bf16");
    return description;
}
#endif

// ---- what is the same

// The shape of a matrix (rows,cols), or of the transpose of one (cols,rows); ld and sizes may be DNNL_RUNTIME_DIM_VAL.
// To be freed by dnnl_shape_free.
static inline dnnl_memory_desc_t dnnl_matrix(bool t, dnnl_dim_t rows, dnnl_dim_t cols, dnnl_dim_t ld,
                                             dnnl_data_type_t type) {
    dnnl_memory_desc_t d;
    dnnl_dims_t size = {rows, cols}, stride = {t ? 1 : ld, t ? ld : 1};
    dnnl_shape_create(&d, 2, size, type, stride);
    return d;
}

// The caller frees it by dnnl_product_free.
static inline DnnlProduct dnnl_product(dnnl_engine_t engine, bool ta, bool tb, float alpha, bool add) {
    const dnnl_dim_t any = DNNL_RUNTIME_DIM_VAL;
    dnnl_memory_desc_t of[3] = {dnnl_matrix(ta, any, any, any, dnnl_bf16), dnnl_matrix(tb, any, any, any, dnnl_bf16),
                                dnnl_matrix(false, any, any, any, dnnl_f32)};
    dnnl_primitive_attr_t attributes;
    dnnl_post_ops_t after;
    DnnlProduct product;
    dnnl_check(dnnl_primitive_attr_create(&attributes), "attributes");
    dnnl_check(dnnl_post_ops_create(&after), "beta");
    product.alpha = dnnl_attributes(engine, attributes, after, alpha, add);
    dnnl_check(dnnl_primitive_attr_set_post_ops(attributes, after), "beta");
    dnnl_primitive_desc_t description = dnnl_describe_product(engine, of, attributes);
    dnnl_check(dnnl_primitive_create(&product.primitive, description), "a product in bf16");
    dnnl_primitive_desc_destroy(description);
    dnnl_post_ops_destroy(after);
    dnnl_primitive_attr_destroy(attributes);
    for (int i = 0; i < 3; i++) { dnnl_shape_free(&of[i]); }
    return product;
}

static inline void dnnl_product_free(DnnlProduct* p) {
    dnnl_primitive_destroy(p->primitive);
    if (p->alpha) { dnnl_memory_destroy(p->alpha); }
}

// data: A and B in bf16, the result in fp32; shape: theirs, which are freed here. Inside a parallel loop oneDNN keeps
// to one thread.
static inline void dnnl_multiply(const DnnlProduct* p, dnnl_engine_t engine, dnnl_memory_desc_t shape[3],
                                 void* const data[3]) {
    dnnl_exec_arg_t arguments[4] = {
        {DNNL_ARG_SRC, NULL}, {DNNL_ARG_WEIGHTS, NULL}, {DNNL_ARG_DST, NULL}, {DNNL_ALPHA, p->alpha}};
    dnnl_stream_t stream;
    dnnl_check(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags), "a stream");
    for (int i = 0; i < 3; i++) {
        dnnl_check(dnnl_memory_create(&arguments[i].memory, DNNL_SHAPE(shape[i]), engine, data[i]), "a matrix");
    }
    dnnl_check(dnnl_primitive_execute(p->primitive, stream, p->alpha ? 4 : 3, arguments), "a product");
    for (int i = 0; i < 3; i++) {
        dnnl_memory_destroy(arguments[i].memory);
        dnnl_shape_free(&shape[i]);
    }
    dnnl_stream_destroy(stream);
}

#endif
#endif
