# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first.
# Needed from the system: Python 3.11 or newer with venv, git, make. No compiler, no GPU.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help demo learn test lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   install, then videos -> shards -> autoencoder -> latents -> text-to-video -> samples in ./demo"
	@echo "make learn  the same chain for half an hour, in ./learn"
	@echo "make test   install, then run the test suite"
	@echo "make lint   install, then ruff and mypy"
	@echo "make clean  remove ./demo and .venv"

demo: .venv/installed-demo
	$(BIN)/python tools/demo.py

learn: .venv/installed-demo
	$(BIN)/python tools/demo.py --learn

test: .venv/installed-test
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf demo .venv

# One stamp an extra, renewed when the requirements change.
.venv/installed-%: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --editable .[$*]
	touch $@
