# Both `make quickstart` and `make test` set themselves up: a virtual environment, the pinned install, nothing else.
PYTHON ?= python3.11
VENV ?= .venv
RUN ?= runs/quickstart
WORKERS ?= 2
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: help install quickstart test faults lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install, then train on the built-in corpus and make music ($(RUN))"
	@echo "make test         install, then lint, type check and test"
	@echo "make faults       kill, tear and corrupt: the long matrices"
	@echo "make install      the virtual environment alone ($(VENV))"
	@echo "make lint         ruff and mypy"
	@echo "make format       sort imports and format"
	@echo "make clean        remove caches and builds; the environment and the runs stay"
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) RUN=$(RUN) WORKERS=$(WORKERS) (processes that test)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found: install it, or name another (3.10 to 3.12) with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/stretto run quickstart -o $(RUN)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	tests/setup_libaio.sh $(BIN)/python
	tests/setup_cluster.sh
	tests/setup_transformers5.sh $(BIN)/python
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not faults'

faults: $(INSTALLED)
	$(BIN)/pytest --timeout 3600 tests/faults tests/trainer/test_resume.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
