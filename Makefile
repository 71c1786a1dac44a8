# make demo: set up, then train and audit a VAE on digits.   make test: set up, then the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test slow lint examples bench fuzz kills mutants clean

demo: $(STAMP)
	$(BIN)/python examples/vae.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

examples: $(STAMP)
	set -e; for e in examples/*.py; do echo "== $$e"; $(BIN)/python $$e; done

bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e .[bench]
	for b in $(filter-out %/kills.py %/mutants.py,$(wildcard benchmarks/[a-z]*.py)); do echo "== $$b"; $(BIN)/python -m benchmarks.$$(basename $$b .py) || true; done

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .[test,lint]
	touch $(STAMP)

fuzz: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/fuzz

kills: $(STAMP)
	$(BIN)/python -m benchmarks.kills

mutants: $(STAMP)
	$(BIN)/python -m benchmarks.mutants

clean:
	rm -rf $(VENV) build *.egg-info runs
