# Everything runs in a virtual environment of the project's own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint benchmark clean

setup: $(VENV)/.ready

# torch first, so that nothing pulls a CUDA build; gptqmodel builds against what is installed.
$(VENV)/.ready: pyproject.toml integration/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-build-isolation --requirement integration/requirements.txt
	$(BIN)/pip install --quiet --no-deps --requirement integration/requirements-data.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python integration/demo.py

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: setup
	PYTHONPATH=integration $(BIN)/python integration/benchmarks/speed.py

clean:
	rm -rf $(VENV) .cache
