// dev/tests/test_tokenizer.c: mta/tokenizer.h where no Python is at hand: built-in tokenizers, small cases of each
// pattern, hostile rank files, decoding piece by piece, long runs, random bytes. dev/tests/test_tokenizer.py compares
// with tiktoken.
//   make build/test_tokenizer && build/test_tokenizer
#include "mta/json.h"
#include "mta/tokenizer.h"
#include "check.h"
#include <unistd.h>

// Writes a file into the test's folder; its path.
static const char* put(const char* name, const char* data, size_t n) {
    const char* path = at(name);
    Error e = {""};
    if (!write_file_synced(path, data, n, &e)) { die("%s", e.text); }
    return path;
}

static void add_rank(Text* t, const unsigned char* bytes, size_t n, int rank) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        uint32_t g =
            (uint32_t)bytes[i] << 16 | (i + 1 < n ? (uint32_t)bytes[i + 1] << 8 : 0) | (i + 2 < n ? bytes[i + 2] : 0);
        text_printf(t, "%c%c%c%c", digits[g >> 18], digits[g >> 12 & 63], i + 1 < n ? digits[g >> 6 & 63] : '=',
                    i + 2 < n ? digits[g & 63] : '=');
    }
    text_printf(t, " %d\n", rank);
}

// The 256 bytes as ranks 0..255, then every two bytes as one more: pieces then come out as ceil(bytes / 2) ids at
// least.
static Text make_ranks(bool pairs) {
    Text t = {NULL, 0, 0};
    for (int a = 0; a < 256; a++) {
        unsigned char one = (unsigned char)a;
        add_rank(&t, &one, 1, a);
    }
    for (int a = 0; pairs && a < 65536; a++) {
        unsigned char two[2] = {(unsigned char)(a >> 8), (unsigned char)a};
        add_rank(&t, two, 2, 256 + a);
    }
    return t;
}

static void check_ids(Tokenizer* t, const char* text, size_t n, const char* wanted) {
    int32_t* ids;
    size_t count;
    Error e = {""};
    Text got = {NULL, 0, 0};
    text_append(&got, "", 0);
    if (tokenizer_encode(t, text, n, &ids, &count, &e)) {
        for (size_t i = 0; i < count; i++) { text_printf(&got, "%s%d", i ? " " : "", ids[i]); }
        free(ids);
    } else {
        text_printf(&got, "%s", e.text);
    }
    if (strcmp(got.text, wanted)) { printf("%.*s: got %s, wanted %s\n", (int)n, text, got.text, wanted); }
    check(strcmp(got.text, wanted) == 0, text);
    text_free(&got);
}

static Text decode_all(Tokenizer* t, const int32_t* ids, size_t n) {
    TokenStream s = {{0}, 0};
    Text out = {NULL, 0, 0};
    char* piece = (char*)malloc(tokenizer_max_bytes(t) + 8);
    text_append(&out, "", 0);
    for (size_t i = 0; i < n; i++) {
        size_t size = tokenizer_decode(t, &s, ids[i], piece);
        check(size <= tokenizer_max_bytes(t) + 8, "decode stays within its buffer");
        check(utf8_valid_up_to(piece, size) == size, "decode gives whole characters only");
        text_append(&out, piece, size);
    }
    text_append(&out, piece, tokenizer_flush(&s, piece));
    free(piece);
    return out;
}

static void test_built_in(void) {
    Error e = {""};
    Tokenizer* t = tokenizer_open("bytes", NULL, &e);
    check(t && tokenizer_vocab(t) == 259 && tokenizer_bos(t) == 256 && tokenizer_eos(t) == 257 && !tokenizer_file(t),
          "bytes: ids");
    check_ids(t, "A\xff\0z", 4, "65 255 0 122");
    check_ids(t, "", 0, "");
    int32_t split[] = {256, 0xF0, 0x9F, 0x98, 0x80, 257, 258, 'x', 0xE2, 0x82, 'y', 0xFF, 0xC3};
    Text got = decode_all(t, split, sizeof split / sizeof *split);
    check(strcmp(got.text, "\xF0\x9F\x98\x80x\xEF\xBF\xBDy\xEF\xBF\xBD\xEF\xBF\xBD") == 0,
          "bytes: halves of characters");
    text_free(&got);
    int32_t wrong[] = {-1, 259, INT32_MAX, INT32_MIN};
    got = decode_all(t, wrong, 4);
    check(got.n == 12, "bytes: ids beyond the vocabulary give U+FFFD");
    text_free(&got);
    tokenizer_free(t);
    t = tokenizer_open("toy", NULL, &e);
    check(t && tokenizer_vocab(t) == 32 && tokenizer_bos(t) == 29 && tokenizer_eos(t) == 30, "toy: ids");
    check_ids(t, "az.#_", 5, "0 25 26 27 28");
    check_ids(t, "aB", 2, "byte 0x42 at offset 1: the toy tokenizer has only a-z . # _");
    int32_t toy[] = {29, 2, 0, 1, 26, 31, 30};
    got = decode_all(t, toy, 7);
    check(strcmp(got.text, "cab.") == 0, "toy: decoded");
    text_free(&got);
    tokenizer_free(t);
}

// With every two bytes a token of rank 256 + first * 256 + second, the ids show where pieces end.
static void test_patterns(void) {
    static const char* const cases[][3] = {
        // pattern, text, pieces separated by |
        {"gpt2", "it's I'LL  go", "it|'s| I|'|LL| | go"},
        {"gpt2", "a1234 5", "a|1234| 5"},
        {"gpt2", "x\n\n y", "x|\n\n| y"},
        {"gpt2", "x \n\n", "x| \n\n"},
        {"cl100k_base", "it's I'LL  go", "it|'s| I|'LL| | go"},
        {"cl100k_base", "a\xE2\x80\x99s'\xC5\xBFx", "a|\xE2\x80\x99s|'\xC5\xBF|x"},
        {"cl100k_base", "12345 6", "123|45| |6"},
        {"cl100k_base", "!!\n\n x \n y", "!!\n\n| x| \n| y"},
        {"cl100k_base", "x\n ", "x|\n "},
        {"llama3", "x\n ", "x|\n| "},
        {"llama3", "\tfoo(bar)", "\tfoo|(bar|)"},
        {"o200k_base", "HTTPServer camelCase's", "HTTPServer| camel|Case's"},
        {"o200k_base",
         "AB\xCA\xB0"
         "CD",
         "AB\xCA\xB0|CD"},
        {"o200k_base",
         "\xCC\x81"
         "AB c",
         "\xCC\x81|AB| c"},
        {"o200k_base", "a://\n/b", "a|://\n/|b"},
        {"o200k_base", " \n\n  x", " \n\n| | x"},
        {"o200k_base", "x \n ", "x| \n| "},
    };
    Text ranks = make_ranks(true);
    const char* path = put("pairs.tiktoken", ranks.text, ranks.n);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Error e = {""};
        Tokenizer* t = tokenizer_open(path, cases[i][0], &e);
        if (!t) { die("%s", e.text); }
        Scan s = {t->classes, (const unsigned char*)cases[i][1] + strlen(cases[i][1])};
        Text got = {NULL, 0, 0};
        for (const unsigned char* p = (const unsigned char*)cases[i][1]; p < s.end;) {
            const unsigned char* q = scan_piece(t, &s, p);
            text_printf(&got, "%s%.*s", got.n ? "|" : "", (int)(q - p), (const char*)p);
            p = q;
        }
        if (strcmp(got.text, cases[i][2])) { printf("%s: got %s, wanted %s\n", cases[i][0], got.text, cases[i][2]); }
        check(strcmp(got.text, cases[i][2]) == 0, cases[i][1]);
        text_free(&got);
        tokenizer_free(t);
    }
    text_free(&ranks);
}

static void test_opening(void) {
    Text good = make_ranks(false);
    struct {
        const char* name;
        const char* pattern;
        const char* add;
        size_t keep;
        const char* message;
    } cases[] = {
        {"cl100k.tiktoken", "cl100k_base", "YWI= 256\n", 0, ""},
        {"cl100k.tiktoken", "llama3", "YWI= 256", 0, ""},
        {"o200k_x", "o200k_base", "\r\n\nYWI= 256\r\n\n", 0, ""},
        {"x.bin", "gpt2", "", 0, ""},
        {"x.bin", NULL, "", 0, "x.bin: 256 ranks, which no known tokenizer has; add --pattern"},
        {"gpt2.tiktoken", NULL, "", 0, "256 ranks, which no known tokenizer has; add --pattern"},
        {"tokenizer.model", NULL, "", 0, "256 ranks, which no known tokenizer has; add --pattern"},
        {"x.bin", "gpt3", "", 0, "unknown"},
        {"x.bin", "bytes", "", 0, "wanted gpt2"},
        {"gpt2", NULL, "YWI= 257\n", 0, "gpt2:257: a hole: got rank 257, but no line has rank 256"},
        {"gpt2", NULL, "YWI= 255\n", 0, "gpt2:257: rank 255 a second time, it was on line 256"},
        {"gpt2", NULL, "QQ== 256\n", 0, "gpt2:257: rank 256 has the same bytes as rank 65"},
        {"gpt2", NULL, "YWI 256\n", 0, "gpt2:257: got no base64"},
        {"gpt2", NULL, "YW*= 256\n", 0, "gpt2:257: got no base64"},
        {"gpt2", NULL, "==== 256\n", 0, "gpt2:257: got no base64"},
        {"gpt2", NULL, "YWJ= 256\n", 0, "gpt2:257: got no base64"},
        {"gpt2", NULL, "Y=I= 256\n", 0, "gpt2:257: got no base64"},
        {"gpt2", NULL, " 256\n", 0, "gpt2:257: got no base64"},
        {"gpt2", NULL, "YWI=\n", 0, "gpt2:257: wanted a rank"},
        {"gpt2", NULL, "YWI= \n", 0, "gpt2:257: wanted a rank"},
        {"gpt2", NULL, "YWI= 25x\n", 0, "gpt2:257: wanted a rank"},
        {"gpt2", NULL, "YWI= -1\n", 0, "gpt2:257: wanted a rank"},
        {"gpt2", NULL, "YWI= 99999999999999999999999\n", 0, "gpt2:257: wanted a rank"},
        {"gpt2", NULL, "YWI= 16777216\n", 0, "gpt2:257: wanted a rank"},
        {"gpt2", NULL, "", 100, "gpt2"},
        {"gpt2", NULL, "", 1, "gpt2:1: "},
        {"gpt2", NULL, "{\"a\":1}", SIZE_MAX, "JSON"},
        {"tokenizer.json", NULL, "{\"a\":1}", SIZE_MAX, "Hugging Face's tokenizer.json"},
        {"sp.bin", NULL, "\n\x0e\n\x05<unk>", SIZE_MAX, "SentencePiece"},
        {"gpt2", NULL, "\n\x0e\n\x05<unk>", SIZE_MAX, "SentencePiece"},
        {"gpt2", NULL, "", SIZE_MAX, "empty"},
        {"tokenizer.model", NULL, "\n\x0a\n\x03<s>\x15\x01\x01\x01\x01", SIZE_MAX, "SentencePiece"},
        {"tokenizer.json", NULL, "\xEF\xBB\xBF\n  {\"a\":1}", SIZE_MAX, "Hugging Face's tokenizer.json"},
        {"vocab.json", "gpt2", " [1]", SIZE_MAX, "JSON"},
        {"merges.txt", NULL, "#version: 0.2\na b\n", SIZE_MAX, "a list of merges"},
        {"tokenizer.model", NULL, "version https://git-lfs.github.com/spec/v1\n", SIZE_MAX, "a pointer of Git LFS"},
        {"tokenizer.model", NULL, "<!DOCTYPE html>", SIZE_MAX, "HTML"},
        {"x.gguf", NULL, "GGUF\003\n", SIZE_MAX, "a GGUF model"},
        {"x", "gpt2", "\n\n\nYWI= 0\n", SIZE_MAX, "no token for the single byte 0x00"},
        {"gpt2", NULL, "\n\r\n", SIZE_MAX, "no token for the single byte 0x00"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text file = {NULL, 0, 0};
        text_append(&file, good.text, cases[i].keep == SIZE_MAX ? 0 : cases[i].keep ? cases[i].keep : good.n);
        text_append(&file, cases[i].add, strlen(cases[i].add));
        Error e = {""};
        Tokenizer* t = tokenizer_open(put(cases[i].name, file.text, file.n), cases[i].pattern, &e);
        bool ok = cases[i].message[0] ? !t && strstr(e.text, cases[i].message) : t != NULL;
        if (!ok) { printf("case %zu (%s, %s): %s\n", i, cases[i].name, cases[i].add, e.text); }
        check(ok, "opening rank files");
        if (t && strstr(cases[i].add, "256")) { check_ids(t, "ab", 2, "256"); }
        tokenizer_free(t);
        text_free(&file);
    }
    for (int n = TOKEN_BYTES_MAX - 2; n <= TOKEN_BYTES_MAX + 4; n++) {  // with every number of padding characters
        unsigned char token[TOKEN_BYTES_MAX + 4];
        memset(token, 'z', sizeof token);
        Text file = {NULL, 0, 0};
        text_append(&file, good.text, good.n);
        add_rank(&file, token, n, 256);
        Error e = {""};
        Tokenizer* t = tokenizer_open(put("x.bin", file.text, file.n), "gpt2", &e);
        check(n <= TOKEN_BYTES_MAX ? t != NULL : !t && strstr(e.text, "257: a token of more than 4096 bytes"),
              "the longest token");
        tokenizer_free(t);
        text_free(&file);
    }
    text_free(&good);
    const char* names[] = {"gpt2", "llama3", "no/such/file.tiktoken", "", "/", test_folder()};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        Error e = {""};
        check(!tokenizer_open(names[i], i % 2 ? "gpt2" : NULL, &e) && e.text[0], "no such tokenizer");
    }
}

// A file of n ranks: the single bytes, then all of two bytes, then of three.
static const char* put_ranks(const char* name, int n) {
    Text t = {NULL, 0, 0};
    for (int rank = 0; rank < n; rank++) {
        int x = rank < 256 ? rank : rank < 65792 ? rank - 256 : rank - 65792;
        const unsigned char bytes[3] = {(unsigned char)x, (unsigned char)(x >> 8), (unsigned char)(x >> 16)};
        add_rank(&t, bytes, rank < 256 ? 1 : rank < 65792 ? 2 : 3, rank);
    }
    const char* path = put(name, t.text, t.n);
    text_free(&t);
    return path;
}

// The number of ranks tells the pattern; the name does not, but must not say another; an explicit pattern wins.
static void test_known_numbers_of_ranks(void) {
    const struct {
        const char* name;
        int n;
        const char* pattern;
        const char* wanted;
    } cases[] = {{"x.bin", 50256, NULL, "gpt2"},
                 {"gpt2.tiktoken", 50256, NULL, "gpt2"},
                 {"tokenizer.model", 50256, NULL, "gpt2"},
                 {"r50k_base.tiktoken", 50256, NULL, "gpt2"},
                 {"cl100k_base.tiktoken", 50256, NULL, "its name says cl100k_base"},
                 {"Llama-3-tokenizer.model", 50256, NULL, "its name says llama3"},
                 {"llama3", 50256, "gpt2", "gpt2"},
                 {"x.bin", 50256, "llama3", "llama3"},
                 {"x.bin", 50257, NULL, "50257 ranks, which no known tokenizer has"},
                 {"gpt2", 50255, NULL, "50255 ranks, which no"},
                 {"x.bin", 50257, "gpt2", "gpt2"},
                 {"x.bin", 100256, NULL, "cl100k_base"},
                 {"O200K_base", 100256, NULL, "its name says o200k_base"},
                 {"tokenizer.model", 128000, NULL, "llama3"},
                 {"gpt-2", 128000, NULL, "its name says gpt2"},
                 {"x.bin", 199998, NULL, "o200k_base"},
                 {"tokenizer.model", 200000, NULL, "o200k_base"},
                 {"o200k_base.tiktoken", 200000, NULL, "o200k_base"},
                 {"llama3.tiktoken", 200000, NULL, "its name says llama3"},
                 {"x.bin", 199999, NULL, "add --pattern"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Error e = {""};
        const char* path = put_ranks(cases[i].name, cases[i].n);
        Tokenizer* t = tokenizer_open(path, cases[i].pattern, &e);
        bool ok = strstr(t ? tokenizer_name(t) : e.text, cases[i].wanted) != NULL &&
                  (t != NULL) == (strchr(cases[i].wanted, ' ') == NULL);
        if (!ok) {
            printf("%s, %d ranks: %s %s\n", cases[i].name, cases[i].n, t ? tokenizer_name(t) : "refused", e.text);
        }
        check(ok, "the number of ranks tells the pattern");
        int n = cases[i].n,
            end = t ? (t->pattern == SPLIT_GPT2 ? n : n + 1) : 0;  // what ends a text: <|endoftext|>, <|end_of_text|>
        check(!t || (tokenizer_end(t) == end && end < tokenizer_vocab(t)), "the id that ends a text");
        if (t && n == LLAMA4_RANKS) {
            check(tokenizer_vocab(t) == 202048 && tokenizer_bos(t) == 200000 && tokenizer_eos(t) == 200001,
                  "Llama 4's special ids");
            Text got = decode_all(t, (const int32_t[]){200000, 200001, 200008, 200009, 200010, 202047, 202048}, 7);
            check(!strcmp(got.text,
                          "<|begin_of_text|><|end_of_text|><|eot|><|step|>\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"),
                  "Llama 4's specials' names");
            text_free(&got);
        }
        tokenizer_free(t);
        unlink(path);
    }
}

static void test_specials(void) {
    Text ranks = make_ranks(false);
    const char* path = put("r.tiktoken", ranks.text, ranks.n);
    const struct {
        const char* pattern;
        int vocab, bos, eos;
        const char* text;
    } cases[] = {{"gpt2", 257, 256, -1, "<|endoftext|>"},
                 {"cl100k_base", 277, 257, -1, "<|endoftext|>"},
                 {"o200k_base", 277, 257, -1, "<|endoftext|>"},
                 {"llama3", 512, 256, 257, "<|begin_of_text|>"}};
    for (int i = 0; i < 4; i++) {
        Error e = {""};
        Tokenizer* t = tokenizer_open(path, cases[i].pattern, &e);
        check(t && tokenizer_vocab(t) == cases[i].vocab && tokenizer_bos(t) == cases[i].bos &&
                  tokenizer_eos(t) == cases[i].eos,
              cases[i].pattern);
        Text got = decode_all(t, &cases[i].bos, 1);
        check(strcmp(got.text, cases[i].text) == 0, cases[i].text);
        text_free(&got);
        int32_t all[600];
        for (int j = 0; j < 600; j++) { all[j] = j - 10; }
        got = decode_all(t, all, 600);
        check(i < 3 || memmem(got.text, got.n, "<|eot_id|><|python_tag|><|reserved_special_token_3|>", 52) != NULL,
              "llama3's specials have their names");
        text_free(&got);
        check_ids(t, "<|", 2, "60 124");
        check_ids(t, "a\xff", 2, "byte 0xff at offset 1 is not UTF-8");
        check_ids(t, "\xed\xa0\x80", 3, "byte 0xed at offset 0 is not UTF-8");
        check_ids(t, "\xc0\x80", 2, "byte 0xc0 at offset 0 is not UTF-8");
        check_ids(t, "aaaaaaaa\xf4\x90\x80\x80", 12, "byte 0xf4 at offset 8 is not UTF-8");
        check_ids(t, "\xe2\x82", 2, "byte 0xe2 at offset 0 is not UTF-8");
        tokenizer_free(t);
    }
    text_free(&ranks);
}

// Short and long merging must agree, and long merging must not be quadratic: a quadratic one takes minutes here.
static void test_long_runs(void) {
    Text ranks = make_ranks(false);
    unsigned char as[64];
    memset(as, 'a', sizeof as);
    for (int n = 2; n <= 64; n++) { add_rank(&ranks, as, (size_t)n, 254 + n); }
    Error e = {""};
    Tokenizer* t = tokenizer_open(put("gpt2.tiktoken", ranks.text, ranks.n), "gpt2", &e);
    if (!t) { die("%s", e.text); }
    size_t n = 1 << 20;
    char* text = (char*)malloc(n);
    memset(text, 'a', n);
    int32_t short_ids[MERGE_SHORT], long_ids[MERGE_SHORT];
    for (size_t i = 1; i <= MERGE_SHORT; i++) {
        text[i / 2] = i % 3 ? 'a' : 'b';
        size_t a = merge_short(t, text, i, short_ids), b = merge_long(t, text, i, long_ids);
        check(a == b && memcmp(short_ids, long_ids, a * sizeof *short_ids) == 0, "a scan and a heap merge alike");
    }
    memset(text, 'a', n);
    clock_t start = clock();
    int32_t* ids;
    size_t count;
    check(tokenizer_encode(t, text, n, &ids, &count, &e) && count >= n / 64, "a megabyte of one letter");
    double spent = (double)(clock() - start) / CLOCKS_PER_SEC;  // of the processor
    printf("a megabyte of one letter: %.2f s, %zu ids\n", spent, count);
    check(spent < 20, "a megabyte of one letter, quickly");  // well under a second without sanitizers
    Text back = decode_all(t, ids, count < 1000 ? count : 1000);
    check(back.n <= n && memcmp(back.text, text, back.n) == 0, "a megabyte of one letter, back");
    text_free(&back);
    free(ids);
    free(text);
    tokenizer_free(t);
    text_free(&ranks);
}

// Joins of more ranks than the queue has room for at first: it grows.
static void test_many_ranks(void) {
    Text ranks = make_ranks(false);
    unsigned char tokens[1200][16], seen[1200] = {0};
    size_t sizes[1200] = {0};
    uint32_t seed = 1;
    int n = 0;
    for (int i = 0; i < 26; i++) { tokens[n][0] = (unsigned char)('a' + i), sizes[n++] = 1; }
    while (n < 1200) {  // any two earlier tokens, most often of one letter
        int of[2];
        for (int k = 0; k < 2; k++) {
            seed = seed * 1664525 + 1013904223;
            of[k] = (int)((seed >> 8) % (uint32_t)(seed >> 30 ? 26 : n));
        }
        size_t size = sizes[of[0]] + sizes[of[1]];
        if (size > sizeof tokens[0]) { continue; }
        memcpy(tokens[n], tokens[of[0]], sizes[of[0]]);
        memcpy(tokens[n] + sizes[of[0]], tokens[of[1]], sizes[of[1]]);
        sizes[n] = size;
        bool again = false;
        for (int i = 0; i < n; i++) { again = again || (sizes[i] == size && !memcmp(tokens[i], tokens[n], size)); }
        n += !again;
    }
    for (int rank = 256, i = 700; rank < 256 + n - 26; i = (i + 701) % n) {  // in no order: long ones may come first
        if (i >= 26 && !seen[i]) { add_rank(&ranks, tokens[i], sizes[i], rank++); }
        seen[i] = 1;
    }
    Error e = {""};
    Tokenizer* t = tokenizer_open(put("many.tiktoken", ranks.text, ranks.n), "gpt2", &e);
    if (!t) { die("%s", e.text); }
    int32_t short_ids[MERGE_SHORT], long_ids[MERGE_SHORT];
    bool all = true;
    for (int round = 0; round < 2000; round++) {
        char text[MERGE_SHORT];
        uint32_t letters = 2 + (uint32_t)round % 25;
        for (size_t i = 0; i < sizeof text; i++) {
            seed = seed * 1664525 + 1013904223;
            text[i] = (char)('a' + (seed >> 16) % letters);
        }
        size_t a = merge_short(t, text, sizeof text, short_ids), b = merge_long(t, text, sizeof text, long_ids);
        all = all && a == b && memcmp(short_ids, long_ids, a * sizeof *short_ids) == 0;
    }
    check(all, "a scan and a queue of many ranks merge alike");
    tokenizer_free(t);
    text_free(&ranks);
}

// Random bytes: refused exactly where they are no UTF-8; random characters of all planes come back as they were.
static void test_random(void) {
    Text ranks = make_ranks(true);
    const char* path = put("pairs.tiktoken", ranks.text, ranks.n);
    uint64_t seed = 1;
    for (int pattern = SPLIT_GPT2; pattern < SPLIT_COUNT; pattern++) {
        Error e = {""};
        Tokenizer* t = tokenizer_open(path, split_pattern_name(pattern), &e);
        if (!t) { die("%s", e.text); }
        bool all = true;
        for (int round = 0; round < 5000; round++) {
            char text[256];
            size_t n = 0;
            while (n < 8 + (size_t)(round % 200)) {
                seed = seed * UINT64_C(6364136223846793005) + 1;
                uint32_t r = (uint32_t)(seed >> 33), high = r >> 8;
                uint32_t kinds[5] = {high & 0x7F, high % 0x110000, high & 0xFFF, high & 1 ? 10u : 32u, high & 0xFF};
                uint32_t c = kinds[r % 5];
                if (round % 2) {
                    text[n++] = (char)c;
                } else {
                    n += utf8_put(text + n, c >= 0xD800 && c < 0xE000 ? 'x' : c);
                }
            }
            char* exact = (char*)malloc(n);  // so that a read beyond the text is seen by the sanitizer
            memcpy(exact, text, n);
            int32_t* ids;
            size_t count;
            Error why = {""};
            bool ok = tokenizer_encode(t, exact, n, &ids, &count, &why);
            all = all && ok == (utf8_valid_up_to(exact, n) == n) && (ok || round % 2);
            if (ok) {
                TokenStream s = {{0}, 0};
                char back[2048];
                size_t size = 0;
                for (size_t i = 0; i < count; i++) { size += tokenizer_decode(t, &s, ids[i], back + size); }
                all = all && size == n && memcmp(back, exact, n) == 0;
                free(ids);
            }
            free(exact);
        }
        check(all, split_pattern_name(pattern));
        tokenizer_free(t);
    }
    text_free(&ranks);
}

// Random damage to a rank file: refused or opened, never a crash.
static void test_damaged_files(void) {
    Text ranks = make_ranks(false);
    uint64_t seed = 7;
    int opened = 0;
    for (int round = 0; round < 300; round++) {
        char* data = (char*)malloc(ranks.n);
        memcpy(data, ranks.text, ranks.n);
        size_t n = ranks.n;
        for (int i = 0; i < 1 + round % 4; i++) {
            seed = seed * UINT64_C(6364136223846793005) + 1;
            data[(seed >> 33) % n] = (char)(seed >> 20);
        }
        if (round % 3 == 0) { n -= (seed >> 40) % n; }
        Error e = {""};
        Tokenizer* t = tokenizer_open(put("gpt2.tiktoken", data, n), "gpt2", &e);
        check(t || e.text[0], "a damaged rank file is opened or refused with a message");
        opened += t != NULL;
        tokenizer_free(t);
        free(data);
    }
    check(opened < 100, "most damage is noticed");
    text_free(&ranks);
}

int main(void) {
    test_built_in();
    test_patterns();
    test_opening();
    test_known_numbers_of_ranks();
    test_specials();
    test_long_runs();
    test_many_ranks();
    test_random();
    test_damaged_files();
    remove_tree(test_folder());
    return test_verdict();
}
