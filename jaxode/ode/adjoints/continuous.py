"""The adjoint ODE: its right-hand side, and a solver that keeps the parameters out of the state.

With `a(t)` the cotangent of `y(t)`, the adjoint theorem reads

    da/dt = -a df/dy,    db/dt = -a df/dparams,    b = 0 at the end,

and the gradients are `a` and `b` at the start (Pontryagin 1962; Chen et al. 2018,
arXiv:1806.07366). `b` does not feed back, so it is a quadrature: an accumulator as large as the
parameters, which is part of neither the state nor the error norm.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._checks.arguments import non_negative
from jaxode._checks.errors import Result, nan_or_raise
from jaxode._jax.pullback import vjp
from jaxode._jax.sharding import fori_loop, while_loop
from jaxode.ode.adjoints.tape import (
    bars_where,
    filled,
    nan_unless,
    split,
    unused_rows,
    without_unused,
)
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.problem import Problem
from jaxode.ode.loop.rows import over_rows
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.stepper import Stepper, aim, judge, weighted_sum
from jaxode.ode.loop.tableau import Tableau

# (t [rows], state [samples, n], weight [rows]) -> (derivative [samples, n], weighted integrand)
AdjointField = Callable[..., tuple[Float[Array, "samples n"], PyTree]]


def adjoint_product(
    apply: Callable[..., Float[Array, "samples n"]],
    params: PyTree,
    t: Float[Array, " rows"],
    y: Float[Array, "samples n"],
    a: Float[Array, "samples n"],
    weight: Float[Array, " rows"],
):
    """`f`, `-a df/dy` and `-sum over rows of weight a df/dparams`, from one `vjp`.

    Rows are independent, so scaling a row's cotangent by its weight scales its part of both
    products. The first product is then scaled back.
    """
    f, pull = vjp(lambda params, y: apply(params, t, y), params, y)
    params_bar, y_bar = pull(-weight[:, None] * a)
    moving = (weight != 0)[:, None]
    return f, jnp.where(moving, y_bar / jnp.where(moving, weight[:, None], 1.0), 0.0), params_bar


class Segment(NamedTuple):
    """The state of an adjoint solve. `h` is the next step size to try."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]
    y: Float[Array, "samples n"]
    quadrature: PyTree
    done: Bool[Array, " rows"]
    result: Int[Array, " rows"]
    accepted: Int[Array, " rows"]
    rejected: Int[Array, " rows"]
    overreach: Float[Array, " rows"]
    """What is left of the last rejected attempt if it was not finite; otherwise not positive."""

    def stats(self, tableau: Tableau) -> Stats:
        """The work done."""
        steps = self.accepted + self.rejected
        # With several rows, the stages are evaluated again once it is known which rows accept.
        passes = 1 if self.t.shape[0] == 1 else 2
        return Stats(steps, self.accepted, self.rejected, passes * tableau.stages * steps)

    @classmethod
    def start(cls, t, h, y, quadrature, failed) -> "Segment":
        """Start at the end of a forward solve. Rows that failed stay there."""
        zero = jnp.zeros(t.shape, jnp.int32)
        result = jnp.where(failed, Result.NON_FINITE, Result.SUCCESS).astype(jnp.int32)
        return cls(
            t, h, y, quadrature, jnp.zeros(t.shape, bool), result, zero, zero, jnp.zeros_like(t)
        )


def solve_segment(
    field: AdjointField,
    stepper: Stepper,
    segment: Segment,
    end: Float[Array, " rows"],
    span: Float[Array, " rows"],
) -> Segment:
    """Continue an adjoint solve to the time `end`. A failed row stays where it is.

    With equal steps, the segment takes its share of the steps of the whole `span`.
    """
    start, before = segment.t, segment.accepted
    steps = None
    if stepper.steps is not None:
        share = jnp.abs(end - start) / jnp.where(span == 0, 1.0, jnp.abs(span))
        # 1e-4 allows for rounding in the share.
        steps = jnp.maximum(jnp.ceil(share * stepper.steps - 1e-4), 1).astype(jnp.int32)

    def active(state: Segment):
        return ~state.done & (state.result == Result.SUCCESS)

    def step(state: Segment) -> Segment:
        running = active(state)
        taken = state.accepted - before
        ahead = aim(stepper, steps, state, taken, start, end)
        t_next, last = jnp.where(running, ahead.t, state.t), ahead.last
        y_next, k, quadrature_where = _stages(field, stepper, state, t_next - state.t)
        aimed = ahead._replace(t=t_next)
        accept, h_next, result, overreach = judge(stepper, state, running, aimed, y_next, k)
        # A step cut short to reach the end says little about the next one.
        longer = jnp.abs(h_next) > jnp.abs(state.h)
        return Segment(
            t=jnp.where(accept, t_next, state.t),
            h=jnp.where(accept & last & ~longer, state.h, h_next),
            y=jnp.where(accept[:, None], y_next, state.y),
            quadrature=quadrature_where(accept),
            done=state.done | (accept & last),
            result=result,
            accepted=state.accepted + accept.astype(jnp.int32),
            rejected=state.rejected + (running & ~accept).astype(jnp.int32),
            overreach=overreach,
        )

    segment = segment._replace(done=start == end)
    return while_loop(lambda state: active(state).any(), step, segment)


def _stages(field: AdjointField, stepper: Stepper, state: Segment, h: Float[Array, " rows"]):
    """The end of a step, its stages, and the quadrature as a function of which rows accept it."""
    tableau, one_row = stepper.tableau, len(state.t) == 1
    A, c = jnp.asarray(tableau.A, state.y.dtype), jnp.asarray(tableau.c, state.t.dtype)
    b = jnp.asarray(tableau.b, state.y.dtype)

    def evaluate(i, k, h, weight):
        z = state.y + h[:, None] * weighted_sum(A[i], k)
        return field(state.t + c[i] * h, z, weight)

    def add_used(i, quadrature, integrand):
        # A stage of weight zero got another weight, because its derivative is needed.
        used = b[i] != 0
        return jax.tree.map(lambda q, dq: q + used.astype(q.dtype) * dq, quadrature, integrand)

    def stage(i, carry):
        k, quadrature = carry
        k_i, integrand = evaluate(i, k, h, jnp.where(b[i] != 0, h * b[i], h))
        if one_row:
            quadrature = add_used(i, quadrature, integrand)
        return k.at[i].set(k_i), quadrature

    k = jax.lax.full_like(state.y, 0, shape=(tableau.stages, *state.y.shape))
    k, quadrature = fori_loop(0, tableau.stages, stage, (k, state.quadrature))

    def quadrature_where(accept):
        if one_row:
            keep = lambda new, old: jnp.where(accept[0], new, old)
            return jax.tree.map(keep, quadrature, state.quadrature)
        # The quadrature sums over rows, so rejected rows must be known beforehand: zero times their
        # integrand is no way out, as it may not be finite.
        taken, kept = jnp.where(accept, h, 0.0), jnp.where(accept[:, None], k, 0.0)
        again = lambda i, q: add_used(i, q, evaluate(i, kept, taken, taken * b[i])[1])
        return fori_loop(0, tableau.stages, again, state.quadrature)

    return state.y + h[:, None] * weighted_sum(b, k), k, quadrature_where


def with_tolerances(stepper: Stepper, rtol, atol) -> Stepper:
    """The stepper of the adjoint solve, with its own tolerances if they are given."""
    dtype = stepper.rtol.dtype
    given = {"rtol": rtol, "atol": atol}
    given = {name: jnp.asarray(value, dtype) for name, value in given.items() if value is not None}
    return dataclasses.replace(stepper, **given)


def time_cotangents(
    apply: Callable[..., Float[Array, "samples n"]],
    params: PyTree,
    times: Float[Array, "points rows"],
    states: Float[Array, "points samples n"],
    cotangents: Float[Array, "points samples n"],
) -> Float[Array, "points rows"]:
    """`cotangent . f(t, y)` at each point: the gradient with respect to its time.

    Moving the time of an output moves the output along its trajectory. Moving the start time moves
    the trajectory the other way.
    """

    def at(point):
        t, y, cotangent = point
        return over_rows(jnp.sum, cotangent * apply(params, t, y), t.shape[0])

    return jax.lax.map(at, (times, states, cotangents))


def cotangents(
    problem: Problem,
    perturbed: Problem,
    stepper: Stepper,
    integration: Integration,
    out: Integration,
    y0_bar: Float[Array, "samples n"],
    segment: Segment,
) -> Problem:
    """The cotangents of a problem, from the cotangents `out` of its solution and the backward
    solve.

    They are NaN where the forward or the backward solve failed.
    """
    unused = unused_rows(integration.result, out)
    problem = without_unused(problem, unused, integration.result)
    y0, t0, t1, ts = problem.y0, problem.t0, problem.t1, problem.ts
    params, apply = split(problem, perturbed, unused)
    ok = (integration.result == Result.SUCCESS) & (segment.result == Result.SUCCESS) | unused
    valid = nan_unless(ok, y0.dtype)
    if stepper.raises:
        # A failed forward solve has already raised. A solve without steps did not run: `vmap`
        # differentiates both branches of a `cond`, with zeros in place of the solve in the branch
        # that is not taken (or values of the other branch with the same shape, which cannot be told
        # apart).
        ran = (integration.result == Result.SUCCESS) & (integration.stats.num_steps > 0)
        result = jnp.where(ran, segment.result, Result.SUCCESS)
        nan = nan_or_raise(result, segment.t, where="backward solve")
        # The check is part of the value, so it cannot be eliminated as dead code.
        valid = valid + nan.astype(y0.dtype)

    def by_time(times, states, bars):
        return time_cotangents(apply, params, times, states, bars)

    t0_bar = t1_bar = ts_bar = None
    if perturbed.t0:
        start_bar = -jnp.where(unused[:, None], 0, y0_bar * valid[:, None])
        t0_bar = by_time(t0[None], y0[None], start_bar[None])[0]
    if perturbed.t1:
        t1_bar = by_time(t1[None], integration.y1[None], filled(out.y1, y0)[None])[0]
    if ts is not None and perturbed.ts:
        ts_bar = jnp.zeros_like(ts) if out.ys is None else by_time(ts, integration.ys, out.ys)
    bars = {"y0": y0_bar if perturbed.y0 else None, "t0": t0_bar, "t1": t1_bar, "ts": ts_bar}
    return bars_where(valid, unused, segment.quadrature, **bars)


def check_tolerances(rtol, atol) -> None:
    """Raise unless the tolerances of a backward solve are valid or None."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            non_negative(name, value, "None or a finite tolerance of at least 0")
