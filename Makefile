# Two commands: `make demo` shows the whole job in three minutes, `make test` runs the suite.
# `make contract` runs what every family passes and writes the README's table of it; `make oldest` runs it against the
# oldest transformers and timm that pyproject.toml allows, in an environment layered over the first (one model of each
# family; CI leaves the slow points out there by SELECT).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OLDEST_VERSIONS := $(shell sed -nE 's/.*"(transformers|timm)>=([0-9.]+)".*/\1==\2.*/p' pyproject.toml)
# Two tests at a time. They must not both spin for the two cores that a small machine has.
PARALLEL := -n 2
PYTEST := OMP_WAIT_POLICY=PASSIVE

.PHONY: demo test contract oldest lint install clean

demo: install
	rm -rf outputs/digits
	$(BIN)/accelerate launch recipes/distill.py

test: install
	$(PYTEST) $(BIN)/python -m pytest $(PARALLEL) --contract-table README.md tests

contract: install
	$(PYTEST) $(BIN)/python -m pytest $(PARALLEL) --contract-table README.md tests/contract

oldest: install
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	ls -d $(CURDIR)/$(VENV)/lib/python3*/site-packages > $$(ls -d $(OLDEST)/lib/python3*/site-packages)/newest.pth
	$(OLDEST)/bin/python -m pip install --quiet $(OLDEST_VERSIONS)
	$(PYTEST) $(OLDEST)/bin/python -m pytest $(PARALLEL) --leads tests/contract $(SELECT)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[recipes,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) outputs
