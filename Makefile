# `make test`, `make bench` and `make lint` set up .venv by themselves. Variables:
#   PYTHON=python3.12    the interpreter that .venv is made from
#   TORCH=torch==2.6.0   another torch; VENV=.venv-oldest keeps it apart
#   CURRENT_ENV=1        use the active environment as it is: only this package is installed into it
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# For a torch that brings no Triton the dev extra takes the newest, under which torch.compile of 2.6
# does not even import.
TRITON = $(if $(filter torch==2.6.%,$(TORCH)),"triton==3.2.0; sys_platform == 'linux'")
# Without a GPU, the tests and benchmarks here have no use for CUDA kernels, which take a minute to compile.
BUILD ?= $(if $(shell command -v nvidia-smi),auto,cpu)
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/*/* csrc/*/*/*)
CSRC = git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r
CLANG_FORMAT = $(RUN) -c 'import clang_format; clang_format.clang_format()'

ifdef CURRENT_ENV
RUN := $(PYTHON)
READY := build/.ready-$(shell $(PYTHON) -c "import sys, zlib; print(zlib.crc32(sys.prefix.encode()))")
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# A preloaded libasan is needed because Python itself is not built with it, and libstdc++ beside it
# so that exceptions are intercepted; what Python never frees would be reported as leaks.
SANITIZE := -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED = env LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(CURDIR)/build/sanitize
# Started through Python's -c, because `python -m pytest` would import the sources' own build first.
SANITIZED_TESTS := kernels/test_index_arithmetic kernels/test_cpu_kernels backends/test_reader \
  backends/test_cpu_threads $(addprefix api/test_,clip_grad_norm clip_grad_value clamp_grad \
  clip_grads_with_norm get_total_norm max_norm per_tensor get_grad_stats adaptive_clip_grad nonfinite bad_lists bad_gradients bookkeeping shared_memory \
  unusual_gradients)

# A torch that is built for CUDA, for a toolkit that nvcc belongs to. Needs no GPU.
CUDA_TORCH ?= torch==2.11.0
CUDA_RUN := $(CURDIR)/.venv-cuda/bin/python
CUDA_COPY := build/cuda/copy
# Tests of the sources, which are not what is tested there.
NOT_OF_A_WHEEL := --ignore=tests/benchmarks --ignore=tests/package

# Two processes, a file of tests to one of them: most tests keep one core busy, and the tests of a file share
# fixtures. In the order of collection, or a file that has one long test would be the last to begin. Not in the
# active environment, which may lack pytest-xdist.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# The releases of torch under which the one wheel is tested; "newest" is asked of the registry.
TORCHES ?= 2.6.0 2.8.0 2.10.0 newest

.PHONY: test test-sanitize gpu test-gpu sanitize-gpu measure-gpu test-installs test-integrations docs check-cuda check-wheel wheel bench lint format clean

test: $(READY)
	$(RUN) -m pytest $(if $(CURRENT_ENV),,$(PARALLEL))

test-sanitize: $(READY)
	rm -rf build/sanitize
	GRADCLIP_EXT_BUILD=cpu GRADCLIP_EXT_TESTING=1 CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(RUN) -m pip install --quiet --no-build-isolation --no-deps --target build/sanitize .
	$(SANITIZED) $(RUN) -c "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())" \
	  $(SANITIZED_TESTS:%=tests/%.py) -p no:cacheprovider

# Every documented way to install, each in an environment of its own.
test-installs: $(READY)
	$(RUN) -m pytest $(if $(CURRENT_ENV),,-n 2) -m installs tests/package

# One wheel, built as a user's pip builds it, under each release of torch in an environment of its own.
check-wheel: $(READY)
	PYTEST_ADDOPTS="$(PARALLEL)" $(RUN) tests/package/check_wheel.py $(TORCHES)

# Wheels for upload: every Python that is found here, x86_64 and aarch64. setup.py says what
# GRADCLIP_EXT_REPOSITORY adds to them.
wheel: $(READY)
	$(RUN) tests/package/make_wheels.py

# The wheel with CUDA kernels, built and tested as a user has it: in a copy of the tracked files that loses its
# package, so that no build beside the sources can be taken for the one that is installed. The emulated GPU
# stands in for the CUDA runtime, which for that has to be a dynamic library.
check-cuda: .venv-cuda/.ready
	rm -rf build/cuda && mkdir -p $(CUDA_COPY)
	git ls-files -z | xargs -0 cp --parents -t $(CUDA_COPY)
	GRADCLIP_EXT_BUILD=cuda GRADCLIP_EXT_TESTING=1 $(CUDA_RUN) -m pip wheel --quiet --no-build-isolation \
	  --no-deps --wheel-dir build/cuda/static $(CUDA_COPY)
	GRADCLIP_EXT_BUILD=cuda GRADCLIP_EXT_CUDART=shared TORCH_CUDA_ARCH_LIST=9.0 $(CUDA_RUN) -m pip wheel \
	  --quiet --no-build-isolation --no-deps --wheel-dir build/cuda/shared $(CUDA_COPY)
	rm -r $(CUDA_COPY)/gradclip_ext $(CUDA_COPY)/build
	$(CUDA_RUN) -m pip install --quiet --force-reinstall --no-deps build/cuda/static/*.whl
	cd $(CUDA_COPY) && $(CUDA_RUN) -m gradclip_ext.info
	cd $(CUDA_COPY) && GRADCLIP_EXT_CHECK_CUDA=1 $(CUDA_RUN) -m pytest $(PARALLEL) -m "not gpu and not installs" \
	  tests/kernels/test_cuda_build.py tests/kernels/test_cuda_compiled.py tests/backends/test_selection.py tests/backends/test_unfit_gpus.py
	$(CUDA_RUN) -m pip install --quiet --force-reinstall --no-deps build/cuda/shared/*.whl
	cd $(CUDA_COPY) && $(CUDA_RUN) tests/cuda_emulator/run.py $(PARALLEL) -m "gpu and not triton" $(NOT_OF_A_WHEEL)
	cd $(CUDA_COPY) && PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(CUDA_RUN) tests/cuda_emulator/run.py -m gpu \
	  tests/kernels/test_sanitized.py
	cd $(CUDA_COPY) && TRITON_INTERPRET=1 $(CUDA_RUN) tests/cuda_emulator/run.py $(PARALLEL) \
	  -p triton_interpreted -p triton_emulated -m "gpu and triton" $(NOT_OF_A_WHEEL)

.venv-cuda/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-cuda
	$(CUDA_RUN) -m pip install --quiet "$(CUDA_TORCH)" "numpy<2.4" "setuptools>=77" wheel ninja "pybind11>=3.0" pytest "pytest-xdist>=3.7" hypothesis
	touch $@

# The visit of a machine with an NVIDIA GPU: three parts, of which none may take the time of the next ones.
GPU_OUT := benchmarks/out/gpu
gpu: $(READY)
	mkdir -p $(GPU_OUT)
	status=0; for part in test-gpu sanitize-gpu measure-gpu; do \
	  if timeout --kill-after 5 590 $(MAKE) $$part > $(GPU_OUT)/$$part.txt 2>&1; then echo "$$part is done"; else \
	    echo "$$part failed or took over ten minutes: $(GPU_OUT)/$$part.txt tells how far it came"; status=1; fi; \
	done; exit $$status

# Without a GPU, the tests skip and say so. Each is named as soon as it has ended. Many wait for Triton's compiler,
# so there are more processes than a GPU needs: GPU_WORKERS= for one, as in the active environment, which may lack
# pytest-xdist.
GPU_WORKERS ?= $(if $(CURRENT_ENV),,8)
test-gpu: $(READY)
	$(RUN) -m gradclip_ext.info
	$(RUN) -m pytest -v $(if $(GPU_WORKERS),-n $(GPU_WORKERS)) -m "gpu or triton or toolkit" -rs $(NOT_OF_A_WHEEL)

SANITIZER := compute-sanitizer --error-exitcode 1 --launch-timeout 120 --target-processes all
sanitize-gpu: $(READY)
	set -e; for tool in memcheck racecheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $(RUN) -m pytest -m gpu tests/kernels/test_sanitized.py; done

# What torch.nn.utils has comes first, in the two usual dtypes. Without foreach, which would take most of the time.
GPU_BENCHMARK = $(RUN) -m benchmarks --full --cases all --impls cuda triton --resume --json $(GPU_OUT)/benchmark.jsonl
measure-gpu: $(READY)
	mkdir -p $(GPU_OUT)
	$(GPU_BENCHMARK) --dtypes float32 bfloat16 --ops clip_grad_norm_ clip_grad_value_ get_total_norm
	$(RUN) -m benchmarks.train --json $(GPU_OUT)/train.jsonl
	$(RUN) -m benchmarks.gpu_design --json $(GPU_OUT)/design.json
	$(GPU_BENCHMARK)

# With the real libraries, pinned, in an environment of its own.
test-integrations: .venv-integrations/.ready
	.venv-integrations/bin/python -m pytest -rs tests/integrations tests/package/test_docs.py

.venv-integrations/.ready: $(SOURCES) tests/integrations/requirements.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet "$(TORCH)" "setuptools>=77" "pybind11>=3.0" wheel ninja
	GRADCLIP_EXT_BUILD=cpu GRADCLIP_EXT_TESTING=1 .venv-integrations/bin/python -m pip install --quiet \
	  --no-build-isolation --editable .
	.venv-integrations/bin/python -m pip install --quiet --no-build-isolation -r tests/integrations/requirements.txt
	touch $@

# The documentation, into build/site; a link that leads nowhere is an error (with --quiet, it would not be).
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --site-dir build/site

.venv-docs/.ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r docs/requirements.txt
	touch $@

bench: $(READY)
	$(RUN) -m benchmarks --quick
	$(RUN) -m benchmarks.train

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(CSRC) $(CLANG_FORMAT) --dry-run -Werror

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CSRC) $(CLANG_FORMAT) -i

clean:
	rm -rf .venv* build dist *.egg-info gradclip_ext/_*.so gradclip_ext/_build_info.py benchmarks/out

$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)" $(TRITON) "setuptools>=77" "pybind11>=3.0" wheel ninja
	GRADCLIP_EXT_BUILD=$(BUILD) GRADCLIP_EXT_TESTING=1 $(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

build/.ready-%: $(SOURCES)
	GRADCLIP_EXT_BUILD=$(BUILD) GRADCLIP_EXT_TESTING=1 $(RUN) -m pip install --no-build-isolation --no-deps --editable .
	mkdir -p build && touch $@
