# POSIX tools only: python3, make and git are all a fresh machine needs.

PYTHON ?= python3
VENV ?= .venv
# Where torch's CPU build is looked for before PyPI. Empty: PyPI only (on Linux x86-64 that is the CUDA build).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# What is installed beside the project. CI adds int8: torchao warns whenever transformers is imported, and slows that.
EXTRAS ?= training,dev
# They run in two processes. Of the others some say how long something may take, or load the machine.
SIDE_BY_SIDE = tests/core tests/docker tests/docs tests/parity tests/training tests/test_architecture.py \
	$(addprefix tests/service/,adapters cli client dialects)
BIN = $(VENV)/bin
COMMA = ,
# Named after the extras: others are installed when they are asked for.
STAMP = $(VENV)/.scaledown-$(subst $(COMMA),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help setup base-models demo bench test test-xla lint format audit sbom pins clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

setup: $(STAMP) base-models ## create .venv with everything in it and fetch the demo's base models

# Runs again only when what is to be installed changes. The stamp is written last: an interrupted set-up starts over.
# torch comes first and alone, from an index that holds only CPU builds. No retries and a short timeout: where that
# index cannot be reached (a mirror of PyPI only) a few seconds are lost and torch comes from the ordinary index.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ScaleDown needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (first time: a few minutes)"
	@if test -n "$(TORCH_INDEX)" && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
		$(BIN)/python -m pip install -qq --no-deps --retries 0 --timeout 15 \
			--index-url $(TORCH_INDEX) --constraint constraints.txt torch 2>/dev/null || \
		echo "$(TORCH_INDEX) does not answer: taking torch from the ordinary index"; \
	fi
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

base-models: $(STAMP)
	@$(BIN)/python -c 'from core.base_models import resolve_base_model as get; get("smollm2-135m"); get("minilm-l6")'

demo: setup ## start the service on a fresh or the shipped checkpoint, ask one question in three modes, stop it
	@$(BIN)/python -m service.demo

bench: setup ## text, compressed and hybrid side by side: speed, operations, memory; writes runs/benchmark (an hour)
	$(BIN)/python -m service.benchmark engine

test: setup ## set up, then types, lint, format and the whole test suite
	$(BIN)/python -m mypy --strict
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE:%=--ignore=%)

# 7 GB: PyPI's torch 2.9 brings the CUDA libraries and does not load without them.
test-xla: ## run the tests on XLA's CPU device, in .venv-xla: the graphs of both models, and training for Trainium
	test -x $(VENV)-xla/bin/python || $(PYTHON) -m venv $(VENV)-xla
	$(VENV)-xla/bin/python -m pip install -qq --requirement requirements/xla-cpu-test.txt
	USE_TORCH_XLA=false PJRT_DEVICE=CPU $(VENV)-xla/bin/python -m pytest tests/xla tests/training/test_devices.py -k xla

lint: $(STAMP) ## types, lint and format only
	$(BIN)/python -m mypy --strict
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

.PHONY: docs
docs: $(STAMP) ## build the documentation into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

audit: $(STAMP) ## look up known vulnerabilities of what is installed (asks PyPI's or OSV's advisory service)
	@$(BIN)/python .ci/audit.py

sbom: $(STAMP) ## what is installed, as CycloneDX JSON on standard output
	@$(BIN)/python .ci/audit.py sbom

pins: $(STAMP) ## pin what the images install to the versions that are installed here
	@$(BIN)/python .ci/pins.py > requirements/images.new && mv requirements/images.new requirements/images.txt

clean: ## remove the environment and the tools' caches, not the base models
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
