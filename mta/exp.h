// mta/exp.h: the exponential of the CPU programs, in training and in decoding.
#ifndef MTA_EXP_H
#define MTA_EXP_H

#include <stdint.h>
#include <string.h>

// e^x for arguments from -87 to 88, relative error below 2e-7, written so that the compiler vectorises it: 2^n by the
// exponent bits times a Taylor polynomial of e^r on |r| <= ln(2)/2. Below -87 it returns e^-87 = 1.6e-38, above 88
// e^88 = 1.7e38, never 0 or infinity. NaN stays NaN.
static inline __attribute__((always_inline)) float exp_float(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number, held in the low bits
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (int32_t)((uint32_t)bits << 23) + 0x3f800000;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

#endif
