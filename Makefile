# Two commands do everything: `make quickstart` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Passed on to tools/quickstart.py: --short for a two-minute form.
FLAGS ?=
# One more than cores, since tests of jobs mostly wait.
WORKERS ?= $(shell n=$$(($$(nproc) + 1)); echo $$((n < 4 ? n : 4)))
PARALLEL := -n $(WORKERS) --dist loadgroup
PYTEST_FLAGS ?= -m 'not extended' $(PARALLEL)

.PHONY: install quickstart test test-extended coverage lint clean

quickstart: install ## train a small text-to-image DiT on shipped pairs, sample it, draw the results
	$(BIN)/python tools/quickstart.py $(FLAGS)

test: install ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_FLAGS)

test-extended: install ## run the layouts and sizes that `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/pytest -m extended $(PARALLEL)

coverage: install ## run the tests, twice as slowly, and count the lines that they reach
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_FLAGS) --cov --cov-report=term

lint: install ## formatter, linter, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "found: Python %d.%d\nrequired: Python 3.11, 3.12 or 3.13\nwhat to do: make PYTHON=/path/to/python3.11 quickstart" % v)'
	@echo "installing dsr-scale with training, evaluation, demo and test packages into $(VENV):"
	@echo "about 4 minutes with a CPU build of torch, longer for the several GB of a CUDA build"
	@$(PYTHON) -m venv $(VENV) || { printf 'found: no working venv module\nrequired: python3 -m venv\nwhat to do: on Debian and Ubuntu, apt install python3-venv\n'; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24,<27'
	$(BIN)/python -m pip install --progress-bar off --constraint constraints.txt --editable '.[train,demo,eval,web,dev]'
	@touch $@

clean: ## remove the environment and the runs
	rm -rf $(VENV) runs
