# make demo       set up, build real image–text shards, train on two ranks, evaluate, show, search
# make test       set up, run the checks and the everyday tests
# make test-all   the same with the long tests
# make fuzz       a million random texts through the native tokenizer and the Python one
# make check      ruff, pyright, import-linter, clang-format
# make dist       wheel and sdist in dist/
# make clean      remove the environment and everything built

PYTHON ?= python3
# On a machine with another CUDA version choose torch here: make test TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0
# A CUDA build of torch brings its own; beside a CPU build Triton still compiles and interprets.
TRITON ?= triton==3.7.1
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
RANKS ?= 2
# Tests run in so many processes, those of a file in one of them; 0 runs them one after the other.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# What the demo's model is shown that it was not trained on.
HELD_OUT := style-fluent-emoji-flat style-fxemoji style-flagpack test-foods
SPACE := $(subst ,, )
export PYTHONUNBUFFERED := 1
# The native tokenizer: a failure to compile it is an error here, not a warning.
export FASTCLIP_NATIVE ?= 1

.PHONY: demo test test-all fuzz check dist clean
.DELETE_ON_ERROR:

# torch first and by version: an unpinned requirement would fetch the newest CUDA build.
$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastclip needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77,<82" wheel
	$(PIP) $(TORCH)
	@touch $@

NATIVE := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.inl csrc/tables/*.inc)

$(VENV)/.train: $(VENV)/.torch pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PIP) --constraint constraints.txt --editable ".[train,eval,search,demo]"
	@touch $@

# open_clip, timm and torchvision are peers in the parity tests. torchvision's dependencies would
# replace a CPU build of torch, so the three come without theirs.
$(VENV)/.dev: $(VENV)/.train
	$(PIP) --constraint constraints.txt --editable ".[train,eval,search,demo,dali,dev]"
	$(PIP) --constraint constraints.txt --no-deps open_clip_torch timm torchvision
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON)
	@touch $@

# A browser for the tests of pages. Without one they are skipped, and say so.
$(VENV)/.chromium: $(VENV)/.dev tests/install_chromium.py
	@if $(BIN)/python tests/install_chromium.py; then touch $@; fi

demo: $(VENV)/.train
	$(BIN)/python -m fastclip data demo $(DEMO)/data
	$(BIN)/python -m fastclip data index $(DEMO)/data/train
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_accelerators $(RANKS) --module \
		fastclip train demo --data $(DEMO)/data run.device=cpu run.directory=$(DEMO)/run
	$(BIN)/python -m fastclip show $(DEMO)/run
	$(BIN)/python -m fastclip report $(DEMO)/run
	rm -rf $(DEMO)/index
	$(BIN)/python -m fastclip embed "$(subst $(SPACE),::,$(HELD_OUT:%=$(DEMO)/data/%))" \
		--model $(DEMO)/run --out $(DEMO)/index
	$(BIN)/python -m fastclip search $(DEMO)/index "red apple" "flag: Japan" --sheet $(DEMO)/found.png
	@echo 'In the browser: $(BIN)/python -m fastclip serve $(DEMO)/index, and $(DEMO)/run/report.html'

test: check $(VENV)/.chromium
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) --durations=15

test-all: check $(VENV)/.chromium
	$(BIN)/python -m pytest $(PARALLEL) --durations=30

fuzz: $(VENV)/.dev
	$(BIN)/python tests/tokenizer_fuzz.py --texts 1000000

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.cu csrc/*.h tests/*/*.cpp

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info $(DEMO)
