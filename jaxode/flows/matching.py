"""Flow matching: train the vector field of a flow by regression, without a solve.

A base sample `z0` and a data sample `x` are joined by a straight path, on which the field is fitted
to the path's velocity. With `u` uniform in [0, 1],

    z_t = (1 - u) z0 + u x  at the time  t = t0 + u (t1 - t0),
    loss = mean over rows and coordinates of (f(t, z_t) - (x - z0) / (t1 - t0))^2.

The least loss has the field that carries the base density to that of the data.

References: Lipman et al. (2022), arXiv:2210.02747; Tong et al. (2023), arXiv:2302.00482.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode._jax.sharding import AxisName, row_count, row_numbers, vary_alike
from jaxode.coupling import Coupling, independent
from jaxode.distributions import BaseDensity
from jaxode.flows.failure import faults_of, loss_or_raise
from jaxode.flows.quadrature import GOLDEN
from jaxode.flows.validation import (
    check_context,
    check_not_empty,
    check_samples,
    check_weights,
    normalized,
)
from jaxode.ode.field import VectorField, call_field
from jaxode.ode.loop.outcome import Result
from jaxode.ode.validation import Time, check_derivative, is_known, state_dtype

WHERE = "matching_loss"


class Flow(Protocol):
    """What matching needs of a `CNF`."""

    @property
    def f(self) -> VectorField: ...
    @property
    def base(self) -> BaseDensity: ...
    @property
    def t0(self) -> Time: ...
    @property
    def t1(self) -> Time: ...
    @property
    def throw(self) -> bool | None: ...


def matching_loss(
    flow: Flow,
    params: PyTree,
    x: Float[Array, "batch *event"],
    *,
    key: PRNGKeyArray,
    x0: Float[Array, "batch *event"] | None = None,
    context: PyTree = None,
    weights: Float[Array, " batch"] | None = None,
    coupling: Coupling = independent(),
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """The loss of `CNF.matching_loss`; `axis_name` is that of the flow."""
    event = tuple(flow.base.event_shape)
    x = check_samples(WHERE, "x", x, event)
    x = x.astype(state_dtype(x))
    check_not_empty(WHERE, x)
    context = check_context(WHERE, context, x.shape[0])
    weights = check_weights(WHERE, weights, x)
    data = {"x": x, "x0": x0, "context": context}
    faults = faults_of(WHERE, data, weights=weights, axis_name=axis_name)
    weights, _ = normalized(weights, x, axis_name)
    base_key, time_key, pair_key = jax.random.split(key, 3)
    if x0 is None:
        z0 = _base_samples(flow.base, base_key, x, axis_name)
    else:
        z0 = _check_start(check_samples(WHERE, "x0", x0, event), x)
    z0, wrong = _paired(coupling, pair_key, z0, x, context)
    if wrong is not None:
        # Through the weights, so that the gradient is NaN, too.
        weights = jnp.where(wrong.any(), jnp.nan, weights)
        faults[
            f"{WHERE}(coupling=...): must return a permutation of the rows; got something else in "
            "{rows}. Return each row number once."
        ] = lambda: wrong
    u = _stratified(time_key, x, axis_name)
    # Parameters that vary like the rows have a gradient that crosses between devices once.
    params, x, z0 = vary_alike((params, x, z0))
    t0, t1 = (jnp.asarray(t, x.dtype) for t in (flow.t0, flow.t1))
    span = t1 - t0

    def squared_error(u, z0, x, context):
        z = (1 - u) * z0 + u * x
        args = params if context is None else (params, context)
        dz = call_field(flow.f, t0 + u * span, z, args)
        check_derivative(WHERE, z, dz)
        return jnp.mean((jnp.asarray(dz, x.dtype) - (x - z0) / span) ** 2)

    errors = jax.vmap(squared_error)(u, z0, x, context)
    loss = jnp.sum(weights * errors)
    finite = jnp.isfinite(jax.lax.stop_gradient(loss))
    result = jnp.where(finite, int(Result.SUCCESS), int(Result.NON_FINITE))
    no_time = jnp.where(finite, 0.0, jnp.nan).astype(loss.dtype)
    return loss_or_raise(WHERE, loss, result, no_time, flow.throw, faults)


def _base_samples(base: BaseDensity, key, x: Float[Array, "batch *event"], axis_name):
    """One for each row, from the key and the row's number. They are data: the base learns nothing.

    A base that follows the gradient of this loss would shrink to a point, which is easy to match.
    """
    draw = lambda i: base.sample(jax.random.fold_in(key, i), ())
    z0 = jax.vmap(draw)(row_numbers(x, key, axis_name))
    if z0.shape != x.shape:
        raise ValueError(
            f"cnf(base=...): sample(key, ()) must have the shape of an event, {x.shape[1:]}; got "
            f"{z0.shape[1:]}."
        )
    return jax.lax.stop_gradient(jnp.asarray(z0, x.dtype))


def _stratified(key, x: Float[Array, "batch *event"], axis_name) -> Float[Array, " batch"]:
    """Uniform times in [0, 1], one in each of as many equal parts as the whole batch has rows.

    Which part a row has is a random shift of a fixed permutation, since a random permutation costs
    a tenth of the step of a small network.
    """
    count = row_count(x, key, axis_name)
    draws = jax.random.uniform(key, (count + 1,), jnp.float32).astype(x.dtype)
    shift = (draws[-1] * count).astype(jnp.int32)
    part = (jnp.asarray(_scattered(count)) + shift) % count
    u = (part.astype(x.dtype) + draws[:-1]) / count
    return u if count == x.shape[0] else u[row_numbers(x, key, axis_name)]


def _scattered(count: int) -> np.ndarray:
    """A permutation by multiples of about the golden ratio, which puts neighbors far apart."""
    stride = round(count * GOLDEN) or 1
    while math.gcd(stride, count) > 1:
        stride += 1
    return (np.arange(count) * stride % count).astype(np.int32)


def _paired(
    coupling: Coupling, key, z0: Float[Array, "batch *event"], x, context
) -> tuple[Float[Array, "batch *event"], Any]:
    """The base sample of each row of the data, and where this is not one for each."""
    if not isinstance(coupling, Coupling):
        raise TypeError(
            f"{WHERE}(coupling=...): must be a Coupling; got {coupling!r}. Use a function of "
            "jaxode.coupling, called: jaxode.coupling.independent(); or, of your own, "
            "jaxode.coupling.Coupling(pair)."
        )
    rows = coupling.pair(key, *jax.lax.stop_gradient((z0, x, context)))
    if rows is None:
        return z0, None
    batch = x.shape[0]
    if jnp.shape(rows) != (batch,) or not jnp.issubdtype(jnp.result_type(rows), jnp.integer):
        raise ValueError(
            f"{WHERE}(coupling=...): must return one row number a sample, integers of shape "
            f"{(batch,)}; got {jnp.result_type(rows)} of shape {jnp.shape(rows)}."
        )
    rows = jnp.asarray(rows)
    wrong = jnp.sort(rows) != jnp.arange(batch, dtype=rows.dtype)
    if is_known(wrong) and np.any(wrong):
        raise ValueError(
            f"{WHERE}(coupling=...): must return a permutation of the {batch} rows; got "
            f"{np.asarray(rows)}."
        )
    return z0[rows], wrong


def _check_start(
    x0: Float[Array, "rows *event"], x: Float[Array, "batch *event"]
) -> Float[Array, "batch *event"]:
    """Start samples, one for each row of the data."""
    if x0.shape != x.shape:
        raise ValueError(
            f"{WHERE}(x0=...): must have one start sample for each of the {x.shape[0]} rows of x; "
            f"got {x0.shape[0]}. Draw as many of each, with replacement if one set is smaller."
        )
    return x0.astype(x.dtype)
