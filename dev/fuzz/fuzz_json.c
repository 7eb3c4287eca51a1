// fuzz_json.c: the JSON reader on any bytes. Beyond not crashing: what was parsed, written out and parsed again is the
// same.
#include "structure.h"

static bool same(const Json* a, const Json* b) {
    if (a->type != b->type || a->count != b->count || a->boolean != b->boolean || a->number != b->number ||
        a->length != b->length) {
        return false;
    }
    if (a->length && memcmp(a->string, b->string, a->length)) { return false; }
    if (!a->key != !b->key || (a->key && strcmp(a->key, b->key))) { return false; }
    const Json *x = a->child, *y = b->child;
    for (; x && y; x = x->next, y = y->next) {
        if (!same(x, y)) { return false; }
    }
    return !x && !y;
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    input_clock()->input++;
    Error e = {{0}};
    Json* j = json_parse((const char*)data, n, &e);
    if (!j != (e.text[0] != 0)) { abort(); }  // an error always has words, a success none
    if (!j) { return 0; }
    Text t = {0};
    write_value(&t, j);
    Json* again = json_parse(t.text, t.n, &e);
    if (!again || !same(j, again)) { abort(); }
    json_free(again);
    json_free(j);
    text_free(&t);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t n, size_t max, unsigned int seed) {
    Dice dice = {seed};
    Text t = {NULL, 0, 0};
    int words;
    if (!roll(&dice, 3)) { return LLVMFuzzerMutate(data, n, max); }
    text_append(&t, (const char*)data, n);
    const char* const* known = config_words(&words);
    mutate_json(&t, &dice, known, words);
    return mutated(&t, data, n, max);
}
