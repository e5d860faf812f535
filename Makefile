# make demo: a first run on drawn patches.  make test: every check.  make bench: speed, as ratios.
# make torture: kills, flipped bits, full disks, hostile files.
# make test-arithmetic: every test, computed as older processors would.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO ?= demo

.PHONY: demo test test-arithmetic browser bench torture clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mitofm needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(STAMP)
	$(BIN)/fm-extract --model efficientnet-lite0,efficientnet-lite1 --store $(DEMO)/embeddings.zarr --view full,center64
	$(BIN)/fm-probe --cv 5 --store $(DEMO)/embeddings.zarr --runs $(DEMO)/runs
	$(BIN)/fm-finetune --lora-rank 8 --view center64@128 --epochs 3 --no-tta --runs $(DEMO)/runs
	$(BIN)/fm-report --runs $(DEMO)/runs --out $(DEMO)/report.html

# The report's browser tests need chromium (Debian's: 290 MB). Installed where we may; elsewhere they are skipped.
browser:
	@sh tests/install_browser.sh

test: $(STAMP) browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(NATIVE) OMP_NUM_THREADS=1 $(PYTEST)
	$(OLDEST) $(PYTEST) $(NUMERICAL)

# Sums are cut up, and so rounded, by what the processor can do and how many threads add. These have torch (ATEN),
# oneDNN, MKL and numpy's OpenBLAS compute as an older processor would; each looks when it is loaded, so for a run of
# pytest at a time. NATIVE unsets what the environment may have chosen already.
KNOBS := ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA OPENBLAS_CORETYPE MKL_ENABLE_INSTRUCTIONS MKL_CBWR
NATIVE := env $(KNOBS:%=-u %)
OLDER := $(NATIVE) ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=2
OLDEST := $(NATIVE) ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
# Numbers against numbers, a minute or two on two cores: `make test` has these computed as the oldest processor would.
NUMERICAL := $(addprefix tests/test_,curve.py logistic.py stream.py paper.py lora.py network.py train.py augment.py metrics.py)
TESTS ?=

# TESTS=tests/test_train.py restricts it.
test-arithmetic: $(STAMP)
	$(NATIVE) OMP_NUM_THREADS=2 $(PYTEST) $(TESTS)
	$(OLDER) $(PYTEST) $(TESTS)
	$(OLDEST) $(PYTEST) $(TESTS)

bench: $(STAMP)
	$(BIN)/python tests/bench_probe.py
	$(BIN)/python tests/bench_command.py
	$(BIN)/python tests/bench_store.py
	$(BIN)/python tests/bench_extract.py
	$(BIN)/python tests/bench_slides.py
	$(BIN)/python tests/bench_lora.py
	$(BIN)/python tests/bench_gpu.py

torture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache test-artefacts $(DEMO) dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
