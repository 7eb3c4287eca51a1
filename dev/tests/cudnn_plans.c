// cudnn_plans.c: builds cuDNN's plans for attention with mta/attention_cudnn.h's own code and the real library, for a
// GPU that a JSON text describes, on a machine that has none (dev/tests/test_cudnn.py makes a driver for it that does
// nothing). Reads shapes "B NH T HS VS" from standard input; prints a line for each and each direction.
//   cudnn_plans DEVICE.json < shapes
#define MTA_CUDNN
#include "mta/attention_cudnn.h"

static void report(AttentionCudnn* c, const AttentionShape* s, bool backward) {
    Error e = {{0}};
    const CudnnPlan* plan = attention_cudnn_plan(c, s, backward, &e);
    printf("%s %d %d %d %d %d ", backward ? "backward" : "forward", s->B, s->NH, s->T, s->HS, s->VS);
    if (plan) {
        printf("workspace %zu of %zu\n", plan->workspace, attention_cudnn_workspace(s));
    } else {
        printf("refused %s\n", e.text);
    }
    fflush(stdout);
}

int main(int argc, char** argv) {
    char* device = NULL;
    size_t n = 0;
    Error e = {{0}};
    AttentionShape s = {0, 0, 0, 0, 0, 0.1f};
    static AttentionCudnn c;
    if (argc != 2 || !read_file(argv[1], 1 << 20, &device, &n, &e)) {
        die("cudnn_plans: wanted DEVICE.json %s", e.text);
    }
    if (cudnnBackendCreateDescriptor(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &c.device) != CUDNN_STATUS_SUCCESS ||
        cudnnBackendSetAttribute(c.device, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, (int64_t)n,
                                 device) != CUDNN_STATUS_SUCCESS ||
        cudnnBackendFinalize(c.device) != CUDNN_STATUS_SUCCESS) {
        die("cudnn_plans: cuDNN %zu does not take the description of a device", cudnnGetVersion());
    }
    printf("cuDNN %zu\n", cudnnGetVersion());
    while (scanf("%d %d %d %d %d", &s.B, &s.NH, &s.T, &s.HS, &s.VS) == 5) {
        report(&c, &s, false);
        report(&c, &s, true);
    }
    attention_cudnn_close(&c);
    free(device);
    return 0;
}
