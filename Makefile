# make demo    set everything up, train source-only and UDA, print the result
# make test    set everything up, run the tests (make test-all: slow ones too)
#              on all cores, at most 4; ARGS='-n 0 -k golden': in one process
# make test-stock  the same with stock mmsegmentation 1.2.2, in .venv-stock
#              (STOCK=/path/to/env: in that environment)
# make lint    ruff and mypy
# make clean   remove what the others left (also .venv)
#
# The active virtual or conda environment is used; without one, .venv is made.
# PYTHON=/path/to/python3.12 chooses what .venv is made with.

ifneq ($(VIRTUAL_ENV),)
ENV := $(VIRTUAL_ENV)
else ifneq ($(filter-out base,$(CONDA_DEFAULT_ENV)),)
ENV := $(CONDA_PREFIX)
else
ENV := .venv
endif
PY := "$(ENV)/bin/python"
PYTEST := -m pytest -n logical --maxprocesses 4 --dist worksteal
INSTALL := PYTHONNOUSERSITE=1 $(PY) requirements/install.py

# A clone runs its own code, whatever else is installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test test-all test-stock lint env clean

demo: env
	@$(PY) tools/demo.py

test: env
	@OMP_NUM_THREADS=1 $(PY) $(PYTEST) $(ARGS)

test-all: env
	@OMP_NUM_THREADS=1 $(PY) $(PYTEST) -m "" $(ARGS)

STOCK ?= .venv-stock
test-stock:
	@sh requirements/make_venv.sh "$(STOCK)" "$(PYTHON)"
	@PYTHONNOUSERSITE=1 "$(STOCK)/bin/python" requirements/install.py stock
	@OMP_NUM_THREADS=1 "$(STOCK)/bin/python" $(PYTEST) $(ARGS)

lint: env
	@$(INSTALL) lint
	$(PY) -m ruff check .
	$(PY) -m mypy

env:
	@if [ "$(ENV)" = .venv ]; then \
	    sh requirements/make_venv.sh .venv "$(PYTHON)"; fi
	@$(INSTALL)

clean:
	rm -rf .venv .venv-stock build dist *.egg-info .pytest_cache .mypy_cache \
	    .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
