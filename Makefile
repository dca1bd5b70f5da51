# `make help` lists the targets. Each sets up what it needs; only Python 3.10 or newer and make must be there.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-report
NANO_OUT ?= runs/nano
ADDS ?= 1000000
BASE ?= HEAD
# Processes for the tests; those of one file stay together, since they share what its fixtures made.
JOBS ?= auto
PARALLEL := -n $(JOBS) --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPED := build/typed

.DEFAULT_GOAL := help
.PHONY: help venv test lint slow perf-check soak demo nano wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with the pinned packages; does nothing when it is up to date

# Runs again only when the requirements change. An environment without a working pip is rebuilt.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(v < (3, 10) and "error: $(PYTHON) is Python %d.%d, TeTRA needs 3.10 or newer; name one, for example: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" % v[:2])'
	@if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
	    echo "== creating $(VENV) with $$($(PYTHON) --version)"; \
	    $(PYTHON) -m venv --clear $(VENV) || { \
	        echo "error: $(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@echo "== installing the pinned packages into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "== $(VENV) is ready"

test: lint  ## lint, type-check and run all quick tests (JOBS=n processes)
	@echo "== tests"
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# mypy does not follow the mapping of an editable install, so it gets the packages laid out as a wheel has them.
lint: venv  ## style (ruff) and types (mypy)
	@echo "== style"
	@$(BIN)/ruff check .
	@echo "== types"
	@rm -rf $(TYPED) && mkdir -p $(TYPED) && cp -Rp tetra $(TYPED)/
	@cp -Rp kernels autotune profiling $(TYPED)/tetra/
	@cd $(TYPED) && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache -p tetra

slow: venv  ## run the tests that take long
	@$(BIN)/python -m pytest $(PARALLEL) -m slow

perf-check: venv  ## what this tree does to the compiled kernels, compared with the commit BASE; needs no GPU
	@$(BIN)/tetra kernels check --base $(BASE)

soak: venv  ## a million adds to a place map, with kills at random moments (ADDS=n)
	@$(BIN)/python tests/soak.py --adds $(ADDS)

demo: venv  ## train, pack, localise and write a report with pictures to demo-report/
	@echo "== demo, under 6 minutes on two cores"
	@$(BIN)/tetra demo --out $(OUT)

nano: venv  ## retrain the model that ships inside the package, into runs/nano/
	@echo "== training nano; an interrupted run goes on where it stopped"
	@$(BIN)/tetra train run nano --out $(NANO_OUT) --resume

wheel: venv  ## build the wheel into dist/
	@rm -rf build/lib build/bdist.*  # or files that were deleted since would be in it
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

clean:  ## remove builds and caches; keeps .venv, reports and runs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find tetra kernels autotune profiling tests -name __pycache__ -type d -prune -exec rm -rf {} +
