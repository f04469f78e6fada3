"""A vector field as a program and the values that it closes over, and what `jit` knows it by."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Float, PyTree

from jaxode._jax.sharding import axes_of


class _Held:
    """Something that cannot be hashed: equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def recognizable(tree: PyTree, dtype: Any = None) -> PyTree:
    """The tree as an argument of `eqx.filter_jit`, which compiles again for other static leaves.

    A `functools.partial`, or a method of a pytree, becomes a pytree of its parts; what cannot be
    hashed is known by its identity. With a `dtype`, a Python float is an array, and no reason to
    compile again.
    """

    def one(leaf):
        if isinstance(leaf, functools.partial):
            f, args, keywords = recognizable((leaf.func, leaf.args, leaf.keywords))
            return eqx.Partial(f, *args, **keywords)
        if inspect.ismethod(leaf) and not jax.tree_util.all_leaves([leaf.__self__]):
            return eqx.Partial(leaf.__func__, recognizable(leaf.__self__))
        if dtype is not None and isinstance(leaf, float):
            return jnp.asarray(leaf, dtype)
        if eqx.is_array(leaf):
            return leaf
        try:
            hash(leaf)
        except TypeError:
            return _Held(leaf)
        return leaf

    return jax.tree.map(one, tree)


def recognized(tree: PyTree) -> PyTree:
    """The inverse of `recognizable`, inside of the program."""
    return jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, _Held) else leaf, tree)


class ClosedField(eqx.Module):
    """A vector field on rows without closed-over values: they are leaves, and get gradients.

    Called with the arrays of the `args` that it was traced with; what is static is in the program.
    """

    program: Jaxpr = eqx.field(static=True)
    consts: list[Array]

    @property
    def work_size(self) -> int:
        """How many numbers one evaluation computes on its way."""
        outputs = (v.aval for equation in _equations(self.program) for v in equation.outvars)
        return sum(math.prod(getattr(aval, "shape", ())) for aval in outputs)

    def __call__(
        self, t: Float[Array, " rows"], y: Float[Array, "rows n"], args: PyTree
    ) -> Float[Array, "rows n"]:
        leaves = jax.tree.leaves(args)
        (dy,) = jax.core.eval_jaxpr(self.program, self.consts, t, y, *leaves)
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


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All equations, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        inner = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=inner):
            if inner(value):
                yield from _equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def close_field(
    field: Callable[..., Float[Array, "rows n"]],
    t: Float[Array, " rows"],
    y: Float[Array, "rows n"],
    args: PyTree,
) -> tuple[ClosedField, PyTree]:
    """Trace `field(t, y, args)` once; returns it closed, and the arrays of `args`."""
    arrays, static = eqx.partition(args, eqx.is_array)
    run = lambda t, y, arrays: field(t, y, eqx.combine(arrays, static))
    with jax.default_matmul_precision("highest"):
        closed = jax.make_jaxpr(run)(t, y, arrays)
    return ClosedField(closed.jaxpr, list(closed.consts)), arrays
