// test_files.c: tests of mta/util.h, json.h, safetensors.h and checkpoint.h: round trips, and above all what strangers,
// full disks and crashes do to files.
//   make build/test_files && build/test_files
#define CHECKPOINT_PIECE 7  // values: every tensor is written in several pieces
#include "mta/util.h"
#include "mta/json.h"
#include "mta/safetensors.h"
#include "mta/checkpoint.h"
#include "mta/run.h"

#include "check.h"
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

static bool says(const Error* e, const char* part) {  // the message of a refusal names the cause
    bool good = strstr(e->text, part) != NULL && !strchr(e->text, '\n');
    if (!good) { printf("  message \"%s\" lacks \"%s\"\n", e->text, part); }
    return good;
}

// ---------------------------------------------------------------------------------------------------------------------
// util.h

// In a child: descriptors of which `closed` has the bit set are closed; afterwards all three are open, those that were
// open are what they were, and the next file gets none of their numbers.
static bool standard_files_open(int closed) {
    pid_t pid = fork();
    if (pid == 0) {
        int pipes[2];
        if (pipe(pipes) || dup2(pipes[1], 9) != 9) { _exit(1); }
        for (int fd = 0; fd <= 2; fd++) {
            if (closed & 1 << fd) {
                close(fd);
            } else {
                dup2(9, fd);
            }
        }
        for (int fd = 3; fd < 9; fd++) { close(fd); }
        open_standard_files();
        bool good = open(test_folder(), O_RDONLY) == 3;
        struct stat null, end, st;
        good = good && stat("/dev/null", &null) == 0 && fstat(9, &end) == 0;
        for (int fd = 0; good && fd <= 2; fd++) {
            const struct stat* want = closed & 1 << fd ? &null : &end;
            good = fstat(fd, &st) == 0 && st.st_dev == want->st_dev && st.st_ino == want->st_ino;
        }
        _exit(!good);
    }
    int status = 1;
    return waitpid(pid, &status, 0) == pid && status == 0;
}

// In a child: n characters are printed to a full disk by printf, whose buffer may have been written before put_out
// asks.
static bool full_disk_is_told(int n) {
    pid_t pid = fork();
    if (pid == 0) {
        if (!freopen("/dev/full", "w", stdout) || !freopen("/dev/null", "w", stderr)) { _exit(2); }
        static char buffer[64];
        setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
        for (int i = 0; i < n; i++) { putchar('x'); }
        put_out("", 0, true);
        _exit(0);
    }
    int status = 0;
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

// Limits of a tree whose /proc/self/cgroup has this line, and whose file below /sys/fs/cgroup these words; memory.stat
// beside it counts 1000 bytes that do not give way, 400 of them of files in memory.
static Limits limits_of(const char* line, const char* file, const char* words) {
    static int trees = 0;
    char root[PATH_SIZE], path[2 * PATH_SIZE], text[PATH_SIZE];
    Error e = {{0}};
    snprintf(root, sizeof root, "%s/limits%d", test_folder(), trees++);
    const char* const files[][2] = {{"proc/self/cgroup", line},
                                    {file, words},
                                    {"memory.stat", "file 500\nanon 600\nshmem 400\ntotal_rss 600\ntotal_shmem 400"},
                                    {"cpu.cfs_period_us", "100000"}};
    for (int i = 0; i < 4; i++) {
        const char* beside = i < 2 ? "" : file;  // the last two lie beside it
        int folder = i < 2 ? 0 : (int)(strrchr(file, '/') - file);
        snprintf(path, sizeof path, "%s/%.*s/%s", root, folder, beside, files[i][0]);
        char* slash = strrchr(path, '/');
        *slash = 0;
        CHECK(make_dirs(path, &e));
        *slash = '/';
        int n = snprintf(text, sizeof text, i ? "%s\n" : "9:pids:/p\n%s\n", files[i][1]);
        CHECK(write_file_synced(path, text, (size_t)n, &e));
    }
    return machine_limits(root);
}

// Containers and batch systems: the narrowest limit of the process's cgroups and those above them, in both versions.
static void test_limits(void) {
    const char* const of_memory[][3] = {{"0::/a/b", "sys/fs/cgroup/a/b/memory.max", "5000"},
                                        {"0::/a/b", "sys/fs/cgroup/a/memory.max", "5000"},
                                        {"0::/../b", "sys/fs/cgroup/memory.max", "5000"},
                                        {"4:memory:/a/b", "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "5000"}};
    for (int i = 0; i < 4; i++) {
        Limits limits = limits_of(of_memory[i][0], of_memory[i][1], of_memory[i][2]);
        check(limits.memory == 4000 && limits.cores == 1e300, of_memory[i][1], of_memory[i][0]);
    }
    CHECK(limits_of("0::/", "sys/fs/cgroup/memory.max", "max").memory == 1e300);
    CHECK(limits_of("0::/", "sys/fs/cgroup/memory.max", "900").memory == 1);  // more is used than may be
    const struct {
        const char *line, *file, *words;
        double cores;
    } of_cores[] = {{"0::/a", "sys/fs/cgroup/a/cpu.max", "150000 100000", 1.5},
                    {"0::/a", "sys/fs/cgroup/cpu.max", "200000 100000", 2},
                    {"0::/", "sys/fs/cgroup/cpu.max", "max 100000", 1e300},
                    {"4:cpu,cpuacct:/a", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "300000", 3},
                    {"4:cpuacct,cpu:/a", "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000", 3},
                    {"4:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1", 1e300},
                    {"4:cpuset:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000", 1e300}};
    for (int i = 0; i < 7; i++) {
        Limits limits = limits_of(of_cores[i].line, of_cores[i].file, of_cores[i].words);
        check(limits.cores == of_cores[i].cores, of_cores[i].file, of_cores[i].words);
    }
    Limits none = machine_limits(at("nothing"));
    CHECK(none.memory == 1e300 && none.cores == 1e300);
    double available = memory_available(1), third = memory_available(3);
    CHECK(available > 0 && available <= machine_limits("").memory);
    CHECK(third < available / 2 && third > available / 5);  // others may take some in between
    for (int i = 0; i < 2; i++) {                           // a limit of the process's own is for it alone
        const int kind = i ? RLIMIT_DATA : RLIMIT_AS;
        const rlim_t much = (rlim_t)1 << 50, left = (rlim_t)1 << 28;  // a sanitizer maps some 2^44
        struct rlimit before, limit;
        getrlimit(kind, &before);
        limit = before;
        limit.rlim_cur = much;
        setrlimit(kind, &limit);
        double used = (double)much - memory_limit();
        CHECK(used > 0 && used < (double)much / 16);
        limit.rlim_cur = (rlim_t)used + left;
        setrlimit(kind, &limit);
        available = memory_available(1), third = memory_available(3);
        setrlimit(kind, &before);
        CHECK(available <= (double)left && available > (double)left / 2 && third > (double)left / 2);
    }
}

static void test_util(void) {
    for (int closed = 0; closed < 8; closed++) { CHECK(standard_files_open(closed)); }
    for (int n = 1; n <= 200; n++) { CHECK(full_disk_is_told(n)); }
    Error e = {{0}};
    CHECK(!fail(&e, "first %d", 1) && !fail(&e, "second") && !strcmp(e.text, "first 1"));
    char path[2000];
    for (int i = 0; i < 999; i++) { memcpy(path + 2 * i, "\xC3\xBC", 2); }  // of a long name the reason is kept
    path[1998] = 0;
    Error cut = {{0}};
    fail(&cut, "%s: %s", path, "what is wrong");
    size_t length = strlen(cut.text);
    CHECK(length > 500 && length < sizeof cut.text && utf8_valid_up_to(cut.text, length) == length);
    CHECK(strstr(cut.text, "\xBC...\xC3") && !strcmp(cut.text + length - 17, "\xC3\xBC: what is wrong"));
    CHECK(crc32_update(0, "123456789", 9) == 0xCBF43926u);  // the check value of the CRC's definition
    char bytes[1000];
    for (int i = 0; i < 1000; i++) { bytes[i] = (char)(i * 37 + i / 7); }
    uint32_t whole = crc32_update(0, bytes, 1000);
    bool same = true;
    for (size_t cut = 0; cut <= 1000; cut += 13) {
        same = same && crc32_update(crc32_update(0, bytes, cut), bytes + cut, 1000 - cut) == whole;
    }
    CHECK(same);
    size_t out = 7;
    CHECK(!mul_size(SIZE_MAX / 2, 3, &out) && out == 7 && mul_size(1u << 20, 1u << 20, &out) && out == (size_t)1 << 40);
    CHECK(!add_size(SIZE_MAX, 1, &out) && add_size(1, 2, &out) && out == 3);

    CHECK(make_dirs(at("a/b/c"), &(Error){{0}}) && make_dirs(at("a/b/c"), &(Error){{0}}) && dir_exists(at("a/b")));
    CHECK(write_file_synced(at("a/f"), bytes, 1000, &(Error){{0}}) && file_exists(at("a/f")) && !file_exists(at("a")));
    e = (Error){{0}};
    CHECK(!make_dirs(at("a/f/g"), &e) && says(&e, "a/f: cannot create directory: File exists"));
    e = (Error){{0}};  // nothing is there and nothing can be made: mkdir's own reason, not "No such file or directory"
    if (dir_exists("/sys/kernel")) {
        CHECK(!make_dirs("/sys/kernel/no_such_run", &e) && mkdir("/sys/kernel/no_such_run", 0777) &&
              says(&e, strerror(errno)) && errno != ENOENT);
    }
    char* text;
    size_t n;
    CHECK(read_file(at("a/f"), 1000, &text, &n, &(Error){{0}}) && n == 1000 && !memcmp(text, bytes, n) && !text[n]);
    free(text);
    e = (Error){{0}};
    CHECK(!read_file(at("a/f"), 999, &text, &n, &e) && says(&e, "more than the 999 bytes"));
    e = (Error){{0}};  // purged scratch space, a cache without its blobs
    CHECK(symlink("gone", at("link")) == 0 && !make_dirs(at("link/run"), &e) &&
          says(&e, "link: cannot create directory: a link that leads nowhere"));
    e = (Error){{0}};
    CHECK(!read_file(at("link"), 999, &text, &n, &e) && says(&e, "link: a link that leads nowhere"));
    e = (Error){{0}};  // a link that is there, and leads to something
    CHECK(symlink("loop", at("loop")) == 0 && !make_dirs(at("loop"), &e) &&
          says(&e, "loop: cannot create directory: Too many levels of symbolic links"));
    MappedFile m;
    e = (Error){{0}};
    CHECK(!map_file(&m, at("link"), &e) && says(&e, "link: a link that leads nowhere"));
    SafeTensors tensors;
    e = (Error){{0}};
    CHECK(make_dirs(at("links"), &e) && symlink("../gone", at("links/model.safetensors")) == 0 &&
          !safetensors_open_dir(&tensors, at("links"), &e) && says(&e, "model.safetensors: a link that leads nowhere"));
    CHECK(map_file(&m, at("a/f"), &(Error){{0}}) && m.size == 1000 && !memcmp(m.data, bytes, 1000));
    unmap_file(&m);
    e = (Error){{0}};
    CHECK(!map_file(&m, at("none"), &e) && says(&e, "none: No such file"));
    e = (Error){{0}};
    CHECK(!map_file(&m, test_folder(), &e) && says(&e, "not a regular file"));
    CHECK(write_file_synced(at("empty"), "", 0, &(Error){{0}}) && map_file(&m, at("empty"), &(Error){{0}}) &&
          m.size == 0 && !m.data);
    e = (Error){{0}};
    CHECK(!write_file_synced("/dev/full", bytes, 1000, &e) && says(&e, "/dev/full"));
    char joined[PATH_SIZE];
    path_join(joined, sizeof joined, "a/", "b");
    CHECK(!strcmp(joined, "a/b"));
    path_join(joined, sizeof joined, "a", "/b");
    CHECK(!strcmp(joined, "/b"));
    Text t = {0};
    for (int i = 0; i < 1000; i++) { text_printf(&t, "%d,", i); }
    CHECK(t.n == 10 * 2 + 90 * 3 + 900 * 4 && t.text[t.n] == 0 && !strncmp(t.text + t.n - 4, "999,", 4));
    text_free(&t);
    double t0 = seconds_now();
    CHECK(seconds_now() >= t0);
}

// ---------------------------------------------------------------------------------------------------------------------
// json.h

static bool json_refuses(const char* text, const char* because) {
    Error e = {{0}};
    Json* j = json_parse(text, strlen(text), &e);
    bool refused = !j;
    json_free(j);
    if (!refused) { printf("  accepted: %s\n", text); }
    return refused && says(&e, because);
}

static void test_json(void) {
    const char* text = " {\"a\": [1, -2.5, 1e3, 9007199254740993, true, null], \"s\": "
                       "\"x\\u00e9\\ud83d\\ude00\\n\\u0000y\", \"o\": {\"b\": \"later\"}} ";
    Error e = {{0}};
    Json* j = json_parse(text, strlen(text), &e);
    CHECK(j && j->count == 3 && !strcmp(json_get(json_get(j, "o"), "b")->string, "later"));
    const Json* s = json_get(j, "s");
    CHECK(s && s->length == 10 && !memcmp(s->string, "x\xC3\xA9\xF0\x9F\x98\x80\n\0y", 10));
    const Json* list = j ? j->child : NULL;
    CHECK(list && list->count == 6 && list->child->integer == 1 && list->child->next->number == -2.5 &&
          !list->child->next->is_integer);
    int64_t n = 0;
    CHECK(list && json_integer(list->child->next->next, 0, 1000, &n) && n == 1000);
    // beyond a double
    CHECK(list && json_integer(list->child->next->next->next, 0, INT64_MAX, &n) && n == 9007199254740993);
    CHECK(!json_integer(list->child, 2, 5, &n) && !json_integer(NULL, 0, 1, &n) &&
          !json_integer(json_get(j, "s"), 0, 9, &n));
    CHECK(!json_get(j, "none") && !json_get(list, "a") && !json_get(NULL, "a"));
    json_free(j);

    CHECK(json_refuses("", "ends too early") && json_refuses("[1,]", "not a JSON value") &&
          json_refuses("[1 2]", "neither ','"));
    CHECK(json_refuses("{\"a\" 1}", "no ':'") && json_refuses("{a:1}", "key must be a string") &&
          json_refuses("{\"a\":1,}", "key must be"));
    CHECK(json_refuses("{\"b\":1,\"a\":2,\"b\":1}", "key \"b\" occurs twice") &&
          json_refuses("[{\"a\":{\"x\":1,\"\\u0078\":2}}]", "key \"x\" occurs twice"));
    Text many = {0};  // more keys than the few that are sorted on the stack
    for (int i = 0; i < 100; i++) { text_printf(&many, "%s\"k%d\":%d", i ? "," : "{", i * 7 % 99, i); }
    text_append(&many, "}", 1);
    CHECK(json_refuses(many.text, "key \"k0\" occurs twice"));
    text_free(&many);
    CHECK(json_refuses("01", "leading zero") && json_refuses("1.", "decimal point") && json_refuses("1e", "exponent") &&
          json_refuses("-", "no digits"));
    CHECK(json_refuses("1e400", "beyond the range") && json_refuses("NaN", "not a JSON value") &&
          json_refuses("tru", "not a JSON value"));
    CHECK(json_refuses("\"a", "without an end") && json_refuses("\"a\\", "without an end") &&
          json_refuses("\"\t\"", "control character"));
    CHECK(json_refuses("\"\\x\"", "unknown escape") && json_refuses("\"\\u12g4\"", "hexadecimal") &&
          json_refuses("\"\\u12\"", "hexadecimal"));
    CHECK(json_refuses("\"\xC0\xAF\"", "invalid UTF-8") && json_refuses("\"\xED\xA0\x80\"", "invalid UTF-8") &&
          json_refuses("\"\xF0\x9F\"", "invalid"));
    CHECK(json_refuses("{\"a\\u0000b\":1}", "NUL") && json_refuses("[] []", "after the value") &&
          json_refuses("[\n\n  x]", "line 3, column 3"));
    Text deep = {0};
    for (int i = 0; i < 100000; i++) { text_append(&deep, "[", 1); }
    CHECK(json_refuses(deep.text, "nested too deeply"));
    text_free(&deep);
    for (int depth = 64; depth <= 65; depth++) {
        for (int i = 0; i < 2 * depth; i++) { text_append(&deep, i < depth ? "[" : "]", 1); }
        j = json_parse(deep.text, deep.n, NULL);
        CHECK((j != NULL) == (depth == 64));
        json_free(j);
        text_free(&deep);
    }
    char* exact = (char*)malloc(5);  // nothing behind it: reading on would be caught
    memcpy(exact, "12345", 5);
    j = json_parse(exact, 5, &e);
    CHECK(j && j->integer == 12345);
    json_free(j);
    CHECK(json_refuses("\"\\ud800\\u0041\"", "half of a surrogate pair") &&
          json_refuses("\"\\ud800\"", "half of a surrogate pair") &&
          json_refuses("\"a\\udc00\\ud800\"", "half of a surrogate pair"));
    free(exact);

    Text t = {0};
    const double numbers[] = {0.1, 1.0 / 3, 1e300, 5e-324, -17, 128256, 123456789012.0, (double)0.1f};
    bool same = true;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        t.n = 0;
        text_json_number(&t, numbers[i]);
        j = json_parse(t.text, t.n, &e);
        same = same && j && j->number == numbers[i];
        json_free(j);
    }
    CHECK(same);
    t.n = 0;
    text_json_number(&t, 0.1);
    text_json_number(&t, NAN);
    CHECK(!strcmp(t.text, "0.1null"));
    t.n = 0;
    text_json_string(&t, "a\"\\\n\x01\xFF\xC3\xA9", 8);
    CHECK(!strcmp(t.text, "\"a\\\"\\\\\\n\\u0001\xEF\xBF\xBD\xC3\xA9\""));
    text_free(&t);
}

// ---------------------------------------------------------------------------------------------------------------------
// safetensors.h

static void test_halves(void) {
    bool same16 = true, same_bf = true;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = f16_to_f32((uint16_t)h), g = bf16_to_f32((uint16_t)h);
        same16 = same16 && (isnan(f) ? isnan(f16_to_f32(f32_to_f16(f))) : f32_to_f16(f) == h);
        same_bf = same_bf && (isnan(g) ? isnan(bf16_to_f32(f32_to_bf16(g))) : f32_to_bf16(g) == h);
    }
    CHECK(same16 && same_bf);
    CHECK(f16_to_f32(0x3C00) == 1.0f && f16_to_f32(0xC000) == -2.0f && f16_to_f32(1) == 0x1p-24f &&
          f16_to_f32(0x7BFF) == 65504.0f);
    CHECK(f32_to_f16(65519.0f) == 0x7BFF && f32_to_f16(65520.0f) == 0x7C00 && f32_to_f16(1.0f + 0x1p-11f) == 0x3C00 &&
          f32_to_f16(1.0f + 0x1.8p-10f) == 0x3C02);
    CHECK(f32_to_bf16(1.0f + 0x1p-8f) == 0x3F80 && f32_to_bf16(1.0f + 0x1.8p-7f) == 0x3F82 &&
          f32_to_bf16(3.4e38f) == 0x7F80);
}

static bool write_raw(const char* path, const char* header, size_t claimed, size_t data_bytes) {
    Text t = {0};
    uint64_t length = claimed == SIZE_MAX ? strlen(header) : claimed;
    text_append(&t, (const char*)&length, 8);
    text_append(&t, header, strlen(header));
    for (size_t i = 0; i < data_bytes; i++) { text_append(&t, "\0", 1); }
    bool good = write_file_synced(path, t.text, t.n, NULL);
    text_free(&t);
    return good;
}

static bool st_refuses(const char* header, size_t claimed, size_t data_bytes, const char* because) {
    SafeTensors s;
    Error e = {{0}};
    const char* path = at("hostile.safetensors");
    if (!write_raw(path, header, claimed, data_bytes)) { return false; }
    bool refused = !safetensors_open(&s, path, &e);
    if (!refused) { safetensors_close(&s); }
    return refused && says(&e, because);
}

static void test_safetensors_hostile(void) {
    const size_t own = SIZE_MAX;
    SafeTensors s;
    CHECK(write_raw(at("ok"),
                    "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"e\":{\"dtype\":\"F32\","
                    "\"shape\":[0,9],\"data_offsets\":[8,8]}}   ",
                    own, 8));
    CHECK(safetensors_open(&s, at("ok"), NULL) && s.n == 2 && safetensors_find(&s, "e")->numel == 0 &&
          !safetensors_metadata(&s, "x"));
    safetensors_close(&s);
    CHECK(st_refuses("", 3, 0, "header of 3 bytes") &&
          st_refuses("{}", (size_t)1 << 63, 0, "header of 9223372036854775808"));
    CHECK(st_refuses("{}", 200, 100, "header of 200 bytes") && st_refuses("[]", own, 0, "no JSON object") &&
          st_refuses("{\"a\"}", own, 0, "no ':'"));
    CHECK(st_refuses("{}", own, 4, "end at byte 0"));
    CHECK(st_refuses("{\"a\":7}", own, 0, "dtype"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", own, 4, "F33"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", own, 4, "impossible shape"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", own, 4, "impossible shape"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]}}", own, 4,
                     "impossible shape"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387905],\"data_offsets\":[0,4]}}", own, 4,
                     "data_offsets give 4"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", own, 4,
                     "at most 8"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", own, 4, "need 8 bytes"));
    CHECK(
        st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", own, 4, "data_offsets must be"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", own, 4, "truncated"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\","
                     "\"shape\":[1],\"data_offsets\":[8,12]}}",
                     own, 12, "hole"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\","
                     "\"shape\":[1],\"data_offsets\":[4,8]}}",
                     own, 8, "overlaps"));
    CHECK(st_refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"F32\","
                     "\"shape\":[1],\"data_offsets\":[4,8]}}",
                     own, 8, "occurs twice"));
    CHECK(st_refuses("{\"__metadata__\":{\"a\":1}}", own, 0, "no string") &&
          st_refuses("{\"__metadata__\":\"x\"}", own, 0, "no object"));
    Text t = {0};
    for (int i = 0; i < 300; i++) { text_append(&t, "n", 1); }
    Text header = {0};
    text_printf(&header, "{\"%s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", t.text);
    CHECK(st_refuses(header.text, own, 4, "name of 300 bytes"));
    text_free(&t);
    text_free(&header);
}

// Writes two tensors whose values are known; the bytes it should have in *bytes.
static bool write_pair(const char* path, const char* first, const char* second, float scale, Error* e) {
    const float a[6] = {1 * scale, 2 * scale, 3 * scale, 4 * scale, 5 * scale, 6 * scale};
    const uint16_t b[3] = {f32_to_bf16(0.5f), f32_to_bf16(-3.0f), f32_to_bf16(0)};
    StEntry entries[2] = {{first, DT_F32, 2, {2, 3}}, {second, DT_BF16, 1, {3}}};
    const char* pairs[2] = {"origin", "a \"test\""};
    StWriter w;
    uint64_t bytes = 0;
    uint32_t crc = 0, again = 1;
    return st_writer_open(&w, path, entries, 2, pairs, 1, e) && st_writer_put(&w, a, 10, e) &&
           st_writer_put(&w, (const char*)a + 10, 14, e) && st_writer_put(&w, b, 6, e) &&
           st_writer_close(&w, &bytes, &crc, e) && checkpoint_file_crc(path, &again, e) && crc == again;
}

static void test_safetensors_round_trip(void) {
    Error e = {{0}};
    SafeTensors s;
    float values[6];
    make_dirs(at("st"), NULL);
    CHECK(write_pair(at("st/model.safetensors"), "x.a", "x.b", 1, &e) && safetensors_open_dir(&s, at("st"), &e));
    CHECK(s.n == 2 && !strcmp(safetensors_metadata(&s, "origin"), "a \"test\"") &&
          !strcmp(safetensors_metadata(&s, "format"), "pt"));
    const StTensor* a = safetensors_find(&s, "x.a");
    const StTensor* b = safetensors_find(&s, "x.b");
    CHECK(a && b && a->ndim == 2 && a->shape[1] == 3 && b->numel == 3 && (uintptr_t)a->data % 64 == 0 &&
          !safetensors_find(&s, "x.c"));
    CHECK(st_to_f32(a, values, &e) && values[5] == 6 && st_to_f32(b, values, &e) && values[1] == -3);
    safetensors_close(&s);

    StWriter w;  // too little was put
    StEntry one = {"a", DT_F32, 1, {4}};
    e = (Error){{0}};
    CHECK(st_writer_open(&w, at("short"), &one, 1, NULL, 0, &e) && st_writer_put(&w, values, 8, &e) &&
          !st_writer_close(&w, NULL, NULL, &e));
    CHECK(says(&e, "bytes written of") && !file_exists(at("short")));
    values[2] = NAN;
    e = (Error){{0}};
    CHECK(st_writer_open(&w, at("nan"), &one, 1, NULL, 0, &e) && st_writer_put(&w, values, 16, &e) &&
          st_writer_close(&w, NULL, NULL, &e));
    CHECK(safetensors_open(&s, at("nan"), &e) && !st_to_f32(&s.tensors[0], values, &e) &&
          says(&e, "tensor a: value 2 is not finite"));
    safetensors_close(&s);
    double big[2] = {1, 1e39};
    StEntry wide = {"d", DT_F64, 1, {2}};
    e = (Error){{0}};
    CHECK(st_writer_open(&w, at("f64"), &wide, 1, NULL, 0, &e) && st_writer_put(&w, big, 16, &e) &&
          st_writer_close(&w, NULL, NULL, &e));
    CHECK(safetensors_open(&s, at("f64"), &e) && !st_to_f32(&s.tensors[0], values, &e) &&
          says(&e, "value 1 is not finite"));
    safetensors_close(&s);
}

static bool index_refuses(const char* index, const char* because) {
    Error e = {{0}};
    SafeTensors s;
    bool refused = write_file_synced(at("many/model.safetensors.index.json"), index, strlen(index), NULL) &&
                   !safetensors_open_dir(&s, at("many"), &e);
    return refused && says(&e, because);
}

static void test_safetensors_index(void) {
    Error e = {{0}};
    SafeTensors s;
    make_dirs(at("many"), NULL);
    CHECK(!safetensors_open_dir(&s, at("many"), &e) && says(&e, "neither"));
    CHECK(write_pair(at("many/one.safetensors"), "a", "b", 1, NULL) &&
          write_pair(at("many/two.safetensors"), "c", "d", 1, NULL));
    const char* index = "{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"one.safetensors\",\"c\":\"two."
                        "safetensors\",\"d\":\"two.safetensors\"}}";
    CHECK(write_file_synced(at("many/model.safetensors.index.json"), index, strlen(index), NULL));
    CHECK(safetensors_open_dir(&s, at("many"), NULL) && s.n == 4 && s.n_files == 2 && safetensors_find(&s, "d"));
    safetensors_close(&s);
    CHECK(index_refuses("{\"weight_map\":{\"a\":\"two.safetensors\"}}", "tensor a is not in") &&
          index_refuses("{\"weight_map\":{}}", "no weight_map"));
    CHECK(index_refuses("{\"weight_map\":{\"a\":\"../st/model.safetensors\"}}", "not the name of a file") &&
          index_refuses("{\"weight_map\":{\"a\":7}}", "not the name"));
    CHECK(index_refuses("{\"weight_map\":{\"a\":\"three.safetensors\"}}", "No such file") &&
          index_refuses("{", "key must be"));
    CHECK(write_pair(at("many/two.safetensors"), "a", "d", 1, NULL) && index_refuses(index, "occurs twice"));
}

// ---------------------------------------------------------------------------------------------------------------------
// checkpoint.h

typedef struct {
    TensorList list;
    float* data;
    float scale;
    int stored;
} Arena;

static const void* arena_fetch(void* ctx, int group, int tensor, size_t from, size_t n) {
    Arena* a = (Arena*)ctx;
    for (size_t i = 0; i < n; i++) {
        a->data[i] = a->scale * (float)(group + 1) * (float)(tensor + 1) + (float)(from + i);
    }
    return a->data;
}

static bool arena_store(void* ctx, int group, int tensor, const float* data, Error* e) {
    Arena* a = (Arena*)ctx;
    const TensorSpec* s = &a->list.specs[tensor];
    a->stored++;
    for (size_t i = 0; i < s->numel; i++) {
        if (data[i] != a->scale * (float)(group + 1) * (float)(tensor + 1) + (float)i) {
            return fail(e, "value %zu of %s differs", i, s->name);
        }
    }
    return true;
}

static Config small_config(void) {
    Config c = config_default();
    c.vocab_size = 11;
    c.hidden_size = 8;
    c.intermediate_size = 12;
    c.num_hidden_layers = 2;
    c.num_attention_heads = c.num_key_value_heads = 2;
    c.tie_word_embeddings = true;
    Error e = {{0}};
    if (!config_set_attention(&c, "mta", false, &e)) { die("%s", e.text); }
    return c;
}

static const char* const no_prefix[1] = {""};
static const char* const two_prefixes[2] = {"m.", "v."};

static bool save(const char* run, long step, Arena* a, char* path, Error* e) {
    CheckpointWriter w;
    return checkpoint_begin(&w, run, step, e) && checkpoint_add_text(&w, "config.json", "{}", 2, e) &&
           checkpoint_add_tensors(&w, "model.safetensors", &a->list, no_prefix, 1, DT_F32, arena_fetch, a, e) &&
           checkpoint_add_tensors(&w, "optimizer.safetensors", &a->list, two_prefixes, 2, DT_F32, arena_fetch, a, e) &&
           checkpoint_commit(&w, path, e);
}

static void flip_byte(const char* path, long at) {
    FILE* f = fopen(path, "r+b");
    if (!f || fseek(f, at, SEEK_SET)) { die("%s: %s", path, strerror(errno)); }
    int c = fgetc(f);
    if (fseek(f, at, SEEK_SET) || fputc(c ^ 4, f) == EOF || fclose(f)) { die("%s: %s", path, strerror(errno)); }
}

static int silent_newest(const char* run, char* path) {  // its lines on stderr belong to the test
    fflush(stderr);
    int keep = dup(2), null = open("/dev/null", O_WRONLY);
    dup2(null, 2);
    long step = checkpoint_newest(run, path, NULL);
    dup2(keep, 2);
    close(keep);
    close(null);
    return (int)step;
}

static void test_checkpoint_round_trip(Arena* a) {
    Error e = {{0}};
    char path[PATH_SIZE];
    const char* run = at("run");
    CHECK(checkpoint_newest(run, path, NULL) == -1);
    CHECK(save(run, 500, a, path, &e) && !strcmp(path, at("run/step-00000500")) && checkpoint_verify(path, true, &e));
    a->stored = 0;
    CHECK(checkpoint_read_tensors(path, &a->list, no_prefix, 1, false, NULL, arena_store, a, &e) &&
          a->stored == a->list.n);
    path_join(path, sizeof path, run, "step-00000500/optimizer.safetensors");
    CHECK(checkpoint_read_tensors(path, &a->list, two_prefixes, 2, false, NULL, arena_store, a, &e) &&
          a->stored == 3 * a->list.n);
    a->scale = 3;
    CHECK(!checkpoint_read_tensors(path, &a->list, two_prefixes, 2, false, NULL, arena_store, a, &e) &&
          says(&e, "differs"));
    e = (Error){{0}};
    CHECK(save(run, 500, a, path, &e) && silent_newest(run, path) == 500);  // over the older one
    CHECK(checkpoint_read_tensors(path, &a->list, no_prefix, 1, false, NULL, arena_store, a, &e));
    a->scale = 1;
}

static void test_checkpoint_damage(Arena* a) {
    char path[PATH_SIZE], file[PATH_SIZE];
    Error e = {{0}};
    const char* run = at("damage");
    for (long step = 100; step <= 500; step += 100) { CHECK(save(run, step, a, path, &e)); }
    CHECK(silent_newest(run, path) == 500);
    flip_byte(at("damage/step-00000500/model.safetensors"), 3000);
    CHECK(!checkpoint_verify(path, true, &e) && says(&e, "damaged") && silent_newest(run, path) == 400);
    CHECK(truncate(at("damage/step-00000400/optimizer.safetensors"), 1000) == 0 && silent_newest(run, path) == 300);
    CHECK(unlink(at("damage/step-00000300/manifest.json")) == 0 && silent_newest(run, path) == 200);
    CHECK(write_file_synced(at("damage/step-00000200/manifest.json"), "{\"files\":{\"../x\":{}}}", 20, NULL) &&
          silent_newest(run, path) == 100);
    CHECK(checkpoint_verify_model(at("damage/step-00000100"), &e));
    CHECK(write_file_synced(at("damage/step-00000200/manifest.json"), "{\"files\":[1]}", 13,
                            NULL));  // a list has no names
    e.text[0] = 0;
    CHECK(!checkpoint_verify_model(at("damage/step-00000200"), &e) && says(&e, "is no object"));
    path_join(file, sizeof file, run, "step-00000100/config.json");
    CHECK(unlink(file) == 0 && silent_newest(run, path) == -1);
    make_dirs(at("damage/step-99999999999999999999"), NULL);  // not ours
    make_dirs(at("damage/step-7"), NULL);
    CHECK(silent_newest(run, path) == -1);
}

// a process that dies between two files leaves the older checkpoint the newest
static void test_checkpoint_kill(Arena* a) {
    char path[PATH_SIZE];
    Error e = {{0}};
    const char* run = at("kill");
    CHECK(save(run, 10, a, path, &e));
    for (int files = 0; files <= 2; files++) {
        pid_t child = fork();
        if (child == 0) {
            CheckpointWriter w;
            Error ce = {{0}};
            if (!checkpoint_begin(&w, run, 20, &ce)) { _exit(1); }
            if (files > 0 && !checkpoint_add_text(&w, "config.json", "{}", 2, &ce)) { _exit(1); }
            if (files > 1 &&
                !checkpoint_add_tensors(&w, "model.safetensors", &a->list, no_prefix, 1, DT_F32, arena_fetch, a, &ce)) {
                _exit(1);
            }
            raise(SIGKILL);
        }
        int status = 0;
        waitpid(child, &status, 0);
        CHECK(WIFSIGNALED(status) && dir_exists(at("kill/.step-00000020.partial")) && silent_newest(run, path) == 10);
    }
    CHECK(save(run, 30, a, path, &e) && !dir_exists(at("kill/.step-00000020.partial")) &&
          silent_newest(run, path) == 30);
}

static void test_checkpoint_full_disk(Arena* a) {
    char path[PATH_SIZE];
    Error e = {{0}};
    const char* run = at("full");
    CHECK(save(run, 1, a, path, &e));
    struct rlimit old, small;
    getrlimit(RLIMIT_FSIZE, &old);
    small = old;
    small.rlim_cur = 2000;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    bool saved = save(run, 2, a, path, &e);
    setrlimit(RLIMIT_FSIZE, &old);
    CHECK(!saved && says(&e, "model.safetensors: cannot write") && !dir_exists(at("full/.step-00000002.partial")));
    CHECK(silent_newest(run, path) == 1);
    e = (Error){{0}};
    CheckpointWriter w;
    CHECK(write_file_synced(at("plain"), "x", 1, NULL) && !checkpoint_begin(&w, at("plain"), 3, &e) &&
          says(&e, "cannot create directory"));
    e = (Error){{0}};
    CHECK(checkpoint_begin(&w, run, 3, &e) && dir_exists(at("full/.step-00000003.partial")));
    checkpoint_abort(&w);
    checkpoint_abort(&w);  // a second time does no harm
    CHECK(!dir_exists(at("full/.step-00000003.partial")));
}

static void test_checkpoint_prune(Arena* a) {
    char path[PATH_SIZE];
    const char* run = at("prune");
    for (long step = 1; step <= 6; step++) { CHECK(save(run, step, a, path, NULL)); }
    checkpoint_prune(run, 0, 6);
    CHECK(dir_exists(at("prune/step-00000001")));
    CHECK(truncate(at("prune/step-00000005/config.json"), 0) == 0);  // a bad one does not count
    checkpoint_prune(run, 3, 6);
    CHECK(dir_exists(at("prune/step-00000006")) && dir_exists(at("prune/step-00000003")) &&
          !dir_exists(at("prune/step-00000002")));
    flip_byte(at("prune/step-00000006/model.safetensors"), 3000);
    checkpoint_prune(run, 1, 4);  // of a run that went on from 3, passing over 5 and 6
    CHECK(silent_newest(run, path) == 4 && !dir_exists(at("prune/step-00000003")));
    CHECK(save(run, 6, a, path, NULL));
    checkpoint_prune(run, 1, 6);
    CHECK(silent_newest(run, path) == 6 && !dir_exists(at("prune/step-00000004")));
}

// On a full disk the oldest checkpoint gives way; one that the user keeps something in cannot, and another does.
static void test_checkpoint_make_room(Arena* a) {
    char path[PATH_SIZE];
    const char* run = at("room");
    for (long step = 1; step <= 4; step++) { CHECK(save(run, step, a, path, NULL)); }
    CHECK(mkdir(at("room/step-00000001/mine"), 0777) == 0);
    CHECK(checkpoint_make_room(run, 4) == 2 && !dir_exists(at("room/step-00000002")));
    CHECK(checkpoint_make_room(run, 4) == 3 && checkpoint_make_room(run, 4) == -1);
    CHECK(silent_newest(run, path) == 4 && dir_exists(at("room/step-00000001/mine")));
}

// A signal that a run obeys does not break off what waits for a disk.
static void test_signal_in_a_write(void) {
    int ends[2];
    char byte = 0;
    Ranks quiet = {.rank = 1, .size = 2};
    CHECK(pipe(ends) == 0);
    run_catch_signals(&quiet);
    pid_t pid = fork();
    if (pid == 0) {
        usleep(100000);
        kill(getppid(), SIGUSR1);
        usleep(100000);
        _exit(write(ends[1], "x", 1) != 1);
    }
    CHECK(read(ends[0], &byte, 1) == 1 && run_signal == SIGUSR1);
    waitpid(pid, NULL, 0);
    close(ends[0]);
    close(ends[1]);
}

// Writes the arena's tensors but for `skip`, with one renamed to `extra`, and one value replaced.
static bool write_variant(const char* path, Arena* a, int skip, const char* extra, DType dtype, bool nan) {
    static StEntry entries[80];
    StWriter w;
    int n = 0, map[80];
    for (int i = 0; i < a->list.n; i++) {
        if (i == skip) { continue; }
        entries[n] = (StEntry){a->list.specs[i].name, dtype, a->list.specs[i].ndim, {0}};
        for (int d = 0; d < entries[n].ndim; d++) { entries[n].shape[d] = a->list.specs[i].shape[d]; }
        map[n++] = i;
    }
    if (extra) {
        entries[n] = (StEntry){extra, dtype, 1, {a->list.specs[1].numel}};
        map[n++] = 1;
    }
    bool good = st_writer_open(&w, path, entries, n, NULL, 0, NULL);
    for (int i = 0; good && i < n; i++) {
        float* f = (float*)arena_fetch(a, 0, map[i], 0, a->list.specs[map[i]].numel);
        uint16_t half[1000];
        if (nan && i == 3) { f[5] = INFINITY; }
        for (size_t k = 0; k < a->list.specs[map[i]].numel; k++) { half[k] = f32_to_f16(f[k]); }
        good = st_writer_put(&w, dtype == DT_F32 ? (void*)f : (void*)half,
                             a->list.specs[map[i]].numel * dtype_size(dtype), NULL);
    }
    return good && st_writer_close(&w, NULL, NULL, NULL);
}

static bool read_variant(Arena* a, bool may_be_absent, Text* absent, Error* e) {
    a->stored = 0;
    return checkpoint_read_tensors(at("variant"), &a->list, no_prefix, 1, may_be_absent, absent, arena_store, a, e);
}

static void test_checkpoint_tensors(Arena* a) {
    Error e = {{0}};
    Text absent = {0};
    const char* path = at("variant");
    int conv = tensor_at(&a->list, 1, TENSOR_KQ_CONV);
    // small integers: exact in F16
    CHECK(write_variant(path, a, -1, NULL, DT_F16, false) && read_variant(a, false, NULL, &e) &&
          a->stored == a->list.n);
    CHECK(write_variant(path, a, -1, "model.layers.0.self_attn.rotary_emb.inv_freq", DT_F32, false) &&
          read_variant(a, false, NULL, &e));
    // tied, and yet a head of its own: refused
    CHECK(write_variant(path, a, -1, "lm_head.weight", DT_F32, false) && !read_variant(a, false, NULL, &e) &&
          says(&e, "lm_head.weight is another than model.embed_tokens.weight"));
    e = (Error){{0}};
    CHECK(write_variant(path, a, -1, "model.layers.0.self_attn.extra", DT_F32, false) &&
          !read_variant(a, false, NULL, &e) && says(&e, "extra is not one of"));
    e = (Error){{0}};
    CHECK(write_variant(path, a, -1, NULL, DT_F32, true) && !read_variant(a, false, NULL, &e) &&
          says(&e, "value 5 is not finite"));
    e = (Error){{0}};
    CHECK(write_variant(path, a, 2, NULL, DT_F32, false) && !read_variant(a, true, &absent, &e) &&
          says(&e, "q_proj.weight is missing"));
    e = (Error){{0}};
    CHECK(write_variant(path, a, conv, NULL, DT_F32, false) && !read_variant(a, false, NULL, &e) &&
          says(&e, "kq_conv.weight is missing"));
    absent.n = 0;
    CHECK(read_variant(a, true, &absent, &e) && !strcmp(absent.text, "model.layers.1.self_attn.kq_conv.weight") &&
          a->stored == a->list.n - 1);
    text_free(&absent);
    a->list.specs[conv].shape[2]++;
    e = (Error){{0}};
    CHECK(write_variant(path, a, conv, "x", DT_F32, false));
    a->list.specs[conv].shape[2]--;
    a->list.specs[1].shape[0]--;
    CHECK(!read_variant(a, true, NULL, &e) && says(&e, "shape [8], wanted [7]"));
    a->list.specs[1].shape[0]++;
}

int main(void) {
    test_folder();  // before any child, which then has the same
    Config config = small_config();
    Arena a = {0};
    tensor_list(&a.list, &config);
    a.data = alloc_or_die(a.list.numel, sizeof(float), "test");
    a.scale = 1;
    test_util();
    test_limits();
    test_json();
    test_halves();
    test_safetensors_hostile();
    test_safetensors_round_trip();
    test_safetensors_index();
    test_checkpoint_round_trip(&a);
    test_checkpoint_damage(&a);
    test_checkpoint_kill(&a);
    test_checkpoint_full_disk(&a);
    test_checkpoint_prune(&a);
    test_checkpoint_make_room(&a);
    test_signal_in_a_write();
    test_checkpoint_tensors(&a);
    tensor_list_free(&a.list);
    free(a.data);
    remove_tree(test_folder());
    return test_verdict();
}
