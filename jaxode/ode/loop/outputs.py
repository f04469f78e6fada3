"""Values inside steps, by the solver's own interpolant."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._jax.sharding import while_loop
from jaxode._jax.tangents import moving, with_tangent
from jaxode.ode.loop.problem import Problem, weighted_sum
from jaxode.ode.loop.rows import entry_of_each, place_of_each
from jaxode.ode.solvers.base import Method


class Steps(NamedTuple):
    """Accepted steps, with room for all that the loop can take. Unused entries have no meaning."""

    times: Float[Array, "steps+1 rows"]
    """Step `i` of a row goes from `times[i]` to `times[i + 1]`. They are equal if the row waits."""
    y: Float[Array, "steps samples n"]
    k: Float[Array, "steps stages samples n"]
    count: Int[Array, ""]

    @classmethod
    def none_yet(cls, length: int, stages: int, t0: Float[Array, " rows"], y0) -> "Steps":
        times = jnp.broadcast_to(t0, (length + 1, *t0.shape))
        y = jnp.broadcast_to(y0, (length, *y0.shape))
        k = jax.lax.full_like(y0, 0, shape=(length, stages, *y0.shape))
        return cls(times, y, k, jnp.zeros((), jnp.int32))

    def append(self, t, y, k, advanced: Bool[Array, ""]) -> "Steps":
        """Append a step from `y` to the time `t`. If no row accepted it, it is overwritten
        later."""
        put = lambda into, x, at: jax.lax.dynamic_update_index_in_dim(into, x, at, 0)
        times, count = put(self.times, t, self.count + 1), self.count + advanced.astype(jnp.int32)
        return Steps(times, put(self.y, y, self.count), put(self.k, k, self.count), count)


class Curve(NamedTuple):
    """The dense output of a step: a polynomial in `theta`, which runs from 0 to 1."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]
    y: Float[Array, "samples n"]
    powers: Float[Array, "degree samples n"]
    """The coefficients of `theta`, `theta^2` and so on."""
    slope: Float[Array, "samples n"]

    @classmethod
    def of(cls, method: Method, t, h, y, k: Float[Array, "stages samples n"]) -> "Curve":
        """The dense output of the step `t -> t + h` with these stages."""
        powers = weighted_sum(jnp.asarray(method.dense, y.dtype), k)
        return cls(t, h, y, h.astype(y.dtype)[None, :, None] * powers, k[0])

    def at(self, time: Float[Array, " rows"]) -> Float[Array, "samples n"]:
        """The state at one time per row."""
        waited = self.h == 0
        past = (time - self.t).astype(self.y.dtype)
        h = jnp.where(waited, 1.0, self.h).astype(self.y.dtype)
        theta = jnp.where(waited, 0.0, past / h)[:, None]
        moved = self.powers[-1]
        for power in self.powers[-2::-1]:
            moved = power + theta * moved
        # A step of size zero has one output, its start. Its derivative with respect to time is the
        # slope.
        along = jnp.where(waited, past, 0.0)[:, None]
        return self.y + theta * moved + along * self.slope


def save_times_at(
    ts: Float[Array, "times rows"], index: Int[Array, " rows"]
) -> Float[Array, " rows"]:
    """The output time with this index, per row. Any of them if the index is out of range."""
    return entry_of_each(ts, jnp.clip(index, 0, ts.shape[0] - 1))


def save(problem: Problem, method: Method, step: Any, start: Any, ys, saved: Int[Array, " rows"]):
    """Write the dense output at every output time that an accepted `step` has reached.

    The step goes on from `start`. `saved` counts the outputs written per row. At the end of a step
    the output is the state there itself, with the derivatives of the dense output.
    """
    ts, sign = problem.ts, jnp.sign(problem.t1 - problem.t0)
    assert ts is not None
    count = len(ts) if problem.outputs is None else problem.outputs
    curve = Curve.of(method, start.t, step.t - start.t, start.y, step.k)

    def pending(saved):
        reached = step.last | (sign * (save_times_at(ts, saved) - step.t) <= 0)
        return step.accept & (saved < count) & reached

    def write(carry):
        ys, saved = carry
        due = pending(saved)
        time = save_times_at(ts, saved)
        inside = curve.at(time)
        value = jnp.where((time == step.t)[:, None], step.y, inside)
        value = with_tangent(value, lambda _, dots: dots[1], inside)
        place = place_of_each(jnp.where(due, saved, ts.shape[0]))
        ys = ys.at[place].set(value, mode="drop")
        return ys, saved + due.astype(jnp.int32)

    return while_loop(lambda carry: pending(carry[1]).any(), write, (ys, saved))


def beyond(problem: Problem, t: Float[Array, " rows"]) -> Bool[Array, "times rows"]:
    """Which outputs lie beyond a time."""
    assert problem.ts is not None
    return jnp.sign(problem.t1 - problem.t0)[None] * (problem.ts - t[None]) > 0


def padded(
    problem: Problem, ys: Float[Array, "times samples n"]
) -> Float[Array, "times samples n"]:
    """The outputs of each row, with its last one in place of padding.

    Padding moves along the field if its times move past the last one.
    """
    ts, count = problem.ts, problem.outputs
    if ts is None or count is None:
        return ys
    number = jnp.arange(ts.shape[0], dtype=jnp.int32)
    last = jax.vmap(lambda number: jnp.minimum(number, count - 1))(number)
    given, ys = (jax.vmap(entry_of_each, (None, 0))(x, last) for x in (ts, ys))

    def slope(ys, past, problem):
        slope = problem.slope(problem.ts[-1], ys[-1])
        # A failed row has NaN outputs at any time.
        return jnp.where(jnp.isfinite(slope), slope, 0)[None]

    return moving(ys, ts - given, slope, problem)
