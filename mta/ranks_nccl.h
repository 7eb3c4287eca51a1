// mta/ranks_nccl.h: NCCL carries the messages between the ranks of the CUDA trainer, which have one GPU each. It is
// compiled with -DMTA_NCCL, where nccl.h was found. The CUDA trainer does not link MPI: ranks find each other by the
// launcher's environment and a meeting at rank 0 (mta/ranks_start.h).
//
// There is one communicator. It never blocks and has a stream of its own. A rank that waits asks again and again
// whether the stream is done and whether NCCL has failed, so the watch can end any wait. Data in the host's memory is
// copied through a buffer on the GPU (the stage). Before it sends, the stream waits by an event for all work that the
// trainer's stream has been given so far. It does not wait for later work, so gradients are sent and added up in this
// stream while the backward pass goes on. The other direction needs no event: the host gives the trainer's stream work
// that reads the sums only after it has seen that this stream is done.
//
// NCCL's number of a rank is its place (ranks_place), so that gathered parts are in the order of their owners.
#ifndef MTA_RANKS_NCCL_H
#define MTA_RANKS_NCCL_H

#include "ranks.h"

#include "ranks_start.h"

#ifdef MTA_NCCL
#include <cuda_runtime.h>
#include <nccl.h>

enum { EXIT_NCCL = 70 };  // as where a CUDA call fails
static const struct timespec NCCL_NAP = {0, 1000000};

typedef struct {
    Ranks* ranks;
    ncclComm_t comm;
    cudaStream_t stream;
    cudaEvent_t ready;  // the trainer's stream has come to where its results are sent
    char* stage;        // (stage_bytes) on the GPU
    size_t stage_bytes;
    RanksMessage* later;  // (n_later) what has been received into the stage, in this order, for the host's memory
    size_t* staged;       // where
    int n_later, room;
} NcclState;

// ---------------------------------------------------------------------------------------------------------------------
// Failures

// NCCL cannot be used any more: all ranks end. Where the cause is another rank, the watch tells. Until all have met,
// what one finds is mostly found by all: rank 0 tells, and by that ends the others.
__attribute__((noreturn)) static inline void nccl_fail(Ranks* r, const char* what, const char* call, bool another) {
    unsigned left = another ? 2 * WATCH_SILENCE : !r->met && r->rank ? 2 : 0;
    while (left) { left = sleep(left); }  // a signal ends a sleep
    ranks_speak(r);
    fprintf(stderr, "%s: %s, in %.*s\n", program_invocation_short_name, what, (int)strcspn(call, "("), call);
    fflush(NULL);
    watch_end(&r->watch, EXIT_NCCL);
    _exit(EXIT_NCCL);
}
static inline void nccl_check(Ranks* r, ncclResult_t status, const char* call) {
    if (status == ncclSuccess || status == ncclInProgress) { return; }
    nccl_fail(r, ncclGetErrorString(status), call, status == ncclRemoteError);
}
static inline void nccl_cuda_check(Ranks* r, cudaError_t status, const char* call) {
    if (status != cudaSuccess) { nccl_fail(r, cudaGetErrorString(status), call, false); }
}
#define ncclCheck(r, call) nccl_check(r, call, #call)
#define ncclCudaCheck(r, call) nccl_cuda_check(r, call, #call)

// Is NCCL still busy with what it was asked for? What it has been given is on the stream once it is not. What fails
// once all are connected is mostly the work of a lost rank, whatever NCCL calls it.
static inline bool nccl_busy(NcclState* s) {
    Ranks* r = s->ranks;
    ncclResult_t status = ncclInProgress;
    ncclCheck(r, ncclCommGetAsyncError(s->comm, &status));
    if (status != ncclSuccess && status != ncclInProgress) {
        nccl_fail(r, ncclGetErrorString(status), "what goes on between ranks", r->backend || status == ncclRemoteError);
    }
    return status == ncclInProgress;
}

// ---------------------------------------------------------------------------------------------------------------------
// The backend

static inline bool nccl_on_gpu(Ranks* r, const void* data) {
    struct cudaPointerAttributes a;
    ncclCudaCheck(r, cudaPointerGetAttributes(&a, data));
    return a.type == cudaMemoryTypeDevice;
}

// What is sent from now on is what the trainer's stream has computed when it comes to here.
static inline void nccl_follow(NcclState* s) {
    Ranks* r = s->ranks;
    if (!r->work) { return; }
    ncclCudaCheck(r, cudaEventRecord(s->ready, (cudaStream_t)r->work));
    ncclCudaCheck(r, cudaStreamWaitEvent(s->stream, s->ready, 0));
}

// Does message i send what the one before it sends? Then the stage holds it once.
static inline bool nccl_again(const RanksMessage* list, int i) {
    return i && !list[i].receive && !list[i - 1].receive && list[i].data == list[i - 1].data &&
           list[i].bytes == list[i - 1].bytes;
}

// Room for a list's messages of host memory, in the stage and in the notes. Nothing is on the way.
static inline void nccl_make_room(NcclState* s, const RanksMessage* list, int n) {
    size_t bytes = 0;
    for (int i = 0; i < n; i++) {
        bool none = nccl_again(list, i) || nccl_on_gpu(s->ranks, list[i].data);
        bytes += none ? 0 : (list[i].bytes + 255) / 256 * 256;
    }
    if (bytes > s->stage_bytes) {
        ncclCudaCheck(s->ranks, cudaFree(s->stage));
        ncclCudaCheck(s->ranks, cudaMalloc((void**)&s->stage, bytes));
        s->stage_bytes = bytes;
    }
    s->n_later = 0;
    if (n <= s->room) { return; }
    free(s->later);
    free(s->staged);
    s->room = 2 * n;
    s->later = (RanksMessage*)alloc_or_die((size_t)s->room, sizeof *s->later, "messages");
    s->staged = (size_t*)alloc_or_die((size_t)s->room, sizeof *s->staged, "messages");
}

static inline void nccl_start(void* state, const RanksMessage* list, int n) {
    NcclState* s = (NcclState*)state;
    Ranks* r = s->ranks;
    size_t end = 0, at = 0;  // of the stage; where this message is, or the one before
    nccl_make_room(s, list, n);
    nccl_follow(s);
    ncclCheck(r, ncclGroupStart());
    for (int i = 0; i < n; i++) {
        const RanksMessage* m = &list[i];
        bool host = !nccl_on_gpu(r, m->data), again = nccl_again(list, i);
        if (host && !again) {
            at = end;
            end += (m->bytes + 255) / 256 * 256;
        }
        char* data = host ? s->stage + at : (char*)m->data;
        if (m->receive) {
            ncclCheck(r, ncclRecv(data, m->bytes, ncclInt8, ranks_place(r, m->peer), s->comm, s->stream));
            if (host) { s->staged[s->n_later] = at, s->later[s->n_later++] = *m; }
            continue;
        }
        if (host && !again) {
            ncclCudaCheck(r, cudaMemcpyAsync(data, m->data, m->bytes, cudaMemcpyHostToDevice, s->stream));
        }
        ncclCheck(r, ncclSend(data, m->bytes, ncclInt8, ranks_place(r, m->peer), s->comm, s->stream));
    }
    ncclCheck(r, ncclGroupEnd());
}

static inline bool nccl_taken(void* state) { return !nccl_busy((NcclState*)state); }

// A copy into the host's memory waits for its stream: it is made when there is nothing left to wait for.
static inline bool nccl_done(void* state) {
    NcclState* s = (NcclState*)state;
    if (nccl_busy(s)) { return false; }
    cudaError_t status = cudaStreamQuery(s->stream);
    if (status == cudaErrorNotReady) {
        cudaGetLastError();
        return false;
    }
    nccl_cuda_check(s->ranks, status, "cudaStreamQuery(s->stream)");
    for (int i = 0; i < s->n_later; i++) {
        const RanksMessage* m = &s->later[i];
        ncclCudaCheck(s->ranks,
                      cudaMemcpyAsync(m->data, s->stage + s->staged[i], m->bytes, cudaMemcpyDeviceToHost, s->stream));
    }
    if (s->n_later) { ncclCudaCheck(s->ranks, cudaStreamSynchronize(s->stream)); }
    s->n_later = 0;
    return true;
}

static inline bool nccl_computes(void* state) {
    NcclState* s = (NcclState*)state;
    cudaError_t status = cudaEventQuery(s->ready);
    if (status != cudaErrorNotReady) {
        nccl_cuda_check(s->ranks, status, "cudaEventQuery(s->ready)");
        return false;
    }
    cudaGetLastError();
    return true;
}

static inline void nccl_gather(void* state, void* data, size_t bytes) {
    NcclState* s = (NcclState*)state;
    const char* own = (char*)data + (size_t)ranks_place(s->ranks, s->ranks->rank) * bytes;
    nccl_follow(s);
    ncclCheck(s->ranks, ncclAllGather(own, data, bytes, ncclInt8, s->comm, s->stream));
}

static inline void nccl_reduce(void* state, float* data, size_t n) {
    NcclState* s = (NcclState*)state;
    float* own = data + (size_t)ranks_place(s->ranks, s->ranks->rank) * n;
    nccl_follow(s);
    ncclCheck(s->ranks, ncclReduceScatter(data, own, n, ncclFloat32, ncclSum, s->comm, s->stream));
}

// All is delivered here, but a network may still carry what others wait for: NCCL is told to finish, not to stop.
// Nobody watches any more, so that this does not wait for ever.
static inline void nccl_close(void* state) {
    NcclState* s = (NcclState*)state;
    double end = seconds_now() + WATCH_SILENCE;
    ncclCheck(s->ranks, ncclCommFinalize(s->comm));
    while (nccl_busy(s) && seconds_now() < end) { nanosleep(&NCCL_NAP, NULL); }
    ncclCheck(s->ranks, seconds_now() < end ? ncclCommDestroy(s->comm) : ncclCommAbort(s->comm));
    ncclCudaCheck(s->ranks, cudaEventDestroy(s->ready));
    ncclCudaCheck(s->ranks, cudaStreamDestroy(s->stream));
    ncclCudaCheck(s->ranks, cudaFree(s->stage));
    free(s->later);
    free(s->staged);
    free(s);
}

// ---------------------------------------------------------------------------------------------------------------------
// Start

// The communicator of all ranks, which have met: each waits for the others at most as long as they might to meet.
static inline void nccl_connect(NcclState* s, ncclUniqueId id) {
    Ranks* r = s->ranks;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    double end = seconds_now() + start_seconds(r->size);
    ncclCheck(r, ncclCommInitRankConfig(&s->comm, r->size, id, ranks_place(r, r->rank), &config));
    while (nccl_busy(s)) {
        if (seconds_now() > end) {
            nccl_fail(r, "the ranks did not all connect in time; NCCL_DEBUG=INFO tells more", "ncclCommInitRankConfig",
                      false);
        }
        nanosleep(&NCCL_NAP, NULL);
    }
}

// A stream whose work goes before the trainer's, so that what others wait for is not late.
static inline void nccl_make_stream(NcclState* s) {
    int least = 0, greatest = 0;
    ncclCudaCheck(s->ranks, cudaDeviceGetStreamPriorityRange(&least, &greatest));
    ncclCudaCheck(s->ranks, cudaStreamCreateWithPriority(&s->stream, cudaStreamNonBlocking, greatest));
    s->ranks->stream = s->stream;
    ncclCudaCheck(s->ranks, cudaEventCreateWithFlags(&s->ready, cudaEventDisableTiming));
}

// The GPU of this process becomes the current one; how it is named in `device`, so that no two ranks take the same.
static inline bool nccl_take_device(const Launch* launch, char* device, size_t n, Error* e) {
    int devices = 0, own = 0;
    cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess || !devices) {
        return fail(e, "no usable NVIDIA GPU (%s)", status ? cudaGetErrorString(status) : "none found");
    }
    if (!launch_device(launch, devices, &own, e)) { return false; }
    struct cudaDeviceProp p;
    status = cudaSetDevice(own);
    if (status == cudaSuccess) { status = cudaGetDeviceProperties(&p, own); }
    if (status != cudaSuccess) { return fail(e, "GPU %d: %s", own, cudaGetErrorString(status)); }
    for (size_t i = 0; i < sizeof p.uuid.bytes && 2 * i + 2 < n; i++) {
        snprintf(device + 2 * i, 3, "%02x", (unsigned char)p.uuid.bytes[i]);
    }
    return true;
}

// What this rank needs before all meet: a GPU, and on rank 0 NCCL's id. What is wrong with it.
static inline StartMistake nccl_prepare(const Launch* launch, char* device, size_t n, ncclUniqueId* id) {
    StartMistake mistake = {0, {{0}}};
    if (!nccl_take_device(launch, device, n, &mistake.why)) {
        mistake.status = 1;
        return mistake;
    }
    ncclResult_t made = launch->rank ? ncclSuccess : ncclGetUniqueId(id);
    if (made != ncclSuccess) {
        mistake.status = EXIT_NCCL;
        fail(&mistake.why, "%s, in ncclGetUniqueId", ncclGetErrorString(made));
    }
    return mistake;
}

// NCCL connects at the first use of each way to communicate, and takes memory of the GPU for it, up to gigabytes: so
// all are used once, at the sizes that come later, since these decide how NCCL goes about it. Each pair first.
static inline void nccl_use_once(NcclState* s) {
    Ranks* r = s->ranks;
    size_t each = RANKS_ROOM / (size_t)r->size;
    float* room = NULL;
    ranks_total(r, 0);
    ncclCudaCheck(r, cudaMalloc((void**)&room, each * (size_t)r->size * sizeof(float)));
    nccl_gather(s, room, each * 2);  // as of weights in bf16
    ranks_wait(r, r->backend->done);
    nccl_reduce(s, room, each);
    ranks_wait(r, r->backend->done);
    ncclCudaCheck(r, cudaFree(room));
}

static inline void ranks_open_nccl(Ranks* r, const Launch* launch) {
    static const RanksBackend backend = {nccl_start,    nccl_done,   nccl_taken, nccl_close,
                                         nccl_computes, nccl_gather, nccl_reduce};
    NcclState* s = (NcclState*)alloc_or_die(1, sizeof(NcclState), "NCCL's messages");
    char device[64] = "";
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    r->rank = launch->rank, r->size = launch->size, r->state = s, s->ranks = r;
    StartAddress address = launch_address(launch);
    StartMistake mistake = nccl_prepare(launch, device, sizeof device, &id);
    r->watch.spins = true;
    ranks_join(r, &address, device, &mistake, &id, sizeof id);
    nccl_make_stream(s);
    nccl_connect(s, id);
    r->backend = &backend;
    nccl_use_once(s);  // before a model's memory is counted
    ranks_quiet(r);    // only now: what NCCL_DEBUG asks for goes to standard output, and most fails at the first use
}

static inline Ranks* ranks_of_nccl(void) { return ranks_of(ranks_open_nccl, NULL); }
#else
static inline Ranks* ranks_of_nccl(void) { return ranks_of(NULL, "it was built where nccl.h was not found"); }
#endif

#endif
