// check.h: what the C and C++ tests of dev/tests share: checks that are counted and told where they fail, a folder of
// their own, the verdict.
#ifndef CHECK_H
#define CHECK_H

#include <ftw.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

static int passed, failed, skipped;

// check(good, what) or check(good, what, detail): a failed one prints its line, what was checked and, if given, what
// was there instead.
#define check(good, ...) check_at(good, __LINE__, __VA_ARGS__, (const char*)NULL)
#define CHECK(good) check(good, #good)

static inline void check_at(bool good, int line, const char* what, ...) {
    va_list details;
    va_start(details, what);
    const char* detail = va_arg(details, const char*);
    va_end(details);
    if (good) {
        passed++;
    } else {
        failed++;
    }
    if (!good) { printf("FAILED line %d: %s%s%s\n", line, what, detail ? ": " : "", detail ? detail : ""); }
}

// The test's own folder, made at the first call, and the path of a name in it; 64 paths may be in use at once.
static inline const char* test_folder(void) {
    static char folder[256];
    if (!folder[0]) {
        const char* temporary = getenv("TMPDIR");
        snprintf(folder, sizeof folder, "%s/mta_test_XXXXXX", temporary && *temporary ? temporary : "/tmp");
        if (!mkdtemp(folder)) {
            perror(folder);
            exit(1);
        }
    }
    return folder;
}

static inline const char* at(const char* name) {
    static char paths[64][4096];
    static int turn;
    turn = (turn + 1) % 64;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", test_folder(), name);
    return paths[turn];
}

static inline int remove_entry(const char* path, const struct stat* status, int flag, struct FTW* place) {
    (void)status;
    (void)flag;
    (void)place;
    return remove(path);
}

static inline void remove_tree(const char* path) { nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

// The last line of every test, and its exit status.
static inline int test_verdict(void) {
    printf(skipped ? "%d passed, %d failed, %d skipped\n" : "%d passed, %d failed\n", passed, failed, skipped);
    return failed != 0;
}

#endif
