// test_shards.c: mta/shards.h (format, refusals, windows, order, mixing, state) and mta/log.h (lines, cuts, a full
// disk).
//   make build/test_shards && build/test_shards
#include "mta/shards.h"
#include "mta/log.h"
#include "check.h"
#include <signal.h>
#include <sys/resource.h>

static void spit(const char* path, const void* data, size_t n) {
    Error e;
    e.text[0] = 0;
    if (!write_file_synced(path, data, n, &e)) { die("%s", e.text); }
}

// A shard of n tokens: token i is (i * step + first) % vocab.
static void make_shard(const char* name, size_t n, int width, int vocab, uint32_t first, uint32_t step,
                       const uint8_t* mask) {
    uint32_t* tokens = (uint32_t*)alloc_or_die(n, 4, "tokens");
    for (size_t i = 0; i < n; i++) { tokens[i] = (uint32_t)(i * step + first) % (uint32_t)vocab; }
    Error e;
    e.text[0] = 0;
    if (!shard_write(at(name), tokens, n, width, vocab, mask, &e)) { die("%s", e.text); }
    free(tokens);
}

// Overwrites one int32 of a shard's header.
static void poke(const char* name, long word, int32_t value) {
    int fd = open(at(name), O_WRONLY);
    if (fd < 0 || pwrite(fd, &value, 4, (off_t)word * 4) != 4) { die("poke %s", name); }
    close(fd);
}

static void cut(const char* name, off_t size) {
    if (truncate(at(name), size) != 0) { die("truncate %s", name); }
}

static bool opens(const char* spec, int T, int V, Loader* l, Error* e) {
    e->text[0] = 0;
    return loader_open(l, spec, T, V, 1, e);
}

// The spec is refused at opening, with a message that holds both pieces.
static void refused(const char* spec, int T, int V, const char* piece1, const char* piece2) {
    Loader l;
    Error e;
    bool ok = !opens(spec, T, V, &l, &e);
    check(ok && strstr(e.text, piece1) && strstr(e.text, piece2) && !strchr(e.text, '\n'), piece1,
          ok ? e.text : "it was accepted");
    if (!ok) { loader_close(&l); }
}

static void test_windows(void) {
    Loader l;
    Error e;
    int32_t x[8], y[8];
    uint8_t mask[21];
    for (int i = 0; i < 21; i++) { mask[i] = i % 3 == 0; }
    make_shard("w16_train_000000.bin", 21, 2, 100, 0, 1, NULL);
    make_shard("w32_train_000000.bin", 21, 4, 200000, 131072, 1, NULL);
    make_shard("masked.bin", 21, 2, 100, 0, 1, mask);
    check(opens(at("w16_train_*.bin"), 4, 100, &l, &e) && loader_windows(&l) == 5, "21 tokens are 5 windows of 4",
          e.text);
    check(strcmp(l.sources[0].name, "w16") == 0 && !loader_masked(&l), "name of the source", l.sources[0].name);
    bool ok = true;
    for (uint64_t w = 0; w < 5; w++) {
        ok = ok && loader_window(&l, w, x, y, &e);
        for (int t = 0; t < 4; t++) { ok = ok && x[t] == (int32_t)w * 4 + t && y[t] == x[t] + 1; }
    }
    check(ok, "windows in file order, stride T, targets one ahead", e.text);
    check(!loader_window(&l, 5, x, y, &e), "there is no sixth window", "");
    loader_close(&l);
    check(opens(at("w32_train_000000.bin"), 4, 200000, &l, &e) && loader_window(&l, 4, x, y, &e) && x[0] == 131088 &&
              y[3] == 131092,
          "uint32", e.text);
    loader_close(&l);
    check(opens(at("masked.bin"), 5, 100, &l, &e) && loader_masked(&l) && loader_window(&l, 1, x, y, &e), "masked",
          e.text);
    check(y[0] == 6 && y[1] == -100 && y[2] == -100 && y[3] == 9 && y[4] == -100, "masked targets are -100", "");
    loader_close(&l);
    check(opens(at("w16_train_000000.bin"), 20, 5000, &l, &e) && loader_windows(&l) == 1,
          "one window; a larger model vocabulary", e.text);
    loader_close(&l);
}

// A folder or a file that exists under that very name is meant, whatever the name means to glob().
static void test_brackets(void) {
    const char* const specs[] = {"run[1]/s_train_*.bin", "run[1]/s_train_000000.bin", "run[1]/one[2].bin",
                                 "run?/s_train_000000.bin", "*/s_train_000000.bin"};
    const char* const folders[] = {"run[1]", "run1", "run?"};
    Loader l;
    Error e = {{0}};
    for (int i = 0; i < 3; i++) {
        char name[64];
        make_dirs(at(folders[i]), &e);
        snprintf(name, sizeof(name), "%s/s_train_000000.bin", folders[i]);
        make_shard(name, 21 + 4 * i, 2, 100, 0, 1, NULL);
    }
    make_shard("run[1]/one[2].bin", 9, 2, 100, 0, 1, NULL);
    const uint64_t want[] = {5, 5, 2, 7, 18};  // windows of 4
    for (int i = 0; i < 5; i++) {
        bool ok = opens(at(specs[i]), 4, 100, &l, &e);
        check(ok && loader_windows(&l) == want[i], specs[i], e.text);
        if (ok) { loader_close(&l); }
    }
}

// Two sets whose names differ behind the 63rd letter are two, and a file may be called as a weight is written.
static void test_odd_names(void) {
    Loader l;
    Error e;
    char sets[2][SET_NAME], name[300];
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof(name), "%070d-%c_val_000000.bin", 7, 'a' + i);
        make_shard(name, 21, 2, 100, 0, 1, NULL);
    }
    snprintf(name, sizeof(name), "%070d-b", 7);
    int n = pattern_sets(at("0*_val_*.bin"), sets, 2);
    check(n == 2 && strcmp(sets[1], name) == 0, "sets of long names", n == 2 ? sets[1] : "not two");
    bool ok = loader_open_mix(&l, at("0*_val_*.bin"), name, 4, 100, 0, MIX_TOKEN, &e);
    check(ok && l.sources[0].n_shards == 1, "one of them", "");
    if (ok) { loader_close(&l); }
    for (int i = 0; i < 2; i++) {  // up to the last _val, not the first _test
        snprintf(name, sizeof(name), "my_test%d_val_000000.bin", i);
        make_shard(name, 21, 2, 100, 0, 1, NULL);
    }
    n = pattern_sets(at("my*_val_*.bin"), sets, 2);
    check(n == 2 && strcmp(sets[1], "my_test1") == 0, "sets called my_test0 and my_test1", n == 2 ? sets[1] : sets[0]);
    make_shard("wd=3", 21, 2, 100, 0, 1, NULL);
    make_shard("wd=3.bin", 21, 2, 100, 0, 1, NULL);
    ok = opens(at("wd=3"), 4, 100, &l, &e);
    check(ok && !l.sources[0].weighted, "a file called wd=3", e.text);
    if (ok) { loader_close(&l); }
    ok = opens(at("wd=3.bin=2"), 4, 100, &l, &e);
    check(ok && l.sources[0].weight == 2, "a file called wd=3.bin, with a weight", e.text);
    if (ok) { loader_close(&l); }
}

static void test_refused(void) {
    const uint8_t none[50] = {0};
    make_shard("none.bin", 50, 2, 100, 0, 1, none);
    refused(at("none.bin"), 4, 100, "none.bin: no token counts as a target", "masks");
    make_shard("a.bin", 50, 2, 100, 0, 1, NULL);
    refused(at("nothing_*.bin"), 4, 100, "no such shard", "data/prepare.py");
    refused(at("a.bin"), 50, 100, "50 tokens, one window needs 51", "--seq-len");
    refused(at("a.bin"), 4, 99, "vocabulary of 100", "the model has 99");
    refused(test_folder(), 4, 100, "not a regular file", test_folder());
    poke("a.bin", 0, 12345);
    refused(at("a.bin"), 4, 100, "magic 12345, wanted 20240520", "20240801");
    poke("a.bin", 0, SHARD_MAGIC_U16);
    poke("a.bin", 1, 7);
    refused(at("a.bin"), 4, 100, "version 7, wanted 1", "a.bin");
    poke("a.bin", 1, 1);
    poke("a.bin", 2, 51);
    refused(at("a.bin"), 4, 100, "1124 bytes", "make 1126; the file is cut off");
    poke("a.bin", 2, 49);
    refused(at("a.bin"), 4, 100, "make 1122", "too long");
    poke("a.bin", 2, -5);
    refused(at("a.bin"), 4, 100, "counts -5 tokens", "a.bin");
    poke("a.bin", 2, INT32_MAX);
    refused(at("a.bin"), 4, 100, "2147483647 tokens", "cut off");
    poke("a.bin", 2, 50);
    poke("a.bin", 3, -1);
    refused(at("a.bin"), 4, 100, "vocabulary of -1", "a.bin");
    poke("a.bin", 3, 0);
    poke("a.bin", 5, 2);
    refused(at("a.bin"), 4, 100, "word 5", "is 2");
    poke("a.bin", 5, 1);
    refused(at("a.bin"), 4, 100, "a.mask", "No such file");
    spit(at("a.mask"), "12345", 5);
    refused(at("a.bin"), 4, 100, "5 bytes, wanted one for each of the 50 tokens", "a.mask");
    cut("a.bin", 1123);
    refused(at("a.bin"), 4, 100, "1123 bytes", "cut off");
    cut("a.bin", 1023);
    refused(at("a.bin"), 4, 100, "1023 bytes", "header");
    cut("a.bin", 0);
    refused(at("a.bin"), 4, 100, "0 bytes", "header");
}

static void test_ids(void) {
    Loader l;
    Error e;
    int32_t x[4], y[4];
    make_shard("ids.bin", 21, 2, 100, 80, 1, NULL);  // 80 .. 99, 0
    poke("ids.bin", 3, 0);                           // vocabulary unknown: only reading can tell
    check(opens(at("ids.bin"), 4, 84, &l, &e), "an unknown vocabulary opens", e.text);
    check(!loader_window(&l, 0, x, y, &e) && strstr(e.text, "token id 84 at position 4, the model's vocabulary is 84"),
          "an id beyond", e.text);
    e.text[0] = 0;
    check(!loader_window(&l, 1, x, y, &e) && strstr(e.text, "ids.bin"), "the file is named", e.text);
    loader_close(&l);
    make_shard("big.bin", 9, 4, 100, 0, 1, NULL);
    poke("big.bin", 256 + 3, -1);  // 4294967295 as an id
    check(opens(at("big.bin"), 4, 100, &l, &e) && !loader_window(&l, 0, x, y, &e) && strstr(e.text, "4294967295"),
          "an id of 2^32-1", e.text);
    loader_close(&l);
    uint8_t mask[9] = {1, 1, 7, 1, 1, 1, 1, 1, 1};
    make_shard("badmask.bin", 9, 2, 100, 0, 1, mask);
    check(opens(at("badmask.bin"), 4, 100, &l, &e) && !loader_window(&l, 0, x, y, &e) &&
              strstr(e.text, "byte 7 at position 2"),
          "mask byte", e.text);
    loader_close(&l);
    uint32_t wide[2] = {1, 65536};
    e.text[0] = 0;
    check(!shard_write(at("wide.bin"), wide, 2, 2, 0, NULL, &e) && strstr(e.text, "two bytes") &&
              !file_exists(at("wide.bin")),
          "65536 in uint16", e.text);
}

static void test_large(void) {  // more than 2 GiB: a sparse file, with ids at its very end
    Loader l;
    Error e;
    int32_t x[4], y[4];
    make_shard("large.bin", 1, 4, 100, 0, 1, NULL);
    int32_t tokens = 600000001;
    poke("large.bin", 2, tokens);
    cut("large.bin", 1024 + (off_t)tokens * 4);
    poke("large.bin", 256 + tokens - 1, 77);
    poke("large.bin", 256 + tokens - 2, 76);
    check(opens(at("large.bin"), 4, 100, &l, &e) && loader_windows(&l) == 150000000, "2.4 GB open", e.text);
    check(loader_window(&l, 149999999, x, y, &e) && x[3] == 76 && y[3] == 77 && x[0] == 0, "the last window", e.text);
    loader_close(&l);
    unlink(at("large.bin"));
}

// The window number that a draw gave, for shards of distinct tokens: first token / T.
static void test_order(void) {
    Loader a, b;
    Error e;
    int32_t x[4], y[4];
    const int n = 1000;
    make_shard("o_train_000000.bin", 1601, 2, 4001, 0, 1, NULL);     // 400 windows
    make_shard("o_train_000001.bin", 2401, 2, 4001, 1600, 1, NULL);  // 600 windows, their tokens continue
    bool opened =
        opens(at("o_train_*.bin"), 4, 4001, &a, &e) && loader_open(&b, at("o_train_00000?.bin"), 4, 4001, 2, &e);
    check(opened && loader_windows(&a) == n, "two shards of one source", e.text);
    int first[1000], seen[1000];
    memset(seen, 0, sizeof(seen));
    int equal_epoch = 0, equal_seed = 0, in_place = 0;
    for (int i = 0; i < n; i++) {
        loader_next(&a, x, y, &e);
        first[i] = x[0] / 4;
        seen[first[i]]++;
        in_place += first[i] == i;
        loader_next(&b, x, y, &e);
        equal_seed += x[0] / 4 == first[i];
    }
    bool all = true;
    for (int i = 0; i < n; i++) { all = all && seen[i] == 1; }
    check(all && in_place < 12, "an epoch gives every window once, shuffled", "");
    memset(seen, 0, sizeof(seen));
    for (int i = 0; i < n; i++) {
        loader_next(&a, x, y, &e);
        seen[x[0] / 4]++;
        equal_epoch += x[0] / 4 == first[i];
    }
    for (int i = 0; i < n; i++) { all = all && seen[i] == 1; }
    check(all && equal_epoch < 12, "the second epoch too, in another order", "");
    check(equal_seed < 12, "another seed, another order", "");
    for (int epoch = 2; epoch < 50; epoch++) { loader_skip(&a, n); }
    check(a.position == 50000 && loader_next(&a, x, y, &e), "epoch 50 goes on", e.text);
    loader_close(&a);
    loader_close(&b);
}

static void test_mixing(void) {
    Loader l;
    Error e;
    int32_t x[4], y[4];
    make_shard("m0.bin", 41, 2, 1000, 0, 1, NULL);
    make_shard("m1.bin", 81, 2, 1000, 100, 1, NULL);
    make_shard("m2.bin", 401, 2, 1000, 300, 1, NULL);
    char spec[4 * PATH_SIZE];
    snprintf(spec, sizeof(spec), "%s=.726,%s=0.24,%s=0.034", at("m0.bin"), at("m1.bin"), at("m2.bin"));
    check(opens(spec, 4, 1000, &l, &e) && l.n_sources == 3 && fabs(l.sources[0].share - 0.726) < 1e-12, "three weights",
          e.text);
    double worst = 0;
    bool right = true;
    for (int k = 1; k <= 20000; k++) {
        uint64_t before[3] = {l.sources[0].drawn, l.sources[1].drawn, l.sources[2].drawn};
        if (!loader_next(&l, x, y, &e)) { right = false; }
        int s = x[0] < 100 ? 0 : x[0] < 300 ? 1 : 2;
        right = right && l.sources[s].drawn == before[s] + 1;
        for (int i = 0; i < 3; i++) { worst = fmax(worst, fabs(l.sources[i].share * k - (double)l.sources[i].drawn)); }
    }
    char detail[64];
    snprintf(detail, sizeof(detail), "off by %.4f windows", worst);
    check(right, "a window comes from the source that is counted", e.text);
    check(worst <= 0.7500001, "shares hold within 1 - 1/(2n-2) of a window at every moment", detail);
    loader_close(&l);
    snprintf(spec, sizeof(spec), "%s,%s", at("m0.bin"), at("m1.bin"));
    check(opens(spec, 4, 1000, &l, &e) && l.sources[0].share == 0.5 && l.sources[1].share == 0.5,
          "weight 1 without a weight", e.text);
    loader_close(&l);
    const char* bad[] = {"=0", "=-1", "=x", "=", "=nan", "=inf", "=1x", "=1e30"};
    for (int i = 0; i < 8; i++) {
        snprintf(spec, sizeof(spec), "%s%s", at("m0.bin"), bad[i]);
        refused(spec, 4, 1000, "weight", "wanted a number above 0 and below 1e30");
    }
    snprintf(spec, sizeof(spec), "%s,,%s", at("m0.bin"), at("m1.bin"));
    refused(spec, 4, 1000, "empty name", "GLOB[=WEIGHT]");
    snprintf(spec, sizeof(spec), "%s=1e-15,%s", at("m0.bin"), at("m1.bin"));
    refused(spec, 4, 1000, "share", "too small");
    Error why;
    why.text[0] = 0;
    make_dirs(at("lr=3"), &why);
    make_shard("lr=3/m0.bin", 41, 2, 1000, 0, 1, NULL);
    check(opens(at("lr=3/m0.bin"), 4, 1000, &l, &e), "a folder with = in its name", e.text);
    loader_close(&l);
}

static void test_recipe(void) {
    Loader l;
    Error e;
    char spec[PATH_SIZE + 1];
    const char* good = "# the mixture\n\nm0.bin = .75  # most\r\n  m1.bin=0.25\n";
    spit(at("recipe.txt"), good, strlen(good));
    snprintf(spec, sizeof(spec), "@%s", at("recipe.txt"));
    check(opens(spec, 4, 1000, &l, &e) && l.n_sources == 2 && l.sources[0].share == 0.75,
          "a recipe, relative to its folder", e.text);
    loader_close(&l);
    char absolute[PATH_SIZE];
    snprintf(absolute, sizeof(absolute), "%s", at("m2.bin"));
    spit(at("recipe.txt"), absolute, strlen(absolute));
    check(opens(spec, 4, 1000, &l, &e) && l.n_sources == 1 && l.sources[0].share == 1,
          "an absolute name, no newline at the end", e.text);
    loader_close(&l);
    const char* marked = "\xEF\xBB\xBF# from an editor of another system\r\nm0.bin=1\r\n";
    spit(at("recipe.txt"), marked, strlen(marked));
    check(opens(spec, 4, 1000, &l, &e) && l.n_sources == 1, "a recipe with a byte-order mark", e.text);
    loader_close(&l);
    spit(at("recipe.txt"), "m0.bin=1\nm1.bin=lots\n", 21);
    refused(spec, 4, 1000, "line 2: weight \"lots\"", "above 0");
    spit(at("recipe.txt"), "# nothing\n", 10);
    refused(spec, 4, 1000, "without a source", "GLOB=WEIGHT");
    spit(at("recipe.txt"), "m0.bin\0m1.bin", 13);
    refused(spec, 4, 1000, "not a text file", "recipe.txt");
    refused("@/no/such/recipe", 4, 1000, "/no/such/recipe", "No such file");
}

static bool open_documents(const char* spec, Loader* l, Error* e) {
    e->text[0] = 0;
    return loader_open_mix(l, spec, NULL, 4, 1000, 1, MIX_DOCUMENT, e);
}

static void test_documents(void) {
    Loader l;
    Error e;
    char spec[4 * PATH_SIZE];
    const char* manifest = "{\"shards\": {\"m0.bin\": {\"documents\": 10, \"tokens\": 41}, \"m1.bin\": {\"documents\": "
                           "5, \"tokens\": 81}}}";
    spit(at("manifest.json"), manifest, strlen(manifest));
    snprintf(spec, sizeof(spec), "%s=1,%s=3", at("m0.bin"), at("m1.bin"));
    double a = 41.0 / 10, b = 3 * 81.0 / 5;
    check(open_documents(spec, &l, &e) && fabs(l.sources[0].share - a / (a + b)) < 1e-12,
          "shares follow tokens per document", e.text);
    loader_close(&l);
    check(!open_documents(at("m2.bin"), &l, &e) && strstr(e.text, "no count of documents for m2.bin"),
          "a shard the manifest lacks", e.text);
    manifest = "{\"shards\": {\"m0.bin\": {\"documents\": 10, \"tokens\": 40}}}";
    spit(at("manifest.json"), manifest, strlen(manifest));
    check(!open_documents(at("m0.bin"), &l, &e) && strstr(e.text, "40 tokens for m0.bin, which has 41"),
          "another token count", e.text);
    manifest = "{\"shards\": {\"m0.bin\": {\"documents\": 0, \"tokens\": 41}}}";
    spit(at("manifest.json"), manifest, strlen(manifest));
    check(!open_documents(at("m0.bin"), &l, &e) && strstr(e.text, "no documents"), "no documents", e.text);
    spit(at("manifest.json"), "{", 1);
    check(!open_documents(at("m0.bin"), &l, &e) && strstr(e.text, "manifest.json"), "broken JSON", e.text);
    unlink(at("manifest.json"));
    check(!open_documents(at("m0.bin"), &l, &e) && strstr(e.text, "manifest.json") && strstr(e.text, "--mix token"),
          "no manifest", e.text);
}

// Reads state into a loader opened with other arguments; true if it is refused with a message that holds the piece.
static bool state_refused(const char* text, const char* spec, int T, uint64_t seed, const char* piece, Error* e) {
    Loader l;
    e->text[0] = 0;
    if (!loader_open(&l, spec, T, 1000, seed, e)) { return false; }
    Json* state = json_parse(text, strlen(text), e);
    bool ok = !loader_state_read(&l, state, e) && strstr(e->text, piece) != NULL;
    json_free(state);
    loader_close(&l);
    return ok;
}

static void test_state(void) {
    Loader a, b;
    Error e;
    int32_t x[4], y[4], x2[4], y2[4];
    char spec[4 * PATH_SIZE], other[4 * PATH_SIZE];
    snprintf(spec, sizeof(spec), "%s=2,%s=5,%s=1", at("m0.bin"), at("m1.bin"), at("m2.bin"));
    snprintf(other, sizeof(other), "%s=2,%s=5,%s=2", at("m0.bin"), at("m1.bin"), at("m2.bin"));
    uint64_t seed = 0xFFFFFFFFFFFFFFFEull;
    e.text[0] = 0;
    bool ok = loader_open(&a, spec, 4, 1000, seed, &e) && loader_open(&b, spec, 4, 1000, seed, &e);
    for (int i = 0; i < 777; i++) { ok = ok && loader_next(&a, x, y, &e); }
    Text json;
    memset(&json, 0, sizeof(json));
    loader_state_write(&a, &json);
    Json* state = json_parse(json.text, json.n, &e);
    ok = ok && state != NULL && loader_state_read(&b, state, &e);
    check(ok, "the state is read back", e.text);
    for (int i = 0; i < 500 && ok; i++) {
        ok = loader_next(&a, x, y, &e) && loader_next(&b, x2, y2, &e) && memcmp(x, x2, sizeof(x)) == 0 &&
             memcmp(y, y2, sizeof(y)) == 0;
    }
    check(ok, "and the windows after it are the same", e.text);
    loader_close(&b);
    ok = loader_open(&b, spec, 4, 1000, seed, &e);
    loader_skip(&b, 777 + 500);
    ok = ok && loader_next(&a, x, y, &e) && loader_next(&b, x2, y2, &e) && memcmp(x, x2, sizeof(x)) == 0;
    check(ok, "skipping gives the same place as reading", e.text);
    check(state_refused(json.text, spec, 4, 7, "seed 18446744073709551614, this run 7", &e), "another seed", e.text);
    check(state_refused(json.text, spec, 5, seed, "window length 4, this run 5", &e), "another window", e.text);
    check(state_refused(json.text, at("m0.bin"), 4, seed, "number of sources 3, this run 1", &e), "fewer sources",
          e.text);
    check(state_refused(json.text, other, 4, seed, "weight 1), this run m2 (100 windows, weight 2)", &e),
          "other weights", e.text);
    check(state_refused("{\"seed\": 1}", spec, 4, seed, "incomplete", &e), "an incomplete state", e.text);
    check(state_refused("[]", spec, 4, seed, "incomplete", &e), "no object", e.text);
    char* drawn = strstr(json.text, "\"drawn\": ") + 9;
    *drawn = *drawn == '1' ? '2' : '1';
    check(state_refused(json.text, spec, 4, seed, "inconsistent", &e), "counts that do not add up", e.text);
    json_free(state);
    text_free(&json);
    loader_close(&a);
    loader_close(&b);
}

// A mask that is another than before, or tokens of a shard whose header has no checksum, are seen at the last byte too.
static void test_state_of_samples(void) {
    enum { LONG = 3 << 20 };
    uint8_t* mask = (uint8_t*)alloc_or_die(LONG, 1, "mask");
    const char* const files[] = {"covered.mask", "bare.bin"};
    char spec[3 * PATH_SIZE];
    memset(mask, 1, LONG);
    make_shard("covered.bin", LONG, 2, 999, 3, 1, mask);
    make_shard("bare.bin", 50, 2, 999, 5, 1, NULL);
    poke("bare.bin", 4, 0);
    free(mask);
    snprintf(spec, sizeof(spec), "%s=1,%s=1", at("covered.bin"), at("bare.bin"));
    for (int i = 0; i < 2; i++) {
        Loader l;
        Error e;
        Text json = {NULL, 0, 0};
        e.text[0] = 0;
        check(loader_open(&l, spec, 4, 1000, 1, &e), "shards without a checksum of all", e.text);
        loader_state_write(&l, &json);
        Json* state = json_parse(json.text, json.n, &e);
        check(loader_state_read(&l, state, &e), "their state is read back", e.text);
        loader_close(&l);
        int fd = open(at(files[i]), O_WRONLY);
        CHECK(fd >= 0 && lseek(fd, -1, SEEK_END) > 0 && write(fd, "\2", 1) == 1 && close(fd) == 0);
        check(state_refused(json.text, spec, 4, 1, "this run another mask or other tokens of ", &e), files[i], e.text);
        json_free(state);
        text_free(&json);
    }
}

// The log's content, but for the time that ends a line, equals text?
static bool log_is(const char* text) {
    char *got = NULL, *time = NULL, *end = NULL;
    size_t n = 0;
    Error e;
    e.text[0] = 0;
    if (!read_file(at("log.jsonl"), 1 << 20, &got, &n, &e)) { return false; }
    while ((time = strstr(got, ", \"time\": ")) != NULL && (end = strchr(time, '}')) != NULL) {
        memmove(time, end, strlen(end) + 1);
    }
    bool same = strcmp(got, text) == 0;
    free(got);
    return same;
}

static void test_log(void) {
    RunLog log;
    Error e;
    e.text[0] = 0;
    check(runlog_open(&log, test_folder(), -1, NULL, &e), "a new log", e.text);
    bool ok = runlog_line(&log, "{\"event\":\"start\"}") && runlog_line(&log, "{\"step\":1}") &&
              runlog_line(&log, "{\"step\":2}");
    runlog_close(&log);
    check(ok && log_is("{\"event\":\"start\"}\n{\"step\":1}\n{\"step\":2}\n"), "three lines", "");
    check(!runlog_open(&log, test_folder(), -1, NULL, &e) && strstr(e.text, "--resume"),
          "an existing log is not overwritten", e.text);
    e.text[0] = 0;
    check(runlog_open(&log, test_folder(), 1, NULL, &e) && runlog_line(&log, "{\"step\":3}"), "resume at step 1",
          e.text);
    runlog_close(&log);
    check(log_is("{\"event\":\"start\"}\n{\"step\":1}\n{\"step\":3}\n"), "later lines are cut", "");
    const char* torn = "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"lo";
    spit(at("log.jsonl"), torn, strlen(torn));
    check(runlog_open(&log, test_folder(), 9, NULL, &e), "a torn log", e.text);
    runlog_close(&log);
    check(log_is("{\"step\":1}\n{\"step\":2}\n"), "the torn line is cut", "");
    unlink(at("log.jsonl"));
    check(runlog_open(&log, test_folder(), 5, NULL, &e) && runlog_line(&log, "{\"step\":6}"), "resume without a log",
          e.text);
    struct rlimit old, limit;
    getrlimit(RLIMIT_FSIZE, &old);
    limit = old;
    limit.rlim_cur = (rlim_t)log.size + 20;  // room for half a line
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    int saved = dup(2), said[2];
    check(pipe(said) == 0 && dup2(said[1], 2) == 2, "a pipe", "");
    bool refused_full = !runlog_line(&log, "{\"step\":7}") && !runlog_line(&log, "{\"step\":8}");
    bool whole = log_is("{\"step\":6}\n");
    setrlimit(RLIMIT_FSIZE, &old);
    bool later = runlog_line(&log, "{\"step\":9}") && log_is("{\"step\":6}\n{\"step\":9}\n");
    limit.rlim_cur = (rlim_t)log.size + 20;
    setrlimit(RLIMIT_FSIZE, &limit);
    bool again = !runlog_line(&log, "{\"step\":10}");
    dup2(saved, 2);
    setrlimit(RLIMIT_FSIZE, &old);
    char lines[4096];
    ssize_t length = read(said[0], lines, sizeof lines - 1);
    int newlines = 0;
    for (ssize_t i = 0; i < length; i++) { newlines += lines[i] == '\n'; }
    check(refused_full && whole, "a full disk leaves whole lines only", "");
    check(later, "and later lines go on", "");
    check(again && newlines == 2, "each time that lines are lost is said once", "");
    runlog_close(&log);
    char text[32];
    check(strcmp(format_duration(93784, text, 32), "1d 02:03") == 0, "a day", text);
    check(strcmp(format_duration(3723, text, 32), "1:02:03") == 0, "an hour", text);
    check(strcmp(format_duration(83.4, text, 32), "1:23") == 0 && strcmp(format_duration(NAN, text, 32), "?") == 0,
          "a minute, unknown", text);
    check(strcmp(format_count(1234567, text, 32), "1.23M") == 0, "1.23M", text);
    check(strcmp(format_count(999.7, text, 32), "1.00k") == 0, "1.00k", text);
    check(strcmp(format_count(54321, text, 32), "54.3k") == 0 && strcmp(format_count(999, text, 32), "999") == 0,
          "54.3k, 999", text);
}

static void test_names(void) {
    const char* cases[][2] = {{"data/c4_train_*.bin", "c4"},
                              {"c4_val_000000.bin", "c4"},
                              {"/x_train_y/book.bin", "book"},
                              {"my_test1_train_*.bin", "my_test1"},
                              {"_val_a_val_0.bin", "_val_a"},
                              {"toy*.bin", "toy"},
                              {"a/*.bin", "*"},
                              {"se[0-9].bin", "se"},
                              {"x", "x"},
                              {"a/", "data"}};
    for (int i = 0; i < 10; i++) {
        char name[64];
        source_name(cases[i][0], name, sizeof(name));
        check(strcmp(name, cases[i][1]) == 0, cases[i][0], name);
    }
}

int main(void) {
    test_windows();
    test_brackets();
    test_odd_names();
    test_refused();
    test_ids();
    test_large();
    test_order();
    test_mixing();
    test_recipe();
    test_documents();
    test_state();
    test_state_of_samples();
    test_log();
    test_names();
    remove_tree(test_folder());
    return test_verdict();
}
