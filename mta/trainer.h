// mta/trainer.h: one table of functions behind which each trainer is compiled, so that one test binary can hold several
// (train_mta.c in fp32, train_mta.cu on a GPU or on the emulator) and drive them alike.
//
// All data crosses this border as fp32, whatever the trainer stores.
#ifndef MTA_TRAINER_H
#define MTA_TRAINER_H

#include "config.h"

typedef enum { STATE_WEIGHT, STATE_GRADIENT, STATE_M, STATE_V } StateKind;

typedef struct { double lr, beta1, beta2, eps, weight_decay, grad_clip; } AdamW;

typedef struct {
    const char* name;         // "cpu fp32", "cuda bf16", ...
    bool exact;               // fp32 arithmetic and storage: the CPU's tolerances hold
    // A model of at most B sequences of at most T tokens, weights zero. chunk: queries of an attention chunk, 0 = the trainer's choice.
    // NULL and a message if it cannot be had.
    void* (*create)(const Config* config, int B, int T, int chunk, Error* e);
    void (*destroy)(void* model);
    void (*initialise)(void* model, uint64_t seed);
    const TensorList* (*tensors)(const void* model);
    // Tensor number i of the list, in or out, `numel` floats.
    void (*set)(void* model, StateKind kind, int tensor, const float* data);
    void (*get)(const void* model, StateKind kind, int tensor, float* data);
    // Mean loss of the counted targets (target < 0 is not counted; none counted: 0); logits (B,T,V) are written unless NULL.
    double (*forward)(void* model, const int32_t* tokens, const int32_t* targets, int B, int T, float* logits);
    // The same loss; gradients of it are added to the gradient state.
    double (*forward_backward)(void* model, const int32_t* tokens, const int32_t* targets, int B, int T);
    void (*zero_gradients)(void* model);
    // Clips to the global norm, applies AdamW as step `step` (1 = first). Returns the norm before clipping; not finite: nothing changed.
    double (*update)(void* model, const AdamW* hyper, long step);
    int (*main)(int argc, char** argv);  // the whole program; NULL where it is left out
} Trainer;

#ifdef __cplusplus
extern "C" {
#endif
const Trainer* trainer_cpu(void);   // train_mta.c, fp32
const Trainer* trainer_cuda(void);  // train_mta.cu
#ifdef __cplusplus
}
#endif

#endif
