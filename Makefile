# `make demo` and `make test` set everything up themselves; they need Python 3.11 or newer, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# DVC's stages call `unsink`; nothing outside the environment may stand in for it
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
unexport PYTHONPATH

.PHONY: setup demo test seeds bench docs check format clean

setup: $(READY)  ## the environment alone; the others do it as well

demo: $(READY)  ## the whole pipeline on the embedded model, then the result table and a page with all of it
	$(BIN)/dvc repro
	@echo
	@$(BIN)/unsink show
	@echo
	@echo "all of it on one page, offline: open report/index.html"

test: $(READY)  ## the whole test suite, on all cores
	$(BIN)/pytest -n auto --dist worksteal

seeds: $(READY)  ## the same pipeline with seeds 0, 1 and 2, and the table docs/results/seeds.md; more than two hours on two cores
	python docs/results/seeds.py 0 1 2

bench: $(READY)  ## speed and memory against a plain implementation, and how they grow: docs/results/performance.md; some two hours
	python benchmarks/performance.py --growth

docs: $(READY)  ## the reference pages and the picture of the README, from the code
	python docs/reference/generate.py
	python docs/picture.py

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## everything that was made here; the model stays in the user's cache
	rm -rf data/fetched adapters checkpoints splits probes predictions metrics settings report dvc_plots .dvc/cache .dvc/tmp
	rm -rf ablations stress audits mitigations jobs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@git rev-parse --git-dir >/dev/null 2>&1 || $(BIN)/dvc config --local core.no_scm true  # unpacked from an archive
	@touch $@
