// mta/tokenizer.h: text to token ids and back: exactly the ids that OpenAI's tiktoken (0.14.0) gives.
//
// A tokenizer is built in (`bytes`, `toy`) or a rank file of tiktoken's format: one line a token, base64 of its bytes,
// a space, its rank, which is its id. Llama 3's tokenizer.model is such a file. It does not say how text is split. Its
// number of ranks does where it is a known tokenizer's (the n below); of any other file the pattern must be given:
//   gpt2         '(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s
//   cl100k_base  '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+
//                |\s++$|\s*[\r\n]|\s+(?!\S)|\s
//   llama3       (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*
//                |\s*[\r\n]+|\s+(?!\S)|\s+
//   o200k_base   [^\r\n\p{L}\p{N}]?U*W+C?|[^\r\n\p{L}\p{N}]?U+W*C?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*
//                |\s*[\r\n]+|\s+(?!\S)|\s+
//                U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], W = [\p{Ll}\p{Lm}\p{Lo}\p{M}], C = (?i:'s|'t|'re|'ve|'m|'ll|'d)
// Encoding: the text is cut into pieces by a scanner written by hand for each pattern (classes of characters from
// unicode_tables.h). A piece that is a token is that token. Any other starts as single bytes, and the adjacent pair
// whose joined bytes have the lowest rank, leftmost first, is merged until none is a token: by a scan for short pieces,
// by a queue by ranks for long ones, so that n bytes without a place to split take n log n at most. Nothing in a text
// is special:
// "<|endoftext|>" is encoded as the letters it has.
//
// Ids: ranks 0..n-1, then the specials.          vocabulary       BOS                       EOS
//   bytes          a byte is its value           259              256                       257   (258 pad)
//   toy            a-z 0-25  . 26  # 27  _ 28    32               29                        30
//   gpt2           n = 50256                     n+1  = 50257     n   <|endoftext|>         none
//   cl100k_base    n = 100256                    n+21 = 100277    n+1 <|endoftext|>         none
//   o200k_base     n = 199998                    n+21 = 200019    n+1 <|endoftext|>         none
//   llama3         n = 128000                    n+256 = 128256   n   <|begin_of_text|>     n+1   <|end_of_text|>
//   o200k_base     n = 200000, Llama 4's         n+2048 = 202048  n   <|begin_of_text|>     n+1   <|end_of_text|>
// A document is BOS, its tokens, EOS; where there is no EOS, the next document's BOS says that this one has ended.
#ifndef MTA_TOKENIZER_H
#define MTA_TOKENIZER_H

#include "json.h"
#include "unicode_tables.h"

typedef enum {
    SPLIT_BYTES,
    SPLIT_TOY,
    SPLIT_GPT2,
    SPLIT_CL100K_BASE,
    SPLIT_LLAMA3,
    SPLIT_O200K_BASE,
    SPLIT_COUNT
} SplitPattern;

enum { LLAMA4_RANKS = 200000 };  // its text is split as o200k_base's is, its special ids are others

static inline const char* split_pattern_name(int pattern) {
    static const char* const names[SPLIT_COUNT] = {"bytes", "toy", "gpt2", "cl100k_base", "llama3", "o200k_base"};
    return names[pattern];
}

typedef struct Tokenizer {
    SplitPattern pattern;
    int n_ranks, vocab, bos, eos;
    size_t longest;        // bytes of the longest token
    char file[PATH_SIZE];  // the rank file's path, "" where built in
    char* bytes;           // all tokens' bytes one after another, in the order of ranks
    uint32_t* start;       // n_ranks + 1: token i is bytes[start[i]..start[i+1])
    uint64_t* slots;  // hash table of tokens by bytes, linear probing: upper half of the hash << 32 | rank + 1, 0 empty
    size_t slot_mask;
    int32_t* pairs;          // 65536: rank of the two bytes a, b at 256 a + b, -1 none
    int32_t single[256];     // rank of a byte
    const uint8_t* classes;  // 0x110000: class of a code point; one table for all tokenizers
} Tokenizer;

// ---------------------------------------------------------------------------------------------------------------------
// Ranks: bytes of a token -> rank

static inline uint64_t token_load(const char* p, size_t n) {  // up to 8 bytes as a number
    uint64_t x = 0;
    if (n >= 8) {
        memcpy(&x, p, 8);
        return x;
    }
    if (n >= 4) {
        uint32_t low, high;
        memcpy(&low, p, 4);
        memcpy(&high, p + n - 4, 4);
        return (uint64_t)high << 32 | low;
    }
    if (n) { x = (uint64_t)(uint8_t)p[0] << 16 | (uint64_t)(uint8_t)p[n / 2] << 8 | (uint8_t)p[n - 1]; }
    return x;
}

static inline uint64_t token_hash(const char* p, size_t n) {
    uint64_t h = (n + 1) * UINT64_C(0x9E3779B97F4A7C15);
    for (; n > 8; p += 8, n -= 8) {
        h = (h ^ token_load(p, 8)) * UINT64_C(0xD6E8FEB86659FD93);
        h ^= h >> 32;
    }
    h = (h ^ token_load(p, n)) * UINT64_C(0xD6E8FEB86659FD93);
    h ^= h >> 32;
    h *= UINT64_C(0xD6E8FEB86659FD93);
    return h ^ h >> 29;
}

// Rank of these bytes, -1 where they are no token.
static inline int32_t token_rank(const Tokenizer* t, const char* p, size_t n) {
    if (n > t->longest) { return -1; }
    uint64_t h = token_hash(p, n);
    for (size_t i = (size_t)h & t->slot_mask;; i = (i + 1) & t->slot_mask) {
        uint64_t slot = t->slots[i];
        if (!slot) { return -1; }
        if ((uint32_t)(slot >> 32) != (uint32_t)(h >> 32)) { continue; }
        uint32_t rank = (uint32_t)slot - 1, at = t->start[rank];
        if (t->start[rank + 1] - at == n && memcmp(t->bytes + at, p, n) == 0) { return (int32_t)rank; }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading a rank file

enum { RANKS_MAX = 1 << 24, TOKEN_BYTES_MAX = 4096 };  // more is no tokenizer that a model of ours could use

typedef struct {
    uint32_t rank, line, at, size;
} RankLine;  // at: where its bytes lie in the file's own order

static inline int base64_value(unsigned char c) {
    if (c >= 'A' && c <= 'Z') { return c - 'A'; }
    if (c >= 'a' && c <= 'z') { return c - 'a' + 26; }
    if (c >= '0' && c <= '9') { return c - '0' + 52; }
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

// Appends the decoded bytes of base64 p[0..n) to out; false unless it is whole groups of four, padded, no stray bits.
static inline bool base64_decode(const char* p, size_t n, Text* out) {
    if (n == 0 || n % 4) { return false; }
    size_t pad = p[n - 1] != '=' ? 0 : p[n - 2] != '=' ? 1 : 2;
    for (size_t i = 0; i < n; i += 4) {
        uint32_t group = 0;
        size_t keep = i + 4 == n ? 3 - pad : 3;
        for (size_t j = 0; j < 4; j++) {
            int v = j > keep ? 0 : base64_value((unsigned char)p[i + j]);
            if (v < 0) { return false; }
            group = group << 6 | (uint32_t)v;
        }
        if (group & (UINT32_C(0xFFFFFF) >> (8 * keep))) { return false; }
        char three[3] = {(char)(group >> 16), (char)(group >> 8), (char)group};
        text_append(out, three, keep);
    }
    return true;
}

// One line "BASE64 RANK" p[0..n) -> its entry; its bytes are appended to `bytes`.
static inline bool rank_line_read(const char* path, uint32_t number, const char* p, size_t n, RankLine* line,
                                  Text* bytes, Error* e) {
    const char* space = (const char*)memchr(p, ' ', n);
    size_t head = space ? (size_t)(space - p) : n;
    line->line = number;
    line->at = (uint32_t)bytes->n;
    if (head / 4 * 3 > TOKEN_BYTES_MAX + 2) {  // of the last group two bytes may be padding: asked again below
        return fail(e, "%s:%u: a token of more than %d bytes", path, number, TOKEN_BYTES_MAX);
    }
    if (!base64_decode(p, head, bytes)) {
        return fail(e, "%s:%u: got no base64 of a token, wanted a line of a tiktoken rank file: BASE64 RANK", path,
                    number);
    }
    line->size = (uint32_t)bytes->n - line->at;
    if (line->size > TOKEN_BYTES_MAX) {
        return fail(e, "%s:%u: a token of more than %d bytes", path, number, TOKEN_BYTES_MAX);
    }
    uint64_t rank = 0;
    size_t i = head + 1;
    for (; i < n && p[i] >= '0' && p[i] <= '9' && rank <= RANKS_MAX; i++) { rank = rank * 10 + (uint64_t)(p[i] - '0'); }
    if (i != n || n < head + 2 || rank >= RANKS_MAX) {
        return fail(e, "%s:%u: wanted a rank, a whole number below %d, after the token", path, number, RANKS_MAX);
    }
    line->rank = (uint32_t)rank;
    return true;
}

static inline int rank_line_compare(const void* a, const void* b) {
    const RankLine* x = (const RankLine*)a;
    const RankLine* y = (const RankLine*)b;
    if (x->rank != y->rank) { return x->rank < y->rank ? -1 : 1; }
    return x->line < y->line ? -1 : x->line > y->line;
}

// All lines of the file, sorted by rank, ranks 0..n-1 without hole or repetition. Blank lines are skipped, as by
// tiktoken. *lines is malloc'ed, also on failure.
static inline bool rank_lines_read(const char* path, const MappedFile* m, RankLine** lines, size_t* count, Text* bytes,
                                   Error* e) {
    size_t n = 0, cap = 0;
    const char* p = (const char*)m->data;
    const char* end = p + m->size;
    for (uint32_t number = 1; p < end; number++) {
        const char* newline = (const char*)memchr(p, '\n', (size_t)(end - p));
        const char* stop = newline ? newline : end;
        size_t size = (size_t)(stop - p);
        if (size && p[size - 1] == '\r') { size--; }
        if (size) {
            if (n == RANKS_MAX) { return fail(e, "%s:%u: more than %d tokens", path, number, RANKS_MAX); }
            if (n == cap) {
                cap = cap ? cap * 2 : 1024;
                RankLine* more = (RankLine*)realloc(*lines, cap * sizeof **lines);
                if (!more) { return fail(e, "%s: out of memory for %zu ranks", path, cap); }
                *lines = more;
            }
            if (!rank_line_read(path, number, p, size, &(*lines)[n], bytes, e)) { return false; }
            n++;
        }
        p = newline ? newline + 1 : end;
    }
    if (n) { qsort(*lines, n, sizeof **lines, rank_line_compare); }
    for (size_t i = 0; i < n; i++) {
        const RankLine* line = &(*lines)[i];
        if (line->rank < i) {
            return fail(e, "%s:%u: rank %u a second time, it was on line %u", path, line->line, line->rank,
                        line[-1].line);
        }
        if (line->rank > i) {
            return fail(e, "%s:%u: a hole: got rank %u, but no line has rank %zu", path, line->line, line->rank, i);
        }
    }
    *count = n;
    return true;
}

// Lays the tokens out by rank and fills the hash table; refuses a token given twice, and a byte that is no token, since
// texts that hold it could not be encoded.
static inline bool ranks_index(Tokenizer* t, const char* path, const RankLine* lines, size_t n, const Text* bytes,
                               Error* e) {
    size_t slots = 1024;
    while (slots < n * 2) { slots *= 2; }
    t->n_ranks = (int)n;
    t->bytes = (char*)alloc_or_die(bytes->n + 1, 1, "the tokens' bytes");
    t->start = (uint32_t*)alloc_or_die(n + 1, sizeof *t->start, "the token table");
    t->slots = (uint64_t*)alloc_or_die(slots, sizeof *t->slots, "the token hash table");
    t->pairs = (int32_t*)alloc_or_die(65536, sizeof *t->pairs, "the table of byte pairs");
    t->slot_mask = slots - 1;
    memset(t->pairs, 0xFF, 65536 * sizeof *t->pairs);  // -1: no token
    for (size_t i = 0; i < n; i++) {
        char* to = t->bytes + t->start[i];
        memcpy(to, bytes->text + lines[i].at, lines[i].size);
        t->start[i + 1] = t->start[i] + lines[i].size;
        if (lines[i].size > t->longest) { t->longest = lines[i].size; }
        int32_t twin = token_rank(t, to, lines[i].size);
        if (twin >= 0) {
            return fail(e, "%s:%u: rank %zu has the same bytes as rank %d on line %u", path, lines[i].line, i, twin,
                        lines[twin].line);
        }
        if (lines[i].size == 2) { t->pairs[(uint8_t)to[0] * 256 + (uint8_t)to[1]] = (int32_t)i; }
        uint64_t h = token_hash(to, lines[i].size);
        size_t at = (size_t)h & t->slot_mask;
        while (t->slots[at]) { at = (at + 1) & t->slot_mask; }
        t->slots[at] = h >> 32 << 32 | (uint64_t)(i + 1);
    }
    for (int a = 0; a < 256; a++) {
        char byte = (char)a;
        t->single[a] = token_rank(t, &byte, 1);
        if (t->single[a] < 0) {
            return fail(e, "%s: no token for the single byte 0x%02x, wanted one for each of the 256", path, a);
        }
    }
    return true;
}

// What a file p[0..n) is, n at least 1, where it is one of those that are taken for rank files; else NULL.
static inline const char* ranks_other_format(const char* p, size_t n) {
    static const struct {
        const char *start, *what;
    } starts[] = {{"{", "JSON (Hugging Face's tokenizer.json?)"},
                  {"[", "JSON"},
                  {"#version", "a list of merges (GPT-2's merges.txt or vocab.bpe?)"},
                  {"version https://git-lfs", "a pointer of Git LFS, not the file itself (git lfs pull fetches it)"},
                  {"GGUF\003", "a GGUF model"},
                  {"<", "HTML or XML, as of a download that was refused"},
                  {"PK\003\004", "a ZIP archive"},
                  {"\x1f\x8b", "compressed by gzip"}};
    // A SentencePiece model: field 1 of its message, a piece: a length, then field 1 of that, the text.
    const unsigned char* u = (const unsigned char*)p;
    if (n > 4 && u[0] == 0x0A && u[2] == 0x0A && u[1] > 2 && u[3] <= u[1] - 2) {
        return "a SentencePiece model (Llama 2's?)";
    }
    size_t skip = byte_order_mark(p, n);
    while (skip < n && strchr(" \t\r\n", p[skip]) && p[skip]) { skip++; }
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        size_t length = strlen(starts[i].start);
        if (n - skip >= length && !memcmp(p + skip, starts[i].start, length)) { return starts[i].what; }
    }
    return NULL;
}

static inline bool ranks_read(Tokenizer* t, const char* path, Error* e) {
    MappedFile m;
    if (!map_file(&m, path, e)) { return false; }
    const char *p = (const char*)m.data, *other;
    bool ok = true;
    if (m.size == 0) {
        ok = fail(e, "%s: empty, wanted a tiktoken rank file", path);
    } else if (m.size >= UINT32_MAX) {
        ok = fail(e, "%s: %zu bytes, too large for a rank file", path, m.size);
    } else if ((other = ranks_other_format(p, m.size)) != NULL) {
        ok = fail(e, "%s: %s, wanted a tiktoken rank file, like Llama 3's tokenizer.model", path, other);
    }
    RankLine* lines = NULL;
    size_t n = 0;
    Text bytes = {NULL, 0, 0};
    ok = ok && rank_lines_read(path, &m, &lines, &n, &bytes, e) && ranks_index(t, path, lines, n, &bytes, e);
    free(lines);
    text_free(&bytes);
    unmap_file(&m);
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------------
// Opening

// The pattern of the known tokenizer with so many ranks, SPLIT_COUNT where there is none.
static inline SplitPattern split_pattern_of_ranks(int n_ranks) {
    switch (n_ranks) {
        case 50256: return SPLIT_GPT2;
        case 100256: return SPLIT_CL100K_BASE;
        case 128000: return SPLIT_LLAMA3;
        case 199998: return SPLIT_O200K_BASE;
        case LLAMA4_RANKS: return SPLIT_O200K_BASE;
        default: return SPLIT_COUNT;
    }
}

// The pattern that a rank file's name speaks of, SPLIT_COUNT where it speaks of none (as tokenizer.model does).
static inline SplitPattern split_pattern_of_name(const char* path) {
    static const struct {
        const char* part;
        SplitPattern pattern;
    } parts[] = {{"gpt2", SPLIT_GPT2},          {"gpt-2", SPLIT_GPT2},       {"r50k", SPLIT_GPT2},
                 {"cl100k", SPLIT_CL100K_BASE}, {"o200k", SPLIT_O200K_BASE}, {"llama3", SPLIT_LLAMA3},
                 {"llama-3", SPLIT_LLAMA3}};
    const char* slash = strrchr(path, '/');
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (strcasestr(slash ? slash + 1 : path, parts[i].part)) { return parts[i].pattern; }
    }
    return SPLIT_COUNT;
}

// How the n_ranks of a file split text where no pattern was given: as the known tokenizer with so many, which the
// file's name must not contradict. SPLIT_COUNT and a message where that cannot be told.
static inline SplitPattern split_pattern_of_file(const char* path, int n_ranks, Error* e) {
    SplitPattern known = split_pattern_of_ranks(n_ranks), named = split_pattern_of_name(path);
    if (known == SPLIT_COUNT) {
        fail(e,
             "%s: %d ranks, which no known tokenizer has; add --pattern gpt2|cl100k_base|llama3|o200k_base, which "
             "tells how "
             "text is split",
             path, n_ranks);
    } else if (named != SPLIT_COUNT && named != known) {
        fail(e, "%s: %d ranks as %s has them, but its name says %s; rename it, or give --pattern", path, n_ranks,
             split_pattern_name(known), split_pattern_name(named));
        return SPLIT_COUNT;
    }
    return known;
}

static inline void tokenizer_free(Tokenizer* t) {
    if (!t) { return; }
    free(t->bytes);
    free(t->start);
    free(t->slots);
    free(t->pairs);
    free(t);
}

static inline bool tokenizer_is_llama4(const Tokenizer* t) {
    return t->pattern == SPLIT_O200K_BASE && t->n_ranks == LLAMA4_RANKS;
}

static inline void tokenizer_set_ids(Tokenizer* t) {  // vocabulary, BOS and EOS: the table at the head of this file
    static const struct {
        int specials, bos, eos;  // how many; of them BOS and EOS, counted from 0, -1 none
    } table[SPLIT_COUNT + 1] = {{3, 0, 1}, {3, 0, 1}, {1, 0, -1}, {21, 1, -1}, {256, 0, 1}, {21, 1, -1}, {2048, 0, 1}};
    int row = tokenizer_is_llama4(t) ? SPLIT_COUNT : (int)t->pattern;
    if (t->pattern <= SPLIT_TOY) {
        t->n_ranks = t->pattern == SPLIT_TOY ? 29 : 256;
        t->longest = 1;
    }
    t->vocab = t->n_ranks + table[row].specials;
    t->bos = t->n_ranks + table[row].bos;
    t->eos = table[row].eos < 0 ? -1 : t->n_ranks + table[row].eos;
}

// The class of every code point (0x110000 of them), spread out from the ranges when a tokenizer first asks for it.
// Those are opened by one thread at a time.
static inline const uint8_t* unicode_classes(void) {
    static uint8_t classes[0x110000];
    static bool ready = false;
    for (int i = 0; i < UNICODE_RANGES && !ready; i++) {
        uint32_t from = unicode_ranges[i] >> 3, to = i + 1 < UNICODE_RANGES ? unicode_ranges[i + 1] >> 3 : 0x110000;
        memset(classes + from, (int)(unicode_ranges[i] & 7), to - from);
    }
    ready = true;
    return classes;
}

static inline bool tokenizer_built_in(const char* name) { return !strcmp(name, "bytes") || !strcmp(name, "toy"); }

// What to do where config.json names a rank file that is not at `path`, as after transformers' save_pretrained; else
// "".
static inline const char* tokenizer_missing(const char* name, const char* path) {
    bool there = tokenizer_built_in(name) || file_exists(path);
    return there ? "" : ": config.json names it; copy it there or give --tokenizer FILE";
}

// name_or_file: "bytes", "toy", or a rank file; pattern: how its ranks split text, NULL: as its number of them tells.
// NULL and a message on failure.
static inline Tokenizer* tokenizer_open(const char* name_or_file, const char* pattern, Error* e) {
    SplitPattern chosen = SPLIT_COUNT;
    bool built_in = tokenizer_built_in(name_or_file);
    for (int i = 0; i < SPLIT_COUNT; i++) {
        if (pattern && strcmp(pattern, split_pattern_name(i)) == 0) { chosen = (SplitPattern)i; }
        if (i > SPLIT_TOY && strcmp(name_or_file, split_pattern_name(i)) == 0 && !file_exists(name_or_file)) {
            fail(e, "tokenizer %s: not built in; give its rank file, such as --tokenizer PATH/%s.tiktoken",
                 name_or_file, name_or_file);
            return NULL;
        }
    }
    if (pattern && chosen == SPLIT_COUNT) {
        fail(e, "pattern %s: unknown, wanted gpt2, cl100k_base, llama3 or o200k_base", pattern);
        return NULL;
    }
    if (built_in && pattern && strcmp(pattern, name_or_file) != 0) {
        fail(e, "tokenizer %s: built in, it takes no pattern %s", name_or_file, pattern);
        return NULL;
    }
    if (built_in) {
        chosen = strcmp(name_or_file, "toy") == 0 ? SPLIT_TOY : SPLIT_BYTES;
    } else if (pattern && chosen <= SPLIT_TOY) {
        fail(e, "pattern %s: wanted gpt2, cl100k_base, llama3 or o200k_base for %s", pattern, name_or_file);
        return NULL;
    }
    if (strlen(name_or_file) >= PATH_SIZE) {
        fail(e, "tokenizer: a path of %zu bytes, wanted less than %d", strlen(name_or_file), PATH_SIZE);
        return NULL;
    }
    Tokenizer* t = (Tokenizer*)alloc_or_die(1, sizeof(Tokenizer), "a tokenizer");
    t->pattern = chosen;
    if (!built_in) {
        strcpy(t->file, name_or_file);
        bool good = ranks_read(t, name_or_file, e);
        if (good && !pattern) { t->pattern = split_pattern_of_file(name_or_file, t->n_ranks, e); }
        if (!good || t->pattern == SPLIT_COUNT) {
            tokenizer_free(t);
            return NULL;
        }
        t->classes = unicode_classes();
    }
    tokenizer_set_ids(t);
    return t;
}

static inline int tokenizer_vocab(const Tokenizer* t) { return t->vocab; }  // ids are 0..vocab-1, specials included
static inline int tokenizer_bos(const Tokenizer* t) { return t->bos; }
static inline int tokenizer_eos(const Tokenizer* t) { return t->eos; }  // -1: none

// The id that ends a generated text: EOS, or where documents have none the BOS of the next one.
static inline int tokenizer_end(const Tokenizer* t) { return t->eos >= 0 ? t->eos : t->bos; }

// bytes, toy, or the pattern's name.
static inline const char* tokenizer_name(const Tokenizer* t) { return split_pattern_name(t->pattern); }

// The rank file; NULL: built in.
static inline const char* tokenizer_file(const Tokenizer* t) { return t->file[0] ? t->file : NULL; }

// A name for a copy of the rank file that tells its pattern, such as cl100k_base.tiktoken; of a built-in one its own
// name.
static inline const char* split_pattern_file(int pattern) {
    static const char* const names[SPLIT_COUNT] = {
        "bytes", "toy", "gpt2.tiktoken", "cl100k_base.tiktoken", "llama3.tiktoken", "o200k_base.tiktoken"};
    return names[pattern];
}
static inline const char* tokenizer_file_name(const Tokenizer* t) { return split_pattern_file(t->pattern); }

// What config.json keeps of the pattern: its name where the number of ranks does not tell it, else "".
static inline const char* tokenizer_kept_pattern(const Tokenizer* t) {
    return t->pattern > SPLIT_TOY && split_pattern_of_ranks(t->n_ranks) != t->pattern ? tokenizer_name(t) : "";
}

// The pattern of a checkpoint's own copy of a rank file, by the name that tokenizer_file_name gave it; NULL: another
// name.
static inline const char* tokenizer_copy_pattern(const char* path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    for (int i = SPLIT_GPT2; i < SPLIT_COUNT; i++) {
        if (!strcmp(name, split_pattern_file(i))) { return split_pattern_name(i); }
    }
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// Characters

// Offset of the first byte that is not UTF-8, n where all is.
static inline size_t utf8_valid_up_to(const char* text, size_t n) {
    for (size_t i = 0; i < n;) {
        uint64_t eight;
        if (n - i >= 8 && (memcpy(&eight, text + i, 8), (eight & UINT64_C(0x8080808080808080)) == 0)) {
            i += 8;
            continue;
        }
        size_t size = utf8_length(text + i, n - i);
        if (!size) { return i; }
        i += size;
    }
    return n;
}

// What the scanners read: valid UTF-8 from p to end.
typedef struct {
    const uint8_t* classes;
    const unsigned char* end;
} Scan;

enum {  // sets of classes, a bit each; CLASS_END stands for the end of the text and is in none
    CLASS_END = 7,
    SET_LETTERS = 1 << CLASS_UPPER | 1 << CLASS_LOWER | 1 << CLASS_LETTER,  // \p{L}
    SET_NUMBERS = 1 << CLASS_NUMBER,                                        // \p{N}
    SET_SPACES = 1 << CLASS_SPACE,                                          // \s
    SET_OTHERS = 1 << CLASS_OTHER | 1 << CLASS_MARK,                        // [^\s\p{L}\p{N}]
    SET_CAPITALS = 1 << CLASS_UPPER | 1 << CLASS_LETTER | 1 << CLASS_MARK,  // o200k's U
    SET_SMALLS = 1 << CLASS_LOWER | 1 << CLASS_LETTER | 1 << CLASS_MARK,    // o200k's W
    SET_BOTH = SET_CAPITALS & SET_SMALLS
};

// Class of the character at p; *next is where the following one begins.
static inline int scan_class(const Scan* s, const unsigned char* p, const unsigned char** next) {
    if (p >= s->end) {
        *next = p;
        return CLASS_END;
    }
    uint32_t c = p[0];
    if (c < 0x80) {
        *next = p + 1;
        return s->classes[c];
    }
    if (c < 0xE0) {
        *next = p + 2;
        return s->classes[(c & 0x1F) << 6 | (p[1] & 0x3Fu)];
    }
    if (c < 0xF0) {
        *next = p + 3;
        return s->classes[(c & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu)];
    }
    *next = p + 4;
    return s->classes[(c & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu)];
}

// Where the run of characters of a set ends.
static inline const unsigned char* scan_run(const Scan* s, const unsigned char* p, int set) {
    const unsigned char* next;
    while (set >> scan_class(s, p, &next) & 1) { p = next; }
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// The scanners: where the piece that begins at p ends. Always beyond p: a character is a letter, a number, a space or
// other.

static inline bool is_newline(unsigned char c) { return c == '\n' || c == '\r'; }

// '(?:[sdmt]|ll|ve|re) at p; p itself where there is none. In any_case U+017F is an s, since it folds to one; no other
// letter outside ASCII folds to one of these.
static inline const unsigned char* scan_contraction(const Scan* s, const unsigned char* p, bool any_case) {
    if (s->end - p < 2 || p[0] != '\'') { return p; }
    unsigned char a = any_case && p[1] < 0x80 ? p[1] | 0x20 : p[1];
    if (a == 's' || a == 'd' || a == 'm' || a == 't') { return p + 2; }
    if (s->end - p < 3) { return p; }
    if (any_case && p[1] == 0xC5 && p[2] == 0xBF) { return p + 3; }
    unsigned char b = any_case && p[2] < 0x80 ? p[2] | 0x20 : p[2];
    return (a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e') ? p + 3 : p;
}

// A run of spaces at p that no word has claimed. newlines: up to the last newline in it (\s*[\r\n]); end_first: but a
// run that ends the text is one piece (\s++$); otherwise all but the last space, which the next word may want
// (\s+(?!\S)), or the only one (\s).
static inline const unsigned char* scan_spaces(const Scan* s, const unsigned char* p, bool newlines, bool end_first) {
    const unsigned char* last = p;  // start of the last character of the run
    const unsigned char* after_newline = NULL;
    const unsigned char* q = p;
    const unsigned char* next;
    while (scan_class(s, q, &next) == CLASS_SPACE) {
        if (is_newline(*q)) { after_newline = next; }
        last = q;
        q = next;
    }
    if (end_first && q == s->end) { return q; }
    if (newlines && after_newline) { return after_newline; }
    return q == s->end || last == p ? q : last;
}

static inline const unsigned char* scan_numbers(const Scan* s, const unsigned char* p) {  // \p{N}{1,3}
    const unsigned char* next;
    for (int i = 0; i < 3 && scan_class(s, p, &next) == CLASS_NUMBER; i++) { p = next; }
    return p;
}

static inline const unsigned char* scan_gpt2(const Scan* s, const unsigned char* p) {
    const unsigned char* q = scan_contraction(s, p, false);
    if (q > p) { return q; }
    q = p + (*p == ' ');
    const unsigned char* next;
    int k = scan_class(s, q, &next);
    if (SET_LETTERS >> k & 1) { return scan_run(s, next, SET_LETTERS); }
    if (SET_NUMBERS >> k & 1) { return scan_run(s, next, SET_NUMBERS); }
    if (SET_OTHERS >> k & 1) { return scan_run(s, next, SET_OTHERS); }
    return scan_spaces(s, p, false, true);
}

// cl100k_base and llama3 differ only in spaces that end the text.
static inline const unsigned char* scan_cl100k(const Scan* s, const unsigned char* p, bool end_first) {
    const unsigned char* q = scan_contraction(s, p, true);
    if (q > p) { return q; }
    int k = scan_class(s, p, &q);
    if (SET_LETTERS >> k & 1) { return scan_run(s, q, SET_LETTERS); }
    if (k == CLASS_NUMBER) { return scan_numbers(s, p); }
    const unsigned char* next;
    int following = scan_class(s, q, &next);
    if (SET_LETTERS >> following & 1 && !is_newline(*p)) { return scan_run(s, next, SET_LETTERS); }
    if (SET_OTHERS >> k & 1 || (*p == ' ' && SET_OTHERS >> following & 1)) {
        q = scan_run(s, q, SET_OTHERS);
        while (q < s->end && is_newline(*q)) { q++; }
        return q;
    }
    return scan_spaces(s, p, true, end_first);
}

// U*W+ at p as a backtracking matcher finds it: U* takes all it can; W+ then needs a small letter there, or takes back
// the last character that both sets have, and nothing more, since what follows it is capitals. NULL where there is no
// match; *capitals is where U* ended.
static inline const unsigned char* scan_o200k_word(const Scan* s, const unsigned char* p,
                                                   const unsigned char** capitals) {
    const unsigned char* after_both = NULL;
    const unsigned char* next;
    int k;
    while (SET_CAPITALS >> (k = scan_class(s, p, &next)) & 1) {
        p = next;
        if (SET_BOTH >> k & 1) { after_both = p; }
    }
    *capitals = p;
    return k == CLASS_LOWER ? scan_run(s, p, SET_SMALLS) : after_both;
}

static inline const unsigned char* scan_o200k(const Scan* s, const unsigned char* p) {
    const unsigned char* next;
    int k = scan_class(s, p, &next);
    if (k == CLASS_NUMBER) { return scan_numbers(s, p); }
    if (!is_newline(*p)) {
        const unsigned char* word =
            SET_LETTERS >> k & 1 ? p : next;  // [^\r\n\p{L}\p{N}]?, which may lead a word, is before it
        const unsigned char* capitals = word;
        const unsigned char* ignored;
        const unsigned char* q = scan_o200k_word(s, word, &capitals);
        if (!q && k == CLASS_MARK) { q = scan_o200k_word(s, p, &ignored); }  // a mark may also be part of the word
        if (!q && capitals > word) { q = capitals; }  // the second alternative, U+W*, where W* finds nothing
        if (q) { return scan_contraction(s, q, true); }
    }
    const unsigned char* q = p + (*p == ' ');
    if (SET_OTHERS >> scan_class(s, q, &next) & 1) {
        q = scan_run(s, next, SET_OTHERS);
        while (q < s->end && (is_newline(*q) || *q == '/')) { q++; }
        return q;
    }
    return scan_spaces(s, p, true, false);
}

static inline const unsigned char* scan_piece(const Tokenizer* t, const Scan* s, const unsigned char* p) {
    switch (t->pattern) {
        case SPLIT_GPT2: return scan_gpt2(s, p);
        case SPLIT_CL100K_BASE: return scan_cl100k(s, p, true);
        case SPLIT_LLAMA3: return scan_cl100k(s, p, false);
        default: return scan_o200k(s, p);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Byte-pair merging

enum { MERGE_SHORT = 96 };  // bytes; longer pieces are merged with a queue of joins

// Rank of the bytes p[from..to) as a join, UINT32_MAX where they are no token: -1 as an unsigned number.
static inline uint32_t join_rank(const Tokenizer* t, const char* p, size_t from, size_t to) {
    return (uint32_t)token_rank(t, p + from, to - from);
}

// Merges p[0..n), n <= MERGE_SHORT, by looking for the lowest rank each time; ids go to out (room for n). How many.
static inline size_t merge_short(const Tokenizer* t, const char* p, size_t n, int32_t* out) {
    uint32_t rank[MERGE_SHORT + 1];   // rank of part i joined with part i+1, UINT32_MAX none
    uint16_t start[MERGE_SHORT + 2];  // part i is p[start[i]..start[i+1])
    size_t parts = n;
    for (size_t i = 0; i < n; i++) {
        start[i] = (uint16_t)i;
        rank[i] = i + 1 < n ? (uint32_t)t->pairs[(uint8_t)p[i] * 256 + (uint8_t)p[i + 1]] : UINT32_MAX;
    }
    start[n] = (uint16_t)n;
    while (parts > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < parts; i++) { best = rank[i] < rank[best] ? i : best; }
        if (rank[best] == UINT32_MAX) { break; }
        parts--;
        memmove(start + best + 1, start + best + 2, (parts - best) * sizeof *start);
        memmove(rank + best + 1, rank + best + 2, (parts - best - 1) * sizeof *rank);
        rank[best] = best + 1 < parts ? join_rank(t, p, start[best], start[best + 2]) : UINT32_MAX;
        if (best) { rank[best - 1] = join_rank(t, p, start[best - 1], start[best + 1]); }
    }
    for (size_t i = 0; i < parts; i++) { out[i] = token_rank(t, p + start[i], (size_t)(start[i + 1] - start[i])); }
    return parts;
}

// A heap of joins: rank << 32 | position, so that the lowest rank comes first and of equal ones the leftmost.
typedef struct {
    uint64_t* items;
    size_t n, cap;
} JoinHeap;

static inline void join_heap_sink(JoinHeap* h, size_t i) {
    uint64_t item = h->items[i];
    for (size_t child; (child = 2 * i + 1) < h->n; i = child) {
        child += child + 1 < h->n && h->items[child + 1] < h->items[child];
        if (h->items[child] >= item) { break; }
        h->items[i] = h->items[child];
    }
    h->items[i] = item;
}

static inline uint64_t join_heap_pop(JoinHeap* h) {
    uint64_t top = h->items[0];
    h->items[0] = h->items[--h->n];
    if (h->n) { join_heap_sink(h, 0); }
    return top;
}

static inline void join_heap_push(JoinHeap* h, uint64_t item) {
    if (h->n == h->cap) {
        h->cap *= 2;
        h->items = (uint64_t*)realloc(h->items, h->cap * sizeof *h->items);
        if (!h->items) { die("out of memory: a heap of %zu joins for byte-pair merging", h->cap); }
    }
    size_t i = h->n++;
    for (; i && h->items[(i - 1) / 2] > item; i = (i - 1) / 2) { h->items[i] = h->items[(i - 1) / 2]; }
    h->items[i] = item;
}

// The joins of a long piece, lowest rank first and of equal ones the leftmost. The joins of a rank are noted from left
// to right, so that each rank has a run of ascending positions, and a heap need order only the ranks: wherever a token
// is noted, no part has crossed its bounds before, so its bytes were joined in the same order each time, by joins that
// came from left to right themselves. A megabyte of one letter: a sixth of the time that one heap of all takes.
typedef struct {
    uint32_t* positions;
    size_t first, n, cap;
} JoinRun;

typedef struct {
    JoinHeap ranks;  // rank << 32 | number of its run, for runs that hold something
    JoinRun* runs;
    uint64_t* slots;  // hash table of ranks: rank << 32 | number of its run + 1, 0 empty
    size_t n_runs, slot_mask;
} JoinQueue;

static inline JoinQueue join_queue_make(void) {
    JoinQueue q = {{NULL, 0, 16}, NULL, NULL, 0, 63};
    q.ranks.items = (uint64_t*)alloc_or_die(q.ranks.cap, sizeof(uint64_t), "byte-pair merging");
    q.slots = (uint64_t*)alloc_or_die(q.slot_mask + 1, sizeof(uint64_t), "byte-pair merging");
    q.runs = (JoinRun*)alloc_or_die((q.slot_mask + 1) / 2, sizeof(JoinRun), "byte-pair merging");
    return q;
}

static inline void join_queue_free(JoinQueue* q) {
    for (size_t i = 0; i < q->n_runs; i++) { free(q->runs[i].positions); }
    free(q->runs);
    free(q->slots);
    free(q->ranks.items);
}

static inline size_t join_slot(const JoinQueue* q,
                               uint32_t rank) {  // the rank's slot, or the empty one where it belongs
    size_t i = rank * UINT32_C(2654435769) >> 7 & q->slot_mask;
    while (q->slots[i] && (uint32_t)(q->slots[i] >> 32) != rank) { i = (i + 1) & q->slot_mask; }
    return i;
}

static inline void join_queue_grow(JoinQueue* q) {  // room for twice as many runs
    uint64_t* old = q->slots;
    size_t n = q->slot_mask + 1;
    q->slot_mask = 2 * n - 1;
    q->slots = (uint64_t*)alloc_or_die(2 * n, sizeof(uint64_t), "byte-pair merging");
    for (size_t i = 0; i < n; i++) {
        if (old[i]) { q->slots[join_slot(q, (uint32_t)(old[i] >> 32))] = old[i]; }
    }
    free(old);
    q->runs = (JoinRun*)realloc(q->runs, n * sizeof *q->runs);
    if (!q->runs) { die("out of memory: %zu runs of joins for byte-pair merging", n); }
}

static inline void join_queue_push(JoinQueue* q, uint32_t rank, uint32_t position) {
    size_t slot = join_slot(q, rank);
    if (!q->slots[slot]) {
        if (2 * (q->n_runs + 1) > q->slot_mask) {
            join_queue_grow(q);
            slot = join_slot(q, rank);
        }
        memset(&q->runs[q->n_runs], 0, sizeof *q->runs);
        q->slots[slot] = (uint64_t)rank << 32 | ++q->n_runs;
    }
    uint32_t number = (uint32_t)q->slots[slot] - 1;
    JoinRun* r = &q->runs[number];
    if (r->first == r->n) {
        r->first = r->n = 0;
        join_heap_push(&q->ranks, (uint64_t)rank << 32 | number);
    }
    assert(r->first == r->n || r->positions[r->n - 1] < position);
    if (r->n == r->cap) {
        r->cap = r->cap ? r->cap * 2 : 4;
        r->positions = (uint32_t*)realloc(r->positions, r->cap * sizeof *r->positions);
        if (!r->positions) { die("out of memory: a run of %zu joins for byte-pair merging", r->cap); }
    }
    r->positions[r->n++] = position;
}

// The next join, rank << 32 | position; UINT64_MAX where there is none.
static inline uint64_t join_queue_pop(JoinQueue* q) {
    if (!q->ranks.n) { return UINT64_MAX; }
    JoinRun* r = &q->runs[(uint32_t)q->ranks.items[0]];
    uint64_t join = q->ranks.items[0] >> 32 << 32 | r->positions[r->first];
    if (++r->first == r->n) { join_heap_pop(&q->ranks); }
    return join;
}

// The same for a piece of any length: parts are a linked list, addressed by the position of their first byte.
static inline size_t merge_long(const Tokenizer* t, const char* p, size_t n, int32_t* out) {
    uint32_t* next = (uint32_t*)alloc_or_die(3 * (n + 1), sizeof(uint32_t), "byte-pair merging");
    uint32_t* previous = next + n + 1;
    uint32_t* rank =
        previous + n + 1;  // of the part at i joined with its follower, UINT32_MAX: none, or no part is at i
    JoinQueue queue = join_queue_make();
    for (size_t i = 0; i < n; i++) {
        next[i] = (uint32_t)i + 1;
        previous[i] = (uint32_t)i - 1;
        rank[i] = i + 1 < n ? (uint32_t)t->pairs[(uint8_t)p[i] * 256 + (uint8_t)p[i + 1]] : UINT32_MAX;
        if (rank[i] != UINT32_MAX) { join_queue_push(&queue, rank[i], (uint32_t)i); }
    }
    for (uint64_t join; (join = join_queue_pop(&queue)) != UINT64_MAX;) {
        uint32_t i = (uint32_t)join;
        if (rank[i] != (uint32_t)(join >> 32)) { continue; }  // the part has changed since this join was noted
        uint32_t gone = next[i];
        rank[gone] = UINT32_MAX;
        next[i] = next[gone];
        if (next[i] < n) { previous[next[i]] = i; }
        if (i) {
            uint32_t before = previous[i];
            rank[before] = join_rank(t, p, before, next[i]);
            if (rank[before] != UINT32_MAX) { join_queue_push(&queue, rank[before], before); }
        }
        rank[i] = next[i] < n ? join_rank(t, p, i, next[next[i]]) : UINT32_MAX;
        if (rank[i] != UINT32_MAX) { join_queue_push(&queue, rank[i], i); }
    }
    size_t parts = 0;
    for (uint32_t i = 0; i < n; i = next[i]) { out[parts++] = join_rank(t, p, i, next[i]); }
    join_queue_free(&queue);
    free(next);
    return parts;
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding

typedef struct {
    int32_t* ids;
    size_t n, cap;
} IdList;

static inline void id_list_reserve(IdList* l, size_t more) {
    if (more <= l->cap - l->n) { return; }
    size_t cap = l->n + more + l->cap / 2, bytes;
    if (!mul_size(cap, sizeof *l->ids, &bytes)) { die("out of memory: %zu token ids", cap); }
    l->ids = (int32_t*)realloc(l->ids, bytes);
    if (!l->ids) { die("out of memory: %zu token ids", cap); }
    l->cap = cap;
}

static const char TOY_LETTERS[] = "abcdefghijklmnopqrstuvwxyz.#_";  // in the order of their ids

static inline bool encode_toy(const char* text, size_t n, IdList* out, Error* e) {
    for (size_t i = 0; i < n; i++) {
        const char* letter = text[i] ? strchr(TOY_LETTERS, text[i]) : NULL;
        if (!letter) {
            return fail(e, "byte 0x%02x at offset %zu: the toy tokenizer has only a-z . # _", (uint8_t)text[i], i);
        }
        out->ids[out->n++] = (int32_t)(letter - TOY_LETTERS);
    }
    return true;
}

static inline bool encode_pieces(const Tokenizer* t, const char* text, size_t n, IdList* out, Error* e) {
    size_t valid = utf8_valid_up_to(text, n);
    if (valid < n) { return fail(e, "byte 0x%02x at offset %zu is not UTF-8", (unsigned char)text[valid], valid); }
    Scan s = {t->classes, (const unsigned char*)text + n};
    for (const unsigned char* p = (const unsigned char*)text; p < s.end;) {
        const unsigned char* q = scan_piece(t, &s, p);
        size_t size = (size_t)(q - p);
        assert(size);
        int32_t whole = token_rank(t, (const char*)p, size);
        id_list_reserve(out, whole >= 0 ? 1 : size);
        if (whole >= 0) {
            out->ids[out->n++] = whole;
        } else if (size <= MERGE_SHORT) {
            out->n += merge_short(t, (const char*)p, size, out->ids + out->n);
        } else if (size >= UINT32_MAX) {
            return fail(e, "%zu bytes without a place to split, wanted less than 4 GiB", size);
        } else {
            out->n += merge_long(t, (const char*)p, size, out->ids + out->n);
        }
        p = q;
    }
    return true;
}

// *ids is malloc'ed (never NULL on success), without BOS and EOS. Fails on text that the tokenizer has no ids for: not
// UTF-8 (`bytes` takes any bytes), or not in toy's alphabet.
static inline bool tokenizer_encode(const Tokenizer* t, const char* text, size_t n, int32_t** ids, size_t* count,
                                    Error* e) {
    IdList list = {NULL, 0, 0};
    id_list_reserve(&list, t->pattern <= SPLIT_TOY ? n + 1 : n / 3 + 16);
    bool ok = true;
    if (t->pattern == SPLIT_BYTES) {
        for (size_t i = 0; i < n; i++) { list.ids[list.n++] = (uint8_t)text[i]; }
    } else {
        ok = t->pattern == SPLIT_TOY ? encode_toy(text, n, &list, e) : encode_pieces(t, text, n, &list, e);
    }
    if (!ok) {
        free(list.ids);
        list.ids = NULL;
        list.n = 0;
    }
    *ids = list.ids;
    *count = list.n;
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------------
// Decoding. A character may be spread over tokens: its bytes wait in the stream until it is whole. Bytes that can
// belong to no character come out as U+FFFD, as many as Python's decode("utf-8", "replace") gives.

typedef struct {
    unsigned char pending[8];
    int n;
} TokenStream;  // start from {0}

enum { SPECIAL_TEXT_MAX = 40 };  // bytes, with the NUL

// Name of a special id (llama3's as Llama 3.1 has them; of Llama 4's the ten for text), "" where the tokenizer gives
// the id no meaning. bytes' and toy's specials have no text.
static inline void tokenizer_special_text(const Tokenizer* t, int32_t id, char* text) {
    static const char* const llama3[11] = {"<|begin_of_text|>",
                                           "<|end_of_text|>",
                                           "<|reserved_special_token_0|>",
                                           "<|reserved_special_token_1|>",
                                           "<|finetune_right_pad_id|>",
                                           "<|reserved_special_token_2|>",
                                           "<|start_header_id|>",
                                           "<|end_header_id|>",
                                           "<|eom_id|>",
                                           "<|eot_id|>",
                                           "<|python_tag|>"};
    static const char* const llama4[10] = {"<|begin_of_text|>", "<|end_of_text|>",  "<|fim_prefix|>", "<|fim_middle|>",
                                           "<|fim_suffix|>",    "<|header_start|>", "<|header_end|>", "<|eom|>",
                                           "<|eot|>",           "<|step|>"};
    const char* name = "";
    text[0] = 0;
    if (t->pattern <= SPLIT_TOY || id < t->n_ranks || id >= t->vocab) { return; }
    int i = id - t->n_ranks;
    if (t->pattern == SPLIT_LLAMA3) {
        if (i >= 11) {
            snprintf(text, SPECIAL_TEXT_MAX, "<|reserved_special_token_%d|>", i - 8);
            return;
        }
        name = llama3[i];
    } else if (tokenizer_is_llama4(t)) {
        name = i < 10 ? llama4[i] : "";
    } else if (id == t->bos) {
        name = "<|endoftext|>";
    } else if (i == 20) {
        name = "<|endofprompt|>";
    } else if (t->pattern == SPLIT_CL100K_BASE && i >= 2 && i <= 4) {
        name = i == 2 ? "<|fim_prefix|>" : i == 3 ? "<|fim_middle|>" : "<|fim_suffix|>";
    }
    strcpy(text, name);
}

// Most bytes that one tokenizer_decode can write, less 8: each byte of a token may come out as a U+FFFD.
static inline size_t tokenizer_max_bytes(const Tokenizer* t) {
    size_t n = 3 * t->longest;
    return n > (size_t)SPECIAL_TEXT_MAX ? n : (size_t)SPECIAL_TEXT_MAX;
}

// Ends the stream: an unfinished character comes out as one U+FFFD. Returns 0 or 3.
static inline size_t tokenizer_flush(TokenStream* s, char* out) {
    if (!s->n) { return 0; }
    s->n = 0;
    memcpy(out, "\xEF\xBF\xBD", 3);
    return 3;
}

static inline size_t stream_byte(TokenStream* s, unsigned char c, char* out) {
    size_t written = 0;
    if (s->n) {
        unsigned char lead = s->pending[0];
        unsigned char low = s->n > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        unsigned char high = s->n > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (c >= low && c <= high) {
            s->pending[s->n++] = c;
            if (s->n < (lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4)) { return 0; }
            memcpy(out, s->pending, (size_t)s->n);
            written = (size_t)s->n;
            s->n = 0;
            return written;
        }
        written = tokenizer_flush(s, out);
    }
    if (c >= 0xC2 && c <= 0xF4) {
        s->pending[s->n++] = c;
        return written;
    }
    if (c < 0x80) {
        out[written] = (char)c;
        return written + 1;
    }
    memcpy(out + written, "\xEF\xBF\xBD", 3);
    return written + 3;
}

// Text of one more id; out has room for tokenizer_max_bytes() + 8, is not NUL-terminated, and holds whole characters. A
// special id gives its name (nothing for bytes and toy), an id without meaning U+FFFD. Returns the bytes written.
static inline size_t tokenizer_decode(const Tokenizer* t, TokenStream* s, int32_t id, char* out) {
    size_t written = 0;
    if (id < 0 || id >= t->n_ranks) {
        char name[SPECIAL_TEXT_MAX];
        tokenizer_special_text(t, id, name);
        written = tokenizer_flush(s, out);
        if (!name[0] && (id < 0 || id >= t->vocab || t->pattern > SPLIT_TOY)) { strcpy(name, "\xEF\xBF\xBD"); }
        memcpy(out + written, name, strlen(name));
        return written + strlen(name);
    }
    if (t->pattern == SPLIT_BYTES) { return stream_byte(s, (unsigned char)id, out); }
    if (t->pattern == SPLIT_TOY) {
        out[0] = TOY_LETTERS[id];
        return 1;
    }
    for (uint32_t i = t->start[id]; i < t->start[id + 1]; i++) {
        written += stream_byte(s, (unsigned char)t->bytes[i], out + written);
    }
    return written;
}

#endif
