"""A vector field as a program with its closed-over values, and how `jit` recognizes it."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, PyTree

from jaxode._jax.precision import trace_at
from jaxode._jax.sharding import axes_of

F = TypeVar("F", bound=Callable[..., Any])

# How many programs of a function are kept. Each takes 3 to 9 MiB.
KEPT = 256

NUMBERS = (bool, int, float, complex, np.integer, np.bool_)


def compiled(f: F) -> F:
    """`f` as a program that is compiled once for equal arguments.

    As `eqx.filter_jit`, but for arguments that hold any functions and objects, see `encoded`. It
    forgets its programs whenever it has traced `KEPT` of them: JAX itself keeps thousands, and a
    vector field that is a new function at each call makes one at each call.
    """
    traced = [0]  # a list stays the same object, which `_Held` compares

    @functools.wraps(f)
    def counted(*args):
        traced[0] += 1
        return f(*_decoded(args))

    programs: Any = eqx.filter_jit(counted)
    forget = programs._cached.clear_cache

    @functools.wraps(f)
    def run(*args):
        if traced[0] >= KEPT:
            forget()
            traced[0] = 0
        inputs = encoded(args)
        out = programs(*inputs)
        # Ignore what tracing changed in the arguments, such as a call counter.
        for leaf in jax.tree.leaves(inputs):
            if isinstance(leaf, _Held):
                leaf.holds = _key(leaf.value)[1]
        return out

    return cast(F, run)


class _Held:
    """A static leaf with a stricter equality than `==`.

    Numbers are also compared by type and sign (`1 == True`, `0.0 == -0.0`), frozen dataclasses by
    all of their fields, and objects without `__eq__` by identity, their own and that of their
    contents, so that a change is noticed.
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


def _key(value: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split a value into parts compared by `==` and parts compared by identity."""
    if isinstance(value, NUMBERS):
        return (type(value), repr(value)), ()
    if isinstance(value, set):
        return (set, frozenset(value)), ()
    if _is_frozen(value):
        fields = [_Held(x) if _is_held(x) else x for x in vars(value).values()]
        return (type(value), *fields), ()
    # Python makes a new method at each access, so its function is compared.
    original = value.__func__ if inspect.ismethod(value) else value
    return id(original), (original, *_contents(value))


def _is_frozen(value: Any) -> bool:
    params = getattr(type(value), "__dataclass_params__", None)
    return params is not None and params.frozen and hasattr(value, "__dict__")


def _contents(value: Any) -> tuple[Any, ...]:
    if inspect.ismethod(value):
        return (value.__self__, *_contents(value.__self__))
    if inspect.isfunction(value):
        return tuple(map(_cell_contents, value.__closure__ or ()))
    slots = (vars(base).get("__slots__", ()) for base in type(value).__mro__)
    names = {name for slot in slots for name in ([slot] if isinstance(slot, str) else slot)}
    names = sorted(names - {"__dict__", "__weakref__"})
    in_slots = (getattr(value, name) for name in names if hasattr(value, name))
    return (*getattr(value, "__dict__", {}).values(), *in_slots)


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # An empty cell: a function that refers to itself.
        return cell


def _is_held(leaf: Any) -> bool:
    """Whether `==` is not enough to compare this leaf."""
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


def encoded(tree: PyTree, dtype: Any = None) -> PyTree:
    """The tree as an argument of `eqx.filter_jit`, which recompiles for different static leaves.

    A `functools.partial`, or a method of a pytree, becomes a pytree of its parts. With a `dtype`,
    numbers of Python that are floats become arrays, so that they do not cause recompilation.
    """

    def one(leaf):
        if isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        if isinstance(leaf, functools.partial):
            return _Partial(*encoded((leaf.func, leaf.args, leaf.keywords), dtype))
        if inspect.ismethod(leaf) and not jax.tree_util.all_leaves([leaf.__self__]):
            return _Partial(leaf.__func__, (encoded(leaf.__self__, dtype),), {})
        if dtype is not None and isinstance(leaf, float):
            return jnp.asarray(leaf, dtype)
        if dtype is not None and isinstance(leaf, np.generic):
            return np.asarray(leaf)
        if eqx.is_array(leaf) and not isinstance(leaf, NUMBERS):
            return leaf
        return _Held(leaf) if _is_held(leaf) else leaf

    return jax.tree.map(one, tree)


def _decoded(tree: PyTree) -> PyTree:
    """The inverse of `encoded`, inside the program."""

    def one(leaf):
        if isinstance(leaf, _Partial):
            f, args, keywords = _decoded((leaf.f, leaf.args, leaf.keywords))
            return functools.partial(f, *args, **keywords)
        return leaf.value if isinstance(leaf, _Held) else leaf

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, _Partial))


class _Constant(eqx.Module):
    """A leaf that is not an array, as a node without leaves, so that `jax.jit` accepts the tree."""

    value: Any = eqx.field(static=True)


def wrap_constants(tree: PyTree, numbers: bool = False) -> PyTree:
    """The tree with every leaf but arrays, and numbers if `numbers`, made constant."""

    def keep(leaf):
        return eqx.is_array(leaf) or (numbers and isinstance(leaf, int | float))

    return jax.tree.map(lambda leaf: leaf if keep(leaf) else _Constant(leaf), tree)


def unwrap_constants(tree: PyTree) -> PyTree:
    """The inverse of `wrap_constants`."""

    def unwrap(leaf):
        return leaf.value if is_constant(leaf) else leaf

    return jax.tree.map(unwrap, tree, is_leaf=is_constant)


def is_constant(leaf: Any) -> bool:
    """Whether it is a leaf that `wrap_constants` made constant."""
    return isinstance(leaf, _Constant)


def constant(value: Any) -> Any:
    """A value as a node without leaves."""
    return _Constant(value)


class ClosedField(eqx.Module):
    """A function whose closed-over values are leaves, with gradients: the vector field on rows.

    Call it with the arrays of the arguments of its trace. Static parts are in the program.
    """

    program: Jaxpr = eqx.field(static=True)
    consts: list[Array]
    jacobian: "ClosedField | None" = None
    """A function of the same arguments: the Jacobian by the state, if the user gave one."""

    @property
    def work_size(self) -> int:
        """The number of numbers that one evaluation computes."""
        outputs = (v.aval for equation in equations(self.program) for v in equation.outvars)
        return sum(math.prod(getattr(aval, "shape", ())) for aval in outputs)

    def __call__(self, *args: PyTree) -> Array:
        return jax.core.eval_jaxpr(self.program, self.consts, *jax.tree.leaves(args))[0]

    def check_closed_over(self, perturbed: "ClosedField", like: Array) -> None:
        """Raise if a differentiated closed-over value varies over fewer axes than `like`.

        Devices would exchange its gradient at every evaluation, in loops of different lengths.
        """
        consts, flags = jax.tree.leaves(self), jax.tree.leaves(perturbed)
        for const, is_perturbed in zip(consts, flags, strict=True):
            missing = sorted(axes_of(like) - axes_of(const))
            if is_perturbed and missing:
                raise ValueError(
                    "the vector field or the base density closes over a differentiated array of "
                    f"shape {const.shape} that is the same on all devices along {missing}, inside "
                    "jax.shard_map. Pass it as params or args, or make it vary beforehand: "
                    f"jax.lax.pcast(x, {tuple(missing)}, to='varying')."
                )


def hash_of(tree: PyTree) -> int:
    """A hash, so that `jax.jit` accepts methods of a module. Equal for what `eqx.tree_equal` finds
    equal: arrays count by shape and dtype."""
    leaves, structure = jax.tree.flatten(tree)

    def of_leaf(x):
        if isinstance(x, jax.core.Tracer):  # equal to itself alone
            return id(x)
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return hash((x.shape, x.dtype))
        try:
            return hash(x)
        except TypeError:
            return 0

    return hash((structure, *map(of_leaf, leaves)))


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All equations, including inner ones."""
    for equation in jaxpr.eqns:
        yield equation

        def inner(x):
            return isinstance(x, Jaxpr | ClosedJaxpr)

        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=inner):
            if inner(value):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def close_field(
    precision: str | None,
    field: Callable[..., Array],
    *args: PyTree,
    jacobian: Callable[..., Array] | None = None,
) -> tuple[ClosedField, PyTree]:
    """Trace `field(*args)` once, by `trace_at`, and its Jacobian if it is given.

    Returns the closed field and the arrays of the last of its arguments.
    """
    arrays, static = eqx.partition(args, eqx.is_array)

    def close(f, of_state=None):
        closed = trace_at(precision, lambda *arrays: f(*eqx.combine(arrays, static)), *arrays)
        return ClosedField(closed.jaxpr, list(closed.consts), of_state)

    return close(field, None if jacobian is None else close(jacobian)), arrays[-1]
