// nccl.h: stand-in for NCCL: processes of this machine over shared memory. An operation waits in its stream as a kernel
// does and is worked off late, when somebody waits for the stream or asks it twice, piece by piece as far as the other
// processes are. Sums are added in the order of a ring, so that code which relies on an order fails.
//
// What the real library allows itself, this one does: a communicator with blocking = 0 answers ncclInProgress, and what
// was called is in the stream only when ncclCommGetAsyncError has been asked until it no longer says so; another call
// before that is refused. The first collective of a communicator takes memory of the device (NCCL_BUFFERS), since then
// NCCL connects for it. A process that is gone shows as ncclRemoteError there, and what waits for it hangs until
// ncclCommAbort. Sent and received sizes that differ, which hang or worse, end the program with a line.
// CUDA_CPU_FAIL=ncclSend:N: the N-th call of a function fails, as in cuda_runtime.h; CUDA_CPU_HANG=ncclSend:N: what it
// is to do is never done.
#ifndef CUDA_CPU_NCCL_H
#define CUDA_CPU_NCCL_H
#include <cuda_runtime.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <atomic>
#include <string>

#define NCCL_CONFIG_INITIALIZER \
    { sizeof(ncclConfig_t), 0xcafebeef, INT_MIN }

typedef enum {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7
} ncclResult_t;
typedef enum { ncclSum = 0, ncclMax = 2 } ncclRedOp_t;
typedef enum { ncclInt8 = 0, ncclFloat32 = 7 } ncclDataType_t;
typedef struct {
    char internal[128];
} ncclUniqueId;
typedef struct {
    size_t size;
    unsigned magic;
    int blocking;
} ncclConfig_t;

namespace cuda_cpu {
enum { NCCL_RANKS = 8, NCCL_PIECE = 1 << 16 };  // processes at most; bytes of a message that are under way at a time
enum { NCCL_BUFFERS = 64 << 20 };

// A piece of a message from one process to another.
struct Box {
    std::atomic<uint32_t> bytes;  // 0 = empty
    uint64_t of;                  // of the whole message
    char data[NCCL_PIECE];
};
// What the processes share. A process is there if its device is, and lives as long as it locks the byte of its rank.
struct Meeting {
    std::atomic<int> size, device[NCCL_RANKS];  // 1 and up
    Box boxes[NCCL_RANKS][NCCL_RANKS];          // from, to
};

struct Transfer {
    bool receive;
    char* data;
    size_t bytes, at;
    int peer;
};
// A group of calls, of one communicator in one stream: all of its transfers go on at the same time.
struct Operation {
    Stream* stream;
    std::vector<Transfer> transfers;
    std::vector<std::function<void()>> after;  // what is computed when all has come
    std::shared_ptr<Operation> before;         // the communicator's last one before it, whatever its stream
    bool done, hangs;
};
}  // namespace cuda_cpu

struct ncclComm {
    int rank, size, device, fd;
    bool blocking, met, asked, gone;  // gone: destroyed or aborted
    size_t buffers;                   // bytes of the device's memory that it has taken
    cuda_cpu::Meeting* meeting;
    ncclResult_t error;
    std::string text;                                             // of the error
    std::vector<std::shared_ptr<cuda_cpu::Operation>> collected;  // by calls since ncclGroupStart
    std::vector<std::shared_ptr<cuda_cpu::Operation>> pending;    // not yet in their streams
    std::shared_ptr<cuda_cpu::Operation> last;                    // in its stream
};
typedef struct ncclComm* ncclComm_t;

namespace cuda_cpu {
inline std::vector<ncclComm_t> comms;  // also those that are gone: their work may be in a stream still
inline int group_depth = 0;
inline ncclResult_t group_error = ncclSuccess;

inline size_t type_size(ncclDataType_t t) { return t == ncclInt8 ? 1 : sizeof(float); }
inline ncclResult_t nccl_fail(ncclComm_t c, ncclResult_t error, const char* text) {
    if (c->error == ncclSuccess) { c->error = error, c->text = text; }
    return error;
}

// Whether a process that was there still is.
inline bool alive(const ncclComm* c, int rank) {
    struct flock lock = {F_WRLCK, SEEK_SET, rank, 1, 0};
    return rank == c->rank || fcntl(c->fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

// Moves the next piece, if it can be moved.
inline bool move_piece(ncclComm_t c, Transfer* t) {
    Box* box = t->receive ? &c->meeting->boxes[t->peer][c->rank] : &c->meeting->boxes[c->rank][t->peer];
    size_t n = std::min(t->bytes - t->at, (size_t)NCCL_PIECE);
    bool full = box->bytes.load(std::memory_order_acquire) != 0;
    if (t->receive != full) { return false; }
    if (t->receive) {
        if (box->of != t->bytes) {
            fprintf(stderr, "cuda_cpu: nccl: rank %d sends %zu bytes, rank %d receives %zu\n", t->peer, (size_t)box->of,
                    c->rank, t->bytes);
            abort();
        }
        memcpy(t->data + t->at, box->data, n);
        box->bytes.store(0, std::memory_order_release);
    } else {
        memcpy(box->data, t->data + t->at, n);
        box->of = t->bytes;
        box->bytes.store((uint32_t)n, std::memory_order_release);
    }
    t->at += n;
    return true;
}

// Goes on with an operation; false: it is not done. Between two processes messages are in the order of the calls.
inline bool step(ncclComm_t c, Operation* o) {
    if (c->gone || o->done) { return o->done = true; }
    if (c->error != ncclSuccess || o->hangs) { return false; }
    if (o->before && !o->before->done) { advance(o->before->stream); }
    if (o->before && !o->before->done) { return false; }
    o->before = NULL;
    for (bool lost[NCCL_RANKS] = {}, again = true; again;) {
        bool waits[2][NCCL_RANKS] = {};
        size_t left = 0;
        again = false;
        for (Transfer& t : o->transfers) {
            if (t.at == t.bytes) { continue; }
            if (!waits[t.receive][t.peer]) { again = move_piece(c, &t) || again; }
            waits[t.receive][t.peer] = waits[t.receive][t.peer] || t.at < t.bytes;
            left += t.at < t.bytes;
        }
        if (!left) {
            for (auto& work : o->after) { work(); }
            return o->done = true;
        }

        // A process that is gone may have sent what is waited for: it is looked for once more.
        for (int p = 0; p < c->size && !again; p++) {
            if ((!waits[0][p] && !waits[1][p]) || alive(c, p)) { continue; }
            if (lost[p]) {
                nccl_fail(c, ncclRemoteError, "a process of the communicator is gone");
                return false;
            }
            lost[p] = again = true;
        }
    }
    return false;
}

// All processes are there, each on a device of its own.
inline ncclResult_t meet(ncclComm_t c) {
    int there = 0, gone = 0;
    for (int p = 0; p < c->size; p++) {
        int device = c->meeting->device[p];
        if (p != c->rank && device == c->device + 1) {
            return nccl_fail(c, ncclInvalidUsage, "Duplicate GPU detected: two ranks on one device");
        }
        there += device != 0;
        gone += device != 0 && !alive(c, p);
    }
    c->met = there == c->size;
    if (c->met) { return ncclSuccess; }
    return gone ? nccl_fail(c, ncclRemoteError, "a process was gone before all were there") : ncclInProgress;
}

inline void enqueue(ncclComm_t c) {
    for (auto& o : c->pending) {
        o->before = c->last;
        c->last = o;
        submit_work(o->stream, [c, o] { return step(c, o.get()); });
    }
    c->pending.clear();
}

// The operation of a group that a call adds to; outside of a group it is one of its own.
inline Operation* operation_of(ncclComm_t c, Stream* stream) {
    for (auto& o : c->collected) {
        if (o->stream == stream) { return o.get(); }
    }
    c->collected.push_back(std::make_shared<Operation>(Operation{stream, {}, {}, NULL, false, false}));
    return c->collected.back().get();
}

inline ncclResult_t end_group(void) {
    ncclResult_t error = group_error;
    group_error = ncclSuccess;
    for (ncclComm_t c : comms) {
        if (c->collected.empty()) { continue; }
        if (error == ncclSuccess || error == ncclInProgress) {
            c->pending.swap(c->collected);
            c->asked = false;
            if (c->blocking) { enqueue(c); }
            error = c->blocking ? error : ncclInProgress;
        }
        c->collected.clear();
    }
    return error;
}

// Has the communicator the memory for this call? A collective's is taken by the first one.
inline bool connected(const char* name, ncclComm_t c) {
    if (!strcmp(name, "ncclSend") || !strcmp(name, "ncclRecv") || c->buffers) { return true; }
    if (memory_total() < allocated + NCCL_BUFFERS) { return false; }
    allocated += c->buffers = NCCL_BUFFERS;
    return true;
}

// What every call that communicates begins with, and ends with (add: what it adds to an operation).
template <typename F>
inline ncclResult_t communicate(const char* name, ncclComm_t c, int peer, size_t count, ncclDataType_t type,
                                Stream* stream, F&& add) {
    ncclResult_t error = ncclSuccess;
    if (planted_failure(name)) {
        error = ncclSystemError;
    } else if (!c || c->gone || !c->met || !c->pending.empty() || peer < 0 || peer >= c->size ||
               (type != ncclInt8 && type != ncclFloat32)) {
        error = ncclInvalidArgument;  // among them: a call before the last one had its answer
    } else if (c->error != ncclSuccess) {
        error = c->error;
    } else if ((stream && (stream->capture || stream->device != c->device)) || c->device != device) {
        error = ncclInvalidUsage;  // the real library can be captured; hangs are reported of it
    } else if (count && !connected(name, c)) {
        error = ncclUnhandledCudaError;
    } else if (count) {
        Operation* o = operation_of(c, stream);
        o->hangs = planted_hang(name) || o->hangs;
        add(o);
    }
    if (group_depth > 0) {
        if (group_error == ncclSuccess) { group_error = error; }
        return error;
    }
    return error == ncclSuccess ? end_group() : error;
}

// out (n) = the sum of the processes' parts, begun by the one after `last` and ended by it, as a ring does it.
inline void ring_sum(float* out, const std::vector<const float*>& parts, size_t n, int last) {
    size_t ranks = parts.size(), first = (size_t)(last + 1) % ranks;
    std::vector<float> sum(parts[first], parts[first] + n);
    for (size_t p = 1; p < ranks; p++) {
        for (size_t i = 0; i < n; i++) { sum[i] += parts[(first + p) % ranks][i]; }
    }
    std::copy(sum.begin(), sum.end(), out);
}
}  // namespace cuda_cpu

static inline const char* ncclGetErrorString(ncclResult_t e) {
    switch (e) {
        case ncclSuccess: return "no error";
        case ncclUnhandledCudaError: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
        case ncclSystemError: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
        case ncclInternalError: return "internal error - please report this issue to the NCCL developers";
        case ncclInvalidArgument: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
        case ncclInvalidUsage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        case ncclRemoteError: return "remote process exited or there was a network error";
        case ncclInProgress: return "NCCL operation in progress";
        default: return "unknown result code";
    }
}
static inline const char* ncclGetLastError(ncclComm_t c) { return c ? c->text.c_str() : ""; }

// The id says where the process that made it keeps the shared memory: nothing is left behind, however all end.
static inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    if (cuda_cpu::planted_failure(__func__)) { return ncclSystemError; }
    int fd = memfd_create("nccl", MFD_CLOEXEC);
    if (fd < 0) { return ncclSystemError; }
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/proc/%d/fd/%d", (int)getpid(), fd);
    return ncclSuccess;
}

static inline ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t* error) {
    if (!c || c->gone) { return ncclInvalidArgument; }
    *error = c->error;
    if (c->error == ncclSuccess && !c->met) {
        *error = cuda_cpu::meet(c);
    } else if (c->error == ncclSuccess && !c->pending.empty()) {
        *error = ncclInProgress;
        if (c->asked) {
            cuda_cpu::enqueue(c);
            *error = ncclSuccess;
        }
        c->asked = true;  // the first answer is that it is under way
    }
    return ncclSuccess;
}
static inline ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                                  ncclConfig_t* config) {
    *comm = NULL;
    if (cuda_cpu::planted_failure(__func__)) { return ncclSystemError; }
    if (size < 1 || size > cuda_cpu::NCCL_RANKS || rank < 0 || rank >= size) { return ncclInvalidArgument; }
    if (config && config->magic != 0xcafebeef) { return ncclInvalidArgument; }
    int fd = open(id.internal, O_RDWR | O_CLOEXEC);
    if (fd < 0 || ftruncate(fd, sizeof(cuda_cpu::Meeting))) { return ncclSystemError; }
    void* shared = mmap(NULL, sizeof(cuda_cpu::Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct flock lock = {F_WRLCK, SEEK_SET, rank, 1, 0};
    if (shared == MAP_FAILED) { return ncclSystemError; }
    ncclComm_t c = *comm = new ncclComm;
    cuda_cpu::comms.push_back(c);
    c->rank = rank, c->size = size, c->device = cuda_cpu::device, c->fd = fd;
    c->blocking = !config || config->blocking != 0, c->met = c->asked = c->gone = false, c->buffers = 0;
    c->meeting = (cuda_cpu::Meeting*)shared, c->error = ncclSuccess;
    int other = 0;
    if (fcntl(fd, F_OFD_SETLK, &lock) || (!c->meeting->size.compare_exchange_strong(other, size) && other != size)) {
        return cuda_cpu::nccl_fail(c, ncclInvalidUsage, "a rank twice, or another number of ranks");
    }
    c->meeting->device[rank] = c->device + 1;
    if (!c->blocking) { return ncclInProgress; }
    cuda_cpu::wait_until([=] { return c->error != ncclSuccess || cuda_cpu::meet(c) != ncclInProgress; });
    return c->error;
}
static inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, size, id, rank, NULL);
}

// What is in streams still ends at once, whatever it has moved.
static inline ncclResult_t ncclCommAbort(ncclComm_t c) {
    if (!c || c->gone) { return ncclInvalidArgument; }
    c->gone = true;
    cuda_cpu::allocated -= c->buffers;
    c->collected.clear();
    c->pending.clear();
    munmap(c->meeting, sizeof(cuda_cpu::Meeting));
    close(c->fd);
    return ncclSuccess;
}
// Waits for what is in streams; the real one may do so after it has returned.
static inline ncclResult_t ncclCommFinalize(ncclComm_t c) {
    if (!c || c->gone) { return ncclInvalidArgument; }
    std::shared_ptr<cuda_cpu::Operation> last = c->last;
    if (last) {
        cuda_cpu::wait_until([&] { return last->done || c->error != ncclSuccess || cuda_cpu::advance(last->stream); });
    }
    return ncclSuccess;
}
static inline ncclResult_t ncclCommDestroy(ncclComm_t c) {
    ncclResult_t finished = ncclCommFinalize(c);
    return finished == ncclSuccess ? ncclCommAbort(c) : finished;
}

static inline ncclResult_t ncclGroupStart(void) {
    if (cuda_cpu::planted_failure(__func__)) { return ncclSystemError; }
    cuda_cpu::group_depth++;
    return ncclSuccess;
}
static inline ncclResult_t ncclGroupEnd(void) {
    if (cuda_cpu::group_depth == 0) { return ncclInvalidUsage; }
    if (cuda_cpu::planted_failure(__func__)) { cuda_cpu::group_error = ncclSystemError; }
    return --cuda_cpu::group_depth ? ncclSuccess : cuda_cpu::end_group();
}

static inline ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                                    cudaStream_t stream) {
    return cuda_cpu::communicate(__func__, c, peer, count, type, stream, [=](cuda_cpu::Operation* o) {
        o->transfers.push_back({false, (char*)from, count * cuda_cpu::type_size(type), 0, peer});
    });
}
static inline ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                                    cudaStream_t stream) {
    return cuda_cpu::communicate(__func__, c, peer, count, type, stream, [=](cuda_cpu::Operation* o) {
        o->transfers.push_back({true, (char*)to, count * cuda_cpu::type_size(type), 0, peer});
    });
}

// to (ranks, count) = every process's `from` (count); in place where that is its own part of it.
static inline ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t c,
                                         cudaStream_t stream) {
    return cuda_cpu::communicate(__func__, c, 0, count, type, stream, [=](cuda_cpu::Operation* o) {
        size_t bytes = count * cuda_cpu::type_size(type);
        for (int p = 0; p < c->size; p++) {
            if (p == c->rank) { continue; }
            o->transfers.push_back({false, (char*)from, bytes, 0, p});
            o->transfers.push_back({true, (char*)to + (size_t)p * bytes, bytes, 0, p});
        }
        o->after.push_back([=] { memmove((char*)to + (size_t)c->rank * bytes, from, bytes); });
    });
}

// to (count) = the sum of the processes' parts number `rank` of `from` (ranks, count).
static inline ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type,
                                             ncclRedOp_t op, ncclComm_t c, cudaStream_t stream) {
    if (op != ncclSum || type != ncclFloat32) { return ncclInvalidArgument; }
    return cuda_cpu::communicate(__func__, c, 0, count, type, stream, [=](cuda_cpu::Operation* o) {
        size_t bytes = count * sizeof(float);
        auto room = std::make_shared<std::vector<float>>((size_t)c->size * count);
        std::vector<const float*> parts;
        for (int p = 0; p < c->size; p++) {
            const float* given = (const float*)from + (size_t)p * count;
            float* taken = room->data() + (size_t)p * count;
            parts.push_back(p == c->rank ? given : taken);
            if (p == c->rank) { continue; }
            o->transfers.push_back({false, (char*)given, bytes, 0, p});
            o->transfers.push_back({true, (char*)taken, bytes, 0, p});
        }
        o->after.push_back([to, parts, count, c, room] {  // room: kept until then
            cuda_cpu::ring_sum((float*)to, parts, count, c->rank);
        });
    });
}
#endif
