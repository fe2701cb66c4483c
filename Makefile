# Two commands for a fresh checkout:    make demo        make test
# Both make .venv when it is missing.  Another Python, in an environment of its own:
#     make test PYTHON=python3.13 VENV=.venv-3.13
# Every path below is relative, so that a checkout under a name with spaces works.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

.PHONY: help demo test lint check bench clean

help:
	@echo 'make demo    run the examples on real input, show what they did (two minutes)'
	@echo 'make test    run the tests; one file: make test PYTEST_ARGS=tests/test_ids.py'
	@echo 'make lint    ruff and mypy'
	@echo 'make check   lint, then test'
	@echo 'make bench   the microbenchmark'
	@echo 'make clean   remove what these made, the environments included'

demo: $(INSTALLED)
	$(RUN) examples/demo.py

test: $(INSTALLED)
	$(RUN) -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

check: lint test

bench: $(INSTALLED)
	$(RUN) -m minray.command microbenchmark

# The stamp is younger than the requirements once they are installed, and is written only then: an installation
# that was interrupted is taken up again.  The package itself is installed in place, so its own changes need nothing;
# `compat` does that by a line in a .pth file, where setuptools' default adds 10 ms to each start of this Python.
$(INSTALLED): requirements.txt setup.py pyproject.toml
	@$(RUN) -c 'import pip' 2>/dev/null || $(PYTHON) -m venv $(VENV) || { \
	  echo '$(PYTHON) -m venv failed. On Debian and Ubuntu it needs the package python3-venv.' >&2; exit 1; }
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'minray needs Python 3.10 or newer. Name one: rm -r $(VENV); make PYTHON=python3.12' >&2; exit 1; }
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --config-settings editable_mode=compat --editable .
	@touch $(INSTALLED)

clean:
	rm -rf .venv .venv-3.* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f demo-timeline.png demo-timeline.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
