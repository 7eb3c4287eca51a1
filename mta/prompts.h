// mta/prompts.h: many texts to continue, infer_mta --prompts. JSON lines in, one JSON line each out:
//   {"prompt": TEXT, "until": [TEXT, ...], "max_tokens", "temperature", "top_k", "top_p"}: all but prompt are optional
//   {"text": the continuation, "tokens": n}
#ifndef MTA_PROMPTS_H
#define MTA_PROMPTS_H

#include "options.h"
#include "score.h"

// Texts that end an answer; those of the options and of a request together. An empty one ends nothing.
typedef struct {
    const char* text;
    size_t length;
} StopText;
typedef struct {
    StopText* all;  // owned
    int n;
} Stops;

// until: a list of strings, or NULL.
static inline Stops stops_of(const OptList* given, const Json* until) {
    Stops stops = {NULL, 0};
    size_t most = (size_t)given->n + (until ? until->count : 0);
    stops.all = (StopText*)alloc_or_die(most + 1, sizeof(StopText), "stops");
    for (int i = 0; i < given->n; i++) {
        stops.all[stops.n].text = given->texts[i];
        stops.all[stops.n++].length = strlen(given->texts[i]);
    }
    for (const Json* stop = until ? until->child : NULL; stop; stop = stop->next) {
        stops.all[stops.n].text = stop->string;
        stops.all[stops.n++].length = stop->length;
    }
    return stops;
}

// Cuts a text where the first of the stops begins, whatever their order; false: none of them is there.
static inline bool cut_at_stop(Text* text, const Stops* stops) {
    char* first = NULL;
    for (int i = 0; i < stops->n; i++) {
        bool both = text->n && stops->all[i].length;
        char* at = both ? (char*)memmem(text->text, text->n, stops->all[i].text, stops->all[i].length) : NULL;
        if (at && (!first || at < first)) { first = at; }
    }
    if (first) { text->n = (size_t)(first - text->text); }
    return first != NULL;
}

// How many bytes at the end of a text may be the beginning of a stop.
static inline size_t maybe_a_stop(const Text* text, const Stops* stops) {
    size_t longest = 0;
    for (int i = 0; i < stops->n; i++) {
        size_t n = stops->all[i].length ? stops->all[i].length - 1 : 0;
        if (n > text->n) { n = text->n; }
        while (n > longest && memcmp(text->text + text->n - n, stops->all[i].text, n) != 0) { n--; }
        if (n > longest) { longest = n; }
    }
    return longest;
}

// A number of a request in place of an option's, where there is one.
static inline double request_number(const Json* j, const char* key, double otherwise, double min, double max,
                                    bool integer, const char* where) {
    const Json* field = json_get(j, key);
    if (!field || field->type == JSON_NULL) { return otherwise; }
    if (field->type != JSON_NUMBER || !(field->number >= min && field->number <= max) ||
        (integer && !field->is_integer)) {
        die("%s: %s: wanted %s from %.15g to %.15g", where, key, integer ? "an integer" : "a number", min, max);
    }
    return field->number;
}

static inline void prompt_put(const Text* text, int tokens) {
    Text line = {NULL, 0, 0};
    text_printf(&line, "{\"text\": ");
    text_json_string(&line, text->text ? text->text : "", text->n);
    text_printf(&line, ", \"tokens\": %d}\n", tokens);
    put_out(line.text, line.n, true);
    text_free(&line);
}

// Says which keys of a request are not known, each once: `said` (owned by the caller) holds them, a line each.
static inline void say_unknown_keys(const Json* request, const char* where, Text* said) {
    for (const Json* j = request->type == JSON_OBJECT ? request->child : NULL; j; j = j->next) {
        Text key = {NULL, 0, 0};
        bool known = choice_index("prompt|until|max_tokens|temperature|top_k|top_p", j->key) >= 0;
        text_printf(&key, "\n%.60s\n", j->key);
        if (!known && !(said->n && strstr(said->text, key.text))) {
            Error e = {{0}};
            fail(&e, "%s: \"%.60s\" is ignored; a line has prompt, until, max_tokens, temperature, top_k, top_p", where,
                 j->key);
            fprintf(stderr, "%s: %s\n", program_invocation_short_name, e.text);
            text_append(said, key.text, key.n);
        }
        text_free(&key);
    }
}

// Gives each line of `file` ("-": standard input), an object, to `answer`, with what messages call the line.
static inline void prompt_lines(const char* file,
                                void (*answer)(void* model, const Json* j, long number, const char* where),
                                void* model) {
    Lines lines;
    Text said = {NULL, 0, 0};
    const char* name = lines_open(&lines, file);
    size_t n;
    for (char* text; (text = lines_next(&lines, name, true, &n)) != NULL;) {
        Error e = {{0}};
        char where[PATH_SIZE + 32];
        if (strspn(text, " \t\r") == n) { continue; }
        snprintf(where, sizeof where, "%s: line %ld", name, lines.number);
        Json* j = json_parse(text, n, &e);
        if (!j) { die("%s: %s", where, e.text); }
        say_unknown_keys(j, where, &said);
        answer(model, j, lines.number, where);
        json_free(j);
    }
    lines_close(&lines);
    text_free(&said);
}

#endif
