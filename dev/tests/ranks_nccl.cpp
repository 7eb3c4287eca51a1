// ranks_nccl.cpp: one rank of a test of mta/ranks_nccl.h over dev/cuda_cpu/nccl.h, without a model: what is computed on
// one stream and sent on another, sums in the tree's order, bytes of the host's memory. test_ranks_cuda.py builds it
// with faults planted in the headers, and starts a few of it. Ends with status 1 and a line where something is not what
// it should be. NODE=N: as if so many ranks had a host of their own. PLANTED=NAME: with this fault.
#define RANKS_ROOM (1 << 18)
#include <nccl.h>
#include <vector>

// What the faults ask that test_ranks_cuda.py plants into the headers below.
static bool planted(const char* name) {
    const char* wanted = getenv("PLANTED");
    return wanted && !strcmp(wanted, name);
}
#include "mta/ranks_nccl.h"

enum { N = 13 * RANKS_BLOCK + 192, THREADS = 256 };

// What the ranks tell each other of their host, in place of libc's.
extern "C" int gethostname(char* name, size_t n) noexcept {
    const char *node = getenv("NODE"), *rank = getenv("RANK");
    snprintf(name, n, "host%d", node && rank ? atoi(rank) / atoi(node) : 0);
    return 0;
}

// A value that rounds differently in another order of sums.
static __host__ __device__ float value_of(int rank, int round, size_t i) {
    unsigned x = (unsigned)i * 2654435761u + (unsigned)rank * 40503u + (unsigned)round * 977u;
    x ^= x >> 15;
    return ((float)(x % 20011) - 10005.0f) / (float)(1 << x % 11);
}
static __global__ void fill_kernel(float* x, size_t begin, size_t end, int rank, int round) {
    size_t i = begin + (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < end) { x[i] = value_of(rank, round, i); }
}
static __global__ void double_kernel(float* x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { x[i] *= 2; }
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

// The gradients of all buckets, last first, each computed when those before it are on their way; then their sums.
static void reduce(Ranks* r, float* data, const RanksSum* sum, cudaStream_t stream, int round) {
    uint64_t reduced = r->bytes_reduced, early = r->bytes_early, sent = r->bytes_sent;
    for (size_t end = N; end > 0;) {
        Span bucket = ranks_bucket_at(r->size, N, end - 1);
        LAUNCH(fill_kernel, (unsigned)((end - bucket.begin + THREADS - 1) / THREADS), THREADS, 0, stream, data,
               bucket.begin, bucket.end, r->rank, round);
        ranks_reduce(r, data, bucket, sum, bucket.begin > 0);
        end = bucket.begin;
    }
    ranks_finish(r);
    reduced = r->bytes_reduced - reduced, early = r->bytes_early - early, sent = r->bytes_sent - sent;
    need(sent == reduced, "what is counted as gradients", (size_t)reduced);

    // All ranks together have sent each element to all others but one, in whichever stages, or in equal parts; early
    // what lies behind the first bucket.
    uint64_t others = (uint64_t)(r->size - 1) * sizeof(float), behind = N - ranks_bucket_at(r->size, N, 0).end,
             padding = sum->add ? 0 : ranks_padded(r->size, N) - N;
    int64_t all = ranks_total(r, (int64_t)reduced), ahead = ranks_total(r, (int64_t)early);
    need(all == (int64_t)((N + padding) * others), "the bytes of gradients", (size_t)all);
    need(ahead == (int64_t)((behind + padding) * others), "the bytes that were early", (size_t)ahead);
}

int main() {
    Ranks* r = ranks_of_nccl();
    cudaStream_t stream;
    float *data, *room;
    size_t all = ranks_padded(r->size, N);
    std::vector<float> got(all);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaMalloc(&data, all * sizeof(float));
    cudaMalloc(&room, ranks_room(r->size, N) * sizeof(float));
    cudaMemset(data, 0, all * sizeof(float));
    r->work = stream;
    RanksSum sum = {add, r->stream, sizeof(float), (char*)room};
    const char* node = getenv("NODE");
    need(r->node == (node ? atoi(node) : r->size & (r->size - 1) ? 1 : r->size), "ranks of a node", (size_t)r->node);

    // Who has what: each element one rank, side by side there.
    std::vector<size_t> had((size_t)r->size);
    for (size_t i = 0; i < N; i++) {
        Stretch s = ranks_stretch(r, N, i, N);
        Span own = ranks_elements(r, ranks_bucket_at(r->size, N, i));
        need(s.local == had[(size_t)s.rank]++, "what is side by side at a rank", i);
        need((s.rank == r->rank) == (own.begin <= i && i < own.end), "whose an element is", i);
    }
    need(had[0] == ranks_most_elements(r->size, N), "what the first rank has", had[0]);

    // Sums, twice: what the second round sends must not be the first one's. Then the own parts, doubled, to all.
    for (int round = 0; round < 2; round++) {
        reduce(r, data, &sum, stream, round);
        cudaMemcpyAsync(got.data(), data, all * sizeof(float), cudaMemcpyDeviceToHost, stream);
        cudaStreamSynchronize(stream);
        for (size_t i = 0; i < N; i++) {
            bool own = ranks_stretch(r, N, i, N).rank == r->rank;
            need(!own || got[i] == tree_value(0, r->size, round, i), "the tree's sums", i);
        }
        LAUNCH(double_kernel, (unsigned)((N + THREADS - 1) / THREADS), THREADS, 0, stream, data, (size_t)N);
        ranks_gather_arena(r, data, N, sizeof(float));
        cudaMemcpyAsync(got.data(), data, all * sizeof(float), cudaMemcpyDeviceToHost, stream);
        cudaStreamSynchronize(stream);
        for (size_t i = 0; i < N; i++) { need(got[i] == 2 * tree_value(0, r->size, round, i), "parts of all", i); }
    }

    // The same sums in the library's own order.
    RanksSum other = sum;
    other.add = NULL;
    reduce(r, data, &other, stream, 2);
    cudaMemcpyAsync(got.data(), data, all * sizeof(float), cudaMemcpyDeviceToHost, stream);
    cudaStreamSynchronize(stream);
    for (size_t i = 0; i < N; i++) {
        bool own = ranks_stretch(r, N, i, N).rank == r->rank;
        need(!own || fabsf(got[i] - tree_value(0, r->size, 2, i)) < 0.02f, "NCCL's sums", i);
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
    size_t staged = ((NcclState*)r->state)->stage_bytes;  // one piece, however many it goes to
    need(staged <= RANKS_PIECE + 256, "the stage, in bytes,", staged);
    ranks_close(r);
    return 0;
}
