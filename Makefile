# Two commands for a newcomer: `make demo` and `make test`. Both create .venv on first use; the demo installs less.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# number of test files that run in parallel: one more than two cores, because many of them wait for processes
JOBS ?= 3
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-unit test-all lint format docs lock clean

# The base installation, without Ray, DeepSpeed, S3 and test tools.
$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e .
	touch $@

# All extras. The demo then needs no further installation.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[all,test]'
	touch $(DEMO_READY) $@

demo: $(DEMO_READY)
	$(BIN)/udddm train --config digits --store zarr --run-dir runs/demo

# The default tests, integration and unit: in this order, so that no long file is left for the end.
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

# The tests of one module at a time: about a minute.
test-unit: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" tests/unit

# With the tests that are marked slow.
test-all: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, for reading from disk or from any server: build/site/index.html. Warnings are errors.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file docs/site/mkdocs.yml

# Rewrite constraints.txt with the newest versions that pyproject.toml allows. Run the tests before you commit it.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(PIP_INSTALL) '.[all,test]'
	grep '^#' constraints.txt > build/constraints.txt
	build/lock/bin/python -m pip freeze --exclude udddm | sed 's/+.*//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) runs build *.egg-info
