# Two commands: `make book` builds the site from nothing, `make test` runs the tests. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= quick
SEEDS   ?= 0 1 2 3 4
PORT    ?= 8000
JOBS    ?=
BIN     := $(VENV)/bin
# A wheel folder named by pip's own variable comes first; without one, uv picks the build of torch for this machine (CPU or GPU).
TORCH_FROM := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend=auto)

export TQDM_DISABLE ?= 1

.PHONY: help env data notebooks book test lint lab chapter student pdf archive serve seeds full bench browser compiler clean distclean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

# --- environment -----------------------------------------------------------------------------------------------------

env: $(VENV)/.installed ## create the environment (.venv) with everything installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The atlas needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (once; one to three minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.7" 2> >(grep -v "is ignored" >&2) \
	  && $(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH_FROM) --constraint constraints.txt --editable '.[book,rl,test,cluster,lint]' \
	  || { echo "uv did not succeed, trying pip"; $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[book,rl,test,cluster,lint]'; }
	@touch $@

# --- the book --------------------------------------------------------------------------------------------------------

data: env ## fetch the data sets of the chapters
	@$(BIN)/python -m dlatlas data all

notebooks: env ## execute the chapters that changed
	@$(BIN)/python -m dlatlas.book.execute --profile $(PROFILE) $(if $(JOBS),--jobs $(JOBS))

book: env ## execute what changed, build the site, print the page to open
	@$(BIN)/python -m dlatlas.book.build --profile $(PROFILE) $(if $(JOBS),--jobs $(JOBS))

chapter: env ## execute one chapter: make chapter C=theory/optimizers
	@test -n "$(C)" || { echo "Which one? make chapter C=theory/optimizers"; exit 2; }
	@$(BIN)/python -m dlatlas.book.execute --profile $(PROFILE) $(C)

lab: env ## open the chapters as notebooks in JupyterLab
	@TQDM_DISABLE=0 $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/chapters

student: book ## notebooks for a course, without outputs and solutions, in _build/student
	@$(BIN)/python -m dlatlas.book.site --notebooks _build/student --student

pdf: book ## the book as one PDF, _build/quick/atlas.pdf (needs a browser: make browser)
	@$(BIN)/python -m dlatlas.book.pdf --profile $(PROFILE)

archive: book ## the site as one file that works from a folder without network, _build/quick/atlas-site.zip
	@cd _build/$(PROFILE)/_build && $(abspath $(BIN))/python -m zipfile -c ../atlas-site.zip html && echo "wrote _build/$(PROFILE)/atlas-site.zip: unpack it, open html/index.html"

serve: book ## build, then serve the site at http://localhost:8000 (PORT=...)
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/$(PROFILE)/_build/html $(PORT)

seeds: env ## run the chapters on several seeds, record book/results/seeds.json (SEEDS="0 1 2", C=part/chapter)
	@$(BIN)/python -m dlatlas.book.record seeds $(C) --seeds $(SEEDS) $(if $(JOBS),--jobs $(JOBS))

full: env ## run the full profile (GPU if there is one), record book/results/full (C=part/chapter)
	@$(BIN)/python -m dlatlas.book.record full $(if $(JOBS),--jobs $(JOBS)) $(C)

bench: env ## print the speed tables of this machine
	@$(BIN)/python -m dlatlas.book.bench

# --- tests -----------------------------------------------------------------------------------------------------------

test: env ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup $(T)

lint: env ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

browser: ## install a headless browser for the browser tests (Debian, Ubuntu; others: install Chromium)
	@command -v chromium chromium-browser google-chrome >/dev/null && echo "a browser is installed" \
	  || { command -v apt-get >/dev/null || { echo "Please install Chromium with your system's package manager."; exit 1; }; \
	       $$([ "$$(id -u)" = 0 ] || echo sudo) sh -c 'apt-get update -qq && apt-get install -y -qq chromium' ; }

compiler: ## install a C compiler for the packed kernels (without one NumPy computes the same, slowly)
	@command -v cc gcc clang >/dev/null && echo "a C compiler is installed" \
	  || { command -v apt-get >/dev/null || { echo "Please install gcc or clang with your system's package manager."; exit 1; }; \
	       $$([ "$$(id -u)" = 0 ] || echo sudo) sh -c 'apt-get update -qq && apt-get install -y -qq gcc libc6-dev' ; }

clean: ## remove everything that was built
	rm -rf _build
	find lib tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV) lib/dlatlas.egg-info
