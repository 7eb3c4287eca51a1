// fuzz_shard.c: a folder of shards, made of several files in one input (structure.h): x_train_000000.bin, its .mask,
// manifest.json. It is opened as the loader does it, mixed by tokens and by documents; every window is read, the
// tokenizer asked for, and the loader's state written and read again.
#include "structure.h"
#include "mta/shards.h"

enum { T = 7, VOCAB = 300 };

static void read_all(Loader* l) {
    int32_t tokens[T], targets[T];
    Error e = {{0}};
    for (uint64_t w = 0; w < loader_windows(l) && w < 50; w++) {
        if (!loader_window(l, w, tokens, targets, &e)) { break; }
        for (int t = 0; t < T; t++) {
            if (tokens[t] < 0 || tokens[t] >= VOCAB || targets[t] >= VOCAB || targets[t] < IGNORED_TARGET) { abort(); }
        }
    }
    for (int k = 0; k < 20 && loader_next(l, tokens, targets, &e); k++) {}
    Text state = {NULL, 0, 0};
    loader_state_write(l, &state);
    Json* j = json_parse(state.text, state.n, &e);
    uint64_t position = l->position;
    Error why = {{0}};
    if (!j || !loader_state_read(l, j, &why) || l->position != position) { abort(); }
    json_free(j);
    text_free(&state);
    ShardTokenizer tokenizer;
    loader_tokenizer(l, &tokenizer, &why);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    Parts parts;
    input_clock()->input++;
    parts_read(&parts, data, n);
    parts_lay_out(&parts, MEMORY_FOLDER);
    for (int mix = MIX_TOKEN; mix <= MIX_DOCUMENT; mix++) {
        Error e = {{0}};
        Loader l;
        bool good = loader_open_mix(&l, MEMORY_FOLDER "/*_train_*.bin", NULL, T, VOCAB, 1, (LoaderMix)mix, &e);
        if (good == (e.text[0] != 0)) { abort(); }
        if (good) { read_all(&l); }
        if (good) { loader_close(&l); }
    }
    memory_clear();
    parts_free(&parts);
    return 0;
}

// Header, tokens and mask changed together.
static void mutate_shard(Parts* p, Part* shard, Dice* dice) {
    static const int32_t odd[] = {
        0, 1, 2, 6, 7, 8, 40, 259, 300, 301, 65535, 65536, INT32_MAX, INT32_MIN, -1, SHARD_MAGIC_U16, SHARD_MAGIC_U32};
    Text* t = &shard->content;
    if (t->n < SHARD_HEADER_BYTES || !roll(dice, 20)) {
        mutate_bytes(t, t->n + 64);
        return;
    }
    int32_t h[6];
    memcpy(h, t->text, sizeof h);
    switch (roll(dice, 6)) {
        case 0: h[roll(dice, 6)] = odd[roll(dice, sizeof odd / sizeof odd[0])]; break;
        case 1: h[roll(dice, 6)] ^= (int32_t)roll(dice, 16); break;
        case 2:  // the other width
            h[0] = h[0] == SHARD_MAGIC_U16 ? SHARD_MAGIC_U32 : SHARD_MAGIC_U16;
            h[1] = h[0] == SHARD_MAGIC_U16 ? SHARD_VERSION_U16 : SHARD_VERSION_U32;
            break;
        case 3: h[2] = (int32_t)roll(dice, 100); break;
        case 4: h[5] = 1; break;
        default:
            if (t->n > SHARD_HEADER_BYTES) {
                t->text[SHARD_HEADER_BYTES + roll(dice, t->n - SHARD_HEADER_BYTES)] = (char)roll(dice, 256);
            }
    }
    int width = h[0] == SHARD_MAGIC_U16 ? 2 : 4;
    size_t want = h[2] >= 0 && h[2] < 4096 ? SHARD_HEADER_BYTES + (size_t)h[2] * (size_t)width : t->n;
    if (roll(dice, 8)) {  // as many tokens as the header counts, and their checksum
        while (t->n < want) { text_append(t, "\1\0\0\0", want - t->n < 4 ? want - t->n : 4); }
        t->n = want;
        uint32_t crc = crc32_update(0, t->text + SHARD_HEADER_BYTES, t->n - SHARD_HEADER_BYTES);
        if (roll(dice, 2)) { memcpy(&h[4], &crc, 4); }
    }
    memcpy(t->text, h, sizeof h);
    Part* mask = parts_find(p, "x_train_000000.mask");
    for (; mask && roll(dice, 8) && (size_t)h[2] < 4096 && mask->content.n < (size_t)h[2];) {
        text_append(&mask->content, "\1", 1);
    }
    if (mask && (size_t)h[2] < mask->content.n) { mask->content.n = (size_t)h[2]; }
    Part* manifest = parts_find(p, "manifest.json");
    const char* tokens = manifest && manifest->content.n ? strstr(manifest->content.text, "\"tokens\":") : NULL;
    if (tokens && roll(dice, 4)) {
        char number[32];
        snprintf(number, sizeof number, "%d", h[2]);
        size_t at = (size_t)(tokens + 9 - manifest->content.text), digits = strspn(tokens + 9, " 0123456789");
        text_replace(&manifest->content, at, digits, number, strlen(number));
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t n, size_t max, unsigned int seed) {
    static const char* const words[] = {
        "shards",        "documents", "tokens",     "preparation",        "preparations",       "tokenizer", "name",
        "file",          "sha256",    "vocab_size", "x_train_000000.bin", "y_train_000000.bin", "bytes",     "gpt2",
        "gpt2.tiktoken", "1",         "a/b"};
    Dice dice = {seed};
    Parts p;
    Text t = {NULL, 0, 0};
    if (!roll(&dice, 16)) { return LLVMFuzzerMutate(data, n, max); }
    parts_read(&p, data, n);
    if (!p.n) { return LLVMFuzzerMutate(data, n, max); }
    for (uint32_t k = 1 + roll(&dice, 3); k > 0; k--) {
        Part* part = &p.part[roll(&dice, (size_t)p.n)];
        size_t length = strlen(part->name);
        if (length > 4 && !strcmp(part->name + length - 4, ".bin")) {
            mutate_shard(&p, part, &dice);
        } else if (!strcmp(part->name, "manifest.json")) {
            mutate_json(&part->content, &dice, words, sizeof words / sizeof words[0]);
        } else {
            mutate_bytes(&part->content, part->content.n + 4);
        }
    }
    parts_write(&p, &t);
    parts_free(&p);
    return mutated(&t, data, n, max);
}
