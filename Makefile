# Each target stands alone on a fresh machine that has make and python3 (3.11 or later). Debian keeps venv in a package of
# its own, python3-venv: where it is missing, root gets it installed, others are told.

PYTHON ?= python3
BIN = .venv/bin
export FLWR_TELEMETRY_ENABLED = 0
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: demo test test-all lint types docs bench

demo: .venv/.ready # real federated training, on real images, on this machine
	$(BIN)/gradsharding demo

test: .venv/.ready # what takes seconds
	$(BIN)/pytest -m "not slow"

test-all: .venv/.ready # and what takes minutes or gigabytes
	$(BIN)/pytest

lint: types # style, types, and who may import whom
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: .venv/.ready
	$(BIN)/mypy

docs: .venv/.ready # runs the examples that the documents and docstrings show
	$(BIN)/pytest tests/test_docs.py gradsharding

bench: .venv/.ready # 6 GB of disk and 16 GB of memory, for a quarter of an hour; the figures go to benchmarks/results/
	$(BIN)/python benchmarks/embedded.py
	$(BIN)/python benchmarks/flower_round.py

# torch comes first and pinned: this release installs as a small CPU build, where a later one may bring gigabytes of CUDA.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv || (apt-get -q update && apt-get -qy install python3-venv && $(PYTHON) -m venv .venv)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@
