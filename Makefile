# make demo: the whole job on an embedded default. make test: the tests. Each creates .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := source $(VENV)/bin/activate &&

.PHONY: demo demo-clean experiment test test-fast lint format clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' requirements.txt)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/.installed
	$(RUN) python -m pipeline.demo

demo-clean:
	rm -rf runs/demo

# An hour and more on two cores; started again, it goes on. One seed at a time per GPU or core.
experiment: $(VENV)/.installed
	$(RUN) python -m pipeline.experiments

test: $(VENV)/.installed
	$(RUN) python -m pytest -q

test-fast: $(VENV)/.installed
	$(RUN) python -m pytest -q -m "not slow"

lint: $(VENV)/.installed
	$(RUN) ruff check . && ruff format --check . && mypy && lint-imports && shellcheck -x slurm/*.sh tests/slurm/*.sh

format: $(VENV)/.installed
	$(RUN) ruff check --fix . && ruff format .

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
