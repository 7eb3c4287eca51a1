// fuzz_config.c: config.json as every program reads it, strictly and under --assume-llama, and as
// generation_config.json. What is accepted passes config_check, has a list of tensors, and is the same model when it is
// written and read again.
#include "structure.h"
#define main infer_main
#include "infer_mta.c"
#undef main

// Built without OpenMP: what infer_mta.c asks of its library.
int omp_get_max_threads(void) { return 1; }
int omp_get_thread_num(void) { return 0; }
void omp_set_num_threads(int n) { (void)n; }

static void written_and_read_again(const Config* c) {
    Error e = {{0}};
    Text t = {NULL, 0, 0};
    Config again;
    if (!config_check(c, &e)) { abort(); }
    config_to_json(c, "float32", &t);
    Json* j = json_parse(t.text, t.n, &e);
    if (!j || !config_from_json(&again, j, &e) || !config_same_model(&again, c, &e)) {
        fprintf(stderr, "%s\n%s\n", t.text, e.text);
        abort();
    }
    json_free(j);
    text_free(&t);
    TensorList list;
    tensor_list(&list, c);
    if (list.parameters > list.numel || list.n < 3) { abort(); }
    tensor_list_free(&list);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    static int fd = -1;
    static char path[64];
    Config c;
    if (fd < 0) {
        fd = memfd_create("config", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (fd < 0 || ftruncate(fd, 0) || pwrite(fd, data, n, 0) != (ssize_t)n) { abort(); }
    for (int assume = 0; assume < 2; assume++) {
        Error e = {{0}};
        bool good = config_read_as(&c, path, assume, &e);
        if (good == (e.text[0] != 0) || strchr(e.text, '\n')) { abort(); }
        if (good) { written_and_read_again(&c); }
    }
    static Session session;
    Error e = {{0}};
    memset(&session, 0, sizeof session);
    session.options.quiet = true;
    if (ends_of_file(&session, path, &e) == (e.text[0] != 0)) { abort(); }
    free(session.ends);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t n, size_t max, unsigned int seed) {
    Dice dice = {seed};
    Text t = {NULL, 0, 0};
    int words;
    if (!roll(&dice, 8)) { return LLVMFuzzerMutate(data, n, max); }
    text_append(&t, (const char*)data, n);
    const char* const* known = config_words(&words);
    mutate_json(&t, &dice, known, words);
    return mutated(&t, data, n, max);
}
