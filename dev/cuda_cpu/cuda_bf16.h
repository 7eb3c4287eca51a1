// cuda_bf16.h: stand-in for the toolkit's header: __nv_bfloat16 with round to nearest even, as the hardware converts.
#ifndef CUDA_CPU_BF16_H
#define CUDA_CPU_BF16_H
#include "cuda_cpu.h"

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) {
        uint32_t u = __float_as_uint(f);
        bool nan = (u & 0x7fffffffu) > 0x7f800000u;
        bits = nan ? (uint16_t)0x7fff : (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
    }
    operator float() const {
        float f;
        value(&f, (uint32_t)bits);
        return f;
    }
    template <typename F, typename W> static void value(F* to, const W& word) {  // as __half has it
        W full = word << 16;
        memcpy((void*)to, (const void*)&full, sizeof full);
    }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return __nv_bfloat162{x, y}; }
#endif
