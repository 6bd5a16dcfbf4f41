# `make` lists the targets. Nothing but python, pip, make and git is needed.

ENVIRONMENT := .venv
BIN := $(ENVIRONMENT)/bin
TORCH := $(shell sed -n 's/^torch==//p' requirements/constraints.txt)
CONSTRAINED := -c requirements/constraints.txt

# The first Python of a version we support that runs and can make environments.
SUITABLE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for name in python3 python3.12 python3.11 python3.13; do \
	$$name -c '$(SUITABLE)' >/dev/null 2>&1 && echo $$name && break; done)

GPU_PYTHON ?= python3

# -qq: pip says nothing but errors.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# Two files at a time in the order of their names: those that start whole clusters (tests/pipeline)
# come before the many short ones, which fill the end.
SUITE := $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check format docs environment gpu-check smollm2 clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: environment ## distil a student on the embedded tasks and write a report (under 10 minutes)
	$(BIN)/distill-system train configs/quickstart.yaml

test: environment ## run the whole test suite
	$(SUITE)

check: environment ## what a change must pass: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(SUITE)

format: environment ## format the code and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

EXAMPLE := deploy/kubernetes/quickstart.yaml

docs: environment ## write docs/configuration.md and the Kubernetes example anew
	$(BIN)/python -m distill_system.config.reference > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md
	head -2 $(EXAMPLE) > $(EXAMPLE).new
	$(BIN)/$$(sed -n '1s/^# //p' $(EXAMPLE)) >> $(EXAMPLE).new
	mv $(EXAMPLE).new $(EXAMPLE)

# With whatever Python is there: the machine that has a GPU may have neither Ray nor vLLM.
gpu-check: ## what one GPU can prove, in ten minutes: docs/gpu.md (GPU_PYTHON=python3)
	PYTHONPATH=. PYTORCH_NVML_BASED_CUDA_CHECK=1 $(GPU_PYTHON) benchmarks/gpu_check.py

smollm2: environment ## a real pretrained pair and its data for configs/smollm2.yaml (INSTRUCTIONS=FOLDER)
	$(PIP) install $(CONSTRAINED) -e ".[gguf]"
	$(BIN)/python benchmarks/smollm2.py smollm2 --selfinst $(INSTRUCTIONS)/selfinst \
		--strategyqa $(INSTRUCTIONS)/strategyqa

environment: $(ENVIRONMENT)/.complete ## install the pinned CPU environment into .venv

clean: ## remove the environment and what tools left behind; runs stay
	rm -rf $(ENVIRONMENT) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find distill_system tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "No Python from 3.11 to 3.13 with its venv module was found. Install one (on Debian" \
			"python3 and python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "making $(ENVIRONMENT) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(ENVIRONMENT)

# On plain PyPI torch is the CUDA build, which vLLM's CPU build does not fit. Where pip knows a
# source of PyTorch's CPU builds it takes that; otherwise uv, which knows PyTorch's own.
# torchvision, torchaudio and torchcodec stay out: they have no builds that match, and
# transformers and vLLM fail when they import another.
$(ENVIRONMENT)/.complete: pyproject.toml requirements/constraints.txt requirements/cpu-wheels.txt $(BIN)/python
	@echo "installing torch $(TORCH), CPU build"
	@$(PIP) install $(CONSTRAINED) "torch==$(TORCH)+cpu" 2>/dev/null || { \
		echo "pip has no source of it; asking uv"; \
		$(PIP) install $(CONSTRAINED) uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu \
			$(CONSTRAINED) "torch==$(TORCH)"; }
	@echo "installing the rest of the environment (2 GB; some minutes)"
	@$(PIP) install $(CONSTRAINED) -e ".[cpu,dev]"
	@$(PIP) install --no-deps --require-hashes -r requirements/cpu-wheels.txt
	@touch $@
