// mta/config.h: what a model is: its configuration (config.json), the presets, the kinds of attention, and the list of
// its tensors.
//
// One Config describes every model of this project (LLaMA with Multi-Token Attention, or the DIFF Transformer); its
// fields stand in one table, which drives config.json, its checks, the trainers' options and what makes another model.
// Models of others are read where their mathematics is known to be this one, else refused. Keys and tensor names are
// those of Hugging Face's LLaMA plus the MTA keys of dev/MODEL.md. The tensor list is walked by initialisation,
// checkpoints, the optimizer and the tests, so that names, shapes and memory layout are said once.
#ifndef MTA_CONFIG_H
#define MTA_CONFIG_H

#include "util.h"
#include "json.h"

#include <math.h>

enum {
    MAX_LAYERS = 512,  // bounds that keep every product of sizes far inside 64 bits
    MAX_HEADS = 1024,
    MAX_DIM = 1 << 17,
    MAX_VOCAB = 1 << 22,
    MAX_EOS = 64,     // ids that end a document
    MAX_KERNEL = 63,  // of either side of a convolution
    MAX_CONTEXT = 1 << 24
};

typedef enum { ATTENTION_MTA, ATTENTION_DIFF } AttentionType;
typedef enum { HEAD_NORM_NONE, HEAD_NORM_GROUP, HEAD_NORM_GROUP_DEPTH_SCALED } HeadNorm;

// The members that stand in config.json have a row each in CONFIG_FIELDS below: a new one is a member here and a row
// there.
typedef struct {
    int vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads;
    int max_position_embeddings;
    double rope_theta, rms_norm_eps;
    bool tie_word_embeddings;
    // rope_scaling of type "llama3" (factor 0 = none): frequencies of long wavelengths are divided by factor
    double rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    int rope_original_context;
    int sliding_window;  // positions that attention sees in the file that was read, no fewer than its context; 0 = all
    int bos_token_id, eos_token_id;           // -1 = none
    int other_eos[MAX_EOS - 1], n_other_eos;  // of a list of eos_token_id, those after the first
    char tokenizer[256];                      // built-in name or rank file beside config.json, "" = unknown
    char tokenizer_pattern[32];  // how a rank file's text is split, where its number of ranks does not tell; else ""
    AttentionType attention_type;
    bool kq_conv_layer[MAX_LAYERS];            // true where layer l has key-query convolutions
    int kq_conv_query_size, kq_conv_key_size;  // cq, ck (odd)
    bool kq_conv_pre_softmax, kq_conv_post_softmax;
    int head_mix_pre_softmax, head_mix_post_softmax;  // group size ch, 0 = off
    HeadNorm head_norm;
    bool head_gate;
} Config;

// ---------------------------------------------------------------------------------------------------------------------
// The one table of fields: config.json in and out, the ranges of config_check, the trainers' options, and what makes
// another model.

typedef enum {
    FIELD_INT,     // int
    FIELD_NUMBER,  // double
    FIELD_SWITCH,  // bool
    FIELD_CHOICE,  // an enumeration, in the order of `words`
    FIELD_LAYERS,  // bool [MAX_LAYERS], in JSON the list of the layers that have it
    FIELD_TOKEN,   // int, an id, -1 = none
    FIELD_EOS,     // eos_token_id with other_eos: an id or a list of them
    FIELD_NAME     // char [min]: a short string without '/'
} FieldType;

// Where a field stands in config.json, in the order in which it is written. PART_ATTENTION: all that LLaMA does not
// have. A model that uses any of it is written as an "mta", else as a "llama" without these fields (config_is_plain):
// it uses a field of CHANGE_MODEL where that is not at its default, and those of CHANGE_CONV where a layer has a
// convolution.
typedef enum { PART_SIZES, PART_CONTEXT, PART_NUMBERS, PART_ROPE, PART_TOKENS, PART_ATTENTION } FieldPart;

// What a change of the field means: nothing for the weights; another model; another model where a layer has
// convolutions.
typedef enum { CHANGE_FREE, CHANGE_MODEL, CHANGE_CONV } FieldChange;

typedef struct {
    const char* key;  // in config.json; after a point inside of that object
    FieldType type;
    FieldPart part;
    size_t offset;    // in Config
    double value;     // where the key is absent
    double min, max;  // accepted
    FieldChange change;
    const char* words;  // FIELD_CHOICE: "a|b|c"
    const char* flag;   // the trainers' option, NULL: none
    const char* help;
} ConfigField;

#define AT(member) offsetof(Config, member)
static const ConfigField CONFIG_FIELDS[] = {
    {"vocab_size", FIELD_INT, PART_SIZES, AT(vocab_size), 32000, 1, MAX_VOCAB, CHANGE_MODEL, NULL, "--vocab-size",
     "vocabulary (default: a configuration file's; a preset's, or that of the shards or the tokenizer if larger)"},
    {"hidden_size", FIELD_INT, PART_SIZES, AT(hidden_size), 4096, 2, MAX_DIM, CHANGE_MODEL, NULL, "--hidden-size",
     "width of the residual stream"},
    {"intermediate_size", FIELD_INT, PART_SIZES, AT(intermediate_size), 11008, 1, MAX_DIM, CHANGE_MODEL, NULL,
     "--intermediate-size", "hidden units of the MLP"},
    {"num_hidden_layers", FIELD_INT, PART_SIZES, AT(num_hidden_layers), 32, 1, MAX_LAYERS, CHANGE_MODEL, NULL,
     "--num-hidden-layers", "layers"},
    {"num_attention_heads", FIELD_INT, PART_SIZES, AT(num_attention_heads), 32, 1, MAX_HEADS, CHANGE_MODEL, NULL,
     "--num-attention-heads", "heads"},
    {"num_key_value_heads", FIELD_INT, PART_SIZES, AT(num_key_value_heads), 0, 1, MAX_HEADS, CHANGE_MODEL,
     NULL,  // 0: as heads
     "--num-key-value-heads", "key/value heads (grouped-query attention)"},
    {"max_position_embeddings", FIELD_INT, PART_CONTEXT, AT(max_position_embeddings), 2048, 1, MAX_CONTEXT, CHANGE_FREE,
     NULL, "--max-position-embeddings",
     "context length of the model (default: --seq-len; a configuration file's, or the resumed run's, if that is "
     "larger)"},
    {"rope_theta", FIELD_NUMBER, PART_NUMBERS, AT(rope_theta), 10000, 1e-3, 1e12, CHANGE_MODEL, NULL, "--rope-theta",
     "base of RoPE's frequencies"},
    {"rms_norm_eps", FIELD_NUMBER, PART_NUMBERS, AT(rms_norm_eps), 1e-6, 1e-20, 0.1, CHANGE_MODEL, NULL,
     "--rms-norm-eps", "epsilon of RMSNorm"},
    {"tie_word_embeddings", FIELD_SWITCH, PART_NUMBERS, AT(tie_word_embeddings), 0, 0, 1, CHANGE_MODEL, NULL,
     "--tie-word-embeddings", "classifier shares the embedding's weights"},
    {"rope_scaling.factor", FIELD_NUMBER, PART_ROPE, AT(rope_factor), 0, 1, 1e9, CHANGE_MODEL, NULL, NULL, NULL},
    {"rope_scaling.low_freq_factor", FIELD_NUMBER, PART_ROPE, AT(rope_low_freq_factor), 0, 1e-9, 1e9, CHANGE_MODEL,
     NULL, NULL, NULL},
    {"rope_scaling.high_freq_factor", FIELD_NUMBER, PART_ROPE, AT(rope_high_freq_factor), 0, 1e-9, 1e9, CHANGE_MODEL,
     NULL, NULL, NULL},
    {"rope_scaling.original_max_position_embeddings", FIELD_INT, PART_ROPE, AT(rope_original_context), 0, 1,
     MAX_CONTEXT, CHANGE_MODEL, NULL, NULL, NULL},
    {"bos_token_id", FIELD_TOKEN, PART_TOKENS, AT(bos_token_id), -1, -1, MAX_VOCAB, CHANGE_FREE, NULL, NULL, NULL},
    {"eos_token_id", FIELD_EOS, PART_TOKENS, AT(eos_token_id), -1, -1, MAX_VOCAB, CHANGE_FREE, NULL, NULL, NULL},
    {"tokenizer", FIELD_NAME, PART_TOKENS, AT(tokenizer), 0, sizeof((Config*)0)->tokenizer, 0, CHANGE_FREE, NULL, NULL,
     NULL},
    {"tokenizer_pattern", FIELD_NAME, PART_TOKENS, AT(tokenizer_pattern), 0, sizeof((Config*)0)->tokenizer_pattern, 0,
     CHANGE_FREE, NULL, NULL, NULL},
    {"attention_type", FIELD_CHOICE, PART_ATTENTION, AT(attention_type), ATTENTION_MTA, 0, 1, CHANGE_MODEL, "mta|diff",
     "--attention-type", "config.json's attention_type"},
    {"kq_conv_layers", FIELD_LAYERS, PART_ATTENTION, AT(kq_conv_layer), 0, 0, 0, CHANGE_CONV, NULL, "--kq-conv-layers",
     "layers with key-query convolution, from 0, like 2,6,10"},
    {"kq_conv_query_size", FIELD_INT, PART_ATTENTION, AT(kq_conv_query_size), 6, 1, MAX_KERNEL, CHANGE_CONV, NULL,
     "--kq-conv-query-size", "queries the convolution spans, cq"},
    {"kq_conv_key_size", FIELD_INT, PART_ATTENTION, AT(kq_conv_key_size), 11, 1, MAX_KERNEL, CHANGE_CONV, NULL,
     "--kq-conv-key-size", "keys the convolution spans, ck, odd"},
    {"kq_conv_pre_softmax", FIELD_SWITCH, PART_ATTENTION, AT(kq_conv_pre_softmax), 0, 0, 1, CHANGE_CONV, NULL,
     "--kq-conv-pre-softmax", "convolution before the softmax"},
    {"kq_conv_post_softmax", FIELD_SWITCH, PART_ATTENTION, AT(kq_conv_post_softmax), 0, 0, 1, CHANGE_CONV, NULL,
     "--kq-conv-post-softmax", "convolution after the softmax"},
    {"head_mix_pre_softmax", FIELD_INT, PART_ATTENTION, AT(head_mix_pre_softmax), 0, 0, MAX_HEADS, CHANGE_MODEL, NULL,
     "--head-mix-pre-softmax", "heads mixed before the softmax, 0 = off"},
    {"head_mix_post_softmax", FIELD_INT, PART_ATTENTION, AT(head_mix_post_softmax), 0, 0, MAX_HEADS, CHANGE_MODEL, NULL,
     "--head-mix-post-softmax", "heads mixed after the softmax, 0 = off"},
    {"head_norm", FIELD_CHOICE, PART_ATTENTION, AT(head_norm), HEAD_NORM_NONE, 0, 2, CHANGE_MODEL,
     "none|group|group_depth_scaled", "--head-norm", "norm of each head's output"},
    {"head_gate", FIELD_SWITCH, PART_ATTENTION, AT(head_gate), 0, 0, 1, CHANGE_MODEL, NULL, "--head-gate",
     "sigmoid gate of each head's output"},
};
#undef AT
enum { CONFIG_FIELD_COUNT = sizeof CONFIG_FIELDS / sizeof CONFIG_FIELDS[0] };

// The row of a key; -1: there is none.
static inline int config_field(const char* key) {
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        if (!strcmp(CONFIG_FIELDS[i].key, key)) { return i; }
    }
    return -1;
}

// The value of a field of one number: all types but layers and names.
static inline double config_get(const Config* c, const ConfigField* f) {
    const char* at = (const char*)c + f->offset;
    int integer;
    double number;
    if (f->type == FIELD_NUMBER) {
        memcpy(&number, at, sizeof number);
        return number;
    }
    if (f->type == FIELD_SWITCH) { return *(const bool*)at; }
    memcpy(&integer, at, sizeof integer);
    return integer;
}

static inline void config_set(Config* c, const ConfigField* f, double value) {
    char* at = (char*)c + f->offset;
    int integer = f->type == FIELD_NUMBER ? 0 : (int)value;
    if (f->type == FIELD_NUMBER) {
        memcpy(at, &value, sizeof value);
    } else if (f->type == FIELD_SWITCH) {
        *(bool*)at = value != 0;
    } else {
        memcpy(at, &integer, sizeof integer);
    }
}

// Word number i of "a|b|c" into out.
static inline void choice_word(const char* words, int i, char* out, size_t n) {
    for (; i > 0; i--) { words = strchr(words, '|') + 1; }
    snprintf(out, n, "%.*s", (int)strcspn(words, "|"), words);
}

// The value as JSON.
static inline void config_field_write(const Config* c, const ConfigField* f, Text* t) {
    char word[64];
    int id = f->type == FIELD_TOKEN || f->type == FIELD_EOS ? (int)config_get(c, f) : 0;
    switch (f->type) {
        case FIELD_INT: text_printf(t, "%d", (int)config_get(c, f)); break;
        case FIELD_NUMBER: text_printf(t, "%.17g", config_get(c, f)); break;
        case FIELD_SWITCH: text_printf(t, "%s", config_get(c, f) != 0 ? "true" : "false"); break;
        case FIELD_CHOICE:
            choice_word(f->words, (int)config_get(c, f), word, sizeof word);
            text_printf(t, "\"%s\"", word);
            break;
        case FIELD_NAME: text_json_string(t, (const char*)c + f->offset, strlen((const char*)c + f->offset)); break;
        case FIELD_LAYERS: {
            const bool* layers = (const bool*)((const char*)c + f->offset);
            text_printf(t, "[");
            for (int l = 0, first = 1; l < c->num_hidden_layers; l++) {
                if (layers[l]) {
                    text_printf(t, "%s%d", first ? "" : ", ", l);
                    first = 0;
                }
            }
            text_printf(t, "]");
            break;
        }
        case FIELD_TOKEN:
        case FIELD_EOS:
            if (f->type == FIELD_EOS && c->n_other_eos) {
                text_printf(t, "[%d", id);
                for (int i = 0; i < c->n_other_eos; i++) { text_printf(t, ", %d", c->other_eos[i]); }
                text_printf(t, "]");
            } else if (id >= 0) {
                text_printf(t, "%d", id);
            } else {
                text_printf(t, "null");
            }
            break;
    }
}

static inline int config_head_size(const Config* c) { return c->hidden_size / c->num_attention_heads; }
static inline bool config_conv_pre(const Config* c, int l) { return c->kq_conv_layer[l] && c->kq_conv_pre_softmax; }
static inline bool config_conv_post(const Config* c, int l) { return c->kq_conv_layer[l] && c->kq_conv_post_softmax; }
// Heads that one RMSNorm of head_norm covers: 2 for diff, whose pair of heads is one of twice the size.
static inline int config_norm_heads(const Config* c) { return c->attention_type == ATTENTION_DIFF ? 2 : 1; }
// lambda_init of layer l, counted from 0 (paper section 3.3; DIFF Transformer eq. 3).
static inline double config_lambda_init(int l) { return 0.8 - 0.6 * exp(-0.3 * l); }

static inline bool config_any_conv(const Config* c) {
    for (int l = 0; l < c->num_hidden_layers; l++) {
        if (config_conv_pre(c, l) || config_conv_post(c, l)) { return true; }
    }
    return false;
}

// True for plain multi-head attention, which is written as a Hugging Face "llama".
static inline bool config_is_plain(const Config* c) {
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        if (f->part == PART_ATTENTION && f->change == CHANGE_MODEL && config_get(c, f) != f->value) { return false; }
    }
    return !config_any_conv(c);
}

// What the fields are where no key says otherwise: Hugging Face's LlamaConfig; every MTA feature off.
static inline Config config_default(void) {
    Config c;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        if (f->type != FIELD_LAYERS && f->type != FIELD_NAME) { config_set(&c, f, f->value); }
    }
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks

// Everything the programs rely on. Returns false with one line that says what is wrong and what is accepted.
static inline bool config_check(const Config* c, Error* e) {
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        if ((f->type != FIELD_INT && f->type != FIELD_NUMBER) || (f->part == PART_ROPE && c->rope_factor == 0)) {
            continue;
        }
        double value = config_get(c, f);
        if (!(value >= f->min && value <= f->max)) {
            return fail(e, "%s: got %.9g, wanted %.9g to %.9g", f->key, value, f->min, f->max);
        }
    }
    if (c->rope_factor > 0 && c->rope_high_freq_factor <= c->rope_low_freq_factor) {
        return fail(
            e,
            "rope_scaling: got low_freq_factor %g and high_freq_factor %g, wanted low_freq_factor < high_freq_factor",
            c->rope_low_freq_factor, c->rope_high_freq_factor);
    }
    int NH = c->num_attention_heads;
    if (c->hidden_size % NH) {
        return fail(e, "hidden_size %d is not divisible by num_attention_heads %d", c->hidden_size, NH);
    }
    if (config_head_size(c) % 2) { return fail(e, "head size %d is odd, RoPE needs an even one", config_head_size(c)); }
    if (NH % c->num_key_value_heads) {
        return fail(e, "num_attention_heads %d is not divisible by num_key_value_heads %d", NH, c->num_key_value_heads);
    }
    if (c->kq_conv_key_size % 2 == 0) {
        return fail(e, "kq_conv_key_size: got %d, wanted an odd number", c->kq_conv_key_size);
    }
    const int groups[2] = {c->head_mix_pre_softmax, c->head_mix_post_softmax};
    for (int i = 0; i < 2; i++) {
        if (groups[i] && NH % groups[i]) {
            return fail(e, "num_attention_heads %d is not divisible by head_mix_%s_softmax %d", NH, i ? "post" : "pre",
                        groups[i]);
        }
    }
    if (c->attention_type == ATTENTION_DIFF) {
        if (NH % 2) { return fail(e, "attention_type diff pairs heads: num_attention_heads %d is odd", NH); }
        if (config_any_conv(c) || groups[0] || groups[1] || c->head_gate) {
            return fail(e, "attention_type diff takes head_norm and grouped key/value heads only, no kq_conv, head_mix "
                           "or head_gate beside it");
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Presets and kinds of attention (dev/MODEL.md, Kinds)

#define MODEL_NAMES "toy, 1m, 3m, 11m, 25m, 300m, 550m, 880m, 1b"
#define ATTENTION_NAMES "transformer, mta, mta-full, talking-heads, diff"

// The layers with convolutions of a model by default: toy all; the paper's every fourth from 2; the small ones every
// second from 1.
typedef struct {
    const char* name;
    int C, L, NH, FF, V, context, first_conv, conv_stride;
    double rope_theta, lr;  // lr: peak learning rate, the paper's for 880m and toy, else a guess (1m, 3m: RESULTS.md)
} Preset;

static const Preset PRESETS[] = {
    {"toy", 256, 4, 2, 768, 32, 512, 0, 1, 100000, 1e-4},
    {"1m", 128, 4, 4, 352, 259, 1024, 1, 2, 10000, 1e-3},
    {"3m", 192, 6, 6, 512, 259, 1024, 1, 2, 10000, 1e-3},
    {"11m", 384, 6, 6, 1024, 259, 1024, 1, 2, 10000, 6e-4},
    {"25m", 512, 8, 8, 1408, 259, 1024, 1, 2, 10000, 6e-4},
    {"300m", 1024, 20, 16, 2816, 128256, 2048, 2, 4, 100000, 1.5e-4},
    {"550m", 1280, 24, 10, 3584, 128256, 2048, 2, 4, 100000, 1.5e-4},
    {"880m", 1536, 24, 16, 4096, 128256, 2048, 2, 4, 100000, 1.5e-4},
    {"1b", 2048, 24, 16, 5632, 128256, 2048, 2, 4, 100000, 1.5e-4},
};
enum { PRESET_COUNT = sizeof PRESETS / sizeof PRESETS[0] };

static inline const Preset* preset_find(const char* name) {
    for (int i = 0; i < PRESET_COUNT; i++) {
        if (!strcmp(name, PRESETS[i].name)) { return &PRESETS[i]; }
    }
    return NULL;
}

static inline void config_from_preset(Config* c, const Preset* p) {
    *c = config_default();
    c->vocab_size = p->V;
    c->hidden_size = p->C;
    c->intermediate_size = p->FF;
    c->num_hidden_layers = p->L;
    c->num_attention_heads = c->num_key_value_heads = p->NH;
    c->max_position_embeddings = p->context;
    c->rope_theta = p->rope_theta;
    c->rms_norm_eps = 1e-5;
    c->tie_word_embeddings = true;
    for (int l = p->first_conv; l < p->L; l += p->conv_stride) { c->kq_conv_layer[l] = true; }
}

// The operations that a kind of attention stands for: the paper's two versions, and baselines.
enum { ALL_HEADS = -1 };
typedef struct {
    const char* name;
    AttentionType type;
    bool conv_pre, conv_post;
    int mix_pre, mix_post;  // heads that are mixed, or ALL_HEADS
    HeadNorm norm;
    bool gate;
} AttentionKind;

static const AttentionKind ATTENTION_KINDS[] = {
    {"transformer", ATTENTION_MTA, false, false, 0, 0, HEAD_NORM_NONE, false},
    {"mta", ATTENTION_MTA, true, false, 0, 2, HEAD_NORM_GROUP_DEPTH_SCALED, false},
    {"mta-full", ATTENTION_MTA, true, true, ALL_HEADS, ALL_HEADS, HEAD_NORM_GROUP, true},
    {"talking-heads", ATTENTION_MTA, false, false, ALL_HEADS, ALL_HEADS, HEAD_NORM_NONE, false},
    {"diff", ATTENTION_DIFF, false, false, 0, 0, HEAD_NORM_GROUP_DEPTH_SCALED, false},
};
enum { ATTENTION_KIND_COUNT = sizeof ATTENTION_KINDS / sizeof ATTENTION_KINDS[0] };

// Sets the fields that a kind of attention stands for. Convolution layers are kept if the configuration names some,
// else every fourth from 2 (all, in a model of fewer than 3 layers). toy: "mta" is the paper's toy model.
static inline bool config_set_attention(Config* c, const char* name, bool toy, Error* e) {
    const AttentionKind* kind = NULL;
    int NH = c->num_attention_heads;
    bool any = false;
    for (int i = 0; i < ATTENTION_KIND_COUNT; i++) {
        if (!strcmp(name, ATTENTION_KINDS[i].name)) { kind = &ATTENTION_KINDS[i]; }
    }
    if (!kind) { return fail(e, "attention: got \"%s\", wanted one of %s", name, ATTENTION_NAMES); }
    for (int l = 0; l < c->num_hidden_layers; l++) { any = any || c->kq_conv_layer[l]; }
    for (int l = 0; l < c->num_hidden_layers && !any; l++) {
        c->kq_conv_layer[l] = c->num_hidden_layers < 3 || l % 4 == 2;
    }
    if (!kind->conv_pre && !kind->conv_post) { memset(c->kq_conv_layer, 0, sizeof c->kq_conv_layer); }
    toy = toy && !strcmp(name, "mta");
    c->attention_type = kind->type;
    c->kq_conv_query_size = toy ? 2 : 6;
    c->kq_conv_key_size = toy ? 9 : 11;
    c->kq_conv_pre_softmax = kind->conv_pre;
    c->kq_conv_post_softmax = kind->conv_post;
    c->head_mix_pre_softmax = kind->mix_pre == ALL_HEADS ? NH : kind->mix_pre;
    c->head_mix_post_softmax = toy ? 0 : kind->mix_post == ALL_HEADS ? NH : kind->mix_post;
    c->head_norm = toy ? HEAD_NORM_NONE : kind->norm;
    c->head_gate = kind->gate;
    return true;
}

// "none", "all" or "1,3,5" into kq_conv_layer.
static inline bool config_set_conv_layers(Config* c, const char* list, Error* e) {
    memset(c->kq_conv_layer, 0, sizeof c->kq_conv_layer);
    if (!strcmp(list, "none")) { return true; }
    if (!strcmp(list, "all")) {
        for (int l = 0; l < c->num_hidden_layers; l++) { c->kq_conv_layer[l] = true; }
        return true;
    }
    for (const char* s = list;;) {
        char* end;
        long l = strtol(s, &end, 10);
        bool digits = *s >= '0' && *s <= '9';  // strtol alone takes blanks and a sign
        if (!digits || l < 0 || l >= c->num_hidden_layers || (*end && *end != ',')) {
            return fail(e, "kq_conv_layers: got \"%s\", wanted all, none or a list like 1,3,5 of layers 0 to %d", list,
                        c->num_hidden_layers - 1);
        }
        c->kq_conv_layer[l] = true;
        if (!*end) { return true; }
        s = end + 1;
    }
}

// A field as an option gives it; `text` for choices and layers. Not given: -1, -1.0 or NULL.
typedef union {
    int integer;
    double number;
    const char* text;
} FieldValue;

static inline bool field_is_text(const ConfigField* f) { return f->type == FIELD_CHOICE || f->type == FIELD_LAYERS; }

static inline FieldValue field_not_given(const ConfigField* f) {
    FieldValue v;
    memset(&v, 0, sizeof v);
    if (f->type == FIELD_NUMBER) {
        v.number = -1;
    } else if (!field_is_text(f)) {
        v.integer = -1;
    }
    return v;
}

static inline bool field_given(const ConfigField* f, FieldValue v) {
    return field_is_text(f) ? v.text != NULL : f->type == FIELD_NUMBER ? v.number >= 0 : v.integer >= 0;
}

// Puts the options that were given for one part's fields over what the configuration says; given: a value for each row
// of CONFIG_FIELDS.
static inline bool config_override(Config* c, const FieldValue* given, FieldPart part, Error* e) {
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        FieldValue v = given[i];
        if (f->part != part || !field_given(f, v)) { continue; }
        if (f->type == FIELD_LAYERS) {
            if (!config_set_conv_layers(c, v.text, e)) { return false; }
        } else {
            config_set(c, f,
                       f->type == FIELD_CHOICE   ? choice_index(f->words, v.text)
                       : f->type == FIELD_NUMBER ? v.number
                                                 : v.integer);
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// config.json

// eos_token_id: one id, or a list of them (Llama 3's is one).
static inline bool config_read_eos(Config* c, const Json* v, const char* key, Error* e) {
    bool list = v->type == JSON_ARRAY;
    int count = 0;
    c->n_other_eos = 0;
    c->eos_token_id = -1;
    for (v = list ? v->child : v; v; v = list ? v->next : NULL, count++) {
        int64_t id;
        if (!json_integer(v, -1, MAX_VOCAB, &id)) { return fail(e, "%s: wanted a token id or a list of them", key); }
        if (count == MAX_EOS) { return fail(e, "%s: more than %d ids", key, MAX_EOS); }
        if (!count) {
            c->eos_token_id = (int)id;
        } else {
            c->other_eos[c->n_other_eos++] = (int)id;
        }
    }
    return true;
}

static inline bool config_read_layers(Config* c, bool* layers, const Json* v, const char* key, Error* e) {
    if (v->type != JSON_ARRAY) { return fail(e, "%s: wanted a list of layer numbers", key); }
    for (const Json* item = v->child; item; item = item->next) {
        int64_t l;
        if (!json_integer(item, 0, c->num_hidden_layers - 1, &l)) {
            return fail(e, "%s: wanted layers from 0 to %d", key, c->num_hidden_layers - 1);
        }
        layers[l] = true;
    }
    return true;
}

// null: off, none, or as absent; refused where a number is needed (a field whose value is 0 by default can do without).
static inline bool config_read_null(Config* c, const ConfigField* f, Error* e) {
    if ((f->type == FIELD_INT || f->type == FIELD_NUMBER) && f->value != 0) {
        return fail(e, "%s: got null, wanted a number", f->key);
    }
    if (f->type == FIELD_EOS) { c->n_other_eos = 0; }
    if (f->type != FIELD_LAYERS && f->type != FIELD_NAME) { config_set(c, f, f->value); }
    return true;
}

static inline bool config_read_field(Config* c, const ConfigField* f, const Json* v, Error* e) {
    char* at = (char*)c + f->offset;
    int64_t integer = 0;
    int word = -1;
    if (v->type == JSON_NULL) { return config_read_null(c, f, e); }
    switch (f->type) {
        case FIELD_INT:
        case FIELD_TOKEN:
            if (!json_integer(v, (int64_t)f->min, (int64_t)f->max, &integer)) {
                return fail(e, "%s: wanted a whole number from %.0f to %.0f", f->key, f->min, f->max);
            }
            config_set(c, f, (double)integer);
            return true;
        case FIELD_NUMBER:
            if (v->type != JSON_NUMBER) { return fail(e, "%s: wanted a number", f->key); }
            config_set(c, f, v->number);
            return true;
        case FIELD_SWITCH:
            if (v->type != JSON_BOOL) { return fail(e, "%s: wanted true or false", f->key); }
            config_set(c, f, v->boolean);
            return true;
        case FIELD_CHOICE:
            if (v->type == JSON_STRING) { word = choice_index(f->words, v->string); }
            if (word < 0) {
                return fail(e, "%s: got \"%.60s\", wanted one of %s", f->key, v->type == JSON_STRING ? v->string : "?",
                            f->words);
            }
            config_set(c, f, word);
            return true;
        case FIELD_LAYERS: return config_read_layers(c, (bool*)at, v, f->key, e);
        case FIELD_EOS: return config_read_eos(c, v, f->key, e);
        case FIELD_NAME:
            if (v->type != JSON_STRING || v->length >= (size_t)f->min || strlen(v->string) != v->length) {
                return fail(e, "%s: wanted a short string", f->key);
            }
            if (strchr(v->string, '/')) {
                return fail(e, "%s: got \"%s\", wanted a name or a file beside config.json", f->key, v->string);
            }
            strcpy(at, v->string);
            return true;
    }
    return true;
}

// The fields of one part whose keys stand in `object`.
static inline bool config_read_part(Config* c, const Json* object, FieldPart part, Error* e) {
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        const char* point = strchr(f->key, '.');
        const Json* v = f->part == part ? json_get(object, point ? point + 1 : f->key) : NULL;
        if (v && !config_read_field(c, f, v, e)) { return false; }
    }
    return true;
}

// First difference between two models' shapes and mathematics, as "field: got A, wanted B"; true if there is none.
// What may change on resume without changing the model (context, tokenizer, token ids) is not compared.
static inline bool config_same_model(const Config* got, const Config* want, Error* e) {
    bool conv = config_any_conv(got) || config_any_conv(want), same = true;
    for (int i = 0; i < CONFIG_FIELD_COUNT && same; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        Text a = {NULL, 0, 0}, b = {NULL, 0, 0};
        if (f->change == CHANGE_FREE || (f->change == CHANGE_CONV && !conv)) { continue; }
        config_field_write(got, f, &a);
        config_field_write(want, f, &b);
        same = !strcmp(a.text, b.text) || fail(e, "%s: got %.200s, wanted %.200s", f->key, a.text, b.text);
        text_free(&a);
        text_free(&b);
    }
    return same;
}

// ---- which models are read: what their mathematics is must be known

typedef enum { FAMILY_UNNAMED, FAMILY_LLAMA, FAMILY_MISTRAL, FAMILY_MTA } ConfigFamily;

typedef struct {
    ConfigFamily family;
    const char *model_type, *architecture;
} FamilyName;

// What may stand in config.json beside the fields: a|b|c, and the value, or values, at which these keys change nothing.
// NULL: any value, they change no number that a model computes. "!" at the front: another value is refused under
// --assume-llama too.
typedef struct {
    const char *values, *keys;
} ConfigKeys;

static const ConfigKeys CONFIG_KEYS[] = {
    // what it is called, how it is stored, how it was trained, how text is drawn from it; transformers.js_config is of
    // SmolLM2: forms of the weights for a browser
    {NULL, "architectures|model_type|torch_dtype|dtype|transformers_version|_name_or_path|_commit_hash|"
           "_attn_implementation|attn_implementation|_attn_implementation_autoset|use_cache|initializer_range|"
           "pretraining_tp|attention_dropout|hidden_dropout|dropout|resid_pdrop|embd_pdrop|attn_pdrop|pad_token_id|"
           "unk_token_id|sep_token_id|cls_token_id|mask_token_id|pad_token|decoder_start_token_id|forced_bos_token_id|"
           "forced_eos_token_id|suppress_tokens|begin_suppress_tokens|bad_words_ids|tokenizer_class|model_max_length|"
           "max_sequence_length|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|"
           "diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|"
           "encoder_no_repeat_ngram_size|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty|"
           "return_dict|return_dict_in_generate|output_scores|output_attentions|output_hidden_states|torchscript|"
           "use_bfloat16|tf_legacy_loss|is_decoder|id2label|label2id|num_labels|problem_type|finetuning_task|"
           "task_specific_params|prefix|unsloth_version|unsloth_fixed|use_flash_attn|use_flash_attention|"
           "use_flash_attention_2|gradient_checkpointing|transformers.js_config|is_llama_config"},
    // read apart from the table of fields, below; query_chunk is of scripts/hf: how many queries at once
    {NULL, "rope_scaling|rope_parameters|head_dim|sliding_window|use_sliding_window|attention_multiplier|"
           "auto_map|query_chunk|layer_types"},
    {"!silu|swish", "hidden_act"},
    {"!false", "attention_bias|mlp_bias"},
    {"!1", "partial_rotary_factor"},
    {"!", "quantization_config|compression_config|quantization"},
    {"false", "qkv_bias|use_qkv_bias|use_bias|bias|lm_head_bias|add_bias_linear|rope_interleaved|qk_norm|"
              "use_qk_norm|qk_layernorm|use_parallel_residual|parallel_residual|alibi|add_cross_attention|"
              "is_encoder_decoder|tie_encoder_decoder"},
    {"1", "rotary_pct|embedding_multiplier|residual_multiplier|logits_scaling|logit_scale|scale_emb"},
    {"", "cross_attention_hidden_size"},
    {"0", "chunk_size_feed_forward|num_experts|num_local_experts|n_routed_experts"},
    {"{}", "pruned_heads"},
};

// A value as the words of CONFIG_KEYS spell it: 1, false, silu, {} or [] for empty ones; "..." for what holds more.
static inline const char* config_value_text(const Json* v, char* out, size_t n) {
    switch (v->type) {
        case JSON_NULL: snprintf(out, n, "null"); break;
        case JSON_BOOL: snprintf(out, n, "%s", v->boolean ? "true" : "false"); break;
        case JSON_NUMBER: snprintf(out, n, "%.9g", v->number); break;
        case JSON_STRING: snprintf(out, n, "%.*s", (int)(n - 1), v->string); break;
        default: snprintf(out, n, "%s", v->count ? "..." : v->type == JSON_ARRAY ? "[]" : "{}"); break;
    }
    return out;
}

// One key of config.json. assume_llama: what is not known is passed over.
static inline bool config_check_key(const Json* v, bool assume_llama, Error* e) {
    const char* key = v->key;
    char got[64];
    int i = config_field(key), n = sizeof CONFIG_KEYS / sizeof CONFIG_KEYS[0];
    if (v->type == JSON_NULL || (i >= 0 && !strchr(key, '.'))) { return true; }
    for (i = 0; i < n && choice_index(CONFIG_KEYS[i].keys, key) < 0; i++) {}
    const char* values = i < n ? CONFIG_KEYS[i].values : "";
    if (!values) { return true; }
    bool always = values[0] == '!';
    values += always;
    config_value_text(v, got, sizeof got);
    if ((values[0] && choice_index(values, got) >= 0) || (assume_llama && !always)) { return true; }
    if (!strcmp(key, "attention_bias") || !strcmp(key, "mlp_bias")) {
        return fail(e, "%s: biases are not supported", key);
    }
    if (!strcmp(key, "partial_rotary_factor")) {
        return fail(e, "%s: got %s, wanted 1: RoPE turns whole heads", key, got);
    }
    if (always && !values[0]) { return fail(e, "%s: quantized weights are not supported", key); }
    if (values[0]) {
        return fail(e, "%s: got %s, wanted %s%s", key, got, values, always ? "" : "; --assume-llama ignores it");
    }
    return fail(e, "%.80s: got %s, and what this key does is not known here; --assume-llama ignores it", key, got);
}

// model_type and architectures into *family. They must be known and agree; under --assume-llama any other is taken for
// LLaMA.
static inline bool config_read_family(const Json* j, bool assume_llama, ConfigFamily* family, Error* e) {
    static const FamilyName names[] = {{FAMILY_LLAMA, "llama", "LlamaForCausalLM"},
                                       {FAMILY_LLAMA, "llama", "LLaMAForCausalLM"},
                                       {FAMILY_MISTRAL, "mistral", "MistralForCausalLM"},
                                       {FAMILY_MTA, "mta", "MtaForCausalLM"}};
    const int n = sizeof names / sizeof names[0];
    const Json *type = json_get(j, "model_type"), *list = json_get(j, "architectures");
    int i = n;
    *family = FAMILY_UNNAMED;
    if (type && type->type != JSON_NULL) {
        for (i = 0; i < n && strcmp(names[i].model_type, json_text(type) ? type->string : ""); i++) {}
        if (i == n && !assume_llama) {
            return fail(e,
                        "model_type: got \"%.60s\", wanted llama, mistral or mta; --assume-llama reads it as LLaMA, "
                        "right or wrong",
                        json_text(type) ? type->string : "?");
        }
        *family = i < n ? names[i].family : FAMILY_LLAMA;
    }
    if (list && list->type != JSON_ARRAY && list->type != JSON_NULL) {
        return fail(e, "architectures: wanted a list of names");
    }
    for (const Json* a = list ? list->child : NULL; a; a = a->next) {
        for (i = 0; i < n && strcmp(names[i].architecture, json_text(a) ? a->string : ""); i++) {}
        bool agrees = i < n && (*family == FAMILY_UNNAMED || *family == names[i].family);
        if (!agrees && !assume_llama) {
            return fail(e,
                        "architectures: got \"%.60s\"%s, wanted LlamaForCausalLM, MistralForCausalLM or "
                        "MtaForCausalLM%s; --assume-llama reads it "
                        "as LLaMA, right or wrong",
                        json_text(a) ? a->string : "?", i < n ? " beside another model_type" : "",
                        i < n ? " as model_type says" : "");
        }
        if (*family == FAMILY_UNNAMED) { *family = i < n ? names[i].family : FAMILY_LLAMA; }
    }
    return true;
}

// What transformers' MistralConfig and LlamaConfig assume where that differs from ours, which is LLaMA's without its
// token ids.
static inline void config_family_defaults(Config* c, ConfigFamily family) {
    if (family == FAMILY_LLAMA || family == FAMILY_MISTRAL) {
        c->bos_token_id = 1;
        c->eos_token_id = 2;
    }
    if (family == FAMILY_MISTRAL) {
        c->intermediate_size = 14336;
        c->num_key_value_heads = 8;
        c->max_position_embeddings = 131072;
    }
}

// Refuses a key of rope_scaling or rope_parameters that is not known; those of llama3 do nothing in another type.
static inline bool config_check_rope_key(const Json* v, const char* where, bool llama3, bool assume_llama, Error* e) {
    char key[128];
    snprintf(key, sizeof key, "rope_scaling.%.60s", v->key);
    bool known = config_field(key) >= 0 || !strcmp(v->key, "type") || !strcmp(v->key, "rope_type") ||
                 !strcmp(v->key, "rope_theta") || v->type == JSON_NULL || (!llama3 && !strcmp(v->key, "factor"));
    if (!strcmp(v->key, "partial_rotary_factor")) { return config_check_key(v, assume_llama, e); }
    return known || assume_llama ||
           fail(e, "%s.%.60s: what this key does is not known here; --assume-llama ignores it", where, v->key);
}

// rope_scaling, or rope_parameters, its newer name, which also holds rope_theta. "default", "llama3" and a "linear" of
// factor 1 are known.
static inline bool config_read_rope(Config* c, const Json* j, const char* where, bool assume_llama, Error* e) {
    const Json* s = json_get(j, where);
    if (!s || s->type == JSON_NULL) { return true; }
    if (s->type != JSON_OBJECT) { return fail(e, "%s: wanted an object", where); }
    const Json *type = json_get(s, "rope_type"), *factor = json_get(s, "factor"), *theta = json_get(s, "rope_theta");
    const Json* older = json_get(s, "type");
    if (json_text(type) && json_text(older) && strcmp(type->string, older->string)) {
        return fail(e, "%s: rope_type \"%.32s\" and type \"%.32s\" differ", where, type->string, older->string);
    }
    if (!type || type->type == JSON_NULL) { type = older; }
    if ((!type || type->type == JSON_NULL) && factor && !(factor->type == JSON_NUMBER && factor->number == 1)) {
        return fail(e, "%s: a factor without rope_type", where);
    }
    const char* name = !type || type->type == JSON_NULL ? "default" : json_text(type) ? type->string : "?";
    bool llama3 = !strcmp(name, "llama3"),
         linear = !strcmp(name, "linear") && factor && factor->type == JSON_NUMBER && factor->number == 1;
    if (!llama3 && !linear && strcmp(name, "default")) {
        return fail(e, "%s: type \"%.32s\" is not supported, wanted llama3, or none (a linear factor of 1)", where,
                    name);
    }
    for (const Json* v = s->child; v; v = v->next) {
        if (!config_check_rope_key(v, where, llama3, assume_llama, e)) { return false; }
    }
    if (theta && !config_read_field(c, &CONFIG_FIELDS[config_field("rope_theta")], theta, e)) { return false; }
    const Json* above = json_get(j, "rope_theta");
    if (above && above->type == JSON_NUMBER && above->number != c->rope_theta) {
        return fail(e, "rope_theta: got %.9g, but %s says %.9g", above->number, where, c->rope_theta);
    }
    if (!llama3) { return true; }
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const char* key = CONFIG_FIELDS[i].part == PART_ROPE ? strchr(CONFIG_FIELDS[i].key, '.') + 1 : NULL;
        const Json* v = key ? json_get(s, key) : NULL;
        if (key && (!v || v->type == JSON_NULL)) { return fail(e, "%s: type llama3 without %s", where, key); }
    }
    if (!config_read_part(c, s, PART_ROPE, e)) { return false; }
    return c->rope_factor != 0 || fail(e, "%s: got a factor of 0, wanted 1 or more", where);  // 0 means none in Config
}

// Both names of it, which must not differ where both are there.
static inline bool config_read_ropes(Config* c, const Json* j, bool assume_llama, Error* e) {
    const Json *old = json_get(j, "rope_scaling"), *now = json_get(j, "rope_parameters");
    Config other = *c;
    Error why = {{0}};
    if (!config_read_rope(c, j, "rope_scaling", assume_llama, e)) { return false; }
    if (!now || now->type == JSON_NULL) { return true; }
    if (!config_read_rope(&other, j, "rope_parameters", assume_llama, e)) { return false; }
    if (old && old->type == JSON_OBJECT && old->count && !config_same_model(&other, c, &why)) {
        return fail(e, "rope_scaling and rope_parameters differ: %.200s", why.text);
    }
    *c = other;
    return true;
}

// Positions that attention is limited to: only none, or no fewer than the context.
static inline bool config_check_window(Config* c, const Json* j, ConfigFamily family, Error* e) {
    const Json *v = json_get(j, "sliding_window"), *use = json_get(j, "use_sliding_window");
    double window = family == FAMILY_MISTRAL && !v ? 4096 : 0;  // MistralConfig's where the key is absent; null is none
    if (use && use->type != JSON_BOOL && use->type != JSON_NULL) {
        return fail(e, "use_sliding_window: wanted true or false");
    }
    if (v && v->type != JSON_NULL && v->type != JSON_NUMBER) { return fail(e, "sliding_window: wanted a number"); }
    if (v && v->type == JSON_NUMBER) { window = v->number; }
    if (use && use->type == JSON_BOOL && !use->boolean && family != FAMILY_MISTRAL) {
        return true;
    }  // Mistral's has no such switch
    if (window > 0 && window < c->max_position_embeddings) {
        return fail(e, "sliding_window: got %g%s, wanted none below the context of %d: attention sees all positions",
                    window, v ? "" : " (mistral's where the key is absent)", c->max_position_embeddings);
    }
    c->sliding_window = window > 0 && window <= MAX_CONTEXT ? (int)window : 0;
    return true;
}

// Keys whose good values depend on others.
static inline bool config_check_more(Config* c, const Json* j, ConfigFamily family, bool assume_llama, Error* e) {
    const Json *dim = json_get(j, "head_dim"), *scale = json_get(j, "attention_multiplier"),
               *types = json_get(j, "layer_types");
    const Json* map = json_get(j, "auto_map");
    if (dim && dim->type != JSON_NULL &&
        (dim->type != JSON_NUMBER || c->hidden_size % c->num_attention_heads || dim->number != config_head_size(c))) {
        return fail(e, "head_dim: got %g, wanted hidden_size / num_attention_heads = %d / %d", dim->number,
                    c->hidden_size, c->num_attention_heads);
    }
    if (!config_check_window(c, j, family, e)) { return false; }
    if (assume_llama) { return true; }
    double usual = 1 / sqrt((double)config_head_size(c));
    if (scale && scale->type != JSON_NULL && !(scale->type == JSON_NUMBER && fabs(scale->number - usual) < 1e-9)) {
        return fail(e, "attention_multiplier: got %g, wanted 1 / sqrt(head size) = %.9g; --assume-llama ignores it",
                    scale->number, usual);
    }
    if (types && types->type != JSON_ARRAY && types->type != JSON_NULL) {
        return fail(e, "layer_types: wanted a list of full_attention for every layer");
    }
    for (const Json* t = types ? types->child : NULL; t; t = t->next) {
        if (!json_text(t) || strcmp(t->string, "full_attention")) {
            return fail(e,
                        "layer_types: got \"%.40s\", wanted full_attention in every layer; --assume-llama ignores it",
                        json_text(t) ? t->string : "?");
        }
    }
    if (map && map->type != JSON_NULL && family != FAMILY_MTA) {
        return fail(e, "auto_map: the model brings code of its own; --assume-llama ignores it");
    }
    return true;
}

// Words are compared as C strings, which end at a NUL: what follows one would be passed over.
static inline bool config_check_text(const Json* j, const char* key, Error* e) {
    for (const Json* v = j->child; v; v = v->next) {
        const char* name = v->key ? v->key : key;
        if (v->type == JSON_STRING && strlen(v->string) != v->length) {
            return fail(e, "%.80s: wanted a text without NUL", name);
        }
        if (!config_check_text(v, name, e)) { return false; }
    }
    return true;
}

// Reads a parsed config.json. Right or refused: only families whose mathematics is known, with their own defaults for
// absent keys (neither model_type nor architectures: LLaMA's, without token ids), and no key that is not known.
// assume_llama: an unknown family is taken for LLaMA and unknown keys are passed over, on the user's word.
static inline bool config_from_json(Config* c, const Json* j, bool assume_llama, Error* e) {
    ConfigFamily family;
    *c = config_default();
    if (!j || j->type != JSON_OBJECT) { return fail(e, "wanted a JSON object"); }
    if (!config_check_text(j, "", e)) { return false; }
    if (!config_read_family(j, assume_llama, &family, e)) { return false; }
    for (const Json* v = j->child; v; v = v->next) {
        if (!config_check_key(v, assume_llama, e)) { return false; }
    }
    config_family_defaults(c, family);
    for (int part = PART_SIZES; part <= PART_ATTENTION; part++) {
        if (part != PART_ROPE && !config_read_part(c, j, (FieldPart)part, e)) { return false; }
    }
    if (!c->num_key_value_heads) { c->num_key_value_heads = c->num_attention_heads; }
    return config_read_ropes(c, j, assume_llama, e) && config_check_more(c, j, family, assume_llama, e) &&
           config_check(c, e);
}

static inline bool config_read(Config* c, const char* path, bool assume_llama, Error* e) {
    Error why = {{0}};
    Json* j = json_read(path, (size_t)16 << 20, e);
    bool good = j && (config_from_json(c, j, assume_llama, &why) || fail(e, "%s: %.400s", path, why.text));
    json_free(j);
    return good;
}

// The fields of one part, a line each; names that are empty are left out.
static inline void config_write_part(const Config* c, FieldPart part, Text* t) {
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        if (f->part != part || (f->type == FIELD_NAME && !*((const char*)c + f->offset))) { continue; }
        text_printf(t, "  \"%s\": ", f->key);
        config_field_write(c, f, t);
        text_printf(t, ",\n");
    }
}

static inline void config_write_rope(const Config* c, Text* t) {
    text_printf(t, "  \"rope_scaling\": {\"rope_type\": \"llama3\"");
    for (int i = 0; i < CONFIG_FIELD_COUNT; i++) {
        const ConfigField* f = &CONFIG_FIELDS[i];
        if (f->part != PART_ROPE) { continue; }
        text_printf(t, ", \"%s\": ", strchr(f->key, '.') + 1);
        config_field_write(c, f, t);
    }
    text_printf(t, "},\n");
}

// torch_dtype: what model.safetensors beside it holds, "float32" or "bfloat16".
static inline void config_to_json(const Config* c, const char* torch_dtype, Text* t) {
    bool plain = config_is_plain(c);
    text_printf(t, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n",
                plain ? "LlamaForCausalLM" : "MtaForCausalLM", plain ? "llama" : "mta");
    config_write_part(c, PART_SIZES, t);
    text_printf(t, "  \"head_dim\": %d,\n", config_head_size(c));
    config_write_part(c, PART_CONTEXT, t);
    text_printf(t, "  \"hidden_act\": \"silu\",\n  \"attention_bias\": false,\n  \"mlp_bias\": false,\n  "
                   "\"attention_dropout\": 0.0,\n");
    config_write_part(c, PART_NUMBERS, t);
    if (c->rope_factor > 0) { config_write_rope(c, t); }
    config_write_part(c, PART_TOKENS, t);
    if (!plain) { config_write_part(c, PART_ATTENTION, t); }
    text_printf(t, "  \"initializer_range\": %.9g,\n  \"torch_dtype\": \"%s\",\n  \"use_cache\": true\n}\n",
                pow(c->hidden_size, -0.5), torch_dtype);
}

// Rotation of RoPE pair t (of HS/2) in radians per position, with Llama 3's scaling where configured.
static inline double config_rope_frequency(const Config* c, int t) {
    double f = pow(c->rope_theta, -2.0 * t / config_head_size(c));
    if (c->rope_factor <= 0) { return f; }
    double turns =
        c->rope_original_context * f / (2 * 3.14159265358979323846);  // rotations within the original context
    if (turns < c->rope_low_freq_factor) { return f / c->rope_factor; }
    if (turns > c->rope_high_freq_factor) { return f; }
    double s = (turns - c->rope_low_freq_factor) / (c->rope_high_freq_factor - c->rope_low_freq_factor);
    return (1 - s) * f / c->rope_factor + s * f;
}

// ---------------------------------------------------------------------------------------------------------------------
// The tensors

typedef enum {
    TENSOR_EMBED,
    TENSOR_INPUT_NORM,
    TENSOR_Q,
    TENSOR_K,
    TENSOR_V,
    TENSOR_O,
    TENSOR_KQ_CONV,
    TENSOR_KQ_CONV_POST,
    TENSOR_HEAD_MIX_PRE,
    TENSOR_HEAD_MIX,
    TENSOR_HEAD_NORM,
    TENSOR_GATE_WEIGHT,
    TENSOR_GATE_BIAS,
    TENSOR_LAMBDA_Q1,
    TENSOR_LAMBDA_K1,
    TENSOR_LAMBDA_Q2,
    TENSOR_LAMBDA_K2,
    TENSOR_POST_NORM,
    TENSOR_GATE_PROJ,
    TENSOR_UP_PROJ,
    TENSOR_DOWN_PROJ,
    TENSOR_NORM,
    TENSOR_LM_HEAD,
    TENSOR_KINDS
} TensorKind;

typedef struct {
    char name[96];
    int ndim;
    size_t shape[3];
    size_t numel;   // product of the shape
    size_t offset;  // of the first element in the arena, in elements, a multiple of 64
    int layer;      // 0.. ; 0 for tensors outside the layers
    TensorKind kind;
} TensorSpec;

typedef struct {
    TensorSpec* specs;
    int n;
    size_t numel;       // elements of the arena, padding included
    size_t parameters;  // elements of the tensors
    int* by_kind;       // [layers][TENSOR_KINDS]: index into specs, -1 = the model has none
} TensorList;

static inline void tensor_add(TensorList* list, TensorKind kind, int layer, const char* name, size_t a, size_t b,
                              size_t c) {
    TensorSpec* s = &list->specs[list->n];
    memset(s, 0, sizeof *s);
    snprintf(s->name, sizeof s->name, "%s", name);
    s->ndim = c ? 3 : b ? 2 : 1;
    s->shape[0] = a;
    s->shape[1] = b;
    s->shape[2] = c;
    s->numel = a * (b ? b : 1) * (c ? c : 1);
    s->offset = list->numel;
    s->layer = layer;
    s->kind = kind;
    list->by_kind[layer * TENSOR_KINDS + kind] = list->n++;
    list->numel += (s->numel + 63) / 64 * 64;
    list->parameters += s->numel;
}

// Fills the list for a checked configuration; in the order of the forward pass. Owns memory: tensor_list_free.
static inline void tensor_list(TensorList* list, const Config* c) {
    size_t C = (size_t)c->hidden_size, FF = (size_t)c->intermediate_size, V = (size_t)c->vocab_size,
           HS = (size_t)config_head_size(c);
    size_t NH = (size_t)c->num_attention_heads, NKV = (size_t)c->num_key_value_heads;
    size_t cq = (size_t)c->kq_conv_query_size, ck = (size_t)c->kq_conv_key_size;
    size_t slots = (size_t)c->num_hidden_layers * TENSOR_KINDS;
    memset(list, 0, sizeof *list);
    list->specs = (TensorSpec*)alloc_or_die(slots, sizeof(TensorSpec), "tensor list");
    list->by_kind = (int*)alloc_or_die(slots, sizeof(int), "tensor list");
    for (size_t i = 0; i < slots; i++) { list->by_kind[i] = -1; }
    tensor_add(list, TENSOR_EMBED, 0, "model.embed_tokens.weight", V, C, 0);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        char name[96], *tail = name + snprintf(name, sizeof name, "model.layers.%d.", l);
        size_t room = (size_t)(name + sizeof name - tail);
#define TENSOR(kind, suffix, a, b, d) (snprintf(tail, room, "%s", suffix), tensor_add(list, kind, l, name, a, b, d))
        TENSOR(TENSOR_INPUT_NORM, "input_layernorm.weight", C, 0, 0);
        TENSOR(TENSOR_Q, "self_attn.q_proj.weight", NH * HS, C, 0);
        TENSOR(TENSOR_K, "self_attn.k_proj.weight", NKV * HS, C, 0);
        TENSOR(TENSOR_V, "self_attn.v_proj.weight", NKV * HS, C, 0);
        TENSOR(TENSOR_O, "self_attn.o_proj.weight", C, NH * HS, 0);
        if (config_conv_pre(c, l)) { TENSOR(TENSOR_KQ_CONV, "self_attn.kq_conv.weight", NH, cq, ck); }
        if (config_conv_post(c, l)) { TENSOR(TENSOR_KQ_CONV_POST, "self_attn.kq_conv_post.weight", NH, cq, ck); }
        size_t pre = (size_t)c->head_mix_pre_softmax, post = (size_t)c->head_mix_post_softmax;
        if (pre) { TENSOR(TENSOR_HEAD_MIX_PRE, "self_attn.head_mix_pre.weight", NH / pre, pre, pre); }
        if (post) { TENSOR(TENSOR_HEAD_MIX, "self_attn.head_mix.weight", NH / post, post, post); }
        if (c->head_norm != HEAD_NORM_NONE) {
            TENSOR(TENSOR_HEAD_NORM, "self_attn.head_norm.weight", HS * (size_t)config_norm_heads(c), 0, 0);
        }
        if (c->head_gate) {
            TENSOR(TENSOR_GATE_WEIGHT, "self_attn.head_gate.weight", HS, 0, 0);
            TENSOR(TENSOR_GATE_BIAS, "self_attn.head_gate.bias", 1, 0, 0);
        }
        if (c->attention_type == ATTENTION_DIFF) {
            TENSOR(TENSOR_LAMBDA_Q1, "self_attn.lambda_q1", HS, 0, 0);
            TENSOR(TENSOR_LAMBDA_K1, "self_attn.lambda_k1", HS, 0, 0);
            TENSOR(TENSOR_LAMBDA_Q2, "self_attn.lambda_q2", HS, 0, 0);
            TENSOR(TENSOR_LAMBDA_K2, "self_attn.lambda_k2", HS, 0, 0);
        }
        TENSOR(TENSOR_POST_NORM, "post_attention_layernorm.weight", C, 0, 0);
        TENSOR(TENSOR_GATE_PROJ, "mlp.gate_proj.weight", FF, C, 0);
        TENSOR(TENSOR_UP_PROJ, "mlp.up_proj.weight", FF, C, 0);
        TENSOR(TENSOR_DOWN_PROJ, "mlp.down_proj.weight", C, FF, 0);
#undef TENSOR
    }
    tensor_add(list, TENSOR_NORM, 0, "model.norm.weight", C, 0, 0);
    if (!c->tie_word_embeddings) { tensor_add(list, TENSOR_LM_HEAD, 0, "lm_head.weight", V, C, 0); }
}

static inline void tensor_list_free(TensorList* list) {
    free(list->specs);
    free(list->by_kind);
    memset(list, 0, sizeof *list);
}

// Index of a tensor by name, or by layer and kind; -1 if the model has none.
static inline int tensor_find(const TensorList* list, const char* name) {
    for (int i = 0; i < list->n; i++) {
        if (!strcmp(list->specs[i].name, name)) { return i; }
    }
    return -1;
}
static inline int tensor_at(const TensorList* list, int layer, TensorKind kind) {
    return list->by_kind[layer * TENSOR_KINDS + kind];
}

// Fills `fields`, a struct of nothing but LAYER_TENSORS pointers in the order of TensorKind, with one layer's tensors
// inside an arena whose values have so many bytes; NULL where the model has none.
enum { LAYER_TENSORS = TENSOR_DOWN_PROJ - TENSOR_INPUT_NORM + 1 };
static inline void tensors_of_layer(void* fields, const TensorList* list, int layer, void* arena, size_t bytes) {
    for (int k = 0; k < LAYER_TENSORS; k++) {
        int i = tensor_at(list, layer, (TensorKind)(TENSOR_INPUT_NORM + k));
        void* at = i < 0 ? NULL : (char*)arena + list->specs[i].offset * bytes;
        memcpy((char*)fields + (size_t)k * sizeof(void*), &at, sizeof(void*));
    }
}

// Tensors that a plain LLaMA-family checkpoint lacks: --init-from starts them at the identity.
static inline bool tensor_is_mta(const TensorSpec* s) {
    return s->kind >= TENSOR_KQ_CONV && s->kind <= TENSOR_LAMBDA_K2;
}
static inline bool tensor_is_norm(const TensorSpec* s) {
    return s->kind == TENSOR_INPUT_NORM || s->kind == TENSOR_POST_NORM || s->kind == TENSOR_NORM ||
           s->kind == TENSOR_HEAD_NORM;
}

#endif
