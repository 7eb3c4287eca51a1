// fuzz_json.c: the JSON reader on any bytes. Beyond not crashing: what was parsed, written out and parsed again is the
// same.
#include "mta/json.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n);

static void write_value(Text* t, const Json* j) {
    if (j->type == JSON_NULL) { text_printf(t, "null"); }
    if (j->type == JSON_BOOL) { text_printf(t, j->boolean ? "true" : "false"); }
    if (j->type == JSON_NUMBER) { text_json_number(t, j->number); }
    if (j->type == JSON_STRING) { text_json_string(t, j->string, j->length); }
    if (j->type != JSON_ARRAY && j->type != JSON_OBJECT) { return; }
    text_printf(t, j->type == JSON_ARRAY ? "[" : "{");
    for (const Json* c = j->child; c; c = c->next) {
        if (c != j->child) { text_printf(t, ","); }
        if (c->key) {
            text_json_string(t, c->key, strlen(c->key));
            text_printf(t, ":");
        }
        write_value(t, c);
    }
    text_printf(t, j->type == JSON_ARRAY ? "]" : "}");
}

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
