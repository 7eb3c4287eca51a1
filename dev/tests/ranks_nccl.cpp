// ranks_nccl.cpp: one rank of a test of mta/ranks_nccl.h over dev/cuda_cpu/nccl.h, without a model: what is computed on
// one stream and sent on another, sums in the tree's order, bytes of the host's memory. test_ranks_cuda.py builds it,
// also with faults planted in the headers, and starts a few of it. Ends with status 1 and a line where something is not
// what it should be. NODE=N: as if so many ranks had a host of their own.
#include <nccl.h>
#include <vector>
#include "mta/ranks_nccl.h"

enum { N = 5 * RANKS_BLOCK + 192, THREADS = 256 };

// A value that rounds differently in another order of sums.
static __host__ __device__ float value_of(int rank, int round, size_t i) {
    unsigned x = (unsigned)i * 2654435761u + (unsigned)rank * 40503u + (unsigned)round * 977u;
    x ^= x >> 15;
    return ((float)(x % 20011) - 10005.0f) / (float)(1 << x % 11);
}
static __global__ void fill_kernel(float* x, size_t n, int rank, int round) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { x[i] = value_of(rank, round, i); }
}
static __global__ void add_kernel(float* sum, const float* more, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { sum[i] += more[i]; }
}
static void add(void* stream, void* sum, const void* more, size_t n) {
    LAUNCH(add_kernel, (unsigned)((n + THREADS - 1) / THREADS), THREADS, 0, (cudaStream_t)stream, (float*)sum,
           (const float*)more, n);
}

static void need(bool good, const char* what, size_t where) {
    if (!good) { die("%s: not as it should be at %zu", what, where); }
}

// The sum over ranks [from, to), as dev/RANKS.md says: the node splits behind the largest power of two below its size.
static float tree_value(int from, int to, int round, size_t i) {
    int half = 1;
    if (to - from == 1) { return value_of(from, round, i); }
    while (2 * half < to - from) { half *= 2; }
    return tree_value(from, from + half, round, i) + tree_value(from + half, to, round, i);
}

int main() {
    Ranks* r = ranks_of_nccl();
    cudaStream_t stream;
    float *data, *room;
    size_t part = ranks_most_elements(r->size, N), all = part * (size_t)r->size, elements = ranks_room(r->size, 0);
    Span own = ranks_elements(r, r->rank, N);
    std::vector<float> got(all);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaMalloc(&data, all * sizeof(float));
    cudaMalloc(&room, elements * sizeof(float));
    cudaMemset(data, 0, all * sizeof(float));
    r->work = stream;
    if (getenv("NODE")) { r->node = atoi(getenv("NODE")); }
    RanksSum sum = {add, stream, sizeof(float), (char*)room, elements};

    // Sums, twice: what the second round sends must not be the first one's. Then the own parts to all.
    for (int round = 0; round < 2; round++) {
        LAUNCH(fill_kernel, (N + THREADS - 1) / THREADS, THREADS, 0, stream, data, (size_t)N, r->rank, round);
        ranks_reduce(r, data, N, &sum);
        ranks_gather_equal(r, data, part * sizeof(float));
        cudaMemcpyAsync(got.data(), data, all * sizeof(float), cudaMemcpyDeviceToHost, stream);
        cudaStreamSynchronize(stream);
        for (size_t i = 0; i < N; i++) { need(got[i] == tree_value(0, r->size, round, i), "the tree's sums", i); }
    }

    // The same sums in the library's own order.
    LAUNCH(fill_kernel, (N + THREADS - 1) / THREADS, THREADS, 0, stream, data, (size_t)N, r->rank, 2);
    ranks_reduce_equal(r, data, part);
    cudaMemcpyAsync(got.data(), data, all * sizeof(float), cudaMemcpyDeviceToHost, stream);
    cudaStreamSynchronize(stream);
    for (size_t i = own.begin; i < own.end; i++) {
        need(fabsf(got[i] - tree_value(0, r->size, 2, i)) < 0.02f, "NCCL's sums", i);
    }

    // Bytes of the host's memory.
    std::vector<int64_t> words((size_t)r->size);
    int64_t word = 100 + r->rank;
    ranks_exchange(r, &word, sizeof word, words.data());
    for (int p = 0; p < r->size; p++) { need(words[(size_t)p] == 100 + p, "an exchange", (size_t)p); }
    std::vector<char> text(RANKS_PIECE + 1000);
    for (size_t i = 0; i < text.size(); i++) { text[i] = r->rank ? 0 : (char)(i % 251); }
    ranks_from_root(r, text.data(), text.size());
    for (size_t i = 0; i < text.size(); i++) { need(text[i] == (char)(i % 251), "what rank 0 gave", i); }
    ranks_close(r);
    return 0;
}
