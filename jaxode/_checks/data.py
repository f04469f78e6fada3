"""What a flow says when a loss or a solve fails: above all, which argument is at fault."""

import functools

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._checks.errors import Faults, nan_or_raise, not_finite, tied
from jaxode._jax.sharding import AxisName


def data_faults(
    where: str,
    data: dict[str, PyTree],
    weights: Float[Array, " rows"] | None = None,
    *,
    joint: bool = False,
) -> Faults:
    """Possible faults of data, by the name of the argument. Rows lie along the leading axes.

    A row of weight 0 may hold anything, unless it shares its steps with other rows.
    """
    faults: Faults = {}
    for name, rows in data.items():
        for told, find in not_finite(where, name, rows).items():
            if weights is None:
                faults[told] = find
                continue
            unused = jax.lax.stop_gradient(weights) == 0
            faults[told] = lambda find=find, unused=unused: find() & ~unused
            if joint:
                faults[
                    f"{where}({name}=...): must be finite, with joint steps also in rows of weight "
                    "0; got NaN or inf in {rows}. Leave those rows out, or pass "
                    "step_control='per_sample' to cnf."
                ] = lambda find=find, unused=unused: find() & unused
    return faults


def base_faults(z: Float[Array, "rows *event"]) -> Faults:
    """The possible fault of samples that the base density drew."""
    (find,) = not_finite("cnf", "base", z).values()
    return {
        "cnf(base=...): must draw finite samples; got NaN or inf in {rows}. Mend its parameters or "
        "its method `sample`.": find
    }


def weights_faults(
    where: str, weights: Float[Array, " rows"] | None, axis_name: AxisName | None
) -> Faults:
    """Possible faults of weights. With an `axis_name`, the rows of one device may all have 0."""
    if weights is None:
        return {}
    find = wrong_weights if axis_name is None else wrong_each
    return {weights_rule(where): functools.partial(find, weights)}


def weights_rule(where: str) -> str:
    """The rule for weights, for `Faults`."""
    return (
        f"{where}(weights=...): must be finite, at least 0, and not all 0; got other values in "
        "{rows}. To leave a row out, give it the weight 0."
    )


def wrong_each(weights: Float[Array, " rows"]) -> Bool[Array, " rows"]:
    """Which weights are wrong on their own."""
    weights = jax.lax.stop_gradient(weights)
    return ~((weights >= 0) & jnp.isfinite(weights))


def wrong_weights(weights: Float[Array, " rows"]) -> Bool[Array, " rows"]:
    """Which weights are wrong. All of them, if all are zero."""
    wrong = wrong_each(weights)
    return wrong | (~jnp.any(wrong) & jnp.all(weights == 0))


def loss_or_raise(
    where: str,
    loss: Float[Array, ""],
    result: Int[Array, "*rows"],
    t_reached: Float[Array, "*rows"],
    throw: bool | None,
    faults: Faults,
) -> Float[Array, ""]:
    """The loss. If it failed, raises with `throw`, or by default outside transformations."""
    concrete = not isinstance(result, jax.core.Tracer)
    if not (concrete if throw is None else throw):
        return loss
    nan = nan_or_raise(result, t_reached, where, faults)
    if concrete:
        return loss
    return tied(loss, jnp.all(result == 0), jnp.sum(nan))
