PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
LOCKED := $(PIP) --require-hashes --no-deps
# Not in requirements.lock, because its builds differ by machine: a package index may have one for CPUs. Any other
# requirement or wheel will do, with the Triton and CUDA packages that it asks for.
LOCKED_TORCH := torch==2.13.0
TORCH ?= $(LOCKED_TORCH)

# The ends of what pyproject.toml allows, and the tests that notice when transformers changes.
TRANSFORMERS_oldest := transformers==5.2.0
TRANSFORMERS_newest := transformers>=5.2,<6
TRANSFORMERS_TESTS := $(wildcard $(patsubst %,tests/test_%.py,calibration duo engine exports families gate_training geometries \
	graphs infinigen joining loading methods minference real_model refusals rope self_check streamed turns))

.PHONY: demo test gpu docs test-newest test-oldest lint lock regression clean

demo: $(VENV)/ready  ## full attention, ShadowKV and Quest on a real model, in minutes on a CPU
	$(BIN)/skv pull smollm2-135m essays
	$(BIN)/skv eval niah --model smollm2-135m -m full -m shadowkv:rank=64,budget=256 -m quest:budget=256 \
		--lengths 1k,2k,4k --depths 5 --out results/demo

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto

# Fetches nothing: it takes the environment if it was made, else the Python with torch that a rented machine brings.
gpu:  ## all that a rented GPU is to be asked, in stages that go on where they were; GPU="--only probe,tests", say
	$(if $(wildcard $(VENV)/ready),$(BIN)/python,$(PYTHON)) -m cli bench gpu-day $(GPU)

test-newest test-oldest: test-%:  ## tests that touch transformers, with the newest and the oldest that is supported
	$(MAKE) VENV=.venv-$* .venv-$*/ready
	.venv-$*/bin/python -m pip install --quiet --upgrade "$(TRANSFORMERS_$*)"
	.venv-$*/bin/skv pull smollm2-135m
	.venv-$*/bin/python -m pip list | grep -E "^(torch|transformers|tokenizers|huggingface_hub) "
	HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest -n auto $(TRANSFORMERS_TESTS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict shadowkv evals cli

regression: $(VENV)/ready  ## answers of a real model against results/baselines/, in minutes on a CPU
	VENV=$(VENV) .ci/regression

docs: $(VENV)/ready  ## tables in README.md and docs/ anew, from results/baselines/ and from what commands print
	$(BIN)/python docs/make_docs.py

lock:  ## adjusts the locks to pyproject.toml; with UPGRADE=1, to the newest versions that it allows
	PYTHON="$(PYTHON)" TORCH="$(LOCKED_TORCH)" UPGRADE="$(UPGRADE)" .ci/lock

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .pytest_cache .mypy_cache .ruff_cache results/demo results/regression

# setuptools first, since what has no wheel is built with what is installed: pip would fetch the newest. pip cannot ask
# for one package of a file with hashes, so it is given that package's lines.
$(VENV)/ready: pyproject.toml requirements.lock requirements-cuda.lock
	$(PYTHON) -m venv $(VENV)
	sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock | $(LOCKED) --requirement /dev/stdin
	$(LOCKED) --no-build-isolation --requirement requirements.lock
	$(PIP) $(if $(filter $(LOCKED_TORCH),$(TORCH)),--constraint requirements-cuda.lock) "$(TORCH)"
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@
