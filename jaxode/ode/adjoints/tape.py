"""What the gradient methods share: the recorded steps of a forward solve, and its failure."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._checks.arguments import integer
from jaxode._checks.errors import Result
from jaxode._jax.closure import ClosedField
from jaxode._jax.primitives import nondifferentiable_backward, reverse_only
from jaxode._jax.sharding import while_loop
from jaxode.ode.loop.checkpoints import Checkpoints
from jaxode.ode.loop.integrate import Field, Integration, stages
from jaxode.ode.loop.outputs import save_times_at
from jaxode.ode.loop.problem import Problem
from jaxode.ode.loop.rows import over_rows
from jaxode.ode.loop.stepper import weighted_sum
from jaxode.ode.loop.tableau import Tableau

T = TypeVar("T")


def without_cotangent(rows: Bool[Array, " rows"], out: Integration) -> Bool[Array, " rows"]:
    """The `rows` whose cotangents `out` are zero: nothing depends on them."""
    if out.y1 is not None:
        rows &= over_rows(jnp.all, out.y1 == 0, rows.shape[0])
    if out.ys is not None:
        rows &= over_rows(jnp.all, jnp.moveaxis(out.ys == 0, 1, 0), rows.shape[0])
    if out.steps is not None:
        for bar, samples in ((out.steps.times, 1), (out.steps.y, 1), (out.steps.k, 2)):
            if bar is not None:
                rows &= over_rows(jnp.all, jnp.moveaxis(bar == 0, samples, 0), rows.shape[0])
    return rows


def unused_rows(result: Int[Array, " rows"], out: Integration) -> Bool[Array, " rows"]:
    """Failed rows on which nothing depends. They add nothing to any gradient."""
    return without_cotangent(result != Result.SUCCESS, out)


def stand_in(tree: T, unused: Bool[Array, " rows"], result: Int[Array, " rows"]) -> T:
    """Leaves `[rows, ...]`, with the first successful row in place of unused rows.

    Zero times NaN is NaN: a row must be finite to add nothing to a gradient that all rows share.
    """
    if len(unused) < 2:
        return tree
    other = jnp.argmax(result == Result.SUCCESS)
    mask = lambda x: unused.reshape(-1, *(1,) * (x.ndim - 1))
    return jax.tree.map(lambda x: jnp.where(mask(x), x[other], x), tree)


def without_unused(
    problem: Problem, unused: Bool[Array, " rows"], result: Int[Array, " rows"]
) -> Problem:
    """The problem, with the first successful row in place of unused rows."""
    shared, rows = problem.args
    own = problem._replace(field=None, args=rows, ts=None if problem.ts is None else problem.ts.T)
    own = stand_in(own, unused, result)
    ts = None if own.ts is None else own.ts.T
    return own._replace(field=problem.field, args=(shared, own.args), ts=ts)


def at_start(problem: Problem, unused: Bool[Array, " rows"], t, y):
    """The time and the state. Unused rows of a problem `without_unused` get those of the start,
    where the field is known to be finite."""
    if len(unused) < 2:
        return t, y
    return jnp.where(unused, problem.t0, t), jnp.where(unused[:, None], problem.y0, y)


def split(
    problem: Problem, perturbed: Problem, unused: Bool[Array, " rows"]
) -> tuple[PyTree, Callable[..., Array]]:
    """The differentiated leaves of `(field, args)`, and the field as a function of them."""
    if isinstance(problem.field, ClosedField):
        problem.field.check_closed_over(perturbed.field, problem.y0)
    parts = (problem.field, problem.args)
    params, rest = eqx.partition(parts, (perturbed.field, perturbed.args))

    def apply(params, t, y):
        field, args = eqx.combine(params, rest)
        return field(*at_start(problem, unused, t, y), args)

    return params, apply


def filled(bar: Array | None, like: Array) -> Array:
    """The cotangent of an output. Zero if JAX knows that nothing depends on it."""
    return jnp.zeros_like(like) if bar is None else bar


def nan_unless(ok: Bool[Array, "*rows"], dtype) -> Float[Array, "*rows"]:
    """The factor of a gradient: one, or NaN with NaN tangents."""
    return jnp.where(ok, 1.0, jnp.nan).astype(dtype)


def bars_where(
    valid: Float[Array, " rows"],
    unused: Bool[Array, " rows"],
    params: PyTree,
    *,
    y0: Any,
    t0: Any,
    t1: Any,
    ts: Any,
) -> Problem:
    """The cotangents of a problem times `valid`: per row, and for shared leaves over all rows.

    Cotangents of `unused` rows are zero, and so are shared ones if no other row is left.
    """
    shared, none = jnp.prod(valid), unused.all()
    keep = lambda leaf: jnp.where(none, 0, leaf * shared.astype(leaf.dtype))
    field, args = jax.tree.map(keep, params)
    y0 = None if y0 is None else jnp.where(unused[:, None], 0, y0 * valid[:, None])
    own = lambda leaf: jnp.where(unused, 0, leaf * valid.astype(leaf.dtype))
    t0, t1 = jax.tree.map(own, (t0, t1))
    ts = None if ts is None else jax.vmap(own)(ts)
    return Problem(field, args, y0=y0, t0=t0, t1=t1, ts=ts)


def output_count(problem: Problem) -> Int[Array, " rows"]:
    """How many outputs each row has."""
    count = 0 if problem.ts is None else problem.ts.shape[0]
    given = problem.outputs
    return jnp.full(problem.t0.shape, count, jnp.int32) if given is None else given


def output_is_inside(ts, saved, t, number, sign) -> Bool[Array, " rows"]:
    """Whether the last of the `saved` outputs lies in step `number` (from 1), which starts at `t`.

    The first step takes all that are left.
    """
    return (saved > 0) & ((sign * (save_times_at(ts, saved - 1) - t) > 0) | (number == 1))


def interval(times: Float[Array, "steps+1 rows"], index: Int[Array, ""]):
    """Start and size of a recorded step, per row. A row that waited has size zero."""
    t = jax.lax.dynamic_index_in_dim(times, index, 0, keepdims=False)
    t_next = jax.lax.dynamic_index_in_dim(times, index + 1, 0, keepdims=False)
    return t, t_next - t


def replay(
    field: Field,
    tableau: Tableau,
    count: int,
    times: Float[Array, "steps+1 rows"],
    checkpoints: Checkpoints,
    stop: Int[Array, ""],
) -> tuple[Float[Array, "samples n"], Float[Array, "stages samples n"], Checkpoints]:
    """The start and the stages of the last recorded step before number `stop`.

    Steps are retaken from the latest checkpoint, with their first `count` stages. Those on the way
    are kept as slots allow.
    """
    start, y, k, known = checkpoints.latest_before(stop)
    spacing = checkpoints.spacing(start, stop)
    # With zero stages, the previous step leads to this state. The first iteration evaluates them.
    index = start - 1 + known.astype(start.dtype)
    none = jnp.zeros((count, *y.shape), y.dtype)
    k = none if k is None else jnp.where(known, k[:count], none)
    b = jnp.asarray(tableau.b[:count], y.dtype)

    def advance(carry):
        """Go to the next step and evaluate its stages."""
        index, y, k, checkpoints = carry
        _, h = interval(times, index)
        y = jnp.where(h[:, None] == 0, y, y + h[:, None] * weighted_sum(b, k))
        index = index + 1
        t, h = interval(times, index)
        k = stages(field, tableau, t, h, y, None, count)
        keep = (index > start) & (jax.lax.rem(index - start, spacing) == 0)
        return index, y, k, checkpoints.keep_replayed(index, y, k, stop, keep)

    carry = (index, y, k, checkpoints)
    _, y, k, checkpoints = while_loop(lambda carry: carry[0] < stop - 1, advance, carry)
    return y, k, checkpoints


def in_reverse(inputs: T, name: str) -> T:
    """The inputs of a gradient method. Forward mode raises an error."""
    message = (
        f"{name}: this gradient method has reverse-mode derivatives (jax.grad, jax.vjp), but no "
        "forward mode (jax.jvp, jax.jacfwd). Use adjoint=jaxode.ForwardMode()."
    )
    return reverse_only(inputs, message)


def once_only(name: str, cotangents: PyTree) -> PyTree:
    """The cotangents of a solve. Differentiating them in reverse mode raises an error."""
    message = (
        f"{name}: the gradient of a solve can be differentiated in forward mode only, as in "
        "jax.jacfwd(jax.grad(...)). Use adjoint=jaxode.BacksolveAdjoint() for reverse over reverse."
    )
    return nondifferentiable_backward(cotangents, msg=message)


def check_checkpoints(checkpoints: int) -> None:
    """Raise unless `checkpoints` is a valid number."""
    rule = "an integer of at least 2"
    integer("checkpoints", checkpoints, least=2, rule=rule, cure=" The default is 64.")
