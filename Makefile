# make demo: train and compare plain fine-tuning and SOLAR on generated data. make test: run the tests. Each creates .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := source $(VENV)/bin/activate &&
# Packages are compiled when first imported (pip --no-compile); without bytecode on disk every process would do it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo demo-clean experiment screening test test-fast lint format clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check --upgrade pip  # resolves faster than Python's
	$(VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' requirements.txt)
	$(VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

# torch's CPU build lacks Triton, whose interpreter runs the GPU kernels in the tests. No wheel: these tests are skipped.
$(VENV)/.triton: $(VENV)/.installed
	$(VENV)/bin/python -c "import triton" 2>/dev/null || \
		$(VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check --no-deps triton==3.7.1 || true
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(RUN) python -m pipeline.demo

demo-clean:
	rm -rf runs/demo

# Takes about five and a half hours on two cores and resumes when interrupted. Runs one seed per GPU or core at a time.
# It needs pipeline/experiments/chosen.yaml, which `make screening` writes.
experiment: $(VENV)/.installed
	$(RUN) python -m pipeline.experiments

screening: $(VENV)/.installed
	$(RUN) python -m pipeline.experiments --plan pipeline/experiments/screening.yaml --output runs/screening
	cp runs/screening/chosen.yaml pipeline/experiments/chosen.yaml

# For a machine of two cores: the Slurm tests, in one of the processes, mostly wait, and so do many others.
test: $(VENV)/.triton
	$(RUN) python -m pytest -q -n 4

test-fast: $(VENV)/.triton
	$(RUN) python -m pytest -q -n 3 -m "not slow"

lint: $(VENV)/.installed
	$(RUN) ruff check . && ruff format --check . && mypy && lint-imports && shellcheck -x slurm/*.sh tests/slurm/*.sh

format: $(VENV)/.installed
	$(RUN) ruff check --fix . && ruff format .

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
