"""Flow matching: the regression loss of `CNF.matching_loss`, which gives the equations.

References: Lipman et al. (2022), arXiv:2210.02747; Tong et al. (2023), arXiv:2302.00482.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._checks.arguments import (
    check_args,
    check_axis,
    check_derivative,
    check_number,
    state_dtype,
    takes,
)
from jaxode._checks.caller import arg
from jaxode._checks.errors import Result, report_loss
from jaxode._checks.rules import (
    DIFFER,
    FINITE_BASE,
    NO_OVERFLOW,
    PERIODIC,
    PERMUTATION,
    POSITIVE,
    Faults,
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
from jaxode._jax.sharding import row_count, row_numbers, vary_alike
from jaxode.coupling import Coupling
from jaxode.flows.bases import BaseDensity, Torus
from jaxode.flows.embedding import embedded
from jaxode.flows.keys import of_each_row
from jaxode.flows.periods import Turns, off_period, turns_of
from jaxode.ode.adjoints.base import nan_unless
from jaxode.ode.field import VectorField, call_field, of_row


class Paths(NamedTuple):
    """Straight paths from start samples to data, one per row, and a time on each."""

    u: Float[Array, " batch"]
    """The times, from 0 at the start to 1 at the data."""
    z0: Float[Array, "batch *event"]
    x: Float[Array, "batch *event"]
    context: PyTree


def matching_loss(
    flow: Any, params, x, key, x0, context, weights, coupling: Coupling, time_power
) -> Float[Array, ""]:
    """`flow.matching_loss`, which explains the arguments."""
    base, axis_name = flow.base, flow.solve_options.axis_name
    check_axis(axis_name)
    x = check_samples("x", x, tuple(base.event_shape))
    x = x.astype(state_dtype(x))
    check_not_empty(x)
    context = check_rows("context", context, x.shape[0])
    params, context = embedded(check_args("params", params), context)
    row_weights = check_weights(weights, x)
    weights, _ = normalized(row_weights, x, axis_name)
    t0, t1, *_ = check_times(flow.t0, flow.t1, None, x.dtype)
    faults = DIFFER.check(t0, t1) | weights_faults(row_weights, axis_name)
    # NaN if only the run can tell that the times are wrong.
    span = jnp.where(DIFFER.holds(t0, t1), jnp.asarray(t1 - t0), jnp.nan)
    base_key, time_key, pair_key = jax.random.split(key, 3)
    z0, of_start = _start_samples(base, base_key, x0, x, row_weights, axis_name)
    order = _paired_rows(coupling, pair_key, base, z0, x, context, row_weights)
    if order is not None:
        permuted, of_order = _check_permutation(order)
        faults |= of_order
        # Weights make the loss NaN, so that its gradient is NaN, too.
        weights, z0 = jnp.where(permuted, weights, jnp.nan), z0[order]
    faults |= data_faults({"x": x}, row_weights) | of_start
    of_context = data_faults({"context": context}, row_weights)
    if row_weights is not None:
        x, z0, context = _with_stand_ins(weights, (x, z0, context))
    u, of_power = _path_times(time_key, x, axis_name, time_power)
    # Make the parameters vary like the rows: devices then exchange their gradient once.
    params, x, z0 = vary_alike((params, x, z0))
    errors, finite, off = _errors_and_periods(flow, params, Paths(u, z0, x, context), t0, span)
    faults |= of_power
    if off is not None:
        faults = PERIODIC.fault(off, name="params") | faults
        weights = jnp.where(PERIODIC.holds(off), weights, jnp.nan)
    faults |= _unless_others_fail(of_context, errors) | NO_OVERFLOW.fault(errors, finite)
    return _reported(jnp.sum(weights * errors), faults, flow.throw)


def squared_errors(
    f: VectorField, params: PyTree, paths: Paths, t0: Any, span: Any, torus: Torus | None = None
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"], Float[Array, "batch *event"]]:
    """The loss of each row: the mean of `(f(t, z_t) - (x - z0) / span)^2` over its coordinates.

    The path is `z_t = (1 - u) z0 + u x`, at the time `t = t0 + u span`.

    Args:
        f: vector field of one sample, as for `jaxode.cnf`.
        params: its parameters.
        paths: the paths, and where on them.
        t0: time of the start samples.
        span: time from there to the data.
        torus: the base, if there are angles: paths take the shorter way around, and the field
            counts in radians.

    Returns:
        The losses, whether the field is finite, and its values.
    """

    def of_path(u, z0, x, context):
        x = x if torus is None else z0 + torus.arc(x - z0)
        z = (1 - u) * z0 + u * x
        args = of_row(params, context)
        dz = call_field(f, t0 + u * span, z, args)
        check_derivative(z, dz)
        finite = jnp.isfinite(jax.lax.stop_gradient(dz)).all()
        dz = jnp.asarray(dz, x.dtype)
        off = dz - (x - z0) / span
        if torus is not None:
            off = off / jnp.asarray(torus.radius.reshape(torus.event_shape), x.dtype)
        return jnp.mean(off**2), finite, dz

    return jax.vmap(of_path)(*paths)


def _errors_and_periods(flow: Any, params: PyTree, paths: Paths, t0: Any, span: Any):
    """`squared_errors` without the values, and how far the field is off its periods, if the base
    has any."""
    base, count = flow.base, len(paths.x)
    turns = turns_of(base, paths.x)
    if turns is not None:  # one evaluation with more rows is cheaper than two
        paths = _with_turns(turns, paths)
    torus = base if isinstance(base, Torus) else None
    errors, finite, dz = squared_errors(flow.f, params, paths, t0, span, torus)
    off = None if turns is None else off_period(base, dz[count:], span)
    return errors[:count], finite[:count], off


def _unless_others_fail(of_context: Faults, errors: Float[Array, " batch"]) -> Faults:
    """The faults of the context, unless rows without such a fault fail, too.

    A field may accept NaN in the context: then it is not why rows fail.
    """
    failed = ~jnp.isfinite(jax.lax.stop_gradient(errors))

    def alone(find):
        return lambda: find() & ~jnp.any(failed & ~find())

    return {sentence: alone(find) for sentence, find in of_context.items()}


def _reported(loss: Float[Array, ""], faults: Faults, throw: bool | None) -> Float[Array, ""]:
    """The loss. NaN with its gradient, or an error, if it is not finite."""
    ok = jnp.isfinite(jax.lax.stop_gradient(loss))
    loss = loss * nan_unless(ok, loss.dtype)  # the gradient of one that overflows may be finite
    result = jnp.where(ok, Result.SUCCESS, Result.NON_FINITE)
    no_time = jnp.where(ok, 0.0, jnp.nan).astype(loss.dtype)
    return report_loss(loss, result, no_time, throw, faults)


def _start_samples(
    base: BaseDensity, key, x0, x: Float[Array, "batch *event"], row_weights, axis_name
):
    """A start sample for each row, of the user or of the base, and the faults that it may have."""
    if x0 is None:
        z0 = _base_samples(base, key, x, axis_name)
        return z0, FINITE_BASE.fault(z0, where="cnf")
    z0 = _check_start(check_samples("x0", x0, x.shape[1:]), x)
    return z0, data_faults({"x0": z0}, row_weights)


def _check_permutation(rows: Int[Array, " batch"]) -> tuple[Bool[Array, ""], Faults]:
    """Whether each row number occurs once. Raises if it is known that one does not."""
    permuted = (jnp.sort(rows) == jnp.arange(len(rows), dtype=rows.dtype)).all()
    if is_known(permuted) and permuted:
        return permuted, {}
    return permuted, PERMUTATION.check(rows)  # finding the wrong rows takes longer


def _with_stand_ins(weights: Float[Array, " batch"], data: PyTree) -> PyTree:
    """Replace rows of weight zero, which may hold NaN, by another row of the data.

    Zero times NaN is NaN. Zeros stand in if this device has no other row.
    """
    data = jax.tree.map(jnp.asarray, data)
    finite = finite_rows(*filter(eqx.is_inexact_array, jax.tree.leaves(data)))
    weighted = jnp.any(weights != 0)
    source = jnp.argmax(jnp.where(weighted, weights, finite.astype(weights.dtype)))
    rows = jnp.where(weights == 0, source, jnp.arange(len(weights)))
    has_stand_in = weighted | finite.any()

    def stand_in(leaf):
        return jnp.where(has_stand_in, leaf[rows], jnp.zeros_like(leaf))

    return jax.tree.map(stand_in, data)


def _path_times(
    key, x: Float[Array, "batch *event"], axis_name, time_power
) -> tuple[Float[Array, " batch"], Faults]:
    """`u = 1 - (1 - v)^time_power` for stratified `v`, and the faults of the power."""
    check_number("time_power", time_power)
    faults = POSITIVE.check(time_power, name="time_power")
    v = _stratified(key, x, axis_name)
    if is_known(time_power) and time_power == 1:
        return v, faults
    power = jnp.asarray(time_power, x.dtype)
    return 1 - (1 - v) ** jnp.where(POSITIVE.holds(power), power, jnp.nan), faults


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


def _with_turns(turns: Turns, paths: Paths) -> Paths:
    """Append a path for each turn, which stays at one event."""
    u, z0, x, context = paths

    def spread(leaf):
        return jnp.broadcast_to(leaf[:1], (len(turns.u), *leaf.shape[1:]))

    context = jax.tree.map(lambda leaf: jnp.concatenate([leaf, spread(leaf)]), context)
    z0, x = (jnp.concatenate([rows, turns.z]) for rows in (z0, x))
    return Paths(jnp.concatenate([u, turns.u.astype(u.dtype)]), z0, x, context)


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
    if isinstance(base, Torus):  # so that distances do not jump at the cut
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
