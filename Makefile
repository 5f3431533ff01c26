# Everything a newcomer needs: each target creates the environment in .venv first, and does so once. No system package is needed.
#
#   PYTHON          the interpreter to create .venv with, 3.11 or later; the system's where it will do, as distributions
#                   build theirs with all optimizations: the tests take 8 to 14 % less time than with pyenv's
#   TORCH           what pip shall install as torch instead of the CPU build it finds: a version, or the path or address of a wheel
#   DEVICE          cpu or cuda: what .venv is for; it remembers
#   PIP_INDEX_ARGS  options for every pip install, such as --index-url for a mirror
SYSTEM := /usr/bin/python3
PYTHON ?= $(shell $(SYSTEM) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(SYSTEM) || echo python3)
TORCH ?=
PIP_INDEX_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
DEVICE ?= $(or $(shell cat $(VENV)/.device 2>/dev/null),cpu)
STAMP := $(VENV)/.installed
SGLANG := .venv-sglang
NEXT := .venv-next
CODE := setup.py megatron_cord tests tools examples $(if $(wildcard benchmarks/*.py),benchmarks)
# Tests: so many processes, one more than the two cores as ranks often wait for each other; each takes whole files; the longest files come first (tests/conftest.py).
TEST_WORKERS ?= 3
IN_PARALLEL := --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
# Two cores often run two ranks: one thread a process, or they fight for them.
export OMP_NUM_THREADS ?= 1
# Ranks refuse to leave a machine's GPUs idle unless this says so: targets of an environment for the CPU mean the CPU.
ifeq ($(DEVICE),cpu)
quickstart speech test test-full test-next test-pretend test-te test-slurm coverage: export CUDA_VISIBLE_DEVICES :=
endif

.PHONY: setup setup-cuda dry-run-cuda lock sglang-env quickstart speech test test-full test-next test-pretend test-te test-sglang test-slurm test-browser test-gpu gpu-hour docs bench lint format typecheck coverage clean help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install everything into it; does nothing when that is done

$(STAMP): pyproject.toml requirements.lock tools/install.py tools/install_transformer_engine.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install.py --device '$(DEVICE)' --torch '$(TORCH)' --pip-args '$(PIP_INDEX_ARGS)'
	$(BIN)/python -m tools.install_transformer_engine --pip-args '$(PIP_INDEX_ARGS)'
	@echo $(DEVICE) > $(VENV)/.device
	@touch $@

# A stamp of an environment for the CPU must not hide that this one is missing.
setup-cuda: ## for NVIDIA GPUs: .venv with torch's CUDA build, transformer-engine and the tests, and .venv-sglang; needs the CUDA toolkit
	@test ! -e $(SGLANG) || test "$$(cat $(SGLANG)/.device 2>/dev/null)" = cuda || { echo 'error: $(SGLANG) was made for the CPU; remove it first: rm -r $(SGLANG)'; exit 2; }
	@test "$$(cat $(VENV)/.device 2>/dev/null)" = cuda || rm -f $(STAMP)
	$(MAKE) setup DEVICE=cuda
	$(MAKE) sglang-env SGLANG_DEVICE=cuda

dry-run-cuda: $(STAMP) ## whether pip finds versions for both CUDA environments; metadata only, nothing is installed
	$(BIN)/python -m tools.resolve

lock: ## write the exact versions of .venv to requirements.lock, which setup uses as constraints
	$(BIN)/python -m tools.lock

sglang-env: $(SGLANG)/.installed ## create .venv-sglang with the rollout server for this machine's CPU; SGLANG_DEVICE=cuda for its GPU

$(SGLANG)/.installed: pyproject.toml requirements.lock tools/install.py tools/install_sglang.py
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m tools.install_sglang --device '$(or $(SGLANG_DEVICE),cpu)' --torch '$(TORCH)' --pip-args '$(PIP_INDEX_ARGS)'
	@echo '$(or $(SGLANG_DEVICE),cpu)' > $(SGLANG)/.device
	@touch $@

test-sglang: $(STAMP) $(SGLANG)/.installed ## the tests that start the real server; minutes
	$(BIN)/python -m pytest tests/integration/sglang

quickstart: $(STAMP) ## train a small model on this machine until it answers spoken questions; ends with a report
	$(BIN)/python -m examples.quickstart.run

# WEIGHTS=packages, or LLM=DIR WHISPER=DIR and VOICE=FILE.onnx; RECIPE=NAME; ARGS: more arguments (examples/speech_smollm2/run.py).
speech: $(VENV)/.speech ## a speech LLM of a text LLM and a Whisper: WEIGHTS=packages, or LLM=DIR WHISPER=DIR; ends with a report
	$(BIN)/python -m examples.speech_smollm2.run $(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(LLM),--llm '$(LLM)') \
		$(if $(WHISPER),--whisper '$(WHISPER)') $(if $(VOICE),--voice '$(VOICE)') $(if $(RECIPE),--recipe '$(RECIPE)') \
		--pip-args='$(PIP_INDEX_ARGS)' $(ARGS)

$(VENV)/.speech: $(STAMP)
	@echo 'installing the extra piper …'
	$(BIN)/python -m pip install $(PIP_INDEX_ARGS) -qq --disable-pip-version-check -c requirements.lock -e '.[piper]'
	@touch $@

test: lint typecheck ## lint, types and the tests that take minutes
	$(BIN)/python -m pytest $(IN_PARALLEL) -m 'not slow and not slurm'

test-full: lint typecheck ## all tests, slow ones included, but those of test-slurm
	$(BIN)/python -m pytest $(IN_PARALLEL) -m 'not slurm'

test-next: $(NEXT)/.installed ## the tests of everything that Megatron-Core computes, with 0.19.2 in the place of 0.16.1; Python 3.12 has 0.19.2 anyway
	$(NEXT)/bin/python -c 'from importlib.metadata import version as v; print("Megatron-Core", v("megatron-core")); assert v("megatron-core") == "0.19.2"'
	$(NEXT)/bin/python -m pytest $(IN_PARALLEL) -m 'not slow and not slurm' tests/model tests/parallel tests/convert tests/trainer tests/verify/test_layout.py

test-pretend: $(STAMP) $(NEXT)/.installed ## runs on pretended GPUs, by the rules of CUDA and NCCL: all layouts and options, with Megatron-Core of .venv and 0.19.2
	$(BIN)/python -m pytest $(IN_PARALLEL) tests/pretend_gpu
	$(NEXT)/bin/python -m pytest $(IN_PARALLEL) tests/pretend_gpu

# All of .venv behind one package of its own. Megatron-Core 0.19.2 asks for Python 3.12 in its metadata; what is used here runs on 3.11.
$(NEXT)/.installed: $(STAMP)
	$(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install $(PIP_INDEX_ARGS) --quiet --no-deps --ignore-requires-python megatron-core==0.19.2
	$(NEXT)/bin/python tools/borrow_packages.py $(BIN)/python
	$(NEXT)/bin/python -m tools.install_transformer_engine --pip-args '$(PIP_INDEX_ARGS)'
	@touch $@

test-te: $(STAMP) $(NEXT)/.installed ## transformer-engine's own Python code under the model, slow cases too: 2.11 with Megatron-Core 0.16, 2.20 with 0.19
	$(BIN)/python -m pytest -rs tests/transformer_engine
	$(NEXT)/bin/python -m pytest -rs tests/transformer_engine

test-slurm: $(STAMP) $(SGLANG)/.installed ## as root: the batch script on a real SLURM of two virtual nodes (installed by apt if it is missing), torchrun over two networks
	$(BIN)/python -m pytest -m slurm tests/integration/slurm

test-browser: $(STAMP) ## the report and the live page in Chromium, which Debian's package brings if it is missing (as root); make test skips these without one
	@command -v chromium chromium-browser google-chrome >/dev/null || apt-get install -y --no-install-recommends chromium
	$(BIN)/python -m pytest -rs tests/integration/browser

test-gpu: $(STAMP) ## the tests that need a CUDA device; without one each is skipped with that reason
	$(BIN)/python -m pytest -rs -m gpu tests/integration/gpu

gpu-hour: $(STAMP) ## what only a GPU can tell, part by part in ten minutes; writes benchmarks/results/gpu-hour/
	PYTHON=$(BIN)/python benchmarks/gpu_hour.sh

docs: $(STAMP) ## the documentation as a site in site/, any broken link or page being an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP) ## measure the loss against baselines; some minutes, writes benchmarks/results/ and docs/images/loss.svg
	$(BIN)/python -m benchmarks.loss all

lint: $(STAMP) ## rules and formatting
	$(BIN)/shellcheck .ci/run benchmarks/*.sh examples/*.sh examples/*/*.sh examples/*/*.sbatch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP) ## static types
	$(BIN)/mypy --num-workers $(TEST_WORKERS) $(CODE)

coverage: $(STAMP) ## the tests of `make test` once more, with the lines they run; slower, writes htmlcov/
	$(BIN)/python -m pytest -m 'not slow and not slurm' --cov --cov-report=term --cov-report=html

clean: ## remove the environment and the caches, not runs/
	rm -rf $(VENV) $(SGLANG) $(NEXT) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov *.egg-info build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
