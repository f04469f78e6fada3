"""Flow matching: the regression loss of `CNF.matching_loss`, which gives the equations.

References: Lipman et al. (2022), arXiv:2210.02747; Tong et al. (2023), arXiv:2302.00482.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxode._checks.arguments import check_args, check_derivative, check_number, state_dtype, takes
from jaxode._checks.caller import arg
from jaxode._checks.errors import Result, report_loss
from jaxode._checks.rules import (
    DIFFER,
    FINITE_BASE,
    NO_OVERFLOW,
    PERIODIC,
    PERMUTATION,
    POSITIVE,
    data_faults,
    finite_rows,
    is_known,
    weights_faults,
)
from jaxode._checks.samples import (
    check_not_empty,
    check_rows,
    check_samples,
    check_weights,
    normalized,
)
from jaxode._checks.times import check_times
from jaxode._jax.sharding import axes_of, row_count, row_numbers, vary, vary_alike
from jaxode.flows.bases import BaseDensity
from jaxode.flows.coupling import Coupling
from jaxode.flows.keys import of_each_row
from jaxode.flows.periods import off_period, turned
from jaxode.ode.adjoints.base import nan_unless
from jaxode.ode.field import call_field, of_row


def matching_loss(
    flow: Any, params, x, key, x0, context, weights, coupling: Coupling, time_power
) -> Float[Array, ""]:
    """`flow.matching_loss`, which explains the arguments."""
    axis_name = flow.solve_options.axis_name
    event = tuple(flow.base.event_shape)
    x = check_samples("x", x, event)
    x = x.astype(state_dtype(x))
    check_not_empty(x)
    context = check_rows("context", context, x.shape[0])
    params = check_args("params", params)
    given = check_weights(weights, x)
    weights, _ = normalized(given, x, axis_name)
    t0, t1, *_ = check_times(flow.t0, flow.t1, None, x.dtype)
    faults = DIFFER.check(t0, t1) | weights_faults(given, axis_name)
    # NaN if only the run can tell that the times are wrong.
    span = jnp.where(DIFFER.holds(t0, t1), jnp.asarray(t1 - t0), jnp.nan)
    base_key, time_key, pair_key = jax.random.split(key, 3)
    if x0 is None:
        z0 = _base_samples(flow.base, base_key, x, axis_name)
        start = FINITE_BASE.fault(z0, where="cnf")
    else:
        z0 = _check_start(check_samples("x0", x0, event), x)
        start = data_faults({"x0": z0}, given)
    rows = _paired_rows(coupling, pair_key, flow.base, z0, x, context, given)
    if rows is not None:
        permuted = (jnp.sort(rows) == jnp.arange(len(rows), dtype=rows.dtype)).all()
        if not (is_known(permuted) and permuted):  # which rows are wrong takes longer to find
            faults |= PERMUTATION.check(rows)
        # Set through the weights, so that the gradient is NaN, too.
        weights = jnp.where(permuted, weights, jnp.nan)
        z0 = z0[rows]
    faults |= data_faults({"x": x}, given) | start
    of_context = data_faults({"context": context}, given)
    if given is not None:
        # Zero times NaN is NaN, so another row stands in for one of weight zero.
        data = jax.tree.map(jnp.asarray, (x, z0, context))
        finite = finite_rows(*filter(eqx.is_inexact_array, jax.tree.leaves(data)))
        # This device may have no other one.
        some = jnp.any(weights != 0)
        source = jnp.argmax(jnp.where(some, weights, finite.astype(weights.dtype)))
        rows = jnp.where(weights == 0, source, jnp.arange(x.shape[0]))
        there = some | finite.any()
        stand_in = lambda leaf: jnp.where(there, leaf[rows], jnp.zeros_like(leaf))
        x, z0, context = jax.tree.map(stand_in, data)
    check_number("time_power", time_power)
    faults |= POSITIVE.check(time_power, name="time_power")
    u = _stratified(time_key, x, axis_name)
    if not (is_known(time_power) and time_power == 1):
        power = jnp.asarray(time_power, x.dtype)
        u = 1 - (1 - u) ** jnp.where(POSITIVE.holds(power), power, jnp.nan)
    # Make the parameters vary like the rows: devices then exchange their gradient once.
    params, x, z0 = vary_alike((params, x, z0))

    arc, count, points = getattr(flow.base, "arc", None), x.shape[0], turned(flow.base, x)
    if points is not None:  # more rows are cheaper than another evaluation
        u, z0, x, context = _with_points(points, u, z0, x, context)

    def squared_error(u, z0, x, context):
        x = x if arc is None else z0 + arc(x - z0)  # the shorter way around
        z = (1 - u) * z0 + u * x
        args = of_row(params, context)
        dz = call_field(flow.f, t0 + u * span, z, args)
        check_derivative(z, dz)
        finite = jnp.isfinite(jax.lax.stop_gradient(dz)).all()
        dz = jnp.asarray(dz, x.dtype)
        return jnp.mean((dz - (x - z0) / span) ** 2), finite, dz

    errors, finite, dz = jax.vmap(squared_error)(u, z0, x, context)
    errors, finite, of_points = errors[:count], finite[:count], dz[count:]
    if points is not None:
        off = off_period(flow.base, of_points, span)
        faults = PERIODIC.fault(off, name="params") | faults
        weights = jnp.where(PERIODIC.holds(off), weights, jnp.nan)
    failed = ~jnp.isfinite(jax.lax.stop_gradient(errors))
    for sentence, find in of_context.items():
        # A field may accept NaN in the context. Then rows without NaN fail as well.
        faults[sentence] = lambda find=find: find() & ~jnp.any(failed & ~find())
    faults |= NO_OVERFLOW.fault(errors, finite)
    loss = jnp.sum(weights * errors)
    ok = jnp.isfinite(jax.lax.stop_gradient(loss))
    loss = loss * nan_unless(ok, loss.dtype)  # the gradient of one that overflows may be finite
    result = jnp.where(ok, Result.SUCCESS, Result.NON_FINITE)
    no_time = jnp.where(ok, 0.0, jnp.nan).astype(loss.dtype)
    return report_loss(loss, result, no_time, flow.throw, faults)


def _base_samples(base: BaseDensity, key, x: Float[Array, "batch *event"], axis_name):
    """Draw one base sample per row, from the key and the row's number, without gradients.

    A base that followed the gradient of this loss would shrink to a point, which is easy to match.
    """
    z0 = of_each_row(lambda key, _: base.sample(key, ()), key, x, axis_name)
    if z0.shape != x.shape:
        raise ValueError(
            f"cnf(base=...): sample(key, ()) must have the shape of an event, {x.shape[1:]}; got "
            f"{z0.shape[1:]}."
        )
    return jax.lax.stop_gradient(jnp.asarray(z0, x.dtype))


def _with_points(points: Float[Array, "points *event"], u, z0, x, context):
    """The rows, and as many more as there are points, each of which rests at its point."""
    spread = lambda leaf: jnp.broadcast_to(leaf[:1], (len(points), *leaf.shape[1:]))
    context = jax.tree.map(lambda leaf: jnp.concatenate([leaf, spread(leaf)]), context)
    half = vary(jnp.full(len(points), 0.5, u.dtype), axes_of(u))
    z0, x = (jnp.concatenate([rows, points]) for rows in (z0, x))
    return jnp.concatenate([u, half]), z0, x, context


def _stratified(key, x: Float[Array, "batch *event"], axis_name) -> Float[Array, " batch"]:
    """Stratified uniform times in [0, 1]: one in each of `n` equal parts, for `n` rows in the whole
    batch.

    A fixed permutation with a random shift assigns the parts. A random permutation would take a
    tenth of the training step of a small network.
    """
    count = row_count(x, key, axis_name)
    draws = jax.random.uniform(key, (count + 1,), jnp.float32).astype(x.dtype)
    shift = (draws[-1] * count).astype(jnp.int32)
    part = (jnp.asarray(_scattered(count)) + shift) % count
    u = (part.astype(x.dtype) + draws[:-1]) / count
    return u if count == x.shape[0] else u[row_numbers(x, key, axis_name)]


def _scattered(count: int) -> np.ndarray:
    """A permutation by multiples of about the golden ratio, so neighbors end up far apart."""
    stride = round(count * (5**0.5 - 1) / 2)
    while math.gcd(stride, count) > 1:
        stride += 1
    return (np.arange(count) * stride % count).astype(np.int32)


def _paired_rows(
    coupling: Coupling, key, base, z0: Float[Array, "batch *event"], x, context, weights
) -> Int[Array, " batch"] | None:
    """The number of the base sample of each row. None if they stay as drawn."""
    if not isinstance(coupling, Coupling) or not takes(coupling.pair, key, z0, x, context):
        raise TypeError(
            f"{arg('coupling')} must be a Coupling; got {coupling!r}. Use a function of "
            "jaxode.coupling, called: jaxode.coupling.independent(); or, for your own, "
            "jaxode.coupling.Coupling(pair) with pair(key, z, x, context)."
        )
    if hasattr(base, "chords"):  # across the cut, too, near is near
        z0, x = base.chords(z0), base.chords(x)
    rows = coupling.pair(key, *jax.lax.stop_gradient((z0, x, context)))
    if rows is None:
        return None
    if weights is not None:
        # A permutation gives each row one base sample, whatever its weight: light rows would keep
        # base samples that heavy rows need, and bias the density.
        raise ValueError(
            f"{arg('weights')} must be left out with a coupling that pairs rows, for which all "
            f"rows count the same; got weights with {coupling.pair!r}. Draw rows by their weights "
            "instead, or use jaxode.coupling.independent()."
        )
    if not isinstance(rows, jax.Array | np.ndarray):
        raise TypeError(
            f"{arg('coupling')} must return an array of row numbers, or None; got "
            f"{type(rows).__name__}. Return jnp.array of it."
        )
    batch = x.shape[:1]
    if rows.shape != batch or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"{arg('coupling')} must return one row number per sample, integers of shape "
            f"{batch}; got {rows.dtype} of shape {rows.shape}."
        )
    return jnp.asarray(rows)


def _check_start(
    x0: Float[Array, "rows *event"], x: Float[Array, "batch *event"]
) -> Float[Array, "batch *event"]:
    """Start samples, one for each row of the data."""
    if x0.shape != x.shape:
        raise ValueError(
            f"{arg('x0')} must have one start sample for each of the {x.shape[0]} rows of x; "
            f"got {x0.shape[0]}. Draw as many of each, with replacement if one set is smaller."
        )
    return x0.astype(x.dtype)
