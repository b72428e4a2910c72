# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
SHELL  := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu lint types format lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.done ## build .venv with the pinned packages

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,s3,kubernetes]'
	@# its pins cannot be met beside diffusers; what it imports is in our own dependencies (see pyproject.toml)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt mosaicml-streaming
	touch $@
