# `make test`, `make bench` and `make lint` set up .venv by themselves. Variables:
#   PYTHON=python3.12    the interpreter that .venv is made from
#   TORCH=torch==2.6.0   another torch; VENV=.venv-oldest keeps it apart
#   CURRENT_ENV=1        use the active environment as it is: only this package is installed into it
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
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

.PHONY: test bench lint format clean

test: $(READY)
	$(RUN) -m pytest

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
	$(RUN) -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

build/.ready-%: $(SOURCES)
	$(RUN) -m pip install --no-build-isolation --no-deps --editable .
	mkdir -p build && touch $@
