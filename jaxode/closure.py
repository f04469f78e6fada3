"""A vector field as a program and the values that it closes over."""

import math
import re
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.core
from jaxtyping import Array, Float, PyTree


class _Program:
    """A traced function, equal to another one if both were traced from the same code to the same.

    So `jit` recognizes a field that is traced again, and a field that reads a changed global value
    is not taken for what it was before.
    """

    def __init__(self, jaxpr: Any, source: Hashable):
        self.jaxpr = jaxpr
        # Addresses of Python objects differ from one trace to the next.
        self.key = (source, re.sub(r"0x[0-9a-f]+", "", str(jaxpr)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class ClosedField(eqx.Module):
    """A vector field on rows without closed-over values: they are leaves, and get gradients.

    Called with the arrays of the `args` that it was traced with; what is static is in the program.
    """

    program: _Program = eqx.field(static=True)
    consts: list[Array]

    @property
    def work_size(self) -> int:
        """How many numbers one evaluation computes on its way."""
        outputs = (v.aval for equation in self.program.jaxpr.eqns for v in equation.outvars)
        return sum(math.prod(getattr(aval, "shape", ())) for aval in outputs)

    def __call__(
        self, t: Float[Array, " rows"], y: Float[Array, "rows n"], args: PyTree
    ) -> Float[Array, "rows n"]:
        leaves = jax.tree.leaves(args)
        (dy,) = jax.core.eval_jaxpr(self.program.jaxpr, self.consts, t, y, *leaves)
        return dy


def close_field(
    field: Callable[..., Float[Array, "rows n"]],
    source: Any,
    t: Float[Array, " rows"],
    y: Float[Array, "rows n"],
    args: PyTree,
) -> tuple[ClosedField, PyTree]:
    """Trace `field(t, y, args)` once; returns it closed, and the arrays of `args`.

    `source` is what the field was made from: fields of different sources are different programs.
    """
    arrays, static = eqx.partition(args, eqx.is_array)
    closed = jax.make_jaxpr(lambda t, y, arrays: field(t, y, eqx.combine(arrays, static)))(
        t, y, arrays
    )
    leaves, structure = jax.tree.flatten(eqx.filter(source, eqx.is_array, inverse=True))
    origin = (structure, *leaves)
    try:
        hash(origin)
    except TypeError:
        origin = id(source)
    return ClosedField(_Program(closed.jaxpr, origin), list(closed.consts)), arrays
