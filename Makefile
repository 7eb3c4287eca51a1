# mta.c: `make help` lists the targets. Nothing but a C compiler is needed; OpenBLAS and the CUDA toolkit are used where they are found.

CC ?= gcc
CXX ?= g++
NVCC ?= nvcc
# 512-bit vectors where the machine has them: the compiler's default of 256 halves the rate of softmax and SwiGLU.
ARCH ?= -march=native $(if $(filter x86_64,$(shell uname -m)),-mprefer-vector-width=512)
OPT ?= -O3
# psabi: gcc notes that vectors as arguments changed their ABI once; infer_mta.c passes them between its own functions only.
WARN = -Wall -Wextra -Wno-psabi
# No -ffast-math: masks use infinities, guards use isfinite. What is given up here is errno and floating-point traps, no value changes.
MATH = -fno-math-errno -fno-trapping-math
OPENMP ?= -fopenmp
CFLAGS = -std=gnu11 $(OPT) -g $(ARCH) $(WARN) $(MATH) $(OPENMP)
LDLIBS = -lm

# A CBLAS for the CPU's matrix products: OpenBLAS by pkg-config or by trying to link. NO_CBLAS=1: the plain OpenMP product of train_mta.c.
ifndef NO_CBLAS
BLAS_CFLAGS := $(shell pkg-config --cflags openblas 2>/dev/null)
BLAS_LIBS := $(shell pkg-config --libs openblas 2>/dev/null || echo -lopenblas)
BLAS_FOUND := $(shell echo 'int main(void){return cblas_sgemm == 0;}' | $(CC) -include cblas.h -x c - $(BLAS_CFLAGS) $(BLAS_LIBS) -o /dev/null 2>/dev/null && echo yes)
endif
ifeq ($(BLAS_FOUND),yes)
BLAS = -DMTA_CBLAS $(BLAS_CFLAGS)
BLAS_LINK = $(BLAS_LIBS)
endif

HEADERS = $(wildcard mta/*.h)
GOLDEN = $(wildcard dev/golden/*.safetensors)

.PHONY: help all test asan clean
help:
	@echo "make train_mta           CPU trainer ($(if $(BLAS),with CBLAS: $(BLAS_LINK),without CBLAS: plain OpenMP products))"
	@echo "make infer_mta           CPU inference: prompt, stream, score"
	@echo "make train_mta_cuda      CUDA trainer (needs nvcc; NVCC_ARCH=sm_80|sm_90a|sm_100, PRECISION=BF16|FP32; DEBUG_SYNC=1 waits after every kernel)"
	@echo "make test_mta            tests of the CPU trainer; test_mta_nocblas: the same without CBLAS"
	@echo "make test_mta_cuda       tests of the CUDA trainer on a GPU, and --compare"
	@echo "make test_mta_cuda_cpu   the CUDA trainer's own kernels executed on the CPU (fp32); test_mta_cuda_cpu_bf16"
	@echo "make test                scripts/test.sh: everything"
	@echo "make asan                test_mta under the address and undefined-behaviour sanitizers"
	@echo "make clean               removes what make made"
	@echo "variables: CC, ARCH=-march=native, OPT=-O3, NO_CBLAS=1, NVCC, NVCC_ARCH, PRECISION, DEBUG_SYNC=1"

all: train_mta infer_mta test_mta

train_mta: train_mta.c $(HEADERS)
	$(CC) $(CFLAGS) $(BLAS) $< -o $@ $(BLAS_LINK) $(LDLIBS)

infer_mta: infer_mta.c $(HEADERS)
	$(CC) $(CFLAGS) $(BLAS) $< -o $@ $(BLAS_LINK) $(LDLIBS)

build/train_mta.o: train_mta.c $(HEADERS)
	@mkdir -p build
	$(CC) $(CFLAGS) $(BLAS) -DMTA_LIBRARY -c $< -o $@

build/train_mta_nocblas.o: train_mta.c $(HEADERS)
	@mkdir -p build
	$(CC) $(CFLAGS) -DMTA_LIBRARY -c $< -o $@

# The tests hold train_mta.c twice: in fp32 behind its table, and in double inside test_mta.c for finite differences.
build/test_mta.o: test_mta.c train_mta.c $(HEADERS)
	@mkdir -p build
	$(CC) $(CFLAGS) -c $< -o $@

test_mta: build/test_mta.o build/train_mta.o
	$(CC) $(CFLAGS) $^ -o $@ $(BLAS_LINK) $(LDLIBS)

test_mta_nocblas: build/test_mta.o build/train_mta_nocblas.o
	$(CC) $(CFLAGS) $^ -o $@ $(LDLIBS)

# Run with: make asan && build/asan/test_mta
ASAN = -std=gnu11 -O1 -g $(ARCH) $(WARN) $(MATH) $(OPENMP) -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
asan: build/asan/test_mta build/asan/train_mta build/asan/infer_mta
	ASAN_OPTIONS=detect_leaks=0 build/asan/test_mta

build/asan/test_mta: test_mta.c train_mta.c $(HEADERS)
	@mkdir -p build/asan
	$(CC) $(ASAN) -DMTA_LIBRARY -c train_mta.c -o build/asan/train_mta.o
	$(CC) $(ASAN) test_mta.c build/asan/train_mta.o -o $@ $(LDLIBS)

build/asan/train_mta: train_mta.c $(HEADERS)
	@mkdir -p build/asan
	$(CC) $(ASAN) $< -o $@ $(LDLIBS)

build/asan/infer_mta: infer_mta.c $(HEADERS)
	@mkdir -p build/asan
	$(CC) $(ASAN) $< -o $@ $(LDLIBS)

# ---- CUDA: train_mta.cu by nvcc for a GPU, or by a C++ compiler for dev/cuda_cpu, which runs the same kernels on the CPU
NVCC_ARCH ?= sm_90a
PRECISION ?= BF16
CUDA_DEFINES = $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32) $(if $(DEBUG_SYNC),-DDEBUG_SYNC)
NVCCFLAGS = -std=c++17 -O3 -arch=$(NVCC_ARCH) -Xcompiler -Wall,-Wextra,-fopenmp
# -g1: the names and lines of a backtrace; whole debug information takes a third of the compiler's time.
CXXFLAGS = -std=c++17 -g1 $(ARCH) $(WARN) $(MATH) $(OPENMP)
EMULATOR = -x c++ -O2 -Idev/cuda_cpu -DMTA_LIBRARY -DATTENTION_SCRATCH='(1 << 20)' -DFLASH_BLOCKS=5
EMULATOR_HEADERS = $(wildcard dev/cuda_cpu/*.h)

train_mta_cuda: train_mta.cu $(HEADERS)
	$(NVCC) $(NVCCFLAGS) $(CUDA_DEFINES) $< -o $@ -lcublas

# For every architecture, whatever NVCC_ARCH says: scripts/test.sh compiles and links them all, with SPILLS, the flags that refuse spilt registers;
# for sm_80 without: head size 128 with pairs and a convolution spills there, where shared memory is too small for it anyway.
build/train_mta_cuda_sm_%: train_mta.cu $(HEADERS)
	@mkdir -p build
	$(NVCC) $(if $(filter-out 80,$*),$(SPILLS)) $(subst -arch=$(NVCC_ARCH),-arch=sm_$*,$(NVCCFLAGS)) $(CUDA_DEFINES) $< -o $@ -lcublas

build/train_mta_cuda.o: train_mta.cu $(HEADERS)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) $(CUDA_DEFINES) -DMTA_LIBRARY -c $< -o $@

# The same test_mta.c, with train_mta.cu's table as the trainer under test and train_mta.c beside it.
build/test_mta_for_cuda.o: test_mta.c train_mta.c $(HEADERS)
	@mkdir -p build
	$(CC) $(CFLAGS) -DMTA_TEST_CUDA -Wno-unused-function -c $< -o $@

test_mta_cuda: build/test_mta_for_cuda.o build/train_mta.o build/train_mta_cuda.o
	$(NVCC) -arch=$(NVCC_ARCH) -Xcompiler -fopenmp $^ -o $@ -lcublas $(BLAS_LINK) $(LDLIBS)

# The same two in fp32 beside them, for scripts/gpu_check.sh.
build/train_mta_cuda_fp32: train_mta.cu $(HEADERS)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) -DPRECISION_FP32 $< -o $@ -lcublas

build/train_mta_cuda_fp32.o: train_mta.cu $(HEADERS)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) -DPRECISION_FP32 -DMTA_LIBRARY -c $< -o $@

build/test_mta_cuda_fp32: build/test_mta_for_cuda.o build/train_mta.o build/train_mta_cuda_fp32.o
	$(NVCC) -arch=$(NVCC_ARCH) -Xcompiler -fopenmp $^ -o $@ -lcublas $(BLAS_LINK) $(LDLIBS)

build/cuda_cpu_fp32.o: train_mta.cu $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) $(CXXFLAGS) $(EMULATOR) -DPRECISION_FP32 -c $< -o $@

build/cuda_cpu_bf16.o: train_mta.cu $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) $(CXXFLAGS) $(EMULATOR) -c $< -o $@

test_mta_cuda_cpu: build/test_mta_for_cuda.o build/train_mta.o build/cuda_cpu_fp32.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(BLAS_LINK) $(LDLIBS)

test_mta_cuda_cpu_bf16: build/test_mta_for_cuda.o build/train_mta.o build/cuda_cpu_bf16.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(BLAS_LINK) $(LDLIBS)

# The same with every kernel access under the address sanitizer; run with CUDA_CPU_ORDER=N for another order of threads.
build/asan/test_mta_cuda_cpu_bf16: train_mta.cu build/test_mta_for_cuda.o build/train_mta.o $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build/asan
	$(CXX) $(CXXFLAGS) $(EMULATOR) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fsanitize-sections=cuda_shared -c $< -o build/asan/cuda_cpu_bf16.o
	$(CXX) $(CXXFLAGS) -fsanitize=address,undefined build/test_mta_for_cuda.o build/train_mta.o build/asan/cuda_cpu_bf16.o -o $@ $(BLAS_LINK) $(LDLIBS)

# The whole trainer on the emulator, for tests of runs: build/train_mta_cuda_cpu (bf16), build/train_mta_cuda_cpu_fp32.
build/train_mta_cuda_cpu: train_mta.cu $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) $(CXXFLAGS) -x c++ -O2 -Idev/cuda_cpu $< -o $@ $(LDLIBS)

build/train_mta_cuda_cpu_fp32: train_mta.cu $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) $(CXXFLAGS) -x c++ -O2 -Idev/cuda_cpu -DPRECISION_FP32 $< -o $@ $(LDLIBS)

# Speed of the CUDA trainer's step on a GPU (scripts/gpu_check.sh runs it).
build/cuda_step: dev/bench/cuda_step.cu train_mta.cu $(HEADERS)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) $(CUDA_DEFINES) $< -o $@ -lcublas

# The fused attention kernels against the dense definition: on the CPU, on a GPU.
build/test_flash: dev/tests/test_flash.cu train_mta.cu $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) $(CXXFLAGS) $(EMULATOR) -Wno-unused-function $< -o $@ $(LDLIBS)
build/test_flash_cuda: dev/tests/test_flash.cu train_mta.cu $(HEADERS)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) -diag-suppress 177 $< -o $@ -lcublas

# The attention of one layer alone: its speed on a GPU, what it executes per tile without one.
build/attention_cuda: dev/bench/attention.cu train_mta.cu $(HEADERS)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) -diag-suppress 177 $< -o $@ -lcublas
build/attention_cpu: dev/bench/attention.cu train_mta.cu $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) $(CXXFLAGS) $(EMULATOR) -Wno-unused-function $< -o $@ $(LDLIBS)

# Every other kernel of a step alone, against its roofline; the emulator's only shows that the bench runs.
build/kernels_cuda: dev/bench/kernels.cu train_mta.cu $(HEADERS)
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) -diag-suppress 177 $< -o $@ -lcublas
build/kernels_cpu: dev/bench/kernels.cu train_mta.cu $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) $(CXXFLAGS) $(EMULATOR) -Wno-unused-function $< -o $@ $(LDLIBS)

# The emulator's own tests, with planted faults; the address sanitizer is what sees the out-of-bounds ones.
build/test_emulator: dev/cuda_cpu/test_emulator.cpp $(EMULATOR_HEADERS)
	@mkdir -p build
	$(CXX) -x c++ -std=c++17 -O1 -g1 $(WARN) -fsanitize=address,undefined -fsanitize-sections=cuda_shared -Idev/cuda_cpu $< -o $@

# The same kernels where every access to memory is watched for races (dev/cuda_cpu/races.cpp); `thread` is the compiler's pass alone, its library is not linked.
RACES = -O1 -fsanitize=thread
.SECONDARY: build/races/bf16.o build/races/fp32.o
build/races/races.o: dev/cuda_cpu/races.cpp $(EMULATOR_HEADERS)
	@mkdir -p build/races
	$(CXX) $(CXXFLAGS) -O2 -Idev/cuda_cpu -c $< -o $@
build/races/%.o: train_mta.cu $(HEADERS) $(EMULATOR_HEADERS)
	@mkdir -p build/races
	$(CXX) $(CXXFLAGS) $(EMULATOR) $(RACES) $(if $(filter fp32,$*),-DPRECISION_FP32) -c $< -o $@
build/races/test_mta_%: build/test_mta_for_cuda.o build/train_mta.o build/races/%.o build/races/races.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(BLAS_LINK) $(LDLIBS)
build/races/test_flash: dev/tests/test_flash.cu train_mta.cu build/races/races.o $(HEADERS) $(EMULATOR_HEADERS)
	$(CXX) $(CXXFLAGS) $(EMULATOR) $(RACES) -Wno-unused-function -c $< -o build/races/test_flash.o
	$(CXX) $(CXXFLAGS) build/races/test_flash.o build/races/races.o -o $@ $(LDLIBS)
build/test_races: dev/cuda_cpu/test_emulator.cpp build/races/races.o $(EMULATOR_HEADERS)
	$(CXX) -x c++ -std=c++17 -g1 $(WARN) -Wno-unused-function $(RACES) -Idev/cuda_cpu -c $< -o build/races/test_emulator.o
	$(CXX) build/races/test_emulator.o build/races/races.o -o $@

# What dev/bench/cpu_step.sh runs.
.PHONY: bench_programs
bench_programs: build/cpu_step build/cpu_step_nocblas
build/cpu_step: dev/bench/cpu_step.c train_mta.c $(HEADERS)
	@mkdir -p build
	$(CC) $(CFLAGS) $(BLAS) $< -o $@ $(BLAS_LINK) $(LDLIBS)
build/cpu_step_nocblas: dev/bench/cpu_step.c train_mta.c $(HEADERS)
	@mkdir -p build
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)
# What dev/bench/infer_speed.sh runs.
build/infer_step: dev/bench/infer_step.c dev/bench/machine.c infer_mta.c $(HEADERS)
	@mkdir -p build
	$(CC) $(CFLAGS) -I. -Wno-unused-function $(BLAS) $< -o $@ $(BLAS_LINK) $(LDLIBS)

test:
	scripts/test.sh

clean:
	rm -rf build train_mta infer_mta test_mta test_mta_nocblas train_mta_cuda test_mta_cuda test_mta_cuda_cpu test_mta_cuda_cpu_bf16
