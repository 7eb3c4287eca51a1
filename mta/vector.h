// mta/vector.h: the vectors of the CPU programs, as GCC and clang have them, whatever the machine's registers are.
//
// A file that includes it may define VECTOR_BYTES, how wide a vector is, and MTA_REAL, the type of its numbers.
// train_mta.c takes the width of a register and, in the tests, double. Decoding always takes 64 bytes: two registers of
// AVX2, four of SSE or NEON. With one width for both, the trainer's sums, and so a checkpoint's bytes, would change on
// a machine without AVX-512.
#ifndef MTA_VECTOR_H
#define MTA_VECTOR_H

#ifdef MTA_REAL
typedef MTA_REAL real;
#else
typedef float real;
#define MTA_REAL_IS_FLOAT
#endif
#ifndef VECTOR_BYTES
#define VECTOR_BYTES 64
#endif

enum { LANES = VECTOR_BYTES / (int)sizeof(real) };
typedef real Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef real VecInMemory __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));  // at any real's address

// gcc notes that vectors as arguments changed their ABI once: these functions pass them among themselves only.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
#define INLINE static inline __attribute__((always_inline))
INLINE Vec load(const real* p) { return (Vec) * (const VecInMemory*)p; }
INLINE void store(real* p, Vec v) { *(VecInMemory*)p = v; }
#pragma GCC diagnostic pop

#endif
