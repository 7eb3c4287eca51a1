// mta/ranks_watch.h: how the processes of a run ("ranks", mta/ranks.h) see that one of them is gone, stuck or has
// ended.
//
// Neither MPI nor its launchers notice a host that is cut off, and a rank that waits in MPI for a lost one waits for
// ever. So every rank keeps a TCP connection to rank 0, and a thread that sends a beat over it each second: where the
// rank is, and how much processor time it has used. A connection that ends is a process that is gone, silence a host
// that is; a rank that neither works nor waits is stuck. Then one line says which rank on which host, and all ranks end
// with EXIT_RANK_LOST. Nothing is saved, since the moments that the lost rank held are gone: the last checkpoint is.
#ifndef MTA_RANKS_WATCH_H
#define MTA_RANKS_WATCH_H

#include "util.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>

enum { EXIT_RANK_LOST = 71 };
enum { WATCH_SILENCE = 20, WATCH_LEAST = 3, HOST_SIZE = 64 };  // seconds; the least that --rank-timeout may be

// Where a rank is in the run. AT_FETCH: rank 0 gets what a checkpoint is written of. AT_REQUESTS: it reads what --score
// answers, for as long as it takes to come.
typedef enum {
    AT_START,
    AT_STEP,
    AT_EVALUATION,
    AT_SAMPLES,
    AT_CHECKPOINT,
    AT_FETCH,
    AT_SCORE,
    AT_REQUESTS,
    AT_END
} RunPhase;

// BEAT: I live. SAID: I end with `status` and have said why. END: all end with `status`. BYE: the run is over.
typedef enum { WATCH_BEAT, WATCH_SAID, WATCH_END, WATCH_BYE } WatchKind;
typedef struct {
    int32_t kind, rank, phase, waiting, status, unused;
    int64_t step, moves,
        looks;    // moves: grows with all that the rank has finished; looks: with each look while it waits
    double busy;  // seconds of processor time
} WatchMessage;

typedef struct {
    int rank, fd;  // fd -1: none, or said goodbye
    char host[HOST_SIZE];
    char part[sizeof(WatchMessage)];  // of a message that has not come whole
    size_t have;
    WatchMessage last;
    double heard, alive, moved;  // when a message came; one that showed any life; one that showed progress
} WatchPeer;

typedef struct {
    int rank, size;
    WatchPeer* peers;            // (size); of all but rank 0 only that of rank 0 is connected
    int err;                     // standard error as the program got it
    double timeout;              // seconds that a rank may stand still, 0 = for ever
    WatchMessage self;           // what the next beat says: written by the main thread
    char checkpoint[PATH_SIZE];  // the last good one, "" = none
    bool over, ending;           // the run is done; this process ends all of them
    bool spins;                  // waits here take processor time, which then is no sign of life
    pthread_t thread;
    pthread_mutex_t lock;  // of what both threads use: sending, self, checkpoint, timeout, over
} Watch;

static inline double watch_busy(void) { return clock_seconds(CLOCK_PROCESS_CPUTIME_ID); }

// ---------------------------------------------------------------------------------------------------------------------
// Messages

// Sends to one peer. What cannot be sent is dropped: the reader's silence will tell.
static inline void watch_send(Watch* w, WatchPeer* peer, WatchKind kind, int status) {
    pthread_mutex_lock(&w->lock);
    WatchMessage m = w->self;
    m.kind = kind, m.rank = w->rank, m.status = status, m.busy = w->spins ? 0 : watch_busy();
    if (peer->fd >= 0 && send(peer->fd, &m, sizeof m, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) { errno = 0; }
    pthread_mutex_unlock(&w->lock);
}
static inline void watch_send_all(Watch* w, WatchKind kind, int status) {
    for (int i = 0; i < w->size; i++) { watch_send(w, &w->peers[i], kind, status); }
}

// What is not read when a process ends resets its connections, and with them what was just sent: so it is read, until
// the others have closed theirs, for a second at most.
static inline void watch_drain(Watch* w) {
    char rest[1024];
    for (int i = 0; i < w->size; i++) { shutdown(w->peers[i].fd, SHUT_WR); }
    double end = seconds_now() + 1;
    for (int i = 0; i < w->size; i++) {
        struct pollfd one = {w->peers[i].fd, POLLIN, 0};
        while (one.fd >= 0 && seconds_now() < end && poll(&one, 1, (int)(1000 * (end - seconds_now())) + 1) > 0 &&
               recv(one.fd, rest, sizeof rest, 0) > 0) {}
    }
}

// Rank 0 ends the others without a further line; another rank tells rank 0 that it has printed its own.
static inline void watch_end(Watch* w, int status) {
    signal(SIGTERM, SIG_IGN);  // a launcher that sees a process end sends it to the others
    pthread_mutex_lock(&w->lock);
    w->ending = true;
    pthread_mutex_unlock(&w->lock);
    watch_send_all(w, w->rank ? WATCH_SAID : WATCH_END, status);
    watch_drain(w);
    _exit(status);
}

// Where a rank was, as a text: "step 12", "the evaluation after step 10".
static inline const char* watch_where(const WatchMessage* m, char* out, size_t n) {
    static const char* const before[] = {"at the start",
                                         "in step",
                                         "in the evaluation after step",
                                         "in the samples after step",
                                         "in the checkpoint of step",
                                         "in the checkpoint of step",
                                         "in the requests from line",
                                         "before the requests after line",
                                         "at the end"};
    if (m->phase == AT_START || m->phase == AT_END) {
        snprintf(out, n, "%s", before[m->phase]);
    } else {
        snprintf(out, n, "%s %lld", before[m->phase], (long long)m->step);
    }
    return out;
}

// The rank that speaks if rank 0 is lost: the first one of another host, which may be lost with it, else rank 1.
static inline int watch_second(const Watch* w) {
    for (int p = 1; p < w->size; p++) {
        if (strcmp(w->peers[p].host, w->peers[0].host) != 0) { return p; }
    }
    return 1;
}

// Prints the one line, on rank 0 or, if that is the lost one, on another; ends all ranks. at: where that rank was.
static inline void watch_lost(Watch* w, const WatchPeer* peer, const char* what, const WatchMessage* at) {
    char where[64], line[PATH_SIZE + 512];
    pthread_mutex_lock(&w->lock);
    bool ending = w->ending;
    pthread_mutex_unlock(&w->lock);
    while (ending) { pause(); }  // the main thread ends all, and what it ends is no loss
    pthread_mutex_lock(&w->lock);
    watch_where(at, where, sizeof where);
    snprintf(line, sizeof line, "%s: rank %d (%s) %s %s; all ranks end, the last good checkpoint: %s\n",
             program_invocation_short_name, peer->rank, peer->host, what, where,
             w->checkpoint[0] ? w->checkpoint : "none");
    pthread_mutex_unlock(&w->lock);
    bool speaks = w->rank == 0 || (peer->rank == 0 && w->rank == watch_second(w));
    if (speaks && write(w->err, line, strlen(line)) < 0) { errno = 0; }
    watch_end(w, EXIT_RANK_LOST);
}

static inline void watch_take(Watch* w, WatchPeer* peer, const WatchMessage* m, double now) {
    if (m->kind == WATCH_END) { _exit(m->status); }
    if (m->kind == WATCH_SAID) { watch_end(w, m->status); }
    if (m->kind == WATCH_BYE) {
        pthread_mutex_lock(&w->lock);
        close(peer->fd);
        peer->fd = -1;
        pthread_mutex_unlock(&w->lock);
    }
    // The thread that sends this lives: what the main thread does is what counts. It looks, works, or does nothing.
    bool moved = m->moves != peer->last.moves || (!m->waiting && m->busy > peer->last.busy + 0.02);
    if (moved) { peer->moved = now; }
    if (moved || m->looks != peer->last.looks) { peer->alive = now; }
    peer->heard = now;
    peer->last = *m;
}

// Takes what has come from a peer; one that has closed its connection without goodbye is lost.
static inline void watch_read(Watch* w, WatchPeer* peer, double now) {
    while (peer->fd >= 0) {
        ssize_t got = recv(peer->fd, peer->part + peer->have, sizeof peer->part - peer->have, MSG_DONTWAIT);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) { return; }
        if (got <= 0) { watch_lost(w, peer, "was lost", &w->self); }
        peer->have += (size_t)got;
        if (peer->have < sizeof peer->part) { continue; }
        WatchMessage m;
        memcpy(&m, peer->part, sizeof m);
        peer->have = 0;
        watch_take(w, peer, &m, now);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The thread

// Must a rank show life where it is? Not at the start and the end, where files are read and closed, nor rank 0 while it
// writes what it has fetched or waits for requests: how long that takes is the disk's or the user's to say.
static inline bool watch_judges(const WatchPeer* peer) {
    switch (peer->last.phase) {
        case AT_STEP:
        case AT_EVALUATION:
        case AT_SAMPLES:
        case AT_FETCH:
        case AT_SCORE: return true;
        case AT_CHECKPOINT: return peer->rank != 0;
        default: return false;
    }
}

// On rank 0: a rank that must show life and does not is stuck; so are all where each waits for another.
static inline void watch_find_stuck(Watch* w, double now, double timeout) {
    int waiting = 0;
    double last = 0;
    for (int i = 0; i < w->size; i++) {
        const WatchPeer* peer = &w->peers[i];
        if (watch_judges(peer) && now - peer->alive > timeout) {
            char what[80];
            snprintf(what, sizeof what, "has stood still for %.0f s", now - peer->alive);
            watch_lost(w, peer, what, &peer->last);
        }
        waiting += peer->last.waiting;
        last = peer->moved > last ? peer->moved : last;
    }
    if (waiting == w->size && now - last > timeout) {
        watch_lost(w, &w->peers[0], "and all others wait for each other", &w->self);
    }
}

static inline void watch_round(Watch* w, double now, double timeout) {
    double silence = timeout > 0 && timeout < WATCH_SILENCE ? timeout : (double)WATCH_SILENCE;
    watch_send_all(w, WATCH_BEAT, 0);
    for (int i = 0; i < w->size; i++) {
        WatchPeer* peer = &w->peers[i];
        if (peer->fd >= 0 && timeout > 0 && now - peer->heard > silence) {
            watch_lost(w, peer, "is silent since it was", &peer->last);
        }
    }
    if (w->rank || timeout <= 0) { return; }
    pthread_mutex_lock(&w->lock);
    WatchMessage self = w->self;
    pthread_mutex_unlock(&w->lock);
    self.kind = WATCH_BEAT, self.busy = w->spins ? 0 : watch_busy();
    watch_take(w, &w->peers[0], &self, now);
    watch_find_stuck(w, now, timeout);
}

static inline void* watch_thread(void* arg) {
    Watch* w = (Watch*)arg;
    int n = w->rank ? 1 : w->size;  // poll takes no more than the files that a process may open
    struct pollfd* list = (struct pollfd*)alloc_or_die((size_t)n, sizeof *list, "the watch's connections");
    double before = seconds_now(), round = 0;
    for (;;) {
        pthread_mutex_lock(&w->lock);
        bool over = w->over;
        double timeout = w->timeout;
        pthread_mutex_unlock(&w->lock);
        if (over) { break; }
        for (int i = 0; i < n; i++) {
            struct pollfd one = {w->peers[i].fd, POLLIN, 0};
            list[i] = one;
        }
        poll(list, (nfds_t)n, 200);
        double now = seconds_now();
        // This process, or the whole machine, stood still for a while: what it has not heard meanwhile means nothing.
        for (int i = 0; i < w->size && now - before > 1; i++) {
            w->peers[i].heard += now - before, w->peers[i].alive += now - before, w->peers[i].moved += now - before;
        }
        before = now;
        for (int i = 0; i < n; i++) {
            if (list[i].revents) { watch_read(w, &w->peers[i], now); }
        }
        if (now - round >= 1) {
            watch_round(w, now, timeout);
            round = now;
        }
    }
    free(list);
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// Start and end

// From here on the ranks, which have met (mta/ranks_start.h), watch each other.
static inline void watch_start(Watch* w) {
    int on = 1;
    for (int i = 0; i < w->size; i++) {
        w->peers[i].heard = w->peers[i].alive = w->peers[i].moved = seconds_now();
        if (w->peers[i].fd >= 0) { setsockopt(w->peers[i].fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); }
    }
    // Signals are for the main thread.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&w->thread, NULL, watch_thread, w)) { die("ranks: no thread to watch the others"); }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

// Goodbye is said when nobody here watches any more: who hears it closes the connection, which is no loss then.
static inline void watch_stop(Watch* w) {
    pthread_mutex_lock(&w->lock);
    w->over = true;
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    watch_send_all(w, WATCH_BYE, 0);
    watch_drain(w);
}

#endif
