// cuda_fp16.h: stand-in for the toolkit's header: __half with round to nearest even, subnormals and infinities.
#ifndef CUDA_CPU_FP16_H
#define CUDA_CPU_FP16_H
#include "cuda_cpu.h"

struct __half {
    uint16_t bits;
    __half() = default;
    __half(float f) {
        uint32_t u = __float_as_uint(f), sign = u >> 16 & 0x8000u;
        u &= 0x7fffffffu;
        if (u > 0x7f800000u) {  // NaN
            bits = 0x7fff;
        } else if (u >= 0x477ff000u) {  // 65520 and above round to infinity
            bits = (uint16_t)(sign | 0x7c00u);
        } else if (u < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, rounded to nearest even by default
            bits = (uint16_t)(sign | (uint32_t)lrintf(__uint_as_float(u) * 16777216.0f));
        } else {
            bits = (uint16_t)(sign | ((u + 0xfffu + (u >> 13 & 1) - 0x38000000u) >> 13));
        }
    }
    operator float() const {
        float f;
        value(&f, (uint32_t)bits);
        return f;
    }
    // of the low 16 bits of a word; or of a vector of words a vector of numbers
    template <typename F, typename W> static void value(F* to, const W& word) {
        W sign = (word & 0x8000u) << 16, rest = (word & 0x7fffu) << 13, bits = sign | rest, full = bits | 0x7f800000u;
        F finite, special;  // special: infinity, NaN
        memcpy((void*)&finite, (const void*)&bits, sizeof bits);
        memcpy((void*)&special, (const void*)&full, sizeof full);
        *to = rest >= 31u << 23 ? special : finite * 0x1p112f;  // the exponent's bias is 15 here, 127 there
    }
};
struct alignas(4) __half2 {
    __half x, y;
};
typedef __half half;

static inline __half2 __floats2half2_rn(float x, float y) { return __half2{x, y}; }
// One rounding: a product of two halves and its sum with a third are exact in double where this decides, and the float
// between has an odd last bit if it is not.
static inline __half fma_half(__half x, __half y, __half z) {
    double sum = (double)(float)x * (float)y + (float)z;
    float f = (float)sum;
    if (f != sum && sum == sum) { f = __uint_as_float((__float_as_uint(f) - (fabs(f) > fabs(sum))) | 1); }
    return __half(f);
}
static inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
    return __half2{fma_half(x.x, y.x, z.x), fma_half(x.y, y.y, z.y)};
}
static inline float2 __half22float2(__half2 h) { return float2{h.x, h.y}; }
#endif
