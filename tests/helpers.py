"""What several test modules use: the gradient methods, comparisons, optional libraries."""

import contextlib
import gc
import importlib
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import pytest

import jaxode
from jaxode.ode.adjoints import vmap

# Of `jax.jit` and `compile`, for tests of what the compiler makes of a program: see conftest.py.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True

# What a program raises for a failed solve: after a first run on a CPU, JAX makes it the latter.
AT_RUN_TIME = (jax.errors.JaxRuntimeError, ValueError)


class Frame:
    """As a DataFrame of pandas: with a shape, without a dtype, and a way to become an array."""

    def __init__(self, values):
        self._values, self.shape, self.ndim = values, values.shape, values.ndim

    def __array__(self, dtype=None, copy=None):
        return self._values.astype(dtype or self._values.dtype)


@contextlib.contextmanager
def checking_leaks():
    """`jax.checking_leaks`, which collects garbage after each trace: here only what is new."""
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


class GradientMethod(NamedTuple):
    """A gradient method, and what the tests must know of it."""

    adjoint: Any
    exact: bool
    """Whether it differentiates the computed solution. Otherwise it solves the adjoint ODE."""
    again: tuple[Callable[..., Any], ...]
    """The modes in which its gradient can be differentiated."""
    gradient: Callable[..., Any] = jax.grad
    """`jax.grad`, in a mode that it has."""
    jvp: bool = False
    """Whether it has forward mode. Otherwise `jax.jvp` raises."""
    masks: bool = True
    """Whether a failed row on which nothing depends adds nothing to any gradient. Otherwise it
    makes the gradients that all rows share NaN."""
    needs: Mapping[str, Any] = {}
    """What its solves need, such as `{"steps": 400}`."""
    variant: bool = False
    """Whether it differs from another row by numbers alone, and compiles to a like program."""

    @property
    def adaptive(self):
        """Whether it can solve with error control."""
        return "steps" not in self.needs

    @property
    def modes(self):
        """`jax.jacfwd` and `jax.jacrev`, as far as it has them."""
        return [jax.jacfwd] * self.jvp + [jax.jacrev] * (self.gradient is jax.grad)

    @property
    def pairs(self):
        """The modes of a second derivative: the inner one, and that of its result."""
        return [(first, then) for first in self.modes for then in self.again]

    def options(self, **given):
        """The keywords of a solve by it: what it needs, unless it is `given`."""
        return {"adjoint": self.adjoint, **self.needs, **given}


# A new one is one row.
METHODS = {
    "discrete": GradientMethod(
        jaxode.DiscreteAdjoint(), exact=True, again=(jax.jacfwd, jax.jacrev), jvp=True
    ),
    "discrete from few checkpoints": GradientMethod(
        jaxode.DiscreteAdjoint(checkpoints=3), exact=True, again=(jax.jacfwd, jax.jacrev),
        jvp=True, variant=True,
    ),
    "backsolve": GradientMethod(
        jaxode.BacksolveAdjoint(), exact=False, again=(jax.jacfwd, jax.jacrev)
    ),
    "forward": GradientMethod(
        jaxode.ForwardMode(), exact=True, again=(jax.jacfwd,), gradient=jax.jacfwd, jvp=True
    ),
}  # fmt: skip
# Without variants.
KINDS = [name for name, method in METHODS.items() if not method.variant]
REVERSE = [name for name in KINDS if METHODS[name].gradient is jax.grad]
ADAPTIVE = [name for name in KINDS if METHODS[name].adaptive]
# A method, and a mode in which its gradient can be differentiated.
AGAIN = [(name, mode) for name in KINDS for mode in METHODS[name].again]


def of_feature(cases, slow=("forward",)):
    """Names of methods, or tuples that begin with one, for the tests of a feature with each.

    Forward mode is JAX's own, of the loop that all run. So `make test` leaves it out here, or those
    of `slow`.
    """
    cases, name = list(cases), lambda case: case if isinstance(case, str) else case[0]
    return with_slow(cases, [case for case in cases if name(case).startswith(tuple(slow))])


def with_slow(cases, slow):
    """Arguments of a test, those of `slow` for the full suite alone."""
    mark = lambda case: [pytest.mark.slow] * (case in slow)
    values = lambda case: case if isinstance(case, tuple) else (case,)
    return [pytest.param(*values(case), marks=mark(case)) for case in cases]


@contextlib.contextmanager
def only_rows_of_one_solve(monkeypatch):
    """Fails where `jax.vmap` does not make rows of one solve of several ones."""

    def refused(*_):
        raise AssertionError("not rows of one solve")

    with monkeypatch.context() as patch:
        for name in ("plain", "one_by_one"):
            patch.setattr(vmap, name, refused)
        yield


def gradient(name):
    """`jax.grad`, in a mode that the method has."""
    return METHODS[name].gradient


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


def memory_maps():
    """How many this process has; None where the system does not tell."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else None


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


def numpyro_normal(mean, scale):
    return importlib.import_module("numpyro.distributions").Normal(mean, scale).to_event(1)


def distrax_normal(mean, scale):
    return importlib.import_module("distrax").MultivariateNormalDiag(mean, scale)


def flowjax_normal(mean, scale):
    return importlib.import_module("flowjax.distributions").Normal(mean, scale)


# Independent normals of each library. A new one is one row.
LIBRARIES = {"numpyro": numpyro_normal, "distrax": distrax_normal, "flowjax": flowjax_normal}
