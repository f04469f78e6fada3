"""What the gradient methods share: the forward solve, its recorded steps, and its failure."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.internal import nondifferentiable_backward
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._jax.closure import ClosedField
from jaxode._jax.sharding import while_loop
from jaxode.ode.loop.checkpoints import Checkpoints
from jaxode.ode.loop.integrate import Field, Integration, integrate, save_times_at, stages
from jaxode.ode.loop.method import Method, weighted_sum
from jaxode.ode.loop.tableau import Tableau


def run(inputs, method: Method, checkpoints: int | None = None) -> tuple[Integration, Any]:
    """The forward solve and, with a number of checkpoints, the tape of its steps."""
    field, args, y0, t0, t1, ts = inputs
    return integrate(lambda t, y: field(t, y, args), method, y0, t0, t1, ts, checkpoints)


def split(inputs, perturbed):
    """The differentiated leaves of `(field, args)`, and the field as a function of them."""
    if isinstance(inputs[0], ClosedField):
        inputs[0].check_closed_over(perturbed[0], inputs[2])
    params, rest = eqx.partition(inputs[:2], perturbed[:2])

    def apply(params, t, y):
        field, args = eqx.combine(params, rest)
        return field(t, y, args)

    return params, apply


def nan_unless(ok: Bool[Array, "*rows"], dtype) -> Float[Array, "*rows"]:
    """The factor of a gradient: one, or NaN, of which the tangents are NaN as well."""
    return jnp.where(ok, 1.0, jnp.nan).astype(dtype)


def output_is_inside(ts, saved, t, number, sign) -> Bool[Array, " rows"]:
    """Whether the last of the `saved` outputs lies in step `number` (from 1), which starts at `t`.

    All that are left belong to the first step.
    """
    return (saved > 0) & ((sign * (save_times_at(ts, saved - 1) - t) > 0) | (number == 1))


def interval(times: Float[Array, "steps+1 rows"], index: Int[Array, ""]):
    """Start and size of a recorded step, per row; size zero for a row that waited."""
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
) -> tuple[Float[Array, "rows n"], Float[Array, "stages rows n"], Checkpoints]:
    """The start and the stages of the last recorded step before number `stop`.

    Steps are taken again from the latest checkpoint, with their first `count` stages, and those on
    the way are kept as slots allow.
    """
    start, y, k, known = checkpoints.latest_before(stop)
    spacing = checkpoints.spacing(start, stop)
    # With stages of zero, the step before leads to this state; the first loop evaluates them.
    index = start - 1 + known.astype(start.dtype)
    none = jnp.zeros((count, *y.shape), y.dtype)
    k = none if k is None else jnp.where(known, k[:count], none)
    b = jnp.asarray(tableau.b[:count], y.dtype)

    def advance(carry):
        """To the next step, whose stages are evaluated."""
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


def once_only(name: str, cotangents: PyTree) -> PyTree:
    """The cotangents of a solve, with an error if they are differentiated in reverse mode."""
    message = (
        f"{name}: the gradient of a solve can be differentiated in forward mode only, as in "
        "jax.jacfwd(jax.grad(...)). Use adjoint=jaxode.BacksolveAdjoint() for reverse over reverse."
    )
    return nondifferentiable_backward(cotangents, msg=message)
