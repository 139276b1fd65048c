# Tasks of this repository. `make setup` is all that a fresh clone needs; it and `make kernels`
# do nothing where nothing changed.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
READY := .venv/.everstep-ready
LIBRARY := kernels/libeverstep_kernels.so
LINKS := .view/.everstep-links
FOLDERS := agent client erasure kernels proto snapshot storage
FACE := __init__.py dcp.py py.typed
PROTO_SERVICES := everstep/proto/agent.proto everstep/proto/peer.proto
PROTO_SOURCES := $(PROTO_SERVICES) everstep/proto/state.proto
KERNEL_SOURCES := CMakeLists.txt $(wildcard kernels/*.cpp kernels/*.h)
GENERATED := build/proto-check
ADAPTER_TESTS := tests/adapters
QUIET_TESTS := tests/unit tests/contract tests/golden tests/sim tests/test_layering.py

.PHONY: help setup view kernels proto check test test-long test-gpu fault bench demo wheel clean

help:
	@echo "setup      a virtual environment in .venv with Everstep and its tools, editable"
	@echo "view       .view/everstep: the package as it will be installed, for PYTHONPATH and mypy"
	@echo "kernels    the native library, in kernels/"
	@echo "proto      the generated gRPC and protobuf code, in proto/"
	@echo "check      lint, format, types, and that the generated code is up to date"
	@echo "test       the tests that every change must pass"
	@echo "test-long  the tests that take minutes"
	@echo "test-gpu   the tests that need a GPU, with PYTHON as it is: no .venv, no registry"
	@echo "fault      the fault tests, long ones included"
	@echo "bench      every script in benchmarks/; one of them: make bench BENCH=benchmarks/x.py"
	@echo "demo       train a small model, kill it, and see it recover"
	@echo "wheel      dist/everstep-*.whl"
	@echo "clean      remove what is built; .venv stays"

setup: $(READY)

# pip's own isolation builds the wheel, so that .venv need not hold a build backend.
$(READY): pyproject.toml constraints.txt CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps torchtitan
	touch $@

view: $(LINKS) kernels

$(LINKS): Makefile
	mkdir -p .view/everstep
	for name in $(FACE); do ln -sfn ../../everstep/$$name .view/everstep/$$name; done
	for folder in $(FOLDERS); do ln -sfn ../../$$folder .view/everstep/$$folder; done
	touch $@

kernels: $(LIBRARY)

# Installed through the view's link, the library lands in kernels/ itself. Being newer, it is
# loaded instead of the one that pip built.
$(LIBRARY): $(KERNEL_SOURCES) | $(LINKS)
	cmake -S . -B build/dev -DEVERSTEP_WARNINGS_ARE_ERRORS=ON
	cmake --build build/dev
	cmake --install build/dev --prefix .view
	touch $@

# The virtual path makes the generated imports say `everstep.proto`.
define generate
	$(BIN)/python -m grpc_tools.protoc -Ieverstep/proto=proto \
	    --python_out=$(1) --pyi_out=$(1) $(PROTO_SOURCES)
	$(BIN)/python -m grpc_tools.protoc -Ieverstep/proto=proto \
	    --grpc_python_out=$(1) $(PROTO_SERVICES)
endef

proto: setup $(LINKS)
	$(call generate,.view)

check: setup view
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf $(GENERATED) && mkdir -p $(GENERATED)
	$(call generate,$(GENERATED))
	@for file in $(GENERATED)/everstep/proto/*; do \
	    diff -u proto/$$(basename $$file) $$file \
	    || { echo "proto/$$(basename $$file) is out of date: run 'make proto'"; exit 1; }; \
	done

# Tests with processes of their own go by file, as files share agents and fleets; they are not to
# carry the libraries along that the adapters are for.
test: setup kernels
	$(BIN)/pytest -n auto --maxprocesses 8 $(QUIET_TESTS)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile \
	    $(addprefix --ignore ,$(QUIET_TESTS) $(ADAPTER_TESTS))
	$(BIN)/pytest $(ADAPTER_TESTS)

test-long: setup kernels
	$(BIN)/pytest -m "long and not gpu"

test-gpu: view
	PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/.view $(PYTHON) -m pytest -m gpu

fault: setup kernels
	$(BIN)/pytest -m "not gpu" tests/fault

bench: BENCH ?= $(sort $(wildcard benchmarks/*.py))
bench: setup kernels
	set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script; done

demo: setup kernels
	$(BIN)/everstep demo

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist .view .mypy_cache .ruff_cache .pytest_cache .hypothesis $(LIBRARY)
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
