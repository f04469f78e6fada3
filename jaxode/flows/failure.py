"""What a flow says when its loss, or a solve, fails: first of all, which argument is at fault."""

import functools

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._jax.sharding import AxisName
from jaxode.ode.results import Faults, nan_or_raise, tied


def faults_of(
    where: str,
    data: dict[str, PyTree],
    *,
    weights: Float[Array, " rows"] | None = None,
    axis_name: AxisName | None = None,
) -> Faults:
    """What can be wrong with the values of arguments by name; rows are along the leading axes.

    With an `axis_name` the total of the weights is not that of these rows.
    """
    faults: Faults = {
        f"{where}({name}=...): must be finite; got NaN or inf in {{rows}}. Leave those rows out, "
        "or mend what they come from.": functools.partial(_not_finite, rows)
        for name, rows in data.items()
        if any(map(eqx.is_inexact_array, jax.tree.leaves(rows)))
    }
    if weights is not None:
        find = wrong_weights if axis_name is None else wrong_each
        faults[weights_rule(where)] = functools.partial(find, weights)
    return faults


def _not_finite(data: PyTree) -> Bool[Array, " rows"]:
    """Which rows hold a NaN or an infinity."""
    leaves = jax.lax.stop_gradient(list(filter(eqx.is_inexact_array, jax.tree.leaves(data))))
    finite = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    return ~functools.reduce(jnp.logical_and, finite)


def weights_rule(where: str) -> str:
    """For `Faults`: what weights have to be."""
    return (
        f"{where}(weights=...): must be finite, at least 0, and not all 0; got something else in "
        "{rows}. To leave a row out, give it the weight 0."
    )


def wrong_each(weights: Float[Array, " rows"]) -> Bool[Array, " rows"]:
    """Which weights are wrong whatever the others are."""
    weights = jax.lax.stop_gradient(weights)
    return ~((weights >= 0) & jnp.isfinite(weights))


def wrong_weights(weights: Float[Array, " rows"]) -> Bool[Array, " rows"]:
    """Which weights are wrong: all of them, if their sum is zero or not finite."""
    wrong, total = wrong_each(weights), jnp.sum(jax.lax.stop_gradient(weights))
    return wrong | ~(jnp.any(wrong) | ((total > 0) & jnp.isfinite(total)))


def loss_or_raise(
    where: str,
    loss: Float[Array, ""],
    result: Int[Array, "*rows"],
    t_reached: Float[Array, "*rows"],
    throw: bool | None,
    faults: Faults,
) -> Float[Array, ""]:
    """The loss, unless it failed: then it raises with `throw`, or by default where it is known."""
    concrete = not isinstance(result, jax.core.Tracer)
    if not (concrete if throw is None else throw):
        return loss
    nan = nan_or_raise(result, t_reached, where, faults)
    if concrete:
        return loss
    return tied(loss, jnp.all(result == 0), jnp.sum(nan))
