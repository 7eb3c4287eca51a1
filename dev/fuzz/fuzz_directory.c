// fuzz_directory.c: a checkpoint as a directory, made of several files in one input (structure.h): config.json, one
// model file or several under an index, optimizer.safetensors, trainer.json, a rank file, manifest.json. It is read as
// the programs do: found and verified as --resume does, verified as --init-from and infer_mta do, the model, the
// optimizer, the trainer's state, the tokenizer. What verifies has the bytes that its manifest says.
#include "structure.h"
#include "mta/run.h"

static const char folder[] = MEMORY_FOLDER "/step-00000003";

static bool sum_store(void* ctx, int group, int tensor, const float* data, Error* e) {
    const TensorList* list = (const TensorList*)ctx;
    volatile float sink = 0;  // reads what the list promises, and the compiler cannot skip it
    (void)group;
    (void)e;
    for (size_t i = 0; i < list->specs[tensor].numel; i++) { sink = data[i]; }
    (void)sink;
    return true;
}

static void read_model(const Config* c) {
    static const char* const plain[] = {""};
    static const char* const optimizer[] = {"m.", "v.", "master."};
    char path[PATH_SIZE];
    TensorList list;
    Text absent = {NULL, 0, 0};
    Error e = {{0}};
    if (c->num_hidden_layers > 8 || c->vocab_size > 1 << 16 || c->hidden_size > 1 << 10) { return; }
    tensor_list(&list, c);
    bool good = checkpoint_read_tensors(folder, &list, plain, 1, true, &absent, sum_store, &list, &e);
    if (good == (e.text[0] != 0)) { abort(); }
    path_join(path, sizeof path, folder, "optimizer.safetensors");
    bool master = false;
    e.text[0] = 0;
    good = safetensors_holds(path, "master.model.embed_tokens.weight", &master, &e) &&
           checkpoint_read_tensors(path, &list, optimizer, master ? 3 : 2, false, NULL, sum_store, &list, &e);
    if (good == (e.text[0] != 0)) { abort(); }
    text_free(&absent);
    tensor_list_free(&list);
}

// Opens a shard of 64 tokens, whose file is then removed: it stays mapped.
static void open_data(Loader* l) {
    const uint32_t tokens[64] = {1, 2, 3};
    char dir[64], path[96];
    Error e = {{0}};
    snprintf(dir, sizeof dir, "%s/fuzz_run_XXXXXX", dir_exists("/dev/shm") ? "/dev/shm" : "/tmp");
    if (!mkdtemp(dir)) { abort(); }
    snprintf(path, sizeof path, "%s/x_train_000000.bin", dir);
    if (!shard_write(path, tokens, 64, 2, 259, NULL, &e) || !loader_open(l, path, 8, 259, 5, &e)) { abort(); }
    unlink(path);
    rmdir(dir);
}

static void read_state(void) {
    static Run run;
    static TrainOptions options;
    static const Trainer trainer;
    Error e = {{0}};
    if (!run.train.n_sources) {
        open_data(&run.train);
        options = options_default();
        if (!freopen("/dev/null", "w", stdout)) { abort(); }  // what differs from the run is said, each time
    }
    run.options = &options;
    run.trainer = &trainer;
    run.schedule.kind = options.schedule;
    run.batch_size = 2;
    run.tokens_per_step = 16;
    run.saved_step = 3;
    snprintf(run.resume_dir, sizeof run.resume_dir, "%s", folder);
    bool good = run_read_state(&run, &e);
    text_free(&run.changes);
    if (good == (e.text[0] != 0)) { abort(); }
    if (good && (run.step != 3 || run.train.position != run.train.sources[0].drawn)) { abort(); }
}

static void read_tokenizer(const Config* c) {
    char path[PATH_SIZE];
    Error e = {{0}};
    if (!c->tokenizer[0]) { return; }
    path_join(path, sizeof path, folder, c->tokenizer);
    Tokenizer* t = tokenizer_open(file_exists(path) ? path : c->tokenizer,
                                  c->tokenizer_pattern[0] ? c->tokenizer_pattern : NULL, &e);
    if (!t != (e.text[0] != 0)) { abort(); }
    if (t) { tokenizer_free(t); }
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    Parts parts;
    char path[PATH_SIZE];
    Error e = {{0}};
    Config c;
    input_clock()->input++;
    parts_read(&parts, data, n);
    parts_lay_out(&parts, folder);
    bool resumable = checkpoint_verify(folder, true, &e);
    if (resumable == (e.text[0] != 0)) { abort(); }
    if ((checkpoint_newest(MEMORY_FOLDER, path, NULL) == 3) != resumable) { abort(); }
    e.text[0] = 0;
    bool usable = checkpoint_verify_model(folder, &e);
    if (usable == (e.text[0] != 0) || (resumable && !usable)) { abort(); }
    path_join(path, sizeof path, folder, "config.json");
    e.text[0] = 0;
    if (config_read(&c, path, true, &e)) {
        read_model(&c);
        read_tokenizer(&c);
    }
    read_state();
    memory_clear();
    parts_free(&parts);
    return 0;
}

// manifest.json as a commit would write it for the other files.
static void write_manifest(Parts* p) {
    Part* manifest = parts_find(p, "manifest.json");
    if (!manifest) { return; }
    Text* t = &manifest->content;
    t->n = 0;
    text_printf(t, "{\"step\": 3, \"files\": {");
    for (int i = 0, first = 1; i < p->n; i++) {
        const Text* content = &p->part[i].content;
        if (&p->part[i] == manifest) { continue; }
        text_printf(t, first ? "" : ", ");
        text_json_string(t, p->part[i].name, strlen(p->part[i].name));
        text_printf(t, ": {\"bytes\": %zu, \"crc32\": %u}", content->n, crc32_update(0, content->text, content->n));
        first = 0;
    }
    text_printf(t, "}}");
}

static void mutate_part(Parts* p, Part* part, Dice* dice) {
    static const char* const words[] = {"step",
                                        "files",
                                        "bytes",
                                        "crc32",
                                        "manifest.json",
                                        "config.json",
                                        "model.safetensors",
                                        "optimizer.safetensors",
                                        "trainer.json",
                                        "weight_map",
                                        "metadata",
                                        "total_size",
                                        "model-00001-of-00002.safetensors",
                                        "model-00002-of-00002.safetensors",
                                        "model.norm.weight",
                                        "format",
                                        "tokens_seen",
                                        "skipped",
                                        "batch_size",
                                        "tokens_per_step",
                                        "timed",
                                        "random",
                                        "seed",
                                        "loader",
                                        "sources",
                                        "name",
                                        "weight",
                                        "windows",
                                        "drawn",
                                        "mix",
                                        "token",
                                        "document",
                                        "seq_len",
                                        "..",
                                        "a/b",
                                        ".",
                                        ""};
    const char* dot = strrchr(part->name, '.');
    int n;
    const char* const* known = config_words(&n);
    if (!roll(dice, 24)) {  // whole files
        const Part* other = &p->part[roll(dice, (size_t)p->n)];
        Text copy = {NULL, 0, 0};
        switch (roll(dice, 4)) {
            case 0: part->content.n = roll(dice, part->content.n + 1); return;
            case 1: snprintf(part->name, sizeof part->name, "%s", words[4 + roll(dice, 9)]); return;
            case 2: snprintf(part->name, sizeof part->name, "gone-%u", roll(dice, 3)); return;
            default:
                text_append(&copy, other->content.text ? other->content.text : "", other->content.n);
                text_free(&part->content);
                part->content = copy;
                return;
        }
    }
    if (dot && !strcmp(dot, ".safetensors")) {
        mutate_safetensors(&part->content, dice);
    } else if (!strcmp(part->name, "config.json")) {
        mutate_json(&part->content, dice, known, n);
    } else if (dot && !strcmp(dot, ".json")) {
        mutate_json(&part->content, dice, words, sizeof words / sizeof words[0]);
    } else {
        mutate_bytes(&part->content, part->content.n + 16);
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t n, size_t max, unsigned int seed) {
    Dice dice = {seed};
    Parts p;
    Text t = {NULL, 0, 0};
    if (!roll(&dice, 30)) { return LLVMFuzzerMutate(data, n, max); }
    parts_read(&p, data, n);
    if (!p.n) { return LLVMFuzzerMutate(data, n, max); }
    for (uint32_t k = 1 + roll(&dice, 3); k > 0; k--) { mutate_part(&p, &p.part[roll(&dice, (size_t)p.n)], &dice); }
    if (roll(&dice, 2)) { write_manifest(&p); }
    parts_write(&p, &t);
    parts_free(&p);
    return mutated(&t, data, n, max);
}
