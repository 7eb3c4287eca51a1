// module.h: reads a PTX file, and decodes a kernel of it when it is first asked for: registers become rows of a file,
// operands offsets, opcodes functions (instructions.h). Nothing is guessed: an opcode, a modifier, an operand that is
// not known is a Fault that names kernel, line and text.
#ifndef PTX_MODULE_H
#define PTX_MODULE_H
#include "instructions.h"
#include <set>

namespace ptx {
struct Shared {
    uint32_t bytes, align;
    bool is_extern;  // dynamic
};
class Module {
  public:
    bool fuse = false;  // mul.f32 and add.f32 of its result become one fma, as ptxas may make them
    std::map<string, Kernel> kernels;
    std::map<string, Shared> shared;
    void read(const string& path);
    void parse(string text);
    Kernel& kernel(const string& name);

  private:
    void parse_entry(const string& text, size_t at, size_t* end, uint32_t line);
};

// ---- text

inline string trim(const string& s) {
    size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
    return a == string::npos ? "" : s.substr(a, b - a + 1);
}
// The pieces between separators that stand outside of brackets
inline Strings split(const string& s, char separator) {
    Strings pieces;
    string piece;
    int depth = 0;
    for (char c : s) {
        depth += strchr("{[(", c) != NULL, depth -= strchr("}])", c) != NULL;
        if (c == separator && depth == 0) {
            pieces.push_back(trim(piece)), piece.clear();
        } else {
            piece += c;
        }
    }
    if (!trim(piece).empty()) { pieces.push_back(trim(piece)); }
    return pieces;
}
inline Strings elements(const string& s) { return s[0] == '{' ? split(s.substr(1, s.size() - 2), ',') : Strings{s}; }
inline bool is_number(const string& s) {
    return !s.empty() && (isdigit((uint8_t)s[0]) || (s[0] == '-' && s.size() > 1));
}
inline int bits_of(const string& type) {
    if (type == "pred") { return 1; }
    if (type == "f16x2" || type == "bf16x2") { return 32; }
    if (type == "bf16") { return 16; }
    return type.size() >= 2 && strchr("subf", type[0]) ? atoi(type.c_str() + 1) : 0;
}

// ---- one kernel

class Decoder {
  public:
    Decoder(const Module* module, Kernel* kernel) : m(module), k(kernel), line(kernel->first_line) {}
    void decode() {
        const string& b = k->body;
        shared_variables();
        for (size_t at = 0; at < b.size();) {
            if (isspace((uint8_t)b[at])) {
                line += b[at++] == '\n';
                continue;
            }
            if (b[at] == '{') {
                scopes.emplace_back(), at++;
                continue;
            }
            if (b[at] == '}') {
                scopes.pop_back(), at++;
                continue;
            }
            if (b.compare(at, 4, ".loc") == 0 && isspace((uint8_t)b[at + 4])) {
                unsigned file, number;
                if (sscanf(b.c_str() + at, ".loc %u %u", &file, &number) == 2) { source = number; }
                at = std::min(b.find('\n', at), b.size());
                continue;
            }
            size_t end = b.find(';', at), colon = b.find(':', at);
            if (colon < end && b.find_first_of(" \t\n{[,", at) > colon) {
                labels[b.substr(at, colon - at)] = (int)k->code.size(), at = colon + 1;
                continue;
            }
            if (end == string::npos) { statement = b.substr(at), bad("no end of a statement"); }
            statement_of(trim(b.substr(at, end - at)));
            line += (uint32_t)std::count(b.begin() + (long)at, b.begin() + (long)end, '\n'), at = end + 1;
        }
        for (const auto& branch : branches) {
            auto label = labels.find(branch.second);
            if (label == labels.end()) { statement = branch.second, bad("label"); }
            k->code[branch.first].target = label->second;
        }
        Instruction end;
        end.kind = EXIT, end.execute = nothing, end.text = "end of the kernel", end.line = line;
        k->code.push_back(end);
        k->registers.assign(k->file_bytes, (char)0xff);  // NaN
        for (const Constant& c : k->constants) {
            char* row = &k->registers[c.row.at];
            for (int l = 0; l < (c.row.bits == 1 ? 1 : WARP); l++) {
                if (c.row.bits == 64) {
                    put<uint64_t>(row, l, c.value);
                } else {
                    put<uint32_t>(row, l, (uint32_t)c.value);
                }
            }
        }
        if (m->fuse) { fuse_products(); }
        k->decoded = true;
    }

  private:
    const Module* m;
    Kernel* k;
    std::vector<std::map<string, Row>> scopes{1};
    std::map<std::pair<uint64_t, int>, Row> constants;
    Row specials[7] = {};
    std::map<string, int> labels;
    std::vector<std::pair<size_t, string>> branches;
    uint32_t line, source = 0;
    string statement;

    // The instruction that is being decoded: its parts, its operands, what comes of it.
    Strings op, arg;
    string type;
    int bits;
    Instruction i;

    [[noreturn]] void bad(const string& what) {
        throw Fault{format("%s: line %u: %s: %s", k->name.c_str(), line, what.c_str(), statement.c_str())};
    }
    void need(size_t n) {
        if (arg.size() != n) { bad(format("%zu operands are wanted", n)); }
    }
    void only(const std::set<string>& known) {  // these, and last a type
        for (size_t n = 1; n < op.size(); n++) {
            bool is_type = bits && n + 1 == op.size();
            if (!known.count(op[n]) && !is_type) { bad("modifier ." + op[n]); }
        }
    }
    // wider: integers may lie in wider registers
    void check_width(const string& s, Row r, int width, bool wider) {
        if (r.bits == width || (wider && r.bits > width)) { return; }
        bad(format("register %s has %d bits, not %d", s.c_str(), r.bits, width));
    }

    Row new_row(int width) {
        if (width > 1) { k->file_bytes = (k->file_bytes + 63) / 64 * 64; }
        Row r = {k->file_bytes, (uint8_t)width};
        k->file_bytes += width == 1 ? 4 : width == 64 ? 256 : 128;
        return r;
    }
    bool find(const string& name, Row* r) const {
        for (size_t n = scopes.size(); n-- > 0;) {
            auto found = scopes[n].find(name);
            if (found != scopes[n].end()) {
                *r = found->second;
                return true;
            }
        }
        return false;
    }
    void from(const string& s, int width, bool wider = false) {
        if (i.n_from == sizeof i.from / sizeof *i.from) { bad("too many sources"); }
        i.from[i.n_from++] = source_row(s, width, wider);
    }

    uint64_t number(const string& s, int width) {
        char* end;
        bool single = s.size() == 10 && s[1] == 'f', twice = s.size() == 18 && s[1] == 'd';
        if ((single && width != 32) || (twice && width != 64)) { bad("a number of another type"); }
        if (single || twice) { return strtoull(s.c_str() + 2, NULL, 16); }
        uint64_t v = s[0] == '-' ? (uint64_t)strtoll(s.c_str(), &end, 0) : strtoull(s.c_str(), &end, 0);
        if (*end) { bad("number " + s); }
        return width == 32 ? (uint32_t)v : width == 16 ? (uint16_t)v : v;
    }
    Row constant(uint64_t value, int width) {
        auto found = constants.find({value, width});
        if (found != constants.end()) { return found->second; }
        k->constants.push_back({new_row(width), value});
        return constants[{value, width}] = k->constants.back().row;
    }
    bool special(const string& s, Row* r) {
        static const char* names[] = {"%tid.x",   "%ntid.x",   "%ctaid.x", "%ctaid.y",
                                      "%ctaid.z", "%nctaid.x", "%nctaid.y"};
        for (int n = 0; n < 7; n++) {
            if (s != names[n]) { continue; }
            if (!specials[n].bits) { k->specials.push_back({(specials[n] = new_row(32)).at, n}); }
            *r = specials[n];
            return true;
        }
        return false;
    }
    Row source_row(const string& s, int width, bool wider) {
        Row r;
        if (find(s, &r) || special(s, &r)) {
            check_width(s, r, width, wider);
            return r;
        }
        if (is_number(s)) { return constant(width == 1 ? (number(s, 64) ? ALL : 0) : number(s, width), width); }
        auto own = k->symbols.find(s);
        if (own != k->symbols.end()) { return constant(own->second, width); }
        bad("operand " + s);
    }
    void to(const string& s, int width, bool wider = false) {
        Row r;
        if (!find(s, &r)) { bad("destination " + s); }
        check_width(s, r, width, wider);
        if (i.n_to == sizeof i.to / sizeof *i.to) { bad("too many destinations"); }
        i.to[i.n_to++] = r;
    }
    void space_of() {
        i.space = has(op, "global")   ? GLOBAL
                  : has(op, "shared") ? SHARED
                  : has(op, "param")  ? PARAM
                                      : (bad("a generic address"), GLOBAL);
    }
    // "[base+offset]"; of a parameter only an offset is left.
    void address(const string& s, int64_t* offset) {
        if (s[0] != '[') { bad("an address is wanted"); }
        string inside = trim(s.substr(1, s.size() - 2));
        size_t plus = inside.find('+');
        string base = trim(inside.substr(0, plus));
        *offset = plus == string::npos ? 0 : (int64_t)number(trim(inside.substr(plus + 1)), 64);
        if (i.space != PARAM) { return from(base, i.space == GLOBAL ? 64 : 32, i.space != GLOBAL); }
        for (const Parameter& p : k->parameters) {
            if (p.name == base && *offset >= 0 && *offset + bits / 8 <= p.bytes) {
                *offset += p.offset;
                return;
            }
        }
        bad("parameter " + base);
    }

    // ---- each kind of instruction

    void move() {
        if (op[0] == "cvta") {  // from a generic address to a global one: the same number
            if (op != Strings{"cvta", "to", "global", "u64"}) { bad("cvta"); }
            op = {"mov", "b64"}, type = "b64";
        }
        only({}), need(2);
        Strings into = elements(arg[0]), out = elements(arg[1]);
        for (const string& s : into) { to(s, bits / (int)into.size()); }
        for (const string& s : out) { from(s, bits / (int)out.size()); }
        if (type == "pred") {
            i.execute = EXECUTE { put_predicate(w, i.to[0].at, lanes, get_predicate(w, i.from[0].at)); };
        } else if (into.size() == 1 && out.size() == 1) {
            i.execute =
                by_type("b" + std::to_string(bits), [](auto z) -> Execute { LANES(decltype(z), decltype(z), a) });
        } else {
            i.execute = EXECUTE {  // the first element is the lowest
                each(lanes, [&](int l) {
                    uint64_t v = 0;
                    for (int e = 0, at = 0; e < i.n_from; at += i.from[e++].bits) {
                        v |= get_any(w, i.from[e], l) << at;
                    }
                    for (int e = 0, at = 0; e < i.n_to; at += i.to[e++].bits) { put_any(w, i.to[e], l, v >> at); }
                });
            };
        }
    }
    void load_store() {
        bool is_load = op[0] == "ld";
        only({"global", "shared", "param", "v2", "v4", "v8"}), need(2), space_of();
        i.bytes = (uint8_t)(bits / 8), i.is_signed = type[0] == 's';
        if (bits < 8 || bits > 64 || (!is_load && i.space == PARAM)) { bad("type or space"); }
        address(arg[is_load ? 1 : 0], &i.offset);
        Strings list = elements(arg[is_load ? 0 : 1]);
        if (list.size() != (has(op, "v2") ? 2u : has(op, "v4") ? 4u : has(op, "v8") ? 8u : 1u)) { bad("elements"); }
        for (const string& s : list) { is_load ? to(s, bits, true) : from(s, bits, true); }
        i.execute = is_load ? load : store;
    }
    void load_matrices() {  // ldmatrix, movmatrix
        i.kind = ALIGNED, need(2);
        if (op == Strings{"movmatrix", "sync", "aligned", "m8n8", "trans", "b16"}) {
            to(arg[0], 32), from(arg[1], 32), i.execute = move_matrix;
            return;
        }
        only({"sync", "aligned", "m8n8", "x4", "trans", "shared", "b16"}), space_of();
        for (const string& s : elements(arg[0])) { to(s, 32); }
        if (i.n_to != 4) { bad("registers"); }
        address(arg[1], &i.offset);
        i.transposed = has(op, "trans"), i.execute = load_matrix;
    }
    void product() {
        string all;
        for (size_t n = 1; n < op.size(); n++) { all += "." + op[n]; }
        i.half = all == ".sync.aligned.m16n8k16.row.col.f32.f16.f16.f32";
        if (!i.half && all != ".sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") { bad("mma"); }
        need(4);
        const size_t sizes[4] = {4, 4, 2, 4};  // d, a, b, c
        for (int n = 0; n < 4; n++) {
            Strings list = elements(arg[n]);
            if (list.size() != sizes[n]) { bad("registers"); }
            for (const string& s : list) { n == 0 ? to(s, 32) : from(s, 32); }
        }
        i.kind = ALIGNED, i.execute = matrix_product;
    }
    void shuffles() {
        only({"sync", "bfly", "b32"}), need(5);
        size_t bar = arg[0].find('|');  // a register, or with a predicate: whether the lane that was read is inside
        to(trim(arg[0].substr(0, bar)), 32);
        if (bar != string::npos) { to(trim(arg[0].substr(bar + 1)), 1); }
        for (int n = 1; n < 5; n++) { from(arg[n], 32); }
        i.kind = SYNC, i.execute = has(op, "bfly") ? shuffle : NULL;
    }
    void barriers() {  // bar.sync 0, bar.warp.sync
        need(1), only({"warp", "sync"});
        if (has(op, "warp")) {
            from(arg[0], 32), i.kind = SYNC, i.execute = warp_sync;
            return;
        }
        if (arg[0] != "0") { bad("a barrier other than 0"); }
        i.kind = BARRIER, i.execute = nothing;
    }
    void copies() {
        if (op == Strings{"cp", "async", "commit_group"}) {
            need(0), i.execute = copy_commit;
        } else if (op == Strings{"cp", "async", "wait_group"}) {
            need(1), i.offset = (int64_t)number(arg[0], 32), i.execute = copy_wait;
        } else if (op == Strings{"cp", "async", "cg", "shared", "global"}) {
            need(4), i.space = SHARED, address(arg[0], &i.offset), i.space = GLOBAL, address(arg[1], &i.from_offset);
            if (arg[2] != "16") { bad("size"); }
            from(arg[3], 32), i.execute = copy;
        }
    }
    void atomics() {
        bool is_atom = op[0] == "atom";
        only({"relaxed", "gpu", "global", "add", "max", "v2"}), need(is_atom ? 3 : 2), space_of();
        i.is_float = has(op, "add");
        if (type != (i.is_float ? "f32" : "u32") || i.space != GLOBAL) { bad("operation"); }
        if (is_atom) { to(arg[0], bits), arg.erase(arg.begin()); }
        address(arg[0], &i.offset);
        for (const string& s : elements(arg[1])) { from(s, bits); }
        if (i.n_from != (has(op, "v2") ? 3 : 2) || (is_atom && i.n_from > 2)) { bad("elements"); }
        i.execute = atomic;
    }
    void comparisons() {
        if (op.size() != 3) { bad("modifiers"); }
        need(3), to(arg[0], 1), from(arg[1], bits), from(arg[2], bits);
        i.execute = comparison_of(op[1], type);
    }
    void select() {
        only({}), need(4), to(arg[0], bits), from(arg[1], bits), from(arg[2], bits), from(arg[3], 1);
        i.execute = by_type("b" + std::to_string(bits), [](auto z) -> Execute {
            typedef decltype(z) T;
            return EXECUTE {
                uint32_t first = get_predicate(w, i.from[2].at);
                each(lanes, [&](int l) { put<T>(TO(0), l, first >> l & 1 ? get<T>(FROM(0), l) : get<T>(FROM(1), l)); });
            };
        });
    }
    void jump() {  // bra, ret
        only({"uni"}), i.kind = op[0] == "bra" ? BRANCH : EXIT, i.execute = nothing;
        if (i.kind == EXIT) { return; }
        need(1), i.uniform = op.size() > 1, branches.push_back({k->code.size(), arg[0]});
    }
    void convert() {
        const string into = op.size() > 2 ? op[op.size() - 2] : "", how = op.size() == 4 ? op[1] : "";
        bool two = arg.size() == 3, integers = strchr("su", into[0]) && strchr("su", type[0]);
        if (!two) { need(2); }
        if (op.size() > 4) { bad("modifiers"); }
        to(arg[0], bits_of(into), integers);
        for (size_t n = 1; n < arg.size(); n++) { from(arg[n], bits, integers); }
        i.bytes = (uint8_t)(bits / 8), i.to_bytes = (uint8_t)(bits_of(into) / 8);
        i.is_signed = type[0] == 's', i.to_signed = into[0] == 's';
        i.execute = conversion_of(into, type, how, two);
    }
    void compute() {
        const string& o = op[0];
        static const std::map<string, size_t> sources = {
            {"neg", 1}, {"not", 1}, {"rcp", 1}, {"sqrt", 1}, {"ex2", 1}, {"add", 2}, {"sub", 2},
            {"mul", 2}, {"div", 2}, {"rem", 2}, {"min", 2},  {"max", 2}, {"and", 2}, {"or", 2},
            {"xor", 2}, {"shl", 2}, {"shr", 2}, {"mad", 3},  {"fma", 3}, {"bfe", 3}, {"bfi", 4}};
        auto n = sources.find(o);
        bool is_float = type[0] == 'f', shift = o == "shl" || o == "shr";
        if (n == sources.end()) { bad("opcode"); }
        string how = op.size() > 2 ? op[1] : "";
        for (size_t m = 2; m + 1 < op.size(); m++) { how += "." + op[m]; }
        if (!is_float && !how.empty() && o != "mul" && o != "mad") { bad("modifier ." + how); }
        need(n->second + 1), to(arg[0], how == "wide" ? 2 * bits : bits);
        for (size_t s = 1; s <= n->second; s++) { from(arg[s], shift && s == 2 ? 32 : bits); }
        i.execute = type == "pred" ? predicate_of(o) : is_float ? float_of(o, how, type) : integer_of(o, how, type);
    }

    void lower() {
        const string& o = op[0];
        if (o == "mov" || o == "cvta") { return move(); }
        if (o == "ld" || o == "st") { return load_store(); }
        if (o == "ldmatrix" || o == "movmatrix") { return load_matrices(); }
        if (o == "mma") { return product(); }
        if (o == "shfl") { return shuffles(); }
        if (o == "bar") { return barriers(); }
        if (o == "cp") { return copies(); }
        if (o == "atom" || o == "red") { return atomics(); }
        if (o == "setp") { return comparisons(); }
        if (o == "selp") { return select(); }
        if (o == "bra" || o == "ret") { return jump(); }
        if (o == "cvt") { return convert(); }
        compute();
    }
    void instruction(const string& s) {
        i = Instruction();
        i.text = s, i.line = line, i.source = source;
        size_t at = 0;
        if (s[0] == '@') {
            Row r;
            i.unless = s[1] == '!';
            size_t end = s.find_first_of(" \t"), begin = i.unless ? 2 : 1;
            if (!find(s.substr(begin, end - begin), &r) || r.bits != 1) { bad("predicate"); }
            i.predicate = r.at, at = s.find_first_not_of(" \t", end);
        }
        size_t end = std::min(s.find_first_of(" \t\n", at), s.size());
        op = split(s.substr(at, end - at), '.'), arg = split(s.substr(end), ',');
        type = op.back(), bits = bits_of(type);
        lower();
        if (!i.execute) { bad("an instruction that this interpreter does not know"); }
        k->code.push_back(i);
    }

    // ---- statements

    void declare_registers(const string& s) {  // ".reg .b32 %r<24>" or ".reg .pred p, q"
        size_t at = s.find('.', 1), end = s.find_first_of(" \t", at);
        int width = bits_of(s.substr(at + 1, end - at - 1));
        if (width != 1 && width != 16 && width != 32 && width != 64) { bad("type of a register"); }
        for (const string& name : split(s.substr(end), ',')) {
            size_t angle = name.find('<');
            if (angle == string::npos) {
                scopes.back()[name] = new_row(width);
                continue;
            }
            for (int n = 0; n < atoi(name.c_str() + angle + 1); n++) {
                scopes.back()[name.substr(0, angle) + std::to_string(n)] = new_row(width);
            }
        }
    }
    void statement_of(const string& s) {
        statement = s;
        if (s.compare(0, 4, ".reg") == 0) {
            declare_registers(s);
        } else if (s[0] != '.') {
            instruction(s);
        } else if (s.compare(0, 7, ".pragma") != 0) {
            bad("directive");
        }
    }
    // Before the statements: any of them may name one. The dynamic ones begin together, after the others.
    void shared_variables() {
        for (const auto& v : m->shared) {
            if (k->body.find(v.first) == string::npos || v.second.is_extern) { continue; }
            k->static_bytes = (k->static_bytes + v.second.align - 1) / v.second.align * v.second.align;
            k->symbols[v.first] = SHARED_BASE + k->static_bytes;
            k->static_bytes += v.second.bytes;
        }
        k->dynamic_at = SHARED_BASE + (k->static_bytes + 15) / 16 * 16;
        for (const auto& v : m->shared) {
            if (v.second.is_extern) { k->symbols[v.first] = k->dynamic_at; }
        }
    }
    // mul.f32 and the add.f32 or sub.f32 of its result as one fma, within a basic block: without .rn ptxas may, and
    // need not.
    void fuse_products() {
        std::set<int> targets;
        std::map<uint32_t, std::pair<Row, Row>> products;  // register: what it is the product of
        for (const Instruction& x : k->code) {
            if (x.kind == BRANCH) { targets.insert(x.target); }
        }
        for (size_t at = 0; at < k->code.size(); at++) {
            Instruction& x = k->code[at];
            auto is = [&](const char* o) { return x.text.compare(0, strlen(o), o) == 0; };
            if (targets.count((int)at) || (at && k->code[at - 1].kind == BRANCH)) { products.clear(); }
            bool product = is("mul.f32"), minus = is("sub.f32");
            Row a = x.from[0], b = x.from[1];
            if (is("add.f32") || minus) {
                bool left = products.count(a.at);
                auto found = products.find(left ? a.at : b.at);
                if (found != products.end()) {
                    x.from[0] = found->second.first, x.from[1] = found->second.second, x.from[2] = left ? b : a,
                    x.n_from = 3;
                    x.minus_sum = minus && left, x.minus_product = minus && !left;  // x y - c; c - x y
                    x.execute = [](Warp& w, const Instruction& i, uint32_t lanes) {
                        each(lanes, [&](int l) {
                            float p = get<float>(FROM(0), l), q = get<float>(FROM(1), l), c = get<float>(FROM(2), l);
                            put<float>(TO(0), l, fmaf(i.minus_product ? -p : p, q, i.minus_sum ? -c : c));
                        });
                    };
                }
            }
            for (int e = 0; e < x.n_to; e++) {  // a register that is written ends the products of it and with it
                uint32_t r = x.to[e].at;
                for (auto p = products.begin(); p != products.end();) {
                    bool gone = p->first == r || p->second.first.at == r || p->second.second.at == r;
                    p = gone ? products.erase(p) : std::next(p);
                }
            }
            if (product && a.at != x.to[0].at && b.at != x.to[0].at) { products[x.to[0].at] = {a, b}; }
        }
    }
};

// ---- a file

inline void Module::read(const string& path) {
    FILE* f = fopen(path.c_str(), "rb");
    if (!f) { throw Fault{"cannot read " + path}; }
    string text;
    char buffer[1 << 16];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;) { text.append(buffer, n); }
    fclose(f);
    parse(text);
}
// Declarations and the bodies of kernels, from a text of which comments are blanked out.
inline void Module::parse(string text) {
    for (size_t a = 0; (a = text.find("//", a)) != string::npos;) {
        size_t end = std::min(text.find('\n', a), text.size());
        if (!a || text[a - 1] != '"') { std::fill(text.begin() + (long)a, text.begin() + (long)end, ' '); }
        a = end;
    }
    uint32_t line = 1;
    for (size_t at = 0; at < text.size();) {
        size_t end = std::min(text.find('\n', at), text.size());
        string s = text.substr(at, end - at);
        unsigned align, bytes;
        char name[512];
        if (sscanf(s.c_str(), ".extern .shared .align %u .b8 %511[^[][]", &align, name) == 2) {
            shared[name] = {0, align, true};
        } else if (sscanf(s.c_str(), ".shared .align %u .b8 %511[^[][%u]", &align, name, &bytes) == 3) {
            shared[name] = {bytes, align, false};
        } else if (s.compare(0, 7, ".global") == 0 || s.compare(0, 6, ".const") == 0 || s.compare(0, 5, ".func") == 0) {
            throw Fault{"an instruction that this interpreter does not know: " + s};
        }
        size_t begin = at;
        if (s.find(".entry") == string::npos) {
            at = end + 1;
        } else {
            parse_entry(text, at + s.find(".entry") + 7, &at, line);
        }
        line += (uint32_t)std::count(text.begin() + (long)begin, text.begin() + (long)std::min(at, text.size()), '\n');
    }
}
inline void Module::parse_entry(const string& text, size_t at, size_t* end, uint32_t line) {
    size_t open = text.find('{', at), close = open, paren = std::min(text.find('(', at), open);
    for (int depth = 0; close < text.size(); close++) {
        depth += text[close] == '{', depth -= text[close] == '}';
        if (depth == 0) { break; }
    }
    Kernel k;
    k.name = trim(text.substr(at, paren - at));
    size_t last = text.find(')', paren);
    for (const string& p : split(paren < open ? text.substr(paren + 1, last - paren - 1) : "", ',')) {
        char type[16], name[512];
        unsigned align, bytes;
        if (sscanf(p.c_str(), ".param .align %u .b8 %511[^[][%u]", &align, name, &bytes) != 3) {
            if (sscanf(p.c_str(), ".param .%15s", type) != 1 || !bits_of(type)) { throw Fault{"parameter " + p}; }
            align = bytes = (unsigned)bits_of(type) / 8;  // sm_100 has more words between type and name
            snprintf(name, sizeof name, "%s", p.c_str() + p.find_last_of(" \t") + 1);
        }
        k.parameter_bytes = (k.parameter_bytes + align - 1) / align * align;
        k.parameters.push_back({name, k.parameter_bytes, bytes});
        k.parameter_bytes += bytes;
    }
    unsigned x = 1, y = 1, z = 1;
    size_t bounds = text.find(".maxntid", last);
    if (bounds < open && sscanf(text.c_str() + bounds, ".maxntid %u, %u, %u", &x, &y, &z) >= 1) {
        k.most_threads = x * y * z;
    }
    k.first_line = line + (uint32_t)std::count(text.begin() + (long)at, text.begin() + (long)open, '\n');
    k.body = text.substr(open + 1, close - open - 1);
    kernels[k.name] = k;
    *end = close + 1;
}
inline Kernel& Module::kernel(const string& name) {
    auto found = kernels.find(name);
    if (found == kernels.end()) { throw Fault{"no kernel " + name + " in the PTX"}; }
    Kernel& k = found->second;
    if (!k.decoded) { Decoder(this, &k).decode(); }
    return k;
}
}  // namespace ptx
#endif
