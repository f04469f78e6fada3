"""Compile what is called by itself, and nothing twice."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.interpreters.partial_eval import DynamicJaxprTracer


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`eqx.filter_jit(function)`; inside of a program that is traced already, the function itself.

    There a `jax.jit` of its own would be traced as it is, and then once more to be differentiated,
    and JAX would look for it among those it knows, by the programs of the fields.
    """
    jitted = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(*args):
        return (function if _is_traced() else jitted)(*args)

    return call


def _is_traced() -> bool:
    """Whether operations are recorded now, as by `jax.jit`, and not computed."""
    zero = np.float32(0)
    return isinstance(jax.lax.add(zero, zero), DynamicJaxprTracer)
