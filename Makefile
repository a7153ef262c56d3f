PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py native/build_native.py | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

NATIVE := $(wildcard native/src/*.c native/include/mic/*.h native/libscif/*.c native/include/*.h)
$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

build: $(VENV)/.built
