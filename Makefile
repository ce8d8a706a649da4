# make demo    set up, build, and fine-tune a model with a fused objective next to the same run in plain torch
# make test    set up, build, and run the tests; make test-slow runs those that take minutes
# make bench   time against eager torch, torch.compile and others; BENCH="--size quick" takes about two minutes
# make gpu     on a machine with an NVIDIA GPU: build, test, check and time on it; GPU="--quick" passes options on
# make wheel   a wheel in dist/; make check-wheel builds one and looks into it, installs it elsewhere, and runs it
# make trust   the slow and the long tests; TRUST="-k soak" passes options on
# make reference  the API reference, from docstrings, in build/reference/index.html
# make check-arm        the CPU kernels on Arm: a cross compiler and qemu
# make check-versions   build and test with other torches and Pythons; VERSIONS="--torch newest" passes options on
# make lint | docs | build | check-oldest-torch | check-oldest-transformers | clean
#
# Which Python: PYTHON=/path/to/python if given, else the active environment, else .venv in this folder, made on first
# use. A torch that is already installed is used as it is (also a CUDA build, also one of the system's Python).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

ifdef PYTHON
  PY := $(PYTHON)
else ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
  PY := python
else
  PY := .venv/bin/python
endif

STAMP := build/.environment-$(shell echo "$(PY) $(VIRTUAL_ENV) $(CONDA_PREFIX)" | cksum | cut -d' ' -f1)
TOOLS := pybind11 ninja setuptools wheel pytest pytest-benchmark pytest-xdist expecttest hypothesis \
         transformers tokenizers safetensors accelerate peft datasets pyarrow scikit-learn sacrebleu \
         matplotlib tensorboard optuna tqdm numpy ruff clang-format
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/emulation/*.h tests/emulation/*.cpp \
                 tests/sanitizers/*.cpp tests/sanitizers/ATen/*.h tests/arm/*.cpp)

.PHONY: help build test test-slow trust demo lint format bench bench-kept-pages gpu docs reference wheel check-wheel \
        check-oldest-torch check-oldest-transformers check-arm check-versions clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

.venv/bin/python:
	@echo "==> no environment is active: making .venv"
	@# A torch of the system's Python (a CUDA build, say) stays visible.
	@if python3 -c "import torch" 2>/dev/null; then python3 -m venv --system-site-packages .venv; else python3 -m venv .venv; fi

$(STAMP): constraints.txt $(if $(filter .venv/%,$(PY)),| .venv/bin/python)
	@echo "==> using $$($(PY) -c 'import sys; print(sys.executable, sys.version.split()[0])')"
	@mkdir -p build
	@grep -v '^\(torch\|triton\)=' constraints.txt > build/constraints.txt
	@if $(PY) -c "import torch" 2>/dev/null; then \
	   echo "==> keeping torch $$($(PY) -c 'import torch; print(torch.__version__)')"; \
	 else \
	   echo "==> installing $$(grep '^torch=' constraints.txt)"; $(PY) -m pip install -q "$$(grep '^torch=' constraints.txt)"; \
	 fi
	@echo "==> installing the development tools of constraints.txt"
	@$(PY) -m pip install -q -c build/constraints.txt $(TOOLS)
	@# Tests compare entity scores with it; it would bring Keras along.
	@$(PY) -m pip install -q --no-deps "$$(grep '^seqeval=' constraints.txt)"
	@if ! $(PY) -c "import triton" 2>/dev/null; then $(PY) -m pip install -q --no-deps "$$(grep '^triton=' constraints.txt)"; fi
	@touch $@

build: $(STAMP)
	@echo "==> building the native core (OBJKERN_CUDA=0 leaves out the CUDA kernels; see docs/building.md)"
	@$(PY) build_cuda.py
	@log=build/build.log; $(PY) setup.py build_ext --inplace > $$log 2>&1 || { cat $$log; exit 1; }

# A process for each processor, which then has one thread.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

test: build
	$(PYTEST)

test-slow: build
	$(PYTEST) -m slow

# What takes long: docs/guarantees.md has its last figures.
trust: test-slow
	$(PY) -m tests.trust $(TRUST)

demo: build
	$(PY) -m objkern.finetune.demo

# What surely misses its target fails the run, after all of it.
bench: build
	$(PY) -m objkern bench $(BENCH)

# The allocator decides as much as the arithmetic: the same with glibc keeping its pages.
bench-kept-pages: build
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 $(PY) -m objkern bench logits \
	  -k "forward_backward and (1024x32000 or 512x128256 or 8192x1000) and not 32000-float16" $(BENCH)

# It builds by itself, because the build is one of its steps, with a time and a log of its own.
gpu: $(STAMP)
	$(PY) -m benchmarks.gpu $(GPU)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "import clang_format; clang_format.clang_format()" --dry-run -Werror $(CPP)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -c "import clang_format; clang_format.clang_format()" -i $(CPP)

docs: build
	PYTHONPATH=. $(PY) docs/objectives.py
	$(PY) docs/guarantees.py
	$(PY) -m benchmarks.report
	$(PY) -m benchmarks.gpu.status

# Only this needs Sphinx, so only this installs it.
reference: build
	@$(PY) -m pip install -q -c build/constraints.txt sphinx
	$(PY) -m sphinx -q -W --keep-going -n -d build/reference-doctrees docs/reference build/reference
	@echo "==> build/reference/index.html"

# setuptools would put into the wheel whatever modules an earlier build left in build/lib*.
wheel: $(STAMP)
	@rm -rf build/lib.* build/bdist.*
	@$(PY) build_cuda.py
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

check-wheel: wheel
	$(PY) -m tests.check_wheel dist/objkern-*.whl

# 77: that version cannot be had here, which is no fault of the code's.
check-oldest-torch: $(STAMP)
	$(PY) -m tests.check_oldest_torch || [ $$? -eq 77 ]

check-oldest-transformers: build
	$(PY) -m tests.check_oldest_transformers || [ $$? -eq 77 ]

check-arm: build
	$(PY) -m tests.check_arm || [ $$? -eq 77 ]

check-versions: build
	$(PY) -m tests.check_versions $(VERSIONS) || [ $$? -eq 77 ]

clean:
	rm -rf build dist runs objkern/_C*.so *.egg-info
