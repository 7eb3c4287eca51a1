// test_nccl.cpp: tests of dev/cuda_cpu/nccl.h, the stand-in for NCCL, on 1 to 4 processes; among them planted faults,
// each of which must be seen.
//   make build/test_nccl
#include <nccl.h>
#include "check.h"
#include <math.h>
#include <signal.h>
#include <sys/wait.h>

enum { LONG = 3 * cuda_cpu::NCCL_PIECE / (int)sizeof(float) + 77 };  // values of a message in several pieces

static __global__ void fill_kernel(float* x, int n, float value) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) { x[i] = value; }
}
static void fill(cudaStream_t s, float* x, int n, float value) {
    LAUNCH(fill_kernel, (unsigned)(n + 255) / 256, 256, 0, s, x, n, value);
}

// A process of a test.
struct Rank {
    int rank, size;
    ncclUniqueId id;
    ncclComm_t comm;
    cudaStream_t work, wire;
};

static bool planted = false;  // what is wrong now is meant to be
static void need(bool good, const Rank* r, const char* what) {
    if (good) { return; }
    if (planted) { _exit(1); }
    printf("rank %d of %d: %s\n", r->rank, r->size, what);
    fflush(stdout);
    _exit(1);
}

static void join(Rank* r, int blocking = 1) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = blocking;
    ncclResult_t e = ncclCommInitRankConfig(&r->comm, r->size, r->id, r->rank, &config), now = ncclInProgress;
    need(e == (blocking ? ncclSuccess : ncclInProgress), r, ncclGetErrorString(e));
    while (now == ncclInProgress) { need(ncclCommGetAsyncError(r->comm, &now) == ncclSuccess, r, "polling"); }
    need(now == ncclSuccess, r, ncclGetErrorString(now));
}

static float* floats(int n) {
    float* p = NULL;
    cudaMalloc(&p, (size_t)n * sizeof(float));
    return p;
}

// Runs body in `size` processes, each on its device. Checks that all end with status 0, but for those whose bit is in
// `odd`.
template <typename F> static void processes(const char* what, int size, unsigned odd, F body) {
    Rank r = {0, size, {}, NULL, NULL, NULL};
    pid_t pids[cuda_cpu::NCCL_RANKS];
    ncclGetUniqueId(&r.id);
    fflush(stdout);
    for (r.rank = 0; r.rank < size; r.rank++) {
        pids[r.rank] = fork();
        if (pids[r.rank]) { continue; }
        alarm(100);  // a hang is a failure
        setenv("CUDA_CPU_DEVICES", "4", 1);
        cudaSetDevice(r.rank);
        cudaStreamCreate(&r.work);
        cudaStreamCreateWithPriority(&r.wire, cudaStreamNonBlocking, -5);
        body(&r);
        _exit(0);
    }
    bool good = true;
    for (int p = 0; p < size; p++) {
        int status = 0;
        waitpid(pids[p], &status, 0);
        good = good && (odd >> p & 1 ? status != 0 : status == 0);
    }
    check(good, what);
}

// ---- operations

static float value_of(int rank, int i) { return (float)(rank * 1000 + i % 997); }

static void test_send_and_receive(Rank* r) {
    join(r);
    float *mine = floats(LONG), *theirs = floats(r->size * LONG), *small = floats(2 * r->size);
    for (int i = 0; i < LONG; i++) { mine[i] = value_of(r->rank, i); }
    for (int round = 0; round < 2; round++) {
        // Everybody to everybody, also to itself, a long message and then a short one.
        need(ncclGroupStart() == ncclSuccess, r, "a group");
        for (int p = 0; p < r->size; p++) {
            ncclSend(mine, LONG, ncclFloat32, p, r->comm, r->wire);
            ncclSend(mine + p, 2, ncclFloat32, p, r->comm, r->wire);
            ncclRecv(theirs + p * LONG, LONG, ncclFloat32, p, r->comm, r->wire);
            ncclRecv(small + 2 * p, 2, ncclFloat32, p, r->comm, r->wire);
            ncclSend(mine, 0, ncclFloat32, p, r->comm, r->wire);
        }
        need(ncclGroupEnd() == ncclSuccess, r, "its end");
        need(isnan(theirs[0]) || round, r, "a message is there before it was waited for");
        cudaStreamSynchronize(r->wire);
        for (int p = 0; p < r->size; p++) {
            need(small[2 * p] == value_of(p, r->rank) && small[2 * p + 1] == value_of(p, r->rank + 1), r, "short");
            for (int i = 0; i < LONG; i++) { need(theirs[p * LONG + i] == value_of(p, i), r, "long"); }
        }
    }
    need(ncclCommDestroy(r->comm) == ncclSuccess, r, "the end");
}

static void test_collectives(Rank* r) {
    join(r);
    int n = LONG;
    float *all = floats(r->size * n), *mine = floats(n);

    // Gather, from elsewhere and in place, one after the other.
    for (int i = 0; i < n; i++) { mine[i] = value_of(r->rank, i); }
    need(ncclAllGather(mine, all, (size_t)n, ncclFloat32, r->comm, r->wire) == ncclSuccess, r, "gather");
    float* place = floats(r->size * n);
    for (int i = 0; i < n; i++) { place[r->rank * n + i] = value_of(r->rank, i); }
    ncclAllGather(place + r->rank * n, place, (size_t)n, ncclFloat32, r->comm, r->wire);
    cudaStreamSynchronize(r->wire);
    for (int i = 0; i < r->size * n; i++) {
        need(all[i] == value_of(i / n, i % n) && place[i] == all[i], r, "gathered");
    }

    // The sum in place.
    float* own = all + r->rank * n;
    ncclReduceScatter(all, own, (size_t)n, ncclFloat32, ncclSum, r->comm, r->wire);
    cudaStreamSynchronize(r->wire);
    for (int i = 0; i < n; i++) { need(own[i] == (float)r->size * value_of(r->rank, i), r, "scattered sums"); }
    need(ncclReduceScatter(all, own, 1, ncclFloat32, ncclMax, r->comm, r->wire) == ncclInvalidArgument, r, "a maximum");
    need(ncclReduceScatter(all, own, 1, ncclInt8, ncclSum, r->comm, r->wire) == ncclInvalidArgument, r, "of bytes");
    ncclCommDestroy(r->comm);
}

// The sum of a part begins behind its rank and ends with it: no rank's own sum in the order of ranks is that of all.
static void test_ring_order(Rank* r) {
    const float terms[4] = {1e8f, 1.0f, -1e8f, 3.0f};
    float *x = floats(r->size), *z = floats(1), plain = terms[0];
    join(r);
    for (int p = 0; p < r->size; p++) { x[p] = terms[r->rank]; }
    ncclReduceScatter(x, z, 1, ncclFloat32, ncclSum, r->comm, r->wire);
    cudaStreamSynchronize(r->wire);
    int differ = 0;
    for (int p = 1; p < r->size; p++) { plain += terms[p]; }
    for (int part = 0; part < r->size; part++) {
        float sum = terms[(part + 1) % r->size];
        for (int i = 2; i <= r->size; i++) { sum += terms[(part + i) % r->size]; }
        need(part != r->rank || z[0] == sum, r, "the order of a ring");
        differ += sum != plain;
    }
    need(differ > 0, r, "an order that no other has");
    ncclCommDestroy(r->comm);
}

// Operations of one communicator in two streams, of which the second is waited for first.
static void test_two_streams(Rank* r) {
    join(r);
    float *a = floats(r->size * LONG), *b = floats(r->size * 1), *mine = floats(LONG), small = 10.0f + (float)r->rank;
    for (int i = 0; i < LONG; i++) { mine[i] = (float)r->rank; }
    ncclAllGather(mine, a, LONG, ncclFloat32, r->comm, r->work);
    ncclAllGather(&small, b, 1, ncclFloat32, r->comm, r->wire);
    cudaStreamSynchronize(r->rank % 2 ? r->wire : r->work);
    cudaDeviceSynchronize();
    for (int p = 0; p < r->size; p++) {
        need(a[p * LONG] == (float)p && a[p * LONG + LONG - 1] == (float)p && b[p] == (float)(10 + p), r,
             "their order");
    }
    ncclCommDestroy(r->comm);
}

// ---- late execution

// A gradient is computed in one stream and sent in another; what is received is used in the first. FAULT 1: no event
// before the sending; 2: none before the use.
template <int FAULT> static void test_missing_event(Rank* r) {
    join(r);
    int n = 500;
    float *mine = floats(n), *theirs = floats(n * r->size), *used = floats(n * r->size);
    cudaEvent_t computed, came;
    cudaEventCreateWithFlags(&computed, cudaEventDisableTiming);
    cudaEventCreateWithFlags(&came, cudaEventDisableTiming);
    for (int i = 0; i < n * r->size; i++) { theirs[i] = -1, mine[i % n] = -2; }
    fill(r->work, mine, n, (float)r->rank);
    cudaEventRecord(computed, r->work);
    if (FAULT != 1) { cudaStreamWaitEvent(r->wire, computed); }
    ncclAllGather(mine, theirs, (size_t)n, ncclFloat32, r->comm, r->wire);
    cudaEventRecord(came, r->wire);
    if (FAULT != 2) { cudaStreamWaitEvent(r->work, came); }
    cudaMemcpyAsync(used, theirs, (size_t)(n * r->size) * sizeof(float), cudaMemcpyDeviceToDevice, r->work);
    cudaStreamSynchronize(FAULT == 1 ? r->wire : r->work);
    const float* seen = FAULT == 1 ? theirs : used;
    for (int i = 0; i < n * r->size; i++) { need(seen[i] == (float)(i / n), r, "stale"); }
    cudaDeviceSynchronize();
    ncclCommDestroy(r->comm);
}

// Not blocking: what was called is in the stream when the polling says so, and no call before that is taken.
static void test_not_blocking(Rank* r) {
    float *x = floats(r->size), mine = (float)r->rank;
    ncclResult_t now = ncclInProgress;
    join(r, 0);
    need(ncclAllGather(&mine, x, 1, ncclFloat32, r->comm, r->wire) == ncclInProgress, r, "it is in progress");
    need(ncclAllGather(&mine, x, 1, ncclFloat32, r->comm, r->wire) == ncclInvalidArgument, r, "a call too early");
    cudaStreamSynchronize(r->wire);
    need(isnan(x[0]), r, "planted: a stream that is waited for too early has nothing in it");
    int asked = 0;
    for (; now == ncclInProgress; asked++) { ncclCommGetAsyncError(r->comm, &now); }
    need(now == ncclSuccess && asked > 1, r, "it is in the stream, though not at once");
    cudaError_t state = cudaErrorNotReady;
    for (int polls = 0; state == cudaErrorNotReady; polls++) { state = cudaStreamQuery(r->wire); }
    for (int p = 0; p < r->size; p++) { need(state == cudaSuccess && x[p] == (float)p, r, "and comes by polling"); }
    ncclCommDestroy(r->comm);
}

// ---- what goes wrong

// Rank 1 is killed in the middle of a long message: the others learn it by polling, and go on after the abort.
static void test_killed(Rank* r) {
    float* x = floats(r->size * LONG);
    ncclResult_t now = ncclSuccess;
    join(r);
    if (r->rank == 1) {
        ncclAllGather(x, x, 10, ncclFloat32, r->comm, r->wire);
        cudaStreamSynchronize(r->wire);
        raise(SIGKILL);
    }
    ncclAllGather(x, x, 10, ncclFloat32, r->comm, r->wire);
    ncclAllGather(x, x, LONG, ncclFloat32, r->comm, r->wire);
    while (now == ncclSuccess && cudaStreamQuery(r->wire) != cudaSuccess) { ncclCommGetAsyncError(r->comm, &now); }
    need(now == ncclRemoteError, r, "a process is gone");
    need(!strcmp(ncclGetErrorString(now), "remote process exited or there was a network error"), r, "in NCCL's words");
    need(*ncclGetLastError(r->comm), r, "and ours");
    need(ncclSend(x, 1, ncclFloat32, 0, r->comm, r->wire) == ncclRemoteError, r, "a call after that");
    need(ncclCommAbort(r->comm) == ncclSuccess && cudaStreamSynchronize(r->wire) == cudaSuccess, r, "the abort");
    need(ncclSend(x, 1, ncclFloat32, 0, r->comm, r->wire) == ncclInvalidArgument, r, "a call after the abort");
}

static void test_killed_early(Rank* r) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclResult_t now = ncclInProgress;
    config.blocking = 0;
    ncclCommInitRankConfig(&r->comm, r->size + 1, r->id, r->rank, &config);  // one never comes
    if (r->rank == 1) { raise(SIGKILL); }
    while (now == ncclInProgress) { ncclCommGetAsyncError(r->comm, &now); }
    need(now == ncclRemoteError, r, "a process is gone before all are there");
}

static void test_planted(Rank* r) {
    float x = 1;
    join(r);
    setenv("CUDA_CPU_FAIL", "ncclSend:2", 1);
    need(ncclSend(&x, 1, ncclFloat32, r->rank, r->comm, r->wire) == ncclSuccess, r, "the first");
    ncclGroupStart();
    need(ncclRecv(&x, 1, ncclFloat32, r->rank, r->comm, r->wire) == ncclSuccess, r, "another function");
    need(ncclSend(&x, 1, ncclFloat32, r->rank, r->comm, r->wire) == ncclSystemError, r, "the second");
    need(ncclGroupEnd() == ncclSystemError, r, "its group");
    ncclCommAbort(r->comm);
}

// Sizes that differ, of which the receiver tells.
static void test_memory(Rank* r) {
    size_t before = 0, after = 0, total = 0;
    join(r);
    float* x = floats(r->size);
    auto gather = [=] { return ncclAllGather(x + r->rank, x, 1, ncclFloat32, r->comm, r->wire); };
    cudaMemGetInfo(&before, &total);
    setenv("CUDA_CPU_MEMORY_MIB", "63", 1);
    need(gather() == ncclUnhandledCudaError, r, "a collective without memory");
    unsetenv("CUDA_CPU_MEMORY_MIB");
    need(gather() == ncclSuccess && gather() == ncclSuccess, r, "with memory");
    cudaStreamSynchronize(r->wire);
    cudaMemGetInfo(&after, &total);
    need(before - after == cuda_cpu::NCCL_BUFFERS && ncclCommAbort(r->comm) == ncclSuccess, r, "what the first takes");
    cudaMemGetInfo(&after, &total);
    need(before == after, r, "and gives back");
}
static void test_sizes(Rank* r) {
    float x[4] = {};
    join(r);
    if (r->rank == 0) {
        ncclSend(x, 3, ncclFloat32, 1, r->comm, r->wire);
    } else {
        if (!freopen("/dev/null", "w", stderr)) { return; }
        ncclRecv(x, 4, ncclFloat32, 0, r->comm, r->wire);
    }
    cudaStreamSynchronize(r->wire);
}

static void test_one_device(Rank* r) {
    cudaSetDevice(0);
    ncclResult_t e = ncclCommInitRank(&r->comm, r->size, r->id, r->rank);
    need(e == ncclInvalidUsage && strstr(ncclGetLastError(r->comm), "Duplicate GPU"), r, "two ranks on one device");
}
static void test_one_rank(Rank* r) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclCommInitRankConfig(&r->comm, 2, r->id, 0, &config);
    need(ncclCommInitRank(&r->comm, 2, r->id, 0) == ncclInvalidUsage, r, "a rank twice");
    need(ncclCommInitRank(&r->comm, 3, r->id, 1) == ncclInvalidUsage, r, "another number of ranks");
    need(ncclCommInitRank(&r->comm, 2, r->id, 2) == ncclInvalidArgument, r, "a rank that there is not");
}
static void test_streams(Rank* r) {
    float x = 1;
    cudaStream_t other;
    cudaGraph_t graph;
    join(r);
    cudaStreamBeginCapture(r->work, cudaStreamCaptureModeRelaxed);
    need(ncclSend(&x, 1, ncclFloat32, 0, r->comm, r->work) == ncclInvalidUsage, r, "a captured stream");
    cudaStreamEndCapture(r->work, &graph);
    cudaSetDevice(3);
    cudaStreamCreate(&other);
    need(ncclSend(&x, 1, ncclFloat32, 0, r->comm, r->work) == ncclInvalidUsage, r, "another device");
    cudaSetDevice(r->rank);
    need(ncclSend(&x, 1, ncclFloat32, 0, r->comm, other) == ncclInvalidUsage, r, "another device's stream");
    need(ncclSend(&x, 1, ncclFloat32, 1, r->comm, r->work) == ncclInvalidArgument, r, "a rank that is not");
    need(ncclGroupEnd() == ncclInvalidUsage, r, "the end of no group");
    ncclCommAbort(r->comm);
}

int main() {
    char what[80];
    for (int size = 1; size <= 4; size++) {
        snprintf(what, sizeof what, "messages, %d processes", size);
        processes(what, size, 0, test_send_and_receive);
        snprintf(what, sizeof what, "collectives, %d processes", size);
        processes(what, size, 0, test_collectives);
        snprintf(what, sizeof what, "late, with events, %d processes", size);
        processes(what, size, 0, test_missing_event<0>);
    }
    processes("sums in the order of a ring", 4, 0, test_ring_order);
    processes("two streams", 3, 0, test_two_streams);
    processes("not blocking", 3, 0, test_not_blocking);
    processes("a process that was not there at the start", 3, 2, test_killed_early);
    processes("a killed process is seen", 3, 2, test_killed);
    processes("two ranks on one device", 2, 0, test_one_device);
    processes("ranks that do not fit together", 1, 0, test_one_rank);
    processes("streams that are not its own", 1, 0, test_streams);
    processes("the first collective takes memory", 2, 0, test_memory);
    processes("planted: a call that fails", 1, 0, test_planted);
    processes("planted: sizes that differ", 2, 2, test_sizes);
    planted = true;
    processes("planted: no event before the sending", 2, 3, test_missing_event<1>);
    processes("planted: no event before the use", 2, 3, test_missing_event<2>);
    return test_verdict();
}
