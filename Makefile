# PLA-Serve. Two commands do all set-up:
#
#   make serve    install, fetch the model, serve it on http://127.0.0.1:8000
#   make test     install, then run every check that a change must pass
#
# And one for the vLLM plugin, which lives beside vLLM (an environment of its own, about 3 GB):
#
#   make test-vllm
#
# And one for the application on Ray Serve (an environment of its own, about 300 MB):
#
#   make test-ray
#
# And one for coding agents from npm, which edit a file through a server (about 250 MB):
#
#   make test-agents
#
# Variables, as in `make serve PORT=9000`:
#   PYTHON       the Python to build the environment with, 3.11 or newer     (python3)
#   VENV         where the environment lies                                 (.venv)
#   MODEL        a folder of safetensors, a GGUF file, or a Hugging Face id (SmolLM2-135M-Instruct)
#   VLLM_VENV    where vLLM for CPUs and the plugin's tests lie              (.venv-vllm)
#   RAY_VENV     where Ray and the tests of the application on it lie        (.venv-ray)
#   HOST, PORT   where to listen                                            (127.0.0.1, 8000)
#   ARGS         further options of `pla-serve serve`, or of pytest         (none)
#   TORCH_INDEX  a package index for torch. On Linux, PyPI's build brings several gigabytes of CUDA;
#                for a CPU use TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
RAY_VENV ?= .venv-ray
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

# Stamps say what an environment holds, so that a second run installs nothing.
MADE := $(VENV)/.pla-serve-made
TORCHED := $(VENV)/.pla-serve-torch
INSTALLED := $(VENV)/.pla-serve-installed
DEVELOPED := $(VENV)/.pla-serve-dev

.DEFAULT_GOAL := help
.PHONY: help install dev serve test test-vllm test-ray test-agents lint format

help:
	@awk '/^#/ { sub(/^# ?/, ""); print; next } { exit }' Makefile

install: $(INSTALLED)

dev: $(DEVELOPED)

serve: $(INSTALLED)
	$(BIN)/pla-serve serve "$(MODEL)" --host "$(HOST)" --port "$(PORT)" $(ARGS)

test: lint
	$(BIN)/pytest $(ARGS)

test-vllm: $(DEVELOPED)
	$(BIN)/python benchmarks/vllm_venv.py "$(VLLM_VENV)" $(if $(TORCH_INDEX),"$(TORCH_INDEX)")
	MODEL_FOLDER="$$($(BIN)/python benchmarks/vllm_venv.py --model | tail -n 1)" && \
	  PLA_SERVE_TEST_PROGRAM="$(abspath $(BIN))/pla-serve" \
	  PLA_SERVE_TEST_MODEL="$$MODEL_FOLDER" PYTHONPATH=. $(VLLM_VENV)/bin/python -m pytest \
	  -o filterwarnings=default -p no:cacheprovider tests/plugins $(ARGS)

test-ray: $(DEVELOPED)
	$(BIN)/python benchmarks/ray_venv.py "$(RAY_VENV)"
	PYTHONPATH=. $(RAY_VENV)/bin/python -m pytest \
	  -o filterwarnings=default -p no:cacheprovider tests/plugins/ray $(ARGS)

test-agents: $(DEVELOPED)
	npm ci --prefix tests/agents --no-audit --no-fund --ignore-scripts
	$(BIN)/pytest tests/agents $(ARGS)

lint: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEVELOPED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(MADE):
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PLA-Serve needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

# torch comes first and alone: its index may be another one than that of the rest.
$(TORCHED): $(MADE) constraints.txt
	$(PIP) install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") $(TORCH)
	@touch $@

$(INSTALLED): $(TORCHED) pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(DEVELOPED): $(INSTALLED)
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@
