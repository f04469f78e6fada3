"""Inside `jax.shard_map`: the device axes over which an array varies.

JAX keeps them in the type of an array. A loop must carry the same types before and after each
iteration. And JAX sums the gradient of an array over devices where the array first meets one that
varies: at every stage of a solve, if parameters enter unchanged. So everything that enters a solve
is first made to vary over the same axes, and devices exchange gradients once. Outside `shard_map`,
or with `check_vma=False`, nothing varies and these functions do nothing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Shaped

T = TypeVar("T")

# A mapped axis, or several: `("x", "y")`.
AxisName = str | tuple[str, ...]


def axes_of(tree: PyTree) -> frozenset[Any]:
    """The device axes over which any array of `tree` varies."""
    return frozenset().union(*map(_varying, filter(eqx.is_array, jax.tree.leaves(tree))))


def _varying(x) -> frozenset[Any]:
    type_of_x = jax.typeof(x)
    if hasattr(type_of_x, "manual_axis_type"):
        return type_of_x.manual_axis_type.varying
    return type_of_x.vma  # JAX before 0.10


def unmapped(axis_name: AxisName | None) -> list[str]:
    """The names that neither `jax.shard_map` nor `jax.vmap` maps around this call."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return [name for name in names if name is not None and not _is_mapped(name)]


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def vary(tree: T, axes: frozenset[Any]) -> T:
    """The same arrays, varying over at least these `axes`."""

    def one(x):
        missing = tuple(axes - _varying(x)) if eqx.is_array(x) else ()
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if axes else tree


def vary_alike(tree: T) -> T:
    """The same arrays, each varying over all axes over which any of them varies."""
    return vary(tree, axes_of(tree))


def while_loop(proceed: Callable[[T], Any], body: Callable[[T], T], carry: T) -> T:
    """`jax.lax.while_loop` of arrays that vary alike."""
    return jax.lax.while_loop(proceed, body, vary_alike(carry))


def fori_loop(lower: Any, upper: Any, body: Callable[[Any, T], T], carry: T) -> T:
    """`jax.lax.fori_loop` of arrays that vary alike."""
    return jax.lax.fori_loop(lower, upper, body, vary_alike(carry))


def over_devices(f: Callable[..., T], mesh: Mesh | None, split: tuple[int, ...] = ()) -> Any:
    """`f(axes, *args)` on every device of a mesh with these `axes`, or with none without a mesh.

    Each device gets its rows of the arguments whose numbers are in `split`, and all of the others.
    All devices must return the same.
    """
    if mesh is None:
        return lambda *args: f((), *args)
    names = mesh.axis_names

    def call(*args):
        specs = tuple(P(names) if i in split else P() for i in range(len(args)))

        def of_device(*args):
            return f(names, *args)

        return jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=P())(*args)

    return call


def on_all(tree: T, mesh: Mesh | None) -> T:
    """The arrays of `tree` on every device of a mesh."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, P())
    if everywhere.is_fully_addressable:
        return jax.device_put(tree, everywhere)

    # `device_put` would compare the arrays of all processes.
    def put(leaf):
        return jax.make_array_from_callback(leaf.shape, everywhere, np.asarray(leaf).__getitem__)

    return jax.tree.map(put, tree)


def split_over(tree: T, mesh: Mesh) -> T:
    """The rows of this process, split over its devices of the mesh."""
    rows = NamedSharding(mesh, P(mesh.axis_names))

    def put(leaf):
        return jax.make_array_from_process_local_data(rows, np.asarray(leaf))

    return jax.tree.map(put, tree)


def of_device(x: Shaped[Array, "batch ..."], axes: tuple[Any, ...]) -> Shaped[Array, "part ..."]:
    """The rows of this device, in the order of the devices."""
    if not axes:
        return x
    blocks = x.reshape(jax.lax.psum(1, axes), -1, *x.shape[1:])
    return blocks[jax.lax.axis_index(axes)]


def mean_over(tree: T, axes: tuple[Any, ...]) -> T:
    """The mean over devices, in one exchange."""
    return jax.lax.pmean(tree, axes) if axes else tree


def row_numbers(
    x: Shaped[Array, "batch ..."], key: PRNGKeyArray, axis_name: AxisName | None
) -> Int[Array, " batch"]:
    """The number of each row of this device in the whole batch.

    It gives devices that share a key different noise. A key that varies over devices does so
    anyway.
    """
    axes = _split_axes(x, key, axis_name)
    first = jax.lax.axis_index(axes) * x.shape[0] if axes else 0
    return first + jnp.arange(x.shape[0], dtype=jnp.int32)


def row_count(x: Shaped[Array, "batch ..."], key: PRNGKeyArray, axis_name: AxisName | None) -> int:
    """The number of rows in the whole batch."""
    axes = _split_axes(x, key, axis_name)
    return x.shape[0] * (jax.lax.psum(1, axes) if axes else 1)


def _split_axes(x, key: PRNGKeyArray, axis_name: AxisName | None) -> tuple[Any, ...]:
    """The axes over which rows are split, in the order of the devices."""
    axes = axes_of(x) - axes_of(key)
    if not axes_of(x) and axis_name is not None:
        axes = frozenset(axis_name if isinstance(axis_name, tuple) else (axis_name,))
    ordered = [name for name in jax.sharding.get_abstract_mesh().axis_names if name in axes]
    return tuple(ordered or sorted(axes))
