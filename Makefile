# Each target stands alone on a fresh machine that has make and python3 (3.11 or later) with venv and pip;
# on Debian: apt install make python3-pip python3-venv

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

bench: .venv/.ready # 5.5 GB of disk and 6 GB of memory, for minutes; the figures go to benchmarks/results/
	$(BIN)/python benchmarks/embedded.py

# torch comes first and pinned: this release installs as a small CPU build, where a later one may bring gigabytes of CUDA.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@
