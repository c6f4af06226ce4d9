# SPDX-License-Identifier: Apache-2.0
# Every target sets up its own .venv first. `make demo EXTRA=cuda` takes another backend, `make test ARGS="-k dpo"` other tests.

ifeq ($(shell uname -s),Linux)
EXTRA ?= cpu
else
EXTRA ?=
endif
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
comma := ,
EXTRAS = $(if $(EXTRA),[$(EXTRA)])
DEV = [dev$(if $(EXTRA),$(comma)$(EXTRA))]
# The backends exclude each other, so each has an environment of its own.
VENV = .venv$(if $(filter-out cpu,$(EXTRA)),-$(EXTRA))
BIN = $(VENV)/bin

.PHONY: help demo test lint types format check clean

help:
	@echo "make demo    train the embedded model by every method, offline, and show what changed"
	@echo "make test    all quick tests        make lint    ruff        make types    pyright"
	@echo "make check   what a change must pass: test, lint, types, a short demo"

demo: $(VENV)/run.stamp
	$(BIN)/python -m mlx_realign.demo $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp
	$(BIN)/pyright

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check:
	bash .ci/run

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: none found. make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(DEV)'
	touch $@ $(VENV)/run.stamp
