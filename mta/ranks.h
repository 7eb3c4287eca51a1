// mta/ranks.h: one training run on several processes, "ranks" (dev/RANKS.md).
//
// What a step computes is a function of --shards V, not of the ranks: its windows are cut into V runs, each with a
// gradient sum of its own, and the V sums are added as a fixed binary tree has it: the node [a,b) is the sum of [a,m)
// and [m,b), b - m the smaller one, m - a the largest power of two below b - a. A rank has V/R shards, a subtree, so
// that the same bits come out of any number R of ranks for which V/R is a power of two, and of one. Each rank updates
// its own blocks of the weights with its part of the moments (ZeRO-1) and gives the new weights to the others.
//
// Alone (size 1, or NULL for a model that was never shared out) every function here returns at once.
#ifndef MTA_RANKS_H
#define MTA_RANKS_H

#include "util.h"

#include "ranks_start.h"
#include "ranks_watch.h"

#include <sched.h>
#include <sys/mman.h>

enum {
    RANKS_BLOCK = 1 << 16,  // elements of an arena that one rank owns; the order of the norm's sum hangs on it
    RANKS_ROOM = 1 << 23,   // elements that a rank receives at once while gradients are reduced
    MAX_RANKS = 4096
};

typedef struct {
    void* data;
    size_t bytes;
    int peer;
    bool receive;
} RanksMessage;

// What carries messages between ranks (mta/ranks_mpi.h). Those between two ranks arrive in the order of the calls.
typedef struct {
    void (*start)(void* state, const RanksMessage* list, int n);
    bool (*done)(void* state);  // makes progress, never waits; are all messages delivered?
    void (*close)(void* state);
} RanksBackend;

typedef struct {
    int rank, size;
    const RanksBackend* backend;
    void* state;        // the backend's
    int signal;         // that all ranks have agreed to obey, 0 = none
    bool met;           // all options and files were found good: see ranks_meet
    bool over;          // ranks_close was called
    int stderr_of_all;  // before ranks_meet what ranks other than 0 print on standard error is kept; here it goes after
    char name[128];     // what their messages begin with
    char* room;         // RANKS_ROOM elements for gradients of other ranks
    uint64_t bytes_sent;  // since the start
    double waited;        // seconds in transfers
    Watch watch;
} Ranks;

// Adds n elements of `more` to `sum`.
typedef void (*RanksAdd)(void* sum, const void* more, size_t n);

typedef struct {
    size_t begin, end;
} Span;

// ---------------------------------------------------------------------------------------------------------------------
// Who has what

// Rank `rank`'s part of n things in a row. Things are shards, or blocks of RANKS_BLOCK elements.
static inline Span ranks_part(const Ranks* r, int rank, size_t n) {
    size_t size = r ? (size_t)r->size : 1;
    Span s = {n * (size_t)rank / size, n * ((size_t)rank + 1) / size};
    return s;
}
static inline int ranks_number(const Ranks* r) { return r ? r->rank : 0; }
static inline Span ranks_own(const Ranks* r, size_t n) { return ranks_part(r, ranks_number(r), n); }

// The elements of an arena of n that rank `rank` updates.
static inline Span ranks_elements(const Ranks* r, int rank, size_t n) {
    Span s = ranks_part(r, rank, (n + RANKS_BLOCK - 1) / RANKS_BLOCK);
    s.begin = s.begin * RANKS_BLOCK < n ? s.begin * RANKS_BLOCK : n;
    s.end = s.end * RANKS_BLOCK < n ? s.end * RANKS_BLOCK : n;
    return s;
}

// Can the shards be shared out, so that each rank has a subtree?
static inline bool shards_divide(int shards, int ranks) {
    return ranks == 1 || (shards % ranks == 0 && (shards / ranks & (shards / ranks - 1)) == 0);
}

// Shards are added one after another: how many of the sums that wait are added to that of shard `done` (1 = first) of
// n. Those that wait before it are the ones of the binary number done - 1.
static inline int shards_to_add(int done, int n) {
    return done < n ? __builtin_ctz((unsigned)done) : __builtin_popcount((unsigned)done - 1);
}

// Sums that wait at the same time, for n shards.
static inline int shards_waiting(int n) { return 31 - __builtin_clz((unsigned)n); }

// The sum of parts[0] to parts[n-1] into parts[0], each of `count` elements, as the tree has it.
static inline void tree_add(void* const* parts, int n, size_t count, RanksAdd add) {
    if (n < 2) { return; }
    int half = 1 << (31 - __builtin_clz((unsigned)n - 1));
    tree_add(parts, half, count, add);
    tree_add(parts + half, n - half, count, add);
    add(parts[0], parts[half], count);
}

// ---------------------------------------------------------------------------------------------------------------------
// Transfers, which all ranks enter in the same order

static inline bool ranks_alone(const Ranks* r) { return !r || r->size == 1; }
static inline bool ranks_lead(const Ranks* r) { return !r || r->rank == 0; }

// Ranks on this host.
static inline int ranks_here(const Ranks* r) {
    int here = 0;
    for (int p = 0; p < r->size; p++) {
        here += ranks_alone(r) || !strcmp(r->watch.peers[p].host, r->watch.peers[r->rank].host);
    }
    return here;
}

// Where this rank is now, for the watch; step: the one that it works on.
static inline void ranks_at(Ranks* r, RunPhase phase, int64_t step) {
    if (ranks_alone(r)) { return; }
    pthread_mutex_lock(&r->watch.lock);
    r->watch.self.phase = phase;
    r->watch.self.step = step;
    r->watch.self.moves++;
    pthread_mutex_unlock(&r->watch.lock);
}

// For the watch: seconds that a rank may stand still, 0 = for ever; the last good checkpoint.
static inline void ranks_limit(Ranks* r, double seconds) {
    pthread_mutex_lock(&r->watch.lock);
    r->watch.timeout = seconds;
    pthread_mutex_unlock(&r->watch.lock);
}
static inline void ranks_saved(Ranks* r, const char* path) {
    if (ranks_alone(r)) { return; }
    pthread_mutex_lock(&r->watch.lock);
    snprintf(r->watch.checkpoint, PATH_SIZE, "%s", path);
    pthread_mutex_unlock(&r->watch.lock);
}

// Sends and receives all of the list. No call blocks: it looks, and lets others have the core, until all has come or
// the watch ends the program.
static inline void ranks_transfer(Ranks* r, const RanksMessage* list, int n) {
    const struct timespec nap = {0, 50000};
    Watch* w = &r->watch;
    double began = seconds_now();
    for (int i = 0; i < n; i++) { r->bytes_sent += list[i].receive ? 0 : list[i].bytes; }
    pthread_mutex_lock(&w->lock);
    w->self.waiting = 1;
    pthread_mutex_unlock(&w->lock);
    r->backend->start(r->state, list, n);
    for (int looks = 0; !r->backend->done(r->state); looks++) {
        __atomic_fetch_add(&w->self.looks, 1, __ATOMIC_RELAXED);
        if (looks < 100) {
            sched_yield();
        } else {
            nanosleep(&nap, NULL);
        }
    }
    pthread_mutex_lock(&w->lock);
    w->self.waiting = 0;
    w->self.moves++;
    pthread_mutex_unlock(&w->lock);
    r->waited += seconds_now() - began;
}

static inline RanksMessage* ranks_list(const Ranks* r) {
    return (RanksMessage*)alloc_or_die(2 * (size_t)r->size, sizeof(RanksMessage), "messages");
}

// n bytes of every rank, in the order of ranks, into all (size * n).
static inline void ranks_exchange(Ranks* r, const void* mine, size_t n, void* all) {
    memcpy((char*)all + (ranks_alone(r) ? 0 : (size_t)r->rank * n), mine, n);
    if (ranks_alone(r)) { return; }
    RanksMessage* list = ranks_list(r);
    int messages = 0;
    for (int p = 0; p < r->size; p++) {
        RanksMessage out = {(char*)all + (size_t)r->rank * n, n, p, false},
                     in = {(char*)all + (size_t)p * n, n, p, true};
        if (p == r->rank) { continue; }
        list[messages++] = in;
        list[messages++] = out;
    }
    ranks_transfer(r, list, messages);
    free(list);
}

// Data is cut into blocks (the last may be shorter); each rank has its own, and afterwards all have all.
static inline void ranks_gather(Ranks* r, void* data, size_t bytes, size_t block) {
    if (ranks_alone(r)) { return; }
    RanksMessage* list = ranks_list(r);
    size_t blocks = (bytes + block - 1) / block;
    Span own = ranks_own(r, blocks);
    int messages = 0;
    for (int p = 0; p < r->size; p++) {
        Span part = ranks_part(r, p, blocks), of[2] = {part, own};
        for (int send = 0; send < 2 && p != r->rank; send++) {
            size_t from = of[send].begin * block, to = of[send].end * block < bytes ? of[send].end * block : bytes;
            RanksMessage one = {(char*)data + from, to - from, p, !send};
            if (from < to) { list[messages++] = one; }
        }
    }
    ranks_transfer(r, list, messages);
    free(list);
}

// The n elements of data (of so many bytes each), summed over the ranks: each rank has the sums of its own elements
// afterwards, the others are spoilt.
static inline void ranks_reduce(Ranks* r, void* data, size_t n, size_t bytes, RanksAdd add) {
    if (ranks_alone(r)) { return; }
    size_t piece = RANKS_ROOM / (size_t)r->size / RANKS_BLOCK * RANKS_BLOCK;
    if (piece < RANKS_BLOCK) { piece = RANKS_BLOCK; }
    if (!r->room) { r->room = (char*)alloc_or_die(piece * (size_t)r->size, bytes, "gradients of other ranks"); }
    RanksMessage* list = ranks_list(r);
    void** parts = (void**)alloc_or_die((size_t)r->size, sizeof(void*), "parts of a sum");
    Span own = ranks_elements(r, r->rank, n);
    bool more = true;
    for (size_t at = 0; more; at += piece) {
        int messages = 0;
        size_t mine = own.end - own.begin > at ? own.end - own.begin - at : 0;
        mine = mine < piece ? mine : piece;
        more = false;
        for (int p = 0; p < r->size; p++) {
            Span part = ranks_elements(r, p, n);
            size_t left = part.end - part.begin > at ? part.end - part.begin - at : 0;
            more = more || left > piece;
            parts[p] = r->room + (size_t)p * piece * bytes;
            if (p == r->rank) {
                parts[p] = (char*)data + (own.begin + at) * bytes;
                continue;
            }
            RanksMessage in = {parts[p], mine * bytes, p, true};
            RanksMessage out = {(char*)data + (part.begin + at) * bytes, (left < piece ? left : piece) * bytes, p,
                                false};
            if (in.bytes) { list[messages++] = in; }
            if (out.bytes) { list[messages++] = out; }
        }
        ranks_transfer(r, list, messages);
        if (!mine) { continue; }
        tree_add(parts, r->size, mine, add);
        if (r->rank) { memcpy(parts[r->rank], parts[0], mine * bytes); }
    }
    free(parts);
    free(list);
}

// The sum over all ranks.
static inline int64_t ranks_total(Ranks* r, int64_t mine) {
    int64_t all[MAX_RANKS], total = 0;
    ranks_exchange(r, &mine, sizeof mine, all);
    for (int p = 0; p < (r ? r->size : 1); p++) { total += all[p]; }
    return total;
}

// n bytes of rank 0 to all.
static inline void ranks_from_root(Ranks* r, void* data, size_t n) {
    if (ranks_alone(r)) { return; }
    RanksMessage* list = ranks_list(r);
    int messages = 0;
    RanksMessage in = {data, n, 0, true};
    for (int p = 1; p < r->size && r->rank == 0; p++) {
        RanksMessage out = {data, n, p, false};
        list[messages++] = out;
    }
    if (r->rank) { list[messages++] = in; }
    ranks_transfer(r, list, messages);
    free(list);
}

// Rank 0 asks one rank for something of n bytes, or tells all with NULL that nothing more is asked for.
typedef struct {
    int32_t kind, tensor;  // kind -1: nothing more
    uint64_t from, n;
} RanksRequest;
static inline void ranks_ask(Ranks* r, int peer, const RanksRequest* what, void* data, size_t n) {
    RanksRequest copy = *what;
    const RanksMessage list[2] = {{&copy, sizeof copy, peer, false}, {data, n, peer, true}};
    ranks_transfer(r, list, 2);
}
static inline void ranks_ask_no_more(Ranks* r) {
    RanksRequest none = {-1, 0, 0, 0};
    ranks_from_root(r, &none, sizeof none);
}
static inline void ranks_answer(Ranks* r, void* data, size_t n) {
    const RanksMessage one = {data, n, 0, false};
    ranks_transfer(r, &one, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Start and end

// What a rank says where all meet: good, or that it has left with a status and the line that it printed.
typedef struct {
    int32_t left, status;
    char text[PATH_SIZE];
} RanksWord;

// Ends the run on all ranks, in good order.
static inline void ranks_close(Ranks* r) {
    char mine = 0, all[MAX_RANKS];
    if (ranks_alone(r) || r->over) { return; }
    ranks_at(r, AT_END, 0);
    ranks_exchange(r, &mine, 1, all);
    watch_stop(&r->watch);
    r->over = true;
    r->backend->close(r->state);
}

// Before the first step all ranks come here, also those that a mistake ends: then the mistake is printed once. Rank 0
// has printed its own; else that of the first other rank is, which begins with that rank and its host. All end with the
// same status.
static inline void ranks_meet(Ranks* r, bool left, int status) {
    if (ranks_alone(r)) { return; }
    RanksWord mine, *all = (RanksWord*)alloc_or_die((size_t)r->size, sizeof mine, "what other ranks found");
    memset(&mine, 0, sizeof mine);
    mine.left = left, mine.status = status;
    fflush(NULL);
    ssize_t n = r->rank && left ? pread(STDERR_FILENO, mine.text, sizeof mine.text - 1, 0) : 0;
    mine.text[n > 0 ? n : 0] = 0;
    ranks_exchange(r, &mine, sizeof mine, all);
    int first = -1, others = 0;
    for (int p = r->size - 1; p >= 0; p--) {
        others += all[p].left;
        first = all[p].left ? p : first;
    }
    if (first < 0) {
        free(all);
        return;
    }
    if (first > 0 && r->rank == 0) {
        fputs(all[first].text, stderr);
        if (others > 1) { fprintf(stderr, "... and %d more of the %d ranks\n", others - 1, r->size); }
    }
    status = all[first].status;
    ranks_close(r);
    _exit(status);
}

// exit() on any rank, as a mistake calls it, ends all of them.
static inline void ranks_on_exit(int status, void* arg) {
    Ranks* r = (Ranks*)arg;
    if (r->over) { return; }
    if (!r->met && r->backend) { ranks_meet(r, true, status); }
    fflush(NULL);
    watch_end(&r->watch, status);
}

// All options and files are good on all ranks: from here on every rank prints its mistakes at once.
static inline void ranks_met(Ranks* r) {
    if (ranks_alone(r) || r->met) { return; }
    ranks_meet(r, false, 0);
    r->met = true;
    if (r->rank) { dup2(r->stderr_of_all, STDERR_FILENO); }
}

// Rank 0 prints for all. The others' standard output goes nowhere, and what they say of mistakes is kept until all
// meet. For that the backend must work.
static inline void ranks_quiet(Ranks* r) {
    if (!r->rank) { return; }
    int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC), kept = memfd_create("stderr", MFD_CLOEXEC);
    if (nowhere < 0 || kept < 0 || dup2(nowhere, STDOUT_FILENO) < 0 || dup2(kept, STDERR_FILENO) < 0) {
        die("rank %d: standard output and error: %s", r->rank, strerror(errno));
    }
}

// The ranks meet where address says, know each other's hosts and watch each other; rank and size are set. backend: what
// carries messages already, and the address is then told by it; NULL: it needs rank 0's block (n bytes, which all have
// afterwards) first. device: what no two ranks may share, "" = nothing. From here on an exit ends all ranks, and what a
// rank other than 0 prints begins with its name.
static inline void ranks_join(Ranks* r, StartAddress* address, const char* device, void* block, size_t n) {
    Watch* w = &r->watch;
    if (r->size > MAX_RANKS) { die("ranks: got %d, at most %d are served", r->size, MAX_RANKS); }
    w->rank = r->rank, w->size = r->size, w->timeout = 300;
    w->peers = (WatchPeer*)alloc_or_die((size_t)r->size, sizeof(WatchPeer), "ranks");
    for (int p = 0; p < r->size; p++) { w->peers[p].rank = p, w->peers[p].fd = -1; }
    pthread_mutex_init(&w->lock, NULL);
    int listening = r->rank ? -1 : start_listen(address);
    if (r->backend) { ranks_from_root(r, address, sizeof *address); }
    start_meet(w, address, listening, MTA_VERSION, device, block, n);

    r->stderr_of_all = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    if (r->stderr_of_all < 0) { die("rank %d: standard error: %s", r->rank, strerror(errno)); }
    w->err = r->rank ? r->stderr_of_all : STDERR_FILENO;
    if (r->rank) {
        snprintf(r->name, sizeof r->name, "%.40s: rank %d (%s)", program_invocation_short_name, r->rank,
                 w->peers[r->rank].host);
        program_invocation_short_name = r->name;
    }
    watch_start(w);
    on_exit(ranks_on_exit, r);
}

// What must be the same on all ranks: "got" says what a rank has that differs, "other arguments".
typedef struct {
    const char* got;
    uint64_t hash;
} RanksSame;
static inline uint64_t ranks_hash(const char* text, size_t n) { return (uint64_t)n << 32 | crc32_update(0, text, n); }

// Rank 0 refuses the first that differs.
static inline void ranks_same(Ranks* r, const RanksSame* mine, int n) {
    if (ranks_alone(r)) { return; }
    RanksSame* all = (RanksSame*)alloc_or_die((size_t)(r->size * n), sizeof *all, "what ranks have");
    ranks_exchange(r, mine, (size_t)n * sizeof *mine, all);
    for (int i = 0; i < r->size * n && r->rank == 0; i++) {
        if (all[i].hash == mine[i % n].hash) { continue; }
        die("rank %d (%s) has %s than rank 0 (%s); wanted the same on all", i / n, r->watch.peers[i / n].host,
            mine[i % n].got, r->watch.peers[0].host);
    }
    free(all);
}

#endif
