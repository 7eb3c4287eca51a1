// fuzz_shard.c: a token shard from bytes: the file is opened as the loader does it and every window is read.
#include "mta/shards.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    static int fd = -1;
    static char path[64];
    enum { T = 7 };
    int32_t tokens[T], targets[T];
    if (fd < 0) {
        fd = memfd_create("shard", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (fd < 0 || ftruncate(fd, 0) || pwrite(fd, data, n, 0) != (ssize_t)n) { abort(); }
    Error e = {{0}};
    Loader l;
    memset(&l, 0, sizeof l);
    if (loader_open(&l, path, T, 300, 1, &e)) {
        for (uint64_t w = 0; w < loader_windows(&l) && w < 50; w++) {
            if (!loader_window(&l, w, tokens, targets, &e)) { break; }
            for (int t = 0; t < T; t++) {
                if (tokens[t] < 0 || tokens[t] >= 300 || targets[t] >= 300) { abort(); }
            }
        }
        for (int k = 0; k < 20 && loader_next(&l, tokens, targets, &e); k++) {}
        loader_close(&l);
    }
    return 0;
}
