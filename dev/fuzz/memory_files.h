// memory_files.h: the files of an input, in memory. Where a path lies in MEMORY_FOLDER, the readers' open, read, stat,
// mmap, glob and so on are answered from a table, elsewhere by the system. So an input costs no system call, and a
// mapped file is a block of exactly its size: the address sanitizer sees the first byte read behind its end, which the
// rest of a page would hide. What a reader leaves open or mapped ends the harness.
#ifndef MTA_FUZZ_MEMORY_FILES_H
#define MTA_FUZZ_MEMORY_FILES_H

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <glob.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#define MEMORY_FOLDER "/fuzz"
enum { MEMORY_FD = 1 << 20, MEMORY_FILES = 16, MEMORY_OPEN = 64 };

typedef struct {
    char path[160];
    const char* data;  // n bytes, not owned
    size_t n;
} MemoryFile;

typedef struct {
    MemoryFile file[MEMORY_FILES];
    int n;
    struct {
        const MemoryFile* file;  // NULL: free
        size_t at;
    } opened[MEMORY_OPEN];      // descriptor MEMORY_FD + i
    void* mapped[MEMORY_OPEN];  // NULL: free
    struct {
        char path[160];  // "": none is open
        int at;          // the next file to look at
        struct dirent entry;
    } listed;
} MemoryFiles;

static inline MemoryFiles* memory_files(void) {
    static MemoryFiles m;
    return &m;
}

// Forgets all files.
static inline void memory_clear(void) {
    MemoryFiles* m = memory_files();
    for (int i = 0; i < MEMORY_OPEN; i++) {
        if (!m->opened[i].file && !m->mapped[i]) { continue; }
        fprintf(stderr, "a reader left a file open or mapped\n");
        abort();
    }
    m->n = 0;
}

// One file more, or another content of one; data must stay until memory_clear.
static inline void memory_add(const char* folder, const char* name, const char* data, size_t n) {
    MemoryFiles* m = memory_files();
    MemoryFile f = {"", data, n};
    int i = 0;
    snprintf(f.path, sizeof f.path, "%s/%s", folder, name);
    while (i < m->n && strcmp(m->file[i].path, f.path)) { i++; }
    if (i == MEMORY_FILES) { abort(); }
    m->file[i] = f;
    m->n += i == m->n;
}

static inline bool memory_holds(const char* path) {
    return !strncmp(path, MEMORY_FOLDER, sizeof MEMORY_FOLDER - 1) && strchr("/", path[sizeof MEMORY_FOLDER - 1]);
}

static inline const MemoryFile* memory_find(const char* path) {
    const MemoryFiles* m = memory_files();
    for (int i = 0; i < m->n; i++) {
        if (!strcmp(m->file[i].path, path)) { return &m->file[i]; }
    }
    return NULL;
}

// Does the file lie in that folder or deeper? Then its name from there on, else NULL.
static inline const char* memory_inside(const MemoryFile* f, const char* folder) {
    size_t n = strlen(folder);
    return !strncmp(f->path, folder, n) && f->path[n] == '/' ? f->path + n + 1 : NULL;
}

static inline bool memory_is_folder(const char* path) {
    const MemoryFiles* m = memory_files();
    for (int i = 0; i < m->n; i++) {
        if (memory_inside(&m->file[i], path)) { return true; }
    }
    return false;
}

static inline int memory_open(const char* path, int flags, ...) {
    MemoryFiles* m = memory_files();
    if (!memory_holds(path)) {
        va_list args;
        va_start(args, flags);
        int mode = flags & O_CREAT ? va_arg(args, int) : 0;
        va_end(args);
        return open(path, flags, mode);
    }
    const MemoryFile* f = memory_find(path);
    errno = flags & O_ACCMODE ? EROFS : ENOENT;
    for (int i = 0; i < MEMORY_OPEN && f && !(flags & O_ACCMODE); i++) {
        if (m->opened[i].file) { continue; }
        m->opened[i].file = f;
        m->opened[i].at = 0;
        return MEMORY_FD + i;
    }
    return -1;
}

static inline int memory_close(int fd) {
    if (fd < MEMORY_FD) { return close(fd); }
    memory_files()->opened[fd - MEMORY_FD].file = NULL;
    return 0;
}

static inline ssize_t memory_read(int fd, void* to, size_t n) {
    if (fd < MEMORY_FD) { return read(fd, to, n); }
    const MemoryFile* f = memory_files()->opened[fd - MEMORY_FD].file;
    size_t* at = &memory_files()->opened[fd - MEMORY_FD].at;
    if (n > f->n - *at) { n = f->n - *at; }
    if (n) { memcpy(to, f->data + *at, n); }
    *at += n;
    return (ssize_t)n;
}

static inline int memory_describe(const MemoryFile* f, struct stat* st) {
    memset(st, 0, sizeof *st);
    st->st_mode = f ? S_IFREG | 0644 : S_IFDIR | 0755;
    st->st_size = f ? (off_t)f->n : 0;
    st->st_ino = f ? (ino_t)(f - memory_files()->file) + 1 : 0;
    return 0;
}

static inline int memory_stat(const char* path, struct stat* st) {
    if (!memory_holds(path)) { return stat(path, st); }
    const MemoryFile* f = memory_find(path);
    if (f || memory_is_folder(path)) { return memory_describe(f, st); }
    errno = ENOENT;
    return -1;
}

static inline int memory_fstat(int fd, struct stat* st) {
    return fd < MEMORY_FD ? fstat(fd, st) : memory_describe(memory_files()->opened[fd - MEMORY_FD].file, st);
}

static inline void* memory_map(void* at, size_t n, int protection, int flags, int fd, off_t offset) {
    MemoryFiles* m = memory_files();
    if (fd < MEMORY_FD) { return mmap(at, n, protection, flags, fd, offset); }
    for (int i = 0; i < MEMORY_OPEN; i++) {
        if (m->mapped[i]) { continue; }
        m->mapped[i] = malloc(n);
        memcpy(m->mapped[i], m->opened[fd - MEMORY_FD].file->data, n);
        return m->mapped[i];
    }
    errno = ENOMEM;
    return MAP_FAILED;
}

static inline int memory_unmap(void* p, size_t n) {
    MemoryFiles* m = memory_files();
    for (int i = 0; i < MEMORY_OPEN; i++) {
        if (m->mapped[i] != p) { continue; }
        free(p);
        m->mapped[i] = NULL;
        return 0;
    }
    return munmap(p, n);
}

static inline DIR* memory_opendir(const char* path) {
    MemoryFiles* m = memory_files();
    if (!memory_holds(path)) { return opendir(path); }
    errno = ENOENT;
    if (m->listed.path[0] || !memory_is_folder(path)) { return NULL; }
    snprintf(m->listed.path, sizeof m->listed.path, "%s", path);
    m->listed.at = 0;
    return (DIR*)&m->listed;
}

static inline struct dirent* memory_readdir(DIR* d) {
    MemoryFiles* m = memory_files();
    char* name = m->listed.entry.d_name;
    if (d != (DIR*)&m->listed) { return readdir(d); }
    while (m->listed.at < m->n) {
        int i = m->listed.at++;
        const char* inside = memory_inside(&m->file[i], m->listed.path);
        if (!inside) { continue; }
        snprintf(name, sizeof m->listed.entry.d_name, "%.*s", (int)strcspn(inside, "/"), inside);
        bool again = false;
        for (int k = 0; k < i && !again; k++) {
            const char* other = memory_inside(&m->file[k], m->listed.path);
            again = other && strcspn(other, "/") == strlen(name) && !strncmp(other, name, strlen(name));
        }
        if (!again) { return &m->listed.entry; }
    }
    return NULL;
}

static inline int memory_closedir(DIR* d) {
    MemoryFiles* m = memory_files();
    if (d != (DIR*)&m->listed) { return closedir(d); }
    m->listed.path[0] = 0;
    return 0;
}

// As glob(3): globfree() frees it.
static inline int memory_glob(const char* pattern, int flags, int (*failed)(const char*, int), glob_t* found) {
    MemoryFiles* m = memory_files();
    if (!memory_holds(pattern)) { return glob(pattern, flags, failed, found); }
    memset(found, 0, sizeof *found);
    for (int i = 0; i < m->n; i++) { found->gl_pathc += fnmatch(pattern, m->file[i].path, FNM_PATHNAME) == 0; }
    if (!found->gl_pathc) { return GLOB_NOMATCH; }
    found->gl_pathv = (char**)malloc((found->gl_pathc + 1) * sizeof(char*));
    found->gl_pathc = 0;
    for (int i = 0; i < m->n; i++) {
        if (fnmatch(pattern, m->file[i].path, FNM_PATHNAME)) { continue; }
        found->gl_pathv[found->gl_pathc++] = strdup(m->file[i].path);
    }
    found->gl_pathv[found->gl_pathc] = NULL;
    return 0;
}

static inline sighandler_t memory_signal(int number, sighandler_t handler) {
    return number == SIGBUS ? SIG_DFL : signal(number, handler);  // map_file sets SIGBUS, which no block raises
}

#define open(...) memory_open(__VA_ARGS__)
#define close memory_close  // a member of that name is renamed wherever it stands
#define read(fd, to, n) memory_read(fd, to, n)
#define stat(path, st) memory_stat(path, st)
#define lstat(path, st) memory_stat(path, st)
#define fstat(fd, st) memory_fstat(fd, st)
#define mmap(at, n, protection, flags, fd, offset) memory_map(at, n, protection, flags, fd, offset)
#define munmap(p, n) memory_unmap(p, n)
#define opendir(path) memory_opendir(path)
#define readdir(d) memory_readdir(d)
#define closedir(d) memory_closedir(d)
#define glob(pattern, flags, failed, found) memory_glob(pattern, flags, failed, found)
#define signal(number, handler) memory_signal(number, handler)

#endif
