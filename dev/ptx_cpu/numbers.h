// numbers.h: numbers as the PTX manual has them, where C++ has none or leaves the result open.
#ifndef PTX_NUMBERS_H
#define PTX_NUMBERS_H
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <algorithm>

namespace ptx {
template <typename To, typename From> inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same number of bits");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline float bf16_value(uint32_t bits) { return bits_as<float>((bits & 0xffff) << 16); }
inline float f16_value(uint32_t bits) {
    uint32_t sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
    bool finite = rest < 31u << 23;  // exponents count from -15, those of a float from -127
    return bits_as<float>(sign | (finite ? bits_as<uint32_t>(bits_as<float>(rest) * 0x1p112f) : rest | 0x7f800000));
}

// x rounded to the nearest even number of a format with so many stored bits of mantissa and exponents from `smallest`.
inline uint16_t narrow(double x, int mantissa, int smallest, uint16_t infinity) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    if (isnan(x)) { return 0x7fff; }
    if (isinf(x) || x == 0) { return sign | (x == 0 ? 0 : infinity); }
    int exponent;
    double a = fabs(x);
    frexp(a, &exponent);
    exponent = std::max(exponent - 1, smallest);  // a = s * 2^exponent with s < 2

    // The hidden bit carries into the exponent: 2^mantissa units or more add 1 to it.
    uint32_t units = (uint32_t)nearbyint(ldexp(a, mantissa - exponent));
    return sign | (uint16_t)std::min<uint32_t>(units + ((uint32_t)(exponent - smallest) << mantissa), infinity);
}
inline uint16_t f16_bits(double x) { return narrow(x, 10, -14, 0x7c00); }
inline uint16_t bf16_bits(float x) { return narrow(x, 7, -126, 0x7f80); }

// a b + c of both halves of a pair, each rounded once: what a double loses of the sum never decides.
inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    auto one = [&](int shift) -> uint32_t {
        double x = f16_value(a >> shift & 0xffff), y = f16_value(b >> shift & 0xffff),
               z = f16_value(c >> shift & 0xffff);
        return f16_bits(x * y + z);
    };
    return one(0) | one(16) << 16;
}
inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }  // .ftz
// div.approx takes the inverse of 2^126 < |b| < 2^128 as 0: that gives 0, of an infinite a or NaN NaN.
inline float divide_approx(float a, float b) {
    bool vanishes = fabsf(b) > 0x1p126f && fabsf(b) < INFINITY;
    return vanishes ? a * copysignf(0.0f, b) : (float)((double)a / b);
}
__attribute__((noinline)) inline float rounded_fma(float a, float b, float c, int mode) {
    volatile float x = a, y = b, z = c;  // not moved across the change of mode
    fesetround(mode);
    volatile float r = fmaf(x, y, z);
    fesetround(FE_TONEAREST);
    return r;
}
// The larger number; a NaN gives way to a number; +0 is larger than -0.
inline float max_number(float a, float b) {
    if (isnan(a) || isnan(b)) { return isnan(a) ? (isnan(b) ? bits_as<float>(0x7fffffffu) : b) : a; }
    return a > b ? a : b > a ? b : signbit(a) ? b : a;
}
inline float min_number(float a, float b) {
    if (isnan(a) || isnan(b)) { return isnan(a) ? (isnan(b) ? bits_as<float>(0x7fffffffu) : b) : a; }
    return a < b ? a : b < a ? b : signbit(a) ? a : b;
}

// The sum of n products and c as tensor cores make it: the terms cut to 25 bits below the largest, their sum cut to
// fp32.
inline float truncated_sum(const double* terms, int n, float c) {
    int top = -1000, exponent;
    for (int k = 0; k <= n; k++) {
        double x = k < n ? terms[k] : c;
        if (x != 0 && isfinite(x)) { top = std::max((frexp(x, &exponent), exponent), top); }
    }
    double unit = ldexp(1, top - 25), sum = trunc(c / unit);
    for (int k = 0; k < n; k++) { sum += trunc(terms[k] / unit); }
    float f = (float)(sum * unit);
    return fabs((double)f) > fabs(sum * unit) ? nextafterf(f, 0) : f;
}
}  // namespace ptx
#endif
