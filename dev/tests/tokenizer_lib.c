// dev/tests/tokenizer_lib.c: mta/tokenizer.h as a shared library, so that test_tokenizer.py can call it a million
// times.
//   cc -O2 -shared -fPIC -I. dev/tests/tokenizer_lib.c -o /tmp/tokenizer_lib.so
#include "mta/tokenizer.h"

// pattern NULL: as the file tells.
Tokenizer* lib_open(const char* file, const char* pattern, char* message /* 512 */) {
    Error e = {""};
    Tokenizer* t = tokenizer_open(file, pattern, &e);
    memcpy(message, e.text, sizeof e.text);
    return t;
}

// ids has room for n + 1. Returns how many, -1 and a message on failure.
long lib_encode(const Tokenizer* t, const char* text, size_t n, int32_t* ids, char* message) {
    Error e = {""};
    int32_t* got;
    size_t count;
    bool ok = tokenizer_encode(t, text, n, &got, &count, &e);
    memcpy(message, e.text, sizeof e.text);
    if (!ok) { return -1; }
    memcpy(ids, got, count * sizeof *ids);
    free(got);
    return (long)count;
}

// out has room for n * (tokenizer_max_bytes() + 8) + 8. Returns its bytes.
size_t lib_decode(const Tokenizer* t, const int32_t* ids, size_t n, char* out) {
    TokenStream s = {{0}, 0};
    size_t written = 0;
    for (size_t i = 0; i < n; i++) { written += tokenizer_decode(t, &s, ids[i], out + written); }
    return written + tokenizer_flush(&s, out + written);
}

size_t lib_max_bytes(const Tokenizer* t) { return tokenizer_max_bytes(t); }
const char* lib_name(const Tokenizer* t) { return tokenizer_name(t); }
int lib_vocab(const Tokenizer* t) { return tokenizer_vocab(t); }
int lib_bos(const Tokenizer* t) { return tokenizer_bos(t); }
int lib_eos(const Tokenizer* t) { return tokenizer_eos(t); }
void lib_close(Tokenizer* t) { tokenizer_free(t); }
