// mta/shards.h: token shards on disk, and the loader that gives a trainer one window of them after another.
//
// A shard is llm.c's: 256 int32 of header ([0] magic, [1] version, [2] token count, and of its spare words [3]
// vocabulary size, [4] CRC-32 of the tokens, [5] 1 if NAME.mask lies beside NAME.bin; 0 = unknown, none), then the
// tokens as uint16 (magic 20240520, version 1) or uint32 (20240801, 7). A mask has one byte a token, 1 if the token
// counts as a target. Files are mapped, never read whole.
//
// Window w of a shard is tokens wT .. wT+T: T inputs and T targets, of which the last is the first input of the next
// window. Windows are what is shuffled. The k-th window that a loader gives is a function of (seed, k) and of the data
// alone, whatever the batch size or the number of processes: sources take turns by a schedule without chance (shares
// hold to within one window at any moment), and epoch e of source s is a permutation named by (seed, s, e), computed,
// not stored.
#ifndef MTA_SHARDS_H
#define MTA_SHARDS_H
#include "util.h"
#include "json.h"
#include "random.h"
#include <fnmatch.h>
#include <glob.h>
#include <math.h>

enum {
    SHARD_HEADER_BYTES = 1024,
    SHARD_MAGIC_U16 = 20240520,
    SHARD_VERSION_U16 = 1,
    SHARD_MAGIC_U32 = 20240801,
    SHARD_VERSION_U32 = 7
};
enum { IGNORED_TARGET = -100 };

// ---------------------------------------------------------------------------------------------------------------------
// One shard

typedef struct {
    char* path;             // owned
    MappedFile file, mask;  // mask.data NULL: every token counts
    uint64_t tokens;
    int bytes_per_token;  // 2 or 4
    int vocab_size;       // of the header, 0 unknown
    uint32_t crc;         // of the header, 0 unknown
    uint64_t windows;
    dev_t device;  // with inode: which file it is, whatever its path
    ino_t inode;
} Shard;

// NAME.bin -> NAME.mask; a name without .bin gets .mask added.
static inline void shard_mask_path(const char* path, char* out, size_t n) {
    size_t length = strlen(path);
    if (length > 4 && strcmp(path + length - 4, ".bin") == 0) { length -= 4; }
    if (length + 6 > n) { die("path too long: %s", path); }
    memcpy(out, path, length);
    memcpy(out + length, ".mask", 6);
}

static inline void shard_close(Shard* s) {
    unmap_file(&s->file);
    unmap_file(&s->mask);
    free(s->path);
    s->path = NULL;
}

// Checks that the header and the two files agree; fills the rest of s.
static inline bool shard_check(Shard* s, Error* e) {
    if (s->file.size < SHARD_HEADER_BYTES) {
        return fail(e, "%s: %zu bytes, a shard has a header of %d; it is cut off or no shard", s->path, s->file.size,
                    SHARD_HEADER_BYTES);
    }
    int32_t h[6];
    memcpy(h, s->file.data, sizeof(h));
    if (h[0] != SHARD_MAGIC_U16 && h[0] != SHARD_MAGIC_U32) {
        return fail(e, "%s: magic %d, wanted %d (uint16) or %d (uint32); make shards with data/prepare.py", s->path,
                    h[0], SHARD_MAGIC_U16, SHARD_MAGIC_U32);
    }
    int version = h[0] == SHARD_MAGIC_U16 ? SHARD_VERSION_U16 : SHARD_VERSION_U32;
    if (h[1] != version) { return fail(e, "%s: version %d, wanted %d for magic %d", s->path, h[1], version, h[0]); }
    if (h[2] < 0) { return fail(e, "%s: the header counts %d tokens", s->path, h[2]); }
    if (h[3] < 0) { return fail(e, "%s: the header has a vocabulary of %d", s->path, h[3]); }
    if (h[5] != 0 && h[5] != 1) {
        return fail(e, "%s: word 5 of the header is %d, wanted 0 (no mask) or 1 (a mask in NAME.mask)", s->path, h[5]);
    }
    s->tokens = (uint64_t)h[2];
    s->bytes_per_token = h[0] == SHARD_MAGIC_U16 ? 2 : 4;
    s->vocab_size = h[3];
    memcpy(&s->crc, s->file.data + 16, 4);
    uint64_t want = SHARD_HEADER_BYTES + s->tokens * (uint64_t)s->bytes_per_token;  // below 2^34
    if (s->file.size != want) {
        return fail(
            e,
            "%s: %zu bytes, but its header's %llu tokens of %d bytes make %llu; the file is %s, copy or make it again",
            s->path, s->file.size, (unsigned long long)s->tokens, s->bytes_per_token, (unsigned long long)want,
            s->file.size < want ? "cut off" : "too long");
    }
    if (h[5] == 1) {
        char path[PATH_SIZE];
        shard_mask_path(s->path, path, sizeof(path));
        if (!map_file(&s->mask, path, e)) { return false; }
        if (s->mask.size != s->tokens) {
            return fail(e, "%s: %zu bytes, wanted one for each of the %llu tokens of %s", path, s->mask.size,
                        (unsigned long long)s->tokens, s->path);
        }
    }
    return true;
}

// Continues a CRC-32 by a megabyte of a file, in pieces spread from its beginning to its end: all of a smaller one.
static inline uint32_t sample_crc(uint32_t crc, const MappedFile* f) {
    enum { PIECES = 16, PIECE = 1 << 16 };
    size_t n = f->size < PIECE ? f->size : (size_t)PIECE, rest = f->size - n;
    for (size_t i = 0; i < PIECES && f->data; i++) { crc = crc32_update(crc, f->data + rest * i / (PIECES - 1), n); }
    return crc;
}

static inline bool shard_open(Shard* s, const char* path, Error* e) {
    struct stat st;
    memset(s, 0, sizeof(*s));
    s->path = copy_or_die(path);
    if (map_file(&s->file, path, e) && shard_check(s, e) && (stat(path, &st) == 0 || fail(e, "%s: gone", path))) {
        s->device = st.st_dev;
        s->inode = st.st_ino;
        return true;
    }
    shard_close(s);
    return false;
}

static inline uint32_t shard_token(const Shard* s, uint64_t i) {
    const uint8_t* p = s->file.data + SHARD_HEADER_BYTES + i * (uint64_t)s->bytes_per_token;
    uint32_t x = 0;
    memcpy(&x, p, (size_t)s->bytes_per_token);  // the lower bytes of x, which come first (util.h refuses others)
    return x;
}

// Copies window w into tokens (T) and targets (T, IGNORED_TARGET where masked). Every id is checked against vocab_size,
// the mask against 0 and 1.
static inline bool shard_window(const Shard* s, uint64_t w, int T, int vocab_size, int32_t* tokens, int32_t* targets,
                                Error* e) {
    assert(w < s->windows);
    uint64_t start = w * (uint64_t)T;
    for (int t = 0; t <= T; t++) {
        uint32_t id = shard_token(s, start + (uint64_t)t);
        if (id >= (uint32_t)vocab_size) {
            return fail(e,
                        "%s: token id %u at position %llu, the model's vocabulary is %d; use the tokenizer the shards "
                        "were made with",
                        s->path, id, (unsigned long long)(start + (uint64_t)t), vocab_size);
        }
        if (t < T) { tokens[t] = (int32_t)id; }
        if (t > 0) { targets[t - 1] = (int32_t)id; }
    }
    for (int t = 0; t < T && s->mask.data != NULL; t++) {
        uint8_t counts = s->mask.data[start + (uint64_t)t + 1];
        if (counts > 1) {
            return fail(e, "mask of %s: byte %u at position %llu, wanted 0 or 1", s->path, counts,
                        (unsigned long long)(start + (uint64_t)t + 1));
        }
        if (!counts) { targets[t] = IGNORED_TARGET; }
    }
    return true;
}

// Writes a shard, and its mask (n bytes, or NULL for none). For tests and small tools: the whole file is built in
// memory.
static inline bool shard_write(const char* path, const uint32_t* tokens, size_t n, int bytes_per_token, int vocab_size,
                               const uint8_t* mask, Error* e) {
    assert(bytes_per_token == 2 || bytes_per_token == 4);
    if (n > INT32_MAX) { return fail(e, "%s: %zu tokens, a shard holds %d at most", path, n, INT32_MAX); }
    size_t bytes = n * (size_t)bytes_per_token;
    uint8_t* file = (uint8_t*)alloc_or_die(SHARD_HEADER_BYTES + bytes, 1, "a shard");
    uint8_t* data = file + SHARD_HEADER_BYTES;
    bool good = true;
    for (size_t i = 0; i < n; i++) {
        if (bytes_per_token == 2 && tokens[i] > UINT16_MAX) {
            good = fail(e, "%s: token id %u does not fit into two bytes", path, tokens[i]);
        }
        memcpy(data + i * (size_t)bytes_per_token, &tokens[i], (size_t)bytes_per_token);
    }
    uint32_t crc = crc32_update(0, data, bytes);
    int32_t h[6];
    h[0] = bytes_per_token == 2 ? SHARD_MAGIC_U16 : SHARD_MAGIC_U32;
    h[1] = bytes_per_token == 2 ? SHARD_VERSION_U16 : SHARD_VERSION_U32;
    h[2] = (int32_t)n;
    h[3] = vocab_size;
    memcpy(&h[4], &crc, 4);
    h[5] = mask != NULL;
    memcpy(file, h, sizeof(h));
    char mask_path[PATH_SIZE];
    shard_mask_path(path, mask_path, sizeof(mask_path));
    good = good && (mask == NULL || write_file_synced(mask_path, mask, n, e));
    good = good && write_file_synced(path, file, SHARD_HEADER_BYTES + bytes, e);
    free(file);
    return good;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sources: the shards of one glob

typedef enum { MIX_TOKEN, MIX_DOCUMENT } LoaderMix;
enum { SET_NAME = 256 };  // bytes of a name with its NUL: as much as a file's name may have

typedef struct {
    char name[SET_NAME];  // the glob's last part without _train_*.bin and the like
    char* pattern;        // owned
    double weight;        // as given, 1 if none was
    bool weighted;        // was one given?
    double share;         // of windows, all sources together 1
    uint64_t units;  // the share as a whole number, of 2^40 in all: turns are computed without rounding, equally by
                     // every compiler
    Shard* shards;   // owned, sorted by path
    int n_shards;
    uint64_t tokens, windows;
    double documents;  // only read with MIX_DOCUMENT, else 0
    uint32_t sample;   // sample_crc of what no checksum in a header covers: masks, tokens of shards without; 0: nothing
    uint64_t drawn;    // windows given so far
} LoaderSource;

typedef struct {
    LoaderSource* sources;  // owned
    int n_sources;
    int seq_len;      // T
    int vocab_size;   // of the model
    const char* set;  // only the files of this set, NULL = all; not owned
    uint64_t seed;
    LoaderMix mix;
    uint64_t total_units;  // about 2^40
    uint64_t position;     // windows given so far, over all sources
} Loader;

// Shard k of all sources together, NULL beyond the last.
static inline const Shard* loader_shard(const Loader* l, int k) {
    for (int i = 0; i < l->n_sources; k -= l->sources[i++].n_shards) {
        if (k < l->sources[i].n_shards) { return &l->sources[i].shards[k]; }
    }
    return NULL;
}

static inline void loader_close(Loader* l) {
    for (int i = 0; i < l->n_sources; i++) {
        for (int j = 0; j < l->sources[i].n_shards; j++) { shard_close(&l->sources[i].shards[j]); }
        free(l->sources[i].shards);
        free(l->sources[i].pattern);
    }
    free(l->sources);
    memset(l, 0, sizeof(*l));
}

static inline const char* shard_base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

// "data/c4_train_*.bin" -> "c4": the last part, up to the last _train, _val or _test (a_test1 and a_test2 are two
// sets), and to the first wildcard or .bin.
static inline void source_name(const char* pattern, char* out, size_t n) {
    const char *splits[] = {"_train", "_val", "_test"}, *cuts[] = {"*", "?", "[", ".bin"};
    const char *base = shard_base_name(pattern), *last = base;
    for (int i = 0; i < 3; i++) {
        for (const char* at = base; (at = strstr(at, splits[i])) != NULL; at++) { last = at > last ? at : last; }
    }
    size_t length = last > base ? (size_t)(last - base) : strlen(base);
    for (int i = 0; i < 4; i++) {
        const char* cut = strstr(base, cuts[i]);
        if (cut != NULL && cut != base && (size_t)(cut - base) < length) { length = (size_t)(cut - base); }
    }
    while (length > 1 && (base[length - 1] == '_' || base[length - 1] == '-')) { length--; }
    snprintf(out, n, "%.*s", (int)(length < n ? length : n - 1), base);
    if (length == 0) { snprintf(out, n, "data"); }
}

// "data/c4_val_000000.bin" -> "c4": the set that a file of shards belongs to, by its name up to _train, _val or _test;
// "" where it has none of them.
static inline void shard_set(const char* path, char* out, size_t n) {
    const char* base = shard_base_name(path);
    out[0] = 0;
    if (strstr(base, "_train") != NULL || strstr(base, "_val") != NULL || strstr(base, "_test") != NULL) {
        source_name(base, out, n);
    }
}

// `pattern` for glob(): the folder of that very name is meant where there is one, and the file, so that either may be
// called "run[1]".
static inline void glob_pattern(Text* out, const char* pattern) {
    const char* slash = strrchr(pattern, '/');
    size_t folder = slash != NULL ? (size_t)(slash - pattern) : 0, literal = 0;
    char dir[PATH_SIZE];
    snprintf(dir, sizeof(dir), "%.*s", (int)folder, pattern);
    if (folder < sizeof(dir) && dir_exists(dir)) { literal = folder; }
    if (file_exists(pattern)) { literal = strlen(pattern); }
    for (size_t i = 0; pattern[i] != 0; i++) {
        if (i < literal && strchr("*?[\\", pattern[i]) != NULL) { text_append(out, "\\", 1); }
        text_append(out, pattern + i, 1);
    }
}

// Of glob(): is a folder that cannot be opened an error? Not one that is not there, or no folder.
static inline int glob_refuses(const char* folder, int error) {
    (void)folder;
    return error != ENOENT && error != ENOTDIR;
}

// The files that the pattern matches, sorted by name whatever the locale: 0, or what glob() says. The caller frees them
// with globfree where it is 0.
static inline int glob_files(const char* pattern, glob_t* found) {
    Text escaped = {NULL, 0, 0};
    glob_pattern(&escaped, pattern);
    int status = glob(escaped.n > 0 ? escaped.text : "", GLOB_NOSORT, glob_refuses, found);
    text_free(&escaped);
    if (status == 0) { qsort(found->gl_pathv, found->gl_pathc, sizeof(char*), compare_texts); }
    return status;
}

// The sets to which the files of a pattern belong, each once, into sets (room of them); how many, of which those beyond
// `room` are not written. 0 where some file belongs to none, or there is no file.
static inline int pattern_sets(const char* pattern, char (*sets)[SET_NAME], int room) {
    glob_t found;
    int n = 0;
    if (glob_files(pattern, &found) != 0) { return 0; }
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char set[SET_NAME];
        shard_set(found.gl_pathv[i], set, sizeof(set));
        int k = 0;
        while (k < n && k < room && strcmp(sets[k], set) != 0) { k++; }
        if (set[0] == 0) {
            n = 0;
            break;
        }
        if (k < n) { continue; }
        if (n < room) { memcpy(sets[n], set, sizeof(set)); }
        n++;
    }
    globfree(&found);
    return n;
}

// Opens every file that the pattern matches; set: only those of it, NULL = all.
static inline bool source_open(LoaderSource* s, const char* pattern, const char* set, double weight, int T,
                               int vocab_size, Error* e) {
    memset(s, 0, sizeof(*s));
    s->pattern = copy_or_die(pattern);
    s->weight = weight;
    source_name(pattern, s->name, sizeof(s->name));
    glob_t found;
    int status = glob_files(pattern, &found);
    if (status != 0) {
        if (status == GLOB_NOMATCH) {
            return fail(e, "%s: no such shard; wanted .bin files made by data/prepare.py or data/toy_task.py", pattern);
        }
        return fail(e, "%s: one of its folders cannot be read", pattern);
    }
    s->shards = (Shard*)alloc_or_die(found.gl_pathc, sizeof(Shard), "the list of shards");
    bool good = found.gl_pathc < INT32_MAX, counts = false;
    for (size_t i = 0; i < found.gl_pathc && good; i++) {
        Shard* shard = &s->shards[s->n_shards];
        char of[SET_NAME];
        shard_set(found.gl_pathv[i], of, sizeof(of));
        if (set != NULL && strcmp(of, set) != 0) { continue; }
        good = shard_open(shard, found.gl_pathv[i], e);
        if (!good) { break; }
        s->n_shards++;
        if (shard->vocab_size > vocab_size) {
            good =
                fail(e, "%s: made with a vocabulary of %d, the model has %d; use the same tokenizer, or --vocab-size",
                     shard->path, shard->vocab_size, vocab_size);
        }
        if (!shard->crc) { s->sample = sample_crc(s->sample, &shard->file); }
        s->sample = sample_crc(s->sample, &shard->mask);
        shard->windows = shard->tokens > 0 ? (shard->tokens - 1) / (uint64_t)T : 0;
        s->tokens += shard->tokens;
        s->windows += shard->windows;
        counts = counts || shard->mask.data == NULL || memchr(shard->mask.data, 1, shard->mask.size) != NULL;
    }
    globfree(&found);
    if (good && s->windows == 0) {
        good = fail(e, "%s: %llu tokens%s, one window needs %d; use a smaller --seq-len or more data", pattern,
                    (unsigned long long)s->tokens, s->n_shards > 1 ? " in shards that are all too short" : "", T + 1);
    }
    if (good && !counts) { good = fail(e, "%s: no token counts as a target: no byte of its masks is 1", pattern); }
    return good;
}

// Window w of a source, in file order.
static inline bool source_window(const LoaderSource* s, uint64_t w, int T, int vocab_size, int32_t* tokens,
                                 int32_t* targets, Error* e) {
    for (int i = 0; i < s->n_shards; i++) {
        if (w < s->shards[i].windows) { return shard_window(&s->shards[i], w, T, vocab_size, tokens, targets, e); }
        w -= s->shards[i].windows;
    }
    assert(!"window beyond the source");
    return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// Documents of a source, for MIX_DOCUMENT: DIR/manifest.json, as data/prepare.py leaves it beside the shards, has
//   {"shards": {"c4_train_000000.bin": {"documents": 1234, "tokens": 567890, ...}, ...}, ...}

// The manifest.json beside a shard into *manifest, which stays while the shards stay in one directory (dir, PATH_SIZE
// bytes). NULL where there is none. The caller frees the last.
static inline bool manifest_beside(const char* shard, char* dir, Json** manifest, Error* e) {
    char path[PATH_SIZE];
    size_t n = (size_t)(shard_base_name(shard) - shard);
    if (*manifest != NULL && strlen(dir) == n && strncmp(dir, shard, n) == 0) { return true; }
    json_free(*manifest);
    *manifest = NULL;
    memcpy(dir, shard, n);
    dir[n] = 0;
    path_join(path, sizeof(path), dir, "manifest.json");
    if (!file_exists(path)) { return true; }
    *manifest = json_read(path, (size_t)1 << 30, e);
    return *manifest != NULL;
}

static inline bool source_count_documents(LoaderSource* s, Error* e) {
    char dir[PATH_SIZE] = "", path[PATH_SIZE];
    Json* manifest = NULL;
    bool good = true;
    for (int i = 0; i < s->n_shards && good; i++) {
        const char* base = shard_base_name(s->shards[i].path);
        good = manifest_beside(s->shards[i].path, dir, &manifest, e);
        path_join(path, sizeof(path), dir, "manifest.json");
        if (good && manifest == NULL) {
            good = fail(e, "%.300s: No such file or directory, which --mix document needs; use --mix token", path);
        }
        if (!good) { break; }
        const Json* entry = json_get(json_get(manifest, "shards"), base);
        int64_t documents = 0, tokens = 0;
        if (!json_integer(json_get(entry, "documents"), 0, INT32_MAX, &documents)) {
            good = fail(e, "%s: no count of documents for %s, which --mix document needs; use --mix token", path, base);
        } else if (!json_integer(json_get(entry, "tokens"), 0, INT32_MAX, &tokens) ||
                   (uint64_t)tokens != s->shards[i].tokens) {
            good = fail(e, "%s: %lld tokens for %s, which has %llu; make the shards again", path, (long long)tokens,
                        base, (unsigned long long)s->shards[i].tokens);
        }
        s->documents += (double)documents;
    }
    json_free(manifest);
    if (good && !(s->documents > 0)) {
        good = fail(e, "%s: no documents in its shards, which --mix document needs", s->pattern);
    }
    return good;
}

// ---------------------------------------------------------------------------------------------------------------------
// The tokenizer that shards were made with: preparations[shards[FILE].preparation].tokenizer of the manifest beside
// them (data/README.md)

typedef struct {
    char name[32];          // bytes, toy, or how the rank file's text is split; "" = no manifest speaks of the shards
    char path[PATH_SIZE];   // of the rank file, "" = built in
    char sha256[80];        // of the rank file
    int64_t bytes;          // of the rank file, -1 = unknown
    uint32_t crc;           // CRC-32 of the rank file
    int vocab_size;         // of the manifest or the headers, 0 = unknown
    char shard[PATH_SIZE];  // one that was made with it
} ShardTokenizer;

// "gpt2 (50257 ids, a/gpt2.tiktoken)", for messages.
static inline const char* shard_tokenizer_text(const ShardTokenizer* t, char* out, size_t n) {
    snprintf(out, n, "%s (%d ids%s%.80s)", t->name[0] ? t->name : "an unknown tokenizer", t->vocab_size,
             t->path[0] ? ", " : "", t->path);
    return out;
}

// What the manifest says of one shard; its header where it says nothing.
static inline bool shard_tokenizer(const Shard* s, const char* dir, const Json* manifest, ShardTokenizer* t, Error* e) {
    const Json* entry = json_get(json_get(manifest, "shards"), shard_base_name(s->path));
    const char* preparation = json_text(json_get(entry, "preparation"));
    const Json* made = preparation != NULL ? json_get(json_get(manifest, "preparations"), preparation) : NULL;
    const Json* tokenizer = json_get(made, "tokenizer");
    const char *name = json_text(json_get(tokenizer, "name")), *file = json_text(json_get(tokenizer, "file")),
               *sha = json_text(json_get(tokenizer, "sha256")), *crc = json_text(json_get(tokenizer, "crc32"));
    int64_t vocab = 0;
    memset(t, 0, sizeof(*t));
    snprintf(t->shard, sizeof(t->shard), "%s", s->path);
    t->vocab_size = s->vocab_size;
    t->bytes = -1;
    if (name == NULL) { return true; }
    if (!json_integer(json_get(tokenizer, "vocab_size"), 1, INT32_MAX, &vocab) ||
        (s->vocab_size > 0 && s->vocab_size != vocab)) {
        return fail(e, "%.200s: a vocabulary of %d, but the manifest.json beside it says %.30s with %lld", s->path,
                    s->vocab_size, name, (long long)vocab);
    }
    snprintf(t->name, sizeof(t->name), "%s", name);
    t->vocab_size = (int)vocab;
    if (sha != NULL) { snprintf(t->sha256, sizeof(t->sha256), "%s", sha); }
    if (file == NULL) { return true; }
    if (strchr(file, '/') != NULL || strlen(file) > 255) {
        return fail(e, "%smanifest.json: \"%.60s\" is no file beside it", dir, file);
    }
    path_join(t->path, sizeof(t->path), dir, file);
    if (crc != NULL && json_integer(json_get(tokenizer, "bytes"), 0, INT64_MAX, &t->bytes)) {
        t->crc = (uint32_t)strtoul(crc, NULL, 16);
    }
    return true;
}

// Refuses two that are known to differ. Where one is unknown, the vocabularies of the headers tell what they can.
static inline bool shard_tokenizers_agree(const ShardTokenizer* a, const ShardTokenizer* b, Error* e) {
    char x[256], y[256];
    bool same = a->vocab_size == b->vocab_size || a->vocab_size == 0 || b->vocab_size == 0;
    if (a->name[0] && b->name[0]) {
        same = same && strcmp(a->name, b->name) == 0 &&
               (!a->sha256[0] || !b->sha256[0] || strcmp(a->sha256, b->sha256) == 0);
    }
    return same || fail(e, "%.90s was made with %s, %.90s with %s: shards of one run need one tokenizer", a->shard,
                        shard_tokenizer_text(a, x, sizeof(x)), b->shard, shard_tokenizer_text(b, y, sizeof(y)));
}

// The one tokenizer of all shards of a loader into *t; refused where they differ.
static inline bool loader_tokenizer(const Loader* l, ShardTokenizer* t, Error* e) {
    char dir[PATH_SIZE] = "";
    Json* manifest = NULL;
    bool good = true;
    const Shard* s;
    memset(t, 0, sizeof(*t));
    for (int i = 0; good && (s = loader_shard(l, i)) != NULL; i++) {
        ShardTokenizer own;
        good = manifest_beside(s->path, dir, &manifest, e) && shard_tokenizer(s, dir, manifest, &own, e) &&
               (!t->shard[0] || shard_tokenizers_agree(t, &own, e));
        if (good && (!t->shard[0] || (own.name[0] && !t->name[0]) || (!t->name[0] && t->vocab_size == 0))) { *t = own; }
    }
    json_free(manifest);
    return good;
}

// Bytes of text that a token of a loader's shards stands for: preparations[P].sets[SET][SPLIT] of the manifest has
// text_bytes and tokens (of which some begin or end a document). 0 where a manifest does not say it of every shard.
static inline bool loader_bytes_per_token(const Loader* l, double* bytes_per_token, Error* e) {
    char dir[PATH_SIZE] = "";
    Json* manifest = NULL;
    bool good = true, known = true;
    double tokens = 0, bytes = 0;
    const Shard* s;
    for (int i = 0; good && known && (s = loader_shard(l, i)) != NULL; i++) {
        good = manifest_beside(s->path, dir, &manifest, e);
        const Json* at = good ? json_get(json_get(manifest, "shards"), shard_base_name(s->path)) : NULL;
        const char *preparation = json_text(json_get(at, "preparation")), *set = json_text(json_get(at, "set")),
                   *split = json_text(json_get(at, "split"));
        known = preparation != NULL && set != NULL && split != NULL;
        if (!known) { break; }
        const Json* made = json_get(json_get(json_get(manifest, "preparations"), preparation), "sets");
        const Json* counts = json_get(json_get(made, set), split);
        int64_t all = 0, text = 0;
        known = json_integer(json_get(counts, "tokens"), 1, (int64_t)1 << 53, &all) &&
                json_integer(json_get(counts, "text_bytes"), 1, (int64_t)1 << 53, &text);
        if (!known) { break; }
        tokens += (double)s->tokens;
        bytes += (double)s->tokens * ((double)text / (double)all);
    }
    json_free(manifest);
    *bytes_per_token = good && known && tokens > 0 ? bytes / tokens : 0;
    return good;
}

// ---------------------------------------------------------------------------------------------------------------------
// --train GLOB[=WEIGHT],... or @RECIPE, a file with one GLOB=WEIGHT a line

// Splits "GLOB=WEIGHT" in place and opens the source as the loader's next. What follows the last '=' is a weight unless
// it holds a '/' or a wildcard, so that a folder may be called "lr=3", or the whole is a file. where: for messages.
static inline bool loader_add_source(Loader* l, char* text, const char* dir, const char* where, Error* e) {
    double weight = 1;
    char *equals = strrchr(text, '='), pattern[PATH_SIZE];
    path_join(pattern, sizeof(pattern), dir, text);
    bool weighted = equals != NULL && strpbrk(equals, "/*?[") == NULL && !file_exists(pattern);
    if (weighted) {
        char* end = NULL;
        weight = strtod(equals + 1, &end);
        while (end[0] == ' ' || end[0] == '\t') { end++; }
        if (end == equals + 1 || *end != 0 || strpbrk(equals + 1, "xX") != NULL || !(weight > 0 && weight < 1e30)) {
            return fail(e, "%s: weight \"%s\" of %.*s, wanted a number above 0 and below 1e30", where, equals + 1,
                        (int)(equals - text), text);
        }
        do { *equals-- = 0; } while (equals > text && (*equals == ' ' || *equals == '\t'));
    }
    if (text[0] == 0) { return fail(e, "%s: an empty name, wanted GLOB[=WEIGHT]", where); }
    path_join(pattern, sizeof(pattern), dir, text);
    LoaderSource* sources = (LoaderSource*)realloc(l->sources, ((size_t)l->n_sources + 1) * sizeof(LoaderSource));
    if (sources == NULL) { die("out of memory"); }
    l->sources = sources;
    LoaderSource* s = &l->sources[l->n_sources++];
    if (!source_open(s, pattern, l->set, weight, l->seq_len, l->vocab_size, e)) { return false; }
    s->weighted = weighted;
    char base[sizeof(s->name)];
    memcpy(base, s->name, sizeof(base));
    for (int i = 0, k = 1; i + 1 < l->n_sources;
         i++) {  // a/text_train_*.bin and b/text_train_*.bin are text and text-2
        if (strcmp(l->sources[i].name, s->name) != 0) { continue; }
        snprintf(s->name, sizeof(s->name), "%.240s-%d", base, ++k);
        i = -1;
    }
    return true;
}

static inline bool loader_read_recipe(Loader* l, const char* path, Error* e) {
    char* text = NULL;
    char dir[PATH_SIZE], where[PATH_SIZE + 32];
    size_t n = 0;
    if (!read_file(path, (size_t)1 << 24, &text, &n, e)) { return false; }
    const char* slash = strrchr(path, '/');
    snprintf(dir, sizeof(dir), "%.*s", slash != NULL ? (int)(slash - path) + 1 : 0, path);
    bool good = strlen(text) == n || fail(e, "%s: not a text file", path);
    int number = 0;
    for (char* line = text + byte_order_mark(text, n); good && line != NULL;) {
        char* next = strchr(line, '\n');
        if (next != NULL) { *next++ = 0; }
        number++;
        line[strcspn(line, "#\r")] = 0;
        while (*line == ' ' || *line == '\t') { line++; }
        size_t length = strlen(line);
        while (length > 0 && (line[length - 1] == ' ' || line[length - 1] == '\t')) { line[--length] = 0; }
        snprintf(where, sizeof(where), "%s line %d", path, number);
        if (length > 0) { good = loader_add_source(l, line, dir, where, e); }
        line = next;
    }
    free(text);
    return good && (l->n_sources > 0 || fail(e, "%s: a recipe without a source, wanted lines GLOB=WEIGHT", path));
}

// Does this part of a list of globs name a file, as it stands or without the NAME= before it or the =WEIGHT after it?
static inline bool spec_names_file(const char* part) {
    const char *first = part + strcspn(part, "=,/*?["), *last = strrchr(part, '=');
    bool there = false, may[3] = {true, *first == '=', last != NULL && strpbrk(last, ",/*?[") == NULL};
    for (int i = 0; i < 3 && !there; i++) {
        if (!may[i]) { continue; }
        Text text = {NULL, 0, 0};
        glob_t found;
        text_printf(&text, "%s", i == 1 ? first + 1 : part);
        if (i == 2) { text.text[last - part] = 0; }
        there = glob_files(text.text, &found) == 0;
        if (there) { globfree(&found); }
        text_free(&text);
    }
    return there;
}

// Cuts the next part off *rest (NULL after the last) at a comma: the longest that names a file, since a folder may be
// called "a,b"; else up to the first comma.
static inline char* spec_part(char** rest) {
    char* part = *rest;
    size_t end = strcspn(part, ",");
    for (size_t i = strlen(part); i > end; i--) {
        char keep = part[i];
        if (keep != 0 && keep != ',') { continue; }
        part[i] = 0;
        bool there = spec_names_file(part);
        part[i] = keep;
        if (there) { end = i; }
    }
    *rest = part[end] != 0 ? part + end + 1 : NULL;
    part[end] = 0;
    return part;
}

static inline bool loader_read_spec(Loader* l, const char* spec, Error* e) {
    if (spec[0] == '@') { return loader_read_recipe(l, spec + 1, e); }
    char* copy = copy_or_die(spec);
    bool good = true;
    for (char* rest = copy; good && rest != NULL;) { good = loader_add_source(l, spec_part(&rest), "", "shards", e); }
    free(copy);
    return good;
}

// Shares of windows: by token, a weight is a share of windows. By document, a weight is a share of draws of a document,
// and a draw brings that source's tokens per document: shares of windows are weight * tokens / documents.
static inline bool loader_shares(Loader* l, Error* e) {
    double total = 0;
    for (int i = 0; i < l->n_sources; i++) {
        LoaderSource* s = &l->sources[i];
        if (l->mix == MIX_DOCUMENT && !source_count_documents(s, e)) { return false; }
        s->share = l->mix == MIX_DOCUMENT ? s->weight * (double)s->tokens / s->documents : s->weight;
        total += s->share;
    }
    for (int i = 0; i < l->n_sources; i++) {
        LoaderSource* s = &l->sources[i];
        s->share /= total;
        s->units = (uint64_t)llround(ldexp(s->share, 40));
        if (s->units == 0) {
            return fail(e, "%s: its share %.3g of the windows is too small; drop it", s->pattern, s->share);
        }
        l->total_units += s->units;
    }
    return true;
}

// set: only the files that belong to it, NULL = all.
static inline bool loader_open_mix(Loader* l, const char* spec, const char* set, int seq_len, int vocab_size,
                                   uint64_t seed, LoaderMix mix, Error* e) {
    assert(seq_len > 0 && vocab_size > 0);
    memset(l, 0, sizeof(*l));
    l->seq_len = seq_len;
    l->vocab_size = vocab_size;
    l->seed = seed;
    l->mix = mix;
    l->set = set;
    bool good = loader_read_spec(l, spec, e) && loader_shares(l, e);
    l->set = NULL;
    if (!good) { loader_close(l); }
    return good;
}

static inline bool loader_open(Loader* l, const char* spec, int seq_len, int vocab_size, uint64_t seed, Error* e) {
    return loader_open_mix(l, spec, NULL, seq_len, vocab_size, seed, MIX_TOKEN, e);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is checked before a run: each shard once, and as the manifest beside it says

// One file, by whatever path?
static inline bool shards_same_file(const Shard* a, const Shard* b) {
    return a->device == b->device && a->inode == b->inode;
}

// One text in two files, as far as the checksums of their headers tell?
static inline bool shards_same_tokens(const Shard* a, const Shard* b) {
    return a->crc != 0 && a->crc == b->crc && a->tokens == b->tokens && a->bytes_per_token == b->bytes_per_token;
}

// Refuses a file that is there twice. Of two copies a line of *said names the first pair.
static inline bool loader_check_twice(const Loader* l, Text* said, Error* e) {
    int copies = 0;
    const Shard *a, *b;
    for (int i = 0; (a = loader_shard(l, i)) != NULL; i++) {
        for (int j = 0; j < i; j++) {
            b = loader_shard(l, j);
            if (shards_same_file(a, b)) {
                return fail(e, "%.230s and %.230s are one file, wanted each shard once%s", b->path, a->path,
                            l->n_sources > 1 ? "; a weight makes a source more frequent" : "");
            }
            if (shards_same_tokens(a, b) && copies++ == 0) {
                text_printf(said, "%s and %s hold the same tokens: both count\n", b->path, a->path);
            }
        }
    }
    return true;
}

// Compares a shard with its entry of the manifest (NULL: none) and, if `contents`, its tokens with its checksum.
static inline bool shard_verify(const Shard* s, const Json* entry, bool contents, Error* e) {
    int64_t bytes = (int64_t)s->file.size, tokens = (int64_t)s->tokens;
    const char* sum = json_text(json_get(entry, "crc32"));
    uint32_t crc = sum != NULL ? (uint32_t)strtoul(sum, NULL, 16) : s->crc;
    if ((json_integer(json_get(entry, "bytes"), 0, INT64_MAX, &bytes) && bytes != (int64_t)s->file.size) ||
        (json_integer(json_get(entry, "tokens"), 0, INT64_MAX, &tokens) && tokens != (int64_t)s->tokens)) {
        return fail(e, "%.200s: %zu bytes, %llu tokens, but the manifest.json beside it says %lld and %lld", s->path,
                    s->file.size, (unsigned long long)s->tokens, (long long)bytes, (long long)tokens);
    }
    if (s->crc != 0 && crc != s->crc) {
        return fail(e, "%.200s: CRC-32 %08x in its header, but the manifest.json beside it says %08x", s->path, s->crc,
                    crc);
    }
    uint32_t got = contents ? crc32_update(0, s->file.data + SHARD_HEADER_BYTES, s->file.size - SHARD_HEADER_BYTES) : 0;
    return !contents || crc == 0 || got == crc ||
           fail(e, "%.200s: CRC-32 of the tokens %08x, wanted %08x: the file is damaged, copy or make it again",
                s->path, got, crc);
}

// A line of *said where the manifest lists shards that the source's pattern means and that are not there.
static inline void source_say_missing(const LoaderSource* s, const char* dir, const Json* manifest, Text* said) {
    const Json* shards = json_get(manifest, "shards");
    char path[PATH_SIZE], first[PATH_SIZE] = "";
    int missing = 0;
    Text pattern = {NULL, 0, 0};
    glob_pattern(&pattern, s->pattern);
    for (const Json* j = shards != NULL && shards->type == JSON_OBJECT ? shards->child : NULL; j != NULL; j = j->next) {
        if (strchr(j->key, '/') != NULL || strlen(dir) + strlen(j->key) >= sizeof(path)) { continue; }
        path_join(path, sizeof(path), dir, j->key);
        if (fnmatch(pattern.text, path, FNM_PATHNAME) != 0 || file_exists(path)) { continue; }
        if (missing++ == 0) { memcpy(first, path, sizeof(path)); }
    }
    if (missing > 0) {
        text_printf(said, "the manifest.json beside %s lists %d that %s not there: %s%s\n", s->pattern, missing,
                    missing > 1 ? "are" : "is", first, missing > 1 ? " and others" : "");
    }
    text_free(&pattern);
}

// A line of *said where a twentieth of a source's tokens or more come after the last window of their shard, as where
// shards hold few windows. Shards without any are named otherwise.
static inline void source_say_left(const LoaderSource* s, int T, Text* said) {
    uint64_t tokens = 0, left = 0;
    const Shard* first = NULL;
    int shards = 0;
    for (int i = 0; i < s->n_shards; i++) {
        const Shard* shard = &s->shards[i];
        if (shard->windows == 0) { continue; }
        if (shards++ == 0) { first = shard; }
        tokens += shard->tokens;
        left += shard->tokens - shard->windows * (uint64_t)T - 1;
    }
    if (first == NULL || left == 0 || left * 20 < tokens) { return; }
    text_printf(said,
                "%s%s: %llu of %llu tokens are not used: they come after their shard's last window of %d tokens\n",
                first->path, shards > 1 ? " and the others of its set" : "", (unsigned long long)left,
                (unsigned long long)tokens, T + 1);
}

// All of it. missing: look for shards that are not there; contents: read every token (--verify-data). Lines of *said:
// what is odd and no mistake.
static inline bool loader_verify(const Loader* l, bool missing, bool contents, Text* said, Error* e) {
    char dir[PATH_SIZE] = "", before[PATH_SIZE];
    Json* manifest = NULL;
    int unknown = 0, empty = 0;
    bool good = loader_check_twice(l, said, e);
    for (int i = 0; i < l->n_sources && good; i++) {
        int listed = 0;
        const Shard* unlisted = NULL;  // the first
        before[0] = 1, before[1] = 0;  // no folder is called so
        for (int j = 0; j < l->sources[i].n_shards && good; j++) {
            const Shard* s = &l->sources[i].shards[j];
            good = manifest_beside(s->path, dir, &manifest, e);
            if (good && missing && strcmp(before, dir) != 0) {
                source_say_missing(&l->sources[i], dir, manifest, said);
                memcpy(before, dir, sizeof(before));
            }
            const Json* entry = json_get(json_get(manifest, "shards"), shard_base_name(s->path));
            good = good && shard_verify(s, entry, contents, e);
            listed += entry != NULL;
            if (entry == NULL && unlisted == NULL) { unlisted = s; }
            unknown += s->crc == 0 && json_get(entry, "crc32") == NULL;
            if (s->windows == 0 && empty++ == 0) {
                text_printf(said, "%s: %llu tokens, less than one window of %d: it is not used\n", s->path,
                            (unsigned long long)s->tokens, l->seq_len + 1);
            }
        }
        if (good && listed && unlisted) {
            text_printf(said, "%s is in no manifest.json, %d of its set %s: it counts all the same\n", unlisted->path,
                        listed, listed > 1 ? "are" : "is");
        }
        if (good) { source_say_left(&l->sources[i], l->seq_len, said); }
    }
    json_free(manifest);
    if (empty > 1) { text_printf(said, "%d shards are so short\n", empty); }
    if (good && contents && unknown > 0) { text_printf(said, "%d shards have no checksum to compare\n", unknown); }
    return good;
}

// ---------------------------------------------------------------------------------------------------------------------
// The order

// Whose turn it is. Tijdeman's rule (The chairman assignment problem, 1980): of the sources that are behind their share
// by at least 1/(2n-2) of a window, counting the one to be given now, the one that would be the first to be behind by a
// window less that much. Every source is then always within one window of its share. The deficits add up to one window,
// so that at least one source qualifies.
static inline int loader_turn(const Loader* l) {
    if (l->n_sources == 1) { return 0; }
    const __int128 slack = 2 * l->n_sources - 2;  // all terms are multiplied by it and by total_units
    __int128 best_deadline = 0;
    int best = -1;
    for (int i = 0; i < l->n_sources; i++) {
        const LoaderSource* s = &l->sources[i];
        __int128 deficit = (__int128)s->units * (l->position + 1) - (__int128)l->total_units * s->drawn;
        if (deficit * slack < (__int128)l->total_units) { continue; }
        __int128 deadline = (__int128)(s->drawn + 1) * slack - 1;  // over units: the time
        if (best < 0 || deadline * l->sources[best].units < best_deadline * s->units) {
            best_deadline = deadline;
            best = i;
        }
    }
    assert(best >= 0);
    return best;
}

// Which window of its source the d-th draw of source s is.
static inline uint64_t loader_order(const Loader* l, int s, uint64_t d) {
    uint64_t n = l->sources[s].windows;
    uint64_t key = mix64(mix64(mix64(l->seed) ^ (uint64_t)s) ^ (d / n));
    return permute_index(d % n, n, key);
}

// Takes n windows without reading them: a process of several takes all and reads its own.
static inline void loader_skip(Loader* l, uint64_t n) {
    for (; n > 0; n--) {
        l->sources[loader_turn(l)].drawn++;
        l->position++;
    }
}

// The next window: tokens (T), targets (T, IGNORED_TARGET where masked).
static inline bool loader_next(Loader* l, int32_t* tokens, int32_t* targets, Error* e) {
    int s = loader_turn(l);
    uint64_t w = loader_order(l, s, l->sources[s].drawn++);
    l->position++;
    return source_window(&l->sources[s], w, l->seq_len, l->vocab_size, tokens, targets, e);
}

// All windows in file order, for validation.
static inline uint64_t loader_windows(const Loader* l) {
    uint64_t n = 0;
    for (int i = 0; i < l->n_sources; i++) { n += l->sources[i].windows; }
    return n;
}

static inline bool loader_window(const Loader* l, uint64_t w, int32_t* tokens, int32_t* targets, Error* e) {
    for (int i = 0; i < l->n_sources; i++) {
        const LoaderSource* s = &l->sources[i];
        if (w < s->windows) { return source_window(s, w, l->seq_len, l->vocab_size, tokens, targets, e); }
        w -= s->windows;
    }
    return fail(e, "validation window beyond the last");
}

// Has any shard a mask? Then a validation set counts wrong sequences too.
static inline bool loader_masked(const Loader* l) {
    int i = 0;
    while (loader_shard(l, i) != NULL && loader_shard(l, i)->mask.data == NULL) { i++; }
    return loader_shard(l, i) != NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// Its state in trainer.json

static inline const char* loader_mix_name(LoaderMix mix) { return mix == MIX_DOCUMENT ? "document" : "token"; }

// One number for the shards of a source, in their order: of their sizes and the checksums in their headers.
static inline uint32_t source_checksum(const LoaderSource* s) {
    uint32_t crc = 0;
    for (int i = 0; i < s->n_shards; i++) {
        crc = crc32_update(crc, &s->shards[i].tokens, sizeof(s->shards[i].tokens));
        crc = crc32_update(crc, &s->shards[i].crc, sizeof(s->shards[i].crc));
    }
    return crc;
}

// Appends an object. The seed is text, since a JSON number holds 53 bits.
static inline void loader_state_write(const Loader* l, Text* json) {
    text_printf(json, "{\"seed\": \"%llu\", \"seq_len\": %d, \"mix\": \"%s\", \"windows\": %llu, \"sources\": [",
                (unsigned long long)l->seed, l->seq_len, loader_mix_name(l->mix), (unsigned long long)l->position);
    for (int i = 0; i < l->n_sources; i++) {
        const LoaderSource* s = &l->sources[i];
        text_printf(json, "%s{\"name\": ", i > 0 ? ", " : "");
        text_json_string(json, s->name, strlen(s->name));
        text_printf(json, ", \"weight\": %.17g, \"windows\": %llu, \"drawn\": %llu, \"crc32\": %u", s->weight,
                    (unsigned long long)s->windows, (unsigned long long)s->drawn, source_checksum(s));
        if (s->sample) { text_printf(json, ", \"sample_crc32\": %u", s->sample); }
        text_printf(json, "}");
    }
    text_printf(json, "]}");
}

static inline bool loader_state_differs(Error* e, const char* what, const char* got, const char* wanted) {
    return fail(
        e, "resume: the checkpoint's data has %s %s, this run %s; give the same --train, --seq-len, --mix and --seed",
        what, got, wanted);
}

// Continues where the state was written; refuses one of other sources, window length, mixing or seed.
static inline bool loader_state_read(Loader* l, const Json* state, Error* e) {
    const Json* list = json_get(state, "sources");
    const char *seed = json_text(json_get(state, "seed")), *mix = json_text(json_get(state, "mix"));
    int64_t T = 0, position = 0;
    if (list == NULL || list->type != JSON_ARRAY || seed == NULL || mix == NULL ||
        !json_integer(json_get(state, "seq_len"), 1, INT32_MAX, &T) ||
        !json_integer(json_get(state, "windows"), 0, (int64_t)1 << 53, &position)) {
        return fail(e, "resume: the loader's state in the checkpoint is incomplete");
    }
    char got[128], wanted[128];
    snprintf(wanted, sizeof(wanted), "%llu", (unsigned long long)l->seed);
    if (strcmp(seed, wanted) != 0) { return loader_state_differs(e, "seed", seed, wanted); }
    snprintf(got, sizeof(got), "%lld", (long long)T);
    snprintf(wanted, sizeof(wanted), "%d", l->seq_len);
    if (T != l->seq_len) { return loader_state_differs(e, "window length", got, wanted); }
    if (strcmp(mix, loader_mix_name(l->mix)) != 0) {
        return loader_state_differs(e, "mixing by", mix, loader_mix_name(l->mix));
    }
    snprintf(got, sizeof(got), "%zu", list->count);
    snprintf(wanted, sizeof(wanted), "%d", l->n_sources);
    if (list->count != (size_t)l->n_sources) { return loader_state_differs(e, "number of sources", got, wanted); }
    uint64_t sum = 0;
    int i = 0;
    for (const Json* j = list->child; j != NULL; j = j->next, i++) {
        LoaderSource* s = &l->sources[i];
        const char* name = json_text(json_get(j, "name"));
        const Json* weight = json_get(j, "weight");
        int64_t windows = 0, drawn = 0;
        if (name == NULL || weight == NULL || weight->type != JSON_NUMBER ||
            !json_integer(json_get(j, "windows"), 1, INT64_MAX, &windows) ||
            !json_integer(json_get(j, "drawn"), 0, (int64_t)1 << 53, &drawn)) {
            return fail(e, "resume: the loader's state of source %d in the checkpoint is incomplete", i);
        }
        snprintf(got, sizeof(got), "%.60s (%lld windows, weight %.6g)", name, (long long)windows, weight->number);
        snprintf(wanted, sizeof(wanted), "%.60s (%llu windows, weight %.6g)", s->name, (unsigned long long)s->windows,
                 s->weight);
        if (strcmp(name, s->name) != 0 || (uint64_t)windows != s->windows || weight->number != s->weight) {
            return loader_state_differs(e, "source", got, wanted);
        }
        int64_t crc = 0, sample = 0;  // older checkpoints have no such number
        snprintf(wanted, sizeof(wanted), "other tokens of %.60s", s->name);
        if (json_integer(json_get(j, "crc32"), 0, UINT32_MAX, &crc) && crc != source_checksum(s)) {
            return loader_state_differs(e, "source", got, wanted);
        }
        snprintf(wanted, sizeof(wanted), "another mask or other tokens of %.60s", s->name);
        if (json_integer(json_get(j, "sample_crc32"), 0, UINT32_MAX, &sample) && sample != s->sample) {
            return loader_state_differs(e, "source", got, wanted);
        }
        s->drawn = (uint64_t)drawn;
        sum += (uint64_t)drawn;
    }
    l->position = (uint64_t)position;
    return sum == l->position ||
           fail(e, "resume: the loader's state in the checkpoint is inconsistent (%llu windows by source, %llu in all)",
                (unsigned long long)sum, (unsigned long long)l->position);
}

#endif
