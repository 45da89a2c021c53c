# `make quickstart` and `make test` need nothing but Python 3.11 or later: they make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint install bench clean

quickstart: $(VENV)/.installed
	$(BIN)/jrlhf run experiments/larder/ppo_vs_dpo.py
	@echo 'To use the jrlhf command in this shell: . $(BIN)/activate    Then for example: jrlhf chat larder-ppo-vs-dpo:ppo'

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 15

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Beside TRL and Tunix, an hour: docs/performance.md. For example: make bench BENCH='--only sft --rounds 3'
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/peers.py run $(BENCH)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jrlhf needs Python 3.11 or later; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .jax_cache build *.egg-info
