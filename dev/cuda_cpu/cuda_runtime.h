// cuda_runtime.h: stand-in for the CUDA runtime. Device memory is malloc'ed, poisoned with NaN and counted against a
// pretended size; the default stream works at once, another only when somebody waits for it or asks it a second time,
// as late as a GPU may, and no further than it must: so that a missing event leaves stale data. What a copy or a memset
// is told of as device memory must lie in one allocation, as the host's in none. CUDA_CPU_EAGER=1: a stream of high
// priority works as early as it may, ahead of the others: so that what it should have waited for is missing. A captured
// stream keeps its work in a graph, and what may not be called meanwhile breaks the capture. CUDA_CPU_GUARD=1: the
// host's own code cannot read or write device memory, which is closed but while a stream works. The environment
// pretends other machines: CUDA_CPU_DEVICES=N (0: no GPU, default 1), CUDA_CPU_DRIVER=old,
// CUDA_CPU_MEMORY_MIB=N, CUDA_CPU_CAPABILITY=75, CUDA_CPU_SHARED_KIB=N (shared memory of a block at most),
// CUDA_CPU_GRAPH_NODE=N (bytes that a graph's node takes), CUDA_CPU_IMAGE=none or =invalid (no code for the device: the
// two answers of a runtime), CUDA_CPU_FULL=46 or =2 (other processes have the device for themselves, or its memory:
// what makes a context fails so); and failures: CUDA_CPU_FAIL=NAME:N, the N-th call of a function, the N-th launch of a
// kernel, or with launch:N the N-th of any. CUDA_CPU_HANG=NAME:N: that launch, or that cudaMemcpyAsync, never ends.
#ifndef CUDA_CPU_RUNTIME_H
#define CUDA_CPU_RUNTIME_H
#include "cuda_cpu.h"
#include <deque>
#include <memory>
#include <signal.h>
#include <time.h>
#include <typeinfo>
#include <unistd.h>

typedef enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevicePointer = 17,
    cudaErrorInsufficientDriver = 35,
    cudaErrorDevicesUnavailable = 46,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorCapturedEvent = 907,
    cudaErrorUnknown = 999
} cudaError_t;
typedef enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice } cudaMemcpyKind;
typedef enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 } cudaFuncAttribute;
typedef enum { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 } cudaDeviceAttr;
typedef enum {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
} cudaStreamCaptureMode;
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };

struct cudaUUID_t {
    char bytes[16];
};
struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;
    int major, minor;
};

namespace cuda_cpu {
typedef std::function<bool()> Work;  // false: it waits for another stream or process and is to be called again
typedef std::vector<Work> Graph;
struct Stream {
    Graph* capture;
    std::deque<Work> queue;
    int device;
    bool asked, busy;  // somebody has asked for the work of now; it is being worked off
    bool eager;        // works as soon as it may
    bool destroyed;    // and is forgotten when its work is done
};
// That an event was recorded: in a stream, done when its turn has come. Later records of the event are others.
struct Record {
    Stream* stream;
    bool asked, done;
    double seconds;
};
struct Event {
    std::shared_ptr<Record> last;
    bool captured, timed;
    int device;
};

inline std::map<void*, size_t> allocations;         // device memory: address -> bytes
inline std::map<const void*, size_t> shared_limit;  // kernel -> dynamic shared memory it was allowed
inline size_t allocated = 0;
inline cudaError_t last_error = cudaSuccess;
inline std::vector<Stream*> streams;  // those that were created, as if all with cudaStreamNonBlocking: the default
                                      // stream does not wait for them
inline bool capturing = false, capture_broken = false;  // of one stream at a time
inline int device = 0;                                  // the one that cudaSetDevice chose

inline cudaError_t set_error(cudaError_t e) {
    if (e != cudaSuccess) { last_error = e; }
    return e;
}
// Do n bytes lie in one allocation of the device?
inline bool on_device(const void* p, size_t n) {
    auto after = allocations.upper_bound((void*)p);
    if (after == allocations.begin()) { return false; }
    auto a = std::prev(after);
    return (const char*)p + n <= (const char*)a->first + a->second;
}
// Where device memory is guarded, every allocation has pages of its own, which are open only while work is done.
inline bool guarded = getenv("CUDA_CPU_GUARD") != NULL;
inline int working = 0;
inline size_t whole_pages(size_t n) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return std::max<size_t>(1, (n + page - 1) / page) * page;
}
inline void open_memory(int access) {
    for (const auto& a : allocations) { mprotect(a.first, whole_pages(a.second), access); }
}
struct Working {
    Working() {
        if (guarded && working++ == 0) { open_memory(PROT_READ | PROT_WRITE); }
    }
    ~Working() {
        if (guarded && --working == 0) { open_memory(PROT_NONE); }
    }
};
// Anything else that cannot be accessed ends the program as ever, when it is accessed again.
inline void touched(int, siginfo_t* info, void*) {
    if (on_device(info->si_addr, 1)) { fault("the host touches device memory"); }
    signal(SIGSEGV, SIG_DFL);
}
inline void* guarded_block(size_t n) {
    struct sigaction action = {};
    action.sa_sigaction = touched, action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, NULL);
    void* block = mmap(NULL, whole_pages(n), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return block == MAP_FAILED ? NULL : block;
}
// Is this call of a function the one that a variable of the environment, NAME:N, speaks of? calls: of it so far.
inline bool planted(const char* variable, const char* name, long* calls) {
    const char* plan = getenv(variable);
    size_t n = strlen(name);
    if (!plan) { *calls = 0; }
    return plan && strncmp(plan, name, n) == 0 && plan[n] == ':' && ++*calls == atol(plan + n + 1);
}
inline bool planted_failure(const char* name) {
    static long calls = 0;
    return planted("CUDA_CPU_FAIL", name, &calls);
}
inline bool planted_hang(const char* name) {
    static long calls = 0;
    return planted("CUDA_CPU_HANG", name, &calls);
}
// What waits, allocates, or copies at once is not allowed while a stream is captured, and makes the graph useless.
inline cudaError_t not_while_capturing() {
    if (!capturing) { return cudaSuccess; }
    capture_broken = true;
    return set_error(cudaErrorStreamCaptureUnsupported);
}
inline size_t memory_total() {
    const char* mib = getenv("CUDA_CPU_MEMORY_MIB");
    return (mib ? (size_t)atoll(mib) : (size_t)8192) << 20;
}
// What an executable graph takes of the device's memory
inline size_t graph_bytes(const Graph& g) { return g.size() * (size_t)size_setting("CUDA_CPU_GRAPH_NODE", 10 << 10); }
inline int shared_most() {
    const char* kib = getenv("CUDA_CPU_SHARED_KIB");
    return kib ? atoi(kib) << 10 : (int)MAX_SHARED;
}
inline int devices() { return size_setting("CUDA_CPU_DEVICES", 1); }
inline int multiprocessors() { return size_setting("CUDA_CPU_MULTIPROCESSORS", 132); }
inline cudaError_t device_state() {
    const char* driver = getenv("CUDA_CPU_DRIVER");
    if (driver && strcmp(driver, "old") == 0) { return cudaErrorInsufficientDriver; }
    return devices() == 0 ? cudaErrorNoDevice : cudaSuccess;
}
// What a call that makes the process's context, if it has none, returns before anything else.
inline cudaError_t context() {
    const char* full = getenv("CUDA_CPU_FULL");
    return device_state() != cudaSuccess ? device_state() : set_error((cudaError_t)(full ? atoi(full) : 0));
}
inline double seconds() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
// Works a stream off, up to a record if there is one; false: not yet, it waits for something.
inline bool advance(Stream* s, const Record* until = NULL) {
    Working open;
    while (s && !(until && until->done) && !s->queue.empty()) {
        if (s->busy) { return false; }
        s->busy = true;
        bool done = s->queue.front()();
        s->busy = false;
        if (!done) { return false; }
        s->queue.pop_front();
    }
    return true;
}
// Calls `step` until it is true. What takes long waits for a process that may itself wait for another stream of this
// one: after a while all of them go on, as on a GPU. A wait that is long is looked at less often: many ranks may wait
// on few cores.
template <typename F> inline void wait_until(F&& step) {
    for (double start = seconds(); !step(); usleep(seconds() < start + 0.02 ? 20 : 500)) {
        for (size_t i = 0; i < streams.size() && seconds() > start + 2; i++) { advance(streams[i]); }
    }
}
inline void finish(Stream* s) {
    wait_until([=] { return advance(s); });
}
inline void finish_all(void) {
    wait_until([] {
        bool done = true;
        for (Stream* s : streams) { done = advance(s) && done; }
        return done;
    });
    for (size_t i = streams.size(); i-- > 0;) {
        if (!streams[i]->destroyed) { continue; }
        delete streams[i];
        streams.erase(streams.begin() + (long)i);
    }
}
// Runs the work now, or keeps it, for when somebody waits or if the stream is being captured into a graph.
inline void submit_work(Stream* stream, const Work& work) {
    if (!stream) {
        Working open;
        wait_until(work);
    } else if (stream->capture) {
        stream->capture->push_back(work);
    } else {
        stream->queue.push_back(work);
        stream->asked = false;
    }
    for (size_t i = 0; i < streams.size(); i++) {
        if (streams[i]->eager && streams[i] != stream) { advance(streams[i]); }
    }
    for (double start = seconds(); stream && stream->eager && !advance(stream) && seconds() < start + 1;) {
        usleep(20);  // the other processes are about to come
    }
}
template <typename F> inline void submit(Stream* stream, F&& work) {
    submit_work(stream, [=] {
        work();
        return true;
    });
}
// Whether something is done, as cudaStreamQuery and cudaEventQuery ask: the first answer is no, since a GPU may take
// its time; the second makes progress.
inline cudaError_t query(Stream* stream, const Record* until, bool* asked) {
    bool nothing = until ? until->done : !stream || stream->queue.empty();
    if (nothing) { return cudaSuccess; }
    bool again = *asked;
    *asked = true;
    return set_error(again && advance(stream, until) ? cudaSuccess
                                                     : cudaErrorNotReady);  // cudaGetLastError says it too
}

// A launch as a hook sees it, when its turn in the stream has come.
struct Launch {
    const char* name;
    const void* kernel;
    dim3 grid, block;
    size_t shared;
    std::vector<Argument> arguments;
};
// The one place where another instrument can take part: called for every launch unless NULL; emulate() runs the kernel
// here, as often as it is called.
inline void (*launch_hook)(const Launch& launch, const std::function<void()>& emulate) = NULL;

// Submits a launch unless a GPU would refuse it. What does not depend on the kernel's parameters stands here, compiled
// once.
inline void launch_call(const Launch& l, Stream* stream, const Call& call) {
    auto limit = shared_limit.find(l.kernel);
    size_t allowed = limit == shared_limit.end() ? (size_t)DEFAULT_SHARED : limit->second;
    size_t threads = (size_t)l.block.x * l.block.y * l.block.z;
    if (planted_failure("launch") || planted_failure(l.name)) {
        set_error(cudaErrorLaunchFailure);
        return;
    }
    if (stream && stream->device != device) {
        set_error(cudaErrorInvalidResourceHandle);
        return;
    }
    if (threads == 0 || threads > MAX_THREADS || l.block.z > 64 || l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 ||
        l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535 || l.shared > allowed ||
        device_state() != cudaSuccess) {
        set_error(device_state() != cudaSuccess ? device_state() : cudaErrorInvalidConfiguration);
        return;
    }
    if (planted_hang("launch") || planted_hang(l.name)) {
        submit_work(stream, [] { return false; });
    }
    submit(stream, [l, call] {
        std::function<void()> emulate = [&] { run_grid(l.name, l.grid, l.block, l.shared, call); };
        if (!launch_hook) {
            emulate();
            return;
        }
        Launch named = l;
        call(&named.arguments);
        launch_hook(named, emulate);
    });
}
template <typename T> struct Same {  // keeps an argument out of the deduction of the kernel's parameters
    typedef T type;
};
// The arguments are evaluated and converted to the kernel's parameters once, as a launch does.
template <typename... P>
inline void launch(const char* name, dim3 grid, dim3 block, size_t shared, Stream* stream, void (*kernel)(P...),
                   typename Same<P>::type... arguments) {
    launch_call({name, (const void*)kernel, grid, block, shared, {}}, stream, [=](std::vector<Argument>* list) {
        if (list) {
            (list->push_back(Argument{&arguments, sizeof arguments, typeid(arguments).name()}), ...);
        } else {
            kernel(arguments...);
        }
    });
}
}  // namespace cuda_cpu

// train_mta.cu launches through this macro alone; with nvcc it becomes the triple brackets.
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    cuda_cpu::launch(#kernel, grid, block, shared, stream, kernel, __VA_ARGS__)

// First in a function that can be told to fail; in one that waits, allocates or copies at once.
#define CUDA_CPU_CALL()                                                                            \
    do {                                                                                           \
        if (cuda_cpu::planted_failure(__func__)) { return cuda_cpu::set_error(cudaErrorUnknown); } \
    } while (0)
#define CUDA_CPU_WAITS()                                                                   \
    do {                                                                                   \
        CUDA_CPU_CALL();                                                                   \
        if (cuda_cpu::not_while_capturing()) { return cudaErrorStreamCaptureUnsupported; } \
    } while (0)

typedef cuda_cpu::Stream* cudaStream_t;
typedef cuda_cpu::Event* cudaEvent_t;
typedef cuda_cpu::Graph* cudaGraph_t;
typedef cuda_cpu::Graph* cudaGraphExec_t;

static inline const char* cudaGetErrorString(cudaError_t e) {
    switch (e) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevicePointer: return "invalid device pointer";
        case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorDevicesUnavailable: return "CUDA-capable device(s) is/are busy or unavailable";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorNotReady: return "device not ready";
        case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
        case cudaErrorLaunchFailure: return "unspecified launch failure";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
        case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
        case cudaErrorUnknown: return "unknown error";
        default: return "invalid argument";
    }
}
static inline cudaError_t cudaGetLastError(void) {
    cudaError_t e = cuda_cpu::last_error;
    cuda_cpu::last_error = cudaSuccess;
    return e;
}
static inline cudaError_t cudaGetDeviceCount(int* n) {
    *n = cuda_cpu::device_state() == cudaSuccess ? cuda_cpu::devices() : 0;
    return cuda_cpu::device_state();
}
static inline cudaError_t cudaSetDevice(int device) {
    CUDA_CPU_CALL();
    if (cuda_cpu::device_state() != cudaSuccess) { return cuda_cpu::device_state(); }
    if (device < 0 || device >= cuda_cpu::devices()) { return cuda_cpu::set_error(cudaErrorInvalidDevice); }
    cuda_cpu::device = device;
    return cuda_cpu::context();
}
static inline cudaError_t cudaGetDevice(int* device) {
    *device = cuda_cpu::device;
    return cuda_cpu::device_state();
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    memset(p, 0, sizeof(*p));
    memcpy(p->uuid.bytes, &device, sizeof device);
    snprintf(p->name, sizeof(p->name), "CPU emulator (dev/cuda_cpu)");
    const char* capability = getenv("CUDA_CPU_CAPABILITY");
    p->major = (capability ? atoi(capability) : 90) / 10, p->minor = (capability ? atoi(capability) : 90) % 10;
    return cudaSuccess;
}
static inline cudaError_t cudaRuntimeGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
static inline cudaError_t cudaDriverGetVersion(int* v) {
    *v = cuda_cpu::device_state() == cudaErrorInsufficientDriver ? 11000
         : cuda_cpu::device_state() == cudaSuccess               ? 13000
                                                                 : 0;
    return cudaSuccess;
}
static inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    CUDA_CPU_CALL();
    if (cuda_cpu::context()) { return cuda_cpu::context(); }
    *total = cuda_cpu::memory_total();
    *free_bytes = *total - std::min(*total, cuda_cpu::allocated);
    return cudaSuccess;
}
static inline cudaError_t cudaDeviceSynchronize(void) {
    CUDA_CPU_WAITS();
    cuda_cpu::finish_all();
    return cudaSuccess;
}

template <typename T> static inline cudaError_t cudaMalloc(T** p, size_t n) {
    *p = NULL;
    if (cuda_cpu::planted_failure("cudaMalloc")) { return cuda_cpu::set_error(cudaErrorMemoryAllocation); }
    CUDA_CPU_WAITS();
    if (cuda_cpu::context()) { return cuda_cpu::context(); }
    void* block = NULL;  // aligned as cudaMalloc promises
    bool room = n <= cuda_cpu::memory_total() - std::min(cuda_cpu::memory_total(), cuda_cpu::allocated);
    if (room && cuda_cpu::guarded) {
        block = cuda_cpu::guarded_block(n);
    } else if (room && posix_memalign(&block, 256, n ? n : 1) != 0) {
        block = NULL;
    }
    if (!block) { return cuda_cpu::set_error(cudaErrorMemoryAllocation); }
    memset(block, 0xff, n);
    cuda_cpu::Working open;  // and closes it
    cuda_cpu::allocations[block] = n;
    cuda_cpu::allocated += n;
    *p = (T*)block;
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void* p) {
    CUDA_CPU_WAITS();
    if (!p) { return cuda_cpu::context(); }  // without a driver even this fails
    cuda_cpu::finish_all();
    auto found = cuda_cpu::allocations.find(p);
    if (found == cuda_cpu::allocations.end()) { return cuda_cpu::set_error(cudaErrorInvalidDevicePointer); }
    size_t n = found->second;
    cuda_cpu::allocated -= n;
    cuda_cpu::allocations.erase(found);
    if (cuda_cpu::guarded) {
        munmap(p, cuda_cpu::whole_pages(n));
    } else {
        free(p);
    }
    return cudaSuccess;
}
// Where an address is: inside an allocation of the device, or anywhere else in the process.
typedef enum { cudaMemoryTypeUnregistered, cudaMemoryTypeDevice = 2 } cudaMemoryType;
struct cudaPointerAttributes {
    cudaMemoryType type;
};
static inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    a->type = cuda_cpu::on_device(p, 1) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}
// Is a copy of n bytes what it is said to be?
static inline cudaError_t cuda_cpu_copies(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    bool onto = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice,
         off = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    bool good = !n || (cuda_cpu::on_device(to, onto ? n : 1) == onto && cuda_cpu::on_device(from, off ? n : 1) == off);
    return cuda_cpu::set_error(good ? cudaSuccess : cudaErrorInvalidValue);
}
static inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    CUDA_CPU_WAITS();
    if (cuda_cpu_copies(to, from, n, kind)) { return cudaErrorInvalidValue; }
    cuda_cpu::Working open;
    if (n) { memmove(to, from, n); }
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind,
                                          cudaStream_t stream = NULL) {
    CUDA_CPU_CALL();
    if (cuda_cpu_copies(to, from, n, kind)) { return cudaErrorInvalidValue; }
    cuda_cpu::submit_work(stream, [=, hangs = cuda_cpu::planted_hang(__func__)] {
        if (n && !hangs) { memmove(to, from, n); }
        return !hangs;
    });
    return cudaSuccess;
}
static inline cudaError_t cudaMemset(void* p, int value, size_t n) {
    CUDA_CPU_WAITS();
    if (n && !cuda_cpu::on_device(p, n)) { return cuda_cpu::set_error(cudaErrorInvalidValue); }
    cuda_cpu::Working open;
    memset(p, value, n);
    return cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t stream = NULL) {
    CUDA_CPU_CALL();
    if (n && !cuda_cpu::on_device(p, n)) { return cuda_cpu::set_error(cudaErrorInvalidValue); }
    cuda_cpu::submit(stream, [=] { memset(p, value, n); });
    return cudaSuccess;
}
template <typename F> static inline cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
    CUDA_CPU_CALL();
    if (bytes > cuda_cpu::shared_most()) { return cuda_cpu::set_error(cudaErrorInvalidValue); }
    cuda_cpu::shared_limit[(const void*)kernel] = (size_t)std::max<int>(bytes, cuda_cpu::DEFAULT_SHARED);
    return cudaSuccess;
}
struct cudaFuncAttributes {};
template <typename F> static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F*) {
    const char* image = getenv("CUDA_CPU_IMAGE");
    return !image ? cudaSuccess
                  : cuda_cpu::set_error(strcmp(image, "none") == 0 ? cudaErrorNoKernelImageForDevice
                                                                   : cudaErrorInvalidDeviceFunction);
}
static inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attr, int) {
    *value = attr == cudaDevAttrMultiProcessorCount            ? cuda_cpu::multiprocessors()
             : attr == cudaDevAttrMaxSharedMemoryPerBlockOptin ? cuda_cpu::shared_most()
                                                               : 0;
    return cudaSuccess;
}

static inline cudaError_t cudaStreamCreate(cudaStream_t* s) {
    CUDA_CPU_CALL();
    cuda_cpu::streams.push_back(*s = new cuda_cpu::Stream{NULL, {}, cuda_cpu::device, false, false, false, false});
    return cudaSuccess;
}
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
    CUDA_CPU_CALL();
    return cudaStreamCreate(s);
}
static inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int priority) {
    CUDA_CPU_CALL();
    cudaError_t status = cudaStreamCreate(s);
    if (status == cudaSuccess) { (*s)->eager = priority < 0 && getenv("CUDA_CPU_EAGER"); }
    return status;
}
// Waits for nothing: what the stream has yet to do is done when somebody waits for the device.
static inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    s->destroyed = true;
    if (!s->queue.empty()) { return cudaSuccess; }
    cuda_cpu::streams.erase(std::find(cuda_cpu::streams.begin(), cuda_cpu::streams.end(), s));
    delete s;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    CUDA_CPU_WAITS();
    cuda_cpu::finish(s);
    return cudaSuccess;
}
static inline cudaError_t cudaStreamQuery(cudaStream_t s) {
    CUDA_CPU_WAITS();
    return s ? cuda_cpu::query(s, NULL, &s->asked) : cudaSuccess;
}
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
    CUDA_CPU_CALL();
    *e = new cuda_cpu::Event{NULL, false, !(flags & cudaEventDisableTiming), cuda_cpu::device};
    return cudaSuccess;
}
static inline cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
static inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}
static inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = NULL) {
    CUDA_CPU_CALL();
    if (e->device != (s ? s->device : cuda_cpu::device)) { return cuda_cpu::set_error(cudaErrorInvalidResourceHandle); }
    e->captured = s && s->capture;
    auto record = std::make_shared<cuda_cpu::Record>(cuda_cpu::Record{s, false, false, 0});
    e->last = record;
    cuda_cpu::submit(s, [=] { record->done = true, record->seconds = cuda_cpu::seconds(); });
    return cudaSuccess;
}
static inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    CUDA_CPU_WAITS();
    if (e->captured) { return cudaErrorCapturedEvent; }
    std::shared_ptr<cuda_cpu::Record> record = e->last;
    if (record) {
        cuda_cpu::wait_until([&] { return cuda_cpu::advance(record->stream, record.get()); });
    }
    return cudaSuccess;
}
static inline cudaError_t cudaEventQuery(cudaEvent_t e) {
    CUDA_CPU_WAITS();
    if (e->captured) { return cuda_cpu::set_error(cudaErrorCapturedEvent); }
    return e->last ? cuda_cpu::query(e->last->stream, e->last.get(), &e->last->asked) : cudaSuccess;
}
static inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
    if (a->captured || b->captured) { return cuda_cpu::set_error(cudaErrorCapturedEvent); }
    if (!a->timed || !b->timed || !a->last || !b->last) { return cuda_cpu::set_error(cudaErrorInvalidResourceHandle); }
    if (!a->last->done || !b->last->done) { return cudaErrorNotReady; }
    *ms = (float)(1e3 * (b->last->seconds - a->last->seconds));
    return cudaSuccess;
}
// The stream's later work waits for what the event was last recorded behind. Streams that are captured together are not
// modelled.
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    CUDA_CPU_CALL();
    if (e->captured || (s && s->capture)) {
        cuda_cpu::capture_broken = true;
        return cuda_cpu::set_error(cudaErrorStreamCaptureIsolation);
    }
    std::shared_ptr<cuda_cpu::Record> record = e->last;
    if (record) {
        cuda_cpu::submit_work(s, [=] { return record->done || cuda_cpu::advance(record->stream, record.get()); });
    }
    return cudaSuccess;
}

static inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    CUDA_CPU_CALL();
    if (!s || cuda_cpu::capturing) { return cuda_cpu::set_error(cudaErrorInvalidValue); }
    s->capture = new cuda_cpu::Graph;
    cuda_cpu::capturing = true, cuda_cpu::capture_broken = false;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
    CUDA_CPU_CALL();
    if (!s->capture) { return cuda_cpu::set_error(cudaErrorInvalidValue); }
    *g = s->capture;
    s->capture = NULL, cuda_cpu::capturing = false;
    if (!cuda_cpu::capture_broken) { return cudaSuccess; }
    delete *g;
    *g = NULL;
    return cuda_cpu::set_error(cudaErrorStreamCaptureInvalidated);
}
static inline cudaError_t cudaGraphGetNodes(cudaGraph_t g, void*, size_t* n) {
    *n = g->size();
    return cudaSuccess;
}
static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long = 0) {
    CUDA_CPU_WAITS();
    size_t n = cuda_cpu::graph_bytes(*g);
    if (cuda_cpu::allocated + n > cuda_cpu::memory_total()) { return cuda_cpu::set_error(cudaErrorMemoryAllocation); }
    cuda_cpu::allocated += n;
    *e = new cuda_cpu::Graph(*g);
    return cudaSuccess;
}
static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t stream) {
    CUDA_CPU_CALL();
    for (auto& work : *e) { cuda_cpu::submit_work(stream, work); }
    return cudaSuccess;
}
static inline cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    delete g;
    return cudaSuccess;
}
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) {
    cuda_cpu::allocated -= cuda_cpu::graph_bytes(*e);
    delete e;
    return cudaSuccess;
}

#endif
