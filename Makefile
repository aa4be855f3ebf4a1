# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv on first use, the demo with less in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# test files run at a time
JOBS ?= 2
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-unit test-all lint format lock clean

# The base installation: no Ray, DeepSpeed, S3 or test tools.
$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e .
	touch $@

# Everything. It also serves the demo, which then has nothing left to install.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[all,test]'
	touch $(DEMO_READY) $@

demo: $(DEMO_READY)
	$(BIN)/udddm-train --config configs/digits.yaml --store zarr --run-dir runs/demo
	@echo "one network evaluation a picture: runs/demo/samples.png"

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-unit: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" tests/unit

test-all: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# constraints.txt anew, from the newest versions that pyproject.toml allows. Test before you commit it.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(PIP_INSTALL) '.[all,test]'
	grep '^#' constraints.txt > build/constraints.txt
	build/lock/bin/python -m pip freeze --exclude udddm | sed 's/+.*//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) runs build *.egg-info
