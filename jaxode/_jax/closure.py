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
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Float, PyTree

from jaxode._jax.precision import trace_at
from jaxode._jax.sharding import axes_of

NUMBERS = (bool, int, float, complex, np.integer, np.bool_)


class _Held:
    """A static leaf, equal to its like by more than `==`.

    Numbers are compared by type and sign, too (`1 == True`, `0.0 == -0.0`), frozen dataclasses by
    all of their fields, and what has no equality of its own by its identity and that of what it
    holds, so that a change is noticed.
    """

    def __init__(self, value: Any):
        self.value = value
        self.key, self.holds = _key(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held) or self.key != other.key:
            return False
        return list(map(id, self.holds)) == list(map(id, other.holds))

    def __hash__(self) -> int:
        return hash(self.key)


def settle(tree: PyTree) -> None:
    """Take what tracing has changed in the leaves, such as a counter of calls, for no change."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, _Held):
            leaf.holds = _key(leaf.value)[1]


def _key(value: Any) -> tuple[Any, tuple[Any, ...]]:
    """What is compared by `==`, and what by identity."""
    if isinstance(value, NUMBERS):
        return (type(value), repr(value)), ()
    if isinstance(value, set):
        return (set, frozenset(value)), ()
    if _is_frozen(value):
        fields = [_Held(x) if _is_held(x) else x for x in vars(value).values()]
        return (type(value), *fields), ()
    own = value.__func__ if inspect.ismethod(value) else value  # Methods are made at each access.
    return id(own), (own, *_contents(value))


def _is_frozen(value: Any) -> bool:
    params = getattr(type(value), "__dataclass_params__", None)
    return params is not None and params.frozen and hasattr(value, "__dict__")


def _contents(value: Any) -> tuple[Any, ...]:
    if inspect.ismethod(value):
        return (value.__self__, *_contents(value.__self__))
    if inspect.isfunction(value):
        return tuple(map(_cell_contents, value.__closure__ or ()))
    return tuple(getattr(value, "__dict__", {}).values())


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # It is empty, as in a function that calls itself before it has a name.
        return cell


def _is_held(leaf: Any) -> bool:
    """Whether `==` is not all there is to the equality of this leaf."""
    if isinstance(leaf, type):
        return False
    if isinstance(leaf, NUMBERS) or inspect.ismethod(leaf) or _is_frozen(leaf):
        return True
    if inspect.isfunction(leaf):
        return leaf.__closure__ is not None
    try:
        hash(leaf)
    except TypeError:
        return True
    return type(leaf).__hash__ is object.__hash__


class _Partial(eqx.Module):
    """A `functools.partial` as a pytree."""

    f: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]


def recognizable(tree: PyTree, dtype: Any = None) -> PyTree:
    """The tree as an argument of `eqx.filter_jit`, which compiles again for other static leaves.

    A `functools.partial`, or a method of a pytree, becomes a pytree of its parts. With a `dtype`, a
    Python float is an array, and no reason to compile again.
    """

    def one(leaf):
        if isinstance(leaf, functools.partial):
            return _Partial(*recognizable((leaf.func, leaf.args, leaf.keywords), dtype))
        if inspect.ismethod(leaf) and not jax.tree_util.all_leaves([leaf.__self__]):
            return _Partial(leaf.__func__, (recognizable(leaf.__self__, dtype),), {})
        if dtype is not None and isinstance(leaf, float):
            return jnp.asarray(leaf, dtype)
        if eqx.is_array(leaf) and (dtype is not None or not isinstance(leaf, NUMBERS)):
            return leaf
        return _Held(leaf) if _is_held(leaf) else leaf

    return jax.tree.map(one, tree)


def recognized(tree: PyTree) -> PyTree:
    """The inverse of `recognizable`, inside of the program."""

    def one(leaf):
        if isinstance(leaf, _Partial):
            f, args, keywords = recognized((leaf.f, leaf.args, leaf.keywords))
            return functools.partial(f, *args, **keywords)
        return leaf.value if isinstance(leaf, _Held) else leaf

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, _Partial))


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


def hash_of(tree: PyTree) -> int:
    """So that `jax.jit` takes a method of a module: what has no hash counts by its identity."""
    leaves, structure = jax.tree.flatten(tree)
    return hash((structure, *(x if type(x).__hash__ else id(x) for x in leaves)))


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
    precision: str | None,
) -> tuple[ClosedField, PyTree]:
    """Trace `field(t, y, args)` once; returns it closed, and the arrays of `args`."""
    arrays, static = eqx.partition(args, eqx.is_array)
    run = lambda t, y, arrays: field(t, y, eqx.combine(arrays, static))
    closed = trace_at(precision, run, t, y, arrays)
    return ClosedField(closed.jaxpr, list(closed.consts)), arrays
