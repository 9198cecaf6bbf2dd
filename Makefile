# Each target does its own set-up. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PYTHONUNBUFFERED := 1

.PHONY: help demo test lint perf tune gpu-check receipt report clean

help:
	@echo "make demo       generate text from the bundled checkpoint, then the roofline table of this machine"
	@echo "make test       lint, types, then every test that can run here"
	@echo "make perf       pytest perf/ --benchmark: every case, with peers that are installed"
	@echo "make tune       find this machine's best configs and keep them"
	@echo "make gpu-check  on a GPU machine: the GPU tests and the perf suite, then the receipt"
	@echo "make receipt    does the committed receipt belong to this code?"

$(READY): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $(READY)

CSRC := $(shell find csrc -type f)
BUILT := $(VENV)/.built
$(BUILT): $(READY) $(CSRC) setup.py pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e . --no-build-isolation --no-deps
	touch $(BUILT)

demo: $(BUILT)
	$(BIN)/attnkit demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(BUILT) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

perf: $(BUILT)
	$(BIN)/python -m pytest perf/ --benchmark -q

tune: $(BUILT)
	$(BIN)/attnkit tune

# On the GPU machine the interpreter that has torch is used as it is: PYTHON=python3 make gpu-check
gpu-check:
	$(PYTHON) -m perf.receipt write

receipt:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m perf.receipt check

clean:
	rm -rf $(VENV) build attnkit/*.so attnkit/cubins *.egg-info
