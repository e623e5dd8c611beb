# `make` lists the targets. Targets that need the environment set it up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.sd3tune-installed
LOG := $(VENV)/setup.log
AUDIT := $(VENV)/audit.log
WORKERS ?= 3
MINUTES ?= 10

# uv installs what the lock pins in a fraction of pip's time, from a cache that several environments share. It reads
# no configuration of pip, such as a mirror's address: where it fails, pip installs.
uv = { sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.txt && \
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt && \
	$(BIN)/uv pip install --no-config --compile-bytecode --python $(BIN)/python $(1); } >> $(LOG) 2>&1

# pip's output goes into a log; its last lines are shown when pip fails.
pip = $(BIN)/python -m pip install --disable-pip-version-check $(1) >> $(LOG) 2>&1 || { \
	tail -n 15 $(LOG) >&2; echo "make: pip failed; its full output is in $(LOG)" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-install crash fuzz check check-long scale build lock audit licences format bench check-gpu bench-gpu bench-quality nano docs docs-site clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with sd3tune and its tools, at the tested versions (once; PYTHON=python3.12 selects the Python)
	@echo "$(VENV) is ready. In this shell: source $(BIN)/activate"

$(STAMP): pyproject.toml setup.py requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "make: sd3tune needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1 | head -n 1); try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "make: $(PYTHON) lacks venv and ensurepip; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@echo "set-up 1 of 3: a Python environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@: > $(LOG)
	@echo "set-up 2 of 3: PyTorch, diffusers and the other libraries (the first download takes some minutes)"
	@$(call uv,--require-hashes -r requirements.lock) || { $(call pip,--require-hashes -r requirements.lock); }
	@echo "set-up 3 of 3: sd3tune"
	@$(call pip,--no-deps --no-build-isolation -e .)
	@touch $@

demo: $(STAMP) ## Train a LoRA on packaged images, offline, and draw before/after images
	$(BIN)/sd3tune demo

test: $(STAMP) ## Run the tests (WORKERS=8 for more processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-install: ## Run the README's first commands in a fresh clone, home and environment (10 minutes, 6 GB temporarily)
	$(PYTHON) tests/install/newcomer.py

crash: $(STAMP) ## Kill a run at each of its writes, and resume it (20 minutes)
	SD3TUNE_EVERY_CRASH_POINT=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/run/crash

fuzz: $(STAMP) ## Try everything that reads files with damaged and odd ones (MINUTES=60 in all; logs in build/fuzz)
	$(BIN)/python -m tests.fuzz.run $(MINUTES)

check: $(STAMP) ## Lint, formatting, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check-long: $(STAMP) ## Run the slow tests that `make test` leaves out (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n 2 --dist worksteal

scale: $(STAMP) ## Check runs that divide a model, in 2 and 4 processes, against one process (five minutes)
	@mkdir -p build
	@printf '%-20s%12s%12s%12s\n' 'largest error of' gradient loss weights > build/scale.txt
	SD3TUNE_SCALE_TABLE=build/scale.txt OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "long or not long" tests/runtime/test_sharding.py; \
		code=$$?; cat build/scale.txt; exit $$code

build: $(STAMP) ## Write the wheel and the source archive to dist/, and run the demo from the wheel alone
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(PYTHON) tests/install/wheel.py dist/*.whl constraints.txt

lock: $(STAMP) ## Pin the dependencies of pyproject.toml with their hashes (UPGRADE=NAME, UPGRADE=all: to newer versions)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-python-downloads --all-extras \
		--generate-hashes --only-binary :all: --emit-build-options --no-annotate --custom-compile-command "make lock" \
		$(if $(filter all,$(UPGRADE)),--upgrade,$(UPGRADE:%=--upgrade-package %)) pyproject.toml -o requirements.lock
	{ echo "# Made by make lock from requirements.lock: the same versions, without hashes, for pip's -c."; \
		sed -n 's/ \\$$//p' requirements.lock | grep ==; } > constraints.txt

audit: $(STAMP) ## Check the pinned versions against the advisory database (needs the network)
	@$(BIN)/pip-audit --progress-spinner off --strict --disable-pip --require-hashes -r requirements.lock > $(AUDIT) 2>&1 \
		&& tail -n 1 $(AUDIT) || { grep -q '^Found ' $(AUDIT) && cat $(AUDIT) >&2 || \
		echo "make: the audit failed: the advisory service did not answer for every package; see $(AUDIT)" >&2; exit 1; }

licences: $(STAMP) ## Regenerate docs/licences.md from the installed packages
	$(BIN)/python -m tests.install.licences > docs/licences.md

format: $(STAMP) ## Fix lint and formatting automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure the trainer against a bare loop; with PEER_SCRIPT=PATH, runs against diffusers' example
	$(BIN)/python -m benchmarks.$(if $(PEER_SCRIPT),peer.run "$(PEER_SCRIPT)",run)

check-gpu: ## Check training on one GPU in four minutes: host waits, every path, memory (PYTHON=... with torch; BUNDLE=DIR)
	$(PYTHON) -m benchmarks.gpu.check $(if $(BUNDLE),--bundle "$(BUNDLE)")

bench-gpu: ## Benchmark on one GPU at full size, in eight minutes (PYTHON=... with torch; BUNDLE=DIR, PEER_SCRIPT=PATH)
	$(PYTHON) -m benchmarks.gpu.run $(if $(BUNDLE),--bundle "$(BUNDLE)") $(if $(PEER_SCRIPT),--script "$(PEER_SCRIPT)")

bench-quality: $(STAMP) ## Measure training quality on nano (hours, QUICK=1: ten minutes; continues where it stopped; PEER_SCRIPT=PATH as above)
	$(BIN)/python -m benchmarks.quality.run $(if $(QUICK),--quick) $(PEER_SCRIPT)

nano: $(STAMP) ## Train the base nano from scratch into data/nano/nano (hours; continues where it stopped)
	$(BIN)/python -m examples.nano.make

docs: $(STAMP) ## Regenerate docs/config.md and configs/schema.json from the schema
	$(BIN)/python -m sd3tune.config.reference > docs/config.md
	$(BIN)/python -m sd3tune config schema > configs/schema.json

docs-site: $(STAMP) ## Write the site of the documentation to build/site; a dead link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "to read it: $(BIN)/python -m http.server --directory build/site, then http://localhost:8000"

clean: ## Remove .venv, caches and build outputs, but not runs/ and .cache/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
