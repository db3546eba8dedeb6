# `make demo` and `make test` are all a fresh machine needs: they install what they use into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
RELEASE := .venv-release
READY := $(VENV)/ready

# where .venv is activated, python3 would be the one that is about to be replaced
export PATH := $(subst $(CURDIR)/$(BIN):,,$(PATH))

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-all test-versions mutants lint schemas types format docs release-check \
    benchmark clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## train flows on handwritten digits, compare and draw them (4 minutes)
	$(BIN)/python examples/digits.py --out runs/digits

test: $(READY) ## run the tests with branch coverage, one process for each core (4 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov --numprocesses auto

test-long: $(READY) ## run the examples and benchmarks, small, and see what they write (4 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --numprocesses auto || \
	    OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --last-failed # trainings by the clock: once more, alone

test-all: $(READY) ## all of these, with every combination of potential, activation, solver and sensitivity
	OMP_NUM_THREADS=1 ALL_CASES=1 $(BIN)/python -m pytest -m "long or not long" --numprocesses auto

test-versions: $(READY) $(OLDEST)/ready ## run the tests with the oldest and the newest dependencies
	$(OLDEST)/bin/python -c $(VERSIONS)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto
	$(BIN)/python -c $(VERSIONS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

mutants: $(READY) ## break the equations of motion line by line and see the tests notice (hours)
	rm -rf mutants
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 1
	$(BIN)/mutmut results

lint: $(READY) ## check style and dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry nflows_mongeampere
	$(MAKE) --no-print-directory schemas CHECK=$(BIN)/check-jsonschema

CHECK := check-jsonschema
schemas: ## check workflows, issue forms and CITATION.cff against their schemas
	$(CHECK) --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(CHECK) --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(CHECK) --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(CHECK) --builtin-schema vendor.citation-file-format CITATION.cff

types: $(READY) ## check types
	$(BIN)/mypy

format: $(READY) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## run the notebooks, build the documentation into runs/site, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

release-check: $(READY) ## build sdist and wheel, see what they hold, run the README on the wheel alone
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -m long integration_tests/package_test.py
	@echo "Installing the wheel into $(RELEASE): about 3 minutes and 5 GB."
	$(PYTHON) -m venv --clear --without-pip $(RELEASE)
	$(PYTHON) -m pip --python $(RELEASE)/bin/python install dist/*.whl
	OMP_NUM_THREADS=1 $(RELEASE)/bin/python -I integration_tests/readme_alone.py

benchmark: $(READY) ## measure speed and memory on an idle machine (6 to 15 minutes)
	$(BIN)/python examples/benchmarks/speed.py --out runs/benchmarks

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) $(OLDEST) $(RELEASE) mutants .coverage runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Written last, so that an interrupted installation is taken up again. Its Python is asked where the
# package was installed from, so that an environment that was moved or whose Python has gone is made
# anew; the targets that need none do not ask.
HERE := import json, pathlib; from importlib.metadata import distribution; \
    origin = json.loads(distribution("nflows-mongeampere").read_text("direct_url.json"))["url"]; \
    print(origin == pathlib.Path.cwd().as_uri())
ifneq ($(filter-out help clean,$(or $(MAKECMDGOALS),help)),)
ifneq ($(shell $(BIN)/python -I -c '$(HERE)' 2>/dev/null),True)
$(shell rm -f $(READY))
endif
endif

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python >= 3.10 is needed; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV): about 3 minutes and 6 GB, once."
	$(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --editable ".[examples,test,lint,docs]"
	@touch $@

VERSIONS := "from importlib.metadata import version; \
    print(*(f'{p} {version(p)}' for p in 'torch nflows normflows torchdyn numpy'.split()), sep=', ')"

$(OLDEST)/ready: pyproject.toml requirements/oldest.txt
	@echo "Installing into $(OLDEST): about 3 minutes and 6 GB, once."
	$(PYTHON) -m venv --clear --without-pip $(OLDEST)
	$(PYTHON) -m pip --python $(OLDEST)/bin/python install \
	    --constraint requirements/oldest.txt --editable ".[examples,test]"
	@touch $@
