"""Checks of the arguments of flows: each error names the function, the argument, rule and cure."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._jax.sharding import AxisName
from jaxode.ode.validation import Time, integer, is_known, non_negative, state_dtype


def check_samples(
    where: str, name: str, x: Any, event: tuple[int, ...]
) -> Float[Array, "batch *event"]:
    """The samples of a density as an array."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{where}({name}=...): must be an array; got {type(x).__name__}.")
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{where}({name}=...): must have a floating dtype; got {dtype}. Integer-valued "
            "data has no density: dequantize it and convert with .astype(jnp.float32)."
        )
    if jnp.ndim(x) != len(event) + 1 or jnp.shape(x)[1:] != event:
        raise ValueError(
            f"{where}({name}=...): must have shape (batch, *event) with event {event}; "
            f"got {jnp.shape(x)}."
        )
    return jnp.asarray(x)


def check_context(where: str, context: PyTree, batch: int) -> PyTree:
    """The context, which has one row for each sample."""
    for leaf in jax.tree.leaves(context):
        if jnp.shape(leaf)[:1] != (batch,):
            raise ValueError(
                f"{where}(context=...): leaves must have a leading axis of {batch}, one row a "
                f"sample; got shape {jnp.shape(leaf)}."
            )
    return context


def check_weights(where: str, weights: Any, batch: int) -> None:
    """Raise unless there is one weight a sample."""
    if weights is not None and jnp.shape(weights) != (batch,):
        raise ValueError(
            f"{where}(weights=...): must have one weight a sample, shape {(batch,)}; "
            f"got {jnp.shape(weights)}."
        )


def normalized(
    weights: Any, x: Float[Array, "batch *event"], axis_name: AxisName | None
) -> Float[Array, " batch"]:
    """Weights of the samples in a mean; they sum to one, on average over devices along `axis_name`.

    They are equal by default.
    """
    batch = x.shape[0]
    if weights is None:
        return jnp.full(batch, 1 / max(batch, 1), state_dtype(x))
    weights = jnp.asarray(weights, state_dtype(x))
    total = jnp.sum(weights)
    return weights / (total if axis_name is None else jax.lax.pmean(total, axis_name))


def check_count(where: str, n: Any) -> int:
    """A number of samples."""
    return integer(where, "n", n, least=0, rule="a number of samples")


def check_steer(steer: Any, t0: Time, t1: Time) -> float:
    """How far a random end time may be from `t0`, without reaching `t1`."""
    if non_negative("cnf", "steer", steer, "finite and at least 0") and is_known((t0, t1)):
        span = abs(float(t1) - float(t0))
        if not steer < span:
            raise ValueError(
                f"cnf(steer=...): must be less than the span |t1 - t0| = {span}; got {steer!r}. "
                "A tenth of the span is a start."
            )
    return float(steer)


def check_key(where: str, key: Any, optional: bool = False) -> Any:
    """The key, if it is one: typed, or of the older kind, an array of uint32."""
    dtype = getattr(key, "dtype", None)
    is_key = dtype is not None and (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32
    )
    if not is_key and not (key is None and optional):
        raise TypeError(
            f"{where}(key=...): must be a key of jax.random; got {type(key).__name__}. "
            "Pass jax.random.key(0)."
        )
    return key
