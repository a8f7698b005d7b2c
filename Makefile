# Two commands do everything on a machine with Python >= 3.11 and pip:
#   make demo   set up, fetch a real dataset, train A-CLIP on it, end with a report to look at
#   make test   run the tests
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint types docs check clean help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN ?= runs/demo
SEED ?= 0
EPOCHS ?= 36

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile; echo '  make check  lint, types and tests'
	@echo '  make docs   build the documentation, site/index.html'; echo '  make clean  remove what was set up here'

# The environment is rebuilt when the project's requirements change; a failed attempt leaves no stamp.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Use: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV) (a few minutes: PyTorch is large)"
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) 2>/dev/null \
	  || { rm -rf $(VENV); $(PYTHON) -m pip install --quiet --target $(VENV)-bootstrap virtualenv \
	       && PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv --quiet $(VENV) && rm -rf $(VENV)-bootstrap; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/aclip data fetch emoji
	$(BIN)/aclip train --resume --output $(RUN) --seed $(SEED) --recipe a-clip-muon --model vit-tiny \
	  --data emoji:train --validation emoji:val_vendor emoji:val_concept emoji:val_both --batch-size 128 \
	  --epochs $(EPOCHS) --resolution-schedule 0.6:0.5 --unmasked-tuning 0.15 --evaluate-every 18
	@echo "look:   $(BIN)/aclip explain $(RUN) IMAGE.png --text sunflower --output explained.png"
	@echo "search: $(BIN)/aclip index $(RUN) emoji:val_vendor --output $(RUN)/index && $(BIN)/aclip search $(RUN)/index sunflower --sheet found.png"

test: $(INSTALLED)
	$(BIN)/pytest -n 2

# benchmarks are checked like the package: see [tool.ruff] and [tool.mypy] in pyproject.toml
lint: $(INSTALLED)
	$(BIN)/ruff check --no-cache .

types: $(INSTALLED)
	$(BIN)/mypy

# strictly, which tests/docs/test_pages.py does too; the variable silences an advertisement
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: lint types test

clean:
	rm -rf $(VENV) $(VENV)-bootstrap .mypy_cache .pytest_cache .ruff_cache
