// fuzz_tokenizer.c: a byte that chooses the pattern, a rank file up to a NUL, and a text behind it: the file is opened,
// the text encoded and decoded again, which must give it back wherever it is UTF-8.
#include "mta/json.h"
#include "mta/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n);

static bool is_utf8(const char* s, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t len = utf8_length(s + i, n - i);
        if (!len) { return false; }
        i += len;
    }
    return true;
}

static void round_trip(Tokenizer* t, const char* text, size_t n) {
    Error e = {{0}};
    int32_t* ids;
    size_t count;
    if (!tokenizer_encode(t, text, n, &ids, &count, &e)) { return; }
    TokenStream stream = {{0}, 0};
    Text back = {0};
    char* piece = (char*)malloc(tokenizer_max_bytes(t) + 8);
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= tokenizer_vocab(t)) { abort(); }
        text_append(&back, piece, tokenizer_decode(t, &stream, ids[i], piece));
    }
    text_append(&back, piece, tokenizer_flush(&stream, piece));
    if (is_utf8(text, n) && (back.n != n || memcmp(back.text, text, n))) { abort(); }
    for (int id = -1; id <= tokenizer_vocab(t); id++) { tokenizer_decode(t, &stream, id, piece); }
    free(piece);
    text_free(&back);
    free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    static const char* const patterns[4] = {"gpt2", "cl100k_base", "llama3", "o200k_base"};
    static int fd = -1;
    static char path[64];
    static Tokenizer* bytes = NULL;
    if (fd < 0) {
        fd = memfd_create("ranks", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        bytes = tokenizer_open("bytes", NULL, NULL);
    }
    if (n < 1) { return 0; }
    const uint8_t* nul = (const uint8_t*)memchr(data + 1, 0, n - 1);
    size_t ranks = nul ? (size_t)(nul - data) - 1 : n - 1;
    const char* text = nul ? (const char*)nul + 1 : "";
    size_t text_size = nul ? n - ranks - 2 : 0;
    if (ftruncate(fd, 0) || pwrite(fd, data + 1, ranks, 0) != (ssize_t)ranks) { abort(); }
    Error e = {{0}};
    Tokenizer* t = tokenizer_open(path, patterns[data[0] % 4], &e);
    if (t) {
        round_trip(t, text, text_size);
        tokenizer_free(t);
    }
    round_trip(bytes, text, text_size);
    return 0;
}
