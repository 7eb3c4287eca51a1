// cuda_cpu.h: runs the kernels of train_mta.cu, unchanged, on a CPU. A test instrument: it finds mistakes, it does not
// predict speed.
//   g++ -x c++ -std=c++17 -Idev/cuda_cpu train_mta.cu      (the headers of this folder stand in for the toolkit's)
//
// One block runs at a time, and its threads are fibers on one CPU thread: a fiber runs until it meets a barrier or a
// warp operation, so an execution is a fixed interleaving that set_order() changes. What it reports, by one line on
// stderr and abort():
//   - a barrier or a warp operation (a shuffle, a product) that not every thread reaches, or that threads reach at
//     different source lines;
//   - a launch that a GPU would refuse (too many threads, too much shared memory) comes back as a CUDA error instead;
//   - uninitialised reads: device, dynamic shared and static shared memory start as NaN in every floating-point format;
//   - out-of-bounds accesses: every allocation is its own malloc, so -fsanitize=address sees them;
//   - races past a missing barrier: run twice, with set_order(0) and set_order(1) or a seed, and compare the results;
//     or link races.cpp.
// Tensor-core instructions and asynchronous copies: tensor_cores.h.
// Not modelled: memory ordering between blocks, occupancy, independent progress inside a warp, textures, clusters.
// Nor found: the host's own access to device memory, but with CUDA_CPU_GUARD=1 (cuda_runtime.h); static shared memory
// that a launch has beside the dynamic.
// Static __shared__ arrays inside function templates are not poisoned (g++ ignores sections there): use DYNAMIC_SHARED.
#ifndef CUDA_CPU_H
#define CUDA_CPU_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <algorithm>
#include <functional>
#include <map>
#include <type_traits>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define CUDA_CPU 1
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define UNWATCHED __attribute__((no_sanitize_thread))  // races.cpp does not look at what such a function touches
#define __shared__ static __attribute__((section("cuda_shared")))

// ---- vector types
// -----------------------------------------------------------------------------------------------------------------

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
typedef struct uint3 {
    unsigned x, y, z;
} uint3;
struct alignas(8) float2 {
    float x, y;
};
static inline float2 make_float2(float x, float y) { return float2{x, y}; }

// ---- fibers
// ---------------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer of the running fiber, loads another's.
extern "C" void cuda_cpu_switch(void** save, void* load);
__asm__(".text\n.p2align 4\n.type cuda_cpu_switch,@function\ncuda_cpu_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
        ".size cuda_cpu_switch,.-cuda_cpu_switch\n");
#endif

namespace cuda_cpu {

enum { WARP = 32, MAX_THREADS = 1024, STACK_BYTES = 256 << 10, MAX_SHARED = 227 << 10, DEFAULT_SHARED = 48 << 10 };

struct Fiber {
    void* stack;       // STACK_BYTES, mapped at first use and kept; its lowest page is a guard
    void* sp;          // saved stack pointer while not running
    unsigned thread;   // linear index of the CUDA thread it runs
    const char* wait;  // NULL: running or ready; else what it waits for: "__syncthreads" or a warp operation
    int line;          // source line of that barrier
#if !defined(__x86_64__)
    ucontext_t context;
#endif
    void* fake;  // address sanitizer's bookkeeping
};

// A warp operation that waits for lanes (arrived < mask) or for its lanes to fetch the result (unread > 0).
struct WarpOp {
    unsigned mask, arrived;
    int unread, line;
    const char* what;
    uint64_t value[WARP];
    Fiber* waiting[WARP];
    int n_waiting;
};
enum { WARP_OPS = 8 };  // of a warp at a time: more than one only where its lanes diverged

// A size of the program under test that a test may make smaller through the environment (dev/dev.mk).
inline int size_setting(const char* variable, int otherwise) {
    const char* size = getenv(variable);
    return size ? atoi(size) : otherwise;
}

inline uint64_t environment_order() {  // CUDA_CPU_ORDER=N: what set_order(N) does, for programs that do not call it
    const char* order = getenv("CUDA_CPU_ORDER");
    return order ? strtoull(order, NULL, 10) : 0;
}

// An argument as the kernel's parameter has it; its type by its mangled name (Pf: float*).
struct Argument {
    const void* bytes;
    size_t size;
    const char* type;
};
// A kernel with its arguments: runs it as the current thread, or adds them to the list where one is given.
typedef std::function<void(std::vector<Argument>* list)> Call;

// Everything about the launch and block that runs. One CPU thread, hence plain globals.
struct Machine {
    Fiber fibers[MAX_THREADS];
    WarpOp warp_ops[MAX_THREADS / WARP][WARP_OPS];
    std::vector<Fiber*> ready, idle;
    std::vector<Fiber*> at_barrier;
    std::vector<unsigned> order;  // the order in which threads start
    Fiber* current;
    Fiber scheduler;
    const Call* body;
    const char* kernel;
    unsigned n_threads, next, finished;
    size_t ready_at;                 // the first of `ready` that has not gone on yet
    int waiting_ops;                 // warp operations that wait for lanes
    std::vector<uint3> thread_idxs;  // by linear index
    dim3 block_dim, grid_dim;
    uint3 thread_idx, block_idx;
    char* shared;  // dynamic shared memory, exactly as large as the launch asked
    size_t shared_bytes;
    uint64_t order_seed = environment_order(), order_state = order_seed;
    uint64_t launches = 0, switches = 0;
    uint32_t now = 0, block_start = 0, launch_start = 0;  // counts launches, blocks and barriers, for races.cpp
    uint32_t warp_now[MAX_THREADS / WARP];                // counts __syncwarp of a warp
    void (*thread_end)(void) = NULL;                      // run when a thread returns
    const void* main_stack;                               // bounds of the scheduler's stack, for the address sanitizer
    size_t main_stack_bytes;
};
inline Machine machine;

[[noreturn]] inline void fault(const char* fmt, ...) {
    Machine& m = machine;
    fflush(stdout);
    fprintf(stderr, "cuda_cpu: kernel %s, block (%u,%u,%u), thread (%u,%u,%u): ", m.kernel ? m.kernel : "none",
            m.block_idx.x, m.block_idx.y, m.block_idx.z, m.thread_idx.x, m.thread_idx.y, m.thread_idx.z);
    va_list args;
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fprintf(stderr, "\n");
    abort();
}

// 0: threads start and continue in their order; 1: in reverse; anything else seeds a permutation that changes with
// every barrier.
inline void set_order(uint64_t seed) { machine.order_seed = seed, machine.order_state = seed; }

inline uint64_t next_random() {  // splitmix64
    uint64_t z = (machine.order_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

template <typename T> inline void permute(std::vector<T>& v) {
    if (machine.order_seed == 1) { std::reverse(v.begin(), v.end()); }
    if (machine.order_seed > 1) {
        for (size_t i = v.size(); i > 1; i--) { std::swap(v[i - 1], v[next_random() % i]); }
    }
}

inline void switch_to(Fiber* from, Fiber* to) {
    machine.switches++;
#if defined(__SANITIZE_ADDRESS__)
    bool to_scheduler = to == &machine.scheduler;
    __sanitizer_start_switch_fiber(&from->fake, to_scheduler ? machine.main_stack : to->stack,
                                   to_scheduler ? machine.main_stack_bytes : (size_t)STACK_BYTES);
#endif
#if defined(__x86_64__)
    cuda_cpu_switch(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from->fake, NULL, NULL);
#endif
}

inline void set_thread(unsigned t) { machine.thread_idx = machine.thread_idxs[t]; }

inline void fiber_create(Fiber* f);

// What runs next: a fiber that can go on, else one for threads that have not started, else the scheduler.
inline UNWATCHED Fiber* next_fiber() {
    Machine& m = machine;
    if (m.ready_at < m.ready.size()) {
        m.current = m.ready[m.ready_at++];
        if (m.ready_at < m.ready.size()) {  // a stack is rarely in the cache's first level: fetch the one after this
            const char* top = (const char*)m.ready[m.ready_at]->sp;
            for (int line = 0; line < 4; line++) { __builtin_prefetch(top + 64 * line); }
        }
        return m.current;
    }
    m.ready.clear(), m.ready_at = 0;
    if (m.next == m.n_threads) { return &m.scheduler; }
    if (m.idle.empty()) { fault("more fibers than threads"); }
    m.current = m.idle.back();
    m.idle.pop_back();
    if (!m.current->stack) { fiber_create(m.current); }
    return m.current;
}

// A fiber takes thread after thread for as long as none of them has to wait: kernels without barriers never switch.
inline void fiber_main() {
    Machine& m = machine;
#if defined(__SANITIZE_ADDRESS__)
    const void* from;
    size_t bytes;
    __sanitizer_finish_switch_fiber(NULL, &from, &bytes);
    if (!m.main_stack) { m.main_stack = from, m.main_stack_bytes = bytes; }  // the first one comes from the scheduler
#endif
    for (;;) {
        Fiber* self = m.current;
        while (m.next < m.n_threads) {
            self->thread = m.order[m.next++];
            set_thread(self->thread);
            (*m.body)(NULL);
            if (m.thread_end) { m.thread_end(); }
            m.finished++;
        }
        Fiber* next = next_fiber();
        m.idle.push_back(self);
        switch_to(self, next);
    }
}

inline void fiber_create(Fiber* f) {
    f->stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->stack == MAP_FAILED || mprotect(f->stack, 4096, PROT_NONE) != 0) { fault("no memory for a fiber's stack"); }
#if defined(__x86_64__)
    // Each begins elsewhere in its pages: else what all fibers use would lie in the same few lines of the cache.
    void** top = (void**)((char*)f->stack + STACK_BYTES - (f - machine.fibers) * 1088 % 32768);
    *--top = NULL;               // keeps the alignment that a called function expects
    *--top = (void*)fiber_main;  // where the first switch returns to
    for (int i = 0; i < 6; i++) { *--top = NULL; }
    f->sp = top;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&f->context, fiber_main, 0);
#endif
}

// The running thread stops here until something puts its fiber on the ready list.
inline UNWATCHED void wait_for(const char* what, int line) {
    Fiber* self = machine.current;
    self->wait = what;
    self->line = line;
    switch_to(self, next_fiber());
    self->wait = NULL;
    set_thread(self->thread);
}

inline UNWATCHED void barrier(int line) {
    Machine& m = machine;
    if (!m.at_barrier.empty() && m.at_barrier[0]->line != line) {
        fault("reaches the barrier of line %d while others wait at the one of line %d", line, m.at_barrier[0]->line);
    }
    m.at_barrier.push_back(m.current);
    wait_for("__syncthreads", line);
}

// Every lane of `mask` brings a value; returns all lanes' values. Lanes outside the mask read as all ones (NaN).
// together: run once, by the lane that comes last, before any lane goes on.
inline UNWATCHED const uint64_t* warp_exchange(const char* what, unsigned mask, uint64_t value, int line,
                                               void (*together)(const uint64_t*) = NULL) {
    Machine& m = machine;
    WarpOp* ops = m.warp_ops[m.current->thread / WARP];
    unsigned lane = m.current->thread % WARP;
    if (!(mask >> lane & 1)) { fault("%s of line %d: lane %u is not in its own mask %08x", what, line, lane, mask); }
    WarpOp* op = NULL;
    for (int i = 0; i < WARP_OPS; i++) {
        bool same =
            ops[i].arrived != 0 && ops[i].mask == mask && (ops[i].what == what || strcmp(ops[i].what, what) == 0);
        if (same || (!op && ops[i].arrived == 0 && ops[i].unread == 0)) { op = &ops[i]; }
        if (same) { break; }
    }
    if (!op) { fault("%s of line %d: too many warp operations at once", what, line); }
    if (op->arrived == 0) {
        op->mask = mask, op->what = what, op->line = line;
        if (mask != 0xffffffffu) { memset(op->value, 0xff, sizeof op->value); }
        m.waiting_ops++;
    }
    if (op->line != line) { fault("%s of line %d while other lanes wait at that of line %d", what, line, op->line); }
    op->value[lane] = value;
    op->arrived |= 1u << lane;
    if (op->arrived == mask) {
        if (together) { together(op->value); }
        m.ready.insert(m.ready.end(), op->waiting, op->waiting + op->n_waiting);
        op->unread = op->n_waiting;
        op->arrived = 0, op->n_waiting = 0;
        m.waiting_ops--;
    } else {
        op->waiting[op->n_waiting++] = m.current;
        wait_for(what, line);
        op->unread--;  // the caller reads its lane before any other fiber can run
    }
    return op->value;
}

// No thread can go on: either all wait at the barrier (release them) or some never will.
inline void release_barrier() {
    Machine& m = machine;
    for (unsigned w = 0; m.waiting_ops && w * WARP < m.n_threads; w++) {
        for (const WarpOp& op : m.warp_ops[w]) {
            if (op.arrived == 0) { continue; }
            fault("%s waits for lanes %08x of warp %u, only %08x came (%u of %u threads have returned)", op.what,
                  op.mask, w, op.arrived, m.finished, m.n_threads);
        }
    }
    if (m.at_barrier.size() != m.n_threads) {
        fault("divergent barrier: %zu of %u threads wait at line %d, %u have returned", m.at_barrier.size(),
              m.n_threads, m.at_barrier[0]->line, m.finished);
    }
    m.ready.resize(m.n_threads), m.ready_at = 0;
    for (Fiber* f : m.at_barrier) { m.ready[f->thread] = f; }
    permute(m.ready);
    m.at_barrier.clear();
    m.now++;
}

inline void run_block() {
    Machine& m = machine;
    m.next = m.finished = 0;
    m.ready_at = 0, m.waiting_ops = 0;
    m.block_start = ++m.now;
    m.ready.clear();
    while (m.finished < m.n_threads) {
        Fiber* next = next_fiber();
        if (next == &m.scheduler) {
            release_barrier();
        } else {
            switch_to(&m.scheduler, next);
        }
    }
}

// rep stosb, since the address sanitizer would refuse memset over the red zones between static shared arrays
__attribute__((no_sanitize("address"))) inline void poison(void* p, size_t n) {
#if defined(__x86_64__)
    __asm__ volatile("rep stosb" : "+D"(p), "+c"(n) : "a"(0xff) : "memory");
#else
    for (volatile unsigned char* c = (unsigned char*)p; n > 0; n--) { *c++ = 0xff; }
#endif
}

extern "C" char __start_cuda_shared[] __attribute__((weak));
extern "C" char __stop_cuda_shared[] __attribute__((weak));

// Runs every block of the grid. shared: bytes of dynamic shared memory.
inline void run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared, const Call& body) {
    Machine& m = machine;
    m.kernel = kernel, m.grid_dim = grid, m.block_dim = block, m.body = &body;
    m.n_threads = block.x * block.y * block.z;
    m.launches++;
    m.launch_start = ++m.now;
    if (m.idle.empty()) {
        for (int i = MAX_THREADS - 1; i >= 0; i--) { m.idle.push_back(&m.fibers[i]); }
    }
    m.order.resize(m.n_threads), m.thread_idxs.resize(m.n_threads);
    for (unsigned i = 0; i < m.n_threads; i++) {
        m.order[i] = i;
        m.thread_idxs[i] = uint3{i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    }
    permute(m.order);
    void* bytes = NULL;
    if (shared && posix_memalign(&bytes, 16, shared) != 0) {
        fault("no memory for %zu bytes of shared memory", shared);
    }
    m.shared = (char*)bytes, m.shared_bytes = shared;
    size_t static_bytes = __start_cuda_shared ? (size_t)(__stop_cuda_shared - __start_cuda_shared) : 0;
    size_t n_blocks = (size_t)grid.x * grid.y * grid.z;
    for (size_t k = 0; k < n_blocks; k++) {
        size_t b = m.order_seed == 1 ? n_blocks - 1 - k : k;
        m.block_idx = uint3{(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
        if (shared) { poison(m.shared, shared); }
        if (static_bytes) { poison(__start_cuda_shared, static_bytes); }
        run_block();
    }
    free(m.shared);
    m.kernel = NULL, m.shared = NULL;
}

inline void* dynamic_shared() {
    if (!machine.shared) { fault("uses dynamic shared memory, the launch gave none"); }
    return machine.shared;
}

template <typename T> inline uint64_t to_bits(T v) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffled value has at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, (const void*)&v, sizeof(T));
    return bits;
}
template <typename T> inline T from_bits(uint64_t bits) {
    T v;
    memcpy((void*)&v, &bits, sizeof(T));
    return v;
}

inline int lane() { return (int)(machine.current->thread % WARP); }

}  // namespace cuda_cpu

// ---- what a kernel sees

#define threadIdx (cuda_cpu::machine.thread_idx)
#define blockIdx (cuda_cpu::machine.block_idx)
#define blockDim (cuda_cpu::machine.block_dim)
#define gridDim (cuda_cpu::machine.grid_dim)

#define DYNAMIC_SHARED(type, name) type* name = (type*)cuda_cpu::dynamic_shared()

#define __syncthreads() cuda_cpu::barrier(__LINE__)
#define __syncwarp(...) cuda_cpu::sync_warp(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_xor_sync(...) cuda_cpu::shfl_xor(__LINE__, __VA_ARGS__)

namespace cuda_cpu {
inline void sync_warp(int line, unsigned mask = 0xffffffffu) {
    warp_exchange("__syncwarp", mask, 0, line,
                  [](const uint64_t*) { machine.warp_now[machine.current->thread / WARP]++; });
}
template <typename T> inline T shfl_xor(int line, unsigned mask, T v, int flip) {
    return from_bits<T>(warp_exchange("__shfl_xor_sync", mask, to_bits(v), line)[lane() ^ flip]);
}
}  // namespace cuda_cpu

// One fiber runs at a time, so plain read-modify-write is atomic.
template <typename T> static inline UNWATCHED T atomicAdd(T* p, T v) {
    T old = *p;
    *p = (T)(old + v);
    return old;
}
template <typename T> static inline UNWATCHED T atomicMax(T* p, T v) {
    T old = *p;
    *p = std::max(old, v);
    return old;
}

// The inverse of 2^126 < |b| < 2^128 counts as 0.
static inline float __fdividef(float a, float b) {
    return fabsf(b) > 0x1p126f && fabsf(b) < INFINITY ? a * copysignf(0.0f, b) : a / b;
}
static inline unsigned __float_as_uint(float x) { return cuda_cpu::from_bits<unsigned>(cuda_cpu::to_bits(x)); }
static inline float __uint_as_float(unsigned x) { return cuda_cpu::from_bits<float>(cuda_cpu::to_bits(x)); }

#endif
