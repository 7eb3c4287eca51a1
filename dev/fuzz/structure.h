// structure.h: mutations that know the format, for libFuzzer's LLVMFuzzerCustomMutator. A valid file is taken apart,
// some of its fields, lengths and values are changed, and what must agree with them (offsets, sizes, checksums) is made
// to agree again, most times: so the input gets past the first check and reaches the ones behind it.
#ifndef MTA_FUZZ_STRUCTURE_H
#define MTA_FUZZ_STRUCTURE_H

#include "memory_files.h"
#include "mta/config.h"
#include "mta/safetensors.h"

int LLVMFuzzerInitialize(int* argc, char*** argv);
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n);
size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t n, size_t max, unsigned int seed);
size_t LLVMFuzzerMutate(uint8_t* data, size_t n, size_t max);
const char* __asan_default_options(void);

// ---------------------------------------------------------------------------------------------------------------------
// What every harness runs under

// A block stays poisoned until 1 MiB more was freed, which is more than an input takes (by default 256 MiB, which no
// cache holds). A report names the function that allocated, not its callers: the input that was kept tells more.
const char* __asan_default_options(void) {
    return "quarantine_size_mb=1:malloc_context_size=1:max_malloc_fill_size=256:detect_stack_use_after_return=0";
}

enum { SLOW_SECONDS = 10 };
typedef struct {
    volatile uint64_t input;  // counts
    uint64_t seen;            // by the last tick
} Clock;

static Clock* input_clock(void) {
    static Clock c;
    return &c;
}

// After each 10 s of processor time: is it still the same input? libFuzzer's own alarm counts the seconds of the wall,
// in which a busy machine may not have let it run at all.
static void on_tick(int number) {
    static const char text[] = "one input takes more than 10 s of processor time\n";
    Clock* c = input_clock();
    (void)number;
    if (c->seen == c->input && write(STDERR_FILENO, text, sizeof text - 1) > 0) { abort(); }
    c->seen = c->input;
}

int LLVMFuzzerInitialize(int* argc, char*** argv) {
    const struct itimerval every = {{SLOW_SECONDS, 0}, {SLOW_SECONDS, 0}};
    (void)argc;
    (void)argv;
    input_clock()->seen = UINT64_MAX;
    signal(SIGPROF, on_tick);
    if (setitimer(ITIMER_PROF, &every, NULL)) { abort(); }
    return 0;
}

typedef struct {
    uint64_t state;
} Dice;

static inline uint32_t roll(Dice* dice, size_t sides) {  // 0 .. sides - 1 (splitmix64)
    uint64_t z = dice->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)((z ^ z >> 31) % (sides ? sides : 1));
}

// A plain mutation of a text, as libFuzzer makes them.
static inline void mutate_bytes(Text* t, size_t max) {
    if (t->n > max) { t->n = max; }
    text_reserve(t, max);
    t->n = LLVMFuzzerMutate((uint8_t*)t->text, t->n, max);
    t->text[t->n] = 0;
}

// Bytes [at, at + n) of t become `with`.
static inline void text_replace(Text* t, size_t at, size_t n, const char* with, size_t m) {
    text_reserve(t, m);
    memmove(t->text + at + m, t->text + at + n, t->n - at - n + 1);
    memcpy(t->text + at, with, m);
    t->n += m - n;
}

// ---------------------------------------------------------------------------------------------------------------------
// JSON, by its tokens: a text that is only nearly JSON is changed too

typedef struct {
    size_t at, n;
    char kind;
    bool element;
} JsonSpan;  // kind: k key, " string, 0 number or word, { or [; element: of an array

enum { MAX_SPANS = 512, MAX_NESTING = 70 };

// Keys and values of the JSON in text: how many.
static inline int json_spans(const Text* t, JsonSpan* spans) {
    int open[MAX_NESTING], depth = 0, n = 0;
    for (size_t i = 0; i < t->n && n < MAX_SPANS;) {
        char c = t->text[i];
        size_t from = i++;
        if (c == '{' || c == '[') {
            spans[n] = (JsonSpan){from, 1, c, depth > 0 && spans[open[depth - 1]].kind == '['};
            if (depth < MAX_NESTING) { open[depth++] = n; }
            n++;
        } else if (c == '}' || c == ']') {
            if (depth) {
                JsonSpan* s = &spans[open[--depth]];
                s->n = i - s->at;
            }
        } else if (c == '"') {
            while (i < t->n && t->text[i] != '"') { i += t->text[i] == '\\' && i + 1 < t->n ? 2 : 1; }
            i += i < t->n;
            size_t next = i;
            while (next < t->n && strchr(" \n\t\r", t->text[next]) && t->text[next]) { next++; }
            bool key = next < t->n && t->text[next] == ':';
            spans[n++] = (JsonSpan){from, i - from, key ? 'k' : '"', depth > 0 && spans[open[depth - 1]].kind == '['};
        } else if (!strchr(" \n\t\r,:", c)) {
            while (i < t->n && !strchr(" \n\t\r,:{}[]\"", t->text[i])) { i++; }
            spans[n++] = (JsonSpan){from, i - from, '0', depth > 0 && spans[open[depth - 1]].kind == '['};
        }
    }
    return n;
}

static inline const char* odd_value(Dice* dice) {
    static const char* const values[] = {"0",
                                         "1",
                                         "-1",
                                         "2",
                                         "3",
                                         "4",
                                         "7",
                                         "8",
                                         "16",
                                         "63",
                                         "64",
                                         "127",
                                         "255",
                                         "256",
                                         "259",
                                         "300",
                                         "65535",
                                         "65536",
                                         "2147483647",
                                         "2147483648",
                                         "4294967295",
                                         "4294967296",
                                         "9007199254740993",
                                         "9223372036854775807",
                                         "9223372036854775808",
                                         "18446744073709551615",
                                         "1e308",
                                         "1e999",
                                         "-1e308",
                                         "1e-320",
                                         "0.5",
                                         "1.5",
                                         "-0",
                                         "1e2",
                                         "00",
                                         "1.",
                                         "true",
                                         "false",
                                         "null",
                                         "[]",
                                         "{}",
                                         "\"\"",
                                         "\"a\"",
                                         "[0]",
                                         "[null]",
                                         "[[]]",
                                         "{\"a\":1}",
                                         "[1,2,3]",
                                         "\"\\u0000\"",
                                         "\"\\ud800\"",
                                         "\"../a\"",
                                         "\"/\"",
                                         "\"\xff\"",
                                         "NaN"};
    return values[roll(dice, sizeof values / sizeof values[0])];
}

// A number near the one that stands there.
static inline void near_number(Dice* dice, const char* was, char* out, size_t n) {
    static const double change[] = {1, -1, 2, -2, 3, 8, 64};
    double x = strtod(was, NULL), y = roll(dice, 3) ? x + change[roll(dice, 7)] : roll(dice, 2) ? x * 2 : x / 2;
    snprintf(out, n, "%.17g", y);
}

// One change of a JSON text; words: keys and values that the reader knows.
static inline void mutate_json_once(Text* t, Dice* dice, const char* const* words, int n_words) {
    JsonSpan spans[MAX_SPANS];
    int n = json_spans(t, spans);
    char text[256];
    if (!n || !roll(dice, 40)) {
        mutate_bytes(t, t->n + 64);
        return;
    }
    JsonSpan s = spans[roll(dice, (size_t)n)], other = spans[roll(dice, (size_t)n)];
    const char* word = words[roll(dice, (size_t)n_words)];
    size_t end = s.at + s.n;
    switch (roll(dice, 8)) {
        case 0:
        case 1:  // another value; another name
            if (s.kind == 'k' || (s.kind == '"' && roll(dice, 2))) {
                snprintf(text, sizeof text, "\"%s\"", word);
            } else if (s.kind == '0' && roll(dice, 2)) {
                snprintf(text, sizeof text, "%.*s", (int)(s.n < 40 ? s.n : 40), t->text + s.at);
                char was[64];
                snprintf(was, sizeof was, "%.63s", text);
                near_number(dice, was, text, sizeof text);
            } else {
                snprintf(text, sizeof text, "%s", odd_value(dice));
            }
            text_replace(t, s.at, s.n, text, strlen(text));
            return;
        case 2: {  // a copy of another value or name of the same text
            if ((s.kind == 'k') != (other.kind == 'k') || other.n > 2048) { return; }
            char copy[2048];
            memcpy(copy, t->text + other.at, other.n);
            text_replace(t, s.at, s.n, copy, other.n);
            return;
        }
        case 3: {  // gone, with its key and a comma
            size_t from = s.at, to = end;
            if (s.kind == 'k') {
                for (int i = 0; i < n; i++) {
                    if (spans[i].at >= end && spans[i].at < end + 4) {
                        to = spans[i].at + spans[i].n;
                        break;
                    }
                }
            } else if (!s.element) {
                return;
            }
            while (to < t->n && strchr(" \n", t->text[to]) && t->text[to]) { to++; }
            if (to < t->n && t->text[to] == ',') {
                to++;
            } else {
                while (from > 0 && strchr(" \n", t->text[from - 1])) { from--; }
                if (from > 0 && t->text[from - 1] == ',') { from--; }
            }
            text_replace(t, from, to - from, "", 0);
            return;
        }
        case 4:  // an element once more
            if (!s.element || s.n > 2048) { return; }
            {
                char copy[2049] = ",";
                memcpy(copy + 1, t->text + s.at, s.n);
                text_replace(t, end, 0, copy, s.n + 1);
            }
            return;
        case 5:  // the same element very often
            if (!s.element || s.n > 24) { return; }
            for (uint32_t k = roll(dice, 80); k > 0; k--) {
                char copy[32] = ",";
                memcpy(copy + 1, t->text + s.at, s.n);
                text_replace(t, end, 0, copy, s.n + 1);
            }
            return;
        case 6:  // a member more, in front of a key: known or made up, or that key twice
            if (s.kind != 'k') { return; }
            if (roll(dice, 4)) {
                snprintf(text, sizeof text, "\"%s\":%s,", word, odd_value(dice));
            } else {
                snprintf(text, sizeof text, "%.*s:%s,", (int)(s.n < 100 ? s.n : 100), t->text + s.at, odd_value(dice));
            }
            text_replace(t, s.at, 0, text, strlen(text));
            return;
        default:  // deeper
            if (s.kind == 'k') { return; }
            for (uint32_t k = 1 + roll(dice, roll(dice, 8) ? 2 : 70); k > 0; k--) {
                text_replace(t, s.at + s.n, 0, "]", 1);
                text_replace(t, s.at, 0, "[", 1);
                s.n += 2;
            }
    }
}

static inline void mutate_json(Text* t, Dice* dice, const char* const* words, int n_words) {
    for (uint32_t k = 1 + roll(dice, 4); k > 0; k--) { mutate_json_once(t, dice, words, n_words); }
}

// The value written out again, in the form of json_parse's tree.
static inline void write_value(Text* t, const Json* j) {
    if (j->type == JSON_NULL) { text_printf(t, "null"); }
    if (j->type == JSON_BOOL) { text_printf(t, j->boolean ? "true" : "false"); }
    if (j->type == JSON_NUMBER && j->is_integer) { text_printf(t, "%lld", (long long)j->integer); }
    if (j->type == JSON_NUMBER && !j->is_integer) { text_json_number(t, j->number); }
    if (j->type == JSON_STRING) { text_json_string(t, j->string, j->length); }
    if (j->type != JSON_ARRAY && j->type != JSON_OBJECT) { return; }
    text_printf(t, j->type == JSON_ARRAY ? "[" : "{");
    for (const Json* c = j->child; c; c = c->next) {
        if (c != j->child) { text_printf(t, ","); }
        if (c->key) {
            text_json_string(t, c->key, strlen(c->key));
            text_printf(t, ":");
        }
        write_value(t, c);
    }
    text_printf(t, j->type == JSON_ARRAY ? "]" : "}");
}

// ---------------------------------------------------------------------------------------------------------------------
// config.json: every key of the fields' table and of the table of other programs' keys, and what their values are made
// of

enum { MAX_WORDS = 400 };

static inline const char* const* config_words(int* n) {
    static const char* words[MAX_WORDS];
    static const char* const more[] = {"llama",
                                       "LlamaForCausalLM",
                                       "LLaMAForCausalLM",
                                       "mistral",
                                       "MistralForCausalLM",
                                       "mta",
                                       "MtaForCausalLM",
                                       "qwen2",
                                       "gemma",
                                       "GPT2LMHeadModel",
                                       "llama3",
                                       "default",
                                       "linear",
                                       "dynamic",
                                       "yarn",
                                       "longrope",
                                       "rope_type",
                                       "type",
                                       "factor",
                                       "low_freq_factor",
                                       "high_freq_factor",
                                       "original_max_position_embeddings",
                                       "rope_theta",
                                       "silu",
                                       "swish",
                                       "gelu",
                                       "none",
                                       "group",
                                       "group_depth_scaled",
                                       "diff",
                                       "full_attention",
                                       "sliding_attention",
                                       "bytes",
                                       "toy",
                                       "gpt2",
                                       "cl100k_base",
                                       "o200k_base",
                                       "cl100k_base.tiktoken",
                                       "unheard_of"};
    static int count = 0;
    for (int i = 0; !count && i < CONFIG_FIELD_COUNT; i++) {
        const char* point = strchr(CONFIG_FIELDS[i].key, '.');
        words[i] = point ? point + 1 : CONFIG_FIELDS[i].key;
    }
    if (!count) {
        count = CONFIG_FIELD_COUNT;
        for (size_t i = 0; i < sizeof CONFIG_KEYS / sizeof CONFIG_KEYS[0]; i++) {
            for (const char* key = CONFIG_KEYS[i].keys; *key; key += strspn(key, "|")) {
                size_t length = strcspn(key, "|");
                words[count++] = strndup(key, length);
                key += length;
            }
        }
        for (size_t i = 0; i < sizeof more / sizeof more[0]; i++) { words[count++] = more[i]; }
        assert(count <= MAX_WORDS);
    }
    *n = count;
    return words;
}

// ---------------------------------------------------------------------------------------------------------------------
// safetensors

static const char* const TENSOR_WORDS[] = {"F32",
                                           "F16",
                                           "BF16",
                                           "F64",
                                           "I32",
                                           "I64",
                                           "U8",
                                           "BOOL",
                                           "F8",
                                           "dtype",
                                           "shape",
                                           "data_offsets",
                                           "__metadata__",
                                           "format",
                                           "pt",
                                           "model.embed_tokens.weight",
                                           "model.norm.weight",
                                           "lm_head.weight",
                                           "model.layers.0.input_layernorm.weight",
                                           "model.layers.0.self_attn.q_proj.weight",
                                           "model.layers.0.self_attn.kq_conv.weight",
                                           "model.layers.0.self_attn.head_mix.weight",
                                           "model.layers.0.self_attn.rotary_emb.inv_freq",
                                           "model.layers.1.mlp.up_proj.weight",
                                           "m.model.norm.weight",
                                           "master.model.norm.weight",
                                           ""};
enum { N_TENSOR_WORDS = sizeof TENSOR_WORDS / sizeof TENSOR_WORDS[0] };

// The header with the offsets that its shapes and types need, one tensor behind the other; *end: where the data ends.
// False where a shape is no shape or too large.
static inline bool tensors_laid_out(const Json* header, Text* out, size_t* end) {
    *end = 0;
    text_printf(out, "{");
    for (const Json* j = header->child; j; j = j->next) {
        const Json *dtype = json_get(j, "dtype"), *shape = json_get(j, "shape");
        size_t bytes = 0;
        text_printf(out, j == header->child ? "" : ",");
        text_json_string(out, j->key, strlen(j->key));
        text_printf(out, ":");
        for (int d = 0; dtype && dtype->type == JSON_STRING && d < DT_COUNT; d++) {
            if (!strcmp(dtype->string, dtype_name((DType)d))) { bytes = dtype_size((DType)d); }
        }
        if (!strcmp(j->key, "__metadata__") || !bytes || !shape || shape->type != JSON_ARRAY) {
            write_value(out, j);
            continue;
        }
        for (const Json* s = shape->child; s; s = s->next) {
            if (!s->is_integer || s->integer < 0 || s->integer > 4096 || bytes > 65536) { return false; }
            bytes *= (size_t)s->integer;
        }
        text_printf(out, "{\"dtype\":\"%s\",\"shape\":", dtype->string);
        write_value(out, shape);
        text_printf(out, ",\"data_offsets\":[%zu,%zu]}", *end, *end + bytes);
        *end += bytes;
        if (*end > 65536) { return false; }
    }
    text_printf(out, "}");
    return true;
}

// A safetensors file with a changed header, or changed values; then, most times, with offsets, data and length that fit
// it again.
static inline void mutate_safetensors(Text* t, Dice* dice) {
    uint64_t length = 0;
    if (t->n >= 8) { memcpy(&length, t->text, 8); }
    if (t->n < 8 || length > t->n - 8 || !roll(dice, 30)) {
        mutate_bytes(t, t->n + 64);
        return;
    }
    Text header = {NULL, 0, 0}, data = {NULL, 0, 0};
    text_append(&header, t->text + 8, (size_t)length);
    text_append(&data, t->text + 8 + length, t->n - 8 - (size_t)length);
    if (!roll(dice, 6) && data.n >= 8) {  // a value that is not finite, or any
        static const uint64_t odd[] = {0x7FC000007FC00000u, 0x7F8000007F800000u, 0x7FF0000000000000u, 1,
                                       0xFF7FFFFFFF7FFFFFu, 0x47F0000000000000u};
        memcpy(data.text + roll(dice, data.n / 8) * 8, &odd[roll(dice, 6)], 8);
    } else {
        mutate_json(&header, dice, TENSOR_WORDS, N_TENSOR_WORDS);
    }
    Json* j = roll(dice, 4) ? json_parse(header.text, header.n, NULL) : NULL;
    Text again = {NULL, 0, 0};
    size_t end = 0;
    if (j && j->type == JSON_OBJECT && tensors_laid_out(j, &again, &end)) {
        header.n = 0;
        text_append(&header, again.text, again.n);
        while (data.n < end) { text_append(&data, "\0\0\0\0\0\0\0\0", end - data.n < 8 ? end - data.n : 8); }
        data.n = end;
    }
    json_free(j);
    text_free(&again);
    length = header.n;
    if (!roll(dice, 40)) { length += (uint64_t)roll(dice, 3) - 1; }
    t->n = 0;
    text_append(t, (const char*)&length, 8);
    text_append(t, header.text, header.n);
    text_append(t, data.text ? data.text : "", data.n);
    text_free(&header);
    text_free(&data);
}

// ---------------------------------------------------------------------------------------------------------------------
// Several files in one input: name, NUL, length (4 bytes), content, and so on

enum { MAX_PARTS = 16, LONGEST_INPUT = 65536 };
typedef struct {
    char name[64];
    Text content;
} Part;
typedef struct {
    Part part[MAX_PARTS];
    int n;
} Parts;

static inline void parts_free(Parts* p) {
    for (int i = 0; i < p->n; i++) { text_free(&p->part[i].content); }
    p->n = 0;
}

static inline void parts_read(Parts* p, const uint8_t* data, size_t n) {
    memset(p, 0, sizeof *p);
    for (size_t at = 0; at < n && p->n < MAX_PARTS;) {
        const uint8_t* nul = (const uint8_t*)memchr(data + at, 0, n - at);
        size_t length = nul ? (size_t)(nul - data) - at : 64;
        uint32_t bytes = 0;
        if (length >= 64 || !length || n - at - length < 5 || memchr(data + at, '/', length) || data[at] == '.') {
            return;
        }
        Part* part = &p->part[p->n];
        memcpy(part->name, data + at, length + 1);
        memcpy(&bytes, data + at + length + 1, 4);
        at += length + 5;
        if (bytes > n - at) { return; }
        text_append(&part->content, (const char*)data + at, bytes);
        at += bytes;
        p->n++;
    }
}

static inline void parts_write(const Parts* p, Text* out) {
    for (int i = 0; i < p->n; i++) {
        const Part* part = &p->part[i];
        uint32_t bytes = (uint32_t)part->content.n;
        text_append(out, part->name, strlen(part->name) + 1);
        text_append(out, (const char*)&bytes, 4);
        text_append(out, part->content.text ? part->content.text : "", part->content.n);
    }
}

// The parts as files of that folder, until memory_clear.
static inline void parts_lay_out(const Parts* p, const char* folder) {
    for (int i = 0; i < p->n; i++) {
        const Text* content = &p->part[i].content;
        memory_add(folder, p->part[i].name, content->text, content->n);
    }
}

static inline Part* parts_find(Parts* p, const char* name) {
    for (int i = 0; i < p->n; i++) {
        if (!strcmp(p->part[i].name, name)) { return &p->part[i]; }
    }
    return NULL;
}

// What a custom mutator ends with: the text back into libFuzzer's buffer. Too long: unchanged.
static inline size_t mutated(Text* t, uint8_t* data, size_t n, size_t max) {
    size_t size = t->n <= max ? t->n : n;
    if (t->n <= max && t->n) { memcpy(data, t->text, t->n); }
    text_free(t);
    return size;
}

#endif
