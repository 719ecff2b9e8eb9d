# Everything runs in a virtual environment of its own. The first call of any target installs it.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: test demo lint clean

test: $(VENV)/ready
	$(RUN) -m pytest

demo: $(VENV)/ready
	$(RUN) examples/train_tiny.py

lint: $(VENV)/ready
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	$(RUN) -m pip install --quiet --editable .
	touch $@

clean:
	rm -rf $(VENV) demo
