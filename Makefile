PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A machine without an NVIDIA driver gets this one version, which may be a CPU build where your package index has
# one (set TORCH to a wheel of your choice otherwise); a machine with a GPU gets the newest build.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11,torch==2.13.0)

.PHONY: demo test lint regression clean

demo: $(VENV)/ready  ## full attention, ShadowKV and Quest on a real model, in minutes on a CPU
	$(BIN)/skv pull smollm2-135m essays
	$(BIN)/skv eval niah --model smollm2-135m -m full -m shadowkv:rank=64,budget=256 -m quest:budget=256 \
		--lengths 1k,2k,4k --depths 5 --out results/demo

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict shadowkv evals cli

regression: $(VENV)/ready  ## answers of a real model against results/baselines/, in minutes on a CPU
	VENV=$(VENV) .ci/regression

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache results/demo results/regression

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
