// mta/log.h: what a run writes down (DIR/log.jsonl) and what it shows on the way (a progress line).
//
// The log is one JSON object per line and event. All have
//   event, step, and time: seconds since 1970 (UTC) when the line was written
// start     a run, or its resumption: parameters, tokens_per_step, seq_len, flops_per_token (as MFU counts them) and
//           flops_per_second (the peak that mfu is of, 0 = not known), ranks, shards and reduce (the values of these
//           options), date, host, device, program, version, commit ("unknown" where it was built without git), config
//           (as in config.json), arguments; changed: a list of what --resume has found to be another value than before
// step      loss (nats per counted target, null where none counts), grad_norm (before clipping), lr, tokens (seen so
//           far), tokens_per_s, mfu (0 to 1), skipped (updates so far); sources: tokens of each of several
// val       a set of --val: name, loss, perplexity, tokens (counted); bits_per_byte where manifest.json tells the
//           bytes; where the set has a mask, error (0 to 1) of the sequences that have a counted target
// val_mean  after several of them: sets, and the means over the sets of loss, perplexity, bits_per_byte
// sample    text
// save      seconds, path; timed: true where --save-minutes made it
// damaged   a newer checkpoint that a resume has passed over: reason
// disk full removed: the step of the checkpoint that gave way
// score     of --score: seconds, file
// ranks     of several processes: ranks, a list with an object for each: host, windows (of steps; of --eval-only:
//           evaluated; of --score: requests) it computed, bytes_sent, of these bytes_reduced of gradients and of these
//           bytes_early before the backward pass had ended, seconds_waited
// stop      reason (done, signal, not finite), seconds since the start
// A value that is not finite is null. Each line is one write(2) to a file opened for appending, so that a
// crash leaves whole lines, or one torn line at the end, which the next --resume cuts together with every line of a
// step after the resumed one. The progress line overwrites itself on a terminal and becomes ordinary lines elsewhere (a
// file, a pipe, TERM=dumb).
#ifndef MTA_LOG_H
#define MTA_LOG_H
#include "util.h"
#include "json.h"
#include <sys/ioctl.h>
#include <time.h>

// ---------------------------------------------------------------------------------------------------------------------
// log.jsonl

typedef struct {
    int fd;       // -1: closed
    off_t size;   // bytes of whole lines written so far
    bool warned;  // the last write failed, which has been reported
    char path[PATH_SIZE];
} RunLog;

// How many leading bytes of a log stay when a run resumes at `step`: up to the first line that is torn, is no JSON
// object, belongs to a later step, or is the event of this step with which the run does again what it has done (NULL:
// none). Steps never fall within a log, so that a prefix is all that is needed.
static inline size_t runlog_keep(const char* text, size_t n, long step, const char* again) {
    size_t kept = 0;
    while (kept < n) {
        const char* newline = (const char*)memchr(text + kept, '\n', n - kept);
        if (newline == NULL) { break; }
        size_t length = (size_t)(newline - (text + kept));
        Json* line = json_parse(text + kept, length, NULL);
        int64_t at = 0;
        const Json* number = json_get(line, "step");
        const char* event = json_text(json_get(line, "event"));
        bool good = line != NULL && line->type == JSON_OBJECT &&
                    (number == NULL || (json_integer(number, 0, INT64_MAX, &at) && at <= step)) &&
                    !(again && event && at == step && !strcmp(event, again));
        json_free(line);
        if (!good) { break; }
        kept += length + 1;
    }
    return kept;
}

// Where what does not stay (rest, n bytes) begins with a line that is no JSON, and more follows it, a disk or an editor
// has been at work, not a crash: it is kept in log.jsonl.cut-STEP, and said.
static inline bool runlog_set_aside(const RunLog* log, const char* rest, size_t n, long step, Error* e) {
    char path[PATH_SIZE + 32];
    const char* newline = n > 0 ? (const char*)memchr(rest, '\n', n) : NULL;
    Json* line = newline != NULL ? json_parse(rest, (size_t)(newline - rest), NULL) : NULL;
    bool good = line != NULL && line->type == JSON_OBJECT;
    json_free(line);
    if (good || newline == NULL || newline + 1 == rest + n) { return true; }
    snprintf(path, sizeof(path), "%s.cut-%ld", log->path, step);
    if (!write_file_synced(path, rest, n, e)) { return false; }
    fprintf(stderr, "%s: %s: a line that is no JSON: it and the lines after it are cut off and kept in %s\n",
            program_invocation_short_name, log->path, path);
    return true;
}

// A run's folder that was copied by hard links (cp -al) shares the log with the copy, which keeps its lines: the first
// n bytes become a file of this run alone.
static inline bool runlog_unshare(const RunLog* log, const char* text, size_t n, Error* e) {
    char path[PATH_SIZE + 32];
    struct stat st;
    if (lstat(log->path, &st) || !S_ISREG(st.st_mode) || st.st_nlink < 2) { return true; }
    snprintf(path, sizeof(path), "%s.own", log->path);
    if (!write_file_synced(path, text, n, e)) { return false; }
    if (rename(path, log->path) == 0) { return true; }
    fail(e, "%s: cannot replace it: %s", log->path, strerror(errno));
    unlink_regular(path);
    return false;
}

// Opens run_dir/log.jsonl. resume_step -1: a new run, whose log must not exist. Otherwise the log is cut as runlog_keep
// says (made, if it is missing) and appended to.
static inline bool runlog_open(RunLog* log, const char* run_dir, long resume_step, const char* again, Error* e) {
    log->fd = -1;
    log->size = 0;
    log->warned = false;
    path_join(log->path, sizeof(log->path), run_dir, "log.jsonl");
    if (resume_step < 0) {
        log->fd = open(log->path, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0644);
        if (log->fd < 0 && errno == EEXIST) {
            return fail(e, "%s exists: a run was here; --resume continues it", log->path);
        }
        if (log->fd < 0) { return fail(e, "%s: cannot create: %s", log->path, strerror(errno)); }
        return true;
    }
    size_t keep = 0, n = 0;
    if (file_exists(log->path)) {
        char* text = NULL;
        if (!read_file(log->path, (size_t)1 << 40, &text, &n, e)) { return false; }
        keep = runlog_keep(text, n, resume_step, again);
        bool good = runlog_set_aside(log, text + keep, n - keep, resume_step, e) && runlog_unshare(log, text, keep, e);
        free(text);
        if (!good) { return false; }
    }
    if (n == 0 && resume_step > 0) { printf("%s is gone or empty: a new one begins\n", log->path); }
    log->fd = open(log->path, O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_CLOEXEC, 0644);
    if (log->fd < 0) { return fail(e, "%s: cannot open for writing: %s", log->path, strerror(errno)); }
    if (ftruncate(log->fd, (off_t)keep) != 0) {
        return fail(e, "%s: cannot cut to %zu bytes: %s", log->path, keep, strerror(errno));
    }
    log->size = (off_t)keep;
    return true;
}

// Appends one object (no newline in it), to which it adds the time. A write that fails (a full disk) leaves no torn
// line and returns false: the run goes on, since its checkpoints matter more than its log. The first of several in a
// row is reported on stderr.
static inline bool runlog_line(RunLog* log, const char* json_object) {
    if (log->fd < 0) { return false; }
    size_t n = strlen(json_object);
    Text line = {NULL, 0, 0};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    text_append(&line, json_object, n - 1);  // all but its closing brace
    text_printf(&line, ", \"time\": %lld.%03ld}\n", (long long)now.tv_sec, now.tv_nsec / 1000000);
    ssize_t put = write(log->fd, line.text, line.n);
    bool whole = put == (ssize_t)line.n;
    if (!whole && !log->warned) {
        fprintf(stderr, "%s: %s: cannot write: %s; the run goes on without its lines until that is over\n",
                program_invocation_short_name, log->path, put < 0 ? strerror(errno) : "no space left");
        log->warned = true;
    }
    if (whole) {
        log->size += put;
        log->warned = false;
    } else if (put > 0 && ftruncate(log->fd, log->size) != 0) {
        log->warned = true;  // the torn line stays; a resume cuts it
    }
    text_free(&line);
    return whole;
}

static inline void runlog_sync(RunLog* log) {
    if (log->fd >= 0) { fsync(log->fd); }
}

static inline void runlog_close(RunLog* log) {
    runlog_sync(log);
    if (log->fd >= 0) { close(log->fd); }
    log->fd = -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Progress

typedef struct {
    FILE* out;
    bool terminal;  // the line may overwrite itself
    bool open;      // an unfinished line stands on the terminal
    double last;    // when the line was drawn, seconds_now()
} Progress;

static inline Progress progress_make(FILE* out) {
    const char* term = getenv("TERM");
    Progress p = {out, isatty(fileno(out)) && (term == NULL || strcmp(term, "dumb") != 0), false, -1e9};
    return p;
}

// Shows `text` (plain ASCII, no newline). On a terminal it replaces the line before, cut to the width, at most ten
// times a second unless keep; elsewhere it is printed as a line if keep is set and dropped if not. keep: this line is
// to stay.
static inline void progress_line(Progress* p, const char* text, bool keep) {
    double now = seconds_now();
    if (!p->terminal) {
        if (keep) { fprintf(p->out, "%s\n", text); }
        fflush(p->out);
        return;
    }
    if (!keep && now - p->last < 0.1) { return; }
    struct winsize w;
    int columns = ioctl(fileno(p->out), TIOCGWINSZ, &w) == 0 ? w.ws_col : 0;  // 0: nobody knows
    int length = (int)strlen(text);
    if (!keep && columns > 1 && length > columns - 1) { length = columns - 1; }
    fprintf(p->out, "\r%.*s\033[K%s", length, text, keep ? "\n" : "");
    fflush(p->out);
    p->open = !keep;
    p->last = now;
}

// Ends an unfinished line, so that something else can be printed.
static inline void progress_break(Progress* p) {
    if (p->open) { fputc('\n', p->out); }
    fflush(p->out);
    p->open = false;
}

// 93784 s as "1d 02:03", 3723 s as "1:02:03", 83 s as "1:23".
static inline const char* format_duration(double seconds, char* out, size_t n) {
    long s = seconds >= 0 && seconds < 1e9 ? (long)(seconds + 0.5) : 0;
    if (!(seconds >= 0 && seconds < 1e15)) {
        snprintf(out, n, "?");
    } else if (seconds >= 1e9) {
        snprintf(out, n, "%.0f years", seconds / (365.25 * 86400));
    } else if (s >= 86400) {
        snprintf(out, n, "%ldd %02ld:%02ld", s / 86400, s / 3600 % 24, s / 60 % 60);
    } else if (s >= 3600) {
        snprintf(out, n, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    } else {
        snprintf(out, n, "%ld:%02ld", s / 60, s % 60);
    }
    return out;
}

// 1234567 as "1.23M": three digits and k, M, G, T.
static inline const char* format_count(double x, char* out, size_t n) {
    const char* unit[] = {"", "k", "M", "G", "T"};
    int u = 0;
    for (; x >= 999.5 && u < 4; u++) { x /= 1000; }
    snprintf(out, n, "%.*f%s", u == 0 || x >= 99.95 ? 0 : x >= 9.995 ? 1 : 2, x, unit[u]);
    return out;
}

#endif
