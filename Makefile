SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
LOG := $(VENV)/install.log

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test lint docs bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY)  ## install everything into .venv (PYTHON=python3.12 for another interpreter)

quickstart: $(READY)  ## train the miniature model on this machine (ARGS="train.num_batches=20" to override)
	@$(BIN)/stepgrpo train configs/quickstart.yaml $(ARGS)

test: $(READY)  ## the whole test suite, two files at a time (ARGS="-k steps" to choose, ARGS="-n 0" one at a time)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(READY)  ## ruff, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(READY)  ## regenerate the reference pages in docs/
	@$(BIN)/python docs/make_reference.py

BENCHES = rollouts weights learner loop monitoring checkpoint simulate
bench: $(READY)  ## the measurements of bench/, one after the other, about an hour (BENCHES="rollouts loop" for some); TRL_PYTHON: a Python with TRL
	@for name in $(BENCHES); do echo "== bench/$$name.py"; start=$$(date +%s); $(BIN)/python bench/$$name.py || exit 1; \
	  echo "== bench/$$name.py: $$(( $$(date +%s) - start )) s"; done

clean:  ## remove .venv and caches; runs/ stays
	@rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# While an installation is under way $(VENV) holds `.installing`; one that was cut short still has it and is begun afresh.
# torchvision, torchaudio and torchcodec come along with vLLM, but their builds are for CUDA and break
# `import transformers`; text models need none of them.
$(READY): pyproject.toml constraints/cpu.txt
	@[ "$$(uname -sm)" = "Linux x86_64" ] || \
	  { echo "got $$(uname -sm), but the CPU build of vLLM needs Linux x86_64: use such a machine or a container"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || \
	  { echo "PYTHON=$(PYTHON): got $$($(PYTHON) --version 2>&1 | head -1), needs Python 3.11 to 3.14;" \
	         "try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@[ ! -e $(VENV)/.installing ] || rm -rf $(VENV)
	@echo "[1/3] $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@touch $(VENV)/.installing
	@echo "[2/3] installing about 4 GB of packages, some minutes (follow with: tail -f $(LOG))"
	@install() { $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints/cpu.txt \
	      -e '.[cpu,dev]' 'torch==2.13.0+cpu' "$$@" >> $(LOG) 2>&1; }; \
	  install || install --extra-index-url https://download.pytorch.org/whl/cpu || \
	  { tail -n 20 $(LOG); echo "installation failed, see above: check the network (or pip's index settings) and the" \
	         "disk, then run make again; it begins afresh"; exit 1; }
	@echo "[3/3] removing the CUDA builds of torchvision, torchaudio, torchcodec"
	@$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null
	@mv $(VENV)/.installing $(READY) && touch $(READY)
