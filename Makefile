# `make demo` and `make test` need Python 3.11 or later, a C++ compiler and pip; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt

.PHONY: demo test lint format build bench gpu compile-all fuzz emulate wheel-check clean

# Threads that spin while they wait make a machine that is also busy with something else twenty times slower.
demo: $(VENV)/.demo build
	OMP_WAIT_POLICY=PASSIVE $(BIN)/peftrt demo

# Most tests keep one core busy. A file stays with one worker: some compile what all their tests run.
test: $(VENV)/.test build
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')

# Compiles csrc/ only where a source, a flag or torch has changed.
build: | $(VENV)/.torch
	$(BIN)/python -m peftrt build

bench: $(VENV)/.test build
	$(BIN)/pytest --benchmark

# On a machine with a GPU: builds, tests and measures in under 8 minutes, offline, with the Python that has torch; installs
# nothing. OUT=dir for the results, ONLY="nf4_linear bench" for a part.
OUT ?= .benchmarks/gpu
gpu:
	$(PYTHON) -m bench.gpu --out $(OUT) $(if $(ONLY),--only $(ONLY))

# The whole of what `make test` takes samples of: every Triton kernel for every target, and long runs over random shapes.
compile-all: $(VENV)/.test
	$(BIN)/python -m tests.kernels.compiled

fuzz: $(VENV)/.test build
	$(BIN)/pytest tests --fuzz

# A long run of the kernels that this machine's CPU may not run: tests/test_native_emulated.py has what it needs.
emulate: $(VENV)/.test
	$(BIN)/pytest tests/test_native_emulated.py --fuzz

# Builds a wheel, installs it beside nothing but its dependencies, and uses it outside the checkout.
wheel-check: | $(VENV)/.torch
	bash .ci/wheel-check $(KEEP)

# torch first: peftrt compiles against the torch of the environment that it is installed into.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info peftrt/_C
