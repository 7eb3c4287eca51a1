// mta/score.h: log-probabilities of continuations, what an evaluation harness asks of a model. JSON lines in, one JSON
// line each out:
//   {"context": TEXT, "continuation": TEXT} or {"context_ids": [...], "continuation_ids": [...]}
//   {"logprob": sum, "tokens": n, "greedy": is each the most probable, "token_logprobs": [...]}
// A context text gets the tokenizer's BOS; context_ids are taken as they are; an empty context without BOS is refused.
//
// What computes them stands behind one function (Scorer.score). Requests are taken as many as there are (a file: up to
// SCORE_WINDOW; a pipe: what has arrived), given to it in parts sorted by their tokens, and answered in their own order.
#ifndef MTA_SCORE_H
#define MTA_SCORE_H
#include "util.h"
#include "json.h"
#include "tokenizer.h"

#include <math.h>
#include <poll.h>

// ---------------------------------------------------------------------------------------------------------------------
// Lines of a file or a pipe

typedef struct { int fd; Text buffer; size_t at; bool end; long number; } Lines;

// The next line without its newline, valid until the next call; NULL at the end. wait false: also NULL where reading
// would block.
static inline char* lines_next(Lines* l, const char* name, bool wait, size_t* n) {
    for (;;) {
        char* start = l->buffer.text ? l->buffer.text + l->at : NULL;
        size_t have = l->buffer.n - l->at;
        char* newline = have ? (char*)memchr(start, '\n', have) : NULL;
        if (newline || (l->end && have)) {
            *n = newline ? (size_t)(newline - start) : have;
            start[*n] = 0;
            l->at += *n + (newline != NULL);
            l->number++;
            return start;
        }
        if (l->end) { return NULL; }
        struct pollfd p = {l->fd, POLLIN, 0};
        if (!wait && poll(&p, 1, 0) <= 0) { return NULL; }
        if (l->at) {
            memmove(l->buffer.text, l->buffer.text + l->at, have);
            l->buffer.n = have;
            l->at = 0;
        }
        if (have > (size_t)1 << 30) { die("%s: line %ld is longer than 1 GiB", name, l->number + 1); }
        text_reserve(&l->buffer, 1 << 16);
        ssize_t got = read(l->fd, l->buffer.text + l->buffer.n, 1 << 16);
        if (got < 0 && errno == EINTR) { continue; }
        if (got < 0) { die("%s: %s", name, strerror(errno)); }
        l->buffer.n += (size_t)got;
        l->end = got == 0;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests

enum { SCORE_WINDOW = 4096, SCORE_PART = 256 };

typedef struct {
    int32_t* ids;     // context, then continuation
    int n, context;   // all tokens; those of the context, at least 1
    long line;        // of the file
    // The answer: what Scorer.score fills in. token_logprobs (n - context), logprob their sum, greedy: no other token was
    // more probable anywhere.
    float* token_logprobs;
    double logprob;
    bool greedy;
} ScoreRequest;

typedef struct {
    const Tokenizer* tokenizer;  // NULL: requests of ids only
    const char* no_tokenizer;    // what a request of text is then told
    int vocab, positions;        // ids are below vocab; context and continuation, but its last token, fit the positions
    bool shift;                  // a longer context loses its earliest tokens; else it is refused
    bool quiet;                  // nothing on standard error
    // Answers requests (n), whose logprob is 0 and greedy true, with a logprob of NaN where the model's numbers are not
    // finite; returns how many passes over the weights it took.
    long (*score)(void* model, ScoreRequest** requests, int n);
    void* model;
} Scorer;

// Ids of a field as text or as *_ids, appended to the request.
static inline bool score_read_part(ScoreRequest* q, const Scorer* scorer, const Json* j, const char* key,
                                   const char* ids_key, Error* e) {
    const Json *text = json_get(j, key), *list = json_get(j, ids_key);
    bool is_list = list && list->type == JSON_ARRAY, is_text = !is_list && text && text->type == JSON_STRING;
    int32_t* ids = NULL;
    size_t n = 0;
    Error inner = {{0}};
    if (!is_list && !is_text) { return fail(e, "wanted \"%s\", a string, or \"%s\", a list", key, ids_key); }
    if (is_text && !scorer->tokenizer) { return fail(e, "%s", scorer->no_tokenizer); }
    if (is_text && !tokenizer_encode(scorer->tokenizer, text->string, text->length, &ids, &n, &inner)) {
        return fail(e, "%s: %.400s", key, inner.text);
    }
    if (is_list) {
        ids = (int32_t*)alloc_or_die(list->count, sizeof *ids, "token ids");
        for (const Json* i = list->child; i; i = i->next) {
            int64_t id;
            if (!json_integer(i, 0, scorer->vocab - 1, &id)) {
                free(ids);
                return fail(e, "%s: wanted token ids from 0 to %d", ids_key, scorer->vocab - 1);
            }
            ids[n++] = (int32_t)id;
        }
    }
    if (n > INT32_MAX / 4) {
        free(ids);
        return fail(e, "%zu tokens", n);
    }
    q->ids = (int32_t*)realloc(q->ids, ((size_t)q->n + n + 1) * sizeof *q->ids);
    if (!q->ids) { die("out of memory: %zu tokens", n); }
    bool bos = is_text && !strcmp(key, "context") && tokenizer_bos(scorer->tokenizer) >= 0;
    if (bos) { q->ids[q->n++] = tokenizer_bos(scorer->tokenizer); }
    if (n) { memcpy(q->ids + q->n, ids, n * sizeof *ids); }
    q->n += (int)n;
    free(ids);
    return true;
}

static inline void score_request_free(ScoreRequest* q) {
    free(q->ids);
    free(q->token_logprobs);
    memset(q, 0, sizeof *q);
}

// One line; on failure the request holds nothing.
static inline bool score_read(ScoreRequest* q, const Scorer* scorer, const char* line, size_t n, Error* e) {
    memset(q, 0, sizeof *q);
    q->greedy = true;
    Json* j = json_parse(line, n, e);
    bool good = j && score_read_part(q, scorer, j, "context", "context_ids", e);
    q->context = q->n;
    good = good && score_read_part(q, scorer, j, "continuation", "continuation_ids", e);
    json_free(j);
    if (good && !q->context) { good = fail(e, "the context is empty and there is no BOS: nothing to condition on"); }
    int answer = q->n - q->context, over = q->n - 1 - scorer->positions;
    if (good && over > 0 && scorer->shift &&
        answer <= scorer->positions) {  // the context's earliest tokens are dropped
        memmove(q->ids, q->ids + over, (size_t)(q->n - over) * sizeof *q->ids);
        q->n -= over;
        q->context -= over;
    } else if (good && over > 0) {
        good = fail(e, "%d tokens, the context has %d positions; shorten it, or --shift drops the earliest", q->n,
                    scorer->positions);
    }
    if (!good) {
        score_request_free(q);
        return false;
    }
    q->token_logprobs = (float*)alloc_or_die((size_t)answer, sizeof(float), "log-probabilities");
    return true;
}

static inline int score_by_ids(const void* a, const void* b) {
    const ScoreRequest *x = *(ScoreRequest* const*)a, *y = *(ScoreRequest* const*)b;
    for (int i = 0; i < x->n && i < y->n; i++) {
        if (x->ids[i] != y->ids[i]) { return x->ids[i] < y->ids[i] ? -1 : 1; }
    }
    return x->n != y->n ? (x->n < y->n ? -1 : 1) : 0;
}

// Positions of b that need not be computed where those of a are there: equal tokens, but the last of b's context, whose
// logits are needed.
static inline int score_shared(const ScoreRequest* a, const ScoreRequest* b) {
    int n = 0;
    while (n < a->n && n < b->context - 1 && a->ids[n] == b->ids[n]) { n++; }
    return n;
}

static inline void score_put(const ScoreRequest* q, Text* t) {
    t->n = 0;
    text_printf(t, "{\"logprob\": ");
    text_json_number(t, q->logprob);
    text_printf(t, ", \"tokens\": %d, \"greedy\": %s, \"token_logprobs\": [", q->n - q->context,
                q->greedy ? "true" : "false");
    for (int i = 0; i < q->n - q->context; i++) {
        text_printf(t, "%s%.7g", i ? ", " : "", (double)q->token_logprobs[i]);
    }
    text_printf(t, "]}\n");
    put_out(t->text, t->n, false);
}

// ---------------------------------------------------------------------------------------------------------------------
// All requests of a file

// Answers the lines of `file` ("-": standard input) on standard output; returns the seconds it took.
static inline double score_lines(const Scorer* scorer, const char* file) {
    const char* name = strcmp(file, "-") ? file : "standard input";
    Lines lines = {0, {NULL, 0, 0}, 0, false, 0};
    if (strcmp(file, "-") && (lines.fd = open(name, O_RDONLY | O_CLOEXEC)) < 0) {
        die("%s: %s", name, strerror(errno));
    }
    struct stat st;
    bool regular = fstat(lines.fd, &st) == 0 && S_ISREG(st.st_mode), shows = isatty(2) && !scorer->quiet;
    ScoreRequest* requests = (ScoreRequest*)alloc_or_die(SCORE_WINDOW, sizeof *requests, "requests");
    ScoreRequest** sorted = (ScoreRequest**)alloc_or_die(SCORE_WINDOW, sizeof *sorted, "requests");
    Text answer = {NULL, 0, 0};
    Error e = {{0}};  // of the first bad line: what came before it is answered, then the program ends
    long done = 0, passes = 0;
    double start = seconds_now(), shown = start;
    while (!e.text[0]) {
        int n = 0;
        size_t length;
        char* text;
        while (n < SCORE_WINDOW && (text = lines_next(&lines, name, n == 0 || regular, &length)) != NULL) {
            if (strspn(text, " \t\r") == length) { continue; }
            if (!score_read(&requests[n], scorer, text, length, &e)) { break; }
            requests[n].line = lines.number;
            sorted[n] = &requests[n];
            n++;
        }
        if (!n) { break; }  // the end, or a bad line first of all

        // A window is answered in parts, of which each is told on stderr about once a second.
        for (int from = 0, part; from < n; from += part) {
            part = n - from < SCORE_PART ? n - from : SCORE_PART;
            qsort(sorted + from, (size_t)part, sizeof *sorted, score_by_ids);
            passes += scorer->score(scorer->model, sorted + from, part);
            done += part;
            if (seconds_now() - shown > 1 && !scorer->quiet) {
                shown = seconds_now();
                fprintf(stderr, "%sscored %ld, %.1f a second%s", shows ? "\r" : "", done,
                        (double)done / (shown - start), shows ? "" : "\n");
            }
        }
        for (int i = 0; i < n; i++) {
            if (!isfinite(requests[i].logprob)) {
                die("%s: line %ld: its log-probability is not finite: the numbers of this model overflow", name,
                    requests[i].line);
            }
            score_put(&requests[i], &answer);
            score_request_free(&requests[i]);
        }
        put_out("", 0, true);
    }
    if (e.text[0]) { die("%s: line %ld: %s", name, lines.number, e.text); }
    double seconds = seconds_now() - start;
    if (!scorer->quiet) {
        fprintf(stderr, "%sscored %ld in %.1f s, %ld passes over the weights\n", shows ? "\r" : "", done, seconds,
                passes);
    }
    if (lines.fd) { close(lines.fd); }
    text_free(&lines.buffer);
    text_free(&answer);
    free(requests);
    free(sorted);
    return seconds;
}

#endif
