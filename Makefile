# Everything runs in virtual environments of this folder; nothing needs root.
PYTHON ?= python3
BIN := .venv/bin
DEMO_PORT ?= 8100
PIN := -c constraints.txt
SOURCES := setup.cfg extensions/setup.cfg constraints.txt Makefile

.PHONY: run demo test check dist bench load prove clean docs generate

run: .venv/.run
	@exec $(BIN)/muset serve

# The service with a model that is scripted and fails now and then; the model ends with this shell.
demo: .venv/.run
	@$(BIN)/python -m muset.testing.upstream --port $(DEMO_PORT) --model demo --first-token 0.3 \
	  --tokens-per-second 40 --fault rate_limited,rate=0.1,times=0 --fault cut,rate=0.05,times=0 & \
	model=$$!; trap 'kill $$model' EXIT INT TERM; \
	AI_BASE_URL=http://127.0.0.1:$(DEMO_PORT)/v1 AI_MODEL=demo $(BIN)/muset serve

test: .venv/.test .venv-ext/.test
	.venv-ext/bin/python -m pytest -q -n auto --dist loadfile tests/ext
	$(BIN)/python -m pytest -q -n auto --dist loadfile tests --ignore=tests/ext

check: .venv/.check docs dist
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/check_audit.py
	$(BIN)/python deploy/audit.py
	$(BIN)/check-jsonschema -q --builtin-schema vendor.compose-spec deploy/compose.yaml

docs: .venv/.check
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

# Both distributions; the wheels are tried in an environment of their own.
dist: .venv/.check
	rm -rf dist
	$(BIN)/python -m build -q --no-isolation --outdir dist extensions
	$(BIN)/python -m build -q --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -q tests/check_dist.py

bench: .venv-bench/.bench
	.venv-bench/bin/python benchmarks/http_instructions.py
	.venv-bench/bin/python benchmarks/http_overhead.py
	.venv-bench/bin/python benchmarks/micro.py --valgrind
	.venv-bench/bin/python benchmarks/metrics_cost.py --valgrind
	.venv-bench/bin/python benchmarks/ours_metrics.py
	.venv-bench/bin/python benchmarks/logging_rate.py --valgrind
	.venv-bench/bin/python benchmarks/fairness.py
	.venv-bench/bin/python benchmarks/cache.py --valgrind
	.venv-bench/bin/python benchmarks/hitrate.py
	.venv-bench/bin/python benchmarks/stampede.py --rounds 3

# A stack of its own, and 100 users, 1,100 requests a second and 128 at once: less than 3 minutes.
load: .venv/.load
	@exec $(BIN)/python locust/run.py

generate: .venv/.run
	$(BIN)/python deploy/generate.py

prove: .venv/.test .venv-bench/.bench
	$(BIN)/python -m pytest -q --prove tests

clean:
	rm -rf .venv .venv-ext .venv-bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  htmlcov .coverage

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Muset needs Python 3.11 or newer; give one with 'make PYTHON=python3.11'."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.run: $(SOURCES) | .venv/bin/python
	$(BIN)/pip install -q --disable-pip-version-check $(PIN) -e ./extensions -e .
	@touch $@

.venv/.test: $(SOURCES) | .venv/bin/python
	$(BIN)/pip install -q --disable-pip-version-check $(PIN) -e './extensions[test]' -e '.[test]'
	@touch $@ .venv/.run

.venv/.load: $(SOURCES) | .venv/bin/python
	$(BIN)/pip install -q --disable-pip-version-check $(PIN) -e ./extensions -e '.[load]'
	@touch $@ .venv/.run

.venv/.check: $(SOURCES) | .venv/bin/python
	$(BIN)/pip install -q --disable-pip-version-check $(PIN) -e './extensions[test]' -e '.[test,check]'
	@touch $@ .venv/.run .venv/.test

.venv-ext/.test: $(SOURCES)
	$(PYTHON) -m venv .venv-ext
	.venv-ext/bin/pip install -q --disable-pip-version-check $(PIN) -e './extensions[test]'
	@touch $@

.venv-bench/.bench: $(SOURCES) benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q --disable-pip-version-check $(PIN) -e './extensions[all]' \
	  -r benchmarks/requirements.txt
	@touch $@
