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
           "{\n.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<20>;\n"
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
                      bool truncate = false) {
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
    machine.truncate = truncate;
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
static void test_integers() {
    std::vector<int> x(1024), out(1024 * 8);
    for (int& v : x) { v = (int)random_bits() >> (random_bits() % 31); }
    string bad = execute("mul.wide.u32 %rd6, %r2, 32; add.s64 %rd6, %rd1, %rd6; ld.global.u32 %r5, [%rd4]; xor.b32 "
                         "%r6, %r2, 511; mul.wide.u32 %rd7, %r6, 4;"
                         "add.s64 %rd7, %rd2, %rd7; ld.global.u32 %r6, [%rd7]; or.b32 %r6, %r6, 1;"
                         "div.s32 %r7, %r5, %r6; rem.u32 %r8, %r5, %r6; mul.hi.s32 %r9, %r5, %r6; mul.wide.s32 %rd8, "
                         "%r5, %r6; shr.s64 %rd8, %rd8, 20; cvt.u32.u64 %r10, %rd8;"
                         "st.global.v4.u32 [%rd6], {%r7,%r8,%r9,%r10}; and.b32 %r11, %r6, 63; shr.s32 %r7, %r5, %r11; "
                         "shl.b32 %r8, %r5, %r11; bfe.u32 %r12, %r5, 5, 9; xor.b32 %r8, %r8, %r12;"
                         "bfi.b32 %r9, %r5, %r6, 20, 14; setp.lt.u32 %p1, %r5, %r6; selp.b32 %r10, %r6, %r5, %p1; "
                         "st.global.v4.u32 [%rd6+16], {%r7,%r8,%r9,%r10};",
                         {1, 1024, 0}, out, x);
    check(bad.empty(), "integers run", bad.c_str());
    for (size_t n = 0; n < x.size(); n++) {
        int a = x[n], b = x[n ^ 511] | 1, s = b & 63, *o = &out[8 * n];
        uint32_t ua = (uint32_t)a, ub = (uint32_t)b;
        int64_t wide = (int64_t)a * b;
        int want[8] = {b == -1 ? (int)(0 - ua) : a / b,
                       (int)(ua % ub),
                       (int)(wide >> 32),
                       (int)(wide >> 20),
                       s > 31 ? (a < 0 ? -1 : 0) : a >> s,
                       (s > 31 ? 0 : (int)(ua << s)) ^ (int)(ua >> 5 & 511),
                       (int)((ub & 0xfffff) | ua << 20),
                       (int)(ua < ub ? ub : ua)};
        for (int k = 0; k < 8; k++) {
            check(o[k] == want[k], "integers", ptx::format("%d of %d, %d: %d, not %d", k, a, b, o[k], want[k]).c_str());
        }
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
    {"a sum without an order",
     "float atomics of several threads",
     {1, 64, 0},
     "mov.f32 %f1, 0f3F800000; red.relaxed.gpu.global.add.f32 [%rd1], %f1;"},
    {"an unknown opcode", "opcode: sad.u32", {1, 32, 0}, "sad.u32 %r5, %r2, %r2, %r2;"},
    {"an unknown modifier", "modifier .sat", {1, 32, 0}, "add.sat.s32 %r5, %r2, %r2;"},
    {"a register of another width", "has 64 bits, not 32", {1, 32, 0}, "add.s32 %r5, %rd1, %r2;"},
};
static void test_planted() {
    std::vector<float> out(64), in(1024, 1);
    for (const Planted& p : PLANTED) {
        string got = execute(p.body, p.threads, out, in);
        bool good = *p.wanted ? got.find(p.wanted) != string::npos : got.empty();
        check(good, p.name, got.empty() ? "nothing was reported" : got.c_str());
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
    test_integers();
    test_divergence();
    test_product<__half>("f16");
    test_product<__nv_bfloat16>("bf16");
    test_half_sums();
    test_planted();
    test_bounds();
    return test_verdict();
}
