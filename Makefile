# make demo | make test: both begin from a bare checkout. PYTHON names the interpreter that the virtual environment is made of.
PYTHON ?= python3
BUILD ?= build

# In-place developer build: libraries land in pykernels/, run with PYTHONPATH=.
dev:
	cmake -S . -B $(BUILD) -G Ninja -DPython_EXECUTABLE=$(PYTHON) -DCMAKE_EXPORT_COMPILE_COMMANDS=ON $(CMAKE_ARGS) > /dev/null
	cmake --build $(BUILD) -j2
	cmake --install $(BUILD) --prefix . > /dev/null

.PHONY: dev
