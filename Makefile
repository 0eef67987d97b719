# Two commands: `make demo` shows the whole job in three minutes, `make test` runs the suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean

demo: install
	rm -rf outputs/digits
	$(BIN)/accelerate launch recipes/distill.py

test: install
	$(BIN)/python -m pytest

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
	rm -rf $(VENV) outputs
