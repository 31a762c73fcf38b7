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
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
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
SANITIZED_TESTS := test_core test_cpu_kernels test_clip_grad_norm test_clip_grad_value test_clamp_grad \
  test_clip_grads_with_norm test_get_total_norm test_nonfinite test_bad_input test_bookkeeping \
  test_triton_fused

# A torch that is built for CUDA, for a toolkit that nvcc belongs to. Needs no GPU.
CUDA_TORCH ?= torch==2.11.0
CUDA_RUN := $(CURDIR)/.venv-cuda/bin/python
CUDA_CHECKOUT := build/cuda/checkout
# benchmarks/ and the build tests use the sources, which are not what is tested there.
NOT_OF_A_WHEEL := --ignore=tests/benchmarks $(addprefix --ignore=tests/test_,build.py examples.py)
# Too large for an emulator, or about what nvcc and Triton compile, which it does not run.
NOT_EMULATED := $(NOT_OF_A_WHEEL) $(addprefix --ignore=tests/test_,accuracy.py cuda_build.py \
  cuda_compiled.py cuda_emulated.py triton_compiled.py triton_interpreted.py)

.PHONY: test test-sanitize test-gpu sanitize-gpu check-cuda bench lint format clean

test: $(READY)
	$(RUN) -m pytest

test-sanitize: $(READY)
	rm -rf build/sanitize
	GRADCLIP_EXT_BUILD=cpu CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(RUN) -m pip install --quiet --no-build-isolation --no-deps --target build/sanitize .
	$(SANITIZED) $(RUN) -c "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())" \
	  $(SANITIZED_TESTS:%=tests/%.py) -p no:cacheprovider

# The wheel with CUDA kernels, built from a copy of the tracked files and tested as a user has it: the
# copy loses its sources, so that no build beside them can be taken for the one that is installed.
check-cuda: .venv-cuda/.ready
	rm -rf build/cuda && mkdir -p $(CUDA_CHECKOUT)
	git ls-files -z | xargs -0 cp --parents -t $(CUDA_CHECKOUT)
	GRADCLIP_EXT_BUILD=cuda $(CUDA_RUN) -m pip wheel --quiet --no-build-isolation --no-deps \
	  --wheel-dir build/cuda/wheel $(CUDA_CHECKOUT)
	$(CUDA_RUN) -m pip install --quiet --force-reinstall --no-deps build/cuda/wheel/*.whl
	rm -r $(CUDA_CHECKOUT)/gradclip_ext $(CUDA_CHECKOUT)/build
	cd $(CUDA_CHECKOUT) && $(CUDA_RUN) -c "import gradclip_ext._C as c, gradclip_ext._build_info as b; \
	  assert '.venv-cuda' in c.__file__ and b.CUDA, c.__file__; print('testing', c.__file__)"
	$(CUDA_RUN) -m gradclip_ext.info
	cd $(CUDA_CHECKOUT) && GRADCLIP_EXT_CHECK_CUDA=1 $(CUDA_RUN) -m pytest $(NOT_OF_A_WHEEL)
	cd $(CUDA_CHECKOUT) && $(CUDA_RUN) tests/cuda_emulator/run.py $(NOT_EMULATED) \
	  -k "(cuda or gpu) and not triton and not agrees_with_the_other"
	cd $(CUDA_CHECKOUT) && PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(CUDA_RUN) tests/cuda_emulator/run.py tests/test_sanitized.py
	cd $(CUDA_CHECKOUT) && TRITON_INTERPRET=1 PYTHONPATH=tests $(CUDA_RUN) tests/cuda_emulator/run.py \
	  -p triton_interpreted -p triton_emulated -k "triton and (cuda or gpu)" $(NOT_EMULATED)

.venv-cuda/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-cuda
	$(CUDA_RUN) -m pip install --quiet "$(CUDA_TORCH)" "numpy<2.4" "setuptools>=77" wheel ninja pybind11 pytest hypothesis
	touch $@

# On a machine with an NVIDIA GPU, in under ten minutes; without one, the tests skip and say so.
test-gpu: $(READY)
	$(RUN) -m gradclip_ext.info
	$(RUN) -m pytest -k "cuda or gpu or triton" -rs $(NOT_OF_A_WHEEL) \
	  $(addprefix --ignore=tests/test_,cuda_emulated.py cuda_compiled.py triton_interpreted.py)

SANITIZER := compute-sanitizer --error-exitcode 1 --launch-timeout 120 --target-processes all
sanitize-gpu: $(READY)
	set -e; for tool in memcheck racecheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $(RUN) -m pytest tests/test_sanitized.py; done

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
	rm -rf .venv* build dist *.egg-info gradclip_ext/_C*.so gradclip_ext/_build_info.py benchmarks/out

$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)" $(TRITON) "setuptools>=77" wheel ninja
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

build/.ready-%: $(SOURCES)
	$(RUN) -m pip install --no-build-isolation --no-deps --editable .
	mkdir -p build && touch $@
