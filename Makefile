# Everything from a bare clone, with Python 3.11 or newer and make:  make train   make test
# Options of a target go in ARGS:  make train ARGS="small run.steps=500"

PYTHON ?= python3
ARGS ?=
VENV := .venv
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install train test test-fast check docs docs-config doctor levels chaos bench bench-long bench-optimizers bench-delays bench-memories bench-stacking

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Options go in ARGS, for example: make train ARGS="small run.steps=500"'

install: $(INSTALLED)  ## create .venv with pinned packages (the others do it when needed)

train: $(INSTALLED)  ## train a model here; without ARGS the preset tiny, minutes on two CPU cores
	$(VENV)/bin/nlray train $(ARGS)

# Tests without Ray on every core (up to 8, each with a torch of its own), then those with Ray, two files at a time, each with clusters of its
# own; status 5 is that ARGS chose none of a kind.
define run_tests
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m "$(1) and not ray" -n auto --maxprocesses 8 $(ARGS) || [ $$? -eq 5 ]
	$(VENV)/bin/pytest -m "$(1) and ray" -n 2 --dist loadfile $(ARGS) || [ $$? -eq 5 ]
endef

test: $(INSTALLED)  ## run every test that needs no GPU, but those of make chaos
	$(call run_tests,not chaos)

test-fast: $(INSTALLED)  ## run the tests that take less than a quarter of a minute each
	$(call run_tests,not slow and not chaos)

check: $(INSTALLED)  ## lint, format, and which way the imports point
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pytest tests/test_imports.py -n 2

docs: $(VENV)/.installed-docs  ## build the documentation into site/; a broken link or a page left out fails
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict $(ARGS)
	@echo 'to read it: $(VENV)/bin/python -m mkdocs serve'

doctor: $(INSTALLED)  ## report versions, GPUs, memory, Ray, disk
	$(VENV)/bin/nlray doctor $(ARGS)

levels: $(INSTALLED)  ## print a model's nested system and what it costs
	$(VENV)/bin/nlray levels $(ARGS)

docs-config: $(INSTALLED)  ## write docs/configuration.md from the docstrings of the configuration
	$(VENV)/bin/python -m nlray.config.docs > docs/configuration.md

chaos: $(INSTALLED)  ## do faults at chosen moments and at random, and compare with quiet runs; about an hour
	$(VENV)/bin/pytest -m chaos
	$(VENV)/bin/python -m benchmarks.chaos $(ARGS)

bench: $(INSTALLED)  ## run a benchmark suite: make bench SUITE=layer ARGS="--peers"; without SUITE the suite step
	$(VENV)/bin/python -m benchmarks $(or $(SUITE),step) $(ARGS)

bench-long: $(INSTALLED)  ## measure a trained model far beyond its training length: make bench-long RUN=runs/NAME
	@test -n "$(RUN)" || { echo 'say which run: make bench-long RUN=runs/NAME' >&2; exit 2; }
	$(VENV)/bin/python -m experiments.long_context $(RUN) $(ARGS)

bench-optimizers: $(INSTALLED)  ## measure a step of each optimizer; ARGS="--part table": the loss each reaches, hours, goes on where it stopped
	$(VENV)/bin/python -m experiments.optimizers $(or $(ARGS),--part cost)

bench-delays: $(INSTALLED)  ## train with and without delays of the levels; hours, goes on where it stopped
	$(VENV)/bin/python -m experiments.delays $(ARGS)

bench-memories: $(INSTALLED)  ## train every memory in context on recall and on text; hours, goes on where it stopped
	$(VENV)/bin/python -m experiments.memories $(ARGS)

bench-stacking: $(INSTALLED)  ## pretrain a small transformer, stack it, go on with another text; an hour, goes on where it stopped
	$(VENV)/bin/python -m experiments.stacking $(ARGS)

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'nlray needs Python 3.11 or newer; $(PYTHON) is not: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo 'cannot create $(VENV): the venv module of $(PYTHON) is missing (Debian: apt install python3-venv)' >&2; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(INSTALLED)
	$(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@
