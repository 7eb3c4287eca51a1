// test_options.c: mta/options.h and mta/random.h. Each command line is parsed in a child process, whose exit status and
// output are judged.
//   make build/test_options && build/test_options
#include "mta/util.h"
#include "mta/options.h"
#include "mta/random.h"
#include "check.h"
#include <sys/wait.h>

typedef struct {
    bool dry_run;
    int tie, batch;
    int64_t steps, seed;
    double lr, eps;
    const char* out;
    const char *schedule, *prompt;
} Options;

static Options o;
static Opt table[] = {{"Training", OPT_HEADING, NULL, NULL, NULL, 0, 0, false},
                      {"--dry-run", OPT_FLAG, &o.dry_run, NULL, "print the plan and stop", 0, 0, false},
                      {"--tie", OPT_SWITCH, &o.tie, NULL, "tie the head", 0, 0, false},
                      {"--batch-size", OPT_INT, &o.batch, NULL, "sequences", 1, 1000, false},
                      {"--steps", OPT_LONG, &o.steps, NULL, "steps", 0, 1e300, false},
                      {"--seed", OPT_LONG, &o.seed, NULL, "seed", 0, 9e15, false},
                      {"--lr", OPT_FLOAT, &o.lr, NULL, "learning rate", 0, 10, false},
                      {"--eps", OPT_FLOAT, &o.eps, NULL, "any number", 0, 0, false},
                      {"--out", OPT_STRING, &o.out, "DIR", "directory", 0, 0, false},
                      {"--schedule", OPT_CHOICE, &o.schedule, "linear|cosine", "shape", 0, 0, false},
                      {"--prompt", OPT_STRING, &o.prompt, "TEXT", "any text", 0, 0, false},
                      OPT_END};

static void reset(void) {
    o.dry_run = false;
    o.tie = -1;
    o.batch = 8;
    o.steps = 100;
    o.lr = 0.5;
    o.eps = 0;
    o.out = NULL;
    o.schedule = "linear";
    o.prompt = NULL;
    for (Opt* p = table; p->name != NULL; p++) { p->given = false; }
}

static const char* positional[2];

static int parse(int argc, const char* const* argv) {
    reset();
    return options_parse(table, "usage: test [options] FILE FILE", argc, (char**)argv, positional, 2);
}

// Parses in a child; its stdout and stderr come back in text. Returns the exit status, 200 where options_parse
// returned.
static int parse_child(int argc, const char* const* argv, char* text, size_t size) {
    int fds[2];
    if (pipe(fds) != 0) { die("pipe: %s", strerror(errno)); }
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(fds[1], 1);
        dup2(fds[1], 2);
        close(fds[0]);
        close(fds[1]);
        parse(argc, argv);
        fflush(stdout);
        _exit(200);
    }
    close(fds[1]);
    size_t n = 0;
    for (ssize_t got; n + 1 < size && (got = read(fds[0], text + n, size - 1 - n)) > 0;) { n += (size_t)got; }
    text[n] = 0;
    close(fds[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// One bad command line (at most three words after the program's name): exit 1, one line, which holds every one of the
// given pieces.
static void refused(const char* a, const char* b, const char* c, const char* piece1, const char* piece2) {
    const char* argv[5] = {"prog", a, b, c, NULL};
    int argc = 1;
    while (argv[argc] != NULL) { argc++; }
    char text[8192];
    int status = parse_child(argc, argv, text, sizeof(text));
    char* newline = strchr(text, '\n');
    bool ok = status == 1 && newline != NULL && newline[1] == 0 && strstr(text, piece1) != NULL &&
              strstr(text, piece2) != NULL;
    char what[9000];
    snprintf(what, sizeof(what), "%s %s %s refused with %s and %s: exit %d, %s", a, b ? b : "", c ? c : "", piece1,
             piece2, status, text);
    check(ok, what);
}

static void test_good(void) {
    const char* argv[] = {
        "prog",    "one",        "--lr",      "1e-3",       "--dry-run", "--tie=off", "--batch-size=16",
        "--steps", "5000000000", "--out=a=b", "--schedule", "cosine",    "--eps",     "-1.5",
        "--",      "--two",      NULL};
    int n = parse(16, argv);
    check(n == 2 && strcmp(positional[0], "one") == 0 && strcmp(positional[1], "--two") == 0,
          "positional arguments, also after --");
    check(o.lr == 1e-3 && o.dry_run && o.tie == 0 && o.batch == 16 && o.steps == 5000000000LL, "values");
    check(strcmp(o.out, "a=b") == 0 && strcmp(o.schedule, "cosine") == 0 && o.eps == -1.5,
          "text, choice, negative number");
    check(option_given(table, "--lr"), "given");
    const char* twice[] = {"prog", "--lr=1", "--lr=2", "-", NULL};
    check(parse(4, twice) == 1 && o.lr == 2 && strcmp(positional[0], "-") == 0, "the later one wins; - is an argument");
    const char* none[] = {"prog", NULL};
    check(parse(1, none) == 0 && o.batch == 8 && o.tie == -1 && !option_given(table, "--lr"), "defaults stay");
    const char* empty[] = {"prog", "--prompt=", NULL};
    check(parse(2, empty) == 0 && o.prompt[0] == 0, "an empty text");
}

// Of a text that is given twice the last counts, and that is said: once all are read, so that a mistake is told in one
// line. Settings may be put over those of a recipe.
static void test_twice(void) {
    const char* argv[] = {"prog", "--lr=1", "--out", "a", "--lr", "2", "--out=b", "--out", "b", NULL};
    char text[8192];
    int status = parse_child(9, argv, text, sizeof(text));
    const char* said = strstr(text, "--out is given twice: b counts, a does not\n");
    check(status == 200 && said != NULL && strstr(text, "--lr") == NULL && strchr(said, '\n')[1] == 0, "given twice");
    refused("--out=a", "--out=b", "--lr=3e", "--lr: got \"3e\"", "a number");
}

static void test_refused(void) {
    refused("--bath-size", "4", NULL, "unknown option --bath-size", "did you mean --batch-size?");
    refused("--batch", "4", NULL, "unknown option --batch;", "did you mean --batch-size?");
    refused("--sched=linear", NULL, NULL, "unknown option --sched;", "did you mean --schedule?");
    refused("--zzz", NULL, NULL, "unknown option --zzz; --help", "lists");
    refused("-lr", "1", NULL, "unknown option -lr", "--lr");
    refused("--batch-size", "4x", NULL, "--batch-size: got \"4x\"", "whole number from 1 to 1000");
    refused("--batch-size", "0", NULL, "got \"0\"", "from 1 to 1000");
    refused("--batch-size", "1e3", NULL, "got \"1e3\"", "whole number");
    refused("--batch-size=", NULL, NULL, "got \"\"", "whole number");
    refused("--batch-size", " 4", NULL, "got \" 4\"", "whole number");
    refused("--batch-size", "99999999999999999999", NULL, "got \"9999", "whole number");
    refused("--steps", "-1", NULL, "--steps: got \"-1\"", "at least 0");
    refused("--steps", "9223372036854775808", NULL, "got", "a whole number of at least 0, below 2^63");
    refused("--seed", "9000000000000001", NULL, "got", "a whole number from 0 to 9000000000000000");
    refused("--lr", "fast", NULL, "--lr: got \"fast\"", "a number from 0 to 10");
    refused("--lr", "nan", NULL, "got \"nan\"", "a number");
    refused("--lr", "1e999", NULL, "got \"1e999\"", "a number");
    refused("--lr", "0x1", NULL, "got \"0x1\"", "a number");
    refused("--lr", "1e-3e", NULL, "got \"1e-3e\"", "a number");
    refused("--eps", "inf", NULL, "got \"inf\"", "a number");
    refused("--lr", NULL, NULL, "--lr: the value is missing", "a number");
    refused("--out", "--dry-run", NULL, "--out: the value is missing", "--dry-run follows");
    refused("--out=", NULL, NULL, "--out: got \"\"", "wanted DIR");
    refused("--tie", "yes", NULL, "--tie: got \"yes\"", "on or off");
    refused("--schedule", "line", NULL, "got \"line\"", "one of linear|cosine");
    refused("--schedule", "linear|cosine", NULL, "got", "one of");
    refused("--schedule=", NULL, NULL, "got \"\"", "one of");
    refused("--dry-run=yes", NULL, NULL, "--dry-run: takes no value", "\"yes\"");
    refused("a", "b", "c", "unexpected argument \"c\"", "--help");
}

static void test_help(void) {
    const char* argv[] = {"prog", "--help", NULL};
    char text[8192];
    int status = parse_child(2, argv, text, sizeof(text));
    check(status == 0 && strstr(text, "usage: test") == text, "--help exits 0 and starts with the usage line");
    check(strstr(text, "\nTraining\n") != NULL && strstr(text, "--batch-size N") != NULL &&
              strstr(text, "(default: 8)") != NULL,
          "help: table");
    check(strstr(text, "\n  --version ") != NULL, "help: --version");
    check(strstr(text, "--schedule linear|cosine") != NULL && strstr(text, "(default: linear)") != NULL,
          "help: choices and their default");
}

static void test_version(void) {
    const char* argv[] = {"prog", "--lr", "0.1", "--version", "--no-such-option", NULL};
    char text[8192];
    int status = parse_child(5, argv, text, sizeof(text));
    check(status == 0 && strstr(text, " " MTA_VERSION "\n") != NULL && strchr(text, '\n')[1] == 0,
          "--version is one line, exit 0");
}

// Known answers of Philox 4x32-10, from the authors' distribution (Random123, kat_vectors).
static void test_philox(void) {
    uint32_t zero[4] = {0, 0, 0, 0}, zero_key[2] = {0, 0};
    philox4x32(zero, zero_key);
    check(zero[0] == 0x6627e8d5u && zero[1] == 0xe169c58du && zero[2] == 0xbc57ac4cu && zero[3] == 0x9b00dbd8u,
          "Philox of zeros");
    uint32_t pi[4] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, pi_key[2] = {0xa4093822u, 0x299f31d0u};
    philox4x32(pi, pi_key);
    check(pi[0] == 0xd16cfe09u && pi[1] == 0x94fdccebu && pi[2] == 0x5001e420u && pi[3] == 0x24126ea1u, "Philox of pi");
}

static void test_random(void) {
    Rng a = rng_make(7, 0), b = rng_make(7, 0), c = rng_make(7, 1), d = rng_make(8, 0);
    int same_ab = 0, same_ac = 0, same_ad = 0;
    for (int i = 0; i < 1000; i++) {
        uint32_t x = rng_u32(&a);
        same_ab += x == rng_u32(&b);
        same_ac += x == rng_u32(&c);
        same_ad += x == rng_u32(&d);
    }
    check(same_ab == 1000 && same_ac == 0 && same_ad == 0, "equal seeds agree, other seeds and streams differ");
    Rng saved = a;
    check(rng_u64(&a) == rng_u64(&saved), "a copied Rng continues");
    const int n = 200000;
    double mean = 0, square = 0, fourth = 0, largest = 0, uniform = 0;
    for (int i = 0; i < n; i++) {
        double x = rng_normal(&a), t = rng_truncated_normal(&a, 3.0), u = rng_uniform(&a);
        mean += x / n;
        square += x * x / n;
        fourth += x * x * x * x / n;
        uniform += u / n;
        largest = fmax(largest, fabs(t));
        if (!(u >= 0 && u < 1)) { largest = 99; }
    }
    // five standard errors: 1/sqrt(n), sqrt(2/n), sqrt(96/n), sqrt(1/12n)
    check(fabs(mean) < 0.0112 && fabs(square - 1) < 0.0159 && fabs(fourth - 3) < 0.11, "moments of the normal");
    check(fabs(uniform - 0.5) < 0.0033 && largest <= 3 && largest > 2.9,
          "mean of the uniform, limit of the truncated normal");
}

static void test_permutation(void) {
    bool all = true, moved = true, keys = true;
    for (uint64_t n = 1; n <= 3000; n = n < 70 ? n + 1 : n * 2 + 1) {
        unsigned char* seen = (unsigned char*)alloc_or_die(n, 1, "seen");
        uint64_t fixed = 0, equal = 0;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t p = permute_index(i, n, 42);
            if (p >= n || seen[p]++) { all = false; }
            fixed += p == i;
            equal += p == permute_index(i, n, 43);
        }
        if (n > 60) {
            moved = moved && fixed < 12;
            keys = keys && equal < 12;
        }
        free(seen);
    }
    check(all, "permute_index is a permutation for n from 1 to 3000");
    check(moved && keys, "it moves elements, and keys differ");
    int count[3] = {0, 0, 0};
    for (uint64_t key = 0; key < 30000; key++) { count[permute_index(0, 3, key)]++; }
    check(abs(count[0] - 10000) < 500 && abs(count[1] - 10000) < 500 && abs(count[2] - 10000) < 500,
          "of three, each place is equally likely");
    uint64_t huge = ((uint64_t)1 << 40) + 12345, low = 0;
    bool inside = true;
    for (uint64_t i = 0; i < 10000; i++) {
        uint64_t p = permute_index(i, huge, 5);
        inside = inside && p < huge;
        low += p < huge / 2;
    }
    check(inside && low > 4750 && low < 5250, "a huge n stays inside and spreads");
}

int main(void) {
    reset();
    test_good();
    test_twice();
    test_refused();
    test_help();
    test_version();
    test_philox();
    test_random();
    test_permutation();
    return test_verdict();
}
