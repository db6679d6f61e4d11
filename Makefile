# `make demo`: from a fresh clone to reports/index.html. `make test`: the tests. Both make .venv first, once.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)

.PHONY: demo test setup lint clean-state
demo: setup
	dvc repro
	@echo "the report: $(CURDIR)/reports/index.html"

test: setup
	python -m pytest -q

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
