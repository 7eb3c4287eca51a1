// test_start.c: tests of mta/ranks_start.h: what each launcher's environment says, and the meeting of ranks by TCP; and
// of who has what afterwards (mta/ranks.h).
//   make build/test_start && build/test_start
#include "mta/util.h"

#include <netdb.h>
#include <sys/mman.h>
#include <sys/socket.h>

// No check hangs on how long something takes on this machine, which may stand still for seconds: the test waits for
// what its processes count, for PATIENCE seconds at most, which ends a process too. Ranks wait for each other for LIMIT
// seconds, so that one that waits so long has failed.
enum { PATIENCE = 300, LIMIT = 1000 };

// What the test and its processes share.
typedef struct {
    int taken, met;  // ranks that rank 0 has answered, and ranks that all have met
    int clock;       // seconds, as rank 0 sees them; 0: by its own clock
    int looks;       // of rank 0 at that clock
} Shared;
static Shared* shared(void) {
    static Shared* s = NULL;
    if (!s) { s = (Shared*)mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); }
    if (s == MAP_FAILED) { exit(1); }
    return s;
}
static void count(int* what) { __atomic_add_fetch(what, 1, __ATOMIC_SEQ_CST); }
static int counted(const int* what) { return __atomic_load_n(what, __ATOMIC_SEQ_CST); }
static bool is_rank_0(void) { return getenv("RANK") && !strcmp(getenv("RANK"), "0"); }

// The clock, which stands still for rank 0 where a test moves it.
static double shared_seconds(void) {
    int moved = is_rank_0() ? counted(&shared()->clock) : 0;
    if (moved) { count(&shared()->looks); }
    return moved ? moved : seconds_now();
}

// The first that another rank hears is that rank 0 has taken it.
static ssize_t counting_recv(int fd, void* data, size_t n, int flags) {
    static bool heard = false;
    ssize_t got = recv(fd, data, n, flags);
    if (got > 0 && !heard && getenv("RANK") && !is_rank_0()) {
        heard = true;
        count(&shared()->taken);
    }
    return got;
}

// A server of names that knows the address of the host "late" from the third question on.
static int late_getaddrinfo(const char* host, const char* service, const struct addrinfo* want,
                            struct addrinfo** found) {
    static int asked = 0;
    if (strcmp(host, "late") && strcmp(host, "never")) { return getaddrinfo(host, service, want, found); }
    if (!strcmp(host, "never")) { return EAI_NONAME; }
    return ++asked > 2 ? getaddrinfo("127.0.0.1", service, want, found) : EAI_NODATA;
}
#define getaddrinfo late_getaddrinfo
#define seconds_now shared_seconds
#define recv counting_recv
#include "mta/ranks.h"
#include "check.h"

#include <ctype.h>
#include <sys/wait.h>

enum { BLOCK = 128 };

// ---- processes

typedef struct {
    pid_t pid;
    int out;  // what it prints
} Child;

// The environment of a launcher and of nothing else: "NAME=VALUE NAME=VALUE".
static void set_environment(const char* variables) {
    char* list = copy_or_die(variables);
    clearenv();
    for (char* one = strtok(list, " "); one; one = strtok(NULL, " ")) {
        char* value = strchr(one, '=');
        *value = 0;
        setenv(one, value + 1, 1);
    }
    free(list);
}

// Runs work in a process of that environment; its output and its errors come to one pipe.
static Child start(void (*work)(const char*), const char* argument, const char* variables) {
    int ends[2];
    fflush(stdout);
    if (pipe2(ends, O_CLOEXEC)) { exit(1); }
    Child c = {fork(), ends[0]};
    if (!c.pid) {
        alarm(PATIENCE);  // a meeting that hangs is a failure of one check
        dup2(ends[1], STDOUT_FILENO);
        dup2(ends[1], STDERR_FILENO);
        set_environment(variables);
        work(argument);
        exit(0);
    }
    close(ends[1]);
    return c;
}

// A test begins that counts, or that moves rank 0's clock; it shows no second 0.
static void begin_counts(int clock) {
    const Shared none = {0, 0, clock, 0};
    *shared() = none;
}
static void move_clock(int seconds) { __atomic_add_fetch(&shared()->clock, seconds, __ATOMIC_SEQ_CST); }

static bool wait_for(const int* what, int n) {
    double end = seconds_now() + PATIENCE;
    while (counted(what) < n && seconds_now() < end) { usleep(1000); }
    return counted(what) >= n;
}

// Has it printed something, or closed its output, within so many milliseconds?
static bool has_said(Child c, int milliseconds) {
    struct pollfd one = {c.out, POLLIN, 0};
    return poll(&one, 1, milliseconds) > 0;
}

// Returns when it stands still.
static void stop(Child c) {
    kill(c.pid, SIGSTOP);
    CHECK(waitpid(c.pid, NULL, WUNTRACED) == c.pid);
}

// Its exit status, or 128 + the signal that ended it; text gets what it printed.
static int ended(Child c, char* text, size_t n) {
    size_t have = 0;
    int status = 0;
    for (ssize_t got = 1; got > 0 && have + 1 < n;) {
        got = read(c.out, text + have, n - 1 - have);
        have += got > 0 ? (size_t)got : 0;
    }
    text[have] = 0;
    close(c.out);
    waitpid(c.pid, &status, 0);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

// ---- the environment

static void print_launch(const char* argument) {
    (void)argument;
    Launch l = launch_read();
    printf("%s %d/%d %d/%d", l.launcher, l.rank, l.size, l.local, l.local_size);
    if (l.size < 2) { return; }
    l.rank = 0;  // no name is looked up
    StartAddress a = launch_address(&l);
    printf(" %s:%d", a.host, ntohs(a.port));
}

static void look_up(const char* argument) {
    (void)argument;
    Launch l = launch_read();
    StartAddress a = launch_address(&l);
    printf("%d address\n", a.addresses);
}

static void expect(const char* variables, int status, const char* wanted) {
    char text[2048];
    int got = ended(start(print_launch, "", variables), text, sizeof text);
    check(got == status && strstr(text, wanted) && (!*wanted || *text), variables, text);
}

static void test_launchers(void) {
    // torchrun: beside the port of its own, on this host where all are.
    expect("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=n1 MASTER_PORT=29500", 0,
           "torchrun 3/4 1/2 n1:29501");
    expect("RANK=3 WORLD_SIZE=4 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4 MASTER_ADDR=n1 MASTER_PORT=29500", 0,
           "torchrun 3/4 3/4 127.0.0.1:29501");
    expect("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=n1 MASTER_PORT=29500 MTA_PORT=7000", 0,
           "n1:7000");
    // Open MPI: alone, and in a job of Slurm, whose step is the one that started mpirun's daemons.
    expect("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2", 0,
           "Open MPI's mpirun 1/2 1/2 127.0.0.1:29533");
    expect("OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4 "
           "SLURM_JOB_NODELIST=n[07-08] SLURM_STEP_NODELIST=n08 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0 MASTER_PORT=90",
           0, "Open MPI's mpirun 5/8 1/4 n07:91");
    expect("OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4", 1,
           "Open MPI's mpirun does not say on which host rank 0 is; wanted MASTER_ADDR=HOST");
    // A name as long as clusters have them.
    expect("RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_PORT=80 MASTER_ADDR=llama-880m-mta-master-0."
           "llama-880m-mta.machine-learning.svc.cluster.example.org",
           0, "llama-880m-mta-master-0.llama-880m-mta.machine-learning.svc.cluster.example.org:81");
    // MPICH.
    expect("PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=3", 0, "MPICH's mpiexec 2/3 2/3 127.0.0.1:29533");
    expect("PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1 MASTER_ADDR=10.0.0.7", 0, "0/1 10.0.0.7:29533");
    // Others that set MPICH's variables, with one of their own for the number on the host: Cray's PALS, Flux; or the
    // user sets it.
    expect("PMI_RANK=3 PMI_SIZE=4 PMI_LOCAL_RANK=1 PMI_LOCAL_SIZE=2 MASTER_ADDR=n1", 0, "3/4 1/2 n1:29533");
    expect("PMI_RANK=3 PMI_SIZE=4 FLUX_TASK_LOCAL_ID=1 MASTER_ADDR=n1", 0, "3/4 1/-1 n1:29533");
    expect("PMI_RANK=3 PMI_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=n1", 0, "3/4 1/-1 n1:29533");
    // Slurm: its steps, not the script of a job, whatever the number of its tasks.
    expect("SLURM_PROCID=9 SLURM_STEP_NUM_TASKS=16 SLURM_NTASKS=16 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=2 "
           "SLURM_STEP_NODELIST=n[01,03],m2 MTA_PORT=7000",
           0, "srun 9/16 1/-1 n01:7000");
    expect("SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=n1 "
           "MASTER_PORT=80",
           0, "srun 1/2 1/-1 127.0.0.1:81");
    expect("SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=6 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=3 "
           "SLURM_STEP_NODELIST=other-[1-2]x,node[001-004,7]",
           0, "srun 5/6 1/-1 other-1x:29533");
    // Where the user orders the hosts, the list is sorted and does not begin with rank 0's.
    expect("SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=6 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=3 SLURM_DISTRIBUTION=arbitrary "
           "SLURM_STEP_NODELIST=n[1-3]",
           1, "srun does not say on which host rank 0 is; wanted MASTER_ADDR=HOST");
    // With --mpi=pmi2 srun gives MPICH's variables too, but not its number on the host.
    expect("PMI_RANK=1 PMI_SIZE=4 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=2 "
           "SLURM_STEP_NODELIST=node[001-002] SLURM_JOB_NODELIST=login,node[001-002]",
           0, "srun 1/4 1/-1 node001:29533");
    expect("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_ID=12 SLURM_JOB_NODELIST=n[1-2]", 0, " 0/1 0/1");
    expect("SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_LOCALID=0", 0, " 0/1 0/1");
    // Several at once: the first that started more than one.
    expect("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=4", 0,
           "torchrun 1/2 1/2");
    expect("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4 MASTER_ADDR=n1", 0, "srun 3/4");
    expect("", 0, "");
    expect("RANK=0 WORLD_SIZE=1", 0, " 0/1 0/1");
}

static void test_refused_variables(void) {
    expect("WORLD_SIZE=two RANK=0", 1, "WORLD_SIZE: got \"two\", wanted a number from 0");
    expect("WORLD_SIZE=2x RANK=0", 1, "WORLD_SIZE: got \"2x\"");
    expect("WORLD_SIZE=-2 RANK=0", 1, "WORLD_SIZE: got \"-2\"");
    expect("PMI_SIZE=2 PMI_RANK=99999999999", 1, "PMI_RANK: got \"99999999999\"");
    expect("WORLD_SIZE=2", 1, "WORLD_SIZE is 2, and RANK is not set; wanted both or neither");
    expect("WORLD_SIZE=2 RANK=2", 1, "RANK is 2 and WORLD_SIZE is 2: they contradict each other");
    expect("WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1", 1, "LOCAL_RANK is 1 of 1 processes: they contradict");
    expect("WORLD_SIZE=2 RANK=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=3", 1, "LOCAL_WORLD_SIZE is 3 and WORLD_SIZE is 2");
    expect("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=1 SLURM_LOCALID=4", 1, "SLURM_LOCALID is 4 of 4 processes");
    expect("WORLD_SIZE=2 RANK=1 MASTER_ADDR=n1 MTA_PORT=70000", 1, "MTA_PORT: got \"70000\", wanted a number from 0");
    expect("WORLD_SIZE=2 RANK=1 MASTER_ADDR=n1 MASTER_PORT=x", 1, "MASTER_PORT: got \"x\"");
}

// The port of a job without one of its own: the same for its ranks, another for another job or step.
static void test_port_of_job(void) {
    const char* const srun = "SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_PROCID=%d SLURM_JOB_ID=%d "
                             "SLURM_STEP_ID=%d";
    const int jobs[][3] = {{0, 77, 0}, {1, 77, 0}, {0, 78, 0}, {0, 77, 1}};
    char text[4][256], variables[256];
    int ports[4];
    for (int i = 0; i < 4; i++) {
        snprintf(variables, sizeof variables, srun, jobs[i][0], jobs[i][1], jobs[i][2]);
        CHECK(ended(start(print_launch, "", variables), text[i], sizeof text[i]) == 0);
        ports[i] = atoi(strrchr(text[i], ':') + 1);
        CHECK(ports[i] >= START_JOB_PORT && ports[i] < START_JOB_PORT + 10000);
    }
    CHECK(ports[0] == ports[1] && ports[0] != ports[2] && ports[0] != ports[3] && ports[2] != ports[3]);
}

// torchrun's agents meet whichever steps and jobs they are of; another run of it is another.
static void print_job(const char* argument) {
    char text[256];
    (void)argument;
    Launch l = launch_read();
    launch_job(&l, text, sizeof text);
    printf("job %s", text);
}
static void test_name_of_job(void) {
    static const char* const others[3] = {"TORCHELASTIC_RUN_ID=a PMIX_NAMESPACE=slurm.pmix.7.0 SLURM_JOB_ID=7",
                                          "TORCHELASTIC_RUN_ID=a PMIX_NAMESPACE=slurm.pmix.8.1 SLURM_JOB_ID=8",
                                          "TORCHELASTIC_RUN_ID=b PMIX_NAMESPACE=slurm.pmix.7.0 SLURM_JOB_ID=7"};
    char text[3][256], variables[256];
    for (int i = 0; i < 3; i++) {
        snprintf(variables, sizeof variables, "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 %s", others[i]);
        CHECK(ended(start(print_job, "", variables), text[i], sizeof text[i]) == 0);
    }
    CHECK(!strcmp(text[0], text[1]) && strcmp(text[0], text[2]) && strlen(text[0]) > strlen("job "));

    // mpirun was called in a job of Slurm's, and started the second process by ssh.
    static const char* const by_ssh[3] = {"PMIX_NAMESPACE=77 SLURM_JOB_ID=7", "PMIX_NAMESPACE=77",
                                          "PMIX_NAMESPACE=78 SLURM_JOB_ID=7"};
    for (int i = 0; i < 3; i++) {
        snprintf(variables, sizeof variables, "OMPI_COMM_WORLD_RANK=%d OMPI_COMM_WORLD_SIZE=2 %s", i % 2, by_ssh[i]);
        CHECK(ended(start(print_job, "", variables), text[i], sizeof text[i]) == 0);
    }
    CHECK(!strcmp(text[0], text[1]) && strcmp(text[0], text[2]) && strlen(text[0]) > strlen("job "));
}

static void print_device(const char* devices) {
    Launch l = launch_read();
    Error e = {{0}};
    int device = -1;
    if (!launch_device(&l, atoi(devices), &device, &e)) { die("%s", e.text); }
    printf("device %d", device);
}
static void test_devices(void) {
    const char* const third = "PMI_RANK=6 PMI_SIZE=8 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=4";
    char text[1024];
    CHECK(ended(start(print_device, "8", third), text, sizeof text) == 0 && !strcmp(text, "device 2"));
    CHECK(ended(start(print_device, "1", third), text, sizeof text) == 0 && !strcmp(text, "device 0"));
    CHECK(ended(start(print_device, "2", third), text, sizeof text) == 1 &&
          strstr(text, "it is process 2 of this host, counted from 0, which has 2 GPUs; wanted one for each"));
    CHECK(ended(start(print_device, "2", "PMI_RANK=6 PMI_SIZE=8"), text, sizeof text) == 1 &&
          strstr(text, "LOCAL_RANK"));
}

// ---- the meeting

static int free_port(void) {
    struct sockaddr_in any;
    socklen_t length = sizeof any;
    memset(&any, 0, sizeof any);
    any.sin_family = AF_INET;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(fd, (struct sockaddr*)&any, sizeof any) || getsockname(fd, (struct sockaddr*)&any, &length)) { exit(1); }
    close(fd);
    return ntohs(any.sin_port);
}

// The host of a rank, and what it is told in libc's place: NODE=N as if so many ranks had one of their own.
static const char* host_of(int rank) {
    static char name[32];
    const char* node = getenv("NODE");
    snprintf(name, sizeof name, "host%d", node ? rank / atoi(node) : 0);
    return name;
}
int gethostname(char* name, size_t n) {
    const char* rank = getenv("RANK");
    snprintf(name, n, "%s", host_of(rank ? atoi(rank) : 0));
    return 0;
}

// A rank that meets the others, and what it does then: "WHEN DEVICE THEN", where WHEN is milliseconds or late (see
// start_ranks) and THEN is bye, stay, hasty (it stays, with the shortest --rank-timeout) or die, when all have met;
// cannot: it comes with a mistake.
static void meet(const char* argument) {
    static Ranks r;
    StartMistake mistake = {0, {{0}}};
    char when[32], device[32], then[32], block[BLOCK], wanted[BLOCK];
    sscanf(argument, "%31s %31s %31s", when, device, then);
    usleep((useconds_t)atoi(when) * 1000);
    Launch l = launch_read();
    StartAddress a = launch_address(&l);
    memset(wanted, 7, BLOCK);
    memset(block, l.rank ? 0 : 7, BLOCK);
    r.rank = l.rank, r.size = l.size;
    if (!strcmp(then, "cannot")) {
        mistake.status = 3;
        fail(&mistake.why, "it has no GPU");
    }
    ranks_join(&r, &a, strcmp(device, "-") ? device : "", &mistake, block, BLOCK);
    if (memcmp(block, wanted, BLOCK)) { _exit(9); }
    for (int p = 0; p < r.size; p++) {
        if (strcmp(r.watch.peers[p].host, host_of(p))) { _exit(9); }
    }
    if (!strcmp(then, "hasty")) { ranks_limit(&r, WATCH_LEAST); }
    count(&shared()->met);
    if (!strcmp(then, "die") && wait_for(&shared()->met, r.size)) { raise(SIGKILL); }
    if (!strcmp(then, "stay") || !strcmp(then, "hasty")) { pause(); }
    watch_stop(&r.watch);
    _exit(0);
}

static const char* variables_of(int rank, int size, int port) {
    static char out[4][256];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(out[turn], sizeof out[turn],
             "RANK=%d WORLD_SIZE=%d LOCAL_RANK=%d LOCAL_WORLD_SIZE=%d MTA_PORT=%d MTA_START_SECONDS=%d", rank, size,
             rank, size, port, LIMIT);
    return out[turn];
}

// Ranks as torchrun starts them; those whose argument is NULL do not come, one that is late comes when rank 0 has said
// why it refuses.
static void start_ranks(Child* children, int size, const char* const* arguments) {
    int port = free_port();
    for (int p = 0; p < size; p++) {
        children[p].pid = 0;
        if (!arguments[p]) { continue; }
        if (!strncmp(arguments[p], "late ", 5)) { has_said(children[0], 1000 * PATIENCE); }
        children[p] = start(meet, arguments[p], variables_of(p, size, port));
    }
}

static void test_meeting(void) {
    const char* const late_root[] = {"200 gpu-a bye", "0 gpu-b bye", "400 gpu-c bye", "0 - bye"};
    Child children[4];
    char text[2048];
    start_ranks(children, 4, late_root);
    for (int p = 0; p < 4; p++) {
        int status = ended(children[p], text, sizeof text);
        check(status == 0 && !*text, "four ranks meet, rank 0 not the first", text);
    }
}

// The limit counts from who came last: that all together take longer than it is no mistake.
static void test_limit_of_each(void) {
    Child children[4];
    char text[2048];
    int port = free_port();
    begin_counts(1);
    children[0] = start(meet, "0 - bye", variables_of(0, 4, port));
    for (int p = 1; p < 4; p++) {
        move_clock(LIMIT * 9 / 10);
        children[p] = start(meet, "0 - bye", variables_of(p, 4, port));
        CHECK(wait_for(&shared()->taken, p));
    }
    for (int p = 0; p < 4; p++) {
        int status = ended(children[p], text, sizeof text);
        check(status == 0 && !*text, "each comes within the limit after the one before", text);
    }
    begin_counts(0);
}

// Rank 0 has printed one line that holds `wanted`, and the others nothing; all end with `status`.
static void check_refused(const Child* children, int size, int status, const char* wanted) {
    char text[2048];
    for (int p = 0; p < size; p++) {
        if (!children[p].pid) { continue; }
        int got = ended(children[p], text, sizeof text);
        bool good = p ? !*text : strstr(text, wanted) && strchr(text, '\n') == text + strlen(text) - 1;
        char detail[2200];
        snprintf(detail, sizeof detail, "rank %d, status %d: %s", p, got, text);
        check(got == status && good, wanted, detail);
    }
}

// Nobody waits for who comes last, nor for the limit.
static void test_refused_ranks(void) {
    const char* const one_device[] = {"0 gpu-a bye", "0 gpu-a bye", "late gpu-b bye"};
    const char* const one_cannot[] = {"0 - bye", "0 - cannot", "late - bye"};
    const char* const root_cannot[] = {"100 - cannot", "0 - bye", "late - cannot"};
    Child children[3];
    start_ranks(children, 3, one_device);
    check_refused(children, 3, 1, "are on one GPU, gpu-a; wanted one for each\n");
    start_ranks(children, 3, one_cannot);
    check_refused(children, 3, 3, "): it has no GPU\n");
    start_ranks(children, 3, root_cannot);
    check_refused(children, 3, 3, "rank 0 (");
}

// Some do not come: rank 0 tells those that have.
static void test_missing_ranks(void) {
    const char* const missing[] = {"0 - bye", "0 - bye", NULL, NULL};
    char wanted[128];
    Child children[4];
    begin_counts(1);
    start_ranks(children, 4, missing);
    CHECK(wait_for(&shared()->taken, 1));
    for (int i = 0; i < 100 * PATIENCE && !has_said(children[0], 10); i++) { move_clock(LIMIT + 1); }
    snprintf(wanted, sizeof wanted, ", then none within %d s; missing 2, 3; MTA_START_SECONDS=N waits longer\n", LIMIT);
    check_refused(children, 4, EXIT_RANK_LOST, wanted);
    begin_counts(0);
}

static void test_rank_twice(void) {
    int port = free_port();
    Child root = start(meet, "0 - bye", variables_of(0, 3, port)),
          one = start(meet, "0 - bye", variables_of(1, 3, port)),
          again = start(meet, "0 - bye", variables_of(1, 3, port));
    char text[2048];
    CHECK(ended(root, text, sizeof text) == 1);
    check(strstr(text, "rank 1 came twice: from ") && strstr(text, " (process "), "a rank twice", text);
    CHECK(ended(one, text, sizeof text) == 1 && !*text);
    CHECK(ended(again, text, sizeof text) == 1 && !*text);
}

// A rank of the version that its argument says.
static void meet_as(const char* version) {
    Watch w;
    WatchPeer peers[4];
    memset(&w, 0, sizeof w);
    Launch l = launch_read();
    StartAddress a = launch_address(&l);
    const StartMistake none = {0, {{0}}};
    w.rank = l.rank, w.size = l.size, w.peers = peers;
    start_meet(&w, &a, -1, version, "", &none, NULL, 0);
}
static void test_other_version_or_size(void) {
    const struct {
        const char *version, *wanted;
        int size;
    } odd[] = {{"0.0.0", ") is of version 0.0.0, rank 0 (", 2},
               {MTA_VERSION, ") was started as one of 3, rank 0 (", 3}};
    char text[2048];
    for (int i = 0; i < 2; i++) {
        int port = free_port();
        Child root = start(meet, "0 - bye", variables_of(0, 2, port)),
              other = start(meet_as, odd[i].version, variables_of(1, odd[i].size, port));
        CHECK(ended(root, text, sizeof text) == 1);
        check(strstr(text, "rank 1 (") && strstr(text, odd[i].wanted), odd[i].wanted, text);
        CHECK(ended(other, text, sizeof text) == 1 && !*text);
    }
}

// A connection to rank 0, which may not listen yet.
static int connect_to(int port) {
    int fd = -1;
    for (double end = seconds_now() + PATIENCE; fd < 0 && seconds_now() < end;) {
        fd = start_connect(htonl(INADDR_LOOPBACK), htons((uint16_t)port));
        if (fd < 0) { usleep(10000); }
    }
    return fd;
}

// Does the other side hang up, without a word?
static bool hangs_up(int fd) {
    struct pollfd one = {fd, POLLIN, 0};
    char byte;
    return poll(&one, 1, 1000 * PATIENCE) > 0 && recv(fd, &byte, 1, 0) <= 0;
}

// Who is no rank of this run is sent away, and the run meets all the same: one that says something else, one that
// leaves at once, and a rank of another job.
static void test_strangers(void) {
    int port = free_port();
    char text[2048], junk[sizeof(StartHello)];
    Child root = start(meet, "0 - bye", variables_of(0, 2, port));
    memset(junk, 'x', sizeof junk);
    for (int i = 0; i < 3; i++) {
        int fd = connect_to(port);
        if (i == 1) { memcpy(junk, START_MAGIC, sizeof START_MAGIC); }  // the cookie is wrong
        if (i < 2) { start_send(fd, junk, sizeof junk); }
        if (i < 2) { CHECK(hangs_up(fd)); }
        close(fd);
    }
    Child other = start(meet, "0 - bye", variables_of(1, 2, port));
    check(ended(root, text, sizeof text) == 0 && !*text, "strangers come first", text);
    check(ended(other, text, sizeof text) == 0 && !*text, "strangers come first", text);

    // The next run can have the port at once, though the system remembers connections that rank 0 has closed.
    root = start(meet, "0 - bye", variables_of(0, 2, port));
    other = start(meet, "0 - bye", variables_of(1, 2, port));
    check(ended(root, text, sizeof text) == 0 && !*text, "the same port again", text);
    check(ended(other, text, sizeof text) == 0 && !*text, "the same port again", text);
}

// Strangers that stay connected and say nothing, or only begin to, keep no rank waiting: the ranks meet while rank 0's
// clock, by which it sends silent ones away, stands still.
static void test_silent_strangers(void) {
    enum { STRANGERS = 40 };
    int port = free_port(), silent[STRANGERS];
    char text[2048];
    begin_counts(1);
    Child root = start(meet, "0 - bye", variables_of(0, 2, port));
    for (int i = 0; i < STRANGERS; i++) {
        silent[i] = connect_to(port);
        if (i % 2) { start_send(silent[i], START_MAGIC, 5); }
    }
    Child other = start(meet, "0 - bye", variables_of(1, 2, port));
    check(ended(root, text, sizeof text) == 0 && !*text, "strangers that are silent", text);
    check(ended(other, text, sizeof text) == 0 && !*text, "strangers that are silent", text);
    for (int i = 0; i < STRANGERS; i++) { close(silent[i]); }
    begin_counts(0);
}

// All ranks but rank 0, in one process; they leave when rank 0 says goodbye.
static void come_as_crowd(const char* argument) {
    (void)argument;
    Launch l = launch_read();
    StartAddress a = launch_address(&l);
    struct rlimit files;
    StartHello mine;
    StartAnswer taken;
    char block[BLOCK];
    int* fds = (int*)alloc_or_die((size_t)l.size, sizeof(int), "connections");
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    memset(&mine, 0, sizeof mine);
    memcpy(mine.magic, START_MAGIC, sizeof mine.magic);
    snprintf(mine.version, sizeof mine.version, "%s", MTA_VERSION);
    gethostname(mine.host, sizeof mine.host - 1);
    mine.cookie = a.cookie, mine.size = l.size;
    for (mine.rank = 1; mine.rank < l.size; mine.rank++) {
        int* fd = &fds[mine.rank];
        do {  // again where this process stood still between the two, for so long that rank 0 has sent it away
            *fd = connect_to(ntohs(a.port));
            start_send(*fd, &mine, sizeof mine);
        } while (!start_receive(*fd, &taken, sizeof taken, seconds_now() + PATIENCE));
    }
    Watch w;
    memset(&w, 0, sizeof w);
    w.size = l.size, w.peers = (WatchPeer*)alloc_or_die((size_t)l.size, sizeof(WatchPeer), "ranks");
    for (w.rank = 1; w.rank < l.size; w.rank++) {
        w.peers[0].fd = fds[w.rank];
        if (!start_await(&w, block, BLOCK) || block[BLOCK - 1] != 7) { _exit(6); }
    }
    for (int p = 1; p < l.size; p++) {
        while (start_receive(fds[p], block, 1, seconds_now() + PATIENCE)) {}
        close(fds[p]);
    }
    _exit(0);
}
static void test_crowd(void) {
    struct rlimit files;
    char text[2048];
    getrlimit(RLIMIT_NOFILE, &files);
    int port = free_port(), size = files.rlim_max > 1100 ? 1000 : (int)files.rlim_max - 50;
    double began = seconds_now();
    Child root = start(meet, "0 - bye", variables_of(0, size, port)),
          others = start(come_as_crowd, "", variables_of(1, size, port));
    check(ended(root, text, sizeof text) == 0 && !*text, "a thousand ranks", text);
    CHECK(ended(others, text, sizeof text) == 0);
    printf("%d ranks met and parted in %.1f s\n", size, seconds_now() - began);
}

// A rank that comes and is gone before all have.
static void come_and_go(const char* argument) {
    (void)argument;
    Watch w;
    WatchPeer peers[4];
    StartHello mine;
    Launch l = launch_read();
    StartAddress a = launch_address(&l);
    memset(&w, 0, sizeof w);
    memset(&mine, 0, sizeof mine);
    memcpy(mine.magic, START_MAGIC, sizeof mine.magic);
    snprintf(mine.version, sizeof mine.version, "%s", MTA_VERSION);
    mine.cookie = a.cookie, mine.rank = w.rank = l.rank, mine.size = w.size = l.size, w.peers = peers;
    start_reach(&w, &a, &mine, NULL);
    raise(SIGKILL);
}
static void test_lost_before_all_have_come(void) {
    char text[2048];
    int port = free_port();
    Child root = start(meet, "0 - bye", variables_of(0, 3, port)),
          gone = start(come_and_go, "", variables_of(2, 3, port));
    CHECK(ended(gone, text, sizeof text) == 128 + SIGKILL);
    CHECK(has_said(root, 1000 * PATIENCE));
    Child late = start(meet, "0 - bye", variables_of(1, 3, port));
    CHECK(ended(root, text, sizeof text) == EXIT_RANK_LOST);
    check(strstr(text, "rank 2 (") && strstr(text, ") was lost at the start\n"), "a rank comes and is killed", text);
    CHECK(ended(late, text, sizeof text) == EXIT_RANK_LOST && !*text);
}

// Rank 0 has a connection to each rank: more than a user's programs have by default.
static void meet_with_few_files(const char* argument) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = 6;
    setrlimit(RLIMIT_NOFILE, &files);
    meet(argument);
}
static void test_few_files(void) {
    char text[2048];
    int port = free_port();
    Child root = start(meet_with_few_files, "0 - bye", variables_of(0, 4, port)), others[3];
    for (int p = 1; p < 4; p++) { others[p - 1] = start(meet, "0 - bye", variables_of(p, 4, port)); }
    int status = ended(root, text, sizeof text);
    check(status == 0 && !*text, "more ranks than open files by default", text);
    for (int p = 1; p < 4; p++) { CHECK(ended(others[p - 1], text, sizeof text) == 0); }
}

// Where even the most that this user may have is too little, all end at once, also those that are not let in.
static void meet_with_too_few_files(const char* argument) {
    struct rlimit files;
    int next = dup(STDIN_FILENO);
    close(next);
    files.rlim_cur = files.rlim_max = (rlim_t)next + 2;  // to listen, and for one of three
    setrlimit(RLIMIT_NOFILE, &files);
    meet(argument);
}
static void test_too_few_files(void) {
    char text[2048];
    int port = free_port();
    Child root = start(meet_with_too_few_files, "0 - bye", variables_of(0, 4, port)), others[3];
    for (int p = 1; p < 4; p++) { others[p - 1] = start(meet, "0 - bye", variables_of(p, 4, port)); }
    CHECK(ended(root, text, sizeof text) == 1);
    check(!strcmp(strchr(text, ' ') ? strchr(text, ' ') : "", " ranks: too many open files; ulimit -n N allows more\n"),
          "more ranks than a user may have open files", text);
    for (int p = 1; p < 4; p++) { CHECK(ended(others[p - 1], text, sizeof text) == 1 && !*text); }
}

// More ranks than a rank may have open files: it hears all the same that another is lost.
static void test_more_ranks_than_files(void) {
    enum { RANKS = 16 };
    char text[2048];
    int port = free_port();
    Child children[RANKS];
    begin_counts(0);
    for (int p = 0; p < RANKS; p++) {
        children[p] = start(p == 1 ? meet_with_too_few_files : meet, p == 9 ? "0 - die" : "0 - stay",
                            variables_of(p, RANKS, port));
    }
    for (int p = 0; p < RANKS; p++) {
        int wanted = p == 9 ? 128 + SIGKILL : EXIT_RANK_LOST, got = ended(children[p], text, sizeof text);
        check(got == wanted, "more ranks than open files", text);
    }
}

// A cluster may name rank 0's host later than it starts this one.
static void test_host_that_is_named_later(void) {
    char text[2048];
    const char* const late = "WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 LOCAL_RANK=0 RANK=1 MASTER_ADDR=%s MTA_START_SECONDS=%d";
    for (int i = 0; i < 2; i++) {
        char variables[256];
        snprintf(variables, sizeof variables, late, i ? "never" : "late", i ? 1 : LIMIT);
        int got = ended(start(look_up, "", variables), text, sizeof text);
        check(strstr(text, "rank 1: ") && strstr(text, ", the host of rank 0: ") && strstr(text, "; asking again for "),
              "a host that is not known yet is said", text);
        check(i ? got == 1 && strstr(text, "rank 1: never, the host of rank 0: ") != NULL
                : got == 0 && strstr(text, "1 address\n") != NULL,
              "a host that is named later, and one that never is", text);
    }
}

// The meeting is over IPv4.
static void test_no_such_host(void) {
    char text[2048];
    Child one =
        start(meet, "0 - bye", "RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=::1 MTA_PORT=9");
    CHECK(ended(one, text, sizeof text) == 1);
    check(strstr(text, "rank 1: ::1, the host of rank 0: ") && strstr(text, "; wanted a name or an address of IPv4\n"),
          "a host that has IPv6 alone", text);
}

static void test_lost(void) {
    char text[2048];
    char variables[300];
    int port = free_port();

    // Rank 0 never comes. The last value of a variable holds.
    snprintf(variables, sizeof variables, "%s MTA_START_SECONDS=1", variables_of(1, 2, port));
    Child one = start(meet, "0 - bye", variables);
    CHECK(ended(one, text, sizeof text) == EXIT_RANK_LOST);
    check(strstr(text, "): rank 0 was not reached at 127.0.0.1:"), "rank 0 never comes", text);

    // It ends while it waits for the third.
    begin_counts(0);
    Child root = start(meet, "0 - bye", variables_of(0, 3, port));
    one = start(meet, "0 - bye", variables_of(1, 3, port));
    CHECK(wait_for(&shared()->taken, 1));
    kill(root.pid, SIGKILL);
    CHECK(ended(root, text, sizeof text) == 128 + SIGKILL);
    CHECK(ended(one, text, sizeof text) == EXIT_RANK_LOST);
    check(strstr(text, "rank 0 (127.0.0.1) was lost at the start"), "rank 0 is killed where ranks meet", text);

    // A rank is killed when all have met: the watch has the connection.
    const char* const arguments[] = {"0 - stay", "0 - die", "0 - stay"};
    Child children[3];
    begin_counts(0);
    start_ranks(children, 3, arguments);
    CHECK(ended(children[1], text, sizeof text) == 128 + SIGKILL);
    CHECK(ended(children[0], text, sizeof text) == EXIT_RANK_LOST);
    check(strstr(text, "rank 1 (") && strstr(text, "was lost at the start; all ranks end"), "a rank is killed", text);
    CHECK(ended(children[2], text, sizeof text) == EXIT_RANK_LOST && !*text);
}

// A whole host is lost, with rank 0: the first rank of another host says so, and only that.
static void test_a_host_is_lost(void) {
    char text[2048], variables[300];
    int port = free_port();
    Child children[6];
    begin_counts(0);
    for (int p = 0; p < 6; p++) {
        snprintf(variables, sizeof variables, "%s NODE=2", variables_of(p, 6, port));
        children[p] = start(meet, "0 - stay", variables);
    }
    CHECK(wait_for(&shared()->met, 6));
    for (int p = 0; p < 2; p++) { stop(children[p]); }  // none of the two is to see the other's end
    for (int p = 0; p < 2; p++) { kill(children[p].pid, SIGKILL); }
    for (int p = 0; p < 6; p++) {
        int got = ended(children[p], text, sizeof text);
        bool good = p == 2 ? strstr(text, "rank 0 (host0) was lost at the start; all ranks end") != NULL : !*text;
        check(got == (p < 2 ? 128 + SIGKILL : EXIT_RANK_LOST) && good, "a host is lost", text);
    }
}

// Lets rank 0's watch see a second pass, or several at once, until it ends.
static void pass(Child root, int seconds) {
    int looks = counted(&shared()->looks);
    double end = seconds_now() + PATIENCE;
    move_clock(seconds);
    while (counted(&shared()->looks) < looks + 3 && !has_said(root, 1) && seconds_now() < end) {}
}

// Where the whole machine has stood still, nobody was silent; where one rank does, it was.
static void test_who_stands_still(void) {
    const char* const arguments[] = {"0 - hasty", "0 - hasty"};
    char text[2048];
    Child children[2];
    begin_counts(1);
    start_ranks(children, 2, arguments);
    CHECK(wait_for(&shared()->met, 2));
    pass(children[0], 1);
    stop(children[1]);
    pass(children[0], WATCH_LEAST + 1);
    CHECK(!has_said(children[0], 0));
    for (int i = 0; i < 2 * WATCH_LEAST && !has_said(children[0], 0); i++) { pass(children[0], 1); }
    kill(children[1].pid, SIGKILL);
    CHECK(ended(children[0], text, sizeof text) == EXIT_RANK_LOST);
    check(strstr(text, "rank 1 (") && strstr(text, ") is silent since it was at the start; "), "one stands still",
          text);
    CHECK(ended(children[1], text, sizeof text) == 128 + SIGKILL && !*text);
    begin_counts(0);
}

// ---- who has what

// Blocks of an arena of n elements: each of one rank, side by side there, in the order of ranks_own_block; none has
// more than the first; all parts together, made equal, are not much more.
static void check_owners(int size, int node, size_t n) {
    Ranks r;
    size_t* had = (size_t*)alloc_or_die((size_t)size, sizeof *had, "elements of ranks");
    char what[80];
    bool good = true;
    memset(&r, 0, sizeof r);
    r.size = size, r.node = node;
    for (size_t at = 0; at < n; at += RANKS_BLOCK) {
        Stretch s = ranks_stretch(&r, n, at, at + RANKS_BLOCK < n ? at + RANKS_BLOCK : n);
        r.rank = s.rank;
        good = good && s.end == (at + RANKS_BLOCK < n ? at + RANKS_BLOCK : n) && s.local == had[s.rank] &&
               ranks_own_block(&r, n, s.local / RANKS_BLOCK) == at;
        had[s.rank] += s.end - at;
    }
    for (r.rank = 0; r.rank < size; r.rank++) {
        good = good && had[r.rank] <= had[0] &&
               ranks_own_blocks(&r, n) == (had[r.rank] + RANKS_BLOCK - 1) / RANKS_BLOCK &&
               ranks_in_place(&r, ranks_place(&r, r.rank)) == r.rank;
    }
    good = good && had[0] == ranks_most_elements(size, n) && ranks_padded(size, n) >= n &&
           ranks_padded(size, n) < n + (size_t)size * RANKS_BLOCK;
    snprintf(what, sizeof what, "who has what: %d ranks, %d of a host, %zu elements", size, node, n);
    check(good, what, "");
    free(had);
}
static void test_owners(void) {
    const size_t sizes[] = {1, 65536, 65537, 33554432, 33554433, 876563136, 1500000064};
    const int ranks[][2] = {{1, 1}, {2, 2}, {3, 1}, {6, 2}, {12, 4}, {32, 8}, {96, 8}, {512, 8}, {1024, 8}, {4096, 4}};
    for (size_t i = 0; i < sizeof ranks / sizeof ranks[0]; i++) {
        for (size_t j = 0; j < sizeof sizes / sizeof sizes[0]; j++) {
            check_owners(ranks[i][0], ranks[i][1], sizes[j]);
        }
    }
}

static void test_taken_port(void) {
    StartAddress any;
    char text[2048];
    memset(&any, 0, sizeof any);
    int fd = start_listen(&any);
    CHECK(any.addresses > 0 && any.port && any.host[0]);
    Child root = start(meet, "0 - bye", variables_of(0, 2, ntohs(any.port)));
    CHECK(ended(root, text, sizeof text) == 1);
    check(strstr(text, "cannot listen for the other ranks at port ") && strstr(text, "; MTA_PORT=N chooses another"),
          "a port that is taken", text);
    close(fd);
}

int main(void) {
    test_launchers();
    test_refused_variables();
    test_port_of_job();
    test_name_of_job();
    test_devices();
    test_meeting();
    test_limit_of_each();
    test_refused_ranks();
    test_missing_ranks();
    test_rank_twice();
    test_other_version_or_size();
    test_strangers();
    test_silent_strangers();
    test_crowd();
    test_lost();
    test_lost_before_all_have_come();
    test_few_files();
    test_too_few_files();
    test_more_ranks_than_files();
    test_host_that_is_named_later();
    test_no_such_host();
    test_taken_port();
    test_a_host_is_lost();
    test_who_stands_still();
    test_owners();
    return test_verdict();
}
