// tensor_cores.h: bodies on the CPU for the tensor-core and copy instructions that train_mta.cu keeps behind small
// device functions. Layouts are those of the PTX manual (mma.m16n8k16, ldmatrix.m8n8.x4). With lane = 4 g + t:
//   A (16,16): a[0] holds A[g][2t], A[g][2t+1]; a[1] row g+8; a[2] columns +8; a[3] both
//   C (16,8): c[0], c[1] C[g][2t], C[g][2t+1]; c[2], c[3] row g+8
//   B (16,8):  b[0] holds B[2t][g], B[2t+1][g]; b[1] rows +8
// An instruction of a warp runs when its last lane arrives, for all lanes at once. An asynchronous copy is made when it
// is waited for, as late as the hardware may make it: what is read too early is still poison.
#ifndef CUDA_CPU_TENSOR_CORES_H
#define CUDA_CPU_TENSOR_CORES_H
#include "cuda_cpu.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

extern "C" void cuda_cpu_copy(void* to, bool begins)
    __attribute__((weak));  // races.cpp, where it is linked: a copy is under way to here

namespace cuda_cpu {
struct TensorCounts {
    uint64_t mma, ldmatrix, copies;
};  // executed: by a warp, by a warp, by a thread (16 bytes each)
inline TensorCounts tensor_counts;

struct MmaLane {
    const unsigned *a, *b;
    float* c;
};
struct LdmatrixLane {
    const uint16_t* row;
    unsigned* r;
};

// 8 columns, so that every optimisation computes them at once; 8 pairs of 16 bits, the first of a pair in the low half
typedef float MmaRow __attribute__((vector_size(32)));
typedef uint32_t MmaPairs __attribute__((vector_size(32)));

// A product touches registers alone: races.cpp has nothing to watch.
template <typename T> inline UNWATCHED void mma_warp(const uint64_t* lanes) {
    tensor_counts.mma++;
    MmaPairs A[16], B[8];  // pairs of columns; of rows
    MmaRow even[8], odd[8], sum[16];
    for (int l = 0; l < WARP; l++) {
        const MmaLane* own = (const MmaLane*)lanes[l];
        int g = l / 4, t = l % 4;
        A[g][t] = own->a[0], A[g + 8][t] = own->a[1], A[g][4 + t] = own->a[2], A[g + 8][4 + t] = own->a[3];
        B[t][g] = own->b[0], B[4 + t][g] = own->b[1];
    }
    for (int k = 0; k < 8; k++) { T::value(&even[k], B[k] & 0xffffu), T::value(&odd[k], B[k] >> 16); }
    for (int i = 0; i < 16; i++) {
        MmaRow low, high;
        T::value(&low, A[i] & 0xffffu), T::value(&high, A[i] >> 16), sum[i] = MmaRow{};
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) { sum[i] += low[k] * even[k], sum[i] += high[k] * odd[k]; }
    }
    for (int l = 0; l < WARP; l++) {
        float* c = ((const MmaLane*)lanes[l])->c;
        int g = l / 4, t = l % 4;
        c[0] += sum[g][2 * t], c[1] += sum[g][2 * t + 1], c[2] += sum[g + 8][2 * t], c[3] += sum[g + 8][2 * t + 1];
    }
}

// A row of 8 numbers in shared memory, of whatever type.
typedef uint16_t LdmatrixRow __attribute__((vector_size(16), may_alias));
template <bool TRANSPOSED> inline UNWATCHED void ldmatrix_distribute(const uint64_t* lanes, const LdmatrixRow* rows) {
    for (int l = 0; l < WARP; l++) {
        unsigned* r = ((const LdmatrixLane*)lanes[l])->r;
        int a = l / 4, b = 2 * (l % 4);
        for (int m = 0; m < 4; m++) {
            const LdmatrixRow* x = rows + 8 * m;
            r[m] = TRANSPOSED ? (unsigned)x[b][a] | (unsigned)x[b + 1][a] << 16
                              : (unsigned)x[a][b] | (unsigned)x[a][b + 1] << 16;
        }
    }
}
template <bool TRANSPOSED> inline void ldmatrix_warp(const uint64_t* lanes) {
    LdmatrixRow rows[WARP];
    tensor_counts.ldmatrix++;
    for (int l = 0; l < WARP; l++) {
        const uint16_t* row = ((const LdmatrixLane*)lanes[l])->row;
        if ((uintptr_t)row % 16 != 0) { fault("ldmatrix: the row of lane %d is not at a multiple of 16 bytes", l); }
        rows[l] = *(const LdmatrixRow*)row;
    }
    ldmatrix_distribute<TRANSPOSED>(lanes, rows);
}

struct Copy {
    void* to;
    const void* from;
    bool valid;
};
inline std::vector<std::vector<Copy>> copies[MAX_THREADS];  // of each thread: committed groups, the last one still open

inline void copies_end() {
    std::vector<std::vector<Copy>>& own = copies[machine.current->thread];
    for (const std::vector<Copy>& group : own) {
        if (!group.empty()) { fault("returns with asynchronous copies in flight"); }
    }
    own.clear();
}
inline std::vector<std::vector<Copy>>& own_copies() {
    std::vector<std::vector<Copy>>& own = copies[machine.current->thread];
    machine.thread_end = copies_end;
    if (own.empty()) { own.emplace_back(); }
    return own;
}
inline void copy_wait_for(size_t leave) {  // all committed groups but the newest `leave`
    std::vector<std::vector<Copy>>& own = own_copies();
    while (own.size() > leave + 1) {
        for (const Copy& c : own.front()) {
            if (cuda_cpu_copy) { cuda_cpu_copy(c.to, false); }
            if (c.valid) {
                memcpy(c.to, c.from, 16);
            } else {
                memset(c.to, 0, 16);
            }
        }
        own.erase(own.begin());
    }
}
}  // namespace cuda_cpu

#define ldmatrix(r, from) cuda_cpu::ldmatrix_lane<false>(__LINE__, r, from)
#define ldmatrix_transposed(r, from) cuda_cpu::ldmatrix_lane<true>(__LINE__, r, from)
#define mma_half(c, a, b0, b1) cuda_cpu::mma_lane<__half>(__LINE__, c, a, b0, b1)
#define mma_bf16(c, a, b0, b1) cuda_cpu::mma_lane<__nv_bfloat16>(__LINE__, c, a, b0, b1)

namespace cuda_cpu {
template <bool TRANSPOSED> inline void ldmatrix_lane(int line, unsigned* r, const void* row) {
    LdmatrixLane own = {(const uint16_t*)row, r};
    warp_exchange("ldmatrix", 0xffffffffu, (uint64_t)&own, line, ldmatrix_warp<TRANSPOSED>);
}
template <typename T> inline void mma_lane(int line, float* c, const unsigned* a, unsigned b0, unsigned b1) {
    unsigned b[2] = {b0, b1};
    MmaLane own = {a, b, c};
    warp_exchange("mma", 0xffffffffu, (uint64_t)&own, line, mma_warp<T>);
}
}  // namespace cuda_cpu

#define transpose8(pair) cuda_cpu::transpose8_lane(__LINE__, pair)
namespace cuda_cpu {
inline unsigned transpose8_lane(int line, unsigned pair) {  // movmatrix.m8n8.trans
    const uint64_t* lanes = warp_exchange("movmatrix", 0xffffffffu, pair, line);
    int row = 2 * (lane() % 4), column = lane() / 4, shift = column % 2 * 16;
    unsigned x = (unsigned)lanes[4 * row + column / 2] >> shift & 0xffffu,
             y = (unsigned)lanes[4 * (row + 1) + column / 2] >> shift & 0xffffu;
    return x | y << 16;
}
}  // namespace cuda_cpu

static inline void copy_async(void* to, const void* from, bool valid) {
    if ((uintptr_t)to % 16 != 0 || (valid && (uintptr_t)from % 16 != 0)) {
        cuda_cpu::fault("copy_async: not at a multiple of 16 bytes");
    }
    cuda_cpu::tensor_counts.copies++;
    cuda_cpu::own_copies().back().push_back({to, from, valid});
    if (cuda_cpu_copy) { cuda_cpu_copy(to, true); }
}
static inline void copy_commit(void) { cuda_cpu::own_copies().emplace_back(); }
template <int LEAVE> static inline void copy_wait(void) { cuda_cpu::copy_wait_for(LEAVE); }
#endif
