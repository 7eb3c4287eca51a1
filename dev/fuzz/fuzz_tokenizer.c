// fuzz_tokenizer.c: a byte that chooses the pattern, a rank file up to a NUL, and a text behind it: the file is opened,
// the text encoded and decoded again, which must give it back wherever it is UTF-8.
#include "structure.h"
#include "mta/tokenizer.h"

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
    static Tokenizer* bytes = NULL;
    input_clock()->input++;
    if (!bytes) { bytes = tokenizer_open("bytes", NULL, NULL); }
    if (n < 1) { return 0; }
    const uint8_t* nul = (const uint8_t*)memchr(data + 1, 0, n - 1);
    size_t ranks = nul ? (size_t)(nul - data) - 1 : n - 1;
    const char* text = nul ? (const char*)nul + 1 : "";
    size_t text_size = nul ? n - ranks - 2 : 0;
    memory_add(MEMORY_FOLDER, "ranks", (const char*)data + 1, ranks);
    Error e = {{0}};
    Tokenizer* t = tokenizer_open(MEMORY_FOLDER "/ranks", patterns[data[0] % 4], &e);
    if (t) {
        round_trip(t, text, text_size);
        tokenizer_free(t);
    }
    round_trip(bytes, text, text_size);
    memory_clear();
    return 0;
}

// One line of a rank file changed: its bytes, its rank, gone, twice, elsewhere, or a new one made of two others.
static void mutate_line(Text* t, Dice* dice) {
    static const char* const lines[] = {
        "",          "\n",    "YQ==\n",    "YQ== 1 2\n", "YQ==  7\n",    " YQ== 7\n",         "YQ== 256\n",
        "YQ== -1\n", "= 0\n", "YR== 97\n", "YQ=\t97\n",  "YWFh 300\r\n", "YQ== 4294967296\n", "IA== 32\n"};
    enum { MAX_LINES = 512 };
    size_t start[MAX_LINES + 1];
    int n = 0;
    for (size_t at = 0; at < t->n && n < MAX_LINES; n++) {
        const char* end = (const char*)memchr(t->text + at, '\n', t->n - at);
        start[n] = at;
        at = start[n + 1] = end ? (size_t)(end - t->text) + 1 : t->n;
    }
    if (!n) {
        mutate_bytes(t, t->n + 64);
        return;
    }
    int i = (int)roll(dice, (size_t)n),
        j = roll(dice, 3) ? n - 1 - (int)roll(dice, (size_t)(n < 8 ? n : 8)) : (int)roll(dice, (size_t)n);
    size_t from = start[j], bytes = start[j + 1] - from;
    char line[600], number[32];
    const char* space = (const char*)memchr(t->text + from, ' ', bytes);
    switch (roll(dice, 6)) {
        case 0: text_replace(t, from, bytes, "", 0); return;
        case 1: {
            const char* odd = lines[roll(dice, sizeof lines / sizeof lines[0])];
            text_replace(t, from, roll(dice, 2) ? bytes : 0, odd, strlen(odd));
            return;
        }
        case 2: {  // a copy of another line
            size_t m = start[i + 1] - start[i];
            if (m > sizeof line) { return; }
            memcpy(line, t->text + start[i], m);
            text_replace(t, from, roll(dice, 2) ? bytes : 0, line, m);
            return;
        }
        case 3:  // another rank
            if (!space) { return; }
            snprintf(number, sizeof number, " %d\n", n + (int)roll(dice, 4) - 2);
            from = (size_t)(space - t->text);
            text_replace(t, from, start[j + 1] - from, number, strlen(number));
            return;
        case 4: {  // a new token at the end, of three or six bytes that stand there
            const char* base64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            int m = roll(dice, 2) ? 4 : 8;
            for (int k = 0; k < m; k++) { line[k] = base64[roll(dice, 64)]; }
            snprintf(line + m, sizeof line - (size_t)m, " %d\n", n);
            text_append(t, line, strlen(line));
            return;
        }
        default:
            if (!space || (size_t)(space - t->text) == from) { return; }
            t->text[from + roll(dice, (size_t)(space - t->text) - from)] = "Ab9+/=_ "[roll(dice, 8)];
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t n, size_t max, unsigned int seed) {
    Dice dice = {seed};
    Text ranks = {NULL, 0, 0}, t = {NULL, 0, 0};
    const uint8_t* nul = n > 1 ? (const uint8_t*)memchr(data + 1, 0, n - 1) : NULL;
    if (!nul || !roll(&dice, 6)) { return LLVMFuzzerMutate(data, n, max); }
    size_t size = (size_t)(nul - data) - 1;
    text_append(&ranks, (const char*)data + 1, size);
    Text text = {NULL, 0, 0};
    text_append(&text, (const char*)nul + 1, n - size - 2);
    if (roll(&dice, 2)) { mutate_bytes(&text, 200); }
    for (uint32_t k = roll(&dice, 4); k > 0; k--) { mutate_line(&ranks, &dice); }
    char pattern = (char)roll(&dice, 4);
    text_append(&t, &pattern, 1);
    text_append(&t, ranks.text, ranks.n);
    text_append(&t, "", 1);
    text_append(&t, text.text, text.n);
    text_free(&ranks);
    text_free(&text);
    return mutated(&t, data, n, max);
}
