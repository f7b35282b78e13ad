# One entry point. `make dev` once, then the rest; `sh tools/test.sh` does all of it on a fresh host.
# Tools come from the virtual environment VENV where there is one, else from PATH.

VENV ?= .venv
BUILD ?= build
BIN := $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/,)
PYTHON := $(BIN)python
export PATH := $(if $(BIN),$(abspath $(VENV)/bin):)$(PATH)
export PYTHONSAFEPATH := 1
WORKERS ?= 2
SANITIZE := -Db_sanitize=address,undefined
# Where the container allows no ptrace, LeakSanitizer cannot stop the threads it wants to look at.
export UBSAN_OPTIONS := print_stacktrace=1:halt_on_error=1
C_FILES = $(shell git ls-files "csrc/*.c" "csrc/*.h")

.PHONY: dev check test test-c asan asan-python lint fmt docs docs-check bench bench-setup ci soak soak-dm dist clean

dev: ## an editable install: C is rebuilt when thinpool is imported
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install meson-python==0.22.1 meson==1.12.1 ninja==1.13.2 'cffi>=1.16'
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/pip install --no-build-isolation --editable '.[dev]'

check: lint test-c test ## before a commit

$(BUILD)/normal/build.ninja:
	meson setup -Dwerror=true $(BUILD)/normal

$(BUILD)/asan/build.ninja:
	meson setup -Dwerror=true $(SANITIZE) -Dbuildtype=debugoptimized $(BUILD)/asan

test-c: $(BUILD)/normal/build.ninja
	ninja -C $(BUILD)/normal
	meson test -C $(BUILD)/normal --no-rebuild --print-errorlogs

asan: $(BUILD)/asan/build.ninja
	ninja -C $(BUILD)/asan
	meson test -C $(BUILD)/asan --no-rebuild --print-errorlogs

# The extension with the sanitizers in it, under Python. Needs a normal install (tools/test.sh makes one):
# an editable one is found before PYTHONPATH. Leaks are not looked for: Python keeps what it has.
ASAN_PACKAGE := $(BUILD)/asan-package
asan-python: asan
	rm -rf $(ASAN_PACKAGE)
	mkdir -p $(ASAN_PACKAGE)
	cp -r thinpool $(ASAN_PACKAGE)/
	cp $(BUILD)/asan/_core*.so $(ASAN_PACKAGE)/thinpool/_native/
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(ASAN_PACKAGE) \
		$(PYTHON) -m pytest $(or $(TESTS),tests/base tests/check tests/core tests/engine)

test:
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(C_FILES)

fmt:
	ruff check --fix .
	ruff format .
	clang-format -i $(C_FILES)

docs: ## write the generated tables and manual pages
	$(PYTHON) tools/gen_format_doc.py
	$(PYTHON) tools/gen_man.py

docs-check:
	$(PYTHON) tools/gen_format_doc.py --check
	$(PYTHON) tools/gen_man.py --check

bench: ## 40 minutes, as root, on a host at rest; BENCH="edits --quick" for some of it
	sh tools/bench.sh $(BENCH)

bench-setup: ## what the benchmarks need, peers included
	sh tools/bench.sh --setup

soak: ## hours: random models and crash images, far beyond what the suite does
	THINPOOL_PROFILE=soak THINPOOL_CRASH_SEEDS=$${THINPOOL_CRASH_SEEDS:-200} \
		THINPOOL_FSX_OPERATIONS=$${THINPOOL_FSX_OPERATIONS:-50000} $(PYTHON) -m pytest -n $(WORKERS) --dist loadgroup --timeout 0 tests

soak-dm: ## an hour: a real kernel's machine stopped cold 60 times, and pools carried to it and back
	THINPOOL_COLD_STOPS=$${THINPOOL_COLD_STOPS:-30} THINPOOL_BOTH_WAYS_ROUNDS=$${THINPOOL_BOTH_WAYS_ROUNDS:-30} \
		$(PYTHON) -m pytest --timeout 0 -rP tests/kernel

# Lint runs inside pytest (tests/tidy), so that pytest's summary, which is the last line, covers it.
ci: ## everything, setting up what is missing
	sh tools/test.sh

dist: ## a source archive, from what is committed
	mkdir -p dist
	$(PYTHON) -c 'import mesonpy; print(mesonpy.build_sdist("dist"))'

clean:
	rm -rf $(BUILD)
