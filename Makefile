# make up      environment, server and agent on this machine
# make test    all checks and tests; as root it installs what the tests need
# make demo    the lab with three tunnels, a few faults, the dashboard (root)
# make check   format, lint, types, imports; takes seconds
# make bench   the cost figures in bench/
# make pages   the pages of docs/reference that are generated from the code
# make fuzz    malformed input for all parsers of untrusted input, SECONDS=20 for each

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Debian packages that the tests need; as root they are installed:
PACKAGES := $(shell cat lab/packages.txt tests/packages.txt 2>/dev/null)
SUDO_FREE := $(shell [ "$$(id -u)" = 0 ] && echo yes)

# Tests in parallel: as many as there are cores; in the lab, where they mostly wait, some more.
WORKERS  := $(shell nproc 2>/dev/null || echo 2)
LABS     ?= 3
SECONDS  ?= 20
# The lab runs in real time on shared cores: a test that fails there is tried once more, listed as RERUN
# and in the last line (tests/conftest.py). A rerun is a race to find, not a pass to keep.
# The slowest tests are printed; docs/tests.md says why they are slow.
SLOWEST    := --durations 20 --durations-min 5
UNIT       := -m pytest -q -n $(WORKERS) --dist worksteal $(SLOWEST) -m "not acceptance"
ACCEPTANCE := -m pytest -q -raR -n $(LABS) --dist loadgroup --reruns 1 $(SLOWEST) -m acceptance

.PHONY: up test unit acceptance demo check format bench fuzz pages lock clean packages

up: $(VENV)/server
	@exec $(BIN)/vpn-sentinel up

# --- environments: each stamp says what is in the venv ----------------------------------------------------------------

$(BIN)/python:
	@sh tools/venv.sh "$(PYTHON)" "$(VENV)"

$(VENV)/server: $(BIN)/python requirements/server.lock requirements/build.lock pyproject.toml
	@echo "installing from requirements/server.lock"
	@$(PIP) --no-deps --require-hashes -r requirements/server.lock -r requirements/build.lock  # all that it needs
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/dev: $(BIN)/python requirements/dev.lock requirements/build.lock pyproject.toml
	@echo "installing from requirements/dev.lock"
	@$(PIP) --require-hashes -r requirements/dev.lock -r requirements/build.lock
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@ $(VENV)/server

packages:
ifeq ($(SUDO_FREE),yes)
	@sh tools/packages.sh $(PACKAGES)
else
	@sh tools/packages.sh --report $(PACKAGES)
endif

# --- checks -----------------------------------------------------------------------------------------------------------

check: $(VENV)/dev
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

format: $(VENV)/dev
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

unit: $(VENV)/dev
	@$(BIN)/python $(UNIT)

acceptance: $(VENV)/dev packages
	@$(BIN)/python $(ACCEPTANCE)

test: check packages
	@$(BIN)/python $(UNIT)
	@$(BIN)/python $(ACCEPTANCE)

bench: $(VENV)/dev
	@$(BIN)/python -m bench

# Inputs that cause a fault are kept in .cache/fuzz, inputs with new coverage in tests/fuzz/corpus.
fuzz: $(VENV)/dev
	@$(BIN)/python -m bench fuzz --seconds $(SECONDS) --keep

demo: $(VENV)/dev packages
	@exec $(BIN)/python -m lab.demo

# --- upkeep -----------------------------------------------------------------------------------------------------------

pages: $(VENV)/dev
	@$(BIN)/python -m docs.make_settings
	@$(BIN)/python -m docs.make_states

lock: $(VENV)/dev
	@sh tools/lock.sh

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
