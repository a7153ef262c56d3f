# Every target works on a machine with Python >= 3.10, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check
NATIVE := $(wildcard native/src/*.c native/src/*.h native/include/*.h native/include/mic/*.h native/libscif/* native/libmicvop/* native/bench/*)
GENERATED := native/include/mic/layout_gen.h
C_FILES := $(filter-out $(GENERATED),$(wildcard native/src/*.[ch] native/include/*.h native/include/mic/*.h native/libscif/*.[ch] native/libmicvop/*.[ch] native/fuzz/*.[ch] native/test/*.[ch] native/bench/*.[ch]))
PY := mic_emu host card tests docs native/build_native.py setup.py

.PHONY: build boot test help lint fmt check check-all asan tsan fuzz soak bench docs pictures clean layout
.DEFAULT_GOAL := build

build: $(VENV)/.built ## build into .venv

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Dependencies are installed once and after a change of pyproject.toml; C is compiled each time it changed.
$(VENV)/.built: pyproject.toml setup.py native/build_native.py $(NATIVE) | $(BIN)/python
	@if [ $(VENV)/.deps -nt pyproject.toml ]; then set -x; $(PIP) --no-deps -e .; \
	else set -x; $(PIP) -e '.[test]' && touch $(VENV)/.deps; fi
	@$(BIN)/python -m compileall -q mic_emu host card  # a start compiles nothing, PYTHONDONTWRITEBYTECODE or not
	@touch $@

$(VENV)/.dev: pyproject.toml | build
	$(PIP) -e '.[test,dev]'
	@touch $@

boot: build ## build, boot a card and show it
	$(BIN)/micemu boot

JOBS ?= 2
test: build ## all tests, or TESTS=tests/scif, JOBS=2 files at a time; those that need a missing peer program are skipped
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(TESTS)

check: build ## fast tests: no whole machine
	$(BIN)/python -m pytest -q -m 'not system and not peer'

check-all: lint test asan tsan ## what CI runs, and the sanitizers

layout: | $(BIN)/python ## regenerate the C header from mic_emu/layout.py
	$(BIN)/python -m mic_emu.layout_c > $(GENERATED).new && mv $(GENERATED).new $(GENERATED)

lint: build $(VENV)/.dev ## ruff, mypy --strict, clang-format, cppcheck, layering, generated header
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	rm -rf build/tree && mkdir -p build/tree && cp -r mic_emu build/tree/ && cp -r host card build/tree/mic_emu/
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p mic_emu
	cd build/tree && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/python -m mic_emu.layout_c | diff -u $(GENERATED) - || { echo 'stale: make layout'; exit 1; }
	sh native/lint.sh

fmt: build $(VENV)/.dev ## format everything
	$(BIN)/ruff check -q --fix --exit-zero $(PY)
	$(BIN)/ruff format -q $(PY)
	$(BIN)/clang-format -i $(C_FILES)

asan: build ## C tests and ring tests under ASan and UBSan
	sh native/sanitize.sh address,undefined

tsan: build ## C tests under ThreadSanitizer
	sh native/sanitize.sh thread

fuzz: build ## libFuzzer targets and those of the Python parsers, SECONDS_EACH (needs clang)
	sh native/fuzz/run.sh $(or $(SECONDS_EACH),60)
	$(BIN)/python tests/fuzz/fuzzer.py $(or $(SECONDS_EACH),60)

soak: build ## the long runs
	MICEMU_SOAK=1 $(BIN)/python -m pytest -q -rP -m soak --timeout 3600

bench: build ## speed against limits of this machine, in one run
	$(BIN)/micemu bench

docs: build ## the documentation site
	$(PIP) -e '.[docs]'
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html

pictures: build ## draw docs/pictures from a running card
	$(BIN)/python docs/pictures.py

clean: ## remove what was built
	rm -rf $(VENV) build mic_emu/lib mic_emu/include *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis \
		docs/_build docs/cli-help.md docs/man.md
	find . -name __pycache__ -prune -exec rm -rf {} + ; rm -f mic_emu/*.so mic_emu/_native.c

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
