"""What several test modules use: the gradient methods, comparisons, optional libraries."""

import importlib
import os
import warnings

import equinox as eqx
import jax
import numpy as np
import pytest

import jaxode

# Of `jax.jit` and `compile`, for tests of what the compiler makes of a program: see conftest.py.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True

# Reverse-mode methods. A new one is one row.
ADJOINTS = {
    "discrete": jaxode.DiscreteAdjoint(),
    "backsolve": jaxode.BacksolveAdjoint(),
    "interpolating": jaxode.InterpolatingAdjoint(),
    "interpolating from few checkpoints": jaxode.InterpolatingAdjoint(checkpoints=3),
}
EVERY = {**ADJOINTS, "forward": jaxode.ForwardMode()}
# One of each kind, where the number of checkpoints makes no other program.
KINDS = [name for name in EVERY if name != "interpolating from few checkpoints"]
# The mode in which the gradient of a method can be differentiated again.
AGAIN = {"discrete": jax.jacfwd, "backsolve": jax.jacrev, "interpolating": jax.jacfwd}


def gradient(name):
    """`jax.grad`, in the mode that the method has."""
    return jax.jacfwd if name == "forward" else jax.grad


def assert_close(actual, expected, rtol):
    """Relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max(initial=0), rtol=0)


def temporary_bytes(loss, *inputs, options=None):
    """Memory of a gradient beside its inputs and outputs.

    Without optimizations it is the same to 1%, and known four times as soon.
    """
    memory = jax.jit(jax.grad(loss)).lower(*inputs).compile(options).memory_analysis()
    return memory.temp_size_in_bytes


def trained(context_size=0):
    """A network in the plane, far from the identity."""
    m = jaxode.nn.ConcatSquash(2, (8,), key=jax.random.key(0), context_size=context_size)
    m = eqx.tree_at(lambda m: m.weight, m, 8 * m.weight)
    return jax.tree.map(lambda x: x.astype(float), m)


# `make test` installs no library that only interoperation needs; continuous integration does, and
# must not pass because one of them is missing.
REQUIRED = bool(os.environ.get("JAXODE_TEST_INTEROP"))


def optional(library):
    """Import a library, or skip the test if it is missing and may be."""
    if REQUIRED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as pytest.importorskip does
            return importlib.import_module(library)
    reason = f"{library} is not installed: make test-all installs it"
    return pytest.importorskip(library, reason=reason)
