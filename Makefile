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
CSRC = git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r
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
  test_clip_grads_with_norm test_get_total_norm test_nonfinite test_bad_input test_bookkeeping

.PHONY: test test-sanitize bench lint format clean

test: $(READY)
	$(RUN) -m pytest

test-sanitize: $(READY)
	rm -rf build/sanitize
	GRADCLIP_EXT_BUILD=cpu CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(RUN) -m pip install --quiet --no-build-isolation --no-deps --target build/sanitize .
	$(SANITIZED) $(RUN) -c "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())" \
	  $(SANITIZED_TESTS:%=tests/%.py) -p no:cacheprovider

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
