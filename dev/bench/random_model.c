// random_model.c: writes a checkpoint of random weights of a preset, for measurements that need only its size.
//   gcc -std=gnu11 -O2 -I. dev/bench/random_model.c -lm -o random_model && ./random_model 880m mta BF16 DIR
#include "mta/config.h"
#include "mta/random.h"
#include "mta/safetensors.h"

int main(int argc, char** argv) {
    Error e = {{0}};
    Config c;
    if (argc != 5) { die("usage: random_model MODEL ATTENTION F32|BF16|F16 DIR"); }
    const Preset* preset = preset_find(argv[1]);
    if (!preset) { die("model %s: wanted one of %s", argv[1], MODEL_NAMES); }
    DType dtype = !strcmp(argv[3], "F32") ? DT_F32 : !strcmp(argv[3], "F16") ? DT_F16 : DT_BF16;
    config_from_preset(&c, preset);
    if (!config_set_attention(&c, argv[2], !strcmp(argv[1], "toy"), &e) || !make_dirs(argv[4], &e)) {
        die("%s", e.text);
    }
    TensorList list;
    tensor_list(&list, &c);
    StEntry* entries = alloc_or_die((size_t)list.n, sizeof *entries, "entries");
    size_t largest = 0;
    for (int i = 0; i < list.n; i++) {
        entries[i] = (StEntry){list.specs[i].name,
                               dtype,
                               list.specs[i].ndim,
                               {list.specs[i].shape[0], list.specs[i].shape[1], list.specs[i].shape[2]}};
        if (list.specs[i].numel > largest) { largest = list.specs[i].numel; }
    }
    Text json = {0};
    config_to_json(&c, dtype == DT_F32 ? "float32" : dtype == DT_F16 ? "float16" : "bfloat16", &json);
    char path[PATH_SIZE];
    path_join(path, sizeof path, argv[4], "config.json");
    if (!write_file_synced(path, json.text, json.n, &e)) { die("%s", e.text); }
    path_join(path, sizeof path, argv[4], "model.safetensors");
    StWriter w;
    if (!st_writer_open(&w, path, entries, list.n, NULL, 0, &e)) { die("%s", e.text); }
    float* f = alloc_or_die(largest, sizeof *f, "a tensor");
    uint64_t state = 1;
    for (int i = 0; i < list.n; i++) {
        const TensorSpec* s = &list.specs[i];
        float scale = s->ndim == 2 ? (float)(sqrt(3.0) / sqrt((double)s->shape[1])) : 0.05f;
        float mean = tensor_is_norm(s) ? 1.0f : 0.0f;
        for (size_t k = 0; k < s->numel; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            f[k] = mean + scale * ((float)(state >> 40) * 0x1p-23f - 1.0f);
        }
        if (dtype != DT_F32) {  // in place: a half is never ahead of its float
            for (size_t k = 0; k < s->numel; k++) {
                ((uint16_t*)(void*)f)[k] = dtype == DT_F16 ? f32_to_f16(f[k]) : f32_to_bf16(f[k]);
            }
        }
        if (!st_writer_put(&w, f, s->numel * dtype_size(dtype), &e)) { die("%s", e.text); }
    }
    if (!st_writer_close(&w, NULL, NULL, &e)) { die("%s", e.text); }
    printf("%s: %s %s, %zu parameters\n", argv[4], argv[1], argv[2], list.parameters);
    return 0;
}
