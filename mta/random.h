// mta/random.h: random numbers that depend on (seed, stream, position) and on nothing else.
//
// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter goes
// through ten rounds of multiplication and key, so block number n of a stream is computed from n, without the blocks
// before it. Streams never meet (the stream number is half of the counter), and an Rng is plain data: to save its
// state, copy the struct, or keep rng.block and rng.used.
//
// permute_index shuffles 0..n-1 without a table: a Feistel network on the next power of four, 256 at least, walked
// until it falls inside.
#ifndef MTA_RANDOM_H
#define MTA_RANDOM_H
#include <math.h>
#include <stdint.h>

typedef struct {
    uint64_t seed;     // Philox key
    uint64_t stream;   // high half of the counter
    uint64_t block;    // low half of the counter: blocks of four words computed so far
    uint32_t word[4];  // the current block
    int used;          // words of it already given away, 4: none left
} Rng;

// One Philox block: ctr (4 words) is replaced by the output; key (2 words) is not changed.
static inline void philox4x32(uint32_t* ctr, const uint32_t* key) {
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * ctr[0], p1 = (uint64_t)0xCD9E8D57u * ctr[2];
        uint32_t c1 = ctr[1], c3 = ctr[3];
        ctr[0] = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        ctr[1] = (uint32_t)p1;
        ctr[2] = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        ctr[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u;  // the paper's Weyl constants
        k1 += 0xBB67AE85u;
    }
}

static inline Rng rng_make(uint64_t seed, uint64_t stream) {
    Rng r = {seed, stream, 0, {0, 0, 0, 0}, 4};
    return r;
}

static inline uint32_t rng_u32(Rng* r) {
    if (r->used == 4) {
        const uint32_t key[2] = {(uint32_t)r->seed, (uint32_t)(r->seed >> 32)};
        r->word[0] = (uint32_t)r->block;
        r->word[1] = (uint32_t)(r->block >> 32);
        r->word[2] = (uint32_t)r->stream;
        r->word[3] = (uint32_t)(r->stream >> 32);
        philox4x32(r->word, key);
        r->block++;
        r->used = 0;
    }
    return r->word[r->used++];
}

static inline uint64_t rng_u64(Rng* r) {
    uint64_t high = rng_u32(r);
    return high << 32 | rng_u32(r);
}

// Uniform in [0, 1), all 53 bits of a double.
static inline double rng_uniform(Rng* r) { return (double)(rng_u64(r) >> 11) * (1.0 / 9007199254740992.0); }

// Standard normal by Box-Muller; the second value of the pair is dropped, so that an Rng holds no hidden state.
static inline double rng_normal(Rng* r) {
    double radius = sqrt(-2.0 * log(1.0 - rng_uniform(r)));  // 1 - u is in (0, 1]: the logarithm is finite
    return radius * cos(6.283185307179586476925 * rng_uniform(r));
}

// Standard normal cut at |x| <= limit by drawing again; limit > 0.
static inline double rng_truncated_normal(Rng* r, double limit) {
    double x = rng_normal(r);
    while (!(fabs(x) <= limit)) { x = rng_normal(r); }
    return x;
}

// A good 64-bit mixing function (the finaliser of splitmix64), for keys made of several numbers: mix64(mix64(a) ^ b).
static inline uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Where element i of 0..n-1 goes under the permutation that `key` names; i < n. Six Feistel rounds on 2h bits; a value
// outside 0..n-1 is put in again (cycle walking: fewer than 4 rounds on average, since 2^(2h) < 4n once n > 64). At
// least 256 values, since a network of one or two bits a side reaches few permutations.
static inline uint64_t permute_index(uint64_t i, uint64_t n, uint64_t key) {
    int h = 4;
    while (h < 32 && ((uint64_t)1 << (2 * h)) < n) { h++; }
    uint64_t mask = ((uint64_t)1 << h) - 1;
    do {
        uint64_t left = i >> h, right = i & mask;
        for (uint64_t round = 0; round < 6; round++) {
            uint64_t next = left ^ (mix64(mix64(key + round) ^ right) & mask);
            left = right;
            right = next;
        }
        i = left << h | right;
    } while (i >= n);
    return i;
}

#endif
