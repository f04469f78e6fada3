# `make demo` and `make test` set everything up in .venv the first time, and nothing after that.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo density test format lint typecheck clean

demo: .venv/ready  ## Train a density on real handwritten digits; the picture is out/digits.png
	$(BIN)/python examples/digits.py

density: .venv/ready  ## Train a density on two moons; the picture is out/density_2d.png
	$(BIN)/python examples/density_2d.py --data moons

test: .venv/ready
	$(BIN)/python -m pytest -n 2

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: .venv/ready
	$(BIN)/pyright

.venv/ready: pyproject.toml constraints.txt .ci/setup
	PYTHON="$(PYTHON)" sh .ci/setup

clean:
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache .hypothesis out dist
