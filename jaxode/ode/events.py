"""Events: a solve that ends where a condition crosses zero.

The first solve finds the time on the dense output of its steps. Further solves end there, and
Newton's method moves their end until the condition is zero. The last one is differentiated like any
other solve. With `g` the condition and `t*` its zero, the implicit function theorem gives

    dt* = -dg / (dg/dt + dg/dy f),

where `dg` is the change of `g` at the fixed time `t*`. Differentiating this formula, in which the
state at the fixed time moves with `t*`, gives second derivatives.

References: Chen, Amos and Nickel (2021), arXiv:2011.03902.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxode._checks.arguments import integer, one_of
from jaxode._checks.caller import arg, public
from jaxode._checks.errors import Result
from jaxode._jax.primitives import first_derivatives_only
from jaxode._jax.sharding import fori_loop, while_loop
from jaxode._jax.tangents import filled, undifferentiated_unless, with_tangent
from jaxode.ode.field import check_field
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.outputs import Curve
from jaxode.ode.loop.problem import Problem, Stepper
from jaxode.ode.loop.rows import entry_of_each, replace_rows
from jaxode.ode.loop.stats import Stats

# The condition is evaluated this often per step. Two crossings in between go unnoticed.
LOOKS = 8
UP_TO_SECOND = (
    "Event: the time of an event, and what depends on it, has only first and second derivatives."
)
# The largest number of solves that may land on the event.
LANDINGS = 8

# (t [rows], y [samples, n]) -> [rows]
Condition = Callable[[Float[Array, " rows"], Float[Array, "samples n"]], Float[Array, " rows"]]


class Event(eqx.Module):
    """Ends a solve where `condition(t, y, args)` crosses zero, or changes its state there.

    Args:
        condition: a function of time, state (of one sample, with a batch) and `args` that returns a
            floating scalar, with derivatives in forward mode. Its sign is checked at eight equal
            parts of each step. Set `max_step` if it can change sign twice within one part.
        direction: 1 if only a rise through zero along the solve counts, -1 if only a fall does, 0
            for both. A condition that is zero at the start and then moves in this direction ends
            the solve there.
        change: if given, the solve goes on from the state `change(t, y, args, i)`, where `i` is
            the number of the event, an int32 scalar that counts from 0. The first event after
            `most` changes ends the solve. `Solution.ys` at the time of an event is the state before
            it. Not with `dense`. After the change, the condition should be off zero, or move
            against `direction`: otherwise the event comes at once again, and after `most` changes
            ends the solve there.
        most: how often the state may change. Each change costs three or four solves up to it.

    If the condition crosses zero with zero slope, the derivative of the time is not finite, and the
    solve can fail (`EVENT_NOT_FOUND`): use one with a slope there, such as `t - a` for
    `(t - a) ** 3`. If it jumps across zero and has a slope there, the solve fails, too. A NaN
    condition never crosses.

    Raises:
        TypeError, ValueError: for functions and numbers of the wrong kind.
    """

    condition: Callable[[Float[Array, ""], PyTree, PyTree], Float[Array, ""]]
    direction: Literal[-1, 0, 1] = eqx.field(static=True, default=0)
    change: Callable[[Float[Array, ""], PyTree, PyTree, Int[Array, ""]], PyTree] | None = None
    most: int | None = eqx.field(static=True, default=None)

    @public("")
    def __check_init__(self):
        one_of("direction", self.direction, (-1, 0, 1))
        check_field("condition", self.condition, "condition(t, y, args)")
        if self.change is not None:
            check_field("change", self.change, "change(t, y, args, i)")
            cure = " It bounds how often the state changes."
            integer("most", self.most, cure=cure)
        elif self.most is not None:
            raise ValueError(f"{arg('most')} needs a change; got most={self.most!r}. Pass change.")

    def crosses(self, before: Float[Array, "..."], after: Float[Array, "..."]):
        """Whether the condition goes through zero between two values."""
        rises, falls = (before <= 0) & (after >= 0), (before >= 0) & (after <= 0)
        return {1: rises, -1: falls, 0: rises | falls}[self.direction]


def solve_to_event(
    event: Event,
    condition_of: Callable[..., Float[Array, " rows"]],
    problem: Problem,
    stepper: Stepper,
    adjoint: Any,
) -> tuple[Problem, Integration]:
    """Solve the problem up to the event of each row, where `condition_of(t, y, args)` is zero."""
    condition = lambda t, y: condition_of(t, y, problem.args)
    fixed = jax.lax.stop_gradient(problem._replace(ts=None))
    searching = dataclasses.replace(stepper, dense=False)
    look = lambda t, y: jax.lax.stop_gradient(condition(t, y))
    first = _find(event, look, fixed, searching)
    came = first.stopped
    assert came is not None
    start = jnp.where(came, first.t_reached, fixed.t1)
    jumps = came & _jumps(condition, fixed, start, first)
    t1, landed, stats = _land(condition, fixed, searching, came & ~jumps, start, first.stats)
    landed = jnp.where(jumps, Result.EVENT_NOT_FOUND, landed)
    ts, beyond = problem.ts, None
    if ts is not None:
        beyond = came[None] & (jnp.sign(problem.t1 - problem.t0)[None] * (ts - t1[None]) > 0)
        ts = jnp.where(beyond, t1[None], ts)
    t1 = jnp.where(came, t1, problem.t1)
    # A row whose solves do not land on the event fails, together with its derivatives.
    t1 = jnp.where(landed == Result.SUCCESS, t1, jnp.nan)
    problem = problem._replace(t1=t1, ts=ts)
    out = adjoint.integrate(problem, stepper)
    result = jnp.where(landed == Result.SUCCESS, out.result, landed).astype(jnp.int32)
    failed = result != Result.SUCCESS
    t1, y1 = _moved(condition_of, came & ~failed, problem, out)
    t1 = jnp.where(failed, jnp.sum(y1, axis=1).astype(t1.dtype), t1)
    ys = out.ys
    if ys is not None and beyond is not None:
        ys = jnp.where(beyond[..., None], y1[None], ys)
    reached = jnp.where(landed == Result.SUCCESS, out.t_reached, start)
    reached = jax.lax.stop_gradient(jnp.where(failed, reached, t1))
    out = out._replace(y1=y1, ys=ys, result=result, t_reached=reached, stopped=came)
    return problem._replace(t1=t1), out._replace(stats=jax.tree.map(jnp.add, stats, out.stats))


def _find(event: Event, look: Condition, problem: Problem, stepper: Stepper) -> Integration:
    """Integrate to the first zero crossing of the condition on the dense output."""

    def stop(state, step):
        t, h = state.t, step.t - state.t
        curve = Curve.of(stepper.tableau, t, h, state.y, step.k)
        inside = lambda theta: look(t + theta * h, curve.at(t + theta * h))
        thetas = jnp.linspace(0, 1, LOOKS + 1, dtype=t.dtype)
        between = jax.vmap(lambda theta: inside(jnp.full_like(t, theta)))(thetas[1:-1])
        # Both ends are shared with the neighboring steps, or rounding could lose a crossing.
        ends = [look(t, state.y)[None], look(step.t, step.y)[None]]
        values = jnp.concatenate([ends[0], between, ends[1]])
        crossed = event.crosses(values[:-1], values[1:]) & step.accept[None]
        found, part = crossed.any(axis=0), jnp.argmax(crossed, axis=0)
        bracket = thetas[part], thetas[part + 1], entry_of_each(values, part)

        def halve(_, bracket):
            low, high, at_low = bracket
            middle = (low + high) / 2
            at_middle = inside(middle)
            left = event.crosses(at_low, at_middle)
            where = lambda a, b: jnp.where(left, a, b)
            return where(low, middle), where(middle, high), where(at_low, at_middle)

        bits = jnp.finfo(t.dtype).nmant + 1
        refined = lambda: fori_loop(0, bits, halve, bracket)[1]
        time = t + h * jax.lax.cond(found.any(), refined, lambda: bracket[1])
        return found, time, curve.at(time)

    return integrate(problem, stepper, stop=stop)[0]


def _rate(condition: Condition, slope, t, y):
    """The condition, and its derivative along the trajectory."""
    return jax.jvp(condition, (t, y), (jnp.ones_like(t), slope))


def _jumps(condition: Condition, problem: Problem, t, found: Integration):
    """Whether the condition jumps across zero: Newton's method would go to another time.

    Not if it has no slope: the time then stays where it is.
    """
    of_time = jax.lax.stop_gradient(_rate(condition, problem.slope(t, found.y1), t, found.y1))
    value, rate = (jnp.abs(x).astype(t.dtype) for x in of_time)
    step = jnp.abs(t - problem.t0) / jnp.maximum(found.stats.num_accepted, 1).astype(t.dtype)
    span, eps = jnp.abs(problem.t1 - problem.t0), jnp.finfo(t.dtype).eps
    # Where the condition is continuous, the time is off by rounding, not by this part of a step.
    return (rate != 0) & (value > rate * (eps**0.25 * step + 4 * eps * (span + jnp.abs(t))))


def _land(condition: Condition, problem: Problem, stepper: Stepper, came, t1, stats: Stats):
    """The end times at which the condition is zero, the `Result` of each row, and the work.

    Newton's method. Where the condition has no slope, the time stays where the interpolant crosses
    zero.
    """
    span = jnp.abs(problem.t1 - problem.t0)
    info = jnp.finfo(t1.dtype)
    settled = jnp.maximum(100 * info.eps, 1e-4 * stepper.rtol.astype(t1.dtype)) * span

    def solve(carry):
        count, t1, far, _, stats = carry
        out, _ = integrate(problem._replace(t1=t1), stepper)
        value, rate = _rate(condition, problem.slope(t1, out.y1), t1, out.y1)
        value, rate = jax.lax.stop_gradient((value, rate))
        move = (-value / jnp.where(rate == 0, 1, rate)).astype(t1.dtype)
        # A row that has settled stays, whatever the others do.
        move = jnp.where(far & (rate != 0) & jnp.isfinite(move), move, 0)
        moved = jnp.clip(
            t1 + move, *(f(problem.t0, problem.t1) for f in (jnp.minimum, jnp.maximum))
        )
        size, stats = jnp.abs(moved - t1), jax.tree.map(jnp.add, stats, out.stats)
        # Moves as small as the rounding of the condition, or of the time, are no failure.
        moves = 1e4 * jnp.abs(t1 - problem.t0) + 4 * jnp.abs(t1)
        rounded = jnp.maximum(settled, info.eps * moves)
        return count + 1, moved, size > settled, size > rounded, stats

    def proceed(carry):
        count, _, far, *_ = carry
        return (count < LANDINGS) & far.any()

    carry = jnp.int32(0), t1, came, jnp.zeros_like(came), stats
    _, t1, _, lost, stats = while_loop(proceed, solve, carry)
    return t1, jnp.where(lost, Result.EVENT_NOT_FOUND, Result.SUCCESS), stats


def _moved(condition: Callable[..., Array], came, problem: Problem, out: Integration):
    """The time of the event or the end, and the state there, both with their derivatives."""
    good = jnp.where(came.any(), came, out.result == Result.SUCCESS)
    shared, row_args = problem.args
    t, y, row_args = replace_rows((problem.t1, out.y1, row_args), ~came, good)
    inputs = (t, y), condition, problem.field, (shared, row_args)
    t, y = _of_zero(*undifferentiated_unless(came.any(), inputs), came)
    return jnp.where(came, t, problem.t1), jnp.where(came[:, None], y, out.y1)


def _of_zero(end, *inputs):
    """The time of the zero and the state there, whose value is the state at that fixed time.

    The implicit function theorem. Without a slope, there is no derivative.
    """

    def tangent(primals, dots):
        (end, *inputs), ((_, y_dot), *dots) = primals, dots
        (condition, field, args, came), (t, y) = inputs, end
        time, state = _of_zero(end, *inputs)
        # Zero, but it has derivatives. The state at the fixed time `t + after` neglects its square.
        after = first_derivatives_only(time - t, UP_TO_SECOND)[:, None].astype(y.dtype)

        def at_fixed_time(condition, field, args, y):
            y = y + after * field(t, y, args)
            return y, condition(time, y, args)

        given, their_dots = (*inputs[:3], y), (*dots[:3], y_dot)
        (near, value), dots = eqx.filter_jvp(at_fixed_time, given, their_dots)
        y_dot, value_dot = map(filled, dots, (near, value))
        slope = field(time, near, args)
        _, rate = _rate(lambda t, y: condition(t, y, args), slope, time, near)
        rate = jnp.where(came, jnp.where(rate == 0, jnp.nan, rate), 1)
        # Without a slope, the time is unknown also where the condition does not depend on the
        # state.
        t_dot = -(value_dot + 0 * jnp.sum(y_dot, axis=1).astype(rate.dtype)) / rate
        return t_dot.astype(t.dtype), y_dot + t_dot[:, None].astype(state.dtype) * slope

    return with_tangent(end, tangent, *inputs)
