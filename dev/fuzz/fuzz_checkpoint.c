// fuzz_checkpoint.c: a whole checkpoint from bytes: two bytes with the length of config.json, config.json,
// model.safetensors. The header is read, every tensor converted, and where the configuration holds, the tensors are
// matched against the model's list and stored, as the programs do it.
#include "structure.h"
#include "mta/checkpoint.h"

static bool sum_store(void* ctx, int group, int tensor, const float* data, Error* e) {
    Config* c = (Config*)ctx;
    TensorList list;
    (void)group;
    (void)e;
    tensor_list(&list, c);
    volatile float sink = 0;  // reads what the list promises, and the compiler cannot skip it
    for (size_t i = 0; i < list.specs[tensor].numel; i++) { sink = data[i]; }
    (void)sink;
    tensor_list_free(&list);
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    input_clock()->input++;
    if (n < 2) { return 0; }
    size_t config_size = data[0] | (size_t)data[1] << 8;
    if (config_size > n - 2) { return 0; }
    Error e = {{0}};
    Config config;
    Json* j = json_parse((const char*)data + 2, config_size, &e);
    bool good = j && config_from_json(&config, j, false, &e);
    json_free(j);
    size_t size = n - 2 - config_size;
    uint8_t* image = (uint8_t*)malloc(size + 1);  // exactly as large as the file would be: one byte beyond is caught
    memcpy(image, data + 2 + config_size, size);
    image = (uint8_t*)realloc(image, size ? size : 1);
    SafeTensors s = {0};
    if (safetensors_add(&s, image, size, "fuzz", &e)) {
        for (int i = 0; i < s.n; i++) {
            float* f = (float*)malloc(s.tensors[i].numel * sizeof *f + 1);
            if (f) { st_to_f32(&s.tensors[i], f, &e); }
            free(f);
        }
        TensorList list;
        const char* const prefix[1] = {""};
        Text absent = {0};
        if (good && config.num_hidden_layers <= 8) {
            tensor_list(&list, &config);
            const StTensor** found = checkpoint_match(&s, "fuzz", &list, prefix, 1, true, &absent, &e);
            if (found) { checkpoint_store_all(found, &list, 1, sum_store, &config, &e); }
            free(found);
            tensor_list_free(&list);
        }
        text_free(&absent);
    }
    safetensors_close(&s);
    free(image);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t n, size_t max, unsigned int seed) {
    Dice dice = {seed};
    Text config = {NULL, 0, 0}, model = {NULL, 0, 0}, t = {NULL, 0, 0};
    int words;
    size_t size = n < 2 ? 0 : data[0] | (size_t)data[1] << 8;
    if (n < 2 || size > n - 2 || !roll(&dice, 16)) { return LLVMFuzzerMutate(data, n, max); }
    text_append(&config, (const char*)data + 2, size);
    text_append(&model, (const char*)data + 2 + size, n - 2 - size);
    const char* const* known = config_words(&words);
    if (!roll(&dice, 3)) {
        mutate_json(&config, &dice, known, words);
    } else {
        mutate_safetensors(&model, &dice);
    }
    if (config.n < 65536) {
        const char length[2] = {(char)(config.n & 255), (char)(config.n >> 8)};
        text_append(&t, length, 2);
        text_append(&t, config.text, config.n);
        text_append(&t, model.text ? model.text : "", model.n);
    }
    text_free(&config);
    text_free(&model);
    return mutated(&t, data, n, max);
}
