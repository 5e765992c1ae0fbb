MAKEFLAGS += --no-print-directory

PYTHON ?= python3
WORKDIR ?= runs/tiny
# uv installs the same lock several times faster than pip, which is used where uv cannot be had.
UV := uv==0.13.9
VENV ?= .venv
BIN := $(VENV)/bin
# The lock has jax for CPUs, and a libtpu that only compiles: jax need not look for TPUs, which takes a while and warns.
export JAX_PLATFORMS ?= cpu

# XLA asks for a step's temporaries anew in every step. With these settings glibc keeps the memory meanwhile, in huge
# pages: without them a sixth of a step on a CPU is page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000

.PHONY: help install demo test smoke smoke-tests lint format lines lock clean

help: ## List these targets.
	@awk -F ': .*## ' '/^[a-z]+: .*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed ## Install the locked dependencies and sedd_jax itself into .venv (PYTHON=python3).

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 11) or sys.exit( \
	  "sedd_jax needs Python 3.11 or newer and $(PYTHON) is %s: name another one, as in make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.lock setup.py | $(BIN)/pip
	@echo "Installing requirements.lock into $(VENV)" >&2
	@{ $(BIN)/pip install -q $(UV) \
	    && $(BIN)/uv pip install -q --python $(BIN)/python -r requirements.lock \
	    && $(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .; } >&2 \
	  || { $(BIN)/pip install -q -r requirements.lock && $(BIN)/pip install -q --no-deps -e .; } >&2
	@touch $@

demo: install ## Fill holes with models/kjv, then train a tiny model, evaluate it, sample and infill (WORKDIR=runs/tiny); the last line is JSON.
	@set -ex; \
	$(BIN)/python -m sedd_jax.sample --workdir=models/kjv --num=2 --temperature=0.7 \
	  --template='And the king said unto [[6]], [[24]].' >&2; \
	$(BIN)/python -m sedd_jax.train --config=configs/tiny.py --workdir=$(WORKDIR) >&2; \
	$(BIN)/python -m sedd_jax.evaluate --workdir=$(WORKDIR) >&2; \
	$(BIN)/python -m sedd_jax.sample --workdir=$(WORKDIR) --num=2 >&2; \
	$(BIN)/python -m sedd_jax.sample --workdir=$(WORKDIR) --template='The [[4]] statement is used to [[24]].'

test: install ## Run the tests.
	@$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

smoke: ## Test the commands and a few laws on another Python, in a venv of its own (PYTHON=python3.13).
	@version=`$(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'` \
	  && $(MAKE) VENV=.cache/venv-$$version smoke-tests

smoke-tests: install
	@$(BIN)/python -m pytest tests/test_commands.py tests/test_noise.py tests/test_rates.py

lint: install ## Check style, format and the direction of imports.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

format: install ## Sort imports, fix what can be fixed, and format.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# The files that lead from a config to a sample and its likelihood (docs/architecture.md).
READ := config.py training/options.py training/experiment.py data/dataset.py data/packing.py data/loader.py noise.py \
  rates.py categorical.py score_entropy.py transformer/model.py transformer/attention.py transformer/linear.py \
  training/state.py training/step.py training/loop.py sampling/__init__.py sampling/sampler.py sampling/process.py sampling/methods.py likelihood.py

lines: ## Count the lines of the package, and of the path to read in it.
	@echo "package: `cat $$(git ls-files 'sedd_jax/*.py') | wc -l`, path to read: `cd sedd_jax && cat $(READ) | wc -l`"

lock: $(BIN)/pip ## Write requirements.lock anew from setup.py (LOCKFLAGS=--upgrade for newer versions).
	@$(BIN)/pip install -q $(UV)
	@$(BIN)/uv pip compile -q setup.py --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(LOCKFLAGS) -o requirements.lock

clean: ## Remove .venv and all caches; runs/ stays.
	@rm -rf .venv .cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
