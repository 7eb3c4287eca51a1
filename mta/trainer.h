// mta/trainer.h: one table of functions behind which each trainer is compiled: mta/train.h trains by it, and one test
// binary holds several (train_mta.c in fp32, train_mta.cu on a GPU or on the emulator) and drives them alike.
//
// All data crosses this border as fp32 in the host's memory, whatever the trainer stores and wherever.
#ifndef MTA_TRAINER_H
#define MTA_TRAINER_H

#include "config.h"
#include "ranks.h"

// What there is of every tensor. STATE_WEIGHT is what the products read, in the precision of the storage; STATE_MASTER
// what AdamW updates, in fp32: the same thing where the storage is fp32.
typedef enum { STATE_WEIGHT, STATE_GRADIENT, STATE_M, STATE_V, STATE_MASTER } StateKind;

typedef struct {
    double lr, beta1, beta2, eps, weight_decay, grad_clip;
} AdamW;

// The losses of a batch (B,T); they stay until the model's next call.
typedef struct {
    double sum;                  // of the counted targets' losses, in nats
    const float* losses;         // of each target, 0 where it is not counted
    const unsigned char* wrong;  // 1 where greedy decoding takes another id than the counted target
} Losses;

// The data of one optimizer step: tokens and targets (windows,T), of which B windows are computed at once.
typedef struct {
    const int32_t *tokens, *targets;
    int windows, B, T;
    int64_t counted;  // targets >= 0
    int64_t number;   // of its update, 1 = first: those that were skipped are in no moment, and not counted
    AdamW hyper;
    int shards;      // the windows are cut into as many runs (mta/ranks.h)
    Span own;        // this process computes these shards
    double* losses;  // (shards) summed losses of each, filled by the trainer; NULL: one shard, one process
    bool whole;      // a signal waits until the step is done
} Step;

typedef struct {
    double loss;       // mean of the counted targets'
    double grad_norm;  // before clipping
    bool complete;     // false: a signal came in between, no weight was changed
} StepResult;

enum { CHUNK_CUDNN = -1 };

typedef struct {
    const char* name;  // "cpu fp32", "cuda bf16", ...
    bool exact;        // arithmetic and storage in fp32: the CPU's tolerances hold; else products read bf16
    bool rounded;      // the weights are stored in bf16, and master weights in fp32 beside them
    // A model of at most B sequences of at most T tokens, every state zero; `forward` also takes more of them that are
    // shorter, up to B x T tokens together. chunk: queries of an attention chunk, 0 = the trainer's choice,
    // CHUNK_CUDNN = that and cuDNN's attention where it serves (of train_mta.cu, where it is built in). Without
    // `training` it has weights alone, set as STATE_MASTER: no gradients, no optimizer, no place for what a backward
    // pass would read. NULL and a message if it cannot be had.
    void* (*create)(const Config* config, int B, int T, int chunk, bool training, Error* e);
    void (*destroy)(void* model);
    const TensorList* (*tensors)(const void* model);
    // Tensor number i of the list, whole. STATE_MASTER rounds it into the weights; STATE_WEIGHT sets both to the
    // rounded values.
    void (*set)(void* model, StateKind kind, int tensor, const float* data);
    // The n values of tensor number i from value `from` on.
    void (*get)(const void* model, StateKind kind, int tensor, size_t from, size_t n, float* data);
    // The losses of a batch; the logits (B,T,V) too unless NULL.
    Losses (*forward)(void* model, const int32_t* tokens, const int32_t* targets, int B, int T, float* logits);
    // The logits (V) that follow n tokens.
    void (*last_logits)(void* model, const int32_t* tokens, int n, float* logits);
    // The sum of the losses; dloss times its gradients is added to the gradient state. T as create was told.
    double (*forward_backward)(void* model, const int32_t* tokens, const int32_t* targets, int B, int T, double dloss);
    // Clips to the global norm, applies AdamW as update `step` (1 = first). Returns the norm before clipping; not
    // finite: nothing changed.
    double (*update)(void* model, const AdamW* hyper, long step);
    // All of it: gradients of the step's mean loss, and the update unless loss or norm is not finite.
    StepResult (*train_step)(void* model, const Step* step);
    // Makes the model one of a run of so many shards on these ranks: it then sums gradients as they do, and has m and v
    // of its own elements only. NULL: this trainer computes on one process, with one shard.
    void (*share)(void* model, Ranks* ranks, int shards);
} Trainer;

#ifdef __cplusplus
extern "C" {
#endif
const Trainer* trainer_cpu(void);       // train_mta.c, fp32
const Trainer* trainer_cpu_bf16(void);  // the same with products of operands rounded to bf16
const Trainer* trainer_cuda(void);      // train_mta.cu
#ifdef __cplusplus
}
#endif

#endif
