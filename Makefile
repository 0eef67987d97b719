# Two commands: `make demo` shows the whole job in three minutes, `make test` runs the suite.
# `make docs` builds the pages into site/. `make contract` runs what every model of every family passes and writes the
# table of it in docs/supported.md, of which `make test` runs a slice, another one every hour; `make oldest` runs it
# against the oldest transformers and timm that pyproject.toml allows, in an environment layered over the first (one
# model of each family; CI leaves the slow points out there by SELECT). `make census` asks whether every kind of model
# that docs/supported.md lists is still taken.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OLDEST_VERSIONS := $(shell sed -nE 's/.*"(transformers|timm)>=([0-9.]+)".*/\1==\2.*/p' pyproject.toml)
# Two tests at a time, and whoever is done takes from the other. They must not both spin for two cores.
PARALLEL := -n 2 --dist worksteal
PYTEST := OMP_WAIT_POLICY=PASSIVE

.PHONY: demo test docs contract oldest census lint install clean

demo: install
	rm -rf outputs/digits
	$(BIN)/accelerate launch recipes/distill.py

test: install
	$(PYTEST) $(BIN)/python -m pytest $(PARALLEL) --slice now tests

contract: install
	$(PYTEST) $(BIN)/python -m pytest $(PARALLEL) --contract-table docs/supported.md tests/contract

oldest: install
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	ls -d $(CURDIR)/$(VENV)/lib/python3*/site-packages > $$(ls -d $(OLDEST)/lib/python3*/site-packages)/newest.pth
	$(OLDEST)/bin/python -m pip install --quiet $(OLDEST_VERSIONS)
	$(PYTEST) $(OLDEST)/bin/python -m pytest $(PARALLEL) --leads tests/contract $(SELECT)

census: install
	$(BIN)/python benchmarks/census.py --check

docs: install
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) outputs site
