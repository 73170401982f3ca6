# Two commands do everything on a fresh machine:
#   make generate    a real language model answers a question, token by token
#   make test        the tests
# Each makes its own virtual environment in this folder and touches nothing outside it.

PYTHON ?= python3
VENV ?= .venv
JAX ?=                  # a JAX version to test with, for example JAX=0.11.2; empty takes the newest for this Python

PROMPT ?=
MAX_NEW_TOKENS ?=
CACHE ?=
KV_DTYPE ?=
MODEL ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help generate test compile lint format bitcode benchmark clean

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# JAX's packages of the version asked for; its compiler for GPUs has JAX's own version.
PINNED = $(if $(strip $(JAX)),$(foreach package,jax $(if $(findstring gpu,$*),jax-cuda13-plugin jax-cuda13-pjrt),'$(package)==$(strip $(JAX))'))

# One stamp for each set of packages, renewed when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing jax-ifa and what '$*' needs into $(VENV) ..."
	$(INSTALL) --editable '.[$*]' $(PINNED)
	@touch $@

generate: $(VENV)/.installed-examples  ## Answer PROMPT= with a language model (MAX_NEW_TOKENS= CACHE= KV_DTYPE= MODEL=).
	@$(BIN)/python examples/generate.py \
	  $(if $(PROMPT),--prompt "$$PROMPT") $(if $(MAX_NEW_TOKENS),--max-new-tokens $(MAX_NEW_TOKENS)) \
	  $(if $(CACHE),--cache $(CACHE)) $(if $(KV_DTYPE),--kv-dtype $(KV_DTYPE)) $(if $(MODEL),--model "$$MODEL")
export PROMPT MODEL

test: $(VENV)/.installed-test  ## Run the tests.
	$(BIN)/python -m pytest --numprocesses auto $(PYTEST_ARGS)

compile: $(VENV)/.installed-test,tpu-compile,gpu-compile  ## Compile the kernels for TPUs and GPUs that are not here.
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile tests/test_tpu_compile.py tests/test_gpu_compile.py \
	  $(PYTEST_ARGS)

lint: $(VENV)/.installed-test,lint  ## Check format, style and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-test,lint  ## Format the code and mend what can be mended.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bitcode:  ## Renew what Numba makes of the CPU kernels, after a change of these.
	@$(MAKE) --no-print-directory VENV=$(VENV)-bitcode $(VENV)-bitcode/.installed-bitcode
	$(VENV)-bitcode/bin/python -m numba_kernels.bitcode

benchmark: $(VENV)/.installed-benchmarks  ## Measure against the rivals on this machine (see benchmarks/README.md).
	$(BIN)/python -m benchmarks.run

clean:  ## Remove the virtual environments and caches.
	rm -rf .venv* .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
