# Everything that is done to this checkout; `make` alone lists it. Needs Python 3.11 or later, pip, make and cc.

PYTHON ?= python3
VENV ?= .venv
TESTS ?=
export PYTHONDONTWRITEBYTECODE = 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
SHIM := jobrunner/shim/jobrunner-shim
SHIM_SOURCES := $(wildcard jobrunner/shim/*.c jobrunner/shim/*.h)
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: help venv shim lock proto check format test test-vm test-docker demo bench attack soak clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(STAMP) $(if $(SHIM_SOURCES),$(SHIM)) ## the environment, in .venv/

$(STAMP): requirements.lock pyproject.toml hatch_build.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes --no-deps --prefer-binary -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	$(BIN)/pip check --disable-pip-version-check --quiet
	@touch $@

shim: venv ## compile the shim, if its sources have changed

$(SHIM): $(SHIM_SOURCES) hatch_build.py | $(STAMP)
	$(BIN)/python hatch_build.py

lock: ## pin the newest versions of everything in requirements.lock (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header \
		--all-extras --group dev --output-file requirements.lock pyproject.toml

proto: venv ## generate the messages from protos/
	$(BIN)/python scripts/generate_protos.py

check: venv ## style, security, types, layers, and whether the generated code is fresh
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive jobrunner cli dev-certs docker scripts hatch_build.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_protos.py --check

format: venv ## put the sources into the one format
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

test: venv ## every test but the benchmarks; in CI a skip is a failure
	JOBRUNNER_MUST_RUN=$(if $(filter true,$(CI)),1) $(BIN)/pytest $(TESTS)

test-vm: venv ## cgroup v2, the systemd units and power losses, in a virtual machine; needs root, qemu, debootstrap and Debian's kernel
	tests/vm/run.sh $(BIN) $(TESTS)
	$(if $(TESTS),,tests/vm/power.sh $(BIN))

test-docker: venv ## the image and docker-compose.yml, built and run for real; needs root and Docker
	scripts/test_docker.sh $(BIN)

demo: ## the original design's examples, over mutual TLS; needs root
	@test "$$(id -u)" = 0 || { echo "cannot run the demo: jobs need root (namespaces, cgroups); run: sudo make demo" >&2; exit 1; }
	@$(MAKE) --no-print-directory venv
	@scripts/demo.sh $(BIN)

bench: venv ## measure; tables here, figures in build/bench.json; needs root and bwrap
	$(BIN)/python -m tests.bench --out build/bench.json

attack: venv ## attacks on a real server at their full size, with what an innocent client notices; needs root
	JOBRUNNER_ATTACK=full $(BIN)/pytest -s tests/service/test_attacks.py

soak: venv ## load and abuse for long: followers, memory, instant endings, 1,000 jobs, 300 kills of the server; SHORT=1 for what CI runs; needs root
	$(BIN)/python -m tests.soak $(if $(SHORT),--short)
	$(if $(SHORT),,JOBRUNNER_TEST_JOBS=1000 $(BIN)/pytest -s tests/kernel/test_leftovers.py)
	$(if $(SHORT),,JOBRUNNER_CRASH_ROUNDS=300 $(BIN)/pytest -s tests/system/test_crash.py)

clean: ## remove what was made
	rm -rf $(VENV) $(SHIM) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
