// mta/config.h: what a model is: its configuration (config.json), the presets, the kinds of attention, and the list of its tensors.
//
// One Config describes every model of this project (LLaMA with Multi-Token Attention, or the DIFF Transformer); keys and tensor
// names are those of Hugging Face's LLaMA plus the MTA keys of dev/MODEL.md. The tensor list is walked by initialisation, checkpoints,
// the optimizer and the tests, so that names, shapes and memory layout are said once.
#ifndef MTA_CONFIG_H
#define MTA_CONFIG_H

#include "util.h"
#include "json.h"

#include <math.h>

enum {
    MAX_LAYERS = 512,     // bounds that keep every product of sizes far inside 64 bits
    MAX_HEADS = 1024,
    MAX_DIM = 1 << 17,
    MAX_VOCAB = 1 << 22,
    MAX_EOS = 8,          // ids that end a document
    MAX_KERNEL = 63,      // of either side of a convolution
    MAX_CONTEXT = 1 << 24
};

typedef enum { ATTENTION_MTA, ATTENTION_DIFF } AttentionType;
typedef enum { HEAD_NORM_NONE, HEAD_NORM_GROUP, HEAD_NORM_GROUP_DEPTH_SCALED } HeadNorm;

typedef struct {
    int vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads;
    int max_position_embeddings;
    double rope_theta, rms_norm_eps;
    bool tie_word_embeddings;
    AttentionType attention_type;
    bool kq_conv_layer[MAX_LAYERS];                 // true where layer l has key-query convolutions
    int kq_conv_query_size, kq_conv_key_size;       // cq, ck (odd)
    bool kq_conv_pre_softmax, kq_conv_post_softmax;
    int head_mix_pre_softmax, head_mix_post_softmax; // group size ch, 0 = off
    HeadNorm head_norm;
    bool head_gate;
    // rope_scaling of type "llama3" (factor 0 = none): frequencies of long wavelengths are divided by factor
    double rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    int rope_original_context;
    int bos_token_id, eos_token_id;                 // -1 = none
    int other_eos[MAX_EOS - 1], n_other_eos;        // of a list of eos_token_id, those behind the first
    char tokenizer[256];                            // built-in name or rank file beside config.json, "" = unknown
} Config;

static inline int config_head_size(const Config* c) { return c->hidden_size / c->num_attention_heads; }
static inline bool config_conv_pre(const Config* c, int l) { return c->kq_conv_layer[l] && c->kq_conv_pre_softmax; }
static inline bool config_conv_post(const Config* c, int l) { return c->kq_conv_layer[l] && c->kq_conv_post_softmax; }
// Heads that one RMSNorm of head_norm covers: 2 for diff, whose pair of heads is one of twice the size.
static inline int config_norm_heads(const Config* c) { return c->attention_type == ATTENTION_DIFF ? 2 : 1; }
// lambda_init of layer l, counted from 0 (paper section 3.3; DIFF Transformer eq. 3).
static inline double config_lambda_init(int l) { return 0.8 - 0.6 * exp(-0.3 * l); }

static inline bool config_any_conv(const Config* c) {
    for (int l = 0; l < c->num_hidden_layers; l++) { if (config_conv_pre(c, l) || config_conv_post(c, l)) { return true; } }
    return false;
}

// True for plain multi-head attention, which is written as a Hugging Face "llama".
static inline bool config_is_plain(const Config* c) {
    return c->attention_type == ATTENTION_MTA && !config_any_conv(c) && !c->head_mix_pre_softmax && !c->head_mix_post_softmax &&
           c->head_norm == HEAD_NORM_NONE && !c->head_gate;
}

// What Hugging Face's LlamaConfig assumes for absent keys; every MTA feature off.
static inline Config config_default(void) {
    Config c;
    memset(&c, 0, sizeof c);
    c.vocab_size = 32000; c.hidden_size = 4096; c.intermediate_size = 11008; c.num_hidden_layers = 32; c.num_attention_heads = 32;
    c.num_key_value_heads = 0;  // 0: as num_attention_heads
    c.max_position_embeddings = 2048;
    c.rope_theta = 10000.0; c.rms_norm_eps = 1e-6;
    c.kq_conv_query_size = 6; c.kq_conv_key_size = 11;
    c.bos_token_id = c.eos_token_id = -1;
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Checks

// Everything the programs rely on. Returns false with one line that says what is wrong and what is accepted.
static inline bool config_check(const Config* c, Error* e) {
    const struct { const char* name; int value, min, max; } ranges[] = {
        {"vocab_size", c->vocab_size, 1, MAX_VOCAB}, {"hidden_size", c->hidden_size, 2, MAX_DIM},
        {"intermediate_size", c->intermediate_size, 1, MAX_DIM}, {"num_hidden_layers", c->num_hidden_layers, 1, MAX_LAYERS},
        {"num_attention_heads", c->num_attention_heads, 1, MAX_HEADS}, {"num_key_value_heads", c->num_key_value_heads, 1, MAX_HEADS},
        {"max_position_embeddings", c->max_position_embeddings, 1, MAX_CONTEXT},
        {"kq_conv_query_size", c->kq_conv_query_size, 1, MAX_KERNEL}, {"kq_conv_key_size", c->kq_conv_key_size, 1, MAX_KERNEL},
        {"head_mix_pre_softmax", c->head_mix_pre_softmax, 0, MAX_HEADS}, {"head_mix_post_softmax", c->head_mix_post_softmax, 0, MAX_HEADS},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        if (ranges[i].value < ranges[i].min || ranges[i].value > ranges[i].max) {
            return fail(e, "%s: got %d, wanted %d to %d", ranges[i].name, ranges[i].value, ranges[i].min, ranges[i].max);
        }
    }
    int NH = c->num_attention_heads;
    if (c->hidden_size % NH) { return fail(e, "hidden_size %d is not divisible by num_attention_heads %d", c->hidden_size, NH); }
    if (config_head_size(c) % 2) { return fail(e, "head size %d is odd, RoPE needs an even one", config_head_size(c)); }
    if (NH % c->num_key_value_heads) {
        return fail(e, "num_attention_heads %d is not divisible by num_key_value_heads %d", NH, c->num_key_value_heads);
    }
    if (c->kq_conv_key_size % 2 == 0) { return fail(e, "kq_conv_key_size: got %d, wanted an odd number", c->kq_conv_key_size); }
    const int groups[2] = {c->head_mix_pre_softmax, c->head_mix_post_softmax};
    for (int i = 0; i < 2; i++) {
        if (groups[i] && NH % groups[i]) {
            return fail(e, "num_attention_heads %d is not divisible by head_mix_%s_softmax %d", NH, i ? "post" : "pre", groups[i]);
        }
    }
    if (!(c->rope_theta > 0 && isfinite(c->rope_theta))) { return fail(e, "rope_theta: got %g, wanted a positive number", c->rope_theta); }
    if (!(c->rms_norm_eps > 0 && c->rms_norm_eps < 1)) { return fail(e, "rms_norm_eps: got %g, wanted 0 < eps < 1", c->rms_norm_eps); }
    if (c->attention_type == ATTENTION_DIFF) {
        if (NH % 2) { return fail(e, "attention_type diff pairs heads: num_attention_heads %d is odd", NH); }
        if (config_any_conv(c) || groups[0] || groups[1] || c->head_gate) {
            return fail(e, "attention_type diff takes head_norm and grouped key/value heads only, no kq_conv, head_mix or head_gate beside it");
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Presets (README.md, dev/MODEL.md) and kinds of attention

static const char* const MODEL_NAMES = "toy, 1m, 3m, 11m, 25m, 300m, 550m, 880m, 1b";
static const char* const ATTENTION_NAMES = "transformer, mta, mta-full, talking-heads, diff";

// The layers with convolutions of a model by default: toy all; the paper's every fourth from 2; the small ones every second from 1.
typedef struct {
    const char* name;
    int C, L, NH, FF, V, context, first_conv, conv_stride;
    double rope_theta, lr;  // lr: peak learning rate, the paper's for 880m and toy, else what worked
} Preset;

static inline const Preset* preset_find(const char* name) {
    static const Preset presets[] = {
        {"toy", 256, 4, 2, 768, 32, 512, 0, 1, 100000, 1e-4},     {"1m", 128, 4, 4, 352, 259, 1024, 1, 2, 10000, 1e-3},
        {"3m", 192, 6, 6, 512, 259, 1024, 1, 2, 10000, 1e-3},     {"11m", 384, 6, 6, 1024, 259, 1024, 1, 2, 10000, 6e-4},
        {"25m", 512, 8, 8, 1408, 259, 1024, 1, 2, 10000, 6e-4},   {"300m", 1024, 20, 16, 2816, 128256, 2048, 2, 4, 100000, 1.5e-4},
        {"550m", 1280, 24, 10, 3584, 128256, 2048, 2, 4, 100000, 1.5e-4}, {"880m", 1536, 24, 16, 4096, 128256, 2048, 2, 4, 100000, 1.5e-4},
        {"1b", 2048, 24, 16, 5632, 128256, 2048, 2, 4, 100000, 1.5e-4},
    };
    for (size_t i = 0; i < sizeof presets / sizeof presets[0]; i++) { if (!strcmp(name, presets[i].name)) { return &presets[i]; } }
    return NULL;
}

static inline void config_from_preset(Config* c, const Preset* p) {
    *c = config_default();
    c->vocab_size = p->V; c->hidden_size = p->C; c->intermediate_size = p->FF; c->num_hidden_layers = p->L;
    c->num_attention_heads = c->num_key_value_heads = p->NH;
    c->max_position_embeddings = p->context;
    c->rope_theta = p->rope_theta; c->rms_norm_eps = 1e-5;
    c->tie_word_embeddings = true;
    for (int l = p->first_conv; l < p->L; l += p->conv_stride) { c->kq_conv_layer[l] = true; }
}

// Sets the fields that a kind of attention stands for (the paper's two versions, the toy model; baselines). Convolution layers are kept if the
// configuration names some, else every fourth from 2 (all, in a model of fewer than 3 layers). toy: the paper's toy model.
static inline bool config_set_attention(Config* c, const char* kind, bool toy, Error* e) {
    int NH = c->num_attention_heads;
    bool any = false;
    for (int l = 0; l < c->num_hidden_layers; l++) { any = any || c->kq_conv_layer[l]; }
    for (int l = 0; l < c->num_hidden_layers && !any; l++) { c->kq_conv_layer[l] = c->num_hidden_layers < 3 || l % 4 == 2; }
    bool mta = !strcmp(kind, "mta"), full = !strcmp(kind, "mta-full"), talking = !strcmp(kind, "talking-heads"), diff = !strcmp(kind, "diff");
    if (!mta && !full && !talking && !diff && strcmp(kind, "transformer")) {
        return fail(e, "attention: got \"%s\", wanted one of %s", kind, ATTENTION_NAMES);
    }
    if (!mta && !full) { memset(c->kq_conv_layer, 0, sizeof c->kq_conv_layer); }
    c->attention_type = diff ? ATTENTION_DIFF : ATTENTION_MTA;
    c->kq_conv_query_size = toy && mta ? 2 : 6;
    c->kq_conv_key_size = toy && mta ? 9 : 11;
    c->kq_conv_pre_softmax = mta || full;
    c->kq_conv_post_softmax = full;
    c->head_mix_pre_softmax = full || talking ? NH : 0;
    c->head_mix_post_softmax = full || talking ? NH : mta && !toy ? 2 : 0;
    c->head_norm = full ? HEAD_NORM_GROUP : diff || (mta && !toy) ? HEAD_NORM_GROUP_DEPTH_SCALED : HEAD_NORM_NONE;
    c->head_gate = full;
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
        if (end == s || l < 0 || l >= c->num_hidden_layers || (*end && *end != ',')) {
            return fail(e, "kq_conv_layers: got \"%s\", wanted all, none or a list like 1,3,5 of layers 0 to %d", list, c->num_hidden_layers - 1);
        }
        c->kq_conv_layer[l] = true;
        if (!*end) { return true; }
        s = end + 1;
    }
}

static inline bool config_set_head_norm(Config* c, const char* name, Error* e) {
    const char* const names[] = {"none", "group", "group_depth_scaled"};
    for (int i = 0; i < 3; i++) {
        if (!strcmp(name, names[i])) { c->head_norm = (HeadNorm)i; return true; }
    }
    return fail(e, "head_norm: got \"%s\", wanted none, group or group_depth_scaled", name);
}

static inline bool config_set_attention_type(Config* c, const char* name, Error* e) {
    if (!strcmp(name, "mta")) { c->attention_type = ATTENTION_MTA; return true; }
    if (!strcmp(name, "diff")) { c->attention_type = ATTENTION_DIFF; return true; }
    return fail(e, "attention_type: got \"%s\", wanted mta or diff", name);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// config.json

static inline bool config_json_int(const Json* j, const char* key, int min, int max, int* out, Error* e) {
    const Json* v = json_get(j, key);
    int64_t n;
    if (!v || v->type == JSON_NULL) { return true; }
    if (!json_integer(v, min, max, &n)) { return fail(e, "%s: wanted a whole number from %d to %d", key, min, max); }
    *out = (int)n;
    return true;
}

static inline bool config_json_number(const Json* j, const char* key, double* out, Error* e) {
    const Json* v = json_get(j, key);
    if (!v || v->type == JSON_NULL) { return true; }
    if (v->type != JSON_NUMBER || !isfinite(v->number)) { return fail(e, "%s: wanted a number", key); }
    *out = v->number;
    return true;
}

static inline bool config_json_bool(const Json* j, const char* key, bool* out, Error* e) {
    const Json* v = json_get(j, key);
    if (!v || v->type == JSON_NULL) { return true; }
    if (v->type != JSON_BOOL) { return fail(e, "%s: wanted true or false", key); }
    *out = v->boolean;
    return true;
}

// NULL if absent or null; *ok false if it is no string of at most `max` bytes.
static inline const char* config_json_string(const Json* j, const char* key, size_t max, bool* ok, Error* e) {
    const Json* v = json_get(j, key);
    if (!v || v->type == JSON_NULL) { return NULL; }
    if (v->type != JSON_STRING || v->length > max || strlen(v->string) != v->length) { *ok = fail(e, "%s: wanted a short string", key); return NULL; }
    return v->string;
}

// An id, into *out, or a list of ids (Llama 3's eos_token_id is one): the first into *out, others into others (MAX_EOS - 1) and *n_others.
static inline bool config_json_token(const Json* j, const char* key, int* out, int* others, int* n_others, Error* e) {
    const Json* v = json_get(j, key);
    bool list = v && v->type == JSON_ARRAY;
    if (!v || v->type == JSON_NULL) { return true; }
    int count = 0;
    for (v = list ? v->child : v; v; v = list ? v->next : NULL, count++) {
        int64_t n;
        if (!json_integer(v, -1, MAX_VOCAB, &n)) { return fail(e, "%s: wanted a token id", key); }
        if (count == MAX_EOS) { return fail(e, "%s: more than %d ids", key, MAX_EOS); }
        if (!count) { *out = (int)n; } else if (others) { others[(*n_others)++] = (int)n; }
    }
    return true;
}

// rope_scaling (or rope_parameters, its newer name, which also holds rope_theta): "default" and "llama3" are known, others refused.
static inline bool config_json_rope(Config* c, const Json* s, Error* e) {
    if (!s || s->type == JSON_NULL) { return true; }
    if (s->type != JSON_OBJECT) { return fail(e, "rope_scaling: wanted an object"); }
    bool ok = true;
    const char* type = config_json_string(s, "rope_type", 32, &ok, e);
    if (!type && ok) { type = config_json_string(s, "type", 32, &ok, e); }
    if (!ok || !config_json_number(s, "rope_theta", &c->rope_theta, e)) { return false; }
    if (!type || !strcmp(type, "default")) { return true; }
    if (strcmp(type, "llama3")) { return fail(e, "rope_scaling: type \"%.32s\" is not supported, wanted llama3 or none", type); }
    c->rope_factor = 8; c->rope_low_freq_factor = 1; c->rope_high_freq_factor = 4; c->rope_original_context = 8192;
    if (!config_json_number(s, "factor", &c->rope_factor, e) || !config_json_number(s, "low_freq_factor", &c->rope_low_freq_factor, e) ||
        !config_json_number(s, "high_freq_factor", &c->rope_high_freq_factor, e) ||
        !config_json_int(s, "original_max_position_embeddings", 1, MAX_CONTEXT, &c->rope_original_context, e)) { return false; }
    if (!(c->rope_factor >= 1 && c->rope_low_freq_factor > 0 && c->rope_high_freq_factor > c->rope_low_freq_factor)) {
        return fail(e, "rope_scaling: wanted factor >= 1 and 0 < low_freq_factor < high_freq_factor");
    }
    return true;
}

static inline bool config_json_conv_layers(Config* c, const Json* v, Error* e) {
    if (!v || v->type == JSON_NULL) { return true; }
    if (v->type != JSON_ARRAY) { return fail(e, "kq_conv_layers: wanted a list of layer numbers"); }
    for (const Json* item = v->child; item; item = item->next) {
        int64_t l;
        if (!json_integer(item, 0, c->num_hidden_layers - 1, &l)) {
            return fail(e, "kq_conv_layers: wanted layers from 0 to %d", c->num_hidden_layers - 1);
        }
        c->kq_conv_layer[l] = true;
    }
    return true;
}

// Reads a parsed config.json; absent keys take LlamaConfig's defaults, absent MTA keys are off. Refuses what the programs would compute wrongly.
static inline bool config_from_json(Config* c, const Json* j, Error* e) {
    *c = config_default();
    if (!j || j->type != JSON_OBJECT) { return fail(e, "wanted a JSON object"); }
    bool ok = true, bias = false;
    int head_dim = 0;
    ok = config_json_int(j, "vocab_size", 1, MAX_VOCAB, &c->vocab_size, e) && config_json_int(j, "hidden_size", 1, MAX_DIM, &c->hidden_size, e) &&
         config_json_int(j, "intermediate_size", 1, MAX_DIM, &c->intermediate_size, e) &&
         config_json_int(j, "num_hidden_layers", 1, MAX_LAYERS, &c->num_hidden_layers, e) &&
         config_json_int(j, "num_attention_heads", 1, MAX_HEADS, &c->num_attention_heads, e) &&
         config_json_int(j, "num_key_value_heads", 1, MAX_HEADS, &c->num_key_value_heads, e) &&
         config_json_int(j, "max_position_embeddings", 1, MAX_CONTEXT, &c->max_position_embeddings, e) &&
         config_json_int(j, "head_dim", 1, MAX_DIM, &head_dim, e) && config_json_number(j, "rope_theta", &c->rope_theta, e) &&
         config_json_number(j, "rms_norm_eps", &c->rms_norm_eps, e) && config_json_bool(j, "tie_word_embeddings", &c->tie_word_embeddings, e) &&
         config_json_rope(c, json_get(j, "rope_scaling"), e) && config_json_rope(c, json_get(j, "rope_parameters"), e) &&
         config_json_token(j, "bos_token_id", &c->bos_token_id, NULL, NULL, e) &&
         config_json_token(j, "eos_token_id", &c->eos_token_id, c->other_eos, &c->n_other_eos, e) &&
         config_json_conv_layers(c, json_get(j, "kq_conv_layers"), e) &&
         config_json_int(j, "kq_conv_query_size", 1, MAX_KERNEL, &c->kq_conv_query_size, e) &&
         config_json_int(j, "kq_conv_key_size", 1, MAX_KERNEL, &c->kq_conv_key_size, e) &&
         config_json_bool(j, "kq_conv_pre_softmax", &c->kq_conv_pre_softmax, e) &&
         config_json_bool(j, "kq_conv_post_softmax", &c->kq_conv_post_softmax, e) &&
         config_json_int(j, "head_mix_pre_softmax", 0, MAX_HEADS, &c->head_mix_pre_softmax, e) &&
         config_json_int(j, "head_mix_post_softmax", 0, MAX_HEADS, &c->head_mix_post_softmax, e) &&
         config_json_bool(j, "head_gate", &c->head_gate, e);
    if (!ok) { return false; }
    const char* s = config_json_string(j, "attention_type", 64, &ok, e);
    if (!ok || (s && !config_set_attention_type(c, s, e))) { return false; }
    s = config_json_string(j, "head_norm", 64, &ok, e);
    if (!ok || (s && !config_set_head_norm(c, s, e))) { return false; }
    s = config_json_string(j, "hidden_act", 64, &ok, e);
    if (!ok || (s && strcmp(s, "silu"))) { return fail(e, "hidden_act: got \"%s\", wanted silu", s ? s : "?"); }
    s = config_json_string(j, "tokenizer", sizeof c->tokenizer - 1, &ok, e);
    if (!ok) { return false; }
    if (s && strchr(s, '/')) { return fail(e, "tokenizer: got \"%s\", wanted a name or a file beside config.json", s); }
    if (s) { snprintf(c->tokenizer, sizeof c->tokenizer, "%s", s); }
    if (!config_json_bool(j, "attention_bias", &bias, e)) { return false; }
    if (bias) { return fail(e, "attention_bias: biases are not supported"); }
    if (!config_json_bool(j, "mlp_bias", &bias, e)) { return false; }
    if (bias) { return fail(e, "mlp_bias: biases are not supported"); }
    double rotary = 1, window = 0;
    bool windowed = true;
    if (!config_json_number(j, "partial_rotary_factor", &rotary, e) || !config_json_number(j, "sliding_window", &window, e) ||
        !config_json_bool(j, "use_sliding_window", &windowed, e)) { return false; }
    if (rotary != 1) { return fail(e, "partial_rotary_factor: got %g, wanted 1: RoPE turns whole heads", rotary); }
    if (windowed && window > 0 && window < c->max_position_embeddings) {
        return fail(e, "sliding_window: got %g, wanted none below the context of %d: attention sees all positions", window, c->max_position_embeddings);
    }
    if (!c->num_key_value_heads) { c->num_key_value_heads = c->num_attention_heads; }
    if (head_dim && (c->hidden_size % c->num_attention_heads || head_dim != config_head_size(c))) {
        return fail(e, "head_dim: got %d, wanted hidden_size / num_attention_heads = %d / %d", head_dim, c->hidden_size, c->num_attention_heads);
    }
    return config_check(c, e);
}

static inline bool config_read(Config* c, const char* path, Error* e) {
    char* text;
    size_t n;
    Error inner = {{0}};
    if (!read_file(path, (size_t)16 << 20, &text, &n, e)) { return false; }
    Json* j = json_parse(text, n, &inner);
    bool ok = j && config_from_json(c, j, &inner);
    json_free(j);
    free(text);
    return ok ? true : fail(e, "%s: %.400s", path, inner.text);
}

// torch_dtype: what model.safetensors beside it holds, "float32" or "bfloat16".
static inline void config_to_json(const Config* c, const char* torch_dtype, Text* t) {
    static const char* const norms[] = {"none", "group", "group_depth_scaled"};
    bool plain = config_is_plain(c);
    text_printf(t, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n", plain ? "LlamaForCausalLM" : "MtaForCausalLM", plain ? "llama" : "mta");
    text_printf(t, "  \"vocab_size\": %d,\n  \"hidden_size\": %d,\n  \"intermediate_size\": %d,\n  \"num_hidden_layers\": %d,\n",
                c->vocab_size, c->hidden_size, c->intermediate_size, c->num_hidden_layers);
    text_printf(t, "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n  \"head_dim\": %d,\n  \"max_position_embeddings\": %d,\n",
                c->num_attention_heads, c->num_key_value_heads, config_head_size(c), c->max_position_embeddings);
    text_printf(t, "  \"hidden_act\": \"silu\",\n  \"attention_bias\": false,\n  \"mlp_bias\": false,\n  \"attention_dropout\": 0.0,\n");
    text_printf(t, "  \"rope_theta\": %.17g,\n  \"rms_norm_eps\": %.17g,\n  \"tie_word_embeddings\": %s,\n", c->rope_theta, c->rms_norm_eps,
                c->tie_word_embeddings ? "true" : "false");
    if (c->rope_factor > 0) {
        text_printf(t, "  \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": %.17g, \"low_freq_factor\": %.17g, \"high_freq_factor\": %.17g, "
                    "\"original_max_position_embeddings\": %d},\n", c->rope_factor, c->rope_low_freq_factor, c->rope_high_freq_factor, c->rope_original_context);
    }
    if (c->bos_token_id >= 0) { text_printf(t, "  \"bos_token_id\": %d,\n", c->bos_token_id); } else { text_printf(t, "  \"bos_token_id\": null,\n"); }
    if (c->n_other_eos) {
        text_printf(t, "  \"eos_token_id\": [%d", c->eos_token_id);
        for (int i = 0; i < c->n_other_eos; i++) { text_printf(t, ", %d", c->other_eos[i]); }
        text_printf(t, "],\n");
    } else if (c->eos_token_id >= 0) {
        text_printf(t, "  \"eos_token_id\": %d,\n", c->eos_token_id);
    } else {
        text_printf(t, "  \"eos_token_id\": null,\n");
    }
    if (c->tokenizer[0]) { text_printf(t, "  \"tokenizer\": "); text_json_string(t, c->tokenizer, strlen(c->tokenizer)); text_printf(t, ",\n"); }
    if (!plain) {
        text_printf(t, "  \"attention_type\": \"%s\",\n  \"kq_conv_layers\": [", c->attention_type == ATTENTION_DIFF ? "diff" : "mta");
        for (int l = 0, first = 1; l < c->num_hidden_layers; l++) {
            if (c->kq_conv_layer[l]) { text_printf(t, "%s%d", first ? "" : ", ", l); first = 0; }
        }
        text_printf(t, "],\n  \"kq_conv_query_size\": %d,\n  \"kq_conv_key_size\": %d,\n  \"kq_conv_pre_softmax\": %s,\n  \"kq_conv_post_softmax\": %s,\n",
                    c->kq_conv_query_size, c->kq_conv_key_size, c->kq_conv_pre_softmax ? "true" : "false", c->kq_conv_post_softmax ? "true" : "false");
        text_printf(t, "  \"head_mix_pre_softmax\": %d,\n  \"head_mix_post_softmax\": %d,\n  \"head_norm\": \"%s\",\n  \"head_gate\": %s,\n",
                    c->head_mix_pre_softmax, c->head_mix_post_softmax, norms[c->head_norm], c->head_gate ? "true" : "false");
    }
    text_printf(t, "  \"initializer_range\": %.9g,\n  \"torch_dtype\": \"%s\",\n  \"use_cache\": true\n}\n", pow(c->hidden_size, -0.5), torch_dtype);
}

// First difference between two models' shapes and mathematics, as "field: got A, wanted B"; true if there is none.
// What may change on resume without changing the model (context, tokenizer, token ids) is not compared.
static inline bool config_same_model(const Config* got, const Config* want, Error* e) {
    const struct { const char* name; double got, want; } fields[] = {
        {"vocab_size", (double)got->vocab_size, (double)want->vocab_size}, {"hidden_size", (double)got->hidden_size, (double)want->hidden_size},
        {"intermediate_size", (double)got->intermediate_size, (double)want->intermediate_size},
        {"num_hidden_layers", (double)got->num_hidden_layers, (double)want->num_hidden_layers},
        {"num_attention_heads", (double)got->num_attention_heads, (double)want->num_attention_heads},
        {"num_key_value_heads", (double)got->num_key_value_heads, (double)want->num_key_value_heads},
        {"rope_theta", got->rope_theta, want->rope_theta}, {"rms_norm_eps", got->rms_norm_eps, want->rms_norm_eps},
        {"rope_scaling factor", got->rope_factor, want->rope_factor},
        {"tie_word_embeddings", (double)got->tie_word_embeddings, (double)want->tie_word_embeddings},
        {"attention_type (0 mta, 1 diff)", (double)got->attention_type, (double)want->attention_type},
        {"head_mix_pre_softmax", (double)got->head_mix_pre_softmax, (double)want->head_mix_pre_softmax},
        {"head_mix_post_softmax", (double)got->head_mix_post_softmax, (double)want->head_mix_post_softmax},
        {"head_norm (0 none, 1 group, 2 group_depth_scaled)", (double)got->head_norm, (double)want->head_norm},
        {"head_gate", (double)got->head_gate, (double)want->head_gate},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (fields[i].got != fields[i].want) { return fail(e, "%s: got %.9g, wanted %.9g", fields[i].name, fields[i].got, fields[i].want); }
    }
    bool conv = false;
    for (int l = 0; l < got->num_hidden_layers; l++) {
        if (config_conv_pre(got, l) != config_conv_pre(want, l) || config_conv_post(got, l) != config_conv_post(want, l)) {
            return fail(e, "kq_conv in layer %d: got before/after softmax %d/%d, wanted %d/%d", l, config_conv_pre(got, l), config_conv_post(got, l),
                        config_conv_pre(want, l), config_conv_post(want, l));
        }
        conv = conv || config_conv_pre(got, l) || config_conv_post(got, l);
    }
    if (conv && (got->kq_conv_query_size != want->kq_conv_query_size || got->kq_conv_key_size != want->kq_conv_key_size)) {
        return fail(e, "kq_conv size: got %dx%d, wanted %dx%d", got->kq_conv_query_size, got->kq_conv_key_size, want->kq_conv_query_size, want->kq_conv_key_size);
    }
    return true;
}

// Rotation of RoPE pair t (of HS/2) in radians per position, with Llama 3's scaling where configured.
static inline double config_rope_frequency(const Config* c, int t) {
    double f = pow(c->rope_theta, -2.0 * t / config_head_size(c));
    if (c->rope_factor <= 0) { return f; }
    double turns = c->rope_original_context * f / (2 * 3.14159265358979323846);  // rotations within the original context
    if (turns < c->rope_low_freq_factor) { return f / c->rope_factor; }
    if (turns > c->rope_high_freq_factor) { return f; }
    double s = (turns - c->rope_low_freq_factor) / (c->rope_high_freq_factor - c->rope_low_freq_factor);
    return (1 - s) * f / c->rope_factor + s * f;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// The tensors

typedef enum {
    TENSOR_EMBED, TENSOR_INPUT_NORM, TENSOR_Q, TENSOR_K, TENSOR_V, TENSOR_O, TENSOR_KQ_CONV, TENSOR_KQ_CONV_POST, TENSOR_HEAD_MIX_PRE,
    TENSOR_HEAD_MIX, TENSOR_HEAD_NORM, TENSOR_GATE_WEIGHT, TENSOR_GATE_BIAS, TENSOR_LAMBDA_Q1, TENSOR_LAMBDA_K1, TENSOR_LAMBDA_Q2,
    TENSOR_LAMBDA_K2, TENSOR_POST_NORM, TENSOR_GATE_PROJ, TENSOR_UP_PROJ, TENSOR_DOWN_PROJ, TENSOR_NORM, TENSOR_LM_HEAD, TENSOR_KINDS
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

static inline void tensor_add(TensorList* list, TensorKind kind, int layer, const char* name, size_t a, size_t b, size_t c) {
    TensorSpec* s = &list->specs[list->n];
    memset(s, 0, sizeof *s);
    snprintf(s->name, sizeof s->name, "%s", name);
    s->ndim = c ? 3 : b ? 2 : 1;
    s->shape[0] = a; s->shape[1] = b; s->shape[2] = c;
    s->numel = a * (b ? b : 1) * (c ? c : 1);
    s->offset = list->numel;
    s->layer = layer; s->kind = kind;
    list->by_kind[layer * TENSOR_KINDS + kind] = list->n++;
    list->numel += (s->numel + 63) / 64 * 64;
    list->parameters += s->numel;
}

// Fills the list for a checked configuration; in the order of the forward pass. Owns memory: tensor_list_free.
static inline void tensor_list(TensorList* list, const Config* c) {
    size_t C = (size_t)c->hidden_size, FF = (size_t)c->intermediate_size, V = (size_t)c->vocab_size, HS = (size_t)config_head_size(c);
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
        if (c->head_norm != HEAD_NORM_NONE) { TENSOR(TENSOR_HEAD_NORM, "self_attn.head_norm.weight", HS * (size_t)config_norm_heads(c), 0, 0); }
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
    for (int i = 0; i < list->n; i++) { if (!strcmp(list->specs[i].name, name)) { return i; } }
    return -1;
}
static inline int tensor_at(const TensorList* list, int layer, TensorKind kind) { return list->by_kind[layer * TENSOR_KINDS + kind]; }

// Tensors that a plain LLaMA-family checkpoint lacks: --init-from starts them at the identity.
static inline bool tensor_is_mta(const TensorSpec* s) { return s->kind >= TENSOR_KQ_CONV && s->kind <= TENSOR_LAMBDA_K2; }
static inline bool tensor_is_norm(const TensorSpec* s) {
    return s->kind == TENSOR_INPUT_NORM || s->kind == TENSOR_POST_NORM || s->kind == TENSOR_NORM || s->kind == TENSOR_HEAD_NORM;
}

#endif
