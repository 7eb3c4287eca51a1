# dev.mk: included by the Makefile: its help, how the CUDA trainer is compiled, and builds for development. What these
# are for: `make help_dev`.

HEADERS = $(wildcard mta/*.h) VERSION
EMULATOR_HEADERS = $(wildcard dev/cuda_cpu/*.h)
.SECONDARY:

ONEDNN_FOUND = $(if $(ONEDNN),$(ONEDNN_LINK) $(shell echo DNNL_VERSION_MAJOR.DNNL_VERSION_MINOR | \
    $(CC) -E -P -include oneapi/dnnl/dnnl.h - | tail -n 1 | tr -d ' '))

.PHONY: FORCE help help_dev asan header_check nvcc_check bench_programs compile_commands
help:
	@echo "make train_mta        CPU trainer; MPI=1: for several processes, started by mpirun, mpiexec or srun"
	@echo "make infer_mta        CPU inference: prompt, stream, score"
	@echo "make train_mta_cuda   CUDA trainer: NVCC_ARCH=sm_80|sm_90a|sm_100, PRECISION=BF16|FP32,"
	@echo "                      DEBUG_SYNC=1 (waits after every kernel),"
	@echo "                      CUDNN=1 (cuDNN's attention for --attention-kernels cudnn; CUDNN_HOME=FOLDER: its place)"
	@echo "make test_mta         tests of the CPU trainer; one of them: ./test_mta --only TEXT"
	@echo "make test_mta_cuda    tests of the CUDA trainer on a GPU; ./test_mta_cuda --compare DIR: gradients, CPU and GPU"
	@echo "make check            the quick tests, under 90 s on two cores: before each commit"
	@echo "make test             scripts/test.sh: every test; one of them: scripts/test.sh --only TEXT"
	@echo "make help_dev         what else there is for development: emulator, sanitizers, benches (dev/dev.mk)"
	@echo "variables: CC, ARCH, OPT=-O3, OPENMP= (one thread), NO_CBLAS=1, NO_ONEDNN=1, MPI=1, MPICC=mpicc, NO_NCCL=1,"
	@echo "           WERROR=1, NVCC; another CBLAS: BLAS_CFLAGS=-I/opt/blis/include BLAS_LIBS='-L/opt/blis/lib -lblis'"
	@echo "found: compiler       $(CC), $(shell $(CC) -dumpmachine), $(or $(ARCH),its default instructions)"
	@echo "       CBLAS          $(if $(BLAS),$(BLAS_LIBS),none: plain OpenMP products)"
	@echo "       oneDNN         $(or $(ONEDNN_FOUND),none: no --matmul bf16 on the CPU (Debian: libdnnl-dev))"
	@echo "       MPI            $(or $(shell command -v $(MPICC) 2>/dev/null),none: no MPI=1 here)"
	@echo "       CUDA toolkit  " \
	    "$(or $(shell $(NVCC) --version 2>/dev/null | grep -o 'release [0-9.]*'),none: no train_mta_cuda here)"
	@echo "       cuDNN          $(or $(CUDNN_HOME),none: no CUDNN=1 here (Python package nvidia-cudnn-cu13))"
	@echo "       NCCL           $(if $(NCCL),-lnccl,none: train_mta_cuda is for one GPU here)"

help_dev:
	@echo "make test_mta_nocblas                        test_mta without CBLAS; build/one_thread/test_mta: without OpenMP"
	@echo "make test_mta_cuda_cpu test_mta_cuda_cpu_bf16"
	@echo "                                             tests of the CUDA trainer, its own kernels executed on the CPU by"
	@echo "                                             dev/cuda_cpu (fp32, bf16); --models N: so many random models;"
	@echo "                                             CUDA_CPU_ORDER=N: another order of threads"
	@echo "make build/openmpi/train_mta build/mpich/train_mta"
	@echo "                                             the CPU trainer with one MPI and with the other, for"
	@echo "                                             dev/tests/test_ranks.py"
	@echo "make build/train_mta_cuda_cpu                the whole CUDA trainer on the CPU (bf16); _fp32"
	@echo "make asan                                    test_mta, train_mta, infer_mta in build/asan under the address and"
	@echo "                                             undefined-behaviour sanitizers"
	@echo "make build/asan/test_mta_cuda_cpu_bf16       every access of a kernel under the address sanitizer;"
	@echo "                                             build/undefined/test_mta_cuda_cpu_bf16: undefined behaviour too;"
	@echo "                                             build/races/test_mta_bf16: every access watched for races"
	@echo "make build/test_ops                          every launcher of train_mta.cu against train_mta.c: test or perf,"
	@echo "                                             --help; build/test_ops_fp32, test_ops_cuda"
	@echo "make build/test_NAME                         dev/tests/test_NAME.c; build/test_emulator, build/test_nccl,"
	@echo "                                             build/test_races: the emulator's own"
	@echo "make build/faults.so                         makes system calls and allocations fail: dev/faults/faults.py"
	@echo "make ptx ptx_long                            what nvcc makes of train_mta.cu and the programs that execute it:"
	@echo "                                             dev/ptx_cpu/check.py [--long]"
	@echo "make nvcc_check                              train_mta.cu and its tests through nvcc for every architecture,"
	@echo "                                             without a GPU"
	@echo "make bench_programs build/infer_step build/cuda_step"
	@echo "                                             what dev/bench runs"
	@echo "make compile_commands                        compile_commands.json for clangd and other tools"

# ---- the CUDA trainer: compiler and libraries

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

# NCCL 2.14 or later for several GPUs, where it compiles and links; looked for once, when nvcc is needed. NO_NCCL=1:
# without.
NCCL = $(eval NCCL := $(if $(NO_NCCL),,$(shell f=$$(mktemp) && echo 'int main() { return ncclCommFinalize == 0; }' | \
    $(NVCC) -include nccl.h -x c++ - -lnccl -o $$f 2>/dev/null && echo -DMTA_NCCL; rm -f $$f)))$(NCCL)

# CUDNN=1: with attention by cuDNN, --attention-kernels cudnn. CUDNN_HOME: a folder with include/cudnn.h, and the
# library in lib64 or lib, as the toolkit's may be, or nvidia/cudnn of the Python package nvidia-cudnn-cu13.
# `command` through a shell, as 2> has it: make 4.2 alone looks for a program of that name.
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v $(NVCC) 2>/dev/null)))
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

# ---- what makes a build new

# What was compiled with other flags is compiled again: these files change where the flags do (all but -Werror, which
# changes no code).
FLAGS_train_mta = $(FLAGS_c) $(if $(MPI),$(MPICC))
FLAGS_c = $(CC) $(CFLAGS) $(BLAS) $(ONEDNN)
FLAGS_cxx = $(CXX) $(CXXFLAGS)
FLAGS_nvcc = $(NVCC) $(NVCCFLAGS) $(NVCC_CODE) $(CUDA_DEFINES)
build/flags_%: FORCE
	@mkdir -p build
	@new=$$(echo '$(filter-out -Werror,$(FLAGS_$*))'); test "$$(cat $@ 2>/dev/null)" = "$$new" || \
	    printf '%s\n' "$$new" > $@

# The commit, which a run's log names; with a plus where files differ from it. Not of a repository around this folder.
# Linked, not compiled in: a commit compiles nothing again.
COMMIT = $(or $(shell test -z "$$(git rev-parse --show-prefix 2>/dev/null)" && \
    git describe --always --abbrev=12 --exclude='*' --dirty=+ 2>/dev/null),unknown)
build/commit.c: FORCE
	@mkdir -p build
	@new='const char* mta_commit(void); const char* mta_commit(void) { return "$(COMMIT)"; }'; \
	    test "$$(cat $@ 2>/dev/null)" = "$$new" || printf '%s\n' "$$new" > $@
build/commit.o: build/commit.c
	@$(CC) $(CFLAGS) -c $< -o $@

# A trainer as the tests link it: the same object, whose main gives way to theirs.
OBJCOPY = $(shell $(CC) -print-prog-name=objcopy)
%_library.o: %.o
	$(OBJCOPY) --weaken-symbol=main $< $@

# ---- C

build/%.o: %.c $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) $(BLAS) $(ONEDNN) -c $< -o $@

# The CPU trainer for several processes; with MPICC=mpicc.mpich by that MPI. build/openmpi/train_mta and
# build/mpich/train_mta: both, for their test, in a quarter of the compiler's time.
build/mpi/train_mta.o: train_mta.c $(HEADERS) build/flags_train_mta
	@mkdir -p build/mpi
	$(MPI_CC) $(CFLAGS) $(BLAS) $(ONEDNN) -DMTA_MPI -c $< -o $@
build/openmpi/train_mta build/mpich/train_mta: build/%/train_mta: train_mta.c $(HEADERS) build/commit.o build/flags_c
	@mkdir -p build/$*
	$(MPI_BY) mpicc.$* $(CFLAGS) -O1 $(BLAS) $(ONEDNN) -DMTA_MPI $< build/commit.o -o $@ \
	    $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

build/%_nocblas.o: %.c $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) -c $< -o $@

build/test_mta.o: test_mta.c train_mta.c $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) -O1 -c $< -o $@

test_mta_nocblas: build/test_mta.o build/train_mta_nocblas_library.o
	$(CC) $(CFLAGS) $^ -o $@ $(LDLIBS)

# As make OPENMP= builds it.
ONE_THREAD = $(CC) $(filter-out $(OPENMP),$(CFLAGS)) -Wno-unknown-pragmas -Wno-unused -O1
build/one_thread/test_mta: test_mta.c train_mta.c $(HEADERS) build/flags_c
	@mkdir -p build/one_thread
	$(ONE_THREAD) $(BLAS) $(ONEDNN) -c train_mta.c -o build/one_thread/train_mta.o
	$(OBJCOPY) --weaken-symbol=main build/one_thread/train_mta.o
	$(ONE_THREAD) $< build/one_thread/train_mta.o -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

build/test_%: dev/tests/test_%.c $(wildcard dev/tests/*.h) $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) -O1 -I. $< -o $@ $(LDLIBS)

# Makes system calls and allocations fail: dev/faults/faults.py loads it into the programs.
build/faults.so: dev/faults/faults.c build/flags_c
	$(CC) -std=gnu11 -O1 -g1 $(WARN) -shared -fPIC $< -o $@ -ldl

# This one includes the CPU trainer.
build/test_products: dev/tests/test_products.c train_mta.c dev/tests/check.h $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) $(BLAS) $(ONEDNN) -O1 -I. $< -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

# Every header in C11 and, the other way round, in C++17; test_mta.c in C++17, as nvcc would have it.
header_check: $(HEADERS) build/flags_c
	printf '#include "%s"\n' $(sort $(wildcard mta/*.h)) > build/headers.c
	tac build/headers.c > build/headers.cpp
	$(CC) -std=c11 -Wall -Wextra -Werror $(OPENMP) -I. -fsyntax-only build/headers.c
	$(CXX) -std=c++17 -Wall -Wextra -Werror $(OPENMP) -I. -fsyntax-only build/headers.cpp
	$(CXX) -std=c++17 $(ARCH) $(OPENMP) -Wall -Wextra -Werror -fsyntax-only -x c++ test_mta.c

# ---- C under the sanitizers

SANITIZE = -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
asan: build/asan/test_mta build/asan/train_mta build/asan/infer_mta

build/asan/%.o: %.c train_mta.c $(HEADERS) build/flags_c
	@mkdir -p build/asan
	$(CC) $(CFLAGS) $(SANITIZE) -c $< -o $@

# Without its main: the tests call nothing of what only that calls, which takes two thirds of the compiler's time.
LIBRARY = -DMTA_LIBRARY -Wno-unused-function
build/asan/train_mta_library.o: train_mta.c $(HEADERS) build/flags_c
	@mkdir -p build/asan
	$(CC) $(CFLAGS) $(SANITIZE) $(LIBRARY) -c $< -o $@

build/asan/test_mta: build/asan/test_mta.o build/asan/train_mta_library.o
	$(CC) $(CFLAGS) $(SANITIZE) $^ -o $@ $(LDLIBS)

build/asan/%_mta: build/asan/%_mta.o
	$(CC) $(CFLAGS) $(SANITIZE) $^ -o $@ $(LDLIBS)

# ---- train_mta.cu through nvcc

build/train_mta_cuda.o: train_mta.cu $(HEADERS) build/flags_nvcc
	$(NVCC) $(NVCCFLAGS) $(NVCC_CODE) $(CUDA_DEFINES) -c $< -o $@

# In fp32 beside them, for scripts/gpu_check.sh.
build/train_mta_cuda_fp32.o: train_mta.cu $(HEADERS) build/flags_nvcc
	$(NVCC) $(NVCCFLAGS) $(NVCC_CODE) -DPRECISION_FP32 -c $< -o $@

build/train_mta_cuda_fp32: build/train_mta_cuda_fp32.o
	$(NVCC) $(NVCC_CODE) -Xcompiler -fopenmp $^ -o $@ $(CUDA_LINK)

build/test_mta_cuda_fp32: build/test_mta.o build/train_mta_library.o build/train_mta_cuda_fp32_library.o
	$(NVCC) $(NVCC_CODE) -Xcompiler -fopenmp $^ -o $@ $(CUDA_LINK) $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

# Programs that include train_mta.cu: dev/tests/test_ops.cu, dev/bench/cuda_step.cu.
CUDA_PROGRAM = $(NVCC) $(NVCCFLAGS) $(NVCC_CODE) $(CUDA_DEFINES) -diag-suppress 177
build/test_ops_cuda: dev/tests/test_ops.cu build/ops_reference.o train_mta.cu $(HEADERS) build/flags_nvcc
	$(CUDA_PROGRAM) $< build/ops_reference.o -o $@ $(CUDA_LINK) $(LDLIBS)
build/cuda_step: dev/bench/cuda_step.cu train_mta.cu $(HEADERS) build/flags_nvcc
	$(CUDA_PROGRAM) $< -o $@ $(CUDA_LINK)

# The architecture that is tuned for, refusing warnings and spilt registers; test.sh --long adds sm_80 and sm_100, where
# they may spill: head size 128 with pairs and a convolution, for which sm_80's shared memory is too small anyway, and 4
# bytes of sm_100's head_output_backward_kernel<8, 2>, which leave room for 2 blocks on a multiprocessor. What else
# gpu_check.sh builds is checked and not made, the bench's in fp32, so that this is seen too. The trainer is linked:
# with NCCL where that is found, and without MPI. Host code is not optimised: the warnings that this would give are
# refused where the emulator's is compiled.
NVCC_LOOK = -gencode=arch=compute_90a$(,)code=compute_90a -fdevice-syntax-only -Xcompiler -fsyntax-only \
    -diag-suppress 177
NVCC_STRICT = $(NVCC) $(subst -O3,,$(NVCCFLAGS)) --Werror all-warnings -Xcompiler -Werror
NVCC_CHECKS = sm_90a cuda_step $(notdir $(basename $(wildcard dev/tests/*.cu)))
nvcc_check: $(NVCC_CHECKS:%=build/nvcc/%.o)
	$(NVCC) -Xcompiler -fopenmp build/nvcc/sm_90a.o -o build/nvcc/train_mta_cuda $(CUDA_LINK) \
	    $(if $(CUDNN_HOME),$(CUDNN_LINK))
	nm -D build/nvcc/train_mta_cuda > build/nvcc/symbols
	$(if $(NCCL),grep -q ' U ncclSend' build/nvcc/symbols)
	! grep -q ' U MPI_' build/nvcc/symbols
# Their PTX is kept, for dev/ptx_cpu. With cuDNN where it is found; without it are the other checks.
build/nvcc/sm_%.o: train_mta.cu $(HEADERS) build/flags_nvcc
	@mkdir -p build/nvcc/keep_$*
	$(NVCC_STRICT) $(if $(CUDNN_HOME),$(CUDNN_DEFINES)) -lineinfo --keep \
	    --keep-dir build/nvcc/keep_$* -gencode=arch=compute_$*$(,)code=sm_$* \
	    $(if $(filter 90a,$*),-Xptxas --warn-on-spills$(,)--warning-as-error) -c $< -o $@
build/nvcc/%.o: dev/tests/%.cu train_mta.cu $(HEADERS) build/flags_nvcc
	@mkdir -p build/nvcc
	$(NVCC_STRICT) $(NVCC_LOOK) -c $< -o $@
	@touch $@
build/nvcc/cuda_step.o: dev/bench/cuda_step.cu train_mta.cu $(HEADERS) build/flags_nvcc
	@mkdir -p build/nvcc
	$(NVCC_STRICT) $(NVCC_LOOK) -DPRECISION_FP32 -c $< -o $@
	@touch $@
, = ,

# ---- train_mta.cu on the emulator: the same kernels by a C++ compiler, executed on the CPU (dev/cuda_cpu)

CXXFLAGS = -std=c++17 -g1 $(ARCH) $(WARN) $(MATH) $(OPENMP) $(VERSION_FLAG)
EMULATE = $(CXX) $(CXXFLAGS) -Idev/cuda_cpu -DMTA_NCCL -x c++
# Sizes of train_mta.cu that the tests make small, most of them through the environment, so that their small models are
# cut as large ones are.
SIZES = -DATTENTION_SCRATCH='cuda_cpu::size_setting("CUDA_CPU_SCRATCH", 1 << 30)' \
    -DHEAD_BLOCKS='cuda_cpu::size_setting("CUDA_CPU_HEAD_BLOCKS", 2048)' -DRANKS_ROOM='(1 << 18)' \
    -DBLAS_WORKSPACE='(size_t)cuda_cpu::size_setting("CUDA_CPU_BLAS_WORKSPACE", 32 << 20)' \
    -DGRAPH_NODE='cuda_cpu::size_setting("CUDA_CPU_GRAPH_NODE", 10 << 10)' \
    -DLOGITS='cuda_cpu::size_setting("CUDA_CPU_LOGITS", 1 << 30)'

# train_mta.cu is translated once for each precision, inside test_ops.cu: the trainer, test_mta_cuda_cpu and test_ops
# are linked from that object. Its main is test_ops's; the trainer's is called train_main there.
EMULATED = dev/tests/test_ops.cu dev/tests/ops_reference.h train_mta.cu $(HEADERS) $(EMULATOR_HEADERS) build/flags_cxx
build/cuda_cpu_bf16.o: $(EMULATED)
	$(EMULATE) -O2 $(SIZES) -c $< -o $@
build/cuda_cpu_fp32.o: $(EMULATED)
	$(EMULATE) -O2 $(SIZES) -DPRECISION_FP32 -c $< -o $@
build/train_main.o: build/flags_cxx
	echo 'int train_main(int, char**); int main(int argc, char** argv) { return train_main(argc, argv); }' | \
	    $(EMULATE) -c - -o $@

# test_ops compares with train_mta.c in double.
build/ops_reference.o: dev/tests/ops_reference.c dev/tests/ops_reference.h train_mta.c $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) -O1 -Wno-unused-function -c $< -o $@

EMULATED_TRAINER = build/train_main.o build/cuda_cpu_$(1)_library.o build/ops_reference.o
build/train_mta_cuda_cpu: $(call EMULATED_TRAINER,bf16)
	$(CXX) $(CXXFLAGS) $^ -o $@ $(LDLIBS)
build/train_mta_cuda_cpu_fp32: $(call EMULATED_TRAINER,fp32)
	$(CXX) $(CXXFLAGS) $^ -o $@ $(LDLIBS)

test_mta_cuda_cpu: build/test_mta.o build/train_mta_library.o build/cuda_cpu_fp32_library.o build/ops_reference.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)
test_mta_cuda_cpu_bf16: build/test_mta.o build/train_mta_library.o build/cuda_cpu_bf16_library.o build/ops_reference.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

build/test_ops: build/cuda_cpu_bf16.o build/ops_reference.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(LDLIBS)
build/test_ops_fp32: build/cuda_cpu_fp32.o build/ops_reference.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(LDLIBS)

# Every access of a kernel under the address sanitizer; in build/undefined also undefined behaviour, in twice the
# compiler's time.
ASAN_KERNELS = -O1 -fsanitize=$(1) -fno-sanitize-recover=all -fsanitize-sections=cuda_shared
SANITIZERS_asan = address
SANITIZERS_undefined = address,undefined
build/asan/cuda_cpu_bf16.o build/undefined/cuda_cpu_bf16.o: build/%/cuda_cpu_bf16.o: train_mta.cu $(HEADERS) \
    $(EMULATOR_HEADERS) build/flags_cxx
	@mkdir -p build/$*
	$(EMULATE) $(call ASAN_KERNELS,$(SANITIZERS_$*)) $(SIZES) $(LIBRARY) -c $< -o $@
build/%/test_mta_cuda_cpu_bf16: build/test_mta.o build/train_mta_library.o build/%/cuda_cpu_bf16_library.o
	$(CXX) $(CXXFLAGS) $(call ASAN_KERNELS,$(SANITIZERS_$*)) $^ -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)

# Every access of a kernel watched for races (dev/cuda_cpu/races.cpp); `thread` is the compiler's pass alone, its
# library is not linked.
RACES = -O1 -fsanitize=thread
build/races/races.o: dev/cuda_cpu/races.cpp $(EMULATOR_HEADERS) build/flags_cxx
	@mkdir -p build/races
	$(EMULATE) -O2 -c $< -o $@
build/races/bf16.o: $(EMULATED)
	@mkdir -p build/races
	$(EMULATE) $(RACES) $(SIZES) $(LIBRARY) -c $< -o $@
build/races/fp32.o: $(EMULATED)
	@mkdir -p build/races
	$(EMULATE) $(RACES) $(SIZES) $(LIBRARY) -DPRECISION_FP32 -c $< -o $@
build/races/test_mta_%: build/test_mta.o build/train_mta_library.o build/races/%_library.o build/ops_reference.o \
    build/races/races.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)
build/races/test_ops: build/races/bf16.o build/ops_reference.o build/races/races.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(LDLIBS)

# The emulator's own tests, with planted faults: the address sanitizer sees those out of bounds, races.cpp the races.
build/test_emulator: dev/tests/test_emulator.cpp $(wildcard dev/tests/*.h) $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) -x c++ -std=c++17 -g1 $(WARN) -fsanitize=address,undefined -fsanitize-sections=cuda_shared \
	    -Idev/cuda_cpu $< -o $@
build/test_nccl: dev/tests/test_nccl.cpp dev/tests/check.h $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) -x c++ -std=c++17 -g1 $(WARN) -fsanitize=address,undefined -fno-sanitize-recover=all \
	    -fsanitize-sections=cuda_shared -Idev/cuda_cpu $< -o $@
build/races/test_emulator.o: dev/tests/test_emulator.cpp $(wildcard dev/tests/*.h) $(EMULATOR_HEADERS)
	@mkdir -p build/races
	$(CXX) -x c++ -std=c++17 -g1 $(WARN) -Wno-unused-function $(RACES) -Idev/cuda_cpu -c $< -o $@
build/test_races: build/races/test_emulator.o build/races/races.o
	$(CXX) $^ -o $@

# ---- nvcc's PTX, executed on the CPU (dev/ptx_cpu): replay.o takes the emulator's launches

.PHONY: ptx ptx_long
PTX_PROGRAMS = $(addprefix build/ptx/,test_ops test_ops_fp32 test_mta_bf16 test_mta_fp32)
ptx: $(PTX_PROGRAMS) build/ptx/bf16_sm_90a.ptx build/ptx/fp32_sm_90a.ptx
ptx_long: ptx $(foreach arch,80 100,build/ptx/bf16_sm_$(arch).ptx build/ptx/fp32_sm_$(arch).ptx)
# No contraction: what PTX rounds apart is rounded apart here.
PTX_HEADERS = $(wildcard dev/ptx_cpu/*.h)
build/ptx/replay.o: dev/ptx_cpu/replay.cpp $(PTX_HEADERS) $(EMULATOR_HEADERS) build/flags_cxx
	@mkdir -p build/ptx
	$(CXX) $(CXXFLAGS) -O3 -ffp-contract=off -Idev/cuda_cpu -c $< -o $@
build/ptx/test_ops: build/cuda_cpu_bf16.o build/ops_reference.o build/ptx/replay.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(LDLIBS)
build/ptx/test_ops_fp32: build/cuda_cpu_fp32.o build/ops_reference.o build/ptx/replay.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(LDLIBS)
build/ptx/test_mta_%: build/test_mta.o build/train_mta_library.o build/cuda_cpu_%_library.o build/ops_reference.o \
    build/ptx/replay.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)
build/ptx/bf16_sm_%.ptx: build/nvcc/sm_%.o
	@mkdir -p build/ptx
	cp build/nvcc/keep_$*/train_mta.ptx $@
build/ptx/fp32_%.ptx: train_mta.cu $(HEADERS) build/flags_nvcc
	@mkdir -p build/ptx
	$(NVCC) -std=c++17 -O3 -lineinfo -ptx -arch=$* -DPRECISION_FP32 $< -o $@
# The interpreter's own tests: PTX by hand, planted faults; the emulator's products and copies beside it. No nvcc.
build/test_ptx: dev/tests/test_ptx.cpp $(wildcard dev/tests/*.h) $(PTX_HEADERS) $(EMULATOR_HEADERS) build/flags_cxx
	$(CXX) -x c++ $(CXXFLAGS) -O1 -ffp-contract=off -Wno-unused-function -Idev/cuda_cpu -Idev/ptx_cpu $< -o $@

# ---- benches: dev/bench/cpu_step.sh, infer_speed.sh

bench_programs: build/cpu_step build/cpu_step_nocblas
build/cpu_step: dev/bench/cpu_step.c train_mta.c $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) -Wno-unused-function $(BLAS) $(ONEDNN) $< -o $@ $(BLAS_LINK) $(ONEDNN_LINK) $(LDLIBS)
build/cpu_step_nocblas: dev/bench/cpu_step.c train_mta.c $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) -Wno-unused-function $< -o $@ $(LDLIBS)
build/infer_step: dev/bench/infer_step.c dev/bench/machine.c infer_mta.c $(HEADERS) build/flags_c
	$(CC) $(CFLAGS) -I. -Wno-unused-function $(BLAS) $< -o $@ $(BLAS_LINK) $(LDLIBS)

# ---- for editors

compile_commands:
	$(MAKE) -nB --no-print-directory train_mta infer_mta test_mta test_mta_cuda_cpu_bf16 build/asan/cuda_cpu_bf16.o | \
	    python3 dev/compile_commands.py > compile_commands.json
