// util.h: what every program of this family needs and libc lacks: errors as text, checked sizes, aligned memory, a CRC,
// mapped and synced files, a clock, paths and a growing string. No model mathematics.
//
// Two ways to report a mistake. A reader that can be called in the middle of something returns bool and fills an Error;
// the first message wins, so that an outer layer may call fail() again without hiding the cause. A program that can
// only stop calls die(), which prints one line "program: message" on stderr and exits with 1. A mistake of the
// programmer is an assert.
#ifndef MTA_UTIL_H
#define MTA_UTIL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#else  // make OPENMP=: one thread
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_num_procs(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
static inline void omp_set_num_threads(int n) { (void)n; }
static inline int omp_get_thread_limit(void) { return 1; }
static inline int omp_get_num_places(void) { return 0; }
static inline int omp_get_place_num_procs(int place) {
    (void)place;
    return 0;
}
static inline void omp_get_place_proc_ids(int place, int* ids) { (void)place, (void)ids; }
#endif

#ifndef __cplusplus
extern char* program_invocation_short_name;  // errno.h declares it only if _GNU_SOURCE came before the first header
#endif

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "mta.c reads and writes its little-endian files by memcpy: a big-endian machine is not supported"
#endif

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "masks are infinities and guards ask isfinite: -Ofast, -ffast-math, -ffinite-math-only, icx's default: refused"
#endif

#ifndef MTA_VERSION
#define MTA_VERSION "unknown"  // the Makefile gives what the file VERSION says
#endif

enum { PATH_SIZE = 4096 };  // bytes of every path buffer

// ---------------------------------------------------------------------------------------------------------------------
// Errors

typedef struct {
    char text[512];
} Error;  // text[0] == 0: none

// A message is one line, whatever the names in it hold: newlines, and what would steer a terminal, become '?'.
static inline void make_one_line(char* text) {
    for (; *text; text++) {
        if ((unsigned char)*text < ' ' || *text == 127) { *text = '?'; }
    }
}

// Copies a message into `out` of n bytes. Of one that is too long its middle is left out, between characters: long
// names stand at its front, and what is wrong with them at its end.
static inline void copy_shortened(char* out, size_t n, const char* text) {
    size_t length = strlen(text), head = n / 2 - 4, at = length < n ? 0 : length - (n - 1 - head - 3);
    if (length < n) {
        memcpy(out, text, length + 1);
        return;
    }
    while (head > 0 && ((unsigned char)text[head] & 0xC0) == 0x80) { head--; }
    while (((unsigned char)text[at] & 0xC0) == 0x80) { at++; }
    snprintf(out, n, "%.*s...%s", (int)head, text, text + at);
}

// Writes the message unless one is there already. Returns false, so that a reader can `return fail(e, ...)`. e may be
// NULL.
__attribute__((format(printf, 2, 3))) static inline bool fail(Error* e, const char* fmt, ...) {
    if (e && !e->text[0]) {
        char text[3 * PATH_SIZE];
        va_list args;
        va_start(args, fmt);
        vsnprintf(text, sizeof text, fmt, args);
        va_end(args);
        copy_shortened(e->text, sizeof e->text, text);
        make_one_line(e->text);
    }
    return false;
}

// One line on stderr, then exit(1).
__attribute__((format(printf, 1, 2), noreturn)) static inline void die(const char* fmt, ...) {
    char text[3 * PATH_SIZE];
    va_list args;
    fflush(stdout);
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    make_one_line(text);
    fprintf(stderr, "%s: %s\n", program_invocation_short_name, text);
    exit(1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sizes and memory

// *out = a * b, or a + b; false, and *out untouched, where that does not fit.
static inline bool mul_size(size_t a, size_t b, size_t* out) {
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) { return false; }
    *out = r;
    return true;
}

static inline bool add_size(size_t a, size_t b, size_t* out) {
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) { return false; }
    *out = r;
    return true;
}

// count * size bytes, zeroed, aligned to a cache line; the caller frees with free(). Never NULL, also for nothing at
// all.
static inline void* alloc_or_die(size_t count, size_t size, const char* what) {
    size_t bytes = 0;
    void* p = NULL;
    const size_t huge = (size_t)2 << 20;
    if (!mul_size(count, size, &bytes) || bytes > (size_t)PTRDIFF_MAX ||
        posix_memalign(&p, bytes >= 2 * huge ? huge : 64, bytes ? bytes : 1)) {
        die("out of memory: %s needs %.1f MiB", what, (double)count * (double)size / 1048576.0);
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= 2 * huge) { madvise(p, bytes, MADV_HUGEPAGE); }  // fewer page faults and TLB misses; only a wish
#endif
    memset(p, 0, bytes);
    return p;
}

// The same, aligned as malloc does it: pages that are never written take no memory.
static inline void* alloc_untouched_or_die(size_t count, size_t size, const char* what) {
    const size_t huge = (size_t)2 << 20;
    void* p = calloc(count ? count : 1, size);
    if (!p) { die("out of memory: %s needs %.1f MiB", what, (double)count * (double)size / 1048576.0); }
#ifdef MADV_HUGEPAGE
    size_t bytes = count * size, skip = (huge - (uintptr_t)p % huge) % huge;
    if (bytes >= 2 * huge) { madvise((char*)p + skip, (bytes - skip) / huge * huge, MADV_HUGEPAGE); }
#endif
    return p;
}

// A copy of the text, which the caller frees.
static inline char* copy_or_die(const char* text) {
    char* copy = strdup(text);
    if (!copy) { die("out of memory: a text of %zu bytes", strlen(text)); }
    return copy;
}

// What a container or a batch system lets this process have, as its cgroups say; 1e300: they set no limit.
typedef struct {
    double memory;  // bytes that can still be had
    double cores;   // of which the quota of time is, 1.5 for example
} Limits;

// The one or two numbers behind `key` at the beginning of the first line that has any there; how many, none where the
// file cannot be read. `numbers` has room for two in any case.
static inline int limit_numbers(const char* folder, const char* file, const char* key, double* numbers) {
    char path[PATH_SIZE + 64], line[256];
    int count = 0;
    snprintf(path, sizeof path, "%s/%s", folder, file);
    FILE* f = fopen(path, "r");
    while (f && count < 1 && fgets(line, sizeof line, f)) {
        if (strncmp(line, key, strlen(key))) { continue; }
        count = sscanf(line + strlen(key), "%lf %lf", &numbers[0], &numbers[1]);
    }
    if (f) { fclose(f); }
    return count;
}

// Narrows the limits to those of one cgroup, of version 2 or 1. What files on a disk fill of its memory gives way; what
// programs have, and files in memory (/dev/shm), does not.
static inline void limits_of_cgroup(Limits* limits, const char* folder, bool second) {
    double n[3] = {0, 0, 0}, own[2] = {0, 0}, files[2] = {0, 0};
    if (limit_numbers(folder, second ? "memory.max" : "memory.limit_in_bytes", "", n) > 0) {
        limit_numbers(folder, "memory.stat", second ? "anon " : "total_rss ", own);
        limit_numbers(folder, "memory.stat", second ? "shmem " : "total_shmem ", files);
        double used = own[0] + files[0], left = n[0] > used ? n[0] - used : 1;
        limits->memory = left < limits->memory ? left : limits->memory;
    }
    bool quota = second ? limit_numbers(folder, "cpu.max", "", n) == 2
                        : limit_numbers(folder, "cpu.cfs_quota_us", "", n) > 0 &&
                              limit_numbers(folder, "cpu.cfs_period_us", "", n + 1) > 0;
    if (quota && n[0] > 0 && n[1] > 0 && n[0] / n[1] < limits->cores) { limits->cores = n[0] / n[1]; }
}

// Those of this process's cgroups and of all above them. A container may see its own cgroup as the uppermost one,
// whatever /proc says. root: "", but for tests, which have a tree of their own.
static inline Limits machine_limits(const char* root) {
    Limits limits = {1e300, 1e300};
    char line[PATH_SIZE], names[PATH_SIZE + 3], folder[PATH_SIZE];
    snprintf(folder, sizeof folder, "%s/proc/self/cgroup", root);
    FILE* f = fopen(folder, "r");
    while (f && fgets(line, sizeof line, f)) {  // "4:memory:/a/b", "5:cpuacct,cpu:/a/b"; of version 2 "0::/a/b"
        char *name = strchr(line, ':'), *path = name ? strchr(name + 1, ':') : NULL;
        if (!path) { continue; }
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        bool second = !*++name;
        snprintf(names, sizeof names, ",%s,", name);
        const char* mount = second                      ? ""
                            : strstr(names, ",cpu,")    ? "/cpu"
                            : strstr(names, ",memory,") ? "/memory"
                                                        : NULL;
        if (!mount) { continue; }
        for (char* end = path + strlen(path); end; end = strrchr(path, '/')) {
            *end = 0;
            int n = snprintf(folder, sizeof folder, "%s/sys/fs/cgroup%s%s", root, mount, path);
            if (n < (int)sizeof folder) { limits_of_cgroup(&limits, folder, second); }
        }
    }
    if (f) { fclose(f); }
    return limits;
}

// Bytes that the limits of this process alone (ulimit -v and -d; Grid Engine's h_vmem) leave it; 1e300: there are none.
static inline double memory_limit(void) {
    const struct {
        int number, column;  // of /proc/self/statm, which has pages
    } kinds[] = {{RLIMIT_AS, 0}, {RLIMIT_DATA, 5}};
    double pages[6] = {0}, left = 1e300;
    FILE* f = fopen("/proc/self/statm", "r");
    for (int i = 0; f && i < 6 && fscanf(f, "%lf", &pages[i]) == 1; i++) {}
    if (f) { fclose(f); }
    for (int i = 0; i < 2; i++) {
        struct rlimit limit;
        if (getrlimit(kinds[i].number, &limit) || limit.rlim_cur == RLIM_INFINITY) { continue; }
        double bytes = (double)limit.rlim_cur - pages[kinds[i].column] * (double)sysconf(_SC_PAGESIZE);
        left = bytes < left ? bytes : left;
    }
    return left > 1 ? left : 1;
}

// Bytes that this process, one of so many that share the machine, can still have, as the kernel estimates them; 0: it
// does not say.
static inline double memory_available(int processes) {
    char line[256];
    size_t kib = 0;
    FILE* f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (!strncmp(line, "MemAvailable:", 13)) { kib = strtoul(line + 13, NULL, 10); }
    }
    if (f) { fclose(f); }
    double of_all = machine_limits("").memory, own = memory_limit();
    if (kib && (double)kib * 1024 < of_all) { of_all = (double)kib * 1024; }
    double bytes = of_all / processes < own ? of_all / processes : own;
    return bytes < 1e290 ? bytes : 0;
}

// What the processor calls itself, where the kernel tells.
static inline const char* cpu_name(char* out, size_t n) {
    char line[512];
    FILE* f = fopen("/proc/cpuinfo", "r");
    snprintf(out, n, "CPU");
    while (f && fgets(line, sizeof line, f)) {
        char* name = strncmp(line, "model name", 10) ? NULL : strchr(line, ':');
        if (!name) { continue; }
        name += 1 + strspn(name + 1, " ");
        name[strcspn(name, "\n")] = 0;
        snprintf(out, n, "%.*s", (int)n - 1, name);
        break;
    }
    if (f) { fclose(f); }
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// CRC-32 of zlib (polynomial 0xEDB88320), 16 bytes at a time: a table per byte position (Kounavis and Berry,
// "slicing").

static inline const uint32_t (*crc32_tables(void))[256] {
    static uint32_t table[16][256];
    static int ready = 0;
    if (!__atomic_load_n(&ready, __ATOMIC_ACQUIRE)) {  // two threads may both fill it, with the same numbers
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) { c = (c >> 1) ^ (c & 1 ? 0xEDB88320u : 0u); }
            __atomic_store_n(&table[0][i], c, __ATOMIC_RELAXED);
        }
        for (uint32_t i = 0; i < 256; i++) {
            for (int s = 1; s < 16; s++) {
                uint32_t c = table[s - 1][i];
                __atomic_store_n(&table[s][i], (c >> 8) ^ table[0][c & 255], __ATOMIC_RELAXED);
            }
        }
        __atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
    }
    return (const uint32_t(*)[256])table;
}

// CRC of what `crc` covers followed by n more bytes; start with 0.
static inline uint32_t crc32_update(uint32_t crc, const void* data, size_t n) {
    const uint32_t(*t)[256] = crc32_tables();
    const uint8_t* p = (const uint8_t*)data;
    uint32_t c = ~crc;
    for (; n >= 16; n -= 16, p += 16) {
        uint32_t w[4];
        memcpy(w, p, 16);
        w[0] ^= c;
        c = 0;
        for (int k = 0; k < 4; k++) {
            c ^= t[15 - 4 * k][w[k] & 255] ^ t[14 - 4 * k][w[k] >> 8 & 255] ^ t[13 - 4 * k][w[k] >> 16 & 255] ^
                 t[12 - 4 * k][w[k] >> 24];
        }
    }
    for (; n; n--, p++) { c = (c >> 8) ^ t[0][(c ^ *p) & 255]; }
    return ~c;
}

// ---------------------------------------------------------------------------------------------------------------------
// Files and directories

static inline bool dir_exists(const char* path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

// A name that is there, whatever "No such file or directory" says: its target was purged, has another name or cannot be
// reached, by errno.
static inline bool link_leads_nowhere(const char* path) {
    struct stat st;
    return lstat(path, &st) == 0 && S_ISLNK(st.st_mode) && stat(path, &st) != 0;
}

// Why a path cannot be used: what `number`, the errno of the call that failed, says, or what its link says.
static inline const char* path_error(const char* path, int number) {
    if (!link_leads_nowhere(path)) { return strerror(number); }
    return errno == ENOENT ? "a link that leads nowhere" : strerror(errno);
}

static inline bool file_exists(const char* path) {  // something that can be read as a file: not a directory
    struct stat st;
    return stat(path, &st) == 0 && !S_ISDIR(st.st_mode);
}

// Of OpenBLAS, where the program is linked with it; else NULL.
#ifdef __cplusplus
extern "C" void openblas_set_num_threads(int) __attribute__((weak));
#else
extern void openblas_set_num_threads(int) __attribute__((weak));
#endif

// The cores that this process may run on. With OMP_PROC_BIND or OMP_PLACES, OpenMP has bound the first thread to one of
// its places before main: to them belong those of all places.
static inline bool allowed_cores(cpu_set_t* set) {
    if (sched_getaffinity(0, sizeof *set, set)) { return false; }
    for (int place = 0; place < omp_get_num_places(); place++) {
        int n = omp_get_place_num_procs(place);
        int* cores = (int*)calloc((size_t)n + 1, sizeof *cores);
        if (!cores) { return false; }
        omp_get_place_proc_ids(place, cores);
        for (int i = 0; i < n; i++) {
            if (cores[i] >= 0 && cores[i] < CPU_SETSIZE) { CPU_SET(cores[i], set); }
        }
        free(cores);
    }
    return true;
}

// Has this process a quota of time for fewer cores than it may run on? Then how many whole ones, as a text.
static inline bool fewer_threads(char* text, size_t n) {
    cpu_set_t set;
    double cores = machine_limits("").cores;
    int most = allowed_cores(&set) ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    snprintf(text, n, "%d", cores < 1 ? 1 : cores < most ? (int)cores : most);
    return cores < most;
}

// What libraries read from the environment before main, so that the program starts itself once more with it. Not where
// it cannot start again: under qemu-user, when its file was replaced, by way of the loader (ld.so PROGRAM).
// - Threads that wait for others must not spin for long: on a machine with other work they take the core from the very
//   thread that they wait for. Here they do so a thousand times, some 40 us, and sleep then. On an idle machine that is
//   as fast as libgomp's own 300,000 (decoding of 25m, 300m), where none at all costs up to half; on a busy one it is
//   about twice as fast (dev/experiments.tsv). Where the user has set how threads wait, that holds.
// - OpenBLAS starts a thread for each core, for which there is no use here: the products are shared out among our own.
//   Under a limit on memory (ulimit -v) each of them tries for ever to map 128 MiB, and exit() waits for them.
// - OpenMP starts a thread for each core too, whatever share of their time a container may have (docker --cpus 2): more
//   threads than that would be stopped in turns, and all others wait for them.
static inline void settle_threads(char** argv) {
    static const char* const settings[] = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"};
    char path[PATH_SIZE];
    bool bound = false;
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) { bound = bound || getenv(settings[i]); }
    const char* blas = openblas_set_num_threads ? getenv("OPENBLAS_NUM_THREADS") : "1";
    bool one = blas && !strcmp(blas, "1");
    char threads[32];
    cpu_set_t cores;
    if (omp_get_thread_limit() < omp_get_max_threads()) { omp_set_num_threads(omp_get_thread_limit()); }
    bool all = getenv("OMP_NUM_THREADS") || !fewer_threads(threads, sizeof threads);
    if (bound && one && all) { return; }
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    const char* slash = strrchr(path, '/');
    if (slash && strncmp(slash, "/ld", 3) && (one || !setenv("OPENBLAS_NUM_THREADS", "1", 1)) &&
        (all || !setenv("OMP_NUM_THREADS", threads, 1)) &&
        (bound || (!setenv("GOMP_SPINCOUNT", "1000", 1) && !setenv("KMP_BLOCKTIME", "1", 1)))) {
        // What starts again must not take the first thread's place for all that there is.
        if (allowed_cores(&cores)) { sched_setaffinity(0, sizeof cores, &cores); }
        execv(path, argv);
    }
}

// Opens those of the descriptors 0 to 2 that are closed (daemons and `>&-` leave them so) on /dev/null. Otherwise a
// file of ours would get such a number, and what is printed would be written into it. Called by every main before it
// opens a file that stays open.
static inline void open_standard_files(void) {
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) >= 0 || errno != EBADF) { continue; }
        int opened = open("/dev/null", O_RDWR);  // the lowest number that is free: fd, as those below are open
        if (opened < 0) { die("/dev/null, for the closed descriptor %d: %s", fd, strerror(errno)); }
    }
}

// Where a signal handler, which has no other argument, prints: a rank whose standard error is kept for a while
// (ranks_quiet of mta/ranks.h) would lose it with what is kept.
static int signal_err = STDERR_FILENO;

// Ends the program from a signal handler, by one line.
__attribute__((noreturn)) static inline void end_by_signal(int number, const char* text) {
    const char* name = program_invocation_short_name;
    if (write(signal_err, name, strlen(name)) < 0 || write(signal_err, text, strlen(text)) < 0) { _exit(128 + number); }
    _exit(1);
}

static inline void bus_error(int number) {
    end_by_signal(number, ": a file was cut off while it was read, or its disk failed\n");
}

static inline void unknown_instruction(int number) {
    end_by_signal(number,
                  ": this processor lacks an instruction that the program was compiled with: make clean, then make "
                  "on this machine, or make ARCH= for all processors of its kind\n");
}

// Before main, whose first lines may be of such instructions already.
__attribute__((constructor)) static void settle_unknown_instructions(void) { signal(SIGILL, unknown_instruction); }

// A signal that would end the program without a word: what a limit on the size of files stops becomes an error of
// write(2). The trainers and infer_mta call it before they read anything.
static inline void settle_signals(void) { signal(SIGXFSZ, SIG_IGN); }

typedef struct {
    const uint8_t* data;
    size_t size;
} MappedFile;  // data NULL: an empty file

// Maps a regular file read-only. The mapping stays until unmap_file; where the file shrinks meanwhile, or its disk
// fails, a read ends the program with one line.
static inline bool map_file(MappedFile* m, const char* path, Error* e) {
    m->data = NULL;
    m->size = 0;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // a pipe in its place would be waited for
    if (fd < 0) { return fail(e, "%s: %s", path, path_error(path, errno)); }
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        return fail(e, "%s: not a regular file", path);
    }
    if (st.st_size > 0) {
        void* p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) {
            int why = errno;
            close(fd);
            return fail(e, "%s: cannot map %lld bytes: %s", path, (long long)st.st_size, strerror(why));
        }
        signal(SIGBUS, bus_error);
        m->data = (const uint8_t*)p;
        m->size = (size_t)st.st_size;
    }
    close(fd);
    return true;
}

static inline void unmap_file(MappedFile* m) {
    if (m->data) { munmap((void*)(uintptr_t)m->data, m->size); }
    m->data = NULL;
    m->size = 0;
}

// Bytes of the byte-order mark at the beginning of a text of n bytes, which editors of other systems put there: 3, or
// 0.
static inline size_t byte_order_mark(const char* text, size_t n) {
    return n >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3) ? 3 : 0;
}

// Reads all that comes from a descriptor, at most max_bytes, into *text, malloc'ed, with a NUL behind its *n bytes.
static inline bool read_descriptor(int fd, const char* path, size_t max_bytes, char** text, size_t* n, Error* e) {
    struct pollfd waiting = {fd, POLLIN, 0};
    size_t cap = 4096, have = 0;
    char* buffer = NULL;
    for (;;) {
        if (!buffer || have == cap - 1) {
            cap *= buffer ? 2 : 1;
            buffer = (char*)realloc(buffer, cap);
            if (!buffer) { die("%s: out of memory for %zu bytes", path, cap); }  // the file is not to blame
        }
        ssize_t got = read(fd, buffer + have, cap - 1 - have);
        if (got < 0 && errno == EINTR) { continue; }
        if (got < 0 && errno == EAGAIN && poll(&waiting, 1, -1) >= 0) { continue; }
        if (got < 0) {
            fail(e, "%s: %s", path, strerror(errno));
            break;
        }
        have += (size_t)got;
        if (have > max_bytes) {
            fail(e, "%s: more than the %zu bytes that such a file may have", path, max_bytes);
            break;
        }
        if (got == 0) {
            buffer[have] = 0;
            *text = buffer;
            *n = have;
            return true;
        }
    }
    free(buffer);
    return false;
}

// A whole file (or pipe), as read_descriptor gives it.
static inline bool read_file(const char* path, size_t max_bytes, char** text, size_t* n, Error* e) {
    *text = NULL;
    *n = 0;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // a named pipe that nobody writes to is empty
    if (fd < 0) { return fail(e, "%s: %s", path, path_error(path, errno)); }
    bool good = read_descriptor(fd, path, max_bytes, text, n, e);
    close(fd);
    return good;
}

// write(2) until all n bytes are out; false with errno set (ENOSPC where write makes no progress).
static inline bool write_all(int fd, const void* data, size_t n) {
    const char* p = (const char*)data;
    while (n) {
        ssize_t put = write(fd, p, n < (1u << 30) ? n : (1u << 30));
        if (put < 0 && errno == EINTR) { continue; }
        if (put <= 0) {
            if (put == 0) { errno = ENOSPC; }
            return false;
        }
        p += put;
        n -= (size_t)put;
    }
    return true;
}

// removes a file of ours, never a device that stands in its place
static inline void unlink_regular(const char* path) {
    struct stat st;
    if (lstat(path, &st) == 0 && S_ISREG(st.st_mode)) { unlink(path); }
}

// Creates (or empties) the file, writes it whole, syncs it to the disk. On failure the file is removed.
static inline bool write_file_synced(const char* path, const void* data, size_t n, Error* e) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) { return fail(e, "%s: cannot create: %s", path, strerror(errno)); }
    bool good = write_all(fd, data, n) && fsync(fd) == 0;
    int why = errno;
    if (close(fd) && good) {
        good = false;
        why = errno;
    }
    if (good) { return true; }
    unlink_regular(path);
    return fail(e, "%s: cannot write %zu bytes: %s", path, n, strerror(why));
}

// Does this errno of fsync on a directory say that the file system does not offer it (CIFS, FUSE, some network disks),
// and not that it failed?
static inline bool sync_not_offered(int number) {
    return number == EINVAL || number == ENOTSUP || number == EOPNOTSUPP || number == ENOSYS || number == ENOTTY ||
           number == EBADF || number == EROFS || number == EACCES || number == EPERM || number == EISDIR;
}

// Makes the names in a directory (new files, renames) survive a power cut, where the file system can.
static inline bool sync_dir(const char* path, Error* e) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        return errno == EACCES || fail(e, "%s: %s", path, strerror(errno));
    }  // may be written and not be listed
    bool good = fsync(fd) == 0 || sync_not_offered(errno);
    int why = errno;
    close(fd);
    return good || fail(e, "%s: cannot sync: %s", path, strerror(why));
}

// mkdir -p.
static inline bool make_dirs(const char* path, Error* e) {
    char part[PATH_SIZE];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof part) { return fail(e, "directory name of %zu bytes, wanted 1 to %d", n, PATH_SIZE - 1); }
    for (size_t i = 1; i <= n; i++) {
        if (path[i] != '/' && path[i] != 0) { continue; }
        memcpy(part, path, i);
        part[i] = 0;
        if (mkdir(part, 0777) == 0) { continue; }
        int why = errno;  // dir_exists sets its own
        if (!dir_exists(part)) { return fail(e, "%s: cannot create directory: %s", part, path_error(part, why)); }
    }
    return true;
}

// "a/b" into out of n bytes; b alone where it is absolute or a is empty. Dies if it does not fit.
static inline void path_join(char* out, size_t n, const char* a, const char* b) {
    size_t la = strlen(a);
    const char* slash = la && a[la - 1] != '/' ? "/" : "";
    int len = b[0] == '/' || !la ? snprintf(out, n, "%s", b) : snprintf(out, n, "%s%s%s", a, slash, b);
    if (len < 0 || (size_t)len >= n) { die("path of %d bytes is too long, at most %zu: %.200s...", len, n - 1, out); }
}

// What a program prints as its result. A reader that went away (a closed pipe; SIGPIPE must be ignored) or a full disk
// ends the program with one line; also where an earlier printf met it, whose buffer is gone.
static inline void put_out(const char* text, size_t n, bool flush) {
    if ((n && fwrite(text, 1, n, stdout) != n) || (flush && fflush(stdout)) || ferror(stdout)) {
        fprintf(stderr, "%s: standard output: %s\n", program_invocation_short_name, strerror(errno));
        _exit(1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Time

static inline double clock_seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static inline double seconds_now(void) { return clock_seconds(CLOCK_MONOTONIC); }

// ---------------------------------------------------------------------------------------------------------------------
// Texts

// For qsort: texts by their bytes, whatever the locale.
static inline int compare_texts(const void* a, const void* b) {
    return strcmp(*(const char* const*)a, *(const char* const*)b);
}

// Which word of "a|b|c" that is; -1: none.
static inline int choice_index(const char* words, const char* word) {
    size_t n = strlen(word);
    for (int i = 0;; i++) {
        size_t length = strcspn(words, "|");
        if (length == n && !strncmp(words, word, n)) { return i; }
        if (!words[length]) { return -1; }
        words += length + 1;
    }
}

// A growing string: start from {0}, always NUL-terminated once something was added, freed by text_free.
typedef struct {
    char* text;
    size_t n, cap;
} Text;

static inline void text_reserve(Text* t, size_t more) {  // room for `more` bytes and a NUL
    size_t need;
    if (!add_size(t->n, more, &need) || !add_size(need, 1, &need)) {
        die("out of memory: a text of %zu + %zu bytes", t->n, more);
    }
    if (need <= t->cap) { return; }
    size_t cap = t->cap ? t->cap : 256;
    while (cap < need) { cap = cap > SIZE_MAX / 2 ? need : cap * 2; }
    char* p = (char*)realloc(t->text, cap);
    if (!p) { die("out of memory: a text of %zu bytes", cap); }
    t->text = p;
    t->cap = cap;
}

static inline void text_append(Text* t, const char* s, size_t n) {
    text_reserve(t, n);
    if (n) { memcpy(t->text + t->n, s, n); }
    t->n += n;
    t->text[t->n] = 0;
}

__attribute__((format(printf, 2, 3))) static inline void text_printf(Text* t, const char* fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    assert(n >= 0);
    text_reserve(t, (size_t)n);
    vsnprintf(t->text + t->n, (size_t)n + 1, fmt, again);
    va_end(again);
    t->n += (size_t)n;
}

static inline void text_free(Text* t) {
    free(t->text);
    t->text = NULL;
    t->n = t->cap = 0;
}

#endif
