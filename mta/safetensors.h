// safetensors.h: reads and writes safetensors files (8-byte header length, JSON header, raw little-endian data), whole
// or in several files under an index. Reading maps the files: tensors point into the mapping, nothing is copied, and no
// number of a header is believed before it is checked: header length, dtype, shape x size == offsets, no hole, no
// overlap, the data ends where the file ends, unique names. Writing is streamed: a header from a list, then the data in
// pieces of any size, a CRC-32 of the file on the way.
#ifndef MTA_SAFETENSORS_H
#define MTA_SAFETENSORS_H

#include "json.h"

#include <limits.h>

typedef enum {
    DT_F32,
    DT_F16,
    DT_BF16,
    DT_F64,
    DT_I32,
    DT_I64,
    DT_U8,
    DT_I8,
    DT_I16,
    DT_U16,
    DT_U32,
    DT_U64,
    DT_BOOL,
    DT_COUNT
} DType;

static inline size_t dtype_size(DType d) {  // bytes of an element
    static const uint8_t size[DT_COUNT] = {4, 2, 2, 8, 4, 8, 1, 1, 2, 2, 4, 8, 1};
    return size[d];
}

static inline const char* dtype_name(DType d) {
    static const char* const name[DT_COUNT] = {"F32", "F16", "BF16", "F64", "I32", "I64", "U8",
                                               "I8",  "I16", "U16",  "U32", "U64", "BOOL"};
    return name[d];
}

enum { ST_NAME_SIZE = 160, ST_MAX_DIMS = 8, ST_MAX_HEADER = 100000000, ST_MAX_FILES = 4096 };

typedef struct {
    char name[ST_NAME_SIZE];
    DType dtype;
    int ndim;  // 0: a scalar, one element
    size_t shape[ST_MAX_DIMS];
    size_t numel, bytes;
    const void* data;  // in the mapping; aligned only as far as the file aligns it: read by memcpy or st_to_f32
    const char* file;  // path, owned by the SafeTensors
} StTensor;

typedef struct {
    MappedFile* maps;  // n_files of them
    char** paths;
    int n_files;
    StTensor* tensors;  // n of them, sorted by name
    int n;
    Json* metadata;  // __metadata__ of the first file, or NULL
} SafeTensors;

// ---------------------------------------------------------------------------------------------------------------------
// Half precision

static inline float bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t f32_to_bf16(float f) {  // round to nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) { return (uint16_t)(bits >> 16 | 0x40); }
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023, bits;
    float f;
    if (exponent == 0) {  // zero or subnormal: fraction x 2^-24, exact in fp32
        f = (float)fraction * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    }
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t f32_to_f16(float f) {  // round to nearest, ties to even; beyond 65504: infinity
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t abs = bits & 0x7FFFFFFFu;
    if (abs > 0x7F800000u) { return (uint16_t)(sign | 0x7E00); }
    if (abs >= 0x477FF000u) { return (uint16_t)(sign | 0x7C00); }
    // below 2^-14: the addition rounds to multiples of 2^-24, the last bits of the sum are the result
    if (abs < 0x38800000u) {
        float a;
        memcpy(&a, &abs, 4);
        a += 0.5f;
        memcpy(&abs, &a, 4);
        return (uint16_t)(sign | (abs - 0x3F000000u));
    }
    return (uint16_t)(sign | ((abs - 0x38000000u + 0xFFFu + (abs >> 13 & 1)) >> 13));
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading

static inline void st_shape_text(char* out, size_t size, int ndim, const size_t* shape) {  // "[3, 4]"
    size_t n = (size_t)snprintf(out, size, "[");
    for (int i = 0; i < ndim && n < size; i++) {
        n += (size_t)snprintf(out + n, size - n, "%s%zu", i ? ", " : "", shape[i]);
    }
    if (n < size) { snprintf(out + n, size - n, "]"); }
}

static inline int st_by_name(const void* a, const void* b) {
    return strcmp(((const StTensor*)a)->name, ((const StTensor*)b)->name);
}

// in a file: by beginning, an empty tensor before the one it touches
static inline int st_by_place(const void* a, const void* b) {
    const StTensor* x = (const StTensor*)a;
    const StTensor* y = (const StTensor*)b;
    uintptr_t px = (uintptr_t)x->data, py = (uintptr_t)y->data;
    if (px != py) { return px < py ? -1 : 1; }
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static inline void safetensors_close(SafeTensors* s) {
    for (int i = 0; i < s->n_files; i++) {
        unmap_file(&s->maps[i]);
        free(s->paths[i]);
    }
    free(s->maps);
    free(s->paths);
    free(s->tensors);
    json_free(s->metadata);
    memset(s, 0, sizeof *s);
}

// One header entry; the data section is `size` bytes at `base`.
static inline bool st_parse_tensor(StTensor* t, const Json* j, const uint8_t* base, size_t size, const char* file,
                                   Error* e) {
    const char* dtype = json_text(json_get(j, "dtype"));
    const Json* shape = json_get(j, "shape");
    const Json* offsets = json_get(j, "data_offsets");
    int64_t begin = 0, end = 0, dim = 0;
    int d = 0;
    if (strlen(j->key) >= sizeof t->name) {
        return fail(e, "%s: tensor name of %zu bytes, at most %d: %.40s...", file, strlen(j->key), ST_NAME_SIZE - 1,
                    j->key);
    }
    snprintf(t->name, sizeof t->name, "%s", j->key);
    t->file = file;
    while (d < DT_COUNT && !(dtype && !strcmp(dtype, dtype_name((DType)d)))) { d++; }
    if (d == DT_COUNT) {
        return fail(e, "%s: tensor %s: dtype %.20s is unknown", file, t->name, dtype ? dtype : "(none)");
    }
    t->dtype = (DType)d;
    if (!shape || shape->type != JSON_ARRAY || shape->count > ST_MAX_DIMS) {
        return fail(e, "%s: tensor %s: shape must be an array of at most %d sizes", file, t->name, ST_MAX_DIMS);
    }
    t->numel = 1;
    for (const Json* s = shape->child; s; s = s->next) {
        if (!json_integer(s, 0, INT64_MAX, &dim) || !mul_size(t->numel, (size_t)dim, &t->numel)) {
            return fail(e, "%s: tensor %s: impossible shape", file, t->name);
        }
        t->shape[t->ndim++] = (size_t)dim;
    }
    if (!offsets || offsets->type != JSON_ARRAY || offsets->count != 2 ||
        !json_integer(offsets->child, 0, INT64_MAX, &begin) ||
        !json_integer(offsets->child->next, begin, INT64_MAX, &end)) {
        return fail(e, "%s: tensor %s: data_offsets must be [begin, end]", file, t->name);
    }
    if ((uint64_t)end > size) {
        return fail(e, "%s: tensor %s ends at byte %lld of the data, which has %zu: truncated?", file, t->name,
                    (long long)end, size);
    }
    if (!mul_size(t->numel, dtype_size(t->dtype), &t->bytes) || t->bytes != (size_t)(end - begin)) {
        return fail(e, "%s: tensor %s: its shape and %s need %zu bytes, data_offsets give %lld", file, t->name,
                    dtype_name(t->dtype), t->bytes, (long long)(end - begin));
    }
    t->data = base + begin;
    return true;
}

// Tensors of one file, sorted by place, must fill the data section exactly.
static inline bool st_check_layout(const StTensor* t, int n, const uint8_t* base, size_t size, const char* file,
                                   Error* e) {
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        size_t begin = (size_t)((const uint8_t*)t[i].data - base);
        if (begin != at) {
            return fail(e, "%s: tensor %s begins at byte %zu of the data, wanted %zu: %s", file, t[i].name, begin, at,
                        begin < at ? "it overlaps another" : "there is a hole");
        }
        at += t[i].bytes;
    }
    return at == size || fail(e, "%s: the tensors end at byte %zu of the data, the file at %zu", file, at, size);
}

// Adds the tensors of a file image that outlives s; `file` too. The fuzzer's entry.
static inline bool safetensors_add(SafeTensors* s, const uint8_t* image, size_t size, const char* file, Error* e) {
    uint64_t length = 0;
    if (size < 8) { return fail(e, "%s: %zu bytes are no safetensors file", file, size); }
    memcpy(&length, image, 8);
    if (length > size - 8 || length > ST_MAX_HEADER) {
        return fail(e, "%s: header of %llu bytes in a file of %zu (at most %d): not safetensors, or truncated", file,
                    (unsigned long long)length, size, ST_MAX_HEADER);
    }
    const uint8_t* base = image + 8 + length;
    size_t data = size - 8 - (size_t)length;
    Error why = {{0}};
    Json* header = json_parse((const char*)image + 8, (size_t)length, &why);
    if (!header) { return fail(e, "%s: header: %s", file, why.text); }
    bool good = header->type == JSON_OBJECT || fail(e, "%s: the header is no JSON object", file);
    StTensor* all = good ? (StTensor*)realloc(s->tensors, ((size_t)s->n + header->count + 1) * sizeof *all) : NULL;
    if (good && (!all || header->count > INT_MAX / 2 || s->n > INT_MAX / 2)) {
        good = fail(e, "%s: out of memory for %zu tensors", file, header->count);
    }
    if (all) { s->tensors = all; }
    int first = s->n;
    for (Json** link = &header->child; good && *link;) {
        Json* j = *link;
        if (strcmp(j->key, "__metadata__")) {
            StTensor* t = &s->tensors[s->n++];
            memset(t, 0, sizeof *t);
            good = st_parse_tensor(t, j, base, data, file, e);
        } else {
            for (const Json* m = j->child; good && m; m = m->next) {
                good = m->type == JSON_STRING ||
                       fail(e, "%s: __metadata__: %.80s is no string", file, m->key ? m->key : "?");
            }
            good = good && (j->type == JSON_OBJECT || fail(e, "%s: __metadata__ is no object", file));
            if (good && !s->metadata) {  // kept: out of the list
                *link = j->next;
                j->next = NULL;
                s->metadata = j;
                continue;
            }
        }
        link = &j->next;
    }
    json_free(header);
    if (!good) { return false; }
    if (s->n > first) { qsort(s->tensors + first, (size_t)(s->n - first), sizeof *s->tensors, st_by_place); }
    if (!st_check_layout(s->tensors + first, s->n - first, base, data, file, e)) { return false; }
    if (s->n) { qsort(s->tensors, (size_t)s->n, sizeof *s->tensors, st_by_name); }
    for (int i = 1; i < s->n; i++) {
        if (!strcmp(s->tensors[i].name, s->tensors[i - 1].name)) {
            return fail(e, "%s: tensor %s occurs twice (%s)", file, s->tensors[i].name, s->tensors[i - 1].file);
        }
    }
    return true;
}

static inline bool st_add_file(SafeTensors* s, const char* path, Error* e) {
    size_t count = (size_t)s->n_files + 1;
    MappedFile* maps = (MappedFile*)realloc(s->maps, count * sizeof *maps);
    if (maps) { s->maps = maps; }
    char** paths = (char**)realloc(s->paths, count * sizeof *paths);
    if (paths) { s->paths = paths; }
    char* name = strdup(path);
    if (!maps || !paths || !name) {
        free(name);
        return fail(e, "%s: out of memory", path);
    }
    if (!map_file(&s->maps[count - 1], path, e)) {
        free(name);
        return false;
    }
    s->paths[count - 1] = name;
    s->n_files++;
    return safetensors_add(s, s->maps[count - 1].data, s->maps[count - 1].size, name, e);
}

// One file, mapped. On failure s is closed already.
static inline bool safetensors_open(SafeTensors* s, const char* path, Error* e) {
    memset(s, 0, sizeof *s);
    if (st_add_file(s, path, e)) { return true; }
    safetensors_close(s);
    return false;
}

static inline int st_name_order(const void* name, const void* tensor) {
    return strcmp((const char*)name, ((const StTensor*)tensor)->name);
}

static inline const StTensor* safetensors_find(const SafeTensors* s, const char* name) {
    if (!s->n) { return NULL; }
    return (const StTensor*)bsearch(name, s->tensors, (size_t)s->n, sizeof *s->tensors, st_name_order);
}

// The files that the index's weight_map names. They must be plain names: an index cannot point out of its directory.
static inline bool st_add_indexed(SafeTensors* s, const char* dir, const char* path, const Json* index, Error* e) {
    const Json* map = json_get(index, "weight_map");
    char full[PATH_SIZE];
    if (!map || map->type != JSON_OBJECT || !map->child) { return fail(e, "%s: no weight_map", path); }
    for (const Json* j = map->child; j; j = j->next) {
        if (j->type != JSON_STRING || !j->length || strlen(j->string) != j->length || strchr(j->string, '/') ||
            j->length > 255) {
            return fail(e, "%s: %.80s: not the name of a file beside it", path, j->key);
        }
        path_join(full, sizeof full, dir, j->string);
        bool known = false;
        for (int i = 0; i < s->n_files && !known; i++) { known = !strcmp(s->paths[i], full); }
        if (!known && s->n_files == ST_MAX_FILES) { return fail(e, "%s: more than %d files", path, ST_MAX_FILES); }
        if (!known && !st_add_file(s, full, e)) { return false; }
    }
    for (const Json* j = map->child; j; j = j->next) {
        const StTensor* t = safetensors_find(s, j->key);
        path_join(full, sizeof full, dir, j->string);
        if (!t || strcmp(t->file, full)) {
            return fail(e, "%s: tensor %.100s is not in %.100s", path, j->key, j->string);
        }
    }
    return true;
}

// model.safetensors, else the files of model.safetensors.index.json. On failure s is closed already.
static inline bool safetensors_open_dir(SafeTensors* s, const char* dir, Error* e) {
    char path[PATH_SIZE];
    memset(s, 0, sizeof *s);
    path_join(path, sizeof path, dir, "model.safetensors");
    if (file_exists(path) || link_leads_nowhere(path)) { return safetensors_open(s, path, e); }
    path_join(path, sizeof path, dir, "model.safetensors.index.json");
    if (!file_exists(path) && !link_leads_nowhere(path)) {
        return fail(e, "%s: neither model.safetensors nor model.safetensors.index.json in it", dir);
    }
    Json* index = json_read(path, ST_MAX_HEADER, e);
    bool good = index && st_add_indexed(s, dir, path, index, e);
    json_free(index);
    if (!good) { safetensors_close(s); }
    return good;
}

// Has the file a tensor of this name?
static inline bool safetensors_holds(const char* path, const char* name, bool* holds, Error* e) {
    SafeTensors s;
    if (!safetensors_open(&s, path, e)) { return false; }
    *holds = safetensors_find(&s, name) != NULL;
    safetensors_close(&s);
    return true;
}

static inline const char* safetensors_metadata(const SafeTensors* s, const char* key) {  // NULL if absent
    return json_text(json_get(s->metadata, key));
}

static inline bool st_finite(const StTensor* t, const float* values, Error* e) {
    for (size_t i = 0; i < t->numel; i++) {
        if (!isfinite(values[i])) { return fail(e, "%s: tensor %s: value %zu is not finite", t->file, t->name, i); }
    }
    return true;
}

// Converts numel values to fp32. Refuses other dtypes and what is not finite in fp32, with tensor and index.
static inline bool st_to_f32(const StTensor* t, float* out, Error* e) {
    const uint8_t* p = (const uint8_t*)t->data;
    size_t n = t->numel;
    if (t->dtype == DT_F32) {
        if (n) { memcpy(out, p, n * 4); }
    } else if (t->dtype == DT_BF16 || t->dtype == DT_F16) {
        for (size_t i = 0; i < n; i++) {
            uint16_t h;
            memcpy(&h, p + 2 * i, 2);
            out[i] = t->dtype == DT_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
        }
    } else if (t->dtype == DT_F64) {
        for (size_t i = 0; i < n; i++) {
            double d;
            memcpy(&d, p + 8 * i, 8);
            out[i] = fabs(d) <= 3.40282346638528859e38 ? (float)d : (float)INFINITY;
        }
    } else {
        return fail(e, "%s: tensor %s: dtype %s, wanted F32, BF16, F16 or F64", t->file, t->name, dtype_name(t->dtype));
    }
    return st_finite(t, out, e);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

typedef struct {
    const char* name;
    DType dtype;
    int ndim;
    size_t shape[ST_MAX_DIMS];
} StEntry;

typedef struct {
    int fd;  // -1: closed or failed
    char path[PATH_SIZE];
    uint64_t total, written;
    uint32_t crc;
} StWriter;

static inline void st_writer_abort(StWriter* w) {  // closes and removes the file
    if (w->fd >= 0) {
        close(w->fd);
        unlink_regular(w->path);
    }
    w->fd = -1;
}

// The next bytes of the data section, tensors in the order of the entries, in pieces of any size. On failure the file
// is gone.
static inline bool st_writer_put(StWriter* w, const void* data, size_t bytes, Error* e) {
    if (w->fd < 0) { return fail(e, "%s: not open for writing", w->path); }
    assert(bytes <= w->total - w->written);
    if (!write_all(w->fd, data, bytes)) {
        fail(e, "%s: cannot write: %s", w->path, strerror(errno));
        st_writer_abort(w);
        return false;
    }
    w->crc = crc32_update(w->crc, data, bytes);
    w->written += bytes;
    return true;
}

// Creates the file and writes its header: `__metadata__` is format = "pt" and n_pairs further (key, value) strings. The
// data section starts at a multiple of 64 bytes: the header ends in spaces.
static inline bool st_writer_open(StWriter* w, const char* path, const StEntry* entries, int n,
                                  const char* const* metadata_pairs, int n_pairs, Error* e) {
    Text t = {NULL, 0, 0};
    size_t at = 0;
    text_printf(&t, "{\"__metadata__\":{\"format\":\"pt\"");
    for (int i = 0; i < n_pairs; i++) {
        text_append(&t, ",", 1);
        text_json_string(&t, metadata_pairs[2 * i], strlen(metadata_pairs[2 * i]));
        text_append(&t, ":", 1);
        text_json_string(&t, metadata_pairs[2 * i + 1], strlen(metadata_pairs[2 * i + 1]));
    }
    text_append(&t, "}", 1);
    for (int i = 0; i < n; i++) {
        size_t numel = 1;
        text_append(&t, ",", 1);
        text_json_string(&t, entries[i].name, strlen(entries[i].name));
        text_printf(&t, ":{\"dtype\":\"%s\",\"shape\":[", dtype_name(entries[i].dtype));
        for (int d = 0; d < entries[i].ndim; d++) {
            text_printf(&t, "%s%zu", d ? "," : "", entries[i].shape[d]);
            numel *= entries[i].shape[d];
        }
        size_t bytes = numel * dtype_size(entries[i].dtype);
        text_printf(&t, "],\"data_offsets\":[%zu,%zu]}", at, at + bytes);
        at += bytes;
    }
    text_append(&t, "}", 1);
    while ((t.n + 8) % 64) { text_append(&t, " ", 1); }
    memset(w, 0, sizeof *w);
    int len = snprintf(w->path, sizeof w->path, "%s", path);
    w->fd = len < PATH_SIZE ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644) : -1;
    bool good = w->fd >= 0 || fail(e, "%s: cannot create: %s", path, strerror(errno));
    uint64_t length = t.n;
    w->total = 8 + length + at;
    good = good && st_writer_put(w, &length, 8, e) && st_writer_put(w, t.text, t.n, e);
    text_free(&t);
    return good;
}

// Syncs and closes a complete file; its size and CRC-32 where asked for. On failure the file is gone.
static inline bool st_writer_close(StWriter* w, uint64_t* bytes, uint32_t* crc, Error* e) {
    if (w->fd < 0) { return fail(e, "%s: not open for writing", w->path); }
    if (w->written != w->total) {
        fail(e, "%s: %llu bytes written of %llu", w->path, (unsigned long long)w->written,
             (unsigned long long)w->total);
        st_writer_abort(w);
        return false;
    }
    bool good = fsync(w->fd) == 0;
    int why = errno;
    if (close(w->fd) && good) {
        good = false;
        why = errno;
    }
    w->fd = -1;
    if (!good) {
        unlink_regular(w->path);
        return fail(e, "%s: cannot write: %s", w->path, strerror(why));
    }
    if (bytes) { *bytes = w->written; }
    if (crc) { *crc = w->crc; }
    return true;
}

#endif
