// test_ptx.cpp: tests of dev/ptx_cpu, which executes PTX on the CPU: instructions against plain C++, products, matrices
// and copies against the emulator's (dev/cuda_cpu), and planted faults: an instrument that cannot see a missing barrier
// would let every kernel pass. PTX by hand: no nvcc.
//   make build/test_ptx
#include <cuda_runtime.h>
#include "tensor_cores.h"
#include "module.h"
#include "check.h"
#include <random>
using std::string;

// Every kernel here has the parameters (out, in, n), `bytes` of dynamic shared memory, and at its start: %rd1 out, %rd2
// in, %r1 n, %r2 the thread, %r3 where shared memory begins, %rd3 and %rd4 the thread's four bytes of out and in, %r4
// those of shared memory.
static string kernel_text(const string& body, const string& bounds = ".maxntid 1024, 1, 1\n") {
    return ".extern .shared .align 16 .b8 bytes[];\n.visible .entry k(.param .u64 o, .param .u64 i, .param .u32 n)\n" +
           bounds +
           "{\n.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<20>; .reg .f64 "
           "%fd<9>;\n"
           "ld.param.u64 %rd1, [o]; ld.param.u64 %rd2, [i]; ld.param.u32 %r1, [n]; mov.u32 %r2, %tid.x; mov.u32 %r3, "
           "bytes;\n"
           "mul.wide.u32 %rd5, %r2, 4; add.s64 %rd3, %rd1, %rd5; add.s64 %rd4, %rd2, %rd5; mad.lo.s32 %r4, %r2, 4, "
           "%r3;\n" +
           body + "\nret;\n}\n";
}
struct Threads {
    uint32_t blocks, threads, shared;
};
// Runs a body on arrays of device memory; its fault or its first note, empty if there are none.
template <typename To, typename From>
static string execute(const string& body, Threads t, std::vector<To>& out, const std::vector<From>& in,
                      bool truncate = false, bool fuse = false) {
    ptx::Module module;
    ptx::Machine machine;
    struct {
        To* out;
        const From* in;
        int n;
    } parameters = {out.data(), in.data(), (int)out.size()};
    std::vector<ptx::Region> regions = {{(uint64_t)out.data(), (uint64_t)(out.data() + out.size())},
                                        {(uint64_t)in.data(), (uint64_t)(in.data() + in.size())}};
    std::sort(regions.begin(), regions.end(),
              [](const ptx::Region& a, const ptx::Region& b) { return a.begin < b.begin; });
    machine.truncate = truncate, module.fuse = fuse;
    try {
        module.parse(kernel_text(body));
        machine.launch(module.kernel("k"), {t.blocks, 1, 1}, {t.threads, 1, 1}, t.shared, (const char*)&parameters,
                       regions);
    } catch (ptx::Fault& f) { return f.text; }
    return machine.notes.empty() ? "" : machine.notes.begin()->first;
}
static std::mt19937 random_bits(1);

// ---- instructions against plain C++

// x rounded to the nearest even number by a search among all of a format: slow and sure.
static uint32_t nearest(double x, float (*value)(uint32_t), uint32_t infinity, double top) {
    uint32_t sign = signbit(x) ? 0x8000 : 0, low = 0, high = infinity - 1;
    double a = fabs(x);
    if (isnan(x)) { return 0x7fff; }
    if (a >= top) { return sign | infinity; }
    while (low < high) {
        uint32_t middle = (low + high + 1) / 2;
        if ((double)value(middle) <= a) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    if (low == infinity - 1) { return sign | low; }
    double below = a - (double)value(low), above = (double)value(low + 1) - a;
    return sign | (below < above || (below == above && !(low & 1)) ? low : low + 1);
}
static void test_conversions() {
    bool same = true;
    for (uint32_t b = 0; b < 65536; b++) {
        int exponent = b >> 10 & 31, mantissa = b & 1023;
        float v = (float)ldexp(exponent ? 1024 + mantissa : mantissa, std::max(exponent, 1) - 25),
              got = ptx::f16_value(b);
        if (exponent == 31) { v = mantissa ? NAN : INFINITY; }
        same = same && (isnan(v) ? isnan(got) : got == (b & 0x8000 ? -v : v)) && signbit(got) == (b >> 15 != 0);
    }
    check(same, "values of half precision");
    const double terms[16] = {1, 0x3p-24}, small[16] = {1, 0x1p-25, 0x1p-25, 0x1p-25, 0x1p-25};
    check(ptx::truncated_sum(terms, 16, 0) == 1 + 0x1p-23f && ptx::truncated_sum(small, 16, 0) == 1 &&
              ptx::truncated_sum(small, 16, -0x1p-25f) == 1,
          "sums as tensor cores cut them");
    std::vector<float> x = {
        0,        -0.0f,  INFINITY,       -INFINITY,      NAN,         65504,          65519,
        65520,    1e-8f,  5.96046448e-8f, 2.98023224e-8f, 3e-8f,       6.1035e-5f,     3.4e38f,
        3.39e38f, 1e-40f, -1e-45f,        1.00390625f,    1.01171875f, 1.00048828125f, 1.00146484375f};
    while (x.size() < 1024) { x.push_back(ldexpf((float)((int)random_bits() >> 8), (int)(random_bits() % 60) - 60)); }
    std::vector<uint32_t> out(4 * x.size());
    string bad = execute("mul.wide.u32 %rd6, %r2, 16; add.s64 %rd6, %rd1, %rd6; ld.global.f32 %f1, [%rd4];"
                         "cvt.rn.f16x2.f32 %r5, %f1, %f1; cvt.rn.bf16.f32 %rs1, %f1; cvt.rn.f16.f32 %rs2, %f1; mov.b32 "
                         "%r6, {%rs1, %rs2};"
                         "cvt.f32.f16 %f2, %rs2; cvt.rmi.f32.f32 %f3, %f1; mov.b32 %r7, %f3; mov.b32 %r8, %f2; "
                         "st.global.v4.u32 [%rd6], {%r5,%r6,%r7,%r8};",
                         {1, 1024, 0}, out, x);
    check(bad.empty(), "conversions run", bad.c_str());
    for (size_t n = 0; n < x.size(); n++) {
        uint32_t h = nearest(x[n], ptx::f16_value, 0x7c00, 65520),
                 b = nearest(x[n], ptx::bf16_value, 0x7f80, 0x1.ffp127), *o = &out[4 * n];
        bool back = isnan(x[n]) || ptx::bits_as<uint32_t>(ptx::f16_value(h)) == o[3];
        check(o[0] == (h | h << 16) && o[1] == (b | h << 16) &&
                  (isnan(x[n]) || ptx::bits_as<float>(o[2]) == floorf(x[n])) && back,
              "conversions", ptx::format("of %g", x[n]).c_str());
    }
}
// fma.rn.f16x2 of any bits; and times 0, which makes NaN of an infinity and leaves the rest (pack_scores).
static void test_half_sums() {
    std::vector<uint32_t> x(1024), out(2 * x.size());
    for (uint32_t& v : x) { v = (uint32_t)random_bits() & 0xbfffbfffu; }
    x[0] = 0x7c00fc00u, x[1] = 0x7bff8001u, x[2] = 0x7fff0000u, x[3] = 0x80003c00u;
    string bad = execute("mul.wide.u32 %rd6, %r2, 8; add.s64 %rd6, %rd1, %rd6; ld.global.u32 %r5, [%rd4]; xor.b32 %r6, "
                         "%r5, 353436678; shr.u32 %r7, %r5, 3; fma.rn.f16x2 %r6, %r5, %r6, %r7; mov.b32 %r8, 0; "
                         "fma.rn.f16x2 %r7, %r5, %r8, %r5; st.global.v2.u32 [%rd6], {%r6,%r7};",
                         {1, 1024, 0}, out, x);
    check(bad.empty(), "sums of halves run", bad.c_str());
    for (size_t n = 0; n < 2 * x.size(); n++) {
        uint32_t a = x[n / 2] >> n % 2 * 16 & 0xffff, b = (x[n / 2] ^ 353436678u) >> n % 2 * 16 & 0xffff,
                 c = x[n / 2] >> 3 >> n % 2 * 16 & 0xffff, sum = out[n / 2 * 2] >> n % 2 * 16 & 0xffff,
                 same = out[n / 2 * 2 + 1] >> n % 2 * 16 & 0xffff;
        double want = (double)ptx::f16_value(a) * (double)ptx::f16_value(b) + (double)ptx::f16_value(c);
        check(sum == nearest(want, ptx::f16_value, 0x7c00, 65520) && same == ((a & 0x7c00) == 0x7c00 ? 0x7fff : a),
              "sums of halves", ptx::format("%x, %x, %x: %x, %x", a, b, c, sum, same).c_str());
    }
}

// ---- each instruction that nvcc emits, alone

// The sources of a thread, a, b and c, are %rd11 to 13; their low 32 bits %r11 to 13 and %f11 to 13, their low 16 %rs1
// to 3; %fd1 is a's 32 bits as a double; %p2 is a < b, %p3 a < c, of 32 bits without sign; %rd17 the address of a. OUT
// is an address of 8 bytes, 0 at first, in which stands what the type of `to` writes there: the register of 4 of its
// kind (%rs4, %r4 is %r14: the first four are taken).
struct Sources {
    uint64_t a, b, c;
    uint32_t ua, ub, uc;
    int32_t sa, sb, sc;
    uint16_t ha, hb, hc;
    float fa, fb, fc;
    size_t n;  // the kernel's
};
struct Row {
    const char *to, *text;
    uint64_t (*want)(const Sources& x);
};
static uint64_t bits(float f) { return ptx::bits_as<uint32_t>(f); }
static float number(uint32_t b) { return ptx::bits_as<float>(b); }
static uint64_t low(int64_t v, int n) { return (uint64_t)v & (((uint64_t)1 << n) - 1); }
static float flushed(float f) { return isnan(f) || fabsf(f) >= 0x1p-126f ? f : copysignf(0, f); }
static uint64_t two_floats(float low, float high) { return bits(low) | bits(high) << 32; }
// The largest float that is at most a b + c, from the nearest one: the larger term first, what is left is exact enough.
static float below(float a, float b, float c) {
    __float128 p = (__float128)a * b, q = c, r = fmaf(a, b, c);
    bool first = (p < 0 ? -p : p) > (q < 0 ? -q : q);
    __float128 left = first ? (p - r) + q : (q - r) + p;
    if (r == 0 && p == -q && (p != 0 || signbit(a) != signbit(b) || signbit(c))) { return -0.0f; }
    return left < 0 ? nextafterf((float)r, -INFINITY) : (float)r;
}
static float larger(float a, float b) { return isnan(a) ? b : isnan(b) || a > b || (a == b && signbit(b)) ? a : b; }
#define ROW(TO, TEXT, WANT)                                                          \
    {                                                                                \
        TO, TEXT, []([[maybe_unused]] const Sources& x) -> uint64_t { return WANT; } \
    }
static const Row ROWS[] = {
    ROW("f32", "add.f32 %f14, %f11, %f12", bits(x.fa + x.fb)),
    ROW("f32", "sub.f32 %f14, %f11, %f12", bits(x.fa - x.fb)),
    ROW("f32", "mul.f32 %f14, %f11, %f12", bits(x.fa* x.fb)),
    ROW("f32", "neg.f32 %f14, %f11", x.ua ^ 0x80000000u),
    ROW("f32", "max.f32 %f14, %f11, %f12", bits(larger(x.fa, x.fb))),
    ROW("f32", "min.f32 %f14, %f11, %f12", bits(-larger(-x.fa, -x.fb))),
    ROW("f32", "fma.rn.f32 %f14, %f11, %f12, %f13", bits(fmaf(x.fa, x.fb, x.fc))),
    ROW("f32", "fma.rm.f32 %f14, %f11, %f12, %f13", bits(below(x.fa, x.fb, x.fc))),
    ROW("f32", "div.rn.f32 %f14, %f11, %f12", bits((float)((double)x.fa / x.fb))),
    ROW("f32", "div.approx.f32 %f14, %f11, %f12",
        bits((x.ub & 0x7fffffff) > 0x7e800000 && (x.ub & 0x7fffffff) < 0x7f800000
                 ? (isfinite(x.fa) ? number((x.ua ^ x.ub) & 0x80000000u) : NAN)
                 : (float)((double)x.fa / x.fb))),
    ROW("f32", "rcp.rn.f32 %f14, %f11", bits((float)(1 / (double)x.fa))),
    ROW("f32", "sqrt.rn.f32 %f14, %f11", bits((float)sqrt((double)x.fa))),
    ROW("f32", "ex2.approx.f32 %f14, %f11", bits((float)exp2((double)x.fa))),
    ROW("f32", "ex2.approx.ftz.f32 %f14, %f11", bits(flushed((float)exp2((double)x.fa)))),
    ROW("f32", "cvt.sat.f32.f32 %f14, %f11",
        bits(x.fa >= 1  ? 1
             : x.fa > 0 ? x.fa
                        : 0.0f)),
    ROW("f32", "cvt.rmi.f32.f32 %f14, %f11", bits((float)floor((double)x.fa))),
    ROW("f32", "cvt.rn.f32.s32 %f14, %r11", bits((float)x.sa)),
    ROW("f32", "cvt.f32.bf16 %f14, %rs1", (uint64_t)x.ha << 16),
    ROW("f32", "add.f64 %fd4, %fd1, 0d3E40000000000000; cvt.rn.f32.f64 %f14, %fd4",
        bits((float)((double)x.fa + 0x1p-27))),
    ROW("f32", "mov.b32 %f14, {0, %rs1}", (uint64_t)x.ha << 16),
    ROW("f32", "add.f32 %f14, %f11, 0fBF800000", bits(x.fa - 1)),
    ROW("b32", "cvt.rn.f16x2.f32 %r14, %f11, %f12", (uint64_t)ptx::f16_bits(x.fa) << 16 | ptx::f16_bits(x.fb)),
    ROW("b32", "cvt.rn.bf16x2.f32 %r14, %f11, %f12", (uint64_t)ptx::bf16_bits(x.fa) << 16 | ptx::bf16_bits(x.fb)),
    ROW("p", "setp.eq.f32 %p1, %f11, %f12", x.fa == x.fb),
    ROW("p", "setp.equ.f32 %p1, %f11, %f12", x.fa == x.fb || isnan(x.fa) || isnan(x.fb)),
    ROW("p", "setp.neu.f32 %p1, %f11, %f12", x.fa != x.fb),
    ROW("p", "setp.lt.f32 %p1, %f11, %f12", x.fa < x.fb),
    ROW("p", "setp.ge.f32 %p1, %f11, %f12", x.fa >= x.fb),
    ROW("p", "setp.ltu.f32 %p1, %f11, %f12", x.fa < x.fb || isnan(x.fa) || isnan(x.fb)),
    ROW("p", "setp.leu.f32 %p1, %f11, %f12", x.fa <= x.fb || isnan(x.fa) || isnan(x.fb)),
    ROW("p", "setp.geu.f32 %p1, %f11, %f12", x.fa >= x.fb || isnan(x.fa) || isnan(x.fb)),
    ROW("p", "setp.eq.s16 %p1, %rs1, %rs2", x.ha == x.hb),
    ROW("p", "setp.ne.s16 %p1, %rs1, %rs2", x.ha != x.hb),
    ROW("p", "setp.eq.b32 %p1, %r11, %r12", x.ua == x.ub),
    ROW("p", "setp.ne.s32 %p1, %r11, %r12", x.ua != x.ub),
    ROW("p", "setp.lt.s32 %p1, %r11, %r12", x.sa < x.sb),
    ROW("p", "setp.le.s32 %p1, %r11, %r12", x.sa <= x.sb),
    ROW("p", "setp.gt.s32 %p1, %r11, %r12", x.sa > x.sb),
    ROW("p", "setp.ge.s32 %p1, %r11, %r12", x.sa >= x.sb),
    ROW("p", "setp.lt.u32 %p1, %r11, %r12", x.ua < x.ub),
    ROW("p", "setp.le.u32 %p1, %r11, %r12", x.ua <= x.ub),
    ROW("p", "setp.gt.u32 %p1, %r11, %r12", x.ua > x.ub),
    ROW("p", "setp.ge.u32 %p1, %r11, %r12", x.ua >= x.ub),
    ROW("p", "setp.eq.b64 %p1, %rd11, %rd12", x.a == x.b),
    ROW("p", "setp.ne.s64 %p1, %rd11, %rd12", x.a != x.b),
    ROW("p", "setp.lt.s64 %p1, %rd11, %rd12", (int64_t)x.a < (int64_t)x.b),
    ROW("p", "setp.lt.u64 %p1, %rd11, %rd12", x.a < x.b),
    ROW("p", "setp.ge.u64 %p1, %rd11, %rd12", x.a >= x.b),
    ROW("p", "and.pred %p1, %p2, %p3", x.ua < x.ub && x.ua < x.uc),
    ROW("p", "or.pred %p1, %p2, %p3", x.ua < x.ub || x.ua < x.uc),
    ROW("p", "not.pred %p1, %p2", x.ua >= x.ub),
    ROW("p", "mov.pred %p1, %p2", x.ua < x.ub),
    ROW("p", "mov.pred %p1, %p2; @%p3 mov.pred %p1, 0", x.ua < x.ub && x.ua >= x.uc),
    ROW("p", "mov.pred %p1, -1; @!%p3 setp.lt.u32 %p1, %r11, %r12", x.ua < x.uc || x.ua < x.ub),
    ROW("b16", "add.s16 %rs4, %rs1, -3", low(x.ha - 3, 16)),
    ROW("b16", "sub.s16 %rs4, %rs1, %rs2", low(x.ha - x.hb, 16)),
    ROW("b16", "mul.lo.s16 %rs4, %rs1, %rs2", low((int64_t)x.ha* x.hb, 16)),
    ROW("b16", "mad.lo.s16 %rs4, %rs1, %rs2, %rs3", low((int64_t)x.ha* x.hb + x.hc, 16)),
    ROW("b16", "mul.hi.u16 %rs4, %rs1, %rs2", (uint64_t)x.ha* x.hb >> 16),
    ROW("b16", "and.b16 %rs4, %rs1, %rs2", x.ha& x.hb),
    ROW("b16", "or.b16 %rs4, %rs1, %rs2", x.ha | x.hb),
    ROW("b16", "shl.b16 %rs4, %rs1, %r12", x.ub > 15 ? 0 : low((int64_t)x.ha << x.ub, 16)),
    ROW("b16", "shr.u16 %rs4, %rs1, %r12", x.ub > 15 ? 0 : x.ha >> x.ub),
    ROW("b16", "selp.u16 %rs4, %rs1, %rs2, %p2", x.ua < x.ub ? x.ha : x.hb),
    ROW("b16", "mov.u16 %rs4, %rs1", x.ha),
    ROW("b16", "cvt.u16.u32 %rs4, %r11", x.ha),
    ROW("b16", "cvt.u16.u64 %rs4, %rd11", x.ha),
    ROW("b16", "mov.b32 {%rs5, %rs4}, %r11", x.ua >> 16),
    ROW("b16", "ld.global.v4.u16 {%rs5, %rs6, %rs4, %rs7}, [%rd17]", x.a >> 32 & 0xffff),
    ROW("b16", "cvt.rn.bf16.f32 %rs4, %f11", ptx::bf16_bits(x.fa)),
    ROW("b32", "add.s32 %r14, %r11, %r12", low((int64_t)x.sa + x.sb, 32)),
    ROW("b32", "sub.s32 %r14, %r11, %r12", low((int64_t)x.sa - x.sb, 32)),
    ROW("b32", "mul.lo.s32 %r14, %r11, %r12", low((int64_t)x.sa* x.sb, 32)),
    ROW("b32", "mad.lo.s32 %r14, %r11, %r12, %r13", low((int64_t)x.sa* x.sb + x.sc, 32)),
    ROW("b32", "mul.hi.s32 %r14, %r11, %r12", low((int64_t)x.sa* x.sb >> 32, 32)),
    ROW("b32", "mul.hi.u32 %r14, %r11, %r12", (uint64_t)x.ua* x.ub >> 32),
    ROW("b32", "mul.wide.u16 %r14, %rs1, %rs2", (uint64_t)x.ha* x.hb),
    ROW("b32", "or.b32 %r12, %r12, 1; div.s32 %r14, %r11, %r12", low((int64_t)x.sa / (x.sb | 1), 32)),
    ROW("b32", "or.b32 %r12, %r12, 1; rem.s32 %r14, %r11, %r12", low((int64_t)x.sa % (x.sb | 1), 32)),
    ROW("b32", "or.b32 %r12, %r12, 1; div.u32 %r14, %r11, %r12", x.ua / (x.ub | 1)),
    ROW("b32", "or.b32 %r12, %r12, 1; rem.u32 %r14, %r11, %r12", x.ua % (x.ub | 1)),
    ROW("b32", "max.s32 %r14, %r11, %r12", (uint32_t)std::max(x.sa, x.sb)),
    ROW("b32", "min.s32 %r14, %r11, %r12", (uint32_t)std::min(x.sa, x.sb)),
    ROW("b32", "max.u32 %r14, %r11, %r12", std::max(x.ua, x.ub)),
    ROW("b32", "neg.s32 %r14, %r11", low(-(int64_t)x.sa, 32)),
    ROW("b32", "not.b32 %r14, %r11", x.ua ^ 0xffffffffu),
    ROW("b32", "and.b32 %r14, %r11, %r12", x.ua& x.ub),
    ROW("b32", "or.b32 %r14, %r11, %r12", x.ua | x.ub),
    ROW("b32", "xor.b32 %r14, %r11, %r12", x.ua ^ x.ub),
    ROW("b32", "shl.b32 %r14, %r11, %r12", x.ub > 31 ? 0 : low((int64_t)x.ua << x.ub, 32)),
    ROW("b32", "shr.s32 %r14, %r11, %r12", low((int64_t)x.sa >> std::min(x.ub, 63u), 32)),
    ROW("b32", "shr.u32 %r14, %r11, %r12", x.ub > 31 ? 0 : x.ua >> x.ub),
    ROW("b32", "bfe.u32 %r14, %r11, %r12, %r13",
        (x.ub & 255) > 31 ? 0 : x.ua >> (x.ub & 255) & low(-1, std::min<int>(x.uc & 255, 32))),
    ROW("b32", "bfi.b32 %r14, %r11, %r13, %r12, 14",
        (x.ub & 255) > 31 ? x.uc : low((x.uc & ~(16383ull << (x.ub & 255))) | (x.ua & 16383ull) << (x.ub & 255), 32)),
    ROW("b32", "selp.s32 %r14, %r11, 9, %p2", x.ua < x.ub ? x.ua : 9),
    ROW("b32", "cvt.u32.u16 %r14, %rs1", x.ha),
    ROW("b32", "cvt.u32.u64 %r14, %rd11", x.ua),
    ROW("b32", "mov.b32 %r14, {%rs1, %rs2}", x.ha | (uint32_t)x.hb << 16),
    ROW("b32", "mov.u32 %r14, %r11; @%p2 mov.u32 %r14, %r12", x.ua < x.ub ? x.ub : x.ua),
    ROW("b32", "mov.b64 {%r15, %r14}, %rd11", x.a >> 32),
    ROW("b32", "ld.global.v4.f32 {%f5, %f6, %f14, %f7}, [%rd17]; mov.b32 %r14, %f14", x.ub),
    ROW("b32", "ld.global.u16 %r14, [%rd17+2]", x.ua >> 16),
    ROW("b32", "ld.param.s8 %r14, [n+1]", low((int8_t)(x.n >> 8), 32)),
    ROW("b64", "add.s64 %rd14, %rd11, %rd12", x.a + x.b),
    ROW("b64", "sub.s64 %rd14, %rd11, %rd12", x.a - x.b),
    ROW("b64", "mul.lo.s64 %rd14, %rd11, %rd12", x.a* x.b),
    ROW("b64", "mad.lo.s64 %rd14, %rd11, %rd12, %rd13", x.a* x.b + x.c),
    ROW("b64", "mul.wide.s32 %rd14, %r11, %r12", (uint64_t)((int64_t)x.sa* x.sb)),
    ROW("b64", "mul.wide.u32 %rd14, %r11, %r12", (uint64_t)x.ua* x.ub),
    ROW("b64", "or.b64 %rd12, %rd12, 1; div.u64 %rd14, %rd11, %rd12", x.a / (x.b | 1)),
    ROW("b64", "and.b64 %rd14, %rd11, %rd12", x.a& x.b),
    ROW("b64", "or.b64 %rd14, %rd11, %rd12", x.a | x.b),
    ROW("b64", "shl.b64 %rd14, %rd11, %r12", x.ub > 63 ? 0 : x.a << x.ub),
    ROW("b64", "shr.u64 %rd14, %rd11, %r12", x.ub > 63 ? 0 : x.a >> x.ub),
    ROW("b64", "selp.b64 %rd14, %rd11, %rd12, %p2", x.ua < x.ub ? x.a : x.b),
    ROW("b64", "cvt.s64.s32 %rd14, %r11", (uint64_t)(int64_t)x.sa),
    ROW("b64", "cvt.u64.u32 %rd14, %r11", x.ua),
    ROW("b64", "cvt.u64.u16 %rd14, %rs1", x.ha),
    ROW("b64", "mov.b64 %rd14, {%r11, %r12}", x.ua | (uint64_t)x.ub << 32),
    ROW("b64", "cvta.to.global.u64 %rd14, %rd11", x.a),
    ROW("b64", "ld.global.s32 %rd14, [%rd17]", (uint64_t)(int64_t)x.sa),
    ROW("b64",
        "shl.b32 %r15, %r2, 4; add.s32 %r15, %r15, %r3; cp.async.cg.shared.global [%r15], [%rd17], 16, 12; "
        "cp.async.commit_group; cp.async.wait_group 0; ld.shared.u64 %rd14, [%r15+8]",
        x.ub),
    ROW("b32",
        "shl.b32 %r15, %r2, 4; add.s32 %r15, %r15, %r3; st.shared.u32 [%r15], %r11; add.s32 %r16, %r15, -32768; "
        "ld.shared.u32 %r14, [%r16+32768]",
        x.ua),
    ROW("p", "setp.ne.s32 %p1, %r2, %r2; shfl.sync.bfly.b32 %r14|%p1, %r11, 5, 31, -1", 1),
    ROW("b32", "cvt.u16.u32 %r14, %r11", x.ha),
    ROW("b32", "cvt.s16.s32 %r14, %r11", low((int16_t)x.ha, 32)),
    ROW("", "st.global.u8 [OUT+1], %r11; st.global.u16 [OUT+2], %rs2", low(x.ha, 8) << 8 | (uint64_t)x.hb << 16),
    ROW("", "st.global.v4.u16 [OUT], {%rs1, %rs2, %rs3, 7}",
        x.ha | (uint64_t)x.hb << 16 | (uint64_t)x.hc << 32 | 7ull << 48),
    ROW("", "st.global.u32 [OUT], %r11; @%p2 st.global.u32 [OUT+4], %r12", x.ua | (x.ua < x.ub ? x.b << 32 : 0)),
    ROW("", "atom.global.max.u32 %r14, [OUT], %r11; atom.global.max.u32 %r14, [OUT], %r12; st.global.u32 [OUT+4], %r14",
        std::max(x.ua, x.ub) | x.a << 32),
    ROW("", "atom.global.add.f32 %f14, [OUT], %f11; atom.global.add.f32 %f14, [OUT], %f12; st.global.f32 [OUT+4], %f14",
        two_floats(flushed(0 + flushed(x.fa) + flushed(x.fb)), flushed(0 + flushed(x.fa)))),
    ROW("", "red.relaxed.gpu.global.add.v2.f32 [OUT], {%f11, %f12}",
        two_floats(flushed(0 + flushed(x.fa)), flushed(0 + flushed(x.fb)))),
};
static void test_instructions() {
    const size_t n = sizeof ROWS / sizeof *ROWS, threads = 1024;
    static const uint32_t special[] = {
        0,          1,          2,          15,         16,         17,         31,         32,         63,
        64,         0x41,       0x110,      0x7fff,     0x8000,     0xffff,     0x10000,    0x7fffffff, 0x80000000,
        0x80000001, 0xffffffff, 0x00800000, 0x007fffff, 0x3f800000, 0xbf800000, 0x3f000000, 0x7f800000, 0xff800000,
        0x7fc00000, 0x7e800000, 0x7e800001, 0xff7fffff, 0x7f7fffff, 0xc2fc0000, 0x43000000, 0x33800000, 0xc3020000};
    auto any = [&] {
        return random_bits() % 2 ? special[random_bits() % (sizeof special / 4)] : (uint32_t)random_bits();
    };
    std::vector<uint64_t> in(4 * threads), out(n * threads);
    for (size_t i = 0; i < in.size(); i++) {
        bool same = i % 4 == 1 && random_bits() % 8 == 0;
        in[i] = same ? in[i - 1] ^ (random_bits() % 2 << 31) : any() | (uint64_t)(random_bits() % 2 ? any() : 0) << 32;
        if (i % 4 && random_bits() % 4 == 0) { in[i] = random_bits() % 70; }  // a distance to shift by
    }
    string body =
        ptx::format("mul.wide.u32 %%rd5, %%r2, 32; add.s64 %%rd17, %%rd2, %%rd5; mul.wide.u32 %%rd5, %%r2, %zu; "
                    "add.s64 %%rd16, %%rd1, %%rd5;\n",
                    8 * n);
    for (size_t k = 0; k < n; k++) {
        string at = ptx::format("%%rd16+%zu", 8 * k), to = ROWS[k].to, text = ROWS[k].text;
        for (size_t o; (o = text.find("OUT")) != string::npos;) { text.replace(o, 3, at); }
        for (const char* plus : {"+1]", "+2]", "+4]"}) {  // of an address that has an offset already
            for (size_t o; (o = text.find(at + plus)) != string::npos;) {
                text.replace(o, at.size() + 3, ptx::format("%%rd16+%zu]", 8 * k + (size_t)(plus[1] - '0')));
            }
        }
        body += "ld.global.u64 %rd11, [%rd17]; ld.global.u64 %rd12, [%rd17+8]; ld.global.u64 %rd13, [%rd17+16];"
                "ld.global.u32 %r11, [%rd17]; ld.global.u32 %r12, [%rd17+8]; ld.global.u32 %r13, [%rd17+16];"
                "ld.global.f32 %f11, [%rd17]; ld.global.f32 %f12, [%rd17+8]; ld.global.f32 %f13, [%rd17+16];"
                "ld.global.u16 %rs1, [%rd17]; ld.global.u16 %rs2, [%rd17+8]; ld.global.u16 %rs3, [%rd17+16];"
                "setp.lt.u32 %p2, %r11, %r12; setp.lt.u32 %p3, %r11, %r13; cvt.f64.f32 %fd1, %f11;\n" +
                text + ";";
        if (to == "p") { body += "selp.b32 %r14, 1, 0, %p1;"; }
        if (!to.empty()) {
            body += "st.global." + (to == "p" ? "b32" : to) + " [" + at + "], " +
                    (to == "f32"   ? "%f14"
                     : to == "b64" ? "%rd14"
                     : to == "b16" ? "%rs4"
                                   : "%r14") +
                    ";\n";
        }
    }
    string bad = execute(body, {1, threads, 16 * threads}, out, in);
    check(bad.empty(), "each instruction runs", bad.c_str());
    for (size_t i = 0; i < n * threads && bad.empty(); i++) {
        const uint64_t* s = &in[i / n * 4];
        Sources x = {s[0],
                     s[1],
                     s[2],
                     (uint32_t)s[0],
                     (uint32_t)s[1],
                     (uint32_t)s[2],
                     (int32_t)s[0],
                     (int32_t)s[1],
                     (int32_t)s[2],
                     (uint16_t)s[0],
                     (uint16_t)s[1],
                     (uint16_t)s[2],
                     number((uint32_t)s[0]),
                     number((uint32_t)s[1]),
                     number((uint32_t)s[2]),
                     out.size()};
        const Row& r = ROWS[i % n];
        uint64_t want = r.want(x), got = out[i];
        bool sum = strstr(r.text, ".add."), good = got == want;
        for (int half = 0; half < 2 && !good && (sum || !strcmp(r.to, "f32")); half++) {  // NaN has many forms
            uint32_t g = (uint32_t)(got >> 32 * half), v = (uint32_t)(want >> 32 * half);
            if (g != v && !(isnan(number(g)) && isnan(number(v)))) { break; }
            good = half == 1;
        }
        if (!good) {
            check(false, r.text,
                  ptx::format("%llx %llx %llx: %llx, not %llx", (unsigned long long)x.a, (unsigned long long)x.b,
                              (unsigned long long)x.c, (unsigned long long)got, (unsigned long long)want)
                      .c_str());
            break;
        }
    }
    check(true, "each instruction");
}
// Whatever is not known is refused when a kernel is decoded, by name.
static void test_refusals() {
    static const char unknown[] = R"(
        { .reg .b32 x; mov.u32 x, 1; } mov.u32 %r5, x; sad.u32 %r5, %r2, %r2, %r2; add.s32 %r5, %rd1, %r2;
        add.sat.s32 %r5, %r2, %r2; add.cc.s32 %r5, %r2, %r2; add.ftz.f32 %f1, %f2, %f3; add.rz.f32 %f1, %f2, %f3;
        mul.sat.f32 %f1, %f2, %f3; fma.rz.f32 %f1, %f2, %f3, %f4; fma.rn.ftz.f32 %f1, %f2, %f3, %f4;
        fma.rn.relu.f16x2 %r5, %r6, %r7, %r8; max.NaN.f32 %f1, %f2, %f3; min.ftz.f32 %f1, %f2, %f3;
        rcp.approx.f32 %f1, %f2; rsqrt.approx.f32 %f1, %f2; lg2.approx.f32 %f1, %f2; div.full.f32 %f1, %f2, %f3;
        div.approx.ftz.f32 %f1, %f2, %f3; sqrt.approx.f32 %f1, %f2; ex2.approx.f16x2 %r5, %r6; abs.f32 %f1, %f2;
        mul24.lo.s32 %r5, %r6, %r7; mad.wide.s32 %rd5, %r6, %r7, %rd6; mad.hi.s32 %r5, %r6, %r7, %r8;
        mul.hi.s64 %rd5, %rd6, %rd7; bfe.s32 %r5, %r6, %r7, %r8; bfi.b64 %rd5, %rd6, %rd7, %r7, %r8;
        lop3.b32 %r5, %r6, %r7, %r8, 1; prmt.b32 %r5, %r6, %r7, 1; shf.l.wrap.b32 %r5, %r6, %r7, %r8;
        popc.b32 %r5, %r6; clz.b32 %r5, %r6; xor.pred %p1, %p2, %p3; mov.x.b32 %r5, %r6;
        selp.x.b32 %r5, %r6, %r7, %p1; setp.lt.and.f32 %p1, %f1, %f2, %p2; setp.ltu.ftz.f32 %p1, %f1, %f2;
        setp.num.f32 %p1, %f1, %f2; setp.lo.u32 %p1, %r5, %r6; setp.ltu.s32 %p1, %r5, %r6;
        setp.lt.f64 %p1, %fd1, %fd2; setp.lt.s32 %p1|%p2, %r5, %r6; set.lt.u32.s32 %r5, %r6, %r7;
        cvt.rz.f32.f64 %f1, %fd1; cvt.rni.f32.f32 %f1, %f2; cvt.rzi.s32.f32 %r5, %f2; cvt.rn.ftz.f32.f64 %f1, %fd1;
        cvt.rn.relu.f16x2.f32 %r5, %f1, %f2; cvt.rz.bf16x2.f32 %r5, %f1, %f2; cvt.sat.s32.u32 %r5, %r6;
        cvt.f32.s32 %f1, %r5; cvt.u32.u64 %rs1, %rd1; ld.u32 %r5, [%rd1]; ld.volatile.global.u32 %r5, [%rd1];
        ld.global.nc.u32 %r5, [%rd1]; ld.relaxed.gpu.global.u32 %r5, [%rd1]; ld.const.u32 %r5, [%rd1];
        ld.local.u32 %r5, [%rd1]; ld.global.b128 %rd5, [%rd1]; ld.global.u64 %r5, [%rd1]; ld.param.u32 %r5, [n+4];
        ld.param.u64 %rd5, [m]; ld.global.u32 %r5, [%rd1+bytes]; ld.global.u32 %r5, [%r1]; ld.shared.u32 %r5, [%rs1];
        ld.global.v2.u32 {%r5}, [%rd1]; st.param.u32 [n], %r5; st.global.wb.u32 [%rd1], %r5;
        st.global.u64 [%rd1], %r5; cvta.shared.u64 %rd5, %rd6; cvta.to.shared.u64 %rd5, %rd6;
        cvta.global.u64 %rd5, %rd6; atom.global.cas.b32 %r5, [%rd1], %r6, %r7; atom.global.add.u32 %r5, [%rd1], %r6;
        atom.shared.add.f32 %f1, [%r3], %f2; atom.global.max.s32 %r5, [%rd1], %r6;
        red.acquire.gpu.global.add.f32 [%rd1], %f1; red.relaxed.sys.global.add.f32 [%rd1], %f1;
        red.relaxed.gpu.global.add.v4.f32 [%rd1], {%f1, %f2, %f3, %f4}; atom.global.add.noftz.f16x2 %r5, [%rd1], %r6;
        bar.sync 1; bar.sync 0, 64; bar.arrive 0, 64; bar.arrive 0; bar.red.popc.u32 %r5, 0, %p1; barrier.sync 0;
        bra.far end; bra end; ret.far; exit; trap; call f; membar.gl; fence.acq_rel.gpu; nanosleep.u32 5;
        shfl.sync.idx.b32 %r5, %r6, 0, 31, -1; shfl.sync.down.b32 %r5, %r6, 1, 31, -1; shfl.bfly.b32 %r5, %r6, 1, 31;
        vote.sync.any.pred %p1, %p2, -1; activemask.b32 %r5; redux.sync.add.s32 %r5, %r6, -1;
        match.any.sync.b32 %r5, %r6, -1; mov.u32 %r5, %laneid; mov.u32 %r5, %tid.y; mov.u32 %r5, %clock;
        mov.u64 %rd5, %tid.x; mov.u32 %r5, 1u; mov.f32 %f1, 0d3FF0000000000000;
        cp.async.ca.shared.global [%r3], [%rd1], 16, 16; cp.async.cg.shared.global [%r3], [%rd1], 8, 8;
        cp.async.cg.shared.global [%r3], [%rd1], 16; cp.async.cg.shared.global.L2::128B [%r3], [%rd1], 16, 16;
        cp.async.wait_all; cp.async.bulk.commit_group; cp.async.mbarrier.arrive.shared.b64 [%r3];
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r5, %r6}, [%r3];
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r3];
        mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r5,%r6}, {%r7}, {%f1,%f2,%f3,%f4};
        mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r8,%r9}, {%r4,%r5,%r6,%r7}, {%r10,%r11}, {%r8,%r9};
        .local .align 4 .b8 depot[4]; .reg .b128 %x; .reg .u8 %x;)";
    for (const string& text : ptx::split(unknown, ';')) {
        ptx::Module module;
        string got;
        try {
            module.parse(kernel_text(text + ";"));
            module.kernel("k");
        } catch (ptx::Fault& f) { got = f.text; }
        check(got.find(": line ") != string::npos, "what is not known is refused",
              got.empty() ? text.c_str() : got.c_str());
    }
}
// A loop of another length in each lane, and a warp's sum of what came out.
static void test_divergence() {
    std::vector<int> x(64), out(64);
    for (int& v : x) { v = 1 + (int)(random_bits() % 1000); }
    string sum;
    for (int o = 16; o; o /= 2) {
        sum += ptx::format("shfl.sync.bfly.b32 %%r9|%%p3, %%r7, %d, 31, -1; add.s32 %%r7, %%r7, %%r9;", o);
    }
    string bad = execute("ld.global.u32 %r5, [%rd4]; mov.u32 %r7, 0; again: setp.eq.s32 %p1, %r5, 1; @%p1 bra done; "
                         "and.b32 %r6, %r5, 1; setp.eq.s32 %p2, %r6, 0;"
                         "@%p2 bra even; mad.lo.s32 %r5, %r5, 3, 1; bra.uni next; even: shr.u32 %r5, %r5, 1; next: "
                         "add.s32 %r7, %r7, 1; bra again;"
                         "done: and.b32 %r6, %r7, 1; mad.lo.s32 %r7, %r7, 64, %r6;" +
                             sum + "st.global.u32 [%rd3], %r7;",
                         {1, 64, 0}, out, x);
    check(bad.empty(), "divergence runs", bad.c_str());
    for (int w = 0; w < 2; w++) {
        int steps = 0, odd = 0;
        for (int l = 0; l < 32; l++) {
            int n = 0;
            for (int v = x[(size_t)(32 * w + l)]; v != 1; n++) { v = v & 1 ? 3 * v + 1 : v / 2; }
            steps += n, odd += n & 1;
        }
        for (int l = 0; l < 32; l++) { check(out[(size_t)(32 * w + l)] == 64 * steps + odd, "divergence"); }
    }
}

// ---- against the emulator: c (16,8) = a (16,16) b (16,8), a through ldmatrix, b through ldmatrix_transposed, and b's
// left top 8x8 transposed

template <typename T> static __global__ void product_kernel(float* c, const T* in) {  // c: 128 sums, then 32 pairs
    DYNAMIC_SHARED(T, s);
    int l = (int)threadIdx.x;
    unsigned x[4], y[4], pair;
    for (int t = l; t < 48; t += 32) { copy_async(s + 8 * t, in + 8 * t, t != 47); }  // the last row of b is zero
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    ldmatrix(x, s + l % 16 * 16 + l / 16 * 8);
    ldmatrix_transposed(y, s + 256 + l % 16 * 8);
    float r[4] = {1, 2, 3, 4};
    if (std::is_same<T, __half>::value) {
        mma_half(r, x, y[0], y[1]);
    } else {
        mma_bf16(r, x, y[0], y[1]);
    }
    for (int e = 0; e < 4; e++) { c[(l / 4 + e / 2 * 8) * 8 + l % 4 * 2 + e % 2] = r[e]; }
    pair = transpose8(y[0]);
    memcpy(&c[128 + l], &pair, 4);
}
static const char* const PRODUCT =
    "shl.b32 %r5, %r2, 4; cvt.u64.u32 %rd6, %r5; add.s64 %rd7, %rd2, %rd6; add.s32 %r6, %r3, %r5; "
    "cp.async.cg.shared.global [%r6], [%rd7], 16, 16;"
    "setp.gt.u32 %p1, %r2, 15; @%p1 bra copied; setp.eq.s32 %p2, %r2, 15; selp.b32 %r7, 0, 16, %p2; "
    "cp.async.cg.shared.global [%r6+512], [%rd7+512], 16, %r7;"
    "copied: cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1;"
    "and.b32 %r8, %r2, 15; shr.u32 %r9, %r2, 4; shl.b32 %r10, %r8, 5; shl.b32 %r9, %r9, 4; add.s32 %r10, %r10, %r9; "
    "add.s32 %r10, %r10, %r3;"
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r11,%r12,%r13,%r14}, [%r10]; shl.b32 %r10, %r8, 4; add.s32 %r10, %r10, "
    "%r3;"
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r15,%r16,%r17,%r18}, [%r10+512]; mov.f32 %f1, 0f3F800000; "
    "mov.f32 %f2, 0f40000000;"
    "mov.f32 %f3, 0f40400000; mov.f32 %f4, 0f40800000; mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 "
    "{%f1,%f2,%f3,%f4}, {%r11,%r12,%r13,%r14}, {%r15,%r16}, {%f1,%f2,%f3,%f4};"
    "movmatrix.sync.aligned.m8n8.trans.b16 %r19, %r15; shr.u32 %r20, %r2, 2; and.b32 %r21, %r2, 3; mul.lo.s32 %r20, "
    "%r20, 32; mad.lo.s32 %r20, %r21, 8, %r20;"
    "cvt.u64.u32 %rd8, %r20; add.s64 %rd8, %rd1, %rd8; st.global.v2.f32 [%rd8], {%f1,%f2}; st.global.v2.f32 "
    "[%rd8+256], {%f3,%f4}; st.global.u32 [%rd3+512], %r19;";

template <typename T> static void test_product(const string& type) {
    std::vector<T> in(384);
    std::vector<float> out(160), cut(160);
    string text = PRODUCT;
    for (T& v : in) { v = (T)((float)((int)random_bits() >> 8) * 0x1p-22f); }
    for (size_t at; (at = text.find("TYPE")) != string::npos;) { text.replace(at, 4, type); }
    string bad = execute(text, {1, 32, 768}, out, in) + execute(text, {1, 32, 768}, cut, in, true);
    check(bad.empty(), "a product runs", bad.c_str());
    float* c;
    T* device;
    cudaMalloc(&c, 160 * sizeof *c), cudaMalloc(&device, in.size() * sizeof(T));
    memcpy((void*)device, in.data(), in.size() * sizeof(T));
    LAUNCH(product_kernel<T>, 1, 32, 768, NULL, c, device);
    double worst = 0, worst_emulated = 0, worst_cut = 0;
    for (int at = 0; at < 128; at++) {
        double sum = at / 8 < 8 ? 1 + at % 2 : 3 + at % 2;
        for (int k = 0; k < 15; k++) {
            sum += (double)(float)in[(size_t)(at / 8 * 16 + k)] * (double)(float)in[(size_t)(256 + k * 8 + at % 8)];
        }
        worst = std::max(worst, fabs(out[(size_t)at] - sum)),
        worst_emulated = std::max(worst_emulated, fabs((double)out[(size_t)at] - c[at]));
        worst_cut = std::max(worst_cut, fabs(cut[(size_t)at] - sum));
    }
    check(worst < 4e-6, "mma sums exactly",
          ptx::format("%s: %g", type.c_str(), worst).c_str());  // half a unit of sums up to 60
    check(worst_emulated < 4e-5, "the emulator's mma", ptx::format("%s: %g", type.c_str(), worst_emulated).c_str());
    check(worst_cut > worst && worst_cut < 4e-5, "truncated sums",
          ptx::format("%s: %g", type.c_str(), worst_cut).c_str());
    check(memcmp(&out[128], c + 128, 128) == 0, "the emulator's ldmatrix, movmatrix and copies", type.c_str());
    cudaFree(c), cudaFree(device);
}

// ---- planted faults

struct Planted {
    const char *name, *wanted;
    Threads threads;
    const char* body;
};
#define COPY                                                                                        \
    "shl.b32 %r5, %r2, 4; cvt.u64.u32 %rd6, %r5; add.s64 %rd7, %rd2, %rd6; add.s32 %r6, %r3, %r5; " \
    "cp.async.cg.shared.global [%r6], [%rd7], 16, 16; cp.async.commit_group;"
#define NEIGHBOUR                                                                                                \
    "xor.b32 %r7, %r2, 33; shl.b32 %r7, %r7, 4; add.s32 %r7, %r7, %r3; ld.shared.f32 %f1, [%r7]; st.global.f32 " \
    "[%rd3], %f1;"
#define STORE "st.shared.u32 [%r4], %r2;"
#define HALF "setp.gt.u32 %p1, %r2, 15; "
#define SHUFFLE "shfl.sync.bfly.b32 %r5, %r2, "
#define MATRICES "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5,%r6,%r7,%r8}, "
static const Planted PLANTED[] = {
    {"copies that are right", "", {1, 64, 1024}, COPY "cp.async.wait_group 0; bar.sync 0;" NEIGHBOUR},
    {"no wait for copies", "has not yet brought", {1, 64, 1024}, COPY "bar.sync 0;" NEIGHBOUR},
    {"a wait for all but one copy",
     "has not yet brought",
     {1, 64, 1024},
     COPY "cp.async.wait_group 1; bar.sync 0;" NEIGHBOUR},
    {"no barrier after copies", "RACE of warps in shared", {1, 64, 1024}, COPY "cp.async.wait_group 0;" NEIGHBOUR},
    {"a write where a copy goes", "writes where a cp.async still may", {1, 64, 1024}, COPY "st.shared.u32 [%r6], %r2;"},
    {"copies in flight at the end", "returns with copies in flight", {1, 64, 1024}, COPY},
    {"beyond shared memory",
     "shared address 256 of 4 bytes, there are 256",
     {1, 64, 256},
     "st.shared.u32 [%r4+4], %r2;"},
    // so far that it lies in the other allocation by no chance
    {"beyond global memory", "in no allocation", {1, 64, 0}, "st.global.u32 [%rd3+100000000], %r2;"},
    {"misaligned", "misaligned shared address", {1, 64, 1024}, "ld.shared.v2.f32 {%f1,%f2}, [%r4];"},
    {"a barrier for one warp of two",
     "a barrier that 1 of 2 warps reach",
     {1, 64, 0},
     "setp.gt.u32 %p1, %r2, 31; @%p1 bra end; bar.sync 0; end:"},
    {"a barrier for half a warp",
     "a barrier after lanes of the warp have returned",
     {1, 32, 0},
     "setp.gt.u32 %p1, %r2, 15; @%p1 ret; bar.sync 0;"},
    {"a shuffle for half of its mask",
     "of the mask have returned",
     {1, 32, 0},
     "setp.gt.u32 %p1, %r2, 15; @%p1 bra end; shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1; end:"},
    {"a shuffle from outside of its mask",
     "takes no part",
     {1, 32, 0},
     "setp.gt.u32 %p1, %r2, 15; @%p1 bra end; shfl.sync.bfly.b32 %r5, %r2, 16, 31, 65535; end:"},
    {"no barrier", "RACE of warps in shared", {1, 64, 256}, STORE "xor.b32 %r5, %r4, 128; ld.shared.u32 %r6, [%r5];"},
    {"no bar.warp.sync", "RACE of lanes without", {1, 64, 256}, STORE "xor.b32 %r5, %r4, 4; ld.shared.u32 %r6, [%r5];"},
    {"bar.warp.sync", "", {1, 64, 256}, STORE "bar.warp.sync -1; xor.b32 %r5, %r4, 4; ld.shared.u32 %r6, [%r5];"},
    {"all lanes to one place", "RACE of lanes of one instruction", {1, 32, 256}, "st.shared.u32 [%r3], %r2;"},
    {"two blocks to one place", "RACE of blocks in global", {2, 64, 0}, "st.global.u32 [%rd3], %r2;"},
    {"a block writes what another reads",
     "RACE of blocks in global",
     {2, 64, 0},
     "ld.global.u32 %r5, [%rd3]; mov.u32 %r6, %ctaid.x; setp.eq.s32 %p1, %r6, 0; @%p1 bra end; st.global.u32 [%rd3], "
     "%r2; end:"},
    {"shared memory that nobody wrote", "before it is written", {1, 64, 256}, "ld.shared.u32 %r5, [%r4];"},
    {"sums of two, of which one is another's",
     "float atomics of several threads",
     {1, 2, 0},
     "setp.eq.s32 %p1, %r2, 0; mov.f32 %f1, 0f3F800000; @%p1 red.relaxed.gpu.global.add.v2.f32 [%rd1], {%f1,%f1}; "
     "@!%p1 atom.global.add.f32 %f2, [%rd1+4], %f1;"},
    {"a write where two have read",
     "RACE of warps in shared",
     {1, 64, 256},
     STORE "bar.sync 0; ld.shared.u32 %r5, [%r3]; setp.eq.s32 %p1, %r2, 63; @%p1 st.shared.u32 [%r3], %r5;"},
    {"a block writes what another copies",
     "RACE of blocks in global",
     {2, 1, 16},
     "cp.async.cg.shared.global [%r3], [%rd1], 16, 16; cp.async.commit_group; cp.async.wait_group 0; "
     "mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r5, 1; @%p1 st.global.u32 [%rd1], %r2;"},
    {"shared memory that another block wrote",
     "before it is written",
     {2, 1, 16},
     "mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r5, 0; @%p1 st.shared.u32 [%r4], %r2; @!%p1 ld.shared.u32 %r6, [%r4];"},
    {"the last numbers and what is behind",
     "in no allocation",
     {1, 1, 0},
     "ld.global.v4.f32 {%f1,%f2,%f3,%f4}, [%rd2+4080];"},
    {"a sum without an order",
     "float atomics of several threads",
     {1, 64, 0},
     "mov.f32 %f1, 0f3F800000; red.relaxed.gpu.global.add.f32 [%rd1], %f1;"},
    {"atomics, read behind a barrier",
     "",
     {1, 64, 0},
     "atom.global.max.u32 %r5, [%rd1], %r2; bar.sync 0; ld.global.u32 %r6, [%rd1];"},
    {"atomics, read without a barrier",
     "RACE of warps in global",
     {1, 64, 0},
     "atom.global.max.u32 %r5, [%rd1], %r2; ld.global.u32 %r6, [%rd1];"},
    {"atomics of two blocks, read by one",
     "RACE of blocks in global",
     {2, 64, 0},
     "atom.global.max.u32 %r5, [%rd1], %r2; bar.sync 0; ld.global.u32 %r6, [%rd1];"},
    {"an atomic where another thread writes",
     "RACE of warps in global",
     {1, 64, 0},
     "st.global.u32 [%rd3], %r2; xor.b32 %r5, %r2, 33; mul.wide.u32 %rd6, %r5, 4; add.s64 %rd6, %rd1, %rd6; "
     "atom.global.max.u32 %r6, [%rd6], %r2;"},
    {"bra.uni that diverges", "bra.uni diverges", {1, 32, 0}, HALF "@%p1 bra.uni end; end:"},
    {"a shuffle under a predicate", "are predicated off", {1, 32, 0}, HALF "@%p1 " SHUFFLE "1, 31, -1;"},
    {"a shuffle of two masks",
     "lanes of different masks",
     {1, 32, 0},
     HALF "selp.b32 %r6, -65536, 65535, %p1; " SHUFFLE "1, 31, %r6;"},
    {"a shuffle of others", "are not in their own mask", {1, 32, 0}, SHUFFLE "1, 31, 65535;"},
    {"a shuffle of half a warp", "within a part of the warp", {1, 32, 0}, SHUFFLE "1, 15, -1;"},
    {"two shuffles, each for all",
     "lanes wait for each other",
     {1, 32, 0},
     HALF "@%p1 bra other; " SHUFFLE "1, 31, -1; bra end; other: " SHUFFLE "1, 31, -1; end:"},
    {"a barrier under a predicate", "a predicate that differs", {1, 32, 0}, HALF "@%p1 bar.sync 0;"},
    {"ldmatrix for half a warp", "lanes have returned", {1, 32, 512}, HALF "@%p1 ret; " MATRICES "[%r3];"},
    {"a row of ldmatrix between two banks", "misaligned shared", {1, 32, 512}, MATRICES "[%r3+8];"},
    {"misaligned global memory", "misaligned global address", {1, 32, 0}, "ld.global.u32 %r5, [%rd3+2];"},
    {"a copy of 17 bytes", "more bytes than its size", {1, 1, 16}, "cp.async.cg.shared.global [%r3], [%rd2], 16, 17;"},
    {"a copy from between", "cp.async: misaligned", {1, 1, 16}, "cp.async.cg.shared.global [%r3], [%rd2+8], 16, 16;"},
    {"a copy from nowhere",
     "in no allocation",
     {1, 1, 16},
     "cp.async.cg.shared.global [%r3], [%rd2+100000000], 16, 4;"},
};
static void test_planted() {
    std::vector<float> out(64), in(1022, 1);
    for (const Planted& p : PLANTED) {
        string got = execute(p.body, p.threads, out, in);
        bool good = *p.wanted ? got.find(p.wanted) != string::npos : got.empty();
        check(good, p.name, got.empty() ? "nothing was reported" : got.c_str());
    }
}

// What a thread is told of its place, where shared variables lie, and the order of warps and blocks.
static void test_places() {
    for (uint64_t order : {0, 1}) {
        ptx::Module module;
        ptx::Machine machine;
        std::vector<uint32_t> out(16);
        const uint32_t* parameters[3] = {out.data(), NULL, NULL};
        std::vector<ptx::Region> regions = {{(uint64_t)out.data(), (uint64_t)(out.data() + out.size())}};
        machine.order = order;
        module.parse(
            ".shared .align 4 .b8 first[6];\n.shared .align 8 .b8 second[8];\n" +
            kernel_text("st.global.u32 [%rd1], %r2; setp.eq.s32 %p1, %r2, 40; @!%p1 bra end;"
                        "mov.u32 %r5, %ctaid.x; mov.u32 %r6, %ctaid.y; mov.u32 %r7, %ctaid.z; mov.u32 %r8, "
                        "%ntid.x; st.global.v4.u32 [%rd1+16], {%r5,%r6,%r7,%r8};"
                        "mov.u32 %r5, %nctaid.x; mov.u32 %r6, %nctaid.y; mov.u32 %r7, first; mov.u32 %r8, second;"
                        "st.global.v4.u32 [%rd1+32], {%r5,%r6,%r7,%r8}; st.global.u32 [%rd1+48], %r3; end:"));
        machine.launch(module.kernel("k"), {2, 3, 4}, {64, 1, 1}, 0, (const char*)parameters, regions);
        bool up = order == 0;
        std::vector<uint32_t> want = {
            up ? 63u : 31u, 0, 0, 0, up ? 1u : 0u, up ? 2u : 0u, up ? 3u : 0u, 64, 2, 3, 1024, 1032, 1040, 0, 0, 0};
        check(out == want, "places", ptx::format("%u, blocks %u %u %u", out[0], out[4], out[5], out[6]).c_str());
    }
}
// PTX_FUSE: one rounding for a product and its sum, within a basic block.
static void test_fused() {
    std::vector<float> in(96), out(32 * 8);
    for (float& v : in) { v = (float)((int)random_bits() >> 8) * 0x1p-20f; }
    string bad = execute("mul.wide.u32 %rd6, %r2, 32; add.s64 %rd6, %rd1, %rd6; ld.global.f32 %f1, [%rd4];"
                         "ld.global.f32 %f2, [%rd4+128]; ld.global.f32 %f3, [%rd4+256];"
                         "mul.f32 %f4, %f1, %f2; add.f32 %f5, %f4, %f3; sub.f32 %f6, %f4, %f3; sub.f32 %f7, %f3, %f4;"
                         "st.global.v4.f32 [%rd6], {%f5,%f6,%f7,%f4}; mul.f32 %f4, %f1, %f2; again: add.f32 %f5, %f4, "
                         "%f3; mul.f32 %f4, %f1, %f2; mov.f32 %f8, %f1; mov.f32 %f1, %f2; add.f32 %f6, %f4, %f3;"
                         "setp.eq.f32 %p1, %f8, %f2; @%p1 bra again; st.global.v2.f32 [%rd6+16], {%f5,%f6};",
                         {1, 32, 0}, out, in, false, true);
    check(bad.empty(), "fused products run", bad.c_str());
    for (size_t l = 0; l < 32; l++) {
        float a = in[l], b = in[32 + l], c = in[64 + l], product = a * b;
        float want[6] = {fmaf(a, b, c), fmaf(a, b, -c), fmaf(-a, b, c), product, product + c, product + c};
        check(memcmp(&out[8 * l], want, sizeof want) == 0, "fused products");
    }
}

// A block has as many threads as .maxntid says at most, which nvcc writes for __launch_bounds__; without it 256.
static void test_bounds() {
    char parameters[24] = {0};
    for (const auto& [bounds, most] :
         std::map<string, uint32_t>{{"", 256}, {".maxntid 16, 32, 1\n.minnctapersm 1\n", 512}}) {
        ptx::Module module;
        ptx::Machine machine;
        module.parse(kernel_text("", bounds));
        auto refused = [&](uint32_t threads) {
            try {
                machine.launch(module.kernel("k"), {1, 1, 1}, {threads, 1, 1}, 0, parameters, {});
            } catch (ptx::Fault&) { return true; }
            return false;
        };
        check(!refused(most) && refused(most + 1), "a block is as large as a kernel's bounds", bounds.c_str());
    }
}

int main(void) {
    test_conversions();
    test_instructions();
    test_refusals();
    test_divergence();
    test_product<__half>("f16");
    test_product<__nv_bfloat16>("bf16");
    test_half_sums();
    test_planted();
    test_places();
    test_fused();
    test_bounds();
    return test_verdict();
}
