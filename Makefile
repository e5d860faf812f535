# make demo: a first run on drawn patches.  make test: every check.  make bench: speed, as ratios.
# make torture: kills, flipped bits, full disks, hostile files.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO ?= demo

.PHONY: demo test browser bench torture clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mitofm needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(STAMP)
	$(BIN)/fm-extract --store $(DEMO)/embeddings.zarr --view full,center64
	$(BIN)/fm-probe --cv 5 --store $(DEMO)/embeddings.zarr --runs $(DEMO)/runs
	$(BIN)/fm-finetune --lora-rank 8 --epochs 4 --runs $(DEMO)/runs
	$(BIN)/fm-report --runs $(DEMO)/runs --out $(DEMO)/report.html

# The report's browser tests need chromium (Debian's: 290 MB). Installed where we may; elsewhere they are skipped.
browser:
	@sh tests/install_browser.sh

test: $(STAMP) browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

bench: $(STAMP)
	$(BIN)/python tests/bench_probe.py
	$(BIN)/python tests/bench_command.py
	$(BIN)/python tests/bench_store.py
	$(BIN)/python tests/bench_extract.py
	$(BIN)/python tests/bench_lora.py
	$(BIN)/python tests/bench_lora_gpu.py

torture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache test-artefacts $(DEMO) dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
