// mta/ranks.h: one training run on several processes, "ranks" (dev/RANKS.md).
//
// What a step computes is a function of --shards V, not of the ranks: its windows are cut into V runs, each with a
// gradient sum of its own, and the V sums are added as a fixed binary tree has it: the node [a,b) is the sum of [a,m)
// and [m,b), b - m the smaller one, m - a the largest power of two below b - a. A rank has V/R shards, a subtree, so
// that the same bits come out of any number R of ranks for which V/R is a power of two, and of one. Each rank updates
// its own blocks of the weights with its part of the moments (ZeRO-1) and gives the new weights to the others. The
// arena is cut into buckets, of which every rank has its part: the gradients of a bucket can be added up while those of
// others are still computed.
//
// Alone (size 1, or NULL for a model that was never shared out) no function of a model's pass sends or waits: sums and
// exchanges give back what this process has. What is for several ranks only (ranks_limit, ranks_ask, ranks_answer) is
// not called then.
#ifndef MTA_RANKS_H
#define MTA_RANKS_H

#include "util.h"

#include "ranks_start.h"
#include "ranks_watch.h"

#include <sched.h>
#include <sys/mman.h>

enum {
    RANKS_BLOCK = 1 << 16,  // elements of an arena that one rank owns; the order of the norm's sum depends on it
    RANKS_PIECE = 1 << 24,  // bytes that rank 0 gives to all at once
    MAX_RANKS = 4096,
    MAX_WAITING = 12  // sums of MAX_RANKS shards that wait
};
#if !defined(RANKS_ROOM)
#define RANKS_ROOM (1 << 25)  // elements of a bucket, and that a rank receives at once: of 880m about one layer
#endif

typedef struct {
    void* data;
    size_t bytes;
    int peer;
    bool receive;
} RanksMessage;

// What carries messages between ranks (mta/ranks_mpi.h, mta/ranks_nccl.h). Those between two ranks arrive in the order
// of the calls.
typedef struct {
    void (*start)(void* state, const RanksMessage* list, int n);
    bool (*done)(void* state);  // makes progress, never waits; is all delivered that was started?
    // The same, but: may more be started, and sums be asked for of what is received? On a GPU they are asked for in
    // `stream`, where they wait for it themselves.
    bool (*taken)(void* state);
    void (*close)(void* state);
    bool (*computes)(void* state);  // NULL, or: does what was started wait for this rank's own GPU, not for others?
    // NULL, or the engine's own ways for arrays on the GPU of as many equal parts as there are ranks, the own part
    // there where its place says: all parts to all; the sums over the ranks of the own part's n floats, in an order
    // that is the engine's.
    void (*gather)(void* state, void* data, size_t bytes);
    void (*reduce)(void* state, float* data, size_t n);
} RanksBackend;

typedef struct {
    int rank, size;
    const RanksBackend* backend;
    void *state, *work;  // the backend's; on a GPU the stream whose results are sent, NULL = none yet
    void* stream;        // the backend's on a GPU, in which all is sent and what is received is added up
    int signal;          // that all ranks have agreed to obey, 0 = none
    int node;            // ranks of a node, which add up among themselves first: ranks_of_node
    bool met;            // all options and files were found good: see ranks_meet
    bool over;           // ranks_close was called
    int stderr_of_all;  // before ranks_meet what ranks other than 0 print on standard error is kept; here it goes after
    char name[128];     // what their messages begin with
    uint64_t bytes_sent;                  // since the start
    uint64_t bytes_reduced, bytes_early;  // of them gradients; of these such as were on their way before all were there
    double waited;                        // seconds in transfers
    Watch watch;
} Ranks;

typedef struct {
    size_t begin, end;
} Span;

// How gradients are added, and where those of other ranks are received.
typedef struct {
    // Adds n elements of `more` to `sum`; NULL: the backend adds, in its own order.
    void (*add)(void* state, void* sum, const void* more, size_t n);
    void* state;   // add's first argument
    size_t bytes;  // of an element
    char* room;    // (ranks_room elements), NULL where there is but one rank
} RanksSum;

// ---------------------------------------------------------------------------------------------------------------------
// Who has what

static inline int ranks_number(const Ranks* r) { return r ? r->rank : 0; }
static inline int ranks_size(const Ranks* r) { return r ? r->size : 1; }

// Rank `rank`'s part of n things in a row, of shards: as many as any rank has, but at the end there may be fewer or
// none.
static inline Span ranks_part(const Ranks* r, int rank, size_t n) {
    size_t size = (size_t)ranks_size(r), each = (n + size - 1) / size, begin = (size_t)rank * each;
    Span s = {begin < n ? begin : n, begin + each < n ? begin + each : n};
    return s;
}
static inline Span ranks_own(const Ranks* r, size_t n) { return ranks_part(r, ranks_number(r), n); }

// An arena of n elements is cut into buckets, all of one size but the last; one rank alone has a single one. Elements
// of a bucket, and the bucket that holds element `at`.
static inline size_t ranks_bucket(int ranks, size_t n) {
    size_t row = (size_t)ranks * RANKS_BLOCK;
    return ranks == 1 ? n : RANKS_ROOM > row ? RANKS_ROOM / row * row : row;
}
static inline Span ranks_bucket_at(int ranks, size_t n, size_t at) {
    size_t bucket = ranks_bucket(ranks, n), begin = at / bucket * bucket;
    Span s = {begin, n - begin < bucket ? n : begin + bucket};
    return s;
}

// Every bucket is cut into as many parts as there are ranks, of whole blocks, but at the end there may be less or none.
// Elements of a part, and the i-th part of so many elements.
static inline size_t ranks_each(int ranks, Span bucket) {
    size_t n = bucket.end - bucket.begin, blocks = (n + RANKS_BLOCK - 1) / RANKS_BLOCK,
           each = (blocks + (size_t)ranks - 1) / (size_t)ranks * RANKS_BLOCK;
    return each < n ? each : n;
}
static inline Span ranks_cut(Span s, size_t each, int i) {
    size_t begin = s.begin + (size_t)i * each, end = begin + each;
    Span part = {begin < s.end ? begin : s.end, end < s.end ? end : s.end};
    return part;
}

// Which part a rank has, and whose a part is: those of the first ranks of all nodes come first, then those of the
// second ones, ..., so that what a rank adds up inside its node, for all nodes, lies in one stretch.
static inline int ranks_nodes(const Ranks* r) { return r && r->size > 1 ? r->size / r->node : 1; }
static inline int ranks_place(const Ranks* r, int rank) {
    int nodes = ranks_nodes(r), node = ranks_size(r) / nodes;
    return rank % node * nodes + rank / node;
}
static inline int ranks_in_place(const Ranks* r, int place) {
    int nodes = ranks_nodes(r), node = ranks_size(r) / nodes;
    return place % nodes * node + place / nodes;
}

// This rank's part of a bucket.
static inline Span ranks_elements(const Ranks* r, Span bucket) {
    return ranks_cut(bucket, ranks_each(ranks_size(r), bucket), ranks_place(r, ranks_number(r)));
}

// The elements of an arena of n from `at` on, up to `end` at most, that one rank has, and where the first of them is
// among all that this rank has.
typedef struct {
    int rank;
    size_t end, local;
} Stretch;
static inline Stretch ranks_stretch(const Ranks* r, size_t n, size_t at, size_t end) {
    int size = ranks_size(r);
    Span bucket = ranks_bucket_at(size, n, at);
    size_t each = ranks_each(size, bucket), place = (at - bucket.begin) / each;
    Span part = ranks_cut(bucket, each, (int)place);
    Stretch s = {ranks_in_place(r, (int)place), part.end < end ? part.end : end,
                 bucket.begin / (size_t)size + (at - part.begin)};
    return s;
}

// Blocks that this rank has of an arena of n elements, and where the j-th of them begins.
static inline size_t ranks_own_blocks(const Ranks* r, size_t n) {
    int size = ranks_size(r);
    Span last = ranks_bucket_at(size, n, n - 1), own = ranks_elements(r, last);
    return (last.begin / (size_t)size + (own.end - own.begin) + RANKS_BLOCK - 1) / RANKS_BLOCK;
}
static inline size_t ranks_own_block(const Ranks* r, size_t n, size_t j) {
    int size = ranks_size(r);
    size_t bucket = ranks_bucket(size, n), each = bucket / (size_t)size, local = j * RANKS_BLOCK, i = local / each;
    return ranks_elements(r, ranks_bucket_at(size, n, i * bucket)).begin + (local - i * each);
}

// Elements that the first of so many ranks has of an arena of n, and none has more; that the arena must have room for
// where all parts are to be equal; that are received at once.
static inline size_t ranks_most_elements(int ranks, size_t n) {
    Span last = ranks_bucket_at(ranks, n, n - 1);
    return last.begin / (size_t)ranks + ranks_each(ranks, last);
}
static inline size_t ranks_padded(int ranks, size_t n) {
    Span last = ranks_bucket_at(ranks, n, n - 1);
    return last.begin + ranks_each(ranks, last) * (size_t)ranks;
}
static inline size_t ranks_room(int ranks, size_t n) { return ranks > 1 ? ranks_bucket(ranks, n) : 0; }

// The share of an arena of n that lies in buckets wholly at or behind element `from`: so much can be on its way when
// all gradients from there on are complete.
static inline double ranks_share_behind(int ranks, size_t n, size_t from) {
    size_t bucket = ranks_bucket(ranks, n), begin = (from + bucket - 1) / bucket * bucket;
    return begin < n ? (double)(n - begin) / (double)n : 0;
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

// The sum of parts[0] to parts[n-1] into parts[to], each of `count` elements, as the tree has it. Of two terms either
// may be the one that is added to: that changes no bit.
static inline void tree_add(void* const* parts, int n, int to, size_t count, const RanksSum* sum) {
    if (n < 2) { return; }
    int half = 1 << (31 - __builtin_clz((unsigned)n - 1));
    int left = to < half ? to : 0, right = to < half ? half : to;
    tree_add(parts, half, left, count, sum);
    tree_add(parts + half, n - half, right - half, count, sum);
    sum->add(sum->state, parts[to], parts[to < half ? right : left], count);
}

// ---------------------------------------------------------------------------------------------------------------------
// Transfers, which all ranks enter in the same order

static inline bool ranks_alone(const Ranks* r) { return !r || r->size == 1; }
static inline bool ranks_lead(const Ranks* r) { return !r || r->rank == 0; }

// Ranks of a node: as many on each host, side by side, a power of two, so that they are a subtree; else 1.
static inline int ranks_of_node(const Ranks* r) {
    int node = 1;
    while (node < r->size && !strcmp(r->watch.peers[node].host, r->watch.peers[0].host)) { node++; }
    bool even = r->size % node == 0 && (node & (node - 1)) == 0;
    for (int p = 1; p < r->size && even; p++) {
        bool first = p % node == 0, as_before = !strcmp(r->watch.peers[p].host, r->watch.peers[p - 1].host);
        even = first != as_before;
    }
    return even ? node : 1;
}

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

// This rank goes on: something is done.
static inline void ranks_moved(Ranks* r) {
    if (ranks_alone(r)) { return; }
    pthread_mutex_lock(&r->watch.lock);
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

// Waits until all that was started is `done` or `taken`. No call blocks: it looks, and lets others have the core, until
// then or until the watch ends the program. What takes longer is for the watch to know: that this rank looks and waits
// for others. As long as its own GPU has not come so far, its looks are no sign of life: that GPU may hang.
static inline void ranks_wait(Ranks* r, bool (*until)(void* state)) {
    const struct timespec nap = {0, 50000};
    Watch* w = &r->watch;
    double began = seconds_now();
    bool others = false;
    for (int looks = 0; !until(r->state); looks++) {
        if (looks < 100) {
            sched_yield();
            continue;
        }
        if (!others && (!r->backend->computes || !r->backend->computes(r->state))) {
            others = true;
            pthread_mutex_lock(&w->lock);
            w->self.waiting = 1;
            pthread_mutex_unlock(&w->lock);
        }
        if (others) { __atomic_fetch_add(&w->self.looks, 1, __ATOMIC_RELAXED); }
        nanosleep(&nap, NULL);
    }
    pthread_mutex_lock(&w->lock);
    w->self.waiting = 0;
    w->self.moves++;
    pthread_mutex_unlock(&w->lock);
    r->waited += seconds_now() - began;
}

// Sends and receives all of the list; ranks_start alone begins it.
static inline void ranks_start(Ranks* r, const RanksMessage* list, int n) {
    for (int i = 0; i < n; i++) { r->bytes_sent += list[i].receive ? 0 : list[i].bytes; }
    r->backend->start(r->state, list, n);
    ranks_wait(r, r->backend->taken);
}
static inline void ranks_transfer(Ranks* r, const RanksMessage* list, int n) {
    ranks_start(r, list, n);
    ranks_wait(r, r->backend->done);
}

// All that was started is done.
static inline void ranks_finish(Ranks* r) {
    if (!ranks_alone(r)) { ranks_wait(r, r->backend->done); }
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

// Begins: each rank has its part of a bucket of an arena whose elements have so many bytes, and afterwards all have
// all. By the backend's own way, if it has one, in equal parts (ranks_padded).
static inline void ranks_gather_bucket(Ranks* r, void* arena, Span bucket, size_t bytes) {
    if (ranks_alone(r)) { return; }
    size_t each = ranks_each(r->size, bucket);
    if (r->backend->gather) {
        r->bytes_sent += (uint64_t)(r->size - 1) * each * bytes;
        r->backend->gather(r->state, (char*)arena + bucket.begin * bytes, each * bytes);
        ranks_wait(r, r->backend->taken);
        return;
    }
    RanksMessage* list = ranks_list(r);
    int messages = 0;
    for (int p = 0; p < r->size; p++) {
        Span part[2] = {ranks_cut(bucket, each, ranks_place(r, p)), ranks_elements(r, bucket)};
        for (int send = 0; send < 2 && p != r->rank; send++) {
            RanksMessage one = {(char*)arena + part[send].begin * bytes, (part[send].end - part[send].begin) * bytes, p,
                                !send};
            if (one.bytes) { list[messages++] = one; }
        }
    }
    ranks_start(r, list, messages);
    free(list);
}

// All buckets.
static inline void ranks_gather_arena(Ranks* r, void* arena, size_t n, size_t bytes) {
    if (ranks_alone(r)) { return; }
    for (Span bucket = {0, 0}; bucket.end < n;) {
        bucket = ranks_bucket_at(r->size, n, bucket.end);
        ranks_gather_bucket(r, arena, bucket, bytes);
    }
    ranks_finish(r);
}

// Some ranks that add up elements of an arena: the i-th of them, rank first + i * apart, gets the sums of the i-th
// part.
typedef struct {
    int n, first, apart;
} RanksGroup;

// Begins: the sums over a group to which this rank belongs, of elements s of an arena in parts of `each`; those of the
// others are spoilt.
static inline void ranks_reduce_among(Ranks* r, const RanksGroup* g, void* arena, Span s, size_t each,
                                      const RanksSum* sum) {
    RanksMessage* list = ranks_list(r);
    void** parts = (void**)alloc_or_die((size_t)g->n, sizeof(void*), "parts of a sum");
    int self = (r->rank - g->first) / g->apart, messages = 0;
    Span own = ranks_cut(s, each, self);
    size_t mine = own.end - own.begin;
    for (int i = 0; i < g->n; i++) {
        Span part = ranks_cut(s, each, i);
        char* from = (char*)arena + part.begin * sum->bytes;
        parts[i] = i == self ? from : sum->room + (size_t)i * each * sum->bytes;
        RanksMessage in = {parts[i], mine * sum->bytes, g->first + i * g->apart, true},
                     out = {from, (part.end - part.begin) * sum->bytes, in.peer, false};
        if (i != self && in.bytes) { list[messages++] = in; }
        if (i != self && out.bytes) { list[messages++] = out; }
    }
    ranks_start(r, list, messages);
    if (mine) { tree_add(parts, g->n, self, mine, sum); }
    free(parts);
    free(list);
}

// Begins: the sums over all ranks of a bucket of an arena; each rank has those of its own elements when ranks_finish
// has come back, the others are spoilt. Inside each node first, where the i-th rank adds up what the i-th ranks of all
// nodes own, then between these: so a node sends through its network what it has added up. Both are levels of the tree,
// since a node is a subtree.
static inline void ranks_reduce_in_stages(Ranks* r, void* arena, Span bucket, const RanksSum* sum) {
    int node = r->node, nodes = ranks_nodes(r), self = r->rank % node;
    size_t each = ranks_each(r->size, bucket), of_nodes = each * (size_t)nodes;
    RanksGroup inside = {node, r->rank - self, 1}, between = {nodes, self, node};
    if (node > 1) { ranks_reduce_among(r, &inside, arena, bucket, of_nodes, sum); }
    if (nodes > 1) { ranks_reduce_among(r, &between, arena, ranks_cut(bucket, of_nodes, self), each, sum); }
}

// The same, or where sum has no add by the backend's own way, in its own order: then of floats in the GPU's memory, in
// equal parts. early: other buckets' gradients are still being computed.
static inline void ranks_reduce(Ranks* r, void* arena, Span bucket, const RanksSum* sum, bool early) {
    if (ranks_alone(r)) { return; }
    uint64_t before = r->bytes_sent;
    if (sum->add) {
        ranks_reduce_in_stages(r, arena, bucket, sum);
    } else {
        size_t each = ranks_each(r->size, bucket);
        r->bytes_sent += (uint64_t)(r->size - 1) * each * sizeof(float);
        r->backend->reduce(r->state, (float*)arena + bucket.begin, each);
        ranks_wait(r, r->backend->taken);
    }
    r->bytes_reduced += r->bytes_sent - before;
    r->bytes_early += early ? r->bytes_sent - before : 0;
}

// All buckets.
static inline void ranks_reduce_arena(Ranks* r, void* arena, size_t n, const RanksSum* sum) {
    if (ranks_alone(r)) { return; }
    for (Span bucket = {0, 0}; bucket.end < n;) {
        bucket = ranks_bucket_at(r->size, n, bucket.end);
        ranks_reduce(r, arena, bucket, sum, false);
    }
    ranks_finish(r);
}

// The sum of one number for each block of an arena of n elements, in the order of the blocks, whoever has them. mine
// (ranks_most_blocks): those of the own blocks in their order.
static inline size_t ranks_most_blocks(const Ranks* r, size_t n) {
    return (ranks_most_elements(ranks_size(r), n) + RANKS_BLOCK - 1) / RANKS_BLOCK;
}
static inline double ranks_sum_blocks(Ranks* r, const double* mine, size_t n) {
    size_t size = (size_t)ranks_size(r), most = ranks_most_blocks(r, n);
    double *all = (double*)alloc_or_die(size * most, sizeof(double), "sums of blocks"), total = 0;
    ranks_exchange(r, mine, most * sizeof(double), all);
    for (size_t at = 0; at < n; at += RANKS_BLOCK) {
        Stretch s = ranks_stretch(r, n, at, n);
        total += all[(size_t)s.rank * most + s.local / RANKS_BLOCK];
    }
    free(all);
    return total;
}

// The sum over all ranks.
static inline int64_t ranks_total(Ranks* r, int64_t mine) {
    int64_t all[MAX_RANKS], total = 0;
    ranks_exchange(r, &mine, sizeof mine, all);
    for (int p = 0; p < ranks_size(r); p++) { total += all[p]; }
    return total;
}

// n bytes of rank 0 to all, a piece at a time: a backend may need room of its own for what is on the way.
static inline void ranks_from_root(Ranks* r, void* data, size_t n) {
    if (ranks_alone(r)) { return; }
    RanksMessage* list = ranks_list(r);
    for (size_t at = 0; at < n; at += RANKS_PIECE) {
        int messages = 0;
        size_t bytes = n - at < RANKS_PIECE ? n - at : (size_t)RANKS_PIECE;
        RanksMessage in = {(char*)data + at, bytes, 0, true};
        for (int p = 1; p < r->size && r->rank == 0; p++) {
            RanksMessage out = {(char*)data + at, bytes, p, false};
            list[messages++] = out;
        }
        if (r->rank) { list[messages++] = in; }
        ranks_transfer(r, list, messages);
    }
    free(list);
}

// Rank 0 gives each rank p the n bytes at data + p * n, which p has at its data; back: p gives them to rank 0.
static inline void ranks_deal(Ranks* r, void* data, size_t n, bool back) {
    if (ranks_alone(r)) { return; }
    RanksMessage* list = ranks_list(r);
    int messages = 0;
    for (int p = 1; p < r->size && r->rank == 0; p++) {
        RanksMessage one = {(char*)data + (size_t)p * n, n, p, back};
        list[messages++] = one;
    }
    RanksMessage own = {data, n, 0, !back};
    if (r->rank) { list[messages++] = own; }
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
    const RanksMessage request = {&copy, sizeof copy, peer, false}, answer = {data, n, peer, true};
    ranks_transfer(r, &request, 1);
    ranks_transfer(r, &answer, 1);
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
// same status. A rank that leaves with status 0 has found none: a dry run is over, also where another rank has found
// one in it.
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
        bool mistake = all[p].left && all[p].status;
        others += mistake;
        if (mistake || (all[p].left && !others)) { first = p; }
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

// From here on every rank prints its mistakes at once.
static inline void ranks_speak(Ranks* r) {
    if (r->rank && !r->met) { dup2(r->stderr_of_all, STDERR_FILENO); }
    r->met = true;
}

// All options and files are good on all ranks.
static inline void ranks_met(Ranks* r) {
    if (ranks_alone(r) || r->met) { return; }
    ranks_meet(r, false, 0);
    ranks_speak(r);
}

// Rank 0 prints for all. The others' standard output goes nowhere, and what they say of mistakes is kept until all
// meet. For that the backend must work.
static inline void ranks_quiet(Ranks* r) {
    if (!r->rank) { return; }
    int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC), kept = memfd_create("stderr", MFD_CLOEXEC);
    if (nowhere < 0 || kept < 0 || dup2(nowhere, STDOUT_FILENO) < 0 || dup2(kept, STDERR_FILENO) < 0) {
        die("rank %d: standard output and error: %s", r->rank, strerror(errno));
    }
    signal_err = r->stderr_of_all;
}

// The ranks meet where address says, know each other's hosts and watch each other; rank and size are set. backend: what
// carries messages already, and the address is then told by it; NULL: it needs rank 0's block (n bytes, which all have
// afterwards) first. device: what no two ranks may share, "" = nothing. mistake: why this one can only say so. From
// here on an exit ends all ranks, and what a rank other than 0 prints begins with its name.
static inline void ranks_join(Ranks* r, StartAddress* address, const char* device, const StartMistake* mistake,
                              void* block, size_t n) {
    Watch* w = &r->watch;
    if (r->size > MAX_RANKS) { die("ranks: got %d, at most %d are served", r->size, MAX_RANKS); }
    w->rank = r->rank, w->size = r->size, w->timeout = 300;
    w->peers = (WatchPeer*)alloc_or_die((size_t)r->size, sizeof(WatchPeer), "ranks");
    for (int p = 0; p < r->size; p++) { w->peers[p].rank = p, w->peers[p].fd = -1; }
    pthread_mutex_init(&w->lock, NULL);
    int listening = r->rank ? -1 : start_listen(address);
    if (r->backend) { ranks_from_root(r, address, sizeof *address); }
    start_meet(w, address, listening, MTA_VERSION, device, mistake, block, n);

    r->stderr_of_all = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    if (r->stderr_of_all < 0) { die("rank %d: standard error: %s", r->rank, strerror(errno)); }
    w->err = r->rank ? r->stderr_of_all : STDERR_FILENO;
    if (r->rank) {
        snprintf(r->name, sizeof r->name, "%.40s: rank %d (%s)", program_invocation_short_name, r->rank,
                 w->peers[r->rank].host);
        program_invocation_short_name = r->name;
    }
    r->node = ranks_of_node(r);
    watch_start(w);
#ifdef __GLIBC__
    on_exit(ranks_on_exit, r);
#else
    die("ranks: this C library (musl) has no on_exit, by which a rank tells the others how it ended; wanted glibc");
#endif
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

// The ranks of this run: one, unless a launcher started several, which join(ranks, launch) does; NULL: this build
// cannot, and `why` says it.
static inline Ranks* ranks_of(void (*join)(Ranks*, const Launch*), const char* why) {
    static Ranks ranks;  // exit needs it after main
    Launch launch = launch_read();
    ranks.size = ranks.node = 1;
    if (launch.size < 2) { return &ranks; }
    if (!join) {
        ranks_yield_to_first(launch.rank);
        die("%s started %d processes, but this program is for one: %s", launch.launcher, launch.size, why);
    }
    join(&ranks, &launch);
    return &ranks;
}

#endif
