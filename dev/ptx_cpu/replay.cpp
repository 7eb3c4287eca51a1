// replay.cpp: linked to a program that runs on the emulator (dev/cuda_cpu), it takes the emulator's launch hook: every
// launch is executed by the kernel's PTX on the launch's own arguments and memory, then by the emulator on the same,
// and what they wrote is compared. The PTX's results stay, so that the program's own verdicts are about what nvcc made.
// A fault ends the program. Environment:
//   PTX_FILE=x.ptx    what nvcc made of train_mta.cu: needed
//   PTX_REPORT=FILE   lines are added for check.py, else standard error: K kernel launches blocks instructions;
//                     W kernel type worst excess; N kernel count note; U kernel of the PTX that was not launched
//   PTX_ALONE=1       the PTX alone; else two launches of a kernel with one grid, block and shared memory are compared
//   PTX_ORDER=N       order of warps and blocks: 0 ascending, 1 descending, else a seed
//   PTX_MMA=truncate  products round as tensor cores do
//   PTX_FUSE=1        mul and add become one fma, as ptxas may make them
#include <cuda_runtime.h>
#include "module.h"
#include <cxxabi.h>
#include <unistd.h>

extern "C" void ptx_anchor(void) {}

namespace ptx {
static string setting(const char* name) {
    const char* value = getenv(name);
    return value ? value : "";
}
static string demangled(const string& s) {
    int status;
    char* d = abi::__cxa_demangle(s.c_str(), NULL, NULL, &status);
    string name = d ? d : s;
    free(d);
    return name.substr(0, name.find(" [clone"));
}
// "void kernel<1, 2>(float*)": "kernel<1, 2>"
static string title_of(const string& signature) {
    size_t end = 0, begin = signature.compare(0, 5, "void ") == 0 ? 5 : 0;
    for (int depth = 0; end < signature.size() && (signature[end] != '(' || depth); end++) {
        depth += signature[end] == '<', depth -= signature[end] == '>';
    }
    return signature.substr(begin, end - begin);
}

// Differences of numbers of one type, relative to the largest that a launch wrote by that argument: all of them;
// without those below 2^-20 of the largest input, which are what is left of sums that cancel.
struct Difference {
    double worst = 0, excess = 0;
};
struct Tally {
    string entry;  // in the PTX
    uint64_t launches = 0, blocks = 0, instructions = 0;
    std::map<string, Difference> differences;
    std::map<string, uint64_t> notes;
    std::map<string, int> shapes;  // how many launches of a shape were compared
};

static struct Replay {
    Module module;
    Machine machine;
    std::map<const void*, string> symbols;  // the emulator's kernels: address, name
    std::map<string, string> entries;       // the PTX's: demangled, mangled
    std::map<string, Tally> tallies;
    bool alone = setting("PTX_ALONE") == "1", ended = false;
    Replay();
    ~Replay() { report(); }
    void report();
} replay;

// The names of this program's kernels, which are static: nm knows them.
static std::map<const void*, string> kernel_symbols() {
    std::vector<std::pair<uint64_t, string>> found;
    std::map<const void*, string> symbols;
    char self[4096], line[8192], name[4096], kind;
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = 0;
    FILE* f = popen(format("nm '%s'", self).c_str(), "r");
    unsigned long long at, anchor = 0;
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%llx %c %4095s", &at, &kind, name) != 3) { continue; }
        if (strcmp(name, "ptx_anchor") == 0) { anchor = at; }
        if (strstr(name, "kernel")) { found.push_back({at, name}); }
    }
    if (f) { pclose(f); }
    for (const auto& s : found) {
        symbols[(const char*)(uint64_t)&ptx_anchor + (s.first - anchor)] = demangled(s.second);
    }
    return symbols;
}
void Replay::report() {
    if (ended) { return; }
    ended = true;
    string path = setting("PTX_REPORT");
    FILE* f = path.empty() ? stderr : fopen(path.c_str(), "a");
    std::set<string> launched;
    for (const auto& t : tallies) {
        const string title = title_of(t.first);
        const Tally& x = t.second;
        launched.insert(x.entry);
        fprintf(f, "K\t%s\t%llu\t%llu\t%llu\n", title.c_str(), (unsigned long long)x.launches,
                (unsigned long long)x.blocks, (unsigned long long)x.instructions);
        for (const auto& d : x.differences) {
            fprintf(f, "W\t%s\t%s\t%.3g\t%.3g\n", title.c_str(), d.first.c_str(), d.second.worst, d.second.excess);
        }
        for (const auto& n : x.notes) {
            fprintf(f, "N\t%s\t%llu\t%s\n", title.c_str(), (unsigned long long)n.second, n.first.c_str());
        }
    }
    for (const auto& e : entries) {
        if (!launched.count(e.second)) { fprintf(f, "U\t%s\n", title_of(e.first).c_str()); }
    }
    if (f != stderr) { fclose(f); }
}
[[noreturn]] static void stop(const string& text) {
    fprintf(stderr, "ptx: %s\n", text.c_str());
    replay.report();
    fflush(stdout);
    _exit(1);
}

// ---- one launch

// What an argument points to. Integers and flags are compared byte by byte; what the rounding of the residual stream
// leaves out (LOW) with it by the operation's own verdict alone.
enum Type { BF16, FP16, FP32, FP64, BYTES, LOW, NO_POINTER };
static const char* const TYPE_NAMES[] = {"bf16", "fp16", "fp32", "fp64", "int"};
static const size_t TYPE_BYTES[] = {2, 2, 4, 8, 1, 1};
static bool is_stream(const char* mangled) { return strstr(mangled, "StreamOf") != NULL; }
static Type type_of(const char* mangled) {  // Pf, PKf; of a tile or a stream its first member: 6TileOfIfE
    string s = mangled;
    bool tile = s.find("TileOf") != string::npos || is_stream(mangled);
    if (s[0] != 'P' && !tile) { return NO_POINTER; }
    if (s.find("bfloat16") != string::npos) { return BF16; }
    if (s.find("half") != string::npos) { return FP16; }
    char last = s[s.size() - (tile ? 2 : 1)];
    return last == 'f' ? FP32 : last == 'd' ? FP64 : BYTES;
}
static double value(const char* p, Type type) {
    uint64_t bits = 0;
    memcpy(&bits, p, TYPE_BYTES[type]);
    switch (type) {
        case BF16: return bf16_value((uint32_t)bits);
        case FP16: return f16_value((uint32_t)bits);
        case FP32: return bits_as<float>((uint32_t)bits);
        case FP64: return bits_as<double>(bits);
        default: return (double)bits;
    }
}
struct Piece {
    size_t begin, end;
    Type type;
};               // of an allocation: from where an argument points to where the next does
struct Memory {  // an allocation; copies: as it was before, and as the PTX left it, NULL if unchanged
    char* at;
    size_t bytes;
    std::vector<Piece> pieces;
    const char *before, *after;
};
// A copy of an allocation in the i-th buffer. All are kept from launch to launch: new pages cost more than the copy.
static const char* copy_of(const Memory& m, size_t i) {
    static std::vector<std::vector<char>> buffers;
    if (i >= buffers.size()) { buffers.resize(i + 1); }
    if (buffers[i].size() < m.bytes) { buffers[i].resize(m.bytes); }
    return (const char*)memcpy(buffers[i].data(), m.at, m.bytes);
}
// The allocations that arguments point into, those inside of structures too: a kernel may touch no other.
static std::vector<Memory> memory_of(const cuda_cpu::Launch& l) {
    std::map<char*, std::map<size_t, Type>> starts;
    for (const cuda_cpu::Argument& a : l.arguments) {
        for (size_t n = 0; n + sizeof(char*) <= a.size; n += sizeof(char*)) {
            char* p;
            memcpy(&p, (const char*)a.bytes + n, sizeof p);
            auto above = cuda_cpu::allocations.upper_bound(p);
            if (above == cuda_cpu::allocations.begin()) { continue; }
            auto found = std::prev(above);
            char* at = (char*)found->first;
            if (p >= at + found->second) { continue; }
            starts[at].insert({0, BYTES});
            if (n == 0 && type_of(a.type) != NO_POINTER) { starts[at][(size_t)(p - at)] = type_of(a.type); }
            if (n != 0 && is_stream(a.type)) { starts[at][(size_t)(p - at)] = LOW; }
        }
    }
    std::vector<Memory> memory;
    for (const auto& m : starts) {
        memory.push_back({m.first, cuda_cpu::allocations[m.first], {}, NULL, NULL});
        for (auto s = m.second.begin(); s != m.second.end(); s++) {
            size_t end = std::next(s) == m.second.end() ? memory.back().bytes : std::next(s)->first;
            memory.back().pieces.push_back({s->first, end, s->second});
        }
    }
    return memory;
}

static void execute(const cuda_cpu::Launch& l, const std::vector<Memory>& memory, Tally* t) {
    const Kernel& k = replay.module.kernel(t->entry);
    std::vector<char> parameters(k.parameter_bytes, 0);
    std::vector<Region> regions;
    if (k.parameters.size() != l.arguments.size()) { throw Fault{"another number of parameters"}; }
    for (size_t n = 0; n < l.arguments.size(); n++) {
        if (k.parameters[n].bytes != l.arguments[n].size) { throw Fault{format("parameter %zu has another size", n)}; }
        memcpy(&parameters[k.parameters[n].offset], l.arguments[n].bytes, l.arguments[n].size);
    }
    for (const Memory& m : memory) { regions.push_back({(uint64_t)m.at, (uint64_t)m.at + m.bytes}); }
    Machine& x = replay.machine;
    uint64_t executed = x.executed;
    x.notes.clear();
    x.launch(k, {l.grid.x, l.grid.y, l.grid.z}, {l.block.x, l.block.y, l.block.z}, (uint32_t)l.shared,
             parameters.data(), regions);
    t->launches++, t->blocks += (uint64_t)l.grid.x * l.grid.y * l.grid.z, t->instructions += x.executed - executed;
    for (const auto& n : x.notes) { t->notes[n.first] += n.second; }
}

static double largest_input(const std::vector<Memory>& memory) {
    double largest = 0;
    for (const Memory& m : memory) {
        for (const Piece& p : m.pieces) {
            for (size_t at = p.begin, n = TYPE_BYTES[p.type]; p.type < BYTES && at + n <= p.end; at += n) {
                double v = fabs(value(m.before + at, p.type));
                if (std::isfinite(v)) { largest = std::max(largest, v); }
            }
        }
    }
    return largest;
}
// What the PTX and the emulator, whose results stand in memory now, wrote into a piece: the largest value, the largest
// difference. False if nothing.
static bool compare_piece(const Memory& m, const Piece& p, double* largest, double* worst) {
    const char *was = m.before, *got = m.after ? m.after : was, *want = m.at;
    size_t n = TYPE_BYTES[p.type], step = 4096;
    bool written = false;
    for (size_t at = p.begin; at + n <= p.end; at += n) {
        while (at + step <= p.end && memcmp(got + at, was + at, step) == 0 && memcmp(want + at, was + at, step) == 0) {
            at += step;
        }
        if (at + n > p.end) { break; }
        if (memcmp(got + at, was + at, n) == 0 && memcmp(want + at, was + at, n) == 0) { continue; }
        double a = value(got + at, p.type), b = value(want + at, p.type);
        written = true;
        if (std::isfinite(b)) { *largest = std::max(*largest, fabs(b)); }
        if (memcmp(got + at, want + at, n) == 0 || a == b || (std::isnan(a) && std::isnan(b))) { continue; }
        *worst = std::max(*worst, std::isfinite(a) && std::isfinite(b) ? fabs(a - b) : (double)INFINITY);
    }
    return written;
}
static void compare(const std::vector<Memory>& memory, Tally* t) {
    double input = -1;
    for (const Memory& m : memory) {
        for (const Piece& p : m.pieces) {
            double largest = 0, worst = 0;
            if (p.type == LOW) { continue; }
            if (!compare_piece(m, p, &largest, &worst)) { continue; }
            Difference& d = t->differences[TYPE_NAMES[p.type]];
            double relative = worst == 0 ? 0 : worst / largest;
            d.worst = std::max(d.worst, relative);
            if (relative <= d.excess) { continue; }
            if (input < 0) { input = largest_input(memory); }
            if (!(worst <= 0x1p-20 * input)) { d.excess = relative; }
        }
    }
}
static void on_launch(const cuda_cpu::Launch& l, const std::function<void()>& emulate) {
    auto symbol = replay.symbols.find(l.kernel);
    if (symbol == replay.symbols.end()) { stop(string("no symbol for ") + l.name); }
    Tally& t = replay.tallies[symbol->second];
    auto entry = replay.entries.find(symbol->second);
    if (entry == replay.entries.end()) { stop("no kernel of that name in the PTX: " + symbol->second); }
    t.entry = entry->second;
    const string shape = format("%u %u %u %u %zu", l.grid.x, l.grid.y, l.grid.z, l.block.x, l.shared);
    bool compared = !replay.alone && t.shapes[shape]++ < 2;
    std::vector<Memory> memory = memory_of(l);
    for (size_t i = 0; i < memory.size() && compared; i++) { memory[i].before = copy_of(memory[i], 2 * i); }
    try {
        execute(l, memory, &t);
    } catch (Fault& f) { stop(title_of(symbol->second) + ": " + f.text); }
    if (!compared) { return; }
    for (size_t i = 0; i < memory.size(); i++) {
        Memory& m = memory[i];
        if (memcmp(m.at, m.before, m.bytes) == 0) { continue; }
        m.after = copy_of(m, 2 * i + 1);
        memcpy(m.at, m.before, m.bytes);
    }
    emulate();
    compare(memory, &t);
    for (const Memory& m : memory) { memcpy(m.at, m.after ? m.after : m.before, m.bytes); }
}

Replay::Replay() {
    try {
        module.read(setting("PTX_FILE"));
    } catch (Fault& f) { stop("PTX_FILE: " + f.text); }
    for (const auto& k : module.kernels) { entries[demangled(k.first)] = k.first; }
    symbols = kernel_symbols();
    machine.order = strtoull(setting("PTX_ORDER").c_str(), NULL, 10);
    machine.truncate = setting("PTX_MMA") == "truncate";
    module.fuse = setting("PTX_FUSE") == "1";
    cuda_cpu::launch_hook = on_launch;
}
}  // namespace ptx
