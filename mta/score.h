// mta/score.h: log-probabilities of continuations, what an evaluation harness asks of a model. JSON lines in, one JSON
// line each out:
//   {"context": TEXT, "continuation": TEXT} or {"context_ids": [...], "continuation_ids": [...]}
//   {"logprob": sum, "tokens": n, "greedy": is each the most probable, "token_logprobs": [...]}
// A context text gets the tokenizer's BOS; context_ids are taken as they are; an empty context without BOS is refused.
// Two texts are cut into tokens as EleutherAI's lm-evaluation-harness does it: blanks at the end of the context belong
// to the continuation, and the continuation's tokens are those that both texts in one have beyond the context's.
//
// What computes them stands behind one function (Scorer.score): infer_mta's, or that of the trainers (mta/train.h).
// Requests are taken as many as there are (a file: up to SCORE_WINDOW; a pipe: what has arrived), given to it in the
// order it wants, and answered in their own.
#ifndef MTA_SCORE_H
#define MTA_SCORE_H
#include "util.h"
#include "json.h"
#include "log.h"
#include "tokenizer.h"

#include <math.h>
#include <poll.h>

// ---------------------------------------------------------------------------------------------------------------------
// Lines of a file or a pipe

typedef struct {
    int fd;
    Text buffer;
    size_t at, searched;  // the next line begins at `at`; so many bytes from there hold no newline
    bool end;
    long number;
} Lines;

// Opens a file, "-": standard input; returns its name for messages.
static inline const char* lines_open(Lines* l, const char* file) {
    bool is_stdin = !strcmp(file, "-");
    memset(l, 0, sizeof *l);
    if (!is_stdin && (l->fd = open(file, O_RDONLY | O_CLOEXEC)) < 0) { die("%s: %s", file, path_error(file, errno)); }
    return is_stdin ? "standard input" : file;
}

static inline void lines_close(Lines* l) {
    if (l->fd) { close(l->fd); }
    text_free(&l->buffer);
}

// The next line without its newline, valid until the next call; NULL at the end. wait false: also NULL where reading
// would block.
static inline char* lines_next(Lines* l, const char* name, bool wait, size_t* n) {
    for (;;) {
        char* start = l->buffer.text ? l->buffer.text + l->at : NULL;
        size_t have = l->buffer.n - l->at;
        char* newline = have ? (char*)memchr(start + l->searched, '\n', have - l->searched) : NULL;
        l->searched = newline ? 0 : have;
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
        if (got < 0 && errno == EAGAIN && poll(&p, 1, -1) >= 0) { continue; }
        if (got < 0) { die("%s: %s", name, strerror(errno)); }
        l->buffer.n += (size_t)got;
        l->end = got == 0;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests

enum { SCORE_WINDOW = 4096 };

typedef struct {
    int32_t* ids;    // context, then continuation
    int n, context;  // all tokens; those of the context, at least 1
    long line;       // of the file
    bool cut;        // its context lost its earliest tokens
    // The answer: what Scorer.score fills in. token_logprobs (n - context), logprob their sum, greedy: greedy decoding
    // gives just these, the first of equally probable ones.
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
    int (*order)(const void* a, const void* b);  // of two ScoreRequest*, as qsort asks: what `score` gets them in
    // Answers the first of the requests (n), at least one, whose logprob is 0 and greedy true; returns how many. The
    // logprob is NaN where the model's numbers are not finite. Adds the passes over the weights that it took.
    int (*score)(void* model, ScoreRequest** requests, int n, long* passes);
    void* model;
} Scorer;

static inline bool score_append(ScoreRequest* q, const int32_t* ids, size_t n, Error* e) {
    if (n > INT32_MAX / 4) { return fail(e, "%zu tokens", n); }
    q->ids = (int32_t*)realloc(q->ids, ((size_t)q->n + n + 1) * sizeof *q->ids);
    if (!q->ids) { die("out of memory: %zu tokens", n); }
    if (n) { memcpy(q->ids + q->n, ids, n * sizeof *ids); }
    q->n += (int)n;
    return true;
}

// The tokens of a text (n bytes), owned by the caller.
static inline bool score_encode(const Scorer* scorer, const char* key, const char* text, size_t n, int32_t** ids,
                                size_t* count, Error* e) {
    Error inner = {{0}};
    if (!scorer->tokenizer) { return fail(e, "%s", scorer->no_tokenizer); }
    return tokenizer_encode(scorer->tokenizer, text, n, ids, count, &inner) || fail(e, "%s: %.400s", key, inner.text);
}

static inline bool score_append_bos(ScoreRequest* q, const Scorer* scorer, Error* e) {
    int32_t bos = scorer->tokenizer ? tokenizer_bos(scorer->tokenizer) : -1;
    return bos < 0 || score_append(q, &bos, 1, e);
}

// A field as ids (`list`) or as text, appended to the request; a context text after BOS.
static inline bool score_read_part(ScoreRequest* q, const Scorer* scorer, const Json* text, const Json* list,
                                   const char* key, Error* e) {
    int32_t* ids = NULL;
    size_t n = 0;
    bool good = true;
    if (list) {
        ids = (int32_t*)alloc_or_die(list->count, sizeof *ids, "token ids");
        for (const Json* i = list->child; good && i; i = i->next) {
            int64_t id = 0;
            good = json_integer(i, 0, scorer->vocab - 1, &id) ||
                   fail(e, "%s_ids: wanted token ids from 0 to %d", key, scorer->vocab - 1);
            ids[n++] = (int32_t)id;
        }
    } else if (text) {
        good = score_encode(scorer, key, text->string, text->length, &ids, &n, e) &&
               (strcmp(key, "context") || score_append_bos(q, scorer, e));
    } else {
        good = fail(e, "wanted \"%s\", a string, or \"%s_ids\", a list", key, key);
    }
    good = good && score_append(q, ids, n, e);
    free(ids);
    return good;
}

// Bytes of the blanks that end a text of n bytes: what Python's str.rstrip() takes off.
static inline size_t score_blanks(const char* text, size_t n) {
    static const char blanks[] =  // each ended by a NUL, all by another
        " \0\t\0\n\0\v\0\f\0\r\0\x1c\0\x1d\0\x1e\0\x1f\0\xc2\x85\0\xc2\xa0\0\xe1\x9a\x80\0\xe2\x80\x80\0\xe2\x80\x81\0"
        "\xe2\x80\x82\0\xe2\x80\x83\0\xe2\x80\x84\0\xe2\x80\x85\0\xe2\x80\x86\0\xe2\x80\x87\0\xe2\x80\x88\0"
        "\xe2\x80\x89\0\xe2\x80\x8a\0\xe2\x80\xa8\0\xe2\x80\xa9\0\xe2\x80\xaf\0\xe2\x81\x9f\0\xe3\x80\x80\0";
    size_t left = n;
    for (const char* blank = blanks; *blank;) {
        size_t size = strlen(blank);
        bool ends = left >= size && !memcmp(text + left - size, blank, size);
        left -= ends ? size : 0;
        blank = ends ? blanks : blank + size + 1;  // from the first again, before this one
    }
    return n - left;
}

static inline bool score_read_texts(ScoreRequest* q, const Scorer* scorer, const Json* context,
                                    const Json* continuation, Error* e) {
    size_t n = context->length - score_blanks(context->string, context->length), before = 0, all = 0;
    int32_t *ids = NULL, *all_ids = NULL;
    Text whole = {NULL, 0, 0};
    text_append(&whole, context->string, context->length);
    text_append(&whole, continuation->string, continuation->length);
    bool good = score_encode(scorer, "context", whole.text, n, &ids, &before, e) &&
                score_encode(scorer, "context and continuation", whole.text, whole.n, &all_ids, &all, e);
    if (good && whole.n > n && all <= before) {
        good = fail(e, "the continuation adds no token: with it the context has %zu, without it %zu", all, before);
    }

    // The context's own tokens, also where the continuation changes the last of them: so does the harness.
    good = good && score_append_bos(q, scorer, e) && score_append(q, ids, before, e);
    q->context = q->n;
    good = good && score_append(q, all_ids + before, all - before, e);
    free(ids);
    free(all_ids);
    text_free(&whole);
    return good;
}

// The field of that type, or NULL.
static inline const Json* score_field(const Json* j, const char* key, JsonType type) {
    const Json* field = json_get(j, key);
    return field && field->type == type ? field : NULL;
}

// Is the field there, whatever its type?
static inline bool score_given(const Json* j, const char* key) {
    const Json* field = json_get(j, key);
    return field && field->type != JSON_NULL;
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
    bool good = j != NULL;
    if (good) {
        const Json *context = score_field(j, "context", JSON_STRING),
                   *text = score_field(j, "continuation", JSON_STRING);
        const Json* context_ids = score_field(j, "context_ids", JSON_ARRAY);
        const Json* ids = score_field(j, "continuation_ids", JSON_ARRAY);
        bool both = score_given(j, "context") && score_given(j, "context_ids");
        if (both || (score_given(j, "continuation") && score_given(j, "continuation_ids"))) {
            good = fail(e, "got a text and ids of the %s, wanted one of them", both ? "context" : "continuation");
        } else if (context && text && !context_ids && !ids) {
            good = score_read_texts(q, scorer, context, text, e);
        } else {
            good = score_read_part(q, scorer, context, context_ids, "context", e);
            q->context = q->n;
            good = good && score_read_part(q, scorer, text, ids, "continuation", e);
        }
    }
    json_free(j);
    if (good && !q->context) { good = fail(e, "the context is empty and there is no BOS: nothing to condition on"); }
    int answer = q->n - q->context, over = q->n - 1 - scorer->positions;
    if (good && over > 0 && scorer->shift &&
        answer <= scorer->positions) {  // the context's earliest tokens are dropped
        memmove(q->ids, q->ids + over, (size_t)(q->n - over) * sizeof *q->ids);
        q->n -= over;
        q->context -= over;
        q->cut = true;
    } else if (good && over > 0) {
        good = fail(e, "%d tokens, the context has %d positions; shorten it%s", q->n, scorer->positions,
                    scorer->shift ? "" : ", or --shift drops the earliest");
    }
    if (!good) {
        score_request_free(q);
        return false;
    }
    q->token_logprobs = (float*)alloc_or_die((size_t)answer, sizeof(float), "log-probabilities");
    return true;
}

static inline int score_by_ids(const void* a, const void* b) {
    const ScoreRequest *x = *(ScoreRequest*const*)a, *y = *(ScoreRequest*const*)b;
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

// How far the lines of a file have come, told about once a second where standard error is a terminal.
typedef struct {
    Progress progress;
    double start, shown;           // seconds_now()
    double bytes;                  // of the file, 0 = not known
    double bytes_before;           // of them before the window that is being answered
    double bytes_window;           // of that window
    double tokens_window, tokens;  // of the window's requests, and of those that are answered
    long done, cut;                // requests; those whose context lost tokens
} ScoreProgress;

static inline void score_progress(ScoreProgress* p) {
    char line[128], eta[32];
    double now = seconds_now(), rate = (double)p->done / (now - p->start);
    if (now - p->shown < 1) { return; }
    int n = snprintf(line, sizeof line, "scored %ld, %.1f a second", p->done, rate);
    double share = (p->bytes_before + p->bytes_window * p->tokens / p->tokens_window) / p->bytes;
    if (p->bytes > 0 && share > 0 && share <= 1) {
        snprintf(line + n, sizeof line - (size_t)n, "  %.1f%%  ETA %s", 100 * share,
                 format_duration((now - p->start) * (1 / share - 1), eta, sizeof eta));
    }
    progress_line(&p->progress, line, false);
    p->shown = now;
}

// Answers the lines of `file` ("-": standard input) on standard output; returns the seconds it took.
static inline double score_lines(const Scorer* scorer, const char* file) {
    Lines lines;
    const char* name = lines_open(&lines, file);
    struct stat st;
    bool regular = fstat(lines.fd, &st) == 0 && S_ISREG(st.st_mode);
    ScoreRequest* requests = (ScoreRequest*)alloc_or_die(SCORE_WINDOW, sizeof *requests, "requests");
    ScoreRequest** sorted = (ScoreRequest**)alloc_or_die(SCORE_WINDOW, sizeof *sorted, "requests");
    Text answer = {NULL, 0, 0};
    Error e = {{0}};  // of the first bad line: what came before it is answered, then the program ends
    long passes = 0;
    ScoreProgress p = {progress_make(stderr), seconds_now(), 0, regular ? (double)st.st_size : 0, 0, 0, 0, 0, 0, 0};
    p.shown = p.start;
    while (!e.text[0]) {
        int n = 0;
        size_t length;
        char* text;
        while (n < SCORE_WINDOW && (text = lines_next(&lines, name, n == 0 || regular, &length)) != NULL) {
            if (strspn(text, " \t\r") == length) { continue; }
            if (!score_read(&requests[n], scorer, text, length, &e)) { break; }
            requests[n].line = lines.number;
            sorted[n] = &requests[n];
            p.tokens_window += requests[n].n;
            p.bytes_window += (double)length + 1;
            p.cut += requests[n].cut;
            n++;
        }
        if (!n) { break; }  // the end, or a bad line first of all

        qsort(sorted, (size_t)n, sizeof *sorted, scorer->order);
        for (int from = 0, part; from < n; from += part) {
            part = scorer->score(scorer->model, sorted + from, n - from, &passes);
            for (int i = from; i < from + part; i++) { p.tokens += sorted[i]->n; }
            p.done += part;
            if (!scorer->quiet) { score_progress(&p); }
        }
        p.bytes_before += p.bytes_window;
        p.bytes_window = p.tokens_window = p.tokens = 0;
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
    double seconds = seconds_now() - p.start;
    if (!scorer->quiet) {
        char line[192];
        int end =
            snprintf(line, sizeof line, "scored %ld in %.1f s, %ld passes over the weights", p.done, seconds, passes);
        if (p.cut) {
            snprintf(line + end, sizeof line - (size_t)end, ", %ld contexts without their earliest tokens", p.cut);
        }
        progress_line(&p.progress, line, true);
    }
    lines_close(&lines);
    text_free(&answer);
    free(requests);
    free(sorted);
    return seconds;
}

// ---------------------------------------------------------------------------------------------------------------------
// The loss of a text, in windows of the context (infer_mta --perplexity): one JSON object
//   {"tokens", "bytes", "windows", "nats", "nats_per_token", "perplexity", "nats_per_byte", "bits_per_byte"}

typedef struct {
    const Tokenizer* tokenizer;
    int positions, stride;                        // of a window; by which it moves on (0: half the positions)
    bool quiet;                                   // nothing on standard error
    void (*score)(void* model, ScoreRequest* q);  // as Scorer.score, of one window
    void* model;
} Perplexity;

// BOS and the text, each token predicted once. The first window is a whole context; the others move on by
// the stride and reach as far back as the context does, so that a token has at least context - stride before it.
// Returns nats.
static inline double perplexity_windows(const Perplexity* perplexity, int32_t* ids, size_t n, long* windows) {
    size_t T = (size_t)perplexity->positions, done = 1;
    size_t stride = perplexity->stride ? (size_t)perplexity->stride : (T + 1) / 2;
    if (stride > T) { die("--stride: got %zu, the context has %zu positions", stride, T); }
    ScoreProgress p = {progress_make(stderr), seconds_now(), seconds_now(), (double)n, 0, 0, 1, 0, 0, 0};
    double sum = 0;
    while (done < n) {
        size_t end = done == 1 ? T + 1 : done + stride;
        end = end < n ? end : n;
        size_t start = end > T + 1 ? end - T - 1 : 0;
        ScoreRequest q = {ids + start, (int)(end - start), (int)(done - start), 0, false, NULL, 0, false};
        q.token_logprobs = (float*)alloc_or_die(end - done, sizeof(float), "log-probabilities");
        perplexity->score(perplexity->model, &q);
        sum += q.logprob;
        free(q.token_logprobs);
        done = end;
        p.done++;
        p.bytes_before = (double)done;
        if (!perplexity->quiet) { score_progress(&p); }
    }
    progress_break(&p.progress);
    *windows = p.done;
    return -sum;
}

// Prints the loss of the text in `file`, one JSON object; returns the seconds it took.
static inline double perplexity_of(const Perplexity* perplexity, const char* file) {
    const Tokenizer* t = perplexity->tokenizer;
    char* text = NULL;
    size_t bytes = 0, n = 0;
    int32_t *ids = NULL, bos = tokenizer_bos(t);
    long windows = 0;
    Error e = {{0}};
    Text line = {NULL, 0, 0};
    if (!read_file(file, (size_t)1 << 30, &text, &bytes, &e)) { die("%s", e.text); }
    size_t good = utf8_valid_up_to(text, bytes), mark = byte_order_mark(text, bytes);
    if (good < bytes) { die("%s: no UTF-8 at byte %zu, wanted a text in UTF-8", file, good); }
    bytes -= mark;  // as data/prepare.py does it
    if (!tokenizer_encode(t, text + mark, bytes, &ids, &n, &e)) { die("%s: %s", file, e.text); }
    if (!n) { die("%s: it holds no text", file); }
    if (bos < 0) { die("%s: %s has no BOS, nothing to condition the first token on", file, tokenizer_name(t)); }
    int32_t* all = (int32_t*)alloc_or_die(n + 1, sizeof *all, "tokens");
    all[0] = bos;
    memcpy(all + 1, ids, n * sizeof *ids);
    double start = seconds_now(), nats = perplexity_windows(perplexity, all, n + 1, &windows);
    double seconds = seconds_now() - start;
    if (!isfinite(nats)) { die("%s: its loss is not finite: the numbers of this model overflow", file); }
    const double values[] = {nats, nats / (double)n, exp(nats / (double)n), nats / (double)bytes,
                             nats / (double)bytes / log(2)};
    const char* const names[] = {"nats", "nats_per_token", "perplexity", "nats_per_byte", "bits_per_byte"};
    text_printf(&line, "{\"tokens\": %zu, \"bytes\": %zu, \"windows\": %ld", n, bytes, windows);
    for (int i = 0; i < 5; i++) { text_json_field(&line, names[i], values[i]); }
    text_printf(&line, "}\n");
    put_out(line.text, line.n, true);
    text_free(&line);
    free(all);
    free(ids);
    free(text);
    return seconds;
}

#endif
