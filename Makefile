# Two commands do everything on a fresh machine with Python 3.11+ and pip:
#   make demo   sets up, trains, measures and asks a small Router-R1 (runs/demo/)
#   make test   sets up, runs the tests
PYTHON ?= python3
VENV ?= .venv
# Installed first, so that no later requirement picks another build of it.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test check docs clean

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Guerdon needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV) (the largest download)"
	$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "Installing Guerdon with what the demo needs"
	$(PIP) install -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "Installing Guerdon with what its tests, checks and docs need"
	$(PIP) install -e ".[dev]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/guerdon route demo --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python -m guerdon.papers.pages docs
	$(BIN)/python -m guerdon.report.reward_page docs/rewards.md
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .mypy_cache
