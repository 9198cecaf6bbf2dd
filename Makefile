# Each target does its own set-up. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
export PYTHONUNBUFFERED := 1

# A torch >= 2.9 that $(PYTHON) already has is used as it is, with what stands beside it; otherwise .venv gets the pins
# of requirements-dev.txt.
FIND_TORCH := from importlib.metadata import version as v; print(tuple(map(int, v("torch").split(".")[:2])) >= (2, 9))
ifeq ($(shell $(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null),True)
PY := $(PYTHON)
STATE := build/make
READY := $(STATE)/.ready
else
PY := .venv/bin/python
STATE := .venv
READY := .venv/.ready
endif
PIP := $(PY) -m pip install -q --disable-pip-version-check
ATTNKIT := $(PY) -c 'from attnkit.cli import main; main()'

.PHONY: help demo test lint perf tune gpu-check receipt clean

help:
	@echo "make demo       generate text from the bundled checkpoint, then the roofline table of this machine"
	@echo "make test       lint, types, then every test that can run here"
	@echo "make perf       pytest perf/ --benchmark: every case, with peers that are installed"
	@echo "make tune       find this machine's best configs and keep them"
	@echo "make gpu-check  on a GPU machine: compute-sanitizer, the GPU tests and the perf suite, then the receipt"
	@echo "make receipt    does the committed receipt belong to this code?"

.venv/.ready: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements-dev.txt
	touch $@

build/make/.ready:
	mkdir -p $(@D)
	touch $@

CSRC := $(shell find csrc -type f)
BUILT := $(STATE)/.built
$(BUILT): $(READY) $(CSRC) setup.py pyproject.toml
	$(PIP) -e . --no-build-isolation --no-deps
	touch $@

demo: $(BUILT)
	$(ATTNKIT) demo

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# One OpenMP thread a worker: two workers with two threads each would wait for one another.
test: $(BUILT) lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal

perf: $(BUILT)
	$(PY) -m pytest perf/ --benchmark -q

tune: $(BUILT)
	$(ATTNKIT) tune

gpu-check: $(BUILT)
	$(PY) -m perf.receipt write

receipt:
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m perf.receipt check

clean:
	rm -rf .venv build attnkit/*.so attnkit/cubins *.egg-info
