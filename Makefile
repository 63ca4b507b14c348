# The two commands a newcomer needs are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DOCS_STAMP := $(VENV)/docs-installed
EXTRAS_STAMP := $(VENV)/extras-installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check bench bench-gpu bench-generation bench-memory bench-export bench-recipe docs clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(STAMP) ## create .venv with the tested versions

# torch comes first and by its exact version: an unpinned torch would pull gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $(STAMP)

demo: $(STAMP) ## data-free 4-bit and 2-bit training of the bundled teacher (about 8 minutes on 2 cores)
	$(BIN)/lightning-qat demo

# Two workers, one file at a time each: what a file's tests share is made once.
test: $(STAMP) ## the default tests (about 6 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(EXTRAS_STAMP) ## every test, the slow ones too
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP) ## ruff, mypy, import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# What only some users have.
$(EXTRAS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[datasets]'
	touch $(EXTRAS_STAMP)

bench: $(EXTRAS_STAMP) ## speed and memory against unquantized training and peers, CPU (about 10 minutes on 2 idle cores)
	$(BIN)/python -m benchmarks

bench-gpu: $(EXTRAS_STAMP) ## the same on a GPU
	$(BIN)/python -m benchmarks --device cuda

bench-generation: $(STAMP) ## tokens per second of generation, and training from kept probabilities (about 40 minutes on 2 idle cores)
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.targets

bench-memory: $(STAMP) ## memory of the loss, of a distillation step, and of LoRA (about 20 minutes)
	$(BIN)/python -m benchmarks.loss_memory
	$(BIN)/python -m benchmarks.lora_memory

bench-export: $(STAMP) ## every scheme in every export format, and perplexity in every runtime (about 25 minutes on 2 idle cores)
	$(BIN)/python -m benchmarks.export_table
	$(BIN)/python -m benchmarks.export_perplexity

bench-recipe: $(STAMP) ## LLM-QAT against the reference recipe, three seeds (about 35 minutes on 2 cores)
	$(BIN)/python benchmarks/reference_recipe.py

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $(DOCS_STAMP)

docs: $(DOCS_STAMP) ## build the documentation, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

clean: ## remove what was built, keep runs/
	rm -rf $(VENV) site *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
