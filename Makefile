# `make demo`: from a fresh clone to reports/index.html. `make test`: the tests. `make compare`: methods x seeds as DVC experiments.
# All make .venv first, once.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)

# Of make compare: recipes, seeds, how many seeds at a time, and a recipe to lay them over with where its images are.
VARIANTS ?= $(patsubst recipes/%.yaml,%,$(wildcard recipes/method-*.yaml))
SEEDS ?= 0 1 2
JOBS ?= 1
BASE ?=
ROOT ?=

.PHONY: demo test compare setup lint clean-state
demo: setup
	dvc repro
	@echo "the report: $(CURDIR)/reports/index.html"

test: setup
	python -m pytest -q

compare: setup
	python -m benchmarks.compare --variants $(VARIANTS) --seeds $(SEEDS) --jobs $(JOBS) $(if $(BASE),--base $(BASE)) $(if $(ROOT),--root $(ROOT))

setup: $(VENV)/.done
$(VENV)/.done: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	dvc config --local core.analytics false
	touch $@

lint: setup
	ruff check .
	ruff format --check .
	mypy

clean-state:
	rm -rf .bingo/state
