"""A vector field as a program and the values that it closes over."""

import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Float, PyTree

from jaxode._jax.sharding import axes_of


class _Same:
    """Equal to nothing but itself: an object whose content is not compared."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Program:
    """A traced function, equal to another one if both were traced from the same code to the same.

    So `jit` recognizes a field that is traced again, and a field that reads a changed global value
    is not taken for what it was before.
    """

    def __init__(self, closed: ClosedJaxpr, source: Hashable, arguments: list[Array]):
        self.jaxpr = closed.jaxpr
        # Its constants are leaves of a `ClosedField`.
        self.key = (source, _fingerprint(closed.jaxpr, []))
        if _has_custom_rules(closed.jaxpr):
            gradient = _gradient_program(closed, arguments)
            self.key = (*self.key, _fingerprint(gradient.jaxpr, gradient.consts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _fingerprint(jaxpr: Jaxpr, consts: Sequence[Any]) -> Hashable:
    """What tells a program from others: its text, and what the text does not show."""
    hidden = list(map(_constant, consts))
    for equation, values in _equations(jaxpr):
        for value in values:
            if isinstance(value, ClosedJaxpr):
                hidden += map(_constant, value.consts)
            elif "callback" in equation.primitive.name and callable(value):
                hidden.append(_Same(getattr(value, "callback_func", value)))
    # Addresses of Python objects differ from one trace to the next.
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr)), *hidden


def _constant(value: Any) -> Hashable:
    return (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else _Same(value)


def _equations(jaxpr: Jaxpr) -> Iterator[tuple[Any, list[Any]]]:
    """All equations, inner ones included, with their parameters."""
    for equation in jaxpr.eqns:
        values = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        )
        yield equation, values
        for value in values:
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from _equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def _has_custom_rules(jaxpr: Jaxpr) -> bool:
    return any(equation.primitive.name.startswith("custom_") for equation, _ in _equations(jaxpr))


def _gradient_program(closed: ClosedJaxpr, arguments: list[Array]) -> ClosedJaxpr:
    """The program of the gradient: custom rules of differentiation show only there."""
    inputs = [*closed.consts, *arguments]
    diff, rest = eqx.partition(inputs, eqx.is_inexact_array)

    def run(diff):
        inputs = eqx.combine(diff, rest)
        count = len(closed.consts)
        return jax.core.eval_jaxpr(closed.jaxpr, inputs[:count], *inputs[count:])

    def gradient(diff):
        dy, vjp = jax.vjp(run, diff)
        return vjp(dy)

    return jax.make_jaxpr(gradient)(diff)


class ClosedField(eqx.Module):
    """A vector field on rows without closed-over values: they are leaves, and get gradients.

    Called with the arrays of the `args` that it was traced with; what is static is in the program.
    """

    program: _Program = eqx.field(static=True)
    consts: list[Array]

    @property
    def work_size(self) -> int:
        """How many numbers one evaluation computes on its way."""
        equations = _equations(self.program.jaxpr)
        outputs = (v.aval for equation, _ in equations for v in equation.outvars)
        return sum(math.prod(getattr(aval, "shape", ())) for aval in outputs)

    def __call__(
        self, t: Float[Array, " rows"], y: Float[Array, "rows n"], args: PyTree
    ) -> Float[Array, "rows n"]:
        leaves = jax.tree.leaves(args)
        (dy,) = jax.core.eval_jaxpr(self.program.jaxpr, self.consts, t, y, *leaves)
        return dy

    def check_closed_over(self, perturbed: "ClosedField", like: Array) -> None:
        """Raise if a closed-over value is differentiated that varies less than the array `like`.

        Its gradient would cross between devices at every evaluation, in loops whose lengths differ.
        """
        for const, wanted in zip(self.consts, perturbed.consts, strict=True):
            missing = sorted(axes_of(like) - axes_of(const))
            if wanted and missing:
                raise ValueError(
                    "the vector field or the base density closes over a differentiated array of "
                    f"shape {const.shape} that is the same on all devices along {missing}, inside "
                    "jax.shard_map. Pass it as params or args, or make it vary beforehand: "
                    f"jax.lax.pcast(x, {tuple(missing)}, to='varying')."
                )


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
    # A float among the arguments is a value like any other, not a reason to compile again.
    as_array = lambda x: jnp.asarray(x, y.dtype) if isinstance(x, float) else x
    arrays, static = eqx.partition(jax.tree.map(as_array, args), eqx.is_array)
    run = lambda t, y, arrays: field(t, y, eqx.combine(arrays, static))
    with jax.default_matmul_precision("highest"):
        closed = jax.make_jaxpr(run)(t, y, arrays)
    leaves, structure = jax.tree.flatten(eqx.filter(source, eqx.is_array, inverse=True))
    origin = (structure, *leaves)
    try:
        hash(origin)
    except TypeError:
        origin = id(source)
    program = _Program(closed, origin, [t, y, *jax.tree.leaves(arrays)])
    return ClosedField(program, list(closed.consts)), arrays
