# Every target does its own set-up in a local virtual environment; nothing outside this folder changes.
#
#   make test     set up, then run the tests
#   make test-integrations   the adapters to TRL, Liger and others, in an environment of its own
#   make demo     set up, then train a small model on a generated preference task
#   make reports DIR=folder   run a folder of repro scripts and tell how each ends
#   make bench    benchmark against pinned peers, in an environment of its own
#   make mutants  plant faults one at a time and see a test turn red (about an hour)
#   make sanitize the op tests on a build with address and undefined-behaviour sanitizers
#   make docs     build the site into build/site, strictly, in an environment of its own
#   make lint     ruff, mypy, clang-format, codespell
#   make wheel    build sdist and wheel into dist/
#   make clean    remove build products (distclean: the virtual environments too)
#
# Variables: PYTHON (3.11 or newer), VENV, JOBS (test processes), TORCH_SPEC, PYTEST_ARGS, MARKS
# (which tests: MARKS="not sanitize" runs those of more than 20 seconds too),
# BENCH_ARGS (for example "--quick" or "--device cuda", see python -m benchmarks --help),
# MUTANTS_ARGS (names of planted faults, --list).
# TORCH_SPEC is handed to pip as it stands. Where the default index serves the CUDA build and the
# CPU build is wanted:
#   make test TORCH_SPEC="torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
TORCH_SPEC ?= torch==2.13.0
VENV ?= .venv
BENCH_VENV ?= .venv-bench
INTEGRATIONS_VENV ?= .venv-integrations
DOCS_VENV ?= .venv-docs
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$(( n < 8 ? n : 8 )))
PYTEST_ARGS ?=
MARKS ?= not slow and not sanitize
BENCH_ARGS ?=
MUTANTS_ARGS ?=

PIP = $(1)/bin/python -m pip --disable-pip-version-check
INSTALL = $(call PIP,$(1)) install --quiet --no-compile
# A new TORCH_SPEC is a new stamp, so it is installed; a checksum keeps '=' and '/' out of the name.
TORCH_KEY := $(shell printf '%s' '$(TORCH_SPEC)' | cksum | cut -d' ' -f1)
NATIVE_SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup test test-integrations demo reports bench mutants docs sanitize lint lint-setup wheel clean distclean
help:
	@sed -n '3,/^#$$/s/^#   //p' Makefile

# ---- set-up: $(1)/.venv -> .torch-<key> -> .deps-<key> and .prefkern side by side --------------------
# The native part needs torch and four build tools, so it compiles while pip fetches the rest. pip compiles
# no bytecode: Python does that for what is imported, a fraction of what is installed.
define environment
$(1)/.venv:
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11 or newer, or pass PYTHON=/path/to/python3.11." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is older; pass PYTHON=/path/to/python3.11." >&2; exit 1; }
	"$(PYTHON)" -m venv $(1)
	@touch $$@

$(1)/.torch-$(TORCH_KEY): $(1)/.venv
	rm -f $(1)/.torch-* $(1)/.deps-*
	$(call INSTALL,$(1)) -c $(2) setuptools wheel pybind11 ninja $(TORCH_SPEC)
	@touch $$@

$(1)/.deps-$(TORCH_KEY): $(1)/.torch-$(TORCH_KEY) $(2)
	$(call INSTALL,$(1)) -r $(2)
	@touch $$@

$(1)/.prefkern: $(1)/.torch-$(TORCH_KEY) $(NATIVE_SOURCES)
	$(call INSTALL,$(1)) --no-build-isolation --no-deps --editable .
	@touch $$@
endef
$(eval $(call environment,$(VENV),requirements/test.txt))
$(eval $(call environment,$(BENCH_VENV),requirements/bench.txt))
$(eval $(call environment,$(INTEGRATIONS_VENV),requirements/integrations.txt))

ready = $(1)/.deps-$(TORCH_KEY) $(1)/.prefkern
timed = @start=$$(date +%s); \
	$(MAKE) --no-print-directory -q $(ready) 2>/dev/null || $(MAKE) --no-print-directory -j2 $(ready); \
	echo "set-up took $$(( $$(date +%s) - start )) s (environment: $(1))"

setup:
	$(call timed,$(VENV))

# ---- what people run ----------------------------------------------------------------------------
# One OpenMP thread per test process: the processes already fill the cores. Tests of threading set
# their own count. A file stays in one process, so that its fixtures (wheel builds) run once.
test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "$(MARKS)" $(PYTEST_ARGS)

# The adapters need no GPU code; PREFKERN_NO_CUDA keeps the build short.
test-integrations: export PREFKERN_NO_CUDA = 1
test-integrations:
	$(call timed,$(INTEGRATIONS_VENV))
	OMP_NUM_THREADS=1 $(INTEGRATIONS_VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "$(MARKS)" $(PYTEST_ARGS) tests/integrations

reports: setup
	@test -n "$(DIR)" || { echo "usage: make reports DIR=folder-of-scripts" >&2; exit 1; }
	$(VENV)/bin/python tests/reports.py "$(DIR)" --jobs $(JOBS)

demo: setup
	$(VENV)/bin/prefkern demo

bench:
	$(call timed,$(BENCH_VENV))
	$(BENCH_VENV)/bin/prefkern bench $(BENCH_ARGS)

mutants: setup
	$(VENV)/bin/python tests/planted_faults/mutants.py $(MUTANTS_ARGS)

sanitize: setup
	$(VENV)/bin/python -m pytest -m sanitize $(PYTEST_ARGS) tests/native

# The site is made from sources alone: neither torch nor prefkern is installed for it.
$(DOCS_VENV)/.deps: requirements/docs.txt
	"$(PYTHON)" -m venv $(DOCS_VENV)
	$(call PIP,$(DOCS_VENV)) install --quiet -r $<
	@touch $@

docs: $(DOCS_VENV)/.deps
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --clean

lint-setup: setup
	@$(call PIP,$(VENV)) install --quiet -r requirements/lint.txt

lint: lint-setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -type f ! -name '*.py')
	$(VENV)/bin/codespell

wheel: setup
	@$(call PIP,$(VENV)) install --quiet build==1.6.1
	$(VENV)/bin/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info prefkern/*.so prefkern/_build.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.prefkern $(BENCH_VENV)/.prefkern $(INTEGRATIONS_VENV)/.prefkern

distclean: clean
	rm -rf $(VENV) $(BENCH_VENV) $(INTEGRATIONS_VENV) $(DOCS_VENV)
