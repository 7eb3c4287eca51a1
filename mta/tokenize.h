// mta/tokenize.h: the tokenizer alone, infer_mta --tokenize and --detokenize: JSON lines with a text in, lines of ids
// out, and back; with --binary many texts at a time, for data/prepare.py.
#ifndef MTA_TOKENIZE_H
#define MTA_TOKENIZE_H

#include "infer_options.h"
#include "score.h"

// Ids of "1 2,3" (malloc'ed), each in 0..V-1; dies naming `where`.
static inline int32_t* parse_ids(const char* text, int V, const char* where, size_t* count) {
    size_t cap = strlen(text) / 2 + 1, n = 0;
    int32_t* ids = (int32_t*)alloc_or_die(cap, sizeof *ids, "token ids");
    for (const char* p = text;;) {
        p += strspn(p, " ,\t\r\n");
        if (!*p) { break; }
        char* end;
        errno = 0;
        long id = strtol(p, &end, 10);
        if (end == p || errno || id < 0 || id >= V || !strchr(" ,\t\r\n", *end)) {
            die("%s: got \"%.*s\", wanted token ids from 0 to %d", where,
                (int)strcspn(p, " ,\t\r\n") > 40 ? 40 : (int)strcspn(p, " ,\t\r\n"), p, V - 1);
        }
        ids[n++] = (int32_t)id;
        p = end;
    }
    *count = n;
    return ids;
}

// --tokenize --binary, as data/prepare.py asks for it. A batch: its size in bytes, uint64, then UTF-8 texts, each ended
// by the byte 0xFF, which UTF-8 never holds. Its answer: the number of ids of each text, then all ids, each a uint32.
static inline void tokenize_batches(const Tokenizer* t) {
    Text batch = {NULL, 0, 0}, counts = {NULL, 0, 0}, ids = {NULL, 0, 0};
    Error e = {{0}};
    for (uint64_t size;;) {
        size_t got_size = fread(&size, 1, sizeof size, stdin);
        if (ferror(stdin)) { die("standard input: %s", strerror(errno)); }
        if (!got_size) { break; }
        if (got_size != sizeof size) { die("standard input: it ends inside a batch"); }
        if (size > UINT64_C(1) << 32) {
            die("standard input: a batch of %llu bytes, wanted 4 GiB at most", (unsigned long long)size);
        }
        batch.n = counts.n = ids.n = 0;
        text_reserve(&batch, (size_t)size);
        if (fread(batch.text, 1, (size_t)size, stdin) != size) { die("standard input: it ends inside a batch"); }
        for (size_t at = 0; at < size;) {
            const char* end = (const char*)memchr(batch.text + at, 0xFF, (size_t)size - at);
            int32_t* got;
            size_t count;
            if (!end) { die("standard input: a text without the byte 0xFF after it"); }
            if (!tokenizer_encode(t, batch.text + at, (size_t)(end - batch.text) - at, &got, &count, &e)) {
                die("standard input: %s", e.text);
            }
            uint32_t n = (uint32_t)count;
            text_append(&counts, (const char*)&n, sizeof n);
            text_append(&ids, (const char*)got, count * sizeof *got);
            free(got);
            at = (size_t)(end - batch.text) + 1;
        }
        put_out(counts.text, counts.n, false);
        put_out(ids.text, ids.n, true);
    }
    text_free(&batch);
    text_free(&counts);
    text_free(&ids);
}

static inline void run_tokenizer(const InferOptions* o) {
    Error e = {{0}};
    Config c = config_default();
    char path[PATH_SIZE];
    if (o->dir) {
        path_join(path, sizeof path, o->dir, "config.json");
        if (!config_read(&c, path, o->assume_llama, &e)) { die("%s", e.text); }
    }
    Tokenizer* t = tokenizer_for(o, o->dir ? &c : NULL);
    if (!t) { die("%s names no tokenizer; give --tokenizer NAME|FILE", path); }
    if (o->binary) {
        tokenize_batches(t);
        tokenizer_free(t);
        return;
    }
    Lines lines;
    Text out = {NULL, 0, 0};
    lines_open(&lines, "-");
    char* piece = (char*)alloc_or_die(tokenizer_max_bytes(t) + 8, 1, "a token's text");
    size_t n, count;
    int32_t* ids;
    for (char* line; (line = lines_next(&lines, "standard input", true, &n)) != NULL;) {
        out.n = 0;
        if (o->tokenize) {
            Json* j = json_parse(line, n, &e);
            if (!j) { die("standard input: line %ld: %s", lines.number, e.text); }
            const Json* text = json_get(j, "text");
            if (!text || text->type != JSON_STRING) {
                die("standard input: line %ld: wanted an object with \"text\", a string", lines.number);
            }
            if (!tokenizer_encode(t, text->string, text->length, &ids, &count, &e)) {
                die("standard input: line %ld: %s", lines.number, e.text);
            }
            for (size_t i = 0; i < count; i++) { text_printf(&out, i ? " %d" : "%d", ids[i]); }
            json_free(j);
        } else {
            char where[64];
            Text text = {NULL, 0, 0};
            TokenStream stream = {{0}, 0};
            snprintf(where, sizeof where, "standard input: line %ld", lines.number);
            if (strlen(line) != n) { die("%s: a NUL byte, wanted token ids", where); }
            ids = parse_ids(line, tokenizer_vocab(t), where, &count);
            for (size_t i = 0; i < count; i++) {
                text_append(&text, piece, tokenizer_decode(t, &stream, ids[i], piece));
            }
            text_append(&text, piece, tokenizer_flush(&stream, piece));
            text_append(&out, "{\"text\": ", 9);
            text_json_string(&out, text.text, text.n);
            text_append(&out, "}", 1);
            text_free(&text);
        }
        free(ids);
        text_append(&out, "\n", 1);
        put_out(out.text, out.n, false);
    }
    put_out("", 0, true);
    lines_close(&lines);
    text_free(&out);
    free(piece);
    tokenizer_free(t);
}

#endif
