// mta/options.h: one table per program that is both the parser and the --help text.
//
//   Opt table[] = {{"Training", OPT_HEADING, NULL, NULL, NULL, 0, 0, false},
//                  {"--lr", OPT_FLOAT, &o.lr, "X", "peak learning rate", 0, 10, false},
//                  {"--schedule", OPT_CHOICE, &o.schedule, "linear|cosine", "shape after warmup", 0, 0, false},
//                  OPT_END};
//   const char* files[2];
//   int n = options_parse(table, "usage: train_mta [options]", argc, argv, files, 2);
//
// Spelled --name VALUE or --name=VALUE; a later one wins over an earlier one; "--" ends the options. The value a field
// holds before the parse is its default and is what --help prints. A mistake of the user gives one line on stderr
// (what, got, wanted) and exit 1.
#ifndef MTA_OPTIONS_H
#define MTA_OPTIONS_H
#include "util.h"
#include <math.h>

typedef enum {
    OPT_HEADING,  // name is a heading of --help
    OPT_FLAG,     // bool*: --x sets it
    OPT_SWITCH,   // int*: --x on|off gives 1 or 0, -1 means not given
    OPT_INT,      // int*
    OPT_LONG,     // int64_t*
    OPT_FLOAT,    // double*, finite
    OPT_STRING,   // const char**, points into argv
    OPT_LIST,     // OptList*, each time it is given one more
    OPT_CHOICE    // const char**, one of arg = "a|b|c"; points into argv
} OptType;

typedef struct {
    const char* texts[16];  // point into argv
    int n;
} OptList;

typedef struct {
    const char* name;  // with its dashes
    OptType type;
    void* value;
    const char* arg;   // what --help shows for the value, NULL: the type's own word; the choices of OPT_CHOICE
    const char* help;  // one line
    double min, max;   // accepted range of a number, both 0: any
    bool given;        // set by the parse
} Opt;

#define OPT_END \
    { NULL, OPT_HEADING, NULL, NULL, NULL, 0, 0, false }

static inline const char* opt_value_word(const Opt* o) {
    if (o->type == OPT_FLAG) { return ""; }
    if (o->arg != NULL) { return o->arg; }
    switch (o->type) {
        case OPT_SWITCH: return "on|off";
        case OPT_INT:
        case OPT_LONG: return "N";
        case OPT_FLOAT: return "X";
        default: return "TEXT";
    }
}

// May the value be empty? A TEXT may, and IDS; what names a file, a folder or a model may not.
static inline bool opt_takes_empty(const Opt* o) {
    return o->type != OPT_STRING || o->arg == NULL || strcmp(o->arg, "TEXT") == 0 || strcmp(o->arg, "IDS") == 0;
}

// What is accepted instead of `got` (NULL = nothing was given), for an error line: "a whole number from 1 to 8". The
// limit of 64 bits is left out but for a whole number beyond it.
static inline void opt_wanted(const Opt* o, const char* got, char* out, size_t n) {
    const char* digits = got ? got + (got[0] == '-' || got[0] == '+') : "";
    bool beyond = o->type == OPT_LONG && strlen(digits) > 18 && !digits[strspn(digits, "0123456789")];
    const char *kind = o->type == OPT_FLOAT ? "a number" : "a whole number", *most = beyond ? ", below 2^63" : "";
    switch (o->type) {
        case OPT_SWITCH: snprintf(out, n, "on or off"); break;
        case OPT_CHOICE: snprintf(out, n, "one of %s", o->arg); break;
        case OPT_INT:
        case OPT_LONG:
        case OPT_FLOAT:
            if (o->min != 0 || o->max != 0) {
                if (o->max >= 0x1p63) {
                    snprintf(out, n, "%s of at least %.15g%s", kind, o->min, most);
                } else {
                    snprintf(out, n, "%s from %.15g to %.16g", kind, o->min, o->max);
                }
            } else {
                snprintf(out, n, "%s%s", kind, most);
            }
            break;
        default: snprintf(out, n, "%s", opt_takes_empty(o) ? "a value" : o->arg); break;
    }
}

static inline bool opt_in_range(const Opt* o, double x) {
    return (o->min == 0 && o->max == 0) || (x >= o->min && x <= o->max);
}

// A decimal integer and nothing else (strtoll alone would take leading blanks).
static inline bool opt_parse_integer(const char* text, int64_t* out) {
    const char* digits = text + (text[0] == '-' || text[0] == '+');
    if (digits[0] < '0' || digits[0] > '9') { return false; }
    char* end = NULL;
    errno = 0;
    long long x = strtoll(text, &end, 10);
    if (errno != 0 || *end != 0) { return false; }
    *out = x;
    return true;
}

// A finite decimal number and nothing else (strtod alone would take blanks, "nan", "infinity" and hexadecimal).
static inline bool opt_parse_number(const char* text, double* out) {
    if (text[0] == 0 || strspn(text, "0123456789+-.eE") != strlen(text)) { return false; }
    char* end = NULL;
    errno = 0;
    double x = strtod(text, &end);
    if (end == text || *end != 0 || !isfinite(x) || errno == ERANGE) { return false; }  // 1e-400 is not 0
    *out = x;
    return true;
}

// Stores `text` into the option; false if it is not acceptable.
static inline bool opt_store(Opt* o, const char* text) {
    int64_t integer = 0;
    double number = 0;
    switch (o->type) {
        case OPT_SWITCH:
            if (strcmp(text, "on") != 0 && strcmp(text, "off") != 0) { return false; }
            *(int*)o->value = strcmp(text, "on") == 0;
            return true;
        case OPT_INT:
            if (!opt_parse_integer(text, &integer) || integer < INT32_MIN || integer > INT32_MAX) { return false; }
            if (!opt_in_range(o, (double)integer)) { return false; }
            *(int*)o->value = (int)integer;
            return true;
        case OPT_LONG:
            if (!opt_parse_integer(text, &integer) || !opt_in_range(o, (double)integer)) { return false; }
            *(int64_t*)o->value = integer;
            return true;
        case OPT_FLOAT:
            if (!opt_parse_number(text, &number) || !opt_in_range(o, number)) { return false; }
            *(double*)o->value = number;
            return true;
        case OPT_CHOICE:
            if (choice_index(o->arg, text) < 0) { return false; }
            *(const char**)o->value = text;
            return true;
        case OPT_STRING:
            if (text[0] == 0 && !opt_takes_empty(o)) { return false; }
            *(const char**)o->value = text;
            return true;
        case OPT_LIST: {
            OptList* list = (OptList*)o->value;
            if (list->n == (int)(sizeof list->texts / sizeof list->texts[0])) {
                die("%s: given more than %d times", o->name, list->n);
            }
            list->texts[list->n++] = text;
            return true;
        }
        default: return false;
    }
}

// Prints the default of an option into out; empty if there is none worth printing. A number that could not be given
// stands for "not given": the option's own line then says what happens.
static inline void opt_default(const Opt* o, char* out, size_t n) {
    out[0] = 0;
    if (o->value == NULL) { return; }
    switch (o->type) {
        case OPT_SWITCH:
            if (*(int*)o->value >= 0) { snprintf(out, n, "%s", *(int*)o->value ? "on" : "off"); }
            break;
        case OPT_INT:
            if (opt_in_range(o, *(int*)o->value)) { snprintf(out, n, "%d", *(int*)o->value); }
            break;
        case OPT_LONG:
            if (opt_in_range(o, (double)*(int64_t*)o->value)) {
                snprintf(out, n, "%lld", (long long)*(int64_t*)o->value);
            }
            break;
        case OPT_FLOAT:
            if (opt_in_range(o, *(double*)o->value)) { snprintf(out, n, "%.10g", *(double*)o->value); }
            break;
        case OPT_STRING:
        case OPT_CHOICE:
            if (*(const char**)o->value != NULL) { snprintf(out, n, "%s", *(const char**)o->value); }
            break;
        default: break;
    }
}

// Usage line and the table with defaults; the help text starts at column 34, on a line of its own after a long name.
static inline void options_help(const Opt* table, const char* usage, FILE* f) {
    fprintf(f, "%s\n", usage);
    for (const Opt* o = table; o->name != NULL; o++) {
        if (o->type == OPT_HEADING) {
            fprintf(f, "\n%s\n", o->name);
            continue;
        }
        char left[256], value[128];
        const char* word = opt_value_word(o);
        snprintf(left, sizeof(left), "%s%s%s", o->name, word[0] ? " " : "", word);
        opt_default(o, value, sizeof(value));
        if (strlen(left) > 30) {
            fprintf(f, "  %s\n%34s", left, "");
        } else {
            fprintf(f, "  %-32s", left);
        }
        fprintf(f, "%s", o->help != NULL ? o->help : "");
        if (value[0]) { fprintf(f, " (default: %s)", value); }
        fprintf(f, "\n");
    }
    fprintf(f, "  %-32s%s\n", "--help", "this text");
    fprintf(f, "  %-32s%s\n", "--version", "the program's name and version");
}

// Edit distance between a (length na) and b, for names up to 63 characters; longer ones are cut.
static inline int opt_distance(const char* a, size_t na, const char* b) {
    int row[64];
    size_t nb = strlen(b);
    if (na > 63) { na = 63; }
    if (nb > 63) { nb = 63; }
    for (size_t j = 0; j <= nb; j++) { row[j] = (int)j; }
    for (size_t i = 1; i <= na; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best) { best = row[j] + 1; }
            if (row[j - 1] + 1 < best) { best = row[j - 1] + 1; }
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[nb];
}

// The option whose name is nearest to text (length n), NULL if none is near: at most a third of the letters differ, or
// the text, of four characters or more, is how the name begins.
static inline const char* opt_nearest(const Opt* table, const char* text, size_t n) {
    const char* best = NULL;
    int best_distance = (int)n / 3 + 1;
    for (const Opt* o = table; o->name != NULL; o++) {
        if (o->type == OPT_HEADING) { continue; }
        int d = n > 3 && strncmp(o->name, text, n) == 0 ? 1 : opt_distance(text, n, o->name);
        if (d < best_distance) {
            best_distance = d;
            best = o->name;
        }
    }
    return best;
}

static inline Opt* opt_find(Opt* table, const char* text, size_t n) {
    for (Opt* o = table; o->name != NULL; o++) {
        if (o->type != OPT_HEADING && strlen(o->name) == n && strncmp(o->name, text, n) == 0) { return o; }
    }
    return NULL;
}

// Was the option of this name (with dashes) on the command line?
static inline bool option_given(const Opt* table, const char* name) {
    for (const Opt* o = table; o->name != NULL; o++) {
        if (o->type != OPT_HEADING && strcmp(o->name, name) == 0) { return o->given; }
    }
    assert(!"an option of the table");
    return false;
}

// What a program does is one of several modes, a bit each; an option that not all of them use has a row.
typedef struct {
    const char* name;
    unsigned modes;  // that use it
    bool essential;  // it asks for something that the other modes do not do: refused; else it only tunes: said
} OptUse;

// What was given and has no use: refused where it is essential, else said.
static inline void option_idle(bool essential, const char* why) {
    if (essential) { die("%s", why); }
    fprintf(stderr, "%s: %s\n", program_invocation_short_name, why);
}

// Refuses an option that was given and that the mode does not use, or says that it does nothing, and names the modes
// that use it. modes: the name of each bit's, n of them; mode: one bit.
static inline void options_check_uses(const Opt* table, const OptUse* uses, int n_uses, const char* const* modes, int n,
                                      unsigned mode) {
    int now = 0;
    while (now < n && mode != 1u << now) { now++; }
    assert(now < n);
    for (int i = 0; i < n_uses; i++) {
        if (!option_given(table, uses[i].name) || (uses[i].modes & mode)) { continue; }
        Text why = {NULL, 0, 0};
        const char* before = "";
        text_printf(&why, "%s: no use beside %s; it belongs to ", uses[i].name, modes[now]);
        for (int k = 0; k < n; k++) {
            if (!(uses[i].modes >> k & 1)) { continue; }
            text_printf(&why, "%s%s", before, modes[k]);
            before = ", ";
        }
        option_idle(uses[i].essential, why.text);
        text_free(&why);
    }
}

// An option that does nothing without another one.
typedef struct {
    const char* name;
    bool used;
    const char* wanted;  // what makes it useful
    bool essential;      // refused without it; else said
} OptNeed;

// Refuses those that were given and are not used, or says that they do nothing.
static inline void options_check_needs(const Opt* table, const OptNeed* needs, int n) {
    for (int i = 0; i < n; i++) {
        if (needs[i].used || !option_given(table, needs[i].name)) { continue; }
        Text why = {NULL, 0, 0};
        const char* text = needs[i].essential ? "%s: wanted %s beside it" : "%s does nothing without %s";
        text_printf(&why, text, needs[i].name, needs[i].wanted);
        option_idle(needs[i].essential, why.text);
        text_free(&why);
    }
}

// Parses argv[1..]; stores up to max_positional other arguments into positional and returns their number.
static inline int options_parse(Opt* table, const char* usage, int argc, char** argv, const char** positional,
                                int max_positional) {
    int n_positional = 0;
    bool ended = false;
    Text twice = {NULL, 0, 0};
    for (int i = 1; i < argc; i++) {
        const char* arg = argv[i];
        if (ended || arg[0] != '-' || arg[1] == 0) {
            if (n_positional >= max_positional) {
                die("unexpected argument \"%s\"; options start with --, --help lists them", arg);
            }
            positional[n_positional++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            ended = true;
            continue;
        }
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            options_help(table, usage, stdout);
            put_out("", 0, true);
            exit(0);
        }
        if (strcmp(arg, "--version") == 0) {
            printf("%s %s\n", program_invocation_short_name, MTA_VERSION);
            put_out("", 0, true);
            exit(0);
        }
        const char* equals = strchr(arg, '=');
        size_t name_length = equals != NULL ? (size_t)(equals - arg) : strlen(arg);
        Opt* o = opt_find(table, arg, name_length);
        if (o == NULL) {
            const char* near = opt_nearest(table, arg, name_length);
            die("unknown option %.*s; %s%s%s--help lists all options", (int)name_length, arg,
                near ? "did you mean " : "", near ? near : "", near ? "? " : "");
        }
        bool again = o->given;
        o->given = true;
        if (o->type == OPT_FLAG) {
            if (equals != NULL) { die("%s: takes no value, got \"%s\"", o->name, equals + 1); }
            *(bool*)o->value = true;
            continue;
        }
        // A value that looks like an option is a forgotten value; --name=--VALUE says what is meant.
        const char* value = equals != NULL ? equals + 1 : i + 1 < argc ? argv[i + 1] : NULL;
        char wanted[256];
        opt_wanted(o, value, wanted, sizeof(wanted));
        if (value == NULL) { die("%s: the value is missing, wanted %s", o->name, wanted); }
        if (equals == NULL) {
            if (strncmp(value, "--", 2) == 0) {
                die("%s: the value is missing (%s follows), wanted %s", o->name, value, wanted);
            }
            i++;
        }
        // Names and texts are more than settings, which a recipe's user may put over the recipe's.
        const char* before = again && o->type == OPT_STRING ? *(const char**)o->value : value;
        if (!opt_store(o, value)) { die("%s: got \"%s\", wanted %s", o->name, value, wanted); }
        if (strcmp(before, value) != 0) {
            text_printf(&twice, "%s: %s is given twice: %s counts, %s does not\n", program_invocation_short_name,
                        o->name, value, before);
        }
    }
    fprintf(stderr, "%s", twice.n > 0 ? twice.text : "");  // now: a mistake is told in a line of its own
    text_free(&twice);
    return n_positional;
}

#endif
