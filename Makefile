# Two commands matter: `make demo` and `make test`. Both install what they need first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Where the fault tests write what became of each fault, and from where their table is made.
FAULT_REPORT ?= $(CURDIR)/.faults.jsonl
# Tests at a time: many wait for processes that they start. Those of one file stay together, because they share what is
# slow to make.
WORKERS ?= 3

RUNS ?= outputs

.PHONY: install demo dashboard test test-extras test-faults lint format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Llamita needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	PYTHONWARNINGS=ignore DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[align,eval,watch,dev]"
	touch $@

demo: install
	$(BIN)/python recipes/pipeline.py pipeline=demo

# All runs below RUNS in the browser of this machine, live: make dashboard RUNS=/scratch/me [PORT=7861]
dashboard: install
	$(BIN)/python recipes/dashboard.py runs="$(RUNS)" $(if $(PORT),port=$(PORT))

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" --numprocesses $(WORKERS) --dist loadfile

# Kills, full disks, damage, power cuts; prints a table. ONLY=long adds to the report what make test has left out.
test-faults: install
	$(if $(ONLY),,rm -f $(FAULT_REPORT))
	FAULT_REPORT=$(FAULT_REPORT) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults $(if $(ONLY),-m $(ONLY))
	$(BIN)/python tests/faults/processes/table.py $(FAULT_REPORT)

# What needs packages of a gigabyte: Triton's interpreter, and bitsandbytes. On a machine with a GPU: pytest -m gpu.
test-extras: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[kernels,quantised]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distill/test_kernels.py tests/distill/test_quantised.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache
