"""Root finding for events: the loop ends a row where its condition crosses zero.

A step that is accepted is searched on its dense output. If the condition crosses zero inside, the
step is taken again to end there, and once or twice more to end where Newton's method moves its end.
So the steps of the search are those of the solution.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.errors import Result
from jaxode._jax.sharding import fori_loop
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.progress import Progress
from jaxode.ode.loop.rows import entry_of_each
from jaxode.ode.loop.stepper import Stepper
from jaxode.ode.loop.trajectory import Curve, Step

# A condition as a function of the part of a step, from 0 to 1.
Inside = Callable[[Float[Array, " rows"]], Float[Array, " rows"]]
# Evaluate the condition this often per step. Two crossings in between go unnoticed.
LOOKS_PER_STEP = 8
# Take a step again at most this often.
MOST_LANDINGS = 8


class Crossing(eqx.Module):
    """A condition that ends a row, without derivatives."""

    condition: Any
    """`(t [rows], y [samples, n], args) -> [rows]`, without closed-over values."""
    direction: Literal[-1, 0, 1] = eqx.field(static=True)

    def between(self, before: Float[Array, "..."], after: Float[Array, "..."]):
        """Whether the condition goes through zero between two values."""
        rises, falls = (before <= 0) & (after >= 0), (before >= 0) & (after <= 0)
        return {1: rises, -1: falls, 0: rises | falls}[self.direction]


class CrossingSearch(NamedTuple):
    """The state of the search in each row."""

    target: Float[Array, " rows"]
    """The end of the next step. NaN if no crossing was found."""
    landings: Int[Array, " rows"]
    """The number of steps that have ended at a target."""
    stopped: Bool[Array, " rows"]

    @classmethod
    def start(cls, t0: Float[Array, " rows"]) -> "CrossingSearch":
        none = jnp.zeros(t0.shape, jnp.int32)
        return cls(jnp.full_like(t0, jnp.nan), none, none > 0)

    @property
    def landing(self) -> Bool[Array, " rows"]:
        return ~jnp.isnan(self.target)


def watch(
    problem: InitialValueProblem,
    stepper: Stepper,
    search: CrossingSearch,
    now: Progress,
    step: Step,
    then: Progress,
) -> tuple[Progress, CrossingSearch]:
    """The progress and the search after a step, given the progress `then` of error control.

    A step with a crossing inside, or one that misses its target, is discarded. The step that ends
    at its target ends the row.
    """
    inputs = (problem.args, problem.t0, problem.t1, now, step, then)
    args, start, end, now_, step_, then_ = jax.lax.stop_gradient(inputs)
    t, h, landing, accept = step_.t, step_.h, search.landing, then_.accepted > now_.accepted
    span, eps = jnp.abs(end - start), jnp.finfo(t.dtype).eps
    curve = Curve.of_step(stepper.method, step_)

    def look(t, y):
        return stepper.stop.condition(t, y, args)

    def inside(theta):
        return look(t + theta * h, curve.at(t + theta * h))

    # Neighboring steps share the values at their ends, or rounding could lose a crossing.
    values_at_ends, searched = (
        (look(now_.t, now_.y), look(then_.t, then_.y)),
        accept & ~landing & (h != 0),
    )
    crosses, theta, jumps = _first_crossing(
        stepper.stop, inside, values_at_ends, step_, searched, span
    )
    _, rate = _slope(inside, jnp.ones_like(t))
    move = -values_at_ends[1].astype(t.dtype) * h / jnp.where(rate == 0, 1, rate)
    move = jnp.where((rate != 0) & jnp.isfinite(move), move, 0)
    settled = jnp.maximum(100 * eps, 1e-4 * stepper.controller.rtol.astype(t.dtype)) * span
    # Moves as small as the rounding of the condition, or of the time, are no failure.
    rounded = jnp.maximum(settled, eps * (1e4 * jnp.abs(then_.t - start) + 4 * jnp.abs(then_.t)))
    landed = landing & accept
    far = landed & (jnp.abs(move) > settled)
    again = far & (search.landings < MOST_LANDINGS - 1)
    lost = (far & ~again & (jnp.abs(move) > rounded)) | (crosses & jumps)
    stops = landed & ~again & ~lost
    low, high = jnp.minimum(t, end), jnp.maximum(t, end)
    target = jnp.where(again, jnp.clip(then_.t + move, low, high), jnp.nan)
    target = jnp.where(crosses, t + theta * h, target)
    search = CrossingSearch(
        target, search.landings + landed.astype(jnp.int32), search.stopped | stops
    )
    discarded = crosses | again | lost

    def keep(new, old):
        return jnp.where(discarded.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

    at_end = jnp.where(landing, now.at_end | stops, then.at_end)
    progress = jax.tree.map(keep, then._replace(at_end=at_end), now)
    progress = progress._replace(
        t=jnp.where(lost, jnp.where(crosses, t + theta * h, then_.t), progress.t),
        result=jnp.where(lost, Result.EVENT_NOT_FOUND, then.result).astype(jnp.int32),
        rejected=then.rejected + (discarded & accept).astype(jnp.int32),
    )
    return progress, search


def _slope(inside: Inside, theta: Float[Array, " rows"]):
    """The condition inside a step, and its derivative by the part of the step."""
    value, rate = jax.jvp(inside, (theta,), (jnp.ones_like(theta),))
    return value.astype(theta.dtype), rate.astype(theta.dtype)


def _first_crossing(crossing: Crossing, inside: Inside, values_at_ends, step: Step, searched, span):
    """Find the first zero of the condition: whether there is one, at which part of the step, and
    whether it jumps there. It is known at the `values_at_ends`, and searched in some rows."""
    t, h = step.t, step.h
    thetas, eps = jnp.linspace(0, 1, LOOKS_PER_STEP + 1, dtype=t.dtype), jnp.finfo(t.dtype).eps
    between = jax.vmap(lambda theta: inside(jnp.full_like(t, theta)))(thetas[1:-1])
    values = jnp.concatenate([values_at_ends[0][None], between, values_at_ends[1][None]])
    crossed = crossing.between(values[:-1], values[1:]) & searched[None]
    crosses, part = crossed.any(axis=0), jnp.argmax(crossed, axis=0)

    def refined():
        """The root between two looks, and whether the condition jumps there.

        Newton's method would go elsewhere. Without a slope, the root is not moved.
        """

        def halve(_, bracket):
            low, high, at_low = bracket
            middle = (low + high) / 2
            at_middle = inside(middle)
            in_lower = crossing.between(at_low, at_middle)
            halves = (low, middle, at_low), (middle, high, at_middle)
            return jax.tree.map(lambda first, second: jnp.where(in_lower, first, second), *halves)

        bracket = thetas[part], thetas[part + 1], entry_of_each(values, part)
        theta = fori_loop(0, jnp.finfo(t.dtype).nmant + 1, halve, bracket)[1]
        value, rate = _slope(inside, theta)
        # A continuous condition is zero here up to the rounding of the time; one that jumps is not.
        off = eps**0.25 * jnp.abs(h) + 4 * eps * (span + jnp.abs(t))
        jumps = (rate != 0) & (jnp.abs(value * h) > jnp.abs(rate) * off)
        return theta, jumps

    return crosses, *jax.lax.cond(crosses.any(), refined, lambda: (jnp.ones_like(t), crosses))
