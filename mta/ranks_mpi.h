// mta/ranks_mpi.h: MPI as what carries messages between the ranks of the CPU trainer: `make train_mta MPI=1`, with
// -DMTA_MPI. Only MPI_Isend, MPI_Irecv and MPI_Testall once it has started: no call waits, so that a wait can be given
// up, and so that waiting ranks leave the cores to others.
#ifndef MTA_RANKS_MPI_H
#define MTA_RANKS_MPI_H

#include "ranks.h"

#ifdef MTA_MPI
#include <mpi.h>

enum { MPI_PIECE = 1 << 28 };  // bytes of a message: MPI counts them in an int

typedef struct {
    MPI_Request* requests;
    MPI_Status* statuses;
    int n, cap;
} MpiState;

static inline void mpi_check(int status, const char* what) {
    if (status != MPI_SUCCESS) { die("MPI: %s failed with %d", what, status); }
}

static inline void mpi_start(void* state, const RanksMessage* list, int n) {
    MpiState* s = (MpiState*)state;
    s->n = 0;
    for (int i = 0; i < n; i++) {
        for (size_t from = 0; from < list[i].bytes; from += MPI_PIECE) {
            size_t left = list[i].bytes - from;
            int bytes = (int)(left < MPI_PIECE ? left : MPI_PIECE);
            char* data = (char*)list[i].data + from;
            if (s->n == s->cap) {
                s->cap = s->cap ? 2 * s->cap : 64;
                s->requests = (MPI_Request*)realloc(s->requests, (size_t)s->cap * sizeof *s->requests);
                s->statuses = (MPI_Status*)realloc(s->statuses, (size_t)s->cap * sizeof *s->statuses);
                if (!s->requests || !s->statuses) { die("out of memory: %d messages", s->cap); }
            }
            MPI_Request* request = &s->requests[s->n++];
            mpi_check(list[i].receive ? MPI_Irecv(data, bytes, MPI_BYTE, list[i].peer, 0, MPI_COMM_WORLD, request)
                                      : MPI_Isend(data, bytes, MPI_BYTE, list[i].peer, 0, MPI_COMM_WORLD, request),
                      "a message");
        }
    }
}

static inline bool mpi_done(void* state) {
    MpiState* s = (MpiState*)state;
    int done = 0;
    mpi_check(MPI_Testall(s->n, s->requests, &done, s->statuses), "MPI_Testall");
    return done;
}

static inline void mpi_close(void* state) {
    MpiState* s = (MpiState*)state;
    free(s->requests);
    free(s->statuses);
    MPI_Finalize();
}

static inline void ranks_open_mpi(Ranks* r, const Launch* launch) {
    static const RanksBackend backend = {mpi_start, mpi_done, mpi_done, mpi_close, NULL, NULL, NULL};
    const StartMistake none = {0, {{0}}};
    StartAddress address;
    int provided = 0;
    memset(&address, 0, sizeof address);
    mpi_check(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided), "MPI_Init");
    mpi_check(MPI_Comm_rank(MPI_COMM_WORLD, &r->rank), "MPI_Comm_rank");
    mpi_check(MPI_Comm_size(MPI_COMM_WORLD, &r->size), "MPI_Comm_size");
    r->backend = &backend;
    r->state = alloc_or_die(1, sizeof(MpiState), "MPI's messages");
    if (r->size != launch->size) {
        ranks_yield_to_first(launch->rank);
        die("%s started %d processes, but MPI sees %d: wanted the launcher of the MPI that the program was built with",
            launch->launcher, launch->size, r->size);
    }
    ranks_join(r, &address, "", &none, NULL, 0);
    ranks_quiet(r);
}

static inline Ranks* ranks_of_mpi(void) { return ranks_of(ranks_open_mpi, NULL); }
#else
static inline Ranks* ranks_of_mpi(void) {
    return ranks_of(NULL, "`make train_mta MPI=1` builds a CPU trainer for several");
}
#endif

#endif
