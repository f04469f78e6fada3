"""Events: a solve that ends where a condition crosses zero.

The first solve looks for the time, on the dense output of its steps. The second ends there, and is
differentiated like any other. With `g` the condition and `t*` its zero, the implicit function
theorem gives

    dt* = -dg / (dg/dt + dg/dy f),

with `dg` the change of `g` at the fixed time `t*`. One step of Newton's method has that derivative,
and lands on the zero as precisely as the second solve is, not the interpolant of the first.

References: Chen, Amos and Nickel (2021), arXiv:2011.03902.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._jax.sharding import fori_loop
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.method import Method
from jaxode.ode.loop.outcome import Stats
from jaxode.ode.loop.outputs import Curve
from jaxode.ode.loop.problem import Problem
from jaxode.ode.validation import one_of

# Within a step the condition is looked at so many times; two crossings between are not seen.
LOOKS = 8
# The longest step of Newton's method that is taken, in spans of the solve.
LONGEST = 1e-3

# (t [rows], y [rows, n]) -> [rows]
Condition = Callable[[Float[Array, " rows"], Float[Array, "rows n"]], Float[Array, " rows"]]


class Event(eqx.Module):
    """Ends a solve where `condition(t, y, args)` crosses zero.

    Args:
        condition: a function of the time, the state (of one sample, with a batch) and `args`, that
            returns a floating scalar. A crossing is seen if its sign changes between two of eight
            equal parts of a step; use `max_step` for one that comes and goes faster.
        direction: 1 for a condition that rises through zero, -1 for one that falls, 0 for both. One
            that is zero at the start, and then moves in this direction, ends the solve there.

    Raises:
        ValueError: if the direction is another.
    """

    condition: Callable[[Float[Array, ""], PyTree, PyTree], Float[Array, ""]]
    direction: Literal[-1, 0, 1] = eqx.field(static=True, default=0)

    def __check_init__(self):
        one_of("Event", "direction", self.direction, (-1, 0, 1))
        if not callable(self.condition):
            raise TypeError(
                f"Event(condition=...): must be a function condition(t, y, args); got "
                f"{self.condition!r}."
            )

    def crosses(self, before: Float[Array, "..."], after: Float[Array, "..."]):
        """Whether the condition goes through zero between two values."""
        rises, falls = (before <= 0) & (after >= 0), (before >= 0) & (after <= 0)
        return {1: rises, -1: falls, 0: rises | falls}[self.direction]


class Found(NamedTuple):
    """What the first solve has found."""

    came: Bool[Array, " rows"]
    t: Float[Array, " rows"]
    """When; the end time in rows without an event."""
    stats: Stats


def find(event: Event, condition: Condition, problem: Problem, method: Method) -> Found:
    """Where the condition first crosses zero. Without derivatives."""
    problem = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, problem
    )
    method = dataclasses.replace(method, dense=False)

    def stop(t, h, y, k):
        curve = Curve.of(method.tableau, t, h, y, k)

        def look(theta):
            time = t + theta * h
            return jax.lax.stop_gradient(condition(time, curve.at(time)))

        thetas = jnp.linspace(0, 1, LOOKS + 1, dtype=t.dtype)
        values = jax.vmap(lambda theta: look(jnp.full_like(t, theta)))(thetas)
        crossed = event.crosses(values[:-1], values[1:])
        found, first = crossed.any(axis=0), jnp.argmax(crossed, axis=0)
        bracket = thetas[first], thetas[first + 1], values[first, jnp.arange(len(t))]

        def halve(_, bracket):
            low, high, at_low = bracket
            middle = (low + high) / 2
            at_middle = look(middle)
            left = event.crosses(at_low, at_middle)
            where = lambda a, b: jnp.where(left, a, b)
            return where(low, middle), where(middle, high), where(at_low, at_middle)

        bits = jnp.finfo(t.dtype).nmant + 1
        refined = lambda: fori_loop(0, bits, halve, bracket)[1]
        theta = jax.lax.cond(found.any(), refined, lambda: bracket[1])
        time = t + theta * h
        return found, time, curve.at(time)

    out, _ = integrate(problem._replace(ts=None), method, stop=stop)
    assert out.stopped is not None
    return Found(out.stopped, jnp.where(out.stopped, out.t_reached, problem.t1), out.stats)


def ending(found: Found, problem: Problem) -> tuple[Problem, Any]:
    """The problem up to the events, and which of its outputs lie beyond."""
    ts, beyond = problem.ts, None
    t1 = jnp.where(found.came, jax.lax.stop_gradient(found.t), problem.t1)
    if ts is not None:
        beyond = jnp.sign(problem.t1 - problem.t0)[None] * (ts - t1[None]) > 0
        beyond &= found.came[None]
        ts = jnp.where(beyond, t1[None], ts)
    return problem._replace(t1=t1, ts=ts), beyond


def land(
    condition: Condition, found: Found, problem: Problem, out: Integration
) -> tuple[Float[Array, " rows"], Float[Array, "rows n"]]:
    """The time of the event, or the end, and the state there, with their derivatives."""
    t, y = problem.t1, jnp.where(found.came[:, None], out.y1, problem.y0)
    speed = jax.lax.stop_gradient(problem.slope(t, y))
    value, rate = jax.jvp(condition, (t, y), (jnp.ones_like(t), speed))
    move = -value / jax.lax.stop_gradient(rate)
    longest = LONGEST * jnp.abs(t - problem.t0)
    taken = jax.lax.stop_gradient(jnp.where(jnp.abs(move) <= longest, move, 0))
    move = jnp.where(found.came, taken + move - jax.lax.stop_gradient(move), 0)
    return t + move.astype(t.dtype), out.y1 + move[:, None].astype(y.dtype) * speed
