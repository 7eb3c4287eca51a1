// json.h: a strict JSON reader (RFC 8259) for configurations, checkpoint headers and JSON lines, and two writers of
// single values. Made for text from strangers: depth is limited, sizes are checked, UTF-8 is validated, numbers that do
// not fit a double are refused, and objects in which a key occurs twice: nobody knows which one is meant.
#ifndef MTA_JSON_H
#define MTA_JSON_H

#include "util.h"

#include <math.h>

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json {
    JsonType type;
    bool boolean;
    bool is_integer;  // the number is exactly `integer`
    int64_t integer;
    double number;
    char* string;  // UTF-8, NUL-terminated; may hold NULs: `length` bytes count
    size_t length;
    char* key;           // NULL unless a member of an object; a key with a NUL inside is refused
    struct Json* child;  // first element or member
    struct Json* next;   // the sibling
    size_t count;        // children
} Json;

enum { JSON_MAX_DEPTH = 64 };

typedef struct {
    const char* text;
    size_t n, at;
    int depth;
    Error* error;
} JsonReader;

static inline void json_free(Json* j) {
    while (j) {  // siblings in a loop, children by recursion: no deeper than JSON_MAX_DEPTH
        Json* next = j->next;
        json_free(j->child);
        free(j->string);
        free(j->key);
        free(j);
        j = next;
    }
}

static inline bool json_fail(JsonReader* r, const char* what) {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < r->at && i < r->n; i++) {
        column = r->text[i] == '\n' ? 1 : column + 1;
        line += r->text[i] == '\n';
    }
    return fail(r->error, "JSON: %s at line %zu, column %zu", what, line, column);
}

static inline int json_peek(const JsonReader* r) { return r->at < r->n ? (unsigned char)r->text[r->at] : -1; }

static inline void json_skip_space(JsonReader* r) {
    for (int c = json_peek(r); c == ' ' || c == '\t' || c == '\n' || c == '\r'; c = json_peek(r)) { r->at++; }
}

// Bytes of the character at `text` (1 to 4), of which n >= 1 bytes are left; 0 where it is no UTF-8: overlong, a
// surrogate, beyond U+10FFFF, cut off.
static inline size_t utf8_length(const char* text, size_t n) {
    const unsigned char* p = (const unsigned char*)text;
    unsigned char c = p[0];
    if (c < 0x80) { return 1; }
    if (c < 0xC2 || c > 0xF4) { return 0; }
    size_t size = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    if (n < size) { return 0; }
    unsigned char low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80, high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    if (p[1] < low || p[1] > high) { return 0; }
    for (size_t i = 2; i < size; i++) {
        if ((p[i] & 0xC0) != 0x80) { return 0; }
    }
    return size;
}

// Writes a code point as UTF-8 (room for 4 bytes), returns the bytes.
static inline size_t utf8_put(char* out, uint32_t c) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) { out[i] = (char)(0x80 | (c & 63)); }
    out[0] = (char)((n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0) | c);
    return n;
}

static inline bool json_hex4(JsonReader* r, uint32_t* out) {
    uint32_t v = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        int c = json_peek(r);
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) { return json_fail(r, "\\u without four hexadecimal digits"); }
        v = v * 16 + (uint32_t)digit;
    }
    *out = v;
    return true;
}

// The escape after a backslash: appends its bytes at out, *n grows. Half of a surrogate pair is refused: UTF-8 cannot
// hold it.
static inline bool json_escape(JsonReader* r, char* out, size_t* n) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    int c = json_peek(r);
    r->at += c >= 0;
    const char* simple = c > 0 ? strchr(from, c) : NULL;
    if (simple) {
        out[(*n)++] = to[simple - from];
        return true;
    }
    uint32_t code = 0, low = 0;
    if (c != 'u') { return json_fail(r, "unknown escape in a string"); }
    if (!json_hex4(r, &code)) { return false; }
    if (code >= 0xD800 && code < 0xDC00 && r->n - r->at >= 2 && r->text[r->at] == '\\' && r->text[r->at + 1] == 'u') {
        r->at += 2;
        if (!json_hex4(r, &low)) { return false; }
        if (low >= 0xDC00 && low < 0xE000) { code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00); }
    }
    if (code >= 0xD800 && code < 0xE000) { return json_fail(r, "half of a surrogate pair in a string"); }
    *n += utf8_put(out + *n, code);
    return true;
}

// A string, the reader standing on its quote. *out is malloc'ed and NUL-terminated.
static inline bool json_string(JsonReader* r, char** out, size_t* length) {
    size_t end = r->at + 1;  // the closing quote bounds the size: an escape is never shorter than what it stands for
    while (end < r->n && r->text[end] != '"') { end += r->text[end] == '\\' ? 2 : 1; }
    if (end >= r->n) { return json_fail(r, "string without an end"); }
    char* s = (char*)malloc(end - r->at);
    if (!s) { die("out of memory: a JSON string of %zu bytes", end - r->at); }
    size_t n = 0;
    bool good = true;
    for (r->at++; good && r->at < end;) {
        unsigned char c = (unsigned char)r->text[r->at];
        size_t len = utf8_length(r->text + r->at, end - r->at);
        if (c == '\\') {
            r->at++;
            good = json_escape(r, s, &n);
        } else if (c < 0x20 || !len) {
            good = json_fail(r, c < 0x20 ? "control character in a string" : "invalid UTF-8 in a string");
        } else {
            memcpy(s + n, r->text + r->at, len);
            n += len;
            r->at += len;
        }
    }
    if (!good) {
        free(s);
        return false;
    }
    r->at++;
    s[n] = 0;
    *out = s;
    *length = n;
    return true;
}

static inline size_t json_digits(JsonReader* r) {
    size_t n = 0;
    for (int c = json_peek(r); c >= '0' && c <= '9'; c = json_peek(r), n++) { r->at++; }
    return n;
}

// Checks the grammar by hand (strtod takes more than JSON does), converts with strtod.
static inline bool json_number(JsonReader* r, Json* j) {
    size_t start = r->at;
    bool integer = true;
    if (json_peek(r) == '-') { r->at++; }
    bool zero = json_peek(r) == '0';
    size_t digits = json_digits(r);
    if (!digits || (zero && digits > 1)) {
        return json_fail(r, digits ? "number with a leading zero" : "no digits in a number");
    }
    if (json_peek(r) == '.') {
        integer = false;
        r->at++;
        if (!json_digits(r)) { return json_fail(r, "no digits after a decimal point"); }
    }
    if (json_peek(r) == 'e' || json_peek(r) == 'E') {
        integer = false;
        r->at++;
        if (json_peek(r) == '+' || json_peek(r) == '-') { r->at++; }
        if (!json_digits(r)) { return json_fail(r, "no digits in an exponent"); }
    }
    char small[64];
    size_t n = r->at - start;
    char* copy = n < sizeof small ? small : (char*)malloc(n + 1);  // the text has no NUL after it
    if (!copy) { return json_fail(r, "out of memory for a number"); }
    memcpy(copy, r->text + start, n);
    copy[n] = 0;
    j->number = strtod(copy, NULL);
    errno = 0;
    j->integer = integer ? strtoll(copy, NULL, 10) : 0;
    j->is_integer = integer && errno == 0;
    if (copy != small) { free(copy); }
    if (!isfinite(j->number)) { return json_fail(r, "number beyond the range of a double"); }
    if (!j->is_integer && fabs(j->number) < 9007199254740992.0 && j->number == floor(j->number)) {  // 1e3, 2.0
        j->integer = (int64_t)j->number;
        j->is_integer = true;
    }
    return true;
}

static inline bool json_word(JsonReader* r, const char* word) {
    size_t n = strlen(word);
    if (r->n - r->at < n || memcmp(r->text + r->at, word, n)) { return json_fail(r, "not a JSON value"); }
    r->at += n;
    return true;
}

// Does every key of an object occur once?
static inline bool json_keys_differ(JsonReader* r, const Json* object) {
    const char *few[32], **keys = object->count > 32 ? (const char**)malloc(object->count * sizeof *keys) : few;
    char what[128];
    size_t n = 0;
    if (!keys) { die("out of memory: the keys of a JSON object"); }
    for (const Json* j = object->child; j; j = j->next) { keys[n++] = j->key; }
    qsort(keys, n, sizeof *keys, compare_texts);
    size_t i = 1;
    while (i < n && strcmp(keys[i - 1], keys[i])) { i++; }
    if (i < n) { snprintf(what, sizeof what, "key \"%.60s\" occurs twice in an object that ends", keys[i]); }
    if (keys != few) { free(keys); }
    return i >= n || json_fail(r, what);
}

static inline Json* json_value(JsonReader* r);

// Elements up to ']' or members up to '}'; the reader stands after the opening bracket.
static inline bool json_children(JsonReader* r, Json* j) {
    bool object = j->type == JSON_OBJECT;
    char close = object ? '}' : ']';
    Json** tail = &j->child;
    json_skip_space(r);
    if (json_peek(r) == close) {
        r->at++;
        return true;
    }
    for (;;) {
        char* key = NULL;
        size_t length = 0;
        json_skip_space(r);
        if (object) {
            if (json_peek(r) != '"') { return json_fail(r, "an object's key must be a string"); }
            if (!json_string(r, &key, &length)) { return false; }
            json_skip_space(r);
            if (memchr(key, 0, length) || json_peek(r) != ':') {
                json_fail(r, memchr(key, 0, length) ? "key with a NUL" : "no ':' after a key");
                free(key);
                return false;
            }
            r->at++;
        }
        Json* child = json_value(r);
        if (!child) {
            free(key);
            return false;
        }
        child->key = key;
        *tail = child;
        tail = &child->next;
        j->count++;
        json_skip_space(r);
        int c = json_peek(r);
        if (c != ',' && c != close) {
            return json_fail(r, object ? "neither ',' nor '}' in an object" : "neither ',' nor ']' in an array");
        }
        r->at++;
        if (c == close) { return !object || json_keys_differ(r, j); }
    }
}

static inline Json* json_value(JsonReader* r) {
    Json* j = (Json*)calloc(1, sizeof *j);
    if (!j) { die("out of memory: a JSON value"); }  // no error of the text: a log's good lines would pass for bad ones
    json_skip_space(r);
    int c = json_peek(r);
    bool good = true;
    if (c == '{' || c == '[') {
        j->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        r->at++;
        good = ++r->depth <= JSON_MAX_DEPTH ? json_children(r, j) : json_fail(r, "nested too deeply");
        r->depth--;
    } else if (c == '"') {
        j->type = JSON_STRING;
        good = json_string(r, &j->string, &j->length);
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        j->type = JSON_NUMBER;
        good = json_number(r, j);
    } else if (c == 't' || c == 'f') {
        j->type = JSON_BOOL;
        j->boolean = c == 't';
        good = json_word(r, c == 't' ? "true" : "false");
    } else {
        good = c < 0 ? json_fail(r, "the text ends too early") : json_word(r, "null");
    }
    if (good) { return j; }
    json_free(j);
    return NULL;
}

// Parses one value that fills the text but for a byte-order mark. NULL on error: what is wrong, at which line and
// column.
static inline Json* json_parse(const char* text, size_t n, Error* e) {
    JsonReader r = {text, n, byte_order_mark(text, n), 0, e};
    Json* j = json_value(&r);
    if (!j) { return NULL; }
    json_skip_space(&r);
    if (r.at < n) {
        json_fail(&r, "something after the value");
        json_free(j);
        return NULL;
    }
    return j;
}

// A file of at most max_bytes that holds one value; NULL and a message on error.
static inline Json* json_read(const char* path, size_t max_bytes, Error* e) {
    char* text;
    size_t n;
    Error why = {{0}};
    if (!read_file(path, max_bytes, &text, &n, e)) { return NULL; }
    Json* j = json_parse(text, n, &why);
    free(text);
    if (!j) { fail(e, "%.300s: %s", path, why.text); }
    return j;
}

// The member of that key; NULL if absent or not an object.
static inline const Json* json_get(const Json* object, const char* key) {
    if (!object || object->type != JSON_OBJECT) { return NULL; }
    for (const Json* c = object->child; c; c = c->next) {
        if (!strcmp(c->key, key)) { return c; }
    }
    return NULL;
}

// The text of a string; NULL where it is none or absent.
static inline const char* json_text(const Json* j) { return j ? j->string : NULL; }

// An exact integer within min..max.
static inline bool json_integer(const Json* j, int64_t min, int64_t max, int64_t* out) {
    if (!j || j->type != JSON_NUMBER || !j->is_integer || j->integer < min || j->integer > max) { return false; }
    *out = j->integer;
    return true;
}

// A quoted string. Invalid UTF-8 becomes U+FFFD, one for each byte, so that the output is always JSON.
static inline void text_json_string(Text* t, const char* s, size_t n) {
    text_append(t, "\"", 1);
    for (size_t i = 0; i < n;) {
        unsigned char c = (unsigned char)s[i];
        size_t len = utf8_length(s + i, n - i);
        if (c == '"' || c == '\\') {
            text_printf(t, "\\%c", c);
        } else if (c == '\n' || c == '\t' || c == '\r') {
            text_append(t, c == '\n' ? "\\n" : c == '\t' ? "\\t" : "\\r", 2);
        } else if (c < 0x20 || c == 0x7F) {
            text_printf(t, "\\u%04x", c);
        } else if (!len) {
            text_append(t, "\xEF\xBF\xBD", 3);
        } else {
            text_append(t, s + i, len);
        }
        i += len ? len : 1;
    }
    text_append(t, "\"", 1);
}

// The shortest of %.9g ... %.17g that reads back to the same double (integers in full); null where JSON has no number.
static inline void text_json_number(Text* t, double x) {
    char digits[40];
    if (!isfinite(x)) {
        text_append(t, "null", 4);
        return;
    }
    if (fabs(x) < 9007199254740992.0 && x == floor(x) && !(x == 0 && signbit(x))) {
        text_printf(t, "%.0f", x);
        return;
    }
    for (int precision = 9; precision <= 17; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, x);
        if (strtod(digits, NULL) == x) { break; }
    }
    text_append(t, digits, strlen(digits));
}

// A further member of an object, whose value is a number.
static inline void text_json_field(Text* t, const char* key, double x) {
    text_printf(t, ", \"%s\": ", key);
    text_json_number(t, x);
}

#endif
