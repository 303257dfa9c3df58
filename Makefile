# make demo: set up and run the main job.  make test: set up and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo demo-seeds test slow lint format testbed clean

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; run make with PYTHON=python3.11, say"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: setup
	$(BIN)/hf-safe-ema demo

# The demo over five seeds, as a table: what docs/testbed.md quotes.
demo-seeds: setup
	$(BIN)/python benchmarks/demo_seeds.py --seeds 0 1 2 3 4

# A file of tests is run by one of two processes, each on one core.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Makes the small Llama from nothing, beside the one that ships (about 70 minutes on one core).
testbed: setup
	$(BIN)/python -m hf_safe_ema.testbed.build --output-dir build/testbed

clean:
	rm -rf $(VENV) build *.egg-info
