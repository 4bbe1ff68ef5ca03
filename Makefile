# make demo | make test: both begin from a bare checkout and are quick the second time.
# PYTHON names the interpreter that the virtual environment is made of; TORCH_INDEX, if set, where torch comes from
# (https://download.pytorch.org/whl/cpu has the small CPU builds for machines whose default index has only CUDA ones).
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BUILD ?= build
PREFIX ?= .
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TESTS ?= tests

RUN := $(abspath $(VENV))/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
EMULATED := $(CURDIR)/build-emulate/package
# The interpreter under the environment's: it does not run the editable install's hook, which would find its own pykernels first.
BASE = $(shell $(RUN) -c 'import os, sys; print(os.path.realpath(sys.executable))')
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

demo: build  ## optimise a real network on real photographs: table, chart in out/
	$(RUN) -m examples.demo

test: build  ## the whole test suite; TESTS=... or PYTEST_ADDOPTS=... to choose
	$(RUN) -m pytest $(TESTS)

emulate: $(VENV)/.packages  ## the test suite under every isa, those that this CPU may lack emulated on AVX2 (slow)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(MAKE) dev PYTHON=$(RUN) BUILD=build-emulate PREFIX=$(EMULATED) \
	  CMAKE_ARGS="$(CMAKE_ARGS) -DPYKERNELS_EMULATE=ON"
	cd $(EMULATED) && PYTHONPATH="$(EMULATED):$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'):$(CURDIR)" \
	  $(BASE) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) $(addprefix $(CURDIR)/,$(TESTS))

bench: build $(VENV)/.bench  ## the benchmarks beside every rival that installs
	$(RUN) -m pykernels bench

lint: $(VENV)/.lint  ## ruff, mypy, clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	git ls-files -z 'csrc/*.h' 'csrc/*.cpp' | xargs -0 $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.lint  ## rewrite the sources as lint wants them
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	git ls-files -z 'csrc/*.h' 'csrc/*.cpp' | xargs -0 $(VENV)/bin/clang-format -i

build: $(VENV)/.installed  ## .venv with pykernels installed in it (editable)

# ---- what stands behind -------------------------------------------------------------------------------------------
# Each stamp is newer than what it was made of. torch comes first and alone, so that nothing else decides which one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch numpy
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) $$($(RUN) .ci/requirements.py --dependencies lint)
	@touch $@

# torchvision's own requirement would replace torch by the registry's build; the tests use its model definitions only.
$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	$(PIP) $$($(RUN) .ci/requirements.py --dependencies build test demo)
	$(PIP) --no-deps torchvision
	@touch $@

$(VENV)/.bench: $(VENV)/.packages
	$(PIP) $$($(RUN) .ci/requirements.py bench)
	@touch $@

# The build folder lives in the environment it is configured for.
$(VENV)/.installed: $(VENV)/.packages CMakeLists.txt $(shell find csrc -type f)
	$(PIP) --no-build-isolation --no-deps --config-settings=build-dir=$(abspath $(VENV))/build -e .
	@touch $@

# In-place developer build with any interpreter: libraries land in pykernels/, run with PYTHONPATH=.
dev:
	cmake -S . -B $(BUILD) -G Ninja -DPython_EXECUTABLE=$(PYTHON) -DCMAKE_EXPORT_COMPILE_COMMANDS=ON $(CMAKE_ARGS) > /dev/null
	cmake --build $(BUILD) -j$(JOBS)
	cmake --install $(BUILD) --prefix $(PREFIX) > /dev/null

clean:  ## forget every environment, build and output
	rm -rf $(VENV) build build-emulate out dist *.egg-info pykernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.DEFAULT_GOAL := help
.PHONY: help demo test emulate bench lint format build dev clean
.DELETE_ON_ERROR:
