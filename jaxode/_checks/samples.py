"""Checks of the arguments of flows: each error names the function, the argument, rule and cure."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import (
    check_integers,
    described,
    floating,
    floating_dtype,
    integer,
    native,
    numbers,
    numeric_dtype,
    shape_of,
    state_dtype,
)
from jaxode._checks.caller import arg
from jaxode._checks.rules import FINITE, WEIGHTS, in_rows, inexact_leaves, is_known
from jaxode._jax.sharding import AxisName


def check_samples(name: str, x: Any, event: tuple[int, ...]) -> Float[Array, "batch *event"]:
    """The samples of a density as an array."""
    x = native(x)
    if not isinstance(x, jax.Array | np.ndarray) or numeric_dtype(x) is None:
        raise TypeError(
            f"{arg(name)} must be an array of numbers; got {described(x)}. Convert it with "
            "np.asarray(..., np.float32), and fill what is masked."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        cure = "Convert real numbers with .astype(np.float32)."
        if jnp.issubdtype(x.dtype, jnp.integer):
            cure = (
                "Integer-valued data has no density: dequantize it and convert with "
                ".astype(jnp.float32)."
            )
        raise TypeError(f"{arg(name)} must have a floating dtype; got {x.dtype}. {cure}")
    if jnp.ndim(x) != len(event) + 1 or jnp.shape(x)[1:] != event:
        cure = f" Pass {name}[None] for a single one." if jnp.shape(x) == event else ""
        raise ValueError(
            f"{arg(name)} must have shape {shape_of('batch', event)}; got {jnp.shape(x)}.{cure}"
        )
    return jnp.asarray(x)


def check_data(name: str, x: Any, event: tuple[int, ...], least: int, rule: str) -> Any:
    """Rows of finite real numbers, as an array of JAX or NumPy. The `rule` says their shape."""
    x = numbers(name, x)
    if x.ndim != len(event) + 1 or x.shape[1:] != event or len(x) < least:
        raise ValueError(f"{arg(name)} {rule}; got {x.shape}.")
    if not is_known(x):
        return x
    data, dtype = np.asarray(x), floating_dtype(x.dtype)
    with np.errstate(over="ignore"):
        narrow = data.astype(dtype)
    lost = (np.isfinite(data) & ~np.isfinite(narrow)).reshape(len(data), -1).any(axis=1)
    if lost.any():
        raise ValueError(
            f"{arg(name)} data must fit {dtype}; got larger numbers in {in_rows(lost)}. Rescale "
            "the data, or leave those rows out."
        )
    check_finite({name: narrow})
    return x


def check_batches(
    name: str, x: Any, event: tuple[int, ...]
) -> tuple[Float[Array, "rows *event"], tuple[int, ...]]:
    """Real numbers `[..., *event]` as floating rows, and the axes before those of an event."""
    x = floating(numbers(name, x))
    cut = x.ndim - len(event)
    if cut < 0 or x.shape[cut:] != event:
        raise ValueError(f"{arg(name)} must have shape {shape_of('...', event)}; got {x.shape}.")
    shape = x.shape[:cut]
    return x.reshape(math.prod(shape), *event), shape


def check_finite(data: dict[str, PyTree]) -> None:
    """Raise if data are known to hold NaN or infinity. Rows lie along the leading axes."""
    for name, leaves in inexact_leaves(data):
        FINITE.check(*leaves, name=name)


def check_not_empty(x: Float[Array, "batch *event"], name: str = "x") -> None:
    """Raise for a batch that has no mean."""
    if x.shape[0] == 0:
        raise ValueError(f"{arg(name)} must have at least one row; got shape {x.shape}.")


def check_rows(name: str, tree: PyTree, batch: int, *others: Any) -> PyTree:
    """The tree, whose leaves are arrays with one row for each sample, of numbers or `others`."""
    tree, kinds = native(tree), (jnp.number, jnp.bool_, *others)
    for leaf in jax.tree.leaves(tree):
        dtype = numeric_dtype(leaf) if isinstance(leaf, jax.Array | np.ndarray) else None
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            raise TypeError(
                f"{arg(name)} leaves must be arrays of numbers; got {described(leaf)}. "
                "Convert them with np.asarray(..., np.float32)."
            )
        check_integers(name, leaf)
        if leaf.shape[:1] != (batch,):
            raise ValueError(
                f"{arg(name)} leaves must have a leading axis of {batch}, one row per "
                f"sample; got shape {leaf.shape}. To give all samples the same row, pass "
                f"jnp.broadcast_to(row, ({batch}, *row.shape))."
            )
    return tree


def check_weights(weights: Any, x: Float[Array, "batch *event"]) -> Float[Array, " batch"] | None:
    """The weights as an array, if there are any: one for each sample."""
    if weights is None:
        return None
    weights = native(weights)
    dtype, batch = numeric_dtype(weights), x.shape[:1]
    if dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{arg('weights')} must be real numbers; got {described(weights)}.")
    array = jnp.asarray(weights, state_dtype(x))
    if array.shape != batch:
        raise ValueError(
            f"{arg('weights')} must have one weight per sample, shape {batch}; got {array.shape}."
        )
    if is_known(weights):
        WEIGHTS.check(np.asarray(weights, array.dtype))
    return array


def normalized(
    weights: Float[Array, " batch"] | None,
    x: Float[Array, "batch *event"],
    axis_name: AxisName | None,
) -> tuple[Float[Array, " batch"], Any]:
    """Weights of the samples in a mean, and whether they are valid.

    They sum to one, on average over devices along `axis_name`, of which all rows of one may weigh
    nothing. They are equal by default, and NaN if they are wrong. Only their ratios count, so that
    no sum of them overflows.
    """
    batch = x.shape[0]
    if weights is None:
        return jnp.full(batch, 1 / batch, state_dtype(x)), True
    largest = jnp.max(jax.lax.stop_gradient(weights), initial=0, where=weights >= 0)
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    # Dividing by what is near the largest number would flush its inverse to zero.
    weights = weights * jax.lax.rsqrt(jnp.where(largest > 0, largest, 1))
    total = jnp.sum(jnp.where(weights >= 0, weights, jnp.nan))
    total = total if axis_name is None else jax.lax.pmean(total, axis_name)
    valid = (total > 0) & jnp.isfinite(total)
    return weights / jnp.where(valid, total, jnp.nan), valid


def check_count(n: Any, name: str = "n") -> Any:
    """A number of samples; a symbolic one of `jax.export` as it is."""
    if export.is_symbolic_dim(n):
        return n
    return integer(name, n, least=0, rule="a number of samples")


def check_key(key: Any) -> Any:
    """The validated key: typed, or of the older kind, an array of uint32."""
    try:
        shape = jax.random.key_data(key).shape[:-1]
    except TypeError:
        raise TypeError(
            f"{arg('key')} must be a key of jax.random; got {type(key).__name__}. "
            "Pass jax.random.key(0)."
        ) from None
    if shape:
        raise ValueError(
            f"{arg('key')} must be one key; got keys of shape {shape}. "
            "Pass one of them; it gives each row its own random numbers."
        )
    return key
