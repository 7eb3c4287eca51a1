// fuzz_config.c: config.json as every program reads it, strictly and under --assume-llama, and as
// generation_config.json. What is accepted passes config_check, has a list of tensors, and is the same model when it is
// written and read again.
#include "structure.h"
// Static by this declaration, and unused: what only main reaches is not compiled, 13 s of a core.
#define main infer_main
static int infer_main(int argc, char** argv) __attribute__((unused));
#include "infer_mta.c"
#undef main

static void written_and_read_again(const Config* c) {
    Error e = {{0}};
    Text t = {NULL, 0, 0};
    Config again;
    if (!config_check(c, &e)) { abort(); }
    config_to_json(c, "float32", &t);
    Json* j = json_parse(t.text, t.n, &e);
    if (!j || !config_from_json(&again, j, false, &e) || !config_same_model(&again, c, &e)) {
        fprintf(stderr, "%s\n%s\n", t.text, e.text);
        abort();
    }
    json_free(j);
    text_free(&t);
    // a layer beyond the eighth brings nothing new; 512 of them take as long as 50 inputs
    Config few = *c;
    if (few.num_hidden_layers > 8 && input_clock()->input % 64) { few.num_hidden_layers = 8; }
    TensorList list;
    tensor_list(&list, &few);
    if (list.parameters > list.numel || list.n < 3) { abort(); }
    tensor_list_free(&list);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    static const char path[] = MEMORY_FOLDER "/config.json";
    static Config strict, assumed;
    Error e = {{0}}, why = {{0}};
    input_clock()->input++;
    memory_add(MEMORY_FOLDER, "config.json", (const char*)data, n);
    bool good = config_read(&strict, path, false, &e), again = config_read(&assumed, path, true, &why);
    if (good == (e.text[0] != 0) || again == (why.text[0] != 0) || strchr(e.text, '\n') || strchr(why.text, '\n')) {
        abort();
    }
    if (good) { written_and_read_again(&strict); }
    if (good && !again) { abort(); }  // --assume-llama refuses less, never more
    if (again && !(good && !memcmp(&strict, &assumed, sizeof strict))) { written_and_read_again(&assumed); }
    static Session session;
    e.text[0] = 0;
    memset(&session, 0, sizeof session);
    session.options.quiet = true;
    if (ends_of_file(&session, path, &e) == (e.text[0] != 0)) { abort(); }
    free(session.ends);
    memory_clear();
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
