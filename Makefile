# Everything runs in .venv, which the first call creates. `make help` lists the targets; ARGS= is passed to the command.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
NATIVE_SOURCES := CMakeLists.txt $(foreach ending,cpp h,$(wildcard kernels/mmmae_kernels/*/*.$(ending) kernels/mmmae_kernels/*/*/*.$(ending)))

.DELETE_ON_ERROR:
.PHONY: install demo test aot verify-gpu test-versions test-lowest test-newest soak bench bench-full gpu interop lint types sanitize clean help

install: $(VENV)/.native ## install the package with all extras and the tools of development into .venv

demo: $(VENV)/.native ## pretrain a tiny model on generated subjects; its last line names the picture (a minute)
	$(BIN)/mmmae pretrain $(ARGS)

# Three at a time, of one thread each: some wait for processes that they start, and tests of threads ask for more. Tests of a
# group share what one of them has made. Triton decides at import whether it interprets or compiles, so that the kernels are
# tested in two processes.
test: $(VENV)/.native aot ## run the tests (ARGS="-k patch" and the like are passed to pytest)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 3 --dist loadgroup $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/test_equality_of_ops.py tests/kernels/test_autotune.py $(ARGS)

aot: $(VENV)/.installed ## compile every GPU kernel for nine architectures, and fail on what must not be in one (10 minutes, later 3)
	@mkdir -p build
	$(BIN)/python -m mmmae_kernels.aot > build/aot.txt || { cat build/aot.txt; exit 1; }
	@echo "the table is in build/aot.txt"

verify-gpu: $(VENV)/.installed ## execute every compiled GPU kernel on an emulator, for each architecture and type (20 minutes, less the next time)
	$(BIN)/python -m pytest tests/kernels/test_emulated.py --all-targets -n auto --dist loadgroup $(ARGS)

# In build/versions, outside .venv: with the oldest torch and triton that pyproject.toml admits, and with the newest that pip
# finds. With CUDA's libraries each takes about 6 GB; LOWEST= and NEWEST= ask for other versions, such as a CPU build of torch.
# Triton's interpreter of 3.6 can't work with numpy 2.4.
VERSIONS := build/versions
LOWEST ?= $(shell sed -n 's/^ *"\(torch\|triton\)>=\([0-9.]*\).*/\1==\2.*/p' pyproject.toml) 'numpy<2.4'
NEWEST ?= torch triton
VERSION_TESTS = $(addprefix tests/kernels/test_,architectures.py autotune.py gpu_launch.py launch_path.py torch_library.py emulated.py)
test-versions: test-lowest test-newest ## test the GPU kernels with the oldest and the newest torch and triton (downloads 6 GB)
test-lowest: REQUIRED = $(LOWEST)
test-newest: REQUIRED = $(NEWEST)
test-lowest test-newest: test-%:
	$(PYTHON) -m venv $(VERSIONS)/$*
	sed -n '/^dependencies = /,/^]/s/^ *"\(.*\)",$$/\1/p' pyproject.toml > $(VERSIONS)/requirements.txt
	$(VERSIONS)/$*/bin/python -m pip install -q -U -r $(VERSIONS)/requirements.txt pytest pytest-benchmark pytest-xdist $(REQUIRED)
	@$(VERSIONS)/$*/bin/python -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
	export OMP_NUM_THREADS=1 PYTHONPATH=kernels && \
	  $(VERSIONS)/$*/bin/python -m pytest $(VERSION_TESTS) -k 'not broken' $(ARGS) && \
	  TRITON_INTERPRET=1 $(VERSIONS)/$*/bin/python -m pytest tests/kernels/test_equality_of_ops.py tests/kernels/test_autotune.py $(ARGS)

soak: $(VENV)/.native ## run the tests that take long: 10,000 random calls, 5,000 random files, base in all cases, four processes, a run killed twenty times (25 minutes)
	$(BIN)/python -m pytest tests/soak --soak $(ARGS)

bench: $(VENV)/.native ## run the benches: every op, and the model against the reference (9 minutes; ARGS=--quick: one)
	$(BIN)/python -m pytest bench/ --benchmark $(ARGS)

bench-full: $(VENV)/.native $(VENV)/.peers ## the same with every preset, peers, scaling and switches (45 minutes)
	$(BIN)/python -m pytest bench/ --benchmark --full $(ARGS)

# Nothing is installed: it takes .venv where there is one, and whatever $(PYTHON) has where there is none.
gpu: ## on a machine with a GPU: check every kernel and step, then take times (8 minutes; ARGS=--dry-run: on the CPU)
	PYTHONPATH=.:kernels $$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) -m bench.gpu $(ARGS)

# In a second environment, which sees the packages of .venv: what these libraries bring stays outside of it.
INTEROP := build/interop
interop: $(VENV)/.native ## test with timm, transformers, peft, torchgeo and TerraTorch (downloads 300 MB, then 2 minutes)
	test -x $(INTEROP)/bin/python || $(BIN)/python -m venv $(INTEROP)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(INTEROP)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-venv.pth
	$(INTEROP)/bin/python -m pip install -q -c constraints.txt 'mmmae[interop,terratorch]'
	OMP_NUM_THREADS=1 $(INTEROP)/bin/python -m pytest tests/interop $(ARGS)

lint: $(VENV)/.installed ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed ## check types
	$(BIN)/mypy

# The sanitised library goes into a second copy of the package, which PYTHONPATH puts ahead of the installed one. The
# sanitisers' own libraries must be in the process before Python; libstdc++ too, or they find no __cxa_throw to wrap and the
# first exception aborts. --capture=sys: else pytest takes a report for the test's output and loses it when the process ends.
SANITIZED := build/sanitize
PRELOAD = $(foreach library,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))
sanitize: $(VENV)/.installed ## run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer (needs GCC)
	rm -rf $(SANITIZED)/mmmae_kernels
	MMMAE_NATIVE=1 CMAKE_ARGS=-DMMMAE_SANITIZE=ON \
	  $(BIN)/python setup.py -q build --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	export LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=$(SANITIZED) && \
	  $(BIN)/python -c 'import mmmae_kernels.cpu.library as n; assert "$(SANITIZED)" in n.module().__file__, n.module()' && \
	  $(BIN)/python -m pytest --capture=sys tests/kernels/test_native*.py $(ARGS)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache kernels/mmmae_kernels/_native*.so

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "mmmae needs Python 3.10 or newer, $(PYTHON) is `$(PYTHON) -V 2>/dev/null || echo missing`; try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) lacks the module venv or ensurepip (Debian and Ubuntu: package python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The build tools first: without build isolation they are the pinned ones, and the native library can be rebuilt by itself.
# Installing anew removes the native library; where there was one it is built again, so that no test is skipped without need.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt Makefile | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt setuptools nanobind cmake ninja
	MMMAE_NATIVE=0 $(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@
	@test ! -e $(VENV)/.native || { $(BUILD_NATIVE) && touch $(VENV)/.native; }

# By the package's name, which is installed already: the path of the checkout would install it again.
$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt 'mmmae[peers]'
	@touch $@

# With a compiler, Python's headers and OpenMP, a native library that does not build is an error. Without one of them the
# package works in PyTorch code, and the tests of the library are skipped.
CAN_BUILD = printf '\#include <Python.h>\n\#include <omp.h>\n' | $(CXX) -fopenmp -fsyntax-only -x c++ - 2>/dev/null \
  -I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')"
BUILD_NATIVE = export MMMAE_NATIVE="$${MMMAE_NATIVE-$$($(CAN_BUILD) && echo 1)}" && $(BIN)/python setup.py -q build_ext --inplace
$(VENV)/.native: $(VENV)/.installed $(NATIVE_SOURCES)
	@$(BUILD_NATIVE)
	@touch $@
