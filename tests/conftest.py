"""Strict settings for every test: double precision, no silent dtype or rank promotion."""

import gc
import importlib.metadata
import os
import pathlib

# Tests compile far more than they compute, and XLA compiles three times as fast without
# optimizations. JAXODE_TEST_OPTIMIZED=1 runs the programs that users run, as CI does at night.
if not os.environ.get("JAXODE_TEST_OPTIMIZED"):
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Other tests keep the other cores busy.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    # XLA ends the process for a flag that it does not know, as newer versions do for this one.
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)

import changed
import costs
import jax
import numpy as np
import pytest

# Other random numbers for every test and example. None may hang on those of one seed.
SHIFT = 1000 * int(os.environ.get("JAXODE_TEST_SEED", "0"))
if SHIFT:
    key, default_rng = jax.random.key, np.random.default_rng
    jax.random.key = lambda seed, **options: key(seed + SHIFT, **options)
    np.random.default_rng = lambda seed=None: default_rng(
        seed + SHIFT if isinstance(seed, int) else seed
    )

jax.config.update("jax_platforms", "cpu")
# Devices to split a batch over; whatever does not ask for them runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compilation dominates the run time of the suite; a second run finds its programs here.
_cache = pathlib.Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAXODE_TEST_CACHE", str(_cache)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_traceback_in_locations_limit", 0)


def pytest_addoption(parser):
    costs.add_options(parser)
    parser.addoption(
        "--changed", metavar="COMMIT", nargs="?", const="",
        help="run what the difference to a commit affects, by default to the last landed one",
    )  # fmt: skip


def pytest_configure(config):
    config.pluginmanager.register(costs.Costs(config), "costs")
    if config.getoption("changed") is not None:
        config.pluginmanager.register(changed.Changed(config.getoption("changed")), "changed")


def pytest_collection_finish():
    """Tracing makes many objects and hardly any garbage in cycles."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


# Of the 65,530 memory maps that Linux gives a process. Programs with so many of them take 2.5 GB.
MANY = 5_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps. Small ones serve many modules."""
    from helpers import memory_maps  # not before the settings of JAX

    yield
    maps = memory_maps()
    if maps is None or maps > MANY:
        jax.clear_caches()


@pytest.fixture
def compiled():
    """What JAX says of each program that it compiles, in order."""
    names = []
    costs.METER.watchers.append(names)
    yield names
    costs.METER.watchers.remove(names)


@pytest.fixture
def default_settings():
    """JAX as a user finds it, for the examples and the README."""
    settings = {
        "jax_enable_x64": False,
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }
    strict = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in strict.items():
        jax.config.update(name, value)
