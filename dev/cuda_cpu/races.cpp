// races.cpp: finds the races of a kernel that runs on dev/cuda_cpu, whatever the order of its threads: two threads
// touch the same bytes, one of them writes, and no
// __syncthreads (inside a warp: no __syncwarp) stands between; two blocks of a launch do; or bytes are touched while an
// asynchronous copy is under way to them.
//   g++ -fsanitize=thread -x c++ -Idev/cuda_cpu -c train_mta.cu
// then linked with this file and without the thread sanitizer's library:
// its compiler pass calls the functions below for every access to memory. A shuffle, a vote and a tensor-core
// instruction order nothing, as CUDA has it. Static __shared__ arrays, dynamic shared memory and device memory are
// watched, two bytes at a time; accesses to single bytes and atomics are not.
#include "cuda_runtime.h"

using namespace cuda_cpu;

extern "C" char __executable_start[];  // of the program: what addr2line counts from

namespace {
struct Cell {                        // of two bytes; times are machine.now, 0 = never
    uint32_t wrote, read;            // last
    uint32_t wrote_warp, read_warp;  // warp_now of their warps then
    uint16_t writer, reader;         // threads
    uint32_t other_block;            // launch_start of a launch in which a block before this one read it
    bool several, warps,
        copy;  // since the last barrier more than one thread read it, of more than one warp; a copy is under way
};
struct Range {
    char* begin;
    size_t bytes;
    Cell* cells;
};
std::map<char*, Range> ranges;  // of device memory, made when first touched
Range shared = {NULL, 0, NULL}, fixed = {NULL, 0, NULL};

bool inside(const Range& r, const char* p) { return p >= r.begin && p < r.begin + r.bytes; }
void watch(Range* r, char* begin, size_t bytes) {
    if (r->begin == begin && r->bytes == bytes) { return; }
    free(r->cells);
    *r = Range{begin, bytes, (Cell*)calloc(bytes / 2 + 1, sizeof(Cell))};
}
Range* find(char* p) {
    // Of device memory, and of what lies between two allocations, in this launch: nothing is allocated or freed in one.
    static Range* last = NULL;
    static char *none_begin = NULL, *none_end = NULL;
    static uint32_t launch = 0;
    if (inside(shared, p)) { return &shared; }
    if (inside(fixed, p)) { return &fixed; }
    if (launch != machine.launch_start) { launch = machine.launch_start, last = NULL, none_begin = none_end = NULL; }
    if (last && inside(*last, p)) { return last; }
    if (p >= none_begin && p < none_end) { return NULL; }
    auto above = allocations.upper_bound(p), a = above;
    char* below = above == allocations.begin() ? NULL : (char*)(--a)->first + a->second;
    if (p >= below) {
        none_begin = below, none_end = above == allocations.end() ? (char*)UINTPTR_MAX : (char*)above->first;
        return NULL;
    }
    last = &ranges[(char*)a->first];
    watch(last, (char*)a->first, a->second);
    return last;
}

// Are an access of thread `by` at this time and one of the running thread now unordered?
bool unordered(uint32_t time, uint32_t warp_time, unsigned by) {
    unsigned own = machine.current->thread;
    return time == machine.now && by != own && (by / WARP != own / WARP || warp_time == machine.warp_now[own / WARP]);
}
void report(const Range* r, const char* p, const char* what, unsigned other, void* pc) {
    fault("race: %s (thread %u) at byte %zu of %s memory; addr2line -ie PROGRAM %zx", what, other,
          (size_t)(p - r->begin), r == &shared || r == &fixed ? "shared" : "device",
          (size_t)((char*)pc - __executable_start));
}
void touch(char* p, size_t n, bool write, void* pc) {
    Machine& m = machine;
    if (!m.kernel || !m.current || n < 2 ||
        (p >= (char*)m.current->stack && p < (char*)m.current->stack + STACK_BYTES) ||
        (p >= (char*)&m && p < (char*)(&m + 1))) {  // threadIdx and its kin
        return;
    }
    watch(&shared, m.shared, m.shared_bytes);
    Range* r = find(p);
    if (!r) { return; }
    bool device = r != &shared && r != &fixed;
    unsigned own = m.current->thread;
    uint32_t warp_time = m.warp_now[own / WARP];
    for (size_t i = (size_t)(p - r->begin) / 2; i <= (size_t)(p + n - 1 - r->begin) / 2; i++) {
        Cell& c = r->cells[i];
        if (c.copy) { report(r, p, "touches what an asynchronous copy is under way to", c.writer, pc); }
        if (unordered(c.wrote, c.wrote_warp, c.writer)) {
            report(r, p, write ? "overwrites what another thread wrote" : "reads what another thread wrote", c.writer,
                   pc);
        }
        if (device && c.wrote >= m.launch_start && c.wrote < m.block_start) {
            report(r, p, "touches what another block wrote", c.writer, pc);
        }
        bool read_here = c.read == m.now, same_warp = c.reader / WARP == own / WARP;
        if (write) {
            bool others = c.several && (c.warps || !same_warp || c.read_warp == warp_time);
            if (unordered(c.read, c.read_warp, c.reader) || (read_here && others)) {
                report(r, p, "overwrites what another thread reads", c.reader, pc);
            }
            if (device && (c.other_block == m.launch_start || (c.read >= m.launch_start && c.read < m.block_start))) {
                report(r, p, "overwrites what another block reads", c.reader, pc);
            }
            c.wrote = m.now, c.wrote_warp = warp_time, c.writer = (uint16_t)own;
        } else {
            if (device && c.read >= m.launch_start && c.read < m.block_start) { c.other_block = m.launch_start; }
            bool fresh = !read_here || (same_warp && c.read_warp != warp_time && !c.warps);
            c.several = !fresh && (c.several || c.reader != own);
            c.warps = read_here && (c.warps || !same_warp);
            c.read = m.now, c.read_warp = warp_time, c.reader = (uint16_t)own;
        }
    }
}
}  // namespace

extern "C" void cuda_cpu_copy(void* to, bool begins) {
    if (begins) { touch((char*)to, 16, true, __builtin_return_address(0)); }
    Range* r = find((char*)to);
    for (size_t i = 0; r && i < 8; i++) { r->cells[(size_t)((char*)to - r->begin) / 2 + i].copy = begins; }
}

#define HOOK(name, bytes, write) \
    extern "C" void __tsan_##name(void* p) { touch((char*)p, bytes, write, __builtin_return_address(0)); }
#define HOOKS(bytes)                \
    HOOK(read##bytes, bytes, false) \
    HOOK(write##bytes, bytes, true) HOOK(unaligned_read##bytes, bytes, false) HOOK(unaligned_write##bytes, bytes, true)
HOOK(read1, 1, false)
HOOK(write1, 1, true) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) extern "C" void __tsan_read_range(void* p, size_t n) {
    touch((char*)p, n, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t n) { touch((char*)p, n, true, __builtin_return_address(0)); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void) {}
extern "C" void __tsan_init(void) {
    if (__start_cuda_shared) { watch(&fixed, __start_cuda_shared, (size_t)(__stop_cuda_shared - __start_cuda_shared)); }
}
// Atomics of the host's code
extern "C" int32_t __tsan_atomic32_load(const volatile int32_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
extern "C" void __tsan_atomic32_store(volatile int32_t* p, int32_t v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
extern "C" int32_t __tsan_atomic32_fetch_add(volatile int32_t* p, int32_t v, int) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
extern "C" int __tsan_atomic32_compare_exchange_strong(volatile int32_t* p, int32_t* expected, int32_t v, int, int) {
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
extern "C" int64_t __tsan_atomic64_fetch_add(volatile int64_t* p, int64_t v, int) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
extern "C" int8_t __tsan_atomic8_load(const volatile int8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
