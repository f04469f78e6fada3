"""Flow matching: train the vector field of a flow by regression, without a solve.

A straight path joins a base sample `z0` and a data sample `x`, and the field is fitted to its
velocity. With `u = 1 - (1 - v)^time_power` and `v` uniform in [0, 1],

    z_t = (1 - u) z0 + u x  at the time  t = t0 + u (t1 - t0),
    loss = mean over rows and coordinates of (f(t, z_t) - (x - z0) / (t1 - t0))^2.

The field that minimizes the loss carries the base density to the data density.

References: Lipman et al. (2022), arXiv:2210.02747; Tong et al. (2023), arXiv:2302.00482.
"""

import functools
import inspect
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxode._checks.arguments import (
    Time,
    check_args,
    check_derivative,
    check_positive,
    is_known,
    state_dtype,
)
from jaxode._checks.data import base_faults, data_faults, loss_or_raise, weights_faults
from jaxode._checks.errors import Faults, Result, in_rows
from jaxode._checks.samples import (
    check_context,
    check_not_empty,
    check_samples,
    check_weights,
    normalized,
)
from jaxode._checks.times import check_times
from jaxode._jax.sharding import AxisName, row_count, row_numbers, vary_alike
from jaxode.coupling import Coupling, independent
from jaxode.distributions import BaseDensity
from jaxode.flows.likelihood.quadrature import GOLDEN
from jaxode.ode.field import VectorField, call_field

WHERE = "matching_loss"
_NO_PERMUTATION = (
    f"{WHERE}(coupling=...): must return a permutation of the rows; got numbers that are out of "
    "range or there twice in {rows}. Return each row number once."
)


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
    time_power: float = 1.0,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """The loss of `CNF.matching_loss`. `axis_name` is the flow's."""
    event = tuple(flow.base.event_shape)
    x = check_samples(WHERE, "x", x, event)
    x = x.astype(state_dtype(x))
    check_not_empty(WHERE, x)
    context = check_context(WHERE, context, x.shape[0])
    params = check_args(WHERE, "params", params)
    given = check_weights(WHERE, weights, x)
    weights, _ = normalized(given, x, axis_name)
    t0, span, faults = _span(flow, x.dtype)
    faults |= weights_faults(WHERE, given, axis_name)
    base_key, time_key, pair_key = jax.random.split(key, 3)
    if x0 is None:
        z0 = _base_samples(flow.base, base_key, x, axis_name)
        start = base_faults(z0)
    else:
        z0 = _check_start(check_samples(WHERE, "x0", x0, event), x)
        start = data_faults(WHERE, {"x0": z0}, given)
    z0, permuted = _paired(coupling, pair_key, z0, x, context)
    if permuted is not None:
        if given is not None:
            # A permutation gives each row one base sample, whatever its weight: light rows would
            # keep base samples that heavy rows need, and bias the density.
            raise ValueError(
                f"{WHERE}(weights=...): must be left out with a coupling that pairs rows, for "
                f"which all rows count the same; got weights with {coupling.pair!r}. Draw rows by "
                "their weights instead, or use jaxode.coupling.independent()."
            )
        # Set through the weights, so that the gradient is NaN, too.
        wrong, faults[_NO_PERMUTATION] = permuted
        weights = jnp.where(wrong, jnp.nan, weights)
    faults |= data_faults(WHERE, {"x": x}, given) | start
    of_context = data_faults(WHERE, {"context": context}, given)
    if given is not None:
        # Zero times NaN is NaN, so another row stands in for one of weight zero.
        rows = jnp.where(weights == 0, jnp.argmax(weights), jnp.arange(x.shape[0]))
        x, z0, context = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], (x, z0, context))
    check_positive(WHERE, "time_power", time_power)
    u = _stratified(time_key, x, axis_name)
    if not (is_known(time_power) and time_power == 1):
        u = 1 - (1 - u) ** jnp.asarray(time_power, x.dtype)
    # Make the parameters vary like the rows: devices then exchange their gradient once.
    params, x, z0 = vary_alike((params, x, z0))

    def squared_error(u, z0, x, context):
        z = (1 - u) * z0 + u * x
        args = params if context is None else (params, context)
        dz = call_field(flow.f, t0 + u * span, z, args)
        check_derivative(WHERE, z, dz)
        finite = jnp.isfinite(jax.lax.stop_gradient(dz)).all()
        return jnp.mean((jnp.asarray(dz, x.dtype) - (x - z0) / span) ** 2), finite

    errors, finite = jax.vmap(squared_error)(u, z0, x, context)
    failed = ~jnp.isfinite(jax.lax.stop_gradient(errors))
    for told, find in of_context.items():
        # A field may accept NaN in the context. Then rows without NaN fail as well.
        faults[told] = lambda find=find: find() & ~jnp.any(failed & ~find())
    faults[
        f"{WHERE}(x=...): squared differences to the vector field must be finite in {x.dtype}; got "
        "an overflow in {rows}, where the field is finite. Scale the data, or look for a field "
        "that explodes."
    ] = lambda: failed & finite
    loss = jnp.sum(weights * errors)
    ok = jnp.isfinite(jax.lax.stop_gradient(loss))
    result = jnp.where(ok, int(Result.SUCCESS), int(Result.NON_FINITE))
    no_time = jnp.where(ok, 0.0, jnp.nan).astype(loss.dtype)
    return loss_or_raise(WHERE, loss, result, no_time, flow.throw, faults)


def _span(flow: Flow, dtype) -> tuple[Any, Any, Faults]:
    """The base time, the nonzero time from base to data, and the faults of both.

    A fault that is known only at run time makes the span NaN.
    """
    t0, t1, *_ = check_times(WHERE, flow.t0, flow.t1, None, dtype)
    if is_known((t0, t1)) and t0 == t1:
        raise ValueError(
            f"{WHERE}(t0=..., t1=...): must differ; got {float(t0)!r} for both. Pass the time of "
            "the base as t0 of cnf, and the time of the data as t1."
        )
    span = jnp.asarray(t1 - t0)
    span = jnp.where((span != 0) & jnp.isfinite(span), span, jnp.nan)
    rule = (
        f"{WHERE}(t0=..., t1=...): must be finite times that differ in {dtype}, the precision of "
        "the samples. Shift the time, or use float64 for the samples."
    )
    return jnp.asarray(t0), span, {rule: lambda: jnp.isnan(jax.lax.stop_gradient(span))}


def _base_samples(base: BaseDensity, key, x: Float[Array, "batch *event"], axis_name):
    """One base sample per row, from the key and the row's number, without gradients.

    A base that followed the gradient of this loss would shrink to a point, which is easy to match.
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
    stride = round(count * GOLDEN) or 1
    while math.gcd(stride, count) > 1:
        stride += 1
    return (np.arange(count) * stride % count).astype(np.int32)


def _paired(
    coupling: Coupling, key, z0: Float[Array, "batch *event"], x, context
) -> tuple[Float[Array, "batch *event"], Any]:
    """The base sample of each row; and, for a permutation, whether and where it is not one."""
    if not isinstance(coupling, Coupling) or not _takes(coupling.pair, key, z0, x, context):
        raise TypeError(
            f"{WHERE}(coupling=...): must be a Coupling; got {coupling!r}. Use a function of "
            "jaxode.coupling, called: jaxode.coupling.independent(); or, for your own, "
            "jaxode.coupling.Coupling(pair) with pair(key, z, x, context)."
        )
    rows = coupling.pair(key, *jax.lax.stop_gradient((z0, x, context)))
    if rows is None:
        return z0, None
    if not isinstance(rows, jax.Array | np.ndarray):
        raise TypeError(
            f"{WHERE}(coupling=...): must return an array of row numbers, or None; got "
            f"{type(rows).__name__}. Return jnp.array of it."
        )
    batch = x.shape[0]
    if rows.shape != (batch,) or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"{WHERE}(coupling=...): must return one row number per sample, integers of shape "
            f"{(batch,)}; got {rows.dtype} of shape {rows.shape}."
        )
    rows = jnp.asarray(rows)
    in_order = jnp.sort(rows)
    wrong = (in_order != jnp.arange(batch, dtype=rows.dtype)).any()
    find = functools.partial(_outside_or_twice, rows, in_order)
    if is_known(wrong) and wrong:
        raise ValueError(_NO_PERMUTATION.format(rows=in_rows(find())))
    return z0[rows], (wrong, find)


def _outside_or_twice(
    rows: Int[Array, " batch"], in_order: Int[Array, " batch"]
) -> Bool[Array, " batch"]:
    """Which row numbers are out of range or occur twice."""
    first, end = (jnp.searchsorted(in_order, rows, side=side) for side in ("left", "right"))
    return (rows < 0) | (rows >= len(rows)) | (end - first > 1)


def _takes(function: Any, *args: Any) -> bool:
    """Whether the function accepts these arguments, as far as Python knows."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:
        return True  # not known
    return True


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
