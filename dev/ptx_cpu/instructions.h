// instructions.h: what an instruction does to the lanes of a warp, chosen once when a kernel is decoded (module.h).
// Only what nvcc emits for train_mta.cu and its neighbours: whatever is not known here has no function, and module.h
// refuses it by name.
#ifndef PTX_INSTRUCTIONS_H
#define PTX_INSTRUCTIONS_H
#include "machine.h"
#include <type_traits>

namespace ptx {
typedef std::vector<string> Strings;
inline bool has(const Strings& all, const char* what) { return std::find(all.begin(), all.end(), what) != all.end(); }

// An instruction as a function without state: TO(n), FROM(n) are the rows of its registers.
#define EXECUTE [](Warp & w, const Instruction& i, uint32_t lanes)
#define TO(n) (w.file + i.to[n].at)
#define FROM(n) (w.file + i.from[n].at)
// R by an expression of the sources a, b, c, d of type T that an instruction has, and of n, b as a number of bits.
#define LANES(T, R, EXPRESSION)                                                                        \
    return EXECUTE {                                                                                   \
        char* to = TO(0);                                                                              \
        const char *p = FROM(0), *q = FROM(1), *r = FROM(2), *s = FROM(3);                             \
        each(lanes, [&](int l) {                                                                       \
            [[maybe_unused]] T a = get<T>(p, l), b = get<T>(q, l), c = get<T>(r, l), d = get<T>(s, l); \
            [[maybe_unused]] uint32_t n = get<uint32_t>(q, l);                                         \
            put<R>(to, l, (R)(EXPRESSION));                                                            \
        });                                                                                            \
    };

// g(a value of the C++ type) for a PTX type of integers
template <typename G> inline Execute by_type(const string& type, G g) {
    if (type == "s16") { return g(int16_t()); }
    if (type == "u16" || type == "b16") { return g(uint16_t()); }
    if (type == "s32") { return g(int32_t()); }
    if (type == "u32" || type == "b32") { return g(uint32_t()); }
    if (type == "s64") { return g(int64_t()); }
    if (type == "u64" || type == "b64") { return g(uint64_t()); }
    return NULL;
}
template <typename T> using Unsigned = std::make_unsigned_t<T>;
template <typename T>
using Twice = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed<T>::value, int32_t, uint32_t>,
                                 std::conditional_t<std::is_signed<T>::value, int64_t, uint64_t>>;

// ---- memory

inline uint64_t address_of(const Warp& w, const Instruction& i, int operand, int64_t offset, int lane) {
    uint64_t base = get_any(w, i.from[operand], lane);
    return i.from[operand].bits == 64 ? base + (uint64_t)offset : (uint32_t)(base + (uint64_t)offset);
}
// Copies an element of 1, 2, 4 or 8 bytes: sizes that the compiler knows.
inline void copy_element(void* to, const void* from, int bytes) {
    switch (bytes) {
        case 1: memcpy(to, from, 1); break;
        case 2: memcpy(to, from, 2); break;
        case 4: memcpy(to, from, 4); break;
        default: memcpy(to, from, 8);
    }
}
// An integer of so many bytes at p
inline uint64_t extend(const char* p, int bytes, bool is_signed) {
    uint64_t v = 0;
    copy_element(&v, p, bytes);
    int shift = 64 - 8 * bytes;
    return is_signed ? (uint64_t)((int64_t)(v << shift) >> shift) : v;
}
inline void load(Warp& w, const Instruction& i, uint32_t lanes) {
    each(lanes, [&](int l) {
        const char* p;
        if (i.space == PARAM) {
            p = w.machine->parameter(i.offset);
        } else {
            p = w.machine->access(w, l, i.space, address_of(w, i, 0, i.offset, l), (uint32_t)i.bytes * i.n_to, READ);
        }
        for (int e = 0; e < i.n_to; e++) { put_any(w, i.to[e], l, extend(p + e * i.bytes, i.bytes, i.is_signed)); }
    });
}
inline void store(Warp& w, const Instruction& i, uint32_t lanes) {  // the address, then the elements
    int n = i.n_from - 1;
    each(lanes, [&](int l) {
        uint64_t address = address_of(w, i, 0, i.offset, l);
        char* p = w.machine->access(w, l, i.space, address, (uint32_t)(i.bytes * n), WRITE);
        for (int e = 0; e < n; e++) {
            uint64_t v = get_any(w, i.from[1 + e], l);
            copy_element(p + e * i.bytes, &v, i.bytes);
        }
    });
}

// atom (with a destination: the old value) and red (elements): the address, the values. Float sums, which in global
// memory flush what is subnormal; integer maxima.
inline void atomic(Warp& w, const Instruction& i, uint32_t lanes) {
    int n = i.n_from - 1;
    each(lanes, [&](int l) {
        char* p = w.machine->access(w, l, GLOBAL, address_of(w, i, 0, i.offset, l), 4 * (uint32_t)n,
                                    i.is_float ? SUM : ATOMIC);
        for (int e = 0; e < n; e++) {
            uint32_t old = get<uint32_t>(p, e), given = get<uint32_t>(FROM(1 + e), l);
            float sum = flush(flush(bits_as<float>(old)) + flush(bits_as<float>(given)));
            put<uint32_t>(p, e, i.is_float ? bits_as<uint32_t>(sum) : std::max(old, given));
            if (i.n_to) { put<uint32_t>(TO(0), l, old); }
        }
    });
}

// cp.async: the shared address, the global one, how many bytes to read
inline void copy(Warp& w, const Instruction& i, uint32_t lanes) {
    each(lanes, [&](int l) {
        uint32_t to = (uint32_t)address_of(w, i, 0, i.offset, l), bytes = get<uint32_t>(FROM(2), l);
        w.machine->copy_begin(w, l, {to, address_of(w, i, 1, i.from_offset, l), bytes});
    });
}
inline void copy_commit(Warp& w, const Instruction&, uint32_t lanes) {
    each(lanes, [&](int l) {
        w.lanes[l].groups.push_back(std::move(w.lanes[l].open));
        w.lanes[l].open.clear();
    });
}
inline void copy_wait(Warp& w, const Instruction& i, uint32_t lanes) {  // for all groups but the newest `offset`
    each(lanes, [&](int l) {
        Lane& lane = w.lanes[l];
        while (lane.groups.size() > (size_t)i.offset) {
            w.machine->copies_land(w, l, lane.groups.front());
            lane.groups.pop_front();
        }
    });
}

// ---- of a whole warp: layouts as in the manual's "Matrix Fragments for mma.m16n8k16 with floating point type",
// ldmatrix, movmatrix

// c (16,8) = a (16,16) b (16,8) + c: four registers of a, two of b, each with two numbers, the even column or row low;
// four of c.
inline void matrix_product(Warp& w, const Instruction& i, uint32_t) {
    uint16_t bits[2][16][16];  // of a, then of b transposed
    double a[16][16], b[16][8], c[16][8];
    for (int e = 0; e < 6; e++) {
        int row = e / 4 ? 0 : e % 2 * 8, column = e / 4 ? e % 2 * 8 : e / 2 * 8;
        for (int l = 0; l < WARP; l++) {
            uint32_t two = get<uint32_t>(FROM(e), l);
            uint16_t* to = &bits[e / 4][row + l / 4][column + l % 4 * 2];
            to[0] = (uint16_t)two, to[1] = (uint16_t)(two >> 16);
        }
    }
    for (int r = 0; r < 16; r++) {
        for (int k = 0; k < 16; k++) { a[r][k] = i.half ? f16_value(bits[0][r][k]) : bf16_value(bits[0][r][k]); }
        for (int n = 0; n < 8; n++) { b[r][n] = i.half ? f16_value(bits[1][n][r]) : bf16_value(bits[1][n][r]); }
    }
    for (int e = 0; e < 4; e++) {
        for (int l = 0; l < WARP; l++) { c[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2] = get<float>(FROM(6 + e), l); }
    }
    for (int r = 0; r < 16; r++) {
        for (int n = 0; n < 8 && w.machine->truncate; n++) {
            double terms[16];
            for (int k = 0; k < 16; k++) { terms[k] = a[r][k] * b[k][n]; }
            c[r][n] = truncated_sum(terms, 16, (float)c[r][n]);
        }
        for (int k = 0; k < 16 && !w.machine->truncate; k++) {
            for (int n = 0; n < 8; n++) { c[r][n] += a[r][k] * b[k][n]; }
        }
    }
    for (int l = 0; l < WARP; l++) {
        for (int e = 0; e < 4; e++) { put<float>(TO(e), l, (float)c[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2]); }
    }
}
// Matrix n of (8,8) numbers of 16 bits: its row r at the address of lane 8 n + r. Each lane gets two numbers of a row.
inline void load_matrix(Warp& w, const Instruction& i, uint32_t) {
    for (int n = 0; n < i.n_to; n++) {
        uint16_t x[8][8];
        for (int r = 0; r < 8; r++) {
            int l = 8 * n + r;
            memcpy(x[r], w.machine->access(w, l, SHARED, address_of(w, i, 0, i.offset, l), 16, READ), 16);
        }
        for (int l = 0; l < WARP; l++) {
            int row = l / 4, column = l % 4 * 2;
            uint32_t low = i.transposed ? x[column][row] : x[row][column];
            uint32_t high = i.transposed ? x[column + 1][row] : x[row][column + 1];
            put<uint32_t>(TO(n), l, low | high << 16);
        }
    }
}
inline void move_matrix(Warp& w, const Instruction& i, uint32_t) {
    uint16_t x[8][8];
    for (int l = 0; l < WARP; l++) {
        uint32_t v = get<uint32_t>(FROM(0), l);
        x[l / 4][l % 4 * 2] = (uint16_t)v, x[l / 4][l % 4 * 2 + 1] = (uint16_t)(v >> 16);
    }
    for (int l = 0; l < WARP; l++) {
        put<uint32_t>(TO(0), l, x[l % 4 * 2][l / 4] | (uint32_t)x[l % 4 * 2 + 1][l / 4] << 16);
    }
}
// shfl.bfly over all lanes of a warp: the value, the distance, 31, the mask. Every lane that is read is inside.
inline void shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
    uint32_t v[WARP];
    for (int l = 0; l < WARP; l++) { v[l] = get<uint32_t>(FROM(0), l); }
    each(lanes, [&](int l) {
        int from = l ^ (int)(get<uint32_t>(FROM(1), l) & 31);
        if (get<uint32_t>(FROM(2), l) != 31) { w.machine->fail(&w, "shfl within a part of the warp", l); }
        if (!(lanes >> from & 1)) { w.machine->fail(&w, format("shfl reads lane %d, which takes no part", from), l); }
        put<uint32_t>(TO(0), l, v[from]);
    });
    if (i.n_to > 1) { put_predicate(w, i.to[1].at, lanes, ALL); }
}
inline void warp_sync(Warp& w, const Instruction&, uint32_t) { w.turn++; }
inline void nothing(Warp&, const Instruction&, uint32_t) {}

// ---- comparisons: setp

#define COMPARE(NAME, EXPRESSION)                     \
    if (how == NAME) {                                \
        return EXECUTE {                              \
            const char *p = FROM(0), *q = FROM(1);    \
            uint32_t yes = 0;                         \
            for (int l = 0; l < WARP; l++) {          \
                T a = get<T>(p, l), b = get<T>(q, l); \
                yes |= (uint32_t)(EXPRESSION) << l;   \
            }                                         \
            put_predicate(w, i.to[0].at, lanes, yes); \
        };                                            \
    }
template <typename T> inline Execute comparison(const string& how) {
    COMPARE("eq", a == b)
    COMPARE("ne", a < b || a > b)  // false where one is NaN
    COMPARE("lt", a < b)
    COMPARE("le", a <= b)
    COMPARE("gt", a > b)
    COMPARE("ge", a >= b)
    if (std::is_integral<T>::value) { return NULL; }
    COMPARE("equ", !(a < b || a > b))
    COMPARE("neu", a != b)
    COMPARE("ltu", !(a >= b))
    COMPARE("leu", !(a > b))
    COMPARE("geu", !(a < b))
    return NULL;
}
inline Execute comparison_of(const string& how, const string& type) {
    if (type == "f32") { return comparison<float>(how); }
    return by_type(type, [&](auto z) { return comparison<decltype(z)>(how); });
}

// ---- arithmetic. o: the opcode; how: its modifiers, with dots between them

inline Execute float_of(const string& o, const string& how, const string& type) {
    if (type == "f64" && o == "add" && how.empty()) { LANES(double, double, a + b) }
    if (type == "f16x2" && o == "fma" && how == "rn") { LANES(uint32_t, uint32_t, fma_halves(a, b, c)) }
    if (type != "f32") { return NULL; }
    if (o == "add" && how.empty()) { LANES(float, float, a + b) }
    if (o == "sub" && how.empty()) { LANES(float, float, a - b) }
    if (o == "mul" && how.empty()) { LANES(float, float, a* b) }
    if (o == "neg" && how.empty()) { LANES(float, float, -a) }
    if (o == "max" && how.empty()) { LANES(float, float, max_number(a, b)) }
    if (o == "min" && how.empty()) { LANES(float, float, min_number(a, b)) }
    if (o == "fma" && how == "rn") { LANES(float, float, fmaf(a, b, c)) }
    if (o == "fma" && how == "rm") { LANES(float, float, rounded_fma(a, b, c, FE_DOWNWARD)) }
    if (o == "div" && how == "rn") { LANES(float, float, a / b) }
    if (o == "rcp" && how == "rn") { LANES(float, float, 1.0f / a) }
    if (o == "sqrt" && how == "rn") { LANES(float, float, sqrtf(a)) }
    // What is approximate on a GPU, by up to 2 units in the last place, is rounded correctly here.
    if (o == "div" && how == "approx") { LANES(float, float, divide_approx(a, b)) }
    if (o == "ex2" && how == "approx.ftz") { LANES(float, float, flush((float)exp2((double)flush(a)))) }
    if (o == "ex2" && how == "approx") { LANES(float, float, exp2((double)a)) }
    return NULL;
}

// What depends on the sign: T is the type of the instruction.
template <typename T> inline Execute signed_arithmetic(const string& o, const string& how) {
    typedef Twice<T> W;
    constexpr bool is_signed = std::is_signed<T>::value;
    if constexpr (sizeof(T) < 8) {
        if (o == "mul" && how == "hi") { LANES(T, T, (W)a * (W)b >> (8 * sizeof(T))) }
        if (o == "mul" && how == "wide") { LANES(T, W, (W)a * (W)b) }
    }
    // The quotient of a division by zero is not specified; the smallest number by -1 wraps.
    if (o == "div") { LANES(T, T, b == 0 ? (T)-1 : is_signed && b == (T)-1 ? (T)(0 - (Unsigned<T>)a) : (T)(a / b)) }
    if (o == "rem") { LANES(T, T, b == 0 ? a : is_signed && b == (T)-1 ? (T)0 : (T)(a % b)) }
    if (o == "min") { LANES(T, T, std::min(a, b)) }
    if (o == "max") { LANES(T, T, std::max(a, b)) }
    if (o == "shr") { LANES(T, T, n >= 8 * sizeof(T) ? (a < 0 ? -1 : 0) : a >> n) }
    return NULL;
}
// What does not: T is unsigned.
template <typename T> inline Execute arithmetic(const string& o, const string& how) {
    if (o == "add") { LANES(T, T, a + b) }
    if (o == "sub") { LANES(T, T, a - b) }
    if (o == "mul" && how == "lo") { LANES(T, T, (uint64_t)a * (uint64_t)b) }
    if (o == "mad" && how == "lo") { LANES(T, T, (uint64_t)a * (uint64_t)b + c) }
    if (o == "neg") { LANES(T, T, 0 - a) }
    if (o == "not") { LANES(T, T, ~a) }
    if (o == "and") { LANES(T, T, a & b) }
    if (o == "or") { LANES(T, T, a | b) }
    if (o == "xor") { LANES(T, T, a ^ b) }
    if (o == "shl") { LANES(T, T, n >= 8 * sizeof(T) ? 0 : a << n) }
    return NULL;
}
inline uint32_t mask_of(uint32_t bits) { return (bits & 255) > 31 ? ALL : (1u << (bits & 255)) - 1; }
inline Execute integer_of(const string& o, const string& how, const string& type) {
    if (o == "bfe" && type == "u32") { LANES(uint32_t, uint32_t, (b & 255) > 31 ? 0 : a >> (b & 255) & mask_of(c)) }
    if (o == "bfi" && type == "b32") {  // b with d bits of a at c
        LANES(uint32_t, uint32_t, (c & 255) > 31 ? b : (b & ~(mask_of(d) << (c & 255))) | (a & mask_of(d)) << (c & 255))
    }
    Execute found = by_type(type, [&](auto z) { return signed_arithmetic<decltype(z)>(o, how); });
    return found ? found : by_type(type, [&](auto z) { return arithmetic<Unsigned<decltype(z)>>(o, how); });
}
// Of predicates: a word each, a bit a lane. ~a has b = a.
#define PREDICATE(NAME, EXPRESSION)                                                                     \
    if (o == NAME) {                                                                                    \
        return EXECUTE {                                                                                \
            uint32_t a = get_predicate(w, i.from[0].at), b = get_predicate(w, i.from[i.n_from - 1].at); \
            put_predicate(w, i.to[0].at, lanes, EXPRESSION);                                            \
        };                                                                                              \
    }
inline Execute predicate_of(const string& o) {
    PREDICATE("and", a & b)
    PREDICATE("or", a | b)
    PREDICATE("not", ~(a & b))
    return NULL;
}

// ---- conversions

inline Execute float_from_float(const string& to, const string& from, const string& how) {
    if (to == "f32" && from == "f16" && how.empty()) { LANES(uint16_t, float, f16_value(a)) }
    if (to == "f32" && from == "bf16" && how.empty()) { LANES(uint16_t, float, bf16_value(a)) }
    if (to == "f16" && from == "f32" && how == "rn") { LANES(float, uint16_t, f16_bits(a)) }
    if (to == "bf16" && from == "f32" && how == "rn") { LANES(float, uint16_t, bf16_bits(a)) }
    if (to == "f64" && from == "f32" && how.empty()) { LANES(float, double, a) }
    if (to == "f32" && from == "f64" && how == "rn") { LANES(double, float, a) }
    if (to != "f32" || from != "f32") { return NULL; }
    if (how == "sat") { LANES(float, float, a > 0 ? (a < 1 ? a : 1.0f) : 0.0f) }
    if (how == "rmi") { LANES(float, float, floorf(a)) }
    return NULL;
}
inline void resize(Warp& w, const Instruction& i, uint32_t lanes) {  // both registers may be wider than their types
    each(lanes, [&](int l) {
        uint64_t v = get_any(w, i.from[0], l);
        v = extend((const char*)&v, i.bytes, i.is_signed);
        put_any(w, i.to[0], l, extend((const char*)&v, i.to_bytes, i.to_signed));
    });
}
// two: a pair of floats into one register, the first in the upper half
inline Execute conversion_of(const string& to, const string& from, const string& how, bool two) {
    auto is_integer = [](const string& t) { return t[0] == 's' || t[0] == 'u'; };
    if (two) {
        if (how != "rn" || from != "f32") { return NULL; }
        if (to == "f16x2") { LANES(float, uint32_t, (uint32_t)f16_bits(a) << 16 | f16_bits(b)) }
        if (to == "bf16x2") { LANES(float, uint32_t, (uint32_t)bf16_bits(a) << 16 | bf16_bits(b)) }
        return NULL;
    }
    if (is_integer(to) && is_integer(from)) { return how.empty() ? resize : NULL; }
    if (is_integer(from) && how == "rn" && to == "f32") {
        return by_type(from, [](auto z) -> Execute { LANES(decltype(z), float, a) });
    }
    return float_from_float(to, from, how);
}
}  // namespace ptx
#endif
