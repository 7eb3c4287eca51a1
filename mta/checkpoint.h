// checkpoint.h: directories RUN/step-00001000/ that are never half there, and the reading of a model's tensors from any
// of them.
//
// A checkpoint is written into RUN/.step-00001000.partial, every file synced; manifest.json (size and CRC-32 of each
// file) comes last; then the directory is synced, renamed and its parent synced. So a directory without the dot is
// complete, and what the disk did to it later shows in the manifest. A crash leaves a partial behind, which the next
// checkpoint_begin removes. One program writes to a run at a time.
#ifndef MTA_CHECKPOINT_H
#define MTA_CHECKPOINT_H

#include "config.h"
#include "safetensors.h"
#include "tokenizer.h"

#include <dirent.h>
#include <sys/syscall.h>

enum { CHECKPOINT_MAX_FILES = 64, MANIFEST_MAX_BYTES = 1 << 20 };

// ---------------------------------------------------------------------------------------------------------------------
// Writing

typedef struct {
    bool open;
    long step;
    int n_files;
    char run[PATH_SIZE], partial[PATH_SIZE], final[PATH_SIZE];
    Text manifest;  // the members of "files" so far
} CheckpointWriter;

// Removes a directory of plain files (a checkpoint has no other), as far as that goes.
static inline void checkpoint_remove_dir(const char* path) {
    char file[PATH_SIZE];
    DIR* d = unlink(path) ? opendir(path) : NULL;  // a link to a directory goes alone: what it leads to is the user's
    for (struct dirent* entry = d ? readdir(d) : NULL; entry; entry = readdir(d)) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) { continue; }
        path_join(file, sizeof file, path, entry->d_name);
        unlink(file);
    }
    if (d) { closedir(d); }
    rmdir(path);
}

static inline void checkpoint_remove_partials(const char* run) {
    char path[PATH_SIZE];
    DIR* d = opendir(run);
    for (struct dirent* entry = d ? readdir(d) : NULL; entry; entry = readdir(d)) {
        size_t n = strlen(entry->d_name);
        if (n < 14 || strncmp(entry->d_name, ".step-", 6) || strcmp(entry->d_name + n - 8, ".partial")) { continue; }
        path_join(path, sizeof path, run, entry->d_name);
        checkpoint_remove_dir(path);
    }
    if (d) { closedir(d); }
}

// Gives up: the partial directory is removed. Harmless after a commit, an abort or a failure, each of which has done so
// already. Returns false, so that a step that fails can return it.
static inline bool checkpoint_abort(CheckpointWriter* w) {
    if (w->open) { checkpoint_remove_dir(w->partial); }
    w->open = false;
    text_free(&w->manifest);
    return false;
}

static inline void checkpoint_path(const char* run, long step, char* path) {
    char name[32];
    snprintf(name, sizeof name, "step-%08ld", step);
    path_join(path, PATH_SIZE, run, name);
}

// A run's directory, which may have a name so long that those of its checkpoints' files are still paths; asked before
// the first step too.
static inline bool checkpoint_run_fits(const char* run, Error* e) {
    enum { MOST = PATH_SIZE - 340 };  // /step-N of 18 digits, a file's name of 255 bytes
    size_t n = strlen(run);
    return n <= MOST || fail(e, "run directory name of %zu bytes is too long, wanted at most %d", n, MOST);
}

// Starts RUN/.step-N.partial; makes RUN if missing.
static inline bool checkpoint_begin(CheckpointWriter* w, const char* run, long step, Error* e) {
    char name[64];
    memset(w, 0, sizeof *w);
    assert(step >= 0);
    if (!checkpoint_run_fits(run, e) || !make_dirs(run, e)) { return false; }
    checkpoint_remove_partials(run);
    snprintf(w->run, sizeof w->run, "%s", run);
    checkpoint_path(run, step, w->final);
    snprintf(name, sizeof name, ".step-%08ld.partial", step);
    path_join(w->partial, sizeof w->partial, run, name);
    if (mkdir(w->partial, 0777)) { return fail(e, "%s: cannot create directory: %s", w->partial, strerror(errno)); }
    w->step = step;
    w->open = true;
    return true;
}

// Where a file of this name goes; names are plain and few.
static inline void checkpoint_file_path(const CheckpointWriter* w, const char* name, char* path) {
    assert(w->open && !strchr(name, '/') && w->n_files < CHECKPOINT_MAX_FILES);
    path_join(path, PATH_SIZE, w->partial, name);
}

static inline void checkpoint_list_file(CheckpointWriter* w, const char* name, uint64_t bytes, uint32_t crc) {
    text_printf(&w->manifest, "%s\n    ", w->n_files++ ? "," : "");
    text_json_string(&w->manifest, name, strlen(name));
    text_printf(&w->manifest, ": {\"bytes\": %llu, \"crc32\": %u}", (unsigned long long)bytes, crc);
}

// Each add syncs its file; on failure the whole partial is gone.
static inline bool checkpoint_add_text(CheckpointWriter* w, const char* name, const char* text, size_t n, Error* e) {
    char path[PATH_SIZE];
    checkpoint_file_path(w, name, path);
    if (!write_file_synced(path, text, n, e)) { return checkpoint_abort(w); }
    checkpoint_list_file(w, name, n, crc32_update(0, text, n));
    return true;
}

#ifndef CHECKPOINT_PIECE
#define CHECKPOINT_PIECE \
    ((size_t)1 << 20)  // values fetched at once: no copy of a whole tensor need fit beside the model
#endif

// The n values (at most CHECKPOINT_PIECE) from value `from` on of tensor `tensor` of group `group`, already of the
// dtype the file is written in; valid until the next call.
typedef const void* (*TensorFetch)(void* ctx, int group, int tensor, size_t from, size_t n);

// One safetensors file with every tensor of the list for each group, named prefix + NAME.
static inline bool checkpoint_add_tensors(CheckpointWriter* w, const char* name, const TensorList* list,
                                          const char* const* prefixes, int n_groups, DType dtype, TensorFetch fetch,
                                          void* ctx, Error* e) {
    char path[PATH_SIZE];
    size_t n = (size_t)n_groups * (size_t)list->n;
    StEntry* entries = (StEntry*)alloc_or_die(n, sizeof *entries, "tensor names");
    char(*names)[ST_NAME_SIZE] = (char(*)[ST_NAME_SIZE])alloc_or_die(n, ST_NAME_SIZE, "tensor names");
    for (size_t i = 0; i < n; i++) {
        const TensorSpec* s = &list->specs[i % (size_t)list->n];
        snprintf(names[i], ST_NAME_SIZE, "%s%s", prefixes[i / (size_t)list->n], s->name);
        entries[i].name = names[i];
        entries[i].dtype = dtype;
        entries[i].ndim = s->ndim;
        for (int d = 0; d < s->ndim; d++) { entries[i].shape[d] = s->shape[d]; }
    }
    StWriter out;
    uint64_t bytes = 0;
    uint32_t crc = 0;
    checkpoint_file_path(w, name, path);
    bool good = st_writer_open(&out, path, entries, (int)n, NULL, 0, e);
    for (int g = 0; good && g < n_groups; g++) {
        for (int t = 0; good && t < list->n; t++) {
            size_t numel = list->specs[t].numel;
            for (size_t from = 0; good && from < numel; from += CHECKPOINT_PIECE) {
                size_t piece = numel - from < CHECKPOINT_PIECE ? numel - from : CHECKPOINT_PIECE;
                good = st_writer_put(&out, fetch(ctx, g, t, from, piece), piece * dtype_size(dtype), e);
            }
        }
    }
    good = good && st_writer_close(&out, &bytes, &crc, e);
    free(entries);
    free(names);
    if (!good) { return checkpoint_abort(w); }
    checkpoint_list_file(w, name, bytes, crc);
    return true;
}

// Puts the partial into its final place in one step, also over an older checkpoint of the same step.
static inline bool checkpoint_rename(CheckpointWriter* w, Error* e) {
    if (!dir_exists(w->final)) {
        return rename(w->partial, w->final) == 0 ||
               fail(e, "%s: cannot rename to %s: %s", w->partial, w->final, strerror(errno));
    }
    const unsigned exchange = 2;  // RENAME_EXCHANGE: at no moment is there none
    if (syscall(SYS_renameat2, AT_FDCWD, w->partial, AT_FDCWD, w->final, exchange)) {  // a file system that cannot
        char aside[PATH_SIZE];
        path_join(aside, sizeof aside, w->run, ".step-replaced.partial");
        checkpoint_remove_dir(aside);
        if (rename(w->final, aside) || rename(w->partial, w->final)) {
            return fail(e, "%s: cannot replace it: %s", w->final, strerror(errno));
        }
        checkpoint_remove_dir(aside);
    } else {
        checkpoint_remove_dir(w->partial);
    }
    return true;
}

// Manifest, sync, rename, sync. The checkpoint's path into path_out (PATH_SIZE bytes, may be NULL).
static inline bool checkpoint_commit(CheckpointWriter* w, char* path_out, Error* e) {
    char path[PATH_SIZE];
    Text all = {NULL, 0, 0};
    text_printf(&all, "{\n  \"step\": %ld,\n  \"files\": {%s\n  }\n}\n", w->step,
                w->manifest.text ? w->manifest.text : "");
    path_join(path, sizeof path, w->partial, "manifest.json");
    bool good = write_file_synced(path, all.text, all.n, e) && sync_dir(w->partial, e) && checkpoint_rename(w, e);
    text_free(&all);
    if (!good) { return checkpoint_abort(w); }
    w->open = false;
    text_free(&w->manifest);
    if (path_out) { snprintf(path_out, PATH_SIZE, "%s", w->final); }
    return sync_dir(w->run, e);
}

// ---------------------------------------------------------------------------------------------------------------------
// Finding a good one

// by read(2): a failing disk is an error, not a signal
static inline bool checkpoint_file_crc(const char* path, uint32_t* crc, Error* e) {
    char buffer[1 << 16];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) { return fail(e, "%s: %s", path, strerror(errno)); }
    ssize_t got;
    *crc = 0;
    while ((got = read(fd, buffer, sizeof buffer)) > 0 || (got < 0 && errno == EINTR)) {
        if (got > 0) { *crc = crc32_update(*crc, buffer, (size_t)got); }
    }
    if (got < 0) { fail(e, "%s: %s", path, strerror(errno)); }
    close(fd);
    return got == 0;
}

// One file of the manifest: there, of the stated size and, if `contents`, of the stated CRC.
static inline bool checkpoint_verify_file(const char* dir, const Json* entry, bool contents, Error* e) {
    char path[PATH_SIZE];
    struct stat st;
    int64_t bytes = 0, crc = 0;
    uint32_t got = 0;
    if (!*entry->key || strchr(entry->key, '/') || strlen(entry->key) > 255) {
        return fail(e, "%s/manifest.json: \"%.40s\" is no file name", dir, entry->key);
    }
    path_join(path, sizeof path, dir, entry->key);
    if (!json_integer(json_get(entry, "bytes"), 0, INT64_MAX, &bytes) ||
        !json_integer(json_get(entry, "crc32"), 0, UINT32_MAX, &crc)) {
        return fail(e, "%s/manifest.json: %s has no size or CRC", dir, entry->key);
    }
    if (stat(path, &st) || !S_ISREG(st.st_mode)) { return fail(e, "%s: missing", path); }
    if ((int64_t)st.st_size != bytes) {
        return fail(e, "%s: %lld bytes, wanted %lld", path, (long long)st.st_size, (long long)bytes);
    }
    if (!contents) { return true; }
    return checkpoint_file_crc(path, &got, e) &&
           (got == (uint32_t)crc ||
            fail(e, "%s: CRC-32 %08x, wanted %08x: the file is damaged", path, got, (uint32_t)crc));
}

// DIR/manifest.json; NULL on error. The caller frees it.
static inline Json* checkpoint_manifest(const char* dir, Error* e) {
    char path[PATH_SIZE];
    if (strlen(dir) + 300 > PATH_SIZE) {
        fail(e, "directory name of %zu bytes is too long", strlen(dir));
        return NULL;
    }
    path_join(path, sizeof path, dir, "manifest.json");
    return json_read(path, MANIFEST_MAX_BYTES, e);
}

// Every file of the manifest is there, with its size and, if `contents`, its CRC-32.
static inline bool checkpoint_verify(const char* dir, bool contents, Error* e) {
    Json* manifest = checkpoint_manifest(dir, e);
    if (!manifest) { return false; }
    const Json* files = json_get(manifest, "files");
    bool good =
        (files && files->type == JSON_OBJECT && files->child) || fail(e, "%s/manifest.json: lists no files", dir);
    for (const Json* f = good ? files->child : NULL; f && good; f = f->next) {
        good = checkpoint_verify_file(dir, f, contents, e);
    }
    json_free(manifest);
    return good;
}

// Before a model is read from DIR, a checkpoint or a copy of some of its files: those that its manifest lists and that
// are there have their size and, but for the two that only a resume reads, their CRC-32. True where there is no
// manifest of a checkpoint: other programs' models.
static inline bool checkpoint_verify_model(const char* dir, Error* e) {
    char path[PATH_SIZE];
    struct stat st;
    path_join(path, sizeof path, dir, "manifest.json");
    if (lstat(path, &st)) { return true; }
    Json* manifest = checkpoint_manifest(dir, e);
    const Json* files = json_get(manifest, "files");
    bool good =
        manifest != NULL && (!files || files->type == JSON_OBJECT || fail(e, "%s: \"files\" is no object", path));
    for (const Json* f = files ? files->child : NULL; f && good; f = f->next) {
        bool state = !strcmp(f->key, "optimizer.safetensors") || !strcmp(f->key, "trainer.json");
        bool there = strlen(dir) + strlen(f->key) + 2 < PATH_SIZE;
        if (there) { path_join(path, sizeof path, dir, f->key); }
        if (!there || file_exists(path)) { good = checkpoint_verify_file(dir, f, !state, e); }
    }
    json_free(manifest);
    return good || fail(e, "%s: damaged", dir);
}

// Size and CRC-32 of the rank file `name` that a checkpoint in DIR was trained with: as its manifest says, else of the
// copy in DIR. False: neither is there.
static inline bool checkpoint_rank_sums(const char* dir, const char* name, int64_t* bytes, int64_t* crc) {
    char path[PATH_SIZE];
    struct stat st;
    uint32_t got = 0;
    path_join(path, sizeof path, dir, name);
    Json* manifest = checkpoint_manifest(dir, NULL);
    const Json* entry = json_get(json_get(manifest, "files"), name);
    bool known = json_integer(json_get(entry, "bytes"), 0, INT64_MAX, bytes) &&
                 json_integer(json_get(entry, "crc32"), 0, UINT32_MAX, crc);
    json_free(manifest);
    if (known || stat(path, &st) || !S_ISREG(st.st_mode) || !checkpoint_file_crc(path, &got, NULL)) { return known; }
    *bytes = (int64_t)st.st_size;
    *crc = got;
    return true;
}

// Refuses a tokenizer that is not the one which the checkpoint in DIR was trained with, as far as DIR tells: by its
// pattern and, if `contents`, by every byte of its rank file.
static inline bool checkpoint_check_tokenizer(const char* dir, const Config* c, const Tokenizer* t, bool contents,
                                              Error* e) {
    const char *file = tokenizer_file(t), *kept = c->tokenizer_pattern;
    int64_t bytes = 0, crc = 0;
    struct stat st;
    uint32_t got = 0;
    if (!kept[0]) { kept = tokenizer_built_in(c->tokenizer) ? c->tokenizer : tokenizer_copy_pattern(c->tokenizer); }
    if (kept && kept[0] && strcmp(kept, tokenizer_name(t))) {
        return fail(e, "%.300s: split as %s, but the model was trained with %s", file ? file : tokenizer_name(t),
                    tokenizer_name(t), kept);
    }
    if (!contents || !c->tokenizer[0] || !file || !checkpoint_rank_sums(dir, c->tokenizer, &bytes, &crc)) {
        return true;
    }
    if (stat(file, &st) || !checkpoint_file_crc(file, &got, e)) { return fail(e, "%s: %s", file, strerror(errno)); }
    return (st.st_size == (off_t)bytes && got == (uint32_t)crc) ||
           fail(e,
                "%.200s: %lld bytes, CRC-32 %08x, but the model was trained with %.60s of %lld bytes, CRC-32 %08x; "
                "--no-verify takes it all the same",
                file, (long long)st.st_size, got, c->tokenizer, (long long)bytes, (uint32_t)crc);
}

static inline int checkpoint_by_step(const void* a, const void* b) {  // newest first
    long x = *(const long*)a, y = *(const long*)b;
    return (x < y) - (x > y);
}

// The step of a directory that checkpoint_begin may have named; -1: it is no name of ours.
static inline long checkpoint_step(const char* name) {
    char again[32];
    size_t digits = strncmp(name, "step-", 5) ? 0 : strspn(name + 5, "0123456789");
    if (digits < 8 || digits > 18 || name[5 + digits]) { return -1; }
    long step = strtol(name + 5, NULL, 10);
    snprintf(again, sizeof again, "step-%08ld", step);
    return strcmp(name, again) ? -1 : step;
}

// A line on stderr for each directory of RUN whose name begins as a checkpoint's does and is none, such as step-4.
static inline void checkpoint_say_strange(const char* run) {
    char path[PATH_SIZE];
    DIR* d = opendir(run);
    for (struct dirent* entry = d ? readdir(d) : NULL; entry; entry = readdir(d)) {
        if (strncmp(entry->d_name, "step-", 5) || checkpoint_step(entry->d_name) >= 0) { continue; }
        path_join(path, sizeof path, run, entry->d_name);
        if (!dir_exists(path)) { continue; }
        make_one_line(path);
        fprintf(stderr, "%s: %s: ignored: a checkpoint is called step-00000004, with eight digits or more\n",
                program_invocation_short_name, path);
    }
    if (d) { closedir(d); }
}

// Steps of RUN's directories step-N in *steps (malloc'ed), newest first; how many.
static inline int checkpoint_list(const char* run, long** steps) {
    int n = 0, cap = 0;
    *steps = NULL;
    DIR* d = opendir(run);
    if (!d && errno != ENOENT && errno != ENOTDIR) { die("%s: cannot list its checkpoints: %s", run, strerror(errno)); }
    for (struct dirent* entry = d ? readdir(d) : NULL; entry; entry = readdir(d)) {
        long step = checkpoint_step(entry->d_name);
        if (step < 0) { continue; }
        if (n == cap) {
            cap = cap ? 2 * cap : 64;
            long* larger = (long*)realloc(*steps, (size_t)cap * sizeof(long));
            if (!larger) { die("out of memory: %d checkpoints in %s", cap, run); }
            *steps = larger;
        }
        (*steps)[n++] = step;
    }
    if (d) { closedir(d); }
    if (n) { qsort(*steps, (size_t)n, sizeof(long), checkpoint_by_step); }
    return n;
}

// The step and path (PATH_SIZE bytes) of the newest checkpoint that verifies, -1 if there is none. A line on stderr for
// each passed over, the reason also as a line of *passed_over unless that is NULL.
static inline long checkpoint_newest(const char* run, char* path_out, Text* passed_over) {
    long* steps;
    long found = -1;
    checkpoint_say_strange(run);
    int n = checkpoint_list(run, &steps);
    for (int i = 0; i < n && found < 0; i++) {
        Error why = {{0}};
        checkpoint_path(run, steps[i], path_out);
        if (checkpoint_verify(path_out, true, &why)) {
            found = steps[i];
        } else {
            fprintf(stderr, "%s: checkpoint ignored: %s\n", program_invocation_short_name, why.text);
            if (passed_over) { text_printf(passed_over, "%s\n", why.text); }
        }
    }
    free(steps);
    return found;
}

// After checkpoint `newest` was written: removes all older than the `keep` up to it whose files have their sizes (0:
// keeps all). Contents are not read again here: that would cost a pass over every kept checkpoint at each save. Those
// of later steps, which a resume has passed over as damaged, are left alone and do not count.
static inline void checkpoint_prune(const char* run, int keep, long newest) {
    long* steps;
    char path[PATH_SIZE];
    int n = keep > 0 ? checkpoint_list(run, &steps) : 0, good = 0;
    for (int i = 0; i < n; i++) {
        checkpoint_path(run, steps[i], path);
        if (steps[i] > newest) { continue; }
        if (good == keep) {
            checkpoint_remove_dir(path);
        } else {
            good += checkpoint_verify(path, false, NULL);
        }
    }
    if (keep > 0) { free(steps); }
}

// Where the disk is full: removes the oldest checkpoint before `newest`, the newest good one, and tells its step; -1 if
// there is none. One that cannot be removed, since the user has put something into it, is passed over.
static inline long checkpoint_make_room(const char* run, long newest) {
    long *steps, removed = -1;
    char path[PATH_SIZE];
    int n = checkpoint_list(run, &steps);
    for (int i = n - 1; i >= 0 && steps[i] < newest && removed < 0; i--) {
        checkpoint_path(run, steps[i], path);
        checkpoint_remove_dir(path);
        removed = dir_exists(path) ? -1 : steps[i];
    }
    free(steps);
    return removed;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading tensors

typedef bool (*TensorStore)(void* ctx, int group, int tensor, const float* data, Error* e);

// Refuses a tensor that is not as the list says.
static inline bool checkpoint_check_shape(const StTensor* t, const TensorSpec* s, Error* e) {
    bool same = t->ndim == s->ndim;
    for (int d = 0; same && d < s->ndim; d++) { same = t->shape[d] == s->shape[d]; }
    if (same) { return true; }
    char got[200], want[100];
    st_shape_text(got, sizeof got, t->ndim, t->shape);
    st_shape_text(want, sizeof want, s->ndim, s->shape);
    return fail(e, "%s: tensor %s: shape %s, wanted %s", t->file, t->name, got, want);
}

// What a checkpoint may hold beyond the list: RoPE's tables, and, where the embedding is the head too, a head of its
// very bytes.
static inline bool checkpoint_extra(const SafeTensors* s, const StTensor* t, Error* e) {
    size_t n = strlen(t->name);
    if (n >= 20 && !strcmp(t->name + n - 20, ".rotary_emb.inv_freq")) { return true; }
    const StTensor* embed = safetensors_find(s, "model.embed_tokens.weight");
    if (strcmp(t->name, "lm_head.weight") || !embed) {
        return fail(e, "%s: tensor %s is not one of this model's", t->file, t->name);
    }
    bool same = t->dtype == embed->dtype && t->bytes == embed->bytes && !memcmp(t->data, embed->data, t->bytes);
    return same || fail(e,
                        "%s: tensor lm_head.weight is another than model.embed_tokens.weight, and this model's are one "
                        "(tie_word_embeddings)",
                        t->file);
}

// The tensors of `list` for each group, as an array [n_groups * list->n] of pointers into s: NULL where an MTA tensor
// is absent and may be. Refuses missing, extra and wrongly shaped ones. The caller frees the array. NULL on error.
static inline const StTensor** checkpoint_match(const SafeTensors* s, const char* from, const TensorList* list,
                                                const char* const* prefixes, int n_groups, bool mta_may_be_absent,
                                                Text* absent, Error* e) {
    char name[ST_NAME_SIZE];
    const StTensor** found =
        (const StTensor**)alloc_or_die((size_t)n_groups * (size_t)list->n, sizeof *found, "tensor table");
    bool* used = (bool*)alloc_or_die((size_t)s->n, sizeof *used, "tensor table");
    bool good = true;
    for (int i = 0; good && i < n_groups * list->n; i++) {
        const TensorSpec* spec = &list->specs[i % list->n];
        snprintf(name, sizeof name, "%s%s", prefixes[i / list->n], spec->name);
        found[i] = safetensors_find(s, name);
        if (found[i]) {
            used[found[i] - s->tensors] = true;
            good = checkpoint_check_shape(found[i], spec, e);
        } else if (mta_may_be_absent && tensor_is_mta(spec)) {
            if (absent) { text_printf(absent, "%s%s", absent->n ? ", " : "", name); }
        } else {
            good = fail(e, "%s: tensor %s is missing", from, name);
        }
    }
    for (int i = 0; good && i < s->n; i++) { good = used[i] || checkpoint_extra(s, &s->tensors[i], e); }
    free(used);
    if (good) { return found; }
    free(found);
    return NULL;
}

// Gives every tensor to `store` as fp32, checked to be finite; F32 data straight from the mapping, others through one
// buffer.
static inline bool checkpoint_store_all(const StTensor* const* found, const TensorList* list, int n_groups,
                                        TensorStore store, void* ctx, Error* e) {
    size_t largest = 0;
    for (int i = 0; i < n_groups * list->n; i++) {
        const StTensor* t = found[i];
        if (t && (t->dtype != DT_F32 || (uintptr_t)t->data % 4) && t->numel > largest) { largest = t->numel; }
    }
    float* buffer = (float*)alloc_or_die(largest, sizeof(float), "conversion of a tensor");
    bool good = true;
    for (int i = 0; good && i < n_groups * list->n; i++) {
        const StTensor* t = found[i];
        if (!t) { continue; }
        const float* data = (const float*)t->data;
        if (t->dtype != DT_F32 || (uintptr_t)data % 4) {
            good = st_to_f32(t, buffer, e);
            data = buffer;
        } else {
            good = st_finite(t, data, e);
        }
        good = good && store(ctx, i / list->n, i % list->n, data, e);
    }
    free(buffer);
    return good;
}

// Reads the tensors prefix + NAME of a .safetensors file or of a directory with model.safetensors[.index.json]. Names
// of absent MTA tensors (allowed only if mta_may_be_absent) are appended to *absent, comma separated; store is not
// called for them.
static inline bool checkpoint_read_tensors(const char* path_or_dir, const TensorList* list, const char* const* prefixes,
                                           int n_groups, bool mta_may_be_absent, Text* absent, TensorStore store,
                                           void* ctx, Error* e) {
    SafeTensors s;
    bool open =
        dir_exists(path_or_dir) ? safetensors_open_dir(&s, path_or_dir, e) : safetensors_open(&s, path_or_dir, e);
    if (!open) { return false; }
    const StTensor** found = checkpoint_match(&s, path_or_dir, list, prefixes, n_groups, mta_may_be_absent, absent, e);
    bool good = found && checkpoint_store_all(found, list, n_groups, store, ctx, e);
    free(found);
    safetensors_close(&s);
    return good;
}

#endif
