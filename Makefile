# mta.c: `make help` lists the targets and what was found. A C compiler suffices; a CBLAS and the CUDA toolkit are used
# where they are here.

# ARCH: this machine's own instructions, unless CC makes code for another (CC=aarch64-linux-gnu-gcc alone suffices), and
# 512-bit vectors where there are any: the compiler's default of 256 halves the rate of softmax and SwiGLU.
# What is no flag is not meant for us: jobs of Grid Engine have ARCH=lx-amd64. clang 14 for aarch64 has -mcpu=native
# alone. A gcc of Spack or EasyBuild comes without cc.
ifeq ($(origin CC)$(shell command -v cc 2>/dev/null),default)
CC := gcc
endif
HOST := $(shell uname -m)
TARGET := $(shell $(CC) -dumpmachine)
WIDE = $(if $(filter x86_64,$(HOST)),-mprefer-vector-width=512)
ifneq ($(if $(filter undefined,$(origin ARCH)),none)$(filter-out -%,$(ARCH)),)
ARCH := $(if $(filter $(HOST)-%,$(TARGET)),$(shell for f in -march=native -mcpu=native; do \
    $(CC) $$f -E -x c - </dev/null >/dev/null 2>&1 && echo $$f && break; done) $(WIDE))
unexport ARCH  # a make below this one may be for another CC
endif
OPT ?= -O3
# psabi: gcc notes that vectors as arguments changed their ABI once; infer_mta.c passes them to its own functions only.
WARN = -Wall -Wextra -Wno-psabi $(if $(WERROR),-Werror) $(if $(OPENMP),,-Wno-unknown-pragmas -Wno-unused)
# No -ffast-math: masks use infinities, guards isfinite. Given up are errno and floating-point traps; no value changes.
# icx has it by default.
MATH = -fno-math-errno -fno-trapping-math $(if $(findstring icx,$(notdir $(CC))),-fp-model=precise)
OPENMP ?= -fopenmp
VERSION_FLAG = -DMTA_VERSION='"$(shell cat VERSION)"'
# -g1: names and lines of a backtrace and a profile; -g takes a quarter longer. A debugger wants OPT='-O0 -g'.
ifeq ($(origin CFLAGS),command line)
$(error CFLAGS holds what the programs need, -fopenmp for example; wanted OPT or ARCH, or CC='gcc -FLAG')
endif
CFLAGS = -std=gnu11 -g1 $(OPT) $(ARCH) $(WARN) $(MATH) $(OPENMP) $(VERSION_FLAG)
# glibc before 2.34 has threads in a library of their own, which -fopenmp brings; musl gives a thread 128 KiB of stack.
LDLIBS = -lm -lpthread $(if $(findstring musl,$(TARGET) $(CC)),-Xlinker -z -Xlinker stack-size=8388608)

# A CBLAS for matrix products: OpenBLAS by pkg-config or by trying to link. NO_CBLAS=1: train_mta.c's plain product.
ifndef NO_CBLAS
BLAS_CFLAGS := $(shell pkg-config --cflags openblas 2>/dev/null)
BLAS_LIBS := $(shell pkg-config --libs openblas 2>/dev/null || echo -lopenblas)
BLAS := $(shell echo 'int main(void){return cblas_sgemm == 0;}' | \
    $(CC) -include cblas.h -x c - $(BLAS_CFLAGS) $(BLAS_LIBS) -o /dev/null 2>/dev/null && \
    echo -DMTA_CBLAS $(BLAS_CFLAGS))
# A library that is not the system's (Spack's) is found again when the program starts.
BLAS_LINK := $(if $(BLAS),$(BLAS_LIBS) $(patsubst -L%,-Xlinker -rpath -Xlinker %,\
    $(filter-out -L -L/usr/lib%,$(filter -L%,$(BLAS_LIBS)))))
endif

# oneDNN 2 or 3 (libdnnl-dev) for the CPU trainer's products in bf16, --matmul bf16. NO_ONEDNN=1: without.
ifndef NO_ONEDNN
ONEDNN := $(shell echo '_Static_assert(DNNL_VERSION_MAJOR < 4, ""); int main(void){return dnnl_version == 0;}' | \
    $(CC) -include oneapi/dnnl/dnnl.h -x c - -ldnnl -o /dev/null 2>/dev/null && echo -DMTA_ONEDNN)
ONEDNN_LINK := $(if $(ONEDNN),-ldnnl)
endif

# MPI=1: the CPU trainer on several processes (Debian: libopenmpi-dev, or libmpich-dev). MPICC=mpicc.mpich, a Cray's
# MPICC=cc: another MPI.
MPICC ?= mpicc
# Where CC is such a wrapper itself (EasyBuild's CC=mpicc), it would call itself for ever.
MPI_BY = $(if $(filter mpi%,$(notdir $(CC))),,OMPI_CC='$(CC)' MPICH_CC='$(CC)')
MPI_CC = $(if $(MPI_BY),$(MPI_BY) $(MPICC),$(CC))

.PHONY: all check test clean
all: train_mta infer_mta test_mta

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
