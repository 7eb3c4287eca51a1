// mta/plan.h: what a run will be, printed before anything is allocated: the model and what its attention adds, memory
// against what the machine has, the step, the length, checkpoints against the disk, the time.
#ifndef MTA_PLAN_H
#define MTA_PLAN_H

#include "run.h"

// Floating-point operations of training on one token, as MFU counts them (MODEL.md, What a step costs): 6 per parameter
// that is multiplied (the classifier counts, tied or not; looking up an embedding does not) and three times the causal
// half of the attention products; no convolution, no mixing.
static inline double model_flops_per_token(const Config* c, int T) {
    double C = c->hidden_size, KV = (double)c->num_key_value_heads * config_head_size(c), FF = c->intermediate_size;
    double parameters = c->num_hidden_layers * (2 * C * C + 2 * C * KV + 3 * C * FF) + C * c->vocab_size;
    return 6 * parameters + 3.0 * c->num_hidden_layers * 2 * C * T;
}

// 876563136 -> "876,563,136"
static inline const char* format_grouped(uint64_t x, char* out, size_t n) {
    char digits[32];
    size_t length = (size_t)snprintf(digits, sizeof digits, "%llu", (unsigned long long)x), used = 0;
    for (size_t i = 0; i < length && used + 2 < n; i++) {
        if (i && (length - i) % 3 == 0) { out[used++] = ','; }
        out[used++] = digits[i];
    }
    out[used] = 0;
    return out;
}

typedef struct {
    const char* name;
    size_t bytes;
} PlanRow;

// What a trainer says of its machine.
typedef struct {
    const char* device;       // its name
    double flops_per_second;  // its peak in matrix products, 0 = not known
    double available;         // bytes of memory that a model may take, 0 = not known
} PlanMachine;

// The kind of attention whose operations a model has, whatever its layers with convolutions and their kernels' sizes;
// with " with changed fields" where it is none of --attention's.
static inline void plan_attention(const Run* r, char* out, size_t n) {
    const Config* c = &r->config;
    const Preset* preset = r->options->model ? preset_find(r->options->model) : NULL;
    const char* given = r->options->attention                 ? r->options->attention
                        : c->attention_type == ATTENTION_DIFF ? "diff"
                                                              : "mta";
    for (int i = 0; i < 2 * ATTENTION_KIND_COUNT; i++) {
        bool toy = i >= ATTENTION_KIND_COUNT;  // which no other preset is
        const char* name = ATTENTION_KINDS[i % ATTENTION_KIND_COUNT].name;
        Config kind = *c;
        Error e = {{0}};
        if (toy && preset && strcmp(preset->name, "toy") != 0) { break; }
        if (!config_set_attention(&kind, name, toy, &e)) { continue; }
        kind.kq_conv_query_size = c->kq_conv_query_size;
        kind.kq_conv_key_size = c->kq_conv_key_size;
        if (config_same_model(c, &kind, &e)) {
            snprintf(out, n, "%s", name);
            return;
        }
    }
    snprintf(out, n, "%s with changed fields", given);
}

static inline void plan_print_model(const Run* r, const TensorList* list) {
    const Config* c = &r->config;
    char grouped[32], attention[64];
    size_t extra = 0;  // parameters that a plain Transformer of these sizes does not have
    for (int i = 0; i < list->n; i++) { extra += tensor_is_mta(&list->specs[i]) ? list->specs[i].numel : 0; }
    plan_attention(r, attention, sizeof attention);
    printf("model       %s, attention %s: %d layers, %d channels, %d heads of %d, vocabulary %d\n",
           r->options->model ? r->options->model : "from the checkpoint", attention, c->num_hidden_layers,
           c->hidden_size, c->num_attention_heads, config_head_size(c), c->vocab_size);
    printf("parameters  %zu (%s)\n", list->parameters, format_grouped(list->parameters, grouped, sizeof grouped));
    if (extra) {
        printf("of them     %s that a plain Transformer of this size lacks: %.4f%%\n",
               format_grouped(extra, grouped, sizeof grouped),
               100 * (double)extra / (double)(list->parameters - extra));
    }
}

// Returns the bytes of all rows.
static inline double plan_print_memory(const PlanMachine* machine, const PlanRow* rows, int n) {
    size_t total = 0;
    for (int i = 0; i < n; i++) {
        if (!rows[i].bytes) { continue; }  // gradients and optimizer of an evaluation
        printf("%-11s %-22s %10.1f MiB\n", i ? "" : "memory", rows[i].name, (double)rows[i].bytes / 1048576);
        total += rows[i].bytes;
    }
    printf("%-11s %-22s %10.1f MiB", "", "total", (double)total / 1048576);
    if (machine->available > 0) {
        printf(", of %.1f available: it %s", machine->available / 1048576,
               (double)total <= machine->available ? "fits" : "does not fit");
    }
    printf("\n");
    return (double)total;
}

// The file system of a path, or of the folder above it that is there.
static inline bool plan_free_space(const char* path, double* bytes) {
    char dir[PATH_SIZE];
    struct statvfs fs;
    snprintf(dir, sizeof dir, "%s", path);
    while (!dir_exists(dir)) {
        char* slash = strrchr(dir, '/');
        if (slash == dir) { slash++; }
        snprintf(slash ? slash : dir, 2, "%s", slash ? "" : ".");
    }
    bool known = !statvfs(dir, &fs) && fs.f_blocks > 0;
    if (known) { *bytes = (double)fs.f_bavail * (double)fs.f_frsize; }
    return known;
}

// Of a run at its fullest: the checkpoints that --keep keeps, that of --save-minutes, and the one being written, which
// may be the last of those.
static inline void plan_print_checkpoints(const Run* r, const TensorList* list) {
    const TrainOptions* o = r->options;
    double each = run_checkpoint_bytes(r, list), room = 0;
    int64_t timed = o->save_minutes > 0, every = o->save_every,
            saves = every ? r->steps / every + !!(r->steps % every) : 1;
    int64_t before = saves > 0 ? saves - 1 : 0, kept = (r->keep && r->keep < before ? r->keep : before) + timed + 1;
    printf("checkpoints %.1f MiB each, at most %lld at a time: %.1f MiB", each / 1048576, (long long)kept,
           each * (double)kept / 1048576);
    if (o->out && plan_free_space(o->out, &room)) {
        printf(", of %.1f free at %s%s", room / 1048576, o->out,
               each * (double)kept <= room ? "" : ": not enough for all of them");
    }
    printf("\n");
}

// Where the peak is not known the time is that of this GPU, which the line names.
static const double PLAN_H100 = 989e12, PLAN_SHARE = 0.4;  // operations a second, and how much of them it reaches
static inline void plan_print_time(const Run* r, const PlanMachine* machine) {
    char time[32];
    const char* rest = r->done_steps ? " for the rest" : "";
    double operations = (run_tokens(r) - (double)r->done_tokens) * r->flops_per_token / run_ranks(r);
    if (machine->flops_per_second > 0) {
        printf("time        about %s%s at half of this machine's matrix products (%s, %.0f GFLOP/s)%s\n",
               format_duration(operations / machine->flops_per_second * 2, time, sizeof time), rest, machine->device,
               machine->flops_per_second * 1e-9, run_ranks(r) > 1 ? " on each rank, without what they send" : "");
    } else {
        printf(
            "time        about %s%s on one H100 or H200 if it reaches %.0f%% of its %.0f TFLOP/s in bf16: an estimate, "
            "nothing was measured (%s)\n",
            format_duration(operations / (PLAN_SHARE * PLAN_H100), time, sizeof time), rest, 100 * PLAN_SHARE,
            PLAN_H100 * 1e-12, machine->device);
    }
}

// How fast so many GPUs would be, in % of as many that need not speak to each other: a prediction. Gradients go by
// NVLink inside a machine and then between machines, where each GPU has a NIC; weights by both at once, in NCCL's ring.
// What can hide under the backward pass are the buckets that are complete before its last layer, as long as it takes.
static inline void plan_print_prediction(const Run* r, const PlanMachine* machine, const TensorList* list, int node) {
    const double NVLINK = 360e9, NIC = 46e9, BACKWARD = 2.0 / 3;
    int ranks = run_ranks(r), last = tensor_at(list, r->config.num_hidden_layers > 1, TENSOR_INPUT_NORM);
    int inside = node & (node - 1) ? 1 : node;  // ranks that add up in a machine
    if (ranks <= node) { inside = ranks; }
    double R = ranks, N = inside, gradients = (double)list->numel * sizeof(float),
           weights = r->trainer->rounded ? gradients / 2 : gradients,
           rate = machine->flops_per_second > 0 ? machine->flops_per_second / 2 : PLAN_SHARE * PLAN_H100;
    double compute = (double)r->tokens_per_step / R * r->flops_per_token / rate,
           reduce = gradients * ((N - 1) / N / NVLINK + (1 / N - 1 / R) / NIC),
           gather = weights * (R - 1) / R / (ranks > node ? fmin(NVLINK, node * NIC) : NVLINK),
           share = ranks_share_behind(ranks, list->numel, list->specs[last].offset),
           hidden = fmin(share * reduce, BACKWARD * compute), all = compute + reduce + gather;
    printf("predicted   %.0f%% of the speed of %d GPUs that need not speak to each other, ",
           100 * compute / (all - hidden), ranks);
    printf("%.0f%% if nothing were sent under the backward pass\n", 100 * compute / all);
    printf("            (computing %.1f ms, gradients %.1f, of which %.1f can hide, weights %.1f; ", 1e3 * compute,
           1e3 * reduce, 1e3 * hidden, 1e3 * gather);
    printf("NVLink at %.0f GB/s, a NIC of %.0f for each GPU; nothing was measured)\n", NVLINK * 1e-9, NIC * 1e-9);
}

// What each rank does in a step, and what it sends: gradients to their owners, new weights to all. A machine of several
// ranks sends through its network what goes to ranks of others.
static inline void plan_print_ranks(const Run* r, const PlanMachine* machine, const TensorList* list) {
    const TrainOptions* o = r->options;
    int ranks = run_ranks(r), node = o->ranks_per_node ? o->ranks_per_node : o->n_ranks ? 1 : r->ranks->node;
    int each = r->shards / ranks, most = (r->windows + r->shards - 1) / r->shards;  // windows of a shard
    double R = ranks, gradients = (double)list->numel * sizeof(float) / 1048576,
           weights = r->trainer->rounded ? gradients / 2 : gradients, others = (R - 1) / R;
    // A machine sends once what it has added up inside, or what NCCL gathers in a ring; all else to each rank
    // elsewhere.
    double once = (R - node) / R, added = node & (node - 1) ? node * once : once,
           gathered = strncmp(r->trainer->name, "cuda", 4) ? node * once : once;
    if (r->shards == 1) { return; }
    printf("ranks       %d of %d shard%s each: %d micro-batches of at most %d sequences, %.0f tokens a step\n", ranks,
           each, each > 1 ? "s" : "", each * ((most + r->batch_size - 1) / r->batch_size),
           most < r->batch_size ? most : r->batch_size, (double)r->tokens_per_step / R);
    if (ranks == 1) { return; }
    printf("sent        %.1f MiB of gradients and %.1f of weights by each rank in a step", gradients * others,
           weights * others);
    if (node > 1) {
        bool alone = ranks <= node;
        printf("; %.1f and %.1f by each machine of %d through its network", alone ? 0 : gradients * added,
               alone ? 0 : weights * gathered, node);
    }
    printf("\n");
    if (!strncmp(r->trainer->name, "cuda", 4)) { plan_print_prediction(r, machine, list, node); }
}

// Prints the plan; returns the bytes of all rows.
static inline double train_print_plan(Run* r, const PlanMachine* machine, const PlanRow* rows, int n) {
    const TrainOptions* o = r->options;
    TensorList list;
    char grouped[32], count[32];
    tensor_list(&list, &r->config);
    r->flops_per_token = model_flops_per_token(&r->config, r->seq_len);
    r->flops_per_second = machine->flops_per_second;
    snprintf(r->device, sizeof r->device, "%.*s", (int)sizeof r->device - 1, machine->device);
    plan_print_model(r, &list);
    double total = plan_print_memory(machine, rows, n);
    if (!o->seq_len && r->seq_len < r->config.max_position_embeddings) {
        printf("positions   %d of the model's %d; --seq-len takes more\n", r->seq_len,
               r->config.max_position_embeddings);
    }
    if (options_evaluate(o)) {
        printf("at once     %d sequences of %d\n", r->batch_size, r->seq_len);
    } else {
        printf("step        %d sequences of %d = %s tokens, %d at once\n", r->windows, r->seq_len,
               format_grouped((uint64_t)r->tokens_per_step, grouped, sizeof grouped), r->batch_size);
        plan_print_ranks(r, machine, &list);
        if (o->warmup > r->steps) {
            printf("warmup      %lld steps, the run has %lld: the learning rate stays below --lr\n",
                   (long long)o->warmup, (long long)r->steps);
        }
        if (o->schedule_steps && o->schedule_steps <= o->warmup && strcmp(o->schedule, "constant") != 0) {
            printf("warmup      %lld steps, --schedule-steps %lld: after that the learning rate is --min-lr\n",
                   (long long)o->warmup, (long long)o->schedule_steps);
        }
        if (o->schedule_steps > o->warmup && o->schedule_steps < r->steps && strcmp(o->schedule, "constant") != 0) {
            printf("schedule    %lld steps, the run has %lld: after that the learning rate is --min-lr %g\n",
                   (long long)o->schedule_steps, (long long)r->steps, o->min_lr);
        }
        printf("run         %lld steps, %s tokens%s\n", (long long)r->steps,
               format_count(run_tokens(r), count, sizeof count), r->length);
        if (r->done_steps) {
            printf("done        %lld steps, %s tokens\n", (long long)r->done_steps,
                   format_count((double)r->done_tokens, count, sizeof count));
        }
        plan_print_checkpoints(r, &list);
        plan_print_time(r, machine);
    }
    if (o->dry_run) { put_out("", 0, true); }  // the plan is the result
    fflush(stdout);
    tensor_list_free(&list);
    return total;
}

#endif
