# make venv         an environment in .venv, from this project's own files
# make quickstart   the whole journey on the shipped nano model
# make test         everything CI checks
# make oldest       the tests on the oldest releases that pyproject.toml allows, in .venv-oldest (gigabytes: that torch comes with CUDA)
VENV ?= .venv
PYTHON ?= python3
# One known release, installed before the rest: a plain `torch` is the newest, and on Linux that is gigabytes of CUDA
# libraries. Where a build is there already it is kept. Another build: make venv TORCH=torch==2.15.0, or a wheel's path.
TORCH ?= torch==2.13.0

PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check
READY := $(VENV)/.ready
HAS_TORCH := $(VENV)/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"

.PHONY: venv quickstart test lint bench oldest
venv: $(READY)

ifneq ($(origin TORCH), file)
.PHONY: $(READY) # a build was asked for by name: see to it, even if the environment was ready
HAS_TORCH := false
endif

$(READY): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(HAS_TORCH) || $(PIP) '$(TORCH)'
	$(PIP) --editable '.[dev,plots]'
	touch $@

quickstart: venv
	$(VENV)/bin/comatch quickstart

lint: venv
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/pytest

oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -qq --disable-pip-version-check --constraint tests/oldest.txt --editable '.[dev,plots]'
	.venv-oldest/bin/pytest

bench: venv
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(VENV)/bin/python "$$script"; done
