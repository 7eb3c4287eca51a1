// machine.h: executes a kernel that module.h has read from PTX, on a CPU, as the PTX manual describes the machine: the
// blocks of a launch one after another, the warps of a block in turn from barrier to barrier.
// A register is a row of 32 lanes, so that an instruction is decoded once for a warp. Lanes may diverge: of the groups
// of lanes the one that is furthest behind runs first, and groups that meet become one. A .sync instruction waits for
// the lanes of its mask, an .aligned one for the warp. Registers and shared memory start as NaN.
//
// A Fault is thrown, with the line of the PTX and of the source, for: memory outside its allocation or misaligned; what
// an asynchronous copy has yet to bring, touched by anybody before that thread's wait_group; .sync and .aligned
// instructions that lanes never reach; barriers that warps never reach; a block of more threads than there are sure to
// be registers for: those of the kernel's .maxntid, else 256, which fill a multiprocessor if they have 255 each, the
// most. Noted in Machine::notes, not fatal: races; shared memory read before it is written; float atomics of several
// threads on one address (their sum has no fixed order); a thread that returns with copies in flight.
//
// The watch over races: bytes are watched in pairs (single bytes of global memory are not). Time is cut into epochs,
// one from barrier to barrier: two threads that touch the same pair in one epoch, one of them writing, have no order;
// nor have two blocks of one launch. Within a warp bar.warp.sync begins a new turn, which orders its lanes. Atomics
// race with what is none, not with each other.
//
// What it is not: ptxas and its SASS (which may fuse, move and spill), approximate functions that err (they are rounded
// correctly here), memory order weaker than barriers, time.
#ifndef PTX_MACHINE_H
#define PTX_MACHINE_H
#include "numbers.h"
#include <stdarg.h>
#include <stdio.h>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {
using std::string;
enum { WARP = 32, SHARED_BASE = 1024 };  // shared addresses start above 0, as on a GPU
static const uint32_t ALL = 0xffffffffu, NONE = 0xffffffffu;

struct Fault {
    string text;
};
inline string format(const char* text, ...) {
    char s[2048];
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(s, sizeof s, text, arguments);
    va_end(arguments);
    return s;
}

// ---- a decoded kernel

struct Warp;
struct Instruction;
typedef void (*Execute)(Warp& w, const Instruction& i, uint32_t lanes);
enum Kind : uint8_t { PLAIN, BRANCH, EXIT, SYNC, ALIGNED, BARRIER };
enum Space : uint8_t { GLOBAL, SHARED, PARAM };
enum Access : uint8_t { READ, WRITE, ATOMIC, SUM };  // SUM: an atomic of floats

struct Row {  // a register: where its 32 lanes begin in the register file, and its width; a predicate is one word, a
              // bit a lane
    uint32_t at;
    uint8_t bits;
};
struct Instruction {
    Execute execute = NULL;
    Kind kind = PLAIN;
    Space space = GLOBAL;
    uint8_t n_to = 0, n_from = 0;
    uint8_t bytes = 0, to_bytes = 0;  // of an element in memory, or of what is converted
    bool uniform = false;             // bra.uni
    bool is_signed = false, to_signed = false, is_float = false;
    bool half = false, transposed = false;          // a product of fp16; ldmatrix.trans
    bool minus_product = false, minus_sum = false;  // of a fused product: which term is negated
    bool unless = false;                            // @!p
    uint32_t predicate = NONE;
    Row to[8], from[12];
    int64_t offset = 0, from_offset = 0;  // of addresses; offset: also a number that is no register
    int target = -1;                      // of a branch
    uint32_t line = 0, source = 0;
    string text;
};
struct Parameter {
    string name;
    uint32_t offset, bytes;
};
struct Constant {
    Row row;
    uint64_t value;
};
struct Special {
    uint32_t at;
    int which;  // tid.x, ntid.x, ctaid.x, .y, .z, nctaid.x, .y
};
struct Kernel {
    string name, body;
    uint32_t first_line = 0, most_threads = 256;  // of a block
    std::vector<Parameter> parameters;
    uint32_t parameter_bytes = 0, file_bytes = 0, static_bytes = 0, dynamic_at = SHARED_BASE;
    std::vector<Instruction> code;
    std::vector<char> registers;  // what those of a warp start as
    std::vector<Constant> constants;
    std::vector<Special> specials;
    std::map<string, uint32_t> symbols;  // shared variables it names: their addresses
    bool decoded = false;
};

// ---- the state of a launch

struct Region {  // of global memory
    uint64_t begin, end;
};
struct alignas(32) Shadow {  // of two bytes: who touched them last; of four bytes a line of the cache
    uint32_t write_epoch, read_epoch, write_pc, read_pc, read_block;
    uint16_t writer, reader, write_turn, read_turn;
    uint8_t in_flight, written, atomic;
};
enum { MANY = 0xffff, PAGE = 4096, PAGES = 256 };
struct Page {
    Shadow shadow[PAGE / 2];
};
enum { COPIED = 16 };
struct Copy {  // of COPIED bytes: so many are read, the rest is zero
    uint32_t to;
    uint64_t from;
    uint32_t bytes;
};
struct Lane {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
struct Group {  // lanes that run together
    int pc;
    uint32_t lanes;
    bool blocked;
};
struct Machine;
struct Warp {
    Machine* machine;
    char* file;  // its registers
    int index;
    uint32_t live, turn, pc;
    bool done, at_barrier;
    std::vector<Group> groups;
    Lane lanes[WARP];
};
struct Dim {
    uint32_t x, y, z;
};

class Machine {
  public:
    uint64_t order = 0;     // of warps and blocks: 0 ascending, 1 descending, else a seed
    bool truncate = false;  // products as tensor cores round them, instead of summed exactly and rounded once
    uint64_t executed = 0;  // instructions of warps
    std::map<string, uint64_t> notes;

    // Runs all blocks. parameters: as the kernel's lie in memory. regions: what of global memory may be touched,
    // sorted.
    void launch(const Kernel& kernel, Dim grid, Dim block, uint32_t dynamic_bytes, const char* parameters,
                const std::vector<Region>& regions);

    // For the instructions. An access of one lane, marked in the shadow: where the bytes are.
    char* access(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, Access how);
    char* global(Warp& w, int lane, uint64_t address, uint32_t bytes);
    char* shared(Warp& w, int lane, uint64_t address, uint32_t bytes);
    void copy_begin(Warp& w, int lane, const Copy& copy);
    void copies_land(Warp& w, int lane, const std::vector<Copy>& copies);
    const char* parameter(int64_t offset) const { return parameters_ + offset; }
    [[noreturn, gnu::cold]] void fail(const Warp* w, const string& what, int lane = -1);

  private:
    const Kernel* kernel_ = NULL;
    Dim grid_, block_, at_;
    uint32_t n_threads_, n_warps_;
    std::vector<char> shared_, files_;  // shared memory from SHARED_BASE on; registers of all warps
    std::vector<Shadow> shared_shadow_;
    std::vector<Region> regions_;
    size_t last_region_;
    const char* parameters_;
    std::vector<std::unique_ptr<Warp>> warps_;
    std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
    struct Recent {
        uint64_t number;
        Page* page;
    } recent_[PAGES] = {};
    uint32_t epoch_ = 1, block_epoch_ = 1, launch_epoch_ = 1, block_number_ = 0;

    [[gnu::cold]] string where(uint32_t pc) const;
    [[gnu::cold]] void note(const string& what) { notes[what]++; }
    [[gnu::cold]] void race(const char* what, uint32_t pc, uint32_t other, bool is_global);
    void check(const Warp& w, uint32_t thread, uint32_t epoch, uint16_t other, uint16_t turn, uint32_t other_pc,
               bool is_global, bool write);
    void read_mark(Warp& w, int lane, Shadow* s, uint32_t bytes, bool is_global);
    void write_mark(Warp& w, int lane, Shadow* s, uint32_t bytes, bool is_global, Access how = WRITE);
    Page* page_of(uint64_t address);
    Shadow* shadow_of(uint64_t address) { return &page_of(address)->shadow[address % PAGE / 2]; }
    void start_warp(uint32_t n);
    void run_block();
    bool meet();
    void end_block();
    void run(Warp& w);
    int next_group(Warp& w);
    bool step(Warp& w, size_t group);
    bool branch(Warp& w, size_t group, const Instruction& i, uint32_t lanes);
    bool sync(Warp& w, Group& g, const Instruction& i, uint32_t lanes);
    bool aligned(Warp& w, Group& g, const Instruction& i, uint32_t lanes);
};

// ---- registers

template <typename T> inline T get(const char* row, int lane) {
    T v;
    memcpy(&v, row + (sizeof(T) == 8 ? 8 : 4) * lane, sizeof v);  // little endian: the low bytes
    return v;
}
template <typename T> inline void put(char* row, int lane, T v) {
    if (sizeof(T) == 8) {
        memcpy(row + 8 * lane, &v, sizeof v);
        return;
    }
    uint32_t wide = 0;
    memcpy(&wide, &v, sizeof v);
    memcpy(row + 4 * lane, &wide, 4);
}
inline uint64_t get_any(const Warp& w, Row r, int lane) {
    const char* row = w.file + r.at;
    return r.bits == 64 ? get<uint64_t>(row, lane) : r.bits == 32 ? get<uint32_t>(row, lane) : get<uint16_t>(row, lane);
}
inline void put_any(Warp& w, Row r, int lane, uint64_t v) {
    char* row = w.file + r.at;
    if (r.bits == 64) {
        put<uint64_t>(row, lane, v);
    } else if (r.bits == 32) {
        put<uint32_t>(row, lane, (uint32_t)v);
    } else {
        put<uint16_t>(row, lane, (uint16_t)v);
    }
}
inline uint32_t get_predicate(const Warp& w, uint32_t at) { return get<uint32_t>(w.file + at, 0); }
inline void put_predicate(Warp& w, uint32_t at, uint32_t lanes, uint32_t v) {
    put<uint32_t>(w.file + at, 0, (get_predicate(w, at) & ~lanes) | (v & lanes));
}
// f(lane) for each of the lanes; all 32 in a loop that the compiler can turn into vector instructions.
template <typename F> inline void each(uint32_t lanes, F f) {
    if (lanes == ALL) {
        for (int l = 0; l < WARP; l++) { f(l); }
    } else {
        for (uint32_t rest = lanes; rest; rest &= rest - 1) { f(__builtin_ctz(rest)); }
    }
}

// ---- memory and its watch

inline string Machine::where(uint32_t pc) const {
    const Instruction& i = kernel_->code[pc];
    return format("%s (PTX %u, source %u)", i.text.substr(0, i.text.find_first_of(" \t")).c_str(), i.line, i.source);
}
inline void Machine::fail(const Warp* w, const string& what, int lane) {
    string who = lane >= 0 ? format(" thread %d", w->index * WARP + lane) : w ? format(" warp %d", w->index) : "";
    string text = format("%s: block (%u,%u,%u)%s", what.c_str(), at_.x, at_.y, at_.z, who.c_str());
    if (w) {
        const Instruction& i = kernel_->code[w->pc];
        text += format(", PTX line %u, source line %u: %s", i.line, i.source, i.text.c_str());
    }
    throw Fault{text};
}
inline char* Machine::global(Warp& w, int lane, uint64_t address, uint32_t bytes) {
    for (int turn = 0; turn < 2; turn++) {
        if (last_region_ < regions_.size()) {
            const Region& r = regions_[last_region_];
            if (address >= r.begin && address + bytes <= r.end) { return (char*)address; }
        }
        auto above = std::upper_bound(regions_.begin(), regions_.end(), address,
                                      [](uint64_t a, const Region& r) { return a < r.begin; });
        last_region_ = above == regions_.begin() ? regions_.size() : (size_t)(above - regions_.begin()) - 1;
    }
    fail(&w, format("global address %llx of %u bytes is in no allocation", (unsigned long long)address, bytes), lane);
}
inline char* Machine::shared(Warp& w, int lane, uint64_t address, uint32_t bytes) {
    if (address < SHARED_BASE || address + bytes > SHARED_BASE + shared_.size()) {
        fail(&w,
             format("shared address %lld of %u bytes, there are %zu", (long long)address - SHARED_BASE, bytes,
                    shared_.size()),
             lane);
    }
    return shared_.data() + (address - SHARED_BASE);
}
inline Page* Machine::page_of(uint64_t address) {
    uint64_t number = address / PAGE;
    Recent& r = recent_[number % PAGES];
    if (r.number != number || !r.page) {
        std::unique_ptr<Page>& page = pages_[number];
        if (!page) { page.reset(new Page()); }
        r = {number, page.get()};
    }
    return r.page;
}

inline void Machine::race(const char* what, uint32_t pc, uint32_t other, bool is_global) {
    note(format("%s in %s memory: %s against %s", what, is_global ? "global" : "shared", where(pc).c_str(),
                where(other).c_str()));
}
// An access of `thread` now, against an earlier one of thread `other` (MANY: several), in its warp's turn then.
inline void Machine::check(const Warp& w, uint32_t thread, uint32_t epoch, uint16_t other, uint16_t turn,
                           uint32_t other_pc, bool is_global, bool write) {
    if (epoch >= launch_epoch_ && epoch < block_epoch_) { return race("RACE of blocks", w.pc, other_pc, is_global); }
    if (epoch != epoch_ || other == thread) { return; }
    if (other == MANY || other / WARP != thread / WARP) { return race("RACE of warps", w.pc, other_pc, is_global); }
    if (turn != (uint16_t)w.turn) { return; }
    if (w.pc != other_pc) {
        race("RACE of lanes without bar.warp.sync", w.pc, other_pc, is_global);
    } else if (write) {
        race("RACE of lanes of one instruction", w.pc, other_pc, is_global);
    }
}
inline void Machine::read_mark(Warp& w, int lane, Shadow* s, uint32_t bytes, bool is_global) {
    uint16_t thread = (uint16_t)(w.index * WARP + lane), turn = (uint16_t)w.turn;
    uint32_t number = block_number_;
    for (Shadow* end = s + (bytes + 1) / 2; s < end; s++) {
        if (s->in_flight) { fail(&w, "reads what a cp.async has not yet brought", lane); }
        if (!is_global && !s->written) { note("shared memory read before it is written: " + where(w.pc)); }
        if (s->write_epoch >= launch_epoch_) {
            check(w, thread, s->write_epoch, s->writer, s->write_turn, s->write_pc, is_global, false);
        }

        // The reader is a thread, or MANY of which no write of the same epoch may be one. Lanes of one turn count as
        // one.
        bool first = s->read_epoch < launch_epoch_, together = s->reader / WARP == w.index && s->read_turn == turn;
        s->read_block = first || s->read_block == number ? number : NONE;
        bool alone = s->read_epoch != epoch_ || s->reader == thread || (s->reader != MANY && together);
        s->reader = alone ? thread : (uint16_t)MANY;
        s->read_epoch = epoch_, s->read_turn = turn, s->read_pc = w.pc;
    }
}
// how: READ for a copy that is begun, which writes later
inline void Machine::write_mark(Warp& w, int lane, Shadow* s, uint32_t bytes, bool is_global, Access how) {
    uint16_t thread = (uint16_t)(w.index * WARP + lane);
    for (Shadow* end = s + (bytes + 1) / 2; s < end; s++) {
        if (s->in_flight) { fail(&w, "writes where a cp.async still may", lane); }
        bool atomics = how >= ATOMIC && s->atomic && s->write_epoch >= launch_epoch_;
        if (atomics && how == SUM && (s->write_epoch < block_epoch_ || s->writer != thread)) {
            note("float atomics of several threads on one address: " + where(w.pc));
        }
        if (s->write_epoch >= launch_epoch_ && !atomics) {
            check(w, thread, s->write_epoch, s->writer, s->write_turn, s->write_pc, is_global, true);
        }
        if (s->read_epoch >= launch_epoch_) {
            bool blocks = is_global && s->read_block != block_number_;
            if (blocks) {
                race("RACE of blocks", w.pc, s->read_pc, is_global);
            } else {
                check(w, thread, s->read_epoch, s->reader, s->read_turn, s->read_pc, is_global, true);
            }
        }
        if (how == READ) { continue; }
        if (atomics && s->write_epoch < block_epoch_) { continue; }  // of another block: what races with most
        s->writer = atomics && s->write_epoch == epoch_ && s->writer != thread ? (uint16_t)MANY : thread;
        s->write_epoch = epoch_, s->write_turn = (uint16_t)w.turn;
        s->write_pc = w.pc, s->written = 1, s->atomic = how >= ATOMIC;
    }
}
inline char* Machine::access(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, Access how) {
    bool is_global = space == GLOBAL;
    if (address & (bytes - 1)) {  // bytes: a power of two
        const char* name = is_global ? "global" : "shared";
        fail(&w, format("misaligned %s address %llx of %u bytes", name, (unsigned long long)address, bytes), lane);
    }
    char* p = is_global ? global(w, lane, address, bytes) : shared(w, lane, address, bytes);
    if (is_global && bytes == 1) { return p; }
    Shadow* s = is_global ? shadow_of(address) : &shared_shadow_[(address - SHARED_BASE) / 2];
    if (how == READ) {
        read_mark(w, lane, s, bytes, is_global);
    } else {
        write_mark(w, lane, s, bytes, is_global, how);
    }
    return p;
}

// Nobody may touch the destination until the copies of this thread have landed: at its wait, as late as a GPU may.
inline void Machine::copy_begin(Warp& w, int lane, const Copy& c) {
    if (c.bytes > COPIED) { fail(&w, "cp.async: more bytes than its size", lane); }
    if (c.from % COPIED || c.to % COPIED) { fail(&w, "cp.async: misaligned", lane); }
    shared(w, lane, c.to, COPIED);
    Shadow* s = &shared_shadow_[(c.to - SHARED_BASE) / 2];
    write_mark(w, lane, s, COPIED, false, READ);
    if (c.bytes) { global(w, lane, c.from, 1), global(w, lane, c.from + c.bytes - 1, 1); }
    for (uint32_t b = 0; b < COPIED / 2; b++) { s[b].in_flight = 1; }
    w.lanes[lane].open.push_back(c);
}
inline void Machine::copies_land(Warp& w, int lane, const std::vector<Copy>& copies) {
    for (const Copy& c : copies) {
        char* p = shared_.data() + (c.to - SHARED_BASE);
        Shadow* s = &shared_shadow_[(c.to - SHARED_BASE) / 2];
        memset(p, 0, COPIED);
        if (c.bytes) {
            memcpy(p, (const char*)c.from, c.bytes);
            read_mark(w, lane, shadow_of(c.from), c.bytes, true);
        }
        for (uint32_t b = 0; b < COPIED / 2; b++) { s[b].in_flight = 0; }
        write_mark(w, lane, s, COPIED, false);
    }
}

// ---- execution

// The group to run: the furthest behind of those that do not wait, after those that have met were joined; -1 if no lane
// is left.
inline int Machine::next_group(Warp& w) {
    std::vector<Group>& all = w.groups;
    int best = -1;
    for (size_t a = 0; a < all.size(); a++) {
        for (size_t b = a + 1; b < all.size();) {
            if (all[a].pc != all[b].pc) {
                b++;
                continue;
            }
            all[a].lanes |= all[b].lanes, all[a].blocked = false;
            all.erase(all.begin() + (long)b);
        }
    }
    for (size_t a = 0; a < all.size(); a++) {
        if (!all[a].blocked && (best < 0 || all[a].pc < all[(size_t)best].pc)) { best = (int)a; }
    }
    if (best >= 0 || all.empty()) { return best; }
    string s = "lanes wait for each other:";
    for (const Group& g : all) { s += format(" lanes %08x at %s", g.lanes, where((uint32_t)g.pc).c_str()); }
    w.pc = (uint32_t)all[0].pc;
    fail(&w, s);
}
// These return whether the group may go on without another choice of group.
inline bool Machine::branch(Warp& w, size_t group, const Instruction& i, uint32_t lanes) {
    Group& g = w.groups[group];
    if (!lanes) {
        g.pc++;
        return true;
    }
    if (lanes == g.lanes) {
        g.pc = i.target;
        return false;
    }
    if (i.uniform) { fail(&w, "bra.uni diverges"); }
    g.lanes &= ~lanes, g.pc++;
    w.groups.push_back({i.target, lanes, false});
    return false;
}
inline bool Machine::sync(Warp& w, Group& g, const Instruction& i, uint32_t lanes) {
    const char* row = w.file + i.from[i.n_from - 1].at;  // the mask
    uint32_t members = get<uint32_t>(row, __builtin_ctz(lanes));
    each(lanes, [&](int l) {
        if (get<uint32_t>(row, l) != members) { fail(&w, "lanes of different masks", l); }
    });
    if (lanes & ~members) { fail(&w, format("lanes %08x are not in their own mask %08x", lanes & ~members, members)); }
    if (members & g.lanes & ~lanes) { fail(&w, "lanes of the mask are predicated off"); }
    if (members & ~w.live) { fail(&w, format("lanes %08x of the mask have returned", members & ~w.live)); }
    g.blocked = (members & ~lanes) != 0;
    if (g.blocked) { return false; }
    i.execute(w, i, lanes), g.pc++;
    return true;
}
inline bool Machine::aligned(Warp& w, Group& g, const Instruction& i, uint32_t lanes) {
    if (w.live != ALL) { fail(&w, "an .aligned instruction of a warp of which lanes have returned"); }
    g.blocked = lanes != ALL;
    if (g.blocked) { return false; }
    i.execute(w, i, lanes), g.pc++;
    return true;
}
// One instruction of a group.
inline bool Machine::step(Warp& w, size_t group) {
    Group& g = w.groups[group];
    const Instruction& i = kernel_->code[(size_t)g.pc];
    w.pc = (uint32_t)g.pc, executed++;
    uint32_t lanes = g.lanes;
    if (i.predicate != NONE) { lanes &= get_predicate(w, i.predicate) ^ (i.unless ? ALL : 0); }
    if (i.kind == BRANCH) { return branch(w, group, i, lanes); }
    if (!lanes) {
        g.pc++;
        return true;
    }
    switch (i.kind) {
        case PLAIN: i.execute(w, i, lanes), g.pc++; return true;
        case SYNC: return sync(w, g, i, lanes);
        case EXIT:
            w.live &= ~lanes, g.lanes &= ~lanes, g.pc++;
            for (Group& other : w.groups) { other.blocked = false; }
            if (!g.lanes) { w.groups.erase(w.groups.begin() + (long)group); }
            return false;
        default: break;
    }
    if (lanes != g.lanes) { fail(&w, "an .aligned instruction or a barrier under a predicate that differs"); }
    if (i.kind == ALIGNED) { return aligned(w, g, i, lanes); }
    g.blocked = lanes != w.live;  // a barrier waits for the lanes of the warp, then run_block for the warps
    if (!g.blocked) { g.pc++, w.at_barrier = true; }
    return false;
}
// Runs a warp until it waits at a barrier or all its lanes have returned.
inline void Machine::run(Warp& w) {
    w.at_barrier = false;
    while (!w.at_barrier) {
        int chosen = next_group(w), limit = 1 << 30;
        if (chosen < 0) {
            w.done = true;
            return;
        }
        Group* g = &w.groups[(size_t)chosen];
        for (const Group& other : w.groups) {
            if (other.pc > g->pc) { limit = std::min(limit, other.pc); }
        }
        while (step(w, (size_t)chosen) && g->pc < limit) {}
    }
}

inline void Machine::start_warp(uint32_t n) {
    Warp& w = *warps_[n];
    uint32_t count = std::min<uint32_t>(WARP, n_threads_ - n * WARP);
    w.file = files_.data() + (size_t)n * kernel_->file_bytes, w.index = (int)n;
    memcpy(w.file, kernel_->registers.data(), kernel_->file_bytes);
    w.live = count == WARP ? ALL : (1u << count) - 1;
    w.turn = 1, w.done = false, w.at_barrier = false;
    w.groups.assign(1, {0, w.live, false});
    for (Lane& l : w.lanes) { l.open.clear(), l.groups.clear(); }
    for (const Special& s : kernel_->specials) {
        for (uint32_t l = 0; l < WARP; l++) {
            uint32_t t = n * WARP + l;
            uint32_t v[7] = {t % block_.x, block_.x, at_.x, at_.y, at_.z, grid_.x, grid_.y};
            put<uint32_t>(w.file + s.at, (int)l, v[s.which]);
        }
    }
}
// After every warp has run: whether all have returned; else all must wait at the barrier.
inline bool Machine::meet() {
    uint32_t done = 0, waiting = 0;
    const Warp* first = NULL;
    for (uint32_t n = 0; n < n_warps_; n++) {
        Warp& w = *warps_[n];
        done += w.done, waiting += w.at_barrier;
        if (!w.at_barrier) { continue; }
        if (!first) { first = &w; }
        int count = (int)std::min<uint32_t>(WARP, n_threads_ - n * WARP);
        if (__builtin_popcount(w.live) != count) { fail(&w, "a barrier after lanes of the warp have returned"); }
    }
    if (done == n_warps_) { return true; }
    if (waiting != n_warps_) { fail(first, format("a barrier that %u of %u warps reach", waiting, n_warps_)); }
    return false;
}
inline void Machine::end_block() {
    for (uint32_t n = 0; n < n_warps_; n++) {
        for (const Lane& l : warps_[n]->lanes) {
            size_t left = l.open.size();
            for (const std::vector<Copy>& group : l.groups) { left += group.size(); }
            if (left) { note("a thread returns with copies in flight"); }
        }
    }
    epoch_++;
}
inline void Machine::run_block() {
    std::vector<uint32_t> turns;
    block_epoch_ = ++epoch_;
    std::fill(shared_.begin(), shared_.end(), (char)0xff);
    memset((void*)shared_shadow_.data(), 0, shared_shadow_.size() * sizeof(Shadow));
    for (uint32_t n = 0; n < n_warps_; n++) { start_warp(n), turns.push_back(n); }
    if (order == 1) { std::reverse(turns.begin(), turns.end()); }
    do {
        for (size_t s = turns.size(); order > 1 && s > 1; s--) {
            order = order * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(turns[s - 1], turns[(order >> 33) % s]);
        }
        for (uint32_t n : turns) {
            if (!warps_[n]->done) { run(*warps_[n]); }
        }
        epoch_++;
    } while (!meet());
    end_block();
}
inline void Machine::launch(const Kernel& kernel, Dim grid, Dim block, uint32_t dynamic_bytes, const char* parameters,
                            const std::vector<Region>& regions) {
    kernel_ = &kernel, grid_ = grid, block_ = block, parameters_ = parameters, regions_ = regions, last_region_ = 0;
    n_threads_ = block.x * block.y * block.z, n_warps_ = (n_threads_ + WARP - 1) / WARP;
    if (n_threads_ > kernel.most_threads) {
        throw Fault{format("a block of %u threads, registers are sure to suffice for %u: wanted __launch_bounds__",
                           n_threads_, kernel.most_threads)};
    }
    launch_epoch_ = ++epoch_;
    shared_.assign(kernel.dynamic_at - SHARED_BASE + dynamic_bytes, 0);
    shared_shadow_.assign(shared_.size() / 2 + 16, Shadow());
    while (warps_.size() < n_warps_) { warps_.emplace_back(new Warp), warps_.back()->machine = this; }
    files_.resize((size_t)n_warps_ * kernel.file_bytes + 256);  // LANES may look behind the last row

    if (pages_.size() > 4096) {  // each has 16 times the memory that it watches
        pages_.clear();
        std::fill(recent_, recent_ + PAGES, Recent());
    }
    uint64_t n = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t b = 0; b < n; b++) {
        uint64_t which = order == 1 ? n - 1 - b : b;
        at_ = {(uint32_t)(which % grid.x), (uint32_t)(which / grid.x % grid.y), (uint32_t)(which / grid.x / grid.y)};
        block_number_ = (uint32_t)which;
        run_block();
    }
}
}  // namespace ptx
#endif
