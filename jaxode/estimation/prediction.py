"""The trajectory of an estimate, with a band by the delta method."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import floating, numbers
from jaxode._checks.caller import arg
from jaxode._jax.closure import compiled
from jaxode.estimation.observed.observations import check_times
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.ode.interpolations import check_knots

# 95% of a normal distribution lie within so many standard deviations of its mean.
NORMAL_95 = 1.959964


class Band(NamedTuple):
    """Predictions, and where 95% of them are for parameters as uncertain as estimated."""

    mean: Float[Array, "..."]
    low: Float[Array, "..."]
    high: Float[Array, "..."]


def predicted_band(
    problem: ObservedODE, params: PyTree, covariance: Float[Array, "n n"], ts: Any
) -> Band:
    """What is observed at `ts`, `[times]` or `[rows, times]`."""
    dtype = problem.ts.dtype
    exact = numbers("ts", ts)
    times = floating(exact).astype(dtype)
    if problem.ts.ndim == 2 and times.ndim == 1:
        times = jnp.broadcast_to(times[None], (len(problem.ts), len(times)))
    if not times.size or times.ndim not in (1, 2) or times.shape[:-1] != problem.ts.shape[:-1]:
        raise ValueError(
            f"{arg('ts')} must be [times], or [rows, times] of the experiments; got shape "
            f"{jnp.shape(ts)}."
        )
    check_times(exact, times, problem.t0)
    check_knots("ts", problem.args, (problem.t0, jnp.max(times)))
    check_knots("ts", problem.row_args, (problem.t0, times[..., -1]))
    flat, _ = ravel_pytree(params)
    mean, slopes = _sensitivities(dataclasses.replace(problem, ts=times), flat)
    # The covariance is NaN for parameters that bounds fix, which add no variance, and infinite for
    # those that are not determined.
    undetermined = jnp.isinf(jnp.diag(covariance))
    finite = jnp.where(jnp.isfinite(covariance), covariance, 0.0)
    variance = jnp.einsum("...i,ij,...j->...", slopes, finite, slopes)
    unknown = (slopes != 0).astype(int) @ undetermined.astype(int) > 0
    width = NORMAL_95 * jnp.where(unknown, jnp.inf, jnp.sqrt(variance))
    return Band(mean, mean - width, mean + width)


@compiled
def _sensitivities(problem: ObservedODE, flat: Float[Array, " n"]) -> tuple[Array, Array]:
    """The predictions, and their derivatives by the parameters, `[..., n]`."""

    def twice(flat):
        mean = problem.predicted(problem.unravel(flat), jnp.max(problem.ts), throw=True)
        return mean, mean

    slopes, mean = jax.jacfwd(twice, has_aux=True)(flat)
    return mean, slopes
