# `make demo` and `make test` set up what they need; nothing but Python 3.10+ and make is expected.
# `make demo METHOD=dydit` (or sprint) demonstrates another method, `make demo METHOD=flow` flow matching.
PYTHON ?= python3
METHOD ?= sparsedit
BIN := .venv/bin

.PHONY: setup demo test lint gpu-test clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; try: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python demo.py --fresh --method $(METHOD)

# Two processes of one thread each: networks this small lose more to waking threads than they win.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-test: setup
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf .venv runs
