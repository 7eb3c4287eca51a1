// mta/attention_map.h: the attention weights of one head over a prompt, as infer_mta --attention-map writes them for
// scripts/attention_map.py:
//   {"layer": 0, "head": 0, "tokens": [text of each], "before": rows 0..i of weights, "after": the same}
#ifndef MTA_ATTENTION_MAP_H
#define MTA_ATTENTION_MAP_H

#include "json.h"
#include "tokenizer.h"
#include "util.h"

// Attention weights of one head for a picture: rows by query, columns by key.
typedef struct {
    int layer, head, n;
    float *before, *after;
} AttentionTap;  // (n, n)

static inline void attention_map_put(Text* t, const char* name, const float* x, int n) {
    text_printf(t, ",\n\"%s\": [", name);
    for (int i = 0; i < n; i++) {
        text_printf(t, "%s\n[", i ? "," : "");
        for (int j = 0; j <= i; j++) {
            text_printf(t, "%s%.6g", j ? "," : "", (double)x[(size_t)i * (size_t)n + (size_t)j]);
        }
        text_printf(t, "]");
    }
    text_printf(t, "]");
}

// Writes the file; ids (tap->n). Without a tokenizer the tokens are their numbers, and so are those that have no text
// but BOS and EOS.
static inline void attention_map_write(const char* path, const AttentionTap* tap, const Tokenizer* tokenizer,
                                       const int32_t* ids) {
    Text t = {NULL, 0, 0};
    text_printf(&t, "{\"layer\": %d, \"head\": %d, \"tokens\": [", tap->layer, tap->head);
    char* piece = tokenizer ? (char*)alloc_or_die(tokenizer_max_bytes(tokenizer) + 8, 1, "a token's text") : NULL;
    for (int i = 0; i < tap->n; i++) {
        TokenStream stream = {{0}, 0};
        size_t n = tokenizer ? tokenizer_decode(tokenizer, &stream, ids[i], piece) : 0;
        if (tokenizer) { n += tokenizer_flush(&stream, piece + n); }
        text_append(&t, ", ", i ? 2 : 0);
        if (n) {
            text_json_string(&t, piece, n);
        } else if (tokenizer && ids[i] == tokenizer_bos(tokenizer)) {
            text_printf(&t, "\"<BOS>\"");
        } else if (tokenizer && ids[i] == tokenizer_eos(tokenizer)) {
            text_printf(&t, "\"<EOS>\"");
        } else {
            text_printf(&t, "\"%d\"", ids[i]);
        }
    }
    text_append(&t, "]", 1);
    attention_map_put(&t, "before", tap->before, tap->n);
    attention_map_put(&t, "after", tap->after, tap->n);
    text_append(&t, "}\n", 2);
    Error e = {{0}};
    if (!write_file_synced(path, t.text, t.n, &e)) { die("%s", e.text); }
    text_free(&t);
    free(piece);
}

#endif
