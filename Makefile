# Needs Python 3.11 or newer and make. Everything is installed into .venv/, nothing outside this folder.
#   make test ARGS="-k resume"      passes arguments on
#   make test PYTHON=python3.12     chooses the Python that .venv is made from

PYTHON ?= python3
ARGS ?=
FAULTS_SEED := $(or $(FAULTS_SEED),$(shell date +%s))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# All modules except private ones ("_" at the beginning), the command line, and 1.7's import paths, which only re-export.
DOCUMENTED = torch_frame $(shell cd src && find torch_frame -name '*.py' ! -path '*/_*' ! -path 'torch_frame/cli/*' \
	! -path 'torch_frame/utils/*' ! -path 'torch_frame/datasets/*' ! -path torch_frame/lr_scheduler.py \
	! -path torch_frame/hooks/hookbase.py ! -path 'torch_frame/hooks/*_hook.py' \
	! -path 'torch_frame/vision/tools/*' ! -path 'torch_frame/vision/augmentations/*' \
	| sed 's/\.py$$//; y|/|.|' | LC_ALL=C sort)
BENCHMARKS := $(sort $(filter-out benchmarks/_% benchmarks/gpu.py,$(wildcard benchmarks/*.py)))

PEERS := .venv-peers
TRACKERS := .venv-trackers
RECIPES := .venv-recipes
PAGES := .venv-pages

# A machine with a GPU has a Python with a CUDA build of torch already, as a rule: one that is named is used as it is.
GPU_PYTHON := $(if $(filter file undefined,$(origin PYTHON)),$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)),$(PYTHON))

# By environment, so that the isolated build of this package is pinned too: up to pip 25.2 builds read PIP_CONSTRAINT,
# later ones PIP_BUILD_CONSTRAINT. The paths are relative because pip splits these values at spaces.
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(BIN)/python -m pip install

.PHONY: help demo test test-ranks test-trackers faults lint format bench bench-peers gpu docs recipes notebook pictures clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile

demo: $(STAMP) ## train a small model on the CPU
	$(BIN)/torch-frame demo $(ARGS)

test: $(STAMP) ## run the tests and doctests in two processes (the slow ones: make test ARGS="-m slow"; in one: ARGS="-n 0")
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: $(STAMP) ## kill, signal and damage runs at 200 random places and more (again: make faults FAULTS_SEED=seed)
	@echo "FAULTS_SEED=$(FAULTS_SEED)"
	FAULTS_SEED=$(FAULTS_SEED) $(BIN)/python -m pytest tests/faults -m "slow or not slow" $(ARGS)

test-ranks: $(STAMP) ## run all tests of several processes, the slow ones too (about 6 minutes)
	$(BIN)/python -m pytest tests/distributed tests/run/test_meetings.py tests/faults/test_ranks.py tests/examples/test_several.py -m "slow or not slow" $(ARGS)

test-trackers: $(TRACKERS)/.installed ## test the writers against wandb, trackio, SwanLab and MLflow, offline (.venv-trackers)
	$(TRACKERS)/bin/python -m pytest tests/tracking/test_experiments.py tests/tracking/test_consoles.py $(ARGS)

lint: $(STAMP) ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP) ## sort imports, fix what can be fixed, format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP) ## run every script in benchmarks/
	@test -n "$(BENCHMARKS)" || { echo "There is no script in benchmarks/ to run." >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

bench-peers: $(PEERS)/.installed ## time an epoch beside Ignite, in an environment of its own (.venv-peers)
	$(PEERS)/bin/python benchmarks/epoch.py $(ARGS)

gpu: ## run all that needs a GPU, four minutes at most, with .venv or the Python named: make gpu PYTHON=python3
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

docs: $(STAMP) ## write the API pages to site/
	rm -rf site
	$(BIN)/python -m pdoc --docformat google --output-directory site $(DOCUMENTED)

recipes: $(RECIPES)/.installed ## run the snippets of docs/recipes.md, in an environment of its own (one: make recipes ARGS=peft)
	$(RECIPES)/bin/python docs/run_recipes.py $(ARGS)

notebook: $(PAGES)/.installed ## run a training in a real notebook, and check how much its page shows (.venv-pages)
	$(PAGES)/bin/python docs/images/page.py site/notebook.html

pictures: $(PAGES)/.installed ## draw the terminal's pictures of README anew (.venv-pages)
	$(PAGES)/bin/python docs/images/screens.py docs/images

clean: ## remove caches and build outputs (not .venv, and no run's work_dir)
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find benchmarks src tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is written last. No stamp means that there was no install or that one was cut off: .venv is then made anew.
# An outdated stamp means that the pins changed: the packages are brought up to date in place.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) -c 'import platform; print("Python", platform.python_version())' 2>/dev/null || true); \
		echo "torch-frame needs Python 3.11 or newer; '$(PYTHON)' is $${found:-no Python that runs here}." \
			"Name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -f $(STAMP) && $(BIN)/python -c '' || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(STAMP)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(STAMP)

# torch first, and under the constraints: a peer would otherwise bring another build of it.
$(PEERS)/.installed: benchmarks/requirements-peers.txt constraints.txt
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)
	PIP_CONSTRAINT=constraints.txt $(PEERS)/bin/python -m pip install torch
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(PEERS)/bin/python -m pip install -e '.[tensorboard]' \
		-r benchmarks/requirements-peers.txt
	@touch $@

# torch first, and held at its version: none of the trackers may bring another build of it. The rest is not pinned, so that the
# writers are tested against what people install today.
$(TRACKERS)/.installed: tests/requirements-trackers.txt constraints.txt
	rm -rf $(TRACKERS)
	$(PYTHON) -m venv $(TRACKERS)
	PIP_CONSTRAINT=constraints.txt $(TRACKERS)/bin/python -m pip install torch
	$(TRACKERS)/bin/python -m pip freeze | grep '^torch=' > $(TRACKERS)/torch.txt
	PIP_CONSTRAINT=$(TRACKERS)/torch.txt $(TRACKERS)/bin/python -m pip install -e '.[tensorboard]' -r tests/requirements-trackers.txt
	@touch $@

# Likewise: transformers and peft would bring a CUDA build of torch where there is none yet.
$(RECIPES)/.installed: docs/requirements-recipes.txt constraints.txt
	rm -rf $(RECIPES)
	$(PYTHON) -m venv $(RECIPES)
	PIP_CONSTRAINT=constraints.txt $(RECIPES)/bin/python -m pip install torch
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(RECIPES)/bin/python -m pip install -e '.[tensorboard]' \
		-r docs/requirements-recipes.txt
	@touch $@

$(PAGES)/.installed: docs/images/requirements.txt pyproject.toml constraints.txt
	rm -rf $(PAGES)
	$(PYTHON) -m venv $(PAGES)
	PIP_CONSTRAINT=constraints.txt $(PAGES)/bin/python -m pip install torch
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(PAGES)/bin/python -m pip install -e '.[demo]' \
		-r docs/images/requirements.txt
	@touch $@
