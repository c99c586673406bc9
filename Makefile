# The environment is made once, by whichever target needs it first. PYTHON names the interpreter it is made from.
PYTHON ?= python3
# Processes of the test suite. Most of a test is compiling, on one thread.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# The packages of public models have an environment of their own, since their exact versions may not fit the tests'.
PUBLIC_VENV := .venv-public-models

# Options of the attack and of the reproduction, see `python -m benchmarks.attack --help` and
# `python -m experiments.reproduce --help`.
ARGS ?=

.PHONY: help demo reproduce report bench attack test test-slow zoo-table primitive-table public-models mutate docs check format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(STAMP)  ## train ten small networks on digits, align them, print the table, draw the figure
	$(BIN)/python -m experiments.training_trajectories --preset=demo --output_dir=results/demo

reproduce: $(STAMP)  ## all experiments on the digits, and reproduction/report/index.html; the same again goes on
	$(BIN)/python -m experiments.reproduce --preset=digits --output_dir=reproduction $(ARGS)

report: $(STAMP)  ## docs/report from the results in results/; nothing is run
	$(BIN)/python -m experiments.reproduce --results=results --figures=beside --output_dir=docs

bench: $(STAMP)  ## time, objective and barrier of weight matching against git-re-basin's loop, half an hour
	$(BIN)/python -m benchmarks.weight_matching --output=results/weight_matching

attack: $(STAMP)  ## kill, race, damage and misuse everything and write the table in docs/reliability.md, 20 minutes
	$(BIN)/python -m benchmarks.attack $(ARGS)

test: $(STAMP)  ## the test suite, at most eight minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)  ## full widths and many seeds
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

zoo-table: $(STAMP)  ## verify the spec of every architecture of the zoo and write their table in docs/architectures.md
	PYTHONPATH=tests/inference:. $(BIN)/python tests/inference/zoo_table.py

primitive-table: $(STAMP)  ## write the table of docs/primitives.md, of every primitive of JAX and its rule
	PYTHONPATH=tests/inference $(BIN)/python tests/inference/primitive_table.py

public-models: $(PUBLIC_VENV)/installed  ## verify the specs of public models and write their table in docs/architectures.md
	$(PUBLIC_VENV)/bin/python -W ignore -m benchmarks.public_models

mutate: $(STAMP)  ## make errors in a copy of the library, see whether tests notice, and write docs/mutations.md
	$(BIN)/python -m benchmarks.mutate

docs: $(STAMP)  ## build the book in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the environment and caches
	rm -rf $(VENV) $(PUBLIC_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The stamp is written last, so that an interrupted install is done again.
$(STAMP): setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "rebasin needs Python 3.11 or newer, got " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(STAMP)

$(PUBLIC_VENV)/installed: setup.py
	$(PYTHON) -m venv $(PUBLIC_VENV)
	$(PUBLIC_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[public-models]'
	@touch $@
