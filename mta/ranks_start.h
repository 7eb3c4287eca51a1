// mta/ranks_start.h: how the processes of a run find each other (mta/ranks.h): what their launcher told them, and a
// meeting at rank 0.
//
// A launcher gives each process its number in environment variables, each launcher in its own (launch_read). Where no
// MPI says how rank 0 is reached, they tell that too (launch_address). Every rank then connects to rank 0 by TCP and
// says who it is. Rank 0 refuses by name what does not fit together; else it answers with everybody's host and with a
// block of its own, which is NCCL's id. The connections stay: they are those of the watch (mta/ranks_watch.h).
//
// Not every launcher ends all when one has ended, so nobody may wait for what will not come: a rank that cannot take
// part comes all the same and says why; rank 0, if it refuses, stays until all have come and sends them away. What
// remains is a rank that dies without a word before it comes.
//
// The environment may set MTA_PORT, where rank 0 listens (with MPI, which tells it to all, it is any free one), and
// MTA_START_SECONDS, how long the next rank may take to come, or rank 0 to be reached.
#ifndef MTA_RANKS_START_H
#define MTA_RANKS_START_H

#include "util.h"

#include "ranks_watch.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <limits.h>
#include <net/if.h>
#include <netdb.h>
#include <sys/resource.h>

enum {
    START_SECONDS = 60,  // and one for each ten ranks, which launchers start one after another
    START_ADDRESSES = 16,
    START_NAME = 256,       // bytes of a host's name, as MASTER_ADDR may give it
    START_GUESTS = 64,      // who may be about to say who it is, at the same time
    START_SPEAK = 5,        // seconds in which it says so
    START_MISSING = 16,     // missing ranks that are named
    START_PORT = 29533,     // where neither the environment nor the job gives one
    START_JOB_PORT = 20000  // and 10,000 more: below those that systems give to whoever asks for any
};

// A process as its launcher has it.
typedef struct {
    int rank, size;         // size 1: no launcher, or one process
    int local, local_size;  // its number among those on this host, and how many these are; -1 = not said
    const char* launcher;
} Launch;

// How rank 0 is reached, and a number that only this run knows.
typedef struct {
    uint64_t cookie;
    uint32_t address[START_ADDRESSES];  // of IPv4, in the order of the network
    int32_t addresses;
    uint16_t port;          // in the order of the network; 0 = any, on rank 0 alone
    char host[START_NAME];  // as it was named, for messages
} StartAddress;

// ---------------------------------------------------------------------------------------------------------------------
// What the launcher says

// A variable as a number up to `most`; -1 if it is not there.
static inline int launch_number(const char* name, int most) {
    const char* text = name ? getenv(name) : NULL;
    char* end = NULL;
    if (!text || !*text) { return -1; }
    errno = 0;
    long value = strtol(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || value > most) {
        die("%s: got \"%s\", wanted a number from 0 to %d", name, text, most);
    }
    return (int)value;
}

// Where every process finds the same mistake, the first one prints it. A launcher ends all when one ends, so the others
// wait a moment.
static inline void ranks_yield_to_first(int rank) {
    if (!rank) { return; }
    sleep(2);
    exit(1);
}

// The first launcher that says it has started several processes. Slurm is the last: what torchrun and mpirun start
// inside its jobs sees its variables too, those of another step. And it is the step's number of tasks that counts: a
// job's script sees the job's, and is one process. srun --mpi=pmi2 sets MPICH's variables too, but for those of the
// host: then its own tell more. PMI_RANK and PMI_SIZE are Cray's (PALS) and Flux's too, with others for those of the
// host. (scripts/recipe.bash reads the same.)
static inline Launch launch_read(void) {
    static const struct Known {  // a name, since nvcc makes nothing of the size of one without
        const char *launcher, *rank, *size, *local, *local_size;
    } known[] = {{"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
                 {"Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                  "OMPI_COMM_WORLD_LOCAL_SIZE"},
                 {"MPICH's mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
                 {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", NULL}};
    enum { KNOWN = sizeof known / sizeof known[0] };
    for (int i = 0; i < KNOWN; i++) {
        int size = launch_number(known[i].size, INT_MAX);
        if (size < 2) { continue; }
        bool by_srun = i + 2 == KNOWN && launch_number(known[i + 1].size, INT_MAX) == size;
        if (by_srun && launch_number(known[i].local, INT_MAX) < 0) { continue; }
        Launch l = {launch_number(known[i].rank, INT_MAX), size, launch_number(known[i].local, INT_MAX),
                    launch_number(known[i].local_size, INT_MAX), known[i].launcher};
        static const char* const more[] = {"PMI_LOCAL_RANK", "FLUX_TASK_LOCAL_ID", "LOCAL_RANK"};
        for (int k = 0; k < 3 && l.local < 0; k++) { l.local = launch_number(more[k], INT_MAX); }
        if (i + 2 == KNOWN && l.local_size < 0) { l.local_size = launch_number("PMI_LOCAL_SIZE", INT_MAX); }
        if (l.rank < 0) {
            die("%s is %d, and %s is not set; wanted both or neither", known[i].size, size, known[i].rank);
        }
        if (l.rank >= size) {
            die("%s is %d and %s is %d: they contradict each other", known[i].rank, l.rank, known[i].size, size);
        }
        if (l.local_size > size) {
            die("%s is %d and %s is %d: they contradict each other", known[i].local_size, l.local_size, known[i].size,
                size);
        }
        if (l.local >= (l.local_size < 0 ? size : l.local_size)) {
            die("%s is %d of %d processes: they contradict each other", known[i].local, l.local,
                l.local_size < 0 ? size : l.local_size);
        }
        return l;
    }
    Launch alone = {0, 1, 0, 1, ""};
    return alone;
}

// Which of the GPUs that this process sees is its own (*own): that of its number on this host, or the only one, where
// the launcher shows each process another. Two ranks on one are found when they meet.
static inline bool launch_device(const Launch* l, int devices, int* own, Error* e) {
    *own = devices == 1 ? 0 : l->local;
    if (*own < 0) {
        return fail(e, "%s does not say which of this host's processes this is; wanted LOCAL_RANK", l->launcher);
    }
    return *own < devices || fail(e,
                                  "it is process %d of this host, counted from 0, which has %d GPUs; wanted one for "
                                  "each",
                                  *own, devices);
}

// The first host of Slurm's list: of "n[03-05,7],m1" it is n03.
static inline void launch_first_host(const char* list, char* out, size_t n) {
    size_t at = 0;
    bool inside = false, skip = false;
    for (; *list && at + 1 < n && (inside || *list != ','); list++) {
        if (*list == '[') {
            inside = true;
        } else if (*list == ']') {
            inside = skip = false;
        } else if (inside && (*list == '-' || *list == ',')) {
            skip = true;
        } else if (!skip) {
            out[at++] = *list;
        }
    }
    out[at] = 0;
}

// The host of rank 0. The list of a step is that of the processes that srun started, the one of a job the others'.
static inline void launch_host(const Launch* l, char* out, size_t n) {
    bool srun = !strcmp(l->launcher, "srun");
    const char *address = getenv("MASTER_ADDR"), *list = getenv(srun ? "SLURM_STEP_NODELIST" : "SLURM_JOB_NODELIST");
    bool here = l->local_size == l->size || (srun && launch_number("SLURM_STEP_NUM_NODES", INT_MAX) == 1);
    const char* layout = srun ? getenv("SLURM_DISTRIBUTION") : NULL;
    if (layout && !strncmp(layout, "arbitrary", 9)) { list = NULL; }  // the list is in another order than the ranks
    if (here || (address && *address)) {
        snprintf(out, n, "%s", here ? "127.0.0.1" : address);
    } else if (list && *list) {
        launch_first_host(list, out, n);
    } else {
        die("%s does not say on which host rank 0 is; wanted MASTER_ADDR=HOST in the environment of all", l->launcher);
    }
}

// What tells this job from others on the same hosts; "" where the launcher does not say. Of torchrun its run's id
// alone: its agents may be of several steps or jobs. Of mpirun its own name of the run alone: what it starts by ssh on
// other hosts does not see the job of Slurm in which it was called itself.
static inline void launch_job(const Launch* l, char* out, size_t n) {
    const char* const names[] = {"TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID"};
    bool agents = !strcmp(l->launcher, "torchrun") && getenv(names[0]),
         mpirun = !strcmp(l->launcher, "Open MPI's mpirun") && getenv(names[1]);
    Text job = {NULL, 0, 0};
    for (int i = 0; i < 4; i++) {
        bool others = agents ? i > 0 : mpirun ? i != 1 : i == 0 || (i == 3 && strcmp(l->launcher, "srun"));
        const char* value = others ? NULL : getenv(names[i]);
        if (value && *value) { text_printf(&job, "%s=%s ", names[i], value); }
    }
    snprintf(out, n, "%s", job.text ? job.text : "");
    text_free(&job);
}

// Seconds that rank 0 waits for the next rank of so many, and each of them for rank 0.
static inline int start_seconds(int size) {
    int seconds = launch_number("MTA_START_SECONDS", 1000000);
    return seconds > 0 ? seconds : START_SECONDS + size / 10;
}

// getaddrinfo of rank 0's host, again and again as long as the ranks wait for it: a cluster may name a host only once
// it has started, later than this one (Kubernetes), and a server of names that a thousand ranks ask may fail for a
// moment.
static inline int launch_look_up(const Launch* l, const char* host, const struct addrinfo* want,
                                 struct addrinfo** found) {
    const struct timespec pause = {0, 500000000};
    double end = seconds_now() + start_seconds(l->size);
    int wrong = getaddrinfo(host, NULL, want, found);
    // EAI_NODATA: a name that has no address yet. What has a colon is an address of IPv6, and remains one.
    bool later = (wrong == EAI_AGAIN || wrong == EAI_NONAME || wrong == EAI_NODATA) && !strchr(host, ':');
    if (later && l->rank == 1) {
        fprintf(stderr, "%s: rank 1: %s, the host of rank 0: %s; asking again for %d s\n",
                program_invocation_short_name, host, gai_strerror(wrong), start_seconds(l->size));
    }
    while (later && wrong && seconds_now() < end) {
        nanosleep(&pause, NULL);
        wrong = getaddrinfo(host, NULL, want, found);
    }
    return wrong;
}

// Where the ranks meet, without MPI: on rank 0's host, at MTA_PORT, else beside the port at which torchrun listens,
// else at one that follows from the job.
static inline StartAddress launch_address(const Launch* l) {
    StartAddress a;
    struct addrinfo want, *found = NULL;
    char job[1024];
    int port = launch_number("MTA_PORT", 65535), master = launch_number("MASTER_PORT", 65534);
    memset(&a, 0, sizeof a);
    memset(&want, 0, sizeof want);
    launch_job(l, job, sizeof job);
    uint32_t hash = crc32_update(0, job, strlen(job));
    a.cookie = hash;
    a.port = htons((uint16_t)(port > 0     ? port
                              : master > 0 ? master + 1
                              : *job       ? START_JOB_PORT + (int)(hash % 10000)
                                           : START_PORT));
    launch_host(l, a.host, sizeof a.host);
    if (!l->rank) { return a; }
    want.ai_family = AF_INET, want.ai_socktype = SOCK_STREAM;
    int wrong = launch_look_up(l, a.host, &want, &found);
    if (wrong) {
        die("rank %d: %s, the host of rank 0: %s; wanted a name or an address of IPv4", l->rank, a.host,
            gai_strerror(wrong));
    }
    for (struct addrinfo* i = found; i && a.addresses < START_ADDRESSES; i = i->ai_next) {
        a.address[a.addresses++] = ((struct sockaddr_in*)(void*)i->ai_addr)->sin_addr.s_addr;
    }
    freeaddrinfo(found);
    return a;
}

// ---------------------------------------------------------------------------------------------------------------------
// The meeting

// Why a rank cannot take part, and the status that it would end with; 0: it can.
typedef struct {
    int32_t status;
    Error why;
} StartMistake;

// What a rank says of itself; it stays as it is, so that versions can tell each other apart.
typedef struct {
    char magic[8];
    uint64_t cookie;
    int32_t rank, size, pid, mistake;               // mistake: 1 = a StartMistake follows
    char version[32], host[HOST_SIZE], device[64];  // device: "" = shared by many
} StartHello;

// Rank 0 answers when it has taken a hello, then each second, and at last when all have come. Then the hosts of all and
// the block follow.
typedef struct {
    char magic[8];
    int32_t all, status;  // status: not 0 = end with it, rank 0 has said why
} StartAnswer;

static const char START_MAGIC[8] = {'m', 't', 'a', '.', 'm', 'e', 'e', 't'};

// Reads n bytes before the time `end`; false: they did not come.
static inline bool start_receive(int fd, void* data, size_t n, double end) {
    for (size_t have = 0; have < n;) {
        struct pollfd one = {fd, POLLIN, 0};
        double left = end - seconds_now();
        if (left <= 0 || poll(&one, 1, (int)(left * 1000) + 1) <= 0) { return false; }
        ssize_t got = recv(fd, (char*)data + have, n - have, 0);
        if (got <= 0) { return false; }
        have += (size_t)got;
    }
    return true;
}

// Sends n bytes to one that reads; one that does not is lost, which the watch will find.
static inline void start_send(int fd, const void* data, size_t n) {
    for (size_t sent = 0; sent < n;) {
        struct pollfd one = {fd, POLLOUT, 0};
        if (poll(&one, 1, 5000) <= 0) { return; }
        ssize_t more = send(fd, (const char*)data + sent, n - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (more < 0 && errno != EAGAIN && errno != EINTR) { return; }
        sent += more > 0 ? (size_t)more : 0;
    }
}

// Rank 0 listens on every address that this machine has, of which a gets a list; loopback comes last. A port of 0
// becomes one that is free, and then the cookie is made too.
static inline int start_listen(StartAddress* a) {
    struct sockaddr_in any;
    struct rlimit files;
    socklen_t length = sizeof any;
    int on = 1;

    // Each rank's connection is an open file: as many as this user may have at all.
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    memset(&any, 0, sizeof any);
    any.sin_family = AF_INET, any.sin_port = a->port;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
        bind(fd, (struct sockaddr*)&any, sizeof any) || listen(fd, 1024) ||
        getsockname(fd, (struct sockaddr*)&any, &length)) {
        die("ranks: cannot listen for the other ranks at port %d: %s%s", ntohs(a->port), strerror(errno),
            a->port ? "; MTA_PORT=N chooses another" : "");
    }
    if (!a->port) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        gethostname(a->host, sizeof a->host - 1);
        a->cookie = (uint64_t)t.tv_sec * 1000000007u ^ (uint64_t)t.tv_nsec << 20 ^ (uint64_t)getpid();
    }
    a->port = any.sin_port;
    struct ifaddrs* all = NULL;
    if (getifaddrs(&all)) { die("ranks: cannot list this machine's addresses: %s", strerror(errno)); }
    for (int loopback = 0; loopback < 2; loopback++) {
        for (struct ifaddrs* i = all; i; i = i->ifa_next) {
            if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || !(i->ifa_flags & IFF_UP) ||
                !(i->ifa_flags & IFF_LOOPBACK) != !loopback || a->addresses == START_ADDRESSES) {
                continue;
            }
            a->address[a->addresses++] = ((struct sockaddr_in*)(void*)i->ifa_addr)->sin_addr.s_addr;
        }
    }
    freeifaddrs(all);
    return fd;
}

static inline int start_connect(uint32_t address, uint16_t port) {
    struct sockaddr_in to;
    memset(&to, 0, sizeof to);
    to.sin_family = AF_INET, to.sin_addr.s_addr = address, to.sin_port = port;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), wrong = 0;
    socklen_t length = sizeof wrong;
    struct pollfd one = {fd, POLLOUT, 0};
    if (fd < 0) { return -1; }
    bool good = connect(fd, (struct sockaddr*)&to, sizeof to) == 0 ||
                (errno == EINPROGRESS && poll(&one, 1, 5000) == 1 &&
                 getsockopt(fd, SOL_SOCKET, SO_ERROR, &wrong, &length) == 0 && wrong == 0);
    if (good) { return fd; }
    close(fd);
    return -1;
}

// Who has connected and not yet said all: a rank, or a stranger, which may never do so.
typedef struct {
    int fd;  // -1: nobody
    double until;
    size_t have;  // bytes of what it says
    struct {
        StartHello hello;
        StartMistake mistake;
    } said;
} StartGuest;

// Rank 0's side of the meeting.
typedef struct {
    Watch* w;
    const StartAddress* address;
    int listening;
    StartHello* all;  // (size) who has come; the others have no magic
    int came;         // hellos of this run, rank 0's own among them
    int status;       // not 0: the run is refused, and whoever comes ends with it
    StartGuest guests[START_GUESTS];
    struct pollfd* list;  // (size + START_GUESTS)
} StartRoot;

static inline void start_answer(int fd, bool all, int status) {
    StartAnswer answer = {{0}, all, status};
    memcpy(answer.magic, START_MAGIC, sizeof answer.magic);
    start_send(fd, &answer, sizeof answer);
}

static inline void start_answer_all(const StartRoot* s, bool all, int status) {
    for (int p = 1; p < s->w->size; p++) {
        if (s->w->peers[p].fd >= 0) { start_answer(s->w->peers[p].fd, all, status); }
    }
}

// What speaks against one that comes beside those that have come (all; who has not has no magic), "" = nothing.
static inline Error start_judge(const StartHello* all, const StartHello* h) {
    const StartHello *root = &all[0], *other = &all[h->rank < root->size && h->rank >= 0 ? h->rank : 0];
    Error e = {{0}};
    if (strcmp(h->version, root->version)) {
        fail(&e, "rank %d (%s) is of version %s, rank 0 (%s) of %s; wanted the same on all", h->rank, h->host,
             h->version, root->host, root->version);
    } else if (h->size != root->size || h->rank < 0 || h->rank >= root->size) {
        fail(&e, "rank %d (%s) was started as one of %d, rank 0 (%s) as one of %d", h->rank, h->host, h->size,
             root->host, root->size);
    } else if (other->magic[0]) {
        fail(&e, "rank %d came twice: from %s (process %d) and from %s (process %d)", h->rank, other->host, other->pid,
             h->host, h->pid);
    }
    for (int p = 0; p < root->size && h->device[0] && !e.text[0]; p++) {
        if (all[p].magic[0] && !strcmp(all[p].device, h->device)) {
            fail(&e, "rank %d (%s) and rank %d (%s) are on one GPU, %s; wanted one for each", p, all[p].host, h->rank,
                 h->host, h->device);
        }
    }
    return e;
}

__attribute__((noreturn)) static inline void start_refuse(StartRoot* s, int status, const char* why);

// A guest is a rank of this run and has said all: rank 0 takes it, or refuses.
static inline void start_take(StartRoot* s, StartGuest* g) {
    StartHello* h = &g->said.hello;
    StartMistake* mistake = &g->said.mistake;  // all 0 where none was sent
    Error e = {{0}};
    int fd = g->fd;
    g->fd = -1;
    h->version[sizeof h->version - 1] = h->host[sizeof h->host - 1] = h->device[sizeof h->device - 1] = 0;
    mistake->why.text[sizeof mistake->why.text - 1] = 0;
    start_answer(fd, false, 0);
    s->came++;
    if (!s->status) { e = start_judge(s->all, h); }
    if (mistake->status && !e.text[0]) { fail(&e, "rank %d (%s): %.400s", h->rank, h->host, mistake->why.text); }
    if (s->status || e.text[0]) {
        int status = s->status ? s->status : mistake->status ? mistake->status : 1;
        start_answer(fd, true, status);
        close(fd);
        if (s->status) { return; }
        start_refuse(s, status, e.text);
    }
    s->all[h->rank] = *h;
    s->w->peers[h->rank].fd = fd;
}

static inline void start_send_away(StartGuest* g) {
    if (g->fd >= 0) { close(g->fd); }
    g->fd = -1;
}

// Reads what a guest has said by now. Who is none of this run's, is silent for too long or hangs up is sent away
// without a word.
static inline void start_hear(StartRoot* s, StartGuest* g) {
    const StartHello* h = &g->said.hello;
    for (;;) {
        bool greeted = g->have >= sizeof *h;
        size_t wanted = sizeof *h + (greeted && h->mistake ? sizeof g->said.mistake : 0);
        if (greeted && (memcmp(h->magic, START_MAGIC, sizeof h->magic) || h->cookie != s->address->cookie)) { break; }
        if (g->have == wanted) {
            start_take(s, g);
            return;
        }
        ssize_t got = recv(g->fd, (char*)&g->said + g->have, wanted - g->have, MSG_DONTWAIT);
        if (got < 0 && (errno == EAGAIN || errno == EINTR) && seconds_now() < g->until) { return; }
        if (got <= 0) { break; }
        g->have += (size_t)got;
    }
    start_send_away(g);
}

// Lets the next one in, in place of the one that has been here longest where there are too many: if that is a rank, it
// comes again.
static inline void start_let_in(StartRoot* s) {
    StartGuest* g = s->guests;
    int fd = accept4(s->listening, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0 && errno == EMFILE && !s->status) {
        start_refuse(s, 1, "ranks: too many open files; ulimit -n N allows more");
    }
    if (fd < 0) { return; }
    for (int i = 0; i < START_GUESTS && g->fd >= 0; i++) {
        const StartGuest* one = &s->guests[i];
        if (one->fd < 0 || one->until < g->until) { g = &s->guests[i]; }
    }
    start_send_away(g);
    memset(g, 0, sizeof *g);
    g->fd = fd, g->until = seconds_now() + START_SPEAK;
    start_hear(s, g);
}

static inline void start_check(StartRoot* s);

// Waits a moment for whoever connects, says something or is lost, and sees to it. Only open files are in the list: of
// more than a process may have, poll would take none.
static inline void start_look(StartRoot* s) {
    int size = s->w->size, n = 0;
    for (int i = 0; i < size + START_GUESTS; i++) {
        struct pollfd one = {i ? i < size ? s->w->peers[i].fd : s->guests[i - size].fd : s->listening, POLLIN, 0};
        if (one.fd >= 0) { s->list[n++] = one; }
    }
    poll(s->list, (nfds_t)n, 100);
    start_check(s);
    for (int i = 0; i < START_GUESTS; i++) {
        if (s->guests[i].fd >= 0) { start_hear(s, &s->guests[i]); }
    }
    if (s->list[0].revents) { start_let_in(s); }
}

// Ends the run where the ranks meet: rank 0 says why, the others end with it, also those that come later.
__attribute__((noreturn)) static inline void start_refuse(StartRoot* s, int status, const char* why) {
    fprintf(stderr, "%s: %s\n", program_invocation_short_name, why);
    start_answer_all(s, true, status);
    for (int p = 1; p < s->w->size; p++) {  // that makes room for who comes later
        if (s->w->peers[p].fd >= 0) { close(s->w->peers[p].fd); }
        s->w->peers[p].fd = -1;
    }
    s->status = status;
    for (double end = seconds_now() + start_seconds(s->w->size); s->came < s->w->size && seconds_now() < end;) {
        start_look(s);
    }
    exit(status);
}

// Not all have come.
__attribute__((noreturn)) static inline void start_miss(StartRoot* s) {
    Text names = {NULL, 0, 0}, why = {NULL, 0, 0};
    int missing = 0, size = s->w->size;
    for (int p = 0; p < size; p++) {
        if (s->all[p].magic[0]) { continue; }
        if (missing < START_MISSING) { text_printf(&names, "%s%d", missing ? ", " : "", p); }
        missing++;
    }
    text_printf(&why,
                "%d of %d ranks came to %s:%d, then none within %d s; missing %s%s; MTA_START_SECONDS=N waits longer",
                size - missing, size, s->all[0].host, ntohs(s->address->port), start_seconds(size), names.text,
                missing > START_MISSING ? ", ..." : "");
    s->came = size;  // who comes later is not waited for
    start_refuse(s, EXIT_RANK_LOST, why.text);
}

// One that has come says nothing until all have: what its connection shows is its end.
static inline void start_check(StartRoot* s) {
    for (int p = 1, at = 1; p < s->w->size; p++) {
        if (s->w->peers[p].fd < 0 || !s->list[at++].revents) { continue; }
        Error e = {{0}};
        fail(&e, "rank %d (%s) was lost at the start", p, s->all[p].host);
        start_refuse(s, EXIT_RANK_LOST, e.text);
    }
}

// Rank 0's part: waits for all, then answers them.
static inline void start_gather(StartRoot* s, const void* block, size_t n) {
    Watch* w = s->w;
    double limit = start_seconds(w->size), end = seconds_now() + limit, told = seconds_now();
    while (s->came < w->size) {
        int before = s->came;
        start_look(s);
        double now = seconds_now();
        if (s->came > before) { end = now + limit; }
        if (now > end) { start_miss(s); }
        if (now > told + 1) {
            start_answer_all(s, false, 0);
            told = now;
        }
    }
    close(s->listening);
    for (int i = 0; i < START_GUESTS; i++) { start_send_away(&s->guests[i]); }
    char* hosts = (char*)alloc_or_die((size_t)w->size, HOST_SIZE, "ranks");
    for (int p = 0; p < w->size; p++) {
        memcpy(w->peers[p].host, s->all[p].host, HOST_SIZE);
        memcpy(hosts + (size_t)p * HOST_SIZE, s->all[p].host, HOST_SIZE);
    }
    start_answer_all(s, true, 0);
    for (int p = 1; p < w->size; p++) {
        start_send(w->peers[p].fd, hosts, (size_t)w->size * HOST_SIZE);
        start_send(w->peers[p].fd, block, n);
    }
    free(hosts);
}

// Another rank tries each address of rank 0 until one takes its hello.
static inline void start_reach(Watch* w, const StartAddress* a, const StartHello* mine, const StartMistake* mistake) {
    const struct timespec pause = {0, 50000000};
    StartAnswer taken;
    double end = seconds_now() + start_seconds(w->size);
    while (seconds_now() < end) {
        for (int i = 0; i < a->addresses; i++) {
            int fd = start_connect(a->address[i], a->port);
            if (fd < 0) { continue; }
            start_send(fd, mine, sizeof *mine);
            if (mine->mistake) { start_send(fd, mistake, sizeof *mistake); }
            if (start_receive(fd, &taken, sizeof taken, end) && !memcmp(taken.magic, START_MAGIC, sizeof taken.magic) &&
                !taken.all && !taken.status) {
                w->peers[0].fd = fd;
                return;
            }
            close(fd);
        }
        nanosleep(&pause, NULL);
    }
    if (mine->mistake) { die("rank %d (%s): %s", w->rank, mine->host, mistake->why.text); }
    fprintf(stderr, "%s: rank %d (%s): rank 0 was not reached at %s:%d within %d s; MTA_START_SECONDS=N waits longer\n",
            program_invocation_short_name, w->rank, mine->host, a->host, ntohs(a->port), start_seconds(w->size));
    exit(EXIT_RANK_LOST);
}

// What the others read of rank 0's answer: everybody's host, and the block (n). It lives as long as it answers.
static inline bool start_await(Watch* w, void* block, size_t n) {
    StartAnswer answer;
    int fd = w->peers[0].fd;
    do {
        if (!start_receive(fd, &answer, sizeof answer, seconds_now() + WATCH_SILENCE)) { return false; }
    } while (!answer.all);
    if (answer.status) { exit(answer.status); }
    for (int p = 0; p < w->size; p++) {
        if (!start_receive(fd, w->peers[p].host, HOST_SIZE, seconds_now() + WATCH_SILENCE)) { return false; }
    }
    return start_receive(fd, block, n, seconds_now() + WATCH_SILENCE);
}

// All ranks meet at rank 0, which listens at a (by start_listen). Afterwards all are connected to it, know everybody's
// host, and have rank 0's `block` of n bytes. device: what no two ranks may share, "" = nothing. mistake: of this rank.
static inline void start_meet(Watch* w, const StartAddress* a, int listening, const char* version, const char* device,
                              const StartMistake* mistake, void* block, size_t n) {
    StartHello mine;
    memset(&mine, 0, sizeof mine);
    memcpy(mine.magic, START_MAGIC, sizeof mine.magic);
    mine.cookie = a->cookie, mine.rank = w->rank, mine.size = w->size, mine.pid = (int32_t)getpid();
    mine.mistake = mistake->status != 0;
    snprintf(mine.version, sizeof mine.version, "%s", version);
    snprintf(mine.device, sizeof mine.device, "%s", device);
    gethostname(mine.host, sizeof mine.host - 1);
    if (!w->rank) {
        StartRoot s;
        Error e = {{0}};
        memset(&s, 0, sizeof s);
        s.w = w, s.address = a, s.listening = listening, s.came = 1;
        s.all = (StartHello*)alloc_or_die((size_t)w->size, sizeof mine, "ranks");
        s.list = (struct pollfd*)alloc_or_die((size_t)w->size + START_GUESTS, sizeof *s.list, "ranks");
        for (int i = 0; i < START_GUESTS; i++) { s.guests[i].fd = -1; }
        s.all[0] = mine;
        if (mine.mistake) {
            fail(&e, "rank 0 (%s): %.400s", mine.host, mistake->why.text);
            start_refuse(&s, mistake->status, e.text);
        }
        start_gather(&s, block, n);
        free(s.all);
        free(s.list);
        return;
    }
    start_reach(w, a, &mine, mistake);
    if (start_await(w, block, n)) { return; }
    if (w->rank == 1) {
        fprintf(stderr, "%s: rank 0 (%s) was lost at the start; all ranks end\n", program_invocation_short_name,
                a->host);
    }
    exit(EXIT_RANK_LOST);
}

#endif
