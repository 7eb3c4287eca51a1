# mta.c: `make help` lists the targets and what was found. A C compiler suffices; a CBLAS and the CUDA toolkit are used
# where they are here.

# ARCH: this machine's own instructions, where the compiler makes code for this machine: CC=aarch64-linux-gnu-gcc alone
# compiles for that one.
# 512-bit vectors where there are any: the compiler's default of 256 halves the rate of softmax and SwiGLU.
HOST := $(shell uname -m)
WIDE = $(if $(filter x86_64,$(HOST)),-mprefer-vector-width=512)
ARCH ?= $(if $(filter $(HOST)-%,$(shell $(CC) -dumpmachine)),-march=native $(WIDE))
OPT ?= -O3
# psabi: gcc notes that vectors as arguments changed their ABI once; infer_mta.c passes them between its own functions
# only.
WARN = -Wall -Wextra -Wno-psabi $(if $(WERROR),-Werror)
# No -ffast-math: masks use infinities, guards use isfinite. What is given up here is errno and floating-point traps, no
# value changes.
MATH = -fno-math-errno -fno-trapping-math
OPENMP ?= -fopenmp
VERSION_FLAG = -DMTA_VERSION='"$(shell cat VERSION)"'
# -g1: the names and lines of a backtrace and of a profile; a debugger wants OPT='-O0 -g'. Whole debug information takes
# a quarter of the compiler's time.
CFLAGS = -std=gnu11 -g1 $(OPT) $(ARCH) $(WARN) $(MATH) $(OPENMP) $(VERSION_FLAG)
LDLIBS = -lm

# A CBLAS for the CPU's matrix products: OpenBLAS by pkg-config or by trying to link. NO_CBLAS=1: the plain OpenMP
# product of train_mta.c.
ifndef NO_CBLAS
BLAS_CFLAGS := $(shell pkg-config --cflags openblas 2>/dev/null)
BLAS_LIBS := $(shell pkg-config --libs openblas 2>/dev/null || echo -lopenblas)
BLAS := $(shell echo 'int main(void){return cblas_sgemm == 0;}' | \
    $(CC) -include cblas.h -x c - $(BLAS_CFLAGS) $(BLAS_LIBS) -o /dev/null 2>/dev/null && \
    echo -DMTA_CBLAS $(BLAS_CFLAGS))
BLAS_LINK := $(if $(BLAS),$(BLAS_LIBS))
endif

# oneDNN 2 (libdnnl-dev) for the CPU trainer's products in bf16, --matmul bf16. NO_ONEDNN=1: without.
ifndef NO_ONEDNN
ONEDNN := $(shell echo 'int main(void){return dnnl_matmul_desc_init == 0;}' | \
    $(CC) -include oneapi/dnnl/dnnl.h -x c - -ldnnl -o /dev/null 2>/dev/null && echo -DMTA_ONEDNN)
ONEDNN_LINK := $(if $(ONEDNN),-ldnnl)
endif

# MPI=1: the CPU trainer on several processes (Debian: libopenmpi-dev, or libmpich-dev). MPICC=mpicc.mpich: another MPI.
MPICC ?= mpicc
MPI_CC = OMPI_CC='$(CC)' MPICH_CC='$(CC)' $(MPICC)

# The CUDA trainer: NVCC_ARCH=sm_80|sm_90a|sm_100, PRECISION=BF16|FP32, DEBUG_SYNC=1 waits after every kernel.
NVCC ?= nvcc
NVCC_ARCH ?= sm_90a
# Code for that architecture alone: -arch=sm_90a would also compile to PTX, in twice the time, which another GPU would
# take without a word.
NVCC_CODE = $(if $(filter sm_%,$(NVCC_ARCH)),-gencode=arch=$(NVCC_ARCH:sm_%=compute_%)$(,)code=$(NVCC_ARCH),\
    -arch=$(NVCC_ARCH))
PRECISION ?= BF16
CUDA_DEFINES = $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32) $(if $(DEBUG_SYNC),-DDEBUG_SYNC)
NVCCFLAGS = -std=c++17 -O3 -Xcompiler -Wall,-Wextra,-fopenmp $(VERSION_FLAG) $(NCCL)

# NCCL for several GPUs, where it compiles and links; looked for once, when nvcc is needed. NO_NCCL=1: without.
NCCL = $(eval NCCL := $(if $(NO_NCCL),,$(shell f=$$(mktemp) && echo 'int main() { return ncclGetVersion == 0; }' | \
    $(NVCC) -include nccl.h -x c++ - -lnccl -o $$f 2>/dev/null && echo -DMTA_NCCL; rm -f $$f)))$(NCCL)

# CUDNN=1: with attention by cuDNN, --attention-kernels cudnn. CUDNN_HOME: a folder with include/cudnn.h, and the
# library in lib64 or lib, as the toolkit's may be, or nvidia/cudnn of the Python package nvidia-cudnn-cu13.
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v $(NVCC))))
ifndef CUDNN_HOME
CUDNN_HOME := $(patsubst %/include/cudnn.h,%,$(firstword $(wildcard $(addsuffix /include/cudnn.h,\
    $(CUDA_HOME) /usr /usr/local dev/.venv/lib/python3*/site-packages/nvidia/cudnn))))
endif
CUDNN_LIBRARIES = $(abspath $(patsubst %/libcudnn.so.9,%,$(wildcard $(addsuffix /libcudnn.so.9,\
    $(CUDNN_HOME)/lib64 $(CUDNN_HOME)/lib))))
CUDNN_DEFINES = -DMTA_CUDNN -I$(CUDNN_HOME)/include
CUDNN_LINK = $(CUDNN_LIBRARIES:%=-L%) -l:libcudnn.so.9 $(CUDNN_LIBRARIES:%=-Xlinker -rpath -Xlinker %)
ifdef CUDNN
CUDA_DEFINES += $(if $(CUDNN_HOME),$(CUDNN_DEFINES),\
    $(error CUDNN=1: no cudnn.h found, wanted CUDNN_HOME=FOLDER with include/cudnn.h and lib))
endif
CUDA_LINK = -lcublas $(if $(NCCL),-lnccl) $(if $(CUDNN),$(CUDNN_LINK))

.PHONY: all help check test clean
all: train_mta infer_mta test_mta

help:
	@echo "make train_mta        CPU trainer; MPI=1: for several processes, started by mpirun, mpiexec or srun"
	@echo "make infer_mta        CPU inference: prompt, stream, score"
	@echo "make train_mta_cuda   CUDA trainer: NVCC_ARCH=sm_80|sm_90a|sm_100, PRECISION=BF16|FP32,"
	@echo "                      DEBUG_SYNC=1 (waits after every kernel),"
	@echo "                      CUDNN=1 (cuDNN's attention for --attention-kernels cudnn; CUDNN_HOME=FOLDER: its place)"
	@echo "make test_mta         tests of the CPU trainer; one of them: ./test_mta --only TEXT"
	@echo "make test_mta_cuda    tests of the CUDA trainer on a GPU; ./test_mta_cuda --compare DIR: gradients, CPU and GPU"
	@echo "make check            the quick tests, about a minute and a half: before each commit"
	@echo "make test             scripts/test.sh: every test; one of them: scripts/test.sh --only TEXT"
	@echo "make help_dev         what else there is for development: emulator, sanitizers, benches (dev/dev.mk)"
	@echo "variables: CC, ARCH, OPT=-O3, NO_CBLAS=1, NO_ONEDNN=1, MPI=1, MPICC=mpicc, NO_NCCL=1, WERROR=1, NVCC"
	@echo "found: compiler       $(CC), $(shell $(CC) -dumpmachine), $(or $(ARCH),its default instructions)"
	@echo "       CBLAS          $(if $(BLAS),$(BLAS_LINK),none: plain OpenMP products)"
	@echo "       oneDNN         $(or $(ONEDNN_LINK),none: no --matmul bf16 on the CPU (Debian: libdnnl-dev))"
	@echo "       MPI            $(or $(shell command -v $(MPICC)),none: no MPI=1 here)"
	@echo "       CUDA toolkit  " \
	    "$(or $(shell $(NVCC) --version 2>/dev/null | grep -o 'release [0-9.]*'),none: no train_mta_cuda here)"
	@echo "       cuDNN          $(or $(CUDNN_HOME),none: no CUDNN=1 here (Python package nvidia-cudnn-cu13))"
	@echo "       NCCL           $(if $(NCCL),-lnccl,none: train_mta_cuda is for one GPU here)"

train_mta: build/$(if $(MPI),mpi/)train_mta.o build/commit.o build/flags_train_mta
	$(if $(MPI),$(MPI_CC),$(CC)) $(CFLAGS) $(filter %.o,$^) -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

infer_mta: build/infer_mta.o
	$(CC) $(CFLAGS) $^ -o $@ $(BLAS_LINK) $(LDLIBS)

train_mta_cuda: build/train_mta_cuda.o build/commit.o
	$(NVCC) $(NVCC_CODE) -Xcompiler -fopenmp $^ -o $@ $(CUDA_LINK)

# The tests hold train_mta.c twice: in fp32 behind its table, and in double inside test_mta.c for finite differences.
test_mta: build/test_mta.o build/train_mta_library.o
	$(CC) $(CFLAGS) $^ -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

test_mta_cuda: build/test_mta.o build/train_mta_library.o build/train_mta_cuda_library.o
	$(NVCC) $(NVCC_CODE) -Xcompiler -fopenmp $^ -o $@ $(CUDA_LINK) $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

check:
	scripts/test.sh --check

test:
	scripts/test.sh

clean:
	rm -rf build train_mta infer_mta test_mta test_mta_nocblas train_mta_cuda test_mta_cuda test_mta_cuda_cpu \
	    test_mta_cuda_cpu_bf16 compile_commands.json

include dev/dev.mk
