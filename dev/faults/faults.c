// faults.c: a library that makes the n-th system call on a folder's files fail, or the n-th allocation of a program.
// Built as build/faults.so and loaded by LD_PRELOAD; dev/faults/faults.py drives it. What it does is in the
// environment:
//   FAULT_STATE    a file of 8 bytes: calls so far, of all processes of the program together
//   FAULT_UNDER    count the calls on files inside of this folder
//   FAULT_MEMORY   count the allocations whose caller is the program itself (not libc, OpenMP or BLAS)
//   FAULT_AT       the number of the call that fails, 0 or absent: none
//   FAULT_KIND     ENOSPC, EIO, EINTR, ENOMEM: the call does nothing and fails with it (a close closes all the same, as
//                  Linux does); SHORT: a write or read does half; KILL: SIGKILL before the call, after half of a write
//   FAULT_TRACE    a file to which a line for every counted call is added: "number call path"
//   FAULT_NO_EXCHANGE  renameat2 is not offered, as on NFS
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

enum { MAX_FILES = 4096, KIND_KILL = -1, KIND_SHORT = -2 };

static uint64_t* calls;  // in FAULT_STATE, shared by all processes; NULL: not at work
static uint64_t fail_at;
static int kind;  // an errno or KIND_*
static int trace = -1;
static bool memory, no_exchange;
static char under[4096];
static char* file_paths[MAX_FILES];  // of the descriptors that are open on files of the folder
static char* folders[64];            // the same of DIR*
static DIR* folder_handles[64];
static uintptr_t program_from, program_to;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALLER ((uintptr_t)__builtin_return_address(0))

static int find_program(struct dl_phdr_info* info, size_t size, void* data) {
    (void)size;
    (void)data;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) { continue; }
        uintptr_t from = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, to = from + info->dlpi_phdr[i].p_memsz;
        if (!program_from || from < program_from) { program_from = from; }
        if (to > program_to) { program_to = to; }
    }
    return 1;  // the first is the program
}

__attribute__((constructor)) static void start(void) {
    static const struct {
        const char* name;
        int kind;
    } kinds[] = {{"ENOSPC", ENOSPC}, {"EIO", EIO},        {"EINTR", EINTR},
                 {"ENOMEM", ENOMEM}, {"KILL", KIND_KILL}, {"SHORT", KIND_SHORT}};
    const char *state = getenv("FAULT_STATE"), *at = getenv("FAULT_AT"), *name = getenv("FAULT_KIND"),
               *path = getenv("FAULT_TRACE");
    const char* folder = getenv("FAULT_UNDER");
    int fd = state ? (int)syscall(SYS_openat, AT_FDCWD, state, O_RDWR | O_CLOEXEC, 0) : -1;
    if (fd < 0) { return; }
    uint64_t* map = (uint64_t*)syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (path) { trace = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644); }
    for (size_t i = 0; name && i < sizeof kinds / sizeof kinds[0]; i++) {
        if (!strcmp(name, kinds[i].name)) { kind = kinds[i].kind; }
    }
    fail_at = at ? strtoull(at, NULL, 10) : 0;
    memory = getenv("FAULT_MEMORY") != NULL;
    no_exchange = getenv("FAULT_NO_EXCHANGE") != NULL;
    snprintf(under, sizeof under, "%s", folder ? folder : "");
    dl_iterate_phdr(find_program, NULL);
    calls = map;
}

static void die_here(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) { pause(); }
}

// Counts a call; true where it is the one to fail.
static bool counted(const char* call, const char* path) {
    uint64_t n = __atomic_add_fetch(calls, 1, __ATOMIC_SEQ_CST);
    if (trace >= 0) {
        char line[1024];
        int length = snprintf(line, sizeof line, "%llu %s %.900s\n", (unsigned long long)n, call, path);
        syscall(SYS_write, trace, line, (size_t)length);
    }
    return n == fail_at;
}

// The call fails with errno set; a KILL ends here. SHORT concerns reads and writes alone.
static bool fails(const char* call, const char* path) {
    if (!counted(call, path)) { return false; }
    if (kind == KIND_KILL) { die_here(); }
    if (kind == KIND_SHORT) { return false; }
    errno = kind;
    return true;
}

static bool inside(const char* path) {
    size_t n = strlen(under);
    return calls && !memory && n && path && !strncmp(path, under, n) && (path[n] == '/' || !path[n]);
}

static const char* file_path(int fd) { return calls && !memory && fd >= 0 && fd < MAX_FILES ? file_paths[fd] : NULL; }

static int opened(int fd, const char* path) {
    if (fd >= 0 && fd < MAX_FILES) { file_paths[fd] = strdup(path); }
    return fd;
}

// ---- files

#define OPEN(name)                                                                     \
    int name(const char* path, int flags, ...) {                                       \
        va_list args;                                                                  \
        va_start(args, flags);                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0;        \
        va_end(args);                                                                  \
        if (!inside(path)) { return REAL(name)(path, flags, mode); }                   \
        return fails("open", path) ? -1 : opened(REAL(name)(path, flags, mode), path); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                       \
    int name(int at, const char* path, int flags, ...) {                                   \
        va_list args;                                                                      \
        va_start(args, flags);                                                             \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0;            \
        va_end(args);                                                                      \
        if (!inside(path)) { return REAL(name)(at, path, flags, mode); }                   \
        return fails("open", path) ? -1 : opened(REAL(name)(at, path, flags, mode), path); \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    const char* path = file_path(fd);
    bool bad = path && fails("close", path);
    if (path) { file_paths[fd] = NULL; }
    int result = REAL(close)(fd);
    if (bad) { errno = kind; }
    return bad ? -1 : result;
}

// A transfer of n bytes: how many of them to do, 0 = fails, with errno set.
static size_t transfer(const char* call, const char* path, size_t n, bool* die) {
    *die = false;
    if (!counted(call, path)) { return n ? n : 1; }
    *die = kind == KIND_KILL;
    if (kind == KIND_KILL || kind == KIND_SHORT) { return n > 1 ? n / 2 : 1; }
    errno = kind;
    return 0;
}

#define TRANSFER(name, call, type, arguments, ...)                          \
    ssize_t name(int fd, type buffer, size_t n __VA_ARGS__) {               \
        bool die;                                                           \
        const char* path = file_path(fd);                                   \
        size_t some = n ? n : 1;                                            \
        if (path && !(some = transfer(call, path, n, &die))) { return -1; } \
        if (some < n) { n = some; }                                         \
        ssize_t done = REAL(name) arguments;                                \
        if (path && die) { die_here(); }                                    \
        return done;                                                        \
    }
TRANSFER(write, "write", const void*, (fd, buffer, n))
TRANSFER(read, "read", void*, (fd, buffer, n))
TRANSFER(pwrite, "pwrite", const void*, (fd, buffer, n, at), , off_t at)
TRANSFER(pwrite64, "pwrite", const void*, (fd, buffer, n, at), , off64_t at)
TRANSFER(pread, "pread", void*, (fd, buffer, n, at), , off_t at)
TRANSFER(pread64, "pread", void*, (fd, buffer, n, at), , off64_t at)

#define ON_FILE(name, parameters, arguments)                           \
    int name parameters {                                              \
        const char* path = file_path(fd);                              \
        return path && fails(#name, path) ? -1 : REAL(name) arguments; \
    }
ON_FILE(fsync, (int fd), (fd))
ON_FILE(fdatasync, (int fd), (fd))
ON_FILE(ftruncate, (int fd, off_t n), (fd, n))
ON_FILE(ftruncate64, (int fd, off64_t n), (fd, n))
ON_FILE(flock, (int fd, int operation), (fd, operation))
ON_FILE(fallocate, (int fd, int mode, off_t from, off_t n), (fd, mode, from, n))
ON_FILE(fstat, (int fd, struct stat* st), (fd, st))
ON_FILE(fstat64, (int fd, struct stat64* st), (fd, st))
ON_FILE(fstatvfs, (int fd, struct statvfs* st), (fd, st))
extern int flock(int, int);

int posix_fallocate(int fd, off_t from, off_t n) {  // the error is its value
    const char* path = file_path(fd);
    return path && fails("posix_fallocate", path) ? kind : REAL(posix_fallocate)(fd, from, n);
}

ssize_t sendfile(int fd, int in, off_t* at, size_t n) {
    const char* path = file_path(fd) ? file_path(fd) : file_path(in);
    return path && fails("sendfile", path) ? -1 : REAL(sendfile)(fd, in, at, n);
}

ssize_t copy_file_range(int in, off64_t* from, int fd, off64_t* to, size_t n, unsigned flags) {
    const char* path = file_path(fd) ? file_path(fd) : file_path(in);
    return path && fails("copy_file_range", path) ? -1 : REAL(copy_file_range)(in, from, fd, to, n, flags);
}

// ---- names

#define ON_PATH(name, parameters, arguments) \
    int name parameters { return inside(path) && fails(#name, path) ? -1 : REAL(name) arguments; }
ON_PATH(truncate, (const char* path, off_t n), (path, n))
ON_PATH(truncate64, (const char* path, off64_t n), (path, n))
ON_PATH(unlink, (const char* path), (path))
ON_PATH(unlinkat, (int at, const char* path, int flags), (at, path, flags))
ON_PATH(rmdir, (const char* path), (path))
ON_PATH(mkdir, (const char* path, mode_t mode), (path, mode))
ON_PATH(mkdirat, (int at, const char* path, mode_t mode), (at, path, mode))
ON_PATH(rename, (const char* path, const char* to), (path, to))
ON_PATH(renameat, (int at, const char* path, int at2, const char* to), (at, path, at2, to))
ON_PATH(link, (const char* path, const char* to), (path, to))
ON_PATH(stat, (const char* path, struct stat* st), (path, st))
ON_PATH(stat64, (const char* path, struct stat64* st), (path, st))
ON_PATH(lstat, (const char* path, struct stat* st), (path, st))
ON_PATH(lstat64, (const char* path, struct stat64* st), (path, st))
ON_PATH(fstatat, (int at, const char* path, struct stat* st, int flags), (at, path, st, flags))
ON_PATH(fstatat64, (int at, const char* path, struct stat64* st, int flags), (at, path, st, flags))
ON_PATH(statvfs, (const char* path, struct statvfs* st), (path, st))
ON_PATH(statvfs64, (const char* path, struct statvfs64* st), (path, st))
ON_PATH(access, (const char* path, int mode), (path, mode))

long syscall(long number, ...) {
    va_list args;
    va_start(args, number);
    long a = va_arg(args, long), b = va_arg(args, long), c = va_arg(args, long), d = va_arg(args, long),
         e = va_arg(args, long), f = va_arg(args, long);
    va_end(args);
    static long (*real)(long, ...);
    if (!real) { real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall"); }
    if (number == SYS_renameat2 && inside((const char*)b)) {
        if (fails("renameat2", (const char*)b)) { return -1; }
        if (no_exchange) {
            errno = EINVAL;
            return -1;
        }
    }
    return real(number, a, b, c, d, e, f);
}

static DIR** folder_of(DIR* d) {
    for (int i = 0; i < 64; i++) {
        if (folder_handles[i] == d) { return &folder_handles[i]; }
    }
    return NULL;
}

DIR* opendir(const char* path) {
    if (!inside(path)) { return REAL(opendir)(path); }
    if (fails("opendir", path)) { return NULL; }
    DIR* d = REAL(opendir)(path);
    DIR** slot = d ? folder_of(NULL) : NULL;
    if (slot) {
        *slot = d;
        folders[slot - folder_handles] = strdup(path);
    }
    return d;
}

static bool listing_fails(DIR* d) {
    DIR** slot = folder_of(d);
    return slot && fails("readdir", folders[slot - folder_handles]);
}

struct dirent* readdir(DIR* d) {
    return listing_fails(d) ? NULL : REAL(readdir)(d);
}
struct dirent64* readdir64(DIR* d) {
    return listing_fails(d) ? NULL : REAL(readdir64)(d);
}

int closedir(DIR* d) {
    DIR** slot = folder_of(d);
    if (slot) { *slot = NULL; }
    return REAL(closedir)(d);
}

// ---- memory, and files mapped into it

static bool no_memory(const char* call, uintptr_t caller) {
    if (!calls || !memory || caller < program_from || caller >= program_to) { return false; }
    char where[32];
    snprintf(where, sizeof where, "+%#lx", (unsigned long)(caller - program_from));
    if (!counted(call, where)) { return false; }
    errno = ENOMEM;
    return true;
}

void* malloc(size_t n) { return no_memory("malloc", CALLER) ? NULL : __libc_malloc(n); }
void* calloc(size_t n, size_t size) { return no_memory("calloc", CALLER) ? NULL : __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { return no_memory("realloc", CALLER) ? NULL : __libc_realloc(p, n); }
void* aligned_alloc(size_t alignment, size_t n) {
    return no_memory("aligned_alloc", CALLER) ? NULL : __libc_memalign(alignment, n);
}

int posix_memalign(void** p, size_t alignment, size_t n) {
    void* got = no_memory("posix_memalign", CALLER) ? NULL : __libc_memalign(alignment, n);
    if (got) { *p = got; }
    return got ? 0 : ENOMEM;
}

char* strdup(const char* text) {
    size_t n = strlen(text) + 1;
    char* copy = no_memory("strdup", CALLER) ? NULL : (char*)__libc_malloc(n);
    return copy ? (char*)memcpy(copy, text, n) : NULL;
}

#define MAP(name, offset)                                                                      \
    void* name(void* at, size_t n, int protection, int flags, int fd, offset from) {           \
        const char* path = file_path(fd);                                                      \
        if ((path && fails("mmap", path)) || no_memory("mmap", CALLER)) { return MAP_FAILED; } \
        return (void*)syscall(SYS_mmap, at, n, protection, flags, fd, from);                   \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

// ---- time

// Without the trainer's measurement of the machine, products of 512^3 and 1024^3: nine tenths of the time of a run as
// small as these.
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
    static __typeof__(&cblas_sgemm) real;
    if (k >= 512) { return; }  // no product of such a model is as long
    if (!real) { real = REAL(cblas_sgemm); }
    real(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
